"""Robust accuracy of an experiment's encoders under third-party attacks: APGD and PGD of torchattacks.

    python -m experiments.third_party experiments/cifar10/epsilon-2.toml --data "$DATAMERGE_DATA" --work cifar10

Reads the runs of `experiments.arms` in --work. Writes third-party-NAME.json beside the settings.
"""

from __future__ import annotations

import json
import tomllib
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torchattacks
from torch import Tensor, nn

from datamerge.encoders import load_encoder, load_head
from datamerge.evaluation.runs import read_run
from datamerge.sources import decode, open_source
from experiments.arms import ArmsExperiment, settings_options
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.run import BASELINE


@click.command()
@settings_options
@click.option("--steps", default=20, show_default=True)
@click.option("--batch-size", default=100, show_default=True)
@click.option("--epsilon", metavar="FRACTION", help="Radius of the attacks. [that of SETTINGS]")
def main(
    settings: Path,
    data: Path,
    work: Path,
    seeds: str,
    only: tuple[str, ...],
    steps: int,
    batch_size: int,
    epsilon: str | None,
) -> None:
    """Attack the trained encoders of SETTINGS with torchattacks."""
    torch.set_num_threads(1)
    experiment = ArmsExperiment(tomllib.loads(settings.read_text()), data, work, settings.stem)
    target = settings.with_name(f"third-party-{settings.stem}.json")
    radius = float(Fraction(epsilon or experiment.settings["evaluate"]["epsilon"]))
    attack = {"torchattacks": version("torchattacks"), "epsilon": radius, "steps": steps}
    facts = _facts(target, attack)
    for name in (BASELINE, *experiment.settings["arms"]):
        for seed in (text for text in seeds.split(",") if text):
            if (only and name not in only) or seed in facts.get(name, {}):
                continue
            if (attacked := trained_model(experiment, name, int(seed))) is None:
                continue
            found = accuracies(*attacked, radius, steps, batch_size)
            facts.setdefault(name, {})[seed] = found
            click.echo(f"{name}, seed {seed}: {found}")
            target.write_text(json.dumps({"attack": attack, "arms": facts}, indent=1) + "\n")


def _facts(target: Path, attack: dict[str, Any]) -> dict[str, Any]:
    """Results of earlier calls: arm → seed → accuracies."""
    if not target.exists():
        return {}
    before = json.loads(target.read_text())
    if before["attack"] != attack:
        raise click.ClickException(
            f"{target}: expected results for {attack}, found {before['attack']}; move the file, or use its settings"
        )
    arms: dict[str, Any] = before["arms"]
    return arms


def trained_model(experiment: ArmsExperiment, name: str, seed: int) -> tuple[nn.Module, Tensor, Tensor] | None:
    """A trained encoder with the head, pixels → logits, and the seed's test images and labels; None if untrained."""
    trained = experiment.trained(name, seed)
    if trained is None:
        return None
    encoder = load_encoder(read_run(trained).encoder).requires_grad_(False)
    model = nn.Sequential(encoder, load_head(experiment.prepared.head)).eval()
    return model, *images_of(experiment.prepared.test(seed), encoder.input_shape)


def images_of(source: str, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """All images of a source, float32 [n, C, H, W] in [0, 1], and their labels, int64 [n]."""
    listed = open_source(source)
    pixels = np.stack([decode(listed.reader.read(sample), Preprocessing(shape=shape)) for sample in listed.samples])
    return torch.from_numpy(pixels).float() / 255, torch.tensor([sample.label for sample in listed.samples])


def accuracies(
    model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float, steps: int, batch_size: int
) -> dict[str, float]:
    """Fraction of correct classifications, clean and under each single attack.

    Args:
        model: pixels → logits.
        pixels: [n, C, H, W] in [0, 1].
        labels: [n].
        epsilon: radius of the attacks in [0, 1].
        steps: steps of each attack.
        batch_size: images attacked at a time.
    """
    attacks = {
        "PGD": torchattacks.PGD(model, epsilon, epsilon / 4, steps),
        "APGD-CE": torchattacks.APGD(model, eps=epsilon, steps=steps, loss="ce"),
    }
    correct = dict.fromkeys(("clean", *attacks), 0)
    for batch, label in zip(pixels.split(batch_size), labels.split(batch_size), strict=True):
        with torch.no_grad():
            correct["clean"] += int((model(batch).argmax(dim=1) == label).sum())
        for name, attack in attacks.items():
            torch.manual_seed(0)  # torchattacks draws starting points from the global generator
            found = attack(batch, label)
            with torch.no_grad():
                correct[name] += int((model(found).argmax(dim=1) == label).sum())
    return {name: count / len(labels) for name, count in correct.items()}


if __name__ == "__main__":
    main()
