"""A model of anybody: a command that reads a question and leaves predicted cells, in whatever environment it runs.

It stands where a fitted model would, so that its row has the same scores, notes and costs as every other.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pandas as pd

from invirtuo.bench.question import ANSWERS, Asked, Question
from invirtuo.cells.files import write_h5ad, writing
from invirtuo.settings import Settings, setting
from invirtuo.verbs.sampling import NoSampling

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design
    from invirtuo.fit import FitConfig

__all__ = ["MIB", "Command", "Foreign", "end_commands"]

LOG, DONE = "log.txt", "done.json"
SAID = 2000  # last characters of a log that an error repeats
MIB = 1024**2 if sys.platform == "darwin" else 1024  # KiB, on macOS bytes, in which memory is counted
_running: set[int] = set()  # commands of this process


@dataclass(frozen=True)
class Command(Settings):
    """How the predictions of a foreign model come to be: by a command, or as a file that somebody made."""

    command: tuple[str, ...] = setting((), "program and arguments; {folder}, {seed} and {python} are filled in")
    minutes: float = setting(60.0, "limit on the time of the command", gt=0)
    predicted: str | None = setting(None, "file with predicted cells; {seed} and {fold} are filled in")

    def __post_init__(self) -> None:
        """Refuse what names no answer, or two."""
        super().__post_init__()
        if bool(self.command) == bool(self.predicted):
            raise ValueError("expected command= (a list of strings), or predicted= (a file), and not both")
        if self.command and not any("{folder}" in text for text in self.command):
            raise ValueError(f"command {' '.join(self.command)!r} does not name the folder; write {{folder}} into it")


class Foreign:
    """A command in the place of a fitted model: `fit` runs it, `predict` or `generate` reads what it left.

    Parameters
    ----------
    design, genes
        As of a model.
    config
        How predictions come to be.
    asked
        What is asked; it must be known before the command begins.
    """

    name: ClassVar[str] = Question.name
    verb: ClassVar[str] = "predict"
    Config: ClassVar[type] = Command
    SEARCH: ClassVar[Mapping[str, Any]] = {}
    Sampling: ClassVar[type[NoSampling]] = NoSampling
    any_target: ClassVar[bool] = False

    def __init__(self, design: Design, genes: Any, config: Command, asked: Asked):
        self.design, self.genes, self.config, self.asked = design, genes, config, asked
        self.card: dict[str, Any] = {}
        self.history = pd.DataFrame()
        self.costs: dict[str, float | None] = {}  # of the command, as tables of costs call them
        self.log = ""
        self._answer: AnnData | None = None

    @classmethod
    def check_options(cls, verb: str, options: Mapping[str, Any], config: Any) -> None:
        """Refuse other verbs and all options: a command has its own."""
        if verb not in ANSWERS:
            raise ValueError(f"a command cannot {verb}")
        if options:
            raise ValueError(f"a command takes no options of {verb} ({', '.join(options)}); write them into it")
        if config.command and shutil.which(_filled(config.command[0])) is None:
            raise ValueError(f"{config.command[0]!r} is no program here; name one on the PATH, or its path")

    def parameters(self) -> Iterator[Any]:
        """None that are known."""
        return iter(())

    def fit(
        self,
        adata: AnnData,
        split: pd.Series,
        config: FitConfig,
        *,
        folder: str | Path | None = None,
        resume: bool = False,
    ) -> Self:
        """Ask the question in a folder, run the command, and read its answer.

        Parameters
        ----------
        adata, split
            As of a model.
        config
            Whose seed is asked for.
        folder
            Where the question is asked; what a command leaves there it finds again when it is called once more.
        resume
            Read the answer of a command that ended well.

        Raises
        ------
        ValueError
            If the command fails, takes too long, or its answer is not what was asked for.
        """
        question = Question(adata, self.design, split, self.asked, config)
        self.card = question.card
        if self.config.predicted:
            fields = {"seed": config.seed, "fold": self.asked.fold}
            self._answer = question.read(Path(_filled(self.config.predicted, **fields)))
            return self

        with tempfile.TemporaryDirectory(prefix="invirtuo-") as temporary:
            place = Path(temporary if folder is None else folder).resolve()
            if not (resume and (place / DONE).is_file()):
                self._ask(question, place)
            self.costs = json.loads((place / DONE).read_text(encoding="utf-8"))
            self.log = (place / LOG).read_text(encoding="utf-8", errors="replace")
            self._answer = question.read(place / question.answer)
            if not config.keep_checkpoints:
                shutil.rmtree(place)
                place.mkdir()
        return self

    def _ask(self, question: Question, folder: Path) -> None:
        """Write the question, run the command, and note what it cost."""
        question.write(folder, self.config.minutes)
        for name in (question.answer, DONE):
            (folder / name).unlink(missing_ok=True)
        command = [_filled(text, folder=folder, seed=question.fit.seed) for text in self.config.command]
        costs, how = _run(command, folder / LOG, self.config.minutes)
        if not how and not (folder / question.answer).is_file():
            how = f"left no {question.answer}"
        if how:
            said = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip()[-SAID:]
            raise ValueError(f"the command {how}; the last that it said ({folder / LOG}): {said or 'nothing'}")
        with writing(folder / DONE) as path:
            path.write_text(json.dumps(costs), encoding="utf-8")

    def predict(self, conditions: str, n_cells: int, *, seed: int) -> AnnData:
        """The cells of the answer; they were asked for when the command began."""
        del conditions, n_cells, seed
        return self._answered()

    def generate(self, *, labels: pd.DataFrame, seed: int) -> AnnData:
        """The cells of the answer, as :meth:`predict`."""
        del labels, seed
        return self._answered()

    def _answered(self) -> AnnData:
        if self._answer is None:
            raise ValueError("the command has not run; call fit first")
        return self._answer

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Keep the answer and the log."""
        del overwrite
        write_h5ad(self._answered(), Path(folder) / ANSWERS[self.asked.verb])
        with writing(Path(folder) / LOG) as path:
            path.write_text(self.log, encoding="utf-8")


def end_commands() -> None:
    """End the commands that this process began, and what they began."""
    for group in tuple(_running):
        _end(group)


def _end(group: int) -> None:
    """End a process group, if there is anything left of it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _filled(text: str, **fields: Any) -> str:
    """A string of a command with its placeholders filled; other braces stay as they are."""
    for name, value in {"python": sys.executable, **fields}.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def _run(command: list[str], log: Path, minutes: float) -> tuple[dict[str, float | None], str]:
    """What a command cost, and how it failed if it did. It has a process group of its own, which ends with it."""
    started = time.perf_counter()
    with log.open("ab") as messages:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, start_new_session=True
            )
        except OSError as error:
            return {}, f"could not be started ({error})"
        _running.add(process.pid)
        limit = threading.Timer(60 * minutes, _end, [process.pid])
        limit.start()
        try:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            limit.cancel()
            _end(process.pid)
            _running.discard(process.pid)

    spent = time.perf_counter() - started
    costs = {"cpu_seconds": round(used.ru_utime + used.ru_stime, 2), "peak_memory_mib": round(used.ru_maxrss / MIB)}
    if process.returncode == 0:
        return {**costs, "parameters": None}, ""
    if spent >= 60 * minutes:
        return {}, f"did not end within {minutes:g} minutes"
    killed = f"was killed by signal {-process.returncode}, perhaps for want of memory"
    return {}, killed if process.returncode < 0 else f"ended with exit code {process.returncode}"
