"""`openmla demo`: a real MLA model over real text through the paged latent cache, checked and measured.

What is checked
    tokens    every request's tokens equal those of transformers' own `generate()` on the same model, under the same dice
    outputs   every attention output of the run, prefill and decode, all layers, against the fp64 oracle
    pages     the rules of cache and allocator after every step
    controls  three deliberate mistakes, each of which the check of outputs must catch
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import openmla
from openmla.backends import Explanation, explain
from openmla.core.errors import ConfigError
from openmla.core.problem import PrefillProblem
from openmla.core.target import Target
from openmla.integrations.transformers import AttentionCall, PagedModel
from openmla.kv.cache import PagedKVCache
from openmla.lab import ceilings
from openmla.lab.demo import measure, report, tiny
from openmla.lab.demo.measure import Rate
from openmla.lab.demo.result import Control, DemoResult, OracleResult, RequestResult
from openmla.lab.demo.serve import Request, Served, Watch, serve
from openmla.lab.progress import Say, Stages


@dataclass(frozen=True)
class Scenario:
    """Who comes when, and how much room there is. Prompts are stretches of one text, in tokens."""

    requests: tuple[Request, ...]
    page_size: int
    num_pages: int
    sweep: tuple[int, ...]  # context lengths
    expanded_up_to: int  # the expanded form is timed up to this length: it is slow
    seconds_per_point: float


def scenario(quick: bool) -> Scenario:
    """The full one, or a small one for tests and the impatient."""
    content = tiny.text(1024 if quick else 4096)

    def take(begin: int, end: int) -> tuple[int, ...]:
        return tuple(content[begin:end])

    requests: tuple[Request, ...]
    if quick:
        requests = (
            Request("a", take(0, 70), 6, 0),
            Request("b", take(100, 220), 9, 0),
            Request("c", take(100, 200) + take(300, 320), 7, 2, forks="b"),
            Request("d", take(0, 66) + take(400, 410), 5, 7),
        )
        return Scenario(requests, 16, 26, (64, 256), 64, 0.05)
    requests = (
        Request("a", take(0, 300), 24, 0),
        Request("b", take(400, 1100), 32, 0),
        Request("c", take(1200, 1720), 28, 2),
        Request("d", take(1200, 1650) + take(2000, 2060), 24, 6, forks="c"),
        Request("e", take(2100, 2250), 16, 10),
        Request("f", take(2400, 3300), 12, 14),
        Request("g", take(0, 290) + take(2300, 2350), 18, 22),
    )
    lengths = (256, 512, 1024, 2048, 4096, 8192, 16384)
    return Scenario(requests, 64, 43, lengths, 2048, 0.25)


def run_demo(
    *,
    out: Path | str,
    seed: int = 0,
    device: torch.device | str | None = None,
    quick: bool = False,
    progress: Say | None = None,
    backend: str | None = None,
) -> DemoResult:
    """Run the demo and write its report.

    Args:
        out: path of the HTML report; its folder must exist.
        seed: of the dice that choose among likely tokens.
        device: default: the GPU if there is one, else the CPU.
        quick: a small run of a few seconds.
        progress: called with sentences, or a `LiveDisplay`.
        backend: of every attention; default OPENMLA_BACKEND.

    Raises:
        ConfigError: a package is missing, the device is not there, or the report cannot be written; the message says what to do.
    """
    report.check_installed()
    where = _device(device)
    target = Target.detect(where)
    plan, stages = scenario(quick), Stages(8 if not target.is_cuda else 9, progress)
    dice = tiny.Dice(seed)
    with stages.stage("load openmla-tiny"):
        model = tiny.load().to(where)
    with stages.stage("measure what this machine can do"):
        roof = ceilings.measure(target, ("fp32", "bf16"), 0.1 if quick else 1.0)
    with stages.stage("stock transformers: generate() for every request") as share:
        expected, stock_seconds = _stock(model, plan, dice, where, share)
    watch = Watch()
    with stages.stage("OpenMLA: the batch, every attention output checked") as share:
        served, paged = _serve_checked(model, plan, dice, where, backend, watch, share)
    with stages.stage("controls: three mistakes that must be caught"):
        oracle = _oracle(watch, backend)
    with stages.stage("OpenMLA: the batch again, for the clock") as share:
        paged.observe = None
        paged.cache = _cache(plan, model.config.num_hidden_layers, torch.float32, where)
        timed = serve(paged, plan.requests, choose=dice.choose, progress=share)
    narrow = None
    if target.is_cuda:
        with stages.stage("the same batch in bf16, every output checked") as share:
            narrow = _narrow(model, paged, plan, dice, where, backend, served, share)
    with stages.stage("decode against context length") as share:
        budget = plan.seconds_per_point
        roof = _higher(roof, where, budget)
        assert watch.largest is not None, "every scenario decodes"
        batch_rate, problem = measure.replay_rate(watch.largest, roof, backend, 2 * budget)
        sweep = _sweep(paged, plan, roof, target, backend, share)
    paged.detach()
    result = DemoResult(
        versions=_versions(), machine=target.name, arch=target.arch, threads=target.num_sms, seed=seed, is_quick=quick,
        model=_model_facts(model), page_size=plan.page_size, num_pages=plan.num_pages, dtype="fp32",
        requests=_request_results(served, plan, expected), steps=served.steps, oracle=oracle,
        integrity=served.integrity + timed.integrity, choices=_choices(problem, model, plan, target, backend),
        stock_tokens_per_s=sum(len(tokens) for tokens in expected.values()) / stock_seconds,
        prefill_tokens_per_s=timed.prefill_tokens / sum(step.prefill_seconds for step in timed.steps),
        decode_tokens_per_s=timed.decode_tokens / sum(step.decode_seconds for step in timed.steps),
        tokens_per_s=sum(len(tokens) for tokens in expected.values()) / timed.seconds, served=batch_rate, sweep=sweep, forms=measure.kv_forms(*_head_sizes(model)),
        roof=roof.as_dict(), report=os.fspath(out), stages=stages.seconds, narrow=narrow,
    )  # fmt: skip
    with stages.stage("write the report"):
        report.render_demo_report(result, Path(out))
    return result


def _device(asked: torch.device | str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if asked is None:
        return torch.device("cuda" if has_gpu else "cpu")
    legal = ("cpu", "cuda") if has_gpu else ("cpu",)
    if str(asked).partition(":")[0] not in legal:
        raise ConfigError(f"device must be {' or '.join(legal)} on this machine, got {str(asked)!r}")
    return torch.device(asked)


def _head_sizes(model: Any) -> tuple[int, int, int]:
    """(heads, key columns, value columns) of the expanded form."""
    config = model.config
    return config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim


def _stock(
    model: Any, plan: Scenario, dice: tiny.Dice, device: torch.device, share: Callable[[float], None]
) -> tuple[dict[str, list[int]], float]:
    """Tokens of each request by transformers alone, under the same dice, and the seconds for all of them."""
    ids = torch.tensor([plan.requests[0].prompt], device=device)
    with torch.inference_mode():
        model(ids)  # the first pass through a model pays for what later ones find ready
    found, begin = {}, time.perf_counter()
    for done, request in enumerate(plan.requests, 1):
        ids = torch.tensor([request.prompt], device=device)
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False,
            pad_token_id=0, logits_processor=[dice],
        )  # fmt: skip
        found[request.name] = made[0, len(request.prompt) :].tolist()
        share(done / len(plan.requests))
    return found, time.perf_counter() - begin


def _cache(plan: Scenario, layers: int, dtype: torch.dtype, device: torch.device) -> PagedKVCache:
    name = "fp32_576" if dtype == torch.float32 else "bf16_576"
    return PagedKVCache(name, plan.num_pages, plan.page_size, layers, device=device)


def _serve_checked(
    model: Any, plan: Scenario, dice: tiny.Dice, device: torch.device, backend: str | None, watch: Watch,
    share: Callable[[float], None],
) -> tuple[Served, PagedModel]:  # fmt: skip
    cache = _cache(plan, model.config.num_hidden_layers, model.dtype, device)
    paged = PagedModel(model, cache, backend=backend)

    def observe(call: AttentionCall) -> None:
        watch(call)
        watch.keep_largest(call, paged)

    paged.observe = observe
    return serve(paged, plan.requests, watch=watch, choose=dice.choose, progress=share), paged


def _narrow(
    model: Any, paged: PagedModel, plan: Scenario, dice: tiny.Dice, device: torch.device, backend: str | None,
    wide: Served, share: Callable[[float], None],
) -> dict[str, Any]:  # fmt: skip
    """The batch in bf16: outputs are held to the tolerance of bf16; tokens may differ where two logits are close."""
    paged.detach()
    watch = Watch()
    model.to(torch.bfloat16)
    served, narrow = _serve_checked(model, plan, dice, device, backend, watch, share)
    narrow.detach()
    model.to(torch.float32)
    same = sum(
        a == b
        for x, y in zip(served.requests, wide.requests, strict=True)
        for a, b in zip(x.tokens, y.tokens, strict=True)
    )
    return {
        "outputs": watch.outputs,
        "failures": watch.failures,
        "worst": {rule: finding.ratio for rule, finding in watch.worst.items()},
        "same_tokens": same,
        "tokens": sum(len(log.tokens) for log in served.requests),
    }


def _oracle(watch: Watch, backend: str | None) -> OracleResult:
    assert watch.largest is not None, "every scenario decodes"
    mistakes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("softmax_scale 1 % too large", {"scale": 1.01}),
        ("the newest token forgotten", {"drop_last": True}),
        ("one page of another request", {"foreign_page": True}),
    )
    controls = []
    for name, mistake in mistakes:
        reports = watch.largest.check(*watch.largest.run(backend=backend, **mistake))
        worst = max((finding for each in reports for finding in each.findings), key=lambda finding: finding.ratio)
        controls.append(Control(name, worst.rule, worst.ratio))
    ratios = {rule: finding.ratio for rule, finding in watch.worst.items()}
    return OracleResult(watch.outputs, watch.rows, ratios, watch.where, watch.failures, controls)


def _higher(roof: ceilings.Ceilings, device: torch.device, seconds: float) -> ceilings.Ceilings:
    """The arithmetic ceilings measured once more: a moment in which others use the machine must not lower the roof."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    again = {name: ceilings.gemm_tflops(device, dtype, roof.gemm_size, seconds) for name, dtype in dtypes.items()}
    return replace(roof, gemm_tflops={name: max(rate, again[name]) for name, rate in roof.gemm_tflops.items()})


