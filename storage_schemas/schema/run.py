"""`run.json`: the summary of a finished training run. The trainer writes it; merges and evaluations read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from storage_schemas.display import one_line
from storage_schemas.errors import ConfigError
from storage_schemas.schema.plain_json import read_json
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.problems import listed

SUMMARY, WEIGHTS = "run.json", "encoder.safetensors"
BASELINE = "w/o AT"
"""Name of the arm of the original encoder, without adversarial training."""
SHOWN_PROBLEMS = 5


class TrainedArtifact(BaseModel):
    """One of the artifacts of a run.

    Attributes:
        url: path or URL of the artifact.
        plan_sha256: identity of its plan.
        weight: how often each of its groups occurred in an epoch.
        groups: number of its groups.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str
    plan_sha256: str
    weight: float
    groups: int


class RunSummary(BaseModel):
    """The contents of `run.json` of a finished run.

    Attributes:
        encoder: spec of the trained encoder: the pretrained tag that it started from, and the absolute path of its
            weights.
        encoder_sha256: hash of the trained weights.
        original: spec of the encoder that the run started from.
        original_sha256: hash of its weights.
        arm: name of the arm as in the paper: AT-5-Avg, AT-1-Ind, …; AT-5-Mean without the correction.
        artifact: path or URL of the artifact; of several, all of them with commas in between.
        plan_sha256: identity of that artifact; of several, or of one with a weight, a hash of all of them.
        artifacts: the artifacts with their weights; empty in runs of releases before 0.2.0.
        steps: optimiser steps.
        groups: groups consumed, with repetitions.
        seconds: wall time of all sessions of the run, without loading the encoder.
        bytes: uncompressed bytes of the arrays that the arm read, over all groups consumed.
        config: all settings, with resolved defaults.
        overfitted: updates after which catastrophic overfitting of the few-step attack was first detected; None if it
            never was, or was not checked.
        widened: whether the noise was then widened.
        preprocessing: the encoder's preprocessing; None in runs of releases before 0.2.0.
    """

    # Newer releases may add entries; the meaning of these never changes.
    model_config = ConfigDict(extra="ignore", frozen=True)

    encoder: str
    encoder_sha256: str
    original: str
    original_sha256: str
    arm: str
    artifact: str
    plan_sha256: str
    artifacts: tuple[TrainedArtifact, ...] = ()
    steps: int
    groups: int
    seconds: float
    bytes: int
    config: dict[str, Any]
    overfitted: int | None = None
    widened: bool = False
    preprocessing: Preprocessing | None = None

    def __repr__(self) -> str:
        facts = f"{self.steps} steps", f"{self.groups} groups of {self.artifact}", f"{self.seconds:.0f} s"
        return one_line(self, self.arm, *facts)

    __str__ = __repr__


def read_summary(folder: Path, setting: str = "encoder") -> RunSummary:
    """Read the summary of the finished run in a folder.

    Args:
        folder: of the run.
        setting: name of the setting that named the folder, for messages.

    Raises:
        ConfigError: the folder holds no finished run, or `run.json` is damaged; the message lists the problems.
    """
    file = folder / SUMMARY
    try:
        return RunSummary.model_validate(read_json(file.read_bytes()))
    except FileNotFoundError:
        raise ConfigError(
            f"{setting}: expected the folder of a finished run, found no {SUMMARY} in {folder}; name the folder of a "
            "run, or let `datamerge train` finish first"
        ) from None
    except ValidationError as error:
        found = f"problems: {listed(error.errors(include_url=False), SHOWN_PROBLEMS)}"
    except (OSError, ValueError) as error:
        found = str(error)
    raise ConfigError(
        f"{setting}: expected the summary of a training run in {file}, found {found}; restore the file, or train "
        "again into a new folder"
    )
