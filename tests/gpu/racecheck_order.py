"""What compute-sanitizer's racecheck sees of an order that a warp makes: stores, `sync_warp`, one arrival.

    PYTHONPATH=src python tests/gpu/racecheck_order.py build order.so     anywhere with the DSL; prints the instructions
    compute-sanitizer --tool racecheck python tests/gpu/racecheck_order.py run order.so elected|every|one

A warp stores eight words of shared memory, another waits on an mbarrier and loads them.

    elected  eight lanes store, sync_warp, the elected lane arrives. Right: bar.warp.sync orders memory among the lanes, the
             arrival releases, the wait acquires. ptxas turns sync_warp of a converged warp into NOP.
    every    the same, every lane arrives for itself
    one      the elected lane stores all eight

All three print the right words. racecheck reports hazards in `elected` alone: it takes a lane's stores as released only by
that lane's own arrival.
"""

import re
import sys
import tempfile
from pathlib import Path


def build(library: Path) -> None:
    """Compile the three kernels into one library."""
    import cuda.bindings.driver as cuda
    import cutlass
    import cutlass.cute as cute
    from cutlass import Int32, Int64, const_expr

    from openmla.backends.cute.toolchain import compile_kernel, disassemble, fake_stream, fake_tensor, link_bundle

    class Order:
        """One of the three kernels."""

        smem_bytes = 256

        def __init__(self, how: str) -> None:
            self.how = how

        @cute.jit
        def __call__(self, out: cute.Tensor, stream: cuda.CUstream):
            """Write eight words, four times each."""
            self.kernel(out).launch(grid=[1, 1, 1], block=[64, 1, 1], stream=stream)

        @cute.kernel
        def kernel(self, out: cute.Tensor):
            """Warp 0 stores, warp 1 loads."""
            lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
            smem = cutlass.memory.SmemAllocator()
            full = smem.allocate_tensor(Int64, cute.make_layout(1), 16).iterator
            words = smem.allocate_tensor(Int32, cute.make_layout(8), 16)
            if warp == 0:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_init(full, 32 if self.how == "every" else 1)
            cute.arch.mbarrier_init_fence()
            cute.arch.sync_threads()
            if warp == 0:
                if const_expr(self.how == "one"):
                    for i in cutlass.range_constexpr(8):
                        word = cute.arch.shuffle_sync(lane, 4 * i)
                        if lane == 0:
                            words[i] = word
                else:
                    if (lane & 3) == 0:
                        words[lane >> 2] = lane
                if const_expr(self.how == "every"):
                    cute.arch.mbarrier_arrive(full)
                else:
                    cute.arch.sync_warp()
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(full)
            else:
                cute.arch.mbarrier_wait(full, 0)
                out[lane] = words[lane >> 2]

    with tempfile.TemporaryDirectory() as folder:
        made = []
        for how in ("elected", "every", "one"):
            arguments = [fake_tensor(Int32, (None,), align=4), fake_stream()]
            made.append(compile_kernel(Order(how), arguments, how, out_dir=Path(folder)))
            found = re.findall(r"\b(STS|WARPSYNC|NOP|SYNCS\.ARRIVE|LDS)\b", disassemble(Path(folder) / f"{how}.cubin"))
            print(how, *found[: found.index("LDS") + 1])
        link_bundle([each.object_path for each in made], library)


def run(library: str, how: str) -> None:
    """Launch one of them and print the words."""
    import torch
    import tvm_ffi

    out = torch.full((32,), -1, dtype=torch.int32, device="cuda")
    tvm_ffi.load_module(str(Path(library).resolve()))[how](out)
    print(how, out.tolist()[::4])


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]))
    else:
        run(sys.argv[2], sys.argv[3])
