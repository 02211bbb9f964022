"""`Groups`, which makes its groups lazily, against plain lists of groups."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamerge.sources import Sample, Source
from datamerge.sources.columns import Samples
from merge_service import MergeConfig
from merge_service.grouping import Group, Groups, assignment_sha256, by_class, make_groups
from storage_schemas import ConfigError
from tests.support.refusals import refused


def _source(samples: list[Sample]) -> Source:
    return Source("u", "arrays", Samples.of(samples), [], "", None)  # type: ignore[arg-type]


def _config(**settings: Any) -> MergeConfig:
    return MergeConfig.model_validate({"source": "u", "artifact": "a", **settings})


COLUMN = {"grouping": "column", "group_column": "site"}
LABELLED = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["x.y", "x y", "z"])), min_size=1, max_size=20)


@settings(deadline=None, max_examples=50)
@given(LABELLED, st.data())
def test_groups_of_a_column_equal_those_of_a_dictionary(pairs: list[tuple[int, str]], data: st.DataObject) -> None:
    """Some values differ only in characters that keys replace, some groups mix classes, and any order is taken."""
    samples = [Sample(f"k{i}", f"n{i}", label, group) for i, (label, group) in enumerate(pairs)]
    members = defaultdict(list)
    for sample in samples:
        members[sample.group].append(sample)
    groups = make_groups(_config(**COLUMN, targets="embedding", encoder="mlp:1x2x2-4-4"), _source(samples), None)
    assert [list(group.samples) for group in groups] == [members[value] for value in sorted(map(str, members))]
    assert len({group.key for group in groups}) == len(members)
    for group in groups:
        labels = {sample.label for sample in group.samples}
        assert group.label == (labels.pop() if len(labels) == 1 else None)
    listed = list(groups)
    order = data.draw(st.permutations(range(len(listed))))
    dealt = groups.take(np.array(order))
    assert list(dealt) == [listed[place] for place in order] == [dealt[place] for place in range(len(order))]
    assert list(dealt[1:]) == list(dealt)[1:]
    assert list(dealt.take(np.arange(1))) == list(dealt)[:1]
    assert dealt.sizes().tolist() == [len(group.samples) for group in dealt]
    assert dealt.outline(0, len(order)) == tuple(Group(group.key, (), group.label) for group in dealt)
    assert [samples[place] for place in dealt.places(0, len(order))] == [s for group in dealt for s in group.samples]
    assert assignment_sha256(groups) == assignment_sha256(listed)


@settings(deadline=None, max_examples=50)
@given(LABELLED)
def test_groups_of_each_sample_equal_a_list_of_them(pairs: list[tuple[int, str]]) -> None:
    samples = [Sample(f"k{i}", f"n{i}", label) for i, (label, _) in enumerate(pairs)]
    groups = Groups.of_each(Samples.of(samples))
    expected = [Group(sample.key, (sample,), sample.label) for sample in samples]
    assert list(groups) == expected == [groups[place - len(samples)] for place in range(len(samples))]
    assert list(groups.take(np.arange(len(samples))[::-1])) == expected[::-1]
    with pytest.raises(IndexError, match=f"of {len(samples)}"):
        groups[len(samples)]


def test_refusals_name_the_first_bad_sample_or_group() -> None:
    samples = [Sample("a", "a.png", 1, "x"), Sample("b", "b.png", None, None), Sample("c", "c.png", None, None)]
    with refused(ConfigError, "label_column", "b.png"):
        by_class(_source(samples))
    with refused(ConfigError, "group_column", "b.png", "'site'"):
        make_groups(_config(**COLUMN), _source(samples), None)
    mixed = [Sample("a", "a.png", 1, "z"), Sample("b", "b.png", 1, "y"), Sample("c", "c.png", None, "y")]
    with refused(ConfigError, "group_column", "'y'", "several"):
        make_groups(_config(**COLUMN), _source(mixed), None)
