"""A run directory elsewhere: what transformers, peft and the Hub need of it is there and is right."""
import json
import os
import shutil
import stat

import pytest
import torch
from helpers import assert_close
from test_chat import LLAMA_SPECIALS, write_world
from test_finetune import QUICK, rows_file, start, tiny, toy_data
from test_tokenizer import train_sentencepiece

import checkpoints
import finetune
import published
import tokenizer as text
import train
from card import OURS
from chat import Conversation
from templates import Template
from tokenizer import GPT2_PATTERN, LLAMA3_PATTERN, ByteBPE, load_tokenizer, train_bpe

WORDS = ("Below is an instruction that describes a task. ### Response:Yes :No :Hi :def \n\nUser: hi\n\n"
         "Assistant: Hello there (x) äöü 你好. Be brief.\n\nBelow is\n\n### Input:\n") * 3


# --- conversations ---

SAID = ["Hi", "What is 1+1?", "Yes.", "no (really)", "42", "\"Quoted,\" she said", "two\nlines", "def f(x):\n    return x",
        "äöü 你好 👋", ": colon first", "(in brackets)", "'s", "ends in a space ", "a\n\nblank line", "- a list\n- of two", "x"]
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells <the> weather's état & more",
                                         "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}


def talk(*said, system=None, **first):
    """User and assistant by turns; `first`: further keys of the first message of the user."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": words} for n, words in enumerate(said)]
    turns[0] |= first
    return [*([{"role": "system", "content": system}] if system is not None else []), *turns]


def conversations(form):
    """Twenty: with and without system, of one turn and of several, ending in either role, and what the format has besides."""
    made = [talk(*SAID[n:n + 1 + n % 5], system=SAID[-n] if n % 3 else None) for n in range(14)]
    system, user, call = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}, \
        {"role": "assistant", "content": "{\"city\": \"Rome\"}"}
    if form == "alpaca":
        made += [talk("Add.", "3", "And?", input="1 2"), talk("Sum up.", input="Long\ntext", system="Be brief.")]
    elif form == "llama3.1":
        made += [[system, user, {**call, "metadata": "python"}, {"role": "tool", "content": "sunny"}],
                 [user, call, {"role": "ipython", "content": "sunny"}, {"role": "assistant", "content": "Sunny."}],
                 [user, {**call, "stop_reason": "end_of_message"}]]
    elif form.startswith(("chatglm", "glm4")):
        tooled = {**system, "tools": [TOOL, {**TOOL, "function": {"name": "time", "description": "now"}}]}
        more = [tooled, user, {**call, "metadata": "weather"}, {"role": "observation", "content": "sunny"}]
        made += [more, [*more, {"role": "assistant", "content": "Sunny."}], [{**tooled, "content": ""}, user]]
        if form == "glm4":
            made += [[{**system, "tools": [{"type": "python"}, {"type": "cogview"}]}, user]]
        if form == "glm4-0414":
            made += [talk("Why?", "<think>hm</think>\n\nSo.", "And?", "<think>well</think> Then.")]
    return (made + [talk(*SAID[n:n + 3], system="Say: yes\n") for n in range(9)])[:20]


def speaker(form, golden, folder):
    """A small vocabulary that has the control tokens of a chat format."""
    if form == "chatglm3":
        train_sentencepiece(folder)
        return load_tokenizer(folder, kind="chatglm3")
    if form == "world":
        write_world(folder)
        return load_tokenizer(folder)
    if form.startswith("llama3"):
        ranks = train_bpe([WORDS], 400, pattern=LLAMA3_PATTERN)
        names = [f"<|{name}|>" for name in (*LLAMA_SPECIALS, "eom_id", "python_tag")]
        special = {name: len(ranks._ranks) + n for n, name in enumerate(names)}
        return ByteBPE(ranks._ranks, LLAMA3_PATTERN, special, special["<|end_of_text|>"], special["<|begin_of_text|>"],
                       form, merges=ranks._merges)
    made = (load_tokenizer(golden / "tokenizer_glm4_standin") if form.startswith("glm4") else
            train_bpe([WORDS], 400, pattern=GPT2_PATTERN if form.endswith("gpt2") else text.GPT4_PATTERN))
    made.chat_format = form.removesuffix("-gpt2")
    made.template_format = None              # the stand-in came with GLM-4's own
    return made


FORMS = ["alpaca", "alpaca-gpt2", "llama3", "llama3.1", "chatglm3", "glm4", "glm4-0414", "world", "world-own"]


@pytest.mark.parametrize("form", FORMS)
def test_a_written_chat_template_gives_the_tokens_of_encode_chat(form, golden, tmp_path):
    pytest.importorskip("jinja2")
    tokenizer = speaker(form.removesuffix("-own"), golden, tmp_path) if form != "world-own" else train_bpe([WORDS], 400)
    tokenizer.chat_format = form.split("-own")[0].split("-gpt2")[0]
    tokenizer.save(tmp_path / "saved")
    if form == "chatglm3":                   # the model's config tells whose SentencePiece it is
        (tmp_path / "saved" / "config.json").write_text('{"model_type": "glm"}')
    stated = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert load_tokenizer(tmp_path / "saved").chat_format == stated["chat_format"] == tokenizer.chat_format
    talks = conversations(tokenizer.chat_format)
    assert len(talks) == 20
    texts = Template(stated["chat_template"], {}).render([(talk, talk[-1]["role"] != "assistant") for talk in talks])
    for messages, rendered in zip(talks, texts):
        ids = [id for piece in tokenizer.added.split(rendered, special=True)
               for id in ([piece] if isinstance(piece, int) else tokenizer.encode(piece))]
        assert ids == tokenizer.encode_chat(messages), (messages, rendered)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("chatglm3", "world")])
def test_transformers_converses_by_the_written_template(form, golden, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = speaker(form, golden, tmp_path) if form != "world-own" else train_bpe([WORDS], 400)
    tokenizer.chat_format = form.split("-own")[0].split("-gpt2")[0]
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for messages in conversations(tokenizer.chat_format):
        speaks = messages[-1]["role"] != "assistant"
        ids = theirs.apply_chat_template(messages, add_generation_prompt=speaks, return_dict=False)
        assert ids == tokenizer.encode_chat(messages), messages
    if form.startswith("glm4"):              # tools as transformers takes them
        messages = talk("Weather?", system="Be brief.")
        ids = theirs.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, return_dict=False)
        assert ids == tokenizer.encode_chat([{**messages[0], "tools": [TOOL]}, *messages[1:]])


def test_a_pipeline_of_transformers_converses_with_a_fine_tuned_run(classifiers, tmp_path):
    transformers = pytest.importorskip("transformers")
    rows = rows_file(tmp_path / "a.jsonl", [{"instruction": f"Say {n}.", "output": str(n)} for n in range(30)])
    out = start("sft", classifiers("gpt").parent / "base", tmp_path / "run", "--data", rows, "--steps", 1)
    asked = [{"role": "user", "content": "Hi"}]
    pipe = transformers.pipeline("text-generation", str(out), device="cpu")
    said = pipe(asked, max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]
    model, tokenizer = train.load_checkpoint(out), load_tokenizer(out)
    [new] = model.generate([tokenizer.encode_chat(asked)], 8, temperature=0)
    assert said == {"role": "assistant", "content": tokenizer.decode(new)}


def test_a_template_that_came_with_a_run_stays_until_another_format_is_chosen(golden, tmp_path):
    glm = load_tokenizer(golden / "tokenizer_glm4_standin")
    theirs = glm.config["chat_template"]
    glm.save(tmp_path / "kept")
    again = load_tokenizer(tmp_path / "kept")
    assert again.config["chat_template"] == theirs and again.chat_format == glm.chat_format
    again.chat_format = "alpaca"
    again.save(tmp_path / "other")
    other = load_tokenizer(tmp_path / "other")
    assert "### Response:" in other.config["chat_template"] and other.chat_format == "alpaca"
    other.chat_format = None
    other.save(tmp_path / "none")
    assert "chat_template" not in json.loads((tmp_path / "none" / "tokenizer_config.json").read_text())


def test_chat_template_json_beside_the_tokenizer_is_read(golden, tmp_path):
    pytest.importorskip("jinja2")
    folder = tmp_path / "glm"
    shutil.copytree(golden / "tokenizer_glm4_standin", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    config.pop("chat_format", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(folder).template.source == template
    assert "its chat template" in load_tokenizer(folder).chat_reason
    (folder / "chat_template.json").write_text("[")
    with pytest.raises(ValueError, match="chat_template.json holds no JSON object"):
        load_tokenizer(folder)


def test_an_empty_text_is_refused_where_no_token_begins_one(tmp_path):
    import pickle
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0, "b": 1}}))
    conversation = Conversation(tiny("gpt"), load_tokenizer(tmp_path), {"temperature": 0.0}, 4)
    with pytest.raises(ValueError, match="an empty text: this vocabulary has no token to begin one with"):
        conversation.answer("", print)
    assert conversation.render([{"role": "user", "content": "ab"}]) == [0, 1]


# --- classifiers ---

@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """classifiers(name): the folder of one that finetune.py trained, and that of its base."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            tiny(name).save_pretrained(folder / "base")
            text.Bytes().save(folder / "base")
            made[name] = start("classify", folder / "base", folder / "run", *toy_data("classify", folder), "--steps", 3)
        return made[name]
    return make


