"""Compile every kernel configuration ahead of time, with no GPU, and read what the compilers made of it.

    python bench/aot.py              every configuration for sm_80, sm_90 and gfx942 -> bench/results/aot.csv
    python bench/aot.py --subset     a few of each kind (CI); prints, writes only with --out
    python bench/aot.py --only forward --target sm_90

Exit 1 if a kernel fails to compile, spills registers, uses a stack, or needs more shared memory than the chip has. On NVIDIA, `loop_per_weight`
is the number of instructions a thread issues in the main loop, times threads, per weight decoded there: a kernel that reads weights at full
bandwidth on an H200 can afford about 4.1 / 3.2 / 2.2 at 4 / 3 / 2 bits. For few rows of x on sm_90 it has a `limit`, and weights may not pass from
thread to thread (SHFL) nor, at 4 and 2 bits, through shared memory (STS). On sm_90 Hopper's matrix instruction (HGMMA) must be used wherever the
tile is large enough. Kernels that add a low-rank term (`low`) are compiled once more with it, without a limit: other registers make another loop.

Arguments are specialised as in a launch on a layer of 4096 x 4096; `note` names what differs from the plain case (NOTES), again without a limit:

    python bench/aot.py --notes      only those; with --merge rows replace their like in bench/results/aot.csv
"""

