"""Finished training runs without weights."""

from __future__ import annotations

import json
from pathlib import Path

from datamerge.encoders import with_checkpoint
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.run import RunSummary

BARE = "open_clip:ViT-L-14-quickgelu"


def write_run(folder: Path, original: str, *, sha256: str = "new", started: str = "old", older: bool = False) -> str:
    """Write a finished run without weights; returns the spec of its encoder, without a tag if the run is `older`."""
    folder.mkdir(parents=True)
    spec = with_checkpoint(BARE if older else original, str(folder / "encoder.safetensors"))
    summary = RunSummary(
        encoder=spec,
        encoder_sha256=sha256,
        original=original,
        original_sha256=started,
        arm="AT-5-Avg",
        artifact="adv",
        plan_sha256="0" * 64,
        steps=1,
        groups=1,
        seconds=1.0,
        bytes=1,
        config={},
        preprocessing=None if older else Preprocessing(shape=(3, 224, 224)),
    )
    (folder / "run.json").write_text(json.dumps(summary.model_dump(mode="json", exclude_none=older)))
    return spec
