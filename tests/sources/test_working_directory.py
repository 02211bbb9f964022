"""Readers of sources with relative paths do not depend on the working directory of their process."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamerge.sources import decode, open_source
from storage_schemas.schema.preprocessing import Preprocessing

NAMES = {
    "folder": "photos",
    "dotted folder": "../here/photos",
    "table": "x.parquet",
    "folder of tables": "tables",
    "tar": "x.tar",
    "pattern": "x*.tar",
    "braces": "x{,2}.tar",
    "archive": "x.npz",
}


def _write(folder: Path, grey: int) -> None:
    """One source of each kind, with pixels of this grey level."""
    pixels = np.full((4, 4, 3), grey, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (folder / "photos").mkdir(parents=True)
    (folder / "tables").mkdir()
    (folder / "photos" / "0.png").write_bytes(buffer.getvalue())
    for path in ("x.parquet", "tables/0.parquet"):
        pq.write_table(pa.table({"image": [buffer.getvalue()]}), folder / path)
    np.savez(folder / "x.npz", images=pixels[None])
    for name in ("x.tar", "x2.tar"):
        with tarfile.open(folder / name, "w") as tar:
            info = tarfile.TarInfo("0.png")
            info.size = buffer.getbuffer().nbytes
            tar.addfile(info, io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("kind", NAMES)
def test_readers_read_the_same_files_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Ray starts workers in other folders, where the same names may be other images."""
    for folder, grey in (("here", 10), ("there", 200)):
        _write(tmp_path / folder, grey)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    source = open_source(NAMES[kind])
    sent = pickle.dumps(source.reader)
    for folder in ("there", "empty"):
        monkeypatch.chdir(tmp_path / folder)
        reader = pickle.loads(sent)
        assert decode(reader.read(source.samples[0]), Preprocessing(shape=(3, 4, 4))).max() == 10
