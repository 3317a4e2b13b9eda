"""The one training loop, for whatever objective, whatever parameters a tuner attached, and a pruner that may work beside it.

A step minimises the mean loss over all that its rows teach (tokens, labels), however they are spread over micro-batches. Which rows a step
sees, and the seed of its dropout, follow from (seed, step) alone, so on a CPU a run that was interrupted continues as if it had not been. On a
GPU it continues from the same state with the same data, but not to the last bit: sums there run in no fixed order.

Non-finite numbers never reach the parameters. A step is applied only when its loss and every gradient are finite, which also proves the
parameters that they were computed from; that state, parameters and Adam moments, is the *good* one. The update of the last step is proven by
its own loss, computed once more. A step that fails is dropped, the good state comes back (so an update that broke the model is undone), the
learning rate is halved for the rest of the run, and the layer is named in the log; so it is with the step before an evaluation that is not
finite. The third failure in a row raises. A checkpoint is the good state written down: that of step c is written in the course of step
c + 1, once it is proven; so is one when the process is asked to end (stopping.py), at the next step or in the evaluation that is under way.

The backward pass starts at the summed loss of a micro-batch, whose gradients are of the order of 1 a token; the float32 gradients of the
parameters are divided by the tokens of the step at the end. Gradients of the mean would vanish in float16 inside the model.

Memory beyond the model: parameter, gradient, two moments and the good copy of three of them, 28 bytes a parameter with AdamW, 12 of them on the
host where a GPU trains, 16 with moments of 8 bits (tune/optimizers.py), and what the tuner says; logits exist for unmasked tokens only, at most 2**25
at a time. Packed words may wait in host memory (tune/offload.py). Limits: windows are causal and padded on the right, if at all.

Several processes (compressor/world.py) share the rows of each step, and one all-reduce sums the loss and all gradients; state, decisions and failed
steps are then the same in all, and the result is that of one process but for the order of sums, and for the seeds of dropout.

The loop casts nothing: load the model in float32 on a CPU, in the dtype it is stored in on a GPU. Trainables are float32 everywhere.
AdamW: Loshchilov and Hutter, arXiv 1711.05101.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import world
from compressor.errors import NumericError, RecipeError
from compressor.prune import Pruner
from compressor.recipe import Tune
from compressor.stopping import Stopped, asked, held, let_through
from compressor.tune import distributed
from compressor.tune.batches import Batches, Objective, rate
from compressor.tune.offload import words_on_host
from compressor.tune.optimizers import Maker, own
from compressor.tune.shard import release, sharded
from compressor.tune.state import State, TrainLog

OnStep = Callable[[dict[str, Any]], None]  # gets the record of a step
STRIKES = 3  # non-finite steps, or evaluations, in a row that end the run


@held()
def train(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    objective: Objective,
    options: Tune,
    seed: int,
    folder: Path | None,
    fingerprint: str,
    evaluate: Callable[[], float] | None = None,
    on_step: OnStep | None = None,
    pruner: Pruner | None = None,
    optimizer: Maker | None = None,
) -> TrainLog:
    """Train `parameters` (what a tuner attached to `model`, float32) in place and return the log.

    model: a transformers model, everything but `parameters` frozen; objective: the examples and their loss (CausalLM for windows of tokens).
    folder: where to keep the checkpoint, None for none; one there with the same `fingerprint` is continued, any other is overwritten. evaluate runs
    every options.eval_every steps and at the end, in eval mode without gradients. on_step gets each step's record; that of a dropped step has loss
    None and a note, and is not in the curve. pruner: what removes parts of the model on the way (compressor.prune). optimizer: what makes
    options.optimizer, where a library has it (compressor.tune.optimizers). ModelError for parameters that cannot be trained, NumericError after
    three non-finite steps or evaluations in a row (the parameters are then the last good ones), OutputError when a checkpoint cannot be written.
    """
    batches, peak = Batches(objective, options, seed), _peak(options)
    state, log = State(parameters, options.weight_decay, pruner, optimizer or own(options.optimizer)), TrainLog(batches.steps, notes=batches.notes)
    if folder is not None:
        log = distributed.resume(folder, fingerprint, state, log)
    put_down = partial(_put_down, folder, fingerprint, state, log)
    with _training(model, options, state.device, log):
        loss = objective.loss(model)
        for step in range(log.resumed_from, batches.steps):
            torch.manual_seed(seed * 1_000_003 + step + (world.rank() << 52))
            last = step + 1 == batches.steps
            state.pruner.prune(step)
            value, fault = _gradient(model, loss, batches, step, state)
            record: dict[str, Any] = {}
            if fault is None:
                state.keep()
                stop = world.some(asked())
                if stop or step % options.checkpoint_every == 0:
                    put_down(step)
                if stop:
                    raise Stopped
                state.pruner.observe(step)
                lr = peak * rate(step, batches.steps, options, state.pruner.restarts) * state.multiplier
                norm = state.update(lr, options.clip)
                record = {"step": step + 1, "loss": value, "lr": lr, "grad_norm": norm, "tokens": batches.tokens(step)} | reduced(state)
                fault = _unproven(model, loss, batches, step, state) if last else None
            if fault is not None:
                record = _strike(state, log, step + 1, "steps", fault)
            if evaluate is not None and (last or _due(step + 1, options.eval_every)):
                record = _evaluated(model, evaluate, state, log, step + 1, last, partial(put_down, step) if fault is None else None) or record
            if record["loss"] is not None:
                log.curve.append(record)
            if on_step is not None:
                on_step(dict(record))
    if folder is not None and log.resumed_from < batches.steps:
        state.keep()
        distributed.save(folder, fingerprint, state, log, batches.steps)
    return log


def _put_down(folder: Path | None, fingerprint: str, state: State, log: TrainLog, step: int) -> None:
    """The good state, of after `step` steps, as the checkpoint, unless it is the one that the run began from."""
    if folder is not None and step > log.resumed_from:
        distributed.save(folder, fingerprint, state, log, step)


def _peak(options: Tune) -> float:
    if options.lr is None:
        raise RecipeError("the options of the training loop name no learning rate: give one, or the tuner's own with compressor.tune.resolved")
    return options.lr


def reduced(state: State) -> dict[str, int]:
    """What the processes of a run tell each other in a step: the loss and all gradients, once, in float32; nothing for one process."""
    count = 1 + sum(p.numel() for p in state.parameters.values())
    return {"reduced_bytes": 4 * count} if world.size() > 1 else {}


def _gradient(model: nn.Module, loss: Callable[..., Tensor], batches: Batches, step: int, state: State) -> tuple[float, str | None]:
    """Fill the gradients of one step, of all processes' rows; returns its mean loss and, if a number is not finite, a sentence about where."""
    total, bad = batches.tokens(step), None
    state.optimizer.zero_grad(set_to_none=False)
    summed = torch.zeros((), device=state.device)
    for rows in batches.micro(step):
        again = partial(loss, *(t.to(state.device) for t in rows))
        part = again()
        value = part.detach()
        summed += value
        if bad is None and not bool(torch.isfinite(value)):
            bad = again
            if world.size() == 1:
                break
        part.backward()
        release(model)
    grads = [p.grad for p in state.parameters.values() if p.grad is not None]
    world.add([summed, *grads])
    mean = float(summed) / total
    if not math.isfinite(mean):
        return mean, f"the loss is {float(summed)}, first seen in {_first_seen(model, bad, again)}"
    for grad in grads:
        grad /= total
    if bool(torch.isfinite(state.norm())):
        return mean, None
    names = [name for name, p in state.parameters.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    where = f"the gradient of {_layer(names[0])} ({len(names)} of {len(state.parameters)} parameters)" if names else "the norm of all gradients"
    return mean, f"non-finite numbers in {where}"


def _first_seen(model: nn.Module, bad: Callable[[], object] | None, other: Callable[[], object]) -> str:
    """Where the first process with a `bad` forward pass has its first non-finite output; processes without one run the `other` along."""
    where = first_nonfinite(model, bad or other)
    found = next(((i, text) for i, (own, text) in enumerate(world.gather([bad is not None, where])) if own), (0, where))
    return found[1] if world.size() == 1 else f"{found[1]} (process {found[0]})"


@torch.no_grad()
def _unproven(model: nn.Module, loss: Callable[..., Tensor], batches: Batches, step: int, state: State) -> str | None:
    """What is not finite after the update of `step`, a parameter or the loss of the same windows; None if nothing is."""
    for name, p in state.parameters.items():
        if not bool(torch.isfinite(p).all()):
            return f"its update left non-finite numbers in {_layer(name)}"
    value, bad = 0.0, None
    for rows in batches.micro(step):
        again = partial(loss, *(t.to(state.device) for t in rows))
        value += float(again())
        if bad is None and not math.isfinite(value):
            bad = again
            if world.size() == 1:
                break
    value = sum(world.gather(value))
    return None if math.isfinite(value) else f"after its update the loss is {value}, first seen in {_first_seen(model, bad, again)}"


def _layer(name: str) -> str:
    """The layer that a parameter or module belongs to: its dotted name without the tuner's part."""
    layer, tuner, _ = name.partition(".tuned")
    return layer if tuner else name.removesuffix(".weight")


@torch.no_grad()
def first_nonfinite(model: nn.Module, forward: Callable[[], object]) -> str:
    """Name of the module whose output is the first non-finite one while `forward` runs; modules inside come before those around them."""
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple | list) else [output]
            if not found and any(isinstance(t, Tensor) and t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in parts):
                found.append(_layer(name))

        return look

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself: every layer's output is finite"


