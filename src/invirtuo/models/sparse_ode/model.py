"""Sparse neural ODEs: dynamics of gene expression whose velocity field says which genes act on which.

Paper: Aliee, Richter, Solonin, Ibarra, Theis, Kilbertus, "Sparsity in Continuous-Depth Neural Networks", NeurIPS 2022,
arXiv:2210.14672 (PathReg). dx/dt = f(x) is fitted to time courses; penalties make weights or features sparse.

Preset `pathreg-paper` is the public code: one network for all targets, hard-concrete gates on input units drawn anew at
every evaluation, cells of whole trajectories scaled by their own extremes, PathReg penalty, dopri5.

Differs (default): gates on every (regulator, target), one small network with decay for each target,

    f_j(x) = g_j(M_j * x, lineage) - delta_j x_j,

one draw of gates for a whole solution, and for evaluation none. Means of bins are fitted, in log space, scaled by
training cells, weighted by their errors. First the field is fitted to slopes of smooth curves, with a penalty on the
expected number of regulators of each target that sets in after a warm-up; connections with P(open) <= 0.5 are cut,
and the rest is fitted again without penalty, to solutions over growing horizons. States are disturbed in training, and
the field learns to come back to the course (`jitter`, `pull`): three courses say nothing of a state beside them, and
another donor starts there. An ensemble is trained side by side, each member on bins of other (exponential) weights.
Solutions are computed on a coarse grid and interpolated.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from invirtuo.batch import Batch
from invirtuo.cells.courses import Course, best_bandwidth
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.preparation import PREPARATIONS
from invirtuo.errors import preview
from invirtuo.fit import FitConfig, ParameterGroup, seeded
from invirtuo.flow import SOLVER_NAMES
from invirtuo.models.sparse_ode.field import SPEED, OwnField, SharedField, TargetField
from invirtuo.models.sparse_ode.gates import PENALTIES
from invirtuo.settings import Settings, setting
from invirtuo.verbs.model import Preset
from invirtuo.verbs.network import GeneNetwork

__all__ = ["Config", "SparseODE"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config(Settings):
    """Data, field, sparsity, and how a fit goes on."""

    space: Literal["log", "any"] = setting(
        "log", 'data space; "log": log1p of counts per 10,000; "any": numbers as they are'
    )
    prepare: str = setting(
        "bins",
        'preparation of courses: means of "bins", scaled by training cells; "reference", as in the public code; or '
        '"apart", bins of which every gene is moved along time by itself, for edges that are found by chance',
        choices=PREPARATIONS,
    )
    lineage: str = setting("lineage", 'covariate that the field is told, if the Design has it; "" for none')
    time: Literal["course", "global"] = setting(
        "course", 'scale of time: share of the range of each "course", or "global", for real times'
    )
    n_bins: int = setting(30, "bins of a course; 0: every time by itself, for repeated measurements", ge=0)
    min_cells: int = setting(10, "fewest cells of a bin", ge=1)
    bandwidth: float = setting(
        0.0, "bandwidth of the smoother, as a share of the range; 0: by leaving out single bins", ge=0
    )
    field: Literal["targets", "shared", "own"] = setting(
        "targets",
        'networks of the field: one for every target, one "shared" by all, or one for every target that is told of its '
        '"own" gene alone',
    )
    hidden: tuple[int, ...] = setting(
        (), "hidden units; (): 16, 8 or 2 a target by the number of genes, or (100, 100) shared", ge=1
    )
    activation: Literal["tanh", "elu", "silu"] = setting(
        "tanh", "activation of hidden units; with tanh and decay solutions are bounded"
    )
    activate_all: bool = setting(
        True, "activation of a shared field after every hidden layer, or after the first alone (public code)"
    )
    decay: bool = setting(True, "take off delta_j x_j from a shared field")
    regulators: tuple[str, ...] = setting((), "genes that may act on others; (): all")
    prior: tuple[tuple[str, str], ...] = setting((), "(regulator, target) pairs that may exist; (): all")
    jitter: float = setting(
        0.5,
        "noise of first states in training, in standard deviations of cells, so that the field leads back to courses",
        ge=0,
    )
    pull: float = setting(5.0, "rate at which, per range of time, the noise of first states shall vanish", ge=0)
    n_members: int = setting(3, "members of the ensemble", ge=1)
    bootstrap: bool = setting(True, "give bins other weights for every member")
    penalty: str = setting("target_l0", "penalty that makes the field sparse", choices=PENALTIES)
    lam: float | None = setting(None, "weight of the penalty; None: that of the penalty, which lists them", ge=0)
    bound: float = setting(10.0, "bound M of the penalty lassonet", gt=0)
    normalise: Literal["reference", "per_path"] = setting(
        "reference", 'what paths are averaged over: (in, out), or "per_path" also over hidden units'
    )
    temperature: float = setting(2 / 3, "temperature of the gates", gt=0)
    gates: Literal["per_solve", "per_eval"] = setting(
        "per_solve", "when gates are drawn: once for a solution, or at every evaluation of the field"
    )
    warmup: float = setting(0.2, "share of a stage without penalty", ge=0, le=1)
    ramp: float = setting(0.3, "share of a stage over which the penalty rises", ge=0, le=1)
    match_share: float = setting(0.6, "share of the steps that fit slopes", ge=0, le=1)
    refit_share: float = setting(
        0.4,
        "share of the steps that fit what is left after the mask is frozen; the rest fit solutions, with the penalty",
        ge=0,
        le=1,
    )
    halvings: int = setting(4, "horizons begin at 2^-halvings of a course", ge=0)
    solver: str = setting("rk4", "solver of the differential equation", choices=SOLVER_NAMES)
    steps: int = setting(20, "steps of a fixed-step solver over a whole course", ge=1)
    tolerance: float = setting(1e-3, "tolerance of dopri5", gt=0)
    null: bool = setting(
        True, "also fit one member to courses of genes that are moved apart in time: how strong edges are by chance"
    )
    gate_speed: float = setting(10.0, "gates learn so many times faster than weights", gt=0)

    def __post_init__(self) -> None:
        """Refuse values that contradict each other."""
        super().__post_init__()
        if self.match_share + self.refit_share > 1 + 1e-9:
            raise ValueError(f"match_share + refit_share is {self.match_share + self.refit_share}; expected at most 1")


class _Shots(NamedTuple):
    """Pieces of courses that are solved together."""

    horizon: float
    first: Tensor  # (n,), row where each begins
    rows: Tensor  # (n, b), rows it should meet
    times: Tensor  # (n, b), after its beginning
    counts: Tensor  # (n, b), 0 where there is no such row


class _Measured(NamedTuple):
    """Rows (bins, or cells) of the courses of a batch, as tensors."""

    parts: list[Course]
    value: Tensor  # (r, g)
    smooth: Tensor  # (r, g), values of the smooth curves
    slope: Tensor  # (r, g), their slopes
    weight: Tensor  # (r, g), by the errors of the bins, mean 1
    labels: Tensor | None  # (r, c)
    boost: Tensor  # (m, r), weight of each row for each member
    shots: dict[int, _Shots]  # by halvings of the horizon


MOST_REGULATORS = 200  # of which no choice need be made
_ALL = 10**9  # cells in a batch: all courses
_FIT = FitConfig(steps=600, batch_size=_ALL, optimizer="adamw", weight_decay=0.3, lr=0.02, warmup=20, clip=1.0, ema=0.0,
                 precision="fp32", val_every=0)  # fmt: skip
_PAPER = Config(
    space="any", prepare="reference", lineage="", field="shared", hidden=(100, 100), activation="elu",
    activate_all=False, decay=False, n_members=1, bootstrap=False, penalty="pathreg", gates="per_eval", warmup=0.0,
    ramp=0.0, jitter=0.0, lam=0.01, match_share=0.0, refit_share=0.0, halvings=0, solver="dopri5",
    gate_speed=1.0
)  # fmt: skip
_PAPER_FIT = replace(
    _FIT, steps=5000, optimizer="adam", weight_decay=0.0, lr=0.01, schedule="plateau", warmup=0, clip=0.0
)
_SERIES = Config(space="any", time="global", n_bins=0, jitter=0.0, lam=0.2, match_share=0.8, refit_share=0.2)
_SHARED = replace(_SERIES, field="shared", activation="elu")


class SparseODE(GeneNetwork):
    """Neural ODE with sparse connections: forecasts, a network, knock-outs.

    References
    ----------
    Aliee et al. 2022, arXiv:2210.14672.
    """

    name = "sparse_ode"
    Config = Config
    PRESETS = {
        "default": Preset(Config(), _FIT, "ours, for pseudotime"),
        "series": Preset(_SERIES, _FIT, "ours, for repeated measurements in real time, any scale"),
        "node": Preset(replace(_SERIES, penalty="none"), _FIT, "ours without penalty"),
        "pathreg": Preset(
            replace(_SHARED, penalty="pathreg", lam=None),
            _FIT, "PathReg penalty in our fit",
        ),
        "cnode": Preset(
            replace(_SHARED, penalty="cnode", lam=None),
            _FIT, "weight path alone in our fit; arXiv:2106.12430",
        ),
        "ngm": Preset(replace(_SERIES, penalty="group_lasso", lam=None), _FIT, "groups of NGM; arXiv:2105.02522"),
        "lassonet": Preset(replace(_SERIES, penalty="lassonet", lam=None), _FIT, "LassoNet for every target"),
        "pathreg-paper": Preset(_PAPER, _PAPER_FIT, "public code, theislab/PathReg at 46263bb, notebook of cells"),
    }  # fmt: skip
    SEARCH = {"fit.lr": (1e-3, 1e-1), "lam": (1e-4, 1e-1)}

    bandwidth: Tensor

    @classmethod
    def preset_of(cls, config: Any) -> Preset:
        """A Config of one's own is fitted as the preset that prepares data like it: with whole courses in a batch."""
        preset = super().preset_of(config)
        if isinstance(config, Config) and all(known.config != config for known in cls.PRESETS.values()):
            like = cls.PRESETS[PREPARATIONS[config.prepare].preset]
            return replace(preset, fit=like.fit)
        return preset

    def build(self) -> None:
        """Room for the training courses, and the field."""
        config = self.config
        self.keep_courses()
        self._progress, self._n_steps = 1.0, 0
        self._seen: OrderedDict[bytes, _Measured] = OrderedDict()
        self.register_buffer("bandwidth", torch.tensor(float(config.bandwidth)))
        self.field: SharedField | TargetField
        self.penalty = PENALTIES[config.penalty]
        g, c, m = len(self.genes), len(self.levels), config.n_members
        options = {"activation": config.activation, "skip": config.penalty == "lassonet"}
        options["temperature"] = config.temperature
        if config.field == "shared":
            if config.regulators or config.prior:
                raise ValueError('regulators= and prior= need field="targets"; a shared field has no such connections')
            hidden = config.hidden or (100, 100)
            self.field = SharedField(
                g, c, hidden, m, activate_all=config.activate_all, decay=config.decay, **options
            )  # fmt: skip
            return
        hidden = config.hidden[0] if config.hidden else 16 if g <= 50 else 8 if g <= 200 else 2
        if config.field == "own":
            self.field = OwnField(g, c, hidden, m, activation=config.activation)
        else:
            chosen, allowed = self._allowed()
            self.field = TargetField(g, c, hidden, m, regulators=chosen, allowed=allowed, **options)

    def _allowed(self) -> tuple[list[int] | None, Tensor | None]:
        """Positions of the regulators, and which connections may exist."""
        config, place = self.config, {gene: i for i, gene in enumerate(self.genes)}
        named = {*config.regulators, *(gene for pair in config.prior for gene in pair)}
        if strange := sorted(named - set(place)):
            raise ValueError(f"regulators and prior name {len(strange)} genes that the data lack: {preview(strange)}")
        if not named:
            return None, None
        # every gene is told its own state; regulators come first
        names = config.regulators or tuple(sorted({regulator for regulator, _ in config.prior}))
        chosen = sorted({place[name] for name in names})
        if not config.prior:
            return chosen, None
        allowed = torch.zeros(len(chosen), len(self.genes))
        row = {gene: i for i, gene in enumerate(chosen)}
        for regulator, target in config.prior:
            if place[regulator] in row:
                allowed[row[place[regulator]], place[target]] = 1.0
        return chosen, allowed

    # ---- fitting -----------------------------------------------------------------------------------------------

    def prepare(self, dataset: CellDataset) -> None:
        """Scale, training courses, bandwidth of the smoother."""
        super().prepare(dataset)
        self._seen.clear()
        chosen = self.config.field != "targets" or self.config.regulators or self.config.prior
        if not chosen and self.config.prepare != "apart" and len(self.genes) > MOST_REGULATORS:
            logger.warning(
                "all %d genes may act on all; name those that can, such as transcription factors, with regulators= "
                "(--regulators FILE): the fewer regulators, the fewer courses a network needs",
                len(self.genes),
            )
        if not self.preparation.keeps_cells and not self.config.bandwidth:
            self.bandwidth.fill_(best_bandwidth(self.training_courses()))

    def stages(self, config: FitConfig) -> dict[str, FitConfig]:
        """Slopes; solutions with penalty; solutions behind a frozen mask. Stages of no steps are left out."""
        shares = {"match": self.config.match_share, "refit": self.config.refit_share}
        steps = {name: round(share * config.steps) for name, share in shares.items()}
        plan = {"match": steps["match"], "rollout": config.steps - sum(steps.values()), "refit": steps["refit"]}
        return {name: replace(config, steps=n) for name, n in plan.items() if n > 0}

    def trained(self, stage: str) -> Iterator[nn.Parameter]:
        return self.field.parameters()

    def stage_data(self, stage: str, dataset: CellDataset) -> CellDataset:
        """The same cells; the mask is frozen before the refit."""
        self._n_steps = self.stages(self.fit_plan)[stage].steps
        if stage == "refit" and (self.penalty.gated or self.penalty.prox):
            self.field.freeze(gated=self.penalty.gated)
        return dataset

    def fit(self, adata: Any, split: Any = None, config: FitConfig | None = None, **options: Any) -> SparseODE:
        """As :meth:`Model.fit`; warns if held-out courses are not forecast better than without a model."""
        self.fit_plan = config or self.fit_config
        return super().fit(adata, split, config, **options)

    def controls(self) -> dict[str, GeneNetwork]:
        """Each gene on its own, and one member for genes that are moved apart; of means of bins alone."""
        config = self.config
        if config.prepare != "bins" or config.field == "own":
            return {}
        hidden = config.hidden if config.field == "targets" else ()
        own = replace(config, field="own", penalty="none", activation="tanh", hidden=hidden, regulators=(), prior=())
        apart = replace(config, prepare="apart", n_members=1, bandwidth=float(self.bandwidth))
        configs = {"no_connections": own} | ({"by_chance": apart} if config.null else {})
        return {name: type(self)(self.design, self.genes, config) for name, config in configs.items()}

    def update(self, batch: Batch, step: int) -> dict[str, Tensor]:
        self._progress = step / max(self._n_steps, 1)
        return self.loss(batch)

    @property
    def lam(self) -> float:
        """Weight of the penalty: that of the Config, or its own."""
        return self.penalty.lam if self.config.lam is None else self.config.lam

    def parameter_groups(self) -> list[ParameterGroup]:
        """Weights; and gates, which are faster and do not decay: decay would draw them half open."""
        gates = self.field.gate_parameters()
        known = set(map(id, gates))
        weights = [parameter for parameter in self.parameters() if id(parameter) not in known]
        # gates of single connections are ten times as fast by the way that they are written
        speed = self.config.gate_speed / (SPEED if isinstance(self.field, TargetField) else 1.0)
        return [ParameterGroup(weights), ParameterGroup(gates, speed, decays=False)]

    def proximal_step(self, lr: float, size: Callable[[nn.Parameter], Tensor]) -> None:
        self.field.keep_movable()
        if self.penalty.prox and self.stage != "refit":
            self.field.shrink(self.penalty.prox, self.lam * self._strength() * lr, self.config.bound, size)

    def _strength(self) -> float:
        """Share of the penalty that acts: none in the warm-up, then rising."""
        config = self.config
        if self.stage == "refit":  # what is kept of it then
            return 1.0
        if not (config.warmup or config.ramp):
            return 1.0
        risen = (self._progress - config.warmup) / max(config.ramp, 1e-9)
        return float(np.clip(risen, 0.0, 1.0))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Of the stage that is being trained: error of slopes or of solutions, and the penalty."""
        data = self._measured(batch)
        gates = self.field.draw() if self.penalty.gated and self.training else self._still()
        if self.stage == "match":
            error = self._match(data, gates)
        elif self.preparation.keeps_cells:
            error = self._whole(data)
        else:
            error = self._rollout(data, gates)
        losses = {"total": error.mean(), "error": error.mean().detach()}
        strength = self._strength()
        value = self.penalty.kept if self.stage == "refit" else self.penalty.value
        if value is not None:
            drawn = self.field.draw() if self.config.gates == "per_eval" else gates
            term = self.lam * value(self.field, drawn) / self._n_paths()
            losses["total"] = losses["total"] + strength * term.mean()
            losses["penalty"] = term.mean().detach()
        return losses

    def _still(self) -> list[Tensor]:
        """Gates without noise; open ones where there are none."""
        return self.field.mode() if self.penalty.gated else self.field.open()

    def _n_paths(self) -> float:
        if self.config.normalise == "reference" or self.config.penalty not in ("pathreg", "cnode", "path"):
            return 1.0
        return float(np.prod([w.shape[-1] for w in self.field.weights()[:-1]]))

    def _match(self, data: _Measured, gates: Sequence[Tensor]) -> Tensor:
        """(m,), squared error of slopes in units of their variance."""
        noise = self._noise(data.smooth)
        f = self.field(data.smooth + noise, data.labels, self.field.prepared(gates))
        wanted = data.slope - self.config.pull * noise
        scale = data.slope.var(dim=0, correction=0) + 1e-2 * data.slope.var(dim=0, correction=0).mean() + 1e-8
        return (data.boost[..., None] * (f - wanted).square() / scale).mean(dim=(1, 2))

    def _noise(self, x: Tensor) -> Tensor:
        """(m, n, g), what is added to states in training."""
        shape = (self.config.n_members, *x.shape)
        return self.config.jitter * torch.randn(shape) if self.training and self.config.jitter else x.new_zeros(shape)

    def _rollout(self, data: _Measured, gates: Sequence[Tensor]) -> Tensor:
        """(m,), squared error of solutions over the horizon of the moment."""
        shots = self._shots(data)
        labels = None if data.labels is None else data.labels[shots.first]
        x0 = data.smooth[shots.first]
        x0 = x0 + self._noise(x0)
        way = self.integrate(x0, labels, shots.horizon, gates=gates)
        x = way.at(shots.times).permute(1, 2, 0, 3)  # (m, n, b, g)
        weight = data.weight[shots.rows] * data.boost[:, shots.rows, None]
        weight = weight * shots.counts[..., None]
        error = weight * (x - data.value[shots.rows]).square()
        return error.sum(dim=(1, 2, 3)) / (shots.counts.sum() * x.shape[-1])

    def _whole(self, data: _Measured) -> Tensor:
        """(1,), sum over courses of the mean squared error at every cell, each solved by itself (public code)."""
        total = torch.zeros(1)
        begin = 0
        for part in data.parts:
            value = data.value[begin : begin + len(part.time)]
            begin += len(part.time)
            x0 = torch.from_numpy(self.preparation.first(part).x0).float()[None]
            way = self.integrate(x0, None, float(part.time[-1]), sampled=self.training)
            total = total + (way.at(torch.from_numpy(part.time))[:, 0, 0] - value).square().mean()
        return total

    def facts(self, dataset: CellDataset) -> dict[str, Any]:
        """As every network's; warns if nothing is left that one gene could tell another."""
        facts = super().facts(dataset)
        with torch.no_grad():
            path = self.field.spread(self.field.gate_path(self._still()))
        between_genes = 1 - torch.eye(path.shape[-1])
        if self.config.field != "own" and not (path * between_genes > 1e-5).any():
            warnings.warn(
                f"the penalty {self.config.penalty!r} closed every connection between genes at lam={self.lam:g}; "
                "fit again with a smaller lam",
                stacklevel=3,
            )
        return facts

    # ---- courses of a batch --------------------------------------------------------------------------------------

    def _measured(self, batch: Batch) -> _Measured:
        """Bins, smooth curves and weights of the courses of a batch; remembered, as batches come again."""
        key = batch.index.numpy().tobytes() if batch.index is not None else batch.target.numpy().tobytes()
        if key not in self._seen:
            self._seen[key] = self._measure(batch)
            while len(self._seen) > 8:
                self._seen.popitem(last=False)
        return self._seen[key]

    def _measure(self, batch: Batch) -> _Measured:
        obs = pd.DataFrame({self.design.time: batch.condition.continuous[self.design.time].numpy()})
        for name, levels in self.design.covariates.items():
            codes = batch.condition.covariates[name].numpy()
            obs[name] = np.array([*levels, self.design.unknown], dtype=object)[codes]
        parts = [self.preparation.rows(c) for c in self.courses_of(batch.target.double().numpy(), obs)]
        rows = np.concatenate([c.values for c in parts])
        curves = [self.preparation.curve(c, float(self.bandwidth)) for c in parts]
        names = [c.labels for c in parts for _ in c.time]
        curve = [np.concatenate(x) for x in zip(*curves, strict=True)]
        tensors = [torch.from_numpy(x).float() for x in (rows, *curve, _weights(parts))]
        boost = torch.ones(self.config.n_members, len(rows))
        if self.config.bootstrap and self.config.n_members > 1:
            boost.exponential_(generator=torch.Generator().manual_seed(len(rows)))
        value, smooth, slope, weight = tensors
        return _Measured(parts, value, smooth, slope, weight, self.labels_of(names), boost, {})

    def _shots(self, data: _Measured) -> _Shots:
        """Pieces of the horizon of the moment: short ones first, whole courses in the last two fifths."""
        n = self.config.halvings
        grows = self.training and self.stage in ("rollout", "refit")
        grows &= self.stage == "rollout" or "rollout" not in self.stages(self.fit_plan)
        level = max(n - int(self._progress / 0.6 * n), 0) if grows else 0
        if level not in data.shots:
            data.shots[level] = _pieces(data.parts, level)
        return data.shots[level]

    # ---- the field -----------------------------------------------------------------------------------------------

    def velocity(
        self,
        labels: Tensor | None,
        *,
        sampled: bool = False,
        held: Tensor | None = None,
        gates: Sequence[Tensor] | None = None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The field; `sampled`: gates are drawn, per solve or per evaluation; else they are `gates`, or still."""
        field, anew = self.field, sampled and self.config.gates == "per_eval"
        if gates is None:
            gates = field.draw() if sampled else self._still()
        weights = field.prepared(gates)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            f = field(x, labels, field.prepared(field.draw()) if anew else weights)
            return f if held is None else f * held

        return velocity

    def jacobian(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return self.field.jacobian(x, labels, self.field.full(self._still()))

    def gate_probability(self) -> np.ndarray:
        gates = self.field.p_open() if self.penalty.gated or bool(self.field.is_frozen) else None
        n = len(self.genes)
        return np.ones((n, n)) if gates is None else gates.detach().mean(dim=0).numpy()

    @torch.no_grad()
    def sparsity(self, n_draws: int = 20, *, other: Sequence[str] = (), seed: int = 0) -> pd.DataFrame:
        """Share of features and weights that are closed, with gates for evaluation and with drawn ones.

        Parameters
        ----------
        n_draws, seed
            Draws of the gates.
        other
            Genes that should have no influence: "spurious" is the feature sparsity of these inputs.

        Returns
        -------
        Rows ``evaluation`` and ``draws`` (mean) and ``sd`` (over draws); columns ``features`` (share of closed
        input-output connections), ``weights``, ``spurious``, ``open_inputs`` (mean number of open inputs of a target).
        """
        rows = np.isin(self.genes, list(other))
        now = self._sparsity(self._still(), rows)
        with seeded(seed):
            found = []
            for _ in range(n_draws):
                gates = self.field.draw() if self.penalty.gated else self._still()
                found.append(self._sparsity(gates, rows))
        draws = pd.DataFrame(found)
        return pd.DataFrame({"evaluation": now, "draws": draws.mean(), "sd": draws.std()}).T

    def _sparsity(self, gates: Sequence[Tensor], other: np.ndarray) -> dict[str, float]:
        path = self.field.gate_path(gates)
        closed = (self.field.spread(path) < 1e-5).float()
        weights = torch.cat([w.flatten() for w in self.field.full(gates)])
        found = {"features": closed.mean(), "weights": (weights.abs() < 1e-5).float().mean()}
        found["spurious"] = closed[:, torch.from_numpy(other)].mean()  # NaN without other edges
        found["open_inputs"] = (1 - closed).sum(dim=1).mean()
        return {name: float(value) for name, value in found.items()}

    def load_pathreg(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take weights that the public code of PathReg saved: ``1.odefunc.output.{0,2,3}.{weights,qz_loga,bias}``."""
        with torch.no_grad():
            for k, place in enumerate((0, 2, 3)):
                names = (("weights", self.field.weight), ("qz_loga", self.field.log_alpha), ("bias", self.field.bias))
                for name, parameters in names:
                    parameters[k].copy_(torch.from_numpy(np.asarray(arrays[f"1.odefunc.output.{place}.{name}"]))[None])


def _weights(parts: Sequence[Course]) -> np.ndarray:
    """(r, g), 1 / (squared error of the bin + its mean), mean 1; ones without errors."""
    if any(c.error is None for c in parts):
        return np.ones_like(np.concatenate([c.values for c in parts]))
    square = np.concatenate([c.error for c in parts]) ** 2
    weight = 1 / (square + square.mean(axis=0) + 1e-12)
    return weight / weight.mean(axis=0)


def _pieces(parts: Sequence[Course], level: int) -> _Shots:
    """Pieces of 2^-level of the longest course, from the first row in each on."""
    # half as long with every level, but no shorter than a gap between bins
    total = max(c.time[-1] - c.time[0] for c in parts)
    gap = max(np.diff(c.time).max() for c in parts)
    horizon = min(max(total / 2**level, 1.001 * gap), total)

    # a shot starts where a piece begins and meets the bins within the horizon
    first, rows, times, begin = [], [], [], 0
    for part in parts:
        last = max(int(np.ceil(total / horizon - 1e-6)) - 1, 0)
        number = np.minimum((part.time - part.time[0]) / horizon + 1e-9, last).astype(int)
        for start in np.unique(number, return_index=True)[1]:
            later = part.time - part.time[start]
            met = np.flatnonzero((later > 0) & (later <= horizon * (1 + 1e-6)))
            if len(met):
                first.append(begin + start)
                rows.append(begin + met)
                times.append(np.minimum(later[met], horizon))
        begin += len(part.time)

    # shots of equal width
    width = max(map(len, rows))
    padded = [np.pad(r, (0, width - len(r)), mode="edge") for r in rows]
    moments = [np.pad(t, (0, width - len(t)), mode="edge") for t in times]
    counts = [np.arange(width) < len(r) for r in rows]
    tensors = (torch.from_numpy(np.stack(x)) for x in (padded, moments, counts))
    rows_, times_, counts_ = tensors
    return _Shots(float(horizon), torch.tensor(first), rows_, times_, counts_.float())
