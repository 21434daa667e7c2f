"""tokenizer.py: the official codes' ids, text stays data, what is saved opens elsewhere."""

import dataclasses
import hashlib
import json
import pickle
import random
import sys

import pytest

import checkpoints
import tokenizer as tk
from tokenizer import GPT2_PATTERN, Bytes, ByteBPE, load_tokenizer, train_bpe

TYPED = (
    "<|endoftext|> <|eot_id|><|start_header_id|>system<|end_header_id|> <|user|>[gMASK]<sop> sop "
    "</s> <|begin_of_text|>"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Thanks!\n"},
    {"role": "assistant", "content": "Welcome."},
]


def read(golden, name):
    return json.loads((golden / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(golden):
    return train_bpe([read(golden, "bpe_train.json")["corpus"] + " äöü 你好 \U0001f600"], 400)


@pytest.fixture(scope="module")
def glm4(golden):
    return load_tokenizer(golden / "tokenizer_glm4_standin")


@pytest.fixture(scope="session")
def real(assets):
    """Loads a real vocabulary once: real("llama3", kind)."""
    loaded = {}

    def get(name, kind=None):
        if (name, kind) not in loaded:
            if name == "chatglm3":
                pytest.importorskip("sentencepiece")
            loaded[name, kind] = load_tokenizer(assets / name, kind)
        return loaded[name, kind]

    return get


REAL = [
    ("gpt2", None),
    ("llama3", None),
    ("llama3", "llama3.1"),
    ("pile", None),
    ("rwkv", None),
    ("chatglm3", None),
]


def random_texts(count=200, seed=0):
    """Text of all kinds of characters, spaces and newlines, repeated ones too; no surrogates."""
    rng = random.Random(seed)
    pools = [
        (32, 127),
        (32, 127),
        (9, 14),
        (0, 32),
        (160, 0x250),
        (0x300, 0x370),
        (0x400, 0x500),
        (0x600, 0x700),
        (0x2000, 0x2070),
        (0x3040, 0x30FF),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A4),
        (0xE000, 0xE100),
        (0x1F300, 0x1F6FF),
        (0x10FFF0, 0x110000),
    ]
    for _ in range(count):
        words = []
        for _ in range(rng.randrange(20)):
            low, high = rng.choice(pools)
            words.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 6))))
            words.append(
                rng.choice(["", " ", "  ", "\n", "\n\n ", "\t", " \r\n", "'s", "12345"])
                * rng.randrange(1, 4)
            )
        yield "".join(words)


# ---- training ------------------------------------------------------------------------------------


def test_merges_equal_rustbpe(golden):
    data = read(golden, "bpe_train.json")
    for case in data["cases"]:
        trained = train_bpe([data["corpus"]], case["vocab_size"], pattern=case["pattern"])
        assert [[a.hex(), b.hex()] for a, b in trained._merges] == case["merges_smallest_pair_hex"]
        assert trained.vocab_size == case["vocab_size"] + 1
        for sample in case["encode"]:
            assert trained.encode(sample["text"]) == sample["ids_with_smallest_pair_merges"]


def test_merges_of_edge_cases_equal_rustbpe(golden, capfd):
    for case in read(golden, "bpe_train.json")["edge_cases"]:
        if case["vocab_size"] < 256:
            with pytest.raises(ValueError, match="256"):
                train_bpe([case["corpus"]], case["vocab_size"])
        else:
            trained = train_bpe([case["corpus"]], case["vocab_size"])
            assert [(a + b).hex() for a, b in trained._merges] == case["rustbpe_new_tokens"]
            stopped = len(trained._merges) < case["vocab_size"] - 256
            assert ("nothing is left to merge" in capfd.readouterr().err) == stopped


def test_merges_do_not_depend_on_how_the_texts_are_cut_up(golden):
    lines = read(golden, "bpe_train.json")["corpus"].splitlines(keepends=True)
    whole, parts = train_bpe(["".join(lines)], 300), train_bpe(iter(lines * 2), 300)
    assert whole._merges[:20] == parts._merges[:20]


def test_training_equals_counting_all_pairs_again_each_time():
    rng = random.Random(1)
    for _ in range(30):
        words = ["".join(rng.choices("aab", k=rng.randrange(1, 12))) for _ in range(12)]
        merges, parts = (
            [],
            [[bytes([b]) for b in (" " * (n > 0) + w).encode()] for n, w in enumerate(words)],
        )
        order = {bytes([b]): b for b in range(256)}
        for _ in range(10):
            counts = {}
            for word in parts:
                for pair in zip(word, word[1:]):
                    counts[pair] = counts.get(pair, 0) + 1
            if not counts:
                break
            best = min(counts, key=lambda p: (-counts[p], order[p[0]], order[p[1]]))
            merges.append(best)
            order[b"".join(best)] = len(order)
            for word in parts:
                at = 0
                while at < len(word) - 1:
                    if (word[at], word[at + 1]) == best:
                        word[at : at + 2] = [b"".join(best)]
                    at += 1
        assert train_bpe([" ".join(words)], 256 + len(merges))._merges == merges


# ---- ids equal to the official ones --------------------------------------------------------------


