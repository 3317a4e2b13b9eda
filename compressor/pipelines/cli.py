"""The command line: flags become a Recipe, results become one JSON document as the last line of stdout; people are served on stderr.

Exit codes: 0 done, 1 failed, 2 the command or its input is at fault (one sentence), 130 interrupted, 143 ended by SIGTERM.
"""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from safetensors import SafetensorError

from compressor import disk, presets, stopping, strict
from compressor.errors import CompressorError, RecipeError, UserError
from compressor.pipelines import cli_eval, cli_folders, cli_report, cli_sweep, cli_tasks, cli_world, yaml_text
from compressor.pipelines import cli_flags as flags
from compressor.recipe import Prune, Quant, Recipe
from compressor.specs import parse_prune, parse_quant, parse_share, parse_size

ABOUT = "Compress language models to 2, 3 or 4 bits, tune them in that form, and write folders of exactly those weights."
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=ABOUT)
console = Console(stderr=True)
Text = str | None
Count = int | None
Number = float | None
YAML_BYTES = 1 << 18  # of a recipe or a grid; far beyond what people write


def main() -> None:
    """Entry point: one sentence for errors, never a traceback for a user's mistake; SIGTERM is heard as in `stopping`."""
    with stopping.listening():
        try:
            with cli_world.one_voice():
                _serve()
        except CompressorError as error:  # of the launcher's variables
            _give_up(f"error: {one_line(error)}", 2)
        except (KeyboardInterrupt, SystemExit):  # typer makes the first the second
            if stopping.asked():
                sys.exit(stopping.CODE)
            raise


def _serve() -> None:
    try:
        cli_world.check(sys.argv[1] if len(sys.argv) > 1 else None)
        app()
    except UserError as error:
        _give_up(f"error: {one_line(error)}", 2)
    except CompressorError as error:
        _give_up(f"failed: {one_line(error)}", 1)
    except (OSError, SafetensorError) as error:
        if disk.full(error):
            _give_up(f"error: the disk is full: {one_line(error)}; free some space and give the command again", 2)
        if isinstance(error, SafetensorError):
            raise
        _give_up(f"failed: {one_line(error)}", 1)  # a folder without rights, a disk that failed: nothing that the code could know
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        _give_up("failed: out of memory; try a smaller --batch or --seqlen, or --gradient-checkpointing", 1)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of libraries in Rust, such as tokenizers
            raise
        _give_up(f"failed: {one_line(error)}", 1)


def _give_up(sentence: str, code: int) -> NoReturn:
    console.print(sentence, style="red", highlight=False, markup=False, soft_wrap=True)
    cli_world.aloud(sentence)
    sys.exit(code)


def one_line(error: BaseException) -> str:
    """What an error says, in one line; names in it may come from strangers' files, and control characters do not reach the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(error).split()))


def quiet() -> None:
    """Keep the libraries' own bars and warnings out of the display."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def emit(document: dict[str, Any]) -> None:
    """The one JSON document, as the last line of stdout."""
    print(json.dumps(document), flush=True)


