"""Malicious artifacts with correct seals: refused with a `DatamergeError`, or read as they are.

Checksums protect against accidents, not against a malicious writer, so every forged document here gets matching
hashes, up to the manifest's seal.
"""

from __future__ import annotations

import io
import json
import resource
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import Blosc
from safetensors.numpy import save

from datamerge.tools.inspection import inspect
from storage_schemas import (
    CorruptShard,
    DatamergeError,
    Layout,
    Location,
    SchemaError,
    UserError,
    open_artifact,
    redact,
)
from storage_schemas.operations.combine import plan_combination
from storage_schemas.schema.head import parse_head
from storage_schemas.schema.manifest import UNSEALED
from storage_schemas.schema.provenance import plan_sha256
from storage_schemas.verify import fix, verify
from tests.support.forging import forge, replace_file
from tests.support.paths import GOLDEN
from tests.support.refusals import refused

KINDS = ("webdataset-uint8_moments-full", "zarr-float32-full")
NUMBERS = (-1, 0, 1, 7, 2**31, 2**63, 2**70, 1e308, -0.5)
PATHS = (
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "a/../../b",
    "a\x00b",
    "C:\\x",
    "https://example.org/x",
    "Ω" * 10_000,
)
COUNTS = (10**15, 10**30)
OTHERS: tuple[Any, ...] = (
    True,
    None,
    "",
    "float64",
    "object",
    "NaN",
    "0" * 64,
    [],
    {},
    [[]],
    [-1],
    [2**40] * 3,
    [1] * 1000,
)
HOSTILE: tuple[Any, ...] = (*NUMBERS, *COUNTS, *PATHS, *OTHERS)
bounded = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Allow 2 GB beyond the memory in use: a forged size that allocates more was not refused early enough."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 1024**3, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _use(folder: Path) -> None:
    """Read and verify an artifact; only a `DatamergeError` may be raised, with a message short enough to read."""
    for look in (_read, lambda where: verify(Location(where))):
        try:
            look(folder)
        except DatamergeError as error:
            assert len(str(error)) < 20_000
            assert error.exit_code in (1, 2)


def _read_all(folder: Path) -> None:
    _read(folder)
    open_artifact(folder).head()


def _read(folder: Path) -> None:
    artifact = open_artifact(folder)
    for number in range(min(len(artifact), 10)):
        record = artifact[number]
        _ = record.mean, record.variance, record.target, record.members, record.clean


@pytest.mark.parametrize("kind", KINDS)
def test_forged_artifacts_have_valid_seals(tmp_path: Path, kind: str) -> None:
    """Otherwise the tests below would test broken seals only."""
    folder = Path(shutil.copytree(GOLDEN / "v1" / kind, tmp_path / "artifact"))
    forge(folder, lambda document: document["records"][0].update(label=3), "commits/00000.json")
    name = json.loads((folder / "commits/00000.json").read_bytes())["files"][0]["path"]
    replace_file(folder, name, (folder / name).read_bytes())
    forge(folder, lambda document: document["provenance"].update(note="forged"))
    _read(folder)
    assert open_artifact(folder).manifest.provenance["note"] == "forged"
    (problem,) = verify(Location(folder)).problems
    assert "plan_sha256" in problem.cause  # the hash of the plan, which `forge` leaves as it is


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _put(document: Any, path: tuple[Any, ...], value: Any) -> None:
    for step in path[:-1]:
        document = document[step]
    document[path[-1]] = value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["manifest.json", "commits/00000.json"])
@bounded
@given(data=st.data())
def test_a_forged_document_is_refused_or_read(kind: str, file: str, data: st.DataObject) -> None:
    document = json.loads((GOLDEN / "v1" / kind / file).read_bytes())
    places = [path for path in _places(document) if path != ("self_sha256",)]
    path, value = data.draw(st.sampled_from(places)), data.draw(st.sampled_from(HOSTILE))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(GOLDEN / "v1" / kind, Path(scratch) / "artifact"))
        forge(folder, lambda document: _put(document, path, value), file)
        _use(folder)
        assert sorted(item.name for item in Path(scratch).iterdir()) == ["artifact"]


