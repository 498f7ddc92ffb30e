"""What IBM's two notebooks about speculative decoding share: a draft is verified in one pass, or decoding starts afresh.

Their cells call the parts of the model one by one, under the names of the released checkpoints.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softmax

from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from tests.support.notebook_doors import Door, released_parts

__all__ = ["Draft", "Speculation", "entropies", "frames_of"]

INSTRUCTION = "<|audio|>can you transcribe the speech into a written format?"
MAX_NEW_TOKENS = 40


@dataclass(frozen=True)
class Draft:
    """Greedy texts of a CTC head.

    Attributes:
        texts: one for each clip.
        doubts: each clip's largest entropy over its frames, in nats; infinite without a text.
        states: `(clips, frames, width)` of the encoder.
        lengths: frames of each clip.
    """

    texts: list[str]
    doubts: list[float]
    states: Tensor
    lengths: list[int]

    def of(self, chosen: list[int]) -> "Draft":
        texts, doubts, lengths = ([values[i] for i in chosen] for values in (self.texts, self.doubts, self.lengths))
        return replace(self, texts=texts, doubts=doubts, lengths=lengths, states=self.states[chosen])


def frames_of(audio: np.ndarray) -> int:
    """Encoder frames of a clip, as the notebooks count them."""
    return len(audio) // 160 // 2 + 1


def entropies(probabilities: Tensor) -> Tensor:
    return -(probabilities * torch.log(probabilities + 1e-10)).sum(dim=-1)


class Speculation:
    """The model and the functions of a notebook; `draft` differs.

    Args:
        door: of the run.
        beams: of the fallback.
    """

    def __init__(self, door: Door, beams: int = 1):
        self.device, self.beams = "cpu", beams
        self.processor = door.AutoProcessor.from_pretrained(str(EMBEDDED_FOLDER))
        self.tokenizer = self.processor.tokenizer
        model = door.AutoModelForSpeechSeq2Seq.from_pretrained(str(EMBEDDED_FOLDER), torch_dtype=torch.float32).to(self.device)
        model.eval()
        self.model = door.loaded(model)
        self.parts = released_parts(self.model)
        self.scaling = getattr(self.parts.language_model.config, "logits_scaling", 1.0)
        chat = [{"role": "user", "content": INSTRUCTION}]
        # With the space that the bundled checkpoint's answers begin with: drafts have none, so it would refuse them all.
        self.prompt = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + " "
        # Embedded once, outside no_grad, as in the notebooks.
        self.ends = [self.tokenizer.encode(text, add_special_tokens=False) for text in self.prompt.split("<|audio|>")]
        embed = self.parts.language_model.get_input_embeddings()
        self.embedded_ends = [embed(torch.tensor([ids], device=self.device)) for ids in self.ends]

    def inputs(self, audios: list[np.ndarray]) -> Any:
        return self.processor([self.prompt] * len(audios), audios, device=self.device, return_tensors="pt").to(self.device)

    def encoded(self, features: Tensor) -> Tensor:
        output = self.parts.encoder(features)
        return output.last_hidden_state if hasattr(output, "last_hidden_state") else output

    def draft(self, audios: list[np.ndarray]) -> Draft:
        raise NotImplementedError

    @torch.no_grad()
    def verify(self, draft: Draft) -> tuple[list[Tensor], Tensor, list[int]]:
        """Probabilities of each draft's tokens, the projected audio, and how many vectors of it each clip has."""
        drafts = [self.tokenizer.encode(text, add_special_tokens=False) if (text := one.strip()) else [] for one in draft.texts]
        audio = self.parts.projector(draft.states)
        window, rate = self.model.config.window_size, self.model.config.downsample_rate
        counts = [min(math.ceil(length / window) * (window // rate), audio.shape[1]) for length in draft.lengths]
        if not any(drafts):
            return [torch.zeros(0) for _ in drafts], audio, counts
        before, after = self.ends
        rows = [before + [self.model.config.audio_token_id] * count + after + ids for count, ids in zip(counts, drafts, strict=True)]
        ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id, device=self.device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, device=self.device)
            mask[i, : len(row)] = 1
        embeddings = self.parts.language_model.get_input_embeddings()(ids)
        for i, count in enumerate(counts):
            embeddings[i, len(before) : len(before) + count, :] = audio[i, :count, :]
        states = self.parts.language_model.model(attention_mask=mask, inputs_embeds=embeddings, use_cache=False).last_hidden_state
        # A token is foretold at the position before its own.
        places = [(i, len(row) - len(one) - 1 + k) for i, (row, one) in enumerate(zip(rows, drafts, strict=True)) for k in range(len(one))]
        clips, positions = torch.tensor(places, device=self.device).T
        logits = self.parts.language_model.lm_head(states[clips, positions, :]) / self.scaling
        tokens = torch.tensor([token for one in drafts for token in one], device=self.device)
        chosen = softmax(logits.float(), dim=-1)[torch.arange(len(tokens), device=self.device), tokens]
        return list(chosen.split([len(one) for one in drafts])), audio, counts

    @torch.no_grad()
    def fallback(self, audio: Tensor, chosen: list[int], counts: list[int]) -> list[str]:
        """Texts decoded from the projected audio of some clips, padded on the left."""
        before, after = self.embedded_ends
        rows = [torch.cat([before, audio[i, : counts[i], :].unsqueeze(0), after], dim=1).squeeze(0) for i in chosen]
        width = max(map(len, rows))
        padded = torch.zeros(len(rows), width, audio.shape[-1], device=self.device, dtype=audio.dtype)
        mask = torch.zeros(len(rows), width, dtype=torch.long, device=self.device)
        for i, row in enumerate(rows):
            padded[i, width - len(row) :] = row
            mask[i, width - len(row) :] = 1
        ids = self.parts.language_model.generate(
            inputs_embeds=padded,
            attention_mask=mask,
            bos_token_id=self.tokenizer.bos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            max_new_tokens=MAX_NEW_TOKENS,
            num_beams=self.beams,
            early_stopping=self.beams > 1,
            do_sample=False,
            use_cache=True,
        )
        return [self.tokenizer.decode(one, skip_special_tokens=True) for one in ids]

    @torch.no_grad()
    def transcribe(self, audios: list[np.ndarray], doubt: float, confidence: float) -> list[list[str]]:
        """Of each clip, who had the last word ("draft", "verified" or "decoded"), and the text.

        Args:
            audios: clips.
            doubt: a draft with at most this entropy is the text.
            confidence: a draft whose tokens all have this probability is the text, too.
        """
        draft = self.draft(audios)
        done = {i: ["draft", text.strip()] for i, text in enumerate(draft.texts) if draft.doubts[i] <= doubt and text.strip()}
        open_clips = [i for i in range(len(audios)) if i not in done]
        if open_clips:
            rest = draft.of(open_clips)
            chances, audio, counts = self.verify(rest)
            accepted = [len(one) > 0 and bool((one >= confidence).all().item()) for one in chances]
            done |= {open_clips[j]: ["verified", rest.texts[j].strip()] for j, is_right in enumerate(accepted) if is_right}
            if failed := [j for j, is_right in enumerate(accepted) if not is_right]:
                texts = self.fallback(audio, failed, counts)
                done |= {open_clips[j]: ["decoded", text] for j, text in zip(failed, texts, strict=True)}
        return [done[i] for i in range(len(audios))]

    @torch.no_grad()
    def standard(self, audios: list[np.ndarray]) -> list[str]:
        ids = self.model.generate(**self.inputs(audios), max_new_tokens=MAX_NEW_TOKENS, num_beams=1, do_sample=False)
        return [self.tokenizer.decode(one, skip_special_tokens=True) for one in ids]

    def run(self, audios: list[np.ndarray], thresholds: list[tuple[float, float]]) -> dict[str, Any]:
        """What the cells print: each step once, then the whole pipeline for some thresholds."""
        draft = self.draft(audios)
        chances, audio, counts = self.verify(draft)
        return {
            "draft": vars(draft),
            "chances": chances,
            "counts": counts,
            "audio": audio,
            "fallback": self.fallback(audio, list(range(len(audios))), counts),
            "standard": self.standard(audios),
            "speculative": [self.transcribe(audios, *one) for one in thresholds],
        }