def test_gpt2_ids_equal_tiktoken_and_openai(golden, real):
    data, gpt2 = read(golden, "tokenizer_gpt2.json"), real("gpt2")
    for sample in data["strings"]:
        assert gpt2.encode(sample["text"]) == sample["ids"], sample["name"]
        assert gpt2.decode(sample["ids"]) == sample["text"], sample["name"]
    check_long(gpt2, data["long"])
    for sample in data["special"]:
        assert gpt2.encode(sample["text"]) == sample["tiktoken_disallowed_empty"]["ids"]
    for sample in data["partial_decode"]:
        assert gpt2.decode(sample["ids"]) == sample["text"]
    assert gpt2.encode("a\ud800b") == data["lone_surrogate"][0]["ids_gpt2"]
    assert (gpt2.vocab_size, gpt2.special_ids, gpt2.end_id) == (
        50257,
        data["special_tokens"],
        50256,
    )


def check_long(tokenizer, samples):
    for sample in samples:
        ids = tokenizer.encode(sample["unit"] * sample["times"])
        digest = hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()
        assert (len(ids), digest) == (sample["n_ids"], sample["sha256_of_space_joined_ids"])


def test_llama3_ids_equal_meta(golden, real):
    data = read(golden, "tokenizer_llama3.json")
    for kind, name in (("llama3", "llama3"), ("llama3.1", "llama31")):
        llama = real("llama3", kind if kind != "llama3" else None)
        for sample in data["strings"]:
            assert llama.encode(sample["text"]) == sample["ids"], sample["name"]
            assert llama.decode(sample["ids"]) == sample["text"], sample["name"]
        for sample in data["special"]:
            assert llama.encode(sample["text"]) == sample["meta_tokenizer_default"]
        for sample in data["partial_decode"]:
            assert llama.decode(sample["ids"]) == sample["text"]
        for sample in data["chat"]:
            assert llama.encode_chat(sample["dialog"]) == sample[f"ids_{name}"]
        assert llama.special_ids == data[f"special_tokens_{name}"]
        assert list(llama.stop_ids) == data[f"stop_{name}"]
        assert (llama.vocab_size, llama.bos_id, llama.end_id) == (128256, 128000, 128001)
        assert llama.chat_format == kind


def test_long_texts_are_not_cut_as_meta_cuts_them(golden, real):
    check_long(
        real("llama3"), read(golden, "tokenizer_llama3.json")["long_without_the_25000_char_split"]
    )


def test_llama31_tool_call_ends_the_message_and_not_the_turn(golden, real):
    expected = read(golden, "tokenizer_llama3.json")["chat31_tool_and_eom"]["ids"]
    user, call = {"role": "user", "content": "run it"}, {"role": "assistant", "content": "1+1"}
    for role in ("tool", "ipython"):
        chat = [user, call, {"role": role, "content": "ok"}]
        assert real("llama3", "llama3.1").encode_chat(chat) == expected
    ended = real("llama3", "llama3.1").encode_chat(
        [user, {**call, "stop_reason": "end_of_message"}]
    )
    assert ended == expected[: len(ended)]
    code = real("llama3", "llama3.1").encode_chat([user, {**call, "metadata": "python"}])
    assert code == [*ended[:-4], 128010, *ended[-4:]]


def test_glm4_ids_equal_official(golden, glm4):
    data = read(golden, "tokenizer_glm4.json")
    for sample in data["strings"]:
        assert glm4.encode(sample["text"]) == sample["plain_ids"]
        assert glm4.decode(sample["plain_ids"]) == sample["text"]
    for sample in data["chat"]:
        tools = any("tools" in message for message in sample["messages"])
        ids = glm4.encode_chat(sample["messages"])
        assert ids == sample["ids" if tools else "first_release_ids"]
        if tools:
            assert glm4.decode(ids) == sample["rendered"]
    assert glm4.special_ids == data["specials"]
    assert list(glm4.stop_ids) == data["stop_ids"]["standin"]
    assert glm4.prefix_ids == (glm4.special_ids["[gMASK]"], glm4.special_ids["<sop>"])


def test_glm4_tool_prompts_equal_the_published_template(golden, glm4):
    jinja2 = pytest.importorskip("jinja2")
    template = read(golden, "tokenizer_glm4_standin/tokenizer_config.json")["chat_template"]
    function = {"name": "f", "description": "a<b & 'c'", "parameters": {"z": 1, "a": "城市"}}
    chat = [
        {
            "role": "system",
            "content": "Hi",
            "tools": [
                {"type": "simple_browser"},
                {"type": "function", "function": function},
                {"type": "cogview"},
                {"type": "python"},
            ],
        },
        {"role": "user", "content": "go"},
    ]
    rendered = (
        jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(messages=chat, add_generation_prompt=True)
    )
    assert glm4.decode(glm4.encode_chat(chat)) == rendered


def test_glm4_0414_puts_tools_and_system_first_and_drops_thoughts(glm4):
    glm = pickle.loads(pickle.dumps(glm4))
    glm.chat_format = "glm4-0414"
    chat = [
        {"role": "user", "content": " q "},
        {"role": "system", "content": "S"},
        {"role": "assistant", "content": "<think>hm</think>\n a"},
        {"role": "user", "content": "w"},
        {"role": "assistant", "metadata": "f", "content": "{}"},
        {"role": "observation", "content": "o"},
    ]
    assert glm.decode(glm.encode_chat(chat)) == (
        "[gMASK]<sop><|system|>\nS<|user|>\nq<|assistant|>\na<|user|>\nw<|assistant|>f \n{}"
        "<|observation|>\no<|assistant|>"
    )
    tools = [
        {"role": "system", "content": "", "tools": [{"function": {"name": "f", "x": "你"}}]},
        *chat[:1],
    ]
    assert glm.decode(glm.encode_chat(tools)) == (
        '[gMASK]<sop><|system|>\n# 可用工具\n\n## f\n\n{\n    "name": "f",\n    "x": "你"\n}\n'
        "在调用上述函数时，请使用 Json 格式表示调用的参数。<|user|>\nq<|assistant|>"
    )


