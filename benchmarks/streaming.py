"""Streaming training data from a slow server: arm `factors`, 224 × 224 pixels, batches of 32.

    python -m benchmarks.streaming --format webdataset

The server (`benchmarks.remote_server`) and every reader (`benchmarks.streaming_reader`) run in separate processes.
Speeds are groups per second, from the opening of the artifact on, for a consumer that takes each batch as soon as it
is there, except where a pause is given. The speed of the link is that of plain downloads of the same files over 16
connections, converted to groups by the bytes that the arm needs. Both sides of a ratio come from the same round.
Without a limit for all connections the server and its reader use all of a small machine's cores, so the ratio then
measures processor time a byte; with `LINK` it measures how well the link is used.

If `LITDATA_PYTHON` and `MOSAICML_PYTHON` name the interpreters of environments with these libraries,
`benchmarks/peers_streaming.py` reads the same arrays in their formats from the same server.
"""

from __future__ import annotations

import http.client
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np

from benchmarks.reading import SHAPE, _images
from benchmarks.remote_server import Remote, Request, running
from benchmarks.report import Bar, Findings, Table, spread
from benchmarks.streaming_reader import BATCH, FIRST_WINDOW, S3, Seen, ours, seen
from storage_schemas import ArraySpec, ArtifactWriter, ExactMoments, Layout, Location, Record, open_artifact
from storage_schemas.schema.factors import factor_spec, stored_factors
from storage_schemas.schema.record import Array, encode_exact

MEMBERS, WIDTH = 10, 512
DISTINCT = 64  # groups; the others have the same arrays under other keys
NEEDED = ("sum", "factors", "target")  # arrays that the arm reads
CONNECTIONS, PART = 16, 8 * 2**20
STEP = 0.06  # seconds that a consumer spends on a batch
NEAR, FAR, RATE = 0.02, 0.1, 100e6  # seconds per request (twice); bytes per second of a connection
EPOCHS = 8  # one alone takes a fifth of a second where all is in memory, too little to measure
LINK = 400e6  # bytes per second of all connections: two cores serve and read this much without being the limit
ENCODER = f"mlp:3x224x224-2-{WIDTH}"
CRASHES = 6  # number of crashes after which another library is given up
PEERS = {"LitData": "LITDATA_PYTHON", "MosaicML streaming": "MOSAICML_PYTHON"}


@dataclass
class Way:
    """Measurements of one way to read, one value per round.

    Attributes:
        speeds: groups per second.
        firsts: seconds to the first batch.
        cpu: CPU seconds per thousand groups, over all processes of the reader.
        peak: peak MB of the reader's main process.
        requests, sent: number of requests, and bytes that the server sent.
        again: bytes that the server sent more than once.
    """

    speeds: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)

    def add(self, found: Seen, steps: int, log: Iterable[Request] = ()) -> None:
        """Add a round: a run of one epoch of `steps` steps, and the requests of the server in it."""
        log = list(log)
        self.speeds.append(found.speed(steps))
        self.firsts.append(found.first)
        self.cpu.append(1000 * found.cpu / (BATCH * len(found.batches)))
        self.peak.append(found.peak)
        self.requests.append(len(log))
        self.sent.append(sum(one.end - one.start for one in log))
        self.again.append(twice(log))

    def cells(self) -> list[str]:
        """Cells of its row in a table; see `COLUMNS`."""
        columns = (self.firsts, self.cpu, self.peak, self.requests, [sent / 1e6 for sent in self.sent])
        return [*spread(self.speeds), *(spread(values)[0] for values in columns)]


COLUMNS = ("way", "groups/s", "range (rounds)", "first batch, s", "CPU s / 1000 groups", "MB", "requests", "MB sent")


