"""Argument fuzz: calls that are wrong in one or two places. Each runs, or raises one typed error that names a culprit.

What may be wrong: rank, shape, dtype, device, stride, type, value. What must not happen: another exception (an IndexError
from somewhere deep), an error that names nothing, an input that was written to, a warning instead of an error, or state
that the failed call leaves behind. Run one again with --case-seed=N.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

import openmla
from openmla.core.errors import PlanMismatchError, ProblemError, UnsupportedError
from openmla.ops import dispatch

CHUNKS, PER_CHUNK = 4, 376
REFUSALS = (ProblemError, UnsupportedError, PlanMismatchError)


def _decode(pick: random.Random) -> dict[str, Any]:
    batch, dtype = pick.choice((1, 2, 3)), pick.choice((torch.bfloat16, torch.float16, torch.float32))
    given: dict[str, Any] = {
        "q": torch.zeros(batch, pick.choice((1, 2)), 4, 24, dtype=dtype),
        "kv_cache": torch.zeros(5, 4, 1, 24, dtype=dtype),
        "block_table": torch.zeros(batch, 3, dtype=torch.int32),
        "cache_seqlens": torch.full((batch,), 5, dtype=torch.int32),
        "d_v": 16,
        "softmax_scale": pick.choice((None, 0.2)),
        "is_causal": pick.random() < 0.5,
        "window": pick.choice((None, 3)),
        "attn_sink": pick.choice((None, torch.zeros(4))),
        "policy": pick.choice(("balanced", "batch_invariant")),
        "lse_base": pick.choice(("e", "2")),
        "out": None,
        "workspace": None,
    }
    if pick.random() < 0.3:
        given["out"] = torch.zeros(*given["q"].shape[:-1], 16, dtype=dtype)
    if pick.random() < 0.3:
        given |= {"q": torch.zeros(batch + 1, 4, 24, dtype=dtype), "out": None, "max_seqlen_q": 2}
        given["cu_seqlens_q"] = torch.tensor([0, *range(2, batch + 2)], dtype=torch.int32)
    return given


def _sparse_decode(pick: random.Random) -> dict[str, Any]:
    batch = pick.choice((1, 2, 3))
    given: dict[str, Any] = {
        "q": torch.zeros(batch, 2, 4, 24).bfloat16(),
        "kv_cache": torch.zeros(5, 4, 1, 24).bfloat16(),
        "indices": torch.zeros(batch, 2, 6, dtype=torch.int32),
        "d_v": 16,
        "topk_length": pick.choice((None, torch.full((batch,), 3, dtype=torch.int32))),
        "attn_sink": pick.choice((None, torch.zeros(4))),
        "softmax_scale": pick.choice((None, 0.2)),
        "lse_base": "e",
        "out": None,
    }
    if pick.random() < 0.4:
        given |= {"extra_kv_cache": torch.zeros(3, 2, 1, 24).bfloat16()}
        given["extra_indices"] = torch.zeros(batch, 2, 2, dtype=torch.int32)
    return given


def _sparse_prefill(pick: random.Random) -> dict[str, Any]:
    rows = pick.choice((1, 2, 5))
    return {
        "q": torch.zeros(rows, 4, 24).bfloat16(),
        "kv": torch.zeros(7, 1, 24).bfloat16(),
        "indices": torch.zeros(rows, 1, 6, dtype=torch.int32),
        "d_v": 16,
        "topk_length": pick.choice((None, torch.full((rows,), 3, dtype=torch.int32))),
        "attn_sink": pick.choice((None, torch.zeros(4))),
        "softmax_scale": pick.choice((None, 0.2)),
        "lse_base": "e",
        "out": None,
    }


def _prefill(pick: random.Random) -> dict[str, Any]:
    return {
        "q": torch.zeros(5, 4, 24).bfloat16(),
        "k": torch.zeros(7, 2, 24).bfloat16(),
        "v": torch.zeros(7, 2, 16).bfloat16(),
        "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 3, 7], dtype=torch.int32),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
        "softmax_scale": pick.choice((None, 0.2)),
        "is_causal": pick.random() < 0.5,
        "lse_base": "e",
    }


MAKERS = {"decode": _decode, "sparse_decode": _sparse_decode, "sparse_prefill": _sparse_prefill, "prefill": _prefill}
DTYPES = (torch.int64, torch.int8, torch.bool, torch.float64, torch.uint8, torch.complex64, torch.float32, torch.int32)
STRANGERS: tuple[Any, ...] = (None, "text", 3, 2.5, [1, 2], {"a": 1}, object())


class Named(torch.Tensor):
    """A subclass, as torch_dispatch users have them."""


def _spoil_tensor(pick: random.Random, tensor: torch.Tensor) -> Any:
    if tensor.dim() == 0 or tensor.layout != torch.strided:  # spoiled once already
        return pick.choice(STRANGERS)
    return pick.choice(
        (
            lambda: tensor.unsqueeze(pick.randrange(tensor.dim() + 1)),
            lambda: tensor[..., 0] if tensor.shape[-1] else tensor,
            lambda: torch.zeros([size + pick.choice((-1, 0, 1, 7)) for size in tensor.shape], dtype=tensor.dtype),
            lambda: tensor.new_zeros(
                [0 if i == pick.randrange(tensor.dim()) else s for i, s in enumerate(tensor.shape)]
            ),
            lambda: tensor.to(pick.choice(DTYPES)),
            lambda: tensor.to("meta"),
            lambda: torch.zeros([2 * size for size in tensor.shape], dtype=tensor.dtype)[(..., slice(None, None, 2))],
            lambda: tensor.mT if tensor.dim() > 1 else tensor.flip(0),
            lambda: tensor[:1].expand(tensor.shape),
            lambda: tensor.as_subclass(Named),
            lambda: tensor.to_sparse() if type(tensor) is torch.Tensor and tensor.device.type == "cpu" else tensor[:0],
            lambda: pick.choice(STRANGERS),
        )
    )()


def _spoil(pick: random.Random, given: dict[str, Any]) -> str:
    """Change one argument; returns its name."""
    name = pick.choice(sorted(given))
    value = given[name]
    if isinstance(value, torch.Tensor):
        given[name] = _spoil_tensor(pick, value)
    elif name in ("policy", "lse_base"):
        given[name] = pick.choice(("", "10", None, 3, "balancedd", b"e"))
    elif name in ("out", "workspace", "attn_sink", "topk_length"):
        given[name] = pick.choice((torch.zeros(3), torch.zeros(2, 1, 4, 16), given["q"], "text", 7))
    else:
        numbers = (-1, 0, 10**12, -(2**63), math.nan, math.inf, "8", None, True, 1.5, [2], torch.tensor(2))
        given[name] = pick.choice(numbers)
    return name


def _check_refusal(error: Exception, given: dict[str, Any], repro: str) -> None:
    text = str(error)
    assert len(text) > 20, f"{repro}\n{text}"
    names = [*given, "batch", "h_q", "h_kv"]
    assert not isinstance(error, ProblemError) or any(name in text for name in names), f"{repro}\n{text}"


@pytest.mark.parametrize("op", MAKERS)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_wrong_arguments_end_in_one_typed_error(op, chunk, seeds_of):
    for seed in seeds_of(chunk, PER_CHUNK // len(MAKERS)):
        pick = random.Random(f"{op} {seed}")
        given = MAKERS[op](pick)
        spoiled = [_spoil(pick, given) for _ in range(pick.choice((1, 1, 1, 2)))]
        repro = f"pytest tests/unit/test_fuzz_arguments.py -k {op} --case-seed={seed}: {spoiled}"
        before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
        remembered = dispatch.remembered()
        try:
            getattr(openmla, op)(**given)
        except REFUSALS as error:
            _check_refusal(error, given, repro)
            if "workspace" not in spoiled:  # the signature was right, the scratch was not
                assert dispatch.remembered() == remembered, f"{repro}\nleft a signature behind"
        except Exception as error:
            raise AssertionError(f"{repro}\n{type(error).__name__}: {error}") from error
        for name, value in before.items():
            if name not in ("out", "workspace") and value.layout == torch.strided:
                assert torch.equal(value, given[name]), f"{repro}\nwrote into {name}"


@pytest.mark.parametrize("op", MAKERS)
def test_unspoiled_arguments_run(op):
    for seed in range(20):
        getattr(openmla, op)(**MAKERS[op](random.Random(seed)))


def test_values_without_columns_are_refused():
    """Found by the fuzz: libtorch's microkernel ends the process for a product without columns."""
    given = _prefill(random.Random(0))
    with pytest.raises(ProblemError, match="q and v must have columns, got 24 and 0"):
        openmla.prefill(**{**given, "v": given["v"][..., :0]})
