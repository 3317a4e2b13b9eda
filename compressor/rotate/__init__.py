"""Exact changes of basis inside a dense model, merged into neighbouring weights before it is packed: nothing of them is left at run time."""
