"""Strings that end a row, matched byte by byte as its tokens are chosen, so that a character may be split over tokens.

The rule is that of transformers 5.17's `StopStringCriteria`: a row ends when its newest token completes one of the strings,
alone or together with the tokens before it, prompt included. tokenizers' DecodeStream is not enough: it returns text only at the
end of a whole character, which is too late if the token that completes a string also begins the next character.
"""

from typing import Any

from granite_speech.errors import InputError

__all__ = ["StopStrings"]

# A byte that UTF-8 never uses, so that a token without text is never part of a stop string.
_NO_TEXT = b"\xff"


def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte-level alphabet (Radford et al. 2019): printable bytes are themselves, others are characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


class StopStrings:
    """The last bytes of each row's text, and whether a token ends a row.

    Args:
        strings: the stop strings, none of them empty.
        tokenizer: a GraniteSpeechTokenizer, a processor that has one, or a fast tokenizer of transformers.
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
                expected="a tokenizer that gives the text of tokens",
                remedy="Pass tokenizer=processor.tokenizer",
            )
        self._strings = [one.encode() for one in strings]
        self._reach = max(map(len, self._strings)) - 1  # bytes before a token that may belong to a string it completes
        self._alphabet = _byte_of_character()
        self._pieces: dict[int, bytes] = {}
        # A token has at least one byte, so this many tokens are enough.
        self._texts = [self._tail(b"".join(map(self._piece, ids[-self._reach :] if self._reach else ()))) for ids in prompts]

    def _piece(self, token: int) -> bytes:
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

    def _tail(self, text: bytes) -> bytes:
        return text[max(0, len(text) - self._reach) :]

    def ends(self, rows: list[int], tokens: list[int]) -> list[bool]:
        """Whether each token, appended to the text of its row, completes a stop string."""
        ended = []
        for row, token in zip(rows, tokens, strict=True):
            piece = self._piece(token)
            text = self._texts[row] + piece
            # A match must include a byte of the newest token.
            ended.append(any(text.find(one, max(0, len(text) - len(piece) - len(one) + 1)) >= 0 for one in self._strings))
        return ended

    def extend(self, rows: list[int], tokens: list[int]) -> None:
        """Make row i the old row `rows[i]` followed by `tokens[i]`."""
        self._texts = [self._tail(self._texts[row] + self._piece(token)) for row, token in zip(rows, tokens, strict=True)]
