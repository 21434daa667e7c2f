"""rows.py: published shapes of rows, tables, what is counted, cut and refused; rewards."""
import json

import pytest
from test_finetune import ALONE, QUICK, base, refused, rows_file, start, tiny  # noqa: F401  base is a fixture

import checkpoints
import finetune
import rows
import tokenizer as text

ASKED = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def tokenizer():
    made = text.Bytes()
    made.chat_format = "alpaca"
    return made


def task_of(kind, tokenizer, context=250, **more):
    """A task over a small model, to prepare rows with."""
    kept = {"labels": ["ham", "spam"]} if kind == "classify" else {}
    settings = finetune.Settings(task=kind, context=context, micro_batch=64, **more)
    return finetune.RECIPES[kind][0](settings, ALONE, tokenizer, tiny("gpt"), kept)


def learnt(tokenizer, messages, **more):
    """The text of the targets of a conversation."""
    return tokenizer.decode([id for id in finetune.sequence(tokenizer, messages, 999, **more)[1] if id != -100])


def written(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- shapes ---

@pytest.mark.parametrize("row", [
    {"messages": ASKED}, {"conversations": ASKED}, {"conversation": ASKED}, {"Messages": ASKED},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    {"conversations": [{"from": "User", "value": "Why?"}, {"from": "Assistant", "value": "So."}]},
    {"conversations": ["Why?", "So."]}, {"messages": json.dumps(ASKED)}, ASKED,
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}, ASKED[1]]},
    {"question": "Why?", "answer": "So."}, {"Question": "Why?", "Answer": "So."},
    {"query": "Why?", "response": "So."}, {"instruction": "Why?", "response": "So."},
    {"instruction": "Why?", "input": "", "output": "So."}, {"instruction": "", "input": "Why?", "output": "So."},
    {"input": "Why?", "output": "So."}, {"input": ASKED[:1], "output": "So."}, {"prompt": "Why?", "response": "So."},
    {"prompt": ASKED[:1], "completion": ASKED[1:]}, {"prompt": ASKED[0], "completion": ASKED[1]},
    {"prompt": "Why?", "messages": ASKED, "prompt_id": "x"}, {"question": "Why?", "answer": "So.", "system": None}])
def test_published_shapes_give_the_same_conversation(row, tmp_path):
    for name, content in (("a.jsonl", json.dumps(row) + "\n" + json.dumps(row)), ("lines.json", f"{json.dumps(row)}\n" * 2),
                          ("data.json", json.dumps({"data": [row, row]}, indent=1)), ("list.json", json.dumps([row, row], indent=1))):
        found = rows.read_rows([written(tmp_path / name, content)])
        assert [rows.conversation(row) for row in found] == [ASKED, ASKED], name


@pytest.mark.parametrize("row", [
    {"prompt": "Why?", "chosen": "So.", "rejected": "No."}, {"chosen": ASKED, "rejected": [ASKED[0], {"role": "assistant", "content": "No."}]},
    {"question": "Why?", "chosen": "So.", "rejected": "No."},
    {"conversations": ASKED[:1], "chosen": {"from": "gpt", "value": "So."}, "rejected": {"from": "gpt", "value": "No."}},
    {"prompt": "Why?", "messages": ASKED, "chosen": ASKED, "rejected": [ASKED[0], {"role": "assistant", "content": "No."}]}])
def test_published_shapes_of_preferences_give_the_same_pair(row, tokenizer):
    [example] = task_of("dpo", tokenizer).prepare([row])
    assert [messages[-1]["content"] for messages in example["messages"]] == ["So.", "No."]
    assert example["messages"][0][:-1] == example["messages"][1][:-1] == ASKED[:1]


