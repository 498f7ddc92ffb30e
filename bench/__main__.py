"""`python -m bench {audit,gpu,kernels,model,words,report}`."""

import argparse
import sys
from pathlib import Path

from bench import results

DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("model", help="the 16 x 1024 encoder beside transformers', in one run")
    measure.add_argument("--layers", type=int, default=16, help="encoder blocks (default: the released models' 16)")
    measure.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that is not (default: 5)")
    measure.add_argument("--threads", type=int, default=None, help="threads of both (default: torch's)")
    measure.add_argument("--device", default="cpu", help="of both (default: cpu)")
    measure.add_argument("--dtype", choices=DTYPES, default="float32", help="of both (default: float32)")
    measure.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the result file (default: bench/results)")
    speed = commands.add_parser("kernels", help="every operation on the GPU, or its reference on the CPU where there is none")
    speed.add_argument("--operation", action="append", metavar="NAME", help="measure this one alone (repeatable)")
    speed.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="on a GPU (default: bfloat16); a CPU measures float32")
    speed.add_argument("--no-compiled", action="store_true", help="on a GPU, do not time torch.compile of the references")
    speed.add_argument("--predict", action="store_true", help="measure nothing: write the least times on an H200 to kernels/AUDIT.md")
    speed.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the result file (default: bench/results)")
    lent = commands.add_parser("gpu", help="all that a borrowed GPU should do: parity, kernels, model, sanitizer")
    lent.add_argument("out", type=Path, help="folder of the results and logs")
    lent.add_argument("--seconds", type=float, default=540, help="for all steps together (default: 540)")
    inspect = commands.add_parser("audit", help="compile every kernel, without a GPU, and check registers, spills and tensor cores")
    inspect.add_argument("--check", action="store_true", help="write nothing; fail if the committed table is out of date")
    inspect.add_argument("--all", action="store_true", help="also compile configurations that the committed table has")
    inspect.add_argument("--operation", action="append", metavar="NAME", help="audit only this one, and write nothing (repeatable)")
    words = commands.add_parser("words", help="what the small checkpoint understands: unseen voices, real people, a word it is taught")
    words.add_argument("--model", default="embedded", help="a checkpoint's folder or id (default: embedded)")
    words.add_argument("--unseen", type=Path, default=Path("build/embedded/unseen/manifest.jsonl"), help="spoken where it is not there")
    words.add_argument("--word", default="coffee", help="to be taught (default: coffee)")
    words.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the result file (default: bench/results)")
    commands.add_parser("report", help="tables of the newest result files, into the README")
    sys.exit(_run(parser.parse_args()))


def _run(options: argparse.Namespace) -> int:
    # Imported when asked for: each needs other packages, and the audit must see kernels that are not interpreted.
    if options.command == "report":
        from bench import report

        results.replace_section(results.README, "report", report.report())
        results.replace_section(results.README, "words", report.report(["words"]))
    elif options.command == "audit":
        from bench import audit

        return audit.run(check=options.check, everything=options.all, operations=options.operation or None)
    elif options.command == "gpu":
        from bench import gpu

        return gpu.run(options.out, options.seconds)
    elif options.command == "words":
        from bench import words

        print(words.run(unseen=options.unseen, word=options.word, model=options.model, out=options.out))
    elif options.command == "kernels":
        print(_kernels(options))
    else:
        from bench import model

        sizes = {"layers": options.layers, "rounds": options.rounds, "threads": options.threads}
        print(model.run(**sizes, device=options.device, dtype=options.dtype, out=options.out))
    return 0


def _kernels(options: argparse.Namespace) -> str:
    import torch

    from bench import kernels, kernels_cpu

    if options.predict:
        results.replace_section(kernels.PREDICTIONS, "kernels --predict", kernels.predict())
        return kernels.predict()
    if not torch.cuda.is_available():
        return kernels_cpu.run(operations=options.operation, out=options.out)
    dtype = getattr(torch, options.dtype)
    return kernels.run(operations=options.operation, dtype=dtype, compiled=not options.no_compiled, out=options.out)


if __name__ == "__main__":
    main()
