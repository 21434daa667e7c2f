"""chat.py: the memory of a conversation, commands, files of prompts, what a folder says."""
import builtins
import contextlib
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, assert_one_line_error, continuation, run_here
from safetensors.torch import load_file, save_file

import chat
from checkpoints import load_checkpoint
from folder import choose_format
from glm4 import GLM4, GLM4Config
from gpt import GPT, GPTConfig
from llama3 import Llama3, Llama3Config
from rwkv6 import RWKV6, RWKV6Config
from tokenizer import LLAMA3_PATTERN, ByteBPE, Bytes, load_tokenizer, train_bpe

TEXT = ("Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nhi\n\n### Response: How are you? Fine. ") * 3
LLAMA_SPECIALS = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
QUESTIONS = ["Hello there!", "What is it?\nSay more.", "And why is that?"]
KINDS = ["gpt", "llama3", "glm4", "rwkv6"]
CONTEXT = 400


def make_tokenizer(kind, golden):
    if kind == "glm4":
        return load_tokenizer(golden / "tokenizer_glm4_standin")
    if kind == "rwkv6":
        return None
    trained = train_bpe([TEXT], 340)
    if kind == "gpt":
        trained.chat_format = "alpaca"
        return trained
    ranks = trained._ranks
    specials = {f"<|{name}|>": len(ranks) + n for n, name in enumerate(LLAMA_SPECIALS)}
    return ByteBPE(ranks, LLAMA3_PATTERN, specials, specials["<|end_of_text|>"],
                   specials["<|begin_of_text|>"], "llama3", merges=trained._merges)


def write_world(folder):
    """A small vocabulary of the World kind: bytes, words, and tokens with a blank line."""
    tokens = [bytes([byte]) for byte in range(256)] + [
        b"\n\n", b".\n\n", b"User", b"Assistant", b"Hello", b" Hello", b" there", b" is",
        b";\n\nUser"]
    lines = [f"{id} {token!r} {len(token)}" for id, token in enumerate(tokens, 1)]
    (folder / "rwkv_vocab_test.txt").write_text("\n".join(lines) + "\n")


def make_model(kind, vocab, context=CONTEXT, seed=0):
    model_class, config = {"gpt": (GPT, GPTConfig), "llama3": (Llama3, Llama3Config),
                           "glm4": (GLM4, GLM4Config), "rwkv6": (RWKV6, RWKV6Config)}[kind]
    torch.manual_seed(seed)
    model = model_class(config.sized(2, 32, vocab, context))
    with torch.no_grad():                    # larger weights: peaked, varied distributions
        for parameter in model.parameters():
            if kind == "rwkv6":              # at the start of training many are zero
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif parameter.dim() == 2:
                parameter.mul_(8.0)
        if kind == "rwkv6":
            model.emb.weight.normal_()
            model.head.weight[[0, 257, 258, 265]] = 0                   # World's: answers go on
    return model.eval()


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    """A tiny checkpoint of each kind with its tokenizer; "plain" only completes text."""
    made = {}
    for kind in [*KINDS, "plain"]:
        folder = made[kind] = tmp_path_factory.mktemp(kind)
        if kind == "rwkv6":
            write_world(folder)
            make_model(kind, 273).save_pretrained(folder)
            continue
        tokenizer = Bytes() if kind == "plain" else make_tokenizer(kind, golden)
        make_model("gpt" if kind == "plain" else kind,
                   tokenizer.vocab_size).save_pretrained(folder)
        tokenizer.save(folder)
    return made


def start(folder, *flags, greedy=True):
    """The conversation of a command line."""
    flags = ["--device", "cpu", "--max-new-tokens", "12", *map(str, flags)]
    return chat.open_conversation(chat.parse(
        [str(folder), *(["--temperature", "0"] if greedy else []), *flags]))


def ask(conversation, message):
    """The answer, streamed: what was shown last."""
    shown = []
    conversation.answer(message, shown.append)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    return shown[-1]


def scratch(conversation, prompt):
    """The ids of a reply by running everything again for each new id."""
    ids = continuation(conversation.model, prompt, conversation.max_new_tokens)
    ends = [n + (not conversation.is_silent(id)) for n, id in enumerate(ids)
            if id in conversation.stops]
    return ids[:ends[0]] if ends else ids


def count_computed(model, monkeypatch):
    """A list that gets the number of ids of each forward pass."""
    counts, hidden = [], model.hidden

    def counted(tokens, state=None):
        counts.append(tokens.shape[1])
        return hidden(tokens, state)
    monkeypatch.setattr(model, "hidden", counted)
    return counts


def script(monkeypatch, conversation, ids):
    """The model draws these ids, whatever it thinks."""
    ids = iter(ids)
    module = sys.modules[type(conversation.model).__module__]
    monkeypatch.setattr(module, "sample", lambda logits, *rest: torch.tensor([next(ids)]))


def check_memory(conversation):
    """The state is what reading `seen` from the beginning gives."""
    model, seen = conversation.model, conversation.seen
    assert conversation.state.position.tolist() == [len(seen)]
    again = model.new_state(1, max(len(seen), 1) if conversation.context is None else CONTEXT)
    with torch.no_grad():
        model.hidden(torch.tensor([seen]), again)
        after = [model(torch.tensor([[5]]), state._make(map(torch.clone, state)))
                 for state in (again, chat.moved(model, conversation.state, CONTEXT))]
    assert torch.allclose(*after, rtol=1e-3, atol=1e-3)


# --- memory ---


@pytest.mark.parametrize("kind", KINDS)
def test_three_turns_equal_recomputing_everything_each_time(kind, folders, monkeypatch):
    check_three_turns(start(folders[kind], "--system", "Be brief."), monkeypatch)


@pytest.mark.parametrize("name, kind", [("llama3", "llama3"), ("rwkv", "rwkv6"),
                                        ("chatglm3", "glm4")])
def test_three_turns_equal_recomputing_with_real_vocabularies(
        name, kind, assets, tmp_path, monkeypatch):
    if name == "chatglm3":
        pytest.importorskip("sentencepiece")
    tokenizer = load_tokenizer(assets / name)
    make_model(kind, tokenizer.vocab_size).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    conversation = start(tmp_path, "--system", "Be brief.")
    assert conversation.format == {"rwkv": "world"}.get(name, name)
    check_three_turns(conversation, monkeypatch)


