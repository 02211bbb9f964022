"""Uploads to an S3 server that fails: they are retried, and one that always fails leaves its shard unfinished."""

from __future__ import annotations

from collections import Counter
from uuid import uuid4

import fsspec
import pytest

from storage_schemas.access.retries import ATTEMPTS
from tests.support.bench import SHARDS, Bench

# Ray and the S3 client leave files, sockets and sessions to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FAILURES = (500, 503)


@pytest.fixture
def bucket(bench: Bench) -> str:
    """A new, empty bucket of a server without faults."""
    bench.switch()
    bench.store.fault = None
    # fsspec keeps connections for the life of a process, also those to another test's server.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    name = f"bucket-{uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(name)
    return name


def _objects(bucket: str) -> dict[str, bytes]:
    files = fsspec.filesystem("s3", use_listings_cache=False)
    return {path.removeprefix(f"{bucket}/a/"): files.cat_file(path) for path in files.find(bucket)}


def test_failed_uploads_are_retried(bench: Bench, undisturbed: dict[str, bytes], bucket: str) -> None:
    """Every object is refused twice: with 500 (internal error) and with 503 (slow down)."""
    refused: Counter[str] = Counter()

    def fault(method: str, path: str) -> int | None:
        if method != "PUT" or refused[path] == len(FAILURES):
            return None
        refused[path] += 1
        return FAILURES[refused[path] - 1]

    bench.store.fault = fault
    code, errors = bench.merge(f"s3://{bucket}/a")
    assert code == 0, errors
    assert _objects(bucket) == undisturbed
    assert refused == dict.fromkeys((f"/{bucket}/a/{path}" for path in undisturbed), len(FAILURES))
    # stderr is no terminal: only our lines, without a progress bar, colours or output of Ray.
    assert "\x1b" not in errors
    assert all(line.startswith(("merge:", "rejected ")) for line in errors.strip().splitlines()), errors


def test_an_upload_that_always_fails_leaves_its_shard_to_the_next_merge(
    bench: Bench, undisturbed: dict[str, bytes], bucket: str
) -> None:
    refused: Counter[str] = Counter()
    victim = f"/{bucket}/a/commits/00004.json"

    def fault(method: str, path: str) -> int | None:
        if method == "PUT" and path == victim:
            refused[path] += 1
            return 503
        return None

    bench.store.fault = fault
    code, errors = bench.merge(f"s3://{bucket}/a")
    assert code == 1
    last = errors.strip().splitlines()[-1]
    assert f" 1 of {SHARDS} shards " in last, errors
    assert "shard 00004" in last
    assert "failed 3 times" in last
    assert "commits/00004.json" in last
    assert "Traceback" not in errors
    assert refused[victim] == 3 * ATTEMPTS
    found = _objects(bucket)
    assert {path for path in undisturbed if path.startswith("commits/")} - found.keys() == {"commits/00004.json"}
    bench.store.fault = None
    bench.store.requests.clear()
    code, errors = bench.merge(f"s3://{bucket}/a")
    assert code == 0, errors
    written = {path for method, path, _ in bench.store.requests if method == "PUT" and "/commits/" in path}
    assert written == {victim}
    assert _objects(bucket) == undisturbed
