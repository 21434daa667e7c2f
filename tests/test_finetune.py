"""finetune.py: losses by hand, masking, padding, adapters, every task on every architecture."""
import json
import math
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, assert_close
from torch import nn
from torch.nn import functional as F

import checkpoints
import finetune
import lora
import tokenizer as text
import train
from rows import code_reward

MODELS = [name for name, (module, _) in train.MODELS.items()
          if (ROOT / f"{module.replace('.', '/')}.py").exists()]
ALONE = train.Run(torch.device("cpu"), torch.float32)
QUICK = ["--device", "cpu", "--dtype", "float32", "--micro-batch", "64", "--samples", "1", "--sample-every", "100",
         "--eval-every", "100"]


def tiny(name, seed=0, layers=1):
    """A small model of this architecture over bytes, with every parameter drawn."""
    torch.manual_seed(seed)
    model_class, config_class, _ = train.model_parts(name)
    model = model_class(config_class.sized(layers, 32, 257, 256))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(name): a folder with a small checkpoint of an architecture, and the tokenizer of bytes."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("base") / name
            tiny(name).save_pretrained(made[name])
            text.Bytes().save(made[name])
        return made[name]
    return make


def rows_file(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def start(task, init_from, out, *more):
    finetune.main(["--task", task, "--init-from", str(init_from), "--out", str(out), *QUICK, *map(str, more)])
    return out


def measures(out, name):
    """A measure at first and at last."""
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = [event[name] for event in events if name in event and ("val_loss" in event or "lr" not in event)]
    return found[0], found[-1]


def refused(capsys, *arguments):
    """The one line that a command ends with, at exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        finetune.main([*map(str, arguments)])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("device ", "precision "))]
    assert stopped.value.code == 2 and len(lines) == 1, lines
    return lines[0]


class Table(nn.Module):
    """A model whose logits for the next id are a table's row of the last one."""

    def __init__(self, table):
        super().__init__()
        self.table, self.config = torch.tensor(table).log(), type("Config", (), {"vocab_size": len(table)})

    def hidden(self, tokens):
        return F.one_hot(tokens, len(self.table)).float()

    def logits(self, hidden):
        return hidden @ self.table


# --- losses, by hand ---

def test_log_probs_equal_hand_worked_ones():
    model = Table([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    batch = {"tokens": torch.tensor([[0, 1, 2], [2, 0, 0]]), "targets": torch.tensor([[1, -100, 2], [0, 0, -100]])}
    expected = torch.tensor([[0.25, 1, 0.6], [0.2, 0.5, 1]]).log()
    assert_close(finetune.log_probs(model, batch), expected, 1e-6)
    half = torch.tensor([0.5, 0.25, 0.25]).sqrt()                       # temperature 2
    assert finetune.log_probs(model, batch, 2.0)[0, 0].item() == pytest.approx((half[1] / half.sum()).log().item())


def test_log_probs_in_pieces_equal_those_at_once(monkeypatch):
    model = tiny("gpt")
    batch = {"tokens": torch.randint(257, (3, 20)), "targets": torch.randint(257, (3, 20))}
    batch["targets"][0, 3:7] = -100
    whole = finetune.log_probs(model, batch)
    model.config = finetune.dataclasses.replace(model.config, vocab_size=1 << 23)          # pieces of 8
    pieces = finetune.log_probs(model, batch)
    assert_close(pieces, whole, 1e-6)
    pieces.sum().backward()
    assert model.wte.weight.grad.abs().sum() > 0


def test_the_dpo_loss_equals_hand_worked_values():
    margins = torch.tensor([0.0, math.log(3)])                          # sigmoid: 1/2, 3/4
    assert finetune.dpo_loss(margins, 0.0).tolist() == pytest.approx([math.log(2), math.log(4 / 3)])
    assert finetune.dpo_loss(margins, 0.1).tolist() == pytest.approx(
        [math.log(2), 0.9 * math.log(4 / 3) + 0.1 * math.log(4)])


def test_the_dpo_margin_equals_a_hand_worked_one():
    task = finetune.DPO(finetune.Settings(beta=0.5), ALONE, text.Bytes(), tiny("gpt"), {})
    task.model = Table([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    batch = {"tokens": torch.tensor([[0, 1], [0, 2]]), "targets": torch.tensor([[1, 1], [2, 0]]),
             "reference": torch.tensor([0.7])}
    chosen, rejected = 0.25 * 0.6, 0.25 * 0.2
    assert task.margins(batch).item() == pytest.approx(0.5 * (math.log(chosen / rejected) - 0.7))
    loss, count = task(batch)
    assert count == 1 and loss.item() == pytest.approx(
        math.log(1 + math.exp(-0.5 * (math.log(3) - 0.7))))


@pytest.mark.parametrize("new, old, advantage, gain", [
    (0.6, 0.5, 1.0, 1.2), (0.6, 0.4, 1.0, 1.2), (0.6, 0.4, -1.0, -1.5), (0.2, 0.4, 1.0, 0.5),
    (0.2, 0.4, -2.0, -1.6)])
def test_the_grpo_loss_equals_hand_worked_values(new, old, advantage, gain):
    """The ratio is clipped to 0.8 .. 1.2 only where that lowers the gain."""
    new, old, reference = (torch.tensor([[math.log(p)]]) for p in (new, old, 0.3))
    A, gap = torch.tensor([[advantage]]), reference - new
    assert finetune.grpo_loss(new, old, reference, A, 0.2, 0.0).item() == pytest.approx(-gain, rel=1e-5)
    divergence = math.exp(gap) - 1 - gap.item()
    assert finetune.grpo_loss(new, old, reference, A, 0.2, 0.5).item() == pytest.approx(
        0.5 * divergence - gain, rel=1e-5)


def test_advantages_are_deviations_from_the_group():
    assert finetune.advantages([1, 0, 0, 1]) == pytest.approx([1, -1, -1, 1], rel=1e-3)
    assert finetune.advantages([3, 3, 3]) == [0, 0, 0]
    assert finetune.advantages([0, 0, 3]) == pytest.approx([-1 / 2**0.5, -1 / 2**0.5, 2**0.5], rel=1e-3)


# --- the built-in reward ---

def test_the_reward_of_code_needs_two_statements_that_the_group_does_not_have():
    def earned(*completions):
        return code_reward("def f(x):\n", list(completions), [True] * len(completions))
    two = "    y = x + 1\n    return y\n\n\n"
    assert earned("", "#", "    pass", "    #", "    pass\n    pass\n", "    1\n    'a'\n    ...\n    x\n") == [0.0] * 6
    assert earned("    return x\n", two, "    return (\n", "    y = 1; y = 1\n") == [0, 1, 0, 0]
    assert earned("    y = 1\n    return True\n") == [1]
    assert earned("    x = " + "a + " * 20000 + "a\n    return x\n") in ([0], [1])         # too deep for some Pythons
    assert earned(two, two, "    y = x + 1\n    return x\n", "    if x:\n        a()\n") == [1, 0, 0, 1]
    assert earned("    y = x + 1\n    return x\n", two) == [1, 0]       # `return y` alone is new
    assert code_reward("def f(x):\n", [two], [False]) == [0]   # did not end by itself
    assert code_reward("def f(x):\n", ["    x = " + "(" * 9000, "    \0"], [True, True]) == [0, 0]


# --- sequences ---

def conversation(*contents):
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 9, contents)]


def made(tokenizer, messages, limit, **more):
    """Ids of a sequence as text, and the text of its targets."""
    inputs, targets = finetune.sequence(tokenizer, messages, limit, **more)
    learnt = [id for id in targets if id != -100]
    assert all(target in (-100, following) for target, following in zip(targets, inputs[1:]))
    return tokenizer.decode([*inputs, targets[-1]]), tokenizer.decode(learnt)


@pytest.fixture
def tokenizer():
    made = text.Bytes()
    made.chat_format = "alpaca"
    return made


def test_only_replies_are_learnt_unless_all_is_asked_for(tokenizer):
    whole, learnt = made(tokenizer, conversation("Why?", "So.", "And?", "Then."), 999)
    assert learnt == " So.<|endoftext|> Then.<|endoftext|>" and whole.endswith("### Response: Then.<|endoftext|>")
    assert made(tokenizer, conversation("Why?", "So."), 999, everything=True)[1] == made(
        tokenizer, conversation("Why?", "So."), 999)[0][1:]
    tokenizer.chat_format = None
    assert made(tokenizer, conversation("Why?", "So."), 99) == ("Why?So.<|endoftext|>", "So.<|endoftext|>")


@pytest.mark.parametrize("form", ["alpaca", "world", None])
def test_a_reply_that_is_cut_still_ends(tokenizer, form):
    tokenizer.chat_format = form
    end = "\n\n" if form == "world" else "<|endoftext|>"
    messages = conversation("Why?", "abcdefghijklmnopqrstuvwxyz")
    whole = len(finetune.sequence(tokenizer, messages, 999)[0])
    for cut in range(30):
        found = finetune.sequence(tokenizer, messages, whole - cut)
        if found is None:
            break
        learnt = tokenizer.decode([id for id in found[1] if id != -100])
        assert len(found[0]) == whole - cut and learnt.endswith(end)
        assert "abcdefghijklmnopqrstuvwxyz".startswith(learnt.removesuffix(end).strip())
    assert cut >= 26 and found is None       # nothing is left but the prompt


@pytest.mark.parametrize("folder, kind, end", [
    ("llama3", "llama3", "<|eot_id|>"), ("llama3", "llama3.1", "<|eot_id|>"), ("chatglm3", None, "<|user|>"), ("rwkv", None, "\n\n")])
def test_a_cut_reply_ends_in_the_format_of_the_model(folder, kind, end, assets):
    if folder == "chatglm3":
        pytest.importorskip("sentencepiece")
    tokenizer = text.load_tokenizer(assets / folder, kind)
    messages = conversation("Hi there", "Hello! A long reply with many words, until it is cut in the middle.")
    whole = finetune.sequence(tokenizer, messages, 999)
    for limit in (len(whole[0]), len(whole[0]) - 6):
        inputs, targets = finetune.sequence(tokenizer, messages, limit)
        learnt = [id for id in targets if id != -100]
        assert len(inputs) == limit and tokenizer.decode(learnt).strip(" \n").startswith("Hello! A long reply")
        assert tokenizer.decode(learnt).endswith(end) and targets[-1] in tokenizer.stop_ids


def test_a_question_whose_answer_is_cut_off_goes_too(tokenizer):
    one = finetune.sequence(tokenizer, conversation("Why?", "So."), 999)
    two = conversation("Why?", "So.", "And then, what else?", "Then.")
    assert finetune.sequence(tokenizer, two, len(one[0]) + 20) == one
    assert finetune.sequence(tokenizer, two, len(one[0])) == one
    assert finetune.sequence(tokenizer, conversation("a" * 99, "b"), 50) is None


def test_the_forms_of_rows_are_read_alike(tokenizer):
    plain = conversation("Why?", "So.")
    assert finetune.conversation({"messages": plain}) == plain
    assert finetune.conversation({"prompt": "Why?", "completion": "So."}) == plain
    assert finetune.conversation({"prompt": plain[:1], "completion": plain[1:]}) == plain
    for row in ({"prompt": "Why?", "chosen": "So."}, {"chosen": plain}, {"prompt": plain[:1], "chosen": plain[1:]},
                {"prompt": "Why?", "chosen": plain}, {"messages": plain[:1], "chosen": "So."},
                {"messages": plain[:1], "chosen": plain[1:]}, {"instruction": "Why?", "output": "other", "chosen": "So."}):
        assert finetune.conversation({**row, "rejected": "x"}, "chosen") == plain, row
    rows = finetune.conversation({"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response: 3" in tokenizer.decode(
        [id for part, _ in finetune.chat_parts(tokenizer, rows) for id in part])
    tokenizer.chat_format = "world"          # has no field for the input
    assert "User: Add.\n1, 2\n\nAssistant: 3" in tokenizer.decode(
        [id for part, _ in finetune.chat_parts(tokenizer, rows) for id in part])


def test_a_question_at_the_end_of_a_conversation_is_left_out(tokenizer):
    task = finetune.SFT(finetune.Settings(context=999), ALONE, tokenizer, tiny("gpt"), {})
    whole = conversation("Why?", "So.", "And?")
    example = task.example({"messages": whole})
    assert example["messages"] == whole[:2] and example["rows"] == [finetune.sequence(tokenizer, whole[:2], 999)]
    assert task.example({"messages": whole[:1]}) is None


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '\ufeff{"text": "a, \\"b\\"", "label": "x"}\n\n{"text": "c\\u2028d", "label": "y"}\n'),
    ("a.json", '[{"text": "a, \\"b\\"", "label": "x"}, {"text": "c\\u2028d", "label": "y"}]'),
    ("a.csv", '\ufefftext,label\r\n"a, ""b""",x\r\nc\u2028d,y\r\n'),
    ("A.TSV", 'label\ttext\nx\t"a, ""b"""\ny\tc\u2028d\n'), ("a.tsv", 'x\ta, "b"\ny\tc\u2028d\n'),
    ("b.tsv", 'id\tlabel\ttext\n1\tx\ta, "b"\n2\ty\tc\u2028d\n')])
def test_the_formats_of_files_are_read_alike(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    rows = finetune.read_rows([tmp_path / name])
    assert [(row["text"], row["label"]) for row in rows] == [('a, "b"', "x"), ("c\u2028d", "y")]
    assert rows[1]["where"].startswith(str(tmp_path / name))


def test_quotes_of_a_tsv_file_may_be_plain_characters(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"Life is" nothing\tx\nb\ty\n', encoding="utf-8")
    assert [row["text"] for row in finetune.read_rows([tmp_path / "a.tsv"])] == ['"Life is" nothing', "b"]


def test_columns_with_other_names_are_not_taken_for_data(tmp_path):
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nb\t1\nc\t0\n", encoding="utf-8")
    assert finetune.read_rows([tmp_path / "a.tsv"])[0]["sentence"] == "b"


def test_a_csv_field_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "a" * 300_000 + ",x\n", encoding="utf-8")
    assert len(finetune.read_rows([tmp_path / "a.csv"])[0]["text"]) == 300_000


def test_every_label_is_held_out_in_the_same_part():
    rows = [{"rows": [str(i)], "label": label} for label, count in (("a", 60), ("b", 20)) for i in range(count)]
    settings = finetune.Settings(task="classify", hold_out=0.2)
    learn, held = finetune.split(list(rows), settings)
    assert [sum(row["label"] == label for row in held) for label in "ab"] == [12, 4]
    assert len(learn) == 64 and not [row for row in learn if row in held]
    learn, held = finetune.split(list(rows), finetune.Settings(task="classify", hold_out=0.2, balance=True))
    assert [sum(row["label"] == label for row in learn + held) for label in "ab"] == [20, 20]
    learn, held = finetune.split([*rows, {"rows": ["alone"], "label": "c"}], settings)
    assert [row["label"] for row in learn].count("c") == 1 and "c" not in [row["label"] for row in held]


# --- the default data ---

def test_default_data_are_read_from_sources_without_importing_them(monkeypatch):
    files = [(name, path) for name, path in train.standard_library()
             if name in ("posixpath.py", "antigravity.py", "email/message.py", "xml/sax/handler.py", "textwrap.py")]
    monkeypatch.setattr(train, "standard_library", lambda: files)
    before = set(sys.modules)
    questions = {row["instruction"]: row["output"] for row in finetune.question_rows()}
    assert questions["What does `os.path.join` do?"].startswith("Join two or more pathname components")
    assert "What does `email.message.Message.as_string` do?" in questions
    assert len(set(questions.values())) == len(questions)               # an answer stands on one side of the split
    labels = finetune.label_rows()
    assert {row["label"] for row in labels} == {"email", "xml"} and len({row["text"] for row in labels}) == len(labels)
    pairs = finetune.preference_rows()
    assert pairs and all(pair["chosen"] == questions[pair["prompt"]] != pair["rejected"] for pair in pairs)
    headers = [row["prompt"] for row in finetune.header_rows()]
    assert "def isabs(s):\n" in headers and len(headers) == len(set(headers))
    assert all(header.startswith("def ") and header.endswith(":\n") for header in headers)
    assert "def normpath(path):\n" not in headers                       # too long to be written in a few tokens
    assert "antigravity" not in sys.modules and set(sys.modules) == before


def test_a_form_feed_does_not_shift_the_lines_of_a_source(tmp_path, monkeypatch):
    """str.splitlines ends a line there, ast does not."""
    half = b"def half(x):\r\n    y = x / 2\r\n    return y\r\n"
    (tmp_path / "a.py").write_bytes(b"\x0c\n" + half + b"\x0c\ndef none():\n    pass\n")
    (tmp_path / "b.py").write_bytes(b"# coding: latin-1\ndef \xe9(): '\xe9t\xe9'\n")
    monkeypatch.setattr(train, "standard_library", lambda: [(n, tmp_path / n) for n in ("a.py", "b.py")])
    assert finetune.header_rows() == [{"prompt": "def half(x):\n"}]
    assert finetune.question_rows() == [{"instruction": "What does `b.é` do?", "output": "été"}]


# --- padding ---

@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_equals_its_rows_one_by_one(name):
    model, dice = tiny(name, layers=2), random.Random(0)
    examples = []
    for size in (3, 17, 30, 11):
        ids = [dice.randrange(257) for _ in range(size + 1)]
        examples.append({"rows": [(ids[:-1], [-100] * 2 + ids[3:])]})
    assert finetune.collate(examples, 96)["tokens"].shape == (4, 32)
    assert finetune.collate(examples, 31)["tokens"].shape == (4, 31)
    task = finetune.SFT(finetune.Settings(), ALONE, text.Bytes(), model, {})

    def gradient(batches):
        model.zero_grad()
        sums = [task(finetune.collate(batch, 96)) for batch in batches]
        sum(nats for nats, _ in sums).backward()
        count = sum(int(count) for _, count in sums)
        return [count, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    together, alone = gradient([examples]), gradient([[example] for example in examples])
    assert together[0] == alone[0] == 1 + 15 + 28 + 9
    scale = max(g.abs().max().item() for g in alone[1:])
    assert all((a - b).abs().max() < 2e-5 * scale for a, b in zip(together[1:], alone[1:]))
    task = finetune.Classify(finetune.Settings(), ALONE, text.Bytes(), model, {"labels": ["a", "b", "c"]})
    logits = task.logits(finetune.collate(examples, 96))
    for i, example in enumerate(examples):
        alone = task.logits(finetune.collate([example], 96))
        assert_close(logits[i:i + 1], alone, 1e-4, "label of a padded row")


class Gradients(torch.optim.Optimizer):
    """Takes no step, but keeps the gradients that it would take."""

    def step(self):
        self.seen = [p.grad.clone() for p in self.param_groups[0]["params"]]


def test_accumulated_unequal_lengths_give_the_gradient_of_one_batch():
    """Through train.py's own step, which divides once by the number of targets."""
    tokenizer, found = text.Bytes(), []
    tokenizer.chat_format = "alpaca"
    for rows_at_once in (1, 8):
        settings = finetune.Settings(context=256, batch=8, micro_batch=rows_at_once)
        task = finetune.SFT(settings, ALONE, tokenizer, tiny("gpt"), {})
        examples = task.prepare([{"prompt": "a" * n, "completion": "b" * n**2} for n in range(1, 9)])
        batches = finetune.Batches(examples, settings, ALONE)(0)
        assert len(batches) > 2 if rows_at_once == 1 else len(batches) == 1, len(batches)
        optimizer, scaler = Gradients(task.parameters(), {"lr_scale": 1.0}), torch.amp.GradScaler("cpu", enabled=False)
        mean, _, count = train.training_step(ALONE, task, optimizer, scaler, batches, 0.0, 1e9, 100)
        assert count == sum(n**2 + 2 for n in range(1, 9))              # with the space before, the end after
        found.append((mean, optimizer.seen))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    scale = max(g.abs().max() for g in found[1][1])
    assert all((a - b).abs().max() < 2e-5 * scale for a, b in zip(found[0][1], found[1][1]))


def test_groups_are_of_similar_length_and_fit():
    examples = [{"rows": [(list(range(size)), [])]} for size in (5, 30, 7, 8, 31, 6)]
    sizes = [[finetune.length(e) for e in group] for group in finetune.groups(examples, 32)]
    assert sizes == [[5, 6, 7, 8], [30], [31]]
    examples = [{"rows": [(list(range(size)), [])]} for size in (5, 9, 40, 41, 300, 290)]
    sizes = [[finetune.length(e) for e in group] for group in finetune.groups(examples, 9999)]
    assert sizes == [[5, 9, 40, 41], [290, 300]]                        # 62 of padding are cheaper than one list more


# --- adapters ---

def adapted(name, rank=3, **more):
    """A small model with adapters that are not zero, and the plain one."""
    plain, model = tiny(name, layers=2), tiny(name, layers=2)
    finetune.add_lora(model, finetune.Settings(lora=rank, lora_alpha=2.0 * rank, **more))
    return plain, model


def draw_adapters(model):
    for module in lora.adapters(model).values():
        nn.init.normal_(module.lora_B, std=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_lora_changes_nothing_at_first_and_merges_to_the_same(name, tmp_path):
    plain, model = adapted(name)
    tokens = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens), plain(tokens))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    linears = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and ".0." in n or ".1." in n
               and isinstance(m, nn.Linear)]
    assert names == {f"{n}.lora_{part}" for n in linears for part in "AB"} and len(linears) >= 8
    grouped = [p for group in model.parameter_groups(0.1) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    draw_adapters(model)
    expected = model(tokens)
    assert (expected - plain(tokens)).abs().max() > 0.01 * expected.abs().max()
    assert_close(finetune.merged(model)(tokens), expected, 2e-5, "merged")
    assert torch.equal(finetune.merged(model, strength=0)(tokens), plain(tokens))
    assert torch.equal(model(tokens), expected)
    finetune.save_adapter(model, finetune.Settings(lora=3, lora_alpha=6.0, init_from="base"), tmp_path)
    again = tiny(name, layers=2)
    finetune.load_adapter(tmp_path, again)
    assert torch.equal(again(tokens), expected)


@pytest.mark.parametrize("name", ["gpt", "llama3", "glm4"])
def test_peft_opens_an_adapter_to_the_same_logits(name, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    plain, model = adapted(name)
    draw_adapters(model)
    plain.save_pretrained(tmp_path / "base")
    finetune.save_adapter(model, finetune.Settings(lora=3, lora_alpha=6.0, init_from=str(tmp_path / "base")), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    tokens = torch.randint(257, (2, 20))
    assert_close(theirs(tokens).logits, model(tokens), 2e-5)


def test_an_adapter_that_peft_made_opens_to_the_same_logits(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    tiny("llama3").save_pretrained(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "adapter")
    model = tiny("llama3")
    finetune.load_adapter(tmp_path / "adapter", model)
    tokens = torch.randint(257, (2, 20))
    assert_close(model(tokens), theirs.eval()(tokens).logits, 2e-5)
    with pytest.raises(ValueError, match="was it made for another model"):
        finetune.load_adapter(tmp_path / "adapter", tiny("rwkv6"))
    with pytest.raises(ValueError, match="is an adapter: .*--merge"):   # what chat.py and train.py say
        train.load_checkpoint(tmp_path / "adapter")


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_can_have_an_adapter_and_each_has_an_effect(name):
    """The head too, where it is a matrix of its own."""
    model, tokens = tiny(name), torch.arange(20)[None]
    if getattr(model.config, "tie_word_embeddings", False):
        model = type(model)(finetune.dataclasses.replace(model.config, tie_word_embeddings=False)).eval()
    finetune.add_lora(model, finetune.Settings(lora=3, lora_alpha=6.0, lora_targets=""))
    plain, places = model(tokens), lora.adapters(model)
    assert any(name in ("head", "lm_head") for name in places)
    for place, module in places.items():
        nn.init.normal_(module.lora_B, std=0.5)
        assert not torch.equal(model(tokens), plain), place
        nn.init.zeros_(module.lora_B)


def test_lora_targets_choose_matrices_by_name():
    _, model = adapted("gpt", lora_targets=r"h\.1\.attn")
    assert list(lora.adapters(model)) == ["h.1.attn.c_attn", "h.1.attn.c_proj"]
    for wrong, word in (("nothing", "h.0.attn.c_attn"), ("(", "--lora-targets")):
        with pytest.raises(ValueError, match=word):
            adapted("gpt", lora_targets=wrong)


# --- every task on every architecture ---

def toy_data(task, folder):
    """What a task learns in seconds, as arguments."""
    if task == "grpo":
        (folder / "reward.py").write_text(
            "def reward(prompt, completion):\n    return sum(c < chr(128) for c in completion) / max(1, len(completion))\n")
        return ["--data", rows_file(folder / "a.jsonl", [{"prompt": letter * 3} for letter in "abcdefghijklmnopqrst"]),
                "--reward", folder / "reward.py", "--max-new-tokens", 8, "--updates", 1, "--steps", 12, "--batch", 4, "--lr", 0.05,
                "--eval-examples", 64, "--kl", 0.001]
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefgh", k=5)) for _ in range(60)]
    if task == "classify":
        rows = [{"text": word + ending, "label": ending} for word, ending in zip(words, "xyz" * 20)]
        return ["--data", rows_file(folder / "a.jsonl", rows), "--hold-out", 0.3, "--steps", 12, "--lr", 0.01]
    key = {"sft": ("completion",), "dpo": ("chosen", "rejected")}[task]
    rows = [{"prompt": word, **dict(zip(key, (word[0] * 4, word[1] + "?")))} for word in words]
    return ["--data", rows_file(folder / "a.jsonl", rows), "--hold-out", 0.3, "--chat", "none", "--steps", 10, "--lr", 0.01]


MEASURE = {"sft": "val_loss", "classify": "val_loss", "dpo": "margin", "grpo": "reward"}


@pytest.mark.parametrize("task", finetune.RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_run_improves_its_measure_by_more_than_twice_the_spread(name, task, base, tmp_path):
    data, sign = toy_data(task, tmp_path), -1 if MEASURE[task] == "val_loss" else 1
    firsts, lasts = zip(*[measures(start(task, base(name), tmp_path / f"run{seed}", *data, "--seed", seed),
                                   MEASURE[task]) for seed in range(3)])
    gain = sign * (statistics.mean(lasts) - statistics.mean(firsts))
    assert gain > 2 * (max(lasts) - min(lasts)) and gain > 0, (firsts, lasts)


@pytest.mark.parametrize("task", finetune.RECIPES)
def test_adapters_learn_every_task_and_merge(task, base, tmp_path, monkeypatch, capsys):
    data, sign = toy_data(task, tmp_path), -1 if MEASURE[task] == "val_loss" else 1
    out = start(task, base("rwkv6"), tmp_path / "run", *data, "--lora", 4, "--lr", 0.05)
    first, last = measures(out, MEASURE[task])
    assert sign * (last - first) > 0
    assert (out / "adapter_model.safetensors").exists() and not (out / "model.pth").exists()
    finetune.main(["--merge", "--init-from", str(out), "--out", str(tmp_path / "plain"), "--device", "cpu"])
    start(task, tmp_path / "plain", tmp_path / "no", *data, "--eval-only")
    if task in ("sft", "classify"):          # the others measure themselves by their start
        assert f"{last:.4f}" in capsys.readouterr().out.split("before")[-1]
    adapted, tokens = train.load_checkpoint(base("rwkv6")), torch.arange(20)[None]
    before = adapted(tokens)
    finetune.load_adapter(out, adapted)
    assert (adapted(tokens) - before).abs().max() > 1e-3
    assert_close(train.load_checkpoint(tmp_path / "plain")(tokens), adapted(tokens), 1e-4)


# --- a run ---

@pytest.mark.parametrize("task, more", [*((task, []) for task in finetune.RECIPES), ("sft", ["--lora", 2, "--merge"]),
                                        ("grpo", ["--lora", 2, "--merge"])])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(task, more, base, tmp_path, monkeypatch):
    """Cut after the third step: with two steps a round, in the middle of a round of grpo."""
    data = [*toy_data(task, tmp_path), "--steps", 6, *more, *(["--updates", 2] if task == "grpo" else [])]
    whole = start(task, base("gpt"), tmp_path / "whole", *data)
    save, at = finetune.save_resume, []

    def cut(*more, **state):
        save(*more, **state)
        at.append(state["step"])
        if state["step"] == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(finetune, "save_resume", cut)
    with pytest.raises(SystemExit):
        start(task, base("gpt"), tmp_path / "cut", *data, "--save-minutes", 0)
    monkeypatch.setattr(finetune, "save_resume", save)
    shutil.move(base("gpt"), tmp_path / "moved")                        # resume.pt is complete in itself
    try:
        finetune.main(["--resume", str(tmp_path / "cut"), "--sample-every", "1"])
    finally:
        shutil.move(tmp_path / "moved", base("gpt"))
    assert at == [1, 2, 3] and (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        whole / "model.safetensors").read_bytes()


def test_a_run_goes_on_with_moved_data_and_smaller_batches_and_other_data_are_refused(base, tmp_path, monkeypatch, capsys):
    data = [*toy_data("sft", tmp_path), "--steps", 6]
    whole = start("sft", base("gpt"), tmp_path / "whole", *data)
    save = finetune.save_resume

    def cut(*more, **state):
        save(*more, **state)
        if state["step"] == 3:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(finetune, "save_resume", cut)
        start("sft", base("gpt"), tmp_path / "cut", *data, "--save-minutes", 0)
    file = tmp_path / "a.jsonl"
    moved = file.rename(tmp_path / "moved.jsonl")
    for copy, flags, said in (("same", [], None), ("small", ["--micro-batch", "1"], "--micro-batch 1 instead of")):
        shutil.copytree(tmp_path / "cut", tmp_path / copy)
        capsys.readouterr()
        finetune.main(["--resume", str(tmp_path / copy), "--data", str(moved), *flags])
        told = capsys.readouterr().out
        assert ("not bit-exactly: " + (said or "")) in told if said else "not bit-exactly" not in told
    assert (tmp_path / "same/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert measures(tmp_path / "small", "val_loss") == pytest.approx(measures(whole, "val_loss"), rel=1e-3)
    moved.write_text(moved.read_text().split("\n", 1)[1])               # one row fewer
    assert "data have changed" in refused(capsys, "--resume", tmp_path / "cut", "--data", moved)


def test_ten_bad_steps_in_a_row_stop_the_run_and_the_last_good_one_is_saved(base, tmp_path, monkeypatch, capsys):
    loss, calls = finetune.sft_loss, []

    def broken(log_probs):
        calls.append(torch.is_grad_enabled())
        return loss(log_probs) * (math.inf if sum(calls) > 3 else 1.0)
    monkeypatch.setattr(finetune, "sft_loss", broken)
    with pytest.raises(SystemExit) as stopped:
        start("sft", base("gpt"), tmp_path / "run", *toy_data("sft", tmp_path), "--steps", 30)
    assert stopped.value.code == 2 and "step 3 is saved" in capsys.readouterr().err
    _, saved = checkpoints.load_resume(tmp_path / "run")
    assert saved["step"] == 3 and all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_a_process_without_an_example_adds_nothing_to_a_measure(monkeypatch):
    monkeypatch.setattr(train.Run, "sum", lambda run, *numbers: list(numbers))
    found = []
    for rank in range(3):
        run, settings = train.Run(torch.device("cpu"), torch.float32, rank, 3), finetune.Settings(context=256, micro_batch=4)
        tokenizer = text.Bytes()
        tokenizer.chat_format = "alpaca"
        task = finetune.SFT(settings, run, tokenizer, tiny("gpt"), {})
        examples = task.prepare([{"prompt": "a", "completion": word} for word in ("b", "bcd")])
        found.append(task.total(lambda batch: torch.stack(task(batch)), examples)[1])
    assert found == [3, 5, 0]


def test_two_processes_learn_what_one_learns(base, tmp_path):
    """On preferences, whose reference each process computes a part of."""
    data = [*toy_data("dpo", tmp_path), "--steps", 3]
    one = train.load_checkpoint(start("dpo", base("gpt"), tmp_path / "one", *data))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "finetune.py", "--task", "dpo", "--init-from", base("gpt"), "--out", tmp_path / "two",
               *QUICK, *data]
    processes = [subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                       "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
                 for rank in range(2)]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for ours, theirs in zip(train.load_checkpoint(tmp_path / "two").parameters(), one.parameters()):
        assert_close(ours, theirs, 2e-3)
    norms = [[json.loads(line).get("norm") for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
             for name in ("one", "two")]     # Adam would not see a wrong scale
    assert [n for n in norms[0] if n] == pytest.approx([n for n in norms[1] if n], rel=1e-4)


def test_a_run_directory_opens_in_the_format_that_was_learnt(base, tmp_path):
    rows = rows_file(tmp_path / "a.jsonl", [{"instruction": f"Say {n}.", "output": str(n)} for n in range(30)])
    for chat, stated in (([], "alpaca"), (["--chat", "world"], "world"), (["--chat", "none"], None)):
        out = start("sft", base("gpt"), tmp_path / f"{stated}", "--data", rows, "--steps", 1, *chat)
        config = json.loads((out / "tokenizer_config.json").read_text())
        assert config["chat_format"] == stated and text.load_tokenizer(out).chat_format == stated
        assert train.load_checkpoint(out).config.vocab_size == 257
        ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
        assert ends == (None if stated == "world" else [256])           # transformers stops there, too
        assert {"settings.json", "generation_config.json", "resume", "log.jsonl"} <= {p.name for p in out.iterdir()}


def test_predict_labels_new_text_with_the_saved_head(base, tmp_path, capsys):
    data = toy_data("classify", tmp_path)
    out = start("classify", base("llama3"), tmp_path / "run", *data, "--steps", 40)
    assert measures(out, "accuracy")[1] == 1.0 and measures(out, "majority")[1] == pytest.approx(1 / 3)
    (tmp_path / "new.txt").write_text("abcdx\nhhz\n\nfffy\n")
    capsys.readouterr()
    finetune.main(["--task", "classify", "--init-from", str(out), "--predict", str(tmp_path / "new.txt")])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert [(lines[i][0], lines[i][2]) for i in (0, 1, 3)] == [("x", "abcdx"), ("z", "hhz"), ("y", "fffy")]
    assert all(1 / 3 < float(p) <= 1 for _, p, _ in lines) and len(lines) == 4


def test_accuracy_f1_and_baseline_equal_hand_worked_values():
    task = finetune.Classify(finetune.Settings(), ALONE, text.Bytes(), tiny("gpt"), {"labels": ["a", "b"]})
    found = task.summary([4.0, 3, 1, 2, 4])                              # loss; true a: 3 1, true b: 2 4
    f1 = (2 * 3 / (4 + 5) + 2 * 4 / (6 + 5)) / 2
    assert list(found.values()) == pytest.approx([0.4, 0.7, f1, 0.6])


def test_only_the_last_block_the_last_norm_and_the_head_learn(base):
    for name in MODELS:
        task = finetune.Classify(finetune.Settings(tune="last"), ALONE, text.Bytes(), tiny(name, layers=2), {"labels": ["a", "b"]})
        learn = {n for n, p in task.named_parameters() if p.requires_grad}
        blocks = {n for n in learn if ".1." in n}
        assert len(learn - blocks) in (2, 3) and "head.weight" in learn and "head.bias" not in learn and not [
            n for n in learn if ".0." in n or "emb" in n or "wte" in n or "wpe" in n]


def test_a_reward_gets_a_reply_without_the_space_that_a_chat_format_puts_before_it(tokenizer, monkeypatch):
    settings = finetune.Settings(task="grpo", context=256, group=2, micro_batch=4, data=["x"], kl=0.0)
    task, heard = finetune.GRPO(settings, ALONE, tokenizer, tiny("gpt"), {}), []
    task.score = lambda example, completions, ended: heard.append(completions) or [0.0, 1.0]
    monkeypatch.setattr(task.model, "generate", lambda prompts, new, on_token, **sampling: [
        on_token(row, id) for row in range(len(prompts)) for id in (*tokenizer.encode(" 42"), tokenizer.end_id)])
    drawn = task.draw([task.example({"prompt": "6 * 7?"})], 0)
    assert heard == [["42", "42"]] and drawn[0]["drawn"] == 4


def test_completions_keep_their_stop_id_and_the_probability_they_were_drawn_with(base):
    model, tokenizer = tiny("rwkv6"), text.Bytes()
    settings = finetune.Settings(task="grpo", context=96, max_new_tokens=30, group=16, micro_batch=64, data=["x"])
    task = finetune.GRPO(settings, ALONE, tokenizer, model, {})
    task.stop |= set(range(100, 140))
    task.score = lambda prompt, texts, ended: [float(e) for e in ended]
    example = task.example({"prompt": "abc"})
    [batch] = task.rollouts([example], 0)
    drawn = [[id for id in row if id != -100] for row in batch["targets"].tolist()]
    assert all(ids[-1] in task.stop or len(ids) == 30 for ids in drawn)
    assert not [id for ids in drawn for id in ids[:-1] if id in task.stop] and [i for i in drawn if i[-1] in task.stop]
    for ids in drawn[:4]:                    # token by token, as they were drawn
        state, total = model.new_state(1, 99), 0.0
        logits = model(torch.tensor([example["rows"][0][0]]), state)[0, -1]
        for id in ids:
            total += (logits / settings.temperature).log_softmax(-1)[id].item()
            logits = model(torch.tensor([[id]]), state)[0, -1]
        row = drawn.index(ids)
        assert batch["old"][row].sum().item() == pytest.approx(total, rel=1e-4)
    assert torch.equal(batch["old"], batch["reference"])


@pytest.mark.parametrize("more", [[], ["--checkpoint-activations"], ["--lora", 3], ["--kl", 0]])
def test_the_reference_of_grpo_stays_at_the_start(more, base, tmp_path, monkeypatch):
    seen, rollouts = [], finetune.GRPO.rollouts

    def watched(task, prompts, step):
        seen.append((rollouts(task, prompts, step), train.load_checkpoint(base("gpt"))))
        return seen[-1][0]
    monkeypatch.setattr(finetune.GRPO, "rollouts", watched)
    start("grpo", base("gpt"), tmp_path / "run", *toy_data("grpo", tmp_path), "--steps", 4, *more)
    batches, origin = seen[-1]
    with torch.no_grad():
        for batch in batches:
            assert_close(batch["reference"], batch["old"] if more[:1] == ["--kl"] else finetune.log_probs(origin, batch, 0.8), 1e-5)
            assert more[:1] == ["--kl"] or (batch["old"] - batch["reference"]).abs().max() > 1e-3


def test_a_file_to_measure_on_takes_the_place_of_a_part_of_the_data(base, tmp_path, capsys):
    rows = [{"prompt": str(n), "completion": str(n)} for n in range(20)]
    start("sft", base("gpt"), tmp_path / "run", "--data", rows_file(tmp_path / "a.jsonl", rows), "--val",
          rows_file(tmp_path / "b.jsonl", rows[:3]), "--steps", 1)
    assert "20 examples to learn from, 3 held out" in capsys.readouterr().out


def test_a_reward_is_executed_and_says_so(base, tmp_path, capsys):
    start("grpo", base("gpt"), tmp_path / "run", *toy_data("grpo", tmp_path), "--steps", 1)
    assert f"EXECUTES {tmp_path / 'reward.py'}" in capsys.readouterr().out


# --- settings ---

def test_flags_have_the_names_that_people_type_first():
    settings, _ = train.parse_settings(finetune.Settings, ["--batch-size", "4", "--learning_rate=0.1", "--max-iters", "7"], "")
    assert (settings.batch, settings.lr, settings.steps) == (4, 0.1, 7)


def test_help_says_which_task_a_flag_belongs_to(capsys):
    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--beta FLOAT dpo: DPO's beta, as in the paper (0.1)" in shown
    assert "--group INT grpo: completions of each prompt (8)" in shown


def test_settings_json_repeats_a_run_to_the_same_bits(base, tmp_path):
    first = start("sft", base("gpt"), tmp_path / "first", *toy_data("sft", tmp_path), "--steps", 2, "--lora", 2, "--merge")
    finetune.main(["--settings", str(first / "settings.json"), "--out", str(tmp_path / "again")])
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


# --- mistakes ---

def test_a_mistake_is_one_line_that_says_what_to_do(base, tmp_path, capsys):
    def files(content, name="bad.jsonl"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name
    def sft(*more):
        return refused(capsys, "--task", "sft", "--init-from", base("gpt"), *QUICK, *more)
    assert "--init-from" in refused(capsys, "--task", "sft")
    assert "choose from sft, classify, dpo, grpo" in refused(capsys, "--task", "rl").replace("'", "")
    assert "unknown flag --layers" in refused(capsys, "--task", "sft", "--layers", 2)
    assert "did you mean --lora" in refused(capsys, "--task", "sft", "--lorra", 2)
    assert "--steps and --epochs" in sft("--steps", 2, "--epochs", 1)
    assert "missing" in refused(capsys, "--task", "sft", "--init-from", tmp_path / "missing")
    assert "no such file" in sft("--data", tmp_path / "none.jsonl")
    assert "bad.jsonl, line 2: not JSON" in sft("--data", files(b'{"a": 1}\n{"a"'))
    assert "bad.jsonl: " in sft("--data", files(b"\xff\xfe\xff"))
    assert "line 1: an object is needed" in sft("--data", files(b"[1, 2]"))
    assert 'bad.jsonl, line 2: it has a: it needs "prompt" and "completion"' in sft(
        "--data", files(b'{"prompt": "x", "completion": "y"}\n{"a": 1}'))
    assert "bad.jsonl, line 1: message 0 needs a role" in sft("--data", files(b'{"messages": [{"role": "x"}]}'))
    assert ".jsonl" in sft("--data", files(b"text", "bad.docx"))
    assert "--updates is a flag of --task grpo" in sft("--updates", 2)
    assert "--predict is a flag of --task classify" in sft("--predict", "a.txt")
    assert "--lora-alpha needs --lora" in sft("--lora-alpha", 2)
    assert "--context 500: the model's is 256" in sft("--context", 500)
    assert "give more data" in sft("--data", files(b'{"prompt": "x", "completion": "y"}'))
    assert "--lora-targets" in sft("--lora", 2, "--lora-targets", "zzz", "--data", files(
        b'{"prompt": "x", "completion": "y"}'))
    classify = ("--task", "classify", "--init-from", base("gpt"), *QUICK)
    assert "has no head" in refused(capsys, *classify, "--predict", files(b"a\n", "a.txt"))
    assert 'line 2: it has text, lab: it needs "label"; other names: --columns label=lab' in refused(capsys, *classify, "--data", files(b"text,lab\nhello,a\nx,b\n", "b.csv"))
    assert "line 3: 1 fields instead of 2 (text, label)" in refused(capsys, *classify, "--data", files(b"text,label\nhello,a\nx\n", "b.csv"))
    assert "two labels are needed, there is a" in refused(capsys, *classify, "--data", files(b"text,label\nb, a\nx,a\n", "b.csv"))
    assert "two labels are needed, there is none" in refused(capsys, *classify, "--data", files(b"text,label\n", "b.csv"))
    assert 'it has label, mail: it needs "text"; other names: --columns text=mail' in refused(capsys, *classify, "--data", files(b"label,mail\nham,x\nspam,y\n", "a.csv"))
    assert "needs --reward" in refused(capsys, "--task", "grpo", "--init-from", base("gpt"), "--data", tmp_path / "bad.jsonl")
    grpo = ("--task", "grpo", "--init-from", base("gpt"), *QUICK, "--data", files(
        b'{"prompt": "a"}\n{"prompt": "b"}'), "--reward")
    for name, content, words in (("none.py", None, "No such file"), ("a.py", b"x = 1", "reward"),
                                 ("b.py", b"def", "SyntaxError"),
                                 ("c.py", b"def reward(p, c): return 1 / 0", "ZeroDivisionError"),
                                 ("d.py", b"def reward(p, c): return float('nan')", "finite")):
        line = refused(capsys, *grpo, tmp_path / name if content is None else files(content, name))
        assert words in line and "--reward" in line, line
