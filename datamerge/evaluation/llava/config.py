"""Settings of the evaluations through LLaVA; the defaults are those of FARE."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from datamerge.attacks import APGD
from datamerge.evaluation.config import OUTPUT, SearchPrecision
from datamerge.runtime import Settings
from datamerge.runtime.fields import Device, Output, SampleSeed, Threads
from datamerge.runtime.options import Option
from datamerge.runtime.settings import Effect
from storage_schemas.schema.pixel_length import PixelLength


class LlavaSettings(Settings):
    """Settings that captions and VQA share."""

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("epsilon", "steps", "precision", "save_images", "pictures"),
            lambda own: own.attack,
            "nothing is attacked; drop `{name}` or `attack=False`",
        ),
    )

    runs: Annotated[list[str], Option(argument=True, metavar="RUN…")] = Field(
        min_length=1,
        description="Vision encoders, one row each: runs' folders, open_clip: or hf: specs, or `own`.",
    )
    data: Annotated[str, Option(metavar="FILE.json")] = Field(
        min_length=1, description="Captions or questions, in COCO's or VQAv2's format. Required."
    )
    images: Annotated[str, Option(metavar="FOLDER")] = Field(
        min_length=1, description="The images that the file names. Required."
    )
    llava: Annotated[str, Option(metavar="PATH")] = Field(
        "llava-hf/llava-1.5-7b-hf", min_length=1, description="LLaVA model: a folder or a name on Hugging Face's hub."
    )
    image_size: int = Field(
        224, ge=0, description="Side of the vision tower's input in pixels; 0 is its native size."
    )
    fit: Literal["pad", "crop"] = Field(
        "pad",
        description="How images are made square: padded with the mean colour, as LLaVA-1.5 does, or cropped as the "
        "encoder's own preprocessing says.",
    )
    attack: bool = Field(True, description="Measure under attack too.")
    epsilon: PixelLength = Field(
        PixelLength("2/255"), description="Radius of the attack's ℓ∞ ball, as a fraction of the pixel range."
    )
    steps: int = Field(100, ge=1, description="APGD steps of each pass.")
    sample: int = Field(100, ge=1, description="Images or questions drawn at random; all if there are fewer.")
    sample_seed: SampleSeed = 42
    batch_size: int = Field(1, ge=1, description="Images at once; results do not depend on it.")
    half: Annotated[
        Literal["float16", "bfloat16", "float32"] | None, Option(unset="float16 on a GPU, float32 elsewhere")
    ] = Field(None, description="Arithmetic of all passes before the float32 ones.")
    precision: SearchPrecision = Field(
        "float32",
        description="Arithmetic of the attacks' search where the model is in float32: tf32 lets a GPU round the "
        "factors of products to 10 bits. Answers are generated in float32.",
    )
    save_images: bool = Field(False, description="Keep every adversarial image, as an 8-bit PNG.")
    pictures: int = Field(8, ge=0, description="Images shown in the report.")
    device: Device = "auto"
    threads: Threads = None
    output: Output = OUTPUT

    @model_validator(mode="after")
    def _radius(self) -> LlavaSettings:
        if self.attack and not self.epsilon:
            raise ValueError("epsilon: expected more than 0, found 0; set a radius, or use `attack=False`")
        return self

    def attack_settings(self) -> APGD:
        """FARE's APGD: starts at the image itself, with a first step of length ε, off the 8-bit grid."""
        return APGD(
            self.epsilon,
            self.steps,
            random_start=False,
            grid=False,
            initial_step=Fraction(1),
        )


class CaptionsConfig(LlavaSettings):
    """Settings of `datamerge evaluate captions`."""

    split: str = Field("test", min_length=1, description="Split of a Karpathy file.")


class VqaConfig(LlavaSettings):
    """Settings of `datamerge evaluate vqa`."""

    annotations: Annotated[str, Option(metavar="FILE.json")] = Field(
        min_length=1, description="VQAv2 annotations: people's answers. Required."
    )
