"""Bytes that PyTorch's operators touch: what each reads and writes, views left out. A count, the same on every machine.

with count() as moved:
f(x)
moved.bytes, moved.largest
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts while it is active. A gather is charged for what it takes, not for all it could take from."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.largest, self.largest_bytes = "none", 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and charge it."""
        result = func(*args, **(kwargs or {}))
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        written = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        known = {each.untyped_storage().data_ptr() for each in read}
        is_view = bool(written) and not func._schema.is_mutable and all(
            each.untyped_storage().data_ptr() in known for each in written
        )  # fmt: skip
        if not is_view:
            taken = [min(each.nbytes, _touched(each)) for each in read]
            if func._overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.embedding):
                taken = [sum(each.nbytes for each in written)]
            size = sum(taken) + sum(each.nbytes for each in written)
            self.bytes += size
            if size > self.largest_bytes:
                self.largest, self.largest_bytes = str(func), size
        return result


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements: a dimension of stride 0 is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


@contextmanager
def count() -> Iterator[Traffic]:
    """Count the bytes of everything inside."""
    with Traffic() as found:
        yield found
