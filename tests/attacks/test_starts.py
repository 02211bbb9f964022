"""Random starts drawn before an attack equal those drawn by it, and are copied to a device as few bytes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from datamerge.attacks import APGD, PGD, Ball, draw_starts, run_attack, sample_generators, squared_error
from datamerge.encoders import load_encoder
from tests.support.on_device import assert_starts_are_the_cpus

EPSILON = Fraction(8, 255)
SHAPE = (3, 4, 4)
ATTACKS: list[PGD | APGD] = [
    PGD(EPSILON, Fraction(1, 255), 2),
    PGD(EPSILON, Fraction(1, 255), 2, grid=False, start_radius=Fraction(1, 255)),
    APGD(EPSILON, 3),
    APGD(EPSILON, 3, grid=False, norm="l2"),
    PGD(EPSILON, Fraction(1, 255), 2, random_start=False),
]


@pytest.mark.parametrize("settings", ATTACKS, ids=str)
@pytest.mark.parametrize("restarts", [1, 3])
def test_starts_drawn_before_an_attack_give_the_same_result(settings: PGD | APGD, restarts: int) -> None:
    encoder = load_encoder("mlp:3x4x4-8-5").eval()
    clean = torch.arange(96).reshape(2, *SHAPE) / 255
    target = torch.zeros(2, 5)

    def once(**more: Any) -> list[Tensor]:
        generators = [] if more else sample_generators(3, "group", 2)
        found = run_attack(encoder, clean, target, squared_error, settings, generators, restarts=restarts, **more)
        return [found.pixels, found.start_loss, found.loss]

    draws = draw_starts(settings, SHAPE, sample_generators(3, "group", 2), restarts=restarts)
    assert len(draws) == (restarts if settings.random_start else 0)
    for drawn, itself in zip(once(draws=draws), once(), strict=True):
        assert torch.equal(drawn, itself)


class _Moves(TorchFunctionMode):
    """Records the types of the arguments of each `Tensor.to`."""

    def __init__(self) -> None:
        super().__init__()
        self.argument_types: list[set[type]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.to:
            self.argument_types.append({type(value) for value in (*args[1:], *(kwargs or {}).values())})
        return function(*args, **(kwargs or {}))


def test_starts_are_copied_to_a_device_without_conversion() -> None:
    """A conversion in the same call would come before the copy, on the CPU."""
    (draws,) = draw_starts(ATTACKS[0], SHAPE, sample_generators(0, "group", 2))
    assert draws.element_size() == 2
    ball = Ball.around(torch.zeros(2, *SHAPE), EPSILON, grid=True)
    with _Moves() as moves:
        ball.placed(draws, EPSILON)
    assert moves.argument_types == [{torch.device, bool}]


def test_starts_on_a_device_equal_the_cpus() -> None:
    assert_starts_are_the_cpus("cpu")
