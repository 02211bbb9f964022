"""Items of a data set: an image and perhaps a label, in the forms that libraries use.

(image, label, …)            torchvision; a caption or boxes instead of a label count as no label
{"image": …, "label": …}     datasets and webdataset, with one image
image                        without a label

An image is a PIL image, encoded bytes, {bytes, path}, a path, a uint8 array [H, W], [H, W, C] or [C, H, W], or a
tensor [H, W] or [C, H, W] of uint8, or of floats in [0, 1] as ToTensor makes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from datamerge.sources.images import BadImage
from datamerge.sources.labels import label_columns
from datamerge.sources.sample import RawImage
from storage_schemas import shortened
from storage_schemas.access.local_paths import user_path

# Keys to prefer if an item holds several images, such as masks.
USUAL_KEYS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "pixel_values")
_LEVELS = 255


def parts(item: Any) -> tuple[Any, Any]:
    """The image and the label of an item; the label is None if there is none.

    Raises:
        BadImage: the item holds no image, or several.
    """
    if _is_image(item):
        return item, None
    if isinstance(item, Mapping):
        key = image_key(item)
        column = label_key(item)
        return item[key], None if column is None else item[column]
    if isinstance(item, Sequence) and not isinstance(item, str) and item:
        return item[0], item[1] if len(item) > 1 else None
    found = "an empty one" if isinstance(item, Sequence) and not item else type(item).__name__
    raise BadImage(f"expected (image, label) or a mapping with an image, found {found}")


def image_key(item: Mapping[Any, Any]) -> Any:
    """The key of the only image in a mapping, or of the one with a usual name.

    Raises:
        BadImage: the mapping holds no image, or several.
    """
    images = [key for key, value in item.items() if _is_image(value) or (key in USUAL_KEYS and _is_path(value))]
    usual = [key for key in images if key in USUAL_KEYS]
    chosen = usual if len(images) > 1 and usual else images
    if len(chosen) != 1:
        raise BadImage(
            f"expected a mapping with one image, found {shortened(chosen) if chosen else 'none'} of "
            f"{shortened(list(item))}; let the factory's items be (image, label)"
        )
    return chosen[0]


def label_key(item: Mapping[Any, Any]) -> str | None:
    """The key with a usual name of labels; None if there is none, or if several are possible."""
    usual, others = label_columns([key for key in item if isinstance(key, str)])
    if usual:
        return usual[0]
    return others[0] if len(others) == 1 else None


def to_raw(value: Any) -> RawImage:
    """Convert an image of any form above to the form that readers return.

    Raises:
        BadImage: the value has another form.
        OSError: the file at a path cannot be read.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        content, path = value.get("bytes"), value.get("path")
        if content is None and path is None:
            raise BadImage("no image (null)")
        value = content if content is not None else path
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if _is_path(value):
        return user_path(value).read_bytes()
    if hasattr(value, "detach") and hasattr(value, "is_floating_point"):
        return _of_pixels(_from_tensor(value), channels_first=True)
    if value is None or not hasattr(value, "dtype"):
        raise _refused(value, type(value).__name__)
    array = np.asarray(value)
    if array.dtype != np.uint8:
        raise _refused(value, f"{type(value).__name__} {array.dtype} {list(array.shape)}")
    return _of_pixels(array, channels_first=False)


def _is_image(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.keys() == {"bytes", "path"}
    if hasattr(value, "dtype"):
        return getattr(value, "ndim", 0) in (2, 3)
    return isinstance(value, Image.Image | bytes | bytearray | os.PathLike)


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _from_tensor(tensor: Any) -> np.ndarray[Any, Any]:
    """A torch tensor as uint8; floats are multiplied by 255, the inverse of ToTensor."""
    described = f"{type(tensor).__name__} {tensor.dtype} {list(tensor.shape)}"
    if not tensor.is_floating_point():
        array = np.asarray(tensor.detach().cpu())
        if array.dtype != np.uint8:
            raise _refused(tensor, described)
        return array
    floats = np.asarray(tensor.detach().cpu().float())
    if not floats.size or not (floats.min() >= 0 and floats.max() <= 1):  # NaN too
        least, most = (floats.min(), floats.max()) if floats.size else (0, 0)
        raise _refused(tensor, f"{described} from {least:.3g} to {most:.3g}")
    levels: np.ndarray[Any, Any] = np.rint(floats * _LEVELS).astype(np.uint8)
    return levels


def _of_pixels(array: np.ndarray[Any, Any], channels_first: bool) -> Image.Image:
    """An image of uint8 pixels. Channels are first in tensors and last in arrays, if that axis can be channels."""
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 3), array.shape[2] in (1, 3)
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        elif not last:
            raise _refused(array, f"uint8 {list(array.shape)}")
    elif array.ndim != 2:
        raise _refused(array, f"uint8 {list(array.shape)}")
    if not array.size:
        raise _refused(array, f"uint8 {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))


def _refused(value: Any, found: str) -> BadImage:
    numbers = hasattr(value, "dtype")
    remedy = "; leave out what scales or normalises it, such as ToTensor() and Normalize()" if numbers else ""
    return BadImage(
        "expected a PIL image, bytes, a path, a uint8 array [H, W], [H, W, C] or [C, H, W], or a tensor of floats in "
        f"[0, 1], found {found}{remedy}"
    )
