"""Reads and decodes samples, several at a time. An unusable sample gives a reason, not an error."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import numpy.typing as npt

from datamerge.runtime.messages import first_line
from datamerge.sources import BadImage, RawImage, Reader, Sample, decode
from datamerge.sources.orientation import Exif
from merge_service.config import MergeConfig
from merge_service.failures import may_pass
from storage_schemas import CorruptShard, DatamergeError
from storage_schemas.access.retries import is_transient, retry
from storage_schemas.schema.preprocessing import Preprocessing

Pixels = npt.NDArray[np.uint8]

# Seconds between tries to read a sample; `Location` retries requests separately.
WAITS = (0.25, 1.0, 5.0)

# Enough to keep a GPU busy: a thread decodes an image in some 4 ms.
MOST_DECODERS = 16

# A remote store takes tens of milliseconds per request, however many run at once.
REMOTE_REQUESTS = 16


def decoders_of_a_gpu(config: MergeConfig, cpus: float, gpus: float) -> int:
    """Number of decoding threads of a worker on a GPU: its share of the CPUs, unless `num_cpus` is set.

    Args:
        config: settings of the merge.
        cpus, gpus: number of CPUs and GPUs of the machine.
    """
    if config.num_cpus is not None:
        return config.num_cpus
    share = cpus * (config.num_gpus or 1.0) / max(gpus, 1.0)
    return max(config.cpus, min(MOST_DECODERS, int(share)))


class PixelReader:
    """Reads and decodes samples, for one caller at a time, because readers keep open files.

    Args:
        reader: reader of the source.
        preprocessing: preprocessing of the images.
        threads: number of threads that decode.
        exif: whether EXIF orientations are applied.
    """

    def __init__(self, reader: Reader, preprocessing: Preprocessing, threads: int, exif: Exif = "ignore") -> None:
        self._reader = reader
        self._preprocessing = preprocessing
        self._exif = exif
        self._lock = threading.Lock()
        requests = REMOTE_REQUESTS if reader.is_remote else threads
        self._pool = ThreadPoolExecutor(requests, "decode") if requests > 1 else None

    def read(self, samples: Sequence[Sample], remarks: list[str] | None = None) -> list[Pixels | str]:
        """Pixels uint8 [C, H, W] of every sample, or the reason why it has none.

        Args:
            samples: samples to read.
            remarks: receives the remarks of `decode`.

        Raises:
            DatamergeError, ConnectionError, TimeoutError: the store does not answer, which is not the sample's fault.
        """
        with self._lock:
            if self._pool is None:
                return [self._one(sample, remarks) for sample in samples]
            if self._reader.is_concurrent:
                return list(self._pool.map(self._one, samples, repeat(remarks)))
            raw = [self._raw(sample) for sample in samples]
            return list(self._pool.map(self._decoded, raw, repeat(remarks)))

    def _one(self, sample: Sample, remarks: list[str] | None) -> Pixels | str:
        return self._decoded(self._raw(sample), remarks)

    def _raw(self, sample: Sample) -> RawImage | BadImage:
        try:
            return retry(lambda: self._read(sample), transient=may_pass, delays=WAITS)
        except DatamergeError as error:
            if isinstance(error, CorruptShard):  # a device or a pipe instead of a file
                return BadImage(first_line(error))
            raise
        except Exception as error:
            if is_transient(error) or isinstance(error, MemoryError):
                raise
            return BadImage(first_line(error))

    def _read(self, sample: Sample) -> RawImage | BadImage:
        try:
            return self._reader.read(sample)
        except BadImage as error:
            return error

    def _decoded(self, raw: RawImage | BadImage, remarks: list[str] | None) -> Pixels | str:
        if isinstance(raw, BadImage):
            return str(raw)
        try:
            return decode(raw, self._preprocessing, self._exif, remarks)
        except BadImage as error:
            return str(error)
