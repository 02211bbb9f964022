"""Interprets labels from any source: a class index from 0 to 2³¹ − 1, the name of a class, or none.

    whole numbers, also as 3.0, "003", b"3", "[3]", True, of NumPy, lists of one   the index; none if negative
    text, if all are 0x1, 0xA, … or numbers                                        the index, with a message
    one-hot rows                                                                   the index of the 1; none if all 0
    text                                                                           names, numbered alphabetically
    null, NaN, empty text; among numbers also "unknown", "None", …                 none, with their count in a message
    mixed numbers and names; fractions; numbers above 2³¹ − 1                      refused, with the odd values

The usual names of columns of labels are here too.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from datamerge.runtime.class_names import plain_name
from datamerge.runtime.messages import say, warn
from storage_schemas import SourceError, shortened

LARGEST_LABEL = 2**31 - 1
NONE = "none"
"""Value of `label_column` for no labels."""
USUAL = ("label", "labels", "fine_label")
"""Names of columns of labels, in order of preference."""
_ROLES = ("label", "class", "category", "target_label", "class_label")
OTHERS = (
    *("class", "classes", "classname", "cls", "target", "targets", "category", "categories", "y", "coarse_label"),
    *(f"{role}_{what}" for role in _ROLES for what in ("id", "idx", "index", "name")),
    *("labelid", "class_label", "target_label", "ground_truth", "gt", "wnid", "synset"),
)
"""Names of columns that hold labels if there is only one of them and none of the usual ones."""
LABEL_NAMES = frozenset((*USUAL, *OTHERS))
# How pandas and Excel write a missing value; among numbers, also how people do.
_ABSENT = frozenset({"nan", "null", "n/a", "#n/a", "<na>"})
_ABSENT_AMONG_NUMBERS = _ABSENT | {"none", "na", "nil", "unknown", "unlabeled", "unlabelled", "missing", "?", "-"}
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
# 3,0, 1,000 or several labels: read as names, they would get other numbers.
_WITH_COMMAS = re.compile(r"[+-]?\d+(\s*,\s*\d+)+")
# How Python, NumPy and torch print a number or a list of one.
_WRAPPED = re.compile(r"(?:tensor|array|np\.\w+)?[\[(]\s*([^\[\]()]*?)\s*,?\s*[\])]")
_HEXADECIMAL = re.compile(r"0[xX][0-9a-fA-F]+")
_SHOWN = 5


class NoClass(ValueError):
    """A value that cannot be the label of one class: several values, a mapping, a date."""


class NotWhole(NoClass):
    """A number that is not whole: a score, or a corrupted label."""


@dataclass(frozen=True)
class OneHot:
    """A row of zeros and at most one 1.

    Attributes:
        width: length of the row.
        index: position of the 1; None if there is none.
    """

    width: int
    index: int | None


Meaning = int | str | OneHot | None
Labels = tuple[list[int | None], list[str]]
"""Class indices and, by index, class names."""


def read_labels(
    raw: Sequence[Any],
    where: str,
    names: Sequence[str] = (),
    row: Callable[[int], str] = "row {}".format,
    folders: bool = False,
) -> Labels:
    """Class indices and class names from labels of any form; see the docstring of the module.

    Args:
        raw: one value per sample; None for samples without one.
        where: place of the labels, for messages.
        names: class names by index, if the source has them.
        row: names a sample from its position, for messages.
        folders: whether the values are names of folders, of which 1.5 and NaN are names too.

    Raises:
        NoClass: a value cannot be a label.
        SourceError: numbers and names are mixed, or a number is not a class index.
    """
    plain = set(map(type, raw)) <= {int, bool, str, type(None)}
    keys = raw if plain else [hashable(value) for value in raw]
    first: dict[Any, int] = {}
    for position, key in enumerate(keys):
        first.setdefault(key, position)
    indices, found = read_distinct(first, Counter(keys), where, names, row, folders)
    return [indices.get(key) for key in keys], found


def read_distinct(
    first: Mapping[Any, int],
    times: Mapping[Any, int],
    where: str,
    names: Sequence[str],
    row: Callable[[int], str],
    folders: bool,
) -> tuple[dict[Any, int], list[str]]:
    """Class indices by value, without the missing values, and class names.

    The other arguments and the errors are those of `read_labels`.

    Args:
        first: position of the first occurrence of each distinct value, in this order; values are `hashable`.
        times: number of occurrences of each value.
    """
    numbers, texts = _meant(first, where, row, folders)
    if texts and names:
        numbers, texts = _from_names(numbers, texts, names)
    if texts and not folders:
        numbers, texts = _from_hexadecimal(numbers, texts, where)
    if texts and numbers:
        texts = _all_names(numbers, texts, first, where, row)
    if texts:
        indices, names = _alphabetical(texts, where)
    else:
        _check_range(numbers, first, where, row)
        indices = {key: value for key, value in numbers.items() if value >= 0}
        if names and max(indices.values(), default=0) >= len(names):
            warn(
                f"{where}: labels go up to {max(indices.values())}, found {len(names)} class names; they are left out"
            )
            names = []
    _say_missing(times, indices, where, first, row)
    return indices, list(names)


def _meant(
    first: Mapping[Any, int], where: str, row: Callable[[int], str], folders: bool
) -> tuple[dict[Any, int], dict[Any, str]]:
    """The distinct values that are numbers, and those that are names."""
    meanings: dict[Any, Meaning] = {}
    for key, position in first.items():
        try:
            found = key if folders else meaning(key)
            number = number_in(found, folders) if isinstance(found, str) else None
            meanings[key] = found if number is None else number
        except NotWhole as error:
            raise SourceError(
                f"{where}: expected whole numbers or names as labels, found {error} ({row(position)}); correct it, "
                f"or use `label_column={NONE!r}`"
            ) from None
        except NoClass as error:
            raise NoClass(f"{error} ({row(position)})") from None
    plain = _from_one_hot(meanings, where)
    numbers = {key: value for key, value in plain.items() if isinstance(value, int)}
    absent = _ABSENT_AMONG_NUMBERS if numbers else frozenset() if folders else _ABSENT
    texts = {key: value for key, value in plain.items() if isinstance(value, str) and value.lower() not in absent}
    return numbers, texts


def _all_names(
    numbers: Mapping[Any, int],
    texts: Mapping[Any, str],
    first: Mapping[Any, int],
    where: str,
    row: Callable[[int], str],
) -> dict[Any, str]:
    """Read numbers as names too, if most values are names, as with letters and digits.

    Raises:
        SourceError: there are a few names among numbers, which would get other numbers.
    """
    if len(set(texts.values())) <= len(set(numbers.values())):
        some = shown(f"{shortened(key)} ({row(first[key])})" for key in texts)
        raise SourceError(
            f"{where}: expected whole numbers or names as labels, found {len(numbers)} different numbers and "
            f"{len(texts)} others: {some}; correct them, or use `label_column={NONE!r}`"
        )
    say(f"{where}: {len(numbers)} of {len(numbers) + len(texts)} class names are numbers; all are read as names")
    return {**texts, **{key: key.strip() if isinstance(key, str) else str(value) for key, value in numbers.items()}}


def meaning(value: Any) -> Meaning:
    """Interpret one value: an index, a name, a one-hot row or nothing.

    Raises:
        NoClass: it holds several values, or cannot be a label.
    """
    if isinstance(value, OneHot):
        return value
    if hasattr(value, "tolist"):  # NumPy and torch
        value = value.tolist()
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise NoClass(f"bytes that are no text, {shortened(value)}") from None
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) or hasattr(value, "as_integer_ratio"):  # Decimal is not a Real
        return _whole(value)
    if isinstance(value, list | tuple):
        return _of_several(value)
    raise NoClass(f"a value of type {type(value).__name__}")


def _whole(value: Any) -> int | None:
    if math.isnan(value):
        return None
    if math.isinf(value) or value != int(value):
        raise NotWhole(f"the number {value}")
    return int(value)


def _of_several(values: Sequence[Any]) -> Meaning:
    if len(values) < 2:
        return meaning(values[0]) if values else None
    if not all(isinstance(value, Real) and value in (0, 1) for value in values) or sum(values) > 1:
        raise NoClass(f"{len(values)} values, {shortened(list(values))}")
    return OneHot(len(values), next((index for index, value in enumerate(values) if value), None))


def hashable(value: Any) -> Hashable:
    """A hashable value with the same meaning; NumPy scalars would be slow, and tensors compare by identity."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return tuple(hashable(item) for item in value)
    if isinstance(value, float) and value != value:
        return None  # NaN is not equal to itself
    try:
        hash(value)
    except TypeError:
        raise NoClass(f"a value of type {type(value).__name__}") from None
    return value  # type: ignore[no-any-return]  # any value that can be hashed


