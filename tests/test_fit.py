"""Formula tests of fitting: schedule, averages, accumulation, validation; a killed fit ends as an uninterrupted one."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from processes import ended, forked
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import invirtuo as iv
from invirtuo import fit as fitting
from invirtuo.fit import FitConfig, validation_losses
from invirtuo.verbs.model import Model

CONFIG = FitConfig(steps=24, batch_size=32, precision="fp32", accelerator="cpu", progress=False)
DROPOUT = iv.models.PRiMeFlow.Config(hidden_dim=16, gene_width=8, n_context=2, cell_width=16, n_blocks=1, n_sinusoids=4,
                                     dropout=0.3, loss_genes=7, prob_unconditional=0.3)  # fmt: skip
UNET = iv.models.PRiMeFlow.Config(velocity="unet", precondition=False, anchor=False, hidden_dim=32, channel_mult=(1, 1),
                                  num_res_blocks=1, num_heads=2, attention_resolutions=(), dropout=0.3)  # fmt: skip
CPA = iv.models.CPA.Config(width=16, n_latent=4, adversary_steps=3, warmup_steps=5, adversary_width=8)


@dataclass(frozen=True)
class NoConfig:
    """Nothing to choose."""


class Mean(Model):
    """Learns the mean of the training cells by gradient descent: everything can be recomputed by hand."""

    name = "mean"
    Config = NoConfig

    def build(self):
        self.mean = nn.Parameter(torch.zeros(len(self.genes)))

    def loss(self, batch):
        return {"total": (batch.target - self.mean).square().mean()}


def experiment():
    """Cells, their design, and a split of 160 training and 32 validation cells."""
    cells = iv.preprocess.normalize(iv.datasets.toy(n_cells=192, n_genes=12))
    plan = iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])
    return cells, plan, pd.Series(np.where(np.arange(192) < 160, "train", "val"), index=cells.obs_names)


@pytest.fixture(scope="module")
def cells():
    return experiment()[0]


@pytest.fixture(scope="module")
def plan():
    return experiment()[1]


@pytest.fixture(scope="module")
def split():
    return experiment()[2]


@pytest.fixture
def mean(cells, plan):
    return Mean(plan, cells.var_names)


class Spy(lightning.Callback):
    """Notes weights and learning rates after every optimiser step; stops with an error at a wanted step."""

    def __init__(self, fail_at: int | None = None):
        self.weights, self.rates, self.fail_at = [], [], fail_at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.weights.append({k: v.clone() for k, v in module.model.state_dict().items()})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.optimizer = trainer.optimizers[0]
        if len(self.weights) == self.fail_at:
            raise KeyError("killed")


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


# ---- plateaus --------------------------------------------------------------------------------------------------------


def test_the_rate_falls_where_validations_stall_and_warms_up_first(cells, plan, split, mean, tmp_path):
    """With a rate at which Adam only shakes, 15 validations in a row bring nothing, and the rate falls to a fifth."""
    spy = Spy()
    shaky = {"lr": 2.0, "betas": (0.0, 0.9), "ema": 0.0, "clip": 0.0}
    config = replace(CONFIG, steps=60, schedule="val_plateau", warmup=4, val_every=1, **shaky)
    fitted = mean.fit(cells, split, config, folder=tmp_path, callbacks=[spy])
    np.testing.assert_allclose(spy.rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0])

    # by hand: lowest loss so far, counted from the first validation on
    rate, best, waited = 2.0, math.inf, 0
    losses = fitted.history.set_index("step")["val_total"]
    for step, loss in losses.items():
        if step > 4:
            assert spy.rates[int(step) - 1] == pytest.approx(rate), step
        best, waited = (loss, 0) if loss < best * (1 - 1e-4) else (best, waited + 1)
        if waited > 15:
            rate, waited = rate / 5, 0
    assert rate < 2.0

    # a fit that was stopped goes on with the same rates
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyError):
        Mean(plan, cells.var_names).fit(
            cells, split, replace(config, checkpoint_every=10), folder=stopped, callbacks=[Spy(fail_at=35)]
        )
    again = Mean(plan, cells.var_names).fit(
        cells, split, replace(config, checkpoint_every=10), folder=stopped, resume=True
    )
    assert_equal(weights(fitted), weights(again))


@pytest.mark.parametrize("setting", [{"schedule": "val_plateau"}, {"patience": 3}])
def test_settings_that_wait_for_validations_warn_where_there_are_none(cells, mean, setting, caplog):
    mean.fit(cells, config=replace(CONFIG, steps=2, **setting))
    assert "it will do nothing" in caplog.text and next(iter(setting)) in caplog.text


# ---- FitConfig -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "sgd"),
        ("schedule", "linear"),
        ("precision", "fp16"),
        ("keep", "first"),
        ("steps", 0),
        ("batch_size", 0),
        ("accumulate", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("weight_decay", -1e-3),
        ("warmup", -1),
        ("clip", -1.0),
        ("ema", 1.0),
        ("ema", -0.1),
        ("betas", (0.9, 1.0)),
        ("val_every", -1),
        ("val_batches", 0),
        ("patience", -1),
        ("checkpoint_every", 0),
    ],
)
def test_bad_values_are_refused(field, value):
    with pytest.raises(ValueError, match=f"FitConfig.{field} is"):
        FitConfig(**{field: value})


# ---- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate(mean, cells, schedule):
    spy = Spy()
    config = replace(CONFIG, schedule=schedule, warmup=5, lr=0.1, steps=20)
    mean.fit(cells, config=config, callbacks=[spy])
    expected = [0.1 * min(1, (k + 1) / 5) for k in range(20)]
    if schedule == "cosine":
        expected = [rate * (1 + math.cos(math.pi * k / 20)) / 2 for k, rate in enumerate(expected)]
    assert spy.rates == pytest.approx(expected)
    assert mean.history["lr"].tolist() == pytest.approx([expected[0], expected[19]])  # steps 1 and 20


def test_first_step_by_hand(mean, cells):
    """Adam's first step is lr times the sign of the gradient."""
    spy = Spy()
    mean.fit(cells, config=replace(CONFIG, steps=1, warmup=0, lr=0.01, ema=0.0), callbacks=[spy])
    torch.testing.assert_close(mean.mean.detach(), torch.full((12,), 0.01), atol=1e-6, rtol=0)
    assert type(spy.optimizer) is torch.optim.Adam
    mean.fit(cells, config=replace(CONFIG, steps=1, optimizer="adamw"), callbacks=[spy])
    assert type(spy.optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(("clip", "norm"), [(0.0, None), (0.01, 0.01)])
def test_clip(mean, cells, clip, norm):
    """After one step the first moment of Adam is a tenth of the clipped gradient."""
    spy = Spy()
    mean.fit(cells, config=replace(CONFIG, steps=1, clip=clip, batch_size=192), callbacks=[spy])
    moment = spy.optimizer.state[mean.mean]["exp_avg"]
    expected = float(np.linalg.norm(2 / 12 * cells.X.toarray().mean(0))) if norm is None else norm
    assert float(moment.norm()) * 10 == pytest.approx(expected, rel=1e-3)


def test_average_by_hand(mean, cells):
    """Kept weights: a <- d a + (1 - d) w with d = min(ema, (1 + k) / (10 + k)), beginning at the first weights."""
    spy = Spy()
    mean.fit(cells, config=replace(CONFIG, ema=0.7, lr=0.1, warmup=0), callbacks=[spy])
    average = torch.zeros(12)
    for k, snapshot in enumerate(spy.weights, start=1):
        decay = min(0.7, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * snapshot["mean"]
    torch.testing.assert_close(mean.mean.detach(), average)
    assert not torch.allclose(average, spy.weights[-1]["mean"])


def test_without_average_the_last_weights_are_kept(mean, cells):
    spy = Spy()
    mean.fit(cells, config=replace(CONFIG, ema=0.0), callbacks=[spy])
    assert_equal(weights(mean), spy.weights[-1])


@pytest.mark.parametrize("kind", ["mean", "linear_additive"])
def test_accumulation_equals_the_big_batch(cells, plan, kind):
    """Two batches of 16 make the step of one batch of 32, where the loss is a mean over cells."""
    rows = np.flatnonzero(~plan.is_control(cells.obs))[:96]
    chosen = cells[np.sort(np.concatenate([rows, np.flatnonzero(plan.is_control(cells.obs))[:32]]))].copy()
    results = []
    for size, accumulate in ((32, 1), (16, 2)):
        model = {"mean": Mean, "linear_additive": iv.models.LinearAdditive}[kind](plan, cells.var_names)
        config = replace(CONFIG, steps=8, batch_size=size, accumulate=accumulate, ema=0.0, clip=0.05)
        results.append(weights(model.fit(chosen, config=config)))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], atol=1e-5, rtol=1e-4)


