"""Nothing is lost: whenever a verb is killed, stopped or finds the disk full, the old or the new result is whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from processes import ended, forked

import invirtuo as iv
from invirtuo import cli
from invirtuo.fit import FitConfig
from invirtuo.verbs.sampling import SampleConfig

COLUMNS = ["--perturbation", "perturbation", "--control", "control", "--covariate", "cell_type"]
CONFIG = FitConfig(steps=6, batch_size=64, warmup=0, precision="fp32", accelerator="cpu", progress=False, val_every=0)
FMPCA = iv.models.FMPCA.Config(n_pcs=4, hidden_dim=16, steps=2)
SMALL = {
    "fm_pca": FMPCA,
    "primeflow": iv.models.PRiMeFlow.Config(hidden_dim=16, gene_width=8, n_context=2, cell_width=16, n_blocks=1),
    "cfgen": iv.models.CFGen.Config(hidden_rna=(16,), n_latent=4, hidden=16, embedding=8, n_blocks=1),
}
QUICK = ["--fit-set", "steps=4", "--fit-set", "precision=fp32", "--fit-set", "accelerator=cpu", "--quiet"]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}  # audit events that change a file system, beside "open"


# ---- processes -------------------------------------------------------------------------------------------------------


def spawned(arguments: list, errors: Path) -> int:
    """Start a verb in a process of its own, for what does not live in a copy of a process with threads."""
    opened = (os.POSIX_SPAWN_OPEN, 2, errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    command = [sys.executable, "-m", "invirtuo", *map(str, arguments)]
    return os.posix_spawn(sys.executable, command, os.environ, file_actions=[opened])


def killed_at(number: int, work, errors: Path) -> bool:
    """Kill work at one of its changes to the file system; False if it ended before."""

    def count(event, arguments):
        nonlocal number
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            number -= 1
            if number < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted():
        sys.addaudithook(count)
        work()

    code = ended(forked(counted, errors))
    assert code in (0, -signal.SIGKILL), errors.read_text()
    return code != 0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def command(*arguments) -> None:
    sys.argv = ["invirtuo", *map(str, arguments)]
    cli.main()


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells():
    return iv.preprocess.normalize(iv.datasets.toy(n_cells=160, n_genes=12))


@pytest.fixture(scope="module")
def plan(cells):
    return iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])


@pytest.fixture(scope="module")
def models(cells, plan):
    """Two fitted models that differ in all their files."""
    made = []
    for seed, rows in ((0, slice(None)), (1, slice(0, 150))):
        model = iv.models.FMPCA(plan, cells.var_names, FMPCA)
        made.append(model.fit(cells[rows].copy(), config=replace(CONFIG, seed=seed)))
    return made


@pytest.fixture
def saved(models, tmp_path):
    models[0].save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def file(cells, tmp_path):
    cells.write_h5ad(tmp_path / "log.h5ad")
    return tmp_path / "log.h5ad"


def drawn(model, plan, cells) -> np.ndarray:
    return model.predict(plan.conditions(cells.obs).iloc[:2], n_cells=2, precision="fp32").X


def which(folder, models) -> int:
    """Number of the model that a folder holds, all of it."""
    found = iv.load(folder)
    number = found.card["seed"]
    assert found.card == json.loads(json.dumps(models[number].card))
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in models[number].state_dict().items())
    np.testing.assert_array_equal(
        found.transforms["pca"].state()["mean"], models[number].transforms["pca"].state()["mean"]
    )
    return number


# ---- SIGKILL ---------------------------------------------------------------------------------------------------------


def test_save_killed_anywhere(models, saved, tmp_path):
    """Over an older model: the old or the new one, whatever was killed before; what else lies there stays."""
    (saved / "notes.txt").write_text("mine")
    found, number, goes_on = [], 0, True
    while goes_on:
        goes_on = killed_at(number, lambda: models[1].save(saved, overwrite=True), tmp_path / "errors")
        found.append(which(saved, models))
        models[0].save(saved, overwrite=True)
        number += 1
    assert number > 10 and set(found) == {0, 1} and found == sorted(found)
    assert len(names(saved)) == 7 and (saved / "notes.txt").read_text() == "mine"


def test_first_save_killed_anywhere(models, tmp_path):
    number, goes_on = 0, True
    while goes_on:
        goes_on = killed_at(number, lambda: models[0].save(tmp_path / "new" / "run"), tmp_path / "errors")
        if (tmp_path / "new" / "run").exists():
            assert which(tmp_path / "new" / "run", models) == 0
            assert names(tmp_path / "new") == ["run"]  # what others left behind is gone
            shutil.rmtree(tmp_path / "new" / "run")
        number += 1
    assert number > 5


@pytest.mark.parametrize("verb", ["predict", "prepare", "evaluate"])
def test_files_killed_anywhere(verb, saved, file, tmp_path, cells, plan):
    """A file is what it was, or the new one."""
    out = tmp_path / ("out.csv" if verb == "evaluate" else "out.h5ad")
    plan.conditions(cells.obs).iloc[:2].to_csv(tmp_path / "wanted.csv", index=False)
    iv.datasets.toy(n_cells=60, n_genes=12).write_h5ad(tmp_path / "counts.h5ad")
    arguments = {
        "predict": [saved, "--conditions", tmp_path / "wanted.csv", "-n", 2, "--quiet", "--out", out],
        "prepare": [tmp_path / "counts.h5ad", out],
        "evaluate": [file, file, *COLUMNS, "--metrics", "rmse_mean", "--quiet", "--out", out],
    }[verb]
    out.write_text("old")
    number, goes_on = 0, True
    while goes_on:
        goes_on = killed_at(number, lambda: command(verb, *arguments), tmp_path / "errors")
        new = out.read_bytes() != b"old"
        if new:
            assert pd.read_csv(out).shape[0] if verb == "evaluate" else iv.files.read_h5ad(out).n_obs
        number += 1
    assert new and number > 2


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["prepare", "shuffle", "fit", "predict", "evaluate"])
def test_a_full_disk(verb, full_disk, saved, file, models, tmp_path, cells, plan):
    """One line, exit code 2, nothing half written, and what was there is there."""
    out = tmp_path / "out.h5ad"
    out.write_text("old")
    plan.conditions(cells.obs).to_csv(tmp_path / "wanted.csv", index=False)
    iv.datasets.toy(n_cells=400, n_genes=30).write_h5ad(tmp_path / "counts.h5ad")
    arguments = {
        "prepare": ["prepare", tmp_path / "counts.h5ad", out],
        "shuffle": ["prepare", tmp_path / "counts.h5ad", "--shuffle-to", tmp_path / "store"],
        "fit": ["fit", "fm_pca", file, *COLUMNS, *QUICK, "--overwrite", "--out", saved],
        "predict": ["predict", saved, "--conditions", tmp_path / "wanted.csv", "-n", 9, "--quiet", "--out", out],
        "evaluate": ["evaluate", file, file, *COLUMNS, "--quiet", "--metrics", "rmse_mean", "--out", out],
    }[verb]
    errors = tmp_path / "errors"
    errors.touch()
    before = names(tmp_path)

    def begun(size: int) -> int:
        with full_disk(size):
            return spawned(arguments, errors) if verb == "predict" else forked(lambda: command(*arguments), errors)

    # at the first bytes of the file, and later; a process that is spawned takes seconds
    for size in {"evaluate": (300,), "predict": (4000,)}.get(verb, (300, 4000)):
        assert ended(begun(size)) == 2
        said = errors.read_text()
        assert said.count("\n") == 1 and "File too large" in said
        assert names(tmp_path) == before and out.read_text() == "old"
        assert which(saved, models) == 0 and not list(saved.rglob("checkpoints"))
    assert ended(begun(10**9)) == 0


# ---- Ctrl-C and SIGTERM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_fit_stopped_by_a_signal(number, code, said, saved, file, models, tmp_path):
    """One line that says how to go on; the older model is there, and a resumed fit ends as one that was not stopped."""
    arguments = ["fit", "fm_pca", file, *COLUMNS, *QUICK, "--set", "n_pcs=4", "--fit-set", "checkpoint_every=2"]
    endless = [*arguments, "--fit-set", "steps=1000000", "--overwrite", "--out", saved]
    process = forked(lambda: command(*endless), tmp_path / "errors")
    deadline = time.monotonic() + 60
    while not (saved / "checkpoints" / "last.safetensors").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process, number)
    assert ended(process) == code
    errors = (tmp_path / "errors").read_text()
    assert errors.startswith(f"invirtuo: stopped by {said}; resume=True, or --resume,") and errors.count("\n") == 1
    assert which(saved, models) == 0
    assert not list(saved.rglob(".*"))


def test_predict_stopped_by_a_signal(saved, tmp_path, cells, plan):
    out = tmp_path / "out.h5ad"
    out.write_text("old")
    plan.conditions(cells.obs).to_csv(tmp_path / "wanted.csv", index=False)
    slowly = ["-n", 10**5, "--steps", 50]
    endless = ["predict", saved, "--conditions", tmp_path / "wanted.csv", *slowly, "--quiet", "--out", out]
    process = forked(lambda: command(*endless), tmp_path / "errors")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)  # cells are drawn
    os.kill(process, signal.SIGTERM)
    assert ended(process) == 143
    assert (tmp_path / "errors").read_text() == "invirtuo: stopped by SIGTERM\n"
    assert out.read_text() == "old" and not list(tmp_path.glob(".out.*"))


def test_benchmark_stopped_by_a_signal(tmp_path):
    endless = ["benchmark", "kang-demo", "--model", "primeflow", "--seeds", 1, "--quiet", "--out", tmp_path / "results"]
    process = forked(lambda: command(*endless), tmp_path / "errors")
    deadline = time.monotonic() + 60
    while not (tmp_path / "results" / "plan.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(process, signal.SIGINT)
    assert ended(process) == 130
    errors = (tmp_path / "errors").read_text()
    how = f"the same command, or call, resumes what is in {tmp_path / 'results'}"
    assert errors == f"invirtuo: stopped by Ctrl-C; {how}\n"
    deadline = time.monotonic() + 60
    while orphans := [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_cell(path, process)]:
        assert time.monotonic() < deadline, orphans
        time.sleep(0.2)


def is_cell(path: Path, parent: int) -> bool:
    """Whether a process computes a cell for a benchmark that had this number."""
    try:
        return path.read_bytes().rstrip(b"\0").split(b"\0")[-1] == str(parent).encode()
    except OSError:
        return False


@pytest.fixture(autouse=True)
def plain_handlers():
    """Signals act as in a fresh session, whatever a shell or an earlier test made of them."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Interrupt(lightning.Callback):
    """Interrupts a fit after its second step."""

    def __init__(self, interrupt):
        self.interrupt = interrupt

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.interrupt()


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def terminate():
    signal.raise_signal(signal.SIGTERM)


