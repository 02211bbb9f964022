"""Fine-tuning on merged groups: streams an artifact, never opens an image.

`train(TrainConfig(...))` does what `datamerge train` does; README.md beside this file says what lives where.
"""

from trainer.config import TrainConfig
from trainer.data.noise import Draws
from trainer.estimators import (
    Estimator,
    GroupLoss,
    antithetic,
    exact,
    gauss_newton,
    individual_loss,
    jvp,
    mean_only,
    sampled,
)
from trainer.losses import CrossEntropy, Loss, SquaredError
from trainer.run.checkpoint import RunSummary
from trainer.run.loop import train
from trainer.run.signals import Stopped

__all__ = [
    "CrossEntropy",
    "Draws",
    "Estimator",
    "GroupLoss",
    "Loss",
    "RunSummary",
    "SquaredError",
    "Stopped",
    "TrainConfig",
    "antithetic",
    "exact",
    "gauss_newton",
    "individual_loss",
    "jvp",
    "mean_only",
    "sampled",
    "train",
]
