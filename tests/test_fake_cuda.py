"""Devices of tensors in the hot loops, checked without a GPU by PyTorch's fake tensors, which follow the same rules.

Gradients of fake CUDA tensors need a PyTorch that believes in a GPU. A few lines of C++ in another process do that.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

COMPILER = shutil.which("g++")


@pytest.mark.skipif(COMPILER is None or torch.version.cuda is not None, reason="needs g++ and a torch without CUDA")
def test_hot_loops_never_mix_devices(tmp_path: Path) -> None:
    torch_folder, library = Path(torch.__file__).parent, tmp_path / "no_card.so"
    source = ROOT / "tests" / "support" / "no_card.cpp"
    flags = [
        "-O1",
        "-DNDEBUG",
        "-std=c++20",
        "-shared",
        "-fPIC",
        f"-I{torch_folder / 'include'}",
        f"-L{torch_folder / 'lib'}",
    ]
    _output_of(str(COMPILER), *flags, str(source), "-o", str(library), "-lc10", "-ltorch_cpu")
    output = _output_of(sys.executable, "-m", "tests.support.on_fake_cuda", str(library))
    assert output.split("\n")[:4] == ["attacks done", "arrays done", "training done", "mixed done"]


def _output_of(*command: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
