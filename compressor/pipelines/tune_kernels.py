"""`compressor tune-kernels`: time the kernels' tiles on this GPU and write the table that they read (kernels/configs.py).

For every operation, width and bucket of rows the candidates are timed on a 4096 x 4096 weight, copies of which rotate so that none stays in the
cache; the fastest median wins. Then the number of rows is sought from which dense panels beat the fused kernels. Nothing else in this package tunes
itself, so without this command everybody runs the shipped tables.

Price: each candidate is compiled once, a second or two; `--bits` and `--op` narrow the search. Limits: one shape and group stand for all.
"""

import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compressor.errors import RecipeError
from compressor.kernels import configs, layout, workspace
from compressor.kernels.configs import Chip, Table, Tile
from compressor.pipelines import load
from compressor.pipelines.show import Show

N = K = 4096
GROUP = 128
BUCKETS = {"forward": (8, 16, 32, 64, 256), "grad_input": (16, 64, 256), "grad_scale": (2048,), "grad_table": (2048,)}
SWITCH = (128, 256, 512, 1024, 2048)  # rows at which panels are tried
Timer = Callable[[str, int, int, Tile | None], float | None]  # operation, bits, rows, tile (None: as the tables say) -> seconds; None: does not run

OPS = ("forward", "grad_input", "grad_scale", "table_forward", "table_grad_input", "grad_table")


def tune(out: Path | None, ops: list[str], bits: list[int], device: str, show: Show) -> dict[str, Any]:
    """Search and write; returns what the command prints. Raises RecipeError without a GPU or for unknown names."""
    if unknown := sorted(set(ops) - set(OPS)):
        raise RecipeError(f"there is no operation {unknown[0]}; choose among {', '.join(OPS)}")
    if unknown_bits := sorted(set(bits) - set(layout.BITS)):
        raise RecipeError(f"{unknown_bits[0]} bits are not packed; choose among {layout.BITS}")
    if not torch.cuda.is_available():
        raise RecipeError("tune-kernels times kernels on a GPU, and this machine has none that torch can use; the shipped tables stay in force")
    where = load.pick_device(device)
    if where.type != "cuda":
        raise RecipeError(f"tune-kernels times kernels on a GPU, not on {device!r}")
    torch.cuda.set_device(where)
    name, major = torch.cuda.get_device_name(where), torch.cuda.get_device_capability(where)[0]
    chip = configs.chip(name, major, torch.version.hip is not None)
    path = out or configs.cache() / f"{chip.gpu}.json"
    with tempfile.TemporaryDirectory() as folder:
        try:
            table, report = search(chip, ops, bits, _timer(chip, Path(folder)), show)
        finally:
            configs.use(None)
    if not table.tiles:
        raise RecipeError(f"no candidate ran on {name}; the shipped tables stay in force")
    configs.save(path, merged(path, table))
    configs.use(None)
    return {"gpu": name, "file": str(path), "gains": report}


def merged(path: Path, table: Table) -> Table:
    """What the file held before, overlaid with the new table."""
    if not path.is_file():
        return table
    old = configs.load(path)
    return Table(old.settings | table.settings, old.tiles | table.tiles)


def search(chip: Chip, ops: list[str], bits: list[int], time: Timer, show: Show) -> tuple[Table, list[dict[str, Any]]]:
    """The fastest tile of every bucket, and one report row each: operation, bits, rows, tile, microseconds, gain over the tables in force."""
    work = [(op, b, m) for op in ops for b in bits for m in _buckets(op)]
    tiles: dict[str, list[tuple[int | None, Tile]]] = {}
    report = []
    with show.task("tune kernels", len(work)) as advance:
        for op, b, m in work:
            before = time(op, b, m, None)
            if before is None:
                raise RecipeError(f"{op} at {b} bits does not run with the tiles in force, so timing others is pointless; run the tests of kernels")
            tried = _sensible(configs.candidates(op, chip, 2), m)
            times = {t: seconds for t in tried if (seconds := time(op, b, m, t)) is not None}
            if times:
                best = min(times, key=lambda t: times[t])
                tiles.setdefault(f"{op} 16 {b}", []).append((None if m == _buckets(op)[-1] else m, best))
                found = {"tile": list(best), "microseconds": round(times[best] * 1e6, 2), "gain": round(before / times[best], 3)}
                report.append({"op": op, "bits": b, "rows": m} | found | {"tried": len(tried), "failed": len(tried) - len(times)})
            advance(1, f"{op} {b} bits, {m} rows")
    complete = {key: tuple(rows) for key, rows in tiles.items() if rows[-1][0] is None}
    return Table(_switch(ops, bits, time), complete), report


