"""Options of training: immutable, and checked when created. The command line reads the defaults here, so this does not import torch."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from granite_speech.config_values import integer, number, optional, shown
from granite_speech.errors import InputError

__all__ = ["CTC_PARTS", "PARTS", "FinetuneOptions", "TrainerOptions"]

PARTS = ("encoder", "projector", "adapter", "language_model")
CTC_PARTS = ("encoder", "adapter")  # of a model without a language model; its head is part of the encoder
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# The projections of the language model, or of a CTC model's encoder.
TARGETS = (*_ATTENTION, "gate_proj", "up_proj", "down_proj", "linear1", "linear2", "pointwise_lin1", "pointwise_lin2")

_POSITIVE, _STEPS = number(0.0, 1e9, open_low=True), integer(0, 1 << 40)


def _names(known: tuple[str, ...]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        right = isinstance(value, tuple) and value and all(isinstance(one, str) for one in value) and set(value) <= set(known)
        return None if right and len(set(value)) == len(value) else f"some of {', '.join(known)}, each once"

    return check


def _dtype(value: Any) -> str | None:
    return None if value in (None, "float32", "bfloat16") else "float32 or bfloat16 (float16 would need its losses scaled)"


def _option(default: Any, check: Callable[[Any], str | None], kind: type, meaning: str) -> Any:
    """A field with its check, and the type and help text that the command line shows."""
    return field(default=default, metadata={"check": check, "kind": kind, "help": meaning})


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """Length, learning rate, and checkpoint and validation intervals.

    Raises:
        InputError: an invalid value.
    """

    epochs: int = _option(3, integer(1, 1 << 20), int, "passes over the manifest")
    steps: int | None = _option(None, optional(integer(1, 1 << 40)), int, "optimizer steps, instead of epochs")
    accumulate: int = _option(1, integer(1, 1 << 20), int, "batches per step, equivalent to one batch of their total size")
    learning_rate: float = _option(1e-4, _POSITIVE, float, "AdamW's learning rate at its peak")
    warmup: float = _option(0.1, number(0.0, 1.0), float, "fraction of steps in which the learning rate rises; then it falls as a cosine")
    beta2: float = _option(0.999, number(0.0, 1.0, open_high=True), float, "AdamW's beta2: a lower value forgets a rough start sooner")
    weight_decay: float = _option(0.01, number(0.0, 1e3), float, "weight decay of matrices; biases and norms have none")
    clip_norm: float = _option(1.0, _POSITIVE, float, "largest gradient norm; larger gradients are scaled down")
    seed: int = _option(0, integer(0, 1 << 62), int, "seed of the order, dropout and a new adapter")
    checkpoint_every: int = _option(100, _STEPS, int, "steps between training checkpoints; 0: only at the end")
    validate_every: int = _option(0, _STEPS, int, "steps between validations; 0: only before and after training")

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, list):  # JSON has no tuples
                object.__setattr__(self, one.name, tuple(value))
            if expected := one.metadata["check"](getattr(self, one.name)):
                raise InputError(
                    got=f"{one.name} = {shown(value)}", expected=expected, remedy=f"Correct {one.name}: {one.metadata['help']}"
                )

    def identity(self) -> dict[str, Any]:
        """The values that affect the losses, ready for JSON. A run is only resumed with the same ones."""
        values = {name: value for name, value in asdict(self).items() if name not in ("checkpoint_every", "validate_every")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainerOptions):
    """`TrainerOptions`, plus which parts train, the batch size, the CTC loss and a new adapter.

    Raises:
        InputError: an invalid value, or a CTC weight without training the encoder.
    """

    train: tuple[str, ...] | None = _option(
        None,
        optional(_names((*PARTS, "all"))),
        tuple,
        f"parts to train: {', '.join(PARTS)}, or all (default: projector,adapter, or encoder of a CTC model)",
    )
    batch_seconds: float = _option(60.0, _POSITIVE, float, "most seconds of audio in a batch")
    ctc_weight: float = _option(0.0, number(0.0, 1e6), float, "weight of the encoder's CTC loss; the language model's loss has weight 1")
    ctc_middle: float | None = _option(
        None, optional(number(0.0, 1.0)), float, "weight of the encoder's middle prediction in the CTC loss (default: 0.5)"
    )
    lora_rank: int = _option(64, integer(1, 1 << 16), int, "rank of the adapter added to a model without one")
    lora_alpha: float = _option(32.0, _POSITIVE, float, "alpha of a new adapter, whose scaling is alpha / rank")
    lora_targets: tuple[str, ...] = _option(("q_proj", "v_proj"), _names(TARGETS), tuple, "projections that a new adapter changes")
    dtype: str | None = _option(None, _dtype, str, "float32 or bfloat16, for the computation (default: bfloat16 on a GPU, else float32)")

    def __post_init__(self):
        super().__post_init__()
        if self.ctc_weight and "encoder" not in self.parts:
            raise InputError(
                got=f"ctc_weight = {self.ctc_weight:g} with train = {','.join(self.parts)}",
                expected="encoder in train: the CTC loss has no effect on other parts",
                remedy="Add encoder to train, or set ctc_weight to 0",
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that train of a model with a language model, with "all" expanded."""
        chosen = self.train or ("projector", "adapter")
        return PARTS if "all" in chosen else chosen

    @property
    def ctc_parts(self) -> tuple[str, ...]:
        """The parts that train of a CTC model, with "all" expanded.

        Raises:
            InputError: parts, or values of other options, that such a model does not have.
        """
        parts = f"some of {', '.join(CTC_PARTS)}, or all"
        for name, is_wrong, expected in (
            ("train", not set(self.train or ()) <= {*CTC_PARTS, "all"}, parts),
            ("ctc_weight", self.ctc_weight, "none: the only loss is CTC's"),
            ("ctc_middle", self.ctc_middle is not None, "none: the loss is that of the last layer, as in transformers"),
        ):
            if is_wrong:
                raise InputError(
                    got=f"{name} = {shown(getattr(self, name))} for a model without a language model",
                    expected=expected,
                    remedy=f"Correct or omit {name}",
                )
        chosen = self.train or ("encoder",)
        return CTC_PARTS if "all" in chosen else chosen
