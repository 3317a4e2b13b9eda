"""The model card of an output folder: what it holds, how to load it, what was measured, what it cannot do.

Names and samples come from strangers, so everything is escaped, in Markdown and in YAML. The same report always gives the same bytes.
"""

import html
import os
import re
from collections.abc import Iterable
from typing import Any

import yaml

from compressor.pipelines.pages import quality_parts
from compressor.pipelines.pages.parts import clean, many, short
from compressor.pipelines.render import count, recipe_yaml, scheme
from compressor.pipelines.report import DASH, STATES, Report, fixed, heads, number, remarks, results, size, write_text

LOAD = """```sh
pip install "transformers>=5.0" {package}
```
```python
{first}from transformers import {auto}, AutoTokenizer{config_import}

folder = "FOLDER"  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder, dtype="auto"{config})
```
"""

ADAPTER = """That is the packed base. What was tuned is the adapter beside it:

```python
from peft import PeftModel  # pip install peft

model = PeftModel.from_pretrained(model, folder, subfolder="adapter")
```

"""
TUNED = """The packed base and the adapter beside it, which is what was tuned, with compressor, from its source:

```python
{code}
```

transformers alone reads the packed base, to which peft cannot attach the adapter:

"""
WHOLE = """import compressor

model = compressor.load("FOLDER").model  # with its adapter"""
WHOLE_ENCODER = """from pathlib import Path

from compressor.pipelines import checkpoint, load

folder = Path("FOLDER")
model = load.load_packed(folder, checkpoint.any_config(folder), load.pick_device("auto"), "FOLDER").model  # with its adapter"""
SERVE = """vLLM, in a version that reads compressed-tensors of this width, serves both:

```sh
vllm serve FOLDER --enable-lora --max-lora-rank {rank} --lora-modules tuned=FOLDER/adapter
```

"""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
TASKS = {  # heads of encoders -> the class that loads them, and what the Hub calls the task
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
}


def _task(report: Report) -> tuple[str, str]:
    """The transformers class and the Hub's task of the model."""
    name = str(report.model.get("architecture"))
    return next((found for head, found in TASKS.items() if name.endswith(head)), ("AutoModelForCausalLM", "text-generation"))


def write_card(report: Report, path: str | os.PathLike[str], serving: str = "") -> None:
    """README.md of the output folder; serving: who loads it (card_serving.py)."""
    write_text(path, card(report, serving))


def card(report: Report, serving: str = "") -> str:
    plan = scheme(report)
    source = str(report.model.get("source") or "")
    hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source)
    base = {"base_model": source, "base_model_relation": "quantized" if packed(report) else "finetune"} if hub else {}
    methods = [*plan["packers"], *([plan["method"]] if plan["method"] != "none" else [])]
    if not packed(report):
        methods, plan["widths"] = [], []
    tags = ["compressor", *(["quantized"] if packed(report) else []), *([] if _other_format(report) else ["compressed-tensors"])]
    tags += [*(f"{b}-bit" for b in plan["widths"]), *methods, *(["pruned", str(report.pruning.get("method"))] if report.pruning else [])]
    front = {**base, "library_name": "transformers", "pipeline_tag": _task(report)[1], "tags": [" ".join(clean(t).split()) for t in tags]}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10_000)}---\n# {_md(_title(report))}, {_what(report, plan)}\n",
        _about(report, plan),
        "## Load\n\n" + _load(report, plan),
        serving,
        _part("Results", tables(report)),
        _part("Sizes", _sizes(report, plan)),
        _part("Recipe", _fence(recipe_yaml(report), "yaml") if report.recipe else ""),
        _part("Limits", "".join(f"- {line}\n" for line in [*_limits(report, plan), *(_md(r) for r in remarks(report))])),
    ]
    return "\n".join(p for p in parts if p)


def packed(report: Report) -> bool:
    """Whether the folder holds packed weights; a report that lacks everything is taken to be of one that does."""
    return bool(report.packed or report.layers) or not report.pruning


def _what(report: Report, plan: dict[str, Any]) -> str:
    gone = number(report.pruning, "ratio")
    words = [f"{gone:.1%} pruned"] if gone is not None else []
    return ", ".join(words + ([f"{_md(plan['bits'])} bits"] if packed(report) else []))


