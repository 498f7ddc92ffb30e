"""TurboCTC's tokenizer: text for labels, and the text of what the model hears at each frame.

The counterpart of transformers' `ParakeetTokenizer`, to which transformers maps this model family.
"""

from itertools import groupby
from typing import Any, ClassVar

from granite_speech.inputs.coding import plain_ids
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer

__all__ = ["GraniteSpeech5Tokenizer"]


class GraniteSpeech5Tokenizer(GraniteSpeechTokenizer):
    """A tokenizer whose `decode` takes one id per frame, as CTC gives them. Its pad token is the blank.

    Reads the files of any fast tokenizer, whichever class `tokenizer_config.json` names, and writes that class as `ParakeetTokenizer`.
    """

    # With any other, transformers would write repeated ids as repeated text.
    written_class: ClassVar[str] = "ParakeetTokenizer"

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        group_tokens: bool = True,
        **options: Any,
    ) -> str | list[str]:
        """The text of ids `(frames,)`, in a list, array or tensor; a list of texts for `(clips, frames)`.

        Equal neighbors are one token, then blanks are dropped. Ids outside the vocabulary are skipped.

        Args:
            token_ids: the ids.
            skip_special_tokens: leave out the tokens that tokenizer.json marks as special.
            clean_up_tokenization_spaces: remove spaces before punctuation; None for the tokenizer's own setting. It has no effect
                on BPE, as in transformers.
            group_tokens: whether equal neighbors are one token. False for labels, in which a token can follow itself.
            options: as in `GraniteSpeechTokenizer.decode`.

        Raises:
            InputError: a value that is not an id, or is negative; an unknown option.
        """
        ids = plain_ids(token_ids)
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            ids = [self._without_blanks(row, group_tokens) for row in ids]
        else:
            ids = self._without_blanks([ids] if isinstance(ids, int) else ids, group_tokens)
        return super().decode(ids, skip_special_tokens, clean_up_tokenization_spaces, **options)

    def _without_blanks(self, ids: Any, group_tokens: bool) -> Any:
        if not isinstance(ids, list):
            return ids  # refused by what decodes it
        blank = self.pad_token_id
        return [one for one in ([first for first, _ in groupby(ids)] if group_tokens else ids) if one != blank]
