"""The conformer CTC encoder. Inside the model it runs packed: frames of all clips in one tensor, `(total_frames, width)`.

Gulati et al., "Conformer" (arXiv 2005.08100), with block attention and Shaw's relative positions (arXiv 1803.02155), and
self-conditioned CTC in the middle (Nozaki and Komatsu, arXiv 2104.02724). Names and arithmetic are those of transformers'
`GraniteSpeechCTCEncoder`; a clip's result does not depend on the other clips.

Every module of a model takes two layouts, told apart by the rank of its input:

- **Packed**, `(total, width)`, with a record of where each clip or sequence lies (`Segments`, `Tokens`). Nothing is computed for
  padding. The model runs like this by itself.
- **Padded**, `(clips, frames, width)`, as in transformers. This is for callers who call a module themselves, and for hooks: if there
  is one (`hooks.have_hooks`), the encoder, the projector or the language model that has it runs padded.

Most modules work on each frame alone and do not care. Those that mix frames (attention, convolution) pack a padded input, run the
same kernel, and pad its result, so both layouts give the same values.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from granite_speech.config import GraniteSpeechEncoderConfig
from granite_speech.errors import UnsupportedError
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.conformer import GraniteSpeechConformerBlock
from granite_speech.modules.conformer_parts import block_distances
from granite_speech.modules.conformer_stack import ConformerEncoder
from granite_speech.modules.encoder_files import EncoderFiles
from granite_speech.modules.few_sizes import with_few_sizes
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.outputs import EncoderOutput
from granite_speech.modules.packing import Segments, pack_clips
from granite_speech.modules.prompts import refuse_arguments

__all__ = ["GraniteSpeechCTCEncoder"]


class GraniteSpeechCTCEncoder(ConformerEncoder, EncoderFiles):
    """Log-mel frames to audio states, 50 per second."""

    main_input_name = "input_features"

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        config.validate()
        self.config = config
        self.num_layers = config.num_layers
        self.input_linear = LoraLinear(config.input_dim, config.hidden_dim)
        self.layers = nn.ModuleList([GraniteSpeechConformerBlock(config) for _ in range(config.num_layers)])
        self.out = LoraLinear(config.hidden_dim, config.output_dim)
        self.out_mid = LoraLinear(config.output_dim, config.hidden_dim)
        self.recomputation = None

    @property
    def attention_dists(self) -> Tensor:
        """`block_distances`, which transformers' encoder passes to its blocks."""
        return block_distances(self.config.context_size, self.config.max_pos_emb, self.out.weight.device)

    def forward(
        self,
        hidden_states: Tensor,
        lengths: list[int] | Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_ctc_logits: bool | None = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> EncoderOutput | tuple[Tensor, ...]:
        """Encode a padded batch; it is packed at once, unless there are hooks.

        Args:
            hidden_states: `(clips, frames, input_dim)` log-mel features, in the weights' dtype.
            lengths: each clip's true number of frames, on the host; None: `frames` each, as in transformers.
            output_hidden_states: also return the input projection and every block's output.
            output_attentions: False or None; the kernel has no weights to return.
            output_ctc_logits: also return the CTC head's logits, of the middle block's output and of the last one's.
            return_dict: False returns a tuple.

        Returns:
            `last_hidden_state` `(clips, frames, output width)`, zero beyond a clip's length; so are `hidden_states` and `ctc_logits`, if
            they are asked for.
        """
        refuse_arguments(unknown, "GraniteSpeechCTCEncoder.forward")
        if output_attentions:
            raise UnsupportedError(
                got="output_attentions=True for the encoder",
                expected="output_attentions of the language model",
                remedy="Omit it; the encoder's attention kernel never has the weights in memory",
            )
        x, clips = pack_clips(hidden_states, lengths)
        width, is_padded = hidden_states.shape[1], have_hooks(*self.children())
        collected, ctc = [] if output_hidden_states else None, [] if output_ctc_logits else None
        x = self.encode(clips.pad(x, width) if is_padded else x, clips, collected, ctc)

        def padded(several: list[Tensor] | None) -> tuple[Tensor, ...] | None:
            # States of padding are cleared in both layouts.
            return None if several is None else tuple(clips.pad(clips.pack(one) if is_padded else one, width) for one in several)

        [states] = padded([x])
        output = EncoderOutput(last_hidden_state=states, hidden_states=padded(collected), ctc_logits=padded(ctc))
        return output.to_tuple() if return_dict is False else output

    def encode(self, x: Tensor, clips: Segments, collected: list[Tensor] | None = None, ctc: list[Tensor] | None = None) -> Tensor:
        """Encode frames.

        Args:
            x: packed, `(total_frames, input_dim)`, or padded, `(clips, frames, input_dim)`.
            clips: where each clip lies.
            collected: a list that takes the input projection's and every block's output, `(..., hidden_dim)`.
            ctc: a list that takes the CTC head's logits `(..., output_dim)`: of the middle block's output, if there are two blocks or more,
                and of the last one's.

        Returns:
            `(..., output width)`, in the same layout: the last block's output, after those of `cat_hidden_layers` if there are any.
        """
        for state in self.blocks(x, clips, collected, ctc):
            last = state
        if ctc is not None:
            ctc.append(self.ctc_logits(last))
        return last

    def ctc_logits(self, states: Tensor) -> Tensor:
        """The CTC head's logits `(..., output_dim)` of states that `encode` returned, `(..., output width)`."""
        return self.out(states[..., -self.config.hidden_dim :])

    def blocks(
        self, x: Tensor, clips: Segments, collected: list[Tensor] | None = None, ctc: list[Tensor] | None = None
    ) -> Iterator[Tensor]:
        """`encode`, one block at a time, so that other work can run between the blocks of a long clip. The last value is the result.

        `ctc` takes the middle block's logits alone.
        """
        wanted = set(self.config.cat_hidden_layers or ())
        exported, rows, logits = [], x.shape[0], None if ctc is None else []
        if x.dim() == 2 and not self.training:
            x = with_few_sizes(x)  # once, rather than for every product
        # Each state is after the CTC feedback is added: transformers adds it in place, so the exported state includes it.
        for number, (state, _) in enumerate(self._states(self.input_linear(x), clips, logits)):
            state = state[:rows] if len(state) > rows else state
            if number in wanted:
                exported.append(state)
            if collected is not None:
                collected.append(state)
            if logits:
                ctc.append(logits.pop()[:rows])
            if number < self.num_layers:
                yield state
        yield torch.cat([*exported, state], dim=-1) if exported else state

    def _with_feedback(self, x: Tensor, taken: list[Tensor] | None) -> Tensor:
        # Padded: there are hooks. One that keeps this block's output finds the feedback in it afterwards, because transformers adds in
        # place. autograd forbids that where a backward hook has made the output a view.
        if x.dim() == 2 or x._is_view():
            return super()._with_feedback(x, taken)
        return x.add_(self._feedback(x.clone(), taken))