def _sweep(
    paged: PagedModel, plan: Scenario, roof: ceilings.Ceilings, target: Target, backend: str | None,
    share: Callable[[float], None],
) -> list[Rate]:  # fmt: skip
    """Batch 4, the model's head count, growing context: plain and FP8 cache, and the expanded form for comparison."""
    device = paged.cache.device
    if target.is_cuda:
        paged.model.to(torch.bfloat16)  # the expanded form in the number format of the series it is compared with
    attention, expand = paged.stock(0)
    narrow, wide = ("bf16_576", torch.bfloat16), ("fp32_576", torch.float32)
    series = [narrow, ("fp8_656", torch.bfloat16)] if target.is_cuda else [wide, narrow, ("fp8_656", torch.bfloat16)]
    timed = partial(
        measure.decode_rate, batch=4, h_q=paged.model.config.num_attention_heads, roof=roof, device=device, backend=backend,
        budget=plan.seconds_per_point,
    )  # fmt: skip
    found = []
    for done, s_k in enumerate(plan.sweep, 1):
        found += [timed(name, dtype, s_k=s_k) for name, dtype in series]
        if s_k <= plan.expanded_up_to:
            found.append(measure.expanded_rate(attention, expand, 4, s_k, roof, budget=plan.seconds_per_point))
        share(done / len(plan.sweep))
    return found