@pytest.mark.parametrize("row, words", [
    ({"text": "<|im_start|>user\nWhy?"}, ('"text" is \'<|im_start|>user', "already rendered", "train.py --init-from")),
    ({"prompt": "<|im_start|>user\nWhy?<|im_end|>", "completion": "So."}, ("already rendered", "'<|im_start|>'", "--chat none")),
    ({"prompt": "\n\nHuman: Why?\n\nAssistant:", "completion": "So."}, ("already rendered", "Human:")),
    ({"prompt": "[INST] Why? [/INST]", "completion": "So."}, ("already rendered",)),
    (ASKED[0], ("one message", '"messages"')),
    ({"prompt": "Why?", "completion": "So.", "label": False}, ('"label" is false',)),
    ({"question": "2 + 2?", "answer": 4}, ('"answer" is 4',)),
    ({"a": 1, "b": 2}, ('it has a, b: it needs "prompt" and "completion"', "--columns prompt=a completion=b")),
    ({"question": "Why?", "why": "So."}, ('it needs "answer"', "--columns answer=why")),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, ("message 0", "image_url")),
    ({"messages": [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [{"id": 7}]}]}, ('"tool_calls" of message 1', "'id': 7")),
    ({"messages": [{"role": "narrator", "content": "x"}]}, ("message 0 has the role 'narrator': known are system, user, assistant",)),
    ({"messages": [{"role": "tool", "content": "x"}, ASKED[1]]}, ("message 0 needs a role (system, user, assistant)", "tool")),
    ({"messages": [ASKED[0], {**ASKED[1], "weight": 0.5}]}, ('"weight" is 0.5',)),
    ({"messages": [{**ASKED[0], "train": True}, ASKED[1]]}, ("no reply has weight 1", "--all-tokens")),
    ({"messages": str(ASKED)}, ('"messages" is "[{', "a list of messages is needed")),
    ({"train": [{"prompt": "a", "completion": "b"}]}, ('it has train: it needs "prompt"',)),
    ({"messages": ASKED, "context": "The facts."}, ('"context" is \'The facts.\'',)),
    ({"messages": [SYSTEM, *ASKED], "system": "Be long."}, ('"system" is \'Be long.\'', "Be brief.")),
    ({"messages": ASKED, "tools": [{"name": "search"}]}, ('"tools" is', "search", "alpaca has no place")),
    ({"prompt": "Why?", "completion": "So.", "weight": 2}, ('"weight" is 2',))])
def test_what_cannot_be_learnt_is_refused_with_line_key_and_value(row, words, tmp_path, tokenizer):
    good = {"prompt": "a", "completion": "b"}
    found = rows.read_rows([rows_file(tmp_path / "broken.jsonl", [good] * 16 + [row])])
    with pytest.raises(ValueError) as refusal:
        task_of("sft", tokenizer).prepare(found)
    for word in ("broken.jsonl, line 17: ", *words):
        assert word in str(refusal.value), (word, str(refusal.value))
    assert "\n" not in str(refusal.value)


def test_system_history_and_context_stand_in_the_prompt(tokenizer):
    for key in ("system", "system_prompt"):
        assert rows.conversation({key: "Be brief.", "question": "Why?", "answer": "So."}) == [SYSTEM, *ASKED]
    assert rows.conversation({"system": "Be brief.", "messages": [SYSTEM, *ASKED]}) == [SYSTEM, *ASKED]
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    for history in ([["Hi", "Yes?"]], before):
        assert rows.conversation({"instruction": "Why?", "output": "So.", "history": history}) == before + ASKED
    with_context = rows.conversation({"instruction": "Sum up.", "context": "Long text.", "response": "Short."})
    prompt = tokenizer.decode([id for part, reply in finetune.chat_parts(tokenizer, with_context) if not reply for id in part])
    assert "### Instruction:\nSum up.\n\n### Input:\nLong text.\n\n### Response:" in prompt


@pytest.mark.parametrize("tools", [[{"name": "search"}], '[{"name": "search"}]'])
def test_tools_go_where_the_chat_format_has_them(tools):
    found = rows.conversation({"messages": ASKED, "tools": tools})
    assert found == [{"role": "system", "content": "", "tools": [{"name": "search"}]}, *ASKED]
    assert rows.conversation({"messages": ASKED, "tools": "[]"}) == ASKED


