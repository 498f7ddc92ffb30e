"""Names of weights: all spellings found in files and state dicts, and the canonical one used here.

Canonical names are those of the released folders and of this package's modules:

    encoder.*                                        the conformer
    projector.*                                      the Q-Former
    language_model.model.{embed_tokens,layers,norm}  the Granite decoder
    language_model.lm_head.weight                    its head, if not tied to the embedding
    ctc_head.*                                       TurboCTC's head, if not tied to encoder.out
    <path of a linear layer>.lora_A.weight           (rank, in_features), and .lora_B.weight, (out_features, rank)

Other spellings, by version of transformers and peft:

    model.encoder.*, model.language_model.layers.*, lm_head.weight   the state dict of transformers 5.10 and later
    language_model.layers.*                                          the state dict of its GraniteSpeechModel
    language_model.model.model.layers.*                              a folder saved by 5.17 from a model built from its config;
                                                                     5.23 writes the canonical names there
    *.base_layer.weight, *.lora_A.<adapter>.weight                   a folder saved with a peft adapter attached
    base_model.model.<any of these>                                  peft's adapter files, and whole folders that 5.17 and 5.23 saved
                                                                     after loading a folder with an adapter
    language_base_model.model.model.model[.model].layers.*           the same, with a newer adapter file

A name is recognised by its anchor (`encoder`, `projector`, `language_model`, `lm_head`, `ctc_head`); any `model.` before or after it is
ignored. That is safe because no module below an anchor is called `model`, and it needs no guess about which program wrote
the file. Two names with the same canonical name are an error, so a file that mixes spellings is refused.
"""

import re
from collections.abc import Iterable

from granite_speech.errors import CheckpointError

__all__ = ["EMBEDDING", "HEAD", "TIED", "canonical", "canonical_keys", "canonical_path", "is_lora", "is_optional"]

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
TIED = {HEAD: EMBEDDING}

_WRAPPERS = re.compile(r"^(?:base_model\.)?(?:model\.)*")
_LANGUAGE_MODEL = re.compile(r"^language_(?:base_)?model\.(?:model\.)*")
_LORA = re.compile(r"\.lora_([AB])(?:\.[^.]+)?\.weight$")
# Constants that some versions stored. They are computed from the configuration.
_RECOMPUTED = re.compile(r"(?:^|\.)(?:attention_dists|position_ids|rotary_emb\.(?:original_)?inv_freq)$")


def canonical(key: str) -> str | None:
    """The canonical name of one weight.

    Args:
        key: a name from a file or a state dict, in any of the spellings above.

    Returns:
        The canonical name; None for a constant that is never loaded; an unknown name unchanged, for the caller to report.
        Applying the function twice changes nothing.
    """
    if _RECOMPUTED.search(key):
        return None
    name = canonical_path(key.replace(".base_layer.", "."))
    return key if name is None else _LORA.sub(r".lora_\1.weight", name)


def canonical_path(key: str) -> str | None:
    """The name from its anchor on, with the modules' names here and the rest unchanged; None without an anchor."""
    name = _WRAPPERS.sub("", key)
    inside = _LANGUAGE_MODEL.sub("", name)
    if inside.startswith("lm_head."):
        return f"language_model.{inside}"
    if inside != name:
        return f"language_model.model.{inside}"
    return name if name.startswith(("encoder.", "projector.", "ctc_head.")) else None


def canonical_keys(keys: Iterable[str]) -> dict[str, str]:
    """Canonical names of all weights in a checkpoint or state dict.

    Args:
        keys: the names there.

    Returns:
        Name there → canonical name, in the given order, without constants that are never loaded.

    Raises:
        CheckpointError: two names mean the same weight, as in a file with two adapters or two spellings.
    """
    names: dict[str, str] = {}
    given_by_canonical: dict[str, str] = {}
    for key in keys:
        name = canonical(key)
        if name is None:
            continue
        first = given_by_canonical.setdefault(name, key)
        if first != key:
            raise CheckpointError(
                got=f"{first!r} and {key!r} both name the weight {name!r}",
                expected="each weight once, and at most one adapter",
                remedy="Save the model again with one adapter, or remove one of the two from the file",
            )
        names[key] = name
    return names


def is_lora(key: str) -> bool:
    """Whether a name, canonical or not, is that of a LoRA matrix."""
    return _LORA.search(key) is not None


def is_optional(key: str) -> bool:
    """Whether a weight may be absent from a file: BatchNorm's step counter, which inference never reads, starts at 0."""
    return key.endswith(".num_batches_tracked")
