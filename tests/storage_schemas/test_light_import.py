"""storage_schemas is light: reading artifacts needs neither torch nor Ray nor an image library."""

from __future__ import annotations

import subprocess
import sys
from inspect import isfunction
from typing import get_args


def test_importing_storage_schemas_imports_nothing_heavy() -> None:
    heavy = "torch torchvision ray timm open_clip pyarrow PIL click rich"
    code = f"import sys, storage_schemas; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_exists_and_is_listed_once() -> None:
    import storage_schemas

    assert sorted(storage_schemas.__all__) == sorted(set(storage_schemas.__all__))
    for name in storage_schemas.__all__:
        found = getattr(storage_schemas, name)
        if (isinstance(found, type) and not get_args(found)) or isfunction(found):
            assert found.__module__.startswith("storage_schemas.")
