"""`datamerge evaluate embedding`: squared distance of embeddings to the frozen original's, clean and under APGD.

The quantity of FARE's Table 14: the mean over images of ‖f(x) − f_original(x)‖², and of ‖f(x') − f_original(x)‖²
where APGD maximises it over x'. It needs neither labels nor text.
"""

from __future__ import annotations

from functools import partial

from datamerge.encoders import pick_device
from datamerge.evaluation.config import EmbeddingConfig
from datamerge.evaluation.encoders_under_test import load_subjects, numerics
from datamerge.evaluation.measures import CLEAN_LOSS, embedding_losses
from datamerge.evaluation.results import mean_score
from datamerge.evaluation.runs import read_run
from datamerge.evaluation.store import PREPROCESSING
from datamerge.evaluation.study import StudyRow, open_sample, run_study
from datamerge.evaluation.tables import Results

PART = "embedding"


def evaluate_embedding(config: EmbeddingConfig) -> Results:
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
    subjects = load_subjects(runs, device, config.original, config.image_size)
    rows = [
        StudyRow(
            subject,
            {
                **{f"original_{name}": value for name, value in subject.original.identity.items()},
                f"original_{PREPROCESSING}": subject.original.preprocessing.record(),
            },
            partial(
                embedding_losses,
                subject.encoder,
                subject.original,
                attacks=attacks,
                seed=config.seed,
                restarts=config.restarts,
                precision=config.precision,
            ),
        )
        for subject in subjects
    ]
    with numerics(config.threads, device):
        studied = run_study(config, PART, rows, source)
    return Results(
        one.result(
            PART,
            config,
            [mean_score(CLEAN_LOSS, one.columns[CLEAN_LOSS])]
            + [mean_score(f"embedding loss ε={text}", one.columns[text]) for text in attacks],
            details={"original": one.subject.original.spec, "original_sha256": one.subject.original.sha256},
        )
        for one in studied
    )
