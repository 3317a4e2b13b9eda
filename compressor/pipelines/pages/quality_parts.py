"""Sections of a run's page about quality: protocol, tasks, divergence from the dense model, and the choice of layers' formats."""

from typing import Any

from compressor.linear import expert_of
from compressor.pipelines.pages import run_plots
from compressor.pipelines.pages.parts import cell, esc, many, note, panels, short, table
from compressor.pipelines.report import DASH, STATES, Report, dicts, fixed, number, short_names, size

WORDS = {"kl": "Loss is the divergence (KL) from the dense model, in nats a token.", "error": "Loss is estimated from the layers' output errors."}
DISTANCES = {
    "mean": "mean",
    "median": "median",
    "p90": "p90",
    "p99": "p99",
    "max": "largest",
    "top1": "same top token",
    "loss_change": "change of loss",
}
TOLD = "Divergence (KL) of the predictions from the dense model's, in nats a token, on the domain's test text"
DIGITS = 16  # of a hash beside a task
LAYERS_NAMED = 4  # of a unit, one by one


def protocol(report: Report) -> str:
    texts = {text: values for text in ("domain", "outside", "task") if isinstance(values := report.protocol.get(text), dict)}
    keys = list(dict.fromkeys(key for values in texts.values() for key in values))
    rows = [[key.replace("_", " "), *(short(v[key]) if key in v else None for v in texts.values())] for key in keys]
    rates = [[f"{s}, evaluated tokens/s", *(fixed(number(getattr(report, s), t, "tokens_per_second"), 0) for t in texts)] for s in STATES]
    return table(("", *texts), rows + [row for row in rates if set(row[1:]) != {DASH}], "keys")


def _found(report: Report, section: str) -> dict[str, dict[str, Any]]:
    """state -> its section, of the states that have one."""
    return {s: found for s in STATES if isinstance(found := getattr(report, s).get(section), dict) and found}


def score(values: Any) -> str:
    """0.612 ± 0.014, of a task's result."""
    error = number(values, "stderr")
    return fixed(number(values, "value")) + (f" ± {fixed(error)}" if error else "")  # all right or all wrong: no error can be told


def task_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: one row a task, one column a state, then the task's own protocol."""
    found = _found(report, "tasks")
    rows = []
    for name, shown in short_names(name for tasks in found.values() for name in tasks).items():
        one: dict[str, Any] = next((t[name] for t in found.values() if isinstance(t.get(name), dict)), {})
        facts = [f"{key} {short(one[key])}" for key in ("metric", "examples", "shots", "engine") if one.get(key) is not None]
        told = ", ".join([*facts, *([f"data {str(one['data_sha256'])[:DIGITS]}"] if one.get("data_sha256") else [])])
        rows.append([shown, *(score(t.get(name)) for t in found.values()), told])
    return ["task", *found, "protocol"], rows


def tasks(report: Report) -> str:
    heads, rows = task_rows(report)
    return table(heads, rows, "rows folded") + (note("Shares of right answers, ± one standard error over the examples.") if rows else "")


def divergence(report: Report) -> str:
    """How far each state's predictions are from the dense model's, and over how many tokens that was measured."""
    found = {s: values for s, values in _found(report, "divergence").items() if number(values, "mean") is not None}
    rows = [[state, *(_distance(values, key) for key in DISTANCES)] for state, values in found.items()]
    kept = [0, *(i for i in range(1, 1 + len(DISTANCES)) if any(row[i] != DASH for row in rows))]
    heads = ["", *DISTANCES.values()]
    counted = next(((a, b) for v in found.values() if (a := number(v, "tokens")) and (b := number(v, "windows"))), None)
    over = f" ({counted[0]:,.0f} tokens in {counted[1]:,.0f} windows)" if counted else ""
    told = note(f"{TOLD}{over}: 0 is the same. ± is one standard error over windows.")
    return table([heads[i] for i in kept], [[row[i] for i in kept] for row in rows], "right") + (told if rows else "")


def _distance(values: dict[str, Any], key: str) -> str:
    value, error = number(values, key), number(values, {"mean": "stderr", "loss_change": "loss_change_stderr"}.get(key, ""))
    if key == "top1":
        return DASH if value is None else f"{value:.2%}"
    return cell(value) + ("" if error is None else f" ± {error:.2g}") if value is not None else DASH


def choice(report: Report) -> str:
    """What was asked for, what the solver promised, what was reached, and what each part got."""
    found = report.choice
    if not found:
        return ""
    asked = found.get("target")
    told = f"Asked for: {short(asked)}. " if asked else ""
    rows = [
        [kind, fixed(number(row, "bits_per_weight")), size(number(row, "folder_bytes")), fixed(number(row, "loss"), 4)]
        for kind, row in [
            *((k, found.get(k)) for k in ("predicted", "reached")),
            *((f"uniform {r.get('spec')}", r) for r in dicts(found.get("uniform"))),
        ]
        if isinstance(row, dict)
    ]
    units = dicts(found.get("units"))
    chosen = [[_layers(u.get("layers")), u.get("chosen"), *_best(u)] for u in units]
    every = table(("layers", "chosen", "damage", "options: bits, damage"), chosen, "rows")
    details = f"<details><summary>{many(len(units), 'unit')} of the choice, one by one</summary>{every}</details>" if chosen else ""
    counts: dict[str, int] = {}
    for u in units:
        layers = u.get("layers")
        counts[str(u.get("chosen"))] = counts.get(str(u.get("chosen")), 0) + (len(layers) if isinstance(layers, list) else 1)
    summary = table(("chosen", "linears"), sorted(counts.items()), "keys")
    solver = found.get("solver")
    return (
        note(told + WORDS.get(str(found.get("measure")), ""))
        + table(("", "bits per weight", "folder", "loss"), rows, "right")
        + panels(run_plots.choice(report))
        + summary
        + details
        + (f'<p class="muted note">Solver: {esc(short(solver))}</p>' if solver else "")
    )


def _layers(names: Any) -> str:
    names = [str(n) for n in names] if isinstance(names, list) else [str(names)]
    names = list(dict.fromkeys(n if (found := expert_of(n)) is None else f"{found[0]}.*.{found[2]}" for n in names))
    return ", ".join(names[:LAYERS_NAMED]) + (f" and {len(names) - LAYERS_NAMED} more" if len(names) > LAYERS_NAMED else "")


def _best(unit: dict[str, Any]) -> list[str]:
    """Damage of the chosen option, and all options in a line."""
    options = dicts(unit.get("options"))
    damage = next((cell(number(o, "damage")) for o in options if o.get("spec") == unit.get("chosen")), "")
    return [damage, "; ".join(f"{o.get('spec')}: {cell(number(o, 'bits'))}, {cell(number(o, 'damage'))}" for o in options)]
