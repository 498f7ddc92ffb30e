"""Token ids that the language model trains on: a request and its answer."""

from functools import cache

from granite_speech.config import GraniteSpeechConfig
from granite_speech.errors import ConfigError, InputError
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.requests import transcript_request

__all__ = ["Dialogue"]


class Dialogue:
    """Tokenizes requests and answers as they are tokenized at inference.

    Request and answer are tokenized separately, because `generate` continues a request that was tokenized on its own. The answer is
    written as the chat template writes an assistant's turn, up to the token that ends it.

    Args:
        processor: supplies the tokenizer, the chat template and the audio token.
        config: supplies the model's type, the audio token's id, the tokens that end an answer and the size of the CTC vocabulary.

    Raises:
        ConfigError: processor and config do not match, or no token ends an answer.
    """

    def __init__(self, processor: GraniteSpeechProcessor, config: GraniteSpeechConfig):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.audio_token, self.model_type = config.audio_token_index, config.model_type
        self.ctc_size = config.encoder_config.output_dim
        self.window, self.queries = config.window_size, config.window_size // config.downsample_rate
        ends = config.text_config.eos_token_id
        self.ends = [one for one in (ends if isinstance(ends, list) else [ends]) if one is not None and one >= 0]
        found = self.tokenizer.convert_tokens_to_ids(processor.audio_token)
        if found != self.audio_token or not self.ends:
            got = f"eos_token_id = {ends!r}" if found == self.audio_token else f"{processor.audio_token} with id {found} in the tokenizer"
            expected = "a token that ends an answer" if found == self.audio_token else f"audio_token_index = {self.audio_token}"
            raise ConfigError(got=got, expected=expected, remedy="Use the processor of this checkpoint, or correct config.json")
        self._special = frozenset(index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        # Most manifests have the same prompt for every clip.
        self._request_ids = cache(self._tokenize_request)
        self._answer_ids = cache(self._tokenize_answer)

    def request(self, prompt: str | None, frames: int) -> list[int]:
        """Ids of a request about one clip of `frames` encoder frames, with one audio token per audio vector.

        Raises:
            InputError: the prompt contains the audio placeholder.
        """
        ids = self._request_ids(prompt, True)
        place = ids.index(self.audio_token)
        return [*ids[:place], *[self.audio_token] * self.audio_tokens(frames), *ids[place + 1 :]]

    def audio_tokens(self, frames: int) -> int:
        """Number of audio vectors that `frames` encoder frames become."""
        return -(-frames // self.window) * self.queries

    def text_request(self, prompt: str) -> list[int]:
        """Ids of a request without audio.

        Raises:
            InputError: the prompt contains the audio placeholder.
        """
        return self._request_ids(prompt, False)

    def _tokenize_request(self, prompt: str | None, audio: bool) -> list[int]:
        if self.processor.audio_token in (prompt or ""):
            raise InputError(
                got=f"the prompt {prompt!r:.100}",
                expected=f"one without {self.processor.audio_token}" + (", which is added before it" if audio else ""),
                remedy="Remove it",
            )
        if audio:
            return self.tokenizer.encode(transcript_request(self.processor, prompt, self.model_type))
        if not self.processor.chat_template:
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode(self.processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True))

    def answer(self, text: str) -> list[int]:
        """Ids of an answer, including the token that ends it.

        Raises:
            InputError: the text contains a special token.
        """
        return list(self._answer_ids(text))

    def _tokenize_answer(self, text: str) -> list[int]:
        if any(one in self._special for one in self.tokenizer.encode(text, add_special_tokens=False)):
            raise InputError(
                got=f"the text {text!r:.100}, which contains a special token", expected="only words", remedy="Remove the token"
            )
        ids = self.tokenizer.encode(self._answer_turn(text), add_special_tokens=False)
        end = next((place for place, one in enumerate(ids) if one in self.ends), None)
        return [*ids, self.ends[0]] if end is None else ids[: end + 1]

    def _answer_turn(self, text: str) -> str:
        """The text as the template writes it after the generation prompt."""
        if not self.processor.chat_template:
            return text
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": text}
        request = self.processor.apply_chat_template([question], add_generation_prompt=True)
        whole = self.processor.apply_chat_template([question, answer])
        # A template may not start an assistant's turn the way it prompts for one. Then use the text itself.
        return whole.removeprefix(request) if whole.startswith(request) else text

    def characters(self, text: str) -> list[int]:
        """The text as labels of the CTC head: code points, with 0 as the blank.

        Raises:
            InputError: a character for which the head has no output.
        """
        for one in text:
            if not 0 < ord(one) < self.ctc_size:
                raise InputError(
                    got=f"the text {text!r:.100} with {one!r}, code point {ord(one)}",
                    expected=f"code points from 1 to {self.ctc_size - 1}, the outputs of the encoder's CTC head",
                    remedy="Replace the character, or train without the CTC loss",
                )
        return [ord(one) for one in text]
