"""Continuing texts, one or several together, through transformers' generate with its KV cache."""

from typing import Any

import torch

from compressor.errors import DataError


def generate(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, **options: Any) -> list[list[int]]:
    """The new tokens of each prompt, up to the end of its text; prompts are padded on the left. Greedy unless `options` say otherwise.

    `options` are those of transformers' generate. Raises DataError for a prompt without tokens.
    """
    rows = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise DataError(f"prompt {prompt!r} has no tokens; write at least one word")
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    width, device = max(map(len, rows)), next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)  # [prompts, width]
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    settings = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": pad} | options
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **settings)
    ends = model.generation_config.eos_token_id
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    return [_until_end(row, stops) for row in out[:, width:].tolist()]


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the end of the text and with it; what follows in a batch is padding."""
    stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]