import argparse
import csv
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compressor.kernels import affine, configs, layout, tables
from compressor.kernels.configs import Tile

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
NAMES = {2: "bf16", 4: "fp32"}
DOTS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
FEW = 64  # rows of x up to which decoding is the limit
LIMITS = {"forward": {4: 2.7, 3: 3.6, 2: 2.7}, "table_forward": {4: 5.5, 3: 4.4, 2: 3.1}}  # instructions per weight
NOTES = {
    "fp16": "x and scales in float16",
    "float zeros": "zeros in float32, as trained ones are",
    "fp32 scales": "scales in float32, x in bf16",
    "ragged": "a number of columns that is no multiple of 256",
    "one group": "one group a row, G = 1",
    "smallest": "one tile of words: 64 x 256, one group",
    "split": "many rows, and the reduction cut in parts",
    "whole": "few rows, and the reduction not cut",
}
FIELDS = [
    "kernel", "bits", "zero", "group", "dtype", "target", "bm", "bn", "width",
    "warps", "stages", "fold", "low", "note", "triton",
    "registers", "spill_bytes", "stack", "shared", "mma", "sts", "shfl", "loop_per_weight", "limit", "seconds", "verdict",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    op: str
    target: str
    most: int | None  # rows of x up to which the host takes this tile
    tile: Tile
    bits: int
    group: int
    asymmetric: bool
    itemsize: int
    low: bool = False  # with a low-rank term
    note: str = ""  # of NOTES

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return (64, 256) if self.note == "smallest" else (4096, 3968 if self.note == "ragged" else 4096)

    @property
    def few(self) -> bool:
        return self.most is not None and self.most <= FEW

    @property
    def fold(self) -> bool:
        return affine.folds(self.group, self.shape[1], self.most or 1 << 30)

    @property
    def split(self) -> bool:
        """Whether the reduction is cut in parts: for few rows, where the chip's files allow it."""
        wanted = self.note == "split" or (self.few and self.note not in ("whole", "smallest"))
        return wanted and configs.setting("max_split", configs.Chip("", self.target)) > 1

    @property
    def dtype(self) -> str:
        return "fp16" if self.note == "fp16" else NAMES[self.itemsize]

    @property
    def types(self) -> dict[str, Any]:
        """What every matrix kernel is told: tile and types."""
        return {
            "BITS": self.bits, "BM": self.tile.bm, "BN": self.tile.bn, "WIDTH": self.tile.width,
            "EVEN": self.shape[1] % 256 == 0, "SPLIT": self.split,
            "DOT": DOTS[self.dtype], "ACC": tl.float32,
            "PRECISION": "ieee" if self.target == "gfx942" else "tf32x3",
        }  # fmt: skip

    @property
    def limit(self) -> float | None:
        """Most instructions per weight."""
        bounded = self.few and not (self.low or self.note) and self.target == "sm_90" and self.itemsize == 2 and ("table" in self.op or not self.fold)
        return LIMITS.get(self.op, {}).get(self.bits) if bounded else None


def _affine(case: Case) -> tuple[Any, dict[str, Any]]:
    """The kernel and its constants."""
    name, few = case.op, case.op == "forward" and not case.fold
    kernel = getattr(affine, "few_kernel" if few else "many_kernel" if name == "forward" else f"{name}_kernel")
    k = case.shape[1]
    part = affine.slices(case.tile, case.group, k, not few)
    code = case.types["DOT"] if case.itemsize == 2 else tl.bfloat16
    constants = case.types | part | {"GROUP": 0 if few and case.group == k else case.group, "TYPE": code}
    return kernel, constants if case.asymmetric else constants | {"z_ptr": None}


def _table(case: Case) -> tuple[Any, dict[str, Any]]:
    """The same for weights with tables."""
    constants = case.types | {"ASM": "gcn" if case.target == "gfx942" else "ptx", "TYPE": case.types["DOT"]}
    k = case.shape[1]
    if case.op == "table_forward":
        return tables.table_forward_kernel, constants | tables.spans(case.tile, case.group, k, 4 if case.split else 16)
    if case.op == "table_grad_input":
        return tables.table_grad_input_kernel, constants | tables.steps_of(case.tile, case.group, k)
    return getattr(tables, f"{case.op}_kernel"), constants | tables.columns(case.tile, case.group, k)


# op -> the kernel and its constants for a case; the names of pointer arguments stand in POINTERS, "x" for the type of the inputs
KERNELS: dict[str, Callable[[Case], tuple[Any, dict[str, Any]]]] = {
    **dict.fromkeys(("forward", "grad_input", "grad_scale", "dequantize"), _affine),
    **dict.fromkeys(("table_forward", "table_grad_input", "grad_table", "table_dequantize"), _table),
}
POINTERS = {
    "x_ptr": "x", "dy_ptr": "x", "y_ptr": "x", "dx_ptr": "x", "s_ptr": "x", "w_ptr": "i32", "z_ptr": "u8", "t_ptr": "i32",
    "sums_ptr": "fp32", "mask_ptr": "i32", "u_ptr": "x", "b_ptr": "x", "part_ptr": "fp32", "count_ptr": "i32",
}  # fmt: skip
RESULTS = {"grad_scale": "fp32", "grad_table": "fp32"}  # what out_ptr is, if not the type of the inputs


def cases(subset: bool) -> list[Case]:
    out = []
    for target, op, itemsize, bits in itertools.product(TARGETS, KERNELS, NAMES, (2, 3, 4)):
        rows = tuple(_both_kernels(op, configs.rows(op, configs.Chip("", target), itemsize, bits)))
        table, hopper = "table" in op, target == "sm_90" and itemsize == 2
        for (most, tile), group, asymmetric in itertools.product(rows, (128, 1024) if table else (32, 128, 256), (False, True)):
            plain = group == (1024 if table else 128) and asymmetric != table and (itemsize == 2 or bits == 3)
            more = not asymmetric if table else group in (128, 256) or (group, bits) == (32, 4)
            case = Case(op, target, most, tile, bits, group, asymmetric, itemsize)
            if plain or (hopper and more):
                out.append(case)
            if plain and hopper and bits == 4 and "forward" in op and (case.few or not table):
                out.append(replace(case, low=True))
    if subset:
        keep = {"sm_80": (4,), "sm_90": (2, 3, 4), "gfx942": (4,)}
        out = [c for c in out if c.group == (1024 if "table" in c.op else 128) and c.bits in keep[c.target] and c.itemsize == 2]
        out = [c for c in out if c.asymmetric or "table" in c.op]
        out = [c for c in out if c.most is None or ("forward" in c.op and c.target == "sm_90" and c.tile.bm == 16)]
    return out


def _both_kernels(op: str, rows: Iterable[tuple[int | None, Tile]]) -> Iterator[tuple[int | None, Tile]]:
    """A tile for rows on both sides of FEW runs with both kernels of the affine forward."""
    least = 0
    for most, tile in rows:
        if op == "forward" and least < FEW and (most is None or most > FEW):
            yield FEW, tile
        yield most, tile
        least = most or 0


def noted() -> list[Case]:
    """One case each of what the plain ones leave out, at 4 bits in groups of 128 (tables: 1024), or as far as they go."""
    out = []
    wanted: dict[str, tuple[list[str], list[str]]] = {  # op -> notes for 16 rows of x, notes for many
        "forward": (
            ["fp16", "float zeros", "fp32 scales", "ragged", "one group", "smallest", "whole"],
            ["fp16", "float zeros", "fp32 scales", "ragged", "one group", "split"],
        ),
        "grad_input": (["fp16", "float zeros", "fp32 scales", "smallest"], ["split"]),
        "grad_scale": ([], ["fp16", "float zeros", "smallest"]),
        "dequantize": ([], ["fp16", "float zeros", "fp32 scales", "one group"]),
        "table_forward": (["fp16", "ragged", "one group", "smallest", "whole"], ["fp16", "ragged", "split"]),
        "table_grad_input": (["fp16", "smallest"], ["split"]),
        "grad_table": ([], ["fp16", "one group"]),
        "table_dequantize": ([], ["fp16", "one group"]),
    }
    for target, op in itertools.product(("sm_90", "gfx942"), wanted):
        rows, table = configs.rows(op, configs.Chip("", target), 2, 4), "table" in op
        for notes, (most, tile) in zip(wanted[op], (next((r for r in rows if r[0] == 16), rows[0]), rows[-1]), strict=True):
            for note in notes:
                if target == "sm_90" or note in ("fp16", "ragged"):
                    case = Case(op, target, most, tile, 4, 1024 if table else 128, not table, 2, note=note)
                    whole = note in ("one group", "smallest")
                    out.append(replace(case, group=case.shape[1]) if whole else case)
    return out


def sizes(case: Case) -> dict[str, int]:
    """Whole numbers of a launch, by argument; those that a kernel does not specialise on may be anything."""
    n, k = case.shape
    down, blocks = layout.tiles(n, k)
    width = KERNELS[case.op](case)[1]["WIDTH"]
    across = triton.cdiv(k, width)
    return {
        "N": n, "K": k, "G": triton.cdiv(k, case.group), "R": 64 if case.low else 0, "stride_x": k, "stride_dy": n, "stride_out": k,
        "tiles_n": down, "blocks": blocks, "rows": triton.cdiv(n, configs.TABLE_ROWS) * configs.TABLE_ROWS,
        "columns": across if "table" in case.op else max(across, k // case.group),
    }  # fmt: skip


def compile_case(case: Case) -> Any:
    """The compiled kernel, specialised as a launch would do it: aligned pointers, numbers that are 1 or divisible by 16."""
    kernel, constants = KERNELS[case.op](case)
    types = {name: case.dtype if kind == "x" else kind for name, kind in POINTERS.items()}
    types["out_ptr"] = RESULTS.get(case.op, case.dtype)
    types |= {"float zeros": {"z_ptr": "fp32"}, "fp32 scales": {"s_ptr": "fp32"}}.get(case.note, {})
    if not case.split:
        constants = constants | {"part_ptr": None, "count_ptr": None}
    if not case.low:
        constants = constants | {"u_ptr": None, "b_ptr": None}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    numbers = sizes(case)
    special = {p.name: numbers[p.name] for p in kernel.params if p.name in numbers and not p.do_not_specialize}
    constants |= {name: 1 for name, value in special.items() if value == 1}
    signature, aligned = {}, {}
    for i, arg in enumerate(kernel.arg_names):
        signature[arg] = "constexpr" if arg in constants else f"*{types[arg]}" if arg in types else "i32"
        if arg not in constants and (arg in types or special.get(arg, 1) % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGETS[case.target], options=options)


def measure(case: Case) -> dict[str, Any]:
    """One row of the table."""
    start = time.time()
    row: dict[str, Any] = {
        "kernel": case.op, "bits": case.bits, "zero": "none" if not case.asymmetric else "fp32" if case.note == "float zeros" else "u8",
        "group": case.group, "dtype": case.dtype,
        "target": case.target, **case.tile._asdict(), "fold": int(case.fold), "low": int(case.low), "note": case.note,
        "limit": case.limit or "", "triton": triton.__version__,
    }  # fmt: skip
    try:
        compiled = compile_case(case)
        row |= _amd(compiled) if case.target == "gfx942" else _nvidia(compiled, case)
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        return row | {"verdict": f"failed: {type(error).__name__}: {message[-1][:150]}"}
    faults = [name for name in ("spill_bytes", "stack") if row[name] > 0]
    faults += ["shared"] if row["shared"] > configs.setting("shared", configs.Chip("", case.target)) else []
    faults += _slow(case, row) if case.target == "sm_90" else []
    return row | {"seconds": round(time.time() - start, 1), "verdict": "over: " + " ".join(faults) if faults else "ok"}


def _slow(case: Case, row: dict[str, Any]) -> list[str]:
    """What is known to make it slow."""
    faults = []
    if case.limit:
        faults += ["loop_per_weight"] if row["loop_per_weight"] > case.limit else []
        faults += ["shfl"] if row["shfl"] else []
        faults += ["sts"] if row["sts"] > 2 and case.bits != 3 else []
    left = case.tile.bm if "grad_input" in case.op else case.tile.bn  # rows of the left side of the dot
    large = case.itemsize == 2 and "dequantize" not in case.op and left >= 16 * case.tile.warps and case.tile.bm >= 16
    if large and "hgmma" not in row["mma"].split():
        faults.append("hgmma")
    return faults


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
    decoded = case.tile.bn * 256 if "forward" in case.op else case.tile.bn * case.tile.width if "grad_input" in case.op else 0
    loop = main_loop(sass)
    count = lambda op: sum(re.search(rf"\b{op}\b", line) is not None for line in loop)
    return {
        "registers": _number(r"REG:(\d+)", usage), "spill_bytes": _number(r"(\d+) bytes spill stores", log),
        "stack": _number(r"STACK:(\d+)", usage), "shared": compiled.metadata.shared,
        "mma": " ".join(f"{op.lower()} {n}" for op in ("HGMMA", "HMMA") if (n := len(re.findall(rf"\b{op}\b", sass)))),
        "sts": count("STS"), "shfl": count("SHFL"),
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


def merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The file's rows, those for the same cases replaced, new ones last."""
    key = lambda row: tuple(str(row.get(name, "")) for name in FIELDS[: FIELDS.index("triton")])
    with path.open(newline="") as file:
        old = {key(row): row for row in csv.DictReader(file)}
    return list((old | {key(row): row for row in rows}).values())


def main() -> int:
    parser = argparse.ArgumentParser(description="compile the kernels ahead of time and report their resources")
    parser.add_argument("--subset", action="store_true", help="a few configurations of each kind")
    parser.add_argument("--only", choices=list(KERNELS), help="one operation; prints, writes only with --out")
    parser.add_argument("--target", choices=list(TARGETS), help="one chip; likewise")
    parser.add_argument("--out", type=Path, help="CSV to write (default bench/results/aot.csv for the full run)")
    parser.add_argument("--notes", action="store_true", help="only the cases with a note")
    parser.add_argument("--merge", action="store_true", help="replace rows of the default CSV, keep the others")
    args = parser.parse_args()
    part = args.subset or args.only or args.target or args.notes
    default = Path(__file__).parent / "results" / "aot.csv"
    out = args.out or (default if args.merge or not part else None)
    rows = []
    every = noted() if args.notes else cases(args.subset) + ([] if args.subset else noted())
    wanted = [c for c in every if args.only in (None, c.op) and args.target in (None, c.target)]
    for case in wanted:
        rows.append(measure(case))
        print(" ".join(str(rows[-1].get(name, "")) for name in FIELDS), flush=True)
    bad = [row for row in rows if row["verdict"] != "ok"]
    print(f"{len(rows)} compiled, {len(bad)} bad", file=sys.stderr)
    if out:
        rows = merged(default, rows) if args.merge else rows
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.with_suffix(".part").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        out.with_suffix(".part").rename(out)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
