"""Matches the regular expressions for module paths in an `adapter_config.json` in bounded time.

peft matches each key with `re.match(rf"(.*\\.)?({key})$", path)`. An untrusted file may contain `(a+)+`, on which `re` backtracks for
ages. Here all alternatives are followed at once: each part of an expression maps the set of positions where it may start to the set of
positions where it may end (Thompson, "Regular expression search algorithm", CACM 1968). Steps are counted over all expressions and
modules, and limited.
"""

import re
from functools import cached_property, partial
from re import _constants as op  # re's own parser, so that expressions have the same meaning as in peft
from re import _parser
from typing import Any

from granite_speech.errors import CheckpointError

__all__ = ["ModulePatterns"]

# One to two seconds. A file that names each of 500 modules in full uses between an eighth and a fifth of this, and a dozen expressions
# such as layers\.(0|1)\..*_proj for 500 modules a seventh.
STEPS = 4_000_000
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+")  # no repetition, so no backtracking: `re` may match it
_ONE_LETTER = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
_CATEGORIES = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_WORD: lambda letter: letter.isalnum() or letter == "_",
}
_NOT = {
    op.CATEGORY_NOT_DIGIT: op.CATEGORY_DIGIT,
    op.CATEGORY_NOT_SPACE: op.CATEGORY_SPACE,
    op.CATEGORY_NOT_WORD: op.CATEGORY_WORD,
}


class ModulePatterns:
    """Values by regular expression on the end of a module's path.

    Args:
        name: name of the table, for errors.
        table: values by expression. The first expression that matches decides.

    Raises:
        CheckpointError: a key that is not a regular expression, or has lookaround, backreferences or other unsupported syntax.
    """

    def __init__(self, name: str, table: dict[str, Any]):
        self.name, self.steps_left = name, STEPS
        self.entries = [(self._read(pattern), value) for pattern, value in table.items()]

    def find(self, paths: tuple[str, ...], default: Any) -> Any:
        """The value of the first expression that matches any of a module's paths.

        Raises:
            CheckpointError: matching takes too many steps.
        """
        positions = [_Positions(path, self) for path in paths]
        return next((value for pattern, value in self.entries if any(one.match(pattern) for one in positions)), default)

    def _read(self, pattern: str) -> re.Pattern | list:
        self.spend(200 + 5 * len(pattern))
        whole = rf"(.*\.)?({pattern})$"
        if _PLAIN.fullmatch(pattern):
            return re.compile(whole)
        try:
            parsed = _parser.parse(whole)
        except (re.error, OverflowError, RecursionError) as error:
            raise self.refusal(f"{pattern!r:.100}, which does not parse ({error})", "regular expressions") from error
        if not _is_regular(parsed):
            expected = "module names and simple regular expressions: letters, ., *, +, ?, [abc], (a|b), \\d, ^ and $"
            raise self.refusal(f"{pattern!r:.100}, which has lookaround, a backreference or flags", expected)
        return list(parsed)

    def spend(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise self.refusal(
                f"regular expressions that take more than {STEPS} steps to read and match", "module names or simple expressions"
            )

    def refusal(self, got: str, expected: str) -> CheckpointError:
        return CheckpointError(
            got=f"adapter_config.json with {self.name}: {got}",
            expected=expected,
            remedy="Name the modules in full, or save the adapter again with peft",
        )


def _is_regular(nodes: Any) -> bool:
    """Whether sets of positions suffice to match these nodes."""
    for kind, value in nodes:
        if kind is op.BRANCH:
            inner = value[1]
        elif kind is op.SUBPATTERN and not (value[1] or value[2]):
            inner = [value[3]]
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            inner = [value[2]]
        elif kind in (*_ONE_LETTER, op.AT):
            inner = []
        else:
            return False
        if not all(map(_is_regular, inner)):
            return False
    return True


class _Positions:
    """A path, and sets of positions in it. A set is an integer whose bit n is the position before letter n."""

    def __init__(self, path: str, patterns: ModulePatterns):
        self.path, self.patterns = path, patterns
        self.letters: dict[str, int] = {}  # positions of each letter
        for place, letter in enumerate(path):
            self.letters[letter] = self.letters.get(letter, 0) | 1 << place
        self.known: dict[tuple[Any, int], int] = {}

    def match(self, pattern: re.Pattern | list) -> bool:
        if isinstance(pattern, re.Pattern):
            self.patterns.spend(2)
            return pattern.match(self.path) is not None
        return self._after(pattern, 1) != 0

    def _after(self, nodes: Any, places: int) -> int:
        """Positions where this sequence of nodes may end if it starts at one of `places`."""
        self.patterns.spend(1 + len(nodes))
        for kind, value in nodes:
            if kind is op.BRANCH:
                ends = [self._after(one, places) for one in value[1]]
                places = 0
                for one in ends:
                    places |= one
            elif kind is op.SUBPATTERN:
                places = self._after(value[3], places)
            elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
                places = self._repeated(*value, places)
            elif kind is op.AT:
                places &= self._fixed_places(value)
            else:
                places = (places & self._accepted(kind, value)) << 1
            if not places:
                break
        return places

    def _repeated(self, low: int, high: int, nodes: Any, places: int) -> int:
        # Each repetition either consumes a letter or stays in place, so more repetitions than letters change nothing.
        limit = len(self.path) + 1
        after = partial(self._after, nodes)
        if len(nodes) == 1 and nodes[0][0] in _ONE_LETTER:
            accepted = self._accepted(*nodes[0])
            self.patterns.spend(limit // 4)
            after = lambda places: (places & accepted) << 1  # noqa: E731
        for _ in range(min(low, limit)):
            places = after(places)
        reached = places
        for _ in range(min(high - low, limit)):
            places = after(places)
            if places | reached == reached:
                break
            reached |= places
        return reached

    def _accepted(self, kind: Any, value: Any) -> int:
        if kind is op.LITERAL:
            return self.letters.get(chr(value), 0)
        key = kind, id(value)  # the parsed expression keeps the list alive
        if key not in self.known:
            self.patterns.spend(len(self.letters) * (len(value) if kind is op.IN else 1) // 2)
            self.known[key] = sum(places for letter, places in self.letters.items() if _accepts(kind, value, letter))
        return self.known[key]

    def _fixed_places(self, kind: Any) -> int:
        if kind in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return 1
        if kind in (op.AT_END, op.AT_END_STRING):
            return 1 << len(self.path)
        return self._boundaries if kind is op.AT_BOUNDARY else ~self._boundaries

    @cached_property
    def _boundaries(self) -> int:
        return sum(1 << found.start() for found in re.finditer(r"\b", self.path))


def _accepts(kind: Any, value: Any, letter: str) -> bool:
    if kind is op.ANY:
        return letter != "\n"
    if kind is op.RANGE:
        return value[0] <= ord(letter) <= value[1]
    if kind is op.CATEGORY:
        return not _CATEGORIES[_NOT[value]](letter) if value in _NOT else bool(_CATEGORIES[value](letter))
    if kind is op.IN:
        negated = value[0][0] is op.NEGATE
        return any(_accepts(*one, letter) for one in value[negated:]) != negated
    return (ord(letter) == value) == (kind is op.LITERAL)  # or NOT_LITERAL
