"""The demo: what it promises, and that its checks can fail."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs transformers: pip install openmla[demo]")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib: pip install openmla[demo]")

from openmla.core.errors import ConfigError, ProblemError, UnsupportedError
from openmla.integrations.transformers import PagedModel
from openmla.kv.cache import PagedKVCache
from openmla.lab.demo import report, run, tiny
from openmla.lab.demo.report import render_demo_report
from openmla.lab.demo.serve import Watch, serve
from openmla.lab.progress import LiveDisplay, Stages
from openmla.ops import native


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    said = []
    path = tmp_path_factory.mktemp("demo") / "report.html"
    found = run.run_demo(out=path, device="cpu", quick=True, progress=said.append)
    assert said[0].startswith("[1/8] ")
    return found


@pytest.fixture(scope="module")
def plan():
    return run.scenario(quick=True)


@pytest.fixture(scope="module")
def model():
    return tiny.load()


def layers(model) -> int:
    return model.config.num_hidden_layers


def attach(model, plan, **options):
    return PagedModel(model, PagedKVCache("fp32_576", plan.num_pages, plan.page_size, layers(model)), **options)


def test_tokens_and_outputs_agree(result, plan) -> None:
    assert result.passed
    assert result.tokens_equal
    logs = {request.log.name: request.log for request in result.requests}
    assert {name: len(log.tokens) for name, log in logs.items()} == {
        request.name: request.max_new_tokens for request in plan.requests
    }
    assert logs["c"].shared_tokens == 100
    assert logs["d"].cached_tokens == 64
    decodes = sum(len(step.decoded) for step in result.steps) + 2  # c and d read the rest of their prompts by decode
    assert result.oracle.outputs == result.model["layers"] * (decodes + 2)  # a and b by prefill
    assert {"HARD", "RMS", "LSE"} <= set(result.oracle.worst)
    assert all(0 < result.oracle.worst[rule] <= 1 for rule in ("HARD", "RMS", "LSE"))
    assert len({tuple(request.log.tokens) for request in result.requests}) == len(result.requests)


def test_every_control_is_caught(result) -> None:
    assert [control.is_caught for control in result.oracle.controls] == [True] * 3


def test_numbers_are_of_this_machine(result) -> None:
    assert result.served.seconds > 0
    assert result.served.low <= result.served.seconds <= result.served.high
    assert result.choices[0]["candidates"][-1]["chosen"]
    forms = {form.name: form for form in result.forms}
    assert (forms["MLA"].demo_bytes, forms["MLA-FP8"].demo_bytes) == (1152, 656)
    assert forms["MHA"].deepseek_v3_bytes == 128 * (192 + 128) * 2
    assert json.loads(json.dumps(result.as_dict()))["passed"] is True
    assert "torch/" in report.summary(result)
    assert "roofline" in report.summary(result)


def test_report_is_one_whole_page(result) -> None:
    page = Path(result.report).read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in page
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|<script|<link|@import""", page)
    assert outside == [], "the page must not load anything"
    assert not re.search(r"#0a0[bc]", page), "a marker colour was not replaced"
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(pictures) == 5
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "two pictures share an id"
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids), "a clip path is missing"
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("role") == "img"
        assert root.get("aria-label")
    for request in result.requests:
        assert f"<b>{request.log.name}</b>" in page


def test_report_of_a_failure_says_what_is_wrong(result, tmp_path) -> None:
    wrong = copy.deepcopy(result)
    wrong.requests[0].expected[-1] ^= 1
    wrong.integrity = ("page 3 is free twice",)
    assert not wrong.passed
    render_demo_report(wrong, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Something is wrong" in page
    assert "page 3 is free twice" in page
    assert "FAILED" in report.summary(wrong)
    with pytest.raises(ConfigError, match="cannot write the report"):
        render_demo_report(wrong, tmp_path / "nowhere" / "r.html")


@pytest.mark.parametrize("mistake", ["scale", "length", "tables"])
def test_watch_catches_a_wrong_operator(model, plan, monkeypatch, mistake) -> None:
    """The negative control of the whole chain: an operator with a mistake in it, behind the same loop."""
    right = native.decode

    def wrong(q, kv_cache, block_table, cache_seqlens, *, softmax_scale, **options):
        if mistake == "scale":
            softmax_scale *= 1.01
        elif mistake == "length":
            cache_seqlens = (cache_seqlens - 1).clamp_min(0)
        else:
            block_table = block_table.flip(0)
        return right(q, kv_cache, block_table, cache_seqlens, softmax_scale=softmax_scale, **options)

    monkeypatch.setattr(native, "decode", wrong)
    watch = Watch()
    paged = attach(model, plan, observe=watch)
    try:
        serve(paged, plan.requests[:2], watch=watch)
    finally:
        paged.detach()
    assert watch.failures
    assert "decode, layer" in watch.failures[0]


def test_wrong_pages_change_the_tokens(model, plan, monkeypatch) -> None:
    """Equality of tokens says something: the model listens to what its attention returns."""
    paged = attach(model, plan)
    try:
        good = [log.tokens for log in serve(paged, plan.requests[:2]).requests]
        right = native.decode
        monkeypatch.setattr(native, "decode", lambda q, kv, table, lens, **o: right(q, kv, table.flip(0), lens, **o))
        paged.cache = PagedKVCache("fp32_576", plan.num_pages, plan.page_size, layers(model))
        bad = [log.tokens for log in serve(paged, plan.requests[:2]).requests]
    finally:
        paged.detach()
    assert good != bad


def test_chunked_prompt_equals_whole_prompt(model, plan) -> None:
    """Absorbed attention over cached context gives the logits of the expanded prefill."""
    prompt = list(tiny.text(90))
    paged = attach(model, plan)
    try:
        paged.cache.alloc("whole")
        whole = paged.forward(["whole"], [prompt])
        paged.cache.alloc("parts")
        for begin, end in ((0, 1), (1, 33), (33, 90)):
            parts = paged.forward(["parts"], [prompt[begin:end]])
        assert paged.cache.check_integrity() == ()
    finally:
        paged.detach()
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-3)
    with torch.inference_mode():
        stock = model(torch.tensor([prompt])).logits[:, -1]
    torch.testing.assert_close(whole, stock, rtol=0, atol=2e-3)