def _strike(state: State, log: TrainLog, step: int, kind: str, fault: str) -> dict[str, Any]:
    """Undo, slow down, remember; NumericError on the third of this kind ("steps" or "evaluations") in a row."""
    state.restore(state.good)
    state.strikes[kind] += 1
    state.multiplier /= 2
    note = f"step {step} was dropped: {fault}; back to the last good state, the learning rate is now {state.multiplier:g} of its schedule"
    log.notes.append(note)
    if state.strikes[kind] >= STRIKES:
        raise NumericError(f"tuning stopped after {STRIKES} non-finite {kind} in a row, the last at step {step}: {fault}")
    return {"step": step, "loss": None, "note": note}


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _evaluated(
    model: nn.Module, evaluate: Callable[[], float], state: State, log: TrainLog, step: int, owed: bool, put_down: Callable[[], None] | None
) -> dict[str, Any] | None:
    """Evaluate; the record of the strike if that failed. An evaluation that is `owed` is repeated on the good state until it is there.

    put_down: what to call where the process is asked to end meanwhile; not after a strike, which the state before the step knows nothing of.
    """
    record = None
    while (fault := _evaluate(model, evaluate, state, log, step, put_down)) is not None:
        record = _strike(state, log, step, "evaluations", fault)
        if not owed:
            break
    return record


