"""Profiles: the same record from every tool. What GPUs say is read from recorded forms of their tools' output."""

import dataclasses
import json
import subprocess

import pytest

from openmla.backends import kernels
from openmla.backends.triton.config import Config
from openmla.core.errors import ConfigError
from openmla.core.target import Target
from openmla.lab import page, profile, profile_page
from openmla.lab.suite import Case

CPU = Target.detect("cpu")
CASE = Case(batch=2, s_k=700, h_q=16, dtype="fp32")

_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
NCU = "\n".join(
    [
        "==PROF== Connected to process 7",
        '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum","lts__t_bytes.sum","lts__t_sector_hit_rate.pct",'
        '"sm__warps_active.avg.pct_of_peak_sustained_active",'
        f'"{_STALL.format("long_scoreboard")}","{_STALL.format("barrier")}","{_STALL.format("selected")}",'
        f'"{_STALL.format("barrier").replace(".ratio", ".pct")}","{_STALL.format("barrier").replace(".ratio", ".max_rate")}"',
        '"","","ns","byte","byte","%","%","inst","inst","inst","%","inst"',
        '"0","decode","30,000","1,000,000","3,000,000","66.5","12.5","3.0","1.0","2.0","100","64"',
        '"1","combine","10,000","200,000","200,000","10","50","9.0","0","1.0","0","64"',
    ]
)
TRACE = {
    "traceEvents": [
        {
            "cat": "kernel",
            "name": "decode",
            "dur": 30.0,
            "args": {"registers per thread": 168, "shared memory": 231424},
        },
        {"cat": "kernel", "name": "combine", "dur": 5.0, "args": {}},
        {"cat": "kernel", "name": "combine", "dur": 5.0, "args": {}},
        {"cat": "cpu_op", "name": "aten::empty", "dur": 99.0},
    ]
}


def test_phases_of_the_cpu_kernel_add_up_and_the_methods_are_put_back():
    from openmla.backends.torch import attend, products, reading

    owners = [attend.Attention, attend._Rows, products.PortableProducts, products.NarrowProducts, reading.CacheReader]
    before = [dict(vars(owner)) for owner in owners]
    (found,) = profile.profile([CASE], CPU, tool="torch", seconds=0.01).profiles
    assert sum(each.share for each in found.phases) == pytest.approx(1.0, abs=0.02)
    assert {each.name for each in found.phases} >= {"read keys", "scores: q k", "weighted sum: p v"}
    assert all(each.calls for each in found.phases if each.name.startswith(("read", "scores", "weighted")))
    assert [dict(vars(owner)) for owner in owners] == before
    assert found.operators
    assert "bytes that moved" in found.missing


def test_counters_need_no_profiler():
    (found,) = profile.profile([CASE], CPU, tool="counters", seconds=0.01).profiles
    assert (found.tool, found.operators) == ("counters", ())
    assert {"arithmetic", "bandwidth", "tiles"} <= set(found.readings)


def test_pages_and_json_have_one_shape_for_every_tool(tmp_path):
    found = profile.profile([CASE], CPU, tool="counters", seconds=0.01)
    record = tmp_path / "record.json"
    record.write_text(json.dumps(found.as_dict(), allow_nan=False))
    assert profile.load(record) == found
    assert profile.load(record, record).profiles == found.profiles * 2
    record.write_text('{"profiles": [{}], "refused": {}}')
    with pytest.raises(ConfigError, match="is no record of openmla profile --json: KeyError 'phases'"):
        profile.load(record)
    seen = profile.of_ncu(NCU)
    gpu = dataclasses.replace(
        found.profiles[0], tool="ncu", phases=tuple(seen.phases), readings=seen.readings, stalls=tuple(seen.stalls),
        memory=dataclasses.replace(found.profiles[0].memory, moved=seen.moved, hit_rate=seen.hit_rate),
    )  # fmt: skip
    html = page.render(profile_page.page(profile.Profiles((found.profiles[0], gpu), {"x": "why"})))
    for part in ("stall reasons", "long scoreboard", "found in L2", "Not profiled", "memory access"):
        assert part in html
    assert "stalled 75 % by long scoreboard" in str(profile.Profiles((gpu,), {}))


def test_ncu_page_is_read():
    seen = profile.of_ncu(NCU)
    assert [(each.name, each.seconds) for each in seen.phases] == [("decode", pytest.approx(3e-5)), ("combine", 1e-5)]
    assert seen.moved == 1_200_000
    assert seen.readings["bytes asked of L2"].value == 3_200_000
    assert seen.stalls == [("long scoreboard", 0.75), ("barrier", 0.25)]
    assert seen.readings["occupancy"].value == 12.5  # of the longest kernel
    assert seen.hit_rate == pytest.approx(0.665)
    assert "tensor cores" in seen.missing
    slow = profile.of_ncu(NCU.replace('"","","ns"', '"","","usecond"'))
    assert slow.phases[0].seconds == pytest.approx(3e-2)
    with pytest.raises(ConfigError, match="in 'cycle'; known: nsecond"):
        profile.of_ncu(NCU.replace('"","","ns"', '"","","cycle"'))
    with pytest.raises(ConfigError, match="saw no kernel"):
        profile.of_ncu("==PROF== nothing")


