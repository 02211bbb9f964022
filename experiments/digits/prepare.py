"""The demo's digits and encoder for the arms: 4,000 digits to train on, 1,000 to measure on, whatever the seed."""

from __future__ import annotations

from pathlib import Path

from datamerge.demo import digits
from experiments.arms import Prepared


def prepare(_: Path, work: Path) -> Prepared:
    """Train the encoder if it is not there. The digits come with a package, not from the data folder."""
    weights, head = work / "encoder.safetensors", work / "head.safetensors"
    if not head.exists():
        images, _ = digits.write_digits(work / "digits")
        digits.pretrain(images, weights, head, seed=0)
    return Prepared(
        str(work / "digits" / "train"),
        lambda _: str(work / "digits" / "test"),
        f"{digits.SPEC}@{weights}",
        str(head),
    )
