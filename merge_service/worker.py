"""A worker as a plain object without Ray: merges whole shards and parts of shards, and clusters classes.

Two calls may run at the same time, in two threads: while one attacks or embeds, the other writes its records or
decodes its images. Each of the three stages admits one call, so at most two shards are in memory. A third thread
prepares the encoder's next batch and turns its last one into records.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from datamerge.encoders import Encoder, Head, load_encoder
from datamerge.runtime.machine import usable_cpus
from datamerge.runtime.memory import out_of_memory_advice
from datamerge.sources import Reader, Sample
from datamerge.sources.orientation import Exif
from merge_service.adversarial_groups import Attacker
from merge_service.batches_ahead import BatchesAhead
from merge_service.clean_groups import CleanImages
from merge_service.clustering import cluster_class
from merge_service.config import MergeConfig
from merge_service.planning import Items, ShardTask
from merge_service.precision import compare
from merge_service.reading import PixelReader, decoders_of_a_gpu
from merge_service.sample_groups import Accumulator, Partial
from storage_schemas import ArtifactWriter, ConfigError, Record, Reject
from storage_schemas.schema.preprocessing import Preprocessing


@dataclass(frozen=True)
class Wanted:
    """An encoder that workers load, and the facts by which they check that it is the planned one.

    Attributes:
        spec: its spec.
        sha256: SHA-256 of its weights.
        preprocessing: its preprocessing.
        code: hash of the user's code that builds it; None if a library builds it.
    """

    spec: str
    sha256: str
    preprocessing: Preprocessing
    code: str | None

    @classmethod
    def of(cls, encoder: Encoder) -> Wanted:
        """Describe the encoder that the plan was made with."""
        return cls(encoder.spec, encoder.sha256, encoder.preprocessing, encoder.code)

    def load(self, device: str) -> Encoder:
        """Load the encoder, frozen.

        Raises:
            ConfigError: its weights, code or preprocessing are not those of the plan.
        """
        encoder = load_encoder(self.spec, device, aloud=False)
        if encoder.sha256 != self.sha256:
            raise ConfigError(
                f"encoder: expected weights of {self.spec} with sha256 {self.sha256[:12]}…, found "
                f"{encoder.sha256[:12]}… on {socket.gethostname()}; give every node the same weights"
            )
        if encoder.code != self.code:
            raise ConfigError(
                f"encoder: expected the code of {self.spec} that the plan was made with, found other code on "
                f"{socket.gethostname()}; give every node the same files, and start again if they changed"
            )
        if different := encoder.preprocessing.differences(self.preprocessing):
            raise ConfigError(
                f"encoder: expected the planned preprocessing of {self.spec}, found "
                f"{'; '.join(different)} on {socket.gethostname()}; give every node the same files"
            )
        return encoder.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """Everything that a worker needs to start; sent to it once.

    Attributes:
        reader: reader of the source.
        preprocessing: preprocessing of the images.
        exif: whether EXIF orientations are applied.
        encoder, target_encoder: encoders to load; None where not needed.
        writer: None before the plan is made, when workers only cluster.
    """

    config: MergeConfig
    reader: Reader
    preprocessing: Preprocessing
    exif: Exif
    device: str
    encoder: Wanted | None = None
    target_encoder: Wanted | None = None
    head: Head | None = None
    writer: ArtifactWriter | None = None


@dataclass(frozen=True, slots=True)
class ShardResult:
    """The result of one shard; `remarks` counts the images on which `decode` remarked, by remark."""

    shard: int
    groups: int
    rejects: tuple[Reject, ...]
    attack_seconds: float
    remarks: Mapping[str, int]


class ShardWorker:
    """Merges shards with one encoder in memory. Call `prepare` first."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._config = setup.config
        self._attack_lock, self._write_lock = threading.Lock(), threading.Lock()
        self._beside = ThreadPoolExecutor(1, "beside", self._use_threads)
        on_gpu = setup.device.startswith("cuda")
        decoders = decoders_of_a_gpu(setup.config, *self._machine()) if on_gpu else setup.config.cpus
        self._reader = PixelReader(setup.reader, setup.preprocessing, decoders, setup.exif)
        self._encoder: Encoder | None = None
        self._maker: Attacker | CleanImages | None = None
        self._accumulator: Accumulator | None = None

    def prepare(self) -> None:
        """Load the encoders.

        Raises:
            ConfigError: an encoder is not the planned one, or there is no GPU.
        """
        setup = self._setup
        if setup.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f'device: expected a GPU on {socket.gethostname()}, found none; use `device="cpu"`')
        self._use_threads()
        target = setup.target_encoder.load(setup.device) if setup.target_encoder else None
        self._encoder = setup.encoder.load(setup.device) if setup.encoder else None
        if setup.head is not None:
            setup.head.to(setup.device)
        if setup.writer is not None:
            layout = setup.writer.layout
            if self._config.attacks and self._encoder is not None:
                self._maker = Attacker(self._config, layout, self._encoder, target or self._encoder, setup.head)
            elif self._config.grouping == "adversarial":
                self._maker = CleanImages(self._config, layout, self._encoder)
            self._accumulator = Accumulator(self._config, layout, self._reader, self._encoder)

    def run(self, task: ShardTask) -> ShardResult:
        """Merge one shard and commit it."""
        if self._maker is None:
            return self.complete(task, self.part(task.items))
        rejects: list[Reject] = []
        remarks: list[str] = []
        images = task.in_place(self._reader.read(task.as_read(), remarks))
        usable = []
        for group, image in zip(task.groups, images, strict=True):
            if isinstance(image, str):
                rejects.append(Reject(key=group.key, sample=group.samples[0].name, reason=image))
            else:
                usable.append((group, image))
        del images
        with out_of_memory_advice(self._advice):
            batches: BatchesAhead[Any, Any] = BatchesAhead(self._maker, usable, self._beside, rejects)
            with self._attack_lock:
                started = time.monotonic()
                self._use_threads()
                batches.run()
                seconds = time.monotonic() - started
            records = batches.records()
        return self._commit(task, records, rejects, remarks, seconds)

    def part(self, items: Items) -> Partial:
        """Add up a part of a shard's samples."""
        # Two parts at once would only wait for each other: each alternates between reading and the encoder.
        with self._attack_lock:
            self._use_threads()
            return self._accumulate.add_up(items)

    def complete(self, task: ShardTask, *partials: Partial) -> ShardResult:
        """Combine the parts of a shard, given in their order, and commit it."""
        whole = Partial()
        for partial in partials:
            whole.combine(partial)
        records, rejects = self._accumulate.records(task, whole)
        return self._commit(task, records, rejects, whole.remarks, 0.0)

    def cluster(self, label: int, samples: Sequence[Sample], clusters: int) -> list[int]:
        """The cluster of every sample of one class."""
        with self._attack_lock:
            self._use_threads()
            encoder = self._encoder if self._config.cluster_by == "embedding" else None
            seed = (self._config.seed, label)
            return cluster_class(samples, clusters, seed, self._reader, encoder, self._config.batch_size)

    def check_precision(self, task: ShardTask) -> str:
        """A line to print: how far the chosen precision is from float32 on the first groups of a shard."""
        if not isinstance(self._maker, Attacker):
            return ""
        groups = task.groups[: self._maker.groups_per_batch]
        images = self._reader.read([group.samples[0] for group in groups])
        batch = [(g, image) for g, image in zip(groups, images, strict=True) if not isinstance(image, str)]
        with self._attack_lock:
            self._use_threads()
            return compare(self._maker, batch) if batch else ""

    @property
    def model(self) -> nn.Module | None:
        """The network that the attack or the targets run, if any."""
        return self._maker.model if isinstance(self._maker, Attacker) else self._encoder

    @property
    def _accumulate(self) -> Accumulator:
        if self._accumulator is None:
            raise ConfigError("this worker was set up before the plan was made")
        return self._accumulator

    def _commit(
        self,
        task: ShardTask,
        records: list[Record],
        rejects: Sequence[Reject],
        remarks: Sequence[str],
        seconds: float,
    ) -> ShardResult:
        """Write a shard. Empties `records` as it goes: the next shard's records are made at the same time."""
        writer = self._setup.writer
        if writer is None:
            raise ConfigError("this worker was set up before the plan was made")
        with self._write_lock:
            commit = writer.commit(task.shard, _drained(records), rejects)
        return ShardResult(task.shard, len(commit.records), commit.rejects, seconds, Counter(remarks))

    def _machine(self) -> tuple[float, float]:
        """CPUs and GPUs of this machine, which its workers share."""
        return usable_cpus(), torch.cuda.device_count()

    def _advice(self) -> str:
        config = self._config
        if not config.attacks:
            images = config.batch_size
            return f"out of memory while {images} images were embedded at once; try a smaller `batch_size`"
        return (
            f"out of memory with {config.batch_size} images per batch and {config.group_size} members per "
            f"group in {config.precision}; try a smaller `batch_size` (a batch holds at least one group), "
            'fewer `members`, or `precision="bfloat16"`'
        )

    def _use_threads(self) -> None:
        # torch keeps this setting per thread, and calls arrive on several threads.
        torch.set_num_threads(self._config.threads)


def _drained(records: list[Record]) -> Iterator[Record]:
    """Yield the records in order; each is released when the next is taken."""
    records.reverse()
    while records:
        yield records.pop()
