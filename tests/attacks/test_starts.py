"""Random starts drawn ahead of an attack: the same ones, and few bytes on the way to a device."""

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
def test_an_attack_from_draws_is_the_attack_that_draws(settings: PGD | APGD, restarts: int) -> None:
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
    """Notes what else is asked for where a tensor is moved to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[set[type]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.to:
            self.asked.append({type(value) for value in (*args[1:], *(kwargs or {}).values())})
        return function(*args, **(kwargs or {}))


def test_starts_cross_as_they_were_drawn() -> None:
    """A conversion in the same call would happen before the copy, on the CPU."""
    (draws,) = draw_starts(ATTACKS[0], SHAPE, sample_generators(0, "group", 2))
    assert draws.element_size() == 2
    ball = Ball.around(torch.zeros(2, *SHAPE), EPSILON, grid=True)
    with _Moves() as moves:
        ball.placed(draws, EPSILON)
    assert moves.asked == [{torch.device, bool}]


def test_starts_of_a_device() -> None:
    assert_starts_are_the_cpus("cpu")
