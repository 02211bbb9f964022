"""`import torchvision` next to a CPU-only torch: the shim is applied exactly when it is needed."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import json, sys, warnings
warnings.simplefilter("error")
from datamerge.runtime.torchvision_ops import make_torchvision_importable
declared = [make_torchvision_importable(), make_torchvision_importable()]
import torch
had = hasattr(torch.ops.torchvision, "nms")
import torchvision.transforms
print(json.dumps([declared, had]))
"""


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_shim_declares_operators_only_where_the_compiled_library_does_not_load() -> None:
    """Either the import works and nothing is declared, or it fails and works after the shim."""
    plain = _python("import torchvision")
    shimmed = _python(CODE)
    assert shimmed.returncode == 0, shimmed.stderr
    needed = plain.returncode != 0
    if needed:
        assert "torchvision::nms does not exist" in plain.stderr
    answer = "true" if needed else "false"
    assert shimmed.stdout.strip().startswith(f"[[{answer}, {answer}],")
    assert shimmed.stdout.strip().endswith("true]")


def test_the_operator_has_no_fake_implementation() -> None:
    """Declaring a schema must not make detection silently wrong: a call of the operator fails."""
    code = (
        "from datamerge.runtime.torchvision_ops import make_torchvision_importable\n"
        "declared = make_torchvision_importable()\n"
        "import torch, torchvision\n"
        "boxes, scores = torch.tensor([[0., 0., 1., 1.]]), torch.ones(1)\n"
        "try:\n    kept = torchvision.ops.nms(boxes, scores, 0.5).tolist()\n"
        "except Exception as error:\n    kept = type(error).__name__\n"
        "print('right' if (kept == [0]) != declared else f'{declared} {kept}')"
    )
    done = _python(code)
    assert done.stdout.strip() == "right", done.stderr