class Rounds:
    """Rounds of all ways to read one artifact, in turn.

    Attributes:
        ways: measurements by name.
        ratios: ratios by name, one value per round.
        crashes: number of crashes of other libraries' readers, which were restarted.
    """

    def __init__(self, folder: Path, format: str, groups: int, per_shard: int, photos: str | None) -> None:
        self.root, self.format, self.steps = folder / "served", format, groups // BATCH
        self.artifact, self._scratch = self.root / "bucket" / format, folder
        self.layout = write(self.artifact, format, groups, per_shard, photos)
        self.needed = needed(self.artifact, self.layout)
        self.ways: dict[str, Way] = defaultdict(Way)
        self.ratios: dict[str, list[float]] = defaultdict(list)
        self.crashes: Counter[str] = Counter()

    def round(self, remote: Remote) -> None:
        """Run every way once."""
        steps, below = self.steps, f"bucket/{self.format}"
        http_url, s3_url = f"{remote.url}/{below}", f"s3://{below}"
        local = ours(str(self.artifact), None, {"steps": steps})
        self.ways["local"].add(local, steps)
        remote.log()
        bare = link(remote, self.artifact, below)
        remote.log()
        floor = min(local.speed(steps), bare / self.needed * self.layout.groups)
        self.ratios["link, MB/s"].append(bare / 1e6)
        cold = self._remote(remote, "http", http_url)
        self.ratios["http, cold"].append(cold.speed(steps) / floor)
        self.ratios["bytes"].append(self.ways["http"].sent[-1] / self.needed)
        self.ratios["first batch"].append(cold.first)
        self.ratios["S3, cold"].append(self._remote(remote, "S3", s3_url).speed(steps) / floor)
        here = ours(str(self.artifact), None, {"steps": EPOCHS * steps})
        copied = self._remote(remote, f"http, {EPOCHS} epochs", http_url, steps=EPOCHS * steps)
        self.ratios["later epochs"].append(copied.later(steps) / here.later(steps))
        self.ratios["no cache"].append(
            self._remote(remote, "http, no cache", http_url, cache="none").speed(steps) / floor
        )
        self._remote(remote, "http, 4 workers", http_url, workers=4)
        self._remote(remote, "http, 4 workers, no cache", http_url, workers=4, cache="none")
        paced = self._remote(remote, f"http, {STEP * 1000:.0f} ms a batch", http_url, pause=STEP)
        self.ratios["waiting"].append(paced.waiting())
        remote.set(total=LINK)
        slower = min(local.speed(steps), link(remote, self.artifact, below) / self.needed * self.layout.groups)
        remote.log()
        for name, url in (("http", http_url), ("S3", s3_url)):
            limited = self._remote(remote, f"{name}, {LINK / 1e6:.0f} MB/s", url)
            self.ratios[f"{name}, limited"].append(limited.speed(steps) / slower)
        remote.set(total=0, latency=FAR)
        far = self._remote(remote, f"http, {FAR * 1000:.0f} ms a request", http_url)
        self.ratios["first batch, far"].append(far.first)
        remote.set(latency=NEAR)
        self.ratios["again"].append(self._killed(remote, http_url) / 1e6)

    def _remote(self, remote: Remote, name: str, url: str, **options: object) -> Seen:
        """Run a reader, with a new cache if none is given."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as cache:
            found = ours(url, remote, {"steps": self.steps, "cache": cache, **options})
        log, _ = remote.log()
        self.ways[name].add(found, self.steps, log)
        return found

    def _killed(self, remote: Remote, url: str) -> int:
        """Bytes that are sent twice when a run is killed half-way and continued."""
        half = self.steps // 2
        with tempfile.TemporaryDirectory(dir=self._scratch) as cache:
            ours(url, remote, {"steps": self.steps, "cache": cache, "pause": STEP}, kill_after=half)
            ours(url, remote, {"steps": self.steps, "start": half, "cache": cache})
        data = [one for one in remote.log()[0] if "/commits/" not in one.path and "/manifest" not in one.path]
        return twice(data)

    def peers(self, remote: Remote) -> None:
        """Read the same arrays in the formats of other libraries, over S3."""
        for name, variable in PEERS.items():
            python = os.environ.get(variable)
            if not python:
                continue
            folder = self.root / "bucket" / variable.lower()
            script = [python, "-P", str(Path(__file__).with_name("peers_streaming.py"))]
            if not folder.exists():
                groups = self._scratch / "groups.npz"
                _save(groups, self.artifact)
                seen([*script, "write", name, str(groups), str(folder), str(self.layout.groups)], {})
            for workers in (0, 4):
                way = f"{name}, {workers} workers" if workers else name
                if self.crashes[way] <= CRASHES and (found := self._peer(remote, way, name, script, folder, workers)):
                    self.ways[way].add(*found)

    def _peer(
        self, remote: Remote, way: str, name: str, script: list[str], folder: Path, workers: int
    ) -> tuple[Seen, int, list[Request]] | None:
        """Run another library's reader, and restart it if it crashes, as MosaicML streaming does; None at the end."""
        while self.crashes[way] <= CRASHES:
            with tempfile.TemporaryDirectory(dir=self._scratch) as cache:
                remote.log()
                arguments = ["read", name, f"s3://bucket/{folder.name}", cache, str(workers)]
                endpoint = {"AWS_ENDPOINT_URL": remote.url, "S3_ENDPOINT_URL": remote.url}
                try:
                    return seen([*script, *arguments], {**S3, **endpoint}), self.steps, remote.log()[0]
                except click.ClickException:
                    self.crashes[way] += 1
        return None

    def findings(self) -> Findings:
        """Bars of the medians, and a table of the ways to read."""
        shard = self.artifact_bytes() / self.layout.shards / 1e6
        limited = f"at {LINK / 1e6:.0f} MB/s in all, cold / min(local, link)"
        bars = [
            Bar(f"http {limited}", self.ratios["http, limited"], 0.8, at_least=True),
            Bar(f"S3 {limited}", self.ratios["S3, limited"], 0.8, at_least=True),
            Bar("http, cold / min(local, link)", self.ratios["http, cold"], 0.8, at_least=True),
            Bar("S3, cold / min(local, link)", self.ratios["S3, cold"], 0.8, at_least=True),
            Bar(f"epochs 2 to {EPOCHS} / local", self.ratios["later epochs"], 0.98, at_least=True),
            Bar(f"waiting after {FIRST_WINDOW} batches, {STEP * 1000:.0f} ms a batch", self.ratios["waiting"], 0.02),
            Bar(f"seconds to the first batch, {NEAR * 1000:.0f} ms", self.ratios["first batch"], 1.0),
            Bar(f"seconds to the first batch, {FAR * 1000:.0f} ms", self.ratios["first batch, far"], 3.0),
            Bar("bytes sent / bytes of the arm's arrays", self.ratios["bytes"], 1.05),
            Bar("MB sent twice, killed and continued", self.ratios["again"], shard),
        ]
        for name in PEERS:
            mine = self.ways["S3"].speeds
            whole = [
                way.speeds for of, way in self.ways.items() if of.startswith(name) and len(way.speeds) == len(mine)
            ]
            if whole:
                best = [max(speeds) for speeds in zip(*whole, strict=True)]
                bars.append(Bar(f"S3, cold / {name}, with or without workers", _over(mine, best), 1.0, at_least=True))
        rows = [[name, *way.cells()] for name, way in self.ways.items()]
        plain = {"no cache / min(local, link)": "no cache", "link, MB/s": "link, MB/s"}
        others = [[text, *spread(self.ratios[name])] for text, name in plain.items()]
        return Findings(
            bars=[Bar(f"{self.format}: {bar.what}", bar.rounds, bar.limit, bar.at_least) for bar in bars],
            tables=[
                Table(f"{self.format}: ways", COLUMNS, rows),
                Table(f"{self.format}: others", ("", "median", "range (rounds)"), others),
            ],
        )

    def artifact_bytes(self) -> int:
        """Bytes of all files of the artifact."""
        return sum(path.stat().st_size for path in self.artifact.rglob("*") if path.is_file())


