"""The README.md of an exported encoder: a model card for the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from datamerge.encoders import Encoder, weights_sha256
from storage_schemas.schema.provenance import own_version
from storage_schemas.schema.run import RunSummary
from trainer.export.kinds import Folder

LIBRARIES = {"open_clip": "open_clip", "hf": "transformers", "timm": "timm"}


def model_card(summary: RunSummary, encoder: Encoder, target: str, folder: Folder, best: bool) -> str:
    """Text of the model card: origin of the weights, how to load them, preprocessing and settings.

    Args:
        summary: summary of the run.
        encoder: the exported encoder.
        target: the library, a key of `LIBRARIES`.
        folder: description of the exported folder.
        best: whether the encoder is the state with the lowest held-out loss.
    """
    exported = f"; this export, with the lowest held-out loss: `{weights_sha256(encoder.model)}`"
    chosen = exported if best else ""
    note = f"\n{folder.note}" if folder.note else ""
    settings = "\n".join(
        f"| {name} | `{value}` |" for name, value in summary.config.items() if value not in (None, [])
    )
    return f"""---
library_name: {LIBRARIES[target]}
tags: [adversarial-robustness, clip, vision]
---

# {Path(summary.original.partition(":")[2]).name}, {summary.arm}

An image encoder, fine-tuned from `{summary.original}` on precomputed groups of adversarial images
(arm **{summary.arm}**), exported by datamerge {own_version()}.

| provenance | |
|---|---|
| artifact | `{summary.artifact}` |
| artifact plan, sha256 | `{summary.plan_sha256}` |
| weights before training, sha256 | `{summary.original_sha256}` |
| weights after training, sha256 | `{summary.encoder_sha256}`{chosen} |
| optimiser steps | {summary.steps} |
| groups seen | {summary.groups} |

In this folder:

```python
{folder.usage}```

Pixels: {folder.preprocessing}.{note}

| setting | value |
|---|---|
{settings}
"""
