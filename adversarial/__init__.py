"""Encoders that take [0, 1] pixels, what attacks maximise, and the attacks."""

from adversarial.encoders import Encoder, load_encoder, save_encoder, weights_sha256
from adversarial.heads import Head, head_from_arrays, load_head
from adversarial.objectives import OBJECTIVES, Objective, ObjectiveName, cross_entropy, squared_error
from adversarial.pgd import PGD, Attacked, NonFiniteGradient, attack, sample_generators
from adversarial.specs import parse_spec, with_checkpoint

__all__ = [
    "OBJECTIVES",
    "PGD",
    "Attacked",
    "Encoder",
    "Head",
    "NonFiniteGradient",
    "Objective",
    "ObjectiveName",
    "attack",
    "cross_entropy",
    "head_from_arrays",
    "load_encoder",
    "load_head",
    "parse_spec",
    "sample_generators",
    "save_encoder",
    "squared_error",
    "weights_sha256",
    "with_checkpoint",
]
