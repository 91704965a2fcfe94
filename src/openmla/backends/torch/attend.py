"""Attention of a few query rows over many keys, tile by tile, on the threads of `workers`.

A tile of keys gives each query row, with s2_j = softmax_scale * log2(e) * <q, k_j>:

    m_t = max_j s2_j      l_t = sum_j 2^(s2_j - m_t)      o_t = sum_j 2^(s2_j - m_t) v_j

and tiles are merged into the running (m, l, o) in the order of their keys, always:

    m' = max(m, m_t)      l' = l 2^(m - m') + l_t 2^(m_t - m')      o' likewise      out = o / l, lse = ln 2 * m + ln l

Base 2 because exp2 runs four times as fast as exp here. Where the tiles of a row begin depends on that row's keys
alone, and a thread that is early waits for its turn to merge; so neither the number of threads nor the rest of the
batch changes a bit of the result.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from openmla.backends.torch import workers
from openmla.backends.torch.products import Products
from openmla.backends.torch.workers import Scratch
from openmla.mods import Attached, Site

# Query rows per task: their fp32 scores of one tile take 512 KB, their running output as much.
TASK_ROWS = 256
_LOG2_E, _LN_2 = math.log2(math.e), math.log(2)
# Stands for the maximum of nothing. -inf would give inf - inf; this is below every score that a row can have.
_NOTHING = -3.0e38


class Tile(NamedTuple):
    """Keys and values of one stretch of keys."""

    k: torch.Tensor  # [padded, d_qk] in the products' dtype; what lies behind `present` keys is finite or masked
    v: torch.Tensor  # [padded, d_v]; 0 in rows that are no keys
    absent: torch.Tensor | None  # bool [n]: these keys do not exist; their v is 0


class Sight(NamedTuple):
    """The keys [begin, end) that each query row sees."""

    begin: torch.Tensor  # int64 [R]
    end: torch.Tensor

    def hidden(self, first: int, last: int) -> torch.Tensor | None:
        """Which of the keys [first, last) each row does not see, bool [R, last - first]; None if all see all."""
        if int(self.begin.max()) <= first and int(self.end.min()) >= last:
            return None
        keys = torch.arange(first, last, device="cpu")
        return (keys < self.begin[:, None]) | (keys >= self.end[:, None])


class TaskMods(NamedTuple):
    """Mods of a decode, and where the rows of a task stand; int32."""

    attached: Attached
    b: torch.Tensor  # []
    h: torch.Tensor  # [R, 1]
    q_idx: torch.Tensor  # [R, 1]

    @property
    def has_activation(self) -> bool:
        """Weights are no exponentials, and are not divided by their sum."""
        return self.attached.form.activation is not None

    def site(self, first: int, last: int) -> Site:
        """Of scores [R, last - first]."""
        return Site(self.b, self.h, self.q_idx, torch.arange(first, last, dtype=torch.int32, device="cpu"))


@dataclass(frozen=True)
class Task:
    """Query rows that share their keys."""

    q: torch.Tensor  # [R, d_qk]
    spans: Sequence[tuple[int, int]]  # keys [first, last) of each tile, in order
    read: Callable[[int, int, Scratch], Tile]
    write: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]  # out [R, d_v], lse [R], top [R], all fp32
    sight: Sight | None = None  # None: every row sees every key of every span
    modded: TaskMods | None = None


class Pending(NamedTuple):
    """A task to be: making it is work for the thread that runs it, and its parts live no longer than it runs."""

    tiles: int  # about as many as the task will have
    make: Callable[[], Task]


def tile_spans(first: int, last: int, step: int) -> list[tuple[int, int]]:
    """[first, last) cut at multiples of `step`."""
    edges = [first, *range((first // step + 1) * step, last, step), last]
    return [(begin, end) for begin, end in pairwise(edges) if begin < end]


class _Rows:
    """Running (m, l, o) of one task's rows."""

    def __init__(self, rows: int, d_v: int) -> None:
        self.top = torch.full((rows, 1), _NOTHING, dtype=torch.float32, device="cpu")
        self.mass = torch.zeros((rows, 1), dtype=torch.float32, device="cpu")
        self.out = torch.zeros((rows, d_v), dtype=torch.float32, device="cpu")

    def merge(self, top: torch.Tensor, mass: torch.Tensor, out: torch.Tensor) -> None:
        higher = torch.maximum(self.top, top)
        keep, add = self.top.sub_(higher).exp2_(), top.sub_(higher).exp2_()
        self.mass.mul_(keep).addcmul_(mass, add)
        self.out.mul_(keep).addcmul_(out, add)
        self.top = higher

    def write(self, task: Task) -> None:
        rows = task.q.shape[0]
        mass, top = self.mass[:rows, 0], self.top[:rows, 0]
        if task.modded is not None and task.modded.has_activation:
            task.write(self.out[:rows], torch.log(mass), top)
            return
        out = self.out[:rows].div_(mass.masked_fill(mass == 0, 1)[:, None])
        top = (top * _LN_2).masked_fill_(mass == 0, -torch.inf)
        # Where the mass is 0, the top is -inf and so is the sum.
        task.write(out, top + torch.log(mass), top)


class _Merging:
    """A task whose tiles several threads compute; they merge in order."""

    def __init__(self, task: Task, d_v: int) -> None:
        self.task = task
        self.d_v = d_v
        self.rows: _Rows | None = None
        self.turn = 0
        self.changed = threading.Condition()


