"""Cost of listing a source's samples and planning its merge: CPU time and memory per sample.

    rows      Parquet files of a million rows, with images of one byte and 1,000 classes in order
    tars      WebDataset tars, as webdataset writes them, with 10,000 samples of 20 kB and a label. The floor, in the
              same process, is reading the 512-byte header of each member and the size in it
    folder    files named like ImageNet's, of which only those exist whose content goes into the fingerprint; the
              other names are generated instead of walking the disk

Each measurement runs in a separate process, since a process reuses memory that it has freed. Times are CPU times,
because other processes may be running.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from benchmarks.merge_scaling import MEMORY
from benchmarks.report import Bar, Findings, Table, spread
from datamerge.sources import Source, open_source
from datamerge.sources.listing import Listing
from datamerge.sources.opening import open_folder
from datamerge.sources.sample import HASHED_FILES, Columns
from merge_service import MergeConfig
from merge_service.planning import make_plan
from merge_service.turning import Turning
from storage_schemas import Location
from storage_schemas.schema.preprocessing import Preprocessing

KINDS = ("rows", "tars", "folder")
SAMPLES = 1_000_000
NOTE = (
    "CPU time and memory of a process, above those with everything imported. The bar of time is of opening and "
    "planning; of tars, above the floor: 512 bytes read for each member. Folders: with collecting paths and sizes, "
    "without the file system's own work."
)
ROWS, ROWS_A_GROUP = 1_000_000, 1_000
PER_TAR, JPEG = 10_000, 20_000
PER_CLASS, CLASSES = 1_300, 1_000
MOST_MICROSECONDS, MOST_BYTES = 2.0, 80
WARM = 20_000  # makes the folder so large that not all of its files are hashed


@dataclass(frozen=True)
class Taken:
    """Cost of one source and its plan.

    Attributes:
        samples: M, number of samples.
        opened, listed, planned: CPU seconds for opening the source, for the listing that the artifact keeps, and for
            groups and plan.
        held: bytes in memory at the end, with the plan.
        peak: peak bytes in memory.
        floor: CPU seconds for reading a header of each member; of tars only.
    """

    samples: int
    opened: float
    listed: float
    planned: float
    held: int
    peak: int
    floor: float = 0.0


def measure(kind: str, samples: int, grouping: str) -> Taken:
    """Measure in a separate process."""
    command = [sys.executable, "-m", "benchmarks.lists", "--one", kind, str(samples), grouping]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    return Taken(**json.loads(ran.stdout.splitlines()[-1]))


def take(kind: str, samples: int, grouping: str) -> Taken:
    """Measure in this process."""
    settings = {"encoder": "mlp:3x4x4-8-4", "steps": 1, "members": 2} if grouping == "adversarial" else {}
    config = MergeConfig.model_validate({"source": kind, "artifact": "none", "grouping": grouping} | settings)
    folder = Path(tempfile.mkdtemp(prefix="datamerge-lists-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        prepare = {"rows": _rows, "tars": _tars, "folder": _folder}[kind]
        prepare(folder / "warm", WARM)().listing_bytes()  # imports, and what libraries set up once
        source_of = prepare(folder / "source", samples)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before, _ = _memory()
        times = [time.process_time()]
        source = source_of()
        times.append(time.process_time())
        source.listing_bytes()
        times.append(time.process_time())
        plan = make_plan(config, source, None, None, None, Preprocessing(shape=(3, 224, 224)), Turning("ignore"))
        times.append(time.process_time())
        held, peak = _memory()
        floor = _floor(source) if kind == "tars" else 0.0
        assert sum(plan.count(shard) for shard in range(plan.layout.shards)) == plan.layout.groups
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    opened, listed, planned = np.diff(times).tolist()
    return Taken(len(source.samples), opened, listed, planned, held - before, peak - before, floor)


def _rows(folder: Path, samples: int) -> Callable[[], Source]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for number, start in enumerate(range(0, samples, ROWS)):
        places = np.arange(start, min(start + ROWS, samples))
        table = pa.table({"image": pa.array([b"x"] * len(places)), "label": places * CLASSES // samples})
        path = folder / f"data-{number:05d}.parquet"
        pq.write_table(table, path, row_group_size=ROWS_A_GROUP, use_dictionary=False, compression="none")
    del table, places
    return lambda: open_source(folder)


def _tars(folder: Path, samples: int) -> Callable[[], Source]:
    """One tar under many names, since a million images would not fit into memory."""
    import webdataset

    folder.mkdir()
    for number, start in enumerate(range(0, samples, PER_TAR)):
        path = folder / f"data-{number:05d}.tar"
        if number:
            path.hardlink_to(folder / "data-00000.tar")
            continue
        with webdataset.TarWriter(str(path)) as writer:
            for place in range(min(PER_TAR, samples - start)):
                writer.write(
                    {
                        "__key__": f"n01440764/n01440764_{place:05d}",
                        "jpg": b"x" * JPEG,
                        "cls": b"%d" % (place % CLASSES),
                    }
                )
    return lambda: open_source(folder)


def _floor(source: Source) -> float:
    """CPU seconds for reading the 512-byte headers of all members, two per sample."""
    begun = time.process_time()
    for name in source.listing:
        with (Path(source.url) / name).open("rb", buffering=0) as stream:
            for _ in range(2 * PER_TAR):
                int(os.pread(stream.fileno(), 512, 1024)[124:135], 8)
    return time.process_time() - begun


def _folder(folder: Path, samples: int) -> Callable[[], Source]:
    from datamerge.sources.files import Files

    ranked = heapq.nsmallest(HASHED_FILES, _names(samples), lambda name: hashlib.sha256(name.encode()).digest())
    for name in ranked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")

    def opened() -> Source:
        files = Files.of((name, 110_000) for name in _names(samples))
        return open_folder(Listing(Location(folder), {"image": files}), Columns(), None)

    return opened


def _names(samples: int) -> Iterator[str]:
    """Sorted paths like ImageNet's."""
    for start in range(0, samples, PER_CLASS):
        folder = f"n{start // PER_CLASS:08d}"
        yield from sorted(f"train/{folder}/{folder}_{place}.JPEG" for place in range(min(PER_CLASS, samples - start)))


