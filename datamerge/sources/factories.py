"""Map-style data sets from user code, such as `torchvision.datasets`: `python:MODULE:FACTORY`.

The factory takes no arguments and returns an object with `len()` whose items hold an image and perhaps a label (see
`datamerge.sources.items`). Every worker calls the factory once. Labels come from `targets`, `labels` or a column of
labels if the data set has one, else from reading all items once; class names come from `classes` or `features`. An
item that raises an exception is a bad image, like a truncated file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from datamerge.runtime.factories import Failed, NoFactory, call, find_factory
from datamerge.runtime.messages import warn
from datamerge.sources.columns import Samples, label_column
from datamerge.sources.drawing import EVERYTHING, Limits
from datamerge.sources.images import BadImage
from datamerge.sources.items import label_key, parts, to_raw
from datamerge.sources.labels import Labels, NoClass, read_labels
from datamerge.sources.naming import Rows
from datamerge.sources.sample import HASHED_FILES, RawImage, Sample, Source, fingerprint, make_keys
from storage_schemas import SourceError, shortened
from storage_schemas.access.retries import retry

T = TypeVar("T")

# Seconds between tries to read an item after a network error.
WAITS = (0.25, 1.0, 5.0)


class FactoryReader:
    """Reads items of a data set, which is made on first use."""

    is_concurrent = False
    is_remote = False

    def __init__(self, url: str) -> None:
        self._url = url
        self._dataset: Any = None

    def read(self, sample: Sample) -> RawImage:
        """The image of an item.

        Raises:
            BadImage: the data set raises any exception for it.
            SourceError: the factory fails on this machine.
        """
        if self._dataset is None:
            self._dataset = _make(self._url)
        return _read(self._dataset, int(sample.name.rpartition("#")[2]))

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url, "_dataset": None}


def open_factory(url: str, limits: Limits = EVERYTHING, labelled: bool = True) -> Source:
    """List the items of a data set, with or without labels.

    Raises:
        SourceError: there is no such factory, or its result is not a map-style data set of images.
    """
    dataset = _make(url)
    total = _length(dataset, url)
    if not total:
        raise SourceError(f"{url}: expected samples, found an empty data set")
    chosen = limits.of(total)
    items: Sequence[int] = range(total) if chosen is None else chosen.tolist()
    count = len(items)
    labels: list[int | None] = [None] * count
    names: list[str] = []
    unlabelled = ""
    if labelled:
        (labels, names), unlabelled = _labels(dataset, items, total, url)
    (stem,) = make_keys([url.rpartition(":")[2]])
    rows = Rows.of([url], [stem], [total])
    samples = Samples(rows if chosen is None else rows.take(chosen), label_column(labels))
    # A data set has no files, so the fingerprint covers a fixed choice of its images. Positions are truncated, not
    # rounded: fingerprints in artifacts depend on the choice.
    hashed = sorted({items[int(place)] for place in np.linspace(0, count - 1, min(count, HASHED_FILES))})
    listing = {f"image {index}": [1, _hash(dataset, index)] for index in hashed}
    identity = fingerprint([total, samples.json_of_labels(), listing])
    source = Source(url, "python", samples, names, identity, FactoryReader(url), listing, unlabelled=unlabelled)
    return replace(source, drawn_from=None if chosen is None or limits.drawn is None else total)


def _make(url: str) -> Any:
    try:
        dataset = call(find_factory(url))
    except NoFactory as error:
        raise SourceError(f"{url}: {error}") from None
    except Failed as error:
        raise SourceError(f"{url}: the factory failed with {error}") from error
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        raise SourceError(
            f"{url}: expected a data set, found a {kind} with {shortened(list(dataset))}; let the factory return one "
            "of its values"
        )
    if _only_iterates(dataset):
        raise SourceError(
            f"{url}: expected a map-style data set of (image, label), found {kind} without len() or indexing, which "
            "can only be iterated; let the factory return `list(...)` of it, or write it to tars once and name "
            "those"
        )
    return dataset


def _only_iterates(dataset: Any) -> bool:
    """Whether a data set has no random access; torch's iterable data sets have the methods, but they raise."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return True
    return any(base.__name__ == "IterableDataset" for base in type(dataset).__mro__)


