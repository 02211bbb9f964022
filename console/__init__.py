"""What every sub-command shares: settings from TOML and flags, and progress that works without a terminal."""

from console.addresses import local_path
from console.progress import Progress
from console.settings import Fraction, Settings, load_settings, read_toml
from console.text_files import read_lines
from console.verbosity import quiet

__all__ = ["Fraction", "Progress", "Settings", "load_settings", "local_path", "quiet", "read_lines", "read_toml"]
