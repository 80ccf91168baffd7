"""Fixtures for all tests: toy cells, their design, and real files where they are at hand."""

from __future__ import annotations

import fcntl
import importlib
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from invirtuo.threads import VARIABLES  # loads no numeric library

# Small networks gain nothing from a second thread, and threads that wait for each other are slow on a busy machine.
for variable in VARIABLES:
    os.environ.setdefault(variable, "1")

import pytest
import torch

import invirtuo as iv
from invirtuo import cli

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def same_threads():
    """Numba, which scanpy calls, sets the threads of torch: on a busy machine that slows later tests 20 times."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_pilots(monkeypatch):
    """PRiMeFlow draws a few cells of a condition, and not hundreds, to know the mean of its flow."""
    monkeypatch.setattr("invirtuo.models.primeflow.model.PILOT", 16)


@pytest.fixture
def same_process(monkeypatch):
    """Cells of benchmarks and searches are computed in this process, where a new one takes seconds to import packages.

    One after the other: pandas turns its warnings off and on for the whole process, not for a thread.
    """
    from invirtuo.bench.cell import compute

    for name in ("engine", "tune"):
        module = importlib.import_module(f"invirtuo.bench.{name}")
        monkeypatch.setattr(module, "launch", compute)
    monkeypatch.setattr("invirtuo.bench.engine._n_jobs", lambda cells: 1)


@pytest.fixture
def toy():
    """Raw counts of 600 cells with planted effects; a fresh object for each test."""
    return iv.datasets.toy()


@pytest.fixture
def design(toy):
    return iv.Design.from_adata(toy, perturbation="perturbation", control="control", covariates=["cell_type"])


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a command in this process; gives exit code, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["invirtuo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capfd.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


@pytest.fixture
def full_disk():
    """A context that is a disk that is full: files of this process cannot grow beyond a size."""

    @contextmanager
    def limit(size: int):
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)

    return limit


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Give a function that makes a folder once for all processes of a run of the tests; the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers

    def find(name: str, make) -> Path:
        folder, mark = base / name, base / f"{name}.made"
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not mark.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                mark.touch()
        return folder

    return find


@pytest.fixture(scope="session")
def shared():
    """Give a function that maps a name to its path in the folder of real data beside the checkout, or skips."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs {name} in the folder shared/ beside the checkout")
        return path

    return find
