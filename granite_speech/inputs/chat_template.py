"""Chat templates: Jinja from a checkpoint, rendered in a sandbox that bounds what a template can build; their files."""

import json
import re
from collections.abc import Iterator
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from granite_speech.checkpoints.folder import load_json
from granite_speech.errors import CheckpointError, InputError, MissingDependencyError

__all__ = ["LONGEST_PROMPT", "read_chat_template", "render_chat_template", "write_chat_template", "write_text"]

# A prompt of a few million characters fills any context window many times over; a template that writes more is stuck.
LONGEST_PROMPT = 1 << 22
# Filters whose result can be larger than what they are given.
WATCHED_FILTERS = ("batch", "center", "format", "indent", "join", "replace", "slice", "tojson", "wordwrap")


def render_chat_template(template: str, **names) -> str:
    """Renders a Jinja chat template in a sandbox, with the names and filters that transformers gives one.

    A template comes with a checkpoint, from whoever made it: it can reach neither attributes of Python objects nor the
    arguments' own lists, each string and list it builds is bounded in size, and it is stopped when its output passes LONGEST_PROMPT
    characters.

    Raises:
        InputError: the template is wrong, raises, or writes too much.
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(got="no jinja2", expected="jinja2, for chat templates", remedy="pip install jinja2") from error
    parts, length = [], 0
    try:
        for part in _compiled(template).generate(**names):
            parts.append(part)
            length += len(part)
            if length > LONGEST_PROMPT:
                raise InputError(
                    got=f"a chat template that wrote more than {LONGEST_PROMPT} characters",
                    expected="a prompt",
                    remedy="Shorten the messages, or pass another chat_template",
                )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            got=f"a chat template that failed ({type(error).__name__}: {error})",
            expected="messages that fit the template",
            remedy="Check roles and contents, or pass another chat_template",
        ) from error
    return "".join(parts)


@lru_cache(maxsize=16)
def _compiled(template: str):
    from datetime import datetime

    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks the assistant's words for training; here it is just its contents."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def bounded(size: int, what: str) -> None:
        if size > LONGEST_PROMPT:
            raise SecurityError(f"{what} with a result of size {size}")

    def gathered(value):
        """An iterator's items in a list, to be looked at before they are used up; other values as they are."""
        if not isinstance(value, Iterator):
            return value
        items, size = [], 0
        for item in value:
            items.append(item)
            size += len(item) if isinstance(item, str | list | tuple) else 1
            bounded(size, "a sequence")
        return items

    def joined(parts) -> str:
        parts = list(map(str, parts))
        bounded(sum(map(len, parts)), "joined text")
        return "".join(parts)

    class JoinAsFilter(NodeTransformer):
        """Compiled Jinja joins `a ~ b` by itself; a filter is something that can be watched."""

        def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802 (the name Jinja looks for)
            node = self.generic_visit(node)
            return nodes.Filter(nodes.List(node.nodes), "joined", [], [], None, None).set_lineno(node.lineno)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "+", "%"})
        concat = staticmethod(joined)  # of blocks: {% set x %} … {% endset %}, macros

        def _parse(self, *source):
            return JoinAsFilter().visit(super()._parse(*source)).set_environment(self)

        def call_binop(self, context, operator, left, right):
            if operator == "%" and isinstance(left, str):
                bounded(_built_size("%", left, right if isinstance(right, tuple) else (right,)), operator)
            elif operator == "+" and isinstance(left, str | list | tuple):
                bounded(len(left) + len(right), operator)
            elif operator in ("*", "**"):
                sizes = [len(operand) if isinstance(operand, str | list | tuple) else abs(operand) for operand in (left, right)]
                bounded(sizes[0] * sizes[1], operator)
            return super().call_binop(context, operator, left, right)

        def call(self, context, function, *args, **kwargs):
            method = getattr(function, "__wrapped__", function)  # Jinja has a wrapper around str.format
            text = getattr(method, "__self__", None)
            if isinstance(text, str):
                args = tuple(map(gathered, args))
                bounded(_built_size(method.__name__, text, (*args, *kwargs.values())), method.__name__)
            return super().call(context, function, *args, **kwargs)

    def watched(name: str, function):
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, or the environment

        @wraps(function)
        def call(*args, **kwargs):
            value, *rest = args[skipped:]
            value = gathered(value)
            bounded(_built_size(name, value, (*rest, *kwargs.values())), name)
            return function(*args[:skipped], value, *rest, **kwargs)

        return call

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters |= {"tojson": tojson, "joined": joined}
    environment.filters |= {name: watched(name, environment.filters[name]) for name in WATCHED_FILTERS}
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _built_size(name: str, value: Any, arguments: tuple) -> int:
    """How large, at most, the result of a string method, a filter or `%` can be; 0 for those that cannot outgrow their input."""
    text = value if isinstance(value, str) else ""
    number = max((abs(one) for one in arguments if isinstance(one, int)), default=0)
    texts = [one if isinstance(one, str) else str(one) for one in arguments]
    match name:
        case "ljust" | "rjust" | "center" | "zfill" | "slice" | "batch" | "wordwrap":
            return max(len(text), number)
        case "expandtabs":
            return len(text) + text.count("\t") * number
        case "indent":
            return len(text) + (text.count("\n") + 1) * max(number, *map(len, texts), 0)
        case "tojson":
            return number << 16  # an indent of 64 will do
        case "replace":
            old, new = (*texts, "", "")[:2]
            return len(text) + (text.count(old) if old else len(text) + 1) * len(new)
        case "join":  # a list by a separator as a filter, a separator and a list as a method
            parts, separator = (arguments[0], text) if isinstance(value, str) and arguments else (value, "".join(texts[:1]))
            parts = list(parts) if isinstance(parts, list | tuple | str) else []
            return sum(len(str(part)) for part in parts) + len(separator) * len(parts)
        case "%" | "format" | "format_map":
            fields = re.findall(r"%(?:\([^)]*\))?[-+ #0-9.]*|\{[^}]*:[^}]*\}", text)
            widths = re.findall(r"\d+", " ".join(fields))
            spread = (text.count("%") + text.count("{")) * sum(map(len, texts))
            nested = "*" in text or re.search(r"\{[^}]*\{", text)  # a width that is an argument
            return len(text) + spread + sum(min(int(one[:12]), 1 << 40) for one in widths) + (number if nested else 0)
        case "translate":
            return LONGEST_PROMPT + 1
    return 0


