"""The folder of a run: identity, checkpoints, and final results.

run.json              summary of a finished run; only finished runs have it
encoder.safetensors   trained weights
identity.json         settings that determine the weights; written first, compared on every later call
log.jsonl             one line per logged step
tensorboard/          the same numbers for TensorBoard
checkpoints/          step-000350.pt: the state after 350 updates; best.pt: the state with the lowest held-out loss
not-finite-step-….pt  the batch at which a loss or gradient was not finite
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from datamerge.runtime import local_path
from datamerge.runtime.messages import first_line
from storage_schemas import ConfigError, DatamergeError, Location, read_json
from storage_schemas.access.atomic import atomic_file
from storage_schemas.schema.pixel_length import PixelLength
from storage_schemas.schema.provenance import changes
from storage_schemas.schema.run import SUMMARY, WEIGHTS, RunSummary, read_summary
from trainer.arms import ARMS
from trainer.config import TrainConfig

IDENTITY, LOG = "identity.json", "log.jsonl"
BEST = "best.pt"
# Entries of the identity that are not settings, with their names in messages.
_CHANGED_THINGS = {
    "plan_sha256": "artifact",
    "encoder_sha256": "encoder",
    "encoder_code_sha256": "code of the encoder",
    "preprocessing": "preprocessing",
    "head_sha256": "class head",
}


class RunFolder:
    """One run on the local disk."""

    def __init__(self, path: str) -> None:
        self.path = local_path(path, "run")
        self._location = Location(self.path)
        if self.path.is_file():
            raise ConfigError(f"run: expected a folder, found a file at {path}; choose another `run`")
        foreign_files = self.path.is_dir() and not (self.path / IDENTITY).exists() and sorted(self.path.iterdir())
        if foreign_files:
            raise ConfigError(
                f"run: expected a new folder or a run, found {foreign_files[0].name!r} and no {IDENTITY} in {path}; "
                "choose another `run`"
            )

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Write the run's identity into the folder, or check that the folder has the same one.

        Raises:
            ConfigError: the folder holds a run with other settings; the message names them.
        """
        if not (self.path / IDENTITY).exists():
            self._write_json(IDENTITY, identity)
            return
        found = _in_present_words(self._read_json(IDENTITY), identity)
        if "order" not in found and "order" in identity:
            if self.summary() is None:
                raise ConfigError(
                    f"run: {self.path} was started by datamerge 0.1, which takes groups in another order; finish it "
                    "with that release, or choose another `run`"
                )
            found |= {name: identity[name] for name in ("order", "shuffle_window") if name in identity}
        different = changes(found, identity)
        if not different:
            return
        changed = _CHANGED_THINGS.keys() & {name for name in identity if found.get(name) != identity[name]}
        what = " and ".join(sorted(_CHANGED_THINGS[name] for name in changed))
        problem = f"was started with another {what}" if what else "holds a run with other settings"
        raise ConfigError(
            f"run: {self.path} {problem} ({'; '.join(different)}); choose another `run`, "
            f"or use the same {what or 'settings'} to continue it"
        )

    def summary(self) -> RunSummary | None:
        """The summary of a finished run; None if the run is unfinished."""
        if not (self.path / SUMMARY).exists() or not (self.path / WEIGHTS).exists():
            return None
        return read_summary(self.path, "run")

    def publish(self, summary: RunSummary) -> None:
        """Mark the run as finished."""
        self._write_json(SUMMARY, summary.model_dump(mode="json"))

    def checkpoints(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*.pt"), key=step_of)

    def save(self, state: Mapping[str, Any], keep: int) -> Path:
        """Write a checkpoint atomically, then remove all but the newest `keep`.

        Raises:
            DatamergeError: it cannot be written, for instance because the disk is full; earlier ones are kept.
        """
        path = self._write_state(f"step-{state['step']:06d}.pt", state)
        for old in self.checkpoints()[:-keep]:
            old.unlink()
        return path

    def save_best(self, state: Mapping[str, Any]) -> Path:
        """Replace the state with the lowest held-out loss so far, atomically; raises as `save`."""
        return self._write_state(BEST, state)

    def _write_state(self, file_name: str, state: Mapping[str, Any]) -> Path:
        path = self.path / "checkpoints" / file_name
        try:
            with atomic_file(path) as stream:
                torch.save(dict(state), stream)
        except OSError as error:
            earlier = self.checkpoints()
            kept = f"{earlier[-1].name} is kept" if earlier else "there is no earlier checkpoint"
            raise DatamergeError(
                f"{path}: cannot write: {error.strerror or first_line(error)}; {kept}. Free space there, and run the "
                "same command again to continue"
            ) from error
        return path

    def load(self, path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Read a checkpoint of this run; see `read_state`.

        Raises:
            ConfigError: the checkpoint belongs to a run with other settings.
            DatamergeError: the checkpoint is damaged.
        """
        state = read_state(path)
        if changes(state["identity"], identity):
            raise ConfigError(
                f"run: expected checkpoints of these settings, found one with other settings at {path}; remove it, "
                "or choose another `run`"
            )
        return state

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._location.write(name, json.dumps(content, indent=1).encode() + b"\n")

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = read_json((self.path / name).read_bytes())
        except ValueError as error:
            raise DatamergeError(f"{self.path / name}: not valid JSON ({error}); choose another `run`") from None
        if not isinstance(content, dict):
            raise DatamergeError(f"{self.path / name}: expected a JSON object, found {type(content).__name__}")
        return content


def _in_present_words(identity: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an identity that an earlier release wrote; `present` is the one that this release would write."""
    spelt = dict(identity)
    for name in ("preprocessing", "encoder_code_sha256"):
        if name not in spelt and name in present:
            spelt[name] = present[name]  # earlier releases did not record it
    if spelt.get("precision") == "bf16":
        spelt["precision"] = "bfloat16"
    for name in ("epsilon", "refine_step_size"):
        if isinstance(spelt.get(name), str):
            with suppress(ValueError):  # an invalid length differs from every valid setting
                spelt[name] = str(PixelLength(spelt[name]))
    arm = next((arm for name, arm in ARMS.items() if name == spelt.get("arm")), None)
    if arm is not None and not arm.estimators:
        # Earlier releases accepted any estimator here, without effect.
        spelt["estimator"] = TrainConfig.model_fields["estimator"].default
    return spelt


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain values are unpickled.

    `load_state_dict` moves the tensors to their device. AdamW's step counters must stay on the CPU: on a GPU AdamW
    would wait for the device at every parameter of every step.

    Raises:
        DatamergeError: the checkpoint is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"identity", "model", "average", "optimizer", "step"} - state.keys()
    except Exception as error:  # zipfile, pickle and torch each raise their own
        reason = first_line(error)
    else:
        reason = f"it has no {', '.join(sorted(missing))}" if missing else ""
    if reason:
        raise DatamergeError(
            f"{path}: not a readable checkpoint ({reason}); remove it to continue from the previous one"
        ) from None
    return state


def step_of(path: Path) -> int:
    """Step of a checkpoint file; -1 for any other."""
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1
