"""Forecaster: base of the models of time courses. Courses, first states, forecasts, intervals and scores stand here.

A model writes `build`, `loss` and `velocity`; its Config has the fields `prepare`, `lineage`, `time`, `n_bins`,
`min_cells`, `n_members`, `solver`, `steps`, `tolerance`.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from invirtuo.cells.conditions import Conditions, wanted
from invirtuo.cells.courses import Course, anchors, courses
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.preparation import PREPARATIONS, Start
from invirtuo.cells.values import check_values, require_log
from invirtuo.errors import preview
from invirtuo.flow import Trajectory, trajectory
from invirtuo.verbs.model import Model
from invirtuo.verbs.naive_forecasts import PULL, baselines
from invirtuo.verbs.sampling import NoSampling, takes_options

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Forecaster", "Start"]

LEVELS = np.linspace(0.05, 0.95, 19)  # of intervals that are calibrated
MUST_BEAT = ("zero", "training_mean", "smoother", "smoother_offset", "no_connections")


class Forecaster(Model):
    """Base of the models of time courses.

    Values are standardised by training cells, times are shares of the range of each course. The courses of the training
    cells are saved with the model: forecasts are judged against what they say without a model.
    """

    verb = "forecast"
    Sampling = NoSampling
    cpu_only = True
    sampler = "courses"

    course_values: Tensor
    course_time: Tensor
    course_code: Tensor
    course_cells: Tensor
    calibration: Tensor
    beside: Mapping[str, Forecaster] = {}  # fitted models that lack a part of this one; it must beat them

    @abstractmethod
    def velocity(
        self, labels: Tensor | None, *, sampled: bool = False, held: Tensor | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The field for states (m, n, g) of courses with these labels (n, c); `held` (g,) is 0 for clamped genes."""

    def keep_courses(self) -> None:
        """Check the Design, and make room for the training courses."""
        config, design = self.config, self.design
        if design.time is None:
            raise ValueError(f"{self.name} forecasts along time; give time= (pseudotime or real time) to the Design")
        if design.perturbation is not None:
            raise ValueError(
                f"{self.name} is fitted to unperturbed cells; leave perturbation= out of the Design, keep control "
                "cells only, and ask for interventions with knock_out and overexpress"
            )
        if config.lineage and config.lineage != "lineage" and config.lineage not in design.covariates:
            raise ValueError(f"lineage is {config.lineage!r}; the design has {preview(design.covariates) or 'none'}")

        # how cells become courses, and which label tells courses apart
        self.preparation = PREPARATIONS[config.prepare](config.n_bins, config.min_cells)
        self.lineage = config.lineage if config.lineage in design.covariates else None
        self.levels = design.covariates[self.lineage] if self.lineage else ()
        self.alike = self.lineage or ("lineage" if "lineage" in design.covariates else None)  # for simple forecasts
        self.signed = config.space == "any"

        # what a fit keeps of the training courses, saved with the weights
        g = len(self.genes)
        self.register_buffer("course_values", torch.zeros(0, g))
        self.register_buffer("course_time", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("course_code", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("course_cells", torch.zeros(0))
        self.register_buffer("calibration", torch.zeros(len(LEVELS), g))
        self._info: dict[str, Any] = {}

    # ---- courses -------------------------------------------------------------------------------------------------

    def prepare(self, dataset: CellDataset) -> None:
        """Scale, anchors of time, and the courses of the training cells."""
        rows = dataset.rows("train")
        values = dataset.dense(rows).double().numpy()
        obs = dataset.obs.iloc[rows]
        self.transforms["scale"] = self.preparation.scale(values)
        self._info = self._anchored(values, obs)
        parts = [self.preparation.rows(c) for c in self.courses_of(values, obs)]
        if short := [c.name for c in parts if len(c.time) < 2]:
            raise ValueError(
                f"course(s) {preview(short)} have too few cells for two times; give more cells, or a smaller min_cells"
            )
        self.course_values = torch.from_numpy(np.concatenate([c.values for c in parts])).float()
        self.course_time = torch.from_numpy(np.concatenate([c.time for c in parts]))
        self.course_code = torch.from_numpy(np.repeat(np.arange(len(parts)), [len(c.time) for c in parts]))
        cells = [np.ones(len(c.time)) if c.n_cells is None else c.n_cells for c in parts]
        self.course_cells = torch.from_numpy(np.concatenate(cells)).float()

    def _anchored(self, values: np.ndarray, obs: pd.DataFrame) -> dict[str, Any]:
        """Labels and anchors of time of every training course."""
        parts = courses(values, obs, self.design)
        if short := [c.name for c in parts if len(np.unique(c.time)) < 3]:
            raise ValueError(f"course(s) {preview(short)} have fewer than 3 times; leave these cells out")
        ends = {c.name: anchors(c.time) for c in parts}
        if self.config.time == "global":
            longest = max(float(c.time[-1]) for c in parts)
            ends = dict.fromkeys(ends, (0.0, longest))
        known = {}
        for course in parts:
            low, high = ends[course.name]
            known[course.name] = {"labels": dict(course.labels), "low": low, "high": high}
        return known

    @property
    def known(self) -> Mapping[str, Any]:
        """Training courses by name: labels, and times that stand for 0 and 1."""
        return self.card.get("courses") or self._info

    def ends(self, course: Course) -> tuple[float, float]:
        """Times of a course that stand for 0 and 1."""
        if course.name in self.known:
            return self.known[course.name]["low"], self.known[course.name]["high"]
        if self.config.time == "global":
            return 0.0, next(iter(self.known.values()))["high"]
        return anchors(course.time)

    def courses_of(self, values: np.ndarray, obs: pd.DataFrame) -> list[Course]:
        """Cells as courses, values and times scaled."""
        parts = courses(self.scaled(values), obs, self.design)
        return [self.preparation.course(c, *self.ends(c), beyond=self._beyond(c)) for c in parts]

    def _beyond(self, course: Course) -> bool:
        """Whether times after 1 are meant: real times, or the later part of a training course."""
        if self.config.time == "global":
            return True
        return course.name in self.known and bool(np.median(course.time) > self.known[course.name]["high"])

    def training_courses(self) -> list[Course]:
        """What the model was fitted to, scaled."""
        found = []
        for code, (name, facts) in enumerate(self.known.items()):
            mine = (self.course_code == code).numpy()
            time, cells = self.course_time.numpy()[mine], self.course_cells.numpy()[mine].astype(float)
            values = self.course_values.numpy()[mine].astype(float)
            found.append(Course(name, facts["labels"], time, values, np.flatnonzero(mine), None, cells))
        return found

    def start(self, course: Course) -> Start:
        """First state of a course of cells: their first bin (5 cells in the reference preparation).

        A course whose cells come after the end of a training course of the same name goes on from there.
        """
        own = next((c for c in self.training_courses() if c.name == course.name), None)
        return self.preparation.start(course, own)

    def labels_of(self, labels: Sequence[Mapping[str, str]]) -> Tensor | None:
        """(n, c) one-hot of the lineage; zeros where it is not known to the Design."""
        if self.lineage is None:
            return None
        codes = []
        for each in labels:
            codes.append([float(level == each.get(self.lineage)) for level in self.levels])
        return torch.tensor(codes)

    # ---- solutions -----------------------------------------------------------------------------------------------

    def integrate(self, x0: Tensor, labels: Tensor | None, duration: float, **options: Any) -> Trajectory:
        """Solution from (n, g), or (m, n, g), over some time; `options` go to `velocity`."""
        config = self.config
        x0 = x0.expand(config.n_members, *x0.shape[-2:])
        if config.solver == "dopri5":
            grid = torch.tensor([0.0, duration], dtype=torch.float64)
        else:
            grid = torch.linspace(0, duration, max(round(config.steps * duration), 4) + 1, dtype=torch.float64)
        return trajectory(self.velocity(labels, **options), x0, grid, config.solver, tolerance=config.tolerance)

    @torch.no_grad()
    def paths(self, starts: Sequence[Start], times: Sequence[np.ndarray], **options: Any) -> list[np.ndarray]:
        """Solutions from each start at its own scaled times, standardised: a list of (m, b, g).

        Raises
        ------
        ValueError
            If a time lies before its start.
        """
        later = [np.asarray(t, dtype=float) - s.time for s, t in zip(starts, times, strict=True)]
        if any(t.size and t.min() < -1e-6 for t in later):
            raise ValueError("a time lies before the first state; forecasts go forward")
        duration = max([1e-3, *(float(t.max()) for t in later)])
        x0 = torch.tensor(np.stack([s.x0 for s in starts]), dtype=torch.float32)
        trajectory = self.integrate(x0, self.labels_of([s.labels for s in starts]), duration, **options)

        # all courses are read at as many times: where one has fewer, its last is repeated
        longest = max(len(t) for t in later)
        asked = []
        for t in later:
            asked.append(np.pad(t.clip(0), (0, longest - len(t)), mode="edge"))
        found = trajectory.at(torch.from_numpy(np.stack(asked))).permute(1, 2, 0, 3).numpy()  # (m, n, b, g)
        if not np.isfinite(found).all():
            raise FloatingPointError(f"{self.name}: a forecast left all bounds; use activation tanh, or shorter times")
        return [found[:, i, : len(t)] for i, t in enumerate(later)]

    # ---- forecasts -----------------------------------------------------------------------------------------------

    @takes_options()
    def forecast(
        self,
        cells: AnnData | pd.DataFrame | np.ndarray,
        times: Sequence[float] | None = None,
        *,
        labels: Conditions | None = None,
        level: float = 0.9,
        device: str | None = None,
    ) -> AnnData:
        """Follow time courses from their first states.

        Parameters
        ----------
        cells
            AnnData in the data space of the model: for each combination of covariates, the first bin of its cells is
            the first state, and the range of its times the scale. Or first states themselves, (k, g) or (g,), a
            DataFrame or an array, which begin at scaled time 0.
        times
            In the unit of the Design's time column; of first states, scaled: 0 begins a course, 1 ends it. None: 30
            times from the beginning to the end of each course.
        labels
            Covariates of first states: one condition for all (``"mono|s2d1"``, the values of all covariates, or a
            mapping, which may leave some out), or a list or table of one for each. Cells have their own.
        level
            Of the interval: the range of the ensemble, widened by the residuals of held-out (else training) bins.
        device
            As in :meth:`PerturbationModel.predict`; `sparse_ode` computes on the CPU.

        Returns
        -------
        AnnData with a row for each course and time: X the mean of the ensemble, layers "lower" and "upper", obs the
        covariates, the time column and ``scaled_time``; ``uns["invirtuo"]`` says how it was made.

        Raises
        ------
        ValueError
            If a time lies before the first state, genes are missing, or labels name no covariates.
        """
        self._check_fitted()
        self.device_of(device)
        starts, ends = self._starts(cells, labels)
        asked = self.asked(starts, ends, times)
        found = self.paths(starts, asked)
        return self._assembled(found, starts, asked, ends, level)

    def asked(self, starts: Sequence[Start], ends: Sequence[tuple[float, float]], times: Any) -> list[np.ndarray]:
        """Scaled times at which each course is asked for; None: 30 from its first state to its end."""
        if times is None:
            return [np.linspace(s.time, max(1.0, s.time + 0.01), 30) for s in starts]
        return [_scaled(times, low, high) for low, high in ends]

    def _starts(self, cells: Any, labels: Any) -> tuple[list[Start], list[tuple[float, float]]]:
        """First states and the times that stand for 0 and 1 of each course."""
        if hasattr(cells, "obs"):
            if labels is not None and len(labels):
                raise ValueError("labels= are those of first states; cells have theirs in obs. Leave labels out")
            return self._starts_of_cells(cells)
        states = cells.loc[:, self.genes].to_numpy(float) if isinstance(cells, pd.DataFrame) else np.asarray(cells)
        states = np.atleast_2d(states)
        if states.shape[1] != len(self.genes):
            raise ValueError(f"first states have {states.shape[1]} values; expected one for each of {len(self.genes)}")
        rows = self.named(labels)
        if labels is None or isinstance(labels, str | Mapping):  # one for all
            rows = rows * len(states)
        if len(rows) != len(states):
            raise ValueError(f"{len(states)} first states and {len(rows)} rows of labels; expected as many")
        starts = [Start(x, 0.0, row) for x, row in zip(self.scaled(states), rows, strict=True)]

        # the time that stands for 1: that of a course by itself, or of the longest
        end = 1.0 if self.config.time == "course" else next(iter(self.known.values()))["high"]
        return starts, [(0.0, end)] * len(states)

    def named(self, labels: Conditions | None) -> list[dict[str, Any]]:
        """Labels as covariate to value; of none, one that names nothing."""
        if labels is None or (isinstance(labels, Mapping) and not labels):
            return [{}]
        return wanted(labels, list(self.design.covariates), self.design)

    def _starts_of_cells(self, adata: AnnData) -> tuple[list[Start], list[tuple[float, float]]]:
        parts = self._read(adata)
        starts = [self.start(c) for c in parts]
        if self.preparation.keeps_cells:
            return starts, [(float(c.time[0]), float(c.time[-1])) for c in parts]
        obs = self._with_genes(adata).obs
        raw = {c.name: c for c in courses(np.zeros((len(obs), 1)), obs, self.design)}
        return starts, [self.ends(raw[c.name]) for c in parts]

    def _read(self, adata: AnnData, rows: np.ndarray | None = None) -> list[Course]:
        """The courses of some cells of an AnnData."""
        self._check_space(adata)
        adata = self._with_genes(adata)
        x = adata.X if rows is None else adata.X[rows]
        values = np.asarray(x.toarray() if hasattr(x, "toarray") else x, dtype=np.float64)
        return self.courses_of(values, adata.obs if rows is None else adata.obs.iloc[rows])

    def _assembled(
        self,
        found: Sequence[np.ndarray],
        starts: Sequence[Start],
        asked: Sequence[np.ndarray],
        ends: Sequence[tuple[float, float]],
        level: float,
    ) -> AnnData:
        import anndata

        intervals = [self.interval(members, level) for members in found]
        mean, lower, upper = map(np.concatenate, zip(*intervals, strict=True))
        obs = self.table_of(starts, asked, ends)
        adata = anndata.AnnData(self.unscaled(mean), obs=obs, var=pd.DataFrame(index=pd.Index(self.genes)))
        adata.layers["lower"], adata.layers["upper"] = self.unscaled(lower), self.unscaled(upper)
        if not self.signed:  # no log value lies below 0; a mean that does keeps its place within the interval
            adata.layers["lower"] = np.maximum(adata.layers["lower"], np.minimum(adata.X, 0))
        adata.uns["invirtuo"] = self.made_by("forecast") | {"level": level}
        return adata

    def table_of(
        self, starts: Sequence[Start], asked: Sequence[np.ndarray], ends: Sequence[tuple[float, float]]
    ) -> pd.DataFrame:
        """A row for each course and time: covariates, time, scaled time."""
        tables = []
        for start, times, (low, high) in zip(starts, asked, ends, strict=True):
            table = pd.DataFrame({str(self.design.time): low + times * (high - low), "scaled_time": times})
            tables.append(table.assign(**start.labels))
        obs = pd.concat(tables, ignore_index=True)
        obs.index = [f"forecast_{i}" for i in range(len(obs))]
        return obs

    def made_by(self, verb: str) -> dict[str, Any]:
        """How a result was made, and whether the model may be trusted."""
        return {
            "model": self.name,
            "verb": verb,
            "version": self.card["version"],
            "data_hash": self.card["data_hash"],
            "warning": self.card.get("warning", ""),
        }

    def unscaled(self, z: np.ndarray) -> np.ndarray:
        """Standardised values in the data space, float32."""
        scale: Any = self.transforms["scale"]
        values: np.ndarray = z * scale.sd + scale.mean
        return values.astype(np.float32)

    def scaled(self, values: np.ndarray, genes: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """Values (n, g) of the data space, or of some genes, standardised by training cells, float64."""
        scale: Any = self.transforms["scale"]
        z: np.ndarray = (np.asarray(values, np.float64) - scale.mean[genes]) / scale.sd[genes]
        return z

    def interval(self, members: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean (b, g) of members (m, b, g), and the ends of the interval of a level."""
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; expected a share between 0 and 1")
        rows = self.calibration.numpy()
        wide = np.array([np.interp(level, LEVELS, column) for column in rows.T])
        return members.mean(axis=0), members.min(axis=0) - wide, members.max(axis=0) + wide

    # ---- judging -------------------------------------------------------------------------------------------------

    def calibrate(self, parts: Sequence[Course]) -> None:
        """Learn how far bins of these courses lie outside the range of the ensemble."""
        bins = [self.preparation.rows(c) for c in parts]
        starts = [self.start(c) for c in parts]
        found = self.paths(starts, [c.time for c in bins])
        outside = []
        for members, course in zip(found, bins, strict=True):
            below, above = members.min(0) - course.values, course.values - members.max(0)
            outside.append(np.maximum(below, above))
        distances = np.quantile(np.concatenate(outside), LEVELS, axis=0).clip(0)
        self.calibration = torch.from_numpy(distances).float()

    def evaluate_forecast(
        self,
        adata: AnnData,
        split: pd.Series | None = None,
        part: str = "test",
        *,
        sampled: bool = False,
        level: float = 0.9,
    ) -> pd.DataFrame:
        """Errors of forecasts beside what is predicted without a model.

        Parameters
        ----------
        adata
            Cells in the data space of the model.
        split, part
            Which cells to judge: those that `split` calls `part`; None judges all.
        sampled
            Draw gates instead of taking those for evaluation.
        level
            Of the intervals whose coverage is counted.

        Returns
        -------
        A row for each course and method: ``condition`` (the course), the covariates, ``model``, ``mse`` over cells and
        genes (standardised; 0-1 in the reference preparation), ``mse_bins`` and ``r2`` over means of bins,
        ``coverage``. ``attrs``: ``beats_baselines``, and ``loses_to``, the baselines that are not beaten.

        Warns
        -----
        UserWarning
            If the model does not beat zero, the training mean, the smoother, the smoother with the decaying offset of
            first states, and the same field without connections, errors summed over courses.
        """
        rows = None
        if split is not None:
            rows = np.flatnonzero((split.reindex(adata.obs_names) == part).to_numpy())
            if not len(rows):
                raise ValueError(f"the split calls no cells {part!r}; found {preview(split.unique())}")
        table = self.judged(self._read(adata, rows), sampled=sampled, level=level)
        if not table.attrs["beats_baselines"]:
            warnings.warn(_complaint(self.name, table.attrs["loses_to"]), stacklevel=2)
        return table

    def questions(self, parts: Sequence[Course]) -> tuple[list[Start], list[np.ndarray]]:
        """First states of courses of cells, and the scaled times at which each is forecast."""
        starts = [self.start(c) for c in parts]
        return starts, [np.maximum(c.time, s.time) for c, s in zip(parts, starts, strict=True)]

    def parts_of(self, adata: AnnData) -> pd.Series:
        """For each cell "train" if its course was fitted, else "test", as are later times of courses that were fitted.

        A split for :meth:`evaluate_forecast`. Single cells that were held out of a fitted course count as "train".
        """
        obs = adata.obs
        found = pd.Series("test", index=obs.index)
        for course in courses(np.zeros((len(obs), 1)), obs, self.design):
            if course.name in self.known and np.median(course.time) <= self.known[course.name]["high"]:
                found.iloc[course.rows] = "train"
        return found

    def judged(self, parts: Sequence[Course], *, sampled: bool = False, level: float = 0.9) -> pd.DataFrame:
        """The table of :meth:`evaluate_forecast` for courses of cells."""
        train = self.training_courses()
        starts, times = self.questions(parts)
        found = self.paths(starts, times, sampled=sampled)
        others = {name: model.paths(starts, times) for name, model in self.beside.items()}
        pull = getattr(self.config, "pull", PULL)

        # errors of the forecast, and of every simple one, course by course
        rows = []
        for i, (course, start, members) in enumerate(zip(parts, starts, found, strict=True)):
            bins = self.preparation.rows(course)
            at = np.searchsorted(course.time, bins.time).clip(0, len(course.time) - 1)
            mean, lower, upper = self.interval(members, level)
            forecasts = {self.name: mean} | baselines(train, course, start.x0, alike=self.alike, pull=pull)
            forecasts |= {name: paths[i].mean(axis=0) for name, paths in others.items()}
            for name, x in forecasts.items():
                scores = _errors(x, course, bins, at)
                inside = (bins.values >= lower[at]) & (bins.values <= upper[at])
                scores["coverage"] = float(inside.mean()) if name == self.name else float("nan")
                rows.append({"condition": course.name, **course.labels, "model": name, **scores})
        table = pd.DataFrame(rows)
        total = table.groupby("model")["mse"].sum()
        rivals = [name for name in MUST_BEAT if name in total]
        table.attrs["loses_to"] = [name for name in rivals if not total[self.name] < total[name]]
        table.attrs["beats_baselines"] = not table.attrs["loses_to"]
        return table

    def facts(self, dataset: CellDataset) -> dict[str, Any]:
        """Courses, and how forecasts of held-out cells compare; calibrates intervals on validation cells."""
        held_out = {part: self._part(dataset, part) for part in ("val", "test")}
        self.calibrate(held_out["val"] or self._part(dataset, "train"))
        facts: dict[str, Any] = {"courses": self._info, "beats_baselines": None, "warning": ""}
        constant = np.ptp(self.course_values.numpy(), axis=0) == 0
        facts["constant_genes"] = [gene for gene, same in zip(self.genes, constant, strict=True) if same]
        judged = held_out["test"] or held_out["val"]
        self.fit_beside(dataset, judged)
        if judged:
            table = self.judged(judged)
            facts["scores"] = table.groupby("model")["mse"].sum().to_dict()
            facts["coverage"] = float(table["coverage"].mean())
            facts["beats_baselines"] = table.attrs["beats_baselines"]
            if table.attrs["loses_to"]:
                facts["warning"] = _complaint(self.name, table.attrs["loses_to"])
                warnings.warn(facts["warning"], stacklevel=3)
        return facts

    def fit_beside(self, dataset: CellDataset, held_out: Sequence[Course]) -> None:
        """Fit models that lack a part of this one, which it must beat; a class may have some."""

    def _part(self, dataset: CellDataset, part: str) -> list[Course]:
        rows = dataset.rows(part)
        if not len(rows):
            return []
        return self.courses_of(dataset.dense(rows).double().numpy(), dataset.obs.iloc[rows])

    def _check_space(self, adata: AnnData) -> None:
        if self.config.space == "any":
            check_values(adata, allow_negative=True)
        else:
            require_log(adata)


def _errors(x: np.ndarray, course: Course, bins: Course, at: np.ndarray) -> dict[str, float]:
    spread = ((bins.values - bins.values.mean(axis=0)) ** 2).sum()
    miss = (x[at] - bins.values) ** 2
    mse = ((x - course.values) ** 2).mean()
    r2 = 1 - miss.sum() / spread if spread > 0 else np.nan
    return {"mse": float(mse), "mse_bins": float(miss.mean()), "r2": float(r2)}


def _scaled(times: Sequence[float], low: float, high: float) -> np.ndarray:
    moments = np.asarray(times, dtype=float)
    if moments.ndim != 1 or not moments.size or not np.isfinite(moments).all():
        raise ValueError(f"times are {preview(moments.ravel().tolist())}; expected a list of finite numbers")
    return (moments - low) / (high - low)


def _complaint(name: str, rivals: Sequence[str]) -> str:
    return (
        f"{name} does not forecast held-out courses better than {' and '.join(rivals)}; "
        "its edges and knock-outs are not supported by forecasting"
    )
