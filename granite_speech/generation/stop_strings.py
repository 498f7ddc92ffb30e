"""Strings that end a row, found as its tokens come: byte for byte, so that a character split over tokens is seen whole.

What transformers 5.17's `StopStringCriteria` finds: the newest token completes one of the strings, alone or with the tokens
before it, those of the prompt included.
"""

from typing import Any

from granite_speech.errors import InputError

__all__ = ["StopStrings"]

# A byte that no UTF-8 text has: a token without text can be no part of a stop string.
_NO_TEXT = b"\xff"


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet (Radford et al. 2019): printable bytes stand for themselves, the others for characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


class StopStrings:
    """The text of some rows as far as it matters, and whether a token ends one.

    Args:
        strings: the stop strings, none of them empty.
        tokenizer: GraniteSpeechTokenizer or a processor that has one; a fast tokenizer of transformers does as well.
        prompts: each row's token ids, without padding.

    Raises:
        InputError: no tokenizer, or one without a `tokenizers` backend.
    """

    def __init__(self, strings: tuple[str, ...], tokenizer: Any, prompts: list[list[int]]):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        backends = (getattr(tokenizer, name, None) for name in ("backend", "backend_tokenizer"))
        self._backend = next((one for one in backends if hasattr(one, "id_to_token")), None)
        if self._backend is None:
            raise InputError(
                got=f"stop_strings with a tokenizer of type {type(tokenizer).__name__}",
                expected="the tokenizer that says what text the tokens are",
                remedy="Pass tokenizer=processor.tokenizer",
            )
        self._strings = [one.encode() for one in strings]
        self._reach = max(map(len, self._strings)) - 1  # bytes before a token that may belong to a stop string it completes
        self._alphabet = _byte_of_character()
        self._pieces: dict[int, bytes] = {}
        # Every token that matters has a byte at least, so no more of them than that are looked at.
        self._texts = [self._tail(b"".join(map(self._piece, ids[-self._reach :] if self._reach else ()))) for ids in prompts]

    def _piece(self, token: int) -> bytes:
        """The bytes of one token: its characters in the byte-level alphabet, or its own text where it was added as text."""
        if token not in self._pieces:
            text = self._backend.id_to_token(token)
            if text is None:
                self._pieces[token] = _NO_TEXT
            elif all(character in self._alphabet for character in text):
                self._pieces[token] = bytes(self._alphabet[character] for character in text)
            else:
                self._pieces[token] = text.encode()
        return self._pieces[token]

    def _tail(self, text: bytes) -> bytes:
        return text[max(0, len(text) - self._reach) :]

    def ends(self, rows: list[int], tokens: list[int]) -> list[bool]:
        """Whether each token, written behind the text of its row, completes a stop string."""
        ended = []
        for row, token in zip(rows, tokens, strict=True):
            piece = self._piece(token)
            text = self._texts[row] + piece
            # What is found must reach into the newest token.
            ended.append(any(text.find(one, max(0, len(text) - len(piece) - len(one) + 1)) >= 0 for one in self._strings))
        return ended

    def extend(self, rows: list[int], tokens: list[int]) -> None:
        """From now on row i is the old row `rows[i]` with `tokens[i]` behind it."""
        self._texts = [self._tail(self._texts[row] + self._piece(token)) for row, token in zip(rows, tokens, strict=True)]
