"""Encoder and projector at a few fixed shapes, so that short audio is one graph launch.

Eagerly the encoder takes more than ten times as long to launch as to compute for a clip of ten seconds. Which frames belong to which
clip is on the device, so a stage serves every call that fits its bucket; the rows beyond a call's frames are padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from granite_speech.engine.fixed_shapes import Field, InputBlock, is_inference, power_of_2, round_up
from granite_speech.engine.graphs import Graphs
from granite_speech.modules.forward import SpeechToStates
from granite_speech.modules.packing import Bucket, Segments

__all__ = ["EncoderBucket", "EncoderStage", "bucket_of", "encode"]

# Above 8192 frames, almost three minutes of audio, the device takes longer than the launches.
_FRAMES = ((128, 1024), (256, 2048), (512, 4096), (1024, 8192))


@dataclass(frozen=True)
class EncoderBucket:
    """Size of an `EncoderStage`.

    Attributes:
        frames: of all clips together.
        clips: number of clips.
    """

    frames: int
    clips: int


def bucket_of(lengths: Sequence[int]) -> EncoderBucket | None:
    """The smallest bucket for clips of these numbers of frames; None if there is no frame, or more than any bucket has."""
    total = sum(lengths)
    frames = round_up(total, _FRAMES) if total else None
    return None if frames is None else EncoderBucket(frames, power_of_2(len(lengths)))


class EncoderStage:
    """Encoder and projector for up to `bucket.frames` frames of up to `bucket.clips` clips.

    Args:
        model: in evaluation mode; its weights are read at every run.
        bucket: the size.

    Attributes:
        frames: `(bucket.frames, input_dim)` in the model's dtype, packed. Rows beyond the call's frames may hold anything, NaN too.
        cu_seqlens: `(bucket.clips + 1,)` int32.
        windows: `(windows, window_size)` int64, the frames of each of the projector's windows; `bucket.frames` means zeros.
        states: `(bucket.frames, encoder width)`, the result; only the call's rows have a meaning, here and in `vectors`.
        vectors: `(windows * queries, text hidden size)`, the result.
    """

    def __init__(self, model: SpeechToStates, bucket: EncoderBucket):
        self._encoder, self._projector = model.encoder, model.projector
        self._frames = bucket.frames
        size, config = model.projector.window_size, model.config
        # Each clip's last window may have a single frame.
        windows = (bucket.frames + bucket.clips * (size - 1)) // size
        self._inputs = InputBlock(
            model.device,
            {
                "cu_seqlens": Field((bucket.clips + 1,), torch.int32),
                "windows": Field((windows, size), torch.int64, padding=bucket.frames),
            },
        )
        self.cu_seqlens, self.windows = self._inputs["cu_seqlens"], self._inputs["windows"]
        like = {"dtype": model.dtype, "device": model.device}
        with torch.inference_mode(False):  # see InputBlock
            self.frames = torch.zeros(bucket.frames, config.encoder_config.input_dim, **like)
            self.states = torch.zeros(bucket.frames, config.encoder_config.output_width, **like)
            self.vectors = torch.zeros(windows * model.projector.num_queries, config.text_config.hidden_size, **like)
        self._clips = Bucket(self.cu_seqlens, bucket.frames, bucket.frames)

    def fill(self, frames: Tensor, lengths: Sequence[int]) -> None:
        """Take a call's input; nothing waits for the device.

        Args:
            frames: `(total_frames, input_dim)` on the model's device, packed.
            lengths: each clip's number of frames. They must fit the bucket.
        """
        clips = Segments(tuple(lengths), frames.device)
        missing = self.cu_seqlens.shape[0] - len(clips.starts)
        self._inputs.fill(
            {
                "cu_seqlens": torch.tensor((*clips.starts, *[clips.total] * missing), dtype=torch.int32),
                "windows": clips.window_rows(self._projector.window_size, beyond=self._frames),
            }
        )
        self.frames[: clips.total].copy_(frames)

    def reset(self) -> None:
        """Make all rows padding."""
        self._inputs.fill({})

    @torch.no_grad()
    def run(self) -> None:
        """Compute `states` and `vectors` from the inputs. Depends on nothing on the host but the bucket."""
        states = self._encoder.encode(self.frames, self._clips)
        self.states.copy_(states)
        self.vectors.copy_(self._projector.project(states, self.windows))


def encode(model: SpeechToStates, graphs: Graphs, frames: Tensor, clips: Segments) -> tuple[Tensor, Tensor, Segments]:
    """`model.encode_packed`, by replaying a captured stage if there is one for this size, and eagerly otherwise.

    Args:
        model: the model.
        graphs: its captured stages. A stage that is missing is asked for.
        frames: `(total_frames, input_dim)`, packed, in the model's dtype.
        clips: where each clip lies.

    Returns:
        Encoder states `(total_frames, encoder width)`, audio vectors `(total audio tokens, text hidden size)`, and where each
        clip's vectors lie. They belong to the caller.
    """
    bucket = bucket_of(clips.lengths) if is_inference(model.encoder, model.projector) else None
    stage = None if bucket is None else graphs.captured(bucket)
    if stage is None:
        if bucket is not None:
            graphs.want(bucket, partial(EncoderStage, model, bucket))
        return SpeechToStates.encode_packed(model, frames, clips)
    stage.fill(frames, clips.lengths)
    graphs.replay(bucket)
    tokens = model.projector.token_segments(clips)
    # Cloned, because the next replay overwrites the stage's results.
    return stage.states[: clips.total].clone(), stage.vectors[: tokens.total].clone(), tokens