def test_chatglm3_ids_equal_official(golden, real):
    data, glm = read(golden, "tokenizer_chatglm3.json"), real("chatglm3")
    for sample in data["strings"]:
        assert glm.encode(sample["text"]) == sample["ids"]
        assert glm.decode(sample["ids"]) == sample["decode"]
    for sample in data["build_chat_input"]:
        chat = [*sample["history"], {"role": sample["role"], "content": sample["query"]}]
        assert glm.encode_chat(chat) == sample["input_ids"]
    for sample in data["decode"]:
        if sample["ids"] != [
            243,
            162,
            148,
        ]:  # cut-off UTF-8: one U+FFFD as elsewhere, not one a byte
            assert glm.decode(sample["ids"]) == sample["decode"]
    assert glm.special_ids == data["vocab"]["special_tokens"]
    assert list(glm.stop_ids) == data["stop_ids_used_by_chat"]
    assert list(glm.prefix_ids) == data["prefix_tokens"]
    assert (glm.vocab_size, glm.end_id) == (64798, 2)


def test_world_ids_equal_official(golden, real):
    data, world = read(golden, "tokenizer_rwkv_world.json"), real("rwkv")
    for sample in data["text"]:
        assert world.encode(sample["text"]) == sample["ids"]
        assert world.decode(sample["ids"]) == sample["text"]
    for sample in data["raw_bytes"]:
        assert world.encode_bytes(bytes.fromhex(sample["bytes_hex"])) == sample["ids"]
    assert len(world.stop_ids) == 35 and {0, 261} < set(world.stop_ids)
    assert world.decode([0]) == "\ufffd"


def test_neox_ids_equal_tokenizers(real, assets):
    tokenizers = pytest.importorskip("tokenizers")
    official = tokenizers.Tokenizer.from_file(str(assets / "pile" / "20B_tokenizer.json"))
    official.encode_special_tokens = True
    neox = real("pile")
    for text in [
        *random_texts(),
        "e\u0301 \u212b",
        " " * 60 + "x",
        "def f():\n" + " " * 23 + "y",
        TYPED,
    ]:
        assert neox.encode(text) == official.encode(text).ids
    assert (neox.vocab_size, neox.end_id, neox.bos_id) == (50277, 0, None)


def test_gpt2_merges_file_and_json_names_give_the_same(real, assets, tmp_path):
    (tmp_path / "vocab.json").write_bytes((assets / "gpt2" / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((assets / "gpt2" / "vocab.bpe").read_bytes())
    for path in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
        assert load_tokenizer(path).encode(TYPED) == real("gpt2").encode(TYPED)


# ---- text is data; every text survives -----------------------------------------------------------


def check_data(tokenizer):
    ids = tokenizer.encode(TYPED)
    assert tokenizer.decode(ids) == TYPED
    assert not set(ids) & set(tokenizer.special_ids.values())
    decoder = tokenizer.stream_decoder()
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\ufffd"
    for text in random_texts():
        ids = tokenizer.encode(text)
        assert all(0 <= id < tokenizer.vocab_size for id in ids)
        expected = tk.unicodedata.normalize("NFC", text) if tokenizer.added.nfc else text
        assert tokenizer.decode(ids) == expected
        decoder = tokenizer.stream_decoder()
        pieces = [decoder.feed([id]) for id in ids]
        assert "".join(pieces) + decoder.finish() == expected
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_is_data_and_round_trips_in_ours(trained, glm4):
    for tokenizer in (trained, Bytes(), glm4):
        check_data(tokenizer)


@pytest.mark.parametrize("name, kind", REAL)
def test_text_is_data_and_round_trips_in_published(name, kind, real):
    check_data(real(name, kind))


def test_stream_decoder_equals_decode_for_any_ids(trained, glm4):
    rng = random.Random(3)
    for tokenizer in (trained, Bytes(), glm4):
        for _ in range(100):
            ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(12))]
            decoder, text, at = tokenizer.stream_decoder(), "", 0
            while at < len(ids):
                step = rng.randrange(1, 4)
                text += decoder.feed(ids[at : at + step])
                at += step
            assert text + decoder.finish() == tokenizer.decode(ids)


def test_stream_decoder_holds_back_half_a_character():
    decoder = Bytes().stream_decoder()
    assert [decoder.feed(byte) for byte in "aé你".encode()] == ["a", "", "é", "", "", "你"]
    assert decoder.feed(0xE4) == "" and decoder.finish() == "\ufffd"


def test_endless_white_space_does_not_crash(trained):
    for unit in (" ", "\n", "\t", " \n"):
        text = "a" + unit * 1_000_000 + "b"
        assert trained.decode(trained.encode(text)) == text


def test_a_text_in_parts_has_the_ids_of_the_whole(trained, glm4):
    gpt2_like = train_bpe(["x\n\n\n\ny z \n  x.\n\n\n" * 5], 270, pattern=GPT2_PATTERN)
    assert gpt2_like.encode("x\n\ny") != gpt2_like.encode("x\n\n") + gpt2_like.encode("y")
    for tokenizer in (trained, glm4, gpt2_like, Bytes()):
        check_parts(tokenizer)


