"""Rotary positions (Su et al., RoFormer, arXiv 2104.09864): angles, and the rotation of queries and keys by them."""

import torch
from torch import Tensor, nn

from granite_speech.config import GraniteConfig

__all__ = ["GraniteRotaryEmbedding", "Rotary", "rotary_embedding", "rotate", "signed"]

Rotary = tuple[Tensor, Tensor]


def rotary_frequencies(config: GraniteConfig, device: torch.device) -> Tensor:
    """Angle per position of every feature of a head, `(head_dim,)` float32: first half negative, second half positive."""
    rope, width = config.rope_parameters, config.attention_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequencies = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    return torch.cat((-frequencies, frequencies))


def rotary_embedding(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Cosine and signed sine of every position, `(total_tokens, 1, head_dim)` each, for `rotate`.

    Computed in float32, rounded to dtype. The sine's first half is negative.
    """
    angles = positions.float()[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of `(total_tokens, heads, head_dim)` by the angles of their positions."""
    # Not addcmul, which rounds only once: eager code in bfloat16 rounds both products.
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def signed(sin: Tensor) -> Tensor:
    """Between transformers' sine, whose halves are equal, and the signed one of `rotate`: negates the first half."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


class GraniteRotaryEmbedding(nn.Module):
    """Cosine and sine of positions. It has no weights."""

    def __init__(self, config: GraniteConfig):
        super().__init__()
        self.config = config
        self._frequencies: Tensor | None = None
        self._given: tuple[Tensor, int | None] | None = None

    def forward(self, x: Tensor, position_ids: Tensor) -> Rotary:
        """`(batch, sequence)` positions to two of `(batch, sequence, head_dim)`, in x's dtype and on its device.

        Both halves of the sine are equal, as in transformers.
        """
        angles = position_ids.to(x.device).float()[..., None] * self.frequencies(x.device).abs()
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    @property
    def inv_freq(self) -> Tensor:
        """`(head_dim / 2,)`: angle per position of every pair of features."""
        device = torch.device("cpu") if self._frequencies is None else self._frequencies.device
        return self.frequencies(device).chunk(2)[1]

    def frequencies(self, device: torch.device) -> Tensor:
        """`rotary_frequencies` on the device."""
        # Not a buffer, because checkpoints do not have it. Cached, because computing it takes as many launches as half a layer.
        if self._frequencies is None or self._frequencies.device != device:
            with torch.inference_mode(False):  # a tensor from inference mode could not be used in a later backward pass
                self._frequencies = rotary_frequencies(self.config, device)
        return self._frequencies

    def use_frequencies(self, inv_freq: Tensor) -> None:
        """Use these frequencies, `(head_dim / 2,)` float32, in place of the configuration's: they are of another model's module."""
        # Changes in place count too; tensors of inference mode do not say whether there were any.
        given = inv_freq, None if inv_freq.is_inference() else inv_freq._version
        if self._given is None or given[0] is not self._given[0] or given[1] != self._given[1]:
            self._given = given
            with torch.inference_mode(False):
                self._frequencies = torch.cat((-inv_freq, inv_freq))