@pytest.mark.parametrize("unlearnt", [{"weight": 0}, {"train": False}, {"loss_mask": 0}, {"loss": False}, {"weight": "0"}])
def test_a_message_of_weight_0_is_read_and_not_learnt(unlearnt, tokenizer):
    wrong = [ASKED[0], {"role": "assistant", "content": "Wrong.", **unlearnt}]
    messages = rows.conversation({"messages": wrong + ASKED})
    assert learnt(tokenizer, messages) == " So.<|endoftext|>"
    assert "Wrong." not in learnt(tokenizer, messages, everything=True)
    task = task_of("sft", tokenizer)
    assert task.prepare([{"messages": wrong}]) == []
    assert "1 of 1 rows are left out: no reply to learn (none, empty, or of weight 0)" in task.notices.lines()
    assert task.prepare([{"prompt": "Why?", "completion": "So.", "weight": 0}]) == []
    assert "1 of 2 rows are left out: their weight is 0" in task.notices.lines()


def test_unknown_keys_are_named_once_in_a_line(base, tmp_path, capsys):                     # noqa: F811
    data = [{"id": n, "prompt": f"{n}", "completion": "a", "source": "web", "note": ""} for n in range(9)]
    data[4]["messages"] = [{**ASKED[0], "time": 7}, ASKED[1]]
    start("sft", base("gpt"), tmp_path / "run", "--data", rows_file(tmp_path / "a.jsonl", data), "--steps", 1)
    shown = capsys.readouterr().out
    assert shown.count("ignored: ") == 1
    assert "ignored: id, source, time of messages, prompt, completion\n" in shown


# --- tables ---

def test_columns_are_known_in_any_case_and_by_columns(tmp_path):
    for name, content, columns in (
            ("a.csv", "Label,Text\nham,Hello\nspam,Win\n", ()), ("b.csv", '"LABEL","TEXT"\n"ham","Hello"\n"spam","Win"\n', ()),
            ("c.csv", "v1,v2,,\nham,Hello,,\nspam,Win,,\n", ["label=v1", "text=v2"]), ("d.tsv", "Text\tLabel\nHello\tham\nWin\tspam\n", ()),
            ("e.csv", "text;label\nHello;ham\nWin;spam\n", ()), ("e2.csv", "text|label\nHello|ham\nWin|spam\n", ()), ("sms", "ham\tHello\nspam\tWin\n", ()),
            ("f", "label,text\nham,Hello\nspam,Win\n", ()), ("g.csv", "label,text,title\nham,x,Hello\nspam,y,Win\n", ["text=title"]),
            ("h.jsonl", '{"y": "ham", "x": "Hello"}\n{"y": "spam", "x": "Win"}\n', ["label=y", "text=x"])):
        found = rows.read_rows([written(tmp_path / name, content)], columns=columns)
        assert [(row["label"], row["text"]) for row in found] == [("ham", "Hello"), ("spam", "Win")], name
        assert found[1]["where"].startswith(f"{tmp_path / name}, line "), name


@pytest.mark.parametrize("content, words", [
    ("label,text\nham,a\nham,Hello, friend\n", ("line 3: 3 fields instead of 2 (label, text)", "quotes")),
    ("label,text\nham,a\nham\n", ("line 3: 1 fields instead of 2",)),
    ('label,text\nham,a\nham,"Hello" friend\nham,b\n', ("line 3: ", "quotes")),
    ('label,text\nham,a\nham,"Hello\nspam,b\n', ("line 3: unexpected end of data", "quotes")),
    ("v1,v2\nham,a\n", ('line 2: it has v1, v2: it needs "label" and "text"', "--columns label=v1 text=v2")),
    ("text,text\nham,a\n", ("line 1: two columns have the same name",))])
def test_a_table_is_refused_with_line_and_widths(content, words, base, tmp_path, capsys):    # noqa: F811
    line = refused(capsys, "--task", "classify", "--init-from", base("gpt"), *QUICK, "--data", written(tmp_path / "a.csv", content))
    for word in (f"{tmp_path / 'a.csv'}, ", *words):
        assert word in line, line


def test_a_tab_separated_row_of_wrong_width_is_refused_with_its_line(tmp_path):
    for content in ("label\ttext\tid\nham\ta\t1\nham\tb\n", 'label\ttext\tid\nham\t"a\t1\nham\tb\n'):
        with pytest.raises(ValueError, match="line 3: 2 fields instead of 3"):
            rows.read_rows([written(tmp_path / "a.tsv", content)])
    with pytest.raises(ValueError, match="line 2: 1 fields instead of 2"):
        rows.read_rows([written(tmp_path / "sms", "ham\ta\nspam\n")])


