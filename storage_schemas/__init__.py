"""The artifact contract: what a merged group is, how it is stored, and how anyone reads it back.

Imports neither torch nor Ray. FORMAT.md beside this file is the specification.
"""

from storage_schemas.access.cache import Cache
from storage_schemas.access.location import Location
from storage_schemas.access.redaction import redact
from storage_schemas.artifact import Artifact, open_artifact
from storage_schemas.errors import (
    ConfigError,
    CorruptShard,
    DatamergeError,
    NotAnArtifact,
    SchemaError,
    SourceError,
    UnknownVersion,
    UserError,
    shortened,
)
from storage_schemas.schema.manifest import ArraySpec, Commit, Layout, Manifest, Reject
from storage_schemas.schema.moments import ExactMoments, two_pass_moments
from storage_schemas.schema.plain_json import read_json
from storage_schemas.schema.record import Record
from storage_schemas.writer import ArtifactWriter

__all__ = [
    "ArraySpec",
    "Artifact",
    "ArtifactWriter",
    "Cache",
    "Commit",
    "ConfigError",
    "CorruptShard",
    "DatamergeError",
    "ExactMoments",
    "Layout",
    "Location",
    "Manifest",
    "NotAnArtifact",
    "Record",
    "Reject",
    "SchemaError",
    "SourceError",
    "UnknownVersion",
    "UserError",
    "open_artifact",
    "read_json",
    "redact",
    "shortened",
    "two_pass_moments",
]
