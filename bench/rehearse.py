"""A rehearsal of the released models without a GPU: what each part of the work launches, waits for and allocates.

    python -m bench rehearse            count, and write bench/results/rehearsal.json
    python -m bench rehearse --check    exit 1 if that file says anything else

The counts are those of `bench/counting_gpu.py` and `bench/launches.py`. Everything runs eagerly: a CUDA graph makes the same launches,
in one. Nothing is timed.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from granite_kernels.op import nbytes

from bench import results, shapes, steps
from bench.counting_gpu import CountingGPU, Counts
from bench.steps import CONTEXT, INT8, MODELS
from granite_speech import GraniteSpeechConfig
from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.modules.packing import Segments
from granite_speech.modules.prompts import ModelInputs
from granite_speech.modules.side_by_side import arrange

__all__ = ["WORK", "Rehearsal", "count", "of_a_layer", "run", "table"]

FILE = results.FOLDER / "rehearsal.json"
CLIPS = (1, 128)
ROWS = (1, 8, 16, 128)  # of a decode step
NEW_TOKENS = 4
DEVICE = torch.device("cuda")
TURBOCTC = "5.0-470m-turboctc"
ENCODER, PREFILL = "encoder and projector", "encoder, projector and prefill"
PATH = "encoder, CTC head and best path"  # of TurboCTC
STEP, STEP_OF_MODULES = "decode step", "decode step, module by module"
# For the predictions, which are not measurements. Of an H200: bytes a second (bench/results/kernels-nvidia-h200-*.json) and FLOPs a second
# of the encoder's products (57 TFLOP in 81 ms, in the profile of bench/results/whole-model-nvidia-h200-*.json); and what a launch of a CUDA
# graph adds to the time of its work.
BYTES_A_SECOND, FLOPS_A_SECOND, SECONDS_A_LAUNCH = 4.24e12, 700e12, 1.3e-6


@dataclass(frozen=True)
class Rehearsal:
    """One model on the double of a GPU, and a batch for it.

    Args:
        gpu: whose `with` block is open.
        name: of the released shape.
        clips: of the batch.
        layers: of encoder and language model; None: the released numbers.
    """

    gpu: CountingGPU
    name: str
    clips: int
    layers: int | None = None

    def model(self) -> Any:
        model = steps.random_model(self.name, DEVICE, layers=self.layers)
        model.use_graphs = False  # this machine may have a GPU, which could not capture tensors without memory
        return model

    def inputs(self) -> dict[str, torch.Tensor]:
        batch = shapes.request(self.name, self.clips)
        return {name: one.to(DEVICE, torch.bfloat16 if one.is_floating_point() else None) for name, one in batch.items()}

    def encoder(self) -> Callable[[], object]:
        model, features = self.model(), self.inputs()["input_features"]
        return lambda: model.encode_audio(features, None)

    def path(self) -> Callable[[], object]:
        """TurboCTC from packed features to the tokens of each clip."""
        values = {} if self.layers is None else {"encoder_config": {"num_hidden_layers": self.layers}}
        with shapes.default_dtype(torch.bfloat16), DEVICE:
            model = GraniteSpeech5ForCTC(GraniteSpeech5CTCConfig(**values)).eval()
        arrange(model.encoder)
        lengths = (shapes.CLIP_SECONDS * shapes.FRAMES_A_SECOND,) * self.clips
        frames = torch.zeros(sum(lengths), model.encoder.input_linear.in_features, dtype=torch.bfloat16, device=DEVICE)
        return lambda: model.greedy_packed(*model.encode_packed(frames, Segments(lengths, DEVICE)))

    def prefill(self) -> Callable[[], object]:
        model, inputs = self.model(), self.inputs()
        return lambda: model.states(ModelInputs(**inputs, use_cache=True))

    def step(self, context: int = CONTEXT) -> Callable[[], object]:
        """One step of the engine for `clips` answers, each with `context` keys."""
        return steps.Answers.of(self.model(), self.clips, context, NEW_TOKENS).step().run

    def step_of_modules(self) -> Callable[[], object]:
        """The same step as it runs where each module must be seen, for example by a hook."""
        with steps.unfused():
            step = self.step()
        return steps.unfused()(step)

    def least_bytes(self, context: int = CONTEXT) -> int:
        """Bytes that a decode step must move: every weight of the language model once, and the keys and values of its rows."""
        model = self.model()
        decoder = model.decoder
        weights = nbytes(*decoder.layers.parameters(), *decoder.layers.buffers(), decoder.norm.weight, model.lm_head.weight)
        return weights + self.key_bytes(context)

    def key_bytes(self, context: int = CONTEXT) -> int:
        """Bytes of the keys and values that a decode step reads and writes."""
        config = GraniteSpeechConfig(**shapes.configuration(self.name.removesuffix(INT8), self.layers)).text_config
        token = 2 * config.num_key_value_heads * config.attention_head_dim * torch.bfloat16.itemsize
        return config.num_hidden_layers * self.clips * (context + 1) * token

    def generate(self) -> Callable[[], object]:
        model, inputs = self.model(), self.inputs()
        return lambda: model.generate(**inputs, max_new_tokens=NEW_TOKENS, eos_token_id=[])


# What is rehearsed: how to prepare it, and whose layers are counted.
WORK: dict[str, tuple[Callable[[Rehearsal], Callable[[], object]], str | None]] = {
    ENCODER: (Rehearsal.encoder, "encoder"),
    PATH: (Rehearsal.path, "encoder"),
    PREFILL: (Rehearsal.prefill, "language model"),
    STEP: (Rehearsal.step, "language model"),
    STEP_OF_MODULES: (Rehearsal.step_of_modules, "language model"),
    f"generate, {NEW_TOKENS} tokens": (Rehearsal.generate, None),
}
_STEPS = (STEP, STEP_OF_MODULES)


def count(work: str, name: str, clips: int, layers: int | None = None) -> Counts:
    """What one part of the work sends to the device the second time it is done.

    Args:
        work: a key of WORK.
        name: of the released shape.
        clips: of the batch.
        layers: of encoder and language model; None: the released numbers.
    """
    with CountingGPU() as gpu, torch.no_grad():
        rehearsal = Rehearsal(gpu, name, clips, layers)
        call = WORK[work][0](rehearsal)
        call()  # makes what stays, such as the adapter's scaling and the pages
        with gpu.counting() as counts:
            call()
        if work in _STEPS:
            counts.moved += rehearsal.key_bytes()
    return counts


def measurements() -> Iterator[dict[str, Any]]:
    """Counts of every part of the work, model and batch."""
    for name in (*MODELS, f"4.1-2b{INT8}", TURBOCTC):
        for work in _work_of(name):
            layers = WORK[work][1]
            for clips in ROWS if work in _STEPS else CLIPS:
                counts = count(work, name, clips)
                entry = {"model": name, "work": work, "clips": clips, "launches": counts.launches.total()}
                if layers is not None:
                    entry |= of_a_layer(work, name, clips)
                entry |= {"waits": len(counts.waits), "late_reads": counts.late_reads, "bytes": counts.bytes}
                if work in _STEPS:
                    entry |= _predicted(counts, name, clips)
                elif layers is not None:
                    entry |= {"moved": counts.moved, "predicted_ms": round(1e3 * seconds(counts), 3)}
                yield entry | {"operations": dict(counts.launches.most_common())}


def _work_of(name: str) -> list[str]:
    """What is rehearsed of a model."""
    if name == TURBOCTC:
        return [PATH]
    return [work for work in WORK if work != PATH] if name in MODELS else [STEP]


@functools.cache  # a prefill asks for the encoder's again
def of_a_layer(work: str, name: str, clips: int) -> dict[str, Any]:
    """Launches, bytes moved and predicted time of one layer: the difference between two models that differ by one."""
    two, three = (count(work, name, clips, layers=number) for number in (2, 3))
    figures = [three.launches.total() - two.launches.total(), three.moved - two.moved, 1e6 * (seconds(three) - seconds(two))]
    if work == PREFILL:  # these models also differ by a layer of the encoder
        of_encoder = of_a_layer(ENCODER, name, clips)
        figures = [one - other for one, other in zip(figures, of_encoder.values(), strict=True)]
    return dict(zip(("launches_per_layer", "moved_per_layer", "predicted_us_per_layer"), (*figures[:2], round(figures[2], 1)), strict=True))


def seconds(counts: Counts) -> float:
    """A prediction, not a measurement: of each operation, the longer of the times of its bytes and of its products; and the launches."""
    work = sum(max(size / BYTES_A_SECOND, flops / FLOPS_A_SECOND) for size, flops in counts.work)
    return work + counts.launches.total() * SECONDS_A_LAUNCH


def _predicted(counts: Counts, name: str, clips: int) -> dict[str, Any]:
    """Bytes moved, the fewest possible, and the time that follows from bytes and launches: a prediction, not a measurement."""
    with CountingGPU() as gpu:
        least = Rehearsal(gpu, name, clips).least_bytes()
    predicted = counts.moved / BYTES_A_SECOND + counts.launches.total() * SECONDS_A_LAUNCH
    return {"moved": counts.moved, "least_moved": least, "predicted_ms": round(1e3 * predicted, 3)}


def run(*, check: bool) -> int:
    """Count everything; write the file, or compare it. Returns the exit status."""
    committed = json.loads(FILE.read_text()) if FILE.exists() else {}
    found = []
    for entry in measurements():
        found.append(entry)
        print(f"{entry['model']}, {entry['work']}, {entry['clips']} clips: {entry['launches']} launches", flush=True)
    earlier = {name: committed.get(name) for name in ("before", "layers_before")}
    result = {"kind": "rehearsal", "run": results.describe_run(), "measurements": found} | earlier
    print("", table(result), sep="\n")
    if not check:
        FILE.write_text(json.dumps(result, indent=2) + "\n")
        return 0
    differences = _differences(committed.get("measurements", []), found)
    print(*differences, sep="\n")
    return 1 if differences else 0


def _differences(committed: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """One line for each figure that differs."""
    before, now = ({(one["model"], one["work"], one["clips"]): one for one in some} for some in (committed, found))
    lines = [f"{key}: only {'in the file' if key in before else 'counted now'}" for key in sorted(before.keys() ^ now.keys())]
    for key in before.keys() & now.keys():
        names = before[key].keys() | now[key].keys()
        changed = [name for name in sorted(names) if before[key].get(name) != now[key].get(name)]
        lines += [f"{key}: {name} is {now[key].get(name)}, in the file {before[key].get(name)}" for name in changed]
    return lines


def table(result: dict[str, Any]) -> str:
    """Markdown of one rehearsal, with the launches of the earlier commit if it has any."""
    before = result.get("before") or {"commit": "", "measurements": []}
    earlier = {(one["model"], one["work"], one["clips"]): one for one in before["measurements"]}
    heading = f"Launches, waits and allocations, counted without a GPU: commit {result['run']['commit'][:8]}"
    if earlier:
        heading += f"; in brackets: commit {before['commit'][:8]}"
    lines = [
        f"{heading}:",
        "",
        "| model | work | clips | launches | per layer | waits | MB allocated |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result["measurements"]:
        old = earlier.get((one["model"], one["work"], one["clips"]), {})
        cells = [_both(one, old, name) for name in ("launches", "launches_per_layer", "waits")]
        cells.append(_both(_megabytes(one), _megabytes(old), "bytes"))
        lines.append(f"| {one['model']} | {one['work']} | {one['clips']} | {' | '.join(cells)} |")
    return "\n".join([*lines, *_layers_table(result), *_steps_table(result["measurements"])])


def _layers_table(result: dict[str, Any]) -> list[str]:
    """Markdown lines: one layer of the encoder and of a prefill, and in brackets what it was at an earlier commit."""
    before = result.get("layers_before") or {"measurements": []}
    earlier = {(one["model"], one["work"], one["clips"]): one for one in before["measurements"]}
    lines = [
        "",
        f"One layer of the encoder and of a prefill; in brackets: {before.get('note', 'no earlier figures')}. Predicted, not measured: of "
        f"each operation the longer of the times of its bytes at {BYTES_A_SECOND / 1e12:g} TB/s and of its matrix products at "
        f"{FLOPS_A_SECOND / 1e12:g} TFLOP/s, and {SECONDS_A_LAUNCH * 1e6:g} µs for each launch.",
        "",
        "| model | layer of | clips | launches | MB moved | predicted µs | whole work, predicted ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result["measurements"]:
        if one["work"] in (ENCODER, PATH, PREFILL):
            old = earlier.get((one["model"], one["work"], one["clips"]), {})
            names = ("launches_per_layer", "moved_per_layer", "predicted_us_per_layer", "predicted_ms")
            cells = [_both(_rounded(one), _rounded(old), name) for name in names]
            layer = "prefill" if one["work"] == PREFILL else "encoder"
            lines.append(f"| {one['model']} | {layer} | {one['clips']} | {' | '.join(cells)} |")
    return lines


def _rounded(one: dict[str, Any]) -> dict[str, Any]:
    if not one:
        return {}
    figures = {"moved_per_layer": round(one["moved_per_layer"] / 1e6), "predicted_us_per_layer": round(one["predicted_us_per_layer"])}
    return one | figures | {"predicted_ms": round(one["predicted_ms"], 1)}


def _steps_table(measurements: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: decode steps, and in brackets the same step module by module."""
    found = {(one["model"], one["work"], one["clips"]): one for one in measurements}
    lines = [
        "",
        f"Decode steps of rows with {CONTEXT} keys; in brackets: module by module. Predicted, not measured: the time of the bytes at "
        f"{BYTES_A_SECOND / 1e12:g} TB/s, and {SECONDS_A_LAUNCH * 1e6:g} µs for each launch.",
        "",
        "| model | rows | launches a layer | outside the layers | GB moved | GB at least | predicted ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, work, rows), one in found.items():
        if work != STEP:
            continue
        before = found.get((model, STEP_OF_MODULES, rows), {})
        cells = [_both(_of_step(one), _of_step(before), name) for name in ("launches_per_layer", "outside", "moved", "least", "predicted")]
        lines.append(f"| {model} | {rows} | {' | '.join(cells)} |")
    return lines


def _of_step(one: dict[str, Any]) -> dict[str, Any]:
    if not one:
        return {}
    layers = shapes.RELEASED[one["model"].removesuffix(INT8)]["text_config"]["num_hidden_layers"]
    figures = {"outside": one["launches"] - layers * one["launches_per_layer"], "launches_per_layer": one["launches_per_layer"]}
    figures |= {"moved": round(one["moved"] / 1e9, 2), "predicted": round(one["predicted_ms"], 2)}
    return figures | ({"least": round(one["least_moved"] / 1e9, 2)} if one["work"] == STEP else {})


def _both(now: dict[str, Any], before: dict[str, Any], name: str) -> str:
    if now.get(name) is None:
        return "–"
    return f"{now[name]:,}" + (f" ({before[name]:,})" if before.get(name) is not None else "")


def _megabytes(one: dict[str, Any]) -> dict[str, float]:
    return {"bytes": round(one["bytes"] / 1e6, 1)} if "bytes" in one else {}
