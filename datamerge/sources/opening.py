"""Opens a source by its name: finds its files and splits, and the module that lists its samples."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from datamerge.runtime.factories import PREFIX
from datamerge.runtime.messages import first_line, say
from datamerge.sources.drawing import Limits
from datamerge.sources.label_table import TABLE
from datamerge.sources.labels import NONE, shown
from datamerge.sources.listing import (
    DESCRIPTIONS,
    TABLES,
    Listing,
    describe_left_out,
    list_folder,
    say_left_out,
)
from datamerge.sources.patterns import find_files, is_pattern
from datamerge.sources.sample import Columns, Source, check_listed
from datamerge.sources.splits import ALL, DEEPEST, choose, choose_names, file_splits, image_splits, sizes
from datamerge.sources.suffixes import (
    CONTENT_BYTES,
    EXTENSIONS,
    HEIF,
    PACKED,
    Kind,
    kind_of,
    kind_of_content,
    packed_suffix,
    suffix_of,
)
from storage_schemas import ConfigError, DatamergeError, Location, SourceError, redact
from storage_schemas.access.redaction import split_query
from storage_schemas.access.retries import is_transient

if TYPE_CHECKING:
    from datamerge.sources.files import File  # pyarrow takes half a second

EXPECTED = f"images ({' '.join(EXTENSIONS[:4])} …), Parquet or Arrow files, tars or arrays"
LOOKED_INTO = 20  # tables or arrays beside other data that are checked for images
NOUNS: dict[Kind, str] = {
    "image": "image",
    "parquet": "Parquet file",
    "tar": "tar",
    "arrow": "Arrow file",
    "array": "array file",
}


def open_source(
    url: str | os.PathLike[str],
    *,
    limit: int | None = None,
    limit_first: int | None = None,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    split: str | None = None,
) -> Source:
    """List a source: a folder of images, Parquet or Arrow files or tars, one such file, arrays, or a user's data set.

    Args:
        url: path, fsspec URL, pattern of files, or `python:MODULE:FACTORY`.
        limit: number of samples to draw by `seed`, evenly over the source.
        limit_first: number of samples to take from the start.
        seed: seed of the draw.
        image_column: column or array of images; required if there are several.
        label_column: column, array or tar member of labels; by default one with a usual name.
        group_column: column, array or tar member whose values name groups.
        split: split to use if there are several, such as `train`, `train+validation` or `all`.

    Returns:
        The listed source. No image is decoded.

    Raises:
        ConfigError: a limit is below 1, both limits are set, there is no such split, or several and none is chosen.
        SourceError: there is nothing, or no data of a supported kind.
    """
    limits = Limits(limit, limit_first, seed)
    with _in_one_line(os.fspath(url)):
        source = _open(url, limits, Columns(image_column, label_column, group_column), split)
    if source.drawn_from is not None:
        say(
            f"{source.url}: {len(source.samples)} of {source.drawn_from} samples are used, drawn evenly with "
            f"seed {seed}; `limit_first` takes the first ones"
        )
    return source


@contextmanager
def _in_one_line(url: str) -> Iterator[None]:
    """Turn any error about the user's files inside into a SourceError with the file and the reason."""
    try:
        yield
    except DatamergeError:
        raise
    except OSError as error:
        if is_transient(error):
            raise
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else url
        raise SourceError(f"{redact(where)}: cannot be listed: {error.strerror or first_line(error)}") from error
    except Exception as error:  # an error of a library, or a bug of ours; the traceback is kept
        raise SourceError(f"{redact(url)}: cannot be listed: {type(error).__name__}: {first_line(error)}") from error


def _open(url: str | os.PathLike[str], limits: Limits, columns: Columns, split: str | None) -> Source:
    text = os.fspath(url)
    if text.startswith(PREFIX):
        if columns not in (Columns(), Columns(label=NONE)):
            raise SourceError(
                f"{text}: a data set of (image, label) has no columns; drop the settings that name columns"
            )
        if split is not None:
            raise ConfigError(f"split: expected none for {text}, found {split!r}; let the factory return one split")
        from datamerge.sources.factories import open_factory

        return open_factory(text, limits, labelled=columns.label is None)
    if text.startswith("pipe:"):
        raise SourceError(f"{redact(text)}: expected files, found a command; give the path or URL of its tars")
    if is_pattern(text):
        parent, files = find_files(text)
        base, query = split_query(text)
        by_query: Kind | None = "tar" if query.lower().endswith(".tar") else None  # …/get?file=x.tar
        return _open_files(parent, redact(base), files, columns, split, by_query).limited(limits)
    location = Location(url)
    if not location.exists():
        raise SourceError(f"{location.url}: expected {EXPECTED}, found nothing there")
    if location.is_file():
        parent, name = location.split()
        check_listed(parent, name)
        kind = kind_of(name) or _kind_by_content(location, name)
        return _open_files(parent, location.url, [(name, parent.size(name))], columns, split, kind).limited(limits)
    return open_folder(list_folder(location), columns, split).limited(limits)


