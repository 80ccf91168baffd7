"""PRiMeFlow: flow matching directly in gene-expression space.

Paper: "PRiMeFlow: capturing complex expression heterogeneity in perturbation response modelling" (the flagship).
Noise N(0, I) flows to log1p expression under a learned velocity v(x_t, condition, t); training is algorithm 1.

Differs: the paper leaves open the scale of the sinusoids, how time and condition enter the blocks, the null condition,
the guidance formula, padding and the optimiser; docs/decisions says what we chose. The paper's presets (`srivatsan20`,
`norman19`, and their MLP ablations) are built from what it states.
Differs: the default velocity network is not the paper's U-Net but `genewise` with Gaussian preconditioning and
pseudobulk anchors (docs/models/primeflow.md): far cheaper, and better on conditions that were not seen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from invirtuo.batch import Batch, Condition
from invirtuo.cells.dataset import CellDataset
from invirtuo.design import Design
from invirtuo.fit import FitConfig
from invirtuo.flow import PATHS, SOLVER_NAMES, gaussian_velocity, nested, solve
from invirtuo.flow.path import COEFFICIENTS
from invirtuo.models.primeflow.anchor import PseudobulkAnchor
from invirtuo.models.primeflow.velocity import VELOCITIES, Point, Sizes
from invirtuo.nn import ConditionEncoder, SizeFactor
from invirtuo.nn.moved import with_mean
from invirtuo.settings import Settings, setting
from invirtuo.verbs.model import Preset
from invirtuo.verbs.predict import PerturbationModel
from invirtuo.verbs.sampling import FlowSampling, PartsSampling

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Config", "PRiMeFlow"]

PILOT = 512  # cells of a condition from which the mean of the flow is taken
WHO_LEARNS = "Only models with anchor=True, covariate_scale=0 and depth=False learn of groups by their control cells"
T_BINS = 5  # bins of time in which the validation loss is reported


@dataclass(frozen=True)
class Config(Settings):
    """Architecture, path and sampler. Names are those of tables 10-13 where the paper has one."""

    velocity: str = setting(
        "genewise", 'velocity network: "unet" is the paper\'s, "mlp" its ablation, "genewise" ours', choices=VELOCITIES
    )
    precondition: bool = setting(True, "remove the closed-form Gaussian velocity of each gene; off in the paper")
    anchor: bool = setting(True, "give every gene its control mean and sd and its expected effect; off in the paper")
    covariate_scale: float = setting(
        0.0, "factor on the covariate one-hots; 1 in the paper, 0 trusts the anchors alone"
    )
    hidden_dim: int = setting(
        256, "U-Net: base width and input MLPs; MLP: width; genewise: embedding of time and condition", ge=1
    )
    dropout: float = setting(0.0, "dropout of the networks", ge=0, lt=1)
    n_layers_gene_expression: int = setting(
        2, "layers of the value MLP (U-Net: shared by genes; MLP: whole cell)", ge=1
    )
    n_layers_conditions: int = setting(2, "layers of the condition MLP", ge=1)
    n_layers_time: int = setting(2, "layers of the time MLP", ge=1)
    n_layers_decoding: int = setting(2, "MLP: hidden layers after the concatenation", ge=0)
    channel_mult: tuple[int, ...] = setting((1, 2, 2, 4, 4), "U-Net: width multiplier per level", ge=1)
    num_res_blocks: int = setting(2, "U-Net: residual blocks per level", ge=1)
    conv_resample: bool = setting(True, "U-Net: learned down- and upsampling")
    num_heads: int = setting(8, "U-Net: attention heads", ge=1)
    attention_resolutions: tuple[int, ...] = setting((16,), "U-Net: downsampling factors with attention", ge=1)
    gene_width: int = setting(64, "genewise: width of the network shared by all genes", ge=1)
    n_context: int = setting(8, "genewise: context numbers per gene", ge=0)
    cell_width: int = setting(512, "genewise: width of the network that reads the whole cell", ge=1)
    n_blocks: int = setting(3, "genewise: residual blocks of the network that reads the whole cell", ge=0)
    n_sinusoids: int = setting(32, "genewise: sinusoidal features of a value", ge=1)
    loss_genes: int = setting(512, "genewise: genes drawn for the loss of each step, 0 for all", ge=0)
    depth: bool = setting(False, "give the network the depth of the cell; when sampling it is drawn from control cells")
    prob_unconditional: float = setting(
        0.1, "probability that a cell's condition is replaced by the null condition", ge=0, lt=1
    )
    interpl_type: str = setting("linear", "path from noise to cells", choices=PATHS)
    sigma: float = setting(0.0, "constant noise level of the path", ge=0)
    time_scale: float = setting(1000.0, "scale of t inside its sinusoids", gt=0)
    value_scale: float = setting(10.0, "scale of expression inside its sinusoids", gt=0)
    hurdle: bool = setting(
        True, "set sampled values below half the smallest positive training value to 0; off in the paper"
    )
    calibrate: float = setting(
        0.5, "weight of the anchors in the mean of unseen conditions, with hurdle; 0 in the paper", ge=0, le=1
    )
    solver: str = setting("ab2", "default solver of predict", choices=SOLVER_NAMES)
    steps: int = setting(10, "default number of steps of the solver", ge=1)

    RETIRED: ClassVar[Mapping[str, Any]] = {  # of a study of velocity networks
        "film": False,
        "recompute": False,
        "gene_order": "file",
        "kernel_size": 3,
        "skips": True,
        "patch": 1,
        "gene_identity": True,
        "prediction": "velocity",
    }


_PAPER = Config(
    velocity="unet",
    precondition=False,
    anchor=False,
    covariate_scale=1.0,
    dropout=0.1,
    loss_genes=0,
    prob_unconditional=0.2,
    hurdle=False,
    calibrate=0.0,
    solver="euler",
    steps=100,
)
_MLP = replace(_PAPER, velocity="mlp")
_FIT = FitConfig(steps=2000, batch_size=256, lr=2e-3, clip=1.0, betas=(0.9, 0.99))
_PAPER_FIT = FitConfig(steps=20_000, lr=5e-5, schedule="constant", warmup=0, ema=0.0, accumulate=4, keep="best")

_SMALL = replace(
    _PAPER,
    hidden_dim=32,
    channel_mult=(1, 2, 2, 4),
    num_heads=2,
    attention_resolutions=(8,),
    dropout=0.0,
    solver="ab2",
    steps=20,
)
_SMALL_FIT = FitConfig(steps=1000, batch_size=64, lr=1e-3)
_NORMAN = replace(_PAPER, channel_mult=(1, 1, 2, 2, 4))
_MLP_SRIVATSAN = replace(
    _MLP,
    hidden_dim=3072,
    dropout=0.0,
    n_layers_gene_expression=1,
    n_layers_conditions=1,
    n_layers_time=3,
    n_layers_decoding=2,
    prob_unconditional=0.0,
    sigma=0.01,
)
_MLP_SRIVATSAN_FIT = replace(_PAPER_FIT, lr=3.71e-5, weight_decay=4.05e-7, batch_size=512, accumulate=1)
_MLP_NORMAN = replace(
    _MLP,
    hidden_dim=2048,
    dropout=0.1,
    n_layers_gene_expression=2,
    n_layers_conditions=3,
    n_layers_time=5,
    n_layers_decoding=1,
    prob_unconditional=0.1,
    interpl_type="trigonometric",
    sigma=0.1,
)
_MLP_NORMAN_FIT = replace(_PAPER_FIT, lr=8.56e-6, weight_decay=9.58e-7, batch_size=1024, accumulate=1)


class PRiMeFlow(PerturbationModel):
    """Conditional flow matching from noise to log-normalised expression.

    References
    ----------
    PRiMeFlow, algorithm 1 and equations 2 and 3.
    """

    name = "primeflow"
    Config = Config
    PRESETS = {
        "default": Preset(Config(), _FIT, "ours"),
        "quick": Preset(Config(), replace(_FIT, steps=800), "ours, 14,000 cells x 2,000 genes in minutes on a CPU"),
        "small": Preset(_SMALL, _SMALL_FIT, "ours, the U-Net for a CPU"),
        "srivatsan20": Preset(_PAPER, replace(_PAPER_FIT, batch_size=54), "table 10; 4 devices there"),
        "norman19": Preset(_NORMAN, replace(_PAPER_FIT, batch_size=100), "table 11; 4 devices there"),
        "mlp-srivatsan20": Preset(_MLP_SRIVATSAN, _MLP_SRIVATSAN_FIT, "table 12"),
        "mlp-norman19": Preset(_MLP_NORMAN, _MLP_NORMAN_FIT, "table 13"),
    }

    takes_features = True
    Sampling = PartsSampling

    def build(self) -> None:
        """Make the velocity network and the statistics that anchor it."""
        config, design = self.config, self.design
        levels = tuple(len(level) for level in design.covariates.values())
        sizes = Sizes(len(self.genes), design.code_width, levels, int(design.time is not None))
        self.keeps_zeros = config.hurdle
        self.spreads_work = config.velocity == "genewise"
        self.groups_by_controls = config.anchor and not (config.covariate_scale or config.depth)
        self.velocity = VELOCITIES[config.velocity](config, sizes)
        self.register_buffer("gene_mean", torch.zeros(sizes.n_genes))
        self.register_buffer("gene_sd", torch.ones(sizes.n_genes))
        self.register_buffer("smallest", torch.zeros(()))
        self.anchor = PseudobulkAnchor(len(levels), sizes.n_perturbations, sizes.n_genes) if config.anchor else None
        self.depth = SizeFactor(empirical=True) if config.depth else None

    def prepare(self, dataset: CellDataset) -> None:
        """Statistics of the training cells: moments of the genes, anchors, depths."""
        # values below the smallest count are zeros; genes are Gaussian to first order
        training = dataset.pseudobulk("train")
        self.smallest = torch.tensor(dataset.extremes()[0])
        if self.config.precondition:
            mean, variance = training.pooled()
            self.gene_mean = mean.float()
            self.gene_sd = variance.sqrt().float() + 1e-3
        if self.anchor is not None:
            self.anchor.fit(training)
        if self.depth is not None:
            rows = torch.from_numpy(dataset.rows("train"))
            condition = dataset.condition[rows]
            control = condition.is_control
            sizes = dataset.size_factor[rows][control]
            self.depth.fit(sizes.clamp_min(1e-3), self._group(condition[control]), self._n_groups)

    @property
    def _n_groups(self) -> int:
        return math.prod(len(level) for level in self.design.covariates.values())

    def _group(self, condition: Condition) -> Tensor:
        """(n,), number of the covariate group of each cell."""
        number = torch.zeros(len(condition), dtype=torch.int64, device=condition.perturbation.device)
        for codes, levels in zip(condition.covariates.values(), self.design.covariates.values(), strict=True):
            number = number * len(levels) + codes
        return number

    def with_controls(self, controls: AnnData) -> Self:
        """A copy that also knows the covariate groups of these control cells, which need not have been seen in the fit.

        With anchors and without one-hots of covariates (`covariate_scale = 0`) all that the network knows of a group is
        the mean and standard deviation of its control cells, and how alike they are to those of groups in which the
        perturbation was seen.

        Parameters
        ----------
        controls
            Control cells in log space with the columns of the Design, others among them are not looked at. Groups that
            had control cells in the fit keep those.

        Raises
        ------
        ValueError
            If the model has no anchors, there are no control cells, or groups are new and the model has one-hots of
            covariates, or depths.
        """
        self._check_fitted()
        controls = controls[self.design.is_control(controls.obs)]
        if not controls.n_obs:
            raise ValueError(f"controls= holds no control cells; expected cells labelled {self.design.control!r}")
        if self.anchor is None:
            raise ValueError(f"this model learns nothing of control cells; leave controls= out. {WHO_LEARNS}")

        # groups that are new
        design = self.design.with_levels(controls.obs)
        if design == self.design and self.anchor.knows(design.encode(controls.obs)).all():
            return self
        if not self.groups_by_controls:
            raise ValueError(f"controls= holds covariate groups that this model was not fitted to. {WHO_LEARNS}")
        self._check_space(controls)

        # a copy with one-hots as wide as the new design asks for
        new = type(self)(design, self.genes, self.config)
        new.load_state_dict(self.state_dict() | self._encoders_for(design, 0.0))

        # that knows the control cells of the new groups
        pseudobulks = CellDataset(self._with_genes(controls), design).pseudobulk()
        new.anchor.add_groups(pseudobulks)
        covariates = {}
        for name, levels in self.card["covariates"].items():
            covariates[name] = sorted({*levels, *pseudobulks.table[name]})
        new.card = self.card | {"covariates": covariates}
        new._observed_means = self._observed_means
        return new.eval()

    def adapt(self, design: Design) -> Self:
        """Make a model of the same genes for another Design that starts from the weights of this one.

        For a new context of which a few perturbed cells were measured: fit it to these and the earlier cells together,
        for few steps. What stands for perturbations and levels of covariates follows their names, new ones begin anew;
        statistics and anchors are those of the cells of the new fit.

        Parameters
        ----------
        design
            Of the new data set; with the same features, or none if there were none.

        Returns
        -------
        A model to be fitted.

        Raises
        ------
        ValueError
            If this model is not fitted, or was told other features.
        """
        self._check_fitted()
        widths = [len(each.features[0]) if each.features else 0 for each in (self.design, design)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"features have {widths[1]} columns, and {widths[0]} in this model; expected the same ones"
            )
        new = type(self)(design, self.genes, self.config)
        new.fit_config = self.fit_config
        start = {name: value.detach().clone() for name, value in self.named_parameters()}
        new.begin_with(start | self._encoders_for(design, math.nan))
        return new

    @torch.no_grad()
    def _encoders_for(self, design: Design, fill: float) -> dict[str, Tensor]:
        """First weights (width, n_in) of condition encoders for another Design: columns by name, new ones filled."""
        known = {name: i for i, name in enumerate(_columns(self.design))}
        columns = torch.tensor([known.get(name, -1) for name in _columns(design)])
        weights = {}
        for name, module in self.named_modules():
            if isinstance(module, ConditionEncoder):
                own = next(module.mlp.parameters())
                weights[f"{name}.mlp.0.weight"] = torch.where(columns >= 0, own[:, columns], fill)
        return weights

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Mean squared error of the velocity over cells and genes, algorithm 1; in validation also per bin of t."""
        # a point between noise and every cell; in validation the times are spread evenly
        config, x1 = self.config, batch.target
        n, g = x1.shape
        like = {"device": x1.device, "generator": generator}
        x0 = torch.randn(n, g, **like)
        t = torch.rand(n, **like)
        if not self.training:
            t = (torch.arange(n, device=x1.device) + t) / n
        is_null = torch.rand(n, **like) < config.prob_unconditional
        point = PATHS[config.interpl_type](x0, x1, t, config.sigma, generator)

        # the velocity of all genes, or of a random choice of them
        genes, target = None, point.ut
        if self.training and 0 < config.loss_genes < g:
            genes = torch.randperm(g, **like)[: config.loss_genes]
            target = target.index_select(1, genes)
        is_null = is_null if config.prob_unconditional else None
        v = self.evaluate(point.xt, t, batch.condition, is_null, batch.size_factor, genes)
        per_cell = (v - target).square().mean(dim=1)
        losses = {"total": per_cell.mean()}
        if not self.training:
            edges = [i * n // T_BINS for i in range(T_BINS + 1)]
            for i, (first, last) in enumerate(pairwise(edges)):
                if first < last:
                    losses[f"t{i}"] = per_cell[first:last].mean()
        return losses

    def evaluate(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        is_null: Tensor | None = None,
        size_factor: Tensor | None = None,
        genes: Tensor | None = None,
        network: nn.Module | None = None,
    ) -> Tensor:
        """The velocity field: x (n, g), t (n,), depth (n,) if `config.depth` -> (n, g), or (n, m) for chosen genes."""
        config, network = self.config, network or self.velocity
        anchors = None if self.anchor is None else partial(self.anchor, condition, is_null)
        log_depth = None if self.depth is None else size_factor.clamp_min(1e-3).log()

        # with preconditioning, relative to the field of Gaussian genes
        cell = x
        centre: Tensor | float = 0.0
        scale: Tensor | float = 1.0
        if config.precondition:
            a, b, _, _ = COEFFICIENTS[config.interpl_type](t[:, None])
            variance = a**2 + (b * self.gene_sd) ** 2 + config.sigma**2
            cell = (x - b * self.gene_mean) / variance.sqrt()
            of_all = (x, self.gene_mean, self.gene_sd)
            xt, mean, sd = of_all if genes is None else (each.index_select(-1, genes) for each in of_all)
            centre, scale = gaussian_velocity(xt, t, mean, sd, config.interpl_type, config.sigma)

        v = network(Point(x, cell, t, condition, is_null, anchors, genes, log_depth))
        return centre + scale * v

    def sample(self, batch: Batch, generator: torch.Generator, config: FlowSampling) -> Tensor:
        """Integrate from noise to cells (n, g), and bring their mean nearer to that which pseudobulks predict."""
        calibrates = self.anchor is not None and self.config.hurdle and self.config.calibrate > 0
        if config.is_guided or not calibrates:
            return self._observed(self._flow(batch.condition, generator, config))
        # the mean of the flow is taken from a pilot of the condition: the cells themselves, and more where they are few
        drawn = torch.arange(max(PILOT, len(batch))) % len(batch)
        pilot = self._flow(batch.condition[drawn], generator, config)
        return self._calibrated(pilot, batch.condition)

    def _calibrated(self, x: Tensor, condition: Condition) -> Tensor:
        """The first n of the flow's cells (m, g), for n rows of one condition, with a mean nearer to pseudobulks."""
        mean, known = self.anchor.estimate(condition[:1])
        weight = (0.0, self.config.calibrate, 1.0)[int(known)]
        own = x[: len(condition)]
        if not weight:
            return self._observed(own)
        return with_mean(own, x[:PILOT], weight, mean[0], float(self.smallest) / 2)

    def _observed(self, x: Tensor) -> Tensor:
        """Cells without values between 0 and half the smallest count.

        A flow leaves a haze there, which shifts the mean of silent genes by many of their tiny standard errors.
        """
        return torch.where(x < self.smallest / 2, 0.0, x) if self.config.hurdle else x

    def _flow(self, condition: Condition, generator: torch.Generator, config: FlowSampling) -> Tensor:
        """Integrate from noise to one cell (n, g) for each condition."""
        # what is random, for all cells
        noise = torch.randn(len(condition), len(self.genes), generator=generator).to(self.gene_mean.device)
        depth = None
        if self.depth is not None:
            depth = self.depth.sample(self._group(condition).cpu(), generator).to(noise.device)
        network = self.velocity
        if torch.is_autocast_enabled(noise.device.type):  # weights are cast once, not at every evaluation
            network = copy.deepcopy(network).to(torch.bfloat16)

        # batch by batch
        grid = config.grid or config.steps or self.config.steps
        solver = config.solver or self.config.solver
        weights = config.weights
        cells = []
        for start in range(0, len(condition), config.batch_size):
            rows = slice(start, start + config.batch_size)
            own = condition[rows]
            own_depth = None if depth is None else depth[rows]

            def velocity(
                x: Tensor, t: Tensor, branch: Any, own: Condition = own, depth: Tensor | None = own_depth
            ) -> Tensor:
                # with guidance every cell comes once for each branch
                if len(x) > len(own):
                    again = torch.arange(len(x), device=x.device) % len(own)
                    own = own[again]
                    depth = None if depth is None else depth[again]
                if len(weights) > 1:
                    own = own.unperturbed(branch == 1)
                time = torch.full((len(x),), float(t), device=x.device)
                is_null = branch == 0
                return self.evaluate(x, time, own, is_null if is_null.any() else None, depth, network=network)

            field = nested(velocity, weights, config.interval)
            cells.append(solve(field, noise[rows], grid, solver))
        return torch.cat(cells)


def _columns(design: Design) -> list[str]:
    """Names of the columns that a condition encoder reads: perturbations or features, covariates, numbers."""
    codes = [str(i) for i in range(design.code_width)] if design.features else list(design.perturbations)
    names = [f"perturbation {name}" for name in codes]
    names += [f"{column} {level}" for column, levels in design.covariates.items() for level in levels]
    return [*names, *(["time"] if design.time is not None else [])]
