"""The arms of training: what each reads of a group, its loss and its cost. `ARMS` defines them completely.

Shapes: B groups, M images of all groups of a batch, C H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from trainer.data.batches import (
    Batch,
    FactorBatch,
    ImageBatch,
    MomentBatch,
    Read,
    cleans,
    factors,
    means,
    members,
    moments,
)
from trainer.data.noise import Draws
from trainer.estimators import (
    AROUND_MEAN,
    GroupLoss,
    Model,
    along_factors,
    deviation_along,
    individual_loss,
    mean_only,
)
from trainer.losses import Loss

if TYPE_CHECKING:
    from trainer.config import TrainConfig

ArmName = Literal["avg", "clean", "factors", "ind", "mean-only", "random-member"]
EstimatorName = Literal["gauss_newton", "sampled", "antithetic"]
CleanName = Literal["clean", "mean"]
B = TypeVar("B", bound=Batch)
B_in = TypeVar("B_in", bound=Batch, contravariant=True)


class ArmLoss(Protocol[B_in]):
    """The loss of each group of a batch."""

    def __call__(self, model: Model, batch: B_in, loss: Loss, draws: Draws, config: TrainConfig, /) -> GroupLoss: ...


class ArmImages(Protocol[B_in]):
    """The single images that a step trains on, one or more per group."""

    def __call__(self, batch: B_in, draws: Draws, config: TrainConfig, /) -> ImageBatch: ...


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Properties of an estimator in an arm.

    Attributes:
        plain_steps: cost by counting passes, in training steps on one image per group; a function of `samples`.
        twice: whether it differentiates twice, so that `grad_checkpointing` saves no memory.
        curvature: whether it needs the curvature of the loss, and so a `Likelihood`.
        one_image: whether with one sample it is the loss at one image per group, which can be refined.
        held_out: name of the estimator for held-out groups, with the same expectation and at most the same noise.
        out_of_memory: advice for messages when a step needs too much memory.
    """

    plain_steps: Callable[[int], int]
    twice: bool = False
    curvature: bool = False
    one_image: bool = False
    held_out: EstimatorName
    out_of_memory: str = ""


@dataclass(frozen=True, kw_only=True)
class Arm(Generic[B]):
    """Definition of an arm.

    Attributes:
        title: last part of the paper's name for it: Avg in AT-N-Avg.
        about: description for the help text.
        arrays: names of the stored arrays that it reads besides the target, in both encodings.
        batch: converts records to a batch.
        loss: computes the loss for training and for held-out groups.
        estimators: estimators that it offers by name, the default first; empty if it estimates nothing.
        images: gives the single images that a step trains on and can refine; None if it trains on moments.
        choose: (64 random bits, number of usable members) → the members to read; None if it reads no members.
        every_member: whether a step takes all stored members of a group, at one plain step each.
        deviates: whether it takes the setting `deviation`.
        starts_clean: whether it trains on clean images, without stored attacks.
        out_of_memory: advice for messages when a step needs too much memory.
    """

    title: str
    about: str
    arrays: frozenset[str]
    batch: Callable[[Read], B]
    loss: ArmLoss[B]
    estimators: Mapping[str, Estimate] = field(default_factory=dict)
    images: ArmImages[B] | None = None
    choose: Callable[[int, int], slice] | None = None
    every_member: bool = False
    deviates: bool = False
    starts_clean: bool = False
    out_of_memory: str = ""

    @property
    def takes_members(self) -> bool:
        """Whether the arm reads stored members, and so takes the setting `members`."""
        return "members" in self.arrays

    def name(self, members: int | None, refine_steps: int = 0) -> str:
        """The paper's name for the arm, such as AT-10-Avg; `members` is the group size, None if it varies."""
        name = f"AT-{members}-{self.title}" if members and not self.starts_clean else f"AT-{self.title}"
        return f"{name}, {refine_steps} step{'s' * (refine_steps > 1)}" if refine_steps else name

    def refines(self, estimator: str, samples: int) -> bool:
        """Whether a step trains on single images, which PGD steps can refine first."""
        if self.images is None:
            return False
        return not self.estimators or (self.estimators[estimator].one_image and samples == 1)

    def memory_advice(self, estimator: str) -> list[str]:
        """Settings that lower the memory of a step, as parts of a sentence."""
        parts = [self.out_of_memory]
        if self.estimators:
            parts.append(self.estimators[estimator].out_of_memory)
        return [advice for advice in parts if advice]

    def forward_passes(
        self,
        estimator: str | None = None,
        *,
        samples: int = 1,
        members: int = 1,
        refine_steps: int = 0,
        clean_term: bool = False,
    ) -> float:
        """Cost of a step per group, in forward passes.

        A backward pass counts as two forward passes, a backward pass to the pixels alone as one.

        Args:
            estimator: name of the estimator; None for the arm's default.
            samples: draws of the estimator per group.
            members: members per group.
            refine_steps: PGD steps before the update.
            clean_term: whether the loss has a clean term (`clean_weight`).
        """
        images = members if self.every_member else 1
        plain_steps = images
        if self.estimators:
            plain_steps = self.estimators[estimator or next(iter(self.estimators))].plain_steps(samples)
        return 3.0 * (plain_steps + clean_term) + 2.0 * refine_steps * images


