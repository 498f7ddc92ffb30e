"""The Granite language model. Inside `generate` it runs packed: tokens of all sequences in one tensor, `(total_tokens, hidden)`.

Llama with four multipliers (Granite 3.0, arXiv 2408.13359): of the embeddings, of the attention scores in place of
1/sqrt(head_dim), of every residual branch, and a divisor of the logits. Names and arithmetic are those of transformers'
`GraniteForCausalLM`.

`GraniteModel.run` calls one layer after another (`decoder_layers.py`). Passes that fill a cache without gradients run fused instead,
unless there are hooks (`fused_layers.py`).
"""

from typing import Any

from torch import Tensor, nn

from granite_speech.config import GraniteConfig
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.checkpointing import Recomputation
from granite_speech.modules.decoder_layers import GraniteDecoderLayer, GraniteRMSNorm
from granite_speech.modules.outputs import BaseModelOutputWithPast
from granite_speech.modules.prompts import ModelInputs, refuse_arguments
from granite_speech.modules.rotary import GraniteRotaryEmbedding, rotary_embedding
from granite_speech.modules.text import TextToStates
from granite_speech.modules.tokens import Tokens

__all__ = ["GraniteModel"]


class GraniteModel(TextToStates):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: GraniteConfig):
        super().__init__()
        self.config = config
        self.embedding_multiplier = float(config.embedding_multiplier)
        pad = config.pad_token_id
        inside = pad is not None and 0 <= pad < config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=pad if inside else None)
        self.layers = nn.ModuleList([GraniteDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = GraniteRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = GraniteRotaryEmbedding(config)
        self.recomputation: Recomputation | None = None

    @property
    def decoder(self) -> "GraniteModel":
        return self

    @property
    def text_config(self) -> GraniteConfig:
        return self.config

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PagedCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        *,
        tokens: Tokens | None = None,
        collected: list[Tensor] | None = None,
        **unknown: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """States of every position after the final norm.

        Args:
            input_ids: `(batch, sequence)`. The adapter is off for these rows.
            attention_mask: `(batch, sequence)` of 0 and 1, or wider by the columns in `past_key_values`.
            position_ids: `(batch, sequence)`; counted along each row if omitted.
            past_key_values: the cache that an earlier call returned; the ids are then the new tokens only.
            inputs_embeds: `(batch, sequence, hidden)` in place of `input_ids`; the adapter is on.
            use_cache: return `past_key_values`; if omitted, as the configuration says, and False while training.
            output_attentions, output_hidden_states: return these of every layer.
            return_dict: False returns a tuple of the fields that are not None.
            cache_position: checked, never needed.
            tokens, collected: of a padded pass of a model that contains this one; `inputs_embeds` is then a padded batch.

        Raises:
            InputError: arguments that do not fit together or to the model.
        """
        refuse_arguments(unknown, "GraniteModel.forward")
        if tokens is not None:
            return BaseModelOutputWithPast(self.run(inputs_embeds, tokens, collected), past_key_values)
        inputs = ModelInputs(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
        )
        output = self.states(inputs)
        return output.to_tuple() if return_dict is False else output

    def run(self, embeddings: Tensor, tokens: Tokens, collected: list[Tensor] | None = None) -> Tensor:
        """Run embeddings through the layers.

        Args:
            embeddings: before the embedding multiplier: packed, `(total_tokens, hidden)`, or padded if `tokens.rows` says so.
            tokens: their layout.
            collected: a list that takes the multiplied embeddings and every layer's output, the last one after the norm.

        Returns:
            States after the final norm, in the layout of the embeddings.
        """
        x = embeddings * self.embedding_multiplier
        if tokens.rows is None:
            rotary = rotary_embedding(self.rotary_emb.frequencies(x.device), tokens.positions, x.dtype)
        else:
            rotary = self.rotary_emb(x, tokens.rows.pad(tokens.positions))
        recomputation = self.recomputation if self.training else None
        for number, layer in enumerate(self.layers):
            if collected is not None:
                collected.append(x)
            if recomputation is None:
                x = layer(x, position_embeddings=rotary, tokens=tokens)
            else:
                x = recomputation.run(layer, number, x, position_embeddings=rotary, tokens=tokens)
        x = self.norm(x)
        if collected is not None:
            collected.append(x)
        return x
