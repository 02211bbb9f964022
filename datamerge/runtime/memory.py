"""How much memory is free, how much gradients need, and advice in place of an out-of-memory error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from storage_schemas import DatamergeError

# Controllers in /proc/self/cgroup (none: cgroups v2) → where they are mounted, the files of limit and use, and the
# line of memory.stat on what the kernel drops from its cache first.
_CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that processes may still take here: of the machine, and of the containers that this one is in.

    Args:
        root: of the file system, for its proc and sys.

    Returns:
        None where the system does not say, as others than Linux.
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
                # A container may see its own group alone, at the mount, while its path is the host's.
                for folder in (inside, *inside.parents[: len(Path(path).parts) - 1]):
                    left.append(_left_in(folder, *files, otherwise=machine))
    return max(0, min(left))


def _left_in(folder: Path, limit: str, used: str, cache: str, *, otherwise: int) -> int:
    """Bytes left to one control group; `otherwise` where it has no limit."""
    try:
        most, taken = ((folder / name).read_text().strip() for name in (limit, used))
        dropped = _numbers(folder / "memory.stat").get(cache, 0)
    except OSError:
        return otherwise
    return int(most) - int(taken) + dropped if most.isdigit() else otherwise


def _numbers(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}


def saved_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, list[int]]:
    """Run a forward pass and count what autograd keeps of it until its gradients are taken.

    Args:
        model: whose parameters and buffers do not count.
        forward: the pass.

    Returns:
        The outputs, and the bytes of each piece of memory that is kept.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Kept alive, so that no address is used twice.
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    return outputs, [storage.nbytes() for storage in storages.values()]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says so: the CPU's allocator and some CUDA libraries raise a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )


@contextmanager
def out_of_memory_advice(advice: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a DatamergeError that names the settings to lower.

    Args:
        advice: makes the message, in front of which stands `batch_size`; called only after such an error.

    Raises:
        DatamergeError: the block ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DatamergeError(f"batch_size: {advice()}", about="batch_size") from error