@pytest.mark.parametrize("name, kind", REAL)
def test_a_text_in_parts_has_the_ids_of_the_whole_in_published(name, kind, real):
    check_parts(real(name, kind))


def check_parts(tokenizer):
    for text in ["x.\n\ny", "x \n \n\ny\n(z)\n\t\nä", *random_texts(100, seed=5)]:
        cuts = [at for at in range(1, len(text)) if text[at - 1] == "\n" and not text[at].isspace()]
        ids = []
        for start, end in zip([0, *cuts], [*cuts, len(text)]):
            ids += tokenizer.encode_part(text[start:end], start == 0, end == len(text))
        assert ids == tokenizer.encode(text)


# ---- chat ----------------------------------------------------------------------------------------


def check_chat(tokenizer):
    """Parts join to the whole; a conversation only grows; a reply ends in what stops the model."""
    for n in range(2, len(CHAT) + 1):
        parts = tokenizer.chat_parts(CHAT[:n])
        assert [id for ids, _ in parts for id in ids] == tokenizer.encode_chat(CHAT[:n])
        assert parts == tokenizer.chat_parts(CHAT)[: len(parts)]
        assert parts[-1][1] == (CHAT[n - 1]["role"] == "assistant")
        for ids, reply in parts:
            assert not reply or ids[-1] in tokenizer.stop_ids
    assert sum(reply for _, reply in tokenizer.chat_parts(CHAT)) == 2
    typed = tokenizer.encode_chat([{"role": "user", "content": TYPED}])
    plain = tokenizer.encode_chat([{"role": "user", "content": "x"}])
    names = set(tokenizer.special_ids.values())
    assert [id for id in typed if id in names] == [id for id in plain if id in names]


def test_chat_parts_of_ours(trained, glm4):
    for tokenizer, form in ((trained, "alpaca"), (glm4, "glm4"), (glm4, "glm4-0414")):
        tokenizer = pickle.loads(pickle.dumps(tokenizer))
        tokenizer.chat_format = form
        check_chat(tokenizer)


@pytest.mark.parametrize("name, kind", [pair for pair in REAL if pair[0] not in ("gpt2", "pile")])
def test_chat_parts_of_published(name, kind, real):
    check_chat(real(name, kind))


def test_world_chat_keeps_blank_lines_out_of_turns(real):
    world = real("rwkv")
    chat = [
        {"role": "user", "content": " hi\r\n\r\n\nyou "},
        {"role": "assistant", "content": "a\n\nb\n"},
    ]
    assert world.decode(world.encode_chat(chat)) == "User: hi\nyou\n\nAssistant: a\nb\n\n"
    assert world.encode_chat([{"role": "user", "content": "hi"}]) == [
        24281,
        59,
        4571,
        261,
        5585,
        41693,
        59,
    ]


def test_alpaca_is_stanfords_prompt():
    tokenizer = Bytes()
    tokenizer.chat_format = "alpaca"
    chat = [
        {"role": "user", "content": "Add.", "input": "1 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert tokenizer.decode(tokenizer.encode_chat(chat)) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n"
        "### Input:\n1 2\n\n### Response: 3<|endoftext|>"
    )
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "Hi"}])) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nHi\n\n### Response:"
    )


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([], "at least one"),
        ([{"role": "user"}], "message 0"),
        (["hi"], "message 0"),
        ([{"role": "user", "content": "x"}, {"role": "root", "content": "x"}], "'root'"),
        ([{"role": "user", "content": "x", "tools": [1]}], "'tools'"),
    ],
)
def test_bad_conversations_are_refused_in_one_line(messages, complaint):
    tokenizer = Bytes()
    tokenizer.chat_format = "alpaca"
    with pytest.raises(ValueError, match=complaint) as caught:
        tokenizer.encode_chat(messages)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_chat_format_says_so():
    with pytest.raises(ValueError, match="no chat format.*alpaca"):
        Bytes().encode_chat(CHAT)
    for name in ("llama3", "nonsense"):
        with pytest.raises(ValueError, match=name):
            Bytes().chat_format = name


# ---- saving, loading, finding --------------------------------------------------------------------


def check_saved(tokenizer, folder):
    """The same after saving; `tokenizers` reads the same ids from tokenizer.json."""
    tokenizer.save(folder, model_max_length=77)
    again = load_tokenizer(folder)
    assert type(again) is type(tokenizer)
    for name in (
        "special_ids",
        "vocab_size",
        "bos_id",
        "end_id",
        "stop_ids",
        "chat_format",
        "prefix_ids",
    ):
        assert getattr(again, name) == getattr(tokenizer, name), name
    assert read(folder, "tokenizer_config.json")["model_max_length"] == 77
    texts = [TYPED, " a  b\n\n c\t\n", "x" * 50, *random_texts(100, seed=2)]
    for text in texts:
        assert again.encode(text) == tokenizer.encode(text)
    if isinstance(tokenizer, ByteBPE):
        tokenizers = pytest.importorskip("tokenizers")
        theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        theirs.encode_special_tokens = True  # text is data there too
        for text in texts:
            assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
        assert theirs.get_vocab_size() == len(tokenizer._tokens)
    tokenizer.save(folder)  # over itself
    assert not list(folder.glob("*.tmp"))


