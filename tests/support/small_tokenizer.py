"""A small tokenizer with the shape of the released ones, for tests: byte-level BPE, special tokens, a chat template."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from granite_speech.training.bundled_checkpoint.small_model import CHAT_TEMPLATE

__all__ = ["AUDIO_TOKEN", "CHAT_TEMPLATE", "SPECIAL_TOKENS", "write_tokenizer"]

AUDIO_TOKEN = "<|audio|>"
SPECIAL_TOKENS = ("<|end_of_text|>", "<|pad|>", "<|start_of_role|>", "<|end_of_role|>", AUDIO_TOKEN)

SENTENCES = (
    "can you transcribe the speech into a written format?",
    "transcribe the speech with proper punctuation and capitalization.",
    "translate the speech to German with proper punctuation and capitalization.",
    "the quick brown fox jumps over the lazy dog, and then over the speech of the others.",
    "USER: transcribe the speech to text. Keywords: granite, conformer, projector\n ASSISTANT: this is the text.",
)

# Splits into single digits and words with their leading space, unlike plain byte-level BPE.
PATTERN = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def write_tokenizer(folder: str | Path, *, padding_side: str = "left", merges: int = 64) -> tuple[int, int]:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

    Returns: the vocabulary's size, added tokens included, and the id of `<|audio|>`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))

    roles = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "unk_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": padding_side,
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **roles,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(roles, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer.get_vocab_size(), tokenizer.token_to_id(AUDIO_TOKEN)
