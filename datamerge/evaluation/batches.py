"""Decoded images in batches, read one batch ahead of the computation.

Shapes: B images, C H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from datamerge.evaluation.results import RejectedImage
from datamerge.evaluation.runs import warn
from datamerge.sources import BadImage, Sample, Source, decode
from storage_schemas import DatamergeError, SourceError
from storage_schemas.access.retries import is_transient, retry


@dataclass(frozen=True)
class Batch:
    """Some consecutive samples of a source.

    Attributes:
        samples: the B usable ones.
        pixels: uint8 [B, C, H, W]; [0, C, H, W] if none is usable.
        rejected: the others.
    """

    samples: Sequence[Sample]
    pixels: npt.NDArray[np.uint8]
    rejected: Sequence[RejectedImage]

    @property
    def listed(self) -> int:
        """Samples of the source that went into this batch."""
        return len(self.samples) + len(self.rejected)


def read_batches(source: Source, shape: tuple[int, int, int], size: int) -> Iterator[Batch]:
    """All samples in the source's order, `size` listed samples at a time."""
    runs = [source.samples[first : first + size] for first in range(0, len(source.samples), size)]
    # One thread: readers keep open files and caches that are not meant for several.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as pool:
        ahead = pool.submit(_read, source, runs[0], shape) if runs else None
        for following in [*runs[1:], None]:
            if ahead is None:
                return
            batch = ahead.result()
            ahead = pool.submit(_read, source, following, shape) if following is not None else None
            yield batch


def _read(source: Source, samples: Sequence[Sample], shape: tuple[int, int, int]) -> Batch:
    usable, images, rejected = [], [], []
    for sample in samples:
        try:
            images.append(decode(retry(partial(source.reader.read, sample)), shape))
            usable.append(sample)
        except (BadImage, OSError) as error:
            if is_transient(error):  # the image is not to blame, and later encoders would see others
                raise DatamergeError(f"{sample.name}: {error}; run the same command again to continue") from error
            rejected.append(RejectedImage(sample=sample.name, reason=str(error)))
    pixels = np.stack(images) if images else np.empty((0, *shape), np.uint8)
    return Batch(usable, pixels, rejected)


def report_rejected(rejected: Sequence[RejectedImage], source: Source) -> None:
    """Warn about images that could not be used.

    Raises:
        SourceError: none could.
    """
    if len(rejected) == len(source.samples):
        reason = f"; the first one: {rejected[0].sample}: {rejected[0].reason}" if rejected else ""
        raise SourceError(f"{source.url}: expected images, found none that can be used of {len(rejected)}{reason}")
    if rejected:
        warn(
            f"{len(rejected)} of {len(source.samples)} images could not be used, e.g. {rejected[0].sample}: "
            f"{rejected[0].reason}; the JSON output lists them all"
        )
