"""Every `datamerge …` in the documentation and in `--help` names an existing command and existing flags."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from datamerge.cli import cli
from docs.hooks import commands, settings
from tests.support.pages import PAGES, blocks, command_lines, name, resolve, spans, unknown_flags


def every_command(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, **cli.context_settings)
        for sub in command.list_commands(context):
            found = command.get_command(context, sub)
            assert found is not None
            yield from every_command(found, f"{path} {sub}")


def check(arguments: list[str]) -> None:
    """Parse as click would, without running anything; a line with … need only name existing commands and flags."""
    assert unknown_flags(arguments) == []
    command, rest = resolve(arguments)
    if "…" not in " ".join(rest):
        command.make_context(command.name, rest, **cli.context_settings)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_command_lines_parse(page: Path) -> None:
    for block in blocks(page):
        if block.language == "sh":
            for arguments in command_lines(block.text):
                check(arguments)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_running_text_exist(page: Path) -> None:
    for arguments in spans(page):
        assert unknown_flags(arguments) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_in_running_text_exist(page: Path) -> None:
    """Also without `datamerge` before them: `--deviation 1.5`, `train --refine 1`."""
    found = [command for _, command in every_command(cli, "datamerge")]
    options = [option for command in found for option in command.params]
    flags = {"--help"}.union(*({*option.opts, *option.secondary_opts} for option in options))
    names = "|".join(str(command.name) for command in found)
    spans_of_ours = re.findall(rf"(?<!`)`((?:(?:{names}) )?--[^`]+)`", page.read_text("utf-8"))
    used = {flag for span in spans_of_ours for flag in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span)}
    assert used <= flags


def test_examples_of_help_parse() -> None:
    found = 0
    for _, command in every_command(cli, "datamerge"):
        for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
            for arguments in command_lines(paragraph) if paragraph.startswith("\b") else ():
                check(arguments)
                found += 1
    assert found > 20


@pytest.mark.parametrize(
    "line",
    [
        "datamerge mrege a b",
        "datamerge merge a b --memebrs 3",
        "datamerge merge a b c",
        "datamerge train a b --arm avgs",
    ],
)
def test_wrong_lines_are_found(line: str) -> None:
    (arguments,) = command_lines(line)
    with pytest.raises((click.UsageError, AssertionError)):
        check(arguments)


def test_the_reference_has_every_command_and_flag() -> None:
    text = commands()
    sections = dict(zip(*[iter([part.strip() for part in _split(text)])] * 2, strict=True))
    for path, command in every_command(cli, "datamerge"):
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert all(flag in sections[path] for flag in parameter.opts), (path, parameter.opts)
    assert "Sentinel" not in text


def test_settings_tables_have_every_field() -> None:
    from trainer import TrainConfig

    rows = settings("trainer.config:TrainConfig").splitlines()[2:]
    assert len(rows) == len(TrainConfig.model_fields)
    assert any(row.startswith("| `learning_rate` | float | `1e-05` | Peak") for row in rows)
    assert any("`avg`, `clean`" in row for row in rows)
    assert rows[0].startswith("| `artifact` | str or list[str] | required |")


def _split(text: str) -> list[str]:
    """Heading, body, heading, body …"""
    parts: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            parts += [line.lstrip("# "), ""]
        else:
            parts[-1] += line + "\n"
    return parts
