"""The laboratory: suites that refuse typing errors, rows that survive, peers that say why not, gates that hold."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from openmla.core.errors import ConfigError
from openmla.core.target import Target
from openmla.lab import ceilings, clock, gate, peers, runner, store, suite, table, verify, workload
from openmla.lab.peers import Contender, Refusal
from openmla.lab.suite import Case, Suite

CPU = Target.preset("cpu")
TINY = Case(batch=2, s_k=70, h_q=4, dtype="fp32")
ROOF = ceilings.Ceilings({"bf16": 1.0, "fp32": 0.5}, 2048, 50.0, 40.0)


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# suites


@pytest.mark.parametrize("name", ["cpu_decode", "decode_dense", "smoke"])
def test_shipped_suite_loads(name):
    found = suite.load(name)
    assert found.cases
    assert found.description
    assert set(found.peers) <= set(peers.PEERS)
    assert len({case.name for case in found.cases}) == len(found.cases)


def test_decode_dense_holds_every_cell_that_a_bar_names():
    names = {case.name for case in suite.load("decode_dense").cases}
    assert {
        "decode-b128-sq2-hq128-sk16384-bf16-warm",
        "decode-b128-sq1-hq128-sk32768-bf16-varlen",
        "decode-b128-sq1-hq16-sk16384-bf16-varlen",
        "decode-b4-sq1-hq16-sk32768-bf16",
        "decode-b1-sq1-hq16-sk4096-bf16",
        "decode-b1-sq1-hq128-sk4096-bf16",
        "decode-b128-sq1-hq128-sk16384-bf16-varlen-batch_invariant",
    } <= names


def test_lists_are_choices_and_defaults_apply(tmp_path):
    path = written(
        tmp_path, 'peers = ["sdpa"]\n[defaults]\nh_q = 8\n[[case]]\nbatch = [1, 2]\ns_k = [64, 65]\npeers = ["eager"]\n'
    )
    found = suite.load(path)
    assert [(case.batch, case.s_k, case.h_q) for case in found.cases] == [
        (1, 64, 8),
        (1, 65, 8),
        (2, 64, 8),
        (2, 65, 8),
    ]
    assert found.name == "mine"
    assert found.peers == ("sdpa",)
    assert found.cases[0].peers == ("eager",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[case]]\nbatch = 1\n", r"mine\.toml: .*\n.*case 1: key 's_k' is missing"),
        ("[[case]]\nbatch = 1\ns_k = 5\nheads = 3\n", r"case 1: unknown key 'heads'; legal: op, batch"),
        ("[[case]]\nbatch = 0\ns_k = 5\n", r"case 1: batch must be an integer from 1 to 65536, got 0"),
        ('[[case]]\nbatch = [1, "2"]\ns_k = 5\n', r"batch must be an integer from 1 to 65536, got '2'"),
        ("[[case]]\nbatch = true\ns_k = 5\n", r"batch must be an integer .* got True"),
        ("[[case]]\nbatch = 1\ns_k = []\n", r"case 1: s_k is an empty list"),
        (
            '[[case]]\nbatch = 1\ns_k = 5\ndtype = "float"\n',
            r"dtype must be one of bf16, fp16, fp32, e4m3, got 'float'",
        ),
        ("[[case]]\nbatch = 1\ns_k = 5\nis_causal = 1\n", r"is_causal must be true or false, got 1"),
        ("[[case]]\nbatch = 1\ns_k = 5\nh_q = 3\nh_kv = 2\n", r"h_q=3 is not a multiple of h_kv=2"),
        ("[[case]]\nbatch = 1\ns_k = 5\nd_qk = 64\n", r"d_v=512 exceeds d_qk=64"),
        ("[[case]]\nbatch = 1\ns_k = 5\n[[case]]\nbatch = 1\ns_k = 5\n", r"appears 2 times"),
        ("[[case]]\nbatch = 1\ns_k = 5\npeers = 3\n", r"case 1: peers must be a list of names, got 3"),
        ("peer = 1\n[[case]]\nbatch = 1\ns_k = 5\n", r"unknown key 'peer'; legal: description, peers"),
        ("case = 3\n", r"needs at least one \[\[case\]\] table"),
        ("defaults = 3\n[[case]]\nbatch = 1\ns_k = 5\n", r"defaults must be a table, got 3"),
        ("batch = \n", r"mine\.toml: not valid TOML"),
    ],
)
def test_suite_error_names_file_and_key(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        suite.load(written(tmp_path, text))


def test_unknown_suite_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"unknown suite 'nosuch'; use one of: .*cpu_decode"):
        suite.load("nosuch")
    with pytest.raises(ConfigError, match=r"no case of suite smoke matches '\*hq7\*'; it has 3: decode"):
        suite.load("smoke").matching("*hq7*")


def test_varlen_lengths_are_a_function_of_the_case():
    case = Case(batch=128, s_k=4096, s_q=2, lengths="varlen")
    lengths = case.draw_lengths()
    assert lengths == dataclasses.replace(case, h_q=16, policy="batch_invariant").draw_lengths()
    assert all(2 <= length <= 8192 for length in lengths)
    assert 3500 < sum(lengths) / 128 < 4700
    assert len(set(lengths)) > 100


# workload


def test_inputs_are_paged_at_random_and_differ_between_sets():
    case = dataclasses.replace(TINY, lengths="varlen", batch=5, page_size=16)
    first, again, other = (workload.decode_inputs(case, torch.device("cpu"), index) for index in (0, 0, 1))
    assert torch.equal(first.kv_cache, again.kv_cache)
    assert not torch.equal(first.kv_cache, other.kv_cache)
    assert first.lengths == other.lengths
    used = [
        page
        for row, length in zip(first.block_table.tolist(), first.lengths, strict=True)
        for page in row[: -(-length // 16)]
    ]
    assert sorted(used) == list(range(first.kv_cache.shape[0]))
    assert used != sorted(used)


def test_cold_sets_exceed_the_cache_and_warm_is_one():
    big = workload.cpu_cache_bytes()
    assert workload.num_sets(TINY, CPU, big // 4, True) * (big // 4) >= 3 * big
    assert workload.num_sets(dataclasses.replace(TINY, cache="warm"), CPU, 1000, True) == 1
    assert workload.num_sets(TINY, Target.preset("h100_sxm"), 1 << 30, False) == 1


# peers


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", ["fixed", "varlen"])
@pytest.mark.parametrize("h_kv", [1, 2])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_every_form_of_a_peer_is_right(name, h_kv, lengths, causal, monkeypatch):
    case = dataclasses.replace(TINY, batch=3, s_q=2, h_kv=h_kv, lengths=lengths, is_causal=causal, page_size=16)
    sets = [workload.decode_inputs(case, torch.device("cpu"), index) for index in range(2)]
    tried = []

    def all_of_them(who, kernel, ways, device):
        tried.extend(ways.items())
        return Contender(who, "peer", kernel, "", next(iter(ways.values())))

    monkeypatch.setattr(peers, "_fastest", all_of_them)
    peers.peer(case, sets, CPU, name)
    assert tried
    for form, call in tried:
        for index, inputs in enumerate(sets):
            verdict = gate.check(case, inputs, *call(index))
            assert verdict.is_green, f"{form}: {verdict.text}"


def test_ceilings_do_the_products_of_the_case():
    sets = [workload.decode_inputs(TINY, torch.device("cpu"))]
    for name in ("matmul", "gemm"):
        contender = peers.peer(TINY, sets, CPU, name)
        assert isinstance(contender, Contender)
        assert contender.kind == "ceiling"
    assert contender.flops == 2 * 2048**3


def test_flash_mla_says_every_reason():
    case = dataclasses.replace(TINY, page_size=16)
    refusal = peers.peer(case, [workload.decode_inputs(case, torch.device("cpu"))], CPU, "flash_mla")
    assert isinstance(refusal, Refusal)
    for part in (
        "for sm_90a, this is cpu",
        "takes bf16 and fp16",
        "takes pages of 64",
        "pip install --no-deps sgl-flash-mla",
    ):
        assert part in refusal.reason


def test_unknown_peer_is_an_error():
    with pytest.raises(ConfigError, match="unknown peer 'nosuch'; use one of: sdpa"):
        peers.peer(TINY, [], CPU, "nosuch")


def test_unsupported_backend_says_why():
    sets = [workload.decode_inputs(TINY, torch.device("cpu"))]
    refusal = peers.backend(TINY, sets, Target.detect("cpu"), "triton")
    assert isinstance(refusal, Refusal)
    assert refusal.reason.startswith("triton/")


# gate


def test_gate_is_green_for_ours_and_red_for_a_missing_token():
    inputs = workload.decode_inputs(TINY, torch.device("cpu"))
    right = peers.backend(TINY, [inputs], Target.detect("cpu"), "torch")
    assert gate.check(TINY, inputs, *right.call(0)).is_green
    shorter = dataclasses.replace(inputs, cache_seqlens=inputs.cache_seqlens - 1)
    wrong = peers.backend(TINY, [shorter], Target.detect("cpu"), "torch")
    verdict = gate.check(TINY, inputs, *wrong.call(0))
    assert not verdict.is_green
    assert "outside the tolerance on 2 of 2 requests" in verdict.text


def test_gate_refuses_nothing_and_other_shapes():
    inputs = workload.decode_inputs(TINY, torch.device("cpu"))
    assert not gate.check(TINY, inputs, None, None).is_green
    assert not gate.check(TINY, inputs, torch.zeros(2, 1, 4, 511), None).is_green


def test_gate_of_a_large_batch_takes_both_ends():
    case = Case(batch=128, s_k=32768, h_q=128, lengths="varlen")
    lengths = tuple(case.draw_lengths())
    inputs = dataclasses.replace(workload.decode_inputs(TINY, torch.device("cpu")), lengths=lengths)
    chosen = gate.requests(case, inputs)
    assert 1 <= len(chosen) < 128
    assert lengths.index(min(lengths)) in chosen
    few = gate.requests(dataclasses.replace(case, h_q=1), inputs)
    assert {lengths.index(min(lengths)), lengths.index(max(lengths))} <= set(few)
    assert gate.requests(TINY, dataclasses.replace(inputs, lengths=(70, 70))) == [0, 1]


# runner


def run_one(case: Case, monkeypatch, contenders: dict[str, object], **options) -> runner.CaseResult:
    monkeypatch.setattr(peers, "backend", lambda case, sets, target, name: contenders[name](sets))
    here = Suite("mine", "", (case,))
    chosen = runner.Options(backends=tuple(contenders), peers=options.get("peers", ()), seconds=0.01)
    return runner.run_case(here, case, chosen, CPU, ROOF, {}, lambda text: None)


def test_a_red_gate_yields_no_number(monkeypatch):
    calls = []

    def liar(sets):
        def call(index):
            calls.append(index)
            return torch.zeros(2, 1, 4, 512), None

        return Contender("liar", "backend", "lies", "", call)

    result = run_one(TINY, monkeypatch, {"liar": liar})
    assert result.rows == []
    assert calls == [0]
    assert [each.who for each in result.wrong] == ["liar"]
    assert "NO NUMBER, outside the tolerance" in table.case_table(result)


def test_a_crash_is_a_finding_and_the_others_go_on(monkeypatch):
    honest = peers.backend

    def crash(sets):
        def call(index):
            raise RuntimeError("illegal instruction")

        return Contender("crash", "backend", "crashes", "", call)

    result = run_one(
        TINY, monkeypatch, {"crash": crash, "torch": lambda sets: honest(TINY, sets, Target.detect("cpu"), "torch")}
    )
    assert [row.who for row in result.rows] == ["torch"]
    assert result.wrong[0].reason == "failed: RuntimeError: illegal instruction"


def test_rows_carry_ratios_fractions_and_reasons(monkeypatch, tmp_path):
    honest = peers.backend
    result = run_one(
        TINY, monkeypatch, {"torch": lambda sets: honest(TINY, sets, Target.detect("cpu"), "torch")},
        peers=("eager", "matmul", "flash_mla"),
    )  # fmt: skip
    ours, eager, matmul = result.rows
    assert ours.kind == "backend"
    assert matmul.kind == "ceiling"
    want = {"eager": eager.median_us / ours.median_us, "matmul": matmul.median_us / ours.median_us}
    assert ours.ratio == pytest.approx(want)
    assert ours.n >= 10
    assert ours.p20_us <= ours.median_us <= ours.p80_us
    assert ours.flops == 2 * 2 * 70 * 4 * (576 + 512)
    assert ours.tflops == pytest.approx(ours.flops / ours.median_us / 1e6)
    assert ours.fraction_gemm == pytest.approx(ours.tflops / 0.5)
    assert ours.fraction_roofline == max(ours.fraction_gemm, ours.fraction_read)
    coded = dataclasses.replace(ours, dtype="e4m3", fraction_gemm=1.08, fraction_read=0.5)
    assert coded.fraction_roofline == 0.5, "the product beside it is one of bf16"
    assert "flash_mla" in {each.who for each in result.refusals}
    text = table.case_table(result)
    assert "not run: " in text
    assert max(map(len, text.splitlines())) <= 100
    json.dumps(result.as_dict(), allow_nan=False)


def test_contenders_take_turns_and_different_sets(monkeypatch):
    order = []
    monkeypatch.setattr(clock, "seconds", lambda call, device: call() or 1e-3)

    def noting(name):
        return Contender(name, "ceiling", "", "", lambda index: order.append((name, index)))

    timing, timers = runner._timers([noting("a"), noting("b")], [None, None], 4, torch.device("cpu"), True, False)
    assert timing == "call"
    samples = runner._rounds(timers, 1e-9, lambda text: None)
    assert [len(each) for each in samples] == [10, 10]
    untimed, timed = order[4::2], order[5::2]  # two runs of everybody come before the rounds
    assert [name for name, _ in untimed] == [name for name, _ in timed], "everybody runs behind itself"
    assert [name for name, _ in timed[:4]] == ["a", "b", "b", "a"]
    assert all(before[1] != after[1] for before, after in zip(untimed, timed, strict=True))
    assert {index for _, index in timed} == {0, 1, 2, 3}


# rows


def example_row(**changes) -> store.Row:
    row = store.Row(
        suite="s", case="c", who="torch", kind="backend", kernel="k", config="", policy="balanced", median_us=2.0,
        p20_us=1.0, p80_us=3.0, n=10, host_us=None, flops=1, bytes=2, tflops=0.1, gbps=1.0, fraction_gemm=0.2,
        fraction_read=0.1, ratio={"sdpa": 2.5}, gate="green", timing="call", cache="cold", dtype="fp32", inputs="x",
        seed=0, environment={"device": "d"}, ceilings={"read_gbps": 1.0}, utc=store.now(),
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def test_rows_round_trip_and_only_grow(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    store.append(path, [example_row()])
    before = path.read_bytes()
    store.append(path, [example_row(who="sdpa", kind="peer", ratio={})])
    assert path.read_bytes().startswith(before)
    first, second = store.read(path)
    assert first == dataclasses.replace(example_row(), utc=first.utc)
    assert (second.who, second.ratio) == ("sdpa", {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows\.jsonl:2: not JSON"),
        ("[1]", r"rows\.jsonl:2: a row is an object, got list"),
        ('{"case": "c"}', r"rows\.jsonl:2: unknown or missing key\(s\): bytes, cache"),
    ],
)
def test_malformed_row_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    store.append(path, [example_row()])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=message):
        store.read(path)


def test_a_row_without_a_number_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(dataclasses.asdict(example_row(median_us=0))) + "\n")
    with pytest.raises(ConfigError, match="median_us must be a positive number, got 0"):
        store.read(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.append(path, [example_row(median_us=float("nan"))])


def test_rows_that_cannot_be_written_say_where(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot append to .*rows\.jsonl: .*--out"):
        store.append(tmp_path / "file" / "rows.jsonl", [example_row()])


def test_environment_names_versions_and_commit():
    facts = store.environment(CPU)
    assert {"device", "threads", "python", "torch", "openmla", "git_sha", "git_dirty"} <= set(facts)
    json.dumps(facts)


def test_quantile_is_a_measured_value():
    assert clock.quantile([1, 2, 3, 4, 100], 0.5) == 3
    assert clock.quantile([1, 2, 3, 4, 100], 0.2) == 2
    assert clock.quantile([7], 0.8) == 7


# verify


def test_verify_passes_here_and_gives_a_record():
    record = verify.verify(cases=2, seconds=60, device="cpu")
    assert record.passed, str(record)
    assert {each.op for each in record.tallies} == {"decode", "sparse_decode", "sparse_prefill", "prefill"}
    assert all(each.passed + sum(each.skipped.values()) == 2 for each in record.tallies)
    json.dumps(record.as_dict(), allow_nan=False)


def test_verify_names_the_command_of_a_failure(monkeypatch):
    monkeypatch.setattr(verify.hostile.Case, "run", lambda self, backend, operands: (torch.zeros(1), None, None))
    record = verify.verify(ops=["decode"], backends=["torch"], cases=3, seed=40, device="cpu")
    assert not record.passed
    assert len(record.tallies[0].failures) == 3
    assert "openmla verify --op decode --backend torch --device cpu --seed 41 --cases 1" in str(record)
    assert "NOT within tolerance" in str(record)


def test_verify_counts_what_a_backend_does_not_support():
    record = verify.verify(ops=["decode"], backends=["triton"], cases=2, device="cpu")
    assert not record.passed
    assert sum(record.tallies[0].skipped.values()) == 2
    assert "nothing ran" in str(record)
    assert sum(json.loads(json.dumps(record.as_dict()))["tallies"][0]["skipped"].values()) == 2


def test_verify_stops_on_time():
    record = verify.verify(cases=10**6, seconds=0.2, device="cpu")
    assert record.is_cut
    assert record.seconds < 30


@pytest.mark.parametrize(
    ("argument", "word"), [({"ops": ["x"]}, "operation 'x'"), ({"backends": ["x"]}, "backend 'x'")]
)
def test_verify_refuses_unknown_names(argument, word):
    with pytest.raises(ConfigError, match=f"unknown {word}; use one of"):
        verify.verify(**argument)
