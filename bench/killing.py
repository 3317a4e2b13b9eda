"""Processes for kills.py: forked from one that has imported everything, and killed at a call that changes names on the disk."""

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync")  # of os
WARM = [f"compressor.pipelines.{name}" for name in ("api", "cli", "export", "merging", "pages.files", "retune", "show", "sweeps.sweep")]
WARM += ["compressor.integrations.gguf", "peft", "transformers.models.llama.modeling_llama"]


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


def processor_seconds(process: int, group: bool) -> float:
    """Of a process, or of all that are alive in its group."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat") if group else [Path(f"/proc/{process}/stat")]:
        try:
            parts = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if not group or int(parts[2]) == process:
            total += sum(map(int, parts[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def left_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
