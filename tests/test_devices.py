"""Fits on two devices (gloo, CPU), whole and sharded: as one device with twice the accumulation; killed workers;
checkpoints that other devices go on from; files read by shares.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import invirtuo as iv
from invirtuo.fit import sharding
from invirtuo.fit.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("few_pilots")
CONFIG = iv.FitConfig(steps=12, batch_size=16, precision="fp32", accelerator="cpu", progress=False, val_every=6,
                      ema=0.9, checkpoint_every=4, keep_checkpoints=True)  # fmt: skip
TINY = {
    "primeflow": iv.models.PRiMeFlow.Config(hidden_dim=16, gene_width=8, n_context=2, cell_width=16, n_blocks=2),
    "cpa": iv.models.CPA.Config(width=16, n_latent=4, adversary_steps=3, warmup_steps=2, adversary_width=8),
    "linear_additive": None,
    "cfgen": iv.models.CFGen.Config(hidden_rna=(16,), n_latent=4, hidden=16, embedding=8, n_blocks=1),
}
FITS = {
    "plain": ("primeflow", {}),
    "bf16": ("primeflow", {"accumulate": 2, "precision": "bf16"}),
    "plateau, accumulated": ("linear_additive", {"schedule": "plateau", "accumulate": 2}),
    "two objectives": ("cpa", {}),
    "sharded": ("primeflow", {"accumulate": 2, "keep": "best", "strategy": "fsdp"}),
    "sharded bf16": ("primeflow", {"precision": "bf16", "strategy": "fsdp"}),
    "sharded, two objectives, no average": ("cpa", {"strategy": "fsdp", "ema": 0.0}),
}
ALIKE = {  # batch norm sees the cells of a device, so that two are not one
    "batch norm": ("cfgen", {"keep": "best"}),
    "batch norm, sharded": ("cfgen", {"keep": "best", "strategy": "fsdp"}),
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
for name in here.FITS | here.ALIKE:
    model = here.fitted(name, 2, sys.argv[2])
    model.save(sys.argv[2] + "/" + name + "/saved")
here.fitted("sharded", 2, sys.argv[2] + "/from one", resume=True)
try:
    here.fitted("sharded", 2, sys.argv[2] + "/again", callbacks=[here.Stop()])
except KeyError:
    if os.environ["RANK"] == "0":
        for name in ("ddp", "one"):
            here.shutil.copytree(sys.argv[2] + "/again", sys.argv[2] + "/to " + name)
    torch.distributed.barrier()
here.fitted("sharded", 2, sys.argv[2] + "/again", resume=True)
here.fitted("sharded", 2, sys.argv[2] + "/to ddp", resume=True, strategy="ddp")
dataset = here.iv.CellDataset.open(sys.argv[3], here.experiment()[1])
stream = here.iv.fit.Stream(dataset, model, here.CONFIG, 0)
seen = [batch.index.tolist() for _, batch in zip(range(5), stream)]
here.Path(sys.argv[2], "rows" + os.environ["RANK"] + ".json").write_text(here.json.dumps(seen))
"""
MODELS = """
for name in here.LEARNED:
    here.fitted_as_is(name, 2, sys.argv[2])
"""
LEARNED = ["primeflow", "fm_pca", "state_transition", "state_embedding", "cpa", "sams_vae", "biolord",
           "latent_additive", "linear_additive", "decoder_only", "cfgen", "cellflow_counts"]  # fmt: skip
