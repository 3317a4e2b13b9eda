"""Imports point one way: pipelines -> tune -> quant, sketch, prune, export -> packed, linear, stats, recipe -> kernels -> torch, triton."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "compressor"
RANK = {
    "errors": 0,
    "strict": 0,
    "memory": 0,
    "stopping": 0,
    "disk": 0,
    "kernels": 1,
    "specs": 1,
    "world": 1,
    "packed": 2,
    "presets": 2,
    "recipe": 2,
    "view": 2,
}
RANK |= {"linear": 3, "stored": 3, "stats": 3, "hessian": 3}
RANK |= {"packing": 4, "prune": 5, "rotate": 5, "quant": 5, "sketch": 5, "export": 5, "tune": 6, "integrations": 7, "pipelines": 8}
FREE = {"__init__", "__main__"}  # the package's own front door
HEAVY = {"transformers", "datasets", "typer", "rich", "matplotlib", "peft", "huggingface_hub", "gguf", "vllm", "mlx", "gptqmodel", "bitsandbytes"}
HEAVY |= {"lm_eval", "optuna", "scipy"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_point_down() -> None:
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room in FREE:
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "compressor" and parts[1] != room and parts[1] != "__version__":
                assert RANK[parts[1]] < RANK[room] or {parts[1], room} == {"packed", "recipe"}, f"{path} imports {name}"
            assert parts[0] not in {"kernels", "pipelines"}, f"{path} imports {name}: write compressor.{name}"
            if RANK[room] < 7:
                assert parts[0] not in HEAVY, f"{path} imports {name}, which only pipelines may know"


def test_sizes_of_files_and_functions() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= 400, f"{path} is longer than 400 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                jitted = any("jit" in ast.dump(d) for d in node.decorator_list)
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= (120 if jitted else 60), f"{path}: {node.name} has {lines} lines"


def test_no_init_in_the_rooms_whose_short_names_others_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "pipelines" / "__init__.py").exists()
