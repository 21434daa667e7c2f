"""Draw runs over each other: python bench/plot.py out/gpt out/gpt-2

Training and validation loss, learning rate and tokens per second, against tokens seen, as train.py
logged them, in runs.png of the first run's folder. matplotlib draws it.
"""
import argparse
import json
import sys
from pathlib import Path


def read_run(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """name -> [(tokens seen, value), ...] from a run directory; a repeated step counts as it came last."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    per_step = settings.get("tokens_per_step") or 1                     # finetune.py: steps
    curves = {"loss": {}, "val_loss": {}, "lr": {}, "tokens_per_s": {}}
    for line in lines:
        event = json.loads(line)
        for name, curve in curves.items():
            if name in event:
                curve[event["step"] * per_step] = event[name]
    return {name: sorted(curve.items()) for name, curve in curves.items()}


def smooth(values: list[float], window: int) -> list[float]:
    """Running mean over the last `window` values."""
    return [sum(values[max(0, i + 1 - window):i + 1]) / min(i + 1, window) for i in range(len(values))]


def draw(runs: list[Path], out: Path) -> None:
    """One picture of four panels."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    titles = {"loss": "training loss (nats a token)", "val_loss": "validation loss (nats a token)",
              "lr": "learning rate", "tokens_per_s": "tokens per second"}
    for run in runs:
        curves = read_run(run)
        for (name, title), axes in zip(titles.items(), panels.flat):
            tokens, values = zip(*curves[name]) if curves[name] else ((), ())
            if name in ("loss", "tokens_per_s"):
                values = smooth(list(values), max(1, len(values) // 50))
            axes.plot(tokens, values, "o-" if name == "val_loss" else "-", ms=3, lw=1, label=run.name)
            axes.set(title=title, xlabel="tokens")
    panels.flat[0].legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of train.py")
    parser.add_argument("--out", type=Path, help="the picture (default: runs.png in the first run's folder)")
    args = parser.parse_args()
    args.out = args.out or args.runs[0] / "runs.png"
    try:
        draw(args.runs, args.out)
    except ImportError:
        print("plot.py: matplotlib draws pictures: python -m pip install matplotlib", file=sys.stderr)
        sys.exit(2)
    except (OSError, ValueError, KeyError) as error:
        print(f"plot.py: no run of train.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(args.out)


if __name__ == "__main__":
    main()
