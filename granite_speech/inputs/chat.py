"""Messages to prompts: what the `apply_chat_template` of the tokenizer and of the processor have in common."""

import copy
import re
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from granite_speech.errors import InputError, UnsupportedError
from granite_speech.inputs.chat_template import render_chat_template, render_with_spans
from granite_speech.inputs.tool_schema import tool_schemas

__all__ = ["Prompts", "audio_of", "message_ids", "refuse_sanitizing", "render_conversations", "select_template", "text_masks"]

# How a template reads the parts of a message's content. One without any of these takes text only.
_READS_PARTS = re.compile(r"""\[\s*['"](?:type|text)['"]\s*\]|\.(?:type|text)\b|\(\s*['"](?:type|text)['"]""")


class Prompts(NamedTuple):
    """Rendered conversations.

    Attributes:
        texts: one for each conversation.
        spans: for each, the ranges of characters inside {% generation %} blocks; empty unless asked for.
        batched: whether several conversations were given, not one.
    """

    texts: list[str]
    spans: list[list[tuple[int, int]]]
    batched: bool


def refuse_sanitizing(wanted: bool) -> None:
    """Raise UnsupportedError if a call wants special tokens in its messages encoded as plain text, as transformers 5.23 can."""
    if wanted:
        raise UnsupportedError(
            got="sanitize_control_tokens=True",
            expected="False: special tokens in a message are special tokens in the prompt",
            remedy="Remove them from messages that you do not trust",
        )


def select_template(own: str | Mapping[str, str] | None, chat_template: str | None, tools: Any = None) -> str:
    """The template that a call uses.

    Args:
        own: the template, or several by name.
        chat_template: a template or the name of one of those; None for "tool_use" if there are tools, otherwise "default".
        tools: the call's.

    Raises:
        InputError: there is none.
    """
    if isinstance(own, Mapping):
        name = chat_template or ("tool_use" if tools and "tool_use" in own else "default")
        if name in own:
            return own[name]
    if chat_template is None and isinstance(own, str):
        return own
    if chat_template is None:
        known = f"only templates {sorted(own)}" if own else "no chat template"
        raise InputError(got=known, expected="one to use", remedy="Pass chat_template, or add chat_template.jinja to the folder")
    return chat_template


def render_conversations(
    conversation: Any,
    template: str,
    names: Mapping[str, Any],
    *,
    audio_token: str,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    with_spans: bool = False,
) -> Prompts:
    """Renders one conversation, or several.

    A content that is a list of parts is given to the template as it is. If the template takes text only, the parts are joined, with
    `audio_token` for each clip.

    Args:
        conversation: messages with "role" and "content"; or a list of conversations.
        template: Jinja.
        names: more names for the template.
        audio_token: the placeholder of a clip.
        tools, documents, add_generation_prompt: passed to the template; functions in tools as their schemas.
        continue_final_message: end with the last message's content, or with its field of this name, so that the model continues it.
        with_spans: whether to find the {% generation %} blocks.

    Raises:
        InputError: no messages, messages that are not dictionaries, options that exclude each other, or a template that fails.
        UnsupportedError: a part that is neither text nor audio, for a template that takes text only.
    """
    if continue_final_message and (add_generation_prompt or with_spans):
        other = "add_generation_prompt" if add_generation_prompt else "return_assistant_tokens_mask"
        raise InputError(got=f"continue_final_message with {other}", expected="one of them", remedy="Omit one")
    if any(not isinstance(one, dict) for one in documents or ()):
        raise InputError(got="a document that is not a dictionary", expected='{"title": …, "text": …}', remedy="Pass dictionaries")
    if with_spans and not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        warnings.warn(
            "return_assistant_tokens_mask: the chat template has no {% generation %} block, so no token is marked.",
            UserWarning,
            stacklevel=3,
        )
    chats, batched = _conversations(conversation)
    names = {"tools": tool_schemas(tools), "documents": documents, "add_generation_prompt": add_generation_prompt, **names}
    texts, spans = [], []
    for chat in chats:
        if not _READS_PARTS.search(template):
            chat = [_as_text(message, audio_token) for message in chat]
        if continue_final_message:
            field = continue_final_message if isinstance(continue_final_message, str) else "content"
            text, found = _render_open(template, chat, field, names), []
        elif with_spans:
            text, found = render_with_spans(template, messages=chat, **names)
        else:
            text, found = render_chat_template(template, messages=chat, **names), []
        texts.append(text)
        spans.append(found)
    return Prompts(texts, spans, batched)


