"""CPU seconds of training and prediction beside the PyPI package arc-state, on the same cells, sizes and steps.

    python -m venv arc && arc/bin/pip install -c constraints.txt arc-state
    python benchmarks/state.py --arc arc/bin/state

Bundled cells, 2,000 genes, gene space; the response of two cell types is held out, and all cells are 16 or 8 sets of 32
to a step. Network of both: width 128, 4 Llama blocks of 8 heads and feed-forward width 512, one linear map as encoder
of the cell, one as output. Each program runs in a process of its own with one thread, for two numbers of steps; what a
step costs is the difference, so that imports, reading and saving do not count. Prediction is what a process takes
that loads a fitted model and predicts the given cells. arc-state is called by its command line only; without --arc, the
table has our row alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np

import invirtuo as iv

HELD_OUT = ["B cell", "CD14 monocyte"]
SIZES = {"width": 128, "layers": 4, "heads": 8, "set_size": 32}
OURS = """
    import sys, torch
    torch.set_num_threads(1)
    import invirtuo as iv
    folder, verb, steps, sets = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    from invirtuo.files import read_h5ad
    cells = read_h5ad(folder + "/cells/kang.h5ad")
    if verb == "fit":
        design = iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])
        split = iv.splits.from_toml(folder + "/split.toml", cells.obs, design, control_fractions=(1, 0, 0))
        config = iv.models.StateTransition.Config(set_size=32, hidden_dim=128, n_encoder_layers=1)
        fit = iv.FitConfig(steps=steps, batch_size=32 * sets, lr=1e-4, clip=10.0, ema=0.0, val_every=0, warmup=0,
                           schedule="constant", precision="fp32", accelerator="cpu", progress=False)
        iv.models.StateTransition(design, cells.var_names, config).fit(cells, split, fit).save(folder + "/ours")
    else:
        model = iv.load(folder + "/ours")
        wanted = cells.obs[["perturbation", "cell_type"]].drop_duplicates()
        model.predict(wanted, n_cells=len(cells) // len(wanted), precision="fp32").write_h5ad(folder + "/ours.h5ad")
"""


def main() -> None:
    """Run both programs and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arc", help="the command `state` of an environment with arc-state")
    parser.add_argument("--steps", type=int, nargs=2, default=(20, 60), help="two numbers of training steps")
    parser.add_argument("--sets", type=int, default=8, help="sets of 32 cells in a step")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        n_cells = write_cells(Path(folder))
        print(f"{n_cells} cells")
        print(f"{'program':12s}{'s per step':>12s}{'s of start and end':>20s}{'s to predict':>14s}{'GiB':>7s}")
        programs = {"invirtuo": ours} | ({"arc-state": arc} if args.arc else {})
        for name, program in programs.items():
            few, many = (run(program(folder, "fit", steps, args)) for steps in args.steps)
            predicting = run(program(folder, "predict", args.steps[1], args))
            per_step = (many[0] - few[0]) / (args.steps[1] - args.steps[0])
            start = few[0] - args.steps[0] * per_step
            print(f"{name:12s}{per_step:12.3f}{start:20.1f}{predicting[0]:14.1f}{many[1]:7.2f}", flush=True)


def write_cells(folder: Path) -> int:
    """Cells and split as both programs read them; gives the number of cells."""
    raw = iv.datasets.load("kang")
    cells = iv.preprocess.normalize(raw, n_genes=2000)
    cells.layers.clear()
    cells.obs["batch_var"] = "one"
    cells.obsm["X_hvg"] = cells.X.toarray().astype(np.float32)
    (folder / "cells").mkdir()
    cells.write_h5ad(folder / "cells" / "kang.h5ad")
    few_shot = "".join(f'[fewshot."kang.{name}"]\ntest = ["IFN-beta"]\n' for name in HELD_OUT)
    few_shot += '[fewshot."kang.NK cell"]\nval = ["IFN-beta"]\n'
    (folder / "split.toml").write_text(
        f'[datasets]\nkang = "{folder}/cells/"\n[training]\nkang = "train"\n[fewshot]\n{few_shot}'
    )
    return cells.n_obs


def ours(folder: str, verb: str, steps: int, args: argparse.Namespace) -> list[str]:
    """Command that fits or predicts with this package."""
    return [sys.executable, "-c", textwrap.dedent(OURS), folder, verb, str(steps), str(args.sets)]


def arc(folder: str, verb: str, steps: int, args: argparse.Namespace) -> list[str]:
    """Command that fits or predicts with arc-state."""
    width, heads = SIZES["width"], SIZES["heads"]
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
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": SIZES["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
    }
    if verb == "predict":
        return [args.arc, "tx", "infer", "--model-dir", f"{folder}/arc{steps}", "--adata", f"{folder}/cells/kang.h5ad",
                "--checkpoint", f"{folder}/arc{steps}/checkpoints/final.ckpt", "--pert-col", "perturbation",
                "--embed-key", "X_hvg", "--output", f"{folder}/arc.h5ad"]  # fmt: skip
    return [
        args.arc, "tx", "train", "model=state", "use_wandb=false", f"output_dir={folder}", f"name=arc{steps}",
        *(f"data.kwargs.{key}={value}" for key, value in data.items()),
        f"model.kwargs.hidden_dim={SIZES['width']}", f"model.kwargs.cell_set_len={SIZES['set_size']}",
        *(f"model.kwargs.transformer_backbone_kwargs.{key}={value}" for key, value in backbone.items()),
        f"training.max_steps={steps}", f"training.batch_size={args.sets}", f"training.val_freq={steps + 1}",
    ]  # fmt: skip


def run(command: list[str]) -> tuple[float, float]:
    """CPU seconds and peak GiB of a command, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if process.returncode:
            raise SystemExit(f"{command[0]} failed:\n{log.read().decode()[-3000:]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20


if __name__ == "__main__":
    main()
