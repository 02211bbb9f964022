"""Settings of evaluations on raw images; `datamerge.evaluation.llava.config` has those of LLaVA."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from datamerge.attacks import APGD, PGD, Norm
from datamerge.runtime import Settings
from datamerge.runtime.fields import (
    LIMITS,
    Device,
    ExifSetting,
    ImageColumn,
    LabelColumn,
    Limit,
    LimitFirst,
    Output,
    SampleSeed,
    Seed,
    Split,
    Threads,
)
from datamerge.runtime.options import Option
from datamerge.runtime.settings import Effect
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.pixel_length import PixelLength, Radius, rounded_level

SearchPrecision = Literal["float32", "tf32"]
LEVEL = Fraction(1, LEVELS)
OUTPUT = "evaluation-results"
SAMPLE_SEED = Effect(("sample_seed",), lambda own: own.sample is not None, "nothing is drawn; set `sample`")
_CLASS_NAMES = Effect(
    ("class_names",),
    lambda own: own.head is not None,
    "they belong to a head, found none; set `head` or drop `{name}`",
)
_PICTURES = Effect(
    ("pictures",),
    lambda own: own.output is not None and own.head is not None,
    "pictures show classes and are stored; set `head` and `output`, or drop `{name}`",
)
_TEMPLATES = Effect(
    ("templates",),
    lambda own: (
        own.head is None or not (own.head.endswith(".safetensors") or own.head.startswith(("timm:", "outputs")))
    ),
    "they are prompts for a text tower, and {settings.head} has none; drop `{name}`",
)


class ImagesConfig(Settings):
    """Settings that all evaluations on raw images share."""

    effects: ClassVar[tuple[Effect, ...]] = (SAMPLE_SEED, LIMITS)

    runs: Annotated[list[str], Option(argument=True, metavar="RUN…")] = Field(
        min_length=1, description="Folders of finished training runs, or encoder specs as baselines; one row each."
    )
    data: Annotated[str, Option(metavar="SOURCE")] = Field(
        min_length=1, description="Raw images: a folder, a Parquet file or a URL. Required."
    )
    image_size: Annotated[int | None, Option(unset="the model's own")] = Field(
        None, ge=1, description="Side of the input of encoders that are given as specs, in pixels."
    )
    limit: Limit = None
    limit_first: LimitFirst = None
    sample: Annotated[int | None, Option(unset="all")] = Field(
        None, ge=1, description="Number of samples drawn at random, the same for every run."
    )
    sample_seed: SampleSeed = 42
    steps: int = Field(100, ge=1, description="Gradient steps of each attack.")
    restarts: int = Field(1, ge=1, description="Random starts of each attack; the strongest result counts.")
    seed: Seed = Field(0, description="Seed of the attack's random starts, and of the draw of `limit`.")
    batch_size: int = Field(64, ge=1, description="Images per forward pass; results do not depend on it.")
    precision: SearchPrecision = Field(
        "float32",
        description="Arithmetic of the attacks' search: tf32 lets a GPU round the factors of products to 10 bits. "
        "Losses and classifications are always computed in float32.",
    )
    split: Split = None
    exif: ExifSetting = None
    image_column: ImageColumn = None
    label_column: LabelColumn = None
    device: Device = "auto"
    threads: Threads = None
    output: Annotated[str | None, Option(alias="-o", metavar="FOLDER", unset="nothing is stored")] = Field(
        None, min_length=1, description="Folder of the results; the same one again continues."
    )


class EvaluateConfig(ImagesConfig):
    """Settings of `datamerge evaluate` without a sub-command: embedding loss and accuracy under PGD."""

    renamed: ClassVar[dict[str, str]] = {"on_grid": "grid"}
    effects: ClassVar[tuple[Effect, ...]] = (SAMPLE_SEED, LIMITS, _CLASS_NAMES, _PICTURES)

    head: Annotated[str | None, Option(metavar="FILE|SPEC|RUN", unset="no accuracies")] = Field(
        None,
        description="Class head: a .safetensors file, a timm:, open_clip: or hf: spec, the folder of a run for that "
        "of what it started from, or `outputs` if the encoder's outputs are logits.",
    )
    class_names: Annotated[str | None, Option(metavar="FILE")] = Field(
        None,
        description="Class names, one a line, in the head's order, or `imagenet`; zero-shot heads are made of them.",
    )
    original: Annotated[str | None, Option(metavar="SPEC", unset="what each run started from")] = Field(
        None, description="Frozen encoder that embedding losses are measured against."
    )
    epsilon: PixelLength = Field(
        PixelLength("2/255"), description="Radius of the attack's ℓ∞ ball, as a fraction of the pixel range."
    )
    steps: int = Field(20, ge=1, description="Gradient steps of each attack.")
    step_size: Annotated[PixelLength | None, Option(unset="max(1/255, epsilon/4)")] = Field(
        None, description="Step of the attack, as a fraction of the pixel range."
    )
    grid: bool = Field(
        False, description="Keep attacked pixels on multiples of 1/255; the field's standard is not to."
    )
    pictures: int = Field(6, ge=0, description="Images of each run shown in the report.")

    @model_validator(mode="before")
    @classmethod
    def _rounded(cls, values: Any) -> Any:
        """Refuse decimals on the grid that are rounded multiples of 1/255."""
        if isinstance(values, dict) and values.get("grid"):
            for name in ("epsilon", "step_size"):
                if (problem := rounded_level(values.get(name), radius=name == "epsilon")) is not None:
                    raise ValueError(f"{name}: {problem}")
        return values

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateConfig:
        if not self.epsilon:
            raise ValueError("epsilon: expected more than 0, found 0; clean scores are always measured")
        if self.step_size is not None and not self.step_size:
            raise ValueError("step_size: expected more than 0, found 0; leave it out for max(1/255, epsilon/4)")
        return self

    def attacks(self) -> dict[str, PGD]:
        """The attack, keyed by its radius. Without a step size it is max(1/255, ε/4), on the grid rounded down.

        Raises:
            ConfigError: on the grid with an epsilon below 1/255.
        """
        step_size: Fraction = self.step_size or max(LEVEL, self.epsilon / 4)
        if self.step_size is None and self.grid:
            step_size = math.floor(step_size / LEVEL) * LEVEL
        return {str(self.epsilon): PGD(self.epsilon, step_size, self.steps, grid=self.grid)}


class RadiiConfig(ImagesConfig):
    """Settings that `datamerge evaluate zero-shot` and `embedding` share: APGD at several radii."""

    epsilons: list[Radius] = Field(
        [Radius("2/255"), Radius("4/255")],
        min_length=1,
        description="Radii of the attack's ball: fractions of the pixel range, in the ℓ2 norm any length.",
    )
    norm: Norm = Field("linf", description="Norm of the ball.")
    output: Output = OUTPUT

    @model_validator(mode="after")
    def _radii(self) -> RadiiConfig:
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
            str(radius): APGD(radius, self.steps, grid=False, norm=self.norm) for radius in sorted(set(self.epsilons))
        }


class ZeroShotConfig(RadiiConfig):
    """Settings of `datamerge evaluate zero-shot`."""

    effects: ClassVar[tuple[Effect, ...]] = (SAMPLE_SEED, LIMITS, _TEMPLATES)

    epsilons: list[Radius] = Field(
        [Radius("1/255"), Radius("2/255"), Radius("4/255")],
        min_length=1,
        description="Radii of the attack's ball: fractions of the pixel range, in the ℓ2 norm any length.",
    )
    head: Annotated[
        str | None, Option(metavar="FILE|SPEC|RUN", unset="the text tower of what the run started from")
    ] = Field(
        None,
        description="Class head: an open_clip:, hf: or timm: spec, the folder of a run for that of what it started "
        "from, a .safetensors file, or `outputs`.",
    )
    class_names: Annotated[str | None, Option(metavar="FILE")] = Field(
        None, description="Class names, one a line, in label order, or `imagenet`."
    )
    templates: Annotated[str, Option(metavar="FILE")] = Field(
        "openai", description="Prompts: a file with one a line and {} for the name, `openai` (80) or `simple` (7)."
    )
    attack: Literal["autoattack", "apgd"] = Field(
        "autoattack", description="APGD-CE, then targeted APGD-DLR on survivors; or APGD-CE alone."
    )
    check_masking: bool = Field(True, description="Look for masked gradients on a few images.")
    pictures: int = Field(6, ge=0, description="Images of each run shown in the report.")


class EmbeddingConfig(RadiiConfig):
    """Settings of `datamerge evaluate embedding`."""

    original: Annotated[str | None, Option(metavar="SPEC", unset="what each run started from")] = Field(
        None, description="Frozen encoder that losses are measured against."
    )
