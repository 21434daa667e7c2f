"""The same text and the same time through each architecture: what it learns, what it costs.

    python bench/compare.py book.txt | tee bench/compare.log
    python bench/compare.py book.txt --lineage --minutes 5 --figure docs/compare.png

train.py trains a model of each kind: the same tokenizer, number of blocks, context and minutes (all it
takes, from command to end), about the same number of parameters, each with the recipe that train.py
gives it. Then a table: bits per byte of the held-out text, tokens/s and peak memory in training, and
what the next token costs after 1,000 and after 100,000 tokens, timing only: such a context is allowed,
and the state holds random values. The figure shows a passage of the held-out text, coloured by the
architecture that gave each token the highest probability, above the loss of each.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)                      # not bench/, where a file hides the package `lineage`
from checkpoints import load_checkpoint, model_parts                    # noqa: E402
from data import open_tokens                                            # noqa: E402
from tokenizer import load_tokenizer                                    # noqa: E402

KINDS, LINEAGE = ["gpt", "llama3", "glm4", "rwkv6"], ["rwkv2", "rwkv3", "rwkv4", "rwkv5"]
PASTS = 1_000, 100_000                       # tokens that lie behind when a token is timed
COLOURS = dict(zip(KINDS + LINEAGE, ("#7fb3e6", "#f4a582", "#b8e186", "#f6e58d", "#d9c2e9", "#9fe0d7",
                                     "#f7b6d2", "#cccccc")))


def count(kind: str, width: int, args) -> int:
    """Parameters of a model of this kind."""
    Model, Config, _ = model_parts(kind)
    with torch.device("meta"):
        model = Model(Config.sized(args.layers, width, args.vocab, args.context))
    return sum(p.numel() for p in model.parameters())


def train(kind: str, width: int, out: Path, tokenizer: Path | None, args) -> list[dict]:
    """Train one model in the run directory `out`; its events, as logged."""
    command = [sys.executable, "train.py", "--data", args.text, "--model", kind, "--layers", args.layers,
               "--width", width, "--context", args.context, "--tokens-per-step", args.tokens_per_step,
               "--minutes", args.minutes, "--out", out]
    command += ["--tokenizer", tokenizer] if tokenizer else ["--vocab", args.vocab]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def next_token(kind: str, width: int, past: int, args) -> tuple[float, int]:
    """(seconds of a token after `past` others, bytes of the state): an untrained model whose
    context is long enough, its state full of random values."""
    Model, Config, _ = model_parts(kind)
    model = Model(Config.sized(args.layers, width, args.vocab, past + 64)).eval()
    state = model.new_state(1, past + 64)
    for tensor in state:
        if tensor.is_floating_point():
            tensor.normal_()
    size, times = sum(tensor.nbytes for tensor in state), []
    for n in range(24):
        state.position.fill_(past)
        begun = time.perf_counter()
        model(torch.tensor([[n]]), state, last=True)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[4:]), size


@torch.no_grad()
def passage_losses(out: Path, tokens: list[int], context: int) -> torch.Tensor:
    """(n,): nats of each token of a passage after the first `context`, which are only read."""
    model, losses = load_checkpoint(out).eval(), []
    for start in range(context, len(tokens), context // 2):             # half a context precedes
        window = torch.tensor(tokens[start - context // 2:start + context // 2])
        logits = model(window[None])[0, context // 2 - 1:-1]
        losses.append(F.cross_entropy(logits, window[context // 2:], reduction="none"))
    return torch.cat(losses)


def draw(losses: dict[str, torch.Tensor], pieces: list[str], path: Path) -> None:
    """The passage, coloured by who predicted each token best, and the losses below it."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    names, table = list(losses), torch.stack([*losses.values()])        # (models, n)
    best, columns, row, column, places = table.argmin(0).tolist(), 96, 0, 0, []
    for piece in pieces:                     # (row, column) of each token's first letter
        text = piece.replace("\n", "⏎").replace("\t", "→")
        if column + len(text) > columns:
            row, column = row + 1, 0
        places.append((row, column, text))
        column += len(text)
        if "\n" in piece:
            row, column = row + 1, 0
    figure, (top, bottom) = pyplot.subplots(
        2, figsize=(11, 3.2 + 0.22 * (row + 1)), height_ratios=[0.22 * (row + 1), 2.4], layout="constrained")
    top.set(xlim=(0, columns), ylim=(row + 1, 0), title="which architecture gave each token the "
            "highest probability")
    top.axis("off")
    for (line, start, text), winner in zip(places, best):
        top.add_patch(pyplot.Rectangle((start, line), len(text), 0.92, color=COLOURS[names[winner]], lw=0))
        for i, letter in enumerate(text):
            top.text(start + i + 0.5, line + 0.5, letter, family="monospace", ha="center", va="center",
                     fontsize=7.5, parse_math=False)
    for name, values in losses.items():
        wins = best.count(names.index(name)) / len(best)
        bottom.plot(values.tolist(), lw=1.2, marker="o", ms=2, color=COLOURS[name],
                    label=f"{name}: {values.mean():.2f} on average, best at {wins:.0%} of the tokens")
    bottom.set(xlabel="token of the passage", ylabel="loss (nats)")
    bottom.set_facecolor("#f7f7f7")
    bottom.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{path}.part", format="png", dpi=110)
    os.replace(f"{path}.part", path)


