"""kill -9 at seeded moments of real commands, again and again, and what comes of it when the same command is given once more.

Every case is a command that writes: run (RTN, GPTQ, sketches; scales, tables, LoRA), prune (LoRAPrune, oBERT), a chosen size, tune, export, task,
merge, apply, sweep. Each is run once without a kill; then trials: the command is started, its process group gets SIGKILL, is started again, perhaps
killed again, and at last may end. A kill comes at a moment drawn evenly over the processor time of the unkilled run, or right before or after the
Nth call that changes names on the disk (rename, replace, unlink, mkdir, rmdir, fsync), N drawn over the calls of the unkilled run, so that it comes
inside of writes, too. In place of some kills there is SIGTERM, to the first process alone, which must end with 143 and leave no process; and once a
case two processes do the same at once, of which one may be refused. After every kill the final name must be absent or whole, which is: equal to the
unkilled result. At the end all files must have the bytes of the unkilled run, reports its numbers but for times, and nothing may lie beside them.

Processes are forked from one that has imported everything, and so are the experiments of a sweep: a run takes a second, not ten. The model is a
random LLaMA of two blocks, made here, and pages are written without their figures, which take longer than all the rest. One row a kill in
results/kills.csv.

    OMP_NUM_THREADS=1 python bench/kills.py --work /tmp/kills
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from killing import command_line, count_calls, fork, left_alive, processor_seconds, warm
from rows import write_rows

FIELDS = ["case", "trial", "seed", "kill", "how", "at", "call", "exit", "final_name", "bytes", "report", "beside", "seconds", "error"]
TOLD = (
    "digests.json",
    "report.json",
    "report.html",
    "README.md",
    "export.json",
    "sweep.html",
    "sweep.csv",
    "rows.jsonl",
)  # of which times are a part
TIMES = (
    "created", "seconds", "peak_bytes", "resumed", "tokens_per_second", "wall_seconds", "attempts", "finished", "environment", "command", "host",
    "source", "source_fingerprint", "measured", "root", "files", "digest", "peak_bytes_gpu",
)  # fmt: skip
QUICK = ["--data", "../text.txt", "--outside", "../other.txt", "--max-tokens", "512", "--window", "64", "--device", "cpu"]
WORDS = ["the", "ship", "left", "harbour", "at", "dawn", "and", "night", "star", "map", "rope", "tide", "crew", "sail", "wind", "sea"]


@dataclass(frozen=True)
class Case:
    """A command. output: what it writes, a folder or a file; before: what is put there first."""

    name: str
    command: list[str]
    output: str = "out"
    before: str | None = None


def run(*flags: str) -> list[str]:
    return ["run", "../recipe.yaml", *flags, *QUICK, "-o", "out"]


TUNED = ["--tune", "peqa", "--steps", "12"]
CASES = [
    Case("rtn, peqa", run("--quant", "4bit:rtn", "--group", "32", *TUNED)),
    Case("gptq, peqa", run("--quant", "3bit", "--group", "32", *TUNED)),
    Case("sketch, table", run("--quant", "sketch3", "--tune", "table", "--steps", "12")),
    Case("gptq, lora", run("--quant", "3bit", "--group", "32", "--tune", "lora", "--steps", "12", "--rank", "4")),
    Case("gptq, lora absorbed", run("--quant", "4bit", "--group", "32", "--tune", "lora", "--steps", "8", "--rank", "4", "--adapter", "absorb")),
    Case("loraprune, gptq, peqa", run("--prune", "loraprune:30%", "--prune-steps", "10", "--quant", "4bit", "--group", "16", *TUNED)),
    Case("obert", run("--prune", "obert:50%")),
    Case("target bits", run("--target-bits", "3.5", "--candidates", "w3g32,w4g32", *TUNED)),
    Case("save task", run("--quant", "4bit:rtn", "--group", "32", *TUNED, "--save", "task")),
    Case("overwrite", [*run("--quant", "3bit:rtn", "--group", "32", *TUNED), "--overwrite"], before="tuned"),
    Case("tune", ["tune", "../gptq", "--steps", "12", "--batch", "4", "--seqlen", "32", *QUICK, "-o", "out"]),
    *(Case(f"export {to}", ["export", "../packed", "--to", to, "-o", "out", "--no-check"]) for to in ("bf16", "gptq", "gguf:q4_0", "mlx")),
    Case("task", ["task", "../tuned", "-o", "out.safetensors"], "out.safetensors"),
    Case("merge", ["merge-tasks", "../packed", "../a.safetensors", "../b.safetensors", "-o", "out.safetensors"], "out.safetensors"),
    Case("apply", ["apply", "../packed", "../a.safetensors", "-o", "out"]),
    Case("report", ["report", "../tuned", "--csv", "--markdown", "-o", "out"]),
    Case("sweep", ["sweep", "../model", "--grid", "../grid.yaml", "-o", "out", "--device", "cpu", "--keep", "all"]),
]


class Place:
    """The folder of one trial, in which a command is run."""

    def __init__(self, work: Path, name: str, case: Case):
        self.folder, self.case, self.tell = work / name, case, work / f"{name}.calls"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        if case.before:
            shutil.copytree(work / case.before, self.output)

    @property
    def output(self) -> Path:
        return self.folder / self.case.output

    def start(self, at: int | None = None, after: bool = False) -> int:
        def body() -> int:
            os.chdir(self.folder)
            count_calls(at, after, self.tell)
            return command_line(self.case.command)

        return fork(body, self.folder.parent / "log.txt")

    def finish(self) -> tuple[int, float]:
        """Exit code and processor seconds of a run that nobody kills."""
        _, status, used = os.wait4(self.start(), 0)
        return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime

    def ended_at(self, seconds: float, kind: signal.Signals, alone: bool) -> int | None:
        """How a run ended that got the signal, with its whole group or alone, after so much processor time; None if it was done sooner."""
        child, sweeps = self.start(), self.case.name == "sweep"
        while processor_seconds(child, sweeps) < seconds:
            if os.waitpid(child, os.WNOHANG)[0]:
                return None
            time.sleep(0.01)
        (os.kill if alone else os.killpg)(child, kind)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert kind == signal.SIGKILL or not left_alive(child), f"{self.case.name}: a process outlived the one that was asked to end"
        return code

    def twice(self) -> list[int]:
        """Exit codes of two runs that begin at once."""
        children = [self.start(), self.start()]
        return sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)

    def killed_in(self, at: int, after: bool) -> bool:
        """Whether a run was killed at its call of this number."""
        return os.WIFSIGNALED(os.waitpid(self.start(at, after), 0)[1])

    def beside(self) -> str:
        """What lies beside the output and inside it that is not of it."""
        found = [p for p in self.folder.iterdir() if p != self.output]
        inside = [p for p in self.output.rglob(".*") if p.is_file()] if self.case.name != "sweep" else []
        return " ".join(sorted(str(p.relative_to(self.folder)) for p in found + inside))


def contents(output: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """(digest of every file, JSON of every report without times) of a result; nothing of one that is not there."""
    files = [output] if output.is_file() else [p for p in sorted(output.rglob("*")) if p.is_file()]
    hashes, reports = {}, {}
    for path in files:
        name = str(path.relative_to(output.parent))
        if {"claims", "logs", "lock", "plan.json"} & set(path.relative_to(output.parent).parts) or path.name.startswith("."):
            continue
        if path.name in TOLD or "rows" in path.parts[-2:-1]:
            hashes[name] = "there"
            if path.suffix in (".json", ".jsonl"):
                reports[name] = [timeless(json.loads(line)) for line in ([path.read_text()] if path.suffix == ".json" else path.open())]
        else:
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes, reports


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def trial(work: Path, case: Case, number: int, seed: int, whole: Any, length: float, calls: int) -> list[dict[str, Any]]:
    """One to three kills, then the same command until it ends; a row a kill."""
    draw, place, rows = random.Random(seed), Place(work, f"trial-{case.name}", case), []
    before = contents(place.output)
    for kill in range(1, draw.choice((1, 1, 2, 3)) + 1):
        row: dict[str, Any] = {"case": case.name, "trial": number, "seed": seed, "kill": kill}
        how, moment, at, after = (
            draw.choice(("time", "time", "call", "call", "SIGTERM")),
            draw.uniform(0, length),
            draw.randint(1, calls),
            draw.random(),
        )
        if how == "call":
            hit = place.killed_in(at, after < 0.5)
            row |= {"how": how, "at": at, "call": place.tell.with_suffix(".call").read_text() if hit else "", "exit": -9}
        else:
            alone = how == "SIGTERM" or (case.name == "sweep" and after < 0.3)
            code = place.ended_at(moment, signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL, alone)
            hit = code is not None and code != 0
            row |= {"how": f"{how}, parent alone" if alone and how == "time" else how, "at": round(moment, 3), "exit": code}
        if not hit:
            break  # it was done sooner than drawn
        rows.append(row | {"final_name": standing(place, before, whole)})
    again = case.output.endswith(".safetensors") or case.name.startswith(("export", "apply"))
    refused = again and place.output.exists()  # these commands refuse what is there already
    code, seconds = place.finish()
    code = 0 if refused and code == 2 else code
    if rows:
        rows[-1] |= verdict(place, whole) | {"seconds": round(seconds, 2), "error": code or ""}
    return rows


def standing(place: Place, before: Any, whole: Any) -> str:
    """What lies under the final name."""
    now = contents(place.output)
    if not place.output.exists():
        return "absent"
    if now in (before, whole):
        return "whole" if now == whole else "old"
    return "in progress" if place.case.name in ("sweep", "report") else "HALF WRITTEN"  # whose files are each for itself


def verdict(place: Place, whole: Any) -> dict[str, Any]:
    hashes, reports = contents(place.output)
    same = {"bytes": "equal" if hashes == whole[0] else "DIFFERENT", "report": "equal" if reports == whole[1] else "DIFFERENT"}
    return same | {"beside": place.beside()}


def wrong(row: dict[str, Any]) -> bool:
    """Whether a row tells of a promise that was broken."""
    exits = {"SIGTERM": ("143",), "twice": ("0 2", "0 0")}.get(row["how"], ("-9",))
    return (
        "DIFFERENT" in row.values()
        or row["final_name"] == "HALF WRITTEN"
        or bool(row.get("error") or row.get("beside"))
        or str(row["exit"]) not in exits
    )


def campaign(work: Path, case: Case, trials: int, seed: int) -> list[dict[str, Any]]:
    """The unkilled run, trials, and two at once."""
    place = Place(work, f"whole-{case.name}", case)
    code, length = place.finish()
    assert code == 0, f"{case.name}: the unkilled run ended with {code}, see {work / 'log.txt'}"
    whole, calls = contents(place.output), place.tell.stat().st_size
    rows = []
    for number in range(1, trials + 1):
        rows += trial(work, case, number, seed * 1000 + number, whole, length, calls)
    place = Place(work, f"twice-{case.name}", case)
    codes = " ".join(map(str, place.twice()))
    rows.append({"case": case.name, "how": "twice", "exit": codes, "final_name": standing(place, whole, whole)} | verdict(place, whole))
    bad = [row for row in rows if wrong(row)]
    print(f"{case.name}: {length:.1f} s and {calls} calls unkilled; {len(rows) - 1} kills, {len(bad)} bad {bad or ''}", flush=True)
    return rows


def make(work: Path, cases: list[Case]) -> None:
    """Model, texts, and what commands start from, if any of them does."""
    import yaml

    from compressor.recipe import Recipe

    def model() -> None:
        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tok.train_from_iterator([" ".join(WORDS)], trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
        PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", model_max_length=128).save_pretrained(work / "model")
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=320, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, initializer_range=0.2, **sizes)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(work / "model")

    draw = random.Random(0)
    for name in ("text.txt", "other.txt"):
        (work / name).write_text("\n\n".join(" ".join(draw.choices(WORDS, k=40)) + "." for _ in range(60)))
    assert os.waitstatus_to_exitcode(os.waitpid(fork(model, work / "log.txt"), 0)[1]) == 0
    base = {"data__seqlen": 32, "data__nsamples": 8, "tune__batch": 2, "tune__checkpoint_every": 3, "tune__eval_every": 6}
    recipe = Recipe(model="../model").with_(**base).to_dict()
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    texts = {"data": str(work / "text.txt"), "outside": str(work / "other.txt")}
    shared = texts | {"nsamples": 8, "seqlen": 32, "max_tokens": 512, "steps": 6, "batch": 2, "tune": "peqa"}
    grid = {"base": shared, "quant": ["4bit:rtn", "3bit:rtn", "3bit"], "quant.group": [32]}
    (work / "grid.yaml").write_text(yaml.safe_dump(grid))
    if all(case.command[0] == "run" and case.before is None for case in cases):
        return
    plain = run("--quant", "4bit:rtn", "--group", "32")
    for name, command in {
        "packed": plain, "tuned": [*plain, *TUNED], "tuned2": [*plain, *TUNED, "--seed", "7"],
        "gptq": ["export", "../packed", "--to", "gptq", "-o", "out", "--no-check"],
        "a.safetensors": ["task", "../tuned", "-o", "out"], "b.safetensors": ["task", "../tuned2", "-o", "out"],
    }.items():  # fmt: skip
        place = Place(work, "making", Case(name, command))
        assert place.finish()[0] == 0, f"{name} cannot be made, see {work / 'log.txt'}"
        os.rename(place.output, work / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    parser.add_argument("--trials", type=int, default=4, help="of each case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose names hold this, or one of these, by semicolon")
    parser.add_argument("--out", default="kills.csv")
    a = parser.parse_args()
    a.work = a.work.resolve()
    a.work.mkdir(parents=True, exist_ok=True)
    warm()
    chosen = [case for case in CASES if any(part in case.name for part in a.only.split(";"))]
    make(a.work, chosen)
    rows: list[dict[str, Any]] = []
    for case in chosen:
        rows += campaign(a.work, case, a.trials, a.seed * 100 + CASES.index(case))
        write_rows(Path(__file__).parent / "results" / a.out, FIELDS, rows)
    kills = [row for row in rows if row["how"] != "twice"]
    print(len(kills), "kills;", dict(Counter(row["final_name"] for row in kills)), dict(Counter(row["bytes"] for row in rows if "bytes" in row)))
    sys.exit(any(wrong(row) for row in rows))


if __name__ == "__main__":
    main()
