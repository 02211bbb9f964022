"""What a source of raw images is: a list of samples, and a small reader that workers can carry."""

from __future__ import annotations

import gzip
import hashlib
import heapq
import io
import json
import re
import string
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from datamerge.sources.drawing import Limits
from datamerge.sources.unpack import gunzip
from storage_schemas import CorruptShard, Location, SourceError, read_json, redact
from storage_schemas.access.devices import refuse_devices
from storage_schemas.display import one_line

if TYPE_CHECKING:
    from datamerge.sources.columns import Samples  # pyarrow takes half a second

RawImage = bytes | Image.Image
"""What a reader returns: an encoded image (JPEG, PNG, …), or one that is decoded already."""

LISTING = "source.json.gz"
# Bytes that UTF-8 never has: between names, and in place of what keys do without.
_END, _MARK = b"\xff", b"\xfe"
_SUFFIX = re.compile(rb"\.[A-Za-z0-9]+(?=\n?(\xff|\Z))")
_KEPT = (string.ascii_letters + string.digits + "_-").encode() + _END
_MARKED = bytes(byte if byte in _KEPT else _MARK[0] for byte in range(256))
# Local sources up to this size are hashed whole, which takes seconds.
WHOLE_BYTES = 2**30
# Of others, files whose ends go into a fingerprint. All would mean reading the whole source before any work.
HASHED_FILES = 64
HASHED_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table, arrays of an archive or members of a tar hold what; None stands for the usual ones.

    Attributes:
        image: encoded images, or pixels.
        label: classes.
        group: values that name groups; no groups if None.
    """

    image: str | None = None
    label: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One raw image.

    Attributes:
        key: identifier of letters, digits, `_` and `-`, unique in the source.
        name: how the source calls it: a path, or file and row.
        label: class index, if known.
        group: value of the group column, if one was asked for.
    """

    key: str
    name: str
    label: int | None
    group: str | None = None


class Reader(Protocol):
    """Reads samples; small enough to be sent to every worker."""

    @property
    def is_remote(self) -> bool:
        """Whether a read waits for a network."""
        ...

    @property
    def is_concurrent(self) -> bool:
        """Whether several threads may read at the same time."""
        ...

    def read(self, sample: Sample) -> RawImage:
        """The image; raises OSError or BadImage."""
        ...