def _conversations(conversation: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    given = getattr(conversation, "messages", conversation)
    if not isinstance(given, list | tuple) or not given:
        got = f"messages of type {type(given).__name__}" if not isinstance(given, list | tuple) else "no messages"
        raise InputError(got=got, expected="at least one, in a list", remedy="Pass a list of {'role': …, 'content': …}")
    batched = isinstance(given[0], list | tuple) or hasattr(given[0], "messages")
    chats = [list(getattr(one, "messages", one)) for one in given] if batched else [list(given)]
    for chat in chats:
        if not chat or not all(isinstance(message, Mapping) for message in chat):
            wrong = next((type(message).__name__ for message in chat if not isinstance(message, Mapping)), "nothing")
            raise InputError(
                got=f"a conversation that holds {wrong}", expected="dictionaries", remedy="Pass a list of {'role': …, 'content': …}"
            )
    return chats, batched


def _as_text(message: Mapping[str, Any], audio_token: str) -> Mapping[str, Any]:
    """The message with its parts joined."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    return {**message, "content": "".join(_part_as_text(part, audio_token) for part in content)}


def _part_as_text(part: Any, audio_token: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else type(part).__name__
    if kind == "audio":
        return audio_token
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise UnsupportedError(
        got=f"a part of a message of type {kind!r:.40}",
        expected="text, or audio",
        remedy='Pass {"type": "text", "text": …} or {"type": "audio", "audio": …}',
    )


def _render_open(template: str, chat: list[Mapping[str, Any]], field: str, names: Mapping[str, Any]) -> str:
    """The prompt up to the end of the last message's `field`."""
    mark = f"<{secrets.token_hex(8)}>"
    chat = [*chat[:-1], dict(chat[-1])]
    content = chat[-1].get(field)
    if isinstance(content, list | tuple):
        parts = [copy.copy(part) for part in content]
        last = next((part for part in reversed(parts) if isinstance(part, dict) and isinstance(part.get("text"), str)), None)
        if last is not None:
            # The space after the mark is missing from the prompt if the template strips what it is given.
            last["text"] += f"{mark} "
        chat[-1][field] = parts
    elif isinstance(content, str):
        last = chat[-1]
        last[field] = f"{content}{mark} "
    else:
        last = None
    prompt = render_chat_template(template, messages=chat, **names)
    text, found, rest = prompt.rpartition(mark)
    if last is None or not found:
        raise InputError(
            got=f"a final message whose {field!r} {'is no text' if last is None else 'is not in the prompt'}",
            expected="text that the chat template writes as it is",
            remedy="Omit continue_final_message, or pass another chat_template",
        )
    return text if rest.startswith(" ") else text.rstrip()


def audio_of(conversation: Any) -> list[Any]:
    """The recordings in the messages, in order: the "audio", "url" or "path" of each part of type "audio"."""
    chats, _ = _conversations(conversation)
    contents = [message.get("content") for chat in chats for message in chat]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content if isinstance(part, Mapping)]
    return [part[key] for part in parts if part.get("type") == "audio" for key in ("audio", "url", "path") if part.get(key) is not None]


def text_masks(encodings: Sequence[Any], spans: list[list[tuple[int, int]]]) -> list[list[int]]:
    """For each text a list with 1 for tokens inside a span, 0 for others.

    Args:
        encodings: of the texts.
        spans: ranges of characters, for each text.
    """
    masks = []
    for encoding, ranges in zip(encodings, spans, strict=True):
        inside = [any(begin < end and begin < stop and end > start for start, stop in ranges) for begin, end in encoding.offsets]
        masks.append(list(map(int, inside)))
    return masks


def message_ids(encode: Callable[..., list[int]], message: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids that a message adds to those of the conversation before it."""
    if not history:
        return encode([message])
    before, after = encode(list(history)), encode([*history, message])
    same = next(
        (place for place, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), min(len(before), len(after))
    )
    return after[same:]
