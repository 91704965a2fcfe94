"""Faults 1 to 10 and 25 to 37 of docs/reliability.md: what happens when a kernel cannot be had, fails or is wrong.

A test's name carries the numbers of the faults that it is about; test_reliability_docs.py holds the table against them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from fragile import Ends, Fragile, arguments, forget, install

import openmla
from openmla import backends
from openmla.backends import Slot, aside
from openmla.backends.cute import bundle, compiler
from openmla.backends.cute.decode_dense import config as large
from openmla.core import incidents
from openmla.core.errors import CompileError, DeviceLostError, PlanMismatchError, UnsupportedError
from openmla.core.layout import kv_layout
from openmla.core.target import Target
from openmla.observe import metrics
from openmla.observe.watchdog import Watchdog
from openmla.ops import canary, checks, dispatch, observers
from openmla.reference import attention

SUBJECT = "decode/cute/fragile"


@pytest.fixture(autouse=True)
def _clean():
    forget()
    yield
    forget()


@pytest.fixture
def ends(caplog: pytest.LogCaptureFixture) -> Ends:
    return Ends(caplog)


def failing(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def served_elsewhere(kernel: Fragile) -> None:
    """The call that met the fault has the bits of the torch backend, and so does the next."""
    given = arguments()
    want, want_lse = openmla.decode(**given, backend="torch")
    for _ in range(3):
        out, lse = openmla.decode(**given)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)


@pytest.mark.parametrize("error", [ImportError("no module named cutlass"), OSError("libcutlass.so: no such file")])
def test_f01_f02_f08_a_compiler_that_cannot_be_had(monkeypatch, ends, error):
    kernel = install(monkeypatch, Fragile(compiling=failing(error)))
    served_elsewhere(kernel)
    ends("compile_failed", SUBJECT, str(error))
    assert kernel.compiled == 1  # the failure is remembered
    assert metrics.health()["state"] == "degraded"
    with pytest.raises(UnsupportedError, match="stands aside"):
        openmla.decode(**arguments(), backend="cute")


@pytest.mark.parametrize("line", ["import no_such_module", "raise OSError('lib.so: cannot open')"])
def test_f01_f02_a_backend_that_cannot_be_imported(monkeypatch, ends, tmp_path, line):
    name = f"broken_{abs(hash(line))}"
    (tmp_path / f"{name}.py").write_text(line)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "triton_stub").mkdir()
    monkeypatch.setitem(backends.TABLE, "decode", (Slot(name, "DECODE"), backends.TABLE["decode"][-1]))
    monkeypatch.setattr(Slot, "__hash__", lambda self: id(self))
    monkeypatch.setattr(backends, "BACKENDS", (name, *backends.BACKENDS))
    dispatch.forget()
    openmla.decode(**arguments())
    ends("backend_unavailable", f"decode/{name}/decode", "cannot be imported")
    assert "cannot be imported" in str(openmla.explain("decode"))


def _run(code: str, seconds: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=seconds, check=False
    )


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "out of memory"),
        ("raise RuntimeError('ptxas: internal error')", "ptxas: internal error"),
    ],
)
def test_f03_f10_a_compiler_that_dies_takes_nothing_with_it(monkeypatch, ends, tmp_path, code, says):
    def compiling() -> None:
        compiler.compile_apart("decode_dense", "x", tmp_path, command=[sys.executable, "-c", code])

    kernel = install(monkeypatch, Fragile(compiling=compiling))
    served_elsewhere(kernel)
    ends("compile_failed", SUBJECT, says)
    assert not list(tmp_path.iterdir())


def test_f04_a_package_outside_the_tested_range(monkeypatch, ends):
    monkeypatch.setattr(bundle, "_version", lambda name: "9.0.0")
    bundle._note_untested_versions.cache_clear()
    for _ in range(3):
        bundle._note_untested_versions()
    ends("version_untested", "package/nvidia-cutlass-dsl", "9.0.0; tested with >=4.8,<4.9")
    bundle._note_untested_versions.cache_clear()
    assert metrics.health()["state"] == "ok"  # the canary decides, not the number


@pytest.mark.parametrize("target", ["a100_sxm", "b200", "mi300x", "cpu"])
def test_f05_other_machines_get_reasons(target):
    found = openmla.explain("decode", target=target)
    assert all(row.verdict.reasons for row in found.candidates if row.backend == "cute")
    with pytest.raises(UnsupportedError, match=r"sm_90a|Hopper|tvm_ffi|apache"):
        backends.select(backends.typical_problem("decode"), Target.preset(target), "cute")


def test_f06_a_slice_of_a_card_is_planned_for_the_multiprocessors_that_it_has():
    problem = backends.typical_problem("decode")
    parts = {
        sms: large.num_parts(problem, Target("NVIDIA H100 MIG 1g", "sm_90a", sms, 232_448)) for sms in (16, 60, 132)
    }
    assert parts[16] < parts[60] < parts[132] <= 132


def test_f07_without_a_working_driver_nothing_pretends_to_be_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Target.detect().arch == "cpu"
    with pytest.raises(UnsupportedError, match="cute"):
        openmla.decode(**arguments(), backend="cute")
    assert openmla.decode(**arguments())[0].device.type == "cpu"


def test_f09_a_compile_that_does_not_end_is_killed(monkeypatch, ends, tmp_path):
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 1.0)
    marker = tmp_path / "pid"
    code = f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def compiling() -> None:
        compiler.compile_apart("decode_dense", "x", tmp_path, command=[sys.executable, "-c", code])

    kernel = install(monkeypatch, Fragile(compiling=compiling))
    openmla.decode(**arguments())
    ends("compile_failed", SUBJECT, "did not end within")
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)
    # Tried again after ten minutes, for good after three failures.
    monkeypatch.setattr(compiler, "compile_apart", failing(CompileError("again")))
    for attempt in (2, 3):
        later = time.monotonic() + 601 * (attempt - 1)
        with monkeypatch.context() as moved:
            moved.setattr(time, "monotonic", lambda later=later: later)
            openmla.decode(**arguments(batch=attempt + 1))
        assert kernel.compiled == attempt
    assert "for the life of this process" in aside.why(kernel, "only")


def test_f09_a_kernel_that_recovers_is_used_again(monkeypatch):
    broken = [True]

    def compiling() -> None:
        if broken[0]:
            raise CompileError("not now")

    kernel = install(monkeypatch, Fragile(compiling=compiling))
    openmla.decode(**arguments())
    assert kernel.launched == 0 and metrics.health()["state"] == "degraded"
    broken[0] = False
    monkeypatch.setattr(aside, "RETRY_SECONDS", 0.0)
    later = time.monotonic() + 601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    openmla.decode(**arguments(batch=3))
    openmla.decode(**arguments())
    assert kernel.launched == 2 and metrics.health()["state"] == "ok"


# ------------------------------------------------------------------------------------------------ plans


def test_f25_a_plan_of_other_shapes_kernels_or_devices():
    given = arguments()
    made = openmla.plan(**given)
    with pytest.raises(PlanMismatchError, match="batch: the plan has 2, the call has 3"):
        openmla.decode(**arguments(batch=3), plan=made)
    elsewhere = dataclasses.replace(made, cache_seqlens=made.cache_seqlens.to("meta"))
    with pytest.raises(PlanMismatchError, match="the plan lies on meta, the call is on cpu"):
        openmla.decode(**given, plan=elsewhere)


def test_f26_a_plan_does_not_leave_its_process():
    with pytest.raises(PlanMismatchError, match="make one in each process"):
        pickle.dumps(openmla.plan(**arguments()))


def test_f27_tensors_that_change_between_plan_and_call():
    given = arguments()
    made = openmla.plan(**given)
    before = openmla.decode(**given, plan=made)[0]
    given["kv_cache"] = given["kv_cache"].clone()  # freed and allocated anew: another address
    assert torch.equal(openmla.decode(**given, plan=made)[0], before)
    given["kv_cache"].resize_(3, 16, 1, 64)
    with pytest.raises(PlanMismatchError, match="num_pages: the plan has 4, the call has 3"):
        openmla.decode(**given, plan=made)


# ------------------------------------------------------------------------------------------------ launches


def test_f28_observers_and_log_handlers_that_raise(monkeypatch, ends):
    class Broken:
        wants = staticmethod(lambda: True)

        def before(self, *_: Any) -> None:
            raise ZeroDivisionError("in a callback")

        def after(self, *_: Any) -> None:
            raise KeyError("in a callback")

    given = arguments()
    want = openmla.decode(**given)[0]
    observers.add(Broken())
    assert torch.equal(openmla.decode(**given)[0], want)
    observers.observers.clear()
    assert incidents.counts() == {("monitor_failed", "Broken"): 2}
    monkeypatch.setattr(incidents._log, "log", failing(OSError(28, "No space left on device")))
    incidents.note("lock_stuck", "cache/lock", "a log on a full disk")
    assert incidents.counts()["monitor_failed", "log"] == 1
    assert metrics.health()["state"] == "ok"


class Mark:
    """An event that passes when told to."""

    def __init__(self) -> None:
        self.is_done = False

    def query(self) -> bool:
        return self.is_done


def test_f29_a_clock_that_jumps_and_a_starved_thread_are_no_hang(monkeypatch):
    dog, mark = Watchdog(10.0, None), Mark()
    dog.expect("cuda:0", mark, "a kernel")
    monkeypatch.setattr(time, "time", lambda: 9e9)
    dog.look()
    assert metrics.health()["state"] == "ok"
    mark.is_done = True  # the thread slept for a minute, the kernel did not
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    dog.look()
    assert metrics.health()["state"] == "ok" and not dog._streams


def test_f31_out_of_memory_changes_nothing(monkeypatch, ends):
    kernel = install(monkeypatch, Fragile(launching=failing(torch.OutOfMemoryError("CUDA out of memory"))))
    with pytest.raises(torch.OutOfMemoryError):
        openmla.decode(**arguments())
    ends("out_of_memory", "cpu", "CUDA out of memory")
    kernel.launching = lambda operands: None
    openmla.decode(**arguments())
    assert kernel.launched == 2  # still the first choice
    assert metrics.health()["state"] == "ok"


REFUSALS = (
    RuntimeError("kernel launch failed with CUDA error 1: invalid argument"),
    RuntimeError("kernel launch failed with CUDA error 701: too many resources requested for launch"),
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    type("OutOfResources", (Exception,), {})("out of resource: shared memory, Required: 300000"),
)


@pytest.mark.parametrize("error", REFUSALS, ids=range(len(REFUSALS)))
def test_f32_a_refused_launch_is_served_by_the_next_kernel(monkeypatch, ends, error):
    kernel = install(monkeypatch, Fragile(launching=failing(error)))
    served_elsewhere(kernel)
    ends("launch_refused", SUBJECT)
    assert kernel.launched == 1
    assert metrics.health()["state"] == "degraded"


def test_f32_a_refused_plan_costs_one_call(monkeypatch, ends):
    kernel = install(monkeypatch, Fragile(planning=failing(REFUSALS[0])))
    with pytest.raises(RuntimeError, match="invalid argument"):
        openmla.decode(**arguments())
    ends("launch_refused", SUBJECT)
    served_elsewhere(kernel)


def test_f32_a_named_backend_never_falls_back(monkeypatch):
    install(monkeypatch, Fragile(launching=failing(REFUSALS[1])))
    with pytest.raises(RuntimeError, match="701"):
        openmla.decode(**arguments(), backend="cute")
    with pytest.raises(UnsupportedError, match="stands aside \\(launch_refused"):
        openmla.decode(**arguments(), backend="cute")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda o: o.out.mul_(1.2),
        lambda o: o.out[0].copy_(o.out[1]),
        lambda o: o.out[1].fill_(torch.nan),
        lambda o: o.lse.add_(0.5),
        lambda o: o.lse.fill_(torch.nan),
    ],
    ids=["scaled", "another row", "not written", "lse", "lse not written"],
)
def test_f33_a_kernel_that_computes_nonsense_never_serves(monkeypatch, ends, spoil):
    monkeypatch.setattr(canary, "is_wanted", lambda kernel, target: kernel.backend == "cute")
    kernel = install(monkeypatch, Fragile(launching=spoil))
    served_elsewhere(kernel)
    ends("canary_failed", SUBJECT, "differs from the oracle")
    assert kernel.launched == 1
    assert "for the life of this process" in aside.why(kernel, "only")


def test_f33_a_right_kernel_passes_its_canary_once(monkeypatch):
    monkeypatch.setattr(canary, "is_wanted", lambda kernel, target: kernel.backend == "cute")
    kernel = install(monkeypatch, Fragile())
    served_elsewhere(kernel)
    assert kernel.launched == 1 + 3
    openmla.decode(**arguments(batch=7))  # the same variant, other sizes
    assert kernel.launched == 1 + 3 + 1 and not incidents.counts()


def test_f33_a_trial_that_fails_itself_keeps_nobody_from_running(monkeypatch, ends):
    monkeypatch.setattr(canary, "is_wanted", lambda kernel, target: kernel.backend == "cute")
    monkeypatch.setattr(canary, "smaller", failing(AttributeError("a mistake of the trial")))
    kernel = install(monkeypatch, Fragile())
    served_elsewhere(kernel)
    ends("canary_skipped", SUBJECT, "a mistake of the trial")
    assert kernel.launched == 3 and not aside.anything()


def test_f33_a_trial_in_which_no_row_sees_a_key_is_one():
    nothing = torch.zeros(2, 3, 8), torch.full((2, 3), -torch.inf)
    golden = attention.Attention(*(x.double() for x in nothing), nothing[1].double(), heads_first=False)
    assert canary._compare(*nothing, golden) == ""
    assert "out differs from the oracle" in canary._compare(nothing[0] + 1e-3, nothing[1], golden)


def test_f33_an_operation_without_a_canary_is_let_through(monkeypatch):
    monkeypatch.setattr(canary, "is_wanted", lambda kernel, target: True)
    problem = backends.typical_problem("append")
    assert set(backends.OPS) - set(canary._TRIALS) == {"append"}
    assert canary.try_out(Fragile(op="append"), "only", problem, Target.detect("cpu"), torch.device("cpu")) == ""


@pytest.mark.parametrize("op", canary._TRIALS)
def test_f33_every_operation_of_attention_has_a_canary(monkeypatch, op):
    monkeypatch.setattr(canary, "is_wanted", lambda kernel, target: True)
    target, device = Target.detect("cpu"), torch.device("cpu")
    problem = backends.typical_problem(op)
    kernel = backends.select(problem, target, "torch").kernel
    config = kernel.configs(problem, target)[0]
    assert canary.try_out(kernel, config, problem, target, device) == ""
    canary._tried.clear()
    launch = type(kernel).launch

    def wrong(self: Any, compiled: Any, problem: Any, operands: Any, plan: Any) -> None:
        launch(self, compiled, problem, operands, plan)
        operands.out[..., 100:120] += 1.0

    monkeypatch.setattr(type(kernel), "launch", wrong)
    assert "differs from the oracle" in canary.try_out(kernel, config, problem, target, device)


def test_f33_the_pages_of_a_trial_lie_as_the_layout_has_them(monkeypatch):
    """Moving a cache to another device takes the padding between its pages away; kernels may refuse such pages."""
    made, seen = canary._cache, []
    monkeypatch.setattr(canary, "_cache", lambda *given: made(*given).contiguous())
    monkeypatch.setattr(canary, "is_wanted", lambda kernel, target: True)
    target, device = Target.detect("cpu"), torch.device("cpu")
    layout = kv_layout("fp8_584")
    problem = dataclasses.replace(backends.typical_problem("sparse_decode"), layout=layout, d_qk=512, page_size=61)
    kernel = backends.select(problem, target, "torch").kernel
    launch = type(kernel).launch

    def watched(self: Any, compiled: Any, problem: Any, operands: Any, plan: Any) -> None:
        seen.append(operands.kv_cache.stride(0))
        launch(self, compiled, problem, operands, plan)

    monkeypatch.setattr(type(kernel), "launch", watched)
    assert canary.try_out(kernel, kernel.configs(problem, target)[0], problem, target, device) == ""
    assert seen == [layout.page_bytes(61)] and seen[0] > 61 * 584


def test_f34_a_hang_turns_health_red_and_later_calls_raise(ends, capfd):
    dog = Watchdog(0.05, None)
    dog.expect("cpu", Mark(), "decode/cute/decode_dense some problem")
    time.sleep(0.1)
    dog.look()
    ends("hung", "cpu", "no end after")
    assert metrics.health()["state"] == "failed"
    assert "test_f34" in capfd.readouterr().err  # the stacks of all threads
    with pytest.raises(DeviceLostError, match="decode_dense some problem"):
        openmla.decode(**arguments())


def test_f34_the_watchdog_can_end_the_process():
    code = (
        "import time\nfrom openmla.observe import watchdog\n"
        "class Never:\n    def query(self): return False\n"
        "dog = watchdog.start(0.2, exit_code=70)\ndog.expect('cuda:0', Never(), 'x')\ntime.sleep(30)\n"
    )
    assert _run(code).returncode == 70


LOST = (
    RuntimeError("kernel launch failed with CUDA error 700: an illegal memory access was encountered"),
    RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("CUDA error: misaligned address"),
)


@pytest.mark.parametrize("error", LOST, ids=range(len(LOST)))
@pytest.mark.parametrize("where", ["compiling", "planning", "launching"])
def test_f35_a_sticky_error_is_final_and_nobody_else_is_tried(monkeypatch, ends, error, where):
    kernel = install(monkeypatch, Fragile(**{where: failing(error)}))
    beneath = Fragile(name="beneath", backend="triton")
    monkeypatch.setitem(backends.TABLE, "decode", (kernel, beneath, *backends.TABLE["decode"][1:]))
    for _ in range(3):
        with pytest.raises(DeviceLostError, match="end the process"):
            openmla.decode(**arguments())
    assert beneath.compiled == beneath.launched == 0
    ends("device_lost", "cpu")
    assert metrics.health()["state"] == "failed" and not aside.anything()
    with pytest.raises(DeviceLostError):  # a named backend is no way around it
        openmla.decode(**arguments(), backend="torch")


def test_f35_strict_says_that_the_error_was_there_before(monkeypatch, ends):
    monkeypatch.setattr(torch.cuda, "synchronize", failing(LOST[0]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(DeviceLostError, match="before this call"):
        checks._settle(torch.device("cuda:0"))
    ends("device_lost", "cuda:0", "an earlier kernel caused it")


def test_f36_nan_rows_are_counted_on_request(monkeypatch, ends):
    given = arguments()
    given["kv_cache"][2] = torch.nan  # request 1 attends to it
    out, _ = openmla.decode(**given)
    assert out[1].isnan().all() and out[0].isfinite().all() and not incidents.counts()
    monkeypatch.setenv("OPENMLA_CHECKS", "strict")
    openmla.decode(**given)
    ends("nonfinite_rows", "decode", "4 of 8 rows")


def test_f37_a_length_beyond_what_was_reserved_is_cut_and_named(monkeypatch):
    given = arguments()
    given["cache_seqlens"][1] = 10_000
    want = openmla.decode(**{**given, "cache_seqlens": torch.tensor([20, 32], dtype=torch.int32)})[0]
    assert torch.equal(openmla.decode(**given)[0], want)
    assert openmla.check_errors() == (openmla.Fault.LENGTH_OVER_CAPACITY,)
    assert incidents.counts() == {("bad_value", "length_over_capacity"): 1}


def test_a_bug_is_raised_as_it_is(monkeypatch):
    install(monkeypatch, Fragile(launching=failing(KeyError("a bug"))))
    with pytest.raises(KeyError, match="a bug"):
        openmla.decode(**arguments())
    assert not incidents.counts() and not aside.anything()


def test_error_objects_travel_and_incidents_are_bounded():
    error = pickle.loads(pickle.dumps(DeviceLostError("cuda:0", "why")))
    assert isinstance(error, DeviceLostError) and error.device == "cuda:0"
    for number in range(1000):
        incidents.note("lock_stuck", "cache/lock", f"reason {number}")
    assert len(incidents.about()) <= incidents._MAX_SUBJECTS + 1
    assert sum(incidents.counts().values()) == 1000


def test_every_kind_says_what_it_means():
    assert all(kind.meaning and kind.health in ("ok", "degraded", "failed") for kind in incidents.KINDS.values())
    json.dumps(openmla.explain("decode").as_dict())
