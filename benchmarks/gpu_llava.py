"""Part of `benchmarks.gpu`: input gradients through a network of LLaVA-1.5-7B's shape, with random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers

from benchmarks.gpu_rows import Rates, Row, share, sizes, teraflops, timed
from datamerge.attacks import Precision
from datamerge.attacks.arithmetic import arithmetic
from datamerge.evaluation.llava.model import SYSTEM, Arithmetic, Llava
from datamerge.evaluation.llava.vision_towers import read_tower_run
from tests.support.llava import make_llava

QUESTION, ANSWER = "Provide a short caption for this image.", "a cat on the roof of a house in the rain"
# (images at a time, dtype of the network, precision of matrix products)
KINDS: tuple[tuple[int, Arithmetic, Precision], ...] = (
    (1, "float16", "bfloat16"),  # as fast as each other
    (8, "float16", "bfloat16"),
    (1, "float32", "tf32"),
    (1, "float32", "float32"),
)


def llava_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """Forward and backward pass of the loss of an answer."""
    size = sizes(rehearse)
    with tempfile.TemporaryDirectory() as name, ExitStack() as patches:
        folder = make_llava(Path(name, "llava"), [SYSTEM, QUESTION, ANSWER])
        if not rehearse:
            patches.enter_context(
                patch.object(
                    transformers.LlavaForConditionalGeneration, "from_pretrained", lambda *_, **__: _large(folder)
                )
            )
        llava, loaded = None, ""
        for count, kind, precision in KINDS[:: 3 if rehearse else 1]:
            own: Arithmetic = "bfloat16" if rehearse and kind == "float16" else kind
            if llava is None or loaded != kind:
                llava = None  # its memory goes before the next one's comes
                llava, loaded = Llava(folder, read_tower_run("own"), 0, size.device, own), kind
            tokens = llava.answers([QUESTION] * count, [ANSWER] * count)
            pixels = torch.rand(count, 3, llava.size, llava.size, device=size.device, requires_grad=True)

            def gradient(llava: Llava = llava, pixels: torch.Tensor = pixels, tokens: Any = tokens) -> None:
                torch.autograd.grad(llava.losses(pixels, tokens).sum(), pixels)

            with arithmetic(size.device, tf32=precision == "tf32"):
                operations = teraflops(gradient)
                ms, memory = timed(gradient, size.device, min(3, size.repeats))
            named = own if precision != "tf32" else "tf32"
            yield Row(
                "llava",
                f"7B, {named}, {count} images of {tokens.ids.shape[1]} tokens: a gradient",
                ms,
                share(ms, operations, rates, precision),
                1000 * count / ms,
                "images",
                memory,
            )


def _large(folder: str) -> Any:
    """A network of LLaVA-1.5-7B's shape on the GPU, with a small tokeniser, and its vision tower on the CPU."""
    small = transformers.AutoConfig.from_pretrained(folder)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,  # as evaluated
            patch_size=14,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=small.image_token_id,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda"):
            model: Any = transformers.LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.model.vision_tower.to("cpu", torch.float32)
    return model
