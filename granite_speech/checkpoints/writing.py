"""Writes a checkpoint's folder in the layout that all versions of transformers and peft read."""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from granite_speech.checkpoints.folder import ADAPTER, ADAPTER_CONFIG, file_names, list_up_to_ten
from granite_speech.checkpoints.weight_names import TIED, canonical, is_lora
from granite_speech.errors import CheckpointError, InputError

__all__ = ["save"]

_CONFIG = "config.json"


def save(
    folder: str | Path,
    tensors: dict[str, torch.Tensor],
    *,
    config: dict,
    adapter_tensors: dict[str, torch.Tensor] | None = None,
    adapter_config: dict | None = None,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    tied: Mapping[str, str] = TIED,
) -> None:
    """Write a checkpoint in the layout of the released folders, which every version of transformers reads.

    Files are written under temporary names and renamed when all are complete, so that a full disk does not damage an earlier
    checkpoint in the folder, which may be the one that the weights came from. Shards, index and adapter of an earlier save are
    removed if they are not part of this one; other files, those of other variants included, are not touched.

    Args:
        folder: created if missing.
        tensors: canonical name → weight, without LoRA matrices.
        config: contents of config.json.
        adapter_tensors: canonical name → LoRA matrix; None without an adapter.
        adapter_config: contents of adapter_config.json; required with adapter_tensors.
        max_shard_size: bytes, or a number with KB, MB, GB or TB (powers of 1000), KiB, MiB, GiB or TiB (of 1024). A larger tensor
            gets a shard of its own.
        variant: of the weights' file names, as of `Checkpoint.open`.
        tied: names of weights → those of others. One that shares the other's memory, as a tied head does, is not written.

    Raises:
        CheckpointError: a name that is not canonical, a tensor without memory, an adapter without its weights or its
            configuration, or a failure to write.
    """
    folder = Path(folder)
    _check_names(tensors, lora=False)
    _check_names(adapter_tensors or {}, lora=True)
    if bool(adapter_tensors) != (adapter_config is not None):
        raise CheckpointError(
            got="an adapter's weights without its configuration, or the reverse", expected="both or neither", remedy="Pass both"
        )
    shared = {one for one, other in tied.items() if tensors.keys() >= {one, other} and tensors[one].data_ptr() == tensors[other].data_ptr()}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
    shards = list(_split(tensors, _bytes_of(max_shard_size)))
    model, index = file_names(variant)
    stem = model.removesuffix(".safetensors")
    names = [model] if len(shards) == 1 else [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    weights = dict(zip(names, shards, strict=True))
    documents = {_CONFIG: config}
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file for file, shard in weights.items() for name in shard}
        documents[index] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    if adapter_tensors:
        weights[ADAPTER] = {f"base_model.model.{name}": tensor for name, tensor in adapter_tensors.items()}
        documents[ADAPTER_CONFIG] = adapter_config
    _write(folder, weights, documents, earlier=(f"{stem}-*-of-*.safetensors", model, index, ADAPTER, ADAPTER_CONFIG))


def _write(folder: Path, weights: dict[str, dict[str, torch.Tensor]], documents: dict[str, dict], earlier: tuple[str, ...]) -> None:
    """Write the files, and remove those that match the patterns of an earlier save and are not among them."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the folder, because a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
            for name, content in documents.items():
                Path(staging, name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            for name, tensors in weights.items():
                save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, Path(staging, name), {"format": "pt"})
                # safetensors makes its files readable only by the owner; use the permissions of the configuration instead.
                Path(staging, name).chmod(Path(staging, _CONFIG).stat().st_mode)
            for name in (*weights, *documents):
                Path(staging, name).replace(folder / name)
        found = {path.name for pattern in earlier for path in folder.glob(pattern)}
        for name in found - weights.keys() - documents.keys():
            (folder / name).unlink(missing_ok=True)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            got=f"{str(folder)!r}, which could not be written: {error}",
            expected="a writable folder with enough free space, dense tensors that share no memory, and JSON values",
            remedy="Check the path, its permissions and the free disk space",
        ) from error


def _check_names(tensors: dict[str, torch.Tensor], *, lora: bool) -> None:
    wrong = [name for name, tensor in tensors.items() if canonical(name) != name or is_lora(name) != lora or tensor.is_meta]
    if wrong:
        raise CheckpointError(
            got=f"{len(wrong)} tensors to save: {list_up_to_ten(wrong)}",
            expected=f"tensors with values and with canonical names {'of LoRA matrices' if lora else 'other than of LoRA matrices'}",
            remedy="Rename them with granite_speech.checkpoints.weight_names.canonical_keys, and pass LoRA matrices as adapter_tensors",
        )


def _split(tensors: dict[str, torch.Tensor], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    shard, nbytes = {}, 0
    for name, tensor in tensors.items():
        if shard and nbytes + tensor.nbytes > limit:
            yield shard
            shard, nbytes = {}, 0
        shard[name] = tensor
        nbytes += tensor.nbytes
    yield shard


def _bytes_of(size: int | str) -> int:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B\s*", size.upper()) if isinstance(size, str) else None
    if found is None:
        raise InputError(
            got=f"max_shard_size={size!r}", expected="bytes, or a number with KB, MB, GB or TB", remedy="Pass for example '5GB'"
        )
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " "))
