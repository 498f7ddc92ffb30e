"""From token ids or embeddings to the language model's last states: the pass that all public models share.

A padded batch is packed at once, and padded again only for a caller who reads a padded field of the output, or for hooks. The host
reads from the device once, everything that shapes depend on.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Self
from warnings import warn

import torch
from torch import Tensor, nn

from granite_speech.config import GraniteConfig
from granite_speech.errors import InputError, UnsupportedError
from granite_speech.modules.adapter import merge_adapter
from granite_speech.modules.autocast import autocast_dtype
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.checkpointing import GradientCheckpointing
from granite_speech.modules.fused_layers import FusedLayers, uses_kernels
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.layers_in_use import LayersInUse
from granite_speech.modules.outputs import BaseModelOutputWithPast, Lazy
from granite_speech.modules.packing import Segments
from granite_speech.modules.prompts import ModelInputs
from granite_speech.modules.quantized import refuse_quantized
from granite_speech.modules.rows import Rows, pack_rows
from granite_speech.modules.tokens import Tokens
from granite_speech.modules.transfers import on_device

__all__ = ["PackedPrompt", "TextToStates", "check_vocabulary"]


@dataclass(frozen=True)
class PackedPrompt:
    """The language model's input for one call, before its tokens are embedded.

    Attributes:
        rows: where the packed tokens lie in the padded batch.
        cache: keys and values of earlier calls, to which the call adds its own; None: no cache.
        has_audio: for each row, whether the adapter is on: it has audio in this call or in the cache, or was given as embeddings.
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
    vectors: Tensor | None = None
    audio: Tensor | None = None
    clips: Segments | None = None


