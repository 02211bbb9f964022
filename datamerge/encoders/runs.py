"""The folder of a finished training run where an encoder is asked for: its spec, its weights, what it started from.

Runs of releases before 0.2.0 recorded neither their preprocessing nor the tag that their weights started from. Both
are those of the original, which `run.json` names; that one may be a run's encoder itself, and so on back.
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

# Fields of a run's summary that make a round traceable: the artifact it trained on, and the encoder it began with.
LINKS = ("arm", "steps", "plan_sha256", "encoder_sha256", "original_sha256")


@dataclass(frozen=True)
class ResolvedEncoder:
    """A loaded encoder and the training run it came from, if any."""

    encoder: Encoder
    run: dict[str, Any] | None

    def provenance(self) -> dict[str, Any]:
        """What an artifact says of the encoder."""
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
        text: the spec or the folder.
        device: where to.
        image_size: side of the input in pixels, instead of its own.

    Raises:
        ConfigError: neither a spec nor the folder of a finished run, weights that are not those of the run, or a run
            at another size than its own.
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
        ConfigError: a folder without a finished run, or one whose file of weights was replaced.
    """
    folder = user_path(text)
    if not folder.is_dir():
        return with_tag_of_run(text), None
    summary = read_summary(folder)
    links = {name: getattr(summary, name) for name in LINKS}
    return spec_of_run(summary, folder), {"url": str(folder.absolute()), **links}


def spec_of_run(summary: RunSummary, folder: Path) -> str:
    """Spec of a run's encoder, with its weights from the run's own folder.

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
    """A spec, with the tag that its weights started from where they are those of a run that did not record it.

    The tag says which preprocessing and which text tower belong to the weights.
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
    """What the first of the runs behind an encoder started from, whose text tower or classifier belongs to it.

    Args:
        text: spec of the encoder, or the folder of a training run.

    Raises:
        ConfigError: neither.
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
        # A run that is gone. It wrote no text tower and no classifier.
        spec = replace(spec, checkpoint=None)
    return str(spec)


def _runs_behind(text: str, expected: str | None = None) -> Iterator[RunSummary]:
    """The run that wrote a spec's weights, the run whose encoder that one started from, and so on.

    Args:
        text: the spec.
        expected: hash of its weights, if anybody recorded it.
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
        # Another run may have taken this one's place since.
        if expected not in (None, run.encoder_sha256):
            return
        yield run
        text, expected = run.original, run.original_sha256


@cache  # a command asks for the same encoder several times
def _explain(file: str, tag: str) -> None:
    say(
        f"{file} is of an earlier release and records no preprocessing: it is that of {tag}, and so is its text tower"
    )
