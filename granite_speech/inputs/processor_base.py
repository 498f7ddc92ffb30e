"""What the processors of both model families have: a feature extractor and a tokenizer, decoding, and files."""

import json
from pathlib import Path
from typing import Any, ClassVar

from granite_speech.checkpoints.call_options import hub_options
from granite_speech.checkpoints.folder import resolve
from granite_speech.checkpoints.upload import PushToHub, saving
from granite_speech.errors import InputError
from granite_speech.inputs.chat_template import write_chat_template
from granite_speech.inputs.extractor import Extractor
from granite_speech.inputs.processor_files import EXTRACTOR, PROCESSOR, read_configuration, write_json
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer

__all__ = ["ProcessorBase"]


class ProcessorBase(PushToHub):
    """Base of the processors."""

    extractor_class: ClassVar[type[Extractor]]
    tokenizer_class: ClassVar[type[GraniteSpeechTokenizer]]
    attributes: ClassVar[tuple[str, str]]  # the names of the feature extractor and the tokenizer
    tokenizer: GraniteSpeechTokenizer
    chat_template: str | dict[str, str] | None

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> str | list[str]:
        """See `GraniteSpeechTokenizer.decode`."""
        return self.tokenizer.decode(token_ids, skip_special_tokens, **options)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """See `GraniteSpeechTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens, **options)

    def post_process_multimodal_output(
        self, generated_outputs: Any, skip_special_tokens: bool = True, generation_mode: str | None = None, **options: Any
    ) -> str | list[str]:
        """The text of what `generate` returned. generation_mode is "text" or None; options are of `decode`."""
        if generation_mode not in (None, "text"):
            raise InputError(got=f"generation_mode={generation_mode!r:.40}", expected="'text', which the model writes", remedy="Omit it")
        return self.decode(generated_outputs, skip_special_tokens, **options)

    # --- files --------------------------------------------------------------------------------------------------------------------------

    @classmethod
    def _load(cls, name_or_path: str | Path, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        """The parts of a folder or hub id, changed by the options of a `from_pretrained`, and the contents of processor_config.json."""
        settings = cls.tokenizer_class.pop_settings(options)
        changes = {name: options.pop(name) for name in cls.extractor_class.SETTINGS if name in options}
        folder = resolve(name_or_path, **hub_options(options, f"{cls.__name__}.from_pretrained"))
        entries, config = read_configuration(folder)
        extractor = cls.extractor_class.from_dict(entries, **changes)
        tokenizer = cls.tokenizer_class.from_folder(folder, **settings, name_or_path=str(name_or_path))
        return extractor, tokenizer, config

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contents of processor_config.json with the feature extractor's entries, and an empty dictionary: no option is left over."""
        folder = resolve(pretrained_model_name_or_path, **hub_options(options, f"{cls.__name__}.get_processor_dict"))
        entries, config = read_configuration(folder)
        return {**config, cls.attributes[0]: entries}, {}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> list[str]:
        """Writes processor_config.json (5.x), preprocessor_config.json (4.x), the tokenizer's files and the chat template.

        Args:
            save_directory: created if missing.
            push_to_hub: also upload the files.
            options: of the upload: repo_id, commit_message, private, token …

        Returns:
            The path of processor_config.json, in a list.
        """
        with saving(save_directory, f"{type(self).__name__}.save_pretrained", push_to_hub=push_to_hub, options=options) as folder:
            self.tokenizer.save_pretrained(folder)
            write_chat_template(folder, self.chat_template)
            self.to_json_file(folder / PROCESSOR)
            write_json(folder / EXTRACTOR, {**getattr(self, self.attributes[0]).to_dict(), "processor_class": type(self).__name__})
        return [str(folder / PROCESSOR)]

    def to_dict(self) -> dict[str, Any]:
        """The contents of processor_config.json."""
        name = self.attributes[0]
        return {"processor_class": type(self).__name__, name: getattr(self, name).to_dict()}

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Writes processor_config.json under any name."""
        write_json(Path(json_file_path), self.to_dict())

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Names of the parts."""
        return list(cls.attributes)

    def __repr__(self) -> str:
        parts = "".join(f"- {name}: {getattr(self, name)!r}\n" for name in self.attributes)
        return f"{type(self).__name__}:\n{parts}\n{self.to_json_string()}"
