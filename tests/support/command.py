"""The `datamerge` command in this process: what a subprocess would say, without the seconds that its start takes."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import datamerge.cli


@dataclass(frozen=True)
class Done:
    """What a command has printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def run_command(*arguments: str | Path, **environment: str) -> Done:
    """Run `datamerge ARGUMENTS…` to its end, with these variables besides; the environment is what it was after.

    Raises:
        Exception: what the command does not report, a bug of it.
    """
    out, err = io.StringIO(), io.StringIO()
    argv = ["datamerge", *map(str, arguments)]
    code: object = 0
    with (
        patch.dict(os.environ, environment),
        patch.object(sys, "argv", argv),
        # From which click tells that it is `python -m pytest`.
        patch.object(sys.modules["__main__"], "__package__", "", create=True),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            datamerge.cli.main()
        except SystemExit as end:
            code = end.code
    return Done(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())
