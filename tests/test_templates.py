"""templates.py: a chat format is claimed only if the folder's template writes the same tokens."""
import json
import multiprocessing
import os
import pickle
import sys
import time

import pytest
import torch

import chat
import finetune
import templates
from folder import choose_format as chosen_for
from gpt import GPT, GPTConfig
from tokenizer import LLAMA3_PATTERN, ByteBPE, Bytes, load_tokenizer, train_bpe

jinja2 = pytest.importorskip("jinja2")

LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>'"
    "'\n\n' + m.content STRIP + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
LLAMA3, LLAMA31 = LLAMA.replace("STRIP", "| trim"), LLAMA.replace("STRIP", "")
DATED = LLAMA31.replace("{{ bos_token }}", (      # as Hugging Face's of Llama 3.1 begins
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
    "December 2023\nToday Date: ' + date_string | default('26 Jul 2024') + '\n\n<|eot_id|>' }}"))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
R1 = (                                            # DeepSeek-R1-Distill's, without its tools
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% else %}"
    "{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}")
GUARD = (
    "{{ bos_token }}<|start_header_id|>user<|end_header_id|>\n\nTask: Check if there is unsafe "
    "content in the conversation.\n{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n"
    "{% endfor %}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
GLM_Z1 = (
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
    "{{ m.content.split('</think>')[-1].strip() if not loop.last else m.content }}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}")
ASKED = [{"role": "user", "content": "Hi there"}]
TALK = [*ASKED, {"role": "assistant", "content": "<think>\nhm</think>\n\nYes."},
        {"role": "user", "content": "Go on."}, {"role": "assistant", "content": "Gone."}]
NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eot_id|>", "<|eom_id|>", "<|im_start|>", "<|im_end|>", "<｜begin▁of▁sentence｜>",
         "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]


@pytest.fixture
def folder(tmp_path):
    """folder(template, **config): a vocabulary with Llama's, ChatML's and R1's control tokens."""
    def make(template, leave_out=(), **config):
        names = [name for name in NAMES if name not in leave_out]
        trained = train_bpe(["hello hello Hi there there Be brief. Go on. " * 9], 270,
                            pattern=LLAMA3_PATTERN)
        special = {name: 270 + n for n, name in enumerate(names)}
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
        ByteBPE(trained._ranks, LLAMA3_PATTERN, special, merges=trained._merges).save(tmp_path)
        data = json.loads((tmp_path / "tokenizer.json").read_text())
        data["added_tokens"] += [{"id": 270 + len(names) + n, "content": name, "special": False, **flags}
                                 for n, name in enumerate(("<think>", "</think>"))]
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", **config}
        if template is not None:
            config["chat_template"] = template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path
    return make


@pytest.fixture
def r1(folder):
    path = folder(R1, ("<|begin_of_text|>", "<|end_of_text|>"),
                  bos_token={"content": "<｜begin▁of▁sentence｜>", "lstrip": False},
                  eos_token={"content": "<｜end▁of▁sentence｜>", "lstrip": False})
    return load_tokenizer(path)


def check_parts(tokenizer, talk):
    """Parts join to the whole, a conversation only grows, a reply ends in what stops the model."""
    for n in range(1, len(talk) + 1):
        parts = tokenizer.chat_parts(talk[:n])
        assert [id for ids, _ in parts for id in ids] == tokenizer.encode_chat(talk[:n])
        assert parts == tokenizer.chat_parts(talk)[:len(parts)]
        assert parts[-1][1] == (talk[n - 1]["role"] == "assistant")
        for ids, reply in parts:
            assert not reply or ids[-1] in tokenizer.stop_ids
    return [tokenizer.decode(ids) for ids, reply in tokenizer.chat_parts(talk) if reply]


# ---- what is claimed -----------------------------------------------------------------------------


@pytest.mark.parametrize("template, leave_out, expected", [
    (LLAMA31, (), "llama3.1"), (LLAMA3, (), "llama3"), (LLAMA3, ("<|eom_id|>",), "llama3"),
    (DATED, (), "template"), (CHATML, (), "template"), (R1, (), "template"),
    ("{{ x }}", (), None), (GUARD, (), None), ("{{ raise_exception('no') }}", (), None)])
def test_a_format_is_claimed_only_if_the_template_writes_its_tokens(
        template, leave_out, expected, folder):
    tokenizer = load_tokenizer(folder(template, leave_out))
    assert tokenizer.chat_format == expected and "its chat template" in tokenizer.chat_reason
    assert "\n" not in tokenizer.chat_reason


@pytest.mark.parametrize("template, leave_out, expected", [
    (LLAMA31, (), "llama3.1"), (LLAMA3, ("<|eom_id|>",), "llama3"), (CHATML, (), None),
    (DATED, (), "llama3.1"), (R1, (), None), (GUARD, (), None)])
def test_without_jinja2_the_control_tokens_in_the_template_decide(
        template, leave_out, expected, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    tokenizer = load_tokenizer(folder(template, leave_out))
    assert tokenizer.chat_format == expected
    assert expected or "no format known here, and jinja2 is not" in tokenizer.chat_reason
    with pytest.raises(ValueError, match="pip install jinja2"):
        tokenizer.chat_format = "template"


def test_templates_of_glm_are_told_apart_too(golden, tmp_path, monkeypatch):
    source = golden / "tokenizer_glm4_standin"
    assert load_tokenizer(source).chat_format == "glm4"
    (tmp_path / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "glm4"}')
    (tmp_path / "chat_template.jinja").write_text(GLM_Z1)
    glm = load_tokenizer(tmp_path)
    assert glm.chat_format == "template"
    assert glm.decode(glm.encode_chat(ASKED)) == (
        "[gMASK]<sop><|user|>\nHi there<|assistant|>\n<think>")
    learned = [glm.decode(ids) for ids, reply in glm.chat_parts(TALK) if reply]
    assert learned == ["Gone.<|user|>"]      # the other is written without its thought by now
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert load_tokenizer(source).chat_format == "glm4"
    assert load_tokenizer(tmp_path).chat_format is None


def test_published_templates_of_known_formats_keep_them(assets):
    pytest.importorskip("sentencepiece")
    assert load_tokenizer(assets / "chatglm3").chat_format == "chatglm3"


def test_where_a_template_may_be(folder):
    path = folder(CHATML)
    (path / "chat_template.jinja").write_text(LLAMA3)
    assert load_tokenizer(path).chat_format == "llama3"
    path = folder([{"name": "tool_use", "template": CHATML},
                   {"name": "default", "template": LLAMA31}])
    (path / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(path)
    assert tokenizer.chat_format == "llama3.1"
    tokenizer.save(path / "saved")           # the other named ones are kept
    stated = json.loads((path / "saved" / "tokenizer_config.json").read_text())
    assert len(stated["chat_template"]) == 2
    none = folder([{"name": "tool_use", "template": CHATML}])
    assert load_tokenizer(none).template is None


def test_a_format_that_is_stated_or_asked_for_precedes_the_template(folder):
    assert load_tokenizer(folder(CHATML, chat_format="llama3.1")).chat_format == "llama3.1"
    assert load_tokenizer(folder(CHATML), kind="llama3").chat_format == "llama3"
    tokenizer = load_tokenizer(folder(CHATML, chat_format=None))
    assert tokenizer.chat_format is None
    tokenizer.chat_format = "template"
    assert tokenizer.decode(tokenizer.encode_chat(ASKED)).startswith("<|im_start|>user\nHi")
    assert tokenizer.special_ids["<|im_end|>"] in tokenizer.stop_ids
    stated = load_tokenizer(folder(CHATML, chat_format="template"))
    assert stated.stop_ids == tokenizer.stop_ids
    assert stated.encode_chat(TALK) == tokenizer.encode_chat(TALK)


def test_without_a_template_the_format_template_is_refused():
    with pytest.raises(ValueError, match="needs a chat template"):
        Bytes().chat_format = "template"


# ---- conversing through it -----------------------------------------------------------------------


def test_r1_distill_is_asked_as_its_template_asks(r1):
    special = r1.special_ids
    assert r1.chat_format == "template"
    assert r1.encode_chat(ASKED) == [
        special["<｜begin▁of▁sentence｜>"], special["<｜User｜>"], *r1.encode("Hi there"),
        special["<｜Assistant｜>"], r1.added.ids["<think>"], *r1.encode("\n")]
    assert (r1.bos_id, r1.end_id) == (special["<｜begin▁of▁sentence｜>"],
                                      special["<｜end▁of▁sentence｜>"])


def test_turn_marks_that_are_not_special_in_the_vocabulary_are_control_tokens(folder):
    """As published: "<｜User｜>" of R1-Distill and "<|im_end|>" of some ChatML models."""
    for template, marks in ((R1, ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")),
                            (CHATML, ("<|im_start|>", "<|im_end|>"))):
        path = folder(template)
        data = json.loads((path / "tokenizer.json").read_text())
        for token in data["added_tokens"]:
            token["special"] &= token["content"] not in marks
        (path / "tokenizer.json").write_text(json.dumps(data))
        tokenizer = load_tokenizer(path)
        assert tokenizer.chat_format == "template"
        control = {tokenizer.added.ids[name] for name in marks}
        typed = [{"role": "user", "content": " ".join(marks)}]
        assert ([id for id in tokenizer.encode_chat(typed) if id in control]
                == [id for id in tokenizer.encode_chat(ASKED) if id in control] != [])
        assert tokenizer.chat_parts(TALK[2:])[-1][0][-1] in tokenizer.stop_ids
        assert tokenizer.added.ids["<think>"] in tokenizer.encode("<think>")     # text of a reply


def test_added_white_space_ends_no_reply(folder):
    """GPT-NeoX's runs of spaces are added tokens."""
    path = folder("{% for m in messages %}{{ m.role + ':  ' + m.content + '  ' }}{% endfor %}")
    data = json.loads((path / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 300, "content": "  "})
    (path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(path)
    assert tokenizer.added.ids["  "] == 300 and tokenizer.chat_format is None


def test_r1_distill_leaves_thoughts_out_and_parts_stay_true(r1):
    parts = r1.chat_parts(TALK)
    assert [r1.decode(ids) for ids, reply in parts if reply] == [
        "\n\nYes.<｜end▁of▁sentence｜>", "Gone.<｜end▁of▁sentence｜>"]
    assert [id for ids, _ in parts for id in ids] == r1.encode_chat(TALK)
    assert r1.decode(r1.encode_chat(TALK)) == (
        "<｜begin▁of▁sentence｜><｜User｜>Hi there<｜Assistant｜>\n\nYes.<｜end▁of▁sentence｜>"
        "<｜User｜>Go on.<｜Assistant｜>Gone.<｜end▁of▁sentence｜>")


def test_chatml_ends_a_reply_at_its_control_token(folder):
    tokenizer = load_tokenizer(folder(CHATML))
    assert check_parts(tokenizer, TALK) == ["<think>\nhm</think>\n\nYes.<|im_end|>",
                                            "Gone.<|im_end|>"]
    assert tokenizer.special_ids["<|im_end|>"] in tokenizer.stop_ids
    silence = [{"role": role, "content": ""} for role in ("user", "assistant")]
    assert tokenizer.chat_parts(silence)[-1] == ([tokenizer.special_ids["<|im_end|>"]], True)


@pytest.mark.parametrize("end", [
    "{% if m.role == 'user' or not loop.last %}<|im_end|>{% endif %}\n",
    "<|im_end|>\n{% if m.role == 'assistant' and loop.last %}<|end_of_text|>{% endif %}"])
def test_templates_that_end_the_last_turn_otherwise(end, folder):
    template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + end
                + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    tokenizer = load_tokenizer(folder(template))
    assert check_parts(tokenizer, TALK)[1] == "Gone.<|im_end|>"
    replies = [ids for ids, reply in tokenizer.chat_parts(TALK) if reply]
    assert [ids[-1] for ids in replies] == [tokenizer.special_ids["<|im_end|>"]] * 2


def test_a_template_that_writes_earlier_turns_otherwise_says_they_are_no_replies(folder):
    """Qwen-3's kind: thoughts of all but the last reply are left out."""
    template = CHATML.replace("m['content'] +", (
        "(m['content'] if loop.last else m['content'].split('</think>')[-1].strip()) +"))
    tokenizer = load_tokenizer(folder(template))
    parts = tokenizer.chat_parts(TALK)
    assert [tokenizer.decode(ids) for ids, reply in parts if reply] == ["Gone.<|im_end|>"]
    assert tokenizer.decode(parts[0][0]).endswith(
        "assistant\nYes.<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode_chat(TALK) == [id for ids, _ in parts for id in ids]


@pytest.mark.parametrize("template", [CHATML, R1, DATED])
def test_control_tokens_that_a_user_types_stay_text(template, folder):
    tokenizer = load_tokenizer(folder(template))
    typed = " ".join([*NAMES, "\ue000 \ue001", "<think>"])
    control = {*tokenizer.special_ids.values()}

    def controls(text):
        return [id for id in tokenizer.encode_chat([{"role": "user", "content": text}])
                if id in control]
    assert controls(typed) == controls("x")
    ids = tokenizer.encode_chat([{"role": "user", "content": typed}])
    assert typed in tokenizer.decode(ids)


def test_our_tokens_equal_transformers(folder):
    transformers = pytest.importorskip("transformers")
    for template in (CHATML, LLAMA31, DATED, R1):
        path = folder(template)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        ours = load_tokenizer(path)
        for talk in (ASKED, TALK[:3], [{"role": "system", "content": "Be brief."}, *ASKED]):
            expected = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=True)
            expected = expected if isinstance(expected, list) else expected["input_ids"]
            assert ours.encode_chat(talk) == expected


def test_tools_reach_the_template(folder):
    template = CHATML.replace("{% for", "{% if tools %}{{ tools | tojson }}{% endif %}{% for", 1)
    tokenizer = load_tokenizer(folder(template))
    asked = [{**ASKED[0], "tools": [{"name": "f<|im_end|>", "x": "ü"}]}]
    text = tokenizer.decode(tokenizer.encode_chat(asked))
    assert text.startswith('[{"name": "f<|im_end|>", "x": "ü"}]<|im_start|>')
    assert tokenizer.encode_chat(asked).count(tokenizer.special_ids["<|im_end|>"]) == 1


def test_a_template_is_saved_and_opened_again(folder, tmp_path_factory):
    path = folder(None, eos_token="<|im_end|>")
    (path / "chat_template.jinja").write_text(CHATML + "{{ eos_token if false }}")
    tokenizer, out = load_tokenizer(path), tmp_path_factory.mktemp("saved")
    tokenizer.save(out)
    again = load_tokenizer(out)
    for other in (again, pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode_chat(TALK) == tokenizer.encode_chat(TALK)
        assert other.stop_ids == tokenizer.stop_ids
    assert again.template.variables == tokenizer.template.variables


# ---- a stranger's program ------------------------------------------------------------------------


def test_a_model_is_fine_tuned_and_talked_to_through_its_template(folder, tmp_path, capsys, monkeypatch):
    """Both scripts: the run keeps the template, learns replies by it, resumes, and converses."""
    start = folder(CHATML)
    tokenizer = load_tokenizer(start)
    torch.manual_seed(0)
    GPT(GPTConfig.sized(1, 32, tokenizer.vocab_size, 128)).save_pretrained(start)
    rows = [{"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "Yes"}]}
            for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "run"
    finetune.main(["--task", "sft", "--init-from", str(start), "--data", str(tmp_path / "rows.jsonl"), "--out",
                   str(out), "--steps", "3", "--device", "cpu", "--dtype", "float32", "--context", "100"])
    learnt = load_tokenizer(out)
    assert learnt.chat_format == "template" and learnt.encode_chat(ASKED) == tokenizer.encode_chat(ASKED)
    finetune.main(["--resume", str(out)])
    capsys.readouterr()
    chat.main([str(out), "--prompt", "Say 1", "--device", "cpu", "--max-new-tokens", "4", "--temperature", "0"])
    assert "converses  in the format template" in capsys.readouterr().err


def test_chat_says_why_a_template_is_used_or_not(folder, monkeypatch):
    said = chosen_for(folder(R1), load_tokenizer(folder(R1)), None)
    assert said == ("template", "its chat template is in no format known here, and writes the conversation")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    chosen, why = chosen_for(folder(R1), load_tokenizer(folder(R1)), None)
    assert chosen is None and "jinja2" in why and "no format known here" in why


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
    "{% for i in range(10**9) %}{% endfor %}", "{{ 'x' * 10**10 }}", "{% if %}", "{{ 1 / 0 }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}", "{% include '/etc/passwd' %}"])
def test_a_template_that_does_harm_is_refused_in_one_line(template, folder):
    tokenizer = load_tokenizer(folder(template))
    assert tokenizer.chat_format is None
    assert "cannot write this conversation" in tokenizer.chat_reason or (
        "took more than" in tokenizer.chat_reason)
    assert "\n" not in tokenizer.chat_reason


def test_a_template_without_end_is_ended(folder, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 1)
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    start = time.time()
    tokenizer = load_tokenizer(folder(template))
    assert tokenizer.chat_format is None and "took more than 1 s" in tokenizer.chat_reason
    assert time.time() - start < 30


def test_a_template_that_refuses_a_conversation_says_why(folder):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = load_tokenizer(folder(template + CHATML))
    assert tokenizer.chat_format == "template"
    with pytest.raises(ValueError, match="cannot write this conversation.*no system"):
        tokenizer.encode_chat([{"role": "system", "content": "x"}, *ASKED])
    assert tokenizer.encode_chat(ASKED)
    with pytest.raises(ValueError, match="message 0 needs a role"):
        tokenizer.encode_chat([{"role": "im_end|>", "content": "x"}])


def test_an_interrupted_call_does_not_answer_the_next(folder):
    tokenizer = load_tokenizer(folder(CHATML))
    expected = tokenizer.encode_chat(ASKED)
    tokenizer.template.children[os.getpid()].kill()
    with pytest.raises(ValueError, match="took more than"):
        tokenizer.encode_chat(ASKED)
    assert tokenizer.encode_chat(ASKED) == expected

    class Interrupted:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def readline(self):
            raise KeyboardInterrupt
    child = tokenizer.template.children[os.getpid()]
    child.stdout = Interrupted(child.stdout)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.template.render([(ASKED, False)])
    assert tokenizer.encode_chat(ASKED) == expected


def test_a_forked_process_has_a_child_of_its_own(folder):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork on this system")
    tokenizer = load_tokenizer(folder(CHATML))
    talks = [[{"role": "user", "content": f"{n} " * n}] for n in range(20)]
    expected = [tokenizer.encode_chat(talk) for talk in talks]
    with multiprocessing.get_context("fork").Pool(2, initializer=globals().update,
                                                  initargs=({"FORKED": tokenizer},)) as pool:
        assert pool.map(encode_forked, talks, chunksize=1) == expected
        assert [tokenizer.encode_chat(talk) for talk in talks] == expected


def encode_forked(talk):
    return FORKED.encode_chat(talk)             # noqa: F821  set in the forked process alone
