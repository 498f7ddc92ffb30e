"""Fine-tuning with peft, and adapters by name, as users write them, here and in transformers."""

import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from granite_speech.checkpoints.weight_names import canonical
from granite_speech.errors import CheckpointNotFoundError, InputError, UnsupportedError
from tests.support.reference_models import scale_logits
from tests.support.two_libraries import Call, assert_same, comparison, library

SHORT = {"max_new_tokens": 4}
ATTENTION = ["q_proj", "v_proj"]
MODULE = "language_model.layers.1.self_attn.q_proj"


def lora(targets=ATTENTION, **options):
    """An adapter with random A and B, so that it changes the output at once."""
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False} | options))


def wrapped(lib, config=None, *, own=True, **options):
    """A PeftModel. `own`: whether the base model keeps the adapter of the checkpoint."""
    model = lib.new_model() if own else lib.new_bare_model()
    torch.manual_seed(1)
    return get_peft_model(model, lora() if config is None else config, **options).eval()


PROMPT = "USER: <|audio|>transcribe\n ASSISTANT:"


def one(lib):
    """A short prompt with half a second of audio."""
    return dict(lib.processor(PROMPT, lib.clips[0][:8000], return_tensors="pt"))


def pair(lib):
    """Two of them, with the same clip: transformers' features and padding depend on the other clips."""
    return dict(lib.processor([PROMPT, PROMPT], [lib.clips[0][:8000]] * 2, return_tensors="pt", padding=True))


def labelled(lib):
    """A batch with labels, as a collator for training makes it."""
    batch = pair(lib)
    ids = batch["input_ids"]
    hidden = (ids == lib.model.config.audio_token_index) | (batch["attention_mask"] == 0)
    return batch | {"labels": ids.masked_fill(hidden, -100)}


def logits(lib, model, batch=None):
    with torch.no_grad():
        return model(**(one(lib) if batch is None else batch)).logits


def answer(lib, model):
    return model.generate(**one(lib), **SHORT)


def text_only(lib):
    return {key: lib.processor.tokenizer("USER: one two three", return_tensors="pt")[key] for key in ("input_ids", "attention_mask")}


def names(tensors):
    """The same names for both packages, sorted, adapter names removed."""
    return sorted(canonical(name) for name in tensors)


def by_name(tensors):
    return {canonical(name): one for name, one in tensors.items()}


def gradients(lib, model):
    model.train()
    model(**labelled(lib)).loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return by_name(found), names(found)


def trained(lib, model, steps=3):
    """Losses of a few steps, then an answer."""
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer, batch, losses = torch.optim.AdamW(parameters, lr=2e-3), labelled(lib), []
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    return losses, answer(lib, model.eval())


def saved(lib, model):
    """A PeftModel's files: tensors, their names, and what matters of the configuration."""
    folder = lib.new_folder()
    model.save_pretrained(folder)
    tensors, config = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    kept = {name: config[name] for name in ("r", "lora_alpha", "task_type", "peft_type", "base_model_name_or_path", "modules_to_save")}
    return by_name(tensors), names(tensors), kept


FOLDERS = {}


def folder_of(lib, config=None, **options):
    """A folder that peft saved, in the names of this package or of transformers; made once."""
    key = lib.name, str(config), str(options)
    if key not in FOLDERS:
        FOLDERS[key] = lib.new_folder()
        wrapped(lib, config, **options).save_pretrained(FOLDERS[key])
    return FOLDERS[key]


def count(model):
    return model.get_nb_trainable_parameters()


def reloaded(lib, config=None, *, own=True):
    folder = folder_of(lib, config, own=own)
    model = PeftModel.from_pretrained(lib.new_model() if own else lib.new_bare_model(), folder)
    return logits(lib, model), answer(lib, model) if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else None


def disabled(lib, own):
    model = wrapped(lib, own=own)
    with model.disable_adapter():
        inside = logits(lib, model)
    return inside, logits(lib, model)


