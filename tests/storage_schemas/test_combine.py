"""The union of artifacts: exact, in any order of combining, and refused where it would have no meaning."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from storage_schemas import (
    ArraySpec,
    Artifact,
    ArtifactWriter,
    ConfigError,
    DatamergeError,
    ExactMoments,
    Layout,
    Location,
    Record,
    Reject,
    UserError,
    open_artifact,
)
from storage_schemas.combine import plan_combination
from storage_schemas.compatibility import leaves, tree
from storage_schemas.derive import moment_specs
from storage_schemas.factors import factors
from storage_schemas.record import encode_exact

SHAPE, WIDTH = (1, 3, 4), 5
ROUND: dict[str, Any] = {
    "source": {"url": "photos/", "fingerprint": "f00", "samples": 9, "class_names": []},
    "grouping": {"kind": "adversarial", "members": 4},
    "preprocessing": {"shape": [1, 3, 4]},
    "encoder": {"spec": "clip", "sha256": "e0"},
    "attack": {"kind": "pgd", "epsilon": "2/255", "random_start": True},
    "seed": 0,
}
LABELS: dict[str, Any] = {
    "source": {"url": "mnist/", "fingerprint": "f00", "samples": 9, "class_names": ["a", "b"]},
    "grouping": {"kind": "label", "members": None},
    "seed": 0,
}


def _members(seed: Sequence[int], count: int, clean: Any = None) -> Any:
    rng = np.random.default_rng(list(seed))
    if clean is None:
        return rng.integers(0, 256, (count, *SHAPE)).astype(np.uint8)
    return np.clip(clean + rng.integers(-2, 3, (count, *SHAPE)), 0, 255).astype(np.uint8)


def _clean(key: str) -> Any:
    return _members([1, int(key[1:])], 1)[0]


def make(
    folder: Path,
    groups: Mapping[str, Any],
    provenance: Mapping[str, Any] = ROUND,
    changes: Mapping[str, Any] | None = None,
    *,
    format: str = "zarr",
    encoding: str = "uint8_moments",
    extras: Sequence[str] = ("target", "members", "clean"),
    rejects: Sequence[Reject] = (),
    overrides: Callable[[Record], dict[str, Any]] = lambda record: {},
    files: Mapping[str, bytes] | None = None,
) -> Artifact:
    """An artifact of `groups` (key → members), two a shard; `changes` are dotted provenance leaves."""
    largest = max(len(members) for members in groups.values())
    shapes = {"target": (WIDTH,), "members": (largest, *SHAPE), "clean": SHAPE, "factors": (1, *SHAPE)}
    dtypes = {"target": "f4", "members": "u1", "clean": "u1", "factors": "i1"}
    arrays = moment_specs(encoding, SHAPE, largest, 255)  # type: ignore[arg-type]
    arrays += [ArraySpec.of(name, np.dtype(dtypes[name]), shapes[name]) for name in extras]
    layout = Layout.model_validate(
        {
            "format": format,
            "encoding": encoding,
            "arrays": tuple(arrays),
            "groups": len(groups) + len(rejects),
            "groups_per_shard": 2,
        }
    )
    flat = leaves(provenance) | dict(changes or {})
    writer = ArtifactWriter(Location(folder), layout, tree({k: v for k, v in flat.items() if v is not None}))
    writer.begin(files or {})
    records = []
    for key, members in groups.items():
        padded = np.concatenate([members, np.zeros((largest - len(members), *SHAPE), np.uint8)])
        record = Record(
            key=key,
            count=len(members),
            encoding=layout.encoding,
            arrays={
                **encode_exact(ExactMoments.of(members), layout),
                "target": np.random.default_rng([2, int(key[1:])]).normal(size=WIDTH).astype(np.float32),
                "members": padded,
                "clean": _clean(key),
                "factors": factors(members, 1, "sketch", np.random.default_rng(0)).astype(np.int8),
            },
            label=int(key[1:]) % 2,
            samples=(f"{key}.png",),
            info={"attack_loss": float(members.mean())},
        )
        record = Record(**{**{name: getattr(record, name) for name in Record.__slots__}, **overrides(record)})
        records.append(record)
    for shard in range(layout.shards):
        writer.commit(shard, records[2 * shard : 2 * shard + 2], rejects if shard == 0 else ())
    writer.finish()
    return open_artifact(folder)


def attacked(keys: Sequence[str], seed: int, count: int = 4) -> dict[str, Any]:
    return {key: _members([seed, int(key[1:])], count, _clean(key).astype(int)) for key in keys}


def combine(folder: Path, *inputs: Artifact, allow: Sequence[str] = ()) -> Artifact:
    manifest = plan_combination(inputs, allow).write(Location(folder))
    assert manifest.complete
    return open_artifact(folder)


def check(record: Record, members: Any) -> None:
    """Equal to what one merge of all these members would have stored."""
    moments = ExactMoments.of(members)
    assert record.count == len(members)
    np.testing.assert_array_equal(record.arrays["sum"], moments.sum)
    np.testing.assert_array_equal(record.arrays["scatter"], moments.scatter)
    if "members" in record.arrays:
        np.testing.assert_array_equal(record.members, members)


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=3, max_size=3), min_size=2, max_size=3),
    st.integers(0, 10**6),
    st.sampled_from(["zarr", "webdataset"]),
)
def test_the_union_is_exact_and_associative(counts: list[list[int]], seed: int, format: str) -> None:
    """Any number of rounds of any sizes; combined at once, from the left or from the right, it is one artifact."""
    keys = ["k0", "k1", "k2"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups = [
            {
                key: _members([seed, i, j], count, _clean(key).astype(int))
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


def test_what_a_united_record_keeps(tmp_path: Path, format_name: str) -> None:
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
    """Parts of one source, of other sizes; formats may differ, the first one's is taken."""
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


