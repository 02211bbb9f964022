"""Free memory, memory that gradients need, and advice instead of out-of-memory errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from storage_schemas import DatamergeError

# Controller in /proc/self/cgroup (empty: cgroups v2) → its mount point, the files of its limit and usage, and the
# line of memory.stat with the cache that the kernel can reclaim.
_CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that processes may still allocate, within the limits of the machine and of its containers.

    Args:
        root: root of the file system, for tests.

    Returns:
        Bytes; None if the system does not report them, which only Linux does.
    """
    try:
        machine = _numbers(root / "proc/meminfo")["MemAvailable:"] * 2**10
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, KeyError):
        return None
    left = [machine]
    for group in groups:
        _, controllers, path = group.split(":", 2)
        for name in controllers.split(","):
            if name in _CGROUPS:
                mounted, *files = _CGROUPS[name]
                inside = root / mounted / path.lstrip("/")
                # A container may see only its own group, at the mount point, while the path is the host's.
                for folder in (inside, *inside.parents[: len(Path(path).parts) - 1]):
                    left.append(_left_in(folder, *files, otherwise=machine))
    return max(0, min(left))


def _left_in(folder: Path, limit: str, used: str, cache: str, *, otherwise: int) -> int:
    """Bytes left to one control group; `otherwise` if it has no limit."""
    try:
        most, taken = ((folder / name).read_text().strip() for name in (limit, used))
        dropped = _numbers(folder / "memory.stat").get(cache, 0)
    except OSError:
        return otherwise
    return int(most) - int(taken) + dropped if most.isdigit() else otherwise


def _numbers(file: Path) -> dict[str, int]:
    """Read a file whose lines hold a name and a number."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}


def saved_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, list[int]]:
    """Run a forward pass and measure the memory that autograd saves for the backward pass.

    Args:
        model: model whose parameters and buffers do not count.
        forward: runs the forward pass.

    Returns:
        The outputs, and the bytes of each saved storage.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # Keep the storage alive, so that its address is not reused.
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    return outputs, [storage.nbytes() for storage in storages.values()]


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; the CPU's allocator and some CUDA libraries raise a plain RuntimeError for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )


@contextmanager
def out_of_memory_advice(advice: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a DatamergeError that names the settings to lower.

    Args:
        advice: makes the message, which is prefixed with `batch_size`; called only after such an error.

    Raises:
        DatamergeError: the block ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DatamergeError(f"batch_size: {advice()}", about="batch_size") from error