def run(formats: Iterable[str], groups: int, per_shard: int, rounds: int, photos: str | None) -> Findings:
    """Measure every way in every format; other libraries are compared with tar files, the most similar format."""
    found = Findings()
    for format in formats:
        with tempfile.TemporaryDirectory(prefix="datamerge-streaming-") as scratch:
            ways = Rounds(Path(scratch), format, groups, per_shard, photos)
            with running(ways.root, latency=NEAR, rate=RATE) as remote:
                for _ in range(rounds):
                    ways.round(remote)
                    if format == "webdataset":
                        ways.peers(remote)
            part = ways.findings()
            found.notes += [
                f"{name}: {count} readers crashed{', and it was given up' if count > CRASHES else ''}."
                for name, count in ways.crashes.items()
                if count
            ]
            found.bars += part.bars
            found.tables += part.tables
    found.notes.append(
        f"{groups} groups, {per_shard} a shard, batches of {BATCH}; the server answers after {NEAR * 1000:.0f} ms, "
        f"at {RATE / 1e6:.0f} MB/s a connection, on the same cores. Speeds begin with opening the artifact. "
        f"The arm reads {', '.join(NEEDED)}; the artifact holds scatter too. Of the other libraries: "
        f"{', '.join(name for name, variable in PEERS.items() if os.environ.get(variable)) or 'none'}, with their "
        "default settings and shuffle on; they store the arm's arrays alone and verify nothing."
    )
    return found


