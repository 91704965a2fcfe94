"""Reports: nothing is measured, so every number must be that of a row; pages hold everything they show."""

import json
import re

import pytest
from lab_rows import row

from openmla.cli import main
from openmla.core.errors import ConfigError
from openmla.lab import page, report, report_markdown, report_page, store
from openmla.lab.page import Cell, Figure, Page, Section, Table, Tile

A, B = "decode-b1-sq1-hq16-sk4096-bf16", "decode-b1-sq1-hq16-sk8192-bf16"


def rows():
    return [
        row(case=A, median_us=99.0), row(case=A, median_us=10.0), row(case=A, who="sdpa", kind="peer", median_us=20.0),
        row(case=B, median_us=20.0), row(case=B, who="sdpa", kind="peer", median_us=160.0),
        row(case="by hand", median_us=3.0),
    ]  # fmt: skip


def is_self_contained(html: str) -> bool:
    outside = re.findall(r'(?:src|href)="(?!#)[^"]*"|@import|url\((?!#)', html)
    return not outside and html.count("<svg") == html.count("</svg>")


def test_speedups_are_of_the_newest_run():
    found = report.build(rows(), "r.jsonl")
    assert found.speedups == {"sdpa": [(A, 2.0), (B, 8.0)]}
    assert found.hidden == 1
    assert found.as_dict()["speedups"]["sdpa"]["geomean"] == pytest.approx(4.0)
    assert "against sdpa       4.00x geometric mean of 2 cases, 2.00x to 8.00x" in str(found)
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((10.0, 9.9, 10.1), (8.0, 7.9, 8.1), "faster"),
        ((8.0, 7.9, 8.1), (10.0, 9.9, 10.1), "slower"),
        ((10.0, 9.9, 10.1), (9.8, 9.7, 9.85), "same"),  # 2 %
        ((10.0, 8.0, 12.0), (9.0, 8.5, 9.5), "same"),  # the bands touch
        ((10.0, None, None), (8.0, None, None), "faster"),
    ],
)
def test_a_change_is_beyond_noise(before, after, verdict):
    def one(values):
        return row(case=A, median_us=values[0], p20_us=values[1], p80_us=values[2])

    found = report.build([one(after)], "new.jsonl", [one(before)], "old.jsonl")
    assert [each.verdict for each in found.changes] == [verdict]
    assert found.changes[0].speedup == before[0] / after[0]


def test_nothing_to_say_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="holds no row of ours"):
        report.build([row(kind="peer")], "r.jsonl")
    with pytest.raises(ConfigError, match="no case in common"):
        report.build([row(case=A)], "r.jsonl", [row(case=B)], "o.jsonl")
    with pytest.raises(ConfigError, match=r"cannot read rows from .*nosuch"):
        store.read(tmp_path / "nosuch.jsonl")


def test_labels_name_what_is_unusual():
    from openmla.lab import suite

    assert report.label(suite.parse(A)) == "1 x 4k, 16 heads"
    name = "decode-b2-sq2-hq128-sk200-fp32-hkv2-p16-varlen-causal-batch_invariant-warm"
    want = "2 x 200, 128 heads, s_q 2, 2 KV heads, fp32, pages of 16, varlen, causal, invariant, warm"
    assert report.label(suite.parse(name)) == want


def test_page_of_a_report():
    older = [row(case=A, median_us=30.0), row(case=B, median_us=20.0, environment={"device": "another"})]
    found = report.build(rows(), "r.jsonl", older, "old.jsonl")
    html = page.render(report_page.page(found))
    assert is_self_contained(html)
    for part in ("Speed against context length", "Speed-ups", "Memory against", "Every number", "What changed",
                 "compare machines, not versions", "prefers-color-scheme: dark", "width=device-width"):  # fmt: skip
        assert part in html, part
    assert "3.000x" in html


def test_the_title_names_what_was_measured():
    sparse = row(case="sparse_decode-b16-sq1-hq16-sk16384-bf16-fp8_656-topk2048")
    for given, title in (
        (rows(), "MLA decode on d"),
        ([sparse], "MLA sparse decode on d"),
        ([*rows(), sparse], "MLA attention on d"),
    ):
        assert report_page.page(report.build(given, "r.jsonl")).title == title


def test_page_with_bars_and_without_lengths():
    name = "decode-b1-sq1-hq16-sk4096-bf16"
    html = page.render(report_page.page(report.build([row(suite="decode_dense", case=name, median_us=12.0)], "r")))
    assert "bars met" in html
    assert "missed" in html
    assert "Speed against context length" not in html