def _open_files(
    location: Location,
    url: str,
    files: Sequence[File],
    columns: Columns,
    split: str | None,
    kind: Kind | None = None,
) -> Source:
    """The samples of files that the user named: one file, or those of a pattern."""
    kinds = {kind or kind_of(name) or _kind_by_content(location.below(name), name) for name, _ in files}
    if len(kinds) > 1:
        shown = ", ".join(sorted(f"{NOUNS[kind]}s" for kind in kinds))
        raise SourceError(f"{url}: expected files of one kind, found {shown}; end the pattern with a suffix")
    (kind,) = kinds
    if kind == "image" and len(files) == 1:
        raise SourceError(f"{url}: expected a folder of images, found one image; name the folder")
    if kind == "array" and len(files) > 1:
        raise SourceError(f"{url}: expected one array file, found {len(files)}; name one")
    if kind == "array":
        return replace(_read_array(location, files[0][0], columns, split), url=url)
    chosen, name = _chosen(file_splits(files, url), url, kind, split) if split is not None else (files, None)
    return replace(_read(kind, location, url, chosen, columns), url=url, split=name)


def _kind_by_content(file: Location, name: str) -> Kind:
    """The kind of a file, from its content.

    Raises:
        SourceError: the kind is not supported; the message says what to do.
    """
    where = file.url
    if packed := packed_suffix(name):
        raise SourceError(f"{where}: {PACKED[packed]}")
    if suffix_of(name) in HEIF:
        raise SourceError(f"{where}: expected a folder of images, found one image; name the folder")
    found = None if file.is_read_only else kind_of_content(file.read("", 0, CONTENT_BYTES))
    if found is not None:
        return found
    expected = "a .parquet, .arrow or .tar file, an .npz or .npy file or an IDX file"
    if file.is_read_only:
        raise SourceError(f"{where}: expected {expected}; web servers list no folders, so give the URL of a file")
    raise SourceError(f"{where}: expected a folder, {expected}")


def open_folder(listing: Listing, columns: Columns, split: str | None) -> Source:
    """The samples of a listed folder."""
    if listing.of("arrow"):
        _leave_caches(listing)
    kind = _only_kind(listing)
    location, url, files = listing.location, listing.location.url, listing.of(kind)
    if kind == "image":
        source = _open_images(listing, columns, split)
    elif kind == "array":
        source = _open_arrays(listing, columns, split)
    else:
        splits = file_splits(files, url)
        chosen, name = _chosen(splits, url, kind, split)
        source = replace(_read(kind, location, url, chosen, columns), split=name, splits=sizes(splits))
    listing.take([name for name in listing.others if name.rpartition("/")[2] in DESCRIPTIONS or name == TABLE])
    say_left_out(listing)
    left_out = {reason: count for reason, count in listing.left_out.items() if count > 0}
    return replace(source, left_out=left_out)


def _leave_caches(listing: Listing) -> None:
    """Leave out Arrow files that are caches."""
    from datamerge.sources.arrow import of_data_set

    kept = of_data_set(listing.location, listing.of("arrow"), listing.others)
    listing.left_out[".arrow that are caches"] += len(listing.of("arrow")) - len(kept)
    listing.files["arrow"] = kept


def _only_kind(listing: Listing) -> Kind:
    """The kind of data below a folder.

    Raises:
        SourceError: there are no data, or several kinds.
    """
    url = listing.location.url
    present = {kind: files for kind, files in listing.files.items() if files}
    for kind, holds_images in (("parquet", _is_table_of_images), ("array", _is_array_of_images)):
        if len(present) > 1 and kind in present:
            files = present[kind]
            if not any(holds_images(listing.location, name) for name, _ in files[:LOOKED_INTO]):
                for name, _ in files:
                    listing.left_out[f"{suffix_of(name) or name} without images"] += 1
                del present[kind]
    if len(present) > 1:
        shown = " and ".join(
            f"{len(files)} {NOUNS[kind]}{'' if len(files) == 1 else 's'} ({files[0][0]}{' …' if files[1:] else ''})"
            for kind, files in sorted(present.items(), key=lambda entry: -len(entry[1]))
        )
        raise SourceError(
            f"{url}: expected one kind of data, found {shown}; name one of these files or a sub-folder, or move them "
            "apart"
        )
    if not present:
        left = describe_left_out(listing.left_out)
        remedy = next((PACKED[packed] for packed in map(packed_suffix, listing.others) if packed), "")
        found = "; ".join(filter(None, (left, remedy))) or "an empty folder"
        raise SourceError(f"{url}: expected {EXPECTED} in it or below, found none of these: {found}")
    return next(iter(present))