def _over(mine: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def _save(path: Path, artifact: Path) -> None:
    """Save the arm's arrays of the distinct groups, for other libraries to write."""
    records = list(islice(open_artifact(artifact).only(NEEDED), DISTINCT))
    arrays: dict[str, Any] = {name: np.stack([record.arrays[name] for record in records]) for name in NEEDED}
    np.savez(path, **arrays)


def write(folder: Path, format: str, groups: int, per_shard: int, photos: str | None) -> Layout:
    """Write an artifact of photos with ten similar members each, as a merge with `factors=1` makes it."""
    arrays = (
        ArraySpec(name="sum", dtype="uint16", shape=SHAPE),
        ArraySpec(name="scatter", dtype="uint16", shape=SHAPE),
        ArraySpec(name="target", dtype="float32", shape=(WIDTH,)),
        factor_spec(1, MEMBERS, 4, SHAPE),
    )
    layout = Layout.model_validate(
        {
            "format": format,
            "encoding": "uint8_moments",
            "arrays": arrays,
            "groups": groups,
            "groups_per_shard": per_shard,
        }
    )
    writer = ArtifactWriter(Location(folder), layout, {"encoder": {"spec": ENCODER}})
    writer.begin({})
    made = list(_arrays(layout, photos, min(DISTINCT, groups)))
    for shard in range(layout.shards):
        numbers = range(shard * per_shard, min((shard + 1) * per_shard, groups))
        writer.commit(
            shard, (Record(f"photo-{n:06d}", MEMBERS, "uint8_moments", made[n % len(made)]) for n in numbers), []
        )
    writer.finish()
    return layout


def _arrays(layout: Layout, photos: str | None, count: int) -> Iterator[dict[str, Array]]:
    rng = np.random.default_rng(0)
    for number, image in enumerate(islice(_images(photos, count), count)):
        members = np.clip(image + rng.integers(-2, 3, (MEMBERS, *SHAPE)), 0, 255).astype(np.uint8)
        yield {
            **encode_exact(ExactMoments.of(members), layout),
            "target": rng.normal(size=WIDTH).astype(np.float32),
            "factors": stored_factors(members, layout, "sketch", 0, f"photo-{number:06d}"),
        }


def needed(folder: Path, layout: Layout) -> int:
    """Bytes of the arrays that the arm reads; compressed in Zarr."""
    if layout.format == "zarr":
        files = (path for name in NEEDED for path in (folder / "groups.zarr" / name).rglob("*"))
        return sum(path.stat().st_size for path in files if path.is_file())
    return layout.groups * sum(spec.nbytes for spec in layout.arrays if spec.name in NEEDED)


def twice(log: Iterable[Request]) -> int:
    """Bytes that were sent more than once."""
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for one in log:
        if one.end > one.start:
            spans[urlsplit(one.path).path].append((one.start, one.end))
    again = 0
    for parts in spans.values():
        reached = 0
        for start, end in sorted(parts):
            again += max(0, min(end, reached) - start)
            reached = max(reached, end)
    return again


def link(remote: Remote, folder: Path, below: str) -> float:
    """Bytes per second of plain downloads of an artifact's files over 16 connections."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    parts = [
        (f"/{below}/{path.relative_to(folder)}", start, min(start + PART, size))
        for path, size in sizes.items()
        for start in range(0, size, PART)
    ]
    host = urlsplit(remote.url).netloc

    def fetch(lane: int) -> None:
        connection, buffer = http.client.HTTPConnection(host), bytearray(2**20)
        for path, start, end in parts[lane::CONNECTIONS]:
            connection.request("GET", path, headers={"Range": f"bytes={start}-{end - 1}"})
            answer = connection.getresponse()
            while answer.readinto(buffer):
                pass
        connection.close()

    began = monotonic()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(fetch, range(CONNECTIONS)))
    return sum(sizes.values()) / (monotonic() - began)


@click.command()
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(["webdataset", "zarr"]), default=["webdataset", "zarr"]
)
@click.option("--groups", default=1024, show_default=True)
@click.option("--per-shard", default=64, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--photos", metavar="SOURCE", help="Folder of images; smooth noise by default.")
def main(formats: Sequence[str], groups: int, per_shard: int, rounds: int, photos: str | None) -> None:
    """Print bars and tables as Markdown."""
    found = run(formats, groups, per_shard, rounds, photos)
    for bar in found.bars:
        click.echo(" | ".join(bar.cells()))
    for table in found.tables:
        click.echo(f"\n{table.markdown()}")


if __name__ == "__main__":
    main()
