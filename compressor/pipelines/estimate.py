"""What a run will cost, before it starts: sizes exactly, memory and time from stated formulas and one short measurement of this machine.

Sizes follow from the shapes and the format. Memory is the sum of what each stage holds at its peak. Time counts floating-point operations
and divides by the matmul speed measured now, times EFFICIENCY (the share of it that whole stages reached on a 2-core CPU; see docs/log.md).
Evaluations in the course of tuning are not counted, predictions to learn from in teacher.py. Adapters are counted by peft itself, beside linears
of the same shapes without weights.
"""

import functools
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor import linear
from compressor.export import shards
from compressor.integrations import experts
from compressor.integrations.peft import KINDS, Adapters, named
from compressor.kernels import cpu
from compressor.pipelines import calibrate, checkpoint, compress, curvature, evaluate, load, promises
from compressor.pipelines.packers import PACKERS, needs, trains
from compressor.quant import starts
from compressor.recipe import Prune, Quant, Recipe, Tune
from compressor.rotate import learned as rotations
from compressor.rotate import merge
from compressor.sketch import kmeans, learned
from compressor.tune.loss import LOGITS
from compressor.tune.optimizers import moment_bytes

EFFICIENCY = 0.25
BASE = 380 << 20  # bytes of the interpreter and its libraries
COMPILER = 200 << 20  # bytes of numba, LLVM and the kernels they make, on a CPU
DECODE = {True: 1e-10, False: 15e-9}  # seconds a weight and token of a sample text on a CPU: with the compiled kernels, without
GRID = 1.6e-7  # seconds a weight of the clipping search on one core
KMEANS, SORT = 5e-9, 4e-7  # seconds of k-means on one core: per pair of buckets and entry of a table; per weight
SKETCHING = 60  # bytes a weight of a panel while it is sketched
IN_USE = 4  # bytes a scale or table entry as the forward pass uses it, beside what training keeps of it
TENSOR = 170  # bytes a stored tensor of an adapter costs beside its numbers: its name and place, and the name of its linear in the configuration
DENSE = {"dora": 5, "loha": 4, "lokr": 2}  # float32 matrices as large as the weight that an adapter makes while it computes
KEPT = ("loha", "lokr")  # kinds that keep one of them from forward to backward
TRAINED = 36  # bytes a weight of a block that is trained: dense, position, gradient, two moments, and what rounding keeps for the way back
PASSES = 4  # of the calibration text through every block: one for the outputs, and one a group of linears that stops at the group


@dataclass(frozen=True)
class Counts:
    """Tokens each stage reads."""

    calibration: int
    tuning: int  # per run: steps * batch * accumulate * seqlen
    step: int  # of one micro-batch
    evaluation: int  # both texts, once
    pruning: int = 0  # tokens that heal, or give gradients, while pruning
    prune_steps: int = 0


def whole_bytes(recipe: Recipe, source: Path, config: dict[str, Any], device: torch.device, seqlen: int) -> int:
    """Bytes that a run on a dense folder takes beside the process itself, in one piece: the weights, and what measuring or packing adds."""
    named = shards.read_headers(source, checkpoint.weight_files(source))
    headers = named.values()
    size = 4 if device.type == "cpu" else 2
    weights = sum(t.numel() * (size if t.is_floating_point() else t.element_size()) for t in headers)
    hidden, widest = int(config.get("hidden_size") or 0), max((int(t.shape[-1]) for t in headers if t.dim() == 2), default=0)
    logits = max(evaluate.LOGIT_BYTES, seqlen * int(config.get("vocab_size") or 0) * size)
    packing = recipe.data.nsamples * seqlen * hidden * size + 5 * 4 * widest * widest if needs(recipe.quant) else 0
    if needs(recipe.quant):
        packing += expert_sums({name.removesuffix(".weight"): int(t.shape[-1]) for name, t in named.items() if t.dim() == 2})
    if trains(recipe.quant):
        tokens, layers = recipe.data.nsamples * seqlen, max(1, int(config.get("num_hidden_layers") or 1))
        packing += tokens * hidden * size + TRAINED * weights // (size * layers) + curvature.waiting_bytes(tokens, seqlen, hidden, layers, size)
        packing += curvature.logit_bytes(seqlen, int(config.get("vocab_size") or 0), size)
    return weights + max(packing, 3 * logits)


def shell(folder: Path) -> nn.Module:
    """The model without weights (meta device): shapes only."""
    return experts.unfuse(promises.check(folder))


