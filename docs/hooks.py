"""What the site takes from the rest of the repository: commands, settings, and plots of experiments.

    <!-- generated: commands -->                        every command, its help, its options
    <!-- generated: settings MODULE:CLASS -->           the fields of a settings class

Links to plots lead out of docs/, so that they work where the Markdown is read as it is; the site gets copies.
mkdocs calls `on_files` once and `on_page_markdown` for every page (see `hooks` in mkdocs.yml).
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import click

_MARK = re.compile(r"^<!-- generated: (\w+) ?(\S*) -->$", re.MULTILINE)
_PLOT = re.compile(r"\]\(\.\./((?:\.\./)*experiments/[^)\s]+\.png)\)")
ROOT = Path(__file__).resolve().parents[1]
# Columns of a code block at a window of 1,280 px.
WIDTH = 86


def on_files(files: Any, *, config: Any) -> Any:
    """The files of the site, with the plots that pages show."""
    from mkdocs.structure.files import File

    shown = {
        plot.replace("../", "") for page in files.documentation_pages() for plot in _PLOT.findall(page.content_string)
    }
    for plot in sorted(shown):
        files.append(File.generated(config, plot, abs_src_path=str(ROOT / plot)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its marks replaced, and links to plots as those inside the site."""
    markdown = _PLOT.sub(r"](\1)", markdown)
    return _MARK.sub(lambda mark: commands() if mark[1] == "commands" else settings(mark[2]), markdown)


def commands() -> str:
    """Reference of the whole command line, as Markdown."""
    from datamerge.cli import cli

    context = click.Context(cli, info_name="datamerge", max_content_width=WIDTH, **cli.context_settings)
    return "\n".join(_command(cli, context, 2))


def _command(command: click.Command, context: click.Context, level: int) -> Iterator[str]:
    yield f"{'#' * level} {context.command_path}\n"
    formatter = context.make_formatter()
    formatter.width = WIDTH
    command.format_usage(context, formatter)
    yield f"```text\n{formatter.getvalue().strip()}\n```\n"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        # click's own mark of a paragraph whose lines stay as they are: examples.
        kept = paragraph.removeprefix("\b\n")
        yield f"```text\n{kept}\n```\n" if kept != paragraph else f"{_escape(paragraph)}\n"
    formatter = context.make_formatter()
    formatter.width = WIDTH
    options = [option for option in command.get_params(context) if isinstance(option, click.Option)]
    rows = [found for option in options if (found := option.get_help_record(context))]
    formatter.write_dl(rows)
    yield f"```text\n{formatter.getvalue().rstrip()}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            sub = command.get_command(context, name)
            if sub is not None:
                yield from _command(sub, click.Context(sub, info_name=name, parent=context), level + 1)


def settings(path: str) -> str:
    """Table of a settings class: name, type, default, meaning."""
    module, _, name = path.partition(":")
    fields = getattr(importlib.import_module(module), name).model_fields
    rows = ["| name | type | default | meaning |", "|---|---|---|---|"]
    for field, info in fields.items():
        default = "required" if info.is_required() else f"`{info.get_default(call_default_factory=True)!r}`"
        rows.append(f"| `{field}` | {_type(info.annotation)} | {default} | {_escape(info.description or '')} |")
    return "\n".join(rows)


def _type(annotation: Any) -> str:
    """Choices as they are written, other types by name; that a value may be missing shows in its default."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if parts and all(isinstance(part, str) for part in parts):
        return ", ".join(f"`{part}`" for part in parts)
    if type(None) in get_args(annotation) and len(parts) == 1:
        return _type(parts[0])
    if hasattr(annotation, "__metadata__"):
        return _type(annotation.__origin__)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_type, parts))
    if isinstance(annotation, type) and not parts:
        return annotation.__name__
    return re.sub(r"\w+\.", "", str(annotation)).replace("|", "or")


def _escape(text: str) -> str:
    return re.sub(r"([\\*_<|])", r"\\\1", text)
