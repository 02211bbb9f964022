"""The patterns of docs/how-to/fare.md freeze all but the stem and the first blocks of the libraries' models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from datamerge.encoders import load_encoder
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from trainer.run.forward import freeze

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "fare.md"
STEM = {"class_embedding", "positional_embedding", "conv1", "ln_pre", "cls_token", "pos_embed", "patch_embed", "bn1"}
RECIPES = dict(re.findall(r"^\| ([\w ]+-?\w*) \| `--freeze '([^']+)'`", PAGE.read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    ("recipe", "spec", "block", "first"),
    [
        ("open_clip ViT-B", "open_clip:ViT-B-32", r"transformer\.resblocks\.(\d+)\.", {0, 1, 2}),
        ("timm ViT-B", "timm:vit_base_patch32_224", r"blocks\.(\d+)\.", {0, 1, 2}),
        ("timm ResNet", "timm:resnet18", r"layer(\d)\.", {1}),
    ],
)
def test_only_the_stem_and_the_first_blocks_are_trained(recipe: str, spec: str, block: str, first: set[int]) -> None:
    trained = _trained(load_encoder(spec), recipe)
    assert {int(found[1]) for name in trained if (found := re.match(block, name))} == first
    # The other trained layers come before the blocks: patches, positions, the first norm.
    stem = {name.split(".")[0] for name in trained if not re.match(block, name)}
    assert stem <= STEM


def test_only_the_stem_and_the_first_blocks_of_vit_l_are_trained() -> None:
    make_torchvision_importable()
    import open_clip

    with torch.device("meta"):  # 300 million parameters without memory
        model = open_clip.create_model("ViT-L-14", device="meta").visual
    trained = _trained(nn.ModuleDict({"model": model}), "open_clip ViT-L")
    blocks = {int(found[1]) for name in trained if (found := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    assert blocks == {0, 1, 2}
    assert {name.split(".")[0] for name in trained} <= STEM | {"transformer"}


def test_all_recipes_of_the_page_are_found() -> None:
    assert len(RECIPES) == 4


def _trained(encoder: nn.Module, recipe: str) -> list[str]:
    freeze(encoder, RECIPES[recipe].split(","))
    named = encoder.named_parameters()
    return [name.removeprefix("model.") for name, parameter in named if parameter.requires_grad]
