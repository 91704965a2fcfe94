"""vLLM (0.32 and 0.33) decodes MLA models with OpenMLA: `--attention-backend CUSTOM`.

Installing openmla beside vLLM is enough: vLLM finds `register` by the entry point `vllm.general_plugins` and calls it
in each of its processes. Nothing is chosen for anybody: `CUSTOM` is never automatic.

vLLM's CPU platform knows no custom backend. OPENMLA_VLLM_CPU=1 puts OpenMLA in the place of its own CPU one.
"""

from __future__ import annotations

from openmla.core import env

_BACKEND = "openmla.integrations.vllm.backend.OpenMLABackend"
_CPU_BACKEND = "openmla.integrations.vllm.cpu.OpenMLACPUBackend"


def register() -> None:
    """What vLLM calls in every process, any number of times; imports neither kernels nor a device."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, _BACKEND)
    if env.VLLM_CPU.read() == "1":
        for name in ("CPU_MLA", "AMX_MLA"):
            if name in AttentionBackendEnum.__members__:
                register_backend(AttentionBackendEnum[name], _CPU_BACKEND)
