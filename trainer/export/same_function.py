"""Check that exported files, loaded as a user would, turn a photo into the same pixels and the same embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from datamerge.encoders import Encoder
from datamerge.sources import decode
from storage_schemas import DatamergeError
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.preprocessing import Preprocessing

Photo = Image.Image
# Largest allowed difference between embeddings, relative to the largest value.
TOLERANCE = 1e-5
# Largest allowed difference between pixels, in grey levels: we resize with Pillow, torchvision rounds differently.
PILLOW, TORCHVISION = 0.01, 2.01


def make_photo(preprocessing: Preprocessing) -> Photo:
    """A photo that reveals differences in any preprocessing step: noise on a gradient, wider than high, odd sides."""
    scale, size = preprocessing.scale, preprocessing.size
    height = 2 * math.ceil(0.6 * scale[0]) + 1
    # For such a margin libraries differ in where they place the crop.
    width = next(
        width for width in range(height + height // 3, 8 * height) if (width * scale[0] // height - size[1]) % 4 == 3
    )
    noise = np.random.default_rng(0).integers(0, 128, (height, width, 3))
    gradient = np.linspace(0, 127, width)[None, :, None] * np.array([1.0, 0.6, 0.2])
    return Image.fromarray((noise + gradient).astype(np.uint8))


def check_same(
    encoder: Encoder,
    preprocessing: Preprocessing,
    transform: Callable[[Photo], Tensor],
    network: Callable[[Tensor], Tensor],
    grey_levels: float,
) -> None:
    """Refuse exported files that do not compute the same function as the encoder.

    Args:
        encoder: the exported encoder.
        preprocessing: the expected preprocessing of the library.
        transform: the library's preprocessing as loaded: a photo → normalised pixels [1, C, H, W].
        network: the library's network as loaded: normalised pixels → embeddings [1, K].
        grey_levels: largest allowed difference between pixels.

    Raises:
        DatamergeError: pixels or embeddings differ; the message says by how much.
    """
    photo = make_photo(preprocessing)
    pixels = torch.from_numpy(decode(photo, preprocessing))[None].float() / LEVELS
    expected, found = (pixels - encoder.mean) / encoder.std, transform(photo)
    if found.shape != expected.shape:
        raise _refusal(encoder, f"pixels of shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    off = float(((found - expected) * encoder.std).abs().max()) * LEVELS
    if not off <= grey_levels:
        raise _refusal(encoder, f"pixels that differ by {off:.3g} grey levels, expected at most {grey_levels:g}")
    with torch.no_grad():
        own, theirs = encoder.model(found), network(found)
    difference = float((own - theirs).abs().max() / own.abs().max())
    if not difference <= TOLERANCE:
        raise _refusal(
            encoder, f"embeddings that differ by {difference:.2g} (relative), expected at most {TOLERANCE:g}"
        )


def check_weights(network: nn.Module, tensors: Mapping[str, Tensor], file: str) -> None:
    """Refuse a file whose tensors differ from those of a network, in name or in any bit.

    Raises:
        DatamergeError: the tensors differ.
    """
    own = network.state_dict()
    if own.keys() != tensors.keys() or not all(torch.equal(own[name], tensors[name]) for name in own):
        raise DatamergeError(f"{file}: expected the encoder's weights, found others; nothing was written")


def _refusal(encoder: Encoder, difference: str) -> DatamergeError:
    return DatamergeError(
        f"encoder {encoder.spec!r}: the exported files, loaded again, turn a photo into {difference}; nothing was "
        "written"
    )
