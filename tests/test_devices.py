"""Fits on two devices (gloo, CPU): as one device with twice the accumulation; a killed worker; files read by shares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import invirtuo as iv

CONFIG = iv.FitConfig(steps=12, batch_size=16, precision="fp32", accelerator="cpu", progress=False, val_every=6,
                      ema=0.9, checkpoint_every=4)  # fmt: skip
TINY = {
    "primeflow": iv.models.PRiMeFlow.Config(hidden_dim=16, gene_width=8, n_context=2, cell_width=16, n_blocks=1),
    "cpa": iv.models.CPA.Config(width=16, n_latent=4, adversary_steps=3, warmup_steps=2, adversary_width=8),
    "linear_additive": None,
}
FITS = {
    "plain": ("primeflow", {}),
    "accumulated": ("primeflow", {"accumulate": 2}),
    "bf16": ("primeflow", {"accumulate": 2, "precision": "bf16"}),
    "plateau": ("linear_additive", {"schedule": "plateau"}),
    "two objectives": ("cpa", {}),
}
CODE = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_devices as here
{body}
"""
EVERY = """
for name in here.FITS:
    model = here.fitted(name, 2, sys.argv[2])
    model.save(sys.argv[2] + "/" + name + "/saved")
dataset = here.iv.CellDataset.open(sys.argv[3], here.experiment()[1])
stream = here.iv.fit.Stream(dataset, model, here.CONFIG, 0)
seen = [batch.index.tolist() for _, batch in zip(range(5), stream)]
here.Path(sys.argv[2], "rows" + os.environ["RANK"] + ".json").write_text(here.json.dumps(seen))
"""
KILLED = """
import lightning
class Kill(lightning.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        killed = here.Path(sys.argv[2], "killed")
        if batch_idx == 6 and os.environ["RANK"] == "1" and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
here.fitted("plain", 2, sys.argv[2], resume=True, callbacks=[Kill()])
"""


def experiment():
    """Cells, design and split."""
    cells = iv.preprocess.normalize(iv.datasets.toy(n_cells=192, n_genes=12))
    plan = iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])
    return cells, plan, pd.Series(np.where(np.arange(192) < 160, "train", "val"), index=cells.obs_names)


def fitted(name: str, devices: int, out: str | Path, **options):
    """A model fitted on one device, or its share on two; what each process averaged is written."""
    cells, plan, split = experiment()
    kind, settings = FITS[name]
    config = replace(CONFIG, devices=devices, **settings)
    if devices == 1:
        config = replace(config, accumulate=2 * config.accumulate)
    model = iv.models.MODELS[kind](plan, cells.var_names, TINY[kind])
    model.fit(cells, split, config, folder=Path(out, name), **options)
    rank = os.environ.get("RANK", "0") if devices > 1 else "alone"
    Path(out, f"{name}-{rank}.json").write_text(json.dumps({k: v.tolist() for k, v in model.state_dict().items()}))
    return model


def torchrun(body: str, *arguments: object) -> None:
    script = Path(str(arguments[0])) / "script.py"
    script.write_text(CODE.format(body=body))
    options = ["--standalone", "--nproc-per-node", 2, "--max-restarts", 0]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *options, script]
    command = [*map(str, command), str(Path(__file__).parent), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes leave behind."""
    out = tmp_path_factory.mktemp("two")
    cells = experiment()[0]
    del cells.layers["counts"]
    (out / "cells").mkdir()
    for i in range(3):
        cells[64 * i : 64 * i + 64].copy().write_h5ad(out / "cells" / f"{i}.h5ad")
    torchrun(EVERY, out, out / "cells")
    return out


def history(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv").drop(columns="seconds")


@pytest.mark.parametrize("name", FITS)
def test_two_devices_are_one_with_twice_the_batches(two, tmp_path, name):
    alone = fitted(name, 1, tmp_path)
    tolerance = {"atol": 2e-2, "rtol": 5e-2} if name == "bf16" else {"atol": 1e-5, "rtol": 1e-4}
    pd.testing.assert_frame_equal(history(two / name), history(tmp_path / name), **tolerance)
    saved = iv.load(two / name / "saved")  # written by the first process, read on one device
    assert saved.card["fit"]["devices"] == 2
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[key], value, **tolerance)
    conditions = alone.design.conditions(experiment()[0].obs)
    assert np.isfinite(saved.predict(conditions, 3).X).all()


@pytest.mark.parametrize("name", FITS)
def test_averaged_weights_are_the_same_on_both(two, name):
    assert json.loads((two / f"{name}-0.json").read_text()) == json.loads((two / f"{name}-1.json").read_text())


def test_files_are_read_by_shares(two):
    first, second = (np.concatenate(json.loads((two / f"rows{rank}.json").read_text())).tolist() for rank in "01")
    assert len(first) == len(set(first)) and not set(first) & set(second)


def test_a_killed_worker_changes_nothing(two, tmp_path):
    with pytest.raises(AssertionError, match="SIGKILL|exitcode"):
        torchrun(KILLED, tmp_path)
    assert (tmp_path / "killed").exists()
    torchrun(KILLED, tmp_path)
    pd.testing.assert_frame_equal(history(tmp_path / "plain"), history(two / "plain"))
    first, second = (load_file(out / "plain" / "last.safetensors") for out in (two, tmp_path))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_processes_that_would_fit_alone_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started 2 processes, and FitConfig.devices is 1.*Set devices"):
        fitted("plain", 1, tmp_path)
