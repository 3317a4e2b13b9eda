"""Packed models of others as a starting point: measured, tuned and written back in their format, and read again by the software that made them.

make_foreign.py packs each model with GPTQModel (GPTQ and AWQ), llm-compressor and hqq, in virtual environments with the versions of `PACKERS`. Each
checkpoint is a row of the CSV:

1. its perplexity on a fixed text in its own library, and by `compressor eval`;
2. `compressor tune --tune peqa` on other text of the same kind: perplexity before, which must be that of 1, and after, which must be lower;
3. the folder that this wrote: the same format, the same tensors, the same codes. GPTQ's first version cannot say a zero of 0, so a group with one
   comes back with other numbers for the same steps (code - zero): `renumbered` counts such groups, `moved` codes whose step changed;
4. the perplexity of that folder in their library, and by `compressor eval`.

Texts: for tiny, Python's manual as builtin.py splits it; for babyllama every tenth story of ../shared/data/tinystories, tuned on the others.
Differences are relative; `limit` is what is allowed, by library: all compute in float32 from what is stored, but GPTQModel's kernels form weights in
float16. Exit code 1 where anything is not as expected.

    python bench/interop/foreign.py [--out bench/results/foreign.csv] [--model tiny] [--work DIR] [--jobs 2]

--work: where venvs and folders stay for the next run, which makes no checkpoint again; else they are deleted. It takes some twenty minutes on two
cores, beside what pip takes.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from run import QUIET, ROOT, STEPS, Step, make_venv
from torch import Tensor

from compressor import __version__
from compressor.export import conversions, shards
from compressor.packed import PackedWeight
from compressor.pipelines import builtin, checkpoint, load

SHARED = ROOT.parent / "shared"
MODELS = {"tiny": checkpoint.TINY, "babyllama": SHARED / "models" / "babyllama"}
STORIES = SHARED / "data" / "tinystories" / "stories.txt"
COLUMNS = (
    "model", "library", "version", "transformers", "compressor", "format", "bits", "symmetric", "group", "act_order", "window", "tokens", "theirs",
    "ours", "difference", "steps", "before", "after", "format_after", "same_tensors", "moved", "renumbered", "groups", "theirs_after", "ours_after",
    "difference_after", "limit", "verdict", "note",
)  # fmt: skip
WINDOW, TOKENS, STEPS_OF_TUNING, BATCH = 256, 4096, 60, 2
EXACT, HALF = 1e-6, 1e-3  # relative differences of perplexity: the same weights in float32, weights formed in 16 bits
SAME_RUN = 1e-6  # between `compressor eval` and the first measure of `compressor tune`
LABELS = {"gptq": "checkpoint_format", "awq": "version", "compressed-tensors": "format"}  # the key that tells the variant of a format
SHOWN = {"theirs": ".4f", "ours": ".4f", "difference": ".1e", "theirs_after": ".4f", "ours_after": ".4f", "difference_after": ".1e"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Packer:
    """A library of make_foreign.py: the name and the packages of its venv, and how far its perplexity may be from ours."""

    venv: str
    pip: tuple[str, ...]
    limit: float


PACKERS = {
    "gptqmodel": Packer("gptqmodel", STEPS["gptqmodel"].pip, HALF),
    "gptqmodel-awq": Packer("gptqmodel", STEPS["gptqmodel"].pip, HALF),
    "llmcompressor": Packer("llmcompressor", ("llmcompressor==0.14.0.1",), EXACT),
    "hqq": Packer("hqq", ("hqq==0.2.8.post1",), EXACT),
}


@dataclass(frozen=True)
class Batch:
    """Checkpoints that one process of make_foreign.py makes. models: empty for all."""

    library: str
    bits: tuple[int, ...]
    options: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


BATCHES = (
    Batch("gptqmodel", (4, 3, 2)),
    Batch("gptqmodel", (4, 3, 2), ("--asym",)),
    Batch("gptqmodel", (4,), ("--desc-act",)),
    Batch("gptqmodel", (4, 2), ("--asym", "--form", "gptq_v2")),
    Batch("gptqmodel-awq", (4,), (), ("tiny",)),  # babyllama has 352 outputs, and the search for clips wants multiples of 64
    Batch("gptqmodel-awq", (4,), ("--asym",), ("tiny",)),
    Batch("llmcompressor", (4, 3, 2)),
    Batch("llmcompressor", (4, 3, 2), ("--asym",)),
    Batch("hqq", (4, 3, 2)),
)


@dataclass(frozen=True)
class Place:
    """Where the work of one model happens."""

    model: str
    work: Path
    texts: Path  # train.txt and test.txt
    pythons: dict[str, Path]  # of venvs, by their names

    @property
    def made(self) -> Path:
        return self.work / "folders" / "foreign"

    @property
    def tuned(self) -> Path:
        return self.work / "folders" / "tuned"


def write_texts(model: str, folder: Path) -> Path:
    """train.txt and test.txt of a model in a folder, each one document."""
    if model == "tiny":
        parts = {part: [text.strip() for text in builtin.topics(part)] for part in ("train", "test")}
    else:
        stories = [story.strip() for story in STORIES.read_text("utf-8").split("<|endoftext|>") if story.strip()]
        parts = {"train": [story for number, story in enumerate(stories) if number % 10 != 9], "test": stories[9::10]}
    folder.mkdir(parents=True, exist_ok=True)
    for part, documents in parts.items():
        (folder / f"{part}.txt").write_text("\n\n".join(documents), "utf-8")
    return folder


def ask(python: Path | str, arguments: Iterable[object]) -> list[Row]:
    """The JSON lines that a command prints; RuntimeError with the end of its messages if it prints none."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | QUIET | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": paths} if python == sys.executable else {})
    ran = subprocess.run([str(python), *map(str, arguments)], env=env, capture_output=True, text=True, errors="replace")
    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    if not rows:
        raise RuntimeError(next((line.strip()[:300] for line in reversed(ran.stderr.splitlines()) if line.strip()), "it printed nothing"))
    return rows