def compare(args, folder: Path) -> None:
    """Train all, print the table, draw the passage."""
    kinds = KINDS + LINEAGE * args.lineage
    sizes = {kind: min(range(16, 1025, 8), key=lambda width: abs(count(kind, width, args) - args.parameters))
             for kind in kinds}
    print(f"\n{Path(args.text).name}, {Path(args.text).stat().st_size:,} bytes; {args.layers} blocks, vocabulary "
          f"{args.vocab}, context {args.context}, {args.tokens_per_step} tokens a step, {args.minutes:g} minutes "
          "each\n\n| model | width | parameters | bits per byte | tokens seen | training, tokens/s | peak memory | "
          + " | ".join(f"a token after {past:,} | state" for past in PASTS) + " |\n" + "|---" * 11 + "|")
    tokenizer = None
    for kind, width in sizes.items():
        events = train(kind, width, folder / kind, tokenizer, args)
        tokenizer = tokenizer or folder / kind
        steps = [event for event in events if "tokens_per_s" in event]
        last = [event for event in events if "bits_per_byte" in event][-1]
        cells = []
        for past in PASTS:
            seconds, size = next_token(kind, width, past, args)
            cells += [f"{1e3 * seconds:.2f} ms", f"{size / 1e6:,.2f} MB"]
        print(f"| {kind} | {width} | {count(kind, width, args):,} | {last['bits_per_byte']:.3f} | "
              f"{steps[-1]['step'] * args.tokens_per_step:,} | "
              f"{statistics.median(event['tokens_per_s'] for event in steps):,.0f} | "
              f"{steps[-1]['peak_bytes'] / 2**20:,.0f} MB | {' | '.join(cells)} |", flush=True)
    print(f"\nto beat: gzip -9 {last['gzip']:.3f}, xz -9e {last['xz']:.3f} bits per byte")
    held = next(folder.glob("data/*/val.bin"))
    tokens = open_tokens(held, load_tokenizer(tokenizer).vocab_size)[0][:args.context + args.passage].tolist()
    losses = {kind: passage_losses(folder / kind, tokens, args.context) for kind in kinds}
    print("the passage, nats a token: " + ", ".join(f"{k} {v.mean():.3f}" for k, v in losses.items()))
    pieces = [load_tokenizer(tokenizer).decode([token]) for token in tokens[args.context:]]
    try:
        draw(losses, pieces, args.figure)
        print(f"figure: {args.figure}")
    except ImportError:
        print("no figure: pip install matplotlib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", metavar="TEXT", help="a text file of some 100 kB at least")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each training, all it takes")
    parser.add_argument("--lineage", action="store_true", help="RWKV-2 to 5 too")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--parameters", type=int, default=1_200_000, help="of each model, about")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens-per-step", type=int, default=1024)
    parser.add_argument("--passage", type=int, default=256, help="tokens of the figure")
    parser.add_argument("--figure", type=Path, default=Path("docs/compare.png"))
    args = parser.parse_args()
    if not Path(args.text).is_file():
        print(f"compare.py: {args.text}: no such file: give a text", file=sys.stderr)
        sys.exit(2)
    args.text = str(Path(args.text).resolve())
    print(f"torch {torch.__version__}, {platform.machine()} CPU, {torch.get_num_threads()} threads, "
          f"{time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


if __name__ == "__main__":
    main()
