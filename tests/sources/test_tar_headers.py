"""Tars by their headers: what `tarfile` lists, with as many requests, in a fraction of its memory."""

from __future__ import annotations

import io
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
from datamerge.sources.tar_headers import MAX_MEMBER, WINDOW, TarFiles, TarLister

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


def _outcome(files: Iterator[tuple[str, int, int]]) -> tuple[Listed, str]:
    """What is listed until there is an error, and the error."""
    listed: Listed = []
    try:
        for name, start, size in files:
            listed.append((name, start, size))
    except (tarfile.TarError, ValueError) as error:
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
    """Up to the same error."""
    data = _tar(format_, members, damage, cut)
    expected = _outcome(_by_tarfile(io.BytesIO(data)))
    path = tmp_path_factory.getbasetemp() / "x.tar"
    path.write_bytes(data)
    with path.open("rb") as stream:
        assert _listed(LISTER.files(stream, is_local=True)) == expected
    assert _listed(LISTER.files(io.BytesIO(data), is_local=False)) == expected


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
