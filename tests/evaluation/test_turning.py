"""EXIF orientation in evaluations is applied, recorded, reported, and compared when results are continued."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamerge.evaluation import EvaluateConfig, Results, evaluate
from storage_schemas import ConfigError
from tests.support.refusals import refused

MakeEncoder = Callable[[list[list[float]]], str]

LEFT, TOP = [1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]  # brightness of the left and of the upper half


def _photo() -> bytes:
    """Bright on the left, which is the upper half by its EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(np.array([[200, 20], [200, 20]], np.uint8)).save(stream, "PNG", exif=exif)
    return stream.getvalue()


def _folder(path: Path) -> Path:
    for index in range(3):
        file = path / "0" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_photo())
    return path


def _parquet(path: Path) -> Path:
    rows = [{"bytes": _photo(), "path": None}] * 3
    pq.write_table(pa.table({"image": rows, "label": [0] * 3}), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def _measure(spec: str, data: Path, **settings: Any) -> Results:
    values = {"runs": [spec], "data": str(data), "steps": 1, "head": "outputs", "epsilon": "1/255", **settings}
    return evaluate(EvaluateConfig.model_validate(values))


@pytest.mark.parametrize(
    ("write", "exif_setting", "exif"),
    [
        (_folder, None, "ignore"),
        (_folder, "transpose", "transpose"),
        (_parquet, None, "transpose"),
        (_parquet, "ignore", "ignore"),
    ],
)
def test_images_are_turned_as_the_sources_library_does(
    write: Callable[[Path], Path],
    exif_setting: str | None,
    exif: str,
    make_encoder: MakeEncoder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their label is right if the bright half is on the left."""
    (result,) = _measure(make_encoder([LEFT, TOP]), write(tmp_path / "data"), exif=exif_setting)
    assert result.score("accuracy clean").value == (100 if exif == "ignore" else 0)
    assert result.settings["exif"] == exif
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "EXIF" in line]
    assert "3 of 3" in line


def test_results_are_continued_only_with_the_same_setting(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    spec, data, output = make_encoder([LEFT, TOP]), _parquet(tmp_path / "data"), str(tmp_path / "out")
    _measure(spec, data, output=output)
    with refused(ConfigError, "output", "exif", "transpose"):
        _measure(spec, data, output=output, exif="ignore")
    other = make_encoder([TOP, LEFT])
    with refused(ConfigError, "output", "exif", "transpose"):  # rows of one table
        _measure(other, data, output=output, exif="ignore")
    _measure(other, data, output=output)


def test_results_of_releases_without_the_setting_count_as_ignore(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    spec, data, output = make_encoder([LEFT, TOP]), _parquet(tmp_path / "data"), str(tmp_path / "out")
    first = _measure(spec, data, output=output, exif="ignore")
    for file in Path(output).rglob("identity.json"):
        identity = json.loads(file.read_bytes())
        del identity["exif"]
        file.write_text(json.dumps(identity))
    again = _measure(spec, data, output=output, exif="ignore")
    assert [one.scores for one in again] == [one.scores for one in first]
    with refused(ConfigError, "output", "exif", "transpose"):
        _measure(spec, data, output=output)
