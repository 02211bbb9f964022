"""Addresses that a user mistypes are refused at once."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from datamerge.runtime.addresses import check_cluster_address
from merge_service import MergeConfig, ray_stage
from storage_schemas import ConfigError
from trainer import TrainConfig
from trainer.run.ray_launch import train_on_ray


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is taken and where nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_nothing_listens(port: int, form: str) -> None:
    with pytest.raises(ConfigError, match=r"--ray-address .* expected a Ray cluster, found nothing .*refused"):
        check_cluster_address(form.format(f"127.0.0.1:{port}"))


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(ConfigError, match="expected a Ray cluster"):
        check_cluster_address("no-such-host.invalid:6379")


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_something_listens(port: int, form: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_cluster_address(form.format(f"127.0.0.1:{server.getsockname()[1]}"))


@pytest.mark.parametrize("address", ["auto", "local", "127.0.0.1", "ray://host"])
def test_other_addresses_are_left_to_ray(address: str) -> None:
    check_cluster_address(address)


@pytest.mark.parametrize("command", ["merge", "train"])
def test_commands_that_meet_nobody_end_at_once(port: int, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests may be connected
    address = f"127.0.0.1:{port}"
    calls: dict[str, Callable[[], object]] = {
        "merge": lambda: ray_stage.start(
            MergeConfig(source="s", artifact="a", encoder="mlp:3x4x4-2", ray_address=address)
        ),
        "train": lambda: train_on_ray(TrainConfig(artifact="a", run="r", steps=1), 1, address),
    }
    with pytest.raises(ConfigError, match="found nothing that takes connections there"):
        calls[command]()
    assert not ray_stage._connections  # nothing to leave later
