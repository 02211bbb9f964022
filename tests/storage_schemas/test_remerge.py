"""Merging the first n stored members again gives their moments, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage_schemas import ConfigError, Layout, Location, Record, open_artifact
from storage_schemas.operations.remerge import Remerge, remerge
from storage_schemas.schema.factors import decode_factors, factors
from storage_schemas.schema.seeds import group_seed
from tests.support.forging import forge
from tests.support.refusals import refused

Write = Callable[..., list[Record]]
FORMS = [(format, encoding) for format in ("zarr", "webdataset") for encoding in ("uint8_moments", "float32")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 3, None])
def test_moments_are_those_of_the_first_members(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    form: tuple[str, str],
    count: int | None,
) -> None:
    written = write_artifact(tmp_path / "a", make_layout(*form), (2,), {})
    seen: list[int] = []
    wanted = Remerge(members=count, keep_members=count == 3)
    manifest = remerge(open_artifact(tmp_path / "a"), Location(tmp_path / "b"), wanted, seen.append)
    assert sum(seen) == 7
    found = open_artifact(tmp_path / "b")
    assert found.manifest.layout.array("members") is None or count == 3
    assert [reject.key for shard in range(3) for reject in found.commit(shard).rejects] == ["k2"]
    assert manifest.complete
    for before, after in zip(written, found, strict=True):
        assert before.members is not None
        pixels = before.members[:count].astype(np.float64) / 255
        assert after.count == len(pixels)
        assert (after.key, after.label, after.samples) == (before.key, before.label, before.samples)
        assert np.abs(after.mean - pixels.mean(axis=0)).max() < 1e-6
        assert np.abs(after.variance - pixels.var(axis=0)).max() < 1e-6
        np.testing.assert_array_equal(after.arrays["target"], before.arrays["target"])
        np.testing.assert_array_equal(after.arrays["clean"], before.arrays["clean"])
        # An attack's loss is a mean over all members.
        assert after.info == (before.info if after.count == before.count else {})
        if count == 3:
            np.testing.assert_array_equal(after.members, before.members[:3])


@pytest.mark.parametrize("kind", ["sketch", "principal"])
def test_factors_are_those_of_the_key_and_seed(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, kind: str
) -> None:
    written = write_artifact(tmp_path / "a", make_layout(), (), {})
    wanted = Remerge(factors=2, factor_kind=kind, keep_members=False)  # type: ignore[arg-type]
    remerge(open_artifact(tmp_path / "a"), Location(tmp_path / "b"), wanted)
    found = open_artifact(tmp_path / "b")
    assert found.manifest.layout.array("members") is None
    for before, after in zip(written, found, strict=True):
        assert before.members is not None
        generator = np.random.default_rng(group_seed(7, before.key))
        expected = factors(before.members, 2, kind, generator)  # type: ignore[arg-type]
        np.testing.assert_array_equal(after.arrays["factors"], expected)
        assert after.factors is not None
        np.testing.assert_allclose(after.factors, decode_factors(expected))


@pytest.mark.parametrize(
    ("extras", "wanted", "field", "facts"),
    [
        (("target",), Remerge(), None, ("`keep_members=True`",)),
        (("members",), Remerge(members=5), "members", (" 4 ", " 5")),
        (("members",), Remerge(members=2, factors=2), "factors", ("2 members", " 1 ", " 2")),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    extras: tuple[str, ...],
    wanted: Remerge,
    field: str | None,
    facts: tuple[str, ...],
) -> None:
    write_artifact(tmp_path / "a", make_layout(extras=extras), (), {})
    with refused(ConfigError, field, *facts):
        remerge(open_artifact(tmp_path / "a"), Location(tmp_path / "b"), wanted)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("wanted", [Remerge(members=2), Remerge(factors=1)])
def test_only_adversarial_groups_are_cut(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, wanted: Remerge
) -> None:
    """With fewer members, the samples and the target of other groups would change as well."""
    write_artifact(tmp_path / "a", make_layout())
    forge(tmp_path / "a", lambda manifest: manifest["provenance"].update(grouping={"kind": "label", "members": 4}))
    with refused(ConfigError, None, tmp_path / "a", "label", "`members`", "`factors`"):
        remerge(open_artifact(tmp_path / "a"), Location(tmp_path / "b"), wanted)
    assert not (tmp_path / "b").exists()
