"""Folders and distributions with the names of our packages are not imported, or the error names them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import datamerge as dm
from datamerge.packages import OURS
from tests.support.paths import GOLDEN, ROOT

ARTIFACT = GOLDEN / "v1" / "webdataset-uint8_moments-full"
BIN = Path(sys.executable).parent
COMMANDS: dict[str, list[str | Path]] = {
    "script": [BIN / "datamerge"],
    "module": [sys.executable, "-m", "datamerge"],
}
# Our packages, those of earlier releases, and modules that a user may have.
FOLDERS = ("trainer", "evaluation", "demo", "sources", "storage_schemas", "artifact_tools", "adversarial", "logging")
FILES = ("console", "merge_service", "config", "cli", "messages")

ENCODER = """
from torch import nn

def encoder():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    model.input_shape = (3, 2, 2)
    return model
"""


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A folder of modules with conflicting names; importing any of them fails."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('imported the {name} of the user')")
    for name in FILES:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('imported the {name} of the user')")
    (tmp_path / "own_model.py").write_text(ENCODER)
    return tmp_path


def _run(command: list[str | Path], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(words, cwd=cwd, env=outside | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("arguments", [["--help"], ["inspect", ARTIFACT], ["diff", ARTIFACT, ARTIFACT]], ids=str)
def test_commands_work_in_a_folder_with_the_same_names(
    crowded: Path, command: str, arguments: list[str | Path]
) -> None:
    done = _run([*COMMANDS[command], *arguments], crowded)
    assert done.returncode == 0, done.stderr


def test_torchrun_trains_in_such_a_folder_with_the_users_encoder(crowded: Path) -> None:
    """`-m` puts the working directory, which holds the encoder's module, first on the path."""
    settings = ["--encoder", "python:own_model:encoder", "--arm", "mean-only", "--steps", "2"]
    start: list[str | Path] = [BIN / "torchrun", "--nproc-per-node", "1", "-m", "datamerge"]
    done = _run([*start, "train", ARTIFACT, "run", *settings], crowded)
    assert done.returncode == 0, done.stderr
    assert (crowded / "run" / "run.json").exists()


def test_a_checkout_can_be_used_without_installation() -> None:
    done = _run([sys.executable, "-m", "datamerge", "inspect", ARTIFACT], ROOT)
    assert done.returncode == 0, done.stderr


def _refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("name", ["trainer", "storage_schemas"])
@pytest.mark.parametrize("entry", ["{folder}", ""])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_package_that_pythonpath_puts_first_is_named(crowded: Path, command: str, name: str, entry: str) -> None:
    """An empty entry is the working directory."""
    shutil.rmtree(crowded / ("trainer" if name == "storage_schemas" else "storage_schemas"))
    path = f"{entry.format(folder=crowded)}{os.pathsep}/nowhere"
    line = _refused(_run([*COMMANDS[command], "train", ARTIFACT, "run"], crowded, PYTHONPATH=path))
    assert str(crowded / name / "__init__.py") in line
    assert "PYTHONPATH" in line
    assert "pip install" not in line


def _python(code: str, path: Path) -> str:
    program = f"import sys; sys.path.insert(0, {str(path)!r})\nimport datamerge as dm\n{code}"
    done = _run([sys.executable, "-c", program], path)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_in_python_a_conflicting_folder_is_named_and_reading_works(crowded: Path) -> None:
    for name in ("storage_schemas", "logging"):
        shutil.rmtree(crowded / name)
    line = _python("dm.open_artifact\ndm.train", crowded)
    assert str(crowded / "trainer" / "__init__.py") in line
    assert "pip" not in line


def _distribution(folder: Path, name: str) -> None:
    """A foreign distribution whose package is called `trainer`."""
    (folder / "trainer").mkdir(exist_ok=True)
    (folder / "trainer" / "__init__.py").write_text("from trainer.model import TrainerModel\n")
    (folder / f"{name}-1.0.dist-info").mkdir()
    (folder / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / f"{name}-1.0.dist-info" / "RECORD").write_text("trainer/__init__.py,,\n")


def test_the_error_about_a_conflicting_distribution_advises_to_uninstall_it(tmp_path: Path) -> None:
    _distribution(tmp_path, "coqui_trainer")
    line = _python("dm.train", tmp_path)
    assert str(tmp_path / "trainer" / "__init__.py") in line
    assert "pip uninstall coqui_trainer" in line


def test_a_distribution_installed_over_ours_is_named(tmp_path: Path) -> None:
    """It shares our folder in site-packages and has replaced one of our files."""
    packages, work = tmp_path / "site-packages", tmp_path / "work"
    work.mkdir()
    for name in OURS:
        shutil.copytree(ROOT / name, packages / name, ignore=shutil.ignore_patterns("__pycache__"))
    _distribution(packages, "coqui_trainer")
    line = _refused(_run([*COMMANDS["module"], "train", ARTIFACT, "run"], work, PYTHONPATH=str(packages)))
    assert str(packages / "trainer" / "__init__.py") in line
    assert "'coqui_trainer'" in line
    assert "--force-reinstall" in line


@pytest.mark.xdist_group("ray")
def test_ray_workers_import_our_packages_and_the_users_encoder(crowded: Path) -> None:
    """Ray puts the working directory first on its workers' path."""
    np.savez(crowded / "x.npz", images=np.random.default_rng(0).integers(0, 256, (4, 2, 2, 3), np.uint8))
    settings = ["--encoder", "python:own_model:encoder", "--members", "2", "--device", "cpu", "--max-workers", "1"]
    done = _run([*COMMANDS["module"], "merge", "x.npz", "art", *settings], crowded)
    assert done.returncode == 0, done.stderr
    assert len(dm.open_artifact(crowded / "art")) == 4
