"""What a fitted field says: which gene acts on which, and what happens when a gene is held at a value."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from invirtuo.cells.courses import Course
from invirtuo.errors import preview
from invirtuo.verbs.forecast import Forecaster

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["OPEN", "GeneNetwork", "edge_matrices"]

OPEN = 1e-5  # smallest mean |df_j / dx_i| of an edge
MAX_STATES = 60  # at which the field is read


class GeneNetwork(Forecaster):
    """Base of the forecasters whose field says which gene acts on which."""

    @abstractmethod
    def jacobian(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """(m, n, g, g) [in, out], derivative of the field at states (m, n, g), gates as for evaluation."""

    @abstractmethod
    def gate_probability(self) -> np.ndarray:
        """(g, g) [in, out], probability that a connection is open, mean over members."""

    @abstractmethod
    def sparsity(self, n_draws: int = 20, *, other: Sequence[str] = (), seed: int = 0) -> pd.DataFrame:
        """How sparse the field is, for evaluation and for sampled gates."""

    def network(self, labels: Mapping[str, str] | None = None, *, n_edges: int | None = None) -> pd.DataFrame:
        """Signed edges between genes, read from the Jacobian of the field along the training courses.

        Parameters
        ----------
        labels
            Read along these courses only, for example ``{"lineage": "B"}``.
        n_edges
            Keep the strongest ones; None keeps all that are not zero.

        Returns
        -------
        DataFrame, strongest first: ``regulator``, ``target``; ``score``, mean ``|df_j / dx_i|``, standardised genes;
        ``sign`` of the mean; ``consistency``, size of the mean over the score; ``frequency``, share of the ensemble in
        which the edge is open; ``gate``, probability that it is open; ``support``, what forecasts of held-out
        courses say: edges have none where they fail, and were not tested where they succeed. Edges are predictive
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
        deviations, ``agreement`` of its sign over the ensemble and courses. ``uns["fate"]``: how much nearer each
        course comes to the end of each lineage. Directions are usable, sizes are not calibrated.
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
            highest = pd.Series(self.unscaled(self.course_values.numpy()).max(axis=0), self.genes)
            values = highest.reindex(names).to_numpy()
        else:
            values = np.broadcast_to(np.asarray(level, dtype=float), (len(names),))
        return intervene(self, names, values, cells, times)


@torch.no_grad()
def edge_matrices(model: GeneNetwork, labels: Mapping[str, str] | None = None, chunk: int = 6) -> dict[str, np.ndarray]:
    """Mean and mean absolute Jacobian over training states, (m, g, g) [regulator, target], standardised genes.

    Parameters
    ----------
    labels
        Read the field at states of these courses only, for example ``{"lineage": "B"}``.
    """
    parts = [c for c in model.training_courses() if not labels or set(labels.items()) <= set(c.labels.items())]
    if not parts:
        raise ValueError(f"no training course is {dict(labels or {})}; there are {preview(model.known)}")
    states, names = _states(parts)
    x = torch.from_numpy(states).float().expand(model.config.n_members, *states.shape)
    codes = model.labels_of(names)
    total: dict[str, Any] = {"mean": 0.0, "size": 0.0}
    for begin in range(0, len(states), chunk):
        rows = slice(begin, begin + chunk)
        jacobian = model.jacobian(x[:, rows], None if codes is None else codes[rows])
        total["mean"] += jacobian.sum(dim=1)
        total["size"] += jacobian.abs().sum(dim=1)
    return {name: (value / len(states)).numpy() for name, value in total.items()}


def _states(parts: Sequence[Course]) -> tuple[np.ndarray, list[Mapping[str, str]]]:
    """States evenly spaced along all courses, and their labels."""
    values = np.concatenate([c.values for c in parts])
    names = [c.labels for c in parts for _ in c.time]
    chosen = np.unique(np.linspace(0, len(values) - 1, min(MAX_STATES, len(values))).astype(int))
    return values[chosen], [names[i] for i in chosen]


def edge_table(model: GeneNetwork, labels: Mapping[str, str] | None = None, n_edges: int | None = None) -> pd.DataFrame:
    """Signed edges, strongest first; a gene's effect on itself is left out."""
    found = edge_matrices(model, labels)
    score, mean = found["size"].mean(axis=0), found["mean"].mean(axis=0)
    frequency = (found["size"] > OPEN).mean(axis=0)
    gate = model.gate_probability()
    source, target = np.nonzero(score * (1 - np.eye(len(score))) > OPEN)
    order = np.argsort(-score[source, target], kind="stable")[:n_edges]
    source, target = source[order], target[order]
    at = (source, target)
    genes = np.array(model.genes)
    return pd.DataFrame(
        {
            "regulator": genes[source],
            "target": genes[target],
            "score": score[at],
            "sign": np.sign(mean[at]).astype(int),
            "consistency": np.abs(mean[at]) / score[at],
            "frequency": frequency[at],
            "gate": gate[at],
            "support": support(model),
        }
    )


