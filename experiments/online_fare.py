"""Online FARE, the upper bound of what stored groups can reach: a fresh PGD attack on the current encoder every step.

    python experiments/online_fare.py DATA RUN --encoder open_clip:ViT-L-14/openai --epsilon 2/255

The loop, the settings and the run folder are those of `datamerge train`, so `datamerge evaluate RUN` reads the
result and the same command continues an interrupted run to the same bits; only the feed differs. In each step it
decodes a batch of images, embeds them with the frozen original encoder, attacks the encoder that is being trained,
and hands over the attacked images as the single members of their groups (Schlarmann et al. 2024, PAPER.md §4).
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from typing import Any, ClassVar

import click
import numpy as np
import torch
from pydantic import Field

from datamerge.attacks import PGD, attack, sample_generators, squared_error
from datamerge.encoders import Encoder, load_encoder
from datamerge.runtime import Settings, load_settings
from datamerge.runtime.fields import LIMITS, Limit, LimitFirst
from datamerge.runtime.options import as_flags, options
from datamerge.runtime.settings import Effect
from datamerge.sources import BadImage, Sample, Source, decode, open_source
from storage_schemas import DatamergeError
from storage_schemas.schema.pixel_length import PixelLength
from storage_schemas.schema.run import TrainedArtifact
from trainer import RunSummary, SquaredError, Stopped, TrainConfig
from trainer.data.batches import ImageBatch, pixels
from trainer.data.order import Order, Partition
from trainer.run.checkpoint import RunFolder
from trainer.run.distributed import processes
from trainer.run.identity import free_of_place
from trainer.run.job import Job, Origin, choose_device, length, ready, warn_of_start
from trainer.run.loop import run_job

# FARE's; flags override them.
DEFAULTS = {"arm": "ind", "members": 1, "steps": 20_000, "batch_size": 128, "warmup_steps": 1400}
# Settings of stored groups, and those that are fixed above.
NOT_ONLINE = {
    *("artifact", "run", "arm", "members", "loss", "estimator", "samples", "deviation", "head", "epsilon"),
    *("refine_steps", "refine_step_size", "eval_artifact", "eval_every", "cache", "cache_bytes", "data_workers"),
}
# Samples are permuted in blocks of this many, as groups are in shards.
BLOCK = 1024


class OnlineFeed:
    """Attacked images instead of stored ones; a function of the seed, the step and the encoder's weights.

    Args:
        source: raw images.
        encoder: the one that is trained; it is attacked as it is at each step.
        order: which images form which step.
        settings: of the attack.
        seed: of the attack's starts.
        device: where the encoder is.
    """

    def __init__(
        self, source: Source, encoder: Encoder, order: Order, settings: PGD, seed: int, device: torch.device
    ) -> None:
        self._source, self._encoder, self._order = source, encoder, order
        self._settings, self._seed, self._device = settings, seed, device
        self._original = copy.deepcopy(encoder).eval().requires_grad_(False)

    def __call__(self, partition: Partition, start: int, stop: int) -> Iterator[ImageBatch]:
        for step in range(start, stop):
            for share in self._order.shares(step, partition):
                samples = [self._source.samples[index] for index in share.indices]
                clean = pixels(np.stack([self._decode(sample) for sample in samples])).to(self._device)
                with torch.no_grad():
                    target = self._original(clean)
                yield ImageBatch(
                    keys=[sample.name for sample in samples],
                    target=target,
                    images=self._attack(clean, target, samples, step),
                    counts=[1] * len(samples),
                )

    def _decode(self, sample: Sample) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        try:
            return decode(self._source.reader.read(sample), self._encoder.preprocessing)
        except (BadImage, OSError) as error:
            raise DatamergeError(f"{sample.name}: expected an image, {error}; remove it from the data") from None

    def _attack(self, clean: torch.Tensor, target: torch.Tensor, samples: list[Sample], step: int) -> torch.Tensor:
        modes = [(module, module.training) for module in self._encoder.modules()]
        self._encoder.eval()
        generators = [sample_generators(self._seed, f"{step}/{sample.name}", 1)[0] for sample in samples]
        names = [sample.name for sample in samples]
        attacked = attack(self._encoder, clean, target, squared_error, self._settings, generators, names)
        for module, training in modes:
            module.training = training
        return attacked.pixels


class OnlineAttack(Settings):
    """The attack of every step, and which images it is made of."""

    effects: ClassVar[tuple[Effect, ...]] = (LIMITS,)

    epsilon: PixelLength = Field(default=PixelLength("2/255"), description="Radius of the ball.")
    step_size: PixelLength = Field(default=PixelLength("1/255"), description="Length of a step.")
    attack_steps: int = Field(default=10, ge=0, description="Gradient steps.")
    limit: Limit = None
    limit_first: LimitFirst = None


@click.command()
@click.argument("data")
@click.argument("run")
@options(OnlineAttack)
@options(TrainConfig, leave_out=NOT_ONLINE)
def main(data: str, run: str, **flags: Any) -> None:
    """Fine-tune an encoder on freshly attacked images of DATA; everything it writes goes to the folder RUN."""
    attacking = {name: flags.pop(name) for name in OnlineAttack.model_fields}
    try:
        wanted = load_settings(OnlineAttack, None, attacking)
        # Only one of the two lengths can hold.
        preset = {name: value for name, value in DEFAULTS.items() if name != "steps" or flags["epochs"] is None}
        config = load_settings(TrainConfig, None, {"artifact": data, "run": run, **flags}, preset)
        settings = PGD(wanted.epsilon, wanted.step_size, wanted.attack_steps)
        summary = train_online(config, settings, wanted.limit, wanted.limit_first)
    except Stopped as stopped:
        click.echo(str(stopped), err=True)
        raise SystemExit(130 if stopped.signal == signal.SIGINT else 0) from None
    except DatamergeError as error:
        click.echo(f"error: {as_flags(str(error))}", err=True)
        raise SystemExit(error.exit_code) from None
    click.echo(summary.encoder)


def train_online(
    config: TrainConfig, settings: PGD, limit: int | None = None, limit_first: int | None = None
) -> RunSummary:
    """Train on attacks of the encoder as it is at each step.

    Args:
        config: arm `ind` with one member; `artifact` is the source of the raw images.
        settings: of the attack.
        limit: draw so many images by the run's seed, evenly over the source.
        limit_first: use the first so many images.
    """
    with processes(config.device) as own:
        device = choose_device(config.device, own)
        source = open_source(config.artifacts[0].url, limit=limit, limit_first=limit_first, seed=config.seed)
        sizes = [min(BLOCK, len(source.samples) - first) for first in range(0, len(source.samples), BLOCK)]
        order = Order(sizes, config.batch_size, config.seed)
        steps = length(config, order, own)
        encoder = load_encoder(str(config.encoder), str(device))
        warn_of_start(encoder)
        resolved = {"artifact": source.url, "steps": steps, "epochs": None, "encoder": encoder.spec}
        config = config.model_copy(update={**resolved, "loss": "squared_error"})
        return run_job(_job(config, settings, source, encoder, order, device), RunFolder(config.run), own)


def _job(
    config: TrainConfig, settings: PGD, source: Source, encoder: Encoder, order: Order, device: torch.device
) -> Job:
    images = TrainedArtifact(url=source.url, plan_sha256=source.fingerprint, weight=1, groups=len(source.samples))
    attacked = {"epsilon": str(settings.epsilon), "step_size": str(settings.step_size), "steps": settings.steps}
    return Job(
        config=config,
        encoder=encoder,
        model=ready(encoder, None, config, device),
        loss=SquaredError(config.loss_scale),
        order=order,
        feed=OnlineFeed(source, encoder, order, settings, config.seed, device),
        held_out=None,
        origin=Origin((images,), source.fingerprint, "FARE online", int(np.prod(encoder.input_shape))),
        device=device,
        identity={
            **free_of_place(config),
            "attack": attacked,
            "images": len(source.samples),
            **({"drawn_from": source.drawn_from} if source.drawn_from is not None else {}),
            "plan_sha256": source.fingerprint,
            "encoder_sha256": encoder.sha256,
        },
    )


if __name__ == "__main__":
    main()
