"""Settings from preset, file and flags, in rising precedence: strict parsing, and errors that list all problems."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import Field, model_validator

from datamerge.runtime import Settings, load_settings
from storage_schemas import ConfigError
from storage_schemas.schema.exact import pixel_spread
from storage_schemas.schema.pixel_length import PixelLength
from tests.support.refusals import refused


class Attack(Settings):
    """Settings like the sub-commands'."""

    epsilon: PixelLength = PixelLength("2/255")
    steps: int = Field(10, ge=0)
    members: int = Field(ge=1)
    encoder: str | None = None
    learning_rate: float = 1e-5

    @model_validator(mode="after")
    def _encoder_for_many(self) -> Attack:
        if self.members > 100 and self.encoder is None:
            raise ValueError("members: more than 100 need an encoder")
        return self


def _toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return str(path)


def test_flags_beat_the_file_and_the_file_beats_the_preset(tmp_path: Path) -> None:
    preset = {"epsilon": "1/255", "steps": 1, "members": 1, "encoder": "preset"}
    file = _toml(tmp_path, 'steps = 2\nmembers = 2\nencoder = "file"\n')
    settings = load_settings(Attack, file, {"members": 3, "encoder": None, "steps": None}, preset)
    assert settings == Attack(epsilon=PixelLength("1/255"), steps=2, members=3, encoder="file", learning_rate=1e-5)


def test_a_flag_may_be_falsy(tmp_path: Path) -> None:
    """0 is a value; only None means that no flag was given."""
    settings = load_settings(Attack, _toml(tmp_path, "steps = 2\nmembers = 2\n"), {"steps": 0})
    assert settings.steps == 0


def test_inputs_are_not_changed(tmp_path: Path) -> None:
    preset, flags = {"members": 1}, {"steps": 4, "encoder": None}
    load_settings(Attack, _toml(tmp_path, "members = 2"), flags, preset)
    assert (preset, flags) == ({"members": 1}, {"steps": 4, "encoder": None})


@pytest.mark.parametrize(
    ("key", "hint"),
    [("epsilom", " epsilon?"), ("learning-rate", " learning_rate?"), ("zzz", None)],
)
def test_errors_for_misspelt_keys_suggest_the_closest(tmp_path: Path, key: str, hint: str | None) -> None:
    with refused(ConfigError, key, hint or "", tmp_path / "settings.toml") as caught:
        load_settings(Attack, _toml(tmp_path, f'members = 1\n{key} = "x"\n'), {})
    assert ("?" in str(caught.value)) == (hint is not None)


def test_every_problem_is_listed_in_one_line(tmp_path: Path) -> None:
    file = _toml(tmp_path, 'epsilon = "2"\nsteps = -1\nencodr = "x"\nlearning_rate = "fast"\n')
    facts = (" 2/255?", "steps: ", -1, "encodr: ", " encoder?", "members: ", "learning_rate: ", "'fast'", file)
    with refused(ConfigError, "epsilon", *facts):
        load_settings(Attack, file, {})


@pytest.mark.parametrize(
    "values", [{"steps": "10"}, {"steps": 1.5}, {"steps": True}, {"members": "3"}, {"encoder": 3}]
)
def test_nothing_is_coerced(values: dict[str, Any]) -> None:
    ((field, value),) = values.items()
    with refused(ConfigError, field, repr(value)):
        load_settings(Attack, None, {"members": 1, **values})


def test_errors_of_rules_over_several_fields_have_no_prefix() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(Attack, None, {"members": 101})
    assert str(caught.value) == "members: more than 100 need an encoder"


@pytest.mark.parametrize("text", ["steps = ", "[a\n", "steps = 1\nsteps = 2", "\x00", "a = 'b"])
def test_invalid_toml_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    with refused(ConfigError, None, f"{tmp_path / 'settings.toml'}: ", " TOML: "):
        load_settings(Attack, _toml(tmp_path, text), {})


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"encoder = '\xe9'")
    with refused(ConfigError, None, tmp_path / "latin.toml", " TOML: ", "0xe9"):
        load_settings(Attack, str(tmp_path / "latin.toml"), {})
    with refused(ConfigError, None, tmp_path / "missing.toml", os.strerror(errno.ENOENT)):
        load_settings(Attack, str(tmp_path / "missing.toml"), {})
    with refused(ConfigError, None, tmp_path, os.strerror(errno.EISDIR)):
        load_settings(Attack, str(tmp_path), {})


def test_settings_cannot_be_changed() -> None:
    settings = load_settings(Attack, None, {"members": 1})
    with pytest.raises(ValueError, match="frozen"):
        settings.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "field", "facts"),
    [
        ("steps=" + "[" * 5000, None, ["settings.toml: ", " TOML: "]),
        ("steps=" + "9" * 5000, None, ["settings.toml: ", " TOML: "]),
        ('epsilon="1e-999999999"', "epsilon", ["'1e-999999999'"]),
        ('epsilon="1/\u0660"', "epsilon", ["'1/\u0660'"]),
        ("steps=0x" + "F" * 5000, "steps", [" 64 ", "(int)"]),
        ("encoder=[0x" + "F" * 5000 + "]", "encoder", ["(list)"]),
    ],
)
def test_settings_that_would_exhaust_the_parser_are_refused(
    tmp_path: Path, text: str, field: str | None, facts: list[str]
) -> None:
    with refused(ConfigError, field, *facts):
        load_settings(Attack, _toml(tmp_path, text), {"members": 1})


@pytest.mark.parametrize("text", ["encoder = ['{}']", "epsilon = '{}'", "{} = 1"])
def test_messages_stay_short(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(Attack, _toml(tmp_path, text.format("x" * 5000)), {"members": 1})
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(("typed", "kept"), [(".01", "1/100"), ("8e-3", "1/125"), ("2/255", "2/255"), ("0.5", "1/2")])
def test_decimals_are_kept_as_fractions(typed: str, kept: str) -> None:
    """So that later readers, such as `remerge` and `combine`, see one spelling."""
    assert load_settings(Attack, None, {"members": 1, "epsilon": typed}).epsilon == PixelLength(kept)
    assert pixel_spread({"attack": {"epsilon": kept}}) >= 2


def test_paths_and_integers_of_numpy_are_converted(tmp_path: Path) -> None:
    values: dict[str, Any] = {"members": np.int64(3), "encoder": tmp_path}
    settings = Attack(**values)
    assert (settings.members, settings.encoder) == (3, str(tmp_path))
    assert type(settings.members) is int
    wrong: list[dict[str, Any]] = [{"members": True}, {"members": 2.0}, {"members": 1, "encoder": 3}]
    for values in wrong:
        with refused(ConfigError, list(values)[-1], list(values.values())[-1]):
            Attack(**values)
