"""Train openmla-tiny on the sources of Python's standard library, which every machine has.

    python models/openmla-tiny/train.py                    everything: tokenizer, tokens, training, weights, curve
    python models/openmla-tiny/train.py prepare            tokenizer and tokens alone (needs `tokenizers`)
    python models/openmla-tiny/train.py train --seconds 180      training alone (needs PyTorch), from build/tiny
    python models/openmla-tiny/train.py export             build/tiny/checkpoint.pt to model.safetensors and loss.svg

On a GPU it is a matter of minutes, on one CPU core of an hour for a first impression (`--batch 8 --length 256`). The
learning rate falls to zero over `--steps` or `--seconds`, whichever ends first.

The order of the text is one of a seed, so is the start of the weights; bits depend on PyTorch and the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import sysconfig
import time
from array import array
from pathlib import Path

import torch
from torch.nn import functional

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "src"))

from openmla.nn.decoder import Decoder, tiny  # noqa: E402
from openmla.nn.mla import MLA  # noqa: E402

BUILD = ROOT / "build" / "tiny"
END = "<|end|>"  # between files; token 0
HELD_OUT = 40  # every 40th file is never trained on
# Indentation is one token, and words carry the blank in front of them.
PIECES = r"\n *| ?[A-Za-z_]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9_]+|\s+"


def sources() -> list[Path]:
    """Every module of the standard library, its tests included, in an order that does not depend on the folders."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "lib2to3", "pydoc_data", "__pycache__", "cjkencodings"}
    found = [p for p in stdlib.rglob("*.py") if not skipped & set(p.relative_to(stdlib).parts)]
    return sorted((p for p in found if 500 < p.stat().st_size < 300_000), key=lambda p: (p.name, str(p)))


def prepare() -> None:
    """tokenizer.json from the sources that are trained on, and all sources as tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = []
    for path in sources():
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # a test of other encodings
            continue
    kept = [text for i, text in enumerate(texts) if i % HELD_OUT]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny().vocab, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(kept, trainer)
    tokenizer.save(str(HERE / "tokenizer.json"), pretty=False)
    BUILD.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", kept), ("held_out", texts[::HELD_OUT])):
        tokens = array("H")
        for encoding in tokenizer.encode_batch(part):
            tokens.append(0)
            tokens.extend(encoding.ids)
        (BUILD / f"{name}.bin").write_bytes(tokens.tobytes())
        size = sum(len(text.encode()) for text in part)
        print(f"{name}: {len(part)} files, {size} bytes, {len(tokens)} tokens, Python {platform.python_version()}")


def tokens(name: str) -> torch.Tensor:
    """[n] int64."""
    content = bytearray((BUILD / f"{name}.bin").read_bytes())
    return torch.frombuffer(content, dtype=torch.uint16).to(torch.int64)


class SDPA(MLA):
    """The block with PyTorch's fused attention in place of `openmla.prefill`: training wants its backward pass."""

    def _within(self, q: torch.Tensor, rows: torch.Tensor, form: str) -> torch.Tensor:
        config = self.config
        key, value = self._expand(rows.flatten(0, 1))
        key, value = (x.unflatten(0, rows.shape[:2]) for x in (key, value))
        value = functional.pad(value, (0, config.d_qk - config.d_v))  # the fused kernels want equal widths
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, scale=config.softmax_scale
        )
        return out.transpose(1, 2)[..., : config.d_v]


def start(seed: int) -> Decoder:
    """The untrained model."""
    torch.manual_seed(seed)
    config = tiny()
    model = Decoder(config)
    for layer in model.model.layers:
        layer.self_attn.__class__ = SDPA
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(0, 0.02 / math.sqrt(2 * config.layers) if residual else 0.02)
    return model


