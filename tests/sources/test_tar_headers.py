"""Tars by their headers: what `tarfile` lists, with as many requests, in a fraction of its memory."""

from __future__ import annotations

import io
import itertools
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamerge.sources import open_source
from datamerge.sources.tar_blocks import NAMES
from datamerge.sources.tar_headers import BROKEN, MAX_MEMBER, WINDOW, TarFiles, TarLister

BUFFER = 16 * WINDOW
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
TYPES = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)
PATHS = st.sampled_from(["a.png", "b/a.png", "p/" * 60 + "a.cls", "x" * 120, "é.png", "ÿ", "./c.json"])
MEMBERS = st.tuples(
    PATHS,
    st.sampled_from([0, 1, 511, 512, 513, 1500, 9000]),
    st.sampled_from([0, 1, 1.5, 1795958895.5743473, -1, 2**40]),
    st.sampled_from(["", "me"]),
    st.sampled_from([tarfile.REGTYPE] * 12 + [tarfile.AREGTYPE, tarfile.CONTTYPE, *TYPES]),
    st.sampled_from([{}] * 8 + [{"path": "other.png"}, {"atime": "3.5"}, {"comment": "x = 3"}, {"size": "512"}]),
)
DAMAGE = st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([0, 32, 48, 49, 55, 56, 120, 128, 255]))


