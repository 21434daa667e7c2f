"""train.py: the run directory, resuming, data, gradients, settings."""
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from helpers import ROOT, assert_close, assert_one_line_error, run, run_here
from torch import nn
from torch.nn import functional as F

import checkpoints
import plan
import train
from gpt import GPT, GPTConfig

SMALL = ["--layers", "1", "--width", "32", "--context", "32", "--tokens-per-step", "128", "--vocab", "300",
         "--steps", "6", "--device", "cpu", "--dtype", "float32", "--lr", "0.003", "--workers", "1"]
ALONE = train.Run(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Thirty small documents."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for i in range(30):
        names = ["".join(rng.choices("aeiouhklmnprst", k=rng.randint(2, 7))) for _ in range(20)]
        lines = [f"def {name}(x):\n    return x * {rng.choice(names)} + {i}\n" for name in names]
        (folder / f"part_{i}.py").write_text("\n".join(lines))
    return folder


def start(corpus, out, *more):
    """Run the script inside this process."""
    train.main([*SMALL, "--data", str(corpus), "--out", str(out), *map(str, more)])
    return Path(out)


def weights(out):
    return (Path(out) / "model.safetensors").read_bytes()


def events(out, key):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {event["step"]: event[key] for event in lines if key in event}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run of six steps."""
    return start(corpus, tmp_path_factory.mktemp("runs") / "whole")


# --- a run and its directory ---

def test_a_run_directory_is_complete_and_loads(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "resume",
            "generation_config.json", "settings.json", "log.jsonl"} <= names
    assert [path.name for path in (finished / "resume").iterdir()] == ["resume.pt"]
    assert not [name for name in names if name.endswith((".part", ".tmp"))]
    model, tokenizer = train.load_checkpoint(finished), train.text.load_tokenizer(finished)
    assert model.config.vocab_size == tokenizer.vocab_size == 300
    [new] = model.generate([tokenizer.encode("def ")], 5, seed=0)
    assert len(new) <= 28 and tokenizer.decode(new)
    assert list(events(finished, "loss")) == [1, 2, 3, 4, 5, 6]
    assert {"gzip", "xz", "bits_per_byte"} <= json.loads((finished / "log.jsonl").read_text().splitlines()[-1]).keys()


def test_the_losses_are_drawn_where_matplotlib_is_installed(finished, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copy(finished / "log.jsonl", tmp_path)
    checkpoints.draw_log(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2, "nothing half written is left"


def test_transformers_opens_a_run_directory_to_the_same_logits_and_ids(finished):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished).eval()
    tokens = torch.arange(20)[None]
    assert_close(train.load_checkpoint(finished)(tokens), theirs(tokens).logits, 1e-5)
    text = "def name(x):\n    return 'é' + '👋'\n"
    ids = train.text.load_tokenizer(finished).encode(text)
    assert transformers.AutoTokenizer.from_pretrained(finished).encode(text) == ids


def test_what_a_terminal_cannot_show_is_no_crash(finished, corpus, tmp_path):
    done = run("chat.py", finished, "--prompt", "é", "--max-new-tokens", "3", "--device", "cpu", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.startswith("?"), done.stderr
    done = run_here(train.main, *SMALL, "--steps", "1", "--data", corpus, "--sample-prompt", "é", "--out", tmp_path / "run",
                    encoding="ascii")
    assert done.returncode == 0 and "--- sample ---\n?" in done.stdout, done.stderr


def test_the_loss_falls(corpus, tmp_path):
    losses = list(events(start(corpus, tmp_path / "run", "--steps", 60), "loss").values())
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_a_second_run_overwrites_nothing(corpus, finished, tmp_path, monkeypatch):
    before = weights(finished)
    with pytest.raises(SystemExit) as stopped:
        start(corpus, finished)
    assert stopped.value.code == 2 and weights(finished) == before
    monkeypatch.chdir(tmp_path)
    for name in ("gpt", "gpt-2"):
        train.main([*SMALL, "--steps", "1", "--data", str(corpus)])
        assert (tmp_path / "out" / name / "model.safetensors").exists()


def test_settings_json_repeats_a_run_to_the_same_bits(finished, corpus, tmp_path):
    train.main(["--settings", str(finished / "settings.json"), "--out", str(tmp_path / "again")])
    assert weights(tmp_path / "again") == weights(finished)


def test_init_from_goes_on_with_a_checkpoint_and_its_tokenizer(finished, corpus, tmp_path, capsys):
    train.main(["--init-from", str(finished), "--eval-only", "--data", str(corpus), "--context", "32",
                "--dtype", "float32"])
    bits = events(finished, "bits_per_byte")[6]
    assert f"bits_per_byte {bits:.4f}" in capsys.readouterr().out
    train.main(["--init-from", str(finished), "--data", str(corpus), "--context", "32", "--steps", "2",
                "--tokens-per-step", "128", "--out", str(tmp_path / "more")])
    assert events(tmp_path / "more", "loss")[1] < events(finished, "loss")[1]


def test_without_a_flag_everything_is_derived(corpus, tmp_path, monkeypatch):
    """The default run, but on little text and for two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "standard_library", lambda: [(p.name, p) for p in sorted(corpus.iterdir())])
    train.main(["--steps", "2"])
    settings = json.loads((tmp_path / "out/gpt/settings.json").read_text())
    shape = plan.Shape(*(settings[name] for name in ("layers", "width", "context", "vocab", "tokens_per_step")))
    assert shape in plan.SHAPES
    assert all(settings[name] is not None for name in ("lr", "context", "micro_batch", "sample_prompt", "device"))


