"""The contract is light: who only reads artifacts needs neither torch nor Ray."""

from __future__ import annotations

import subprocess
import sys


def test_reading_needs_neither_torch_nor_ray() -> None:
    heavy = "torch torchvision ray timm open_clip pyarrow"
    code = f"import sys, storage_schemas; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_exists_and_is_listed_once() -> None:
    import storage_schemas

    assert sorted(storage_schemas.__all__) == sorted(set(storage_schemas.__all__))
    for name in storage_schemas.__all__:
        assert getattr(storage_schemas, name).__module__.startswith("storage_schemas.")
