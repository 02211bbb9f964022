"""JSON documents are parsed strictly, and one error lists all their problems."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage_schemas import Commit, CorruptShard, Layout, Manifest, Record, SchemaError, UnknownVersion, open_artifact
from storage_schemas.schema.manifest import UNSEALED, dump, parse
from tests.support.refusals import refused

Edit = Callable[[dict[str, Any]], Any]


def _sealed(document: dict[str, Any]) -> bytes:
    """The JSON of a document with a new seal, as FORMAT.md describes it."""
    data = json.dumps({**document, "self_sha256": UNSEALED}).encode()
    assert data.startswith(b'{"self_sha256": "')
    return data.replace(UNSEALED.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


@pytest.fixture
def manifest(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Callable[..., list[Record]]
) -> dict[str, Any]:
    """The JSON of a real manifest."""
    write_artifact(tmp_path / "a", make_layout("webdataset"), (1,))
    document: dict[str, Any] = json.loads((tmp_path / "a" / "manifest.json").read_text())
    return document


def test_documents_round_trip(tmp_path: Path, manifest: dict[str, Any]) -> None:
    models: list[tuple[str, type[Manifest] | type[Commit]]] = [
        ("manifest.json", Manifest),
        ("commits/00000.json", Commit),
    ]
    for path, model in models:
        data = (tmp_path / "a" / path).read_bytes()
        assert dump(parse(model, data, path)) == data


@pytest.mark.parametrize(
    ("edit", "path"),
    [
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["layout"].update(surprise=1), "layout.surprise"),
        (lambda m: m["layout"].update(format="parquet"), "layout.format"),
        (lambda m: m["layout"].update(encoding="float16"), "layout.encoding"),
        (lambda m: m["layout"].update(groups="7"), "layout.groups"),
        (lambda m: m["layout"].update(groups=7.0), "layout.groups"),
        (lambda m: m["layout"].update(groups=0), "layout.groups"),
        (lambda m: m["layout"].update(groups_per_shard=0), "layout.groups_per_shard"),
        (lambda m: m["layout"]["arrays"][0].update(dtype="float8"), "layout.arrays.0.dtype"),
        (lambda m: m["layout"]["arrays"][0].update(name="Sum.x"), "layout.arrays.0.name"),
        (lambda m: m["layout"]["arrays"][0].update(name="median"), "layout"),
        (lambda m: m["layout"]["arrays"][2].update(name="sum"), "layout"),
        (lambda m: m["layout"]["arrays"][2].update(name="count"), "layout"),
        (lambda m: m["layout"]["arrays"][1].update(shape=[3, 0, 5]), "layout.arrays.1.shape.1"),
        (lambda m: m.update(complete="yes"), "complete"),
        (lambda m: m.update(complete=1), "complete"),
        (lambda m: m.update(plan_sha256="abc"), "plan_sha256"),
        (lambda m: m.pop("shards"), "shards"),
        (lambda m: m["shards"][2].update(bytes=-1), "shards.2.bytes"),
        (lambda m: m["shards"][0].update(commit_sha256="Z" * 64), "shards.0.commit_sha256"),
        (lambda m: m.update(files=[{"path": "../../etc/passwd", "bytes": 1, "sha256": "0" * 64}]), "files.0.path"),
        (lambda m: m.update(files=[{"path": "/etc/passwd", "bytes": 1, "sha256": "0" * 64}]), "files.0.path"),
        (lambda m: m.update(files=[{"path": "a//b", "bytes": 1, "sha256": "0" * 64}]), "files.0.path"),
    ],
)
def test_every_deviation_is_refused_with_its_path(manifest: dict[str, Any], edit: Edit, path: str) -> None:
    parse(Manifest, _sealed(manifest), "here")
    edit(manifest)
    with refused(SchemaError, None, "here/manifest.json: 1 ", f" {path}: "):
        parse(Manifest, _sealed(manifest), "here/manifest.json")


def test_all_problems_are_listed(manifest: dict[str, Any]) -> None:
    manifest["layout"]["groups"] = "seven"
    manifest["shards"][1]["groups"] = None
    manifest["writer"] = 3
    del manifest["provenance"]
    paths = ("layout.groups", "shards.1.groups", "writer", "provenance")
    with refused(SchemaError, None, "m: 4 ", *(f" {path}: " for path in paths)):
        parse(Manifest, _sealed(manifest), "m")


@pytest.mark.parametrize("found", [2, 0, 99])
def test_an_unknown_version_is_named_first(tmp_path: Path, manifest: dict[str, Any], found: int) -> None:
    """A newer release also has keys that this one does not know; the message does not list them."""
    manifest.update(schema_version=found, writer="datamerge 7.1", new_in_version_2=True)
    (tmp_path / "a" / "manifest.json").write_bytes(_sealed(manifest))
    with refused(UnknownVersion, None, tmp_path / "a", f"schema_version {found} ", " 1)", "datamerge 7.1") as caught:
        open_artifact(tmp_path / "a")
    assert "new_in_version_2" not in str(caught.value)
    del manifest["writer"]
    with refused(UnknownVersion, None, "m: ", f"schema_version {found} ", " 1)") as caught:
        parse(Manifest, _sealed(manifest), "m")
    assert "7.1" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema_version": 1', b'"text"'])
def test_malformed_documents_are_schema_errors(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with refused(SchemaError, None, tmp_path / "manifest.json"):
        open_artifact(tmp_path)


@pytest.mark.parametrize("edit", [lambda m: m.pop("schema_version"), lambda m: m.update(schema_version="1")])
def test_a_version_that_is_no_integer_is_refused(manifest: dict[str, Any], edit: Edit) -> None:
    edit(manifest)
    with refused(SchemaError, None, "m: ", " schema_version: "):
        parse(Manifest, _sealed(manifest), "m")


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "ä", "a b"])
def test_keys_that_tar_or_zarr_would_mangle_are_refused(tmp_path: Path, manifest: dict[str, Any], key: str) -> None:
    commit = json.loads((tmp_path / "a" / "commits" / "00000.json").read_text())
    commit["records"][0]["key"] = key
    with refused(SchemaError, None, "c: ", " records.0.key: "):
        parse(Commit, _sealed(commit), "c")


def test_documents_cannot_be_changed(manifest: dict[str, Any]) -> None:
    document = parse(Manifest, _sealed(manifest), "m")
    with pytest.raises(ValueError, match="frozen"):
        document.complete = False  # type: ignore[misc]
    assert document.groups == 6
    assert document.layout.shards == 3
    assert document.layout.bytes_per_record == 3 * 4 * 5 * (2 + 4) + 6 * 4 + 5 * 60


@pytest.mark.parametrize("path", ["manifest.json", "commits/00000.json"])
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, manifest: dict[str, Any], path: str) -> None:
    """The seal covers every byte, including its own digits and white space: one bit of each byte is flipped."""
    data = (tmp_path / "a" / path).read_bytes()
    model: type[Manifest] | type[Commit] = Manifest if path == "manifest.json" else Commit
    rng = np.random.default_rng(5)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        with pytest.raises((SchemaError, CorruptShard), match="m: "):
            parse(model, bytes(damaged), "m")


def test_a_damaged_version_is_reported_as_damage(tmp_path: Path, manifest: dict[str, Any]) -> None:
    data = (tmp_path / "a" / "manifest.json").read_bytes().replace(b'"schema_version": 1', b'"schema_version": 3')
    with refused(CorruptShard, None, "m: ", "sha256"):
        parse(Manifest, data, "m")


def test_the_seal_is_the_hash_of_the_file_without_it(tmp_path: Path, manifest: dict[str, Any]) -> None:
    """Also if the same digits occur elsewhere in the document."""
    manifest["provenance"]["encoder"] = {"sha256": UNSEALED, "self_sha256": UNSEALED}
    data = dump(parse(Manifest, _sealed(manifest), "m"))
    digits = json.loads(data)["self_sha256"]
    assert hashlib.sha256(data.replace(digits.encode(), UNSEALED.encode())).hexdigest() == digits
    assert parse(Manifest, data, "m").provenance["encoder"] == {"sha256": UNSEALED, "self_sha256": UNSEALED}
