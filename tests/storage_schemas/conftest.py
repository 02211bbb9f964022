"""Session fixtures that return the builders of `tests.support.artifacts`, so that hypothesis tests can use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from storage_schemas import Layout, Record
from tests.support.artifacts import PROVENANCE, assert_same, build_layout, build_record, build_shards, write


@pytest.fixture(scope="session")
def make_layout() -> Callable[..., Layout]:
    return build_layout


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    return build_record


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., list[list[Record]]]:
    return build_shards


@pytest.fixture(scope="session")
def write_artifact() -> Callable[..., list[Record]]:
    return write


@pytest.fixture(scope="session")
def same_record() -> Callable[[Record, Record], None]:
    return assert_same


@pytest.fixture(scope="session")
def provenance() -> dict[str, Any]:
    return PROVENANCE


@pytest.fixture(params=["zarr", "webdataset"])
def format_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["uint8_moments", "float32"])
def encoding_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)
