"""Raw images again: embedding loss and accuracy of encoders, clean and under attack (see README.md)."""

from evaluation.config import EvaluateConfig
from evaluation.job import evaluate
from evaluation.results import Evaluation, RejectedImage

__all__ = ["EvaluateConfig", "Evaluation", "RejectedImage", "evaluate"]
