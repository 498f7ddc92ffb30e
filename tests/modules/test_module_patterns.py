"""Module patterns: the same matches as peft, and no expression takes long."""

import random
import re
import time

import pytest
from peft.utils.other import get_pattern_key

from granite_speech.errors import CheckpointError
from granite_speech.modules.adapter_config import AdapterConfig
from granite_speech.modules.module_patterns import ModulePatterns

MODULES = [
    *(f"language_model.model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1, 10, 11, 39) for name in "qkvo"),
    *(f"language_model.model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1, 10) for name in ("gate", "up", "down")),
    *(f"encoder.layers.{layer}.ff1.{name}_proj" for layer in (0, 15) for name in ("up", "down")),
    "encoder.layers.3.attn.to_q", "projector.qformer.encoder.layer.0.attention.attention.query", "projector.linear", "q_proj", "lm_head",
]  # fmt: skip
PATTERNS = [
    "q_proj", "proj", "_proj", "1.q_proj", "layers.1.self_attn.k_proj", r"layers\.1\.self_attn\.k_proj", "^q_proj", "^language_model",
    "^language_model.model.layers.0.self_attn.q_proj", r"^language_model\.model\.layers\.3\d\..*", ".*k_proj", ".*", ".+", "", "^", "$",
    r"layers\.(0|1)\..*", r"layers\.(0|1|10|11)\.self_attn\.(q|v)_proj", r".*\.1[01]\.[qv]_proj", r"layers\.\d+\.mlp\..*_proj",
    r"layers\.\d{2}\..*", r"layers\.\d{1,}.*q_proj", r"layers\.(?:[0-9]|1[0-9])\..*", r"[^.]+", r"[^.]+\.[^.]+", r"\w+", r"\w+?\.\w+",
    r"(\w+\.)*q_proj", r"(\w+\.){3}self_attn\.q_proj", r"(model\.)?layers\.0\..*", "(up|down)_proj|to_q", "q_proj|", "a|b|lm_head",
    r".*self_attn.*", r".*layers.*self_attn.*[qk]_proj", r"\bq_proj\b", r"\Bproj", r"\Alm_head\Z", r"[a-fl-m]+_head", r"[\d.]+q_proj",
    r"[\W]q_proj", r"\D+", r"\S*", r"q\_proj", "(?:q)_(?P<kind>proj)", "q_proj$", "(^q_proj)", "(^|x)lm_head", "(^|q|_proj){4}",
    "q_proj)|(lm_head", r"[]q]_proj", "x{0}q_proj", "l*m*_*h*e*a*d*", "(l|m|_|h|e|a|d)+", "(|l)*m_head",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_the_same_modules_as_in_peft(pattern):
    mine = {module for module in MODULES if ModulePatterns("rank_pattern", {pattern: 1}).find((module,), 0)}
    assert mine == {module for module in MODULES if get_pattern_key([pattern], module) == pattern}


def test_most_patterns_match_some_modules_but_not_all():
    counts = [sum(get_pattern_key([pattern], module) == pattern for module in MODULES) for pattern in PATTERNS]
    assert sum(0 < count < len(MODULES) for count in counts) > 30


def test_random_patterns_match_the_same_paths_as_in_peft():
    rng = random.Random(0)

    def piece(depth):
        atom = rng.choice(["a", "b", ".", r"\.", "[ab]", "[^a.]", r"\w", "^", "$", ""] + (["group", "either"] * 2 if depth else []))
        if atom == "group":
            atom = f"({piece(depth - 1)}{piece(depth - 1)})"
        elif atom == "either":
            atom = f"(?:{piece(depth - 1)}|{piece(depth - 1)})"
        return atom + rng.choice(["", "", "", "*", "+", "?", "*?", "{2}", "{1,2}", "{0,3}"]) * (atom not in ("^", "$", ""))

    paths, matched = ["".join(rng.choices("ab.", k=length)) for length in range(1, 7) for _ in range(6)], 0
    for _ in range(1500):
        pattern = "".join(piece(2) for _ in range(rng.randint(1, 4)))
        patterns = ModulePatterns("rank_pattern", {pattern: True})
        for path in paths:
            matches = re.match(rf"(.*\.)?({pattern})$", path) is not None
            assert patterns.find((path,), False) == matches, (pattern, path)
            matched += matches
    assert 1500 < matched < 1500 * len(paths) - 1500


def test_the_first_pattern_that_matches_decides():
    patterns = ModulePatterns("rank_pattern", {"nothing": 1, ".*proj": 2, "q_proj": 3})
    assert [patterns.find((one,), 0) for one in ("a.q_proj", "lm_head")] == [2, 0]
    assert patterns.find(("lm_head", "x.q_proj"), 0) == 2


RUNAWAYS = [
    "(a+)+", "([a-z_.]+)*x", "(.*)*x", "(.*.*)*x", "((.*)*)*x", "(" * 40 + ".*" + ")*" * 40 + "x", "(.|.)*x", "(a|a|_|[a-z.0-9_])*x",
    ".*" * 500 + "x", ".?" * 300 + "x", "(.?){200}x", "((.{1,99}){1,99}){1,99}x", "(.{99999}){99999}", "(|.){99999}x",
    "(((^)*)*)*" * 50 + "x", "(" + "|".join(["."] * 5000) + ")*x", "(([a-z]+)|([_.0-9]+))*x", "([a-z_.0-9]+?)+?x",
]  # fmt: skip


@pytest.mark.parametrize("pattern", RUNAWAYS, ids=lambda pattern: pattern[:30])
def test_an_expression_with_endless_backtracking_is_matched_or_refused_quickly(pattern):
    started = time.process_time()
    try:
        config = AdapterConfig.from_dict({"r": 8, "rank_pattern": {pattern: 4}, "alpha_pattern": {pattern: 4}})
        assert {config.rank(f"encoder.layers.{number}.ff1.up_proj") for number in range(400)} == {8}
        assert config.scaling("encoder.layers.0.ff1.up_proj") == 1
    except CheckpointError as error:
        assert "rank_pattern" in error.got and "steps" in error.got
    assert time.process_time() - started < 5


def test_many_patterns_for_many_modules_are_matched_quickly_or_refused():
    names = [f"language_model.model.layers.{layer}.{leaf}" for layer in range(40) for leaf in "abcdefghij"]
    config = AdapterConfig.from_dict({"r": 8, "rank_pattern": {name: 2 + place for place, name in enumerate(names)}})
    started = time.process_time()
    assert [config.rank(name) for name in names] == [2 + place for place in range(len(names))]
    assert time.process_time() - started < 3
    few = {rf"layers\.({number}|1{number})\..*_proj": 1 for number in range(12)}
    config = AdapterConfig.from_dict({"r": 8, "rank_pattern": few})
    assert [config.rank(name) for name in names] == [8] * len(names)
    for count in (10_000, 50_000):
        with pytest.raises(CheckpointError, match="rank_pattern: regular expressions that take more than"):
            config = AdapterConfig.from_dict({"r": 8, "rank_pattern": {f"x{number}": 1 for number in range(count)}})
            [config.rank(name) for name in names]
    assert time.process_time() - started < 8


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("(", "does not parse"),
        ("a{99999999999999}", "does not parse"),
        ("(" * 5000 + ")" * 5000, "does not parse"),
        ("(?i)a", "does not parse"),
        ("(?=a)", "has lookaround"),
        ("(?!a)", "has lookaround"),
        ("(?<=a)b", "has lookaround, a backreference"),
        (r"(a)\3", "has lookaround, a backreference"),
        ("(?i:a)", "or flags"),
        ("(?>a+)b", "has lookaround, a backreference"),
        ("a++", "has lookaround, a backreference"),
    ],
)
def test_unsupported_expressions_are_refused(pattern, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        AdapterConfig.from_dict({"r": 8, "alpha_pattern": {pattern: 4}})
    assert "alpha_pattern" in caught.value.got and "Name the modules in full" in caught.value.remedy and len(str(caught.value)) < 600
