"""The bytes that each token stands for, because a character may be split over several tokens."""

from typing import Any

from granite_speech.errors import InputError

__all__ = ["TokenBytes"]

# A byte that UTF-8 never uses, so that a token without text is never part of a word.
_NO_TEXT = b"\xff"


def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte-level alphabet (Radford et al. 2019): printable bytes are themselves, others are characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


class TokenBytes:
    """The bytes of any token. Those of the tokens asked for are kept.

    Args:
        tokenizer: a GraniteSpeechTokenizer, a processor that has one, or a fast tokenizer of transformers.

    Raises:
        InputError: no tokenizer, or one without a `tokenizers` backend.
    """

    def __init__(self, tokenizer: Any):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        backends = (getattr(tokenizer, name, None) for name in ("backend", "backend_tokenizer"))
        self._backend = next((one for one in backends if hasattr(one, "id_to_token")), None)
        if self._backend is None:
            raise InputError(
                got=f"a tokenizer of type {type(tokenizer).__name__}",
                expected="a tokenizer that gives the text of tokens",
                remedy="Pass tokenizer=processor.tokenizer",
            )
        self._alphabet = _byte_of_character()
        self._special = {token for token, added in self._backend.get_added_tokens_decoder().items() if added.special}
        self._pieces: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        """The bytes of one token, from the byte-level alphabet; those of its own text if it is an added token."""
        if token not in self._pieces:
            text = self._backend.id_to_token(token)
            if text is None:
                self._pieces[token] = _NO_TEXT
            elif all(character in self._alphabet for character in text):
                self._pieces[token] = bytes(self._alphabet[character] for character in text)
            else:
                self._pieces[token] = text.encode()
        return self._pieces[token]

    def is_shown(self, token: int) -> bool:
        """Whether the token is part of a text that is decoded without special tokens."""
        return token not in self._special and self[token] is not _NO_TEXT
