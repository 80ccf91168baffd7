"""The command line: one verb, one call of the Python API.

Exit code 0 on success, 2 on bad input with one message on standard error; 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import functools
import gc
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from invirtuo import __version__
from invirtuo.cli import arena, cells, challenge, data, dynamics, judging, screening
from invirtuo.cli.options import fail

__all__ = ["app", "main"]

RESULTS = ("out", "figure", "plot", "report")  # options that name files to write
STOPS = {128 + signal.SIGINT: "Ctrl-C", 128 + signal.SIGTERM: "SIGTERM"}
ADVICE = {  # text in errors of other packages to what can be done about them
    "cannot cache function": "Set NUMBA_CACHE_DIR to a folder that can be written to",
    "SLURM": "Start one process for each of FitConfig.devices, or set devices to 1",
    "out of memory": "Lower the batch size",
    "can't allocate memory": "Lower the batch size",
}


def _begun(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, begun if no result replaces what it reads; stopped by a signal, it ends with one line."""

    @functools.wraps(verb)
    def begin(**given: Any) -> None:
        from invirtuo.cells.files import check_writable
        from invirtuo.threads import size_threads

        size_threads()
        # a result never replaces what the verb reads
        results = [given[name] for name in RESULTS if given.get(name) is not None]
        inputs = list(_files_in(given))
        for result in results:
            if not result.is_dir():
                check_writable(result, inputs=inputs)
        try:
            verb(**given)
            return
        except (KeyboardInterrupt, SystemExit) as stop:
            code = 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else stop.code
            if code not in STOPS:
                raise
            notes = getattr(stop, "__notes__", [])

        # after the exception is gone, and with it what it referred to: HDF5 files must be closed before Python ends
        gc.collect()
        fail("; ".join([f"stopped by {STOPS[code]}", *notes]), code)

    return begin


def _files_in(given: Mapping[str, Any]) -> Iterator[Path]:
    """Paths of files that a verb may read: its arguments and options, alone or as name=FILE."""
    for name, value in given.items():
        if name in RESULTS:
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str | Path):
                yield Path(item)
                yield Path(str(item).partition("=")[2])


PANELS: dict[str, tuple[Callable[..., None], ...]] = {  # heading to verbs, in the order of work
    "From a file to an answer": (data.demo, judging.compare),
    "Prepare": (data.check, data.prepare, screening.responses),
    "Fit and predict": (cells.fit, cells.predict, judging.effects, screening.screen, screening.interactions),
    "Judge": (judging.evaluate, judging.score, judging.judge, judging.benchmark, judging.tune, judging.report),
    "Generate and embed": (cells.generate, cells.augment, cells.correct, cells.impute, cells.embed),
    "Time": (dynamics.forecast, dynamics.network, dynamics.knock_out, dynamics.overexpress),
}

app = typer.Typer(
    name="invirtuo",
    help="Train, sample and judge generative models of how single cells answer to perturbations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("list")(data.list_)
for _panel, _verbs in PANELS.items():
    for _verb in _verbs:
        app.command(rich_help_panel=_panel)(_begun(_verb))
vcc = typer.Typer(help="The Virtual Cell Challenge 2026: predict, check, pack.", no_args_is_help=True)
for _step in (challenge.predict, challenge.check, challenge.pack):
    vcc.command()(_begun(_step))
app.add_typer(vcc, name="vcc", rich_help_panel="Judge")
shared = typer.Typer(help="Benchmarks of several groups: ask, merge.", no_args_is_help=True)
for _shared in (arena.ask, arena.merge):
    shared.command()(_begun(_shared))
app.add_typer(shared, name="arena", rich_help_panel="Judge")


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"invirtuo {__version__}")
        raise typer.Exit


@app.callback()
def _before_the_verb(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and end.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Options that come before a verb."""


def main() -> NoReturn:
    """Run the command line; bad input ends with exit code 2 and one message."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.captureWarnings(True)  # deprecations inside other packages are not for a user of the shell
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _stop)
    # exit codes: 2 for bad input, 128 + signal for what a user stopped; faults of this package show where they are
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if _is_usage(error):
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        advice = [remedy for text, remedy in ADVICE.items() if text in str(error)]
        if not advice and not _is_expected(error):
            raise
        message = str(error) or type(error).__name__
        fail(". ".join([message.removesuffix("."), *advice]) if advice else message)


def _stop(number: int, _: Any) -> NoReturn:
    """End as after Ctrl-C: unfinished files are removed on the way out."""
    sys.exit(128 + number)


def _is_expected(error: Exception) -> bool:
    """Whether an error is about input, the machine, or what is installed, and not a fault of this package."""
    from safetensors import SafetensorError

    return isinstance(error, (ValueError, FloatingPointError, OSError, MemoryError, ImportError, SafetensorError))


def _is_usage(error: Exception) -> bool:
    """Whether click or typer raised an error about the command line itself."""
    return hasattr(error, "show") and hasattr(error, "exit_code")
