"""Official files of COCO captions, of Karpathy's split and of VQAv2, and the images that they name.

COCO captions   {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
Karpathy        {"images": [{"split", "filepath", "filename", "cocoid", "sentences": [{"raw"}]}]}
VQAv2           {"data_subtype", "questions": [{"image_id", "question", "question_id"}]}
                {"data_subtype", "annotations": [{"question_id", "answers": [{"answer"}]}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamerge.evaluation.sampling import draw
from datamerge.evaluation.store import read_object
from storage_schemas import SourceError, shortened
from storage_schemas.access.local_paths import user_path


@dataclass(frozen=True)
class Captioned:
    """An image with its reference captions.

    Attributes:
        key: COCO's id.
        image: its file.
        captions: in the file's order.
    """

    key: str
    image: Path
    captions: Sequence[str]


@dataclass(frozen=True)
class Asked:
    """A question about an image with people's answers.

    Attributes:
        key: the question's id.
        image: its file.
        question: as it was asked.
        answers: of usually ten people, in the file's order.
    """

    key: str
    image: Path
    question: str
    answers: Sequence[str]


def read_captions(file: str, folder: str, split: str, count: int, seed: int) -> list[Captioned]:
    """`count` images drawn from a caption file; all of them, in the order of the file, if there are no more.

    Raises:
        SourceError: the file has another format, or an image is missing.
    """
    content = _read(file, "captions")
    images = _entries(content, "images", file)
    if "annotations" in content:
        captions: dict[Any, list[str]] = {}
        for entry in _entries(content, "annotations", file):
            captions.setdefault(_id(entry, "image_id", file), []).append(str(_field(entry, "caption", file)))
        listed = [image for image in images if _id(image, "id", file) in captions]
        found = [
            (str(image["id"]), [str(_field(image, "file_name", file))], captions[image["id"]]) for image in listed
        ]
    else:
        splits = sorted({str(_field(image, "split", file)) for image in images})
        if split not in splits:
            raise SourceError(f"{file}: expected the split {split!r}, found {', '.join(splits)}; choose with `split`")
        found = [_karpathy(image, file) for image in images if image["split"] == split]
    if not found:
        raise SourceError(f"{file}: expected images with captions, found none")
    chosen = draw(found, count, seed) if count < len(found) else found
    paths = _find([(names, key) for key, names, _ in chosen], folder, file)
    return [Captioned(key, path, captions) for (key, _, captions), path in zip(chosen, paths, strict=True)]


def _karpathy(image: Mapping[str, Any], file: str) -> tuple[str, list[str], list[str]]:
    name = str(_field(image, "filename", file))
    key = str(_id(image, "cocoid", file)) if "cocoid" in image else Path(name).stem
    sentences = [str(_field(sentence, "raw", file)) for sentence in _entries(image, "sentences", file)]
    return key, [f"{image['filepath']}/{name}" if "filepath" in image else name, name], sentences


def read_questions(file: str, annotations: str, folder: str, count: int, seed: int) -> list[Asked]:
    """`count` questions drawn from VQAv2's file; all of them, in the order of the file, if there are no more.

    Raises:
        SourceError: a file has another format, a question has no answers, or an image is missing.
    """
    content, answered = _read(file, "questions"), _read(annotations, "annotations")
    questions = _entries(content, "questions", file)
    answers = {
        _id(entry, "question_id", annotations): [
            str(_field(answer, "answer", annotations)) for answer in _entries(entry, "answers", annotations)
        ]
        for entry in _entries(answered, "annotations", annotations)
    }
    missing = [entry for entry in questions if not answers.get(_id(entry, "question_id", file))]
    if missing or not questions:
        which = f"none for question {missing[0]['question_id']}" if missing else "no questions"
        raise SourceError(f"{annotations}: expected answers to the questions of {file}, found {which}")
    subtype = str(content.get("data_subtype", "val2014"))
    chosen = draw(questions, count, seed) if count < len(questions) else questions
    wanted = [(_vqa_names(entry, subtype, file), str(entry["image_id"])) for entry in chosen]
    paths = _find(wanted, folder, file)
    return [
        Asked(str(entry["question_id"]), path, str(_field(entry, "question", file)), answers[entry["question_id"]])
        for entry, path in zip(chosen, paths, strict=True)
    ]


def _vqa_names(question: Mapping[str, Any], subtype: str, file: str) -> list[str]:
    image_id = _id(question, "image_id", file)
    try:
        number = f"{int(image_id):012d}"
    except (ValueError, OverflowError):
        raise SourceError(f"{file}: expected a number as 'image_id', found {shortened(image_id)}") from None
    name = f"COCO_{subtype}_{number}.jpg"
    return [name, f"{subtype}/{name}", f"{number}.jpg", f"{subtype}/{number}.jpg"]


def _find(wanted: Sequence[tuple[Sequence[str], str]], folder: str, file: str) -> list[Path]:
    """For each image, the first of its names that is a file in the folder."""
    root = user_path(folder)
    if not root.is_dir():
        raise SourceError(f"images: expected the folder of the images of {file}, found nothing at {folder!r}")
    for name in (name for names, _ in wanted for name in names):
        if Path(name).anchor or ".." in Path(name).parts:
            raise SourceError(f"{file}: expected images inside {folder}, found {shortened(name)}; correct the file")
    found = [next((root / name for name in names if (root / name).is_file()), None) for names, _ in wanted]
    missing = [names[0] for (names, _), path in zip(wanted, found, strict=True) if path is None]
    if missing:
        raise SourceError(
            f"{folder}: expected {len(wanted)} images that {file} names, {len(missing)} are missing, e.g. "
            f"{shortened(missing[0])}; complete the folder or choose another with `images`"
        )
    return [path for path in found if path is not None]


def _read(file: str, needed: str) -> dict[str, Any]:
    try:
        return read_object(user_path(file))
    except OSError as error:
        raise SourceError(f"{file}: expected a JSON file of {needed}, found {error.strerror}") from None
    except ValueError as error:
        raise SourceError(f"{file}: expected a JSON object of {needed}, found {error}") from None


def _entries(content: Mapping[str, Any], name: str, file: str) -> list[Mapping[str, Any]]:
    entries = content.get(name)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SourceError(f"{file}: expected a list {name!r}, found the keys {sorted(content)}; is it another file?")
    return entries


def _id(entry: Mapping[str, Any], name: str, file: str) -> int | float | str:
    """The identifier of an entry, which look-ups and the names of its result files use."""
    value = _field(entry, name, file)
    if not isinstance(value, int | float | str) or (isinstance(value, str) and Path(value).name != value):
        raise SourceError(
            f"{file}: expected a number or a name as {name!r}, found {shortened(value)}; is it another file?"
        )
    return value


def _field(entry: Mapping[str, Any], name: str, file: str) -> Any:
    if name not in entry:
        raise SourceError(
            f"{file}: expected entries with {name!r}, found one with {sorted(entry)}; is it another file?"
        )
    return entry[name]
