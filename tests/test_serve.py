"""practice/serve.py: OpenAI's API, the queue, what is refused, and that nothing is left behind."""
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import ROOT, assert_one_line_error, continuation, run_here
from test_chat import TEXT, make_model, write_world

import chat
from practice import serve
from tokenizer import Bytes, train_bpe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny checkpoints: one that converses, one that completes text, and one without a context."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("talks", "plain", "world")}
    for kind, tokenizer in (("talks", train_bpe([TEXT], 340)), ("plain", Bytes())):
        tokenizer.chat_format = "alpaca" if kind == "talks" else None
        make_model("gpt", tokenizer.vocab_size).save_pretrained(made[kind])
        tokenizer.save(made[kind])
    write_world(made["world"])
    make_model("rwkv6", 273).save_pretrained(made["world"])
    return made


class Started:
    """A server in this process. Its answers are computed by a thread, the test is in the main one."""

    def __init__(self, folder, *flags):
        args = serve.parse([str(folder), "--port", "0", "--device", "cpu", "--fast", "off",
                            "--temperature", "0", "--max-new-tokens", "12", *flags])
        self.server = serve.Server(args.host, args.port, folder.name)
        self.conversation = chat.open_conversation(args)
        self.desk = self.server.desk = serve.Desk(self.conversation, args.stop)
        self.port, self.paused = self.server.server_address[1], threading.Event()
        self.paused.set()
        answer = self.desk.answer

        def wait_and_answer(job):
            self.paused.wait()
            answer(job)
        self.desk.answer = wait_and_answer
        for target in (self.server.serve_forever, self.desk.work):
            threading.Thread(target=target, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def request(self, path, body=None, method=None, **headers):
        """(status, the response as JSON or, of a stream, as a list of its events)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, data,
                           {"Content-Type": "application/json", **names})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        if response.headers["Content-Type"] == "application/json":
            return response.status, json.loads(text)
        return response.status, [event for event in text.split("\n\n") if event]

    def chat(self, *contents, **more):
        """The response to a conversation whose turns are these."""
        messages = [{"role": ("user", "assistant")[n % 2], "content": content}
                    for n, content in enumerate(contents)]
        return self.request("/v1/chat/completions", {"messages": messages, **more})

    def send(self, text: bytes):
        """A socket on which this much of a request was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(text)
        return connection

    def post(self, path, body) -> socket.socket:
        data = json.dumps(body).encode()
        return self.send(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n%s" % (path.encode(), len(data), data))


@pytest.fixture(autouse=True)
def without_signals(monkeypatch):
    """Only a main thread can take Ctrl-C; here the answers are computed by another one."""
    monkeypatch.setattr(chat, "between_tokens", lambda: contextlib.nullcontext([]))


@pytest.fixture(scope="module")
def servers(folders):
    made = {kind: Started(folder) for kind, folder in folders.items()}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture
def talks(servers):
    return servers["talks"]


def eventually(condition, seconds=10):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen in time"
        time.sleep(0.02)


def streamed(events):
    """(the text, the last chunk with a choice, all chunks) of a stream's events."""
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]
              if not event.startswith(":")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice.get("text") or choice.get("delta", {}).get("content", "")
                   for choice in choices)
    return text, choices[-1], chunks


def error_of(answer):
    status, body = answer
    assert {*body["error"]} == {"message", "type", "param", "code"}
    return status, body["error"]["message"]


# --- answers ---


def test_an_answer_is_what_chat_py_says(talks, folders):
    status, body = talks.chat("Hello there!")
    own = chat.open_conversation(chat.parse([
        str(folders["talks"]), "--device", "cpu", "--fast", "off", "--temperature", "0",
        "--max-new-tokens", "12"]))
    shown = []
    own.answer("Hello there!", shown.append)
    assert status == 200 and body["object"] == "chat.completion"
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": shown[-1]} and shown[-1]
    prompt = own.tokenizer.encode_chat([{"role": "user", "content": "Hello there!"}])
    assert body["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": len(own.times),
                             "total_tokens": len(prompt) + len(own.times)}


