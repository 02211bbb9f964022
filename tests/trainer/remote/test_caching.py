"""The cache that a remote artifact is read through, and messages about it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from storage_schemas import ConfigError
from tests.support.refusals import refused
from tests.support.servers import WebServer
from trainer.data.blend import Blend
from trainer.data.caching import LIMIT, SHARE, check_room, opened

MakeArtifact = Callable[..., str]


@pytest.fixture
def url(web: WebServer, make_artifact: MakeArtifact) -> str:
    make_artifact(name="web/a", format="webdataset")
    return f"{web.url}/a"


def test_remote_artifacts_have_a_cache_unless_it_is_disabled(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATAMERGE_CACHE", str(tmp_path / "mine"))
    artifact = opened(url, None, None)
    disk = os.statvfs(tmp_path)
    assert artifact.cache_bytes == pytest.approx(min(LIMIT, SHARE * disk.f_bavail * disk.f_frsize), rel=0.2)
    assert (tmp_path / "mine/artifacts").is_dir()
    assert opened(url, None, 12_345).cache_bytes == 12_345
    assert opened(url, str(tmp_path / "other"), 10**9).cache_bytes == 10**9
    assert opened(url, "none", None).cache_bytes == 0
    said = capsys.readouterr().err.splitlines()
    places = [str(tmp_path / "mine/artifacts"), str(tmp_path / "mine/artifacts"), str(tmp_path / "other"), "none"]
    assert all(url in line and place in line for line, place in zip(said, places, strict=True))


def test_local_artifacts_have_no_cache_and_no_message(
    make_artifact: MakeArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opened(make_artifact(), str(tmp_path / "cache"), None).cache_bytes == 0
    assert not (tmp_path / "cache").exists()
    assert capsys.readouterr().err == ""


def test_an_impossible_folder_is_refused_only_if_it_was_set(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with refused(ConfigError, "cache", str(tmp_path / "file")):
        opened(url, str(tmp_path / "file"), None)
    monkeypatch.setenv("DATAMERGE_CACHE", str(tmp_path / "file"))
    assert opened(url, None, None).cache_bytes == 0
    assert "nothing is kept" in capsys.readouterr().err


def test_a_warning_about_a_small_cache_names_remedies(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sum(path.stat().st_size for path in (tmp_path / "web/a/shards").iterdir())
    check_room(Blend([opened(url, str(tmp_path / "cache"), files)]))
    assert "WARNING" not in capsys.readouterr().err
    check_room(Blend([opened(url, str(tmp_path / "cache"), files - 1)]))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    for remedy in ("`cache_bytes=1GB`", "`shuffle_window`", '`cache="none"`'):
        assert remedy in line
