"""Speed of the hot loops on a GPU, measured within five minutes; `make gpu` runs it after the tests of tests/gpu.

    python -m benchmarks.gpu                all parts; the report goes to benchmarks/results/gpu_DEVICE_DATE.md
    python -m benchmarks.gpu attack feed    some of the parts
    python -m benchmarks.gpu --rehearse     the same on this CPU with tiny networks; the figures mean nothing

Every part of `benchmarks.gpu_parts` runs in a separate process with a time limit, and prints its rows as it measures.
If a part fails, hangs or loses its GPU context, a row says so and the next part starts. Shares are relative to the
rates that the first part measures on this GPU. Figures are medians of five repeats after a warm-up (attacks and
networks in float32: two).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from benchmarks.gpu_parts import PARTS
from benchmarks.gpu_rows import RATES, Row
from benchmarks.report import Circumstances, Findings, Table, render

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("part", "what", "ms", "share of measured peak", "a second", "GB")


@click.command()
@click.argument("names", nargs=-1, metavar="[PART]…", type=click.Choice(list(PARTS)))
@click.option("--rehearse", is_flag=True, help="Tiny sizes on the CPU.")
@click.option("--seconds", default=280.0, show_default=True, help="No part starts after this time.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the report.")
@click.option("--only", hidden=True, type=click.Choice(list(PARTS)), help="Run one part in this process; print JSON.")
@click.option("--rates", hidden=True, default="{}")
def main(names: Sequence[str], rehearse: bool, seconds: float, output: Path, only: str | None, rates: str) -> None:
    """Time attacks, merges and training on a GPU."""
    if only is not None:
        for row in PARTS[only].work(rehearse, json.loads(rates)):
            click.echo(row.to_json())
        return
    if not (rehearse or torch.cuda.is_available()):
        raise click.ClickException("torch sees no GPU here; `--rehearse` does the same on the CPU, in tiny")
    started, load = time.monotonic(), os.getloadavg()[0]
    where = Circumstances.here("cpu" if rehearse else "cuda")
    command = " ".join(["python -m benchmarks.gpu", *names, *(["--rehearse"] if rehearse else [])])
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"gpu_{where.slug}_{where.day}.md"
    click.echo(" | ".join(COLUMNS))
    rows: list[Row] = []
    for name in names or PARTS:
        left = seconds - (time.monotonic() - started)
        limit = left if rehearse else min(PARTS[name].limit, left)  # limits hold for an otherwise idle GPU machine
        rows += _run(name, rehearse, rows, limit) if left > 0 else [_failed(name, "no time left")]
        # Rewrite the report after each part: the machine may be taken away before the last one ends.
        found = Findings(tables=[Table("Measured", COLUMNS, [row.cells() for row in rows])])
        path.write_text(render("gpu", found, where, command, time.monotonic() - started, load), "utf-8")
    click.echo(f"{path}: {len(rows)} rows, {sum(row.failed for row in rows)} of them failures")


def _run(name: str, rehearse: bool, before: Sequence[Row], limit: float) -> list[Row]:
    """Run one part in a separate process; returns its rows, and a failure row if it ended early."""
    rates = {row.what: row.rate for row in before if row.part == RATES and row.rate is not None}
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", name, "--rates", json.dumps(rates)]
    rows: list[Row] = []
    said: list[str] = []
    with subprocess.Popen(
        [*command, *(["--rehearse"] if rehearse else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        # Also kill the processes that it started, which would stay on the GPU.
        timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        listener = threading.Thread(target=lambda: said.extend(process.stderr or ()))  # or a full pipe would stop it
        listener.start()
        for line in process.stdout or ():
            try:
                rows.append(Row.from_json(line))
            except ValueError:  # what a library prints
                continue
            click.echo(" | ".join(rows[-1].cells()))
        code = process.wait()
        late = not timer.is_alive()
        timer.cancel()
        listener.join()
    if code:
        last = next((line.strip() for line in reversed(said) if line.strip()), f"exit code {code}")
        rows.append(_failed(name, f"ended after {limit:.0f} s" if late else last[:300]))
        click.echo(" | ".join(rows[-1].cells()))
    return rows


def _failed(name: str, reason: str) -> Row:
    return Row(name, f"failed: {reason.replace('|', '/')}", failed=True)


if __name__ == "__main__":
    main()