@dataclass(frozen=True)
class Source:
    """A listed source.

    Attributes:
        url: where it is.
        kind: `image_folder`, `parquet`, `webdataset`, `arrays` or `python`.
        samples: in the order that defines shards.
        class_names: by label, empty if there are none.
        fingerprint: hash of the listing, to notice that the data changed.
        reader: reads the samples.
        listing: by file, what identifies its content: [bytes, hash or None, …].
        location: the folder of the listed files, if they are files.
        unlabelled: why no sample has a label although something looks like labels; empty if that is not so.
        split: what was chosen where there are splits.
        splits: how many files or images each has.
        left_out: how many files of its folder are not read, by reason.
        blocks: sizes of the runs of samples that the reader reads together, such as row groups; None where every
            sample is read by itself.
        drawn_from: how many samples there were, where some were drawn.
    """

    url: str
    kind: str
    samples: Samples
    class_names: Sequence[str]
    fingerprint: str
    reader: Reader
    listing: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    location: Location | None = None
    unlabelled: str = ""
    split: str | None = None
    splits: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    blocks: npt.NDArray[np.int64] | None = None
    drawn_from: int | None = None

    def __repr__(self) -> str:
        classes = (f"{len(self.class_names)} classes",) if self.class_names else ()
        return one_line(self, redact(self.url), self.kind, f"{len(self.samples)} samples", *classes)

    @property
    def why(self) -> str:
        """Why no sample has a label, in brackets, for messages of what needs labels; mostly empty."""
        return f" ({self.unlabelled})" if self.unlabelled else ""

    def limited(self, limits: Limits) -> Source:
        """Some of the samples."""
        chosen, total = limits.of(len(self.samples)), len(self.samples)
        if chosen is None:
            return self
        return replace(self.take(chosen), drawn_from=total if limits.drawn is not None else None)

    def take(self, indices: npt.NDArray[np.int64]) -> Source:
        """The samples at these places, which have to increase."""
        blocks = self.blocks
        if blocks is not None:
            taken = np.bincount(np.searchsorted(np.cumsum(blocks), indices, side="right"), minlength=1)
            blocks = taken[taken > 0]
        return replace(self, samples=self.samples.take(indices), blocks=blocks)

    def relabelled(self, rows: Mapping[int, int], names: Sequence[str]) -> Source:
        """The same samples with other numbers for their labels, whose names are `names`."""
        return replace(self, samples=self.samples.relabelled(rows), class_names=names)

    def listing_bytes(self) -> bytes:
        """The listing as a file of the artifact, to say later what has changed; equal listings give equal bytes."""
        listing = self.listing
        if isinstance(listing, InPieces):  # sorted
            return _gzip(piece.encode() for piece in listing.json())
        return gzip.compress(json.dumps(dict(listing), sort_keys=True).encode(), mtime=0)

    def changes(self, earlier: bytes) -> list[str]:
        """How the files differ from an earlier `listing_bytes`, a line each."""
        now = {name: list(facts) for name, facts in self.listing.items()}
        try:
            before = {name: [size, *rest] for name, (size, *rest) in read_json(gunzip(earlier)).items()}
        except (ValueError, TypeError, AttributeError, OSError, EOFError) as error:
            raise SourceError(f"{LISTING}: expected the listing of an earlier source, found {error}") from None
        lines = [f"{name} is gone" for name in sorted(before.keys() - now.keys())]
        lines += [f"{name} is new" for name in sorted(now.keys() - before.keys())]
        for name in sorted(before.keys() & now.keys()):
            old, new = before[name], now[name]
            if old[0] != new[0]:
                lines.append(f"{name} had {old[0]} bytes, has {new[0]}")
            elif old != new:
                lines.append(f"{name} has other content")
        return lines

    def written_since(self, when: datetime) -> list[str]:
        """Local files that were written later than `when` and whose content the listing does not tell."""
        location = self.location
        if location is None or not location.is_local:
            return []
        if _is_small(location, [facts[0] for _, facts in self.listing.items()]):
            return []  # hashed whole
        return [name for name in self.listing if location.fs.modified(location.path(name)) > when]


def check_listed(location: Location, name: str, kind: str = "other") -> None:
    """Refuse a file that could not be read, or not be noted.

    Args:
        location: that has the file.
        name: of the file.
        kind: what the file system calls it; `other` is a local link, or no file at all.

    Raises:
        SourceError: a device or a pipe, whose reading need not end; a name that no manifest could hold.
    """
    try:
        name.encode()
        if kind == "other" and location.is_local:
            refuse_devices(location.path(name))
    except UnicodeEncodeError:
        raise SourceError(f"{location.url}: expected file names in UTF-8, found {name!a}; rename it") from None
    except CorruptShard as error:
        raise SourceError(f"{error}; remove it") from None


def make_listing(location: Location, files: Sequence[tuple[str, int]]) -> dict[str, list[Any]]:
    """Size of every file, and its sha256: of all of it in a local source of up to `WHOLE_BYTES`.

    In others it is the sha256 of the first and the last 64 KiB, for a fixed choice of up to `HASHED_FILES` files that
    depends on their names alone.
    """
    hashes = hash_contents(location, [name for name, _ in files], [size for _, size in files])
    return {name: [size, hashes.get(place)] for place, (name, size) in enumerate(files)}


def hash_contents(
    location: Location, names: Iterable[str], sizes: Sequence[int] | npt.NDArray[np.int64]
) -> dict[int, str]:
    """The hashes of `make_listing` by the file's place."""
    if _is_small(location, sizes):
        return {place: hashlib.sha256(location.read(name)).hexdigest() for place, name in enumerate(names)}
    ranked = ((hashlib.sha256(name.encode()).digest(), place, name) for place, name in enumerate(names))
    chosen = heapq.nsmallest(HASHED_FILES, ranked)
    return {place: _content_hash(location, name, int(sizes[place])) for _, place, name in chosen}