class Attention:
    """Runs tasks. `products` makes the matrix products of a task's query rows."""

    def __init__(self, products: Callable[[torch.Tensor], Products], d_v: int, softmax_scale: float) -> None:
        self._products = products
        self._d_v = d_v
        self._scale = softmax_scale
        self._failed = False

    def run(self, tasks: Sequence[Pending]) -> None:
        """Makes, computes and writes every task; returns when all are done."""
        if not tasks:
            return
        width = torch.get_num_threads()
        total = sum(task.tiles for task in tasks)
        work: deque[Pending | tuple[_Merging, int]] = deque()
        whole = []
        for pending in tasks:
            # Tasks of more than a quarter of a thread's share are cut up, so that no thread ends much later.
            if width > 1 and pending.tiles > 1 and pending.tiles * 4 * width > total:
                merging = _Merging(pending.make(), self._d_v)
                work.extend((merging, index) for index in range(len(merging.task.spans)))
                if not merging.task.spans:
                    whole.append(pending)
            else:
                whole.append(pending)
        whole.sort(key=lambda pending: -pending.tiles)
        work.extend(whole)
        workers.run(lambda: self._serve(work), min(width, len(work)))

    def _serve(self, work: deque[Pending | tuple[_Merging, int]]) -> None:
        """One thread: takes work until nothing is left."""
        scratch = workers.scratch()
        current: Task | None = None
        try:
            while work and not self._failed:
                try:
                    item = work.popleft()
                except IndexError:
                    return
                task = item.make() if isinstance(item, Pending) else item[0].task
                if task is not current:
                    current, products = task, self._products(task.q)
                if isinstance(item, Pending):
                    rows = _Rows(products.rows, self._d_v)
                    for first, last in task.spans:
                        rows.merge(*self._tile(task, products, first, last, scratch))
                    rows.write(task)
                else:
                    self._merge_in_turn(*item, products, scratch)
        except BaseException:
            self._failed = True
            raise

    def _merge_in_turn(self, merging: _Merging, index: int, products: Products, scratch: Scratch) -> None:
        task = merging.task
        part = self._tile(task, products, *task.spans[index], scratch)
        with merging.changed:
            # A thread that failed never takes its turn; the others look every 50 ms.
            while merging.turn != index and not self._failed:
                merging.changed.wait(0.05)
            if self._failed:
                return
            if merging.rows is None:
                merging.rows = _Rows(products.rows, self._d_v)
            merging.rows.merge(*part)
            merging.turn += 1
            merging.changed.notify_all()
            if merging.turn == len(task.spans):
                merging.rows.write(task)

    def _tile(
        self, task: Task, products: Products, first: int, last: int, scratch: Scratch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(m [R, 1], l [R, 1], o [R, d_v]) of keys [first, last); o is in scratch."""
        tile = task.read(first, last, scratch)
        # Mods want scores in natural units.
        factor = self._scale * _LOG2_E if task.modded is None else self._scale
        scores = products.scores(tile.k, factor, scratch)
        real, keys = task.q.shape[0], last - first
        if scores.shape[1] > keys:
            scores[:, keys:] = -torch.inf
        hidden = task.sight.hidden(first, last) if task.sight is not None else None
        modded = task.modded
        if modded is not None:
            hidden = _change(scores[:real, :keys], modded, modded.site(first, last), hidden)
        if hidden is not None:
            scores[:real, :keys].masked_fill_(hidden, -torch.inf)
        if tile.absent is not None:
            scores[:, :keys].masked_fill_(tile.absent, -torch.inf)
        if modded is not None and modded.has_activation:
            # With a top of 0 everywhere, merging is adding.
            top, weights = torch.zeros((scores.shape[0], 1), device="cpu"), scores
            weights[:real, :keys] = modded.attached.weights(scores[:real, :keys], modded.site(first, last))
            weights[real:] = 0
            weights[:, keys:] = 0
        else:
            top = scores.amax(1, keepdim=True).clamp_min_(_NOTHING)
            weights = scores.sub_(top).exp2_()
        mass = weights.sum(1, keepdim=True)
        if hidden is None:
            return top, mass, products.weigh(weights, tile.v, scratch)
        return top, mass, _weigh_seen(products, weights, tile.v, hidden, scratch)


def _change(
    scores: torch.Tensor, modded: TaskMods, site: Site, hidden: torch.Tensor | None
) -> torch.Tensor | None:  # fmt: skip
    """Scores in natural units, changed in place: to what an activation takes, else to base 2. Returns what is hidden."""
    changed = modded.attached.scores(scores, site)
    torch.mul(changed, 1.0 if modded.has_activation else _LOG2_E, out=scores)
    shown = modded.attached.visible(site)
    if shown is None:
        return hidden
    masked = shown.logical_not().expand(scores.shape)
    return masked if hidden is None else masked | hidden


def _weigh_seen(
    products: Products, weights: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scratch: Scratch
) -> torch.Tensor:
    """Weights @ v where rows see different keys: a value that is not finite counts only for rows that see it.

    In the product, 0 * NaN would reach the rows that do not. So such values leave the product, and are added to the
    rows that see them one key at a time.
    """
    keys = hidden.shape[1]
    odd = v[:keys].isfinite().logical_not_()
    odd_keys = odd.any(1).nonzero()[:, 0].tolist()
    if not odd_keys:
        return products.weigh(weights, v, scratch)
    clean = v.clone()
    clean[:keys].masked_fill_(odd, 0)
    out = products.weigh(weights, clean, scratch)
    for key in odd_keys:
        seen = hidden[:, key].logical_not().nonzero()[:, 0]
        extra = v[key].float().masked_fill(odd[key].logical_not(), 0)
        term = weights[seen, key, None] * extra
        out[seen] += term.masked_fill(odd[key].logical_not(), 0)
    return out
