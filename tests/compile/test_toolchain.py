"""The toolchain itself: what it compiles, reads back, links and refuses, on a machine without a GPU."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from openmla.backends.cute import toolchain
from openmla.core.errors import CompileError

SASS = """
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;   /* 0x00e00000081879f0 */
                                                                                          /* 0x000fe20008001818 */
        /*0020*/              @!P0 STL [R1+0x34], R2 ;                                    /* 0x0000340201007387 */
        /*0030*/              @UP1 UTMALDG.4D.MULTICAST [UR16], [UR12], UR11 ;            /* 0x000020100c0073b4 */
        /*0040*/                   STSM.16.M88.4 [R2], R4 ;                               /* 0x0000000402007844 */
"""


def test_opcodes_are_counted_without_modifiers_and_predicates():
    counts = toolchain.count_opcodes(SASS)
    assert (counts["HGMMA"], counts["STL"], counts["UTMALDG"], counts["LDL"]) == (1, 1, 1, 0)


def test_spills_count_instructions_and_bytes():
    clean = toolchain.Resources(128, 0, 0, 1024, 200_000, {"LDL": 0, "STL": 0})
    assert clean.spills == 0
    assert toolchain.Resources(128, 8, 0, 1024, 200_000, {"LDL": 2, "STL": 1}).spills == 11


@pytest.mark.parametrize("name", ["two words", "1st", "", "a-b"])
def test_a_name_that_cannot_be_exported_is_refused(name, tmp_path):
    with pytest.raises(CompileError, match="C identifier"):
        toolchain.compile_kernel(None, (), name, out_dir=tmp_path)


def test_linking_nothing_is_refused(tmp_path):
    with pytest.raises(CompileError, match="nothing to link"):
        toolchain.link_bundle([], tmp_path / "x.so")


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match="C compiler"):
        toolchain.link_bundle([tmp_path / "x.o"], tmp_path / "x.so")


@pytest.fixture(scope="module")
def adders(tmp_path_factory):
    """Two kernels of one class: b = a + k."""
    pytest.importorskip("cutlass")
    import cuda.bindings.driver as cuda
    import cutlass
    import cutlass.cute as cute

    class Add:
        def __init__(self, k: int) -> None:
            self.k, self.smem_bytes = k, 0

        @cute.jit
        def __call__(self, a: cute.Tensor, b: cute.Tensor, stream: cuda.CUstream):
            self.kernel(a, b).launch(grid=((a.shape[0] + 255) // 256, 1, 1), block=(256, 1, 1), stream=stream)

        @cute.kernel
        def kernel(self, a: cute.Tensor, b: cute.Tensor):
            thread, _, _ = cute.arch.thread_idx()
            block, _, _ = cute.arch.block_idx()
            i = block * 256 + thread
            if i < a.shape[0]:
                b[i] = a[i] + self.k

    # the DSL resolves annotations by name in the function's module
    globals()["cute"], globals()["cuda"] = cute, cuda
    folder = tmp_path_factory.mktemp("adders")

    def vector():
        return toolchain.fake_tensor(cutlass.Float32, (None,), stride=(None,), align=4)

    return [
        toolchain.compile_kernel(Add(k), (vector(), vector(), toolchain.fake_stream()), f"add_{k}", out_dir=folder)
        for k in (1, 2)
    ]


def test_compiling_reports_what_a_kernel_occupies(adders):
    for compiled in adders:
        assert compiled.object_path.is_file()
        assert compiled.cubin_path.is_file()
        assert 1 <= compiled.resources.registers <= 32
        assert compiled.resources.spills == 0
        assert "EXIT" in toolchain.disassemble(compiled.cubin_path)


def test_one_library_exports_both_functions_and_nothing_else(adders, tmp_path):
    tvm_ffi = pytest.importorskip("tvm_ffi")
    library = toolchain.link_bundle([each.object_path for each in adders], tmp_path / "bundle" / "adders.so")
    module = tvm_ffi.load_module(str(library))
    assert module["add_1"] is not None
    assert module["add_2"] is not None
    # the wrappers of the CUDA runtime carry one name in every library; visible, they would bind across libraries
    assert b"_cudaLaunchKernelEx\0" not in library.read_bytes()


def test_manifest_names_hash_configuration_and_resources(adders, tmp_path):
    library = toolchain.link_bundle([each.object_path for each in adders], tmp_path / "adders.so")
    configs = {each.name: {"k": index} for index, each in enumerate(adders)}
    path = toolchain.write_manifest(tmp_path, "adders", library, configs, adders)
    entry = json.loads(path.read_text())["families"]["adders"]
    assert entry["sha256"] == hashlib.sha256(library.read_bytes()).hexdigest()
    assert entry["functions"]["add_2"]["config"] == {"k": 1}
    assert entry["functions"]["add_1"]["resources"]["registers"] == adders[0].resources.registers
    path.write_text(json.dumps({"format": 99, "families": {}}))
    with pytest.raises(CompileError, match="99"):
        toolchain.write_manifest(tmp_path, "adders", library, configs, adders)


def test_a_file_that_is_no_device_binary_is_refused(tmp_path):
    pytest.importorskip("triton")
    bad = Path(tmp_path / "bad.cubin")
    bad.write_bytes(b"not a cubin")
    with pytest.raises(CompileError):
        toolchain.read_resources(bad)