def test_the_default_data_is_the_source_of_the_standard_library():
    files = train.standard_library()
    names = [name for name, _ in files]
    assert {"argparse.py", "json/decoder.py"} <= set(names) and len(names) > 300
    assert not [name for name in names if "site-packages" in name or name.startswith(("test/", "encodings/"))]


# --- resuming ---

@pytest.mark.slow
def test_resume_after_kill_at_any_moment_gives_the_same_bits(corpus, finished, tmp_path):
    """kill -9 again and again, while every step saves, until the run is through."""
    out, command = tmp_path / "run", [sys.executable, "train.py"]
    arguments, kills = [*SMALL, "--data", str(corpus), "--out", str(out), "--save-minutes", "0"], 0
    for pause in (0.05, 0.0, 0.12, None):
        if (out / "resume/resume.pt").exists():
            arguments = ["--resume", str(out)]
        process = subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT,
                                   env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
        if pause is None:
            output = process.communicate(timeout=200)[0]
            assert process.returncode == 0, output
        else:
            while not (line := process.stdout.readline()).startswith("step ") and line:
                pass
            time.sleep(pause)
            process.kill()
            process.communicate()
            kills += 1
            if not (out / "resume/resume.pt").exists():
                shutil.rmtree(out)           # killed before the first save: the run starts anew
    assert kills == 3 and weights(out) == weights(finished)
    assert events(out, "loss") == events(finished, "loss")


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(corpus, finished, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "train.py", *SMALL, "--data", str(corpus), "--out", str(out), "--steps", "2000"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert f"--resume {out}" in output and (out / "resume/resume.pt").exists()


def test_a_half_written_save_does_no_harm(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "resume/resume.pt.part").write_bytes(b"half")
    (out / "model.safetensors").write_bytes(b"half")                   # readers' files are never read back
    train.main(["--resume", str(out)])
    assert events(out, "loss") == events(finished, "loss")
    assert weights(out) == weights(finished) and not (out / "resume/resume.pt.part").exists()


def test_resume_refuses_what_would_change_the_result(finished, corpus, tmp_path):
    for flags, word in ((["--lr", "1"], "--lr"), (["--steps", "9"], "--steps"), (["--seed", "7"], "--seed")):
        assert_one_line_error(run_here(train.main, "--resume", finished, *flags), word, "would change the result")
    changed = shutil.copytree(corpus, tmp_path / "corpus")
    out = start(changed, tmp_path / "run", "--steps", 2)
    (changed / "part_3.py").write_text("new = 1\n")
    assert_one_line_error(run_here(train.main, "--resume", out), "data have changed")
    (out / "resume/resume.pt").write_bytes((out / "resume/resume.pt").read_bytes()[:1000])
    assert_one_line_error(run_here(train.main, "--resume", out), "damaged")


@pytest.mark.parametrize("steps", [5])
def test_a_recurrent_model_trains_and_resumes_through_the_same_script(corpus, tmp_path, monkeypatch, steps):
    monkeypatch.setitem(train.MODELS, "toy", ("toy", "Toy"))
    monkeypatch.setitem(checkpoints.MODEL_TYPES, "toy", "toy")
    whole = start(corpus, tmp_path / "whole", "--model", "toy", "--steps", steps)
    save = train.save_resume

    def save_and_stop(*arguments, **state):
        save(*arguments, **state)
        if state["step"] == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_resume", save_and_stop)
    with pytest.raises(SystemExit):
        start(corpus, tmp_path / "cut", "--model", "toy", "--steps", steps, "--save-minutes", 0)
    monkeypatch.setattr(train, "save_resume", save)
    train.main(["--resume", str(tmp_path / "cut")])
    for name, tensor in train.load_checkpoint(whole).state_dict().items():
        assert torch.equal(tensor, train.load_checkpoint(tmp_path / "cut").state_dict()[name]), name
    assert isinstance(train.load_checkpoint(whole), toy.Toy)


# --- several processes ---

@pytest.mark.slow
def test_two_processes_equal_one(corpus, finished, tmp_path):
    out = tmp_path / "two"
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py",
               *SMALL, "--data", corpus, "--out", out, "--micro-batch", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert events(out, "loss") == pytest.approx(events(finished, "loss"), rel=1e-5)
    ours, theirs = train.load_checkpoint(out).state_dict(), train.load_checkpoint(finished).state_dict()
    for name in ours:
        assert_close(ours[name], theirs[name], 1e-3, name)
    assert done.stdout.count("step 6/6") == 1                           # only rank 0 speaks


# --- data ---

def test_the_token_cache_is_used_again_only_for_the_same_inputs(corpus, tmp_path, monkeypatch):
    folder, packed, pack = shutil.copytree(corpus, tmp_path / "corpus"), [], train.data.pack
    monkeypatch.setattr(train.data, "pack", lambda *a, **k: packed.append(1) or pack(*a, **k))
    start(folder, tmp_path / "a", "--steps", 1)
    start(folder, tmp_path / "b", "--steps", 1)
    assert len(packed) == 1
    start(folder, tmp_path / "c", "--steps", 1, "--vocab", 310)         # another tokenizer
    (folder / "part_0.py").write_text("x = 1\n")                        # other inputs
    start(folder, tmp_path / "d", "--steps", 1)
    assert len(packed) == 3


def test_every_token_is_a_target_once_an_epoch_in_an_order_of_the_seed():
    ids = np.arange(1000, dtype=np.uint16)
    for world in (1, 2, 3):
        batches = [train.Batches(ids, 32, 8, 3, 5, train.Run(ALONE.device, ALONE.dtype, rank, world))
                   for rank in range(world)]
        seen = []
        for step in range(4):                                          # 32 sequences: one epoch
            for part in (part for one in batches for part in one(step)):
                targets = part["targets"]
                seen += targets[targets != -100].tolist()
                inside = targets != -100
                assert torch.equal(part["tokens"][inside] + 1, targets[inside])
        assert sorted(seen) == list(range(1, 1000)), world
    one = train.Batches(ids, 32, 8, 3, 5, ALONE)
    assert torch.equal(one(7)[0]["tokens"], train.Batches(ids, 32, 8, 3, 5, ALONE)(7)[0]["tokens"])
    assert not torch.equal(one(0)[0]["tokens"], train.Batches(ids, 32, 8, 3, 6, ALONE)(0)[0]["tokens"])
    assert not torch.equal(one(0)[0]["tokens"], one(4)[0]["tokens"])    # another order each epoch


def test_a_corpus_shorter_than_the_context_is_one_short_sequence():
    batches = train.Batches(np.arange(10, dtype=np.uint16), 512, 1, 1, 0, ALONE)
    assert batches(0)[0]["tokens"].shape == (1, 9)


def test_validation_reads_every_token_once():
    torch.manual_seed(0)
    model = GPT(GPTConfig.sized(1, 32, 50, 16)).eval()
    ids = torch.randint(50, (70,)).numpy().astype(np.uint16)
    want, before = 0.0, [0, *ids[:-1].tolist()]
    for begin in range(0, 70, 16):
        logits = model(torch.tensor([before[begin:begin + 16]]))[0]
        want += F.cross_entropy(logits, torch.tensor(ids[begin:begin + 16].astype(np.int64)), reduction="sum").item()
    assert train.validate(model, ALONE, ids, 16, 0, 70) == pytest.approx(want / 70, rel=1e-5)


def test_nanogpt_token_folders_and_jsonl_are_data(tmp_path, corpus):
    folder = tmp_path / "nano"
    folder.mkdir()
    for split, text in (("train", "hello world " * 200), ("val", "hello " * 60)):
        np.frombuffer(text.encode(), np.uint8).astype(np.uint16).tofile(folder / f"{split}.bin")
    arguments = [a for a in SMALL if a not in ("--vocab", "300")]
    train.main([*arguments, "--data", str(folder), "--tokenizer", "bytes", "--out", str(tmp_path / "a")])
    assert events(tmp_path / "a", "loss")
    lines = [json.dumps({"text": f"line {i} says {i * i} and more"}) for i in range(200)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    train.main([*SMALL, "--data", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "b")])
    assert events(tmp_path / "b", "bits_per_byte")
    assert_one_line_error(run_here(train.main, *arguments, "--data", folder), "no tokenizer")


# --- loss and gradients ---

def model_and_batch():
    torch.manual_seed(0)
    model = GPT(GPTConfig.sized(2, 32, 61, 24))
    tokens = torch.randint(61, (6, 24))
    targets = torch.randint(61, (6, 24))
    targets[0, 5:] = -100                                              # rows of unequal worth
    targets[3, :20] = -100
    return model, tokens, targets


def test_accumulated_gradients_equal_those_of_the_large_batch():
    model, tokens, targets = model_and_batch()
    scaler, seen = torch.amp.GradScaler("cpu", enabled=False), []
    logits = model(tokens)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    want.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    for size in (1, 2, 4, 6):
        model.zero_grad()
        parts = [{"tokens": t, "targets": y} for t, y in zip(tokens.split(size), targets.split(size))]
        optimizer = train.make_optimizer(model, 0.1)
        optimizer.step = lambda: seen.append({n: p.grad.clone() for n, p in model.named_parameters()})
        mean, norm, count = train.training_step(ALONE, train.NextTokenLoss(model), optimizer, scaler, parts,
                                                lr=1.0, clip=math.inf, nominal=144)
        assert mean == pytest.approx(want.item(), rel=1e-6) and count == (targets != -100).sum()
        assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in grads.values())), rel=1e-5)
        for name, grad in seen.pop().items():
            assert_close(grad, grads[name], 1e-5, name)


