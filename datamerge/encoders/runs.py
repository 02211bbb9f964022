"""Resolves the folder of a finished training run to an encoder: its spec, its weights, and its original encoder.

Runs of releases before 0.2.0 recorded neither their preprocessing nor the tag that their weights started from. Both
are those of the original encoder, which `run.json` names, and which may be the encoder of another run in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from datamerge.encoders.checkpoints import recorded_preprocessing
from datamerge.encoders.encoder import Encoder, load_encoder
from datamerge.encoders.specs import at_home, split_spec, with_image_size
from datamerge.runtime.messages import say
from storage_schemas import ConfigError
from storage_schemas.access.local_paths import user_path
from storage_schemas.schema.run import SUMMARY, WEIGHTS, RunSummary, read_summary

# Fields of a run's summary that provenance records: its artifact, and the encoder that it started from.
LINKS = ("arm", "steps", "plan_sha256", "encoder_sha256", "original_sha256")


@dataclass(frozen=True)
class ResolvedEncoder:
    """A loaded encoder and the training run it came from, if any."""

    encoder: Encoder
    run: dict[str, Any] | None

    def provenance(self) -> dict[str, Any]:
        """The record of the encoder in an artifact's provenance."""
        facts: dict[str, Any] = {
            "spec": self.encoder.spec,
            **self.encoder.identity,
            "random_weights": self.encoder.random_weights,
            "embedding_dim": self.encoder.embedding_dim,
        }
        if self.run is not None:
            facts["run"] = self.run
        return facts


def resolve(text: str, device: str = "cpu", image_size: int | None = None) -> ResolvedEncoder:
    """Load the encoder that a spec or the folder of a training run names.

    Args:
        text: spec, or folder of a training run.
        device: device of the encoder.
        image_size: side of the input in pixels; None for the encoder's default.

    Raises:
        ConfigError: `text` is neither a spec nor the folder of a finished run, the weights are not those of the run,
            or `image_size` differs from that of the run.
    """
    spec, run = encoder_spec(text)
    resized = with_image_size(spec, image_size)
    if run is not None and resized != spec:
        raise ConfigError(
            f"image_size: expected the size that {text} was trained at, found {image_size}; name its encoder by its "
            "spec to run it at another"
        )
    encoder = load_encoder(resized, device)
    if run is not None and run["encoder_sha256"] != encoder.sha256:
        raise ConfigError(
            f"encoder: expected the weights that {text}/{SUMMARY} names, sha256 {run['encoder_sha256'][:12]}…, "
            f"found {encoder.sha256[:12]}…; the file was replaced, train again or name it by its spec"
        )
    return ResolvedEncoder(encoder, run)


def encoder_spec(text: str) -> tuple[str, dict[str, Any] | None]:
    """Spec of an encoder, and the links of its training run if `text` is the folder of one.

    Raises:
        ConfigError: the folder holds no finished run, or its file of weights was replaced.
    """
    folder = user_path(text)
    if not folder.is_dir():
        return with_tag_of_run(text), None
    summary = read_summary(folder)
    links = {name: getattr(summary, name) for name in LINKS}
    return spec_of_run(summary, folder), {"url": str(folder.absolute()), **links}


def spec_of_run(summary: RunSummary, folder: Path) -> str:
    """Spec of a run's encoder, with its weights from the folder of the run.

    Raises:
        ConfigError: the file of weights records another preprocessing than `run.json`.
    """
    spec = at_home(summary.encoder, folder)
    file = split_spec(spec).checkpoint
    if summary.preprocessing is None or file is None or not Path(file).is_file():
        return with_tag_of_run(spec)
    found = recorded_preprocessing(Path(file))
    differences = ["none there"] if found is None else found.differences(summary.preprocessing)
    if differences:
        raise ConfigError(
            f"encoder: expected the preprocessing that {folder / SUMMARY} names, found another in {file} "
            f"({'; '.join(differences)}); the file was replaced, train again or name it by its spec"
        )
    return spec


def with_tag_of_run(text: str) -> str:
    """The spec with the tag that its weights started from, if they are those of a run that did not record it.

    The tag determines the preprocessing and the text tower of the weights.
    """
    spec, runs = split_spec(text), list(_runs_behind(text))
    if spec.pretrained or not runs or runs[0].preprocessing is not None:
        return text
    for origin in (split_spec(run.original) for run in runs):
        if origin.pretrained and origin.named == spec.named:
            _explain(str(spec.checkpoint), f"{origin.named}/{origin.pretrained}")
            return str(replace(spec, pretrained=origin.pretrained))
    return text


def started_from(text: str) -> str:
    """Spec of the network that the first run behind an encoder started from; its text tower or classifier applies.

    Args:
        text: spec of the encoder, or folder of a training run.

    Raises:
        ConfigError: `text` is neither.
    """
    folder = user_path(text)
    if folder.is_dir():
        first = read_summary(folder)
        runs = [first, *_runs_behind(first.original, first.original_sha256)]
    else:
        runs = list(_runs_behind(text))
    spec = split_spec(runs[-1].original if runs else text)
    file = Path(spec.checkpoint) if spec.checkpoint else None
    if file is not None and file.name == WEIGHTS and not file.exists() and spec.has_weights:
        # The weights of a deleted run, which contained neither text tower nor classifier.
        spec = replace(spec, checkpoint=None)
    return str(spec)


def _runs_behind(text: str, expected: str | None = None) -> Iterator[RunSummary]:
    """Yield the run that wrote a spec's weights, the run whose encoder that one started from, and so on.

    Args:
        text: spec of the encoder.
        expected: recorded hash of its weights, if any.
    """
    seen: set[Path] = set()
    while (file := split_spec(text).checkpoint) is not None:
        folder = Path(file).parent
        if Path(file).name != WEIGHTS or folder in seen:
            return
        seen.add(folder)
        try:
            run = read_summary(folder)
        except ConfigError:
            return
        # Another run may have replaced this one.
        if expected not in (None, run.encoder_sha256):
            return
        yield run
        text, expected = run.original, run.original_sha256


@cache  # a command resolves the same encoder several times
def _explain(file: str, tag: str) -> None:
    say(f"{file} is of an earlier release and records no preprocessing; that of {tag} is used, and its text tower")
