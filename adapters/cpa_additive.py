"""CPA (cpa-tools 0.8.8, BSD 3-Clause): control cells under the sum of the vectors of what is done to them.

The prediction is what the package gives: expected counts of a cell (negative binomial), here over its depth. Wanted
cells are among the cells of the set-up, as "ood", with the counts of control cells, as its tutorials have it.

Lotfollahi et al. 2023, doi:10.15252/msb.202211517.
"""

# /// script
# requires-python = ">=3.11,<3.12"
# dependencies = ["cpa-tools==0.8.8", "ray[tune]==2.9.3", "anndata==0.9.2", "statsmodels==0.14.4", "pyarrow<16"]
#
# [tool.uv]
# override-dependencies = ["torch==2.13.0", "setuptools==70.0.0"]
# ///

from __future__ import annotations

import sys
import types

import anndata
import folder
import numpy as np
import pandas as pd
from scipy import sparse

sys.modules.setdefault("tkinter", types.ModuleType("tkinter")).N = None  # imported by the package, and not used
import cpa  # noqa: E402

STEPS, BATCH = 500, 256


def main(path: str) -> None:
    """Answer the question in a folder."""
    question = folder.read(path)
    obs, start = folder.starting_cells(question)
    question.multi_hots(obs[question.perturbation])  # what was never seen has no vector
    columns = [question.perturbation, *question.covariates]
    is_val = np.random.default_rng(question.seed).random(question.train.n_obs) < 0.1
    train = question.train.obs[columns].assign(part=np.where(is_val, "test", "train"))
    labels = pd.concat([train, obs[columns].assign(part="ood")], ignore_index=True).astype(str)
    # CPA has a separator of its own
    labels[question.perturbation] = ["+".join(question.parts(v)) or v for v in labels[question.perturbation]]
    counts = [cells.layers["counts"] for cells in (question.train, start)]
    cells = anndata.AnnData(sparse.vstack(counts, format="csr"), obs=labels.rename(str))

    cpa.CPA.setup_anndata(
        cells,
        perturbation_key=question.perturbation,
        control_group=question.control,
        categorical_covariate_keys=question.covariates,
        is_count_data=True,
    )
    model = cpa.CPA(cells, split_key="part", seed=question.seed, n_latent=64, recon_loss="nb")
    options = {"use_gpu": False, "save_path": str(question.folder), "enable_progress_bar": False}
    model.train(question.epochs(STEPS, BATCH), batch_size=BATCH, **options)
    wanted = cells[(labels["part"] == "ood").to_numpy()].copy()
    model.predict(wanted, batch_size=1000)
    expected = wanted.obsm["CPA_pred"] / start.obs[["total_counts"]].to_numpy()
    folder.write(question, np.log1p(question.target_sum * expected), obs, "log1p")


if __name__ == "__main__":
    main(*sys.argv[1:])
