"""The documentation's pages, their code blocks and the command lines in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from tests.support.paths import ROOT

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]

_BLOCK = re.compile(r"(?:^<!-- (run|file: \S+) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`(datamerge [^`]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        mark: `run`, `file: NAME` or nothing, from the comment above it.
    """

    mark: str
    language: str
    text: str


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    return [Block(mark, language, text) for mark, language, text in _BLOCK.findall(page.read_text("utf-8"))]


def command_lines(text: str) -> Iterator[list[str]]:
    """Arguments of every `datamerge` in shell text, `torchrun … -m datamerge` included."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        command: list[str] = []
        for token in [*lexer, ";"]:
            if not re.fullmatch(r"[&|;]+", token):
                command.append(token)
                continue
            if command and (command[0] == "datamerge" or command[0] == "torchrun"):
                yield command[command.index("datamerge") + 1 :]
            command = []


def spans(page: Path) -> list[list[str]]:
    """Arguments of every `datamerge …` inside running text; these commands may be incomplete."""
    prose = _BLOCK.sub("", page.read_text("utf-8"))
    return [shlex.split(" ".join(span.split()))[1:] for span in _SPAN.findall(prose)]


def resolve(arguments: Sequence[str]) -> tuple[click.Command, list[str]]:
    """The command that arguments name, and its own arguments.

    Raises:
        click.UsageError: no such command.
    """
    from datamerge.cli import cli

    command: click.Command = cli
    rest = list(arguments)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        context = click.Context(command, **cli.context_settings)
        found = command.get_command(context, rest[0])
        if found is None and command is cli:
            raise click.UsageError(f"no such command: {rest[0]}")
        # `evaluate RUN` is short for `evaluate pgd RUN`.
        command = found or command.commands["pgd"]
        rest = rest[1:] if found else rest
    return command, rest


def unknown_flags(arguments: Sequence[str]) -> list[str]:
    """Flags that the command does not have."""
    from datamerge.cli import cli

    command, rest = resolve(arguments)
    context = click.Context(command, **cli.context_settings)  # -h is an option in every command
    known = {flag for parameter in command.get_params(context) for flag in _flags(parameter)}
    return [word for word in rest if word.startswith("-") and word.partition("=")[0] not in known]


def _flags(parameter: click.Parameter) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]
