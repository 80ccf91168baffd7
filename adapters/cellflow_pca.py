"""CellFlow (cellflow-tools 0.0.9, PolyForm Noncommercial 1.0.0): flow matching from control cells on components.

Called by its documented interface alone; its licence allows no commercial use of it. Perturbations and covariates are
one-hots (zeros fill up what is no combination), the network is small, so that it runs on a CPU.

Klein et al. 2025, doi:10.1101/2025.04.11.648220.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["cellflow-tools==0.0.9", "requests==2.34.2", "anndata==0.12.19", "scanpy==1.11.5", "optax==0.2.8"]
# ///

from __future__ import annotations

import sys
from collections.abc import Iterable

import anndata
import cellflow as cf
import folder
import numpy as np
import optax
import pandas as pd

ITERATIONS = 1000
N_PCS = 50
SMALL = {
    "condition_embedding_dim": 32,
    "time_freqs": 64,
    "time_encoder_dims": (128, 128),
    "hidden_dims": (256, 256),
    "decoder_dims": (256, 256),
}


def one_hots(labels: Iterable[str], nothing: str = "") -> dict[str, np.ndarray]:
    """A vector for every label, and zeros for the one that says that nothing is there."""
    names = sorted(set(map(str, labels)) - {nothing})
    vectors = dict(zip(names, np.eye(len(names), dtype=np.float32), strict=True))
    return vectors | ({nothing: np.zeros(len(names), dtype=np.float32)} if nothing else {})


def with_parts(question: folder.Question, obs: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Labels with a column for every part of a perturbation, the control label where there is none."""
    parts = [question.parts(label) for label in obs[question.perturbation]]
    padded = [[*own, *[question.control] * (len(columns) - len(own))] for own in parts]
    return obs.assign(is_control=[not own for own in parts], **pd.DataFrame(padded, obs.index, columns))


def main(path: str) -> None:
    """Answer the question in a folder."""
    question = folder.read(path)
    obs, start = folder.starting_cells(question)
    train, key = question.train, question.perturbation
    question.multi_hots(obs[key])  # what was never seen has no vector
    # control cells of groups that nothing was done to have nowhere to flow
    groups = question.groups(train.obs)
    has_target = np.isin(groups, groups[~question.is_control(train.obs)])
    train = train[has_target].copy()
    train.X = train.X.toarray()
    labels = {*train.obs[key], *obs[key]}
    columns = [f"part_{i}" for i in range(max(len(question.parts(label)) for label in labels))]
    train.obs = with_parts(question, train.obs, columns)
    known = [part for label in labels for part in question.parts(label)]
    train.uns["of_perturbation"] = one_hots(known, question.control)
    for name in question.covariates:
        train.uns[f"of_{name}"] = one_hots(np.concatenate([train.obs[name], question.wanted[name]]))
    cf.pp.centered_pca(train, n_comps=N_PCS)

    covariates = {name: f"of_{name}" for name in question.covariates}
    model = cf.model.CellFlow(train, solver="otfm")
    model.prepare_data(
        sample_rep="X_pca",
        control_key="is_control",
        perturbation_covariates={"perturbation": columns},
        perturbation_covariate_reps={"perturbation": "of_perturbation"},
        sample_covariates=question.covariates,
        sample_covariate_reps=covariates,
        split_covariates=question.covariates,
    )
    # the package's own optimiser takes one step in twenty iterations, too few for this budget
    model.prepare_model(seed=question.seed, optimizer=optax.adam(1e-3), **SMALL)
    model.train(ITERATIONS, batch_size=256, valid_freq=ITERATIONS + 1)

    # every condition from its own control cells
    x = np.zeros(start.shape, dtype=np.float32)
    for wanted, own in question.conditions():
        cells = anndata.AnnData(start.X[own].toarray(), start.obs[own].copy(), start.var)
        cells.obs["is_control"] = True
        cells.uns = {name: train.uns[name] for name in ("of_perturbation", *covariates.values())}
        cf.pp.project_pca(cells, ref_adata=train)
        condition = with_parts(question, wanted.to_frame().T, columns)
        (latent,) = model.predict(cells, condition, sample_rep="X_pca").values()
        cells.obsm["predicted"] = np.asarray(latent)
        cf.pp.reconstruct_pca(cells, use_rep="predicted", ref_adata=train, layers_key_added="genes")
        x[own] = np.maximum(cells.layers["genes"], 0)
    folder.write(question, x, obs, "log1p")


if __name__ == "__main__":
    main(*sys.argv[1:])