def fail():
    raise KeyError("mine")


@pytest.mark.parametrize(
    ("interrupt", "expected"), [(press_ctrl_c, KeyboardInterrupt), (terminate, SystemExit), (fail, KeyError)]
)
@pytest.mark.parametrize("name", SMALL)
def test_a_fitted_model_outlives_a_fit_that_does_not_end(interrupt, expected, name, cells, plan, tmp_path):
    data = iv.datasets.toy(n_cells=160, n_genes=12) if name == "cfgen" else cells
    model = iv.models.MODELS[name](plan, cells.var_names, SMALL[name]).fit(data, config=CONFIG)
    before, card, history = {k: v.clone() for k, v in model.state_dict().items()}, model.card, model.history
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    config = replace(CONFIG, seed=1, checkpoint_every=1)
    with pytest.raises(expected) as stop:
        model.fit(data[20:].copy(), config=config, folder=tmp_path / "fit", callbacks=[Interrupt(interrupt)])
    if expected is SystemExit:
        assert stop.value.code == 143
    if expected is not KeyError:
        assert "resume=True" in stop.value.__notes__[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert model.card == card and model.history.equals(history) and not model.training
    if name != "cfgen":
        assert np.isfinite(drawn(model, plan, cells)).all()


def test_a_first_fit_that_is_interrupted_leaves_an_unfitted_model(cells, plan):
    model = iv.models.FMPCA(plan, cells.var_names, FMPCA)
    with pytest.raises(KeyboardInterrupt):
        model.fit(cells, config=CONFIG, callbacks=[Interrupt(press_ctrl_c)])
    with pytest.raises(ValueError, match="not fitted yet"):
        drawn(model, plan, cells)


# ---- what is there is not replaced unasked ---------------------------------------------------------------------------


def test_a_model_is_replaced_only_if_that_is_asked_for(run, saved, file, models):
    with pytest.raises(ValueError, match="run holds a saved model; give another name, or .*overwrite=True"):
        models[1].save(saved)
    with pytest.raises(FileExistsError):
        models[1].save(saved)
    arguments = ["fit", "fm_pca", file, *COLUMNS, *QUICK, "--out", saved]
    for option in ([], ["--resume"]):  # a model of another fit
        code, _, errors = run(*arguments, *option)
        assert code == 2 and "--overwrite" in errors
    assert which(saved, models) == 0
    assert run(*arguments, "--overwrite")[0] == 0
    assert iv.load(saved).card["fit"]["steps"] == 4
    assert len(names(saved)) == 7  # the model, what was asked, and no checkpoints


def test_a_finished_fit_has_nothing_to_resume(run, file, tmp_path):
    arguments = ["fit", "fm_pca", file, *COLUMNS, *QUICK, "--out", tmp_path / "run"]
    kept = ["--fit-set", "keep_checkpoints=true"]
    assert run(*arguments, *kept)[0] == 0
    assert (tmp_path / "run" / "checkpoints" / "last.safetensors").exists()
    assert iv.load(tmp_path / "run").card["fit"]["keep_checkpoints"]
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    code, said, _ = run(*arguments, "--resume")
    assert code == 0 and "nothing to resume" in said
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}  # checkpoints are gone
    code, _, errors = run(*arguments, "--fit-set", "lr=0.5", "--resume")
    assert code == 2 and "another FitConfig (lr:" in errors