def our_logits(folder, texts):
    """Logits of a classifier here, row by row."""
    labels, head = published.read_head(folder)
    model, tokenizer = train.load_checkpoint(folder), load_tokenizer(folder)
    rows = [model.hidden(torch.tensor([tokenizer.encode(words)]))[:, -1] @ head["weight"].T for words in texts]
    return labels, torch.cat(rows).detach()


@pytest.mark.parametrize("name", ["gpt", "llama3", "glm4"])
def test_transformers_classifies_with_our_logits(name, classifiers, capsys):
    transformers = pytest.importorskip("transformers")
    folder, texts = classifiers(name), ["abcdx", "hh", "fffyghhhhhh"]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encode = transformers.AutoTokenizer.from_pretrained(folder)
    batch = encode(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (3, 11)                          # shorter ones are padded
    labels, ours = our_logits(folder, texts)
    assert_close(theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, ours, 1e-5)
    assert [theirs.config.id2label[n] for n in range(3)] == labels == ["x", "y", "z"]
    assert theirs.config.label2id == {"x": 0, "y": 1, "z": 2}
    assert theirs.config.problem_type == "single_label_classification" and "Classification" in theirs.config.architectures[0]
    assert not (folder / "head.safetensors").exists()
    pipe = transformers.pipeline("text-classification", str(folder), device="cpu")
    assert [said["label"] for said in pipe(texts)] == [labels[n] for n in ours.argmax(-1)]


@pytest.mark.parametrize("name", ["gpt", "rwkv6"])
def test_a_classifier_is_known_as_one_and_labels_here(name, classifiers, tmp_path, capsys):
    import chat
    folder, texts = classifiers(name), ["abcdx", "hh", "fffy"]
    (tmp_path / "new.txt").write_text("\n".join(texts))
    finetune.main(["--task", "classify", "--init-from", str(folder), "--predict", str(tmp_path / "new.txt"), "--device", "cpu"])
    said = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines() if "\t" in line]
    labels, logits = our_logits(folder, texts)
    assert said == [labels[n] for n in logits.argmax(-1)]
    with pytest.raises(SystemExit):
        chat.main([str(folder), "--prompt", "x"])
    assert "labels texts, it does not write any" in capsys.readouterr().err


