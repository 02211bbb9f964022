"""`datamerge evaluate vqa`: LLaVA's accuracy on VQAv2, clean and under attack."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from datamerge.evaluation.llava.attack import MOST_REFERENCES
from datamerge.evaluation.llava.cases import Item
from datamerge.evaluation.llava.coco import read_questions
from datamerge.evaluation.llava.config import VqaConfig
from datamerge.evaluation.llava.evaluate import evaluate_task
from datamerge.evaluation.llava.study import Task
from datamerge.evaluation.llava.vqa_accuracy import vqa_accuracy
from datamerge.evaluation.tables import Results

PART = "vqa"
PROMPT = "\nAnswer the question using a single word or phrase."
NEW_TOKENS = 5
TARGETS = ("maybe", "Word")


def evaluate_vqa(config: VqaConfig) -> Results:
    """Ask the chosen questions with every run's encoder; one result per run, in the order given.

    Raises:
        ConfigError: models or settings that do not go together, or too little memory.
        SourceError: a file or image that is missing or of another kind.
        DatamergeError: a pass that fails.
    """
    asked = read_questions(config.data, config.annotations, config.images, config.sample, config.sample_seed)
    answers = {question.key: question.answers for question in asked}

    def score(predictions: Mapping[str, str]) -> dict[str, float]:
        return {key: 100 * vqa_accuracy(prediction, answers[key]) for key, prediction in predictions.items()}

    task = Task(
        part=PART,
        items=[
            Item(
                question.key,
                question.image,
                question.question + PROMPT,
                most_frequent(question.answers),
                question.answers,
            )
            for question in asked
        ],
        new_tokens=NEW_TOKENS,
        targets=TARGETS,
        is_broken=lambda score: score == 0,
        clean_up=clean_answer,
        score=score,
    )
    return evaluate_task(config, task, "VQAv2", [])


def most_frequent(answers: Sequence[str]) -> list[str]:
    """The five most frequent answers, or fewer; of equally frequent ones those given first."""
    return [answer for answer, _ in Counter(answers).most_common(MOST_REFERENCES)]


def clean_answer(text: str) -> str:
    """The answer in a generated text, extracted as in FARE's evaluation."""
    return re.split("Question|Answer|Short", text, maxsplit=1)[0].split(", ", 1)[0]
