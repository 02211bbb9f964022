"""The planning model: it finds the coefficients that made the points, and says how far off it is elsewhere."""

from __future__ import annotations

import pytest

from benchmarks.planning import Model, Plan, Planned, Point, Size, findings, sizes

TRUE = Model((0.05, 0.02, 0.003), (2e4, 1e5, 3e4))


def points(scale: int = 1) -> tuple[list[Point], Point]:
    def point(size: Size) -> Point:
        return Point(size, TRUE.seconds(size), TRUE.bytes(size))

    small, large = sizes(scale)
    return [point(size) for size in small], point(large)


@pytest.mark.parametrize("scale", [1, 16])
def test_fit_recovers_the_coefficients(scale: int) -> None:
    small, large = points(scale)
    model = Model.fit(small)
    assert model.time == pytest.approx(TRUE.time)
    assert model.volume == pytest.approx(TRUE.volume)
    assert model.errors(large) == pytest.approx((0, 0), abs=1e-9)


def test_the_held_out_size_is_larger_than_all_others() -> None:
    small, large = sizes(1)
    assert large not in small
    for term in range(3):
        assert large.time_terms()[term] >= max(size.time_terms()[term] for size in small) or term == 0


def test_errors_are_relative_to_what_was_measured() -> None:
    small, large = points()
    slower = Point(large.size, 2 * large.seconds, large.bytes / 2)
    assert Model.fit(small).errors(slower) == pytest.approx((-0.5, 1.0))


def test_no_coefficient_is_negative() -> None:
    small, _ = points()
    # One shard of four takes less than its groups would alone, as if a shard gave time back.
    noisy = [Point(p.size, p.seconds - 0.1 * (p.size.shards - 1) - 0.08, p.bytes) for p in small]
    assert min(Model.fit(noisy).time) >= 0


def test_another_encoder_scales_its_own_terms() -> None:
    scaled = TRUE.scaled(flops=10, pixels=2, ray_shard=0.01)
    assert scaled.time == pytest.approx((0.06, 0.04, 0.03))
    assert scaled.volume == pytest.approx((2e4, 2e5, 6e4))


@pytest.mark.parametrize(
    ("hours", "deadline", "devices"), [(1.0, 24.0, 1), (24.0, 24.0, 1), (25.0, 24.0, 2), (240.0, 24.0, 10)]
)
def test_plan_takes_the_fewest_devices_that_meet_the_deadline(hours: float, deadline: float, devices: int) -> None:
    plan = Plan.of(hours, 1e12, deadline, price=2.0)
    assert (plan.devices, plan.hours, plan.cost) == (devices, hours / devices, 2 * hours)


def test_findings_name_the_held_out_error() -> None:
    small, large = points()
    model = Model.fit(small)
    held_out = Point(large.size, large.seconds * 1.5, large.bytes)
    found = findings(Planned(small, held_out, model, [("ImageNet", "here", Plan.of(100, 1e12, 24, 2.5))]))
    assert [bar.verdict for bar in found.bars] == ["not met", "met"]
    assert found.bars[0].rounds == pytest.approx([1 / 3])
    assert found.tables[1].rows == [["ImageNet", "here", "100", "5", "20.0", "1.00", "250"]]
    assert {curve.x: len(curve.lines["measured"]) for curve in found.curves} == {"groups": 4, "N": 4}
