"""GeneNetwork: regulatory edges read from a fitted field, and forecasts with genes held at a value."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from invirtuo.cells.conditions import Conditions
from invirtuo.cells.courses import Course
from invirtuo.cells.dataset import CellDataset
from invirtuo.errors import preview
from invirtuo.fit import FitConfig
from invirtuo.verbs import saving
from invirtuo.verbs.edge_support import Evidence, false_discovery_rate, gain_interval, strengths_by_chance, words
from invirtuo.verbs.forecast import Forecaster, Start

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["OPEN", "GeneNetwork", "edge_matrices"]

OPEN = 1e-5  # smallest mean |df_j / dx_i| of an edge
MAX_STATES = 60  # at which the field is read


class GeneNetwork(Forecaster):
    """Base of the forecasters whose field has a Jacobian from which edges between genes are read."""

    evidence = Evidence()
    fit_plan: FitConfig  # of the fit, kept by a class that has controls

    @abstractmethod
    def jacobian(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """(m, n, g, g) [in, out], derivative of the field at states (m, n, g), gates as for evaluation."""

    @abstractmethod
    def gate_probability(self) -> np.ndarray:
        """(g, g) [in, out], probability that a connection is open, mean over members."""

    @abstractmethod
    def sparsity(self, n_draws: int = 20, *, other: Sequence[str] = (), seed: int = 0) -> pd.DataFrame:
        """How sparse the field is, for evaluation and for sampled gates."""

    def controls(self) -> dict[str, GeneNetwork]:
        """Models, not fitted, that say what edges are worth; a class may have none, or one of them.

        "no_connections" is the same field without connections between genes, "by_chance" the same model for courses in
        which no gene goes with another.
        """
        return {}

    def prepare(self, dataset: CellDataset) -> None:
        super().prepare(dataset)
        self.beside, self.evidence = {}, Evidence()

    def fit_beside(self, dataset: CellDataset, held_out: Sequence[Course]) -> None:
        """Fit the controls as this model was fitted; forecast held-out courses without connections."""
        plan = replace(self.fit_plan, progress=False)
        for name, other in self.controls().items():
            if name == "no_connections" and not held_out:
                continue
            other.fit_plan = plan
            other.prepare(dataset)
            other._train_stages(dataset, plan, {}, {})
            other.eval()
            if name == "by_chance":
                size = edge_matrices(other)["size"].mean(axis=0)
                self.evidence = self.evidence._replace(null=strengths_by_chance(size))
            else:
                self.beside = {name: other}
                gain = connection_gain(self, other, held_out)
                self.evidence = self.evidence._replace(gain=gain)

    def facts(self, dataset: CellDataset) -> dict[str, Any]:
        """Of a forecaster, and the gain of connections: error without them minus error with them, mean over genes."""
        facts = super().facts(dataset)
        by_course = self.evidence.by_course
        mean, lower, upper = gain_interval(by_course)
        gain = {"courses": len(by_course), "mean": float(mean), "lower": float(lower), "upper": float(upper)}
        return facts | {"gain_of_connections": gain if len(by_course) > 1 else None}

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = super().arrays()
        arrays |= {f"evidence/edges/{name}": array for name, array in self.evidence._asdict().items()}
        for name, other in self.beside.items():
            weights = other.named_parameters()
            arrays |= {f"{name}/weights/{key}": weight.detach().numpy() for key, weight in weights}
        return arrays

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load_arrays(arrays)
        for (name, kind), state in saving.by_owner(arrays).items():
            if name == "evidence":
                self.evidence = Evidence(**state)
            elif kind == "weights":
                other = self.controls()[name]
                other.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()}, strict=False)
                self.beside = {name: other.eval()}

    def network(self, labels: Conditions | None = None, *, n_edges: int | None = None) -> pd.DataFrame:
        """Signed edges between genes, read from the Jacobian of the field along the training courses.

        Parameters
        ----------
        labels
            Read along these courses only: ``{"lineage": "B"}``, a name like ``"B|s2d1"``, or several.
        n_edges
            Keep the strongest ones; None keeps all that are not zero.

        Returns
        -------
        DataFrame, strongest first: ``regulator``, ``target``; ``score``, mean ``|df_j / dx_i|``, standardised genes;
        ``sign`` of the mean; ``consistency``, size of the mean over the score; ``frequency``, share of the ensemble in
        which the edge is open; ``gate``, probability that it is open; ``gain``, ``gain_lower`` and ``gain_upper``, by
        how much connections lower the squared error of the target in held-out courses, mean and 95 % interval over
        courses, in variances of the gene; ``fdr``, edges as strong in a fit to courses in which no gene goes with
        another, over the edges as strong in this one; ``support``, what these say in words. Edges are predictive
        dependencies and no proof of regulation.
        """
        self._check_fitted()
        return edge_table(self, labels, n_edges)

    def knock_out(
        self, genes: str | Sequence[str], cells: AnnData | None = None, times: Sequence[float] | None = None
    ) -> AnnData:
        """Hold genes at zero from the first state on: change of every gene, and of where courses end.

        Parameters
        ----------
        genes
            One name or several.
        cells, times
            As in :meth:`forecast`; without cells, the training courses.

        Returns
        -------
        AnnData as of :meth:`forecast`, X the change (disturbed minus undisturbed) in the data space, layers "lower" and
        "upper" (range of the ensemble), "undisturbed", "disturbed". ``var``: ``effect`` at the end in standard
        deviations, ``agreement`` of its sign over the ensemble and courses. ``uns["fate"]``: how far each course is
        moved towards each lineage, see :func:`fate`. Directions are usable, sizes are not calibrated.
        """
        return self.overexpress(genes, 0.0, cells, times)

    def overexpress(
        self,
        genes: str | Sequence[str],
        level: float | Sequence[float] | None = None,
        cells: AnnData | None = None,
        times: Sequence[float] | None = None,
    ) -> AnnData:
        """Hold genes at a level from the first state on; see :meth:`knock_out`.

        Parameters
        ----------
        level
            In the data space, one for all genes or one for each; None: the highest of the training courses.
        """
        self._check_fitted()
        names = [genes] if isinstance(genes, str) else list(genes)
        if level is None:
            expression = self.unscaled(self.course_values.numpy())
            highest = pd.Series(expression.max(axis=0), self.genes)
            values = highest.reindex(names).to_numpy()
        else:
            values = np.broadcast_to(np.asarray(level, dtype=float), (len(names),))
        return intervene(self, names, values, cells, times)


@torch.no_grad()
def edge_matrices(model: GeneNetwork, labels: Conditions | None = None, chunk: int = 6) -> dict[str, np.ndarray]:
    """Mean and mean absolute Jacobian over training states, (m, g, g) [regulator, target], standardised genes.

    Parameters
    ----------
    labels
        Read the field at states of these courses only: ``{"lineage": "B"}``, a name like ``"B|s2d1"``, or several.
    """
    # states at which the field is read, the same for every member of the ensemble
    courses = _courses(model, labels)
    states, names = _states(courses)
    x = torch.from_numpy(states).float().expand(model.config.n_members, *states.shape)
    codes = model.labels_of(names)

    # a few states at a time: a Jacobian holds g x g values for each member
    total: dict[str, Any] = {"mean": 0.0, "size": 0.0}
    for begin in range(0, len(states), chunk):
        rows = slice(begin, begin + chunk)
        jacobian = model.jacobian(x[:, rows], None if codes is None else codes[rows])
        total["mean"] += jacobian.sum(dim=1)
        total["size"] += jacobian.abs().sum(dim=1)
    return {name: (value / len(states)).numpy() for name, value in total.items()}


def _courses(model: GeneNetwork, labels: Conditions | None) -> list[Course]:
    """The training courses with these labels; all, if none are given."""
    conditions = model.named(labels)
    found = []
    for course in model.training_courses():
        if any(condition.items() <= course.labels.items() for condition in conditions):
            found.append(course)
    if not found:
        raise ValueError(f"no training course is {preview(conditions)}; there are {preview(model.known)}")
    return found


def _states(courses: Sequence[Course]) -> tuple[np.ndarray, list[Mapping[str, str]]]:
    """States evenly spaced along all courses, and their labels."""
    values = np.concatenate([course.values for course in courses])
    names = [course.labels for course in courses for _ in course.time]
    n_states = min(MAX_STATES, len(values))
    chosen = np.unique(np.linspace(0, len(values) - 1, n_states).astype(int))
    return values[chosen], [names[i] for i in chosen]


def edge_table(model: GeneNetwork, labels: Conditions | None = None, n_edges: int | None = None) -> pd.DataFrame:
    """Signed edges, strongest first; a gene's effect on itself is left out."""
    # (g, g) [regulator, target], over the members of the ensemble
    matrices = edge_matrices(model, labels)
    size, mean = matrices["size"], matrices["mean"].mean(axis=0)
    score = size.mean(axis=0)
    frequency = (size > OPEN).mean(axis=0)
    gate = model.gate_probability()

    # edges between two genes, strongest first
    between_genes = 1 - np.eye(len(score))
    source, target = np.nonzero(score * between_genes > OPEN)
    order = np.argsort(-score[source, target], kind="stable")
    source, target = source[order], target[order]
    edges = (source, target)
    genes = np.array(model.genes)
    table = pd.DataFrame({"regulator": genes[source], "target": genes[target], "score": score[edges]})
    table["sign"] = np.sign(mean[edges]).astype(int)
    table["consistency"] = np.abs(mean[edges]) / score[edges]
    table["frequency"] = frequency[edges]
    table["gate"] = gate[edges]

    # what speaks for them: the gain of their target, and how strong edges are by chance
    gain, null = model.evidence
    interval = gain_interval(gain if gain.size else np.zeros((0, len(genes))))
    for name, values in zip(("gain", "gain_lower", "gain_upper"), interval, strict=True):
        table[name] = values[target]
    false = false_discovery_rate(null, size, edges) if len(null) else None
    table["fdr"] = np.nan if false is None else false
    table["support"] = words(model.card.get("beats_baselines"), table["gain_lower"].to_numpy(), false)
    return table.head(n_edges) if n_edges is not None else table


