"""`run.json`: what a finished training run says of itself. The trainer writes it; merges and evaluations read it."""

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
"""The arm of an encoder that was not trained here."""
SHOWN_PROBLEMS = 5


class TrainedArtifact(BaseModel):
    """One of the artifacts of a run.

    Attributes:
        url: where its groups came from.
        plan_sha256: identity of what was there.
        weight: how often each of its groups occurred in an epoch.
        groups: that it has.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str
    plan_sha256: str
    weight: float
    groups: int


class RunSummary(BaseModel):
    """What `run.json` says of a finished run.

    Attributes:
        encoder: spec of the trained encoder, with the tag that its weights started from and their absolute path.
        encoder_sha256: hash of the trained weights.
        original: spec of the encoder the run started from.
        original_sha256: hash of its weights.
        arm: in the words of the paper: AT-5-Avg, AT-1-Ind, …; AT-5-Mean without the correction.
        artifact: where the groups came from; of several artifacts all, with commas between them.
        plan_sha256: identity of that artifact; of several, or of one with a weight, a hash of all of them.
        artifacts: the artifacts, with their weights; runs of releases before 0.2.0 do not say.
        steps: optimiser steps.
        groups: groups consumed, repetitions counted.
        seconds: wall time of all sittings, without loading the encoder.
        bytes: uncompressed bytes of the arrays that were read: those of the arm, of every group consumed.
        config: all settings, defaults resolved.
        overfitted: updates after which its attack of few steps had first lost its meaning; None if it never had, or
            if nobody looked.
        widened: whether its noise was widened then.
        preprocessing: how the encoder's pixels are made; runs of releases before 0.2.0 do not say.
    """

    # Newer releases may say more; what is here has the same meaning for ever.
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
    """The summary of the finished run in a folder.

    Args:
        folder: that somebody named.
        setting: where; refusals are about it.

    Raises:
        ConfigError: no run, one that is not finished, or a damaged `run.json`; every problem is listed.
    """
    file = folder / SUMMARY
    try:
        return RunSummary.model_validate(read_json(file.read_bytes()))
    except FileNotFoundError:
        raise ConfigError(
            f"{setting}: expected the folder of a finished run, found no {SUMMARY} in {folder}: it is none, or its "
            "training is not finished; run `datamerge train` to its end first"
        ) from None
    except ValidationError as error:
        found = f"problems: {listed(error.errors(include_url=False), SHOWN_PROBLEMS)}"
    except (OSError, ValueError) as error:
        found = str(error)
    raise ConfigError(
        f"{setting}: expected the summary of a training run in {file}, found {found}; restore the file, or train "
        "again into a new folder"
    )
