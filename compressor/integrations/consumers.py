"""Logits of an exported folder through the software that users run, where it is installed: the last proof of an export.

`check` starts a process of its own, `python -m compressor.integrations.consumers KIND FOLDER REFERENCE.npz`, on the CPU, in float32, without network
and with a time limit, so that foreign libraries can neither crash nor slow ours; it prints one JSON line. What a library would load at random is a
refusal, never a number. Each kind has a limit, relative to the standard deviation of the logits, above which the export is wrong:

    1e-4   the library computes our weights in float32, sums in another order: compressed-tensors (symmetric), dense, table, sparse, auto-gptq, GGUF
           through transformers, MLX. Measured: below 2e-5
    0.02   weights are formed in float16 first: compressed-tensors (asymmetric: with 0.20 only `dequantize=True` loads them), GPTQ through GPTQModel.
           Measured: below 5e-3. 8 times that where the folder's 16-bit type is bfloat16
    0.05   AWQ through GPTQModel, which computes more of it in float16. Measured: 9e-3
    0.3    llama.cpp rounds activations to 8 bits: it finds whole tensors that are wrong, not one wrong group, so read GGUF through transformers, too

Limits: small batches and CPUs only; it says nothing of a server's kernels for GPUs.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from compressor.errors import CompressorError, RecipeError

SECONDS = 600
EXACT, HALF, AWQ, INT8 = 1e-4, 0.02, 0.05, 0.3  # of the standard deviation of logits
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Check:
    """What a library computed: `error`, the largest difference of logits, `limit`, what is allowed; or the first line of why it `refused`."""

    library: str
    version: str
    error: float | None = None
    limit: float | None = None
    seconds: float = 0.0
    refused: str | None = None

    @property
    def good(self) -> bool:
        return self.error is not None and self.limit is not None and self.error <= self.limit

    def line(self) -> str:
        """One line for a model card."""
        name = f"{self.library} {self.version} on a CPU"
        if self.refused is not None:
            return f"{name} refused the folder: {self.refused}"
        return f"{name}: logits differ by at most {self.error:.1e} ({'allowed' if self.good else 'WRONG, allowed'}: {self.limit:.1e})"


@dataclass(frozen=True)
class Consumer:
    """A library that reads a kind of folder: what must be installed (import names), what installs it, how it makes logits, and its limit."""

    library: str  # for people; its version is that of the first distribution of `install`
    modules: tuple[str, ...]
    install: str
    logits: Callable[[Path, Tensor], Tensor]  # folder, ids [1, T] -> [T, V], or the last of them [1, V] as log-probabilities
    limit: float = EXACT


def check(kind: str, folder: Path, ids: Tensor, expected: Tensor, seconds: float = SECONDS) -> Check | None:
    """The logits of a folder through the library for `kind`, against `expected`, float [T, V], for ids int64 [1, T]; None: it is not installed.

    `needs(kind)` says what to install. What the library does, dying included, ends in the Check. RecipeError for an unknown kind.
    """
    consumer = _consumer(kind)
    if not installed(kind):
        return None
    with tempfile.TemporaryDirectory() as work:
        reference = Path(work) / "reference.npz"
        numpy.savez(reference, ids=ids.reshape(-1).cpu().numpy(), logits=expected.detach().float().cpu().numpy())
        paths = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "compressor.integrations.consumers", kind, str(folder.resolve()), str(reference)]
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=seconds, cwd=work, env=os.environ | OFFLINE | {"PYTHONPATH": paths}
            )
        except subprocess.TimeoutExpired:
            return Check(consumer.library, version(kind), refused=f"no logits after {seconds:g} seconds", seconds=seconds)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if ran.returncode or not lines:
        last = next((line.strip() for line in reversed(ran.stderr.splitlines()) if line.strip()), "no message")
        return Check(consumer.library, version(kind), refused=f"its process ended with code {ran.returncode}: {last[:200]}")
    return Check(**json.loads(lines[-1]))


def installed(kind: str) -> bool:
    """Whether the libraries for a kind are here; nothing is imported."""
    return all(find_spec(name) is not None for name in _consumer(kind).modules)


def rounds(kind: str, folder: Path) -> bool:
    """Whether the library forms the weights of this folder in 16 bits."""
    return _consumer(kind, folder).limit in (HALF, AWQ)


def blind(kind: str, config: Mapping[str, Any]) -> str | None:
    """What of a model's config the library ignores without a word, so that its logits would say nothing of the folder; None: nothing known."""
    if kind != "gguf":
        return None
    rope, family = config.get("rope_parameters") or config.get("rope_scaling") or {}, str(config.get("model_type"))
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) != "default":
        return "the scaling of rotary positions"
    if family == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
        return "biases of LLaMA"
    if family.startswith("gemma"):
        return "Gemma's attention scale and window"
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if family == "qwen3" and heads and hidden and config.get("head_dim", hidden // heads) * heads != hidden:
        return "heads whose sizes do not add up to the hidden size"
    return None


def needs(kind: str) -> str:
    """The command that installs what a kind needs."""
    return f"pip install {_consumer(kind).install}"


def version(kind: str) -> str:
    """The version of the library for a kind."""
    distribution = _consumer(kind).install.split()[0].partition("==")[0]
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def measure(kind: str, folder: Path, ids: Tensor, expected: Tensor) -> Check:
    """As `check`, in this process; every error of the library is a refusal."""
    consumer, began = _consumer(kind), time.perf_counter()
    empty = Check(consumer.library, version(kind))
    try:
        consumer = _consumer(kind, folder)
        got = consumer.logits(folder, ids)
    except Exception as error:  # libraries raise what they like
        return replace(empty, refused=_first(error), seconds=time.perf_counter() - began)
    last = consumer.limit == INT8
    wanted = expected[-1:].log_softmax(-1) if last else expected
    listed = ~torch.isnan(got) if last else torch.ones_like(got, dtype=torch.bool)
    if got.shape != wanted.shape or not bool(listed.any()):
        return replace(empty, refused=f"logits of shape {tuple(got.shape)} where {tuple(wanted.shape)} was expected")
    worst = float((got - wanted)[listed].abs().max())
    limit = consumer.limit * float(expected.std()) * (_coarse(folder) if consumer.limit in (HALF, AWQ) else 1)
    return replace(empty, error=worst if math.isfinite(worst) else math.inf, limit=limit, seconds=time.perf_counter() - began)


def asymmetric(folder: Path) -> bool:
    """Whether a compressed-tensors folder has zero points."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    groups = ((config.get("quantization_config") or {}).get("config_groups") or {}).values()
    return any(not (group.get("weights") or {}).get("symmetric", True) for group in groups)


def _coarse(folder: Path) -> float:
    """1 where weights are formed in float16, 8 in bfloat16."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return 8.0 if (config.get("dtype") or config.get("torch_dtype")) == "bfloat16" else 1.0


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _consumer(kind: str, folder: Path | None = None) -> Consumer:
    if kind not in CONSUMERS:
        raise RecipeError(f"no library is known that reads {kind!r}; choose {', '.join(CONSUMERS)}")
    if folder is not None and kind == "compressed-tensors" and asymmetric(folder):
        return replace(CONSUMERS[kind], library="transformers with compressed-tensors (dequantize=True)", logits=_dequantized, limit=HALF)
    return CONSUMERS[kind]


def _transformers(folder: Path, ids: Tensor, named: str = "dtype", **options: Any) -> Tensor:
    """Logits [T, V] through from_pretrained; CompressorError where it would leave weights at random. named: what it calls the dtype."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **{named: torch.float32}, **options)
    odd = [f"{what.replace('_', ' ')}: {sorted(map(str, info[what]))[0]}" for what in ("missing_keys", "mismatched_keys") if info.get(what)]
    if odd:
        raise CompressorError(f"weights would be random, {odd[0]}")
    with torch.no_grad():
        return model.eval()(ids).logits[0].float()


def _plain(folder: Path, ids: Tensor) -> Tensor:
    return _transformers(folder, ids)


def _ours(folder: Path, ids: Tensor) -> Tensor:
    from compressor.integrations.transformers import register

    register()
    return _transformers(folder, ids)


def _dequantized(folder: Path, ids: Tensor) -> Tensor:
    from transformers import CompressedTensorsConfig

    return _transformers(folder, ids, quantization_config=CompressedTensorsConfig(dequantize=True))


def _gptqmodel(folder: Path, ids: Tensor) -> Tensor:
    from transformers import GPTQConfig

    return _transformers(folder, ids, device_map="cpu", quantization_config=GPTQConfig(bits=_bits(folder), backend="gptq_torch"))


def _awq(folder: Path, ids: Tensor) -> Tensor:
    from transformers import AwqConfig

    return _transformers(folder, ids, device_map="cpu", quantization_config=AwqConfig(bits=4, backend="torch_awq"))


def _auto_gptq(folder: Path, ids: Tensor) -> Tensor:
    """Through the transformers of its time: its own loader does not tie embeddings."""
    from transformers import GPTQConfig

    plain = GPTQConfig(bits=_bits(folder), use_exllama=False)
    return _transformers(folder, ids, "torch_dtype", device_map="cpu", quantization_config=plain)


def _bits(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]["bits"])


def _file(folder: Path) -> Path:
    files = [folder] if folder.suffix == ".gguf" else sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise CompressorError(f"{folder} holds {len(files)} GGUF files, and one is read")
    return files[0]


def _gguf(folder: Path, ids: Tensor) -> Tensor:
    file = _file(folder)
    return _transformers(file.parent, ids, gguf_file=file.name)


def _llama_cpp(folder: Path, ids: Tensor) -> Tensor:
    """Log-probabilities [1, V] after the last id; NaN for tokens that the server does not list, those of incomplete UTF-8."""
    xllamacpp = import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = str(_file(folder)), 2 * ids.numel() + 64, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    many = 1 << 20
    asked = {"prompt": ids.reshape(-1).tolist(), "n_predict": 1, "temperature": 0.0, "n_probs": many, "logprobs": many, "cache_prompt": False}
    answer = xllamacpp.Server(params).handle_completions(asked)
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    listed = (answer.get("completion_probabilities") or answer["choices"][0]["logprobs"]["content"])[0]["top_logprobs"]
    out = torch.full((1, 1 + max(entry["id"] for entry in listed)), float("nan"))
    for entry in listed:
        out[0, entry["id"]] = entry["logprob"]
    return out


def _mlx(folder: Path, ids: Tensor) -> Tensor:
    mx, utils = import_module("mlx.core"), import_module("mlx_lm.utils")
    model, _ = utils.load_model(folder)  # strict: missing weights are an error
    model.set_dtype(mx.float32)
    return torch.from_numpy(numpy.array(model(mx.array(ids.numpy()))[0].astype(mx.float32)))


TRANSFORMERS = ("transformers",)
CONSUMERS = {
    "compressed-tensors": Consumer("transformers with compressed-tensors", ("transformers", "compressed_tensors"), "compressed-tensors", _plain),
    "dense": Consumer("transformers", TRANSFORMERS, "transformers", _plain),
    "table": Consumer("transformers with compressor's hook", TRANSFORMERS, "transformers", _ours),
    "sparse": Consumer("transformers with compressor's hook", TRANSFORMERS, "transformers", _ours),
    "gptq": Consumer("transformers with GPTQModel", ("gptqmodel", "optimum"), "gptqmodel optimum", _gptqmodel, HALF),
    "awq": Consumer("transformers with GPTQModel (AWQ)", ("gptqmodel", "optimum"), "gptqmodel optimum", _awq, AWQ),
    "auto-gptq": Consumer(
        "auto-gptq", ("auto_gptq", "optimum"), "auto-gptq==0.7.1 transformers==4.46.3 optimum==1.23.3 'accelerate<1.2'", _auto_gptq
    ),
    "gguf": Consumer("transformers with gguf", ("transformers", "gguf"), "gguf", _gguf),
    "llama.cpp": Consumer("llama.cpp (xllamacpp)", ("xllamacpp",), "xllamacpp", _llama_cpp, INT8),
    "mlx": Consumer("mlx-lm", ("mlx", "mlx_lm"), "mlx-lm 'mlx[cpu]'", _mlx),
}


def main(argv: list[str]) -> None:
    kind, folder, reference = argv
    with numpy.load(reference, allow_pickle=False) as file:
        ids, expected = torch.from_numpy(file["ids"]).reshape(1, -1), torch.from_numpy(file["logits"])
    found = measure(kind, Path(folder), ids, expected)
    sys.stdout.write(f"\n{json.dumps(asdict(found))}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