def test_checkpoints_are_replaced_only_if_that_is_asked_for(cells, plan, tmp_path):
    def fit(**options):
        model = iv.models.FMPCA(plan, cells.var_names, FMPCA)
        return model.fit(cells, config=replace(CONFIG, checkpoint_every=1), folder=tmp_path / "fit", **options)

    with pytest.raises(KeyError):
        fit(callbacks=[Interrupt(fail)])
    with pytest.raises(ValueError, match=r"resume=True \(--resume\), begin anew with overwrite=True"):
        fit()
    whole = fit(overwrite=True)
    assert not (tmp_path / "fit").exists()
    whole.save(tmp_path / "fit")
    with pytest.raises(ValueError, match="fit holds a saved model; give checkpoints a folder of their own"):
        fit(overwrite=True)


def test_files_of_two_models_are_refused(saved, models, tmp_path):
    models[1].save(tmp_path / "other")
    for name in ("weights.safetensors", "transforms.npz", "card.json"):
        mixed = shutil.copytree(saved, tmp_path / name)
        shutil.copy(tmp_path / "other" / name, mixed / name)
        with pytest.raises(ValueError, match=f"{name} is not the file that was saved with config.json"):
            iv.load(mixed)


def test_models_saved_without_hashes_are_read(saved, models):
    facts = json.loads((saved / "config.json").read_text())
    facts.pop("sha256")
    (saved / "config.json").write_text(json.dumps(facts))
    assert which(saved, models) == 0


