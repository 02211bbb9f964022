"""Lets `import torchvision` work next to a CPU-only torch.

PyPI's torchvision is compiled against CUDA; beside a CPU build of torch its library does not load, and the import
fails with "operator torchvision::nms does not exist" (pytorch#122494, vision#9077), although transforms, timm and
open_clip need none of its compiled operators. Declaring the schemas of the two operators lets the import succeed.
Nothing is declared if the compiled library loads.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def make_torchvision_importable() -> bool:
    """Declare the missing schemas once, before the first import of torchvision.

    Returns:
        Whether the schemas had to be declared.
    """
    return _declare() is not None


@cache  # keeps the object alive, and with it the declarations
def _declare() -> torch.library.Library | None:
    if _compiled_library_loads():
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS.values():
        library.define(schema)
    return library


def _compiled_library_loads() -> bool:
    """Whether torchvision's operators exist, or will after its import; True if it is not installed."""
    if _operator_exists():
        return True
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return True
    for library in Path(package.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
    return _operator_exists()


def _operator_exists() -> bool:
    return hasattr(torch.ops.torchvision, "nms")