def test_the_loss_in_pieces_equals_the_loss_at_once():
    model, tokens, targets = model_and_batch()
    whole, count = train.NextTokenLoss(model)({"tokens": tokens, "targets": targets})
    whole.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.config = GPTConfig.sized(2, 32, (1 << 26) // 10, 24)          # as if a piece had 10 positions
    pieces, again = train.NextTokenLoss(model)({"tokens": tokens, "targets": targets})
    pieces.backward()
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-6) and count == again
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, grads[name], 1e-5, name)


def test_l2wrap_adds_its_gradient_and_no_loss():
    model = toy.Toy(toy.ToyConfig()).train()
    tokens, targets = torch.randint(64, (2, 9)), torch.randint(64, (2, 9))
    logits = model(tokens)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    official = plain + 0.5e-4 * logits.amax(-1).square().sum()          # gradient: 1e-4 * largest logit
    want = torch.autograd.grad(official, list(model.parameters()))
    loss, _ = train.NextTokenLoss(model)({"tokens": tokens, "targets": targets})
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for got, grad in zip(torch.autograd.grad(loss, list(model.parameters())), want):
        assert_close(got, grad, 1e-5)
    model.eval()
    loss, _ = train.NextTokenLoss(model)({"tokens": tokens, "targets": targets})
    assert not torch.allclose(torch.autograd.grad(loss, model.head.weight)[0], want[-2], rtol=1e-6, atol=0)


