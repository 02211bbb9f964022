"""A LLaVA small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from datamerge.runtime.torchvision_ops import make_torchvision_importable

# The vision tower: image size and patch size in pixels, and channels.
SIZE, PATCH, WIDTH = 32, 8, 32


def make_llava(folder: Path, texts: list[str], width: int = WIDTH, **changes: Any) -> str:
    """Save a LLaVA with random weights and a byte-level tokeniser trained on `texts`.

    Args:
        width: channels of the vision tower.
        changes: settings of the language model.

    Returns:
        The folder.
    """
    make_torchvision_importable()
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    vision = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
    )
    language = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=language, image_token_index=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(folder)
    return str(folder)
