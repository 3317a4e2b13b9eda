"""`compressor doctor FOLDER --server NAME`: whether a folder will load there, why not, what it needs, and the command that starts it.

What servers take is data: RULES, each with whether it was run (bench/interop) or only read in the server's source. The same rules make the tables of
docs/serving.md (`section`), so that text and tool cannot disagree. Limits: rules are of the versions named; a server's own limits of memory, of
parallelism and of architectures that nobody tried here are not known.
"""

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from compressor.errors import RecipeError
from compressor.pipelines import checkpoint, digests, folder_facts
from compressor.pipelines.card import RANKS
from compressor.pipelines.folder_facts import Facts, Scheme

YES, CONDITIONS, NO, UNKNOWN = "yes", "with conditions", "no", "unknown"
RAN, READ = "run", "read"
PACKED = ("compressed-tensors", "gptq", "awq")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gptneox", "olmo2", "smollm3")  # that servers are known to know
PYTHON = "python -c "  # what follows is code, in which names stand as Python writes them
STRANGE = "compressor does not know this format; ask the server's own documentation"
PLUGIN = "CUDA, sm80 and later; CPUs: AVX-512"  # compressor's in vLLM


@dataclass(frozen=True)
class Server:
    """versions: those that the rules are of. wants: what of `export --to` loads there. commands: how to start it, by format, "" for any other;
    elsewhere: cards of formats for which they are others than `cards`."""

    versions: str
    cards: str
    wants: str
    commands: dict[str, str]
    elsewhere: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """If a folder is in one of `formats` and `when` holds, `verdict` and `why`; seen: run here, or read in the server's source. Beside "yes", `why`
    is a need or a limit of this very folder."""

    server: str
    formats: tuple[str, ...]
    verdict: str
    why: str
    seen: str
    when: Callable[[Facts], bool] = lambda found: True


@dataclass(frozen=True)
class Advice:
    server: str
    verdict: str
    reasons: tuple[str, ...]
    seen: str
    versions: str
    cards: str
    command: str | None


SERVERS = {
    "vllm": Server(
        "vLLM 0.32", "CUDA, sm80 and later (Marlin; compressor's plug-in); CPUs: AVX-512",
        "compressed-tensors or gptq, 4 bits and symmetric", {"gptq": "vllm serve {folder} --dtype float16", "": "vllm serve {folder}"},
        {"dense": "CUDA; CPUs: AVX-512", "gguf": "CUDA", "table": PLUGIN, "sparse": PLUGIN},
    ),
    "llama.cpp": Server(
        "llama.cpp of 2026", "CPUs, Metal, CUDA, Vulkan, ROCm", "gguf", {"": "llama-server -m {folder} -c 4096 --port 8080"},
    ),
    "transformers": Server(
        "transformers 5.23", "any; weights become dense while loading, except tables'", "compressed-tensors",
        {
            "gguf": f"{PYTHON}from transformers import AutoModelForCausalLM as A; A.from_pretrained({{parent}}, gguf_file={{name}})",
            "table": f"{PYTHON}import compressor; from transformers import AutoModelForCausalLM as A; A.from_pretrained({{folder}})",
            "sparse": f"{PYTHON}import compressor; from transformers import AutoModelForCausalLM as A; A.from_pretrained({{folder}})",
            "asymmetric": f"{PYTHON}from transformers import AutoModelForCausalLM as A, CompressedTensorsConfig as C; "
            "A.from_pretrained({folder}, quantization_config=C(dequantize=True))",
            "": "transformers serve {folder}",
        },
        dict.fromkeys(("dense", "gguf", "table", "sparse"), "any"),
    ),
    "sglang": Server(
        "SGLang 0.5.23", "CUDA, sm80 and later", "compressed-tensors or gptq, 4 bits and symmetric",
        {"": "python -m sglang.launch_server --model-path {folder} --port 30000"},
    ),
    "gptqmodel": Server(
        "GPTQModel 7.6", "CUDA; CPUs", "gptq", {"": f"{PYTHON}from gptqmodel import GPTQModel; GPTQModel.load({{folder}}).serve(port=8000)"},
    ),
    "auto-gptq": Server(
        "auto-gptq 0.7.1 with transformers 4.46", "CUDA; CPUs", "gptq",
        {"": f"{PYTHON}from transformers import AutoModelForCausalLM as A, GPTQConfig as C; "
            "A.from_pretrained({folder}, quantization_config=C(bits={bits}, use_exllama=False))"},
    ),
    "mlx": Server("mlx-lm 0.32", "Apple silicon; CPUs", "mlx", {"": "mlx_lm.server --model {folder} --port 8080"}),
}  # fmt: skip


