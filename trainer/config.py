"""Settings of a training run, and the presets that ship with the package."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any, Literal, cast

from pydantic import ByteSize, Field, field_validator, model_validator

from datamerge.runtime import Settings
from storage_schemas import ConfigError, shortened
from storage_schemas.schema.pixel_length import PixelLength
from trainer.estimators import ALONG_FACTORS, COMPILABLE

Arm = Literal["avg", "factors", "ind", "mean-only", "random-member"]
LossName = Literal["auto", "squared_error", "cross_entropy"]
EstimatorName = Literal["gauss_newton", "sampled", "antithetic", "jvp", "exact"]
Precision = Literal["float32", "tf32", "bf16"]


class TrainConfig(Settings):
    """Settings of `datamerge train`; a TOML file holds them under the same names."""

    artifact: str = Field(description="Folder or fsspec URL of the artifact to train on.", min_length=1)
    run: str = Field(description="Local folder of the run: logs, checkpoints and the trained encoder.", min_length=1)
    arm: Arm = Field(
        default="avg",
        description="avg: merged groups with the curvature correction; factors: merged groups with a random point "
        "along the stored factors of their covariance; ind: their stored members one by one; "
        "mean-only: merged groups without the correction; random-member: one stored member a step, drawn anew.",
    )
    members: int | None = Field(
        default=None,
        ge=1,
        description="For the arms ind and random-member: the first so many stored members of each group "
        "(all if not set).",
    )
    loss: LossName = Field(
        default="auto",
        description="auto: squared_error if the artifact stores target embeddings, else cross_entropy.",
    )
    loss_scale: float = Field(
        default=1.0,
        description="Factor of the squared error: 1.0 as in the paper's eq. 11, 0.5 as in its Appendix A.",
    )
    estimator: EstimatorName = Field(
        default="gauss_newton",
        description="For the arm avg: gauss_newton is the paper's; sampled, antithetic and jvp draw directions "
        "instead of labels; exact is for small models. For the arm factors: sampled (its default), antithetic or "
        "gauss_newton.",
    )
    samples: int = Field(
        default=1, ge=1, description="Pseudo-labels (or directions) drawn per group and step by the estimator."
    )
    deviation: float = Field(
        default=1.0,
        gt=0,
        le=10,
        allow_inf_nan=False,
        description="For the arm factors: multiplies the deviation from the mean; above 1 for more robustness at the "
        "price of clean accuracy.",
    )
    refine_steps: int = Field(
        default=0,
        ge=0,
        le=100,
        description="Steps of PGD against the encoder as it is, from the stored image, before that is trained on: "
        "they bring stored attacks up to date. Needs an artifact merged with keep_clean.",
    )
    refine_step_size: PixelLength | None = Field(
        default=None, description="Length of such a step (twice the artifact's epsilon over refine_steps if not set)."
    )
    encoder: str | None = Field(
        default=None, description="Encoder to start from, such as timm:resnet18 (the artifact's own if not set)."
    )
    head: str | None = Field(
        default=None,
        description="Frozen class head for cross_entropy (the artifact's, or the encoder's own outputs, if not set).",
    )
    steps: int | None = Field(default=None, ge=1, description="Length of the run in optimiser steps; or set epochs.")
    epochs: int | None = Field(
        default=None, ge=1, description="Length of the run in passes over the artifact; or set steps."
    )
    batch_size: int = Field(
        default=1, ge=1, description="Groups per optimiser step, over all processes and micro-batches."
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        description="Micro-batches that each process cuts its share of a batch into; saves memory, changes no result "
        "beyond rounding.",
    )
    learning_rate: float = Field(
        default=1e-5,
        gt=0,
        le=10,
        allow_inf_nan=False,
        description="Peak learning rate of AdamW, reached after the warm-up.",
    )
    weight_decay: float = Field(
        default=1e-4, ge=0, le=10, allow_inf_nan=False, description="AdamW's decoupled decay."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up before the cosine decay to 0.")
    gradient_clip: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Largest allowed norm of the gradient (no limit if not set).",
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="Decay of an exponential moving average of the weights, such as 0.999; the average is then what "
        "is evaluated and published.",
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="Patterns (* and ?) of parameter names that keep their values, such as transformer.resblocks.0.*",
    )
    precision: Precision = Field(
        default="float32",
        description="tf32 lets a GPU round the factors of products to 10 bits; bf16 runs the encoder under autocast; "
        "weights, moments, losses and corrections stay float32.",
    )
    compile: bool = Field(
        default=False, description="torch.compile the encoder; for estimators without a double backward."
    )
    eval_artifact: str | None = Field(
        default=None,
        description="Held-out artifact: its loss is logged and picks the checkpoint that is kept as best.",
    )
    eval_every: int = Field(default=500, ge=1, description="Steps between two evaluations on eval_artifact.")
    epsilon: PixelLength | None = Field(
        default=None, description="Refuse an artifact whose members were attacked within another radius than this."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the order of groups and of all random draws.")
    device: str = Field(
        default="auto", description="A torch device such as cpu or cuda:1; auto takes a GPU if there is one."
    )
    checkpoint_every: int = Field(default=500, ge=1, description="Steps between two checkpoints.")
    keep_checkpoints: int = Field(
        default=2, ge=1, description="Newest checkpoints that are kept; older ones are removed."
    )
    data_workers: int = Field(
        default=0, ge=0, description="Processes that read ahead (0 reads in the training process)."
    )
    cache: str | None = Field(
        default=None, description="Local folder for copies of a remote artifact's files; several runs may share it."
    )
    cache_bytes: ByteSize = Field(
        default=ByteSize(100 * 10**9),
        ge=1,
        description="What the cache may hold: bytes, or a size such as 200GB or 1.5TiB.",
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch (its own choice if not set).")
    log_every: int = Field(default=10, ge=1, description="Steps between two lines of the log.")
    wandb_project: str | None = Field(
        default=None,
        min_length=1,
        description="Weights & Biases project that gets the same numbers as the log (none if not set).",
    )

    @field_validator("loss_scale")
    @classmethod
    def _known_scale(cls, value: float) -> float:
        if value not in (1.0, 0.5):
            raise ValueError(f"expected 1.0 (the paper's eq. 11) or 0.5 (its Appendix A), found {value}")
        return float(value)

    @model_validator(mode="before")
    @classmethod
    def _default_estimator(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("arm") == "factors" and values.get("estimator") is None:
            return {**values, "estimator": "sampled"}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            found = "none" if self.steps is None else f"steps = {self.steps} and epochs = {self.epochs}"
            raise ValueError(f"expected one of steps and epochs, found {found}; set --steps or --epochs")
        if self.members is not None and self.arm not in ("ind", "random-member"):
            raise ValueError(
                f"members: only the arms ind and random-member take single members, found arm {self.arm}; "
                "drop members"
            )
        if self.samples != 1 and (self.arm not in ("avg", "factors") or self.estimator == "exact"):
            raise ValueError(
                f"samples: only the arms avg and factors draw them, and not with estimator exact; found arm "
                f"{self.arm} with estimator {self.estimator}; drop samples"
            )
        if self.arm == "factors" and self.estimator not in ALONG_FACTORS:
            raise ValueError(
                f"estimator: the arm factors has {', '.join(ALONG_FACTORS)}, found {self.estimator}; drop estimator"
            )
        if self.deviation != 1.0 and self.arm != "factors":
            raise ValueError(f"deviation: only the arm factors has one, found arm {self.arm}; drop deviation")
        if self.refine_steps and (self.arm == "avg" or (self.estimator != "sampled" and self.arm == "factors")):
            raise ValueError(
                f"refine_steps: refines single images, found arm {self.arm} with estimator {self.estimator}; use "
                "--arm factors, random-member, ind or mean-only, or drop refine_steps"
            )
        if self.refine_steps and self.samples != 1:
            raise ValueError(f"refine_steps: refines one image a group, found samples {self.samples}; drop samples")
        if self.refine_step_size is not None and not self.refine_steps:
            raise ValueError("refine_step_size: expected refine_steps of 1 or more, found 0; set refine_steps")
        if self.compile and self.arm == "avg" and self.estimator not in COMPILABLE:
            raise ValueError(
                f"compile: estimator {self.estimator} differentiates twice, which compiled graphs cannot; "
                "use estimator sampled or antithetic, or drop compile"
            )
        return self


def preset_names() -> list[str]:
    """Names that `read_preset` knows."""
    files = resources.files("trainer").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def read_preset(name: str) -> dict[str, Any]:
    """Settings of a shipped preset.

    Raises:
        ConfigError: no preset of this name.
    """
    if name not in preset_names():
        raise ConfigError(f"preset: expected one of {', '.join(preset_names())}, found {name!r}")
    return tomllib.loads(resources.files("trainer").joinpath("presets", f"{name}.toml").read_text("utf-8"))


def parse_override(text: str) -> dict[str, Any]:
    """Settings of one `--set NAME=VALUE`: the value as TOML, or else the text itself.

    Examples:
        >>> parse_override("learning_rate=3e-4"), parse_override("device=cuda:1")
        ({'learning_rate': 0.0003}, {'device': 'cuda:1'})

    Raises:
        ConfigError: not of this form.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    parts = name.split(".")
    # ASCII, because TOML has no other letters in bare keys.
    if not equals or not all(part.isidentifier() and part.isascii() for part in parts):
        raise ConfigError(f"--set {shortened(text)}: expected NAME=VALUE, such as --set gradient_clip=1.0")
    try:
        return tomllib.loads(f"{name} = {value}")
    except tomllib.TOMLDecodeError:
        settings: Any = value
        for part in reversed(parts):
            settings = {part: settings}
        return cast(dict[str, Any], settings)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists
        raise ConfigError(f"--set {shortened(text)}: not valid TOML: {error}") from None
