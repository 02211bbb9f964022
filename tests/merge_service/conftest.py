"""The merge without faults that other merges are compared with."""

from __future__ import annotations

import pytest

from tests.support.bench import Bench, tree


@pytest.fixture(scope="session")
def undisturbed(cluster: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a merge without faults: contents by path."""
    folder = tmp_path_factory.mktemp("undisturbed") / "artifact"
    with cluster.entered() as bench:
        code, errors = bench.merge(folder)
    assert code == 0, errors
    return tree(folder)