def test_what_is_shown_is_escaped():
    one = Page("<t>", "a `<b>` c", [Section("s", ["<i>"], [Figure("<svg></svg>", "&")], [
        Table("l", ("h",), [["<x>"], [Cell("`y<`", "good")]], is_folded=True)])], [Tile("1<", "2<")], ["f<"])  # fmt: skip
    html = page.render(one)
    for part in ("&lt;t&gt;", "<code>&lt;b&gt;</code>", "&lt;i&gt;", "<code>y&lt;</code>", "<svg></svg>", "f&lt;"):
        assert part in html
    assert "<x>" not in html


def test_page_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="cannot write the page"):
        page.write(Page("t", "l", []), tmp_path / "no" / "p.html")


def test_units():
    durations = {
        1.5: "1.50 s",
        0.0421: "42.1 ms",
        8.12e-5: "81.2 us",
        9.997e-4: "1000 us",
        0.1: "100 ms",
        3e-9: "0.00 us",
    }
    assert {value: page.duration(value) for value in durations} == durations
    amounts = {656: "656 B", 4718592: "4.5 MiB", 3 * 2**30: "3 GiB", 2**20 - 300: "1,024 KiB"}
    assert {value: page.amount(value) for value in amounts} == amounts
    assert [page.number(value) for value in (0.02891, 34.31, 999.7, 2440.4)] == ["0.0289", "34.3", "1,000", "2,440"]


PLACE = "before\n<!-- rows: r.jsonl, {} -->\nold\n<!-- end of rows -->\nafter\n"


def test_tables_of_a_page_hold_what_the_rows_say():
    found = report.build(rows(), "r.jsonl")
    times = report_markdown.fill(PLACE.format("times"), found, "p.md")
    assert times.startswith("before\n<!-- rows: r.jsonl, times -->\n| us,")
    assert times.endswith("<!-- end of rows -->\nafter\n")
    assert "| 16 heads: batch 1 | 10.0, 2.00 | 20.0, 8.00 |" in times
    assert "old" not in times and "99.0" not in times  # the older run of A
    assert "| 16 heads | 2 | 4.00 | 2.00 | 8.00 |" in report_markdown.fill(PLACE.format("summary"), found, "p.md")
    waited = report.build([row(case=A, host_us=7.0), row(case=B, host_us=5.0)], "r.jsonl")
    assert "| torch, `k` | 2 | 7.0 | 7.0 |" in report_markdown.fill(PLACE.format("host"), waited, "p.md")
    assert report_markdown.fill(times, found, "p.md") == times
    assert report_markdown.places(times) == [("r.jsonl", "times")]


def test_verdicts_of_a_page_are_those_of_the_bars():
    mine = [row(suite="decode_dense", case=A, median_us=10.4), row(suite="decode_dense", case=A, who="fa3", kind="peer", median_us=20.0)]  # fmt: skip
    text = report_markdown.fill(PLACE.format("verdicts"), report.build(mine, "r.jsonl"), "p.md")
    assert "| batch 1, h_q 16, 4k: microseconds | **missed** | 10.4 us | at most 10.0 us | 0 of 1 |" in text
    assert "| every cell: against the faster peer | not measured | 1.92x | at least 1.00x | 1 of 43 |" in text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no place", "has no place for r.jsonl"),
        (PLACE.format("times").replace("r.jsonl", "s.jsonl"), "has no place for r.jsonl"),
        (PLACE.format("speeds"), "asks for the table 'speeds'.* use one of: summary, times, verdicts, host"),
    ],
)
def test_a_page_without_a_place_is_an_error(text, why):
    with pytest.raises(ConfigError, match=why):
        report_markdown.fill(text, report.build(rows(), "r.jsonl"), "p.md")


def test_the_command_fills_a_page(tmp_path, capsys):
    file, target = tmp_path / "r.jsonl", tmp_path / "p.md"
    store.append(file, rows())
    target.write_text(PLACE.format("summary"), encoding="utf-8")
    assert main(["report", str(file), "--into", str(target)]) == 0
    assert "| 16 heads | 2 |" in target.read_text(encoding="utf-8")
    assert main(["report", str(file), "--into", str(tmp_path / "nosuch.md")]) == 2
    assert "cannot fill" in capsys.readouterr().err
