"""Bytes per value of a real merge: photos, PGD against an encoder, in every format and encoding.

A value is one pixel value of a group with both moments, 8 bytes as plain float32; G groups of C×H×W pixels have
G·C·H·W.
"""

from __future__ import annotations

import tempfile
from typing import Any

import click

from merge_service import MergeConfig, merge
from storage_schemas import open_artifact
from storage_schemas.card.summary import summarise


@click.command()
@click.argument("photos")
@click.option("--encoder", default="timm:resnet18", show_default=True)
@click.option("--members", default=10, show_default=True)
@click.option("--epsilon", default="2/255", show_default=True)
@click.option("--steps", default=10, show_default=True)
@click.option("--limit-first", default=8, show_default=True, help="Photos to merge.")
def main(photos: str, encoder: str, members: int, epsilon: str, steps: int, limit_first: int) -> None:
    """Merge PHOTOS four times; print the bytes of all shards, targets included, over the number of values."""
    for format in ("zarr", "webdataset"):
        for encoding in ("uint8_moments", "float32"):
            attack = {"encoder": encoder, "members": members, "epsilon": epsilon, "steps": steps}
            found = bytes_a_value(photos, format=format, encoding=encoding, limit_first=limit_first, **attack)
            click.echo(f"{format:10} {encoding:13} {found:.2f} bytes a value")


def bytes_a_value(photos: str, **settings: Any) -> float:
    """Bytes per value of a merge of `photos` with these settings of `datamerge merge`."""
    with tempfile.TemporaryDirectory() as folder:
        merge(MergeConfig.model_validate({"source": photos, "artifact": f"{folder}/artifact", **settings}))
        # `inspect` counts the two moments of a pixel as two values.
        return 2 * float(summarise(open_artifact(f"{folder}/artifact"))["bytes_per_value"])


if __name__ == "__main__":
    main()
