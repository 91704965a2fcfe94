"""The few-row decode over index lists (fp8_656, fp8_528) on one Hopper GPU: correctness, sanitizers, timing beside the peer.

    python tests/gpu/decode_dense_small_gathered.py build LIBRARY   with the DSL; needs no GPU
    python tests/gpu/decode_dense_small_gathered.py gate LIBRARY [FUNCTION ...]       every case, each function in its own process
    python tests/gpu/decode_dense_small_gathered.py check LIBRARY FUNCTION [CASE ...]
    python tests/gpu/decode_dense_small_gathered.py sanitize LIBRARY FUNCTION         compute-sanitizer's four tools
    python tests/gpu/decode_dense_small_gathered.py api - [LAYOUT ...]                the cases through openmla.sparse_decode
    python tests/gpu/decode_dense_small_gathered.py graphs -          graphs and calls of several streams side by side
    python tests/gpu/decode_dense_small_gathered.py time LIBRARY[,LIBRARY] ROWS.jsonl [FUNCTION[/PARTS][@CELL] ...]

The cases and the peer are those of decode_sparse.py beside this file. `time` walks over as many input sets as make the
touched rows outgrow the L2, in one graph, all contenders in turn; without PARTS as many parts as the library takes.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import decode_sparse as sparse_gate
import torch

from openmla.backends.cute.decode_dense_small import config as small
from openmla.backends.cute.decode_dense_small.launch import build, launch_gathered
from openmla.core.layout import kv_layout
from openmla.core.problem import SparseDecodeProblem
from openmla.core.target import Target

CUDA = "cuda"
SECONDS = 160
PARTS = 128
INF = float("inf")


def configs():
    """The variants that gather."""
    return [config for config in small.VARIANTS if config.gathers]


def build_all(library):
    from openmla.backends.cute.toolchain import link_bundle

    with tempfile.TemporaryDirectory() as folder:
        compiled = [build(config, Path(folder)) for config in configs()]
        for each in compiled:
            print(each.name, "spills", each.resources.spills, "registers", each.resources.registers, flush=True)
        link_bundle([each.object_path for each in compiled], Path(library))


def cases(layout):
    """Builders of named cases, small ones first: (name, parts or None, builder)."""

    def make(name, *args, parts=None, **options):
        return name, parts, lambda: sparse_gate.case(name, layout, *args, **options)

    return [
        make("one index", 1, 1, 16, 1),
        make("one tile", 1, 1, 16, 64),
        make("partial", 1, 1, 16, 37),
        make("two tiles, one part", 1, 1, 16, 128, parts=1),
        make("the ring wraps", 1, 1, 16, 64 * 11 + 5, parts=1),
        make("many requests, one part", 9, 1, 16, 130, parts=1),
        make("split", 1, 1, 16, 2048),
        make("split, 8 heads", 2, 1, 8, 1500),
        make("1 head, pages of one", 2, 1, 1, 77, page_size=1, num_pages=1000),
        make("5 heads, three tokens, odd pages", 2, 3, 5, 300, page_size=7),
        make("two tokens", 3, 2, 16, 700),
        make("two tokens, few parts", 3, 2, 13, 700, parts=5),
        make("absent keys", 3, 1, 16, 333, absent=0.4),
        make("nobody there", 2, 1, 16, 100, absent=1.1),
        make("hostile indices", 3, 2, 16, 260, hostile=0.3),
        make("nothing but hostile indices", 1, 1, 16, 190, hostile=1.1),
        make("hostile and absent, split", 2, 2, 8, 2000, hostile=0.1, absent=0.2, page_size=3),
        make("lengths per token", 3, 2, 16, 500, lengths=[[0, 1], [63, 64], [65, 499]], parts=2),
        make("lengths per request, split", 3, 2, 16, 700, lengths=[0, 64, 650], parts=9),
        make("bad lengths", 3, 1, 16, 300, lengths=[-5, 301, 300]),
        make("sink", 3, 1, 16, 150, sink=INF, parts=2),
        make("sink, split", 2, 1, 16, 900, sink=-INF, parts=7),
        make("sink, nobody there", 2, 1, 16, 100, sink=-INF, absent=1.1),
        make("scales of any value", 3, 1, 16, 400, scales=True),
        make("scales of any value, hostile, split", 2, 2, 7, 900, scales=True, hostile=0.1, absent=0.1),
        make("peaky", 3, 1, 16, 1000, queries=6.0, keys=2.0),
        make("varlen", 5, 1, 16, 300, varlen=True, lengths=[300, 0, 64, 65, 129]),
        make("varlen, no lengths", 5, 1, 16, 300, varlen=True),
        make("many requests", 140, 2, 16, 333, seed=3),
        make("128 requests", 128, 1, 16, 2048, seed=4),
        make("many pieces", 1, 1, 16, 64 * 400, num_pages=500),
    ]


def planned(c, parts):
    """The case with a plan of this kernel, an exchange ready for it and unwritten outputs."""
    o = c.operands
    tokens = o.q.shape[0] * (o.q.shape[1] if o.q.dim() == 4 else 1)
    plan = small.gathered_plan(tokens, o.indices.shape[-1], parts)
    exchange = torch.full(
        (1, plan.num_pieces, 16 * small.words_per_row(True, 2)), 0x7FC00001, dtype=torch.int32, device=CUDA
    )
    exchange[..., small.marks(configs()[0]).to(CUDA)] = small.UNWRITTEN
    return SimpleNamespace(**{
        **vars(c), "plan": plan, "metadata": plan.tile_scheduler_metadata(CUDA).view(plan.ranges, parts, 8),
        "num_splits": plan.num_splits_tensor(CUDA), "exchange": exchange,
    })  # fmt: skip


def run(function, c):
    launch_gathered(function, c.operands, c.metadata, c.num_splits, c.exchange)


def expected_word(c, name):
    return (8 if c.is_hostile else 0) | (16 if "bad lengths" in name else 0)


def check(library, name, only=()):
    import tvm_ffi

    function, config = tvm_ffi.load_module(library)[name], next(each for each in configs() if each.name == name)
    passed = True
    for title, parts, make in cases(config.layout):
        if only and title not in only:
            continue
        c = planned(make(), parts or PARTS)
        found, fine, text = [], True, ""
        for _ in range(3):
            c.operands.out.fill_(float("nan"))
            c.operands.lse.fill_(float("nan"))
            run(function, c)
            torch.cuda.synchronize()
            found.append(c.operands.out.clone())
            if not bool((c.exchange[..., small.marks(configs()[0]).to(CUDA)] == small.UNWRITTEN).all()):
                fine, text = False, "partials left behind "
        good, words = sparse_gate.judged(c)
        word = c.operands.fault_word.item()
        fine &= good and all(torch.equal(found[0], each) for each in found) and word == expected_word(c, title)
        passed &= fine
        print(
            f"  {'ok  ' if fine else 'FAIL'} {title}: {text}{words} word {word} pieces {c.plan.num_pieces}", flush=True
        )
    if not only:
        passed &= others_unchanged(function, config)
    return passed


def others_unchanged(function, config):
    """Bad indices of one token leave the bits of the others alone, and a NaN key reaches its own token only."""
    c = planned(sparse_gate.case("others", config.layout, 4, 2, 16, 300, stray_nan=True), 7)
    run(function, c)
    torch.cuda.synchronize()
    before, fine = c.operands.out.clone(), True
    mask = torch.ones(4, 2, dtype=torch.bool, device=CUDA)
    mask[1, 1] = False
    kept = int(c.operands.indices[1, 1, 7])
    for bad in (*sparse_gate.HOSTILE, -1, 40 * 64 - 1):  # the last one is a NaN key
        c.operands.indices[1, 1, 7] = bad
        c.operands.fault_word.zero_()
        run(function, c)
        torch.cuda.synchronize()
        fine &= torch.equal(before[mask], c.operands.out[mask])
        if bad == 40 * 64 - 1:
            fine &= bool(c.operands.out[1, 1].isnan().any()) and c.operands.fault_word.item() == 0
        else:
            fine &= c.operands.fault_word.item() == (0 if bad == -1 else 8) and sparse_gate.judged(c)[0]
    c.operands.indices[1, 1, 7] = kept
    run(function, c)
    torch.cuda.synchronize()
    fine &= torch.equal(before, c.operands.out)
    print(f"  {'ok  ' if fine else 'FAIL'} a bad index, a NaN key: other tokens keep their bits", flush=True)
    return fine


def gate(library, names):
    """Which functions pass; each in its own process with a limit."""
    passed = []
    for name in names or [config.name for config in configs()]:
        try:
            done = subprocess.run(
                [sys.executable, __file__, "check", library, name],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False,
            )  # fmt: skip
            text, verdict = done.stdout, "PASS" if done.returncode == 0 else "FAIL"
        except subprocess.TimeoutExpired as late:
            text, verdict = (late.stdout or b"").decode(), "HANG"
        print(f"{name}: {verdict}\n{text[-6000:]}", flush=True)
        passed += [name] * (verdict == "PASS")
    print(f"passed: {len(passed)} of {len(names or configs())}", *passed)
    return len(passed) == len(names or configs())


def api(layouts):
    """Every case through the public call: the few-row kernel serves it, within the rule, with the right faults."""
    import openmla

    passed = True
    for layout in layouts or small.CODES:
        for title, _, make in cases(layout):
            c = make()
            o = c.operands
            openmla.check_errors()
            given = {"topk_length": o.topk_length, "attn_sink": o.attn_sink, "softmax_scale": o.softmax_scale}
            out, lse = openmla.sparse_decode(o.q, o.kv_cache, o.indices, kv_layout=layout, backend="cute", **given)
            good, words = sparse_gate.judged(SimpleNamespace(**{**vars(c), "operands": o._replace(out=out, lse=lse)}))
            faults = sum(fault.value for fault in openmla.check_errors())
            fine = good and faults == expected_word(c, title)
            passed &= fine
            print(f"  {'ok  ' if fine else 'FAIL'} {layout} {title}: {words} faults {faults}", flush=True)
    return passed


def graphs():
    """Two graphs of one shape and eager calls, replayed and called on three streams at once: all bits as alone."""
    import openmla

    c = sparse_gate.case("graphs", "fp8_656", 4, 2, 16, 1500, seed=5)
    o = c.operands
    others = [o.indices.flip(0).contiguous(), o.indices.flip(-1).contiguous(), o.indices]

    def call(indices):
        return openmla.sparse_decode(o.q, o.kv_cache, indices, kv_layout="fp8_656", backend="cute")[0]

    want = [call(indices).clone() for indices in others]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in others]
    made = []
    for indices in others[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call(indices) for _ in range(3)]
        made.append((graph, kept))
    fine = True
    for _ in range(200):
        found = []
        for (graph, _), stream in zip(made, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            found = [call(others[2]) for _ in range(3)]
        torch.cuda.synchronize()
        for (_, kept), expected in zip(made, want, strict=False):
            fine &= all(torch.equal(each, expected) for each in kept)
        fine &= all(torch.equal(each, want[2]) for each in found)
    print(f"  {'ok  ' if fine else 'FAIL'} graphs and calls on three streams, 200 rounds", flush=True)
    return fine


SANITIZED = ("partial", "two tokens, few parts", "hostile indices", "lengths per request, split")


def sanitize(library, name, tools=("memcheck", "racecheck", "synccheck", "initcheck")):
    """The smallest cases under compute-sanitizer; exit code 9 is a finding."""
    clean = True
    for tool in tools:
        only = ["--kernel-name", "kernel_substring=DecodeDenseSmall"] if tool in ("racecheck", "synccheck") else []
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        command = [program, "--tool", tool, "--error-exitcode", "9", *only, sys.executable, __file__, "check"]
        try:
            done = subprocess.run(
                [*command, library, name, *SANITIZED], capture_output=True, text=True, timeout=SECONDS, check=False
            )
            text, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as late:
            text, code = (late.stdout or b"").decode()[-1000:], -1
        clean &= code == 0
        said = [line for line in text.splitlines() if "SUMMARY" in line or line.startswith(("  ok", "  FAIL"))]
        print(f"{tool}: exit code {code}", *said, sep="\n", flush=True)
        if code:
            print(text[:3000], flush=True)
    return clean


# ---------------------------------------------------------------------- timing

CELLS = (
    [(b, 1, h, 2048) for h in (16, 8) for b in (128, 16, 1)]
    + [(b, 1, h, 2048) for h in (16, 8) for b in (64, 32, 8, 4, 2)]
    + [(64, 2, 16, 2048)]
)
REQUESTS, TOKENS = 128, 16384  # of the cache that all cells share


def timing_sets(kv, batch, s_q, h_q, topk):
    """Operands of calls that read different rows: together more than the L2 holds."""
    g = torch.Generator(CUDA).manual_seed(batch + h_q)
    count = max(REQUESTS // batch, 2)
    found = []
    for number in range(count):
        indices = torch.empty(batch, s_q, topk, dtype=torch.int32, device=CUDA)
        for b in range(batch):
            chosen = torch.rand(s_q, TOKENS, device=CUDA, generator=g).topk(topk, dim=1).indices
            indices[b] = (chosen + (number * batch + b) % REQUESTS * TOKENS).int()
        q = (torch.randn(batch, s_q, h_q, 576, device=CUDA, generator=g) * 0.1).to(torch.bfloat16)
        found.append(sparse_gate.SparseDecodeOperands(
            q=q, kv_cache=kv, indices=indices, softmax_scale=576**-0.5,
            out=torch.empty(batch, s_q, h_q, 512, dtype=torch.bfloat16, device=CUDA),
            lse=torch.empty(batch, h_q, s_q, device=CUDA),
            fault_word=torch.zeros(1, dtype=torch.int32, device=CUDA),
        ))  # fmt: skip
    return found


def captured(calls):
    """One graph of all calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = [call() for call in calls]
    return graph, keep


