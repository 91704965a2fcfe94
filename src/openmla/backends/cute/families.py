"""Every kernel of this backend as something to compile: its variants, and how one of them becomes an object file.

No DSL import before something is compiled. Who launches the kernels: `decode`, `sparse`, `few_rows`, `gathered`, `append`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from openmla.backends.cute.decode_dense import config as large
from openmla.backends.cute.decode_dense_small import config as small
from openmla.backends.cute.decode_fp8 import config as coded
from openmla.backends.cute.decode_sparse import config as sparse
from openmla.backends.cute.inline import inlined, refusals
from openmla.backends.cute.prefill_sparse import config as gather
from openmla.backends.cute.toolchain import CompiledObject, compile_kernel
from openmla.backends.cute.writers import config as writers
from openmla.core.errors import UnsupportedError
from openmla.mods import Mods

Family: TypeAlias = tuple[Sequence[Any], Callable[[Any, Path], CompiledObject]]
"""(variants, what compiles one of them into a folder)."""


@dataclass(frozen=True)
class ScheduleVariant:
    """The device plan has one variant; every number it needs is an argument."""

    name: str = "decode_plan"

    def as_dict(self) -> dict[str, Any]:
        """Nothing to choose."""
        return asdict(self)


@dataclass(frozen=True)
class CombineVariant:
    """The merge of partials: dtype of out, and columns of one row that a CTA takes."""

    dtype: Literal["bf16", "fp16"] = "bf16"
    columns: int = 512

    @property
    def name(self) -> str:
        """Exported function name."""
        return f"combine_{self.dtype}_{self.columns}"

    def as_dict(self) -> dict[str, Any]:
        """For the bundle's manifest."""
        return asdict(self)


SCHEDULE_VARIANTS = (ScheduleVariant(),)
COMBINE_VARIANTS = tuple(CombineVariant(dtype, columns) for dtype in ("bf16", "fp16") for columns in (512, 128))


def build_schedule(config: ScheduleVariant, folder: Path) -> CompiledObject:
    """Compile the device plan. Needs the DSL, no GPU."""
    from openmla.backends.cute import schedule

    return compile_kernel(schedule.DecodePlan(), schedule.fake_arguments(), config.name, out_dir=folder)


def build_combine(config: CombineVariant, folder: Path) -> CompiledObject:
    """Compile one variant of the merge. Needs the DSL, no GPU."""
    import cutlass

    from openmla.backends.cute import combine

    element = cutlass.BFloat16 if config.dtype == "bf16" else cutlass.Float16
    code = combine.Combine(element, config.columns)
    return compile_kernel(code, combine.fake_arguments(element), config.name, out_dir=folder)


def build_few_rows(config: small.Config, folder: Path) -> CompiledObject:
    """Compile one variant of decode_dense_small. Needs the DSL, no GPU."""
    from openmla.backends.cute.decode_dense_small.launch import build

    return build(config, folder)


def build_many_rows(config: large.Config, folder: Path) -> CompiledObject:
    """Compile one variant of decode_dense. Needs the DSL, no GPU."""
    from openmla.backends.cute.decode_dense.launch import build

    return build(config, folder)


def build_coded(config: coded.Config, folder: Path) -> CompiledObject:
    """Compile one variant of decode_fp8. Needs the DSL, no GPU."""
    from openmla.backends.cute.decode_fp8.launch import build

    return build(config, folder)


def build_sparse(config: sparse.Config, folder: Path) -> CompiledObject:
    """Compile one variant of decode_sparse. Needs the DSL, no GPU."""
    from openmla.backends.cute.decode_sparse.launch import build

    return build(config, folder)


def build_gather(config: gather.Config, folder: Path) -> CompiledObject:
    """Compile one variant of prefill_sparse. Needs the DSL, no GPU."""
    from openmla.backends.cute.prefill_sparse.launch import build

    return build(config, folder)


def build_order(config: gather.Order, folder: Path) -> CompiledObject:
    """Compile what orders the lists of prefill_sparse. Needs the DSL, no GPU."""
    from openmla.backends.cute.prefill_sparse.launch import build_order

    return build_order(config, folder)


def build_merge(config: large.MergeConfig, folder: Path) -> CompiledObject:
    """Compile one variant of the merge of decode_dense. Needs the DSL, no GPU."""
    from openmla.backends.cute.decode_dense.launch import build_merge

    return build_merge(config, folder)


def build_writer(config: writers.Config, folder: Path) -> CompiledObject:
    """Compile one variant of writers. Needs the DSL, no GPU."""
    from openmla.backends.cute.writers.launch import build

    return build(config, folder)


FAMILIES: dict[str, Family] = {
    "schedule": (SCHEDULE_VARIANTS, build_schedule),
    "combine": (COMBINE_VARIANTS, build_combine),
    small.FAMILY: (small.VARIANTS, build_few_rows),
    large.FAMILY: ((*large.VARIANTS, *large.EXCHANGED), build_many_rows),
    large.MERGE_FAMILY: (large.MERGE_VARIANTS, build_merge),
    coded.FAMILY: (coded.VARIANTS, build_coded),
    sparse.FAMILY: (sparse.VARIANTS, build_sparse),
    gather.FAMILY: (gather.VARIANTS, build_gather),
    gather.ORDER_FAMILY: ((gather.Order(),), build_order),
    writers.FAMILY: (writers.VARIANTS, build_writer),
}
"""What an ahead-of-time bundle holds."""


def with_mods(mods: Sequence[Mods] = ()) -> dict[str, Family]:
    """FAMILIES, and the variants that inline each of `mods`, for a bundle.

    Raises:
        UnsupportedError: a form that no kernel of this backend inlines.
    """
    found, (plain, build) = dict(FAMILIES), FAMILIES[large.FAMILY]
    variants = list(plain)
    for form in mods:
        if why := refusals(form):
            raise UnsupportedError(f"{form} cannot be compiled into a bundle", {large.FAMILY: why}, str(form))
        variants += [replace(each, mods=inlined(form)) for each in plain if each not in large.EXCHANGED]
    return found | {large.FAMILY: (tuple(dict.fromkeys(variants)), build)}
