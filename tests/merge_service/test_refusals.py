"""What is refused, told or kept apart without a cluster: dry runs, lost pieces, memory, heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from datamerge.encoders import Head
from merge_service import MergeConfig
from merge_service.cli import merge as command
from merge_service.merge import prepare
from merge_service.ray_jobs import _show
from merge_service.ray_stage import _Shards
from merge_service.work_queue import Piece, WorkQueue
from merge_service.worker import _out_of_memory
from storage_schemas import ConfigError, DatamergeError


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--dry-run", "--submit", "http://127.0.0.1:9"], "submit: .* found --dry-run"),
        (["--price-per-hour", "3"], "price_per_hour: expected --dry-run"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        CliRunner().invoke(command, ["x", "a", "--grouping", "label", *flags], catch_exceptions=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_leaves_no_artifact_behind(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    arguments = [str(tmp_path / "x.npz"), str(tmp_path / "a"), "--encoder", "mlp:3x8x8-4", "--device", "cuda"]
    with pytest.raises(ConfigError, match="device: 'cuda' cannot be used here"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert not (tmp_path / "a").exists()


def test_the_outcome_of_a_job_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("merge 3/3\n", '{"artifact": "a"}\n', "12\n"):
        _show(line)
    assert capsys.readouterr() == ('{"artifact": "a"}\n', "merge 3/3\n12\n")


def test_another_head_is_another_plan(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4) % 3)
    heads = [Head(torch.eye(3, 4)), Head(2 * torch.eye(3, 4)), Head(torch.eye(3, 4), names=["a", "b", "c"])]
    found = []
    for index, head in enumerate(heads):
        path = tmp_path / f"{index}.safetensors"
        path.write_bytes(head.to_bytes())
        settings = {"source": str(tmp_path / "x.npz"), "artifact": str(tmp_path / "a"), "encoder": "mlp:3x8x8-8-4"}
        config = MergeConfig.model_validate({**settings, "objective": "cross_entropy", "head": str(path)})
        facts = prepare(config).plan.provenance["head"]
        found.append({name: value for name, value in facts.items() if name != "spec"})
    assert found[0] != found[1]
    assert found[0] != found[2]


def test_out_of_memory_names_the_knobs() -> None:
    config = MergeConfig.model_validate({"source": "x", "artifact": "a", "encoder": "mlp:3x8x8-8-4"})
    for error in (torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("CUDA error: out of memory")):
        with pytest.raises(DatamergeError, match=r"--batch-size.*--members.*--precision"), _out_of_memory(config):
            raise error
    with pytest.raises(RuntimeError, match="other"), _out_of_memory(config):
        raise RuntimeError("other")


def test_a_lost_whole_shard_is_queued_whole() -> None:
    stage = object.__new__(_Shards)
    stage._queue = WorkQueue([], 3)
    stage._lost_parts(Piece(4))
    assert stage._queue.take(0, 2, False) == Piece(4)
