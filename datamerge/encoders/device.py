"""Resolves the setting `device`."""

from __future__ import annotations

import torch

from datamerge.runtime.messages import first_line
from storage_schemas import ConfigError


def pick_device(name: str) -> torch.device:
    """The torch device of a setting; `auto` takes a GPU if there is one.

    Raises:
        ConfigError: the device does not exist here, or its tensors have no data (`meta`).
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        # The rest of torch's message lists all devices that it could be built for.
        reason = first_line(error).partition(". ")[0]
        raise ConfigError(f'device: {name!r} cannot be used here ({reason}); use `device="cpu"`') from None
    return device
