"""What compute-sanitizer's racecheck sees of an order that a warp makes: stores, `sync_warp`, one arrival.

    PYTHONPATH=src python tests/gpu/racecheck_order.py build order.so     anywhere with the DSL; prints the instructions
    compute-sanitizer --tool racecheck python tests/gpu/racecheck_order.py run order.so HOW

A warp writes words of shared memory, another waits on an mbarrier and loads them.

    elected  eight lanes store, sync_warp, the elected lane arrives. Right: bar.warp.sync orders memory among the lanes, the
             arrival releases, the wait acquires. ptxas turns sync_warp of a converged warp into NOP.
    every    the same, every lane arrives for itself
    one      the elected lane stores all eight
    copied   every lane copies a word with cp.async and lets the copy arrive (cp.async.mbarrier.arrive.noinc)
    wide     the same with 16 bytes
    beside   the same, and the elected lane arrives, too, as it does for what was stored beside the copies
    matrix   the same, read by ldmatrix
    reused   as `every`, twice; in between the readers meet, one of them says that all have read, and every writer waits for it

All print the right words. racecheck reports hazards in `elected` and `reused` alone: it takes a lane's stores, and its reads,
as released only by that lane's own arrival. It sees what copies arrive for.
"""

import re
import sys
import tempfile
from pathlib import Path

HOW = ("elected", "every", "one", "copied", "wide", "beside", "matrix", "reused")
COPIES = HOW[3:7]


def build(library: Path) -> None:
    """Compile the three kernels into one library."""
    import cuda.bindings.driver as cuda
    import cutlass
    import cutlass.cute as cute
    from cutlass import Int32, Int64, const_expr

    from openmla.backends.cute.toolchain import compile_kernel, disassemble, fake_stream, fake_tensor, link_bundle

    class Order:
        """One of the kernels."""

        smem_bytes = 256

        def __init__(self, how: str) -> None:
            self.how = how

        @cute.jit
        def __call__(self, out: cute.Tensor, source: cute.Tensor, stream: cuda.CUstream):
            """Write eight words, four times each."""
            self.kernel(out, source).launch(grid=[1, 1, 1], block=[64, 1, 1], stream=stream)

        @cute.kernel
        def kernel(self, out: cute.Tensor, source: cute.Tensor):
            """Warp 0 writes, warp 1 loads."""
            lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
            smem = cutlass.memory.SmemAllocator()
            full = smem.allocate_tensor(Int64, cute.make_layout(1), 16).iterator
            words = smem.allocate_tensor(Int32, cute.make_layout(128), 16)
            read = smem.allocate_tensor(Int64, cute.make_layout(1), 16).iterator
            if warp == 0:
                with cute.arch.elect_one():
                    one, more = self.how in ("elected", "one"), self.how in ("beside", "matrix")
                    cute.arch.mbarrier_init(full, 1 if one else 33 if more else 32)
                    cute.arch.mbarrier_init(read, 1)
            cute.arch.mbarrier_init_fence()
            cute.arch.sync_threads()
            if const_expr(self.how in (*COPIES, "reused")):
                self.hand(out, source, words, full, read, lane, warp)
            elif warp == 0:
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

        @cute.jit
        def hand(
            self, out: cute.Tensor, source: cute.Tensor, words: cute.Tensor, full: cutlass.Constexpr,
            read: cutlass.Constexpr, lane: Int32, warp: Int32,
        ):  # fmt: skip
            """Words from one warp to the other: copied once, or stored twice."""
            if warp == 0:
                if const_expr(self.how in COPIES):
                    size = 4 if self.how == "copied" else 16
                    there = words.iterator.toint() + lane * size
                    here = source.iterator.toint() + cutlass.Int64(lane * size)
                    cache = "ca" if size == 4 else "cg"
                    cute.arch.inline_ptx(
                        f"cp.async.{cache}.shared.global [{{$r0}}], [{{$r1}}], {size};", read_only_args=[there, here]
                    )
                    cute.arch.cp_async_mbarrier_arrive_noinc(full)
                    if const_expr(self.how in ("beside", "matrix")):
                        cute.arch.sync_warp()
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive(full)
                else:
                    words[lane] = lane + 100
                    cute.arch.mbarrier_arrive(full)
                    cute.arch.mbarrier_wait(read, 0)
                    words[lane] = lane
                    cute.arch.mbarrier_arrive(full)
            else:
                cute.arch.mbarrier_wait(full, 0)
                if const_expr(self.how == "matrix"):  # lane l gets two bytes of row l / 4 of an 8 x 8 matrix: word l
                    address = words.iterator.toint() + (lane & 7) * 16
                    out[lane] = cute.arch.inline_ptx(
                        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{$w0}}, [{$r0}];", write_only_types=[Int32],
                        read_only_args=[address],
                    )  # fmt: skip
                else:
                    out[lane] = words[lane ^ 4] ^ 4
                if const_expr(self.how == "reused"):
                    cute.arch.sync_warp()
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(read)
                    cute.arch.mbarrier_wait(full, 1)
                    out[lane] = words[lane ^ 4] ^ 4

    with tempfile.TemporaryDirectory() as folder:
        made = []
        for how in HOW:
            arguments = [fake_tensor(Int32, (None,), align=4), fake_tensor(Int32, (None,), align=4), fake_stream()]
            made.append(compile_kernel(Order(how), arguments, how, out_dir=Path(folder)))
            opcodes = r"\b(STS|LDGSTS|ARRIVES|WARPSYNC|NOP|SYNCS\.ARRIVE|LDS|LDSM)\b"
            found = re.findall(opcodes, disassemble(Path(folder) / f"{how}.cubin"))
            print(how, *found)
        link_bundle([each.object_path for each in made], library)


def run(library: str, how: str) -> None:
    """Launch one of them and print the words."""
    import torch
    import tvm_ffi

    out = torch.full((32,), -1, dtype=torch.int32, device="cuda")
    source = torch.arange(128, dtype=torch.int32, device="cuda")
    tvm_ffi.load_module(str(Path(library).resolve()))[how](out, source)
    print(how, out.tolist()[::4])


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]))
    else:
        run(sys.argv[2], sys.argv[3])
