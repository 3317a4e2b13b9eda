"""The commands that start from a packed folder, ours or somebody else's: tune, export, doctor; `cli.py` gives them their names."""

from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.errors import RecipeError
from compressor.recipe import KEPT, Quant, Recipe

Text = str | None
Count = int | None
Number = float | None
TO = "compressed-tensors, gptq, gptq_v2, awq, mlx, gguf:TYPE (auto, q4_0, q4_k, f16 …), table, bf16, float16, float32; several by comma"


def tune(
    model: Annotated[str, typer.Argument(help="a packed folder or hub id: GPTQ, AWQ, compressed-tensors, HQQ, EfficientQAT, MLX, or one of ours")],
    method: Annotated[str, typer.Option("--tune", help="peqa (scales), table, qalora (zeros), lora, dora …")] = "peqa",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="output folder, in the format of the model")] = None,
    data: Annotated[Text, typer.Option("--data", "--dataset", help="tuning text: file, hub dataset or builtin; default: Python's own manual")] = None,
    outside: Annotated[Text, typer.Option(help="text from outside the tuning domain, for measuring only")] = None,
    seqlen: Annotated[Count, typer.Option(help="tokens of a tuning window")] = None,
    steps: Annotated[Count, typer.Option(help="tuning steps; overrides --epochs")] = None,
    epochs: Annotated[Number, typer.Option(help="passes over the tuning text")] = None,
    lr: Annotated[Number, typer.Option(help="learning rate; default: the tuner's own")] = None,
    batch: Annotated[Count, typer.Option("--batch", "--batch-size", help="windows a micro-batch")] = None,
    accumulate: Annotated[Count, typer.Option(help="micro-batches a step")] = None,
    rank: Annotated[Count, typer.Option(help="adapters and qalora: rank of the path")] = None,
    alpha: Annotated[Number, typer.Option(help="adapters and qalora: the path is scaled by alpha / rank")] = None,
    targets: Annotated[Text, typer.Option(help="adapters: linears that get one, such as q_proj,v_proj; default: all packed ones")] = None,
    grid: Annotated[Text, typer.Option(help="peqa: keep scales on the grid of a GGUF type, q4_k, q3_k or q2_k, so that its export is exact")] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option("--gradient-checkpointing/--keep-activations")] = None,
    optimizer: Annotated[Text, typer.Option(help="adamw; adamw8bit, paged-adamw or paged-adamw8bit, of bitsandbytes")] = None,
    offload: Annotated[Text, typer.Option(help="cpu: packed words wait in host memory and visit the GPU block by block; or none")] = None,
    shard: Annotated[bool | None, typer.Option("--shard/--replicate", help="torchrun: each process keeps a part of embeddings and head")] = None,
    train_on_prompt: Annotated[bool | None, typer.Option("--train-on-prompt/--mask-prompt", help="instruction data: learn prompts too")] = None,
    window: Annotated[Count, typer.Option(help="tokens of an evaluation window")] = None,
    max_tokens: Annotated[Count, typer.Option("--max-tokens", help="evaluate at most this many tokens a text; 0: all")] = None,
    seed: Annotated[Count, typer.Option(help="of data order")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu, cuda or cuda:N")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the result of another run in the output folder")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print sizes, memory and time, and stop")] = False,
) -> None:
    """Tune a model that is packed already, whoever packed it: codes stay, and the folder is written back in its own format."""
    from compressor.pipelines.cli import launch

    given = {
        "tune__method": method, "data__data": data, "data__outside": outside, "data__seqlen": seqlen, "tune__steps": steps, "tune__epochs": epochs,
        "tune__lr": lr, "tune__batch": batch, "tune__accumulate": accumulate, "tune__rank": rank, "tune__alpha": alpha, "tune__targets": targets,
        "tune__grid": grid, "tune__gradient_checkpointing": gradient_checkpointing, "tune__optimizer": optimizer,
        "tune__offload": offload, "tune__shard": shard, "data__train_on_prompt": train_on_prompt,
        "eval__window": window, "eval__max_tokens": max_tokens, "seed": seed, "device": device,
    }  # fmt: skip
    recipe = Recipe(model=model, quant=Quant(packer=KEPT)).with_(**{key: value for key, value in given.items() if value is not None})
    launch(recipe, output, overwrite, dry_run)


