"""Outputs of TurboCTC, with the fields of transformers' classes in the order of its keys and tuples."""

from dataclasses import dataclass, field

import torch

from granite_speech.modules.outputs import ModelOutput
from granite_speech.modules.packing import Segments

__all__ = ["CausalLMOutput", "GraniteSpeech5CTCGenerateOutput", "GraniteSpeech5EncoderModelOutput"]


@dataclass
class GraniteSpeech5EncoderModelOutput(ModelOutput):
    """Output of the encoder.

    Attributes:
        last_hidden_state: `(clips, frames left, hidden_size)`; zero beyond a clip's end.
        pooler_output, attentions: None, as in transformers.
        attention_mask: `(clips, frames left)` int32, 1 for frames, if a mask was given.
        hidden_states: input projection and every block, each `(clips, frames left there, hidden_size)`, if requested. Last, because
            transformers adds them to its output when that is made.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    attention_mask: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    """Output of `GraniteSpeech5ForCTC`.

    Attributes:
        loss: of CTC, if labels were given: a scalar, or `(clips,)` if the configuration's reduction is "none".
        logits: `(clips, frames left, vocabulary)`; zero beyond a clip's end.
        hidden_states: as of the encoder.
        attentions: None.
        packed_logits, clips: for `generate`: the logits of frames alone, and where each clip's lie. Not among the keys.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    packed_logits: torch.Tensor | None = field(default=None, repr=False, metadata={"internal": True})
    clips: Segments | None = field(default=None, repr=False, metadata={"internal": True})


@dataclass
class GraniteSpeech5CTCGenerateOutput(ModelOutput):
    """Output of `GraniteSpeech5ForCTC.generate` with `return_dict_in_generate`.

    Attributes:
        sequences: `(clips, frames left)` int64, the best token of each frame; `pad_token_id`, which is the blank, beyond a clip's end.
        logits, attentions, hidden_states: as of `forward`.
    """

    sequences: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
