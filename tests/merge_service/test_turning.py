"""EXIF orientation in a merge: by the settings or as the source's library does it, recorded, and kept on resuming."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from datamerge.sources import open_source
from datamerge.sources.depth import DARK_REMARK
from datamerge.sources.images import TURNED_REMARK
from datamerge.sources.orientation import Exif
from merge_service import MergeConfig
from merge_service.merge import Prepared, prepare, worker_setup
from merge_service.planning import pixels_of
from merge_service.turning import say_remarks
from merge_service.worker import ShardResult, ShardWorker
from storage_schemas import ArtifactWriter, ConfigError, Location, NotAnArtifact
from tests.support.merging import merge_alone
from tests.support.refusals import refused

PIXELS = np.random.default_rng(3).integers(0, 256, (6, 8, 3), np.uint8)
ENCODER = "mlp:3x4x4-3"


def _photo(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG", exif=exif)
    return stream.getvalue()


PHOTOS = [_photo(orientation) for orientation in (6, 1, 3)]


def _folder(path: Path) -> Path:
    path.mkdir()
    for index, data in enumerate(PHOTOS):
        (path / f"{index}.png").write_bytes(data)
    return path


def _tar(path: Path) -> Path:
    with webdataset.TarWriter(f"{path}.tar") as writer:
        for index, data in enumerate(PHOTOS):
            writer.write({"__key__": str(index), "png": data})
    return path.with_suffix(".tar")


def _parquet(path: Path) -> Path:
    pq.write_table(
        pa.table({"image": [{"bytes": data, "path": None} for data in PHOTOS]}), path.with_suffix(".parquet")
    )
    return path.with_suffix(".parquet")


def _saved(path: Path) -> Path:
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": data, "path": None} for data in PHOTOS]
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(path)
    return path


SOURCES = [(_folder, "ignore"), (_tar, "ignore"), (_parquet, "transpose"), (_saved, "transpose")]


def _config(source: Path, artifact: Path, **settings: Any) -> MergeConfig:
    return MergeConfig(source=str(source), artifact=str(artifact), encoder=ENCODER, members=2, steps=1, **settings)


def _recorded_exif(provenance: Any) -> Any:
    return provenance["source"]["exif"]


def _upright(exif: str) -> list[npt.NDArray[np.uint8]]:
    turned = [PIXELS, PIXELS, PIXELS] if exif == "ignore" else [np.rot90(PIXELS, -1), PIXELS, np.rot90(PIXELS, 2)]
    return [np.ascontiguousarray(one.transpose(2, 0, 1)) for one in turned]


@pytest.mark.parametrize("wanted", [None, *get_args(Exif)])
@pytest.mark.parametrize(("write", "usual"), SOURCES)
def test_the_setting_or_the_sources_library_decides_about_exif(
    write: Callable[[Path], Path], usual: str, wanted: Exif | None, tmp_path: Path
) -> None:
    source, exif = write(tmp_path / "data"), wanted or usual
    prepared = prepare(_config(source, tmp_path / "a", exif=wanted))
    assert _recorded_exif(prepared.plan.provenance) == exif
    # Without resizing, a photo of another shape is rejected: turned upright, the first is (3, 8, 6).
    artifact = merge_alone(
        source,
        tmp_path / "b",
        encoder="mlp:3x6x8-3",
        resize=False,
        keep_clean=True,
        exif=wanted,
        order="source",
    )
    assert _recorded_exif(artifact.manifest.provenance) == exif
    expected = [pixels for pixels in _upright(exif) if pixels.shape == (3, 6, 8)]
    clean = [record.arrays["clean"] for record in artifact]
    assert len(clean) == len(expected) == (3 if exif == "ignore" else 2)
    for pixels, upright in zip(clean, expected, strict=True):
        np.testing.assert_array_equal(pixels, upright)


@pytest.mark.parametrize(("exif", "shape"), [("transpose", (3, 8, 6)), ("ignore", (3, 6, 8))])
def test_the_shape_is_that_of_the_first_image_after_turning(
    exif: Exif, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    config = MergeConfig(source=str(_parquet(tmp_path / "data")), artifact=str(tmp_path / "a"), grouping="label")
    assert pixels_of(config, open_source(config.source), None, exif).shape == shape


def _begin_with_record(prepared: Prepared, location: Path, **record: Any) -> None:
    """Begin an artifact whose provenance has `record` in place of the `exif` of its source."""
    provenance = dict(prepared.plan.provenance)
    source = {name: value for name, value in provenance["source"].items() if name != "exif"}
    provenance["source"] = {**source, **record}
    ArtifactWriter(Location(location), prepared.plan.layout, provenance).begin(prepared.files)


@pytest.mark.parametrize(("write", "usual"), SOURCES)
@pytest.mark.parametrize("wanted", [None, "ignore"])
def test_an_artifact_without_an_exif_record_is_resumed_without_turning(
    write: Callable[[Path], Path],
    usual: str,
    wanted: Exif | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, artifact = write(tmp_path / "data"), tmp_path / "a"
    _begin_with_record(prepare(_config(source, artifact)), artifact)
    capsys.readouterr()
    prepared = prepare(_config(source, artifact, exif=wanted))
    assert prepared.plan.exif == "ignore"
    assert "exif" not in prepared.plan.provenance["source"]
    ArtifactWriter(Location(artifact), prepared.plan.layout, prepared.plan.provenance).begin(prepared.files)
    said = [line for line in capsys.readouterr().err.splitlines() if "EXIF" in line]
    assert len(said) == (usual == "transpose" and wanted is None)


@pytest.mark.parametrize(
    ("there", "now"), [({}, "transpose"), ({"exif": "ignore"}, "transpose"), ({"exif": "transpose"}, "ignore")]
)
def test_an_artifact_is_not_resumed_with_another_exif_setting(
    there: dict[str, str], now: Exif, tmp_path: Path
) -> None:
    source, artifact = _folder(tmp_path / "data"), tmp_path / "a"
    _begin_with_record(prepare(_config(source, artifact)), artifact, **there)
    prepared = prepare(_config(source, artifact, exif=now))
    writer = ArtifactWriter(Location(artifact), prepared.plan.layout, prepared.plan.provenance)
    with refused(NotAnArtifact, None, "source.exif", now):
        writer.begin(prepared.files)


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder": ENCODER, "members": 2, "steps": 1},
        {"grouping": "column", "group_column": "of", "targets": "label", "shape": "3x6x8"},
    ],
    ids=["adversarial", "given samples"],
)
def test_turned_and_dark_images_are_counted_per_shard(settings: dict[str, Any], tmp_path: Path) -> None:
    dark = io.BytesIO()
    Image.fromarray(np.full((6, 8), 4000, np.uint16)).save(dark, "PNG")
    rows = [{"bytes": data, "path": None} for data in (*PHOTOS, dark.getvalue())]
    pq.write_table(pa.table({"image": rows, "of": ["a"] * 4, "label": [0] * 4}), tmp_path / "x.parquet")
    config = MergeConfig(source=str(tmp_path / "x.parquet"), artifact=str(tmp_path / "a"), device="cpu", **settings)
    result = _first_shard(config)
    assert dict(result.remarks) == {TURNED_REMARK: 2, DARK_REMARK: 1}


def _first_shard(config: MergeConfig) -> ShardResult:
    prepared = prepare(config)
    writer = ArtifactWriter(Location(config.artifact), prepared.plan.layout, prepared.plan.provenance)
    writer.begin(prepared.files)
    worker = ShardWorker(worker_setup(prepared, writer, "cpu"))
    worker.prepare()
    return worker.run(prepared.plan.task(0))


def test_an_exif_setting_for_arrays_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS[None])
    with refused(ConfigError, "exif", "arrays", "drop"):
        prepare(_config(tmp_path / "x.npy", tmp_path / "a", exif="transpose"))


def test_turned_images_are_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = prepare(_config(_folder(tmp_path / "data"), tmp_path / "a")).source
    capsys.readouterr()
    say_remarks({TURNED_REMARK: 2}, 3, source, "ignore")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{source.url}: 2 of 3 images")
    assert 'exif="transpose"' in line
    say_remarks({}, 3, source, "ignore")
    assert capsys.readouterr().err == ""
