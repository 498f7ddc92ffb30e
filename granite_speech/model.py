"""Granite Speech: audio encoder, projector and language model, under transformers' names.

`forward` takes the same padded batches as transformers' classes. They are packed at once, run packed from end to end unless there
are hooks (`modules/encoder.py` describes both layouts), and padded again when a padded output is read. Rows of a batch share
nothing but the weights. The adapter is on for rows that have audio.
"""

from dataclasses import replace
from typing import Any, Self

from torch import Tensor, nn

from granite_speech.checkpoints.folder import Checkpoint
from granite_speech.checkpoints.weight_names import EMBEDDING, HEAD, canonical_keys
from granite_speech.config import GraniteConfig, GraniteSpeechConfig
from granite_speech.embeddings import Embeddings, checked_embeddings
from granite_speech.engine.generate import Generation
from granite_speech.generation.config import WithGenerationConfig
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.encoder import GraniteSpeechCTCEncoder
from granite_speech.modules.forward import SpeechToStates
from granite_speech.modules.head import check_labels, next_token_loss, padded_logits, project
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.language_model import GraniteModel
from granite_speech.modules.model_methods import ModelMethods
from granite_speech.modules.outputs import (
    CausalLMOutputWithPast,
    GraniteSpeechCausalLMOutputWithPast,
    GraniteSpeechModelOutputWithPast,
    Lazy,
)
from granite_speech.modules.projector import GraniteSpeechEncoderProjector
from granite_speech.modules.prompts import ModelInputs, refuse_arguments
from granite_speech.modules.text import TextToStates
from granite_speech.pretrained import Pretrained

__all__ = ["GraniteSpeechForConditionalGeneration", "GraniteSpeechModel", "GraniteSpeechPlusForConditionalGeneration"]


class GraniteSpeechModel(Pretrained, Embeddings, SpeechToStates):
    """Encoder, projector and language model without its head.

    Args:
        config: of the whole model. Weights are random until loaded.
    """

    def __init__(self, config: GraniteSpeechConfig):
        super().__init__(config)
        config = self.config
        self.encoder = GraniteSpeechCTCEncoder(config.encoder_config)
        self.projector = GraniteSpeechEncoderProjector(config)
        self.language_model = GraniteModel(config.text_config)
        self.initialize_weights()

    def _follow(self, whole: "GraniteSpeechForConditionalGeneration") -> Self:
        """Share the modules and settings of `whole`, which owns them; no weight is copied."""
        self.__dict__["_owner"] = None
        self.config, self.generation_config = whole.config, whole.generation_config
        self.__dict__["_adapter_record"] = whole._adapters
        self.training = whole.training
        self.encoder, self.projector, self.language_model = whole.encoder, whole.projector, whole.language_model.model
        self.__dict__["_owner"] = whole
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        owner = self.__dict__.get("_owner")
        if owner is not None and name in ("encoder", "projector", "language_model"):
            place, name_there = (owner.language_model, "model") if name == "language_model" else (owner, name)
            setattr(place, name_there, value)
        super().__setattr__(name, value)

    @classmethod
    def _load(cls, config: GraniteSpeechConfig, checkpoint: Checkpoint, **target) -> "GraniteSpeechModel":
        # Files have the names of the whole model, and most have a head: load the whole model without reading the head.
        headless = replace(checkpoint, entries={name: entry for name, entry in checkpoint.entries.items() if name != HEAD})
        return GraniteSpeechForConditionalGeneration._load(config, headless, **target | {"values": {}}).model

    def canonical_state_dict(self) -> dict[str, Tensor]:
        state = super().canonical_state_dict()
        return {name.replace("language_model.", "language_model.model.", 1): tensor for name, tensor in state.items()}

    def _own_path(self, key: str) -> str | None:
        path = super()._own_path(key)
        return None if path is None else path.replace("language_model.model.", "language_model.", 1)

    @property
    def decoder(self) -> GraniteModel:
        return self.language_model

    def set_decoder(self, decoder: nn.Module) -> None:
        """Put another language model without head in the place of the present one."""
        self.language_model = decoder

    def forward(
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
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        *,
        input_features_lengths: list[int] | Tensor | None = None,
        **unknown,
    ) -> GraniteSpeechModelOutputWithPast | tuple:
        """As `GraniteSpeechForConditionalGeneration.forward`, without labels and logits."""
        refuse_arguments(unknown, "GraniteSpeechModel.forward")
        inputs = ModelInputs(
            input_ids=input_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=self.config.text_config.chosen("output_attentions", output_attentions),
            output_hidden_states=self.config.text_config.chosen("output_hidden_states", output_hidden_states),
            cache_position=cache_position,
            input_features_lengths=input_features_lengths,
        )
        output = self.states(inputs)
        return output if self.config.chosen("return_dict", return_dict) else output.to_tuple()


