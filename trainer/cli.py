"""The command `datamerge train`: turns flags into settings and outcomes into exit codes."""

from __future__ import annotations

import signal
from typing import Any

import click

from datamerge.runtime import load_settings
from datamerge.runtime.options import HELP_FLAGS, options
from trainer.config import TrainConfig, preset_names, read_preset
from trainer.errors import Stopped
from trainer.run.distributed import is_first
from trainer.run.loop import train as run_training


@click.command(context_settings=HELP_FLAGS)
@options(TrainConfig)
@click.option("--preset", type=click.Choice(preset_names()), help="Settings that ship with datamerge.")
@click.option("--config", "file", metavar="FILE.toml", help="Settings from a file; flags override them.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary, RUN/run.json, instead of the encoder.")
def train(
    preset: str | None,
    file: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Fine-tune an encoder on the groups of one or more ARTIFACTs; all output goes to the folder RUN.

    \b
    datamerge train my-artifact my-run --preset paper
    datamerge train my-artifact my-baseline --preset paper --arm ind --members 2
    datamerge train my-artifact quick-look --epochs 1 --batch-size 16 --lr 1e-4
    datamerge train my-artifact my-run --preset stored --arm avg --ema 0.999 --freeze 'conv1.*'
    datamerge train photos s3://bucket/drawings=0.5 my-run --preset paper
    torchrun --nproc-per-node 8 -m datamerge train my-artifact my-run --preset stored

    Repeat the command to continue an interrupted run; it leaves a finished run as it is. RUN/run.json and
    RUN/encoder.safetensors appear at the end; `datamerge evaluate RUN` reads them. Follow a run with
    `tensorboard --logdir RUN`.
    """
    values = read_preset(preset) if preset else {}
    if flags.get("artifact") is None:  # one argument is ARTIFACT; RUN is then in the file
        flags |= {"artifact": flags.get("run"), "run": None}
    if flags.get("epochs") is not None:
        # A flag for the length replaces the preset's length, even in the other unit.
        values.pop("steps", None)
    elif flags.get("steps") is not None:
        values.pop("epochs", None)
    try:
        summary = run_training(load_settings(TrainConfig, file, flags, values))
    except Stopped as stopped:
        if is_first():
            click.echo(str(stopped), err=True)
        # To a scheduler that sends SIGTERM an orderly end is a success; after Ctrl-C the shell expects 130.
        raise SystemExit(130 if stopped.signal == signal.SIGINT else 0) from None
    if is_first():
        click.echo(summary.model_dump_json() if as_json else summary.encoder)
