"""The Jinja sandbox of chat templates, which come with a checkpoint from whoever made it: what a template may do, and how much of it.

jinja2's own sandbox keeps a template away from Python's internals and from the arguments' own lists, but bounds neither its time nor
its memory: nested loops need write nothing, `'x' * 10**9` is a single operation, and a list that holds itself twice, forty times
over, takes years to print. So each rendering has a budget of "bytes". Every operation and every iteration costs `STEP`, every
item of a list `ITEM`; text costs what is read of it and what is built from it; operations that take longer than their size says cost
more.
jinja2 compiles some operations inline; `_Metering` rewrites these as filters, which can be counted.
"""

import json
import operator
import re
import sys
from collections.abc import Iterable, Iterator, MappingView
from datetime import datetime
from functools import lru_cache, wraps
from string import Formatter
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["BUDGET", "LONGEST_TEMPLATE", "Sandbox"]

# Measured at up to 10 ns for each, so that a template is stopped within some 2 s, and all that it builds together is below 200 MB. For a
# conversation of 2,000 messages of 200 characters, templates in the style of Llama, Qwen and Mistral spend 6 to 12 % of it.
BUDGET = 200_000_000
STEP = 128
ITEM = 64
NODE = 32  # of a loop's or a macro's body, each time it runs
LARGEST = 1 << 24  # what a single operation may cost, so that none overshoots the budget by much
DEEPEST = 100  # lists in lists: hashing a deeper tuple would overflow the stack
BITS = 4096  # of an integer
LONGEST_TEMPLATE = 1 << 16  # compiling takes about a second for this many characters; the longest in use have half as many
LONGEST_TIME_FORMAT = 200

