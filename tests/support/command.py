"""The `datamerge` command in this process: the output of a subprocess, without the seconds that its start takes."""

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
    """Output and exit code of a command."""

    returncode: int
    stdout: str
    stderr: str


def run_command(*arguments: str | Path, **environment: str) -> Done:
    """Run `datamerge ARGUMENTS…` with additional environment variables; the environment is restored afterwards.

    Raises:
        Exception: an error that the command does not report, which is a bug.
    """
    out, err = io.StringIO(), io.StringIO()
    argv = ["datamerge", *map(str, arguments)]
    code: object = 0
    with (
        patch.dict(os.environ, environment),
        patch.object(sys, "argv", argv),
        # click would recognise `python -m pytest` by it.
        patch.object(sys.modules["__main__"], "__package__", "", create=True),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            datamerge.cli.main()
        except SystemExit as end:
            code = end.code
    return Done(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())
