"""What a request saves when others have begun with the same tokens: counted by an engine, and computed for the released shapes.

Only whole pages are shared, so of 45 tokens before the audio, 32 are. Nothing is timed.
"""

from typing import Any

import torch

from bench import shapes
from granite_speech import Engine, GraniteSpeechConfig, GraniteSpeechForConditionalGeneration

__all__ = ["measure", "table"]

# Tokens before the audio, the same in all requests, and tokens after it.
BEFORE, AFTER = 45, 16
REQUESTS = 4
# Models, and whether they have an adapter.
MODELS = {"4.1-2b": False, "3.3-2b": True}
# The model that counts has the released projector's tokens per second. Nothing else in it matters.
SMALL: dict[str, Any] = {
    "encoder_config": {"num_layers": 1, "hidden_dim": 32, "num_heads": 2, "dim_head": 16, "output_dim": 20},
    "projector_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    | {"encoder_hidden_size": 32},
    "text_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    | {"intermediate_size": 32, "vocab_size": 100},
    "audio_token_index": 99,
}


def measure() -> dict[str, Any]:
    """Count tokens with a small random model, and compute what that saves the released ones."""
    torch.manual_seed(0)
    model = GraniteSpeechForConditionalGeneration(GraniteSpeechConfig(**SMALL)).eval()
    frames = shapes.CLIP_SECONDS * shapes.FRAMES_A_SECOND
    audio = model.projector.tokens(frames)
    before, *after = (torch.randint(0, model.config.audio_token_index, (count,)) for count in (BEFORE, *[AFTER] * REQUESTS))
    prompts = [torch.cat((before, torch.full((audio,), model.config.audio_token_index), one)).unsqueeze(0) for one in after]
    with Engine(model, None) as engine:
        for ids in prompts:  # one by one: the pages of the first one must be complete
            features = torch.randn(1, frames, model.config.encoder_config.input_dim)
            engine.submit(inputs={"input_ids": ids, "input_features": features}, max_new_tokens=1).result()
        counters = engine.counters()
    shared, left = divmod(counters.shared_tokens, REQUESTS - 1)
    assert left == 0, f"{counters.shared_tokens} shared tokens in {REQUESTS - 1} requests"
    prefill = (counters.prompt_tokens + counters.shared_tokens) // REQUESTS  # the decode step runs the last token
    return {
        "tokens": {"before": BEFORE, "audio": audio, "after": AFTER, "shared": shared, "prefill": prefill, "page": engine.page_size},
        "models": {name: _saved(name, shared, prefill) for name in MODELS},
    }


def _saved(name: str, shared: int, prefill: int) -> dict[str, float]:
    """Of a released shape in bfloat16: keys and values of the shared tokens, and the FLOPs of its language model's layers."""
    model = shapes.build(name, adapter=MODELS[name], device=torch.device("meta"))
    text = model.config.text_config
    numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * text.attention_head_dim
    weights = sum(weight.numel() for weight in model.language_model.model.layers.parameters() if weight.dim() > 1)
    width = text.num_hidden_layers * text.num_attention_heads * text.attention_head_dim

    def flops(tokens: int) -> int:
        """Of the first tokens: each has a product with every weight, and two with all keys up to its own."""
        return 2 * weights * tokens + 4 * width * tokens * (tokens + 1) // 2

    return {
        "bytes": shared * numbers * model.dtype.itemsize,
        "flops": flops(shared),
        "share_of_prefill": flops(shared) / flops(prefill),
    }


def table(found: dict[str, Any]) -> str:
    """Markdown of what is saved."""
    tokens = found["tokens"]
    lines = [
        f"Prefix sharing, counted and computed, not timed: prompts of {tokens['before']} shared tokens, {tokens['audio']} of audio "
        f"({shapes.CLIP_SECONDS} s) and {tokens['after']} of text. Only whole pages of {tokens['page']} tokens are shared, so "
        f"{tokens['shared']} of {tokens['before']}. Each request after the first saves:",
        "",
        "| model | keys and values, bfloat16 | FLOPs in the language model's layers | of its prefill |",
        "|---|---|---|---|",
    ]
    for name, saved in found["models"].items():
        size, work = f"{saved['bytes'] / 1e6:.2f} MB", f"{saved['flops'] / 1e9:.0f} GFLOP"
        lines.append(f"| {name} | {size} | {work} | {saved['share_of_prefill']:.0%} |")
    return "\n".join(lines)
