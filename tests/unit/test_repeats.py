"""Repeated calls of a plan: which are repeated, which are looked at in full, and how kinds of tensors are compared.

Kinds are compared by PyTorch's own comparison, and by Python where that is not there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cute_stand_ins import LOG2_E, decode_tensors

import openmla
from openmla import flash_mla
from openmla.core.errors import PlanMismatchError, ProblemError, UnsupportedError
from openmla.ops import observers, recovery, repeats
from openmla.reference import attention


@pytest.fixture(params=["by PyTorch", "by Python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repeats._guards() is not None, "this PyTorch compares tensors in one call"
    if request.param == "by Python":
        monkeypatch.setattr(repeats, "_guards", lambda: None)


def _given() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(3, 1, 4, 8, dtype=torch.bfloat16), torch.zeros(5, 2, dtype=torch.int32)


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda given: given[:2],
    "a dimension more": lambda given: given[None],
    "strides": lambda given: torch.zeros(3, 1, 4, 16, dtype=given.dtype)[..., :8],
    "order": lambda given: torch.zeros(3, 1, 8, 4, dtype=given.dtype).mT,
    "expanded": lambda given: given[:1].expand(3, -1, -1, -1),
    "dtype of the same size": lambda given: given.half(),
    "dtype": lambda given: given.float(),
    "device": lambda given: given.to("meta"),
    "layout": lambda given: given.to_sparse(),
    "None": lambda given: None,
    "a list": lambda given: given.tolist(),
    "resized": lambda given: given.clone().resize_(3, 1, 8, 4),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("change", CHANGES)
def test_another_kind_is_told(change: str) -> None:
    q, table = _given()
    are_alike = repeats.kinds_of(q, table)
    assert are_alike(*_given())
    assert are_alike(q, table)
    assert not are_alike(CHANGES[change](q), table)


@pytest.mark.usefixtures("way")
def test_what_happens_to_a_tensor_itself_is_seen() -> None:
    q, table = _given()
    are_alike = repeats.kinds_of(q, table)
    table.resize_(2, 5)
    assert not are_alike(q, table)
    table.resize_(5, 2)
    assert are_alike(q, table)
    q.data = q.data.float()
    assert not are_alike(q, table)


@pytest.mark.usefixtures("way")
def test_contents_and_addresses_make_no_kind() -> None:
    q, table = _given()
    are_alike = repeats.kinds_of(q, table)
    moved = torch.ones(3 * 4 * 8 + 1, dtype=torch.bfloat16)
    assert are_alike(moved[:-1].view(q.shape), table + 7)
    with torch.no_grad():
        assert are_alike(q, table)


@pytest.mark.usefixtures("way")
def test_an_inference_tensor_may_be_refused_and_is_never_mistaken() -> None:
    """Whichever mode the first call ran in, the other mode gives the same answer about shapes."""
    with torch.inference_mode():
        q, table = _given()
        are_alike = repeats.kinds_of(q, table)
        assert are_alike(*_given())
        assert not are_alike(q[:2], table)
    assert not are_alike(q[:2], table)


@pytest.mark.parametrize("is_quick", [True, False], ids=["quick", "usual"])
@pytest.mark.parametrize("strides", [(16, 8, 1), (8, 24, 1)], ids=["plain", "other order"])
def test_made_tensors_are_like_the_one_given(
    monkeypatch: pytest.MonkeyPatch, strides: tuple[int, ...], is_quick: bool
) -> None:
    assert repeats._quick_empty("cpu") is not None and repeats._quick_empty("abacus") is None
    if not is_quick:
        monkeypatch.setattr(repeats, "_quick_empty", lambda device: None)
    like = torch.zeros(400, dtype=torch.bfloat16).as_strided((3, 2, 8), strides)
    make = repeats.maker_of(like)
    with torch.inference_mode():
        inside = make()
    first, second = make(), make()
    assert first.is_inference() is second.is_inference() is False and inside.is_inference()
    for made in (first, second, inside):
        assert (made.shape, made.dtype, made.device, made.requires_grad) == (like.shape, like.dtype, like.device, False)
        assert made.stride() == strides
    first.fill_(1)
    second.fill_(2)
    assert bool((first == 1).all())


@pytest.mark.parametrize("current", [0, 1])
def test_of_several_gpus_the_tensor_s_own_is_taken(monkeypatch: pytest.MonkeyPatch, current: int) -> None:
    class Tensor:
        device, shape, dtype = torch.device("cuda", 1), torch.Size([2, 3]), torch.float32

        def stride(self) -> tuple[int, int]:
            return 3, 1

    usual = torch.empty(2, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    monkeypatch.setattr(repeats, "_quick_empty", lambda device: lambda *given: given)
    monkeypatch.setattr(torch, "empty_strided", lambda *given, **options: usual)
    monkeypatch.setattr(torch, "empty_like", lambda like: like)
    made = repeats.maker_of(Tensor())  # type: ignore[arg-type]
    assert made() == ((2, 3), (3, 1), torch.float32) if current == 1 else made() is usual


@pytest.mark.parametrize("missed", ["shape", "stride", "dtype", "device"])
def test_a_pytorch_whose_comparison_misses_something_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, missed: str
) -> None:
    class Guards:
        def __init__(self, *tensors: torch.Tensor, **_: Any) -> None:
            self.kinds = [self.kind(each) for each in tensors]

        def kind(self, tensor: torch.Tensor) -> list[Any]:
            strides = tensor.stride() if tensor.layout == torch.strided else None
            kind = {"shape": tensor.shape, "stride": strides, "dtype": tensor.dtype, "device": tensor.device}
            return [value for name, value in kind.items() if name != missed]

        def check(self, *tensors: Any) -> bool:
            return [isinstance(each, torch.Tensor) and self.kind(each) for each in tensors] == self.kinds

    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", Guards)
    assert repeats._guards.__wrapped__() is None


@pytest.mark.parametrize("h_q", [16, 64, 128])
def test_the_next_layer_of_a_step_goes_straight_to_the_launch(calls: list[str], h_q: int) -> None:
    first = decode_tensors(h_q)
    second = {**first, "q": first["q"].flip(0), "kv_cache": first["kv_cache"].flip(0)}
    plan = openmla.plan(**first, backend="cute")
    calls.clear()
    for tensors in (first, second, first):
        out, lse = openmla.decode(**tensors, plan=plan, backend="cute")
        golden = attention.decode(*tensors.values(), softmax_scale=576**-0.5, d_v=512)
        assert torch.equal(out, golden.out.bfloat16())
        assert lse is not None and torch.equal(lse, golden.lse.float())
        assert out.is_contiguous() and lse.is_contiguous()
    assert calls == ["usual"], "one call is checked, the others repeat it"
    given = torch.empty_like(out)
    for _ in range(2):
        assert openmla.decode(**second, plan=plan, backend="cute", out=given)[0] is given
    assert calls == ["usual"] * 2


def test_a_repeated_call_is_watched_without_the_usual_way(calls: list[str]) -> None:
    class Watcher:
        def __init__(self) -> None:
            self.seen: list[tuple[Any, ...]] = []
            self.wants = itertools.cycle([False, True]).__next__

        def before(self, prepared: Any, operands: Any, plan: Any) -> str:
            return "begun"

        def after(self, prepared: Any, operands: Any, plan: Any, begun: Any) -> None:
            self.seen.append((prepared.tally.kernel, operands, plan, begun))

    tensors = decode_tensors(16)
    plan = openmla.plan(**tensors, backend="cute")
    want, _ = openmla.decode(**tensors, plan=plan, backend="cute")
    calls.clear()
    watcher = Watcher()
    observers.add(watcher)
    outs = [openmla.decode(**tensors, plan=plan, backend="cute")[0] for _ in range(4)]
    observers.remove(watcher)
    assert not calls and all(torch.equal(out, want) for out in outs)
    assert [(kernel, begun) for kernel, _, _, begun in watcher.seen] == [("decode_dense_small", "begun")] * 2
    for (_, operands, pieces, _), out in zip(watcher.seen, outs[1::2], strict=True):
        assert operands.out is out and operands.cache_seqlens is tensors["cache_seqlens"] and pieces is plan.pieces


def _changed(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Calls that differ from one that can be repeated in something that a rule looks at."""
    q, kv = tensors["q"], tensors["kv_cache"]
    return {
        "batch": {"q": q[:2]},
        "dtype": {"q": q.half()},
        "heads": {"q": q.repeat(1, 1, 2, 1)},
        "columns": {"kv_cache": kv[..., :512]},
        "q is no tensor": {"q": None},
        "lengths": {"cache_seqlens": tensors["cache_seqlens"].long()},
        "table": {"block_table": tensors["block_table"][:2]},
        "overlap": {"out": q[..., :512]},
        "lse base": {"lse_base": "10"},
    }


