"""Official files of COCO and VQAv2: the images that a seed chooses, their captions and questions, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamerge.evaluation.llava.coco import read_captions, read_questions
from datamerge.evaluation.llava.images import read_image, round_inside
from datamerge.evaluation.sampling import draw
from storage_schemas import SourceError
from storage_schemas.schema.pixel_length import PixelLength
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.refusals import refused


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("val2014/COCO_val2014_000000000007.jpg", "000000000009.jpg", "COCO_val2014_000000000008.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def write(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def karpathy(**image: Any) -> dict[str, Any]:
    return {"images": [{"split": "test", "sentences": [{"raw": "x"}], **image}]}


def test_the_seed_chooses_the_images_of_fares_evaluation() -> None:
    # What FARE's evaluation does with numpy's global state.
    np.random.seed(42)
    expected = np.random.choice(5000, 100, replace=False).tolist()
    assert draw(range(5000), 100, 42) == expected


def test_official_captions_are_read(caption_file: str, coco: Path) -> None:
    content = json.loads(Path(caption_file).read_text())
    found = read_captions(caption_file, str(coco / "val2017"), "test", 10_000, 42)
    assert [image.key for image in found] == [str(image["id"]) for image in content["images"]]
    first = content["images"][0]
    captions = [entry["caption"] for entry in content["annotations"] if entry["image_id"] == first["id"]]
    assert found[0].captions == captions
    assert found[0].image == coco / "val2017" / first["file_name"]


def test_karpathys_split_is_read(images: Path, tmp_path: Path) -> None:
    def entry(split: str, number: int) -> dict[str, Any]:
        name = f"COCO_val2014_{number:012d}.jpg"
        sentences = [{"raw": f"caption {i} of {number}", "tokens": []} for i in range(5)]
        return {"split": split, "filepath": "val2014", "filename": name, "cocoid": number, "sentences": sentences}

    content = {"dataset": "coco", "images": [entry("train", 1), entry("test", 8), entry("test", 7), entry("val", 2)]}
    file = write(tmp_path / "dataset_coco.json", content)
    found = read_captions(file, str(images), "test", 100, 42)
    assert [image.key for image in found] == ["8", "7"]
    assert found[1].image == images / "val2014" / "COCO_val2014_000000000007.jpg"
    assert found[0].captions[4] == "caption 4 of 8"
    with refused(SourceError, None, file, "'dev'", "test, train, val"):
        read_captions(file, str(images), "dev", 100, 42)


def test_vqa_files_are_read(images: Path, tmp_path: Path) -> None:
    questions = [{"image_id": number, "question": f"{number}?", "question_id": 10 * number} for number in (8, 7, 9)]
    answers = [
        {"question_id": 10 * number, "answers": [{"answer": f"a{i}", "answer_id": i} for i in range(10)]}
        for number in (7, 8, 9)
    ]
    q = write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": questions})
    a = write(tmp_path / "a.json", {"annotations": answers})
    found = read_questions(q, a, str(images), 100, 42)
    assert [(item.key, item.question) for item in found] == [("80", "8?"), ("70", "7?"), ("90", "9?")]
    assert found[2].image == images / "000000000009.jpg"
    assert found[0].answers[:2] == ["a0", "a1"]
    with refused(SourceError, None, tmp_path / "a2.json", q, " 90"):
        read_questions(q, write(tmp_path / "a2.json", {"annotations": answers[:2]}), str(images), 100, 42)
    with refused(SourceError, None, q, "'annotations'", "['data_subtype', 'questions']"):
        read_questions(q, q, str(images), 100, 42)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]}, ["'caption'"]),
        ({"questions": []}, ["'images'", "['questions']"]),
        ([], ["JSON", "list"]),
        ({"images": [], "annotations": []}, ["c.json", "none"]),
        (
            {"images": [{"id": 1, "file_name": "gone.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]},
            ["c.json", " 1 ", "'gone.jpg'"],
        ),
        ({"images": [{"id": [1]}], "annotations": []}, ["'id'", "[1]"]),
        ({"images": [], "annotations": [{"image_id": {}, "caption": "x"}]}, ["'image_id'", "{}"]),
        (karpathy(filename="a.jpg", cocoid="../../a"), ["'cocoid'", "'../../a'"]),
        (karpathy(filename="c.json", filepath=".."), ["/images", "'../c.json'"]),
        (karpathy(filename="/etc/passwd"), ["/images", "'/etc/passwd'"]),
    ],
)
def test_wrong_caption_files_are_refused(images: Path, tmp_path: Path, content: Any, facts: list[str]) -> None:
    with refused(SourceError, None, *facts):
        read_captions(write(tmp_path / "c.json", content), str(images), "test", 10, 42)


@pytest.mark.parametrize(
    ("image", "question", "facts"),
    [
        ("x", 1, ["'image_id'", "'x'"]),
        (float("inf"), 1, ["'image_id'", " inf"]),
        ([1], 1, ["'image_id'", "[1]"]),
        (1, [1], ["'question_id'", "[1]"]),
    ],
)
def test_wrong_questions_are_refused(
    images: Path, tmp_path: Path, image: Any, question: Any, facts: list[str]
) -> None:
    answers = {"annotations": [{"question_id": question, "answers": [{"answer": "a"}]}]}
    file = write(
        tmp_path / "q.json",
        {"questions": [{"image_id": image, "question": "?", "question_id": question}], **answers},
    )
    with refused(SourceError, None, "q.json", *facts):
        read_questions(file, file, str(images), 10, 42)


@pytest.mark.parametrize(("text", "found"), [("{", "Expecting"), ("[" * 100_000, "nested")])
def test_a_file_that_is_not_json_is_refused(images: Path, tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with refused(SourceError, None, tmp_path / "c.json", found):
        read_captions(str(tmp_path / "c.json"), str(images), "test", 10, 42)


def test_images_are_padded_with_the_mean_colour(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (20, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mean = (0.5, 0.25, 0.9999)
    found = read_image(tmp_path / "a.png", Preprocessing(shape=(3, 40, 40), resize="squash", mean=mean), "pad")
    # A square of the longer side's length already has the size: no resampling.
    assert np.array_equal(found[:, 10:30], pixels.transpose(2, 0, 1))
    assert [set(found[c, :10].flatten()) | set(found[c, 30:].flatten()) for c in range(3)] == [{127}, {63}, {254}]
    cropped = read_image(tmp_path / "a.png", Preprocessing(shape=(3, 20, 20)), "crop")
    assert np.array_equal(cropped, pixels.transpose(2, 0, 1)[:, :, 10:30])


def test_the_padded_square_is_resized_with_the_towers_interpolation(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (31, 31, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name in ("bilinear", "bicubic"):
        preprocessing = Preprocessing(shape=(3, 12, 12), interpolation=name, mean=(0.5,), std=(0.5,))
        expected = np.asarray(Image.fromarray(pixels).resize((12, 12), Image.Resampling[name.upper()]))
        assert np.array_equal(read_image(tmp_path / "a.png", preprocessing, "pad"), expected.transpose(2, 0, 1))


def test_a_strip_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    Image.new("L", (1, 20_000)).save(tmp_path / "a.png")
    with refused(SourceError, None, tmp_path / "a.png", "1x20000"):
        read_image(tmp_path / "a.png", Preprocessing(shape=(3, 4, 4)), "pad")


@pytest.mark.parametrize(("epsilon", "radius"), [("2/255", 2), ("0.01", 2), ("5/510", 2)])
def test_rounding_stays_inside_the_ball(epsilon: str, radius: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 256, (3, 8, 8), generator=generator).float() / 255
    offset = (torch.rand(3, 8, 8, generator=generator) * 2 - 1) * float(PixelLength(epsilon))
    rounded = round_inside((clean + offset).clamp(0, 1), clean, PixelLength(epsilon))
    assert rounded.dtype == torch.uint8
    assert int((rounded.int() - (clean * 255).round().int()).abs().max()) <= radius
