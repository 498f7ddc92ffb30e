"""From token ids and audio features to the language model's last states: what the two public models share.

A padded batch comes in, is packed at once, and stays packed: frames through the encoder, windows through the projector,
audio vectors written straight into the packed prompt, tokens through the language model. It is padded again only for a caller
who reads a padded field of the output. The host reads the device once, for all that shapes depend on.
"""

import torch
from torch import Tensor, nn

from granite_speech.config import GraniteSpeechConfig
from granite_speech.errors import ConfigError, InputError, UnsupportedError
from granite_speech.modules import adapter
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.encoder import GraniteSpeechCTCEncoder
from granite_speech.modules.language_model import GraniteModel, Tokens
from granite_speech.modules.outputs import BaseModelOutputWithPooling, GraniteSpeechModelOutputWithPast, Lazy
from granite_speech.modules.packing import Segments, pack_clips
from granite_speech.modules.projector import GraniteSpeechEncoderProjector
from granite_speech.modules.prompts import HostInputs
from granite_speech.modules.rows import Rows, pack_rows
from granite_speech.modules.transfers import on_device

__all__ = ["SpeechToStates"]


class SpeechToStates(nn.Module):
    """From token ids and audio features to the language model's last states: what the two public models share.

    A subclass has `config`, `encoder`, `projector` and `decoder`, the language model without its head.
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

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed_tokens

    def num_parameters(self) -> int:
        """Parameters, a tied one counted once."""
        return sum(one.numel() for one in self.parameters())

    def merge_adapter(self) -> None:
        """Add the adapter to the weights and remove it. Requests without audio then have it too."""
        adapter.merge_adapter(self)

    def get_audio_features(
        self, input_features: Tensor, input_features_lengths: list[int] | Tensor | None = None, return_dict: bool = True
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Audio vectors of a padded batch of clips.

        Args:
            input_features: `(clips, frames, input_dim)` log-mel features.
            input_features_lengths: each clip's true number of frames; None: all have `frames`.

        Returns:
            `last_hidden_state` `(clips, frames, encoder width)` and `pooler_output` `(clips, audio tokens, text hidden size)`,
            zero beyond a clip's own.
        """
        states, clips, vectors, tokens = self.encode_audio(input_features, input_features_lengths)
        width = input_features.shape[1]
        output = BaseModelOutputWithPooling(
            last_hidden_state=Lazy(lambda: clips.pad(states, width)),
            pooler_output=Lazy(lambda: tokens.pad(vectors, tokens.longest)),
        )
        return output if return_dict else output.to_tuple()

    def encode_audio(self, features: Tensor, lengths: list[int] | Tensor | None) -> tuple[Tensor, Segments, Tensor, Segments]:
        """Encoder states and audio vectors, both packed, each with where the clips lie."""
        if not isinstance(features, Tensor) or features.device != self.device:
            got = f"input_features on {features.device}" if isinstance(features, Tensor) else f"input_features of {type(features).__name__}"
            raise InputError(got=got, expected=f"a tensor on {self.device}, as the model", remedy="Move the processor's result with .to()")
        frames, clips = pack_clips(features.to(self.dtype), lengths)
        if frames.shape[1] != self.config.encoder_config.input_dim:
            raise InputError(
                got=f"input_features of {frames.shape[1]} features a frame",
                expected=f"{self.config.encoder_config.input_dim}",
                remedy="Use the processor of this checkpoint",
            )
        width, projected = self.config.encoder_config.output_width, self.config.projector_config.encoder_hidden_size
        if width != projected:
            raise ConfigError(
                got=f"an encoder of output width {width} before a projector with encoder_hidden_size {projected}",
                expected="the two to be equal",
                remedy="Set projector_config.encoder_hidden_size and build the model again",
            )
        states = self.encoder.encode(frames, clips)
        return states, clips, *self.projector(states, clips)

    def states(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PagedCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache_position: Tensor | None = None,
        input_features_lengths: list[int] | Tensor | None = None,
        *,
        host: HostInputs | None = None,
    ) -> GraniteSpeechModelOutputWithPast:
        """The forward pass up to the final norm.

        Args:
            host: what the caller has already read from the device; without it, it is read here.

        Returns:
            All fields that the call asks for; the padded ones are computed when they are read.
        """
        shape = self._check(input_ids, inputs_embeds, input_features, past_key_values, output_attentions)
        host = host or HostInputs.read(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache_position=cache_position,
            input_features_mask=input_features_mask,
            input_features_lengths=input_features_lengths,
        )
        cache = past_key_values
        wanted = (self.config.text_config.use_cache and not self.training) if use_cache is None else use_cache
        if cache is None and wanted:
            cache = self.new_cache(shape[0])
        _check_cache_position(host.cache_position, cache, shape[1])
        rows = pack_rows(shape, self.device, host.attention_mask, host.position_ids, cache)

        audio, vectors = None, None
        if input_features is not None:
            _, _, audio, clips = self.encode_audio(input_features, host.input_features_lengths)
            vectors = audio
            if host.input_features_mask is not None:
                vectors = _masked(audio, clips, host.input_features_mask, counted=input_features_lengths is not None)
        if inputs_embeds is not None:
            # A caller who passes inputs_embeds has already merged the audio; without ids we cannot tell which rows have any.
            embeddings, has_audio = rows.pack(inputs_embeds), [True] * shape[0]
        else:
            continued = cache is not None and cache.get_seq_length() > 0
            embeddings, has_audio = self._embed(input_ids, host.input_ids, rows, vectors, continued=continued)
        if cache is not None:
            has_audio = [now or before for now, before in zip(has_audio, cache.has_audio, strict=True)]

        step = None if cache is None else cache.begin(rows.segments)
        collected = [] if output_hidden_states else None
        attentions = [] if output_attentions else None
        try:
            tokens = Tokens(
                segments=rows.segments,
                positions=on_device(rows.positions, self.device),
                adapter_index=self.adapter_index(has_audio, rows.segments),
                step=step,
                attentions=attentions,
            )
            states = self.decoder(embeddings, tokens, collected)
        except BaseException:
            if step is not None:
                step.undo()
            raise
        if cache is not None:
            cache.has_audio = has_audio
            rows.pass_columns(cache)
        return GraniteSpeechModelOutputWithPast(
            last_hidden_state=Lazy(lambda: rows.pad(states)),
            past_key_values=cache,
            hidden_states=None if collected is None else Lazy(lambda: tuple(map(rows.pad, collected))),
            attentions=None if attentions is None else Lazy(lambda: tuple(map(rows.pad_weights, attentions))),
            audio_hidden_states=None if audio is None else Lazy(lambda: clips.pad(audio, clips.longest)),
            packed_states=states,
            rows=rows,
        )

    def _check(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        input_features: Tensor | None,
        past_key_values: PagedCache | None,
        output_attentions: bool | None,
    ) -> tuple[int, int]:
        """Refuse what does not go together; `(batch, width)` of the tokens."""
        if (input_ids is None) == (inputs_embeds is None):
            both = "both" if input_ids is not None else "neither"
            raise InputError(got=f"{both} of input_ids and inputs_embeds", expected="exactly one", remedy="Pass the one you have")
        if inputs_embeds is not None and input_features is not None:
            raise InputError(
                got="inputs_embeds with input_features",
                expected="features only beside input_ids, which say where they go",
                remedy="Pass input_ids, or merge get_audio_features() into the embeddings yourself",
            )
        given, rank, name = (input_ids, 2, "input_ids") if inputs_embeds is None else (inputs_embeds, 3, "inputs_embeds")
        if not isinstance(given, Tensor):
            raise InputError(
                got=f"{name} of type {type(given).__name__}",
                expected="a tensor",
                remedy="Use what the processor returns with return_tensors='pt'",
            )
        right = given.dim() == rank and given.device == self.device
        if not right or (rank == 2 and given.dtype not in (torch.int64, torch.int32)) or (rank == 3 and not given.is_floating_point()):
            kind = "integers (batch, sequence)" if rank == 2 else "floats (batch, sequence, hidden)"
            raise InputError(
                got=f"{name} of shape {tuple(given.shape)}, {given.dtype}, on {given.device}",
                expected=f"{kind} on {self.device}",
                remedy="Use what the processor returns, moved with .to()",
            )
        if past_key_values is not None and not isinstance(past_key_values, PagedCache):
            raise InputError(
                got=f"past_key_values of {type(past_key_values).__module__}.{type(past_key_values).__qualname__}",
                expected="the PagedCache that an earlier call of this model returned",
                remedy="Start with past_key_values=None and pass on output.past_key_values",
            )
        if past_key_values is not None and len(past_key_values) != given.shape[0]:
            raise InputError(
                got=f"{given.shape[0]} rows for past_key_values of {len(past_key_values)}",
                expected="the rows of the call that made the cache, in their order",
                remedy="Pass the same batch, or no past_key_values",
            )
        has_past = past_key_values is not None and past_key_values.get_seq_length() > 0
        if has_past and torch.is_grad_enabled() and any(one.requires_grad for one in self.decoder.parameters()):
            raise InputError(
                got="past_key_values where gradients are recorded",
                expected="torch.no_grad() or torch.inference_mode(): no gradient flows through pages",
                remedy="Wrap the call in torch.no_grad(), or train on whole sequences without past_key_values",
            )
        if output_attentions and has_past:
            raise UnsupportedError(
                got="output_attentions=True with past_key_values",
                expected="attention weights of a whole sequence",
                remedy="Run the whole sequence in one call without past_key_values",
            )
        return given.shape[0], given.shape[1]

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids. An audio token that no audio vector replaces, as a model may emit one, counts as token 0."""
        return self.decoder.embed_tokens(torch.where(ids == self.config.audio_token_index, 0, ids))

    def _embed(self, input_ids: Tensor, host_ids: Tensor, rows: Rows, vectors: Tensor | None, continued: bool) -> tuple[Tensor, list[bool]]:
        """Packed embeddings with the audio vectors in place, and which rows have audio."""
        config = self.config
        ids = host_ids.flatten()[rows.kept]
        is_audio = ids == config.audio_token_index
        outside = ids[~is_audio & ((ids < 0) | (ids >= config.text_config.vocab_size))]
        if len(outside):
            raise InputError(
                got=f"token id {int(outside[0])}",
                expected=f"ids from 0 to {config.text_config.vocab_size - 1}, or audio_token_index {config.audio_token_index}",
                remedy="Use the processor of this checkpoint",
            )
        places = is_audio.nonzero().squeeze(1)
        count = 0 if vectors is None else vectors.shape[0]
        if len(places) != count and not (continued and vectors is None):
            raise InputError(
                got=f"{len(places)} audio tokens in input_ids and {count} audio vectors from input_features",
                expected="as many of the one as of the other",
                remedy="Let the processor make both, one <|audio|> in the text for each clip",
            )
        embeddings = self.embed_tokens(rows.pack(input_ids))
        if count:
            embeddings = embeddings.index_copy(0, on_device(places, self.device), vectors.to(embeddings.dtype))
        return embeddings, [bool(one.any()) for one in is_audio.split(rows.segments.lengths)]

    def new_cache(self, batch: int) -> PagedCache:
        """An empty cache for a batch of so many rows."""
        return PagedCache(self.config.text_config, batch, dtype=self.dtype, device=self.device)

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
            remedy="Leave it out",
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
