"""From a CuTe DSL kernel to a small shared library, on a machine that needs no GPU.

    compiled = compile_kernel(MyKernel(config), fake_args, "my_kernel_bf16", out_dir=build)
    compiled.resources                      # registers, spills, shared memory, SASS instruction counts
    library = link_bundle([compiled.object_path], bundle / "my_kernel.so")
    write_manifest(bundle, "my_kernel", library, {compiled.name: config_as_dict}, [compiled])

`fake_args` describe tensors without allocating them (`fake_tensor`, `fake_stream`), so nothing here touches a device.
The linked library depends on libcudart.so.13 and libtvm_ffi.so only; `openmla.backends.cute.bundle` loads it on a
machine that has PyTorch and apache-tvm-ffi, with neither the DSL nor a compiler.

Tools and where they come from: the DSL's own assembler (nvidia-cutlass-dsl), cuobjdump (the triton wheel),
libcudart.so.13 (the nvidia-cuda-runtime wheel, else a system CUDA 13), and a C compiler that links (cc).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from openmla.core.errors import CompileError

ARCH = "sm_90a"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1

# Counted in the disassembly: matrix instructions, bulk tensor loads, local-memory traffic (spills), register
# reallocation (absent when ptxas ignored setmaxnreg), generic-proxy fences.
SASS_OPCODES = (
    "HGMMA",
    "UTMALDG",
    "UBLKCP",
    "LDGSTS",
    "LDL",
    "STL",
    "USETMAXREG",
    "MUFU",
    "SHFL",
    "MEMBAR",
    "WARPGROUP",
)

# The exported object calls one function that lives in the DSL's 43 MB run-time library: it turns a CUDA status into
# a raised error. This stand-in does the same through libtvm_ffi, which the caller has loaded anyway.
_RUNTIME_STUB = r"""
#include <stdio.h>
extern void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message);
extern const char *cudaGetErrorString(int status);
__attribute__((visibility("hidden"))) int CuteDSLRT_TVMFFISetRaisedCudaError(int status) {
    char text[256];
    snprintf(text, sizeof text, "kernel launch failed with CUDA error %d: %s", status, cudaGetErrorString(status));
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", text);
    return -1;
}
"""

# Every exported object carries the same internal names (wrappers of the CUDA runtime); visible, they would bind
# across libraries that are loaded with RTLD_GLOBAL.
_EXPORTS = "{ global: __tvm_ffi_*; local: *; };\n"


@dataclass(frozen=True)
class Resources:
    """What one kernel occupies, as the assembler decided it.

    `registers` is the launch-time count per thread; warp roles that call setmaxnreg move away from it.
    `static_smem_bytes` is what the binary reserves; `dynamic_smem_bytes` what the launch asks for.
    """

    registers: int
    stack_bytes: int
    local_bytes: int
    static_smem_bytes: int
    dynamic_smem_bytes: int
    sass: Mapping[str, int] = field(default_factory=dict)

    @property
    def spills(self) -> int:
        """Local-memory instructions plus stack and local bytes; 0 in every kernel that we ship."""
        return self.sass.get("LDL", 0) + self.sass.get("STL", 0) + self.stack_bytes + self.local_bytes


@dataclass(frozen=True)
class CompiledObject:
    """One compiled kernel: an object file that exports the function `name`, and its device binary."""

    name: str
    object_path: Path
    cubin_path: Path
    resources: Resources


def fake_tensor(dtype: Any, shape: Sequence[Any], *, stride: Sequence[Any] | None = None, align: int = 16) -> Any:
    """A tensor argument without storage.

    Args:
        dtype: a CuTe DSL type (cutlass.BFloat16, ...).
        shape: ints fix a mode, None leaves it to run time.
        stride: the same, in elements; default compact row-major.
        align: bytes that every base pointer is a multiple of; checked at call time.
    """
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_tensor

    dims = tuple(cute.sym_int() if extent is None else extent for extent in shape)
    if stride is None:
        return make_fake_compact_tensor(
            dtype, dims, stride_order=tuple(reversed(range(len(dims)))), assumed_align=align
        )
    steps = tuple(cute.sym_int64() if step is None else step for step in stride)
    return make_fake_tensor(dtype, dims, stride=steps, assumed_align=align)


def fake_stream() -> Any:
    """The stream argument: the caller's current stream at run time."""
    from cutlass.cute.runtime import make_fake_stream

    return make_fake_stream(use_tvm_ffi_env_stream=True)


