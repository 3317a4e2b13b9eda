"""Measurements kept by what they depend on, so that a second identical call computes nothing.

An entry is one small JSON file named by the digest of its key; a key is a plain mapping: the kind of measurement, digests of the model and of the
text, every number of the protocol, the kind of device, the kernels, the versions of the software. An entry holds its whole key, its result, when it
was measured, and a digest of all that: what is damaged, cut short or of another key counts as absent and is measured again.

Price: a model's digest is read from all of its bytes each time, about a second a gigabyte; sizes and times of files are not trusted to tell that
nothing changed. Limits: entries are never deleted (a few kilobytes each; delete the folder as you like). Speeds in an entry are those of the day it
was measured, on the machine that did: two machines that share a folder share them, too.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from compressor import __version__, strict
from compressor.integrations import peft
from compressor.kernels import dispatch
from compressor.pipelines import checkpoint
from compressor.pipelines.output import read_report
from compressor.pipelines.show import Show

SCHEMA = 1  # to be raised when what is measured, or how, changes: older entries then count as absent


@dataclass
class Cache:
    """`folder` None keeps nothing and finds nothing. `show` is told, once, if the folder cannot be written."""

    folder: Path | None
    show: Show
    writable: bool = True

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result that was put under an equal key, with "cached" True and "measured", its date; None if there is none or it is damaged."""
        if self.folder is None:
            return None
        try:
            entry = strict.read(self.folder / f"{digest(key)}.json")
            whole = entry["key"] == dict(key) and entry["sha256"] == _seal(entry) and isinstance(entry["result"], dict)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return entry["result"] | {"cached": True, "measured": entry["measured"]} if whole else None

    def put(self, key: Mapping[str, Any], result: dict[str, Any], keep: bool = True) -> dict[str, Any]:
        """Keep a result; returns it with "cached" False and "measured". A folder that cannot be written costs a line, not the measurement.

        `keep` False: a result that another try may better, and that is only returned.
        """
        entry: dict[str, Any] = {"key": dict(key), "result": result, "measured": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        if keep and self.folder is not None and self.writable:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _write(self.folder / f"{digest(key)}.json", json.dumps(entry | {"sha256": _seal(entry)}, indent=1))
            except OSError as error:
                self.writable = False
                self.show.say(f"measurements are not kept: {self.folder} cannot be written ({error.strerror or error})")
        return result | {"cached": False, "measured": entry["measured"]}


def _write(path: Path, text: str) -> None:
    """Under a temporary name of its own, then renamed: containers that share a folder share process ids, too."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(key: Mapping[str, Any]) -> str:
    """Hex digest of a mapping of JSON values, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _seal(entry: Mapping[str, Any]) -> str:
    return digest({name: entry[name] for name in ("key", "result", "measured")})


def base_key(device: str) -> dict[str, Any]:
    """What every measurement depends on besides model and text: kind of device, kernels, versions, and that of these entries."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"schema": SCHEMA, "device": device, "kernels": dispatch.describe(), "compressor": __version__} | versions


def model_digest(folder: Path) -> str:
    """Digest of every byte that decides what a folder computes: `checkpoint.fingerprint`, and the adapter beside it."""
    beside = sorted(path for path in (folder / peft.FOLDER).glob("*") if path.is_file())
    parts = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in beside}
    return digest({"model": checkpoint.fingerprint(folder), "adapter": parts})


def size_digest(folder: Path) -> str:
    """Digest of what sizes depend on besides the model: the bytes of the dense one, which report.json names, and those of all files."""
    model = read_report(folder).get("model")
    dense = model.get("dense_bytes") if isinstance(model, dict) else None
    return digest({"dense": str(dense), "bytes": checkpoint.model_bytes(folder)})
