"""A submission with all points: requests join and leave between passes, over a forked prefix, as far as pages reach."""

from dataclasses import dataclass, field

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


@dataclass
class _Running:
    request: Request
    fed: list[int]  # what its next pass takes
    pages: int  # that it will hold at most, the prefix not counted
    found: list[int] = field(default_factory=list)


def _common(prompts: list[list[int]], page_size: int) -> list[int]:
    """What all prompts begin with, in whole pages, at least one token short of the shortest."""
    most = min(map(len, prompts)) - 1
    length = next((i for i in range(most) if len({prompt[i] for prompt in prompts}) > 1), most)
    return prompts[0][: length // page_size * page_size]


def serve(model: Decoder, cache: PagedKVCache, requests: list[Request]) -> dict[str, list[int]]:
    """The new tokens of each request, by name."""
    prefix = _common([request.prompt for request in requests], cache.page_size)
    cache.alloc("prefix")
    if prefix:
        model(torch.tensor(prefix), Pass.begin(cache, ["prefix"], [len(prefix)]))
    spare = cache.allocator.num_free
    waiting, running, answers = list(requests), list[_Running](), dict[str, list[int]]()
    while waiting or running:
        while waiting:
            request = waiting[0]
            written = len(request.prompt) - len(prefix) + request.new - 1  # the last new token is never fed
            pages = -(-written // cache.page_size)
            if pages > spare:
                break
            cache.fork("prefix", request.name)
            running.append(_Running(waiting.pop(0), request.prompt[len(prefix) :], pages))
            spare -= pages
        names, counts = [each.request.name for each in running], [len(each.fed) for each in running]
        logits = model(
            torch.tensor([token for each in running for token in each.fed]), Pass.begin(cache, names, counts)
        )
        last = torch.tensor(counts).cumsum(0) - 1
        for each, row in zip(running, logits[last], strict=True):
            each.fed = [int(row.argmax())]
            each.found += each.fed
        for each in [each for each in running if len(each.found) == each.request.new]:
            answers[each.request.name] = each.found
            cache.free(each.request.name)
            spare += each.pages
            running.remove(each)
    cache.free("prefix")
    return answers
