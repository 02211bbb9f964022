"""Workers, shard sizes and interruptions do not change the groups; `datamerge diff` compares them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from datamerge.cli import cli
from tests.support.bench import GROUPS, Bench, tree

# Ray's own start-up leaves file handles and sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")


@pytest.fixture
def expected(undisturbed: dict[str, bytes], tmp_path: Path) -> Path:
    """The undisturbed merge's artifact, on disk."""
    for path, data in undisturbed.items():
        (tmp_path / "expected" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "expected" / path).write_bytes(data)
    return tmp_path / "expected"


def _diff(a: Path, b: Path, *more: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["diff", str(a), str(b), *more])
    return done.exit_code, done.stdout.strip().splitlines()[-1]


def test_one_worker_writes_the_bytes_of_two(bench: Bench, expected: Path, tmp_path: Path) -> None:
    bench.switch()
    code, errors = bench.merge(tmp_path / "one", "--max-workers", "1")
    assert code == 0, errors
    assert _diff(expected, tmp_path / "one") == (0, f"equal: {GROUPS} groups")
    assert tree(tmp_path / "one") == tree(expected)


def test_larger_shards_hold_the_same_groups_also_when_resumed(bench: Bench, expected: Path, tmp_path: Path) -> None:
    """A shard that is done again has the same bytes. Targets have a tolerance: larger batches round differently."""
    bench.switch()
    code, errors = bench.merge(tmp_path / "large", "--groups-per-shard", "5")
    assert code == 0, errors
    before = tree(tmp_path / "large")
    (tmp_path / "large" / "commits" / "00001.json").unlink()
    code, errors = bench.merge(tmp_path / "large", "--groups-per-shard", "5")
    assert code == 0, errors
    assert tree(tmp_path / "large") == before
    code, last = _diff(expected, tmp_path / "large", "--tolerance", "1e-6")
    assert code == 0, last
    assert last.startswith(f"equal: {GROUPS} groups")


def test_another_seed_changes_every_group(bench: Bench, expected: Path, tmp_path: Path) -> None:
    bench.switch()
    code, errors = bench.merge(tmp_path / "other", "--seed", "1")
    assert code == 0, errors
    code, last = _diff(expected, tmp_path / "other")
    assert code == 1
    assert last.startswith(f"different: {GROUPS} of {GROUPS} common groups differ")
