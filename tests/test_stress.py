"""Long tests, run by hand: pytest tests/test_stress.py --stress -s -v | tee bench/stress.log

Many kills at random moments; damaged files of every kind; random text through our tokenizers; a
state carried through 300,000 tokens. `-s` shows how often each thing happened.
"""
import contextlib
import io
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter

import lies
import pytest
import torch
from helpers import ROOT, assert_close

import finetune
import tokenizer as text
import train
from templates import SECONDS

pytestmark = pytest.mark.stress
MODELS = [*train.MODELS]
SMALL = ["--layers", "1", "--width", "32", "--context", "32", "--tokens-per-step", "128", "--vocab", "300",
         "--steps", "40", "--device", "cpu", "--dtype", "float32", "--lr", "0.003", "--workers", "1",
         "--save-minutes", "0"]


def sentences(dice, count):
    """Random text: words, code, every plane of Unicode, lone surrogates, control characters."""
    kinds = (lambda: dice.choice("abc def 123 \n\n\t  .,'\"<|>[]#"), lambda: chr(dice.randrange(128)),
             lambda: chr(dice.randrange(0x3000)), lambda: chr(dice.randrange(0x110000)),
             lambda: dice.choice(["<|endoftext|>", "<|eot_id|>", "[gMASK]", "User: ", "\r\n", "\u200d", "👩‍👧"]))
    for _ in range(count):
        weights = [dice.random() ** 3 for _ in kinds]
        yield "".join(kind() for kind in dice.choices(kinds, weights, k=dice.randrange(60)))


def tiny(name):
    torch.manual_seed(0)
    model_class, config_class, _ = train.model_parts(name)
    return model_class(config_class.sized(1, 32, 257, 64)).eval()


def test_a_run_that_is_killed_forty_times_ends_in_the_same_bits(tmp_path):
    """kill -9 at any moment: while Python starts, while a step computes, while it saves."""
    (tmp_path / "data.txt").write_text("\n".join(sentences(random.Random(1), 400)), encoding="utf-8", errors="replace")
    command = [sys.executable, "train.py"]
    begin = [*SMALL, "--data", str(tmp_path / "data.txt"), "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *begin, str(tmp_path / "whole")], cwd=ROOT, env=environment, check=True,
                   stdout=subprocess.DEVNULL)
    dice, out, reached = random.Random(2), tmp_path / "run", Counter()
    for kill in range(41):
        arguments = ["--resume", str(out)] if (out / "resume/resume.pt").exists() else [*begin, str(out)]
        if "--resume" not in arguments and out.exists():                # killed before its first save
            for file in out.iterdir():
                file.unlink()
        process = subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if kill == 40:
            output = process.communicate(timeout=300)[0]
            assert process.returncode == 0, output
            break
        if kill % 4:                         # three of four after the first step, one wherever it is
            while (line := process.stdout.readline()) and not line.startswith("step "):
                pass
        time.sleep(dice.uniform(0, 0.15 if kill % 4 else 4))
        process.kill()
        steps = [line for line in process.communicate()[0].splitlines() if line.startswith("step ")]
        reached["in training" if steps or kill % 4 else "before the first step"] += 1
    print(f"\nkilled: {dict(reached)}")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def damaged(content, dice):
    """The bytes with one fault: cut, flipped, a piece overwritten, doubled or removed."""
    made, at, size = bytearray(content), dice.randrange(len(content)), dice.choice((1, 1, 4, 64, 999))
    match dice.randrange(5):
        case 0:
            del made[at:]
        case 1:
            for _ in range(size):
                made[dice.randrange(len(made))] ^= 1 << dice.randrange(8)
        case 2:
            made[at:at + size] = dice.randbytes(size)
        case 3:
            made[at:at] = made[at:at + size]
        case 4:
            del made[at:at + size]
    if len(made) > 400 and dice.random() < 0.5:                         # headers are where faults matter
        made[dice.randrange(400)] ^= 1 << dice.randrange(8)
    return bytes(made)


