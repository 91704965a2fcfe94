"""The same on vLLM's CPU platform, in the place of its `CPU_MLA`: what continuous integration can serve a model with."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from openmla.integrations.vllm.decode import decode


class OpenMLACPUImpl(CPUMLAImpl):  # type: ignore[misc]
    """Decode of one layer."""

    def forward_mqa(
        self, q: Any, kv_c_and_k_pe_cache: torch.Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `OpenMLAImpl.forward_mqa`; vLLM's CPU metadata has no place for plans."""
        step = attn_metadata.decode
        return decode(
            q, kv_c_and_k_pe_cache, step.block_table, step.seq_lens, num_decodes=attn_metadata.num_decodes,
            d_latent=self.kv_lora_rank, scale=self.scale,
        )  # fmt: skip


class OpenMLACPUBackend(CPUMLABackend):  # type: ignore[misc]
    """vLLM's CPU backend with another decode."""

    @staticmethod
    def get_impl_cls() -> type[OpenMLACPUImpl]:
        """Decode."""
        return OpenMLACPUImpl
