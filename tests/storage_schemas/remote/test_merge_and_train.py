"""A whole pipeline over S3: Ray workers write to it, training and tools read from it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from datamerge.cli import cli
from storage_schemas import ExactMoments, Location, open_artifact
from tests.support.bench import Bench

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

MERGE = ["--encoder", "mlp:3x8x8-16-4", "--members", "3", "--steps", "2", "--groups-per-shard", "2"]
MERGE += ["--max-workers", "2", "--keep-members"]


def _run(*arguments: str) -> str:
    """The output of a command, run in its own process with its own connections."""
    done = subprocess.run(
        [sys.executable, "-m", "datamerge", *arguments], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def _call(*arguments: str) -> str:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False).output


def test_a_pipeline_runs_over_s3(bench: Bench, tmp_path: Path) -> None:
    bucket = "s3://pipeline"
    fsspec.filesystem("s3").mkdir(bucket)
    generator = np.random.default_rng(0)
    for index in range(7):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (12, 10, 3), np.uint8)).save(buffer, "PNG")
        Location(f"{bucket}/photos").write(f"{index}.png", buffer.getvalue())
    output = _run("merge", f"{bucket}/photos", f"{bucket}/adv", *MERGE, "--ray-address", bench.address)
    records = list(open_artifact(f"{bucket}/adv"))
    assert sorted(record.key for record in records) == [str(index) for index in range(7)]
    for record in records:
        moments = ExactMoments.of(record.members)  # type: ignore[arg-type]
        np.testing.assert_array_equal(record.arrays["scatter"], moments.scatter)
    bench.store.requests.clear()
    output += _run(
        "train", f"{bucket}/adv", str(tmp_path / "run"), "--steps", "3", "--cache", str(tmp_path / "cache")
    )
    assert bench.store.listings() == []
    assert any((tmp_path / "cache").glob("[0-9a-f]*"))
    output += _call("convert", f"{bucket}/adv", f"{bucket}/tar", "--format", "webdataset")
    assert "equal: 7 groups" in _call("diff", f"{bucket}/adv", f"{bucket}/tar")
    output += _call("inspect", f"{bucket}/tar") + _call("export", f"{bucket}/tar", "3", "-o", f"{bucket}/out")
    assert Location(f"{bucket}/out").names() == ["3.npz"]
    assert "verysecret" not in output
    files = fsspec.filesystem("s3")
    for path in files.find(f"{bucket}/adv"):
        assert b"verysecret" not in files.cat_file(path), path