def test_saved_and_loaded_is_the_same_and_opens_in_tokenizers(trained, glm4, tmp_path):
    gpt2_like = train_bpe(["hello hello world " * 5], 270, pattern=GPT2_PATTERN)
    talking = train_bpe(["hello hello world " * 5], 270)
    talking.chat_format = "alpaca"
    for n, tokenizer in enumerate((trained, glm4, gpt2_like, talking, Bytes())):
        check_saved(tokenizer, tmp_path / str(n))


@pytest.mark.parametrize("name, kind", REAL)
def test_published_saved_and_loaded_is_the_same(name, kind, real, tmp_path):
    check_saved(real(name, kind), tmp_path)


def test_transformers_opens_what_is_saved(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained.save(tmp_path, model_max_length=64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The keeper , he 's\n\n counting ."
    assert theirs(text)["input_ids"] == trained.encode(text)
    assert theirs.decode(trained.encode(text)) == text
    assert (theirs.eos_token_id, theirs.model_max_length) == (trained.end_id, 64)


def test_tokenizers_pickle(trained, glm4):
    for tokenizer in (trained, glm4, Bytes()):
        assert pickle.loads(pickle.dumps(tokenizer)).encode(TYPED) == tokenizer.encode(TYPED)


def test_configs_decide_which_model_a_tiktoken_file_belongs_to(golden, tmp_path):
    vocabulary = (golden / "tokenizer_glm4_standin" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(vocabulary)

    def found(name, **config):
        (tmp_path / name).write_text(json.dumps(config))
        form = load_tokenizer(tmp_path).chat_format
        (tmp_path / name).unlink()
        return form

    assert load_tokenizer(tmp_path).chat_format == "llama3"
    assert found("params.json", use_scaled_rope=True) == "llama3.1"
    assert found("params.json", rope_theta=500000.0) == "llama3"
    assert (
        found("config.json", model_type="llama", rope_scaling={"rope_type": "llama3"}) == "llama3.1"
    )
    assert (
        found("config.json", model_type="llama", rope_parameters={"rope_type": "default"})
        == "llama3"
    )
    assert found("config.json", model_type="chatglm") == "glm4"
    assert found("config.json", model_type="glm") == "glm4"
    assert found("config.json", model_type="glm4") == "glm4-0414"
    assert found("tokenizer_config.json", tokenizer_class="ChatGLM4Tokenizer") == "glm4"
    assert found("tokenizer_config.json", chat_format="llama3.1") == "llama3.1"
    assert load_tokenizer(tmp_path, kind="llama3.1").chat_format == "llama3.1"


def test_weights_lead_to_the_tokenizer_beside_them(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "model.pth").touch()
    assert load_tokenizer(tmp_path / "model.pth").encode("hello") == trained.encode("hello")


def test_ids_out_of_merge_order_are_read(tmp_path):
    """A tokenizer.json may number its tokens as it likes."""
    trained = train_bpe(["hello hello yellow " * 5], 262)
    trained.save(tmp_path)
    data = read(tmp_path, "tokenizer.json")
    turned = {id: 500 - id for id in range(256, 262)}
    data["model"]["vocab"] = {t: turned.get(id, id) for t, id in data["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    again = load_tokenizer(tmp_path)
    assert again.encode("hello yellow") == [
        turned.get(id, id) for id in trained.encode("hello yellow")
    ]
    assert again.decode(again.encode("hello yellow")) == "hello yellow"


def test_several_or_no_vocabularies_are_an_error_that_says_what_to_do(tmp_path, trained):
    with pytest.raises(ValueError, match="looked for tokenizer.json"):
        load_tokenizer(tmp_path)
    trained.save(tmp_path)
    lines = (
        "".join(f"{b + 1} {bytes([b])!r} 1\n" for b in range(256)) + "257 ' a' 2\n258 '\\n\\n' 2\n"
    )
    (tmp_path / "rwkv_vocab_v1.txt").write_text(lines)
    with pytest.raises(
        ValueError, match="tokenizer.json, rwkv_vocab_v1.txt.*kind='tokenizer.json' or 'world'"
    ):
        load_tokenizer(tmp_path)
    world = load_tokenizer(tmp_path, kind="world")
    assert world.encode("a a\n\n") == [98, 257, 258]
    world.chat_format = "world"
    assert world.stop_ids == (0, 258)
    assert load_tokenizer(tmp_path, kind="tokenizer.json").encode("a") == trained.encode("a")
    with pytest.raises(ValueError, match="kind 'nonsense'"):
        load_tokenizer(tmp_path, kind="nonsense")
    (tmp_path / "rwkv_vocab_v1.txt").write_text(
        lines.replace("257 ' a'", "257 __import__('os').getcwd()")
    )
    with pytest.raises(ValueError, match="line 257"):
        load_tokenizer(tmp_path, kind="world")


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "WordPiece"}}'),
        (
            "tokenizer.json",
            '{"pre_tokenizer": {"type": "ByteLevel"}, "model": {"vocab": {"▁x": 1}, "merges": []}}',
        ),
        (
            "tokenizer.json",
            '{"pre_tokenizer": {"type": "ByteLevel"}, '
            '"model": {"vocab": {"a": 0}, "merges": ["a b"]}}',
        ),
        ("tokenizer.json", '{"pre_tokenizer": {"type": "ByteLevel"}}'),
        ("tokenizer.model", "IQ== 0\nnonsense\n"),
        ("tokenizer.model", "\x00\x01"),
        ("tokenizer_config.json", "{"),
        ("vocab.json", '{"a": 0}'),
        ("rwkv_vocab_v2.txt", "1 'a' 1\n2 b 1\n"),
        ("rwkv_vocab_v2.txt", "1 'a' 1\n"),
        ("rwkv_vocab_v2.txt", ""),
    ],
)
def test_bad_files_are_one_clear_line(name, content, tmp_path):
    if content == "\x00\x01":               # only the package can tell that this is not its format
        pytest.importorskip("sentencepiece")
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises((ValueError, OSError)) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20


def test_names_that_do_not_exist_are_an_error_that_lists_the_names(tmp_path):
    with pytest.raises(OSError, match="'bytes' and 'gpt2'"):
        load_tokenizer(tmp_path / "nothing")


def test_gpt2_without_network_names_the_files(monkeypatch, tmp_path):
    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tk.tiktoken, "get_encoding", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="vocab.bpe and encoder.json"):
        load_tokenizer("gpt2")