def test_what_is_read_is_not_replaced(run, saved, file, tmp_path):
    for arguments in (["prepare", file, file], ["embed", saved, file, "--out", file],
                      ["evaluate", file, file, *COLUMNS, "--out", file]):  # fmt: skip
        code, _, errors = run(*arguments)
        assert code == 2 and "is read to make the result" in errors
    assert iv.files.read_h5ad(file).n_obs == 160


# ---- settings --------------------------------------------------------------------------------------------------------


def as_numpy(value):
    kinds = {bool: np.bool_, int: np.int64, float: np.float64, str: np.str_}
    if isinstance(value, tuple):
        return np.array(value) if value and not isinstance(value[0], tuple | str) else list(value)
    return kinds[type(value)](value) if type(value) in kinds else value


@pytest.mark.parametrize(
    "config", [FitConfig(), SampleConfig(), *(kind.preset_of(None).config for kind in iv.models.MODELS.values())],
    ids=["FitConfig", "SampleConfig", *iv.models.MODELS],
)  # fmt: skip
def test_settings_are_plain(config):
    given = {field.name: as_numpy(getattr(config, field.name)) for field in fields(config)}
    made = type(config)(**given)
    assert made == config
    for field in fields(config):
        assert type(getattr(made, field.name)) is type(getattr(config, field.name)), field.name
    assert type(FitConfig(accelerator=Path("cpu")).accelerator) is str


def test_seeds_of_numpy(cells, plan, tmp_path):
    for seed in np.arange(2):
        config = replace(CONFIG, seed=seed, checkpoint_every=1)
        model = iv.models.FMPCA(plan, cells.var_names, FMPCA).fit(cells, config=config, folder=tmp_path / "fit")
        model.save(tmp_path / str(seed))


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_fits_in_threads_do_not_disturb_each_other(cells, plan):
    """Nor does a model that is made meanwhile, whose first weights are drawn; what others draw goes on as it was."""

    def fit(model: iv.Model) -> None:
        model.fit(cells, config=replace(CONFIG, steps=40))

    models = [iv.models.FMPCA(plan, cells.var_names, FMPCA) for _ in range(3)]
    fit(models[0])
    state = torch.get_rng_state()
    threads = [threading.Thread(target=fit, args=(model,)) for model in models[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), state)

    threads = [threading.Thread(target=fit, args=(models[1],))]
    threads[0].start()
    while threads[0].is_alive():
        iv.models.FMPCA(plan, cells.var_names, FMPCA)
    for model in models[1:]:
        np.testing.assert_array_equal(drawn(model, plan, cells), drawn(models[0], plan, cells))
