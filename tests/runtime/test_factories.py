"""`python:MODULE:FACTORY`: installed modules come before the working directory; messages name the file found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from datamerge.demo.digits import digit_encoder
from datamerge.encoders import load_encoder
from datamerge.runtime.factories import NoFactory, find_factory


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    return tmp_path


def test_the_working_directory_is_searched_last(folder: Path) -> None:
    (folder / "own_factory_module.py").write_text("def make():\n    return 'own'\n")
    (folder / "json.py").write_text("raise RuntimeError\n")
    before = list(sys.path)
    assert find_factory("python:own_factory_module:make")() == "own"
    assert sys.path == [*before, str(folder)]
    assert find_factory("json:loads")("1") == 1  # type: ignore[call-arg]
    assert sys.path == [*before, str(folder)]


def test_specs_of_earlier_releases_find_moved_modules(folder: Path) -> None:
    """Provenances of artifacts and runs name them; a user's own module `demo` does not get in the way."""
    (folder / "demo.py").write_text("raise RuntimeError\n")
    assert find_factory("demo.digits:digit_encoder") is digit_encoder
    encoder = load_encoder("python:demo.digits:digit_encoder")
    assert encoder.spec == "python:demo.digits:digit_encoder"
    assert encoder.sha256 == load_encoder("python:datamerge.demo.digits:digit_encoder").sha256


@pytest.mark.parametrize(
    ("spec", "facts"),
    [
        ("", ["python:MODULE:FACTORY"]),
        ("json", ["python:MODULE:FACTORY"]),
        ("json:", ["python:MODULE:FACTORY"]),
        (":loads", ["python:MODULE:FACTORY"]),
        (".json:loads", ["python:MODULE:FACTORY"]),
        ("json:loads:more", ["python:MODULE:FACTORY"]),
        ("no_such_package.part:x", [" no_such_package,", "{folder}"]),
        ("json.no_such_part:x", [" json.no_such_part,", "{folder}"]),
        ("json:nobody", [" nobody ", "json/__init__.py"]),
        ("json:__name__", [" __name__ ", "json/__init__.py"]),
        ("needs_a_package:make", ["needs_a_package ", "'no_such_package'"]),
        ("needs_a_name:make", ["needs_a_name ", "'nothing'"]),
    ],
)
def test_invalid_specs_say_why(folder: Path, spec: str, facts: list[str]) -> None:
    (folder / "needs_a_package.py").write_text("import no_such_package\n")
    (folder / "needs_a_name.py").write_text("from json import nothing\n")
    with pytest.raises(NoFactory) as caught:
        find_factory(spec)
    assert [fact for fact in facts if fact.format(folder=folder) not in str(caught.value)] == []
