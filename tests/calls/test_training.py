"""Losses and gradients, as training code computes them, here and in transformers."""

from typing import Any

import pytest
import torch

from tests.support.two_libraries import PROMPT, WORDS, Call, Library, comparison, library

ANSWER = 8  # tokens at the end of a prompt that are trained on


def labelled(lib: Library) -> dict[str, Any]:
    """One prompt with a clip, and labels for its last tokens."""
    inputs = lib.inputs
    inputs.pop("input_features_lengths", None)  # transformers does not know it
    labels = inputs["input_ids"].clone()
    labels[:, :-ANSWER] = -100
    return inputs | {"labels": labels}


def gradients(lib: Library, model: Any, *names: str) -> list[torch.Tensor]:
    """Gradients of the weights whose names end like these."""
    found = dict(model.named_parameters())
    return [next(one.grad for name, one in found.items() if name.endswith(end)) for end in names]


# The encoder's names are the same in both packages.
WEIGHTS = ("encoder.layers.0.ff1.up_proj.weight", "encoder.layers.5.attn.to_q.weight", "encoder.input_linear.weight")


def trainable(lib: Library) -> Any:
    """A model of which everything is trained; transformers freezes a checkpoint with an adapter when it loads it."""
    return lib.new_model().requires_grad_(True)


def backward(lib: Library) -> list[torch.Tensor]:
    model = trainable(lib)
    model(**labelled(lib)).loss.backward()
    return gradients(lib, model, *WEIGHTS)


def two_steps(lib: Library) -> list[torch.Tensor]:
    """Losses of two steps of SGD on the language model."""
    model = lib.new_model()
    for name, one in model.named_parameters():
        one.requires_grad_("language_model" in name and "lora" not in name)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(**labelled(lib)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def clipped(lib: Library) -> float:
    model = trainable(lib)
    model(**labelled(lib)).loss.backward()
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))


def trained_mode(lib: Library) -> torch.Tensor:
    model = lib.new_model()
    return model.train()(**labelled(lib)).loss


def frozen(lib: Library) -> list[str]:
    """Parts that get a gradient when the encoder is frozen."""
    model = lib.new_model()
    for name, one in model.named_parameters():
        one.requires_grad_("projector" in name)
    model(**labelled(lib)).loss.backward()
    return sorted(name.removeprefix("model.") for name, one in model.named_parameters() if one.grad is not None)


def share(lib: Library, steps: int) -> torch.Tensor:
    inputs = labelled(lib)
    count = int((inputs["labels"][:, 1:] != -100).sum())
    return lib.model(**inputs, num_items_in_batch=torch.tensor(steps * count)).loss


def autocast_loss(lib: Library) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return lib.model(**labelled(lib)).loss.float()


def collated(lib: Library, train: bool) -> Any:
    """A batch as the collator of Hugging Face's fine-tuning example makes it: prompts padded on the left, answers on the right."""
    processor = lib.processor
    # Clips of one length: transformers pads a shorter one before it computes features.
    clips = [lib.clips[0], lib.clips[0][::-1].copy()]
    batch = processor([PROMPT, "USER: <|audio|>text?\n ASSISTANT:"], clips, return_tensors="pt", padding=True, padding_side="left")
    ids, mask, labels = batch.input_ids, batch.attention_mask, None
    if train:
        ends = [text + processor.tokenizer.eos_token for text in (WORDS, "seven")]
        answers = processor.tokenizer(ends, return_tensors="pt", padding=True, padding_side="right")
        labels = answers.input_ids.clone()
        labels[~(answers.attention_mask.bool())] = -100
        labels = torch.cat([torch.full_like(ids, -100), labels], dim=1)
        ids, mask = torch.cat([ids, answers.input_ids], dim=1), torch.cat([mask, answers.attention_mask], dim=1)
    # Without input_features_lengths, which transformers does not know.
    names = ("input_features", "input_features_mask")
    return {"input_ids": ids, "attention_mask": mask, "labels": labels} | {name: batch[name] for name in names}


def generated(lib: Library) -> torch.Tensor:
    with torch.inference_mode(), torch.amp.autocast("cpu", dtype=torch.bfloat16):
        return lib.model.generate(**collated(lib, train=False), max_new_tokens=8, num_beams=4, early_stopping=True, do_sample=False)


def released_parts(lib: Library) -> int:
    """Numbers of parameters that the example trains: those with "projector" or "lora" in their names."""
    model = lib.new_model()
    for name, one in model.named_parameters():
        one.requires_grad = "projector" in name or "lora" in name
    model(**collated(lib, train=True)).loss.backward()
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad)
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


SWALLOWED = "transformers 5.23 does not use num_items_in_batch for this model: its gradients are too large by the accumulation steps"

FROZEN = "transformers freezes every weight of a checkpoint with an adapter, so that its loss has no gradient; here nothing is frozen"

CALLS = {
    "backward right after loading": Call(lambda lib: lib.new_model()(**labelled(lib)).loss.requires_grad, differs=FROZEN),
    "loss of a collated batch": Call(lambda lib: lib.model(**collated(lib, train=True)).loss),
    "beams of a collated batch, labels=None": Call(generated),
    "projector and adapter are trained": Call(released_parts),
    "loss": Call(lambda lib: lib.model(**labelled(lib)).loss),
    "loss by key": Call(lambda lib: lib.model(**labelled(lib))["loss"]),
    "loss is first in a tuple": Call(lambda lib: lib.model(**labelled(lib), return_dict=False)[0]),
    "labels ignored everywhere": Call(
        lambda lib: lib.model(**labelled(lib) | {"labels": torch.full_like(labelled(lib)["labels"], -100)}).loss
    ),
    "loss in training mode": Call(trained_mode),
    "backward": Call(backward, tolerance=1e-3),
    "two steps of SGD": Call(two_steps),
    "clip_grad_norm_": Call(clipped, tolerance=1e-3),
    "only the projector is trained": Call(frozen),
    "num_items_in_batch of this batch": Call(lambda lib: share(lib, 1)),
    "num_items_in_batch of four batches": Call(lambda lib: share(lib, 4), differs=SWALLOWED),
    "num_items_in_batch=None": Call(lambda lib: lib.model(**labelled(lib), num_items_in_batch=None).loss),
    "loss under autocast": Call(autocast_loss, tolerance=2e-2),
    "use_cache=False with labels": Call(lambda lib: lib.model(**labelled(lib), use_cache=False).loss),
    "output_hidden_states with labels": Call(lambda lib: len(lib.model(**labelled(lib), output_hidden_states=True).hidden_states)),
}

test_training = comparison(CALLS)


@pytest.mark.parametrize("steps", [2, 4])
def test_losses_of_accumulated_batches_add_up_to_the_mean_over_their_labels(steps: int):
    model, inputs = library("granite_speech").new_model(), labelled(library("granite_speech"))
    # Batches with different numbers of labels: a mean of their means would be another number.
    batches = [inputs | {"labels": inputs["labels"].clone()} for _ in range(steps)]
    for number, batch in enumerate(batches):
        batch["labels"][:, : batch["labels"].shape[1] - 2 - number] = -100
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in inputs}
    model(**whole).loss.backward()
    expected = [one.grad.clone() for one in model.parameters()]
    model.zero_grad()
    for batch in batches:
        model(**batch, num_items_in_batch=count).loss.backward()
    for one, right in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(one.grad, right, rtol=1e-3, atol=1e-4)
