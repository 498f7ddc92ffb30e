"""Pages of an engine's requests: counted references, and pages of prompts that later requests can use again.

A page full of a prompt's first tokens, before any audio, is remembered by these tokens. A request that begins with the same ones
uses the page instead of computing it. Remembered pages that no request uses are forgotten, oldest first, when pages run short.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

__all__ = ["PAGE_SIZE", "Pages", "prefixes_of"]

# Tokens per page. Few, so that most of a prompt's beginning fills whole pages.
PAGE_SIZE = 16


def prefixes_of(ids: Sequence[int], *, has_audio: bool) -> list[bytes]:
    """A digest for each page that these tokens fill, of what its keys depend on: the adapter, and all tokens up to the page's end."""
    digests, digest = [], b"adapter" if has_audio else b""
    for end in range(PAGE_SIZE, len(ids) + 1, PAGE_SIZE):
        digest = hashlib.sha256(digest + array("q", ids[end - PAGE_SIZE : end]).tobytes()).digest()
        digests.append(digest)
    return digests


class Pages:
    """Which requests use which pages.

    Args:
        pages: numbers of the pages to hand out.
    """

    def __init__(self, pages: Sequence[int]):
        self.total = len(pages)
        self._free = list(pages)
        self._users: dict[int, int] = {}
        self._remembered: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._prefix_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `take` can hand out: free ones, and remembered ones that no request uses."""
        return self.total - self.used

    @property
    def used(self) -> int:
        """Pages that requests use."""
        return len(self._users)

    @property
    def remembered(self) -> int:
        """Pages that are remembered by their tokens, used or not."""
        return len(self._prefix_of)

    def take(self, count: int) -> list[int] | None:
        """Hand out pages to one user; None if there are not enough."""
        while len(self._free) < count and self._forget_one():
            pass
        if len(self._free) < count:
            return None
        taken = [self._free.pop() for _ in range(count)]
        self._users.update(dict.fromkeys(taken, 1))
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """One user no longer needs these pages."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                del self._users[page]
                if page not in self._prefix_of:
                    self._free.append(page)

    def find(self, prefixes: Sequence[bytes]) -> list[int]:
        """The remembered pages of the first of these prefixes, up to the first that is not remembered, for one more user."""
        found = []
        for prefix in prefixes:
            page = self._remembered.get(prefix)
            if page is None:
                break
            self._remembered.move_to_end(prefix)
            self._users[page] = self._users.get(page, 0) + 1
            found.append(page)
        return found

    def is_remembered(self, prefix: bytes) -> bool:
        return prefix in self._remembered

    def remember(self, prefixes: Sequence[bytes], pages: Sequence[int]) -> None:
        """Remember pages that are in use, whose keys are stored."""
        for prefix, page in zip(prefixes, pages, strict=True):
            if prefix not in self._remembered:
                self._remembered[prefix] = page
                self._prefix_of[page] = prefix

    def _forget_one(self) -> bool:
        """Free the remembered page that was unused for the longest time; False if all are in use."""
        for prefix, page in self._remembered.items():
            if page not in self._users:
                del self._remembered[prefix], self._prefix_of[page]
                self._free.append(page)
                return True
        return False
