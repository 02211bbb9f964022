"""What attacks maximise, and the attacks."""

from datamerge.attacks.apgd import APGD, apgd
from datamerge.attacks.arithmetic import arithmetic
from datamerge.attacks.autoattack import Survival, auto_attack, check_masking, targeted_dlr
from datamerge.attacks.ball import Attacked, NonFiniteGradient, Precision, sample_generators
from datamerge.attacks.euclidean import Norm
from datamerge.attacks.objectives import OBJECTIVES, Objective, ObjectiveName, cross_entropy, squared_error
from datamerge.attacks.pgd import PGD, attack
from datamerge.attacks.restarts import gradient_sign, run_attack

__all__ = [
    "APGD",
    "OBJECTIVES",
    "PGD",
    "Attacked",
    "NonFiniteGradient",
    "Norm",
    "Objective",
    "ObjectiveName",
    "Precision",
    "Survival",
    "apgd",
    "arithmetic",
    "attack",
    "auto_attack",
    "check_masking",
    "cross_entropy",
    "gradient_sign",
    "run_attack",
    "sample_generators",
    "squared_error",
    "targeted_dlr",
]