def check_three_turns(conversation, monkeypatch):
    model, computed = conversation.model, count_computed(conversation.model, monkeypatch)
    replies = []
    for question in QUESTIONS:
        known = len(conversation.seen)
        prompt = conversation.render([*conversation.messages,
                                      {"role": "user", "content": question}])
        computed.clear()
        replies.append(ask(conversation, question))
        assert sum(computed) == len(conversation.seen) - known          # only what is new
        monkeypatch.undo()
        assert conversation.messages[-1]["ids"] == scratch(conversation, prompt)
        assert (known > 0) == (len(replies) > 1) and prompt[:known] == conversation.seen[:known]
        computed = count_computed(model, monkeypatch)
    assert len(set(replies)) == 3 and len(conversation.messages) == 7
    monkeypatch.undo()
    check_memory(conversation)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_reads_as_its_format_writes_it(kind, folders):
    conversation = start(folders[kind], "--system", "Be brief.")
    for question in QUESTIONS:
        ask(conversation, question)
    plain = [{key: m[key] for key in ("role", "content")} for m in conversation.messages]
    tokenizer = conversation.tokenizer
    ours, theirs = conversation.render(conversation.messages), tokenizer.encode_chat(plain)
    ours, theirs = ("".join(tokenizer.decode(ids).split()) for ids in (ours, theirs))
    assert ours == theirs
    assert tokenizer.encode_chat(plain[:2]) == conversation.render(plain[:2])


def test_two_conversations_share_no_memory(folders):
    first, alone = start(folders["rwkv6"]), start(folders["rwkv6"])
    second = chat.Conversation(first.model, first.tokenizer, first.sampling, 12)
    ask(first, "Hello")
    ask(second, "Something else")
    ask(alone, "Hello")
    assert ask(first, "And?") == ask(alone, "And?")


def test_a_seed_repeats_a_conversation_and_differs_between_turns(folders):
    talks = [[ask(conversation, "Hello") for _ in range(3)] for conversation in (
        start(folders["rwkv6"], "--seed", seed, "--temperature", "2", greedy=False)
        for seed in (1, 1, 2))]
    assert talks[0] == talks[1] != talks[2] and len(set(talks[0])) == 3


@pytest.mark.parametrize("kind", ["gpt", "llama3"])
def test_a_full_context_drops_the_oldest_turns_and_keeps_the_system_message(
        kind, folders, capsys):
    conversation = start(folders[kind], "--system", "Be brief.")
    asked = [f"{n}: {QUESTIONS[n % 3]}" for n in range(14)]
    for question in asked:
        ask(conversation, question)
        assert len(conversation.seen) < CONTEXT
    assert "the context of 400 tokens is full: the oldest" in capsys.readouterr().err
    left = [m["content"] for m in conversation.messages if m["role"] == "user"]
    assert 0 < len(left) < 14 and left == asked[-len(left):]
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    check_memory(conversation)
    prompt = conversation.render([*conversation.messages, {"role": "user", "content": "So?"}])
    ask(conversation, "So?")
    if kind == "llama3":                     # else the turn may have dropped some again
        assert conversation.messages[-1]["ids"] == scratch(conversation, prompt)


def test_a_message_longer_than_the_context_is_refused_and_changes_nothing(folders):
    conversation = start(folders["llama3"])
    ask(conversation, "Hello")
    before = list(conversation.messages), list(conversation.seen)
    with pytest.raises(ValueError, match="tokens .*the context is 400: shorten it"):
        conversation.answer("x" * 1000, print)
    assert (conversation.messages, conversation.seen) == before
    check_memory(conversation)


def test_an_answer_that_fills_the_context_says_so(folders, capsys):
    conversation = start(folders["llama3"], "--max-new-tokens", 1000)
    assert conversation.answer("Hello", lambda reply: None) == "the context of 400 tokens is full"
    assert ask(conversation, "x") is not None                           # and it goes on
    assert start(folders["llama3"]).answer("Hello", print) == "cut at --max-new-tokens 12"


def test_a_recurrent_model_has_no_limit(folders, capsys):
    conversation = start(folders["rwkv6"])
    for n in range(20):
        ask(conversation, f"{n} {QUESTIONS[n % 3]} {'word ' * 10}")
    assert len(conversation.messages) == 40 and len(conversation.seen) > 2 * CONTEXT
    assert "full" not in capsys.readouterr().err
    check_memory(conversation)


def test_the_memory_of_attention_grows_with_the_conversation(folders):
    conversation, sizes = start(folders["llama3"]), []
    for question in QUESTIONS * 2:
        ask(conversation, question)
        sizes.append(conversation.state.capacity)
    assert sizes[0] < sizes[-1] <= CONTEXT and sizes == sorted(sizes)
    check_memory(conversation)


def test_a_changed_system_message_is_read_before_the_next_answer(folders, capsys):
    conversation = start(folders["llama3"])
    ask(conversation, "Hello")
    chat.command(conversation, "/system Answer in verse.")
    assert conversation.system == "Answer in verse."
    prompt = conversation.render([*conversation.messages, {"role": "user", "content": "So?"}])
    ask(conversation, "So?")
    assert conversation.messages[-1]["ids"] == scratch(conversation, prompt)
    check_memory(conversation)
    chat.command(conversation, "/system")
    assert conversation.system is None and len(conversation.messages) == 4


# --- how answers end ---


def test_stop_ids_are_the_tokenizers_and_the_configs(folders, tmp_path):
    conversation = start(folders["glm4"])
    assert conversation.stops == set(conversation.tokenizer.stop_ids)
    assert len(conversation.stops) == 3
    tokenizer = load_tokenizer(folders["llama3"])
    model = make_model("llama3", tokenizer.vocab_size)
    model.config = replace(model.config, eos_token_id=7)
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert start(tmp_path).stops == {7, 8, 9, *tokenizer.stop_ids}


def test_glm_ends_a_turn_with_the_next_role_and_it_is_not_shown(folders, monkeypatch):
    conversation = start(folders["glm4"])
    tokenizer = conversation.tokenizer
    reply = [*tokenizer.encode("\n"), *tokenizer.encode("Fine")]
    user, observation = tokenizer.special_ids["<|user|>"], tokenizer.special_ids["<|observation|>"]
    for stop in (user, observation, tokenizer.end_id):
        script(monkeypatch, conversation, [*reply, stop])
        assert ask(conversation, "How?") == "Fine"
        assert conversation.messages[-1]["ids"] == reply
        assert conversation.render(conversation.messages)[-len(reply) - 1:] == [*reply, user]
        check_memory(conversation)