KILLED = """
out, rank = here.Path(sys.argv[2]), os.environ["RANK"]
def die(mark):
    if rank == "1" and not (out / mark).exists():
        (out / mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)

class Kill(here.lightning.Callback):  # in the middle of a fit
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 6:
            die("killed")

save, n_saved = here.iv.fit.checkpoint.write_tensors, 0
def killed_in_writing(path, tensors, **about):  # after its rows of step 8 are there, before the checkpoint is
    global n_saved
    save(path, tensors, **about)
    n_saved += 1
    if n_saved == 2:
        die("killed in writing")

if (out / "killed in writing").exists() and rank == "0":
    step = here.Checkpoint(out / "sharded" / "last.safetensors").facts["step"]
    (out / "found.json").write_text(here.json.dumps([step, len(list((out / "sharded").glob("last-*")))]))
here.fitted("plain", 2, sys.argv[2], resume=True, callbacks=[Kill()])
here.iv.fit.checkpoint.write_tensors = killed_in_writing
here.fitted("sharded", 2, sys.argv[2], resume=True)
"""


def experiment():
    """Cells, design and split."""
    cells = iv.preprocess.normalize(iv.datasets.toy(n_cells=192, n_genes=12))
    plan = iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])
    return cells, plan, pd.Series(np.where(np.arange(192) < 160, "train", "val"), index=cells.obs_names)


def fitted(name: str, devices: int, out: str | Path, strategy: str | None = None, **options):
    """A model fitted on one device, or its share on two; what each process averaged is written."""
    cells, plan, split = experiment()
    kind, settings = (FITS | ALIKE)[name]
    config = replace(CONFIG, devices=devices, **settings)
    config = replace(config, strategy=strategy or config.strategy)
    if devices == 1:
        config = replace(config, accumulate=2 * config.accumulate)
    model = iv.models.MODELS[kind](plan, cells.var_names, TINY[kind])
    model.fit(cells, split, config, folder=Path(out, name), **options)
    rank = os.environ.get("RANK", "0") if devices > 1 else "alone"
    Path(out, f"{name}-{rank}.json").write_text(json.dumps({k: v.tolist() for k, v in model.state_dict().items()}))
    return model


def fitted_as_is(name: str, devices: int, out: Path):
    """A model of the registry, sharded over two devices or fitted on one; the history is written."""
    cells, plan, split = experiment()
    data = iv.datasets.toy(n_cells=192, n_genes=12) if iv.models.MODELS[name].space == "counts" else cells
    config = replace(CONFIG, steps=6, val_every=3, warmup=0, devices=devices, accumulate=3 - devices, strategy="fsdp")
    model = iv.models.MODELS[name](plan, cells.var_names, TINY.get(name)).fit(data, split, config)
    if devices == 1 or os.environ["RANK"] == "0":
        model.history.to_csv(Path(out, f"{name}-{devices}.csv"), index=False)
    return model


