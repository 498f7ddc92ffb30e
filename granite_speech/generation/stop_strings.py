"""Strings that end a row, matched byte by byte as its tokens are chosen, so that a character may be split over tokens.

The rule is that of transformers 5.17's `StopStringCriteria`: a row ends when its newest token completes one of the strings,
alone or together with the tokens before it, prompt included. tokenizers' DecodeStream is not enough: it returns text only at the
end of a whole character, which is too late if the token that completes a string also begins the next character.
"""

from typing import Any

from granite_speech.generation.token_bytes import TokenBytes

__all__ = ["StopStrings"]


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
        self._pieces = TokenBytes(tokenizer)
        self._strings = [one.encode() for one in strings]
        self._reach = max(map(len, self._strings)) - 1  # bytes before a token that may belong to a string it completes
        # A token has at least one byte, so this many tokens are enough.
        self._texts = [self._tail(b"".join(map(self._pieces.__getitem__, ids[-self._reach :] if self._reach else ()))) for ids in prompts]

    def _tail(self, text: bytes) -> bytes:
        return text[max(0, len(text) - self._reach) :]

    def ends(self, rows: list[int], tokens: list[int]) -> list[bool]:
        """Whether each token, appended to the text of its row, completes a stop string."""
        ended = []
        for row, token in zip(rows, tokens, strict=True):
            piece = self._pieces[token]
            text = self._texts[row] + piece
            # A match must include a byte of the newest token.
            ended.append(any(text.find(one, max(0, len(text) - len(piece) - len(one) + 1)) >= 0 for one in self._strings))
        return ended

    def extend(self, rows: list[int], tokens: list[int]) -> None:
        """Make row i the old row `rows[i]` followed by `tokens[i]`."""
        self._texts = [self._tail(self._texts[row] + self._pieces[token]) for row, token in zip(rows, tokens, strict=True)]
