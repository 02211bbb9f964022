"""The kind of a file, from its suffix, or from its first bytes if the name does not tell."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Literal

Kind = Literal["image", "parquet", "tar", "arrow", "array"]

# All suffixes that Pillow registers for `images.FORMATS`; the common ones come first, as messages show those.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".jpe", ".jfif", ".mpo", ".apng", ".pbm", ".pnm", ".pfm", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".icb", ".vda", ".vst", ".ico"),
)
HEIF = (".heic", ".heics", ".heif", ".heifs", ".hif")
HEIF_PACKAGE = "pillow_heif"
PARQUET, TAR, ARROW = (".parquet",), (".tar",), (".arrow",)
ARRAYS = (".npz", ".npy", ".idx", "ubyte")
# Suffix of an archive without random access → the remedy.
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
# First bytes of files in the formats that the decoder reads; TGA has no fixed ones.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
_JPEG2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
MAGIC_BYTES = 16
CONTENT_BYTES = 512
# (offset, bytes at this offset, kind) of archives and tables.
_CONTENTS: tuple[tuple[int, bytes, Kind], ...] = (
    (0, b"PAR1", "parquet"),
    (0, b"ARROW1", "arrow"),
    (0, b"\xff\xff\xff\xff", "arrow"),
    (0, b"\x93NUMPY", "array"),
    (257, b"ustar", "tar"),
)
# First bytes of compressed files and archives that may be called .tar → their suffix.
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
    # `photo.2021` and `a. b` have no suffix, as these endings name no format.
    return f".{suffix.lower()}" if stem and suffix.isalnum() and not suffix.isdigit() else ""


def kind_of(name: str) -> Kind | None:
    """The kind of a file by its name; None if it is not read."""
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
    """The kind of a file by its first `CONTENT_BYTES` bytes; None if it is not read."""
    found = (kind for start, magic, kind in _CONTENTS if head[start : start + len(magic)] == magic)
    return next(found, "image" if looks_like_image(head) else None)


@cache
def reads_heif() -> bool:
    """Whether the package that adds HEIC and HEIF to Pillow is installed."""
    return importlib.util.find_spec(HEIF_PACKAGE) is not None


def register_heif() -> None:
    """Add HEIC and HEIF to Pillow, if the package for them is installed."""
    if reads_heif():
        importlib.import_module(HEIF_PACKAGE).register_heif_opener()


def describe(suffix: str) -> str:
    """A suffix as the reason for leaving files out, with the remedy if there is one."""
    if suffix in HEIF:
        return f"{suffix} (pip install 'datamerge[heif]' reads them)"
    return suffix or NO_SUFFIX
