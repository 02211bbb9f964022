"""Fine-tuning on merged groups: streams an artifact, never opens an image.

`train(TrainConfig(...))` does what `datamerge train` does; README.md beside this file says what lives where.
"""

from trainer.checkpoint import RunSummary
from trainer.config import TrainConfig
from trainer.curvature import GroupLoss, exact, gauss_newton, individual_loss, merged_loss
from trainer.loop import Stopped, train
from trainer.losses import CrossEntropy, Loss, SquaredError

__all__ = [
    "CrossEntropy",
    "GroupLoss",
    "Loss",
    "RunSummary",
    "SquaredError",
    "Stopped",
    "TrainConfig",
    "exact",
    "gauss_newton",
    "individual_loss",
    "merged_loss",
    "train",
]