def support(model: GeneNetwork) -> str:
    """What forecasts of held-out courses say of the field; good ones are no test of its edges."""
    words = {
        True: "forecasts beat simple ones; edges not tested",
        False: "not supported by forecasting",
        None: "not checked",
    }
    return words[model.card.get("beats_baselines")]


def intervene(
    model: GeneNetwork, genes: Sequence[str], values: np.ndarray, cells: AnnData | None, times: Sequence[float] | None
) -> AnnData:
    """Hold genes at values (data space) from the first state on, and compare with the undisturbed forecast."""
    import anndata

    place = _places(model, genes)
    if cells is None:
        parts = model.training_courses()
        starts = [model.preparation.first(c) for c in parts]
        ends = [(model.known[c.name]["low"], model.known[c.name]["high"]) for c in parts]
    else:
        starts, ends = model._starts(cells, None)
    asked = model.asked(starts, ends, times)
    level = model.scaled(np.tile(np.asarray(values, float), (1, 1)), place)[0]
    held = torch.ones(len(model.genes))
    held[place] = 0.0
    clamped = []
    for start in starts:
        x0 = np.array(start.x0, dtype=float)
        x0[place] = level
        clamped.append(start._replace(x0=x0))
    calm, moved = model.paths(starts, asked), model.paths(clamped, asked, held=held)
    change = [b - a for a, b in zip(calm, moved, strict=True)]
    scale: Any = model.transforms["scale"]
    sd = np.asarray(scale.sd)
    obs = model.table_of(starts, asked, ends)
    result = anndata.AnnData(_rows(change, "mean", sd), obs=obs, var=pd.DataFrame(index=pd.Index(model.genes)))
    result.layers["lower"], result.layers["upper"] = _rows(change, "min", sd), _rows(change, "max", sd)
    result.layers["undisturbed"] = model.unscaled(np.concatenate([p.mean(axis=0) for p in calm]))
    result.layers["disturbed"] = model.unscaled(np.concatenate([p.mean(axis=0) for p in moved]))
    last = np.mean([c.mean(axis=0)[-1] for c in change], axis=0)
    result.var["effect"] = last  # at the end, in standard deviations
    result.var["agreement"] = np.abs(np.mean([np.sign(c[:, -1]).mean(axis=0) for c in change], axis=0))
    result.var["is_clamped"] = np.isin(np.arange(len(last)), place)
    result.uns["fate"] = fate(model, starts, calm, moved)
    result.uns["invirtuo"] = model.made_by("intervene") | {"genes": list(genes), "support": support(model)}
    return result


def fate(model: GeneNetwork, starts, calm, moved) -> pd.DataFrame:
    """How much nearer each course comes to the end points of the lineages (root mean square over genes, sd)."""
    key = model.lineage
    points: dict[str, list[np.ndarray]] = {}
    for course in model.training_courses():
        points.setdefault(course.labels.get(key, course.name) if key else course.name, []).append(course.values[-1])
    rows = []
    for start, before, after in zip(starts, calm, moved, strict=True):
        for name, ends in points.items():
            end = np.mean(ends, axis=0)
            far = [np.sqrt(((path.mean(axis=0)[-1] - end) ** 2).mean()) for path in (before, after)]
            row = {"towards": name, "distance": far[0], "disturbed": far[1], "shift": far[0] - far[1]}
            rows.append({**start.labels, **row})
    return pd.DataFrame(rows)


def _places(model: GeneNetwork, genes: Sequence[str]) -> list[int]:
    known = {gene: i for i, gene in enumerate(model.genes)}
    if not genes:
        raise ValueError("no genes were given; expected at least one")
    if strange := [gene for gene in genes if gene not in known]:
        raise ValueError(f"gene(s) {preview(strange)} are not in the model; it has {preview(model.genes)}")
    if len(set(genes)) < len(genes):
        raise ValueError(f"genes {preview(genes)} repeat; name each once")
    return [known[gene] for gene in genes]


def _rows(paths: Sequence[np.ndarray], how: str, sd: np.ndarray) -> np.ndarray:
    """Mean, smallest or largest of the members at every row, in the data space."""
    return (np.concatenate([getattr(p, how)(axis=0) for p in paths]) * sd).astype(np.float32)
