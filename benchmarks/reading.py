"""Reading an artifact, compared with the floor and with peers, on the same files in one process.

Ratios are of CPU seconds: readers run in data loader workers, one per core, and tensorstore uses several threads.

tar     compared with copying the same bytes out of a memory map, with stock webdataset on the same files, and with
        LitData on the same records in its own chunks
zarr    compared with tensorstore and zarr-python on the same store, record by record
index   opening a manifest of many shards; looking up a key in it
memory  private bytes after iterating over one shard, and over all
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import webdataset
import zarr

from datamerge.sources import decode, open_source
from storage_schemas import (
    Artifact,
    ArtifactWriter,
    ExactMoments,
    Layout,
    Location,
    Record,
    open_artifact,
)
from storage_schemas.schema.columns import Columns
from storage_schemas.schema.manifest import Manifest, ShardEntry, dump
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.record import encode_exact

SHAPE, MEMBERS = (3, 224, 224), 10

Seconds = dict[str, list[tuple[float, float]]]
"""(CPU, wall) seconds of every round, by reader."""


@click.command()
@click.option("--photos", metavar="SOURCE", help="Folder or Parquet file of images; smooth noise by default.")
@click.option("--records", default=256, show_default=True)
@click.option("--shards", default=2, show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--manifest-shards", default=10_000, show_default=True)
def main(photos: str | None, records: int, shards: int, repeats: int, manifest_shards: int) -> None:
    """Print ratios of medians over interleaved rounds."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        artifacts = {
            format: write(folder / format, format, photos, records, shards) for format in ("webdataset", "zarr")
        }
        for format, read, peers in (
            ("webdataset", tar_seconds, {"copy of a memory map": 0.5, "stock webdataset": 3.0}),
            ("zarr", zarr_seconds, {"tensorstore": 0.8, "zarr-python": 0.8}),
        ):
            times = read(artifacts[format], repeats)
            _report(format, times, records, artifacts[format].manifest.layout.bytes_per_record)
            for peer, bar in peers.items():
                if peer in times:
                    ratio = statistics.median(speed_over(times, peer))
                    click.echo(f"  speed over that of {peer}: {ratio:.2f} (bar {bar})")
        opened, looked_up = open_seconds(folder / "many", artifacts["webdataset"].manifest, manifest_shards)
        click.echo(
            f"index: {manifest_shards} shards: opened in {opened:.3f} s (bar 1), shard of a key found in "
            f"{looked_up * 1e3:.2f} ms"
        )
        _memory(artifacts)


def _images(photos: str | None, count: int) -> Iterator[npt.NDArray[np.uint8]]:
    if photos is None:
        for number in range(count):
            coarse = np.random.default_rng(number).integers(0, 256, (3, 15, 15)).astype(np.float64)
            fine = coarse.repeat(16, axis=1).repeat(16, axis=2)
            smooth = sum(np.roll(fine, (i, j), (1, 2)) for i in range(0, 16, 5) for j in range(0, 16, 5)) / 16
            yield np.asarray(smooth)[:, 8:232, 8:232].round().astype(np.uint8)
        return
    source = open_source(photos, limit_first=count)
    for sample in source.samples:
        yield decode(source.reader.read(sample), Preprocessing(shape=SHAPE))


