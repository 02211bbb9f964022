"""EXIF's orientation in evaluations: what is measured, recorded, said, and told apart when results go on."""

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
    """Bright on the left; EXIF says that this is the upper half."""
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


def _measured(spec: str, data: Path, **settings: Any) -> Results:
    values = {"runs": [spec], "data": str(data), "steps": 1, "head": "outputs", "epsilon": "1/255", **settings}
    return evaluate(EvaluateConfig.model_validate(values))


@pytest.mark.parametrize(
    ("write", "wanted", "exif"),
    [
        (_folder, None, "ignore"),
        (_folder, "transpose", "transpose"),
        (_parquet, None, "transpose"),
        (_parquet, "ignore", "ignore"),
    ],
)
def test_images_are_shown_as_the_source_s_library_shows_them(
    write: Callable[[Path], Path],
    wanted: str | None,
    exif: str,
    make_encoder: MakeEncoder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their label is that of what is bright on the left."""
    (result,) = _measured(make_encoder([LEFT, TOP]), write(tmp_path / "data"), exif=wanted)
    assert result.score("accuracy clean").value == (100 if exif == "ignore" else 0)
    assert result.settings["exif"] == exif
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "EXIF" in line]
    assert "3 of 3" in line


def test_results_go_on_with_the_same_orientation_only(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    spec, data, output = make_encoder([LEFT, TOP]), _parquet(tmp_path / "data"), str(tmp_path / "out")
    _measured(spec, data, output=output)
    with refused(ConfigError, "output", "exif", "transpose"):
        _measured(spec, data, output=output, exif="ignore")
    other = make_encoder([TOP, LEFT])
    with refused(ConfigError, "output", "exif", "transpose"):  # rows of one table
        _measured(other, data, output=output, exif="ignore")
    _measured(other, data, output=output)


def test_results_of_releases_that_knew_no_choice_ignored_it(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    spec, data, output = make_encoder([LEFT, TOP]), _parquet(tmp_path / "data"), str(tmp_path / "out")
    first = _measured(spec, data, output=output, exif="ignore")
    for file in Path(output).rglob("identity.json"):
        identity = json.loads(file.read_bytes())
        del identity["exif"]
        file.write_text(json.dumps(identity))
    again = _measured(spec, data, output=output, exif="ignore")
    assert [one.scores for one in again] == [one.scores for one in first]
    with refused(ConfigError, "output", "exif", "transpose"):
        _measured(spec, data, output=output)
