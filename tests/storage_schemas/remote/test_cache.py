"""The local cache fetches each file once and keeps its limit, even if others use or damage it."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import resource
import shutil
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import pytest

from storage_schemas import Artifact, Cache, ConfigError, CorruptShard, Layout, Location, Record, open_artifact
from storage_schemas.access.cache import CachedLocation
from tests.support.refusals import refused

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

Write = Callable[..., list[Record]]
Same = Callable[[Record, Record], None]
PLENTY = 10**9


def _copies(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if re.fullmatch(r"[0-9a-f]{64}.*", path.name)]


def _settled(folder: Path) -> list[Path]:
    """The copies, once no thread works on them: a complete copy gets its name after its reader has the bytes."""
    end = time.monotonic() + 20
    while any(thread.name == "fetch" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return sorted(_copies(folder))


def _held(folder: Path) -> int:
    """Bytes on the disk; a file with holes takes fewer than its size."""
    held = 0
    for path in _copies(folder):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # evicted since
        held += min(status.st_size, 512 * status.st_blocks)
    return held


def test_every_byte_is_fetched_once(
    tmp_path: Path,
    web: Any,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    format_name: str,
) -> None:
    records = write_artifact(tmp_path / "web" / "a", make_layout(format_name))
    cache = Cache(tmp_path / "cache", PLENTY)
    for _ in range(2):
        artifact = pickle.loads(pickle.dumps(open_artifact(f"{web.url}/a", cache=cache)))
        for found, expected in zip(artifact, records, strict=True):
            same_record(found, expected)
    assert len(set(web.fetched())) == 1 + 3 + (15 if format_name == "zarr" else 3)
    ranges = [(path, span[6:].split("-")) for _, path, span in web.requests if span not in ("", "bytes=0-0")]
    sent = Counter((path, at) for path, (first, last) in ranges for at in range(int(first), int(last) + 1))
    sent.update(path for _, path, span in web.requests if not span and not path.endswith("manifest.json"))
    assert set(sent.values()) == {1}
    # Cached files need no server; only the manifest is requested.
    shutil.rmtree(tmp_path / "web" / "a" / ("groups.zarr" if format_name == "zarr" else "shards"))
    same_record(open_artifact(f"{web.url}/a", cache=cache)[4], records[4])


def test_arrays_that_are_not_read_are_not_fetched(
    tmp_path: Path, web: Any, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(tmp_path / "web" / "a", make_layout("zarr"))
    list(open_artifact(f"{web.url}/a", cache=Cache(tmp_path / "cache", PLENTY)).only(["sum"]))
    assert not any("members" in path for _, path, _ in web.requests)


def test_a_local_artifact_is_read_in_place(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(tmp_path / "a", make_layout())
    assert len(list(open_artifact(tmp_path / "a", cache=Cache(tmp_path / "cache", PLENTY)))) == 7
    assert _copies(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "another file's", "removed"])
def test_a_damaged_copy_is_fetched_again(
    tmp_path: Path,
    web: Any,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    format_name: str,
    damage: str,
) -> None:
    """Sidecars and shards alike, before the artifact is opened and while it is."""
    records = write_artifact(tmp_path / "web" / "a", make_layout(format_name))
    cache = Cache(tmp_path / "cache", PLENTY)
    artifact = open_artifact(f"{web.url}/a", cache=cache)
    list(artifact)
    copies = _settled(cache.folder)
    contents = [path.read_bytes() for path in copies]
    for path, data, other in zip(copies, contents, contents[1:] + contents[:1], strict=True):
        bad = bytearray(data)
        for index in range(len(bad) // 2, len(bad)):
            bad[index] ^= 64
        new = {"flipped": bytes(bad), "truncated": data[: len(data) // 3], "emptied": b"", "another file's": other}
        path.unlink()
        if damage != "removed":
            path.write_bytes(new[damage])
    for reader in (open_artifact(f"{web.url}/a", cache=cache), artifact):
        for found, expected in zip(reader, records, strict=True):
            same_record(found, expected)
    inodes = {path.name.partition(".")[0]: path.stat().st_ino for path in _settled(cache.folder)}
    assert len(inodes) == len(copies)
    for found, expected in zip(open_artifact(f"{web.url}/a", cache=cache), records, strict=True):
        same_record(found, expected)
    assert {path.name.partition(".")[0]: path.stat().st_ino for path in _settled(cache.folder)} == inodes


def test_an_artifact_replaced_by_another_is_noticed(
    tmp_path: Path, web: Any, make_layout: Callable[..., Layout], write_artifact: Write, same_record: Same
) -> None:
    cache = Cache(tmp_path / "cache", PLENTY)
    write_artifact(tmp_path / "web" / "a", make_layout("webdataset", "float32"))
    list(open_artifact(f"{web.url}/a", cache=cache))
    shutil.rmtree(tmp_path / "web" / "a")
    records = write_artifact(tmp_path / "web" / "a", make_layout("webdataset", "uint8_moments"))
    for found, expected in zip(open_artifact(f"{web.url}/a", cache=cache), records, strict=True):
        same_record(found, expected)


def test_damage_at_the_source_is_reported_after_two_fetches(
    tmp_path: Path, web: Any, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(tmp_path / "web" / "a", make_layout("webdataset", extras=()))
    shard = tmp_path / "web" / "a" / "shards" / "00000.tar"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    artifact = open_artifact(f"{web.url}/a", cache=Cache(tmp_path / "cache", PLENTY))
    for _ in range(3):
        with pytest.raises(CorruptShard):
            artifact[0]
    assert sum(path.endswith("00000.tar") for path in web.fetched()) == 2


def test_least_recently_used_files_are_evicted_first(tmp_path: Path, web: Any) -> None:
    source = Location(tmp_path / "web")
    for name in "abcd":
        source.write(name, name.encode() * 100)
    cache = Cache(tmp_path / "cache", 350)
    location = CachedLocation.of(Location(web.url), cache)
    for name in ("a", "b", "c", "a", "d"):
        assert location.read(name) == name.encode() * 100
        assert _held(cache.folder) <= 350
    web.requests.clear()
    for name in ("a", "c", "d"):
        location.read(name)
    assert web.requests == []
    location.read("b")
    assert web.fetched() == ["/b"]


def test_a_file_larger_than_the_cache_is_read_by_ranges(
    tmp_path: Path,
    web: Any,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    format_name: str,
) -> None:
    records = write_artifact(tmp_path / "web" / "a", make_layout(format_name))
    artifact = open_artifact(f"{web.url}/a", cache=Cache(tmp_path / "cache", 16))
    for found, expected in zip(artifact, records, strict=True):
        same_record(found, expected)
    assert _held(tmp_path / "cache") <= 16


def _read_at_random(artifact: Artifact, seed: int, queue: Any) -> None:
    rng = np.random.default_rng(seed)
    try:
        found = {artifact[int(index)].key for index in rng.integers(0, len(artifact), 30)}
        queue.put((found, None))
    except Exception as error:
        queue.put((set(), repr(error)))


def test_processes_can_share_a_cache_that_is_too_small(
    tmp_path: Path, web: Any, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str
) -> None:
    """Each evicts files that the others need; every record is right and the limit is never exceeded."""
    write_artifact(tmp_path / "web" / "a", make_layout(format_name))
    files = [path.stat().st_size for path in (tmp_path / "web" / "a").rglob("*") if path.is_file()]
    limit = 2 * max(files)
    artifact = open_artifact(f"{web.url}/a", cache=Cache(tmp_path / "cache", limit))
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    workers = [context.Process(target=_read_at_random, args=(artifact, seed, queue)) for seed in range(3)]
    for worker in workers:
        worker.start()
    largest = 0
    results: list[tuple[set[str], str | None]] = []
    while len(results) < len(workers):
        largest = max(largest, _held(tmp_path / "cache"))
        with suppress(Empty):
            results.append(queue.get(timeout=0.005))
    for worker in workers:
        worker.join()
    assert [error for _, error in results] == [None] * 3
    assert all(keys <= {f"k{number}" for number in range(7)} for keys, _ in results)
    assert 0 < largest <= limit


def test_threads_that_read_one_file_fetch_it_once(tmp_path: Path, web: Any) -> None:
    Location(tmp_path / "web").write("f", b"x" * 10_000)
    cache = Cache(tmp_path / "cache", PLENTY)
    found: list[bytes] = []

    def read() -> None:
        found.append(CachedLocation.of(Location(web.url), cache).read("f"))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"x" * 10_000] * 8
    assert len(web.fetched()) == 1


def _read_with_little_room(artifact: Artifact, queue: Any) -> None:
    """Read all records as on a full disk: files cannot grow beyond 20,000 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = list(artifact)
    queue.put((records, [str(warning.message) for warning in caught if warning.category is RuntimeWarning]))


