"""The command line: every verb parses, makes one library call, and prints.

Exit codes: 0 fine, 1 a finding (something is wrong, slow or red), 2 the command itself was wrong, 130 interrupted.
Results go to standard output, as text or with --json as one JSON object; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openmla.core.errors import ConfigError, OpenMLAError

_WIDTH = 100
_JSON_SCHEMA = 1  # of explain and bench; doctor, demo and verify carry their own

# Modules behind the verbs are imported inside them: `openmla --help` must not wait a second for PyTorch.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except OpenMLAError as error:
        _say(f"openmla {args.verb}: {error}")
        return 2
    except KeyboardInterrupt:
        _say(f"openmla {args.verb}: interrupted")
        return 130
    except BrokenPipeError:
        # The reader went away (`openmla doctor | head`); Python would complain again while closing the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openmla", description="Multi-head Latent Attention for inference.")
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_doctor(verbs)
    _add_explain(verbs)
    _add_demo(verbs)
    _add_bench(verbs)
    _add_report(verbs)
    _add_roofline(verbs)
    _add_profile(verbs)
    _add_tune(verbs)
    _add_study(verbs)
    _add_verify(verbs)
    _add_compile(verbs)
    _add_learn(verbs)
    return parser


def _version() -> str:
    import openmla

    return f"openmla {openmla.__version__}"


def _verb(verbs: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


# doctor


def _add_doctor(verbs: Any) -> None:
    _verb(verbs, "doctor", _doctor, "what this machine can run, what it cannot, why, and the fix")


def _doctor(args: argparse.Namespace) -> int:
    import logging

    from openmla.observe import doctor

    logging.getLogger("openmla").setLevel(logging.ERROR)  # what was passed over stands in the report itself
    diagnosis = doctor.examine()
    if args.json:
        _print_json(diagnosis.as_dict())
    else:
        print(diagnosis)
    return 0 if diagnosis.is_healthy else 1


# explain

_SHAPE = ("batch", "s_q", "h_q", "h_kv", "d_qk", "d_v", "page_size", "topk", "s_kv")


def _add_explain(verbs: Any) -> None:
    parser = _verb(verbs, "explain", _explain, "which kernel a problem gets, and why not the others")
    parser.add_argument("op", nargs="?", help="decode, sparse_decode, sparse_prefill or prefill; default: all four")
    parser.add_argument("--target", metavar="NAME", help="a preset such as h100_sxm; default: this machine")
    parser.add_argument("--backend", metavar="NAME", help="auto, cute, triton or torch; default: OPENMLA_BACKEND")
    for name in _SHAPE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=_positive, metavar="N")
    parser.add_argument("--s-k", type=_positive, metavar="N", help="keys per request that the block table can hold")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--kv-layout", metavar="NAME", help="bf16_576, fp8_656, ...")
    parser.add_argument("--causal", action="store_true", default=None)
    parser.add_argument("--mod", action="append", metavar="NAME", help="'soft_cap(30.0)', alibi, my_module:my_mod, ...")


def _explain(args: argparse.Namespace) -> int:
    from openmla import backends

    ops = backends.OPS if args.op is None else (args.op,)
    found = [
        backends.explain(_asked_problem(args, op), target=args.target, backend=args.backend) for op in ops
    ]  # fmt: skip
    if args.json:
        _print_json({"schema": _JSON_SCHEMA, "explanations": [each.as_dict() for each in found]})
    else:
        print("\n\n".join(_fold(str(each)) for each in found))
    return 0 if all(each.chosen for each in found) else 1


def _asked_problem(args: argparse.Namespace, op: str) -> Any:
    """The typical problem of `op` with the command line's shape put in. Raises ConfigError for a key it lacks."""
    from openmla import backends
    from openmla.core.layout import kv_layout
    from openmla.lab.suite import DTYPES

    problem: Any = backends.typical_problem(op)
    names = {field.name for field in dataclasses.fields(problem)}
    changes: dict[str, Any] = {name: getattr(args, name) for name in _SHAPE if getattr(args, name) is not None}
    if args.dtype:
        changes["dtype"] = DTYPES[args.dtype]
    if args.kv_layout:
        changes["layout"] = kv_layout(args.kv_layout)
        changes.setdefault("d_qk", changes["layout"].d_qk)
    elif "layout" in names and (args.dtype or args.d_qk) and not problem.layout.is_quantised:
        changes["layout"] = kv_layout(f"{args.dtype or 'bf16'}_{changes.get('d_qk', problem.d_qk)}")
    if args.causal:
        changes["is_causal"] = True
    if args.mod:
        from openmla.mods import named

        changes["mods"] = named(args.mod)
    if args.s_k:
        changes["max_pages"] = -(-args.s_k // changes.get("page_size", getattr(problem, "page_size", 64)))
    strangers = sorted(set(changes) - names)
    if strangers:
        raise ConfigError(f"{op} has no {', '.join(strangers)}; it has: {', '.join(sorted(names))}")
    if {"batch", "s_q"} & set(changes) and "total_q" in names:
        batch, s_q = (changes.get(key, getattr(problem, key)) for key in ("batch", "s_q"))
        changes["total_q"] = batch * s_q
    return dataclasses.replace(problem, **changes)


def _fold(text: str) -> str:
    """Long lines cut at 100 columns, continued under their own indentation."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        lines += textwrap.wrap(line, _WIDTH, subsequent_indent=indent, drop_whitespace=True) or [""]
    return "\n".join(lines)


# demo


def _add_demo(verbs: Any) -> None:
    parser = _verb(verbs, "demo", _demo, "a real MLA model through the paged latent cache, checked and measured")
    parser.add_argument("--out", type=Path, default=Path("openmla-report.html"), help="the HTML report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="a smaller run of some seconds")


def _demo(args: argparse.Namespace) -> int:
    from openmla.lab import demo, progress

    try:
        with progress.on_stderr() as say:
            result = demo.run_demo(out=args.out, seed=args.seed, device=args.device, quick=args.quick, progress=say)
    except ImportError as error:
        if (error.name or "").startswith("openmla"):
            raise
        fix = "" if "pip install" in str(error) else "; the demo needs: pip install 'openmla[demo]'"
        raise ConfigError(f"{error}{fix}") from error
    if args.json:
        _print_json(result.as_dict())
    else:
        print(result)
    return 0 if result.passed else 1


# bench

_SWEEPS = {
    "batch": "requests",
    "s_q": "query tokens per request",
    "h_q": "query heads",
    "h_kv": "KV heads",
    "s_k": "keys per request",
    "d_qk": "columns of a key",
    "d_v": "columns of a value",
    "dtype": "bf16, fp16, fp32",
    "layout": "plain or a byte layout such as fp8_656",
    "page_size": "tokens per page",
    "lengths": "fixed, varlen",
    "policy": "balanced, batch_invariant",
    "cache": "cold, warm",
}


def _add_bench(verbs: Any) -> None:
    parser = _verb(verbs, "bench", _bench, "measure a suite or a sweep: gate, then everybody in turn, rows as JSONL")
    _add_cases(parser)
    parser.add_argument("--backend", action="append", metavar="NAME", help="repeatable; default: OPENMLA_BACKEND")
    parser.add_argument(
        "--peer", action="append", metavar="NAME", help="repeatable; none for no peer; default: the suite's"
    )
    parser.add_argument("--seconds", type=_seconds, default=1.5, help="per contender and case; default: 1.5")
    _add_device(parser)
    parser.add_argument("--out", type=Path, metavar="ROWS.jsonl", help="append rows to this file")
    parser.add_argument(
        "--resume", action="store_true", help="leave out cases that --out holds of this commit and machine"
    )
    parser.add_argument("--list", action="store_true", help="print the case names and stop")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")


def _add_cases(parser: argparse.ArgumentParser) -> None:
    """What to look at: a suite, or a sweep made on the spot."""
    parser.add_argument("--suite", metavar="NAME|PATH", help="default: smoke, unless a sweep is given")
    parser.add_argument("--case", metavar="GLOB", help="only cases whose name matches, such as '*hq16*'")
    group = parser.add_argument_group(
        "sweep", "instead of a suite: every combination of the values given, such as --s-k 1k..32k --h-q 16,128"
    )
    for name, meaning in _SWEEPS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=_choices, metavar="A,B,..", help=meaning)
    group.add_argument("--causal", action="store_true", help="queries are the last tokens and see no later key")


def _choices(text: str) -> list[int | str]:
    """`1,4,16`, `1k..32k` (doubling) or words; k is 1024."""
    found: list[int | str] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        if dots:
            low, high = _number(first), _number(last)
            if not isinstance(low, int) or not isinstance(high, int) or low < 1:
                raise argparse.ArgumentTypeError(f"a range is two numbers such as 1k..32k, got {part!r}")
            while low <= high:
                found.append(low)
                low *= 2
        else:
            found.append(_number(part))
    return found


def _number(text: str) -> int | str:
    text = text.strip()
    digits = text[:-1] if text.endswith("k") else text
    return int(digits) * (1024 if text.endswith("k") else 1) if digits.isdecimal() else text


def _chosen_cases(args: argparse.Namespace, default: str = "smoke") -> tuple[Any, Any]:
    """(suite, cases) of the command line. Raises ConfigError for a suite and a sweep at once."""
    from openmla.lab import suite as suites

    choices: dict[str, Any] = {name: getattr(args, name) for name in _SWEEPS if getattr(args, name) is not None}
    if args.causal:
        choices["is_causal"] = True
    if choices and args.suite:
        raise ConfigError(f"--suite {args.suite} holds its own cases; leave out {', '.join(choices)}, or the suite")
    suite = suites.sweep(choices, ("sdpa",)) if choices else suites.load(args.suite or default)
    return suite, suite.matching(args.case)


def _bench(args: argparse.Namespace) -> int:
    suite, cases = _chosen_cases(args)
    if args.list:
        names = [case.name for case in cases]
        record = {"schema": _JSON_SCHEMA, "suite": suite.name, "cases": names}
        _print_json(record) if args.json else print(*names, sep="\n")
        return 0
    return _bench_cases(args, suite, cases)


def _known_backends(names: Sequence[str] | None) -> tuple[str, ...]:
    """The backends asked for, default OPENMLA_BACKEND. Raises ConfigError for an unknown one."""
    from openmla.backends import BACKENDS
    from openmla.core import env

    for name in names or ():
        if name not in ("auto", *BACKENDS):
            raise ConfigError(f"unknown backend {name!r}; use one of: auto, {', '.join(BACKENDS)}")
    return tuple(names or (env.BACKEND.read(),))


def _bench_cases(args: argparse.Namespace, suite: Any, cases: Any) -> int:
    from openmla.core.target import Target
    from openmla.lab import bars, peers, progress, runner, store, table

    backends = _known_backends(args.backend)
    chosen = None if args.peer is None else tuple(name for name in args.peer if name != "none")
    unknown = [name for name in chosen or () if name not in peers.PEERS]
    if unknown:
        raise ConfigError(f"unknown peer {unknown[0]!r}; use one of: {', '.join(peers.PEERS)}, none")
    options = runner.Options(backends, chosen, args.seconds)
    target = Target.detect(args.device)
    rows = bars.resumed(args.out, target, _say) if args.resume else []
    kept = {row.case for row in rows}
    cases = [case for case in cases if case.name not in kept]
    results = []
    with progress.on_stderr() as say:
        for result in runner.run(suite, cases, options, target, say):
            results.append(result)
            if args.out:
                store.append(args.out, result.rows)
            if not args.json:
                print(table.case_table(result), end="\n\n", flush=True)
    rows += [row for result in results for row in result.rows]
    judged = bars.judge(suite.bars, [case.name for case in suite.cases], rows)
    if args.json:
        found = {"results": [each.as_dict() for each in results], "bars": [each.as_dict() for each in judged]}
        _print_json({"schema": _JSON_SCHEMA, "suite": suite.name, **found})
    elif judged:
        print(bars.table_text(judged))
    is_missed = any(each.verdict == "missed" for each in judged)
    return 1 if is_missed or any(each.wrong for each in results) else 0


# report


def _add_report(verbs: Any) -> None:
    parser = _verb(verbs, "report", _report, "what a file of rows says: speed, speed-ups, bars, memory; or two files")
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS.jsonl", help="written by openmla bench --out")
    parser.add_argument("--against", type=Path, metavar="OLDER.jsonl", help="compare with the same cases in this file")
    parser.add_argument("--out", type=Path, metavar="PAGE.html", help="also write a page that holds everything")


def _report(args: argparse.Namespace) -> int:
    from openmla.lab import report, report_page

    found = report.read(args.rows, args.against)
    _show(args, found, report_page.page)
    return 1 if any(each.verdict == "slower" for each in found.changes) else 0


# roofline


def _add_roofline(verbs: Any) -> None:
    parser = _verb(verbs, "roofline", _roofline, "ceilings of this machine, where each case stands, what bounds it")
    _add_cases(parser)
    parser.add_argument("--target", metavar="NAME", help="nothing runs: rates of a data sheet, such as h100_sxm")
    parser.add_argument("--rows", type=Path, metavar="ROWS.jsonl", help="nothing runs: cases and rates of this file")
    parser.add_argument("--backend", action="append", metavar="NAME", help="repeatable; default: OPENMLA_BACKEND")
    parser.add_argument("--seconds", type=_seconds, default=0.5, help="per rate and case; default: 0.5")
    _add_device(parser)
    parser.add_argument("--out", type=Path, metavar="PAGE.html", help="also write a page")


def _roofline(args: argparse.Namespace) -> int:
    from openmla.core.target import Target
    from openmla.lab import progress, roofline, store

    if args.rows and args.target:
        raise ConfigError("--rows carries its own rates; leave out --target, or the rows")
    if args.rows:
        found = roofline.from_rows(store.read(args.rows))
    else:
        suite, cases = _chosen_cases(args)
        if args.target:
            found = roofline.planned(cases, roofline.data_sheet(args.target))
        else:
            backends = _known_backends(args.backend)
            with progress.on_stderr() as say:
                found = roofline.run(suite, cases, Target.detect(args.device), backends, args.seconds, say)
    _show(args, found, roofline.page)
    return 0


def _show(args: argparse.Namespace, found: Any, as_page: Any) -> None:
    """A result as text or JSON, and as a page where one was asked for."""
    if args.out:
        from openmla.lab import page

        page.check_installed()
        page.write(as_page(found), args.out)
    if args.json:
        _print_json({**found.as_dict(), "page": str(args.out) if args.out else None})
    else:
        print(_fold(str(found)))
        print(f"page: {args.out}" if args.out else "a page with figures: add --out page.html")


# profile


def _add_profile(verbs: Any) -> None:
    parser = _verb(verbs, "profile", _profile, "where the time of a case goes, and what it asks of the memory")
    _add_cases(parser)
    parser.add_argument("--tool", metavar="NAME", default="auto", help="auto, ncu, torch or counters; default: auto")
    parser.add_argument("--backend", metavar="NAME", help="default: OPENMLA_BACKEND")
    parser.add_argument("--seconds", type=_seconds, default=0.3, help="for the time without the tool; default: 0.3")
    _add_device(parser)
    parser.add_argument(
        "--record", type=Path, metavar="FILE.json", help="show what --json wrote elsewhere; nothing runs"
    )
    parser.add_argument("--out", type=Path, metavar="PAGE.html", help="also write a page")


def _profile(args: argparse.Namespace) -> int:
    from openmla.core.target import Target
    from openmla.lab import profile, profile_page, progress

    if args.record:
        _show(args, profile.load(args.record), profile_page.page)
        return 0
    _, cases = _chosen_cases(args)
    (backend,) = _known_backends([args.backend] if args.backend else None)
    with progress.on_stderr() as say:
        found = profile.profile(
            cases, Target.detect(args.device), tool=args.tool, backend=backend, seconds=args.seconds, say=say
        )
    _show(args, found, profile_page.page)
    return 0 if found.profiles else 1


# tune


def _add_tune(verbs: Any) -> None:
    parser = _verb(verbs, "tune", _tune, "search a kernel's settings on this machine; what each parameter is worth")
    _add_cases(parser)
    parser.add_argument("--backend", metavar="NAME", help="default: OPENMLA_BACKEND")
    parser.add_argument("--seconds", type=_seconds, default=0.3, help="per setting and sweep; default: 0.3")
    _add_device(parser)
    parser.add_argument("--trials", type=Path, metavar="TRIALS.jsonl", help="append trials here, and continue from it")
    parser.add_argument("--table", type=Path, metavar="TUNED.json", help="write the tuned table with its provenance")
    parser.add_argument("--record", type=Path, metavar="TUNED.json", help="show a table made elsewhere; nothing runs")
    parser.add_argument("--out", type=Path, metavar="PAGE.html", help="also write a page")


def _tune(args: argparse.Namespace) -> int:
    from openmla.core.target import Target
    from openmla.lab import progress, tune

    if args.record:
        _show(args, tune.load(args.record), tune.page)
        return 0
    _, cases = _chosen_cases(args)
    (backend,) = _known_backends([args.backend] if args.backend else None)
    with progress.on_stderr() as say:
        found = tune.tune(
            cases, Target.detect(args.device), backend=backend, seconds=args.seconds, trials=args.trials, say=say
        )
    if args.table:
        tune.write(found, args.table)
    _show(args, found, tune.page)
    return 0 if found.entries else 1


# study


def _add_study(verbs: Any) -> None:
    parser = _verb(
        verbs, "study", _study, "MLA against MHA, GQA and MQA: bytes, FLOPs, precision, cost per million tokens"
    )
    parser.add_argument("--target", default="h100_sxm", metavar="NAME", help="whose roof: a preset, or here to measure")
    parser.add_argument("--heads", type=_positive, default=128, metavar="N", help="query heads; default: 128")
    parser.add_argument("--layers", type=_positive, default=61, metavar="N", help="of the model that is priced; 61")
    parser.add_argument("--price", type=_seconds, default=2.0, help="of a card for an hour, any currency; default: 2")
    parser.add_argument("--trained", type=Path, metavar="ROWS.jsonl", help="outcomes of python -m openmla.lab.quality")
    parser.add_argument("--memory", type=_seconds, default=80.0, metavar="GIB", help="of one card; default: 80")
    parser.add_argument("--seconds", type=_seconds, default=0.2, help="per rate and size measured; default: 0.2")
    parser.add_argument("--out", type=Path, metavar="PAGE.html", help="also write a page")


def _study(args: argparse.Namespace) -> int:
    from openmla.lab import progress, study, study_page

    with progress.on_stderr() as say:
        found = study.study(
            target=args.target, h_q=args.heads, layers=args.layers, per_hour=args.price, memory_gib=args.memory,
            seconds=args.seconds, trained=args.trained, say=say,
        )  # fmt: skip
    _show(args, found, study_page.page)
    return 0


# verify


def _add_verify(verbs: Any) -> None:
    parser = _verb(verbs, "verify", _verify, "compare every kernel that runs here with the fp64 oracle")
    parser.add_argument("--op", action="append", metavar="NAME", help="repeatable; default: all")
    parser.add_argument("--backend", action="append", metavar="NAME", help="repeatable; default: all that run here")
    parser.add_argument("--cases", type=_positive, default=200, help="at most so many per operation and backend")
    parser.add_argument("--seconds", type=_seconds, default=60.0, help="stop after so long; default: 60")
    parser.add_argument("--seed", type=int, default=0, help="the first case")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")


def _verify(args: argparse.Namespace) -> int:
    from openmla.lab import verify

    record = verify.verify(
        ops=args.op, backends=args.backend, cases=args.cases, seconds=args.seconds, seed=args.seed,
        device=args.device, progress=_say,
    )  # fmt: skip
    if args.json:
        _print_json(record.as_dict())
    else:
        print(_fold(str(record)))
    return 0 if record.passed else 1


# compile


def _add_compile(verbs: Any) -> None:
    parser = _verb(verbs, "compile", _compile, "compile the Hopper kernels into a bundle, on any machine with the DSL")
    parser.add_argument("--arch", choices=("sm_90a",), default="sm_90a")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the bundle")


def _compile(args: argparse.Namespace) -> int:
    from openmla.backends.cute import bundle, decode

    manifest = bundle.build(args.out, decode.FAMILIES, _say)
    if args.json:
        _print_json({"schema": _JSON_SCHEMA, "arch": args.arch, "manifest": str(manifest)})
    else:
        print(f"wrote {manifest}; point OPENMLA_AOT_DIR at its folder")
    return 0


# learn


def _add_learn(verbs: Any) -> None:
    parser = _verb(
        verbs, "learn", _learn, "exercises that a machine checks, with hints; progress stays on this machine"
    )
    parser.add_argument("name", nargs="?", help="an exercise; default: the list, and what is solved")
    parser.add_argument("--check", action="store_true", help="judge your file instead of showing the task")
    parser.add_argument("--file", type=Path, metavar="FILE.py", help="your file; default: NAME.py in this folder")


def _learn(args: argparse.Namespace) -> int:
    from openmla.learn import course, report

    if args.name is None and (args.check or args.file):
        raise ConfigError("--check and --file belong to an exercise; name one, `openmla learn` lists them")
    if args.name is None:
        found: Any = report.overview()
    elif args.check:
        found = report.checked(course.exercise(args.name), args.file or Path(f"{args.name}.py"))
    else:
        found = report.begun(course.exercise(args.name), args.file or Path(f"{args.name}.py"))
    if args.json:
        _print_json({"schema": _JSON_SCHEMA, **found.as_dict()})
    else:
        print(found)
    return 0 if found.passed else 1
