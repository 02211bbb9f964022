"""The parts of `benchmarks.gpu`: each yields rows as it measures, on a GPU or, in a rehearsal, tiny on the CPU."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.training import ARMS, make_artifact
from datamerge.attacks import Ball, Precision, arithmetic, ascend, frozen, squared_error
from datamerge.attacks.ball import Gradients
from datamerge.encoders import Encoder, load_encoder
from trainer import TrainConfig
from trainer.data.order import WHOLE
from trainer.run.distributed import Processes
from trainer.run.forward import Forward
from trainer.run.job import make_job
from trainer.run.update import Optimisation

RATES = "rates"
PRECISIONS: tuple[Precision, ...] = ("bfloat16", "tf32", "float32")
Rates = Mapping[str, float]
"""By precision, TFLOP/s of a large matrix product on this GPU."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part, what: its name.
        ms: milliseconds.
        share: of the rate of a matrix product in the same precision, counting all products and convolutions.
        rate, unit: so much a second.
        gigabytes: largest allocation on the GPU.
        failed: it could not be measured; `what` says why.
    """

    part: str
    what: str
    ms: float | None = None
    share: float | None = None
    rate: float | None = None
    unit: str = ""
    gigabytes: float | None = None
    failed: bool = False

    def cells(self) -> list[str]:
        """Of its row in the table."""
        rate = "" if self.rate is None else f"{self.rate:.4g} {self.unit}"
        numbers = ("" if self.ms is None else f"{self.ms:.4g}", "" if self.share is None else f"{self.share:.0%}")
        return [self.part, self.what, *numbers, rate, "" if self.gigabytes is None else f"{self.gigabytes:.2f}"]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Raises ValueError for a line that is none."""
        values = json.loads(line)
        if not isinstance(values, dict) or "part" not in values:
            raise ValueError(f"no row: {line!r}")
        return cls(**values)


@dataclass(frozen=True)
class Sizes:
    """Of all parts.

    Attributes:
        base, large, convolutional: encoders.
        side: of the matrices.
        images: attacked at once.
        batch: groups a step, with the base and the large encoder.
        groups: that are read, and merged in a shard.
    """

    device: torch.device
    base: str
    large: str
    convolutional: str
    side: int
    images: tuple[int, ...]
    batch: tuple[int, int]
    groups: int
    repeats: int


def sizes(rehearse: bool) -> Sizes:
    """Those of a GPU, or of a rehearsal."""
    if rehearse:
        tiny = "mlp:3x32x32-16-8"
        return Sizes(torch.device("cpu"), tiny, tiny, "timm:test_resnet", 64, (2,), (2, 2), 4, 1)
    base, large = "open_clip:ViT-B-32", "open_clip:ViT-L-14"
    return Sizes(torch.device("cuda"), base, large, "timm:resnet50", 8192, (60, 256, 512), (128, 32), 64, 5)


class Timed(NamedTuple):
    """Median milliseconds, and the most gigabytes that were allocated meanwhile, None on a CPU."""

    ms: float
    gigabytes: float | None


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> Timed:
    """Time some work; done once before, to warm up."""
    cuda = device.type == "cuda"
    work()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - started))
    return Timed(statistics.median(found), torch.cuda.max_memory_allocated() / 1e9 if cuda else None)


