"""Encoders of a merge: a spec, or the folder of a finished training run, which links one round to the next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamerge.encoders import Encoder, at_home, load_encoder
from storage_schemas import ConfigError, read_json

SUMMARY = "run.json"
# What a training run says of itself that makes a round traceable: the artifact it trained on, and from where.
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


def resolve(text: str) -> ResolvedEncoder:
    """Load what `--encoder` names.

    Raises:
        ConfigError: neither a spec nor the folder of a finished run, or weights that are not those of the run.
    """
    spec, run = encoder_spec(text)
    encoder = load_encoder(spec)
    if run is not None and run["encoder_sha256"] != encoder.sha256:
        raise ConfigError(
            f"encoder {text!r}: expected the weights that {SUMMARY} names, sha256 {run['encoder_sha256'][:12]}…, "
            f"found {encoder.sha256[:12]}…; the file was replaced, train again or name it by its spec"
        )
    return ResolvedEncoder(encoder, run)


def encoder_spec(text: str) -> tuple[str, dict[str, Any] | None]:
    """Spec of an encoder, and the links of its training run if `text` is the folder of one."""
    folder = Path(text).expanduser()
    if not folder.is_dir():
        return text, None
    try:
        facts = read_json((folder / SUMMARY).read_bytes())
        spec = str(facts["encoder"])
        links = {name: facts[name] for name in LINKS}
    except FileNotFoundError:
        raise ConfigError(
            f"encoder {text!r}: expected {SUMMARY} in the folder, found none: this is no run, or its training is "
            "not finished; run `datamerge train` to its end first"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder / SUMMARY}: expected the summary of a training run, found {error!r}") from None
    return at_home(spec, folder), {"url": str(folder.absolute()), **links}
