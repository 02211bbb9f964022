"""Code that all sub-commands share: settings from TOML and flags, messages, progress, Ray, signals, memory."""

from datamerge.runtime.local_files import local_path, read_lines
from datamerge.runtime.messages import quiet
from datamerge.runtime.progress import Progress
from datamerge.runtime.settings import Settings, load_settings, read_toml

__all__ = ["Progress", "Settings", "load_settings", "local_path", "quiet", "read_lines", "read_toml"]
