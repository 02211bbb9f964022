"""Encoders of pixels in [0, 1], loaded by spec, and class heads for their embeddings."""

from datamerge.encoders.checkpoints import save_encoder, weights_sha256
from datamerge.encoders.device import pick_device
from datamerge.encoders.encoder import Encoder, load_encoder
from datamerge.encoders.heads import Head, head_from_arrays, load_head
from datamerge.encoders.specs import at_home, parse_spec, refusals_about, with_checkpoint, with_image_size

__all__ = [
    "Encoder",
    "Head",
    "at_home",
    "head_from_arrays",
    "load_encoder",
    "load_head",
    "parse_spec",
    "pick_device",
    "refusals_about",
    "save_encoder",
    "weights_sha256",
    "with_checkpoint",
    "with_image_size",
]
