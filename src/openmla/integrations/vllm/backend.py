"""The backend that vLLM runs on a GPU: decode by OpenMLA, all else (projections, cache writes, prefill) vLLM's own.

Written against vllm 0.32 and 0.33. Its selection and its metadata ran against stand-ins and on vLLM's CPU platform;
it has not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionCGSupport

from openmla.core.errors import UnsupportedError
from openmla.integrations.vllm.decode import decode


@dataclass
class Decode(MLACommonDecodeMetadata):  # type: ignore[misc]
    """vLLM's decode metadata of one step, and the plans of its layers."""

    plans: dict[tuple[Any, ...], Any] = field(default_factory=dict)


class OpenMLABuilder(MLACommonMetadataBuilder):  # type: ignore[misc]
    """Metadata of a step. Nothing is planned on the host, so full CUDA graphs hold."""

    _cudagraph_support: ClassVar[Any] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[Any] = QueryLenSupport.UNIFORM

    def _build_decode(
        self, *, block_table_tensor: torch.Tensor, seq_lens_device: torch.Tensor,
        dcp_tot_seq_lens_device: torch.Tensor | None = None, **_: Any,
    ) -> Decode:  # fmt: skip
        return Decode(
            block_table=block_table_tensor, seq_lens=seq_lens_device, dcp_tot_seq_lens=dcp_tot_seq_lens_device
        )


class OpenMLAImpl(MLACommonImpl):  # type: ignore[misc]
    """Decode of one layer."""

    can_return_lse_for_decode: bool = True
    supports_dcp: bool = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names = ("num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window", "kv_cache_dtype")
        given = dict(zip((*names, "logits_soft_cap"), args, strict=False)) | kwargs
        refused = [name for name in ("alibi_slopes", "sliding_window", "logits_soft_cap") if given.get(name)]
        if refused:
            raise UnsupportedError(
                "OpenMLA's vLLM backend cannot run this model",
                {"vllm": tuple(f"{name} is set" for name in refused)},
                "use another --attention-backend",
            )

    def forward_mqa(
        self, q: Any, kv_c_and_k_pe_cache: torch.Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What vLLM calls with absorbed queries [tokens, h_q, 576] for all decoding requests."""
        step = attn_metadata.decode
        return decode(
            q, kv_c_and_k_pe_cache, step.block_table, step.seq_lens, num_decodes=attn_metadata.num_decodes,
            d_latent=self.kv_lora_rank, scale=self.scale, is_causal=getattr(attn_metadata, "causal", True),
            plans=getattr(step, "plans", None), with_lse=bool(getattr(self, "need_to_return_lse_for_decode", False)),
        )  # fmt: skip


class OpenMLABackend(MLACommonBackend):  # type: ignore[misc]
    """What `--attention-backend CUSTOM` names. bf16 and fp16 caches, pages of 64, compute capability 8.0 and up."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """By vLLM's rule the name of the enum member."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[OpenMLAImpl]:
        """Decode."""
        return OpenMLAImpl

    @staticmethod
    def get_builder_cls() -> type[OpenMLABuilder]:
        """Metadata."""
        return OpenMLABuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """Tokens per page."""
        return [64]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Columns of a cached row."""
        return [576]

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Triton from 8.0 on, the Hopper kernels on 9.0."""
        return bool(capability.major >= 8)

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: Any, kv_cache_dtype: Any, block_size: int | None, use_mla: bool, has_sink: bool,
        use_sparse: bool, *_: Any, **__: Any,
    ) -> str | None:  # fmt: skip
        """The reason why not, or None."""
        refused = {"sparse decode": use_sparse, "attention sinks": has_sink, "attention without a latent": not use_mla}
        names = [name for name, is_asked in refused.items() if is_asked]
        return f"OpenMLA's vLLM backend has no {' and no '.join(names)}" if names else None
