"""LLaVA on pixels in [0, 1]: the loss of an answer, differentiable with respect to the pixels, and greedy answers.

The conversation is LLaVA-1.5's (`vicuna_v1`), as in FARE's evaluation:

    <s>SYSTEM USER: <image>…<image>⏎QUESTION ASSISTANT: ANSWER</s>

Text before and after the image is tokenised on its own. The loss is the mean cross entropy of the tokens of ANSWER
and </s>. Which tokens those are is read off the tokeniser's character offsets, so that it holds for any tokeniser;
lengths of prompts tokenised with the literal text "<image>" are off by some tokens.

Shapes: B images, L tokens, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from datamerge.evaluation.llava.vision_towers import Tower, load_tower
from datamerge.evaluation.runs import Run
from datamerge.runtime.messages import first_line
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError

Arithmetic = Literal["float16", "bfloat16", "float32"]
DTYPES: dict[Arithmetic, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IGNORED = -100


@dataclass(frozen=True)
class Tokens:
    """Conversations as token ids; padding is on the right.

    Attributes:
        ids: int64 [B, L], the image token repeated once per patch.
        labels: the ids of answers, `IGNORED` elsewhere, [B, L].
        image: position of the first image token, in all rows.
        first: position of the first token of an answer, over all rows.
    """

    ids: Tensor
    labels: Tensor
    image: int
    first: int


class Llava:
    """A LLaVA model whose vision tower may have been replaced.

    Args:
        path: folder or hub name of the model.
        run: the tower, from `read_tower_run`.
        image_size: side of the tower's input in pixels, 0 for the native one.
        device: where it runs.
        arithmetic: of all weights and passes.

    Attributes:
        preprocessing: of the tower: from a photo to its normalised pixels.
        tower_sha256: hash of the tower's weights before any conversion to `arithmetic`.

    Raises:
        ConfigError: no such model, or a tower that does not go with it.
    """

    def __init__(self, path: str, run: Run, image_size: int, device: torch.device, arithmetic: Arithmetic) -> None:
        _prepare()
        dtype = DTYPES[arithmetic]
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
            # In the stored precision: the tower's hash must not depend on the arithmetic of a pass.
            model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype="auto")
        except (OSError, ValueError, RuntimeError) as error:
            raise unreadable(path, error) from None
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f"llava: expected a fast tokeniser, whose offsets locate the answer, found none in {path!r}"
            )
        layer = model.config.vision_feature_layer
        if not isinstance(layer, int) or model.config.vision_feature_select_strategy not in ("default", "full"):
            raise ConfigError(f"llava: expected one vision feature layer, found {layer} in {path!r}")
        tower = load_tower(run, model.model.vision_tower, path, layer, image_size)
        check_width(tower, model, run)
        model.model.vision_tower = tower.module
        self.model = model.eval().requires_grad_(False).to(device)
        # Converted on the device, so that only stored bytes are copied. Buffers, such as frequencies of the rotary
        # embedding, stay float32.
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.preprocessing, self.tower_sha256 = tower.preprocessing, tower.sha256
        self._device, self._dtype = device, dtype
        full = model.config.vision_feature_select_strategy == "full"
        self._image_tokens = tower.patches + int(full)
        self._image_token = int(model.config.image_token_id)
        self._mean = _column(tower.preprocessing.mean or (0.0,), device)
        self._std = _column(tower.preprocessing.std or (1.0,), device)

    @property
    def size(self) -> int:
        """S."""
        return self.preprocessing.shape[1]

    def answers(self, questions: Sequence[str], answers: Sequence[str]) -> Tokens:
        """Conversations with their answers, padded on the right."""
        rows, labels = [], []
        for question, answer in zip(questions, answers, strict=True):
            before, behind = _around_image(question)
            found = self.tokenizer(f"{behind} {answer}", add_special_tokens=False, return_offsets_mapping=True)
            # A token belongs to the answer if it ends after the prompt; it may contain the space before the answer.
            spoken = [end > len(behind) for _, end in found.offset_mapping]
            prompt = self._before(before)
            rows.append([*prompt, *found.input_ids, self.tokenizer.eos_token_id])
            kept = [token if own else IGNORED for token, own in zip(found.input_ids, spoken, strict=True)]
            labels.append([IGNORED] * len(prompt) + kept + [self.tokenizer.eos_token_id])
        length = max(len(row) for row in rows)
        padded = [row + [self._padding] * (length - len(row)) for row in rows]
        targets = [row + [IGNORED] * (length - len(row)) for row in labels]
        first = min(next(i for i, label in enumerate(row) if label != IGNORED) for row in labels)
        ids, answered = (torch.tensor(part, device=self._device) for part in (padded, targets))
        return Tokens(ids, answered, rows[0].index(self._image_token), first)

    def losses(self, pixels: Tensor, tokens: Tokens) -> Tensor:
        """Mean cross entropy of each answer's tokens, float32 [B], of pixels [B, 3, S, S] in [0, 1]."""
        # Concatenated here: transformers would read the ids, and wait for the device, in every pass.
        words = self.model.get_input_embeddings()(tokens.ids)
        features = self._features(pixels).to(words.dtype)
        behind = words[:, tokens.image + features.shape[1] :]
        # Without a mask, which transformers would read as well: no token attends to the padding on its right. Without
        # a mask it checks whether a row holds several texts, unless it keeps a cache.
        logits = self.model(
            inputs_embeds=torch.cat([words[:, : tokens.image], features, behind], dim=1),
            logits_to_keep=tokens.ids.shape[1] - tokens.first + 1,  # logits before the first answer are not needed
            use_cache=True,
        ).logits
        targets = tokens.labels[:, tokens.first :]
        # One row per token: with more dimensions the GPU kernel is not deterministic, and torch may refuse it.
        losses = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view_as(targets).sum(dim=1) / (targets != IGNORED).sum(dim=1)

    @torch.no_grad()
    def generate(self, pixels: Tensor, questions: Sequence[str], new_tokens: int) -> list[str]:
        """Greedy answers of at most `new_tokens` tokens to pixels [B, 3, S, S] in [0, 1]."""
        rows = []
        for question in questions:
            before, behind = _around_image(question)
            rows.append([*self._before(before), *self.tokenizer(behind, add_special_tokens=False).input_ids])
        length = max(len(row) for row in rows)
        ids = torch.tensor([[self._padding] * (length - len(row)) + row for row in rows], device=self._device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self._device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=self._normalise(pixels),
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            pad_token_id=self._padding,
        )
        texts = self.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        return [str(text).strip() for text in texts]

    @property
    def _padding(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def _before(self, text: str) -> list[int]:
        """Ids from the start to the last image token."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return [*start, *ids, *[self._image_token] * self._image_tokens]

    def _features(self, pixels: Tensor) -> Tensor:
        """Features of pixels [B, 3, S, S] for the language model, [B, image tokens, width]."""
        config = self.model.config
        found = self.model.model.get_image_features(
            pixel_values=self._normalise(pixels),
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        return torch.stack(list(getattr(found, "pooler_output", found)))

    def _normalise(self, pixels: Tensor) -> Tensor:
        return ((pixels - self._mean) / self._std).to(self._dtype)


def check_width(tower: Tower, model: Any, run: Run) -> None:
    """Raise ConfigError unless LLaVA's projector takes the tower's features."""
    expected = int(model.model.multi_modal_projector.linear_1.in_features)
    if tower.width != expected:
        raise ConfigError(
            f"runs: expected vision encoders of width {expected}, which LLaVA's projector takes (for LLaVA-1.5 "
            f"ViT-L-14), found width {tower.width} in {run.name!r}"
        )


def count_parameters(path: str) -> int:
    """Number of parameters of a LLaVA model, without loading it.

    Raises:
        ConfigError: there is no such model.
    """
    _prepare()
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        if config.model_type != "llava":
            raise ConfigError(f"llava: expected a model of type llava, found {config.model_type} in {path!r}")
        with torch.device("meta"):
            model = transformers.LlavaForConditionalGeneration(config)
    except (OSError, ValueError, RuntimeError) as error:
        raise unreadable(path, error) from None
    return sum(parameter.numel() for parameter in model.parameters())


def unreadable(path: str, error: Exception) -> ConfigError:
    """The error for a model that cannot be loaded."""
    return ConfigError(
        "llava: expected a LLaVA model of Hugging Face (config.json, weights, tokeniser), found "
        f"{path!r}: {first_line(error)}; download it on a connected machine and give its folder"
    )


def _prepare() -> None:
    """Make torchvision importable, which transformers imports with a model, and turn its progress bars off."""
    make_torchvision_importable()
    transformers.utils.logging.disable_progress_bar()


def _around_image(question: str) -> tuple[str, str]:
    """Text before and after the image."""
    return f"{SYSTEM} USER: ", f"\n{question} ASSISTANT:"


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(list(values), device=device).view(-1, 1, 1)