def write_chat_template(folder: Path, chat_template: str | dict[str, str] | None) -> None:
    """Writes chat_template.jinja, and further templates by name into additional_chat_templates."""
    templates = {"default": chat_template} if isinstance(chat_template, str) else chat_template or {}
    for name, template in templates.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(got=f"a chat template named {name!r}", expected="letters, digits, _ and -", remedy="Rename it")
        file = folder / "chat_template.jinja" if name == "default" else folder / "additional_chat_templates" / f"{name}.jinja"
        write_text(file, template)


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)


def read_chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """Files of their own come before tokenizer_config.json, as in transformers.

    Raises:
        CheckpointError: a template that is not text, or not named.
    """
    templates = {file.stem: _read_text(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    file, legacy = folder / "chat_template.jinja", folder / "chat_template.json"
    inside = config.get("chat_template")
    if file.is_file():
        templates["default"] = _read_text(file)
    elif legacy.is_file() and isinstance(found := load_json(legacy).get("chat_template"), str):
        templates["default"] = found
    elif not templates and isinstance(inside, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in inside]
        templates = {entry.get("name"): entry.get("template") for entry in entries}
    elif not templates:
        templates = {} if inside is None else inside if isinstance(inside, dict) else {"default": inside}
    if not all(isinstance(one, str) for pair in templates.items() for one in pair):
        raise CheckpointError(
            got=f"chat_template in tokenizer_config.json that is {inside!r:.100}",
            expected='a template, or a list of {"name": …, "template": …}',
            remedy="Correct it, or put the template into chat_template.jinja",
        )
    return (templates["default"] if set(templates) == {"default"} else templates) or None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(got=f"{str(file)!r}, unreadable ({error})", expected="UTF-8", remedy="Download it again") from error
