"""STATE's transition model (arc-state 0.11.1, CC BY-NC-SA 4.0: no commercial use): sets of control cells, transformed.

Called by its command line alone, as its documentation has it. Covariate groups are its cell types; values go in and
come out as they are (log1p). The network is a small one, so that it runs on a CPU.

Adduri et al. 2025, doi:10.1101/2025.06.26.661135.
"""

# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["arc-state==0.11.1", "cell-load==0.10.4", "torch==2.13.0", "anndata==0.12.19"]
# ///

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anndata
import folder
import numpy as np
import torch

STEPS, SETS, CELLS, WIDTH = 200, 8, 64, 128
KEYS = {"pert_col": "perturbed", "cell_type_key": "group", "batch_col": "lane", "control_pert": "control"}


def labelled(question: folder.Question, cells: anndata.AnnData, perturbed: np.ndarray) -> anndata.AnnData:
    """Cells with the columns that the package is told of."""
    obs = cells.obs[[]].assign(perturbed=perturbed, group=question.groups(cells.obs), lane="one").astype("category")
    x = cells.X.toarray().astype(np.float32)
    var = cells.var[[]].rename_axis("gene_name")
    return anndata.AnnData(cells.X, obs=obs, var=var, obsm={"X_hvg": x})


def state(*words: str) -> None:
    """Run the package's command."""
    program = Path(sys.executable).with_name("state")
    subprocess.run([str(program), "tx", *words], check=True, env=os.environ | {"WANDB_MODE": "disabled"})


def main(path: str) -> None:
    """Answer the question in a folder."""
    question = folder.read(path)
    obs, start = folder.starting_cells(question)
    own = question.folder / "state"
    (own / "data").mkdir(parents=True, exist_ok=True)

    # a perturbation is a vector with a one for each part, control cells have zeros
    labels = question.train.obs[question.perturbation].astype(str).replace(question.control, "control")
    wanted = obs[question.perturbation].astype(str)
    names = sorted({*labels, *wanted})
    ones = question.multi_hots(question.train.obs[question.perturbation])
    vectors = dict(zip(labels, ones, strict=True)) | dict(zip(wanted, question.multi_hots(wanted), strict=True))
    torch.save({name: torch.tensor(vectors[name]) for name in names}, own / "vectors.pt")
    labelled(question, question.train, labels.to_numpy()).write_h5ad(own / "data" / "train.h5ad")
    (own / "cells.toml").write_text(f'[datasets]\nown = "{own / "data"}"\n[training]\nown = "train"\n')

    backbone = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    backbone |= {"num_key_value_heads": 4, "head_dim": WIDTH // 4, "num_hidden_layers": 4}
    settings = {f"data.kwargs.{name}": value for name, value in KEYS.items()}
    settings |= {f"model.kwargs.transformer_backbone_kwargs.{name}": value for name, value in backbone.items()}
    settings |= {"model": "state_sm", "model.kwargs.cell_set_len": CELLS, "model.kwargs.hidden_dim": WIDTH}
    settings |= {"data.kwargs.toml_config_path": own / "cells.toml", "data.kwargs.embed_key": "X_hvg"}
    settings |= {"data.kwargs.perturbation_features_file": own / "vectors.pt", "data.kwargs.output_space": "gene"}
    settings |= {"data.kwargs.num_workers": 0, "use_wandb": "false", "output_dir": own, "name": "run"}
    settings |= {"training.max_steps": STEPS, "training.batch_size": SETS, "training.lr": 1e-3}
    settings |= {"training.val_freq": 10**6, "training.ckpt_every_n_steps": 10**6, "overwrite": "true"}
    settings |= {"training.train_seed": question.seed}
    state("train", *(f"{name}={value}" for name, value in settings.items()))

    # the same control cells, once as they are and once under what is wanted
    both = anndata.concat(
        [labelled(question, start, np.full(len(obs), "control")), labelled(question, start, wanted.to_numpy())],
        index_unique="-",
    )
    both.obs = both.obs.astype("category")
    both.write_h5ad(own / "start.h5ad")
    options = {"--model-dir": own / "run", "--adata": own / "start.h5ad", "--embed-key": "X_hvg"}
    options |= {"--pert-col": "perturbed", "--celltype-col": "group", "--batch-col": "lane"}
    options |= {"--output": own / "out.h5ad", "--seed": question.seed}
    state("infer", *(str(word) for pair in options.items() for word in pair))
    found = anndata.read_h5ad(own / "out.h5ad")[len(obs) :]
    folder.write(question, np.maximum(found.obsm["X_hvg"], 0), obs, "log1p")


if __name__ == "__main__":
    main(*sys.argv[1:])
