"""TurboCTC on packed frames: what `GraniteSpeech5ForCTC` and the stages of fixed shape run."""

import torch
from granite_kernels import OPERATIONS
from granite_kernels.ctc_greedy import CtcGreedy
from torch import Tensor, nn

from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.modules.ctc_encoder import GraniteSpeech5Encoder
from granite_speech.modules.ctc_loss import blank_of
from granite_speech.modules.packing import Bucket, Segments

__all__ = ["FramesToPath"]


class FramesToPath(nn.Module):
    """For a model with `config`, `encoder` and `ctc_head`."""

    config: GraniteSpeech5CTCConfig
    encoder: GraniteSpeech5Encoder
    ctc_head: nn.Module

    @property
    def device(self) -> torch.device:
        return self.encoder.out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, except those of BatchNorm, which may be float32."""
        return self.encoder.out.weight.dtype

    def encode_packed(self, frames: Tensor, clips: Segments | Bucket) -> tuple[Tensor, Segments | Bucket]:
        """The encoder's states of packed frames, from which `ctc_head` computes logits.

        Args:
            frames: `(total_frames, 4 * num_mel_bins)`.
            clips: where each clip lies.

        Returns:
            `(frames left, hidden_size)`, and where each clip's lie.
        """
        return self.encoder.encode(frames, clips)

    @torch.no_grad()
    def greedy_packed(self, states: Tensor, left: Segments | Bucket) -> CtcGreedy:
        """The best path of each clip, with log-probabilities and entropies. Nothing waits for the device.

        Args:
            states, left: what `encode_packed` returned.
        """
        return CtcGreedy(*OPERATIONS["ctc_greedy"].run(self.ctc_head(states), left.cu_seqlens, blank=blank_of(self.config)))
