"""Raw images again: embedding loss and accuracy of encoders, clean and under attack (see README.md)."""

from datamerge.evaluation.config import EvaluateConfig
from datamerge.evaluation.job import evaluate
from datamerge.evaluation.results import Evaluation, RejectedImage

__all__ = ["EvaluateConfig", "Evaluation", "RejectedImage", "evaluate"]
