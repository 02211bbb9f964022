"""What float32 means in every pass of an attack, backward ones too."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from datamerge.attacks import APGD, PGD, Precision, arithmetic, gradient_sign, run_attack, squared_error
from datamerge.encoders import load_encoder
from tests.support.recorder import SPEC, note, recording


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("kind", [PGD, APGD])
def test_passes_of_an_attack(precision: Precision, kind: type[PGD] | type[APGD]) -> None:
    if kind is PGD:
        settings: PGD | APGD = PGD(Fraction(8, 255), Fraction(1, 255), 2)
    else:
        settings = APGD(Fraction(8, 255), 2)
    clean, target = torch.full((2, 1, 4, 4), 128 / 255), torch.zeros(2, 6)
    generators = [np.random.default_rng(0), np.random.default_rng(1)]
    with recording() as notes:
        encoder = load_encoder(SPEC).eval()
        notes.clear()  # of its shape
        run_attack(encoder, clean, target, squared_error, settings, generators, precision=precision)
        gradient_sign(encoder, clean, target, squared_error, precision)
        assert all(found.deterministic and found.products == "highest" for found in notes)
        backward = [found for found in notes if found.backward]
        assert len(backward) >= 3
        assert {found.tf32 for found in backward} == {precision == "tf32"}
        assert {found.dtype for found in backward} == {
            torch.bfloat16 if precision == "bfloat16" else torch.float32,
        }
        # The losses that go into the record.
        assert any(found.dtype == torch.float32 and not found.tf32 for found in notes)


def test_products_use_tf32_on_a_gpu_that_is_asked_for_it() -> None:
    found = []
    for device in ("cpu", "cuda"):
        for tf32 in (False, True):
            with recording(), arithmetic(torch.device(device), tf32=tf32):
                found.append(note(False, torch.float32).products)
    assert found == ["highest", "highest", "highest", "high"]


def test_an_error_inside_changes_nothing_outside() -> None:
    with recording(), pytest.raises(KeyError), arithmetic(torch.device("cpu")):
        raise KeyError
