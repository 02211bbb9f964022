"""One data set with one kind of view: its images and artifacts, and the runs of all arms on them.

Arms, estimators and schedule are those of `datamerge train`. The loop is separate: in a run of a hundred steps on an
MLP, opening artifacts, logs and checkpoints would take most of the time; and training on random views needs the views
of each image, which artifacts grouped by column do not store.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamerge.encoders import Encoder, load_encoder, save_encoder
from experiments.class_means.run import initial_weights
from experiments.views.images import Images, read, views, write_views
from merge_service import MergeConfig, merge
from storage_schemas import open_artifact
from trainer import TrainConfig
from trainer.arms import ARMS as TRAINED
from trainer.arms import ArmName, EstimatorName
from trainer.data.batches import Batch, ImageBatch, MomentBatch, pixels
from trainer.data.noise import Draws
from trainer.data.order import ESTIMATOR, stream_seeds
from trainer.losses import CrossEntropy
from trainer.run.update import learning_rate

TUNING_SEED = 19
CLEAN, RANDOM, ALL = "clean image", "one random view", "all views"


class Arm(NamedTuple):
    """Definition of an arm: the arm of `datamerge train`, its estimator, and the number of clusters, if any."""

    arm: ArmName
    estimator: EstimatorName | None = None
    clusters: int = 0


ARMS: dict[str, Arm] = {
    CLEAN: Arm("clean"),
    RANDOM: Arm("random-member"),
    "mean": Arm("mean-only"),
    "mean + sampled": Arm("avg", "sampled"),
    "mean + gauss_newton": Arm("avg", "gauss_newton"),
    ALL: Arm("ind"),
}


class Merged(NamedTuple):
    """The groups of an artifact: mean and variance [n, C, H, W], labels [n]."""

    mean: Tensor
    variance: Tensor
    label: Tensor


def merged(artifact: Path) -> Merged:
    """All groups, in the order of the artifact."""
    records = list(open_artifact(str(artifact)))
    return Merged(
        torch.from_numpy(np.stack([record.mean for record in records])),
        torch.from_numpy(np.stack([record.variance for record in records])),
        torch.tensor([record.label for record in records]),
    )


class Study:
    """The runs of one data set and kind of view.

    Args:
        data: folder of the data set.
        work: folder of finished parts.
        kind: kind of the views, or "clusters", whose groups are clusters of clean images.
    """

    def __init__(self, settings: dict[str, Any], data: Path, work: Path, dataset: str, kind: str) -> None:
        self._settings, self._data, self._dataset, self.kind = settings, data / dataset, dataset, kind
        self._shared, self._work = work / dataset, work / dataset / kind
        self._of_clusters: dict[int, Merged] = {}
        self.arms = ARMS
        if kind == "clusters":
            self.arms = {CLEAN: ARMS[CLEAN]}
            for k in settings["clusters"]:
                self.arms[f"{k} means a class"] = Arm("mean-only", clusters=k)
                self.arms[f"{k} means a class + gauss_newton"] = Arm("avg", "gauss_newton", k)

    @cached_property
    def train(self) -> Images:
        return read(self._data / "train.parquet", 0, self._settings["images"]["train"])

    @cached_property
    def views(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Views of the training images, [n, views, C, H, W]."""
        return self._views("train", self.train, self._settings["views"])

    @cached_property
    def groups(self) -> Merged:
        """Groups of the merged views of each image."""
        target, source = self._work / "groups", self._work / "views.parquet"
        if not source.exists():
            write_views(self.views, self.train.labels, source)
        merge(
            MergeConfig(
                source=str(source),
                artifact=str(target),
                grouping="column",
                group_column="group",
                order="source",
                groups_per_shard=1000,
            )
        )
        found = merged(target)
        if not torch.allclose(found.mean, pixels(self.views).mean(dim=1), atol=1e-6):
            raise ValueError(f"{target}: its groups are not those of {source}")
        return found

    def clusters(self, k: int) -> Merged:
        """Groups of the k merged clusters of each class."""
        if k in self._of_clusters:
            return self._of_clusters[k]
        target = self._work / f"clusters-{k}"
        merge(
            MergeConfig(
                source=str(self._data / "train.parquet"),
                artifact=str(target),
                limit_first=self._settings["images"]["train"],
                grouping="cluster",
                clusters=k,
            )
        )
        self._of_clusters[k] = merged(target)
        return self._of_clusters[k]

    def passes_a_step(self, arm: str) -> float:
        """Cost of one update in forward passes per item of the batch."""
        wanted = self.arms[arm]
        return TRAINED[wanted.arm].forward_passes(wanted.estimator, members=self._settings["views"])

    def measured(self, arm: str, passes: int, rate: float, seed: int) -> dict[str, float]:
        """Accuracies in % of a run, on the tuning images if the seed is theirs; trains it unless that is done."""
        run = self._run(arm, passes, rate, seed)
        if not (run / "accuracy.json").exists():
            run.mkdir(parents=True, exist_ok=True)
            encoder = self._trained(self.arms[arm], int(passes / self.passes_a_step(arm)), rate, seed)
            if arm == RANDOM:  # gradients are compared at these weights
                save_encoder(encoder, run / "encoder.safetensors")
            (run / "accuracy.json").write_text(json.dumps(self._accuracy(encoder, tuning=seed == TUNING_SEED)))
        found: dict[str, float] = json.loads((run / "accuracy.json").read_text())
        return found

    def best_rate(self, arm: str, passes: int, rates: list[float]) -> float:
        """The rate with the largest sum of accuracies on the tuning images."""
        return max(rates, key=lambda rate: sum(self.measured(arm, passes, rate, TUNING_SEED).values()))

    def encoder(self, passes: int, rate: float, seed: int) -> Encoder:
        """The network after training with `RANDOM`; with 0 passes, as initialised."""
        spec = self._settings["encoder"][self._dataset]
        if not passes:
            return load_encoder(initial_weights(self._shared, spec, seed))
        self.measured(RANDOM, passes, rate, seed)
        weights = self._run(RANDOM, passes, rate, seed) / "encoder.safetensors"
        return load_encoder(f"{spec}@{weights}")

    def finished(self, arm: str, passes: int, rate: float, seed: int) -> bool:
        """Whether the result of `measured` is stored already."""
        return (self._run(arm, passes, rate, seed) / "accuracy.json").exists()

    def _run(self, arm: str, passes: int, rate: float, seed: int) -> Path:
        return self._work / "runs" / f"{arm.replace(' ', '-')}-{passes}-{rate:g}-{seed}"

    def _trained(self, arm: Arm, steps: int, rate: float, seed: int) -> Encoder:
        shared = self._settings["train"]
        config = TrainConfig.model_validate(
            {
                "artifact": "in memory",
                "run": "in memory",
                "arm": arm.arm,
                **({"estimator": arm.estimator} if arm.estimator else {}),
                "loss": "cross_entropy",
                "steps": steps,
                "warmup_steps": int(shared["warmup"] * steps),
                "learning_rate": rate,
                "batch_size": shared["batch_size"],
                "weight_decay": shared["weight_decay"],
                "seed": seed,
            }
        )
        encoder = self.encoder(0, rate, seed).train()
        optimizer = torch.optim.AdamW(encoder.parameters(), rate, weight_decay=config.weight_decay, fused=True)
        rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
        feed = _Feed(self, arm, rng)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate(config, step, steps)
            batch = feed.batch(config.batch_size)
            draws = Draws(stream_seeds(seed, ESTIMATOR, step, config.batch_size))
            optimizer.zero_grad()
            TRAINED[arm.arm].loss(encoder, batch, CrossEntropy(), draws, config).loss.mean().backward()
            optimizer.step()
        return encoder.eval()

    def _accuracy(self, encoder: Encoder, *, tuning: bool) -> dict[str, float]:
        sets = {"clean": (held := self._held_out(tuning)).pixels}
        if self.kind != "clusters":
            sets["views"] = self._views("tuning" if tuning else "test", held, 1)[:, 0]
        found = {}
        with torch.inference_mode():
            for name, images in sets.items():
                guesses = torch.cat(
                    [encoder(pixels(images[i : i + 500])).argmax(1) for i in range(0, len(images), 500)]
                )
                found[name] = 100 * float((guesses.numpy() == held.labels).mean())
        return found

    def _held_out(self, tuning: bool) -> Images:
        counts = self._settings["images"]
        if tuning:
            return self._cached("tuning", self._data / "train.parquet", counts["train"], counts["tuning"])
        return self._cached("test", self._data / "test.parquet", 0, counts["test"])

    def _cached(self, name: str, source: Path, first: int, count: int) -> Images:
        path = self._shared / f"{name}.npz"
        if not path.exists():
            found = read(source, first, count)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, pixels=found.pixels, labels=found.labels)
        with np.load(path) as stored:
            return Images(stored["pixels"], stored["labels"])

    def _views(self, name: str, images: Images, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Views of a set of images, computed once; every set has its own seed."""
        path = self._work / f"views-{name}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, views(images, self.kind, count, ("train", "tuning", "test").index(name)))
        found: np.ndarray[Any, np.dtype[np.uint8]] = np.load(path)
        return found


class _Feed:
    """Batches of a run: images (or clusters) in random order, epoch after epoch, all of full size."""

    def __init__(self, study: Study, arm: Arm, rng: np.random.Generator) -> None:
        self._study, self._arm, self._rng = study, arm, rng
        if arm.clusters:
            self._merged: Merged | None = study.clusters(arm.clusters)
        else:
            self._merged = study.groups if arm.arm in ("avg", "mean-only") else None
        self._label = torch.from_numpy(study.train.labels) if self._merged is None else self._merged.label
        self._order = np.empty(0, int)

    def batch(self, size: int) -> Batch:
        while len(self._order) < size:
            self._order = np.concatenate([self._order, self._rng.permutation(len(self._label))])
        chosen, self._order = self._order[:size], self._order[size:]
        target = self._label[torch.from_numpy(chosen)]
        shared: dict[str, Any] = {"keys": [str(i) for i in chosen], "target": target}
        if self._merged is not None:
            mean = self._merged.mean[torch.from_numpy(chosen)]
            if self._arm.arm == "avg":
                return MomentBatch(mean=mean, variance=self._merged.variance[torch.from_numpy(chosen)], **shared)
            return ImageBatch(images=mean, counts=[1] * size, **shared)
        if self._arm.arm == "clean":
            return Batch(clean=pixels(self._study.train.pixels[chosen]), **shared)
        if self._arm.arm == "random-member":
            count = self._study.views.shape[1]
            images = self._study.views[chosen, self._rng.integers(count, size=size)]
            return ImageBatch(images=pixels(images), counts=[1] * size, **shared)
        images = self._study.views[chosen]
        return ImageBatch(images=pixels(images).flatten(0, 1), counts=[images.shape[1]] * size, **shared)
