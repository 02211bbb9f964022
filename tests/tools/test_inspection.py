"""`datamerge inspect | preview | verify` as commands."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner
from PIL import Image

from datamerge.tools.inspection import inspect, preview
from storage_schemas import open_artifact
from storage_schemas.card.contact_sheet import GAP, HEADER, TILE
from storage_schemas.card.summary import summarise
from tests.support.artifacts import build_layout, write
from tests.support.command import run_command


def test_inspect_prints_a_table_or_json(tmp_path: Path) -> None:
    write(tmp_path / "a", build_layout("zarr"), (1,))
    table = CliRunner().invoke(inspect, [str(tmp_path / "a")], catch_exceptions=False)
    assert "6 of 7 planned" in table.output
    assert "photos/1.png: " in table.output
    as_json = CliRunner().invoke(inspect, [str(tmp_path / "a"), "--json"], catch_exceptions=False)
    assert json.loads(as_json.output) == json.loads(json.dumps(summarise(open_artifact(tmp_path / "a"))))


def test_preview_writes_a_picture(tmp_path: Path) -> None:
    write(tmp_path / "a", build_layout("webdataset"))
    arguments = [str(tmp_path / "a"), "-o", str(tmp_path / "p.png"), "--key", "k1", "--key", "k2"]
    CliRunner().invoke(preview, arguments, catch_exceptions=False)
    with Image.open(tmp_path / "p.png") as image:
        assert image.height == HEADER + 2 * (TILE + HEADER + GAP) + GAP


def test_verify_shows_progress_unless_quiet(tmp_path: Path) -> None:
    write(tmp_path / "a", build_layout("zarr"))
    verify = ["verify", str(tmp_path / "a")]
    assert "verify" in _on_terminal(*verify)
    assert _on_terminal("--quiet", *verify) == ""
    logged = run_command(*verify)
    assert logged.returncode == 0
    assert " 3/3 " in logged.stderr
    assert logged.stdout


def _on_terminal(*arguments: str) -> str:
    """The stderr of a command when that is a terminal."""
    reader, terminal = pty.openpty()
    subprocess.run(
        [sys.executable, "-m", "datamerge", *arguments], stdout=subprocess.DEVNULL, stderr=terminal, check=True
    )
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(reader, 4096):
            shown += part
    except OSError:  # Linux raises it when the other end is closed
        pass
    os.close(reader)
    return shown.decode()
