"""Our attacks compared with torchattacks and Foolbox on the same images; LLaVA's attack with its bare gradients."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from datamerge.attacks import APGD, Norm, apgd, auto_attack, sample_generators
from datamerge.encoders import load_encoder, load_head
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from datamerge.sources import decode, open_source
from storage_schemas.schema.pixel_length import Radius


@click.group()
def main() -> None:
    """Evaluation benchmarks."""


@main.command()
@click.option("--encoder", required=True, metavar="SPEC")
@click.option("--head", required=True, metavar="FILE", help="Class head of the encoder.")
@click.option("--data", required=True, help="Labelled images: any source of `datamerge evaluate`.")
@click.option("--images", default=100, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--epsilons", default="1/4080,1/2040,1/1360", show_default=True)
@click.option("--norm", default="linf", type=click.Choice(["linf", "l2"]), show_default=True)
@click.option("--batch", default=25, show_default=True)
@click.option("--threads", default=1, show_default=True)
def strength(
    encoder: str, head: str, data: str, images: int, steps: int, epsilons: str, norm: Norm, batch: int, threads: int
) -> None:
    """Robust accuracy under our attacks, torchattacks' APGD (CE, then targeted DLR on survivors) and Foolbox' PGD.

    All attack the same images. `broken by one alone` counts the images that only one of two attacks breaks, ours
    first; the error is the standard error of the difference of the two accuracies, from these pairs.
    """
    torch.set_num_threads(threads)
    network = load_encoder(encoder)
    model = nn.Sequential(network, load_head(head)).eval().requires_grad_(False)
    listed = open_source(data, limit_first=images)
    names = [sample.name for sample in listed.samples]
    decoded = [decode(listed.reader.read(sample), network.preprocessing) for sample in listed.samples]
    pixels = torch.from_numpy(np.stack(decoded))
    labels = torch.tensor([sample.label for sample in listed.samples])
    click.echo(f"{encoder}, {len(names)} images, {norm}, {steps} steps, one start")
    click.echo(
        "\n| epsilon | clean | Foolbox PGD | APGD-CE ours | torchattacks | broken by one alone "
        "| pair ours | torchattacks | broken by one alone | error |\n" + "|---" * 10 + "|"
    )
    for text in epsilons.split(","):
        found: dict[str, list[Tensor]] = {}
        settings = APGD(Radius(text), steps, grid=False, norm=norm)
        for first in range(0, len(names), batch):
            generators = [sample_generators(0, name, 1)[0] for name in names[first : first + batch]]
            x, y = pixels[first : first + batch].float() / 255, labels[first : first + batch]
            ours = auto_attack(model, x, y, settings, generators)
            survivors = {"clean": ours.clean, "ce": ours.after_cross_entropy, "pair": ours.robust}
            survivors |= _third_parties(model, x, y, ours.clean, settings)
            for name, robust in survivors.items():
                found.setdefault(name, []).append(robust)
        click.echo(_row(text, {name: torch.cat(parts) for name, parts in found.items()}))


def _third_parties(model: nn.Module, x: Tensor, y: Tensor, clean: Tensor, settings: APGD) -> dict[str, Tensor]:
    """Masks of the images that survive torchattacks' APGD-CE, its pair, and Foolbox's PGD; bool [B] each."""
    import foolbox
    import torchattacks
    from foolbox.models.pytorch import PyTorchModel

    epsilon, steps = float(settings.epsilon), settings.steps
    name = "L2" if settings.norm == "l2" else "Linf"
    # Ten classes: the label and the nine most likely others, as in AutoAttack.
    attacks: dict[str, Any] = {
        "torchattacks ce": torchattacks.APGD(model, name, epsilon, steps),
        "torchattacks pair": torchattacks.APGDT(model, name, epsilon, steps, n_classes=10),
    }
    robust, found = clean.clone(), {}
    for kind, attack in attacks.items():
        left = robust.nonzero().flatten()
        if len(left):
            with torch.enable_grad():
                adversarial = attack(x[left], y[left])
            with torch.no_grad():
                robust[left] = model(adversarial).argmax(dim=1) == y[left]
        found[kind] = robust.clone()
    pgd = (foolbox.attacks.L2PGD if settings.norm == "l2" else foolbox.attacks.LinfPGD)(steps=steps)
    torch.manual_seed(0)  # the only way to seed Foolbox's random start
    _, _, fooled = pgd(PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=epsilon)
    return found | {"foolbox pgd": clean & ~fooled}


def _row(epsilon: str, found: dict[str, Tensor]) -> str:
    def rate(name: str) -> str:
        return f"{float(found[name].float().mean()):.3f}"

    def alone(ours: str, theirs: str) -> tuple[int, int]:
        return int((found[theirs] & ~found[ours]).sum()), int((found[ours] & ~found[theirs]).sum())

    mine, other = alone("pair", "torchattacks pair")
    count = len(found["pair"])
    error = math.sqrt(mine + other - (mine - other) ** 2 / count) / count
    cells = [epsilon, rate("clean"), rate("foolbox pgd"), rate("ce"), rate("torchattacks ce")]
    cells += ["{}, {}".format(*alone("ce", "torchattacks ce")), rate("pair"), rate("torchattacks pair")]
    return "| " + " | ".join([*cells, f"{mine}, {other}", f"{error:.3f}"]) + " |"


@main.command()
@click.option("--llava", default="", help="LLaVA model; by default a small one with random weights.")
@click.option("--steps", default=10, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def step(llava: str, steps: int, repeats: int, threads: int, device: str) -> None:
    """Time of APGD on LLaVA's answer over the same number of bare forward and input-only backward passes."""
    from datamerge.evaluation.llava.attack import AnswerLoss, identity
    from datamerge.evaluation.llava.model import Llava
    from datamerge.evaluation.llava.vision_towers import OWN, read_tower_run

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = llava or _small_llava(folder)
        model = Llava(path, read_tower_run(OWN), 0, torch.device(device), "float32")
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand((1, 3, model.size, model.size), generator=generator).to(device)
    tokens = model.answers(["Provide a short caption for this image."], ["A man on a surfboard rides a wave."])
    settings = APGD(Fraction(2, 255), steps, random_start=False, grid=False, initial_step=Fraction(1))
    loss = AnswerLoss(model, tokens, 1.0)

    def ours() -> None:
        apgd(loss, clean, torch.zeros(1, device=clean.device), identity, settings, [])

    def bare() -> None:
        # APGD takes one gradient more than it has steps, and the loss of its result.
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
    """A LLaVA of a few million parameters, with random weights and a byte-level tokeniser."""
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
    """Wall time on a GPU; CPU time of this process on a CPU, which other load hardly affects."""
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    started = clock()
    work()
    if gpu:
        torch.cuda.synchronize()
    return clock() - started


if __name__ == "__main__":
    main()
