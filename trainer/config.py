"""Settings of a training run, and the presets that ship with the package."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from datamerge.attacks import Precision
from datamerge.runtime import Settings
from datamerge.runtime.fields import Device, Seed, Threads
from datamerge.runtime.options import Option
from datamerge.runtime.settings import Effect
from storage_schemas import ConfigError, shortened
from storage_schemas.schema.pixel_length import PixelLength
from trainer.arms import ARMS, Arm, ArmName, EstimatorName
from trainer.data.order import SHUFFLE_WINDOW
from trainer.losses import LossName
from trainer.weights import Weighted, weighted

OnOverfit = Literal["warn", "stop", "widen"]
FEW = 3  # steps of an attack that an encoder can learn to mislead


def _arms(able: Callable[[Arm[Any]], bool]) -> str:
    """The arms of a kind, for a message."""
    *names, last = (name for name, arm in ARMS.items() if able(arm))
    return f"arm {', '.join(names)} or {last}" if names else f"arm {last}"


class TrainConfig(Settings):
    """Settings of `datamerge train`; flags and a TOML file have the same names."""

    renamed: ClassVar[Mapping[str, str]] = {
        "precision=bf16": 'precision = "bfloat16"',
        "estimator=jvp": 'estimator = "gauss_newton"',
        "estimator=exact": 'estimator = "antithetic"',
    }

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            ("members",),
            lambda own: ARMS[own.arm].takes_members,
            f"only {_arms(lambda arm: arm.takes_members)} takes stored members, found arm {{settings.arm}}; drop "
            "`{name}`",
        ),
        Effect(
            ("samples", "estimator"),
            lambda own: bool(ARMS[own.arm].estimators),
            f"only {_arms(lambda arm: bool(arm.estimators))} has an estimator and its samples, found arm "
            "{settings.arm}; drop `{name}`",
        ),
        Effect(
            ("deviation",),
            lambda own: ARMS[own.arm].deviates,
            f"only {_arms(lambda arm: arm.deviates)} has one, found arm {{settings.arm}}; drop `{{name}}`",
        ),
        Effect(
            ("loss_scale",),
            lambda own: own.loss in ("auto", "squared_error"),
            "only the squared error is scaled, found {settings.loss}; drop `{name}`",
        ),
        Effect(
            ("clean_weight",),
            lambda own: own.loss != "cross_entropy",
            "the clean term is a distance of embeddings, which cross_entropy trains without; use "
            '`loss="squared_error"` or `loss="cosine"`, or drop `{name}`',
        ),
        Effect(
            ("refine_step_size", "start_noise"),
            lambda own: own.refine_steps > 0,
            "expected refine_steps of 1 or more, found 0; set `refine_steps`, or drop `{name}`",
        ),
        Effect(
            ("on_overfit", "overfit_every"),
            lambda own: 1 <= own.refine_steps <= FEW,
            f"expected refine_steps of 1 to {FEW}, which alone are watched, found {{settings.refine_steps}}; drop "
            "`{name}`",
        ),
        Effect(
            ("on_overfit",),
            lambda own: own.overfit_every != 0,
            "nobody looks, since `overfit_every` is 0; drop one of the two",
        ),
        Effect(
            ("epsilon",),
            lambda own: own.refine_steps > 0 or not ARMS[own.arm].starts_clean,
            "the arm {settings.arm} takes images that nobody attacks; set `refine_steps`, or drop `{name}`",
        ),
        Effect(
            ("eval_every",),
            lambda own: own.eval_artifact is not None,
            "there is nothing to evaluate on; set `eval_artifact`, or drop `{name}`",
        ),
        Effect(
            ("cache_bytes",),
            lambda own: own.cache != "none",
            '`cache="none"` keeps nothing; drop `{name}`, or name a folder as `cache`',
        ),
    )

    artifact: Annotated[str | list[str], Option(argument=True, metavar="ARTIFACT…")] = Field(
        description="Folder or fsspec URL of the artifact to train on, or several; URL=0.7 takes 0.7 of its groups "
        "in each epoch, URL=2 each group twice."
    )
    run: Annotated[str, Option(argument=True)] = Field(
        description="Local folder of the run: logs, checkpoints and the trained encoder.", min_length=1
    )
    arm: ArmName = Field(
        default="avg", description="; ".join(f"{name}: {arm.about}" for name, arm in ARMS.items()) + "."
    )
    members: Annotated[int | None, Option(unset="all")] = Field(
        default=None,
        ge=1,
        description="For the arms ind and random-member: the first so many stored members of each group.",
    )
    loss: Literal["auto", LossName] = Field(
        default="auto",
        description="auto: squared_error if the artifact stores target embeddings, else cross_entropy; cosine is the "
        "angle to those embeddings alone.",
    )
    loss_scale: float = Field(
        default=1.0,
        description="Factor of the squared error: 1.0 as in the paper's eq. 11, 0.5 as in its Appendix A.",
    )
    clean_weight: float = Field(
        default=0.0,
        ge=0,
        description="Adds so many times the squared distance between the embedding of the clean image and its stored "
        "one: more clean accuracy, for three passes more. Needs an artifact merged with "
        '`attack="none"` or `keep_clean=True`.',
    )
    estimator: EstimatorName = Field(
        default="gauss_newton",
        description="For the arm avg: gauss_newton is the paper's, sampled and antithetic draw deviations instead of "
        "labels; for the arm factors sampled is the default.",
    )
    samples: int = Field(
        default=1, ge=1, description="Pseudo-labels (or deviations) drawn per group and step by the estimator."
    )
    deviation: float = Field(
        default=1.0,
        gt=0,
        le=10,
        description="For the arm factors: multiplies the deviation from the mean; above 1 for more robustness at the "
        "price of clean accuracy.",
    )
    refine_steps: Annotated[int, Option(alias="--refine")] = Field(
        default=0,
        ge=0,
        le=100,
        description="Steps of PGD against the encoder as it is, from the stored image, before that is trained on. "
        'Needs an artifact merged with `attack="none"` or `keep_clean=True`.',
    )
    refine_step_size: Annotated[PixelLength | None, Option(unset="2 epsilon / refine_steps")] = Field(
        default=None, description="Length of such a step."
    )
    start_noise: Annotated[PixelLength | None, Option(unset="epsilon for the arm clean, 0 for others")] = Field(
        default=None,
        description="Radius of uniform noise that is added before such steps; above epsilon nothing is projected "
        "onto the ball, as in N-FGSM.",
    )
    on_overfit: OnOverfit = Field(
        default="warn",
        description="Where `refine_steps` of 1 to 3 lose their meaning (catastrophic overfitting): warn; stop with "
        "an error; or widen their noise to twice epsilon and go on, as N-FGSM.",
    )
    overfit_every: Annotated[int | None, Option(unset="100, or more for small batches")] = Field(
        default=None,
        ge=0,
        description="Steps between two looks for that, which compare the loss of 32 groups under PGD with that under "
        "the run's own attack; 0: none.",
    )
    encoder: Annotated[str | None, Option(metavar="SPEC|RUN", unset="the artifact's")] = Field(
        default=None,
        description="Encoder to start from, such as timm:resnet18, or the folder of a finished training run.",
    )
    image_size: Annotated[int | None, Option(unset="the model's own")] = Field(
        default=None, ge=1, description="Side of the input of `encoder` in pixels."
    )
    head: Annotated[str | None, Option(metavar="FILE|SPEC|RUN", unset="the artifact's, or none")] = Field(
        default=None,
        description="Frozen class head for cross_entropy: a .safetensors file, a timm:, open_clip: or hf: spec, or "
        "the folder of a finished training run for that of what it started from; without one the encoder's outputs "
        "are logits.",
    )
    steps: int | None = Field(
        default=None, ge=1, description="Length of the run in optimiser steps; or set `epochs`."
    )
    epochs: int | None = Field(
        default=None, ge=1, description="Length of the run in passes over the artifact; or set `steps`."
    )
    batch_size: int = Field(
        default=1, ge=1, description="Groups (not images) per optimiser step, over all processes and micro-batches."
    )
    shuffle_window: Annotated[int | Literal["all"], Option(metavar="GROUPS|all")] = Field(
        default=SHUFFLE_WINDOW,
        description="Groups that are shuffled together, about; a run reads the shards of so many at a time. 1 takes "
        "shard after shard, in random order.",
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        description="Micro-batches that each process cuts its share of a batch into; saves memory, changes no result "
        "beyond rounding.",
    )
    learning_rate: Annotated[float, Option(alias="--lr")] = Field(
        default=1e-5,
        gt=0,
        le=10,
        description="Peak learning rate of AdamW, reached after the warm-up.",
    )
    weight_decay: float = Field(default=1e-4, ge=0, le=10, description="AdamW's decoupled decay.")
    warmup_steps: Annotated[int, Option(alias="--warmup")] = Field(
        default=0, ge=0, description="Steps of linear warm-up before the cosine decay to 0."
    )
    gradient_clip: Annotated[float | None, Option(alias="--clip", unset="none")] = Field(
        default=None, gt=0, description="Largest allowed norm of the gradient."
    )
    ema: Annotated[float | None, Option(unset="none")] = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of an exponential moving average of the weights, such as 0.999; the average is then what "
        "is evaluated and published.",
    )
    freeze: Annotated[list[str], Option(metavar="PATTERN[,…]")] = Field(
        default_factory=list,
        description="Patterns (* and ?) of parameter names that keep their values, such as transformer.resblocks.0.*",
    )
    precision: Precision = Field(
        default="float32",
        description="tf32 lets a GPU round the factors of products to 10 bits; bfloat16 runs the encoder, except for "
        "its first layer, under autocast; weights, moments, losses and corrections stay float32.",
    )
    compile: bool = Field(
        default=False, description="torch.compile the encoder, and the gradients that an estimator takes."
    )
    grad_checkpointing: bool = Field(
        default=False,
        description="Compute activations again in the backward pass instead of keeping them: less memory, slower "
        "steps, the same result; for estimators without a double backward.",
    )
    eval_artifact: Annotated[str | None, Option(metavar="ARTIFACT")] = Field(
        default=None,
        description="Held-out artifact: the loss that is trained on, refined images and all, is measured on it, "
        "logged, and picks the checkpoint that is kept as best.",
    )
    eval_every: int = Field(default=500, ge=1, description="Steps between two evaluations on `eval_artifact`.")
    epsilon: Annotated[PixelLength | None, Option(unset="that of the stored attacks")] = Field(
        default=None,
        description="Radius of the `refine_steps` from a clean image; where stored attacks are trained on, those of "
        "another radius are refused.",
    )
    seed: Seed = 0
    device: Device = "auto"
    checkpoint_every: int = Field(default=500, ge=1, description="Steps between two checkpoints.")
    keep_checkpoints: int = Field(
        default=2, ge=1, description="Newest checkpoints that are kept; older ones are removed."
    )
    data_workers: int = Field(
        default=0, ge=0, description="Processes that read ahead; 0 reads ahead in a thread of the training process."
    )
    cache: Annotated[str | None, Option(metavar="DIR|none", unset="a folder of your cache directory")] = Field(
        default=None,
        min_length=1,
        description="Local folder for copies of what is read of a remote artifact, which several runs may share; "
        "none: keep nothing.",
    )
    cache_bytes: Annotated[ByteSize | None, Option(unset="100GB, or 80 % of what the disk has")] = Field(
        default=None,
        ge=1,
        description="What the cache may hold: bytes, or a size such as 200GB or 1.5TiB.",
    )
    threads: Threads = None
    ray_workers: Annotated[int | None, Option(unset="no Ray, or 1 if there is a `ray_address`")] = Field(
        default=None, ge=1, description="Train on this many Ray workers; all are started again when one dies."
    )
    ray_address: Annotated[str | None, Option(metavar="ADDRESS", unset="Ray starts on this machine")] = Field(
        default=None, description="Ray cluster of the `ray_workers`: auto or HOST:PORT."
    )
    log_every: int = Field(default=10, ge=1, description="Steps between two lines of the log.")
    wandb_project: Annotated[str | None, Option(metavar="NAME", unset="none")] = Field(
        default=None, min_length=1, description="Weights & Biases project that gets the same numbers as the log."
    )

    @field_validator("artifact", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> str | list[str]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(
                f"expected the folder or URL of an artifact, or a list of them, found {shortened(value)}"
            )
        for text in texts:
            weighted(text)
        return texts[0] if len(texts) == 1 else list(texts)

    @field_validator("shuffle_window", mode="before")
    @classmethod
    def _window(cls, value: Any) -> int | str:
        number = int(value) if isinstance(value, str) and value.isdecimal() and value.isascii() else value
        if number == "all" or (isinstance(number, int) and not isinstance(number, bool) and number >= 1):
            return number
        raise ValueError(f"expected a number of groups of 1 or more, or all, found {shortened(value)}")

    @field_validator("loss_scale")
    @classmethod
    def _known_scale(cls, value: float) -> float:
        if value not in (1.0, 0.5):
            raise ValueError(f"expected 1.0 (the paper's eq. 11) or 0.5 (its Appendix A), found {value}")
        return float(value)

    @model_validator(mode="before")
    @classmethod
    def _default_estimator(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("estimator") is not None:
            return values
        named = [arm for name, arm in ARMS.items() if name == values.get("arm")]
        return {**values, "estimator": next(iter(named[0].estimators))} if named and named[0].estimators else values

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            found = "none" if self.steps is None else f"steps = {self.steps} and epochs = {self.epochs}"
            raise ValueError(
                f"steps: expected a length in either steps or epochs, found {found}; set `steps` or `epochs`"
            )
        self._check_arm(ARMS[self.arm])
        if self.image_size is not None and self.encoder is None:
            raise ValueError(
                "image_size: the artifact's encoder has the size of its pixels; set `encoder` too, or drop "
                "`image_size`"
            )
        if self.refine_step_size is not None and not self.refine_step_size:
            raise ValueError("refine_step_size: expected more than 0, found 0; drop `refine_step_size`")
        if self.epsilon is not None and not self.epsilon:
            raise ValueError("epsilon: expected more than 0, found 0; drop `epsilon`")
        if ARMS[self.arm].starts_clean and self.start_noise == 0 and self.loss != "cross_entropy":
            raise ValueError(
                "start_noise: the distance to the clean embedding has no slope at the clean image, where the steps "
                "would start and, before the encoder has moved, stay; drop `start_noise`"
            )
        return self

    @property
    def artifacts(self) -> list[Weighted]:
        """The artifacts with their weights."""
        return [weighted(text) for text in ([self.artifact] if isinstance(self.artifact, str) else self.artifact)]

    def _check_arm(self, arm: Arm[Any]) -> None:
        """Refuse what the arm cannot be combined with."""
        if arm.estimators and self.estimator not in arm.estimators:
            raise ValueError(
                f"estimator: the arm {self.arm} has {', '.join(arm.estimators)}, found {self.estimator}; "
                "drop `estimator`"
            )
        if self.loss == "cosine" and arm.estimators and arm.estimators[self.estimator].curvature:
            raise ValueError(
                f"loss: estimator {self.estimator} takes the curvature of a likelihood, and cosine is none; use "
                '`estimator="sampled"` or another `arm`, or another `loss`'
            )
        if self.refine_steps and not arm.refines(self.estimator, self.samples):
            estimate = f" with estimator {self.estimator} and samples {self.samples}" if arm.estimators else ""
            able = _arms(lambda other: other.images is not None)
            raise ValueError(
                f"refine_steps: refines one image a group or its members, found arm {self.arm}{estimate}; use {able} "
                "with the default `estimator` and `samples`, or drop `refine_steps`"
            )
        if arm.estimators and arm.estimators[self.estimator].twice:
            self._check_single_backward()

    def _check_single_backward(self) -> None:
        """Refuse what needs an estimator that differentiates once."""
        once = 'use `estimator="sampled"` or `estimator="antithetic"`, or drop'
        if self.grad_checkpointing:
            raise ValueError(
                f"grad_checkpointing: estimator {self.estimator} differentiates twice, which keeps the activations "
                f"that are computed again; {once} `grad_checkpointing`"
            )


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
