"""Which device a setting means."""

from __future__ import annotations

import torch

from datamerge.runtime.messages import first_line
from storage_schemas import ConfigError


def pick_device(name: str) -> torch.device:
    """The device of a setting; `auto` takes a GPU if there is one.

    Raises:
        ConfigError: no such device here, or one whose tensors hold no numbers (meta).
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        # torch goes on to list every device that it could have been built for.
        reason = first_line(error).partition(". ")[0]
        raise ConfigError(f'device: {name!r} cannot be used here ({reason}); use `device="cpu"`') from None
    return device