FLAGS = {  # parameters of `run` -> keys of the recipe
    "tune": "tune__method", "data": "data__data", "outside": "data__outside", "calib": "data__calib", "group": "quant__group", "gpr": "quant__gpr",
    "start": "quant__start", "exponent": "quant__exponent", "feedback": "quant__feedback", "refit": "quant__refit", "sym": "quant__symmetric",
    "scale_dtype": "quant__scale_dtype", "ignore": "quant__ignore", "damp": "quant__damp", "rotate": "quant__rotate",
    "end_to_end": "quant__end_to_end", "nsamples": "data__nsamples",
    "seqlen": "data__seqlen", "steps": "tune__steps", "epochs": "tune__epochs", "lr": "tune__lr", "batch": "tune__batch",
    "accumulate": "tune__accumulate", "schedule": "tune__schedule", "absolute": "tune__parametrization",
    "gradient_checkpointing": "tune__gradient_checkpointing", "optimizer": "tune__optimizer", "offload": "tune__offload", "shard": "tune__shard",
    "train_on_prompt": "data__train_on_prompt", "window": "eval__window",
    "prune_steps": "prune__steps", "prune_lr": "prune__lr", "unit": "prune__unit", "multiple": "prune__multiple", "per_layer": "prune__uniform",
    "one_shot": "prune__one_shot", "recompute": "prune__recompute", "gradients": "prune__gradients",
    "rank": "tune__rank", "alpha": "tune__alpha", "dropout": "tune__dropout", "targets": "tune__targets", "adapter_start": "tune__start",
    "adapter": "tune__adapter", "absorb_limit": "tune__absorb_limit", "grid": "tune__grid",
    "distill": "tune__distill",
    "finetune": "finetune__when", "max_tokens": "eval__max_tokens", "seed": "seed", "device": "device", "save": "save",
    "memory": "memory", "activations": "data__activations",
    "mix": "choose__equal", "target_bits": "choose__target_bits", "target_size": "choose__target_size", "max_loss": "choose__max_loss",
    "candidates": "choose__candidates", "sensitivity": "choose__measure", "layer": "quant__layers", "tasks": "eval__tasks",
    "task_limit": "eval__task_limit",
}  # fmt: skip


def value_of(flag: str, value: Any) -> Any:
    """What a flag of `run` puts into the recipe. RecipeError for one that is not understood."""
    if flag == "layer":
        return dict(_layer(text) for text in value)
    if flag in ("candidates", "tasks"):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if flag in ("target_size", "max_loss"):
        return parse_size(value) if flag == "target_size" else parse_share(value)
    words = {"absolute": "absolute" if value else "relative", "per_layer": not value, "finetune": "always" if value else "never"}
    return words[flag] if flag in words else tuple(value) if flag == "ignore" else value


def _layer(text: str) -> tuple[str, str]:
    name, _, spec = text.rpartition("=")
    if not name:
        raise RecipeError(f"--layer {text!r} is not understood; write NAME=SPEC, for example 're:down_proj=w4g64'")
    return name, spec