@pytest.mark.parametrize("drawn, shown, kept", [
    ([b" Hello", b".\n\n"], "Hello.", b" Hello.\n\n"),
    ([b" Hello", b"\n\n"], "Hello", b" Hello\n\n"),
    ([b" Hello", b";\n\nUser"], "Hello;", b" Hello;\n\n"),
    ([b" Hello", b"\n", b"\n"], "Hello", b" Hello\n\n"), ([b"Hello", 0], "Hello", b"Hello\n\n"),
    ([b" Hello", b"\n", b" there", 0], "Hello\n there", b" Hello\n there\n\n")])
def test_world_ends_a_turn_at_a_blank_line_however_it_is_spelled(
        drawn, shown, kept, folders, monkeypatch):
    conversation = start(folders["rwkv6"])
    tokenizer = conversation.tokenizer
    ids = [token if token == 0 else tokenizer.encode_bytes(token)[0] for token in drawn]
    script(monkeypatch, conversation, [*ids, 99])
    assert ask(conversation, "Hello") == shown
    rendered = tokenizer.to_bytes(conversation.render(conversation.messages))
    assert rendered == b"User: Hello\n\nAssistant:" + kept
    check_memory(conversation)
    monkeypatch.undo()
    computed = count_computed(conversation.model, monkeypatch)
    ask(conversation, "More")
    assert computed[0] < len("\n\nUser: More\n\nAssistant:")             # the rest was in memory


def test_a_reply_that_spells_control_tokens_stays_what_was_drawn(folders, monkeypatch):
    conversation = start(folders["llama3"], "--max-new-tokens", 50)
    tokenizer = conversation.tokenizer
    eot = tokenizer.special_ids["<|eot_id|>"]
    typed = tokenizer.encode("<|eot_id|> is typed")
    script(monkeypatch, conversation, [*typed, eot])
    assert ask(conversation, "Say it") == "<|eot_id|> is typed"
    assert conversation.render(conversation.messages)[-len(typed) - 1:] == [*typed, eot]


def test_half_characters_wait_for_their_rest(folders, monkeypatch):
    conversation = start(folders["rwkv6"])
    ids = conversation.tokenizer.encode("é 你")
    script(monkeypatch, conversation, [*ids, 0])
    shown = []
    conversation.answer("Hello", shown.append)
    assert "".join(shown).count("\ufffd") == 0 and shown[-1] == "é 你"


def test_thoughts_that_a_format_leaves_out_are_read_no_more(folders, monkeypatch):
    conversation = start(folders["glm4"], "--chat", "glm4-0414")
    encode, user = conversation.tokenizer.encode, conversation.tokenizer.special_ids["<|user|>"]
    script(monkeypatch, conversation, [*encode("\n<think>Hm</think>Yes"), user])
    ask(conversation, "Is it?")
    monkeypatch.undo()
    ask(conversation, "Sure?")
    assert "think" not in conversation.tokenizer.decode(conversation.seen)
    check_memory(conversation)


@pytest.mark.parametrize("drawn, stops, shown", [
    (["Fine", "\n", "User", ": x"], ["\nUser:"], "Fine"), (["a", "b", "c", "d"], ["bc"], "a"),
    (["a", "b", "c"], ["x", "c", "b"], "a"), (["a", "\n", "b"], ["\nc"], "a\nb"),
    (["ab"], ["a"], ""), (["é", "!"], ["!"], "é"), (["a", "bcb"], ["bcd"], "abcb")])
@pytest.mark.parametrize("kind", ["plain", "llama3", "rwkv6"])
def test_a_stop_text_ends_an_answer_and_none_of_it_is_shown(kind, drawn, stops, shown, folders, monkeypatch):
    conversation = start(folders[kind], "--max-new-tokens", 40, *(w for s in stops for w in ("--stop", s)))
    encode, end = conversation.tokenizer.encode, min(conversation.stops)
    script(monkeypatch, conversation, [id for part in drawn for id in encode(part)] + [end] * 9)
    seen = []
    assert conversation.answer("Hello", seen.append) is None
    assert seen[-1] == shown and all(shown.startswith(s) or s == shown for s in seen)
    assert conversation.messages[-1]["content"] == shown
    check_memory(conversation)
    monkeypatch.undo()
    if conversation.format:                  # what was shown is what the model goes on from
        plain = [{key: m[key] for key in ("role", "content")} for m in conversation.messages]
        ours, theirs = (conversation.tokenizer.decode(conversation.render(m))
                        for m in (conversation.messages, plain))
        assert "".join(ours.split()) == "".join(theirs.split())
        ask(conversation, "So?")
        check_memory(conversation)


def test_a_stop_text_on_one_command_line(folders):
    flags = [folders["plain"], "--prompt", "Once", "--temperature", "0", "--max-new-tokens", 12, "--device", "cpu"]
    whole = run_here(chat.main, *flags).stdout.removesuffix("\n")
    middle = whole[8:10]
    cut = run_here(chat.main, *flags, "--stop", middle, "--stop", "never said").stdout
    assert cut == whole[:whole.index(middle, 4)] + "\n" and middle in whole


# --- Ctrl-C ---


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_stops_an_answer_and_the_memory_stays_whole(kind, folders):
    conversation, shown = start(folders[kind]), []
    handler = signal.getsignal(signal.SIGINT)

    def show(reply):
        shown.append(reply)
        if len(shown) == 3:
            os.kill(os.getpid(), signal.SIGINT)
    assert conversation.answer("Hello there!", show) == "stopped"
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(conversation.messages[-1]["ids"]) in (3, 4) and conversation.state is not None
    check_memory(conversation)
    prompt = conversation.render([*conversation.messages, {"role": "user", "content": "So?"}])
    assert prompt[:len(conversation.seen)] == conversation.seen
    ask(conversation, "So?")
    assert conversation.messages[-1]["ids"] == scratch(conversation, prompt)


@pytest.mark.parametrize("kind", ["llama3", "rwkv6"])
@pytest.mark.parametrize("at", [1, 4])
def test_a_second_ctrl_c_stops_amid_a_token_and_everything_is_read_again(
        at, kind, folders, monkeypatch):
    conversation = start(folders[kind])
    ask(conversation, "Hello")
    before, model = list(conversation.messages), conversation.model
    block, calls = (model.blocks if kind == "rwkv6" else model.model["layers"])[1], []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == at:                 # the first block has changed its memory by now
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    hook = block.register_forward_pre_hook(interrupt)
    cut = conversation.answer("What is it?", lambda reply: None)
    hook.remove()
    assert "stopped" in cut and conversation.state is None and conversation.seen == []
    if at == 1:
        assert "taken back" in cut and conversation.messages == before
    prompt = conversation.render([*conversation.messages, {"role": "user", "content": "So?"}])
    ask(conversation, "So?")
    assert conversation.messages[-1]["ids"] == scratch(conversation, prompt)
    check_memory(conversation)


