"""Memory of a worker: its parts, how many workers fit, and the message if fewer fit than were asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import merge_service.estimate
import merge_service.ray_pool
from datamerge.encoders import load_encoder
from merge_service import MergeConfig, merge
from merge_service.cli import merge as command
from merge_service.worker_memory import FRAGMENTATION, LIBRARIES, RETURNED_BYTES, USABLE, WorkerMemory, worker_memory
from storage_schemas import Layout, moment_specs

MB, GB = 2**20, 10**9
SHAPE = (3, 8, 8)
ENCODER = "mlp:3x8x8-400-16-4"
# Much more than the encoder of these tests takes, in round numbers.
LARGE = WorkerMemory(fixed=GB, pixels=0, kept=(250 * 10**6,), layer=0, images=64, least=10)


def _memory(device: str = "cpu", **settings: Any) -> WorkerMemory:
    config = MergeConfig.model_validate(
        {"source": "photos", "artifact": "out", "encoder": ENCODER, "members": 10, **settings}
    )
    arrays = tuple(moment_specs("uint8_moments", SHAPE, 10, 4))
    layout = Layout(format="zarr", encoding="uint8_moments", arrays=arrays, groups=512, groups_per_shard=256)
    return worker_memory(config, layout, [load_encoder(ENCODER)] if config.encoder else [], device)


def test_memory_equals_a_count_by_hand() -> None:
    found, record = _memory(), sum(spec.nbytes for spec in moment_specs("uint8_moments", SHAPE, 10, 4))
    values, weights = math.prod(SHAPE), 192 * 400 + 400 + 400 * 16 + 16 + 16 * 4 + 4 + 2 * 3
    # ReLUs keep their outputs for the backward pass.
    assert found.kept == (4 * 400, 4 * 16)
    assert found.fixed == LIBRARIES + 4 * weights + 2 * 256 * (record + values)
    assert (found.images, found.least) == (60, 10)  # whole groups of 10 in a batch of 64
    pixels = 11 * 4 * values + 2 * 2 * values
    assert found.of_images(2) == round(FRAGMENTATION * 2 * 4 * 416) + 2 * (4 * 4 * 400 + pixels)
    many = RETURNED_BYTES // (4 * 400) + 1
    assert found.of_images(many) == round(many * 4 * (400 + FRAGMENTATION * 16)) + many * (4 * 4 * 400 + pixels)


def test_memory_follows_the_settings() -> None:
    plain = _memory()
    assert _memory(batch_size=8).images == 10
    assert _memory(attack="apgd").bytes > plain.bytes
    assert _memory(restarts=3).pixels - plain.pixels == 2 * 2 * 2 * math.prod(SHAPE)
    assert _memory(grid=False).pixels - plain.pixels == 2 * 2 * math.prod(SHAPE)
    # With a GPU, only weights and shards take memory of the host.
    assert _memory("cuda").bytes == plain.fixed
    embeds = _memory(encoder=ENCODER, grouping="label", targets="embedding", members=None)
    assert (embeds.kept, embeds.layer, embeds.images, embeds.least) == ((), 4 * 400, 64, 1)
    assert _memory(encoder=None, grouping="label", members=None).kept == ()
    clean = _memory(attack="none", members=None)
    assert (clean.kept, clean.layer, clean.images, clean.least) == ((), 4 * 400, 64, 1)
    assert clean.fixed == plain.fixed
    assert clean.pixels == 4 * 4 * math.prod(SHAPE)


def test_weights_in_bfloat16_do_not_grow_with_the_batch() -> None:
    plain, half = _memory(), _memory(precision="bfloat16")
    assert half.fixed - plain.fixed == 2 * (192 * 400 + 400 * 16 + 16 * 4)
    assert sum(half.kept) <= sum(plain.kept)


@pytest.mark.parametrize(
    ("free", "wanted", "fitting", "facts"),
    [
        (40 * GB, 2, 2, None),
        (math.inf, 8, 8, None),
        (18 * GB, 2, 1, ["1 of 2", "18.0 GB", "17.0 GB", "`batch_size=16`"]),
        (17 * GB, 1, 1, ["not even one", "17.0 GB", "`batch_size=32`"]),
        (200 * GB, 16, 10, ["10 of 16", "`batch_size=32`"]),
        # No batch is smaller than a group.
        (6 * GB, 2, 1, ["1 of 2", "6.0 GB"]),
    ],
)
def test_fitting_workers_and_the_message_about_a_shortage(
    free: float, wanted: int, fitting: int, facts: list[str] | None
) -> None:
    memory = LARGE
    assert memory.bytes == 17 * GB
    assert memory.fitting(free, wanted) == fitting
    assert fitting == 1 or fitting * memory.bytes <= USABLE * free
    said = memory.shortage(free, wanted)
    if facts is None:
        assert said is None
        return
    assert said is not None
    assert all(fact in said for fact in facts), said
    assert ("batch_size" in said) == any("batch_size" in fact for fact in facts)


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    return [str(tmp_path / "x.npz"), str(tmp_path / "out")]


def test_a_dry_run_reports_the_memory_and_a_shortage(photos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--encoder", ENCODER, "--members", "2", "--groups-per-shard", "2", "--device", "cpu", "--dry-run"]
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(merge_service.estimate, "free_memory", lambda: 4 * GB)
    enough = CliRunner().invoke(command, [*photos, *flags]).stdout
    assert "with 2 workers" in enough
    (line,) = [line for line in enough.splitlines() if line.startswith("memory: ")]
    assert "4.0 GB are free here" in line
    assert "max_workers: " not in enough
    monkeypatch.setattr(merge_service.estimate, "free_memory", lambda: 800 * 10**6)
    short = CliRunner().invoke(command, [*photos, *flags]).stdout
    assert "with 1 workers" in short
    assert "max_workers: memory has room for 1 of 2 workers: 800.0 MB are free" in short


def test_a_merge_starts_as_many_workers_as_fit(
    photos: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, artifact = photos
    monkeypatch.setattr(merge_service.ray_pool, "free_memory", lambda: 800 * 10**6)
    config = MergeConfig(
        source=source, artifact=artifact, encoder=ENCODER, members=2, groups_per_shard=2, max_workers=2, device="cpu"
    )
    assert merge(config).manifest.groups == 4
    said = [line for line in capsys.readouterr().err.splitlines() if "max_workers" in line]
    assert len(said) == 1
    assert "1 of 2 workers" in said[0]
