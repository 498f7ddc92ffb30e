"""State that outlives a call: partly loaded weights, the headless model and its hooks, a cache after an error, lazy outputs."""

import copy
import pickle
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from granite_speech import GraniteSpeechForConditionalGeneration
from granite_speech.errors import InputError
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.outputs import CausalLMOutputWithPast, Lazy
from granite_speech.modules.packing import Segments
from granite_speech.modules.rows import Rows
from tests.support.small_models import batch, small_model

CPU = torch.device("cpu")
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def tied_model() -> GraniteSpeechForConditionalGeneration:
    config = copy.deepcopy(small_model().config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    return GraniteSpeechForConditionalGeneration(config).eval()


def continued(model, inputs, cache) -> Tensor:
    """Logits of one more token in each row, from the cache."""
    ids = torch.full((len(inputs["input_ids"]), 1), 7)
    return model(input_ids=ids, past_key_values=cache).logits


# --- partial loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder.out.bias", EMBEDDING, HEAD, "lm_head.weight", "model.language_model.embed_tokens.weight"])
def test_part_of_a_tied_models_weights_can_be_loaded(name):
    model = tied_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    canonical = {"lm_head.weight": HEAD, "model.language_model.embed_tokens.weight": EMBEDDING}.get(name, name)
    new = torch.randn_like(before[canonical])
    result = model.load_state_dict({name: new}, strict=False)
    changed = {EMBEDDING, HEAD} if canonical in (EMBEDDING, HEAD) else {canonical}
    for key, value in model.state_dict().items():
        assert torch.equal(value, new if key in changed else before[key]), key
    assert not result.unexpected_keys
    assert set(result.missing_keys) == {key for key in before if key not in changed and not key.endswith("num_batches_tracked")}


def test_strict_loading_requires_all_weights():
    with pytest.raises(RuntimeError, match="Missing key"):
        tied_model().load_state_dict({"encoder.out.bias": torch.zeros(16)})


# --- the headless model ----------------------------------------------------------------------------------------------------------


def test_the_headless_model_is_one_object_and_its_hooks_run():
    model = small_model()
    inputs = batch(model)
    assert model.model is model.model
    seen = []
    hook = model.model.register_forward_hook(lambda module, given, output: seen.append(output.last_hidden_state.shape))
    with torch.no_grad():
        expected = small_model()(**inputs).logits
        assert torch.equal(model(**inputs).logits, expected)
    assert seen == [(*inputs["input_ids"].shape, 32)]
    hook.remove()
    model(**inputs)
    assert len(seen) == 1


def test_a_hook_can_replace_the_states():
    model = small_model()
    inputs = batch(model)

    def halve(module, given, output):
        output.last_hidden_state = output.last_hidden_state / 2
        return output

    with torch.no_grad():
        expected = model(**inputs).logits / 2
        model.model.register_forward_hook(halve)
        torch.testing.assert_close(model(**inputs).logits, expected)


def test_the_headless_model_follows_its_owner():
    model = small_model()
    headless = model.model
    model.train()
    assert headless.training and headless.encoder.training
    model.eval()
    assert not headless.training
    model.encoder = copy.deepcopy(model.encoder)
    assert model.model is headless and headless.encoder is model.encoder


def test_the_headless_model_adds_no_names():
    model = small_model()
    names = set(model.state_dict()), [name for name, _ in model.named_modules()], repr(model)
    assert model.model is not None
    assert names == (set(model.state_dict()), [name for name, _ in model.named_modules()], repr(model))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_have_their_own_headless_model(way):
    model = small_model()
    assert model.model.encoder is model.encoder
    copied = way(model)
    assert copied.model is not model.model and copied.model.encoder is copied.encoder is not model.encoder


# --- the cache -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_a_cache_can_be_continued_in_another_gradient_mode(first, later):
    """Before and after its pools have grown."""
    model = small_model()
    inputs = batch(model)

    def run(first, later) -> list[Tensor]:
        with first():
            cache = model(**inputs, use_cache=True).past_key_values
            logits = [continued(model, inputs, cache)]
        for _ in range(2):
            with later():
                logits.append(continued(model, inputs, cache))
            with first():
                cache.reserve([length + 100 for length in cache.lengths])
        return logits

    for mine, expected in zip(run(first, later), run(torch.no_grad, torch.no_grad), strict=True):
        assert torch.equal(mine, expected)


class OutOfMemory:
    """Allows some allocations of pools and fails on the next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int):
        self.left = allowed
        allocate = Tensor.new_empty

        def new_empty(tensor: Tensor, *size, **options) -> Tensor:
            if tensor.dim() == 4:
                if self.left == 0:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                self.left -= 1
            return allocate(tensor, *size, **options)

        monkeypatch.setattr(Tensor, "new_empty", new_empty)


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_a_cache_is_intact_after_running_out_of_memory(monkeypatch, allowed):
    config = small_model().config.text_config  # two layers: four pools
    cache, truth = (
        PagedCache(config, 2, dtype=torch.float32, device=CPU, page_size=4),
        PagedCache(config, 2, dtype=torch.float32, device=CPU, page_size=4),
    )

    def write(cache: PagedCache, new: tuple[int, ...]) -> None:
        step = cache.begin(Segments(new, CPU))
        for layer in range(2):
            keys = torch.arange(sum(new) * 16.0).view(-1, 2, 8) + 1000 * layer + 100 * sum(cache.lengths)
            step.write(layer, keys, -keys)

    for one in (cache, truth):
        write(one, (3, 5))
    with monkeypatch.context() as patch:
        OutOfMemory(patch, allowed)
        with pytest.raises(torch.OutOfMemoryError):
            cache.begin(Segments((30, 1), CPU))
    assert cache.lengths == [3, 5]
    for new in ((30, 1), (2, 40)):
        for one in (cache, truth):
            write(one, new)
    assert cache.lengths == truth.lengths == [35, 46]
    for layer in range(2):
        for pools, expected in ((cache.keys, truth.keys), (cache.values, truth.values)):
            for row, length in enumerate(cache.lengths):
                assert torch.equal(rows_of(cache, pools[layer], row, length), rows_of(truth, expected[layer], row, length))


def rows_of(cache: PagedCache, pool: Tensor, row: int, length: int) -> Tensor:
    return pool[torch.tensor(cache._pages[row])].flatten(0, 1)[:length]


@pytest.mark.parametrize("where", ["the cache", "a layer"])
def test_a_failed_call_can_be_repeated(monkeypatch, where):
    model = small_model()
    inputs = batch(model)
    with torch.no_grad():
        cache, truth = (model(**inputs, use_cache=True).past_key_values for _ in range(2))
        expected = continued(model, inputs, truth)
        long = {"input_ids": torch.full((3, 70), 7), "past_key_values": cache}  # needs more pages than the cache has
        with monkeypatch.context() as patch:
            if where == "the cache":
                OutOfMemory(patch, 1)
            else:
                patch.setattr(model.decoder.layers[1].mlp, "forward", Mock(side_effect=torch.OutOfMemoryError("CUDA")))
            with pytest.raises(torch.OutOfMemoryError):
                model(**long)
        assert torch.equal(continued(model, inputs, cache), expected)
        assert (cache.lengths, cache.columns, cache.next_positions) == (truth.lengths, truth.columns, truth.next_positions)


# --- outputs ---------------------------------------------------------------------------------------------------------------------


def rows_of_head(model, monkeypatch) -> list[int]:
    """Takes the number of rows of every product with the head's weight."""
    rows, linear = [], nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is model.lm_head.weight:
            rows.append(x.shape[:-1].numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    return rows


def test_fields_are_padded_only_when_they_are_read(monkeypatch):
    model = small_model()
    inputs = batch(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    heads = rows_of_head(model, monkeypatch)
    padded, pad = [], Rows.pad
    monkeypatch.setattr(Rows, "pad", lambda rows, packed: padded.append(packed.shape) or pad(rows, packed))
    output = model(**inputs, labels=labels, output_hidden_states=True)
    output.loss.backward()
    assert padded == [] and heads == [int(inputs["attention_mask"].sum())]
    lazy = {name for name, value in vars(output).items() if isinstance(value, Lazy)}
    assert lazy == {"logits", "hidden_states", "audio_hidden_states"}
    assert output[0] is output.loss and padded == [], "one field is read by position without the others"
    assert output.logits.shape[:2] == inputs["input_ids"].shape and output.logits is output["logits"] is output[1]
    assert len(output.hidden_states) == len(padded) == 3
    assert not output.logits[inputs["attention_mask"] == 0].any()


def test_logits_to_keep_reduces_the_heads_work(monkeypatch):
    model = small_model()
    inputs = batch(model)
    heads = rows_of_head(model, monkeypatch)
    with torch.no_grad():
        whole = model(**inputs).logits
        width = whole.shape[1]
        kept = [
            1,
            3,
            width,
            width + 5,
            torch.tensor([0]),
            torch.tensor([width - 1, 2, 2, 0]),
            torch.tensor([-1]),
            torch.tensor([], dtype=int),
        ]
        kept.append(torch.arange(width) % 2 == 0)
        for one in kept:
            columns = slice(-one, None) if isinstance(one, int) else one
            logits = model(**inputs, logits_to_keep=one).logits
            torch.testing.assert_close(logits, whole[:, columns], rtol=1e-5, atol=1e-5)
            assert heads[-1] == int(inputs["attention_mask"][:, columns].sum())


def test_a_lazy_field_keeps_the_gradient_mode_of_its_call():
    model, inputs = small_model(), batch(small_model())
    output = model(**inputs)
    with torch.no_grad():
        assert output.logits.requires_grad
    output = model(**inputs)
    with torch.inference_mode():
        logits = output.logits
    logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    with torch.no_grad():
        output = model(**inputs)
    assert not output.logits.requires_grad


@pytest.mark.parametrize("way", [copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))], ids=["deepcopy", "pickle"])
def test_an_output_can_be_copied_before_it_is_read(way):
    model, inputs = small_model(), batch(small_model())
    with torch.no_grad():
        output, expected = model(**inputs, use_cache=False), model(**inputs, use_cache=False)
    assert torch.equal(way(output).logits, expected.logits)


def test_reading_an_output_does_not_change_its_fields():
    model, inputs = small_model(), batch(small_model())
    with torch.no_grad():
        output = model(**inputs)
        inner = model.model(**inputs)
    assert output.keys() == ["logits", "past_key_values", "audio_hidden_states"]
    assert inner.keys() == ["last_hidden_state", "past_key_values", "audio_hidden_states"]
    assert all(isinstance(one, Tensor | PagedCache) for one in (*output.to_tuple(), *inner.values()))
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize("change", [lambda model: model.train(), lambda model: model.to(torch.float64)], ids=["train", "to"])
def test_memory_of_finished_requests_is_given_back(change):
    model = small_model()
    model.generate(**batch(model), max_new_tokens=2)
    assert model.runtime.pool.total > 1 and model.runtime.state is not None
    change(model)
    assert model.runtime.pool is None and model.runtime.state is None


# --- outputs as dictionaries -----------------------------------------------------------------------------------------------------


def test_an_output_is_a_dictionary_that_computes_only_what_is_read():
    computed = []
    output = CausalLMOutputWithPast(loss=torch.ones(()), logits=Lazy(lambda: computed.append(1) or torch.zeros(2)))
    assert isinstance(output, dict) and list(output) == ["loss", "logits"] and len(output) == 2 and next(reversed(output)) == "logits"
    assert output.get("loss") == 1 and output.get("attentions", 5) == 5 and not computed
    for copied in (
        {**output},
        dict(output),
        dict(output.items()),
        output.copy(),
        type(output)(dict(output)),
        type(output)(iter(output.items())),
    ):
        assert list(copied) == ["loss", "logits"] and torch.equal(copied["logits"], torch.zeros(2))
    assert computed == [1]
    output["loss"] = None
    assert output.loss is None and list(output) == ["logits"]
    with pytest.raises(KeyError):
        output["unknown"] = 1


@pytest.mark.parametrize("change", [lambda output: output.pop("loss"), lambda output: output.update(loss=1), lambda output: output | {}])
def test_the_keys_of_an_output_cannot_be_changed(change):
    with pytest.raises(InputError, match="dict\\(output\\)"):
        change(CausalLMOutputWithPast(loss=torch.ones(())))
