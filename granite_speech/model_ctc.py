"""TurboCTC: the encoder with a CTC head and no language model, under transformers' names.

`forward` takes the same padded batches as transformers' class. They are packed at once, run packed from end to end unless there are
hooks (`modules/encoder.py` describes both layouts), and padded again when a padded output is read. Clips of a batch share nothing but the
weights. In training mode the statistics of BatchNorm are of the clips' frames alone; in transformers they include the padding, as zeros.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from granite_speech.checkpoints.folder import Checkpoint
from granite_speech.checkpoints.weight_names import canonical_keys
from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.errors import UnsupportedError
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.checkpointing import GradientCheckpointing
from granite_speech.modules.ctc_encoder import GraniteSpeech5Encoder
from granite_speech.modules.ctc_frames import FramesToPath
from granite_speech.modules.ctc_loss import blank_of, checked_targets, ctc_loss
from granite_speech.modules.ctc_outputs import CausalLMOutput, GraniteSpeech5CTCGenerateOutput
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.outputs import Lazy
from granite_speech.modules.prompts import refuse_arguments
from granite_speech.pretrained import Pretrained
from granite_speech.trainer_checkpoints import complete_trainer

__all__ = ["GraniteSpeech5ForCTC"]


class GraniteSpeech5ForCTC(GradientCheckpointing, Pretrained, FramesToPath):
    """Audio features in, the scores of CTC's entries for each frame out: a drop-in for transformers' class of this name.

    Args:
        config: of the whole model. Weights are random; `from_pretrained` loads a checkpoint's.
    """

    config: GraniteSpeech5CTCConfig
    config_class: ClassVar[type[GraniteSpeech5CTCConfig]] = GraniteSpeech5CTCConfig
    main_input_name: ClassVar[str] = "input_features"
    loss_type: ClassVar[str] = "ForCTC"
    tied_names: ClassVar[Mapping[str, str]] = {"ctc_head.weight": "encoder.out.weight", "ctc_head.bias": "encoder.out.bias"}
    _no_split_modules: ClassVar[set[str]] = GraniteSpeech5Encoder._no_split_modules
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = GraniteSpeech5Encoder._keep_in_fp32_modules_strict

    def __init__(self, config: GraniteSpeech5CTCConfig):
        super().__init__(config)
        self.encoder = GraniteSpeech5Encoder(self.config.encoder_config)
        self.ctc_head = LoraLinear(self.config.encoder_config.hidden_size, self.config.vocab_size)
        self.initialize_weights()
        self.tie_weights()

    # --- what it computes --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        output_attention_mask: bool | None = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> CausalLMOutput | tuple:
        """Logits of every frame, and the loss if labels are given. The head runs only on frames that the attention mask keeps.

        Args:
            input_features, attention_mask, output_hidden_states, output_attentions: as of `GraniteSpeech5Encoder.forward`.
            labels: `(clips, tokens)` ids below the vocabulary's size; −100 and `pad_token_id`, which is the blank, are left out.
            output_attention_mask: accepted; this output has no mask, as in transformers.
            return_dict: False returns a tuple of the fields that are not None; if omitted, as the configuration says.

        Returns:
            The logits are zero beyond a clip's end. The loss is CTC's (Graves et al., 2006), computed in float32 and reduced as
            `ctc_loss_reduction` says; "mean" is that over clips of the loss by its number of labels. A clip of fewer frames than its labels
            need counts as 0 if the configuration has `ctc_zero_infinity`.

        Raises:
            InputError, UnsupportedError: as the encoder's; labels that are no ids, or more of them than a clip's frames can have, without
                `ctc_zero_infinity`.
        """
        refuse_arguments(unknown, "GraniteSpeech5ForCTC.forward")
        clips = self.encoder.clips(input_features, attention_mask)
        targets = None if labels is None else checked_targets(labels, clips, self.config)
        # Called as a module, so that hooks registered on it run.
        encoded = self.encoder(
            input_features,
            output_attention_mask=False,
            output_hidden_states=self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            clips=clips,
        )
        states, left = encoded.last_hidden_state, self.encoder.clips_left(clips)
        width, is_padded = states.shape[1], have_hooks(self.ctc_head)
        logits = left.pack(self.ctc_head(states)) if is_padded else self.ctc_head(left.pack(states))
        output = CausalLMOutput(
            loss=None if targets is None else ctc_loss(logits, left, targets, self.config),
            logits=Lazy(lambda: left.pad(logits, width)),
            hidden_states=encoded.hidden_states,
            packed_logits=logits,
            clips=left,
        )
        return output if self.config.chosen("return_dict", return_dict) else output.to_tuple()

    @torch.no_grad()
    def generate(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        return_dict_in_generate: bool = False,
        compile_config: Any = None,
        **options: Any,
    ) -> GraniteSpeech5CTCGenerateOutput | Tensor:
        """The best entry of each frame: `(clips, frames left)` int64, `pad_token_id`, which is the blank, beyond a clip's end.

        Collapse what is repeated and drop the blanks for a clip's tokens, as the processor's `batch_decode` does.

        Args:
            input_features, attention_mask: as of `forward`.
            return_dict_in_generate: return the logits, too.
            compile_config: accepted; the kernels are compiled already.
            options: `output_hidden_states` and the others of `forward`.

        Raises:
            InputError, UnsupportedError: as `forward`.
        """
        blank = blank_of(self.config)
        output = self(input_features, attention_mask, **options | {"return_dict": True})
        best = output.packed_logits.argmax(-1)
        sequences = output.clips.pad(best - blank, self.encoder.frames_left(input_features.shape[1])) + blank
        if not return_dict_in_generate:
            return sequences
        return GraniteSpeech5CTCGenerateOutput(sequences=sequences, logits=output.logits, hidden_states=output.hidden_states)

    # --- parts -------------------------------------------------------------------------------------------------------------------

    def get_encoder(self, modality: str | None = None) -> GraniteSpeech5Encoder:
        """The encoder; audio is the only modality."""
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        """Raises UnsupportedError (a NotImplementedError, as in transformers): the model takes audio alone."""
        raise UnsupportedError(
            got="get_input_embeddings of a CTC model", expected="a model with tokens as input", remedy="Use model.encoder"
        )

    def get_output_embeddings(self) -> None:
        """None, as in transformers; the head is `ctc_head`."""
        return None

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Make the head's parameters those of `encoder.out`, if the configuration says so.

        Args:
            missing_keys, recompute_mapping: of transformers' loading; they change nothing here.
        """
        if self.config.tie_word_embeddings:
            self.ctc_head.weight, self.ctc_head.bias = self.encoder.out.weight, self.encoder.out.bias

    # --- files -------------------------------------------------------------------------------------------------------------------

    @property
    def accepts_loss_kwargs(self) -> bool:
        """False: each batch's loss is a mean of its own, and transformers' Trainer divides it by the batches of a step."""
        complete_trainer()
        return False

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """As `torch.nn.Module.load_state_dict`; a tied model needs one of the two heads."""
        names = canonical_keys(state_dict)
        renamed = {names[key]: value for key, value in state_dict.items() if key in names}
        for one, other in self.tied_names.items() if self._is_tied() else ():
            found = [renamed[name] for name in (other, one) if name in renamed]
            renamed |= dict.fromkeys((one, other), found[0]) if found else {}
        return super().load_state_dict(renamed, strict=strict, assign=assign)

    def _is_tied(self) -> bool:
        return self.ctc_head.weight is self.encoder.out.weight

    def _arranged(self) -> tuple[nn.Module, None]:
        return self.encoder, None

    @classmethod
    def _tie_as_stored(cls, config: GraniteSpeech5CTCConfig, checkpoint: Checkpoint, values: Mapping[str, Any]) -> None:
        """Two different heads are not tied, whatever the configuration says."""
        config.tie_word_embeddings &= all(checkpoint.is_tied(*names) for names in cls.tied_names.items())
