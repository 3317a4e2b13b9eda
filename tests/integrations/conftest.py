"""The small packed models and windows of the tuners' tests."""

from tests.tune.conftest import packed_llama, sketched_llama, windows

__all__ = ["packed_llama", "sketched_llama", "windows"]
