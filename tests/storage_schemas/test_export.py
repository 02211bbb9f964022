"""Export of single groups as .npz and .png files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from storage_schemas import ConfigError, Layout, Location, Record, open_artifact
from storage_schemas.operations.export import export
from tests.support.refusals import refused

Write = Callable[..., list[Record]]


def test_npz_holds_every_array(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str, encoding_name: str
) -> None:
    records = write_artifact(tmp_path / "a", make_layout(format_name, encoding_name))
    names = export(open_artifact(tmp_path / "a"), ["k2", "k4", "k2"], Location(tmp_path / "out"), "npz")
    assert names == ["k2.npz", "k4.npz"]
    for key in (2, 4):
        record = records[key]
        with np.load(tmp_path / "out" / f"k{key}.npz", allow_pickle=False) as file:
            for name in ("mean", "mean_square", "variance", "target", "members", "clean"):
                np.testing.assert_array_equal(file[name], getattr(record, name))
            for name, array in record.arrays.items():
                if name != "members":
                    np.testing.assert_array_equal(file[name], array)
                    assert file[name].dtype == array.dtype
            assert int(file["count"]) == record.count
            assert int(file["label"]) == (-1 if record.label is None else record.label)
            assert tuple(file["samples"]) == record.samples


def test_png_holds_every_image(tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write) -> None:
    records = write_artifact(tmp_path / "a", make_layout("zarr"))
    names = export(open_artifact(tmp_path / "a"), ["k0"], Location(tmp_path / "out"), "png")
    assert names == ["k0.mean.png", "k0.variance.png", "k0.clean.png", "k0.member-00.png", "k0.member-01.png"]

    def pixels(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        with Image.open(io.BytesIO((tmp_path / "out" / name).read_bytes())) as image:
            return np.asarray(image).transpose(2, 0, 1)

    np.testing.assert_array_equal(pixels("k0.mean.png"), (records[0].mean * 255).round())
    np.testing.assert_array_equal(pixels("k0.clean.png"), records[0].clean)
    assert records[0].members is not None
    for number, member in enumerate(records[0].members):
        np.testing.assert_array_equal(pixels(f"k0.member-{number:02d}.png"), member)
    assert pixels("k0.variance.png").max() == 255


def test_an_unknown_key_exports_nothing(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(tmp_path / "a", make_layout("zarr"))
    with refused(ConfigError, None, tmp_path / "a", "'k77'"):
        export(open_artifact(tmp_path / "a"), ["k0", "k77"], Location(tmp_path / "out"), "npz")
    assert not (tmp_path / "out").exists()


def test_other_files_are_not_overwritten(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(tmp_path / "a", make_layout("zarr"))
    artifact, out = open_artifact(tmp_path / "a"), Location(tmp_path / "out")
    export(artifact, ["k0"], out, "npz")
    export(artifact, ["k0"], out, "npz")  # the same bytes: nothing to refuse
    out.write("k1.npz", b"precious")
    with refused(ConfigError, None, "/k1.npz: "):
        export(artifact, ["k2", "k1"], out, "npz")
    assert out.names() == ["k0.npz", "k1.npz"]
    assert out.read("k1.npz") == b"precious"
