"""Whole runs against a second implementation of the loop: from docs/math.md, one group at a time, in float64.

It uses no code of the trainer: tar shards are read with tarfile and NumPy, the network is two matrices, and losses
are differentiated by autograd. Two conventions do not follow from the method and are repeated:

* the order of groups, all of them in one window: a permutation by index whose key is derived from the third word of
  SeedSequence([seed, 1, epoch]);
* the draws of the group at position p of step s (counted from 0): a generator seeded by word p of
  SeedSequence([seed, 2, s]); signs are its bits, highest first. The member that random-member draws is word p of
  SeedSequence([seed, 4, s]) modulo their number.

Shapes: D pixels of an image, flat; N members, k factors, K outputs.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from datamerge.encoders import load_encoder
from tests.support.permutation import key_of, sent
from trainer import TrainConfig, train

MakeArtifact = Callable[..., str]
ENCODER = "mlp:1x4x4-8-6"
SEED, STEPS, BATCH, RATE, DECAY = 5, 7, 4, 1e-2, 0.1
LEVELS = 255
EPSILON = 48  # grey levels


@dataclass
class Case:
    """One run.

    Attributes:
        loss: loss of outputs [K] at a target.
        hessian: Hessian of that loss in the outputs, [K, K].
        label: a label drawn from exp(−loss), for outputs and a generator.
        settings: settings of TrainConfig.
    """

    loss: Callable[[Tensor, Any], Tensor]
    hessian: Callable[[Tensor], Tensor]
    label: Callable[[Tensor, np.random.Generator], Any]
    settings: dict[str, Any]


def _squared(scale: float) -> Case:
    return Case(
        lambda outputs, target: scale * ((outputs - torch.as_tensor(target)) ** 2).sum(),
        lambda outputs: 2 * scale * torch.eye(len(outputs), dtype=torch.float64),
        lambda outputs, rng: outputs.detach() + torch.from_numpy(rng.standard_normal(6)) / math.sqrt(2 * scale),
        {"loss": "squared_error", "loss_scale": scale},
    )


def _cosine() -> Case:
    def loss(outputs: Tensor, target: Any) -> Tensor:
        y = torch.as_tensor(target)
        cosine: Tensor = outputs @ y / (outputs.norm() * y.norm())
        return 1 - cosine

    def none(*_: Any) -> Any:
        raise AssertionError("the cosine has no curvature that could be trained with")

    return Case(loss, none, none, {"loss": "cosine"})


def _entropy() -> Case:
    def hessian(outputs: Tensor) -> Tensor:
        p = outputs.softmax(0)
        return torch.diag(p) - torch.outer(p, p)

    return Case(
        lambda outputs, label: outputs.logsumexp(0) - outputs[label],
        hessian,
        lambda outputs, rng: int((torch.from_numpy(rng.standard_exponential(6)) / outputs.exp().detach()).argmin()),
        {"loss": "cross_entropy"},
    )


LOSSES = {"eq. 11": _squared(1.0), "appendix A": _squared(0.5), "cosine": _cosine(), "cross entropy": _entropy()}


@dataclass
class Group:
    """A record, decoded as FORMAT.md says; images flat, in [0, 1] units."""

    mean: Tensor
    variance: Tensor
    factors: Tensor
    members: Tensor
    clean: Tensor
    target: Any


def _read(artifact: str, labels: bool) -> list[list[Group]]:
    """The groups of each shard."""
    shards = []
    for path in sorted(Path(artifact, "shards").glob("*.tar")):
        records: dict[str, dict[str, Any]] = {}
        with tarfile.open(path) as tar:
            for entry in tar:
                key, _, name = entry.name.partition(".")
                stream = tar.extractfile(entry)
                assert stream is not None
                content = io.BytesIO(stream.read())
                value = json.load(content) if name == "json" else np.load(content).astype(np.float64)
                records.setdefault(key, {})[name.removesuffix(".npy")] = value
        shards.append([_decoded(record, labels) for record in records.values()])
    return shards


def _decoded(record: dict[str, Any], labels: bool) -> Group:
    def flat(name: str, unit: float) -> Tensor:
        stored: npt.NDArray[np.float64] = record[name] / unit
        return torch.from_numpy(stored).flatten(-3)

    unit = LEVELS * record["json"]["count"]
    return Group(
        mean=flat("sum", unit),
        variance=flat("scatter", unit**2),
        factors=flat("factors", LEVELS * math.sqrt(len(record["factors"]))),
        members=flat("members", LEVELS),
        clean=flat("clean", LEVELS),
        target=record["json"]["label"] if labels else record["target"],
    )


def _ordered(shards: list[list[Group]], epoch: int) -> list[Group]:
    assert len(shards) <= 8
    key = key_of(int(np.random.SeedSequence([SEED, 1, epoch]).generate_state(3, np.uint64)[2]), 0)
    groups = [group for shard in shards for group in shard]
    return [groups[sent(place, len(groups), key)] for place in range(len(groups))]


def _word(purpose: int, step: int, position: int) -> int:
    return int(np.random.SeedSequence([SEED, purpose, step]).generate_state(position + 1, np.uint64)[position])


def _signs(rng: np.random.Generator, count: int) -> Tensor:
    data = rng.bytes(math.ceil(count / 8))
    return torch.tensor([1.0 if data[i // 8] >> (7 - i % 8) & 1 else -1.0 for i in range(count)], dtype=torch.float64)


@dataclass
class Oracle:
    """The loop: its case and the weights of its network."""

    case: Case
    weights: dict[str, Tensor]

    def outputs(self, image: Tensor) -> Tensor:
        """f(x), [K] of [D]; pixels are normalised by mean and deviation ½."""
        w = self.weights
        return w["3.weight"] @ (w["1.weight"] @ (2 * image - 1) + w["1.bias"]).clamp(min=0) + w["3.bias"]

    def loss_at(self, image: Tensor, group: Group) -> Tensor:
        return self.case.loss(self.outputs(image), group.target)

    def refined(self, image: Tensor, group: Group, rng: np.random.Generator) -> Tensor:
        """PGD from `image` and noise, in the ball around the clean image and in [0, 1]; `image` without steps."""
        settings = self.case.settings
        steps = settings.get("refine_steps", 0)
        noise = settings.get("start_noise", EPSILON / LEVELS if settings["arm"] == "clean" else 0)
        radius = EPSILON / LEVELS if noise <= EPSILON / LEVELS else 1
        if steps and noise:
            drawn = np.frombuffer(rng.bytes(2 * len(image)), "<i2")
            image = image + noise * torch.from_numpy((drawn + 0.5) / 2**15)
        for step in range(steps + 1 if steps else 0):
            if step:
                point = image.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.loss_at(point, group), point)
                image = image + settings.get("refine_step_size", 2 * EPSILON / LEVELS / steps) * gradient.sign()
            image = (group.clean + (image - group.clean).clamp(-radius, radius)).clamp(0, 1)
        return image

    def group_loss(self, group: Group, step: int, position: int) -> Tensor:
        """Training loss of a group by docs/math.md: the loss of the arm, and the clean term."""
        loss, weight = self.arm_loss(group, step, position), self.case.settings.get("clean_weight", 0)
        if weight:
            loss = loss + weight * ((self.outputs(group.clean) - torch.as_tensor(group.target)) ** 2).sum()
        return loss

    def arm_loss(self, group: Group, step: int, position: int) -> Tensor:
        """Loss of the arm by docs/math.md."""
        settings = self.case.settings
        arm, samples = settings["arm"], settings.get("samples", 1)
        rng = np.random.default_rng(_word(2, step, position))
        if arm == "ind":
            return torch.stack([self.loss_at(self.refined(x, group, rng), group) for x in group.members]).mean()
        if arm == "random-member":
            member = group.members[_word(4, step, position) % len(group.members)]
            return self.loss_at(self.refined(member, group, rng), group)
        if arm == "mean-only":
            return self.loss_at(self.refined(group.mean, group, rng), group)
        if arm == "clean":
            return self.loss_at(self.refined(group.clean, group, rng), group)
        draw = self._along_factors if arm == "factors" else self._around_mean
        return torch.stack([draw(group, rng) for _ in range(samples)]).mean()

    def _along_factors(self, group: Group, rng: np.random.Generator) -> Tensor:
        settings = self.case.settings
        u = settings.get("deviation", 1.0) * (_signs(rng, len(group.factors)) @ group.factors)
        if settings["estimator"] == "sampled":
            return self.loss_at(self.refined(group.mean + u, group, rng), group)
        return self._pair_or_curvature(group, u, self.outputs(group.mean + u) - self.outputs(group.mean))

    def _around_mean(self, group: Group, rng: np.random.Generator) -> Tensor:
        if self.case.settings["estimator"] == "gauss_newton":
            point = group.mean.clone().requires_grad_()
            outputs = self.outputs(point)
            at_label = self.case.loss(outputs, self.case.label(outputs, rng))
            (gradient,) = torch.autograd.grad(at_label, point, create_graph=True)
            return self.case.loss(outputs, group.target) + 0.5 * (group.variance * gradient**2).sum()
        u = group.variance.sqrt() * _signs(rng, len(group.mean))
        if self.case.settings["estimator"] == "sampled":
            return self.loss_at(group.mean + u, group)
        jacobian = torch.autograd.functional.jacobian(self.outputs, group.mean, create_graph=True)
        return self._pair_or_curvature(group, u, jacobian @ u)

    def _pair_or_curvature(self, group: Group, u: Tensor, response: Tensor) -> Tensor:
        if self.case.settings["estimator"] == "antithetic":
            return (self.loss_at(group.mean + u, group) + self.loss_at(group.mean - u, group)) / 2
        centre = self.outputs(group.mean)
        return self.case.loss(centre, group.target) + 0.5 * response @ self.case.hessian(centre) @ response

    def train(self, shards: list[list[Group]]) -> list[float]:
        """Train the weights; return the loss of each step."""
        optimizer = torch.optim.AdamW(self.weights.values(), betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
        per_epoch = math.ceil(sum(map(len, shards)) / BATCH)
        losses = []
        for step in range(STEPS):
            epoch, place = divmod(step, per_epoch)
            batch = _ordered(shards, epoch)[place * BATCH : (place + 1) * BATCH]
            loss = torch.stack([self.group_loss(group, step, i) for i, group in enumerate(batch)]).mean()
            optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


FACTORS: list[dict[str, Any]] = [
    {"estimator": "sampled"},
    {"estimator": "sampled", "deviation": 1.7},
    {"estimator": "sampled", "deviation": 0.4, "samples": 3},
    {"estimator": "antithetic", "deviation": 1.7},
    {"estimator": "antithetic", "samples": 2},
    {"estimator": "gauss_newton", "deviation": 1.7},
    {"estimator": "gauss_newton", "samples": 2},
    {"estimator": "sampled", "deviation": 1.7, "refine_steps": 1},
    {"estimator": "sampled", "deviation": 0.4, "refine_steps": 3, "accumulate": 2},
]
OTHERS: list[dict[str, Any]] = [
    *({"arm": "avg", "estimator": name, "samples": 2} for name in ("gauss_newton", "sampled", "antithetic")),
    *({"arm": arm, "refine_steps": 2} for arm in ("ind", "random-member", "mean-only", "clean")),
    *({"arm": arm, "refine_steps": 2, "start_noise": 0.01} for arm in ("ind", "random-member", "clean")),
    {"arm": "clean", "refine_steps": 1, "start_noise": 2 * EPSILON / LEVELS, "refine_step_size": EPSILON / LEVELS},
]
WITH_CLEAN_TERM: list[dict[str, Any]] = [
    {"arm": "avg", "estimator": "gauss_newton", "clean_weight": 0.7},
    {"arm": "avg", "estimator": "antithetic", "samples": 2, "clean_weight": 0.7},
    {"arm": "factors", "estimator": "sampled", "clean_weight": 2.0, "refine_steps": 1},
    *({"arm": arm, "clean_weight": 0.7, "refine_steps": 2, "accumulate": 2} for arm in ("ind", "clean")),
    *({"arm": arm, "clean_weight": 0.7} for arm in ("mean-only", "random-member")),
]
CASES = [
    (settings, loss)
    for settings in [*({"arm": "factors", **one} for one in FACTORS), *OTHERS, *WITH_CLEAN_TERM]
    for loss in LOSSES
    # The settings refuse these: see tests/trainer/test_train_command.py.
    if not (loss == "cosine" and settings.get("estimator") == "gauss_newton")
    and not (loss == "cross entropy" and "clean_weight" in settings)
]


@pytest.mark.parametrize(("settings", "loss"), CASES, ids=str)
def test_a_run_has_the_losses_and_weights_of_the_second_implementation(
    make_artifact: MakeArtifact, tmp_path: Path, settings: dict[str, Any], loss: str
) -> None:
    labels = loss == "cross entropy"
    attack = {"epsilon": f"{EPSILON}/255", "step_size": "1/255", "steps": 10}
    artifact = make_artifact(targets=not labels, labels=labels, clean=True, spread=EPSILON, factors=3, attack=attack)
    case = replace(LOSSES[loss], settings={**LOSSES[loss].settings, **settings})
    common: dict[str, Any] = {"seed": SEED, "steps": STEPS, "batch_size": BATCH, "log_every": 1, "device": "cpu"}
    common |= {"learning_rate": RATE, "weight_decay": DECAY}
    train(TrainConfig(artifact=artifact, run=str(tmp_path / "run"), **common, **case.settings))

    start = {name: tensor.double() for name, tensor in load_encoder(ENCODER).model.state_dict().items()}
    oracle = Oracle(case, {name: tensor.clone().requires_grad_() for name, tensor in start.items()})
    losses = oracle.train(_read(artifact, labels))
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(losses, rel=1e-5)
    for name, tensor in load_file(tmp_path / "run/encoder.safetensors").items():
        expected = oracle.weights[name].detach()
        assert (expected - start[name]).abs().mean() > RATE
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=RATE / 1000)