def estimate(recipe: Recipe, model: nn.Module, folder: torch.dtype, counts: Counts, source: Path, before: nn.Module | None = None) -> dict[str, Any]:
    """Sizes in bytes, memory in bytes and seconds by stage; `model` may be a shell, `folder` is the dtype of the output folder.

    before: the model (a shell) that `model` is made of by pruning. Sparse weights count as they are without their masks: at most so many bytes.
    """
    out = _packing(recipe, model, folder, counts, source) if recipe.quant.packer != "none" else _dense(recipe, model, folder, source)
    if before is not None:
        parameters, device = _parameters(before), load.pick_device(recipe.device)
        size, paths = (
            4 if device.type == "cpu" else 2,
            28 * recipe.prune.rank * sum(m.in_features + m.out_features for m in linear.linears(before).values()),
        )
        alive = 12 * _config(before).hidden_size + 4 * (getattr(_config(before), "intermediate_size", None) or 4 * _config(before).hidden_size)
        step = recipe.prune.batch * counts.step // max(recipe.tune.batch, 1)
        out["peak_bytes"]["prune"] = BASE + parameters * size + step * size * alive * _config(before).num_hidden_layers
        out["peak_bytes"]["prune"] += {"obert": _fishers(recipe.prune, before), "taylor": paths + parameters * size}.get(recipe.prune.method, paths)
        speed = matmul_speed(device) * EFFICIENCY
        scoring = counts.prune_steps * parameters * (4 * recipe.prune.rank + 8)
        out["seconds"]["prune"] = round((4.5 * parameters * counts.pruning + scoring) / speed, 1)
    return out


def _fishers(options: Prune, model: nn.Module) -> int:
    """Bytes of the curvature of one block, of the gradients that wait to be added to it, and of the scores and masks of all."""
    blocks = linear.find_blocks(model)[1]
    one, all_ = (sum(m.in_features * m.out_features for m in linear.linears(part).values()) for part in (blocks[0], blocks))
    return one * (4 * (options.block or 50) + 8 + 64) + 6 * all_


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def _config(model: nn.Module) -> Any:
    return model.config


def _dense(recipe: Recipe, model: nn.Module, folder: torch.dtype, source: Path) -> dict[str, Any]:
    """Of a model that is pruned and not packed."""
    beside = checkpoint.model_bytes(source) - sum(path.stat().st_size for path in checkpoint.weight_files(source))
    folder_bytes = _parameters(model) * folder.itemsize + beside
    return {
        "packed_layers": 0, "left_dense": [], "bits_per_weight": float(8 * folder.itemsize), "folder_bytes": folder_bytes,
        "ratio": checkpoint.model_bytes(source) / folder_bytes, "peak_bytes": {}, "seconds": {}, "notes": [],
    }  # fmt: skip


def _packing(recipe: Recipe, model: nn.Module, folder: torch.dtype, counts: Counts, source: Path) -> dict[str, Any]:
    """Of a model that is packed."""
    todo = compress.plan(model, recipe.quant)
    packed = todo.packed()
    weights = sum(t.shape[0] * t.shape[1] for t in packed)
    values, packed_bytes = sum(map(_values, packed)), stored_bits(recipe, packed, folder) // 8
    adapter = added(recipe.tune, packed)
    more = merge.added(model, recipe.quant.rotate)
    parameters = _parameters(model) + more
    rest = (parameters - weights) * torch.finfo(folder).bits // 8
    device = load.pick_device(recipe.device)
    beside = checkpoint.model_bytes(source) - sum(path.stat().st_size for path in checkpoint.weight_files(source))  # tokenizer, config
    folder_bytes = packed_bytes + rest + beside + adapter.bytes
    notes = list(dict.fromkeys(t.note for t in packed if t.note))
    notes += [merge.sentence(more * folder.itemsize)] if more else []
    if recipe.tune.adapter == "absorb" and adapter.bytes:
        notes.append(f"sizes are those with the adapter beside the base; if it is absorbed, the folder is {adapter.bytes:,} bytes smaller")
    trained = _kept(recipe.tune, device, adapter.numbers) or _trained(recipe.tune, packed, values, device)
    seconds = _seconds(recipe, packed, device, counts, parameters)
    if recipe.quant.rotate == "learned":
        seconds["rotate"] = round(rotations.products(_config(model).hidden_size, weights) / (matmul_speed(device) * EFFICIENCY), 1)
    return {
        "packed_layers": len(packed), "left_dense": [t.name for block in todo.targets for t in block if t.reason],
        "bits_per_weight": packed_bytes * 8 / weights, "folder_bytes": folder_bytes, "ratio": checkpoint.model_bytes(source) / folder_bytes,
        "peak_bytes": _memory(recipe, model, device, counts, parameters, weights, packed_bytes, trained + _deltas(recipe.tune, todo.targets)),
        "seconds": seconds, "notes": notes,
    }  # fmt: skip


