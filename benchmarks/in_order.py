"""Whole remote artifacts: reading in storage order, converting, comparing, combining and verifying.

    python -m benchmarks.in_order --groups 512

The server of `benchmarks.remote_server` waits 20 ms per request and sends 100 MB/s per connection. Seconds are those
of the whole work in this process, including opening the artifact; output goes to the local disk.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import click

from benchmarks.remote_server import Request, running
from benchmarks.report import Table
from benchmarks.streaming import NEAR, RATE, write
from storage_schemas import Artifact, Cache, Location, open_artifact
from storage_schemas.operations.convert import convert
from storage_schemas.operations.diff import diff
from storage_schemas.verify import verify

COLUMNS = ("format", "what", "s", "CPU s", "s to the first record", "requests", "at a time", "MB sent")


@click.command()
@click.option("--groups", default=512, show_default=True)
@click.option("--per-shard", default=64, show_default=True)
def main(groups: int, per_shard: int) -> None:
    """Print the cost of each kind of work."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        served = Path(scratch, "served")
        for format in ("webdataset", "zarr"):
            write(served / format, format, groups, per_shard, None)
        with running(served, latency=NEAR, rate=RATE) as remote:
            for format in ("webdataset", "zarr"):
                url, out = f"{remote.url}/{format}", Path(scratch, f"out-{format}")
                cache = Cache(Path(scratch, f"cache-{format}"))
                ways: dict[str, Callable[[], float | None]] = {
                    "read": partial(_uncached, url),
                    "read into a cache": partial(_cached, url, cache),
                    "read from the cache": partial(_cached, url, cache),
                    "verify": partial(_verify, url),
                    "convert to float32": partial(_convert, url, out, format),
                    "diff with a local copy": partial(_diff, url, served / format),
                }
                for what, work in ways.items():
                    remote.log()
                    wall, cpu = time.perf_counter(), time.process_time()
                    first = work()
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    log, _ = remote.log()
                    rows.append([format, what, f"{wall:.2f}", f"{cpu:.2f}", _text(first), *_asked(log)])
                    click.echo(" | ".join(rows[-1]), err=True)
    click.echo(Table(f"{groups} groups in shards of {per_shard}", COLUMNS, rows).markdown())


def _read(artifact: Artifact) -> float:
    """Read all records; returns the seconds until the first one."""
    started, first = time.perf_counter(), 0.0
    for _ in artifact:
        first = first or time.perf_counter() - started
    return first


def _uncached(url: str) -> float:
    return _read(open_artifact(url))


def _cached(url: str, cache: Cache) -> float:
    return _read(open_artifact(url, cache=cache))


def _verify(url: str) -> None:
    if verify(Location(url)).problems:
        raise click.ClickException(f"{url} is damaged")


def _convert(url: str, out: Path, format: str) -> None:
    convert(open_artifact(url), Location(out), "zarr" if format == "zarr" else "webdataset", "float32")


def _diff(url: str, copy: Path) -> None:
    if not diff(open_artifact(url), open_artifact(copy)).equal:
        raise click.ClickException(f"{url} and {copy} differ")


def _asked(log: Iterable[Request]) -> list[str]:
    """Number of requests, most concurrent requests, and MB sent."""
    log = list(log)
    changes = sorted([(one.began, 1) for one in log] + [(one.ended, -1) for one in log])
    at_a_time = most = 0
    for _, change in changes:
        at_a_time += change
        most = max(most, at_a_time)
    return [str(len(log)), str(most), f"{sum(one.end - one.start for one in log) / 1e6:.0f}"]


def _text(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"


if __name__ == "__main__":
    main()
