"""Quality: what a smaller latent costs, asked of small models that are trained for it.

One byte-level language model per form of attention, equal in everything else, trained on the source of Python's own
library and judged on a part of it that none has seen. Such models are far from those that are served: read the order
and the shape of the curve, not the numbers. Training uses the expanded form, which is the absorbed one before the
product with W_uk is moved into the query.

    python -m openmla.lab.quality --out bench/results/latent_quality.jsonl       # a minute per model on one core
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from openmla.core.errors import ConfigError
from openmla.lab import progress, store

D_MODEL, LAYERS, HEADS, D_NOPE, D_ROPE, D_V = 128, 2, 8, 16, 8, 16
CONTEXT, BATCH = 96, 16
STEPS = 400
# (form, KV heads or latent size). MLA keeps latent + D_ROPE numbers per token, the others KV heads * (24 + 16).
VARIANTS: tuple[tuple[str, int], ...] = (
    ("mla", 4), ("mla", 8), ("mla", 16), ("mla", 32), ("mla", 64), ("mla", 128), ("mqa", 1), ("gqa", 2), ("mha", 8),
)  # fmt: skip
_BYTES = 3 << 20


@dataclass(frozen=True)
class Outcome:
    """One trained model. `loss` in nats per byte on unseen text, averaged over the same windows for all."""

    form: str
    size: int  # d_latent, or KV heads
    kv_numbers: int  # kept per token and layer
    parameters: int
    seed: int
    steps: int
    loss: float
    train_loss: float
    seconds: float
    text_sha: str
    torch: str
    python: str
    utc: str


def text() -> tuple[torch.Tensor, torch.Tensor, str]:
    """(training bytes, unseen bytes, hash of both): modules of the standard library in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.is_file())
    content = b"".join(path.read_bytes() for path in files)[:_BYTES]
    if len(content) < _BYTES // 4:
        raise ConfigError(f"{folder} holds {len(content)} bytes of Python source; the study needs {_BYTES // 4}")
    whole = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    cut = int(0.9 * whole.numel())
    return whole[:cut], whole[cut:], hashlib.sha256(content).hexdigest()[:12]


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """RoPE over the positions of x [..., length, D_ROPE]."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * rates
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class _Attention(nn.Module):
    """Causal self-attention in one form; heads, head sizes and RoPE are the same in all."""

    def __init__(self, form: str, size: int) -> None:
        super().__init__()
        self.form, self.size = form, size
        self.q = nn.Linear(D_MODEL, HEADS * (D_NOPE + D_ROPE), bias=False)
        self.out = nn.Linear(HEADS * D_V, D_MODEL, bias=False)
        if form == "mla":
            self.down = nn.Linear(D_MODEL, size + D_ROPE, bias=False)
            self.norm = nn.RMSNorm(size)
            self.up = nn.Linear(size, HEADS * (D_NOPE + D_V), bias=False)
        else:
            self.kv = nn.Linear(D_MODEL, size * (D_NOPE + D_ROPE + D_V), bias=False)

    @property
    def kv_numbers(self) -> int:
        """Numbers that a cache would keep per token."""
        return self.size + D_ROPE if self.form == "mla" else self.size * (D_NOPE + D_ROPE + D_V)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, -1).transpose(1, 2)
        q = torch.cat([q[..., :D_NOPE], _rotate(q[..., D_NOPE:])], -1)
        if self.form == "mla":
            latent, rope = self.down(x).split([self.size, D_ROPE], -1)
            each = self.up(self.norm(latent)).view(batch, length, HEADS, -1).transpose(1, 2)
            nope, v = each.split([D_NOPE, D_V], -1)
            rope = _rotate(rope)[:, None].expand(-1, HEADS, -1, -1)
        else:
            each = self.kv(x).view(batch, length, self.size, -1).transpose(1, 2)
            nope, rope, v = each.split([D_NOPE, D_ROPE, D_V], -1)
            rope = _rotate(rope)
            nope, rope, v = (part.repeat_interleave(HEADS // self.size, 1) for part in (nope, rope, v))
        k = torch.cat([nope, rope], -1)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: torch.Tensor = self.out(found.transpose(1, 2).reshape(batch, length, -1))
        return result


class _Block(nn.Module):
    def __init__(self, form: str, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(D_MODEL), nn.RMSNorm(D_MODEL)
        self.attention = _Attention(form, size)
        self.wide = nn.Sequential(nn.Linear(D_MODEL, 4 * D_MODEL), nn.GELU(), nn.Linear(4 * D_MODEL, D_MODEL))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first(x))
        result: torch.Tensor = x + self.wide(self.second(x))
        return result


class Model(nn.Module):
    """Bytes in, the next byte's logits out."""

    def __init__(self, form: str, size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, D_MODEL)
        self.blocks = nn.ModuleList(_Block(form, size) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(D_MODEL)
        self.head = nn.Linear(D_MODEL, 256, bias=False)

    @property
    def kv_numbers(self) -> int:
        """Numbers that a cache would keep per token and layer."""
        block = self.blocks[0]
        assert isinstance(block, _Block)
        return block.attention.kv_numbers

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, 256]."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = self.head(self.norm(x))
        return result


