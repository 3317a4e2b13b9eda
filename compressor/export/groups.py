"""The `quantization_config` of our own formats: groups of modules that are stored alike, named one by one; damage is an error."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from compressor.errors import ModelError
from compressor.kernels import layout
from compressor.packed import PackedWeight

Scheme = TypeVar("Scheme")


def unlike_ours(packed: Mapping[str, PackedWeight]) -> str | None:
    """Why our own formats cannot hold a weight that came from others: 8 bits, or columns in another order; else None."""
    for name, weight in packed.items():
        if weight.bits not in layout.BITS:
            return f"{name} has {weight.bits} bits, and the format knows 2, 3 and 4"
        if weight.columns is not None:
            return f"the columns of {name} are in another order (act-order), and the format knows none"
    return None


def read_groups(
    config: Mapping[str, Any], where: Path | str, kind: tuple[str, str, int, str], scheme_of: Callable[[Mapping[str, Any], str], Scheme]
) -> dict[str, Scheme]:
    """{module: its scheme} of a quantization_config of our own formats; ModelError if it is of another format or version, or damaged.

    kind: quant_method, format, version, and what people call it. scheme_of reads one group, with how an error about the folder begins.
    """
    method, form, newest, name = kind
    if config.get("quant_method") != method or config.get("format") != form:
        raise ModelError(f"{where} is stored as {config.get('quant_method')}/{config.get('format')}, not as {method}/{form}")
    version = config.get("version")
    if type(version) is not int or version != newest:
        raise ModelError(f"{where} has version {version!r} of the {name} format, and this compressor reads version {newest}: update compressor")
    groups, damaged = config.get("groups"), f"{where}/config.json is damaged"
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ModelError(f"{damaged}: the groups of its quantization_config are no list of mappings")
    schemes: dict[str, Scheme] = {}
    for group in groups:
        scheme, modules = scheme_of(group, damaged), group.get("modules")
        if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
            raise ModelError(f"{damaged}: the modules of a group are no list of names")
        for module in modules:
            if module in schemes:
                raise ModelError(f"{damaged}: it lists {module} twice")
            schemes[module] = scheme
    return schemes
