"""No network without being asked: whole commands in a process whose sockets are blocked, and HF_HUB_OFFLINE."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from compressor.errors import ModelError
from compressor.pipelines import checkpoint

BLOCKED = '''
"""Every process that starts with this beside it has no network, and says where it tried: libraries catch such errors and go on."""
import os, socket

def refuse(*args, **keys):
    with open(os.environ["SOCKETS"], "a") as file:
        file.write(f"{os.environ['COMMAND_NOW'] if 'COMMAND_NOW' in os.environ else 'import'}: {args[-1:]}\\n")
    raise OSError(101, "Network is unreachable")

connect = socket.socket.connect
def only_local(self, address):
    return connect(self, address) if self.family == socket.AF_UNIX else refuse(address)

socket.socket.connect = socket.socket.connect_ex = only_local
socket.getaddrinfo = socket.gethostbyname = refuse
'''
CHAIN = """
import json, os, sys
from compressor.pipelines import cli

codes = []
for words in json.loads(sys.argv[1]):
    os.environ["COMMAND_NOW"], sys.argv = " ".join(words), ["compressor", *words]
    try:
        cli.main()
        codes.append(0)
    except SystemExit as stop:
        codes.append(int(stop.code or 0))
print(json.dumps(codes))
"""
SHORT = ["--max-tokens", "300", "--device", "cpu"]
LOCAL = [
    ["run", "tiny", "--quant", "3bit:rtn", "--tune", "peqa", "--steps", "2", "--seqlen", "32", "-o", "out", *SHORT],
    ["eval", "out", "--reference", "tiny", "--cache", "cache", *SHORT],
    ["export", "out", "--to", "gptq,bf16", "--no-check", "-o", "exported"],
    ["inspect", "out"], ["verify", "out", "--source", "tiny"], ["doctor", "out"], ["task", "out", "-o", "task.safetensors"],
]  # fmt: skip


def unshared() -> list[str]:
    """What starts a process without network interfaces, where that is allowed."""
    words = ["unshare", "-rn"]
    allowed = shutil.which(words[0]) and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if allowed else []


def test_tiny_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    root = Path(__file__).resolve().parents[2]
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "SOCKETS": str(tmp_path / "tried"), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    commands = [*LOCAL, ["eval", "nobody/nothing"]]
    words = [*unshared(), sys.executable, "-c", CHAIN, json.dumps(commands)]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * len(LOCAL) + [2], done.stderr
    tried = (tmp_path / "tried").read_text().splitlines()
    assert tried and all(line.startswith("eval nobody/nothing: ") for line in tried), "only the name of the hub asks for the network"
    assert done.stderr.strip().splitlines()[-1].startswith("error: nobody/nothing is no folder here and could not be fetched from the hub")


def test_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **keys: Any) -> Any:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ModelError, match="^nobody/nothing is no folder here and not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it"):
        checkpoint.resolve("nobody/nothing")
