"""Puts the numbers of bench/results into README.md, docs/sketches.md and docs/pruning.md, between the marks; with --check only says whether they
are there already.

python bench/readme.py [--check]
"""

import argparse
import csv
import sys
from pathlib import Path

import measure_tables
import memory_table
import quality_table

from compressor.pipelines import capabilities, servers

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"  # around a section, results where a file has one


def read(name: str) -> list[dict[str, str]]:
    with (ROOT / "bench" / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def peers(rows: list[dict[str, str]]) -> list[str]:
    """Domain perplexity beside GPTQModel's, mean over the calibration seeds, symmetric grids; of the library its default and its best arm."""
    out = ["| bits | RTN | ours | GPTQModel, default | GPTQModel, best of its arms |", "|---|---|---|---|---|"]
    for bits in ("4", "3", "2"):
        arms: dict[tuple[str, ...], list[float]] = {}
        for row in rows:
            if row["bits"] == bits and row["sym"] == "True":
                arms.setdefault((row["method"], row["act_order"], row["scale_search"]), []).append(float(row["domain_ppl"]))
        means = {arm: sum(values) / len(values) for arm, values in arms.items()}
        library = {arm: value for arm, value in means.items() if arm[0] == "gptqmodel"}
        ours = next(value for arm, value in means.items() if arm[0] == "ours gptq")
        rtn = next(value for arm, value in means.items() if arm[0] == "ours rtn")
        out.append(f"| {bits} | {rtn:.2f} | {ours:.2f} | {library['gptqmodel', 'group_aware', 'off']:.2f} | {min(library.values()):.2f} |")
    return out


COLUMNS = {  # arm, bits, segments
    "4 bits": ("ours affine", "4", ""), "3 bits": ("ours affine", "3", ""), "2 bits": ("ours affine", "2", ""),
    "4-bit table": ("ours table", "4", "1"), "torch int4pack, bf16": ("torch int4pack", "4", ""),
    "bitsandbytes nf4, float32": ("bitsandbytes nf4 fp32", "4", ""), "bitsandbytes nf4, bf16": ("bitsandbytes nf4", "4", ""),
    "GPTQModel 4 bits, bf16": ("gptqmodel auto", "4", ""),
}  # fmt: skip
TIMED = {"1 row": ("forward", "1"), "16 rows": ("forward", "16"), "128 rows": ("forward", "128"), "training step, 512 rows": ("step", "512")}


def speeds(rows: list[dict[str, str]], n: str, k: str) -> list[str]:
    """Packed linears on a CPU as ratios to dense float32 in the same run."""
    out = ["| | threads | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for what, (op, m) in TIMED.items():
        for threads in ("1", "2"):
            cells = []
            for arm, bits, segments in COLUMNS.values():
                same = {"op": op, "m": m, "threads": threads, "n": n, "k": k, "arm": arm, "bits": bits, "segments": segments}
                found = [float(r["ratio"]) for r in rows if all(r[name] == value for name, value in same.items())]
                cells.append(f"{min(found):.2f}" if found else "–")
            out.append(f"| {what} | {threads} | " + " | ".join(cells) + " |")
    return out


def decoding(rows: list[dict[str, str]]) -> list[str]:
    """Tokens a second of the 1.1B shape, ours beside llama.cpp's nearest type of the same width, each as tokens/s and ratio to dense."""
    one = [r for r in rows if r["model"] == "llama-1.1b-random"]
    out = ["| threads | bits | dense float32 | ours | llama.cpp | |", "|---|---|---|---|---|---|"]
    for threads in ("1", "2"):
        for bits in ("4", "3", "2"):
            arms = {r["arm"].split()[0]: r for r in one if r["threads"] == threads and r["beside"] == bits and "F16" not in r["arm"]}
            dense, ours, theirs = (arms.get(arm) for arm in ("dense", "ours", "llama.cpp"))
            if not dense or not ours:
                continue
            cells = [f"{float(r['tokens_per_s']):.1f} ({float(r['ratio']):.2f}×)" if r else "–" for r in (ours, theirs)]
            kind = theirs["arm"].split()[-1] if theirs else ""
            out.append(f"| {threads} | {bits} | {float(dense['tokens_per_s']):.1f} | {cells[0]} | {cells[1]} | {kind} |")
    return out


def sketches() -> str:
    """The section between the marks of docs/sketches.md."""
    rows, lines = read("sketch.csv"), []
    notes = {"tiny": "tiny (rows of 128 and 384)", "babyllama": "babyllama (rows of 128 and 352)", "stories260K": "stories260K (rows of 64)"}
    for model, bits in dict.fromkeys((r["model"], r["bits"]) for r in rows):
        own = [r for r in rows if (r["model"], r["bits"]) == (model, bits)]
        lines += [
            f"**{notes[model]}, {bits} bits**",
            "",
            "| | bits per weight | output error | domain | out of domain | + tuned: domain | out of domain |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in own:
            if row["tune"] != "none":
                continue
            tuned = next((r for r in own if r["tune"] != "none" and r["arm"].split(" + ")[0] == row["arm"]), None)
            error = f"{float(row['layer_error']):.4f}" if row["layer_error"] else "–"
            after = [f"{float(tuned[k]):.2f}" if tuned else "–" for k in ("domain_ppl", "outside_ppl")]
            before = [f"{float(row[k]):.2f}" for k in ("domain_ppl", "outside_ppl")]
            lines.append(f"| {row['arm']} | {float(row['bits_per_weight']):.3f} | {error} | " + " | ".join(before + after) + " |")
        released = [r for r in own if r["arm"].startswith("released")]
        if released:
            lines += ["", "| SketchTune's released setting | domain | out of domain |", "|---|---|---|"]
            lines += [f"| {r['arm'].split(', ', 1)[1]} | {float(r['domain_ppl']):.2f} | {float(r['outside_ppl']):.2f} |" for r in released]
        lines.append("")
    speed = read("pack_speed.csv")
    lines += [
        f"**Long rows**: {speed[0]['k']} columns, random weights and inputs ({speed[0]['device']}, {speed[0]['threads']} threads), statistics given:",
        "",
    ]
    lines += ["| | bits | tables a row | bits per weight | output error | seconds per 1000 rows | to GPTQ |", "|---|---|---|---|---|---|---|"]
    for r in speed:
        name = r["packer"] if r["gpr"] else f"{r['packer']}, groups of 128"
        cells = [name, r["bits"], r["gpr"] or "–", f"{float(r['bits_per_weight']):.3f}", f"{float(r['layer_error']):.4f}"]
        lines.append(f"| {' | '.join(cells)} | {r['seconds_per_1000_rows']} | {r['to_gptq']} |")
    return "\n".join(lines)


def mean(rows: list[dict[str, str]], key: str) -> float:
    return sum(float(r[key]) for r in rows) / len(rows)


def decoders() -> list[str]:
    """LoRAPrune beside its baselines, by model and ratio, mean over the seeds; then pruned at 3 bits beside dense at 2."""
    rows, lines = read("prune.csv"), []
    single = [r for r in rows if r["method"] in ("obert", "magnitude") and not r["steps"] and not r["quant"]]
    plain = [r for r in rows if not r["quant"] and r not in single]
    for model in dict.fromkeys(r["model"] for r in plain):
        own = [r for r in plain if r["model"] == model]
        ratios = list(dict.fromkeys(r["asked"] for r in own))
        heads = [f"{float(ratio):.0%} asked, {float(next(r['ratio'] for r in own if r['asked'] == ratio)):.1%} gone" for ratio in ratios]
        steps, seeds = own[0]["steps"], len({r["seed"] for r in own})
        lines += [
            f"**{model}**, {steps} steps of 8 windows of {own[0]['window']} tokens for every arm, seeds: {seeds}; in domain / outside",
            "",
        ]
        lines += ["| | " + " | ".join(f"{head}: gradual | one shot" for head in heads) + " |", "|---|" + "---|---|" * len(ratios)]
        for name in dict.fromkeys(r["arm"].rsplit(", ", 1)[0] for r in own):
            cells = []
            for ratio in ratios:
                for way in ("gradual", "one shot"):
                    found = [r for r in own if r["asked"] == ratio and r["arm"] == f"{name}, {way}"]
                    cells.append(f"{mean(found, 'domain_ppl'):.2f} / {mean(found, 'outside_ppl'):.1f}" if found else "–")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| single weights, at once, not trained | gone | oBERT: in domain / outside | magnitude |", "|---|---|---|---|"]
    for model, pattern, asked in dict.fromkeys((r["model"], r["arm"].split(", ")[1], r["asked"]) for r in single):
        own = {r["method"]: r for r in single if (r["model"], r["arm"].split(", ")[1], r["asked"]) == (model, pattern, asked)}
        cells = (
            [f"{float(r['domain_ppl']):.1f} / {float(r['outside_ppl']):.1f}" for r in (own["obert"], own["magnitude"])]
            if len(own) == 2
            else ["–", "–"]
        )
        lines.append(f"| {model}, {pattern} | {float(asked):.0%} | {' | '.join(cells)} |")
    lines.append("")
    lines += ["| at equal bytes | gone | bytes of the blocks' linears | in domain | outside |", "|---|---|---|---|---|"]
    for r in rows:
        if r["quant"]:
            gone = f"{float(r['ratio']):.1%}" if float(r["ratio"] or 0) else "–"
            lines.append(
                f"| {r['model']}: {r['arm']} | {gone} | {int(r['block_bytes']):,} | {float(r['domain_ppl']):.2f} | {float(r['outside_ppl']):.1f} |"
            )
    return lines


def encoders() -> list[str]:
    """oBERT beside magnitude on a real encoder; then recomputation."""
    rows = {r["arm"]: r for r in read("encoder.csv")}
    dense = float(rows["dense"]["accuracy"])

    def cell(arm: str) -> str:
        return f"{100 * float(rows[arm]['accuracy']):.1f}" if arm in rows and rows[arm]["accuracy"] else "–"

    shapes = [f"{ratio} unstructured" for ratio in ("50%", "80%", "90%", "97%")] + ["80% 4block", "50% structured"]
    lines = [f"MiniLM-L6 on SST-2, accuracy in % on {rows['dense']['test_examples']} held-out phrases; dense {100 * dense:.1f}:", ""]
    lines += ["| | " + " | ".join(shapes) + " |", "|---|" + "---|" * len(shapes)]
    for mode in ("one-shot", "gradual"):
        for score in ("obert", "magnitude"):
            lines.append(f"| {mode}, {score} | " + " | ".join(cell(f"{mode} {score} {shape}") for shape in shapes) + " |")
    lines += ["", "| one shot, oBERT, estimates a prune | 1 | 4 | 16 |", "|---|---|---|---|"]
    for ratio in ("80%", "90%"):
        cells = [cell(f"one-shot obert {ratio} unstructured"), *(cell(f"recompute {rounds} {ratio}") for rounds in (4, 16))]
        lines.append(f"| {ratio} | {' | '.join(cells)} |")
    return lines


def pruning() -> str:
    """The section between the marks of docs/pruning.md."""
    memory = ["| one step | peak memory | of the full gradient's |", "|---|---|---|"]
    memory += [f"| {r['arm']} | {int(r['peak_bytes']) / 1e6:.0f} MB | {float(r['ratio']):.2f} |" for r in read("prune_memory.csv")]
    first = read("prune_memory.csv")[0]
    size = f"{int(first['parameters']) / 1e6:.0f} million parameters, float32, rank {first['rank']}"
    about = f"A random LLaMA of {size}, {first['batch']} window of {first['seqlen']} tokens:"
    return "\n".join([*decoders(), "", about, "", *memory, "", *encoders()])


def trained() -> list[str]:
    """What trains on a packed base, by model and bits, beside the dense model and NF4."""
    rows, lines = read("lora.csv"), []
    heads = "base untuned | tuned | learning rate | trained numbers | bits per weight of the base | memory above start, MB | steps a second, one core"
    for model in dict.fromkeys(r["model"] for r in rows):
        own = [r for r in rows if r["model"] == model]
        steps, window = next((r["steps"], r["window"]) for r in own if r["steps"] != "0")
        lines += [f"**{model}**, {steps} steps of 8 windows of {window} tokens for every arm; perplexity in domain / outside", ""]
        lines += [f"| | {heads} |", "|---|---|---|---|---|---|---|---|"]
        for bits in sorted({r["bits"] for r in own}, key=lambda b: (b != "16", b)):
            bare = {r["base"]: r for r in own if r["bits"] == bits and r["tune"] == "none"}
            for r in own:
                if r["bits"] != bits or r["tune"] == "none":
                    continue
                same = r["base"] in bare and bare[r["base"]]["domain_ppl"] == r["untuned_ppl"]
                before = both(bare[r["base"]]) if same else f"{float(r['untuned_ppl']):.2f}"
                cells = [r["arm"] if bits == "16" else f"{bits} bits, {r['arm']}", before, both(r), f"{float(r['lr']):g}", f"{int(r['trainable']):,}"]
                cells += [f"{float(r['bits_per_weight']):.2f}", f"{float(r['growth_mb']):.0f}", r["steps_per_second"]]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def both(row: dict[str, str]) -> str:
    return f"{float(row['domain_ppl']):.2f} / {float(row['outside_ppl']):.1f}"


def absorbed() -> list[str]:
    lines = [
        "| | packed | with what was trained | absorbed | change | largest change of a logit, of the largest logit |",
        "|---|---|---|---|---|---|",
    ]
    for r in read("absorb.csv"):
        name = f"{r['model']}, {r['bits']} bits, {'LoRA' if r['tune'] == 'lora' else 'QA-LoRA'} of rank {r['rank']}"
        before, after = (f"{float(r[k]):.2f} / {float(r['outside_' + k]):.1f}" for k in ("before", "after"))
        change = f"{100 * float(r['rise']):+.1f} %" if float(r["rise"]) else "none, bit for bit"
        lines.append(f"| {name} | {float(r['untuned']):.2f} | {before} | {after} | {change} | {r['logit_change']}, {100 * float(r['share']):.1f} % |")
    exact = [r for r in read("absorb.csv") if r["path_error"]]
    worst, rounding = (max(float(r[key]) for r in exact) for key in ("path_error", "rounding"))
    return [
        *lines,
        "",
        f"QA-LoRA against the paper's two passes in float64, largest difference over the largest output of a linear: {worst:.1e} with the zeros",
        f"that are stored, {rounding:.1e} with `A` and `B` before their zeros are rounded to float16.",
    ]


def adapters() -> str:
    """The section between the marks of docs/adapters.md."""
    return "\n".join([*trained(), *absorbed()])


def merges() -> str:
    """The section between the marks of docs/tasks.md."""
    rows, lines = read("tasks.csv"), []
    for tune in dict.fromkeys(r["tune"] for r in rows):
        own = [r for r in rows if r["tune"] == tune]
        first, swapped = own[0], [r for r in own if r["exact"]]
        same = "equal, bit for bit," if all(r["exact"] == "True" for r in swapped) else "DIFFER from"
        lines += [
            f"**{tune}** on `{first['model']}` at {first['bits']} bits, {first['steps']} steps on each text. Later swaps take",
            f"{max(float(r['swap_ms']) for r in swapped):.1f} ms; logits then {same} those of the folders that were tuned.", "",
            f"| values | {first['text_a']} | {first['text_b']} | geometric mean | against the better single task |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for r in own:
            change = 100 * (1 / (1 + float(r["gain"])) - 1)
            lines.append(f"| {r['values']} | {float(r['ppl_a']):.2f} | {float(r['ppl_b']):.1f} | {float(r['mean']):.2f} | {change:+.1f} % |")
        lines.append("")
    return "\n".join(lines).rstrip()


def exports() -> str:
    """The section between the marks of docs/exports.md."""
    lines = [capabilities.section()]
    if rows := read("kgrid.csv"):
        lines += [
            "Scales tuned on the grid of a K type, beside scales tuned freely: a LLaMA of 2.2 million parameters, 256 wide (no real model here",
            f"has such rows), groups of 128, {rows[0]['steps']} steps, perplexity of Python's manual (dense {float(rows[0]['dense']):.2f}):", "",
            "| | packed | tuned | exported | cost of the export |", "|---|---|---|---|---|",
        ]  # fmt: skip
    for r in rows:
        how = "free" if r["grid"] == "none" else "on the grid"
        cost = "none, bit for bit" if r["exact"] == "True" else f"{100 * float(r['growth_of_export']):+.2f} %"
        gone = float(r["tuned"]) * (1 + float(r["growth_of_export"]))
        lines.append(f"| {r['bits']} bits, {how}, as {r['type']} | {float(r['packed']):.2f} | {float(r['tuned']):.2f} | {gone:.2f} | {cost} |")
    return "\n".join([*lines, "", *started_from_foreign(), ""])


def started_from_foreign() -> list[str]:
    """Checkpoints of others before and after `compressor tune`, by library and width."""
    rows = [r for r in read("foreign.csv") if r["after"] and r["theirs_after"]]
    heads = ("library", "model", "checkpoint", "in their library", "tuned", "tuned, in their library", "difference", "codes moved")
    lines = [
        f"Checkpoints made by other libraries, tuned for {rows[0]['steps']} steps by `compressor tune --tune peqa` and read by that library again;",
        f"perplexity on {rows[0]['tokens']} held-out tokens, and the largest relative difference between library and `compressor eval`:",
        "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|",
    ]  # fmt: skip
    for r in rows:
        grid = ("" if r["library"] == "hqq" else ", symmetric" if r["symmetric"] == "True" else ", asymmetric") + (
            ", act-order" if r["act_order"] == "True" else ""
        )
        worst = max(abs(float(r["difference"])), abs(float(r["difference_after"])))
        numbers = " | ".join(f"{float(r[key]):.3f}" for key in ("theirs", "ours_after", "theirs_after"))
        lines.append(
            f"| {r['library']} {r['version']} | {r['model']} | {r['format']}, {r['bits']} bits{grid} | {numbers} | {worst:.1e} | {r['moved']} |"
        )
    return lines


def through_vllm() -> str:
    """The section between the marks of docs/vllm.md: what was computed, of folders that a consumer took, and the texts that a server wrote."""
    rows = [r for r in read("interop.csv") if r["step"] == "vllm"]
    took = [r for r in rows if r["max_abs_error"]]
    lines = ["| consumer, its dtype | folder | models | largest error | of the deviation of logits | same tokens |", "|---|---|---|---|---|---|"]
    for consumer, kind, bits, symmetric in dict.fromkeys((r["consumer"], r["format"], r["bits"], r["symmetric"]) for r in took):
        own = [r for r in took if (r["consumer"], r["format"], r["bits"], r["symmetric"]) == (consumer, kind, bits, symmetric)]
        grid = {"True": ", symmetric", "False": ", asymmetric"}.get(symmetric, "")
        share = max(float(r["max_abs_error"]) / float(r["logit_std"]) for r in own)
        same = f"{sum(r['greedy_equal'] == 'True' for r in own)} of {len(own)}"
        names, dtype = ", ".join(dict.fromkeys(r["model"] for r in own)), own[0]["note"].split(", ")[1]
        error = max(float(r["max_abs_error"]) for r in own)
        lines.append(f"| {consumer}, {dtype} | {kind}, {bits} bits{grid} | {names} | {error:.1e} | {share:.1e} | {same} |")
    refused: dict[str, list[str]] = {}
    for r in rows:
        if r["verdict"] == "refused, as expected":
            grid = {"True": " symmetric", "False": " asymmetric"}.get(r["symmetric"], "")
            narrow = " of babyllama" if r["model"] == "babyllama" else ""
            refused.setdefault(r["consumer"], []).append(f"{r['format']} {r['bits']} bits{grid}{narrow}")
    said = [f"{consumer} refused {'; '.join(dict.fromkeys(found))}." for consumer, found in refused.items()]
    return "\n".join([*lines, "", *(line for each in said for line in (each, ""))]).rstrip()


def text() -> str:
    """The section between the marks of README.md."""
    kernels, served = read("cpu_kernels.csv"), [r for r in read("interop.csv") if r["step"] == "compressed-tensors" and r["max_abs_error"]]
    worst = {kind: max(float(r["max_abs_error"]) for r in served if r["symmetric"] == str(kind)) for kind in (True, False)}
    count = f"{len(served)} folders of {len({r['model'] for r in served})} models"
    versions = f"{served[0]['note']} with compressed-tensors {served[0]['version']}"
    lines = [
        *quality_table.section(read("quality.csv")),
        "Our GPTQ beside GPTQModel 7.4.0 on `tiny`, groups of 128, same calibration windows, mean of three draws, perplexity in domain:", "",
        *peers(read("gptqmodel_peer.csv")), "",
        f"Largest difference of logits between our packed forward and {versions}, float32, 2 to 4 bits, {count}:",
        f"{worst[True]:.1e} for symmetric folders (equal weights, sums in another order), {worst[False]:.1e} for asymmetric ones, whose",
        "weights transformers forms in the dtype of the scale.", "",
        f"Speed on a CPU ({kernels[0]['cpu']}): a linear of 4096 × 4096, times faster than dense float32 `F.linear` in the same run.",
        "We compute in float32, and our training step trains the values, which no other column's does; this CPU multiplies bf16 in hardware.", "",
        *speeds(kernels, "4096", "4096"), "",
        "Tokens a second of a LLaMA of TinyLlama-1.1B's shape with random weights, one sequence. Our output head stays float32,",
        "llama.cpp quantises it:", "",
        *decoding(read("cpu_decode.csv")), "",
        "More models, widths and the scripts that made these numbers: [bench/](bench), [docs/log.md](docs/log.md).",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--check", action="store_true")
    check = ap.parse_args().check
    sections = {
        "README.md": text, "docs/sketches.md": sketches, "docs/pruning.md": pruning, "docs/adapters.md": adapters, "docs/tasks.md": merges,
        "docs/exports.md": exports, "docs/serving.md": servers.section, "docs/vllm.md": through_vllm,
        "docs/choosing.md": lambda: measure_tables.choosing(read("choose.csv")), "docs/sweeps.md": lambda: measure_tables.sweeping(read("sweep.csv")),
        "docs/evaluation.md": lambda: measure_tables.harness(read("harness.csv")), "docs/moe.md": lambda: measure_tables.mixtures(read("moe.csv")),
        "docs/scale.md": lambda: memory_table.section(read("tune_memory.csv")),
        "docs/scale.md runs": lambda: memory_table.runs(read("scale.csv")),
    }  # fmt: skip
    for name, make in sections.items():
        path, section = ROOT / name.partition(" ")[0], make()
        begin, end = (mark.format(name.partition(" ")[2] or "results") for mark in (BEGIN, END))
        old = path.read_text("utf-8")
        new = old[: old.index(begin)] + f"{begin}\n{section}\n" + old[old.index(end) :]
        if check and new != old:
            sys.exit(f"{path.relative_to(ROOT)} differs from bench/results; run python bench/readme.py")
        if not check:
            path.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