@pytest.mark.parametrize("what", list(_changed(decode_tensors(16))))
def test_what_a_rule_forbids_is_refused_behind_a_repeatable_call(calls: list[str], what: str) -> None:
    tensors = decode_tensors(16)
    plan = openmla.plan(**tensors, backend="cute")
    for _ in range(2):
        openmla.decode(**tensors, plan=plan, backend="cute", out=torch.empty(3, 1, 16, 512).bfloat16())
    with pytest.raises((ProblemError, PlanMismatchError, UnsupportedError)):
        openmla.decode(**{**tensors, **_changed(tensors)[what]}, plan=plan, backend="cute")  # type: ignore[arg-type]


@pytest.mark.parametrize("behind", [False, True], ids=["out in front", "out behind"])
@pytest.mark.parametrize("name", ["q", "kv_cache", "block_table", "cache_seqlens", "attn_sink"])
def test_a_repeated_call_keeps_its_out_apart_from_every_input(calls: list[str], name: str, behind: bool) -> None:
    """One step of 128 bytes decides: `out` beside an input is taken, `out` over its edge is refused."""
    tensors = {**decode_tensors(16), "attn_sink": torch.zeros(16)}
    plan = openmla.plan(**tensors, backend="cute")
    want, _ = openmla.decode(**tensors, plan=plan, backend="cute", out=torch.empty(3, 1, 16, 512).bfloat16())
    given, out_steps, steps = tensors[name], want.nbytes // 128, -(-tensors[name].nbytes // 128)
    memory = torch.zeros(128 * (steps + out_steps), dtype=torch.uint8)
    for shift in (0, 1):
        at, out_at = (0, steps - shift) if behind else (out_steps - shift, 0)
        moved = memory[128 * at :][: given.nbytes].view(given.dtype).view(given.shape)
        moved.copy_(given)
        out = memory[128 * out_at :][: want.nbytes].view(want.dtype).view(want.shape)
        again = {**tensors, name: moved}
        if name == "attn_sink":  # a sink of its own is another call, so this one is repeated with itself
            openmla.decode(**again, plan=plan, backend="cute", out=torch.empty_like(want))
        calls.clear()
        if shift:
            with pytest.raises(ProblemError, match="must not overlap"):
                openmla.decode(**again, plan=plan, backend="cute", out=out)
        else:
            assert torch.equal(openmla.decode(**again, plan=plan, backend="cute", out=out)[0], want)
        assert not calls, "it was the repeated call that looked"


