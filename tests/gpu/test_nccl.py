"""Several GPUs: sums, and processes that fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

SUMS = """
import sys, time, torch
from trainer.run.distributed import processes
with processes("cuda") as own:
    tensors = [torch.full((1000,), own.rank + 1.0, device="cuda")]
    own.sum(tensors, torch.zeros(1, device="cuda"))
    assert tensors[0].tolist() == [3.0] * 1000
    assert own.gather(own.rank) == [0, 1]
    if own.first and sys.argv[1] == "fails":
        raise KeyError("mine")
    if own.first and sys.argv[1] == "dies":
        import os; os._exit(9)
    if sys.argv[1] != "ends":
        own.sum(tensors, torch.zeros(1, device="cuda"))
"""


@pytest.mark.parametrize("how", ["ends", "fails", "dies"])
def test_sums_and_failures(tmp_path: Path, how: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    script = tmp_path / "sums.py"
    script.write_text(SUMS)
    started = time.monotonic()
    shared = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), how],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert time.monotonic() - started < 60
    assert (ranks[1].returncode == 0) == (how == "ends"), said
    if how != "ends":
        assert "lost contact with the other processes of this run" in said[1]
