"""Pixels of every preprocessing that comes with the libraries' weights, against the libraries' transforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from datamerge.runtime.torchvision_ops import make_torchvision_importable
from datamerge.sources import BadImage, decode
from storage_schemas.schema.preprocessing import Preprocessing

make_torchvision_importable()

import open_clip  # noqa: E402 - it imports torchvision
import timm  # noqa: E402 - likewise
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402 - likewise
from timm.data.transforms_factory import create_transform  # noqa: E402 - likewise
from transformers import (  # noqa: E402 - likewise
    BitImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    SiglipImageProcessor,
    SiglipImageProcessorPil,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

# (height, width): crop margins of 3 mod 4, portraits, panoramas, tiny and large images, one that needs no resizing.
SIZES = (
    (227, 224),
    (224, 227),
    (224, 224),
    (375, 500),
    (333, 211),
    (64, 97),
    (17, 5),
    (120, 701),
    (613, 407),
    (255, 257),
)


def _photo(height: int, width: int) -> Image.Image:
    """Smooth colours, edges and noise."""
    rng = np.random.default_rng([height, width])
    coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3)).astype(np.uint8)).resize((width, height), 3)
    noise = rng.integers(-30, 31, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


PHOTOS = [_photo(*size) for size in SIZES]


def _levels(normalised: torch.Tensor, mean: Any, std: Any) -> npt.NDArray[np.float64]:
    """Grey levels of normalised pixels [C, H, W]."""
    values = np.asarray(normalised, np.float64)
    levels: npt.NDArray[np.float64] = values * np.asarray(std)[:, None, None] + np.asarray(mean)[:, None, None]
    return levels * 255


def _assert_equal(transform: Any, preprocessing: Preprocessing, photos: list[Image.Image]) -> None:
    for photo in photos:
        expected = _levels(transform(photo), preprocessing.mean, preprocessing.std)
        found = decode(photo, preprocessing)
        assert found.shape == expected.shape, (preprocessing, photo.size)
        assert np.abs(found - expected).max() < 1e-3, (preprocessing, photo.size)


def _open_clip_configs() -> list[PreprocessCfg]:
    """Every distinct preprocessing of open_clip's tags, and others that its configuration allows."""
    found: dict[tuple[Any, ...], PreprocessCfg] = {}
    for model, tag in open_clip.list_pretrained():
        tagged = open_clip.get_pretrained_cfg(model, tag)
        size = open_clip.get_model_config(model)["vision_cfg"].get("image_size", 224)
        names = ("mean", "std", "interpolation", "resize_mode")
        config = PreprocessCfg(size=size, **{name: tagged[name] for name in names})
        found.setdefault((size, config.interpolation, config.resize_mode), config)
    assert len(found) > 15
    others = [(224, 384), (384, 224)]
    return [
        *found.values(),
        *(PreprocessCfg(size=size) for size in others),
        *(PreprocessCfg(size=size, resize_mode="longest", fill_color=128) for size in [*others, 224]),
        *(PreprocessCfg(size=size, resize_mode="squash", interpolation="bilinear") for size in others),
    ]


@pytest.mark.parametrize("config", _open_clip_configs(), ids=lambda config: f"{config.size}-{config.resize_mode}")
def test_pixels_equal_open_clip(config: PreprocessCfg) -> None:
    size = config.input_size[1:]
    keeps_ratio = size[0] != size[1] and config.resize_mode == "shortest"
    preprocessing = Preprocessing(
        shape=config.input_size,
        resize=config.resize_mode,
        # open_clip ignores the interpolation where the input is not square.
        interpolation="bicubic" if keeps_ratio else config.interpolation,
        rounding="nearest" if keeps_ratio or config.resize_mode == "longest" else "down",
        fill=(config.fill_color,),
        mean=config.mean,
        std=config.std,
    )
    _assert_equal(image_transform_v2(config, is_train=False), preprocessing, PHOTOS)


