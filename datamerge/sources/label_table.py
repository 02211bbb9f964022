"""Reads labels.csv, as spreadsheets, pandas and people write it, and matches its rows to images.

    encoding    UTF-8 with or without a byte order mark, or UTF-16 with one
    cells       separated by commas, semicolons, tabs, bars or spaces; quoted or not; surrounding spaces are stripped
    header      names the columns, in any order and case; without one, the column of files is searched
    files       paths below the folder, or below images/

A path may also differ from the image's by `./`, `\\`, case, Unicode form, or a different or missing suffix, if
only one image matches.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from datamerge.runtime.messages import say, warn
from storage_schemas import SourceError

TABLE = "labels.csv"
FILE_COLUMNS = (
    "file",
    "filename",
    "file_name",
    "image",
    "images",
    "path",
    "filepath",
    "file_path",
    "image_path",
    "image_file",
    "image_name",
    "imagename",
    "img",
    "img_path",
    "img_name",
    "name",
    "image_id",
    "id",
)
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_LOOKED_AT = 1000  # rows in which the column of files is searched
_SEPARATORS = (",", ";", "\t", "|", " ")


# A tuple of strings, unlike a list, costs the garbage collector nothing; there may be millions.
Row = tuple[int, tuple[str, ...]]
"""(line in the file, cells)"""


@dataclass(frozen=True)
class LabelTable:
    """The rows of a table, by image.

    Attributes:
        where: URL of the table.
        columns: names of the columns as written; `column 2` and so on for those without a name.
        file_column: name of the column of files.
        rows: rows of each image, in the order of the table.
    """

    where: str
    columns: Sequence[str]
    file_column: str
    rows: Mapping[str, Sequence[Row]]

    def values(self, column: str, images: Sequence[str]) -> list[str | None]:
        """The value of a column for each image; None for an empty cell or an image without a row.

        Raises:
            SourceError: there is no such column, or rows of one image have different values.
        """
        if column not in self.columns:
            raise SourceError(f"{self.where}: expected a column {column!r}, found {list(self.columns)}")
        place = self.columns.index(column)
        return [self._value(image, place) for image in images]

    def line(self, image: str) -> str:
        """The row of an image, for messages."""
        return f"line {self.rows[image][0][0]}" if image in self.rows else f"no row for {image}"

    def _value(self, image: str, place: int) -> str | None:
        rows = self.rows.get(image, ())
        for line, cells in rows[1:]:
            if cells[place] != rows[0][1][place]:
                raise SourceError(
                    f"{self.where}: expected one {self.columns[place]} for {image}, found {rows[0][1][place]!r} in "
                    f"line {rows[0][0]} and {cells[place]!r} in line {line}; keep one"
                )
        return (rows[0][1][place] or None) if rows else None


def read_label_table(data: bytes, images: Sequence[str], where: str) -> LabelTable:
    """Read a table and match its rows to images.

    Args:
        data: content of the file.
        images: paths of the images, relative to the folder of the table.
        where: URL of the table, for messages.

    Raises:
        SourceError: the file is no table, has no column of files, no row matches an image, or one matches several.
    """
    lines, matcher = _parse(data, images, where), _Matcher(images)
    if not lines:
        raise SourceError(f"{where}: expected a header such as file,label and a row per image, found an empty table")
    columns, place, lines = _header(lines, matcher, where)
    lines = [row if len(row[1]) == len(columns) else _whole(row, len(columns), where) for row in lines]
    named = [(line, cells[place]) for line, cells in lines]
    rows: dict[str, tuple[Row, ...]] = {}
    missing = []
    for row, image, cell in zip(lines, matcher.match(named, where), named, strict=True):
        if image is None:
            missing.append(cell)
        else:
            rows[image] = (*rows[image], row) if image in rows else (row,)
    if not rows:
        such = f", such as {missing[0][1]!r}" if missing else ""
        raise SourceError(
            f"{where}: expected paths below its folder in the column {columns[place]!r}, found none in {len(lines)} "
            f"rows{such}; correct the table; an image is {min(images, default='none')}"
        )
    _say_differences(where, images, rows, missing)
    return LabelTable(where, columns, columns[place], rows)


def _say_differences(
    where: str, images: Sequence[str], rows: Mapping[str, Sequence[Row]], missing: Sequence[tuple[int, str]]
) -> None:
    if missing:
        line, name = missing[0]
        warn(f"{where}: {len(missing)} rows name missing files, such as {name!r} in line {line}")
    without = [image for image in images if image not in rows]
    if without:
        say(f"{where}: {len(without)} of {len(images)} images have no row, such as {without[0]}")
    repeated = sum(len(several) > 1 for several in rows.values())
    if repeated:
        say(f"{where}: {repeated} images have several rows")


def _parse(data: bytes, images: Sequence[str], where: str) -> Sequence[Row]:
    """The non-empty rows, with the separator that gives the most plausible cells."""
    try:
        text = data.decode("utf-16" if data[:2] in _UTF_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{where}: expected a CSV table in UTF-8: {error}; save it as UTF-8") from None
    skipped = 0
    if text[:4].lower() == "sep=":  # Excel's way to name the separator
        text, skipped = text.partition("\n")[2], 1
    beginning = text[: csv.field_size_limit()]
    known = {*images, *(image.rpartition("/")[2] for image in images), *FILE_COLUMNS}

    def plausibility(separator: str) -> tuple[bool, int]:
        rows = _rows(beginning, separator, skipped, where, 2)
        # Spaces come last, as names contain them too.
        cells = len(rows[0][1]) if rows and separator != " " else 1
        return any(cell in known or cell.lower() in known for _, cells in rows for cell in cells), cells

    return _rows(text, max(_SEPARATORS, key=plausibility), skipped, where)


def _rows(text: str, separator: str, skipped: int, where: str, limit: int | None = None) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    rows: list[Row] = []
    try:
        for row in reader:
            cells = tuple(map(str.strip, row))
            if any(cells):
                rows.append((reader.line_num + skipped, cells))
            if limit is not None and len(rows) == limit:
                break
    except csv.Error as error:
        raise SourceError(f"{where}, line {reader.line_num + skipped}: expected a CSV table: {error}") from None
    return rows


def _header(lines: Sequence[Row], matcher: _Matcher, where: str) -> tuple[list[str], int, Sequence[Row]]:
    """Names of the columns, the index of the column of files, and the rows below the header."""
    first = lines[0][1]
    folded = [re.sub(r"[ -]", "_", cell.lower()) for cell in first]
    named = sorted((FILE_COLUMNS.index(cell), place) for place, cell in enumerate(folded) if cell in FILE_COLUMNS)
    if named and not any(map(matcher.exact, first)):
        some = [cells for _, cells in lines[1 : _LOOKED_AT + 1]]
        below = {place: [cells[place] for cells in some if place < len(cells)] for _, place in named}
        # Of several candidates, such as `image` and `id`, choose the one that names most images.
        best = max(below, key=lambda place: sum(cell in matcher for cell in below[place]))
        return _names(first), best, lines[1:]
    # No header, or unknown names: the column of files is the one that names images.
    for rows, names in ((lines, [""] * len(first)), (lines[1:], first)):
        for place in range(len(first)):
            if rows and place < len(rows[0][1]) and rows[0][1][place] in matcher:
                names = _names(names)
                say(f"{where}: the paths of the images are taken from {names[place]!r}")
                return names, place, rows
    raise SourceError(
        f"{where}: expected a column {FILE_COLUMNS[0]!r} with paths below its folder, found {list(first)}; add a "
        "header such as file,label"
    )


def _names(cells: Sequence[str]) -> list[str]:
    """Names of columns; a column without a name, such as an index of pandas, gets one."""
    return [cell or f"column {place + 1}" for place, cell in enumerate(cells)]


def _whole(row: Row, width: int, where: str) -> Row:
    """The row with as many cells as the header."""
    line, cells = row
    if any(cells[width:]):
        raise SourceError(
            f"{where}, line {line}: expected {width} cells, found {len(cells)}: {list(cells)}; put cells with a "
            "separator into quotes"
        )
    return line, (*cells[:width], *[""] * (width - len(cells)))


def _forms() -> tuple[Callable[[str], str], ...]:
    """Normal forms in which paths are compared, the strictest first."""

    def plain(path: str) -> str:
        path = posixpath.normpath(path.replace("\\", "/")).lstrip("/")
        return unicodedata.normalize("NFC", path)

    def folded(path: str) -> str:
        return plain(path).casefold()

    def stem(path: str) -> str:
        root, suffix = posixpath.splitext(folded(path))
        return root if suffix[1:].isalnum() and not suffix[1:].isdecimal() else folded(path)

    return plain, folded, stem


class _Matcher:
    """Finds the image that a cell names."""

    def __init__(self, images: Sequence[str]) -> None:
        self._known = set(images)
        self._images = images
        self._forms = _forms()
        self._by_form: dict[int, dict[str, list[str]]] = {}

    def __contains__(self, cell: str) -> bool:
        return bool(cell) and (
            self.exact(cell) is not None or any(self._alike(cell, way) for way in range(len(self._forms)))
        )

    def match(self, cells: Sequence[tuple[int, str]], where: str) -> list[str | None]:
        """The image of each (line, cell); None if there is none.

        Raises:
            SourceError: a cell matches several images.
        """
        found = [self.exact(cell) for _, cell in cells]
        loosely = 0
        for way in range(len(self._forms)):
            if None not in found:
                break
            taken = set(found)
            for place, (line, cell) in enumerate(cells):
                if found[place] is not None or not cell:
                    continue
                alike = self._alike(cell, way)
                if (
                    len(alike) > 1 or way == len(self._forms) - 1
                ):  # an image named by another row does not match again
                    alike = [image for image in alike if image not in taken]
                if len(alike) > 1:
                    raise SourceError(
                        f"{where}, line {line}: expected one image, found {len(alike)} that match {cell!r}: "
                        f"{', '.join(alike[:5])}; write the path in full"
                    )
                if alike:
                    found[place] = alike[0]
                    loosely += way > 0
        if loosely:
            say(f"{where}: {loosely} rows name their image with another case or suffix, and are matched to it")
        return found

    def exact(self, cell: str) -> str | None:
        """The image with exactly this path, below the folder or its sub-folder `images`."""
        if cell in self._known:
            return cell
        below = f"images/{cell}"
        return below if below in self._known else None

    def _alike(self, cell: str, way: int) -> list[str]:
        if way not in self._by_form:
            table: dict[str, list[str]] = {}
            for image in self._images:
                table.setdefault(self._forms[way](image), []).append(image)
            self._by_form[way] = table
        form, table = self._forms[way](cell), self._by_form[way]
        return table.get(form) or table.get(f"images/{form}", [])