def _buckets(op: str) -> tuple[int, ...]:
    return BUCKETS[op.removeprefix("table_")]


def _sensible(tiles: list[Tile], m: int) -> list[Tile]:
    """Tiles that are not much wider than the rows there are."""
    return [t for t in tiles if t.bm <= max(16, 2 * m)]


def _switch(ops: list[str], bits: list[int], time: Timer) -> dict[str, int]:
    """panel_from: the least number of rows, of those tried, from which panels are faster at all that follow; absent if unknown."""
    if "forward" not in ops:
        return {}
    last = None
    for m in reversed(SWITCH):
        fused, panel = time("forward fused", bits[0], m, None), time("forward panel", bits[0], m, None)
        if fused is None or panel is None or fused < panel:
            break
        last = m
    return {} if last is None else {"panel_from": last}


def _timer(chip: Chip, folder: Path) -> Timer:
    """Times calls on the GPU; a tile is forced by a file that names nothing else."""

    def time(op: str, bits: int, m: int, tile: Tile | None) -> float | None:
        op, _, way = op.partition(" ")
        settings = {"panel_from": 1 << 30 if way != "panel" else 1}
        tiles: dict[str, tuple[tuple[int | None, Tile], ...]] = {} if tile is None else {f"{op} 16 {bits}": ((None, tile),)}
        configs.save(folder / f"{chip.gpu}.json", Table(settings, tiles))
        configs.use(folder)
        try:
            return _measure(_calls(op, bits, m))
        except Exception as error:  # compilers and drivers raise what they like; a tile that does not run is no candidate
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            return None

    return time


def _calls(op: str, bits: int, m: int) -> list[Callable[[], Any]]:
    """One call for each copy of a random packed weight; the copies together exceed the cache."""
    from compressor.kernels import affine, tables

    x, dy = (torch.randn(m, width, device="cuda").bfloat16() for width in (K, N))
    base, table = op.removeprefix("table_"), "table" in op
    ops: Any = tables if table else affine
    group = K if table else GROUP
    calls: list[Callable[[], Any]] = []
    for _ in range(max(2, (128 << 20) * 8 // (N * K * bits))):
        down, across = layout.tiles(N, K)
        words = torch.randint(-(1 << 31), (1 << 31) - 1, (down, across, layout.ROWS, 8 * bits), device="cuda", dtype=torch.int32)
        values = torch.rand(N, 1, 1 << bits, device="cuda") if table else torch.rand(N, K // GROUP, device="cuda") * 0.02
        zero = None if table else torch.randint(0, 1 << bits, (N, K // GROUP), device="cuda", dtype=torch.uint8)
        packed = (words, values.bfloat16(), zero, bits, group)
        if base == "forward":
            calls.append(functools.partial(ops.forward, x, *packed, N))
        elif base == "grad_input":
            calls.append(functools.partial(ops.grad_input, dy, *packed, K))
        elif table:
            calls.append(functools.partial(ops.grad_table, x, dy, words, bits, group))
        else:
            calls.append(functools.partial(ops.grad_scale, x, dy, words, zero, bits, group))
    return calls


def _measure(calls: list[Callable[[], Any]], rounds: int = 7) -> float:
    """Median seconds of a call over replays of a CUDA graph that makes all of them: launches cost what they cost inside a captured model."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles, and makes the buffers that captured calls share
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = []
        for i in range(rounds + 1):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if i:  # the first replay warms up
                times.append(start.elapsed_time(stop) / 1e3 / len(calls))
        return statistics.median(times)
    finally:
        del graph
        workspace.forget_graphs()
