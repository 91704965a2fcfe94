"""Targets: where a problem runs. Detected from a device, or a preset for planning without one."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache

import torch

from openmla.core.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """Facts of one device. Peak rates are data-sheet figures (dense); 0 where unknown. Measured ones are rows."""

    name: str
    arch: str  # "cpu", "sm_80", "sm_90a", "gfx942", ...
    num_sms: int  # streaming multiprocessors, or CPU threads
    smem_bytes: int = 0  # shared memory that one CTA can use
    l2_bytes: int = 0
    hbm_gbps: float = 0.0
    bf16_tflops: float = 0.0
    fp8_tflops: float = 0.0

    @property
    def is_cuda(self) -> bool:
        """True for an NVIDIA GPU."""
        return self.arch.startswith("sm_")

    @staticmethod
    def preset(name: str) -> Target:
        """A target by name, for planning and compiling elsewhere. Raises ConfigError for an unknown one."""
        if name not in _PRESETS:
            raise ConfigError(f"unknown target {name!r}; use one of: {', '.join(_PRESETS)}")
        return _PRESETS[name]

    @staticmethod
    def detect(device: torch.device | str | None = None) -> Target:
        """The target behind a device; without one, the current CUDA device if there is any, else the CPU.

        Raises ConfigError for a CUDA device that PyTorch does not see.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        if device.type == "cpu":
            return _detect_cpu(torch.get_num_threads())
        if device.type == "cuda":
            if device.index is not None:
                return _detect_cuda(device.index)
            return _detect_cuda(torch.cuda.current_device() if torch.cuda.is_available() else 0)
        return Target(name=device.type, arch=device.type, num_sms=1)

    def __str__(self) -> str:
        return f"{self.name} ({self.arch})"


_PRESETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("a100_sxm", "sm_80", 108, 166_912, 41_943_040, 2039, 312, 0),
        Target("l40s", "sm_89", 142, 101_376, 100_663_296, 864, 362, 733),
        Target("h100_sxm", "sm_90a", 132, 232_448, 52_428_800, 3352, 989, 1979),
        Target("h200_sxm", "sm_90a", 132, 232_448, 62_914_560, 4800, 989, 1979),
        Target("h800_sxm", "sm_90a", 132, 232_448, 52_428_800, 3352, 989, 1979),
        Target("h20", "sm_90a", 78, 232_448, 62_914_560, 4000, 148, 296),
        Target("b200", "sm_100a", 148, 232_448, 132_120_576, 8000, 2250, 4500),
        Target("mi300x", "gfx942", 304, 65_536, 268_435_456, 5300, 1307, 2614),
        Target("cpu", "cpu", 1),
    )
}
PRESET_NAMES: tuple[str, ...] = tuple(_PRESETS)

# Device name fragments -> preset that carries its data-sheet rates. First match wins.
_RATES = (("H200", "h200_sxm"), ("H800", "h800_sxm"), ("H20", "h20"), ("H100", "h100_sxm"), ("A100", "a100_sxm"),
          ("L40S", "l40s"), ("B200", "b200"), ("MI300X", "mi300x"))  # fmt: skip


@cache
def _detect_cuda(index: int) -> Target:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        seen = f"{count} CUDA device(s)" if count else "no CUDA device"
        raise ConfigError(
            f"no device cuda:{index}: PyTorch sees {seen} here; pass device='cpu', or ask `openmla doctor` why"
        )
    facts = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = str(facts.gcnArchName).split(":")[0]
    else:
        # The "a" marks features (wgmma, setmaxnreg) that Hopper and datacentre Blackwell have for one arch alone.
        arch = f"sm_{facts.major}{facts.minor}" + ("a" if facts.major in (9, 10) else "")
    preset = next((_PRESETS[key] for part, key in _RATES if part in facts.name), None)
    return Target(
        name=facts.name,
        arch=arch,
        num_sms=facts.multi_processor_count,
        smem_bytes=int(getattr(facts, "shared_memory_per_block_optin", 0)),
        l2_bytes=int(getattr(facts, "L2_cache_size", 0)),
        hbm_gbps=preset.hbm_gbps if preset else 0.0,
        bf16_tflops=preset.bf16_tflops if preset else 0.0,
        fp8_tflops=preset.fp8_tflops if preset else 0.0,
    )


@cache
def _detect_cpu(num_threads: int) -> Target:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    name = line.partition(":")[2].strip()
                    break
    return Target(name=name, arch="cpu", num_sms=num_threads)
