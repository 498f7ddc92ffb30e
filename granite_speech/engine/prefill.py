"""Short prompts at a few fixed shapes, so that their prefill is one graph launch.

Which tokens belong to which sequence, which of them are audio and which pages they fill is on the device, so a stage serves every
call that fits its bucket. The tokens beyond a call's are padding: they write to page 0, which no sequence owns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_speech.engine.fixed_shapes import Field, InputBlock, is_inference, power_of_2, round_up
from granite_speech.engine.graphs import Graphs
from granite_speech.modules.cache import CacheStep, PagePool
from granite_speech.modules.forward import PackedPrompt
from granite_speech.modules.language_model import Tokens
from granite_speech.modules.packing import Bucket
from granite_speech.modules.prompts import ModelInputs

__all__ = ["PrefillStage", "PromptBucket", "bucket_of", "prefill"]

# Above these, the device takes longer than the launches.
_TOKENS = ((64, 512), (128, 1024), (256, 2048))
_MOST_ROWS = 16


@dataclass(frozen=True)
class PromptBucket:
    """Size of a `PrefillStage`.

    Attributes:
        tokens: of all sequences together.
        rows: number of sequences.
    """

    tokens: int
    rows: int


def bucket_of(lengths: Sequence[int]) -> PromptBucket | None:
    """The smallest bucket for prompts of these numbers of tokens; None if one is empty, or if they are more than any bucket has."""
    if not lengths or len(lengths) > _MOST_ROWS or min(lengths) == 0:
        return None
    tokens = round_up(sum(lengths), _TOKENS)
    return None if tokens is None else PromptBucket(tokens, power_of_2(len(lengths)))


class PrefillStage:
    """Language model and head for up to `bucket.tokens` tokens of up to `bucket.rows` sequences without earlier keys.

    Args:
        model: with a head, in evaluation mode; its weights are read at every run.
        bucket: the size.
        pool: the pages. They are written, so they must not move between a capture and its replays.
        pages_per_row: columns of the block table: enough for one sequence of `bucket.tokens` tokens.

    Attributes:
        ids: `(tokens,)` int64.
        audio_rows: `(tokens,)` int64, the row of `vectors` that is the token's embedding; −1 for a text token.
        vectors: `(tokens, hidden)` in the model's dtype. Rows beyond the call's may hold anything, NaN too.
        positions: `(tokens,)` int64.
        adapter_index: `(tokens,)` int32, 0 with the adapter and −1 without.
        slots: `(tokens,)` int64, where keys and values are stored; 0 for padding.
        cu_seqlens: `(rows + 1,)` int32.
        kv_lens: `(rows,)` int32, 0 for a row without a sequence.
        block_table: `(rows, pages_per_row)` int32.
        last: `(rows,)` int64, each sequence's last token.
        logits: `(rows, vocabulary)`, the result: of each sequence's next token. Only the call's rows have a meaning.
    """

    def __init__(self, model: Any, bucket: PromptBucket, pool: PagePool, pages_per_row: int):
        self._model, self._pool = model, pool
        tokens, rows = bucket.tokens, bucket.rows
        self._inputs = InputBlock(
            model.device,
            {
                "ids": Field((tokens,), torch.int64),
                "audio_rows": Field((tokens,), torch.int64, padding=-1),
                "positions": Field((tokens,), torch.int64),
                "adapter_index": Field((tokens,), torch.int32, padding=-1),
                "slots": Field((tokens,), torch.int64),
                "cu_seqlens": Field((rows + 1,), torch.int32),
                "kv_lens": Field((rows,), torch.int32),
                "block_table": Field((rows, pages_per_row), torch.int32),
                "last": Field((rows,), torch.int64),
            },
        )
        self.ids, self.audio_rows, self.positions = self._inputs["ids"], self._inputs["audio_rows"], self._inputs["positions"]
        self.adapter_index, self.slots, self.last = self._inputs["adapter_index"], self._inputs["slots"], self._inputs["last"]
        self.cu_seqlens, self.kv_lens = self._inputs["cu_seqlens"], self._inputs["kv_lens"]
        self.block_table = self._inputs["block_table"]
        config, like = model.config.text_config, {"dtype": model.dtype, "device": model.device}
        with torch.inference_mode(False):  # see InputBlock
            self.vectors = torch.zeros(tokens, config.hidden_size, **like)
            self.logits = torch.zeros(rows, config.vocab_size, **like)
        self._segments = Bucket(self.cu_seqlens, tokens, tokens)

    def fill(self, prompt: PackedPrompt, block_table: Tensor) -> None:
        """Take a call's input; nothing waits for the device.

        Args:
            prompt: fits the bucket, and has no keys in the cache yet.
            block_table: `(sequences, pages)` int32 on the host, pages for all tokens of each prompt; later ones are ignored.
        """
        segments = prompt.rows.segments
        lengths, starts = torch.tensor(segments.lengths), torch.tensor(segments.starts, dtype=torch.int32)
        of_token = torch.arange(len(lengths)).repeat_interleave(lengths)
        place = torch.arange(segments.total) - starts[of_token]
        page_size = self._pool.page_size
        page = block_table[of_token, place // page_size].long()
        values = {
            "ids": prompt.ids,
            "audio_rows": torch.where(prompt.is_audio, prompt.is_audio.cumsum(0) - 1, -1),
            "positions": prompt.rows.positions,
            "adapter_index": torch.tensor([0 if one else -1 for one in prompt.has_audio], dtype=torch.int32)[of_token],
            "slots": page * page_size + place % page_size,
            "cu_seqlens": F.pad(starts, (0, len(self.kv_lens) - len(lengths)), value=segments.total),
            "kv_lens": lengths,
            "block_table": block_table[:, : self.block_table.shape[1]],
            "last": starts[1:] - 1,
        }
        self._inputs.fill(values)
        if prompt.vectors is not None:
            self.vectors[: len(prompt.vectors)].copy_(prompt.vectors)

    def reset(self) -> None:
        """Make all rows padding, so that a run writes to page 0 alone."""
        self._inputs.fill({})

    @torch.no_grad()
    def run(self) -> None:
        """Store the tokens' keys and values and compute `logits`. Depends on nothing on the host but the bucket."""
        model = self._model
        audio = self.vectors.index_select(0, self.audio_rows.clamp(min=0))
        # Chosen, not added: a row of `vectors` without a token may hold NaN.
        embeddings = torch.where((self.audio_rows >= 0).unsqueeze(1), audio, model.embed_tokens(self.ids))
        step = CacheStep(self._pool, self.slots, self.block_table, self.kv_lens, has_past=True)
        layout = Tokens(segments=self._segments, positions=self.positions, adapter_index=self.adapter_index, step=step)
        states = model.decoder(embeddings, layout)
        self.logits.copy_(model.language_model.logits(states.index_select(0, self.last)))


