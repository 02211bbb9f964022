"""The demo's digits and encoder for the arms: 4,000 training and 1,000 test digits, the same for every seed."""

from __future__ import annotations

from pathlib import Path

from datamerge.demo import digits
from experiments.arms import Prepared


def prepare(_: Path, work: Path) -> Prepared:
    """Write the digits, which a package contains, and train the encoder, unless that is done."""
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
