"""One experiment as a process of its own, `python -m compressor run recipe.yaml`: its peak memory is its own, and its end is nobody else's.

What it says goes to a log; of one that fails, the last line of it is the reason. The child inherits the lock on its claim, so that it goes on
undisturbed where only its parent was ended, and whoever comes next waits for it and finds its folder. A child that had been ended goes on by its
own journal.
"""

import contextlib
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from compressor.errors import RecipeError
from compressor.pipelines.report import write_text
from compressor.pipelines.sweeps.grid import Experiment
from compressor.pipelines.sweeps.store import Folder
from compressor.stopping import held, let_through

GRACE = 30  # seconds that a child that is asked to end has to leave its checkpoint and its report
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Outcome:
    """How a child ended: error is None if its folder stands; seconds of the clock."""

    error: str | None
    seconds: float


def run(experiment: Experiment, folder: Folder, timeout: float | None = None) -> Outcome:
    """Run an experiment that this process holds; timeout in seconds. A request to end reaches the child, too, and is passed on."""
    assert experiment.recipe is not None
    recipe, log = folder.path / "recipes" / f"{experiment.id}.yaml", folder.path / "logs" / f"{experiment.id}.log"
    write_text(recipe, yaml.safe_dump(experiment.recipe.to_dict(), sort_keys=False))
    command = [sys.executable, "-m", "compressor", "run", str(recipe), "-o", str(folder.run(experiment.id))]
    began, late = time.monotonic(), False
    with log.open("wb") as file, held():
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=(folder.lock_of(experiment.id),))
        try:
            with let_through():
                process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end(process)
    seconds = time.monotonic() - began
    if process.returncode == 0 and (folder.run(experiment.id) / "report.json").exists():
        return Outcome(None, seconds)
    return Outcome(f"it took longer than {timeout:g} seconds and was ended" if late else reason(process.returncode, log), seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that a child is gone; it may leave its checkpoint and its report."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    if process.poll() is None:
        process.kill()
        process.wait()


def reason(code: int, log: Path) -> str:
    """Why a child failed, in one sentence: the signal that ended it, or the last line it said."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"its process was ended by {name}" + (", most often because the machine had no memory left" if code == -signal.SIGKILL else "")
    lines = [line.strip() for line in log.read_bytes()[-20_000:].decode("utf-8", "replace").splitlines()]
    said = next((line for line in reversed(lines) if line), "")
    said = "".join(c if c.isprintable() else " " for c in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said))
    return re.sub(r"^(error|failed): ", "", said)[:500] or f"its process ended with code {code} and said nothing"


def parse_timeout(text: str | None) -> float | None:
    """ "90", "90s", "30m", "2h" or "1d" -> seconds."""
    if text is None:
        return None
    m = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip().lower())
    if m is None or float(m[1]) <= 0:
        raise RecipeError(f"--timeout {text!r} is not understood; write for example 90s, 30m or 2h")
    return float(m[1]) * UNITS[m[2]]
