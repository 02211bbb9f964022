"""Reading users' text files, and errors for files that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamerge.runtime import read_lines
from storage_schemas import ConfigError
from tests.support.refusals import refused


def test_blank_lines_and_outer_spaces_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes("a cat\r\n\n  a dög \n".encode())
    assert read_lines(str(file), "class_names", "names") == ["a cat", "a dög"]


def test_a_tilde_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "names.txt").write_text("a cat")
    assert read_lines("~/names.txt", "class_names", "names") == ["a cat"]


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"\xff\xfe", "UTF-8"), (b" \n", "empty"), (None, "No such file")],
)
def test_invalid_files_are_refused(tmp_path: Path, content: bytes | None, found: str) -> None:
    file = tmp_path / "names.txt"
    if content is not None:
        file.write_bytes(content)
    with refused(ConfigError, "class_names", file, found):
        read_lines(str(file), "class_names", "one name a line")
