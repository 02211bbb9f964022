"""The memory of commands: of all their processes together, and of the largest."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.peak import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MB = 2**20
# Holds 60 MB while its child process holds 120 MB, both long enough to be sampled.
PARENT = """
import subprocess, sys, time
held = bytearray(b'x' * 60 * 2**20)
child = "import sys, time; held = bytearray(b'x' * 120 * 2**20); time.sleep(1.5); sys.exit(3)"
sys.exit(subprocess.run([sys.executable, '-S', '-c', child]).returncode)
"""


def test_the_memory_of_all_processes_and_of_the_largest_is_measured() -> None:
    done = run([sys.executable, "-S", "-c", PARENT], {})
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
    assert 1.5 < done.seconds < 60
    # While the bytes are made, they are in memory twice.
    assert 120 < done.process < 300
    assert 180 < done.tree < 400


def test_loading_is_measured_in_a_new_process() -> None:
    # A process that has freed memory before could load the network without growing.
    done = run([sys.executable, "-m", "benchmarks.memory", "alone", "load", "mlp:3x64x64-512-8"], {})
    found = json.loads(done.stdout)
    weights = 4 * (3 * 64 * 64 * 512 + 512 + 512 * 8 + 8) / MB
    assert found["weights"] == pytest.approx(weights, rel=1e-3)
    assert found["peak"] >= found["left"] >= 0.9 * weights
    assert found["seconds"] > 0
