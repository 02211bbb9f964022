"""The `datamerge` command: quick help, and errors as one line and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import datamerge as dm
from tests.support.command import run_command

COMMANDS = (
    "merge",
    "train",
    "evaluate",
    "inspect",
    "verify",
    "preview",
    "convert",
    "combine",
    "diff",
    "export",
    "export-encoder",
    "demo",
)


def test_help_lists_every_command() -> None:
    done = run_command("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout
    assert done.stderr == ""
    assert run_command("-h").stdout == done.stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = ["torch", "ray", "zarr", "pydantic", "numpy", "PIL", "pyarrow", "fsspec", "rich", "storage_schemas"]
    code = (
        "import sys, datamerge.cli\n"
        "sys.argv = ['datamerge', '--help']\n"
        "try:\n    datamerge.cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('IMPORTED', [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("IMPORTED []")


def test_inspect_imports_no_torch(tmp_path: Path) -> None:
    """`inspect` works where no extra is installed."""
    code = (
        "import sys, datamerge.cli\n"
        f"sys.argv = ['datamerge', 'inspect', {str(tmp_path)!r}]\n"
        "try:\n    datamerge.cli.main()\nexcept SystemExit as end:\n    print('EXIT', end.code)\n"
        "print('IMPORTED', [name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["EXIT 2", "IMPORTED []"]


def test_version_is_that_of_the_package() -> None:
    done = run_command("--version")
    assert done.returncode == 0
    assert done.stdout.strip() == f"datamerge, version {dm.__version__}"


@pytest.mark.parametrize("arguments", [("mrege",), ("--surprise",), ("inspect",), ("inspect", "a", "--surprise")])
def test_a_malformed_command_line_exits_with_2(arguments: tuple[str, ...]) -> None:
    done = run_command(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Error: " in done.stderr


def test_the_error_for_a_misspelt_command_suggests_the_nearest() -> None:
    assert "'merge'" in run_command("mrege").stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_commands_and_imports_none(shell: str) -> None:
    environment = {
        "_DATAMERGE_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": "datamerge re",
        "COMP_CWORD": "1" if shell != "fish" else "re",
    }
    code = (
        "import os, sys, datamerge.cli\n"
        "sys.argv = ['datamerge']\n"
        "try:\n    datamerge.cli.cli.main(prog_name='datamerge')\nexcept SystemExit:\n    pass\n"
        "print('IMPORTED', [name for name in ('torch', 'datamerge.tools') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert "remerge" in done.stdout
    assert "merge_service" not in done.stdout
    assert done.stdout.rstrip().endswith("IMPORTED []")


@pytest.mark.parametrize("options", [("--verbose", "inspect"), ("inspect", "--verbose"), ("inspect", "-v")])
def test_verbose_shows_where_an_error_came_from(tmp_path: Path, options: tuple[str, str]) -> None:
    usual = run_command("inspect", tmp_path)
    verbose = run_command(*options, tmp_path, DATAMERGE_VERBOSE="")
    assert usual.returncode == verbose.returncode == 2
    assert "Traceback" not in usual.stderr
    assert "Traceback" in verbose.stderr
    assert verbose.stderr.endswith(usual.stderr)


def test_running_without_a_command_shows_help() -> None:
    done = run_command()
    assert done.returncode == 2
    assert "merge" in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["inspect", "verify", "preview"])
@pytest.mark.parametrize("kind", ["missing", "empty", "file", "unknown protocol"])
def test_a_missing_artifact_is_a_one_line_error(tmp_path: Path, command: str, kind: str) -> None:
    place = tmp_path / "x"
    if kind == "empty":
        place.mkdir()
    if kind == "file":
        place.write_text("text")
    done = run_command(command, "nosuch://x" if kind == "unknown protocol" else str(place))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""


def test_a_folder_named_like_a_setting_is_not_mistaken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that begins with `RUN: ` would blame the wrong argument."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    done = run_command("train", "run", "new", "--steps", "1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: run: ")
    wrong = run_command("train", "art", "run", "--steps", "0")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --steps: ")


def test_a_manifest_of_a_newer_version_is_a_one_line_error_with_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 99}')
    done = run_command("inspect", str(tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "schema_version 99" in done.stderr


def test_an_error_is_one_line_even_if_names_in_it_have_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('"a\\nb\\u001b[31m" = 1\n')
    done = run_command("train", "artifact", "run", "--config", str(tmp_path / "settings.toml"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "\x1b" not in done.stderr
    assert "a\\nb" in done.stderr
