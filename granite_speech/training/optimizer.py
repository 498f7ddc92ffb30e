"""AdamW with float32 master weights for a model of any dtype, and the learning rate schedule.

A bfloat16 model is an ordinary one: its modules and kernels see one dtype, validation and saving use the trained weights, and frozen
weights take two bytes. Each trained parameter has a float32 master, which receives the gradients and the steps, and is rounded into the
model after each step. (torch.autocast would keep frozen weights in float32.) In a float32 model the masters are the parameters themselves.

AdamW: Loshchilov and Hutter, arXiv 1711.05101.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from granite_speech.errors import CheckpointError

__all__ = ["MasterAdamW", "ParameterGroup", "learning_rate", "parameter_groups"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with common optimizer settings.

    Attributes:
        parameters: by name.
        weight_decay: of AdamW.
        rate: factor on the learning rate.
    """

    parameters: Mapping[str, nn.Parameter]
    weight_decay: float = 0.0
    rate: float = 1.0


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float, rate: float = 1.0) -> list[ParameterGroup]:
    """One group of matrices, with weight decay, and one of vectors (biases, norms), without."""
    matrices = {name: one for name, one in parameters.items() if one.dim() > 1}
    vectors = {name: one for name, one in parameters.items() if one.dim() <= 1}
    return [ParameterGroup(matrices, weight_decay, rate), ParameterGroup(vectors, 0.0, rate)]


def learning_rate(step: int, steps: int, *, peak: float, warmup: float) -> float:
    """Learning rate of a step, counted from 0: a linear rise over the fraction `warmup` of all steps, then a cosine decay to 0."""
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class MasterAdamW:
    """AdamW on float32 masters of a model's parameters.

    Args:
        groups: each parameter may be in only one.
        beta2: decay of the second moment.
    """

    def __init__(self, groups: Iterable[ParameterGroup], *, beta2: float = 0.999):
        groups = [group for group in groups if group.parameters]
        self.parameters = {name: one for group in groups for name, one in group.parameters.items()}
        self.masters = {name: _master(one) for name, one in self.parameters.items()}
        self.rates = [group.rate for group in groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": [self.masters[name] for name in group.parameters], "weight_decay": group.weight_decay} for group in groups],
            betas=(0.9, beta2),
            # One call for all parameters: for a small model with hundreds of them, separate steps cost more than the gradients.
            fused=all(one.dtype == torch.float32 for one in self.masters.values()),
        )

    def collect(self) -> None:
        """Add a backward pass's gradients to the masters' in float32, where sums do not lose small ones to rounding."""
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if parameter is master or parameter.grad is None:
                continue
            gradient = parameter.grad.to(master.dtype)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def all_reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace each gradient by its sum over processes. `reduce` is called once, on a flat tensor of all gradients."""
        masters = [one for one in self.masters.values() if one.grad is not None]
        flat = reduce(torch.cat([one.grad.flatten() for one in masters]))
        for one, part in zip(masters, flat.split([one.numel() for one in masters]), strict=True):
            one.grad = part.view_as(one)

    def clip(self, norm: float) -> Tensor:
        """Scale the gradients so that their total norm is at most `norm`. Returns the norm before scaling, a scalar."""
        return nn.utils.clip_grad_norm_(self.masters.values(), norm)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take a step with this learning rate, clear the gradients, and round the masters into the model."""
        for group, factor in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, master in self.masters.items():
            if self.parameters[name] is not master:
                self.parameters[name].copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, for `load`."""
        tensors = {f"master/{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[master].items()}
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            CheckpointError: names or shapes of the parameters differ.
        """
        stored = {name.partition("/")[2]: one.shape for name, one in tensors.items() if name.startswith("master/")}
        wanted = {name: master.shape for name, master in self.masters.items()}
        if stored != wanted:
            differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
            raise CheckpointError(
                got=f"a training checkpoint that differs in {len(differing)} parameters, such as {differing[0]}",
                expected="the parameters that train now",
                remedy="Resume with the model and options it was written with",
            )
        for name, master in self.masters.items():
            master.copy_(tensors[f"master/{name}"])
            moments = {key: tensors[f"{key}/{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors}
            # The fused step needs all its state on the parameter's device, the step count included.
            self.optimizer.state[master] = {key: value.to(master.device) for key, value in moments.items()}
        self._publish()


def _master(parameter: nn.Parameter) -> nn.Parameter:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return parameter if parameter.dtype == wide else nn.Parameter(parameter.detach().to(wide))
