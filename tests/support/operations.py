"""Recording of torch operations below autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Records the operations computed inside the block.

    Attributes:
        names: names such as aten.mm.default; `to another device` for copies between devices.
        conversions_in_copies: dtypes, before and after, of copies between devices that convert.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.conversions_in_copies: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if self.names[-1].startswith("aten._to_copy") and args[0].device != found.device:
            self.names[-1] = "to another device"
            if args[0].dtype != found.dtype:
                self.conversions_in_copies.append(f"{args[0].dtype} to {found.dtype}")
        return found
