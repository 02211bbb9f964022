"""Losses and accuracies against values worked out by hand."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamerge.evaluation import EvaluateConfig, Results, evaluate
from datamerge.evaluation.batches import read_batches
from datamerge.evaluation.uncertainty import BOOTSTRAP_SEED, RESAMPLES, bootstrap_interval
from datamerge.sources import Sample, Source
from datamerge.sources.columns import Samples
from storage_schemas import ConfigError, DatamergeError
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.html_pages import Page
from tests.support.refusals import refused

MakeEncoder = Callable[[list[list[float]]], str]
MakeRun = Callable[..., str]
MakeHead = Callable[..., str]

IDENTITY = [[1.0, 0.0], [0.0, 1.0]]
EPSILON = 2 / 255


def measure(*runs: str, data: Path, **settings: object) -> Results:
    return evaluate(EvaluateConfig.model_validate({"runs": list(runs), "data": str(data), **settings}))


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    """Seven random images away from black and white, so that the ball is never cut off."""
    folder = tmp_path / "textures"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for index in range(7):
        Image.fromarray(rng.integers(20, 230, (2, 2), np.uint8)).save(folder / f"{index}.png")
    return folder


def read_pixels(folder: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.stack([np.asarray(Image.open(path)).reshape(-1) / 255 for path in sorted(folder.rglob("*.png"))])


@pytest.mark.parametrize(("epsilon", "robust"), [("1/255", 1.0), ("2/255", 0.5), ("7/255", 0.5), ("8/255", 0.0)])
def test_robust_accuracy_of_a_linear_classifier_is_the_worst_case(
    two_class: str, photos: Path, make_head: MakeHead, epsilon: str, robust: float
) -> None:
    # The worst case moves every pixel by ε towards the boundary, which is 1.5 or 7.5 levels away.
    (result,) = measure(two_class, data=photos, head=make_head(IDENTITY), epsilon=epsilon)
    clean, found = result.score("accuracy clean"), result.score("accuracy robust")
    assert (result.images, clean.count, found.count) == (4, 4, 4)
    assert (clean.value, clean.error) == (100, 0)
    assert found.value == 100 * robust
    assert found.error == pytest.approx(100 * (robust * (1 - robust) / 4) ** 0.5)


def test_misclassified_clean_images_are_not_robust(two_class: str, photos: Path, make_head: MakeHead) -> None:
    shutil.move(photos / "dark" / "far.png", photos / "light" / "wrong.png")
    (result,) = measure(two_class, data=photos, head=make_head(IDENTITY), epsilon="8/255")
    assert (result.score("accuracy clean").value, result.score("accuracy robust").value) == (75, 0)


def test_outputs_of_the_encoder_may_be_logits(two_class: str, photos: Path) -> None:
    (result,) = measure(two_class, data=photos, head="outputs")
    assert (result.score("accuracy clean").value, result.score("accuracy robust").value) == (100, 50)


def test_classes_are_matched_by_name_where_the_head_has_names(
    two_class: str, photos: Path, make_head: MakeHead, tmp_path: Path
) -> None:
    swapped = [[0.0, 1.0], [0.0, 0.5], [1.0, 0.0]]
    (named,) = measure(two_class, data=photos, head=make_head(swapped, ["light", "moon", "dark"]))
    assert named.score("accuracy clean").value == 100
    names = tmp_path / "names.txt"
    names.write_text("light\nmoon\ndark\n")
    (listed,) = measure(two_class, data=photos, head=make_head(swapped), class_names=str(names))
    assert listed.score("accuracy clean").value == 100


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfLight\r\nmoon\r\nDARK \r\n",
        b"0: light\n1: moon\n2: dark\n",
        b'{"2": ["n3", "dark"], "0": ["n1", "light"], "1": ["n2", "moon"]}',
    ],
)
def test_class_names_are_read_from_several_formats(
    two_class: str, photos: Path, make_head: MakeHead, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    swapped = [[0.0, 1.0], [0.0, 0.5], [1.0, 0.0]]
    (found,) = measure(two_class, data=photos, head=make_head(swapped), class_names=str(tmp_path / "names.txt"))
    assert found.score("accuracy clean").value == 100


def test_classes_that_the_head_does_not_have_are_refused(two_class: str, photos: Path, make_head: MakeHead) -> None:
    with refused(ConfigError, "head", photos, "1: 'dark'", "'moon'"):
        measure(two_class, data=photos, head=make_head([[1.0, 0.0], [0.0, 1.0]], ["moon", "light"]))


def test_original_is_at_distance_zero_and_its_attack_reaches_the_maximum(
    make_encoder: MakeEncoder, textures: Path
) -> None:
    weight = [0.5, -1.0, 2.0, 0.25]
    (result,) = measure(make_encoder([weight]), data=textures)
    assert result.arm == "w/o AT"
    assert result.score("loss clean").value == 0.0
    # f(x + δ) − f(x) = 2 w·δ, at most 2ε‖w‖₁, for every image.
    assert result.score("loss adv.").value == pytest.approx((2 * EPSILON * 3.75) ** 2, rel=1e-4)
    assert result.score("loss adv.").error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("grid", [False, True])
def test_adversarial_loss_is_positive_and_within_the_closed_form_bound(
    make_encoder: MakeEncoder, textures: Path, grid: bool
) -> None:
    weight = np.random.default_rng(1).normal(size=(3, 4))
    (result,) = measure(make_encoder(weight.tolist()), data=textures, grid=grid)
    bound = float(((2 * EPSILON * np.abs(weight).sum(axis=1)) ** 2).sum())
    assert 0 < result.score("loss adv.").value <= bound * (1 + 1e-5)


def test_clean_loss_of_a_run_is_the_distance_to_its_original(
    make_encoder: MakeEncoder, make_run: MakeRun, textures: Path
) -> None:
    before, after = np.eye(2, 4), np.eye(2, 4) * 1.5
    original, tuned = make_encoder(before.tolist()), make_encoder(after.tolist())
    baseline, result = measure(original, make_run(tuned, original), data=textures)
    distances = ((2 * read_pixels(textures) - 1) @ (after - before).T) ** 2
    expected = distances.sum(axis=1)
    assert result.score("loss clean").value == pytest.approx(expected.mean(), rel=1e-5)
    assert result.score("loss clean").error == pytest.approx(expected.std(ddof=1) / 7**0.5, rel=1e-5)
    assert result.score("loss adv.").value > result.score("loss clean").value
    assert baseline.score("loss clean").value == 0.0
    assert result.training is not None
    assert (result.arm, result.training.seconds, result.training.bytes) == ("avg", 12.5, 3_000_000)
    assert baseline.training is None
    (against_itself,) = measure(f"{result.run}", data=textures, original=tuned)
    assert against_itself.score("loss clean").value == 0.0


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_does_not_change_results(
    make_encoder: MakeEncoder, textures: Path, photos: Path, batch_size: int
) -> None:
    shutil.copytree(textures, photos / "dark", dirs_exist_ok=True)
    (photos / "dark" / "4x.png").write_bytes(b"no image")
    weight = np.random.default_rng(2).normal(size=(2, 4)).tolist()
    settings = {"data": photos, "head": "outputs", "steps": 4}
    (expected,) = measure(make_encoder(weight), batch_size=4, **settings)  # type: ignore[arg-type]
    (result,) = measure(make_encoder(weight), batch_size=batch_size, **settings)  # type: ignore[arg-type]
    assert (result.images, result.rejected) == (expected.images, expected.rejected) == (11, expected.rejected)
    assert result.score("loss adv.").value == pytest.approx(expected.score("loss adv.").value, rel=1e-5)
    assert result.scores[2:] == expected.scores[2:], "accuracies"


def test_random_starts_depend_on_seed_and_key_only(make_encoder: MakeEncoder, textures: Path) -> None:
    spec = make_encoder(np.random.default_rng(3).normal(size=(3, 4)).tolist())

    def loss(seed: int) -> float:
        # One small step leaves each image near its random start.
        (result,) = measure(spec, data=textures, seed=seed, steps=1, step_size="1/2550")
        return result.score("loss adv.").value

    first = loss(0)
    assert loss(0) == first
    assert loss(1) != first
    (alone,) = measure(spec, data=textures, limit_first=1, steps=1, step_size="1/2550")
    for path in sorted(textures.iterdir())[1:]:
        path.unlink()
    (only,) = measure(spec, data=textures, steps=1, step_size="1/2550")
    assert only.score("loss adv.").value == alone.score("loss adv.").value


def test_the_number_of_torch_threads_is_restored(two_class: str, photos: Path) -> None:
    before = torch.get_num_threads()
    measure(two_class, data=photos, steps=1, threads=2)
    assert torch.get_num_threads() == before


def test_values_that_are_not_finite_name_the_samples(overflowing: str, photos: Path) -> None:
    with refused(DatamergeError, None, "dark/far.png, dark/near.png"):
        measure(overflowing, data=photos)


def test_results_are_shown_as_a_table(two_class: str, photos: Path, make_run: MakeRun) -> None:
    results = measure(two_class, make_run(two_class, two_class), data=photos, head="outputs")
    assert re.search(r"avg +my-run .* 100\.0 ± 0\.0 +50\.0 ± 25\.0 .* 3\.0 MB", repr(results))
    ((header, _, row),) = Page(results._repr_html_()).tables
    assert row[header.index("accuracy robust")] == "50.0 ± 25.0"
    assert repr(results[0]).startswith("ArmResult(part='pgd', arm='w/o AT', scores={'loss clean': 0.0")
    assert "\n" not in repr(results[0])
    with pytest.raises(KeyError, match="loss adv"):
        results[0].score("top-1")


def test_an_output_folder_is_continued(two_class: str, photos: Path, tmp_path: Path) -> None:
    settings = {"data": photos, "head": "outputs", "steps": 2, "batch_size": 2, "output": str(tmp_path / "out")}
    whole = measure(two_class, **settings)  # type: ignore[arg-type]
    items = sorted((tmp_path / "out" / "pgd").rglob("items/*.json"))
    assert len(items) == 2
    kept = items[0].stat().st_mtime_ns
    items[1].unlink()
    again = measure(two_class, **settings)  # type: ignore[arg-type]
    assert again[0].scores == whole[0].scores
    assert items[0].stat().st_mtime_ns == kept
    with refused(ConfigError, "output", "(epsilon: '2/255' ", ", '4/255' "):
        measure(two_class, epsilon="4/255", **settings)  # type: ignore[arg-type]
    with refused(ConfigError, "output", "(head: "):
        measure(two_class, **{**settings, "head": None})  # type: ignore[arg-type]


def test_nothing_is_stored_without_an_output_folder(
    two_class: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    measure(two_class, data=photos, steps=1)
    assert not list((tmp_path / "here").iterdir())


def test_the_bootstrap_in_blocks_equals_that_at_once() -> None:
    values = np.random.default_rng(1).normal(size=70)
    generator = np.random.default_rng(np.random.SeedSequence([BOOTSTRAP_SEED, 70]))
    means = generator.multinomial(70, np.full(70, 1 / 70), size=RESAMPLES) @ values / 70
    assert bootstrap_interval(values.tolist()) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-12)


class _Flaky:
    """A reader whose connection is lost in the first `failures` reads."""

    is_concurrent, is_remote = True, True

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def read(self, sample: Sample) -> bytes:
        self.failures -= 1
        if self.failures >= 0:
            raise ConnectionError("reset")
        stream = io.BytesIO()
        Image.new("L", (2, 2)).save(stream, "PNG")
        return stream.getvalue()


@pytest.mark.parametrize(("failures", "lost"), [(2, False), (100, True)])
def test_a_lost_connection_is_not_a_bad_image(monkeypatch: pytest.MonkeyPatch, failures: int, lost: bool) -> None:
    """Otherwise the image would be left out for this encoder, but not for the next."""
    monkeypatch.setattr("storage_schemas.access.retries.FIRST_DELAY", 0.0)
    source = Source("s3://b", "image_folder", Samples.of([Sample("a", "a.png", None)]), [], "", _Flaky(failures))
    if lost:
        with refused(DatamergeError, None, "a.png: reset"):
            list(read_batches(source, [Preprocessing(shape=(1, 2, 2))], 1))
    else:
        ((batch,),) = read_batches(source, [Preprocessing(shape=(1, 2, 2))], 1)
        assert (len(batch.pixels), batch.rejected) == (1, [])