def test_options_and_alignment_of_a_repeated_call_are_its_own(calls: list[str]) -> None:
    tensors = decode_tensors(128)
    plan = openmla.plan(**tensors, backend="cute")
    unaligned = torch.empty(tensors["q"].numel() + 1).bfloat16()[1:].view_as(tensors["q"])
    unaligned.copy_(tensors["q"])
    openmla.decode(**tensors, plan=plan, backend="cute")
    for changed in ({"softmax_scale": 0.5}, {"softmax_scale": None}, {"return_lse": False}, {"lse_base": "2"}):
        out, lse = openmla.decode(**tensors, plan=plan, backend="cute", **changed)  # type: ignore[arg-type]
        golden = attention.decode(*tensors.values(), softmax_scale=changed.get("softmax_scale") or 576**-0.5, d_v=512)
        assert torch.equal(out, golden.out.bfloat16())
        assert (lse is None) == ("return_lse" in changed)
        if "lse_base" in changed:
            assert lse is not None and torch.equal(lse, golden.lse.float() * LOG2_E)
    with pytest.raises(UnsupportedError, match="multiples of 16 bytes"):
        openmla.decode(**{**tensors, "q": unaligned}, plan=plan, backend="cute")


@pytest.mark.parametrize("name", ["block_table", "cache_seqlens"])
def test_a_tensor_resized_in_place_is_another_call(calls: list[str], name: str) -> None:
    """The same object again is not the same tensor."""
    tensors = decode_tensors(16)
    plan = openmla.plan(**tensors, backend="cute")
    for _ in range(2):
        openmla.decode(**tensors, plan=plan, backend="cute")
    tensors[name].resize_(2, *tensors[name].shape[1:])
    with pytest.raises(ProblemError):
        openmla.decode(**tensors, plan=plan, backend="cute")


