"""Everything the experiment needs and does not find, all at once, each with what to do about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from experiments.paper.settings import Data, Study
from storage_schemas import DatamergeError

# Modules that the stages import beyond datamerge's own dependencies.
PACKAGES = (
    "torch",
    "torchvision",
    "open_clip",
    "timm",
    "ray",
    "pyarrow",
    "tensorboard",
    "transformers",
    "pycocoevalcap",
)
COCO_IMAGES = "unpack http://images.cocodataset.org/zips/val2014.zip"
# Path in [data] → what is there, what to do if it is not.
PATHS = {
    "images": (
        "ImageNet's training images",
        "register at https://image-net.org, unpack ILSVRC2012_img_train.tar and in it each class's tar into a folder",
    ),
    "coco_captions": (
        "Karpathy's captions of COCO",
        "unpack https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
    ),
    "coco_images": ("COCO's images", COCO_IMAGES),
    "vqa_questions": (
        "VQAv2's questions",
        "unpack the validation questions from https://visualqa.org/download.html",
    ),
    "vqa_annotations": (
        "VQAv2's answers",
        "unpack the validation annotations from https://visualqa.org/download.html",
    ),
    "vqa_images": ("VQAv2's images", COCO_IMAGES),
}
LLAVA_FILES = ("config.json", "tokenizer.json")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ENCODER_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def problems(study: Study, data: Data, check_settings: Callable[[], None]) -> list[str]:
    """One line for each thing that is missing or wrong.

    Args:
        study: the settings.
        data: where things are.
        check_settings: raises DatamergeError if the commands would refuse the settings; needs the packages.
    """
    absent = [name for name in PACKAGES if find_spec(name) is None]
    found = []
    if absent:
        found.append(
            f"packages: {', '.join(absent)} not installed; pip install 'datamerge[merge,train,eval]', and ask again: "
            "what needs them is not checked"
        )
    gone = [name for name in PATHS if not Path(getattr(data, name)).exists()]
    found += [f"{PATHS[n][0]}: expected at {getattr(data, n)}, found nothing; {PATHS[n][1]}" for n in gone]
    _, at, weights = data.encoder.partition("@")
    if at and not Path(weights).is_file():
        found.append(f"encoder weights: expected a file at {weights}, found none; put it there or change the encoder")
    if absent:
        return found
    checks: list[Callable[[], Iterable[str] | None]] = [
        check_settings,
        lambda: _cached_encoder(data.encoder),
        lambda: _llava(data.llava),
    ]
    if "images" not in gone:
        checks.append(lambda: _images(data.images, study.groups))
    if not {"coco_captions", "coco_images"} & set(gone):
        checks.append(lambda: _captions(study, data))
    if not {"vqa_questions", "vqa_annotations", "vqa_images"} & set(gone):
        checks.append(lambda: _questions(study, data))
    for check in checks:
        try:
            found += check() or ()
        except (DatamergeError, OSError, ValueError) as error:  # the last two: files that cannot be read, or are cut
            found.append(str(error))
    return found


def warnings() -> list[str]:
    """What does not stop the experiment, or not on another machine."""
    found = []
    if shutil.which("java") is None:
        found.append(
            "Java: found none, so CIDEr would not be comparable to published numbers; install a Java runtime"
        )
    if find_spec("torch") is not None:
        import torch

        if not torch.cuda.is_available():
            found.append("GPU: torch sees none here; the experiment itself needs one")
    return found


def _images(folder: str, needed: int) -> Iterator[str]:
    from datamerge.sources import open_source

    source = open_source(folder)
    if source.kind != "image_folder":
        yield f"ImageNet's training images: expected a folder of image files at {folder}, found {source.kind}"
    elif len(source.samples) < needed:
        yield (
            f"ImageNet's training images: expected at least {needed:,}, one for each group that training takes, "
            f"found {len(source.samples):,} in {folder}"
        )


def _captions(study: Study, data: Data) -> None:
    from datamerge.evaluation.llava.coco import read_captions

    read_captions(data.coco_captions, data.coco_images, "test", *_sample(study))


def _questions(study: Study, data: Data) -> None:
    from datamerge.evaluation.llava.coco import read_questions

    read_questions(data.vqa_questions, data.vqa_annotations, data.vqa_images, *_sample(study))


def _sample(study: Study) -> tuple[int, int]:
    return int(study.evaluate["sample"]), int(study.evaluate.get("sample_seed", 42))


def _cached_encoder(spec: str) -> Iterator[str]:
    """Weights that open_clip knows by a tag must be on this machine: a cluster's nodes often reach no hub."""
    from datamerge.encoders import parse_spec
    from datamerge.encoders.encoder import known_open_clip

    kind, _, rest = spec.partition(":")
    if kind != "open_clip":
        yield f"encoder: expected an open_clip: encoder, which has patch tokens for LLaVA, found {spec!r}"
    if kind != "open_clip" or "@" in rest:
        return
    parsed = known_open_clip(parse_spec(spec))
    if parsed.pretrained is None:
        return
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    repository = str(open_clip.get_pretrained_cfg(parsed.model, parsed.pretrained).get("hf_hub", "")).strip("/")
    if repository and not any(isinstance(try_to_load_from_cache(repository, name), str) for name in ENCODER_FILES):
        yield (
            f"encoder weights: expected {repository} in Hugging Face's cache, found none; hf download {repository} "
            f'{ENCODER_FILES[0]}, or name the file: encoder = "open_clip:{parsed.model}@FILE"'
        )


def _llava(name: str) -> Iterator[str]:
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            yield (
                f"LLaVA: expected a folder below --data, or a model in Hugging Face's cache, found none of the name "
                f"{name!r}; hf download {name}"
            )
            return
    needed = [*LLAVA_FILES]
    if (folder / INDEX).is_file():
        needed += sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    else:
        needed.append(SINGLE)
    absent = [file for file in needed if not (folder / file).is_file()]
    if absent:
        yield f"LLaVA: expected {', '.join(absent)} in {folder}, found none; hf download {name} again"