@torch.no_grad()
def _evaluate(
    model: nn.Module, evaluate: Callable[[], float], state: State, log: TrainLog, step: int, put_down: Callable[[], None] | None
) -> str | None:
    """Evaluate and log the value; if it is not finite, only a sentence about it."""
    model.eval()
    value, fault = math.nan, None
    try:
        with let_through() if world.size() == 1 else nullcontext():  # several end together, at the next step
            value = float(evaluate())
    except Stopped:
        if put_down is not None and not state.strikes["evaluations"]:
            put_down()
        raise
    except NumericError as error:
        fault = f"the evaluation failed ({error})"
    finally:
        model.train()
    value, fault = world.share([value, fault])
    if fault is not None or not math.isfinite(value):
        return fault or f"the evaluation gave {value}"
    state.strikes["evaluations"] = 0
    log.evals.append({"step": step, "value": value})
    return None


@contextmanager
def _training(model: nn.Module, options: Tune, device: torch.device, log: TrainLog) -> Iterator[None]:
    """Training mode, what saves memory if asked for, and a random state of its own; all as before on the way out."""
    if options.gradient_checkpointing:
        _recompute(model)
    was = model.training
    model.train()
    host = words_on_host(model, device) if options.offload == "cpu" else nullcontext()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), host, sharded(model, options.shard) as away:
            if away and not log.resumed_from:
                log.notes.append(f"each of {world.size()} processes kept its part of embeddings and head, {away:,} bytes less than all")
            yield
    finally:
        if options.gradient_checkpointing:
            _keep(model)
        model.train(was)


def _recompute(model: nn.Module) -> None:
    """Turn on the model's own gradient checkpointing; the name changed within transformers 5."""
    for name in ("activation", "gradient"):
        if enable := getattr(model, f"{name}_checkpointing_enable", None):
            return enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    raise RecipeError(f"{type(model).__name__} has no gradient checkpointing of its own: leave it off, or use a smaller batch")


def _keep(model: nn.Module) -> None:
    """Undo `_recompute`."""
    disable: Any = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
