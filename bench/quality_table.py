"""The headline tables as README shows them, from the rows of bench/results/quality.csv; bench/readme.py puts them in place.

No row is left out, failed ones stand with their reason; of the dense control tuned at several rates only the best is shown. Bold, and named in the
lists below the tables, is the least perplexity in domain among rows that are equally large: at most a tenth more bits per weight than our GPTQ of the
same width. Pruned rows are smaller, and trained while they are pruned: they compare with none.
"""

EQUAL = 1.1  # bits per weight over those of our GPTQ, up to which rows are taken for equally large
PROTOCOL = ("domain_sha256", "domain_tokens", "outside_sha256", "outside_tokens", "window")  # what rows of one model must have in common
SHOWN = ("", "bits per weight", "perplexity in domain", "out of domain", "accuracy, %", "packing, s", "tuning, s", "peak MB")


def rival(row: dict[str, str]) -> bool:
    """Whether an arm is the work of others, by their library or by our code."""
    return bool(row["library"]) or row["arm"].startswith("EfficientQAT")


def stages(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """The rows of a width that are equally large, untuned and tuned, each by perplexity in domain."""
    limit = EQUAL * min((float(r["bits_per_weight"]) for r in rows if r["arm"] == "GPTQ" and r["bits_per_weight"]), default=0.0)
    fair = [r for r in rows if r["domain_ppl"] and r["bits"] != "16" and float(r["bits_per_weight"]) <= limit and "pruned" not in r["arm"]]
    parts = [[r for r in fair if bool(r["tune_seconds"]) == tunes] for tunes in (False, True)]
    return [sorted(part, key=lambda r: float(r["domain_ppl"])) for part in parts if part]


def table(rows: list[dict[str, str]]) -> list[str]:
    """The table of one model, by width; of the dense model tuned at several rates only the best."""
    full = [r for r in rows if r["arm"].startswith("dense tuned") and r["domain_ppl"]]
    best = min(full, key=lambda r: float(r["domain_ppl"])) if full else None
    out = [f"| {' | '.join(SHOWN)} |", "|---" * len(SHOWN) + "|"]
    for bits in dict.fromkeys(r["bits"] for r in rows):
        own = [r for r in rows if r["bits"] == bits and (not r["arm"].startswith("dense tuned") or r is best)]
        if bits != "16":
            out.append(f"| **{bits} bits** |" + " |" * (len(SHOWN) - 1))
        first = [id(part[0]) for part in stages(own)]
        out += [line_of(r, id(r) in first) for r in sorted(own, key=lambda r: bool(r["tune_seconds"]))]
    return out


def number(perplexity: str) -> str:
    value = float(perplexity)
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def line_of(row: dict[str, str], bold: bool) -> str:
    library, comma, rest = row["arm"].partition(", ")
    name = "dense tuned (control)" if library == "dense tuned" else f"{library} {row['version']}".strip() + comma + rest
    if row["failed"]:
        return f"| {name} | failed: {row['failed'].splitlines()[0].replace('|', ' ')[:120]} |" + " |" * (len(SHOWN) - 2)
    ppl, outside = (number(row[key]) for key in ("domain_ppl", "outside_ppl"))
    correct = f"{100 * float(row['accuracy']):.1f} ± {100 * float(row['accuracy_stderr']):.1f}" if row["accuracy"] else "–"
    took = [f"{float(row[key]):.0f}" if row[key] else "–" for key in ("pack_seconds", "tune_seconds", "peak_mb")]
    cells = [name, f"{float(row['bits_per_weight']):.2f}", f"**{ppl}**" if bold else ppl, outside, correct, *took]
    return f"| {' | '.join(cells)} |"


def contest(rows: list[dict[str, str]]) -> list[str]:
    """At every width, untuned and tuned, ours beside the best of the others among equally large rows, in the domain and outside it."""
    out = []
    for bits in dict.fromkeys(r["bits"] for r in rows if r["bits"] != "16"):
        for part in stages([r for r in rows if r["bits"] == bits]):
            found = [said for key, where in (("domain_ppl", "in domain"), ("outside_ppl", "outside")) if (said := duel(part, key, where))]
            if found:
                out.append(f"- {bits} bits, {'tuned' if part[0]['tune_seconds'] else 'untuned'}: {'; '.join(found)}.")
    return out


EVEN = 5e-4  # share below which two perplexities are called even


def duel(rows: list[dict[str, str]], key: str, where: str) -> str:
    """The best of ours and of the others by one perplexity, in words; nothing where one of them is missing."""
    ours, theirs = (min((r for r in rows if rival(r) is which), key=lambda r: float(r[key]), default=None) for which in (False, True))
    if ours is None or theirs is None:
        return ""
    change = float(theirs[key]) / float(ours[key]) - 1
    if abs(change) < EVEN:
        return f"{where} {ours['arm']} {number(ours[key])}, {theirs['arm']} {number(theirs[key])}: even"
    verdict = f"**{theirs['arm']} is {-100 * change:.1f} % better**" if change < 0 else f"ours is {100 * change / (1 + change):.1f} % better"
    return f"{where} {ours['arm']} {number(ours[key])}, {theirs['arm']} {number(theirs[key])}: {verdict}"


PRESETS = {"fast": "GPTQ", "standard": "block-wise", "best": "preset best"}


def presets(rows: list[dict[str, str]]) -> list[str]:
    """What each preset makes of both models: perplexity in domain and outside, seconds of packing, peak memory; and tuned."""
    out = ["| preset | model | 4 bits | 3 bits | 2 bits | 2 bits, tuned | packing, s (times GPTQ's) | peak MB |", "|---" * 8 + "|"]
    known = {(r["model"], r["arm"], r["bits"]): r for r in rows if not r["failed"]}
    for model in ("tiny", "babyllama"):
        for preset, arm in PRESETS.items():
            own = [known.get((model, arm, bits)) for bits in ("4", "3", "2")] + [known.get((model, f"{arm} + PEQA", "2"))]
            cells = [f"{number(r['domain_ppl'])} / {number(r['outside_ppl'])}" if r else "–" for r in own]
            there = [r for r in own[:3] if r]
            if not there:
                continue
            took, usual = (sum(float(r["pack_seconds"]) for r in each) for each in (there, [known[model, "GPTQ", r["bits"]] for r in there]))
            peak = max(float(r["peak_mb"]) for r in there)
            out.append(f"| {preset} | {model} | {' | '.join(cells)} | {took / len(there):.0f} ({took / usual:.1f}) | {peak:.0f} |")
    return out


TEXT = """What it costs, and what tuning gives back. `tiny` in groups of 128, measured on the held-out part of Python's language reference (windows of
{window} tokens that do not overlap, {domain_tokens} tokens); out of domain, standard-library source ({outside_tokens} tokens). Every packer
that calibrates sees the same {nsamples} windows, every tuner the same batches for {steps} steps, at its method's default rate. Bits per
weight count all that is stored of the linears, adapters too. Accuracy: {questions} multiple-choice continuations of the held-out text
through lm-evaluation-harness, chance 25 %. Seconds are those of one thread's processor time, peak memory that of the process with its
libraries. Settings of each row: [quality.csv](bench/results/quality.csv). **Bold**: the least perplexity among rows of equal bytes (up to a
tenth more than our GPTQ), untuned and tuned."""


def folded(title: str, lines: list[str]) -> list[str]:
    """A table that opens on a click, where Markdown is shown as a page."""
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>", ""]


def section(rows: list[dict[str, str]]) -> list[str]:
    """What README says of the models."""
    tiny, baby, stories = ([r for r in rows if r["model"] == name] for name in ("tiny", "babyllama", "stories260K"))
    steps = max(int(r["steps"] or 0) for r in tiny)
    for model in (tiny, baby, stories):
        if len({tuple(r[key] for key in PROTOCOL) for r in model if not r["failed"]}) > 1:
            raise SystemExit(
                f"rows of {model[0]['model']} in quality.csv were measured on different texts or lengths: measure them alike (--max-tokens)"
            )
    return [
        *TEXT.format(**tiny[0] | {"steps": steps}).splitlines(), "", *folded("tiny, all arms at 4, 3 and 2 bits", table(tiny)),
        "Tuning also fits the domain, so the dense model tuned on the same tokens is the control. Ours beside the best of others at equal bytes",
        "(EfficientQAT's recipe by our code):", "", *contest(tiny), "",
        f"A LLaMA for children's stories (babyllama, one million parameters), groups of 32, {baby[0]['domain_tokens']} tokens,",
        f"{baby[0]['questions']} questions:", "",
        *folded("babyllama, all arms at 4, 3 and 2 bits", table(baby)), *contest(baby), "",
        "stories260K, a quarter of a million parameters, its FFN widened by channels of zeros from 172 to 192, which all libraries can pack. At 4",
        "bits it knows its domain so well that tuning takes from it, whoever tunes:", "",
        *folded("stories260K, all arms at 4, 3 and 2 bits", table(stories)), *contest(stories), "",
        "The presets of `run` (perplexity in domain / outside; seconds and memory are means and the most of three widths, untuned):", "",
        *presets(rows), "",
    ]  # fmt: skip