def _request_results(served: Served, plan: Scenario, expected: dict[str, list[int]]) -> list[RequestResult]:
    ends = {request.name: tiny.readable(list(request.prompt[-32:])) for request in plan.requests}
    return [
        RequestResult(log, ends[log.name], tiny.readable(log.tokens), expected[log.name]) for log in served.requests
    ]


def _choices(problem: Any, model: Any, plan: Scenario, target: Target, backend: str | None) -> list[dict[str, Any]]:
    """Which kernel ran decode and prefill, and why not the others."""
    longest = max(len(request.prompt) for request in plan.requests)
    heads, d_key, d_value = _head_sizes(model)
    prompt = PrefillProblem(
        1, longest, longest, longest, longest, heads, heads, d_key, d_value, problem.dtype, is_causal=True
    )
    found: list[Explanation] = [explain(each, target=target, backend=backend) for each in (problem, prompt)]
    return [explanation.as_dict() for explanation in found]


def _model_facts(model: Any) -> dict[str, int]:
    config = model.config
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "latent": config.kv_lora_rank,
        "rope": config.qk_rope_head_dim,
        "nope": config.qk_nope_head_dim,
        "value": config.v_head_dim,
    }


def _versions() -> dict[str, str]:
    import transformers

    return {
        "openmla": openmla.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