def two_adapters(lib, own):
    model = wrapped(lib, own=own)
    torch.manual_seed(2)
    model.add_adapter("second", lora(["k_proj", "o_proj"], r=3))
    first = logits(lib, model)
    model.set_adapter("second")
    second = answer(lib, model), logits(lib, model)
    model.delete_adapter("second")
    return first, second, sorted(model.peft_config)


def kept_module(lib):
    model = wrapped(lib, lora(modules_to_save=["linear"]), own=False)
    gradient = gradients(lib, model)
    return gradient, saved(lib, model)[:2], logits(lib, model.eval())


def merged(lib, own):
    model = wrapped(lib, own=own).merge_and_unload()
    folder = lib.new_folder()
    weight = {canonical(name): one for name, one in model.named_parameters()}["language_model.model.layers.1.self_attn.q_proj.weight"]
    result = logits(lib, model), answer(lib, model), weight
    if not own:
        model.save_pretrained(folder)
        return *result, answer(lib, lib.GraniteSpeechForConditionalGeneration.from_pretrained(folder).eval())
    return result


def in_bfloat16(lib):
    model = get_peft_model(lib.new_model().to(torch.bfloat16), lora(), autocast_adapter_dtype=True)
    kinds = sorted({(str(one.dtype), one.requires_grad) for one in model.parameters()})
    batch = labelled(lib) | {"input_features": pair(lib)["input_features"].to(torch.bfloat16)}
    loss = model(**batch).loss
    loss.backward()
    return kinds, bool(torch.isfinite(loss)), all(one.grad is not None for one in model.parameters() if one.requires_grad)


def prepared(lib):
    model = peft.prepare_model_for_kbit_training(lib.new_model(), use_gradient_checkpointing=False)
    return sum(one.requires_grad for one in model.parameters()), sorted({str(one.dtype) for one in model.parameters()})


def merged_in_place(lib):
    model = wrapped(lib, own=False)
    model.merge_adapter()
    inside = logits(lib, model)
    model.unmerge_adapter()
    return inside, answer(lib, model)