def flat(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe as `Recipe.with_` takes them."""
    values = asdict(recipe)
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    inner = {f"{section}__{key}": value for section, keys in sections.items() for key, value in keys.items()}
    return {key: value for key, value in values.items() if key not in sections} | inner


def recipe_of(model: str, quant: str | None, given: dict[str, Any]) -> Recipe:
    """The recipe that the flags ask for, on top of a recipe file if `model` is one; a flag that was not given says nothing.

    What a file says of another packer or tuner than the one now asked for does not carry over: options that the new packer does not read, and the
    learning rate. RecipeError for a flag that the packer does not read.
    """
    file = model.endswith((".yaml", ".yml"))
    base = read_recipe(Path(model)) if file else Recipe(model=model)
    changes: dict[str, Any] = {} if quant is None else {f"quant__{k}": v for k, v in parse_quant(quant).items()}
    if given["prune"] is not None:
        asked = parse_prune(given["prune"])
        if asked["method"] != base.prune.method:
            base = base.with_(prune=Prune())  # what a file says of another method does not carry over
        changes |= {f"prune__{k}": v for k, v in asked.items()}
        if quant is None and not file:
            changes["quant__packer"] = "none"  # whoever asks for pruning alone gets that
    for name, key in FLAGS.items():
        value = given[name]
        if value is None or value in ([], ()):
            continue
        changes[key] = value_of(name, value)
    pruned = changes.get("prune__method", base.prune.method) != "none"
    tuned = changes.get("tune__method", base.tune.method) != "none"
    if given["preset"] is not None or not file:
        alone, usual = cli_world.count() == 1, flat(Recipe())
        changes |= presets.keys(given["preset"], {k: v for k, v in flat(base).items() if v != usual[k]} | changes, tuned, alone)
        if not alone and "quant__packer" not in changes:
            console.print("several processes: packed by gptq, as without training of blocks (--preset fast)", highlight=False)
    for key in ("batch", "accumulate", "gradient_checkpointing") if pruned else ():
        if f"tune__{key}" in changes:
            changes[f"prune__{key}"] = changes[f"tune__{key}"]
    if pruned and not tuned and (lost := next((name for name in ("steps", "epochs", "lr") if f"tune__{name}" in changes), None)):
        raise RecipeError(f"--{lost} says how to tune, and nothing is tuned; for pruning there are --prune-steps and --prune-lr")
    how = next((name for name, key in FLAGS.items() if key in changes and key.startswith("prune__")), None)
    if how and not pruned:
        raise RecipeError(f"--{how.replace('_', '-')} says how to prune, and nothing is pruned: add --prune, for example loraprune:30%")
    from compressor.pipelines.packers import PACKERS

    packer = changes.get("quant__packer", base.quant.packer)
    if packer in PACKERS:
        usual = {f"quant__{key}": value for key, value in asdict(Quant()).items()}
        idle = [key for key in usual if key.removeprefix("quant__") not in PACKERS[packer].heeds]
        if wrong := next((key for key in changes if key in idle), None):
            flag = next((name for name, key in FLAGS.items() if key == wrong), "quant")
            raise RecipeError(f"--{flag.replace('_', '-')} means nothing to packer {packer}: leave it out")
        if packer != base.quant.packer:
            changes |= {key: usual[key] for key in idle}
    now = base.with_(**changes)
    other = (now.tune.method, now.tune.parametrization) != (base.tune.method, base.tune.parametrization)
    return now.with_(tune__lr=None) if other and "tune__lr" not in changes else now


@app.command()
def run(
    ctx: typer.Context, model: flags.Model, quant: flags.Quant = None, tune: flags.Tune = None, prune: flags.Prune = None,
    prune_steps: flags.PruneSteps = None, prune_lr: flags.PruneLr = None, unit: flags.Unit = None, multiple: flags.Multiple = None,
    per_layer: flags.PerLayer = None, one_shot: flags.OneShot = None, finetune: flags.Finetune = None, recompute: flags.Recompute = None,
    gradients: flags.Gradients = None, preset: flags.Preset = None, mix: flags.Mix = None,
    target_bits: flags.TargetBits = None, target_size: flags.TargetSize = None, max_loss: flags.MaxLoss = None,
    candidates: flags.Candidates = None, sensitivity: flags.Sensitivity = None, layer: flags.Layer = None, output: flags.Output = None,
    data: flags.Data = None, outside: flags.Outside = None, tasks: flags.Tasks = None, task_limit: flags.TaskLimit = None,
    calib: flags.Calib = None, group: flags.Group = None, gpr: flags.Gpr = None, start: flags.Start = None, exponent: flags.Exponent = None,
    feedback: flags.Feedback = None, refit: flags.Refit = None, sym: flags.Sym = None, scale_dtype: flags.ScaleDtype = None,
    ignore: flags.Ignore = None, damp: flags.Damp = None, rotate: flags.Rotate = None, end_to_end: flags.EndToEnd = None,
    nsamples: flags.Nsamples = None,
    seqlen: flags.Seqlen = None, steps: flags.Steps = None, epochs: flags.Epochs = None,
    lr: flags.Lr = None, batch: flags.Batch = None, accumulate: flags.Accumulate = None,
    schedule: flags.Schedule = None, rank: flags.Rank = None, alpha: flags.Alpha = None, dropout: flags.Dropout = None,
    targets: flags.Targets = None, adapter_start: flags.AdapterStart = None, adapter: flags.Adapter = None, absorb_limit: flags.AbsorbLimit = None,
    grid: flags.Grid = None, distill: flags.Distill = None, absolute: flags.Absolute = None,
    gradient_checkpointing: flags.GradientCheckpointing = None,
    optimizer: flags.Optimizer = None, offload: flags.Offload = None, shard: flags.Shard = None,
    train_on_prompt: flags.TrainOnPrompt = None, window: flags.Window = None, max_tokens: flags.MaxTokens = None, seed: flags.Seed = None,
    device: flags.Device = None, memory: flags.Memory = None, activations: flags.Activations = None,
    save: flags.Save = None, overwrite: flags.Overwrite = False, dry_run: flags.DryRun = False,
) -> None:  # fmt: skip
    """Prune or compress a model or both, tune it in packed form, measure it, and write a folder that servers load."""
    launch(recipe_of(model, quant, ctx.params), output, overwrite, dry_run)


def launch(recipe: Recipe, output: Path | None, overwrite: bool, dry_run: bool) -> None:
    """A run of this recipe, or what it will cost, with its result for people and as the last line."""
    quiet()
    from compressor import world
    from compressor.pipelines import render
    from compressor.pipelines import run as pipeline
    from compressor.pipelines.report import Report
    from compressor.pipelines.show import RichShow, Show

    if dry_run:
        emit(pipeline.dry_run(recipe, output, RichShow(console)))
        return
    try:
        with cli_world.joined(recipe.device):
            leads, show = world.lead(), RichShow(console) if world.lead() else Show()
            document = pipeline.run(recipe, output, overwrite, show, shlex.join(["compressor", *sys.argv[1:]]))
        if not leads:
            return
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here", highlight=False)
        raise
    console.print(render.summary(Report.load(Path(document["output"]) / "report.json")))
    console.print(f"the folder is {document['output']} (report.html shows it all)", highlight=False, markup=False)
    emit(document)


def read_recipe(path: Path) -> Recipe:
    """A recipe from YAML."""
    return Recipe.from_dict(read_yaml(path, "recipe"))


def read_yaml(path: Path, what: str) -> Any:
    """What a recipe or grid file holds. RecipeError if it is missing, empty or no YAML."""
    try:
        text = strict.read_bytes(path, YAML_BYTES).decode("utf-8")
        values = yaml_text.parse(text)
    except FileNotFoundError:
        raise RecipeError(f"there is no {what} {path}") from None
    except OSError as error:
        raise RecipeError(f"the {what} {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8 is one, too
        raise RecipeError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        raise RecipeError(f"the {what} {path} is empty")
    return values


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="a packed or dense model folder, a hub id, or tiny")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="text to continue; several are decoded together")] = ["The"],  # noqa: B006
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 0.0,
    seed: Annotated[int, typer.Option()] = 42,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="on a GPU: static cache and CUDA graphs; a slow start, then faster tokens")] = False,
) -> None:
    """Continue one or more prompts; packed folders run packed."""
    quiet()
    from compressor.pipelines.tools import generate_text

    emit(generate_text(model, prompt, max_new_tokens, temperature, seed, device, compiled))


@app.command()
def inspect(model: Annotated[str, typer.Argument(help="a packed or dense model folder, a hub id, or tiny")]) -> None:
    """Sizes, bits and, for folders of ours, the error of every layer."""
    quiet()
    from compressor.pipelines.tools import inspect_folder

    document, table = inspect_folder(model)
    console.print(table)
    emit(document)


@app.command()
def tune_kernels(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file to write; default: the user's cache folder, where the kernels look")
    ] = None,
    op: Annotated[list[str], typer.Option(help="operations to tune; default: all")] = [],  # noqa: B006
    bits: Annotated[list[int], typer.Option(help="widths to tune; default: 2, 3 and 4")] = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="cuda or cuda:N")] = "cuda",
) -> None:
    """Time the kernels' tile sizes on this GPU and write the table that they read from then on."""
    quiet()
    from compressor.pipelines import tune_kernels as tuning
    from compressor.pipelines.show import RichShow

    emit(tuning.tune(out, list(op) or list(tuning.OPS), list(bits) or [4, 3, 2], device, RichShow(console)))


app.command(name="eval")(cli_eval.evaluate)
app.command()(cli_sweep.sweep)
app.command()(cli_report.report)
app.command()(cli_folders.tune)
app.command()(cli_folders.export)
app.command()(cli_folders.doctor)
app.command()(cli_folders.verify)
app.command()(cli_tasks.task)
app.command()(cli_tasks.apply)
app.command()(cli_tasks.merge_tasks)
app.command()(cli_tasks.diff)
