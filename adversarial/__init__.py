"""Encoders that take [0, 1] pixels, what attacks maximise, and the attacks."""

from adversarial.apgd import APGD, apgd
from adversarial.arithmetic import arithmetic
from adversarial.attacks import gradient_sign, run_attack
from adversarial.autoattack import Survival, auto_attack, check_masking, targeted_dlr
from adversarial.ball import Attacked, NonFiniteGradient, Precision, sample_generators
from adversarial.device import pick_device
from adversarial.encoders import Encoder, load_encoder, save_encoder, weights_sha256
from adversarial.euclidean import Norm
from adversarial.heads import Head, head_from_arrays, load_head
from adversarial.memory import is_out_of_memory
from adversarial.objectives import OBJECTIVES, Objective, ObjectiveName, cross_entropy, squared_error
from adversarial.pgd import PGD, attack
from adversarial.specs import at_home, parse_spec, with_checkpoint

__all__ = [
    "APGD",
    "OBJECTIVES",
    "PGD",
    "Attacked",
    "Encoder",
    "Head",
    "NonFiniteGradient",
    "Norm",
    "Objective",
    "ObjectiveName",
    "Precision",
    "Survival",
    "apgd",
    "arithmetic",
    "at_home",
    "attack",
    "auto_attack",
    "check_masking",
    "cross_entropy",
    "gradient_sign",
    "head_from_arrays",
    "is_out_of_memory",
    "load_encoder",
    "load_head",
    "parse_spec",
    "pick_device",
    "run_attack",
    "sample_generators",
    "save_encoder",
    "squared_error",
    "targeted_dlr",
    "weights_sha256",
    "with_checkpoint",
]
