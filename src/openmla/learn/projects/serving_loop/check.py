"""Twelve requests over one prefix: tokens against each request alone, then passes, computed tokens, and a small pool."""

from functools import lru_cache
from typing import Any

import torch

from openmla.core.errors import OutOfPagesError
from openmla.core.layout import plain_layout
from openmla.kv.cache import PagedKVCache
from openmla.learn.course import Hint
from openmla.nn import MLAConfig, Pass, Rope
from openmla.nn.decoder import Decoder, DecoderConfig

_PREFIX, _PAGE = 40, 8
_MOST_PASSES, _MOST_TOKENS, _FEW_PAGES = 40, 280, 16


class _Counted(Decoder):
    """Counts passes and the tokens that they compute."""

    passes = tokens = 0

    def forward(self, ids: torch.Tensor, step: Pass | None = None) -> torch.Tensor:
        """One pass."""
        self.passes += 1
        self.tokens += ids.numel()
        return super().forward(ids, step)


def _model() -> _Counted:
    torch.manual_seed(0)
    mla = MLAConfig(hidden=32, heads=2, d_latent=32, d_rope=8, d_nope=16, d_v=16, rope=Rope(8))
    model = _Counted(DecoderConfig(vocab=61, layers=2, d_mlp=48, mla=mla, max_length=128))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.3)
    return model.requires_grad_(False)


def _cache(pages: int) -> PagedKVCache:
    return PagedKVCache(plain_layout(torch.float32, 40, 32), pages, _PAGE, num_layers=2)


def _requests(work: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(61, (_PREFIX,), generator=generator).tolist()
    return [
        work.Request(f"r{i}", [*prefix, i, *torch.randint(61, (i % 5,), generator=generator).tolist()], 4 + 5 * i % 13)
        for i in range(12)
    ]


@lru_cache(maxsize=2)
def _wanted(work: Any) -> dict[str, list[int]]:
    model = _model()
    return {each.name: model.generate(each.prompt, each.new) for each in _requests(work)}


@lru_cache(maxsize=4)
def _served(work: Any, pages: int) -> _Counted:
    model, cache = _model(), _cache(pages)
    try:
        found = work.serve(model, cache, _requests(work))
    except OutOfPagesError as error:
        raise Hint(f"{error}: let a request in only when the pool can hold all that it will ever write") from None
    for name, tokens in _wanted(work).items():
        if name not in found:
            raise Hint(f"{name} got no answer")
        if list(found[name]) != tokens:
            wrong = next((i for i, (a, b) in enumerate(zip(found[name], tokens, strict=False)) if a != b), len(tokens))
            raise Hint(
                f"{name} differs from its tokens alone from new token {wrong} on: is the logit of its last token taken, "
                "and is every new token fed once?"
            )
    held = cache.allocator.requests
    if held or cache.check_integrity():
        raise Hint(f"afterwards {len(held)} request(s) still hold pages: {', '.join(map(str, held))}; free them")
    return model


def _right(work: Any) -> str:
    _served(work, 128)
    return "12 of 12 requests as if alone"


def _batched(work: Any) -> str:
    passes = _served(work, 128).passes
    if passes > _MOST_PASSES:
        raise Hint(f"{passes} passes, at most {_MOST_PASSES}: one pass may carry a new token of every running request")
    return f"{passes} passes (at most {_MOST_PASSES})"


def _shared(work: Any) -> str:
    tokens = _served(work, 128).tokens
    if tokens > _MOST_TOKENS:
        raise Hint(f"{tokens} tokens computed, at most {_MOST_TOKENS}: fork a request that holds the prefix")
    return f"{tokens} tokens computed (at most {_MOST_TOKENS})"


def _patient(work: Any) -> str:
    _served(work, _FEW_PAGES)
    return f"all answered with {_FEW_PAGES} pages"


CRITERIA = {"right": _right, "batched": _batched, "shared": _shared, "patient": _patient}
