"""Beam search over the paged cache, which follows the beams as they are continued or dropped."""

from typing import Any

import torch
from torch import Tensor

from granite_speech.engine.decoding import Prompts
from granite_speech.engine.records import Records
from granite_speech.engine.rules import Rules
from granite_speech.generation.beam_search import BeamSearch
from granite_speech.generation.processors import History
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.outputs import GenerateOutput
from granite_speech.modules.rows import Rows
from granite_speech.modules.tokens import Tokens
from granite_speech.modules.transfers import on_device

__all__ = ["search_beams"]


def search_beams(model: Any, rules: Rules, prompts: Prompts, rng: torch.Generator | None) -> GenerateOutput:
    """The best hypotheses of each prompt.

    Args:
        model: the model.
        rules: of the request, with num_beams above 1.
        prompts: after their prefill, each num_beams times.
        rng: for do_sample; None: torch's default generator.
    """
    cache, logits, device, options = prompts.cache, prompts.logits, model.device, rules.options
    history, records = History(prompts.ids, prompts.kept), Records(rules.asked, len(cache))
    processors = rules.processors(history)

    def end_early(parents: Tensor, tokens: Tensor) -> Tensor:
        ids = torch.cat((history.ids.index_select(0, parents), tokens.unsqueeze(1)), dim=1)
        return rules.stopping.ended(ids, records.scores_so_far())

    criteria = end_early if rules.stopping else None
    beams = BeamSearch(options, len(cache) // options.num_beams, device, prompts.stops, criteria, rng)
    tokens_of_rows, positions = Rows.single_tokens(len(cache), device), on_device(cache.next_positions, device)
    segments, padded = tokens_of_rows.segments, tokens_of_rows if have_hooks(model.decoder) else None
    adapter_index, rows = model.adapter_index(cache.has_audio, segments), list(range(len(cache)))
    hidden_states = prompts.hidden_states
    while True:
        scores = processors(history, logits.float().log_softmax(-1))
        records.add(scores, logits, hidden_states, rows)
        parents, tokens = beams.advance(scores)
        if beams.is_over:
            break
        history.extend(tokens, parents)
        cache.reorder(parents.tolist())
        layout = Tokens(segments, positions, adapter_index, cache.begin(segments), rows=padded)
        embeddings = model.embed_tokens(tokens.unsqueeze(1)).squeeze(1)
        hidden_states = records.collected()
        logits = model.language_model.next_logits(model.language_states(embeddings, layout, hidden_states))
        positions = positions + 1
    new, sequences_scores, origins = beams.answers()
    output = GenerateOutput(new, sequences_scores=sequences_scores if options.output_scores else None, beam_indices=origins)
    return records.put_into(output)
