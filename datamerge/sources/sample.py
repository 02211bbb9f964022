"""A source of raw images: a list of samples, and a small reader that is sent to workers."""

from __future__ import annotations

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
"""An encoded image (JPEG, PNG, …) or a decoded one, as readers return it."""

LISTING = "source.json.gz"
GZIP_HEADER = bytes.fromhex("1f8b0800000000000203")  # no name, no time, written on Unix
# Bytes that never occur in UTF-8: the separator of names, and the replacement of characters not allowed in keys.
END, _MARK = b"\xff", b"\xfe"
_SUFFIX = re.compile(rb"\.[A-Za-z0-9]+(?=\n?(\xff|\Z))")
_KEPT = (string.ascii_letters + string.digits + "_-").encode() + END
_MARKED = bytes(byte if byte in _KEPT else _MARK[0] for byte in range(256))
# Local sources up to this size are hashed completely, which takes seconds.
WHOLE_BYTES = 2**30
# Of other sources, both ends of this many files are hashed; hashing all would read the whole source before any work.
HASHED_FILES = 64
HASHED_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns of a table, arrays of an archive or members of a tar; None stands for the usual name.

    Attributes:
        image: column of encoded images, or pixels.
        label: column of labels.
        group: column whose values name groups; no groups if None.
    """

    image: str | None = None
    label: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One raw image.

    Attributes:
        key: identifier of letters, digits, `_` and `-`, unique in the source.
        name: name in the source: a path, or file and row.
        label: class index, if known.
        group: value of the group column, if there is one.
    """

    key: str
    name: str
    label: int | None
    group: str | None = None


class Reader(Protocol):
    """Reads samples; small enough to be sent to every worker."""

    @property
    def is_remote(self) -> bool:
        """Whether reads go over a network."""
        ...

    @property
    def is_concurrent(self) -> bool:
        """Whether several threads may read at the same time."""
        ...

    def read(self, sample: Sample) -> RawImage:
        """Read the image of a sample.

        Raises:
            OSError: the file cannot be read.
            BadImage: the sample holds no image.
        """
        ...


@dataclass(frozen=True)
class Source:
    """A listed source.

    Attributes:
        url: URL of the source.
        kind: `image_folder`, `parquet`, `arrow`, `webdataset`, `arrays` or `python`.
        samples: samples in the order of the source.
        class_names: class names by label; empty if there are none.
        fingerprint: hash of the listing, to detect changes of the data.
        reader: reader of the samples.
        listing: by file, values that identify its content: [bytes, SHA-256 or None, …].
        location: folder of the listed files, if they are files.
        unlabelled: why no sample has a label although there may be labels; empty otherwise.
        split: the chosen split, if there are splits.
        splits: number of files or images of each split.
        left_out: number of files that are not read, by reason.
        blocks: number of samples in each run that the reader reads at once, such as a row group; None if samples are
            read one by one.
        drawn_from: number of samples before some were drawn; None if none were.
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
        """`unlabelled` in brackets, to append to messages about missing labels."""
        return f" ({self.unlabelled})" if self.unlabelled else ""

    def limited(self, limits: Limits) -> Source:
        """The source with the samples that the limits choose."""
        chosen, total = limits.of(len(self.samples)), len(self.samples)
        if chosen is None:
            return self
        return replace(self.take(chosen), drawn_from=total if limits.drawn is not None else None)

    def take(self, indices: npt.NDArray[np.int64]) -> Source:
        """The source with the samples at these ascending indices."""
        blocks = self.blocks
        if blocks is not None:
            taken = np.bincount(np.searchsorted(np.cumsum(blocks), indices, side="right"), minlength=1)
            blocks = taken[taken > 0]
        return replace(self, samples=self.samples.take(indices), blocks=blocks)

    def relabelled(self, rows: Mapping[int, int], names: Sequence[str]) -> Source:
        """The source with each label replaced by `rows[label]`, and the class names `names`."""
        return replace(self, samples=self.samples.relabelled(rows), class_names=names)

    def listing_bytes(self) -> bytes:
        """The listing as a file of the artifact, for `changes`; equal listings give equal bytes."""
        listing = self.listing
        if isinstance(listing, InPieces):  # sorted
            return _gzip(piece.encode() for piece in listing.json())
        return _gzip([json.dumps(dict(listing), sort_keys=True).encode()])

    def changes(self, earlier: bytes) -> list[str]:
        """Differences from an earlier `listing_bytes`, one line per file.

        Raises:
            SourceError: `earlier` is not a listing.
        """
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
        """Local files that were modified after `when` and whose content the listing does not cover."""
        location = self.location
        if location is None or not location.is_local:
            return []
        if _is_small(location, [facts[0] for _, facts in self.listing.items()]):
            return []  # hashed completely
        return [name for name in self.listing if location.fs.modified(location.path(name)) > when]


def check_listed(location: Location, name: str, kind: str = "other") -> None:
    """Refuse a file that cannot be read, or whose name cannot be recorded.

    Args:
        location: location of the file.
        name: path of the file.
        kind: type in the file system; `other` is a local link, or not a file.

    Raises:
        SourceError: it is a device or a pipe, of which a read may never end, or its name is not UTF-8.
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
    """Size and SHA-256 of every file, for a local source of up to `WHOLE_BYTES`.

    For others, the SHA-256 of the first and last 64 KiB of up to `HASHED_FILES` files, whose choice depends on their
    names alone.
    """
    hashes = hash_contents(location, [name for name, _ in files], [size for _, size in files])
    return {name: [size, hashes.get(place)] for place, (name, size) in enumerate(files)}


