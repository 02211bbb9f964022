"""Plans equal those of earlier releases for every kind of source and grouping, so that merges can be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.plans import cases, plan_of

GOLDEN = Path(__file__).parents[1] / "golden" / "plans"


@pytest.mark.parametrize(("source", "grouping"), cases())
def test_the_plan_equals_that_of_earlier_releases(source: str, grouping: str) -> None:
    known = json.loads((GOLDEN / "plans.json").read_text())[f"{source} {grouping}"]
    assert plan_of(GOLDEN, source, grouping) == known