def test_a_stream_adds_up_to_the_answer_and_ends_as_it_does(talks):
    whole = talks.chat("Hello there!")[1]
    status, events = talks.chat("Hello there!", stream=True,
                                stream_options={"include_usage": True})
    text, last, chunks = streamed(events)
    assert status == 200 and text == whole["choices"][0]["message"]["content"] and len(chunks) > 3
    assert last["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_text_goes_on_as_its_model_continues_it(servers):
    model = servers["plain"].conversation.model
    expected = Bytes().decode(continuation(model, [*b"Hello"], 12))
    status, body = servers["plain"].request("/v1/completions", {"prompt": "Hello"})
    assert status == 200 and body["choices"][0]["text"] == expected
    status, events = servers["plain"].request("/v1/completions", {"prompt": ["Hello"],
                                                                  "stream": True})
    assert streamed(events)[0] == expected


def test_a_model_that_converses_completes_text_too_without_its_format(servers):
    for kind in ("talks", "world"):
        one = servers[kind].conversation
        prompt = [*one.tokenizer.prefix_ids, *one.tokenizer.encode("Hello there")]
        ids = continuation(one.model, prompt, 12)
        status, body = servers[kind].request("/v1/completions", {"prompt": "Hello there"})
        text = body["choices"][0]["text"]
        assert status == 200 and one.tokenizer.decode(ids).startswith(text) and text
        assert servers[kind].desk.text.format is None and one.format


def test_a_model_that_completes_says_so_to_who_converses(servers):
    status, message = error_of(servers["plain"].chat("Hi"))
    assert status == 400 and "/v1/completions" in message and "--chat" in message


def test_a_conversation_that_is_sent_whole_computes_only_what_is_new(talks, monkeypatch):
    first = talks.chat("Hello there!")[1]["choices"][0]["message"]["content"]
    known, counts, hidden = len(talks.conversation.seen), [], talks.conversation.model.hidden

    def counted(tokens, state=None):
        counts.append(tokens.shape[1])
        return hidden(tokens, state)
    monkeypatch.setattr(talks.conversation.model, "hidden", counted)
    status, body = talks.chat("Hello there!", first, "And why?")
    assert status == 200 and sum(counts) == len(talks.conversation.seen) - known
    assert body["usage"]["prompt_tokens"] > known


def test_settings_of_a_request_count_for_it_alone(talks):
    usual = talks.chat("Hello")[1]["choices"][0]
    text = usual["message"]["content"]
    [short] = talks.chat("Hello", max_tokens=3)[1]["choices"]
    assert short["finish_reason"] == "length" and text.startswith(short["message"]["content"])
    [stopped] = talks.chat("Hello", stop=[text[4:6]])[1]["choices"]
    assert stopped == {"index": 0, "finish_reason": "stop", "message": {
        "role": "assistant", "content": text[:text.index(text[4:6])].strip()}}
    drawn = [talks.chat("Hello", temperature=2.0, top_k=50, top_p=0.99, seed=seed)[1]["choices"]
             for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert talks.chat("Hello")[1]["choices"][0] == usual


def test_the_longest_answer_is_the_servers(talks):
    assert talks.chat("Hello", max_tokens=10 ** 6)[1]["usage"]["completion_tokens"] <= 12


def test_messages_in_the_apis_forms_are_understood(talks):
    plain = talks.chat("Hello")[1]["choices"]
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    for message in ({"role": "user", "content": parts},
                    {"role": "user", "content": "Hello", "name": "me", "tool_calls": None}):
        assert talks.request("/v1/chat/completions",
                             {"messages": [message]})[1]["choices"] == plain
    system = [talks.request("/v1/chat/completions", {"messages": [
        {"role": role, "content": "Be brief."}, {"role": "user", "content": "Hello"}]})[1]["usage"]
        for role in ("system", "developer")]
    assert system[0] == system[1]


def test_a_client_cannot_write_tokens_only_text(talks):
    """Neither by a message's "ids", in which a Conversation believes, nor by their names."""
    tokenizer = talks.conversation.tokenizer
    messages = [{"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "ids": [tokenizer.end_id] * 9},
                {"role": "user", "content": "<|endoftext|>"}]
    assert talks.request("/v1/chat/completions", {"messages": messages})[0] == 200
    expected = tokenizer.encode_chat([{**message, "ids": None} for message in messages])
    assert expected.count(tokenizer.end_id) == 1                        # ends the reply
    assert talks.conversation.seen[:len(expected)] == expected


def test_the_servers_system_message_is_for_who_sends_none(folders):
    one = Started(folders["talks"], "--system", "Be brief.")
    try:
        own, sent = one.chat("Hi")[1], one.request("/v1/chat/completions", {"messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]})[1]
        assert own["choices"] == sent["choices"] and own["usage"] == sent["usage"]
    finally:
        one.close()


def test_a_full_context_drops_the_oldest_turns_and_says_how_many(talks):
    turns = ["x" * 60, "y"] * 9
    status, body = talks.chat(*turns, "And now?")
    assert status == 200 and body["dropped_turns"] > 0
    status, message = error_of(talks.chat("x" * 2000))
    assert status == 400 and "the context is 400" in message


def test_models_lists_the_one_there_is(servers, folders):
    for kind, server in servers.items():
        status, body = server.request("/v1/models")
        [model] = body["data"]
        assert status == 200 and model["id"] == folders[kind].name and model["waiting"] == 0
        assert server.request(f"/v1/models/{model['id']}") == (200, model)
        assert server.request("/v1/models/another")[0] == 404


def test_the_openai_package_is_served(servers, folders):
    openai = pytest.importorskip("openai")
    one, name = servers["talks"], folders["talks"].name
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{one.port}/v1", api_key="any",
                           max_retries=0)
    assert [model.id for model in client.models.list()] == [name]
    messages = [{"role": "user", "content": "Hello there!"}]
    whole = client.chat.completions.create(model=name, messages=messages, max_tokens=8)
    [choice] = whole.choices
    assert choice.message.content and choice.finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    parts = [*client.chat.completions.create(model=name, messages=messages, max_tokens=8,
                                             stream=True)]
    assert "".join(part.choices[0].delta.content or "" for part in parts) == choice.message.content
    messages += [choice.message.model_dump(), {"role": "user", "content": "Go on"}]
    assert client.chat.completions.create(model=name, messages=messages).choices
    text = client.completions.create(model=name, prompt="Hello", max_tokens=5)
    parts = client.completions.create(model=name, prompt="Hello", max_tokens=5, stream=True)
    assert "".join(part.choices[0].text for part in parts) == text.choices[0].text
    with pytest.raises(openai.NotFoundError, match="is not here"):
        client.chat.completions.create(model="gpt-4", messages=messages)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=name, prompt="a", temperature=-1)


# --- the page ---


def test_the_page_is_one_file_that_asks_no_other_site(talks):
    connection = http.client.HTTPConnection("127.0.0.1", talks.port, timeout=60)
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read().decode()
    assert response.status == 200 and response.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
    assert "</html>" in page and "http://" not in page and "https://" not in page
    assert "innerHTML" not in page              # what a model writes is text
    connection.close()


class Browser:
    """A headless Chromium, told what to do through two pipes in the DevTools protocol."""

    def __init__(self, program, profile):
        reads, self.writer = os.pipe()
        self.reader, writes = os.pipe()

        def connect():                          # Chromium reads from 3 and writes to 4
            os.dup2(os.dup(reads), 3)
            os.dup2(os.dup(writes), 4)
        self.process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", "--window-size=1000,700", "about:blank"],
            preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(reads)
        os.close(writes)
        self.number, self.session, self.rest = 0, None, b""
        [page] = [target for target in self.do("Target.getTargets")["targetInfos"]
                  if target["type"] == "page"]
        self.session = self.do("Target.attachToTarget", targetId=page["targetId"],
                               flatten=True)["sessionId"]

    def do(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                if not (data := os.read(self.reader, 1 << 16)):
                    raise EOFError("Chromium has ended")
                self.rest += data
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script):
        """The value of an expression in the page."""
        answer = self.do("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url):
        self.run("window.before = true")        # gone once the new page is there
        self.do("Page.navigate", url=url)
        eventually(lambda: self.run("!window.before && document.title !== '' && "
                                    "document.title !== 'A model to talk to'"))

    def type(self, text):
        self.run("document.getElementById('input').focus()")
        self.do("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter",
                    windowsVirtualKeyCode=13, text="\r" if kind == "keyDown" else "")

    def texts(self, selector):
        return self.run(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def browser(tmp_path):
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program or os.name == "nt":
        pytest.skip("needs chromium")
    browser = Browser(program, tmp_path)
    yield browser
    browser.close()


@pytest.mark.slow
def test_in_a_browser_one_talks_stops_and_finds_the_conversation_again(servers, browser):
    talks, url = servers["talks"], f"http://127.0.0.1:{servers['talks'].port}/"
    browser.open(url)
    expected = talks.chat("Hello there!")[1]["choices"][0]["message"]["content"]
    browser.type("Hello there!")
    eventually(lambda: any("tokens" in note for note in browser.texts(".note")))
    assert browser.texts(".message") == ["Hello there!", expected]
    browser.type("<b>Bold?</b> `code`")         # code is marked, HTML is text
    eventually(lambda: len(browser.texts(".note")) == 2 and "tokens" in browser.texts(".note")[1])
    assert browser.texts(".user") == ["Hello there!", "<b>Bold?</b> code"]
    assert browser.texts(".user code") == ["code"]
    assert browser.run("document.querySelectorAll('#messages b').length") == 0
    kept = browser.texts(".message")
    browser.open(url)
    eventually(lambda: browser.texts(".message") == kept)
    talks.paused.clear()                        # who waits is told, and can stop
    try:
        browser.type("And now?")
        eventually(lambda: any("reads" in note for note in browser.texts(".note")))
        assert browser.texts("#send") == ["Stop"]
        browser.run("document.getElementById('send').click()")
        eventually(lambda: browser.texts("#send") == ["Send"])
        assert "Stopped." in browser.texts(".note") and browser.texts("#settings[open]") == []
    finally:
        talks.paused.set()
    eventually(lambda: not talks.desk.jobs)


@pytest.mark.slow
def test_in_a_browser_a_text_goes_on(servers, browser):
    browser.open(f"http://127.0.0.1:{servers['plain'].port}/")
    assert "completes text" in browser.texts("#about")[0]
    browser.type("Hello")
    eventually(lambda: any("tokens" in note for note in browser.texts(".note")))
    first = browser.texts(".message")
    assert first[0] == "Hello" and first[1]
    browser.type("")                            # once more
    eventually(lambda: len(browser.texts(".message")) == 3)


# --- the queue ---


def test_who_waits_is_told_its_place_and_is_answered_in_order(talks):
    talks.paused.clear()
    connections = [talks.post("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "Hi"}], "stream": True}) for _ in range(3)]
    try:
        eventually(lambda: len(talks.desk.jobs) == 3)
        assert talks.request("/v1/models")[1]["data"][0]["waiting"] == 3
        order, told = [*talks.desk.jobs], []
        for connection in connections:
            received = b""
            while b"before this" not in received:
                received += connection.recv(4096)
            told.append(int(received.split(b"\n: ")[1].split(b" before")[0]))
        assert sorted(told) == [0, 1, 2] and [talks.desk.before(job) for job in order] == [0, 1, 2]
    finally:
        talks.paused.set()
    for connection in connections:
        with connection.makefile("rb") as file:
            assert file.read().endswith(b"data: [DONE]\n\n")
        connection.close()


def test_a_full_queue_says_so_at_once(talks, monkeypatch):
    monkeypatch.setattr(serve, "MAX_WAITING", 1)
    talks.paused.clear()
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    try:
        with contextlib.closing(talks.post("/v1/chat/completions", body)):
            eventually(lambda: len(talks.desk.jobs) == 1)
            status, message = error_of(talks.chat("Hi"))
            assert status == 503 and "waiting" in message
    finally:
        talks.paused.set()
    eventually(lambda: not talks.desk.jobs)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_goes(folders, stream):
    one = Started(folders["world"], "--max-new-tokens", "100000")
    try:
        connection = one.post("/v1/completions", {"prompt": "Hello", "stream": stream})
        eventually(lambda: len(one.desk.text.times) > 3)
        connection.close()
        eventually(lambda: not one.desk.jobs)
        assert 3 < len(one.desk.text.times) < 100000
        assert one.request("/v1/completions", {"prompt": "Hello", "max_tokens": 3})[0] == 200
    finally:
        one.close()


def test_a_request_whose_client_goes_while_it_waits_is_never_computed(talks, monkeypatch):
    answer, answered = talks.desk.answer, []
    monkeypatch.setattr(talks.desk, "answer", lambda job: (answered.append(job), answer(job)))
    talks.paused.clear()
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    try:
        first = talks.post("/v1/chat/completions", body)
        eventually(lambda: len(talks.desk.jobs) == 1)
        second = talks.post("/v1/chat/completions", body)
        eventually(lambda: len(talks.desk.jobs) == 2)
        second.close()
        eventually(lambda: len(talks.desk.jobs) == 1)
    finally:
        talks.paused.set()
        first.close()
    eventually(lambda: not talks.desk.jobs)
    assert len(answered) == 1


# --- what is refused ---


BAD = {
    b"": "not JSON", b"{": "not JSON", b"\xff\xfe": "not JSON", b"[" * 100_000: "not JSON",
    b"[]": "must be a JSON object", b"{}": "messages must be a list",
    b'{"messages": []}': "messages must be a list", b'{"messages": [1]}': "message 0",
    b'{"messages": [{"role": "user"}]}': "content must be text",
    b'{"messages": [{"role": "king", "content": "a"}]}': "needs a role",
    b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "parts of type text",
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}':
        "nothing to answer",
}
BAD_SETTINGS = {
    '"temperature": -1': "temperature", '"temperature": NaN': "temperature",
    '"temperature": "hot"': "temperature", '"temperature": Infinity': "temperature",
    '"top_k": 0': "top_k", '"top_p": 2': "top_p", '"max_tokens": 0': "max_tokens",
    '"max_tokens": 1.5': "max_tokens", '"seed": -1': "seed", '"seed": 1e3': "seed",
    '"stop": [""]': "stop", '"stop": 3': "stop", '"stream": 1': "stream", '"n": 2': "n is not",
    '"tools": [{}]': "tools is not", '"logprobs": true': "logprobs is not", '"model": 4': "model",
    '"response_format": {"type": "json_object"}': "response_format",
}


@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
def test_a_broken_body_gets_one_sentence(talks, body):
    status, message = error_of(talks.request("/v1/chat/completions", body))
    assert status == 400 and BAD[body] in message and len(message) < 400


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_an_impossible_or_unsupported_setting_gets_one_sentence(talks, setting):
    body = '{"messages": [{"role": "user", "content": "a"}], ' + setting + "}"
    status, message = error_of(talks.request("/v1/chat/completions", body.encode()))
    assert status == 400 and BAD_SETTINGS[setting] in message and "\n" not in message


def test_settings_that_ask_for_nothing_are_taken(talks):
    nothing = {**serve.UNSUPPORTED, "user": "me", "stop": None, "seed": None, "tool_choice": "none"}
    assert talks.chat("Hi", **nothing)[0] == 200


def test_what_is_not_there_is_404(talks):
    assert talks.request("/v1/embeddings", {"input": "a"})[0] == 404
    assert talks.request("/../chat.py")[0] == 404
    assert error_of(talks.chat("Hi", model="gpt-4"))[0] == 404


def test_a_body_must_tell_its_length_and_keep_to_it(talks, monkeypatch):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for length, expected in ((b"", b" 411 "), (b"Content-Length: -1\r\n", b" 411 "),
                             (b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n", b" 411 "),
                             (b"Content-Length: 99999999999999999999\r\n", b" 413 ")):
        with contextlib.closing(talks.send(head + length + b"\r\n{}")) as connection:
            assert expected in connection.recv(100), length
    with contextlib.closing(talks.send(head + b"Content-Length: 9\r\n\r\n{}")) as connection:
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(4096), b""))
        assert b" 400 " in received and b"2 of 9 bytes" in received
    monkeypatch.setattr(serve, "MAX_BODY", 100)
    status, message = error_of(talks.chat("x" * 100_000))
    assert status == 413 and "the limit is 100" in message


def test_a_prompt_without_a_context_has_a_limit(servers, monkeypatch):
    monkeypatch.setattr(serve, "MAX_PROMPT", 50)
    status, message = error_of(servers["world"].request("/v1/completions", {"prompt": "x" * 60}))
    assert status == 400 and "50 tokens" in message


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example",
                                  "127.0.0.1.evil.example", "", "a b", "[::1", "user@localhost@x"])
def test_a_name_that_was_pointed_at_this_server_is_refused(talks, host):
    """DNS rebinding: the page of another site, whose name now leads here, in a visitor's browser."""
    for path in ("/", "/v1/models"):
        status, message = error_of(talks.request(path, Host=host))
        assert status == 403 and "is not this server's" in message


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8000"])
def test_this_servers_own_names_are_served_through_any_port(talks, host):
    assert talks.request("/v1/models", Host=host)[0] == 200
    assert talks.request("/v1/models", Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost",
                                    "http://localhost:3000", "http://127.0.0.1", ""])
def test_requests_of_other_sites_are_refused(talks, origin):
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    status, message = error_of(talks.request("/v1/chat/completions", body, Origin=origin))
    assert status == 403 and "site" in message
    status, message = error_of(talks.request("/v1/chat/completions", body,
                                             Content_Type="text/plain"))
    assert status == 415 and "application/json" in message


def test_a_request_that_does_not_arrive_is_not_waited_for(talks, monkeypatch):
    monkeypatch.setattr(serve, "SECONDS", 0.5)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    begun = time.time()
    for text in (b"", b"GET / HTT", head):
        with contextlib.closing(talks.send(text)) as connection:
            b"".join(iter(lambda: connection.recv(4096), b""))      # ends: the server hung up
    assert time.time() - begun < 10


def test_a_fault_costs_one_answer_and_is_told_without_its_inside(talks, monkeypatch, capsys):
    def fail(*args, **more):
        raise ZeroDivisionError("secret")
    with monkeypatch.context() as broken:
        broken.setattr(talks.conversation.model, "generate", fail)
        status, message = error_of(talks.chat("Hi"))
        assert status == 500 and "secret" not in message and "secret" in capsys.readouterr().err
        broken.setattr(talks.conversation.model, "generate", lambda *a, **m: (_ for _ in ()).throw(
            torch.OutOfMemoryError("CUDA out of memory")))
        assert "out of memory" in error_of(talks.chat("Hi"))[1]
    assert talks.chat("Hi")[0] == 200


def test_an_error_within_a_stream_is_an_event_of_it(talks, monkeypatch):
    def fail(prompts, limit, *, on_token, **more):
        on_token(0, 72)
        raise ValueError("the logits hold NaN")
    monkeypatch.setattr(talks.conversation.model, "generate", fail)
    status, events = talks.chat("Hi", stream=True)
    assert status == 200 and events[-1] == "data: [DONE]"
    assert "NaN" in json.loads(events[-2].removeprefix("data: "))["error"]["message"]


# --- the command ---


@pytest.mark.slow
def test_the_command_listens_only_here_says_where_and_ends_with_ctrl_c(folders):
    command = [sys.executable, "-m", "practice.serve", str(folders["world"]), "--port", "0",
               "--device", "cpu", "--fast", "off", "--temperature", "0", "--max-new-tokens",
               "1000000"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # a child inherits "ignore"
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    signal.signal(signal.SIGINT, before)
    try:
        lines = []
        while not lines or not lines[-1].startswith("open "):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        port = int(lines[-1].split("127.0.0.1:")[1].split()[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "Hi", "stream": True}),
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        process.send_signal(signal.SIGINT)      # while it answers
        assert process.wait(30) == 0
        told = process.stderr.read()
        assert "[ended]" in told and "Traceback" not in told
        response.close()
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_counts_also_where_the_client_goes_at_the_same_token(servers, monkeypatch):
    monkeypatch.setattr(chat, "between_tokens", lambda: contextlib.nullcontext([signal.SIGINT]))
    job = serve.read_job(b'{"prompt": "Hello"}', False, "any")
    job.cancelled.set()
    desk = serve.Desk(servers["plain"].conversation, [])
    with pytest.raises(KeyboardInterrupt):
        desk.answer(job)


def test_the_users_mistakes_are_one_line(folders):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        for flags, words in ((["--port", port], [port, "--port takes another"]),
                             (["--port", "70000"], ["at most 65535"]),
                             (["--prompt", "a"], ["--prompt is for chat.py"]),
                             (["--temprature", "1"], ["did you mean --temperature"])):
            assert_one_line_error(run_here(serve.main, folders["talks"], *flags),
                                  "practice.serve", *words)


@pytest.mark.slow
def test_two_hundred_requests_of_every_kind_leave_nothing_behind(folders, monkeypatch):
    """Answers, streams, streams cancelled, slow readers, broken bodies, half requests, at once."""
    monkeypatch.setattr(serve, "SECONDS", 2)
    one = Started(folders["talks"], "--max-new-tokens", "40")
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}

    def cancel():
        with contextlib.closing(one.post("/v1/chat/completions", body)) as connection:
            connection.recv(10)

    def read_slowly():
        with contextlib.closing(one.post("/v1/chat/completions", body)) as connection:
            for _ in range(10):
                connection.recv(20)
                time.sleep(0.05)

    def half():
        with contextlib.closing(one.send(b"POST /v1/completions HTTP/1.1\r\nHost: loc")):
            time.sleep(0.1)

    def ask():
        assert one.chat("Hi", max_tokens=4)[0] in (200, 503)
    kinds = [ask, cancel, read_slowly, half,
             lambda: one.chat("Hi", stream=True, max_tokens=4),
             lambda: one.request("/v1/chat/completions", b"{broken"), lambda: one.request("/")]
    handles = "/proc/self/fd"
    failures = []

    def work(worker):
        for n in range(worker, 203, 8):
            try:
                kinds[n % len(kinds)]()
            except Exception as error:  # noqa: BLE001   told by the main thread
                failures.append(f"{kinds[n % len(kinds)]}: {error!r}")
    try:
        one.chat("Hi", max_tokens=2)
        eventually(lambda: one.server.slots._value == serve.MAX_CONNECTIONS)
        before = (threading.active_count(),
                  len(os.listdir(handles)) if os.path.exists(handles) else 0)
        workers = [threading.Thread(target=work, args=[n]) for n in range(8)]
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join(120)
        assert not failures
        eventually(lambda: not one.desk.jobs and one.server.slots._value == serve.MAX_CONNECTIONS)
        eventually(lambda: before == (threading.active_count(), len(os.listdir(handles))
                                      if os.path.exists(handles) else 0))
        assert one.chat("Hi", max_tokens=2)[0] == 200
    finally:
        one.close()
