"""One small product on Hopper in six steps, for chapter 3: scores of 64 keys and 16 query rows, tile after tile.

    out[t, j, i] = <keys[64 t + j], q[i]>          keys [64 tiles, 576] bf16, q [16, 576] bf16, out [tiles, 64, 16] fp32

    1  loop       every thread a dot product, from global memory
    2  wgmma      the tile in swizzled shared memory, the tensor cores multiply
    3  TMA        the copy engine brings the tile, an mbarrier says when it is there
    4  pipeline   two tiles in flight, so that the next one travels while this one is multiplied
    5  roles      a warp that only loads; the warpgroup that multiplies never issues a copy
    6  seesaw     two warpgroups take turns: one multiplies while the other takes exponentials (out = 2^score)

They are compiled for sm_90a and their instructions counted; `tests/gpu/guide_levels.py` checks and times them on a GPU
(`bench/results/guide_levels.jsonl`). The kernels that ship are in `src/openmla/backends/cute`; the pieces used here are theirs.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

KEYS, ROWS, COLUMNS, SLICE = 64, 16, 576, 64
SLICES = COLUMNS // SLICE
TILE_BYTES = KEYS * COLUMNS * 2
NAMES = ("loop", "wgmma", "TMA", "pipeline", "roles", "seesaw")


class Scores:
    """The kernel at one level, 1 to 6."""

    def __init__(self, level: int) -> None:
        self.level = level
        self.stages = 1 if level < 4 else 2  # 73,728 bytes each
        self.consumers = 2 if level == 6 else 1  # warpgroups that multiply
        self.threads = 128 * self.consumers + (32 if level >= 5 else 0)
        self.smem_bytes = 0

    @cute.jit
    def __call__(self, keys: cute.Tensor, q: cute.Tensor, out: cute.Tensor, stream: cuda.CUstream):
        """Layouts, the copy engine's description of the keys, and the launch."""
        grid = [out.shape[0] if const_expr(self.level < 4) else 132, 1, 1]
        if const_expr(self.level == 1):
            self.loop(keys, q, out).launch(grid=grid, block=[self.threads, 1, 1], stream=stream)
        else:
            atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, cutlass.BFloat16)
            k_layout = cute.tile_to_shape(atom, (KEYS, COLUMNS, self.stages), order=(0, 1, 2))
            q_layout = cute.tile_to_shape(atom, (ROWS, COLUMNS), order=(0, 1))
            major = OperandMajorMode.K
            product = sm90.make_trivial_tiled_mma(
                cutlass.BFloat16, cutlass.BFloat16, major, major, Float32, (1, 1, 1), (KEYS, ROWS)
            )
            box = cute.tile_to_shape(atom, (KEYS, SLICE), order=(0, 1))
            tma, tma_keys = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), keys, box, (KEYS, SLICE))

            @cute.struct
            class Storage:
                full: cute.struct.MemRange[Int64, self.stages]
                empty: cute.struct.MemRange[Int64, self.stages]
                k: cute.struct.Align[cute.struct.MemRange[cutlass.BFloat16, cute.cosize(k_layout)], 1024]
                q: cute.struct.Align[cute.struct.MemRange[cutlass.BFloat16, cute.cosize(q_layout)], 1024]

            self.Storage = Storage
            self.smem_bytes = Storage.size_in_bytes()
            self.tiled(tma, tma_keys, keys, q, out, product, k_layout, q_layout).launch(
                grid=grid, block=[self.threads, 1, 1], stream=stream
            )

    @cute.kernel
    def loop(self, keys: cute.Tensor, q: cute.Tensor, out: cute.Tensor):
        """Level 1."""
        thread, _, _ = cute.arch.thread_idx()
        tile, _, _ = cute.arch.block_idx()
        for i in cutlass.range_constexpr(KEYS * ROWS // 128):
            key, row = (thread + 128 * i) // ROWS, thread % ROWS
            total = Float32(0.0)
            for column in cutlass.range(COLUMNS, unroll=4):
                total += keys[tile * KEYS + key, column].to(Float32) * q[row, column].to(Float32)
            out[tile, key, row] = total

    @cute.kernel
    def tiled(
        self, tma: cute.CopyAtom, tma_keys: cute.Tensor, keys: cute.Tensor, q: cute.Tensor, out: cute.Tensor,
        product: cute.TiledMma, k_layout: cute.ComposedLayout, q_layout: cute.ComposedLayout,
    ):  # fmt: skip
        """Levels 2 to 6."""
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        memory = cutlass.memory.SmemAllocator().allocate(self.Storage)
        full, empty = memory.full.data_ptr(), memory.empty.data_ptr()
        sm_k = memory.k.get_tensor(k_layout.outer, swizzle=k_layout.inner)
        sm_q = memory.q.get_tensor(q_layout.outer, swizzle=q_layout.inner)

        for i in cutlass.range(thread, ROWS * COLUMNS, self.threads, unroll=1):
            sm_q[i // COLUMNS, i % COLUMNS] = q[i // COLUMNS, i % COLUMNS]
        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + i, 1)
                    cute.arch.mbarrier_init(empty + i, 4)  # the warps of the warpgroup that used it
        cute.arch.mbarrier_init_fence()
        cute.arch.fence_view_async_shared()  # what threads wrote becomes visible to the tensor cores
        cute.arch.sync_threads()

        if const_expr(self.level == 2):
            for i in cutlass.range(thread, KEYS * COLUMNS, self.threads, unroll=4):
                sm_k[i // COLUMNS, i % COLUMNS, 0] = keys[block * KEYS + i // COLUMNS, i % COLUMNS]
            cute.arch.fence_view_async_shared()
            cute.arch.sync_threads()
            self.multiply(product, sm_k, sm_q, out, block, Int32(0), thread)
        if const_expr(self.level == 3):
            if warp == 0:
                self.load(tma, tma_keys, sm_k, full, block, Int32(0))
            cute.arch.mbarrier_wait(full, 0)
            self.multiply(product, sm_k, sm_q, out, block, Int32(0), thread)
        if const_expr(self.level == 4):
            self.pipeline(tma, tma_keys, sm_k, sm_q, full, product, out, block, warp, thread)
        if const_expr(self.level >= 5):
            if warp == 4 * self.consumers:
                self.produce(tma, tma_keys, sm_k, full, empty, out, block)
            else:
                self.consume(product, sm_k, sm_q, full, empty, out, block, warp, thread)

    @cute.jit
    def load(
        self, tma: cute.CopyAtom, tma_keys: cute.Tensor, sm_k: cute.Tensor, full: cutlass.Constexpr, tile: Int32,
        stage: Int32,
    ):  # fmt: skip
        """One warp asks for a tile: nine boxes of 64 columns; `full` flips when all their bytes are there."""
        source = cute.local_tile(tma_keys, (KEYS, SLICE), (None, None))
        target = cute.flat_divide(sm_k, (KEYS, SLICE))
        to, of = cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(target, 0, 2), cute.group_modes(source, 0, 2)
        )
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, TILE_BYTES)
        for i in cutlass.range_constexpr(SLICES):
            cute.copy(tma, of[None, tile, i], to[None, 0, i, stage], tma_bar_ptr=full + stage)

    @cute.jit
    def multiply(
        self, product: cute.TiledMma, sm_k: cute.Tensor, sm_q: cute.Tensor, out: cute.Tensor, tile: Int32,
        stage: Int32, thread: Int32,
    ):  # fmt: skip
        """36 wgmmas of 64 x 16 x 16, then every thread stores its eight scores."""
        mine = product.get_slice(thread)
        a, b = product.make_fragment_A(mine.partition_A(sm_k)), product.make_fragment_B(mine.partition_B(sm_q))
        s = product.make_fragment_C(product.partition_shape_C((KEYS, ROWS)))
        warpgroup.fence()
        for k in cutlass.range_constexpr(COLUMNS // 16):
            product.set(warpgroup.Field.ACCUMULATE, k != 0)
            cute.gemm(product, s, a[None, None, k, stage], b[None, None, k], s)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        places = mine.partition_C(out[tile, None, None])
        for i in cutlass.range_constexpr(cute.size(s)):
            places[i] = cute.math.exp2(s[i], fastmath=True) if const_expr(self.level == 6) else s[i]

    @cute.jit
    def pipeline(
        self, tma: cute.CopyAtom, tma_keys: cute.Tensor, sm_k: cute.Tensor, sm_q: cute.Tensor, full: cutlass.Constexpr,
        product: cute.TiledMma, out: cute.Tensor, block: Int32, warp: Int32, thread: Int32,
    ):  # fmt: skip
        """Level 4: ask for the first tiles; then multiply one and ask for the one that takes its place."""
        if warp == 0:
            for i in cutlass.range_constexpr(self.stages):
                if block + 132 * i < out.shape[0]:
                    self.load(tma, tma_keys, sm_k, full, block + 132 * i, Int32(i))
        stage, phase = Int32(0), Int32(0)
        for tile in cutlass.range(block, out.shape[0], 132, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            self.multiply(product, sm_k, sm_q, out, tile, stage, thread)
            cute.arch.sync_threads()
            if (warp == 0) & (tile + 132 * self.stages < out.shape[0]):
                self.load(tma, tma_keys, sm_k, full, tile + 132 * self.stages, stage)
            stage += 1
            if stage == self.stages:
                stage = Int32(0)
                phase = phase ^ 1

    @cute.jit
    def produce(
        self, tma: cute.CopyAtom, tma_keys: cute.Tensor, sm_k: cute.Tensor, full: cutlass.Constexpr,
        empty: cutlass.Constexpr, out: cute.Tensor, block: Int32,
    ):  # fmt: skip
        """Levels 5 and 6: the loading warp, ahead of everybody by as many tiles as there are stages."""
        stage, phase = Int32(0), Int32(1)  # the first lap finds every stage free
        for tile in cutlass.range(block, out.shape[0], 132, unroll=1):
            cute.arch.mbarrier_wait(empty + stage, phase)
            self.load(tma, tma_keys, sm_k, full, tile, stage)
            stage += 1
            if stage == self.stages:
                stage = Int32(0)
                phase = phase ^ 1

    @cute.jit
    def consume(
        self, product: cute.TiledMma, sm_k: cute.Tensor, sm_q: cute.Tensor, full: cutlass.Constexpr,
        empty: cutlass.Constexpr, out: cute.Tensor, block: Int32, warp: Int32, thread: Int32,
    ):  # fmt: skip
        """Levels 5 and 6: warpgroup w takes every tile, or with two of them every other one, always of stage w."""
        group = cute.arch.make_warp_uniform(warp // 4)
        stage, phase = group, Int32(0)
        for tile in cutlass.range(block + 132 * group, out.shape[0], 132 * self.consumers, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            self.multiply(product, sm_k, sm_q, out, tile, stage, thread % 128)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(empty + stage)
            if const_expr(self.consumers == 1):
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    phase = phase ^ 1
            else:
                phase = phase ^ 1


def arguments() -> tuple[Any, ...]:
    """Tensors without storage, for the compiler."""
    from openmla.backends.cute.toolchain import fake_stream, fake_tensor

    keys = fake_tensor(cutlass.BFloat16, (None, COLUMNS))
    q = fake_tensor(cutlass.BFloat16, (ROWS, COLUMNS))
    return keys, q, fake_tensor(Float32, (None, KEYS, ROWS)), fake_stream()
