"""The artifact format: records of merged groups, and their storage, writing and reading.

Imports neither torch nor Ray, and no image library. FORMAT.md beside this file is the specification. Functions on
whole artifacts are in `storage_schemas.operations`, `storage_schemas.card` and `storage_schemas.verify`.
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
    printable,
    shortened,
)
from storage_schemas.schema.exact import pixel_spread
from storage_schemas.schema.factors import FactorKind, factor_spec, stored_factors
from storage_schemas.schema.head import parse_head
from storage_schemas.schema.manifest import ArraySpec, Commit, EncodingName, Format, Layout, Manifest, Reject
from storage_schemas.schema.moments import LEVELS, ExactMoments, two_pass_moments
from storage_schemas.schema.pixel_length import PixelLength, Radius
from storage_schemas.schema.plain_json import read_json
from storage_schemas.schema.record import Array, Record, encode_exact, moment_specs
from storage_schemas.schema.run import RunSummary, read_summary
from storage_schemas.schema.seeds import group_seed
from storage_schemas.writer import ArtifactWriter

__all__ = [
    "LEVELS",
    "Array",
    "ArraySpec",
    "Artifact",
    "ArtifactWriter",
    "Cache",
    "Commit",
    "ConfigError",
    "CorruptShard",
    "DatamergeError",
    "EncodingName",
    "ExactMoments",
    "FactorKind",
    "Format",
    "Layout",
    "Location",
    "Manifest",
    "NotAnArtifact",
    "PixelLength",
    "Radius",
    "Record",
    "Reject",
    "RunSummary",
    "SchemaError",
    "SourceError",
    "UnknownVersion",
    "UserError",
    "encode_exact",
    "factor_spec",
    "group_seed",
    "moment_specs",
    "open_artifact",
    "parse_head",
    "pixel_spread",
    "printable",
    "read_json",
    "read_summary",
    "redact",
    "shortened",
    "stored_factors",
    "two_pass_moments",
]
