"""openmla-tiny: its training script learns, what it writes loads, and the curve is drawn from rows."""

from __future__ import annotations

import importlib.util
import json
from argparse import Namespace
from array import array
from pathlib import Path

import pytest
import torch

HOME = Path(__file__).resolve().parents[2] / "models" / "openmla-tiny"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """train.py as a module, its folders elsewhere and its model smaller."""
    spec = importlib.util.spec_from_file_location("openmla_tiny_train", HOME / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = module.tiny()
    small = type(small)(2048, 1, 32, type(small.mla)(32, 2, q_lora_rank=16, d_nope=16, d_v=16), 1024)
    monkeypatch.setattr(module, "tiny", lambda: small)
    monkeypatch.setattr(module, "BUILD", tmp_path)
    monkeypatch.setattr(module, "HERE", tmp_path / "out")
    (tmp_path / "out").mkdir()
    for name, count in (("train", 4000), ("held_out", 600)):
        (tmp_path / f"{name}.bin").write_bytes(array("H", [(7 * i * i) % 31 for i in range(count)]).tobytes())
    return module


def options(tmp_path: Path, **changes) -> Namespace:
    given = {
        "device": "cpu", "threads": 1, "seed": 0, "length": 32, "batch": 8, "rate": 1e-2, "decay": 0.1, "steps": 40, "seconds": None,
        "every": 20, "held_out": 8, "out": tmp_path,
    }  # fmt: skip
    return Namespace(**given | changes)


def test_it_learns_and_writes_what_transformers_reads(script, tmp_path) -> None:
    script.train(options(tmp_path))
    facts, *rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert (facts["steps"], [row["step"] for row in rows]) == (40, [20, 40])
    assert rows[-1]["held_out"] < rows[0]["held_out"] < 7.7
    safetensors = pytest.importorskip("safetensors.torch", reason='needs safetensors: pip install "openmla[hf]"')
    pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "openmla[lab]"')
    transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "openmla[hf]"')
    script.export(tmp_path)
    written = safetensors.load_file(script.HERE / "model.safetensors")
    assert all(weight.dtype == torch.bfloat16 for weight in written.values())
    assert "<svg" in (script.HERE / "loss.svg").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(script.HERE, dtype=torch.float32)
    ids = torch.tensor([[(7 * i * i) % 31 for i in range(33)]])
    ours = script.Decoder(script.tiny())
    ours.load_state_dict({name: weight.float() for name, weight in written.items()})
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours(ids), rtol=1e-3, atol=1e-3)


def test_the_card_says_what_the_rows_say() -> None:
    spec = importlib.util.spec_from_file_location("openmla_tiny_train", HOME / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page, rows = (HOME / "README.md").read_text(), (HOME / "training.jsonl").read_text()
    assert module.card(page, rows) == page, "run: python models/openmla-tiny/train.py export"
    assert sum(path.stat().st_size for path in HOME.iterdir() if path.is_file()) <= 12e6


def test_the_fused_attention_of_training_is_the_block(script) -> None:
    model = script.start(3)
    ids = torch.randint(2048, (2, 19))
    with torch.no_grad():
        fused = model(ids)
        for layer in model.model.layers:
            layer.self_attn.__class__ = script.MLA
        torch.testing.assert_close(fused, model(ids), rtol=1e-4, atol=1e-5)


def test_a_time_limit_ends_the_schedule_too(script, tmp_path) -> None:
    script.train(options(tmp_path, steps=10**9, seconds=0.5))
    facts = json.loads((tmp_path / "training.jsonl").read_text().splitlines()[0])
    assert 0 < facts["steps"] < 10**6


def test_the_tokenizer_keeps_every_character() -> None:
    tokenizers = pytest.importorskip("tokenizers", reason='needs tokenizers: pip install "openmla[hf]"')
    tokenizer = tokenizers.Tokenizer.from_file(str(HOME / "tokenizer.json"))
    text = 'class Ü:\n    def f(x):\n\treturn "a\\n", [1, 20]\r\n\n\n        # 日本\n'
    found = tokenizer.encode(text)
    assert tokenizer.decode(found.ids) == text
    assert tokenizer.get_vocab_size() == 2048
    assert len(tokenizer.encode("\n        ").ids) == 1, "indentation is one token"
