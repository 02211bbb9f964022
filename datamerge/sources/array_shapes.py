"""Finds the array of images, its axes, and the arrays of each split; ambiguous arrays are refused.

Shapes: M images, C channels (1 or 3), H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from datamerge.runtime.messages import say
from datamerge.sources.splits import choose, meaning, sizes, split_of_name
from storage_schemas import ConfigError, SourceError

Array = npt.NDArray[Any]

IMAGE_ARRAYS = ("images", "image", "x", "data", "arr_0")
LABEL_ARRAYS = ("labels", "label", "y", "arr_1")
NAME_ARRAYS = ("class_names", "classes")
# Row length of flat data sets → the shape of their images.
_FLAT = {784: "-1, 28, 28", 1024: "-1, 32, 32", 3072: "-1, 3, 32, 32", 12288: "-1, 3, 64, 64"}


def find_images(arrays: Mapping[str, Array], column: str | None, where: str) -> tuple[str, Array]:
    """Name of the array of images, and its images [M, H, W] or [M, H, W, C].

    Raises:
        SourceError: there is no such array, there are several, or its axes are ambiguous.
    """
    usable = [name for name, array in arrays.items() if array.dtype == np.uint8 and array.ndim in (3, 4)]
    if column is None:
        column = next((name for name in IMAGE_ARRAYS if name in usable), usable[0] if len(usable) == 1 else None)
    if column not in usable:
        named = "" if column is None else f" as `image_column={column!r}`"
        raise SourceError(
            f"{where}: expected an array of uint8 images [M, H, W], [M, H, W, C] or [M, C, H, W]{named}, "
            f"found {_found(arrays, column, usable)}"
        )
    images = _channels_last(arrays[column], f"{where}: expected", column)
    if not images.size:
        raise SourceError(f"{where}: expected images, found {column} {list(images.shape)}, which holds none")
    return column, np.ascontiguousarray(images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images)


def _found(arrays: Mapping[str, Array], column: str | None, usable: Sequence[str]) -> str:
    """Describe the arrays that are not images, with a remedy."""
    found = {name: f"{array.dtype} {list(array.shape)}" for name, array in arrays.items()}
    if len(usable) > 1 and column is None:
        return f"{found}; name it with `image_column`"
    largest = max(arrays, key=lambda name: arrays[name].size, default="")
    meant = column or next((name for name in IMAGE_ARRAYS if name in arrays), largest)
    array = arrays.get(meant, np.empty(0))
    if array.ndim == 2 and array.dtype == np.uint8:
        axes = _FLAT.get(array.shape[1], "-1, 3, H, W")
        return f"{found}: flat rows; save {meant}.reshape({axes}) instead"
    if array.ndim in (3, 4) and array.size and array.dtype.kind in "fiub":
        low, high = array.min(), array.max()
        scaled = "x"
        if low >= 0 and high <= 1:
            scaled = "np.round(255 * x)" if array.dtype.kind == "f" else "(255 * x)"
        if low >= 0 and high <= 255:
            return f"{found}, from {low} to {high}; save {scaled}.astype(np.uint8) instead"
        return f"{found}, from {low} to {high}; save pixels from 0 to 255 as uint8 instead"
    return str(found or "no array at all")


def _channels_last(images: Array, expected: str, column: str) -> Array:
    """Images as [M, H, W] or [M, H, W, C], whichever axis holds the channels."""
    found = f"found {column} {list(images.shape)}"
    if images.ndim == 3:
        if images.shape[2] in (1, 3):
            raise SourceError(
                f"{expected} many images, {found}, which looks like one image [H, W, C]; save it as [1, H, W, C], or "
                "grey images as [M, H, W, 1]"
            )
        return images
    first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
    if first and last:
        raise SourceError(f"{expected} channels in one axis, {found}, where two axes may be channels; drop one axis")
    if not first and not last:
        alpha = "; drop the alpha channel" if 4 in (images.shape[1], images.shape[3]) else ""
        raise SourceError(f"{expected} images with 1 or 3 channels, {found}{alpha}")
    return images.transpose(0, 2, 3, 1) if first else images


def arrays_of_splits(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Names of arrays by split and by their name without the split: {"train": {"x": "x_train"}}."""
    splits: dict[str, dict[str, str]] = {}
    for name in names:
        word = split_of_name(name)
        plain = re.sub(rf"[-_ .]*{word}[-_ .]*", "", name).lower() if word else name
        if word and plain in (*IMAGE_ARRAYS, *LABEL_ARRAYS):
            splits.setdefault(word, {})[plain] = name
    return splits


def choose_arrays(
    arrays: Mapping[str, Array], wanted: str | None, where: str
) -> tuple[str | None, dict[str, str], dict[str, int]]:
    """The split to use, its arrays, and the number of images of each split.

    Arrays are keyed by their name without the split, `x` for `x_train`. By default the split for training is used,
    and a message says so.

    Raises:
        ConfigError: there is no such split, or there are several and none is for training.
    """
    splits = arrays_of_splits(arrays)
    counts = {
        word: range(len(arrays[name]))
        for word, names in splits.items()
        for name in [next((names[plain] for plain in IMAGE_ARRAYS if plain in names), "")]
        if name and arrays[name].ndim
    }
    if wanted is None and len(counts) > 1:
        training = [word for word in counts if meaning(word) == "train"]
        if len(training) == 1:
            wanted = training[0]
            shown = ", ".join(f"{word} ({len(items)} images)" for word, items in counts.items())
            say(f"{where}: its split {wanted!r} is used of {shown}")
    _, split = choose(counts, wanted, where, "image")
    if split is not None and split not in splits:
        raise ConfigError(f"split: expected one of {where}, found {split!r}; use one split at a time")
    return split, splits.get(split or "", {}), sizes(counts)
