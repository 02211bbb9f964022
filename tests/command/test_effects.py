"""Chosen settings that would have no effect are refused; one table covers all commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamerge.evaluation.config import EmbeddingConfig, EvaluateConfig, ZeroShotConfig
from datamerge.evaluation.llava.config import CaptionsConfig, VqaConfig
from datamerge.runtime import Settings, load_settings
from datamerge.tools.cli import RemergeSettings
from merge_service import MergeConfig
from storage_schemas import ConfigError
from tests.support.command import run_command
from tests.support.refusals import refused
from trainer import TrainConfig
from trainer.config import preset_names, read_preset

MERGE: dict[str, Any] = {"source": "photos", "artifact": "a"}
ATTACK: dict[str, Any] = {**MERGE, "encoder": "mlp:3x8x8-4"}
LABEL: dict[str, Any] = {**MERGE, "grouping": "label"}
TRAIN: dict[str, Any] = {"artifact": "a", "run": "r", "steps": 5}
IMAGES: dict[str, Any] = {"runs": ["mlp:3x8x8-4"], "data": "photos"}
LLAVA: dict[str, Any] = {"runs": ["own"], "data": "d.json", "images": "photos", "attack": False}
ZERO_SHOT: dict[str, Any] = {**IMAGES, "head": "h.safetensors"}

Case = tuple[type[Settings], list[str], dict[str, Any], dict[str, Any]]
"""Settings model, words of the command, other settings, and the values that have no effect with these."""
CASES: list[Case] = [
    (
        MergeConfig,
        ["merge"],
        LABEL,
        {
            "attack": "pgd",
            "epsilon": "2/255",
            "steps": 10,
            "step_size": "1/255",
            "random_start": False,
            "start_radius": "1/255",
            "restarts": 2,
            "objective": "squared_error",
            "precision": "float32",
            "compile": True,
            "target_encoder": "mlp:3x8x8-4",
            "keep_clean": True,
            "clusters": 2,
            "cluster_by": "pixels",
            "group_column": "x",
            "factor_kind": "sketch",
            "class_names": "names.txt",
            "batch_size": 64,
            "num_gpus": 1.0,
        },
    ),
    (
        MergeConfig,
        ["merge"],
        {**ATTACK, "attack": "none"},
        {
            "epsilon": "2/255",
            "steps": 10,
            "step_size": "1/255",
            "random_start": False,
            "start_radius": "1/255",
            "restarts": 2,
            "objective": "cross_entropy",
            "precision": "float32",
            "compile": True,
            "target_encoder": "mlp:3x8x8-4",
            "grid": False,
            "keep_members": True,
            "keep_clean": True,
            "factors": 1,
            "factor_kind": "sketch",
        },
    ),
    (MergeConfig, ["merge"], {**MERGE, "attack": "none", "targets": "label"}, {"batch_size": 8, "num_gpus": 1.0}),
    (MergeConfig, ["merge"], {**ATTACK, "attack": "apgd"}, {"step_size": "1/255"}),
    (MergeConfig, ["merge"], {**ATTACK, "steps": 0}, {"step_size": "1/255"}),
    (
        MergeConfig,
        ["merge"],
        {**ATTACK, "random_start": False, "objective": "cross_entropy", "members": 1},
        {"start_radius": "1/255", "restarts": 1},
    ),
    (MergeConfig, ["merge"], {**ATTACK, "device": "cpu"}, {"num_gpus": 0.5, "class_names": "names.txt"}),
    *(
        (model, words, {**base, "limit": 5}, {"limit_first": 5})
        for model, words, base in (
            (MergeConfig, ["merge"], LABEL),
            (EvaluateConfig, ["evaluate"], IMAGES),
            (ZeroShotConfig, ["evaluate", "zero-shot"], ZERO_SHOT),
            (EmbeddingConfig, ["evaluate", "embedding"], IMAGES),
        )
    ),
    (
        TrainConfig,
        ["train"],
        TRAIN,
        {
            "members": 2,
            "deviation": 1.0,
            "refine_step_size": "1/255",
            "start_noise": "1/255",
            "on_overfit": "widen",
            "overfit_every": 7,
            "eval_every": 500,
        },
    ),
    (TrainConfig, ["train"], {**TRAIN, "arm": "clean"}, {"epsilon": "2/255"}),
    (TrainConfig, ["train"], {**TRAIN, "cache": "none"}, {"cache_bytes": 10**9}),
    (TrainConfig, ["train"], {**TRAIN, "arm": "ind"}, {"samples": 1, "estimator": "sampled"}),
    (TrainConfig, ["train"], {**TRAIN, "loss": "cross_entropy"}, {"loss_scale": 0.5, "clean_weight": 0.5}),
    (TrainConfig, ["train"], {**TRAIN, "loss": "cosine", "arm": "ind"}, {"loss_scale": 0.5}),
    (EvaluateConfig, ["evaluate"], IMAGES, {"sample_seed": 42, "class_names": "imagenet", "pictures": 2}),
    (ZeroShotConfig, ["evaluate", "zero-shot"], ZERO_SHOT, {"sample_seed": 1, "templates": "simple"}),
    (ZeroShotConfig, ["evaluate", "zero-shot"], {**IMAGES, "head": "outputs"}, {"templates": "openai"}),
    (ZeroShotConfig, ["evaluate", "zero-shot"], {**IMAGES, "head": "timm:resnet18"}, {"templates": "openai"}),
    (EmbeddingConfig, ["evaluate", "embedding"], IMAGES, {"sample_seed": 7}),
    *(
        (
            model,
            ["evaluate", name],
            {**LLAVA, **more},
            {"epsilon": "2/255", "steps": 3, "precision": "tf32", "save_images": True, "pictures": 8},
        )
        for model, name, more in ((CaptionsConfig, "captions", {}), (VqaConfig, "vqa", {"annotations": "a.json"}))
    ),
    (RemergeSettings, ["remerge"], {}, {"factor_kind": "sketch"}),
]
EACH = [(model, words, base, name, value) for model, words, base, values in CASES for name, value in values.items()]


@pytest.mark.parametrize(("model", "words", "base", "name", "value"), EACH)
def test_settings_without_effect_are_refused_only_if_they_were_chosen(
    model: type[Settings], words: list[str], base: dict[str, Any], name: str, value: Any
) -> None:
    with refused(ConfigError, name) as caught:
        model(**base, **{name: value})
    assert "`" in str(caught.value)
    settings = model(**base)
    # Values in a dump of all settings, or defaults that a preset repeats, were not chosen.
    assert model(**settings.model_dump()) == settings
    assert load_settings(model, None, base, {name: settings.model_dump()[name]}) == settings


@pytest.mark.parametrize(("model", "words", "base", "values"), CASES)
def test_commands_refuse_settings_without_effect_in_one_line(
    model: type[Settings], words: list[str], base: dict[str, Any], values: dict[str, Any]
) -> None:
    name, value = next(iter(values.items()))
    places = {"remerge": ["a", "b"], "merge": ["photos", "a"], "train": ["a", "r"]}.get(
        words[0], base.get("runs", [])
    )
    typed = [*words, *places]
    for setting, given in {**base, name: value}.items():
        if setting not in ("source", "artifact", "run", "runs"):
            typed += _flag(setting, given)
    done = run_command(*typed)
    assert (done.returncode, done.stdout) == (2, "")
    flag = _flag(name, value)[0]
    assert done.stderr.splitlines()[-1].startswith(f"error: --{name.replace('_', '-')}: ")
    assert flag in done.stderr


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


def test_every_effect_of_every_model_is_tested() -> None:
    def all_settings(model: type[Settings]) -> Iterator[type[Settings]]:
        yield model
        for other in model.__subclasses__():
            yield from all_settings(other)

    ours = [model for model in all_settings(Settings) if not model.__module__.startswith(("tests.", "experiments."))]
    named = {(model, name) for model in ours for effect in model.effects for name in effect.of}
    tried = {(model, name) for model, _, _, name, _ in EACH}
    leaves = {(model, name) for model, name in named if not model.__subclasses__()}
    assert leaves <= tried
    assert all(name in model.model_fields for model, name in named)


def test_presets_are_valid_with_every_arm() -> None:
    for preset in preset_names():
        for arm in ("avg", "mean-only", "random-member"):
            if "deviation" not in read_preset(preset) and "refine_steps" not in read_preset(preset):
                load_settings(TrainConfig, None, {"artifact": "a", "run": "r", "arm": arm}, read_preset(preset))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("model", "base", "name"),
    [
        (MergeConfig, ATTACK, "num_gpus"),
        *(
            (TrainConfig, TRAIN, name)
            for name in ("learning_rate", "weight_decay", "loss_scale", "clean_weight", "gradient_clip", "ema")
        ),
    ],
)
def test_numbers_are_finite(model: type[Settings], base: dict[str, Any], name: str, value: float) -> None:
    with refused(ConfigError, name, value):
        model(**base, **{name: value})


@pytest.mark.parametrize("price", ["-3", "0", "nan", "inf"])
def test_a_price_must_be_positive(tmp_path: Path, price: str) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    done = run_command("merge", tmp_path / "x.npz", tmp_path / "a", "--dry-run", "--price-per-hour", price)
    assert done.returncode == 2
    assert "price above 0" in done.stderr


STILL: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"random_start": False}, "random_start", {"random_start": True}),
    ({"start_radius": "0"}, "start_radius", {"start_radius": None}),
    ({"attack": "apgd", "random_start": False}, "random_start", {"random_start": True}),
    ({"random_start": False, "target_encoder": "mlp:3x8x8-4"}, "random_start", {"random_start": True}),
    ({"random_start": False, "steps": 0, "objective": "cross_entropy"}, "random_start", {"random_start": True}),
    ({"random_start": False, "objective": "cross_entropy"}, "random_start", {"members": 1}),
    ({"start_radius": "0", "objective": "cross_entropy"}, "start_radius", {"members": 1}),
    ({"epsilon": "0"}, "epsilon", {"epsilon": "1/255"}),
]


@pytest.mark.parametrize(("settings", "field", "remedy"), STILL, ids=str)
def test_attacks_that_leave_all_members_equal_are_refused(
    settings: dict[str, Any], field: str, remedy: dict[str, Any]
) -> None:
    with refused(ConfigError, field, "members"):
        MergeConfig(**{**ATTACK, **settings})
    MergeConfig(**{**ATTACK, **settings, **remedy})


@pytest.mark.parametrize("given", ["0.0078", 0.0078, ".0078"])
@pytest.mark.parametrize(("model", "base"), [(MergeConfig, ATTACK), (EvaluateConfig, {**IMAGES, "grid": True})])
def test_a_rounded_radius_is_refused_on_the_grid(model: Any, base: dict[str, Any], given: object) -> None:
    """0.0078 allows one grey level, not the two of 2/255."""
    with refused(ConfigError, "epsilon", "1.989/255", "1/255", "write 2/255", "39/5000"):
        model(**base, epsilon=given)
    for meant in ("2/255", "39/5000", 2 / 255, np.float32(2 / 255).item()):
        model(**base, epsilon=meant)
    model(**{**base, "grid": False}, epsilon=given)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({}, []),
        ({"epsilon": "0.03"}, ["7.65/255", "7/255"]),
        ({"epsilon": "39/5000"}, ["1/255"]),
        ({"epsilon": "0.03", "grid": False}, []),
        ({"epsilon": "4/255", "start_radius": "5/510"}, ["start_radius", "2/255"]),
    ],
)
def test_levels_that_the_grid_cuts_off_are_reported(settings: dict[str, Any], facts: list[str]) -> None:
    lost = MergeConfig(**ATTACK, **settings).lost_levels()
    assert bool(lost) == bool(facts)
    assert all(fact in " ".join(lost) for fact in facts)
