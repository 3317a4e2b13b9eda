"""What the tests of encoders share: a word-piece tokenizer, random encoders of two blocks as folders, and texts whose label is in their words."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertTokenizerFast
from transformers import models as families

GOOD, BAD, PLAIN = ("fine", "good", "lovely"), ("awful", "bad", "dull"), ("the", "film", "was", "a", "story", "of", "it", "and", "actor", "plot")
PIECES = ("##ly", "##s", "##ing")
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN, *PIECES, "?", "who", "where", ".", "paris", "rome"]


def make_tokenizer(folder: Path) -> Any:
    """A BERT tokenizer of 30 words, saved in the folder."""
    tok = Tokenizer(models.WordPiece({word: i for i, word in enumerate(VOCAB)}, unk_token="[UNK]"))
    tok.normalizer = normalizers.BertNormalizer()
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    tok.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    fast = BertTokenizerFast(tokenizer_object=tok, model_max_length=64)
    fast.save_pretrained(folder)
    return fast


def make_encoder(folder: Path, kind: str = "BertModel", **config: Any) -> Path:
    """A random BERT of two blocks of width 64 as a folder; `kind` is its class."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(VOCAB)}
    made = getattr(families.bert, kind)(BertConfig(**shape | {"max_position_embeddings": 64, "initializer_range": 0.1} | config))
    made.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, "1" or "0"): one of its words tells which."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.random() < 0.5
        words = [draw.choice(PLAIN) for _ in range(draw.randint(2, 9))]
        words.insert(draw.randint(0, len(words)), draw.choice(GOOD if label else BAD))
        rows.append((" ".join(words), str(int(label))))
    return rows


def write_tsv(path: Path, rows: list[tuple[str, ...]], header: str = "sentence\tlabel") -> Path:
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n")
    return path
