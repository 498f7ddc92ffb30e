"""Chat templates that would run forever or fill the memory are refused within seconds; long conversations are not."""

import json
import os
import select
import subprocess
import sys

import jinja2.sandbox
import pytest

from granite_speech.errors import InputError
from granite_speech.inputs.chat_template import render_chat_template
from granite_speech.inputs.template_sandbox import BUDGET, Sandbox
from tests.support.paths import ROOT

# A refusal took up to 2 s and 150 MB where the budget was measured; a runaway template takes hours.
SECONDS, MEGABYTES, HANGS_AFTER = 5.0, 250, 60

# Renders the template on each line of its input, in a process of its own, so that a hanging template does not stop the tests.
WORKER = """
import json, resource, sys, time
from granite_speech.inputs.chat_template import render_chat_template
from granite_speech.errors import InputError
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
render_chat_template("{{ 1 }}")
before = peak()
print("ready", flush=True)
for line in sys.stdin:
    started = time.process_time()
    try:
        result = f"wrote {len(render_chat_template(json.loads(line), messages=[{'role': 'user', 'content': 'x'}]))}"
    except InputError as error:
        result = str(error)
    print(json.dumps([result, time.process_time() - started, peak() - before]), flush=True)
"""


class Worker:
    def __init__(self):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.process = subprocess.Popen([sys.executable, "-c", WORKER], **pipes)
        assert self.answer() == "ready\n"

    def answer(self) -> str | None:
        ready, _, _ = select.select([self.process.stdout], [], [], HANGS_AFTER)
        return self.process.stdout.readline() if ready else None

    def stop(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def workers():
    running = []
    yield running
    for one in running:
        one.stop()


def render(workers, template):
    """(length or error message, CPU seconds, megabytes above the start)."""
    if not workers:
        workers.append(Worker())
    workers[0].process.stdin.write(json.dumps(template) + "\n")
    workers[0].process.stdin.flush()
    answer = workers[0].answer()
    if not answer:
        workers.pop().stop()
        pytest.fail("the template hangs" if answer is None else "the template ended the process")
    return json.loads(answer)


def again(body, before=""):
    """Evaluates an expression in nested loops, without output."""
    return f"{before}{{% for i in range(99999) %}}{{% for j in range(99999) %}}{{% set x = {body} %}}{{% endfor %}}{{% endfor %}}"


def grown(body, times=60):
    return "{% set n = namespace(x=1) %}{% for i in range(" + str(times) + ") %}{% set n.x = " + body + " %}{% endfor %}"


LONG, SHORT = ("{% set s = 'ab\u00e9 <' * " + count + " %}" for count in ("700000", "2000"))
RUNAWAYS = {
    "empty loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops with a test": "{% for x in range(99999) if false %}{% endfor %}" * 1000,
    "a loop over a long text": "{% for a in 'x' * 4000000 %}{% for b in 'x' * 4000000 %}{% endfor %}{% endfor %}",
    "a loop over a list": "{% set l = [0] * 90000 %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for a in [1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "a recursive loop over much": "{% for a in [1] recursive %}{% if loop.depth < 6 %}{{ loop(range(9999)) }}{% endif %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "macros in turn": "{% macro f(n) %}{% if n %}{{ g(n) }}{{ g(n) }}{% endif %}{% endmacro %}"
    "{% macro g(n) %}{{ f(n - 1) }}{% endmacro %}{{ f(70) }}",
    "callers": "{% macro f(n) %}{% if n %}" + "{% call f(n - 1) %}{% endcall %}" * 2 + "{% endif %}{% endmacro %}{{ f(70) }}",
    "blocks": "{% block a %}{% for i in range(99999) %}{{ self.b() }}{% endfor %}{% endblock %}"
    "{% block b %}{% for i in range(99999) %}{% endfor %}{% endblock %}",
    "a long body": "{% for a in range(99999) %}" + "{% set x = messages[0].content.a %}" * 1500 + "{% endfor %}",
    "a long test": "{% for a in range(99999) if " + "messages[0].content and " * 2000 + "false %}{% endfor %}",
    "a macro with a long body": "{% macro f() %}" + "{% set x = messages[0].content.a %}" * 1500 + "{% endmacro %}" + again("f()"),
    "a list in lists": grown("[n.x, n.x]") + "{{ n.x }}",
    "a list in lists, compared": grown("[n.x, n.x]") + "{{ n.x == n.x }}",
    "a list in lists, as text": grown("[n.x, n.x]") + "{{ n.x | string | length }}",
    "a list in lists, formatted": grown("[n.x, n.x]") + "{{ '%s' % (n.x,) }}",
    "a list in lists, joined": grown("[n.x, n.x]") + "{{ n.x ~ '' }}",
    "a dictionary in dictionaries": grown("{'a': n.x, 'b': n.x}") + "{{ n.x | tojson }}",
    "a tuple in tuples as a key": grown("(n.x, n.x)") + "{{ {n.x: 1} }}",
    "a tuple in tuples as an index": grown("(n.x, n.x)") + "{{ messages[0][n.x] }}",
    "a tuple in tuples to get": grown("(n.x, n.x)") + "{{ messages[0].get(n.x) }}",
    "a tuple too deep for the stack": grown("(n.x,)", 90000) + "{{ {n.x: 1} }}",
    "a namespace in namespaces": grown("namespace(a=n.x, b=n.x)") + "{{ n.x }}",
    "a text that grows": "{% set n = namespace(x='x' * 100000) %}{% for a in range(99999) %}{% set n.x = n.x + 'y' %}{% endfor %}",
    "a list that grows": "{% set n = namespace(x=[]) %}{% for a in range(99999) %}{% set n.x = n.x + [a] %}{% endfor %}",
    "texts that are kept": "{% set n = namespace(x=[]) %}{% for a in range(99999) %}{% set n.x = [n.x, 'x' * 100000 ~ a] %}{% endfor %}",
    "slices that are kept": "{% set s = 'x' * 4000000 %}{% set n = namespace(x=[]) %}"
    "{% for a in range(99999) %}{% set n.x = [n.x, s[1:]] %}{% endfor %}",
    "lists that are kept": "{% set n = namespace(x=[]) %}"
    "{% for a in range(99999) %}{% set n.x = [n.x, " + "0," * 20000 + "] %}{% endfor %}",
    "a filter's name taken for a refund": "{% for i in range(99999) %}{{ [-10**15] | map('|step') | list }}{% endfor %}",
    "a search backwards": "{% set s = 'a' * 200000 %}{{ s.rfind('ab' + 'a' * 100000) }}",
    "an integer that grows": "{% set n = namespace(x=10) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x % 7 }}",
    "a power": "{{ 10 ** 1000000000 }}",
    "bytes": "{{ 'a'.encode().ljust(10**9) }}",
    "bytes of a number": "{{ (1).to_bytes(10**9, 'big') }}",
    "a rounding": "{{ 1 | round(10**8, 'ceil') }}",
    "a list of emoji": "{{ ('\U0001f600' * 4000000) | list }}",
    "a join of emoji": "{{ ''.join('\U0001f600' * 1000000) | length }}",
    "fields": "{{ ('{0}' * 500000).format(1) }}",
    "braces": "{{ ('{' * 1000000).format() }}",
    "parentheses": "{{ ('%(' * 1000000) % 1 }}",
    "a width": "{{ '{:1000000000}'.format(1) }}",
    "a width in a width": "{{ '{:{}}'.format(1, 10**9) }}",
    "a starred width": "{{ '%*d' % (10**9, 1) }}",
    "a width after a name in parentheses": "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}",
    "a precision": "{{ '%.999999999f' % 1 }}",
    "tabs": "{{ '\\t'.expandtabs(10**9) }}",
    "a translation": "{{ ('a' * 100000).translate({97: 'b' * 1000000}) }}",
    "slices of nothing": "{{ [] | slice(10**8) | list | length }}",
    "a time format": "{{ strftime_now('%Y' * 1000000) }}",
    "tags": "{{ ('<!--' * 500000) | striptags }}",
    "tags of a safe text": "{{ (('<!---->' * 500000) | safe).striptags() }}",
    "addresses": "{{ ('a@' * 100000) | urlize }}",
    "hyphens": "{{ ('-' * 500000) | wordwrap(1) }}",
    "a path that goes round": "{% set n = namespace(x=1) %}{% set n.x = n %}{{ [n] | map(attribute='x.' * 100000) | list }}",
    "a dictionary that grows": "{% set n = namespace(x={}) %}{% for a in range(99999) %}"
    "{% set n.x = dict(n.x, **{'k' ~ a: 1}) %}{% endfor %}",
    "much to compile": "{{ " + "+".join("a" * 32000) + " }}",
    "parentheses to parse": "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
    "too many blocks for Python": "{% for a in 'xy' %}" * 25 + "{% endfor %}" * 25,
    "too many branches": "{% if a %}" + "{% elif a %}" * 4500 + "{% endif %}",
    "too long": "x" * 70000,
} | {
    f"{what} again and again": again(what)
    for what in (
        "range(99999) | sum", "range(99999) | list", "range(99) | map('string') | list", "range(99) | select('odd') | list",
        "range(99) | sort", "range(99) | unique | list", "range(99) | groupby('real')", "range(99) | batch(2) | list",
        "range(99) | map('center', 9) | join", "i in range(9999) | list", "[1] * 1000 == [1] * 1000", "messages | tojson",
        "messages | selectattr('role', 'equalto', 'user') | list", "loop.changed(i)", "i is odd", "i is in [1, 2, 3]", "[i, j] | max",
        "(i, j) | first", "'x%s' % i", "'{} {}'.format(i, j)", "dict(a=i)", "cycler(i, j).next()", "namespace(a=i)", "messages[0].content",
        "i < j < 5", "i ~ j", "[[i]] * 99 | length", "[[i]] | sum(start=[])", "'a' * 99 + 'b' in 'a' * 2400", "[i, j, 1, 2, 3, 4]",
    )
} | {
    f"a {name} text, {what}": again(f"s{what}", before)
    for name, before in (("long", LONG), ("short", SHORT))
    for what in (
        " | urlencode", " | wordcount", " | title", " | escape", " | upper", " | tojson", " | truncate(99)", " | indent", " | float",
        " | replace('a', '')", " | reverse", " | striptags", " | urlize", " | wordwrap(1)", " | list", " | sort", " | unique | list",
        " | batch(2) | list", " | map('upper') | join", " | pprint", ".split()", ".splitlines()", ".encode()", ".title()", ".casefold()",
        "[::-1]", " == s ~ ''", ".count('b')", ".rfind('zz')", ".rsplit('b')", ".format()", ".join('ab')", " is lower", ".strip('abcdef')",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", RUNAWAYS)
def test_a_runaway_template_is_refused_within_seconds(workers, name):
    said, seconds, megabytes = render(workers, RUNAWAYS[name])
    assert "a chat template that failed" in said or "a chat template that wrote more" in said, said
    assert "MemoryError" not in said and len(said) < 800
    assert seconds < SECONDS and megabytes < MEGABYTES


def test_large_loops_and_lists_within_bounds_are_not_refused(workers):
    for template in ("{{ range(99999) | list | length }}", again("1").replace("99999", "300"), "{{ 'x' * 4000000 }}"):
        assert render(workers, template)[0].startswith("wrote ")


# --- templates in common use -------------------------------------------------------------------------------------------------------------

HEADERS = """
{{- bos }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = 'none' %}{% endif %}{{ '<|header|>system<|end|>' + system + '<|eot|>' }}
{%- for message in messages %}{% if not (message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|header|>' + message['role'] + '<|end|>' + message['content'] | trim + '<|eot|>' }}
{%- elif message.role == 'tool' %}{{ message.content | tojson if message.content is mapping else message.content }}
{%- else %}{% if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{{- message.tool_calls[0].arguments | tojson }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|end|>{% endif %}
"""
THINKING = """
{%- macro shown(content) %}{% if content is string %}{{ content }}{% else %}{% for item in content %}{{ item.text }}{% endfor %}{% endif %}
{%- endmacro %}{% set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}
{%- if ns.searching and message.role == 'user' and not message.content.startswith('<tool>') %}
{%- set ns.searching = false %}{% set ns.last = index %}{% endif %}{% endfor %}
{%- for message in messages %}{% set content = shown(message.content) %}
{%- if message.role == 'assistant' %}{% set thoughts = '' %}{% if '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{%- if loop.index0 > ns.last %}{{ '<|start|>assistant<think>' ~ thoughts.strip('\\n') ~ '</think>' ~ content }}
{%- else %}{{ '<|start|>assistant' + content }}{% endif %}{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}
{%- else %}{{ '<|start|>' ~ message.role ~ content }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|end|>{% endif %}{% endif %}{% endfor %}
"""
INSTRUCTIONS = """
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}{% set ns = namespace(index=0, all=[]) %}
{%- for message in rest %}{% if (message['role'] == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
{%- set ns.index = ns.index + 1 %}{% set ns.all = ns.all + [message] %}{% endfor %}
{{- bos }}{% for message in ns.all %}{% if message.role == 'user' %}
{%- if tools and message == users[-1] %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}{{ '[INST] %s[/INST]' % message.content }}
{%- elif message['role'] == 'assistant' %}{{ ' ' ~ message.content | trim ~ eos }}{% else %}{{ raise_exception('no such role') }}{% endif %}
{%- endfor %}
"""


def conversation(count, length):
    words = "word " * (length // 5)
    turns = [("user", words), ("assistant", f"<think>\nhm\n</think>\n\n{words}")]
    turns = [{"role": role, "content": f"{content}{index}"} for index in range(count) for role, content in [turns[index % 2]]]
    return [{"role": "system", "content": "Be kind."}, *turns]


@pytest.mark.parametrize("count, length", [(2, 20), (2000, 500), (2000, 1800), (4000, 300)])
@pytest.mark.parametrize("template", [HEADERS, THINKING, INSTRUCTIONS], ids=["headers", "thinking", "instructions"])
def test_long_conversations_render_as_in_jinja(template, count, length):
    names = {"messages": conversation(count, length), "bos": "<s>", "eos": "</s>", "add_generation_prompt": True}
    names["tools"] = [{"name": f"tool {number}", "parameters": {"a": {"type": "string"}}} for number in range(20)]
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.globals["raise_exception"] = None
    plain.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    assert render_chat_template(template, **names) == plain.from_string(template).render(**names)


@pytest.mark.parametrize("template", [HEADERS, THINKING, INSTRUCTIONS], ids=["headers", "thinking", "instructions"])
def test_2000_messages_use_little_of_the_budget(template):
    sandbox = Sandbox()
    names = {"messages": conversation(2000, 200), "bos": "<s>", "eos": "</s>", "tools": None}
    assert sum(map(len, sandbox.template(template).generate(**names))) > 400_000
    assert sandbox.left > 0.7 * BUDGET


# The rarer forms of statements and expressions that the sandbox rewrites.
FORMS = """
{{ 1 < 2 <= 2 < 3 }}{{ 1 < 2 > 2 }}{{ 'a' in 'abc' }}{{ 'a' not in ['b'] }}{{ 1 in [1] in [[1]] }}{{ missing == none }}{{ 'x' in d }}
{%- for k, v in d.items() if v > 1 %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ k }}{{ v }}{% else %}none{% endfor %}
{%- for x in [] %}{% else %}empty{% endfor %}{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}
{%- set a, b = 1, (2, 3) %}{{ a }}{{ b }}{{ 'abcdef'[1:4:2] }}{{ [1, 2, 3][::-1] }}{{ {'k': [1]}['k'] }}{{ ((1, 2), 3)[0] }}
{%- macro m(x, y=[1, 2]) %}{{ x }}{{ y }}{{ caller(x) if caller else '' }}{% endmacro %}{{ m(1) }}{% call(z) m(2) %}<{{ z }}>{% endcall %}
{%- filter upper %}abc{{ 'd' ~ 1 ~ none }}{% endfilter %}{% set t %}x{{ 1 }}{% endset %}{{ t }}{% block q %}q{{ d.x }}{% endblock %}
{{- d | dictsort }}{{ [3, 1] | sort | map('string') | join('-') }}{{ range(3) | sum }}{{ [{'a': 1}, {'a': 2}] | map(attribute='a') | list }}
{{- [{'a': 1, 'b': 2}] | groupby('a') }}{{ 'a b' | title }}{{ 'x' | default('y') }}{{ missing | default(5) }}
{{- -7 // 2 }}{{ 7.5 % 2 }}{{ 2 ** -1 }}
{{- [1, 2] + [3] }}{{ (1,) + (2,) }}{{ [0] * 3 }}{{ 'ab' * 2 }}{{ 1000000 * 1000000 }}{{ [1700000000] | select('gt', 1600000000) | list }}
{{- 'a,b'.split(',')[1] }}{{ 'abc'.startswith(('x', 'a')) }}{{ '{a[k]}'.format(a={'k': 1}) }}{{ 'x'.join(['1', '2']) }}
{{- cycler(1, 2).next() }}
{%- for x in 'ab' %}{{ loop.cycle('o', 'e') }}{{ loop.changed(x) }}{{ loop.previtem }}{{ loop.nextitem }}{% endfor %}{{ joiner(',')() }}
{%- for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% if x == 3 %}{% break %}{% endif %}{% endfor %}
{{- 5 is divisibleby 5 }}{{ 1700000000 is eq 1700000000 }}{{ 'abcdefghij' | truncate(8, true, '..') }}{{ '1700000000' | int(0) }}
{{- [1, 2, 3] | slice(2) | list }}
"""


def test_every_form_renders_as_in_jinja():
    names = {"d": {"x": 1, "y": 2}}
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    assert render_chat_template(FORMS, **names) == plain.from_string(FORMS).render(**names)


def test_each_rendering_has_a_budget_of_its_own():
    template = "{% for i in range(90000) %}{% set x = i ~ i %}{% endfor %}{{ x }}"
    assert {render_chat_template(template, x=5) for _ in range(20)} == {"5"}
    with pytest.raises(InputError, match="more work than any prompt takes"):
        render_chat_template(template * 20, x=5)
