"""What a call attaches to attention: `mods=` taken apart into a form that kernels are compiled for, and tensors.

The form is hashable, part of the Problem, and keeps no tensor alive; tables and RoPE's cosines are operands. The torch
form of everything is here too: what the oracle and the PyTorch backend apply, with the meaning that all backends share.

    score   = softmax_scale * <rope(q), k>
    score   = f(score, b, h, q_idx, kv_idx)     for each score_mod in turn, where score is finite
    seen    = causal, window, length, and every mask_mod
    weight  = exp(score), or activation(score, b, h, q_idx, kv_idx)

b is the request, h the query head. Both positions count from the first key of the request: q_idx = cache_seqlens - s_q + i
for its i-th query (negative where a request has fewer keys than queries), so `kv_idx <= q_idx` is causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from openmla.core.errors import ModError
from openmla.mods.function import Mod
from openmla.mods.rope import Rope, RopeForm

TABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool)
Attachable: TypeAlias = "Mod | Rope | Sequence[Mod | Rope] | None"


class Site(NamedTuple):
    """Where scores stand: int32 tensors that broadcast to them."""

    b: torch.Tensor
    h: torch.Tensor
    q_idx: torch.Tensor
    kv_idx: torch.Tensor


@dataclass(frozen=True)
class Mods:
    """The mods of a problem, without tensors: what a kernel is compiled for. Equal if all fingerprints are."""

    scores: tuple[Mod, ...] = ()
    masks: tuple[Mod, ...] = ()
    activation: Mod | None = None
    rope: RopeForm | None = None

    @property
    def functions(self) -> tuple[Mod, ...]:
        """All functions, in the order in which their tables are kept."""
        return (*self.scores, *self.masks, *((self.activation,) if self.activation else ()))

    @property
    def window(self) -> int:
        """The narrowest window that a mask_mod promises; 0 for none."""
        return min((each.window for each in self.masks if each.window), default=0)

    def __str__(self) -> str:
        names = [f"{each}#{each.fingerprint[:6]}" for each in self.functions]
        return "+".join([*names, *([str(self.rope)] if self.rope else [])])


@dataclass(frozen=True, eq=False)
class Attached:
    """A form with its tensors."""

    form: Mods
    tables: tuple[tuple[torch.Tensor, ...], ...]  # of each of form.functions
    rope: Rope | None = None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that a signature has to look at."""
        flat = tuple(table for group in self.tables for table in group)
        return flat if self.rope is None else (*flat, self.rope.cos, self.rope.sin)

    def violations(
        self, *, d_rope: int, capacity: int, page_size: int, device: torch.device, has_sink: bool
    ) -> list[str]:  # fmt: skip
        """Why these cannot be attached to a decode; looks at metadata, never at values."""
        found = []
        for mod, tables in zip(self.form.functions, self.tables, strict=True):
            for (name, ndim), table in zip(mod.tables, tables, strict=True):
                found += _table_violations(mod, name, ndim, table, device)
        if self.form.activation is not None and has_sink:
            found.append(
                f"attn_sink belongs to softmax; it has no meaning beside the activation {self.form.activation}"
            )
        if self.rope is not None:
            found += self.rope.violations(d_rope, capacity, page_size, device)
        return found or self._shape_violations()

    def _shape_violations(self) -> list[str]:
        """Runs every function on tensors without values: is what it returns a score, a mask, a weight?"""

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device="meta")

        site = Site(empty(1, 1), empty(2, 1), empty(2, 1), empty(1, 3))
        score = torch.empty((2, 3), device="meta")
        found = []
        for mod, tables in zip(self.form.functions, self.tables, strict=True):
            front = site if mod.kind == "mask_mod" else (score, *site)
            try:
                result = mod(*front, *(table.to("meta") for table in tables))
            except (RuntimeError, TypeError, AttributeError) as error:
                found.append(f"{mod.kind} {mod.name} cannot be computed: {error}")
                continue
            wanted = "a boolean" if mod.kind == "mask_mod" else "a number"
            if isinstance(result, bool | int | float):
                result = torch.tensor(result)
            if (result.dtype == torch.bool) != (mod.kind == "mask_mod"):
                found.append(f"{mod.kind} {mod.name} must return {wanted} per score, got {result.dtype}")
        return found

    def scores(self, score: torch.Tensor, site: Site) -> torch.Tensor:
        """Every score_mod in turn, in the dtype of score; what is not finite passes by."""
        for mod, tables in zip(self.form.scores, self.tables, strict=False):
            changed = _like(mod(score, *site, *tables), score)
            score = torch.where(score.isfinite(), changed, score)
        return score

    def visible(self, site: Site) -> torch.Tensor | None:
        """What every mask_mod shows; None where there is none."""
        first, seen = len(self.form.scores), None
        for mod, tables in zip(self.form.masks, self.tables[first:], strict=False):
            shown = mod(*site, *tables)
            seen = shown if seen is None else seen & shown
        return seen

    def weights(self, score: torch.Tensor, site: Site) -> torch.Tensor:
        """The activation of scores; only where the form has one."""
        assert self.form.activation is not None
        weight = _like(self.form.activation(score, *site, *self.tables[-1]), score)
        weight = torch.where(score.isfinite(), weight, torch.nan)
        return weight.masked_fill(score == -torch.inf, 0)