def foreign(place: Place, command: str, library: str, *arguments: object) -> list[Row]:
    """A run of make_foreign.py in the library's venv."""
    python = place.pythons[PACKERS[library].venv]
    measuring = ("--text", place.texts / "test.txt", "--window", WINDOW, "--max-tokens", TOKENS)
    return ask(python, [Path(__file__).with_name("make_foreign.py"), command, library, *arguments, *measuring])


def make(place: Place, batch: Batch) -> list[Row]:
    """The checkpoints of a batch, each with its perplexity in its library."""
    arguments = (MODELS[place.model], place.made, "--calibrate", place.texts / "train.txt", "--bits", *batch.bits, *batch.options)
    return [{"model": place.model} | row for row in foreign(place, "make", batch.library, *arguments)]


def compressor(*arguments: object) -> Row:
    """What a command of ours says on its last line."""
    return ask(sys.executable, ["-m", "compressor", *arguments])[-1]


def ours(place: Place, folder: Path) -> Row:
    return compressor("eval", folder, "--data", place.texts / "test.txt", "--window", WINDOW, "--max-tokens", TOKENS, "--device", "cpu")


def start_from(place: Place, made: Row) -> Row:
    """Measures and tunes one checkpoint, and looks at what came out."""
    row = made | {"compressor": __version__, "symmetric": made["sym"], "limit": PACKERS[made["library"]].limit, "note": made.get("failed", "")}
    if "failed" in made:
        return row
    before, after = place.made / made["folder"], place.tuned / made["folder"]
    try:
        measured = ours(place, before)
        row |= {"format": form(before), "theirs": made["perplexity"], "ours": measured["perplexity"], "tokens_of_ours": measured["tokens"]}
        run = compressor(
            "tune", before, "--tune", "peqa", "--data", place.texts, "--steps", STEPS_OF_TUNING, "--batch", BATCH, "--window", WINDOW,
            "--max-tokens", TOKENS, "--device", "cpu", "--overwrite", "-o", after,
        )  # fmt: skip
        row |= {"steps": STEPS_OF_TUNING, "before": run["packed"]["domain"]["perplexity"], "after": run["tuned"]["domain"]["perplexity"]}
        row |= {"ours_after": ours(place, after)["perplexity"], "format_after": form(after)} | compared(before, after)
    except RuntimeError as error:
        row["note"] = str(error)
    return row


def form(folder: Path) -> str:
    """What a folder says that it is."""
    config = checkpoint.any_config(folder)["quantization_config"]
    method = config["quant_method"]
    return f"{method} {config.get(LABELS.get(method), '')}".strip()


def compared(before: Path, after: Path) -> Row:
    """What changed between two folders beside values: headers, and codes of the packed weights."""
    headers = [
        {key: (t.dtype, t.shape) for key, t in shards.read_headers(folder, checkpoint.weight_files(folder)).items()} for folder in (before, after)
    ]
    first, second = (load.read_packed(folder, checkpoint.any_config(folder))[1] for folder in (before, after))
    if first.keys() != second.keys():
        raise RuntimeError("the tuned folder has other packed linears")
    found = [changed(first[name], second[name]) for name in first]
    odd = sorted(key for key in headers[0].keys() | headers[1].keys() if headers[0].get(key) != headers[1].get(key))
    moved, renumbered, groups = (sum(counts) for counts in zip(*found, strict=True))
    note = f"{len(odd)} tensors differ, such as {odd[0]}: {headers[0].get(odd[0])}, {headers[1].get(odd[0])}" if odd else ""
    return {"same_tensors": not odd, "moved": moved, "renumbered": renumbered, "groups": groups, "note": note}


