"""The short forms that flags and files use, read: how to pack, how to prune, sizes and shares."""

import re
from typing import Any

from compressor.errors import RecipeError


def means(key: str, name: str) -> bool:
    """Whether a key of Quant.layers means the linear of this name."""
    return re.search(key[3:], name) is not None if key.startswith("re:") else key == name


def parse_quant(text: str) -> dict[str, Any]:
    """ "3bit", "3bit:rtn", "sketch3", "w3g64", "w3g64:asym" or "W3A16" -> keys of Quant."""
    if (m := re.fullmatch(r"(.+):(a?sym)", text, re.IGNORECASE)) and not re.search(r":a?sym$", m[1], re.IGNORECASE):
        return parse_quant(m[1]) | {"symmetric": m[2].lower() == "sym"}
    if m := re.fullmatch(r"(\d{1,6})[-_]?bits?(?::(\w+))?", text, re.IGNORECASE):
        return {"bits": int(m[1])} | ({"packer": m[2].lower()} if m[2] else {})
    if m := re.fullmatch(r"w(\d{1,6})(?:a16)?(?:g(-?\d{1,9}))?(?::(\w+))?", text, re.IGNORECASE):
        return {"bits": int(m[1])} | ({"group": int(m[2])} if m[2] else {}) | ({"packer": m[3].lower()} if m[3] else {})
    if m := re.fullmatch(r"sketch[-_:]?(\d{1,6})(?:[-_]?bits?)?", text, re.IGNORECASE):
        return {"bits": int(m[1]), "packer": "sketch"}
    raise RecipeError(f"{text!r} is not understood as a way to pack; write for example 3bit, 3bit:rtn, 3bit:asym, sketch3, w3g64 or W3A16")


def parse_size(text: str) -> int:
    """ "2.6GB", "700 MB", "1.5GiB" or "1200000" -> bytes."""
    m = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b?", text.strip(), re.IGNORECASE)
    if m is None or not 0 < float(m[1]) < 1e18:
        raise RecipeError(f"--target-size {text!r} is not understood; write for example 2.6GB, 700MB or 1.5GiB")
    return int(float(m[1]) * (1024 if m[3] else 1000) ** " kmgt".index(m[2].lower() or " "))


def parse_share(text: str) -> float:
    """ "2%" or "0.02" -> 0.02."""
    m = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", text.strip())
    if m is None or not 0 < float(m[1]) < (1e6 if m[2] else 1):
        raise RecipeError(f"--max-loss {text!r} is not understood; write for example 2% or 0.02")
    return float(m[1]) / (100 if m[2] else 1)


def parse_prune(text: str) -> dict[str, Any]:
    """ "loraprune:30%", "obert:0.9", "obert:80%:4block" or "obert:2:4" -> keys of Prune; without a pattern that of the method."""
    method, _, rest = text.lower().partition(":")
    if m := re.fullmatch(r"(\d{1,6}):(\d{1,6})", rest):
        keep, of = int(m[1]), int(m[2])
        if not 0 < keep < of:
            raise RecipeError(f"--prune {text!r} keeps {keep} of {of}: write for example {method}:2:4")
        return {"method": method, "ratio": 1 - keep / of, "pattern": rest}
    m = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)(?::(structured|unstructured|4block))?", rest)
    if m is None or not re.fullmatch(r"[a-z]+", method) or method == "none":
        raise RecipeError(f"--prune {text!r} is not understood; write for example loraprune:30%, obert:90%, obert:80%:4block or obert:2:4")
    share = float(m[1]) / (100 if m[2] else 1)
    if not 0 < share < 1:
        raise RecipeError(f"--prune {text!r} asks for {share:g} of the parameters: give a share between 0 and 1, or a percentage such as 30%")
    return {"method": method, "ratio": share, "pattern": m[3]}