def _timm_configs() -> list[dict[str, Any]]:
    """Every distinct preprocessing of timm's tags, for training and for testing."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name in timm.list_pretrained():
        pretrained: Any = timm.get_pretrained_cfg(name)
        config = pretrained.to_dict()
        tested = {
            "input_size": config.get("test_input_size") or config["input_size"],
            "crop_pct": config.get("test_crop_pct") or config["crop_pct"],
        }
        for sizes in ({name: config[name] for name in tested}, tested):
            one = {name: config[name] for name in ("interpolation", "crop_mode", "mean", "std")} | sizes
            mean = one["mean"] if one["crop_mode"] == "border" else None
            found.setdefault((*sizes.values(), one["interpolation"], one["crop_mode"], mean), one)
    assert len(found) > 100
    return list(found.values())


def _timm_preprocessing(config: dict[str, Any]) -> Preprocessing:
    channels, *size = config["input_size"]
    scale = tuple(int(side / config["crop_pct"]) for side in size)
    resize: Any = {"center": "shortest", "squash": "squash", "border": "longest"}[config["crop_mode"]]
    keeps_ratio = resize == "longest" or scale[0] != scale[1]
    return Preprocessing(
        shape=(channels, *size),
        resize=resize,
        scale=scale,
        interpolation=config["interpolation"],
        rounding="nearest" if keeps_ratio else "down",
        fill=tuple(round(255 * value) for value in config["mean"]) if resize == "longest" else (0,),
        mean=config["mean"],
        std=config["std"],
    )


def test_pixels_equal_timm() -> None:
    """To save time, each kind of resizing gets all photos at its smallest size, and three at the others."""
    seen = set()
    for number, config in enumerate(sorted(_timm_configs(), key=lambda one: one["input_size"])):
        kind = (config["crop_pct"], config["interpolation"], config["crop_mode"])
        few = [PHOTOS[(3 * number + more) % len(PHOTOS)] for more in range(3)]
        _assert_equal(create_transform(**config), _timm_preprocessing(config), few if kind in seen else PHOTOS)
        seen.add(kind)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
@pytest.mark.parametrize(("size", "crop_pct"), [((96, 64), 0.875), ((64, 96), 1.15), ((33, 33), 0.9)])
def test_pixels_equal_timm_for_any_configuration(
    crop_mode: str, interpolation: str, size: tuple[int, int], crop_pct: float
) -> None:
    config: dict[str, Any] = {
        "input_size": (3, *size),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
    }
    config |= {"mean": (0.1, 0.5, 0.9), "std": (0.25, 0.5, 1.0)}
    photos = [photo for photo in PHOTOS if min(photo.size) > 16]
    _assert_equal(create_transform(**config), _timm_preprocessing(config), photos)


def _shortest(edge: int, crop: tuple[int, int], **more: Any) -> tuple[dict[str, Any], Preprocessing]:
    settings = {"size": {"shortest_edge": edge}, "crop_size": {"height": crop[0], "width": crop[1]}}
    preprocessing = Preprocessing(shape=(3, *crop), scale=(edge, edge), offset="down", alpha="white", **more)
    return settings, preprocessing


def _squashed(size: tuple[int, int], **more: Any) -> tuple[dict[str, Any], Preprocessing]:
    settings = {"size": {"height": size[0], "width": size[1]}}
    return settings, Preprocessing(shape=(3, *size), resize="squash", offset="down", alpha="white", **more)


@pytest.mark.parametrize(
    ("torchvision", "pillow", "settings", "preprocessing"),
    [
        (CLIPImageProcessor, CLIPImageProcessorPil, *_shortest(224, (224, 224))),
        (CLIPImageProcessor, CLIPImageProcessorPil, *_shortest(336, (336, 336))),
        (CLIPImageProcessor, CLIPImageProcessorPil, *_shortest(200, (224, 224))),
        (BitImageProcessor, BitImageProcessorPil, *_shortest(256, (224, 224))),
        (BitImageProcessor, BitImageProcessorPil, *_shortest(97, (64, 90))),
        (SiglipImageProcessor, SiglipImageProcessorPil, *_squashed((224, 224))),
        (SiglipImageProcessor, SiglipImageProcessorPil, *_squashed((384, 256))),
        (ViTImageProcessor, ViTImageProcessorPil, *_squashed((224, 224), interpolation="bilinear")),
    ],
)
def test_pixels_equal_transformers(
    torchvision: Any, pillow: Any, settings: dict[str, Any], preprocessing: Preprocessing
) -> None:
    """Equal to those of its Pillow backend; the default backend resizes tensors, which rounds differently."""
    for photo in PHOTOS:
        found = decode(photo, preprocessing).astype(np.float64)
        for kind in (pillow, torchvision):
            processor = kind(**settings)
            (normalised,) = processor(photo, return_tensors="pt")["pixel_values"]
            distance = np.abs(found - _levels(normalised, processor.image_mean, processor.image_std))
            if kind is torchvision:
                # One of the two clips noise at the ends of the range between its two passes.
                assert np.quantile(distance, 0.99) < 1.001, photo.size
                assert distance.max() < 4.001, photo.size
            elif preprocessing.scale >= preprocessing.size:
                # Odd margins of padding differ: the Pillow backend puts the larger half first, the default one last.
                assert distance.max() < 1e-3, photo.size


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_on_white_equals_transformers(mode: str) -> None:
    photo = PHOTOS[0].copy()
    photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    transparent = photo.convert(mode)
    if mode == "P":
        transparent.info["transparency"] = 3
    settings, preprocessing = _shortest(64, (64, 64))
    processor = CLIPImageProcessorPil(**settings)
    (normalised,) = processor(transparent, return_tensors="pt")["pixel_values"]
    expected = _levels(normalised, processor.image_mean, processor.image_std)
    assert np.abs(decode(transparent, preprocessing) - expected).max() < 1e-3
    dropped = preprocessing.model_copy(update={"alpha": "drop"})
    assert np.abs(decode(transparent, dropped) - expected).max() > 50


def test_a_strip_whose_short_side_would_become_0_pixels_is_refused() -> None:
    with pytest.raises(BadImage, match="2000x1"):
        decode(Image.new("RGB", (2000, 1)), Preprocessing(shape=(3, 32, 32), resize="longest", rounding="nearest"))


def test_grey_pictures_are_padded_with_grey() -> None:
    preprocessing = Preprocessing(shape=(1, 8, 8), resize="longest", fill=(7,))
    found = decode(Image.new("RGB", (8, 4), (200, 200, 200)), preprocessing)[0]
    assert found[:2].tolist() == found[6:].tolist() == [[7] * 8] * 2
    assert (found[2:6] == 200).all()
