"""Two made-up models: samples for the learner, other tokens of the same layers for the judgement."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from openmla.core.layout import KVLayout, kv_layout
from openmla.learn.course import Hint
from openmla.reference import quant

_THREE = (kv_layout("bf16_576"), kv_layout("fp8_656"), KVLayout("fp4_416", 576, 512, "e2m1", 512, "e4m3", 16))


@dataclass(frozen=True)
class Sample:
    """What is known of a layer."""

    q: torch.Tensor  # [n, h_q, 576]
    rows: torch.Tensor  # [s, 576]
    softmax_scale: float


def _layer(seed: int, outliers: int, size: float, sharpness: float, draw: int) -> Sample:
    """Tokens of one layer: `outliers` columns are `size` times as large as the others; the same columns in every draw."""
    shape = torch.Generator().manual_seed(seed)
    columns = torch.ones(576)
    columns[torch.randperm(512, generator=shape)[:outliers]] = size
    generator = torch.Generator().manual_seed(1000 * seed + draw)
    rows = torch.randn(128, 576, generator=generator) * columns
    q = sharpness * torch.randn(8, 4, 576, generator=generator) / columns
    return Sample(q, rows, 576**-0.5)


# (seed, outlier columns, their size, sharpness of the softmax) of each layer
_MODELS: dict[str, list[tuple[int, int, float, float]]] = {
    "8 layers": [(i, (0, 3, 20, 0, 8, 1, 40, 0)[i], (1, 50, 10, 1, 50, 200, 4, 1)[i], (1, 1, 3, 8, 1, 2, 1, 4)[i]) for i in range(8)],
    "12 layers": [(50 + i, 5 * i % 17, (1, 30, 100, 8)[i % 4], (0.5, 2, 6)[i % 3]) for i in range(12)],
}  # fmt: skip


@lru_cache(maxsize=4)
def _model(name: str, draw: int) -> tuple[Sample, ...]:
    return tuple(_layer(*each, draw) for each in _MODELS[name])


def _attend(sample: Sample, rows: torch.Tensor) -> torch.Tensor:
    scores = sample.softmax_scale * sample.q.double() @ rows.double().T
    return scores.softmax(-1) @ rows[:, :512].double()


def _error(sample: Sample, layout: KVLayout) -> float:
    cache = layout.empty_cache(2, 64)
    slots = torch.arange(128)
    quant.write_rows(cache, layout, slots, sample.rows)
    wanted, found = _attend(sample, sample.rows), _attend(sample, quant.read_rows(cache, layout, slots).float())
    return float((found - wanted).square().sum() / wanted.square().sum())


@lru_cache(maxsize=4096)
def _judged(name: str, layer: int, layout: KVLayout) -> float:
    return _error(_model(name, 1)[layer], layout)


def _budgets(name: str) -> list[int]:
    layers = len(_MODELS[name])
    return [layers * 416, layers * 500, layers * 656 + 100, layers * 800]


def _best(name: str, budget: int) -> float:
    """The least error of any choice among the three: a table over bytes."""
    least = {0: 0.0}
    for layer in range(len(_MODELS[name])):
        grown: dict[int, float] = {}
        for taken, error in least.items():
            for layout in _THREE:
                total = taken + layout.bytes_per_token
                if total <= budget:
                    grown[total] = min(grown.get(total, math.inf), error + _judged(name, layer, layout))
        least = grown
    return min(least.values())


@lru_cache(maxsize=64)
def _chosen(work: Any, name: str, budget: int) -> tuple[KVLayout, ...]:
    samples = _model(name, 0)
    given = work.choose(list(samples), budget)
    if len(given) != len(samples):
        raise Hint(f"{name}, {budget} bytes: one layout per layer, got {len(given)} for {len(samples)}")
    found = tuple(kv_layout(each) for each in given)
    for layout in found:
        if (layout.d_qk, layout.d_v) != (576, 512):
            raise Hint(
                f"{layout} has d_qk={layout.d_qk} and d_v={layout.d_v}: a token has 576 columns, 512 of them values"
            )
    total = sum(layout.bytes_per_token for layout in found)
    if total > budget:
        raise Hint(f"{name}: {total} bytes per token, the budget is {budget}")
    return found


def _reached(work: Any, name: str, budget: int) -> float:
    return sum(_judged(name, layer, layout) for layer, layout in enumerate(_chosen(work, name, budget)))


def _legal(work: Any) -> str:
    for name in _MODELS:
        for budget in _budgets(name):
            _chosen(work, name, budget)
    return "8 budgets, none exceeded"


def _uniform(work: Any) -> str:
    for name, layers in _MODELS.items():
        for budget in _budgets(name):
            fitting = [each for each in _THREE if each.bytes_per_token * len(layers) <= budget]
            errors = {each.name: sum(_judged(name, i, each) for i in range(len(layers))) for each in fitting}
            best = min(errors, key=lambda each: errors[each])
            found = _reached(work, name, budget)
            if found > 1.01 * errors[best]:
                raise Hint(f"{name}, {budget} bytes: {found:.2e}, but {best} everywhere gives {errors[best]:.2e}")
    return "in all 8 budgets"


def _near(work: Any, name: str) -> str:
    ratios = {budget: _reached(work, name, budget) / _best(name, budget) for budget in _budgets(name)}
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    if mean > 1.3:
        worst = max(ratios, key=lambda each: ratios[each])
        raise Hint(
            f"{name}: {mean:.2f} times the best in the mean, {ratios[worst]:.1f} times at {worst} bytes: "
            "which layer gains most per byte?"
        )
    return f"{mean:.2f} times the best choice"


CRITERIA = {
    "legal": _legal,
    "better than one for all": _uniform,
    "near the best": lambda work: _near(work, "8 layers"),
    "another model": lambda work: _near(work, "12 layers"),
}
