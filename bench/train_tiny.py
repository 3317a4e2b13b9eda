"""Train the embedded model `tiny` from scratch: a 1 M parameter LLaMA on the prose inside the Python standard library.

Text: docstrings and comments of every module except those of `compressor.pipelines.builtin.OUTSIDE_MODULES` (kept unseen for measuring)
and `pydoc_data` (the tuning domain). Small and long: about 37 tokens a parameter, so that compression costs something that can be measured.
Resumable: `--work` holds a safetensors checkpoint written every `--save-every` steps; the same command goes on from it.

    python bench/train_tiny.py --work /tmp/tiny --out compressor/models/tiny
"""

import argparse
import ast
import hashlib
import io
import json
import math
import os
import pathlib
import platform
import sysconfig
import time
import tokenize

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compressor.pipelines.builtin import OUTSIDE_MODULES, outside, topics

VOCAB, SEQ = 2048, 256
CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# tiny

The embedded model of `compressor`: a LLaMA of one million parameters (RoPE, SwiGLU, grouped-query attention, tied embeddings, byte-level BPE of 2048
pieces), small enough to ship and trained long enough to feel compression. It writes text that looks like Python documentation and knows nothing.

Trained from scratch by `{command}` on the docstrings and comments of the modules of CPython's standard library (PSF licence), without
those that measure it (`compressor.pipelines.builtin.OUTSIDE_MODULES`) and without `pydoc_data`. Context: 256 tokens.

| | |
|---|---|
{rows}