def only(*bits: int) -> Callable[[Facts], bool]:
    return lambda found: found.bits <= set(bits)


def beyond(*bits: int) -> Callable[[Facts], bool]:
    return lambda found: not found.bits <= set(bits)


def eight(found: Facts) -> bool:
    return 8 in found.bits and found.bits <= {4, 8}


def asymmetric(found: Facts) -> bool:
    return not found.symmetric


def odd_group(found: Facts) -> bool:
    return not found.groups <= {-1, 32, 64, 128}


def ragged(found: Facts) -> bool:
    return any(n % 64 or k % 128 for n, k in found.shapes.values())


def experts(*bits: int) -> Callable[[Facts], bool]:
    """Whether there are experts, of other widths than these or with zeros."""
    return lambda found: any(scheme.bits not in bits or not scheme.symmetric for kinds in found.experts.values() for scheme in kinds)


def unlike(found: Facts) -> bool:
    """Whether experts of a block are packed in different ways."""
    return any(len(kinds) > 1 for kinds in found.experts.values())


def split(found: Facts) -> bool:
    return found.split() is not None


BESIDE = "compressor's plug-in must be installed beside vLLM: pip install --no-deps compressor (docs/vllm.md)"
HUMMING = f"{BESIDE}; on CUDA, sm75 and later, vLLM's optional Humming kernel does, too"
FUSED = "layers that it fuses (q, k, v; gate, up) are packed in different ways"
RULES = (
    Rule("vllm", ("dense",), YES, "", RAN),
    Rule("vllm", ("compressed-tensors",), YES, "", RAN, only(4)),
    Rule("vllm", ("compressed-tensors",), YES, "CPUs need compressor's plug-in", READ, eight),
    Rule("vllm", ("compressed-tensors",), CONDITIONS, HUMMING, RAN, beyond(4, 8)),
    Rule("vllm", ("compressed-tensors",), CONDITIONS, "act-order was not looked at", READ, lambda f: f.act_order and only(4, 8)(f)),
    Rule("vllm", ("compressed-tensors",), NO, "its kernel for 2 and 3 bits takes no act-order", READ, lambda f: f.act_order and beyond(4, 8)(f)),
    Rule("vllm", ("gptq",), CONDITIONS, f"by itself it takes GPTQ only where weights are symmetric; {BESIDE}", RAN, asymmetric),
    Rule("vllm", ("gptq",), CONDITIONS, f"by itself it takes no act-order in groups; {BESIDE}", READ, lambda f: f.act_order and f.groups != {-1}),
    Rule("vllm", ("gptq",), YES, "", RAN, lambda f: f.symmetric and only(4)(f)),
    Rule("vllm", ("gptq",), YES, "CPUs need compressor's plug-in", READ, lambda f: f.symmetric and eight(f)),
    Rule("vllm", ("gptq",), CONDITIONS, f"by itself it takes GPTQ of 4 and 8 bits; {BESIDE}", RAN, lambda f: f.symmetric and beyond(4, 8)(f)),
    Rule("vllm", ("awq",), YES, "", READ),
    Rule("vllm", ("compressed-tensors", "gptq"), CONDITIONS, "kernels know groups of 32, 64 and 128 and whole rows", READ, odd_group),
    Rule("vllm", PACKED, CONDITIONS, "outputs that are no multiple of 64, or inputs of 128, need a version that pads", READ, ragged),
    Rule("vllm", ("awq",), NO, FUSED, READ, split),
    Rule("vllm", ("compressed-tensors", "gptq"), CONDITIONS, f"{FUSED}, which takes `--quantization compressor`; {BESIDE}", READ, split),
    Rule("vllm", ("table", "sparse"), CONDITIONS, BESIDE, RAN),
    Rule("vllm", ("table", "sparse"), NO, "the plug-in takes no packed experts", READ, lambda f: bool(f.experts)),
    Rule("vllm", ("compressed-tensors",), NO, "it takes experts of 4 and 8 bits, symmetric", READ, experts(4, 8)),
    Rule("vllm", ("compressed-tensors",), NO, "it takes experts of a block packed in one way", READ, unlike),
    Rule("vllm", ("compressed-tensors",), CONDITIONS, "its mixtures of experts were not run here", READ, lambda f: bool(f.experts)),
    Rule("vllm", ("gguf",), CONDITIONS, "GGUF is read by its own plug-in: pip install vllm-gguf-plugin", READ),
    Rule("llama.cpp", ("gguf",), YES, "", RAN),
    Rule("llama.cpp", ("gguf",), YES, "it rounds activations to 8 bits", RAN, lambda f: not set(f.types) <= {"F32", "F16", "BF16"}),
    Rule("transformers", ("dense",), YES, "", RAN),
    Rule("transformers", ("compressed-tensors",), YES, "needs compressed-tensors", RAN, lambda f: f.symmetric and 3 not in f.bits),
    Rule("transformers", ("compressed-tensors",), CONDITIONS, "3 bits need compressed-tensors 0.18 or later", RAN, lambda f: 3 in f.bits),
    Rule(
        "transformers", ("compressed-tensors",), CONDITIONS,
        "asymmetric weights need `dequantize=True`, which transformers serve cannot be told, and are formed in 16 bits", RAN, asymmetric,
    ),
    Rule(
        "transformers", ("compressed-tensors",), NO, "`dequantize=True`, which asymmetric weights need, knows one scheme for all layers", RAN,
        lambda f: f.mixed and not f.symmetric,
    ),
    Rule("transformers", ("compressed-tensors",), YES, "experts become dense, in the dtype of their scales", RAN, lambda f: bool(f.experts)),
    Rule("transformers", ("compressed-tensors",), NO, "it reads all experts by one scheme, and others wrongly without a word", RAN,
         lambda f: len(set().union(*f.experts.values())) > 1),
    Rule("transformers", ("compressed-tensors",), NO, "it reads no zeros of experts", RAN, experts(2, 3, 4, 8)),
    Rule("transformers", ("compressed-tensors",), NO, "checkpoints of this family hold all experts in one tensor: it would leave packed ones random",
         RAN, lambda f: f.merged),
    Rule("transformers", ("compressed-tensors",), NO, "compressed-tensors 0.20 reads no act-order", READ, lambda f: f.act_order),
    Rule("transformers", ("gptq", "awq"), CONDITIONS, "needs gptqmodel and optimum", RAN),
    Rule("transformers", ("gptq",), NO, "its loader takes one scheme for all layers", RAN, lambda f: f.mixed),
    Rule("transformers", ("table", "sparse"), CONDITIONS, "`import compressor` must come first; transformers serve does not import it", RAN),
    Rule("transformers", ("gguf",), CONDITIONS, "needs gguf, and makes weights dense", RAN),
    Rule("sglang", ("dense",), YES, "", READ),
    Rule("sglang", ("gptq",), YES, "", READ, lambda f: f.symmetric and only(4, 8)(f)),
    Rule("sglang", ("gptq",), NO, "it takes GPTQ of 4 and 8 bits only where weights are symmetric", READ, lambda f: asymmetric(f) or beyond(4, 8)(f)),
    Rule("sglang", ("compressed-tensors",), YES, "", READ, only(4, 8)),
    Rule("sglang", ("compressed-tensors",), NO, "it takes weights of 4 and 8 bits", READ, beyond(4, 8)),
    Rule("sglang", ("awq",), YES, "", READ),
    Rule("sglang", PACKED, NO, FUSED, READ, split),
    Rule("sglang", ("gguf",), CONDITIONS, "on CUDA only", READ),
    Rule("gptqmodel", ("gptq",), YES, "", RAN),
    Rule(
        "gptqmodel", ("gptq",), NO, "its own loader takes asymmetric weights only of `gptq_v2`; through transformers it takes these", RAN,
        lambda f: asymmetric(f) and f.version != "gptq_v2" and not f.maker.startswith("gptqmodel"),
    ),
    Rule("gptqmodel", ("awq",), YES, "", READ),
    Rule("auto-gptq", ("gptq",), YES, "", RAN),
    Rule("auto-gptq", ("gptq",), NO, "it does not know gptq_v2 and misreads it without a word", RAN, lambda f: f.version == "gptq_v2"),
    Rule("auto-gptq", ("gptq",), NO, "it takes one scheme for all layers", READ, lambda f: f.mixed),
    Rule(
        "auto-gptq", ("gptq",), NO, "it takes inputs and outputs in multiples of 32", RAN,
        lambda f: any(n % 32 or k % 32 for n, k in f.shapes.values()),
    ),
    Rule("mlx", ("dense",), YES, "", READ),
    Rule("mlx", ("mlx",), YES, "", RAN),
    Rule("mlx", ("awq",), CONDITIONS, "it turns 4-bit AWQ into its own format while loading", READ),
)  # fmt: skip


