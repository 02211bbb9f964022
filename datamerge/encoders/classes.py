"""Matches classes to rows of a head: by name if both have names, else by position.

exact name                                  cat = cat
normalised name                             Pirate_ship = pirate ship
synset of ImageNet, through its names       n01440764 = tench = tench, Tinca tinca
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from datamerge.runtime.class_names import are_numbers, plain_name, read_class_names
from datamerge.runtime.messages import say, warn
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError, shortened

IMAGENET = "imagenet"
_SYNSET = re.compile(r"n\d{8}")
_SHOWN = 5


@dataclass(frozen=True)
class Classes:
    """A set of classes.

    Attributes:
        names: names by label; empty if unknown.
        count: number of classes.
        where: name of the set, for messages.
    """

    names: Sequence[str]
    count: int
    where: str

    @property
    def named(self) -> bool:
        """Whether there are names, and not only numbers."""
        return bool(self.names) and not are_numbers(self.names)


@dataclass(frozen=True)
class Match:
    """Rows of a head for labels.

    Attributes:
        rows: row by label, for all labels that have one.
        names: names of the rows, if known.
    """

    rows: Mapping[int, int]
    names: Sequence[str]

    def moves(self, labels: int) -> bool:
        """Whether any of the labels 0 … `labels` − 1 differs from its row, or has none."""
        return any(self.rows.get(label) != label for label in range(labels))


def match_classes(labels: Collection[int], classes: Classes, head: Classes, setting: str, remedy: str) -> Match:
    """The row of the head for each label.

    Args:
        labels: labels that occur.
        classes: classes of the labels.
        head: classes of the head's rows.
        setting: name of the setting, for errors.
        remedy: advice for classes that the head lacks, for errors.

    Raises:
        ConfigError: a label has no row; the message names the classes that differ.
    """
    if not labels:
        return Match({}, head.names)
    if head.names and len(head.names) != head.count:
        raise ConfigError(
            f"{setting}: expected a name for each of the {head.count} classes of {head.where}, found "
            f"{len(head.names)}; {remedy}"
        )
    named = classes.named and max(labels) < len(classes.names)
    synsets = named and all(_SYNSET.fullmatch(classes.names[label]) for label in labels)
    if synsets and not head.named and head.count == len(imagenet_synsets()):
        say(f"the classes of {classes.where} are ImageNet's synsets, and are matched with {head.where} in order")
        head = Classes(imagenet_synsets(), head.count, head.where)
    if named and head.named:
        return _by_name(labels, classes, head, setting, remedy)
    if head.names and not head.named and [int(name) for name in head.names] != [*range(head.count)]:
        rows = {int(name): row for row, name in enumerate(head.names)}
        if len(rows) == len(head.names) and rows.keys() >= set(labels):
            say(f"the class names of {head.where} are numbers, and are matched with the labels of {classes.where}")
            return Match(rows, head.names)
    return _by_position(labels, classes, head, setting, remedy)


def _by_position(labels: Collection[int], classes: Classes, head: Classes, setting: str, remedy: str) -> Match:
    outside = sorted(label for label in labels if not 0 <= label < head.count)
    if outside:
        name = f" ({classes.names[outside[0]]})" if 0 <= outside[0] < len(classes.names) else ""
        raise ConfigError(
            f"{setting}: expected a class for every label of {classes.where}, found label {outside[0]}{name} and "
            f"labels from 0 to {head.count - 1} in {head.where}; {remedy}"
        )
    if classes.names and len(classes.names) != head.count:
        warn(
            f"{classes.where} has {len(classes.names)} classes and {head.where} has {head.count}: labels are used "
            "as positions in the head, which is wrong if the source has only some of its classes; "
            + ("give the source class names" if head.named else "give a file of the head's class names")
            + " to match by name"
        )
    elif classes.named or head.named:
        nameless = head.where if classes.named else classes.where
        say(f"{nameless} has no class names, so the labels of {classes.where} are positions in {head.where}")
    return Match({label: label for label in range(head.count)}, head.names or classes.names)


def _by_name(labels: Collection[int], classes: Classes, head: Classes, setting: str, remedy: str) -> Match:
    ways: list[Callable[[Sequence[str]], Sequence[str]]] = [list, lambda names: [plain_name(name) for name in names]]
    if any(map(_SYNSET.fullmatch, [*classes.names, *head.names])):
        ways.append(canonical_names)
    rows: dict[int, int] = {}
    for way in ways:
        mine = _places(way(classes.names), rows.keys())
        others = _places(way(head.names), set(rows.values()))
        for name, places in mine.items():
            # If both lists have a name twice (crane), the two are matched in order.
            if name and len(others.get(name, ())) == len(places):
                rows.update(zip(places, others[name], strict=True))
    missing = [classes.names[label] for label in sorted(set(labels) - rows.keys())]
    if missing:
        several = [name for name in missing if list(head.names).count(name) > 1]
        more = f" ({several[0]!r} is the name of several)" if several else ""
        left = [name for row, name in enumerate(head.names) if row not in rows.values()]
        raise ConfigError(
            f"{setting}: expected one class of {head.where} for each of the {len(set(labels))} classes of "
            f"{classes.where}, found none for {len(missing)}: {_shown(missing)}{more}; of its {head.count}, "
            f"{_shown(left) or 'none'} are left; {remedy}"
        )
    if any(label != rows[label] for label in labels):
        say(f"the {len(set(labels))} classes of {classes.where} are matched with {head.where} by name")
    return Match(rows, head.names)


def _places(names: Sequence[str], left_out: Collection[int]) -> dict[str, list[int]]:
    """Positions of each name, without those in `left_out`."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if place not in left_out:
            places.setdefault(name, []).append(place)
    return places


def canonical_names(names: Sequence[str]) -> list[str]:
    """ImageNet's synset for each name: a synset, its description or its name in open_clip; else empty."""
    synsets = imagenet_synsets()
    if list(names) == imagenet_names():  # two names occur twice
        return list(synsets)
    known = _synset_of_name()
    return [name if _SYNSET.fullmatch(name) else known.get(plain_name(name), "") for name in names]


@cache
def imagenet_synsets() -> Sequence[str]:
    """The 1,000 synsets of ImageNet-1k in label order, as timm ships them."""
    make_torchvision_importable()
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


@cache
def _synset_of_name() -> Mapping[str, str]:
    """Synset by name, for names that only one synset has."""
    from timm.data.imagenet_info import ImageNetInfo

    synsets = imagenet_synsets()
    places: dict[str, set[str]] = {}
    words = [ImageNetInfo().label_descriptions(), imagenet_names()]
    for synset, description, name in zip(synsets, *words, strict=True):
        for text in (description, description.partition(",")[0], name):
            places.setdefault(plain_name(text), set()).add(synset)
    return {name: min(found) for name, found in places.items() if len(found) == 1}


def imagenet_names() -> list[str]:
    """The 1,000 class names that open_clip ships, in label order."""
    make_torchvision_importable()
    import open_clip

    return list(open_clip.IMAGENET_CLASSNAMES)


def read_names(file: str | None) -> list[str]:
    """Class names from a file or of `imagenet`; empty without either.

    Raises:
        ConfigError: see `read_class_names`.
    """
    if file is None:
        return []
    return imagenet_names() if file == IMAGENET else read_class_names(file)


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(shortened(name) for name in names[:_SHOWN])}{more}"
