"""Short prompts at a few fixed shapes, so that their prefill is one graph launch.

Which tokens belong to which sequence, which of them are audio and which pages they fill is on the device, so a stage serves every
call that fits its bucket. The tokens beyond a call's are padding: they write to page 0, which no sequence owns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_speech.engine.fixed_shapes import Field, InputBlock, is_inference, power_of_2, round_up
from granite_speech.engine.graphs import Graphs
from granite_speech.engine.packed_tokens import PackedTokens, store_keys
from granite_speech.modules.cache import CacheStep, PagePool
from granite_speech.modules.forward import PackedPrompt
from granite_speech.modules.packing import Bucket
from granite_speech.modules.prompts import ModelInputs
from granite_speech.modules.tokens import Tokens

__all__ = ["PrefillStage", "PromptBucket", "bucket_of", "prefill", "prefill_piece"]

# Above these, the device takes longer than the launches.
_TOKENS = ((64, 512), (128, 1024), (256, 2048))
_MOST_ROWS = 16


@dataclass(frozen=True)
class PromptBucket:
    """Size of a `PrefillStage`.

    Attributes:
        tokens: of all sequences together.
        rows: number of sequences.
        pages: of one sequence; 0: enough for `tokens` tokens.
        head: whether to compute logits.
    """

    tokens: int
    rows: int
    pages: int = 0
    head: bool = True


def bucket_of(lengths: Sequence[int]) -> PromptBucket | None:
    """The smallest bucket for prompts of these numbers of tokens; None if one is empty, or if they are more than any bucket has."""
    if not lengths or len(lengths) > _MOST_ROWS or min(lengths) == 0:
        return None
    tokens = round_up(sum(lengths), _TOKENS)
    return None if tokens is None else PromptBucket(tokens, power_of_2(len(lengths)))


class PrefillStage:
    """Language model and head for up to `bucket.tokens` new tokens of up to `bucket.rows` sequences.

    Args:
        model: with a head, in evaluation mode; its weights are read at every run.
        bucket: the size.
        pool: the pages. They are written, so they must not move between a capture and its replays.

    Attributes:
        ids: `(tokens,)` int64.
        audio_rows: `(tokens,)` int64, the row of `vectors` that is the token's embedding; −1 for a text token.
        vectors: `(tokens, hidden)` in the model's dtype. Rows beyond the call's may hold anything, NaN too.
        positions: `(tokens,)` int64.
        adapter_index: `(tokens,)` int32, 0 with the adapter and −1 without.
        slots: `(tokens,)` int64, where keys and values are stored; 0 for padding.
        cu_seqlens: `(rows + 1,)` int32.
        kv_lens: `(rows,)` int32, 0 for a row without a sequence.
        block_table: `(rows, pages)` int32.
        last: `(rows,)` int64, each sequence's last token.
        logits: `(rows, vocabulary)`, the result: of each sequence's next token. Only the call's rows have a meaning. None without head.
    """

    def __init__(self, model: Any, bucket: PromptBucket, pool: PagePool):
        self._model, self._pool = model, pool
        tokens, rows, pages = bucket.tokens, bucket.rows, bucket.pages or pool.count(bucket.tokens)
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
                "block_table": Field((rows, pages), torch.int32),
                "last": Field((rows,), torch.int64),
            },
        )
        self.ids, self.audio_rows, self.positions = self._inputs["ids"], self._inputs["audio_rows"], self._inputs["positions"]
        self.adapter_index, self.slots, self.last = self._inputs["adapter_index"], self._inputs["slots"], self._inputs["last"]
        self.cu_seqlens, self.kv_lens = self._inputs["cu_seqlens"], self._inputs["kv_lens"]
        self.block_table = self._inputs["block_table"]
        config, like = model.text_config, {"dtype": model.dtype, "device": model.device}
        with torch.inference_mode(False):  # see InputBlock
            self.vectors = torch.zeros(tokens, config.hidden_size, **like)
            self.logits = torch.zeros(rows, config.vocab_size, **like) if bucket.head else None
        self._segments = Bucket(self.cu_seqlens, tokens, tokens)

    def fill(self, tokens: PackedTokens) -> None:
        """Take a call's tokens, which fit the bucket; nothing waits for the device. Columns of the block table beyond the stage's are
        ignored."""
        total, ends = sum(tokens.lengths), torch.tensor(tokens.lengths).cumsum(0)
        values = {
            "ids": tokens.ids,
            "audio_rows": torch.where(tokens.is_audio, tokens.is_audio.cumsum(0) - 1, -1),
            "positions": tokens.positions,
            "adapter_index": tokens.adapter_index,
            "slots": tokens.slots(self._pool.page_size),
            "cu_seqlens": F.pad(F.pad(ends, (1, 0)), (0, len(self.kv_lens) - len(ends)), value=total),
            "kv_lens": tokens.kv_lens,
            "block_table": tokens.block_table[:, : self.block_table.shape[1]],
            "last": ends - 1,
        }
        self._inputs.fill(values)
        if tokens.vectors is not None:
            self.vectors[: len(tokens.vectors)].copy_(tokens.vectors)

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
        states = model.language_states(embeddings, layout)
        if self.logits is not None:
            self.logits.copy_(model.language_model.next_logits(states.index_select(0, self.last)))


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
    # A stage takes ids, not embeddings.
    bucket = bucket_of(segments.lengths) if prompt.ids is not None and is_inference(model.decoder) else None
    stage = None if bucket is None else graphs.captured(bucket)
    if stage is None:
        if bucket is not None:
            graphs.want(bucket, partial(PrefillStage, model, bucket, cache.pool))
        states, _, _ = model.run_prompt(prompt, inputs)
        return model.language_model.next_logits(states.index_select(0, segments.cu_seqlens[1:] - 1))
    stage.fill(PackedTokens.of(prompt, cache.block_table()))
    graphs.replay(bucket)
    cache.lengths, cache.has_audio = list(segments.lengths), prompt.has_audio
    prompt.rows.advance(cache)
    # Cloned, because the next replay overwrites the stage's result.
    return stage.logits[: len(segments.lengths)].clone()


def prefill_piece(model: Any, graphs: Graphs, pool: PagePool, tokens: PackedTokens) -> None:
    """Store the keys and values of tokens, by replaying a captured stage if there is one for this size, and eagerly otherwise.

    Args:
        model: the model.
        graphs: its captured stages, all on these pages. A stage that is missing is asked for.
        pool: the pages.
        tokens: pieces of prompts.
    """
    bucket = bucket_of(tokens.lengths) if is_inference(model.decoder) else None
    if bucket is not None:
        bucket = replace(bucket, pages=max(8, power_of_2(pool.count(int(tokens.kv_lens.max())))), head=False)
    if bucket is None or graphs.captured(bucket) is None:
        if bucket is not None:
            graphs.want(bucket, partial(PrefillStage, model, bucket, pool))
        store_keys(model, pool, tokens)
        return
    graphs.captured(bucket).fill(tokens)
    graphs.replay(bucket)
