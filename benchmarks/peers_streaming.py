"""Write and read the same arrays with LitData and MosaicML streaming, in their default settings.

`benchmarks/streaming.py` runs this file with the interpreter of an environment that has the library, without
datamerge:

    python -m venv litdata && litdata/bin/pip install litdata==0.2.76
    python -m venv mosaicml && mosaicml/bin/pip install mosaicml-streaming==0.13 torchvision
    LITDATA_PYTHON=litdata/bin/python MOSAICML_PYTHON=mosaicml/bin/python python -m benchmarks.streaming

    peers_streaming.py write LIBRARY GROUPS.npz FOLDER COUNT
    peers_streaming.py read LIBRARY URL CACHE WORKERS
"""

import json
import os
import resource
import sys
import time
from typing import Any

BATCH, EPOCHS = 32, 2


def write(library: str, source: str, folder: str, count: int) -> None:
    """Write `count` samples, repeating the arrays of `source` under other keys."""
    import numpy as np

    with np.load(source) as stored:
        arrays = dict(stored)
    distinct = len(arrays["target"])
    samples = (
        {"key": f"photo-{n:06d}", **{name: array[n % distinct] for name, array in arrays.items()}}
        for n in range(count)
    )
    if library == "LitData":
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(folder, chunk_bytes="64MB")  # the default of `optimize`
        for number, sample in enumerate(samples):
            writer[number] = sample
        writer.done()
        writer.merge()
        return
    from streaming import MDSWriter

    shapes = {name: ",".join(map(str, array.shape[1:])) for name, array in arrays.items()}
    columns = {"key": "str", **{name: f"ndarray:{arrays[name].dtype.name}:{shape}" for name, shape in shapes.items()}}
    with MDSWriter(out=folder, columns=columns) as out:
        for sample in samples:
            out.write(sample)


def loader(library: str, url: str, cache: str, workers: int) -> Any:
    """A shuffled loader of batches of tensors."""
    if library == "LitData":
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming import downloader
        from litdata.streaming.resolver import Dir

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # the server has no https
        options = {
            "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
            "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
        }
        dataset = StreamingDataset(Dir(path=cache, url=url), shuffle=True, storage_options=options)
        return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)
    from streaming import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(remote=url, local=cache, shuffle=True, batch_size=BATCH)
    return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)


def read(library: str, url: str, cache: str, workers: int) -> None:
    """Print a line at the start, a line per batch, then CPU seconds and memory, like `streaming_reader.py`."""
    import torch

    torch.set_num_threads(1)
    __import__({"LitData": "litdata", "MosaicML streaming": "streaming"}[library])
    before, began = sum(os.times()[:4]), time.monotonic()
    batches = loader(library, url, cache, workers)
    _say(began)
    asked = began
    for _ in range(EPOCHS):
        for _ in batches:
            now = time.monotonic()
            _say([now, now - asked])
            asked = time.monotonic()
    del batches
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    _say({"cpu": sum(os.times()[:4]) - before, "peak": peak})


def _say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    what, library, *rest = sys.argv[1:]
    if what == "write":
        write(library, rest[0], rest[1], int(rest[2]))
    else:
        read(library, rest[0], rest[1], int(rest[2]))
