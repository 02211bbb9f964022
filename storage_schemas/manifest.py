"""The JSON documents of an artifact: `manifest.json` and one commit sidecar per shard.

Parsing is strict: an unknown key, a wrong type or an unknown version is an error, and all problems of a
document are reported at once with their paths. FORMAT.md describes every field.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from storage_schemas.errors import SchemaError

SCHEMA_VERSION: Final = 1
MANIFEST = "manifest.json"
HEAD = "head.safetensors"

Format = Literal["zarr", "webdataset"]
EncodingName = Literal["float32", "uint8_moments"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RelativePath = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*$")]
Count = Annotated[int, Field(ge=0)]


class Document(BaseModel):
    """A strict, immutable JSON document."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants")


class ArraySpec(Document):
    """One array of every record: its name, little-endian dtype and shape per record."""

    name: Literal["sum", "scatter", "mean", "mean_square", "target", "members", "clean"]
    dtype: Literal["uint8", "uint16", "uint32", "uint64", "float32"]
    shape: tuple[Annotated[int, Field(ge=1)], ...]

    @classmethod
    def of(cls, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> ArraySpec:
        """A spec from a numpy dtype; raises ValidationError for names and dtypes outside the format."""
        return cls.model_validate({"name": name, "dtype": dtype.name, "shape": shape})

    @property
    def nbytes(self) -> int:
        """Bytes of one record's array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Layout(Document):
    """All that a shard writer needs to know: physical format, encoding, arrays and the shard grid."""

    format: Format
    encoding: EncodingName
    arrays: tuple[ArraySpec, ...]
    groups: Annotated[int, Field(ge=1, description="planned groups, rejected ones included")]
    groups_per_shard: Annotated[int, Field(ge=1)]

    @property
    def shards(self) -> int:
        """Number of planned shards."""
        return -(-self.groups // self.groups_per_shard)

    @property
    def bytes_per_record(self) -> int:
        """Uncompressed bytes of one record's arrays."""
        return sum(array.nbytes for array in self.arrays)

    def array(self, name: str) -> ArraySpec | None:
        return next((array for array in self.arrays if array.name == name), None)


class FileEntry(Document):
    """A file of the artifact, its size and hash."""

    path: RelativePath
    bytes: Count
    sha256: Sha256


class RecordEntry(Document):
    """What a commit says of one record.

    `checksums` are the crc32c of each array's little-endian bytes, the same in every format.
    `offsets` (webdataset only) are the positions of the raw array data inside the tar file.
    """

    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+$")]
    count: Annotated[int, Field(ge=1)]
    label: int | None
    samples: tuple[str, ...]
    checksums: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]]
    offsets: dict[str, Count] | None
    info: dict[str, float]


class Reject(Document):
    """A sample that could not be used, and why."""

    key: str
    sample: str
    reason: str


class Ranges(Document):
    """Extremes of a shard's moments in [0, 1] pixel units, and how often the variance had to be clipped."""

    mean_min: float
    mean_max: float
    variance_max: float
    variance_mean: float
    clipped_variances: Count


class Commit(Document):
    """The sidecar that makes a shard exist; written last."""

    schema_version: Literal[1]
    shard: Annotated[int, Field(ge=0)]
    plan_sha256: Sha256
    files: tuple[FileEntry, ...]
    records: tuple[RecordEntry, ...]
    rejects: tuple[Reject, ...]
    ranges: Ranges | None

    @property
    def bytes(self) -> int:
        """Bytes of the shard's files."""
        return sum(file.bytes for file in self.files)


class ShardEntry(Document):
    """What the manifest says of one committed shard."""

    shard: Annotated[int, Field(ge=0)]
    groups: Count
    rejected: Count
    bytes: Count
    commit_sha256: Sha256


class Manifest(Document):
    """`manifest.json`: the layout, where the groups come from, and the shards that are committed."""

    schema_version: Literal[1]
    writer: str
    complete: bool
    layout: Layout
    plan_sha256: Sha256
    provenance: dict[str, JsonValue]
    files: tuple[FileEntry, ...]
    shards: tuple[ShardEntry, ...]

    @property
    def groups(self) -> int:
        """Groups that are committed."""
        return sum(shard.groups for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all committed shards."""
        return sum(shard.bytes for shard in self.shards)


D = TypeVar("D", bound=Document)


def parse(model: type[D], data: bytes | str, where: str) -> D:
    """Parse a JSON document.

    Raises:
        SchemaError: names the release needed for an unknown version, else lists every problem with its path.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    for problem in problems:
        if problem["loc"] == ("schema_version",) and isinstance(problem["input"], int):
            raise SchemaError(
                f"{where}: schema_version {problem['input']} is not one this release reads "
                f"(it reads {SCHEMA_VERSION}); install a newer datamerge"
            )
    details = "; ".join(f"{_dotted(p['loc'])}: {p['msg']}" for p in problems)
    raise SchemaError(f"{where}: {len(problems)} problem(s): {details}")


def dump(document: Document) -> bytes:
    """Serialise a document; the same document always gives the same bytes."""
    return document.model_dump_json(indent=1).encode() + b"\n"


def _dotted(location: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in location) or "document"
