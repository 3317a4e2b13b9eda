"""What `compressor eval` found, as tables for a terminal and for a model card: one of each text, with its protocol beneath, and one of the tasks.

Both show the same cells. Where there is a reference its own row comes last, with its floor beneath it: the two rows of differences that mean nothing.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compressor.pipelines.job import source_name
from compressor.pipelines.report import DASH, fixed, number, size

SIZES = ("bits/weight", "size", "ratio")
APART = ("Δ loss", "KL mean", "median", "p90", "p99", "max", "top-1")
Block = tuple[str, tuple[str, ...], list[tuple[str, ...]], str]  # title, heads, rows, what stands beneath


def shown(document: dict[str, Any]) -> RenderableType:
    """The tables for a terminal."""
    parts: list[RenderableType] = []
    for title, heads, rows, beneath in blocks(document):
        table = Table(title=Text(title), title_justify="left", title_style="bold")
        for i, head in enumerate(heads):
            table.add_column(Text(head), justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        parts += [table, Text(beneath + "\n")]
    return Group(*parts)


def markdown(document: dict[str, Any]) -> str:
    """The tables for a model card; of folders it shows the last part of the name."""
    parts = []
    for title, heads, rows, beneath in blocks(document, source_name):
        lines = [heads, ("---", *["---:"] * (len(heads) - 1)), *rows]
        table = "\n".join(f"| {' | '.join(cell if lines[1] is line else _escaped(cell) for cell in line)} |" for line in lines)
        parts.append(f"**{_escaped(title)}**\n\n{table}\n\n{_escaped(beneath)}\n")
    return "\n".join(parts)


def blocks(document: dict[str, Any], name: Callable[[str], str] = str) -> Iterator[Block]:
    """Title, heads, rows and what stands beneath, of one table a text and one of the tasks; of encoders the scores."""
    models, reference = _unfolded(document)
    models = [model | {"model": name(model["model"])} for model in models]
    reference = reference and reference | {"model": name(reference["model"])}
    if any("texts" not in model for model in models):
        yield _encoder_block(models)
        return
    for i in range(len(models[0]["texts"])):
        yield _text_block(models, i, reference, bool(document.get("tokens_differ")))
    if models[0].get("tasks"):
        yield _task_block(models)


def _unfolded(document: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """(models, reference) with lists of texts, from a document of whatever shape."""
    reference = document.get("reference")
    if reference is not None and "texts" not in reference:
        reference = {"model": reference["model"], "texts": [reference]}
    if "models" in document:
        return document["models"], reference
    if "texts" in document or "tokens" not in document:
        encoder = "bits_per_weight" not in document
        return [document if encoder else {"texts": []} | document], reference
    return [document | {"texts": [document]}], reference


def _text_block(models: list[dict[str, Any]], i: int, reference: dict[str, Any] | None, unlike: bool) -> Block:
    heads = ("model", *SIZES, "perplexity", *(APART if reference else ()))
    rows = [(model["model"], *_sizes(model), fixed(model["texts"][i]["perplexity"]), *_apart(model["texts"][i], reference)) for model in models]
    if reference:
        text = reference["texts"][i]
        nothing = (DASH,) * len(SIZES)
        rows.append((f"reference: {reference['model']}", *nothing, fixed(text["perplexity"]), *(DASH,) * len(APART)))
        for name in ("order", "rounding"):
            floor = text["floor"][name]
            cells = _differences(floor) if "mean" in floor else (DASH,) * len(APART)
            rows.append((f"floor: {name}", *nothing, fixed(number(floor, "perplexity")), *cells))
    told = models[0]["texts"][i]["protocol"]
    return f"{told['name']}", heads, rows, " ".join(_beneath(models, i, reference, unlike))


def _beneath(models: list[dict[str, Any]], i: int, reference: dict[str, Any] | None, unlike: bool) -> Iterator[str]:
    """The protocol and what a reader must know, in sentences."""
    text = models[0]["texts"][i]
    told = text["protocol"]
    counted = "completions alone count" if told["counted"] == "completions" else f"{text['tokens']} tokens predicted"
    yield f"Windows of {text['window']} tokens, stride {text['stride']}; {told['bos']}; {counted}; sha256 of the text {text['data_sha256'][:16]}."
    if told.get("own_data"):
        yield f"The text is a file of the user's own, {text['data']}: whether it is that of the protocol was not checked."
    if told.get("note"):
        yield f"Note: {told['note']}."
    if unlike:
        yield "The tokenizers of these models cut the text into different tokens, so their perplexities do not compare."
    if reference:
        yield "Δ loss: nats a token, ± its standard error over windows, paired; KL(reference || model): nats a token; top-1: same likeliest token."
        floors = reference["texts"][i]["floor"]
        for name in ("order", "rounding"):
            missing = floors[name].get("missing")
            yield f"Floor, {name}: the reference against itself, {floors[name]['how']}{f' ({missing})' if missing else ''}."
    if any(model["texts"][i]["cached"] for model in models):
        yield "From the cache, in part or whole: speeds are those of the first measurement."


def _task_block(models: list[dict[str, Any]]) -> Block:
    names = list(models[0]["tasks"])
    rows = [(model["model"], *_sizes(model), *(_accuracy(model["tasks"][name]) for name in names)) for model in models]
    short = {name: "/".join(Path(name).parts[-2:]) for name in names}  # of files with their folder, which tells tests apart
    told = [f"{short[n]}: {task.get('metric')}, {task.get('examples')} examples, {task.get('shots')} shots" for n, task in models[0]["tasks"].items()]
    heads = ("model", *SIZES, *short.values())
    return "tasks", heads, rows, f"{'; '.join(told)}; {models[0]['tasks'][names[0]].get('engine')}; ± standard error."


def _encoder_block(models: list[dict[str, Any]]) -> Block:
    scores = [key for key, value in models[0].items() if isinstance(value, float) and key != "seconds"]
    rows = [(model["model"], size(number(model, "folder_bytes")), *(fixed(number(model, key)) for key in scores)) for model in models]
    return str(models[0].get("data")), ("model", "size", *scores), rows, f"sha256 of the examples {str(models[0].get('data_sha256'))[:16]}."


def _sizes(model: dict[str, Any]) -> tuple[str, ...]:
    return fixed(model["bits_per_weight"]), size(model["folder_bytes"]), fixed(model["ratio"], 2)


def _accuracy(task: dict[str, Any]) -> str:
    error = number(task, "stderr")
    return fixed(number(task, "value")) + ("" if error is None else f" ± {error:.3f}")


def _apart(text: dict[str, Any], reference: dict[str, Any] | None) -> tuple[str, ...]:
    if reference is None:
        return ()
    return _differences(text["divergence"]) if "divergence" in text else (DASH,) * len(APART)


def _differences(found: dict[str, Any]) -> tuple[str, ...]:
    """The cells of APART."""
    error = found["loss_change_stderr"]
    change = f"{found['loss_change']:+.1e}" if abs(found["loss_change"]) < 1e-4 else f"{found['loss_change']:+.4f}"
    kls = (
        f"{found[key]:.4f}" if found[key] >= 1e-3 else f"{found[key]:.2e}" if found[key] else "0" for key in ("mean", "median", "p90", "p99", "max")
    )
    return (change + ("" if error is None else f" ± {error:.1g}"), *kls, f"{100 * found['top1']:.2f} %")


def _escaped(cell: str) -> str:
    """A cell that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]|~$#<])", r"\\\1", " ".join(cell.split()))
