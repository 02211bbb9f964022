"""`pick_device`: the torch device that a setting names."""

from __future__ import annotations

import pytest
import torch

from datamerge.encoders import pick_device
from storage_schemas import ConfigError
from tests.support.refusals import refused


@pytest.mark.parametrize("available", [False, True])
def test_auto_takes_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device("auto") == torch.device("cuda" if available else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["", "warp", "cuda:-1", "meta", "mps:0:0"])
def test_unusable_devices_are_refused_in_one_short_line(name: str) -> None:
    with refused(ConfigError, "device", repr(name), '"cpu"') as error:
        pick_device(name)
    assert len(str(error.value)) < 300