def prefill(model: Any, graphs: Graphs, prompt: PackedPrompt, inputs: ModelInputs) -> Tensor:
    """Run prompts, by replaying a captured stage if there is one for this size, and eagerly otherwise.

    Args:
        model: the model.
        graphs: its captured stages, all on the pages of the prompts' cache. A stage that is missing is asked for.
        prompt: from `model.pack_prompt`. Its cache has no keys yet, but a page for every token.
        inputs: what the prompt was packed from.

    Returns:
        `(rows, vocabulary)` logits of each row's next token; they belong to the caller. The cache has the prompts' keys.
    """
    cache, segments = prompt.cache, prompt.rows.segments
    bucket = bucket_of(segments.lengths) if is_inference(model.decoder) else None
    stage = None if bucket is None else graphs.captured(bucket)
    if stage is None:
        if bucket is not None:
            graphs.want(bucket, partial(PrefillStage, model, bucket, cache.pool, cache.pool.count(bucket.tokens)))
        states, _, _ = model.run_prompt(prompt, inputs)
        return model.language_model.logits(states.index_select(0, segments.cu_seqlens[1:] - 1))
    stage.fill(prompt, cache.block_table())
    graphs.replay(bucket)
    cache.lengths, cache.has_audio = list(segments.lengths), prompt.has_audio
    prompt.rows.advance(cache)
    # Cloned, because the next replay overwrites the stage's result.
    return stage.logits[: len(segments.lengths)].clone()
