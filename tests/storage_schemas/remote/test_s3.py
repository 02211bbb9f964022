"""Artifacts on S3, over HTTP: writing, reading and resuming, and the requests that they take."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from storage_schemas import (
    Artifact,
    ArtifactWriter,
    CorruptShard,
    DatamergeError,
    Layout,
    Location,
    NotAnArtifact,
    Record,
    Reject,
    UserError,
    open_artifact,
)
from storage_schemas.access.retries import ATTEMPTS
from tests.support.refusals import refused

# s3fs and its HTTP client leave sockets and sessions to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

Write = Callable[..., list[Record]]
Same = Callable[[Record, Record], None]


def test_round_trip(
    bucket: str,
    s3: Any,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    format_name: str,
) -> None:
    records = write_artifact(f"{bucket}/deep/a", make_layout(format_name), (1,))
    s3.requests.clear()
    artifact = open_artifact(f"{bucket}/deep/a")
    for found, expected in zip(artifact, records, strict=True):
        same_record(found, expected)
    same_record(artifact[3], records[3])
    same_record(artifact[artifact.index_of("k5")], records[4])
    assert s3.listings() == []


def test_a_single_record_is_read_by_ranges(
    bucket: str, s3: Any, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str
) -> None:
    """The shard is never read whole."""
    write_artifact(f"{bucket}/a", make_layout(format_name, extras=("target",)))
    artifact = open_artifact(f"{bucket}/a")
    artifact.commit(0)
    s3.requests.clear()
    artifact[1]
    # One range for each array; in Zarr, the shard's index too.
    assert [method for method, _, _ in s3.requests] == ["GET"] * (6 if format_name == "zarr" else 3)


def test_documents_contain_no_credentials(
    bucket: str, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(f"{bucket}/a", make_layout())
    location = Location(f"{bucket}/a")
    documents = [location.read(name) for name in ("manifest.json", "commits/00000.json")]
    assert not any(b"verysecret" in data or b"TESTKEYID" in data for data in documents)


def test_an_interrupted_writer_is_resumed(
    bucket: str,
    make_layout: Callable[..., Layout],
    make_shards: Callable[..., list[list[Record]]],
    same_record: Same,
    provenance: dict[str, Any],
    format_name: str,
) -> None:
    layout = make_layout(format_name)
    shards = make_shards(layout)
    first = ArtifactWriter(Location(f"{bucket}/a"), layout, provenance)
    first.begin({})
    first.commit(1, shards[1], [])
    with refused(NotAnArtifact, None, f"{bucket}/a", "0 of 3"):
        open_artifact(f"{bucket}/a")
    second: ArtifactWriter = pickle.loads(pickle.dumps(ArtifactWriter(Location(f"{bucket}/a"), layout, provenance)))
    second.begin({})
    assert second.committed() == {1}
    for shard in (0, 2):
        second.commit(shard, shards[shard], [])
    assert second.finish().complete
    for found, expected in zip(open_artifact(f"{bucket}/a"), [r for s in shards for r in s], strict=True):
        same_record(found, expected)


def test_somebody_elses_prefix_is_refused(
    bucket: str, make_layout: Callable[..., Layout], provenance: dict[str, Any]
) -> None:
    Location(bucket).write("a/thesis.tex", b"precious")
    with refused(NotAnArtifact, None, f"{bucket}/a", "'thesis.tex'"):
        ArtifactWriter(Location(f"{bucket}/a"), make_layout(), provenance).begin({})


@pytest.mark.parametrize("status", [429, 500, 503])
def test_transient_failures_are_retried(
    bucket: str,
    s3: Any,
    quick: list[float],
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    status: int,
) -> None:
    """Every object's first two requests fail, uploads and downloads alike."""
    seen: dict[tuple[str, str], int] = {}

    def fault(method: str, path: str) -> int | None:
        seen[method, path] = seen.get((method, path), 0) + 1
        return status if seen[method, path] <= 2 else None

    s3.fault = fault
    records = write_artifact(f"{bucket}/a", make_layout("webdataset"))
    for found, expected in zip(open_artifact(f"{bucket}/a"), records, strict=True):
        same_record(found, expected)
    assert any(method == "PUT" for method, _ in seen)


