"""The part of a model card that says who loads the folder, with which command; the rules are those of `compressor doctor` (servers.py)."""

from pathlib import Path

from compressor.errors import ModelError
from compressor.pipelines import folder_facts, servers


def section(folder: Path) -> str:
    """Markdown: one line a server that loads the folder, FOLDER standing for its place; nothing for what the rules are not about, as encoders."""
    try:
        found = folder_facts.facts(folder)
    except ModelError:
        return ""
    if found.format != "gguf" and not found.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return ""
    files = sorted(folder.glob("*.gguf")) if found.format == "gguf" else []
    place = Path("FOLDER", files[0].name) if files else Path("FOLDER")
    rows = [servers.judge(name, found, place) for name in servers.SERVERS]
    lines = []
    for row in rows:
        if row.command is not None:
            needs = "; ".join([*row.reasons, f"{row.versions}, {row.cards}"])
            lines.append(f"- {row.server} ({needs}):\n\n  ```sh\n  {row.command}\n  ```\n")
    refused = ", ".join(row.server for row in rows if row.command is None)
    rest = f"\n`compressor doctor FOLDER` says why not with {refused}.\n" if refused else ""
    return "## Serve\n\n" + "\n".join(lines) + rest if lines else ""
