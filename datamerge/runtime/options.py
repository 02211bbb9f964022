"""The command line's side of settings: options made from a model, and messages that name them as flags.

A field gives an option its name (`keep_clean` → `--keep-clean`), type, help (the description) and default;
`Option` beside the type adds what these do not say:

    learning_rate: Annotated[float, Option(alias="--lr")] = Field(1e-5, description="Peak rate of AdamW.")
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from datamerge.runtime.settings import Settings
from storage_schemas.schema.pixel_length import PixelLength

F = TypeVar("F", bound=Callable[..., Any])
# In backquotes, as errors write them: a setting, with or without a value.
_SETTING = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]+))?`")
_IN_FRONT = re.compile(r"(^|; )([a-z][a-z0-9_]*)(?=: )")


@dataclass(frozen=True)
class Option:
    """How the command line shows a field.

    Attributes:
        alias: another spelling of the flag, such as `--lr`.
        metavar: stands for the value in the help.
        unset: what happens without a value, where the default is None.
        argument: whether the value has no flag but a place; a list takes all values at its place.
    """

    alias: str = ""
    metavar: str = ""
    unset: str = ""
    argument: bool = False


def options(model: type[Settings], leave_out: Collection[str] = ()) -> Callable[[F], F]:
    """Decorates a command with an option or argument for every field of the model, in the order of the fields.

    The command gets them by name, None where the user gave none: what `load_settings` takes as flags.
    """

    def decorate(function: F) -> F:
        for name, field in reversed(model.model_fields.items()):
            if name not in leave_out:
                function = _parameter(name, field)(function)
        return function

    return decorate


def as_flags(message: str) -> str:
    """A message with its settings as the command line spells them: `` `keep_clean=True` `` becomes --keep-clean."""
    known = {name: _option(field) for model in _models(Settings) for name, field in model.model_fields.items()}

    def spelt(name: str) -> str:
        return name.upper() if name in known and known[name].argument else f"--{name.replace('_', '-')}"

    def setting(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if value is None:
            return spelt(name) if name in known else found[0]
        if value == "False":
            return f"--no-{name.replace('_', '-')}"
        return spelt(name) + ("" if value == "True" else f" {value.strip(chr(34) + chr(39))}")

    message = _SETTING.sub(setting, message)
    return _IN_FRONT.sub(lambda found: found[1] + (spelt(found[2]) if found[2] in known else found[2]), message)


def _models(model: type[Settings]) -> Iterator[type[Settings]]:
    for child in model.__subclasses__():
        yield child
        yield from _models(child)


def _option(field: FieldInfo) -> Option:
    return next((item for item in field.metadata if isinstance(item, Option)), Option())


def _parameter(name: str, field: FieldInfo) -> Callable[[F], F]:
    look, kind = _option(field), _plain(field.annotation)
    is_list = get_origin(kind) is list
    if look.argument:
        # Whether it is missing says the model: a TOML file may hold it.
        metavar = look.metavar or name.upper()
        return click.argument(
            name, nargs=-1 if is_list else 1, required=False, metavar=metavar, callback=_given, default=None
        )
    flag = f"--{name.replace('_', '-')}"
    flags = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    spellings = [look.alias, flags] if look.alias else [flags]
    typed: dict[str, Any] = {}
    if get_origin(kind) is Literal:
        typed["type"] = click.Choice(get_args(kind))
    elif kind in (int, float):
        typed["type"] = kind
    elif is_list:
        typed |= {"multiple": True, "callback": _split}
    if kind is not bool and (metavar := look.metavar or _metavar(kind)):
        typed["metavar"] = metavar
    return click.option(*spellings, name, default=None, help=_help(field, look), **typed)


def _plain(annotation: Any) -> Any:
    """The type without `| None` and `Annotated`."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    while hasattr(annotation, "__metadata__") and annotation is not ByteSize:
        annotation = annotation.__origin__
    return annotation


def _metavar(kind: Any) -> str:
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
        return f"{_metavar(_plain(kind)) or 'TEXT'}[,…]"
    if kind is ByteSize:
        return "SIZE"
    return "FRACTION" if isinstance(kind, type) and issubclass(kind, PixelLength) else ""


def _help(field: FieldInfo, look: Option) -> str:
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif isinstance(default, list):
        shown = ",".join(map(str, default)) or look.unset
    else:
        shown = look.unset if default is None else str(default)
    return f"{field.description}" + (f" [{shown}]" if shown else "")


def _given(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    return list(value) or None if isinstance(value, tuple) else value


def _split(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> list[str] | None:
    return [part.strip() for text in value for part in text.split(",")] or None
