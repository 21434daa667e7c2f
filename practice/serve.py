"""A page to talk with a model, and OpenAI's API for every program that speaks it.

    python -m practice.serve out/gpt-sft         then open http://127.0.0.1:8000
    python -m practice.serve DIR --port 9000 --weights int8 --system "Be brief."

    GET  /                       page.html: a conversation, kept in the browser
    GET  /v1/models              the one model there is here, and how many requests wait for it
    POST /v1/chat/completions    what the model says next, where it converses
    POST /v1/completions         how a text goes on; with "stream": true, as with the former, the
                                 tokens are sent as they are drawn

One answer is computed at a time, by the main thread, with the memory of the conversation before: a
client sends all messages each time, and only what is new is computed. Each connection has a thread
that reads the request, waits and writes. An answer ends at the next token once its client has gone.

A page of another site must not use this server through a visitor's browser. Its requests name its
own site, as Origin or, if its name was pointed at this address (DNS rebinding), as Host: both are
refused. Messages are data, as everywhere here: no control token comes out of them.
"""
import contextlib
import copy
import ipaddress
import json
import os
import queue
import select
import socket
import socketserver
import sys
import threading
import time
import traceback
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import chat
from checkpoints import is_out_of_memory
from flags import Parser, complain, number, show_any_text
from folder import LIMITS, possible

MAX_BODY = 4 << 20           # bytes of a request
MAX_PROMPT = 1 << 16         # tokens, where the model has no context that limits them
MAX_WAITING = 16             # requests, with the one that is being answered
MAX_CONNECTIONS = 64
SECONDS = 30                 # for a request to arrive whole, and for a client to take what is sent
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
           "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src "
           "'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; form-action "
           "'none'; frame-ancestors 'none'"}
# What would change an answer and is not there: name -> the value that asks for nothing
UNSUPPORTED = {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logprobs": False, "tools": [],
               "functions": [], "logit_bias": {}, "response_format": {"type": "text"},
               "frequency_penalty": 0, "presence_penalty": 0}


class Refused(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.status}}

# ---------------------------------------------------------------------------------- what is asked


@dataclass(eq=False)
class Job:
    """A request for an answer, and what becomes of it.

    events: ("text", more of the answer), then ("end", the last fields of a response); or, at any
    time, ("refused", a Refused)
    """
    chat: bool
    messages: list[dict]
    sampling: dict
    seed: int | None
    max_new_tokens: int | None
    stop_texts: list[str]
    stream: bool
    usage: bool                              # of a stream: with a last chunk that counts tokens
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)


