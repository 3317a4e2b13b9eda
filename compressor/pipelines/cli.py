"""The command line: flags become a Recipe, results become one JSON document as the last line of stdout; people are served on stderr.

Exit codes: 0 done, 1 failed, 2 the command or its input is at fault (one sentence), 130 interrupted.
"""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from compressor.errors import CompressorError, RecipeError, UserError
from compressor.pipelines import cli_folders, cli_tasks
from compressor.recipe import Prune, Quant, Recipe, parse_prune, parse_quant

ABOUT = "Compress language models to 2, 3 or 4 bits, tune them in that form, and write folders of exactly those weights."
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=ABOUT)
console = Console(stderr=True)
Text = str | None
Count = int | None
Number = float | None


def main() -> None:
    """Entry point: one sentence for errors, never a traceback for a user's mistake."""
    try:
        app()
    except UserError as error:
        console.print(f"error: {one_line(error)}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except CompressorError as error:
        console.print(f"failed: {one_line(error)}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:  # a folder without rights, a disk that failed: nothing that the code could know
        console.print(f"failed: {one_line(error)}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        console.print("failed: out of memory; try a smaller --batch or --seqlen, or --gradient-checkpointing", style="red", highlight=False)
        sys.exit(1)


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
    "scale_dtype": "quant__scale_dtype", "ignore": "quant__ignore", "damp": "quant__damp", "nsamples": "data__nsamples",
    "seqlen": "data__seqlen", "steps": "tune__steps", "epochs": "tune__epochs", "lr": "tune__lr", "batch": "tune__batch",
    "accumulate": "tune__accumulate", "schedule": "tune__schedule", "absolute": "tune__parametrization",
    "gradient_checkpointing": "tune__gradient_checkpointing", "train_on_prompt": "data__train_on_prompt", "window": "eval__window",
    "prune_steps": "prune__steps", "prune_lr": "prune__lr", "unit": "prune__unit", "multiple": "prune__multiple", "per_layer": "prune__uniform",
    "one_shot": "prune__one_shot", "recompute": "prune__recompute", "gradients": "prune__gradients",
    "rank": "tune__rank", "alpha": "tune__alpha", "dropout": "tune__dropout", "targets": "tune__targets", "adapter_start": "tune__start",
    "adapter": "tune__adapter", "absorb_limit": "tune__absorb_limit", "grid": "tune__grid",
    "finetune": "finetune__when", "max_tokens": "eval__max_tokens", "seed": "seed", "device": "device", "save": "save",
}  # fmt: skip


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
        words = {"absolute": "absolute" if value else "relative", "per_layer": not value, "finetune": "always" if value else "never"}
        changes[key] = words[name] if name in words else tuple(value) if name == "ignore" else value
    pruned = changes.get("prune__method", base.prune.method) != "none"
    for key in ("batch", "accumulate", "gradient_checkpointing") if pruned else ():
        if f"tune__{key}" in changes:
            changes[f"prune__{key}"] = changes[f"tune__{key}"]
    tuned = changes.get("tune__method", base.tune.method) != "none"
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
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="tiny, a folder of a decoder or encoder, a hub id, a short name such as llama-7b, or a recipe.yaml")],
    quant: Annotated[Text, typer.Option(help="bits and packer: 3bit, 2bit:rtn, sketch3, w3g64 …")] = None,
    tune: Annotated[Text, typer.Option(help="tuner: peqa (scales), table (sketches), qalora (zeros), lora, dora, adalora, ia3 …, or none")] = None,
    prune: Annotated[Text, typer.Option(help="what to remove first: loraprune:30%, obert:90%, obert:2:4 …; without --quant that is all")] = None,
    prune_steps: Annotated[Count, typer.Option(help="training steps while pruning; default: two epochs")] = None,
    prune_lr: Annotated[Number, typer.Option(help="learning rate while pruning; default: the method's own")] = None,
    unit: Annotated[Text, typer.Option(help="heads go by group (of a key head), query, or auto")] = None,
    multiple: Annotated[Count, typer.Option(help="FFN channels are kept in multiples of this; default 64, or 128 for wide ones")] = None,
    per_layer: Annotated[bool | None, typer.Option("--per-layer/--uniform", help="blocks of unlike width, which only we load")] = None,
    one_shot: Annotated[bool | None, typer.Option("--one-shot/--gradual", help="prune all at once")] = None,
    finetune: Annotated[bool | None, typer.Option("--finetune/--no-finetune", help="encoders: train the dense model on the task first")] = None,
    recompute: Annotated[Count, typer.Option(help="oBERT: inverse Fisher estimates a prune")] = None,
    gradients: Annotated[Count, typer.Option(help="oBERT: gradients an estimate")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", "--output_dir", help="output folder")] = None,
    data: Annotated[Text, typer.Option("--data", "--dataset", help="tuning text: file, hub dataset or builtin; default: Python's own manual")] = None,
    outside: Annotated[Text, typer.Option(help="text from outside the tuning domain, for measuring only")] = None,
    calib: Annotated[Text, typer.Option(help="calibration text; default: the training part of --data")] = None,
    group: Annotated[Count, typer.Option("--group", "--group-size", "--group_size", help="weights that share a scale; -1: a whole row")] = None,
    gpr: Annotated[Count, typer.Option("--gpr", help="tables (or groups) per row; tables: 1 unless given")] = None,
    start: Annotated[Text, typer.Option(help="sketches: tables start as kmeans, or uniform")] = None,
    exponent: Annotated[Number, typer.Option(help="sketches: how much k-means heeds sensitive columns; 0: not at all")] = None,
    feedback: Annotated[bool | None, typer.Option("--feedback/--no-feedback", help="sketches: later columns make up for earlier ones")] = None,
    refit: Annotated[bool | None, typer.Option("--refit/--no-refit", help="sketches: least-squares tables for the codes chosen")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="symmetric or asymmetric grids")] = None,
    scale_dtype: Annotated[Text, typer.Option("--scale-dtype", help="auto, float16, bfloat16 or float32")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="regular expression of layers to leave dense (may be repeated)")] = None,
    damp: Annotated[Number, typer.Option("--damp", "--damp-percent", "--damp_percent", help="damping of H, share of its mean diagonal")] = None,
    nsamples: Annotated[Count, typer.Option(help="calibration windows")] = None,
    seqlen: Annotated[Count, typer.Option(help="tokens of a calibration or tuning window")] = None,
    steps: Annotated[Count, typer.Option(help="tuning steps; overrides --epochs")] = None,
    epochs: Annotated[Number, typer.Option(help="passes over the tuning text")] = None,
    lr: Annotated[Number, typer.Option(help="learning rate; default: the tuner's own")] = None,
    batch: Annotated[Count, typer.Option("--batch", "--batch-size", "--batch_size", help="windows a micro-batch")] = None,
    accumulate: Annotated[Count, typer.Option(help="micro-batches a step")] = None,
    schedule: Annotated[Text, typer.Option(help="cosine, linear or constant")] = None,
    rank: Annotated[Count, typer.Option(help="adapters and qalora: rank of the path")] = None,
    alpha: Annotated[Number, typer.Option(help="adapters and qalora: the path is scaled by alpha / rank")] = None,
    dropout: Annotated[Number, typer.Option(help="adapters: of their inputs")] = None,
    targets: Annotated[Text, typer.Option(help="adapters: linears that get one, such as q_proj,v_proj; default: all packed ones")] = None,
    adapter_start: Annotated[Text, typer.Option(help="LoRA starts at zero, or from the dense weight: residual, loftq, principal, eva")] = None,
    adapter: Annotated[Text, typer.Option(help="keep it beside the packed base, or absorb it")] = None,
    absorb_limit: Annotated[Number, typer.Option(help="absorbing may raise perplexity by this share; default 0.02")] = None,
    grid: Annotated[Text, typer.Option(help="peqa: keep scales on the grid of a GGUF type, q4_k, q3_k or q2_k, so that its export is exact")] = None,
    absolute: Annotated[bool | None, typer.Option("--absolute/--relative", help="learning rate on the scale or entry, or on its change")] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option("--gradient-checkpointing/--keep-activations")] = None,
    train_on_prompt: Annotated[bool | None, typer.Option("--train-on-prompt/--mask-prompt", help="instruction data: learn prompts too")] = None,
    window: Annotated[Count, typer.Option(help="tokens of an evaluation window")] = None,
    max_tokens: Annotated[Count, typer.Option("--max-tokens", help="evaluate at most this many tokens a text; 0: all")] = None,
    seed: Annotated[Count, typer.Option(help="of data order and calibration choice")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu, cuda or cuda:N")] = None,
    save: Annotated[Text, typer.Option(help="folder, or task: only what the tuning moved, to go with the folder of the same run untuned")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the result of another run in the output folder")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print sizes, memory and time, and stop")] = False,
) -> None:
    """Prune or compress a model or both, tune it in packed form, measure it, and write a folder that servers load."""
    launch(recipe_of(model, quant, ctx.params), output, overwrite, dry_run)


