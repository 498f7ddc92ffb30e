"""The tokens that a tokenizer knows: their ids, and which of them have a role such as the end of the text."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from granite_speech.errors import InputError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["ROLES", "Vocabulary", "named_roles"]

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")  # the name in transformers 5 and the one in 4


class Vocabulary:
    """Tokens, ids and roles.

    Every role is an attribute, as is its id: `pad_token` and `pad_token_id`, None for a role without a token. Either can be assigned.

    Args:
        backend: the `tokenizers.Tokenizer`. Tokens of roles that it lacks are added.
        config: contents of tokenizer_config.json: `*_token` entries, and lists of further special tokens.

    Attributes:
        special_tokens: role → token, of roles that have one.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", config: Mapping[str, Any]):
        roles = named_roles(config)
        # First, because other attributes are compared with the roles' names.
        object.__setattr__(self, "special_tokens", roles)
        object.__setattr__(self, "_roles", dict.fromkeys((*ROLES, *roles)))
        self.backend = backend
        entries = next((config[name] for name in _EXTRA if isinstance(config.get(name), list | tuple)), [])
        self._extra: list[str] = [_content(one) for one in entries]
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        backend.add_special_tokens([token for token in (*roles.values(), *self._extra) if token not in special])

    def __getattr__(self, name: str) -> Any:
        role = name.removesuffix("_id")
        if role in self.__dict__.get("_roles", ()):
            token = self.special_tokens.get(role)
            return token if role == name or token is None else self.convert_tokens_to_ids(token)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        role = name.removesuffix("_id")
        if role not in self._roles:
            object.__setattr__(self, name, value)
        elif role == name:
            self._assign(role, value)
        else:
            self._assign(role, None if value is None else self._token_of(name, value))

    def _assign(self, role: str, token: Any) -> None:
        if token is None:
            self.special_tokens.pop(role, None)
            return
        if not isinstance(token, str) and not hasattr(token, "content"):
            raise InputError(
                got=f"{role} = {token!r:.100}", expected="a token, as text", remedy=f"Assign a string, or assign an id to {role}_id"
            )
        token = _content(token)
        self.special_tokens[role] = token
        if self.backend.token_to_id(token) is None:
            warnings.warn(
                f"{role} = {token!r} is not in the vocabulary, so {role}_id is that of the unknown token, {self.unk_token_id}. "
                f"To add it: tokenizer.add_special_tokens({{{role!r}: {token!r}}}).",
                UserWarning,
                stacklevel=4,
            )

    def _token_of(self, name: str, index: Any) -> str:
        token = self.convert_ids_to_tokens(index) if isinstance(index, int) and not isinstance(index, bool) else None
        if token is None:
            raise InputError(
                got=f"{name} = {index!r:.100}", expected=f"an id from 0 to {len(self) - 1}", remedy="Assign the id of a token that exists"
            )
        return token

    # --- special tokens -----------------------------------------------------------------------------------------------------------------

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Role → token, of roles that have one."""
        return {role: self.special_tokens[role] for role in self._roles if role in self.special_tokens}

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens of roles and the further special tokens, each once. The vocabulary may mark more tokens as special."""
        return list(dict.fromkeys((*self.special_tokens_map.values(), *self._extra)))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    @property
    def extra_special_tokens(self) -> list[str]:
        """Special tokens without a role. Can be assigned; their ids are `extra_special_tokens_ids`."""
        return list(self._extra)

    @extra_special_tokens.setter
    def extra_special_tokens(self, tokens: Sequence[Any] | None) -> None:
        self._extra = [_content(one) for one in _listed("extra_special_tokens", tokens or [])]

    @property
    def extra_special_tokens_ids(self) -> list[int]:
        """The ids of `extra_special_tokens`."""
        return self.convert_tokens_to_ids(self._extra)

    # The names in transformers 4.
    additional_special_tokens = extra_special_tokens
    additional_special_tokens_ids = extra_special_tokens_ids

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True) -> int:
        """Gives roles to tokens, and adds those that the vocabulary lacks. Then call the model's `resize_token_embeddings(len(tokenizer))`.

        Args:
            special_tokens_dict: role → token, such as {"pad_token": "<pad>"}; and "extra_special_tokens" (or "additional_special_tokens"),
                a list. A token is a string or a `tokenizers.AddedToken`.
            replace_extra_special_tokens: whether the list replaces the earlier one.

        Returns:
            How many tokens were added.

        Raises:
            InputError: an unknown role, or a token of another type.
        """
        given, tokens = dict(special_tokens_dict), []
        if _EXTRA[1] in given:
            given.setdefault(_EXTRA[0], given.pop(_EXTRA[1]))  # last, as in transformers, which decides the ids
        for name, value in given.items():
            if name == _EXTRA[0]:
                values = _listed(name, value)
                before = [] if replace_extra_special_tokens and values else self._extra
                self._extra = list(dict.fromkeys((*before, *map(_content, values))))
                tokens += values
            elif name in self._roles:
                tokens += _listed(name, [value])
            else:
                raise InputError(
                    got=f"the role {name!r}",
                    expected=f"one of {', '.join((*self._roles, _EXTRA[0]))}",
                    remedy=f"Pass tokens without a role as {_EXTRA[0]}",
                )
        added = self.backend.add_special_tokens([_added(token) for token in tokens])
        for name, value in given.items():
            if name in self._roles:
                self._assign(name, value)
        return added

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens to the vocabulary, except those that it has.

        Args:
            new_tokens: one or several, strings or `tokenizers.AddedToken`.
            special_tokens: whether decoding with skip_special_tokens leaves them out.

        Returns:
            How many were added.
        """
        tokens = _listed("new_tokens", new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens] if new_tokens else [])
        return self.backend.add_special_tokens(tokens) if special_tokens else self.backend.add_tokens(tokens)

    def get_special_tokens_mask(
        self, token_ids_0: Iterable[int], token_ids_1: Iterable[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each id of `all_special_ids`, 0 for others.

        Raises:
            InputError: two texts, or already_has_special_tokens=False. As in transformers, only a finished prompt can be marked.
        """
        if not already_has_special_tokens or token_ids_1 is not None:
            raise InputError(
                got="ids without their special tokens" if token_ids_1 is None else "the ids of two texts",
                expected="the ids of one finished prompt, with already_has_special_tokens=True",
                remedy="Call the tokenizer with return_special_tokens_mask=True",
            )
        special = set(self.all_special_ids)
        return [int(int(index) in special) for index in token_ids_0]

    # --- all tokens ---------------------------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens; `len` includes them."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """Token → id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        """See `get_vocab`."""
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> "dict[int, tokenizers.AddedToken]":
        """Id → added token, in the order of ids."""
        return dict(sorted(self.backend.get_added_tokens_decoder().items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Added token → id, in the order of ids."""
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """Added token → id, in the order of ids."""
        return self.added_tokens_encoder

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """The id of a token, or of each. Outside the vocabulary it is the unknown token's id, or None if there is no such token."""
        if isinstance(tokens, str):
            index = self.backend.token_to_id(tokens)
            if index is None and "unk_token" in self.special_tokens:
                index = self.backend.token_to_id(self.special_tokens["unk_token"])
            return index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> str | list[str | None] | None:
        """The token of an id, or of each, in a list, array or tensor; None outside the vocabulary.

        skip_special_tokens leaves out `all_special_tokens` of several ids.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(ids, int):
            return self.backend.id_to_token(ids) if ids >= 0 else None
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self.convert_ids_to_tokens(int(index)) for index in ids if int(index) not in skipped]


def named_roles(config: Mapping[str, Any]) -> dict[str, str]:
    """Roles and their tokens. An entry is a string or the description of an added token."""
    extra = config.get("extra_special_tokens")
    entries = {name: value for name, value in config.items() if name.endswith("_token")} | (extra if isinstance(extra, dict) else {})
    tokens = {name: _content(value) for name, value in entries.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def _content(token: Any) -> Any:
    """The text of a token given as a string, an AddedToken or a description of one."""
    return token.get("content") if isinstance(token, dict) else getattr(token, "content", token)


def _listed(name: str, tokens: Any) -> list[Any]:
    if not isinstance(tokens, list | tuple) or not all(isinstance(_content(one), str) and not isinstance(one, dict) for one in tokens):
        raise InputError(
            got=f"{name} = {tokens!r:.100}", expected="tokens, as text or tokenizers.AddedToken", remedy="Pass strings, several in a list"
        )
    return list(tokens)


def _added(token: Any) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, special=True, normalized=False) if isinstance(token, str) else token
