"""Tuning: gated, resumable, and honest about noise. The kernel is a fake, and so are its times."""

import dataclasses
import json

import pytest
import torch

from openmla.backends.torch import products, tiled
from openmla.core.errors import ConfigError
from openmla.core.target import Target
from openmla.lab import knobs as knobs_module
from openmla.lab import page, peers, tune, workload
from openmla.lab.peers import Contender
from openmla.lab.suite import Case
from openmla.lab.tune import Trial

CPU = Target.detect("cpu")
CASE = Case(batch=2, s_k=70, h_q=4, dtype="fp32")


@pytest.fixture
def knobs(monkeypatch):
    """A kernel with two parameters: `speed` 3 takes a third of the time, `safe` 0 is wrong, 2 fails to compile."""
    honest = peers.backend
    made: list[dict[str, int]] = []

    def fake(case, sets, target, backend):
        right = honest(case, sets, target, "torch")

        def under(setting):
            made.append(setting)
            if setting["safe"] == 2:
                raise RuntimeError("no room for 2")

            def call(i):
                out, lse = right.call(i)
                return (out, lse) if setting["safe"] else (torch.zeros_like(out), lse)

            return Contender("x", "backend", "fake", str(setting["speed"]), call)

        space = {"speed": (1, 3), "safe": (0, 1, 2)}
        return knobs_module.Knobs(
            "torch", next(iter(knobs_module.kernels("decode"))), {"speed": 1, "safe": 1}, space, under
        )

    def timed(contenders, *_):
        return "call", [[0.003 / int(each.config) + 1e-6 * i for i in range(10)] for each in contenders]

    monkeypatch.setattr(tune, "knobs_of", fake)
    monkeypatch.setattr(tune.runner, "time_in_turn", timed)
    return made


def test_the_fast_value_wins_and_the_wrong_one_cannot(knobs, tmp_path):
    record = tune.tune([CASE], CPU, seconds=0.01)
    (found,) = record.entries
    assert found.best == {"speed": 3, "safe": 1}
    assert found.speedup == pytest.approx(3, rel=0.01)
    safe = next(each for each in found.worth if each.parameter == "safe")
    assert {value for value, time in safe.medians.items() if time} == {1}
    speed = next(each for each in found.worth if each.parameter == "speed")
    assert speed.spread == pytest.approx(3, rel=0.01)
    assert "speed 1 -> 3" in str(record)
    json.dumps(record.as_dict(), allow_nan=False)
    html = page.render(tune.page(record))
    assert "a better setting for 1 of 1 cases" in html
    tune.write(record, tmp_path / "tuned.json")
    assert page.render(tune.page(tune.load(tmp_path / "tuned.json"))) == html
    (tmp_path / "tuned.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no table of openmla tune: KeyError 'entries'"):
        tune.load(tmp_path / "tuned.json")


def test_only_the_parameters_asked_for_are_searched(knobs):
    (found,) = tune.tune([CASE], CPU, seconds=0.01, parameters=("speed",)).entries
    assert [each.parameter for each in found.worth] == ["speed"]
    assert {setting["safe"] for setting in knobs} == {1}
    record = tune.tune([CASE], CPU, seconds=0.01, parameters=("colour", "speed"))
    assert not record.entries
    assert "has no colour; it has: speed, safe" in record.refused[CASE.name]


def test_a_second_run_continues_from_the_file(knobs, tmp_path):
    file = tmp_path / "trials.jsonl"
    first = tune.tune([CASE], CPU, seconds=0.01, trials=file).entries[0]
    lines = file.read_text().splitlines()
    assert len(lines) == first.trials
    reasons = {json.loads(line)["gate"] for line in lines}
    assert any(reason.startswith("outside the tolerance") for reason in reasons)
    assert "failed: RuntimeError: no room for 2" in reasons
    knobs.clear()
    second = tune.tune([CASE], CPU, seconds=0.01, trials=file).entries[0]
    assert knobs == []
    assert (second.trials, second.reused) == (0, first.trials)
    assert second.best == first.best
    file.write_text("\n".join(lines[:2]) + "\n")
    assert tune.tune([CASE], CPU, seconds=0.01, trials=file).entries[0].reused == 2
    other = [line.replace("sources", "source") for line in lines]
    file.write_text("\n".join(other) + "\n")
    assert tune.tune([CASE], CPU, seconds=0.01, trials=file).entries[0].reused == 0


def trial(value: int, median: float | None, spread: float = 0.01) -> Trial:
    low, high = (median * (1 - spread), median * (1 + spread)) if median else (None, None)
    return Trial("c", "b", "k", "s", {"p": value}, median, low, high, 10, "", "")


@pytest.mark.parametrize(
    ("present", "other", "wins"),
    [
        (trial(1, 10.0), trial(2, 9.0), 2),
        (trial(1, 10.0), trial(2, 9.9), 1),  # 1 %
        (trial(1, 10.0, 0.2), trial(2, 9.0, 0.2), 1),  # the bands touch
        (trial(1, None), trial(2, 9.0), 2),
        (trial(1, 10.0), trial(2, None), 1),
    ],
)
def test_noise_changes_nothing(present, other, wins):
    assert tune._better([present, other], {"p": 1}).setting == {"p": wins}