def advise(folder: Path | str, server: str | None = None) -> tuple[dict[str, Any], Table]:
    """(document for scripts, table for people) for one server or all; document["loads"] is {server: verdict}.

    RecipeError for an unknown server, ModelError for a folder that cannot be read.
    """
    if server is not None and server not in SERVERS:
        raise RecipeError(f"server {server!r} is unknown; choose {', '.join(SERVERS)}")
    place = Path(folder)
    place = place if place.suffix == ".gguf" and place.is_file() else checkpoint.resolve(str(folder))
    found = folder_facts.facts(place)
    rows = [judge(name, found, place) for name in ([server] if server else SERVERS)]
    shown = Table("server", "loads", "why, and what it needs", "start it with", title=Text(f"{place}: {folder_facts.describe(found)}"))
    kept = digests.recorded(place if place.is_dir() else place.parent)
    shown.caption = digests.mention(kept)
    for row in rows:
        where = f"{row.versions}; {row.cards} ({'run' if row.seen == RAN else 'not run'} here)"
        needs = [*row.reasons, *([where] if row.cards else [])]
        shown.add_row(row.server, row.verdict, Text("\n".join(needs)), Text(row.command or "–"), style="dim" if row.command is None else None)
    servers = [
        {
            "server": r.server,
            "verdict": r.verdict,
            "reasons": list(r.reasons),
            "seen": r.seen,
            "versions": r.versions,
            "cards": r.cards,
            "command": r.command,
        }
        for r in rows
    ]
    document = {"folder": str(folder)} | folder_facts.document(found) | {"digests": kept}
    return document | {"servers": servers, "loads": {r.server: r.verdict for r in rows}}, shown


