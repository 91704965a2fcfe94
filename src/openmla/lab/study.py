"""Study: MLA against MHA, GQA and MQA, in FLOPs, bytes, memory, precision and money.

A form is what a layer keeps per token and what a query does with it. Per decoded token and attended key:

    MHA, GQA, MQA   2 h_q (d_k + d_v) FLOP        h_kv (d_k + d_v) numbers read
    MLA, absorbed   2 h_q (2 d_latent + d_rope)   d_latent + d_rope numbers read, once for all heads

so FLOP per byte grows with h_q / h_kv, and for MLA with h_q. Projections of the layer are left out everywhere. FLOPs and
bytes come from `openmla.core.cost`; times and costs are those of the roof, which no kernel beats; precision and the
latent sweep are measured here.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import openmla
from openmla.core.cost import Cost, cost
from openmla.core.errors import ConfigError
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem, PrefillProblem
from openmla.core.target import Target
from openmla.lab import clock, quality
from openmla.lab.progress import Say, Stages
from openmla.lab.roofline import Roof, data_sheet, measured
from openmla.reference import attention, quant

_PAGE = 64
_ITEM = 2  # bytes of a number in bf16


@dataclass(frozen=True)
class Form:
    """One way to attend. MLA: d_latent > 0; d_k and d_v are then sizes of a head before absorption."""

    name: str
    h_q: int
    h_kv: int
    d_k: int
    d_v: int
    d_latent: int = 0
    d_rope: int = 0

    @property
    def kv_numbers(self) -> int:
        """Numbers kept per token and layer."""
        return self.d_latent + self.d_rope if self.d_latent else self.h_kv * (self.d_k + self.d_v)

    def work(self, batch: int, s_q: int, s_k: int) -> Cost:
        """One decode step of one layer in bf16: each request has s_k keys and s_q queries that see all of them."""
        if self.d_latent:
            d_qk = self.d_latent + self.d_rope
            pages = -(-s_k // _PAGE)
            layout = kv_layout(f"bf16_{d_qk}")
            problem = DecodeProblem(
                batch, s_q, batch * s_q, self.h_q, 1, d_qk, self.d_latent, torch.bfloat16, layout, _PAGE, batch * pages,
                pages,
            )  # fmt: skip
            return cost(problem, [s_k] * batch)
        total = PrefillProblem(
            batch, batch * s_q, batch * s_k, s_q, s_k, self.h_q, self.h_kv, self.d_k, self.d_v, torch.bfloat16
        )
        return cost(total)


@dataclass(frozen=True)
class Model:
    """A published model, from models.toml."""

    name: str
    parameters: float
    layers: int
    form: Form
    kind: str
    source: str

    @property
    def kv_bytes(self) -> int:
        """Bytes per token of context, all layers, bf16."""
        return self.layers * self.form.kv_numbers * _ITEM


@dataclass(frozen=True)
class Workload:
    """A shape of traffic. Every query token counts as a token written, so speculation is at its very best."""

    name: str
    batch: int
    s_q: int
    s_k: int


WORKLOADS = (
    Workload("chat", 64, 1, 2048),
    Workload("long document", 4, 1, 131072),
    Workload("batch", 256, 1, 1024),
    Workload("speculative, 4 drafts", 32, 4, 8192),
)
LENGTHS = (1024, 4096, 16384, 65536, 131072)
LATENTS = (128, 256, 384, 512, 768)


def forms(h_q: int = 128) -> tuple[Form, ...]:
    """DeepSeek-V3's head sizes under four forms with the same number of query heads."""
    return (
        Form("MLA", h_q, h_q, 192, 128, 512, 64),
        Form("MQA", h_q, 1, 192, 128),
        Form("GQA-8", h_q, min(8, h_q), 192, 128),
        Form("MHA", h_q, h_q, 192, 128),
    )


