"""scGen (pertpy 1.0.3, MIT): control cells moved by a difference of latent means.

Differences are taken in covariate groups that have the perturbation; those of a combination follow one another.

Lotfollahi et al. 2019, doi:10.1038/s41592-019-0494-8; Heumos et al. 2025, doi:10.1038/s41592-025-02909-7.
"""

# /// script
# requires-python = ">=3.11,<3.12"
# dependencies = ["pertpy==1.0.3", "scvi-tools==1.4.2", "torch==2.13.0", "anndata==0.12.19", "statsmodels==0.14.4"]
# ///

from __future__ import annotations

import sys

import folder
import numpy as np
import pertpy
import scvi

STEPS, BATCH = 400, 128


def main(path: str) -> None:
    """Answer the question in a folder."""
    question = folder.read(path)
    scvi.settings.seed = question.seed
    train, key = question.train, question.perturbation
    obs, start = folder.starting_cells(question)
    for cells in (train, start):
        cells.obs["group"] = question.groups(cells.obs)
    pertpy.tl.Scgen.setup_anndata(train, batch_key=key, labels_key="group")
    model = pertpy.tl.Scgen(train)
    epochs = question.epochs(STEPS, BATCH)
    model.train(max_epochs=epochs, batch_size=BATCH, accelerator="cpu", enable_progress_bar=False)

    x = np.empty(start.shape, dtype=np.float32)
    for wanted, own in question.conditions():
        cells = start[own].copy()
        for part in question.parts(wanted[key]):
            groups = train.obs.loc[train.obs[key] == part, "group"].unique()
            if not len(groups):
                raise SystemExit(f"no training cell has {part}")
            cells, _ = model.predict(
                ctrl_key=question.control,
                stim_key=part,
                adata_to_predict=cells,
                restrict_arithmetic_to={"group": list(groups)},
            )
        x[own] = np.maximum(cells.X, 0)
    folder.write(question, x, obs, "log1p")


if __name__ == "__main__":
    main(*sys.argv[1:])