def _is_small(location: Location, sizes: Sequence[int] | npt.NDArray[np.int64]) -> bool:
    return location.is_local and int(np.sum(sizes, dtype=np.int64)) <= WHOLE_BYTES


def _content_hash(location: Location, name: str, size: int) -> str:
    digest = hashlib.sha256(location.read(name, 0, min(size, HASHED_BYTES)) if size else b"")
    if size > HASHED_BYTES:
        digest.update(location.read(name, max(HASHED_BYTES, size - HASHED_BYTES), size))
    return digest.hexdigest()


@runtime_checkable
class InPieces(Protocol):
    """Something that is too long to be written as JSON in one go."""

    def json(self) -> Iterator[str]:
        """What `json.dumps` would write of it."""
        ...


@dataclass(frozen=True)
class JsonList:
    """A list that comes in parts, none of which is empty."""

    parts: Iterable[Sequence[Any]]

    def json(self) -> Iterator[str]:
        yield "["
        for number, part in enumerate(self.parts):
            yield ", " * (number > 0) + json.dumps(part)[1:-1]
        yield "]"


@dataclass(frozen=True)
class JsonTexts:
    """A list whose items are JSON already, in parts, none of which is empty."""

    parts: Iterable[Sequence[str]]

    def json(self) -> Iterator[str]:
        yield "["
        for number, part in enumerate(self.parts):
            yield ", " * (number > 0) + ", ".join(part)
        yield "]"


def fingerprint(entries: Sequence[Any]) -> str:
    """Hash of the JSON of a list, of which some entries may be `InPieces`."""
    digest = hashlib.sha256(b"[")
    for number, entry in enumerate(entries):
        digest.update(b", " * (number > 0))
        for piece in entry.json() if isinstance(entry, InPieces) else (json.dumps(entry),):
            digest.update(piece.encode())
    digest.update(b"]")
    return digest.hexdigest()


def _gzip(pieces: Iterable[bytes]) -> bytes:
    """As `gzip.compress` with no time writes all pieces at once."""
    packed, packer = io.BytesIO(), zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed.write(gzip.compress(b"", mtime=0)[:10])
    checksum = size = 0
    for piece in pieces:
        packed.write(packer.compress(piece))
        checksum, size = zlib.crc32(piece, checksum), size + len(piece)
    packed.write(packer.flush() + struct.pack("<2L", checksum, size & 0xFFFFFFFF))
    return packed.getvalue()


def make_keys(names: Sequence[str]) -> list[str]:
    """Keys for names: the path without its extension, other characters replaced, made unique where they clash.

    A key depends on its name and on the names it clashes with, not on the position in the list.
    """
    plain = plain_keys(names)
    times = Counter(plain)
    return [key if times[key] == 1 else f"{key}{clash_suffix(name)}" for key, name in zip(plain, names, strict=True)]


def plain_keys(names: Sequence[str]) -> list[str]:
    """Names without their extensions, other characters than those of keys replaced; these may clash.

    A run of these becomes one `_`. All names are worked on as one text: a call a name would take three times as long.
    """
    if not names:
        return []
    text = _SUFFIX.sub(b"", _END.join([name.encode(errors="surrogatepass") for name in names]))
    text = text.translate(_MARKED)
    while _MARK * 2 in text:
        text = text.replace(_MARK * 2, _MARK)
    return [key or "_" for key in text.replace(_MARK, b"_").decode("latin-1").split(_END.decode("latin-1"))]


def clash_suffix(name: str) -> str:
    """What tells a key from that of another name."""
    return f"-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def as_text(value: object) -> str:
    """A value from somebody's JSON, whose strings may hold what no UTF-8 can say, as text."""
    return str(value).encode(errors="backslashreplace").decode()
