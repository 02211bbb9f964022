"""Evaluation on raw images: embedding loss and accuracy of encoders, clean and under attack (see README.md)."""

from datamerge.evaluation.config import EvaluateConfig
from datamerge.evaluation.pgd import evaluate
from datamerge.evaluation.results import ArmResult, RejectedImage, Score
from datamerge.evaluation.tables import Results

__all__ = ["ArmResult", "EvaluateConfig", "RejectedImage", "Results", "Score", "evaluate"]