def mixed_names(lib, config):
    model = wrapped(lib, config, own=False)
    return count(model), sorted({canonical(name).rpartition(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name})


def loaded_by_name(lib):
    folder = folder_of(lib)
    model = lib.new_model()
    before = logits(lib, model)
    model.load_adapter(str(folder), adapter_name="second")
    active, after = model.active_adapters(), logits(lib, model)
    model.set_adapter("default")
    return before, active, after, model.active_adapters(), logits(lib, model), sorted(model.peft_config)


def added(lib, config, own=False, name=None):
    model = lib.new_model() if own else lib.new_bare_model()
    torch.manual_seed(1)
    model.add_adapter(config, name)
    return model


def added_and_trained(lib):
    model = added(lib, lora(init_lora_weights=True))
    losses, text = trained(lib, model)
    folder = str(lib.new_folder())
    model.save_pretrained(folder)
    if lib.name == "granite_speech":  # transformers loses the layers that have adapters
        again = lib.GraniteSpeechForConditionalGeneration.from_pretrained(folder).eval()
        assert torch.equal(answer(lib, again), text) and torch.equal(logits(lib, again), logits(lib, model))
    return losses, text, model._hf_peft_config_loaded


def given_tensors(lib):
    folder = folder_of(lib)
    config = LoraConfig.from_pretrained(folder)
    model = lib.new_model()
    tensors = load_file(folder / "adapter_model.safetensors")
    model.load_adapter(peft_config=config, adapter_state_dict=tensors, adapter_name="second")
    return logits(lib, model), by_name(model.get_adapter_state_dict("second")), names(model.get_adapter_state_dict())


def deleted(lib):
    model = lib.new_model()
    model.load_adapter(str(folder_of(lib)), adapter_name="second")
    model.delete_adapter("second")
    left = sorted(model.peft_config), answer(lib, model)
    model.delete_adapter(["default"])
    return left, model._hf_peft_config_loaded, hasattr(model, "peft_config"), logits(lib, model)


def both_active(lib):
    model = lib.new_model()
    model.load_adapter(str(folder_of(lib, lora(["q_proj", "k_proj"], r=3), own=False)), adapter_name="second")
    model.set_adapter(["default", "second"])
    return model.active_adapters(), logits(lib, model), answer(lib, model)


def switched(lib):
    model = lib.new_model()
    model.disable_adapters()
    off = logits(lib, model)
    model.enable_adapters()
    return off, logits(lib, model)


def disabled_then_generated(lib):
    model = lib.new_model()
    model.disable_adapters()
    return model.generate(**one(lib), max_new_tokens=1, return_dict_in_generate=True, output_scores=True).scores[0]


def trainable(lib):
    model = lib.new_model()
    model.load_adapter(str(folder_of(lib)), "second", is_trainable=True)
    return names(name for name, one in model.named_parameters() if one.requires_grad)


def swapped(lib):
    first, second = folder_of(lib), folder_of(lib, lora(use_rslora=False))
    model = lib.new_model()
    model.load_adapter(str(first), adapter_name="other")
    model.load_adapter(str(second), adapter_name="other", hotswap=True)
    return model.active_adapters(), logits(lib, model)


def from_folder(lib, **options):
    model = lib.GraniteSpeechForConditionalGeneration.from_pretrained(folder_of(lib, **options)).eval()
    return answer(lib, model), sorted(model.peft_config), model.name_or_path == lib.folder


def saved_modules(lib, name="linear"):
    """A folder with a trained module next to the adapter."""
    folder, model = lib.new_folder(), wrapped(lib, lora(modules_to_save=[name]))
    for name, one in model.named_parameters():
        if "modules_to_save" in name:
            one.data = one.data * 1.5
    model.save_pretrained(folder)
    return folder


def without_base(lib):
    folder = folder_of(lib)
    config, other = json.loads((folder / "adapter_config.json").read_text()), lib.new_folder()
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/no/such/model"}))
    (other / "adapter_model.safetensors").symlink_to(folder / "adapter_model.safetensors")
    return lib.GraniteSpeechForConditionalGeneration.from_pretrained(other)


def text_answer(lib, own):
    return wrapped(lib, own=own).generate(**text_only(lib), **SHORT)


TASKS = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "SEQ_CLS")
NO_MERGED_NAME = "the names of several modules are longer here, as in the released files"
CALLS = {
    **{f"task {one}": Call(lambda lib, one=one: reloaded(lib, lora(task_type=one))) for one in TASKS},
    "forward without an own adapter": Call(lambda lib: logits(lib, wrapped(lib, own=False))),
    "forward of a batch": Call(lambda lib: logits(lib, wrapped(lib), pair(lib))),
    "gradients": Call(lambda lib: gradients(lib, wrapped(lib)), tolerance=1e-3),
    "gradients without an own adapter": Call(lambda lib: gradients(lib, wrapped(lib, own=False)), tolerance=1e-3),
    "gradients with dropout zero and rslora": Call(lambda lib: gradients(lib, wrapped(lib, lora(use_rslora=True))), tolerance=1e-3),
    "training": Call(lambda lib: trained(lib, wrapped(lib, lora(init_lora_weights=True, r=8), own=False)), tolerance=2e-3),
    "training over an own adapter": Call(lambda lib: trained(lib, wrapped(lib, lora(init_lora_weights=True))), tolerance=2e-3),
    "a regex": Call(lambda lib: mixed_names(lib, lora(r".*language_model.*\.(q|k|v|o)_proj"))),
    "all-linear": Call(lambda lib: mixed_names(lib, lora("all-linear"))),
    "all-linear over an own adapter": Call(lambda lib: count(wrapped(lib, lora("all-linear", init_lora_weights=True)))),
    "MLP and encoder": Call(lambda lib: mixed_names(lib, lora(["up_proj", "down_proj", "to_q", "query"]))),
    "layers_to_transform": Call(lambda lib: mixed_names(lib, lora(layers_to_transform=[0, 2], layers_pattern="layers"))),
    "exclude_modules": Call(lambda lib: mixed_names(lib, lora("all-linear", exclude_modules=r".*(encoder|projector).*"))),
    "convolutions": Call(lambda lib: gradients(lib, wrapped(lib, lora(["up_conv", "down_conv"]), own=False)), tolerance=1e-3),
    "position embeddings": Call(lambda lib: logits(lib, wrapped(lib, lora(["rel_pos_emb"]), own=False))),
    "merged convolutions": Call(lambda lib: logits(lib, wrapped(lib, lora(["up_conv"]), own=False).merge_and_unload())),
    "DoRA of convolutions": Call(
        lambda lib: logits(lib, wrapped(lib, lora(["up_conv"], use_dora=True), own=False)),
        refused=UnsupportedError, differs="the encoder reads these weights and does not call the modules",
    ),
    "lm_head": Call(lambda lib: count(wrapped(lib, lora(["lm_head"]), own=False))),
    "modules_to_save": Call(kept_module, tolerance=1e-3),
    "other modules than the own adapter's": Call(lambda lib: logits(lib, wrapped(lib, lora(["k_proj"])))),
    "another name than the own adapter's": Call(lambda lib: logits(lib, wrapped(lib, adapter_name="mine"))),
    "another name and other modules": Call(
        lambda lib: (count(model := wrapped(lib, lora(["k_proj"]), adapter_name="mine")), logits(lib, model))
    ),
    "trainable parameters": Call(lambda lib: count(wrapped(lib))),
    "generate": Call(lambda lib: answer(lib, wrapped(lib))),
    "generate without audio": Call(lambda lib: text_answer(lib, own=False)),
    "generate without audio, own adapter": Call(lambda lib: text_answer(lib, own=True)),
    "saved files": Call(lambda lib: saved(lib, wrapped(lib, lora(task_type="CAUSAL_LM")))),
    "disable_adapter": Call(lambda lib: disabled(lib, own=True)),
    "disable_adapter, no own adapter": Call(lambda lib: disabled(lib, own=False)),
    "two adapters": Call(lambda lib: two_adapters(lib, own=True)),
    "two adapters, no own adapter": Call(lambda lib: two_adapters(lib, own=False)),
    "merge_and_unload": Call(lambda lib: merged(lib, own=False)),
    "merge_and_unload over an own adapter": Call(lambda lib: merged(lib, own=True)),
    "merge_adapter and unmerge_adapter": Call(merged_in_place),
    "float32 adapters over bfloat16": Call(in_bfloat16),
    "prepare_model_for_kbit_training": Call(prepared),
    "DoRA": Call(lambda lib: logits(lib, wrapped(lib, lora(use_dora=True), own=False))),
    "IA3": Call(lambda lib: count(wrapped(lib, peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]), own=False))),
    # --- transformers' own methods ---
    "parameters that train after loading": Call(
        lambda lib: any(one.requires_grad for one in lib.new_model().parameters()),
        differs="transformers freezes a model that has an adapter; here all of a loaded model can be trained",
    ),
    "load_adapter and set_adapter": Call(loaded_by_name),
    "load_adapter with tensors": Call(given_tensors),
    "load_adapter, is_trainable": Call(trainable),
    "load_adapter with hotswap": Call(swapped),
    "load_adapter, a name that exists": Call(
        lambda lib: lib.new_model().load_adapter(str(folder_of(lib))), refused=InputError, differs="a typed error here, a ValueError there"
    ),
    "add_adapter": Call(lambda lib: logits(lib, added(lib, lora()))),
    "add_adapter gaussian": Call(lambda lib: by_name(added(lib, lora(init_lora_weights="gaussian")).get_adapter_state_dict())),
    "add_adapter over an own adapter": Call(lambda lib: logits(lib, added(lib, lora(["k_proj", "o_proj"]), own=True, name="second"))),
    "add_adapter trained and saved": Call(added_and_trained, tolerance=2e-3),
    "add_adapter, gradients": Call(lambda lib: gradients(lib, added(lib, lora())), tolerance=1e-3),
    "add_adapter, all-linear": Call(lambda lib: sorted(added(lib, lora("all-linear"))._modules) and names(
        added(lib, lora("all-linear")).get_adapter_state_dict())),
    "delete_adapter": Call(deleted),
    "two active adapters": Call(both_active),
    "disable_adapters and enable_adapters": Call(switched),
    "disable_adapters, then generate": Call(
        disabled_then_generated, differs="transformers' generate enables adapters by itself if there is audio; here they stay off"
    ),
    "add_adapter, another kind": Call(
        lambda lib: added(lib, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])) and None,
        refused=UnsupportedError, differs="adapters of other kinds need peft's layers: peft.get_peft_model accepts them",
    ),
    "a folder that peft saved": Call(from_folder),
    "a folder that peft saved, base without an adapter": Call(
        lambda lib: from_folder(lib, own=False)[:2]
    ),
    "a folder with modules_to_save": Call(
        lambda lib: logits(lib, lib.GraniteSpeechForConditionalGeneration.from_pretrained(saved_modules(lib)).eval()),
        differs="transformers leaves out the modules in the file and goes on with untrained ones",
    ),
    "a folder whose base is gone": Call(without_base, refused=CheckpointNotFoundError, differs="a typed error here, an OSError there"),
}  # fmt: skip