def test_the_torch_backend_under_other_numbers_is_right_and_put_back():
    before = (tiled.TASK_ROWS, products._PAIR_KEYS, products.Arithmetic.tile_keys)
    sets = [workload.decode_inputs(dataclasses.replace(CASE, s_k=700), torch.device("cpu"))]
    case = dataclasses.replace(CASE, s_k=700)
    knobs = knobs_module.knobs_of(case, sets, CPU, "torch")
    spans = []
    original = tiled.tile_spans
    try:
        tiled.tile_spans = lambda first, last, step: spans.append(step) or original(first, last, step)
        out, lse = knobs.under({"tile_keys": 256, "task_rows": 32, "pair_keys": 256}).call(0)
    finally:
        tiled.tile_spans = original
    assert tune.gate.check(case, sets[0], out, lse).is_green
    assert set(spans) == {256}
    assert before == (tiled.TASK_ROWS, products._PAIR_KEYS, products.Arithmetic.tile_keys)


def test_refusals_and_malformed_files(tmp_path):
    record = tune.tune([CASE], CPU, backend="cute")
    assert record.entries == ()
    assert "cute" in record.refused[CASE.name]
    assert "not tuned" in str(record)
    path = tmp_path / "trials.jsonl"
    path.write_text('{"case": 1}\n')
    with pytest.raises(ConfigError, match=r"trials\.jsonl:1: not a trial"):
        tune.read(path)
    assert tune.read(tmp_path / "none.jsonl") == []
    with pytest.raises(ConfigError, match="cannot write"):
        tune.write(record, tmp_path / "no" / "t.json")
    with pytest.raises(ConfigError, match="cannot append"):
        tune.append(path / "x", [trial(1, 1.0)])


def test_every_space_names_fields_of_its_kernels_config_or_numbers_of_its_plan():
    from openmla.backends.cute.decode_dense.config import Config as Many
    from openmla.backends.cute.decode_dense_small.config import Config as Few
    from openmla.backends.triton.config import Config as Tiles

    configs = {
        ("cute", "decode_dense"): Many(),
        ("cute", "decode_dense_small"): Few(),
        ("triton", "decode_split"): Tiles(16, 16, 4, 2),
    }
    for key, config in configs.items():
        fields = set(knobs_module.SPACES[key]) - (set(knobs_module.PLAN) if key[0] == "cute" else set())
        assert {name for name in fields if not isinstance(getattr(config, name, None), int)} == set()
    known = {(each.backend, each.name) for each in knobs_module.kernels("decode")}
    assert set(knobs_module.SPACES) == set(configs) | {("torch", "decode_tiled")}
    assert set(knobs_module.SPACES) <= known


H100 = Target.preset("h100_sxm")


def test_the_bundle_of_a_search_holds_every_setting_and_what_goes_with_them(tmp_path, monkeypatch):
    asked = {}

    def build(out, families, say):
        asked.update({name: list(variants) for name, (variants, _) in families.items()})
        return out / "manifest.json"

    monkeypatch.setattr("openmla.backends.cute.bundle.build", build)
    many = Case(batch=16, s_k=4096, h_q=128)
    knobs_module.bundle([many], H100, tmp_path, "cute", ("prefetch", "gate_left", "parts_percent"), print)
    assert set(asked) == {"decode_dense", "decode_dense_merge", "schedule"}
    settings = {(each.prefetch, each.gate_left, each.cluster) for each in asked["decode_dense"]}
    assert settings == {(ahead, gate, 2) for ahead in (0, 2, 4) for gate in (-2, -1, 19)}
    with pytest.raises(ConfigError, match="has no colour; it has: cluster"):
        knobs_module.bundle([many], H100, tmp_path, "cute", ("colour",), print)
    with pytest.raises(ConfigError, match="compiles at its first use"):
        knobs_module.bundle([many], H100, tmp_path, "triton", (), print)


def test_numbers_of_the_plan_reach_the_plan_and_nothing_else(monkeypatch):
    """The kernel is a fake that computes with the CPU and says what it was given."""
    from openmla.backends.cute import decode

    case = dataclasses.replace(CASE, s_k=700)
    sets = [workload.decode_inputs(case, torch.device("cpu"))]
    seen = []

    class Fake:
        backend, name = "cute", "decode_dense_small"

        def compile(self, problem, config, target):
            return decode.Compiled(config, decode.PlanOptions(128, 64, 1, 1, 1, 8192), None, None, scratch={"old": 1})

        def workspace_bytes(self, compiled, problem, policy):
            return 0

        def plan(self, compiled, problem, cache_seqlens, policy):
            seen.append((compiled.options.num_parts, compiled.options.overhead_blocks, compiled.scratch))

        def launch(self, compiled, problem, operands, plan):
            operands.out.zero_()

    fake = Fake()
    chosen = type("Chosen", (), {"kernel": fake, "config": None})()
    monkeypatch.setattr(knobs_module, "select", lambda *_: chosen)
    monkeypatch.setattr(knobs_module, "kernels", lambda _: [fake])
    monkeypatch.setattr(knobs_module, "replace", lambda each, **new: dataclasses.replace(each, **new) if each else each)
    found = knobs_module.knobs_of(case, sets, H100, "cute")
    assert found.default == {"parts_percent": 100, "overhead_blocks": 1}
    found.under({"parts_percent": 25, "overhead_blocks": 5}).call(0)
    assert seen == [(32, 5, {})]
