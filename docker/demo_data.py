"""What compose.yaml works on: the demo's digits in a bucket, and a small encoder trained on them in a folder.

demo_data.py s3://datamerge/digits /data
"""

from __future__ import annotations

import sys
from pathlib import Path

import fsspec

from datamerge.demo import digits

SEED = 0


def main(url: str, folder: Path) -> None:
    """Train digits to `url`/train, test digits and the trained encoder to `folder`; nothing where that is done."""
    head = folder / "head.safetensors"
    if head.exists():
        sys.stderr.write(f"{folder} and {url} are there already\n")
        return
    train, _ = digits.write_digits(folder / "digits")
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root.partition("/")[0], exist_ok=True)
    fs.put(f"{train}/", f"{root}/train/", recursive=True)
    # Last: the head's file says that all is there.
    digits.pretrain(train, folder / "encoder.safetensors", head, SEED)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
