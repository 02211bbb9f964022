"""Decoded images in batches, read one batch ahead of the computation.

Shapes: B images, C H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from datamerge.evaluation.results import RejectedImage
from datamerge.runtime.messages import warn
from datamerge.runtime.read_ahead import read_ahead
from datamerge.sources import BadImage, RawImage, Sample, Source, decode
from datamerge.sources.orientation import Exif
from storage_schemas import DatamergeError, SourceError
from storage_schemas.access.retries import is_transient, retry
from storage_schemas.schema.preprocessing import Preprocessing


@dataclass(frozen=True)
class ImageBatch:
    """Some consecutive samples of a source.

    Attributes:
        samples: the B usable samples.
        pixels: uint8 [B, C, H, W]; [0, C, H, W] if none is usable.
        rejected: the samples that could not be read or decoded.
        remarks: number of images for each remark of `decode`.
    """

    samples: Sequence[Sample]
    pixels: npt.NDArray[np.uint8]
    rejected: Sequence[RejectedImage]
    remarks: Mapping[str, int]

    @property
    def listed(self) -> int:
        """Samples of the source that went into this batch."""
        return len(self.samples) + len(self.rejected)


def read_batches(
    source: Source, preprocessings: Sequence[Preprocessing], size: int, exif: Exif = "ignore"
) -> Iterator[Sequence[ImageBatch]]:
    """All samples in the source's order, `size` at a time; yields one batch for each preprocessing."""
    parts = (source.samples[first : first + size] for first in range(0, len(source.samples), size))
    return read_ahead(_read(source, samples, preprocessings, exif) for samples in parts)


def _read(
    source: Source, samples: Sequence[Sample], preprocessings: Sequence[Preprocessing], exif: Exif
) -> list[ImageBatch]:
    usable: list[list[Sample]] = [[] for _ in preprocessings]
    images: list[list[npt.NDArray[np.uint8]]] = [[] for _ in preprocessings]
    rejected: list[list[RejectedImage]] = [[] for _ in preprocessings]
    remarks: list[list[str]] = [[] for _ in preprocessings]
    for sample in samples:
        file = _raw(source, sample)
        for place, preprocessing in enumerate(preprocessings):
            try:
                if isinstance(file, BadImage):
                    raise file
                images[place].append(decode(file, preprocessing, exif, remarks[place]))
                usable[place].append(sample)
            except BadImage as error:
                rejected[place].append(RejectedImage(sample=sample.name, reason=str(error)))
    return [
        ImageBatch(
            usable[place],
            np.stack(images[place]) if images[place] else np.empty((0, *preprocessing.shape), np.uint8),
            rejected[place],
            Counter(remarks[place]),
        )
        for place, preprocessing in enumerate(preprocessings)
    ]


def _raw(source: Source, sample: Sample) -> RawImage | BadImage:
    try:
        return retry(partial(source.reader.read, sample))
    except (BadImage, OSError) as error:
        if is_transient(error):  # the image itself may be sound, and later encoders would see other images
            raise DatamergeError(f"{sample.name}: {error}; run the same command again to continue") from error
        return BadImage(str(error))


def report_rejected(rejected: Sequence[RejectedImage], source: Source) -> None:
    """Warn about images that could not be used.

    Raises:
        SourceError: no image could be used.
    """
    if len(rejected) == len(source.samples):
        reason = f"; the first one: {rejected[0].sample}: {rejected[0].reason}" if rejected else ""
        raise SourceError(f"{source.url}: expected images, found none that can be used of {len(rejected)}{reason}")
    if rejected:
        warn(
            f"{len(rejected)} of {len(source.samples)} images could not be used, e.g. {rejected[0].sample}: "
            f"{rejected[0].reason}; the results list them all"
        )
