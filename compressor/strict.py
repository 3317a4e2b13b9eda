"""Reading what strangers wrote, with bounds: JSON and regular expressions that cannot take the memory or the time of who reads them.

JSON is taken from regular files of a stated size, nests no deeper than DEEPEST, names a key once and has no number of more than DIGITS digits;
whatever else is wrong is a ValueError of one line too, so that a reader has one kind of error to tell of. Regular expressions of folders and recipes
run in Python's own engine, which may try for ever: `tame` lets through those that cannot. Limit: what a file means is for its reader to judge.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

DEEPEST, DIGITS, LARGEST = 64, 40, 16 << 20  # levels of JSON, digits of a number, bytes of a file
TOKENIZER = 256 << 20  # bytes of a tokenizer.json, which is larger than all others
WIDE, LONGEST, NAME = 5, 1000, 128  # parts of a pattern that may match in many ways; its characters; those of a name that it is tried on
_BLANK: dict[str, Any] = {"parse_constant": lambda _: None}
_CLASS = re.compile(r"\[\^?\]?[^\]]*\]")  # where no character is escaped any more
_FINITE: dict[str, Any] = {"parse_constant": lambda number: _finite(number), "parse_float": lambda number: _finite(number)}


def parse(text: str | bytes, unique: bool = True, blank: bool = False, finite: bool = False) -> Any:
    """A value of JSON; ValueError for what is none, nests too deep, has huge numbers or, if `unique`, a key twice.

    blank: NaN and infinities are null. finite: they are refused, and so is a number beyond the range of floats.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    told = _BLANK if blank else _FINITE if finite else {}
    try:
        value = json.loads(text, parse_int=_whole, object_pairs_hook=_once if unique else None, **told)
    except RecursionError:
        raise ValueError(f"it nests deeper than {DEEPEST} levels") from None
    if text.count("[") + text.count("{") > DEEPEST:
        bounded(value, len(text))
    return value


def bounded(value: Any, most: int) -> Any:
    """The value itself; ValueError if it nests too deep, or written out (YAML's aliases are no copies) is of more than `most` parts."""
    level, count = [value], 0
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict | list | tuple | set):
                below.extend(each)
                below.extend(each.values() if isinstance(each, dict) else ())
                if count + len(below) > most:
                    raise ValueError(f"it holds more than {most} values")
            elif isinstance(each, int) and abs(each) >= 10**DIGITS:
                raise ValueError(f"it holds a number of more than {DIGITS} digits")
        level, count = below, count + len(below)
        if not level:
            return value
    raise ValueError(f"it nests deeper than {DEEPEST} levels")


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """What a regular file holds; ValueError for more than `most` bytes, and for pipes, which would be waited for. OSError as it comes."""
    if stat.S_IFMT(os.stat(path).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than the {most} bytes that such a file may have")
    return content


def read(path: Path, most: int = LARGEST, blank: bool = False) -> Any:
    """The JSON of a file; ValueError as `parse` and `read_bytes` raise it, OSError as it comes."""
    return parse(read_bytes(path, most), blank=blank)


def tame(pattern: str) -> str | None:
    """Why a regular expression could take for ever on a name, or None: it repeats groups, refers back, or may match in very many ways."""
    if len(pattern) > LONGEST:
        return f"it has {len(pattern)} characters, and {LONGEST} are enough"
    plain = pattern.replace("\\\\", "e")
    if re.search(r"\\[1-9]|\(\?P=", plain):
        return "it refers back to its groups"
    plain = re.sub(r"\\.", "e", plain, flags=re.DOTALL)
    if re.search(r"\(\?(?:#|[a-zA-Z-]*x)", plain):
        return "it has comments, or a verbose mode, which hide what it repeats"
    plain = _CLASS.sub("c", plain)  # last: an escaped bracket, or one in a comment, begins no class
    if re.search(r"\)(?:[*+]|\{)", plain):
        return "it repeats a group"
    if len(re.findall(r"[*+]|\{\d*,", plain)) > WIDE or plain.count("|") > LONGEST // 10 or len(re.findall(r"\([^()]*\||[^(*+}]\?", plain)) > WIDE:
        return f"it has more than {WIDE} parts such as .*, or (a|b)"
    return None


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {number[:DIGITS]}, which is not finite")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it names {twice[:60]!r} twice")
    return out
