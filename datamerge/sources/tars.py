"""WebDataset tars: local files, globs, braces, any fsspec URL.

A sample consists of the members that share the name before the first dot: KEY.jpg, KEY.cls, KEY.json, … . Tars are
listed once by their headers; readers then fetch single images by byte range.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from json.encoder import encode_basestring_ascii
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datamerge.runtime.class_names import parse_class_names
from datamerge.runtime.messages import first_line, say, warn
from datamerge.sources.columns import NO_LABEL, Samples
from datamerge.sources.images import BadImage
from datamerge.sources.labels import NONE, NoClass, choose_column, shown, warn_of_twins
from datamerge.sources.naming import Members, buffers_of, joined
from datamerge.sources.sample import Columns, JsonTexts, Sample, Source, as_text, fingerprint, make_listing
from datamerge.sources.suffixes import EXTENSIONS, MAGIC_BYTES, PACKED, PACKED_MAGIC, kind_of
from datamerge.sources.tar_headers import BROKEN
from datamerge.sources.tar_samples import LABEL_EXTENSION, TarSamples
from storage_schemas import ConfigError, Location, SourceError

# Characters that stand for themselves in JSON.
_PLAIN = bytes(byte for byte in range(ord(" "), ord("~") + 1) if byte not in b'"\\')
CLASS_NAMES = "classnames.txt"  # one name a line, in the order of labels, as CLIP_benchmark writes it beside tars


class TarReader:
    """Reads images by their byte ranges."""

    is_concurrent = True

    def __init__(self, folder: Location) -> None:
        self._folder = folder

    @property
    def is_remote(self) -> bool:
        return not self._folder.is_local

    def read(self, sample: Sample) -> bytes:
        tar, _, range_ = sample.name.rpartition("#")
        start, _, rest = range_.partition("+")
        size = int(rest.partition(" ")[0])
        data = self._folder.read(tar, int(start), int(start) + size)
        if len(data) != size:
            raise BadImage(f"{tar}: expected {size} bytes at {start}, found {len(data)}: the tar is cut short")
        return data


def open_tars(location: Location, url: str, files: Sequence[tuple[str, int]], columns: Columns) -> Source:
    """List the samples of tars below a location.

    Raises:
        SourceError: a file is not a tar, or no tar has images.
    """
    found = _collected(location, files, columns)
    if not len(found):
        others = found.others
        expected = f"members {columns.image!r}" if columns.image else f"images ({' '.join(EXTENSIONS[:4])} …)"
        inside = f": {shown(f'{count} .{extension}' for extension, count in others.items())}" if others else ""
        inside += "; unpack them, and name the folder of the tars inside" if "tar" in others else ""
        raise SourceError(
            f"{url}: expected tars with {expected}, found none in {found.found} samples of {len(files)}{inside}"
        )
    if found.first_without is not None:
        say(
            f"{url}: {found.found - len(found)} of {found.found} samples have no image and are left out, such as "
            f"{found.first_without}"
        )
    may_label = _say_other_images(found.others, url)
    column, unlabelled = _label_column(found, may_label, columns, url)
    if column is not None and found.is_incomplete(column):
        found = _collected(location, files, columns, column)
    labels, names = np.full(len(found), NO_LABEL, np.int32), list[str]()
    if column is not None:
        try:
            labels, names = _labels(found, column, url)
        except NoClass as error:
            if columns.label is not None:
                where = f"{url}, {column!r}"
                raise SourceError(f"{where}: expected whole numbers or names as labels, found {error}") from None
            unlabelled = f"{column!r} holds no labels of one class: {error}"
            warn(f"{url}: no labels are read: {unlabelled}")
    names = names or _class_names_beside(location, files[0][0], labels)
    samples = Samples(found.naming(), labels, found.groups())
    listing = make_listing(location, files)
    identity = fingerprint([listing, JsonTexts(map(_json, samples.parts()))])
    pa.default_memory_pool().release_unused()  # it holds on to 20 MB of temporary columns
    return Source(url, "webdataset", samples, names, identity, TarReader(location), listing, location, unlabelled)


def _collected(
    location: Location, files: Sequence[tuple[str, int]], columns: Columns, column: str | None = None
) -> TarSamples:
    """Collect the samples of all tars; see `TarSamples`."""
    found = TarSamples(columns, column)
    for name, _ in files:
        with _refused(location, name), location.open(name) as stream:
            found.add(name, stream, location.is_local)
    return found


def _json(samples: Samples) -> list[str]:
    """The JSON of the name, label and group of each sample, all as one text."""
    names = cast(Members, samples.naming).texts(0, len(samples))
    if buffers_of(names)[1].tobytes().translate(None, _PLAIN):
        names = pa.array([encode_basestring_ascii(name)[1:-1] for name in names.to_pylist()], pa.large_string())
    labels = pa.array(samples.labels, mask=samples.labels == NO_LABEL).cast(pa.large_string()).fill_null("null")
    groups = ["null" if group is None else encode_basestring_ascii(group) for group in samples.group_values]
    texts = joined('["', names, '", ', labels, ", ", pa.array(groups, pa.large_string()), "], ")
    return [buffers_of(texts)[1].tobytes()[:-2].decode()]


def _say_other_images(others: Mapping[str, int], url: str) -> list[str]:
    """Report images of other kinds, which are left out; returns the other kinds of members."""
    images = {extension: count for extension, count in others.items() if kind_of(f"x.{extension}") == "image"}
    if images:
        some = shown(f"{count} {extension}" for extension, count in images.items())
        say(f"{url}: {sum(images.values())} other images of the samples are left out: {some}")
    return sorted(others.keys() - images.keys())


@contextmanager
def _refused(location: Location, name: str) -> Iterator[None]:
    """Turn exceptions of tarfile into a SourceError."""
    try:
        yield
    except BROKEN as error:
        head = location.read(name, 0, MAGIC_BYTES)
        packed = next((PACKED[suffix] for magic, suffix in PACKED_MAGIC.items() if head.startswith(magic)), None)
        raise SourceError(
            f"{location.url}/{name}: expected an uncompressed tar: {packed or first_line(error)}"
        ) from None


def _class_names_beside(location: Location, tar: str, labels: npt.NDArray[np.int32]) -> list[str]:
    """Class names from a file beside a tar, or one folder above; empty if they are too few."""
    largest = int(labels.max())
    if location.is_read_only or largest == NO_LABEL:
        return []
    folder = tar.rpartition("/")[0]
    places = [(location, f"{folder}/{CLASS_NAMES}" if folder else CLASS_NAMES)]
    places.append((location, CLASS_NAMES) if folder else (location.split()[0], CLASS_NAMES))
    for place, name in places:
        if not place.exists(name):
            continue
        try:
            text = place.read(name).decode("utf-8-sig")
            names = [as_text(line) for line in parse_class_names(text, f"{place.url}/{name}", "classes")]
        except (UnicodeDecodeError, ConfigError) as error:
            warn(f"{error}; the names are left out")
            return []
        if largest < len(names):
            return names
        warn(f"{place.url}/{name}: expected names of labels up to {largest}, found {len(names)}; they are left out")
    return []


def _label_column(found: TarSamples, others: Collection[str], columns: Columns, url: str) -> tuple[str | None, str]:
    """The member or field of labels, by default `cls` or a usual name, or the reason why there is none.

    Raises:
        SourceError: no sample has the member or field that the user named.
    """
    if columns.label == NONE:
        return None, ""
    if columns.label is not None:
        if not found.has(columns.label):
            raise SourceError(
                f"{found.path(0)}: expected a member or JSON field {columns.label!r} with the label, found none in "
                f"{len(found)} samples; use another `label_column`"
            )
        return columns.label, ""
    if LABEL_EXTENSION in found.members:
        return LABEL_EXTENSION, ""
    names = [name for name in (*found.members, *found.fields) if name != columns.group]
    column, why = choose_column(names, url)
    if column is None and not why:
        why = _no_label_member(found, others, columns)
        say(f"{url}: no labels are read: {why}")
    return column, why


def _labels(found: TarSamples, column: str, url: str) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Labels and class names; errors are those of `read_labels`."""
    where = f"{url}, {column!r}"
    labels, names = found.labels(column, where)
    warn_of_twins(names, where)
    return labels, names


def _no_label_member(found: TarSamples, others: Collection[str], columns: Columns) -> str:
    """Why no member holds labels. Folders and tars are not classes."""
    some = [name for name in (*others, *found.fields) if name != columns.group]
    if some:
        return f"none of the members and fields {shown(some)} is called cls or label; name one as `label_column`"
    return "the tars hold images only; add a member KEY.cls to each, or unpack them into a folder for each class"
