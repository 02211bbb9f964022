"""Modules in the working directory with the names of ours shadow neither the command's nor those of Ray's workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from storage_schemas import open_artifact
from tests.support.bench import Bench

NAMES = ["trainer", "evaluation", "demo", "sources", "console", "merge_service", "storage_schemas"]
SCRIPT = str(Path(sys.executable).with_name("datamerge"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos, the user's encoder, and modules that nobody may import: some are folders, some are files."""
    for index, name in enumerate(NAMES):
        file = tmp_path / (f"{name}.py" if index % 2 else f"{name}/__init__.py")
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"raise SystemExit('{name} of the user was imported')\n")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def encoder():\n"
        "    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))\n"
        "    network.input_shape = (3, 4, 4)\n"
        "    return network\n"
    )
    np.savez(tmp_path / "photos.npz", images=np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), np.uint8))
    return tmp_path


@pytest.mark.parametrize("command", [[SCRIPT], [sys.executable, "-m", "datamerge"]], ids=["script", "module"])
def test_modules_in_the_working_directory_do_not_shadow_ours(bench: Bench, folder: Path, command: list[str]) -> None:
    """The user's encoder is still found, because the working directory is searched last."""
    arguments = ["merge", "photos.npz", "adv", "--encoder", "python:mine:encoder", "--members", "2", "--steps", "1"]
    done = subprocess.run(
        [*command, *arguments, "--device", "cpu", "--ray-address", bench.address],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(open_artifact(folder / "adv")) == 4