def test_a_classifier_of_an_earlier_version_keeps_its_bias(classifiers, tmp_path, capsys):
    from safetensors.torch import save_file
    folder = shutil.copytree(classifiers("gpt").parent / "base", tmp_path / "old")
    head = {"weight": torch.zeros(2, 32), "bias": torch.tensor([0.0, 3.0])}
    save_file(head, folder / "head.safetensors", {"labels": '["ham", "spam"]'})
    (tmp_path / "new.txt").write_text("abc\n")
    command = ["--task", "classify", "--init-from", str(folder), "--device", "cpu"]
    finetune.main([*command, "--predict", str(tmp_path / "new.txt")])
    assert capsys.readouterr().out == "spam\t0.953\tabc\n"
    rows = rows_file(tmp_path / "a.jsonl", [{"text": "ab" * n, "label": ("ham", "spam")[n % 2]} for n in range(1, 20)])
    finetune.main([*command, "--out", str(tmp_path / "on"), "--data", str(rows), "--steps", "1", *QUICK])
    labels, head = published.read_head(tmp_path / "on")
    assert labels == ["ham", "spam"] and head.keys() == {"weight", "bias"}


def test_a_classifying_adapter_merges_to_what_transformers_opens(classifiers, tmp_path):
    out = start("classify", classifiers("llama3").parent / "base", tmp_path / "adapter", *toy_data("classify", tmp_path),
                "--steps", 2, "--lora", 2)
    assert (out / "head.safetensors").exists() and published.is_classifier(out)
    finetune.main(["--merge", "--init-from", str(out), "--out", str(tmp_path / "plain"), "--device", "cpu"])
    (_, head), (_, merged) = published.read_head(out), published.read_head(tmp_path / "plain")
    assert torch.equal(head["weight"], merged["weight"]) and not (tmp_path / "plain" / "head.safetensors").exists()
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


