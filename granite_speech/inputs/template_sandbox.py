"""The Jinja sandbox for chat templates, which come with a checkpoint and are not trusted: what a template may do, and how much.

jinja2's own sandbox keeps a template away from Python's internals and from changing its arguments, but does not limit time or memory.
Nested loops may run for hours and write nothing, `'x' * 10**9` is a single operation, and a list that holds another one twice, forty
levels deep, takes years to print. So each rendering has a budget of "bytes". Every operation and every iteration costs `STEP`,
every item of a list `ITEM`. Text costs the bytes that are read and built. Operations that are slow for the size of their input cost
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

# Measured at up to 10 ns each, so a template is stopped within about 2 s and builds less than 200 MB in all. For a conversation of
# 2,000 messages of 200 characters, templates in the style of Llama, Qwen and Mistral spend 6 to 12 % of it.
BUDGET = 200_000_000
STEP = 128
ITEM = 64
NODE = 32  # of the body of a loop or macro, each time it runs
LARGEST = 1 << 24  # the most that one operation may cost, so that none exceeds the budget by much
DEEPEST = 100  # lists in lists: hashing a deeper tuple would overflow the stack
BITS = 4096  # of an integer
LONGEST_TEMPLATE = 1 << 16  # takes about a second to compile; the longest in use are half as long
LONGEST_TIME_FORMAT = 200

# Filters and tests that read at most one item.
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
# For a text, these create an object for each character or word.
_BY_CHARACTER = {
    "batch", "groupby", "join", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr", "slice", "sort", "sum",
    "title", "unique", "urlencode", "wordcount",
}  # fmt: skip
_COMPARING = set(TESTS) - {"in"}  # no more work than reading both
# Numbers passed to these are neither widths nor numbers of copies.
_UNSIZED = _COMPARING | _SEARCHES | {
    "float", "int", "map", "reject", "rejectattr", "replace", "select", "selectattr", "sum", "truncate",
}  # fmt: skip
_IN_DEPTH = {"pprint", "string", "tojson", "urlencode", "xmlattr"}  # these read everything that a list holds
_QUADRATIC = {"pprint", "round", "striptags", "urlize", "wordwrap"}  # in the length of their input
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
    """{% generation %} … {% endgeneration %} is around the assistant's words. It renders its contents between `Sandbox.marks`."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([_filter(nodes.Const(place, lineno=line), "|mark")], lineno=line) for place in (0, 1))
        return [begin, *body, end]


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
        # Not optimized: the optimizer would run the counting filters once, while compiling, and store their results.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False, finalize=self.weighed
        )
        self.left = BUDGET
        self.marks = ("", "")
        self.filters = {name: self._metered(name, one, _FLAT_FILTERS) for name, one in (self.filters | {"tojson": _tojson}).items()}
        self.tests = {name: self._metered(name, one, _FLAT_TESTS) for name, one in self.tests.items()}
        inline = {"items": self.items, "step": self.step, "concat": self._concatenated, "compare": self._compared, "made": self.made}
        inline |= {"weighed": self.weighed, "mark": _mark}
        self.filters |= {f"|{name}": one for name, one in inline.items()}
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
        """Pays for one operation and its extra cost. Returns True, so that it can be used in a condition."""
        self.spend(STEP + cost)
        return True

    def weigh(self, value: Any, depth: int = DEEPEST) -> int:
        """Pays for reading all of a value. Returns its bytes, with ITEM for each item in it."""
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
        """Pays for a new list, dictionary or text, but not for its items, which existed before."""
        self.step(sys.getsizeof(value))
        return value

    def items(self, values: Iterable[Any]) -> Iterator[Any]:
        """Pays for each item when a loop reaches it."""
        for value in values:
            self.step()
            yield value

    def _pay(self, name: str, value: Any, arguments: Iterable[Any]) -> None:
        """Pays for a filter, a test or a method of a text: its input times the factor by which the arguments can enlarge it."""
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
        if name == "sum" and texts:  # of lists: each is copied once for every list
            cost *= size + 1
        self._single(name, cost)

    def _single(self, name: str, cost: int) -> None:
        if cost > LARGEST:
            raise SecurityError(f"{name} with a result of size {cost} or the work of it")
        self.step(cost)

    def _built(self, result: Any, value: Any = None) -> Any:
        """Pays for a result. An iterator becomes a list, so that its work is counted now."""
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
        # Compiled calls also pass the variables of the enclosing loop and block, which no function here reads.
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
        """`map` calls this with a filter's name."""
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
        """Joins the parts of a block: {% set x %} … {% endset %}, or a macro."""
        parts = list(parts)
        self._single("a block", sum(_bytes(part) for part in parts))
        return "".join(parts)


@lru_cache(maxsize=16)
def _compiled(source: str):
    if len(source) > LONGEST_TEMPLATE:
        raise SecurityError(f"a template of {len(source)} characters, where at most {LONGEST_TEMPLATE} are allowed")
    return Sandbox().compile(source)


def _bytes(value: Any) -> int:
    """An upper bound of the memory of a value, without its items."""
    if isinstance(value, str | bytes):
        return len(value) if value.isascii() else 4 * len(value)
    return sys.getsizeof(value)


def _widths(name: str, text: str) -> int:
    """The sum of the field widths and precisions in a format string."""
    percent = re.findall(r"[%)][-+ #]*([\d.]+)", text) if name == "%" else []
    braces = [] if name == "%" else [spec for _, _, spec, _ in Formatter().parse(text) if spec]
    return sum(min(int(digits[:12]), 1 << 40) for field in percent + braces for digits in re.findall(r"\d+", field))


@jinja2.pass_context  # otherwise jinja2 would call it once, when it compiles
def _mark(context: jinja2.runtime.Context, place: int) -> str:
    return context.environment.marks[place]


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > LONGEST_TIME_FORMAT:
        raise SecurityError(f"a time format of {len(form)} characters")
    return datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
