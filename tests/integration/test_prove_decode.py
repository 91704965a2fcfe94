"""The script that proves dense decode on a GPU, in small on the CPU backend; and that a crash or a hang costs one item."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "tests" / "gpu"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    import decode_sections
    import prove_decode

    return prove_decode, decode_sections


@pytest.mark.parametrize(
    ("section", "numbers"),
    [
        ("matrix", (0, 57)), ("fuzz", (3, 4, 5)), ("repeats", (6,)), ("graphs", (0, 9, 12, 23)), ("invariance", (1,)),
        ("big", (1, 4, 5)), ("border", (1,)), ("stale", (0, 3)), ("host", (0,)), ("sparse", (0,)), ("gather", (0, 25)), ("codes", (0, 5)),
        ("sparse_fuzz", (1, 2, 5)), ("sparse_graphs", (0, 9)), ("sparse_big", (0, 1)), ("threads", (0,)), ("poison", (3, 17, 30)),
        ("hostile", (0, 1, 255, 319)), ("smallest", (1, 5, 6, 10, 11, 12, 13)), ("more", (3, 4, 6)),
    ],
)  # fmt: skip
def test_a_section_passes_on_the_cpu_backend(scripts, section, numbers):
    prove, sections = scripts
    setup = sections.Setup("torch", "cpu", is_small=True)
    items = [item for number in numbers for item in sections.SECTIONS[section](setup, only=number)]
    progress, saved = prove.Progress(), []
    assert prove.run_items(items, progress, lambda: saved.append(progress.running), 0, 600)
    record = progress.sections[section]
    assert not record.failures, record.failures
    assert record.passed == record.done == record.planned == len(numbers)
    assert saved == [*(item.name for item in items), ""]


def run(prove, items):
    """The record of the one section that the items are of."""
    progress = prove.Progress()
    prove.run_items(items, progress, lambda: None, 0, 600)
    (record,) = progress.sections.values()
    return record


@pytest.mark.parametrize("section", ["plans", "sanitize", "sanitize_more", "faults", "soak", "modes"])
def test_what_cannot_run_here_says_why(scripts, section):
    prove, sections = scripts
    items = sections.SECTIONS[section](sections.Setup("torch", "cpu"), only=0)
    record = run(prove, items)
    assert sum(record.not_run.values()) == 1 and not record.passed and not record.failures


def test_what_a_backend_refuses_is_counted_with_the_reason(scripts):
    prove, sections = scripts
    record = run(prove, sections.SECTIONS["border"](sections.Setup("cute", "cpu"), only=1))
    assert not record.failures and not record.passed
    (reason,) = record.unsupported
    assert "sm_90a" in reason


def test_a_wrong_kernel_is_found_by_graphs_and_repeats(scripts, monkeypatch):
    prove, sections = scripts
    import openmla

    right, calls = openmla.decode, iter(range(10**6))

    def drifting(*args, **options):
        out, lse = right(*args, **options)
        return out.mul_(1 + 0.01 * (next(calls) % 3)), lse

    monkeypatch.setattr(openmla, "decode", drifting)
    for section, number in (("graphs", 0), ("repeats", 6), ("invariance", 0)):
        setup = sections.Setup("torch", "cpu", is_small=True)
        record = run(prove, sections.SECTIONS[section](setup, only=number))
        (failure,) = record.failures
        assert "differ" in failure["report"] or "changed" in failure["report"]
        assert f"--sections {section} --case-seed {number}" in failure["repro"]


# A process of six items: crashes at one, hangs at another, loses the device at a third.
_CHILD = """
import json, os, sys, time
path, begin = sys.argv[1], int(sys.argv[2])
record = dict(planned=6 - begin, done=0, passed=0, unsupported={}, not_run={}, failures=[], ran={}, measured={},
              seconds=0.0, is_cut=False)
progress = dict(sections={"odd": record}, planned=6 - begin, done=0, running="", running_section="odd")
def save():
    open(path + ".x", "w").write(json.dumps(progress)); os.replace(path + ".x", path)
for item in range(begin, 6):
    progress["running"] = str(item); save()
    if item == 1: os._exit(11)
    if item == 3: time.sleep(60)
    if item == 4:
        record["failures"].append(dict(item="4", repro="", report="CUDA error"))
    else:
        record["passed"] += 1
    record["done"] += 1; progress["done"] += 1; progress["running"] = ""; save()
    if item == 4: sys.exit(3)
"""


def test_a_crash_a_hang_and_a_lost_device_cost_one_item_each(scripts):
    prove, _ = scripts
    records = prove.supervise(
        [prove.Job("odd", ("odd",))],
        lambda job, path, seconds: [sys.executable, "-c", _CHILD, str(path), str(job.begin)],
        parallel=2, seconds=120, item_seconds=lambda job: 1.5, say=lambda text: None,
    )  # fmt: skip
    found = records["odd"]
    assert (found.passed, found.done, found.planned, found.is_cut) == (3, 6, 6, False)
    assert [failure["report"].split("\n")[0][:12] for failure in found.failures] == [
        "the process ",
        "no end after",
        "CUDA error",
    ]
    assert "FAILED odd: odd: 1" in prove.table(records)


def test_long_lengths_of_the_batches_are_lengths(scripts):
    """What is cut to a table of three pages is no longer than a chunk of batch_invariant."""
    _, sections = scripts
    batches = sections._batches(15)
    assert len(batches) == 15 and all(max(lengths) >= 4000 for lengths in batches)
    given = sections.dense(batches[0], 16, no_length=20_000).tensors()
    assert given["block_table"].shape[1] * 64 >= max(batches[0]) == int(given["cache_seqlens"].max())


def test_from_the_command_line(tmp_path):
    out = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, str(GPU / "prove_decode.py"), "--backend", "torch", "--device", "cpu", "--small", "--sections",
         "plans,invariance", "--out", str(out)],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["passed"] and not found["is_whole"] and found["environment"]["arch"] == "cpu"
    assert not found["signed_off"] and found["missing"] == ["plans: 1 not run"]
    assert found["sections"]["invariance"]["passed"] == 1
    assert sum(found["sections"]["plans"]["not_run"].values()) == 1
    assert "not signed off" in done.stdout


def race(kernel, write, *reads):
    name = f"kernel_cutlass_kernel_openmlabackendscute{kernel}kernelX_object_at__0"
    read = "".join(f"\n=========     and Read access at {name}+{each:#x} [2 hazards]" for each in reads)
    return f"Error: Race reported between Write access at {name}+{write:#x}{read}\n========= "


def test_only_races_that_are_known_are_waived_and_not_for_ever(scripts):
    import racecheck

    # Two binaries of one kernel: what is a store in one is something else in the other.
    stores, copies = dict.fromkeys(range(0x100, 0x200), "STS"), dict.fromkeys(range(0x300, 0x400), "LDGSTS")
    loads, matrices = dict.fromkeys(range(0x500, 0x600), "LDS"), dict.fromkeys(range(0x700, 0x800), "LDSM")
    binaries = {
        "prefill_sparse": [stores | loads, copies | matrices | {0x100: "FADD"}],
        "decode_dense": [stores | loads],
    }

    def judged(*races, day="2026-12-01", shown=None):
        lines = [f"========= {each}" for each in races]
        lines.append(
            f"========= RACECHECK SUMMARY: {len(races) if shown is None else shown} hazards displayed (9 errors)"
        )
        return racecheck.waived("\n".join(lines), day, lambda symbol: binaries[racecheck.kernel_of(symbol)])

    known = [race("prefill_sparse", 0x100, 0x500), race("prefill_sparse", 0x300, 0x700, 0x710, 0x720)]
    said, unknown = judged(*known)
    assert not unknown
    assert "1 places" in said["waived in prefill_sparse, STS and LDS"]
    assert "3 places" in said["waived in prefill_sparse, LDGSTS and LDSM"]
    assert judged(*known, day="2027-02-01")[1] == ["the waivers ended on 2027-01-31"]
    assert judged(*known, shown=3)[1] == ["racecheck's output cannot be read"]
    assert judged()[1] == ["racecheck's output cannot be read"]
    assert "decode_dense+0x100" in judged(*known, race("decode_dense", 0x100, 0x500))[1][0], "another kernel"
    assert "('LDGSTS', '?')" in judged(*known, race("prefill_sparse", 0x300, 0x500))[1][0], "other instructions"
    many = race("prefill_sparse", 0x100, *range(0x500, 0x500 + 1 + racecheck.WAIVED["prefill_sparse", "STS", "LDS"][0]))
    assert "are known" in judged(many)[1][0], "more places than are known"


def test_every_waiver_is_in_the_docs_with_its_reason(scripts):
    import racecheck

    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| ([A-Z]+) \| ([A-Z]+) \| (\d+) \| \w", page, re.M)
    assert {(kernel, write, read): int(places) for kernel, write, read, places in listed} == {
        key: places for key, (places, _) in racecheck.WAIVED.items()
    }
    assert f"Waived until {racecheck.UNTIL}" in page


def test_binaries_for_gpus_are_found_inside_a_library(scripts):
    import racecheck

    def elf(machine, programs, sections):
        head = bytearray(64)
        head[:4] = b"\x7fELF"
        struct.pack_into("<H", head, 18, machine)
        struct.pack_into("<QQ", head, 32, 64, 64 + programs * 56)
        struct.pack_into("<HHHH", head, 54, 56, programs, 64, sections)
        return bytes(head) + bytes([7]) * (programs * 56 + sections * 64)

    first, second = elf(190, 2, 5), elf(190, 0, 1)
    assert racecheck.device_binaries(elf(62, 1, 1) + first + b"between" + second + b"behind") == [first, second]


def test_the_page_says_how_many_items_each_section_has(scripts):
    _, sections = scripts
    page, setup, said = (ROOT / "docs" / "reliability.md").read_text(), sections.Setup("cute", "cuda"), {}
    for names, counts in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ((?:[\d,]+(?:, )?)+) \|", page, re.M):
        said |= dict(zip(re.findall(r"\w+", names), counts.split(", "), strict=True))
    # `matrix` asks the card what it takes; of `poison` and `repeats` cases and runs are counted.
    listed = set(sections.DEFAULT) - {"matrix", "poison", "repeats"}
    found = {name: f"{len(sections.SECTIONS[name](setup)):,}" for name in listed}
    assert found == {name: said.get(name) for name in listed}


def test_the_guards_are_where_their_cost_is_measured(scripts):
    import guard_cost

    for kernel, changes in guard_cost.GUARDS.items():
        sources = [each.read_text() for each in (ROOT / "src/openmla/backends/cute" / kernel).glob("*.py")]
        for guard, _ in changes:
            assert any(re.search(guard, text) for text in sources), (kernel, guard)


def record_of(prove, **counted):
    return {name: prove.Record(planned=1, done=1, passed=1, counted=count) for name, count in counted.items()}


def test_what_signs_a_record_off_and_what_does_not(scripts, tmp_path, capsys):
    prove, sections = scripts
    assert set(sections.REQUIRED) == set(sections.DEFAULT)
    whole = record_of(prove, fuzz=5, repeats=100)
    assert prove.summary(whole, {"fuzz": 5, "repeats": 100})["signed_off"]
    for spoil in (
        lambda each: each["fuzz"].failures.append({"item": "3", "repro": "", "report": ""}),
        lambda each: each["fuzz"].not_run.update({"no room": 1}),
        lambda each: setattr(each["repeats"], "is_cut", True),
        lambda each: setattr(each["repeats"], "counted", 99),
        lambda each: each.pop("repeats"),
    ):
        spoiled = record_of(prove, fuzz=5, repeats=100)
        spoil(spoiled)
        found = prove.summary(spoiled, {"fuzz": 5, "repeats": 100})
        assert not found["signed_off"] and len(found["missing"]) == 1
    found = prove.summary(whole, {"fuzz": 5}) | {"utc": "now", "seconds": 1.0}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(found | {"sha256": prove.digest(found)}))
    assert prove.main(["--check", str(path)]) == 0
    path.write_text(path.read_text().replace('"counted": 5', '"counted": 6'))
    assert prove.main(["--check", str(path)]) == 1
    assert "CHANGED since it was left" in capsys.readouterr().out
