"""Which modules a new adapter changes: peft's `target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern`."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from granite_speech.errors import InputError
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.adapter_config import known_paths

__all__ = ["ALL_LINEAR", "matches", "target_paths", "target_suffixes"]

ALL_LINEAR = "all-linear"


def target_paths(modules: dict[str, nn.Module], options: dict[str, Any]) -> list[str]:
    """Paths of the modules that the options name.

    Args:
        modules: every module of the whole model by its path.
        options: of peft's LoraConfig. `target_modules` is a list of names or ends of paths, a regular expression for whole paths, or
            "all-linear" (every linear layer except the output head). Paths of transformers' model are understood too.

    Raises:
        InputError: no target_modules, an invalid regular expression, or options that no module matches.
    """
    targets, excluded = options.get("target_modules"), options.get("exclude_modules")
    if not targets:
        raise InputError(
            got="an adapter's configuration without target_modules",
            expected="names of linear layers",
            remedy="Pass target_modules=['q_proj', 'v_proj'], or 'all-linear'",
        )
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        found = [path for path, module in modules.items() if isinstance(module, LoraLinear)]
    else:
        found = [path for path in modules if matches(path, targets)]
    if not isinstance(targets, str) and options.get("layers_to_transform") is not None:
        found = [path for path in found if _is_in_layers(path, options["layers_to_transform"], options.get("layers_pattern"))]
    found = [path for path in found if not (excluded and matches(path, excluded))]
    if not found:
        raise InputError(
            got=f"target_modules={targets!r:.200}, which no module of this model matches",
            expected="names of linear layers, such as q_proj and v_proj of the language model, or to_q and to_kv of the encoder",
            remedy="Choose among the names that model.named_modules() shows",
        )
    return found


def target_suffixes(modules: dict[str, nn.Module], chosen: Iterable[str]) -> list[str]:
    """The shortest ends of paths that name these modules and no others, which every version of peft understands."""
    chosen = set(chosen)
    others = [path for path in modules if path not in chosen]
    suffixes = set()
    for path in chosen:
        parts = path.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        suffixes.add(next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)))
    return sorted(suffixes)


def matches(path: str, names: str | Iterable[str]) -> bool:
    """Whether a path is meant by a regular expression, or by one of several names or ends of paths."""
    spellings = known_paths(path)
    if not isinstance(names, str):
        return any(one == name or one.endswith(f".{name}") for one in spellings for name in names)
    try:
        return any(re.fullmatch(names, one) for one in spellings)
    except re.error as error:
        raise InputError(
            got=f"target_modules or exclude_modules {names!r:.100}, which does not parse as a regular expression ({error})",
            expected="a regular expression for whole paths, or a list of names",
            remedy=r"Pass for example r'.*\.language_model\..*\.q_proj'",
        ) from error


def _is_in_layers(path: str, layers: int | Iterable[int], pattern: str | Iterable[str] | None) -> bool:
    names = [pattern] if isinstance(pattern, str) else list(pattern or [r"[^.]*"])
    found = next((match for name in names if (match := re.match(rf".*\.{name}\.(\d+)\.", path))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)
