"""Our packed model through our path to lm-evaluation-harness, beside the same model dequantised in plain transformers through lm-eval's own HFLM.

Both answer the same questions, example by example: log-likelihoods of every choice, which choice is taken, what is written. The dense copy is what
`compressor export FOLDER --to float32` writes; HFLM loads it by its path, as `lm_eval --model hf` does.

    python bench/harness.py --models tiny=tiny=python babyllama=../shared/models/babyllama=../shared/data/tinystories/stories.txt
        --tasks ../shared/data/arc_easy/test.json ../shared/data/boolq/test.json --work /tmp/harness [--limit 200] [--out bench/results/harness.csv]
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import continuations
from lm_eval.models.huggingface import HFLM
from rows import write_rows

from compressor.pipelines import api, data, load
from compressor.pipelines.export import Target, export
from compressor.pipelines.measure import harness, tasks
from compressor.specs import parse_quant

SPECS = ("3bit", "sketch3")
SEED, LENGTH = 42, 128  # tokens that bound an answer, less than half of the models' context
FIELDS = ["model", "folder", "task", "metric", "ours", "transformers", "stderr", "max_delta_loglikelihood", "same_predictions", "examples", "engine"]


def packed(name: str, model: str, text: str, spec: str, work: Path) -> Path:
    """The folder of a packed model, made once."""
    folder = work / f"{name}-{spec}"
    if not (folder / "config.json").exists():
        chosen = {"quant": parse_quant(spec), "tune": {"method": "none"}, "data": {"data": text}}
        api.run({"model": model} | chosen, folder)
    return folder


def dense(folder: Path, work: Path) -> Path:
    """The same model dequantised, as an ordinary folder in float32."""
    out = work / f"{folder.name}-float32"
    if not (out / "config.json").exists():
        export(str(folder), out, Target("float32"))
    return out


def write_endings(path: Path, documents: list[str], count: int, seed: int) -> None:
    """Questions to be written: what of a line is left after its last space within 9 characters."""
    found = []
    for text in documents:
        for line_end in (i for i, c in enumerate(text) if c == "\n" and i > continuations.PROMPT):
            cut = text.rfind(" ", line_end - 9, line_end - 2)
            if cut > 0 and "\n" not in text[cut:line_end]:
                found.append({"prompt": text[max(0, cut - continuations.PROMPT) : cut], "answer": text[cut + 1 : line_end]})
    chosen = random.Random(seed).sample(found, min(count, len(found)))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen), encoding="utf-8")


def answers(lm: Any, task: str, limit: int) -> tuple[dict[str, float], list[dict]]:
    """lm-eval's scores of a task and its samples by question."""
    found = harness.run(lm, tasks.load_task(task, 0, LENGTH), limit, SEED, samples=True)
    return found["results"][task], sorted(found["samples"][task], key=lambda s: s["doc_id"])


def compare(ours: list[dict], theirs: list[dict]) -> tuple[float | str, int]:
    """(largest difference of a log-likelihood, or "" where texts are written; questions whose prediction is the same)."""
    delta, same = 0.0, 0
    for a, b in zip(ours, theirs, strict=True):
        assert a["doc_hash"] == b["doc_hash"] and a["arguments"] == b["arguments"], "the two paths were asked different things"
        x, y = a["filtered_resps"], b["filtered_resps"]
        if isinstance(x[0], str):
            same += x == y
            continue
        assert all(math.isfinite(p[0]) for p in (*x, *y)), "a log-likelihood is not finite"
        delta = max(delta, *(abs(p[0] - q[0]) for p, q in zip(x, y, strict=True)))
        same += _taken(x) == _taken(y) and [p[1] for p in x] == [q[1] for q in y]
    return ("" if isinstance(ours[0]["filtered_resps"][0], str) else delta), same


def _taken(pairs: list[tuple[float, bool]]) -> int:
    return max(range(len(pairs)), key=lambda i: pairs[i][0])


def measured(name: str, folder: Path, named: dict[str, Path], limit: int, work: Path) -> list[dict]:
    """A row for every task of one packed folder."""
    stock = HFLM(pretrained=str(dense(folder, work)), device="cpu", dtype="float32", batch_size=8)
    out = []
    with harness.serving(load.load(str(folder), "cpu")) as lm:
        for label, path in named.items():
            (score, mine), (plain, theirs) = answers(lm, str(path), limit), answers(stock, str(path), limit)
            delta, same = compare(mine, theirs)
            for key in ("acc,none", "acc_norm,none", "exact_match,none"):
                if key in score:
                    metric = key.partition(",")[0]
                    row = {
                        "model": name,
                        "folder": folder.name,
                        "task": label,
                        "metric": metric,
                        "ours": round(score[key], 5),
                        "transformers": round(plain[key], 5),
                    }
                    row |= {"stderr": round(score[f"{metric}_stderr,none"], 5), "same_predictions": same, "examples": len(mine)}
                    out.append(row | {"max_delta_loglikelihood": f"{delta:.2e}" if delta != "" else "", "engine": tasks.engine()})
                    print(json.dumps(out[-1]), flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="name=model=text of each")
    parser.add_argument("--tasks", nargs="*", type=Path, default=[], help="task files that every model is asked")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "harness.csv")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, model, text in (given.split("=") for given in args.models):
        documents = [d.text for d in data.load(text).test.documents]
        named = {f"{path.parent.name}/{path.name}": path for path in args.tasks}
        named |= {"continuations": args.work / f"{name}-continuations.jsonl", "line endings": args.work / f"{name}-endings.jsonl"}
        continuations.write(named["continuations"], documents, args.limit)
        write_endings(named["line endings"], documents, args.limit, SEED)
        for spec in SPECS:
            rows += measured(name, packed(name, model, text, spec, args.work), named, args.limit, args.work)
    write_rows(args.out, FIELDS, rows)


if __name__ == "__main__":
    main()
