"""Names of output files: short ones, as long as no two inputs share one and none is that of an input."""

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import PurePath

__all__ = ["STANDARD_INPUT", "output_names", "partial_name"]

STANDARD_INPUT = "-"
# Bytes in a file name, on nearly all file systems.
_LONGEST = 255


def output_names(inputs: Sequence[str], folder: str, suffixes: Sequence[str]) -> list[str]:
    """A name for each input, relative to the folder and without a suffix.

    It is the input's name without its suffix ("speech"), unless two inputs share it; then the whole name ("speech.wav"), then the
    path from the inputs' common folder ("a/speech.wav"), then this with a number. Names that differ only in case count as the same,
    because they are on many file systems. An input given twice has one name. A name too long for its suffixes is cut.

    Args:
        inputs: paths; "-" is called "stdin".
        folder: of the outputs. No output is an input: these names are treated as shared, too.
        suffixes: of all files that may be written for one input.
    """
    real = cache(os.path.realpath)
    places = [one if one == STANDARD_INPUT else _place(one, real) for one in inputs]
    different = list(dict.fromkeys(places))
    files = [one for one in different if one != STANDARD_INPUT]
    reserved = {_key(one) for one in files} | {_key(real(one)) for one in files}
    names = _Names(different, _common_folder(files), _LONGEST - max(map(len, suffixes)))

    def is_reserved(name: str) -> bool:
        parent, last = os.path.split(os.path.join(folder, name))
        outputs = [last + suffix for suffix in suffixes]
        return any(_key(os.path.join(real(parent), one)) in reserved for one in (*outputs, *map(partial_name, outputs)))

    while names.lengthen(is_reserved):
        pass
    found = dict(zip(different, names.current, strict=True))
    return [found[one] for one in places]


def partial_name(name: str) -> str:
    """What a file is called until it is complete. It depends on the name alone, so that a later run finds it."""
    partial = f".{name}.partial"
    if len(os.fsencode(partial)) > _LONGEST:
        partial = f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.partial"
    return partial


class _Names:
    """The present name of each input, and how many times it was lengthened.

    Args:
        places: of the inputs, all different.
        common: the folder that contains them.
        room: bytes that the last part of a name may have.
    """

    def __init__(self, places: Sequence[str], common: str | None, room: int):
        self._places, self._common, self._room = places, common, room
        self._levels = [0] * len(places)
        self.current = [self._name(index) for index in range(len(places))]

    def lengthen(self, is_reserved: Callable[[str], bool]) -> bool:
        """Lengthen each name that is shared or reserved. False: there is none."""
        sharing = defaultdict(list)
        for index, name in enumerate(self.current):
            sharing[_key(name)].append(index)
        clashes = [index for group in sharing.values() if len(group) > 1 or is_reserved(self.current[group[0]]) for index in group]
        for index in clashes:
            self._levels[index] += 1
            self.current[index] = self._name(index)
        return bool(clashes)

    def _name(self, index: int) -> str:
        place, level = self._places[index], self._levels[index]
        if place == STANDARD_INPUT:
            name = "stdin"
        elif level == 0:
            name = PurePath(place).stem or "audio"
        elif level == 1 or self._common is None:
            name = PurePath(place).name or "audio"
        else:
            name = os.path.relpath(place, self._common)
        number = f"-{index + 1}" * max(level - 2, 0)
        while len(os.fsencode(os.path.basename(name) + number)) > self._room:
            name = name[:-1]
        return name + number


def _place(name: str, real: Callable[[str], str]) -> str:
    """The absolute path. Links in its folders are resolved; a link in the last place is an input with a name of its own."""
    parent, last = os.path.split(os.path.abspath(name))
    return os.path.join(real(parent), last)


def _common_folder(files: Sequence[str]) -> str | None:
    """None: they are on different drives, or there are none."""
    try:
        return os.path.commonpath([os.path.dirname(one) for one in files])
    except ValueError:
        return None


def _key(name: str) -> str:
    """The same for all names that some file system takes for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
