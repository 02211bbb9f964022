"""The arithmetic of every forward and backward pass of an attack."""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import pytest
import torch

from datamerge.attacks import APGD, PGD, Precision, arithmetic, gradient_sign, quotient, run_attack, squared_error
from datamerge.attacks.arithmetic import fixed_order, in_fixed_order
from datamerge.encoders import load_encoder
from tests.support.recorder import SPEC, note, recording


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("kind", [PGD, APGD])
def test_passes_of_an_attack_use_the_precision_that_is_set(
    precision: Precision, kind: type[PGD] | type[APGD]
) -> None:
    if kind is PGD:
        settings: PGD | APGD = PGD(Fraction(8, 255), Fraction(1, 255), 2)
    else:
        settings = APGD(Fraction(8, 255), 2)
    clean, target = torch.full((2, 1, 4, 4), 128 / 255), torch.zeros(2, 6)
    generators = [np.random.default_rng(0), np.random.default_rng(1)]
    with recording() as notes:
        encoder = load_encoder(SPEC).eval()
        notes.clear()  # drops the pass that finds the shape of the embedding
        run_attack(encoder, clean, target, squared_error, settings, generators, precision=precision)
        gradient_sign(encoder, clean, target, squared_error, precision)
        assert all(found.deterministic and found.products == "highest" for found in notes)
        backward = [found for found in notes if found.backward]
        assert len(backward) >= 3
        assert {found.tf32 for found in backward} == {precision == "tf32"}
        assert {found.dtype for found in backward} == {
            torch.bfloat16 if precision == "bfloat16" else torch.float32,
        }
        # The losses that are recorded are computed in float32.
        assert any(found.dtype == torch.float32 and not found.tf32 for found in notes)


def test_products_use_tf32_only_on_gpus_and_if_set() -> None:
    found = []
    for device in ("cpu", "cuda"):
        for tf32 in (False, True):
            with recording(), arithmetic(torch.device(device), tf32=tf32):
                found.append(note(False, torch.float32).products)
    assert found == ["highest", "highest", "highest", "high"]


def test_an_error_inside_restores_the_arithmetic() -> None:
    with recording(), pytest.raises(KeyError), arithmetic(torch.device("cpu")):
        raise KeyError


def _order() -> tuple[bool, bool, bool]:
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), fills


def test_deterministic_kernels_are_required_on_gpus_only() -> None:
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")  # otherwise torch refuses matrix products
    before = _order()
    with fixed_order(torch.device("cpu")):
        assert _order() == before
    with fixed_order(torch.device("cuda")):
        assert _order() == (True, False, False)
    assert _order() == before
    with pytest.raises(KeyError), fixed_order(torch.device("cuda")):
        raise KeyError
    assert _order() == before


def test_a_model_without_deterministic_kernels_runs_with_others() -> None:
    tried = []

    def pooling() -> str:
        tried.append(torch.are_deterministic_algorithms_enabled())
        if tried[-1]:  # torch's message
            raise RuntimeError("max_pool2d_with_indices_backward_cuda does not have a deterministic implementation")
        return "gradient"

    def broken() -> str:
        raise RuntimeError("shapes do not match")

    model, other = (torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()) for _ in range(2))
    assert [in_fixed_order(model, torch.device("cuda"), pooling) for _ in range(2)] == ["gradient"] * 2
    assert tried == [True, False, False]
    # AutoAttack makes a new wrapper for every batch; the wrapped model is remembered.
    wrapped = torch.nn.Sequential(torch.nn.Sequential(model))
    assert in_fixed_order(wrapped, torch.device("cuda"), pooling) == "gradient"
    assert tried[3:] == [False]
    in_fixed_order(other, torch.device("cuda"), lambda: tried.append(torch.are_deterministic_algorithms_enabled()))
    assert tried[4:] == [True]
    with pytest.raises(RuntimeError, match="shapes"):
        in_fixed_order(other, torch.device("cuda"), broken)


def test_quotients_are_rounded_once() -> None:
    levels = torch.arange(256, dtype=torch.float32)
    expected = (np.arange(256) / 255).astype(np.float32)
    assert quotient(levels, 255.0).numpy().tobytes() == expected.tobytes()
