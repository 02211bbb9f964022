"""A run of the paper's estimator without its noise, against a loop written from eq. 6 and AdamW's paper."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamerge.encoders import load_encoder
from storage_schemas import open_artifact
from tests.support.exact import exact
from trainer import CrossEntropy, SquaredError, TrainConfig, train
from trainer.data.order import Order
from trainer.estimators import AROUND_MEAN

MakeArtifact = Callable[..., str]


@pytest.mark.parametrize("loss", [SquaredError(), CrossEntropy()])
def test_an_independent_loop_gives_the_same_losses(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: SquaredError | CrossEntropy
) -> None:
    """The run uses the exact correction; the loop is written with torch.func."""
    monkeypatch.setitem(AROUND_MEAN, "gauss_newton", lambda *arguments, samples: exact(*arguments))
    squared = isinstance(loss, SquaredError)
    path = make_artifact(targets=squared, labels=not squared)
    settings: dict[str, Any] = {
        "steps": 5,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "log_every": 1,
    }
    train(TrainConfig(artifact=path, run=str(tmp_path / "run"), **settings))
    artifact, encoder = open_artifact(path), load_encoder("mlp:1x4x4-8-6").double()
    parameters = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    order, losses = Order(artifact.shard_sizes, 4, 0), []

    def outputs(values: dict[str, Tensor], pixels: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(encoder, values, (pixels.reshape(1, 1, 4, 4),))[0]
        return found

    def total(values: dict[str, Tensor], records: list[Any]) -> Tensor:
        result = torch.zeros((), dtype=torch.float64)
        for record in records:
            pixels = torch.from_numpy(record.mean).double().flatten()
            variance = torch.from_numpy(record.variance).double().flatten()
            jacobian = torch.func.jacrev(lambda x: outputs(values, x))(pixels)
            logits = outputs(values, pixels)
            if squared:
                result = result + (logits - torch.from_numpy(record.target).double()).square().sum()
                diagonal = 2 * (jacobian**2).sum(0)
            else:
                p = logits.softmax(0)
                result = result - logits.log_softmax(0)[record.label]
                diagonal = (p[:, None] * jacobian**2).sum(0) - (p @ jacobian) ** 2
            result = result + 0.5 * (variance * diagonal).sum()
        return result / len(records)

    for step in range(5):
        records = [artifact[int(index)] for index in order.batch(step)]
        gradients, value = torch.func.grad_and_value(total)(parameters, records)
        losses.append(float(value))
        rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 5))
        for name, gradient in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            parameters[name] = parameters[name] * (1 - rate * 0.1) - rate * mean / (square.sqrt() + 1e-8)
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
