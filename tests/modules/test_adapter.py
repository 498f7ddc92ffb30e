"""The adapter compared with peft: ranks, scalings, products, gradients, merging, and refused options."""

import math
import warnings

import peft
import pytest
import torch
from torch import nn

from granite_speech.errors import CheckpointError, UnsupportedError
from granite_speech.modules.adapter import LoraLinear, attach_adapter, merge_adapter
from granite_speech.modules.adapter_config import AdapterConfig

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


class Layer(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.q_proj, self.v_proj = linear(24, 24), linear(24, 8, bias=False)


class Speech(nn.Module):
    """Layers at the paths of the released folders: language_model.model.layers.N."""

    def __init__(self, linear=nn.Linear, layers=12):
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        self.language_model.model.layers = nn.ModuleList(Layer(linear) for _ in range(layers))
        self.norm = nn.LayerNorm(8)


class From510(nn.Module):
    """The same layers at the paths of transformers 5.10 and later: model.language_model.layers.N."""

    def __init__(self, layers=12):
        super().__init__()
        self.model = nn.Module()
        self.model.language_model = nn.Module()
        self.model.language_model.layers = nn.ModuleList(Layer(nn.Linear) for _ in range(layers))


def by_peft(model, **options):
    """{path: (rank, scaling)} of the model as wrapped by peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(**{key: value for key, value in (PLAIN | options).items() if key != "peft_type"})
        )
    layers = {name: one for name, one in wrapped.base_model.model.named_modules() if isinstance(one, peft.tuners.lora.Linear)}
    return {name: (one.r["default"], one.scaling["default"]) for name, one in layers.items()}


PATTERNS = {
    "none": {},
    "rslora": {"use_rslora": True},
    "rank": {"rank_pattern": {"q_proj": 2}},
    "alpha": {"alpha_pattern": {"v_proj": 1.5}},
    "alpha zero and negative": {"alpha_pattern": {"q_proj": 0, "v_proj": -3}},
    "both, rslora": {"rank_pattern": {"layers.1.q_proj": 7}, "alpha_pattern": {"v_proj": 32}, "use_rslora": True},
    "layer 1 is not layer 11": {"rank_pattern": {"1.q_proj": 3}},
    "dots match any character": {"rank_pattern": {"layers.1.*q_proj": 3}},
    "regex": {"rank_pattern": {r"layers\.(0|2)\..*": 9, r"layers\.\d+\.v_proj": 5}, "alpha_pattern": {r".*\.1[01]\.[qv]_proj": 64}},
    "the first match decides": {"rank_pattern": {".*proj": 3, "q_proj": 5}},
    "not a suffix of a name": {"rank_pattern": {"proj": 3}, "alpha_pattern": {"_proj": 99}},
    "a whole path": {"rank_pattern": {"language_model.model.layers.3.q_proj": 6}},
    "from the start": {"rank_pattern": {r"^language_model\.model\.layers\.3\.q_proj": 6}, "alpha_pattern": {"^q_proj": 99}},
    "alternatives": {"rank_pattern": {"q_proj|nothing": 3}, "alpha_pattern": {"nothing|v_proj": 7}},
}


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_ranks_and_scalings_equal_those_of_peft(options):
    config = AdapterConfig.from_dict(PLAIN | options)
    expected = by_peft(Speech(), **options)
    assert len(expected) == 24
    assert {name: (config.rank(name), config.scaling(name)) for name in expected} == expected


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_pattern": {"model.language_model.layers.3.q_proj": 60}},
        {
            "alpha_pattern": {r"^model\.language_model\.layers\.1\d\..*": 60},
            "rank_pattern": {r"^model\.language_model\.layers\.3\.v_proj": 2},
        },
    ],
    ids=["a whole path", "from the start"],
)
def test_patterns_may_use_the_paths_of_newer_transformers(options):
    """The released folders do not have these paths. If such a pattern were ignored, the scaling would be wrong without an error."""
    config = AdapterConfig.from_dict(PLAIN | options)
    expected = by_peft(From510(), **options)
    assert len(set(expected.values())) > 1
    for path, values in expected.items():
        name = path.replace("model.language_model.", "language_model.model.")
        assert (config.rank(name), config.scaling(name)) == values


def test_files_written_by_peft_are_read():
    raw = peft.LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj"], lora_dropout=0.25, rank_pattern={"q_proj": 2}).to_dict()
    config = AdapterConfig.from_dict(raw)
    assert (config.r, config.lora_alpha, config.rank_pattern, config.lora_dropout) == (16, 8, {"q_proj": 2}, 0.25)
    assert config.raw is raw
    empty = AdapterConfig.from_dict({})
    assert (empty.r, empty.lora_alpha) == (peft.LoraConfig().r, peft.LoraConfig().lora_alpha)


def test_peft_reads_a_plain_configuration():
    config = AdapterConfig.plain(8, 16, ["q_proj"])
    assert config.scaling("q_proj") == 2.0
    theirs = peft.LoraConfig.from_peft_type(**config.raw)
    assert (theirs.r, theirs.lora_alpha, theirs.target_modules) == (8, 16, {"q_proj"})


# --- refused configurations ------------------------------------------------------------------------------------------------------

REFUSED = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "bias": "all",
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa_niter_4",
    "kasa_config": {"beta": 1.0},
    "layer_replication": [[0, 4], [2, 5]],
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "monteclora_config": {"x": 1},
    "peft_type": "IA3",
    "target_parameters": ["weight"],
    "trainable_token_indices": [5],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {"x": 1},
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_options_are_refused_by_name(name):
    with pytest.raises(UnsupportedError, match=name) as caught:
        AdapterConfig.from_dict(PLAIN | {name: REFUSED[name]})
    assert "erge the adapter" in caught.value.remedy


@pytest.mark.parametrize("kind", ["pissa", "olora", "corda", "loftq", "lora_ga"])
def test_initializations_that_change_the_base_weights_are_refused(kind):
    with pytest.raises(UnsupportedError, match=f"init_lora_weights='{kind}'"):
        AdapterConfig.from_dict(PLAIN | {"init_lora_weights": kind})


@pytest.mark.parametrize("kind", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_initializations_of_only_the_adapter_are_accepted(kind):
    assert AdapterConfig.from_dict(PLAIN | {"init_lora_weights": kind}).r == 4


def test_every_option_of_peft_is_known():
    """An option added by a new version must be checked: does it change the arithmetic?"""
    harmless = {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
        "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
        "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
        "target_modules", "task_type", "use_rslora",
    }  # fmt: skip
    assert set(peft.LoraConfig().to_dict()) - harmless <= set(REFUSED)


def test_one_error_names_all_refused_options():
    with pytest.raises(UnsupportedError, match=r"use_dora=True, bias='lora_only'"):
        AdapterConfig.from_dict(PLAIN | {"use_dora": True, "bias": "lora_only"})


@pytest.mark.parametrize(
    "name, value",
    [
        *(("r", value) for value in (0, -1, 1 << 20, 2.5, "8", None, True, [8])),
        *(("lora_alpha", value) for value in ("16", None, float("nan"), float("inf"), 10**400, True)),
        *(("rank_pattern", value) for value in ({"q_proj": 0}, {"q_proj": "4"}, ["q_proj"], 5, {"(": 4})),
        *(("alpha_pattern", value) for value in ({"q_proj": None}, {"q_proj": float("nan")}, "q_proj", {"[": 1.0})),
        *(("lora_dropout", value) for value in (1.0, -0.1, "0.1", float("nan"), True)),
    ],
    ids=lambda value: f"{value!r:.30}",
)
def test_invalid_values_are_refused_by_name(name, value):
    with pytest.raises(CheckpointError, match=name):
        AdapterConfig.from_dict(PLAIN | {name: value})


def test_attaching_to_anything_but_a_linear_layer_is_refused():
    config, model = AdapterConfig.from_dict(PLAIN), Speech(LoraLinear, 1)
    for name, message in (
        ("language_model.model.layers.9.q_proj", "not a module"),
        ("norm", "a LayerNorm"),
        ("", "a Speech"),
        ("norm.weight", "not a module"),
    ):
        with pytest.raises(UnsupportedError, match=f"an adapter for '{name}', .*{message}"):
            attach_adapter(model, config, [name])
    with pytest.raises(UnsupportedError, match="a Linear"):
        attach_adapter(Speech(nn.Linear, 1), config, ["language_model.model.layers.0.q_proj"])


def test_attaching_uses_the_patterns():
    model = Speech(LoraLinear, 2)
    config = AdapterConfig.from_dict(PLAIN | {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"1.q_proj": 1}, "lora_dropout": 0.5})
    names = [f"language_model.model.layers.{layer}.{proj}_proj" for layer in (0, 1) for proj in "qv"]
    attach_adapter(model, config, names[:3])
    modules = [model.get_submodule(name) for name in names]
    assert [one.lora_A.out_features for one in modules[:3]] == [4, 2, 4] and modules[3].lora_A is None
    assert [one.scaling for one in modules[:3]] == [1.5, 3.0, 0.25] and {one.lora_dropout for one in modules[:3]} == {0.5}
    assert {"language_model.model.layers.0.q_proj.lora_A.weight", "language_model.model.layers.0.q_proj.lora_B.weight"} <= set(
        model.state_dict()
    )


# --- arithmetic ------------------------------------------------------------------------------------------------------------------


def pair(rank=3, scaling_alpha=5, bias=True, dropout=0.0, dtype=torch.float32):
    """A LoraLinear and peft's layer with the same random weights."""
    torch.manual_seed(11)
    base = nn.Linear(20, 14, bias=bias, dtype=dtype)
    config = peft.LoraConfig(r=rank, lora_alpha=scaling_alpha, lora_dropout=dropout)
    theirs = peft.tuners.lora.Linear(base, "default", config, r=rank, lora_alpha=scaling_alpha)
    ours = LoraLinear(20, 14, bias=bias).to(dtype)
    ours.attach(rank, scaling_alpha / rank, dropout)
    with torch.no_grad():
        ours.weight.copy_(base.weight)
        if bias:
            ours.bias.copy_(base.bias)
        for mine, other in ((ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)):
            mine.weight.copy_(other["default"].weight.normal_())
    theirs.requires_grad_(True)
    return ours, theirs


def test_without_adapter_it_is_a_linear_layer():
    layer = LoraLinear(6, 4)
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer(x, torch.tensor([0, -1, 0, 0, -1], dtype=torch.int32)), layer(x))
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_a_new_adapter_changes_nothing():
    layer = LoraLinear(6, 4)
    x = torch.randn(5, 6)
    before = layer(x)
    layer.attach(2, 3.0)
    assert layer.lora_A.weight.abs().sum() > 0
    assert torch.allclose(layer(x), before, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (0,), (2, 3, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward_equal_those_of_peft(bias, shape, training):
    ours, theirs = pair(bias=bias)
    ours.train(training), theirs.train(training)
    x = torch.randn(*shape, 20, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = ours(x), theirs(y)
    assert out.shape == expected.shape == (*shape, 14)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(out)
    (out * weights).sum().backward(), (expected * weights).sum().backward()
    for mine, other in [
        (x, y),
        (ours.weight, theirs.base_layer.weight),
        (ours.lora_A.weight, theirs.lora_A["default"].weight),
        (ours.lora_B.weight, theirs.lora_B["default"].weight),
        *([(ours.bias, theirs.base_layer.bias)] if bias else []),
    ]:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_the_adapter_is_on_or_off_per_row():
    ours, _ = pair()
    x = torch.randn(6, 20)
    index = torch.tensor([0, -1, -1, 0, 0, -1], dtype=torch.int32)
    mixed = ours(x, index)
    bare = nn.functional.linear(x, ours.weight, ours.bias)
    with_adapter = index == 0
    assert torch.equal(mixed[~with_adapter], bare[~with_adapter])
    torch.testing.assert_close(mixed[with_adapter], ours(x[with_adapter]), rtol=1e-5, atol=1e-5)
    assert (mixed[with_adapter] - bare[with_adapter]).abs().amax(1).min() > 0.1
    for row in range(6):
        torch.testing.assert_close(ours(x[row : row + 1], index[row : row + 1]), mixed[row : row + 1], rtol=1e-5, atol=1e-5)
    mixed[~with_adapter].sum().backward()
    assert not ours.lora_A.weight.grad.any() and not ours.lora_B.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_merged_adapter_equals_an_attached_one(dtype):
    ours, theirs = pair(dtype=dtype)
    model = nn.Sequential(ours, LoraLinear(14, 3).to(dtype))
    x = torch.randn(9, 20, dtype=dtype)
    before = ours(x)
    merge_adapter(model)
    assert ours.lora_A is None and set(ours.state_dict()) == {"weight", "bias"} and "lora" not in ours.extra_repr()
    merge_adapter(model)  # has no effect
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(ours(x), before, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours(x, torch.full((9,), -1, dtype=torch.int32)), ours(x))
    theirs.merge()
    torch.testing.assert_close(ours.weight, theirs.base_layer.weight, rtol=tolerance, atol=tolerance)


# --- dropout ---------------------------------------------------------------------------------------------------------------------


def test_dropout_is_only_for_training():
    dropped, plain = pair(dropout=0.5)[0], pair()[0]
    x = torch.randn(7, 20)
    assert torch.equal(dropped.eval()(x), plain(x))
    assert not torch.equal(dropped.train()(x), dropped(x))


def test_dropout_equals_that_of_peft_with_the_same_seed():
    ours, theirs = pair(dropout=0.3)
    x = torch.randn(7, 20)
    torch.manual_seed(5)
    mine = ours.train()(x)
    torch.manual_seed(5)
    torch.testing.assert_close(mine, theirs.train()(x), rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_mean():
    ours, _ = pair(dropout=0.4)
    x = torch.randn(1, 20)
    expected = ours.eval()(x)
    samples = ours.train()(x.expand(40_000, 20))
    error = (samples.mean(0) - expected[0]).abs() / (samples.std(0) / math.sqrt(len(samples)))
    assert error.max() < 5, "standard errors from the result without dropout"


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_dropout_does_not_affect_rows_without_the_adapter(shape):
    ours, _ = pair(dropout=0.5)
    x = torch.randn(*shape, 20)
    index = torch.tensor([0, -1, -1, 0, 0, -1], dtype=torch.int32)
    out, again = ours.train()(x, index).view(6, 14), ours(x, index).view(6, 14)
    bare = nn.functional.linear(x, ours.weight, ours.bias).view(6, 14)
    assert torch.equal(out[index < 0], bare[index < 0])
    assert ((out != again).any(1) == (index == 0)).all() and ((out != bare).any(1) == (index == 0)).all()


# --- the rest --------------------------------------------------------------------------------------------------------------------


def test_a_second_adapter_has_its_own_scaling():
    ours, _ = pair()
    x = torch.randn(4, 20)
    ours(x)
    ours.attach(2, 10.0)
    nn.init.normal_(ours.lora_B.weight)
    expected = nn.functional.linear(x, ours.weight, ours.bias) + 10.0 * ours.lora_B(ours.lora_A(x))
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


def test_training_works_after_a_call_in_inference_mode():
    ours, _ = pair()
    x = torch.randn(4, 20)
    with torch.inference_mode():
        ours(x)
    ours(x).sum().backward()
    assert ours.lora_B.weight.grad.any()


def test_an_adapter_has_the_weights_dtype_and_device():
    layer = LoraLinear(6, 4).to(torch.bfloat16)
    layer.attach(2, 1.0)
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.bfloat16
    with torch.device("meta"):
        layer = LoraLinear(6, 4)
    layer.attach(2, 1.0)
    assert layer.lora_A.weight.is_meta and layer.lora_B.weight.is_meta


def test_the_printed_form_shows_the_adapter():
    layer = LoraLinear(6, 4, bias=False)
    assert layer.extra_repr() == "in_features=6, out_features=4, bias=False"
    layer.attach(2, 1.5)
    assert layer.extra_repr() == "in_features=6, out_features=4, bias=False, lora_rank=2, scaling=1.5, lora_linear=torch"
