"""`datamerge merge`: flags against settings, and the plan that a dry run shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from datamerge.runtime import load_settings
from merge_service import MergeConfig
from merge_service.cli import merge as command
from storage_schemas import ConfigError

ENCODER = "mlp:3x8x8-8-4"
SETTINGS: list[dict[str, Any]] = [
    {"encoder": ENCODER},
    {"encoder": ENCODER, "attack": "apgd", "restarts": 3, "start_radius": "1/255", "compile": True, "num_gpus": 0.5},
    {"encoder": ENCODER, "target_encoder": "mlp:3x8x8-4", "random_start": False, "members": 1, "grid": False},
    {"encoder": ENCODER, "precision": "bfloat16", "max_workers": 3, "num_cpus": 2, "max_rejected": 0, "limit": 7},
    {"grouping": "label", "resize": False, "shape": "3x8x8", "members": 5, "keep_members": True, "seed": 3},
    {"grouping": "cluster", "clusters": 4, "cluster_by": "embedding", "encoder": ENCODER, "targets": "both"},
    {"grouping": "column", "group_column": "author", "label_column": "x", "format": "webdataset"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_flags_give_the_same_settings_as_keywords(settings: dict[str, Any]) -> None:
    typed = ["some photos/", "out"]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            typed.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            typed += [f"--{flag}", str(value)]
    params = command.make_context("merge", typed).params
    flags = {name: value for name, value in params.items() if name in MergeConfig.model_fields}
    assert load_settings(MergeConfig, None, flags) == MergeConfig(source="some photos/", artifact="out", **settings)


def test_every_setting_has_a_flag_and_every_flag_a_help() -> None:
    flags = {parameter.name for parameter in command.params}
    assert set(MergeConfig.model_fields) <= flags
    assert all(parameter.help for parameter in command.params if isinstance(parameter, click.Option))


def test_a_price_needs_a_dry_run() -> None:
    done = CliRunner().invoke(command, ["x", "a", "--grouping", "label", "--price-per-hour", "3"])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.field == "price_per_hour"
    assert "`dry_run=True`" in str(done.exception)


@pytest.mark.parametrize("grouping", ["adversarial", "label", "cluster"])
def test_a_dry_run_estimates_time_bytes_and_cost_and_writes_nothing(tmp_path: Path, grouping: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(30) % 3)
    more = {"adversarial": ["--encoder", ENCODER], "label": [], "cluster": ["--clusters", "2"]}[grouping]
    arguments = [
        str(tmp_path / "x.npz"),
        str(tmp_path / "a"),
        "--grouping",
        grouping,
        "--groups-per-shard",
        "2",
        *more,
    ]
    done = CliRunner().invoke(
        command, [*arguments, "--dry-run", "--json", "--price-per-hour", "3.6", "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["groups"] == {"adversarial": 30, "label": 3, "cluster": 6}[grouping]
    assert facts["shards"] == -(-facts["groups"] // 2)
    found = facts["estimate"]
    assert found["seconds"] > 0
    assert found["bytes"] > 0
    assert found["cost"] == pytest.approx(found["seconds"] * found["workers"] / 1000, abs=0.01)
    if grouping == "adversarial":
        # A multiply-add is 2 FLOPs. Weights 192·8 and 8·4; backward to the input takes as many again.
        forward = 2 * (192 * 8 + 8 * 4)
        assert found["flops"] == 30 * (forward + 10 * (10 * 2 * forward + forward))
        assert 0 < found["peak_share"] < 1
    assert not (tmp_path / "a").exists()
    assert "shards of 2" in CliRunner().invoke(command, [*arguments, "--dry-run", "--device", "cpu"]).output
