"""CPU seconds of training and prediction beside the PyPI package arc-state, on the same cells, sizes and steps.

    python -m venv arc && arc/bin/pip install -c constraints.txt arc-state
    python -m studies state --arc arc/bin/state

Bundled cells, 2,000 genes, gene space; the response of two cell types is held out, and all cells are 16 or 8 sets of 32
to a step. Network of both: width 128, 4 Llama blocks of 8 heads and feed-forward width 512, one linear map as encoder
of the cell, one as output. Each program runs in a process of its own with one thread, for two numbers of steps; what a
step costs is the difference, so that imports, reading and saving do not count. Prediction is what a process takes
that loads a fitted model and predicts the given cells. arc-state is called by its command line only; without --arc, the
table has our row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import invirtuo as iv
from invirtuo.cells.files import read_h5ad
from studies.harness import Rows, Tables, apart, process, study

HELD_OUT = ["B cell", "CD14 monocyte"]
WIDTH, LAYERS, HEADS, SET_SIZE = 128, 4, 8, 32
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}


@study(quick={"steps": [1, 2]})
def state(*, out: Path, arc: str | None = None, steps: Sequence[int] = (20, 60), sets: int = 8) -> Tables:
    """CPU seconds of ST, a training step and a prediction, beside arc-state.

    Parameters
    ----------
    arc
        The command `state` of an environment with arc-state.
    steps
        Two numbers of training steps.
    sets
        Sets of 32 cells in a step.
    """
    few, many = steps
    folder = out.resolve()
    write_cells(folder)

    def one(program: str, verb: str, steps: int) -> dict:
        if program == "arc-state":
            return process([arc, *command(folder, verb, steps, sets)], environment=ON_CPU)[1]
        function = fitted if verb == "fit" else predicted
        return apart(function, folder=folder, steps=steps, sets=sets, environment=ON_CPU)

    programs = ["invirtuo", "arc-state"] if arc else ["invirtuo"]
    runs = [{"verb": "fit", "steps": few}, {"verb": "fit", "steps": many}, {"verb": "predict", "steps": many}]
    cases = [{"program": program} | run for program in programs for run in runs]
    table = Rows(out / "runs.csv").fill(cases, one)
    seconds = table.set_index(["verb", "steps", "program"])["cpu_seconds"]
    step = (seconds["fit", many] - seconds["fit", few]) / (many - few)
    summary = {
        "s per step": step,
        "s of start and end": seconds["fit", few] - few * step,
        "s to predict": seconds["predict", many],
        "peak GiB": table.groupby("program")["peak_gib"].max(),
    }
    return {"summary": pd.DataFrame(summary)}


def write_cells(folder: Path) -> None:
    """Cells and split as both programs read them."""
    raw = iv.datasets.load("kang")
    cells = iv.preprocess.normalize(raw, n_genes=2000)
    cells.layers.clear()
    cells.obs["batch_var"] = "one"
    cells.obsm["X_hvg"] = cells.X.toarray().astype(np.float32)
    (folder / "cells").mkdir(exist_ok=True)
    cells.write_h5ad(folder / "cells" / "kang.h5ad")
    few_shot = "".join(f'[fewshot."kang.{name}"]\ntest = ["IFN-beta"]\n' for name in HELD_OUT)
    few_shot += '[fewshot."kang.NK cell"]\nval = ["IFN-beta"]\n'
    (folder / "split.toml").write_text(
        f'[datasets]\nkang = "{folder}/cells/"\n[training]\nkang = "train"\n[fewshot]\n{few_shot}'
    )


def fitted(folder: str, steps: int, sets: int) -> None:
    """Fit with this package; in a process of its own."""
    cells = read_h5ad(f"{folder}/cells/kang.h5ad")
    design = iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])
    split = iv.splits.from_toml(f"{folder}/split.toml", cells.obs, design, control_fractions=(1, 0, 0))
    config = iv.models.StateTransition.Config(set_size=SET_SIZE, hidden_dim=WIDTH, n_encoder_layers=1)
    fit = iv.FitConfig(steps=steps, batch_size=SET_SIZE * sets, lr=1e-4, clip=10.0, ema=0.0, val_every=0, warmup=0,
                       schedule="constant", precision="fp32", accelerator="cpu", progress=False)  # fmt: skip
    model = iv.models.StateTransition(design, cells.var_names, config)
    model.fit(cells, split, fit).save(f"{folder}/ours", overwrite=True)


def predicted(folder: str, steps: int, sets: int) -> None:
    """Load what was fitted last and predict; in a process of its own."""
    cells = read_h5ad(f"{folder}/cells/kang.h5ad")
    wanted = cells.obs[["perturbation", "cell_type"]].drop_duplicates()
    made = iv.load(f"{folder}/ours").predict(wanted, n_cells=len(cells) // len(wanted), precision="fp32")
    made.write_h5ad(f"{folder}/ours.h5ad")


def command(folder: Path, verb: str, steps: int, sets: int) -> list[str]:
    """Arguments of arc-state that fit or predict."""
    data = {
        "toml_config_path": f"{folder}/split.toml",
        "embed_key": "X_hvg",
        "output_space": "gene",
        "pert_col": "perturbation",
        "cell_type_key": "cell_type",
        "batch_col": "batch_var",
        "control_pert": "control",
        "num_workers": 0,
    }
    backbone = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": WIDTH // HEADS,
    }
    if verb == "predict":
        return ["tx", "infer", "--model-dir", f"{folder}/arc{steps}", "--adata", f"{folder}/cells/kang.h5ad",
                "--checkpoint", f"{folder}/arc{steps}/checkpoints/final.ckpt", "--pert-col", "perturbation",
                "--embed-key", "X_hvg", "--output", f"{folder}/arc.h5ad"]  # fmt: skip
    return [
        "tx", "train", "model=state", "use_wandb=false", f"output_dir={folder}", f"name=arc{steps}",
        *(f"data.kwargs.{key}={value}" for key, value in data.items()),
        f"model.kwargs.hidden_dim={WIDTH}", f"model.kwargs.cell_set_len={SET_SIZE}",
        *(f"model.kwargs.transformer_backbone_kwargs.{key}={value}" for key, value in backbone.items()),
        f"training.max_steps={steps}", f"training.batch_size={sets}", f"training.val_freq={steps + 1}",
    ]  # fmt: skip
