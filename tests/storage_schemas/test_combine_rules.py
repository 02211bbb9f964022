"""Which artifacts may be combined (later rounds, equal targets), and errors that show why others may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from storage_schemas import (
    ArraySpec,
    ArtifactWriter,
    ConfigError,
    DatamergeError,
    Location,
    Record,
    UserError,
    open_artifact,
)
from storage_schemas.operations.combine import plan_combination
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.provenance import leaves
from tests.support.combining import (
    LABELS,
    ROUND,
    SHAPE,
    WIDTH,
    attacked,
    check,
    clean_of,
    combine,
    make,
)
from tests.support.refusals import refused


def test_later_rounds_on_a_tuned_encoder_are_combined(tmp_path: Path) -> None:
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


def test_rounds_without_a_recorded_orientation_count_as_ignoring_it(tmp_path: Path) -> None:
    """All members of a group must come from the same orientation of its image."""
    rounds = [
        make(tmp_path / "1", attacked(["k0", "k1"], 1)),
        make(tmp_path / "2", attacked(["k0", "k1"], 2), changes={"seed": 1, "source.exif": "ignore"}),
        make(tmp_path / "3", attacked(["k0", "k1"], 3), changes={"seed": 2, "source.exif": "transpose"}),
    ]
    unions = [combine(tmp_path / "a", *rounds[:2]), combine(tmp_path / "b", *rounds[1::-1])]
    for union in unions:
        provenance: Any = union.manifest.provenance
        assert provenance["source"]["exif"] == "ignore"
    for other in (*rounds[:2], unions[0]):
        with refused(UserError, None, "source.exif", "transpose"):
            combine(tmp_path / "no", other, rounds[2])
    apart = make(tmp_path / "4", attacked(["k8"], 4), changes={"seed": 3, "source.exif": "transpose"})
    parts: Any = combine(tmp_path / "apart", rounds[1], apart).manifest.provenance["combined"]
    assert [part["provenance"]["source"]["exif"] for part in parts] == ["ignore", "transpose"]


def test_preprocessing_recorded_by_an_earlier_release_matches(tmp_path: Path) -> None:
    """That release recorded one way of resizing and no normalisation; the union records all that is known."""
    earlier = {"shape": [1, 3, 4], "resize": "bicubic, shorter side", "crop": "centre"}
    now = Preprocessing(shape=(1, 3, 4), mean=(0.5,), std=(0.25,))
    squashed = now.model_copy(update={"resize": "squash"})
    artifacts = [
        make(tmp_path / str(seed), attacked(["k0"], seed), {**ROUND, "preprocessing": record}, {"seed": seed})
        for seed, record in enumerate((earlier, now.record(), squashed.record(), earlier))
    ]
    for name, pair in (("there", artifacts[:2]), ("back", artifacts[1::-1])):
        union = combine(tmp_path / name, *pair)
        assert union.manifest.provenance["preprocessing"] == now.record()
    union = combine(tmp_path / "earlier", artifacts[0], artifacts[3])
    assert union.manifest.provenance["preprocessing"] == earlier
    with refused(UserError, None, "preprocessing.resize: 'shortest'", "'squash'"):
        combine(tmp_path / "none", artifacts[1], artifacts[2])
    three = combine(tmp_path / "three", combine(tmp_path / "two", *artifacts[:2]), artifacts[3])
    assert three.manifest.provenance["preprocessing"] == now.record()


def test_equal_targets_prove_the_encoder(tmp_path: Path) -> None:
    """One artifact names another encoder (the attacked one), yet its targets are the same."""
    a = make(tmp_path / "a", attacked(["k0"], 1))
    b = make(tmp_path / "b", attacked(["k0"], 2), changes={"seed": 1, "encoder.sha256": "e1"})
    assert combine(tmp_path / "ab", a, b)[0].count == 8
    c = make(tmp_path / "c", attacked(["k1"], 2), changes={"seed": 1, "encoder.sha256": "e1"})
    with refused(UserError, None, "encoder.sha256: 'e0'", "'e1'", tmp_path / "a", tmp_path / "c"):
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
    with refused(UserError, None, "k0: ", tmp_path / "a", tmp_path / "c", " 0.0696 "):
        plan_combination([a, c], ["encoder"])


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"attack.epsilon": "4/255"}, ("'2/255'", "'4/255'")),
        ({"source.fingerprint": "f01"}, ("'f00'", "'f01'")),
        ({"preprocessing.resize": "none"}, ("missing", "'none'")),
        ({"license": "mit"}, ("missing", "'mit'")),
        ({"source.class_names": ["cat"]}, ("[]", "['cat']")),
    ],
)
def test_different_settings_are_refused_unless_allowed(
    tmp_path: Path, changes: dict[str, Any], values: tuple[str, str]
) -> None:
    a = make(tmp_path / "a", attacked(["k0"], 1))
    b = make(tmp_path / "b", attacked(["k0"], 2), changes={"seed": 1, **changes})
    name = next(iter(changes))
    places = tmp_path / "a", tmp_path / "b"
    with refused(UserError, None, f"{name}: ", *values, *places, f'`allow_different=["{name}"]`'):
        plan_combination([a, b])
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
    with refused(UserError, None, *(f"{name}: " for name in changes if name != "seed")):
        plan_combination([a, b])


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda record: {"label": 7}, (" 0 ", " 7")),
        (lambda record: {"arrays": {**record.arrays, "clean": clean_of("k8")}}, (" clean ",)),
    ],
)
def test_groups_with_different_labels_or_clean_images_are_refused(
    tmp_path: Path, change: Callable[[Record], dict[str, Any]], facts: tuple[str, ...]
) -> None:
    a = make(tmp_path / "a", attacked(["k0"], 1))
    b = make(tmp_path / "b", attacked(["k0"], 2), changes={"seed": 1}, overrides=change)
    with refused(UserError, None, "k0: ", tmp_path / "a", tmp_path / "b", *facts):
        plan_combination([a, b])


@pytest.mark.parametrize("other", ["itself", "converted", "elsewhere", "inside a combination", "seed without effect"])
def test_the_same_members_in_both_artifacts_are_refused(tmp_path: Path, other: str) -> None:
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
    with refused(UserError, None, tmp_path / "a", "`seed`"):
        plan_combination([a, b])


def test_an_array_of_only_one_artifact_is_refused_or_dropped(tmp_path: Path) -> None:
    a = make(tmp_path / "a", attacked(["k0"], 1))
    b = make(tmp_path / "b", attacked(["k0"], 2), changes={"seed": 1}, extras=("target", "clean"))
    with refused(UserError, None, "arrays.members: ", "'uint8'", "missing", tmp_path / "a", tmp_path / "b"):
        plan_combination([a, b])
    record = combine(tmp_path / "ab", a, b, allow=["arrays.members"])[0]
    assert record.members is None
    check(record, np.concatenate([a[0].members, attacked(["k0"], 2)["k0"]]))


def test_factors_are_kept_unless_members_are_united(tmp_path: Path) -> None:
    extras = ("target", "factors")
    a, b = (make(tmp_path / key, attacked([key], 1), extras=extras) for key in ("k0", "k1"))
    apart = combine(tmp_path / "apart", a, b)
    for record, part in zip(apart, (a, b), strict=True):
        np.testing.assert_array_equal(record.factors, part[0].factors)
    again = make(tmp_path / "again", attacked(["k0"], 2), changes={"seed": 1}, extras=extras)
    (united,) = combine(tmp_path / "united", a, again)
    assert united.factors is None
    assert united.target is not None


def test_different_encodings_and_wrong_arguments_are_refused(tmp_path: Path) -> None:
    a = make(tmp_path / "a", attacked(["k0"], 1))
    b = make(tmp_path / "b", attacked(["k0"], 2), changes={"seed": 1}, encoding="float32")
    with refused(UserError, None, "uint8_moments", "float32", "`datamerge convert`"):
        plan_combination([a, b])
    with refused(ConfigError, "artifacts", " 1"):
        plan_combination([a])
    with refused(ConfigError, "allow_different", "attack.epsilon", "preprocessing", "atack"):
        plan_combination([a, a], ["atack"])


def test_different_heads_are_refused(tmp_path: Path) -> None:
    heads = [{"head.safetensors": save({"weight": np.full((2, WIDTH), i, np.float32)})} for i in (0, 1)]
    a = make(tmp_path / "a", attacked(["k0"], 1), files=heads[0])
    b = make(tmp_path / "b", attacked(["k0"], 2), changes={"seed": 1}, files=heads[0])
    c = make(tmp_path / "c", attacked(["k0"], 2), changes={"seed": 1}, files=heads[1])
    head = combine(tmp_path / "ab", a, b).head()
    assert head is not None
    assert (head[0]["weight"] == 0).all()
    with refused(UserError, None, "head.sha256: ", tmp_path / "a", tmp_path / "c"):
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


def test_members_beyond_the_recorded_epsilon_are_an_error(tmp_path: Path) -> None:
    """Members 100 levels apart, while the scatter has the 16 bits that epsilon 2/255 needs."""
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
    with refused(DatamergeError, None, "k0: ", "scatter", 280000, "attack.epsilon"):
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