def models() -> tuple[Model, ...]:
    """The models of models.toml."""
    raw = tomllib.loads((Path(__file__).parent / "models.toml").read_text(encoding="utf-8"))
    keys = ("h_q", "h_kv", "d_k", "d_v", "d_latent", "d_rope")
    return tuple(
        Model(
            each["name"], each["parameters"], each["layers"],
            Form(each["kind"].upper(), **{key: each[key] for key in keys if key in each}), each["kind"], each["source"],
        )
        for each in raw["model"]
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One decode step of one layer at the roof."""

    form: str
    workload: str
    s_k: int
    flops: int
    bytes: int
    intensity: float
    bound: str
    seconds: float
    kv_bytes: int  # of the batch, one layer


def step(form: Form, load: Workload, roof: Roof) -> Step:
    """FLOPs, bytes, and the time that the roof allows."""
    work = form.work(load.batch, load.s_q, load.s_k)
    seconds = max(work.flops / roof.gemm_tflops["bf16"] / 1e12, work.bytes / roof.read_gbps / 1e9)
    bound = "arithmetic" if work.intensity >= roof.ridge("bf16") else "memory"
    kept = load.batch * load.s_k * form.kv_numbers * _ITEM
    return Step(form.name, load.name, load.s_k, work.flops, work.bytes, work.intensity, bound, seconds, kept)


@dataclass(frozen=True)
class Price:
    """What attention costs at the roof: all layers of a model of this shape, one card."""

    form: str
    workload: str
    tokens_per_second: float
    per_million: float
    kv_gib: float
    cards_for_kv: float


def price(form: Form, load: Workload, roof: Roof, layers: int, per_hour: float, memory_gib: float) -> Price:
    """Cost of a million tokens written, at `per_hour` for a card, attention alone."""
    seconds = layers * step(form, load, roof).seconds
    rate = load.batch * load.s_q / seconds
    kept = layers * load.batch * load.s_k * form.kv_numbers * _ITEM / 2**30
    return Price(form.name, load.name, rate, per_hour / 3600 / rate * 1e6, kept, kept / memory_gib)


# measured here


@dataclass(frozen=True)
class Precision:
    """Error of one way against fp64, relative root mean square over all outputs.

    arithmetic: against fp64 on the numbers as they are stored. total: on the numbers before they were stored.
    """

    way: str
    s_k: int
    arithmetic: float
    total: float


@dataclass(frozen=True)
class Stability:
    """Scores grown by `factor`: the error of ours, and the share of rows that a softmax without a maximum loses."""

    factor: float
    largest_score: float
    ours: float
    lost_fp16: float
    lost_fp32: float


@dataclass(frozen=True)
class Latent:
    """One latent size: what it keeps and costs, and the time of a decode here."""

    d_latent: int
    kv_bytes: int
    compression: float  # against MHA with the same heads
    intensity: float
    seconds: float


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


def _paged(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[s_k, d] as (cache [pages, 64, 1, d], block_table, cache_seqlens) of one request."""
    s_k, d = rows.shape
    pages = -(-s_k // _PAGE)
    cache = rows.new_zeros(pages * _PAGE, d)
    cache[:s_k] = rows
    table = torch.arange(pages, dtype=torch.int32)[None]
    return cache.view(pages, _PAGE, 1, d), table, torch.tensor([s_k], dtype=torch.int32)


def precision(lengths: Sequence[int], seed: int = 0, h_q: int = 16) -> list[Precision]:
    """MLA in every format, and the other forms in bf16, on standard normal numbers, on the CPU."""
    found = []
    for s_k in lengths:
        generator = torch.Generator().manual_seed(seed + s_k)
        rows = torch.randn(s_k, 576, generator=generator)
        q = torch.randn(1, 1, h_q, 576, generator=generator)
        scale = 576**-0.5
        for way in ("fp32", "fp16", "bf16", "fp8_656"):
            found.append(_mla_error(way, q, rows, scale))
        found += [_head_error(form, s_k, generator) for form in forms(h_q)[1:]]
    return found


def _mla_error(way: str, q: torch.Tensor, rows: torch.Tensor, scale: float) -> Precision:
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(way, torch.bfloat16)
    layout = way if way.startswith("fp8") else None
    plain, table, lengths = _paged(rows)
    cache = quant.quantise(plain, way) if layout else plain.to(dtype)
    golden = [
        attention.decode(query.float(), keys.float(), table, lengths, softmax_scale=scale, d_v=512).out
        for query, keys in (
            (q, plain),
            (q.to(dtype), quant.dequantise(cache, way, torch.float32) if layout else cache),
        )
    ]
    out, _ = openmla.decode(
        q.to(dtype), cache, table, lengths, softmax_scale=scale, kv_layout=layout, backend="torch", return_lse=False
    )
    return Precision(f"MLA, {way}", rows.shape[0], _error(out, golden[1]), _error(out, golden[0]))


def _head_error(form: Form, s_k: int, generator: torch.Generator) -> Precision:
    """Heads apart through scaled_dot_product_attention in bf16."""
    q = torch.randn(1, form.h_q, 1, form.d_k, generator=generator)
    k = torch.randn(1, form.h_kv, s_k, form.d_k, generator=generator)
    v = torch.randn(1, form.h_kv, s_k, form.d_v, generator=generator)
    scale = form.d_k**-0.5

    def exact(*given: torch.Tensor) -> torch.Tensor:
        query, key, value = (each.double() for each in given)
        key, value = (each.repeat_interleave(form.h_q // form.h_kv, 1) for each in (key, value))
        return torch.softmax(scale * query @ key.transpose(-1, -2), -1) @ value

    stored = tuple(each.bfloat16() for each in (q, k, v))
    keys, values = (each.repeat_interleave(form.h_q // form.h_kv, 1) for each in stored[1:])
    out = F.scaled_dot_product_attention(stored[0], keys, values, scale=scale)
    return Precision(f"{form.name}, bf16", s_k, _error(out, exact(*stored)), _error(out, exact(q, k, v)))


def stability(factors: Sequence[float], seed: int = 0, s_k: int = 1024, h_q: int = 16) -> list[Stability]:
    """Ever larger scores: exp(score) overflows fp16 at 11.1 and fp32 at 88.8, exp(score - maximum) never."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(s_k, 576, generator=generator).bfloat16()
    base = torch.randn(1, 1, h_q, 576, generator=generator)
    found = []
    for factor in factors:
        q = (factor * base).bfloat16()
        cache, table, lengths = _paged(rows)
        golden = attention.decode(q.float(), cache.float(), table, lengths, softmax_scale=576**-0.5, d_v=512)
        out, _ = openmla.decode(q, cache, table, lengths, softmax_scale=576**-0.5, backend="torch")
        scores = 576**-0.5 * (q[0, 0].double() @ rows.double().t())

        def lost(dtype: torch.dtype, scores: torch.Tensor = scores) -> float:
            sums = torch.exp(scores.to(dtype)).sum(-1)
            return float((~sums.isfinite()).double().mean())

        found.append(
            Stability(factor, float(scores.max()), _error(out, golden.out), lost(torch.float16), lost(torch.float32))
        )
    return found


def latents(sizes: Sequence[int], seconds: float, h_q: int = 16, s_k: int = 4096, seed: int = 0) -> list[Latent]:
    """Latent sizes with 64 RoPE columns: bytes, FLOP per byte, and the time of a bf16 decode on this machine's CPU."""
    heads = h_q * (192 + 128)
    found = []
    for size in sizes:
        generator = torch.Generator().manual_seed(seed)
        rows = (0.1 * torch.randn(s_k, size + 64, generator=generator)).bfloat16()
        q = (0.1 * torch.randn(1, 1, h_q, size + 64, generator=generator)).bfloat16()
        cache, table, lengths = _paged(rows)

        def call(q: torch.Tensor = q, cache: torch.Tensor = cache, table: torch.Tensor = table,
                 lengths: torch.Tensor = lengths, size: int = size) -> object:  # fmt: skip
            return openmla.decode(q, cache, table, lengths, d_v=size, softmax_scale=192**-0.5, backend="torch")

        took = clock.best_seconds(call, torch.device("cpu"), seconds)
        form = Form("MLA", h_q, h_q, 192, 128, size, 64)
        work = form.work(1, 1, s_k)
        found.append(Latent(size, form.kv_numbers * _ITEM, heads / form.kv_numbers, work.intensity, took))
    return found


# the whole


@dataclass(frozen=True)
class Study:
    """Everything. Times of `steps` and `prices` are those of `roof`."""

    roof: Roof
    h_q: int
    per_hour: float
    memory_gib: float
    layers: int
    forms: tuple[Form, ...]
    lengths: tuple[Step, ...]
    steps: tuple[Step, ...]
    prices: tuple[Price, ...]
    models: tuple[Model, ...]
    precision: tuple[Precision, ...]
    stability: tuple[Stability, ...]
    latents: tuple[Latent, ...]
    machine: str
    trained: tuple[quality.Outcome, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rest = [{**asdict(each), "kv_bytes": each.kv_bytes} for each in self.models]
        kept = [{**asdict(each), "kv_numbers": each.kv_numbers} for each in self.forms]
        return {"schema": 1, **asdict(self), "models": rest, "forms": kept, "ridge": self.roof.ridge("bf16")}

    def __str__(self) -> str:
        roof, mla = self.roof, self.forms[0]
        lines = [
            f"{roof.device} ({roof.source}): {roof.gemm_tflops['bf16']:.4g} TFLOP/s, {roof.read_gbps:.4g} GB/s, "
            f"ridge at {roof.ridge('bf16'):.3g} FLOP per byte",
            f"{'form':<8} {'KV bytes/token':>14} {'against MLA':>11} {'FLOP/byte':>10}  bound by",
        ]
        chat = {each.form: each for each in self.steps if each.workload == WORKLOADS[0].name}
        for form in self.forms:
            each = chat[form.name]
            lines.append(
                f"{form.name:<8} {form.kv_numbers * _ITEM:>14,} {form.kv_numbers / mla.kv_numbers:>10.3g}x "
                f"{each.intensity:>10.3g}  {each.bound}"
            )
        lines.append(
            f"cost of a million tokens, attention alone, {self.layers} layers, {self.per_hour:g} per card and hour"
        )
        for load in WORKLOADS:
            shown = ", ".join(
                f"{each.form} {each.per_million:.3g}" for each in self.prices if each.workload == load.name
            )
            lines.append(f"  {load.name:<22} {shown}")
        longest = max(each.s_k for each in self.precision)
        lines.append(f"error against fp64 at {longest} keys (arithmetic, total), measured on {self.machine}")
        lines += [
            f"  {each.way:<14} {each.arithmetic:.2e}  {each.total:.2e}"
            for each in self.precision
            if each.s_k == longest
        ]
        if self.trained:
            lines.append("small models trained for it: numbers kept per token and layer, loss on unseen text")
            lines += [
                f"  {name:<8} {size:>4} {kept:>5} numbers  {loss:.4f}"
                for name, size, kept, loss, _ in losses(self.trained)
            ]
        return "\n".join(lines)


def load(path: Path, trained: Path | None = None) -> Study:
    """The record that `openmla study --json` wrote, perhaps on a machine that cannot draw. Raises ConfigError.

    trained: outcomes of `openmla.lab.quality` to show instead of the record's.
    """

    def every(of: Any, key: str, without: str = "") -> tuple[Any, ...]:
        return tuple(of(**{name: value for name, value in each.items() if name != without}) for each in raw[key])

    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        shown = [{**each, "form": Form(**each["form"])} for each in raw["models"]]
        plain = {key: raw[key] for key in ("h_q", "per_hour", "memory_gib", "layers", "machine")}
        found = Study(
            roof=Roof(**raw["roof"]), forms=every(Form, "forms", "kv_numbers"), lengths=every(Step, "lengths"),
            steps=every(Step, "steps"), prices=every(Price, "prices"), precision=every(Precision, "precision"),
            stability=every(Stability, "stability"), latents=every(Latent, "latents"),
            models=tuple(Model(**{key: each[key] for key in each if key != "kv_bytes"}) for each in shown),
            trained=every(quality.Outcome, "trained"), **plain,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no record of openmla study --json: {type(error).__name__} {error}") from error
    return found if trained is None else replace(found, trained=tuple(quality.read(trained)))


def losses(trained: Sequence[quality.Outcome]) -> list[tuple[str, int, int, float, float]]:
    """(form, size, numbers kept, mean loss over seeds, largest less smallest), by form and size."""
    groups: dict[tuple[str, int, int], list[float]] = {}
    for each in trained:
        groups.setdefault((each.form, each.size, each.kv_numbers), []).append(each.loss)
    return [
        (form, size, kept, sum(values) / len(values), max(values) - min(values))
        for (form, size, kept), values in sorted(groups.items(), key=lambda item: (item[0][0] != "mla", item[0]))
    ]


def study(
    *, target: str = "h100_sxm", h_q: int = 128, layers: int = 61, per_hour: float = 2.0, memory_gib: float = 80.0,
    seconds: float = 0.2, trained: Path | None = None, say: Say | None = None,
) -> Study:  # fmt: skip
    """Compare the forms.

    Args:
        target: a preset whose data sheet is the roof, or "here" to measure this machine.
        h_q: query heads of every form.
        layers: of the model that is priced.
        per_hour: price of one card for an hour, in any currency.
        memory_gib: of one card, for the number of cards that the KV needs.
        seconds: per rate and latent size that is measured.
        trained: outcomes of `openmla.lab.quality`, shown beside the rest.
        say: progress.

    Raises:
        ConfigError: an unknown target, or a value that is not positive.
    """
    for name, value in (("h_q", h_q), ("layers", layers), ("per_hour", per_hour), ("memory_gib", memory_gib)):
        if value <= 0:
            raise ConfigError(f"{name} must be positive, got {value}")
    if h_q % 8 and h_q > 8:
        raise ConfigError(f"h_q must be a multiple of 8, which is GQA's number of KV heads here, got {h_q}")
    outcomes = () if trained is None else tuple(quality.read(trained))
    stages = Stages(4, say)
    with stages.stage(f"the roof of {target}"):
        here = Target.detect()
        roof = measured(here, ("bf16",), seconds) if target == "here" else data_sheet(target)
    every = forms(h_q)
    grow = [step(form, Workload("one request", 1, 1, n), roof) for form in every for n in LENGTHS]
    steps = [step(form, load, roof) for form in every for load in WORKLOADS]
    prices = [price(form, load, roof, layers, per_hour, memory_gib) for form in every for load in WORKLOADS]
    with stages.stage("precision against fp64"):
        errors = precision((256, 1024, 4096))
    with stages.stage("stability"):
        stable = stability((1.0, 4.0, 16.0, 64.0, 256.0))
    with stages.stage("latent sizes"):
        sizes = latents(LATENTS, seconds)
    return Study(
        roof, h_q, per_hour, memory_gib, layers, every, tuple(grow), tuple(steps), tuple(prices), models(),
        tuple(errors), tuple(stable), tuple(sizes), str(Target.detect("cpu")), outcomes,
    )  # fmt: skip
