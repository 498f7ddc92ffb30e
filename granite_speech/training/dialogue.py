"""What the language model reads while it trains: the request that it will be asked, and the answer that it is to give, as token ids."""

from functools import cache

from granite_speech.config import GraniteSpeechConfig
from granite_speech.errors import ConfigError, InputError
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.transcription.transcriber import transcript_request

__all__ = ["Dialogue"]


class Dialogue:
    """Requests and answers of one checkpoint, tokenised as they are when it is used.

    Request and answer are tokenised apart, because `generate` begins behind a request that was tokenised alone. The answer is written
    as the chat template writes an assistant's turn, up to the token that ends it.

    Args:
        processor: tokenizer, template and audio token.
        config: of the model: the audio token's id, the token that ends an answer, the size of the CTC vocabulary.

    Raises:
        ConfigError: the two do not belong together, or no token ends an answer.
    """

    def __init__(self, processor: GraniteSpeechProcessor, config: GraniteSpeechConfig):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.audio_token = config.audio_token_index
        self.ctc_size = config.encoder_config.output_dim
        self.window, self.queries = config.window_size, config.window_size // config.downsample_rate
        ends = config.text_config.eos_token_id
        self.ends = [one for one in (ends if isinstance(ends, list) else [ends]) if one is not None and one >= 0]
        found = self.tokenizer.convert_tokens_to_ids(processor.audio_token)
        if found != self.audio_token or not self.ends:
            got = f"eos_token_id = {ends!r}" if found == self.audio_token else f"{processor.audio_token} with id {found} in the tokenizer"
            expected = "a token that ends an answer" if found == self.audio_token else f"audio_token_index = {self.audio_token}"
            raise ConfigError(got=got, expected=expected, remedy="Use the processor of this checkpoint, or correct config.json")
        self._special = frozenset(self.tokenizer.all_special_ids)
        # Cached, because most manifests ask the same of every clip.
        self._request_ids = cache(self._tokenise_request)
        self._answer_ids = cache(self._tokenise_answer)

    def request(self, prompt: str | None, frames: int) -> list[int]:
        """Ids of a request about one clip of so many encoder frames: as many audio tokens as it has audio vectors.

        Raises:
            InputError: a prompt with a placeholder of its own.
        """
        ids = self._request_ids(prompt, True)
        place = ids.index(self.audio_token)
        return [*ids[:place], *[self.audio_token] * self.audio_tokens(frames), *ids[place + 1 :]]

    def audio_tokens(self, frames: int) -> int:
        """Audio vectors that a clip of so many encoder frames becomes."""
        return -(-frames // self.window) * self.queries

    def text_request(self, prompt: str) -> list[int]:
        """Ids of a request without audio.

        Raises:
            InputError: a prompt with the audio's placeholder.
        """
        return self._request_ids(prompt, False)

    def _tokenise_request(self, prompt: str | None, audio: bool) -> list[int]:
        if self.processor.audio_token in (prompt or ""):
            raise InputError(
                got=f"the prompt {prompt!r:.100}",
                expected=f"one without {self.processor.audio_token}" + (", which is put in front of it" if audio else ""),
                remedy="Take it out",
            )
        if audio:
            return self.tokenizer.encode(transcript_request(self.processor, prompt))
        if not self.processor.chat_template:
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode(self.processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True))

    def answer(self, text: str) -> list[int]:
        """Ids of an answer, the last of which ends it.

        Raises:
            InputError: a text in which a special token is written out.
        """
        return list(self._answer_ids(text))

    def _tokenise_answer(self, text: str) -> list[int]:
        if any(one in self._special for one in self.tokenizer.encode(text, add_special_tokens=False)):
            raise InputError(
                got=f"the text {text!r:.100}, in which a special token is written out", expected="words alone", remedy="Take it out"
            )
        ids = self.tokenizer.encode(self._answer_turn(text), add_special_tokens=False)
        end = next((place for place, one in enumerate(ids) if one in self.ends), None)
        return [*ids, self.ends[0]] if end is None else ids[: end + 1]

    def _answer_turn(self, text: str) -> str:
        """The text as the template writes it behind what it puts there for the model to go on from."""
        if not self.processor.chat_template:
            return text
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": text}
        request = self.processor.apply_chat_template([question], add_generation_prompt=True)
        whole = self.processor.apply_chat_template([question, answer])
        # A template may write an assistant's turn otherwise than it prompts for one; then the text is what there is.
        return whole.removeprefix(request) if whole.startswith(request) else text

    def characters(self, text: str) -> list[int]:
        """The text as labels of the CTC head: a character's id is its code point, and 0 is the blank.

        Raises:
            InputError: a character that the head has no output for.
        """
        for one in text:
            if not 0 < ord(one) < self.ctc_size:
                raise InputError(
                    got=f"the text {text!r:.100} with {one!r}, code point {ord(one)}",
                    expected=f"characters from 1 to {self.ctc_size - 1}, which the encoder's CTC head has outputs for",
                    remedy="Write it with others, or train without the CTC loss",
                )
        return [ord(one) for one in text]
