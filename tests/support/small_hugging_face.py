"""Models of transformers, two layers deep, saved by the library with tokeniser and image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from datamerge.runtime.torchvision_ops import make_torchvision_importable

make_torchvision_importable()

import transformers  # noqa: E402 - it imports torchvision

WORDS = ["<pad>", "<unk>", "<bos>", "<eos>", "a", "photo", "of", "cat", "red", "bus", "tree", "."]


def save_tokenizer(folder: Path) -> Any:
    """Save a tokeniser of a dozen words with transformers."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def small_hugging_face(family: str, folder: Path, seed: int = 1) -> Any:
    """Save a small model with its tokeniser and image processor."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    text = {**sizes, **special, "vocab_size": len(WORDS), "max_position_embeddings": 64 if family == "Siglip" else 20}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    if family == "CLIP":
        config.projection_dim = 24
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.rand_like(tensor))
    model.save_pretrained(folder)
    sides = {"height": 32, "width": 32}
    options = {"size": sides} if family == "Siglip" else {"size": {"shortest_edge": 32}, "crop_size": sides}
    getattr(transformers, f"{family}ImageProcessor")(**options).save_pretrained(folder)
    save_tokenizer(folder)
    return model
