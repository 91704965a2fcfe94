"""Bytes and loss first, then the learner's reader against the library's, then decode over pages of the new layout."""

from typing import Any

import torch

import openmla
from openmla.core.layout import KVLayout
from openmla.learn.course import Hint
from openmla.reference import attention, quant
from openmla.testing import budget

_BYTES, _LOSS = 420, 0.12


def _declared(work: Any) -> KVLayout:
    layout = getattr(work, "LAYOUT", None)
    if not isinstance(layout, KVLayout):
        raise Hint("LAYOUT must be an openmla.core.layout.KVLayout")
    if (layout.d_qk, layout.d_v) != (576, 512):
        raise Hint(f"a token has 576 columns, 512 of them values; LAYOUT has {layout.d_qk} and {layout.d_v}")
    if layout.bytes_per_token > _BYTES:
        raise Hint(f"{layout.bytes_per_token} bytes per token, at most {_BYTES}: what takes a nibble per column?")
    if layout.d_rope_stored != 64:
        raise Hint(
            f"{layout.d_rope_stored} columns are stored as bf16; the 64 of RoPE must be, d_quant says how many are not"
        )
    if layout.scales_behind_page:
        raise Hint("scales behind the page make a row of the cache tensor no token; keep them behind each token here")
    return layout


def check(work: Any) -> str:
    """Declaration, loss, reader, decode."""
    layout = _declared(work)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(320, 576, generator=generator) * torch.rand(320, 1, generator=generator).exp()
    rows[7] = 0
    cache, slots = layout.empty_cache(5, 64), torch.randperm(320, generator=generator)
    quant.write_rows(cache, layout, slots, rows)
    back = quant.read_rows(cache, layout, slots).float()
    loss = float((back - rows)[:, :512].norm() / rows[:, :512].norm())
    if loss > _LOSS:
        raise Hint(
            f"the latent loses {loss:.1%}, at most {_LOSS:.0%}: how many columns share a scale, and how fine is the scale?"
        )
    given = work.unpack(cache.flatten(0, 2).contiguous())
    if not isinstance(given, torch.Tensor) or tuple(given.shape) != (320, 576) or given.dtype != torch.float32:
        raise Hint("unpack must return fp32 [n, 576]")
    wanted = quant.read_rows(cache, layout, torch.arange(320)).float()
    wrong = (given.bfloat16().float() != wanted).any(0).nonzero().flatten().tolist()
    if wrong:
        where = "RoPE" if wrong[0] >= 512 else "the latent"
        half = "; is the even column the low nibble?" if wrong[0] < 512 else "; the scales lie between data and RoPE"
        raise Hint(
            f"unpack: {len(wrong)} columns differ from the library's reader, the first is {wrong[0]} ({where}){half}"
        )
    q = torch.randn(2, 1, 16, 576, generator=generator).bfloat16()
    table, lengths = torch.tensor([[3, 0], [4, 1]], dtype=torch.int32), torch.tensor([100, 65], dtype=torch.int32)
    options = {"softmax_scale": 192**-0.5, "kv_layout": layout}
    out, lse = openmla.decode(q, cache, table, lengths, backend="torch", **options)
    dense = wanted.bfloat16().view(5, 64, 1, 576)
    golden = attention.decode(
        q, dense, table, lengths, softmax_scale=192**-0.5, d_v=512, precision="fp64", with_bounds=True
    )
    report = budget.check(out, lse, golden, dtype=torch.bfloat16)
    if not report.passed:
        raise Hint(f"decode over it is outside the tolerance:\n{report}")
    share = layout.bytes_per_token / 656
    return f"{layout.bytes_per_token} bytes per token ({share:.0%} of fp8_656), the latent loses {loss:.1%}; decode runs on it"
