"""Text that every CPython installation carries, so that a run needs no data argument and no network.

Tuning domain: `pydoc_data.topics`, the language reference as `help()` shows it; every seventh topic (in sorted order) is held out for
measuring. Outside the domain: the source code of a few standard-library modules, none of which the embedded model `tiny` was trained on.
The text belongs to the running interpreter, so its hash differs between Python versions; every report carries that hash.
"""

import importlib.util
import pathlib
from importlib import import_module

OUTSIDE_MODULES = (
    "bisect", "calendar", "configparser", "csv", "fractions", "heapq", "nntplib", "sched", "shelve", "statistics", "textwrap", "zipapp",
)  # fmt: skip
HELD_OUT_EVERY = 7


def topics(split: str) -> list[str]:
    """Sections of the language reference; split is "train" (six of seven) or "test" (the seventh)."""
    table = import_module("pydoc_data.topics").topics
    names = sorted(table)
    return [table[n].strip() for i, n in enumerate(names) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "test")]


def outside() -> list[str]:
    """Source files of OUTSIDE_MODULES, as many as this Python version has."""
    texts = []
    for name in OUTSIDE_MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            texts.append(pathlib.Path(spec.origin).read_text("utf-8"))
    return texts
