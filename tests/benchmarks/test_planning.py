"""Plans against measurements: relative errors, and the number of devices for a large job."""

from __future__ import annotations

import pytest

from benchmarks.planning import Job, Outcome, Plan, findings, jobs
from merge_service.estimate import Estimate


def outcome(job: Job, planned: float, seconds: float, *, volume: int = 1000) -> Outcome:
    """The outcome of a job with a plan of 10 s for the start, `planned` seconds for the rest, and 1000 bytes."""
    rates = {"flops": 1e12, "flop_per_second": 1e9, "peak_share": 0.5}
    estimate = Estimate(
        1000, 10 + planned, 10, 1, **rates, measured=3, worker_bytes=10**9, free_bytes=None, shortage=None
    )
    return Outcome(job, estimate, seconds, volume)


@pytest.mark.parametrize("scale", [1, 16])
def test_jobs_grow_and_end_with_the_papers(scale: int) -> None:
    planned_jobs = jobs(scale)
    assert len({(job.members, job.steps) for job in planned_jobs[:3]}) == 1
    assert (planned_jobs[-1].members, planned_jobs[-1].steps) == (10, 10)
    assert all(job.groups % job.shards == 0 for job in planned_jobs)


def test_errors_are_relative_to_the_measurement_without_the_start() -> None:
    assert outcome(Job(16, 2, 3), 3, 6, volume=500).errors() == pytest.approx((-0.5, 1.0))


@pytest.mark.parametrize(
    ("hours", "deadline", "devices"), [(1.0, 24.0, 1), (24.0, 24.0, 1), (25.0, 24.0, 2), (240.0, 24.0, 10)]
)
def test_plan_takes_the_fewest_devices_that_meet_the_deadline(hours: float, deadline: float, devices: int) -> None:
    plan = Plan.of(hours, 1e12, deadline, price=2.0)
    assert (plan.devices, plan.hours, plan.cost) == (devices, hours / devices, 2 * hours)


def test_findings_judge_the_median_error() -> None:
    planned = [outcome(job, seconds, 10) for job, seconds in zip(jobs(1), (12, 13, 12, 9, 10), strict=True)]
    found = findings(planned, [("ImageNet", "here", Plan.of(100, 1e12, 24, 2.5))])
    assert found.bars[0].rounds == pytest.approx([0.2, 0.3, 0.2, 0.1, 0.0])
    assert [bar.verdict for bar in found.bars] == ["not met", "met"]
    assert found.tables[1].rows == [["ImageNet", "here", "100", "5", "20.0", "1.00", "250"]]
    assert found.curves[0].lines["measured"] == [(32, 10), (64, 10), (128, 10)]
