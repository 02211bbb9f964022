"""`datamerge train`: flags to settings, outcomes to exit codes."""

from __future__ import annotations

import signal
from typing import Any, get_args

import click

from datamerge.runtime import load_settings
from trainer.config import (
    Arm,
    EstimatorName,
    LossName,
    Precision,
    TrainConfig,
    parse_override,
    preset_names,
    read_preset,
)
from trainer.run.loop import train as run_training
from trainer.run.signals import Stopped


@click.command()
@click.argument("artifact")
@click.argument("run")
@click.option("--preset", type=click.Choice(preset_names()), help="Settings that ship with datamerge.")
@click.option("--config", "file", metavar="FILE.toml", help="Settings from a file; flags override them.")
@click.option("--set", "overrides", metavar="NAME=VALUE", multiple=True, help="Any setting; wins over all others.")
@click.option("--arm", type=click.Choice(get_args(Arm)), help="Merged groups, stored members, or means only. [avg]")
@click.option("--members", type=int, help="For ind, random-member: first so many stored members of each group. [all]")
@click.option(
    "--estimator",
    type=click.Choice(get_args(EstimatorName)),
    help="[avg: gauss_newton; factors: sampled]",
)
@click.option("--loss", type=click.Choice(get_args(LossName)), help="[auto: by what the artifact stores]")
@click.option("--encoder", metavar="SPEC", help="Encoder to start from. [the artifact's]")
@click.option("--head", metavar="SPEC", help="Frozen class head for cross_entropy. [the artifact's]")
@click.option("--steps", type=int, help="Length of the run in optimiser steps.")
@click.option("--epochs", type=int, help="Length of the run in passes over the artifact.")
@click.option("--batch-size", type=int, help="Groups per step, over all processes. [1]")
@click.option("--accumulate", type=int, help="Micro-batches per process and step; saves memory. [1]")
@click.option("--deviation", type=float, help="Along factors, in units of what they are; arm factors. [1]")
@click.option("--refine", "refine_steps", type=int, help="PGD steps that bring stored images up to date. [0]")
@click.option("--precision", type=click.Choice(get_args(Precision)), help="[float32]")
@click.option("--lr", "learning_rate", type=float, help="Peak learning rate. [1e-5]")
@click.option("--weight-decay", type=float, help="Decoupled weight decay. [1e-4]")
@click.option("--warmup", "warmup_steps", type=int, help="Steps of linear warm-up. [0]")
@click.option("--clip", "gradient_clip", type=float, help="Largest allowed gradient norm. [none]")
@click.option("--seed", type=int, help="Seed of the order of groups and of all random draws. [0]")
@click.option("--device", help="cpu, cuda, cuda:1 … [auto]")
@click.option("--checkpoint-every", type=int, help="Steps between two checkpoints. [500]")
@click.option("--cache", metavar="DIR", help="Local copies of a remote artifact, up to cache_bytes. [none]")
@click.option("--data-workers", type=int, help="Processes that read ahead; 0 uses a thread. [0]")
@click.option(
    "--eval-artifact", metavar="ARTIFACT", help="Held-out artifact: logs its loss and keeps the best state."
)
@click.option("--ray-workers", type=int, help="Train on this many Ray workers; restarts them when one dies.")
@click.option("--ray-address", metavar="ADDRESS", help="Ray cluster to use. [starts Ray here]")
@click.option("--json", "as_json", is_flag=True, help="Print the summary, RUN/run.json, instead of the encoder.")
def train(
    preset: str | None,
    file: str | None,
    overrides: tuple[str, ...],
    ray_workers: int | None,
    ray_address: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Fine-tune an encoder on the groups of ARTIFACT; everything it writes goes to the folder RUN.

    \b
    datamerge train my-artifact my-run --preset paper
    datamerge train my-artifact my-baseline --preset paper --arm ind --members 2
    datamerge train my-artifact quick-look --epochs 1 --batch-size 16 --lr 1e-4
    datamerge train my-artifact my-run --preset fare2 --arm avg --set ema=0.999 --set 'freeze=["conv1.*"]'
    torchrun --nproc-per-node 8 -m datamerge train my-artifact my-run --preset fare2

    The same command again continues an interrupted run, and does nothing for a finished one. RUN/run.json and
    RUN/encoder.safetensors appear at the end; `datamerge evaluate RUN` reads them. Follow a run with
    `tensorboard --logdir RUN`.
    """
    values = read_preset(preset) if preset else {}
    for text in overrides:
        flags |= parse_override(text)
    if flags.get("epochs") is not None:
        # The flag asks for another length in another unit; only one of the two can hold.
        values.pop("steps", None)
    elif flags.get("steps") is not None:
        values.pop("epochs", None)
    try:
        config = load_settings(TrainConfig, file, flags, values)
        if ray_workers is None and ray_address is None:
            summary = run_training(config)
        else:
            from trainer.run.ray_launch import train_on_ray  # takes a second, and needs the extra `ray`

            summary = train_on_ray(config, ray_workers or 1, ray_address)
    except Stopped as stopped:
        click.echo(str(stopped), err=True)
        # A scheduler that sends SIGTERM wants an orderly end; a person who presses Ctrl-C wants the shell
        # to know.
        raise SystemExit(130 if stopped.signal == signal.SIGINT else 0) from None
    click.echo(summary.model_dump_json() if as_json else summary.encoder)
