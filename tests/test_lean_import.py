"""Importing the package does no work: no device, no transformers, no network."""

import subprocess
import sys


def test_import_is_lean() -> None:
    code = (
        "import sys, compressor, compressor.recipe, compressor.errors\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'triton', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import compressor.packed, compressor.linear, compressor.quant, compressor.tune, torch\n"
        "heavy = {'transformers', 'datasets', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names() -> None:
    import compressor

    for name in compressor.__all__:
        assert callable(getattr(compressor, name))
