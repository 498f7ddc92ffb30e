"""Functions as tools: their JSON schemas, made from type hints and Google-style docstrings, for chat templates."""

import inspect
import json
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from granite_speech.errors import InputError

__all__ = ["tool_schemas"]

_SIMPLE = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_SECTION = re.compile(r"^(Args|Returns|Raises):[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schemas(tools: Sequence[Any] | None) -> list[dict[str, Any]] | None:
    """The tools with functions replaced by their schemas.

    Args:
        tools: dictionaries, which are kept, and functions.

    Raises:
        InputError: another type; or a function without a type hint or a description for each argument.
    """
    if tools is None:
        return None
    for tool in tools:
        if not isinstance(tool, dict) and not inspect.isfunction(tool) and not inspect.ismethod(tool):
            raise InputError(
                got=f"a tool of type {type(tool).__name__}", expected="a JSON schema or a function", remedy="Write the schema out"
            )
    return [tool if isinstance(tool, dict) else _schema(tool) for tool in tools]


def _schema(function: Callable) -> dict[str, Any]:
    name, sections = function.__name__, _sections(inspect.getdoc(function) or "")
    if not sections:
        raise _unclear(name, "no docstring", "Describe it and each argument in a Google-style docstring")
    hints, described = get_type_hints(function), _descriptions(sections.get("Args", ""))
    properties, required = {}, []
    for argument, parameter in inspect.signature(function).parameters.items():
        if argument in ("self", "cls") and argument not in hints:
            continue
        if argument not in hints:
            raise _unclear(name, f"no type hint for {argument!r}", "Add one")
        if argument not in described:
            raise _unclear(name, f"no description of {argument!r} under Args", "Add one")
        properties[argument] = _kind(hints[argument], name) | _choices(described[argument], name)
        if parameter.default is parameter.empty:
            required.append(argument)
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    made = {"name": name, "description": sections[""], "parameters": parameters}
    if "return" in hints:
        made["return"] = _kind(hints["return"], name) | ({"description": sections["Returns"]} if sections.get("Returns") else {})
    return {"type": "function", "function": made}


def _sections(text: str) -> dict[str, str]:
    """The parts of a docstring by their heading; "" is the text before the first."""
    if not text.strip():
        return {}
    first, *rest = _SECTION.split(text)
    return {"": first.strip(), **{heading: body.strip("\n").strip() for heading, body in zip(rest[::2], rest[1::2], strict=True)}}


def _descriptions(text: str) -> dict[str, str]:
    """Argument → description; lines without a name of their own belong to the argument before."""
    found: dict[str, str] = {}
    name = None
    for line in text.splitlines():
        match = _ARGUMENT.match(line)
        if match:
            name = match[1]
            found[name] = match[2].strip()
        elif name is not None and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _choices(description: str, name: str) -> dict[str, Any]:
    """The description, and the values that it lists as `(choices: ["a", "b"])` at its end."""
    match = _CHOICES.search(description)
    if match is None:
        return {"description": description}
    try:
        values = json.loads(match[1])
    except ValueError as error:
        raise _unclear(name, f"choices that are no JSON list, {match[1]!r:.60}", 'Write (choices: ["a", "b"])') from error
    values = [value.strip() if isinstance(value, str) else value for value in values]
    return {"enum": values, "description": description[: match.start()].strip()}


def _kind(hint: Any, name: str) -> dict[str, Any]:
    """The schema of a type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = [_kind(one, name) for one in inner if one is not type(None)]
        if len(kinds) == 1:
            kind = kinds[0]
        elif all(isinstance(one.get("type"), str) for one in kinds):
            kind = {"type": sorted(one["type"] for one in kinds)}
        else:
            kind = {"anyOf": kinds}
        return kind | ({"nullable": True} if type(None) in inner else {})
    if origin is Literal and all(type(one) in _SIMPLE for one in inner):
        names = list(dict.fromkeys(_SIMPLE[type(one)] for one in inner))
        return {"type": names[0] if len(names) == 1 else names, "enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": _kind(inner[0], name)}
    if origin is tuple and len(inner) > 1 and ... not in inner:
        return {"type": "array", "prefixItems": [_kind(one, name) for one in inner]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _kind(inner[1], name)}
    if origin is None:
        return {} if hint is Any else {"type": _SIMPLE.get(hint, "object")}
    raise _unclear(name, f"the type hint {hint}", "Use int, float, str, bool, list[…], dict[…], Literal[…], or unions of these")


def _unclear(name: str, got: str, remedy: str) -> InputError:
    return InputError(got=f"the tool {name} with {got}", expected="a function that a JSON schema can be made from", remedy=remedy)
