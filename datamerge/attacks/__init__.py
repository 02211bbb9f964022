"""Attacks on encoders and classifiers: PGD, APGD, AutoAttack, and the objectives that they maximise."""

from datamerge.attacks.apgd import APGD, apgd
from datamerge.attacks.arithmetic import arithmetic, quotient
from datamerge.attacks.autoattack import Survival, auto_attack, check_masking, targeted_dlr
from datamerge.attacks.ball import Attacked, Ball, NonFiniteGradient, Precision, frozen, sample_generators
from datamerge.attacks.euclidean import Norm
from datamerge.attacks.objectives import OBJECTIVES, Objective, ObjectiveName, cross_entropy, squared_error
from datamerge.attacks.pgd import PGD, ascend, attack
from datamerge.attacks.restarts import draw_starts, gradient_sign, run_attack

__all__ = [
    "APGD",
    "OBJECTIVES",
    "PGD",
    "Attacked",
    "Ball",
    "NonFiniteGradient",
    "Norm",
    "Objective",
    "ObjectiveName",
    "Precision",
    "Survival",
    "apgd",
    "arithmetic",
    "ascend",
    "attack",
    "auto_attack",
    "check_masking",
    "cross_entropy",
    "draw_starts",
    "frozen",
    "gradient_sign",
    "quotient",
    "run_attack",
    "sample_generators",
    "squared_error",
    "targeted_dlr",
]
