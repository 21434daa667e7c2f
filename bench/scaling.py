"""How time and memory grow with context and with size: gpt, llama3 and rwkv6, with fitted exponents.

    python bench/scaling.py | tee bench/scaling.log

Training is one sequence forward and backward; decoding is one token after as many others, in a state of
random values. Each point is a process of its own, so that its peak memory is its own; what it holds
before the first step (torch, weights, the state of the optimiser is none) is taken off. An exponent b
is the slope of log y against log x: y grows as x^b. Two are printed, of all points and of the last
pair, which says where it is going. Where an exponent is larger than the mathematics has it, a line says
so: attention may reach 2 in the context, everything else 1.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
KINDS = "gpt", "llama3", "rwkv6"
CONTEXTS = 256, 512, 1024, 2048, 4096, 8192
WIDTHS = 128, 192, 256, 384, 512, 768
LOOKS = dict(zip(KINDS, ("o-", "s-", "^-")))
MOST = {"gpt": 2.0, "llama3": 2.0, "rwkv6": 1.0}    # the exponent of training time in the context


def point(kind: str, width: int, context: int, layers: int, vocab: int, most: float) -> None:
    """Measure one model and print {"parameters", "train_s", "train_bytes", "token_s", "state_bytes"}."""
    import torch
    from checkpoints import model_parts
    from plan import peak_bytes
    from train import NextTokenLoss
    torch.manual_seed(0)
    Model, Config, _ = model_parts(kind)
    model = Model(Config.sized(layers, width, vocab, context + 64)).train()
    loss, cpu = NextTokenLoss(model), torch.device("cpu")
    tokens = torch.randint(vocab, (1, context))
    warm = tokens[:, :32]                    # gradients and libraries exist before memory is counted
    loss({"tokens": warm, "targets": warm})[0].backward()
    before, times, begun = peak_bytes(cpu), [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < most and len(times) < 20:
        start = time.perf_counter()
        loss({"tokens": tokens, "targets": tokens})[0].backward()
        times.append(time.perf_counter() - start)
        if time.perf_counter() - begun > 4 * most:
            break
    made = {"parameters": sum(p.numel() for p in model.parameters()), "train_s": min(times),
            "train_bytes": peak_bytes(cpu) - before}
    model.eval()
    state = model.new_state(1, context + 64)
    for tensor in state:
        if tensor.is_floating_point():
            tensor.normal_()
    times = []
    with torch.no_grad():
        for n in range(24):
            state.position.fill_(context)
            start = time.perf_counter()
            model(torch.tensor([[n]]), state, last=True)
            times.append(time.perf_counter() - start)
    print(json.dumps({**made, "token_s": statistics.median(times[4:]),
                      "state_bytes": sum(tensor.nbytes for tensor in state)}))


def measure(kind, width, context, args) -> dict:
    """One point, in a process of its own."""
    words = [sys.executable, __file__, "--point", kind, width, context, args.layers, args.vocab, args.seconds]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def slope(xs, ys) -> float:
    """Least squares of log y against log x."""
    x, y = [math.log(v) for v in xs], [math.log(max(v, 1e-12)) for v in ys]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def report(title, xs, found: dict[str, list[dict]], limits: dict[str, float]) -> dict[str, list[str]]:
    """Print a table of each measure, its exponents, and what is above its limit; labels of curves."""
    labels = {}
    for measure_name, unit, scale in (("train_s", "ms, forward and backward", 1e3),
                                      ("train_bytes", "MB, peak above the weights", 2**-20),
                                      ("token_s", "ms, the next token", 1e3), ("state_bytes", "MB, state", 2**-20)):
        print(f"\n{title}: {unit}\n\n| model | " + " | ".join(f"{x:,}" for x in xs[:len(next(iter(found.values())))])
              + " | exponent | of the last pair |\n" + "|---" * (len(xs) + 3) + "|")
        for kind, points in found.items():
            at = [p["parameters"] for p in points] if title == "width" else xs
            ys = [p[measure_name] for p in points]
            whole, last = slope(at, ys), slope(at[-2:], ys[-2:])
            labels.setdefault(measure_name, []).append(f"{kind}: x^{whole:.2f}, at the end x^{last:.2f}")
            high = " **(above the mathematics)**" if last > limits[kind, measure_name] + 0.25 else ""
            print(f"| {kind} | " + " | ".join(f"{scale * y:,.2f}" for y in ys) + f" | {whole:.2f} | {last:.2f}{high} |",
                  flush=True)
    return labels


def draw(figures, path: Path) -> None:
    """Time and memory of training, time and state of decoding, against context and against parameters."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker
    names = {"train_s": "training: seconds a sequence", "train_bytes": "training: bytes above the weights",
             "token_s": "decoding: seconds a token", "state_bytes": "decoding: bytes of state"}
    figure, panels = pyplot.subplots(2, 4, figsize=(17, 8), layout="constrained")
    for row, (label, xs, found, labels) in zip(panels, figures):
        for axes, (name, title) in zip(row, names.items()):
            for (kind, points), text in zip(found.items(), labels[name]):
                at = [p["parameters"] for p in points] if label == "parameters" else xs
                axes.loglog(at, [p[name] for p in points], LOOKS[kind], label=text)
            axes.set(xlabel=label, title=title)
            if label == "context":
                axes.set_xticks(xs, map(str, xs))
                axes.xaxis.set_minor_formatter(ticker.NullFormatter())
            axes.legend(fontsize=8)
            axes.grid(alpha=0.3, which="both")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{path}.part", format="png", dpi=90)
    os.replace(f"{path}.part", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--point", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="while the context grows")
    parser.add_argument("--context", type=int, default=256, help="while the width grows")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement, about")
    parser.add_argument("--figure", type=Path, default=Path("docs/scaling.png"))
    args = parser.parse_args()
    if args.point:
        kind, *numbers, seconds = args.point
        return point(kind, *map(int, numbers), float(seconds))
    import torch
    print(f"torch {torch.__version__}, {platform.machine()} CPU, {torch.get_num_threads()} threads, float32, "
          f"{args.layers} blocks, vocabulary {args.vocab}, {time.strftime('%Y-%m-%d')}")
    figures = []
    for title, label, xs in (("context", "context", CONTEXTS), ("width", "parameters", WIDTHS)):
        found = {kind: [measure(kind, *((args.width, x) if title == "context" else (x, args.context)), args)
                        for x in xs] for kind in KINDS}
        limits = {(kind, name): 1.0 for kind in KINDS for name in found[kind][0]}
        if title == "context":
            limits.update({(kind, "train_s"): MOST[kind] for kind in KINDS})
            limits.update({("rwkv6", "token_s"): 0.0, ("rwkv6", "state_bytes"): 0.0})
        figures.append((label, xs, found, report(title, xs, found, limits)))
    try:
        draw(figures, args.figure)
        print(f"\nfigure: {args.figure}")
    except ImportError:
        print("\nno figure: pip install matplotlib")


if __name__ == "__main__":
    main()
