"""Does a device compute what the CPU computes? The first module that does not is named.

    python tests/selfcheck.py                       # on the best device there is
    python tests/selfcheck.py --device mps --dtype bfloat16

Each architecture's tiny golden runs on the CPU and on the device: a pass over a sequence, the same
in pieces with a state, and a backward pass. The outputs of all modules are compared in the order in
which they are computed. First the CPU itself is compared with the official code's logits.
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import train  # noqa: E402  (the folder of the project is on the path only now)
from process import choose_device  # noqa: E402

GOLDENS = {"gpt": "gpt2", "llama3": "llama32_hf", "glm4": "glm4_0414", **{
    f"rwkv{n}": f"rwkv{n}" for n in (6, 2, 3, 4, 5)}}
# Largest difference that rounding explains, relative to the largest value of a module's output.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def load(name: str, device: str, dtype: torch.dtype):
    """The golden checkpoint of an architecture."""
    return train.load_checkpoint(ROOT / "tests/golden" / GOLDENS[name], device, dtype)


def differ(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value; infinite for NaN and other shapes."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return float("inf")
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)).item()


def trace(model, tokens: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """What is computed, in this order: (where, tensor)."""
    seen, phase = [], "a sequence"
    hooks = [module.register_forward_hook(
        lambda module, inputs, output, name=name: seen.append((f"{phase}: {name}", output.detach().clone())))
        for name, module in model.named_modules() if name]
    try:
        logits = model(tokens)
        seen.append((f"{phase}: the logits", logits))
        phase = "pieces with a state"
        state = model.new_state(*tokens.shape)
        with torch.no_grad():
            for piece in tokens.split([5, 1, tokens.shape[1] - 6], dim=1):
                model(piece, state)
        seen += [(f"{phase}: the state's {name}", tensor.clone()) for name, tensor in state._asdict().items()]
    finally:
        for hook in hooks:
            hook.remove()
    logits.float().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).mean().neg().backward()
    seen += [(f"backward: the gradient of {name}", p.grad) for name, p in reversed([*model.named_parameters()])]
    return seen


def check(name: str, device: str, dtype: torch.dtype) -> tuple[bool, str]:
    """(whether the device computes this architecture right, one line that says so)."""
    from safetensors.torch import load_file
    expected = load_file(ROOT / "tests/golden" / GOLDENS[name] / "expected.safetensors")
    tokens = expected["tokens"]
    with torch.no_grad():
        official = differ(load(name, "cpu", torch.float32)(tokens), expected["logits"])
    if not official < 1e-4:
        return False, f"{name:7} the CPU itself differs from the official code's logits by {official:.1e}"
    want, got = (trace(load(name, where, dtype), tokens.to(where)) for where in ("cpu", device))
    worst, place = 0.0, ""
    for (where, theirs), (_, ours) in zip(want, got, strict=True):
        by = differ(ours, theirs)
        if not by <= TOLERANCE[dtype]:
            return False, f"{name:7} DEVIATES first at {where}: by {by:.1e} of its largest value"
        worst, place = max((worst, place), (by, where))
    return True, f"{name:7} as on the CPU: {len(want)} tensors; most, {worst:.1e}, at {place or 'none'}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu, cuda, mps, xpu, ... (the best there is)")
    parser.add_argument("--dtype", default="float32", choices=[str(dtype)[6:] for dtype in TOLERANCE])
    asked = parser.parse_args(argv)
    device, dtype = str(choose_device(asked.device)), getattr(torch, asked.dtype)
    print(f"torch {torch.__version__}, {device}, {asked.dtype}")
    results = [check(name, device, dtype) for name in GOLDENS]
    for _, line in results:
        print(line)
    return 0 if all(right for right, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
