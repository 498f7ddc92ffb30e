"""transformers' options of `from_pretrained` and `save_pretrained` that change nothing here."""

from collections.abc import Mapping
from typing import Any

from granite_speech.errors import InputError

__all__ = ["check_unused"]

_WITHOUT_EFFECT = {
    "trust_remote_code",
    "code_revision",
    "use_fast",
    "low_cpu_mem_usage",
    "local_dir",
    "safe_serialization",
    "resume_download",
}


def check_unused(options: Mapping[str, Any], call: str) -> None:
    """Accept options that change nothing here, and refuse all others by name."""
    if unknown := sorted(options.keys() - _WITHOUT_EFFECT):
        raise InputError(
            got=f"unknown options {', '.join(unknown)} for {call}", expected="the options of transformers", remedy="Remove them"
        )
