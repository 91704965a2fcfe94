"""The study: counted by core.cost and checked by hand; errors that were measured are of the size that theory says."""

import json

import pytest

from openmla.core.errors import ConfigError
from openmla.lab import page, study, study_page
from openmla.lab.roofline import Roof
from openmla.lab.study import Workload

ROOF = Roof("d", "test", {"bf16": 100.0}, 1000.0)  # ridge at 100 FLOP per byte


def test_what_a_token_keeps():
    kept = {form.name: form.kv_numbers for form in study.forms(128)}
    assert kept == {"MLA": 576, "MQA": 320, "GQA-8": 2560, "MHA": 40960}


@pytest.mark.parametrize(
    ("name", "flops_per_pair", "bytes_per_key"),
    [("MLA", 2 * 128 * 1088, 1152), ("MQA", 2 * 128 * 320, 640), ("GQA-8", 2 * 128 * 320, 5120), ("MHA", 2 * 128 * 320, 81920)],
)  # fmt: skip
def test_work_by_hand(name, flops_per_pair, bytes_per_key):
    form = next(form for form in study.forms(128) if form.name == name)
    work, longer = form.work(3, 2, 1024), form.work(3, 2, 2048)
    assert work.flops == 3 * 2 * 1024 * flops_per_pair
    assert longer.bytes - work.bytes == 3 * 1024 * bytes_per_key


def test_the_roof_bounds_a_step_and_its_price():
    mla = study.forms(128)[0]
    load = Workload("w", 4, 1, 65536)
    found = study.step(mla, load, ROOF)
    assert found.bound == "arithmetic"
    assert found.seconds == pytest.approx(found.flops / 1e14)
    cost = study.price(mla, load, ROOF, layers=10, per_hour=3.6, memory_gib=80)
    assert cost.tokens_per_second == pytest.approx(4 / (10 * found.seconds))
    assert cost.per_million == pytest.approx(1000 / cost.tokens_per_second)
    assert cost.kv_gib == pytest.approx(10 * 4 * 65536 * 1152 / 2**30)


def test_published_models():
    found = {model.name: model for model in study.models()}
    assert found["DeepSeek-V3"].kv_bytes == 61 * 576 * 2
    assert found["Llama 3.1 70B"].kv_bytes == 80 * 2 * 8 * 128 * 2
    assert found["Gemma 2B"].kv_bytes == 18 * 2 * 256 * 2
    assert min(model.parameters for model in found.values()) < 3
    assert max(model.parameters for model in found.values()) == 671
    assert all(model.source for model in found.values())


def test_errors_are_of_the_size_of_the_formats():
    found = {each.way: each for each in study.precision((256,))}
    assert set(found) == {
        "MLA, fp32",
        "MLA, fp16",
        "MLA, bf16",
        "MLA, fp8_656",
        "MQA, bf16",
        "GQA-8, bf16",
        "MHA, bf16",
    }
    assert found["MLA, fp32"].arithmetic < 1e-5
    for way, unit in (("MLA, fp16", 2**-11), ("MLA, bf16", 2**-8), ("MHA, bf16", 2**-8)):
        assert unit / 10 < found[way].arithmetic < 2 * unit
        assert found[way].total < 4 * unit
    assert found["MLA, fp8_656"].total > 3 * found["MLA, bf16"].total


def test_a_softmax_without_its_maximum_loses_rows_and_ours_does_not():
    small, large = study.stability((1.0, 256.0), s_k=256)
    assert (small.lost_fp16, small.lost_fp32) == (0, 0)
    assert (large.lost_fp16, large.lost_fp32) == (1, 1)
    assert large.ours < 0.02


def test_latents_keep_and_cost_more_as_they_grow():
    small, large = study.latents((128, 512), 0.01, s_k=256)
    assert (small.kv_bytes, large.kv_bytes) == (384, 1152)
    assert large.compression == pytest.approx(16 * 320 / 576)
    assert small.intensity < large.intensity * 1.1
    assert small.seconds > 0


def test_the_whole_and_its_page(monkeypatch):
    whole = {"precision": study.precision, "stability": study.stability, "latents": study.latents}
    monkeypatch.setattr(study, "precision", lambda lengths: whole["precision"]((64,)))
    monkeypatch.setattr(study, "stability", lambda factors: whole["stability"]((1.0,), s_k=64))
    monkeypatch.setattr(study, "latents", lambda sizes, seconds: whole["latents"]((64,), 0.001, s_k=64))
    found = study.study(h_q=16, per_hour=1.0)
    json.dumps(found.as_dict(), allow_nan=False)
    assert "ridge at 295 FLOP per byte" in str(found)
    html = page.render(study_page.page(found))
    for part in ("Workloads", "Cost per million tokens", "Published models", "Precision", "Stability", "Latent size"):
        assert f"<h2>{part}</h2>" in html
    twice = study.study(h_q=16, per_hour=2.0)
    assert twice.prices[0].per_million == pytest.approx(2 * found.prices[0].per_million)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target": "h900"}, "unknown target 'h900'"),
        ({"h_q": 20}, "multiple of 8"),
        ({"per_hour": 0.0}, "per_hour must be positive, got 0"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ConfigError, match=message):
        study.study(**wrong)


def test_a_record_made_elsewhere_shows_the_same_page(tmp_path):
    found = study.study(h_q=8, seconds=0.01)
    path = tmp_path / "study.json"
    path.write_text(json.dumps({**found.as_dict(), "page": None}), encoding="utf-8")
    again = study.load(path)
    assert again == found
    assert page.render(study_page.page(again)) == page.render(study_page.page(found))
    path.write_text('{"forms": 1}', encoding="utf-8")
    with pytest.raises(ConfigError, match="is no record of openmla study --json"):
        study.load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        study.load(tmp_path / "none.json")
