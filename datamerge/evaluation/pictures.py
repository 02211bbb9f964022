"""What an attack did, to look at: image, perturbation × k, adversarial image, answers before and after."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from datamerge.evaluation.results import ArmResult

Pixels = npt.NDArray[np.uint8]


def to_png(pixels: Pixels) -> bytes:
    """8-bit pixels [C, H, W] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def read_png(data: bytes) -> Pixels:
    """Pixels [C, H, W] of an RGB PNG file."""
    with Image.open(io.BytesIO(data)) as image:
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def amplify(clean: Pixels, adversarial: Pixels) -> tuple[Pixels, int]:
    """The perturbation × k on grey, with k so large that it just fits; returns it and k."""
    offset = adversarial.astype(np.int16) - clean.astype(np.int16)
    factor = max(1, 127 // max(1, int(np.abs(offset).max())))
    return (128 + factor * offset).clip(0, 255).astype(np.uint8), factor


def picture_section(result: ArmResult) -> str:
    """HTML of the stored pictures of one arm; empty if there are none."""
    pictures = result.details.get("pictures", [])
    if not pictures:
        return ""
    folder = Path(str(result.details["folder"]))
    score = {"captions": "CIDEr", "vqa": "accuracy"}.get(result.part, "score")
    figures = [
        _figure(folder, picture, score) for picture in pictures if (folder / str(picture["adversarial"])).is_file()
    ]
    return f"<h2>{html.escape(result.arm)}, {result.part}</h2>\n" + "\n".join(figures)


def _figure(folder: Path, picture: Mapping[str, Any], score: str) -> str:
    clean = read_png((folder / str(picture["clean"])).read_bytes())
    adversarial = read_png((folder / str(picture["adversarial"])).read_bytes())
    perturbation, factor = amplify(clean, adversarial)
    # No attack lowered the score: the picture is of the clean image.
    moved = bool((clean != adversarial).any())
    images = "".join(
        f'<div><img alt="{name}" src="data:image/png;base64,{base64.b64encode(to_png(pixels)).decode()}">'
        f"<small>{name}</small></div>"
        for name, pixels in (
            ("image", clean),
            (f"perturbation × {factor}" if moved else "no perturbation", perturbation),
            ("adversarial image" if moved else "no attack scored lower", adversarial),
        )
    )
    lines = [f"<b>{html.escape(str(picture['question']))}</b>"] if picture.get("question") else []
    lines += [
        f"{when}: {_said(picture[when])} <small>({score} {picture[f'score_{when}']:.1f})</small>"
        for when in ("before", "after")
    ]
    lines.append(f"<small>reference: {html.escape(str(picture['reference']))}</small>")
    return f"<figure><div class='row'>{images}</div><figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def _said(answer: object) -> str:
    return f"“{html.escape(str(answer))}”" if answer else "<i>nothing</i>"
