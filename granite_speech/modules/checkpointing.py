"""Gradient checkpointing: layers keep only their input, and run again when the backward pass reaches them.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. Method names are those of transformers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from granite_speech.errors import InputError
from granite_speech.modules.hooks import require_gradient

__all__ = ["GradientCheckpointing", "Recomputation"]

_OPTIONS = ("context_fn", "debug", "determinism_check", "early_stop", "preserve_rng_state", "use_reentrant")


@dataclass(frozen=True)
class Recomputation:
    """Which layers run again in the backward pass, and how.

    Attributes:
        options: of `torch.utils.checkpoint.checkpoint`.
        every_n_layers: every n-th layer runs again; the others keep their activations.
        offload: whether the inputs of layers on a GPU wait in host memory.
    """

    options: Mapping[str, Any]
    every_n_layers: int
    offload: bool

    def run(self, layer: nn.Module, number: int, x: Tensor, **given: Any) -> Tensor:
        """`layer(x, **given)`; gradients flow through `x` alone."""
        if number % self.every_n_layers or not torch.is_grad_enabled():
            return layer(x, **given)
        if self.options["use_reentrant"] and not x.requires_grad:
            # Reentrant checkpointing has gradients only if its input needs one.
            if not any(one.requires_grad for one in layer.parameters()):
                return layer(x, **given)
            x = x.detach().requires_grad_()
        runs = 0

        def call(x: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            with nullcontext() if runs == 1 else _frozen_statistics(layer):
                return layer(x, **given)

        stored = torch.autograd.graph.save_on_cpu(pin_memory=True) if self.offload and x.device.type == "cuda" else nullcontext()
        with stored:
            return checkpoint(call, x, **self.options)


@contextmanager
def _frozen_statistics(layer: nn.Module) -> Iterator[None]:
    """BatchNorm computes the same output as in training, but does not count the batch a second time."""
    norms = [one for one in layer.modules() if isinstance(one, nn.BatchNorm1d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class GradientCheckpointing:
    """Switches for a module that has, or contains modules that have, an attribute `recomputation`."""

    supports_gradient_checkpointing = True
    _gradient_hook: RemovableHandle | None = None

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Let the blocks of the encoder and the layers of the language model run again in the backward pass, in training mode.

        Gradients are the same and take less memory and more time. No cache is returned meanwhile.

        Args:
            gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`; {"use_reentrant": False} if omitted.
            every_n_layers: the others keep their activations.
            offload: let the layers' inputs wait in host memory.

        Raises:
            InputError: an unknown option, or every_n_layers below 1.
        """
        options = {"use_reentrant": False} | dict(gradient_checkpointing_kwargs or {})
        unknown = sorted(options.keys() - set(_OPTIONS))
        if unknown or every_n_layers < 1:
            raise InputError(
                got=f"gradient checkpointing with {', '.join(unknown) or f'every_n_layers={every_n_layers}'}",
                expected=f"the options {', '.join(_OPTIONS)}, and every_n_layers from 1",
                remedy="Call gradient_checkpointing_enable() without arguments",
            )
        self._set_recomputation(Recomputation(options, every_n_layers, offload))
        if getattr(self, "main_input_name", "input_ids") == "input_ids":
            self.enable_input_require_grads()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """`gradient_checkpointing_enable` by the name that transformers 5.23 and its Trainer use."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self._set_recomputation(None)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable` by transformers 5.23's name."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers run again in the backward pass."""
        return any(getattr(one, "recomputation", None) is not None for one in self.modules())

    @property
    def is_activation_checkpointing(self) -> bool:
        """`is_gradient_checkpointing` by transformers 5.23's name."""
        return self.is_gradient_checkpointing

    def _set_recomputation(self, value: Recomputation | None) -> None:
        for module in self.modules():
            if hasattr(module, "recomputation"):
                module.recomputation = value

    def enable_input_require_grads(self) -> None:
        """Let the embeddings of tokens require gradients, even if their weights do not."""
        if self._gradient_hook is None:
            self._gradient_hook = self.get_input_embeddings().register_forward_hook(require_gradient)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        if self._gradient_hook is not None:
            self._gradient_hook.remove()
            self._gradient_hook = None
