"""Configurations in GGUF files: what llama.cpp would run with other numbers is refused, and the rest is said."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compressor.errors import ModelError

gguf = pytest.importorskip("gguf")
from compressor.integrations import gguf as files  # noqa: E402
from compressor.integrations import gguf_families as families  # noqa: E402
from tests.integrations.test_gguf import LLAMA, TINY  # noqa: E402


def test_rope_factors_are_those_of_transformers() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope | {"original_max_position_embeddings": 512})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** (-torch.arange(0, 64, 2) / 64)
    factors = families.rope_factors(config.to_dict())
    assert torch.allclose(plain / factors, scaled, rtol=1e-5) and 1 < len(factors.unique()) < 32
    assert families.rope_factors(LlamaConfig().to_dict()) is None


@given(heads=st.integers(1, 5), half=st.integers(1, 9))
def test_turning_back_is_the_inverse(heads: int, half: int) -> None:
    rows = torch.arange(heads * 2 * half * 3).view(-1, 3)
    turned = families.turn(rows, heads)
    assert torch.equal(families.turn_back(turned, heads), rows)
    assert turned[: 2 * half : 2].equal(rows[:half])


GEMMA = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 256}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLAMA | {"architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM"),
        (LLAMA | {"architectures": []}, "no architecture"),
        (LLAMA | {"model_type": "none"}, "cannot read the configuration"),
        (LLAMA | {"hidden_act": "gelu"}, "gelu"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "part of each head"),
        (LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32}, "sliding windows"),
        (GEMMA | {"query_pre_attn_scalar": 144}, "head_dim"),
        (GEMMA | {"layer_types": ["full_attention"] * 2}, "full window"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(tmp_path: Path, config: dict, words: str) -> None:
    assert words in str(files.fits(config, {}, "auto"))
    with pytest.raises(ModelError, match=words):
        files.write(tmp_path / "model.gguf", config, [], TINY)
    assert not list(tmp_path.iterdir())
    assert files.fits(LLAMA, {}, "auto") is None and files.fits(GEMMA, {}, "q4_k") is None
    assert "q7" in str(files.fits(LLAMA, {}, "q7"))


GEMMA2 = GEMMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
QWEN = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GEMMA2, None),
        (GEMMA2 | {"attn_logit_softcapping": None}, "no attn_logit_softcapping"),
        (GEMMA2 | {"final_logit_softcapping": None}, "no final_logit_softcapping"),
        (GEMMA | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA | {"use_bidirectional_attention": True}, "looks ahead"),
        (GEMMA | {"rope_parameters": SLIDING}, "sliding windows is scaled"),
        (GEMMA | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, None),
        (GEMMA2 | {"rope_parameters": YARN}, "yarn"),
        (GEMMA | {"num_hidden_layers": 62}, "number than 16"),
        (GEMMA | {"num_hidden_layers": 62, "query_pre_attn_scalar": 16}, None),
        (QWEN | {"rope_parameters": YARN}, None),
        (QWEN | {"rope_parameters": YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.138629}}, None),
        (QWEN | {"rope_parameters": YARN | {"beta_fast": 16.0}}, "beta_fast"),
        (QWEN | {"rope_parameters": YARN | {"beta_slow": 2.0}}, "beta_slow"),
        (QWEN | {"rope_parameters": YARN | {"attention_factor": 1.0}}, "attention_factor"),
        (QWEN | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, "mscale"),
        (QWEN | {"rope_parameters": YARN | {"truncate": False}}, "truncate"),
        (LLAMA | {"rope_parameters": LLAMA3}, None),
        (QWEN | {"rope_parameters": LLAMA3}, "llama3"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "no factor"),
    ],
)
def test_numbers_that_llama_cpp_takes_for_granted(config: dict, words: str | None) -> None:
    found = files.fits(config, {}, "auto")
    assert found is None if words is None else words in str(found)


def test_gemma_says_how_its_sliding_layers_turn() -> None:
    for config, theta in ((GEMMA, 10000.0), (GEMMA | {"rope_local_base_freq": 20000.0}, 20000.0)):
        writer, full = gguf.GGUFWriter(None, "gemma3"), families.settings(config)
        families.add_metadata(writer, full, families.family_of(full), "x")
        assert writer.kv_data[0]["gemma3.rope.freq_base_swa"].value == theta and writer.kv_data[0]["gemma3.rope.freq_base"].value == 1e6


def test_defaults_are_those_of_transformers() -> None:
    """What config.json leaves out differs between families: Mistral's has a window, Gemma's caps its logits."""
    assert families.settings(LLAMA | {"model_type": "mistral"})["sliding_window"] == 4096
    assert families.settings(LLAMA | {"model_type": "gemma2"})["final_logit_softcapping"] == 30.0
    assert families.rope_of(families.settings(GEMMA))["rope_theta"] == 1e6
