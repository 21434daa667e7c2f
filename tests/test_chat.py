"""chat.py: the memory of a conversation, commands, files of prompts, what a folder says."""
import builtins
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, assert_one_line_error, continuation, run
from safetensors.torch import load_file, save_file

import chat
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
    assert conversation.messages == messages and not list(tmp_path.glob("*.part"))


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
    chosen, reason = chat.choose_format(tmp_path, load_tokenizer(tmp_path), None)
    assert chosen == expected and why in reason
    assert chat.choose_format(tmp_path, load_tokenizer(tmp_path), "none")[0] is None


def test_a_template_of_no_known_format_does_not_make_a_model_converse(tmp_path):
    Bytes().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    chosen, why = chat.choose_format(tmp_path, load_tokenizer(tmp_path), None)
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
    result = subprocess.run(
        [sys.executable, "chat.py", folders["llama3"], "--temperature", "0", "--device", "cpu",
         "--max-new-tokens", "12"], check=False, input="Hello\nAnd you?\n", capture_output=True,
        text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
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
    (json.dumps({"prompt": "x" * 2000}), "tokens, the context is 400"), ("\xff", "utf-8")])
def test_a_bad_line_is_named_before_anything_is_computed(
        line, words, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Llama3, "generate", None)
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"prompt": "fine"}\n\n' + line.encode("latin-1") + b"\n")
    assert_fails(capsys, [folders["llama3"], "--input", source, "--output", tmp_path / "out"],
                 f"{source}, line 3: ", words)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_file_that_fails_half_way_leaves_nothing(folders, tmp_path, capsys, monkeypatch):
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


def test_a_file_that_appears_meanwhile_is_not_overwritten(folders, tmp_path, capsys, monkeypatch):
    source, target = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out"
    generate = GPT.generate

    def slowly(*arguments, **settings):
        target.write_text("mine")
        return generate(*arguments, **settings)
    monkeypatch.setattr(GPT, "generate", slowly)
    assert_fails(capsys, [folders["plain"], "--input", source, "--output", target,
                          "--max-new-tokens", "3"], "exists by now")
    assert target.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


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
    assert_one_line_error(run("chat.py", folders["plain"], "--device", "nonsense"), "nonsense",
                          "does not work here")
