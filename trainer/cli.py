"""`datamerge train`: flags to settings, outcomes to exit codes."""

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
    """Fine-tune an encoder on the groups of ARTIFACT, or of several; everything it writes goes to the folder RUN.

    \b
    datamerge train my-artifact my-run --preset paper
    datamerge train my-artifact my-baseline --preset paper --arm ind --members 2
    datamerge train my-artifact quick-look --epochs 1 --batch-size 16 --lr 1e-4
    datamerge train my-artifact my-run --preset stored --arm avg --ema 0.999 --freeze 'conv1.*'
    datamerge train photos s3://bucket/drawings=0.5 my-run --preset paper
    torchrun --nproc-per-node 8 -m datamerge train my-artifact my-run --preset stored

    The same command again continues an interrupted run, and does nothing for a finished one. RUN/run.json and
    RUN/encoder.safetensors appear at the end; `datamerge evaluate RUN` reads them. Follow a run with
    `tensorboard --logdir RUN`.
    """
    values = read_preset(preset) if preset else {}
    if flags.get("artifact") is None:  # a single place is the artifact's; a file says where RUN is
        flags |= {"artifact": flags.get("run"), "run": None}
    if flags.get("epochs") is not None:
        # The flag asks for another length in another unit; only one of the two can hold.
        values.pop("steps", None)
    elif flags.get("steps") is not None:
        values.pop("epochs", None)
    try:
        summary = run_training(load_settings(TrainConfig, file, flags, values))
    except Stopped as stopped:
        if is_first():
            click.echo(str(stopped), err=True)
        # A scheduler that sends SIGTERM wants an orderly end; a person who presses Ctrl-C wants the shell
        # to know.
        raise SystemExit(130 if stopped.signal == signal.SIGINT else 0) from None
    if is_first():
        click.echo(summary.model_dump_json() if as_json else summary.encoder)
