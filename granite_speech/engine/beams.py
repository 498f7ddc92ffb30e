"""Beam search over the paged cache, which follows the beams as they are continued or dropped."""

from typing import Any

import torch

from granite_speech.engine.decoding import Prompts
from granite_speech.generation.beam_search import BeamSearch
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.sampling import LogitsProcessor
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.outputs import GenerateOutput
from granite_speech.modules.rows import Rows
from granite_speech.modules.tokens import Tokens
from granite_speech.modules.transfers import on_device

__all__ = ["search_beams"]


def search_beams(model: Any, options: GenerationOptions, prompts: Prompts, rng: torch.Generator | None) -> GenerateOutput:
    """The best hypotheses of each prompt.

    Args:
        model: the model.
        options: of the request, with num_beams above 1.
        prompts: after their prefill, each num_beams times.
        rng: for do_sample; None: torch's default generator.
    """
    cache, logits, device = prompts.cache, prompts.logits, model.device
    processor = LogitsProcessor(options, prompts.ids, prompts.kept, logits.shape[1])
    beams = BeamSearch(options, len(cache) // options.num_beams, device, prompts.stops, rng)
    keeps_scores = options.return_dict_in_generate and options.output_scores
    rows, positions = Rows.single_tokens(len(cache), device), on_device(cache.next_positions, device)
    segments, padded = rows.segments, rows if have_hooks(model.decoder) else None
    adapter_index = model.adapter_index(cache.has_audio, segments)
    kept_scores = []
    while True:
        scores = processor(logits.float().log_softmax(-1))
        if keeps_scores:
            kept_scores.append(scores.float())
        parents, tokens = beams.advance(scores)
        if beams.is_over:
            break
        processor.extend(tokens, parents)
        cache.reorder(parents.tolist())
        layout = Tokens(segments, positions, adapter_index, cache.begin(segments), rows=padded)
        embeddings = model.embed_tokens(tokens.unsqueeze(1)).squeeze(1)
        logits = model.language_model.next_logits(model.language_states(embeddings, layout))
        positions = positions + 1
    new, sequences_scores, origins = beams.answers()
    return GenerateOutput(
        new,
        sequences_scores=sequences_scores if options.output_scores else None,
        scores=tuple(kept_scores) if options.output_scores else None,
        beam_indices=origins,
    )
