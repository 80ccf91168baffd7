"""FM-PCA: flow matching on principal components, the ablation of PRiMeFlow; with "ot" presets FM-PCA-OT.

Paper: "PRiMeFlow: capturing complex expression heterogeneity in perturbation response modelling", ablations, tables
14-17. Cells are projected on the leading principal components of the training cells. There a flow leads from x0 to x1
under a learned velocity MLP([MLP(x_t), MLP(condition), MLP(t)]), and the projection is inverted.

`source="noise"` (FM-PCA): x0 ~ N(0, I). `source="control"` (FM-PCA-OT): x0 are control cells of the same covariates,
paired with the cells of each condition by optimal transport within a mini-batch, so that conditions never mix:
entropic, on squared distances over their mean; pairs are drawn from the plan. tau = 1, as published, is balanced.

No model of this kind can be better than its projection: `ceiling` gives real cells after projection and back.

Differs: the paper leaves open the number of components (50 here), epsilon (1, as CellFlow), how the three parts are
joined, and the number of steps. Control cells are targets as well, paired with control cells: p_data holds them.
Differs: the default divides the scores by their root mean square (`scale`), and samples in 20 steps of AB2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from invirtuo.batch import Batch, Condition
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.transforms import PCA
from invirtuo.fit import FitConfig
from invirtuo.flow import PATHS, SOLVER_NAMES, exact_coupling, guided, plan_pairs, sinkhorn, solve
from invirtuo.nn import MLP, ConditionEncoder, sinusoids
from invirtuo.settings import Settings, setting
from invirtuo.verbs.model import Preset
from invirtuo.verbs.predict import PerturbationModel
from invirtuo.verbs.sampling import FlowSampling

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["FMPCA", "Config"]


@dataclass(frozen=True)
class Config(Settings):
    """Space, architecture, path, coupling and sampler. Names are those of tables 14-17 where the paper has one."""

    n_pcs: int = setting(50, "principal components", ge=1)
    n_pca_cells: int = setting(20_000, "training cells they are fitted on, drawn at random if there are more", ge=1)
    scale: bool = setting(True, "divide scores by their root mean square; off in the paper")
    source: Literal["noise", "control"] = setting("noise", "where the flow begins: at noise, or at control cells")
    hidden_dim: int = setting(512, "width of all MLPs", ge=1)
    dropout: float = setting(0.0, "dropout of all MLPs", ge=0, lt=1)
    n_layers_gene_expression: int = setting(1, "layers of the MLP of x_t", ge=1)
    n_layers_conditions: int = setting(1, "layers of the condition MLP", ge=1)
    n_layers_time: int = setting(1, "layers of the time MLP", ge=1)
    n_layers_decoding: int = setting(3, "hidden layers after the concatenation", ge=0)
    prob_unconditional: float = setting(
        0.1, "probability that a cell's condition is replaced by the null condition", ge=0, lt=1
    )
    interpl_type: str = setting("linear", "path from the source to cells", choices=PATHS)
    sigma: float = setting(0.0, "constant noise level of the path", ge=0)
    time_scale: float = setting(1000.0, "scale of t inside its sinusoids", gt=0)
    coupling: Literal["sinkhorn", "exact", "random"] = setting(
        "sinkhorn", 'coupling of control cells with cells of a condition; "exact" is one to one'
    )
    num_samples_per_condition: int = setting(
        64, "cells of a condition, and control cells, that are coupled at a time", ge=1
    )
    epsilon: float = setting(0.05, "entropy of the coupling, in units of the mean cost; 1 in the paper's presets", gt=0)
    tau_a: float = setting(1.0, "weight of the source marginal, 1 is a hard constraint", gt=0, le=1)
    tau_b: float = setting(1.0, "weight of the target marginal", gt=0, le=1)
    solver: str = setting("ab2", "default solver of predict", choices=SOLVER_NAMES)
    steps: int = setting(20, "default number of steps of the solver", ge=1)
    use_covariates: bool = setting(
        True,
        "tell the network of covariates; without them, and from control cells, groups are known by these alone, new "
        "ones as well",
    )


class Velocity(nn.Module):
    """MLPs of point, condition and time, concatenated, and a decoding MLP."""

    def __init__(self, config: Config, n_pcs: int, n_perturbations: int, levels: list[int], n_continuous: int):
        super().__init__()
        width, dropout = config.hidden_dim, config.dropout
        self.d_time, self.time_scale = min(width, 256), config.time_scale
        self.point = MLP(n_pcs, width, config.n_layers_gene_expression, dropout=dropout)
        self.time = MLP(self.d_time, width, config.n_layers_time, dropout=dropout)
        self.condition = ConditionEncoder(
            n_perturbations, levels, n_continuous, width, config.n_layers_conditions, activated=True, dropout=dropout
        )
        self.decoder = MLP(3 * width, width, config.n_layers_decoding, n_out=n_pcs, dropout=dropout)

    def forward(self, x: Tensor, t: Tensor, condition: Condition, is_null: Tensor | None) -> Tensor:
        """x (n, d), t (n,) -> (n, d)."""
        time = self.time(sinusoids(t, self.d_time, self.time_scale))
        encoded = self.condition(condition, is_null)
        return self.decoder(torch.cat([self.point(x), encoded, time], dim=1)).float()


_PAPER = Config(
    scale=False,
    epsilon=1.0,
    interpl_type="trigonometric",
    dropout=0.2,
    prob_unconditional=0.4,
    solver="euler",
    steps=100,
)
_SRIVATSAN = replace(
    _PAPER,
    hidden_dim=3072,
    n_layers_gene_expression=2,
    n_layers_conditions=3,
    n_layers_time=4,
    n_layers_decoding=4,
    sigma=0.1,
)
_NORMAN = replace(
    _PAPER,
    hidden_dim=1792,
    n_layers_gene_expression=4,
    n_layers_conditions=2,
    n_layers_time=2,
    n_layers_decoding=4,
    sigma=0.01,
)
_OT_SRIVATSAN = replace(_SRIVATSAN, source="control", num_samples_per_condition=128)
_OT_NORMAN = replace(_NORMAN, source="control", num_samples_per_condition=256)
_FIT = FitConfig(steps=20_000, schedule="constant", warmup=0, ema=0.0, keep="best")
_SRIVATSAN_FIT = replace(_FIT, lr=8.18e-5, weight_decay=1.28e-10, batch_size=1024)
_NORMAN_FIT = replace(_FIT, lr=1.73e-4, weight_decay=6.75e-6, batch_size=2048)
_DEFAULT_FIT = FitConfig(steps=3000, batch_size=256, lr=1e-3, clip=1.0)


class FMPCA(PerturbationModel):
    """Conditional flow matching on principal components, from noise or from control cells.

    References
    ----------
    PRiMeFlow, section on ablations and tables 14-17; mini-batch coupling: Tong et al. 2023, arXiv:2302.00482.
    """

    name = "fm_pca"
    Config = Config
    PRESETS = {
        "default": Preset(Config(), _DEFAULT_FIT, "ours"),
        "ot": Preset(Config(source="control"), _DEFAULT_FIT, "ours, from control cells"),
        "srivatsan20": Preset(_SRIVATSAN, _SRIVATSAN_FIT, "table 14"),
        "norman19": Preset(_NORMAN, _NORMAN_FIT, "table 15"),
        "ot-srivatsan20": Preset(_OT_SRIVATSAN, _SRIVATSAN_FIT, "tables 14, 16"),
        "ot-norman19": Preset(_OT_NORMAN, _NORMAN_FIT, "tables 15, 17"),
    }
    SEARCH = {
        "fit.lr": (1e-6, 1e-2),
        "hidden_dim": (256, 1024),
        "n_pcs": [20, 50, 100],
        "prob_unconditional": [0.0, 0.1, 0.2, 0.4],
    }
    takes_features = True
    Sampling = FlowSampling

    def build(self) -> None:
        """The velocity network, and the scale of the scores."""
        config, design = self.config, self.design
        self.needs_source = config.source == "control"
        self.groups_by_controls = self.needs_source and not config.use_covariates
        self.sampler = "sets" if self.needs_source else "cells"
        self.set_size = config.num_samples_per_condition
        self.n_pcs = min(config.n_pcs, len(self.genes))
        levels = [len(level) for level in design.covariates.values()] if config.use_covariates else []
        self.velocity = Velocity(config, self.n_pcs, design.code_width, levels, int(design.time is not None))
        self.register_buffer("score_scale", torch.ones(()))

    def prepare(self, dataset: CellDataset) -> None:
        """Fit the projection to training cells."""
        rows = dataset.rows("train")
        if len(rows) < self.n_pcs:
            raise ValueError(f"{self.n_pcs} principal components need as many training cells, found {len(rows)}")
        chosen = np.sort(np.random.default_rng(0).permutation(rows)[: self.config.n_pca_cells])
        x = dataset.dense(chosen)
        self.transforms["pca"] = PCA(self.n_pcs).fit(x.numpy())
        self.score_scale = torch.ones(())
        if self.config.scale:
            self.score_scale = self.project(x).square().mean().sqrt().clamp_min(1e-6)

    def project(self, x: Tensor) -> Tensor:
        """Cells (n, g) to scores (n, d)."""
        with torch.autocast(x.device.type, enabled=False):
            return self.transforms["pca"].forward(x.float()) / self.score_scale

    def reconstruct(self, scores: Tensor) -> Tensor:
        """Scores (n, d) to cells (n, g)."""
        with torch.autocast(scores.device.type, enabled=False):
            return self.transforms["pca"].inverse(scores.float() * self.score_scale)

    @torch.no_grad()
    def ceiling(self, adata: AnnData) -> AnnData:
        """Real cells after projection and back, to be scored as if predicted: the best that the projection allows.

        Parameters
        ----------
        adata
            Cells in log space with the genes of the model.

        Returns
        -------
        AnnData with the obs of the given cells.
        """
        import anndata

        if "pca" not in self.transforms:
            raise ValueError(f"this {type(self).__name__} is not fitted yet; call fit, or invirtuo.load a saved model")
        self._check_space(adata)
        dataset = CellDataset(self._with_genes(adata), self.design)
        chunks = []
        for rows in _chunks(adata.n_obs, 4096):
            scores = self.project(dataset.dense(rows))
            chunks.append(self.reconstruct(scores))
        var = adata[:, self.genes].var[[]].copy()
        return anndata.AnnData(torch.cat(chunks).numpy(), obs=adata.obs.copy(), var=var)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error of the velocity over cells and components."""
        # pairs of a source and a cell
        config, condition = self.config, batch.condition
        x1 = self.project(batch.target)
        if config.source == "noise":
            x0 = torch.randn_like(x1)
        else:
            x0 = self.project(batch.source)
            rows, columns = self.couple(x0, x1, batch.set_size)
            x0, x1, condition = x0[rows], x1[columns], condition[columns]

        t = torch.rand(len(x1), device=x1.device)
        is_null = None
        if config.prob_unconditional:
            is_null = torch.rand(len(x1), device=x1.device) < config.prob_unconditional
        point = PATHS[config.interpl_type](x0, x1, t, config.sigma)
        velocity = self.velocity(point.xt, t, condition, is_null)
        return {"total": (velocity - point.ut).square().mean()}

    @torch.no_grad()
    def couple(self, x0: Tensor, x1: Tensor, set_size: int) -> tuple[Tensor, Tensor]:
        """Rows of x0 and x1 (n, d) that are coupled, (n,) each, inside each set of `set_size` neighbouring rows."""
        config, n = self.config, len(x0)
        own = torch.arange(n, device=x0.device)
        if config.coupling == "random":
            return own, own

        # set by set
        sources = x0.reshape(-1, set_size, x0.shape[1])
        targets = x1.reshape(-1, set_size, x1.shape[1])
        first = own[::set_size, None]
        if config.coupling == "exact":
            partners = [exact_coupling(a, b) for a, b in zip(sources, targets, strict=True)]
            return own, (first + torch.stack(partners)).flatten()
        with torch.autocast(x0.device.type, enabled=False):
            cost = torch.cdist(sources, targets).square()
            cost = cost / cost.mean(dim=(1, 2), keepdim=True).clamp_min(1e-12)
            plan = sinkhorn(cost, config.epsilon, config.tau_a, config.tau_b)
        rows, columns = plan_pairs(plan, set_size)
        return (first + rows).flatten(), (first + columns).flatten()

    def sample(self, batch: Batch, generator: torch.Generator, config: FlowSampling) -> Tensor:
        """Integrate from noise, or from control cells, and go back to genes, (n, g)."""
        if self.needs_source:
            x0 = self.project(batch.source)
        else:
            x0 = torch.randn(len(batch), self.n_pcs, generator=generator).to(self.score_scale.device)
        grid = config.grid or config.steps or self.config.steps
        solver = config.solver or self.config.solver
        cells = []
        for rows in _chunks(len(batch), config.batch_size):
            condition = batch.condition[rows]

            def velocity(x: Tensor, t: Tensor, is_null: Tensor, condition: Condition = condition) -> Tensor:
                # with guidance every cell comes twice, with and without its condition
                if len(x) != len(condition):
                    condition = condition[torch.arange(len(x)) % len(condition)]
                time = torch.full((len(x),), float(t), device=x.device)
                return self.velocity(x, time, condition, is_null)

            field = guided(velocity, config.weights[0], config.interval)
            scores = solve(field, x0[rows], grid, solver)
            cells.append(self.reconstruct(scores))
        return torch.cat(cells)


def _chunks(n: int, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, n)) for start in range(0, n, size)]
