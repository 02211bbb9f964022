"""Map-style data sets from your own code: `python:MODULE:FACTORY`, as `torchvision.datasets` classes are.

The factory takes no arguments and returns an object with `len()` whose items are (image, label): a PIL image or a
uint8 array [H, W] or [H, W, C], and a whole number, or None. Every worker calls the factory once. Labels are taken
from `targets` or `labels` if the data set has them, else by going through it once; class names from `classes`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from datamerge.runtime.factories import NoFactory, find_factory
from datamerge.runtime.messages import warn
from datamerge.sources.images import BadImage
from datamerge.sources.labels import Labels, NoClass, read_labels
from datamerge.sources.sample import HASHED_FILES, Sample, Source, fingerprint, make_keys
from storage_schemas import SourceError


class FactoryReader:
    """Reads items of a data set that is made on first use."""

    is_concurrent = False
    is_remote = False

    def __init__(self, url: str) -> None:
        self._url = url
        self._dataset: Any = None

    def read(self, sample: Sample) -> Image.Image:
        if self._dataset is None:
            self._dataset = _make(self._url)
        return _image(_item(self._dataset, int(sample.name.rpartition("#")[2]))[0])

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url, "_dataset": None}


def open_factory(url: str, limit: int | None) -> Source:
    """List a data set.

    Raises:
        SourceError: no such factory, or what it returns is no map-style data set of images.
    """
    dataset = _make(url)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if not count:
        raise SourceError(f"{url}: expected samples, found an empty data set")
    (labels, names), unlabelled = _labels(dataset, count, url)
    (stem,) = make_keys([url.rpartition(":")[2]])
    samples = [Sample(f"{stem}-{index:08d}", f"{url}#{index}", labels[index]) for index in range(count)]
    # A data set has no files: a fixed choice of its images stands for their content.
    # Cut off, not rounded as for a contact sheet: fingerprints in artifacts depend on the choice.
    chosen = sorted({int(index) for index in np.linspace(0, count - 1, min(count, HASHED_FILES))})
    listing = {f"image {index}": [1, _hash(dataset, index)] for index in chosen}
    identity = fingerprint([len(dataset), labels, listing])
    return Source(url, "python", samples, names, identity, FactoryReader(url), listing, unlabelled=unlabelled)


def _make(url: str) -> Any:
    try:
        factory = find_factory(url)
    except NoFactory as error:
        raise SourceError(f"{url}: {error}") from None
    dataset = factory()
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise SourceError(
            f"{url}: expected a map-style data set of (image, label), found {type(dataset).__name__} without len() "
            "or indexing"
        )
    return dataset


def _item(dataset: Any, index: int) -> tuple[Any, Any]:
    item = dataset[index]
    if not isinstance(item, Sequence) or len(item) < 2:
        raise BadImage(f"expected (image, label), found {type(item).__name__}")
    return item[0], item[1]


def _labels(dataset: Any, count: int, url: str) -> tuple[Labels, str]:
    """Labels and class names, and why there are none: captions and boxes are no labels, and may be none needed."""
    known = next((getattr(dataset, name) for name in ("targets", "labels") if hasattr(dataset, name)), None)
    if known is None or len(known) != len(dataset):
        known = []
        for index in range(count):
            try:
                known.append(_item(dataset, index)[1])
            except BadImage as error:
                raise SourceError(f"{url}: item {index}: {error}") from None
    names = [str(name) for name in getattr(dataset, "classes", ())]
    try:
        return read_labels(list(known[:count]), url, names, "item {}".format), ""
    except NoClass as error:
        why = f"expected whole numbers or names as labels, found {error}"
        warn(f"{url}: no labels are read: {why}")
        return ([None] * count, names), why


def _image(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise BadImage(
            f"expected a PIL image or a uint8 array [H, W] or [H, W, C], found {type(value).__name__} "
            f"{array.dtype} {list(array.shape)}; leave out ToTensor()"
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _hash(dataset: Any, index: int) -> str | None:
    try:
        pixels = np.asarray(_image(_item(dataset, index)[0]))
    except BadImage:
        return None
    return hashlib.sha256(pixels.tobytes()).hexdigest()
