"""All benchmarks in one command, with peers measured in the same run; reports and plots go to benchmarks/results.

    make bench                              all themes on two CPU cores
    make bench BENCH_FLAGS=--gpu            the same with attacks and training steps on a GPU
    python -m benchmarks.run --theme merge  one theme

A theme's report is written when the theme ends. With $DATAMERGE_DATA the photos below it in nips17/images are used,
smooth noise otherwise; then the bar of bytes is left out, which only holds for photos.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from benchmarks import lists, many_shards, merge_scaling, pgd, planning, reading, storage, streaming, training
from benchmarks.report import NOT_COMPARED, Bar, Circumstances, Curve, Findings, Table, plot, render, spread

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Sizes:
    """Sizes of all themes.

    Attributes:
        encoder, small_encoder: `encoder` is used in `attack`, `storage` and the arms, `small_encoder` elsewhere.
        batch: images per attack or training step.
        repeats: interleaved rounds.
        records: records read from each format.
        most_shards: shards of the largest job without an attack.
        many_shards: shards of the largest manifest.
        streamed: groups read from a server, in 16 shards.
        listed: samples of the measured lists; one list has five times as many.
        scale: factor of the groups of the planned jobs.
    """

    device: str = "cpu"
    encoder: str = "timm:resnet18"
    small_encoder: str = "timm:test_resnet"
    batch: int = 2
    members: int = 10
    steps: int = 10
    repeats: int = 5
    jobs: int = 2
    blocks: int = 20
    records: int = 128
    photos: int = 4
    most_shards: int = 1000
    many_shards: int = 200_000
    streamed: int = 2048
    listed: int = lists.SAMPLES
    groups_per_shard: int = 4
    scale: int = 1


CPU = Sizes()
GPU = Sizes(
    device="cuda",
    encoder="open_clip:ViT-B-32",
    small_encoder="open_clip:ViT-B-32",
    batch=64,
    photos=32,
    groups_per_shard=64,
    scale=8,
)
TINY = Sizes(
    encoder="mlp:3x32x32-16-8",
    small_encoder="mlp:3x32x32-16-8",
    members=3,
    steps=2,
    repeats=2,
    jobs=1,
    blocks=4,
    records=8,
    photos=2,
    most_shards=10,
    many_shards=100,
    streamed=512,
    listed=20_000,
    groups_per_shard=1,
)


def attack(sizes: Sizes, photos: Path | None) -> Findings:
    """PGD compared with its floor, torchattacks and Foolbox."""
    rounds, reached = pgd.measure(sizes.encoder, sizes.batch, sizes.steps, sizes.repeats, sizes.device)
    found = Findings()
    for floor in ("floor, as built", "floor"):
        found.bars.append(Bar(f"PGD / {floor}", [r["ours"] / r[floor] for r in rounds], 1.05))
    for peer in ("torchattacks", "foolbox"):
        for name in (f"{peer}, as built", peer):
            ratios = [r[name] / r["ours"] for r in rounds if name in r]
            found.bars.append(Bar(f"{name} / PGD", ratios, 1.3, at_least=True))
        ratios = [r[peer] / r["ours, bfloat16"] for r in rounds if peer in r]
        found.bars.append(Bar(f"{peer} / PGD in bfloat16", ratios, 1.3, at_least=True))
        for own in ("ours", "ours, bfloat16") if peer in reached else ():
            label = f"loss of {own} / of {peer}"
            found.bars.append(Bar(label, [reached[own] / reached[peer]], 0.99, at_least=True))
    rows = [[name, *spread([r[name] for r in rounds]), f"{loss:.5f}"] for name, loss in reached.items()]
    title = f"Seconds: {sizes.encoder}, batch {sizes.batch}, {sizes.steps} steps"
    found.tables.append(Table(title, ("attack", "median", "range (rounds)", "loss"), rows))
    found.notes.append(
        "`as built`: the network without channels-last weights. The floor's loss is that of no attack. "
        "Losses are those of a float32 network, whatever the attack computed in."
    )
    return found


def bytes_stored(sizes: Sizes, photos: Path | None) -> Findings:
    """Bytes per value of a real merge of photos."""
    found, rows = Findings(), []
    settings = {"encoder": sizes.encoder, "epsilon": "2/255", "device": sizes.device}
    counts = {"steps": sizes.steps, "limit_first": sizes.photos, "members": sizes.members}
    volumes = []
    for format in ("zarr", "webdataset") if photos is not None else ():
        volumes.append(storage.bytes_a_value(str(photos), format=format, **settings, **counts))
        rows.append([format, f"{volumes[-1]:.2f}"])
    found.bars.append(Bar("bytes a value, Zarr", volumes[:1], 2.2))
    if photos is None:
        found.notes.append("No photos: DATAMERGE_DATA is not set, or has no nips17/images.")
    title = f"Bytes a value: {sizes.photos} photos, N = {sizes.members}, ε = 2/255, {sizes.encoder} (float32: 8 raw)"
    found.tables.append(Table(title, ("format", "bytes a value"), rows))
    return found


def read(sizes: Sizes, photos: Path | None) -> Findings:
    """Tar and Zarr shards compared with a memory map, webdataset, tensorstore and zarr-python."""
    found = Findings(notes=["Ratios and seconds are of CPU time: readers run in workers, one a core.", NOT_COMPARED])
    peers = {
        "webdataset": {"copy of a memory map": 0.5, "stock webdataset": 3.0},
        "zarr": {"tensorstore": 0.8, "zarr-python": 0.8},
    }
    ways = {"webdataset": reading.tar_seconds, "zarr": reading.zarr_seconds}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for format, limits in peers.items():
            folder = Path(scratch, format)
            artifact = reading.write(folder, format, str(photos) if photos else None, sizes.records, 2)
            times = ways[format](artifact, sizes.repeats)
            for peer, limit in limits.items():
                ratios = reading.speed_over(times, peer) if peer in times else []
                found.bars.append(Bar(f"{format}: speed / that of {peer}", ratios, limit, at_least=True))
            for name, pairs in times.items():
                rows.append([format, name, *spread([sizes.records / cpu for cpu, _ in pairs])])
        line = []
        for shards in (10, 100, 1000, 10_000):
            opened = reading.open_seconds(Path(scratch, f"many-{shards}"), artifact.manifest, shards)[0]
            line.append((float(shards), opened))
        _many_shards(found, Path(scratch), sizes.many_shards)
    found.bars.append(Bar("seconds to open 10,000 shards", [line[-1][1]], 1.0))
    found.tables.append(Table("Records per CPU second", ("format", "reader", "median", "range (rounds)"), rows))
    found.curves.append(Curve("shards", "s to open", {"open_artifact": line}))
    return found


def _many_shards(found: Findings, scratch: Path, shards: int) -> None:
    """Opening a manifest of very many shards in a separate process, and starting the trainer on it."""
    folder = many_shards.write(scratch / "very-many", shards)
    opened = many_shards.opened(folder)
    started = many_shards.started(folder, scratch / "run")
    found.bars.append(Bar(f"seconds to open {shards:,} shards", [opened.open], 3.0))
    found.bars.append(Bar(f"MB to open {shards:,} shards", [opened.peak], 1000))
    found.bars.append(Bar(f"seconds of `train` for a step on {shards:,} shards", [started.seconds], 10))
    found.notes.append(
        f"{shards:,} shards: {opened.sent:.0f} MB are sent to each data worker, packed in {opened.pack:.2f} s and "
        f"unpacked in {opened.unpack:.2f} s; `train` takes {started.peak:.0f} MB and {started.cpu:.1f} s of "
        "processor, imports included."
    )


def merge(sizes: Sizes, photos: Path | None) -> Findings:
    """Time of a job over its attacks, scaling over workers, cost per shard, and memory of a worker."""
    found = Findings()
    root = merge_scaling.MEMORY if merge_scaling.MEMORY.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="datamerge-benchmark-", dir=root))
    try:
        _jobs(found, sizes, folder)
        _empty_jobs(found, sizes, folder)
        _larger_shards(found, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _jobs(found: Findings, sizes: Sizes, folder: Path) -> None:
    """Whole jobs on one worker, and on two if each can have a core."""
    workers = 2 if sizes.device == "cpu" else 1
    settings: dict[str, object] = {"encoder": sizes.small_encoder, "groups_per_shard": sizes.groups_per_shard}
    settings |= {"members": 4, "steps": 5, "device": sizes.device}
    images = merge_scaling.make_photos(folder / "photos.npz", 12 * sizes.groups_per_shard, 224)
    rounds = [merge_scaling.measure_round(images, folder, settings, workers) for _ in range(sizes.jobs)]
    found.bars.append(Bar("job / its attacks, 12 shards", [one / alone for one, alone, _ in rounds], 1.10))
    columns = ("workers", "median, s", "range (rounds)")
    rows = [["1", *spread([r[0] for r in rounds])], ["attacks alone", *spread([r[1] for r in rounds])]]
    if workers == 2:
        rows.append(["2", *spread([r[2] for r in rounds])])
        bare = merge_scaling.bare_scaling(sizes.small_encoder)
        gains = [one / many / bare for one, _, many in rounds]
        found.bars.append(Bar("gain of a 2nd worker / of a 2nd bare process", gains, 0.9, at_least=True))
        one, two = (statistics.median(r[column] for r in rounds) for column in (0, 2))
        lines = {"job": [(1.0, one), (2.0, two)], "model: half": [(1.0, one), (2.0, one / 2)]}
        found.curves.append(Curve("workers", "s", lines))
    found.tables.append(Table(f"Jobs: {sizes.small_encoder}, N = 4, 5 steps", columns, rows))


def _empty_jobs(found: Findings, sizes: Sizes, folder: Path) -> None:
    """Jobs with increasing numbers of shards."""
    counts = [10**power for power in range(1, 6) if 10**power <= sizes.most_shards]
    overheads = {count: merge_scaling.measure_overhead(folder, count) for count in counts}
    peaks = [overhead.peak for overhead in overheads.values()]
    found.bars.append(Bar(f"peak memory, {counts[-1]} shards / {counts[0]}", [peaks[-1] / peaks[0]], 1.05))
    rows = [
        [f"{count}", f"{1000 * o.shard:.1f}", f"{1000 * o.in_loop:.1f}", f"{o.manifest:.2f}", f"{o.peak:.0f}"]
        for count, o in overheads.items()
    ]
    columns = ("shards", "ms a shard", "in a loop", "manifest, s", "worker's peak, MB")
    found.tables.append(Table("Jobs with nothing to attack", columns, rows))
    lines = {"on Ray": [(float(count), o.shard * count) for count, o in overheads.items()]}
    lines["in a loop"] = [(float(count), o.in_loop * count) for count, o in overheads.items()]
    found.curves.append(Curve("shards", "s, nothing to attack", lines))


def _larger_shards(found: Findings, folder: Path) -> None:
    """Growth of a worker's peak memory when shards are four times larger, in shard sizes (no attack)."""
    images = merge_scaling.make_photos(folder / "large.npz", 192, 224)
    measured = []
    for groups in (16, 64):
        settings: dict[str, object] = {"encoder": "mlp:3x224x224-2", "groups_per_shard": groups, "members": 1}
        settings |= {"steps": 0, "device": "cpu", "batch_size": 8}
        prepared = merge_scaling.make_prepared(images, folder, settings)
        peak = merge_scaling.run_on_ray(prepared, 1)[1]
        measured.append((peak, prepared.plan.layout.bytes_per_record * groups / 2**20))
    (small, few), (large, many) = measured
    growth = (large - small) / (many - few)
    found.bars.append(Bar("more peak memory for a larger shard, in shards", [growth], 2.0))
    rows = [[f"{shard:.1f}", f"{peak:.0f}"] for peak, shard in measured]
    found.tables.append(Table("Larger shards: 3 × 224 × 224, N = 1", ("MB a shard", "worker's peak, MB"), rows))