def support(model: GeneNetwork) -> str:
    """Whether forecasts of held-out courses support the connections of the field, as a whole."""
    _, lower, _ = gain_interval(model.evidence.by_course)
    found: str = words(model.card.get("beats_baselines"), np.atleast_1d(lower))[0]
    return found.replace("the target", "courses")


def connection_gain(model: GeneNetwork, other: GeneNetwork, parts: Sequence[Course]) -> np.ndarray:
    """(c, g), squared error of each gene in each course in forecasts of the other model, minus that of this one."""
    starts, times = model.questions(parts)
    rows = []
    for course, mine, theirs in zip(parts, model.paths(starts, times), other.paths(starts, times), strict=True):
        error = (mine.mean(axis=0) - course.values) ** 2
        other_error = (theirs.mean(axis=0) - course.values) ** 2
        rows.append((other_error - error).mean(axis=0))
    return np.stack(rows)


def intervene(
    model: GeneNetwork, genes: Sequence[str], values: np.ndarray, cells: AnnData | None, times: Sequence[float] | None
) -> AnnData:
    """Hold genes at values (data space) from the first state on, and compare with the undisturbed forecast."""
    import anndata

    # from the starts of the training courses, or from given cells
    columns = _columns(model, genes)
    if cells is None:
        courses = model.training_courses()
        starts = [model.preparation.first(course) for course in courses]
        ends = [(model.known[course.name]["low"], model.known[course.name]["high"]) for course in courses]
    else:
        starts, ends = model._starts(cells, None)
    asked = model.asked(starts, ends, times)

    # the same starts with the genes at their level, where they have no velocity
    level = model.scaled(np.asarray(values, float)[None], columns)[0]
    is_free = torch.ones(len(model.genes))
    is_free[columns] = 0.0
    clamped_starts = []
    for start in starts:
        x0 = np.array(start.x0, dtype=float)
        x0[columns] = level
        clamped_starts.append(start._replace(x0=x0))
    undisturbed = model.paths(starts, asked)
    disturbed = model.paths(clamped_starts, asked, held=is_free)
    change = [after - before for before, after in zip(undisturbed, disturbed, strict=True)]

    # change of every gene at every time, in the data space
    scale: Any = model.transforms["scale"]
    sd = np.asarray(scale.sd)
    obs = model.table_of(starts, asked, ends)
    var = pd.DataFrame(index=pd.Index(model.genes))
    result = anndata.AnnData(_rows(change, "mean", sd), obs=obs, var=var)
    result.layers["lower"] = _rows(change, "min", sd)
    result.layers["upper"] = _rows(change, "max", sd)
    result.layers["undisturbed"] = model.unscaled(np.concatenate([path.mean(axis=0) for path in undisturbed]))
    result.layers["disturbed"] = model.unscaled(np.concatenate([path.mean(axis=0) for path in disturbed]))

    # change at the end, in standard deviations
    effects = [path.mean(axis=0)[-1] for path in change]
    signs = [np.sign(path[:, -1]).mean(axis=0) for path in change]
    result.var["effect"] = np.mean(effects, axis=0)
    result.var["agreement"] = np.abs(np.mean(signs, axis=0))
    result.var["is_clamped"] = np.isin(np.arange(len(model.genes)), columns)
    result.uns["fate"] = fate(model, starts, undisturbed, disturbed, columns)
    result.uns["invirtuo"] = model.made_by("intervene") | {"genes": list(genes), "support": support(model)}
    return result


