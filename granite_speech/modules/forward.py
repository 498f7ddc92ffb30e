"""From token ids and audio features to the language model's last states.

Frames go packed through the encoder, windows through the projector, and audio vectors straight into the packed prompt. If there are
hooks in the encoder or the projector, that part runs padded.
"""

from typing import Any

import torch
from torch import Tensor, nn

from granite_speech.config import GraniteConfig, GraniteSpeechConfig
from granite_speech.errors import ConfigError, InputError
from granite_speech.modules.encoder import GraniteSpeechCTCEncoder
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.outputs import BaseModelOutputWithPooling, GraniteSpeechModelOutputWithPast, Lazy
from granite_speech.modules.packing import Segments, pack_clips
from granite_speech.modules.projector import GraniteSpeechEncoderProjector
from granite_speech.modules.prompts import ModelInputs, refuse_arguments
from granite_speech.modules.text import PackedPrompt, TextToStates, check_vocabulary
from granite_speech.modules.transfers import on_device

__all__ = ["PackedPrompt", "SpeechToStates"]


class SpeechToStates(TextToStates):
    """Base of the two models of speech: everything but the head. A subclass sets `config`, `encoder` and `projector`."""

    config: GraniteSpeechConfig
    encoder: GraniteSpeechCTCEncoder
    projector: GraniteSpeechEncoderProjector

    @property
    def text_config(self) -> GraniteConfig:
        return self.config.text_config

    def get_encoder(self, modality: str | None = None) -> GraniteSpeechCTCEncoder:
        """The encoder of audio, the only one; `modality` may be "audio" or None."""
        if modality not in (None, "audio"):
            raise InputError(got=f"modality {modality!r}", expected="'audio' or None", remedy="Omit it")
        return self.encoder

    def set_encoder(self, encoder: nn.Module, modality: str | None = None) -> None:
        """Put another encoder in the place of the present one."""
        self.get_encoder(modality)
        self.encoder = encoder

    def get_audio_features(
        self,
        input_features: Tensor,
        input_features_lengths: list[int] | Tensor | None = None,
        return_dict: bool | None = None,
        *,
        output_hidden_states: bool | None = None,
        **unknown: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Audio vectors of a padded batch of clips.

        Args:
            input_features: `(clips, frames, input_dim)` log-mel features.
            input_features_lengths: each clip's true number of frames; None: `frames` each.
            return_dict: False returns a tuple.
            output_hidden_states: also return the encoder's states after every block.

        Returns:
            `last_hidden_state` `(clips, frames, encoder width)` and `pooler_output` `(clips, audio tokens, text hidden size)`,
            zero beyond a clip's end.
        """
        refuse_arguments(unknown, "get_audio_features")
        width = input_features.shape[1] if isinstance(input_features, Tensor) and input_features.dim() == 3 else 0
        hidden_states = None
        if output_hidden_states:
            frames, clips = self.pack_features(input_features, input_features_lengths)
            encoded = self.encoder(clips.pad(frames, width), clips.lengths, output_hidden_states=True)
            hidden_states, states = encoded.hidden_states, clips.pack(encoded.last_hidden_state)
            vectors, tokens = self.project_packed(states, clips)
        else:
            states, clips, vectors, tokens = self.encode_audio(input_features, input_features_lengths)
        output = BaseModelOutputWithPooling(
            last_hidden_state=Lazy(lambda: clips.pad(states, width)),
            pooler_output=Lazy(lambda: tokens.pad(vectors, tokens.longest)),
            hidden_states=hidden_states,
        )
        return output.to_tuple() if return_dict is False else output

    def encode_audio(self, features: Tensor, lengths: list[int] | Tensor | None) -> tuple[Tensor, Segments, Tensor, Segments]:
        """Encoder states and where each clip's lie, then audio vectors and where each clip's lie; both packed."""
        frames, clips = self.pack_features(features, lengths)
        states, vectors, tokens = self.encode_packed(frames, clips)
        return states, clips, vectors, tokens

    def pack_features(self, features: Tensor, lengths: list[int] | Tensor | None) -> tuple[Tensor, Segments]:
        """A padded batch of clips as packed frames in the model's dtype, checked."""
        if not isinstance(features, Tensor) or features.device != self.device:
            got = f"input_features on {features.device}" if isinstance(features, Tensor) else f"input_features of {type(features).__name__}"
            raise InputError(
                got=got, expected=f"a tensor on the model's device, {self.device}", remedy="Move the processor's result with .to()"
            )
        frames, clips = pack_clips(features.to(self.dtype), lengths)
        if frames.shape[1] != self.config.encoder_config.input_dim:
            raise InputError(
                got=f"input_features with {frames.shape[1]} features per frame",
                expected=f"{self.config.encoder_config.input_dim}",
                remedy="Use the processor of this checkpoint",
            )
        width, projected = self.config.encoder_config.output_width, self.config.projector_config.encoder_hidden_size
        if width != projected:
            raise ConfigError(
                got=f"an encoder of output width {width} and a projector with encoder_hidden_size {projected}",
                expected="equal widths",
                remedy="Set projector_config.encoder_hidden_size and build the model again",
            )
        return frames, clips

    def encode_packed(self, frames: Tensor, clips: Segments) -> tuple[Tensor, Tensor, Segments]:
        """Encode and project packed frames `(total_frames, input_dim)`, in the model's dtype.

        Returns:
            Encoder states `(total_frames, encoder width)`, audio vectors `(total audio tokens, text hidden size)`, and where each
            clip's vectors lie.
        """
        if have_hooks(self.encoder):
            # Called as a module, so that its own hooks run.
            states = clips.pack(self.encoder(clips.pad(frames, clips.longest), clips.lengths)[0])
        else:
            states = self.encoder.encode(frames, clips)
        return states, *self.project_packed(states, clips)

    def project_packed(self, states: Tensor, clips: Segments) -> tuple[Tensor, Segments]:
        """Packed encoder states to packed audio vectors, and where each clip's vectors lie."""
        tokens = self.projector.token_segments(clips)
        if have_hooks(self.projector):
            return tokens.pack(self.projector(clips.pad(states, clips.longest))), tokens
        return self.projector.project(states, self.projector.windows(clips)), tokens

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, audio_features: Tensor) -> Tensor:
        """`(batch, sequence, hidden)` bool, true where a vector of `audio_features` goes.

        Args:
            input_ids: `(batch, sequence)`; None: the embeddings that equal the audio token's.
            inputs_embeds: `(batch, sequence, hidden)`.
            audio_features: all vectors, `(..., hidden)`.

        Raises:
            InputError: another number of vectors than places.
        """
        if input_ids is None:
            token = torch.tensor(self.config.audio_token_index, device=inputs_embeds.device)
            places = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            places = input_ids == self.config.audio_token_index
        count, vectors = int(places.sum()), audio_features.numel() // inputs_embeds.shape[-1]
        if count * inputs_embeds.shape[-1] != audio_features.numel():
            raise InputError(
                got=f"{count} audio tokens and {vectors} audio vectors",
                expected="equal numbers",
                remedy="Pass input_features_mask, or the vectors of these clips alone",
            )
        return places.unsqueeze(-1).expand_as(inputs_embeds).to(inputs_embeds.device)

    def get_merged_audio_embeddings(self, input_ids: Tensor, audio_features: Tensor, input_features_mask: Tensor | None = None) -> Tensor:
        """`(batch, sequence, hidden)`: embeddings of the ids, with audio vectors in the place of the audio tokens.

        Args:
            input_ids: `(batch, sequence)`.
            audio_features: `(clips, audio tokens, hidden)`, `get_audio_features(…).pooler_output`.
            input_features_mask: `(clips, audio tokens)` bool, the vectors to use; all if omitted.

        Raises:
            InputError: another number of vectors than audio tokens.
        """
        embeddings = self.embed_tokens(input_ids)
        vectors = audio_features.to(embeddings.device, embeddings.dtype)
        if input_features_mask is not None:
            vectors = vectors[input_features_mask.to(vectors.device, torch.bool)]
        return embeddings.masked_scatter(self.get_placeholder_mask(input_ids, embeddings, vectors), vectors)

    def output(self, prompt: PackedPrompt, *results) -> GraniteSpeechModelOutputWithPast:
        fields = vars(super().output(prompt, *results))
        audio = None if prompt.clips is None else Lazy(lambda: prompt.clips.pad(prompt.audio, prompt.clips.longest))
        return GraniteSpeechModelOutputWithPast(**fields, audio_hidden_states=audio)

    def pack_prompt(self, inputs: ModelInputs, host: ModelInputs) -> PackedPrompt:
        """As `TextToStates.pack_prompt`; encodes the audio."""
        if inputs.input_features is None and (inputs.inputs_embeds is not None or not inputs.has_past):
            return super().pack_prompt(inputs, host)
        rows, cache = self.pack_rows(inputs, host)
        ids = host.input_ids.flatten()[rows.kept]
        if inputs.input_features is None:
            # The model itself may have emitted an audio token, which then has no vector.
            is_audio = self.audio_tokens(ids, None)
            return PackedPrompt(rows, cache, self.rows_with_audio(rows, cache, is_audio), ids, is_audio)
        _, _, audio, clips = self.encode_audio(inputs.input_features, host.input_features_lengths)
        vectors = audio
        if host.input_features_mask is not None:
            vectors = _masked(audio, clips, host.input_features_mask, counted=inputs.input_features_lengths is not None)
        is_audio = self.audio_tokens(ids, vectors.shape[0])
        return PackedPrompt(rows, cache, self.rows_with_audio(rows, cache, is_audio), ids, is_audio, vectors, audio, clips)

    def audio_tokens(self, ids: Tensor, count: int | None) -> Tensor:
        is_audio = ids == self.config.audio_token_index
        check_vocabulary(
            ids[~is_audio], self.decoder.embed_tokens.weight.shape[0], f", or audio_token_index {self.config.audio_token_index}"
        )
        tokens = int(is_audio.sum())
        if count is not None and tokens != count:
            raise InputError(
                got=f"{tokens} audio tokens in input_ids and {count} audio vectors from input_features",
                expected="equal numbers",
                remedy="Let the processor make both, from one <|audio|> in the text for each clip",
            )
        return is_audio

    @property
    def placeholder(self) -> int:
        """The token whose place audio takes. Emitted by the model, it counts as token 0."""
        return self.config.audio_token_index

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids. The placeholder counts as token 0."""
        return self.decoder.embed_tokens(torch.where(ids == self.placeholder, 0, ids))


def _masked(vectors: Tensor, clips: Segments, mask: Tensor, *, counted: bool) -> Tensor:
    """The audio vectors that `input_features_mask` (on the host) keeps, `(kept, hidden)`.

    If the clips' lengths were given, they say how many vectors each has, and the mask must agree.
    """
    mask = mask.to(torch.bool)
    lengths = torch.tensor(clips.lengths)
    right = mask.shape == (len(clips.lengths), clips.longest) and (not counted or torch.equal(mask.sum(1), lengths))
    if not right:
        each = f" with {list(clips.lengths)} true values" if counted else ""
        raise InputError(
            got=f"input_features_mask of shape {tuple(mask.shape)} with {mask.sum(-1).tolist()!r:.100} true values",
            expected=f"shape {(len(clips.lengths), clips.longest)}, one value for each audio vector{each}",
            remedy="Use what the processor returned together with input_features",
        )
    if torch.equal(mask, torch.arange(clips.longest) < lengths[:, None]):
        return vectors  # as the processor makes it: all of each clip's own vectors
    kept = on_device(mask.flatten().nonzero().squeeze(1), vectors.device)
    return clips.pad(vectors, clips.longest).flatten(0, 1).index_select(0, kept)