def train(sizes: Sizes, photos: Path | None) -> Findings:
    """Training steps fed by the stream, by tensors in memory, and in a bare PyTorch loop; the arms compared."""
    found = Findings()
    settings = {"batch_size": sizes.batch, "device": sizes.device, "precision": "float32"}
    loop = {**settings, "data_workers": 0, "log_every": 10}
    for kind in ("zarr", "webdataset"):
        feed = training.run_blocks(kind, sizes.small_encoder, sizes.members, sizes.blocks, 4, **loop)
        for name, over, under, limit in (
            ("step from the stream / from memory", "stream", "memory", 1.03),
            ("waiting / step from the stream", "wait", "stream", 0.02),
            ("step of the trainer / of a bare PyTorch loop", "memory", "bare", 1.03),
        ):
            found.bars.append(Bar(f"{kind}: {name}", [wall for wall, _ in feed.ratios(over, under)], limit))
    seconds = training.arm_seconds(sizes.encoder, sizes.members, sizes.repeats, **settings)
    rows = []
    for over, under, text in training.RATIOS:
        ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
        if text:
            found.bars.append(Bar(f"step of {over} / {under}", ratios, float(text)))
        rows.append([f"{over} / {under}", *spread(ratios)])
    title = f"Steps of the arms: {sizes.encoder}, batch {sizes.batch}, N = {sizes.members}"
    found.tables.append(Table(title, ("ratio", "median", "range (rounds)"), rows))
    return found