def _around_mean(model: Model, batch: MomentBatch, loss: Loss, draws: Draws, config: TrainConfig) -> GroupLoss:
    estimate = AROUND_MEAN[config.estimator]
    return estimate(model, batch.mean, batch.variance, batch.target, loss, draws, samples=config.samples)


def _along_factors(model: Model, batch: FactorBatch, loss: Loss, draws: Draws, config: TrainConfig) -> GroupLoss:
    return along_factors(
        model,
        batch.mean,
        batch.factors,
        batch.target,
        loss,
        draws,
        estimator=config.estimator,
        samples=config.samples,
        deviation=config.deviation,
    )


def _at_mean(model: Model, batch: ImageBatch, loss: Loss, draws: Draws, config: TrainConfig) -> GroupLoss:
    return mean_only(model, batch.images, None, batch.target, loss)


def at_images(model: Model, batch: ImageBatch, loss: Loss, draws: Draws, config: TrainConfig) -> GroupLoss:
    """The mean loss of each group's images."""
    return individual_loss(model, batch.images, batch.counts, batch.target, loss)


def _the_images(batch: ImageBatch, draws: Draws, config: TrainConfig) -> ImageBatch:
    return batch


def _point_along_factors(batch: FactorBatch, draws: Draws, config: TrainConfig) -> ImageBatch:
    return ImageBatch.one_a_group(batch, batch.mean + deviation_along(batch.factors, draws, config.deviation))


def _clean_images(batch: Batch, draws: Draws, config: TrainConfig) -> ImageBatch:
    if batch.clean is None:
        raise ValueError(f"expected clean images in the batch of {batch.keys[0]}, found none")
    return ImageBatch.one_a_group(batch, batch.clean)


def _at_clean(model: Model, batch: Batch, loss: Loss, draws: Draws, config: TrainConfig) -> GroupLoss:
    return at_images(model, _clean_images(batch, draws, config), loss, draws, config)


_PLAIN = '`estimator="sampled"`, '
_PAIR = Estimate(
    plain_steps=lambda samples: 2 * samples,
    held_out="antithetic",
    out_of_memory=f"{_PLAIN}which takes half the images",
)
ARMS: dict[ArmName, Arm[Any]] = {
    "avg": Arm(
        title="Avg",
        about="merged groups with the curvature correction",
        arrays=frozenset({"sum", "scatter", "mean", "mean_square"}),
        batch=moments,
        loss=_around_mean,
        estimators={
            "gauss_newton": Estimate(
                plain_steps=lambda samples: 1 + samples,
                twice=True,
                curvature=True,
                held_out="gauss_newton",
                out_of_memory=f"{_PLAIN}which needs no double backward",
            ),
            "sampled": Estimate(plain_steps=lambda samples: samples, held_out="antithetic"),
            "antithetic": _PAIR,
        },
    ),
    "clean": Arm(
        title="Clean",
        about="the clean images, attacked by `refine_steps` against the current encoder (FARE with 10 steps)",
        arrays=frozenset(),
        batch=cleans,
        loss=_at_clean,
        images=_clean_images,
        starts_clean=True,
    ),
    "factors": Arm(
        title="Factors",
        about="merged groups, at random points along the stored factors of their covariance",
        arrays=frozenset({"sum", "mean", "factors"}),
        batch=factors,
        loss=_along_factors,
        estimators={
            "sampled": Estimate(plain_steps=lambda samples: samples, one_image=True, held_out="antithetic"),
            "antithetic": _PAIR,
            "gauss_newton": Estimate(
                plain_steps=lambda samples: 1 + samples,
                curvature=True,
                held_out="gauss_newton",
                out_of_memory=f"{_PLAIN}which takes fewer images",
            ),
        },
        images=_point_along_factors,
        deviates=True,
    ),
    "ind": Arm(
        title="Ind",
        about="all stored members of each group",
        arrays=frozenset({"members"}),
        batch=members,
        choose=lambda word, count: slice(0, count),
        loss=at_images,
        images=_the_images,
        every_member=True,
        out_of_memory="fewer `members`",
    ),
    "mean-only": Arm(
        title="Mean",
        about="merged groups without the correction",
        arrays=frozenset({"sum", "mean"}),
        batch=means,
        loss=_at_mean,
        images=_the_images,
    ),
    "random-member": Arm(
        title="Random",
        about="one stored member of each group, drawn at random in every step",
        arrays=frozenset({"members"}),
        batch=members,
        choose=lambda word, count: slice(word % count, word % count + 1),
        loss=at_images,
        images=_the_images,
    ),
}