def write(folder: Path, format: str, photos: str | None, records: int, shards: int) -> Artifact:
    """Groups with independent perturbations of up to two levels, which compress worst."""
    arrays = (
        {"name": "sum", "dtype": "uint16", "shape": SHAPE},
        {"name": "scatter", "dtype": "uint16", "shape": SHAPE},
        {"name": "target", "dtype": "float32", "shape": (512,)},
    )
    document = {"format": format, "encoding": "uint8_moments", "arrays": arrays, "groups": records}
    layout = Layout.model_validate({**document, "groups_per_shard": -(-records // shards)})
    writer = ArtifactWriter(Location(folder), layout, {})
    writer.begin({})
    groups = []
    for number, image in enumerate(_images(photos, records)):
        rng = np.random.default_rng([1, number])
        members = np.clip(image + rng.integers(-2, 3, (MEMBERS, *SHAPE)), 0, 255).astype(np.uint8)
        moments = encode_exact(ExactMoments.of(members), layout)
        target = rng.normal(size=512).astype(np.float32)
        groups.append(Record(f"photo-{number:06d}", MEMBERS, "uint8_moments", {**moments, "target": target}))
    for shard in range(layout.shards):
        first = shard * layout.groups_per_shard
        writer.commit(shard, groups[first : first + layout.groups_per_shard], [])
    writer.finish()
    return open_artifact(folder)


def tar_seconds(artifact: Artifact, repeats: int) -> Seconds:
    """Time to read all records: bare copy, webdataset, LitData (if installed), and ours with all verification."""
    folder, per_record = artifact.location.root, artifact.manifest.layout.bytes_per_record
    paths = [f"{folder}/shards/{shard:05d}.tar" for shard in range(artifact.manifest.layout.shards)]
    buffer = np.empty(per_record, np.uint8)

    def floor() -> None:
        for path, size in zip(paths, artifact.shard_sizes, strict=True):
            mapped = np.memmap(path, np.uint8, mode="r")
            for index in range(size):
                np.copyto(buffer, mapped[index * per_record : (index + 1) * per_record])

    def stock() -> None:
        for _ in webdataset.WebDataset(paths, shardshuffle=False).decode():
            pass

    ways: dict[str, Callable[[], None]] = {"copy of a memory map": floor, "stock webdataset": stock}
    if importlib.util.find_spec("litdata") is None:
        click.echo("litdata is not installed: left out")
    else:
        ways["LitData"] = _with_litdata(artifact)
    for mode in ("record", "shard", "off"):
        ways[f"datamerge, verify={mode}"] = lambda mode=mode: _iterate(open_artifact(folder, verify=mode))  # type: ignore[misc]  # bound now
    return _interleaved(ways, repeats)


def _with_litdata(artifact: Artifact) -> Callable[[], None]:
    """LitData's dataset on the same arrays, in chunks of as many records, read in order without verification."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder = f"{artifact.location.root}-litdata"
    if not Path(folder).exists():
        writer = BinaryWriter(folder, chunk_size=artifact.manifest.layout.groups_per_shard)
        for number, record in enumerate(artifact):
            writer[number] = {"key": record.key, "count": record.count, **record.arrays}
        writer.done()
        writer.merge()

    def read() -> None:
        for _ in StreamingDataset(folder):
            pass

    return read


def zarr_seconds(artifact: Artifact, repeats: int) -> Seconds:
    """Time to read all records: tensorstore (if installed), zarr-python, and ours."""
    layout, folder = artifact.manifest.layout, Path(artifact.location.root)

    def with_tensorstore() -> None:
        stores = []
        for spec in layout.arrays:
            kvstore = {"driver": "file", "path": str(folder / "groups.zarr" / spec.name)}
            stores.append(tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result())
        for row in range(layout.groups):
            for pending in [store[row].read() for store in stores]:
                pending.result()

    def with_zarr_python() -> None:
        arrays = [zarr.open_array(str(folder / "groups.zarr" / spec.name), mode="r") for spec in layout.arrays]
        for row in range(layout.groups):
            for array in arrays:
                array[row]

    ways: dict[str, Callable[[], None]] = {"zarr-python": with_zarr_python}
    try:
        import tensorstore

        ways["tensorstore"] = with_tensorstore
    except ImportError:
        click.echo("tensorstore is not installed: left out")
    for mode in ("record", "shard", "off"):
        ways[f"datamerge, verify={mode}"] = lambda mode=mode: _iterate(open_artifact(folder, verify=mode))  # type: ignore[misc]  # bound now
    return _interleaved(ways, repeats)


def _iterate(artifact: Artifact) -> None:
    for _ in artifact:
        pass


def _interleaved(ways: dict[str, Callable[[], None]], repeats: int) -> Seconds:
    times: Seconds = {name: [] for name in ways}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing to the garbage collector
        for round in range(repeats + 1):
            for name, work in ways.items():
                cpu, wall = time.process_time(), time.perf_counter()
                work()
                if round:  # the first round fills the page cache
                    times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
                gc.collect()  # not timed: its time depends on the number of objects in this process
    return times


def _report(title: str, times: Seconds, records: int, per_record: int) -> None:
    click.echo(f"{title}: {records} records of {per_record / 1e6:.2f} MB")
    for name, values in times.items():
        cpu, wall = (statistics.median(column) for column in zip(*values, strict=True))
        rate = records * per_record / 1e6
        speeds = f"{rate / cpu:7.0f} MB per CPU second, {rate / wall:7.0f} MB/s, {records / wall:6.0f} records/s"
        click.echo(f"  {name:26} {speeds}")


def speed_over(times: Seconds, peer: str) -> list[float]:
    """The peer's CPU time over ours, for every round."""
    ours = times["datamerge, verify=record"]
    return [theirs[0] / mine[0] for theirs, mine in zip(times[peer], ours, strict=True)]


def open_seconds(folder: Path, manifest: Manifest, shards: int) -> tuple[float, float]:
    """Seconds to open a manifest of `shards` shards of 256 groups, and to find the shard of a key.

    Only the sidecars that the look-up needs exist.
    """
    entries = (
        ShardEntry(
            shard=number,
            groups=256,
            rejected=0,
            bytes=1,
            commit_sha256="0" * 64,
            key_range=(f"photo-{number * 256:09d}", f"photo-{number * 256 + 255:09d}"),
        )
        for number in range(shards)
    )
    layout = manifest.layout.model_copy(update={"groups": 256 * shards, "groups_per_shard": 256})
    data = dump(manifest.model_copy(update={"shards": Columns(ShardEntry, entries), "layout": layout}))
    Location(folder).write("manifest.json", data)
    started = time.perf_counter()
    artifact = open_artifact(folder)
    opened = time.perf_counter() - started
    started = time.perf_counter()
    with contextlib.suppress(KeyError):
        artifact.index_of("photo-")
    return opened, time.perf_counter() - started


def _memory(artifacts: dict[str, Artifact]) -> None:
    for format, artifact in artifacts.items():
        one = open_artifact(artifact.location.root)
        for offset in range(one.shard_sizes[0]):
            one.read(0, offset)
        first = _private_bytes()
        _iterate(one)
        total = artifact.manifest.layout.bytes_per_record * len(artifact)
        click.echo(
            f"memory: {format}: {first / 1e6:.0f} MB after one shard, {_private_bytes() / 1e6:.0f} MB after all "
            f"{len(artifact)} records of {total / 1e6:.0f} MB"
        )


def _private_bytes() -> int:
    """Private memory of this process in bytes; pages of mapped files belong to the page cache."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
