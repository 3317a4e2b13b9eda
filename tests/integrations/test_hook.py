"""`import compressor` registers with transformers in either order of imports, without importing it."""

import subprocess
import sys

import pytest

FIRST = "import compressor, sys\nassert not {'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules)\n"
KNOWN = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as M, AUTO_QUANTIZATION_CONFIG_MAPPING as C\n"
CHECK = KNOWN + "assert M['compressor'].__name__ == 'CompressorQuantizer' and C['compressor'].__name__ == 'CompressorConfig'\n"
ONE = "assert len([f for f in sys.meta_path if 'compressor' in type(f).__module__]) == 1, sys.meta_path\n"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], check=False, timeout=300, capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        FIRST + "import transformers\nassert 'compressor.packed' not in sys.modules\n" + CHECK + ONE,
        FIRST + "from transformers import AutoModelForCausalLM, PreTrainedModel\n" + CHECK + ONE,
        "import sys, transformers.quantizers.auto\nimport compressor\n" + CHECK + ONE,
        "import sys, transformers\nimport compressor\n" + CHECK + ONE,
        FIRST + "from compressor.integrations import hook\nhook.install(), hook.install()\n" + CHECK + ONE + "hook.install()\n" + CHECK + ONE,
        FIRST + CHECK + "import inspect, transformers.quantizers.auto as a\nassert 'register_quantizer' in inspect.getsource(a)\n" + ONE,
        FIRST + CHECK + "import importlib, transformers.quantizers.auto as a\nimportlib.reload(a)\n" + CHECK + ONE,
    ],
    ids=["ours first", "ours first, lazy names", "theirs first", "theirs first, lazy", "twice", "source stays readable", "reload"],
)
def test_registered_in_either_order(code: str) -> None:
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_without_compressor_transformers_does_not_know_the_method() -> None:
    assert python(KNOWN + "assert 'compressor' not in M and 'compressor' not in C\n").returncode == 0


def test_an_import_that_fails_is_tried_again() -> None:
    """Here the first run of the module fails."""
    code = FIRST + (
        "class Broken:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'transformers.quantizers.quantizer_vptq':\n"
        "            sys.meta_path.remove(self)\n"
        "            raise ImportError('once')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "try:\n"
        "    import transformers.quantizers.auto\n"
        "except ImportError as error:\n"
        "    assert str(error) == 'once'\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    done = python(code + CHECK + ONE)
    assert done.returncode == 0, done.stderr


def test_a_registration_that_fails_is_a_warning() -> None:
    code = FIRST + "import warnings\nsys.modules['compressor.integrations.transformers'] = None\n" + "warnings.simplefilter('always')\n"
    done = python(code + KNOWN + "assert 'compressor' not in M\n")
    assert done.returncode == 0, done.stderr
    assert "transformers cannot load folders of compressor in this process" in done.stderr
