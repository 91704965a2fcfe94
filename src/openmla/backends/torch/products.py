"""The two matrix products of a tile, in fp32 or in bf16 with fp32 results.

    scores   S[r, j] = <q_r, k_j>             q [R, d_qk], k [n, d_qk]
    weigh    o[r]    = sum_j w_rj v_j         w [R, n],    v [n, d_v]

`NarrowProducts` keeps bf16, for which torch.mm is of no use: it rounds its result to bf16, whose 8 bits are too few
for a logit. It calls the microkernel underneath, which libtorch exports: bf16 operands, fp32 accumulation and result.
`WideProducts` widens everything to fp32 and calls the microkernel's fp32 form. `PortableProducts` does the same with
torch.mm, everywhere. On one Zen 5 core, GFLOP/s of scores with 16 and 128 rows:

    NarrowProducts 420, 500      WideProducts 140, 160      PortableProducts 61, 106
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from openmla.backends.torch.workers import Scratch
from openmla.core import env

# at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add_C, const BFloat16* A, const BFloat16* B, float* C, is_vnni):
# C [M, N] = A [M, K] @ B, where B of bf16 holds pairs of consecutive k side by side: [K / 2, N, 2]. The same with
# float for BFloat16 and is_vnni false takes B [K, N] as it is. The mangled names spell the argument types, so a
# changed signature is a missing symbol.
_BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPK"
_BF16, _FP32 = "N3c108BFloat16ES5_Pfb", "fS3_Pfb"
# On a CPU it was not made for, the microkernel throws, which would end the process: only builds that were tried.
_TRIED_TORCH = ("2.13.",)
_ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")

_PAIR_KEYS = 1024  # keys interleaved at a time: 87 ns per key and 16 rows, against 94 for 512 and 103 for 256
# The microkernel is compiled once per shape and thread: 64 keeps that to 8 lengths per 512 keys, 16 rows are one
# vector register of fp32.
_KEY_MULTIPLE, _ROW_MULTIPLE = 64, 16
_LEAST_KEYS = 512
_FEW_ROWS = 32
_SCORES = 65_536  # elements of a tile's scores that longer tiles may not exceed: 256 KB, a quarter of an L2

Microkernel = Callable[..., None]


class PortableProducts:
    """Both products in fp32, by torch.mm."""

    def __init__(self, q: torch.Tensor) -> None:
        self.q = q.float()
        self.rows = q.shape[0]

    def scores(self, k: torch.Tensor, factor: float, scratch: Scratch) -> torch.Tensor:
        """Factor * q @ k^T, fp32 [R, n], in scratch."""
        out = scratch.take("scores", torch.float32, self.rows, k.shape[0])
        return torch.mm(self.q, k.t(), out=out).mul_(factor)

    def weigh(self, weights: torch.Tensor, v: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """Weights @ v, fp32 [R, d_v], in scratch."""
        out = scratch.take("weighted", torch.float32, self.rows, v.shape[1])
        return torch.mm(weights, v, out=out)


class _MicrokernelProducts:
    """What the two forms of the microkernel share: keys are the left operand, read where they lie."""

    def __init__(self, q: torch.Tensor, brgemm: Microkernel, pairs: int) -> None:
        real, self.d_qk = q.shape
        self.brgemm = brgemm
        self.rows = -(-real // _ROW_MULTIPLE) * _ROW_MULTIPLE
        self.is_paired = pairs == 2
        # The small right operand is the one that is rearranged: [d_qk / pairs, R], 4 bytes each.
        self.q_flipped = torch.zeros((self.d_qk // pairs, self.rows), dtype=torch.int32, device="cpu")
        self.q_flipped[:, :real] = q.contiguous().view(torch.int32).t()

    def scores(self, k: torch.Tensor, factor: float, scratch: Scratch) -> torch.Tensor:
        """Factor * q @ k^T, fp32 [R, n], in scratch; R is padded. Rows beyond those of q are 0."""
        keys, rows = k.shape[0], self.rows
        flipped = scratch.take("flipped", torch.float32, keys, rows)
        self.brgemm(
            keys, rows, self.d_qk, k.stride(0), rows, rows, False,
            k.data_ptr(), self.q_flipped.data_ptr(), flipped.data_ptr(), self.is_paired,
        )  # fmt: skip
        out = scratch.take("scores", torch.float32, rows, keys)
        if rows <= _FEW_ROWS:
            return torch.mul(flipped.t(), factor, out=out)
        # PyTorch has a blocked transposition for copies, which a multiplication does not get: at 128 rows that is
        # 51 ns per key against 94.
        return out.copy_(flipped.mul_(factor).t())


class WideProducts(_MicrokernelProducts):
    """Both products in fp32."""

    def __init__(self, q: torch.Tensor, brgemm: Microkernel) -> None:
        super().__init__(q.float(), brgemm, pairs=1)

    def weigh(self, weights: torch.Tensor, v: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """Weights @ v, fp32 [R, d_v], in scratch."""
        keys, d_v = v.shape
        out = scratch.take("weighted", torch.float32, self.rows, d_v)
        self.brgemm(
            self.rows, d_v, keys, keys, v.stride(0), d_v, False,
            weights.data_ptr(), v.data_ptr(), out.data_ptr(), False,
        )  # fmt: skip
        return out


class NarrowProducts(_MicrokernelProducts):
    """Both products with bf16 operands and fp32 results; weights are rounded to bf16."""

    def __init__(self, q: torch.Tensor, brgemm: Microkernel) -> None:
        super().__init__(q, brgemm, pairs=2)

    def weigh(self, weights: torch.Tensor, v: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """Weights @ v, fp32 [R, d_v], in scratch."""
        keys, d_v = v.shape
        rounded = scratch.take("rounded", torch.bfloat16, self.rows, keys).copy_(weights).data_ptr()
        out = scratch.take("weighted", torch.float32, self.rows, d_v)
        for first in range(0, keys, _PAIR_KEYS):
            block = v[first : first + _PAIR_KEYS]
            # [n / 2, d_v, 2]: widening bf16 to fp32 puts the odd key into the high half; OR adds the even one.
            pairs = scratch.take("pairs", torch.float32, block.shape[0] // 2, d_v).copy_(block[1::2])
            low = scratch.take("low", torch.int32, block.shape[0] // 2, d_v).copy_(block[0::2].view(torch.uint16))
            pairs.view(torch.int32).bitwise_or_(low)
            self.brgemm(
                self.rows, d_v, block.shape[0], keys, d_v, d_v, first > 0,
                rounded + 2 * first, pairs.data_ptr(), out.data_ptr(), True,
            )  # fmt: skip
        return out


Products = PortableProducts | WideProducts | NarrowProducts


class Arithmetic(NamedTuple):
    """How a problem's tiles are multiplied."""

    products: Callable[[torch.Tensor], Products]  # from query rows [R, d_qk]
    dtype: torch.dtype  # of tiles
    key_multiple: int  # tiles are padded to a multiple of this many keys
    most_keys: int  # of a tile

    def tile_keys(self, rows: int) -> int:
        """Keys per tile for that many query rows: long tiles for few rows, where calling operators costs most.

        On one Zen 5 core, 16 rows and bf16, a key takes 234 ns in tiles of 512 and 196 ns in tiles of 2048.
        """
        keys = _LEAST_KEYS
        while 2 * keys <= self.most_keys and 2 * keys * rows <= _SCORES:
            keys *= 2
        return keys


