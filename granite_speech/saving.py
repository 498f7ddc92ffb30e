"""`save_pretrained`: a model to a folder, which every version of transformers reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from granite_speech.adapters.methods import Adapters
from granite_speech.checkpoints.upload import saving
from granite_speech.checkpoints.weight_names import TIED, canonical_keys, is_lora, is_optional
from granite_speech.checkpoints.writing import save
from granite_speech.config_base import Config
from granite_speech.errors import CheckpointError, InputError
from granite_speech.generation.config import WithGenerationConfig
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.model_methods import ModelMethods
from granite_speech.modules.quantized import refuse_quantized

__all__ = ["Saving"]


class Saving(ModelMethods, WithGenerationConfig, Adapters):
    """Saving weights, configurations and adapters, for the public models.

    Attributes:
        tied_names: weights that may be the same parameters as others → the others.
    """

    config: Config
    tied_names: ClassVar[Mapping[str, str]] = TIED

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write config.json, model.safetensors (or shards and an index), and an adapter's two files if there is one.

        The layout is that of the released folders, which every version of transformers reads.

        Args:
            save_directory: created if missing; nothing in it is replaced before everything is written.
            is_main_process: False writes nothing, for all but one of several processes.
            state_dict: the values to write in place of the model's own, with the names of this package or of transformers.
            push_to_hub: upload the files afterwards.
            max_shard_size: bytes, or a number with KB, MB, GB, KiB, MiB or GiB.
            variant: write "model.<variant>.safetensors"; other variants in the folder are kept.
            token: of the hub.
            save_peft_format, save_original_format, distributed_checkpoint: of transformers; they change nothing here.
            kwargs: of the upload (`repo_id`, `commit_message`, `private` and others, as of `push_to_hub`), and transformers' options
                that change nothing here (`safe_serialization=True`).

        Raises:
            CheckpointError: a path that cannot be written, or a state_dict without some of the weights or with unknown ones.
            InputError, UnsupportedError: another option; int8 weights.
        """
        kwargs |= {"distributed_checkpoint": distributed_checkpoint}
        if not is_main_process:
            return
        refuse_quantized(self, "save_pretrained")
        self._check_adapters()
        tensors = self.canonical_state_dict() if state_dict is None else self._given_tensors(state_dict)
        lora = {name: tensor for name, tensor in tensors.items() if is_lora(name)}
        base = {name: tensor for name, tensor in tensors.items() if not is_lora(name)}
        self.config.architectures = [type(self).__name__]
        self._record_dtype()
        names = {"has_lora_adapter": bool(lora)} if hasattr(self.config, "has_lora_adapter") else {}
        stored = str(next(iter(base.values())).dtype).removeprefix("torch.")
        # transformers 4.x reads `torch_dtype`, and 5.x `dtype`.
        config = self.config.to_diff_dict() | names | {"dtype": stored, "torch_dtype": stored}
        # transformers 4.x loads the weights from this place, as the released adapter files have it.
        home = {"base_model_name_or_path": str(kwargs.get("repo_id") or save_directory)}
        adapter = self._adapter_json() | home if lora else None
        options = kwargs | ({} if token is None else {"token": token}) | ({"tags": self.model_tags} if self.model_tags else {})
        with saving(save_directory, "save_pretrained", push_to_hub=push_to_hub, options=options) as folder:
            save(
                folder,
                base,
                config=config,
                adapter_tensors=lora or None,
                adapter_config=adapter,
                max_shard_size=max_shard_size or "50GB",
                variant=variant,
                tied=self.tied_names,
            )
            self.generation_config.save_pretrained(folder)

    def _check_adapters(self) -> None:
        """Raise InputError for adapters that do not fit into one folder."""
        if self._adapters.by_peft:
            raise InputError(
                got="a model whose layers peft has wrapped",
                expected="the PeftModel, which saves its adapter, or a model with merged adapters",
                remedy="Call save_pretrained of the PeftModel, or merge_and_unload() first",
            )
        if len(self._adapters.active) > 1:
            raise InputError(
                got=f"the active adapters {self._adapters.active}",
                expected="one active adapter, because a folder holds one",
                remedy="Call set_adapter with each name and save to a folder of its own",
            )

    def _given_tensors(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A caller's state dict with canonical names. A tied head is left out."""
        own, given = self.canonical_state_dict(), {name: state_dict[key] for key, name in canonical_keys(state_dict).items()}
        tied = {one: other for one, other in self.tied_names.items() if one in own and own[one].data_ptr() == own[other].data_ptr()}
        for one, other in tied.items():
            if one in given and other in given and torch.equal(given[one], given[other]):
                del given[one]  # a copy of the other, as state dicts gathered from several processes have it
        unknown = sorted(given.keys() - own.keys())
        missing = [name for name in own if name not in given and not (is_optional(name) or is_lora(name) or name in tied)]
        if unknown or missing:
            raise CheckpointError(
                got=f"a state_dict with {len(unknown)} unknown names {unknown[:3]} and without {len(missing)} weights {missing[:3]}",
                expected="all weights of this model, by its names or those of transformers",
                remedy="Pass the whole state dict, or omit it to save the model's own values",
            )
        return {name: tensor.detach() for name, tensor in given.items()}

    def canonical_state_dict(self) -> dict[str, torch.Tensor]:
        """The state dict with the names of the released files, for either model."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def _adapter_json(self) -> dict[str, Any]:
        """The contents of adapter_config.json: as loaded, or made from the attached adapters."""
        if self.adapter_config is not None:
            return self.adapter_config.raw
        modules = {name: module for name, module in self.named_modules() if isinstance(module, LoraLinear) and module.lora_A is not None}
        ranks = {name: module.lora_A.out_features for name, module in modules.items()}
        alphas = {name: module.scaling * ranks[name] for name, module in modules.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: one for name, one in ranks.items() if one != rank},
            "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
            "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }
