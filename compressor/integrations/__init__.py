"""Other libraries' plug-ins: each imports its library inside, nothing of the package imports them but the hook in `compressor/__init__.py`."""
