"""The table of `datamerge inspect --source`: how raw images would be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from datamerge.runtime import Settings
from datamerge.runtime.fields import ImageColumn, LabelColumn, Split
from datamerge.runtime.options import Option, as_flags

# Number of items shown from the start and from the end of a long list.
FIRST, LAST = 5, 3


class SourceSettings(Settings):
    """Options of `datamerge inspect --source`."""

    split: Split = None
    image_column: ImageColumn = None
    label_column: LabelColumn = None
    thumbnails: Annotated[str | None, Option(metavar="FILE.png", unset="none")] = Field(
        None, description="Picture to write, with three images of the source."
    )


def rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows (name, value) of the table about a source, from the result of `inspect_source`."""
    looked, classes = facts["looked_at"], facts["classes"]
    found = [("kind", facts["kind"])]
    if facts["splits"]:
        sizes = ", ".join(f"{name or 'none'} ({size})" for name, size in facts["splits"].items())
        found.append(("splits", f"{sizes}; {facts['split'] or 'none'} chosen"))
    if facts["choose"]:
        found.append(("to do", as_flags(facts["choose"])))
    found.append(("samples", str(facts["samples"])))
    if classes:
        shown = [f"{entry['label']} {entry['name'] or ''}".strip() + f" ({entry['samples']})" for entry in classes]
        found.append(("classes", f"{len(classes)}: {_shortened(shown)}"))
    missing = facts["unlabelled"]
    because = f": {as_flags(facts['no_labels_because'])}" if facts["no_labels_because"] else ""
    found.append(("without label", ("all" if missing == facts["samples"] else str(missing)) + because))
    left_out = [f"{count} {reason}" for reason, count in facts["left_out"].items()]
    found.append(("files left out", _shortened(left_out) or "none"))
    found.append(("looked at", "all" if looked == facts["samples"] else f"{looked}, drawn at random"))
    found += [(name, _shortened([f"{key} ({count})" for key, count in facts[name].items()])) for name in _COUNTED]
    done = "applied" if facts["exif"] == "transpose" else "ignored"
    found.append(("turned by EXIF", f"{facts['turned']}; {done} unless --exif says otherwise"))
    unusable = [f"{entry['name']}: {entry['reason']}" for entry in facts["unusable"]]
    found.append(("unusable", f"{len(unusable)}: {_shortened(unusable)}" if unusable else "none"))
    return found


_COUNTED = ("sizes", "modes", "formats")


def _shortened(items: Sequence[str]) -> str:
    """The first and last items of a list, as text."""
    if len(items) > FIRST + LAST + 1:
        items = [*items[:FIRST], "…", *items[-LAST:]]
    return ", ".join(items)
