"""Calls of `generate`, as users write them, here and in transformers."""

from tests.support.two_libraries import Call, comparison

CALLS = {
    "inputs and max_new_tokens": Call(lambda lib: lib.model.generate(**lib.inputs, max_new_tokens=20)),
    "a batch": Call(lambda lib: lib.model.generate(**lib.batch, max_new_tokens=12)),
}

test_generating = comparison(CALLS)
