"""Sources over a network: signatures are sent but not stored, temporary failures are retried, errors are one line."""

from __future__ import annotations

import gzip
import io
import itertools
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from datamerge.sources import Source, decode, open_source
from merge_service import MergeConfig
from merge_service.merge import prepare, worker_setup
from merge_service.worker import ShardWorker
from storage_schemas import ArtifactWriter, DatamergeError, Location, SourceError, UserError
from storage_schemas.access import streams
from storage_schemas.access.retries import ATTEMPTS
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.refusals import refused
from tests.support.servers import MANNERS, WebHandler

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

COUNT = 6
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 5, 4, 3), np.uint8)
LABELS = [number % 3 for number in range(COUNT)]
SIGNATURE = "?X-Amz-Signature=SECRET&X-Amz-Date=1"
RENEWED = "?X-Amz-Signature=SECRET2&X-Amz-Date=2"
FILES = ["all.tar", "t-{0..1}.tar", "t-*.tar", "x.parquet", "x.npz"]


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(buffer, "PNG")
    return buffer.getvalue()


def _tar(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for extension, data in (("png", _png(number)), ("cls", str(LABELS[number]).encode())):
                info = tarfile.TarInfo(f"{number:03d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _write(folder: Path) -> None:
    _tar(folder / "all.tar", range(COUNT))
    _tar(folder / "t-0.tar", range(4))
    _tar(folder / "t-1.tar", range(4, COUNT))
    table = pa.table({"image": [_png(number) for number in range(COUNT)], "label": LABELS})
    pq.write_table(table, folder / "x.parquet", row_group_size=2)
    np.savez(folder / "x.npz", images=PIXELS, labels=np.array(LABELS))


@pytest.fixture
def files(tmp_path: Path, web: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The web server with files of every kind; it also lists its folder."""
    _write(tmp_path / "web")
    monkeypatch.delattr(WebHandler, "list_directory")
    return web


def _check(source: Source) -> None:
    assert [sample.label for sample in source.samples] == LABELS
    reader = pickle.loads(pickle.dumps(source.reader))
    for sample, pixels in zip(source.samples, PIXELS, strict=True):
        np.testing.assert_array_equal(
            decode(reader.read(sample), Preprocessing(shape=(3, 5, 4))), pixels.transpose(2, 0, 1)
        )


def _shown(source: Source) -> str:
    """All text of a source that an artifact or a message may contain."""
    listing = gzip.decompress(source.listing_bytes()).decode()
    return "\n".join([source.url, listing, *(f"{sample.key} {sample.name}" for sample in source.samples)])


@pytest.mark.parametrize("name", FILES)
def test_a_signature_is_sent_with_every_request_and_kept_nowhere(files: Any, name: str) -> None:
    sources = []
    for signature in (SIGNATURE, RENEWED):
        files.fault = lambda method, path, query=signature: None if path.endswith(query) else 403
        source = open_source(f"{files.url}/{name}{signature}")
        _check(source)
        assert source.url == f"{files.url}/{name}"
        assert "SECRET" not in _shown(source) + repr(source.listing)
        sources.append(source)
    assert sources[0].fingerprint == sources[1].fingerprint
    assert sources[0].samples == sources[1].samples
    files.fault = None
    assert open_source(f"{files.url}/{name}").fingerprint == sources[0].fingerprint


@pytest.mark.parametrize("name", ["all.tar", "x.parquet", "x.npz"])
def test_a_signature_for_get_alone_suffices(files: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 signs the method, so it refuses a HEAD with the signature of a GET."""
    monkeypatch.setattr(WebHandler, "do_HEAD", lambda handler: handler.send_error(403))
    _check(open_source(f"{files.url}/{name}{SIGNATURE}"))


@pytest.mark.parametrize("name", ["all.tar", "x.parquet", "x.npz"])
def test_a_presigned_url_of_s3_is_read(bucket: str, tmp_path: Path, name: str) -> None:
    _write(tmp_path)
    Location(bucket).write(name, (tmp_path / name).read_bytes())
    source = open_source(fsspec.filesystem("s3").sign(f"{bucket}/{name}"))
    _check(source)
    assert "Signature" not in _shown(source)


def test_a_tar_named_only_in_the_query_is_read(files: Any) -> None:
    with tarfile.open(files.RequestHandlerClass.keywords["directory"] + "/get", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(_png(0))
        tar.addfile(info, io.BytesIO(_png(0)))
    source = open_source(f"{files.url}/get?file=x.tar")
    assert source.reader.read(source.samples[0]) == _png(0)


def _temporary_failures() -> Callable[[str, str], int | None]:
    turns = itertools.cycle([503, 503, None, None])  # one read of s3fs may be two requests
    return lambda method, path: next(turns)


@pytest.mark.parametrize("name", FILES)
def test_temporary_failures_of_a_web_server_are_retried(files: Any, quick: list[float], name: str) -> None:
    files.fault = _temporary_failures()
    _check(open_source(f"{files.url}/{name}"))
    assert quick


@pytest.mark.parametrize("name", [*FILES, ""])
def test_temporary_failures_of_an_object_store_are_retried(
    bucket: str, s3: Any, tmp_path: Path, quick: list[float], name: str
) -> None:
    if name:
        _write(tmp_path)
        for path in tmp_path.iterdir():
            Location(bucket).write(path.name, path.read_bytes())
    else:
        for number in range(COUNT):
            Location(bucket).write(f"images/{number}.png", _png(number))
        table = [f"{number}.png,{label}" for number, label in enumerate(LABELS)]
        Location(bucket).write("labels.csv", "\n".join(["file,label", *table]).encode())
    s3.fault = _temporary_failures()
    _check(open_source(f"{bucket}/{name}"))
    assert quick


@pytest.mark.parametrize("name", FILES)
def test_a_lasting_failure_is_reported_in_one_line(files: Any, quick: list[float], name: str) -> None:
    source = open_source(f"{files.url}/{name}{SIGNATURE}")
    messages = []
    for status, kind in ((503, DatamergeError), (403, UserError)):
        files.fault = lambda method, path, answer=status: answer
        for action in (
            lambda: source.reader.read(source.samples[-1]),
            lambda: open_source(f"{files.url}/{name}?q=SECRET"),
        ):
            with refused(kind, None, status) as caught:
                action()
            messages.append(str(caught.value))
    assert len(quick) >= ATTEMPTS - 1
    for message in messages:
        assert message.startswith(files.url)
        assert "SECRET" not in message


def test_a_missing_file_is_refused(files: Any) -> None:
    names = {"no.tar": "no.tar", "all.tar{,.tar}": "all.tar.tar", "no-*.tar": "no-*.tar", "no.parquet": "no.parquet"}
    for name, shown in names.items():
        with refused(SourceError, None, f"{files.url}/{shown}: ") as caught:
            open_source(f"{files.url}/{name}{SIGNATURE}")
        assert "SECRET" not in str(caught.value)


def test_an_unreachable_server_is_not_reported_as_a_missing_file(quick: list[float]) -> None:
    for name in ("x.tar", "x.parquet", "x-*.tar"):
        with refused(DatamergeError, None, "http://127.0.0.1:9", "ClientConnectorError"):
            open_source(f"http://127.0.0.1:9/{name}")


@pytest.mark.parametrize("name", ["x.tar", "x-{0..3}.tar", "*.tar", "x.parquet", "x.npz", "images"])
@pytest.mark.parametrize(("scheme", "fact"), [("foo", "fsspec"), ("gs", "pip install 'datamerge[gcs]'")])
def test_a_scheme_without_a_driver_is_refused(
    scheme: str, fact: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with refused(UserError, None, f"{scheme}://", fact) as caught:
        open_source(f"{scheme}://user:SECRET@bucket/{name}")
    assert "SECRET" not in str(caught.value)


def test_tars_of_several_buckets_are_refused() -> None:
    with refused(SourceError, None, "s3://{a,b}/x.tar"):
        open_source("s3://{a,b}/x.tar")


def test_a_web_folder_is_refused(files: Any) -> None:
    with refused(SourceError, None, files.url, ".parquet", ".tar", ".npz", "IDX"):
        open_source(f"{files.url}/{SIGNATURE}")


@pytest.mark.parametrize("name", ["all.tar", "x.parquet"])
def test_only_small_files_are_read_from_a_server_without_ranges(
    files: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files would be sent whole for every block."""
    files.ranges = False
    _check(open_source(f"{files.url}/{name}"))
    monkeypatch.setattr(streams, "BLOCK", 1000)
    with refused(UserError, None, f"{files.url}/{name}", "ranges"):
        _check(open_source(f"{files.url}/{name}"))


@pytest.mark.parametrize("name", ["all.tar", "x.parquet", "x.npz"])
@pytest.mark.parametrize("manner", MANNERS)
def test_files_are_read_from_servers_of_all_manners(files: Any, manner: str, name: str) -> None:
    files.manners, files.ranges = MANNERS[manner]
    source = open_source(f"{files.url}/{name}{SIGNATURE}")
    _check(source)
    assert "SECRET" not in _shown(source)


@pytest.mark.parametrize("name", ["all.tar", "x.parquet", "x.npz"])
def test_a_file_that_changes_while_it_is_read_is_refused(files: Any, name: str) -> None:
    """The samples were listed from the old file; a worker would read the new one at their offsets."""
    tag = ['"1"']
    files.etag = lambda: tag[0]
    source = open_source(f"{files.url}/{name}{SIGNATURE}")
    reader = pickle.loads(pickle.dumps(source.reader))
    tag[0] = '"2"'
    with refused(SourceError, None, f"{files.url}/{name}: ", '"1"', '"2"') as caught:
        reader.read(source.samples[0])
    assert "SECRET" not in str(caught.value)
    _check(open_source(f"{files.url}/{name}{SIGNATURE}"))


def test_a_tar_is_listed_in_few_requests(files: Any) -> None:
    open_source(f"{files.url}/all.tar")
    assert len(files.requests) <= 4


def test_a_merge_continues_with_another_signature(files: Any, tmp_path: Path) -> None:
    """Shards are made by the functions that Ray calls; no file that is written contains the signature."""
    threads = torch.get_num_threads()

    def merge_one_shard(query: str) -> set[int]:
        files.fault = lambda method, path: None if path.endswith(query) else 403
        source = f"{files.url}/t-{{0..1}}.tar{query}"
        settings = {"grouping": "label", "format": "webdataset", "groups_per_shard": 1, "device": "cpu"}
        config = MergeConfig.model_validate({"source": source, "artifact": str(tmp_path / "a"), **settings})
        prepared = prepare(config)
        writer = ArtifactWriter(Location(config.artifact), prepared.plan.layout, prepared.plan.provenance)
        writer.begin(prepared.files)
        committed = writer.committed()
        worker = ShardWorker(worker_setup(prepared, writer, "cpu"))
        worker.prepare()
        worker.run(prepared.plan.task(len(committed)))
        return committed

    try:
        counts = [merge_one_shard(SIGNATURE), merge_one_shard(RENEWED), merge_one_shard(RENEWED)]
    finally:
        torch.set_num_threads(threads)
    assert counts == [set(), {0}, {0, 1}]
    written = [path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(written) > 6
    assert not any(b"SECRET" in data for data in written)