def test_sentencepiece_is_asked_for_when_missing(real, assets, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        load_tokenizer(assets / "chatglm3")


# ---- vocabularies as they are found in the wild --------------------------------------------------


FLAGS = {"special": False, "lstrip": False, "rstrip": False, "single_word": False,
         "normalized": False}


def with_added(tokenizer, folder, added, **parts):
    """A saved vocabulary whose tokenizer.json has these added tokens too; the package's reading."""
    tokenizer.save(folder)
    data = read(folder, "tokenizer.json")
    first = max(max(data["model"]["vocab"].values()), *(t["id"] for t in data["added_tokens"])) + 1
    data["added_tokens"] += [{**FLAGS, **token, "id": first + n} for n, token in enumerate(added)]
    (folder / "tokenizer.json").write_text(json.dumps({**data, **parts}))
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return load_tokenizer(folder), theirs


def test_added_tokens_are_found_as_tokenizers_finds_them(trained, tmp_path):
    ours, theirs = with_added(trained, tmp_path, [
        {"content": "<l>", "lstrip": True}, {"content": "<r>", "rstrip": True},
        {"content": "<lr>", "lstrip": True, "rstrip": True}, {"content": "word", "single_word": True},
        {"content": "<n>", "normalized": True}, {"content": "<l><r>"}, {"content": "  "},
        {"content": "<|sp"}, {"content": "<|special|>", "special": True, "lstrip": True},
        {"content": "ő", "normalized": True, "single_word": True}])
    rng = random.Random(4)
    pieces = ["<l>", "<r>", "<lr>", "word", "<n>", "<|special|>", "<|sp", "ő", "o\u030b", " ", "  ",
              "\n", "\t", "\x1c", "\x85", "\u2003", "a", "_", "1", "\u0301", "\u200d", "你", "²", ".",
              "<|endoftext|>", "x y"]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 9)))
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)
    assert ours.decode(ours.encode("a <l>b")) == "a<l>b"


def test_a_word_is_what_tokenizers_takes_for_one(trained, tmp_path):
    ours, theirs = with_added(trained, tmp_path, [{"content": "<w>", "single_word": True}])
    for code in [*range(0x3000), *range(0xA000, 0xB000), 0x1F600, 0x1D7D8, 0xE0100]:
        if tk.unicodedata.category(chr(code)) == "Cn":      # by the version of Unicode
            continue
        text = f"{chr(code)}<w> <w>{chr(code)}"
        assert ours.encode(text) == theirs.encode(text).ids, hex(code)


@pytest.mark.parametrize("normalizer", [
    None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}]}])
def test_normalizers_that_are_empty_or_nfc(normalizer, trained, tmp_path):
    ours, theirs = with_added(trained, tmp_path, [
        {"content": "e\u0301", "normalized": True}, {"content": "o\u0308"}], normalizer=normalizer)
    for text in ["e\u0301 é o\u0308 ö a\u0308", *random_texts(50, seed=7)]:
        assert ours.encode(text) == theirs.encode(text).ids


def test_other_normalizers_are_refused(trained, tmp_path):
    for normalizer in ({"type": "Lowercase"},
                       {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}):
        with pytest.raises(ValueError, match="at most NFC"):
            with_added(trained, tmp_path, [], normalizer=normalizer)


def test_an_added_token_may_be_one_of_the_vocabulary(trained, tmp_path):
    """tokenizer.add_tokens(["word"]) of a word that merges make already."""
    trained.save(tmp_path)
    data = read(tmp_path, "tokenizer.json")
    word = max((text for text in data["model"]["vocab"] if text.isascii()), key=len)
    data["added_tokens"].append({**FLAGS, "id": data["model"]["vocab"][word], "content": word})
    data["added_tokens"].append({**FLAGS, "id": data["model"]["vocab"]["q"], "content": "q"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in (f"x{word}y q{word[:-1]} {word}", "sequence", *random_texts(20)):
        assert load_tokenizer(tmp_path).encode(text) == theirs.encode(text).ids


def write_gpt2(tokenizer, folder):
    """vocab.json and merges.txt of a vocabulary, as GPT-2's."""
    tokenizer.save(folder)
    data = read(folder, "tokenizer.json")
    (folder / "tokenizer.json").unlink()
    vocab = data["model"]["vocab"] | {"<|endoftext|>": tokenizer.end_id}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *data["model"]["merges"]]))


