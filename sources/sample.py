"""What a source of raw images is: a list of samples, and a small reader that workers can carry."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Sample:
    """One raw image.

    Attributes:
        key: identifier of letters, digits, `_` and `-`, unique in the source.
        name: how the source calls it: a path, or file and row.
        label: class index, if known.
    """

    key: str
    name: str
    label: int | None


class Reader(Protocol):
    """Reads samples; small enough to be sent to every worker."""

    def read(self, sample: Sample) -> bytes:
        """The encoded image (JPEG, PNG, …); raises OSError."""
        ...


@dataclass(frozen=True)
class Source:
    """A listed source.

    Attributes:
        url: where it is.
        kind: `image_folder` or `parquet`.
        samples: in the order that defines shards.
        class_names: by label, empty if there are none.
        fingerprint: hash of names and sizes, to notice that the data changed.
        reader: reads the samples.
    """

    url: str
    kind: str
    samples: Sequence[Sample]
    class_names: Sequence[str]
    fingerprint: str
    reader: Reader

    def limited(self, limit: int | None) -> Source:
        """The first `limit` samples."""
        return self if limit is None else replace(self, samples=self.samples[:limit])


def fingerprint(entries: Sequence[Any]) -> str:
    """Hash of a JSON-like listing."""
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def make_keys(names: Sequence[str]) -> list[str]:
    """Keys for names: the path without its extension, other characters replaced, made unique where they clash.

    A key depends on its name and on the names it clashes with, not on the position in the list.
    """
    plain = [re.sub(r"[^A-Za-z0-9_\-]+", "_", re.sub(r"\.[A-Za-z0-9]+$", "", name)) or "_" for name in names]
    times = Counter(plain)
    return [
        key if times[key] == 1 else f"{key}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        for key, name in zip(plain, names, strict=True)
    ]