def _like(value: torch.Tensor | float, score: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(value, device=score.device).to(score.dtype).expand_as(score)


def _table_violations(mod: Mod, name: str, ndim: int, table: object, device: torch.device) -> list[str]:
    if not isinstance(table, torch.Tensor):
        return [f"table {name} of {mod.name} must be a tensor, got {type(table).__name__}"]
    found = []
    if table.dim() != ndim:
        found.append(f"table {name} of {mod.name} is read with {ndim} indices, got shape {tuple(table.shape)}")
    if table.numel() == 0:
        found.append(f"table {name} of {mod.name} must have an element, got shape {tuple(table.shape)}")
    if table.dtype not in TABLE_DTYPES:
        legal = ", ".join(str(each).removeprefix("torch.") for each in TABLE_DTYPES)
        found.append(f"table {name} of {mod.name} must be {legal}, got {table.dtype}; convert it first")
    if table.device != device:
        found.append(f"table {name} of {mod.name} must be on {device} like q, got {table.device}")
    return found


def attach(mods: Attachable) -> Attached | None:
    """`mods=` of an operation: one or several of score_mod, mask_mod, activation and Rope, in any order.

    Raises:
        ModError: something else, two activations, two ropes, or a table that was not given.
    """
    if isinstance(mods, Mod | Rope | str) or callable(mods):  # a bare function or a name is refused as one thing
        given: tuple[Mod | Rope, ...] = (mods,)
    else:
        given = tuple(mods or ())
    if not given:
        return None
    form = form_of(given)
    sorted_mods = sorted((each for each in given if isinstance(each, Mod)), key=lambda each: _ORDER.index(each.kind))
    broken = []
    for each in sorted_mods:
        missing = [name for name, _ in each.tables if name not in each.given]
        if missing:
            names = ", ".join(f"{name}=..." for name in missing)
            broken.append(f"{each.name} reads tables that were not given; use {each.name}.aux({names})")
    if broken:
        raise ModError("mods", broken)
    tables = tuple(tuple(each.given[name] for name, _ in each.tables) for each in sorted_mods)
    return Attached(form, tables, next((each for each in given if isinstance(each, Rope)), None))


_ORDER = ("score_mod", "mask_mod", "activation")


def form_of(given: Sequence[Mod | Rope | RopeForm]) -> Mods:
    """What a kernel is compiled for. Raises ModError for something else, two activations or two ropes."""
    broken, kinds, ropes = [], {kind: [] for kind in _ORDER}, []  # type: ignore[var-annotated]
    for each in given:
        if isinstance(each, Mod):
            kinds[each.kind].append(each.bare)
        elif isinstance(each, Rope | RopeForm):
            ropes.append(each.form if isinstance(each, Rope) else each)
        else:
            name = getattr(each, "__name__", repr(each))
            broken.append(f"{name} is no mod; decorate it with @score_mod, @mask_mod or @activation of openmla.mods")
    for what, found in (("activation", kinds["activation"]), ("Rope", ropes)):
        if len(found) > 1:
            broken.append(f"one {what} at most, got {len(found)}")
    if broken:
        raise ModError("mods", broken)
    activations = kinds["activation"]
    return Mods(
        tuple(kinds["score_mod"]), tuple(kinds["mask_mod"]), activations[0] if activations else None,
        ropes[0] if ropes else None,
    )  # fmt: skip
