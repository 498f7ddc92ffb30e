"""IBM's notebook about spoken questions: one pass writes a question down, and a second one answers it without the adapter."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from tests.support.notebook_doors import DOORS, Door, clip

# No part of an accelerated model may have to run as transformers wrote it.
pytestmark = pytest.mark.filterwarnings("error::granite_speech.interop.accelerate.AccelerationWarning")

# The first clip is transcribed correctly in spite of a system text, which the bundled checkpoint was not trained with.
SYSTEM, INSTRUCTION = "You are Granite.", "<|audio|>can you transcribe the speech into a written format?"
CLIPS, WORDS = (0, 5, 10), "nine one five seven"


class Notebook:
    """The notebook's model and its two functions."""

    def __init__(self, door: Door, dtype: torch.dtype):
        self.device, folder = "cpu", str(EMBEDDED_FOLDER)
        self.processor = door.GraniteSpeechProcessor.from_pretrained(folder)
        model = door.GraniteSpeechForConditionalGeneration.from_pretrained(folder, torch_dtype=dtype, device_map=self.device)
        self.model, self.tokenizer = door.loaded(model), self.processor.tokenizer

    def run(self) -> list[list[str]]:
        """Question and answer of each clip."""
        turns = []
        for number in CLIPS:
            question = self.question(clip(number))
            turns.append([question, self.answer(question)])
        return turns

    def question(self, audio: np.ndarray) -> str:
        prompt = self.prompt({"role": "system", "content": SYSTEM}, {"role": "user", "content": INSTRUCTION})
        return self.generated(self.processor(prompt, audio, device=self.device, return_tensors="pt").to(self.device))

    def answer(self, question: str) -> str:
        return self.generated(self.tokenizer(self.prompt({"role": "user", "content": question}), return_tensors="pt").to(self.device))

    def prompt(self, *chat: dict[str, str]) -> str:
        return self.tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False)

    def generated(self, inputs: Any) -> str:
        ids = self.model.generate(**inputs, max_new_tokens=200)
        new = ids[:, inputs["input_ids"].shape[-1] :]
        return self.tokenizer.batch_decode(new, add_special_tokens=False, skip_special_tokens=True)[0]


@cache
def reference(dtype: torch.dtype) -> list[list[str]]:
    return Notebook(Door("transformers"), dtype).run()


@pytest.mark.parametrize("door", DOORS[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_questions_and_answers_are_those_of_transformers(door: str, dtype: torch.dtype):
    turns = Notebook(Door(door), dtype).run()
    assert turns == reference(dtype)
    assert turns[0][0].strip() == WORDS


def test_the_adapter_changes_both_passes():
    """Otherwise the test above would not notice how it is switched."""
    notebook, (question, answer) = Notebook(Door("import changed"), torch.float32), reference(torch.float32)[0]
    notebook.model.disable_adapters()
    assert notebook.question(clip(CLIPS[0])) != question
    notebook.model.enable_adapters()
    notebook.model.merge_adapter()  # on for text, too
    assert notebook.answer(question) != answer