def test_the_optimizer_honours_the_model():
    optimizer = train.make_optimizer(toy.Toy(toy.ToyConfig()), weight_decay=0.3)
    first, second = optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"], second["lr_scale"]) == (0.3, 0.0, 2.0)
    assert first["betas"] == (0.8, 0.9) and first["eps"] == 1e-6


def test_checkpointed_activations_change_nothing_but_memory():
    model, tokens, targets = model_and_batch()
    batch = {"tokens": tokens, "targets": targets}
    train.NextTokenLoss(model)(batch)[0].backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    train.checkpoint_blocks(model)
    train.NextTokenLoss(model)(batch)[0].backward()
    for parameter, grad in zip(model.parameters(), grads):
        assert torch.equal(parameter.grad, grad)


def test_the_estimate_counts_what_autograd_keeps():
    config = GPTConfig.sized(2, 32, 61, 24)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    model, tokens = GPT(config), torch.zeros(1, 24, dtype=torch.int64)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = train.NextTokenLoss(model)({"tokens": tokens, "targets": tokens})
    real = sum(size for pointer, size in kept.items() if pointer not in own)
    with torch.device("meta"):
        empty = train.NextTokenLoss(GPT(config))
    assert plan.activation_bytes(empty, 24) == pytest.approx(real, rel=0.15), loss


# --- robust steps ---

def break_loss(monkeypatch, factor):
    """Multiply the loss of the n-th training batch, from 1 on, by factor(n)."""
    forward, calls = train.NextTokenLoss.forward, []

    def broken(self, batch):
        nats, count = forward(self, batch)
        if self.model.training and not nats.is_meta:
            calls.append(1)
            nats = nats * factor(len(calls))
        return nats, count
    monkeypatch.setattr(train.NextTokenLoss, "forward", broken)


def test_a_step_without_a_finite_loss_is_skipped(corpus, tmp_path, monkeypatch, capsys):
    break_loss(monkeypatch, lambda n: math.nan if n == 2 else 1.0)
    out = start(corpus, tmp_path / "run", "--steps", 4)
    assert "step 2: loss nan" in capsys.readouterr().out
    assert all(p.isfinite().all() for p in train.load_checkpoint(out).parameters())
    assert list(events(out, "loss")) == [1, 2, 3, 4]


