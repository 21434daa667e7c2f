"""What the shapes of plan.py reach in a given time: the measurements behind its rule.

    python bench/plan.py english.txt --minutes 0.5 3 20 --bytes 200000 1000000

Each shape trains for the time through train.py, on the first nine tenths of the first bytes of the
text, and is scored on the last tenth: bits a character, each character once. A line each; the
plan's own choice is marked. Shapes that would get fewer than a quarter of plan.STEPS steps, by the
time of one step, are left out.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import plan  # noqa: E402


def run(*command) -> str:
    """The output of a command of the project."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--minutes", type=float, nargs="+", default=[0.5, 3, 20])
    parser.add_argument("--bytes", type=int, nargs="+", default=[200_000, 1_000_000, 9_000_000])
    args = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}  python bench/plan.py {' '.join(sys.argv[1:])}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        whole, train, val = (Path(folder, f"{name}.txt") for name in ("whole", "train", "val"))
        for size in args.bytes:
            text = args.text.read_bytes()[:size].decode("utf-8", "ignore")
            whole.write_text(text, encoding="utf-8")
            train.write_text(text[:len(text) * 9 // 10], encoding="utf-8")
            val.write_text(text[:len(text) * 9 // 10][-len(text) // 40:], encoding="utf-8")
            for minutes in args.minutes:
                common = [ROOT / "train.py", "--data", train, "--val", val, "--minutes", minutes]
                said = re.search(r"tokens/s at (\d+) x (\d+), context (\d+)", run(*common, "--plan"))
                planned = tuple(map(int, said.groups()))
                for i, shape in enumerate(plan.SHAPES):
                    out = Path(folder, f"{size}-{minutes}-{i}")
                    run(*common, "--out", out, "--layers", shape.layers, "--width", shape.width, "--context",
                        shape.context, "--vocab", shape.vocab, "--tokens-per-step", shape.tokens)
                    found = json.loads(run(ROOT / "bench/train.py", "--score", out, whole).splitlines()[-1])
                    steps = (out / "log.jsonl").read_text().count('"lr"')
                    print(f"{size / 1e6:4.1f} MB {minutes:5.1f} min  {shape.layers} x {shape.width:<4} context "
                          f"{shape.context:<4} V {shape.vocab:<6} {steps:6} steps  {found['bits']:.3f} bits a "
                          f"character{'  <- planned' if planned == shape[:3] else ''}", flush=True)
                    if steps < plan.STEPS:   # the next one gets a quarter of them
                        break


if __name__ == "__main__":
    main()