def stored_bits(recipe: Recipe, packed: list[compress.Target], folder: torch.dtype) -> int:
    """Codes, values and zeros of packed linears."""
    value_bytes = torch.finfo(load.scale_dtype(recipe.quant.scale_dtype, folder)).bits // 8
    codes, values = sum(t.shape[0] * t.shape[1] * t.quant.bits for t in packed), sum(map(_values, packed))
    return codes + _zero_bits(recipe, packed, value_bytes) + 8 * values * value_bytes


def retuning(
    recipe: Recipe, model: nn.Module, packed: list[compress.Target], values: int, packed_bytes: int, counts: Counts, source: Path
) -> dict[str, Any]:
    """As `estimate`, of a packed model that is tuned as it is. values: scales or table entries that it will hold in `packed_bytes`."""
    recipe = recipe.with_(quant=Quant(packer="rtn"))  # packs nothing; what the stages after packing take is the same
    weights, adapter, device = sum(t.shape[0] * t.shape[1] for t in packed), added(recipe.tune, packed), load.pick_device(recipe.device)
    parameters, now = _parameters(model), checkpoint.model_bytes(source)
    trained = _kept(recipe.tune, device, adapter.numbers) or _trained(recipe.tune, packed, values, device)
    memory = _memory(recipe, model, device, counts, parameters, weights, packed_bytes, trained + _deltas(recipe.tune, [packed]))
    memory["load"] = memory.pop("compress") - parameters * (4 if device.type == "cpu" else 2) + 2 * now
    seconds = _seconds(recipe, packed, device, counts, parameters)
    seconds.pop("compress")
    return {
        "packed_layers": len(packed), "left_dense": [], "bits_per_weight": packed_bytes * 8 / weights, "peak_bytes": memory,
        "seconds": seconds, "notes": [], "ratio": 2 * parameters / now,
    }  # fmt: skip


