"""Texts that repeat themselves, as a model writes when it loops."""

import zlib

__all__ = ["compression_ratio", "repeats"]


def compression_ratio(text: str) -> float:
    """How many times smaller zlib makes a text in UTF-8, as whisper computes it; 0 for no text."""
    content = text.encode(errors="surrogatepass")  # half a surrogate pair, which UTF-8 has no form of, is three bytes
    return len(content) / len(zlib.compress(content)) if content else 0.0


def repeats(text: str, finish_reason: str, threshold: float | None) -> bool:
    """Whether an answer goes round in circles: the engine ended it for that, or it can be compressed too well.

    Args:
        text: of the answer.
        finish_reason: the engine's.
        threshold: highest compression ratio of a text that is taken; None: any.
    """
    return threshold is not None and (finish_reason == "repeated" or compression_ratio(text) > threshold)
