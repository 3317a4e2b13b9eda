"""The report of a run: one plain value, filled as the run goes and saved after every stage.

Every section may be missing, so a run that stops midway still leaves a readable report.json. JSON has no NaN or infinity: such numbers are
written as null and named in `notes`, because a perplexity that silently becomes null would hide the failure that matters most. Files are
written under a temporary name and renamed, so a reader never meets half a report. Limit: only the top level is checked when loading.
"""

import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from compressor import __version__, disk, strict
from compressor.errors import ModelError, OutputError

STATES = ("dense", "pruned", "packed", "tuned")  # the models a run measures, in this order
LOST_NAMED = 8  # non-finite numbers that the note names one by one
DASH = "–"
HEADS = ("model", "perplexity, domain", "perplexity, outside", "bits per packed weight", "bits per parameter, whole folder", "folder", "smaller by")
SCORES = {"accuracy": "accuracy", "entity_f1": "F1 of entities", "macro_f1": "macro F1", "exact_match": "exact match", "f1": "F1"}  # of encoders


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Report:
    """Sections as they stand in report.json; the key lists are in docs and in the stages that fill them."""

    compressor: str = __version__
    created: str = field(default_factory=_now)
    command: str | None = None
    keys: str | None = None  # fingerprint of model, data and recipe, so that the same command finds its finished folder
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)  # domain | outside -> how perplexity was measured
    dense: dict[str, Any] = field(default_factory=dict)
    pruned: dict[str, Any] = field(default_factory=dict)
    packed: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)  # what was asked of the size or the loss, predicted, chosen layer by layer, and reached
    layers: list[Any] = field(default_factory=list)
    unpacked: list[Any] = field(default_factory=list)
    experts: dict[str, Any] = field(default_factory=dict)  # how the calibration text reached them
    pruning: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, Any] = field(default_factory=dict)
    peak_bytes: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)  # peak bytes by stage as they were stated before the work, of runs block by block
    samples: list[Any] = field(default_factory=list)
    export: dict[str, Any] = field(default_factory=dict)
    resumed: bool = False
    notes: list[Any] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values only; sections that nothing was written into are left out."""
        lost: list[str] = []
        values = {f.name: plain(getattr(self, f.name), f.name, lost) for f in fields(self)}
        if lost:
            more = f" and {len(lost) - LOST_NAMED} more" if len(lost) > LOST_NAMED else ""
            values["notes"].append(f"not finite, written as null: {', '.join(lost[:LOST_NAMED])}{more}")
        return {key: value for key, value in values.items() if value not in (None, {}, [])}

    @classmethod
    def from_dict(cls, values: Any, where: str = "report") -> "Report":
        """The inverse of `to_dict`; keys of a later version are dropped, a section of the wrong kind is an error."""
        if not isinstance(values, dict):
            raise ModelError(f"{where} holds {type(values).__name__} where a report is expected; write it again with a new run")
        known = {f.name: getattr(cls(), f.name) for f in fields(cls)}
        out = {key: value for key, value in values.items() if key in known and value is not None}
        for key, value in out.items():
            kind = str if known[key] is None else type(known[key])
            if not isinstance(value, kind):
                raise ModelError(f"{where}: {key} must be {kind.__name__}, not {type(value).__name__}; write the report again with a new run")
        return cls(**out)

    def save(self, path: str | os.PathLike[str]) -> None:
        write_text(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Report":
        try:
            values = strict.read(Path(path), blank=True)
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}); give a report.json that a run wrote") from None
        except ValueError as error:
            raise ModelError(f"{path} is not JSON ({error}); give a report.json that a run wrote") from None
        return cls.from_dict(values, str(path))


def plain(value: Any, where: str, lost: list[str]) -> Any:
    """`value` as JSON values: arrays and scalars of torch or numpy, tuples, sets, paths and dtypes included; non-finite floats go to `lost`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        lost.append(f"{where} ({value})")
        return None
    if isinstance(value, dict):
        return {str(k): plain(v, f"{where}.{k}", lost) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}.{i}", lost) for i, v in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value), where, lost)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), where, lost)
    return str(value)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """As `write_bytes`; what is not Unicode text is written as \\udcXX."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write beside `path` under a temporary name, to the disk, then rename. OutputError if that cannot be."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        disk.sync(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror}); check the folder and the free space on its disk") from None
    finally:
        temporary.unlink(missing_ok=True)


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on besides the recipe; CUDA is asked only when `device` is a CUDA device."""
    import torch

    cuda = device.startswith("cuda")
    versions = {name.replace("-", "_"): _version(name) for name in ("torch", "transformers", "compressed-tensors", "triton")}
    return {
        "python": platform.python_version(),
        **versions,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# Reading a report that may lack anything, for page, card and terminal alike.


def dicts(values: Any) -> list[dict[str, Any]]:
    """The dicts of a list; anything else that a damaged report holds is passed over."""
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def number(values: Any, *keys: str) -> float | None:
    """The finite number at values[key][key]…, or None."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    good = isinstance(values, int | float) and not isinstance(values, bool) and abs(values) <= sys.float_info.max
    return values if good else None


def short_names(names: Iterable[str]) -> dict[str, str]:
    """name -> how readers see it: of a path its last part, and of equal ones as many folders before it as tell them apart.

    Paths of the machine that ran say nothing to a reader; report.json keeps them.
    """
    parts = {name: [part for part in re.split(r"[/\\]", name) if part] or [name] for name in names}
    out = {}
    for name, own in parts.items():
        others = [other for key, other in parts.items() if key != name]
        kept = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        out[name] = "/".join(own[-kept:])
    return out


def fixed(value: float | None, digits: int = 3, unit: str = "") -> str:
    """12.345, or a dash; very large and very small numbers in three figures."""
    if value is None:
        return DASH
    usual = value == 0 or 10.0**-digits <= abs(value) < 1e5
    return (f"{value:,.{digits}f}" if usual else f"{value:.3g}") + unit


def size(value: float | None) -> str:
    if value is None:
        return DASH
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f} bytes"


def duration(value: float | None) -> str:
    if value is None:
        return DASH
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def scores(report: Report) -> list[str]:
    """The two numbers of `SCORES` that an encoder was measured by; none for a language model."""
    found = [getattr(report, state).get("task") for state in STATES]
    return [key for key in SCORES if any(isinstance(task, dict) and key in task for task in found)][:2]


def heads(report: Report) -> tuple[str, ...]:
    """HEADS, with an encoder's scores in the place of perplexities."""
    found = scores(report)
    return (HEADS[0], *(SCORES[key] for key in found), *HEADS[3:]) if len(found) == 2 else HEADS


def results(report: Report) -> list[list[str]]:
    """The cells under `heads` for each state that was measured."""
    found = scores(report)
    rows = []
    for state in STATES:
        values = getattr(report, state)
        if values:
            folder, count = number(values, "folder_bytes"), number(report.model, "parameters")
            whole = folder * 8 / count if folder is not None and count else None
            ppl = [fixed(number(values, text, "perplexity")) for text in ("domain", "outside")]
            if len(found) == 2:
                ppl = [fixed(number(values, "task", key), 4 if (number(values, "task", key) or 0) <= 1 else 2) for key in found]
            rows.append([state, *ppl, fixed(number(values, "bits_per_weight")), fixed(whole), size(folder), fixed(number(values, "ratio"), 2, "×")])
    return rows


def remarks(report: Report) -> list[str]:
    """What a reader must know before comparing the numbers; then the notes of the run."""
    out = []
    measured = [s for s in STATES if getattr(report, s)]
    if measured and not report.dense:
        out.append("The dense model was not measured in this run.")
    for text in ("domain", "outside"):
        tokens = {s: number(getattr(report, s), text, "tokens") for s in measured}
        tokens = {s: n for s, n in tokens.items() if n is not None}
        if len(set(tokens.values())) > 1:
            out.append(f"Perplexities on the {text} text do not compare: " + ", ".join(f"{s} on {n:,.0f} tokens" for s, n in tokens.items()) + ".")
    if report.export and report.export.get("verified") is not True:
        out.append("The written folder was not verified by reading it back.")
    if report.resumed:
        out.append("The run was resumed: its times count only the work after that.")
    told = [note for section in (report.pruning, report.training) if isinstance(notes := section.get("notes"), list) for note in notes]
    return out + [str(n) for n in [*report.notes, *told]]