# Filters and tests that look at no more than one item.
_FLAT_FILTERS = {"attr", "count", "d", "default", "first", "last", "length", "random"}
_FLAT_TESTS = {
    "boolean", "callable", "defined", "divisibleby", "escaped", "even", "false", "filter", "float", "integer", "iterable", "mapping",
    "none", "number", "odd", "sameas", "sequence", "string", "test", "true", "undefined",
}  # fmt: skip
_FLAT_METHODS = {"get", "items", "keys", "values"}  # of dictionaries
_FROM_THE_ENDS = {"endswith", "startswith"}  # methods that do not read the whole text
_SEARCHES = {
    "count", "find", "in", "index", "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "rsplit",
    "rstrip", "split", "strip", "trim",
}  # fmt: skip
# Given a text, these make an object of each of its characters or words.
_BY_CHARACTER = {
    "batch", "groupby", "join", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr", "slice", "sort", "sum",
    "title", "unique", "urlencode", "wordcount",
}  # fmt: skip
_COMPARING = set(TESTS) - {"in"}  # no more work than reading both
# Numbers given to these are no widths, and no numbers of copies.
_UNSIZED = _COMPARING | _SEARCHES | {
    "float", "int", "map", "reject", "rejectattr", "replace", "select", "selectattr", "sum", "truncate",
}  # fmt: skip
_IN_DEPTH = {"pprint", "string", "tojson", "urlencode", "xmlattr"}  # the arguments matter to all that a list holds
_QUADRATIC = {"pprint", "round", "striptags", "urlize", "wordwrap"}  # in the length of what they are given
_COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda item, container: item in container,
    "notin": lambda item, container: item not in container,
}


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's words for training; here it is just its contents."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """Rewrites what jinja2 compiles inline as filters of the `Sandbox`, under names that no template can write."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (the name jinja2 looks for; also below)
        cost = _body_cost(node)
        node = self.generic_visit(node)
        node.iter = _filter(node.iter, "|items")
        node.body.insert(0, _step(node, cost))
        if node.test is not None:
            node.test = nodes.And(_filter(nodes.Const(cost), "|step"), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:  # noqa: N802
        cost = _body_cost(node)
        node = self.generic_visit(node)
        node.body.insert(0, _step(node, cost))
        return node

    visit_CallBlock = visit_Block = visit_Macro  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        return _filter(nodes.List(self.generic_visit(node).nodes), "|concat")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        node = self.generic_visit(node)
        values, names = [node.expr, *(one.expr for one in node.ops)], [nodes.Const(one.op) for one in node.ops]
        return _filter(nodes.List(values), "|compare", nodes.List(names))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        node = self.generic_visit(node)
        return _filter(node, "|made") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return _filter(self.generic_visit(node), "|made")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        node = self.generic_visit(node)
        return _filter(node, "|made") if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        node = self.generic_visit(node)
        for pair in node.items:
            pair.key = _filter(pair.key, "|weighed")
        return _filter(node, "|made")


def _filter(value: nodes.Expr, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(arguments), [], None, None, lineno=value.lineno)


def _step(node: nodes.Node, cost: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filter(nodes.Const(cost), "|step"), lineno=node.lineno)


def _body_cost(node: nodes.Node) -> int:
    return NODE * sum(1 for _ in node.find_all(nodes.Node))


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one rendering, with the names and filters that transformers gives a chat template.

    All its methods raise SecurityError when the budget is spent.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self):
        # Not optimized: the optimizer would run the counting filters when it compiles, and leave their results in the code.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False, finalize=self.weighed
        )
        self.left = BUDGET
        self.filters = {name: self._metered(name, one, _FLAT_FILTERS) for name, one in (self.filters | {"tojson": _tojson}).items()}
        self.tests = {name: self._metered(name, one, _FLAT_TESTS) for name, one in self.tests.items()}
        inline = {"items": self.items, "step": self.step, "concat": self._concatenated, "compare": self._compared, "made": self.made}
        self.filters |= {f"|{name}": one for name, one in (inline | {"weighed": self.weighed}).items()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def template(self, source: str) -> jinja2.Template:
        """A template that renders in this sandbox."""
        return jinja2.Template.from_code(self, _compiled(source), self.make_globals(None))

    def _parse(self, *source: Any) -> nodes.Template:
        return _Metering().visit(super()._parse(*source)).set_environment(self)

    # --- what things cost ---------------------------------------------------------------------------------------------------------------

    def spend(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise SecurityError("more work than any prompt takes; it may never end")

    def step(self, cost: int = 0) -> bool:
        """Pay for an operation, and what it costs beyond that; true, so that it can stand in a condition."""
        self.spend(STEP + cost)
        return True

    def weigh(self, value: Any, depth: int = DEEPEST) -> int:
        """Pay for reading all of a value; returns its bytes, with ITEM for each item of what it holds."""
        size = 0
        if isinstance(value, str | bytes):
            size = _bytes(value)
        elif isinstance(value, int):
            if value.bit_length() > BITS:
                raise SecurityError(f"an integer of more than {BITS} bits")
        elif isinstance(value, range):
            size = ITEM * len(value)
        elif isinstance(value, list | tuple | dict | set | frozenset | MappingView):
            if depth == 0:
                raise SecurityError(f"values nested more than {DEEPEST} deep")
            size = ITEM * (len(value) + 1)
            self.spend(size)
            size += sum(self.weigh(item, depth - 1) for item in value)
            return size + sum(self.weigh(item, depth - 1) for item in value.values()) if isinstance(value, dict) else size
        elif isinstance(value, Namespace):
            raise SecurityError("a namespace used as a value")  # it may hold itself
        self.spend(size)
        return size

    def weighed(self, value: Any) -> Any:
        self.step()
        self.weigh(value)
        return value

    def made(self, value: Any) -> Any:
        """Pay for a new list, dictionary or text, and not for what it holds, which was there before."""
        self.step(sys.getsizeof(value))
        return value

    def items(self, values: Iterable[Any]) -> Iterator[Any]:
        """Pay for each item when a loop comes to it."""
        for value in values:
            self.step()
            yield value

    def _pay(self, name: str, value: Any, arguments: Iterable[Any]) -> None:
        """Pay for a filter, a test or a method of a text: its input times what the arguments can make of it."""
        size = 0 if name in _FROM_THE_ENDS else self.weigh(value)
        if isinstance(value, str | bytes) and (name in _BY_CHARACTER or name in ("format", "format_map")):
            size *= ITEM
        elif isinstance(value, list | tuple | dict | range) and name not in _IN_DEPTH:
            size = ITEM * len(value)
        texts = numbers = 0
        for one in arguments:
            if isinstance(one, int) and not isinstance(one, bool) and name not in _UNSIZED:
                numbers += abs(one)
            else:
                texts += self.weigh(one) * (ITEM if name == "join" and isinstance(one, str) else 1)
        if name in ("format", "format_map", "%") and isinstance(value, str):
            numbers += _widths(name, value)
        factor = 0 if name in _COMPARING else texts // 16 if name in _SEARCHES else texts + numbers
        cost = (size + 1) * (factor + 1) + ((size + factor) ** 2 // 64 if name in _QUADRATIC else 0)
        if name == "sum" and texts:  # of lists, each of which would be copied as often as there are lists
            cost *= size + 1
        self._single(name, cost)

    def _single(self, name: str, cost: int) -> None:
        if cost > LARGEST:
            raise SecurityError(f"{name} with a result of size {cost} or the work of it")
        self.step(cost)

    def _built(self, result: Any, value: Any = None) -> Any:
        """Pay for a result. An iterator becomes a list, so that no work is put off to where nobody counts it."""
        if isinstance(result, Iterator) and not isinstance(result, LoopContext):
            result = list(result)
        if result is not value and not isinstance(result, Namespace):
            self.weigh(result)
        return result

    # --- operations ---------------------------------------------------------------------------------------------------------------------

    def _metered(self, name: str, function, flat_ones: set[str]):
        if name in flat_ones:

            @wraps(function)
            def flat(*args, **kwargs):
                self.step()
                return function(*args, **kwargs)

            return flat
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, or the environment

        @wraps(function)
        def call(*args, **kwargs):
            value, *rest = args[skipped:]
            self._pay(name, value, (*rest, *kwargs.values()))
            return self._built(function(*args, **kwargs), value)

        return call

    def call(self, context, function, /, *args, **kwargs):
        # Compiled calls also hand over the variables of the loop and block that they are in; nothing reads these here.
        given = (*args, *(one for key, one in kwargs.items() if key not in ("_loop_vars", "_block_vars")))
        method = getattr(function, "__wrapped__", function)  # jinja2 has a wrapper around str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(function, Macro):
            self.step(STEP * (4 + len(given)))
            return super().call(context, function, *args, **kwargs)
        if isinstance(function, LoopContext) and args:  # a recursive loop's next level
            args = (self.items(args[0]), *args[1:])
        elif isinstance(owner, str | bytes | int | float):
            self._pay(name, owner, given)
        else:
            self.weigh(given)
            if isinstance(owner, dict) and name in _FLAT_METHODS:
                return super().call(context, function, *args, **kwargs)
            if isinstance(owner, list | tuple | dict | MappingView):
                self.weigh(owner)
        return self._built(super().call(context, function, *args, **kwargs), owner)

    def call_filter(self, name, *args, **kwargs):
        """What `map` calls, which gets names as texts."""
        if str(name).startswith("|"):
            raise SecurityError(f"the filter {name!r} is not for templates")
        return super().call_filter(name, *args, **kwargs)

    def call_binop(self, context, operator, left, right):
        if operator == "%" and isinstance(left, str):
            self._pay("%", left, right if isinstance(right, tuple) else (right,))
        elif operator == "+":
            self._single("+", sum(_bytes(one) for one in (left, right)))
        else:
            self.weigh((left, right))
            pair = (left, right) if isinstance(right, int) else (right, left)
            if operator == "*" and isinstance(pair[1], int) and not isinstance(pair[0], int | float):
                self._single("*", _bytes(pair[0]) * abs(pair[1]))
            elif operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > BITS:
                raise SecurityError(f"** with a result of size {left.bit_length() * abs(right)} bits")
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj, argument):
        if not isinstance(argument, str | int):
            self.weigh(argument)
        return super().getitem(obj, argument)

    def _compared(self, values: list[Any], names: list[str]) -> bool:
        result = True
        for name, left, right in zip(names, values, values[1:], strict=False):
            if isinstance(left, str) and isinstance(right, str) and name in ("in", "notin"):
                self._pay("in", right, (left,))
            else:
                self.weigh(left)
                self.weigh(right)
            result = _COMPARISONS[name](left, right)
            if not result:
                break
        return result

    def _concatenated(self, values: list[Any]) -> str:
        self._single("~", self.weigh(values))
        return "".join(map(str, values))

    def concat(self, parts: Iterable[str]) -> str:
        """Of blocks: {% set x %} … {% endset %}, macros."""
        parts = list(parts)
        self._single("a block", sum(_bytes(part) for part in parts))
        return "".join(parts)


@lru_cache(maxsize=16)
def _compiled(source: str):
    if len(source) > LONGEST_TEMPLATE:
        raise SecurityError(f"a template of {len(source)} characters, where at most {LONGEST_TEMPLATE} are allowed")
    return Sandbox().compile(source)


def _bytes(value: Any) -> int:
    """What a value takes in memory by itself, at most."""
    if isinstance(value, str | bytes):
        return len(value) if value.isascii() else 4 * len(value)
    return sys.getsizeof(value)


def _widths(name: str, text: str) -> int:
    """The sum of the field widths and precisions that a format string spells out."""
    percent = re.findall(r"[%)][-+ #]*([\d.]+)", text) if name == "%" else []
    braces = [] if name == "%" else [spec for _, _, spec, _ in Formatter().parse(text) if spec]
    return sum(min(int(digits[:12]), 1 << 40) for field in percent + braces for digits in re.findall(r"\d+", field))


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > LONGEST_TIME_FORMAT:
        raise SecurityError(f"a time format of {len(form)} characters")
    return datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