def plan(sizes: Sizes, photos: Path | None) -> Findings:
    """Planned and measured cost of merges, and plans of large ones."""
    batch = max(sizes.batch, 16)
    return planning.run(sizes.small_encoder, photos, sizes.device, scale=sizes.scale, batch_size=batch)


def stream(sizes: Sizes, photos: Path | None) -> Findings:
    """Training data from a slow server, in both formats, compared with local files, the link and other libraries."""
    shape = sizes.streamed, sizes.streamed // 16, min(sizes.repeats, 3)
    return streaming.run(("webdataset", "zarr"), *shape, str(photos) if photos else None)


def listing(sizes: Sizes, photos: Path | None) -> Findings:
    """Lists of samples and plans of very large sources."""
    return lists.findings(sizes.listed, min(sizes.repeats, 3))


THEMES: Mapping[str, Callable[[Sizes, Path | None], Findings]] = {
    "attack": attack,
    "storage": bytes_stored,
    "reading": read,
    "merge": merge,
    "training": train,
    "planning": plan,
    "lists": listing,
    "streaming": stream,
}


@click.command()
@click.option("--theme", "themes", multiple=True, type=click.Choice(list(THEMES)), help="All by default; repeatable.")
@click.option("--gpu", is_flag=True, help="Attack and train on a GPU, with larger sizes.")
@click.option("--quick", is_flag=True, help="Tiny sizes, which only test that everything runs.")
@click.option(
    "--results", default=RESULTS, type=click.Path(file_okay=False, path_type=Path), help="Folder of the reports."
)
def main(themes: Sequence[str], gpu: bool, quick: bool, results: Path) -> None:
    """Measure every bar and write THEME_HARDWARE_DATE.md, with a plot for themes that measure growth."""
    if gpu and quick:
        raise click.UsageError("--gpu and --quick: expected one of them")
    if gpu and not torch.cuda.is_available():
        raise click.UsageError("--gpu: torch sees no GPU here; leave it out")
    sizes = GPU if gpu else TINY if quick else CPU
    torch.set_num_threads(1)
    where = Circumstances.here(sizes.device)
    folder = Path(os.environ.get("DATAMERGE_DATA", ""), "nips17", "images")
    photos = folder if "DATAMERGE_DATA" in os.environ and folder.is_dir() else None
    command = " ".join(["python -m benchmarks.run", *(["--gpu"] if gpu else []), *(["--quick"] if quick else [])])
    results.mkdir(parents=True, exist_ok=True)
    for theme in themes or THEMES:
        started, load = time.perf_counter(), os.getloadavg()[0]
        found = THEMES[theme](sizes, photos)
        seconds = time.perf_counter() - started
        path = results / f"{theme}_{where.slug}_{where.day}.md"
        text = render(theme, found, where, f"{command} --theme {theme}", seconds, load)
        if plot(found.curves, path.with_suffix(".png")):
            text += f"\n![growth]({path.stem}.png)\n"
        path.write_text(text, encoding="utf-8")
        for bar in found.bars:
            what, median, _, limit, verdict = bar.cells()
            click.echo(f"{theme:9} {what:60} {median:>8} {limit:>7} {verdict}")
        click.echo(f"{theme}: {seconds:.0f} s, {path}")


if __name__ == "__main__":
    main()