def hash_contents(
    location: Location, names: Iterable[str], sizes: Sequence[int] | npt.NDArray[np.int64]
) -> dict[int, str]:
    """The hashes of `make_listing`, by the index of the file."""
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
    """A value whose JSON is too long to be made at once."""

    def json(self) -> Iterator[str]:
        """The text that `json.dumps` would give, in pieces."""
        ...


@dataclass(frozen=True)
class JsonList:
    """A list, given in non-empty parts."""

    parts: Iterable[Sequence[Any]]

    def json(self) -> Iterator[str]:
        yield "["
        for number, part in enumerate(self.parts):
            yield ", " * (number > 0) + json.dumps(part)[1:-1]
        yield "]"


@dataclass(frozen=True)
class JsonTexts:
    """A list of items that are already JSON, given in non-empty parts."""

    parts: Iterable[Sequence[str]]

    def json(self) -> Iterator[str]:
        yield "["
        for number, part in enumerate(self.parts):
            yield ", " * (number > 0) + ", ".join(part)
        yield "]"


def fingerprint(entries: Sequence[Any]) -> str:
    """Hash of the JSON of a list, whose entries may be `InPieces`."""
    digest = hashlib.sha256(b"[")
    for number, entry in enumerate(entries):
        digest.update(b", " * (number > 0))
        for piece in entry.json() if isinstance(entry, InPieces) else (json.dumps(entry),):
            digest.update(piece.encode())
    digest.update(b"]")
    return digest.hexdigest()


def _gzip(pieces: Iterable[bytes]) -> bytes:
    """The concatenated pieces as a gzip file, whose header is the same in all versions of Python."""
    packed, packer = io.BytesIO(), zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed.write(GZIP_HEADER)
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
    """Names without their extensions, with each run of characters not allowed in keys replaced by `_`.

    Keys may clash. All names are processed as one text: one call per name would take three times as long.
    """
    if not names:
        return []
    return keys_in(_SUFFIX.sub(b"", END.join([name.encode(errors="surrogatepass") for name in names])))


def keys_in(text: bytes) -> list[str]:
    """The keys of names without extensions, which `END` separates."""
    text = text.translate(_MARKED)
    while _MARK * 2 in text:
        text = text.replace(_MARK * 2, _MARK)
    return [key or "_" for key in text.replace(_MARK, b"_").decode("latin-1").split(END.decode("latin-1"))]


def clash_suffix(name: str) -> str:
    """A suffix that distinguishes a key from that of another name."""
    return f"-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def as_text(value: object) -> str:
    """A value from foreign JSON as text that is valid in UTF-8."""
    return str(value).encode(errors="backslashreplace").decode()