def _from_one_hot(meanings: Mapping[Any, Meaning], where: str) -> dict[Any, int | str | None]:
    hot = [value for value in meanings.values() if isinstance(value, OneHot)]
    widths = {value.width for value in hot}
    if len(widths) > 1 or (hot and any(isinstance(value, int | str) for value in meanings.values())):
        raise NoClass(f"lists of {' and '.join(map(str, sorted(widths)))} values")
    if hot:
        say(f"{where}: rows of {hot[0].width} values with one 1 are read as the index of the 1")
    return {key: value.index if isinstance(value, OneHot) else value for key, value in meanings.items()}


def number_in(text: str, digits_only: bool = False) -> int | None:
    """The whole number in a text: 7, 007 and, unless `digits_only`, 7.0 or 7e0; None if it is no number.

    Raises:
        NotWhole: the number is not whole.
    """
    text = text if digits_only else text.strip()
    if text.removeprefix("-").isdecimal():
        # Python refuses to read thousands of digits.
        return int(text) if len(text) < 100 else LARGEST_LABEL + 1
    if not digits_only and (inside := _WRAPPED.fullmatch(text)):
        text = inside[1]
    if not digits_only and _WITH_COMMAS.fullmatch(text):
        raise NotWhole(f"{text}, with a comma")
    if digits_only or not _NUMBER.fullmatch(text):
        return None
    try:
        return _whole(float(text))
    except NotWhole:
        raise NotWhole(f"the number {text}") from None


