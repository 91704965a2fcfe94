"""Several ranks on torch.distributed: context-parallel decode, and the two collectives of tensor-parallel heads."""

from openmla.distributed.context_parallel import ContextParallel, DeadRankError
from openmla.distributed.link import Link
from openmla.distributed.tensor_parallel import shared_input, sum_output

__all__ = ["ContextParallel", "DeadRankError", "Link", "shared_input", "sum_output"]