Perplexities: windows of 256 tokens, at most 64, float32; domain: every seventh topic of `pydoc_data.topics`; outside: source of the held-out modules.
"""


def prose(source: str) -> str:
    """Docstrings and comments of one source file; neighbouring comment lines become one paragraph."""
    parts: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 20:
                parts.append(doc)
    block: list[str] = []
    last = -2
    for tok in tokenize.generate_tokens(io.StringIO(source).readline):
        if tok.type != tokenize.COMMENT:
            continue
        line = tok.string.lstrip("#!:").strip()
        if tok.start[0] != last + 1 and block:
            parts.append("\n".join(block))
            block = []
        block.append(line)
        last = tok.start[0]
    parts.append("\n".join(block))
    return "\n\n".join(p for p in parts if len(p) > 20)


def corpus() -> list[str]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if parts[0] in ("site-packages", "pydoc_data", "lib2to3") or parts[0].removesuffix(".py") in OUTSIDE_MODULES:
            continue
        try:
            text = prose(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            continue  # the standard library ships files that are broken on purpose, for its own tests
        if len(text) > 200:
            texts.append(text)
    return list(dict.fromkeys(texts))


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<|end|>", eos_token="<|end|>", model_max_length=SEQ)


def encode(tok: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    end = tok.eos_token_id
    rows = tok(texts, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.asarray([end, *r], dtype=np.int32) for r in rows])


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: torch.nn.Module, stream: np.ndarray, limit: int = 64) -> float:
    model.eval()
    rows = min(limit, (len(stream) - 1) // SEQ)
    ids = torch.from_numpy(stream[: rows * SEQ + 1].astype(np.int64))
    ids = torch.stack([ids[i * SEQ : (i + 1) * SEQ + 1] for i in range(rows)])
    total = sum(float(loss_of(model, part)) * len(part) for part in ids.split(16))
    model.train()
    return math.exp(total / rows)


def batch(stream: np.ndarray, step: int, size: int, seed: int) -> torch.Tensor:
    """Batch of a step, a pure function of (seed, step): random windows, epoch by epoch without replacement, shifted every epoch."""
    per_epoch = (len(stream) - SEQ - 1) // SEQ
    rows = []
    for index in range(step * size, (step + 1) * size):
        epoch, place = divmod(index, per_epoch)
        rng = np.random.default_rng([seed, epoch])
        shift = int(rng.integers(SEQ))
        start = int(_order(seed, epoch, per_epoch)[place]) * SEQ + shift
        start = min(start, len(stream) - SEQ - 1)
        rows.append(stream[start : start + SEQ + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


_orders: dict[int, np.ndarray] = {}


def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    if epoch not in _orders:
        _orders.clear()
        _orders[epoch] = np.random.default_rng([seed, epoch, 1]).permutation(count)
    return _orders[epoch]


def save_state(work: pathlib.Path, model: torch.nn.Module, opt: torch.optim.Optimizer, step: int) -> None:
    state = {f"m.{k}": v for k, v in model.named_parameters()}
    for i, s in opt.state_dict()["state"].items():
        state |= {f"o.{i}.{k}": v.clone() for k, v in s.items()}
    save_file({k: v.detach().contiguous() for k, v in state.items()}, work / "state.tmp", metadata={"step": str(step)})
    os.replace(work / "state.tmp", work / "state.safetensors")
    (work / "step.json").write_text(json.dumps({"step": step}))


def load_state(work: pathlib.Path, model: torch.nn.Module, opt: torch.optim.Optimizer) -> int:
    if not (work / "state.safetensors").exists():
        return 0
    state = load_file(work / "state.safetensors")
    params = dict(model.named_parameters())
    with torch.no_grad():
        for k, p in params.items():
            p.copy_(state[f"m.{k}"])
    sd = opt.state_dict()
    sd["state"] = {}
    for key, value in state.items():
        if key.startswith("o."):
            _, i, name = key.split(".")
            sd["state"].setdefault(int(i), {})[name] = value
    opt.load_state_dict(sd)
    return int(json.loads((work / "step.json").read_text())["step"])


def rate(step: int, total: int, peak: float, warm: int = 200) -> float:
    """Linear warm-up, then cosine to zero."""
    return peak * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0))))


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--work", type=pathlib.Path, required=True)
    ap.add_argument("--out", type=pathlib.Path, required=True)
    ap.add_argument("--steps", type=int, default=9600)
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--layers", type=int, default=4)
    ap.add_argument("--lr", type=float, default=4e-3)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--save-every", type=int, default=200)
    a = ap.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(a.seed)

    if not (a.work / "tokenizer.json").exists():
        texts = corpus()
        tok = make_tokenizer(texts)
        np.save(a.work / "train.npy", encode(tok, texts))
        tok.save_pretrained(a.work)
    tok = PreTrainedTokenizerFast.from_pretrained(a.work)
    stream = np.load(a.work / "train.npy")
    domain, code = encode(tok, topics("test")), encode(tok, outside())

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=384, num_hidden_layers=a.layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=SEQ, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    n = sum(p.numel() for p in model.parameters())
    decay = [p for p in model.parameters() if p.ndim == 2]
    other = [p for p in model.parameters() if p.ndim != 2]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}], lr=a.lr, betas=(0.9, 0.95))
    step = load_state(a.work, model, opt)
    print(f"{n} parameters, {len(stream)} tokens of text, {a.steps * a.batch * SEQ / n:.1f} tokens a parameter, from step {step}", flush=True)
    start, first = time.time(), step
    while step < a.steps:
        for group in opt.param_groups:
            group["lr"] = rate(step, a.steps, a.lr)
        loss = loss_of(model, batch(stream, step, a.batch, a.seed))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        step += 1
        if step % 50 == 0:
            left = (time.time() - start) / (step - first) * (a.steps - step)
            print(f"step {step} loss {loss.item():.4f} left {left / 60:.1f} min", flush=True)
        if step % a.save_every == 0 or step == a.steps:
            save_state(a.work, model, opt, step)
            if step % (5 * a.save_every) == 0 or step == a.steps:
                print(f"step {step} domain ppl {perplexity(model, domain):.2f} code ppl {perplexity(model, code):.2f}", flush=True)

    a.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(a.out)
    tok.save_pretrained(a.out)
    facts = {
        "parameters": n, "steps": a.steps, "tokens_seen": a.steps * a.batch * SEQ, "corpus_tokens": len(stream),
        "corpus_sha256": hashlib.sha256(stream.tobytes()).hexdigest()[:16], "python": platform.python_version(), "torch": torch.__version__,
        "domain_perplexity_256": round(perplexity(model.float(), domain), 3), "outside_perplexity_256": round(perplexity(model.float(), code), 3),
    }  # fmt: skip
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items())
    (a.out / "README.md").write_text(CARD.format(rows=rows, command=f"python bench/train_tiny.py --steps {a.steps}"), "utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
