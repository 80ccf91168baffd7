"""scVI (scvi-tools 1.4.2, BSD 3-Clause): a population of counts, drawn from the prior.

Latent vectors are drawn from N(0, I), the classes are categorical covariates, and the depth of a cell is that of a
training cell of its class.

Lopez et al. 2018, doi:10.1038/s41592-018-0229-2.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["scvi-tools==1.4.2", "torch==2.13.0", "anndata==0.12.19"]
# ///

from __future__ import annotations

import sys

import folder
import numpy as np
import scvi
import torch


def main(path: str) -> None:
    """Answer the question in a folder."""
    question = folder.read(path)
    scvi.settings.seed = question.seed
    train, wanted = question.train, question.wanted
    train.obs["group"] = question.groups(train.obs)
    obs = wanted.loc[wanted.index.repeat(wanted["n_cells"])].reset_index(drop=True)
    scvi.model.SCVI.setup_anndata(train, batch_key="group")
    model = scvi.model.SCVI(train, gene_likelihood="nb")
    model.train(accelerator="cpu", enable_progress_bar=False)  # as long as the package thinks right

    # depths of training cells, latent vectors of none
    rng = np.random.default_rng(question.seed)
    depth = np.asarray(train.X.sum(axis=1)).ravel()
    groups, known = question.groups(obs), train.obs["group"].to_numpy()
    drawn = np.empty(len(obs))
    for group in np.unique(groups):
        drawn[groups == group] = rng.choice(depth[known == group], (groups == group).sum())
    names = list(model.adata_manager.get_state_registry("batch").categorical_mapping)
    torch.manual_seed(question.seed)
    with torch.inference_mode():
        found = model.module.generative(
            z=torch.randn(len(obs), model.module.n_latent),
            library=torch.tensor(np.log(drawn), dtype=torch.float32)[:, None],
            batch_index=torch.tensor([[names.index(group)] for group in groups]),
        )
        counts = found["px"].sample().numpy()
    folder.write(question, counts, obs, "counts")


if __name__ == "__main__":
    main(*sys.argv[1:])
