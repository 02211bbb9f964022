"""What can be evaluated: the folder of a finished training run, or an encoder spec as the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ConfigDict, ValidationError

from datamerge.encoders import at_home, parse_spec
from datamerge.encoders.specs import KINDS
from storage_schemas import ConfigError, read_json

SUMMARY = "run.json"
BASELINE = "w/o AT"


class Run(BaseModel):
    """An encoder with where it comes from; the fields of `run.json` that matter here.

    Attributes:
        name: as the user gave it, without a slash at the end.
        encoder: spec of the encoder to evaluate.
        original: spec of the encoder it started from.
        arm: row of the experiment.
        artifact, steps, seconds, bytes: what the training used and cost, None for a spec.
        encoder_sha256, original_sha256: hashes of the weights the training saw, None if not recorded.
        config: the run's settings.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    encoder: str
    original: str
    arm: str
    artifact: str | None
    steps: int | None
    seconds: float | None
    bytes: int | None
    encoder_sha256: str | None = None
    original_sha256: str | None = None
    config: dict[str, Any]


def warn(message: str) -> None:
    """A warning that should not be overlooked."""
    click.secho(f"WARNING: {message}", err=True, fg="yellow", bold=True)


def read_run(text: str) -> Run:
    """A run from what the user typed: a folder that holds `run.json`, or an encoder spec.

    Raises:
        ConfigError: neither, an unfinished run, or a damaged `run.json`.
    """
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _read_folder(text, folder)
    if text.partition(":")[0] not in KINDS:
        raise ConfigError(
            f"RUN {text!r}: expected the folder of a training run or an encoder spec such as timm:resnet18, "
            f"found {'a file' if folder.exists() else 'no such folder'}"
        )
    parse_spec(text)
    return Run(
        name=text,
        encoder=text,
        original=text,
        arm=BASELINE,
        artifact=None,
        steps=None,
        seconds=None,
        bytes=None,
        config={},
    )


def _read_folder(text: str, folder: Path) -> Run:
    file = folder / SUMMARY
    if not file.is_file():
        raise ConfigError(
            f"RUN {text!r}: expected {SUMMARY} in the folder, found none: the training is not finished, or this "
            "is no run; run `datamerge train` to its end first"
        )
    try:
        run = Run.model_validate({**_read_json(file), "name": str(Path(text))})
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}" for problem in error.errors()
        ]
        raise ConfigError(
            f"{file}: expected the summary of a training run, found problems: {'; '.join(problems)}"
        ) from None
    return run.model_copy(update={"encoder": at_home(run.encoder, folder)})


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected the JSON summary of a training run, found {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content