def torchrun(body: str, *arguments: object, restarts: int = 0) -> None:
    script = Path(str(arguments[0])) / "script.py"
    script.write_text(CODE.format(body=body))
    options = ["--standalone", "--nproc-per-node", 2, "--max-restarts", restarts]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *options, script]
    command = [*map(str, command), str(Path(__file__).parent), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/scale.md
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


class Stop(lightning.Callback):
    """Ends a fit with an error, after its first checkpoint."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 6 * trainer.accumulate_grad_batches:
            raise KeyError("stopped")


@pytest.fixture(scope="module")
def two(made_once):
    """What two processes leave behind; read alone."""
    return made_once("two", fitted_on_two)


def fitted_on_two(out: Path) -> None:
    cells = experiment()[0]
    del cells.layers["counts"]
    (out / "cells").mkdir()
    for i in range(3):
        cells[64 * i : 64 * i + 64].copy().write_h5ad(out / "cells" / f"{i}.h5ad")
    with pytest.raises(KeyError, match="stopped"):
        fitted("sharded", 1, out / "from one", callbacks=[Stop()])
    torchrun(EVERY, out, out / "cells")
    fitted("sharded", 1, out / "to one", resume=True)


def history(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv").drop(columns="seconds")


def tolerance(name: str) -> dict[str, float]:
    return {"atol": 2e-2, "rtol": 5e-2} if "bf16" in name else {"atol": 1e-5, "rtol": 1e-4}


def assert_close(first: dict, second: dict, name: str) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], **tolerance(name))


@pytest.mark.parametrize("name", FITS)
def test_two_devices_are_one_with_twice_the_batches(two, tmp_path, name):
    alone = fitted(name, 1, tmp_path)
    pd.testing.assert_frame_equal(history(two / name), history(tmp_path / name), **tolerance(name))
    saved = iv.load(two / name / "saved")  # written by the first process, read on one device
    assert saved.card["fit"]["devices"] == 2
    assert_close(alone.state_dict(), saved.state_dict(), name)
    conditions = alone.design.conditions(experiment()[0].obs)
    assert np.isfinite(saved.predict(conditions, 3).X).all()


@pytest.mark.parametrize("name", FITS | ALIKE)
def test_kept_weights_are_the_same_on_both(two, name):
    assert json.loads((two / f"{name}-0.json").read_text()) == json.loads((two / f"{name}-1.json").read_text())


def test_sharding_changes_no_statistics(two):
    whole, sharded = (iv.load(two / name / "saved").state_dict() for name in ALIKE)
    assert_close(whole, sharded, "batch norm")


def test_files_are_read_by_shares(two):
    first, second = (np.concatenate(json.loads((two / f"rows{rank}.json").read_text())).tolist() for rank in "01")
    assert len(first) == len(set(first)) and not set(first) & set(second)


@pytest.mark.slow
def test_killed_workers_change_nothing(two, tmp_path):
    """One is killed in a fit, then, begun anew in place, another while a sharded checkpoint is written."""
    torchrun(KILLED, tmp_path, restarts=2)
    assert (tmp_path / "killed").exists()
    step, n_shards = json.loads((tmp_path / "found.json").read_text())
    assert step == 4 and n_shards > 2  # all of step 4, and some of step 8
    assert len(list((tmp_path / "sharded").glob("last-*"))) == 2
    for name in ("plain", "sharded"):
        pd.testing.assert_frame_equal(history(tmp_path / name), history(two / name), check_exact=True)
        first, second = state(two / name), state(tmp_path / name)
        assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


# ---- sharded checkpoints ---------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, put together by hand from the rows of the devices."""
    tensors = load_file(folder / "last.safetensors")
    with safe_open(folder / "last.safetensors", framework="pt") as file:
        names = json.loads(file.metadata()["invirtuo"])["shards"]
    pieces = [load_file(folder / name) for name in names]
    return tensors | {k: torch.cat([piece[k] for piece in pieces]) for k in (pieces[0] if pieces else {})}


def test_every_device_writes_its_rows(two):
    folder = two / "sharded"
    shards = sorted(folder.glob("last-*"))
    assert [path.name[-24:] for path in shards] == [f"0000{i}-of-00002.safetensors"[-24:] for i in (1, 2)]
    first, second = (sum(tensor.numel() for tensor in load_file(path).values()) for path in shards)
    assert 0.8 < first / second < 1.3
    assert load_file(folder / "last.safetensors").keys().isdisjoint(load_file(shards[0]))
    assert {key.split(".")[0] for key in load_file(shards[0])} == {"model", "average", "optimizer", "best"}


def test_a_checkpoint_of_the_same_devices_changes_nothing(two):
    pd.testing.assert_frame_equal(history(two / "again" / "sharded"), history(two / "sharded"), check_exact=True)
    first, second = state(two / "again" / "sharded"), state(two / "sharded")
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("folder", ["from one", "to one", "to ddp"])
def test_other_devices_go_on_from_a_checkpoint(two, folder):
    assert len(list((two / folder / "sharded").glob("last-*"))) == (2 if folder == "from one" else 0)
    pd.testing.assert_frame_equal(history(two / folder / "sharded"), history(two / "sharded"), **tolerance("sharded"))
    assert_close(state(two / folder / "sharded"), state(two / "sharded"), "sharded")


@pytest.mark.parametrize("n_devices", [1, 2, 3, 5, 8])
def test_rows_for_any_number_of_devices(two, n_devices):
    checkpoint, expected = Checkpoint(two / "sharded" / "last.safetensors"), state(two / "sharded")
    for key, value in expected.items():
        if value.ndim:
            pieces = torch.chunk(value, n_devices)  # how `fully_shard` deals rows
            for rank in range(n_devices):
                rows = sharding.own_rows(len(value), rank, n_devices)
                piece = pieces[rank] if rank < len(pieces) else value[:0]
                assert torch.equal(value[rows], piece)
                assert not len(piece) or torch.equal(checkpoint.rows(key, rows), piece)


@pytest.mark.parametrize("fault", ["missing", "cut short", "of too few rows"])
def test_damaged_shards(two, tmp_path, fault):
    shutil.copytree(two / "sharded", tmp_path / "sharded")
    second = max((tmp_path / "sharded").glob("last-*"))
    if fault == "missing":
        second.unlink()
    elif fault == "cut short":
        second.write_bytes(second.read_bytes()[:-10])
    else:
        save_file({k: v[:0] for k, v in load_file(second).items()}, second)
    with pytest.raises(
        ValueError, match=r"the checkpoint .*last.*safetensors is damaged \(.*\); remove it and fit again"
    ):
        fitted("sharded", 1, tmp_path, resume=True)


# ---- what is refused, what is gathered by itself ---------------------------------------------------------------------


def test_other_batches_of_a_step_are_refused(two, tmp_path):
    shutil.copytree(two / "sharded", tmp_path / "sharded")
    cells, plan, split = experiment()
    model = iv.models.PRiMeFlow(plan, cells.var_names, TINY["primeflow"])
    with pytest.raises(ValueError, match="accumulate: 2 -> 3"):
        model.fit(cells, split, replace(CONFIG, keep="best", accumulate=3), folder=tmp_path / "sharded", resume=True)


def test_proximal_steps_are_refused():
    class Shrunk(iv.models.LinearAdditive):
        def proximal_step(self, lr):
            pass

    cells, plan, split = experiment()
    model = Shrunk(plan, cells.var_names)
    with pytest.raises(ValueError, match="linear_additive takes proximal steps.*use 'ddp'"):
        model.fit(cells, split, replace(CONFIG, devices=2, strategy="fsdp"))


def test_large_blocks_are_units(monkeypatch):
    monkeypatch.setattr(sharding, "UNIT", 100)
    block = nn.Sequential(nn.Linear(10, 10), nn.Linear(2, 2))
    inner = nn.ModuleList([nn.Linear(20, 5), nn.Linear(2, 2)])
    model = nn.Module()
    model.blocks, model.lone, model.stack = nn.ModuleList([block, inner]), nn.Linear(50, 50), nn.Sequential(block[0])
    assert list(sharding.units(model)) == [block, inner[0], block[0]]


@pytest.mark.slow
def test_every_learned_model_is_sharded(tmp_path):
    torchrun(MODELS, tmp_path)
    assert set(LEARNED) == {
        name
        for name, kind in iv.models.MODELS.items()
        if kind.PRESETS and "fit.lr" in kind.SEARCH and kind.verb != "forecast"
    }
    for name in LEARNED:
        model = fitted_as_is(name, 1, tmp_path)
        has_batch_norm = any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
        one, two = (pd.read_csv(tmp_path / f"{name}-{n}.csv").select_dtypes("number") for n in (1, 2))
        assert len(one) > 2 and np.isfinite(two["train_total"]).all()
        columns = [column for column in one if column.startswith(("train", "val"))]
        rtol = 0.05 if has_batch_norm else 1e-4  # batch norm sees the cells of a device
        np.testing.assert_allclose(two[columns], one[columns], rtol=rtol, atol=1e-5, err_msg=name)


def test_processes_that_would_fit_alone_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started 2 processes, and FitConfig.devices is 1.*Set devices"):
        fitted("plain", 1, tmp_path)