def _values(target: compress.Target) -> int:
    """Scales or table entries of a layer."""
    n, k = target.shape
    return n * -(-k // target.group) * (1 << target.quant.bits if PACKERS[target.quant.packer].table else 1)


def _zero_bits(recipe: Recipe, packed: list[compress.Target], value_bytes: int) -> int:
    """Of all zeros: floats where they are tuned, as wide as scales of float32, else as many bits as a code; none of symmetric weights and tables."""
    tuned = set[str]()
    if recipe.tune.method == "qalora":
        tuned = {t.name for t in adapted(recipe.tune, packed)}
    floats = 32 if value_bytes == 4 else 16
    codes = {t.name: 0 if t.quant.symmetric or PACKERS[t.quant.packer].table else t.quant.bits for t in packed}
    return sum(_values(t) * (floats if t.name in tuned else codes[t.name]) for t in packed)


def adapted(options: Tune, packed: list[compress.Target]) -> list[compress.Target]:
    """The linears that `targets` names, all if it names none."""
    leaves = named(options.targets)
    return [t for t in packed if leaves is None or t.name.rpartition(".")[2] in leaves]


@dataclass(frozen=True)
class Added:
    """An adapter: the numbers that are trained, and the bytes of its folder."""

    numbers: int = 0
    bytes: int = 0


def added(options: Tune, packed: list[compress.Target]) -> Added:
    """What an adapter of the recipe's kind adds beside these linears, as peft makes it; nothing for what moves the values themselves."""
    if options.method not in KINDS:
        return Added()
    import peft

    numbers = tensors = 0
    for (n, k), count in Counter(t.shape for t in adapted(options, packed)).items():
        one = nn.ModuleDict({"layer": nn.Linear(k, n, bias=False, device="meta")})
        adapters = Adapters(KINDS[options.method], options)
        adapters.wrap(one, ["layer"])
        found = peft.get_peft_model_state_dict(adapters.model, save_embedding_layers=False).values()
        numbers, tensors = numbers + count * sum(t.numel() for t in found), tensors + count * len(found)
    return Added(numbers, 4 * numbers + TENSOR * tensors)


def _deltas(options: Tune, blocks: list[list[compress.Target]]) -> int:
    """Bytes of the dense float32 matrices of adapters that work on those: of one layer at a time, and what all keep, or one block."""
    sizes = [[4 * t.shape[0] * t.shape[1] for t in adapted(options, [t for t in block if not t.reason])] for block in blocks]
    if options.method not in DENSE or not any(sizes):
        return 0
    kept = (max if options.gradient_checkpointing else sum)(sum(block) for block in sizes)
    return DENSE[options.method] * max(size for block in sizes for size in block) + (kept if options.method in KEPT else 0)


def _kept(options: Tune, device: torch.device, numbers: int) -> int:
    """Bytes that training keeps of so many numbers on this device: value, gradient, moments and, where the device is the host, the good copy."""
    moments = moment_bytes(options.optimizer)
    return math.ceil(numbers * (8 + moments + (4 + moments if device.type == "cpu" else 0)))


def _trained(options: Tune, packed: list[compress.Target], values: int, device: torch.device) -> int:
    """Bytes of scales or table entries, or of what moves zeros, that are trained, with their gradients, moments and good copy."""
    if options.method != "qalora":
        return IN_USE * values + _kept(options, device, values)
    shapes = [(t.shape[0], -(-t.shape[1] // t.group)) for t in adapted(options, packed)]
    return _kept(options, device, sum(min(options.rank, groups) * (n + groups) for n, groups in shapes))


def _memory(
    recipe: Recipe, model: nn.Module, device: torch.device, counts: Counts, parameters: int, weights: int, packed_bytes: int, trained: int
) -> dict[str, int]:
    """Peak bytes by stage; evaluation happens within tuning too."""
    config: Any = model.config
    hidden, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    size = 4 if device.type == "cpu" else 2
    compiled = COMPILER if device.type == "cpu" and cpu.available() else 0
    dense, small = BASE + parameters * size, BASE + compiled + (parameters - weights) * size + packed_bytes
    logits = min(evaluate.LOGIT_BYTES, evaluate.BATCH_TOKENS * vocab * size)
    out = {"load": dense, "evaluate": max(dense, small) + 2 * logits + 3 * evaluate.CHUNK_BYTES, "compress": dense}
    alive = 12 * hidden + 4 * inner  # numbers a token and block, from forward to backward
    packers = [PACKERS[kind.packer] for kind in recipe.quant.kinds()]
    table = any(packer.table for packer in packers)
    if needs(recipe.quant):
        widest = max(m.in_features for m in linear.linears(model).values())
        out["compress"] += counts.calibration * hidden * size + (5 if table else 4) * widest * widest * 4 + expert_sums(inputs(model))
    if table:
        largest = max(m.in_features * m.out_features for m in linear.linears(model).values())
        buckets = 0 if device.type == "cpu" else 7 * 8 * kmeans.CELLS[device.type]
        out["compress"] += SKETCHING * min(learned.PANEL, largest) + 4 * largest + buckets
    if trains(recipe.quant):
        window = counts.calibration // recipe.data.nsamples
        out["compress"] += training_bytes(model, counts.calibration, recipe.quant.windows * window, size)
        out["compress"] += curvature.waiting_bytes(counts.calibration, window, hidden, layers, size) + curvature.logit_bytes(window, vocab, size)
    if any(packer.fisher for packer in packers):
        out["compress"] += weights * 4 + counts.calibration // recipe.data.nsamples * (alive * layers + 4 * vocab) * size
    if recipe.tune.method != "none":
        kept = hidden if recipe.tune.gradient_checkpointing else alive
        steps = counts.step * size * kept * layers + 4 * min(LOGITS, counts.step * vocab) * 4
        waiting = packed_bytes * (layers - 1) // layers if recipe.tune.offload == "cpu" else 0
        out["tune"] = small - waiting + trained + max(steps, 2 * logits + 3 * evaluate.CHUNK_BYTES)
    return out


def training_bytes(model: nn.Module, tokens: int, step: int, size: int) -> int:
    """Bytes that block-wise reconstruction adds: float32 positions of a block with gradient, moments and rounded weights, what `step` tokens leave on
    their way through it, and the dense model's hidden states of all `tokens`."""
    config, blocks = _config(model), linear.find_blocks(model)[1]
    block = max(sum(m.in_features * m.out_features for m in linear.linears(each).values()) for each in blocks)
    alive = 12 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return TRAINED * block + step * alive * size + tokens * config.hidden_size * size


def inputs(model: nn.Module) -> dict[str, int]:
    """In features of the linears of the blocks by name."""
    return {name: layer.in_features for name, layer in linear.linears(linear.find_blocks(model)[1]).items()}


def expert_sums(widths: dict[str, int]) -> int:
    """Bytes of the sums of experts that one pass gathers, of linears of so many in features by name."""
    places = Counter[str]()
    for name, width in widths.items():
        if expert := linear.expert_of(name):
            places[f"{expert[0]}.{expert[2]}"] += 4 * width**2
    return min(calibrate.SUMS, max(places.values(), default=0))


def _seconds(recipe: Recipe, packed: list[compress.Target], device: torch.device, counts: Counts, parameters: int) -> dict[str, float]:
    speed = matmul_speed(device) * EFFICIENCY
    weights = sum(t.shape[0] * t.shape[1] for t in packed)
    out = {"evaluate": (2 if recipe.tune.method == "none" else 3) * 2 * parameters * counts.evaluation / speed}
    if device.type == "cpu" and evaluate.samples_pay(device, weights):
        times = (1 if recipe.tune.method == "none" else 2) * evaluate.SAMPLES * evaluate.SAMPLE_TOKENS
        out["evaluate"] += times * weights * DECODE[cpu.available()]
    out["compress"] = packing = _packing_seconds(packed, counts, parameters, speed)
    if recipe.tune.start != "zero":
        out["compress"] += _path_seconds(recipe, adapted(recipe.tune, packed), speed)
    if recipe.tune.method != "none":
        out["tune"] = (6 * weights + 4 * (parameters - weights)) * counts.tuning / speed
    if recipe.tune.adapter == "absorb":  # about two packings, and the domain's perplexity before and after
        out["absorb"] = 2 * packing + 2 * parameters * counts.evaluation / speed
    return {key: round(value, 1) for key, value in out.items()}


def _packing_seconds(packed: list[compress.Target], counts: Counts, parameters: int, speed: float) -> float:
    weights, seconds = sum(t.shape[0] * t.shape[1] for t in packed), sum(_layer_seconds(t, speed) for t in packed)
    calibrated = [t for t in packed if PACKERS[t.quant.packer].needs]
    if calibrated:
        hessian = sum(t.shape[1] ** 2 for t in calibrated) * counts.calibration * 2
        backward = 4 * parameters * counts.calibration if any(PACKERS[t.quant.packer].fisher for t in packed) else 0
        training = sum((6 * t.quant.passes + 2) * t.shape[0] * t.shape[1] for t in packed if PACKERS[t.quant.packer].trains) * counts.calibration
        training += 8 * parameters * min(counts.calibration, curvature.SAMPLE) if training else 0
        seconds += (2 * weights * counts.calibration * PASSES + hessian + backward + training) / speed
    return seconds


def _layer_seconds(target: compress.Target, speed: float) -> float:
    """Of packing a layer whose statistics are known."""
    n, k = target.shape
    solve = 3 * k**3 + 2 * _products(target.quant) * n * k**2 if PACKERS[target.quant.packer].needs else 0
    return _start_seconds(target) + solve / speed


def _path_seconds(recipe: Recipe, targets: list[compress.Target], speed: float) -> float:
    """What paths that start beside these layers add to their packing: their eigenvectors (quant/starts.py), with loftq anew after each packing."""
    rounds = starts.ROUNDS if recipe.tune.start == "loftq" else 1
    seconds = 0.0
    for target in targets:
        n, k = target.shape
        found = 10 * n**3 if max(n, k) <= starts.EXACT else (starts.PASSES + 1) * (recipe.tune.rank + starts.EXTRA) * (4 * n * k + 2 * k**2)
        seconds += rounds * found / speed + (rounds - 1) * _layer_seconds(target, speed)
    return seconds


def _start_seconds(target: compress.Target) -> float:
    """Of the search for a layer's grids, or of the k-means of its rows."""
    (n, k), quant = target.shape, target.quant
    if not PACKERS[quant.packer].table:
        return GRID * n * k
    segments = -(-k // target.group)
    return 0.0 if quant.start == "uniform" else n * (KMEANS * segments * min(target.group, kmeans.BUCKETS) ** 2 * (1 << quant.bits) + SORT * k)


def _products(quant: Quant) -> int:
    """Products of the weight's shape with H that a packer makes, in units of one sweep."""
    if quant.packer != "sketch" or not quant.refit:
        return quant.sweeps if "sweeps" in PACKERS[quant.packer].reads else 1
    sweeps = learned.SWEEPS if quant.feedback else 1
    return sweeps * 3 + (sweeps + learned.ROUNDS) * (1 << quant.bits) + learned.ROUNDS


def forward_seconds(model: nn.Module, device: torch.device, tokens: int) -> float:
    """Of so many tokens through the dense model."""
    return 2 * _parameters(model) * tokens / (matmul_speed(device) * EFFICIENCY)


@functools.cache
def matmul_speed(device: torch.device) -> float:
    """Floating-point operations a second of a square matmul, in the dtype the device computes in."""
    size, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