def optimizers(model: Decoder, rate: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between the layers, AdamW for embedding and norms."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def held_out_loss(model: Decoder, content: torch.Tensor, length: int, device: torch.device, windows: int) -> float:
    """Mean loss in nats per token over the first windows of what was never trained on."""
    rows = content[: windows * length + 1]
    total = 0.0
    for begin in range(0, windows, 16):
        count = min(16, windows - begin)
        part = rows[begin * length : (begin + count) * length + 1].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(part[:-1].view(count, length))
        total += float(functional.cross_entropy(logits.float().flatten(0, 1), part[1:])) * count
    return total / windows


def train(options: argparse.Namespace) -> None:
    """build/tiny/checkpoint.pt and training.jsonl."""
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    else:
        torch.set_float32_matmul_precision("high")
    model = start(options.seed).to(device)
    content, held_out = tokens("train").to(device), tokens("held_out")
    length, batch = options.length, options.batch
    windows = min(options.held_out, (len(held_out) - 1) // length)
    chosen = optimizers(model, options.rate, options.decay)
    generator = torch.Generator().manual_seed(options.seed)
    offsets = torch.arange(length + 1, device=device)
    rows, begin, running, step, progress = [], time.perf_counter(), 0.0, 0, 0.0
    order = torch.empty(0, dtype=torch.int64)
    while progress < 1:
        seconds = time.perf_counter() - begin
        progress = min(1.0, max((step + 1) / options.steps, seconds / options.seconds if options.seconds else 0.0))
        # Warm up over 2 %, then down to zero in a straight line.
        factor = min(progress / 0.02, (1 - progress) / 0.98 + 1e-3)
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = options.rate * factor
        if len(order) < batch:  # an epoch: every window once, cut at a new place
            shift = int(torch.randint(length, (1,), generator=generator))
            places = torch.arange(shift, len(content) - length - 1, length)
            order = torch.cat([order, places[torch.randperm(len(places), generator=generator)]])
        places, order = order[:batch].to(device), order[batch:]
        window = content[places[:, None] + offsets]
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(window[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % options.every == 0 or progress >= 1:
            running = float(loss.detach())
            judged = held_out_loss(model, held_out, length, device, windows)
            row = {
                "step": step, "tokens": step * batch * length, "seconds": round(time.perf_counter() - begin, 1),
                "loss": round(running, 4), "held_out": round(judged, 4),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            rows.append(row)
            torch.save(model.state_dict(), options.out / "checkpoint.pt")
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{options.threads} CPU thread(s)",
        "torch": torch.__version__, "python": platform.python_version(), "batch": batch, "length": length,
        "steps": step, "rate": options.rate, "decay": options.decay, "seed": options.seed, "train_tokens": len(content),
        "held_out_tokens": windows * length, "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    lines = [json.dumps(facts), *map(json.dumps, rows)]
    (options.out / "training.jsonl").write_text("\n".join(lines) + "\n")


def export(folder: Path) -> None:
    """model.safetensors (bf16), config.json and loss.svg beside this file, from a folder with a checkpoint."""
    from safetensors.torch import save_file

    weights = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    save_file(
        {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()},
        HERE / "model.safetensors",
        metadata={"format": "pt"},
    )
    (HERE / "config.json").write_text(json.dumps(tiny().as_config(), indent=2) + "\n")
    (HERE / "training.jsonl").write_bytes((folder / "training.jsonl").read_bytes())
    curve()
    page = HERE / "README.md"
    if page.exists():
        page.write_text(card(page.read_text(), (HERE / "training.jsonl").read_text()))


def card(page: str, rows: str) -> str:
    """The model card with the facts of training.jsonl between its two marks."""
    facts, *each = [json.loads(line) for line in rows.splitlines()]
    last = each[-1]
    bits = last["held_out"] / math.log(2)
    table = [
        f"| this training | {facts['steps']} steps of {facts['batch']} x {facts['length']} tokens, {last['tokens'] / 1e6:.1f} million in all "
        f"({last['tokens'] / facts['train_tokens']:.2f} passes over the text), {last['seconds'] / 60:.1f} minutes |",
        "| --- | --- |",
        f"| machine | {facts['device']}, PyTorch {facts['torch']}, Python {facts['python']}, seed {facts['seed']} |",
        f"| held-out loss | {last['held_out']:.3f} nats per token ({bits:.2f} bits), over {facts['held_out_tokens']} tokens |",
    ]
    begin, end = "<!-- rows -->", "<!-- end of rows -->"
    return page[: page.index(begin) + len(begin)] + "\n" + "\n".join(table) + "\n" + page[page.index(end) :]


def curve() -> None:
    """loss.svg from the rows of training.jsonl."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "openmla-tiny"
    from matplotlib import pyplot

    facts, *rows = [json.loads(line) for line in (HERE / "training.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot([r["tokens"] / 1e6 for r in rows], [r["loss"] for r in rows], lw=0.8, color="#9aa5b1", label="one batch")
    axes.plot([r["tokens"] / 1e6 for r in rows], [r["held_out"] for r in rows], color="#1f5fbf", label="held-out files")
    axes.set(xlabel="million tokens", ylabel="loss, nats per token")
    axes.set_title(f"openmla-tiny, {facts['parameters'] / 1e6:.1f} M parameters, {facts['device']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(HERE / "loss.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "prepare", "train", "export"), default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=2440)  # 16 passes over the text
    parser.add_argument("--seconds", type=float, help="end after so long, the learning rate with it")
    parser.add_argument("--batch", type=int, default=64, help="windows per step")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument(
        "--decay", type=float, default=3.0, help="of the matrices' weights; with 0.1 the text is learnt by heart"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between two rows of the curve")
    parser.add_argument("--held-out", type=int, default=64, help="windows that a row is judged by")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=BUILD)
    options = parser.parse_args()
    if options.what in ("all", "prepare"):
        prepare()
    if options.what in ("all", "train"):
        train(options)
    if options.what in ("all", "export"):
        export(options.out)


if __name__ == "__main__":
    main()