def launch(recipe: Recipe, output: Path | None, overwrite: bool, dry_run: bool) -> None:
    """A run of this recipe, or what it will cost, with its result for people and as the last line."""
    quiet()
    from compressor.pipelines import render
    from compressor.pipelines import run as pipeline
    from compressor.pipelines.report import Report
    from compressor.pipelines.show import RichShow

    if dry_run:
        emit(pipeline.dry_run(recipe, output, RichShow(console)))
        return
    try:
        document = pipeline.run(recipe, output, overwrite, RichShow(console), shlex.join(["compressor", *sys.argv[1:]]))
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here", highlight=False)
        raise
    console.print(render.summary(Report.load(Path(document["output"]) / "report.json")))
    console.print(f"the folder is {document['output']} (report.html shows it all)", highlight=False, markup=False)
    emit(document)


def read_recipe(path: Path) -> Recipe:
    """A recipe from YAML."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}") from None
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        raise RecipeError(f"the recipe {path} is empty")
    return Recipe.from_dict(values)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="a packed or dense model folder, a hub id, or tiny")],
    data: Annotated[Text, typer.Option("--data", "--dataset", help="text to measure on, or an encoder's examples; default: Python's manual")] = None,
    window: Annotated[Count, typer.Option(help="tokens of a window; default: what the model was made for, at most 2048")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="stop after this many tokens; 0: the whole text")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
) -> None:
    """Perplexity of a model on a text, or an encoder's scores on its task, with the protocol; packed folders run packed."""
    quiet()
    from compressor.pipelines.show import RichShow
    from compressor.pipelines.tools import evaluate_folder

    emit(evaluate_folder(model, data, window, max_tokens, device, RichShow(console)))


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


app.command()(cli_folders.tune)
app.command()(cli_folders.export)
app.command()(cli_folders.doctor)
app.command()(cli_tasks.task)
app.command()(cli_tasks.apply)
app.command()(cli_tasks.merge_tasks)
app.command()(cli_tasks.diff)
