"""TurboCTC's conformer encoder, with names and arithmetic of transformers' `GraniteSpeech5Encoder`.

Frames come at 50 per second; each subsampling block halves their rate. The middle block's output gets the CTC head's probabilities back
(Nozaki and Komatsu, arXiv 2104.02724). A clip's result does not depend on the other clips. `encoder.py` describes the two layouts.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from granite_speech.config_ctc import GraniteSpeech5EncoderConfig
from granite_speech.errors import InputError
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.conformer_parts import block_distances
from granite_speech.modules.conformer_stack import ConformerEncoder
from granite_speech.modules.ctc_conformer import GraniteSpeech5EncoderBlock, GraniteSpeech5EncoderSubsamplingBlock
from granite_speech.modules.ctc_masks import clips_of, mask_of
from granite_speech.modules.ctc_outputs import GraniteSpeech5EncoderModelOutput
from granite_speech.modules.encoder_files import EncoderFiles
from granite_speech.modules.few_sizes import with_few_sizes
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.packing import Bucket, Segments
from granite_speech.modules.prompts import refuse_arguments

__all__ = ["GraniteSpeech5Encoder"]


class GraniteSpeech5Encoder(ConformerEncoder, EncoderFiles):
    """Log-mel frames with their deltas to audio states."""

    config_class: ClassVar[type[GraniteSpeech5EncoderConfig]] = GraniteSpeech5EncoderConfig
    base_model_prefix = "encoder"
    _no_split_modules: ClassVar[set[str]] = {"GraniteSpeech5EncoderBlock", "GraniteSpeech5EncoderSubsamplingBlock"}
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["conv.norm"]

    def __init__(self, config: GraniteSpeech5EncoderConfig):
        super().__init__()
        config.validate()
        self.config = config
        self.input_linear = LoraLinear(config.num_mel_bins * 4, config.hidden_size)  # pairs of frames of log-mel and deltas
        kinds = (GraniteSpeech5EncoderBlock, GraniteSpeech5EncoderSubsamplingBlock)
        numbers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([kinds[number in config.subsample_layers](config, number) for number in numbers])
        self.out = LoraLinear(config.hidden_size, config.vocab_size)
        self.out_mid = LoraLinear(config.vocab_size, config.hidden_size)
        self.recomputation = None

    @property
    def attention_dists(self) -> Tensor:
        """`block_distances`, which transformers' encoder passes to its blocks."""
        return block_distances(self.config.context_size, self.config.max_position_embeddings, self.out.weight.device)

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        output_attention_mask: bool = True,
        *,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        clips: Segments | None = None,
        **unknown: Any,
    ) -> GraniteSpeech5EncoderModelOutput | tuple:
        """Encode a padded batch; it is packed at once, unless there are hooks.

        Args:
            input_features: `(clips, frames, 4 * num_mel_bins)`; converted to the weights' dtype.
            attention_mask: `(clips, frames)`, 1 for frames and 0 for the padding after them; None: no clip is padded.
            output_attention_mask: return the mask of the output, if `attention_mask` is given.
            output_hidden_states: also return the input projection and every block's output, before the feedback is added to it; with one
                or more numbers, these alone, and None in place of the others. If omitted, as the configuration says.
            output_attentions: accepted. The attention's weights are never in memory, and transformers returns none for this model either.
            return_dict: False returns a tuple of the fields that are not None; if omitted, as the configuration says.
            clips: what `attention_mask` says, known on the host; used in its place.

        Returns:
            `last_hidden_state` `(clips, frames left, hidden_size)`, zero beyond a clip's end; so are `hidden_states`. Every subsampling
            block leaves half of the frames, rounded down.

        Raises:
            InputError, UnsupportedError: features or a mask of another shape; padding that is not after the frames.
        """
        refuse_arguments(unknown, "GraniteSpeech5Encoder.forward")
        clips = self.clips(input_features, attention_mask) if clips is None else clips
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        collected: list[tuple[Tensor, Segments]] | None = [] if wanted else None
        is_padded = have_hooks(*self.children())
        states, left = self.encode(input_features if is_padded else clips.pack(input_features), clips, collected)
        width = self.frames_left(input_features.shape[1])

        def padded(one: Tensor, where: Segments, width: int) -> Tensor:
            return where.pad(where.pack(one) if is_padded else one, width)  # states of padding are cleared in both layouts

        hidden_states = None
        if collected is not None:
            indices = _selected(wanted, len(collected))
            widths = [self.frames_left(input_features.shape[1], number) for number in range(len(collected))]
            several = zip(collected, widths, strict=True)
            hidden_states = tuple(padded(*one, width) if at in indices else None for at, (one, width) in enumerate(several))
        output = GraniteSpeech5EncoderModelOutput(
            last_hidden_state=padded(states, left, width),
            hidden_states=hidden_states,
            attention_mask=mask_of(left, width) if attention_mask is not None and output_attention_mask else None,
        )
        return output if self.config.chosen("return_dict", return_dict) else output.to_tuple()

    def clips(self, input_features: Tensor, attention_mask: Tensor | None) -> Segments:
        """Where the clips of a padded batch lie once it is packed.

        Raises:
            InputError, UnsupportedError: as `forward`.
        """
        width = self.input_linear.in_features
        if input_features.dim() != 3 or input_features.shape[2] != width or not input_features.is_floating_point():
            raise InputError(
                got=f"input_features of shape {tuple(input_features.shape)} and {input_features.dtype}",
                expected=f"floats (clips, frames, {width})",
                remedy="Make them with GraniteSpeech5FeatureExtractor or GraniteSpeech5Processor",
            )
        return clips_of(input_features, attention_mask)

    def clips_left(self, clips: Segments) -> Segments:
        """Where the clips' frames lie after all blocks."""
        for _ in range(self.config.subsamplings):
            clips = clips.halved()
        return clips

    def frames_left(self, frames: int, blocks: int | None = None) -> int:
        """Of a clip of so many frames, after the first blocks, or after all."""
        for number in range(self.config.num_hidden_layers if blocks is None else blocks):
            frames = frames // 2 if number in self.config.subsample_layers else frames
        return frames

    def encode(
        self, x: Tensor, clips: Segments | Bucket, collected: list[tuple[Tensor, Segments | Bucket]] | None = None
    ) -> tuple[Tensor, Segments | Bucket]:
        """Encode frames.

        Args:
            x: packed, `(total_frames, 4 * num_mel_bins)`, or padded, `(clips, frames, 4 * num_mel_bins)`.
            clips: where each clip lies.
            collected: a list that takes the input projection and every block's output before the feedback, and where its clips lie.

        Returns:
            States `(frames left, hidden_size)`, or `(clips, frames left, hidden_size)`, and where each clip's lie.
        """
        x = x.to(self.input_linear.activation_dtype)
        if x.dim() == 2 and not self.training:
            x = with_few_sizes(x)  # once, rather than for every product
        before = None if collected is None else []
        for state, where in self._states(self.input_linear(x), clips, before):
            if collected is not None:
                kept = before.pop() if before else state
                collected.append((kept[: where.total] if kept.dim() == 2 else kept, where))
        return state[: where.total] if state.dim() == 2 else state, where

    def _halves(self, number: int) -> bool:
        return number - 1 in self.config.subsample_layers

    def _feedback(self, x: Tensor, taken: list[Tensor] | None) -> Tensor:
        # What is asked for here is not the logits but the block's output, which transformers records before the feedback is added.
        if taken is not None:
            taken.append(x)
        return super()._feedback(x, None)


def _selected(wanted: bool | int | list[int], count: int) -> set[int]:
    """Which of so many hidden states `output_hidden_states` asks for; numbers may be negative, and others select nothing."""
    if wanted is True:
        return set(range(count))
    return {one % count for one in ([wanted] if isinstance(wanted, int) else wanted) if -count <= one < count}
