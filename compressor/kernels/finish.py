"""What affine and table kernels do after their loop: add a low-rank product, and store, through fp32 memory where the reduction was cut in parts.

Each part is written to memory; the last program to arrive at a tile (an atomic counter) adds the parts in order and stores the result. So no second
kernel runs, and the order of the sum does not depend on the order of arrival: results repeat bit for bit. The counter is put back to zero by the
program that reads the parts, ready for the next launch on the same stream.

Memory ordering: the barrier orders the stores of all threads of a program before the atomic of its first thread, whose release makes them visible to
the device; the last program's acquire, and the barrier in handing its result to all threads, order the loads after it. Nobody waits for another
program, so nothing can hang. Counters come from workspace.py, which also says how CUDA graphs get theirs.

Limits: unproven on AMD, whose assembly shows no wait for outstanding stores (vmcnt) before the barrier; so gfx942.json keeps max_split at 1
until it was run there.

Price: parts x M x N numbers in fp32 written and read in L2. Source: the split reductions of stream-K (Osama et al. 2023).
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def add_low_rank(acc, u_ptr, b_ptr, m, n, M, N, R, part, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """acc [BN, BM] + b u^T; u [M, R], b [N, R], R a multiple of 16; only for part 0, so that it is added once."""
    r = tl.arange(0, 16)
    for start in range(0, tl.where(part == 0, R, 0), 16):
        b = tl.load(b_ptr + n.to(tl.int64)[:, None] * R + (start + r)[None, :], mask=n[:, None] < N, other=0.0).to(DOT)
        u = tl.load(u_ptr + m.to(tl.int64)[None, :] * R + (start + r)[:, None], mask=m[None, :] < M, other=0.0).to(DOT)
        acc = tl.dot(b, u, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def store_sum(acc, out_ptr, part_ptr, count_ptr, at, inside, size, SPLIT: tl.constexpr):
    """out[at] = acc, or, if SPLIT, the sum over parts of acc, once the last part of this tile has arrived.

    part_ptr fp32 (fp64) [parts, size], fewer than 2**31 in all; count_ptr int32 [tiles], zero before and after. The parts are the third axis of the
    grid, the tiles the first two.
    """
    if SPLIT:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(part_ptr + tl.program_id(2) * size + at, acc, mask=inside)
        tl.debug_barrier()
        parts = tl.num_programs(2)
        if tl.atomic_add(count_ptr + tile, 1, sem="acq_rel", scope="gpu") == parts - 1:
            total = tl.load(part_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
            for p in range(1, parts):
                total += tl.load(part_ptr + p * size + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(count_ptr + tile, 0)
    else:
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
