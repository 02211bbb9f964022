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
FEW = 3  # an encoder can learn to defeat attacks of up to this many steps (catastrophic overfitting)


def _arms(able: Callable[[Arm[Any]], bool]) -> str:
    """Names of the arms for which `able` holds, for a message."""
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
            f"only {_arms(lambda arm: arm.deviates)} has a deviation, found arm {{settings.arm}}; drop `{{name}}`",
        ),
        Effect(
            ("loss_scale",),
            lambda own: own.loss in ("auto", "squared_error"),
            "only the squared error is scaled, found {settings.loss}; drop `{name}`",
        ),
        Effect(
            ("clean_weight",),
            lambda own: own.loss != "cross_entropy",
            "the clean term is a distance between embeddings, which cross_entropy does not use; set "
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
            f"only runs with refine_steps of 1 to {FEW} are watched, found {{settings.refine_steps}}; drop "
            "`{name}`",
        ),
        Effect(
            ("on_overfit",),
            lambda own: own.overfit_every != 0,
            "`overfit_every` is 0, so overfitting is never checked; drop one of the two",
        ),
        Effect(
            ("epsilon",),
            lambda own: own.refine_steps > 0 or not ARMS[own.arm].starts_clean,
            "arm {settings.arm} without `refine_steps` attacks nothing; set `refine_steps`, or drop `{name}`",
        ),
        Effect(
            ("eval_every",),
            lambda own: own.eval_artifact is not None,
            "there is nothing to evaluate on; set `eval_artifact`, or drop `{name}`",
        ),
        Effect(
            ("cache_bytes",),
            lambda own: own.cache != "none",
            '`cache="none"` keeps nothing; drop `{name}`, or set `cache` to a folder',
        ),
    )

    artifact: Annotated[str | list[str], Option(argument=True, metavar="ARTIFACT…")] = Field(
        description="Folder or fsspec URL of the artifact to train on, or several; URL=0.7 takes 70 % of its groups "
        "in each epoch, URL=2 takes each group twice."
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
        description="For the arms ind and random-member: use only the first members of each group, this many.",
    )
    loss: Literal["auto", LossName] = Field(
        default="auto",
        description="auto: squared_error if the artifact stores target embeddings, else cross_entropy; cosine "
        "compares only the directions of embeddings, not their lengths.",
    )
    loss_scale: float = Field(
        default=1.0,
        description="Factor of the squared error: 1.0 (the paper's eq. 11) or 0.5 (its Appendix A).",
    )
    clean_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of a clean term in the loss: the squared distance between the clean image's embedding "
        "and the stored target. Raises clean accuracy and costs three more passes per group. Needs an artifact "
        'merged with `attack="none"` or `keep_clean=True`.',
    )
    estimator: EstimatorName = Field(
        default="gauss_newton",
        description="Estimator of a group's mean loss, for the arms avg and factors: gauss_newton is the paper's; "
        "sampled and antithetic draw images around the mean. The default of the arm factors is sampled.",
    )
    samples: int = Field(
        default=1, ge=1, description="Pseudo-labels (arm avg, gauss_newton) or deviations drawn per group and step."
    )
    deviation: float = Field(
        default=1.0,
        gt=0,
        le=10,
        description="For the arm factors: factor of the deviation from the mean; values above 1 trade clean accuracy "
        "for robustness.",
    )
    refine_steps: Annotated[int, Option(alias="--refine")] = Field(
        default=0,
        ge=0,
        le=100,
        description="PGD steps against the current encoder, from each stored image, before the encoder is trained on "
        'it. Needs an artifact merged with `attack="none"` or `keep_clean=True`.',
    )
    refine_step_size: Annotated[PixelLength | None, Option(unset="2 epsilon / refine_steps")] = Field(
        default=None, description="Length of one of the `refine_steps`."
    )
    start_noise: Annotated[PixelLength | None, Option(unset="epsilon for the arm clean, 0 for others")] = Field(
        default=None,
        description="Radius of the uniform noise added before the `refine_steps`; above epsilon the steps are not "
        "projected onto the ball, as in N-FGSM.",
    )
    on_overfit: OnOverfit = Field(
        default="warn",
        description="What to do on catastrophic overfitting, which can happen with 1 to 3 `refine_steps`: warn; stop "
        "with an error; or widen `start_noise` to twice epsilon, as in N-FGSM, and continue.",
    )
    overfit_every: Annotated[int | None, Option(unset="100, or more for small batches")] = Field(
        default=None,
        ge=0,
        description="Optimiser steps between two checks for overfitting, which compare the loss of 32 groups under "
        "PGD with the loss under the run's own attack; 0 never checks.",
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
        "the folder of a finished training run, for the head of the encoder it started from. Without a head the "
        "encoder's outputs are the logits.",
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
        description="Approximate number of groups that are shuffled together, and whose shards are read together. 1 "
        "takes shard after shard, in random order.",
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        description="Micro-batches that each process cuts its share of a batch into; more need less memory and "
        "change results by rounding only.",
    )
    learning_rate: Annotated[float, Option(alias="--lr")] = Field(
        default=1e-5,
        gt=0,
        le=10,
        description="Peak learning rate of AdamW, reached after the warm-up.",
    )
    weight_decay: float = Field(default=1e-4, ge=0, le=10, description="Decoupled weight decay of AdamW.")
    warmup_steps: Annotated[int, Option(alias="--warmup")] = Field(
        default=0, ge=0, description="Steps of linear warm-up before the cosine decay to 0."
    )
    gradient_clip: Annotated[float | None, Option(alias="--clip", unset="none")] = Field(
        default=None, gt=0, description="Gradients with a larger norm are scaled down to this norm."
    )
    ema: Annotated[float | None, Option(unset="none")] = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of an exponential moving average of the weights, such as 0.999; the average is then "
        "evaluated and published.",
    )
    freeze: Annotated[list[str], Option(metavar="PATTERN[,…]")] = Field(
        default_factory=list,
        description="Patterns (with * and ?) of the names of parameters to freeze, such as transformer.resblocks.0.*",
    )
    precision: Precision = Field(
        default="float32",
        description="tf32 rounds the factors of matrix products to 10 bits on a GPU; bfloat16 runs all but the first "
        "layer of the encoder under autocast. Weights, moments, losses and corrections stay float32.",
    )
    compile: bool = Field(
        default=False, description="Compile the encoder and the estimator's input gradients with torch.compile."
    )
    grad_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass instead of storing them: less memory, slower steps, "
        "the same result. Only for estimators without a double backward.",
    )
    eval_artifact: Annotated[str | None, Option(metavar="ARTIFACT")] = Field(
        default=None,
        description="Held-out artifact. The training loss, including refinement, is measured on it and logged; the "
        "state with the lowest value is kept as best.pt.",
    )
    eval_every: int = Field(default=500, ge=1, description="Steps between two evaluations on `eval_artifact`.")
    epsilon: Annotated[PixelLength | None, Option(unset="that of the stored attacks")] = Field(
        default=None,
        description="Radius of `refine_steps` that start from a clean image. Artifacts whose stored attacks have "
        "another radius are refused.",
    )
    seed: Seed = 0
    device: Device = "auto"
    checkpoint_every: int = Field(default=500, ge=1, description="Steps between two checkpoints.")
    keep_checkpoints: int = Field(
        default=2, ge=1, description="Number of checkpoints to keep; older ones are removed."
    )
    data_workers: int = Field(
        default=0, ge=0, description="Processes that read ahead; 0 reads ahead in a thread of the training process."
    )
    cache: Annotated[str | None, Option(metavar="DIR|none", unset="a folder of your cache directory")] = Field(
        default=None,
        min_length=1,
        description="Local folder that caches what is read from remote artifacts; several runs may share it. none "
        "caches nothing.",
    )
    cache_bytes: Annotated[ByteSize | None, Option(unset="100GB, or 80 % of what the disk has")] = Field(
        default=None,
        ge=1,
        description="Maximum size of the cache: bytes, or a size such as 200GB or 1.5TiB.",
    )
    threads: Threads = None
    ray_workers: Annotated[int | None, Option(unset="no Ray, or 1 if there is a `ray_address`")] = Field(
        default=None, ge=1, description="Train on this many Ray workers; all of them restart when one dies."
    )
    ray_address: Annotated[str | None, Option(metavar="ADDRESS", unset="Ray starts on this machine")] = Field(
        default=None, description="Address of the Ray cluster with the `ray_workers`: auto or HOST:PORT."
    )
    log_every: int = Field(default=10, ge=1, description="Steps between two lines of the log.")
    wandb_project: Annotated[str | None, Option(metavar="NAME", unset="none")] = Field(
        default=None, min_length=1, description="Weights & Biases project that receives the numbers of the log."
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
                f"steps: expected the run's length in either steps or epochs, found {found}; set `steps` or `epochs`"
            )
        self._check_arm(ARMS[self.arm])
        if self.image_size is not None and self.encoder is None:
            raise ValueError(
                "image_size: the artifact fixes the input size of its own encoder; set `encoder` too, or drop "
                "`image_size`"
            )
        if self.refine_step_size is not None and not self.refine_step_size:
            raise ValueError("refine_step_size: expected more than 0, found 0; drop `refine_step_size`")
        if self.epsilon is not None and not self.epsilon:
            raise ValueError("epsilon: expected more than 0, found 0; drop `epsilon`")
        if ARMS[self.arm].starts_clean and self.start_noise == 0 and self.loss != "cross_entropy":
            raise ValueError(
                "start_noise: expected more than 0, found 0: the distance to the clean embedding has gradient 0 at "
                "the clean image, so steps that start there do not move at first; drop `start_noise`"
            )
        return self

    @property
    def artifacts(self) -> list[Weighted]:
        """The artifacts with their weights."""
        return [weighted(text) for text in ([self.artifact] if isinstance(self.artifact, str) else self.artifact)]

    def _check_arm(self, arm: Arm[Any]) -> None:
        """Refuse settings that the arm cannot be combined with."""
        if arm.estimators and self.estimator not in arm.estimators:
            raise ValueError(
                f"estimator: arm {self.arm} expects {', '.join(arm.estimators)}, found {self.estimator}; "
                "drop `estimator`"
            )
        if self.loss == "cosine" and arm.estimators and arm.estimators[self.estimator].curvature:
            raise ValueError(
                f"loss: estimator {self.estimator} needs the negative log-likelihood of a density, found cosine, "
                'which is none; use `estimator="sampled"`, another `arm` or another `loss`'
            )
        if self.refine_steps and not arm.refines(self.estimator, self.samples):
            estimate = f" with estimator {self.estimator} and samples {self.samples}" if arm.estimators else ""
            able = _arms(lambda other: other.images is not None)
            raise ValueError(
                f"refine_steps: expected an arm that trains on single images, found arm {self.arm}{estimate}; use "
                f"{able} with the default `estimator` and `samples`, or drop `refine_steps`"
            )
        if arm.estimators and arm.estimators[self.estimator].twice:
            self._check_single_backward()

    def _check_single_backward(self) -> None:
        """Refuse settings that need an estimator without a double backward."""
        once = 'use `estimator="sampled"` or `estimator="antithetic"`, or drop'
        if self.grad_checkpointing:
            raise ValueError(
                f"grad_checkpointing: estimator {self.estimator} differentiates twice, which keeps the recomputed "
                f"activations, so no memory is saved; {once} `grad_checkpointing`"
            )


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    files = resources.files("trainer").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def read_preset(name: str) -> dict[str, Any]:
    """Settings of a shipped preset.

    Raises:
        ConfigError: no preset has this name.
    """
    if name not in preset_names():
        raise ConfigError(f"preset: expected one of {', '.join(preset_names())}, found {name!r}")
    return tomllib.loads(resources.files("trainer").joinpath("presets", f"{name}.toml").read_text("utf-8"))
