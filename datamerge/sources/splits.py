"""Splits of a data set, from the names of its folders, files and arrays, as the Hugging Face Hub reads them.

    train/cat/x.png, test/…        folders of images, at the first level where all folders have such names
    data/train-00000-of-00002.parquet, train.parquet, imagenet-val-07.tar, validation/0.tar
    x_train, y_train, test_images  arrays

The setting `split` names one, several as `train+validation`, or `all`, which uses everything as if there were no
splits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from datamerge.runtime.messages import say, warn
from storage_schemas import ConfigError, SourceError

if TYPE_CHECKING:
    from datamerge.sources.files import File

T = TypeVar("T")

ALL = "all"
_MEANINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_CANONICAL = {word: meaning for meaning, words in _MEANINGS.items() for word in words}
# A folder of a split: `train`, `val2017`, `test_set`.
_FOLDER = re.compile(rf"({'|'.join(_CANONICAL)})([-_ ]?(\d+|set|data|images|imgs))?")
_NUMBERED = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?$")
_COLUMNS = ("split", "subset", "partition", "set")
# Names of numbered files that do not name a split.
_PLAIN = {"data", "part", "shard", "dataset", "output", "file", "images"}
DEEPEST = 3  # number of levels of folders that are searched for splits


def choose(
    splits: Mapping[str, Sequence[T]], setting: str | None, where: str, noun: str
) -> tuple[list[T], str | None]:
    """The items of the chosen split and its name; all items and None if there are no splits.

    `splits` holds the items of each split; for the rest see `choose_names`.
    """
    names, name = choose_names({split: len(items) for split, items in splits.items()}, setting, where, noun)
    return [item for chosen in names for item in splits[chosen]], name


def choose_names(
    counts: Mapping[str, int], setting: str | None, where: str, noun: str
) -> tuple[list[str], str | None]:
    """The chosen splits and their joint name; all and None if there are no splits.

    Args:
        counts: number of items in each split; an empty name stands for no split.
        setting: `train`, `train+validation`, `all`, or None.
        where: URL of the source, for messages.
        noun: noun for an item, such as `image`.

    Raises:
        ConfigError: there is no such split, or there are several and none is chosen; the message lists them.
    """
    named, everything = sorted(name for name in counts if name), list(counts)
    if not named:
        if setting not in (None, ALL):
            raise ConfigError(f"split: {where} has no splits, found {setting!r}; drop `split`")
        return everything, None
    if setting == ALL:
        return everything, ALL
    shown = ", ".join(f"{name or 'no split'} ({_counted(counts[name], noun)})" for name in sorted(counts))
    if setting is None:
        if len(counts) > 1:
            first = next((name for name in named if meaning(name) == "train"), named[0])
            raise ConfigError(
                f"split: expected one of {shown} of {where}, found none; set `split` to {first}, "
                f"{'+'.join(named[:2])} or {ALL}"
            )
        say(f"{where}: its only split is {shown}")
        return everything, named[0]
    chosen: list[str] = []
    for part in setting.split("+"):
        meant = meaning(part)
        alike = [name for name in named if meant is not None and meaning(name) == meant]
        found = [part] if part in named else alike
        if len(found) != 1:
            raise ConfigError(f"split: expected one of {shown} of {where}, found {part!r}; choose one")
        chosen += [name for name in found if name not in chosen]
    if "" in counts:
        say(f"{where}: {_counted(counts[''], noun)} without a split are left out")
    return sorted(chosen), "+".join(chosen)


def sizes(splits: Mapping[str, Sequence[T]]) -> dict[str, int]:
    """Number of items in each split; empty if there are no splits."""
    return {name: len(items) for name, items in sorted(splits.items())} if any(splits) else {}


def file_splits(files: Sequence[File], where: str) -> dict[str, list[File]]:
    """Files of many samples, by split.

    Raises:
        SourceError: subsets have the same splits, as `160px/train-00000-of-00001.parquet` and `full/train-…`.
    """
    splits: dict[str, list[File]] = defaultdict(list)
    folders: dict[str, str] = {}
    for file in files:
        folder, _, base = file[0].rpartition("/")
        splits[split_of_file(file[0]) or ""].append(file)
        if (
            _NUMBERED.search(base.partition(".")[0])
            and split_of_file(base)
            and folders.setdefault(base, folder) != folder
        ):
            raise SourceError(
                f"{where}: expected one data set, found subsets with the same files: {folders[base]}/{base} and "
                f"{file[0]}; name one of the folders"
            )
    return dict(splits)


def split_of_file(path: str) -> str | None:
    """The split of a file of many samples, from its folders, else from its name."""
    *folders, name = path.split("/")
    for folder in folders:
        if _FOLDER.fullmatch(folder.lower()):
            return folder
    stem = name.partition(".")[0]
    plain = _NUMBERED.sub("", stem)
    if plain != stem and re.fullmatch(r"\w+", plain) and plain.lower() not in _PLAIN:
        return plain
    return split_of_name(plain)


def split_of_name(name: str) -> str | None:
    """The word in a name that is a split, such as `val` in `imagenet-val-007`."""
    return next((word for word in re.split(r"[^A-Za-z]+", name) if word.lower() in _CANONICAL), None)


def image_splits(folders: Sequence[str]) -> tuple[list[str], int]:
    """The split of each folder of images, empty if none, and the level of the folders that are splits.

    Folders at a level are splits if all of them have names of splits, or, at the first level with several folders, if
    two name different splits. One alone is not enough, as a class may be called `train`.

    Args:
        folders: all folders that contain images directly.
    """
    outermost = True
    for level in range(DEEPEST):
        at_level = [_part(folder, level) for folder in folders]
        distinct = set(at_level)
        known = {folder for folder in distinct if _FOLDER.fullmatch(folder.lower())}
        if known and (known == distinct or (outermost and len({meaning(folder) for folder in known}) > 1)):
            return [folder if folder in known else "" for folder in at_level], level
        if "" in distinct:
            break
        outermost = outermost and len(distinct) == 1
    return [""] * len(folders), 0


def _part(folder: str, level: int) -> str:
    parts = folder.split("/", level + 1)
    return parts[level] if len(parts) > level else ""


def meaning(name: str) -> str | None:
    """The split that a name stands for: `train`, `validation` or `test`; None for other names."""
    found = _FOLDER.fullmatch(name.lower())
    return _CANONICAL[found[1]] if found else None


def is_split_column(name: str) -> bool:
    """Whether a column of a table has a usual name for splits."""
    return name.strip().lower() in _COLUMNS


def warn_of_split_column(name: str, counts: Mapping[str, int], where: str) -> None:
    """Warn if a column holds several splits, as all of them are used."""
    if len({meaning(value) for value in counts} - {None}) > 1:
        found = ", ".join(f"{value} ({count})" for value, count in sorted(counts.items()))
        warn(
            f"{where}: the column {name!r} tells splits, {found}, which are all used; to use one, write each to a "
            "folder or file of its name"
        )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
