"""What README says is so: its numbers are those of bench/results, its commands and flags exist, CI runs them as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from compressor.pipelines import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_numbers_come_from_the_results() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "readme.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_and_flag_exists() -> None:
    group: Any = typer.main.get_command(cli.app)
    seen = 0
    lines = [part.strip() for block in blocks("bash") for line in block.splitlines() for part in line.split("&&")]
    lines += re.findall(r"`(compressor [^`]+)`", README)
    for line in lines:
        words = shlex.split(line, comments=True)
        if not words or words[0] != "compressor":
            continue
        command = group.commands[words[1]]
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert {w for w in words[2:] if w.startswith("-")} <= known, line
        seen += 1
    assert seen >= 6


def test_flags_named_in_the_text_exist() -> None:
    group: Any = typer.main.get_command(cli.app)
    known = {n for c in group.commands.values() for p in c.params for n in (*p.opts, *p.secondary_opts)}
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) <= known | {"--help"}


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    for words in ("pip install -q -e '.[test]'", "pytest", "compressor run tiny --quant 3bit --tune peqa"):
        assert words in script
    text = "\n".join(blocks("bash"))
    assert "pip install -e '.[test]' && pytest" in text
    assert "pip install . && compressor run tiny --quant 3bit --tune peqa" in text


def test_the_python_example_runs(tmp_path: Path) -> None:
    code = blocks("python")[0].replace("epochs=1", "steps=2, seqlen=64").replace("bits=3", "bits=3, nsamples=4, seqlen=64")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=600, env=env())
    assert (tmp_path / "tiny-w3" / "model.safetensors").exists()


def env() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