def _memory() -> tuple[int, int]:
    """Current and peak resident bytes of this process."""
    status = Path("/proc/self/status").read_text()
    held, peak = (int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return held, peak


def findings(samples: int, repeats: int) -> Findings:
    """Bars and a table for all kinds and groupings, and once for five times as many samples."""
    found, rows = Findings(notes=[NOTE]), []
    for kind in KINDS:
        for grouping, count, times in (
            ("adversarial", samples, repeats),
            ("label", samples, repeats),
            ("adversarial", 5 * samples, 1),
        ):
            taken = [measure(kind, count, grouping) for _ in range(times)]
            micro = {
                what: [getattr(one, what) / one.samples * 1e6 for one in taken]
                for what in ("opened", "listed", "planned")
            }
            held, peak = ([getattr(one, what) / one.samples for one in taken] for what in ("held", "peak"))
            label = f"{kind}, {grouping}, {count:,}"
            whole = [(one.opened + one.planned - one.floor) / one.samples * 1e6 for one in taken]
            found.bars += [
                Bar(f"µs a sample, {label}", whole, MOST_MICROSECONDS),
                Bar(f"bytes a sample, {label}", held, MOST_BYTES),
            ]
            floor = [one.floor / one.samples * 1e6 for one in taken]
            rows.append([label, *(" ".join(spread(values)) for values in (*micro.values(), floor, held, peak))])
    columns = (
        "source, groups, samples",
        "µs to open",
        "to write the listing",
        "to plan",
        "floor",
        "bytes held",
        "at most",
    )
    found.tables.append(Table("A sample in lists and plans", columns, rows))
    return found


@click.command()
@click.option("--one", type=(click.Choice(KINDS), int, str), help="Kind, samples and grouping to measure here.")
@click.option("--samples", default=SAMPLES, show_default=True, help="Samples; one row has five times as many.")
@click.option("--repeats", default=3, show_default=True)
def main(one: tuple[str, int, str] | None, samples: int, repeats: int) -> None:
    """Print the cost per sample."""
    if one is not None:
        click.echo(json.dumps(asdict(take(*one))))
        return
    found = findings(samples, repeats)
    click.echo("\n".join([*(" | ".join(bar.cells()) for bar in found.bars), found.tables[0].markdown(), NOTE]))


if __name__ == "__main__":
    main()
