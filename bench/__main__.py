"""`python -m bench {audit,gpu,hours,kernels,model,rehearse,times,tune,words,report}`."""

import argparse
import sys
from pathlib import Path

from bench import results

DTYPES = ("float32", "bfloat16", "float16")
# Parts of `model` by where they run.
ON_CPU = ("cpu", "accelerated", "serving")
ON_GPU = ("steps", "whole", "encoder", "turboctc", "accelerated", "serving")


def main() -> None:
    sys.exit(_run(_parser().parse_args()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_model, _add_kernels, _add_tune, _add_rehearse, _add_gpu, _add_audit, _add_words, _add_hours, _add_times):
        add(commands)
    commands.add_parser("report", help="update the generated tables in the README files from the newest results")
    return parser


def _add_model(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("model", help="time the model and transformers' in one run, in several parts")
    parser.add_argument(
        "--part",
        action="append",
        choices=tuple(dict.fromkeys(ON_CPU + ON_GPU)),
        help="cpu: float32, bfloat16 and int8 on a CPU: encoder, TurboCTC, decode steps, the bundled checkpoint, words, memory, a busy "
        "machine; steps: decode steps fused and module by module, on a GPU; encoder: the 16 x 1024 encoder on a GPU; turboctc: TurboCTC on "
        "a GPU, up to 512 clips; whole: released shapes with random weights, on a GPU; accelerated: transformers' model before and after "
        "accelerate; serving: many requests over time in one Engine; both with the bundled checkpoint on a CPU and a released shape on a "
        "GPU (repeatable; default: all on a CPU, whole and encoder on a GPU)",
    )
    parser.add_argument("--layers", type=int, default=16, help="encoder blocks (default: the released models' 16)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of encoder and of the parts on a CPU (default: 5)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=None,
        help="of random weights on a GPU (default: bfloat16); on a CPU, part cpu measures every dtype",
    )
    _add_unseen(parser)
    _add_out(parser)


def _add_kernels(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("kernels", help="time every operation: the kernels on a GPU, or the references on a CPU")
    parser.add_argument("--operation", action="append", metavar="NAME", help="time only this operation (repeatable)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="on a GPU (default: bfloat16); a CPU uses float32")
    parser.add_argument("--no-compiled", action="store_true", help="on a GPU, skip torch.compile of the references")
    parser.add_argument("--predict", action="store_true", help="time nothing: write the shortest possible times into kernels/AUDIT.md")
    _add_out(parser)


def _add_tune(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("tune", help="choose the kernels' tiles on this GPU, and print the rows of their tables")
    parser.add_argument("out", type=Path, help="folder for the result file")
    parser.add_argument("--operation", action="append", metavar="NAME", help="tune only this operation (repeatable)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--seconds", type=float, default=240, help="time limit; what is not reached is listed (default: 240)")


def _add_rehearse(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("rehearse", help="count launches, waits and allocations of the released models, without a GPU")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the committed counts are out of date")


def _add_gpu(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("gpu", help="run the GPU checks that fit into the time, in one command: tests, model, kernels, sanitizer")
    parser.add_argument("out", type=Path, help="folder for results and logs")
    parser.add_argument("--seconds", type=float, default=540, help="time limit for all steps together (default: 540)")


def _add_audit(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("audit", help="compile every kernel without a GPU and list registers, spills and tensor-core use")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the committed table is out of date")
    parser.add_argument("--all", action="store_true", help="also recompile what the committed table already has")
    parser.add_argument("--operation", action="append", metavar="NAME", help="compile only this operation, write nothing (repeatable)")


def _add_words(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("words", help="word error rates of the bundled checkpoint: held-out voices, real people, a new word")
    parser.add_argument("--model", default="embedded", help="a checkpoint's folder or hub id (default: embedded)")
    _add_unseen(parser)
    parser.add_argument("--word", default="coffee", help="the new word to fine-tune on (default: coffee)")
    _add_out(parser)


def _add_hours(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("hours", help="an hour of audio with the bundled checkpoint on a CPU: words, speed and memory")
    parser.add_argument(
        "--voices",
        type=Path,
        default=Path("build/hours/manifest.jsonl"),
        help="manifest of the held-out voices; synthesized if it does not exist",
    )
    _add_out(parser)


def _add_times(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("times", help="times and confidences of words with the bundled checkpoint on a CPU, and what they cost")
    for name, default, what in (("--voices", "times", "single words"), ("--utterances", "hours", "utterances, those of `hours`")):
        file = Path("build", default, "manifest.jsonl")
        parser.add_argument(name, type=Path, default=file, help=f"manifest of {what}; synthesized if it does not exist")
    _add_out(parser)


def _add_unseen(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--unseen",
        type=Path,
        default=Path("build/embedded/unseen/manifest.jsonl"),
        help="manifest of the held-out voices; synthesized if it does not exist",
    )


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder for the result file (default: bench/results)")


def _run(options: argparse.Namespace) -> int:
    commands = {
        "audit": _audit,
        "gpu": _gpu,
        "hours": _hours,
        "kernels": _kernels,
        "model": _model,
        "rehearse": _rehearse,
        "times": _times,
        "tune": _tune,
        "words": _words,
        "report": _report,
    }
    return commands[options.command](options)


# Each command imports what it needs: their dependencies differ, and the audit needs kernels that are not interpreted.


def _audit(options: argparse.Namespace) -> int:
    from bench import audit

    return audit.run(check=options.check, everything=options.all, operations=options.operation or None)


def _gpu(options: argparse.Namespace) -> int:
    from bench import gpu

    return gpu.run(options.out, options.seconds)


def _hours(options: argparse.Namespace) -> int:
    from bench import hours

    print(hours.run(manifest=options.voices, out=options.out))
    return 0


def _times(options: argparse.Namespace) -> int:
    from bench import times

    print(times.run(manifest=options.voices, utterances=options.utterances, out=options.out))
    return 0


def _kernels(options: argparse.Namespace) -> int:
    import torch

    from bench import kernels, kernels_cpu

    if options.predict:
        text = kernels.predict()
        results.replace_section(kernels.PREDICTIONS, "kernels --predict", text)
    elif torch.cuda.is_available():
        dtype = getattr(torch, options.dtype)
        text = kernels.run(operations=options.operation, dtype=dtype, compiled=not options.no_compiled, out=options.out)
    else:
        text = kernels_cpu.run(operations=options.operation, out=options.out)
    print(text)
    return 0


def _model(options: argparse.Namespace) -> int:
    on_cpu = options.device == "cpu"
    parts = options.part or (ON_CPU if on_cpu else ("whole", "encoder"))
    elsewhere = [part for part in parts if part not in (ON_CPU if on_cpu else ON_GPU)]
    if elsewhere:
        raise SystemExit(f"--part {elsewhere[0]} does not run on {options.device}: choose from {', '.join(ON_CPU if on_cpu else ON_GPU)}")
    dtype = options.dtype or "bfloat16"
    failed = False
    for part in parts:
        if part == "steps":
            from bench import steps_gpu

            text, succeeded = steps_gpu.run(device=options.device, dtype=dtype, out=options.out)
            print(text)
            failed |= not succeeded
        elif part == "encoder":
            from bench import encoder

            sizes = {"layers": options.layers, "rounds": options.rounds}
            print(encoder.run(**sizes, device=options.device, dtype=dtype, out=options.out))
        elif part == "turboctc":
            from bench import turboctc_gpu

            print(turboctc_gpu.run(device=options.device, dtype=dtype, out=options.out))
        elif part == "whole":
            from bench import released

            text, succeeded = released.run(device=options.device, dtype=dtype, out=options.out)
            print(text)
            failed |= not succeeded
        elif part == "accelerated" and on_cpu:
            from bench import accelerated

            print(accelerated.run(rounds=options.rounds, threads=options.threads, out=options.out))
        elif part == "accelerated":
            from bench import accelerated_gpu

            print(accelerated_gpu.run(device=options.device, dtype=dtype, out=options.out))
        elif part == "serving" and on_cpu:
            from bench import serving

            print(serving.run(rounds=options.rounds, threads=options.threads, out=options.out))
        elif part == "serving":
            from bench import serving_gpu

            print(serving_gpu.run(device=options.device, dtype=dtype, out=options.out))
        else:
            from bench import cpu

            sizes = {"layers": options.layers, "rounds": options.rounds, "threads": options.threads}
            print(cpu.run(**sizes, unseen=options.unseen, out=options.out))
    return int(failed)


def _tune(options: argparse.Namespace) -> int:
    import torch

    from bench import tune

    print(tune.run(operations=options.operation, dtype=getattr(torch, options.dtype), seconds=options.seconds, out=options.out))
    return 0


def _rehearse(options: argparse.Namespace) -> int:
    from bench import rehearse

    return rehearse.run(check=options.check)


def _words(options: argparse.Namespace) -> int:
    from bench import words

    print(words.run(unseen=options.unseen, word=options.word, model=options.model, out=options.out))
    return 0


def _report(options: argparse.Namespace) -> int:
    from bench import report

    report.write()
    return 0


if __name__ == "__main__":
    main()