def opened(open_it, counts):
    """Open a damaged file: it opens, or there is one clear line, soon."""
    begun = time.perf_counter()
    try:
        open_it()
        counts["opened"] += 1
    except (ValueError, OSError) as error:
        assert "\n" not in str(error).strip() and str(error).strip(), repr(error)
        counts["refused"] += 1
    assert time.perf_counter() - begun < 20


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_checkpoint_opens_or_is_refused_in_one_line(name, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    text.Bytes().save(tmp_path)
    dice, counts = random.Random(3), Counter()
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for _ in range(250):
            path.write_bytes(damaged(whole, dice))
            opened(lambda: train.load_checkpoint(tmp_path), counts)
        path.write_bytes(whole)
    print(f"\n{name}: {dict(counts)}")
    assert counts["refused"] > 100
    train.load_checkpoint(tmp_path)          # whole again


def test_a_damaged_tokenizer_opens_or_is_refused_in_one_line(tmp_path, golden):
    dice, counts = random.Random(4), Counter()
    text.train_bpe(sentences(random.Random(5), 500), 400).save(tmp_path / "bpe")
    text.Bytes().save(tmp_path / "bytes")
    for path in sorted(tmp_path.glob("*/*.json")):
        whole = path.read_bytes()
        for _ in range(400):
            path.write_bytes(damaged(whole, dice))
            opened(lambda: text.load_tokenizer(path.parent).encode("def f(x): é"), counts)
        path.write_bytes(whole)
    print(f"\n{dict(counts)}")
    assert counts["refused"] > 100


def test_a_damaged_run_is_refused_in_one_line(tmp_path):
    (tmp_path / "data.txt").write_text("\n".join(sentences(random.Random(1), 400)), encoding="utf-8", errors="replace")
    out = tmp_path / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*SMALL, "--steps", "1", "--data", str(tmp_path / "data.txt"), "--out", str(out)])
    dice, counts, whole = random.Random(6), Counter(), (out / "resume/resume.pt").read_bytes()
    for _ in range(400):
        (out / "resume/resume.pt").write_bytes(damaged(whole, dice))
        opened(lambda: train.load_resume(out), counts)
    print(f"\n{dict(counts)}")
    assert counts["refused"] > 100


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def lied_to(cases, make, open_it, tmp_path, seconds=lies.SECONDS):
    """Open every lie in a child process with limits; what went wrong, and how the others ended."""
    faults, ended = [], Counter()
    for case, lie in cases.items():
        folder = tmp_path / f"case{len(ended)}-{ended.total()}"
        make(folder)
        lie(folder)
        before = sorted((file.name, file.lstat().st_size) for file in folder.rglob("*"))
        told = lies.attempt(lambda: open_it(folder), size_of(folder), seconds)
        ended[told.partition(":")[0]] += 1
        if told.startswith("FAULT") or before != sorted((f.name, f.lstat().st_size) for f in folder.rglob("*")):
            faults.append(f"{case}: {told}")
        print(f"{case}: {told:.160}")
        shutil.rmtree(folder)
    print(dict(ended))
    return faults


@pytest.mark.parametrize("name, more", [("gpt", lies.GPT), ("llama3", lies.LLAMA), ("glm4", {}), ("rwkv6", {})])
def test_a_checkpoint_that_lies_opens_or_is_refused_in_one_line(name, more, tmp_path):
    cases = {**lies.CHECKPOINTS, **more} if name != "rwkv6" else {}

    def rwkv(make):                          # the same pickles in a .pth
        return lambda folder: ((folder / "model.pth").unlink(), make(folder / "model.pth"))
    if name == "rwkv6":
        cases = {case: rwkv(make) for case, make in dict(
            bomb=lies.bomb, laughs=lies.laughs, deep=lies.deep, calls=lies.calls(os.system, "true"),
            bytes=lies.calls(bytearray, 10**10), claims=lies.claims((10**6, 10**6), (0, 0)),
            nothing=lambda path: torch.save({}, path)).items()}
    faults = lied_to(cases, lambda folder: tiny(name).save_pretrained(folder), train.load_checkpoint, tmp_path)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("make", [lies.bomb, lies.laughs, lies.deep, lies.calls(os.system, "true"),
                                  lies.claims((10**6, 10**6), (0, 0))])