def read_job(body: bytes, is_chat: bool, model: str) -> Job:
    """The job of a request's JSON; Refused with a sentence about the first thing wrong with it."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(asked, dict):
        raise Refused(400, "the body must be a JSON object")

    def take(name, kind, meaning, accept=lambda value: True):
        value = asked.get(name)
        if value is not None and not (type(value) is kind and accept(value)):
            raise Refused(400, f"{name} is {value!r:.60}, it must be {meaning}")
        return value
    if take("model", str, "text") not in (None, model):
        raise Refused(404, f"the model {asked['model']!r:.100} is not here; this is {model!r}")
    for name, nothing in UNSUPPORTED.items():
        if asked.get(name) not in (None, nothing):
            raise Refused(400, f"{name} is not supported here, only {json.dumps(nothing)}")
    for name, limits in LIMITS.items():
        if asked.get(name) is not None and not possible(name, asked[name]):
            raise Refused(400, f"{name} is {asked[name]!r:.60}, it must be {limits}")
    stop = [asked["stop"]] if isinstance(asked.get("stop"), str) else asked.get("stop") or []
    if not (isinstance(stop, list) and len(stop) <= 16
            and all(isinstance(text, str) and 0 < len(text) <= 1000 for text in stop)):
        raise Refused(400, "stop must be a text or a list of at most 16, none of them empty")
    limits = [take(name, int, "a whole number, at least 1", lambda value: value >= 1)
              for name in ("max_completion_tokens", "max_tokens")]
    options = take("stream_options", dict, "an object") or {}
    return Job(is_chat, read_messages(asked) if is_chat else read_prompt(asked),
               {name: asked[name] for name in LIMITS if asked.get(name) is not None},
               take("seed", int, "a whole number from 0 to 2^62", lambda n: 0 <= n <= 2 ** 62),
               min(filter(None, limits), default=None), stop,
               bool(take("stream", bool, "true or false")), bool(options.get("include_usage")))


def read_messages(asked: dict) -> list[dict]:
    """[{"role", "content", ...}, ...] with contents as text, and without what the API has beside.

    "ids" least of all: a Conversation believes in them, and a client could write control tokens.
    """
    messages, read = asked.get("messages"), []
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list of at least one")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, f"message {n} must be an object with a role and content")
        content = message.get("content")
        if isinstance(content, list) and all(
                isinstance(part, dict) and part.get("type") == "text"
                and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise Refused(400, f"message {n}: content must be text, or parts of type text")
        role = "system" if message["role"] == "developer" else message["role"]
        kept = {key: value for key, value in message.items() if key not in ("ids", "name")}
        read.append({**kept, "role": role, "content": content})
    if read[-1]["role"] == "assistant":
        raise Refused(400, "the last message is the assistant's: there is nothing to answer")
    return read


def read_prompt(asked: dict) -> list[dict]:
    """The text to continue, as a Conversation without a format keeps it."""
    prompt = asked.get("prompt")
    prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if not isinstance(prompt, str):
        raise Refused(400, "prompt must be one text")
    return [{"role": "user", "content": prompt}]

# ------------------------------------------------------------------------------- computing answers


class Desk:
    """Who waits, in order, and the two conversations that answer: one converses, one completes."""

    def __init__(self, conversation: chat.Conversation, stop_texts: list[str]):
        self.chat, self.text = conversation, copy.copy(conversation)
        if conversation.format:              # what ends a reply only does not end a text
            tokenizer = copy.copy(conversation.tokenizer)
            tokenizer.chat_format, self.text.format, self.text.stop_texts = None, None, stop_texts
            self.text.stops = (conversation.stops - {*conversation.tokenizer.stop_ids}
                               | {*tokenizer.stop_ids})
        self.text.reset(None)
        self.system, self.sampling = conversation.system, conversation.sampling
        self.seed, self.limit = conversation.seed, conversation.max_new_tokens
        self.stop_texts = {one: [*one.stop_texts] for one in (self.chat, self.text)}
        self.jobs, self.changed = [], threading.Condition()      # the first is being answered

    def add(self, job: Job) -> None:
        with self.changed:
            if len(self.jobs) >= MAX_WAITING:
                raise Refused(503, f"{MAX_WAITING} requests are waiting already: try again later")
            self.jobs.append(job)
            self.changed.notify()

    def remove(self, job: Job) -> None:
        """Forget a job that has ended or whose client has gone; being answered, it ends soon."""
        job.cancelled.set()
        with self.changed:
            if job in self.jobs[1:]:
                self.jobs.remove(job)

    def before(self, job: Job) -> int:
        """How many requests come before this one."""
        with self.changed:
            return self.jobs.index(job) if job in self.jobs else 0

    def work(self) -> None:
        """Answer one job after another until Ctrl-C."""
        while True:
            with self.changed:
                while not self.jobs:
                    self.changed.wait(1)     # Windows notices Ctrl-C between two waits
                job = self.jobs[0]
            try:
                if not job.cancelled.is_set():
                    self.answer(job)
            finally:
                with self.changed:
                    self.jobs.remove(job)

    def answer(self, job: Job) -> None:
        """Put the answer to one job, or why there is none, into its events."""
        conversation = self.chat if job.chat else self.text
        try:
            end = self.converse(conversation, job)
            job.events.put(("end", end))
        except Refused as refusal:
            job.events.put(("refused", refusal))
        except (ValueError, OSError, ImportError) as error:
            job.events.put(("refused", Refused(400, str(error))))
        except Exception as error:  # noqa: BLE001   a fault: the next answer may succeed
            conversation.reset(None)
            told = "out of memory: shorten the conversation"
            if not is_out_of_memory(error):
                told = "the server failed: its terminal says why"
                traceback.print_exc()
            job.events.put(("refused", Refused(500, told)))

    def converse(self, conversation: chat.Conversation, job: Job) -> dict:
        """Compute the answer; returns what ends the response: reason, usage, turns left out."""
        known = {m["content"]: m["ids"] for m in conversation.messages if "ids" in m}
        messages = [{**m, "ids": known[m["content"]]} if m["role"] == "assistant"
                    and m["content"] in known else m for m in job.messages]
        if self.system and job.chat and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        conversation.sampling = {**self.sampling, **job.sampling}
        conversation.seed = self.seed if job.seed is None else job.seed
        conversation.max_new_tokens = min(self.limit, job.max_new_tokens or self.limit)
        conversation.stop_texts = self.stop_texts[conversation] + job.stop_texts
        if conversation.context is None and len(conversation.render(messages)) > MAX_PROMPT:
            raise Refused(400, f"the prompt has more than {MAX_PROMPT:,} tokens: shorten it")
        shown = 0

        def show(reply):
            nonlocal shown
            if len(reply) > shown:
                job.events.put(("text", reply[shown:]))
                shown = len(reply)

        def is_ended(reply):                 # asked at each token
            return job.cancelled.is_set() or type(conversation).is_ended(conversation, reply)
        before, start = turns(messages), time.perf_counter()
        conversation.messages, conversation.is_ended = messages, is_ended
        cut = conversation.answer(None, show)
        if cut and cut.startswith("stopped"):        # Ctrl-C ends the answer, and the server
            raise KeyboardInterrupt
        drawn = len(conversation.times)
        seconds = time.perf_counter() - start
        prompt = len(conversation.seen) + 1 - drawn  # the last token drawn has not been read
        chat.say(f"[{'chat' if job.chat else 'text'}: {prompt} tokens, then {drawn} in "
                 f"{seconds:.1f} s{'; the client has gone' if job.cancelled.is_set() else ''}]")
        return {"finish_reason": "length" if cut else "stop",
                "dropped_turns": before - turns(conversation.messages),
                "usage": {"prompt_tokens": prompt, "completion_tokens": drawn,
                          "total_tokens": prompt + drawn}}


def turns(messages: list[dict]) -> int:
    return sum(message["role"] == "user" for message in messages)

# -------------------------------------------------------------------------------------------- HTTP


class Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0: the connection ends with the response, so a stream needs no frames."""
    timeout = SECONDS
    server_version, sys_version = "practice.serve", ""

    def setup(self):
        super().setup()                      # a timeout for each read, and one for all together
        self.deadline = threading.Timer(SECONDS, self.hang_up, [socket.SHUT_RD])
        self.deadline.daemon = True
        self.deadline.start()

    def finish(self):
        self.deadline.cancel()
        super().finish()

    def hang_up(self, how: int) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(how)

    def log_message(self, *args):
        """Answers are told by `Desk.converse`, and nothing else."""

    def send_error(self, code, message=None, explain=None):
        """The base class's errors (a broken request line, an unknown method), as JSON too."""
        self.send(code, Refused(code, message or "").body())

    def do_GET(self):
        self.respond(self.get)

    def do_POST(self):
        self.respond(self.post)

    def respond(self, act) -> None:
        """Do what is asked, or say why not."""
        try:
            body = self.read_body()
            self.deadline.cancel()
            self.check_site()
            act(unquote(urlsplit(self.path).path), body)
        except Refused as refusal:
            self.send(refusal.status, refusal.body())

    def read_body(self) -> bytes:
        """The body of a POST: its length must be told, and within the limit."""
        length = self.headers.get("Content-Length", "0" if self.command == "GET" else "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise Refused(411, "a body needs its Content-Length")
        if len(length) > 12 or int(length) > MAX_BODY:
            self.drain()
            raise Refused(413, f"the body has {length:.12} bytes, the limit is {MAX_BODY}")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(400, f"the body ended after {len(body)} of {length} bytes")
        return body

    def drain(self) -> None:
        """Read on for a while: a connection closed on unread bytes is reset, its response lost."""
        end = time.monotonic() + 1
        self.connection.settimeout(1)
        with contextlib.suppress(OSError):
            while time.monotonic() < end and self.rfile.read1(1 << 16):
                pass
        self.connection.settimeout(SECONDS)

    def check_site(self) -> None:
        """Refuse what a page of another site makes a browser send."""
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        try:
            name = urlsplit(f"//{hosts[0]}").hostname if len(hosts) == 1 else None
        except ValueError:
            name = None
        if not self.server.is_own(name or ""):
            raise Refused(403, f"the Host {', '.join(hosts)!r:.100} is not this server's: open "
                               f"{self.server.url}")
        if origin is not None and origin.lower() != f"http://{hosts[0]}".lower():
            raise Refused(403, f"requests from the site {origin!r:.100} are refused")

    def get(self, path: str, body: bytes) -> None:
        about = self.server.about()
        if path == "/":
            self.send(200, self.server.page, "text/html; charset=utf-8")
        elif path == "/v1/models":
            self.send(200, {"object": "list", "data": [about]})
        elif path == f"/v1/models/{about['id']}":
            self.send(200, about)
        else:
            raise Refused(404, f"there is no {path!r:.100} here")

    def post(self, path: str, body: bytes) -> None:
        is_chat, desk = path == "/v1/chat/completions", self.server.desk
        if not is_chat and path != "/v1/completions":
            raise Refused(404, f"there is no {path!r:.100} here")
        if self.headers.get_content_type() != "application/json":       # a form of another site
            raise Refused(415, "the Content-Type must be application/json")
        if is_chat and desk.chat.format is None:
            raise Refused(400, "this model completes text, it does not converse: POST "
                               "/v1/completions, or start the server with --chat FORMAT")
        job = read_job(body, is_chat, self.server.model)
        desk.add(job)
        try:
            (self.stream if job.stream else self.answer)(job)
        finally:
            desk.remove(job)

    def send(self, status: int, content, kind: str = "application/json") -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_head(status, kind, **{"Content-Length": len(data)})
        self.wfile.write(data)

    def send_head(self, status: int, kind: str, **more) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS, **more}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def events(self, job: Job):
        """What becomes of a job, as it happens; ("waits", how many are before it) each second in
        which nothing does. Ends the connection's thread if the client has gone."""
        kind = None
        while kind != "end":
            try:
                kind, value = job.events.get(timeout=1)
            except queue.Empty:
                kind, value = "waits", self.server.desk.before(job)
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError
            if kind == "refused":
                raise value
            yield kind, value

    def answer(self, job: Job) -> None:
        """The whole answer in one response."""
        text = ""
        for kind, value in self.events(job):
            text += value if kind == "text" else ""
        choice = ({"message": {"role": "assistant", "content": text}} if job.chat
                  else {"text": text, "logprobs": None})
        self.send(200, {**self.frame(job), "choices": [
            {"index": 0, **choice, "finish_reason": value.pop("finish_reason")}], **value})

    def stream(self, job: Job) -> None:
        """The answer as server-sent events; who waits is told its place in comments."""
        frame, begun = self.frame(job, ".chunk" * job.chat), False

        def send(choices, **more):
            line = json.dumps({**frame, "choices": choices, **more})
            self.wfile.write(f"data: {line}\n\n".encode())

        def send_text(text, reason=None, **more):
            part = ({"delta": {"role": "assistant", "content": text} if text else {}} if job.chat
                    else {"text": text, "logprobs": None})
            send([{"index": 0, **part, "finish_reason": reason}], **more)
        try:
            for kind, value in self.events(job):
                if not begun:
                    self.send_head(200, "text/event-stream")
                    begun = True
                if kind == "text":
                    send_text(value)
                elif kind == "waits":
                    self.wfile.write(f": {value} before this\n\n".encode())
            usage = value.pop("usage")
            send_text("", value.pop("finish_reason"), **value)
            if job.usage:
                send([], usage=usage)
        except Refused as refusal:           # no status can be sent once the stream has begun
            if not begun:
                raise
            self.wfile.write(f"data: {json.dumps(refusal.body())}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def frame(self, job: Job, kind: str = "") -> dict:
        """What each response of the API begins with."""
        name, short = ("chat.completion", "chatcmpl") if job.chat else ("text_completion", "cmpl")
        return {"id": f"{short}-{uuid.uuid4().hex}", "object": name + kind,
                "created": int(time.time()), "model": self.server.model}


class Server(ThreadingHTTPServer):
    """Listens from the beginning, answers once `desk` is there."""
    block_on_close, allow_reuse_address = False, os.name != "nt"        # Windows: port theft
    request_queue_size = MAX_CONNECTIONS
    BUSY = b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"

    def __init__(self, host: str, port: int, model: str):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.slots = threading.Semaphore(MAX_CONNECTIONS)
        self.model, self.started, self.desk = model, int(time.time()), None
        self.page = Path(__file__).with_name("page.html").read_bytes()
        self.names = {"localhost", host.lower()}
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error} "
                          "(--port takes another one)") from None
        shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
        self.names.add(shown.lower())
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{self.server_address[1]}"

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)     # HTTPServer's looks the name up, maybe long

    def is_own(self, name: str) -> bool:
        """Whether a Host is this server: of a number, no DNS entry can have led here."""
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name))
        return name in self.names

    def about(self) -> dict:
        """The model, as the API lists it, and what the page needs to know of it."""
        desk = self.desk
        return {"id": self.model, "object": "model", "created": self.started, "owned_by": "you",
                "chat_format": desk.chat.format, "context": desk.chat.context,
                "system": desk.system, "sampling": desk.sampling, "max_new_tokens": desk.limit,
                "waiting": len(desk.jobs)}

    def process_request(self, request, client_address):
        if self.slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            with contextlib.suppress(OSError):
                request.sendall(self.BUSY)
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request, client_address):
        """A client that goes, or reads too slowly, is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

# ----------------------------------------------------------------------------------- command line


def parse(argv: list[str] | None):
    """chat.py's settings, and where to listen."""
    parser = Parser(prog="practice.serve", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen here: "
                        "0.0.0.0 lets every machine that reaches this one use it (127.0.0.1)")
    parser.add_argument("--port", type=number(int, 0, 65535), default=8000, metavar="N",
                        help="listen there; 0: on a free one (8000)")
    args = chat.parse(argv, parser)
    for name in ("inspect", "prompt", "input", "output"):
        if vars(args)[name]:
            parser.error(f"--{name} is for chat.py")
    return args


def serve(args) -> None:
    """Load the model and answer until Ctrl-C."""
    weights = Path(args.weights).resolve()
    server = Server(args.host, args.port, weights.stem if weights.is_file() else weights.name)
    with server:
        server.desk = Desk(chat.open_conversation(args), args.stop)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        chat.say(f"open       {server.url} in a browser; other programs: OpenAI's API at "
                 f"{server.url}/v1, any key. Ctrl-C ends")
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            chat.say(f"WARNING    --host {args.host}: whoever reaches this machine can use it, "
                     "and nothing is encrypted")
        try:
            server.desk.work()
        finally:
            server.shutdown()


def main(argv: list[str] | None = None) -> None:
    """`python -m practice.serve`: a user's mistake is one line and exit status 2."""
    args = parse(argv)
    show_any_text()
    try:
        serve(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(complain(f"practice.serve: {error}"))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(complain("practice.serve: out of memory: --weights int8 needs less"))
    except KeyboardInterrupt:
        chat.say("\n[ended]")


if __name__ == "__main__":
    main()