def test_ids_that_do_not_rise_in_merge_order_survive_saving(tmp_path):
    tokenizer = train_bpe(["hello hello world " * 5], 262, pattern=GPT2_PATTERN)
    write_gpt2(tokenizer, tmp_path)
    vocab = read(tmp_path, "vocab.json")
    low, high = sorted(vocab, key=vocab.get)[259:262:2]
    vocab[low], vocab[high] = vocab[high], vocab[low]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    ours, text = load_tokenizer(tmp_path), "hello world"
    assert ours.encode(text) != tokenizer.encode(text) and ours.decode(ours.encode(text)) == text
    ours.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode(text) == ours.encode(text)


def test_added_tokens_json_beside_vocab_json(tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt2 = train_bpe(["hello hello world " * 5], 265, pattern=GPT2_PATTERN)
    write_gpt2(gpt2, tmp_path)
    N = gpt2.vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": N, "<user>": N + 1}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(
        {"pad_token": "[PAD]", "eos_token": {"content": "<|endoftext|>"}}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "hello <user> world"
    assert ours.encode(text) == theirs(text)["input_ids"] and N + 1 in ours.encode(text)
    assert ours.special_ids == {"<|endoftext|>": N - 1, "[PAD]": N}
    assert ours.encode("[PAD]") == gpt2.encode("[PAD]")
    assert ours.decode([N, N + 1]) == "[PAD]<user>"
    ours.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode(text) == ours.encode(text)


@dataclasses.dataclass
class Config:
    vocab_size: int


class RWKVConfig(Config):
    pass


def test_tokens_beyond_the_model_are_refused_only_when_they_are_to_be_fed(trained, tmp_path):
    ours, _ = with_added(trained, tmp_path, [{"content": "[PAD]", "special": True},
                                             {"content": "<new>"}])
    checkpoints.check_vocabulary(Config(trained.vocab_size), ours)
    assert ours.encode("[PAD] hello") == trained.encode("[PAD] hello")
    with pytest.raises(ValueError, match=f"'<new>' is token {trained.vocab_size + 1}, and the model "
                                         f"has {trained.vocab_size}"):
        ours.encode("hello <new>")
    checkpoints.check_vocabulary(Config(ours.vocab_size), fresh := load_tokenizer(tmp_path))
    assert fresh.encode("<new>") == [trained.vocab_size + 1]
    for size in (trained.vocab_size - 1, 300):           # its end, and more, are missing
        with pytest.raises(ValueError, match="its own tokenizer"):
            checkpoints.check_vocabulary(Config(size), load_tokenizer(tmp_path))


def test_a_chat_whose_control_tokens_lie_beyond_the_model_is_refused(trained, tmp_path):
    names = ("start_header_id", "end_header_id", "eot_id")
    ours, _ = with_added(trained, tmp_path, [{"content": f"<|{name}|>", "special": True}
                                             for name in names])
    checkpoints.check_vocabulary(Config(trained.vocab_size), ours)
    ours.chat_format = "llama3"
    assert ours.encode("hello")
    with pytest.raises(ValueError, match="'<|.*|>' is token.*the model not"):
        ours.encode_chat(CHAT)


def test_vocabularies_of_rwkv_are_not_mixed_up(trained, monkeypatch):
    def check(model_size, vocab_size):
        monkeypatch.setattr(trained, "vocab_size", vocab_size)
        monkeypatch.setattr(trained, "text_size", vocab_size)
        checkpoints.check_vocabulary(RWKVConfig(model_size), trained)
    for model_size, vocab_size in ((65_536, 65_530), (50_277, 50_277), (65_536, 65_536), (500, 400)):
        check(model_size, vocab_size)
    for model_size, vocab_size, file in ((65_536, 50_277, "rwkv_vocab"), (50_277, 65_530, ""),
                                         (50_277, 50_257, "20B")):
        with pytest.raises(ValueError, match=f"it needs its own tokenizer.*{file}"):
            check(model_size, vocab_size)


def test_published_vocabularies_of_rwkv_are_not_mixed_up(real):
    checkpoints.check_vocabulary(RWKVConfig(65_536), real("rwkv"))
    checkpoints.check_vocabulary(RWKVConfig(50_277), real("pile"))
    for model_size, name in ((65_536, "pile"), (50_277, "rwkv"), (50_277, "gpt2")):
        with pytest.raises(ValueError, match="it needs its own tokenizer"):
            checkpoints.check_vocabulary(RWKVConfig(model_size), real(name))


def train_sentencepiece(folder):
    """tokenizer.model of Llama 2's kind: byte fallback, <unk> <s> </s> first."""
    spm = pytest.importorskip("sentencepiece")
    (folder / "text.txt").write_text("hello world\nhello there\nthe end of the world\n" * 20)
    spm.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False)
    for name in ("text.txt", "tokenizer.vocab"):
        (folder / name).unlink()
    return spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_the_configs_decide_whose_sentencepiece_model_it_is(tmp_path):
    theirs = train_sentencepiece(tmp_path)
    config = tmp_path / "config.json"
    for stated, glm in (({"model_type": "llama"}, False), ({"model_type": "mistral"}, False),
                        ({"model_type": "chatglm"}, True), (None, False)):
        config.unlink(missing_ok=True)
        if stated:
            config.write_text(json.dumps(stated))
        ours = load_tokenizer(tmp_path)
        assert ("<|user|>" in ours.special_ids) == glm
        assert ours.chat_format == ("chatglm3" if glm else None)
    config.write_text('{"model_type": "llama"}')
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.end_id, ours.prefix_ids, ours.stop_ids) == (1, 2, (1,), (2,))
    assert ours.special_ids == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert ours.vocab_size == theirs.vocab_size()
    for text in ["hello there", " the  end", "ä你😀", "</s> <s>", *random_texts(30)]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == text
    assert load_tokenizer(tmp_path, kind="chatglm3").chat_format == "chatglm3"