def arithmetic_for(dtype: torch.dtype, d_qk: int, d_v: int) -> Arithmetic:
    """The arithmetic for queries of that dtype: the microkernel where this machine has it."""
    # A product without columns is no work, and libtorch ends the process for it (std::bad_alloc).
    found = microkernels() if d_qk > 0 and d_v > 0 and d_qk % 2 == 0 and d_v % 16 == 0 else None
    # Turning oneDNN off turns the microkernel off too, at any time.
    if found is None or not torch.backends.mkldnn.enabled:
        return Arithmetic(PortableProducts, torch.float32, 1, 1024)
    if dtype == torch.bfloat16:
        return Arithmetic(partial(NarrowProducts, brgemm=found[0]), torch.bfloat16, _KEY_MULTIPLE, 2048)
    return Arithmetic(partial(WideProducts, brgemm=found[1]), torch.float32, _KEY_MULTIPLE, 1024)


@cache
def microkernels() -> tuple[Microkernel, Microkernel] | None:
    """The bf16 and the fp32 microkernel of this process's libtorch, or None."""
    supported = (
        sys.platform == "linux"
        and platform.machine() == "x86_64"
        and torch.__version__.startswith(_TRIED_TORCH)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.cpu._is_avx512_bf16_supported()
        # With AMX the microkernel leaves tile registers configured in the caller's thread; that is not handled here.
        and not torch.cpu._is_amx_tile_supported()
        and not env.any_is_set(*_ISA_LIMITS)
    )
    if not supported:
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__path__[0]) / "lib" / "libtorch_cpu.so"))
        bf16, fp32 = (getattr(library, _BRGEMM + types) for types in (_BF16, _FP32))
    except (OSError, AttributeError):
        return None
    size, flag, address = ctypes.c_int64, ctypes.c_bool, ctypes.c_void_p
    for each in (bf16, fp32):
        each.argtypes = [size] * 6 + [flag] + [address] * 3 + [flag]
        each.restype = None
    return (bf16, fp32) if _are_right(bf16, fp32) else None


def _are_right(bf16: Microkernel, fp32: Microkernel) -> bool:
    """Do they multiply as described? Small integers, exact in bf16 and fp32."""
    k = (torch.arange(64 * 32, device="cpu") % 7 - 3).view(64, 32).float()
    q = (torch.arange(16 * 32, device="cpu") % 5 - 2).view(16, 32).float()
    scratch = Scratch()
    with torch.no_grad():
        for products, like in ((NarrowProducts(q.bfloat16(), bf16), k.bfloat16()), (WideProducts(q, fp32), k)):
            if not torch.equal(products.scores(like, 1.0, scratch), q @ k.t()):
                return False
            if not torch.equal(products.weigh(k.t()[:16].contiguous(), like, scratch), k.t()[:16] @ k):
                return False
    return True
