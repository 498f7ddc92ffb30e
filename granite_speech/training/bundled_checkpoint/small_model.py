"""The architecture of the released models at a small size, for the bundled checkpoint."""

import torch

from granite_speech.config import GraniteSpeechConfig
from granite_speech.inputs.requests import PROMPT_3
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.training.seeds import seeded

__all__ = ["CHAT_TEMPLATE", "PROMPTS", "PROMPTS_OF_CARDS", "TASKS", "make_model", "make_tokenizer"]

AUDIO_TOKEN = "<|audio|>"
END_OF_TEXT, PAD = "<|end_of_text|>", "<|pad|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- message['content'] + '\\n' }}
{%- elif message['role'] == 'user' %}
{{- 'USER: ' + message['content'] + '\\n' }}
{%- elif message['role'] == 'assistant' %}
{{- ' ASSISTANT: ' + message['content'] + eos_token }}
{%- else %}
{{- raise_exception('unknown role ' + message['role']) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- ' ASSISTANT:' }}
{%- endif %}
"""
# Requests that people make of the released models; None is the one `transcribe` makes.
PROMPTS = (
    None,
    None,
    "transcribe the speech with proper punctuation and capitalization.",
    "transcribe the speech to text.",
    "please transcribe the following audio to text",
)
# Those, and as often the request of the 3.x model cards, which is in most code that people copy.
PROMPTS_OF_CARDS = (*PROMPTS, *[PROMPT_3] * len(PROMPTS))
# Nearly all of the sentences that it is trained on are shorter. In longer recordings it loses words.
WINDOW_SECONDS = 4.0
# Requests of `make_text_task`.
TASKS = ("write the digits as words:", "write the words as digits:", "repeat the words:", "clear up the stutter:")


def make_tokenizer() -> GraniteSpeechTokenizer:
    """Byte-level BPE with merges learned from the prompts only.

    Spoken words are then tokenized mostly into single characters, which a small model can learn to spell from sounds. If whole words were
    tokens, it would have to learn each one separately.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + 64, initial_alphabet=alphabet, show_progress=False)
    questions = [PROMPT_3, *filter(None, PROMPTS)]
    backend.train_from_iterator([f"USER: {one}\n ASSISTANT:" for one in (*questions, *TASKS)], trainer)
    special = [END_OF_TEXT, PAD, AUDIO_TOKEN]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    roles = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return GraniteSpeechTokenizer(backend, config | roles, CHAT_TEMPLATE)


def make_model(tokenizer: GraniteSpeechTokenizer, seed: int) -> GraniteSpeechForConditionalGeneration:
    """The architecture of the released models, small, with random weights and without an adapter."""
    config = GraniteSpeechConfig(
        encoder_config={
            "num_layers": 6,
            "hidden_dim": 160,
            "num_heads": 5,
            "dim_head": 32,
            "feedforward_mult": 2,
            "output_dim": 128,
            "context_size": 128,
            "max_pos_emb": 128,
            "dropout": 0.0,
        },
        projector_config={
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "encoder_hidden_size": 160,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={
            "vocab_size": tokenizer.backend.get_vocab_size(),
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 1 / 32,
            "residual_multiplier": 0.44,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        # 25 audio vectors per second, about two per spoken letter, so that no vector has to represent more than one letter. The released
        # models have 10 per second, and tokens that are pieces of words.
        window_size=8,
        downsample_rate=2,
        audio_token_index=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
        tie_word_embeddings=True,
        initializer_range=0.05,
        window_seconds=WINDOW_SECONDS,
    )
    with seeded(torch.device("cpu"), "weights", seed):
        model = GraniteSpeechForConditionalGeneration(config)
        # The encoder uses PyTorch's default initialization, which scales with a layer's width.
        for module in model.encoder.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model