def compile_kernel(fn: Any, args: Sequence[Any], name: str, *, out_dir: Path) -> CompiledObject:
    """Compile `fn(*args)` for sm_90a, export it as the function `name`, and read back what it occupies.

    Args:
        fn: a `cute.jit` callable. If it has an attribute `smem_bytes` after tracing, that is taken as the dynamic
            shared memory of its launch.
        args: fake arguments (`fake_tensor`, scalars of the DSL, `fake_stream` last).
        name: exported function name, a C identifier, unique within a bundle.
        out_dir: receives `<name>.o`, `<name>.cubin` and `<name>.ptx`.

    Raises:
        CompileError: the DSL is not installed, the compiler refused, or a tool is missing.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise CompileError(f"{name!r} cannot be exported: a kernel name must be a C identifier")
    try:
        import cutlass.cute as cute
    except ImportError as error:
        raise CompileError(f"{name}: compiling needs the CuTe DSL; pip install 'nvidia-cutlass-dsl[cu13]'") from error
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=f".{name}.") as scratch:
        options = f"--enable-tvm-ffi --gpu-arch {ARCH} --keep-cubin --keep-ptx --dump-dir {scratch}"
        try:
            compiled = cute.compile(fn, *args, options=options)
            object_path = out_dir / f"{name}.o"
            compiled.export_to_c(str(object_path), function_name=name)
        except Exception as error:
            # The DSL raises many unrelated types; each means that this kernel does not exist.
            raise CompileError(f"{name}: {type(error).__name__}: {error}".strip()) from error
        cubins = sorted(Path(scratch).glob("*.cubin"))
        if len(cubins) != 1:
            raise CompileError(f"{name}: expected one device binary, the compiler wrote {len(cubins)}")
        cubin_path = out_dir / f"{name}.cubin"
        shutil.move(cubins[0], cubin_path)
        for ptx in Path(scratch).glob("*.ptx"):
            # The dump is padded with NUL bytes, which ptxas refuses.
            (out_dir / f"{name}.ptx").write_bytes(ptx.read_bytes().rstrip(b"\0"))
    resources = read_resources(cubin_path, dynamic_smem_bytes=int(getattr(fn, "smem_bytes", 0)))
    return CompiledObject(name, object_path, cubin_path, resources)


def read_resources(cubin: Path, *, dynamic_smem_bytes: int = 0) -> Resources:
    """Read registers, memory and instruction counts out of a device binary."""
    tool = _cuobjdump()
    usage = _run([tool, "--dump-resource-usage", str(cubin)], f"resource usage of {cubin.name}")
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    if set(found) != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise CompileError(f"{cubin}: cuobjdump reported no resource usage; is it a device binary?\n{usage}")
    return Resources(
        registers=found["REG"],
        stack_bytes=found["STACK"],
        local_bytes=found["LOCAL"],
        static_smem_bytes=found["SHARED"],
        dynamic_smem_bytes=dynamic_smem_bytes,
        sass=count_opcodes(disassemble(cubin)),
    )


def disassemble(cubin: Path) -> str:
    """The SASS of a device binary, as text."""
    return _run([_cuobjdump(), "-sass", str(cubin)], f"disassembly of {cubin.name}")


def count_opcodes(sass: str) -> dict[str, int]:
    """How often each opcode of `SASS_OPCODES` occurs, modifiers ignored."""
    counts = dict.fromkeys(SASS_OPCODES, 0)
    for opcode in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z0-9_]+)", sass, flags=re.MULTILINE):
        if opcode in counts:
            counts[opcode] += 1
    return counts


def link_bundle(objects: Sequence[Path], out: Path) -> Path:
    """Link exported objects into one shared library that needs only libcudart.so.13 and libtvm_ffi.so.

    Raises:
        CompileError: no C compiler, a library is missing, or the link failed (two objects with one function name).
    """
    if not objects:
        raise CompileError(f"{out.name}: nothing to link")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CompileError(f"{out.name}: linking needs a C compiler (cc, gcc or clang) on PATH")
    cudart, tvm_ffi = _cudart(), _package_dir("tvm_ffi", "apache-tvm-ffi") / "lib" / "libtvm_ffi.so"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        stub = Path(scratch) / "runtime_stub.c"
        stub.write_text(_RUNTIME_STUB)
        exports = Path(scratch) / "exports.map"
        exports.write_text(_EXPORTS)
        command = [compiler, "-O2", "-fPIC", "-shared", "-Wl,--no-undefined", "-Wl,-s"]
        command += [f"-Wl,--version-script={exports}", "-o", str(out), str(stub)]
        command += [str(path) for path in objects]
        command += [str(_dialect_runtime()), str(cudart), str(tvm_ffi), "-lc"]
        _run(command, f"linking {out.name}")
    return out


def write_manifest(
    bundle: Path,
    family: str,
    library: Path,
    configs: Mapping[str, Mapping[str, Any]],
    compiled: Sequence[CompiledObject],
) -> Path:
    """Enter one kernel family into `bundle/manifest.json`, replacing what stood there for it.

    Args:
        bundle: folder that holds the libraries.
        family: kernel folder name, for example `decode_dense`.
        library: the linked library, inside `bundle`.
        configs: exported function name -> the configuration it was compiled for.
        compiled: the objects in the library, for their resource report.
    """
    path = bundle / MANIFEST
    manifest: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"format": MANIFEST_FORMAT, "families": {}}
    )
    if manifest.get("format") != MANIFEST_FORMAT:
        raise CompileError(
            f"{path}: format {manifest.get('format')!r}, this version writes {MANIFEST_FORMAT}; remove it"
        )
    manifest["families"][family] = {
        "library": library.name,
        "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "arch": ARCH,
        "sources": source_hash(),
        "versions": {name: _version(name) for name in ("openmla", "nvidia-cutlass-dsl", "apache-tvm-ffi")},
        "functions": {
            item.name: {"config": dict(configs[item.name]), "resources": asdict(item.resources)} for item in compiled
        },
    }
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return path


@cache
def source_hash() -> str:
    """SHA-256 over every source file of this backend: kernels share parts, so any change may change any kernel."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _package_dir(module: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise CompileError(f"the Python package {module} is missing; pip install '{distribution}'")
    return Path(next(iter(spec.submodule_search_locations)))


def _cuobjdump() -> str:
    tool = _package_dir("triton", "triton") / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        raise CompileError(f"cuobjdump is missing at {tool}; pip install triton (its wheel carries the tool)")
    return str(tool)


def _dialect_runtime() -> Path:
    path = _package_dir("nvidia_cutlass_dsl", "nvidia-cutlass-dsl[cu13]") / "cu13" / "lib"
    archive = path / "libcuda_dialect_runtime_static.a"
    if not archive.is_file():
        raise CompileError(f"{archive} is missing; pip install 'nvidia-cutlass-dsl[cu13]'")
    return archive


def _cudart() -> Path:
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    candidates = [Path(root) / "cu13" / "lib" / "libcudart.so.13" for root in roots]
    candidates += [path / "libcudart.so.13" for path in sorted(Path("/usr/local").glob("cuda-13*/lib*"))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CompileError("libcudart.so.13 is missing; pip install 'nvidia-cuda-runtime>=13'")


def _run(command: Sequence[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{what} failed with exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
