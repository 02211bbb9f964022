"""LLaVA on pixels: the tokens of an answer, their loss, greedy answers, and replaced vision towers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamerge.encoders import load_encoder, save_encoder
from datamerge.evaluation.llava.coco import Captioned
from datamerge.evaluation.llava.model import IGNORED, SYSTEM, Llava
from datamerge.evaluation.llava.vision_towers import OWN, OpenClipTower, identify_tower, read_tower_run
from storage_schemas import ConfigError
from tests.support.operations import Operations
from tests.support.refusals import refused

CPU = torch.device("cpu")
QUESTION, ANSWER = "What is it?", "A man, on a surfboard"


@pytest.fixture
def pixels(llava: Llava) -> Tensor:
    return torch.rand((2, 3, llava.size, llava.size), generator=torch.Generator().manual_seed(1))


def normalised(pixels: Tensor) -> Tensor:
    """Pixels normalised as by CLIP's preprocessing."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    return (pixels - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def test_the_mask_covers_the_answer_token_by_token(llava: Llava) -> None:
    tokens = llava.answers([QUESTION], [ANSWER])
    tokenizer, ids, labels = llava.tokenizer, tokens.ids[0].tolist(), tokens.labels[0].tolist()
    image = [i for i, token in enumerate(ids) if token == llava.model.config.image_token_id]
    assert image == list(range(image[0], image[0] + 16)), "one token per patch of 8 x 8, none from the text"
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1 : image[0]]) == f"{SYSTEM} USER: "
    answered = [i for i, label in enumerate(labels) if label != IGNORED]
    # Everything behind the prompt, to the end, and not a token more.
    assert answered == list(range(answered[0], len(ids)))
    assert [labels[i] for i in answered] == [ids[i] for i in answered]
    assert tokenizer.decode(ids[image[-1] + 1 : answered[0]]) == f"\n{QUESTION} ASSISTANT:"
    assert tokenizer.decode(ids[answered[0] : -1]) == f" {ANSWER}"
    assert ids[-1] == tokenizer.eos_token_id