def test_lasting_failures_are_one_line_errors(
    bucket: str, s3: Any, quick: list[float], make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(f"{bucket}/a", make_layout())
    s3.fault = lambda method, path: 503
    with refused(DatamergeError, None, f"{bucket}/a/manifest.json"):
        open_artifact(f"{bucket}/a")
    assert len([wait for wait in quick if wait > 0.05]) >= ATTEMPTS - 1


def test_a_failing_server_is_not_taken_for_an_empty_folder(
    bucket: str,
    s3: Any,
    quick: list[float],
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    provenance: dict[str, Any],
) -> None:
    """Otherwise a finished artifact would be started again."""
    write_artifact(f"{bucket}/a", make_layout())
    manifest = Location(f"{bucket}/a").read("manifest.json")
    s3.fault = lambda method, path: 503 if method == "HEAD" else None
    with pytest.raises(DatamergeError):
        ArtifactWriter(Location(f"{bucket}/a"), make_layout(), provenance).begin({})
    s3.fault = None
    ArtifactWriter(Location(f"{bucket}/a"), make_layout(), provenance).begin({})
    assert Location(f"{bucket}/a").read("manifest.json") == manifest


def test_published_documents_show_no_secret(bucket: str, make_layout: Callable[..., Layout]) -> None:
    """Secrets in a provenance or in the reason of a reject are redacted."""
    secret = "https://me:passw0rd@host/photos?sig=s3cret"
    provenance = {"source": {"url": secret, "class_names": [secret]}, "head": f"see {secret}"}
    writer = ArtifactWriter(Location(f"{bucket}/a"), make_layout(groups=1), provenance)
    writer.begin({})
    writer.commit(0, [], [Reject(key="k0", sample="0.png", reason=f"cannot read {secret}")])
    writer.finish()
    for name in ("manifest.json", "commits/00000.json"):
        data = writer.location.read(name)
        assert b"https://***@host/photos?sig=***" in data
        assert b"passw0rd" not in data
        assert b"s3cret" not in data


@pytest.mark.parametrize("status", [403, 404])
def test_refusals_are_not_retried(bucket: str, s3: Any, quick: list[float], status: int) -> None:
    s3.fault = lambda method, path: status
    with pytest.raises(UserError):
        open_artifact(f"{bucket}/a")
    assert not quick


def test_a_missing_bucket_is_named(s3: Any, make_layout: Callable[..., Layout], provenance: dict[str, Any]) -> None:
    with refused(NotAnArtifact, None, "s3://no-such-bucket-here/a", "manifest.json"):
        open_artifact("s3://no-such-bucket-here/a")
    with refused(UserError, None, "s3://no-such-bucket-here/a"):
        ArtifactWriter(Location("s3://no-such-bucket-here/a"), make_layout(), provenance).begin({})


def test_missing_credentials_are_named(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    location = Location("s3://anything/a", skip_instance_cache=True)
    with refused(UserError, None, "s3://anything/a/manifest.json", "credentials"):
        location.read("manifest.json")


def test_truncated_and_missing_objects_are_corruption(
    bucket: str, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str
) -> None:
    write_artifact(f"{bucket}/a", make_layout(format_name))
    location = Location(f"{bucket}/a")
    for position, change in ((0, "cut"), (1, "removed")):
        for file in open_artifact(f"{bucket}/a").commit(position).files:
            if change == "cut":
                location.write(file.path, location.read(file.path)[: file.bytes // 3])
            else:
                location.remove(file.path)
        with pytest.raises(CorruptShard):
            open_artifact(f"{bucket}/a")[3 * position + 2]


def _read_all(artifact: Artifact, queue: Any) -> None:
    queue.put([record.key for record in artifact])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_worker_processes_read_what_their_parent_opened(
    bucket: str, make_layout: Callable[..., Layout], write_artifact: Write, method: str
) -> None:
    """Connections do not survive a fork; a loader's workers are forked with the artifact in hand."""
    write_artifact(f"{bucket}/a", make_layout("webdataset"))
    artifact = open_artifact(f"{bucket}/a")
    keys = [record.key for record in artifact]
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_read_all, args=(artifact, queue))
    process.start()
    assert queue.get(timeout=60) == keys
    process.join(60)
    assert process.exitcode == 0


def test_options_are_pickled_with_the_location_and_never_shown(bucket: str, s3: Any, monkeypatch: Any) -> None:
    options = {"key": "TESTKEYID", "secret": "verysecret", "endpoint_url": s3.url}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    location = Location(bucket, **options)
    location.write("x", json.dumps(1).encode())
    copy: Location = pickle.loads(pickle.dumps(location))
    assert copy.read("x") == b"1"
    assert "verysecret" not in repr(copy) + copy.url