def _from_names(numbers: Mapping[Any, int], texts: Mapping[Any, str], names: Sequence[str]) -> Any:
    """Replace texts by their index among the class names, if all of them are class names."""
    index = {plain_name(name): position for position, name in reversed(list(enumerate(names)))}
    if any(plain_name(text) not in index for text in texts.values()):
        return numbers, texts
    return {**numbers, **{key: index[plain_name(text)] for key, text in texts.items()}}, {}


def _from_hexadecimal(numbers: Mapping[Any, int], texts: Mapping[Any, str], where: str) -> Any:
    """Replace texts such as 0xA by their numbers, if all are hexadecimal; as names they would get other numbers."""
    present = {key: text for key, text in texts.items() if text.lower() not in _ABSENT_AMONG_NUMBERS}
    if not present or not all(map(_HEXADECIMAL.fullmatch, present.values())):
        return numbers, texts
    say(f"{where}: {len(present)} different labels are hexadecimal and read as numbers: {shown(present.values())}")
    return {**numbers, **{key: int(text, 16) for key, text in present.items()}}, {}


def _alphabetical(texts: Mapping[Any, str], where: str) -> tuple[dict[Any, int], list[str]]:
    """Number names alphabetically; Unicode forms of one name are joined, with a message."""
    form: dict[str, str] = {}
    for text in sorted(set(texts.values())):
        form.setdefault(unicodedata.normalize("NFC", text), text)
    ordered = sorted(form.values())
    if joined := sorted(set(texts.values()) - set(ordered)):
        say(f"{where}: {len(joined)} class names are written in two forms of Unicode, joined: {shown(joined)}")
    index = {name: position for position, name in enumerate(ordered)}
    return {key: index[form[unicodedata.normalize("NFC", text)]] for key, text in texts.items()}, ordered


