"""Fine-tuning on merged groups, streamed from an artifact; source images are never opened.

`train(TrainConfig(...))` is the command `datamerge train`. README.md beside this file lists the modules.
"""

from storage_schemas.schema.run import RunSummary
from trainer.config import TrainConfig
from trainer.data.noise import Draws
from trainer.errors import NotFiniteRun, OverfittedRun, Stopped
from trainer.estimators import (
    Estimator,
    GroupLoss,
    antithetic,
    gauss_newton,
    individual_loss,
    mean_only,
    sampled,
)
from trainer.losses import Cosine, CrossEntropy, Likelihood, Loss, SquaredError
from trainer.run.loop import train

__all__ = [
    "Cosine",
    "CrossEntropy",
    "Draws",
    "Estimator",
    "GroupLoss",
    "Likelihood",
    "Loss",
    "NotFiniteRun",
    "OverfittedRun",
    "RunSummary",
    "SquaredError",
    "Stopped",
    "TrainConfig",
    "antithetic",
    "gauss_newton",
    "individual_loss",
    "mean_only",
    "sampled",
    "train",
]
