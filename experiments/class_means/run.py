"""Table 1 and Figure 2 of the paper: one mean image per class against one random image per class.

    python -m experiments.class_means.run --data "$DATAMERGE_DATA" --work class-means

All steps call the public functions `merge`, `train` and `evaluate`. Finished parts are kept in --work and skipped
later. Writes results.json, plot.png and figure2.png beside this file.
"""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np
import torch
from PIL import Image

from datamerge.encoders import load_encoder, save_encoder
from datamerge.evaluation import EvaluateConfig, evaluate
from datamerge.sources import decode, native_shape, open_source
from merge_service import MergeConfig, merge
from storage_schemas import open_artifact
from storage_schemas.schema.preprocessing import Preprocessing
from trainer import TrainConfig, train
from trainer.arms import ArmName

mpl.use("Agg")  # no display needed

from matplotlib import pyplot as plt

from experiments.facts import write_accuracies

HERE = Path(__file__).parent
MLPS = {"mnist": "mlp:1x28x28-512-512-10", "cifar10": "mlp:3x32x32-512-512-10"}
PAPER = {"mnist": {"merged": 65.18, "random image": 50.70}, "cifar10": {"merged": 16.27, "random image": 12.60}}
# Name in the results → (artifact, arm of `datamerge train`).
ARMS: dict[str, tuple[str, ArmName]] = {
    "merged": ("means", "avg"),
    "mean only": ("means", "mean-only"),
    "random image": ("random", "mean-only"),
}


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False), help="Folder of the data sets.")
@click.option("--work", default="class-means", show_default=True, help="Folder for artifacts and runs.")
@click.option("--seeds", default=20, show_default=True)
@click.option("--datasets", default="mnist,cifar10", show_default=True)
def main(data: str, work: str, seeds: int, datasets: str) -> None:
    """Run the unfinished parts, then write the results."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in datasets.split(","):
        root, source = Path(work) / name, Path(data) / name
        merge(
            MergeConfig(
                source=str(source / "train.parquet"), artifact=str(root / "means"), grouping="label", order="source"
            )
        )
        accuracies = {arm: [_accuracy(root, source, name, arm, seed) for seed in range(seeds)] for arm in ARMS}
        results[name] = {arm: _summary(values, PAPER[name].get(arm)) for arm, values in accuracies.items()}
        click.echo(json.dumps({name: {arm: row["mean"] for arm, row in results[name].items()}}))
    _write(Path(work), results, seeds)


def _accuracy(root: Path, source: Path, name: str, arm: str, seed: int) -> float:
    """Test accuracy in % of one arm and seed, which determines initial weights, random images and pseudo-labels."""
    kind, train_arm = ARMS[arm]

    def settings() -> dict[str, Any]:
        artifact = root / "means" if kind == "means" else _random_images(root, source, seed)
        shared = tomllib.loads((HERE / "settings.toml").read_text())
        encoder = initial_weights(root, MLPS[name], seed)
        return {"artifact": str(artifact), "arm": train_arm, "encoder": encoder, "seed": seed, **shared}

    return trained_accuracy(root / f"{arm.replace(' ', '-')}-{seed:02d}", settings, source / "test.parquet")


def trained_accuracy(run: Path, settings: Callable[[], dict[str, Any]], test: Path) -> float:
    """Test accuracy in % of a network whose outputs are logits; trains and evaluates only if that is not done yet.

    Args:
        run: folder of the run.
        settings: returns the settings of the training; called only if the run is unfinished.
        test: source of the test images.
    """
    measured = run / "accuracy.json"
    if measured.exists():
        return float(json.loads(measured.read_text()))
    train(TrainConfig.model_validate({"run": str(run), **settings()}))
    (row,) = evaluate(
        EvaluateConfig(runs=[str(run)], data=str(test), head="outputs", steps=1, batch_size=1000, threads=1)
    )
    accuracy = row.score("accuracy clean").value
    measured.write_text(json.dumps(accuracy))
    return accuracy


def initial_weights(root: Path, spec: str, seed: int) -> str:
    """Spec of the network `spec` with torch's default initialisation for this seed."""
    path = root / "initial" / f"{seed:02d}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        encoder = load_encoder(spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in encoder.modules():
                if isinstance(module, torch.nn.Linear):
                    module.reset_parameters()
        save_encoder(encoder, path)
    return f"{spec}@{path}"


def _random_images(root: Path, source: Path, seed: int) -> Path:
    """Artifact of one random training image per class."""
    folder, artifact = root / "random" / f"{seed:02d}", root / "random" / f"{seed:02d}-artifact"
    listed = open_source(str(source / "train.parquet"))
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    for label in range(10):
        target = folder / str(label) / "image.png"
        samples = [sample for sample in listed.samples if sample.label == label]
        data = listed.reader.read(samples[rng.integers(len(samples))])
        pixels = decode(data, Preprocessing(shape=native_shape(data))).transpose(1, 2, 0)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze()).save(target)
    merge(MergeConfig(source=str(folder), artifact=str(artifact), grouping="label", order="source"))
    return artifact


def _summary(values: list[float], paper: float | None) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {
        "mean": round(statistics.fmean(values), 2),
        "sd": spread and round(spread, 2),
        "paper": paper,
        "values": values,
    }


def _write(work: Path, results: dict[str, Any], seeds: int) -> None:
    write_accuracies(HERE, f"experiments.class_means.run --seeds {seeds}", seeds, results)
    _plot(results)
    _figure2(work, list(results))


def _plot(results: dict[str, Any]) -> None:
    figure, axes = plt.subplots(
        1, len(results), figsize=(4.5 * len(results), 3.2), layout="constrained", squeeze=False
    )
    for axis, (name, arms) in zip(axes[0], results.items(), strict=True):
        for position, (arm, row) in enumerate(arms.items()):
            axis.bar(position, row["mean"], yerr=row["sd"], color=f"C{position}", label=arm)
            if row["paper"] is not None:
                axis.plot(position, row["paper"], "k_", markersize=22)
        axis.set(title=f"{name} (black: the paper)", ylabel="test accuracy, %", xticks=[])
    axes[0][0].legend()
    figure.savefig(HERE / "plot.png", dpi=110)
    plt.close(figure)


def _figure2(work: Path, names: list[str]) -> None:
    """The ten class means of each data set."""
    figure, axes = plt.subplots(len(names), 10, figsize=(10, 1.1 * len(names)), layout="constrained", squeeze=False)
    for row, name in zip(axes, names, strict=True):
        for axis, record in zip(row, open_artifact(work / name / "means"), strict=True):
            axis.imshow(record.mean.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1)
            axis.axis("off")
    figure.savefig(HERE / "figure2.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