test_peft = comparison(CALLS)


@pytest.mark.parametrize("pair", [("granite_speech", "transformers"), ("transformers", "granite_speech")], ids="{0[0]} to {0[1]}".format)
@pytest.mark.parametrize("way", ["PeftModel", "load_adapter", "from_pretrained", "two names"])
def test_an_adapter_trained_with_one_package_loads_in_the_other(pair, way):
    source, target = map(library, pair)
    # peft takes a released file's `base_model.model.encoder` for transformers' `model.encoder`, and finds nothing there.
    by_peft = target.name == "transformers" and way in ("PeftModel", "two names")
    folder = str(folder_of(source, lora(["q_proj", "k_proj"] + ["to_q", "linear"] * (not by_peft), r=3), own=False))
    expected = logits(source, PeftModel.from_pretrained(source.new_bare_model(), folder).eval())
    if way == "from_pretrained":
        model = target.GraniteSpeechForConditionalGeneration.from_pretrained(folder).eval()
        if target.name == "transformers":
            scale_logits(model)
    else:
        model = target.new_bare_model()
    if way == "PeftModel":
        model = PeftModel.from_pretrained(model, folder)
    elif way == "two names":
        model = PeftModel.from_pretrained(model, folder_of(target, own=False), adapter_name="first")
        model.load_adapter(folder, "second")
        model.set_adapter("second")
    elif way == "load_adapter":
        model.load_adapter(folder)
    assert_same(logits(target, model.eval()), expected)


@pytest.mark.parametrize("name", ["linear", "embed_tokens", "lm_head"])
def test_a_folder_with_modules_to_save_gives_the_trained_model(name, tmp_path):
    """Embeddings and head are one weight in the checkpoint, and two once one of them was trained."""
    lib = library("granite_speech")
    folder = saved_modules(lib, name)
    expected = logits(lib, PeftModel.from_pretrained(lib.new_model(), folder))
    model = lib.GraniteSpeechForConditionalGeneration.from_pretrained(folder)
    assert_same(logits(lib, model), expected)
    model.save_pretrained(tmp_path)
    assert_same(logits(lib, lib.GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path)), expected)
