"""The command line as its users meet it: a subprocess, its output and its exit code."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from openmla.cli import main
from openmla.core import env
from openmla.lab import store, study

ROOT = Path(__file__).resolve().parents[2]
VERBS = (
    "doctor",
    "explain",
    "demo",
    "bench",
    "report",
    "roofline",
    "profile",
    "tune",
    "study",
    "verify",
    "compile",
    "learn",
)
TINY = '[[case]]\nbatch = 2\ns_k = 70\nh_q = 4\ndtype = "fp32"\n'


def openmla(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OPENMLA_")}
    return subprocess.run(
        [sys.executable, "-m", "openmla", *arguments],
        env={**inherited, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def as_json(done: subprocess.CompletedProcess) -> dict:
    """Standard output is one JSON object and nothing else."""
    return json.loads(done.stdout)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return str(path)


def test_help_is_fast_and_names_every_verb():
    begin = time.perf_counter()
    done = openmla("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    assert time.perf_counter() - begin < 1.0, "help must not import PyTorch"


def test_help_does_not_import_torch():
    code = "import sys, openmla.cli as c\ntry: c.main(['bench', '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "False"


def test_version():
    assert openmla("--version").stdout.startswith("openmla 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nosuch",),
        ("doctor", "--nosuch"),
        ("bench", "--seconds", "-1"),
        ("verify", "--cases", "0"),
        ("explain", "--h-q", "x"),
        ("bench", "--s-k", "1k..x"),
        ("report",),
        ("study", "--price", "0"),
    ],
)
def test_wrong_usage_is_2(arguments):
    done = openmla(*arguments)
    assert done.returncode == 2
    assert "usage: openmla" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("explain", "nosuch"), {}, "unknown operation 'nosuch'; use one of: decode"),
        (("explain", "--target", "h900"), {}, "unknown target 'h900'; use one of: a100_sxm"),
        (("explain", "decode", "--backend", "nosuch"), {}, "unknown backend 'nosuch'"),
        (("explain", "decode", "--topk", "64"), {}, "decode has no topk; it has: batch"),
        (("explain", "decode", "--kv-layout", "fp8_1"), {}, "unknown KV layout 'fp8_1'"),
        (("explain",), {"OPENMLA_BACKEND": "cude"}, "OPENMLA_BACKEND='cude' is not legal"),
        (("bench", "--suite", "nosuch"), {}, "unknown suite 'nosuch'; use one of: cpu_decode"),
        (("bench", "--suite", "nosuch.toml"), {}, "suite file nosuch.toml does not exist"),
        (("bench", "--case", "*hq7*"), {}, "no case of suite smoke matches '*hq7*'"),
        (("bench", "--peer", "nosuch"), {}, "unknown peer 'nosuch'; use one of: sdpa"),
        (("bench", "--backend", "nosuch"), {}, "unknown backend 'nosuch'"),
        (("bench", "--suite", "smoke", "--batch", "3"), {}, "--suite smoke holds its own cases; leave out batch"),
        (("bench", "--page-size", "0"), {}, "page_size must be an integer from 1"),
        (("report", "nosuch.jsonl"), {}, "cannot read rows from nosuch.jsonl"),
        (("roofline", "--rows", "nosuch.jsonl"), {}, "cannot read rows from nosuch.jsonl"),
        (("roofline", "--rows", "x", "--target", "h20"), {}, "leave out --target, or the rows"),
        (("roofline", "--target", "h900"), {}, "unknown target 'h900'"),
        (("profile", "--tool", "perf"), {}, "unknown tool 'perf'; use one of: auto, ncu"),
        (("tune", "--backend", "nosuch"), {}, "unknown backend 'nosuch'"),
        (("study", "--target", "cpu"), {}, "the preset cpu has no data-sheet rates"),
        (("verify", "--op", "nosuch"), {}, "unknown operation 'nosuch'"),
    ],
)
def test_wrong_value_is_2_with_one_message(arguments, environment, message, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--out", "no/such/page.html"), "there is no folder no/such; make it, or give another path"),
        (("roofline", "--out", "."), "must be a file, got the folder ."),
        (("tune", "--table", "no/such/tuned.json"), "there is no folder no/such"),
        (("explain", "--batch", "x"), "argument --batch: must be a whole number, got 'x'"),
        (("explain", "--batch", "-3"), "must be at least 1, got -3"),
        (("bench", "--seconds", "soon"), "must be a positive number, got 'soon'"),
    ],
)
def test_what_cannot_work_is_said_before_the_work(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", [("compile", "--out"), ("tune", "--bundle")])
def test_compiling_without_the_compiler_says_what_to_install(verb, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(env, "is_importable", lambda module: module != "cutlass")
    assert main([*verb, str(tmp_path / "bundle")]) == 2
    assert "by nvidia-cutlass-dsl; run: pip install 'openmla[cuda]' (no GPU needed)" in capsys.readouterr().err


def test_a_file_for_rows_is_tried_before_the_measurement(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", "--out", str(tmp_path / "file" / "rows.jsonl")]) == 2
    err = capsys.readouterr().err
    assert "cannot append to" in err
    assert "case 1 of" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("verb", ["bench", "roofline", "profile", "tune", "verify", "demo"])
def test_a_device_that_is_not_there_is_2(verb, capsys):
    assert main([verb, "--device", "cuda"]) == 2
    assert "cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor", "--wrong"),
        ("explain", "nosuch"),
        ("bench", "--suite", "nosuch"),
        ("verify", "--op", "nosuch"),
        ("demo", "--device", "tpu"),
    ],
)
def test_wrong_value_as_a_process(arguments):
    done = openmla(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "openmla" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_doctor_text_and_json():
    text = openmla("doctor")
    assert text.returncode == 0, text.stdout
    assert "not built" in text.stdout
    assert "Traceback" not in text.stdout + text.stderr
    record = as_json(openmla("doctor", "--json"))
    assert record["schema"] == 1
    assert record["healthy"]


def test_doctor_finds_a_wrong_setting():
    done = openmla("doctor", OPENMLA_CHECKS="loud")
    assert done.returncode == 1
    assert "WRONG OPENMLA_CHECKS" in done.stdout
    assert "fix: unset OPENMLA_CHECKS" in done.stdout


def test_doctor_into_a_closed_pipe():
    command = f"{sys.executable} -m openmla doctor | head -1"
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "software"
    assert done.stderr == ""


def test_explain_text_and_json():
    text = openmla("explain")
    assert text.returncode == 0
    assert text.stdout.count("torch/") >= 4
    assert max(map(len, text.stdout.splitlines())) <= 100
    record = as_json(
        openmla("explain", "decode", "--target", "h100_sxm", "--h-q", "16", "--batch", "4", "--s-k", "1000", "--json")
    )
    (one,) = record["explanations"]
    assert {each["backend"] for each in one["candidates"]} == {"cute", "triton", "torch"}
    assert "h_q=16" in one["problem"]
    assert "total_q=4" in one["problem"]
    assert "max_pages=16" in one["problem"]


def test_explain_of_a_layout_and_of_nobody():
    assert "fp8_584" in openmla("explain", "sparse_decode", "--kv-layout", "fp8_584").stdout
    done = openmla("explain", "decode", "--backend", "triton")
    assert done.returncode == 1
    assert "not built" in done.stdout or "triton" in done.stdout


def test_bench_lists_cases():
    done = openmla("bench", "--suite", "cpu_decode", "--list")
    assert done.stdout.splitlines()[0] == "decode-b16-sq1-hq16-sk4096-bf16"
    assert as_json(openmla("bench", "--suite", "cpu_decode", "--list", "--json"))["suite"] == "cpu_decode"


def test_bench_measures_prints_and_appends(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    arguments = (
        "bench",
        "--suite",
        tiny,
        "--peer",
        "eager",
        "--peer",
        "flash_mla",
        "--seconds",
        "0.05",
        "--out",
        str(rows),
    )
    text = openmla(*arguments)
    assert text.returncode == 0, text.stderr
    assert "gate torch: green" in text.stderr
    assert "flash_mla  not run: " in text.stdout
    record = as_json(openmla(*arguments, "--json"))
    assert [row["who"] for row in record["results"][0]["rows"]] == ["torch", "eager"]
    assert [row.who for row in store.read(rows)] == ["torch", "eager", "torch", "eager"]


def test_bench_of_a_sweep(tmp_path):
    arguments = ("bench", "--batch", "1", "--s-k", "64..128", "--h-q", "4", "--layout", "plain,fp8_656", "--list")
    names = openmla(*arguments).stdout.split()
    shape = "decode-b1-sq1-hq4-sk{}-bf16"
    assert names == [shape.format(64), shape.format(128), shape.format(64) + "-fp8_656", shape.format(128) + "-fp8_656"]
    rows = tmp_path / "rows.jsonl"
    done = openmla(*arguments[:-1], "--peer", "eager", "--seconds", "0.02", "--out", str(rows))
    assert done.returncode == 0, done.stderr
    assert "reads plain caches here, the case has the layout fp8_656" in done.stdout
    assert len(store.read(rows)) == 6


def test_bench_judges_the_bars_of_its_suite(tmp_path):
    path = tmp_path / "tiny.toml"
    bar = '[[bar]]\nname = "in no time"\ncases = ["*"]\nvalue = "median_us"\nat_most = 0.001\n'
    path.write_text(TINY + bar)
    arguments = ("bench", "--suite", str(path), "--peer", "none", "--seconds", "0.02")
    text = openmla(*arguments)
    assert text.returncode == 1
    assert "MISSED       in no time" in text.stdout
    assert as_json(openmla(*arguments, "--json"))["bars"][0]["verdict"] == "missed"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("report", "{rows}"), "cases"),
        (("report", "{rows}", "--against", "{rows}"), "changes"),
        (("roofline", "--suite", "{tiny}", "--seconds", "0.02"), "roof"),
        (("roofline", "--rows", "{rows}"), "cases"),
        (("roofline", "--suite", "decode_dense", "--case", "*b1-*", "--target", "h100_sxm"), "ridge"),
        (("profile", "--suite", "{tiny}", "--seconds", "0.02", "--tool", "counters"), "profiles"),
        (("tune", "--suite", "{tiny}", "--seconds", "0.01", "--device", "cpu"), "entries"),
        (("study", "--heads", "16", "--seconds", "0.01"), "prices"),
    ],
    ids=lambda value: "-".join(value[:3]).replace("{", "").replace("}", "") if isinstance(value, tuple) else value,
)
def test_every_verb_of_the_laboratory_prints_json_and_writes_a_page(
    arguments, key, tiny, tmp_path, capsys, monkeypatch
):
    rows = tmp_path / "rows.jsonl"
    if "{rows}" in arguments:
        assert main(["bench", "--suite", tiny, "--peer", "eager", "--seconds", "0.01", "--out", str(rows)]) == 0
        capsys.readouterr()
    if arguments[0] == "study":
        monkeypatch.setattr(study, "precision", functools.partial(lambda real, lengths: real((64,)), study.precision))
        monkeypatch.setattr(study, "LATENTS", (64,))
    page = tmp_path / "page.html"
    given = [each.format(rows=rows, tiny=tiny) for each in arguments]
    assert main([*given, "--json", "--out", str(page)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record[key]
    assert record["page"] == str(page)
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert "<svg" in html
    assert main(given) == 0
    text = capsys.readouterr().out
    assert "add --out page.html" in text
    assert max(map(len, text.splitlines())) <= 100 + max(len(str(rows)), 0)


def test_tune_writes_its_table_and_continues(tiny, tmp_path):
    table, trials = tmp_path / "tuned.json", tmp_path / "trials.jsonl"
    arguments = ("tune", "--suite", tiny, "--device", "cpu", "--seconds", "0.01", "--trials", str(trials))
    first = openmla(*arguments, "--table", str(table))
    assert first.returncode == 0, first.stderr
    (entry,) = json.loads(table.read_text())["entries"]
    assert entry["environment"]["torch"]
    again = openmla(*arguments)
    assert f"0 trials, {entry['trials']} more from the file" in again.stdout


def test_bench_of_a_backend_that_cannot_run_says_why(tiny):
    done = openmla("bench", "--suite", tiny, "--backend", "triton", "--peer", "none", "--seconds", "0.05")
    assert done.returncode == 0
    assert "not run: triton/" in done.stdout


def test_verify_text_and_json():
    text = openmla("verify", "--cases", "2", "--device", "cpu")
    assert text.returncode == 0, text.stdout + text.stderr
    assert "all cases within tolerance" in text.stdout
    record = as_json(openmla("verify", "--op", "decode", "--cases", "2", "--seed", "5", "--device", "cpu", "--json"))
    assert record["schema"] == 1
    assert record["first_seed"] == 5
    assert record["passed"]


def test_verify_of_what_cannot_run_is_a_finding():
    done = openmla("verify", "--op", "decode", "--backend", "triton", "--cases", "1", "--device", "cpu")
    assert done.returncode == 1
    assert "nothing ran" in done.stdout


def test_interrupt_is_130():
    process = subprocess.Popen(
        [sys.executable, "-m", "openmla", "verify", "--cases", "100000", "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that: the test may be such a child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr is not None
    process.stderr.readline()  # the first progress line: it is in the loop
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "openmla verify: interrupted" in rest
    assert "Traceback" not in rest


def test_demo_quick_writes_a_report(tmp_path):
    report = tmp_path / "report.html"
    done = openmla("demo", "--quick", "--device", "cpu", "--out", str(report), "--json")
    assert done.returncode == 0, done.stderr
    record = as_json(done)
    assert record["passed"]
    assert record["tokens_equal"]
    assert "<html" in report.read_text(encoding="utf-8")
    assert "[1/" in done.stderr  # progress in sentences, not in bars


def test_demo_without_its_packages_says_what_to_install():
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'transformers':\n"
        "            raise ModuleNotFoundError('No module named transformers', name='transformers')\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from openmla.cli import main\n"
        "raise SystemExit(main(['demo', '--quick']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "openmla demo: " in done.stderr
    assert "pip install" in done.stderr
    assert "openmla[demo]" in done.stderr
    assert "Traceback" not in done.stderr
