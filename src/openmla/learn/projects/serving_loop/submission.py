"""Make `serve` a server: batches, one prefix for all, patience. What stands here is right, slow and forgets nothing it could reuse."""

from dataclasses import dataclass

import torch

from openmla.kv.cache import PagedKVCache
from openmla.nn import Pass
from openmla.nn.decoder import Decoder


@dataclass(frozen=True)
class Request:
    """`new` greedy tokens are wanted behind `prompt`."""

    name: str
    prompt: list[int]
    new: int


def serve(model: Decoder, cache: PagedKVCache, requests: list[Request]) -> dict[str, list[int]]:
    """The new tokens of each request, by name."""
    answers: dict[str, list[int]] = {}
    for request in requests:
        cache.alloc(request.name)
        fed, found = list(request.prompt), []
        while len(found) < request.new:
            step = Pass.begin(cache, [request.name], [len(fed)])
            logits = model(torch.tensor(fed), step)  # [tokens of the pass, vocab]
            fed = [int(logits[-1].argmax())]
            found += fed
        cache.free(request.name)
        answers[request.name] = found
    return answers