def export(
    model: Annotated[str, typer.Argument(help="a packed model folder")],
    to: Annotated[list[str], typer.Option("--to", help=TO)],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write, new or empty; of several formats one folder each inside it")],
    bits: Annotated[Count, typer.Option(help="wider fields for the same codes; of tables: bits of their projection")] = None,
    group: Annotated[Count, typer.Option("--group", "--group-size", help="projection: weights that share a scale; default 128; -1: a row")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="projection: symmetric (default) or asymmetric grids")] = None,
    data: Annotated[
        Text,
        typer.Option("--data", "--dataset", help="text to measure a loss on; default: the one an adapter learnt, else Python's manual"),
    ] = None,
    window: Annotated[Count, typer.Option(help="tokens of its windows; default: what the model was made for, at most 2048")] = None,
    max_tokens: Annotated[Count, typer.Option("--max-tokens", help="measure on so many tokens; default: 16384 for roundings, else all")] = None,
    max_loss: Annotated[Number, typer.Option("--max-loss", help="refuse if perplexity grows by more than this share (0.05); default: never")] = None,
    consumers: Annotated[bool, typer.Option("--check/--no-check", help="run the result through the software that is installed for it")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
) -> None:
    """Write a packed folder in the format of a server, say what is lost by it, and prove it by reading it back."""
    from compressor.pipelines.cli import console, emit, quiet

    quiet()
    from compressor.pipelines import export as exporting
    from compressor.pipelines import writers
    from compressor.pipelines.projection import Target
    from compressor.pipelines.show import RichShow

    names = [name.strip() for part in to for name in part.split(",") if name.strip()]
    if not names:
        raise RecipeError(f"--to names no format: choose among {TO}")
    if len(set(names)) != len(names):
        raise RecipeError(f"--to names {max(names, key=names.count)} twice: name each format once")
    heeded: dict[str, Any] = {
        "bits": bits, "group": group, "symmetric": sym, "data": data, "window": window, "max_tokens": max_tokens, "max_loss": max_loss,
    }  # fmt: skip
    several = len(names) > 1  # options then concern those formats that heed them
    wanted = [Target(name, device=device, consumers=consumers, **({} if several and writers.of(name) is None else heeded)) for name in names]
    places = [output if len(wanted) == 1 else output / target.to.replace(":", "-") for target in wanted]
    for target, place in zip(wanted, places, strict=True):
        target.check()
        exporting.new_place(place)
    done = list[dict[str, Any]]()
    for target, place in zip(wanted, places, strict=True):
        try:
            document, table = exporting.export(model, place, target, RichShow(console))
        except BaseException:
            written = f"; {', '.join(str(each['output']) for each in done)} stand" if done else ""
            console.print(f"nothing of {place} was kept{written}", highlight=False, markup=False)
            raise
        console.print(table)
        done.append(document)
    emit(done[0] if len(done) == 1 else {"output": str(output), "exports": done})


def verify(
    folder: Annotated[Path, typer.Argument(help="a model folder on this disk")],
    source: Annotated[Text, typer.Option(help="the model that it should have been made from: folder, hub id or tiny")] = None,
    digest: Annotated[Text, typer.Option(help="root, model or weights digest that it should have, as noted elsewhere")] = None,
) -> None:
    """Whether a folder is as it was written: weights, recipe, report and card by their digests; what changed is named, down to the tensor.

    Exit code 0: it is; 1: something is missing, new or changed; 2: it has no digests, so nothing proves it, or the command is at fault.
    """
    from compressor.pipelines.cli import console, emit
    from compressor.pipelines.show import RichShow
    from compressor.pipelines.verify import CODES
    from compressor.pipelines.verify import verify as check

    document, table = check(folder, source, digest, RichShow(console))
    console.print(table)
    emit(document)
    raise typer.Exit(CODES[document["verdict"]])


def doctor(
    folder: Annotated[str | None, typer.Argument(help="a model folder or a .gguf file; without one: this machine")] = None,
    server: Annotated[Text, typer.Option(help="vllm, llama.cpp, transformers, sglang, gptqmodel, mlx …; default: all")] = None,
) -> None:
    """Versions, device and kernels of this machine; or which servers load a folder, with what command, and why others do not."""
    from compressor.pipelines.cli import console, emit

    if folder is None:
        if server is not None:
            raise RecipeError("--server says who should load a folder: name the folder, too")
        from compressor.pipelines.tools import diagnose

        document, table = diagnose()
    else:
        from compressor.pipelines.servers import advise

        document, table = advise(folder, server)
    console.print(table)
    emit(document)
    if server is not None and document["loads"][server] == "no":
        raise typer.Exit(1)
