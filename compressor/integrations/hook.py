"""Registers our folders with transformers, whichever of the two is imported first, and never imports transformers itself.

transformers has a registry of quantizers and no entry points that fill it. So: if its registry module is imported already, register at once;
and an import finder waits for that one module, and registers right after it has run, or has run again. Every other import it passes by.
A registration that fails is a warning, because a process that uses transformers for something else must not fail for our sake.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "transformers.quantizers.auto"


def install() -> None:
    """Register now, or as soon as transformers is imported; calling it again changes nothing."""
    if TARGET in sys.modules:
        _register()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        from compressor.integrations.transformers import register

        register()
    except Exception as error:  # of a version that we do not know, or of a broken installation: whatever it raises
        warnings.warn(f"transformers cannot load folders of compressor in this process: {error}", RuntimeWarning, stacklevel=2)


class _Finder(MetaPathFinder):
    searching = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that the other finders give for TARGET, its loader followed by the registration; None for any other module."""
        if name != TARGET or self.searching:  # the latter where another finder asks all finders in its turn
            return None
        self.searching = True
        try:
            others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
            spec = next((found for finder in others if (found := finder.find_spec(name, path, target)) is not None), None)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: object) -> None:
        run = getattr(loader, "exec_module")  # noqa: B009  (loaders are typed without it)

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register()

        setattr(loader, "exec_module", exec_module)  # noqa: B010  (an attribute of this one loader: modules are loaded by loaders of their own)
