"""Every parameter of transformers' public methods exists here by name, apart from a list with the reason for each."""

import inspect
from collections.abc import Iterator

import torch
import transformers

import granite_speech
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer

# The only reasons to leave a parameter or a method out.
MODALITY, REMOTE_CODE, DEVICES, DEPRECATED = "another modality", "code from the hub", "several devices", "deprecated"
MOST = 60  # parameters

NAMES = (
    "AutoConfig",
    "AutoFeatureExtractor",
    "AutoModelForSpeechSeq2Seq",
    "AutoProcessor",
    "AutoTokenizer",
    "Blip2QFormerConfig",
    "GraniteConfig",
    "GraniteSpeechCTCEncoder",
    "GraniteSpeechConfig",
    "GraniteSpeechEncoderConfig",
    "GraniteSpeechFeatureExtractor",
    "GraniteSpeechForConditionalGeneration",
    "GraniteSpeechModel",
    "GraniteSpeechPlusConfig",
    "GraniteSpeechPlusEncoderConfig",
    "GraniteSpeechPlusForConditionalGeneration",
    "GraniteSpeechProcessor",
)
PAIRS = {name: (getattr(granite_speech, name), getattr(transformers, name)) for name in NAMES} | {
    "GraniteSpeechTokenizer": (GraniteSpeechTokenizer, transformers.PreTrainedTokenizerFast),
    "GenerationConfig": (granite_speech.GenerationConfig, transformers.GenerationConfig),
}

# By parameter: why no method here has it.
PARAMETERS: dict[str, str] = {}

# By method: why a class here lacks it.
INTERNAL, WHOLE_MODEL = "transformers calls it, users do not", "the whole model has it, a part has not"
METHODS = {
    REMOTE_CODE: """get_possibly_dynamic_module is_custom_code is_remote_code load_custom_generate register_for_auto_class""",
    MODALITY: """create_mm_token_type_ids post_process_image_text_to_text replace_image_token replace_video_token
        resize_position_embeddings get_position_embeddings""",
    DEVICES: """barrier_after_gathered_checkpoint_save gather_sharded_state_dict_for_save init_parallel_plans maybe_distribute_model
        prepare_distribute_model save_distributed_checkpoint should_save_on_this_rank""",
    "Engine answers many requests at once": """continuous_batching_context_manager destroy_cached_continuous_batching_manager
        generate_batch init_continuous_batching""",
    "other models only": """dequantize get_correct_experts_implementation get_experts_implementation get_mtp_config
        parse_response get_response_parser heal_tokens""",
    "a tokenizer is trained with the library tokenizers": """train_new_from_iterator convert_added_tokens convert_to_native_format
        update_post_processor set_truncation_and_padding save_chat_templates""",
    WHOLE_MODEL: """active_adapters add_adapter can_generate delete_adapter disable_adapters enable_adapters enable_peft_hotswap
        get_adapter_state_dict get_decoder get_encoder get_input_embeddings get_output_embeddings init_weights initialize_weights
        load_adapter resize_token_embeddings set_adapter set_decoder set_encoder set_input_embeddings set_output_embeddings
        tie_weights""",
    INTERNAL: """adjust_generation_fn check_argument_for_proper_class convert_rope_params_to_dict default_config_fields dict_dtype_to_str
        generation_config_class get_compiled_call get_correct_attn_implementation get_expanded_tied_weights_keys
        get_init_context get_text_with_replacements is_backend_compatible
        mark_tied_weights_as_initialized named_non_persistent_buffers nested_rope_parameter_keys prepare_inputs_layout replace_audio_token
        retrieve_modules_from_names standardize_rope_params valid_processor_kwargs validate_architecture
        validate_init_kwargs validate_inputs validate_layer_type validate_output_attentions validate_rope validate_token_ids
""",
}


def methods(theirs: type) -> Iterator[str]:
    """transformers' own public methods of a class, constructor and call included."""
    for name in dir(theirs):
        inherited = issubclass(theirs, torch.nn.Module) and getattr(torch.nn.Module, name, None) is getattr(theirs, name)
        if (not name.startswith("_") or name in ("__init__", "__call__")) and callable(getattr(theirs, name)) and not inherited:
            yield name


def parameters(method: object) -> set[str]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name for name, one in inspect.signature(method).parameters.items() if one.kind not in variable}


def left_out() -> list[tuple[str, str, str]]:
    """Class, method and parameter of each that is missing here."""
    found = []
    for name, (ours, theirs) in PAIRS.items():
        for method in methods(theirs):
            if hasattr(ours, method):
                missing = parameters(getattr(theirs, method)) - parameters(getattr(ours, method))
                found += [(name, method, one) for one in sorted(missing)]
    return found


def test_parameters_that_are_left_out():
    found = left_out()
    assert {one for _, _, one in found} == set(PARAMETERS), found
    assert set(PARAMETERS.values()) <= {MODALITY, REMOTE_CODE, DEVICES, DEPRECATED}
    assert len(found) <= MOST


def test_methods_that_are_left_out():
    found = {method for ours, theirs in PAIRS.values() for method in methods(theirs) if not hasattr(ours, method)}
    assert found == set(" ".join(METHODS.values()).split())
    for name in METHODS[WHOLE_MODEL].split():
        assert hasattr(granite_speech.GraniteSpeechForConditionalGeneration, name)
