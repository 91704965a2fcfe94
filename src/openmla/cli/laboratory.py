"""The verbs of the laboratory: bench, report, roofline, profile, tune, study. Modules behind them are imported inside."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from openmla.cli import output
from openmla.cli.arguments import (
    add_cases,
    add_device,
    add_page,
    add_verb,
    check_compiler,
    chosen_cases,
    known_backends,
    new_file,
    positive,
    positive_number,
)
from openmla.cli.output import JSON_SCHEMA, print_json, show
from openmla.core.errors import ConfigError

# bench


def add_bench(verbs: Any) -> None:
    """`openmla bench`."""
    parser = add_verb(verbs, "bench", _bench, "measure a suite or a sweep: gate, then everybody in turn, rows as JSONL")
    add_cases(parser)
    parser.add_argument("--backend", action="append", metavar="NAME", help="repeatable; default: OPENMLA_BACKEND")
    parser.add_argument(
        "--peer", action="append", metavar="NAME", help="repeatable; none for no peer; default: the suite's"
    )
    parser.add_argument("--seconds", type=positive_number, default=1.5, help="per contender and case; default: 1.5")
    add_device(parser)
    parser.add_argument("--out", type=Path, metavar="ROWS.jsonl", help="append rows to this file")
    parser.add_argument(
        "--resume", action="store_true", help="leave out cases that --out holds of this commit and machine"
    )
    parser.add_argument("--list", action="store_true", help="print the case names and stop")


def _bench(args: argparse.Namespace) -> int:
    suite, cases = chosen_cases(args)
    if args.list:
        names = [case.name for case in cases]
        record = {"schema": JSON_SCHEMA, "suite": suite.name, "cases": names}
        print_json(record) if args.json else print(*names, sep="\n")
        return 0
    return _bench_cases(args, suite, cases)


def _bench_cases(args: argparse.Namespace, suite: Any, cases: Any) -> int:
    from openmla.core.target import Target
    from openmla.lab import bars, peers, progress, runner, store, table

    backends = known_backends(args.backend)
    chosen = None if args.peer is None else tuple(name for name in args.peer if name != "none")
    unknown = [name for name in chosen or () if name not in peers.PEERS]
    if unknown:
        raise ConfigError(f"unknown peer {unknown[0]!r}; use one of: {', '.join(peers.PEERS)}, none")
    options = runner.Options(backends, chosen, args.seconds)
    target = Target.detect(args.device)
    rows = bars.resumed(args.out, target, output.say) if args.resume else []
    kept = {row.case for row in rows}
    cases = [case for case in cases if case.name not in kept]
    if args.out:
        store.append(args.out, [])  # a file that cannot be written is an error before the measurement
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
        print_json({"schema": JSON_SCHEMA, "suite": suite.name, **found})
    elif judged:
        print(bars.table_text(judged))
    is_missed = any(each.verdict == "missed" for each in judged)
    return 1 if is_missed or any(each.wrong for each in results) else 0


# report


def add_report(verbs: Any) -> None:
    """`openmla report`."""
    parser = add_verb(
        verbs, "report", _report, "what a file of rows says: speed, speed-ups, bars, memory; or two files"
    )
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS.jsonl", help="written by openmla bench --out")
    parser.add_argument("--against", type=Path, metavar="OLDER.jsonl", help="compare with the same cases in this file")
    add_page(parser, "also write a page that holds everything")
    parser.add_argument(
        "--into", type=Path, action="append", default=[], metavar="PAGE.md",
        help="fill the places of this file in a Markdown page (<!-- rows: ROWS.jsonl, times -->); repeatable",
    )  # fmt: skip


def _report(args: argparse.Namespace) -> int:
    from openmla.lab import report, report_markdown, report_page

    found = report.read(args.rows, args.against)
    for path in args.into:
        report_markdown.write(found, path)
    show(args, found, report_page.page)
    return 1 if any(each.verdict == "slower" for each in found.changes) else 0


# roofline


def add_roofline(verbs: Any) -> None:
    """`openmla roofline`."""
    parser = add_verb(verbs, "roofline", _roofline, "ceilings of this machine, where each case stands, what bounds it")
    add_cases(parser)
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="nothing runs: rates of a data sheet, such as h100_sxm; default suite: decode_dense",
    )
    parser.add_argument("--rows", type=Path, metavar="ROWS.jsonl", help="nothing runs: cases and rates of this file")
    parser.add_argument("--backend", action="append", metavar="NAME", help="repeatable; default: OPENMLA_BACKEND")
    parser.add_argument("--seconds", type=positive_number, default=0.5, help="per rate and case; default: 0.5")
    add_device(parser)
    add_page(parser)


def _roofline(args: argparse.Namespace) -> int:
    from openmla.core.target import Target
    from openmla.lab import progress, roofline, store

    if args.rows and args.target:
        raise ConfigError("--rows carries its own rates; leave out --target, or the rows")
    if args.rows:
        found = roofline.from_rows(store.read(args.rows))
    else:
        suite, cases = chosen_cases(args, "decode_dense" if args.target else "smoke")
        if args.target:
            found = roofline.planned(cases, roofline.data_sheet(args.target))
        else:
            backends = known_backends(args.backend)
            with progress.on_stderr() as say:
                found = roofline.run(suite, cases, Target.detect(args.device), backends, args.seconds, say)
    show(args, found, roofline.page)
    return 0


# profile


def add_profile(verbs: Any) -> None:
    """`openmla profile`."""
    parser = add_verb(verbs, "profile", _profile, "where the time of a case goes, and what it asks of the memory")
    add_cases(parser)
    parser.add_argument("--tool", metavar="NAME", default="auto", help="auto, ncu, torch or counters; default: auto")
    parser.add_argument("--backend", metavar="NAME", help="default: OPENMLA_BACKEND")
    parser.add_argument(
        "--seconds", type=positive_number, default=0.3, help="for the time without the tool; default: 0.3"
    )
    add_device(parser)
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE.json",
        action="append",
        help="show what --json wrote elsewhere; repeatable; nothing runs",
    )
    add_page(parser)


def _profile(args: argparse.Namespace) -> int:
    from openmla.core.target import Target
    from openmla.lab import profile, profile_page, progress

    if args.record:
        show(args, profile.load(*args.record), profile_page.page)
        return 0
    _, cases = chosen_cases(args)
    (backend,) = known_backends([args.backend] if args.backend else None)
    with progress.on_stderr() as say:
        found = profile.profile(
            cases, Target.detect(args.device), tool=args.tool, backend=backend, seconds=args.seconds, say=say
        )
    show(args, found, profile_page.page)
    return 0 if found.profiles else 1


# tune


def add_tune(verbs: Any) -> None:
    """`openmla tune`."""
    parser = add_verb(verbs, "tune", _tune, "search a kernel's settings on this machine; what each parameter is worth")
    add_cases(parser)
    parser.add_argument("--backend", metavar="NAME", help="default: OPENMLA_BACKEND")
    parser.add_argument("--seconds", type=positive_number, default=0.3, help="per setting and sweep; default: 0.3")
    parser.add_argument("--parameter", metavar="A,B", default="", help="search these alone; default: all")
    add_device(parser)
    parser.add_argument("--trials", type=Path, metavar="TRIALS.jsonl", help="append trials here, and continue from it")
    parser.add_argument(
        "--table", type=new_file, metavar="TUNED.json", help="write the tuned table with its provenance"
    )
    parser.add_argument("--record", type=Path, metavar="TUNED.json", help="show a table made elsewhere; nothing runs")
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="nothing runs: compile what a search on --target can try into a bundle",
    )
    parser.add_argument("--target", default="h100_sxm", metavar="NAME", help="of --bundle; default: h100_sxm")
    add_page(parser)


def _tune(args: argparse.Namespace) -> int:
    from openmla.core.target import Target
    from openmla.lab import knobs, progress, tune

    if args.record:
        show(args, tune.load(args.record), tune.page)
        return 0
    _, cases = chosen_cases(args)
    (backend,) = known_backends([args.backend] if args.backend else None)
    parameters = tuple(filter(None, args.parameter.split(",")))
    if args.bundle:
        check_compiler()
        manifest = knobs.bundle(cases, Target.preset(args.target), args.bundle, backend, parameters, output.say)
        print_json({"schema": JSON_SCHEMA, "manifest": str(manifest)}) if args.json else print(f"wrote {manifest}")
        return 0
    with progress.on_stderr() as say:
        found = tune.tune(
            cases, Target.detect(args.device), backend=backend, seconds=args.seconds, parameters=parameters,
            trials=args.trials, say=say,
        )  # fmt: skip
    if args.table:
        tune.write(found, args.table)
    show(args, found, tune.page)
    return 0 if found.entries else 1


# study


def add_study(verbs: Any) -> None:
    """`openmla study`."""
    parser = add_verb(
        verbs, "study", _study, "MLA against MHA, GQA and MQA: bytes, FLOPs, precision, cost per million tokens"
    )
    parser.add_argument("--target", default="h100_sxm", metavar="NAME", help="whose roof: a preset, or here to measure")
    parser.add_argument("--heads", type=positive, default=128, metavar="N", help="query heads; default: 128")
    parser.add_argument("--layers", type=positive, default=61, metavar="N", help="of the model that is priced; 61")
    parser.add_argument(
        "--price", type=positive_number, default=2.0, help="of a card for an hour, any currency; default: 2"
    )
    parser.add_argument("--trained", type=Path, metavar="ROWS.jsonl", help="outcomes of python -m openmla.lab.quality")
    parser.add_argument("--memory", type=positive_number, default=80.0, metavar="GIB", help="of one card; default: 80")
    parser.add_argument("--seconds", type=positive_number, default=0.2, help="per rate and size measured; default: 0.2")
    parser.add_argument(
        "--record", type=Path, metavar="FILE.json", help="show what --json wrote elsewhere; nothing runs"
    )
    add_page(parser)


def _study(args: argparse.Namespace) -> int:
    from openmla.lab import progress, study, study_page

    if args.record:
        show(args, study.load(args.record, args.trained), study_page.page)
        return 0
    with progress.on_stderr() as say:
        found = study.study(
            target=args.target, h_q=args.heads, layers=args.layers, per_hour=args.price, memory_gib=args.memory,
            seconds=args.seconds, trained=args.trained, say=say,
        )  # fmt: skip
    show(args, found, study_page.page)
    return 0
