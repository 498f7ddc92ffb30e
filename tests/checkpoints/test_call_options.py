"""Options of transformers that change nothing here are accepted, and all others are refused by name."""

import pytest

from granite_speech.checkpoints.call_options import check_unused, pop_hub_options
from granite_speech.errors import InputError, UnsupportedError

ACCEPTED = [
    {},
    {"trust_remote_code": True, "code_revision": "abc", "weights_only": True},
    {"low_cpu_mem_usage": True, "resume_download": True, "local_dir_use_symlinks": False, "disable_mmap": True, "tqdm_class": None},
    {"offload_folder": "offload", "max_memory": {0: "20GB"}, "offload_state_dict": True, "offload_buffers": False},
    {"use_fast": False, "use_kernels": True, "experts_implementation": "grouped_mm", "config": object()},
    *(
        {"attn_implementation": one}
        for one in ("eager", "sdpa", "flash_attention_2", "flex_attention", None, "kernels-community/flash-attn")
    ),
    {"attn_implementation": {"text_config": "sdpa", "encoder_config": "eager"}, "_attn_implementation": "paged|sdpa"},
    {"use_safetensors": True, "safe_serialization": True, "save_original_format": False, "save_peft_format": True},
    dict.fromkeys(("quantization_config", "gguf_file", "proxies", "tp_plan", "device_mesh", "variant", "state_dict", "key_mapping")),
    {"load_in_8bit": False, "load_in_4bit": False, "from_tf": False, "from_flax": False, "output_loading_info": False},
]


@pytest.mark.parametrize("options", ACCEPTED, ids=lambda options: " ".join(options) or "none")
def test_options_without_effect_are_accepted(options):
    check_unused(options, "from_pretrained")


REFUSED = [
    ({"use_safetensors": False}, "use_safetensors=False", "pickle"),
    ({"safe_serialization": False}, "safe_serialization=False", "pickle"),
    ({"load_in_8bit": True}, "load_in_8bit=True", "quantize='int8'"),
    ({"load_in_4bit": 1}, "load_in_4bit=1", "quantize='int8'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config=", "quantize='int8'"),
    ({"tp_plan": "auto"}, "tp_plan='auto'", "one device"),
    ({"gguf_file": "a.gguf"}, "gguf_file", "safetensors"),
    ({"proxies": {"https": "a"}}, "proxies", "HTTPS_PROXY"),
    ({"key_mapping": {"a": "b"}}, "key_mapping", "load_state_dict"),
    ({"from_tf": True}, "from_tf=True", "safetensors"),
    ({"trust_remote_code": True, "variant": "fp16"}, "variant='fp16'", "Omit"),
]


@pytest.mark.parametrize(("options", "got", "remedy"), REFUSED, ids=[got for _, got, _ in REFUSED])
def test_options_with_an_effect_are_refused(options, got, remedy):
    with pytest.raises(UnsupportedError) as caught:
        check_unused(options, "from_pretrained")
    assert got in caught.value.got and "from_pretrained" in caught.value.got and remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("trust_remote_cod", "trust_remote_code"),
        ("revison", "revision"),
        ("torch_dtyp", "torch_dtype"),
        ("attn_implementaton", "attn_impl"),
    ],
)
def test_a_misspelled_option_is_refused_with_the_right_name(name, close):
    with pytest.raises(InputError, match=f"unknown option '{name}' for load.*Did you mean '{close}"):
        check_unused({name: None}, "load", known=("torch_dtype",))


def test_an_unknown_option_and_an_unknown_attention_are_refused():
    with pytest.raises(InputError, match=r"unknown option 'zzz' .*Remove it"):
        check_unused({"zzz": 1}, "load")
    for value in ("flash", 2, {"text_config": "flash"}):
        with pytest.raises(InputError, match=r"attn_implementation=.*eager, sdpa"):
            check_unused({"attn_implementation": value}, "load")


def test_the_hubs_options_are_taken_out():
    options = {"revision": "v1", "subfolder": "a", "use_auth_token": "t", "other": 1}
    assert pop_hub_options(options) == {"revision": "v1", "subfolder": "a", "token": "t"}
    assert options == {"other": 1}
    assert pop_hub_options({"use_auth_token": "old", "token": "new"}) == {"token": "new"}
