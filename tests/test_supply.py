"""Dependencies: every one has a range, and CI's lock covers them all."""

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LOCK = [sys.executable, str(ROOT / "bench" / "lock.py"), "--check"]


def test_the_lock_covers_every_requirement() -> None:
    done = subprocess.run(LOCK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ".ci/lock.txt" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_extras_are_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for text in project["dependencies"]:
        assert ">=" in str(Requirement(text).specifier), text
    for extra, texts in project["optional-dependencies"].items():
        for requirement in map(Requirement, texts):
            bounds = str(requirement.specifier)
            assert requirement.name == project["name"] or (">=" in bounds and "<" in bounds), f"{extra}: {requirement}"
