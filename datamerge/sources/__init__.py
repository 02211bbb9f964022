"""Raw images as 8-bit pixels, from folders, Parquet, WebDataset tars, arrays or user code; see README.md."""

from __future__ import annotations

from datamerge.sources.images import BadImage, decode, native_shape
from datamerge.sources.opening import open_source
from datamerge.sources.sample import LISTING, RawImage, Reader, Sample, Source

__all__ = [
    "LISTING",
    "BadImage",
    "RawImage",
    "Reader",
    "Sample",
    "Source",
    "decode",
    "native_shape",
    "open_source",
]
