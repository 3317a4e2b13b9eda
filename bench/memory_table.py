"""The tables of docs/scale.md, from the rows of bench/results/tune_memory.csv and scale.csv."""

NAMES = {"1.1b": "TinyLlama-1.1B", "7b": "LLaMA-7B"}


def section(rows: list[dict[str, str]]) -> str:
    """Megabytes of each arm on each shape, and how they compare with QLoRA; arms that were not run are marked."""
    lines: list[str] = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape]
        tokens = sorted({int(row["tokens"]) for row in own if row["peak_bytes"]})
        told = f", windows of {' and '.join(map(str, tokens))} tokens" if tokens else ""
        lines += [
            f"**{NAMES[shape]}**, batch of 1{told}, MB:", "",
            "| | weights | trained, gradients, moments, good copy | together, of QLoRA r16 | of QLoRA r64 | the rest | peak | of QLoRA r16 |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in own:
            cells = [row["arm"] + ("" if row["peak_bytes"] else " ¹"), megabytes(row["weights_bytes"]), megabytes(row["training_bytes"])]
            cells += [ratio(row["to_qlora_r16"]), ratio(row["to_qlora_r64"])]
            cells += [megabytes(row["rest_bytes"]), megabytes(row["peak_bytes"]), ratio(row["peak_to_qlora_r16"], least=0)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if any(not row["peak_bytes"] for row in rows):
        lines += ["¹ not run: bytes by formula.", ""]
    return "\n".join(lines).rstrip()


def runs(rows: list[dict[str, str]]) -> str:
    """Peaks, estimates and times of runs of which one block at a time is in memory, and of measuring what they left."""
    names = {"rtn-7b": "pack LLaMA-7B, 3 bits, RTN", "gptq-1.1b": "pack TinyLlama-1.1B, 3 bits, GPTQ", "eval-7b": "measure the packed LLaMA-7B"}
    lines = [
        "| | dense, GB | folder, GB | peak, GB | said before | minutes | packing, minutes | of its limit |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        sizes = [gigabytes(row[key]) for key in ("dense_bytes", "folder_bytes", "peak_bytes", "expected_bytes")]
        times = [f"{float(row[key]) / 60:.1f}" if row[key] else "–" for key in ("seconds", "packing_seconds")]
        share = f"{100 * float(row['share_of_limit']):.0f} %" if row["share_of_limit"] else "–"
        lines.append(f"| {' | '.join([names[row['arm']], *sizes, *times, share])} |")
    return "\n".join(lines)


def gigabytes(text: str) -> str:
    return f"{int(text) / 1e9:.2f}" if text else "–"


def megabytes(text: str) -> str:
    return f"{int(text) / 1e6:,.0f}" if text else "–"


def ratio(text: str, least: float = 0.75) -> str:
    """In bold where it is at most `least`, which is what we aim at."""
    if not text:
        return "–"
    return f"**{float(text):.2f}**" if float(text) <= least else f"{float(text):.2f}"
