"""The usual Triton kernel compiles for the card that it is measured on, and fits."""

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from openmla.backends.triton.config import is_interpreted  # noqa: E402
from openmla.lab import usual_triton as usual  # noqa: E402

pytestmark = pytest.mark.skipif(is_interpreted(), reason="TRITON_INTERPRET=1 replaces the compiler")

SPLIT = {
    "q_ptr": "*bf16", "kv_ptr": "*bf16", "table_ptr": "*i32", "lengths_ptr": "*i32", "partial_ptr": "*fp32",
    "lse_ptr": "*fp32", "scale": "fp32", "max_pages": "i32", "h_q": "i32",
}  # fmt: skip
SPLIT_CONSTANTS = {
    "PAGE": 64, "LATENT": 512, "ROPE": 64, "HEADS": usual.HEADS, "KEYS": usual.KEYS, "SPLITS": usual.SPLITS,
}  # fmt: skip
MERGE = {"partial_ptr": "*fp32", "split_lse_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32"}


@pytest.mark.parametrize(
    ("kernel", "signature", "constants"),
    [(usual._split, SPLIT, SPLIT_CONSTANTS), (usual._merge, MERGE, {"LATENT": 512, "SPLITS": usual.SPLITS})],
    ids=["split", "merge"],
)
def test_it_compiles_for_hopper_and_fits(kernel, signature, constants):
    source = ASTSource(
        kernel, signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )  # fmt: skip
    options = {"num_warps": usual.WARPS, "num_stages": usual.STAGES}
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert found.asm["cubin"]
    assert found.metadata.shared <= 232_448
    if kernel is usual._split:
        assert "mma" in found.asm["ptx"]