def test_a_pickle_that_lies_as_ckpt_or_resume_is_refused_in_one_line(make, tmp_path):
    for file, open_it in (("ckpt.pt", train.load_checkpoint), ("resume/resume.pt", train.load_resume)):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        make(tmp_path / file)
        told = lies.attempt(lambda: open_it(tmp_path), (tmp_path / file).stat().st_size)
        print(f"{file}: {told:.160}")
        assert told.startswith("refused"), told


def test_a_tokenizer_that_lies_opens_or_is_refused_in_one_line(tmp_path):
    made = text.train_bpe(sentences(random.Random(5), 500), 400)

    def open_it(folder):
        tokenizer = text.load_tokenizer(folder)
        assert tokenizer.decode(tokenizer.encode("aaaaaaaaaaaaaaaaaaaaaaaaaaaaab é <a>"))
        if tokenizer.chat_format:
            tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    faults = lied_to(lies.TOKENIZERS, made.save, open_it, tmp_path, 10 + 2 * SECONDS)    # a template's own
    assert not faults, "\n".join(faults)


def test_weights_of_nan_load_and_say_so_when_they_are_used(tmp_path):
    for name in MODELS:
        model = tiny(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="NaN"):
            train.load_checkpoint(tmp_path / name).generate([[1, 2]], 3)


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"instruction": "Say é.", "input": "", "output": "é"}\n' * 4),
    ("a.json", '[{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]'),
    ("a.csv", 'text,label\n"a, ""b""\nc",x\nd,y\n')])
def test_damaged_examples_are_read_or_refused_in_one_line(name, content, tmp_path):
    dice, counts, tokenizer = random.Random(7), Counter(), text.Bytes()
    tokenizer.chat_format = "alpaca"

    def read():
        for row in finetune.read_rows([tmp_path / name]):
            if name == "a.csv":
                finetune.string(row, "text")
            else:
                finetune.sequence(tokenizer, finetune.conversation(row), 64)
    for _ in range(4000):
        (tmp_path / name).write_bytes(damaged(content.encode(), dice))
        opened(read, counts)
    print(f"\n{dict(counts)}")
    assert counts["refused"] > 50 and counts["opened"] > 50


def test_random_text_comes_back_from_tokenizers_of_our_own():
    """There and back, whole and id by id; control ids never come from text."""
    for tokenizer in (text.Bytes(), text.train_bpe(sentences(random.Random(8), 2000), 1000)):
        special = set(tokenizer.special_ids.values())
        for sentence in sentences(random.Random(9), 20_000):
            plain = sentence.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids, decoder = tokenizer.encode(sentence), tokenizer.stream_decoder()
            streamed = "".join(map(decoder.feed, ids)) + decoder.finish()
            assert tokenizer.decode(ids) == streamed == plain, repr(sentence)
            assert not special & set(ids), repr(sentence)


@pytest.mark.parametrize("name", MODELS)
def test_a_state_is_the_same_after_300_000_tokens_in_any_pieces(name):
    model = tiny(name)
    if model.config.context:
        pytest.skip("its context ends")
    ids = torch.randint(257, (1, 300_000), generator=torch.Generator().manual_seed(0))
    states = []
    for piece in (4096, 9999):
        state = model.new_state(1, 0)
        with torch.no_grad():
            for part in ids.split(piece, 1):
                last = model.hidden(part, state)[:, -1]
        states.append((last, state.position.item()))
    assert states[0][1] == states[1][1] == 300_000 and states[0][0].isfinite().all()
    assert_close(states[0][0], states[1][0], 1e-3, name)