# --- what the files state ---

KINDS = ("gpt", "llama3", "glm4", "rwkv6")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(25):
        (folder / f"{n}.txt").write_text("".join(f"def f{n}_{i}(x):\n    return x + {i}\n" for i in range(9)))
    return folder


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """trained(kind): a run directory of train.py."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            train.main(["--model", kind, "--data", str(corpus), "--layers", "1", "--width", "16", "--context", "32", "--vocab",
                        "270", "--steps", "2", "--tokens-per-step", "64", "--micro-batch", "2", "--device", "cpu", "--dtype",
                        "float32", "--workers", "1", "--out", str(made[kind])])
        return made[kind]
    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_configs_of_a_run_agree_and_state_what_others_read(kind, trained):
    config, tokenizer, generation = (json.loads((trained(kind) / f"{name}.json").read_text()) for name in (
        "config", "tokenizer_config", "generation_config"))
    end = load_tokenizer(trained(kind)).end_id
    assert tokenizer["bos_token"] == tokenizer["eos_token"] == tokenizer["pad_token"] == "<|endoftext|>"
    assert config["bos_token_id"] == config["eos_token_id"] == generation["pad_token_id"] == end
    assert config["torch_dtype"] == config["dtype"] == "float32"
    if kind == "gpt":
        assert config["n_ctx"] == config["n_positions"] == 32
    if kind == "rwkv6":
        assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (16, 1, 270)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask to speak of")
def test_written_files_have_the_mode_of_the_umask(classifiers, tmp_path):
    before = os.umask(0o027)
    try:
        tiny("gpt").save_pretrained(tmp_path / "direct")
        checkpoints.publish(tiny("llama3"), text.Bytes(), finetune.Settings(), tmp_path / "run")
        data = toy_data("classify", tmp_path)
        start("classify", classifiers("gpt").parent / "base", tmp_path / "adapter", *data, "--steps", 1, "--lora", 2)
        start("classify", classifiers("gpt").parent / "base", tmp_path / "head", *data, "--steps", 1)
    finally:
        os.umask(before)
    files = [file for name in ("direct", "run", "adapter", "head") for file in (tmp_path / name).rglob("*") if file.is_file()]
    assert {file.suffix for file in files} >= {".safetensors", ".json", ".md", ".pt", ".jsonl"}
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in files} == {"0o640"}


def test_weights_beyond_the_limit_are_divided_and_open_here_and_in_transformers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    models = [tiny("gpt", seed, layers=2) for seed in range(3)]
    monkeypatch.setattr(published, "LIMIT", 60_000)
    for model in models[:2]:                 # a save over another
        checkpoints.publish(model, text.Bytes(), finetune.Settings(), tmp_path)
        files = sorted(file.name for file in tmp_path.glob("model*"))
        assert len(files) > 2 and files[-1] == "model.safetensors.index.json" and "model.safetensors" not in files
        assert max(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 64_000
        tokens = torch.arange(20)[None]
        assert torch.equal(train.load_checkpoint(tmp_path)(tokens), model(tokens))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert_close(theirs(tokens).logits, model(tokens), 1e-5)
    monkeypatch.undo()
    checkpoints.publish(models[2], text.Bytes(), finetune.Settings(), tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"] and not (tmp_path / "saving").exists()
    assert torch.equal(train.load_checkpoint(tmp_path)(tokens), models[2](tokens))


# --- adapters ---

def test_an_adapter_names_its_base_from_where_it_lies_and_both_may_move(classifiers, tmp_path):
    import lora
    shutil.copytree(classifiers("llama3").parent / "base", tmp_path / "runs" / "base")
    out = start("classify", tmp_path / "runs" / "base", tmp_path / "runs" / "adapter", *toy_data("classify", tmp_path),
                "--steps", 1, "--lora", 2)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    assert lora.find_base(moved / "adapter") == (moved / "base").resolve()
    cached = "/home/me/.cache/huggingface/hub/models--openai-community--gpt2/snapshots/607a30d783df"
    assert lora.name_base(cached, out) == "openai-community/gpt2"


def test_finetune_takes_an_adapter_whose_base_moved_with_base(classifiers, tmp_path, capsys):
    base = shutil.copytree(classifiers("llama3").parent / "base", tmp_path / "base")
    out = start("classify", base, tmp_path / "adapter", *toy_data("classify", tmp_path), "--steps", 1, "--lora", 2)
    base.rename(tmp_path / "moved")
    merge = ["--merge", "--init-from", str(out), "--out", str(tmp_path / "plain"), "--device", "cpu"]
    with pytest.raises(SystemExit):
        finetune.main(merge)
    assert "which is not there: --base DIR names the place" in capsys.readouterr().err
    finetune.main([*merge, "--base", str(tmp_path / "moved")])
    assert train.load_checkpoint(tmp_path / "plain").config.vocab_size == 257
    with pytest.raises(SystemExit):
        finetune.main(["--merge", "--init-from", str(tmp_path / "moved"), "--base", str(tmp_path / "moved")])
    assert "--base is for adapters" in capsys.readouterr().err


# --- the model card ---

def test_each_run_directory_has_a_card_that_the_hub_reads(trained, classifiers, corpus):
    hub = pytest.importorskip("huggingface_hub")
    for folder, library, tag, words in (
            (trained("gpt"), "transformers", "text-generation", "A GPT-2 of"),
            (trained("rwkv6"), None, "text-generation", "from rwkv.model import RWKV"),
            (classifiers("llama3"), "transformers", "text-classification", 'pipeline("text-classification", "DIR")')):
        card = hub.ModelCard.load(folder / "README.md")
        assert (card.data.library_name, card.data.pipeline_tag) == (library, tag)
        assert words in card.text and f"# {folder.name}" in card.text
    text = (trained("gpt") / "README.md").read_text()
    last = json.loads((trained("gpt") / "log.jsonl").read_text().splitlines()[-1])
    assert f"| bits per byte of held-out text | {last['bits_per_byte']:.3f}; gzip -9 needs {last['gzip']:.3f}" in text
    assert f"| data | {corpus.name} |" in text and "| training | 2 steps of 64 tokens: 128 tokens |" in text
    count = sum(p.numel() for p in train.load_checkpoint(trained("gpt")).parameters())
    assert f"A GPT-2 of {count:,} parameters, trained from scratch." in text
    assert "trained from base to label texts" in (classifiers("llama3") / "README.md").read_text()
    assert "accuracy (held out)" in (classifiers("llama3") / "README.md").read_text()


def test_a_card_has_the_curve_and_one_that_was_changed_stays(trained, tmp_path):
    folder = shutil.copytree(trained("gpt"), tmp_path / "run")
    (folder / "loss.png").write_bytes(b"")
    checkpoints.write_card(folder)
    card = (folder / "README.md").read_text()
    assert "![loss](loss.png)" in card and OURS in card
    (folder / "README.md").write_text("Mine.")
    checkpoints.write_card(folder)
    assert (folder / "README.md").read_text() == "Mine."