class _Generating(Generation):
    """Frees what `generate` keeps when the weights move or are trained."""

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.runtime.clear()  # training needs the memory of pages and graphs
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> Self:
        self.runtime.clear()  # weights that move or change dtype leave their pages and graphs behind
        return super()._apply(fn, recurse)


class GraniteForCausalLM(_Generating, WithGenerationConfig, TextToStates):
    """The language model with its head, as in transformers; `model` and `lm_head` as in the checkpoints.

    It can be called and generates on its own. Rows given as embeddings use the adapter, rows of token ids do not.

    Args:
        config: of the language model.
        tied: whether the head's weight is the embedding's.
    """

    num_parameters = ModelMethods.num_parameters
    placeholder = -1  # no token stands for audio

    def __init__(self, config: GraniteConfig, tied: bool):
        super().__init__()
        self.config = config
        self.model = GraniteModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def decoder(self) -> GraniteModel:
        return self.model

    @property
    def language_model(self) -> Self:
        return self

    @property
    def text_config(self) -> GraniteConfig:
        return self.config

    def set_decoder(self, decoder: nn.Module) -> None:
        """Put another language model without head in the place of the present one."""
        self.model = decoder

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids of any shape."""
        return self.model.embed_tokens(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """`(..., hidden)` → `(..., vocabulary)`, divided by `logits_scaling`."""
        return self.lm_head(hidden) / self.config.logits_scaling

    def next_logits(self, states: Tensor) -> Tensor:
        """`(rows, hidden)` → `(rows, vocabulary)` logits of each row's next token; hooks of the head see `(rows, 1, hidden)`."""
        return self.logits(states.unsqueeze(1)).squeeze(1) if have_hooks(self.lm_head) else self.logits(states)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PagedCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        num_items_in_batch: int | Tensor | None = None,
        **unknown: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of every position, and the loss if labels are given.

        Args:
            labels, logits_to_keep, num_items_in_batch: as for `GraniteSpeechForConditionalGeneration.forward`.

        The others are those of `GraniteModel.forward`.
        """
        refuse_arguments(unknown, "GraniteForCausalLM.forward")
        check_labels(labels, logits_to_keep)
        headless = self.model(
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
        logits, places = project(self, headless, logits_to_keep)
        output = CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits, labels, headless.rows, num_items_in_batch),
            logits=Lazy(lambda: padded_logits(logits, places)),
            past_key_values=headless.past_key_values,
            hidden_states=vars(headless)["hidden_states"],
            attentions=vars(headless)["attentions"],
        )
        return output.to_tuple() if return_dict is False else output


class GraniteSpeechForConditionalGeneration(Pretrained, _Generating, Embeddings, SpeechToStates):
    """Speech and text in, text out: a drop-in for transformers' class of this name.

    Modules have the released checkpoints' names: `encoder`, `projector`, `language_model.model`, `language_model.lm_head`.
    transformers 5.10 and later name them `model.encoder`, `model.language_model` and `lm_head`; those paths work too.

    Args:
        config: of the whole model. Weights are random; `from_pretrained` loads a checkpoint's.
    """

    adapts_embeddings = False  # as in transformers, whose `generate` switches the adapter off without input_features

    def __init__(self, config: GraniteSpeechConfig):
        super().__init__(config)
        config = self.config
        self.encoder = GraniteSpeechCTCEncoder(config.encoder_config)
        self.projector = GraniteSpeechEncoderProjector(config)
        self.language_model = GraniteForCausalLM(config.text_config, tied=config.tie_word_embeddings)
        self.initialize_weights()

    @property
    def decoder(self) -> GraniteModel:
        return self.language_model.model

    @property
    def model(self) -> GraniteSpeechModel:
        """The model without its head. Always the same object, which shares every module with this one; `forward` runs it."""
        headless = self.__dict__.get("_headless")
        if headless is None:
            headless = GraniteSpeechModel.__new__(GraniteSpeechModel)
            nn.Module.__init__(headless)
            # Set as an attribute it would be a submodule, and every parameter would have two names.
            self.__dict__["_headless"] = headless
        return headless._follow(self)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.model.training = mode
        return self

    def set_decoder(self, decoder: nn.Module) -> None:
        """Put another language model without head in the place of the present one."""
        self.language_model.model = decoder

    @property
    def lm_head(self) -> nn.Linear:
        return self.language_model.lm_head

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output head."""
        self.language_model.lm_head = checked_embeddings(new_embeddings)
        self.config.text_config.vocab_size = new_embeddings.weight.shape[0]

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False):
        """As `torch.nn.Module.load_state_dict`, and also accepts the names that transformers and peft use in memory."""
        names = canonical_keys(state_dict)
        renamed = {names[key]: value for key, value in state_dict.items() if key in names}
        if self.lm_head.weight is self.decoder.embed_tokens.weight:
            tied = [renamed[name] for name in (EMBEDDING, HEAD) if name in renamed]
            renamed |= dict.fromkeys((EMBEDDING, HEAD), tied[0]) if tied else {}
        return super().load_state_dict(renamed, strict=strict, assign=assign)

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PagedCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        input_features_lengths: list[int] | Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **unknown,
    ) -> GraniteSpeechCausalLMOutputWithPast | tuple:
        """Logits of every position, and the loss if labels are given.

        The head runs only on tokens that the attention mask keeps. `logits` and the other padded fields are padded when they
        are read.

        Args:
            input_ids: `(batch, sequence)`, with `audio_token_index` where an audio vector goes.
            input_features: `(clips, frames, input_dim)` log-mel features, clips in the order of their audio tokens.
            input_features_mask: `(clips, audio tokens)` bool, the audio vectors to use; all if omitted.
            attention_mask: `(batch, sequence)` of 0 and 1, or wider by the columns in `past_key_values`.
            position_ids: `(batch, sequence)`; counted along each row if omitted.
            past_key_values: the cache that an earlier call returned; `input_ids` then has the new tokens only.
            inputs_embeds: `(batch, sequence, hidden)` in place of `input_ids`; the adapter is on for all rows.
            labels: `(batch, sequence)` token ids, −100 to ignore a position.
            use_cache: return `past_key_values`; if omitted, as the text configuration says, and False while training.
            output_attentions: return the softmax weights of the language model's layers; if omitted, as the text configuration says.
            output_hidden_states: return the states of the language model's layers; if omitted, as the text configuration says.
            return_dict: False returns a tuple of the fields that are not None; if omitted, as the configuration says.
            cache_position: checked, never needed.
            logits_to_keep: how many last positions to return logits for (0: all), or a 1-D tensor of positions.
            input_features_lengths: each clip's true number of frames, as the processor returns it. With it nothing is computed
                for padding, and a clip's result does not depend on its neighbours. Without it every clip has its padded length,
                as in transformers.
            num_items_in_batch: the labels of all batches of one optimizer step. The loss is then the sum over this batch's labels,
                divided by this number, so that the losses of the batches add up to the mean over all their labels. transformers'
                Trainer passes it. transformers 5.23 ignores it for this model and returns the batch's own mean, which makes the
                gradients 4 times too large with 4 accumulation steps.

        Raises:
            InputError: arguments that do not fit together or to the model.
        """
        refuse_arguments(unknown, "GraniteSpeechForConditionalGeneration.forward")
        check_labels(labels, logits_to_keep)
        # Called as a module, so that hooks registered on `model.model` run.
        headless = self.model(
            input_ids=input_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache_position=cache_position,
            input_features_lengths=input_features_lengths,
        )
        logits, places = project(self.language_model, headless, logits_to_keep)
        output = GraniteSpeechCausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits, labels, headless.rows, num_items_in_batch),
            logits=Lazy(lambda: padded_logits(logits, places)),
            past_key_values=headless.past_key_values,
            hidden_states=vars(headless)["hidden_states"],
            attentions=vars(headless)["attentions"],
            audio_hidden_states=vars(headless)["audio_hidden_states"],
        )
        return output if self.config.chosen("return_dict", return_dict) else output.to_tuple()


# transformers has its own class for `granite_speech_plus`; here only the configuration differs.
GraniteSpeechPlusForConditionalGeneration = GraniteSpeechForConditionalGeneration
