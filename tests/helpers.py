"""What several tests need: comparing tensors with a reason, the loss, and how a run is started."""
import contextlib
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent


def assert_close(actual, expected, relative, what=""):
    """Largest difference at most `relative` times the largest expected value."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.double()
    worst, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert worst <= relative * max(scale, 1e-6), f"{what} differs by {worst:.3g}, scale {scale:.3g}"


def assert_gradient(grad, expected, name, tolerance):
    """The size of a gradient and its direction, both from one official run.

    expected: gradnorm.NAME, its L2 norm, and graddot.NAME, its product with cos(1), cos(2), ... in
    the order of its elements: a wrong sign, scale, place or element changes at least one. Norms
    below 1e-3 are compared absolutely (k biases of channels that RoPE leaves alone are 0).
    """
    grad = grad.detach().double().flatten()
    norm = expected[f"gradnorm.{name}"].item()
    along = (grad * torch.cos(torch.arange(1.0, len(grad) + 1, dtype=torch.float64))).sum().item()
    worst = max(abs(grad.norm().item() - norm), abs(along - expected[f"graddot.{name}"].item()))
    told = f"gradient of {name} is off by {worst:.3g}, norm {norm:.3g}"
    assert worst <= tolerance * max(norm, 1e-3), told


def digest(tensors):
    """One SHA-256 of names, dtypes, shapes and bits, whatever file they came from."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def cross_entropy(model, tokens):
    """Mean cross entropy of each position against the next id."""
    logits = model(tokens)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def run(*arguments, timeout=240, cwd=ROOT, **environment):
    """Run a command of the project, offline, on one thread; returns the finished process."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=settings, text=True,
                          capture_output=True, timeout=timeout)


def run_here(main, *arguments, input=b"", encoding="utf-8"):
    """What `run` returns, of a script's main in this process: importing torch again takes seconds.

    encoding: of the terminal that the script writes to.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(input), encoding)):
        try:
            main([*map(str, arguments)])
        except SystemExit as stopped:
            status = stopped.code or 0
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))
    return subprocess.CompletedProcess(arguments, status, *texts)


def assert_one_line_error(process, *words):
    """Exit status 2, no traceback, and a last line with all of the words."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr, process.stderr
    last = process.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, f"{word!r} is not in {last!r}"


def published(folder):
    """All tensors of expected.safetensors in a folder of goldens."""
    from safetensors.torch import load_file
    return load_file(Path(folder) / "expected.safetensors")


@torch.no_grad()
def continuation(model, prompt, new):
    """Greedy ids by running everything again for each new id: what a cache must equal."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]
