"""What each task of finetune.py brings on its default data, over three seeds.

    python bench/finetune.py --init-from out/gpt | tee bench/finetune.log

Every run is `python finetune.py --task TASK --init-from CHECKPOINT --seed SEED` and nothing else, in
a process of its own. Preferences are learnt twice: from the checkpoint, and from the first run of
sft; each task also once through adapters. The spread is the largest result less the smallest. Last
come ten completions of grpo's first run, before and after: of held-out prompts, the first of each
group.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
MEASURES = {"sft": ["val_loss"], "classify": ["accuracy", "macro_f1"],
            "dpo": ["margin", "accuracy"], "grpo": ["reward", "length", "distinct"]}


def finetune(task, init_from, out, *more):
    """Run it: (measures before, measures after, minutes, what it printed)."""
    command = [sys.executable, "finetune.py", "--task", task, "--init-from", init_from, "--out", out, *more]
    begun = time.time()
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    events = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [event for event in events if MEASURES[task][0] in event]
    return found[0], found[-1], (time.time() - begun) / 60, done.stdout


def table(name, task, runs):
    """Rows of the results of several runs of one kind."""
    for measure in MEASURES[task]:
        before, after = ([run[i][measure] for run in runs] for i in (0, 1))
        gain, spread = statistics.mean(after) - statistics.mean(before), max(after) - min(after)
        print(f"| {name} | {measure} | {statistics.mean(before):.3f} | {', '.join(f'{x:.3f}' for x in after)} | "
              f"{gain:+.3f} | " + (f"{spread:.3f} | {abs(gain) / max(spread, 1e-9):.1f}" if len(runs) > 1 else "|")
              + f" | {statistics.median(run[2] for run in runs):.1f} |", flush=True)
    if task == "classify":
        print(f"| | (majority: {runs[0][1]['majority']:.3f}) | | | | | | |")


def samples(printed):
    """The completions that a run of grpo showed: before, after."""
    first, last = printed.index("--- reward"), printed.rindex("           validation: ")
    return (printed[first:printed.index("\nrun        ")],
            printed[printed.index("--- reward", last):printed.rindex("\nreward ")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--init-from", type=Path, default=ROOT / "out" / "gpt", help="what train.py left")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "finetune", help="where the runs go")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    start, out = args.init_from.resolve(), args.out.resolve()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()} CPU, "
          f"{torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}\n"
          "\n| task | measure | before | after, one for each seed | gain | spread | gain / spread | minutes |"
          "\n|---|---|---|---|---|---|---|---|")
    for task in MEASURES:
        runs = [finetune(task, start, out / f"{task}-{seed}", "--seed", seed, "--samples", 10)
                for seed in range(args.seeds)]
        table(task, task, runs)
    before, after = samples(runs[0][3])
    table("dpo after sft", "dpo", [finetune("dpo", out / "sft-0", out / f"sft-dpo-{seed}", "--seed", seed)
                                   for seed in range(args.seeds)])
    for task in MEASURES:
        table(f"{task} --lora 8", task, [finetune(task, start, out / f"{task}-lora", "--lora", 8)])
    print(f"\nTen completions of grpo before\n\n{before}\n\nand after\n\n{after}")


if __name__ == "__main__":
    main()
