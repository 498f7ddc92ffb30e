"""Whether Python code of somebody else runs with the modules of a model: the padded layout is for such code.

The public classes run packed, because no work is then done for padding. But hooks, and modules put in the place of ours, are
written for transformers' padded tensors. `encoder.py` describes both layouts.
"""

from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as every_module

__all__ = ["have_hooks", "require_gradient"]

_PACKABLE = ("torch", "granite_speech", "peft")  # packages whose modules take any number of leading dimensions


def require_gradient(module: nn.Module, arguments: Any, output: Tensor) -> None:
    """A forward hook of `enable_input_require_grads`. It takes either layout, so it does not count in `have_hooks`."""
    output.requires_grad_(True)


def have_hooks(*roots: nn.Module) -> bool:
    """Whether a hook is registered on one of these modules or inside one, or on all modules, or a `forward` was replaced.

    A module of another package, put in the place of one of ours, counts as well. Looks at every module once: call this for each
    forward pass or request, not for each layer.
    """
    if every_module._has_any_global_hook():
        return True
    waiting: list[nn.Module | None] = list(roots)
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        own = module.__dict__
        if own["_forward_hooks"] and any(one is not require_gradient for one in own["_forward_hooks"].values()):
            return True
        if own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"] or "forward" in own:
            return True
        if _is_foreign(type(module)):
            return True
        if children := own["_modules"]:
            waiting.extend(children.values())
    return False


@cache
def _is_foreign(kind: type[nn.Module]) -> bool:
    return kind.__module__.partition(".")[0] not in _PACKABLE
