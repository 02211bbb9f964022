"""Reads class names from files in common forms, and normalises names for comparison."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from datamerge.runtime.messages import say
from storage_schemas import ConfigError, shortened
from storage_schemas.access.local_paths import user_path

# 0: tench | 0,tench | 0 tench | n01440764 tench
_NUMBERED = re.compile(r"(\d+)(?:\s*[:,;\t]\s*|\s+)(\S.*)")
_SYNSET = re.compile(r"(n\d{8})(?:\s*[:,;\t]\s*|\s+)(\S.*)")


def plain_name(name: str) -> str:
    """A class name normalised for comparison: Unicode form, case, `_` and spaces do not count."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").split())


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all class names are whole numbers, so that they carry no names."""
    return all(name.strip().isdecimal() and len(name) < 20 for name in names)


def read_class_names(file: str, setting: str = "class_names") -> list[str]:
    """Read the class names of a head from a file, in the order of its rows.

    The file has one name per line (commas are allowed), or lines such as `0: tench` or `n01440764 tench`, or JSON:
    ["tench", …], {"0": "tench", …}, {"0": ["n01440764", "tench"], …}, {"tench": 0, …}.

    Args:
        file: path of the file.
        setting: name of the setting, for messages.

    Raises:
        ConfigError: the file is missing or empty, has a blank line between names, or its numbers have a gap.
    """
    try:
        text = user_path(file).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise ConfigError(f"{setting}: expected one class name per line in {file}, found {reason}") from None
    return parse_class_names(text, file, setting)


def parse_class_names(text: str, file: str, setting: str) -> list[str]:
    """Class names in the text of a file; see `read_class_names`.

    Raises:
        ConfigError: there are no names, a blank line between names, or numbers with a gap.
    """
    names = _of_json(text, file, setting) if text.lstrip()[:1] in ("[", "{") else _of_lines(text, file, setting)
    if not names:
        raise ConfigError(f"{setting}: expected one class name per line in {file}, found an empty file")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        say(
            f"{setting}: {len(twice)} names in {file} are repeated, such as {twice[0]!r}; these classes are matched "
            "by name, in order, only if the source has as many classes of that name"
        )
    return names


def _of_lines(text: str, file: str, setting: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise ConfigError(
            f"{setting}: expected one class name per line in {file}, found line {lines.index('') + 1} blank, which "
            "would shift the names after it; remove the line, or name the class"
        )
    synsets = [_SYNSET.fullmatch(line) for line in lines]
    if lines and all(synsets):
        say(f"{setting}: the names in {file} are those after the synsets, such as {synsets[0] and synsets[0][2]!r}")
        return [found[2] for found in synsets if found]
    numbered = [(int(found[1]), found[2]) for found in map(_NUMBERED.fullmatch, lines) if found]
    numbers = sorted(number for number, _ in numbered)
    if len(numbers) == len(lines) > 1 and numbers in ([*range(len(lines))], [*range(1, len(lines) + 1)]):
        say(f"{setting}: the names in {file} are numbered from {numbers[0]} and taken in that order")
        return [_unquoted(name) for _, name in sorted(numbered)]
    return [_unquoted(line) for line in lines]


def _unquoted(name: str) -> str:
    return name[1:-1] if len(name) > 2 and name[0] == name[-1] == '"' else name


def _of_json(text: str, file: str, setting: str) -> list[str]:
    try:
        try:
            found = json.loads(text)
        except ValueError:
            found = ast.literal_eval(text.strip())  # {0: 'tench', …}, the form of a common list of ImageNet's classes
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        if "\n" in text.strip():
            return _of_lines(text, file, setting)  # the first name starts with a bracket
        raise ConfigError(f"{setting}: expected class names in {file}, found broken JSON") from None
    if isinstance(found, dict):
        found = _in_order(found.get("id2label", found), file, setting)
    names = [item[-1] if isinstance(item, list | tuple) and item else item for item in found]
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise ConfigError(f"{setting}: expected class names in {file}, found {shortened(wrong[0])}")
    return [name.strip() for name in names]


def _in_order(found: Mapping[Any, Any], file: str, setting: str) -> list[Any]:
    """The names in {index: name} or {name: index}, ordered by index."""
    if found and all(isinstance(value, int) for value in found.values()):
        found = {value: key for key, value in found.items()}
    try:
        by_index = {int(key): value for key, value in found.items()}
    except (ValueError, TypeError):
        by_index = {}
    if sorted(by_index) != [*range(len(found))]:
        raise ConfigError(
            f"{setting}: expected an index from 0 to {len(found) - 1} for each class name in {file}, found "
            f"{shortened(sorted(map(str, found))[:3])} …"
        )
    return [by_index[index] for index in range(len(by_index))]