def _loss(model: Model, source: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    windows = source[starts[:, None] + torch.arange(CONTEXT + 1)]
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train(form: str, size: int, seed: int, steps: int, source: tuple[torch.Tensor, torch.Tensor, str]) -> Outcome:
    """Train one model and judge it. The same seed sees the same windows in the same order, whatever the form."""
    seen, unseen, sha = source
    torch.manual_seed(seed)
    model = Model(form, size)
    rule = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    picks = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    last = []
    for at in range(steps):
        rate = min(1.0, (at + 1) / 20) * 0.5 * (1 + math.cos(math.pi * at / steps))
        for group in rule.param_groups:
            group["lr"] = 3e-3 * rate
        loss = _loss(model, seen, torch.randint(seen.numel() - CONTEXT - 1, (BATCH,), generator=picks))
        rule.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        last.append(float(loss.detach()))
    with torch.no_grad():
        starts = torch.arange(0, min(unseen.numel() - CONTEXT - 1, 256 * CONTEXT), CONTEXT)
        judged = float(torch.stack([_loss(model, unseen, part) for part in starts.split(64)]).mean())
    return Outcome(
        form, size, model.kv_numbers, sum(each.numel() for each in model.parameters()), seed, steps, judged,
        sum(last[-20:]) / len(last[-20:]), time.perf_counter() - begin, sha, torch.__version__,
        platform.python_version(), store.now(),
    )  # fmt: skip


def read(path: Path) -> list[Outcome]:
    """Every outcome of a file. Raises ConfigError naming file and line of a malformed one."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; make it with python -m openmla.lab.quality"
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            found.append(Outcome(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: not an outcome of openmla.lab.quality ({error})") from error
    return found


def run(path: Path, seeds: Sequence[int], steps: int, say: Callable[[str], None]) -> None:
    """Train every variant with every seed and append the outcomes; those that stand in the file are not repeated."""
    source = text()
    done = {
        (each.form, each.size, each.seed, each.steps, each.text_sha) for each in (read(path) if path.exists() else [])
    }
    for seed in seeds:
        for form, size in VARIANTS:
            if (form, size, seed, steps, source[2]) in done:
                continue
            found = train(form, size, seed, steps, source)
            say(f"{form} {size}: {found.kv_numbers} numbers, loss {found.loss:.4f} after {found.seconds:.0f} s")
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(found), sort_keys=True) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the training."""
    parser = argparse.ArgumentParser(prog="python -m openmla.lab.quality", description="what a smaller latent costs")
    parser.add_argument("--out", type=Path, required=True, metavar="ROWS.jsonl")
    parser.add_argument("--seed", type=int, action="append", help="repeatable; default: 0 and 1")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    with progress.on_stderr() as say:
        run(args.out, args.seed or [0, 1], args.steps, say)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
