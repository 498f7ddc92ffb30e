"""Loading models, processors and configurations, as users write it, here and in transformers."""

from tests.support.two_libraries import Call, comparison

CALLS = {
    "a folder": Call(lambda lib: lib.GraniteSpeechForConditionalGeneration.from_pretrained(lib.folder).dtype),
}

test_loading = comparison(CALLS)
