"""tokenizer.py: the official codes' ids, text stays data, what is saved opens elsewhere."""

import hashlib
import json
import pickle
import random
import sys

import pytest

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
        "### Input:\n1 2\n\n### Response:3<|endoftext|>"
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
