"""Checks that torch.compile can work here: it generates source code and calls a compiler of the system."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from pathlib import Path

from storage_schemas import ConfigError

# Device → the environment variable that names the compiler, and the defaults. On GPUs, Triton calls the compiler.
_COMPILERS = {"cuda": ("CC", ("gcc", "clang"))}
_ELSEWHERE = ("CXX", ("g++", "clang++"))


def prepare_compilation(setting: str, device_type: str) -> None:
    """Refuse compilation if torch.compile would fail at the first step; silence torch's advice to use TF32.

    The setting `precision` decides about TF32.

    Args:
        setting: name of the setting that asks for compilation.
        device_type: device of the compiled network: cpu, cuda, ….

    Raises:
        ConfigError: there is no compiler, or Python's headers are missing.
    """
    variable, names = _COMPILERS.get(device_type, _ELSEWHERE)
    named = os.environ.get(variable)
    sought = (named,) if named else names
    if not any(shutil.which(name) for name in sought):
        raise ConfigError(
            f"{setting}: torch.compile needs a compiler ({' or '.join(sought)}), found none; install one "
            f"(Debian: apt-get install g++), name it in {variable}, or drop `{setting}`"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if device_type == "cuda" and not header.exists():
        raise ConfigError(
            f"{setting}: on a GPU torch.compile builds C extensions, which need {header}, found none; install "
            f"Python's headers (Debian: apt-get install python3-dev), or drop `{setting}`"
        )
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
