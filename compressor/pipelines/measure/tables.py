"""What `compressor eval` found, as tables for a terminal and for a model card: one of each text, with its protocol beneath, and one of the tasks.

Both show the same cells. A terminal is narrow: there the distances stand in a table of their own, and so do columns of which no more fit beside
each other (WIDTH); numbers are never broken, names of models fold. Where there is a reference its own row comes last, with its floor beneath it:
the two rows of differences that mean nothing.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compressor.pipelines.job import source_name
from compressor.pipelines.report import DASH, fixed, number, size

SIZES = ("bits/weight", "size", "ratio")
APART = ("Δ loss", "KL mean", "median", "p90", "p99", "max", "top-1")
WIDTH = 66  # of the number columns of a table in a terminal, which leaves a name 14 of 80
HEAD = 16  # longest line of a head
Block = tuple[str, tuple[str, ...], list[tuple[str, ...]], str]  # title, heads, rows, what stands beneath


def shown(document: dict[str, Any]) -> RenderableType:
    """The tables for a terminal."""
    parts: list[RenderableType] = []
    for title, heads, rows, beneath in blocks(document):
        widths = [max(min(len(head), HEAD), *(len(row[i]) for row in rows)) for i, head in enumerate(heads)]
        for i, columns in enumerate(_groups(heads, widths)):
            table = Table(title=None if i else Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
            table.add_column(heads[0], overflow="fold", min_width=8)
            for c in columns:
                table.add_column(Text(heads[c]), justify="right", overflow="fold", width=widths[c])
            for row in rows:
                if any(row[c] != DASH for c in columns):
                    table.add_row(Text(row[0]), *(Text(row[c]) for c in columns))
            parts += [table, Text()]
        parts += [Text(beneath + "\n")]
    return Group(*parts)


def _groups(heads: tuple[str, ...], widths: list[int]) -> list[list[int]]:
    """Places of the number columns that stand in one table of a terminal."""
    groups: list[list[int]] = [[]]
    for i in range(1, len(heads)):
        if groups[-1] and (heads[i] == APART[0] or sum(widths[c] + 1 for c in [*groups[-1], i]) > WIDTH):
            groups.append([])
        groups[-1].append(i)
    return groups


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
    return [_with_texts(model) for model in document.get("models", [document])], reference


def _with_texts(model: dict[str, Any]) -> dict[str, Any]:
    """A language model's part of the document with its list of texts; an encoder's as it is."""
    if "bits_per_weight" not in model:
        return model
    return {"texts": [model] if "tokens" in model else []} | model


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
    counted = f"{_many(text['tokens'], 'token')} predicted"
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
    bounded = any("[" in cell for row in rows for cell in row[4:])
    bounds = "; [low, high]: where none or all are right, or one was asked, 95 % (Wilson)" if bounded else ""
    told = [
        f"{short[n]}: {task.get('metric')}, {_many(task.get('examples'), 'example')}, {_many(task.get('shots'), 'shot')}"
        for n, task in models[0]["tasks"].items()
    ]
    heads = ("model", *SIZES, *short.values())
    return "tasks", heads, rows, f"{'; '.join(told)}; {models[0]['tasks'][names[0]].get('engine')}; ± standard error{bounds}."


def _encoder_block(models: list[dict[str, Any]]) -> Block:
    scores = [key for key, value in models[0].items() if isinstance(value, float) and key != "seconds"]
    rows = [(model["model"], size(number(model, "folder_bytes")), *(fixed(number(model, key)) for key in scores)) for model in models]
    return str(models[0].get("data")), ("model", "size", *scores), rows, f"sha256 of the examples {str(models[0].get('data_sha256'))[:16]}."


def _sizes(model: dict[str, Any]) -> tuple[str, ...]:
    return fixed(model["bits_per_weight"]), size(model["folder_bytes"]), fixed(model["ratio"], 2)


def _accuracy(task: dict[str, Any]) -> str:
    error, low, high = (number(task, key) for key in ("stderr", "low", "high"))
    if not error and low is not None and high is not None:
        return f"{fixed(number(task, 'value'))} [{low:.3f}, {high:.3f}]"
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
        f"{found[key]:.4f}" if found[key] >= 1e-3 else f"{found[key]:.1e}" if found[key] else "0" for key in ("mean", "median", "p90", "p99", "max")
    )
    return (change + ("" if error is None else f" ± {error:.1g}"), *kls, f"{100 * found['top1']:.2f} %")


def _many(count: Any, word: str) -> str:
    return f"{count} {word if count == 1 else word + 's'}"


def _escaped(cell: str) -> str:
    """A cell that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]|~$#<])", r"\\\1", " ".join(cell.split()))
