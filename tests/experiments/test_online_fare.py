"""Online FARE: attacks the encoder as it is, on the trainer's own loop."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from datamerge.encoders import load_encoder
from experiments import online_fare
from trainer.data.batches import ImageBatch

SPEC = "mlp:3x8x8-16-6"
FLAGS = "--steps 6 --batch-size 4 --lr 0.01 --warmup 1 --attack-steps 3 --log-every 1 --threads 1"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(7):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def _run(photos: Path, run: Path) -> Any:
    return CliRunner().invoke(online_fare.main, [str(photos), str(run), "--encoder", SPEC, *FLAGS.split()])


def test_members_are_fresh_attacks_inside_the_ball(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[ImageBatch] = []
    original = online_fare.OnlineFeed.__call__

    def feed(self: Any, *arguments: Any) -> Iterator[ImageBatch]:
        for batch in original(self, *arguments):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(online_fare.OnlineFeed, "__call__", feed)
    assert _run(photos, tmp_path / "run").exit_code == 0
    encoder = load_encoder(SPEC)
    seen: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        for key, image, target in zip(batch.keys, batch.images, batch.target, strict=True):
            clean = torch.from_numpy(np.array(Image.open(photos / key))).permute(2, 0, 1)
            member = (image * 255).round()
            assert torch.equal(member / 255, image)
            assert (member.int() - clean.int()).abs().max() <= 2
            torch.testing.assert_close(encoder(clean[None].float() / 255)[0].detach(), target)
            seen.setdefault(key, []).append(member)
    # 7 images, batches of 4: three epochs, in each another attack.
    assert sorted(seen) == [f"{number}.png" for number in range(7)]
    assert all(len(members) == 3 and not torch.equal(members[0], members[1]) for members in seen.values())
    summary = json.loads((tmp_path / "run/run.json").read_text())
    assert (summary["arm"], summary["steps"], summary["groups"]) == ("FARE online", 6, 21)


def test_the_attack_has_the_precision_of_the_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    original = online_fare.attack  # type: ignore[attr-defined]

    def spy(*arguments: Any, **settings: Any) -> Any:
        found.append(settings["precision"])
        return original(*arguments, **settings)

    monkeypatch.setattr(online_fare, "attack", spy)
    flags = f"--encoder {SPEC} --batch-size 4 --warmup 0 --attack-steps 1 --threads 1 --steps 2 --precision bfloat16"
    result = CliRunner().invoke(online_fare.main, [str(photos), str(tmp_path / "run"), *flags.split()])
    assert result.exit_code == 0, result.output
    assert found == ["bfloat16"] * 2


def test_an_interrupted_run_continues_to_the_same_bits(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run(photos, tmp_path / "whole").exit_code == 0
    original = online_fare.OnlineFeed.__call__

    def feed(self: Any, partition: Any, start: int, stop: int) -> Iterator[ImageBatch]:
        for number, batch in enumerate(original(self, partition, start, stop)):
            if number == 2:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(online_fare.OnlineFeed, "__call__", feed)
        stopped = _run(photos, tmp_path / "stopped")
    assert stopped.exit_code == 0
    assert "step 3 of 6" in stopped.stderr
    assert _run(photos, tmp_path / "stopped").exit_code == 0
    whole = load_file(tmp_path / "whole/encoder.safetensors")
    for name, tensor in load_file(tmp_path / "stopped/encoder.safetensors").items():
        assert torch.equal(tensor, whole[name])


def test_a_bad_image_and_a_bad_setting_are_one_line(photos: Path, tmp_path: Path) -> None:
    (photos / "3.png").write_bytes(b"not an image")
    result = _run(photos, tmp_path / "run")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: 3.png: ")
    wrong = CliRunner().invoke(
        online_fare.main, [str(photos), str(tmp_path / "b"), "--encoder", "mpl:1", "--steps", "3000"]
    )
    assert wrong.exit_code == 2
