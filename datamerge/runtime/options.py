"""Makes command-line options from a model of settings, and spells settings as flags in messages.

A field defines an option's name (`keep_clean` → `--keep-clean`), type, help (its description) and default. `Option`
in its annotation adds the rest:

    learning_rate: Annotated[float, Option(alias="--lr")] = Field(1e-5, description="Peak rate of AdamW.")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from datamerge.runtime.settings import Settings
from storage_schemas.schema.pixel_length import PixelLength

F = TypeVar("F", bound=Callable[..., Any])
HELP_FLAGS = {"help_option_names": ["-h", "--help"]}
"""`context_settings` of every command."""
# A setting in a message: in backquotes, with or without a value.
_SETTING = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]+))?`")
_IN_FRONT = re.compile(r"(^|; )([a-z][a-z0-9_]*)(?=: )")

# Settings of the commands imported so far → their spelling on the command line.
_spellings: dict[str, str] = {}


@dataclass(frozen=True)
class Option:
    """How a field appears on the command line; it annotates the whole type: `Annotated[int | None, Option(…)]`.

    Attributes:
        alias: another spelling of the flag, such as `--lr`.
        metavar: placeholder for the value in the help.
        unset: the effective default, for the help, if the default is None or an empty list.
        argument: whether the value is positional; a list takes all remaining values.
    """

    alias: str = ""
    metavar: str = ""
    unset: str = ""
    argument: bool = False


def options(model: type[Settings], leave_out: Collection[str] = ()) -> Callable[[F], F]:
    """Decorate a command with an option or argument for every field of the model, in the order of the fields.

    The command receives the values by name, None if not given, as `load_settings` takes them. Texts, lengths and
    sizes are checked by the model, whose errors name the setting.

    Args:
        model: model of the settings.
        leave_out: fields without an option.
    """

    fields = {name: field for name, field in model.model_fields.items() if name not in leave_out}
    # Without the `…` of repeated arguments, as commands share the spellings.
    _spellings.update({name: _spelling(name, field).removesuffix("…") for name, field in fields.items()})

    def decorate(function: F) -> F:
        for name, field in reversed(fields.items()):
            function = (_argument if _option(field).argument else _flag)(name, field)(function)
        return function

    return decorate


def spell_flags_of(command: click.Command) -> None:
    """Let messages also spell as flags those options of a command that come from no model."""
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name is not None:
            _spellings.setdefault(parameter.name, max(parameter.opts, key=len))


def as_flags(message: str, *, in_front: bool = True) -> str:
    """Spell the settings in a message as flags: `` `keep_clean=True` `` becomes --keep-clean.

    This covers settings of the commands imported so far, and anything in backquotes with a value. At the start of a
    message settings have no backquotes: `epsilon: expected …; steps: expected …`.

    Args:
        message: message of an error.
        in_front: whether a setting may be at the start; many messages start with a path, which may look like one.
    """
    if in_front and message.partition(":")[0] in _spellings:
        message = _IN_FRONT.sub(lambda found: found[1] + _spellings.get(found[2], found[2]), message)
    return _in_backquotes(message)


def _in_backquotes(text: str) -> str:
    def spelt(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if value is None:
            return _spellings.get(name, found[0])
        if value == "False":
            return f"--no-{_dashed(name)}"
        # Python writes `True`, quotes and brackets; flags do not.
        value = re.sub("^True$|[\"'\\[\\]]", "", value).replace(", ", ",")
        return f"{_spellings.get(name, f'--{_dashed(name)}')} {value}".rstrip()

    return _SETTING.sub(spelt, text)


def _spelling(name: str, field: FieldInfo) -> str:
    look = _option(field)
    return look.metavar or name.upper() if look.argument else f"--{_dashed(name)}"


def _option(field: FieldInfo) -> Option:
    return next((item for item in field.metadata if isinstance(item, Option)), Option())


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _argument(name: str, field: FieldInfo) -> Callable[[F], F]:
    kind = _plain(field.annotation)
    several = any(get_origin(part) is list for part in (kind, *get_args(kind)))  # a list, or a union with one
    # Never required: a TOML file may hold the value, and the model reports missing ones.
    look: dict[str, Any] = {"nargs": -1, "callback": _listed} if several else {}
    return click.argument(name, required=False, metavar=_spelling(name, field), **look)


def _flag(name: str, field: FieldInfo) -> Callable[[F], F]:
    look, kind, flag = _option(field), _plain(field.annotation), _spelling(name, field)
    typed: dict[str, Any] = {"metavar": look.metavar or _metavar(kind)}
    if kind is bool:
        flag, typed = f"{flag}/--no-{_dashed(name)}", {}
    elif get_origin(kind) is Literal:
        typed["type"] = click.Choice(get_args(kind))
    elif get_origin(kind) is list:
        typed |= {"multiple": True, "callback": _split}
    elif kind in (int, float):
        typed["type"] = kind
    return click.option(*filter(None, (look.alias, flag)), name, default=None, help=_help(field), **typed)


def _plain(annotation: Any) -> Any:
    """The type without `| None` and `Annotated`."""
    if type(None) in get_args(annotation):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def _metavar(kind: Any) -> str | None:
    if get_origin(kind) is list:
        return f"{_metavar(_plain(get_args(kind)[0])) or 'TEXT'}[,…]"
    if kind is ByteSize:
        return "SIZE"
    return "FRACTION" if isinstance(kind, type) and issubclass(kind, PixelLength) else None


def _help(field: FieldInfo) -> str:
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    shown = _option(field).unset if default in (None, []) else _shown(default)
    return _in_backquotes(f"{field.description} [{shown}]" if shown else f"{field.description}")


def _shown(default: Any) -> str:
    if isinstance(default, list):
        return ",".join(map(str, default))
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, ByteSize):
        return default.human_readable(decimal=True)
    return f"{default:g}".replace("e-0", "e-") if isinstance(default, float) else str(default)


def _listed(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> list[str] | None:
    return list(value) or None


def _split(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> list[str] | None:
    return [part.strip() for text in value for part in text.split(",")] or None
