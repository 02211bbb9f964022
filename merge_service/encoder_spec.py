"""Encoders of a merge: a spec, or the folder of a finished training run, which links one round to the next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamerge.encoders import Encoder, at_home, load_encoder, with_image_size
from storage_schemas import ConfigError
from storage_schemas.schema.run import SUMMARY, read_summary

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
            "sha256": self.encoder.sha256,
            "random_weights": self.encoder.random_weights,
            "embedding_dim": self.encoder.embedding_dim,
        }
        if self.run is not None:
            facts["run"] = self.run
        return facts


def resolve(text: str, image_size: int | None = None) -> ResolvedEncoder:
    """Load the encoder that a spec or the folder of a training run names.

    Args:
        text: the spec or the folder.
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
    spec = resized
    encoder = load_encoder(spec)
    if run is not None and run["encoder_sha256"] != encoder.sha256:
        raise ConfigError(
            f"encoder: expected the weights that {text}/{SUMMARY} names, sha256 {run['encoder_sha256'][:12]}…, "
            f"found {encoder.sha256[:12]}…; the file was replaced, train again or name it by its spec"
        )
    return ResolvedEncoder(encoder, run)


def encoder_spec(text: str) -> tuple[str, dict[str, Any] | None]:
    """Spec of an encoder, and the links of its training run if `text` is the folder of one."""
    folder = Path(text).expanduser()
    if not folder.is_dir():
        return text, None
    summary = read_summary(folder)
    links = {name: getattr(summary, name) for name in LINKS}
    return at_home(summary.encoder, folder), {"url": str(folder.absolute()), **links}