def test_a_full_disk_ends_caching_but_not_the_run(
    tmp_path: Path, web: Any, make_layout: Callable[..., Layout], write_artifact: Write, same_record: Same
) -> None:
    records = write_artifact(tmp_path / "web" / "a", make_layout("webdataset"))
    assert max(path.stat().st_size for path in (tmp_path / "web" / "a" / "shards").iterdir()) > 20_000
    artifact = open_artifact(f"{web.url}/a", cache=Cache(tmp_path / "cache", PLENTY))
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    process = context.Process(target=_read_with_little_room, args=(artifact, queue))
    process.start()
    found, warned = queue.get()
    process.join()
    for one, expected in zip(found, records, strict=True):
        same_record(one, expected)
    assert len(warned) == 1
    assert str(tmp_path / "cache") in warned[0]
    assert "File too large" in warned[0]


def test_foreign_files_in_the_folder_are_kept(tmp_path: Path, web: Any) -> None:
    """`--cache ~/data` removes none of the user's files."""
    Location(tmp_path / "web").write("f", b"x" * 80)
    cache = Cache(tmp_path, 100)
    for name in ("thesis.docx", "movie.part", "a" * 64 + ".txt"):
        (tmp_path / name).write_bytes(b"mine" * 100)
    assert CachedLocation.of(Location(web.url), cache).local_path("f") is not None
    assert {"thesis.docx", "movie.part"} <= {path.name for path in tmp_path.iterdir()}


def test_an_impossible_cache_is_the_users_error(tmp_path: Path) -> None:
    with refused(ConfigError, "cache", " 0"):
        Cache(tmp_path, 0)
    (tmp_path / "file").write_text("x")
    with refused(ConfigError, "cache", tmp_path / "file"):
        Cache(tmp_path / "file", 10)
