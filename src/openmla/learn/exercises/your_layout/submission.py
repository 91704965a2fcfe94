"""Change LAYOUT, then `unpack`. What stands here is fp8_656 under another name."""

import torch

from openmla.core.layout import KVLayout

LAYOUT = KVLayout("mine", 576, 512, "e4m3", d_quant=512, scale_format="fp32", scale_group=128)


def unpack(token: torch.Tensor) -> torch.Tensor:
    """From uint8 [n, bytes_per_token] to fp32 [n, 576]: latent times scales, then RoPE."""
    latent = token[:, :512].view(torch.float8_e4m3fn).float()
    scales = token[:, 512:528].contiguous().view(torch.float32)
    rope = token[:, 528:].contiguous().view(torch.bfloat16).float()
    return torch.cat([(latent.unflatten(1, (4, 128)) * scales[..., None]).flatten(1), rope], 1)
