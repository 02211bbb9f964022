"""Joining a Ray cluster: mistyped addresses are refused at once, and a caller's connection is left alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datamerge.runtime.ray import call_in_worker, check_cluster_address, connected, ray_environment
from merge_service import MergeConfig
from merge_service.ray_stage import on_ray
from storage_schemas import ConfigError
from tests.support.refusals import refused
from trainer import TrainConfig, train


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is bound but has no listener."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_addresses_without_a_listener_are_refused(port: int, form: str) -> None:
    address = form.format(f"127.0.0.1:{port}")
    with refused(ConfigError, "ray_address", repr(address)):
        check_cluster_address(address)


def test_unknown_host_names_are_refused() -> None:
    with refused(ConfigError, "ray_address", "'no-such-host.invalid:6379'"):
        check_cluster_address("no-such-host.invalid:6379")


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_addresses_with_a_listener_are_accepted(port: int, form: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_cluster_address(form.format(f"127.0.0.1:{server.getsockname()[1]}"))


@pytest.mark.parametrize("address", ["auto", "local", "127.0.0.1", "ray://host"])
def test_other_addresses_are_left_to_ray(address: str) -> None:
    check_cluster_address(address)


@pytest.mark.parametrize("command", ["merge", "train"])
def test_commands_with_an_unreachable_address_end_at_once(
    port: int, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests may be connected
    monkeypatch.setattr("ray.shutdown", lambda: pytest.fail("there is nothing to leave"))
    address = f"127.0.0.1:{port}"

    def merge() -> None:
        with on_ray(MergeConfig(source="s", artifact="a", encoder="mlp:3x4x4-2", ray_address=address)):
            pytest.fail("nobody is there")

    calls: dict[str, Callable[[], object]] = {
        "merge": merge,
        "train": lambda: train(TrainConfig(artifact="a", run="r", steps=1, ray_address=address)),
    }
    with refused(ConfigError, "ray_address", repr(address)):
        calls[command]()


def test_a_connection_of_the_caller_is_used_and_kept(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with another address, because a process has one connection to Ray."""
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    for name in ("init", "shutdown"):
        monkeypatch.setattr(f"ray.{name}", lambda **_: pytest.fail("the connection is not ours"))
    with connected(f"127.0.0.1:{port}", 1):
        pass


def test_variables_of_the_user_are_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    assert ray_environment({"RAY_X": "1"}).items() >= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_X": "1"}.items()
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.setenv("RAY_X", "2")
    assert not ray_environment({"RAY_X": "1"}).keys() & {"RAY_USAGE_STATS_ENABLED", "RAY_X"}


def test_a_call_for_a_worker_searches_the_users_folders_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is pickled by value: a module of ours would be imported before the search path is set."""
    from ray import cloudpickle

    (tmp_path / "script").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script" / "mine.py")])
    sent = cloudpickle.dumps(call_in_worker("builtins:sorted", [3, 1, 2]))
    assert not any(name in sent for name in (b"merge_service", b"storage_schemas"))
    users = [str(tmp_path), str(tmp_path / "script")]
    monkeypatch.setattr(sys, "path", [*users, *sys.path])
    before = list(sys.path)
    assert cloudpickle.loads(sent)() == [1, 2, 3]
    assert sys.path[-2:] == users
    assert sorted(sys.path) == sorted(before)


UNDER_UV = """
import os, sys
import ray  # before us, as a user's script may
from datamerge.runtime.ray import _obey_uv_run, ray_environment
os.environ.update(ray_environment())
_obey_uv_run()
from ray._private.worker import _maybe_modify_runtime_env
sys.exit(7 if "working_dir" in (_maybe_modify_runtime_env({}, False) or {}) else 0)
"""


@pytest.mark.parametrize(("setting", "copied"), [(None, False), ("1", True)])
def test_uv_run_does_not_copy_the_working_directory(tmp_path: Path, setting: str | None, copied: bool) -> None:
    """Ray looks for a parent process called `uv run`; here it is a shell of that name with a script `run`."""
    (tmp_path / "script.py").write_text(UNDER_UV)
    (tmp_path / "run").write_text(f"{sys.executable} script.py\nexit $?\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("RAY_ENABLE_UV_RUN_RUNTIME_ENV", None)
    if setting is not None:
        environment["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = setting
    done = subprocess.run(
        ["uv", "run"], executable="/bin/sh", cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == (7 if copied else 0), done.stderr
