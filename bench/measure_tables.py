"""The tables of docs/choosing.md, docs/sweeps.md and docs/evaluation.md, from the rows of bench/results/{choose,sweep,harness}.csv."""

import json
from itertools import groupby

Rows = list[dict[str, str]]


def choosing(rows: Rows) -> str:
    """Uniform recipes and choices of each model, smallest first, the choices with what was asked for and how far they are below the front."""
    lines: list[str] = []
    for model, group in groupby(rows, key=lambda r: (r["model"], r["tune"])):
        own = sorted(group, key=lambda r: int(r["folder_bytes"]))
        tuned = model[1] != "none"
        lines += [
            f"**{model[0]}**" + (f", then `--tune {model[1]}`" if tuned else "") + f" (dense: {float(own[0]['dense_ppl']):.2f})", "",
            "| | asked for | bits per weight | folder, bytes | domain | out of domain | best uniform | KL predicted | reached | seconds choosing |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in own:
            chosen = row["arm"].startswith("chosen")
            ppl = [row[f"tuned_{text}_ppl" if tuned else f"{text}_ppl"] for text in ("domain", "outside")]
            front, better = row["tuned_front" if tuned else "front"], row["tuned_better" if tuned else "better"]
            cells = [f"**{row['arm']}**" if chosen else row["arm"], asked(row["target"]), f"{float(row['bits_per_weight']):.3f}"]
            cells += [f"{int(row['folder_bytes']):,}", *(f"{float(p):.2f}" for p in ppl)]
            cells += [f"{float(front):.2f} ({-float(better):+.1%})" if front else "–"]
            cells += [f"{float(row[key]):.4f}" if row[key] else "–" for key in ("loss_predicted", "loss_reached")]
            lines.append(f"| {' | '.join([*cells, row['seconds_choosing'] if chosen else '–'])} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def asked(target: str) -> str:
    """A target in words."""
    if not target:
        return "–"
    (key, value), *_ = json.loads(target).items()
    return f"{value:,} bytes" if key == "target_size" else f"{value:g} bits" if key == "target_bits" else f"{value:.0%} loss"


def sweeping(rows: Rows) -> str:
    """What killing and sharing did, and the front of the sweep that was killed."""
    facts = [r for r in rows if not r["status"]]
    front = sorted((r for r in rows if r["part"] == "killed" and r["front"] == "True"), key=lambda r: int(r["folder_bytes"]))
    done = [r for r in rows if r["part"] == "killed" and r["status"]]
    lines = ["| part | what was counted | |", "|---|---|---|", *(f"| {r['part']} | {r['id']} | {r['value']} |" for r in facts), ""]
    lines += [f"The front of the {len(done)} rows of the first part, `tiny`, perplexity in the domain:", ""]
    lines += ["| | bits per weight | folder, bytes | perplexity |", "|---|---|---|---|"]
    cells = ([r["id"].rpartition("-")[0], f"{float(r['bits_per_weight']):.3f}", f"{int(r['folder_bytes']):,}", r["domain_ppl"]] for r in front)
    return "\n".join([*lines, *(f"| {' | '.join(row[:3])} | {float(row[3]):.2f} |" for row in cells)])


def harness(rows: Rows) -> str:
    """Scores of our packed models beside the same weights, dense, in lm-eval's own model class."""
    lines = ["| model | task | metric | ours, packed | transformers, dense | stderr | largest difference of a log-likelihood | same answers |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for r in rows:
        same, delta = f"{r['same_predictions']} of {r['examples']}", r["max_delta_loglikelihood"] or "–"
        lines.append(f"| {r['folder']} | {r['task']} | {r['metric']} | {r['ours']} | {r['transformers']} | {r['stderr']} | {delta} | {same} |")
    return "\n".join([f"{rows[0]['engine']}:", "", *lines])


def mixtures(rows: Rows) -> str:
    """What calibration tokens are worth to an expert, and toy mixtures."""
    found = [r for r in rows if r["kind"] == "share"]
    shares = list(dict.fromkeys(r["share"] for r in found))
    lines = [f"| tokens for each input | {' | '.join(shares)} |", f"|---|{'---|' * len(shares)}"]
    for packer in dict.fromkeys(r["packer"] for r in found):
        for word, pick in (("worst layer", max), ("mean", lambda values: sum(values) / len(values)), ("best layer", min)):
            cells = [f"{pick([float(r['error']) for r in found if (r['share'], r['packer']) == (share, packer)]):.2f}" for share in shares]
            lines.append(f"| {packer}, {word} | {' | '.join(cells)} |")
    lines += ["", "Toy mixtures with random weights, 3-bit GPTQ, groups of 64, 16384 calibration tokens; one core of a busy machine:", ""]
    lines += [
        "| | experts | least, median, most tokens | too few | linears, 16 bits | packed, bits a weight | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in (r for r in rows if r["kind"] == "toy"):
        tokens = ", ".join(r[f"{key}_tokens"] for key in ("least", "median", "most"))
        size = f"{int(r['dense_bytes']) / 1e6:.2f} MB"
        lines.append(f"| {r['model']} | {r['experts']} | {tokens} | {r['few']} | {size} | {r['packed_bits']} | {r['seconds']} |")
    return "\n".join(lines)
