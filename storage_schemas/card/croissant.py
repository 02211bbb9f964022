"""The artifact's croissant.json: Croissant 1.0 metadata (mlcommons.org/croissant).

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

# The context that the specification gives.
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{
        name: f"cr:{name}"
        for name in (
            *("citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet"),
            *("format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet"),
            *("references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField"),
            "transform",
        )
    },
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
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
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"datamerge-{facts['plan_sha256'][:12]}",
        "description": describe(facts),
        "license": license_of(facts),
        "version": f"{facts['schema_version']}.0.0",
        "distribution": _distribution(facts["format"], files),
        "recordSet": [_groups(facts)],
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
    """One record a group, read from the sidecars; arrays are described, Croissant has no reader for them."""
    fields = [_field("key", "sc:Text", "Key of the group."), _field("count", "sc:Integer", "Samples in the group.")]
    if facts["labelled"] == facts["groups"]:
        fields.append(_field("label", "sc:Integer", "Class index."))
    arrays = ", ".join(f"{name} {spec['dtype']} {spec['shape']}" for name, spec in facts["arrays"].items())
    return {
        "@type": "cr:RecordSet",
        "@id": "groups",
        "name": "groups",
        "description": f"Groups of samples. Each has these arrays in the shards: {arrays}.",
        "key": {"@id": "groups/key"},
        "field": fields,
    }


def _field(name: str, kind: str, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"groups/{name}",
        "name": f"groups/{name}",
        "description": description,
        "dataType": kind,
        "source": {"fileSet": {"@id": "sidecars"}, "extract": {"jsonPath": f"$.records[*].{name}"}},
    }
