"""No number without a row behind it: pages name the rows they quote, the rows are there, and README says what they say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from openmla import backends
from openmla.backends.torch import fused
from openmla.core.layout import kv_layout
from openmla.lab import report, report_markdown

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
RESULTS = ROOT / "bench" / "results"

MEASURED = re.compile(r"\d\s?(?:us|ms|µs|GB/s|TB/s|[TG]FLOPS|[TG]FLOP/s)\b|\d times as fast")
ROW_FILE = re.compile(r"bench/results/([\w.]+\.jsonl)")
ROW_NAME = re.compile(r"\b(dds?-\d+-\d+)\b")

# Pages with figures that are no measurements of ours; may only shrink.
NOT_MEASURED = {
    "docs/concepts/measurement.md": "the length below which a call is timed in a graph",
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def rows(file: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / file).read_text().splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_with_measured_numbers_names_rows_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = ROW_FILE.findall(text)
    missing = [file for file in files if not (RESULTS / file).is_file()]
    assert not missing, f"{name(page)} names rows that are not there: {missing}"
    quoted = MEASURED.findall(text)
    if quoted and name(page) not in NOT_MEASURED:
        assert files, f"{name(page)} quotes {quoted[:3]} and names no file of bench/results"


@pytest.mark.parametrize("page", [page for page in PAGES if ROW_NAME.search(page.read_text())], ids=name)
def test_every_row_that_is_named_is_there(page: Path) -> None:
    known = {
        row.get("environment", {}).get("row") for file in sorted(RESULTS.glob("*.jsonl")) for row in rows(file.name)
    }
    unknown = sorted(set(ROW_NAME.findall(page.read_text())) - known)
    assert not unknown, f"{name(page)} quotes rows that do not exist: {unknown}"


@pytest.mark.parametrize("page", [each for each in PAGES if report_markdown.places(each.read_text())], ids=name)
def test_tables_made_from_rows_are_what_the_rows_make(page: Path) -> None:
    """`openmla report ROWS.jsonl --into PAGE.md` would change nothing."""
    text = page.read_text(encoding="utf-8")
    for file, _ in dict.fromkeys(report_markdown.places(text)):
        found = report.read([RESULTS / file])
        assert report_markdown.fill(text, found, name(page)) == text, (
            f"openmla report bench/results/{file} --into {page}"
        )


def test_the_index_of_results_lists_what_is_there() -> None:
    index = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"`(\w+\.jsonl?)`", index)) == sorted(file.name for file in RESULTS.iterdir())
    scripts = re.findall(r"`((?:tests|models)/[\w/.-]+)`", index)
    assert scripts
    assert [each for each in scripts if not (ROOT / each).is_file()] == []


def test_the_list_of_exceptions_only_shrinks() -> None:
    stale = [page for page in NOT_MEASURED if not MEASURED.search((ROOT / page).read_text())]
    assert not stale, f"these pages quote no number any more, take them off the list: {stale}"
    assert len(NOT_MEASURED) <= 1


def test_readme_says_what_the_rows_of_the_cpu_say() -> None:
    """Its sentence holds the lowest and highest of the runs, rounded."""
    sentence = next(line for line in (ROOT / "README.md").read_text().split("\n\n") if "two CPU cores" in line)
    found = rows("cpu_decode.jsonl")
    for heads in (16, 128):
        mine = [r for r in found if r["case"] == f"decode-b16-sq1-hq{heads}-sk4096-bf16" and r["kind"] == "backend"]
        assert len(mine) >= 2
        times, ratios = [r["median_us"] / 1e3 for r in mine], [r["ratio"]["sdpa"] for r in mine]
        assert f"{min(times):.0f} to {max(times):.0f} ms with {heads}" in sentence
        assert f"{min(ratios):.1f} to {max(ratios):.1f}" in sentence


WHAT_RUNS = {
    "dense decode, bf16 and fp16": [("decode", None)],
    "dense decode, FP8 and FP4 caches": [("decode", "fp8_584"), ("decode", "fp4_288")],
    "dense decode, FP8 queries": [("decode", "fp8_576")],
    "sparse decode, FP8 caches": [("sparse_decode", "fp8_656"), ("sparse_decode", "fp8_528")],
    "sparse prefill, sparse decode over bf16 caches": [("sparse_prefill", None), ("sparse_decode", "bf16_576")],
    "varlen prefill, with gradients": [("prefill", None)],
    "writing into the cache": [("append", None)],
}
TARGETS = (("h100_sxm", "h200_sxm"), ("a100_sxm", "b200", "mi300x"), ("cpu",))
WORDS = {"cute": "CuTe", "triton": "Triton", "torch": "PyTorch"}


def test_readme_says_what_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table names the backend that `explain` chooses for the typical call of each operation, on each machine."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)  # as there
    monkeypatch.setattr(fused, "FLASH3", "not_installed")
    text = (ROOT / "README.md").read_text().split("## What runs where, today")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == len(WHAT_RUNS)
    for (what, calls), cells in zip(WHAT_RUNS.items(), lines, strict=True):
        assert cells[0].startswith(what)
        for op, layout in calls:
            problem = backends.typical_problem(op)
            if layout:
                of = kv_layout(layout)
                dtype = torch.float8_e4m3fn if of.has_call_scale else problem.dtype
                problem = dataclasses.replace(problem, layout=of, d_qk=of.d_qk, d_v=of.d_v, dtype=dtype)
            for names, said in zip(TARGETS, cells[1:], strict=True):
                for target in names:
                    chosen = backends.explain(problem, target=target).chosen
                    assert chosen is not None
                    word = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", said).split(":")[0].split(",")[0]
                    assert word == WORDS[chosen.backend], f"{what}, {layout}, {target}: {chosen}, README says {said}"


def test_readme_says_which_codes_the_hopper_kernel_reads() -> None:
    line = next(each for each in (ROOT / "README.md").read_text().splitlines() if "FP8 and FP4 caches" in each)
    for layout in ("fp8_656", "fp8_528", "fp8_584", "fp4_288"):
        of = kv_layout(layout)
        problem = dataclasses.replace(backends.typical_problem("decode"), layout=of, d_qk=of.d_qk, d_v=of.d_v, h_q=16)
        chosen = backends.explain(problem, target="h100_sxm").chosen
        assert (chosen.backend == "cute") == (f"`{layout}`" in line), (layout, chosen)


def test_readme_says_what_the_rows_of_the_models_say() -> None:
    """Every speed-up of its sentence about transformers stands in one row, on the card that it names."""
    text = (ROOT / "README.md").read_text()
    sentence = next(each for each in text.split("\n\n") if each.startswith("In transformers on one"))
    card = re.search(r"on one (H\d+)", sentence)[1]
    found = [row for row in rows("model_speed.jsonl") if card in row["device"]]
    plain = {
        (f"{row['speedup']:.1f}", f"{row['speedup_over_grouped']:.1f}")
        for row in found
        if "speedup_over_grouped" in row
    }
    graphs = {f"{row['speedup']:.1f}" for row in found if row["what"] == "transformers_step_graphs"}
    said = re.findall(r"\d+\.\d", re.sub(r"V\d+\.\d", "", sentence))
    assert (said[0], said[1]) in plain
    assert said[2] in graphs
    assert len(said) == 3
    other = re.search(
        r"On one (H\d+), whose host is slower, captured steps are (\d+\.\d) times .* and (\d+\.\d) times", text
    )
    named = [each for each in rows("model_speed.jsonl") if other[1] in each["device"]]
    row = next(each for each in named if each["what"] == "transformers_step_graphs")
    stock = row["runs"]["stock"]["step_ms"]
    assert (other[2], other[3]) == tuple(f"{stock / row['runs'][each]['step_ms']:.1f}" for each in ("graph", "eager"))


def test_the_table_of_trained_models_is_that_of_its_rows() -> None:
    text = (ROOT / "docs" / "laboratory.md").read_text()
    table = re.findall(r"^\| (?:MLA|MQA|GQA|MHA).*\| (\d+) \| (\d\.\d+) \|$", text, re.MULTILINE)
    trained = rows("latent_quality.jsonl")
    assert table == [(str(row["kv_numbers"]), f"{row['loss']:.3f}") for row in trained if row["seed"] == 0]
    second = [f"{row['loss']:.3f}" for row in trained if row["seed"] == 1]
    assert f"seed 1 gives {' and '.join(second)} for" in text
