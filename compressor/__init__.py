"""Compress a language model to 2, 3 or 4 bits, fine-tune it in that form, and write what servers load.

    import compressor

    model = compressor.load("llama-7b").compress(bits=3)
    model.tune(data="domain.jsonl")
    model.save("llama-7b-w3g128")

`compressor.run(recipe)` is the whole job of the command line. Importing this package touches no device, no network, no torch and no
transformers; the functions load what they need when they are called. It does leave a note for transformers, if and when that is imported, that
folders of ours are loaded by us (integrations/hook.py).
"""

from typing import TYPE_CHECKING, Any

from compressor.integrations.hook import install as _install

__version__ = "0.1.0"
__all__ = ["Model", "Recipe", "load", "run"]

if TYPE_CHECKING:
    from compressor.pipelines.api import Model, load, run
    from compressor.recipe import Recipe

_install()


def __getattr__(name: str) -> Any:
    if name == "Recipe":
        from compressor.recipe import Recipe

        return Recipe
    if name in __all__:
        from compressor.pipelines import api

        return getattr(api, name)
    raise AttributeError(f"module 'compressor' has no attribute {name!r}")