def changed(one: PackedWeight, two: PackedWeight) -> tuple[int, int, int]:
    """Codes whose step from zero changed, groups with other codes for the same steps, and all groups."""
    codes, steps = zip(numbers(one), numbers(two), strict=True)
    other = (codes[0] != codes[1]).view(-1, one.group).any(1)
    return int((steps[0] != steps[1]).sum()), int(other.sum()), other.numel()


def numbers(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Codes, and codes less their zeros under positive scales; both float32 [n, k], columns in stored order."""
    mirrored = conversions.positive(weight)
    zero = torch.tensor(2.0 ** (weight.bits - 1)) if mirrored.zero is None else mirrored.zero.float().repeat_interleave(weight.group, 1)
    return weight.codes().float(), mirrored.codes().float() - zero


def again(place: Place, rows: list[Row]) -> list[Row]:
    """The rows of one library with the perplexity that it gives the tuned folders."""
    ready = [row for row in rows if "format_after" in row]
    if not ready:
        return rows
    found = {row["folder"]: row for row in foreign(place, "read", ready[0]["library"], *(place.tuned / row["folder"] for row in ready))}
    for row in ready:
        said = found.get(row["folder"], {"failed": "their library said nothing of the tuned folder"})
        row |= {"theirs_after": said["perplexity"]} if "perplexity" in said else {"note": f"tuned: {said['failed']}"}
    return rows


def judged(row: Row) -> Row:
    """The row with its differences and a verdict: good, or NOT and everything that is wrong."""
    if "failed" in row:
        return row | {"verdict": "NOT made"}
    wrong = []
    for suffix in ("", "_after"):
        pair = row.get(f"theirs{suffix}", ""), row.get(f"ours{suffix}", "")
        if "" in pair:
            wrong.append(f"no perplexity{' after tuning' * bool(suffix)}")
            continue
        row[f"difference{suffix}"] = abs(pair[1] / pair[0] - 1)
        if row[f"difference{suffix}"] > row["limit"]:
            wrong.append(f"other perplexity{' after tuning' * bool(suffix)}")
    checks = {
        "other tokens": row.get("tokens_of_ours") == row.get("tokens"),
        "tuning starts elsewhere": "ours" in row and abs(row.get("before", 0) / row["ours"] - 1) <= SAME_RUN,
        "tuning does not help": row.get("after", 1) < row.get("before", 0),
        "another format": row.get("format") == row.get("format_after"),
        "other tensors": row.get("same_tensors", False),
        "codes moved": row.get("moved") == 0,
    }
    wrong += [name for name, right in checks.items() if not right]
    return row | {"verdict": f"NOT {', '.join(wrong)}" if wrong else "good"}


def prove(place: Place, jobs: int) -> list[Row]:
    """All rows of a model."""
    batches = [batch for batch in BATCHES if not batch.models or place.model in batch.models]
    with ThreadPoolExecutor(jobs) as pool:
        made = [row for rows in pool.map(lambda batch: make(place, batch), batches) for row in rows]
        rows = list(pool.map(lambda row: start_from(place, row), made))
        by_library = [[row for row in rows if row["library"] == library] for library in PACKERS]
        read = pool.map(lambda rows: again(place, rows), by_library)
        return [judged(row) for rows in read for row in rows]


def shown(rows: list[Row]) -> Table:
    table = Table("checkpoint", "theirs", "ours", "difference", "tuned, theirs", "ours", "difference", "verdict", title="models packed by others")
    for row in rows:
        grid = ("sym" if row.get("symmetric") else "asym") + (", act-order" if row.get("act_order") else "")
        name = f"{row['model']} {row['library']} {row['version']}: {row.get('format', '')}, {row['bits']} bits, {grid}"
        cells = [f"{row[key]:{style}}" if row.get(key, "") != "" else "" for key, style in SHOWN.items()]
        table.add_row(name, *cells, row["verdict"], style="red" if row["verdict"] != "good" else None)
    return table


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path)
    ap.add_argument("--model", nargs="+", choices=MODELS, default=[name for name, folder in MODELS.items() if folder.is_dir()])
    ap.add_argument("--work", type=Path)
    ap.add_argument("--jobs", type=int, default=2)
    a = ap.parse_args()
    console, rows = Console(stderr=True), []
    with tempfile.TemporaryDirectory() as temporary:
        work = (a.work or Path(temporary)).resolve()
        pythons = {packer.venv: make_venv(work / "venvs" / packer.venv, Step(packer.pip, ())) for packer in PACKERS.values()}
        for model in a.model:
            console.print(f"{model}: packing, tuning, reading")
            rows += prove(Place(model, work, write_texts(model, work / "texts" / model), pythons), a.jobs)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        with a.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    Console(width=180).print(shown(rows))
    strange = [row for row in rows if row["verdict"] != "good"]
    for row in strange:
        console.print(f"{row['model']}, {row['library']}, {row['bits']} bits: {row['verdict']} {row.get('note', '')}")
    return 1 if strange else 0


if __name__ == "__main__":
    sys.exit(main())
