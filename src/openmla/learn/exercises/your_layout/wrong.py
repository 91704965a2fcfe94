"""HINT: is the even column the low nibble"""

import torch

from openmla.core.layout import KVLayout

LAYOUT = KVLayout("mine_416", 576, 512, "e2m1", d_quant=512, scale_format="e4m3", scale_group=16)
_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def unpack(token: torch.Tensor) -> torch.Tensor:
    """Takes the nibbles the other way round."""
    data, scales, rope = token.split([256, 32, 128], 1)
    latent = _VALUES[torch.stack([data >> 4, data & 15], -1).flatten(1).long()].unflatten(1, (32, 16))
    factors = scales.contiguous().view(torch.float8_e4m3fn).float()[..., None]
    return torch.cat([(latent * factors).flatten(1), rope.contiguous().view(torch.bfloat16).float()], 1)
