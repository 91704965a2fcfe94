"""Multi-head Latent Attention as a PyTorch module: expanded and absorbed, from a checkpoint, over heads of many ranks."""

from openmla.nn.decoder import Decoder as Decoder
from openmla.nn.decoder import DecoderConfig as DecoderConfig
from openmla.nn.mla import MLA as MLA
from openmla.nn.mla import MLAConfig as MLAConfig
from openmla.nn.passes import Pass as Pass
from openmla.nn.rope import Rope as Rope
from openmla.nn.rope import Rotation as Rotation
from openmla.nn.rope import YaRN as YaRN