def test_prompts_of_one_length_prefill_together(model, plan) -> None:
    watch = Watch()
    paged = attach(model, plan, observe=watch)
    prompts = [list(tiny.text(80)[i * 40 : i * 40 + 40]) for i in range(2)]
    try:
        for name in ("x", "y"):
            paged.cache.alloc(name)
        both = paged.forward(["x", "y"], prompts)
        paged.cache.alloc("alone")
        alone = paged.forward(["alone"], [prompts[1]])
    finally:
        paged.detach()
    assert watch.failures == []
    assert watch.outputs == 3 * layers(model)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=2e-3)


def test_fp8_cache_serves_the_model_in_bf16(plan) -> None:
    model = tiny.load().to(torch.bfloat16)
    cache = PagedKVCache("fp8_656", plan.num_pages, plan.page_size, layers(model))
    logs = serve(PagedModel(model, cache), plan.requests[:2]).requests
    assert [len(log.tokens) for log in logs] == [6, 9]


def test_the_batch_in_bf16_stays_within_the_tolerance_of_bf16(plan) -> None:
    """The extra pass of a GPU run, here on the CPU."""
    model = tiny.load()
    paged = attach(model, plan)
    served = serve(paged, plan.requests, choose=tiny.Dice(0).choose)
    found = run._narrow(model, paged, plan, tiny.Dice(0), torch.device("cpu"), None, served, lambda share: None)
    assert found["failures"] == []
    assert found["outputs"] > 50
    assert 0 < found["same_tokens"] <= found["tokens"] == 27
    assert model.dtype == torch.float32


def test_attached_model_refuses_what_it_cannot_do(model, plan) -> None:
    paged = attach(model, plan)
    try:
        with pytest.raises(ProblemError, match=r"runs through PagedModel\.forward"):
            model(torch.zeros(1, 3, dtype=torch.int64), use_cache=False)
        paged.cache.alloc("a")
        with pytest.raises(ProblemError, match=r"rows of length \[2, 1\]; call once per length"):
            paged.forward(["a", "b"], [[1, 2], [3]])
    finally:
        paged.detach()
    with pytest.raises(ProblemError, match=r"(?s)4 attention layers, the cache 1.*d_qk=576 d_v=512, layout fp32_64"):
        PagedModel(model, PagedKVCache("fp32_64", 4))
    with pytest.raises(UnsupportedError, match="Linear cannot run"):
        PagedModel(torch.nn.Linear(2, 2), PagedKVCache("fp32_576", 4))


def test_missing_packages_are_named_with_the_command(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(ConfigError, match=r"needs jinja2; run: pip install \"openmla\[demo\]\""):
        run.run_demo(out=tmp_path / "r.html")


def test_device_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"device must be cpu.* on this machine, got 'tpu:0'"):
        run.run_demo(out=tmp_path / "r.html", device="tpu:0")


def test_request_that_can_never_fit_is_named(model, plan) -> None:
    paged = PagedModel(model, PagedKVCache("fp32_576", 3, plan.page_size, layers(model)))
    try:
        with pytest.raises(ValueError, match="request a needs 5 pages"):
            serve(paged, plan.requests[:1])
    finally:
        paged.detach()


def test_a_missing_model_is_named_with_the_command(monkeypatch) -> None:
    monkeypatch.setattr(tiny, "FILES", ("config.json", "nothing.safetensors"))
    with pytest.raises(ConfigError, match=r"nothing\.safetensors.*run: python models/openmla-tiny/train\.py"):
        tiny.home()


def test_the_text_is_python() -> None:
    content = tiny.readable(tiny.text(400))
    assert '"""' in content
    assert "\n    " in content


def test_the_dice_throw_what_the_softmax_says() -> None:
    """Every position has its own noise, the same each time; over many positions the shares are those of the softmax."""
    logits = torch.tensor([1.0, 0.0, -1.0, -9.0])
    dice = tiny.Dice(5, temperature=0.5)
    thrown = [dice.choose(position, logits) for position in range(3000)]
    assert thrown == [tiny.Dice(5, 0.5).choose(position, logits) for position in range(3000)]
    assert thrown != [tiny.Dice(6, 0.5).choose(position, logits) for position in range(3000)]
    shares = torch.tensor(thrown).bincount(minlength=4) / 3000
    assert (shares - (logits / 0.5).softmax(0)).abs().max() < 0.03
    ids = torch.zeros(2, 7, dtype=torch.int64)
    assert dice(ids, logits.expand(2, 4)).argmax(-1).tolist() == [thrown[7]] * 2


def test_text_has_an_end() -> None:
    assert tiny.text(10) == tiny.text(100)[:10]
    with pytest.raises(ValueError, match="asked for"):
        tiny.text(10**9)


def test_stages_tell_and_time(capsys) -> None:
    said: list[str] = []
    stages = Stages(2, said.append)
    with stages.stage("first") as share:
        share(0.5)
    with LiveDisplay() as display:
        stages = Stages(1, display)
        with stages.stage("shown") as share:
            share(0.5)
        display("a sentence")
    assert said == ["[1/2] first"]
    assert stages.seconds[0][0] == "shown"
    assert "shown" in capsys.readouterr().err
