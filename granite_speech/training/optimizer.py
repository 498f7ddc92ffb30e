"""AdamW on float32 masters, whatever dtype the model computes in, and the rate's course.

A model in bfloat16 is an ordinary model in bfloat16: its modules and kernels see one dtype, validation and saving run what was trained,
and frozen weights cost two bytes. Only what trains has a float32 copy here, which takes the gradients and the steps and is rounded
into the model after each. (torch.autocast would leave float32 weights beside bfloat16 activations, which operations with one dtype a
call refuse, and would hold the frozen weights in float32 too.) In float32 the masters are the model's own parameters.

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
    """Parameters that are stepped alike.

    Attributes:
        parameters: by name.
        weight_decay: AdamW's.
        rate: factor of the learning rate.
    """

    parameters: Mapping[str, nn.Parameter]
    weight_decay: float = 0.0
    rate: float = 1.0


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float, rate: float = 1.0) -> list[ParameterGroup]:
    """Matrices with decay, and vectors (biases, norms) without."""
    matrices = {name: one for name, one in parameters.items() if one.dim() > 1}
    vectors = {name: one for name, one in parameters.items() if one.dim() <= 1}
    return [ParameterGroup(matrices, weight_decay, rate), ParameterGroup(vectors, 0.0, rate)]


def learning_rate(step: int, steps: int, *, peak: float, warmup: float) -> float:
    """The rate of a step, counted from 0: linear up to the peak over `warmup` of all steps, then half a cosine to 0."""
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class MasterAdamW:
    """AdamW whose parameters are float32, for a model in any dtype.

    Args:
        groups: each parameter in one of them.
        beta2: how slowly the second moment forgets.
    """

    def __init__(self, groups: Iterable[ParameterGroup], *, beta2: float = 0.999):
        groups = [group for group in groups if group.parameters]
        self.parameters = {name: one for group in groups for name, one in group.parameters.items()}
        self.masters = {name: _master(one) for name, one in self.parameters.items()}
        self.rates = [group.rate for group in groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": [self.masters[name] for name in group.parameters], "weight_decay": group.weight_decay} for group in groups],
            betas=(0.9, beta2),
            # One call for all parameters: a small model has hundreds of them, and a step of each by itself costs more than its gradient.
            fused=all(one.dtype == torch.float32 for one in self.masters.values()),
        )

    def collect(self) -> None:
        """Add the gradients of a backward pass to the masters', in float32: many small ones are not lost in a rounded sum."""
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if parameter is master or parameter.grad is None:
                continue
            gradient = parameter.grad.to(master.dtype)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def add_up(self, added: Callable[[Tensor], Tensor]) -> None:
        """Put in each gradient's place what `added` makes of it: a sum over processes. Called once, with all of them in one tensor."""
        masters = [one for one in self.masters.values() if one.grad is not None]
        flat = added(torch.cat([one.grad.flatten() for one in masters]))
        for one, part in zip(masters, flat.split([one.numel() for one in masters]), strict=True):
            one.grad = part.view_as(one)

    def clip(self, norm: float) -> Tensor:
        """Scale all gradients down to this norm at most; returns what it was, a scalar."""
        return nn.utils.clip_grad_norm_(self.masters.values(), norm)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Step with this learning rate, forget the gradients, and round the masters into the model."""
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
        """Masters and moments by name: everything that `load` needs."""
        tensors = {f"master/{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[master].items()}
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned for the same parameters.

        Raises:
            CheckpointError: other parameters, or others' shapes.
        """
        stored = {name.partition("/")[2]: one.shape for name, one in tensors.items() if name.startswith("master/")}
        wanted = {name: master.shape for name, master in self.masters.items()}
        if stored != wanted:
            differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
            raise CheckpointError(
                got=f"a training checkpoint that differs in {len(differing)} parameters, such as {differing[0]}",
                expected="the parameters that train now",
                remedy="Go on with the model and the options that it was written with",
            )
        for name, master in self.masters.items():
            master.copy_(tensors[f"master/{name}"])
            moments = {key: tensors[f"{key}/{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors}
            # torch keeps the count of steps where its fused kernels want it.
            self.optimizer.state[master] = {key: value.to(master.device) for key, value in moments.items()}
        self._publish()


def _master(parameter: nn.Parameter) -> nn.Parameter:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return parameter if parameter.dtype == wide else nn.Parameter(parameter.detach().to(wide))
