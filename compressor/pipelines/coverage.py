"""How the calibration text reached the experts of a mixture, summed up for the report and its page, where experts come in thousands."""

import re
import statistics
from collections import Counter, defaultdict
from typing import Any

from compressor.linear import expert_of
from compressor.pipelines.calibrate import LEAST
from compressor.pipelines.report import dicts, number


def coverage(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of rows of packed layers those of experts that were calibrated: how many experts, the tokens of the one that got least, the median and most,
    how many got none, and how many too few (fewer than LEAST for each input of one of its linears). Empty where there are none."""
    tokens: dict[tuple[str, int], int] = {}
    widest: dict[tuple[str, int], int] = {}
    for row in rows:
        expert = expert_of(row["name"])
        if expert is not None and "tokens" in row:
            tokens[expert[:2]] = row["tokens"]
            widest[expert[:2]] = max(widest.get(expert[:2], 0), row["shape"][1])
    if not tokens:
        return {}
    few = sum(0 < count < LEAST * widest[expert] for expert, count in tokens.items())
    counts = sorted(tokens.values())
    return {
        "experts": len(counts), "least_tokens": counts[0], "median_tokens": round(statistics.median(counts)), "most_tokens": counts[-1],
        "unseen": counts.count(0), "few": few, "few_is_below": f"{LEAST} tokens for each input",
    }  # fmt: skip


def sentence(found: dict[str, Any]) -> str:
    """A note where experts had to be packed without data; empty where none had to."""
    if not found or not found["unseen"] + found["few"]:
        return ""
    told = f"of {found['experts']} experts {found['unseen']} saw no calibration tokens and {found['few']} fewer than {found['few_is_below']}"
    return f"{told}: they are packed without data, wholly or in part; more windows (--nsamples) reach more"


def folded(rows: list[Any]) -> list[dict[str, Any]]:
    """Rows of layers for people: what stands in the same place in all experts of a block is one row, with ranges where they differ."""
    places: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in dicts(rows):
        expert = expert_of(str(row.get("name")))
        places[str(row.get("name")) if expert is None else f"{expert[0]}.*.{expert[2]}"].append(row)
    return [found[0] if len(found) == 1 else _one(name, found) for name, found in places.items()]


def _one(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {"name": f"{name} ({len(rows)})"}
    for key in ("shape", "bits", "group", "zero", "damp"):
        if len({str(row.get(key)) for row in rows}) == 1:
            out[key] = rows[0].get(key)
    packers = Counter(str(row["packer"]) for row in rows if row.get("packer"))
    out["packer"] = ", ".join(packers) if len(packers) == 1 else ", ".join(f"{count} {packer}" for packer, count in packers.items())
    for key in ("error", "start_error", "tokens"):
        values = sorted(value for row in rows if (value := number(row, key)) is not None)
        if values:
            out[key] = f"{values[0]:.4g} to {values[-1]:.4g}" if values[0] < values[-1] else values[0]
    out["seconds"] = sum(number(row, "seconds") or 0 for row in rows)
    notes = Counter(re.sub(r"only \d+ calibration", "few calibration", str(row["note"])) for row in rows if row.get("note"))
    out["note"] = "; ".join(f"{count}: {note}" for note, count in notes.items())
    return out
