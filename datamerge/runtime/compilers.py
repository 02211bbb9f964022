"""Whether torch.compile can work here: it writes source code, and calls a compiler of the system for it."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from pathlib import Path

from storage_schemas import ConfigError

# Environment variable that names the compiler, and what is sought without it. On GPUs it is Triton that calls one.
_COMPILERS = {"cuda": ("CC", ("gcc", "clang"))}
_ELSEWHERE = ("CXX", ("g++", "clang++"))


def prepare_compilation(setting: str, device_type: str) -> None:
    """Refuse compilation where its first step would end in a traceback; else keep torch from advising TF32 for it.

    Whether products are in TF32 is `precision`, which has a value already.

    Args:
        setting: that asks for it.
        device_type: cpu, cuda, …: where the compiled network runs.

    Raises:
        ConfigError: there is no compiler.
    """
    variable, names = _COMPILERS.get(device_type, _ELSEWHERE)
    named = os.environ.get(variable)
    sought = (named,) if named else names
    if not any(shutil.which(name) for name in sought):
        raise ConfigError(
            f"{setting}: torch.compile calls a compiler ({' or '.join(sought)}), found none here; install one "
            f"(Debian: apt-get install g++), name it in {variable}, or drop `{setting}`"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if device_type == "cuda" and not header.exists():
        raise ConfigError(
            f"{setting}: on a GPU torch.compile writes modules of Python in C, found no {header}; install Python's "
            f"headers (Debian: apt-get install python3-dev), or drop `{setting}`"
        )
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