class TextToStates(GradientCheckpointing, nn.Module):
    """Base of the public models. A subclass says which module is its language model without head, and gives its configuration."""

    main_input_name, base_model_prefix = "input_ids", "model"

    @property
    def decoder(self) -> "TextToStates":
        raise NotImplementedError

    @property
    def text_config(self) -> GraniteConfig:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed_tokens.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed_tokens

    @property
    def base_model(self) -> nn.Module:
        """The model without its head; the model itself if it has none."""
        return getattr(self, self.base_model_prefix, self)

    def get_decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.decoder

    def train(self, mode: bool = True) -> Self:
        """As `torch.nn.Module.train`; int8 weights cannot be trained."""
        if mode:
            refuse_quantized(self.decoder, "train")
        return super().train(mode)

    def merge_adapter(self) -> None:
        """Add the adapter to the weights and remove it. It is then on for requests without audio too."""
        merge_adapter(self)

    def states(self, inputs: ModelInputs, host: ModelInputs | None = None) -> BaseModelOutputWithPast:
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
        detached = self._continues_without_gradient(inputs)
        with torch.no_grad() if detached else nullcontext():
            prompt = self.pack_prompt(inputs, host or inputs.on_host())
            output = self.output(prompt, *self.run_prompt(prompt, inputs))
        output.is_detached = detached
        return output

    def _continues_without_gradient(self, inputs: ModelInputs) -> bool:
        """Whether a call would record gradients, which cannot flow through the cache that it continues. It then runs without them.

        Raises:
            InputError: the same in training mode, where somebody wants them.
        """
        continues = isinstance(inputs.past_key_values, PagedCache) and inputs.has_past
        if not continues or not torch.is_grad_enabled() or not any(one.requires_grad for one in self.decoder.parameters()):
            return False
        if self.training:
            raise InputError(
                got="past_key_values in training mode",
                expected="whole sequences: no gradient flows through the cache",
                remedy="Train without past_key_values, or call model.eval()",
            )
        warn(
            "No gradient flows through past_key_values, so this call records none; wrap it in torch.no_grad() to say so.",
            stacklevel=5,
        )
        return True

    def output(
        self, prompt: PackedPrompt, states: Tensor, hidden_states: list[Tensor] | None, attentions: list[list[Tensor]] | None
    ) -> BaseModelOutputWithPast:
        """The output of a pass whose packed results these are."""
        rows = prompt.rows
        return BaseModelOutputWithPast(
            last_hidden_state=Lazy(lambda: rows.pad(states)),
            past_key_values=prompt.cache,
            hidden_states=None if hidden_states is None else Lazy(lambda: tuple(map(rows.pad, hidden_states))),
            attentions=None if attentions is None else Lazy(lambda: tuple(map(rows.pad_weights, attentions))),
            packed_states=states,
            rows=rows,
        )

    def pack_prompt(self, inputs: ModelInputs, host: ModelInputs) -> PackedPrompt:
        """Check a call's arguments and lay out its tokens. The cache does not change.

        Args:
            inputs: the arguments of `forward`.
            host: `inputs.on_host()`.

        Raises:
            InputError, UnsupportedError: as `states`.
        """
        rows, cache = self.pack_rows(inputs, host)
        if inputs.inputs_embeds is not None:
            ids = is_audio = None
        else:
            ids = host.input_ids.flatten()[rows.kept]
            is_audio = self.audio_tokens(ids, 0)
        return PackedPrompt(rows, cache, self.rows_with_audio(rows, cache, is_audio), ids, is_audio)

    def pack_rows(self, inputs: ModelInputs, host: ModelInputs) -> tuple[Rows, PagedCache | None]:
        """Where a call's tokens lie, and the cache to which it adds them."""
        batch, width = inputs.check(self.device)
        self._check_past(inputs)
        cache = self._cache(inputs, batch)
        _check_cache_position(host.cache_position, cache, width)
        return pack_rows((batch, width), self.device, host.attention_mask, host.position_ids, cache), cache

    def rows_with_audio(self, rows: Rows, cache: PagedCache | None, is_audio: Tensor | None) -> list[bool]:
        """For each row, whether it has audio, here or in the cache. Of embeddings we cannot tell: they count as audio."""
        if is_audio is None:
            now = [True] * len(rows.segments.lengths)
        else:
            now = [bool(one.any()) for one in is_audio.split(rows.segments.lengths)]
        return now if cache is None else [one or before for one, before in zip(now, cache.has_audio, strict=True)]

    def _check_past(self, inputs: ModelInputs) -> None:
        """Refuse what cannot be computed for a sequence that continues a cache."""
        if not inputs.has_past:
            return
        if inputs.output_attentions:
            raise UnsupportedError(
                got="output_attentions=True with past_key_values",
                expected="attention weights of a whole sequence",
                remedy="Run the whole sequence in one call without past_key_values",
            )

    def _cache(self, inputs: ModelInputs, batch: int) -> PagedCache | None:
        """The caller's cache, a new one if the call should return one, or None."""
        wanted = inputs.use_cache
        if wanted and self.decoder.training and self.decoder.recomputation is not None:
            warn("use_cache=True is ignored: layers that run again in the backward pass cannot fill a cache.", stacklevel=5)
            wanted = False
        if wanted is None:
            wanted = self.text_config.use_cache and not self.training
        if inputs.past_key_values is not None or not wanted:
            return inputs.past_key_values
        return PagedCache(self.text_config, batch, dtype=self.dtype, device=self.device)

    def audio_tokens(self, ids: Tensor, count: int | None) -> Tensor:
        """Which of the packed ids are audio tokens.

        Args:
            ids: `(total_tokens,)` on the host.
            count: audio vectors, one for each audio token; None: any number of audio tokens. The language model alone has none.

        Raises:
            InputError: another number of audio tokens, or an id outside the vocabulary.
        """
        check_vocabulary(ids, self.decoder.embed_tokens.weight.shape[0], "")
        return torch.zeros_like(ids, dtype=torch.bool)

    def run_prompt(self, prompt: PackedPrompt, inputs: ModelInputs) -> tuple[Tensor, list[Tensor] | None, list[list[Tensor]] | None]:
        """Run the language model. If that fails, the cache is as it was.

        Args:
            prompt: from `pack_prompt`.
            inputs: the arguments of `forward`.

        Returns:
            Packed states after the final norm, every layer's packed states, and every layer's attention weights by row; the last
            two are None unless requested.
        """
        is_padded = have_hooks(self.decoder)
        embeddings, cache = self._embed(prompt, inputs, is_padded), prompt.cache
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
                rows=prompt.rows if is_padded else None,
            )
            states = self.language_states(embeddings, tokens, hidden_states)
        except BaseException:
            if cache is not None:
                cache.lengths = before  # the new tokens' pages stay reserved
            raise
        if cache is not None:
            cache.has_audio = prompt.has_audio
            prompt.rows.advance(cache)
        # A layer that runs again in the backward pass adds its weights to the list again.
        return states, hidden_states, None if attentions is None else [*attentions]

    def language_states(self, embeddings: Tensor, tokens: Tokens, collected: list[Tensor] | None = None) -> Tensor:
        """Packed embeddings through the language model, which runs padded if `tokens.rows` says so.

        Args:
            embeddings: `(total_tokens, hidden)`, before the embedding multiplier.
            tokens: their layout.
            collected: as for `GraniteModel.run`; it takes packed states.

        Returns:
            `(total_tokens, hidden)` after the final norm.
        """
        rows = tokens.rows
        if rows is None:
            fused = None if collected is not None or tokens.attentions is not None else self._fused_layers(tokens)
            return self.decoder.run(embeddings, tokens, collected) if fused is None else fused.prompt(embeddings, tokens)
        states = self._padded_pass(rows.pad(embeddings), tokens.for_padded_layers(), collected)
        if collected is not None:
            collected[:] = map(rows.pack, collected)
        return rows.pack(states)

    def _fused_layers(self, tokens: Tokens) -> FusedLayers | None:
        """The layers for a pass that fills or reads a cache; None if gradients are recorded, or modules must run one by one."""
        step = tokens.step
        if step is None or torch.is_grad_enabled() or autocast_dtype(self.device) is not None:
            return None
        kept = self._kept_layers()
        if step.has_past or uses_kernels(step.pool):
            return FusedLayers.of(self.decoder) if kept is None else kept.layers
        # A prompt without earlier keys is faster with SDPA, which modules call, than with the reference of paged attention.
        is_small = kept is not None and kept.layers is not None and kept.layers.small_for(step.pool.keys[0], tokens) is not None
        return kept.layers if is_small else None

    def _kept_layers(self) -> LayersInUse | None:
        """The fused layers that are kept from pass to pass, as they are now; None if each pass looks for its own."""
        return None

    def _padded_pass(self, embeddings: Tensor, tokens: Tokens, collected: list[Tensor] | None) -> Tensor:
        # Called as a module, so that its own hooks run.
        return self.decoder(inputs_embeds=embeddings, tokens=tokens, collected=collected)[0]

    def _embed(self, prompt: PackedPrompt, inputs: ModelInputs, is_padded: bool) -> Tensor:
        """`(total_tokens, hidden)`: the tokens' embeddings, with the audio vectors in place."""
        rows = prompt.rows
        if inputs.inputs_embeds is not None:
            return rows.pack(inputs.inputs_embeds)
        ids = rows.pack(inputs.input_ids)
        # Masked ids may be of no token, so they become 0.
        embeddings = rows.pack(self.embed_tokens(rows.pad(ids))) if is_padded else self.embed_tokens(ids)
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


def check_vocabulary(ids: Tensor, size: int, others: str) -> None:
    """Raise InputError for an id that has no embedding; `others` names further ids that are allowed."""
    outside = ids[(ids < 0) | (ids >= size)]
    if len(outside):
        raise InputError(
            got=f"token id {int(outside[0])}", expected=f"ids from 0 to {size - 1}{others}", remedy="Use the processor of this checkpoint"
        )


def _check_cache_position(cache_position: Tensor | None, cache: PagedCache | None, width: int) -> None:
    start = 0 if cache is None else cache.columns
    if cache_position is not None and cache_position.tolist() != list(range(start, start + width)):
        raise InputError(
            got=f"cache_position {cache_position.tolist()!r:.100}",
            expected=f"{start} to {start + width - 1}, which follow from past_key_values",
            remedy="Omit it",
        )
