"""The vLLM backend: its own code against stand-ins for vLLM's classes, and a served model where vLLM is installed.

The second half needs vLLM on a CPU (3.5 GB, its own PyTorch) and is no part of the default set; docs/vllm.md has the
commands. It compares transformers, stock vLLM and vLLM on OpenMLA token by token.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
import torch

from openmla.core.errors import ProblemError
from openmla.integrations.vllm.decode import decode
from openmla.ops import native
from openmla.reference import attention as reference
from openmla.testing import budget

ROOT = Path(__file__).resolve().parents[2]
HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(
    not HAS_VLLM,
    reason="vLLM is not installed (3.5 GB, no part of the default set); see docs/vllm.md",
)


def step(batch: int = 3, s_q: int = 1, block: int = 16, dtype: torch.dtype = torch.float32):
    """What vLLM hands a layer: queries [tokens, h, 576], cache [blocks, block, 576], tables with garbage behind."""
    generator = torch.Generator().manual_seed(batch + s_q)
    lengths = torch.tensor([5 + 17 * i for i in range(batch)], dtype=torch.int32)
    cache = torch.randn(12, block, 576, generator=generator).to(dtype)
    table = torch.full((batch, 6), 99, dtype=torch.int32)
    pages = iter(torch.randperm(12, generator=generator).tolist())
    for i, n in enumerate(lengths.tolist()):
        for j in range(-(-n // block)):
            table[i, j] = next(pages)
    q = torch.randn(batch * s_q, 4, 576, generator=generator).to(dtype)
    return q, cache, table, lengths


@pytest.mark.parametrize("s_q", [1, 3])
@pytest.mark.parametrize("is_tuple", [False, True])
def test_decode_in_vllms_shapes_is_right(s_q, is_tuple) -> None:
    q, cache, table, lengths = step(s_q=s_q)
    given = (q[..., :512].contiguous(), q[..., 512:].contiguous()) if is_tuple else q
    out, lse = decode(given, cache, table, lengths, num_decodes=3, d_latent=512, scale=0.07, with_lse=True)
    golden = reference.decode(
        q.view(3, s_q, 4, 576), cache[:, :, None], table, lengths, d_v=512, softmax_scale=0.07, is_causal=True,
        with_bounds=True,
    )  # fmt: skip
    assert (tuple(out.shape), tuple(lse.shape)) == ((3 * s_q, 4, 512), (3 * s_q, 4))
    report = budget.check(out.view(3, s_q, 4, 512), lse.view(3, s_q, 4).transpose(1, 2), golden, dtype=torch.float32)
    report.require()


def test_layers_of_a_step_share_one_plan(monkeypatch) -> None:
    q, cache, table, lengths = step()
    made = []
    stock = native.plan
    monkeypatch.setattr(native, "plan", lambda *a, **o: made.append(1) or stock(*a, **o))
    plans: dict = {}
    options = {"num_decodes": 3, "d_latent": 512, "scale": 0.07, "plans": plans}
    first, none = decode(q, cache, table, lengths, **options)
    second, _ = decode(q, cache, table, lengths, **options)
    assert (len(made), none) == (1, None)
    assert torch.equal(first, second)
    decode(q, torch.randn(7, 16, 1152)[..., :576], table.clamp(max=6), lengths, **options)  # another layer's cache
    assert len(made) == 2


def test_the_log_names_the_kernel_once(caplog) -> None:
    from openmla.integrations.vllm.decode import _say_once

    _say_once.cache_clear()
    caplog.set_level("INFO", "vllm.openmla")
    q, cache, table, lengths = step()
    for _ in range(2):
        decode(q, cache, table, lengths, num_decodes=3, d_latent=512, scale=0.07, plans={})
    assert [each.getMessage() for each in caplog.records] == [
        "OpenMLA decodes: 4 query heads over rows of 576, torch.float32, by torch/decode_tiled"
    ]


def test_uneven_queries_are_refused() -> None:
    q, cache, table, lengths = step()
    with pytest.raises(ProblemError, match=r"3 query token\(s\) must be a multiple of the 2 request\(s\)"):
        decode(q, cache, table, lengths, num_decodes=2, d_latent=512, scale=1.0)


# Stand-ins: the names that vLLM 0.32 and 0.33 have, as small as they can be.


class Backends(enum.Enum):
    CUSTOM = "custom"
    CPU_MLA = "cpu"
    AMX_MLA = "amx"
    FLASHMLA = "flashmla"


@dataclasses.dataclass
class StandInDecode:
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    dcp_tot_seq_lens: torch.Tensor | None


class StandInImpl:
    def __init__(self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, *rest, **more) -> None:
        self.scale, self.kv_lora_rank, self.need_to_return_lse_for_decode = scale, 512, True


@pytest.fixture
def stand_ins(monkeypatch):
    registered: list[tuple[Backends, str]] = []
    common = {
        "MLACommonBackend": type("MLACommonBackend", (), {}), "MLACommonImpl": StandInImpl,
        "MLACommonMetadataBuilder": type("MLACommonMetadataBuilder", (), {}), "MLACommonDecodeMetadata": StandInDecode,
        "QueryLenSupport": enum.Enum("QueryLenSupport", "SINGLE_ONLY UNIFORM VARLEN"),
    }  # fmt: skip
    cpu = {"CPUMLABackend": type("CPUMLABackend", (), {}), "CPUMLAImpl": StandInImpl}
    modules = {
        "vllm.model_executor.layers.attention.mla_attention": common,
        "vllm.v1.attention.backend": {"AttentionCGSupport": enum.Enum("AttentionCGSupport", "NEVER UNIFORM_BATCH")},
        "vllm.v1.attention.backends.mla.cpu_mla": cpu,
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": Backends, "register_backend": lambda member, path: registered.append((member, path)),
        },
    }  # fmt: skip
    for name, content in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in modules:
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for own in ("backend", "cpu"):
        monkeypatch.delitem(sys.modules, f"openmla.integrations.vllm.{own}", raising=False)
    yield registered
    for own in ("backend", "cpu"):
        sys.modules.pop(f"openmla.integrations.vllm.{own}", None)


def load(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_vllm_finds_the_plugin() -> None:
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    found = [point for point in points if point.name == "openmla"]
    if not found:  # an installation from before the entry point
        found = ['openmla = "openmla.integrations.vllm:register"' in (ROOT / "pyproject.toml").read_text()]
    assert found
    assert all(found)


def test_register_takes_no_place_but_custom(stand_ins, monkeypatch) -> None:
    from openmla.integrations import vllm

    vllm.register()
    vllm.register()
    assert {member for member, _ in stand_ins} == {Backends.CUSTOM}
    backend = load(stand_ins[0][1])
    assert backend.get_name() == "CUSTOM"
    stand_ins.clear()
    monkeypatch.setenv("OPENMLA_VLLM_CPU", "1")
    vllm.register()
    assert {member for member, _ in stand_ins} == {Backends.CUSTOM, Backends.CPU_MLA, Backends.AMX_MLA}
    assert load(dict(stand_ins)[Backends.CPU_MLA]).get_impl_cls().__name__ == "OpenMLACPUImpl"


def test_backend_says_what_it_can(stand_ins) -> None:
    from openmla.integrations.vllm.backend import OpenMLABackend

    capable = [
        OpenMLABackend.supports_compute_capability(types.SimpleNamespace(major=major)) for major in (7, 8, 9, 10)
    ]
    assert capable == [False, True, True, True]

    def why(use_mla=True, has_sink=False, use_sparse=False):
        return OpenMLABackend.supports_combination(
            576, torch.bfloat16, "auto", 64, use_mla, has_sink, use_sparse, False, None
        )

    assert why() is None
    assert why(use_sparse=True) == "OpenMLA's vLLM backend has no sparse decode"
    assert "sinks and no attention without a latent" in why(use_mla=False, has_sink=True)
    assert OpenMLABackend.get_supported_kernel_block_sizes() == [64]


def test_a_step_through_builder_and_impl(stand_ins) -> None:
    from openmla.core.errors import UnsupportedError
    from openmla.integrations.vllm.backend import OpenMLABackend

    q, cache, table, lengths = step(block=64)
    built = OpenMLABackend.get_builder_cls()()._build_decode(
        block_table_tensor=table, seq_lens_device=lengths, max_seq_len=39, query_start_loc_cpu=None,
        query_start_loc_device=None, num_decode_tokens=3, max_query_len=1, dcp_tot_seq_lens_device=None,
    )  # fmt: skip
    impl = OpenMLABackend.get_impl_cls()(4, 576, 0.07, 1, None, None, "auto", None, "decoder", None)
    metadata = types.SimpleNamespace(decode=built, num_decodes=3, causal=True)
    out, lse = impl.forward_mqa(q, cache, metadata, None)
    want, want_lse = decode(q, cache, table, lengths, num_decodes=3, d_latent=512, scale=0.07, with_lse=True)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert len(built.plans) == 1
    with pytest.raises(UnsupportedError, match="sliding_window is set"):
        OpenMLABackend.get_impl_cls()(4, 576, 0.07, 1, None, 128, "auto", None, "decoder", None)


# vLLM itself, on a CPU.


@pytest.fixture(scope="module")
def tiny_v3(tmp_path_factory):
    """A random DeepSeek-V3 of true latent sizes on disk, two prompts, and what transformers makes of them."""
    import transformers

    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=256, hidden_size=128, intermediate_size=192, moe_intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=512, q_lora_rank=64, qk_rope_head_dim=64,
        qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, max_position_embeddings=512, n_shared_experts=1,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    folder = tmp_path_factory.mktemp("v3")
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    # transformers leaves these out; without them vLLM refuses the weights of the router.
    (folder / "config.json").write_text(
        json.dumps(saved | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 0})
    )
    prompts = [[3, 17, 99, 45, 200, 12, 7], [55, 2, 9, 130, 131, 132, 133, 134, 77, 78, 79, 80, 90, 91, 92, 93, 94, 95]]
    want = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        want.append(made[0, len(prompt) :].tolist())
    return folder, prompts, want


SERVE = """
import json, sys
from vllm import LLM, SamplingParams
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=4,
          compilation_config={"custom_ops": ["all", "-rotary_embedding"]})
