"""The pictures of a report: image, perturbation × k, adversarial image, and the answers before and after.

A part stores them with `Album`, or as LLaVA's study does, and lists them in its result's details as `pictures`.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from datamerge.evaluation.measures import Broken, LabelledBatch
from datamerge.evaluation.results import ArmResult
from datamerge.evaluation.store import ArmFolder
from datamerge.runtime.pages import Strip, Tile
from datamerge.sources import Source
from storage_schemas.display import rgb
from storage_schemas.schema.moments import LEVELS

Pixels = npt.NDArray[np.uint8]
PICTURES = "pictures"
GREY = 128


def to_png(pixels: Pixels) -> bytes:
    """8-bit pixels [C, H, W] as a PNG file; C is 1 or 3."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def read_png(data: bytes) -> Pixels:
    """Pixels [3, H, W] of a PNG file."""
    with Image.open(io.BytesIO(data)) as image:
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def amplify(clean: npt.NDArray[Any], adversarial: npt.NDArray[Any]) -> tuple[Pixels, int]:
    """The perturbation × k on grey, with the largest k that keeps it in range.

    Args:
        clean, adversarial: pixels [C, H, W] in grey levels, 0 to 255; not necessarily whole ones.

    Returns:
        Pixels [C, H, W], and k.
    """
    offset = adversarial.astype(np.float64) - clean.astype(np.float64)
    factor = max(1, int((GREY - 1) // max(float(np.abs(offset).max()), 1e-3)))
    return (GREY + factor * offset).round().clip(0, LEVELS).astype(np.uint8), factor


def spread(source: Source, count: int) -> set[str]:
    """Keys of `count` images evenly spread over the source, the same for every arm."""
    rows = np.linspace(0, len(source.samples) - 1, min(count, len(source.samples))).round().astype(int)
    return set(source.samples.take(rows).keys)


class Album:
    """Keeps what the attacks did to some images of one arm.

    Args:
        folder: of the arm.
        keys: of the images to keep.
        classes: names of the head's classes; empty where they have none.
    """

    def __init__(self, folder: ArmFolder, keys: Collection[str], classes: Sequence[str]) -> None:
        self._folder, self._keys, self._classes = folder, keys, classes

    def keep(self, batch: LabelledBatch, broken: Broken) -> list[dict[str, Any]]:
        """Write the pictures of those images of a batch that are to be kept; returns how the report finds them.

        Args:
            batch: the images.
            broken: by position in the batch, the radius at which an image fell and the misclassified pixels.
        """
        rows = [row for row, sample in enumerate(batch.samples) if sample.key in self._keys]
        if not rows:
            return []
        clean = batch.pixels[rows]
        attacked = torch.stack([broken[row][1] if row in broken else batch.pixels[row] for row in rows])
        with torch.no_grad():
            before, after = (batch.model(pixels).argmax(dim=1).tolist() for pixels in (clean, attacked))
        kept = []
        for place, row in enumerate(rows):
            key = batch.samples[row].key
            picture = {"clean": self._write(f"{key}-clean.png", _levels(clean[place]).round().astype(np.uint8))}
            if row in broken:
                adversarial = _levels(attacked[place])
                perturbation, factor = amplify(_levels(clean[place]), adversarial)
                picture |= {
                    "adversarial": self._write(f"{key}.png", adversarial.round().astype(np.uint8)),
                    "perturbation": self._write(f"{key}-perturbation.png", perturbation),
                }
            kept.append(
                {
                    **picture,
                    "factor": factor if row in broken else None,
                    "radius": broken[row][0] if row in broken else None,
                    "reference": self._name(int(batch.labels[row])),
                    "before": self._name(before[place]),
                    "after": self._name(after[place]),
                }
            )
        return kept

    def _write(self, name: str, pixels: Pixels) -> str:
        self._folder.write_image(name, to_png(pixels))
        return f"images/{name}"

    def _name(self, row: int) -> str:
        return self._classes[row] if self._classes else f"class {row}"


def _levels(pixels: torch.Tensor) -> npt.NDArray[np.float64]:
    """Pixels in [0, 1] as grey levels."""
    return (pixels.cpu().double().numpy() * LEVELS).clip(0, LEVELS)


def strips(result: ArmResult) -> list[Strip]:
    """The stored pictures of one arm in one part; files that are gone are left out."""
    listed = result.details.get(PICTURES, [])
    folder = Path(str(result.details.get("folder", "")))
    score = {"captions": "CIDEr", "vqa": "accuracy"}.get(result.part, "score")
    return [
        _strip(folder, picture, score)
        for picture in listed
        if all((folder / picture[name]).is_file() for name in ("clean", "adversarial") if picture.get(name))
    ]


def _strip(folder: Path, picture: Mapping[str, Any], score: str) -> Strip:
    clean = read_png((folder / str(picture["clean"])).read_bytes())
    tiles = [Tile("image", rgb(clean))]
    adversarial = read_png((folder / picture["adversarial"]).read_bytes()) if picture.get("adversarial") else clean
    # LLaVA's pictures, whose radius is at least one grey level, are stored without their difference.
    if picture.get("perturbation"):
        perturbation, factor = read_png((folder / picture["perturbation"]).read_bytes()), picture["factor"]
    else:
        perturbation, factor = amplify(clean, adversarial)
    moved = bool(picture.get("perturbation")) or bool((clean != adversarial).any())
    if moved:
        tiles += [Tile(f"perturbation × {factor}", rgb(perturbation)), Tile("adversarial image", rgb(adversarial))]
    lines = [("before:", _answer(picture, "before", score))]
    if moved:
        radius = f" (ε = {picture['radius']})" if picture.get("radius") else ""
        lines.append((f"after{radius}:", _answer(picture, "after", score)))
    elif picture["before"] == picture["reference"] or picture.get("question"):
        lines.append(("after:", "no attack succeeded"))
    lines.append(("reference:", str(picture["reference"])))
    return Strip(tiles, str(picture.get("question") or ""), lines)


def _answer(picture: Mapping[str, Any], when: str, score: str) -> str:
    text = str(picture[when] or "(nothing)")
    points = picture.get(f"score_{when}")
    return text if points is None else f"{text} ({score} {points:.1f})"
