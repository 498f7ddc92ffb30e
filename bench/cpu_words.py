"""What a dtype changes about the bundled checkpoint's results on a CPU: word error rates, and a clip beside a loud one."""

from pathlib import Path
from typing import Any

import torch

from bench import embedded
from bench.turns import OURS, error
from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.errors import MissingDependencyError
from granite_speech.inputs.requests import transcript_request
from granite_speech.training import Utterance, read_manifest, transcripts, word_error_rate
from granite_speech.training.bundled_checkpoint.synthesis import synthesize

__all__ = ["held_out", "measure"]

LOUDER = 20
STAGES = ("encoder", "projector", "first token")

States = dict[str, torch.Tensor]


def held_out(manifest: Path) -> list[Utterance]:
    """Utterances of voices held out of training, synthesized if the manifest does not exist; none without the synthesizers."""
    if not manifest.is_file():
        try:
            synthesize(manifest.parent, 1500, 2, held_out=True)
        except MissingDependencyError as missing:
            print(f"no word error rate of held-out voices: {missing}")
            return []
    return read_manifest(manifest)


def measure(utterances: list[Utterance], systems: tuple[str, ...] = OURS) -> list[dict[str, Any]]:
    """Word error rates and errors of each of our dtypes, ours in float32 first.

    Args:
        utterances: of held-out voices.
        systems: some of OURS, the one in float32 first.

    Returns:
        Of each: the word error rate of the recorded clips, and of `utterances` if there are any; the errors of a clip's states after the
        encoder and the projector and of its first token's logits: relative to float32, and of the same clip in a batch with one that is
        20 times louder, relative to that clip alone.
    """
    processor, recorded = GraniteSpeechProcessor.from_pretrained("embedded"), read_manifest(embedded.SPEECH / "manifest.jsonl")
    found, truth = [], None
    for system in systems:
        model = embedded.ours(system)
        rates = {name: _rate(model, processor, some) for name, some in (("recorded", recorded), ("held out", utterances)) if some}
        alone, beside = _states(model, processor)
        truth = alone if truth is None else truth
        errors = {
            "from float32": {stage: error(alone[stage], truth[stage]) for stage in STAGES},
            "beside a loud clip": {stage: error(beside[stage], alone[stage]) for stage in STAGES},
        }
        counts = {"recorded": len(recorded), "held out": len(utterances)}
        found.append({"system": system, "utterances": counts, "word_error_rate": rates, "errors": errors})
    return found


def _rate(model: GraniteSpeechForConditionalGeneration, processor: GraniteSpeechProcessor, utterances: list[Utterance]) -> float:
    return word_error_rate([one.text for one in utterances], transcripts(model, processor, utterances))


@torch.no_grad()
def _states(model: GraniteSpeechForConditionalGeneration, processor: GraniteSpeechProcessor) -> tuple[States, States]:
    """Of one clip alone, and of the same clip after another that is 20 times louder."""
    neighbor, clip = embedded.recorded_clips()[0][:2]  # the clip is the shorter one, so that it is padded where anything is
    request = transcript_request(processor)
    found = []
    for clips in ([clip], [neighbor * LOUDER, clip]):
        inputs = processor([request] * len(clips), clips)
        lengths = inputs["input_features_lengths"]
        audio = model.get_audio_features(inputs["input_features"], input_features_lengths=lengths)
        tokens = int((inputs["input_ids"][-1] == model.config.audio_token_index).sum())
        found.append(
            {
                "encoder": audio.last_hidden_state[-1, : int(lengths[-1])],
                "projector": audio.pooler_output[-1, :tokens],
                "first token": model(**inputs).logits[-1, -1],
            }
        )
    return found[0], found[1]
