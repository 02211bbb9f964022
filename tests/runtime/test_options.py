"""Options made from a settings model: every kind of field, from the command line to settings, help and messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import click
import pytest
from click.testing import CliRunner, Result
from pydantic import ByteSize, Field, field_validator, model_validator

from datamerge.runtime import Settings, load_settings
from datamerge.runtime.options import Option, as_flags, options
from storage_schemas import ConfigError
from storage_schemas.schema.pixel_length import PixelLength, Radius
from tests.support.refusals import refused

PositiveInt = Annotated[int, Field(ge=1)]


class Bake(Settings):
    """One field of every kind."""

    renamed: ClassVar[dict[str, str]] = {"oven": "`heat`", "heat=warm": 'heat = "low"'}

    dough: Annotated[str, Option(argument=True)] = Field(description="What is baked.")
    shapes: Annotated[list[str], Option(argument=True, metavar="SHAPE…")] = Field([], description="Forms.")
    minutes: PositiveInt = Field(30, description="Minutes in the oven; see `slow_start`.")
    loaves: PositiveInt | None = Field(None, description="Loaves.")
    rate: Annotated[float, Option(alias="--lr"), Field(gt=0)] = Field(1e-5, description="Degrees a second.")
    share: Annotated[float | None, Option(unset="all of it")] = Field(None, description="Share; `most` is a word.")
    slow_start: bool = Field(True, description="Warm up slowly.")
    steam: Annotated[bool | None, Option(alias="-s", unset="as the dough")] = Field(None, description="Let steam in.")
    heat: Literal["low", "high"] = Field("high", description="How hot.")
    finish: Literal["egg", "milk"] | None = Field(None, description="Glaze.")
    width: PixelLength = Field(PixelLength("2/255"), description="Width.")
    height: Annotated[PixelLength | None, Option(metavar="HEIGHT")] = Field(None, description="Height.")
    radii: list[Radius] = Field([Radius("1/255"), Radius("0.5")], description="Radii.")
    toppings: Annotated[list[str], Option(unset="none")] = Field(default_factory=list, description="Toppings.")
    memory: ByteSize = Field(ByteSize(100 * 10**9), description="Room.")

    @field_validator("rate")
    @classmethod
    def _possible(cls, value: float) -> float:
        if value > 100:
            raise ValueError(f"expected at most 100, found {value:g}")
        return value

    @model_validator(mode="after")
    def _together(self) -> Bake:
        if self.minutes > 600 and self.slow_start:
            raise ValueError("minutes: too many; use `slow_start=False`")
        return self


@click.command()
@options(Bake, leave_out=["finish"])
@click.option("--config")
def bake(config: str | None, **flags: Any) -> Bake:
    """Return the settings for what is typed."""
    return load_settings(Bake, config, flags)


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(bake, arguments, standalone_mode=False)


def _baked(*arguments: str) -> Bake:
    result = _run("rye", *arguments)
    assert result.exception is None, result.exception
    assert isinstance(result.return_value, Bake)
    return result.return_value


def test_without_flags_settings_have_the_defaults_of_the_model() -> None:
    assert _baked() == Bake(dough="rye")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["--minutes", "5"], {"minutes": 5}),
        (["--loaves", "2"], {"loaves": 2}),
        (["--rate", "3"], {"rate": 3.0}),
        (["--lr", "1e-3"], {"rate": 1e-3}),
        (["--share", "0.5"], {"share": 0.5}),
        (["--no-slow-start"], {"slow_start": False}),
        (["--slow-start"], {"slow_start": True}),
        (["-s"], {"steam": True}),
        (["--no-steam"], {"steam": False}),
        (["--heat", "low"], {"heat": "low"}),
        (["--width", "1.5 / 255"], {"width": PixelLength("1.5/255")}),
        (["--height", "0.5"], {"height": PixelLength("1/2")}),
        (["--radii", "1/255, 3,0.5"], {"radii": [Radius("1/255"), Radius("3"), Radius("0.5")]}),
        (["--radii", "1/255", "--radii", "3"], {"radii": [Radius("1/255"), Radius("3")]}),
        (["--toppings", "salt,seeds"], {"toppings": ["salt", "seeds"]}),
        (["--memory", "1.5TiB"], {"memory": ByteSize(1536 * 2**30)}),
        (["--memory", "1000"], {"memory": ByteSize(1000)}),
        (["round", "flat"], {"shapes": ["round", "flat"]}),
    ],
)
def test_every_kind_of_value_is_parsed(typed: list[str], expected: dict[str, Any]) -> None:
    assert _baked(*typed) == Bake(dough="rye", **expected)


@pytest.mark.parametrize("typed", [["--heat", "warm"], ["--minutes", "1.5"], ["--rate", "fast"], ["--finish", "egg"]])
def test_invalid_values_are_usage_errors(typed: list[str]) -> None:
    """A field in `leave_out` has no flag."""
    result = CliRunner().invoke(bake, ["rye", *typed])
    assert result.exit_code == 2
    assert typed[0] in result.stderr


@pytest.mark.parametrize(
    ("typed", "field"),
    [
        (["rye", "--minutes", "0"], "minutes"),
        (["rye", "--minutes", "601"], "minutes"),
        (["rye", "--rate", "101"], "rate"),
        (["rye", "--radii", "1/255,wide"], "radii"),
        (["rye", "--width", "2"], "width"),
        (["rye", "--memory", "much"], "memory"),
        ([], "dough"),
    ],
)
def test_errors_of_the_model_name_the_field(typed: list[str], field: str) -> None:
    error = _run(*typed).exception
    assert isinstance(error, ConfigError)
    assert error.exit_code == 2
    assert error.field == field
    assert str(error).startswith(f"{field}: ")
    assert not str(error).startswith(f"{field}: {field}")


def test_help_describes_every_flag() -> None:
    result = CliRunner().invoke(bake, ["--help"], terminal_width=200, max_content_width=200)
    assert result.exit_code == 0
    found = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "DOUGH" in found[0]
    assert "SHAPE…" in found[0]
    assert found[found.index("Options:") + 1 :] == [
        "--minutes INTEGER Minutes in the oven; see --slow-start. [30]",
        "--loaves INTEGER Loaves.",
        "--lr, --rate FLOAT Degrees a second. [1e-5]",
        "--share FLOAT Share; `most` is a word. [all of it]",
        "--slow-start / --no-slow-start Warm up slowly. [on]",
        "-s, --steam / --no-steam Let steam in. [as the dough]",
        "--heat [low|high] How hot. [high]",
        "--width FRACTION Width. [2/255]",
        "--height HEIGHT Height.",
        "--radii FRACTION[,…] Radii. [1/255,0.5]",
        "--toppings TEXT[,…] Toppings. [none]",
        "--memory SIZE Room. [100.0GB]",
        "--config TEXT",
        "--help Show this message and exit.",
    ]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("minutes: expected 1", "--minutes: expected 1"),
        ("slow_start: expected 1; dough: expected 2", "--slow-start: expected 1; DOUGH: expected 2"),
        ("cook: slow_start: 1; minutes: 2", "cook: slow_start: 1; minutes: 2"),
        ("more minutes: none", "more minutes: none"),
        ("drop `slow_start`, or", "drop --slow-start, or"),
        ("`slow_start=True` or `slow_start=False`", "--slow-start or --no-slow-start"),
        ("`heat=\"low\"`, `width='1/255'`, `minutes=4`", "--heat low, --width 1/255, --minutes 4"),
        ('`toppings=["salt", "seeds"]`', "--toppings salt,seeds"),
        ("name `dough` and `shapes`", "name DOUGH and SHAPE"),
        ("bake again with `other_setting=3`", "bake again with --other-setting 3"),
        ("`most`, `own` or `datamerge train`", "`most`, `own` or `datamerge train`"),
        ("oven: x", "oven: x"),
    ],
)
def test_messages_name_flags(message: str, expected: str) -> None:
    assert as_flags(message) == expected


@pytest.mark.parametrize(
    ("values", "field", "hint"),
    [({"oven": 3}, "oven", "`heat`"), ({"heat": "warm"}, "heat", 'heat = "low"'), ({"heats": 1}, "heats", "heat?")],
)
def test_errors_for_earlier_spellings_name_the_new_one(values: dict[str, Any], field: str, hint: str) -> None:
    with refused(ConfigError, field, hint):
        Bake(dough="rye", **values)


def test_constructing_settings_raises_config_errors() -> None:
    """Never pydantic's error, which has several lines and a web address."""
    with refused(ConfigError, "dough", 3) as by_name:
        Bake(dough=3)  # type: ignore[arg-type]
    with refused(ConfigError, "dough", 3) as by_mapping:
        Bake.model_validate({"dough": 3})
    assert str(by_name.value) == str(by_mapping.value)


def test_one_error_lists_all_problems_and_its_field_is_the_first() -> None:
    with refused(ConfigError, "minutes", 0, "'wide'", "'far'") as caught:
        Bake(dough="rye", minutes=0, radii=["wide", "far"])  # type: ignore[list-item]
    assert as_flags(str(caught.value)).count("--radii: ") == 2


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("from datamerge.cli import run; run()", "name one as --label-column"),
        ("import sys; from datamerge.sources import open_source; open_source(sys.argv[-1])", "as `label_column`"),
    ],
    ids=["command", "library"],
)
def test_messages_name_flags_on_the_command_line_only(tmp_path: Path, code: str, named: str) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "labels.csv").write_text("file,species,size\na.png,cat,3\n")
    command = [sys.executable, "-c", code, "inspect", "--source", str(tmp_path)]
    assert named in subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr
