"""`python -m bench {model,report}`."""

import argparse
from pathlib import Path

from bench import model, results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("model", help="the 16 x 1024 encoder beside transformers', in one run on this machine's CPU")
    measure.add_argument("--layers", type=int, default=16, help="encoder blocks (default: the released models' 16)")
    measure.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that is not (default: 5)")
    measure.add_argument("--threads", type=int, default=None, help="threads of both (default: torch's)")
    measure.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the result file (default: bench/results)")
    commands.add_parser("report", help="tables of the newest result files, for the README")
    options = parser.parse_args()
    if options.command == "report":
        print(results.report())
    else:
        print(model.run(layers=options.layers, rounds=options.rounds, threads=options.threads, out=options.out))


if __name__ == "__main__":
    main()