def _part(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _md(value: Any) -> str:
    """One line of Markdown that shows `value` as it is: no markup, no links, no table cells of its own."""
    text = re.sub(r"([\\\\`*_\[\]|~$#])", r"\\\1", " ".join(clean(DASH if value is None else value).split()))
    return html.escape(text, quote=False).replace("://", "&#58;//").replace("www.", "www&#46;")


def _fence(text: str, kind: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{clean(text).rstrip()}\n{fence}\n"


def grid(names: Iterable[str], rows: list[list[str]]) -> str:
    names = list(names)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *([_md(c) for c in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if rows else ""


def _title(report: Report) -> str:
    """The name of the model; of a folder only its last part, because paths of the machine that ran say nothing to a reader."""
    return re.split(r"[/\\\\]", str(report.model.get("name") or "a model").rstrip("/\\"))[-1]


def _other_format(report: Report) -> bool:
    return "compressed-tensors" not in str(report.export.get("format", "compressed-tensors")).replace("_", "-")


def _about(report: Report, plan: dict[str, Any]) -> str:
    known = count(report)
    out = _pruned(report)
    if not packed(report):
        return out + _made(report)
    out += f"Weights of {_md(_title(report))} packed at {_md(plan['bits'])} bits ({_md(', '.join(plan['packers']))})" + (
        f"; {known}.\n" if known else ".\n"
    )
    out += _chosen(report)
    if plan["method"] != "none":
        told = "the codes stayed, and what was trained is what is stored here"
        if report.export.get("adapter_bytes"):
            told = f"the packed weights stayed, and what was trained is the folder `adapter`, {size(number(report.export, 'adapter_bytes'))}"
        elif absorbed := _absorbed(report):
            told = absorbed
        out += f"The packed model was then tuned in that form ({_md(plan['method'])}): {told}.\n"
    return out + _made(report)


def _chosen(report: Report) -> str:
    """That bits were chosen layer by layer, for what, and what came of it; nothing if they were not."""
    asked, reached = report.choice.get("target"), report.choice.get("reached")
    if not asked:
        return ""
    bits, loss = number(reached, "bits_per_weight"), number(reached, "loss")
    came = "" if bits is None else f"; reached: {fixed(bits)} bits per weight" + ("" if loss is None else f", loss {fixed(loss, 4)}")
    return f"Bits were chosen layer by layer for {_md(short(asked))}{came}.\n"


def _absorbed(report: Report) -> str:
    """What became of an adapter that was packed in, and what that cost; nothing if none was."""
    facts = report.training.get("absorb")
    if not isinstance(facts, dict) or facts.get("absorbed") is not True:
        return ""
    before, after, rise = (number(facts, key) for key in ("before", "after", "rise"))
    cost = f"perplexity {fixed(before)} with the adapter beside, {fixed(after)} absorbed" + ("" if rise is None else f" ({rise:+.1%})")
    return f"the packed weights then took it up, and it is gone: {cost}, logits change by {fixed(number(facts, 'max_logit_change'))} at most"


def _made(report: Report) -> str:
    return f"Made by compressor {_md(report.compressor)}, {_md(report.created)}. The page `report.html` beside this file shows the run in full.\n"


def _pruned(report: Report) -> str:
    """What was removed, in a sentence; nothing if nothing was."""
    gone, total, facts = number(report.pruning, "ratio"), number(report.pruning, "prunable"), report.pruning
    if gone is None or total is None:
        return ""
    words = {"blocks": "blocks", "heads": f"units of attention a block (each a {facts.get('unit', 'head')})", "ffn": "FFN channels"}
    shape = [f"{facts[key]} {word}" for key, word in words.items() if key in facts]
    if isinstance(facts.get("widths"), dict):
        shape = [f"{key} by block {', '.join(map(str, row))}" for key, row in facts["widths"].items()]
    left = f"; what is left: {', '.join(shape)}" if shape else ""
    return f"Pruned by {_md(facts.get('method'))}: {gone:.1%} of the {total:,.0f} parameters in the blocks' linears are gone{_md(left)}.\n"


def _load(report: Report, plan: dict[str, Any]) -> str:
    auto = _task(report)[0]
    own = "```sh\ncompressor eval FOLDER\ncompressor generate FOLDER\n```\n"
    if auto != "AutoModelForCausalLM":
        own = "```sh\ncompressor eval FOLDER --data labelled.tsv\n```\n"
    if report.pruning.get("widths"):
        return "Its blocks have widths that no stock configuration can say: only compressor loads this folder.\n\n" + own
    if report.export.get("format") in ("compressor table", "compressor sparse"):
        first = "import compressor  # teaches transformers this format; without it the weights would be random\n"
        text = LOAD.format(auto=auto, package="# and compressor itself, from its source", first=first, config_import="", config="")
        text += ADAPTER if report.export.get("adapter_bytes") else ""
        tables = "Servers that know no tables take an export: `compressor export FOLDER --to bf16`.\n\n" if plan["tables"] else ""
        return text + tables + "Or with compressor itself:\n\n" + own
    if report.export.get("format") == "dense safetensors":
        return LOAD.format(auto=auto, package="", first="", config_import="", config="") + "Or with compressor itself:\n\n" + own
    if _other_format(report):
        return f"The folder is in the format {_md(report.export.get('format'))}, which its software reads as it is.\n\n" + own
    asym, three = plan["asymmetric"], 3 in plan["widths"]
    config_import = ", CompressedTensorsConfig" if asym else ""
    config = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if asym else ""
    text = LOAD.format(auto=auto, package='"compressed-tensors>=0.18"', first="", config_import=config_import, config=config)
    if report.export.get("adapter_bytes"):
        causal = auto == "AutoModelForCausalLM"
        text = TUNED.format(code=WHOLE if causal else WHOLE_ENCODER) + text + "\n" + (_serve(report, plan["method"]) if causal else "")
    if three:
        text += "3-bit weights need compressed-tensors 0.18 or later: older versions pack 3 bits in another way and misread this folder.\n\n"
    if asym:
        text += "The weights are asymmetric: without `dequantize=True`, compressed-tensors 0.20 fails on the shapes of their zero points.\n\n"
    return text + "Or with compressor itself:\n\n" + own


def _serve(report: Report, kind: str) -> str:
    """How a server loads an adapter of this kind, or that it does not."""
    if kind not in ("lora", "rslora"):
        return f"Servers take adapters of the kind LoRA only, and this one is {_md(kind)}.\n\n"
    rank = next((r for r in RANKS if r >= (number(report.recipe, "tune", "rank") or 1)), None)
    return "" if rank is None else SERVE.format(rank=rank)


def tables(report: Report) -> str:
    """Results, tasks if any were measured, and the protocol: Markdown that may stand anywhere."""
    names, rows = quality_parts.task_rows(report)
    tasks = "\nShares of right answers, ± one standard error:\n\n" + grid(names, rows) if rows else ""
    return grid(heads(report), results(report)) + tasks + measured(report)


def measured(report: Report) -> str:
    """How perplexity was measured: one line a text."""
    lines = []
    for text in ("domain", "outside", "task"):
        values = report.protocol.get(text)
        if isinstance(values, dict) and values:
            lines.append(f"- {text}: " + ", ".join(f"{_md(k.replace('_', ' '))} {_md(short(v))}" for k, v in values.items()) + "\n")
    what = "Numbers" if "task" in report.protocol else "Perplexities"
    return f"\n{what} compare only under the same protocol:\n\n" + "".join(lines) if lines else ""


def _sizes(report: Report, plan: dict[str, Any]) -> str:
    last = next(([s, *row] for s in ("tuned", "packed", "pruned") for row in results(report) if row[0] == s), None)
    if not last:
        return ""
    dense = f"{size(number(report.model, 'dense_bytes'))} in {_md(report.model.get('dense_dtype'))}"
    linears = f"linears: {last[4]} bits per weight"
    if packed(report):
        linears = f"packed {linears}, with {'tables' if plan['tables'] else 'scales and zeros'}"
    return f"- {linears}\n- whole folder: {last[6]}, {last[5]} bits per parameter\n- dense model: {dense}; the folder is smaller by {last[7]}\n"


def _limits(report: Report, plan: dict[str, Any]) -> list[str]:
    out = ["The license and the terms of use of the base model apply."]
    if "task" in report.protocol:
        out.append("Only this one task was measured, on held-out examples of the data it was trained on.")
    else:
        if any(getattr(report, state).get("tasks") for state in STATES):
            out.append("Perplexity and the tasks above are the only qualities measured here; safety was not.")
        else:
            out.append("Perplexity is the only quality measured here; safety and tasks were not.")
        if plan["method"] != "none":
            out.append("Tuning fits one domain; the perplexity on the outside text shows what it cost elsewhere.")
    if report.unpacked:
        out.append(f"Left dense: {many(len(report.unpacked), 'linear')}; `report.html` gives name and reason.")
    return out
