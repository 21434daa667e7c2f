"""train.py beside nanoGPT's recipe for a CPU, on the same text, in the same time.

    python bench/train.py english.txt c.txt chinese.txt          # texts of about 1 MB
    python bench/train.py --default CHECKOUT --seeds 0 1 2       # the run without flags, here and there

The recipe (karpathy/nanoGPT@3adf61e, README, "I only have a macbook"): characters as tokens, 4 x 128,
4 heads, context 64, 12 sequences a step, 2,000 steps, AdamW 1e-3 to 1e-4 by half a cosine after 100
steps of warm-up, betas 0.9 and 0.99, decay 0.1, no dropout, no biases. It is written here in plain
torch. Both sides read the first nine tenths of a text and are scored on the last: each character
once, in blocks of the model's own context. All of a side's time counts, from its command to the end
of its training: Python, imports, the tokenizer, validation, samples, saving. Ours gets the recipe's
time, a third of it, and 2.5 times as much; it validates on a copy of the end of its training text.
"""
import argparse
import hashlib
import json
import math
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.time()
ROOT = Path(__file__).resolve().parents[1]
PARTS = (1.0, 1 / 3, 2.5)                    # of the recipe's time, for ours


def read_text(path: str) -> tuple[str, str]:
    """(first nine tenths, last tenth) of a text's characters."""
    text = Path(path).read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def bits_per_character(logits, ids, context: int, characters: int) -> float:
    """ids: the test text's tokens with the one before them in front. logits: tokens -> logits."""
    import torch
    from torch.nn import functional as F
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, context):
            x, y = ids[start:start + context], ids[start + 1:start + context + 1]
            nats += F.cross_entropy(logits(x[None, :len(y)])[0], y, reduction="sum").item()
    return nats / math.log(2) / characters


