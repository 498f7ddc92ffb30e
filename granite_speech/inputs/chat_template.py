"""Chat templates: rendering them with bounded time and memory (`template_sandbox`), reading and writing their files."""

import io
import re
import secrets
from pathlib import Path
from typing import Any

from granite_speech.checkpoints.folder import load_json
from granite_speech.errors import CheckpointError, InputError, MissingDependencyError

__all__ = ["LONGEST_PROMPT", "read_chat_template", "render_chat_template", "render_with_spans", "write_chat_template", "write_text"]

# This is many times longer than any context window; a template that writes more is stuck in a loop.
LONGEST_PROMPT = 1 << 22


def render_with_spans(template: str, **names) -> tuple[str, list[tuple[int, int]]]:
    """As `render_chat_template`, and where the contents of each {% generation %} block are: first character, and the one after the last."""
    secret = secrets.token_hex(8)  # so that no message can hold a mark
    marks = f"<{secret}+>", f"<{secret}->"
    marked = _render(template, marks, names)
    pieces = re.split(f"({'|'.join(map(re.escape, marks))})", marked)
    prompt, open_at, spans = "", [], []
    for piece in pieces:
        if piece == marks[0]:
            open_at.append(len(prompt))
        elif piece == marks[1] and open_at:
            spans.append((open_at.pop(), len(prompt)))
        elif piece not in marks:
            prompt += piece
    return prompt, spans


def render_chat_template(template: str, **names) -> str:
    """Renders a Jinja chat template in a sandbox, with the names and filters that transformers provides.

    A template comes with a checkpoint and is not trusted: it cannot reach attributes of Python objects or change the arguments.
    `Sandbox` bounds its time and memory by counting operations. Its output is limited to LONGEST_PROMPT characters.

    Raises:
        InputError: the template is invalid, raises, writes too much, or takes more work than any prompt needs.
        MissingDependencyError: jinja2 is not installed.
    """
    return _render(template, ("", ""), names)


def _render(template: str, marks: tuple[str, str], names: dict[str, Any]) -> str:
    try:
        from granite_speech.inputs.template_sandbox import Sandbox
    except ImportError as error:
        raise MissingDependencyError(got="no jinja2", expected="jinja2, for chat templates", remedy="pip install jinja2") from error
    prompt, length, sandbox = io.StringIO(), 0, Sandbox()
    sandbox.marks = marks
    try:
        for part in sandbox.template(template).generate(**names):
            prompt.write(part)
            length += len(part)
            if length > LONGEST_PROMPT:
                raise InputError(
                    got=f"a chat template that wrote more than {LONGEST_PROMPT} characters",
                    expected="a prompt",
                    remedy="Shorten the messages, or pass another chat_template",
                )
    except InputError:
        raise
    except Exception as error:  # a template can raise any error of jinja2 or of Python's types
        raise InputError(
            got=f"a chat template that failed ({type(error).__name__}: {str(error)[:500]})",
            expected="messages that fit the template",
            remedy="Check roles and contents, or pass another chat_template",
        ) from error
    return prompt.getvalue()


def write_chat_template(folder: Path, chat_template: str | dict[str, str] | None) -> list[Path]:
    """Writes the default template to chat_template.jinja and others, by name, to additional_chat_templates. Returns the files."""
    files: list[Path] = []
    templates = {"default": chat_template} if isinstance(chat_template, str) else chat_template or {}
    for name, template in templates.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(got=f"a chat template named {name!r}", expected="letters, digits, _ and -", remedy="Rename it")
        file = folder / "chat_template.jinja" if name == "default" else folder / "additional_chat_templates" / f"{name}.jinja"
        write_text(file, template)
        files.append(file)
    return files


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)


def read_chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """The template, or several by name; None if there are none. Template files override tokenizer_config.json, as in transformers.

    Raises:
        CheckpointError: a template that is not text, or has no name.
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
