"""What the CPU benches need of other libraries: whether one is there, silence while it works, GPTQModel's import and the codes in its words."""

import contextlib
import functools
import importlib.util
import os
import sys
import types
from collections.abc import Iterator

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with the one worker that it takes on two cores its thread pool refuses to start

import torch
from torch import Tensor


class Absent(Exception):
    """Why an arm cannot run here."""


def require(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise Absent(f"{name} is not installed here")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what a library prints, at the level of the file descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, sink = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in enumerate(kept, 1):
            os.dup2(old, number)
            os.close(old)
        os.close(sink)


@functools.lru_cache(maxsize=1)
def gptqmodel() -> types.ModuleType:
    """GPTQModel; 7.4.0 imports torchvision, undeclared, for one family of vision models: a stand-in for that file does."""
    name = "gptqmodel.models.definitions.internvl_chat"
    if importlib.util.find_spec("torchvision") is None:
        stand_in = types.ModuleType(name)
        vars(stand_in)["InternVLChatQModel"] = type("InternVLChatQModel", (), {})
        sys.modules.setdefault(name, stand_in)
    with quiet():
        import gptqmodel

    return gptqmodel


def unpack(words: Tensor, bits: int) -> Tensor:
    """GPTQ's int32 words [rows * bits / 32, cols] -> codes [rows, cols]; down every column runs one stream of bits, lowest first."""
    ones = (words.unsqueeze(1) >> torch.arange(32).view(1, 32, 1)) & 1  # [words, 32, cols]
    fields = ones.reshape(-1, bits, words.shape[1])  # one code a row
    return (fields << torch.arange(bits).view(1, bits, 1)).sum(1)