def recipe(path: str) -> None:
    """Train by nanoGPT's recipe and print {"seconds", "bits", "parameters"}."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    before, after = read_text(path)
    characters = sorted({*before, *after})
    number = {c: i for i, c in enumerate(characters)}
    V, C, H, L, T, B, STEPS = len(characters), 128, 4, 4, 64, 12, 2000
    torch.manual_seed(1337)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
            self.qkv, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
            self.fc, self.out = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (part.view(b, t, H, C // H).transpose(1, 2)
                       for part in self.qkv(self.ln_1(x)).split(C, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(y.transpose(1, 2).reshape(b, t, C))
            return x + self.out(F.gelu(self.fc(self.ln_2(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
            self.blocks = nn.Sequential(*(Block() for _ in range(L)))
            self.ln_f = nn.LayerNorm(C, bias=False)
            for name, p in self.named_parameters():
                if p.dim() > 1:
                    last = name.endswith(("proj.weight", "out.weight"))
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * L) if last else 0.02)

        def forward(self, x):
            x = self.wte(x) + self.wpe.weight[:x.shape[1]]
            return self.ln_f(self.blocks(x)) @ self.wte.weight.T

    model = Model()
    data = torch.tensor([number[c] for c in before])
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.1),
                                   dict(params=vectors, weight_decay=0.0)], betas=(0.9, 0.99))
    for step in range(STEPS):
        done = (step - 100) / (STEPS - 100)
        lr = (1e-3 * (step + 1) / 101 if step < 100 else
              1e-4 + 0.5 * (1 + math.cos(math.pi * done)) * 9e-4)
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(data) - T, (B,))
        x = torch.stack([data[i:i + T] for i in starts])
        y = torch.stack([data[i + 1:i + T + 1] for i in starts])
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.time() - STARTED
    ids = torch.tensor([number[c] for c in before[-1] + after])
    print(json.dumps({"seconds": seconds, "bits": bits_per_character(model.eval(), ids, T, len(after)),
                      "parameters": sum(p.numel() for p in model.parameters())}))


def score(run: str, path: str) -> None:
    """Print {"bits", "parameters", ...} of a run of ours."""
    import torch
    sys.path.insert(0, str(ROOT))
    from checkpoints import load_checkpoint
    from tokenizer import load_tokenizer
    before, after = read_text(path)
    model, tokenizer = load_checkpoint(run), load_tokenizer(run)
    ids = torch.tensor([tokenizer.encode(before[-200:])[-1], *tokenizer.encode(after)])
    settings = json.loads(Path(run, "settings.json").read_text())
    print(json.dumps({"bits": bits_per_character(model, ids, settings["context"], len(after)),
                      "parameters": sum(p.numel() for p in model.parameters()),
                      **{k: settings[k] for k in ("layers", "width", "context", "vocab")}}))


def output_of(*command) -> dict:
    """What a command prints on its last line, as JSON."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          encoding="utf-8", check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(path: str, model: str, parts: list[float]) -> None:
    """One text: the recipe, then ours in parts of its time."""
    before, _ = read_text(path)
    sha = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    print(f"\n{Path(path).name}, {len(before) * 10 // 9:,} characters, sha256 {sha}", flush=True)
    theirs = output_of(__file__, "--recipe", path)
    print(f"  recipe   {theirs['seconds']:6.1f} s  {theirs['bits']:.3f} bits a character  "
          f"({theirs['parameters']:,} parameters)", flush=True)
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            train, val, out = (Path(folder, name) for name in ("train.txt", "val.txt", "run"))
            train.write_text(before, encoding="utf-8")
            val.write_text(before[-len(before) // 40:], encoding="utf-8")
            begun = time.time()
            done = subprocess.run(
                [sys.executable, ROOT / "train.py", "--data", train, "--val", val, "--out", out, "--model",
                 model, "--minutes", str(part * theirs["seconds"] / 60)], capture_output=True, text=True)
            seconds = time.time() - begun
            if done.returncode:
                raise SystemExit(done.stderr)
            ours = output_of(__file__, "--score", out, path)
        print(f"  {model:<8} {seconds:6.1f} s  {ours['bits']:.3f} bits a character  = "
              f"{seconds / theirs['seconds']:.2f} x its time, {ours['bits'] / theirs['bits']:.3f} x its bits  "
              f"({ours['parameters']:,} parameters: {ours['layers']} x {ours['width']}, context "
              f"{ours['context']}, vocabulary {ours['vocab']})", flush=True)


def compare_defaults(other: str, seeds: list[str]) -> None:
    """The run without flags, here and in another checkout, in turns."""
    for seed in seeds:
        for name, root in (("there", Path(other)), ("here", ROOT)):
            with tempfile.TemporaryDirectory() as folder:
                begun = time.time()
                done = subprocess.run([sys.executable, root / "train.py", "--split-seed", seed, "--out",
                                       Path(folder, "run")], capture_output=True, text=True, check=True)
                seconds = time.time() - begun
            bits = re.findall(r"([\d.]+) bits per byte of the held-out.*?gzip -9 needs ([\d.]+)", done.stdout)[-1]
            print(f"  seed {seed}  {name:<5} {seconds:6.1f} s  {bits[0]} bits per byte (gzip -9 {bits[1]})",
                  flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--model", default="gpt")
    parser.add_argument("--parts", type=float, nargs="+", default=PARTS, help="of the recipe's time")
    parser.add_argument("--default", metavar="CHECKOUT")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--recipe", metavar="TEXT", help=argparse.SUPPRESS)
    parser.add_argument("--score", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.recipe:
        return recipe(args.recipe)
    if args.score:
        return score(*args.score)
    import torch
    print(f"{time.strftime('%Y-%m-%d')}  {platform.system()} {platform.machine()}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n"
          f"python bench/train.py {' '.join(map(str, sys.argv[1:]))}", flush=True)
    for text in args.texts:
        compare(text, args.model, args.parts)
    if args.default:
        compare_defaults(args.default, args.seeds)


if __name__ == "__main__":
    main()
