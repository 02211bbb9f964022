"""The front's encoders under third-party attacks: APGD and PGD of torchattacks, and the authors' AutoAttack.

    python -m experiments.front.third_party experiments/front/cifar10-2.toml --data "$DATAMERGE_DATA" --work front

Needs the PyPI packages torchattacks and pyautoattack (the authors' code). Reads the runs of `experiments.front.run`
in --work. Writes third-party-NAME.json beside the settings.
"""

from __future__ import annotations

import json
import tomllib
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from experiments.arms import settings_options
from experiments.front.run import Front
from experiments.third_party import accuracies, trained_model
from storage_schemas.schema.run import BASELINE


@click.command()
@settings_options
@click.option("--passes", multiple=True, type=int, help="Attack these budgets only.")
@click.option("--steps", default=100, show_default=True, help="Steps of PGD and APGD.")
@click.option("--autoattack", "count", metavar="IMAGES", default=0, help="Also run AutoAttack on this many images.")
@click.option("--epsilon", metavar="FRACTION", help="Radius of the attacks. [that of SETTINGS]")
def main(
    settings: Path,
    data: Path,
    work: Path,
    seeds: str,
    only: tuple[str, ...],
    passes: tuple[int, ...],
    steps: int,
    count: int,
    epsilon: str | None,
) -> None:
    """Attack the trained encoders of SETTINGS."""
    torch.set_num_threads(1)
    front = Front(tomllib.loads(settings.read_text()), data, work, settings.stem)
    target = settings.with_name(f"third-party-{settings.stem}.json")
    facts: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    radius = float(Fraction(epsilon or front.settings["evaluate"]["epsilon"]))
    names = [(BASELINE, BASELINE)] if BASELINE in only or not only else []
    for arm in front.settings["arms"]:
        for budget in sorted({point.passes for point in front.points() if point.arm == arm}):
            if (not only or arm in only) and (not passes or budget in passes):
                names.append((f"{arm}, {budget} passes", front.best(arm, budget).name))
    for title, name in names:
        for seed in (int(text) for text in seeds.split(",") if text):
            if (attacked := trained_model(front.measuring, name, seed)) is None:
                continue
            model, pixels, labels = attacked
            key = f"torchattacks {version('torchattacks')}, {steps} steps, radius {radius:.6f}"
            found = facts.setdefault(title, {}).setdefault(str(seed), {})
            if key not in found:
                found[key] = accuracies(model, pixels, labels, radius, steps, 100)
            key = f"pyautoattack {version('pyautoattack')}, {count} images, radius {radius:.6f}"
            if count and key not in found:
                found[key] = _auto_attack(model, pixels[:count], labels[:count], radius)
            click.echo(f"{title}, seed {seed}: {found}")
            target.write_text(json.dumps(facts, indent=1) + "\n")


def _auto_attack(model: nn.Module, pixels: Tensor, labels: Tensor, radius: float) -> float:
    """Robust accuracy under the standard AutoAttack, as a fraction."""
    attack = AutoAttack(model, norm="Linf", eps=radius, version="standard", device="cpu", seed=0)
    found, _ = attack.run_standard_evaluation(pixels, labels, batch_size=100)
    with torch.no_grad():
        return float((model(found).argmax(dim=1) == labels).float().mean())


if __name__ == "__main__":
    main()
