"""An artifact with very many shards: opening it, sending it to a data worker, and starting to train on it.

The manifest lists all shards, but only those that the first step reads are made.
"""

from __future__ import annotations

import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from benchmarks import peak
from storage_schemas import ArtifactWriter, ExactMoments, Layout, Location, Record
from storage_schemas.schema.columns import Columns
from storage_schemas.schema.manifest import MANIFEST, ShardEntry, commit_path, dump
from storage_schemas.schema.record import encode_exact
from trainer import TrainConfig
from trainer.run.job import make_job

SHAPE, WIDTH, MEMBERS, GROUPS = (3, 8, 8), 8, 4, 256
FEW = 128  # shards of the artifact that the start-up time is compared with
ENCODER = f"mlp:3x8x8-8-{WIDTH}"
# Runs in a separate process, so that imports do not depend on earlier measurements.
OPEN = """
import json, pickle, sys, time
from storage_schemas import open_artifact
seconds = [time.perf_counter()]
artifact = open_artifact(sys.argv[1])
seconds.append(time.perf_counter())
data = pickle.dumps(artifact)
seconds.append(time.perf_counter())
pickle.loads(data)
seconds.append(time.perf_counter())
parts = [after - before for before, after in zip(seconds, seconds[1:])]
status = open('/proc/self/status').read()
print(json.dumps([*parts, len(data), int(status.partition('VmHWM:')[2].split()[0])]))
"""


@dataclass(frozen=True)
class Opened:
    """Seconds to open an artifact, to pickle it for a data worker and to unpickle it there; MB sent; peak MB."""

    open: float
    pack: float
    unpack: float
    sent: float
    peak: float


@dataclass(frozen=True)
class Started:
    """`datamerge train` for one step, including imports: wall seconds, CPU seconds and peak MB."""

    seconds: float
    cpu: float
    peak: float


@click.command()
@click.option("--shards", default=200_000, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Starts on many and on few shards, in turn.")
def main(shards: int, rounds: int) -> None:
    """Print seconds and MB."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = write(Path(scratch, "artifact"), shards)
        found = opened(folder)
        click.echo(
            f"{shards} shards: opened in {found.open:.2f} s and {found.peak:.0f} MB; {found.sent:.0f} MB for a data "
            f"worker, packed in {found.pack:.2f} s and unpacked in {found.unpack:.2f} s"
        )
        folders = {FEW: write(Path(scratch, "few"), FEW), shards: folder}
        starts: dict[int, list[Started]] = {count: [] for count in folders}
        for number in range(rounds):
            for count, place in folders.items():
                starts[count].append(started(place, Path(scratch, f"run-{count}-{number}")))
        for count, found_here in starts.items():
            cpu, seconds = ([getattr(one, name) for one in found_here] for name in ("cpu", "seconds"))
            click.echo(
                f"`datamerge train` for one step on {count} shards: {statistics.median(cpu):.2f} s of processor "
                f"({min(cpu):.2f} to {max(cpu):.2f}), {statistics.median(seconds):.1f} s in all "
                f"({min(seconds):.1f} to {max(seconds):.1f}), {max(one.peak for one in found_here):.0f} MB"
            )


def write(folder: Path, shards: int) -> Path:
    """An artifact of `count` shards of 256 groups, without the shards that the first step does not read."""
    arrays = (
        {"name": "sum", "dtype": "uint16", "shape": SHAPE},
        {"name": "scatter", "dtype": "uint16", "shape": SHAPE},
        {"name": "target", "dtype": "float32", "shape": (WIDTH,)},
    )
    document = {"format": "webdataset", "encoding": "uint8_moments", "arrays": arrays, "groups": GROUPS * shards}
    layout = Layout.model_validate({**document, "groups_per_shard": GROUPS})
    writer = ArtifactWriter(Location(folder), layout, {"encoder": {"spec": ENCODER}})
    writer.begin({})
    entries = [
        ShardEntry(
            shard=number,
            groups=GROUPS,
            rejected=0,
            bytes=GROUPS * layout.bytes_per_record,
            commit_sha256=hashlib.sha256(str(number).encode()).hexdigest(),
            key_range=(f"n{number:08d}-{0:06d}", f"n{number:08d}-{GROUPS - 1:06d}"),
        )
        for number in range(shards)
    ]
    _list(writer, entries)
    order = make_job(TrainConfig(artifact=str(folder), run=f"{folder}-run", steps=1)).order
    for shard in {int(index) // GROUPS for index in order.batch(0)}:
        commit = writer.commit(shard, [_record(shard, number, layout) for number in range(GROUPS)], [])
        sidecar = (folder / commit_path(shard)).read_bytes()
        entries[shard] = ShardEntry.of(commit, hashlib.sha256(sidecar).hexdigest())
    _list(writer, entries)
    return folder


def _list(writer: ArtifactWriter, entries: list[ShardEntry]) -> None:
    """Write a manifest of these shards."""
    manifest = writer._manifest(Columns(ShardEntry, entries), ())
    writer.location.write(MANIFEST, dump(manifest))


def _record(shard: int, number: int, layout: Layout) -> Record:
    rng = np.random.default_rng([shard, number])
    members = rng.integers(100, 103, (MEMBERS, *SHAPE)).astype(np.uint8)
    arrays = {**encode_exact(ExactMoments.of(members), layout), "target": rng.normal(size=WIDTH).astype(np.float32)}
    return Record(f"n{shard:08d}-{number:06d}", MEMBERS, "uint8_moments", arrays)


def opened(folder: Path) -> Opened:
    """Open an artifact in a process of its own, and pack it as for a data worker."""
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder)], check=True, capture_output=True, text=True)
    open_, pack, unpack, sent, kilobytes = json.loads(done.stdout)
    return Opened(open_, pack, unpack, sent / 1e6, kilobytes * 1024 / 1e6)


def started(folder: Path, run: Path) -> Started:
    """Run `datamerge train` for one step."""
    command = [sys.executable, "-m", "datamerge", "train", str(folder), str(run), "--steps", "1", "--device", "cpu"]
    before = _seconds_of_children()
    ran = peak.run(command, {})
    if ran.returncode:
        raise click.ClickException(ran.stderr)
    return Started(ran.seconds, _seconds_of_children() - before, ran.process)


def _seconds_of_children() -> float:
    """On a processor, of all that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