def median_us(graphs, counts, rounds):
    """Of each graph in turn: (median, least, most) microseconds per call."""
    times = {name: [] for name in graphs}
    for turn in range(rounds + 1):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(begin.elapsed_time(end) * 1e3 / counts)
    return {name: (statistics.median(t), min(t), max(t)) for name, t in times.items()}


def function_of(modules, name):
    """The first of that name."""
    for module in modules:
        try:
            return module[name]
        except AttributeError:
            continue
    raise SystemExit(f"no function {name}")


def time_all(library, rows_path, contenders, only):
    import tvm_ffi

    modules = [tvm_ffi.load_module(each) for each in library.split(",")]
    layout = "fp8_656"
    g = torch.Generator(CUDA).manual_seed(0)
    kv = kv_layout(layout).empty_cache(REQUESTS * TOKENS // 64, 64, device=CUDA)
    sample = sparse_gate.cache(layout, 64, 64, g, 0.1)
    for first in range(0, kv.shape[0], 64):
        kv[first : first + 64] = sample
    device = torch.cuda.get_device_name()
    for batch, s_q, h_q, topk in CELLS:
        cell = f"b{batch} s_q{s_q} h{h_q} topk{topk}"
        if only and not any(each in cell for each in only):
            continue
        sets = timing_sets(kv, batch, s_q, h_q, topk)
        graphs, kept, differ, used = {}, [], {}, {}
        peers = [sparse_gate.peer_call(SimpleNamespace(operands=o)) for o in sets]
        graphs["peer"], keep = captured(peers)
        graphs["peer"].replay()
        torch.cuda.synchronize()
        want = keep[0][0][:, :, :h_q].float()
        kept.append(keep)
        for contender in contenders:
            name, _, parts = contender.partition("@")[0].partition("/")
            problem = SparseDecodeProblem.from_tensors(sets[0].q, kv, sets[0].indices, layout=layout)
            parts = parts or small.gathered_parts(problem, Target.detect(torch.device(CUDA)))
            if not cell.startswith(contender.partition("@")[2]):
                continue
            used[contender] = int(parts)
            cs = [planned(SimpleNamespace(operands=o), int(parts)) for o in sets[:1]]
            cs += [SimpleNamespace(**{**vars(cs[0]), "operands": o}) for o in sets[1:]]
            function = function_of(modules, name)
            try:
                graphs[contender], keep = captured([lambda c=c: run(function, c) for c in cs])  # noqa: B023
                sets[0].out.zero_()
                graphs[contender].replay()
                torch.cuda.synchronize()
            except Exception as error:  # a way to start that this driver refuses
                print(f"{contender}: {type(error).__name__}: {error}"[:300], flush=True)
                graphs.pop(contender, None)
                continue
            differ[contender] = (sets[0].out.float() - want).abs().max().item()
            kept.append(cs)
        found = median_us(graphs, len(sets), 12)
        for name, (median, low, high) in found.items():
            row = {
                "cell": cell, "device": device, "kernel": name, "median_us": round(median, 2), "min_us": round(low, 2),
                "max_us": round(high, 2), "ratio": round(found["peer"][0] / median, 3),
                "gbps": round(batch * s_q * topk * 656 / median / 1e3), "difference": differ.get(name, 0.0),
                "parts": used.get(name, 0),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            with open(rows_path, "a") as file:
                file.write(json.dumps(row) + "\n")
        del graphs, kept, sets, peers
        torch.cuda.empty_cache()


def main(arguments):
    verb, library, *rest = arguments
    if verb == "build":
        build_all(library)
        return 0
    if verb == "check":
        return 0 if check(library, rest[0], rest[1:]) else 1
    if verb == "gate":
        return 0 if gate(library, rest) else 1
    if verb == "api":
        return 0 if api(rest) else 1
    if verb == "graphs":
        return 0 if graphs() else 1
    if verb == "sanitize":
        return 0 if sanitize(library, rest[0], *([rest[1:]] if rest[1:] else [])) else 1
    only = [each[2:] for each in rest if each.startswith("--")]
    time_all(library, rest[0], [each for each in rest[1:] if not each.startswith("--")], only)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