@pytest.mark.parametrize("kind", KINDS)
@bounded
@given(data=st.data())
def test_forged_bytes_are_refused_or_read(kind: str, data: st.DataObject) -> None:
    files = sorted(
        str(file.relative_to(GOLDEN / "v1" / kind))
        for part in ("shards", "groups.zarr")
        for file in (GOLDEN / "v1" / kind / part).rglob("*")
        if file.is_file()
    )
    name = data.draw(st.sampled_from(files))
    content = bytearray((GOLDEN / "v1" / kind / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    length = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(GOLDEN / "v1" / kind, Path(scratch) / "artifact"))
        replace_file(folder, name, bytes(content[:length]))
        _use(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b'{"a":' * 200_000, b"", b"null", b"[]", b"\xff\xfe", b"{" + b" " * 10**6, b"1" * 10**6],
    ids=["deep-list", "deep-object", "empty", "null", "list", "not-utf8", "blank", "long-number"],
)
@pytest.mark.parametrize("file", ["manifest.json", "commits/00000.json", "head.safetensors"])
def test_malformed_files_raise_datamerge_errors_only(tmp_path: Path, kind: str, content: bytes, file: str) -> None:
    folder = Path(shutil.copytree(GOLDEN / "v1" / kind, tmp_path / "artifact"))
    (folder / file).write_bytes(content)
    _use(folder)
    with pytest.raises(DatamergeError):
        _read_all(folder)


@pytest.mark.parametrize("name", ["../escaped", "/tmp/datamerge-escaped", "a/../../escaped"])
def test_tar_members_are_never_extracted(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(GOLDEN / "v1" / KINDS[0], tmp_path / "artifact"))
    shard = folder / "shards" / "00000.tar"
    forged = io.BytesIO()
    with tarfile.open(shard) as old, tarfile.open(fileobj=forged, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for number, member in enumerate(old.getmembers()):
            data = old.extractfile(member)
            member.name = name if number == 0 else member.name
            new.addfile(member, data)
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        new.addfile(link)
    replace_file(folder, "shards/00000.tar", forged.getvalue())
    _use(folder)
    assert not (tmp_path / "escaped").exists()
    assert not Path("/tmp/datamerge-escaped").exists()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "v1" / "zarr-uint8_moments-full", tmp_path / "artifact"))


def test_counts_beyond_64_bits_are_refused(artifact: Path) -> None:
    forge(artifact, lambda manifest: manifest["shards"][0].update(groups=10**30))
    with refused(SchemaError, None, "shards.0.groups: ", 2**53 - 1):
        _read(artifact)


def test_more_groups_than_rows_are_refused(artifact: Path) -> None:
    forge(artifact, lambda commit: commit.update(records=commit["records"] * 3), "commits/00000.json")
    forge(artifact, lambda manifest: manifest["shards"][0].update(groups=3 * manifest["shards"][0]["groups"]))
    with refused(SchemaError, None, "shards: ", " 3 groups"):
        _read(artifact)


def test_a_shard_listed_twice_is_refused(artifact: Path) -> None:
    forge(artifact, lambda manifest: manifest.update(shards=manifest["shards"] * 2))
    with refused(SchemaError, None, "shards: ", "ascending", " 2"):
        _read(artifact)


def test_a_huge_number_of_planned_groups_is_harmless(artifact: Path) -> None:
    def plan(manifest: dict[str, Any]) -> None:
        manifest["layout"]["groups"] = 10**15
        manifest["complete"] = False

    forge(artifact, plan)
    layout = Layout.model_validate_json(json.dumps(json.loads((artifact / "manifest.json").read_bytes())["layout"]))
    found = plan_sha256(layout, json.loads((artifact / "manifest.json").read_bytes())["provenance"])
    for commit in sorted((artifact / "commits").iterdir()):
        forge(artifact, lambda document: document.update(plan_sha256=found), f"commits/{commit.name}")
    forge(artifact, lambda manifest: manifest.update(plan_sha256=found))
    assert not verify(Location(artifact)).problems


