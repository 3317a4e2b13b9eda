"""Compile every kernel configuration ahead of time, with no GPU, and read what the compilers made of it.

    python bench/aot.py              every configuration for sm_80, sm_90 and gfx942 -> bench/results/aot.csv
    python bench/aot.py --subset     a few of each kind (CI); prints, writes only with --out

Exit 1 if a kernel fails to compile, spills registers, uses a stack, or needs more shared memory than the chip has. On NVIDIA, `loop_per_weight`
is the number of instructions a thread issues in the main loop, times threads, per weight decoded there: a kernel that reads weights at full
bandwidth on an H200 can afford about 4.1 / 3.2 / 2.2 at 4 / 3 / 2 bits.
"""

import argparse
import csv
import itertools
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compressor.kernels import affine, affine_configs
from compressor.kernels.affine_configs import Tile

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
KERNELS = {"forward": affine.forward_kernel, "grad_input": affine.grad_input_kernel, "grad_scale": affine.grad_scale_kernel}
NAMES = {2: "bf16", 4: "fp32"}
FIELDS = [
    "kernel", "bits", "zero", "group", "dtype", "target", "bm", "bn", "width",
    "warps", "stages", "fold", "triton",
    "registers", "spill_bytes", "stack", "shared", "mma", "loop_per_weight", "seconds", "verdict",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    op: str
    target: str
    most: int  # rows of x up to which the host takes this tile
    tile: Tile
    bits: int
    group: int
    asymmetric: bool
    itemsize: int

    @property
    def fold(self) -> bool:
        return affine.folds(self.group, 4096, self.most)


def cases(subset: bool) -> list[Case]:
    out = []
    for target, op, itemsize in itertools.product(TARGETS, KERNELS, NAMES):
        rows = affine_configs.rows(op, target, itemsize)
        for (most, tile), bits, group, asymmetric in itertools.product(rows, (2, 3, 4), (32, 128, 256), (False, True)):
            plain = group == 128 and asymmetric and (itemsize == 2 or bits == 3)
            if plain or (target == "sm_90" and itemsize == 2 and (group == 128 or (group, bits) == (32, 4))):
                out.append(Case(op, target, most, tile, bits, group, asymmetric, itemsize))
    if subset:
        keep = {"sm_80": (4,), "sm_90": (2, 3, 4), "gfx942": (4,)}
        out = [c for c in out if c.group == 128 and c.asymmetric and c.bits in keep[c.target] and c.itemsize == 2]
        last = {(c.op, c.target): c.tile for c in out}
        out = [c for c in out if c.tile == last[c.op, c.target] or (c.op, c.target, c.tile.bm) == ("forward", "sm_90", 16)]
    return out


def compile_case(case: Case) -> Any:
    """The compiled kernel, specialised as a launch on a 4096-wide layer would be: aligned pointers, N, K and strides divisible by 16."""
    kernel, name = KERNELS[case.op], NAMES[case.itemsize]
    constants: dict[str, Any] = {
        "GROUP": case.group, "BITS": case.bits, "BM": case.tile.bm, "BN": case.tile.bn, "FOLD": case.fold, "EVEN": True,
        **affine.slices(case.tile, case.group, 4096, case.fold or case.op != "forward"),
        "DOT": triton.language.bfloat16 if case.itemsize == 2 else triton.language.float32, "ACC": triton.language.float32,
        "PRECISION": "ieee" if case.target == "gfx942" else "tf32x3",
    }  # fmt: skip
    if not case.asymmetric:
        constants["z_ptr"] = None
    types = {"x_ptr": name, "dy_ptr": name, "y_ptr": name, "dx_ptr": name, "s_ptr": name, "w_ptr": "i32", "z_ptr": "u8", "out_ptr": "fp32"}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature, aligned = {}, {}
    for i, arg in enumerate(kernel.arg_names):
        signature[arg] = "constexpr" if arg in constants else f"*{types[arg]}" if arg in types else "i32"
        if arg not in constants and (arg in types or arg in ("N", "K", "stride_x", "stride_dy")):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGETS[case.target], options=options)


def measure(case: Case) -> dict[str, Any]:
    """One row of the table."""
    start = time.time()
    row: dict[str, Any] = {
        "kernel": case.op, "bits": case.bits, "zero": "u8" if case.asymmetric else "none", "group": case.group, "dtype": NAMES[case.itemsize],
        "target": case.target, **case.tile._asdict(), "fold": int(case.fold), "triton": triton.__version__,
    }  # fmt: skip
    try:
        compiled = compile_case(case)
        row |= _amd(compiled) if case.target == "gfx942" else _nvidia(compiled, case)
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        return row | {"verdict": f"failed: {type(error).__name__}: {message[-1][:150]}"}
    faults = [name for name in ("spill_bytes", "stack") if row[name] > 0]
    faults += ["shared"] if row["shared"] > affine_configs.SHARED[case.target] else []
    return row | {"seconds": round(time.time() - start, 1), "verdict": "over: " + " ".join(faults) if faults else "ok"}


def _amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text), "spill_bytes": 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", text), "shared": compiled.metadata.shared,
        "mma": f"mfma {len(re.findall(r'v_mfma', text))}",
    }  # fmt: skip


def _nvidia(compiled: Any, case: Case) -> dict[str, Any]:
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _output(TOOLS / "cuobjdump", "-res-usage", cubin)
        sass = _output(TOOLS / "nvdisasm", "-c", cubin)
        arch = re.search(r"\.target\s+(\w+)", compiled.asm["ptx"])
        assert arch
        log = _output(get_ptxas(TARGETS[case.target].arch).path, "-v", f"--gpu-name={arch[1]}", ptx, "-o", Path(folder, "out"))
    decoded = case.tile.bn * (256 if case.op == "forward" else case.tile.width) if case.op != "grad_scale" else 0
    loop = main_loop(sass)
    return {
        "registers": _number(r"REG:(\d+)", usage), "spill_bytes": _number(r"(\d+) bytes spill stores", log),
        "stack": _number(r"STACK:(\d+)", usage), "shared": compiled.metadata.shared,
        "mma": " ".join(f"{op.lower()} {n}" for op in ("HGMMA", "HMMA") if (n := len(re.findall(rf"\b{op}\b", sass)))),
        "loop_per_weight": round(len(loop) * 32 * case.tile.warps / decoded, 2) if decoded else "",
    }  # fmt: skip


def main_loop(sass: str) -> list[str]:
    """Instructions of the innermost loop with the most matrix instructions: from a label to the last jump back to it."""
    labels: dict[str, int] = {}
    code: list[str] = []
    loops: list[list[str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
            jump = re.search(r"BRA.*`\((\.L_\w+)\)", instruction[1])
            if jump and jump[1] in labels:
                loops.append(code[labels[jump[1]] :])
    return max(loops, key=lambda body: (sum("MMA" in line for line in body), -len(body)), default=[])


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _output(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description="compile the kernels ahead of time and report their resources")
    parser.add_argument("--subset", action="store_true", help="a few configurations of each kind")
    parser.add_argument("--out", type=Path, help="CSV to write (default bench/results/aot.csv for the full run)")
    args = parser.parse_args()
    out = args.out or (None if args.subset else Path(__file__).parent / "results" / "aot.csv")
    rows = []
    for case in cases(args.subset):
        rows.append(measure(case))
        print(" ".join(str(rows[-1].get(name, "")) for name in FIELDS), flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.with_suffix(".part").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        out.with_suffix(".part").rename(out)
    bad = [row for row in rows if row["verdict"] != "ok"]
    print(f"{len(rows)} compiled, {len(bad)} bad", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
