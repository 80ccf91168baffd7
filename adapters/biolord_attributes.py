"""biolord (biolord 0.0.3, BSD 3-Clause): control cells decoded with the wanted perturbation as their attribute.

Perturbations are an ordered attribute, a vector with a one for every part, covariates are categorical ones. What is
left of a cell, its own vector, is learned for training cells alone, so that predictions start from these.

Piran et al. 2024, doi:10.1038/s41587-023-02079-x.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["biolord==0.0.3", "scvi-tools==1.4.2", "torch==2.13.0", "anndata==0.12.19", "scanpy==1.11.5"]
# ///

from __future__ import annotations

import sys

import biolord
import folder
import numpy as np
import scipy.sparse

STEPS, BATCH = 500, 256
PARTS = ("latent", "decoder", "attribute_nn")
RATES = {f"{part}_{what}": value for part in PARTS for what, value in (("lr", 1e-3), ("wd", 1e-4))}


def main(path: str) -> None:
    """Answer the question in a folder."""
    question = folder.read(path)
    train, key = question.train, question.perturbation
    train.X = train.X.toarray()
    train.obsm["perturbed"] = question.multi_hots(train.obs[key])
    # every tenth cell tells when to stop
    is_val = np.random.default_rng(question.seed).random(train.n_obs) < 0.1
    train.obs["own_split"] = np.where(is_val, "test", "train")
    biolord.Biolord.setup_anndata(
        train, ordered_attributes_keys=["perturbed"], categorical_attributes_keys=question.covariates
    )
    model = biolord.Biolord(train, split_key="own_split", module_params={"seed": question.seed})
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False}
    model.train(question.epochs(STEPS, BATCH), accelerator="cpu", batch_size=BATCH, plan_kwargs=RATES, **quiet)

    # control cells, which are training cells, with another attribute
    obs, rows = folder.starting_rows(question, train)
    cells = train[rows].copy()
    cells.obs_names = [str(i) for i in range(len(rows))]
    cells.obsm["perturbed"] = question.multi_hots(obs[key])
    mean, _ = model.predict(cells)
    folder.write(question, scipy.sparse.csr_matrix(np.maximum(mean.X, 0)), obs, "log1p")


if __name__ == "__main__":
    main(*sys.argv[1:])
