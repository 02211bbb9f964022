"""Checks for any device: stored arrays and random starts are bit for bit those of NumPy and the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import get_args

import numpy as np
import torch

from datamerge.attacks import APGD, PGD, Ball, draw_starts, sample_generators
from datamerge.attacks.euclidean import EuclideanBall
from merge_service.stored_arrays import factor_array, moment_arrays, on_host
from storage_schemas import ExactMoments, Layout, encode_exact, moment_specs
from storage_schemas.schema.factors import FactorKind, factors
from storage_schemas.schema.manifest import EncodingName

SHAPE = (3, 5, 7)
GROUPS = 3


def assert_stored_arrays_are_numpys(device: str, number: int, counts: Sequence[int] = (1, 2, 5)) -> None:
    """Check moments in both encodings and factors of both kinds, for groups of `number` members."""
    generator = np.random.default_rng(number)
    members = generator.integers(0, 6, (GROUPS, number, *SHAPE)) + generator.integers(0, 251, (GROUPS, 1, *SHAPE))
    members[0, ::2], members[0, 1::2] = 255, 0  # the largest sums and scatter there are
    images = members.astype(np.uint8)
    there = torch.from_numpy(images).to(device)
    for encoding in get_args(EncodingName):
        specs = tuple(moment_specs(encoding, SHAPE, number, 255))
        layout = Layout(format="zarr", encoding=encoding, arrays=specs, groups=GROUPS, groups_per_shard=GROUPS)
        found = {name: array.numpy() for name, array in on_host(moment_arrays(there, layout)).items()}
        for index, group in enumerate(images):
            for name, array in encode_exact(ExactMoments.of(group), layout).items():
                assert found[name].dtype == array.dtype
                assert found[name][index].tobytes() == array.tobytes(), (encoding, name)
    for kind in get_args(FactorKind):
        for count in counts:
            sources = [np.random.default_rng(index) for index in range(GROUPS)]
            stored = on_host({"factors": factor_array(there, count, kind, sources)})["factors"].numpy()
            for index, group in enumerate(images):
                expected = factors(group, count, kind, np.random.default_rng(index))
                assert stored[index].tobytes() == expected.tobytes(), (kind, count)


def assert_starts_are_the_cpus(device: str) -> None:
    """Check random starts: equal 8-bit values on the grid, floats within 1e-6 off it."""
    clean = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, *SHAPE), np.uint8))
    epsilon = Fraction(4, 255)
    for settings in (
        PGD(epsilon, Fraction(1, 255), 1),
        PGD(epsilon, Fraction(1, 255), 1, grid=False),
        APGD(epsilon, 1, grid=False, norm="l2"),
    ):
        l2 = isinstance(settings, APGD)
        starts = []
        for place in ("cpu", device):
            (draws,) = draw_starts(settings, SHAPE, sample_generators(0, "group", 4), pinned=place != "cpu")
            ball = (EuclideanBall if l2 else Ball).around(clean.to(place) / 255, epsilon, settings.grid)
            starts.append(ball.placed(draws, epsilon).cpu())
        ours, theirs = starts
        assert float((ours - ours.round()).abs().max()) == 0 or not settings.grid
        # clean / 255 may differ in the last place off the grid.
        assert torch.allclose(ours, theirs, rtol=0, atol=0 if settings.grid else 1e-6)
