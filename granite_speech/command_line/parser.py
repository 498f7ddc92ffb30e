"""An argument parser that also understands command lines written for whisper and for IBM's command."""

import argparse
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["CommandParser", "or_none", "positive", "truth_value"]

_TRUTH_VALUES = {"true": True, "false": False, "none": None}


class CommandParser(argparse.ArgumentParser):
    """Options may have underscores for dashes, and files may come before, between and after them.

    Each value is attached to its option (`--task=translate`) before argparse sees it, so a value may begin with a dash. Only True,
    False and None are values of an option whose value may be omitted, and only known words follow the first value of an option that
    takes several. So neither takes the file that comes next.
    """

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self._by_name: dict[str, argparse.Action] = {}
        self._words: dict[str, frozenset[str]] = {}

    def option(self, group: Any, *names: str, words: Iterable[str] = (), **settings: Any) -> None:
        """Add an option.

        Args:
            group: of the help, or the parser itself.
            names: with dashes.
            words: several of them, or one text of them with commas, may follow the option.
            settings: as for `add_argument`.
        """
        action = group.add_argument(*names, **settings)
        for name in names:
            self._by_name[name] = action
        if words:
            self._words[action.dest] = frozenset(words)

    def parse_args(self, arguments: Sequence[str], namespace: Any = None) -> argparse.Namespace:
        """As argparse's. A usage error ends the process with status 2."""
        return super().parse_args(self._rearranged(arguments), namespace)

    def _rearranged(self, arguments: Sequence[str]) -> list[str]:
        """All options, each with its value attached, and then all files."""
        options, files, rest = [], [], deque(arguments)
        while rest:
            argument = rest.popleft()
            if argument == "--":
                files += rest
                break
            if not argument.startswith("-") or argument == "-":
                files.append(argument)
                continue
            name, value = self._split(argument)
            action = self._by_name.get(name)
            if action is None:
                options.append(argument)  # --help, --version, or an error that argparse reports
                continue
            if value is None:
                value = self._take_value(action, rest)
            options.append(name if value is None else f"{_long(action)}={value}")
        return [*options, "--", *files] if files else options

    def _split(self, argument: str) -> tuple[str, str | None]:
        """The name of an option, in full and with dashes, and the value that is attached to it."""
        if not argument.startswith("--"):
            return argument[:2], argument[2:].removeprefix("=") or None
        name, equals, value = argument.partition("=")
        name = "--" + name[2:].replace("_", "-")
        if name not in self._by_name:
            longer = [one for one in self._by_name if one.startswith(name)]
            name = longer[0] if len(longer) == 1 else name
        return name, value if equals else None

    def _take_value(self, action: argparse.Action, rest: deque[str]) -> str | None:
        """Take an option's value from the arguments after it; None: there is no value."""
        if action.nargs == "?":
            return rest.popleft() if rest and rest[0].lower() in _TRUTH_VALUES else None
        if not rest or self._is_option(rest[0]):
            return None
        values, words = [rest.popleft()], self._words.get(action.dest, frozenset())
        while words and rest and set(rest[0].lower().split(",")) <= words:
            values.append(rest.popleft())
        return ",".join(values) if words else values[0]

    def _is_option(self, argument: str) -> bool:
        if argument.startswith("--"):
            return argument == "--" or self._split(argument)[0] in self._by_name
        return argument in self._by_name


def _long(action: argparse.Action) -> str:
    return next(name for name in action.option_strings if name.startswith("--"))


def truth_value(text: str) -> bool | None:
    """True, False or None, in any case."""
    if text.lower() not in _TRUTH_VALUES:
        raise argparse.ArgumentTypeError(f"{text!r} is not True or False")
    return _TRUTH_VALUES[text.lower()]


def positive(text: str) -> int:
    """An integer from 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def or_none(kind: Any) -> Any:
    """A type that also takes the word None, which means that the option is not given."""

    def convert(text: str) -> Any:
        if text.lower() == "none":
            return None
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None

    return convert