def test_a_finite_loss_with_an_infinite_gradient_is_skipped():
    model, tokens, targets = model_and_batch()
    optimizer, scaler = train.make_optimizer(model, 0.1), torch.amp.GradScaler("cpu", enabled=False)
    before = [p.clone() for p in model.parameters()]
    model.wte.weight.register_hook(lambda grad: grad * math.inf)
    mean, norm, _ = train.training_step(ALONE, train.NextTokenLoss(model), optimizer, scaler,
                                        [{"tokens": tokens, "targets": targets}], 1.0, 1.0, 144)
    assert math.isfinite(mean) and not math.isfinite(norm)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_ten_bad_steps_in_a_row_stop_the_run_and_the_last_good_one_is_saved(corpus, tmp_path, monkeypatch, capsys):
    break_loss(monkeypatch, lambda n: math.inf if n > 3 else 1.0)
    with pytest.raises(SystemExit) as stopped:
        start(corpus, tmp_path / "run", "--steps", 30)
    assert stopped.value.code == 2 and "step 3 is saved" in capsys.readouterr().err
    _, saved = train.load_resume(tmp_path / "run")
    assert saved["step"] == 3
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_a_compiler_that_fails_costs_one_line(corpus, tmp_path, monkeypatch, capsys):
    def broken(*arguments, **more):
        raise RuntimeError("no compiler\nat all")
    monkeypatch.setattr(torch, "compile", broken)
    start(corpus, tmp_path / "run", "--steps", 2, "--compile", "on")
    assert "compile    failed; continuing without (RuntimeError: no compiler)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_equals_an_eager_one_and_leaves_no_trace(corpus, tmp_path):
    eager = train.load_checkpoint(start(corpus, tmp_path / "eager", "--steps", 3))
    fast = start(corpus, tmp_path / "fast", "--steps", 3, "--compile", "on")
    assert not [name for name in train.load_resume(fast)[1]["model"] if "_orig_mod" in name]
    for name, parameter in train.load_checkpoint(fast).named_parameters():
        assert_close(parameter, eager.get_parameter(name), 2e-3, name)


def test_out_of_memory_answers_with_the_next_smaller_setting(corpus, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    monkeypatch.setattr(train, "training_step", full)
    for flags, answer in (([], "--micro-batch 2"), (["--micro-batch", "1"], "--checkpoint-activations"),
                          (["--micro-batch", "1", "--checkpoint-activations"], "--context 16")):
        with pytest.raises(SystemExit) as stopped:
            start(corpus, tmp_path / str(len(flags)), *flags)
        assert stopped.value.code == 2 and answer in capsys.readouterr().err


@pytest.mark.parametrize("terminal, lines", [(False, 200), (True, 20)])
def test_a_long_run_is_about_200_lines_and_on_a_terminal_20(terminal, lines, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    one = train.Run(torch.device("cpu"), torch.float32)
    for step in range(1, 1801):
        one.say_step(f"step {step}", step, 1800)
    one.say("end")
    shown = capsys.readouterr().out
    assert lines <= shown.count("\n") <= lines + 3 and shown.endswith("end\n")
    assert ("\r" in shown) == terminal


# --- settings ---

@pytest.mark.parametrize("flags, words", [
    (["--stepz", "3"], ["--stepz", "--steps"]), (["--steps", "x"], ["--steps", "int", "'x'"]),
    (["--steps=0"], ["--steps", "0", "at least 1"]), (["--lr", "nan"], ["--lr"]),
    (["--model", "bert"], ["bert", "gpt"]), (["--compile", "maybe"], ["maybe", "auto"]),
    (["--final_lr", "2"], ["--final-lr", "at most 1"]), (["--data", "/no/such"], ["/no/such"]),
    (["--device", "cpu", "--dtype", "float16"], ["float16", "bfloat16"]), (["--settings", "/no/such.json"], ["/no/such.json"]),
    (["--layers", "2", "--size", "gpt2"], ["--size"]), (["--init-from", "/no/such"], ["/no/such"]),
    (["--resume", "/no/such"], ["/no/such"])])
def test_a_wrong_setting_is_one_line_and_status_2(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(flags)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in error
    assert all(word in error for word in words), error


def test_a_wrong_size_or_config_field_is_named(corpus, tmp_path, capsys):
    for flags, word in ((["--config", "n_heads=2"], "n_head"), (["--config", "n_head=x"], "n_head"),
                        (["--config", "n_head"], "field=value")):
        with pytest.raises(SystemExit) as stopped:
            start(corpus, tmp_path / "run", *flags)
        assert stopped.value.code == 2 and word in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_flags_take_equals_signs_underscores_and_none(corpus):
    settings, given = train.parse_settings(train.Settings, ["--weight_decay=0.2", "--eval-only", "--data", "a", "b"], "")
    assert (settings.weight_decay, settings.eval_only, settings.data) == (0.2, True, ["a", "b"])
    assert given == {"weight_decay", "eval_only", "data"}


def test_flags_have_the_names_that_people_type_first():
    settings, given = train.parse_settings(train.Settings, ["--learning-rate", "0.1", "--max_iters=7",
                                                            "--batch-size", "3", "--block-size", "64"], "")
    assert (settings.lr, settings.steps, settings.batch_size, settings.context) == (0.1, 7, 3, 64)
    assert given == {"lr", "steps", "batch_size", "context"}


def test_batch_size_and_epochs_decide_the_tokens_of_a_step_and_the_steps(corpus, tmp_path):
    arguments = [a for a in SMALL if a not in ("--steps", "6", "--tokens-per-step", "128")]
    train.main([*arguments, "--data", str(corpus), "--out", str(tmp_path / "run"), "--batch-size", "3",
                "--epochs", "0.05"])
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    tokens = len(train.data.open_tokens(next((tmp_path / "data").glob("*/train.bin")))[0])
    assert settings["tokens_per_step"] == 96
    assert len(events(tmp_path / "run", "loss")) == round(0.05 * tokens / 96)


def test_files_of_ones_own_to_validate_on(corpus, tmp_path):
    mine = "def held_out(x):\n    return x + 1\n" * 20
    (tmp_path / "mine.txt").write_text(mine)
    out = start(corpus, tmp_path / "run", "--val", tmp_path / "mine.txt")
    folder = next((tmp_path / "data").iterdir())
    tokenizer = train.text.load_tokenizer(out)
    train_tokens, val = (train.data.open_tokens(folder / f"{split}.bin")[0].tolist() for split in ("train", "val"))
    assert tokenizer.decode(val) == mine + "<|endoftext|>"
    assert train_tokens.count(tokenizer.end_id) == 30                   # nothing of --data is held out


def test_more_processes_than_sequences_raise_the_sequences_and_say_so(corpus, tmp_path, capsys):
    settings, given = train.parse_settings(train.Settings, [*SMALL, "--data", str(corpus), "--out",
                                                            str(tmp_path / "run")], "")
    run = train.start_run(settings, train.STARTED)
    prepared = train.prepare_corpus(settings, run)
    run.world = 8
    train.derive(settings, given, run, prepared, None)
    assert settings.tokens_per_step == 8 * 32
    assert "4 sequences a step are fewer than the processes: 8 instead" in capsys.readouterr().out


def test_token_files_stand_alone_in_data(corpus, finished, tmp_path, capsys):
    packed = next((finished.parent / "data").iterdir())
    with pytest.raises(SystemExit):
        train.main([*SMALL, "--data", str(packed), str(corpus), "--out", str(tmp_path / "run")])
    assert "has token files: give it alone" in capsys.readouterr().err


def test_the_closing_line_begins_with_the_users_own_text(tmp_path, capsys):
    lines = [json.dumps({"text": f"Once upon a time {i} there was"}) for i in range(200)]
    (tmp_path / "story.jsonl").write_text("\n".join(lines))
    start(tmp_path / "story.jsonl", tmp_path / "run", "--steps", 1)
    assert capsys.readouterr().out.rstrip().endswith("--prompt 'Once upon a'")


def test_a_context_shorter_than_the_prompt_of_samples_is_no_error(corpus, tmp_path):
    arguments = [a if a != "32" or SMALL[i - 1] != "--context" else "2" for i, a in enumerate(SMALL)]
    train.main([*arguments, "--data", str(corpus), "--out", str(tmp_path / "run")])
    assert list(events(tmp_path / "run", "loss")) == [1, 2, 3, 4, 5, 6]


class Killed(Exception):
    """What stands for a kill inside this process."""


def kill_at(monkeypatch, step):
    """Let training be killed before this step, counted from 0, when everything before was saved."""
    real = train.Batches.__call__

    def batches(self, now):
        if now == step:
            raise Killed
        return real(self, now)
    monkeypatch.setattr(train.Batches, "__call__", batches)


@pytest.mark.parametrize("flags, said", [
    (["--micro-batch", "1"], "--micro-batch 1 instead of 4"),
    (["--checkpoint-activations"], "--checkpoint-activations True instead of False"),
    (["--dtype", "bfloat16"], "--dtype bfloat16 instead of float32")])
def test_a_run_goes_on_with_less_memory_or_other_precision_and_says_not_bit_exactly(
        corpus, finished, tmp_path, monkeypatch, capsys, flags, said):
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            start(corpus, tmp_path / "run", "--save-minutes", 0)
    capsys.readouterr()
    train.main(["--resume", str(tmp_path / "run"), *flags])
    assert f"resume     not bit-exactly: {said}\n" in capsys.readouterr().out
    losses, whole = events(tmp_path / "run", "loss"), events(finished, "loss")
    assert losses == pytest.approx(whole, rel=0.02) and list(losses) == list(whole)


def test_moved_data_are_the_same_data_and_other_data_are_refused(corpus, finished, tmp_path, monkeypatch, capsys):
    moved = Path(shutil.copytree(corpus, tmp_path / "moved"))
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            start(moved, tmp_path / "run", "--save-minutes", 0)
    moved.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    train.main(["--resume", str(tmp_path / "run"), "--data", str(tmp_path / "elsewhere")])
    assert "not bit-exactly" not in capsys.readouterr().out
    assert events(tmp_path / "run", "loss") == events(finished, "loss")
    assert weights(tmp_path / "run") == weights(finished)
    (tmp_path / "elsewhere/part_3.py").write_text("new = 1\n")
    assert_one_line_error(run_here(train.main, "--resume", tmp_path / "run", "--data", tmp_path / "elsewhere"),
                          "data have changed")


def test_resume_takes_the_file_and_a_finished_run_is_told_what_to_do(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    assert train.load_resume(str(out / "resume/resume.pt"))[0] == out
    assert_one_line_error(run_here(train.main, "--resume", out, "--steps", 9), f"--init-from {out} --steps 3")
    os.replace(out / "resume/resume.pt", out / "resume.pt")             # where older runs have it
    assert train.load_resume(str(out))[0] == out == train.load_resume(str(out / "resume.pt"))[0]


def test_a_run_on_another_number_of_processes_goes_on_and_says_not_bit_exactly(corpus, tmp_path, capsys):
    out = start(corpus, tmp_path / "run")
    saved = torch.load(out / "resume/resume.pt", weights_only=True)
    torch.save({**saved, "world": 2, "step": 5}, out / "resume/resume.pt")
    train.main(["--resume", str(out)])
    assert "not bit-exactly: started on 2 processes" in capsys.readouterr().out
    assert max(events(out, "loss")) == 6


@pytest.mark.parametrize("part, name", [("config", "eos_token_id"), ("settings", "keep")])
def test_a_resume_file_of_an_earlier_version_is_refused_by_name(finished, tmp_path, part, name):
    out = shutil.copytree(finished, tmp_path / "run")
    saved = torch.load(out / "resume/resume.pt", weights_only=True)
    del saved[part][name]
    torch.save(saved, out / "resume/resume.pt")
    assert_one_line_error(run_here(train.main, "--resume", out), "earlier version", f"--init-from {out}")


def test_help_shows_every_flag_with_default_and_meaning():
    shown = " ".join(run_here(train.main, "--help").stdout.split())
    for name, spec in train.Settings.__dataclass_fields__.items():
        assert "--" + name.replace("_", "-") in shown
        assert " ".join(spec.metadata["help"].split())[:20] in shown, name


@pytest.mark.slow
def test_minutes_end_in_time_with_the_learning_rate_decayed(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STARTED", time.time())
    arguments = [a for a in SMALL if a not in ("--steps", "6")]
    train.main([*arguments, "--data", str(corpus), "--out", str(tmp_path / "run"), "--minutes", "0.15",
                "--keep", "last"])                                      # no early end
    assert time.time() - train.STARTED < 60
    rates = [*events(tmp_path / "run", "lr").values()]
    assert len(rates) > 20 and max(rates) > 0.7 * 0.003 and rates[-1] < 0.3 * 0.003


# --- the plan, the clock, the optimiser, the best weights ---

def test_the_plan_is_the_largest_shape_that_gets_enough_steps():
    seconds = {shape: 0.05 * 4 ** i for i, shape in enumerate(plan.SHAPES)}
    tried = []

    def step_seconds(shape, enough):
        tried.append(shape)
        return seconds[shape]
    for i in (1, 3):
        tried.clear()
        shape, each, time = plan.choose(plan.SHAPES, seconds[plan.SHAPES[i]] * plan.STEPS * 1.01, math.inf, step_seconds)
        assert shape == plan.SHAPES[i] and each == seconds[shape] and tried == [*plan.SHAPES[:i + 2]]
        assert time == seconds[shape] * plan.STEPS * 1.01
    shape, each, time = plan.choose(plan.SHAPES, 0.01, math.inf, step_seconds)
    assert shape == plan.SHAPES[0], "too little time even for the smallest"


def test_little_text_shortens_the_plan_to_a_few_epochs():
    shape, each, time = plan.choose(plan.SHAPES, 600, 30_000, lambda shape, enough: 0.01)
    assert shape == plan.SHAPES[0]
    assert time / each * shape.tokens == pytest.approx(plan.EPOCHS * 30_000 / plan.BYTES)


def test_plan_says_what_would_be_trained_and_stops(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--data", str(corpus), "--plan", "--width", "32", "--layers", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "tokens/s at 1 x 32, context 256" in out and "epochs" in out and not [*tmp_path.iterdir()]


def test_plan_says_that_nothing_was_open_and_names_the_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--plan", "--size", "gpt2", "--device", "cpu"])
    assert "nothing was left open" in capsys.readouterr().out
    assert_one_line_error(run_here(train.main, "--plan", "--size", "124m"), "gpt2-medium")


def test_nanogpts_characters_train_without_a_token_that_ends_a_text(tmp_path, monkeypatch, capsys):
    text = "to be or not to be\n" * 60
    stoi = {char: n for n, char in enumerate(sorted(set(text)))}
    (tmp_path / "data").mkdir()
    ids = np.array([stoi[char] for char in text], np.uint16)
    ids[:900].tofile(tmp_path / "data/train.bin")
    ids[900:].tofile(tmp_path / "data/val.bin")
    (tmp_path / "data/meta.pkl").write_bytes(pickle.dumps(
        {"vocab_size": len(stoi), "stoi": stoi, "itos": {n: char for char, n in stoi.items()}}))
    train.main(["--layers", "1", "--width", "32", "--context", "32", "--tokens-per-step", "128", "--steps", "3",
                "--device", "cpu", "--dtype", "float32", "--tokenizer", str(tmp_path / "data"),
                "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")])
    assert "bits per byte" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/config.json").read_text())["eos_token_id"] is None


def test_the_published_muon_is_what_ours_does():
    """torch.optim.Muon with the coefficients and steps of ours; it computes in bf16."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    torch.manual_seed(0)
    for rows, columns in ((24, 40), (40, 24), (24, 24)):
        ours, theirs = (nn.Parameter(torch.ones(rows, columns)) for _ in range(2))
        group = dict(params=[ours], muon=True, weight_decay=0.1)
        optimizers = (train.Muon([group], lr=0.02),
                      torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, ns_steps=3))
        for _ in range(4):
            grad = torch.randn(rows, columns)
            for parameter, optimizer in zip((ours, theirs), optimizers):
                parameter.grad = grad.clone()
                optimizer.step()
        assert_close(ours, theirs, 1e-3)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    config = GPTConfig.sized(2, 32, 61, 24)
    torch.manual_seed(0)
    one, two = GPT(config), GPT(config)
    two.load_state_dict(one.state_dict())
    for model, muon in ((one, 0.0), (two, 7.0)):
        optimizer = train.make_optimizer(model, 0.1, muon)
        for group in optimizer.param_groups:
            group["lr"] = 0.001 * group["lr_scale"]
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        hidden = name.startswith("h.") and a.dim() == 2
        assert torch.equal(a, b) != hidden, name
    update = two.h[0].mlp.c_fc.weight - one.h[0].mlp.c_fc.weight       # 7 times as large, and twice: 128 / 32 = 4
    assert 0.5 * 0.014 < torch.linalg.matrix_norm(update, 2) < 1.5 * 0.014


@pytest.mark.parametrize("keep", ("best", "last"))
def test_the_run_directory_holds_the_weights_of_the_best_validation(corpus, tmp_path, monkeypatch, keep):
    losses = iter((3.0, 2.0, 2.5, 2.4, 2.3, 2.2, 2.1))
    real, seen = train.validate, []

    def validate(model, *arguments):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        real(model, *arguments)
        return next(losses)
    monkeypatch.setattr(train, "validate", validate)
    out = start(corpus, tmp_path / "run", "--eval-every", 1, "--keep", keep)
    kept = train.load_checkpoint(out).state_dict()
    step = {"best": 2, "last": 6}[keep]
    assert len(seen) == (6 if keep == "best" else 7), "steps until it stops, and one of all the text"
    for name, value in seen[step - 1].items():
        assert torch.equal(kept[name], value) and torch.equal(seen[-1][name], value), name


def test_training_stops_when_validation_has_not_improved_for_a_third(corpus, tmp_path, monkeypatch, capsys):
    losses = iter((3.0, 2.0, 2.5, 2.4, 2.3, 2.2))
    monkeypatch.setattr(train, "validate", lambda *arguments: next(losses))
    start(corpus, tmp_path / "run", "--eval-every", 1)
    assert list(events(tmp_path / "run", "loss")) == [1, 2, 3, 4, 5]
    out = capsys.readouterr().out
    assert "no validation has been better than that of step 2" in out and "weights of step 2;" in out


def test_many_passes_over_a_text_are_warned_of(corpus, tmp_path, capsys):
    arguments = [a for a in SMALL if a not in ("--steps", "6")]
    train.main([*arguments, "--data", str(corpus), "--epochs", "9", "--eval-only"])
    assert "9 passes over the text" in capsys.readouterr().out


def test_importing_train_does_nothing(tmp_path):
    done = run("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train", cwd=tmp_path)
    assert done.returncode == 0 and not done.stdout and not list(tmp_path.iterdir())
