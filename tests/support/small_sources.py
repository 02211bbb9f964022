"""The smallest files that are sources of images."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def photo(form: str = "PNG", value: int = 0) -> bytes:
    """An encoded image of 4 × 4 pixels of one grey."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(stream, form)
    return stream.getvalue()


def put(folder: Path, *names: str, data: bytes | None = None) -> None:
    """Write files below a folder, by default photos."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo() if data is None else data)


def table(path: Path, **columns: object) -> None:
    """Write a Parquet file, by default of one photo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns or {"image": [photo()]}), path)


def tar(path: Path, *names: str) -> None:
    """Write a tar of photos, by default of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names or ("a.png",):
            info = tarfile.TarInfo(name)
            info.size = len(photo())
            archive.addfile(info, io.BytesIO(photo()))
