"""`train --arm clean` with ten steps is the training loop of RobustVLM: FARE, and with cross entropy TeCoA."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from datamerge.encoders import Head, load_encoder
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from merge_service import MergeConfig
from storage_schemas import Artifact
from tests.support.merging import merge_here
from tests.support.ranks import launch
from trainer import Stopped, TrainConfig, train
from trainer.data.noise import Draws
from trainer.data.order import ESTIMATOR, LAYERS, Order, stream_seeds
from trainer.run import update

VIT, MLP = "open_clip:fare-vit", "mlp:3x4x4-16-12"
SIDES = {VIT: 32, MLP: 4}
WIDTH, CLASSES, IMAGES = 12, 5, 10
EPSILON, STEP_SIZE = 2 / 255, 1 / 255
STEPS, WARMUP, BATCH, RATE, DECAY = 6, 2, 4, 1e-3, 0.1
SETTINGS: dict[str, Any] = {
    "arm": "clean",
    "refine_steps": 10,
    "refine_step_size": "1/255",
    "epsilon": "2/255",
    "steps": STEPS,
    "warmup_steps": WARMUP,
    "batch_size": BATCH,
    "learning_rate": RATE,
    "weight_decay": DECAY,
    "threads": 1,
    "log_every": 1,
}
Weights = dict[str, Tensor]
Objective = Callable[[Tensor, Tensor], Tensor]


def pgd(model: nn.Module, clean: Tensor, start: Tensor, target: Tensor, objective: Objective) -> Tensor:
    """PGD as in RobustVLM: ten steps, the last one counts, and momentum moves only pixels whose gradient is 0.

    The reference keeps offsets from `clean` where this keeps points. They differ by rounding, which the sign turns
    into whole steps wherever a gradient is nearly 0.
    """
    points, velocity = start, torch.zeros_like(clean)
    for _ in range(10):
        points = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(model(points), target), points)
        velocity = (0.9 * velocity + gradient.sign()).sign()
        points = points.detach() + STEP_SIZE * velocity
        points = torch.minimum(torch.maximum(points, clean - EPSILON), clean + EPSILON).clamp(0, 1)
    return points


def robust_vlm(
    spec: str,
    images: Tensor,
    artifact: Artifact,
    labels: Tensor | None = None,
    head: nn.Module | None = None,
    inside: bool = False,
) -> Weights:
    """Weights after online training as RobustVLM does it (train/adversarial_training_clip.py), on raw images.

    Batches, noise and dropped patches are those of a run here. The learning rate follows its schedule from the
    first update on; the reference starts with the peak rate, because it sets the rate after each step.

    Args:
        spec: spec of the encoder.
        images: float32 [B, C, H, W], in the order of the artifact.
        artifact: artifact whose shards determine the batches.
        labels: labels for TeCoA, which uses cross entropy through `head`; None for FARE, whose targets are embeddings
            of the frozen encoder.
        head: maps embeddings to logits.
        inside: whether the attack starts inside [0, 1].
    """
    encoder, frozen = load_encoder(spec), load_encoder(spec).eval()
    order = Order(artifact.shard_sizes, BATCH, 0)

    def squared(outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target).square().sum(dim=1).mean()

    def entropy(outputs: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(outputs if head is None else head(outputs), target)

    objective = squared if labels is None else entropy
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=RATE, weight_decay=DECAY)
    for step in range(STEPS):
        batch = order.batch(step).tolist()
        clean = images[batch]
        with torch.no_grad():
            target = frozen(clean) if labels is None else labels[batch]
        noise = EPSILON * Draws(stream_seeds(0, ESTIMATOR, step, len(batch))).uniform(clean)
        start = clean + noise
        encoder.eval()
        attacked = pgd(encoder, clean, start.clamp(0, 1) if inside else start, target, objective)
        encoder.train()
        torch.manual_seed(stream_seeds(0, LAYERS, step, 1)[-1])
        objective(encoder(attacked), target).backward()
        past = (step - WARMUP) / (STEPS - WARMUP)
        shape = (step + 1) / WARMUP if step < WARMUP else 0.5 * (1 + math.cos(math.pi * past))
        optimizer.param_groups[0]["lr"] = RATE * shape
        optimizer.step()
        optimizer.zero_grad()
    return dict(encoder.model.state_dict())


def distance(run: Path, weights: Weights) -> float:
    """Largest difference between `weights` and those of a finished run.

    Attention's bias of keys is left out: it changes no output, so its gradient is rounding error, which AdamW turns
    into whole steps.
    """
    found = load_file(run / "encoder.safetensors")
    assert found.keys() == weights.keys()
    apart = {name: (found[name] - weights[name]).abs() for name in found}
    for name, values in apart.items():
        if name.endswith("in_proj_bias"):
            values[len(values) // 3 : 2 * len(values) // 3] = 0
    return max(float(values.max()) for values in apart.values())


@pytest.fixture(scope="module", autouse=True)
def _vit(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A vision transformer of open_clip that drops patches in train mode."""
    make_torchvision_importable()
    import open_clip

    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.3}
    folder = tmp_path_factory.mktemp("configs")
    config = {"embed_dim": WIDTH, "text_cfg": text, "vision_cfg": vision}
    (folder / f"{VIT.partition(':')[2]}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


class Data:
    """Images with labels, and artifacts of them.

    Attributes:
        images: float32 [B, C, H, W].
        labels: int64 [B].
    """

    def __init__(self, folder: Path, spec: str, darkest: int = 2, brightest: int = 253) -> None:
        rng = np.random.default_rng(0)
        pixels = rng.integers(darkest, brightest, (IMAGES, SIDES[spec], SIDES[spec], 3), np.uint8, endpoint=True)
        classes = rng.integers(0, CLASSES, IMAGES)
        self.images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        self.labels = torch.from_numpy(classes)
        self._folder, self._spec = folder, spec
        np.savez(folder / "images.npz", images=pixels, labels=classes)

    def merged(self, name: str = "artifact", **settings: Any) -> Artifact:
        """Merge the images; without `attack`, store clean images and the result of an attack that does not matter."""
        attack = {} if "attack" in settings else {"members": 1, "steps": 1, "keep_clean": True}
        shared = {"encoder": self._spec, "order": "source", "groups_per_shard": 4, "device": "cpu"}
        places = {"source": str(self._folder / "images.npz"), "artifact": str(self._folder / name)}
        return merge_here(MergeConfig.model_validate(places | shared | attack | settings))


def _train(artifact: Artifact, run: Path, **settings: Any) -> Path:
    train(TrainConfig(artifact=artifact.location.url, run=str(run), **{**SETTINGS, **settings}))
    return run


def _stopped_once(monkeypatch: pytest.MonkeyPatch, artifact: Artifact, run: Path, **settings: Any) -> Path:
    """Train, stop by a signal in the third step, and continue."""
    step, calls = update.Optimisation.step, []

    def signalled(self: update.Optimisation, *arguments: Any) -> update.Outcome:
        calls.append(0)
        return step(self, *arguments)._replace(stop=signal.SIGTERM if len(calls) == 3 else 0)

    with monkeypatch.context() as patch:
        patch.setattr(update.Optimisation, "step", signalled)
        with pytest.raises(Stopped, match="step 3 of 6"):
            _train(artifact, run, **settings)
    return _train(artifact, run, **settings)


def test_fare_on_a_vision_transformer_equals_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(tmp_path, VIT)
    artifact = data.merged()
    expected = robust_vlm(VIT, data.images, artifact)
    assert distance(_train(artifact, tmp_path / "run"), expected) < 1e-5
    assert distance(_stopped_once(monkeypatch, artifact, tmp_path / "stopped"), expected) < 1e-5
    # The comparison notices one attack step less.
    assert distance(_train(artifact, tmp_path / "other", refine_steps=9), expected) > 1e-4


def test_tecoa_on_a_vision_transformer_equals_the_reference(tmp_path: Path) -> None:
    data = Data(tmp_path, VIT)
    artifact = data.merged()
    weight = functional.normalize(torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1)))
    (tmp_path / "head.safetensors").write_bytes(Head(weight, scale=torch.tensor([100.0])).to_bytes())

    class Cosine(nn.Module):
        def forward(self, embeddings: Tensor) -> Tensor:
            return 100 * functional.normalize(embeddings, dim=-1) @ weight.T

    expected = robust_vlm(VIT, data.images, artifact, data.labels, Cosine())
    settings = {"loss": "cross_entropy", "head": str(tmp_path / "head.safetensors")}
    assert distance(_train(artifact, tmp_path / "run", **settings), expected) < 1e-5


