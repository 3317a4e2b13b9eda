"""The tree drawn in errors.py is the tree there is, and nothing in the package raises a bare Exception."""

import ast
import inspect
import re
from pathlib import Path

from compressor import errors

ROOT = Path(__file__).resolve().parents[1] / "compressor"


def test_docstring_draws_every_class() -> None:
    drawn = set(re.findall(r"\b([A-Z]\w+(?:Error|Extra|Process))\b", errors.__doc__ or ""))
    real = {name for name, kind in inspect.getmembers(errors, inspect.isclass)}
    assert drawn == real


def test_user_errors_are_under_user_error() -> None:
    for name in ("RecipeError", "ModelError", "DataError", "OutputError", "MissingExtra"):
        assert issubclass(getattr(errors, name), errors.UserError)
    assert not issubclass(errors.NumericError, errors.UserError)


def test_only_our_errors_are_raised_by_pipelines() -> None:
    allowed = {name for name, kind in inspect.getmembers(errors, inspect.isclass)} | {
        "AttributeError",
        "ValueError",
        "TimeoutError",
        "_Stop",
        "unlockable",
        "_linked",
    }
    for path in (ROOT / "pipelines").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                assert node.exc.func.id in allowed, f"{path}:{node.lineno} raises {node.exc.func.id}"