def test_latin_1_is_named_and_read(base, tmp_path, capsys):                                  # noqa: F811
    table = written(tmp_path / "spam.csv", ("v1,v2,,\n" + "ham,Hello there my dear friend,,\nspam,Win £5 now and come back,,\n" * 20).encode("latin-1"))
    arguments = ["--task", "classify", "--init-from", base("gpt"), *QUICK, "--data", table, "--columns", "label=v1", "text=v2"]
    assert "spam.csv: not UTF-8: name its encoding" in refused(capsys, *arguments)
    found = rows.read_rows([table], "latin-1", ["label=v1", "text=v2"])
    assert found[1]["text"] == "Win £5 now and come back" and len(found) == 40
    few = written(tmp_path / "few.csv", ("label,text\n" + "ham,Hello there my dear friend\n" * 40 + "spam,Win £5\n").encode("latin-1"))
    notices = rows.Notices()
    notices["rows"] = len(rows.read_rows([few], notices=notices))
    assert notices.lines() == ["1 of 41 rows have bytes that are not UTF-8, and became U+FFFD: --encoding names another"]


@pytest.mark.parametrize("columns, words", [
    (["label"], "--columns label: OURS=THEIRS"), (["labl=v1"], "--columns labl=v1: OURS=THEIRS"), (["text=v9"], "a.csv, line 2 has v1, v2: no v9")])
def test_columns_that_are_not_there_are_refused(columns, words, tmp_path):
    with pytest.raises(ValueError) as refusal:
        rows.read_rows([written(tmp_path / "a.csv", "v1,v2\nham,a\n")], columns=columns)
    assert words in str(refusal.value)


