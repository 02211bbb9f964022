"""The union of artifacts is exact and does not depend on the order of combining."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas import (
    Reject,
    UserError,
)
from storage_schemas.operations.combine import plan_combination
from storage_schemas.schema.provenance import leaves
from tests.support.combining import (
    LABELS,
    ROUND,
    attacked,
    check,
    clean_of,
    combine,
    make,
    members_of,
)
from tests.support.refusals import refused


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=3, max_size=3), min_size=2, max_size=3),
    st.integers(0, 10**6),
    st.sampled_from(["zarr", "webdataset"]),
)
def test_the_union_is_exact_and_associative(counts: list[list[int]], seed: int, format: str) -> None:
    """Rounds of any number and size give the same artifact combined at once, from the left or from the right."""
    keys = ["k0", "k1", "k2"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups = [
            {
                key: members_of([seed, i, j], count, clean_of(key).astype(int))
                for j, (key, count) in enumerate(zip(keys, row, strict=True))
            }
            for i, row in enumerate(counts)
        ]
        inputs = [make(folder / f"a{i}", one, changes={"seed": i}, format=format) for i, one in enumerate(groups)]
        at_once = combine(folder / "all", *inputs)
        for key in keys:
            check(at_once[at_once.index_of(key)], np.concatenate([one[key] for one in groups]))
        left = inputs[0]
        for i, other in enumerate(inputs[1:]):
            left = combine(folder / f"left{i}", left, other)
        right = inputs[-1]
        for i, other in enumerate(reversed(inputs[:-1])):
            right = combine(folder / f"right{i}", other, right)
        assert left.manifest.plan_sha256 == right.manifest.plan_sha256 == at_once.manifest.plan_sha256
        assert left.manifest.provenance == right.manifest.provenance == at_once.manifest.provenance
        for a, b, c in zip(left, right, at_once, strict=True):
            for array in c.arrays:
                np.testing.assert_array_equal(a.arrays[array], c.arrays[array])
                np.testing.assert_array_equal(b.arrays[array], c.arrays[array])
            assert a.info == pytest.approx(c.info)


def test_united_records_keep_label_samples_target_and_clean(tmp_path: Path, format_name: str) -> None:
    a = make(tmp_path / "a", attacked(["k0", "k1", "k2"], 1, 4), format=format_name)
    b = make(tmp_path / "b", attacked(["k2", "k1", "k0"], 2, 2), changes={"seed": 1}, format=format_name)
    union = combine(tmp_path / "ab", a, b)
    assert [record.key for record in union] == ["k0", "k1", "k2"]
    for record, first in zip(union, a, strict=True):
        second = b[b.index_of(record.key)]
        assert (record.count, record.label, record.samples) == (6, first.label, first.samples)
        np.testing.assert_array_equal(record.target, first.target)
        np.testing.assert_array_equal(record.clean, first.clean)
        mean = (4 * first.info["attack_loss"] + 2 * second.info["attack_loss"]) / 6
        assert record.info["attack_loss"] == pytest.approx(mean)
    provenance = union.manifest.provenance
    assert provenance["grouping"] == {"kind": "adversarial", "members": 6}
    assert provenance["encoder"] == ROUND["encoder"]
    assert "seed" not in provenance
    assert provenance["combined"] == [
        {
            "plan_sha256": one.manifest.plan_sha256,
            "groups": 3,
            "provenance": {"seed": seed, "grouping": {"members": 4}},
        }
        for seed, one in enumerate((a, b))
    ]


def test_different_keys_are_concatenated(tmp_path: Path, format_name: str) -> None:
    """Parts of one source with different numbers of members; the union has the format of the first."""
    a = make(tmp_path / "a", attacked(["k0", "k1", "k2"], 1, 4), format=format_name)
    b = make(tmp_path / "b", attacked(["k5", "k3"], 1, 2), changes={"source.fingerprint": "f01"}, format="webdataset")
    union = combine(tmp_path / "ab", a, b)
    assert [record.key for record in union] == ["k0", "k1", "k2", "k5", "k3"]
    assert union.manifest.layout.format == format_name
    for record in union:
        part = a if record.key < "k3" else b
        check(record, part[part.index_of(record.key)].members)
    flat = leaves(union.manifest.provenance)
    assert flat["grouping.members"] is None
    assert "source.fingerprint" not in flat


def test_keys_of_only_one_artifact_are_kept(tmp_path: Path) -> None:
    """Where one round rejected a sample, the other round's members are kept."""
    reject = Reject(key="k1", sample="k1.png", reason="non-finite gradient")
    gone = Reject(key="k9", sample="k9.png", reason="not an image")
    one, two = attacked(["k0", "k1"], 1), attacked(["k0", "k2"], 2)
    a = make(tmp_path / "a", one, rejects=[gone])
    b = make(tmp_path / "b", two, changes={"seed": 1}, rejects=[reject, gone])
    union = combine(tmp_path / "ab", a, b)
    assert [record.key for record in union] == ["k0", "k1", "k2"]
    check(union[0], np.concatenate([one["k0"], two["k0"]]))
    check(union[1], one["k1"])
    check(union[2], two["k2"])
    rejects = [reject for position in range(2) for reject in union.commit(position).rejects]
    assert sorted(rejects, key=lambda r: r.key) == [reject, gone]
    assert union.manifest.layout.groups == 4


def test_class_merges_of_two_halves_are_the_class_merge_of_the_whole(tmp_path: Path) -> None:
    """The halves hold different samples of each class, from different files."""
    halves = [{f"k{label}": members_of([i, label], 300 + 7 * i) for label in (0, 1)} for i in (0, 1)]
    inputs = [
        make(tmp_path / f"{i}", half, LABELS, {"source.fingerprint": f"f{i}", "source.url": f"{i}/"}, extras=())
        for i, half in enumerate(halves)
    ]
    union = combine(tmp_path / "all", *inputs)
    for record in union:
        check(record, np.concatenate([half[record.key] for half in halves]))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"source.fingerprint": "f1"}, {"source.url": "copy/"}])
def test_a_sample_in_both_artifacts_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also if the source has moved or grown."""
    a = make(tmp_path / "a", {"k0": members_of([1], 3)}, LABELS)
    b = make(tmp_path / "b", {"k0": members_of([2], 3)}, LABELS, changes)
    with refused(UserError, None, "k0: ", "k0.png", tmp_path / "a", tmp_path / "b"):
        plan_combination([a, b])


def test_float32_is_pooled_in_float64(tmp_path: Path) -> None:
    one, two = attacked(["k0"], 1, 5), attacked(["k0"], 2, 3)
    a = make(tmp_path / "a", one, encoding="float32", extras=())
    b = make(tmp_path / "b", two, changes={"seed": 1}, encoding="float32", extras=())
    record = combine(tmp_path / "ab", a, b)[0]
    members = np.concatenate([one["k0"], two["k0"]]).astype(np.float64) / 255
    np.testing.assert_allclose(record.mean, members.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(record.variance, members.var(axis=0), atol=2e-7)
    assert (record.variance >= 0).all()
