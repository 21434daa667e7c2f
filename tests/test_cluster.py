"""cluster.py and what train.py and finetune.py make of it: two processes equal one, in shards too."""
import json
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, assert_close, run

import published
import cluster
import finetune
import lora
import train
from checkpoints import load_checkpoint
from llama3 import Llama3, Llama3Config

SMALL = ["--layers", "2", "--width", "32", "--context", "32", "--tokens-per-step", "160", "--vocab", "300",
         "--steps", "6", "--device", "cpu", "--dtype", "float32", "--lr", "0.003", "--workers", "1",
         "--optimizer", "adamw", "--keep", "last", "--eval-tokens", "4096"]


def torchrun(*arguments):
    """Run a script in two processes on this machine."""
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *arguments)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Thirty small documents."""
    folder, dice = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for i in range(30):
        names = ["".join(dice.choices("aeiouhklmnprst", k=dice.randint(2, 7))) for _ in range(20)]
        lines = [f"def {name}(x):\n    return x * {dice.choice(names)} + {i}\n" for name in names]
        (folder / f"part_{i}.py").write_text("\n".join(lines))
    return folder


def start(corpus, out, *more):
    """Run train.py inside this process."""
    train.main([*SMALL, "--data", str(corpus), "--out", str(out), *map(str, more)])
    return Path(out)


def losses(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in lines if "loss" in event]


def assert_same_weights(ours, theirs, tolerance=1e-3):
    ours, theirs = load_checkpoint(ours).state_dict(), load_checkpoint(theirs).state_dict()
    for name in theirs:
        assert_close(ours[name], theirs[name], tolerance, name)

# --- in shards ---


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What tests/sharded.py says of each model."""
    folder = tmp_path_factory.mktemp("shards")
    done = torchrun("tests/sharded.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


MODELS = ("gpt, tied", "gpt, untied", "llama3, tied", "llama3, untied", "glm4, tied", "glm4, untied",
          "rwkv6, untied")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_shards_on_two_processes_equal_one_process(report, model):
    found = report[model]
    for ours, theirs in zip(found["losses"], found["expected"]):        # loss, norm, targets
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert found["parameters"] < 2e-3                                   # after three steps of Adam
    assert found["drawn"] == found["expected_drawn"]
    assert found["held"] < 0.6 * found["all"]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_shards_are_published_saved_and_loaded_without_a_whole_model(report, model):
    found = report[model]
    assert found["published"] == found["taken_back"] == 0
    assert found["resumed"][0] == pytest.approx(found["went_on"][0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_new_sharded_model_is_drawn_as_a_whole_one_is(report, model):
    for name, std in report[model]["whole_std"].items():
        assert report[model]["initial_std"][name] == pytest.approx(std, rel=0.15), name


@pytest.mark.slow
def test_train_in_shards_equals_train_and_goes_on_on_another_number_of_processes(corpus, tmp_path):
    begin = start(corpus, tmp_path / "begin", "--steps", 1)
    more = ["--data", str(corpus), "--init-from", str(begin), *SMALL[4:8], *SMALL[10:]]
    train.main([*more, "--out", str(tmp_path / "one")])
    done = torchrun("train.py", *more, "--shard", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert_same_weights(tmp_path / "two", tmp_path / "one")
    assert "in each of 2 processes" in done.stdout and done.stdout.count("step 6/6") == 1
    [saved] = (tmp_path / "two" / "resume").iterdir()
    assert saved.name == "step-6" and not (tmp_path / "two" / "resume" / "resume.pt").exists()


def test_a_sharded_run_goes_on_on_one_process(corpus, tmp_path, monkeypatch, capsys):
    whole = start(corpus, tmp_path / "whole", "--shard")
    step, real = iter(range(100)), train.training_step

    def stop(*arguments):
        if next(step) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)
    monkeypatch.setattr(train, "training_step", stop)
    with pytest.raises(SystemExit):
        start(corpus, tmp_path / "cut", "--shard")
    train.main(["--resume", str(tmp_path / "cut")])
    assert losses(tmp_path / "cut") == losses(whole)
    for name, tensor in load_checkpoint(whole).state_dict().items():
        assert torch.equal(tensor, load_checkpoint(tmp_path / "cut").state_dict()[name]), name
    (tmp_path / "cut" / "resume" / "step-9.part").mkdir()               # cut off while it was written
    assert cluster.saved_shards(tmp_path / "cut")[-1].name == "step-6"


@pytest.mark.slow
@pytest.mark.parametrize("task", ("sft", pytest.param("classify", marks=pytest.mark.stress),
                                  pytest.param("dpo", marks=pytest.mark.stress)))
def test_finetune_in_shards_equals_finetune(corpus, tmp_path, task):
    begin = start(corpus, tmp_path / "begin", "--steps", 1, "--context", 192, "--tokens-per-step", 192)
    rows = {"sft": [{"prompt": f"say {i}", "completion": "it is " * (1 + i % 7)} for i in range(24)],
            "classify": [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(24)],
            "dpo": [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(24)]}[task]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--task", task, "--init-from", begin, "--data", tmp_path / "rows.jsonl", "--steps", "3", "--batch", "5",
             "--lora", "2", "--micro-batch", "1", "--device", "cpu", "--dtype", "float32", "--keep", "last",
             "--context", "192", "--samples", "1", "--max-new-tokens", "4"]
    finetune.main([*map(str, flags), "--out", str(tmp_path / "one")])
    done = torchrun("finetune.py", *flags, "--shard", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    from safetensors.torch import load_file
    ours, theirs = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("two", "one"))
    for name in theirs:
        assert_close(ours[name], theirs[name], 5e-3, name)


@pytest.mark.parametrize("flags, words", [
    (["--shard", "--optimizer", "muon"], ["--optimizer adamw", "whole matrices"]),
    (["--shard", "--compile", "on"], ["--compile off"])])
def test_what_shards_cannot_do_is_said_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(flags)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and all(word in said for word in words), said

# --- a lost process ---

KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
real, done = train.training_step, []
def step(*arguments):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(done) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(1)
    return real(*arguments)
train.training_step = step
train.main()
"""


def killed(corpus, out, *flags):
    """A run on two processes, one of which is killed in its fifth step, and torchrun restarts it."""
    script = out.with_suffix(".py")
    script.write_text(KILLED.format(root=str(ROOT)))
    done = torchrun("--max-restarts", "1", script, *SMALL, "--data", corpus, "--save-minutes", "0", "--out", out,
                    *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"run        {out}") == 2                  # both starts speak
    return out


@pytest.mark.slow
def test_a_run_goes_on_after_one_of_two_processes_was_killed(corpus, tmp_path):
    cut, whole = killed(corpus, tmp_path / "cut"), start(corpus, tmp_path / "whole")
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)        # of each step once
    assert_same_weights(cut, whole)


@pytest.mark.stress
@pytest.mark.parametrize("shard", ([], ["--shard"]))
def test_a_killed_run_on_two_processes_ends_in_the_same_bits(corpus, tmp_path, shard):
    cut = killed(corpus, tmp_path / "cut", *shard)
    whole = torchrun("train.py", *SMALL, "--data", corpus, "--out", tmp_path / "whole", *shard)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert losses(cut) == losses(tmp_path / "whole")
    assert_same_weights(cut, tmp_path / "whole", 1e-7)


def test_only_a_restarted_run_takes_up_its_own_directory(tmp_path, monkeypatch):
    settings = SimpleNamespace(out=str(tmp_path), resume=None)
    assert not cluster.restarted(settings, set())
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    cluster.mark_run(tmp_path)
    assert not cluster.restarted(settings, set())                       # the first start
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert cluster.restarted(settings, set()) and settings.resume is None
    (tmp_path / "resume" / "resume.pt").touch()
    given = {"steps"}
    assert cluster.restarted(settings, given) and settings.resume == str(tmp_path) and not given
    settings.resume = None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")                # whose --out is not empty
    assert not cluster.restarted(settings, set())
    settings.out = None
    with pytest.raises(ValueError, match="--out DIR"):
        cluster.restarted(settings, set())

# --- large results, little memory ---


def test_large_weights_are_published_in_parts_with_an_index(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "LIMIT", 20_000)
    out = start(corpus, tmp_path / "run", "--keep", "best", "--eval-every", 2)      # published three times
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert not (out / "model.safetensors").exists()
    assert sorted(path.name for path in out.glob("*.safetensors")) == files
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in load_checkpoint(out).parameters())
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(out), load_checkpoint(out)
    tokens = torch.randint(300, (1, 16))
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits, 1e-4)


@pytest.mark.parametrize("base", ("bfloat16", "int8", "int4"))
def test_adapters_learn_on_a_base_of_few_bits(tmp_path, base):
    torch.manual_seed(0)
    model = Llama3(Llama3Config.sized(2, 64, 300, 32))
    plain = model.bfloat16().eval()
    tokens = torch.randint(300, (4, 17))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    with torch.no_grad():
        before = plain(batch["tokens"]).float()
    settings = SimpleNamespace(lora=4, lora_alpha=8.0, lora_targets=r"\.\d+\.", init_from=tmp_path)
    held = sum(p.nbytes for n, p in plain.named_parameters() if "layers." in n)
    lora.add_lora(plain, settings, None if base == "bfloat16" else base)
    frozen = [m.frozen for m in lora.adapters(plain).values() if m.frozen]
    if frozen:
        few = sum(b.nbytes for m in frozen for b in m.buffers())
        assert few < {"int8": 0.6, "int4": 0.4}[base] * held
    learned = [p for p in plain.parameters() if p.requires_grad]
    assert {p.dtype for p in learned} == {torch.float32}
    with torch.no_grad():                    # as before, up to the bits that were dropped
        assert_close(plain(batch["tokens"]).float(), before, {"bfloat16": 0, "int8": 0.05, "int4": 0.3}[base])
    loss, optimizer, found = train.NextTokenLoss(plain), torch.optim.Adam(learned, lr=1e-2), []
    for _ in range(15):
        with torch.autocast("cpu", torch.bfloat16):
            nats, count = loss(batch)
        nats.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(nats.item() / count.item())
    assert found[-1] < found[0] - 0.3
    assert not any(p.grad is not None for p in plain.parameters() if not p.requires_grad)
