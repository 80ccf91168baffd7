"""The command line: one verb, one call of the Python API.

Exit code 0 on success, 2 on bad input with one message on standard error.
"""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

import typer

from invirtuo.cli import cells, data, dynamics, judging
from invirtuo.cli.options import fail

__all__ = ["app", "main"]

app = typer.Typer(
    name="invirtuo",
    help="Train, sample and judge generative models of how single cells answer to perturbations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(data.demo)
app.command("list")(data.list_)
for _verb in (
    data.check,
    data.prepare,
    cells.fit,
    cells.predict,
    cells.generate,
    cells.augment,
    cells.correct,
    cells.impute,
    cells.embed,
    dynamics.forecast,
    dynamics.network,
    dynamics.knock_out,
    dynamics.overexpress,
    judging.effects,
    judging.evaluate,
    judging.judge,
    judging.benchmark,
    judging.tune,
    judging.report,
):
    app.command()(_verb)


def main() -> NoReturn:
    """Run the command line; bad input ends with exit code 2 and one message."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.captureWarnings(True)  # deprecations inside other packages are not for a user of the shell
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        if _is_usage(error):
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        if isinstance(error, (ValueError, FloatingPointError, OSError, MemoryError)):
            fail(str(error) or type(error).__name__)
        raise


def _is_usage(error: Exception) -> bool:
    """Whether click or typer raised it about the command line itself."""
    return hasattr(error, "show") and hasattr(error, "exit_code")