def judge(name: str, found: Facts, folder: Path) -> Advice:
    """What a server makes of a folder with these facts."""
    server, cards = SERVERS[name], SERVERS[name].elsewhere.get(found.format, SERVERS[name].cards)
    if found.format not in folder_facts.KNOWN:
        return Advice(name, UNKNOWN, (STRANGE,), "", server.versions, "", None)
    rules = [rule for rule in RULES if rule.server == name and found.format in rule.formats and rule.when(found)]
    verdict = next((each for each in (NO, CONDITIONS, YES) if any(rule.verdict == each for rule in rules)), NO)
    heard = [rule for rule in rules if rule.verdict == verdict][: 1 if verdict == NO else None]
    reasons = [rule.why for rule in heard if rule.why]
    if verdict != NO:
        reasons += [rule.why for rule in rules if rule.verdict == YES and verdict == CONDITIONS and rule.why]
        verdict, more = _beside(name, found, verdict)
        reasons += more
    elif not heard:
        reasons = [f"it reads no {found.format} folders: compressor export FOLDER --to {server.wants.split()[0]} -o OUT"]
    seen = RAN if heard and all(rule.seen == RAN for rule in heard) else READ
    if found.uneven:
        verdict, reasons = NO, ["its blocks differ in width, which compressor alone can build"]
    command = None if verdict == NO else command_of(name, found, folder)
    return Advice(name, verdict, tuple(reasons), seen, server.versions, cards, command)


def _beside(name: str, found: Facts, verdict: str) -> tuple[str, list[str]]:
    """The verdict, and more conditions: of an adapter, and of the architecture."""
    reasons = []
    if found.adapter and (name != "vllm" or found.adapter != "lora"):
        kind = f", of the kind {found.adapter}," if name == "vllm" else ""
        reasons.append(f"the adapter beside the weights{kind} is left out: fold it in with compressor export FOLDER --to bf16 -o OUT")
    if not found.architecture.lower().startswith(FAMILIES):
        reasons.append(f"whether it knows {found.architecture or 'this architecture'} was not looked at")
    return (CONDITIONS if reasons else verdict), reasons