class _Counted(TorchDispatchMode):
    """Adds up the operations of products and convolutions, backward ones too.

    torch's own `FlopCounterMode` follows modules through the backward pass, and fails where `autograd.grad` is asked
    for a leaf.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=found)
        return found


def teraflops(work: Callable[[], object]) -> float:
    """Of all products and convolutions in some work, which is done once."""
    with _Counted() as counted:
        work()
    return float(counted.operations / 1e12)


def share(ms: float, operations: float, rates: Rates, precision: str) -> float | None:
    """Of the measured rate, for so many teraflops."""
    peak = rates.get(precision)
    return None if not peak else operations / (ms / 1000) / peak


def rate_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """What the shares are of: matrix products on random numbers (zeros are faster), and copies."""
    size = sizes(rehearse)
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        one, other = (torch.randn(size.side, size.side, device=size.device).to(dtype) for _ in range(2))
        with arithmetic(size.device, tf32=precision == "tf32"):
            ms, _ = timed(lambda: one @ other, size.device, size.repeats)  # noqa: B023 - at once
        yield Row(RATES, precision, ms, rate=2 * size.side**3 / 1e12 / (ms / 1000), unit="TFLOP")
    values = torch.randn(4 * size.side, size.side, device=size.device)
    ms, _ = timed(values.clone, size.device, size.repeats)
    yield Row(RATES, "copy on the device", ms, rate=2 * values.nbytes / 1e9 / (ms / 1000), unit="GB")
    here = torch.zeros(size.side, size.side, dtype=torch.float32)
    for what, source in (("pageable", here), ("pinned", here.pin_memory() if not rehearse else here)):
        ms, _ = timed(lambda: source.to(size.device, non_blocking=True), size.device, size.repeats)  # noqa: B023
        yield Row(RATES, f"copy to the device, {what}", ms, rate=here.nbytes / 1e9 / (ms / 1000), unit="GB")


def attack_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """Steps of PGD, without the random starts and the losses of its result."""
    size = sizes(rehearse)
    for name, spec in (("base", size.base), ("large", size.large)):
        encoder = load_encoder(spec, str(size.device)).requires_grad_(False)
        for precision in PRECISIONS:
            for count in size.images[:1] if precision == "float32" else size.images[: 3 if name == "base" else 2]:
                yield _attack(f"{name}, {precision}, {count} images", encoder, count, precision, size, rates)
        with patch("datamerge.attacks.arithmetic.fixed_order", lambda _: nullcontext()):
            what = f"{name}, bfloat16, {size.images[0]} images, sums in any order"
            yield _attack(what, encoder, size.images[0], "bfloat16", size, rates)
        compiled = torch.compile(encoder, backend="eager" if rehearse else "inductor")
        what = f"{name}, bfloat16, {size.images[0]} images, compiled"
        yield _attack(what, encoder, size.images[0], "bfloat16", size, rates, compiled)  # type: ignore[arg-type]


def _attack(
    what: str,
    encoder: Encoder,
    count: int,
    precision: Precision,
    size: Sizes,
    rates: Rates,
    model: nn.Module | None = None,
) -> Row:
    clean = (torch.rand(count, *encoder.input_shape) * 255).round().to(size.device) / 255
    target = torch.zeros(count, encoder.embedding_dim, device=size.device)
    steps, repeats = 3, 2 if precision == "float32" else size.repeats

    def run(model: nn.Module, count: int, steps: int) -> None:
        ball = Ball.around(clean[:count], Fraction(2, 255), grid=True)
        gradients = Gradients(model, target[:count], squared_error, ball.scale, precision)
        with frozen(model):
            ascend(ball, gradients.at, ball.centre.clone(), 1.0, steps)

    ms, memory = timed(lambda: run(encoder if model is None else model, count, steps), size.device, repeats)
    ms /= steps * count
    operations = teraflops(lambda: run(encoder, 1, 1))
    return Row(
        "attack",
        f"{what}: an image and step",
        ms,
        share(ms, operations, rates, precision),
        1000 / ms,
        "images",
        memory,
    )


def merge_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """Whole shards by one worker with two threads: decoding, attack, moments, writing."""
    from merge_service import MergeConfig
    from merge_service.merge import prepare, worker_setup
    from merge_service.worker import ShardWorker
    from storage_schemas import ArtifactWriter, Location

    size, shards = sizes(rehearse), 3
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        side = load_encoder(size.base).input_shape[1]
        (folder / "photos").mkdir()
        for number in range(shards * size.groups):
            coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / "photos" / f"{number:04}.jpg")
        for precision in PRECISIONS[:1] if rehearse else ("bfloat16", "tf32"):
            config = MergeConfig.model_validate(
                {
                    "source": str(folder / "photos"),
                    "artifact": str(folder / precision),
                    "encoder": size.base,
                    "members": 10,
                    "steps": 10,
                    "factors": 1,
                    "precision": precision,
                    "groups_per_shard": size.groups,
                    "batch_size": 512,
                    "device": str(size.device),
                }
            )
            prepared = prepare(config)
            writer = ArtifactWriter(Location(config.artifact), prepared.plan.layout, prepared.plan.provenance)
            writer.begin(prepared.files)
            worker = ShardWorker(worker_setup(prepared, writer, str(size.device)))
            worker.prepare()
            worker.run(prepared.plan.task(0))  # warms up
            started = time.perf_counter()
            with ThreadPoolExecutor(2) as threads:
                found = list(threads.map(lambda shard: worker.run(prepared.plan.task(shard)), range(1, shards)))  # noqa: B023
            seconds = time.perf_counter() - started
            groups, attacking = sum(one.groups for one in found), sum(one.attack_seconds for one in found)
            what = f"base, {precision}, a group; attacking {attacking / seconds:.0%} of the time"
            yield Row("merge", what, 1000 * seconds / groups, rate=groups / seconds, unit="groups")


def layer_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """The gradient of pixels through a patch embedding, two ways; a ResNet in both orders of memory."""
    size = sizes(rehearse)
    count, side, patch, width = (2, 16, 8, 4) if rehearse else (256, 224, 14, 1024)
    pixels = torch.rand(count, 3, side, side, device=size.device, requires_grad=True)
    weight = torch.randn(width, 3, patch, patch, device=size.device)

    def convolution() -> Tensor:
        return nn.functional.conv2d(pixels, weight, stride=patch)

    def product() -> Tensor:
        cut = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return torch.matmul(cut, weight.flatten(1).T)

    for precision in PRECISIONS[:2]:
        for name, forward in (("convolution", convolution), ("product", product)):

            def gradient(forward: Callable[[], Tensor] = forward, half: bool = precision == "bfloat16") -> None:
                with torch.autocast(size.device.type, torch.bfloat16, enabled=half):
                    outputs = forward()
                torch.autograd.grad(outputs.sum(), pixels)

            with arithmetic(size.device, tf32=True):
                ms, memory = timed(gradient, size.device, size.repeats)
            yield Row("layers", f"patches of {count} images as a {name}, {precision}", ms, gigabytes=memory)
    for order in (torch.channels_last, torch.contiguous_format):
        encoder = load_encoder(size.convolutional, str(size.device)).requires_grad_(False)
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=order)  # type: ignore[call-overload]
        for precision in PRECISIONS:
            what = f"{size.convolutional}, {precision}, {str(order).removeprefix('torch.')}"
            yield replace(_attack(what, encoder, size.images[0], precision, size, rates), part="layers")


def train_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """Steps of all arms on batches in memory, and AdamW alone."""
    size = sizes(rehearse)
    arms = {"base": list(ARMS), "large": ["gauss_newton", "factors"]}
    with tempfile.TemporaryDirectory() as name:
        for (encoder, spec), batch in zip((("base", size.base), ("large", size.large)), size.batch, strict=True):
            artifact = make_artifact(Path(name, encoder), spec, "zarr", batch, 4, factors=1)
            for arm in arms[encoder]:
                yield from _train(encoder, arm, artifact, batch, size, rates)
        parameters = [nn.Parameter(p.detach()) for p in load_encoder(size.large, str(size.device)).parameters()]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        for kind in ("foreach", "fused"):
            optimizer = torch.optim.AdamW(parameters, lr=1e-9, **{kind: True})  # type: ignore[arg-type]
            ms, memory = timed(optimizer.step, size.device, size.repeats)
            yield Row("train", f"AdamW of the large encoder, {kind}", ms, gigabytes=memory)


def _train(name: str, arm: str, artifact: str, batch: int, size: Sizes, rates: Rates) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as run:
        shared = {"batch_size": batch, "steps": 100, "device": str(size.device)}
        job = make_job(TrainConfig.model_validate({"artifact": artifact, "run": run, **shared, **ARMS[arm]}))
        (stored,) = job.feed(WHOLE, 0, 1)
        for precision in ("bfloat16", "float32"):
            config = job.config.model_copy(update={"precision": precision})
            training = Optimisation(
                replace(job, config=config, model=Forward(job.encoder, job.model.head, config.precision)), Processes()
            )

            def step(training: Optimisation = training) -> None:
                training.step(0, iter([stored]), lambda: 0)

            with arithmetic(size.device, tf32=precision != "float32"):
                operations = teraflops(step)
                ms, memory = timed(step, size.device, size.repeats)
            part = share(ms, operations, rates, precision)
            yield Row(
                "train", f"{name}, {arm}, {precision}, {batch} groups", ms, part, 1000 * batch / ms, "groups", memory
            )


def feed_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """What reading hands over while nobody trains."""
    size = sizes(rehearse)
    groups = 4 * size.groups
    with tempfile.TemporaryDirectory() as name:
        for kind in ("zarr", "webdataset"):
            artifact = make_artifact(Path(name, kind), size.base, kind, groups, 4, factors=1)
            for workers in (0,) if rehearse else (0, 4):
                for arm in ("factors", "gauss_newton"):
                    shared = {"batch_size": size.groups, "epochs": 4, "device": str(size.device)}
                    config = {"artifact": artifact, "run": str(Path(name, "run")), "data_workers": workers}
                    job = make_job(TrainConfig.model_validate({**config, **shared, **ARMS[arm]}))
                    feed = iter(job.feed(WHOLE, 0, job.steps))
                    next(feed)
                    started = time.perf_counter()
                    count = sum(len(batch.to(size.device).keys) for batch in feed)
                    seconds = time.perf_counter() - started
                    what = f"{kind}, {arm}, {workers} workers, a group"
                    yield Row("feed", what, 1000 * seconds / count, rate=count / seconds, unit="groups")


@dataclass(frozen=True)
class Part:
    """Rows of a rehearsal or not, given the rates; and the seconds that it may take."""

    work: Callable[[bool, Rates], Iterator[Row]]
    limit: float


PARTS: dict[str, Part] = {
    RATES: Part(rate_rows, 40),
    "attack": Part(attack_rows, 90),
    "merge": Part(merge_rows, 60),
    "train": Part(train_rows, 90),
    "feed": Part(feed_rows, 60),
    "layers": Part(layer_rows, 45),
}