def _length(dataset: Any, url: str) -> int:
    try:
        return call(lambda: len(dataset))
    except Failed as error:
        raise SourceError(f"{url}: len() of the data set failed with {error}") from error


def _read(dataset: Any, index: int) -> RawImage:
    """The image of an item, with retries after network errors; raises BadImage for any exception."""
    found = _attempt(lambda: to_raw(parts(dataset[index])[0]))
    if isinstance(found, BadImage):
        raise found
    return found


def _attempt(operation: Callable[[], T]) -> T | BadImage:
    """Call user code; returns its result, or a BadImage with the reason of its failure."""
    try:
        return call(lambda: retry(operation, delays=WAITS))
    except Failed as error:
        return error.__cause__ if isinstance(error.__cause__, BadImage) else BadImage(str(error))


def _labels(dataset: Any, items: Sequence[int], total: int, url: str) -> tuple[Labels, str]:
    """Labels and class names, or the reason why there are none: captions and boxes are no labels."""
    column = _column(dataset)
    known = _known(dataset, items, total, column)
    if known is None:
        known = _from_items(dataset, items, url)
    names = _class_names(dataset, column)
    try:
        return read_labels(known, url, names, lambda place: f"item {items[place]}"), ""
    except NoClass as error:
        why = f"expected whole numbers or names as labels, found {error}"
        warn(f"{url}: no labels are read: {why}")
        return ([None] * len(items), names), why


def _known(dataset: Any, items: Sequence[int], total: int, column: str | None) -> list[Any] | None:
    """The labels of some items from an attribute or column of the data set; None if it has none, or fails."""

    def chosen(values: Any) -> list[Any] | None:
        if values is None or len(values) != total:
            return None
        first = list(values[: items[-1] + 1])
        return [first[index] for index in items]

    for name in ("targets", "labels"):
        with suppress(Failed):
            if (found := call(lambda name=name: chosen(getattr(dataset, name, None)))) is not None:  # type: ignore[misc]  # bound now
                return found
    with suppress(Failed):
        return None if column is None else call(lambda: chosen(dataset[column]))
    return None


def _from_items(dataset: Any, items: Sequence[int], url: str) -> list[Any]:
    """One label per item; None for items that cannot be read, which a warning counts.

    Raises:
        SourceError: no item can be read.
    """
    found = [_attempt(lambda index=index: parts(dataset[index])[1]) for index in items]  # type: ignore[misc]  # bound now
    failed = [place for place, label in enumerate(found) if isinstance(label, BadImage)]
    if len(failed) == len(items):
        raise SourceError(f"{url}: none of {len(items)} items can be read; item {items[0]}: {found[0]}")
    if failed:
        first = failed[0]
        warn(f"{url}: {len(failed)} of {len(items)} items cannot be read; item {items[first]}: {found[first]}")
    return [None if isinstance(label, BadImage) else label for label in found]


def _column(dataset: Any) -> str | None:
    """The column of labels of a data set with columns, such as one of `datasets`."""
    names = getattr(dataset, "column_names", None)
    return label_key(dict.fromkeys(names)) if isinstance(names, list) else None


def _class_names(dataset: Any, column: str | None) -> list[str]:
    """Class names by index, if the data set has them."""
    features = getattr(dataset, "features", None)
    of_column = getattr(features.get(column), "names", None) if isinstance(features, Mapping) else None
    names = getattr(dataset, "classes", None) or of_column
    return [str(name) for name in names] if isinstance(names, Sequence) and not isinstance(names, str) else []


def _hash(dataset: Any, index: int) -> str | None:
    """Hash of the content of an item; None if it cannot be read."""

    def content() -> bytes:
        image = to_raw(parts(dataset[index])[0])
        return image if isinstance(image, bytes) else np.asarray(image).tobytes()

    found = _attempt(content)
    return None if isinstance(found, BadImage) else hashlib.sha256(found).hexdigest()