def test_an_interruption_raised_by_on_token_leaves_a_conversation_that_goes_on(folders):
    conversation = start(folders["rwkv6"])

    def show(reply):
        if len(reply) > 3:
            raise KeyboardInterrupt
    conversation.answer("Hello", show=lambda reply: None)
    with pytest.raises(KeyboardInterrupt):
        conversation.answer("Hello", show)
    prompt = conversation.render([*conversation.messages, {"role": "user", "content": "So?"}])
    ask(conversation, "So?")
    assert conversation.messages[-1]["ids"] == scratch(conversation, prompt)


# --- /save and /load ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_conversation_goes_on_identically(kind, folders, tmp_path, monkeypatch):
    conversation = start(folders[kind], "--system", "Be brief.")
    for question in QUESTIONS[:2]:
        ask(conversation, question)
    conversation.save(tmp_path / "talk")
    expected = [ask(conversation, question) for question in QUESTIONS]
    other = start(folders[kind])
    other.load(tmp_path / "talk")
    check_memory(other)
    computed = count_computed(other.model, monkeypatch)
    known = len(other.seen)
    assert [ask(other, question) for question in QUESTIONS] == expected
    assert sum(computed) == len(other.seen) - known and other.messages == conversation.messages
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk"]
    loaded = type(other.state)(**load_file(tmp_path / "talk"))          # a state like any other
    assert loaded.position.tolist() == [known]


def test_a_system_message_alone_can_be_saved(folders, tmp_path):
    start(folders["rwkv6"], "--system", "You are a cat.").save(tmp_path / "cat")
    conversation = start(folders["rwkv6"])
    conversation.load(tmp_path / "cat")
    assert ask(conversation, "Hello") == ask(start(folders["rwkv6"], "--system", "You are a cat."),
                                             "Hello")


def test_files_that_cannot_be_saved_or_loaded_are_refused_and_nothing_changes(
        folders, tmp_path, golden):
    conversation = start(folders["llama3"])
    ask(conversation, "Hello")
    saved = tmp_path / "talk"
    conversation.save(saved)
    before, messages = saved.read_bytes(), list(conversation.messages)
    with pytest.raises(ValueError, match="talk exists: choose another name"):
        conversation.save(saved)
    assert saved.read_bytes() == before
    (tmp_path / "cut").write_bytes(before[:-100])
    (tmp_path / "text").write_text("no tensors")
    save_file(conversation.state._asdict(), tmp_path / "state")
    for name in ("cut", "text", "state"):
        with pytest.raises(ValueError, match="is no conversation that /save wrote"):
            conversation.load(tmp_path / name)
    with pytest.raises(OSError, match="No such file or directory"):
        conversation.save(tmp_path / "none" / "talk")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(OSError, match=f"{path}: no such file"):
            conversation.load(path)
    with pytest.raises(ValueError, match="another model or chat format"):
        start(folders["llama3"], "--chat", "none").load(saved)
    with pytest.raises(ValueError, match="another model or chat format"):
        start(folders["rwkv6"]).load(saved)
    conversation.seen = conversation.seen[:-1]
    conversation.save(tmp_path / "wrong")
    with pytest.raises(ValueError, match="damaged"):
        conversation.load(tmp_path / "wrong")
    conversation.seen, conversation.messages = conversation.state.position.item() * [1], [
        {"role": "king", "content": "a"}]
    conversation.save(tmp_path / "king")
    conversation.messages = messages
    with pytest.raises(ValueError, match="king"):
        conversation.load(tmp_path / "king")
    assert conversation.messages == messages and not list(tmp_path.glob("*.tmp"))


# --- does it converse ---


