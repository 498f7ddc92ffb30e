"""Counts how often each kernel of some operations is compiled for batches of all sizes. Run it without TRITON_INTERPRET.

python -m tests.support.compilations paged_attention lora_linear
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from granite_kernels import OPERATIONS
from granite_kernels.launch import recorded_launches
from granite_kernels.op import Draw, Operation

from bench.audit import specialization


def compilations(op: Operation, calls: Iterable[dict]) -> dict[str, int]:
    """The number of times that Triton would compile each kernel, tile and choice of optional arguments for these calls on meta tensors."""
    found = defaultdict(set)
    with recorded_launches(90) as launches, torch.no_grad():
        for inputs in calls:
            op.call(**inputs, impl="triton")
    for launch in launches:
        absent = [name for name, value in launch.arguments.items() if value is None]
        found[f"{launch.kernel.__name__} {launch.tile} without {absent}"].add(specialization(launch))
    return {name: len(keys) for name, keys in found.items()}


def released(op: Operation, name: str, **changes) -> dict:
    """The inputs of a released case with changes to its shape."""
    case = next(case for case in op.cases if case.name == name)
    return case.make(Draw(torch.Generator(), torch.bfloat16, torch.device("meta")), **{**case.shape, **changes})


def changing_calls(name: str) -> Iterator[dict]:
    """Calls of one operation that vary everything that varies between calls of a model."""
    op = OPERATIONS[name]
    sizes = (*range(1, 65), 100, 128, 300)
    if name == "paged_attention":
        for width in sizes:
            inputs = released(op, "4.1-2b decode, 1 sequence", sequences=((1, 300),) * width)
            for columns in (width, 1, 16, 17):
                yield inputs | {"block_table": torch.empty(width, columns, dtype=torch.int32, device="meta")}
            yield inputs | {"max_query_len": width}
    elif name == "exponential_noise":
        for rows in sizes:
            for columns in (rows, 1000 * rows, 49160, 100353):
                yield released(op, "4.1-2b, 1 row", rows=rows, columns=columns)
    elif name == "attention_blocks":
        for clips in sizes:
            yield released(op, "encoder, 10 s", clips=(clips,) * clips, after=clips)
    elif name == "lora_linear":
        for rows in (*sizes, 1000, 1024):
            for choice in (None, (0,), (0, -1)):
                yield released(op, "3.3-2b q_proj, 1 row", rows=rows, choice=choice)
    elif name == "silu_linear":
        for rows in sizes:  # fewer rows are the library's
            yield released(op, "encoder up_proj, 128 clips of 10 s", rows=64_000 + rows)
            yield released(op, "4.1-2b gate|up, prompts of 128 clips", rows=64_000 + rows)
    elif name == "decode_attention":
        for rows in sizes:
            inputs = released(op, "4.1-2b, 1 row", kv_lens=(300,) * rows)
            for columns in (rows, 1, 16, 17):
                yield inputs | {"block_table": torch.empty(rows, columns, dtype=torch.int32, device="meta")}
    elif name == "window_attention":
        for windows in sizes:
            for rows in (1, windows):
                yield released(op, "projector, 10 s", windows=windows, rows=rows)
    elif name == "ctc_greedy":
        for size in sizes:
            yield released(op, "turboctc, 30 s", clips=(size,) * size, padding=size)
    elif name == "add_layer_norm":
        for size in sizes:
            yield released(op, "encoder, 10 s", rows=size)
            yield released(op, "turboctc, 8 clips to 30 s, pairs", clips=(size,) * size, rows=size)
    elif name == "depthwise_conv":
        for stride in (1, 2):
            for size in sizes:
                yield released(op, "encoder, 10 s", clips=(size,), stride=stride)
                yield released(op, "encoder, 10 s", clips=(7,) * size, padding=size, stride=stride)
    elif "rows" in op.cases[0].shape or "tokens" in op.cases[0].shape:
        for size in sizes:
            yield released(op, op.cases[0].name, **{"rows" if "rows" in op.cases[0].shape else "tokens": size})
    else:
        for frames in sizes:
            yield released(op, "encoder, 10 s", clips=(frames,))
            yield released(op, "encoder, 10 s", clips=(7,) * frames, padding=frames)


if __name__ == "__main__":
    print(json.dumps({name: compilations(OPERATIONS[name], changing_calls(name)) for name in sys.argv[1:]}))
