"""`datamerge demo`: the commands any user would type, on real handwritten digits."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import click

from datamerge.demo import digits
from datamerge.demo.report import write_report
from datamerge.evaluation.tables import RESULTS, read_results
from datamerge.runtime.options import HELP_FLAGS
from storage_schemas import UserError

EPSILON, STEP_SIZE = "26/255", "5/255"
MEMBERS, BATCH, SEED = 5, 32, 0
PASSES = 2400  # of each run for one place of the batch; a backward pass is two
# Folder → steps, rate (of experiments/front) and flags of `datamerge train`.
ARMS = {
    "avg": (PASSES // 6, "3e-4", ["--arm", "avg"]),
    "fare": (PASSES // 23, "1e-2", ["--arm", "clean", "--refine", "10", "--refine-step-size", STEP_SIZE]),
    "two-steps": (PASSES // 7, "1e-2", ["--arm", "clean", "--refine", "2"]),
    "stored-one-step": (PASSES // 5, "1e-2", ["--arm", "random-member", "--refine", "1"]),
}


@click.command(context_settings=HELP_FLAGS)
@click.argument("folder", default="demo-output")
def demo(folder: str) -> None:
    """Merge, train, evaluate and report on 5,000 real MNIST digits; everything goes to FOLDER.

    Trains an encoder from scratch, attacks each of 4,000 digits five times, fine-tunes one encoder for each of four
    arms at the same number of forward passes, and measures all of them on 1,000 held-out digits. A few minutes on two
    CPU cores. The same command again does only what is missing.
    """
    started = time.monotonic()
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise UserError(f"{folder}: expected a new folder or an earlier demo's, found a file; choose another name")
    weights, head = root / "encoder.safetensors", root / "head.safetensors"
    if not head.exists():
        click.echo(f"writing 5,000 digits to {root / 'digits'} and training an encoder on 4,000 of them")
        train, _ = digits.write_digits(root / "digits")
        digits.pretrain(train, weights, head, SEED)
    spec = f"{digits.SPEC}@{weights}"
    artifact = str(root / "artifact")
    _run(
        ["merge", str(root / "digits" / "train"), artifact, "--encoder", spec, "--members", str(MEMBERS)]
        + ["--epsilon", EPSILON, "--step-size", STEP_SIZE, "--keep-members", "--keep-clean"]
        + ["--groups-per-shard", "250", "--batch-size", "320"]
    )
    _run(["inspect", artifact])
    for name, (steps, rate, flags) in ARMS.items():
        _run(
            ["train", artifact, str(root / name), "--encoder", spec, *flags, "--steps", str(steps)]
            + ["--batch-size", str(BATCH), "--lr", rate, "--warmup", str(steps // 10)]
        )
    results = root / "evaluation"
    _run(
        ["evaluate", spec, *(str(root / name) for name in ARMS), "--data", str(root / "digits" / "test")]
        + ["--head", str(head), "--epsilon", EPSILON, "-o", str(results)]
    )
    report = write_report(root, artifact, list(ARMS), read_results(results / RESULTS))
    click.echo(f"{report}: preview, training curves and results; {time.monotonic() - started:.0f} s in all")


def _run(arguments: list[str]) -> None:
    """Run a datamerge command in this process, showing it as the user would type it."""
    click.secho(f"\n$ datamerge {shlex.join(arguments)}", bold=True)
    # The command this one was called by, so that nothing here imports it.
    code = click.get_current_context().find_root().command.main(arguments, standalone_mode=False)
    if isinstance(code, int) and code:
        raise click.exceptions.Exit(code)
