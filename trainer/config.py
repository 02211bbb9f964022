"""Settings of a training run, and the presets that ship with the package."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from console import Settings
from storage_schemas import ConfigError

Arm = Literal["avg", "ind", "mean-only"]
LossName = Literal["auto", "squared_error", "cross_entropy"]
CurvatureName = Literal["gauss_newton", "exact"]


class TrainConfig(Settings):
    """Settings of `datamerge train`; a TOML file holds them under the same names."""

    artifact: str = Field(description="Folder or fsspec URL of the artifact to train on.", min_length=1)
    run: str = Field(description="Local folder of the run: logs, checkpoints and the trained encoder.", min_length=1)
    arm: Arm = Field(
        default="avg",
        description="avg: merged groups with the curvature correction; ind: their stored members one by one; "
        "mean-only: merged groups without the correction.",
    )
    members: int | None = Field(
        default=None,
        ge=1,
        description="For the arm ind: the first so many stored members of each group (all if not set).",
    )
    loss: LossName = Field(
        default="auto",
        description="auto: squared_error if the artifact stores target embeddings, else cross_entropy.",
    )
    loss_scale: float = Field(
        default=1.0,
        description="Factor of the squared error: 1.0 as in the paper's eq. 11, 0.5 as in its Appendix A.",
    )
    curvature: CurvatureName = Field(
        default="gauss_newton", description="Estimate behind the correction; exact is for small models."
    )
    pseudo_labels: int = Field(default=1, ge=1, description="Pseudo-labels drawn per group and step by gauss_newton.")
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
    batch_size: int = Field(default=1, ge=1, description="Groups per optimiser step.")
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
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch (its own choice if not set).")
    log_every: int = Field(default=10, ge=1, description="Steps between two lines of the log.")

    @field_validator("loss_scale")
    @classmethod
    def _known_scale(cls, value: float) -> float:
        if value not in (1.0, 0.5):
            raise ValueError(f"expected 1.0 (the paper's eq. 11) or 0.5 (its Appendix A), found {value}")
        return float(value)

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            found = "none" if self.steps is None else f"steps = {self.steps} and epochs = {self.epochs}"
            raise ValueError(f"expected one of steps and epochs, found {found}; set --steps or --epochs")
        if self.members is not None and self.arm != "ind":
            raise ValueError(f"members: only the arm ind takes single members, found arm {self.arm}; drop members")
        if self.pseudo_labels != 1 and (self.arm != "avg" or self.curvature != "gauss_newton"):
            raise ValueError(
                "pseudo_labels: only the arm avg with curvature gauss_newton draws them, found arm "
                f"{self.arm} with curvature {self.curvature}; drop pseudo_labels"
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
