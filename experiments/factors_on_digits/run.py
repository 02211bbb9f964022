"""Ten attacks merged to a mean, with and without one stored direction of their covariance, against the members.

    python experiments/factors_on_digits/run.py --work factors-on-digits

Everything goes through the public functions that the commands call. Finished parts are kept in --work and not done
again. Writes results.json and plot.png beside this file.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl

from demo import digits
from evaluation import EvaluateConfig, evaluate
from merge_service import MergeConfig, merge
from storage_schemas import open_artifact
from trainer import TrainConfig, train
from trainer.config import Arm

mpl.use("Agg")  # no display needed

from matplotlib import pyplot as plt

HERE = Path(__file__).parent
# Name in the results → (arm of `datamerge train`, stored arrays it reads).
ARMS: dict[str, tuple[Arm, tuple[str, ...]]] = {
    "AT-10-Mean": ("mean-only", ("sum",)),
    "AT-10-Avg": ("avg", ("sum", "scatter")),
    "AT-10-Factors": ("factors", ("sum", "factors")),
    "AT-10-Random": ("random-member", ("members",)),
    "AT-10-Ind": ("ind", ("members",)),
}


@click.command()
@click.option("--work", default="factors-on-digits", show_default=True, help="Folder for data, artifact and runs.")
@click.option("--seeds", default=3, show_default=True)
def main(work: str, seeds: int) -> None:
    """Run what is missing, then write the results."""
    root = Path(work)
    settings = tomllib.loads((HERE / "settings.toml").read_text())
    weights, head = root / "encoder.safetensors", root / "head.safetensors"
    if not head.exists():
        images, _ = digits.write_digits(root / "digits")
        digits.pretrain(images, weights, head, seed=0)
    spec, artifact = f"{digits.SPEC}@{weights}", str(root / "artifact")
    merge(MergeConfig(source=str(root / "digits" / "train"), artifact=artifact, encoder=spec, **settings["merge"]))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("w/o AT", *ARMS)}
    for seed in range(seeds):
        runs = {name: str(root / f"{name}-{seed}") for name in ARMS}
        for name, (arm, _) in ARMS.items():
            train(TrainConfig(artifact=artifact, run=runs[name], arm=arm, seed=seed, **settings["train"]))
        measured = root / f"evaluation-{seed}.json"
        if not measured.exists():
            found = evaluate(
                EvaluateConfig(
                    runs=[spec, *runs.values()],
                    data=str(root / "digits" / "test"),
                    head=str(head),
                    seed=seed,
                    **settings["evaluate"],
                )
            )
            measured.write_text(json.dumps([row.model_dump(mode="json") for row in found]))
        for name, row in zip(rows, json.loads(measured.read_text()), strict=True):
            rows[name].append(row)
    _write({name: _summary(found, artifact, name) for name, found in rows.items()}, seeds)


def _summary(found: list[dict[str, Any]], artifact: str, name: str) -> dict[str, Any]:
    robust = [round(row["accuracy_robust"], 4) for row in found]
    return {
        "robust": round(statistics.fmean(robust), 4),
        "robust_by_seed": robust,
        "standard_error_over_images": round(found[0]["accuracy_robust_se"], 4),
        "clean": round(statistics.fmean(row["accuracy_clean"] for row in found), 4),
        "embedding_loss_adversarial": round(statistics.fmean(row["embedding_loss_adversarial"] for row in found), 1),
        "train_seconds": [row["train_seconds"] for row in found],
        "stored_bytes": _stored_bytes(artifact, ARMS[name][1]) if name in ARMS else None,
    }


def _stored_bytes(artifact: str, arrays: tuple[str, ...]) -> int:
    """Compressed bytes of these arrays."""
    opened = open_artifact(artifact)
    files = (file for position in range(len(opened.shard_sizes)) for file in opened.commit(position).files)
    return sum(file.bytes for file in files if file.path.split("/")[1] in arrays)


def _write(results: dict[str, Any], seeds: int) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    facts = {
        "command": f"python experiments/factors_on_digits/run.py --seeds {seeds}",
        "commit": commit.stdout.strip(),
        "hardware": f"{platform.machine()} CPU",
        "results": results,
    }
    (HERE / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, row in results.items():
        if row["stored_bytes"]:
            error = row["standard_error_over_images"]
            axis.errorbar(row["stored_bytes"] / 1e6, 100 * row["robust"], 100 * error, fmt="o", capsize=3, label=name)
    axis.axhline(100 * results["w/o AT"]["robust"], color="grey", label="w/o AT")
    axis.set(xlabel="stored MB that the arm reads", ylabel="robust test accuracy, %")
    axis.legend()
    figure.savefig(HERE / "plot.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
