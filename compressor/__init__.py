"""Compress a language model to 2, 3 or 4 bits and fine-tune it in that form."""

__version__ = "0.1.0"
