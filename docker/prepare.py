"""What the demo on containers starts from: digits, an encoder trained on them, and a bucket for the artifact.

python docker/prepare.py FOLDER [BUCKET-URL]
"""

from __future__ import annotations

import sys
from pathlib import Path

import fsspec

from demo import digits


def main(folder: Path, bucket: str | None) -> None:
    """Make what is not there yet."""
    if not (folder / "head.safetensors").exists():
        train, _ = digits.write_digits(folder / "digits")
        digits.pretrain(train, folder / "encoder.safetensors", folder / "head.safetensors", seed=0)
    if bucket is not None:
        files, path = fsspec.core.url_to_fs(bucket)
        files.makedirs(path, exist_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
