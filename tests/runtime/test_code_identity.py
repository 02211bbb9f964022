"""The hash of the user's code: which changes of files alter it and which do not."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from datamerge.runtime.code_identity import code_sha256

MODULES = {
    "own_code.py": "import own_helper, math, numpy\nfrom own_pack.inner import GAIN\ndef make():\n    return GAIN\n",
    "own_helper.py": "X = 1\n",
    "own_late.py": "Y = 1\n",
    "own_pack/__init__.py": "",
    "own_pack/inner.py": "from . import deep\ndef late():\n    import own_late\nGAIN = deep.GAIN\n",
    "own_pack/deep.py": "GAIN = 1\n",
    "own_pack/unused.py": "Z = 1\n",
    "unused.py": "Z = 1\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def _hash() -> str | None:
    """The hash that a new process would compute."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("own_code", "own_helper", "own_pack")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    importlib.import_module("own_code")
    return code_sha256("own_code")


@pytest.mark.parametrize(
    ("file", "text", "changes"),
    [
        ("own_code.py", MODULES["own_code.py"].replace("return GAIN", "return 2 * GAIN"), True),
        ("own_helper.py", "X = 2\n", True),
        ("own_late.py", "Y = 2\n", True),
        ("own_pack/__init__.py", "A = 0\n", True),
        ("own_pack/deep.py", "GAIN = 2\n", True),
        ("own_code.py", "# a comment\n" + MODULES["own_code.py"].replace("GAIN\n", "GAIN  # another\n\n"), False),
        ("own_pack/unused.py", "Z = 2\n", False),
        ("unused.py", "Z = 2\n", False),
        ("numpy.py", "", False),
    ],
)
def test_only_code_that_is_used_changes_the_hash(folder: Path, file: str, text: str, changes: bool) -> None:
    before = _hash()
    assert before == _hash()
    if file == "numpy.py":  # the installed one is in sys.modules by now
        sys.path.append(sys.path.pop(0))
    (folder / file).write_text(text)
    assert (_hash() != before) is changes


def test_the_hash_is_that_of_the_loaded_code(folder: Path) -> None:
    before = _hash()
    (folder / "own_code.py").write_text("def make():\n    return 7\n")
    assert code_sha256("own_code") == before
    importlib.reload(sys.modules["own_code"])
    assert code_sha256("own_code") != before


def test_our_own_and_built_in_modules_have_no_hash() -> None:
    assert code_sha256("datamerge.demo.digits") is None
    assert code_sha256("sys") is None
    assert code_sha256("no_such_module") is None
