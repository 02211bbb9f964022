"""The artifact's croissant.json: Croissant 1.1 metadata (mlcommons.org/croissant).

Files are described as sets, so that the document stays small; files of artifacts with few files are listed one
by one with their sha256 too. Hashes of all others are in the sidecars, whose own are in manifest.json, which
holds the hash of this document and hence cannot be hashed in it. How the groups were made stands in manifest.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from storage_schemas.card.dataset_card import describe, license_of
from storage_schemas.schema.manifest import FileEntry, Format
from storage_schemas.stores import STORES

LISTED_FILES = 1000

# The context of the specification's first appendix, and the terms that mlcroissant adds. The appendix has
# http://schema.org/, for which mlcroissant finds no data set.
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{
        name: f"cr:{name}"
        for name in (
            *("annotation", "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "excludes"),
            *("extract", "field", "fileObject", "fileProperty", "fileSet", "format", "includes", "isArray"),
            *("isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "readLines", "recordSet"),
            *("references", "regex", "repeated", "replace", "samplingRate", "sdVersion", "separator", "source"),
            *("subField", "transform", "unArchive", "value"),
        )
    },
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}


def croissant(facts: Mapping[str, Any], files: Sequence[FileEntry]) -> bytes:
    """JSON-LD from the facts of `summarise`.

    Args:
        files: sidecars and shards, all of them or more than `LISTED_FILES`.
    """
    document = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": f"datamerge-{facts['plan_sha256'][:12]}",
        "description": describe(facts),
        "license": license_of(facts),
        "version": f"{facts['schema_version']}.0.0",
        "distribution": _distribution(facts["format"], files),
        "recordSet": [_groups(facts), _arrays(facts)],
    }
    return json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"


def _distribution(format: Format, files: Sequence[FileEntry]) -> list[dict[str, Any]]:
    store = STORES[format]
    sets = [
        _file_set("manifest", "manifest.json", "application/json", "Layout, provenance and hashes of all sidecars."),
        _file_set("sidecars", "commits/*.json", "application/json", "Facts, offsets and hashes of every shard."),
        _file_set(
            "shards",
            store.pattern,
            store.media_type,
            "Moments and targets of the groups; see README.md for how to read them.",
        ),
    ]
    return sets if len(files) > LISTED_FILES else sets + [_file_object(file, store.media_type) for file in files]


def _file_set(name: str, pattern: str, kind: str, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "description": description,
        "encodingFormat": kind,
        "includes": pattern,
    }


def _file_object(file: FileEntry, kind: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": file.path,
        "name": file.path,
        "contentUrl": file.path,
        "contentSize": f"{file.bytes} B",
        "encodingFormat": "application/json" if file.path.endswith(".json") else kind,
        "sha256": file.sha256,
    }


def _groups(facts: Mapping[str, Any]) -> dict[str, Any]:
    """One record a group, read from the sidecars."""
    fields = [
        _field("groups/key", "Key of the group.", "sc:Text", _sidecar("key")),
        _field("groups/count", "Samples in the group.", "sc:Integer", _sidecar("count")),
    ]
    if facts["labelled"] == facts["groups"]:
        fields.append(_field("groups/label", "Class index.", "sc:Integer", _sidecar("label")))
    return _record_set("groups", "Groups of samples.", fields) | {"key": {"@id": "groups/key"}}


def _arrays(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of one group. Tools of Croissant cannot read them, hence a record set of their own."""
    fields = []
    for name, spec in facts["arrays"].items():
        kind = "sc:Float" if spec["dtype"].startswith("float") else "sc:Integer"
        source = {"fileSet": {"@id": "shards"}}
        field = _field(f"arrays/{name}", "README.md says how it is read.", [_number(spec["dtype"]), kind], source)
        if spec["shape"]:
            field |= {"isArray": True, "arrayShape": ",".join(map(str, spec["shape"]))}
        fields.append(field)
    return _record_set("arrays", "Arrays of each group, in the order of the record set `groups`.", fields)


def _number(dtype: str) -> str:
    """Croissant's name of a numpy dtype: uint8 is cr:UInt8."""
    return f"cr:{dtype.replace('uint', 'UInt') if dtype.startswith('uint') else dtype.capitalize()}"


def _sidecar(name: str) -> dict[str, Any]:
    return {"fileSet": {"@id": "sidecars"}, "extract": {"jsonPath": f"$.records[*].{name}"}}


def _record_set(name: str, description: str, fields: list[dict[str, Any]]) -> dict[str, Any]:
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "description": description, "field": fields}


def _field(name: str, description: str, kind: str | list[str], source: dict[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": name,
        "name": name,
        "description": description,
        "dataType": kind,
        "source": source,
    }
