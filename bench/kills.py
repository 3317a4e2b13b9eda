"""kill -9 at seeded moments of real commands, again and again, and what comes of it when the same command is given once more.

Every case is a command that writes: run (RTN, GPTQ, sketches; scales, tables, LoRA), prune (LoRAPrune, oBERT), a chosen size, tune, export, task,
merge, apply, sweep. Each is run once without a kill; then trials: the command is started, its process group gets SIGKILL, is started again, perhaps
killed again, and at last may end. A kill comes at a time drawn evenly over the length of the unkilled run, or right before or after the Nth call that
changes names on the disk (rename, replace, unlink, mkdir, rmdir, fsync), N drawn over the calls of the unkilled run, so that it comes inside of
writes, too. After every kill the final name must be absent or whole, which is: equal to the unkilled result. At the end all files must have the bytes
of the unkilled run, reports its numbers but for times, and nothing may lie beside them.

Processes are forked from one that has imported everything, and so are the experiments of a sweep: a run takes a second, not ten. The model is a
random LLaMA of two blocks, made here, and pages are written without their figures, which take longer than all the rest. One row a kill in
results/kills.csv.

    OMP_NUM_THREADS=1 python bench/kills.py --work /tmp/kills
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import write_rows

FIELDS = ["case", "trial", "seed", "kill", "how", "at", "call", "final_name", "bytes", "report", "beside", "seconds", "error"]
CALLS = ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync")  # of os
WARM = [f"compressor.pipelines.{name}" for name in ("api", "cli", "export", "merging", "pages.files", "retune", "show", "sweeps.sweep")]
WARM += ["compressor.integrations.gguf", "peft", "transformers.models.llama.modeling_llama"]
TOLD = ("report.json", "report.html", "README.md", "export.json", "sweep.html", "sweep.csv", "rows.jsonl")  # of which times are a part
TIMES = (
    "created", "seconds", "peak_bytes", "resumed", "tokens_per_second", "wall_seconds", "attempts", "finished", "environment", "command", "host",
    "source", "source_fingerprint", "measured", "peak_bytes_gpu",
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


def warm() -> None:
    """Import what every command needs, and load the kernels; no gradient is computed here, for autograd does not survive a fork."""
    for name in WARM:
        importlib.import_module(name)
    import torch

    from compressor.linear import PackedLinear
    from compressor.pipelines.pages import figures
    from compressor.quant import rtn
    from compressor.recipe import Quant

    figures.inline = lambda panel: ""
    with torch.no_grad():
        for bits in (3, 4):
            PackedLinear(rtn.pack(torch.randn(64, 64), None, Quant(bits=bits), 32, torch.float16)[0], None)(torch.randn(2, 64))


def fork(body: Callable[[], int | None], log: Path) -> int:
    """A process in a group of its own that runs `body` and says everything into `log`; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = body() or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Forked:
    """What `subprocess.Popen` is to a sweep, for a command of this package: forked from the process that is warm already."""

    def __init__(self, command: list[str], stdin: Any, stdout: Any, stderr: Any, pass_fds: tuple[int, ...]):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            os._exit(command_line(command[3:]))

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def command_line(args: list[str]) -> int:
    """The command line in this process; its exit code."""
    import subprocess

    from rich.console import Console

    from compressor.pipelines import cli
    from compressor.pipelines.sweeps import child

    child.subprocess = type("Forks", (), {"Popen": Forked, "DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired})
    sys.argv, sys.stdout, sys.stderr, code = ["compressor", *args], os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False), 0
    cli.console = Console(file=sys.stderr)
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    sys.stdout.flush()
    return code


def count_calls(at: int | None, after: bool, tell: Path) -> None:
    """Count calls of CALLS in this process and those that it forks; at the one of number `at` kill the group, before or after it is done."""

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            with tell.open("ab") as file:
                file.write(b".")
                now = file.tell()
            if at == now and not after:
                die(f"before {name}")
            result = real(*args, **more)
            if at == now:
                die(f"after {name}")
            return result

        return call

    def die(where: str) -> None:
        tell.with_suffix(".call").write_text(where)
        os.killpg(0, signal.SIGKILL)

    tell.write_bytes(b"")
    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


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
        """Exit code and seconds of a run that nobody kills."""
        began, child = time.monotonic(), self.start()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - began

    def killed_at(self, seconds: float, alone: bool) -> bool:
        """Whether a run was killed after so many seconds: its whole group, or the first process of it alone."""
        child, end = self.start(), time.monotonic() + seconds
        while time.monotonic() < end:
            if os.waitpid(child, os.WNOHANG)[0]:
                return False
            time.sleep(0.002)
        (os.kill if alone else os.killpg)(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return True

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
    draw, place, rows = random.Random(seed), Place(work, "trial", case), []
    before = contents(place.output)
    for kill in range(1, draw.choice((1, 1, 2, 3)) + 1):
        row: dict[str, Any] = {"case": case.name, "trial": number, "seed": seed, "kill": kill}
        if draw.random() < 0.5:
            at, alone = draw.uniform(0, length), case.name == "sweep" and draw.random() < 0.3
            hit = place.killed_at(at, alone)
            row |= {"how": "time, parent alone" if alone else "time", "at": round(at, 3)}
        else:
            at = draw.randint(1, calls)
            hit = place.killed_in(at, draw.random() < 0.5)
            row |= {"how": "call", "at": at, "call": place.tell.with_suffix(".call").read_text() if hit else ""}
        if not hit:
            break  # it was done sooner than drawn
        now = contents(place.output)
        good = place.case.name in ("sweep", "report") or now in (before, whole)
        name = "absent" if not place.output.exists() else "old" if case.before and now == before else "whole" if now == whole else "in progress"
        rows.append(row | {"final_name": name if good else "HALF WRITTEN"})
    again = case.output.endswith(".safetensors") or case.name.startswith(("export", "apply"))
    if again and place.output.exists():  # these refuse what is there already
        code, seconds = 0, 0.0
    else:
        code, seconds = place.finish()
    hashes, reports = contents(place.output)
    verdict = {"bytes": "equal" if hashes == whole[0] else "DIFFERENT", "report": "equal" if reports == whole[1] else "DIFFERENT"}
    verdict |= {"beside": place.beside(), "seconds": round(seconds, 2), "error": code or ""}
    if rows:
        rows[-1] |= verdict
    return rows


def campaign(work: Path, case: Case, trials: int, seed: int) -> list[dict[str, Any]]:
    """The unkilled run, twice as a control, then trials."""
    place = Place(work, "whole", case)
    code, length = place.finish()
    assert code == 0, f"{case.name}: the unkilled run ended with {code}, see {work / 'log.txt'}"
    whole, calls = contents(place.output), place.tell.stat().st_size
    rows = []
    for number in range(1, trials + 1):
        rows += trial(work, case, number, seed * 1000 + number, whole, length, calls)
    bad = [row for row in rows if "DIFFERENT" in str(row.values()) or "HALF" in row["final_name"] or row.get("error") or row.get("beside")]
    print(f"{case.name}: {length:.1f} s and {calls} calls unkilled; {len(rows)} kills, {len(bad)} bad {bad or ''}", flush=True)
    return rows


def make(work: Path) -> None:
    """Model, texts, and what commands start from."""
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
    parser.add_argument("--only", help="cases whose names hold this")
    parser.add_argument("--out", default="kills.csv")
    a = parser.parse_args()
    a.work = a.work.resolve()
    a.work.mkdir(parents=True, exist_ok=True)
    warm()
    if not (a.work / "b.safetensors").exists():
        make(a.work)
    rows: list[dict[str, Any]] = []
    for i, case in enumerate(CASES):
        if a.only is None or a.only in case.name:
            rows += campaign(a.work, case, a.trials, a.seed * 100 + i)
            write_rows(Path(__file__).parent / "results" / a.out, FIELDS, rows)
    print(len(rows), "kills;", dict(Counter(row["final_name"] for row in rows)), dict(Counter(row["bytes"] for row in rows if "bytes" in row)))


if __name__ == "__main__":
    main()