def test_every_cell_is_seen_once_per_pass(mean, cells):
    seen = []

    class See(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(batch.index)

    mean.fit(cells, config=replace(CONFIG, steps=12, batch_size=32), callbacks=[See()])  # two passes of 6 batches
    first, second = torch.cat(seen[:6]), torch.cat(seen[6:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(192))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("start", [0, 5])
def test_devices_share_the_batches(mean, cells, plan, monkeypatch, start):
    """Each of two devices gets every other batch, from the batch after the `start` that each has had."""
    dataset = iv.CellDataset(cells, plan)

    def first(n: int, start: int) -> list[list[int]]:
        stream = fitting.Stream(dataset, mean, CONFIG, start)
        return [batch.index.tolist() for _, batch in zip(range(n), stream, strict=False)]

    alone = first(16, 2 * start)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert first(8, start) == alone[rank::2]


def test_same_seed_same_weights(cells, plan):
    """The seed of the fit decides alone: not the first weights, not the global state, which stays as it is."""
    results = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        model = iv.models.PRiMeFlow(plan, cells.var_names, DROPOUT)
        state = torch.get_rng_state()
        model.fit(cells, config=replace(CONFIG, steps=4, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        results.append(weights(model))
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0]["velocity.field.genes"], results[2]["velocity.field.genes"])


MLP = iv.models.PRiMeFlow.Config(velocity="mlp", precondition=False, anchor=False, hidden_dim=16)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_networks_learn_the_same(cells, plan):
    plain, compiled = (iv.models.PRiMeFlow(plan, cells.var_names, MLP) for _ in range(2))
    plain.fit(cells, config=replace(CONFIG, steps=4))
    compiled.fit(cells, config=replace(CONFIG, steps=4, compile=True))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, rtol=1e-3, atol=1e-4)
    assert compiled.velocity._compiled_call_impl is None


@pytest.mark.slow
def test_without_a_compiler_networks_are_not_compiled(cells, plan, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_fit as here; cells, plan, _ = here.experiment();"
        "model = here.iv.models.PRiMeFlow(plan, cells.var_names, here.MLP);"
        "model.fit(cells, config=here.replace(here.CONFIG, steps=4, compile=True)).save(sys.argv[2])"
    )
    nothing = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, os.path.dirname(__file__), str(tmp_path / "run")]
    done = subprocess.run(command, env=os.environ | nothing, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "the network is not compiled" in done.stderr, done.stderr
    plain = iv.models.PRiMeFlow(plan, cells.var_names, MLP).fit(cells, config=replace(CONFIG, steps=4))
    assert_equal(weights(plain), weights(iv.load(tmp_path / "run")))


def test_bf16(cells, plan, split):
    model = iv.models.PRiMeFlow(plan, cells.var_names, DROPOUT)
    model.fit(cells, split, config=replace(CONFIG, precision="bf16", val_every=12))
    assert np.isfinite(model.history["train_total"]).all() and np.isfinite(model.history["val_total"].dropna()).all()
    assert {v.dtype for v in model.state_dict().values() if v.is_floating_point()} == {torch.float32}
    full = iv.models.PRiMeFlow(plan, cells.var_names, DROPOUT).fit(cells, split, config=replace(CONFIG, val_every=12))
    assert full.history["val_total"].iloc[-1] == pytest.approx(model.history["val_total"].iloc[-1], rel=0.05)
    assert full.history["val_total"].iloc[-1] != model.history["val_total"].iloc[-1]


def test_loss_that_is_not_finite(cells, plan):
    class Broken(Mean):
        def loss(self, batch):
            return {"total": (self.mean * math.nan).sum()}

    model = Broken(plan, cells.var_names)
    with pytest.raises(FloatingPointError, match="the loss of Broken is nan at step 0; lower FitConfig.lr"):
        model.fit(cells, config=CONFIG)
    assert not model.card  # it is unfitted


# ---- validation ------------------------------------------------------------------------------------------------------


def test_validation_is_the_same_at_every_call(cells, plan, split):
    model = iv.models.PRiMeFlow(plan, cells.var_names, DROPOUT).fit(cells, split, config=replace(CONFIG, steps=2))
    dataset = iv.CellDataset(cells, plan, split)
    model.train()
    first = validation_losses(model, dataset, CONFIG)
    torch.randn(5)
    assert validation_losses(model, dataset, CONFIG) == first
    assert model.training  # as it was
    assert validation_losses(model, dataset, replace(CONFIG, seed=1)) != first
    assert set(first) == {"total", "t0", "t1", "t2", "t3", "t4"}


def test_validation_is_the_mean_over_validation_cells(mean, cells, plan, split):
    dataset = iv.CellDataset(cells, plan, split)
    values = cells.X.toarray()[(split == "val").to_numpy()]
    for size in (5, 32):
        assert validation_losses(mean, dataset, replace(CONFIG, batch_size=size))["total"] == pytest.approx(
            (values**2).mean(), rel=1e-5
        )
    few = validation_losses(mean, dataset, replace(CONFIG, batch_size=5, val_batches=1))["total"]
    assert few != pytest.approx((values**2).mean(), rel=1e-5)


def test_validation_of_a_loss_that_not_every_batch_has(cells, plan, split):
    """Means are over the cells of the batches that report a loss."""

    class Sometimes(Mean):
        def loss(self, batch):
            losses = super().loss(batch)
            return losses | ({"large": torch.tensor(3.0)} if len(batch) == 20 else {})

    dataset = iv.CellDataset(cells, plan, split)  # 32 validation cells: batches of 20 and 12
    model = Sometimes(plan, cells.var_names)
    assert validation_losses(model, dataset, replace(CONFIG, batch_size=20))["large"] == pytest.approx(3.0)


def test_validation_without_controls_of_its_own(cells, plan):
    """Models that need pairs take training controls for validation cells."""
    split = pd.Series("train", index=cells.obs_names)
    split[(~plan.is_control(cells.obs)) & (np.arange(192) % 4 == 0)] = "val"
    model = iv.models.LinearAdditive(plan, cells.var_names)
    model.fit(cells, split, config=replace(CONFIG, steps=4, val_every=2))
    assert model.history["val_total"].notna().sum() == 2


def test_no_validation_cells(mean, cells):
    mean.fit(cells, config=replace(CONFIG, val_every=5, keep="best"))
    assert not [column for column in mean.history if column.startswith("val")]


def test_history(cells, plan, split):
    model = iv.models.PRiMeFlow(plan, cells.var_names, DROPOUT)
    model.fit(cells, split, config=replace(CONFIG, steps=45, val_every=15))
    history = model.history
    assert history["step"].tolist() == [1, 15, 20, 30, 40, 45]
    assert {"seconds", "lr", "train_total", "val_total", "val_t0", "val_t4"} <= set(history)
    assert history["val_total"].notna().tolist() == [False, True, False, True, False, True]
    assert history["train_total"].notna().all() and (history["seconds"].diff().dropna() >= 0).all()


class Overshoot(Mean):
    """Trains towards 1 and is judged by the distance to 0.4: the best comes before the end."""

    def loss(self, batch):
        goal = 1.0 if self.training else 0.4
        return {"total": (self.mean - goal).square().mean()}


@pytest.mark.parametrize("keep", ["last", "best"])
def test_early_stop_and_best_weights(cells, plan, split, keep):
    """The parameter goes 0 -> 1 in steps of about 0.1; the best validation, at 0.4, is after step 4."""
    config = replace(CONFIG, steps=20, lr=0.1, warmup=0, schedule="constant", ema=0.0, clip=0.0, val_every=1,
                     patience=3, keep=keep)  # fmt: skip
    model = Overshoot(plan, cells.var_names).fit(cells, split, config=config)
    assert model.history["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert model.history["val_total"].idxmin() == 3
    expected = model.history["val_total"].iloc[3 if keep == "best" else 6]
    dataset = iv.CellDataset(cells, plan, split)
    assert validation_losses(model, dataset, config)["total"] == pytest.approx(expected, rel=1e-6)
    assert float(model.mean[0].detach()) == pytest.approx(0.4 if keep == "best" else 0.68, abs=0.03)


# ---- callbacks, files ------------------------------------------------------------------------------------------------


def test_callbacks_and_loggers_are_used(mean, cells, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    spy = Spy()
    mean.fit(cells, config=replace(CONFIG, accumulate=2), callbacks=[spy], loggers=[CSVLogger(tmp_path)])
    assert len(spy.weights) == CONFIG.steps
    (file,) = tmp_path.rglob("metrics.csv")
    assert "train_total" in pd.read_csv(file)


@pytest.mark.parametrize("progress", [True, False])
def test_progress(mean, cells, capsys, progress):
    mean.fit(cells, config=replace(CONFIG, accumulate=2, progress=progress))
    shown = capsys.readouterr().out
    assert ("24/24" in shown) == progress
    assert progress or shown == ""


def test_nothing_is_left_behind(cells, plan, split, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    iv.models.PRiMeFlow(plan, cells.var_names, DROPOUT).fit(cells, split, config=replace(CONFIG, checkpoint_every=2))
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_is_safetensors_and_json(cells, plan, split, tmp_path):
    model = iv.models.PRiMeFlow(plan, cells.var_names, DROPOUT)
    config = replace(CONFIG, keep="best", val_every=6, keep_checkpoints=True)
    model.fit(cells, split, config=config, folder=tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["best.safetensors", "history.csv", "last.safetensors"]
    best = load_file(tmp_path / "run" / "best.safetensors")
    assert all(torch.equal(best[k], v) for k, v in model.state_dict().items())
    with safe_open(tmp_path / "run" / "last.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["invirtuo"])
        assert {key.split(".")[0] for key in file.keys()} == {"model", "average", "optimizer", "best"}
    assert facts["step"] == CONFIG.steps
    table = pd.read_csv(tmp_path / "run" / "history.csv")
    pd.testing.assert_frame_equal(table, model.history, check_dtype=False)


# ---- resume ----------------------------------------------------------------------------------------------------------

KEPT = replace(CONFIG, keep_checkpoints=True)
HARD = replace(CONFIG, steps=17, accumulate=2, warmup=6, ema=0.9, val_every=4, keep="best", checkpoint_every=3, lr=0.01)


def make(kind: str, plan, genes) -> Model:
    if kind in iv.models.MODELS:
        return iv.models.MODELS[kind](plan, genes, CPA if kind == "cpa" else None)
    return iv.models.PRiMeFlow(plan, genes, {"genewise": DROPOUT, "unet": UNET}[kind])


@pytest.mark.parametrize(
    ("kind", "fail_at"),
    [("genewise", 3), ("genewise", 8), ("genewise", 16), ("unet", 8), ("linear_additive", 16), ("cpa", 3)],
)
def test_resume_equals_uninterrupted(cells, plan, split, tmp_path, kind, fail_at):
    whole = make(kind, plan, cells.var_names).fit(cells, split, config=HARD)
    with pytest.raises(KeyError, match="killed"):
        make(kind, plan, cells.var_names).fit(cells, split, config=HARD, folder=tmp_path, callbacks=[Spy(fail_at)])
    spy = Spy()
    resumed = make(kind, plan, cells.var_names)
    resumed.fit(cells, split, config=HARD, folder=tmp_path, resume=True, callbacks=[spy])
    done = (fail_at - 1) // 3 * 3  # the callback fails before the checkpoint of its own step
    assert len(spy.weights) == 17 - done
    assert_equal(weights(resumed), weights(whole))
    pd.testing.assert_frame_equal(
        resumed.history.drop(columns="seconds"), whole.history.drop(columns="seconds"), check_exact=True
    )


class Slow(lightning.Callback):
    def on_train_batch_end(self, *args):
        time.sleep(0.05)


def test_resume_after_sigkill(cells, plan, split, tmp_path):
    """A real kill, at any moment after the first checkpoint."""
    folder, errors = tmp_path / "run", tmp_path / "errors"
    config = replace(HARD, steps=60)

    def fitted(**options):
        return make("genewise", plan, cells.var_names).fit(cells, split, config=config, **options)

    process = forked(lambda: fitted(folder=folder, callbacks=[Slow()]), errors)
    deadline = time.monotonic() + 90
    while not (folder / "last.safetensors").exists():
        assert time.monotonic() < deadline, errors.read_text()
        time.sleep(0.01)
    time.sleep(0.05 + 0.5 * np.random.default_rng().random())
    os.kill(process, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL, "the fit ended before it could be killed"
    assert_equal(weights(fitted(folder=folder, resume=True)), weights(fitted()))


def test_resume_of_an_early_stop(cells, plan, split, tmp_path):
    config = replace(CONFIG, steps=20, lr=0.1, warmup=0, schedule="constant", ema=0.0, val_every=1, patience=3,
                     keep="best", checkpoint_every=2, keep_checkpoints=True)  # fmt: skip
    whole = Overshoot(plan, cells.var_names).fit(cells, split, config=config, folder=tmp_path)
    spy = Spy()
    resumed = Overshoot(plan, cells.var_names)
    resumed.fit(cells, split, config=config, folder=tmp_path, resume=True, callbacks=[spy])
    assert spy.weights == []
    assert_equal(weights(resumed), weights(whole))
    assert resumed.history["step"].tolist() == whole.history["step"].tolist()


def test_resume_of_a_finished_fit_trains_no_more(mean, cells, plan, tmp_path):
    mean.fit(cells, config=KEPT, folder=tmp_path)
    spy = Spy()
    again = Mean(plan, cells.var_names).fit(cells, config=KEPT, folder=tmp_path, resume=True, callbacks=[spy])
    assert spy.weights == []
    assert_equal(weights(again), weights(mean))


def test_resume_without_checkpoint_begins_anew(mean, cells, plan, tmp_path):
    mean.fit(cells, config=CONFIG)
    again = Mean(plan, cells.var_names).fit(cells, config=CONFIG, folder=tmp_path / "empty", resume=True)
    assert_equal(weights(again), weights(mean))
    with pytest.raises(ValueError, match="pass folder="):
        mean.fit(cells, config=CONFIG, resume=True)


def test_resume_keeps_the_measured_precision(cells, plan, split, tmp_path, monkeypatch):
    """What "auto" means is measured; a second measurement must not change the numbers."""
    config = replace(HARD, precision="auto")
    monkeypatch.setattr(fitting.machine, "bf16_pays", lambda *_: True)
    whole = make("genewise", plan, cells.var_names).fit(cells, split, config=config)
    with pytest.raises(KeyError, match="killed"):
        make("genewise", plan, cells.var_names).fit(cells, split, config=config, folder=tmp_path, callbacks=[Spy(8)])
    monkeypatch.setattr(fitting.machine, "bf16_pays", lambda *_: False)
    resumed = make("genewise", plan, cells.var_names)
    resumed.fit(cells, split, config=config, folder=tmp_path, resume=True)
    assert_equal(weights(resumed), weights(whole))


def test_resume_refuses_what_does_not_belong_to_it(cells, plan, split, tmp_path):
    hard = replace(HARD, keep_checkpoints=True)
    model = make("genewise", plan, cells.var_names).fit(cells, split, config=hard, folder=tmp_path)
    before = weights(model)

    def resume(model, adata=cells, split=split, config=hard):
        model.fit(adata, split, config=config, folder=tmp_path, resume=True)

    fresh = make("genewise", plan, cells.var_names)
    with pytest.raises(ValueError, match=r"another FitConfig \(lr: 0.01 -> 0.02\)"):
        resume(fresh, config=replace(hard, lr=0.02))
    resume(fresh, config=replace(hard, checkpoint_every=1))  # changes no number
    assert_equal(weights(fresh), before)
    with pytest.raises(ValueError, match="another model"):
        resume(make("unet", plan, cells.var_names))
    with pytest.raises(ValueError, match="another model"):
        resume(make("linear_additive", plan, cells.var_names))
    with pytest.raises(ValueError, match="other data"):
        resume(fresh, split=split.replace("val", ""))
    changed = cells.copy()
    changed.X.data[0] += 0.1
    with pytest.raises(ValueError, match="other data"):
        resume(fresh, adata=changed)


def test_damaged_checkpoint(mean, cells, tmp_path):
    mean.fit(cells, config=KEPT, folder=tmp_path)
    file = tmp_path / "last.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"last\.safetensors is damaged"):
        mean.fit(cells, config=CONFIG, folder=tmp_path, resume=True)
