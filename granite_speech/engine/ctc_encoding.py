"""TurboCTC at a few fixed shapes, so that short audio is one graph launch: frames in, the best path of each clip out.

As in `encoding.py`, which frames belong to which clip is on the device, and the rows beyond a call's frames are padding.
"""

from collections.abc import Sequence
from functools import partial

import torch
from granite_kernels.ctc_greedy import CtcGreedy
from torch import Tensor

from granite_speech.engine.encoding import EncoderBucket
from granite_speech.engine.fixed_shapes import Field, InputBlock, is_inference, power_of_2, round_up
from granite_speech.engine.graphs import Graphs
from granite_speech.modules.ctc_frames import FramesToPath
from granite_speech.modules.packing import Bucket, Segments

__all__ = ["CTCStage", "bucket_of", "decode"]

# Above 16384 frames, more than five minutes of audio, the device takes longer than the launches.
_FRAMES = ((256, 2048), (512, 4096), (1024, 8192), (2048, 16384))


def bucket_of(lengths: Sequence[int]) -> EncoderBucket | None:
    """The smallest bucket for clips of these numbers of frames; None if there is no frame, or more than any bucket has."""
    total = sum(lengths)
    frames = round_up(total, _FRAMES) if total else None
    return None if frames is None else EncoderBucket(frames, power_of_2(len(lengths)))


class CTCStage:
    """Encoder, head and greedy decoding for up to `bucket.frames` frames of up to `bucket.clips` clips.

    Args:
        model: in evaluation mode; its weights are read at every run.
        bucket: the size.

    Attributes:
        frames: `(bucket.frames, 4 * num_mel_bins)` in the model's dtype, packed. Rows beyond the call's frames may hold anything, NaN too.
        cu_seqlens: `(bucket.clips + 1,)` int32.
        path: the result, with as many rows as frames are left of `bucket.frames`; those beyond the call's have no meaning.
    """

    def __init__(self, model: FramesToPath, bucket: EncoderBucket):
        self._model = model
        self._inputs = InputBlock(model.device, {"cu_seqlens": Field((bucket.clips + 1,), torch.int32)})
        self.cu_seqlens = self._inputs["cu_seqlens"]
        self._clips = Bucket(self.cu_seqlens, bucket.frames, bucket.frames)
        rows = model.encoder.frames_left(bucket.frames)
        with torch.inference_mode(False):  # see InputBlock
            width = 4 * model.config.encoder_config.num_mel_bins
            self.frames = torch.zeros(bucket.frames, width, dtype=model.dtype, device=model.device)
            wide = torch.promote_types(model.dtype, torch.float32)
            dtypes = {name: wide for name in ("logprobs", "entropy", "token_logprobs")}
            sizes = {"counts": bucket.clips}
            self.path = CtcGreedy(
                *(
                    torch.zeros(sizes.get(name, rows), dtype=dtypes.get(name, torch.int32), device=model.device)
                    for name in CtcGreedy._fields
                )
            )

    def fill(self, frames: Tensor, lengths: Sequence[int]) -> None:
        """Take a call's input; nothing waits for the device.

        Args:
            frames: `(total_frames, 4 * num_mel_bins)` on the model's device, packed.
            lengths: each clip's number of frames. They must fit the bucket.
        """
        starts = Segments(tuple(lengths), frames.device).starts
        missing = self.cu_seqlens.shape[0] - len(starts)
        self._inputs.fill({"cu_seqlens": torch.tensor((*starts, *[starts[-1]] * missing), dtype=torch.int32)})
        self.frames[: starts[-1]].copy_(frames)

    def reset(self) -> None:
        """Make all rows padding."""
        self._inputs.fill({})

    @torch.no_grad()
    def run(self) -> None:
        """Compute `path` from the inputs. Depends on nothing on the host but the bucket."""
        found = self._model.greedy_packed(*self._model.encode_packed(self.frames, self._clips))
        for ours, one in zip(self.path, found, strict=True):
            ours.copy_(one)


def decode(model: FramesToPath, graphs: Graphs, frames: Tensor, clips: Segments) -> tuple[CtcGreedy, Segments]:
    """The best path of each clip, by replaying a captured stage if there is one for this size, and eagerly otherwise.

    Args:
        model: the model.
        graphs: its captured stages. A stage that is missing is asked for.
        frames: `(total_frames, 4 * num_mel_bins)`, packed, in the model's dtype.
        clips: where each clip lies.

    Returns:
        The path, and where each clip's frames lie in it. They belong to the caller.
    """
    bucket = bucket_of(clips.lengths) if is_inference(model) else None
    stage = None if bucket is None else graphs.captured(bucket)
    if stage is None:
        if bucket is not None:
            graphs.want(bucket, partial(CTCStage, model, bucket))
        states, left = model.encode_packed(frames, clips)
        return model.greedy_packed(states, left), left
    stage.fill(frames, clips.lengths)
    graphs.replay(bucket)
    left = model.encoder.clips_left(clips)
    # Cloned, because the next replay overwrites the stage's results.
    rows = {"counts": len(clips.lengths)}
    return CtcGreedy(*(one[: rows.get(name, left.total)].clone() for name, one in stage.path._asdict().items())), left
