"""Small tokenizers for CTC, of both kinds, whose pad token is the blank."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["KINDS", "write_ctc_tokenizer"]

KINDS = ("unigram", "bpe")
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "hello world , this is granite , speech in and text out !",
    "nine one five seven , all of them twice : nine one five seven",
)


def write_ctc_tokenizer(folder: str | Path, kind: str = "unigram", **config: object) -> int:
    """Writes tokenizer.json and tokenizer_config.json. Returns the vocabulary's size; the blank is id 0."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<pad>", "<unk>"]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    entries = {"tokenizer_class": "ParakeetTokenizer", "pad_token": "<pad>", "unk_token": "<unk>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(entries), encoding="utf-8")
    return tokenizer.get_vocab_size()
