"""Map-style data sets from your own code: `python:MODULE:FACTORY`, as `torchvision.datasets` classes are.

The factory takes no arguments and returns an object with `len()` whose items hold an image and perhaps a label (see
`datamerge.sources.items`). Every worker calls the factory once. Labels are taken from `targets`, `labels` or a column
of labels if the data set has them, else by going through it once; class names from `classes` or `features`. An item
that raises anything is a bad image, as a file cut short is.
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

# Seconds between the tries of an item that fails for a network's reasons.
WAITS = (0.25, 1.0, 5.0)


class FactoryReader:
    """Reads items of a data set that is made on first use."""

    is_concurrent = False
    is_remote = False

    def __init__(self, url: str) -> None:
        self._url = url
        self._dataset: Any = None

    def read(self, sample: Sample) -> RawImage:
        """The image of an item.

        Raises:
            BadImage: whatever the data set raises.
            SourceError: it cannot be made here.
        """
        if self._dataset is None:
            self._dataset = _make(self._url)
        return _read(self._dataset, int(sample.name.rpartition("#")[2]))

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url, "_dataset": None}


def open_factory(url: str, limits: Limits = EVERYTHING, labelled: bool = True) -> Source:
    """List a data set, with its labels or without.

    Raises:
        SourceError: no such factory, or what it returns is no map-style data set of images.
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
    # A data set has no files: a fixed choice of its images stands for their content.
    # Cut off, not rounded as for a contact sheet: fingerprints in artifacts depend on the choice.
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
            "of these"
        )
    if _only_iterates(dataset):
        raise SourceError(
            f"{url}: expected a map-style data set of (image, label), found {kind} without len() or indexing, which "
            "can only be gone through; let the factory return `list(...)` of it, or write it to tars once and name "
            "those"
        )
    return dataset


def _only_iterates(dataset: Any) -> bool:
    """Whether items cannot be had by number; torch's iterable data sets have the methods, which raise."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return True
    return any(base.__name__ == "IterableDataset" for base in type(dataset).__mro__)


def _length(dataset: Any, url: str) -> int:
    try:
        return call(lambda: len(dataset))
    except Failed as error:
        raise SourceError(f"{url}: len() of the data set failed with {error}") from error


def _read(dataset: Any, index: int) -> RawImage:
    """The image of an item, again after failures of a network; raises BadImage for whatever is raised."""
    found = _attempt(lambda: to_raw(parts(dataset[index])[0]))
    if isinstance(found, BadImage):
        raise found
    return found


def _attempt(operation: Callable[[], T]) -> T | BadImage:
    """What code of the user's returns, or a BadImage with the reason why it does not."""
    try:
        return call(lambda: retry(operation, delays=WAITS))
    except Failed as error:
        return error.__cause__ if isinstance(error.__cause__, BadImage) else BadImage(str(error))


def _labels(dataset: Any, items: Sequence[int], total: int, url: str) -> tuple[Labels, str]:
    """Labels and class names, and why there are none: captions and boxes are no labels, and may be none needed."""
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
    """The labels of some items, where the data set tells them without; None where it does not, or fails to."""

    def told(values: Any) -> list[Any] | None:
        if values is None or len(values) != total:
            return None
        first = list(values[: items[-1] + 1])
        return [first[index] for index in items]

    for name in ("targets", "labels"):
        with suppress(Failed):
            if (found := call(lambda name=name: told(getattr(dataset, name, None)))) is not None:  # type: ignore[misc]  # bound now
                return found
    with suppress(Failed):
        return None if column is None else call(lambda: told(dataset[column]))
    return None


def _from_items(dataset: Any, items: Sequence[int], url: str) -> list[Any]:
    """A label an item; None for those that cannot be read, whose number is said.

    Raises:
        SourceError: there are no others.
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
    """The column of labels of a data set that has columns, as those of `datasets`."""
    names = getattr(dataset, "column_names", None)
    return label_key(dict.fromkeys(names)) if isinstance(names, list) else None


def _class_names(dataset: Any, column: str | None) -> list[str]:
    """Class names by index, where the data set tells them."""
    features = getattr(dataset, "features", None)
    told = getattr(features.get(column), "names", None) if isinstance(features, Mapping) else None
    names = getattr(dataset, "classes", None) or told
    return [str(name) for name in names] if isinstance(names, Sequence) and not isinstance(names, str) else []


def _hash(dataset: Any, index: int) -> str | None:
    """What stands for the content of an item; None of one that cannot be read."""

    def content() -> bytes:
        image = to_raw(parts(dataset[index])[0])
        return image if isinstance(image, bytes) else np.asarray(image).tobytes()

    found = _attempt(content)
    return None if isinstance(found, BadImage) else hashlib.sha256(found).hexdigest()