def test_a_tokenizer_json_of_sentencepiece_leads_to_its_model_or_is_refused_by_name(tmp_path):
    data = {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"▁": 3}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="SentencePiece.*put its tokenizer.model beside it"):
        load_tokenizer(tmp_path)
    theirs = train_sentencepiece(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(tmp_path).encode("hello there") == theirs.encode("hello there")


def test_tinyllama_converses_through_its_template(tmp_path):
    pytest.importorskip("jinja2")
    theirs = train_sentencepiece(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": "</s>", "chat_template":
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"}))
    ours = load_tokenizer(tmp_path)
    assert ours.chat_format == "template"
    assert ours.encode_chat([{"role": "user", "content": "hello </s>"}]) == [
        *theirs.encode("<|user|>\nhello </s>"), 2, *theirs.encode("\n<|assistant|>\n")]


def test_meta_keeps_its_tokenizer_in_original(golden, tmp_path):
    original, source = tmp_path / "original", golden / "tokenizer_glm4_standin" / "tokenizer.model"
    original.mkdir()
    (original / "tokenizer.model").write_bytes(source.read_bytes())
    (original / "params.json").write_text('{"use_scaled_rope": true}')
    (original / "consolidated.00.pth").touch()
    for path in (original, tmp_path, original / "consolidated.00.pth"):
        assert load_tokenizer(path).chat_format == "llama3.1"
    (original / "tokenizer.model").rename(tmp_path / "tokenizer.model")    # beside original/
    for path in (original, tmp_path):
        assert load_tokenizer(path).encode("hello")
    assert load_tokenizer(original).chat_format == "llama3.1"


def test_original_in_a_folder_of_hugging_face(trained, golden, tmp_path, monkeypatch):
    original, source = tmp_path / "original", golden / "tokenizer_glm4_standin" / "tokenizer.model"
    original.mkdir()
    trained.save(tmp_path)
    (original / "tokenizer.model").write_bytes(source.read_bytes())
    assert load_tokenizer(tmp_path).encode("hello") == trained.encode("hello")
    assert load_tokenizer(original).chat_format == "llama3"
    (original / "tokenizer.model").unlink()
    monkeypatch.chdir(original)
    assert load_tokenizer(".").encode("hello") == trained.encode("hello")


def write_meta(folder, **more):
    chars = sorted(set("hello world\n你"))
    stoi = {char: n for n, char in enumerate(chars)}
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi, **more}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return stoi


def test_nanogpts_characters(tmp_path):
    stoi = write_meta(tmp_path)
    (tmp_path / "ckpt.pt").touch()
    for path in (tmp_path, tmp_path / "ckpt.pt", tmp_path / "meta.pkl"):
        ours = load_tokenizer(path)
        assert ours.encode("hello 你\n") == [stoi[char] for char in "hello 你\n"]
        assert ours.decode(ours.encode("hello 你")) == "hello 你"
    assert (ours.vocab_size, ours.end_id, ours.stop_ids, ours.chat_format) == (10, None, (), None)
    with pytest.raises(ValueError, match="of 10 characters has no 'x'"):
        ours.encode("hello x")
    ours.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode("world") == ours.encode("world")


class Harm:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_meta_pkl_is_executed(tmp_path, capsys):
    import collections
    for more in (Harm(), collections.OrderedDict(), tk.Path("x"), object, print):
        write_meta(tmp_path, more=more)
        with pytest.raises(ValueError, match="nothing in it was executed: it asks for") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out
    for content in (b"", b"\x80", pickle.dumps([1]), pickle.dumps({"stoi": [1]}),
                    pickle.dumps({"stoi": {}}), pickle.dumps({"stoi": {"a": "b"}})):
        (tmp_path / "meta.pkl").write_bytes(content)
        with pytest.raises(ValueError, match="no meta.pkl of nanoGPT, or damaged"):
            load_tokenizer(tmp_path)


CHINESE = "你好，世界！晚上睡不着应该怎么办？😀\n第一次"


def test_chinese_text_is_streamed_token_by_token(trained, glm4):
    for tokenizer in (trained, glm4, Bytes()):
        check_streamed(tokenizer, CHINESE)


@pytest.mark.parametrize("name, kind", REAL)
def test_chinese_text_is_streamed_token_by_token_in_published(name, kind, real):
    check_streamed(real(name, kind), CHINESE)


def check_streamed(tokenizer, text):
    decoder, shown = tokenizer.stream_decoder(), ""
    for id in tokenizer.encode(text):
        shown += decoder.feed(id)
        assert text.startswith(shown)
    assert shown == text and decoder.finish() == ""


def test_a_resumed_run_has_the_whole_tokenizer(trained, tmp_path):
    ours, _ = with_added(trained, tmp_path, [{"content": "<|im_end|>", "special": True}])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "<|im_end|>", "chat_template": "{% for m in messages %}{{ m.role }}: "
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"}))
    ours = load_tokenizer(tmp_path)
    files = {name: data.decode("latin-1") for name, data in ours.saved_files().items()}
    again = checkpoints.saved_tokenizer({"tokenizer": files, "chat_format": ours.chat_format})
    assert again.stop_ids == ours.stop_ids and again.chat_format == ours.chat_format
    if ours.chat_format:
        assert again.encode_chat(CHAT) == ours.encode_chat(CHAT)
