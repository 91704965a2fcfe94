"""The command line: every verb parses, makes one library call, and prints.

Exit codes: 0 fine, 1 a finding (something is wrong, slow or red), 2 the command itself was wrong, 130 interrupted.
Results go to standard output, as text or with --json as one JSON object; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openmla.cli import laboratory
from openmla.cli.arguments import SHAPES, add_device, add_verb, check_compiler, new_file, positive, positive_number
from openmla.cli.output import JSON_SCHEMA, fold, print_json, say
from openmla.core.errors import ConfigError, OpenMLAError

# Modules behind the verbs are imported inside them: `openmla --help` must not wait a second for PyTorch.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except OpenMLAError as error:
        say(f"openmla {args.verb}: {error}")
        return 2
    except KeyboardInterrupt:
        say(f"openmla {args.verb}: interrupted")
        return 130
    except BrokenPipeError:
        # The reader went away (`openmla doctor | head`); Python would complain again while closing the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openmla", description="Multi-head Latent Attention for inference.")
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_doctor(verbs)
    _add_explain(verbs)
    _add_demo(verbs)
    laboratory.add_bench(verbs)
    laboratory.add_report(verbs)
    laboratory.add_roofline(verbs)
    laboratory.add_profile(verbs)
    laboratory.add_tune(verbs)
    laboratory.add_study(verbs)
    _add_verify(verbs)
    _add_compile(verbs)
    _add_learn(verbs)
    return parser


def _version() -> str:
    import openmla

    return f"openmla {openmla.__version__}"


# doctor


def _add_doctor(verbs: Any) -> None:
    add_verb(verbs, "doctor", _doctor, "what this machine can run, what it cannot, why, and the fix")


def _doctor(args: argparse.Namespace) -> int:
    import logging

    from openmla.observe import doctor

    logging.getLogger("openmla").setLevel(logging.ERROR)  # what was passed over stands in the report itself
    diagnosis = doctor.examine()
    if args.json:
        print_json(diagnosis.as_dict())
    else:
        print(diagnosis)
    return 0 if diagnosis.is_healthy else 1


# explain

_SHAPE = {
    **{name: SHAPES[name] for name in ("batch", "s_q", "h_q", "h_kv", "d_qk", "d_v", "page_size")},
    "topk": "selected slots of a query token",
    "s_kv": "rows that sparse prefill selects from",
}


def _add_explain(verbs: Any) -> None:
    parser = add_verb(verbs, "explain", _explain, "which kernel a problem gets, and why not the others")
    parser.add_argument("op", nargs="?", help="decode, sparse_decode, sparse_prefill, prefill or append; default: all")
    parser.add_argument("--target", metavar="NAME", help="a preset such as h100_sxm; default: this machine")
    parser.add_argument("--backend", metavar="NAME", help="auto, cute, triton or torch; default: OPENMLA_BACKEND")
    for name, meaning in _SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, metavar="N", help=meaning)
    parser.add_argument("--s-k", type=positive, metavar="N", help="keys per request that the block table can hold")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the queries")
    parser.add_argument("--kv-layout", metavar="NAME", help="bf16_576, fp8_656, ...")
    parser.add_argument("--causal", action="store_true", default=None, help="a query sees no later key")
    parser.add_argument("--mod", action="append", metavar="NAME", help="'soft_cap(30.0)', alibi, my_module:my_mod, ...")


def _explain(args: argparse.Namespace) -> int:
    from openmla import backends

    ops = backends.OPS if args.op is None else (args.op,)
    found = [
        backends.explain(_asked_problem(args, op), target=args.target, backend=args.backend) for op in ops
    ]  # fmt: skip
    if args.json:
        print_json({"schema": JSON_SCHEMA, "explanations": [each.as_dict() for each in found]})
    else:
        print("\n\n".join(fold(str(each)) for each in found))
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


# demo


def _add_demo(verbs: Any) -> None:
    parser = add_verb(verbs, "demo", _demo, "a real MLA model through the paged latent cache, checked and measured")
    parser.add_argument("--out", type=new_file, default=Path("openmla-report.html"), help="the HTML report")
    parser.add_argument("--seed", type=int, default=0, help="of the dice that choose among likely tokens; default: 0")
    add_device(parser)
    parser.add_argument("--quick", action="store_true", help="a smaller run of some seconds")


def _demo(args: argparse.Namespace) -> int:
    from openmla.lab import progress
    from openmla.lab.demo import report, run

    try:
        with progress.on_stderr() as say:
            result = run.run_demo(out=args.out, seed=args.seed, device=args.device, quick=args.quick, progress=say)
    except ImportError as error:
        if (error.name or "").startswith("openmla"):
            raise
        fix = "" if "pip install" in str(error) else "; the demo needs: pip install 'openmla[demo]'"
        raise ConfigError(f"{error}{fix}") from error
    if args.json:
        print_json(result.as_dict())
    else:
        print(report.summary(result))
    return 0 if result.passed else 1


# verify


def _add_verify(verbs: Any) -> None:
    parser = add_verb(verbs, "verify", _verify, "compare every kernel that runs here with the fp64 oracle")
    parser.add_argument("--op", action="append", metavar="NAME", help="repeatable; default: all")
    parser.add_argument("--backend", action="append", metavar="NAME", help="repeatable; default: all that run here")
    parser.add_argument(
        "--cases",
        type=positive,
        default=200,
        metavar="N",
        help="at most so many per operation and backend; default: 200",
    )
    parser.add_argument("--seconds", type=positive_number, default=60.0, help="stop after so long; default: 60")
    parser.add_argument("--seed", type=int, default=0, help="the first case")
    add_device(parser)


def _verify(args: argparse.Namespace) -> int:
    from openmla.lab import verify

    record = verify.verify(
        ops=args.op, backends=args.backend, cases=args.cases, seconds=args.seconds, seed=args.seed,
        device=args.device, progress=say,
    )  # fmt: skip
    if args.json:
        print_json(record.as_dict())
    else:
        print(fold(str(record)))
    return 0 if record.passed else 1


# compile


def _add_compile(verbs: Any) -> None:
    parser = add_verb(
        verbs, "compile", _compile, "compile the Hopper kernels into a bundle, on any machine with the DSL"
    )
    parser.add_argument(
        "--arch", choices=("sm_90a",), default="sm_90a", help="Hopper, the one there is; no GPU is needed"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the bundle")
    parser.add_argument(
        "--mods", action="append", nargs="+", default=[], metavar="NAME",
        help="also what inlines these together, such as 'soft_cap(30.0)' my_module:my_mod; repeatable",
    )  # fmt: skip


def _compile(args: argparse.Namespace) -> int:
    from openmla.backends.cute import bundle, families
    from openmla.mods import named

    check_compiler()
    manifest = bundle.build(args.out, families.with_mods([named(each) for each in args.mods]), say)
    if args.json:
        print_json({"schema": JSON_SCHEMA, "arch": args.arch, "manifest": str(manifest)})
    else:
        print(f"wrote {manifest}; point OPENMLA_AOT_DIR at its folder")
    return 0


# learn


def _add_learn(verbs: Any) -> None:
    parser = add_verb(
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
        print_json({"schema": JSON_SCHEMA, **found.as_dict()})
    else:
        print(found)
    return 0 if found.passed else 1
