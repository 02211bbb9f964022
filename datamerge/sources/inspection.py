"""Inspects a source before anything runs: its kind, splits, classes, and properties of some images."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from datamerge.sources.columns import NO_LABEL, Samples
from datamerge.sources.depth import bits, to_8_bits
from datamerge.sources.images import BadImage, opened
from datamerge.sources.opening import open_source
from datamerge.sources.orientation import UPRIGHT, orientation, usual_exif
from datamerge.sources.sample import Sample, Source
from datamerge.sources.splits import ALL
from storage_schemas import ConfigError, Location, redact
from storage_schemas.schema.arguments import check_count

LOOKED_AT = 64  # number of images to decode
THUMBNAILS, SIDE = 3, 256  # number of thumbnails, and pixels of their longer side
# Errors of broken images; Pillow raises many kinds.
_BROKEN = (BadImage, OSError, SyntaxError, ValueError, EOFError, RuntimeError)


def inspect_source(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    images: int = LOOKED_AT,
    seed: int = 0,
    thumbnails: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """How a source would be read, and properties of a random choice of its images, as plain JSON values.

    Args:
        source: source, as for `open_source`.
        split: split to inspect; by default all, and with several of them `choose` says that a choice is needed.
        image_column, label_column: column or array of images, and that (or the tar member) of labels.
        images: maximum number of images to decode.
        seed: seed of the choice of images.
        thumbnails: a .png file to write, with three of the images as they are stored.

    Returns:
        `kind`; `split`, and the sizes of all `splits`; number of `samples` and of `unlabelled` ones, with the reason
        if known; `classes` with labels, names and sizes; files `left_out`, by reason. About the images `looked_at`:
        `sizes`, `modes`, `formats`, number with an EXIF orientation (`turned`), how a merge treats it by default
        (`exif`), and the `unusable` images with their reasons.

    Raises:
        ConfigError: there is no such split, or `thumbnails` is not a .png file.
        SourceError: there is nothing, or nothing readable.
    """
    check_count("images", images)
    name = None if thumbnails is None else os.fspath(thumbnails)
    if name is not None and not name.lower().endswith(".png"):
        raise ConfigError(f"thumbnails: expected a file that ends in .png, found {name!r}; rename it")
    choose = None
    try:
        found = open_source(source, split=split, image_column=image_column, label_column=label_column)
    except ConfigError as error:
        if error.field != "split" or split is not None:
            raise
        found = open_source(source, split=ALL, image_column=image_column, label_column=label_column)
        choose = str(error)
    facts = {
        "url": redact(found.url),
        "kind": found.kind,
        "split": None if choose else found.split,
        "splits": dict(found.splits),
        "choose": choose,
        "samples": len(found.samples),
        **_classes(found),
        "no_labels_because": found.unlabelled or None,
        "left_out": dict(found.left_out),
        "exif": usual_exif(found.kind),
        "fingerprint": found.fingerprint,
    }
    pictures: list[Image.Image] = []
    facts |= _looked_at(found, _drawn(found.samples, images, seed), pictures)
    if name is not None:
        _write(pictures, name)
    return facts


def _drawn(samples: Samples, count: int, seed: int) -> Samples:
    chosen = np.random.default_rng(seed).choice(len(samples), min(count, len(samples)), replace=False)
    return samples.take(np.sort(chosen))


def _classes(source: Source) -> dict[str, Any]:
    """Sizes of the classes in the order of their labels, including classes without samples."""
    labels, times = np.unique(source.samples.labels, return_counts=True)
    counts = Counter(dict(zip(labels.tolist(), times.tolist(), strict=True)))
    unlabelled = counts.pop(NO_LABEL, 0)
    names = dict(enumerate(source.class_names))
    classes = [
        {"label": label, "name": names.get(label), "samples": counts[label]} for label in sorted({*counts, *names})
    ]
    return {"unlabelled": unlabelled, "classes": classes}


def _looked_at(source: Source, samples: Sequence[Sample], pictures: list[Image.Image]) -> dict[str, Any]:
    """Properties of the images; thumbnails of the first ones go into `pictures`."""
    sizes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    turned, unusable = 0, []
    for sample in samples:
        try:
            with opened(source.reader.read(sample)) as image:
                declared_bits = bits(image)
                image.load()
                eight = to_8_bits(image, declared_bits)
                sizes[f"{image.width}x{image.height}"] += 1
                modes[image.mode] += 1
                formats[image.format or "pixels"] += 1
                turned += orientation(image) != UPRIGHT
                if len(pictures) < THUMBNAILS:
                    pictures.append(_thumbnail(eight))
        except _BROKEN as error:
            unusable.append({"name": sample.name, "reason": str(error)})
    return {
        "looked_at": len(samples),
        "sizes": dict(sizes.most_common()),
        "modes": dict(modes.most_common()),
        "formats": dict(formats.most_common()),
        "turned": turned,
        "unusable": unusable,
    }


def _thumbnail(image: Image.Image) -> Image.Image:
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    return small


def _write(pictures: Sequence[Image.Image], file: str | os.PathLike[str]) -> None:
    """Write pictures side by side as a PNG."""
    if not pictures:
        raise ConfigError("thumbnails: expected an image to draw, found none that can be decoded; drop `thumbnails`")
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    folder, name = Location(file).split()
    folder.write(name, stream.getvalue())