def test_losses_and_answers_have_the_same_prompt(
    llava: Llava, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    generate = llava.model.generate

    def spy(**arguments: Any) -> Any:
        seen.append(arguments["input_ids"])
        return generate(**arguments)

    monkeypatch.setattr(llava.model, "generate", spy)
    llava.generate(pixels[:1], [QUESTION], 2)
    tokens = llava.answers([QUESTION], [ANSWER])
    prompt = tokens.ids[tokens.labels == IGNORED]
    assert torch.equal(seen[0][0], prompt)


def test_padding_changes_nothing(llava: Llava, pixels: Tensor) -> None:
    questions, answers = [QUESTION, "Where?"], ["yes", "a long answer about a street"]
    together = llava.losses(pixels, llava.answers(questions, answers))
    alone = torch.cat([llava.losses(pixels[i : i + 1], llava.answers([questions[i]], [answers[i]])) for i in (0, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    one_by_one = [llava.generate(pixels[i : i + 1], [questions[i]], 6)[0] for i in (0, 1)]
    assert llava.generate(pixels, questions, 6) == one_by_one


def test_the_loss_equals_that_of_transformers(llava: Llava, pixels: Tensor) -> None:
    tokens = llava.answers([QUESTION], [ANSWER])
    expected = llava.model(
        input_ids=tokens.ids,
        attention_mask=torch.ones_like(tokens.ids),
        pixel_values=normalised(pixels[:1]),
        labels=tokens.labels,
    ).loss
    torch.testing.assert_close(llava.losses(pixels[:1], tokens)[0], expected)


def test_a_pass_does_not_wait_for_the_device(llava: Llava, pixels: Tensor) -> None:
    """No operation needs the value of a tensor, for which the host would wait until the GPU finished the pass."""
    tokens = llava.answers([QUESTION, "Where?"], ["yes", "a long answer about a street"])
    point = pixels.clone().requires_grad_()
    with Operations() as seen:
        torch.autograd.grad(llava.losses(point, tokens).sum(), point)
    waiting = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.masked_select", "aten.nonzero")
    assert not [name for name in seen.names if name.startswith(waiting)]
    assert any(name.startswith("aten.embedding") for name in seen.names)
    # None lacks a deterministic kernel on GPUs: `torch.use_deterministic_algorithms` would refuse it.
    refused_there = ("aten.nll_loss2d", "aten.cumsum", "aten.scatter_reduce", "aten.put", "aten.upsample")
    assert not [name for name in seen.names if name.startswith((*refused_there, "aten.adaptive_avg_pool2d"))]
    assert any(name.startswith("aten.nll_loss_forward") for name in seen.names)


def test_the_gradient_at_the_pixels_equals_finite_differences(llava: Llava, pixels: Tensor) -> None:
    tokens = llava.answers([QUESTION], [ANSWER])
    point = pixels[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(llava.losses(point, tokens).sum(), point)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        change = llava.losses(pixels[:1] + step, tokens) - llava.losses(pixels[:1] - step, tokens)
    assert float(change) == pytest.approx(2e-3 * float(gradient.norm()), rel=0.05)


def test_answers_are_greedy(llava: Llava, pixels: Tensor) -> None:
    tokens = llava.answers([QUESTION], [ANSWER])
    ids = tokens.ids[tokens.labels == IGNORED][None]
    for _ in range(5):
        with torch.no_grad():
            logits = llava.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=normalised(pixels[:1])
            ).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=2)], dim=1)
        if int(ids[0, -1]) == llava.tokenizer.eos_token_id:
            break
    expected = llava.tokenizer.decode(ids[0, int((tokens.labels == IGNORED).sum()) :], skip_special_tokens=True)
    assert llava.generate(pixels[:1], [QUESTION], 5) == [expected.strip()]


def test_memorised_captions_are_generated(llava: Llava, captioned: list[Captioned]) -> None:
    from datamerge.evaluation.llava.captions import QUESTION as CAPTION
    from datamerge.evaluation.llava.images import read_image

    images = [torch.from_numpy(read_image(image.image, llava.preprocessing, "pad")) for image in captioned]
    generated = llava.generate(torch.stack(images).float() / 255, [CAPTION] * 4, 40)
    assert sum(a == b.captions[0].strip() for a, b in zip(generated, captioned, strict=True)) >= 3


def test_an_open_clip_tower_gives_the_tokens_before_its_last_block(make_clip: Callable[..., str]) -> None:
    encoder = load_encoder(make_clip())
    visual: Any = encoder.model
    seen: list[Tensor] = []
    handle = visual.transformer.resblocks[1].register_forward_hook(lambda _m, _i, output: seen.append(output))
    pixels = torch.rand(2, 3, 32, 32)
    visual(pixels)
    handle.remove()
    states = OpenClipTower(visual, -2)(pixels).hidden_states
    assert len(states) == 4
    torch.testing.assert_close(states[-2], seen[0])


def test_an_open_clip_tower_equals_hugging_faces_with_the_same_weights(make_clip: Callable[..., str]) -> None:
    import transformers

    visual: Any = load_encoder(make_clip()).model
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        hidden_act="gelu",
    )
    twin: Any = transformers.CLIPVisionModel(config).train(False)
    own = twin.state_dict()
    source = visual.state_dict()
    state = {
        "embeddings.class_embedding": source["class_embedding"],
        "embeddings.patch_embedding.weight": source["conv1.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
    }
    for name in ("weight", "bias"):
        state |= {
            f"pre_layrnorm.{name}": source[f"ln_pre.{name}"],
            f"post_layernorm.{name}": source[f"ln_post.{name}"],
        }
        for i in range(3):
            ours, theirs = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
            for part, value in zip("qkv", source[f"{ours}attn.in_proj_{name}"].chunk(3), strict=True):
                state[f"{theirs}self_attn.{part}_proj.{name}"] = value
            state |= {
                f"{theirs}self_attn.out_proj.{name}": source[f"{ours}attn.out_proj.{name}"],
                f"{theirs}layer_norm1.{name}": source[f"{ours}ln_1.{name}"],
                f"{theirs}layer_norm2.{name}": source[f"{ours}ln_2.{name}"],
                f"{theirs}mlp.fc1.{name}": source[f"{ours}mlp.c_fc.{name}"],
                f"{theirs}mlp.fc2.{name}": source[f"{ours}mlp.c_proj.{name}"],
            }
    prefix = "" if "embeddings.class_embedding" in own else "vision_model."
    twin.load_state_dict({prefix + key: value for key, value in state.items()}, strict=False)
    pixels = torch.rand(2, 3, 32, 32)
    expected = twin(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(OpenClipTower(visual, -2)(pixels).hidden_states[-2], expected, rtol=1e-4, atol=1e-5)


def test_a_replaced_tower_is_used(
    llava: Llava, llava_path: str, make_clip: Callable[..., str], pixels: Tensor
) -> None:
    run = read_tower_run(make_clip())
    other = Llava(llava_path, run, 0, CPU, "float32")
    tokens = llava.answers([QUESTION], [ANSWER])
    assert not torch.allclose(other.losses(pixels[:1], tokens), llava.losses(pixels[:1], tokens))
    # By hand: open_clip's tokens through LLaVA's projector.
    encoder = load_encoder(make_clip())
    states = OpenClipTower(encoder.model, -2)((pixels[:1] - encoder.mean) / encoder.std).hidden_states
    features = llava.model.model.multi_modal_projector(states[-2][:, 1:])
    embedded = llava.model.get_input_embeddings()(tokens.ids)
    embedded[tokens.ids == llava.model.config.image_token_id] = features[0]
    logits = llava.model.lm_head(llava.model.model.language_model(inputs_embeds=embedded).last_hidden_state)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens.labels[0, 1:], ignore_index=IGNORED)
    torch.testing.assert_close(other.losses(pixels[:1], tokens)[0], expected, rtol=1e-5, atol=1e-6)
    assert other.tower_sha256 == encoder.sha256 != llava.tower_sha256


def save_tower(tower: Any, folder: Path, **changes: Any) -> str:
    """Save a vision model with CLIP's image processor, changed as given; returns its spec."""
    import transformers

    size = int(tower.config.image_size)
    sides = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    transformers.CLIPImageProcessor(**{**sides, **changes}).save_pretrained(folder)
    tower.save_pretrained(folder)
    return f"hf:{folder}"


def test_a_hugging_face_tower_at_another_size(llava: Llava, llava_path: str, tmp_path: Path) -> None:
    run = read_tower_run(save_tower(llava.model.model.vision_tower, tmp_path))
    assert run.arm == f"hf:{tmp_path.name}", "two checkpoints must not look alike in the table"
    same = Llava(llava_path, run, 0, CPU, "float32")
    assert same.tower_sha256 == llava.tower_sha256 == identify_tower(run, "pad")["encoder_sha256"]
    larger = [Llava(llava_path, tower, 48, CPU, "float32") for tower in (read_tower_run(OWN), run)]
    tokens, pixels = llava.answers([QUESTION], [ANSWER]), torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(same.losses(pixels, tokens), llava.losses(pixels, tokens))
    pixels = torch.rand(1, 3, 48, 48)
    tower = llava.model.model.vision_tower
    expected = tower(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2]
    for other in larger:
        wide = other.answers([QUESTION], [ANSWER])
        assert int((wide.ids == other.model.config.image_token_id).sum()) == 36
        assert (other.size, other.tower_sha256) == (48, llava.tower_sha256), "the weights are the same"
        found = other.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(found, expected)


def test_a_tower_has_the_preprocessing_of_its_checkpoint(llava: Llava, llava_path: str, tmp_path: Path) -> None:
    changes = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.125], "resample": 2}
    spec = save_tower(llava.model.model.vision_tower, tmp_path, **changes)
    other = Llava(llava_path, read_tower_run(spec), 0, CPU, "float32")
    assert (other.preprocessing.mean, other.preprocessing.interpolation) == ((0.5, 0.4, 0.3), "bilinear")
    tokens, pixels = llava.answers([QUESTION], [ANSWER]), torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(changes[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    expected = llava.model(
        input_ids=tokens.ids,
        attention_mask=torch.ones_like(tokens.ids),
        pixel_values=(pixels - mean) / std,
        labels=tokens.labels,
    ).loss
    torch.testing.assert_close(other.losses(pixels, tokens)[0], expected)
    assert llava.preprocessing.mean == (0.48145466, 0.4578275, 0.40821073), "those of LLaVA's own image processor"


@pytest.mark.parametrize(("native", "size"), [(48, 0), (48, 32), (32, 48)])
def test_open_clip_towers_of_every_size(
    llava_path: str, make_clip: Callable[..., str], tmp_path: Path, native: int, size: int
) -> None:
    """As for a tower for 336 pixels at 336 and at the protocol's 224, and one for 224 at 336."""
    import open_clip

    name, side = make_clip(size=native), size or native
    save_encoder(load_encoder(name), tmp_path / "weights.safetensors")
    spec = f"{name}@{tmp_path / 'weights.safetensors'}"
    state = {f"visual.{key}": value for key, value in load_encoder(spec).model.state_dict().items()}
    resized: Any = open_clip.create_model(name.partition(":")[2], force_image_size=side).eval()
    open_clip.factory.resize_pos_embed(state, resized)
    resized.load_state_dict(state, strict=False)
    pixels = torch.rand(1, 3, side, side)
    expected = OpenClipTower(resized.visual, -2)(pixels).hidden_states[-2]
    found = Llava(llava_path, read_tower_run(spec), size, CPU, "float32")
    torch.testing.assert_close(found.model.model.vision_tower(pixels).hidden_states[-2], expected)
    assert found.size == side
    assert found.tower_sha256 == load_encoder(spec).sha256


def test_a_run_trained_from_a_hugging_face_model_is_a_tower(
    llava: Llava, llava_path: str, make_run: Callable[..., str], tmp_path: Path
) -> None:
    original = save_tower(llava.model.model.vision_tower, tmp_path / "clip")
    encoder = load_encoder(original)
    embedding = encoder.model.get_parameter("vision_model.embeddings.class_embedding").data
    embedding += torch.randn(embedding.shape, generator=torch.Generator().manual_seed(2))
    save_encoder(encoder, tmp_path / "tuned.safetensors")
    folder = make_run(f"{original}@{tmp_path / 'tuned.safetensors'}", original)
    run = read_tower_run(folder)
    assert run.arm == "avg"
    tuned = Llava(llava_path, run, 0, CPU, "float32")
    tokens, pixels = llava.answers([QUESTION], [ANSWER]), torch.rand(1, 3, 32, 32)
    assert not torch.equal(tuned.losses(pixels, tokens), llava.losses(pixels, tokens))
    tower: Any = encoder.model.get_submodule("vision_model")
    expected = tower(normalised(pixels), output_hidden_states=True).hidden_states[-2]
    found = tuned.model.model.vision_tower(normalised(pixels), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(found, expected)


def test_half_precision_is_close(llava: Llava, llava_path: str, pixels: Tensor) -> None:
    half = Llava(llava_path, read_tower_run(OWN), 0, CPU, "bfloat16")
    # The passes of a study change the arithmetic; they must not look like other weights.
    assert half.tower_sha256 == llava.tower_sha256
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    tokens = llava.answers([QUESTION], [ANSWER])
    loss = half.losses(pixels[:1], tokens)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(llava.losses(pixels[:1], tokens)), rel=0.05)


def test_unsuitable_encoders_and_sizes_are_refused(
    llava: Llava, llava_path: str, make_clip: Callable[..., str], tmp_path: Path
) -> None:
    with refused(ConfigError, "runs", "width 32", "width 64"):
        Llava(llava_path, read_tower_run(make_clip(width=64)), 0, CPU, "float32")
    for spec in (make_clip(), OWN, save_tower(llava.model.model.vision_tower, tmp_path / "clip")):
        with refused(ConfigError, "image_size", " 8 ", 30):
            Llava(llava_path, read_tower_run(spec), 30, CPU, "float32")
    with refused(ConfigError, "runs", "'mlp:3x4x4-2'"):
        read_tower_run("mlp:3x4x4-2")
    with refused(ConfigError, "llava", tmp_path):
        Llava(str(tmp_path), read_tower_run(OWN), 0, CPU, "float32")
    with refused(ConfigError, "runs", tmp_path):
        Llava(llava_path, read_tower_run(f"hf:{tmp_path}"), 0, CPU, "float32")


def test_networks_whose_tokens_are_not_clips_are_refused(llava_path: str, tmp_path: Path) -> None:
    import open_clip
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, intermediate_size=32))
    registers = transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=4)
    )
    for model, tokens in ((siglip, 16), (registers, 21)):
        spec = save_tower(model, tmp_path / type(model).__name__)
        with refused(ConfigError, "runs", spec, "class token", f"{tokens} tokens", type(model).__name__):
            Llava(llava_path, read_tower_run(spec), 0, CPU, "float32")
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    vision = {"timm_model_name": "test_vit", "image_size": 160}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "datamerge-test-timm.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "datamerge-test-timm.json")
    with refused(ConfigError, "runs", "class token", "TimmModel"):
        Llava(llava_path, read_tower_run("open_clip:datamerge-test-timm"), 0, CPU, "float32")


def test_a_missing_image_processor_is_refused(llava: Llava, llava_path: str, tmp_path: Path) -> None:
    llava.model.model.vision_tower.save_pretrained(tmp_path / "clip")
    with refused(ConfigError, "runs", "preprocessor_config.json", tmp_path / "clip"):
        Llava(llava_path, read_tower_run(f"hf:{tmp_path / 'clip'}"), 0, CPU, "float32")
    shutil.copytree(llava_path, tmp_path / "llava", ignore=shutil.ignore_patterns("preprocessor_config.json"))
    with refused(ConfigError, "llava", "preprocessor_config.json", tmp_path / "llava"):
        Llava(str(tmp_path / "llava"), read_tower_run(OWN), 0, CPU, "float32")
