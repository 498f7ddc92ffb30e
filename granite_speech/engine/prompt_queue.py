"""Prompts in progress: they have pages, and their tokens are run in pieces, packed, until only the last one is left.

The last token is run by the decode step, which chooses the first token of the answer from it.
"""

from collections.abc import Iterator, Sequence

import torch

from granite_speech.engine.packed_tokens import PackedTokens
from granite_speech.engine.pages import PAGE_SIZE, Pages
from granite_speech.engine.requests import Request

__all__ = ["PromptQueue"]

# Tokens to run between two decode steps.
_TOKENS = {"cuda": 2048, "cpu": 1024}


class PromptQueue:
    """Prompts that have pages.

    Args:
        pages: where to take them from.
        device: of the model.
    """

    def __init__(self, pages: Pages, device: torch.device):
        self._pages = pages
        self._tokens = _TOKENS.get(device.type, _TOKENS["cuda"])
        self._requests: list[Request] = []
        self._computing: dict[bytes, Request] = {}  # prefixes that are not stored yet, and whose prompt has them

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests))

    def admit(self, request: Request, in_progress: int) -> int | None:
        """Give a request pages for all its tokens and one more. None if it has to wait.

        It waits if there are not enough pages, or if another prompt is computing pages that it can share.

        Args:
            request: with its audio encoded.
            in_progress: answers that may soon need a page each.

        Returns:
            Number of tokens whose keys are there already.
        """
        prefixes = request.prompt.prefixes
        known = next((count for count, one in enumerate(prefixes) if not self._pages.is_remembered(one)), len(prefixes))
        if known < len(prefixes) and prefixes[known] in self._computing:
            return None
        shared = self._pages.find(prefixes)
        missing = -(-request.length // PAGE_SIZE) - len(shared)
        spare = in_progress + len(self._requests)  # none if this is the only one: it fits on its own
        own = self._pages.take(missing) if self._pages.available >= missing + spare else None
        if own is None:
            self._pages.give_back(shared)
            return None
        request.pages, request.keys = shared + own, len(shared) * PAGE_SIZE
        self._computing.update(dict.fromkeys(prefixes[len(shared) :], request))
        self._requests.append(request)
        return request.keys

    def remove(self, request: Request) -> None:
        """A request that goes on to be decoded, ends, or gives its pages to another one."""
        self._requests.remove(request)
        self._computing = {prefix: one for prefix, one in self._computing.items() if one is not request}

    def pieces(self) -> list[tuple[Request, int]]:
        """The next tokens to run: requests, with the number of tokens of each."""
        pieces, left = [], self._tokens
        for one in self._requests:
            count = min(left, one.length - 1 - one.keys)
            if count > 0:
                pieces.append((one, count))
                left -= count
        return pieces

    def packed(self, pieces: Sequence[tuple[Request, int]]) -> PackedTokens:
        """The tokens of these pieces."""
        ids, audio, vectors, positions = [], [], [], []
        for one, count in pieces:
            start, end = one.keys, one.keys + count
            is_audio, own = one.audio(start, end)
            ids.append(one.ids(start, end))
            audio.append(is_audio)
            vectors += [] if own is None else [own]
            positions.append(torch.arange(start, end))
        width = max(len(one.pages) for one, _ in pieces)
        return PackedTokens(
            lengths=[count for _, count in pieces],
            past=[one.keys for one, _ in pieces],
            ids=torch.cat(ids),
            is_audio=torch.cat(audio),
            vectors=torch.cat(vectors) if vectors else None,
            positions=torch.cat(positions),
            has_audio=[one.prompt.has_audio for one, _ in pieces],
            block_table=torch.tensor([one.pages + [0] * (width - len(one.pages)) for one, _ in pieces], dtype=torch.int32),
        )

    def stored(self, pieces: Sequence[tuple[Request, int]]) -> None:
        """The keys of these pieces are stored; later requests can use those of whole pages."""
        for one, count in pieces:
            one.keys += count
            prefixes = one.prompt.prefixes
            if prefixes and self._computing.get(prefixes[-1]) is one and one.keys >= len(prefixes) * PAGE_SIZE:
                self._pages.remember(prefixes, one.pages[: len(prefixes)])
                self._computing = {prefix: other for prefix, other in self._computing.items() if other is not one}

    def ready(self) -> list[Request]:
        """The requests of which only the last token is left."""
        return [one for one in self._requests if one.is_prefilled]
