"""CTC's loss (Graves et al., "Connectionist Temporal Classification", 2006), as transformers computes it for `GraniteSpeech5ForCTC`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.errors import ConfigError, InputError
from granite_speech.modules.packing import Segments
from granite_speech.modules.transfers import on_device, on_host

__all__ = ["Targets", "blank_of", "checked_targets", "ctc_loss"]

_IGNORED = -100  # a label that is left out, as is the blank


@dataclass(frozen=True)
class Targets:
    """The labels of a batch, on the host.

    Attributes:
        ids: `(labels,)` int64, of one clip after another.
        lengths: of each clip.
    """

    ids: Tensor
    lengths: tuple[int, ...]

    def least_frames(self) -> list[int]:
        """How many frames each clip needs: one for each label, and one for the blank between two equal ones."""
        return [len(one) + int((one[1:] == one[:-1]).sum()) for one in self.ids.split(self.lengths)]


def blank_of(config: GraniteSpeech5CTCConfig) -> int:
    """CTC's blank.

    Raises:
        ConfigError: the configuration has none.
    """
    if config.pad_token_id is None:
        raise ConfigError(got="pad_token_id None", expected="the id of CTC's blank", remedy="Set config.pad_token_id = 0")
    return config.pad_token_id


def checked_targets(labels: Tensor, clips: Segments, config: GraniteSpeech5CTCConfig) -> Targets:
    """The labels of a batch. They are read by the host, which needs their lengths.

    Args:
        labels: `(clips, tokens)` integers; −100 and the blank are left out.
        clips: of the batch.
        config: of the model.

    Raises:
        InputError: another shape or dtype, or ids that the vocabulary does not have.
    """
    if labels.dim() != 2 or labels.shape[0] != len(clips.lengths) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            got=f"labels of shape {tuple(labels.shape)} and {labels.dtype}",
            expected=f"integers ({len(clips.lengths)}, tokens), one row for each clip",
            remedy="Pass the processor's labels",
        )
    [ids] = on_host(labels.long())
    is_label = (ids != _IGNORED) & (ids != blank_of(config))
    found = ids[is_label]
    wrong = found[(found < 0) | (found >= config.vocab_size)]
    if len(wrong):
        raise InputError(
            got=f"labels with {sorted(set(wrong.tolist()))[:5]}",
            expected=f"ids from 0 to {config.vocab_size - 1}, and {_IGNORED} or {config.pad_token_id} for padding",
            remedy="Encode the text with the model's own tokenizer",
        )
    return Targets(found, tuple(is_label.sum(1).tolist()))


def ctc_loss(logits: Tensor, clips: Segments, targets: Targets, config: GraniteSpeech5CTCConfig) -> Tensor:
    """The loss, reduced as the configuration says; computed in float32.

    Args:
        logits: `(total_frames, vocab_size)`, packed.
        clips: where each clip's frames lie.
        targets: the labels.
        config: of the model.

    Raises:
        InputError: without `ctc_zero_infinity`, a clip with fewer frames than its labels need, whose loss would be infinite.
    """
    if not config.ctc_zero_infinity:
        _check_lengths(clips, targets)
    frames = max(1, clips.longest)  # PyTorch's function does not take none at all
    log_probabilities = clips.pad(F.log_softmax(logits, dim=-1, dtype=torch.float32), frames).transpose(0, 1)
    with torch.backends.cudnn.flags(enabled=False):  # its CTC has limits of its own, and takes the first entry as the blank
        return F.ctc_loss(
            log_probabilities,
            on_device(targets.ids, logits.device),
            torch.tensor(clips.lengths),
            torch.tensor(targets.lengths),
            blank=config.pad_token_id,
            reduction=config.ctc_loss_reduction,
            zero_infinity=config.ctc_zero_infinity,
        )


def _check_lengths(clips: Segments, targets: Targets) -> None:
    for number, (frames, needed) in enumerate(zip(clips.lengths, targets.least_frames(), strict=True)):
        if frames < needed:
            raise InputError(
                got=f"labels of clip {number} that need {needed} frames, and {frames} frames of audio",
                expected="at least as many frames as labels, and one more between two equal ones",
                remedy="Leave such clips out, or set ctc_zero_infinity, which gives them a loss of 0",
            )
