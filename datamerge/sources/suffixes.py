"""What a file is by the end of its name, and by its first bytes where the name does not say."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Literal

Kind = Literal["image", "parquet", "tar", "arrow", "array"]

# Every suffix that Pillow registers for the formats of `images.FORMATS`; the usual ones first, messages show those.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".jpe", ".jfif", ".mpo", ".apng", ".pbm", ".pnm", ".pfm", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".icb", ".vda", ".vst", ".ico"),
)
HEIF = (".heic", ".heics", ".heif", ".heifs", ".hif")
HEIF_PACKAGE = "pillow_heif"
PARQUET, TAR, ARROW = (".parquet",), (".tar",), (".arrow",)
ARRAYS = (".npz", ".npy", ".idx", "ubyte")
# What we cannot read in pieces → what a user does about it.
PACKED = {
    **dict.fromkeys(
        (".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tbz", ".tar.lz4"),
        "compressed tars have no byte ranges; decompress it to a .tar, or unpack it and name the folder",
    ),
    ".zip": "zip archives are not read; unpack it and name the folder",
    ".7z": "7z archives are not read; unpack it and name the folder",
    ".rar": "rar archives are not read; unpack it and name the folder",
}
NO_SUFFIX = "without a suffix"

_KINDS: dict[str, Kind] = {
    **dict.fromkeys(EXTENSIONS, "image"),
    **dict.fromkeys(PARQUET, "parquet"),
    **dict.fromkeys(TAR, "tar"),
    **dict.fromkeys(ARROW, "arrow"),
    **dict.fromkeys(ARRAYS[:3], "array"),
}
# Bytes that files begin with, of formats that the decoder reads; TGA has none.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
_JPEG2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
MAGIC_BYTES = 16
CONTENT_BYTES = 512
# Of archives and tables: where in the file, what is there, and what it then is.
_CONTENTS: tuple[tuple[int, bytes, Kind], ...] = (
    (0, b"PAR1", "parquet"),
    (0, b"ARROW1", "arrow"),
    (0, b"\xff\xff\xff\xff", "arrow"),
    (0, b"\x93NUMPY", "array"),
    (257, b"ustar", "tar"),
)
# What a file of another kind in place of a tar begins with.
PACKED_MAGIC = {
    b"\x1f\x8b": ".tar.gz",
    b"(\xb5/\xfd": ".tar.zst",
    b"\xfd7zXZ\0": ".tar.xz",
    b"BZh": ".tar.bz2",
    b'\x04"M\x18': ".tar.lz4",
    b"PK\x03\x04": ".zip",
    b"7z\xbc\xaf": ".7z",
    b"Rar!": ".rar",
}


def suffix_of(name: str) -> str:
    """The suffix of a file's name in lower case, with its dot; empty if there is none."""
    stem, _, suffix = name.rpartition("/")[2].rpartition(".")
    # `photo.2021` and `a. b` have none: those are not the names of formats.
    return f".{suffix.lower()}" if stem and suffix.isalnum() and not suffix.isdigit() else ""


def kind_of(name: str) -> Kind | None:
    """What a file's name says that it holds; None for what we do not read."""
    suffix = suffix_of(name)
    kind = _KINDS.get(suffix)
    if kind is None:
        if suffix in HEIF and reads_heif():
            return "image"
        if name[-8:].lower().removesuffix(".gz").endswith("ubyte") or name.lower().endswith(".idx.gz"):
            return "array"
    return kind


def packed_suffix(name: str) -> str | None:
    """The suffix of an archive that has to be unpacked first."""
    lower = name.lower()
    return next((suffix for suffix in PACKED if lower.endswith(suffix)), None)


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins with these bytes is an image of a format that the decoder reads."""
    return (
        head.startswith(_MAGIC)
        or head.startswith(_JPEG2000)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:12] in (b"ftypavif", b"ftypavis"))
        or (head[:1] == b"P" and head[1:2] in b"1234567" and head[2:3] in b" \t\r\n" and len(head) > 3)
    )


def kind_of_content(head: bytes) -> Kind | None:
    """What a file that begins with these `CONTENT_BYTES` holds, whatever its name is."""
    found = (kind for start, magic, kind in _CONTENTS if head[start : start + len(magic)] == magic)
    return next(found, "image" if looks_like_image(head) else None)


@cache
def reads_heif() -> bool:
    """Whether the package that teaches Pillow HEIC and HEIF is installed."""
    return importlib.util.find_spec(HEIF_PACKAGE) is not None


def register_heif() -> None:
    """Teach Pillow HEIC and HEIF, where the package that does is installed."""
    if reads_heif():
        importlib.import_module(HEIF_PACKAGE).register_heif_opener()


def describe(suffix: str) -> str:
    """A suffix as a reason for leaving its files out, with the remedy where there is one."""
    if suffix in HEIF:
        return f"{suffix} (pip install 'datamerge[heif]' reads them)"
    return suffix or NO_SUFFIX
