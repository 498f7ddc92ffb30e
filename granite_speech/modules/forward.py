"""From token ids and audio features to the language model's last states: the pass that both public models share.

A padded batch is packed at once and stays packed: frames through the encoder, windows through the projector, audio vectors
straight into the packed prompt, tokens through the language model. It is padded again only for a caller who reads a padded
field of the output. The host reads from the device once, everything that shapes depend on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from granite_speech.config import GraniteSpeechConfig
from granite_speech.errors import ConfigError, InputError, UnsupportedError
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.encoder import GraniteSpeechCTCEncoder
from granite_speech.modules.language_model import GraniteModel, Tokens
from granite_speech.modules.outputs import BaseModelOutputWithPooling, GraniteSpeechModelOutputWithPast, Lazy
from granite_speech.modules.packing import Segments, pack_clips
from granite_speech.modules.projector import GraniteSpeechEncoderProjector
from granite_speech.modules.prompts import ModelInputs
from granite_speech.modules.rows import Rows, pack_rows
from granite_speech.modules.transfers import on_device

__all__ = ["SpeechToStates"]


@dataclass(frozen=True)
class PackedPrompt:
    """The language model's input for one call, before its tokens are embedded.

    Attributes:
        rows: where the packed tokens lie in the padded batch.
        cache: keys and values of earlier calls, to which the call adds its own; None: no cache.
        has_audio: for each row, whether it has audio in this call or in the cache.
        ids: `(total_tokens,)` on the host; None if the caller gave embeddings.
        is_audio: `(total_tokens,)` bool on the host, which tokens are audio tokens; None if the caller gave embeddings.
        vectors: `(audio tokens, hidden)`, in the order of the tokens; None: no audio in this call.
        audio: `(total audio tokens, hidden)`, the projector's output, if there are clips.
        clips: where each clip's vectors lie in `audio`.
    """

    rows: Rows
    cache: PagedCache | None
    has_audio: list[bool]
    ids: Tensor | None
    is_audio: Tensor | None
    vectors: Tensor | None
    audio: Tensor | None
    clips: Segments | None


class SpeechToStates(nn.Module):
    """Base of the two public models: everything but the head.

    A subclass sets `config`, `encoder` and `projector`, and has a property `decoder`: the language model without its head.
    """

    config: GraniteSpeechConfig
    encoder: GraniteSpeechCTCEncoder
    projector: GraniteSpeechEncoderProjector

    @property
    def decoder(self) -> GraniteModel:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed_tokens.weight.dtype

    def num_parameters(self) -> int:
        """Number of parameters; a tied one counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def get_audio_features(
        self, input_features: Tensor, input_features_lengths: list[int] | Tensor | None = None, return_dict: bool = True
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Audio vectors of a padded batch of clips.

        Args:
            input_features: `(clips, frames, input_dim)` log-mel features.
            input_features_lengths: each clip's true number of frames; None: `frames` each.

        Returns:
            `last_hidden_state` `(clips, frames, encoder width)` and `pooler_output` `(clips, audio tokens, text hidden size)`,
            zero beyond a clip's end.
        """
        states, clips, vectors, tokens = self.encode_audio(input_features, input_features_lengths)
        width = input_features.shape[1]
        output = BaseModelOutputWithPooling(
            last_hidden_state=Lazy(lambda: clips.pad(states, width)),
            pooler_output=Lazy(lambda: tokens.pad(vectors, tokens.longest)),
        )
        return output if return_dict else output.to_tuple()

    def encode_audio(self, features: Tensor, lengths: list[int] | Tensor | None) -> tuple[Tensor, Segments, Tensor, Segments]:
        """Encoder states and where each clip's lie, then audio vectors and where each clip's lie; both packed."""
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
        states, vectors, tokens = self.encode_packed(frames, clips)
        return states, clips, vectors, tokens

    def encode_packed(self, frames: Tensor, clips: Segments) -> tuple[Tensor, Tensor, Segments]:
        """Encode and project packed frames `(total_frames, input_dim)`, in the model's dtype.

        Returns:
            Encoder states `(total_frames, encoder width)`, audio vectors `(total audio tokens, text hidden size)`, and where each
            clip's vectors lie.
        """
        states = self.encoder.encode(frames, clips)
        return states, *self.projector(states, clips)

    def states(self, inputs: ModelInputs, host: ModelInputs | None = None) -> GraniteSpeechModelOutputWithPast:
        """The forward pass up to the final norm.

        Args:
            inputs: the arguments of `forward`.
            host: `inputs.on_host()`, if the caller has it already.

        Returns:
            Every field that `inputs` asks for; the padded ones are computed when they are read.

        Raises:
            InputError: arguments that do not fit together or to the model.
            UnsupportedError: attention weights of a continued sequence.
        """
        prompt = self.pack_prompt(inputs, host or inputs.on_host())
        rows = prompt.rows
        states, hidden_states, attentions = self.run_prompt(prompt, inputs)
        return GraniteSpeechModelOutputWithPast(
            last_hidden_state=Lazy(lambda: rows.pad(states)),
            past_key_values=prompt.cache,
            hidden_states=None if hidden_states is None else Lazy(lambda: tuple(map(rows.pad, hidden_states))),
            attentions=None if attentions is None else Lazy(lambda: tuple(map(rows.pad_weights, attentions))),
            audio_hidden_states=None if prompt.clips is None else Lazy(lambda: prompt.clips.pad(prompt.audio, prompt.clips.longest)),
            packed_states=states,
            rows=rows,
        )

    def pack_prompt(self, inputs: ModelInputs, host: ModelInputs) -> PackedPrompt:
        """Check a call's arguments, encode its audio, and lay out its tokens. The cache does not change.

        Args:
            inputs: the arguments of `forward`.
            host: `inputs.on_host()`.

        Raises:
            InputError, UnsupportedError: as `states`.
        """
        batch, width = inputs.check(self.device)
        self._check_past(inputs)
        cache = self._cache(inputs, batch)
        _check_cache_position(host.cache_position, cache, width)
        rows = pack_rows((batch, width), self.device, host.attention_mask, host.position_ids, cache)
        audio, vectors, clips = None, None, None
        if inputs.input_features is not None:
            _, _, audio, clips = self.encode_audio(inputs.input_features, host.input_features_lengths)
            vectors = audio
            if host.input_features_mask is not None:
                vectors = _masked(audio, clips, host.input_features_mask, counted=inputs.input_features_lengths is not None)
        if inputs.inputs_embeds is not None:
            # The caller has already merged any audio in; without ids we cannot tell which rows have some.
            ids, is_audio, has_audio = None, None, [True] * len(rows.segments.lengths)
        else:
            ids = host.input_ids.flatten()[rows.kept]
            # The model itself may have emitted an audio token, which then has no vector.
            is_continued = inputs.has_past and vectors is None
            is_audio = self.audio_tokens(ids, None if is_continued else 0 if vectors is None else vectors.shape[0])
            has_audio = [bool(one.any()) for one in is_audio.split(rows.segments.lengths)]
        if cache is not None:
            has_audio = [now or before for now, before in zip(has_audio, cache.has_audio, strict=True)]
        return PackedPrompt(rows, cache, has_audio, ids, is_audio, vectors, audio, clips)

    def _check_past(self, inputs: ModelInputs) -> None:
        """Refuse what cannot be computed for a sequence that continues a cache."""
        if not inputs.has_past:
            return
        if torch.is_grad_enabled() and any(one.requires_grad for one in self.decoder.parameters()):
            raise InputError(
                got="past_key_values while gradients are recorded",
                expected="torch.no_grad() or torch.inference_mode(): no gradient flows through the cache",
                remedy="Wrap the call in torch.no_grad(), or train on whole sequences without past_key_values",
            )
        if inputs.output_attentions:
            raise UnsupportedError(
                got="output_attentions=True with past_key_values",
                expected="attention weights of a whole sequence",
                remedy="Run the whole sequence in one call without past_key_values",
            )

    def _cache(self, inputs: ModelInputs, batch: int) -> PagedCache | None:
        """The caller's cache, a new one if the call should return one, or None."""
        wanted = inputs.use_cache
        if wanted is None:
            wanted = self.config.text_config.use_cache and not self.training
        if inputs.past_key_values is not None or not wanted:
            return inputs.past_key_values
        return PagedCache(self.config.text_config, batch, dtype=self.dtype, device=self.device)

    def audio_tokens(self, ids: Tensor, count: int | None) -> Tensor:
        """Which of the packed ids are audio tokens.

        Args:
            ids: `(total_tokens,)` on the host.
            count: audio vectors, one for each audio token; None: any number of audio tokens.

        Returns:
            `(total_tokens,)` bool on the host.

        Raises:
            InputError: a token that the model does not have, or another number of audio tokens.
        """
        config = self.config
        is_audio = ids == config.audio_token_index
        known = self.decoder.embed_tokens.weight.shape[0]
        outside = ids[~is_audio & ((ids < 0) | (ids >= known))]
        if len(outside):
            raise InputError(
                got=f"token id {int(outside[0])}",
                expected=f"ids from 0 to {known - 1}, or audio_token_index {config.audio_token_index}",
                remedy="Use the processor of this checkpoint",
            )
        tokens = int(is_audio.sum())
        if count is not None and tokens != count:
            raise InputError(
                got=f"{tokens} audio tokens in input_ids and {count} audio vectors from input_features",
                expected="equal numbers",
                remedy="Let the processor make both, from one <|audio|> in the text for each clip",
            )
        return is_audio

    def run_prompt(self, prompt: PackedPrompt, inputs: ModelInputs) -> tuple[Tensor, list[Tensor] | None, list[list[Tensor]] | None]:
        """Run the language model. If that fails, the cache is as it was.

        Args:
            prompt: from `pack_prompt`.
            inputs: the arguments of `forward`.

        Returns:
            Packed states after the final norm, every layer's packed states, and every layer's attention weights by row; the last
            two are None unless requested.
        """
        embeddings, cache = self._embed(prompt, inputs), prompt.cache
        segments = prompt.rows.segments
        before = None if cache is None else cache.lengths
        step = None if cache is None else cache.begin(segments)
        hidden_states = [] if inputs.output_hidden_states else None
        attentions = [] if inputs.output_attentions else None
        try:
            tokens = Tokens(
                segments=segments,
                positions=on_device(prompt.rows.positions, self.device),
                adapter_index=self.adapter_index(prompt.has_audio, segments),
                step=step,
                attentions=attentions,
            )
            states = self.decoder(embeddings, tokens, hidden_states)
        except BaseException:
            if cache is not None:
                cache.lengths = before  # the new tokens' pages stay reserved
            raise
        if cache is not None:
            cache.has_audio = prompt.has_audio
            prompt.rows.advance(cache)
        return states, hidden_states, attentions

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids. An audio token without an audio vector, which a model may emit, counts as token 0."""
        return self.decoder.embed_tokens(torch.where(ids == self.config.audio_token_index, 0, ids))

    def _embed(self, prompt: PackedPrompt, inputs: ModelInputs) -> Tensor:
        """`(total_tokens, hidden)`: the tokens' embeddings, with the audio vectors in place."""
        if inputs.inputs_embeds is not None:
            return prompt.rows.pack(inputs.inputs_embeds)
        embeddings = self.embed_tokens(prompt.rows.pack(inputs.input_ids))
        if prompt.vectors is None or prompt.vectors.shape[0] == 0:
            return embeddings
        places = prompt.is_audio.nonzero().squeeze(1)
        return embeddings.index_copy(0, on_device(places, self.device), prompt.vectors.to(embeddings.dtype))

    def adapter_index(self, has_audio: list[bool], segments: Segments) -> Tensor | None:
        """`(total,)` int32, 0 for the tokens of rows with audio and −1 for the others; None if all rows have audio."""
        if all(has_audio):
            return None
        of_rows = torch.tensor([0 if one else -1 for one in has_audio], dtype=torch.int32)
        return on_device(of_rows.repeat_interleave(torch.tensor(segments.lengths)), self.device)


def _check_cache_position(cache_position: Tensor | None, cache: PagedCache | None, width: int) -> None:
    start = 0 if cache is None else cache.columns
    if cache_position is not None and cache_position.tolist() != list(range(start, start + width)):
        raise InputError(
            got=f"cache_position {cache_position.tolist()!r:.100}",
            expected=f"{start} to {start + width - 1}, which follow from past_key_values",
            remedy="Omit it",
        )


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