def warn_of_twins(names: Sequence[str], where: str) -> None:
    """Warn about class names that differ only in case, spaces or `_`: they may be one class."""
    times = Counter(map(plain_name, names))
    twins = [name for name in names if times[plain_name(name)] > 1]
    if twins:
        warn(f"{where}: {len(twins)} class names differ only in case or spaces: {shown(map(repr, twins))}")


def _check_range(numbers: Mapping[Any, int], first: Mapping[Any, int], where: str, row: Callable[[int], str]) -> None:
    large = [key for key, value in numbers.items() if value > LARGEST_LABEL]
    if large:
        raise SourceError(
            f"{where}: expected labels up to {LARGEST_LABEL}, found {shortened(str(large[0]))} "
            f"({row(first[large[0]])}); number the classes from 0, or use `label_column={NONE!r}`"
        )


def _say_missing(
    times: Mapping[Any, int],
    indices: Mapping[Any, int],
    where: str,
    first: Mapping[Any, int],
    row: Callable[[int], str],
) -> None:
    """Report how many samples have no label although others have one, and their values."""
    found = Counter({key: times[key] for key in first if key not in indices})
    missing, total = found.total(), sum(times.values())
    if not missing or found[None] == total:
        return
    some = shown(
        f"{'nothing' if key is None else shortened(key)} in {count}, first {row(first[key])}"
        for key, count in found.most_common()
    )
    written = any(isinstance(key, str) and key.strip() and number_in(key, True) is None for key in found)
    (warn if written else say)(f"{where}: {missing} of {total} samples have no label: {some}")


def shown(items: Iterable[str]) -> str:
    """The first items of a list as text, and the number of further ones."""
    listed = list(items)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return f"{', '.join(listed[:_SHOWN])}{more}"


def label_columns(names: Sequence[str], left_out: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Columns with a usual name of labels, the best first, and columns with another possible name."""
    folded = {name: re.sub(r"[ -]", "_", name.strip().lower()) for name in names if name not in left_out}
    usual = [name for label in USUAL for name in sorted(folded, key=label.__ne__) if folded[name] == label]
    return usual, [name for name in folded if folded[name] in OTHERS]


def choose_column(names: Sequence[str], where: str, left_out: Collection[str] = ()) -> tuple[str | None, str]:
    """The column of labels among candidates, or the reason why there is none.

    Prints the choice if it is not obvious.
    """
    usual, others = label_columns(names, left_out)
    if not usual and len(others) > 1:
        reason = f"the columns {', '.join(others)} may hold labels; name one as `label_column`"
        warn(f"{where}: no labels are read: {reason}")
        return None, reason
    column = next(iter([*usual, *others]), None)
    if column is None:
        return None, ""
    rest = [name for name in [*usual, *others] if name != column]
    if rest or column not in USUAL:
        also = f", not from {', '.join(rest)}; `label_column` chooses another" if rest else ""
        say(f"{where}: labels are taken from {column!r}{also}")
    return column, ""


def named_column(column: str, names: Sequence[str], where: str) -> str | None:
    """The column that the user named, ignoring case; None for `none`.

    Raises:
        SourceError: there is no such column.
    """
    if column in names:
        return column
    alike = [name for name in names if name.strip().lower() == column.strip().lower()]
    if len(alike) == 1:
        return alike[0]
    if column == NONE:
        return None
    raise SourceError(f"{where}: expected a label column {column!r}, found {list(names)}")
