"""Devices of tensors in the hot loops, without a GPU: PyTorch's fake tensors follow its rules for devices and dtypes.

Their gradients need a PyTorch that takes a GPU to be there. A few lines of C++ are enough, in a process of its own.
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
def test_nothing_mixes_devices(tmp_path: Path) -> None:
    own, library = Path(torch.__file__).parent, tmp_path / "no_card.so"
    source = ROOT / "tests" / "support" / "no_card.cpp"
    flags = ["-O1", "-DNDEBUG", "-std=c++20", "-shared", "-fPIC", f"-I{own / 'include'}", f"-L{own / 'lib'}"]
    _done(str(COMPILER), *flags, str(source), "-o", str(library), "-lc10", "-ltorch_cpu")
    said = _done(sys.executable, "-m", "tests.support.on_fake_cuda", str(library))
    assert said.split("\n")[:4] == ["attacks done", "arrays done", "training done", "mixed done"]


def _done(*command: str) -> str:
    """What a command prints that ends well."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