LLAMA_BASE = {"tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>'"
    "'\n\n' + m.content.strip() + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


@pytest.mark.parametrize("files, expected, why", [
    ({"tokenizer_config.json": {"chat_format": "llama3"}}, "llama3", "chat_format"),
    ({"tokenizer_config.json": {"chat_format": "alpaca"}}, "alpaca", "chat_format \"alpaca\""),
    ({"tokenizer_config.json": {"chat_format": None, "chat_template": "x"}}, None, "null"),
    ({"tokenizer_config.json": {**LLAMA_BASE, "chat_template": LLAMA_TEMPLATE}}, "llama3",
     "template"),
    ({"tokenizer_config.json": LLAMA_BASE, "chat_template.jinja": LLAMA_TEMPLATE}, "llama3",
     "template"),
    ({"tokenizer_config.json": {**LLAMA_BASE, "chat_template": "{{ x }}"}}, None, "template"),
    ({"tokenizer_config.json": LLAMA_BASE, "generation_config.json": {"eos_token_id": [381, 384]}},
     "llama3", "several ids"),
    ({"tokenizer_config.json": LLAMA_BASE, "generation_config.json": {"eos_token_id": 381}}, None,
     "neither chat_format, nor chat template"),
    ({"tokenizer_config.json": LLAMA_BASE, "params.json": {}}, None,
     "do not tell base models from Instruct; if this is one, add --chat llama3"),
    ({}, None, "neither")])
def test_the_folder_says_whether_its_model_converses(files, expected, why, folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["llama3"] / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    chosen, reason = choose_format(tmp_path, load_tokenizer(tmp_path), None)
    assert chosen == expected and why in reason
    assert choose_format(tmp_path, load_tokenizer(tmp_path), "none")[0] is None


def test_a_template_of_no_known_format_does_not_make_a_model_converse(tmp_path):
    Bytes().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    chosen, why = choose_format(tmp_path, load_tokenizer(tmp_path), None)
    assert chosen is None and "no format known here" in why


def test_world_converses_and_completes_when_told(folders, capsys):
    assert start(folders["rwkv6"]).format == "world"
    completing = start(folders["rwkv6"], "--chat", "none")
    assert completing.format is None and completing.stops == {0}        # blank lines go on
    assert "completes  text: --chat none" in capsys.readouterr().err


def test_sampling_follows_the_model_until_told_otherwise(folders, tmp_path, capsys):
    Bytes().save(tmp_path)
    make_model("gpt", 257).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    assert start(tmp_path, greedy=False).sampling == {
        "temperature": 0.6, "top_k": None, "top_p": 0.9}
    assert start(tmp_path, "--top-p", 1, "--top-k", 5).sampling == {
        "temperature": 0.0, "top_k": 5, "top_p": 1.0}
    assert start(folders["plain"], greedy=False).sampling["temperature"] == 0.8


def with_config(folders, tmp_path, content):
    for file in folders["plain"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def test_do_sample_false_is_greedy_until_a_temperature_is_given(folders, tmp_path, capsys):
    folder = with_config(folders, tmp_path, {"do_sample": False, "temperature": 0.6, "top_p": 7})
    assert start(folder, greedy=False).sampling == {"temperature": 0.0, "top_k": None, "top_p": None}
    assert "temperature 0.0 (do_sample is false in generation_config.json)" in capsys.readouterr().err
    (folder / "generation_config.json").write_text('{"do_sample": false, "top_k": 20}')
    assert start(folder, "--temperature", 1, greedy=False).sampling == {
        "temperature": 1.0, "top_k": 20, "top_p": None}


@pytest.mark.parametrize("stated, words, flag", [
    ({"temperature": -1}, "temperature is -1, it must be 0", "--temperature"),
    ({"temperature": "warm"}, "temperature is 'warm'", "--temperature"),
    ('{"temperature": NaN}', "temperature is nan", "--temperature"),
    ('{"temperature": Infinity}', "temperature is inf", "--temperature"),
    ({"temperature": True}, "temperature is True", "--temperature"),
    ({"top_p": 7}, "top_p is 7, it must be 0 to 1", "--top-p"), ({"top_p": -0.1}, "top_p is -0.1", "--top-p"),
    ({"top_p": [0.9]}, "top_p is [0.9]", "--top-p"), ({"top_k": "x"}, "top_k is 'x', it must be a whole", "--top-k"),
    ({"top_k": 2.5}, "top_k is 2.5", "--top-k"), ({"top_k": -3}, "top_k is -3", "--top-k"),
    ({"do_sample": "false"}, "do_sample is 'false': true or false", None), ("[1]", "holds no JSON object", None)])
def test_impossible_values_in_generation_config_are_refused_by_file_field_and_value(
        stated, words, flag, folders, tmp_path, capsys):
    folder = with_config(folders, tmp_path, stated)
    assert_fails(capsys, [folder, "--prompt", "a"], str(folder / "generation_config.json"), words)
    if flag:                                 # which decides instead
        start(folder, flag, 1, greedy=False)


def test_null_and_zero_in_generation_config_mean_that_nothing_is_left_out(folders, tmp_path):
    folder = with_config(folders, tmp_path, {"temperature": None, "top_p": None, "top_k": 0, "do_sample": True})
    assert start(folder, greedy=False).sampling == {"temperature": 0.8, "top_k": None, "top_p": None}


# --- typing ---


def session(monkeypatch, capsys, folder, lines, *flags):
    """(stdout, stderr) of an interactive session in which these lines are typed."""
    typed = iter(lines)

    def type_line(prompt=""):
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line
    monkeypatch.setattr(builtins, "input", type_line)
    chat.main([str(folder), "--device", "cpu", "--temperature", "0", "--max-new-tokens", "12",
               *map(str, flags)])
    return capsys.readouterr()


def test_a_session_of_commands(folders, monkeypatch, capsys, tmp_path):
    saved = tmp_path / "talk"
    out, err = session(monkeypatch, capsys, folders["llama3"], [
        "/help", "Hello", f"/save {saved}", "And you?", "/reset", "Hello", f"/load {saved}",
        "And you?", "/save", "/saev x", "", "   ", KeyboardInterrupt, "x" * 2000, "/quit", "Never"])
    direct = start(folders["llama3"])
    first, second = ask(direct, "Hello"), ask(direct, "And you?")
    assert out == f"{first}\n{second}\n{first}\n{second}\n"
    for words in ("/system TEXT", "[saved: 1 answers", "[loaded: 1 answers", "[forgotten]",
                  "[/save needs a file", "[/saev is no command", "Ctrl-D or /quit ends",
                  "shorten it]", "converses  in the format llama3"):
        assert words in err
    assert "Traceback" not in err


def test_messages_of_several_lines(folders, monkeypatch, capsys):
    heard = []
    monkeypatch.setattr(chat, "turn", lambda conversation, message: heard.append(message))
    session(monkeypatch, capsys, folders["llama3"], [
        "one\\", "two\\", "three", '"""', "/not a command", "", 'end """', '"""short"""', " /path"])
    assert heard == ["one\ntwo\nthree", "/not a command\n\nend ", "short", " /path"]


@pytest.mark.parametrize("lines, heard", [
    (['"""', "one", "", "two"], ["one\n\ntwo"]), (['"""one'], ["one"]), (["one\\"], ["one"]),
    (["one\\", "two\\"], ["one\ntwo"]), (['"""'], []), (['"""', ""], []), (["a", '"""b', 'c"""  '], ["a", "b\nc"])])
def test_what_the_end_of_the_input_leaves_open_is_sent(lines, heard, folders, monkeypatch, capsys):
    got = []
    monkeypatch.setattr(chat, "turn", lambda conversation, message: got.append(message))
    session(monkeypatch, capsys, folders["llama3"], lines)
    assert got == heard


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", None])
def test_invalid_bytes_do_not_end_a_conversation(encoding, folders):
    """encoding: of the terminal; None: a process of its own, in the locale C."""
    flags = [folders["plain"], "--temperature", "0", "--device", "cpu", "--max-new-tokens", "3"]
    said = b"Hello\n\xff\xfe \xc3\nAnd you?\n" * 2
    if encoding:
        result = run_here(chat.main, *flags, input=said, encoding=encoding)
        out, err = result.stdout.encode(encoding), result.stderr
    else:
        result = subprocess.run([sys.executable, "chat.py", *map(str, flags)], check=False, input=said,
                                capture_output=True, cwd=ROOT, timeout=120,
                                env={**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C"})
        out, err = result.stdout, result.stderr.decode()
    direct = start(folders["plain"], "--max-new-tokens", 3)
    assert result.returncode == 0 and "Traceback" not in err, err
    hello, you = (ask(direct, text).encode(encoding or "utf-8", "replace") for text in ("Hello", "And you?"))
    assert out.startswith(hello) and out.count(you) >= 2
    assert out.count(b"\n") == 6 and err.count("[cut at") == 6


def test_completing_text_goes_on_at_an_empty_line_and_begins_anew_at_another(
        folders, monkeypatch, capsys):
    out, err = session(monkeypatch, capsys, folders["plain"], ["", "Once", "", "Once"])
    conversation = start(folders["plain"])
    first = scratch(conversation, list(b"Once"))
    second = scratch(conversation, list(b"Once") + first)
    decode = conversation.tokenizer.decode
    assert len(first) == 12 and second != first
    assert out == f"{decode(first)}\n{decode(second)}\n{decode(first)}\n"
    assert "completes  text: its tokenizer_config.json says chat_format null" in err


def test_a_text_that_has_ended_can_go_on(folders, monkeypatch):
    conversation = start(folders["plain"])
    script(monkeypatch, conversation, [65, 66, 256, 67, 68, 256])
    shown = []
    assert conversation.answer("Once", shown.append) is None and shown[-1] == "AB"
    assert conversation.answer(None, shown.append) is None and shown[-1] == "CD"
    assert bytes(conversation.seen) == b"OnceABCD"
    check_memory(conversation)


def test_a_text_longer_than_the_context_goes_on_from_its_end(folders, capsys):
    conversation = start(folders["plain"])
    ask(conversation, "abc" * 200)
    assert "only the last 200 of the text are read" in capsys.readouterr().err
    assert bytes(conversation.seen[:200]) == b"bc" + b"abc" * 66
    check_memory(conversation)


def test_a_session_through_a_pipe(folders):
    result = run_here(chat.main, folders["llama3"], "--temperature", "0", "--device", "cpu",
                      "--max-new-tokens", "12", input=b"Hello\nAnd you?\n")
    direct = start(folders["llama3"])
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{ask(direct, 'Hello')}\n{ask(direct, 'And you?')}\n"


# --- files of prompts ---


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                    encoding="utf-8")
    return path


def answer_file(folder, source, target, *flags):
    chat.main([str(folder), "--input", str(source), "--output", str(target), "--device", "cpu",
               "--temperature", "0", "--max-new-tokens", "12", *map(str, flags)])
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_in_batches_equals_one_by_one(kind, folders, tmp_path, capsys):
    rows = [{"prompt": question * n, "id": n} for n, question in enumerate(QUESTIONS * 2, 1)]
    rows.insert(2, {"messages": [{"role": "user", "content": "Hi"},
                                 {"role": "assistant", "content": "Hello"},
                                 {"role": "user", "content": "你好 é?"}]})
    source = write_rows(tmp_path / "in.jsonl", rows)
    batched = answer_file(folders[kind], source, tmp_path / "a.jsonl", "--batch-size", 3)
    single = answer_file(folders[kind], source, tmp_path / "b.jsonl", "--batch-size", 1)
    assert batched == single
    assert [{k: v for k, v in row.items() if k != "response"} for row in batched] == rows
    assert "7 answered" in capsys.readouterr().err
    for row in batched:
        conversation = start(folders[kind])
        if "prompt" in row:
            assert row["response"] == ask(conversation, row["prompt"])
    assert len({row["response"] for row in batched}) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "in.jsonl"]


def test_a_file_of_texts_to_complete(folders, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Once upon"}, {"prompt": ""}])
    rows = answer_file(folders["plain"], source, tmp_path / "out.jsonl")
    conversation = start(folders["plain"])
    decode = conversation.tokenizer.decode
    assert rows[0]["response"] == decode(scratch(conversation, list(b"Once upon")))
    assert rows[1]["response"] == decode(scratch(conversation, [256]))


def test_the_system_message_stands_before_prompts_that_have_none(folders, tmp_path):
    own = {"messages": [{"role": "system", "content": "Be long."},
                        {"role": "user", "content": "Hi"}]}
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Hi"}, own])
    rows = answer_file(folders["llama3"], source, tmp_path / "out.jsonl", "--system", "Be brief.")
    for row, system in zip(rows, ("Be brief.", "Be long.")):
        assert row["response"] == ask(start(folders["llama3"], "--system", system), "Hi")


def test_lone_surrogates_in_a_file_become_replacement_characters(folders, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a\\ud800"}\n')
    assert answer_file(folders["plain"], tmp_path / "in.jsonl", tmp_path / "out.jsonl")[0][
        "prompt"] == "a\ufffd"


@pytest.mark.parametrize("line, words", [
    ("{", "Expecting"), ("[1]", 'needs {"prompt"'), ("{}", 'needs {"prompt"'),
    ('{"prompt": "a", "messages": []}', 'needs {"prompt"'), ('{"prompt": 1}', "must be text"),
    ('{"messages": []}', "must be a list"), ('{"messages": "hi"}', "must be a list"),
    ('{"messages": [1]}', "must be a list"),
    ('{"messages": [{"role": "user"}]}', "message 0 needs"),
    ('{"messages": [{"role": "king", "content": "a"}]}', "message 0 needs a role"),
    ('{"messages": [{"role": "user", "content": "a", "ids": [1]}]}', "message 0 needs"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "ends with what is to be answered"),
    (json.dumps({"prompt": "x" * 2000}), "tokens, the context is 400"), ("\xff", "not JSON"),
    ('{"prompt": "\xff"}', "it is not UTF-8")])
def test_a_bad_line_is_named_before_anything_is_computed(
        line, words, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Llama3, "generate", None)
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"prompt": "fine"}\n\n' + line.encode("latin-1") + b"\n")
    assert_fails(capsys, [folders["llama3"], "--input", source, "--output", tmp_path / "out"],
                 f"{source}, line 3: ", words)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_file_that_fails_before_its_first_answer_leaves_nothing(folders, tmp_path, capsys, monkeypatch):
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    flags = [folders["plain"], "--input", source, "--output", tmp_path / "out", "--batch-size", 1]

    def fail(*arguments, **settings):
        raise error
    monkeypatch.setattr(GPT, "generate", fail)
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert_fails(capsys, flags, "out of memory: a smaller --batch-size")
    error = KeyboardInterrupt()
    assert_fails(capsys, flags, "stopped; nothing was written", status=130)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("flags", [[], ["--temperature", 1.5, "--seed", 3]], ids=["greedy", "seed"])
@pytest.mark.parametrize("kind", ["llama3", "rwkv6"])
def test_a_stopped_file_goes_on_to_the_same_answers(kind, flags, folders, tmp_path, capsys, monkeypatch):
    """After Ctrl-C, later at each try, and kills amid a line: what was answered is there, the rest is added."""
    rows = [{"prompt": question * n, "response": "old"} for n, question in enumerate(QUESTIONS * 2, 1)]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    flags = ["--device", "cpu", "--max-new-tokens", 12, "--batch-size", 2, *(flags or ["--temperature", 0])]
    arguments = [str(word) for word in (folders[kind], "--input", source, *flags, "--output")]
    chat.main([*arguments, str(tmp_path / "whole.jsonl")])
    whole = (tmp_path / "whole.jsonl").read_text()
    model_class = Llama3 if kind == "llama3" else RWKV6
    generate, lengths = model_class.generate, []

    def interrupted(self, prompts, new, *, on_token, **settings):
        def hear(row, id):
            nonlocal left
            left -= 1
            on_token(row, id)
            if left == 0:
                raise KeyboardInterrupt
        return generate(self, prompts, new, on_token=hear, **settings)
    monkeypatch.setattr(model_class, "generate", interrupted)
    for start_at in itertools.count(1, 5):
        left = start_at
        with contextlib.suppress(SystemExit):
            chat.main([*arguments, str(target)])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        if not target.exists():
            assert said == "chat.py: stopped; nothing was written"
            continue
        written = target.read_text()
        lengths.append(written.count("\n"))
        assert whole.startswith(written) and written.endswith("\n")
        assert f"stopped; {lengths[-1]} of 6 are answered in {target}, and the same command goes on" in said
        target.write_text(written + whole[len(written):][:20])          # a kill amid a line
        if lengths[-1] > 1:
            break
    assert lengths == sorted(lengths) and lengths[-1] < 6
    monkeypatch.undo()
    chat.main([*arguments, str(target)])
    assert f"{lengths[-1]} of 6 are answered in" in capsys.readouterr().err
    assert target.read_text() == whole and [json.loads(line)["prompt"] for line in whole.splitlines()] == [
        row["prompt"] for row in rows]
    assert_fails(capsys, [*arguments, target], "has every answer already")


def test_each_answer_is_written_before_the_next_batch_begins(folders, tmp_path, monkeypatch):
    source, seen = write_rows(tmp_path / "in.jsonl", [{"prompt": c} for c in "abcde"]), []
    generate, target = GPT.generate, tmp_path / "out.jsonl"

    def watched(self, prompts, *arguments, **settings):
        seen.append(target.read_text().count("\n"))
        return generate(self, prompts, *arguments, **settings)
    monkeypatch.setattr(GPT, "generate", watched)
    answer_file(folders["plain"], source, target, "--batch-size", 2)
    assert seen == [0, 2, 4]


def test_a_row_is_written_when_it_ends_though_its_batch_goes_on(folders, tmp_path, monkeypatch):
    source, seen = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), []
    target, step = tmp_path / "out.jsonl", itertools.count()

    def sample(logits, *rest):
        seen.append(target.read_text().count("\n"))
        return torch.tensor([256 if next(step) >= 2 else 65, 66])
    monkeypatch.setattr(sys.modules["gpt"], "sample", sample)
    rows = answer_file(folders["plain"], source, target, "--max-new-tokens", 6)
    assert [row["response"] for row in rows] == ["AA", "BBBBBB"] and seen == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("content", ["mine", "mine\n", '{"prompt": "b", "response": "x"}\n', '{"prompt": "a"}\n',
                                     '{"prompt": "a", "response": "x"}\n\n', "\n", '{"prompt": "b", "resp'])
def test_an_output_that_is_not_of_these_rows_is_refused_and_stays(content, folders, tmp_path, capsys):
    source, target = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out"
    target.write_text(content)
    assert_fails(capsys, [folders["plain"], "--input", source, "--output", target],
                 f"{target} exists: choose another name, for its line ", f"of {source}")
    assert target.read_text() == content and len(list(tmp_path.iterdir())) == 2


def test_a_stop_text_cuts_the_answers_of_a_file_and_ends_them_early(folders, tmp_path, monkeypatch):
    source, step = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), itertools.count()
    words = [b"one##two", b"123456##"]
    monkeypatch.setattr(sys.modules["gpt"], "sample", lambda logits, *rest: torch.tensor(
        [word[n % 8] for n in [next(step)] for word in words]))
    rows = answer_file(folders["plain"], source, tmp_path / "out", "--stop", "##", "--max-new-tokens", 100)
    assert [row["response"] for row in rows] == ["one", "123456"] and next(step) == 8


@pytest.mark.parametrize("name, content", [
    ("in.json", b'[{"prompt": "Once"},\n {"prompt": "a"}]'), ("in.ndjson", b'\xef\xbb\xbf{"prompt": "Once"}\r\n{"prompt": "a"}'),
    ("in.jsonl.gz", gzip.compress(b'{"prompt": "Once"}\n{"prompt": "a"}\n'))])
def test_prompts_are_read_from_what_finetune_reads(name, content, folders, tmp_path):
    (tmp_path / name).write_bytes(content)
    expected = write_rows(tmp_path / "plain.jsonl", [{"prompt": "Once"}, {"prompt": "a"}])
    assert answer_file(folders["plain"], tmp_path / name, tmp_path / "x") == answer_file(
        folders["plain"], expected, tmp_path / "y")


# --- --inspect ---


def inspect(capsys, *arguments):
    """(stdout, exit status) of --inspect."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        chat.main([*map(str, arguments), "--inspect", "--device", "cpu"])
    return capsys.readouterr().out, ended.value.code


@pytest.mark.parametrize("name, model, why, weights", [
    ("gpt2", "GPT of gpt.py", "model_type 'gpt2'", "in 1 file: model.safetensors"),
    ("gpt2/bin", "GPT of gpt.py", "model_type 'gpt2'", "pytorch_model.bin"),
    ("gpt2/prefixed", "GPT of gpt.py", "model_type 'gpt2'", "model.safetensors"),
    ("gpt2/nanogpt/ckpt.pt", "GPT of gpt.py", "a .pt is nanoGPT's", "ckpt.pt"),
    ("gpt2/nanogpt/ckpt_nobias_compiled.pt", "GPT of gpt.py", "a .pt is nanoGPT's", "ckpt_nobias_compiled.pt"),
    ("llama3_hf", "Llama3 of llama3.py", "model_type 'llama'", "model.safetensors"),
    ("llama31_hf", "Llama3 of llama3.py", "model_type 'llama'", "model.safetensors"),
    ("llama32_hf", "Llama3 of llama3.py", "model_type 'llama'", "model.safetensors"),
    ("llama3_meta", "Llama3 of llama3.py", "are Meta's layout", "consolidated.00.pth"),
    ("llama31_meta", "Llama3 of llama3.py", "are Meta's layout", "consolidated.00.pth"),
    ("chatglm3", "GLM4 of glm4.py", "model_type 'chatglm'", "model.safetensors"),
    ("glm4", "GLM4 of glm4.py", "model_type 'chatglm'", "model.safetensors"),
    ("glm4_0414", "GLM4 of glm4.py", "model_type 'glm4'", "in 2 files: model-00001-of-00002.safetensors, model-00002"),
    ("rwkv2", "RWKV2 of lineage/rwkv2.py", "so its tensors are named", "weights.pth"),
    ("rwkv3", "RWKV3 of lineage/rwkv3.py", "so its tensors are named", "weights.pth"),
    ("rwkv4", "RWKV4 of lineage/rwkv4.py", "so its tensors are named", "weights.pth"),
    ("rwkv5/weights.pth", "RWKV5 of lineage/rwkv5.py", "so its tensors are named", "weights.pth"),
    ("rwkv6", "RWKV6 of rwkv6.py", "so its tensors are named", "weights.pth")])
def test_inspect_says_what_loading_would_give(name, model, why, weights, golden, capsys):
    told, status = inspect(capsys, golden / name, "--tokenizer", "bytes")
    loaded = load_checkpoint(golden / name)
    lines = dict(line.split(None, 1) for line in told.splitlines())
    assert f"{model}: " in lines["model"] and why in lines["model"] and weights in lines["weights"]
    assert lines["sizes"] == f"{sum(p.numel() for p in loaded.parameters()):,} parameters: {loaded.config}"
    assert f"tensors, {str(next(loaded.parameters()).dtype).removeprefix('torch.')}" in lines["stored"]
    state = sum(t.nbytes for t in loaded.new_state(1, loaded.config.context or 1)) / 1e6
    assert f"{sum(p.nbytes for p in loaded.parameters()) / 1e6:.3f} MB for the weights, {state:,.3f} MB" in lines["memory"]
    assert (status == 0) == (loaded.config.vocab_size >= 257) and len(told.splitlines()) <= 24


def test_inspect_says_tokenizer_chat_format_stops_and_sampling(folders, capsys):
    told, status = inspect(capsys, folders["glm4"])
    tokenizer = load_tokenizer(folders["glm4"])
    assert status == 0 and f"tokenizer  ByteBPE, {tokenizer.vocab_size:,} tokens: {folders['glm4']}" in told
    assert "converses  in the format glm4: " in told and "sampling   temperature 0.8" in told
    for id in tokenizer.stop_ids:
        assert f"{id} {tokenizer.decode([id])!r}" in told.split("stops at")[1].splitlines()[0]


def test_inspect_sees_whether_a_stored_head_is_the_token_table(tmp_path, capsys, golden):
    base = golden / "llama3_meta"
    content = torch.load(base / "consolidated.00.pth", weights_only=True)
    (tmp_path / "params.json").write_text((base / "params.json").read_text())
    content["output.weight"] = content["tok_embeddings.weight"].clone()
    torch.save(content, tmp_path / "consolidated.00.pth")
    told, _ = inspect(capsys, tmp_path, "--tokenizer", "bytes")
    assert "tie_word_embeddings=True" in told and "tie_word_embeddings=False" in inspect(
        capsys, base, "--tokenizer", "bytes")[0]


def test_inspect_says_in_one_line_what_would_not_load_and_shows_the_rest(folders, tmp_path, capsys):
    for file in folders["llama3"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    told, status = inspect(capsys, tmp_path)
    assert status == 2 and 'model      would not load: ' in told and '"model.norm.weight"' in told
    assert "converses  in the format llama3" in told and "stops at" in told
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs")
    assert "is a pointer to the weights" in inspect(capsys, tmp_path)[0]
    told, status = inspect(capsys, folders["plain"], "--tokenizer", tmp_path)
    assert status == 2 and "tokenizer  would not load: the model has 257 ids" in told and "sizes" in told
    told, status = inspect(capsys, tmp_path / "model.safetensors", "--tokenizer", "nowhere")
    assert status == 2 and "nowhere" in told


def test_inspect_reads_no_weights(tmp_path, capsys):
    """Sixteen gigabytes that are not on the disk: a file with holes behind a true header."""
    resource = pytest.importorskip("resource")
    config = Llama3Config(8192, 8192, 8, 64, 8, 128, 28672, 128256)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Llama3(config).state_dict().items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    packed = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.truncate(8 + len(packed) + at)
    make_config = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 64,
                   "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 28672, "vocab_size": 128256,
                   "max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps(make_config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told, status = inspect(capsys, tmp_path, "--tokenizer", "bytes")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert status == 0 and f"weights    {at / 1e9:,.2f} GB in 1 file" in told
    assert at > 15e9 and grown < 0.5e9


# --- errors ---


def assert_fails(capsys, arguments, *words, status=2):
    """One line on stderr with all of the words, and the exit status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        chat.main([*map(str, arguments), "--device", "cpu"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == status and line.startswith("chat.py: "), line
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("flags, words", [
    (["--temperature", "-1"], "--temperature -1.0"),
    (["--temperature", "nan"], "--temperature nan"),
    (["--top-k", "0"], "--top-k 0"), (["--top-p", "1.5"], "--top-p 1.5"),
    (["--max-new-tokens", "0"], "--max-new-tokens 0"), (["--batch-size", "0"], "--batch-size 0"),
    (["--input", "x"], "--input and --output go together"), (["--chat", "gpt"], "--chat"),
    (["--temprature", "1"], "did you mean --temperature?"),
    (["--chat", "glm4"], "needs <sop>, which this vocabulary lacks"),
    (["--system", "x"], "--system is for conversations, and this model completes text"),
    (["--tokenizer", "nowhere"], "nowhere"), (["--input", "nowhere", "--output", "x"], "nowhere")])
def test_a_wrong_flag_is_one_line(flags, words, folders, capsys):
    assert_fails(capsys, [folders["plain"], *flags], words)


def test_wrong_files_are_one_line(folders, tmp_path, capsys):
    assert_fails(capsys, [tmp_path / "none"], "none does not exist")
    assert_fails(capsys, [tmp_path], "no vocabulary", "--tokenizer names another place")
    assert_fails(capsys, [tmp_path, "--tokenizer", "bytes"], str(tmp_path))
    assert_fails(capsys, [folders["plain"], "--tokenizer", folders["llama3"]],
                 "the model has 257 ids, the tokenizer 345")
    (tmp_path / "out").write_text("mine")
    (tmp_path / "in").write_text("")
    assert_fails(capsys, [folders["plain"], "--input", tmp_path / "in", "--output",
                          tmp_path / "out"], "out exists: choose another name")
    assert_fails(capsys, [folders["plain"], "--input", tmp_path / "in", "--output",
                          tmp_path / "new"], "has no prompts")
    assert (tmp_path / "out").read_text() == "mine" and not (tmp_path / "new").exists()
    chat_file = folders["rwkv6"] / "model.pth"
    assert start(chat_file).format == "world"                           # a file is enough


def test_a_device_that_is_not_here_is_one_line(folders):
    assert_one_line_error(run_here(chat.main, folders["plain"], "--device", "nonsense"), "nonsense",
                          "does not work here")
