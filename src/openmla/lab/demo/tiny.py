"""The model and the text of the demo: openmla-tiny, which lies beside the code, and Python's own library.

openmla-tiny is a DeepSeek-V3 without experts and with the true latent (512 + 64), trained on the sources of the
standard library; `models/openmla-tiny/README.md` is its card. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from openmla.core.errors import ConfigError

MODULES = ("textwrap", "tokenize", "argparse", "string", "shlex")  # sources that every CPython carries
FILES = ("config.json", "model.safetensors", "tokenizer.json")


def home() -> Path:
    """The folder of openmla-tiny: of the source tree, or the copy inside the wheel.

    Raises:
        ConfigError: there is none, or a file of it is missing.
    """
    package = Path(__file__).resolve().parent
    places = (package.parents[3] / "models" / "openmla-tiny", package / "openmla_tiny")
    for place in places:
        if all((place / name).is_file() for name in FILES):
            return place
    raise ConfigError(
        f"openmla-tiny is not there: looked for {', '.join(FILES)} in {' and '.join(map(str, places))}; "
        "run: python models/openmla-tiny/train.py"
    )


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(home() / "tokenizer.json"))


def text(length: int) -> list[int]:
    """The first `length` tokens of Python's own library."""
    found: list[int] = []
    for name in MODULES:
        found += _tokenizer().encode(inspect.getsource(importlib.import_module(name))).ids
        if len(found) >= length:
            return found[:length]
    raise ValueError(f"asked for {length} tokens of text, there are {len(found)}")


def readable(tokens: list[int]) -> str:
    """Tokens as the text they stand for."""
    decoded: str = _tokenizer().decode(list(tokens))
    return decoded


class Dice:
    """Sampling whose dice are thrown beforehand: position t of every request has its own fixed Gumbel noise, and the
    largest of logits / temperature + noise is a sample of the softmax. So two programs that compute the same logits
    write the same text, and the text does not run in circles as the likeliest tokens of a small model do.

    Called as transformers calls a logits processor: (ids [batch, t], logits [batch, vocab]) -> logits.
    """

    def __init__(self, seed: int, temperature: float = 0.5) -> None:
        self.seed, self.temperature = seed, temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """What to take the largest of."""
        return scores.float() / self.temperature + self._noise(input_ids.shape[1], scores)

    def choose(self, position: int, logits: torch.Tensor) -> int:
        """The token for `position` of one request, from its logits [vocab]."""
        return int((logits.float() / self.temperature + self._noise(position, logits)).argmax())

    def _noise(self, position: int, like: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100_003 * self.seed + position)
        even = torch.rand(like.shape[-1], generator=generator, dtype=torch.float64)
        return -torch.log(-torch.log(even)).to(like.device, torch.float32)


def load() -> Any:
    """The model in fp32 on the CPU, in eval mode."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(home(), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # every request writes as much as it was asked to
    return model