def test_a_trace_is_read():
    seen = profile.of_trace(TRACE)
    assert [(each.name, each.calls, each.share) for each in seen.phases] == [("decode", 1, 0.75), ("combine", 2, 0.25)]
    assert seen.readings["registers"].value == 168
    assert "CUPTI" in profile.of_trace({"traceEvents": []}).missing["kernels"]
    assert not seen.missing


def test_a_trace_says_what_it_cannot_know():
    """A merge that was launched early, and an estimate of 0, both as they came from an H100."""
    early = {"cat": "kernel", "name": "merge", "ts": 110.0, "dur": 115.0, "args": {}}
    first = {"cat": "kernel", "name": "decode", "ts": 0.0, "dur": 241.0, "args": {"est. achieved occupancy %": 0}}
    seen = profile.of_trace({"traceEvents": [first, early]})
    assert set(seen.missing) == {"occupancy", "time of each kernel alone"}
    assert "occupancy" not in seen.readings
    behind = profile.of_trace({"traceEvents": [first, early | {"ts": 241.0}]})
    assert set(behind.missing) == {"occupancy"}


def test_bytes_asked_follow_from_the_rows_that_share_a_load():
    case = Case(batch=4, s_k=1024, h_q=128, s_q=2)
    kv = 4 * 1024 * 1152
    whole, half = profile.memory_of(case, 256), profile.memory_of(case, 128)
    assert (whole.reuse, half.reuse) == (1, 2)
    assert whole.asked == whole.fewest
    assert half.asked == whole.fewest + kv
    assert whole.run_bytes == 64 * 1152


def test_rows_that_share_a_load_by_kernel():
    from openmla.backends.cute.decode_dense.config import Config as Many
    from openmla.backends.cute.decode_dense_small.config import Config as Few

    by_name = {(each.backend, each.name): each for each in kernels("decode")}
    assert profile.rows_per_load(by_name["torch", "decode_tiled"], None, CASE) == 256
    assert profile.rows_per_load(by_name["triton", "decode_split"], Config(64, 64, 8, 2), CASE) == 64
    assert profile.rows_per_load(by_name["cute", "decode_dense"], Many(cluster=2), CASE) == 128
    assert profile.rows_per_load(by_name["cute", "decode_dense_small"], Few(rows=32), CASE) == 32
    odd = dataclasses.replace(CASE, h_q=96)
    assert profile.rows_per_load(by_name["torch", "decode_tiled"], None, odd) == 192


def test_refusals():
    with pytest.raises(ConfigError, match="unknown tool 'perf'; use one of: auto, ncu"):
        profile.profile([CASE], CPU, tool="perf")
    with pytest.raises(ConfigError, match="profiles NVIDIA GPUs, this is cpu"):
        profile.profile([CASE], CPU, tool="ncu", seconds=0.01)
    with pytest.raises(ConfigError, match="names no case"):
        profile.run_once("x", "torch")
    assert "not profiled" in str(profile.profile([CASE], CPU, backend="cute"))


def test_what_ncu_says_of_its_failure_is_passed_on(monkeypatch):
    said = '==PROF== Connected\n==ERROR== LaunchFailed\n"1","2"\n'
    outcomes = [subprocess.CompletedProcess([], 9, said, "")] * 2
    asked = []

    def run(command, **_):
        asked.append(command[command.index("--replay-mode") + 1])
        return outcomes[len(asked) - 1]

    monkeypatch.setattr(profile.shutil, "which", lambda name: "/bin/ncu")
    monkeypatch.setattr(profile.subprocess, "run", run)
    why = "ncu ended with 9, kernel replay: ==ERROR== LaunchFailed; ncu ended with 9, application replay"
    with pytest.raises(ConfigError, match=why):
        profile._ncu(CASE, Target.preset("h100_sxm"), "cute")
    asked.clear()
    outcomes[1] = subprocess.CompletedProcess([], 0, NCU, "")
    assert profile._ncu(CASE, Target.preset("h100_sxm"), "cute").moved == profile.of_ncu(NCU).moved
    assert asked == ["kernel", "application"]


def test_kernels_of_the_cute_dsl_are_named_by_their_class():
    long = "kernel_cutlass_kernel_openmlabackendscutedecode_dense_smallkernelDecodeDenseSmall_object_at__CopyAtom"
    assert profile.kernel_name(long) == "DecodeDenseSmall"
    assert profile.kernel_name("_split_kernel") == "_split_kernel"