outs = llm.generate([{"prompt_token_ids": p} for p in prompts],
                    SamplingParams(temperature=0, max_tokens=24, detokenize=False, ignore_eos=True))
from openmla.ops import dispatch
print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in outs]), len(dispatch._prepared))
"""


@needs_vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("is_ours", [False, True])
def test_served_tokens_equal_transformers(tiny_v3, is_ours) -> None:
    """Stock vLLM and vLLM on OpenMLA; the former shows that the comparison itself is sound."""
    folder, prompts, want = tiny_v3
    settings = {
        "OPENMLA_VLLM_CPU": str(int(is_ours)), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(folder), json.dumps(prompts)], capture_output=True, text=True, check=False,
        env=os.environ | settings,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-3000:]
    found, _, calls = lines[0].removeprefix("TOKENS ").rpartition(" ")
    assert json.loads(found) == want
    assert (int(calls) > 0) is is_ours, "OpenMLA's operators ran if and only if they were asked for"


def _ask(port: int, path: str, body: dict | None = None) -> dict:
    """One request to the server; an empty answer is {}."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read() or b"{}")


@pytest.fixture
def server(tiny_v3, tmp_path):
    """vLLM's server on OpenMLA; the port, and the log. (`vllm serve` itself asks for a package of another name here.)"""
    import transformers
    from tokenizers import Tokenizer, models

    folder = tiny_v3[0]
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(256)}, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1", "--port",
        str(port), "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager",
        "--max-num-seqs", "4", "--compilation-config", '{"custom_ops": ["all", "-rotary_embedding"]}',
    ]  # fmt: skip
    settings = {
        "OPENMLA_VLLM_CPU": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    log = tmp_path / "server.log"
    with log.open("w") as file:
        running = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | settings, start_new_session=True)
    try:
        deadline = time.monotonic() + 480
        while True:
            assert running.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"not up in time:\n{log.read_text()[-3000:]}"
            try:
                _ask(port, "/health")
                break
            except OSError:
                time.sleep(1)
        yield port, log
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGTERM)
        running.wait(60)


@needs_vllm
@pytest.mark.timeout(900)
def test_tokens_over_http_equal_transformers(tiny_v3, server) -> None:
    """Both prompts in one request, as a client sends them."""
    (_, prompts, want), (port, log) = tiny_v3, server
    answer = _ask(
        port, "/v1/completions",
        {
            "model": "tiny", "prompt": prompts, "max_tokens": 24, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        },
    )  # fmt: skip
    assert [choice["token_ids"] for choice in sorted(answer["choices"], key=lambda each: each["index"])] == want
    assert "OpenMLA decodes: 4 query heads over rows of 576" in log.read_text()