def test_some_keys_in_common(tmp_path: Path) -> None:
    """A sample that one round had to reject: the other round's members are kept."""
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
    """Other samples of one class, from another file: the union that sums are kept for."""
    halves = [{f"k{label}": _members([i, label], 300 + 7 * i) for label in (0, 1)} for i in (0, 1)]
    inputs = [
        make(tmp_path / f"{i}", half, LABELS, {"source.fingerprint": f"f{i}", "source.url": f"{i}/"}, extras=())
        for i, half in enumerate(halves)
    ]
    union = combine(tmp_path / "all", *inputs)
    for record in union:
        check(record, np.concatenate([half[record.key] for half in halves]))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"source.fingerprint": "f1"}, {"source.url": "copy/"}])
def test_a_sample_counts_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The same source, at another place, or more of it."""
    a = make(tmp_path / "a", {"k0": _members([1], 3)}, LABELS)
    b = make(tmp_path / "b", {"k0": _members([2], 3)}, LABELS, changes)
    with pytest.raises(UserError, match=r"k0\.png"):
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


def test_later_rounds_attack_the_tuned_encoder(tmp_path: Path) -> None:
    rounds = [
        make(tmp_path / "1", attacked(["k0", "k1"], 1)),
        make(tmp_path / "2", attacked(["k0", "k1"], 2), changes={"seed": 1, "attacked_encoder.sha256": "e1"}),
        make(tmp_path / "3", attacked(["k0", "k1"], 3), changes={"seed": 2, "attacked_encoder.sha256": "e2"}),
    ]
    union = combine(tmp_path / "all", *rounds)
    assert union[0].count == 12
    parts: Any = union.manifest.provenance["combined"]
    assert [part["provenance"].get("attacked_encoder") for part in parts] == [
        None,
        {"sha256": "e1"},
        {"sha256": "e2"},
    ]


def test_equal_targets_prove_the_encoder(tmp_path: Path) -> None:
    """An artifact that names the attacked encoder only."""
    a = make(tmp_path / "a", attacked(["k0"], 1))
    b = make(tmp_path / "b", attacked(["k0"], 2), changes={"seed": 1, "encoder.sha256": "e1"})
    assert combine(tmp_path / "ab", a, b)[0].count == 8
    c = make(tmp_path / "c", attacked(["k1"], 2), changes={"seed": 1, "encoder.sha256": "e1"})
    with pytest.raises(UserError, match=r'encoder\.sha256: "e0" in .*/a, "e1" in .*/c'):
        plan_combination([a, c])


def _other_target(scale: float) -> Callable[[Record], dict[str, Any]]:
    def change(record: Record) -> dict[str, Any]:
        target: Any = record.target
        return {"arrays": {**record.arrays, "target": np.float32(target + scale * np.linalg.norm(target))}}

    return change


def test_targets_may_differ_by_rounding_only(tmp_path: Path) -> None:
    a = make(tmp_path / "a", attacked(["k0", "k1"], 1))
    b = make(tmp_path / "b", attacked(["k0", "k1"], 2), changes={"seed": 1}, overrides=_other_target(1e-6))
    c = make(tmp_path / "c", attacked(["k0", "k1"], 2), changes={"seed": 1}, overrides=_other_target(1e-2))
    union = combine(tmp_path / "ab", a, b)
    np.testing.assert_array_equal(union[0].target, a[0].target)
    with pytest.raises(UserError, match="group k0: its targets"):
        plan_combination([a, c], ["encoder"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"attack.epsilon": "4/255"},
            r'attack\.epsilon: "2/255" in .*, "4/255" in .*--allow-different attack\.epsilon',
        ),
        ({"source.fingerprint": "f01"}, r'source\.fingerprint: "f00" in .*, "f01" in '),
        ({"preprocessing.resize": "none"}, r'preprocessing\.resize: missing in .*, "none" in '),
        ({"license": "mit"}, r'license: missing in .*, "mit" in '),
        ({"source.class_names": ["cat"]}, r"source\.class_names"),
    ],
)
def test_what_does_not_go_together_is_shown(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    a = make(tmp_path / "a", attacked(["k0"], 1))
    b = make(tmp_path / "b", attacked(["k0"], 2), changes={"seed": 1, **changes})
    with pytest.raises(UserError, match=named) as caught:
        plan_combination([a, b])
    assert "\n" not in str(caught.value)
    name = next(iter(changes))
    union = combine(tmp_path / "ab", a, b, allow=[name])
    check(union[0], np.concatenate([a[0].members, b[0].members]))
    if name.startswith("attack"):
        flat = [leaves(part["provenance"]) for part in union.manifest.provenance["combined"]]  # type: ignore[index, arg-type, call-overload, union-attr]
        assert [one.get(name) for one in flat] == ["2/255", "4/255"]
        assert name not in leaves(union.manifest.provenance)


def test_every_difference_is_shown_at_once(tmp_path: Path) -> None:
    a = make(tmp_path / "a", attacked(["k0"], 1))
    changes = {"seed": 1, "attack.epsilon": "4/255", "attack.steps": 3, "preprocessing.crop": "x"}
    b = make(tmp_path / "b", attacked(["k0"], 2), changes=changes)
    with pytest.raises(UserError) as caught:
        plan_combination([a, b])
    assert all(name in str(caught.value) for name in changes if name != "seed")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda record: {"label": 7}, "group k0.*labels, 0 and 7"),
        (lambda record: {"arrays": {**record.arrays, "clean": _clean("k8")}}, "group k0.*clean images"),
    ],
)
def test_groups_about_different_things_are_refused(
    tmp_path: Path, change: Callable[[Record], dict[str, Any]], named: str
) -> None:
    a = make(tmp_path / "a", attacked(["k0"], 1))
    b = make(tmp_path / "b", attacked(["k0"], 2), changes={"seed": 1}, overrides=change)
    with pytest.raises(UserError, match=named):
        plan_combination([a, b])


@pytest.mark.parametrize("other", ["itself", "converted", "elsewhere", "inside a combination", "seed without effect"])
def test_the_same_members_do_not_count_twice(tmp_path: Path, other: str) -> None:
    fixed = {"attack.random_start": False} if other == "seed without effect" else {}
    a = make(tmp_path / "a", attacked(["k0"], 1), changes=fixed)
    b = {
        "itself": lambda: a,
        "converted": lambda: make(tmp_path / "b", attacked(["k0"], 1), format="webdataset"),
        "elsewhere": lambda: make(tmp_path / "b", attacked(["k0"], 1), changes={"source.url": "copy/"}),
        "inside a combination": lambda: combine(
            tmp_path / "b", a, make(tmp_path / "c", attacked(["k0"], 2), changes={"seed": 1})
        ),
        "seed without effect": lambda: make(tmp_path / "b", attacked(["k0"], 1), changes={"seed": 1, **fixed}),
    }[other]()
    with pytest.raises(UserError, match="twice"):
        plan_combination([a, b])


def test_arrays_that_not_all_have(tmp_path: Path) -> None:
    a = make(tmp_path / "a", attacked(["k0"], 1))
    b = make(tmp_path / "b", attacked(["k0"], 2), changes={"seed": 1}, extras=("target", "clean"))
    with pytest.raises(UserError, match=r'arrays\.members: "uint8" in .*, missing in '):
        plan_combination([a, b])
    record = combine(tmp_path / "ab", a, b, allow=["arrays.members"])[0]
    assert record.members is None
    check(record, np.concatenate([a[0].members, attacked(["k0"], 2)["k0"]]))


def test_factors_of_parts_are_none_of_their_union(tmp_path: Path) -> None:
    extras = ("target", "factors")
    a, b = (make(tmp_path / key, attacked([key], 1), extras=extras) for key in ("k0", "k1"))
    apart = combine(tmp_path / "apart", a, b)
    for record, part in zip(apart, (a, b), strict=True):
        np.testing.assert_array_equal(record.factors, part[0].factors)
    again = make(tmp_path / "again", attacked(["k0"], 2), changes={"seed": 1}, extras=extras)
    (united,) = combine(tmp_path / "united", a, again)
    assert united.factors is None
    assert united.target is not None


def test_layouts_that_do_not_go_together(tmp_path: Path) -> None:
    a = make(tmp_path / "a", attacked(["k0"], 1))
    b = make(tmp_path / "b", attacked(["k0"], 2), changes={"seed": 1}, encoding="float32")
    with pytest.raises(UserError, match="datamerge convert"):
        plan_combination([a, b])
    with pytest.raises(ConfigError, match="two or more"):
        plan_combination([a])
    with pytest.raises(ConfigError, match=r"--allow-different atack.*attack"):
        plan_combination([a, a], ["atack"])


def test_heads_have_to_be_equal(tmp_path: Path) -> None:
    heads = [{"head.safetensors": save({"weight": np.full((2, WIDTH), i, np.float32)})} for i in (0, 1)]
    a = make(tmp_path / "a", attacked(["k0"], 1), files=heads[0])
    b = make(tmp_path / "b", attacked(["k0"], 2), changes={"seed": 1}, files=heads[0])
    c = make(tmp_path / "c", attacked(["k0"], 2), changes={"seed": 1}, files=heads[1])
    head = combine(tmp_path / "ab", a, b).head()
    assert head is not None
    assert (head[0]["weight"] == 0).all()
    with pytest.raises(UserError, match=r"head\.sha256"):
        plan_combination([a, c])


def test_sums_that_outgrow_their_dtype_get_a_wider_one(tmp_path: Path) -> None:
    """255 white members fit uint16, 510 do not."""
    white = np.full((255, *SHAPE), 255, np.uint8)
    a = make(tmp_path / "a", {"k0": white}, LABELS, extras=())
    b = make(tmp_path / "b", {"k0": white}, LABELS, {"source.fingerprint": "f1", "source.url": "b/"}, extras=())
    assert a.manifest.layout.arrays[0].dtype == "uint16"
    union = combine(tmp_path / "ab", a, b)
    assert union.manifest.layout.arrays[0].dtype == "uint32"
    check(union[0], np.concatenate([white, white]))


def test_groups_that_belie_their_provenance_are_an_error(tmp_path: Path) -> None:
    """Scatters of 4 members of any pixels in the 16 bits that 2/255 needs."""
    dark = {"k0": np.array([0, 0, 0, 100], np.uint8).reshape(4, 1, 1, 1) * np.ones((4, *SHAPE), np.uint8)}
    light = {"k0": dark["k0"] + np.uint8(100)}
    inputs = []
    for seed, groups in enumerate((dark, light)):
        a = make(tmp_path / f"{seed}", groups, changes={"seed": seed}, extras=())
        layout = a.manifest.layout.model_copy(
            update={"arrays": tuple(ArraySpec.of(s.name, np.dtype("u2"), s.shape) for s in a.manifest.layout.arrays)}
        )
        writer = ArtifactWriter(Location(tmp_path / f"narrow{seed}"), layout, a.manifest.provenance)
        writer.begin({})
        writer.commit(0, [Record("k0", 4, "uint8_moments", {n: v.astype("u2") for n, v in a[0].arrays.items()})], [])
        writer.finish()
        inputs.append(open_artifact(tmp_path / f"narrow{seed}"))
    with pytest.raises(DatamergeError, match=r"group k0: scatter.*attack\.epsilon"):
        combine(tmp_path / "ab", *inputs)


def test_an_interrupted_union_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = make(tmp_path / "a", attacked(["k0", "k1", "k2"], 1))
    b = make(tmp_path / "b", attacked(["k0", "k1", "k2"], 2), changes={"seed": 1})
    combine(tmp_path / "golden", a, b)
    original = ArtifactWriter.commit

    def fail(self: ArtifactWriter, shard: int, *rest: Any) -> Any:
        if shard == 1:
            raise KeyboardInterrupt
        return original(self, shard, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactWriter, "commit", fail)
        with pytest.raises(KeyboardInterrupt):
            combine(tmp_path / "ab", a, b)
    combine(tmp_path / "ab", a, b)
    trees = [
        {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("ab", "golden")
    ]
    assert trees[0] == trees[1]