def test_a_chunk_that_claims_gigabytes_is_refused(artifact: Path) -> None:
    """Refused because of its header, before anything is unpacked; every checksum is correct."""
    bomb = bytearray(Blosc(cname="zstd").encode(np.zeros(1000, np.uint8)))
    bomb[4:8] = struct.pack("<I", 1800 * 2**20)
    chunk = bytes(bomb) + struct.pack("<I", google_crc32c.value(bytes(bomb)))
    rows = json.loads((artifact / "manifest.json").read_bytes())["layout"]["groups_per_shard"]
    index = struct.pack("<QQ", 0, len(chunk)) * rows
    name = "groups.zarr/sum/c/0/0/0/0"
    replace_file(artifact, name, chunk + index + struct.pack("<I", google_crc32c.value(index)))
    with refused(CorruptShard, None, name, "24 bytes", 1800 * 2**20):
        _ = open_artifact(artifact)[0]


@pytest.mark.parametrize("names", ["5", "{", "[" * 100_000, '{"a": 1}'])
def test_malformed_class_names_are_refused(artifact: Path, names: str) -> None:
    data = save({"weight": np.zeros((1, 2), np.float32)}, {"names": names})
    with refused(SchemaError, None, "head: ", "JSON", "class names"):
        parse_head(data, "head")


def test_fix_removes_nothing_outside_the_artifact(artifact: Path, tmp_path: Path) -> None:
    shutil.move(artifact / "commits", tmp_path / "outside")
    (artifact / "commits").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "00000.json").write_bytes(b"{}")
    location = Location(artifact)
    with refused(UserError, None, artifact / "commits" / "00000.json", tmp_path / "outside"):
        fix(location, verify(location))
    assert (tmp_path / "outside" / "00000.json").exists()


def test_a_device_is_not_read(artifact: Path) -> None:
    (artifact / "manifest.json").unlink()
    (artifact / "manifest.json").symlink_to("/dev/zero")
    with refused(CorruptShard, None, artifact / "manifest.json", " device"):
        _read(artifact)


@pytest.mark.parametrize("url", ["https://me:p@ss@host/a", "pipe:curl https://me:p%2Fss@host/a", "s3://k:s@@h/b"])
def test_no_part_of_a_password_is_shown(url: str) -> None:
    assert "ss" not in redact(url)
    assert "s@" not in redact(url).replace("***@", "")


ORIGIN = {"plan_sha256": UNSEALED, "groups": 1, "provenance": {}}


@pytest.mark.parametrize(
    ("provenance", "kind", "facts"),
    [
        ({"combined": "x"}, SchemaError, ("provenance.combined: ", "array")),
        ({"combined": [1]}, SchemaError, ("provenance.combined.0: ", "object")),
        ({"combined": []}, SchemaError, ("provenance.combined: ", "at least 1")),
        ({"combined": [{**ORIGIN, "provenance": 3}]}, SchemaError, ("provenance.combined.0.provenance: ", "object")),
        ({"combined": [{**ORIGIN, "groups": -1}]}, SchemaError, ("provenance.combined.0.groups: ", " 0")),
        ({"a": 1, "a.b": 2}, UserError, ("provenance: a.b: ", " a, ")),
        ({"attack": {"epsilon": "1/0"}}, SchemaError, ("attack.epsilon: ", "'1/0'")),
        ({"attack": {"epsilon": "1e999999999"}}, SchemaError, ("attack.epsilon: ", "'1e999999999'")),
    ],
)
def test_a_provenance_that_cannot_be_combined_is_refused(
    artifact: Path, tmp_path: Path, provenance: dict[str, Any], kind: type[DatamergeError], facts: tuple[str, ...]
) -> None:
    forge(artifact, lambda manifest: manifest.update(provenance=provenance))
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    with refused(kind, None, *facts):
        plan_combination([open_artifact(artifact), open_artifact(other)])


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_shows_unknown_provenance(tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(GOLDEN / "v1" / kind, tmp_path / "artifact"))
    forge(folder, lambda manifest: manifest.update(provenance={"x": [[1], {"y": None}]}))
    shown = CliRunner().invoke(inspect, [str(folder)], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "{'y': None}" in shown.output