def fate(
    model: GeneNetwork,
    starts: Sequence[Start],
    undisturbed: Sequence[np.ndarray],
    disturbed: Sequence[np.ndarray],
    clamped: Sequence[int],
) -> pd.DataFrame:
    """How far the other genes of each course are moved towards each lineage, as a share of the way between lineages.

    The axis of a lineage leads to where the model itself ends it from where it ends the others (of a single lineage:
    from where it begins). The change at the end of a course is projected on it, genes that are held left out.

    Returns
    -------
    A row for each course and lineage: the labels, ``towards``, ``shift`` (1: all the way to it), ``lower`` and
    ``upper``, the range of the ensemble.
    """
    axes = _lineage_axes(model)
    is_free = np.ones(len(model.genes), dtype=bool)
    is_free[list(clamped)] = False
    rows = []
    for start, before, after in zip(starts, undisturbed, disturbed, strict=True):
        change = (after - before)[:, -1, is_free]
        for lineage, axis in axes.items():
            way = axis[:, is_free]
            length = np.maximum((way**2).sum(axis=1), 1e-12)
            shift = (change * way).sum(axis=1) / length
            row = {"towards": lineage, "shift": shift.mean(), "lower": shift.min(), "upper": shift.max()}
            rows.append({**start.labels, **row})
    return pd.DataFrame(rows)


