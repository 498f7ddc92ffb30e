"""What training is told: frozen, checked when it is built, and free of torch, so that the command line can ask it for its defaults."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from granite_speech.config_values import integer, number, optional, shown
from granite_speech.errors import InputError

__all__ = ["PARTS", "FinetuneOptions", "TrainerOptions"]

PARTS = ("encoder", "projector", "adapter", "language_model")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_POSITIVE, _STEPS = number(0.0, 1e9, open_low=True), integer(0, 1 << 40)


def _names(known: tuple[str, ...]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        right = isinstance(value, tuple) and value and all(isinstance(one, str) for one in value) and set(value) <= set(known)
        return None if right and len(set(value)) == len(value) else f"some of {', '.join(known)}, each once"

    return check


def _dtype(value: Any) -> str | None:
    return None if value in (None, "float32", "bfloat16") else "float32 or bfloat16 (float16 would need its losses scaled)"


def _option(default: Any, check: Callable[[Any], str | None], kind: type, meaning: str) -> Any:
    """A field with its check, and what a command line needs: the type of one value, and what it means."""
    return field(default=default, metadata={"check": check, "kind": kind, "help": meaning})


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How the loop goes: how long, how fast, and how often it looks up.

    Raises:
        InputError: a value that no training can use.
    """

    epochs: int = _option(3, integer(1, 1 << 20), int, "passes over the manifest")
    steps: int | None = _option(None, optional(integer(1, 1 << 40)), int, "optimizer steps, in place of epochs")
    accumulate: int = _option(1, integer(1, 1 << 20), int, "batches whose gradients make one step; as one batch of their size")
    learning_rate: float = _option(1e-4, _POSITIVE, float, "at its peak, AdamW's")
    warmup: float = _option(0.1, number(0.0, 1.0), float, "part of all steps in which the rate rises; it then falls as a cosine")
    beta2: float = _option(0.999, number(0.0, 1.0, open_high=True), float, "AdamW's second: lower forgets a rough beginning sooner")
    weight_decay: float = _option(0.01, number(0.0, 1e3), float, "of matrices; biases and norms are not decayed")
    clip_norm: float = _option(1.0, _POSITIVE, float, "gradients are scaled down to this norm at most")
    seed: int = _option(0, integer(0, 1 << 62), int, "of the order, dropout and a fresh adapter")
    checkpoint_every: int = _option(100, _STEPS, int, "steps between checkpoints of the training; 0: one at the end")
    validate_every: int = _option(0, _STEPS, int, "steps between validations; 0: one before and one after")

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, list):  # what JSON has in place of a tuple
                object.__setattr__(self, one.name, tuple(value))
            if expected := one.metadata["check"](getattr(self, one.name)):
                raise InputError(
                    got=f"{one.name} = {shown(value)}", expected=expected, remedy=f"Correct {one.name}: {one.metadata['help']}"
                )

    def identity(self) -> dict[str, Any]:
        """The values that decide what is learned, ready for JSON: two runs that differ in them have different losses."""
        values = {name: value for name, value in asdict(self).items() if name not in ("checkpoint_every", "validate_every")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainerOptions):
    """`TrainerOptions`, and what of a model is tuned, and on how much at once.

    Raises:
        InputError: a value that no training can use, or a CTC weight for an encoder that does not train.
    """

    train: tuple[str, ...] = _option(
        ("projector", "adapter"), _names((*PARTS, "all")), str, f"what trains: {', '.join(PARTS)}, or all that the model has"
    )
    batch_seconds: float = _option(60.0, _POSITIVE, float, "seconds of audio in a batch at most")
    ctc_weight: float = _option(0.0, number(0.0, 1e6), float, "of the encoder's CTC loss, beside 1 for the language model's")
    ctc_middle: float = _option(0.5, number(0.0, 1.0), float, "share of the CTC loss that the encoder's middle prediction has")
    lora_rank: int = _option(64, integer(1, 1 << 16), int, "of a fresh adapter, which a model without one gets")
    lora_alpha: float = _option(32.0, _POSITIVE, float, "of a fresh adapter, whose scaling is alpha / rank")
    lora_targets: tuple[str, ...] = _option(("q_proj", "v_proj"), _names(TARGETS), str, "the projections that a fresh adapter changes")
    dtype: str | None = _option(None, _dtype, str, "float32 or bfloat16, of the computation (default: bfloat16 on a GPU, else float32)")

    def __post_init__(self):
        super().__post_init__()
        if self.ctc_weight and "encoder" not in self.parts:
            raise InputError(
                got=f"ctc_weight = {self.ctc_weight:g} with train = {','.join(self.train)}",
                expected="an encoder that trains: the CTC loss reaches nothing else",
                remedy="Add encoder to train, or leave ctc_weight at 0",
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """What trains, with "all" spelled out."""
        return PARTS if "all" in self.train else self.train
