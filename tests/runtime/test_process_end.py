"""Ending a process in which Ray or a process group has threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# A destructor that fails, as a library's may: exit() runs it, and os._exit() does not.
DESTRUCTOR = "import ctypes; libc = ctypes.CDLL(None); libc.__cxa_atexit(libc.abort, None, None)\n"
COMMAND = """
import atexit, sys, datamerge.cli
atexit.register(print, "a handler of Python's")
sys.argv = ["datamerge", *sys.argv[1:]]
datamerge.cli.run()
"""


def _run(code: str, *arguments: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_native_destructors_do_not_run_in_one_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _run(DESTRUCTOR + COMMAND, "--version").returncode == 0


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["inspect", "/missing"], 2), (["merg"], 2)])
def test_native_destructors_do_not_run_after_ray(arguments: list[str], code: int) -> None:
    without = _run(DESTRUCTOR + COMMAND, *arguments)
    assert without.returncode == -6  # without Ray they do run
    done = _run(DESTRUCTOR + "import ray\n" + COMMAND, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (code, without.stdout, without.stderr)
    assert done.stdout.endswith("a handler of Python's\n")


def test_output_that_cannot_be_written_is_a_failure() -> None:
    with Path("/dev/full").open("w") as full:
        assert _run("import ray\n" + COMMAND, "--version", stdout=full.fileno()).returncode == 1