def _lineage_axes(model: GeneNetwork) -> dict[str, np.ndarray]:
    """(m, g) from the ends of the other lineages to that of each, as the model forecasts its training courses."""
    courses = model.training_courses()
    starts = [model.preparation.first(course) for course in courses]
    paths = model.paths(starts, [course.time[-1:] for course in courses])
    ends: dict[str, list[np.ndarray]] = {}
    for course, path in zip(courses, paths, strict=True):
        lineage = course.labels.get(model.lineage, course.name) if model.lineage else course.name
        ends.setdefault(lineage, []).append(path[:, -1])
    means = {lineage: np.mean(states, axis=0) for lineage, states in ends.items()}
    if len(means) == 1:
        begin = np.mean([start.x0 for start in starts], axis=0)
        return {lineage: mean - begin for lineage, mean in means.items()}
    axes = {}
    for lineage, mean in means.items():
        others = [other for name, other in means.items() if name != lineage]
        axes[lineage] = mean - np.mean(others, axis=0)
    return axes


def _columns(model: GeneNetwork, genes: Sequence[str]) -> list[int]:
    """Columns of genes, checked."""
    known = {gene: i for i, gene in enumerate(model.genes)}
    if not genes:
        raise ValueError("no genes were given; expected at least one")
    if unknown := [gene for gene in genes if gene not in known]:
        raise ValueError(f"gene(s) {preview(unknown)} are not in the model; it has {preview(model.genes)}")
    if len(set(genes)) < len(genes):
        raise ValueError(f"genes {preview(genes)} repeat; name each once")
    return [known[gene] for gene in genes]


def _rows(paths: Sequence[np.ndarray], how: str, sd: np.ndarray) -> np.ndarray:
    """Mean, smallest or largest of the members at every row, in the data space."""
    values = [getattr(path, how)(axis=0) for path in paths]
    scaled: np.ndarray = np.concatenate(values) * sd
    return scaled.astype(np.float32)
