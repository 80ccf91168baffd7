"""Every model with settings that are fitted in a moment, its cells, and a call of each of its verbs."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import numpy as np
import pandas as pd
import torch

import invirtuo as iv
from invirtuo.verbs.model import Model

PRIME = iv.models.PRiMeFlow.Config(
    hidden_dim=16, gene_width=8, n_context=2, cell_width=16, n_blocks=1, n_sinusoids=4, steps=4
)
PLAIN = replace(PRIME, precondition=False, anchor=False, covariate_scale=1.0, loss_genes=0)
STATE = iv.models.StateTransition.Config(set_size=8, hidden_dim=16, n_layers=1, n_heads=2)
CFGEN = iv.models.CFGen.Config(hidden_rna=(16, 8), n_latent=4, hidden=16, embedding=8, n_blocks=1, steps=4)
SMALL = {
    "primeflow": PRIME,
    "primeflow unet": replace(
        PLAIN, velocity="unet", channel_mult=(1, 1), num_res_blocks=1, num_heads=2, attention_resolutions=(2,)
    ),
    "primeflow mlp, no null condition": replace(PLAIN, velocity="mlp", prob_unconditional=0.0),
    "fm_pca": iv.models.FMPCA.Config(n_pcs=4, hidden_dim=16, steps=4),
    "fm_pca from control cells": iv.models.FMPCA.Config(n_pcs=4, hidden_dim=16, steps=4, source="control"),
    "state_transition": STATE,
    "state_transition pca": replace(STATE, space="pca", n_embedding=4, decoder_widths=(8,)),
    "state_transition obsm": replace(STATE, space="obsm", obsm="X_emb", n_embedding=4, decoder_widths=(8,)),
    "state_embedding": iv.models.StateEmbedding.Config(gene_width=8, length=8, hidden_dim=16, n_layers=1, n_heads=2),
    "cpa": iv.models.CPA.Config(width=16, n_latent=4, warmup_steps=2, adversary_width=8),
    "sams_vae": iv.models.SAMSVAE.Config(width=16, n_latent=4),
    "sams_vae prior": iv.models.SAMSVAE.Config(width=16, n_latent=4, basal="prior"),
    "biolord": iv.models.Biolord.Config(width=16, n_latent=4),
    "latent_additive": iv.models.LatentAdditive.Config(width=16, n_latent=4),
    "decoder_only": iv.models.DecoderOnly.Config(width=16),
    "perturbation_mean shift": iv.models.PerturbationMean.Config("shift_cells"),
    "perturbation_mean move": iv.models.PerturbationMean.Config("move_cells"),
    "ridge kernel": iv.models.Ridge.Config(kernel="rbf"),
    "cfgen": CFGEN,
    "cfgen joint": replace(CFGEN, conditioning="joint"),
    "cfgen dopri5": replace(CFGEN, solver="dopri5"),
    "cellflow_counts": iv.models.CellFlowCounts.Config(
        hidden_encoder=(16,), hidden=16, label_embedding=8, embedding=8, n_blocks=1, steps=4
    ),
    "sparse_ode": iv.models.SparseODE.Config(n_members=2, n_bins=6),
}  # fmt: skip
CASES = [*iv.models.MODELS, *(case for case in SMALL if case not in iv.models.MODELS)]
FIT = iv.FitConfig(steps=4, batch_size=32, warmup=0, precision="fp32", accelerator="cpu", progress=False, val_every=0)
N_GENES = 12
N_CELLS = 40  # of a condition


def kind_of(case: str) -> type[Model]:
    return iv.models.MODELS[case.split(maxsplit=1)[0]]


@cache
def experiment(kind: type[Model]):
    """Cells for a model of this kind, their design, and a split with conditions to calibrate on."""
    cells = iv.datasets.toy(n_cells=240, n_genes=N_GENES)
    columns = {"perturbation": "perturbation", "control": "control"}
    if kind.space != "counts":
        cells = iv.preprocess.normalize(cells)
    if kind is iv.models.StateTransition:
        cells.obsm["X_emb"] = np.random.default_rng(0).normal(size=(cells.n_obs, 4))
    if kind.verb == "forecast":
        cells.obs["time"] = np.arange(cells.n_obs) // 4 % 10 / 10
        columns = {"time": "time"}
    if kind.verb == "generate":
        columns = {}
    design = iv.Design.from_adata(cells, covariates=["cell_type"], **columns)
    split = None
    if kind.verb == "predict":
        split = iv.splits.hold_out(cells.obs, design, ["t_cell|A"]).replace({"test": "val"})
    return cells, design, split


@cache
def fitted(case: str) -> Model:
    kind = kind_of(case)
    cells, design, split = experiment(kind)
    model = kind(design, cells.var_names, SMALL.get(case))
    config = replace(model.fit_config, steps=4, progress=False) if kind.verb == "forecast" else FIT
    model.fit(cells, split, config)
    if kind.verb == "generate":  # a flow that moves cells so far that counts change
        generator = torch.Generator().manual_seed(0)
        for parameter in model.requires_grad_(False).parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def verbs(model) -> list[str]:
    return [verb for verb in ("predict", "generate", "forecast") if hasattr(model, verb)]


def call(case: str, verb: str, *, model: Model | None = None, **options):
    model = model or fitted(case)
    cells, _, _ = experiment(kind_of(case))
    if verb == "forecast":
        return model.forecast(cells, **options)
    if verb == "generate":
        return model.generate(N_CELLS, **({"output": "mean"} | options))
    wanted = pd.DataFrame({"cell_type": ["b_cell", "t_cell", "t_cell"]})
    if model.design.perturbation:
        wanted["perturbation"] = ["A", "B", "control"]
    fixed = {"precision": "fp32"} if "precision" in {f.name for f in fields(model.Sampling)} else {}
    return model.predict(wanted.drop_duplicates(), N_CELLS, **(fixed | options))


def values(adata) -> list[np.ndarray]:
    """All numbers of an AnnData."""
    parts = [adata.X, *adata.layers.values(), *adata.obsm.values(), *adata.varm.values()]
    parts += [adata.obs[[name]].to_numpy() for name in adata.obs if adata.obs[name].dtype.kind == "f"]
    return [np.asarray(part.todense() if hasattr(part, "todense") else part) for part in parts]


def equal(first, second, atol: float = 0.0) -> bool:
    a, b = values(first), values(second)
    return len(a) == len(b) and all(
        x.shape == y.shape and np.allclose(x, y, atol=atol) for x, y in zip(a, b, strict=True)
    )