def _is_table_of_images(location: Location, name: str) -> bool:
    from datamerge.sources.parquet import holds_images

    return holds_images(location, name)


def _is_array_of_images(location: Location, name: str) -> bool:
    from datamerge.sources.arrays import holds_images

    return holds_images(location, name)


def _chosen(
    splits: Mapping[str, Sequence[File]], url: str, kind: Kind, split: str | None
) -> tuple[list[File], str | None]:
    """The sorted files of the chosen split, and its name."""
    chosen, name = choose(splits, split, url, NOUNS[kind])
    return sorted(chosen), name


def _open_images(listing: Listing, columns: Columns, split: str | None) -> Source:
    """The images below a folder, or of one split."""
    from datamerge.sources.files import Files
    from datamerge.sources.image_folder import open_image_folder

    location, files = listing.location, Files.of(listing.of("image"))
    split_of, level = image_splits(files.folders)
    counts: Counter[str] = Counter()
    for part, count in zip(split_of, np.bincount(files.of_folder).tolist(), strict=True):
        counts[part] += count
    parts, name = choose_names(counts, split, location.url, NOUNS["image"])
    chosen, known = files.in_folders([part in parts for part in split_of]), []
    if name is None or (name == ALL and "" in counts):
        skipped = None  # a folder named like a split is a class
    else:
        skipped = level
        above = {"/".join(folder.split("/")[: level + 1]) for folder in chosen.folders}
        folder = next(iter(above))
        if len(above) == 1 and f"{folder}/{TABLE}" in listing.others and TABLE not in listing.others:
            # The table is in this folder, so proceed as if the user had named the folder.
            location, skipped = location.below(folder), None
            chosen = chosen.below(folder)
            listing.take([f"{folder}/{TABLE}"])
    if location is listing.location and TABLE in listing.others:
        known = files.in_folders([part not in parts for part in split_of]).names.to_pylist()
    source = open_image_folder(location, chosen, columns, skipped=skipped, known=known)
    if columns.label is None and not location.exists(TABLE):
        _say_tables(listing)
    return replace(source, split=name, splits=dict(sorted(counts.items())) if any(counts) else {})


def _say_tables(listing: Listing) -> None:
    """Report tables that may have been meant to hold the labels."""
    tables = sorted(name for name in listing.others if name.lower().endswith(TABLES) and name.count("/") < DEEPEST)
    if tables:
        say(
            f"{listing.location.url}: labels are not taken from {shown(tables)}; call one that holds them {TABLE}, "
            "with the header file,label"
        )


def _open_arrays(listing: Listing, columns: Columns, split: str | None) -> Source:
    """The only array file with images in a folder."""
    location, url = listing.location, listing.location.url
    every = [name for name, _ in listing.of("array")]
    files = [name for name in every if _is_array_of_images(location, name)] or every
    if len(files) == 1:
        return _read_array(location, files[0], columns, split)
    shown = ", ".join(files[:5]) + (" …" if files[5:] else "")
    raise SourceError(f"{url}: expected one array file with images, found {len(files)} ({shown}); name one of them")


def _read_array(location: Location, name: str, columns: Columns, split: str | None) -> Source:
    from datamerge.sources.arrays import open_arrays

    return open_arrays(location, name, columns, split)


def _read(kind: Kind, location: Location, url: str, files: Sequence[File], columns: Columns) -> Source:
    """The samples of files. Imports are local: all kinds need pyarrow, which takes half a second to import."""
    if kind == "parquet":
        from datamerge.sources.parquet import open_parquet

        return open_parquet(location, files, columns)
    if kind == "arrow":
        from datamerge.sources.arrow import open_arrow

        return open_arrow(location, files, columns)
    if kind == "tar":
        from datamerge.sources.tars import open_tars

        return open_tars(location, url, files, columns)
    from datamerge.sources.files import Files
    from datamerge.sources.image_folder import open_image_folder

    return open_image_folder(location, Files.of(files), columns)
