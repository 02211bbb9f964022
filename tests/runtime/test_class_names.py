"""Files of class names in the formats that are in use."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamerge.runtime.class_names import plain_name, read_class_names
from storage_schemas import ConfigError
from tests.support.refusals import refused

NAMES = ["tench, Tinca tinca", "great white shark", "crane"]
FORMS: dict[str, str | bytes] = {
    "lines": "\n".join(NAMES),
    "CRLF, spaces, an end": "  \r\n".join([*NAMES, ""]) + "\r\n",
    "BOM": b"\xef\xbb\xbf" + "\n".join(NAMES).encode(),
    "numbered": "\n".join(f"{place}: {name}" for place, name in enumerate(NAMES)),
    "numbered with commas": "\n".join(f"{place},{name}" for place, name in enumerate(NAMES)),
    "numbered from 1": "\n".join(f"{place + 1} {name}" for place, name in enumerate(NAMES)),
    "numbered in another order": "\n".join(f"{place}\t{NAMES[place]}" for place in (2, 0, 1)),
    "synsets": "\n".join(f"n0144076{place} {name}" for place, name in enumerate(NAMES)),
    "quotes": "\n".join(f'"{name}"' for name in NAMES),
    "JSON list": '["tench, Tinca tinca", "great white shark", "crane"]',
    "JSON by index": '{"2": "crane", "0": "tench, Tinca tinca", "1": "great white shark"}',
    "JSON by name": '{"crane": 2, "tench, Tinca tinca": 0, "great white shark": 1}',
    "JSON of torchvision": '{"0": ["n", "tench, Tinca tinca"], "1": ["n", "great white shark"], "2": ["n", "crane"]}',
    "JSON of Hugging Face": '{"id2label": {"0": "tench, Tinca tinca", "1": "great white shark", "2": "crane"}}',
    "Python": "{0: 'tench, Tinca tinca',\n 1: 'great white shark',\n 2: 'crane'}",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path: Path, form: str) -> None:
    text = FORMS[form]
    (tmp_path / "names.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_class_names(str(tmp_path / "names.txt")) == NAMES


@pytest.mark.parametrize("name", ["101 dalmatians", "2CV", "7-Up\n8-Up", "[sic]\nother", "0: a\n2: b"])
def test_numbers_in_names_are_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / "names.txt").write_text(name)
    assert read_class_names(str(tmp_path / "names.txt")) == name.split("\n")


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"cat\n\ndog\n", ("line 2",)),
        (b"\n\ncat\n", ("line 1",)),
        (b"", ("empty",)),
        (b"\n \n", ("empty",)),
        (b"\xff\xfe\x00", ("UTF-8",)),
        (b'{"0": "cat", "2": "dog"}', ("0 to 1",)),
        (b'["cat", 3]', ("3",)),
        (b'["cat", "dog"', ("JSON",)),
        (None, ("No such file",)),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, content: bytes | None, facts: tuple[str, ...]) -> None:
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with refused(ConfigError, "class_names", tmp_path / "names.txt", *facts):
        read_class_names(str(tmp_path / "names.txt"))


def test_names_that_occur_twice_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_text("crane\nant\ncrane\n")
    assert read_class_names(str(tmp_path / "names.txt")) == ["crane", "ant", "crane"]
    assert "1 names" in (errors := capsys.readouterr().err)
    assert "'crane'" in errors


def test_spellings_of_one_name_are_equal() -> None:
    assert len({plain_name(name) for name in ("caf\u00e9 au_lait", "Cafe\u0301 au lait ", "CAF\u00c9 AU  LAIT")}) == 1
