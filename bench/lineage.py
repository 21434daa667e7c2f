"""RWKV-2 to 6 and GPT-2 side by side: what the parallel forms bring, and what each learns from the same text.

    nice python bench/lineage.py | tee bench/lineage.log

First each operator against the loop over tokens beside it, which defines it, run alternately in this process.
Then train.py trains a small model of each kind on its default text (the source of Python's standard
library): the same number of blocks, about the same number of parameters, the same tokens in the same
order, the same recipe. Validation loss against tokens goes into lineage/loss.png (matplotlib).
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
sys.path[0] = str(ROOT)                      # not bench/, where this file hides the package
from lineage.rwkv2 import wkv2, wkv2_loop                              # noqa: E402
from lineage.rwkv3 import wkv3, wkv3_loop                              # noqa: E402
from lineage.rwkv4 import wkv4, wkv4_loop                              # noqa: E402
from lineage.rwkv5 import wkv5, wkv5_loop                              # noqa: E402
from rwkv6 import wkv6, wkv6_loop                                       # noqa: E402
from train import model_parts                                           # noqa: E402

KINDS = ("gpt", "rwkv2", "rwkv3", "rwkv4", "rwkv5", "rwkv6")


# --- the operators ---

def operands(operator, T, C, D=64):
    """Random arguments of an operator, for one sequence."""
    torch.manual_seed(0)
    if operator in (wkv5, wkv6):
        H = C // D
        w = -torch.exp(torch.rand(1, H, T, D) * 6 - 6)
        return *torch.randn(3, 1, H, T, D), w if operator is wkv6 else w[0, :, 0], torch.randn(H, D), \
            torch.zeros(1, H, D, D)
    rows = 3 if operator is wkv4 else 2
    eps = () if operator is wkv4 else (1e-8,)
    return *torch.randn(2, 1, T, C), -torch.exp(torch.rand(C) * 6 - 6), torch.randn(C), \
        torch.zeros(1, rows, C), *eps


def seconds(function, arguments, backward):
    """Seconds of a call, with the gradients of all arguments or without any."""
    arguments = [x.clone().requires_grad_(backward) if torch.is_tensor(x) else x for x in arguments]
    start = time.perf_counter()
    y, _ = function(*arguments)
    if backward:
        y.sum().backward()
    return time.perf_counter() - start


def race(T, C, repeats):
    """Print tokens per second of each operator and of its loop: medians of alternate runs."""
    print(f"\none sequence of {T} tokens, {C} channels, float32: tokens/s, loop -> parallel\n")
    print("| operator | forward | | | with gradients | | |\n|---|---|---|---|---|---|---|")
    for operator, loop in ((wkv2, wkv2_loop), (wkv3, wkv3_loop), (wkv4, wkv4_loop), (wkv5, wkv5_loop),
                           (wkv6, wkv6_loop)):
        arguments, cells = operands(operator, T, C), []
        for backward in (False, True):
            took = {loop: [], operator: []}
            for _ in range(repeats + 1):     # the first round warms up
                for function, times in took.items():
                    times.append(seconds(function, arguments, backward))
            slow, fast = (statistics.median(times[1:]) for times in took.values())
            cells += [f"{T / slow:,.0f}", f"{T / fast:,.0f}", f"**x {slow / fast:.1f}**"]
        print(f"| {operator.__name__} | " + " | ".join(cells) + " |", flush=True)


# --- learning ---

def count(kind, layers, width, vocab, context):
    """Parameters of a model of this kind."""
    Model, Config, _ = model_parts(kind)
    with torch.device("meta"):
        return sum(p.numel() for p in Model(Config.sized(layers, width, vocab, context)).parameters())


def widths(layers, target, vocab, context):
    """{kind: width}: the multiple of 8 with the number of parameters closest to the target."""
    return {kind: min(range(16, 1025, 8), key=lambda width: abs(
        count(kind, layers, width, vocab, context) - target)) for kind in KINDS}


def train(kind, width, args):
    """Train one model in a run directory of its own; its events, as logged."""
    out = args.out / kind
    command = [sys.executable, "train.py", "--model", kind, "--layers", args.layers, "--width", width,
               "--context", args.context, "--vocab", args.vocab, "--steps", args.steps, "--lr", args.lr,
               "--tokens-per-step", args.tokens_per_step, "--sample-every", args.steps, "--device", "cpu",
               "--dtype", "float32", "--eval-every", max(1, args.steps // 8), "--eval-tokens", 16384, "--out", out]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def draw(curves, title, path):
    """Validation loss against tokens, one line for each model; replaced as a whole."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    shades = pyplot.get_cmap("viridis")
    for i, (name, curve) in enumerate(curves.items()):
        look = {"color": "black", "ls": "--"} if name == "gpt" else {"color": shades(0.95 - 0.19 * (i - 1))}
        axes.plot(*zip(*curve), marker="o", ms=3, lw=4 - 0.5 * i, label=f"{name}  {curve[-1][1]:.3f}", **look)
    lows = [loss for curve in curves.values() for _, loss in curve[1:]]
    axes.set(xlabel="tokens of training", ylabel="validation loss (nats a token)", title=title,
             ylim=(min(lows) - 0.1, max(lows) + 0.2))
    axes.grid(alpha=0.3)
    axes.legend(title="last loss")
    figure.savefig(f"{path}.part", format="png", dpi=120)
    os.replace(f"{path}.part", path)


def learn(args):
    """Train all, print a table, draw the figure."""
    chosen = widths(args.layers, args.parameters, args.vocab, args.context)
    print(f"\n{args.layers} blocks, vocabulary {args.vocab}, context {args.context}, {args.steps} steps of "
          f"{args.tokens_per_step} tokens, peak learning rate {args.lr}, seed 0\n")
    print("| model | width | parameters | validation loss | bits per byte | tokens/s |\n|---|---|---|---|---|---|")
    curves = {}
    for kind, width in chosen.items():
        events = train(kind, width, args)
        last = [event for event in events if "bits_per_byte" in event][-1]
        curves[kind] = [(e["step"] * args.tokens_per_step, e["val_loss"]) for e in events if "val_loss" in e]
        speed = statistics.median(e["tokens_per_s"] for e in events if "tokens_per_s" in e)
        print(f"| {kind} | {width} | {count(kind, args.layers, width, args.vocab, args.context):,} | "
              f"{last['val_loss']:.4f} | {last['bits_per_byte']:.4f} | {speed:,.0f} |", flush=True)
    print(f"\nto beat: gzip -9 {last['gzip']:.3f}, xz -9e {last['xz']:.3f} bits per byte")
    try:
        draw(curves, f"{args.layers} blocks, about {args.parameters / 1e6:.1f} M parameters each, "
             "source of Python's standard library", args.figure)
        print(f"figure: {args.figure.relative_to(ROOT) if args.figure.is_relative_to(ROOT) else args.figure}")
    except ImportError:
        print("no figure: pip install matplotlib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=110, help="optimiser steps of each model; 0: no training")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=1_000_000, help="of each model, about")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each operator; 0: none")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "lineage", help="where the runs go")
    parser.add_argument("--figure", type=Path, default=ROOT / "lineage" / "loss.png")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()} CPU, {torch.get_num_threads()} threads, "
          f"{time.strftime('%Y-%m-%d')}")
    if args.repeats:
        race(512, 768, args.repeats)
    if args.steps:
        learn(args)


if __name__ == "__main__":
    main()
