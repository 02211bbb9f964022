"""The paper's future work: k cluster means per class, compared with k real images per class, random or medoids.

    python -m experiments.clusters.run --data "$DATAMERGE_DATA" --work clusters

All steps call the public functions of the commands. Finished parts are kept in --work and skipped later. Writes
results.json and plot.png beside this file.
"""

from __future__ import annotations

import json
import statistics
import tomllib
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np
import torch
from PIL import Image

from datamerge.sources import decode, native_shape, open_source
from experiments.class_means.run import initial_weights, trained_accuracy
from experiments.facts import array_bytes, write_accuracies
from merge_service import MergeConfig, merge
from storage_schemas import open_artifact
from storage_schemas.schema.preprocessing import Preprocessing
from trainer.arms import ARMS as TRAINED
from trainer.arms import ArmName

mpl.use("Agg")  # no display needed

from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SETTINGS: dict[str, Any] = tomllib.loads((HERE / "settings.toml").read_text())
# Name in the results → (kind of groups, arm of `datamerge train`).
ARMS: dict[str, tuple[str, ArmName]] = {
    "cluster means, corrected": ("means", "avg"),
    "cluster means": ("means", "mean-only"),
    "medoids": ("medoids", "mean-only"),
    "random images": ("random", "mean-only"),
}


class Images:
    """The training images of a data set, decoded once.

    Attributes:
        pixels: uint8 [n, C, H, W].
        labels: [n].
    """

    def __init__(self, source: Path) -> None:
        listed = open_source(str(source))
        first = listed.reader.read(listed.samples[0])
        shape = native_shape(first)
        self.pixels = np.stack(
            [decode(listed.reader.read(sample), Preprocessing(shape=shape)) for sample in listed.samples]
        )
        self.labels = np.array([sample.label for sample in listed.samples])


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", default="clusters", show_default=True, type=click.Path(path_type=Path))
@click.option("--seeds", default=3, show_default=True)
@click.option("--datasets", default="mnist,cifar10", show_default=True)
def main(data: Path, work: Path, seeds: int, datasets: str) -> None:
    """Run the unfinished parts, then write the results."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in datasets.split(","):
        study = Study(data / name, work / name, SETTINGS["encoder"][name])
        results[name] = {arm: {str(k): study.row(arm, k, seeds) for k in SETTINGS["clusters"]} for arm in ARMS}
        click.echo(
            json.dumps({arm: {k: row["mean"] for k, row in rows.items()} for arm, rows in results[name].items()})
        )
    write_accuracies(HERE, f"experiments.clusters.run --seeds {seeds} --datasets {datasets}", seeds, results)
    _plot(results)


class Study:
    """The runs on one data set."""

    def __init__(self, data: Path, work: Path, encoder: str) -> None:
        self._data, self._work, self._encoder = data, work, encoder
        self._images: Images | None = None

    def row(self, arm: str, k: int, seeds: int) -> dict[str, Any]:
        """Accuracies over the seeds, and stored bytes, of one arm with k groups per class."""
        values = [self._accuracy(arm, k, seed) for seed in range(seeds)]
        return {
            "mean": round(statistics.fmean(values), 2),
            "sd": round(statistics.stdev(values), 2) if len(values) > 1 else None,
            "values": values,
            "stored_bytes": array_bytes(self._artifact(arm, k, 0), TRAINED[ARMS[arm][1]].arrays),
        }

    def _accuracy(self, arm: str, k: int, seed: int) -> float:
        def settings() -> dict[str, Any]:
            encoder = initial_weights(self._work, self._encoder, seed)
            places = {"artifact": self._artifact(arm, k, seed), "encoder": encoder}
            return places | {"arm": ARMS[arm][1], "seed": seed, **SETTINGS["train"]}

        run = self._work / "runs" / f"{arm.replace(' ', '-').replace(',', '')}-{k}-{seed}"
        return trained_accuracy(run, settings, self._data / "test.parquet")

    def _artifact(self, arm: str, k: int, seed: int) -> str:
        kind = ARMS[arm][0]
        # Clusters are the same for every seed: k-means uses the seed of the artifact.
        target = self._work / f"{kind}-{k}" if kind != "random" else self._work / f"random-{k}-{seed}"
        if kind == "means":
            merge(
                MergeConfig(
                    source=str(self._data / "train.parquet"),
                    artifact=str(target),
                    grouping="cluster",
                    clusters=k,
                    order="source",
                )
            )
        else:
            if not (target / "manifest.json").exists():
                chosen = self._medoids(k) if kind == "medoids" else self._random(k, seed)
                self._write(chosen, Path(f"{target}-images"))
            merge(
                MergeConfig(
                    source=f"{target}-images", artifact=str(target), grouping="label", members=1, order="source"
                )
            )
        return str(target)

    @property
    def images(self) -> Images:
        self._images = self._images or Images(self._data / "train.parquet")
        return self._images

    def _medoids(self, k: int) -> list[int]:
        """Indices of the real images nearest to each cluster's mean, within its class."""
        chosen = []
        for record in open_artifact(self._artifact("cluster means", k, 0)):
            of_class = np.flatnonzero(self.images.labels == record.label)
            distances = np.square(self.images.pixels[of_class] / np.float32(255) - record.mean).sum(axis=(1, 2, 3))
            chosen.append(int(of_class[distances.argmin()]))
        return chosen

    def _random(self, k: int, seed: int) -> list[int]:
        rng = np.random.default_rng(np.random.SeedSequence([seed, k]))
        classes = np.unique(self.images.labels)
        return [
            int(i) for c in classes for i in rng.choice(np.flatnonzero(self.images.labels == c), k, replace=False)
        ]

    def _write(self, chosen: list[int], folder: Path) -> None:
        for number, index in enumerate(chosen):
            path = folder / str(self.images.labels[index]) / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(self.images.pixels[index].transpose(1, 2, 0).squeeze()).save(path)


def _plot(results: dict[str, Any]) -> None:
    """Plot accuracy against k and against stored bytes."""
    figure, axes = plt.subplots(
        len(results), 2, figsize=(10, 3.6 * len(results)), layout="constrained", squeeze=False
    )
    for axis, (name, arms) in zip(axes, results.items(), strict=True):
        for arm, rows in arms.items():
            means, spread = [row["mean"] for row in rows.values()], [row["sd"] or 0 for row in rows.values()]
            axis[0].errorbar([int(k) for k in rows], means, spread, marker="o", capsize=3, label=arm)
            stored = [row["stored_bytes"] / 1e6 for row in rows.values()]
            axis[1].errorbar(stored, means, spread, marker="o", capsize=3, label=arm)
        axis[0].set(title=name, xscale="log", xlabel="groups a class, k", ylabel="test accuracy, %")
        axis[1].set(title=name, xscale="log", xlabel="stored MB that the arm reads")
    axes[0][0].legend()
    figure.savefig(HERE / "plot.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
