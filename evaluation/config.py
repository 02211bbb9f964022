"""Settings of an evaluation."""

from __future__ import annotations

import math
from fractions import Fraction as ExactFraction
from typing import Any

from pydantic import Field, model_validator

from adversarial import PGD
from console import Fraction, Settings

LEVEL = ExactFraction(1, 255)


class EvaluateConfig(Settings):
    """Settings of `datamerge evaluate`; a TOML file holds them under the same names."""

    runs: list[str] = Field(
        min_length=1,
        description="Folders of finished training runs, or encoder specs as baselines; one row each.",
    )
    data: str = Field(min_length=1, description="Folder, Parquet file or fsspec URL of the raw images.")
    head: str | None = Field(
        None,
        description="Class head for accuracies: a .safetensors file, a timm: or open_clip: spec, or `outputs` if "
        "the encoder's outputs are logits (no accuracies if not set).",
    )
    class_names: str | None = Field(
        None,
        description="Text file with the head's class names, one a line, in the head's order; open_clip: heads are "
        "made from it.",
    )
    original: str | None = Field(
        None,
        description="Spec of the frozen encoder that embedding losses are measured against (what each run "
        "started from if not set).",
    )
    epsilon: Fraction = Field("2/255", description="Radius of the attack's ℓ∞ ball as a fraction of the pixel range.")
    step_size: Fraction | None = Field(
        None,
        description="Step of the attack as a fraction of the pixel range (max(1/255, epsilon/4) if not set).",
    )
    steps: int = Field(20, ge=1, description="Gradient steps of the attack.")
    on_grid: bool = Field(
        False,
        description="Whether attacked pixels stay multiples of 1/255; the field's standard is not to.",
    )
    limit: int | None = Field(None, ge=1, description="Use the first so many samples (all if not set).")
    batch_size: int = Field(64, ge=1, description="Images per forward pass; does not change what is measured.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the attack's random starts.")
    device: str = Field("auto", description="A torch device such as cpu or cuda:1; auto takes a GPU if there is one.")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch (its own choice if not set).")
    image_column: str | None = Field(None, description="Parquet column of images, if there are several.")
    label_column: str | None = Field(
        None, description="Parquet column of labels (label, labels or fine_label if not set)."
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("runs"):
            raise ValueError("runs: expected a run's folder or an encoder spec, found none; name at least one RUN")
        if isinstance(values, dict) and not values.get("data"):
            raise ValueError("data: expected a folder or Parquet file of raw images, found none; add --data SOURCE")
        return values

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateConfig:
        if self.class_names is not None and self.head is None:
            raise ValueError("class_names: they belong to a head, found none; add --head or drop class_names")
        if self.step_size is not None and not ExactFraction(self.step_size):
            raise ValueError("step_size: expected more than 0, found 0; leave it out for max(1/255, epsilon/4)")
        return self

    def attack_settings(self) -> PGD:
        """The attack. Without a step size it is max(1/255, ε/4), on the grid rounded down to a multiple of 1/255.

        Raises:
            ConfigError: on the grid with an epsilon below 1/255.
        """
        epsilon = ExactFraction(self.epsilon)
        if self.step_size is not None:
            step_size = ExactFraction(self.step_size)
        else:
            step_size = max(LEVEL, epsilon / 4)
            if self.on_grid:
                step_size = math.floor(step_size / LEVEL) * LEVEL
        return PGD(epsilon, step_size, self.steps, on_grid=self.on_grid)
