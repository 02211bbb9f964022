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
from fractions import Fraction
from typing import Any

import click
import numpy as np
import torch

from datamerge.attacks import PGD, attack, sample_generators, squared_error
from datamerge.encoders import Encoder, load_encoder
from datamerge.runtime import load_settings
from datamerge.sources import BadImage, Sample, Source, decode, open_source
from storage_schemas import DatamergeError
from trainer import RunSummary, SquaredError, Stopped, TrainConfig
from trainer.config import parse_override
from trainer.data.order import Layout, Order
from trainer.data.stream import Batch
from trainer.run.checkpoint import RunFolder
from trainer.run.distributed import processes
from trainer.run.job import Job, Origin, choose_device, free_of_place, length, ready, warn_of_start
from trainer.run.loop import run_job

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

    def __call__(self, layout: Layout, start: int, stop: int) -> Iterator[Batch]:
        for step in range(start, stop):
            for share in self._order.shares(step, layout):
                samples = [self._source.samples[index] for index in share.indices]
                pixels = torch.from_numpy(np.stack([self._decode(sample) for sample in samples]))
                clean = pixels.to(self._device).float() / 255
                with torch.no_grad():
                    target = self._original(clean)
                yield Batch(
                    keys=[sample.name for sample in samples],
                    mean=None,
                    variance=None,
                    target=target,
                    members=self._attack(clean, target, samples, step),
                    counts=[1] * len(samples),
                )

    def _decode(self, sample: Sample) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        try:
            return decode(self._source.reader.read(sample), self._encoder.input_shape)
        except (BadImage, OSError) as error:
            raise DatamergeError(f"{sample.name}: expected an image, {error}; remove it from the data") from None

    def _attack(self, clean: torch.Tensor, target: torch.Tensor, samples: list[Sample], step: int) -> torch.Tensor:
        modes = [(module, module.training) for module in self._encoder.modules()]
        frozen = [parameter for parameter in self._encoder.parameters() if not parameter.requires_grad]
        self._encoder.eval()
        generators = [sample_generators(self._seed, f"{step}/{sample.name}", 1)[0] for sample in samples]
        names = [sample.name for sample in samples]
        attacked = attack(self._encoder, clean, target, squared_error, self._settings, generators, names)
        for module, training in modes:
            module.training = training
        for parameter in frozen:  # the attack leaves all parameters trainable
            parameter.requires_grad_(False)
        return (attacked.pixels * 255).round().to(torch.uint8)


@click.command()
@click.argument("data")
@click.argument("run")
@click.option("--encoder", required=True, metavar="SPEC")
@click.option("--epsilon", default="2/255", show_default=True)
@click.option("--step-size", default="1/255", show_default=True)
@click.option("--attack-steps", default=10, show_default=True)
@click.option("--steps", default=20_000, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--lr", "learning_rate", default=1e-5, show_default=True)
@click.option("--warmup", "warmup_steps", default=1400, show_default=True)
@click.option("--limit", type=int, help="Use the first so many images.")
@click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE", help="Any setting of `datamerge train`.")
def main(
    data: str,
    run: str,
    epsilon: str,
    step_size: str,
    attack_steps: int,
    limit: int | None,
    overrides: list[str],
    **flags: Any,
) -> None:
    """Fine-tune an encoder on freshly attacked images of DATA; everything it writes goes to the folder RUN."""
    for text in overrides:
        flags |= parse_override(text)
    settings = {"artifact": data, "run": run, "arm": "ind", "members": 1, **flags}
    try:
        config = load_settings(TrainConfig, None, settings)
        summary = train_online(config, PGD(Fraction(epsilon), Fraction(step_size), attack_steps), limit)
    except Stopped as stopped:
        click.echo(str(stopped), err=True)
        raise SystemExit(130 if stopped.signal == signal.SIGINT else 0) from None
    except DatamergeError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    click.echo(summary.encoder)


def train_online(config: TrainConfig, settings: PGD, limit: int | None = None) -> RunSummary:
    """Train on attacks of the encoder as it is at each step.

    Args:
        config: arm `ind` with one member; `artifact` is the source of the raw images.
        settings: of the attack.
        limit: use the first so many images.
    """
    with processes(config.device) as own:
        device = choose_device(config.device, own)
        source = open_source(config.artifact, limit=limit)
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
    attacked = {"epsilon": str(settings.epsilon), "step_size": str(settings.step_size), "steps": settings.steps}
    return Job(
        config=config,
        encoder=encoder,
        model=ready(encoder, None, config, device),
        loss=SquaredError(config.loss_scale),
        order=order,
        feed=OnlineFeed(source, encoder, order, settings, config.seed, device),
        held_out=None,
        origin=Origin(source.url, source.fingerprint, "FARE online", int(np.prod(encoder.input_shape))),
        device=device,
        identity={
            **free_of_place(config),
            "attack": attacked,
            "images": len(source.samples),
            "plan_sha256": source.fingerprint,
            "encoder_sha256": encoder.sha256,
        },
    )


if __name__ == "__main__":
    main()
