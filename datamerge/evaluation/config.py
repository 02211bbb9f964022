"""Settings of evaluations on raw images; those of LLaVA are in `datamerge.evaluation.llava.config`."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, model_validator

from datamerge.attacks import APGD, PGD, Norm
from datamerge.runtime import Settings
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.pixel_length import PixelLength, Radius

LEVEL = Fraction(1, LEVELS)
OUTPUT = "evaluation-results"


class ImagesConfig(Settings):
    """What all evaluations on raw images share."""

    runs: list[str] = Field(
        min_length=1,
        description="Folders of finished training runs, or encoder specs as baselines; one row each.",
    )
    data: str = Field(min_length=1, description="Folder, Parquet file or fsspec URL of the raw images.")
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


class EvaluateConfig(ImagesConfig):
    """Settings of `datamerge evaluate`; a TOML file holds them under the same names."""

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
    epsilon: PixelLength = Field(
        PixelLength("2/255"), description="Radius of the attack's ℓ∞ ball as a fraction of the pixel range."
    )
    step_size: PixelLength | None = Field(
        None,
        description="Step of the attack as a fraction of the pixel range (max(1/255, epsilon/4) if not set).",
    )
    steps: int = Field(20, ge=1, description="Gradient steps of the attack.")
    on_grid: bool = Field(
        False,
        description="Whether attacked pixels stay multiples of 1/255; the field's standard is not to.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateConfig:
        if self.class_names is not None and self.head is None:
            raise ValueError("class_names: they belong to a head, found none; add --head or drop class_names")
        if self.step_size is not None and not self.step_size:
            raise ValueError("step_size: expected more than 0, found 0; leave it out for max(1/255, epsilon/4)")
        return self

    def attack_settings(self) -> PGD:
        """The attack. Without a step size it is max(1/255, ε/4), on the grid rounded down to a multiple of 1/255.

        Raises:
            ConfigError: on the grid with an epsilon below 1/255.
        """
        step_size = self.step_size or max(LEVEL, self.epsilon / 4)
        if self.step_size is None and self.on_grid:
            step_size = math.floor(step_size / LEVEL) * LEVEL
        return PGD(self.epsilon, step_size, self.steps, on_grid=self.on_grid)


class StudyConfig(ImagesConfig):
    """What the resumable evaluations of `datamerge evaluate zero-shot` and `embedding` share."""

    sample: int | None = Field(
        None, ge=1, description="Draw so many samples at random, the same for everybody (all if not set)."
    )
    sample_seed: int = Field(42, ge=0, lt=2**32, description="Seed of that draw.")
    epsilons: list[Radius] = Field(
        min_length=1,
        description="Radii of the attack's ball: fractions of the pixel range, in the ℓ2 norm any length.",
    )
    norm: Norm = Field("linf", description="Norm of the ball: linf or l2.")
    steps: int = Field(100, ge=1, description="Gradient steps of each attack.")
    restarts: int = Field(1, ge=1, description="Random starts of each attack; the strongest result counts.")
    output: str = Field(OUTPUT, min_length=1, description="Folder of the results; the same one again continues.")

    @model_validator(mode="after")
    def _radii(self) -> StudyConfig:
        for radius in self.epsilons:
            if not radius:
                raise ValueError(
                    f"epsilons: expected radii above 0, found {radius}; clean scores are always measured"
                )
            if self.norm == "linf":
                try:
                    PixelLength(radius)
                except ValueError as error:
                    raise ValueError(f"epsilons: {error}") from None
        return self

    def attacks(self) -> dict[str, APGD]:
        """The attack of every radius, smallest first; keyed by the radius as the user wrote it."""
        return {
            str(radius): APGD(radius, self.steps, on_grid=False, norm=self.norm)
            for radius in sorted(set(self.epsilons))
        }


class ZeroShotConfig(StudyConfig):
    """Settings of `datamerge evaluate zero-shot`."""

    epsilons: list[Radius] = Field(
        [Radius("1/255"), Radius("2/255"), Radius("4/255")],
        min_length=1,
        description="Radii of the attack's ball: fractions of the pixel range, in the ℓ2 norm any length.",
    )
    head: str | None = Field(
        None,
        description="Class head: an open_clip: or timm: spec, a .safetensors file, or `outputs` (the text tower of "
        "the encoder a run started from if not set).",
    )
    class_names: str | None = Field(
        None, description="Text file with the class names, one a line, in label order, or `imagenet`."
    )
    templates: str = Field(
        "openai", description="Prompts: `openai` (80 for ImageNet), `simple` (7), or a file of lines with {}."
    )
    attack: Literal["autoattack", "apgd"] = Field(
        "autoattack", description="APGD-CE then targeted APGD-DLR on survivors, or APGD-CE alone."
    )
    check_masking: bool = Field(True, description="Look for masked gradients on a few images.")


class EmbeddingConfig(StudyConfig):
    """Settings of `datamerge evaluate embedding`."""

    epsilons: list[Radius] = Field(
        [Radius("2/255"), Radius("4/255")],
        min_length=1,
        description="Radii of the attack's ball: fractions of the pixel range, in the ℓ2 norm any length.",
    )
    original: str | None = Field(
        None,
        description="Spec of the frozen encoder that losses are measured against (what each run started from if "
        "not set).",
    )
