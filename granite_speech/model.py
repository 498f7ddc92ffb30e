"""Granite Speech: audio encoder, projector and language model, under transformers' names.

`forward` takes the same padded batches as transformers' classes. They are packed at once, run packed from end to end, and
padded again when a padded output is read. Rows of a batch share nothing but the weights. The adapter is on for rows that have
audio.
"""

from dataclasses import replace
from typing import Self

import torch
import torch.nn.functional as F
from granite_kernels.op import accumulator
from torch import Tensor, nn

from granite_speech.checkpoints.folder import Checkpoint
from granite_speech.checkpoints.weight_names import EMBEDDING, HEAD, canonical_keys
from granite_speech.config import GraniteSpeechConfig
from granite_speech.engine.generate import Generation
from granite_speech.errors import InputError
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.encoder import GraniteSpeechCTCEncoder
from granite_speech.modules.forward import SpeechToStates
from granite_speech.modules.language_model import GraniteForCausalLM, GraniteModel
from granite_speech.modules.outputs import GraniteSpeechCausalLMOutputWithPast, GraniteSpeechModelOutputWithPast, Lazy
from granite_speech.modules.projector import GraniteSpeechEncoderProjector
from granite_speech.modules.prompts import ModelInputs
from granite_speech.modules.rows import Rows
from granite_speech.modules.transfers import on_device, on_host
from granite_speech.pretrained import Pretrained

__all__ = ["GraniteSpeechForConditionalGeneration", "GraniteSpeechModel", "GraniteSpeechPlusForConditionalGeneration"]

Output = GraniteSpeechCausalLMOutputWithPast


def _refuse_unknown(unknown: dict) -> None:
    if unknown:
        raise InputError(
            got=f"unknown arguments {', '.join(sorted(unknown))}",
            expected="the arguments of transformers' GraniteSpeechForConditionalGeneration.forward",
            remedy="Remove them",
        )


class GraniteSpeechModel(Pretrained, SpeechToStates):
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
        self.config, self.generation_config, self.adapter_config = whole.config, whole.generation_config, whole.adapter_config
        self.training = whole.training
        self.encoder, self.projector, self.language_model = whole.encoder, whole.projector, whole.language_model.model
        return self

    @classmethod
    def _load(cls, config: GraniteSpeechConfig, checkpoint: Checkpoint, **target) -> "GraniteSpeechModel":
        # Files have the names of the whole model, and most have a head: load the whole model without reading the head.
        headless = replace(checkpoint, entries={name: entry for name, entry in checkpoint.entries.items() if name != HEAD})
        return GraniteSpeechForConditionalGeneration._load(config, headless, **target | {"values": {}}).model

    def canonical_state_dict(self) -> dict[str, Tensor]:
        state = super().canonical_state_dict()
        return {name.replace("language_model.", "language_model.model.", 1): tensor for name, tensor in state.items()}

    @property
    def decoder(self) -> GraniteModel:
        return self.language_model

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
        _refuse_unknown(unknown)
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


class GraniteSpeechForConditionalGeneration(Pretrained, Generation, SpeechToStates):
    """Speech and text in, text out: a drop-in for transformers' class of this name.

    Modules have the released checkpoints' names: `encoder`, `projector`, `language_model.model`, `language_model.lm_head`.
    transformers 5.10 and later name them `model.encoder`, `model.language_model` and `lm_head`; those paths work too.

    Args:
        config: of the whole model. Weights are random; `from_pretrained` loads a checkpoint's.
    """

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
        if mode:
            self.runtime.clear()  # training needs the memory of pages and graphs
        super().train(mode)
        self.model.training = mode
        return self

    def _apply(self, fn, recurse: bool = True) -> Self:
        self.runtime.clear()  # weights that move or change dtype leave their pages and graphs behind
        return super()._apply(fn, recurse)

    @property
    def lm_head(self) -> nn.Linear:
        return self.language_model.lm_head

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

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
        **unknown,
    ) -> Output | tuple:
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

        Raises:
            InputError: arguments that do not fit together or to the model.
        """
        _refuse_unknown(unknown)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise InputError(got="labels with logits_to_keep", expected="one of them", remedy="Omit logits_to_keep to get a loss")
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
        rows, states = headless.rows, headless.states_to_project()
        places = rows.places(_kept_columns(logits_to_keep, rows.width))
        kept = places[places >= 0]
        if not torch.equal(kept, torch.arange(len(states))):
            states = states.index_select(0, on_device(kept, states.device))
        logits = self.language_model.logits(states)
        output = Output(
            loss=None if labels is None else _next_token_loss(logits, labels, rows),
            logits=Lazy(lambda: _padded_logits(logits, places)),
            past_key_values=headless.past_key_values,
            hidden_states=vars(headless)["hidden_states"],
            attentions=vars(headless)["attentions"],
            audio_hidden_states=vars(headless)["audio_hidden_states"],
        )
        return output if self.config.chosen("return_dict", return_dict) else output.to_tuple()


def _kept_columns(logits_to_keep: int | Tensor, width: int) -> range | Tensor:
    """Numbers of the columns to return logits for."""
    if not isinstance(logits_to_keep, Tensor):
        return range(width)[-logits_to_keep:]
    (columns,) = on_host(logits_to_keep)
    return columns.nonzero().squeeze(1) if columns.dtype == torch.bool else columns


def _padded_logits(logits: Tensor, places: Tensor) -> Tensor:
    """`(kept, vocabulary)` → `(batch, columns, vocabulary)`, zero where `places` is −1."""
    if bool((places >= 0).all()):
        return logits.view(*places.shape, logits.shape[1])
    filled = on_device((places >= 0).flatten().nonzero().squeeze(1), logits.device)
    return logits.new_zeros(places.numel(), logits.shape[1]).index_copy(0, filled, logits).view(*places.shape, logits.shape[1])


def _next_token_loss(logits: Tensor, labels: Tensor, rows: Rows) -> Tensor:
    """Mean cross entropy of each label given the tokens before it in its row. Labels of −100 do not count.

    A label counts if the attention mask keeps its own column and the one before. After left padding, a row's first token thus
    has no prediction, as in the unpadded row.
    """
    shape = (len(rows.segments.lengths), rows.width)
    if labels.shape != shape:
        raise InputError(got=f"labels of shape {tuple(labels.shape)}", expected=f"{shape}, as input_ids", remedy="Pad both in the same way")
    columns = rows.kept[1:]
    follows = (columns == rows.kept[:-1] + 1) & (columns % max(rows.width, 1) != 0)
    answers = labels.flatten().index_select(0, on_device(columns[follows], labels.device))
    logits = logits.index_select(0, on_device(follows.nonzero().squeeze(1), logits.device))
    return F.cross_entropy(logits.to(accumulator(logits.dtype)), on_device(answers, logits.device), ignore_index=-100)


# transformers has its own class for `granite_speech_plus`; here only the configuration differs.
GraniteSpeechPlusForConditionalGeneration = GraniteSpeechForConditionalGeneration
