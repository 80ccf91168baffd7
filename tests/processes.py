"""Processes of tests: copies of this one, which have imported all there is, and what they ended with."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path


def forked(work, errors: Path) -> int:
    """Start work in a copy of this process, which has imported all there is; gives its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = open(2, "w", closefd=False)
        work()
        code = 0
    except SystemExit as done:
        code = done.code or 0
    except BaseException:  # noqa: BLE001 - the tests of the parent must not go on here
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def ended(process: int) -> int:
    """Exit code of a process, or minus the number of the signal that killed it; it is not waited for without end."""
    deadline = time.monotonic() + 120
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
