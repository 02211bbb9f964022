"""What every sub-command shares: settings from TOML and flags, and progress that works without a terminal."""

from datamerge.runtime.addresses import local_path
from datamerge.runtime.progress import Progress
from datamerge.runtime.settings import Settings, load_settings, read_toml
from datamerge.runtime.text_files import read_lines
from datamerge.runtime.verbosity import quiet

__all__ = ["Progress", "Settings", "load_settings", "local_path", "quiet", "read_lines", "read_toml"]
