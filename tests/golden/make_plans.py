"""Writes small sources of every kind and the hashes of their plans: `python -m tests.golden.make_plans`.

Run it once and commit the result: later releases have to make the same plans. The sources are committed too, because
the bytes of tables and tars depend on the libraries that write them.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.support.plans import cases, plan_of

FOLDER = Path(__file__).parent / "plans"
COUNT = 11
LABELS = [number * number % 3 for number in range(COUNT)]
SITES = [f"site {label} {number % 2}" for number, label in enumerate(LABELS)]


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 20 * number, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_folders() -> None:
    # Names with the same key, a name that is not ASCII, and folders that sort differently from the files in them.
    names = ["a b", "a_b", "a-b", "ünï", "c", "d/e", "f.x", "g", "h", "i", "j"]
    for number, name in enumerate(names):
        file = FOLDER / "folder" / ("cat", "cat-2", "dog")[LABELS[number]] / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    table = FOLDER / "table"
    table.mkdir(parents=True)
    for number in range(COUNT):
        (table / f"{number}.png").write_bytes(png(number))
    rows = [f"{number}.png,{LABELS[number]},{SITES[number]}" for number in reversed(range(COUNT))]
    (table / "labels.csv").write_text("\n".join(["file,label,site", *rows, ""]))


def write_tables() -> None:
    images = [{"bytes": png(number), "path": None} for number in range(COUNT)]
    table = pa.table({"image": images, "label": LABELS, "site": SITES})
    for folder in ("rows", "arrow"):
        (FOLDER / folder).mkdir()
    pq.write_table(table.slice(0, 7), FOLDER / "rows" / "b.parquet", row_group_size=3)
    pq.write_table(table.slice(7), FOLDER / "rows" / "c.parquet", row_group_size=3)
    for name, part in (("b", table.slice(0, 7)), ("c", table.slice(7))):
        with (
            pa.OSFile(str(FOLDER / "arrow" / f"{name}.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, part.schema) as out,
        ):
            out.write_table(part, max_chunksize=3)
    arrays = np.stack([np.full((4, 4), 20 * number, np.uint8) for number in range(COUNT)])
    np.savez_compressed(FOLDER / "arrays.npz", images=arrays, labels=np.array(LABELS), site=np.array(SITES))


def write_tars() -> None:
    (FOLDER / "tars").mkdir()
    for name, numbers in (("00000", range(6)), ("00001", range(6, COUNT))):
        with tarfile.open(FOLDER / "tars" / f"{name}.tar", "w") as tar:
            for number in numbers:
                parts = {"png": png(number), "cls": str(LABELS[number]).encode()}
                parts["json"] = json.dumps({"site": SITES[number]}).encode()
                for extension, data in parts.items():
                    info = tarfile.TarInfo(f"{'x#y/' if number == 2 else ''}{number:03d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    write_folders()
    write_tables()
    write_tars()
    plans = {f"{source} {grouping}": plan_of(FOLDER, source, grouping) for source, grouping in cases()}
    (FOLDER / "plans.json").write_text(json.dumps(plans, indent=1) + "\n")
