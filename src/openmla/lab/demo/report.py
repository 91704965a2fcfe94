"""The demo's report: a summary for the terminal, and one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from openmla.core.errors import ConfigError
from openmla.lab.demo.measure import Rate
from openmla.lab.demo.result import DemoResult
from openmla.lab.page import duration

_MEANING = {
    "HARD": "each number of the output, against a bound from its number format",
    "RMS": "each row of the output, root mean square",
    "LSE": "the log of each row's softmax sum: never rounded, so the sharpest",
    "NONFINITE": "NaN and infinity stand where they must, and nowhere else",
    "CONTRACT": "shapes and number formats are as promised",
}


def check_installed() -> None:
    """Raises ConfigError, with the command to install them, unless the packages of the demo are there."""
    missing = [name for name in ("jinja2", "matplotlib", "transformers") if find_spec(name) is None]
    if missing:
        raise ConfigError(f'the demo needs {", ".join(missing)}; run: pip install "openmla[demo]"')


def _times(ratio: float) -> str:
    return "no number" if math.isinf(ratio) else f"{ratio:,.3g}×" if ratio < 1000 else f"{ratio:,.0f}×"


def _flops(tflops: float) -> str:
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1000 * tflops:.3g} GFLOP/s"


def _chosen(choice: Mapping[str, Any]) -> str:
    names = [f"{c['backend']}/{c['kernel']}" for c in choice["candidates"] if c["chosen"]]
    return names[0] if names else "none"


def _speeds(result: DemoResult) -> list[tuple[str, str, str]]:
    """(what, rate, meaning) of the table on speed."""
    batch = result.served
    together = max(len(step.decoded) for step in result.steps)
    roof_gemm = result.roof[f"gemm_{batch.dtype}_tflops"]
    limit = f"the {batch.bound} limit of this machine ({roof_gemm * 1000:.3g} GFLOP/s in {batch.dtype}, {result.roof['read_gbps']:.3g} GB/s, both measured in this run)"
    beyond = "" if batch.roofline_percent <= 100 else "; the machine was busier while that was measured"
    return [
        ("decode, whole model", f"{result.decode_tokens_per_s:.3g} tokens/s", f"up to {together} requests at once"),
        (
            "prefill, whole model",
            f"{result.prefill_tokens_per_s:,.4g} tokens/s",
            "reading prompts, one request at a time",
        ),
        ("both together", f"{result.tokens_per_s:.3g} new tokens/s", "all requests, prompts included"),
        (
            "stock transformers",
            f"{result.stock_tokens_per_s:.3g} new tokens/s",
            "the same with generate(), one request after another; it expands the whole context for every token",
        ),
        (
            "attention alone",
            duration(batch.seconds),
            f"one layer of the largest decode step: {batch.batch} requests, the longest {batch.s_k} tokens",
        ),
        ("", f"{batch.gbps:.3g} GB/s", "notes read, queries and outputs included"),
        ("", _flops(batch.tflops), "multiplications and additions"),
        ("", f"{batch.roofline_percent:.0f} % of roofline", f"against {limit}{beyond}"),
    ]


def summary(result: DemoResult) -> str:
    """What the terminal shows at the end."""
    oracle = result.oracle
    equal = sum(request.is_equal for request in result.requests)
    worst = max((ratio for ratio in oracle.worst.values()), default=0.0)
    caught = sum(control.is_caught for control in oracle.controls)
    total = sum(len(request.log.tokens) for request in result.requests)
    rows = [
        ("tokens", f"{equal} of {len(result.requests)} requests equal stock generate(), {total} tokens"),
        ("outputs", f"{oracle.outputs} attention outputs ({oracle.rows:,} rows) against fp64: {len(oracle.failures)} outside "
                    f"tolerance, worst uses {100 * worst:.0f} % of it"),
        ("controls", f"{caught} of {len(oracle.controls)} deliberate mistakes caught"),
        ("pages", f"{len(result.integrity)} rule(s) broken in {len(result.steps)} steps"),
        ("backend", ", ".join(f"{choice['op']}: {_chosen(choice)}" for choice in result.choices)),
        *((f"  not {c['backend']}/{c['kernel']}", "; ".join(c["reasons"]))
          for c in result.choices[0]["candidates"] if not c["chosen"] and c["reasons"]),
        *((what, f"{rate}  {meaning}") for what, rate, meaning in _speeds(result)),
        *((f"KV, {form.name}", f"{form.demo_bytes:,} bytes per token and layer ({form.demo_bytes / _mla(result):.2g}x MLA); "
                               f"DeepSeek-V3: {form.deepseek_v3_bytes:,}") for form in result.forms),
        ("report", result.report),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    head = f"OpenMLA demo on {result.machine}: {'passed' if result.passed else 'FAILED'} in {result.seconds:.0f} s"
    return "\n".join([head, *(f"  {name.ljust(width)}  {value}" for name, value in rows)])


def _mla(result: DemoResult) -> int:
    return next(form.demo_bytes for form in result.forms if form.name == "MLA")


def _tiles(result: DemoResult) -> list[dict[str, Any]]:
    oracle = result.oracle
    equal = sum(request.is_equal for request in result.requests)
    tokens = sum(len(request.log.tokens) for request in result.requests)
    worst = max(oracle.worst.values(), default=0.0)
    caught = sum(control.is_caught for control in oracle.controls)
    return [
        {
            "good": result.tokens_equal,
            "number": f"{equal} of {len(result.requests)}",
            "text": f"requests wrote exactly what stock transformers writes ({tokens} tokens)",
        },
        {
            "good": not oracle.failures,
            "number": f"{oracle.outputs:,}",
            "text": f"attention outputs checked against 64-bit arithmetic; the worst used {100 * worst:.0f} % of its allowed error",
        },
        {
            "good": caught == len(oracle.controls),
            "number": f"{caught} of {len(oracle.controls)}",
            "text": "deliberate mistakes were caught by the same check",
        },
        {
            "good": not result.integrity,
            "number": f"{len(result.steps)} steps",
            "text": "of continuous batching, the rules of the page cache checked after each",
        },
    ]


def _problems(result: DemoResult) -> list[str]:
    wrong = [
        f"request {r.log.name}: got {r.log.tokens}, stock has {r.expected}" for r in result.requests if not r.is_equal
    ]
    missed = [f"control not caught: {control.name}" for control in result.oracle.controls if not control.is_caught]
    return [*wrong, *result.oracle.failures[:20], *result.integrity[:20], *missed]


def _sharing(result: DemoResult) -> str:
    """Sentences on who shared, found or waited; empty when nobody did."""
    said = []
    for log in (request.log for request in result.requests):
        if log.shared_tokens:
            said.append(
                f"Request {log.name} began with the same {log.shared_tokens} tokens as a request that was running, so the two share pages."
            )
        if log.cached_tokens:
            said.append(
                f"Request {log.name} found the first {log.cached_tokens} of its {log.prompt_tokens} tokens in the pages of one that had left."
            )
        if log.joined > log.arrived:
            said.append(
                f"Request {log.name} came in step {log.arrived} and had to wait for room until step {log.joined}."
            )
    return " ".join(said)


def _last(sweep: list[Rate], name: str, s_k: int | None = None) -> Rate | None:
    found = [rate for rate in sweep if rate.name == name and (s_k is None or rate.s_k == s_k)]
    return found[-1] if found else None


def _texts(result: DemoResult) -> dict[str, str]:
    """Sentences that depend on the numbers."""
    sweep = result.sweep
    plain = sweep[0].name
    mla, mha = (next(form for form in result.forms if form.name == name) for name in ("MLA", "MHA"))
    texts = {
        "memory_text": f"Per token and layer, DeepSeek-V3 keeps {mla.deepseek_v3_bytes:,} bytes where ordinary attention (MHA) with its "
        f"heads would keep {mha.deepseek_v3_bytes:,}: {mha.deepseek_v3_bytes / mla.deepseek_v3_bytes:.0f} times as much. The gain grows with the "
        f"number of heads; with the {result.model['heads']} heads here it is {mha.demo_bytes / mla.demo_bytes:.1f} times.",
        "sweep_text": "The same data is read again and again, so short contexts come from the processor's cache, long ones from memory.",
        "expanded_text": "not measured in this run.",
        "bandwidth_text": "Higher is better. Dotted, in the colour of each line: the most this machine allows. "
        + _limit_text(result),
    }
    expanded = _last(sweep, "expanded")
    same = _last(sweep, plain, expanded.s_k) if expanded else None
    if expanded and same:
        texts["expanded_text"] = (
            f"at {expanded.s_k} tokens that took {expanded.seconds / same.seconds:.0f} times as long ({duration(expanded.seconds)} against "
            f"{duration(same.seconds)})."
        )
    return texts


def _limit_text(result: DemoResult) -> str:
    bounds = {rate.bound for rate in result.sweep if rate.name != "expanded"}
    read = f"{result.roof['read_gbps']:.3g} GB/s"
    if bounds == {"memory"}:
        return f"It reads memory at {read}."
    return (
        f"It reads memory at {read}, but with {result.model['heads']} heads each note is used for so many multiplications that "
        "arithmetic is the tighter limit; the table below names the limit of each point."
    )


def render_demo_report(result: DemoResult, path: Path) -> None:
    """Write the page to `path`. Raises ConfigError when the folder is not there or cannot be written."""
    check_installed()
    from jinja2 import Environment, PackageLoader

    from openmla.lab.demo import figures

    environment = Environment(loader=PackageLoader("openmla.lab", "templates"), autoescape=True, trim_blocks=True)
    environment.filters |= {"duration": duration, "times": _times}
    oracle = result.oracle
    logs = [request.log for request in result.requests]
    content = environment.get_template("demo.html.j2").render(
        verdict="OpenMLA writes what the reference writes" if result.passed else "Something is wrong",
        lead=f"A DeepSeek-V3-shaped model served {len(logs)} requests through OpenMLA's paged cache on {result.machine}, "
        "and every step of it was checked.",
        tiles=_tiles(result),
        problems=_problems(result),
        speeds=_speeds(result),
        sharing=_sharing(result),
        rules=[
            {
                "name": rule,
                "meaning": meaning,
                "ratio": oracle.worst.get(rule, 0.0),
                "used": f"{100 * oracle.worst.get(rule, 0.0):.0f} %" if rule not in ("NONFINITE", "CONTRACT") else
                ("kept" if oracle.worst.get(rule, 0.0) <= 1 else "broken"),
                "where": oracle.where.get(rule, "") if rule not in ("NONFINITE", "CONTRACT") else "everywhere",
            }
            for rule, meaning in _MEANING.items()
        ],
        mla=next(form for form in result.forms if form.name == "MLA"),
        versions_text=", ".join(f"{name} {version}" for name, version in result.versions.items()),
        schedule=figures.schedule(logs, result.steps, result.num_pages),
        time=figures.decode_time(result.sweep),
        bandwidth=figures.decode_bandwidth(result.sweep, result.roof["read_gbps"]),
        memory_demo=figures.kv_memory(result.forms, is_deepseek=False, layers=result.model["layers"]),
        memory_deepseek=figures.kv_memory(result.forms, is_deepseek=True, layers=result.model["layers"]),
        seconds=result.seconds,
        **_texts(result),
        **{key: getattr(result, key) for key in asdict(result)},
    )  # fmt: skip
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write the report to {path}: {error.strerror}; give another path with --out"
        ) from error