def test_a_sink_that_moved_is_read_where_it_is(calls: list[str]) -> None:
    tensors = {**decode_tensors(16), "attn_sink": torch.nn.Parameter(torch.zeros(16), requires_grad=False)}
    plan = openmla.plan(**tensors, backend="cute")
    calls.clear()
    for value in (0.0, 9.0, 9.0):
        if float(tensors["attn_sink"][0]) != value:
            tensors["attn_sink"].data = torch.full((16,), value)
        out, _ = openmla.decode(**tensors, plan=plan, backend="cute")
        sink = tensors["attn_sink"]
        golden = attention.decode(*list(tensors.values())[:4], softmax_scale=576**-0.5, d_v=512, attn_sink=sink)
        assert torch.equal(out, golden.out.bfloat16())
    assert calls == ["usual"] * 2, "the second call with 9 repeats the first"


def test_what_changes_around_a_repeated_call_is_looked_at(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another setting, and a device that was lost: the usual way decides what they mean."""
    tensors = decode_tensors(16)
    plan = openmla.plan(**tensors, backend="cute")
    openmla.decode(**tensors, plan=plan, backend="cute")
    for change in (
        lambda: monkeypatch.setenv("OPENMLA_BACKEND", "torch"),
        lambda: monkeypatch.setitem(recovery.LOST, "cuda", "a test"),
    ):
        openmla.decode(**tensors, plan=plan, backend="cute")
        calls.clear()
        openmla.decode(**tensors, plan=plan, backend="cute")
        assert not calls
        change()
        openmla.decode(**tensors, plan=plan, backend="cute")
        assert calls == ["usual"]


def test_no_sink_and_another_view_of_it_are_looked_at(calls: list[str]) -> None:
    """Both pass whatever looks at addresses alone: no sink has none, and the view begins where the sink did."""
    tensors = decode_tensors(16)
    memory = torch.linspace(-9, 9, 32)
    plan = openmla.plan(**tensors, attn_sink=memory[:16], backend="cute")
    openmla.decode(**tensors, attn_sink=memory[:16], plan=plan, backend="cute")
    with pytest.raises(PlanMismatchError, match="has_sink"):
        openmla.decode(**tensors, plan=plan, backend="cute")
    with pytest.raises(ProblemError, match="attn_sink"):
        openmla.decode(**tensors, attn_sink=memory[::2], plan=plan, backend="cute")


@pytest.mark.parametrize(
    ("name", "is_out_given"), [("q", False), ("kv_cache", False), ("q", True), ("kv_cache", True), ("out", True)]
)
def test_an_address_that_wide_copies_cannot_take_is_another_call(
    calls: list[str], name: str, is_out_given: bool
) -> None:
    asked = decode_tensors(16)
    tensors = {**asked, "out": torch.zeros(3, 1, 16, 512).bfloat16()} if is_out_given else asked
    plan = openmla.plan(**asked, backend="cute")
    openmla.decode(**tensors, plan=plan, backend="cute")
    calls.clear()
    want = openmla.decode(**tensors, plan=plan, backend="cute")[0].clone()
    assert not calls
    given = tensors[name]
    moved = torch.empty(given.numel() + 1).bfloat16()[1:].view_as(given)
    moved.copy_(given)
    if name == "out":
        assert torch.equal(openmla.decode(**{**tensors, name: moved}, plan=plan, backend="cute")[0], want)
    else:
        with pytest.raises(UnsupportedError, match="multiples of 16 bytes"):
            openmla.decode(**{**tensors, name: moved}, plan=plan, backend="cute")
    assert calls == ["usual"]


def test_a_pytorch_without_its_comparison_repeats_calls_as_well(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "_guards", lambda: None)
    tensors = decode_tensors(16)
    plan = openmla.plan(**tensors, backend="cute")
    for _ in range(3):
        openmla.decode(**tensors, plan=plan, backend="cute")
    assert calls == ["usual"] * 2, "the plan and the first call"
    with pytest.raises((ProblemError, PlanMismatchError)):
        openmla.decode(**{**tensors, "q": tensors["q"][:2]}, plan=plan, backend="cute")


def test_checks_that_watch_every_call_are_not_passed_by(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = decode_tensors(16)
    plan = openmla.plan(**tensors, backend="cute")
    for mode, ways in (("fast", 1), ("strict", 2), ("strict", 3)):
        monkeypatch.setenv("OPENMLA_CHECKS", mode)
        openmla.decode(**tensors, plan=plan, backend="cute")
        assert calls.count("usual") == ways + 1


def test_plans_of_one_signature_share_what_they_compare(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans come and go with every step; the comparison is made once, and again where another mode makes it useless."""
    made = []
    stock = repeats.kinds_of
    monkeypatch.setattr(repeats, "kinds_of", lambda *tensors: (made.append(len(tensors)), stock(*tensors))[1])
    tensors = decode_tensors(16)
    for step in range(3):
        plan = openmla.plan(**tensors, backend="cute")
        calls.clear()
        for _ in range(3):
            openmla.decode(**tensors, plan=plan, backend="cute")
        assert calls == ["usual"], step
    assert made == [4]
    with torch.inference_mode():
        calls.clear()
        for _ in range(3):
            openmla.decode(**tensors, plan=plan, backend="cute")
        assert calls == ["usual"] and made == [4, 4]
    for _ in range(2):
        openmla.decode(**tensors, plan=plan, backend="cute", out=torch.empty(3, 1, 16, 512).bfloat16())
    assert made == [4, 4, 5]


def _border(tensors: dict[str, torch.Tensor], meta: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    given = {"tile_scheduler_metadata": meta, "num_splits": None, "head_dim_v": 512} | options
    return flash_mla.flash_mla_with_kvcache(*tensors.values(), **given)


@pytest.fixture
def step(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors, and metadata of FlashMLA's that two layers have used."""
    monkeypatch.setenv("OPENMLA_BACKEND", "cute")
    tensors, (meta, _) = decode_tensors(16), flash_mla.get_mla_metadata()
    for _ in range(2):
        _border(tensors, meta)
    calls.clear()
    return tensors, meta


def test_flash_mla_s_interface_repeats_calls_as_well(step: Any, calls: list[str]) -> None:
    first, meta = step
    second = {**first, "q": first["q"].flip(0), "kv_cache": first["kv_cache"].flip(0)}
    for tensors in (second, first):
        out, lse = _border(tensors, meta)
        golden = attention.decode(*tensors.values(), softmax_scale=576**-0.5, d_v=512)
        assert torch.equal(out, golden.out.bfloat16())
        assert torch.equal(lse, golden.lse.float().nan_to_num(neginf=torch.inf)), "a request without keys has +inf"
        assert bool((lse[1] == torch.inf).all())
    assert not calls


def test_what_differs_at_flash_mla_s_interface_is_looked_at(step: Any, calls: list[str]) -> None:
    tensors, meta = step
    out, _ = _border(tensors, meta, softmax_scale=0.5)
    golden = attention.decode(*tensors.values(), softmax_scale=0.5, d_v=512)
    assert torch.equal(out, golden.out.bfloat16()) and calls == ["usual"]
    meta.plan = None  # whoever takes it away gets a new one
    assert torch.equal(_border(tensors, meta, softmax_scale=0.5)[0], out)
    assert len(calls) == 3, "the plan, and the call"
    tensors["cache_seqlens"].copy_(torch.tensor([3, 640, 0]))  # on a CPU the host can see it
    golden = attention.decode(*tensors.values(), softmax_scale=0.5, d_v=512)
    assert torch.equal(_border(tensors, meta, softmax_scale=0.5)[0], golden.out.bfloat16())
    with pytest.raises(ProblemError, match="k_cache"):
        _border({**tensors, "kv_cache": tensors["kv_cache"].half()}, meta, softmax_scale=0.5)
    _border(tensors, meta, softmax_scale=0.5, out=torch.empty_like(out))
    calls.clear()
    over = tensors["q"].flatten()[: out.numel()].view_as(out)
    with pytest.raises(ProblemError, match=r"(?s)flash_mla_with_kvcache.*out must not overlap"):
        _border(tensors, meta, softmax_scale=0.5, out=over)
    assert not calls, "it was the repeated call that looked"
    for wrong in ({"num_splits": tensors["cache_seqlens"]}, {"topk_length": tensors["cache_seqlens"]}):
        with pytest.raises(ProblemError):
            _border(tensors, meta, softmax_scale=0.5, **wrong)
    for name in ("block_table", "cache_seqlens"):
        with pytest.raises(ProblemError, match="must be given"):
            _border({**tensors, name: None}, meta, softmax_scale=0.5)


def test_the_plan_of_flash_mla_s_metadata_may_be_used_by_others(step: Any, calls: list[str]) -> None:
    tensors, meta = step
    want, lse = _border(tensors, meta)
    openmla.decode(**tensors, plan=meta.plan, softmax_scale=0.5, lse_base="2", backend="cute")
    calls.clear()
    again, lse_again = _border(tensors, meta)
    assert torch.equal(again, want) and torch.equal(lse_again, lse) and not calls
