"""Which device a setting means."""

from __future__ import annotations

import pytest
import torch

from datamerge.encoders import pick_device
from storage_schemas import ConfigError
from tests.support.refusals import refused


@pytest.mark.parametrize("there", [False, True])
def test_auto_takes_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device("auto") == torch.device("cuda" if there else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["", "warp", "cuda:-1", "meta", "mps:0:0"])
def test_what_cannot_hold_numbers_here_is_refused_in_one_short_line(name: str) -> None:
    with refused(ConfigError, "device", repr(name), '"cpu"') as error:
        pick_device(name)
    assert len(str(error.value)) < 300