def command_of(name: str, found: Facts, folder: Path) -> str:
    """The command line that starts a server with a folder."""
    commands, kind = SERVERS[name].commands, found.format
    if name == "transformers" and kind == "compressed-tensors" and not found.symmetric:
        kind = "asymmetric"
    path = folder
    if found.format == "gguf" and folder.is_dir():
        path = next(iter(sorted(folder.glob("*.gguf"))), folder)
    command = commands.get(kind, commands[""])
    code = command.startswith(PYTHON)
    quoted = _literal if code else shlex.quote
    command = command.removeprefix(PYTHON if code else "")
    command = command.format(folder=quoted(str(path)), parent=quoted(str(path.parent)), name=quoted(path.name), bits=min(found.bits, default=4))
    command = f"{PYTHON}{shlex.quote(command)}" if code else command
    if name == "vllm" and kind in ("compressed-tensors", "gptq") and split(found):
        command += " --quantization compressor"
    if name == "vllm" and found.adapter == "lora":
        rank = next((rank for rank in RANKS if rank >= found.rank), RANKS[-1])
        command += f" --enable-lora --max-lora-rank {rank} --lora-modules tuned={shlex.quote(str(folder / 'adapter'))}"
    return command


def _literal(text: str) -> str:
    """Python's own way to write a text, in double quotes where it needs no escape, since the shell's are single ones."""
    plain = repr(text)
    return f'"{text}"' if plain == f"'{text}'" and '"' not in text else plain


def section() -> str:
    """The generated part of docs/serving.md: for every server its versions, cards and command lines, and what it takes."""
    lines: list[str] = []
    for name, server in SERVERS.items():
        advice = [judge(name, found, Path("FOLDER/model-auto.gguf" if found.format == "gguf" else "FOLDER")) for found in samples()]
        commands = list(dict.fromkeys(each.command for each in advice if each.command is not None))
        lines += [f"### {name}", "", f"{server.versions}. {server.cards}.", "", "```bash", *commands, "```", ""]
        lines += ["| format | weights | loads | why, what it needs | seen |", "|---|---|---|---|---|", *rows_of(name), ""]
    return "\n".join(lines).rstrip()


def rows_of(name: str) -> Iterable[str]:
    """Rows of a server's table; formats that it does not read at all share the last."""
    strange: list[str] = []
    merged: dict[tuple[str, str, str, str], list[Facts]] = {}
    for found in samples():
        advice = judge(name, found, Path("FOLDER"))
        if not any(rule.server == name and found.format in rule.formats for rule in RULES):
            strange.append(found.format)
            continue
        merged.setdefault((found.version or found.format, advice.verdict, "; ".join(advice.reasons), advice.seen), []).append(found)
    for (kind, verdict, reasons, seen), group in merged.items():
        yield f"| {kind} | {weights_of(group)} | {verdict} | {reasons} | {seen} |"
    if strange:
        yield f"| {', '.join(dict.fromkeys(strange))} | | no | other formats: `compressor export FOLDER --to …` | |"


def weights_of(group: list[Facts]) -> str:
    """Bits and symmetry of facts that differ in nothing else, in words."""
    kinds: dict[bool | None, list[int]] = {}
    for found in group:
        for scheme in found.kinds:
            kinds.setdefault(scheme.symmetric, []).append(scheme.bits)
    words = {True: "symmetric ", False: "asymmetric ", None: ""}
    both = {tuple(bits) for bits in kinds.values()}
    if len(kinds) == 2 and len(both) == 1:
        return f"{', '.join(map(str, both.pop()))} bits"
    return "; ".join(f"{words[symmetric]}{', '.join(map(str, bits))} bits" for symmetric, bits in kinds.items())


def samples() -> list[Facts]:
    """One folder of every kind that compressor writes, of a LLaMA in groups of 128."""

    def sample(form: str, bits: int, symmetric: bool | None = None, version: str = "") -> Facts:
        return Facts(form, "LlamaForCausalLM", {"q_proj": Scheme(bits, 128, symmetric)}, {"q_proj": (4096, 4096)}, version=version)

    grids = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
    out = [sample("compressed-tensors", *grid) for grid in grids]
    out += [sample("gptq", *grid, version=version) for version in ("gptq", "gptq_v2") for grid in grids]
    out += [sample("awq", 4, False), *(sample("mlx", bits) for bits in (2, 3, 4, 8)), *(sample("table", bits) for bits in (2, 3, 4))]
    out += [Facts("hqq", "LlamaForCausalLM"), sample("sparse", 4), Facts("gguf", "llama", types=("Q4_0",)), Facts("dense", "LlamaForCausalLM")]
    return out
