"""One Ray cluster for all tests of this folder, and the merge that others are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.bench import Bench, running_bench, tree


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The cluster; it starts once, because that takes a while."""
    with running_bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.fixture(scope="session")
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Bytes of the merge when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("undisturbed") / "artifact"
    bench.switch()
    code, errors = bench.merge(folder)
    assert code == 0, errors
    return tree(folder)
