"""The passes of FARE's attack on LLaVA's answers, and one pass of it.

    clean        no attack
    answer 1…5   APGD from the image, maximising the cross entropy of one reference answer, in half precision
    refined      the same from the strongest image so far and the reference it was found with, in float32
    "maybe", "Word"   APGD that minimises the cross entropy of that word, in float32 (VQA only)

After each pass the model answers anew and the answer is scored. The lowest score counts; an image is left alone as
soon as its score is low enough. Passes for references that an image does not have are left out.

Shapes: B images, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from datamerge.attacks import APGD, Attacked, NonFiniteGradient, Precision, apgd
from datamerge.evaluation.llava.model import Llava, Tokens

Stage = Literal["half", "float32"]
MOST_REFERENCES = 5


@dataclass(frozen=True)
class Pass:
    """One pass over an image.

    Attributes:
        name: its name in the JSON file.
        stage: whether the model is in half precision or float32.
        reference: index of the attacked reference, `best` for that of the lowest score so far; None: no reference.
        target: answer whose likelihood is raised instead.
    """

    name: str
    stage: Stage
    reference: int | Literal["best"] | None = None
    target: str | None = None

    @property
    def attacks(self) -> bool:
        return self.reference is not None or self.target is not None


CLEAN = Pass("clean", "half")


def plan_passes(references: int, targets: Sequence[str], attack: bool) -> list[Pass]:
    """The passes of an image with this number of references, in order."""
    if not attack:
        return [CLEAN]
    untargeted = [
        Pass(f"answer {index + 1}", "half", reference=index) for index in range(min(references, MOST_REFERENCES))
    ]
    refined = Pass("refined", "float32", reference="best")
    return [CLEAN, *untargeted, refined, *(Pass(f'"{target}"', "float32", target=target) for target in targets)]


class AnswerLoss(nn.Module):
    """The loss of fixed answers as a function of pixels: [B, 3, S, S] in [0, 1] → [B].

    Args:
        llava: the model.
        tokens: from `Llava.answers`, one row per image.
        sign: 1 to make the answers unlikely by ascent, −1 to make them likely.
    """

    def __init__(self, llava: Llava, tokens: Tokens, sign: float) -> None:
        super().__init__()
        self._llava, self._tokens, self._sign = llava, tokens, sign

    def forward(self, pixels: Tensor) -> Tensor:
        return self._sign * self._llava.losses(pixels, self._tokens)


def identity(losses: Tensor, _: Tensor) -> Tensor:
    """The objective of a model that returns losses."""
    return losses


@dataclass(frozen=True)
class Attempt:
    """Result of the attack on one image.

    Attributes:
        pixels: the strongest image, float32 [3, S, S]; None if the attack failed.
        start_loss, loss: of the attacked answer, before and after; lower is stronger where it was targeted.
        failure: why it failed.
    """

    pixels: Tensor | None
    start_loss: float | None = None
    loss: float | None = None
    failure: str | None = None


def attack_answers(
    llava: Llava,
    clean: Tensor,
    questions: Sequence[str],
    answers: Sequence[str],
    settings: APGD,
    names: Sequence[str],
    *,
    targeted: bool,
    initial: Tensor | None = None,
    precision: Precision = "float32",
) -> list[Attempt]:
    """APGD on each image's answer; images whose gradients overflow are reported, and the others go on.

    Args:
        llava: the model.
        clean: float32 [B, 3, S, S] in [0, 1].
        questions, answers: one per image.
        settings: the attack's.
        names: how errors call the images.
        targeted: make the answers likely instead of unlikely.
        initial: where to start, [B, 3, S, S]; at `clean` if None.
        precision: of the passes.
    """
    sign = -1.0 if targeted else 1.0
    rows = list(range(len(clean)))
    attempts: dict[int, Attempt] = {}
    while rows:
        tokens = llava.answers([questions[row] for row in rows], [answers[row] for row in rows])
        start = clean if initial is None else initial
        try:
            found: Attacked = apgd(
                AnswerLoss(llava, tokens, sign),
                clean[rows],
                torch.zeros(len(rows), device=clean.device),
                identity,
                settings,
                [],
                [names[row] for row in rows],
                initial=start[rows].clone(),
                precision=precision,
            )
        except NonFiniteGradient as error:
            # Half precision overflows on some images; the float32 passes still attack them.
            for index in error.indices:
                attempts[rows[index]] = Attempt(None, failure=str(error))
            rows = [row for index, row in enumerate(rows) if index not in error.indices]
            continue
        for index, row in enumerate(rows):
            before, after = sign * float(found.start_loss[index]), sign * float(found.loss[index])
            attempts[row] = Attempt(found.pixels[index], before, after)
        break
    return [attempts[row] for row in range(len(clean))]
