"""The output folder: every finished batch or image is a file, so that an interrupted evaluation continues there.

OUTPUT/report.html, report.md, results.json      all parts evaluated into this folder
OUTPUT/PART/results.json                         pgd, zero-shot, embedding, captions or vqa
OUTPUT/PART/ARM-HASH/identity.json               settings that determine the numbers; compared on every later call
OUTPUT/PART/ARM-HASH/items/NAME.json             one image, question or batch, written whole or not at all
OUTPUT/PART/ARM-HASH/images/NAME.png, NAME.npy   adversarial images
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamerge.runtime import local_path
from storage_schemas import ConfigError, DatamergeError, Location, read_json
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.provenance import changes

IDENTITY = "identity.json"
# Entry of the identity: which pixels an encoder took.
PREPROCESSING = "preprocessing"
# Entries of encoders that are made by the user's code.
CODES = ("encoder_code_sha256", "original_code_sha256")


class ArmFolder:
    """The folder of one arm in one part of the evaluation.

    Args:
        output: the user's output folder.
        part: pgd, zero-shot, embedding, captions or vqa.
        run: the run as the user named it.
        arm: its row in the table.
    """

    def __init__(self, output: str, part: str, run: str, arm: str) -> None:
        readable = re.sub(r"[^A-Za-z0-9_\-]+", "_", arm).strip("_") or "arm"
        name = f"{readable}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"
        self.path = local_path(output, "output") / part / name
        self._location = Location(self.path)

    def claim(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Make the folder the one of these settings, or check that it is.

        Args:
            shared: settings that determine the numbers and are the same for all arms, the rows of one table.
            own: the weights of this arm, and settings that change what is stored but no number.

        Raises:
            ConfigError: this folder, or that of another arm, holds results of other settings; the message names them.
        """
        wanted = json.loads(json.dumps({**shared, **own}))
        for file in sorted(self.path.parent.glob(f"*/{IDENTITY}")):
            # A folder without results fixes no settings.
            if not any(file.parent.glob("items/*.json")):
                continue
            found = _read_stored(file)
            if file.parent == self.path:
                _compare(file.parent, _in_present_words(found, wanted), wanted)
            else:
                _compare(file.parent, *({name: one.get(name) for name in shared} for one in (found, wanted)))
        self._write(IDENTITY, wanted)

    def read(self, name: str) -> dict[str, Any] | None:
        """A finished item, None if there is none."""
        return self._read(f"items/{name}.json")

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Store an item."""
        self._write(f"items/{name}.json", content)

    def write_image(self, name: str, data: bytes) -> None:
        """Store a file below `images/`."""
        write_result(self._location, f"images/{name}", data)

    def image(self, name: str) -> Path:
        """Path of a file below `images/`, which may not exist."""
        return self.path / "images" / name

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.path / name
        return _read_stored(file) if file.is_file() else None

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_result(self._location, name, text.encode() + b"\n")


def check_output(output: str) -> None:
    """Check that results can be written, before hours of attacks.

    Raises:
        ConfigError: a URL, the name of a JSON file, a file is in the way, or a folder where nothing can be written.
    """
    target = local_path(output, "output")
    if target.suffix == ".json":
        raise ConfigError(f"output: expected the name of a folder, found {output!r}; results.json is written into it")
    existing = next(path for path in (target, *target.parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"output: expected a folder, found the file {existing}; choose another `output`")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"output: expected a folder to write in, {existing} allows none; choose another `output`")


def write_result(location: Location, name: str, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        DatamergeError: the disk is full, or the file cannot be written for another reason.
    """
    try:
        location.write(name, data)
    except OSError as error:
        reason = error.strerror or error
        raise DatamergeError(
            f"{location.url}/{name}: cannot write: {reason}; solve that and run the same command again"
        ) from error


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError, whose text names what was found instead, and OSError."""
    content = read_json(file.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}")
    return content


def _read_stored(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except ValueError as error:
        message = f"{file}: expected a JSON object, found {error}; remove it to measure it again"
        raise DatamergeError(message) from None


def _in_present_words(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """An identity of a release before 0.2.0, with the entries that those releases left out."""
    spelt = dict(found)
    for name in CODES:
        if name in wanted and name not in found:
            spelt[name] = wanted[name]
    for name in (PREPROCESSING, f"original_{PREPROCESSING}"):
        if name in wanted and name not in found:
            present = Preprocessing.read(wanted[name], IDENTITY)
            earlier = Preprocessing(shape=present.shape)
            spelt[name] = earlier.record() if present.differences(earlier, normalised=False) else wanted[name]
    return spelt


def _compare(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if different := changes(found, wanted):
        raise ConfigError(
            f"output: {folder} holds results of other settings ({'; '.join(different)}); choose another `output`, "
            "or use the same settings to continue"
        )