class _Counted(io.RawIOBase):
    """Bytes that count how often they are asked for."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position, self.reads = data, 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, len(self._data))[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        found = self._data[self._position : self._position + len(buffer)]
        self.reads += 1
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


def _tar(format_: int, members: list[Any], damage: list[tuple[float, int]], cut: int) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=format_) as tar:
        for name, size, time, user, type_, more in members:
            info = tarfile.TarInfo(name)
            info.mtime, info.uname, info.type, info.pax_headers = time, user, type_, dict(more)
            info.linkname = "a.png" if type_ in TYPES[1:3] else ""
            info.size = 0 if type_ in TYPES else size
            try:
                tar.addfile(info, io.BytesIO(bytes(info.size)))
            except ValueError:  # what the format cannot say
                continue
    data = bytearray(written.getvalue())
    for place, value in damage:
        data[int(place * len(data))] = value
    return bytes(data[: len(data) - cut])


LISTER = TarLister(lambda name, _: name.endswith("cls"))
Listed = list[tuple[str, int, int]]


def _by_tarfile(stream: Any) -> Iterator[tuple[str, int, int]]:
    with tarfile.open(fileobj=stream, mode="r:", errors=NAMES) as tar:
        for info in tar:
            if not info.offset < tar.offset < info.offset + MAX_MEMBER:
                raise ValueError(f"{info.name!r} claims {info.size} bytes")
            tar.pax_headers = {}
            if info.isfile():
                yield info.name, info.offset_data, info.size
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):  # `tarfile` takes this for the end
            raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged; make the tar again")


def _outcome(files: Iterator[tuple[str, int, int]]) -> tuple[Listed, str]:
    """What is listed until there is an error, and the error."""
    listed: Listed = []
    try:
        for name, start, size in files:
            listed.append((name, start, size))
    except BROKEN as error:
        return listed, repr(error)
    return listed, ""


def _listed(files: TarFiles) -> tuple[Listed, str]:
    """The same of columns."""
    columns = (files.names.to_pylist(), files.starts.tolist(), files.sizes.tolist())
    return list(zip(*columns, strict=True)), repr(files.damage) if files.damage else ""


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(FORMATS),
    st.lists(MEMBERS, max_size=8),
    st.just([]) | st.lists(DAMAGE, max_size=3),
    st.sampled_from([0, 0, 0, 512, 9000, 10000, 10100]),
)
def test_what_tarfile_lists(
    tmp_path_factory: pytest.TempPathFactory,
    format_: int,
    members: list[Any],
    damage: list[tuple[float, int]],
    cut: int,
) -> None:
    """Up to the same error, and up to damage that `tarfile` takes for the end."""
    data = _tar(format_, members, damage, cut)
    expected = _outcome(_by_tarfile(io.BytesIO(data)))
    path = tmp_path_factory.getbasetemp() / "x.tar"
    path.write_bytes(data)
    with path.open("rb") as stream:
        assert _listed(LISTER.files(stream, is_local=True)) == expected
    assert _listed(LISTER.files(io.BytesIO(data), is_local=False)) == expected


def _samples(format_: int, count: int, image: int, odd: dict[int, Any]) -> bytes:
    """A tar of labels and images, in which some members are replaced by (type, size, name, pax headers, mode)."""
    members: list[Any] = []
    for number in range(2 * count):
        size = image if number % 2 else len(str(number))
        name = f"n{number % 3}/{number // 2:05d}.{'jpg' if number % 2 else 'cls'}"
        members.append(odd.get(number) or (tarfile.REGTYPE, size, name, {}, 0o644))
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=format_) as tar:
        for type_, size, name, more, mode in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.pax_headers, info.mode = type_, size, more, mode
            info.mtime = 1795958895.25  # a fraction, as `webdataset` writes it
            info.linkname = "x" if type_ in TYPES[1:3] else ""
            tar.addfile(info, io.BytesIO(b"7" * size))
    return written.getvalue()


ODD = {
    **{type_.decode(): (type_, 0, "other/", {}, 0o644) for type_ in TYPES},
    "old": (tarfile.AREGTYPE, 9000, "a.jpg", {}, 0o644),
    "contiguous": (tarfile.CONTTYPE, 9000, "a.jpg", {}, 0o644),
    "sparse": (tarfile.GNUTYPE_SPARSE, 9000, "a.jpg", {}, 0o644),
    "unknown": (b"Q", 9000, "a.jpg", {}, 0o644),
    "long": (tarfile.REGTYPE, 9000, "d/" * 120 + "a.jpg", {}, 0o644),
    "prefix": (tarfile.REGTYPE, 9000, "d" * 90 + "/" + "e" * 50 + ".jpg", {}, 0o644),
    "not ASCII": (tarfile.REGTYPE, 9000, "é.jpg", {}, 0o644),
    "renamed": (tarfile.REGTYPE, 9000, "a.jpg", {"path": "b.jpg"}, 0o644),
    "other mode": (tarfile.REGTYPE, 9000, "a.jpg", {}, 0o600),
    "two times": (tarfile.REGTYPE, 9000, "a.jpg", {"atime": "3.5"}, 0o644),
    "renamed after a long time": (
        *(tarfile.REGTYPE, 9000, "a.jpg", {"mtime": "1795958895.25000000000", "path": "b.jpg"}, 0o644),
    ),
    "small": (tarfile.REGTYPE, 300, "a.jpg", {}, 0o644),
    "empty": (tarfile.REGTYPE, 0, "a.jpg", {}, 0o644),
    "large label": (tarfile.REGTYPE, 600, "a.cls", {}, 0o644),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("format_", FORMATS)
def test_members_of_other_kinds_among_many(tmp_path: Path, format_: int, odd: str) -> None:
    """Where the headers before and after look alike."""
    try:
        data = _samples(format_, 60, 9000, dict.fromkeys((0, 41, 42, 61, 63, 65, 90), ODD[odd]))
    except ValueError:
        pytest.skip("the format cannot say this")
    expected = _outcome(_by_tarfile(io.BytesIO(data)))
    assert len(expected[0]) > 50
    (tmp_path / "x.tar").write_bytes(data)
    with (tmp_path / "x.tar").open("rb") as stream:
        files = LISTER.files(stream, is_local=True)
        assert _listed(files) == expected
        assert set(files.problems) == ({0, 41, 42, 61, 63, 65, 90} if odd == "sparse" else set())
        texts = [row for row, name in enumerate(files.names.to_pylist()) if name.endswith("cls")]
        sizes = files.sizes[texts].tolist()
        assert files.contents(np.array(texts)).to_pylist() == [b"7" * size for size in sizes]
    assert _listed(LISTER.files(io.BytesIO(data), is_local=False)) == expected


PLACES = [0, 99, 100, 124, 134, 135, 140, 147, 148, 153, 154, 155, 156, 257, 345]
BYTES = (0, 32, 49, 56, 255)


@pytest.mark.parametrize("format_", FORMATS)
def test_damage_anywhere_among_many(tmp_path: Path, format_: int) -> None:
    """Every field of a header, in the middle of headers that look alike; also a tar cut there."""
    whole = _samples(format_, 8, 9000, {})
    is_extended = format_ == tarfile.PAX_FORMAT
    first = whole.index(b"n2/00004.cls") - 1024 * is_extended
    cases = [whole[: first + kept] for kept in (0, 100, 508, 512, 700, 3000)]
    headers = (0, 512, 1024, 3072) if is_extended else (0, 1024)  # with the pax record; of the label and the image
    for header, place, value in itertools.product(headers, PLACES, BYTES):
        data, start = bytearray(whole), first + header
        data[start + place] = value
        cases.append(bytes(data))
        data[start + 148 : start + 156] = b" " * 8  # the same with the right checksum
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        cases.append(bytes(data))
    path = tmp_path / "x.tar"
    for case in cases:
        path.write_bytes(case)
        expected = _outcome(_by_tarfile(io.BytesIO(case)))
        with path.open("rb") as stream:
            assert _listed(LISTER.files(stream, is_local=True)) == expected


def test_damage_of_a_remote_tar_costs_little() -> None:
    """A wrong checksum near the beginning ends the list before much more is fetched."""
    data = bytearray(_samples(tarfile.GNU_FORMAT, 300, 9000, {}))
    data[data.index(b"n0/00003.cls") + 148] ^= 1
    stream = _Counted(bytes(data))
    files = LISTER.files(io.BufferedReader(stream, WINDOW), is_local=False)
    assert _listed(files) == _outcome(_by_tarfile(io.BytesIO(data)))
    assert len(files.names) == 6
    assert stream.reads < 60


@pytest.mark.parametrize("format_", FORMATS)
def test_texts_and_images_are_read_with_as_many_requests(format_: int) -> None:
    """Labels as they come, between images that are not read; one request more may look at the end again."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=format_) as tar:
        for number in range(60):
            for name, size in ((f"{number}.png", 700 * (number % 7)), (f"{number}.cls", 3 * number)):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = size, 1.5
                tar.addfile(info, io.BytesIO(name[:1].encode() * size))
    known, seen = _Counted(written.getvalue()), _Counted(written.getvalue())
    with tarfile.open(fileobj=io.BufferedReader(known, BUFFER), mode="r:") as tar:
        expected = [tar.extractfile(info).read() for info in tar if info.name.endswith("cls")]  # type: ignore[union-attr]
    lister = TarLister(lambda name, _: name.endswith("cls"))
    files = lister.files(io.BufferedReader(seen, BUFFER), is_local=False)
    rows = [row for row, name in enumerate(files.names.to_pylist()) if name.endswith("cls")]
    assert files.contents(np.array(rows)).to_pylist() == expected
    assert seen.reads <= known.reads + 1


def test_a_sample_takes_few_bytes(tmp_path: Path) -> None:
    """Also where it has JSON, of which nothing is kept but numbers."""
    count, caption = 1500, b'{"a": "%0200d"}'
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(count):
            for extension, data in (("jpg", b"x"), ("cls", b"%d" % (number % 10)), ("json", caption % number)):
                info = tarfile.TarInfo(f"n01440764/{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    open_source(tmp_path)  # imports, and what libraries set up once
    tracemalloc.start()
    source = open_source(tmp_path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert [source.samples[index].label for index in (0, 9, 10)] == [0, 9, 0]
    assert source.samples.nbytes <= 64 * count
    assert held <= 80 * count
