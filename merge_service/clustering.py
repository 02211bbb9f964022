"""k-means inside one class, on pixels or embeddings; the result does not depend on the number of threads.

Lloyd's algorithm from a k-means++ start (Arthur & Vassilvitskii 2007), by scikit-learn.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datamerge.encoders import Encoder
from datamerge.sources import Sample
from merge_service.reading import PixelReader
from merge_service.sample_groups import READ_AT_ONCE, embed
from storage_schemas import read_json

FILE = "clusters.json"


def cluster_class(
    samples: Sequence[Sample],
    clusters: int,
    seed: Sequence[int],
    reader: PixelReader,
    encoder: Encoder | None,
    batch_size: int,
) -> list[int]:
    """The cluster, 0 to `clusters` − 1, of every sample of a class.

    Samples that cannot be read go into cluster 0; the merge rejects them later, with the reason.

    Args:
        seed: entropy of the `SeedSequence` for the k-means++ start.
        reader: reads the pixels.
        encoder: its embeddings are clustered; pixels if None.
        batch_size: images in one forward pass.
    """
    features: list[Any] = []
    positions: list[int] = []
    for start in range(0, len(samples), READ_AT_ONCE):
        images = reader.read(samples[start : start + READ_AT_ONCE])
        usable = [(start + i, image) for i, image in enumerate(images) if not isinstance(image, str)]
        if not usable:
            continue
        pixels = np.stack([image for _, image in usable])
        positions += [position for position, _ in usable]
        # Kept as 8-bit until all are read: float32 takes four times the memory, and is needed twice below.
        features.append(pixels.reshape(len(pixels), -1) if encoder is None else embed(encoder, pixels, batch_size))
    assignment = [0] * len(samples)
    if not positions:
        return assignment
    found = _k_means(np.concatenate(features).astype(np.float32), min(clusters, len(positions)), seed)
    for position, cluster in zip(positions, found, strict=True):
        assignment[position] = cluster
    return assignment


def _k_means(features: np.ndarray[Any, np.dtype[np.float32]], clusters: int, seed: Sequence[int]) -> list[int]:
    # scikit-learn takes two seconds to import, and only clustering needs it.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    state = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
    # With several threads the order of addition varies, and the last digit decides ties.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Warns of fewer distinct points than clusters; empty clusters become no group.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(clusters, init="k-means++", n_init=1, random_state=state, algorithm="lloyd").fit(features)
    return [int(label) for label in model.labels_]


def to_bytes(identity: str, clusters: Mapping[int, Sequence[int]]) -> bytes:
    """The assignment as a file of the artifact, so that a resumed merge need not cluster again."""
    document = {"identity": identity, "clusters": {str(label): list(found) for label, found in clusters.items()}}
    return json.dumps(document, separators=(",", ":")).encode()


def from_bytes(data: bytes, identity: str) -> dict[int, list[int]] | None:
    """Read the assignment; None if the file is invalid or was made from other samples or settings."""
    try:
        document = read_json(data)
        if document["identity"] != identity:
            return None
        return {int(label): [int(c) for c in found] for label, found in document["clusters"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None
