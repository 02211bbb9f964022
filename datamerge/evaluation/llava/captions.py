"""`datamerge evaluate captions`: CIDEr of LLaVA's captions of COCO images, clean and under attack."""

from __future__ import annotations

from datamerge.evaluation.llava.cases import Item
from datamerge.evaluation.llava.cider import NOT_COMPARABLE, PLAIN, CaptionScorer
from datamerge.evaluation.llava.coco import read_captions
from datamerge.evaluation.llava.config import CaptionsConfig
from datamerge.evaluation.llava.evaluate import evaluate_task
from datamerge.evaluation.llava.study import Task
from datamerge.evaluation.tables import Results

PART = "captions"
QUESTION = "Provide a short caption for this image."
NEW_TOKENS = 20
# CIDEr × 100 below which FARE does not attack an image any further.
THRESHOLD = 10.0


def evaluate_captions(config: CaptionsConfig) -> Results:
    """Caption the chosen images with every run's encoder; one result per run, in the order given.

    Raises:
        ConfigError: models or settings that do not go together, or too little memory.
        SourceError: a caption file or image that is missing or of another kind.
        DatamergeError: a pass that fails.
    """
    images = read_captions(config.data, config.images, config.split, config.sample, config.sample_seed)
    scorer = CaptionScorer({image.key: image.captions for image in images})
    task = Task(
        part=PART,
        items=[Item(image.key, image.image, QUESTION, image.captions) for image in images],
        new_tokens=NEW_TOKENS,
        targets=(),
        is_broken=lambda score: score < THRESHOLD,
        clean_up=clean_caption,
        score=scorer.scores,
        scorer=scorer.tokeniser,
    )
    return evaluate_task(config, task, "COCO", [NOT_COMPARABLE] if scorer.tokeniser == PLAIN else [])


def clean_caption(text: str) -> str:
    """The caption in a generated text, extracted as in FARE's evaluation."""
    return text.split("Output", 1)[0].replace('"', "")
