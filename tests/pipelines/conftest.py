"""A tokenizer trained on the spot and a random two-layer LLaMA: real classes, small enough for every test."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "The ship left the harbour at dawn. Below is an instruction that describes a task.\n\n### Response:\nQuestion: Answer: user assistant "
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(bos: str | None = "<s>", eos: str | None = "</s>", template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ids 0 to 4 for <s>, </s>, <pad>, <|im_start|>, <|im_end|>; adds no special tokens by itself. model_max_length is 32."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator([WORDS * 3], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=bos, eos_token=eos, pad_token="<pad>", model_max_length=32, chat_template=template,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def same_ends() -> Any:
    """BOS and EOS are one token, as in GPT-2."""
    return make_tokenizer("</s>", "</s>")


@pytest.fixture(scope="session")
def no_ends() -> Any:
    return make_tokenizer(None, None)


@pytest.fixture(scope="session")
def adding() -> Any:
    """Adds BOS by itself, as LLaMA tokenizers do."""
    tok = make_tokenizer()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tok


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    return make_tokenizer(None, "<|im_end|>", CHATML)


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def no_consumers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports start no process of other software, but in tests that are marked `consumers`: each takes seconds."""
    if request.node.get_closest_marker("consumers") is None:
        monkeypatch.setattr("compressor.integrations.consumers.installed", lambda kind: False)
