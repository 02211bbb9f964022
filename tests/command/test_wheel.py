"""The wheel, installed without extras into an empty environment, as for reading artifacts only."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import GOLDEN, ROOT

# All tests share one environment, because making it is slow.
pytestmark = pytest.mark.xdist_group("wheel")

ARTIFACT = GOLDEN / "v1" / "webdataset-uint8_moments-full"
OFFLINE = ("NewConnectionError", "NameResolutionError", "Connection refused")


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "DATAMERGE_DATA")
    outside = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=outside, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    built = _run(sys.executable, *build, ROOT, cwd=folder)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("datamerge-*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """The `bin` folder of a new environment with the wheel installed."""
    folder = wheel.parent / "environment"
    assert _run(sys.executable, "-m", "venv", folder, cwd=wheel.parent).returncode == 0
    constraints = ROOT / "constraints.txt"
    installed = _run(
        folder / "bin" / "python", "-m", "pip", "install", "-q", "-c", constraints, wheel, cwd=wheel.parent
    )
    if any(sign in installed.stderr for sign in OFFLINE):
        pytest.skip("no package index can be reached")
    assert installed.returncode == 0, installed.stderr
    return folder / "bin"


def test_the_wheel_contains_the_four_packages_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"datamerge", "merge_service", "storage_schemas", "trainer"}
    assert "trainer/presets/paper.toml" in names
    assert "storage_schemas/FORMAT.md" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["inspect", ARTIFACT], ["verify", ARTIFACT], ["diff", ARTIFACT, ARTIFACT]],
    ids=str,
)
def test_artifacts_are_read_without_extras(environment: Path, tmp_path: Path, arguments: list[str | Path]) -> None:
    found = _run(environment / "datamerge", *arguments, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout


def test_a_module_named_like_a_package_is_not_imported(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "storage_schemas.py").write_text("raise RuntimeError")
    found = _run(environment / "python", "-m", "datamerge", "inspect", ARTIFACT, cwd=tmp_path)
    assert found.returncode == 0, found.stderr


def test_an_artifact_is_converted_and_read_in_python(environment: Path, tmp_path: Path) -> None:
    converted = _run(environment / "datamerge", "convert", ARTIFACT, "as-zarr", "--format", "zarr", cwd=tmp_path)
    assert converted.returncode == 0, converted.stderr
    code = "import datamerge as dm; print(len(dm.open_artifact('as-zarr')[0].mean.shape))"
    assert _run(environment / "python", "-c", code, cwd=tmp_path).stdout == "3\n"


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["merge", "photos", "out", "--encoder", "mlp:3x4x4-2"], "merge"),
        (["train", ARTIFACT, "run", "--steps", "1"], "train"),
        (["evaluate", "run"], "eval"),
        (["demo", "out"], "demo"),
    ],
)
def test_a_missing_extra_is_named(environment: Path, tmp_path: Path, arguments: list[str | Path], extra: str) -> None:
    found = _run(environment / "datamerge", *arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert f"pip install 'datamerge[{extra}]'" in found.stderr
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.iterdir())