def test_files_of_a_folder_that_have_no_rows_are_named(tmp_path):
    rows_file(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    written(tmp_path / "README.md", "How it was made.\n")
    written(tmp_path / "a.bin", b"\0\1")
    notices = rows.Notices()
    assert len(rows.read_rows([tmp_path], notices=notices)) == 1
    assert "README.md" in " ".join(notices.lines()) and "1 of 3 files left out: binary: a.bin" in notices.lines()


# --- what is cut and left out ---

def test_cut_replies_texts_and_prompts_are_counted(tokenizer):
    task = task_of("sft", tokenizer, context=230)
    data = [{"prompt": "a", "completion": "b" * (99 if n < 3 else 9)} for n in range(12)]
    assert len(task.prepare(data + [{"prompt": "a" * 99, "completion": "b"}])) == 12
    assert "3 of 12 replies are cut at --context 230" in task.notices.lines()
    assert "1 of 13 rows are left out: no reply is left within --context 230" in task.notices.lines()
    task = task_of("sft", tokenizer)
    task.prepare([{"messages": [*ASKED, ASKED[0]]}, {"prompt": "a", "completion": " "}, {"messages": ASKED}])
    assert {"1 of 3 rows end in a question, which is left out",
            "1 of 3 rows are left out: no reply to learn (none, empty, or of weight 0)"} < {*task.notices.lines()}
    task = task_of("classify", tokenizer, context=20)
    task.prepare([{"text": "a" * n, "label": "ham"} for n in range(30)])
    assert "9 of 30 texts are cut at --context 20" in task.notices.lines()
    task = task_of("grpo", tokenizer, context=190)
    assert len(task.prepare([{"prompt": "a" * n} for n in (1, 2, 99)])) == 2
    assert "1 of 3 rows are left out: the prompt has no room for a completion within --context 190" in task.notices.lines()


def test_pairs_that_are_equal_or_become_so_are_left_out_and_counted(tokenizer):
    task = task_of("dpo", tokenizer, context=200)
    data = [{"prompt": "a", "chosen": "b" * n, "rejected": more} for n, more in ((2, "bb"), (3, "c"), (90, "b" * 91), (1, ""))]
    assert len(task.prepare(data)) == 1
    assert [line for line in task.notices.lines() if "left out" in line] == [
        "1 of 4 rows are left out: chosen and rejected are equal",
        "1 of 4 rows are left out: chosen and rejected are equal when cut at --context 200",
        "1 of 4 rows are left out: chosen or rejected is empty"]


def test_when_nothing_is_left_the_message_says_why(base, tmp_path, capsys):                  # noqa: F811
    data = rows_file(tmp_path / "a.jsonl", [{"prompt": "a" * 99 + str(n), "completion": "b"} for n in range(20)])
    line = refused(capsys, "--task", "sft", "--init-from", base("gpt"), *QUICK, "--data", data, "--context", 64)
    assert "no examples to learn from: 20 of 20 rows are left out: no reply is left within --context 64" in line
    data = rows_file(tmp_path / "b.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 20)
    line = refused(capsys, "--task", "dpo", "--init-from", base("gpt"), *QUICK, "--data", data)
    assert "20 of 20 rows are left out: chosen and rejected are equal" in line and "more data" not in line


def test_copies_stand_on_one_side_of_the_split_and_are_counted(base, tmp_path, capsys):      # noqa: F811
    examples = [{"rows": [str(n % 7)], "label": 0} for n in range(40)] + [{"rows": [f"x{n}"], "label": 0} for n in range(40)]
    for seed in range(5):
        learn, held = finetune.split(list(examples), finetune.Settings(split_seed=seed, hold_out=0.2))
        assert len(learn) + len(held) == 80 and 10 <= len(held) <= 16
        assert not {e["rows"][0] for e in learn} & {e["rows"][0] for e in held}
    data = rows_file(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 40)
    line = refused(capsys, "--task", "sft", "--init-from", base("gpt"), *QUICK, "--data", data)
    assert "no examples to measure on: 39 of 40 rows are copies of others" in line


def test_samples_show_the_whole_prompt(tokenizer):
    task = task_of("sft", tokenizer, max_new_tokens=1)
    messages = {"system": "Be brief.", "instruction": "Sum up.", "input": "Long text.", "output": "Short."}
    shown = task.sample(task.prepare([messages]))
    assert "prompt: system: Be brief.\nuser: Sum up.\n\nLong text.\n reply: " in shown
    tokenizer.chat_format = "world"          # is short
    task = task_of("dpo", tokenizer)
    pair = {"question": "Q" * 80, "input": "Long text.", "chosen": "So.", "rejected": "No."}
    assert f"  {'Q' * 80}\n\nLong text.\n    chosen   'So.'\n    rejected 'No.'" in task.sample(task.prepare([pair]))


# --- labels ---

def test_labels_that_differ_in_case_space_or_type_are_one_and_named(base, tmp_path, capsys):  # noqa: F811
    data = [{"text": f"{n}", "label": label} for n, label in enumerate([0, 0.0, "0", " 0 ", "Ham", "ham", "ham", "not  ham", "Not ham", "rare"])]
    notices = rows.Notices()
    labels = rows.all_labels(data, notices)
    assert labels == ["0", "ham", "not  ham", "rare"]
    assert notices.said == ["taken as one label: '0' (3), '0.0' (1)", "taken as one label: 'ham' (2), 'Ham' (1)",
                            "taken as one label: 'not  ham' (1), 'Not ham' (1)",
                            "labels of one row only, which is learnt and not validated: rare"]
    task = task_of("classify", text.Bytes())
    assert [e["label"] for e in task.prepare([{"text": "a", "label": label} for label in ("HAM", "spam ", "Spam")])] == [0, 1, 1]
    assert rows.label_key("007") != rows.label_key("7") and rows.label_key("1.5") != rows.label_key("1.50")
    start("classify", base("gpt"), tmp_path / "run", "--data", rows_file(tmp_path / "a.jsonl", data), "--steps", 1)
    assert "data       taken as one label: 'ham' (2), 'Ham' (1)" in capsys.readouterr().out


@pytest.mark.parametrize("label", [None, "", " ", float("nan"), ["a"]])
def test_a_label_that_is_none_is_refused(label):
    with pytest.raises(ValueError, match='b, line 2: .*"label"'):
        rows.all_labels([{"text": "a", "label": "x"}, {"text": "b", "label": label, "where": "b, line 2"}], rows.Notices())


# --- rewards ---

def graded(tmp_path, source, row=None, completions=("a", "bb")):
    """The rewards that a file gives to completions of the prompt "p"."""
    score, _ = rows.load_reward(str(written(tmp_path / "r.py", source)))
    example = {"prompt": "p", "messages": [{"role": "user", "content": "p"}], "row": {"prompt": "p", "answer": "bb", "where": "x", **(row or {})}}
    return score(example, list(completions), [True] * len(completions))


def test_a_reward_gets_the_fields_of_the_row_that_it_has_parameters_for(tmp_path):
    assert graded(tmp_path, "def reward(prompt, completion): return len(prompt + completion)") == [2, 3]
    assert graded(tmp_path, "def reward(prompt, completion, answer): return completion == answer") == [0, 1]
    assert graded(tmp_path, "def reward(p, c, other=3, *, answer): return other + (c == answer)") == [3, 4]
    assert graded(tmp_path, "def reward(prompt, completion, **row): return len(row)") == [1, 1]


def test_a_reward_in_the_style_of_trl_works(tmp_path):
    assert graded(tmp_path, "def reward(completions, **kwargs): return [len(c) for c in completions]") == [1, 2]
    assert graded(tmp_path, "def reward(completions, answer, **kwargs): return [c == a for c, a in zip(completions, answer)]") == [0, 1]
    assert graded(tmp_path, "def reward(prompts, completions): return [len(p + c) for p, c in zip(prompts, completions)]") == [2, 3]
    chat = {"prompt": [{"role": "user", "content": "p"}]}
    assert graded(tmp_path, "def reward(prompts, completions, **kwargs):\n"
                  "    return [len(p[-1]['content'] + c[0]['content']) for p, c in zip(prompts, completions)]", chat) == [2, 3]


@pytest.mark.parametrize("source, words", [
    ("def reward(prompt, completion):\n    x = 1\n    return x / 0", "r.py, line 3: ZeroDivisionError"),
    ("import json\ndef reward(p, c):\n    return json.loads('{')", "r.py, line 3: JSONDecodeError"),
    ("x = 1\ny = (", "r.py, line 2: SyntaxError"), ("import nothing_of_this_name", "r.py, line 1: ModuleNotFoundError"),
    ("def reward(p, c): exit()", "r.py, line 1: SystemExit"),
    ("def reward(prompt, completion, solution): return 1", "'solution'; there are prompt, completion, answer"),
    ("def reward(completion): return 1", "too many positional arguments"),
    ("def reward(completions, **kwargs): return 1.0", "one for each of 2 completions"),
    ("def reward(completions, **kwargs): return [1.0]", "one for each of 2 completions"),
    ("def reward(p, c): return None", "rewards are finite numbers")])
def test_a_reward_that_fails_is_reported_with_file_and_line(source, words, tmp_path):
    with pytest.raises(rows.RewardError) as failure:
        graded(tmp_path, source)
    assert words in str(failure.value) and f"--reward {tmp_path / 'r.py'}" in str(failure.value)


def test_what_was_learnt_is_saved_before_a_reward_ends_the_run(base, tmp_path, capsys):      # noqa: F811
    count = tmp_path / "count"
    reward = written(tmp_path / "r.py", f"from pathlib import Path\ndef reward(prompt, completion, answer):\n    count = Path({str(count)!r})\n"
                     "    n = int(count.read_text()) + 1 if count.exists() else 1\n    count.write_text(str(n))\n"
                     "    if n > 30:\n        raise KeyError('no more')\n    return len(completion) / 8 + (answer == 'x')\n")
    data = rows_file(tmp_path / "a.jsonl", [{"prompt": str(n), "answer": "x", "id": n} for n in range(8)])
    with pytest.raises(SystemExit) as stopped:
        start("grpo", base("gpt"), tmp_path / "run", "--data", data, "--reward", reward, "--steps", 9, "--batch", 2, "--group", 2,
              "--updates", 1, "--max-new-tokens", 4, "--eval-examples", 2)
    shown = capsys.readouterr()
    line = shown.err.splitlines()[-1]
    assert stopped.value.code == 2 and f"{reward}, line 7: KeyError: 'no more'; the state after step " in line and "--resume" in line
    assert "ignored: id\n" in shown.out
    _, saved = checkpoints.load_resume(tmp_path / "run")
    assert 2 <= saved["step"] < 9 and f"after step {saved['step']} is saved" in line
    count.write_text("-999")
    finetune.main(["--resume", str(tmp_path / "run")])
    assert f"step {saved['step'] + 1}/9" in capsys.readouterr().out
