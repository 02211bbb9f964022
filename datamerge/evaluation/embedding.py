"""`datamerge evaluate embedding`: how far embeddings are from the frozen original's, clean and under APGD.

FARE's Table 14 quantity: the mean over images of ‖f(x) − f_original(x)‖², and of ‖f(x') − f_original(x)‖² with x'
from APGD on it. It needs no labels and no text, which makes it the cheapest anchor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datamerge.attacks import run_attack, sample_generators, squared_error
from datamerge.encoders import pick_device
from datamerge.evaluation.config import EmbeddingConfig
from datamerge.evaluation.encoders_under_test import Subject, load_subjects, numerics
from datamerge.evaluation.metrics import check_finite
from datamerge.evaluation.results import ArmResult, mean_score
from datamerge.evaluation.runs import read_run
from datamerge.evaluation.study import Measured, Study, open_sample, run_study
from datamerge.sources import Sample
from storage_schemas import ConfigError

PART = "embedding"
CLEAN = "embedding loss clean"


def evaluate_embedding(config: EmbeddingConfig) -> list[ArmResult]:
    """Embedding losses of every run; one result per run, in the order given.

    Raises:
        ConfigError: runs or settings that do not go together, or cannot be read.
        SourceError: no usable image at `config.data`.
        DatamergeError: a loss that is not finite, or a batch that does not fit the device.
    """
    attacks = config.attacks()
    device = pick_device(config.device)
    runs = [read_run(text) for text in config.runs]
    source = open_sample(config)
    subjects = load_subjects(runs, device, config.original)
    own = [{"original_sha256": subject.original.sha256} for subject in subjects]

    def measure(subject: Subject, pixels: Tensor, samples: Sequence[Sample]) -> Measured:
        names = [sample.name for sample in samples]
        with torch.no_grad():
            target = subject.original(pixels)
            clean = squared_error(subject.encoder(pixels), target)
        check_finite(clean, names, "the clean embedding loss")
        columns: Measured = {CLEAN: clean.tolist()}
        weakest = clean
        for text, settings in attacks.items():
            generators = [sample_generators(config.seed, sample.key, 1)[0] for sample in samples]
            attacked = run_attack(
                subject.encoder,
                pixels,
                target,
                squared_error,
                settings,
                generators,
                names,
                restarts=config.restarts,
            )
            # x and every smaller ball lie inside this one.
            weakest = torch.maximum(weakest, attacked.loss)
            columns[text] = weakest.tolist()
        return columns

    with numerics(config.threads, device):
        studies = run_study(config, PART, subjects, own, source, measure)
    return [_result(config, subject, study) for subject, study in zip(subjects, studies, strict=True)]


def _result(config: EmbeddingConfig, subject: Subject, study: Study) -> ArmResult:
    if not study.images:
        raise ConfigError(f"{config.data}: expected at least one image")
    scores = [mean_score(CLEAN, study.columns[CLEAN])]
    scores += [mean_score(f"embedding loss ε={text}", study.columns[text]) for text in config.attacks()]
    return ArmResult(
        part=PART,
        run=subject.run.name,
        arm=subject.run.arm,
        encoder=subject.encoder.spec,
        encoder_sha256=subject.encoder.sha256,
        scores=scores,
        images=study.images,
        seconds=study.seconds,
        warnings=[],
        settings=config.model_dump(mode="json"),
        details={
            "original": subject.original.spec,
            "original_sha256": subject.original.sha256,
            "rejected": [image.model_dump() for image in study.rejected],
        },
    )