def test_an_attack_starts_inside_the_pixel_range(tmp_path: Path) -> None:
    """The only difference in the attack: the reference takes the first gradient outside [0, 1]."""
    data = Data(tmp_path, VIT, 0, 1)
    artifact = data.merged()
    run = _train(artifact, tmp_path / "run")
    assert distance(run, robust_vlm(VIT, data.images, artifact, inside=True)) < 1e-5
    assert distance(run, robust_vlm(VIT, data.images, artifact)) > 1e-5


def test_fare_equals_the_reference_for_all_processes_and_formats(tmp_path: Path) -> None:
    """One process; two of which one is stopped, and one that continues; Zarr with an attack and tars without."""
    data = Data(tmp_path, MLP)
    artifacts = {
        "attacked": data.merged(),
        "clean": data.merged("clean-artifact", attack="none", format="webdataset"),
    }
    expected = robust_vlm(MLP, data.images, artifacts["attacked"])
    entries = [
        {**SETTINGS, "artifact": artifact.location.url, "run": str(tmp_path / f"moved-{name}")}
        for name, artifact in artifacts.items()
    ]
    outcomes = launch(2, [{**entry, "trouble": {"at": 2, "who": 1, "signal": 15}} for entry in entries], tmp_path)
    assert all(code == 0 and text.count("step 3 of 6") == 2 for code, text in outcomes), outcomes
    for name, artifact in artifacts.items():
        assert distance(_train(artifact, tmp_path / f"moved-{name}"), expected) < 1e-5
        assert distance(_train(artifact, tmp_path / f"run-{name}"), expected) < 1e-5
