"""Artifacts of every schema version stay readable, by this package and by a reader written from FORMAT.md alone."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from storage_schemas import Location, open_artifact
from storage_schemas.schema.json_schema import FOLDER, schemas
from storage_schemas.verify import verify
from tests.golden import make
from tests.support import minimal_reader
from tests.support.paths import GOLDEN, SUPPORT

ARTIFACTS = sorted(path.parent for path in GOLDEN.glob("v*/*/manifest.json"))
EPS32 = float(np.finfo(np.float32).eps)

golden = pytest.mark.parametrize("folder", ARTIFACTS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")


def _values(folder: Path) -> tuple[tuple[int, ...], dict[str, Any]]:
    document = json.loads((folder.parent / "values.json").read_text())
    return tuple(document["shape"]), document["groups"]


def _check_moments(folder: Path, found: dict[str, Any], expected: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Exact up to float32 rounding; a variance of the float32 encoding has the mean square's rounding error too."""
    for name in ("mean", "mean_square", "variance"):
        values = np.reshape(expected[name], shape)
        lost = 2 * EPS32 if "float32" in folder.name and name == "variance" else 1e-15
        np.testing.assert_allclose(found[name], values, rtol=EPS32, atol=lost)


def test_every_kind_of_artifact_has_a_golden_one() -> None:
    names = {folder.name for folder in ARTIFACTS if folder.parent.name == "v1"}
    formats, encodings, kinds = ("zarr", "webdataset"), ("uint8_moments", "float32"), ("full", "bare")
    assert names == {f"{f}-{e}-{k}" for f in formats for e in encodings for k in kinds}


@golden
def test_golden_artifacts_are_read(folder: Path) -> None:
    shape, groups = _values(folder)
    artifact = open_artifact(folder)
    assert [record.key for record in artifact] == list(groups)
    for record in artifact:
        expected = groups[record.key]
        assert (record.count, list(record.samples)) == (expected["count"], expected["samples"])
        moments = {name: getattr(record, name) for name in ("mean", "mean_square", "variance")}
        _check_moments(folder, moments, expected, shape)
        if folder.name.endswith("bare"):
            assert (record.label, record.target, record.members, record.clean) == (None, None, None, None)
            continue
        assert record.label == expected["label"]
        np.testing.assert_array_equal(record.target, expected["target"])
        np.testing.assert_array_equal(record.members, expected["members"])
        np.testing.assert_array_equal(record.clean, expected["members"][0])
    head = artifact.head()
    assert (head is not None) == folder.name.endswith("full")
    if head is not None:
        np.testing.assert_array_equal(head[0]["weight"], np.arange(8).reshape(2, 4) / 8)
        assert head[1] == ["cat", "dog"]
    rejects = [reject for position in (0, 1) for reject in artifact.commit(position).rejects]
    assert [(reject.key, reject.sample) for reject in rejects] == [("dog_1", "dogs/ünï 1.png")]
    report = verify(Location(folder))
    assert (report.problems, report.groups) == ([], 4)


@golden
def test_the_minimal_reader_reads_golden_artifacts(folder: Path) -> None:
    shape, groups = _values(folder)
    records = list(minimal_reader.read(folder))
    assert [record["key"] for record in records] == list(groups)
    for record in records:
        expected = groups[record["key"]]
        assert (record["count"], record["samples"]) == (expected["count"], expected["samples"])
        _check_moments(folder, record, expected, shape)
        full = folder.name.endswith("full")
        assert record["label"] == (expected["label"] if full else None)
        assert ("members" in record) == full
        if full:
            np.testing.assert_array_equal(record["target"], expected["target"])
            np.testing.assert_array_equal(record["members"], expected["members"])
            np.testing.assert_array_equal(record["clean"], expected["members"][0])


def test_the_minimal_reader_is_small_and_does_not_import_this_package() -> None:
    text = (SUPPORT / "minimal_reader.py").read_text()
    assert len(text.splitlines()) <= 80
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert imported <= {"numpy", "json", "tarfile", "zarr", "pathlib", "typing", "collections.abc"}


def test_the_writer_reproduces_the_golden_artifacts(tmp_path: Path) -> None:
    """Every byte except those that name the release and those that the Zarr and Blosc libraries choose."""
    make.write_all(tmp_path)
    current = GOLDEN / "v1"
    paths = sorted(path.relative_to(current) for path in current.rglob("*") if path.is_file())
    assert paths == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for path in paths:
        new, old = (tmp_path / path).read_bytes(), (current / path).read_bytes()
        if path.name == "manifest.json":
            documents = [json.loads(new), json.loads(old)]
            for document in documents:
                for field in ("writer", "self_sha256", "files", "shards"):
                    del document[field]
            assert documents[0] == documents[1]
        elif path.name == "zarr.json":
            assert json.loads(new) == json.loads(old)
        elif not path.parts[0].startswith("zarr"):
            assert new == old, path


def test_the_shipped_schemas_are_those_of_the_models() -> None:
    """After a change of the models, run `python -m storage_schemas.schema.json_schema`."""
    assert {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")} == schemas()


@golden
def test_the_schemas_accept_every_golden_document_and_refuse_a_broken_one(folder: Path) -> None:
    documents = {"manifest-1": [folder / "manifest.json"], "commit-1": sorted((folder / "commits").iterdir())}
    for name, paths in documents.items():
        schema = json.loads((FOLDER / f"{name}.schema.json").read_text())
        validator = jsonschema.Draft202012Validator(schema)
        for path in paths:
            document = json.loads(path.read_text())
            validator.validate(document)
            for change in ({"surprise": 1}, {"schema_version": 2}, {"plan_sha256": "short"}):
                assert not validator.is_valid({**document, **change})
