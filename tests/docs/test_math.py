"""Statements of docs/math.md that no other test checks: in float64, by enumeration."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.support.exact import exact
from trainer import CrossEntropy


def test_sketches_have_the_covariance_as_expectation_and_the_stated_spread() -> None:
    members = np.random.default_rng(0).normal(size=(7, 4))
    deviations = members - members.mean(axis=0)
    covariance = deviations.T @ deviations / 7
    sketches = np.array(list(product((-1, 1), repeat=7))) @ deviations / np.sqrt(7)
    np.testing.assert_allclose(sketches.T @ sketches / len(sketches), covariance, atol=1e-12)
    weights = np.array([1.0, -2.0, 0.5, 0.3])
    along = np.square(deviations @ weights)
    spread = 2 / 49 * (along.sum() ** 2 - np.square(along).sum())
    assert np.square(sketches @ weights).var() == pytest.approx(spread, rel=1e-12)
    assert spread <= 2 * (weights @ covariance @ weights) ** 2


def test_the_diagonal_keeps_pi_over_2d_of_aligned_attacks() -> None:
    weights = np.random.default_rng(0).normal(size=3 * 224 * 224)
    share = np.square(weights).sum() / np.abs(weights).sum() ** 2
    assert share == pytest.approx(np.pi / (2 * weights.size), rel=0.02)
    assert 1 / share == pytest.approx(96_000, rel=0.02)


def test_constant_labels_leave_the_stated_term_out_of_the_gradient_under_cross_entropy() -> None:
    """The mean over all labels of the estimator's gradient, plus the term in docs/math.md, against `exact`."""
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()
    generator = torch.Generator().manual_seed(0)
    parameters = list(network.parameters())
    for parameter in parameters:
        torch.nn.init.normal_(parameter, generator=generator)
    mean = torch.rand(1, 1, 2, 2, generator=generator, dtype=torch.float64)
    variance = torch.rand(1, 1, 2, 2, generator=generator, dtype=torch.float64)
    target = torch.tensor([0])
    correction = exact(network, mean, variance, target, CrossEntropy()).correction
    assert correction is not None
    expected = torch.autograd.grad(correction.sum(), parameters[:3])

    pixels = mean.clone().requires_grad_()
    outputs = network(pixels)
    probabilities = outputs.softmax(1)[0]
    rows = [torch.autograd.grad(outputs[0, k], pixels, retain_graph=True)[0].flatten() for k in range(3)]
    jacobian = torch.stack(rows)  # a number here: the missing term is in the probabilities
    centred = (jacobian - probabilities.detach() @ jacobian).square() @ variance.flatten()
    left_out = torch.autograd.grad(0.5 * (centred * probabilities).sum(), parameters[:3], retain_graph=True)
    found = [torch.zeros_like(parameter) for parameter in parameters[:3]]
    for label in range(3):
        value = functional.cross_entropy(outputs, torch.tensor([label]))
        (gradient,) = torch.autograd.grad(value, pixels, create_graph=True)
        estimate = 0.5 * (variance * gradient.square()).sum()
        for total, part in zip(found, torch.autograd.grad(estimate, parameters[:3], retain_graph=True), strict=True):
            total += probabilities[label].detach() * part
    for mine, missing, theirs in zip(found, left_out, expected, strict=True):
        torch.testing.assert_close(mine + missing, theirs, rtol=0, atol=1e-12)
    assert max(float(missing.abs().max()) for missing in left_out) > 1e-3
