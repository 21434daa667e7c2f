"""Use a model: talk with it, give it one prompt, or have it answer a file of prompts.

    python chat.py out/gpt                       a run of train.py or finetune.py, or any checkpoint
    python chat.py out/gpt --prompt "def f"      one text, continued or answered
    python chat.py DIR --input prompts.jsonl --output answers.jsonl
    python chat.py DIR --inspect                 what DIR is taken for and why; nothing is loaded

DIR may be an adapter (LoRA), which is merged with its base. It converses if the folder says that
the model can (folder.py), else it completes text, and it says which and why; --chat decides
otherwise. What was said stays in the model's memory: a turn computes only what is new, and /save
keeps it for another day.

From the top: command line; a conversation; typing; files of prompts.
"""
import contextlib
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import tokenizer as text
from checkpoints import check_vocabulary, eos_tokens, is_out_of_memory, load_checkpoint, readable
from data import INVALID, read_rows
from flags import Parser, complain, show_any_text
from folder import LIMITS, Place, inspect, possible, stated_eos, told_format, told_sampling
from lora import load_merged
from practice import fast
from process import choose_device

HELP = """\
/help          this text
/reset         forget what was said, but not the system message
/system TEXT   set the system message (without TEXT: none); what was said is read again
/save FILE     write the conversation and the model's memory of it to a new file
/load FILE     go on with such a file
/quit          end, like Ctrl-D; Ctrl-C stops an answer (twice: at once)
A line that ends in \\ goes on with the next; lines between \"\"\" and \"\"\" are one message.
A message that begins with / needs a space before it. An empty line lets a text go on."""


def say(*words) -> None:
    """What is neither prompt nor answer goes to stderr."""
    print(*words, file=sys.stderr, flush=True)

# ------------------------------------------------------------------------------------ command line


def parse(argv: list[str] | None, parser: Parser | None = None):
    """The settings of a command line; exits with one line if they are impossible."""
    parser = parser or Parser(prog="chat.py", description=__doc__.split("\n")[0],
                              allow_abbrev=False)
    add = parser.add_argument
    add("weights", metavar="DIR", help="a checkpoint or an adapter: folder, file, or "
        "a name to be downloaded, as openai-community/gpt2")
    add("--base", metavar="DIR", help="where an adapter's base is, if not where its config says")
    add("--inspect", action="store_true", help="say what DIR is and needs, and end")
    add("--chat", choices=(*text.CHAT_FORMATS, "none"), help="converse so; none: complete text")
    add("--system", metavar="TEXT", help="system message of conversations")
    add("--prompt", metavar="TEXT", help="answer or continue this text, and end")
    add("--input", type=Path, metavar="FILE",
        help='answer these: rows {"prompt": ...} or {"messages": [...]}, as JSON lines or JSON')
    add("--output", type=Path, metavar="FILE.jsonl",
        help='the same rows with "response", in the same order; goes on from what is in it')
    add("--batch-size", type=int, default=8, metavar="N", help="rows of --input at once (8)")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="the longest answer (512)")
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end an answer before this text; may be given several times")
    add("--temperature", type=float, metavar="T", help="0: the likeliest token (without this "
        "flag, as without the next two: what generation_config.json says, else 0.8)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this mass")
    add("--seed", type=int, metavar="N", help="the same seed draws the same text")
    add("--tokenizer", metavar="PATH", help="if it is not beside the weights")
    add("--fast", choices=("auto", "off"), default="auto", help="linear layers by the operators "
        "that are quickest on this machine, measured once (auto), or torch's own (off)")
    add("--weights", dest="bits", choices=("int8", "int4"), help="quantise the weights: less "
        "memory and, where this is said, quicker")
    add("--draft", metavar="DIR", help="a smaller model of the same vocabulary, which proposes "
        "tokens that this one checks: speculative decoding")
    add("--lookup", action="store_true", help="speculative decoding with proposals from the text")
    add("--device", help="cuda, mps or cpu (without this flag: the first of them there is)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="if not as it is stored")
    args = parser.parse_args(argv)
    for wrong, message in (
            ((args.input is None) != (args.output is None), "--input and --output go together"),
            (args.input and args.prompt is not None, "--prompt and --input: give one of them"),
            (args.draft and args.lookup, "--draft and --lookup: give one of them"),
            (args.input and (args.draft or args.lookup), "--draft and --lookup are for one text at "
             "a time, not for --input"),
            (args.batch_size < 1, f"--batch-size {args.batch_size}: at least 1"),
            (args.max_new_tokens < 1, f"--max-new-tokens {args.max_new_tokens}: at least 1"),
            ("" in args.stop, "--stop: the text is empty"),
            *((not possible(name, value), f"--{name.replace('_', '-')} {value}: {LIMITS[name]}")
              for name in LIMITS if (value := vars(args)[name]) is not None)):
        if wrong:
            parser.error(message)
    return args


def open_conversation(args) -> "Conversation":
    """Load what the command line names, and say what was decided and why."""
    place = Place(args)
    if place.classifier:
        raise ValueError(place.classifier)
    tokenizer, _, why = place.load_tokenizer(args)
    sampling, note = place.sampling(args)
    device, dtype = choose_device(args.device), getattr(torch, args.dtype or "", None)
    if place.adapter:
        say(f"adapter    {place.adapter}, merged with its base {place.weights}")
        model = load_merged(place.adapter, place.weights, device, dtype)
    else:
        model = load_checkpoint(place.weights, device, dtype)
    config, like = model.config, next(model.parameters())
    check_vocabulary(config, tokenizer)
    say(f"model      {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters, {str(like.dtype).removeprefix('torch.')} on {like.device.type}, context "
        f"{config.context or 'without limit'}")
    say(told_format(tokenizer.chat_format, why))
    say(f"sampling   {told_sampling(sampling, note)}; at most {args.max_new_tokens} new tokens")
    say("linear     " + fast.accelerate(model, args.bits, args.fast))
    conversation = Conversation(model, tokenizer, sampling, args.max_new_tokens, args.seed)
    if args.draft or args.lookup:
        fast.refuse_recurrent(model)
        draft = load_checkpoint(args.draft, device, dtype) if args.draft else None
        if draft is not None:
            fast.accelerate(draft, None, args.fast)
        probabilities = sys.modules[type(model).__module__].probabilities
        conversation.speculation = fast.Speculation(probabilities, draft)
    conversation.stops |= stated_eos(*place.folders)
    conversation.stop_texts += args.stop
    conversation.reset(args.system)
    return conversation

# ---------------------------------------------------------------------------------- a conversation


class Stop(Exception):
    """Ends an answer between two tokens, where the memory is whole."""


@contextlib.contextmanager
def between_tokens():
    """Yields a list that Ctrl-C fills, for the answer to stop at; a second one stops at once."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def moved(model, old, size: int):
    """A state of `model` for `size` ids that remembers what `old` does."""
    new = model.new_state(1, size)
    for part, tensor in zip(old, new):
        if part.dim() != tensor.dim() or any(a > b for a, b in zip(part.shape, tensor.shape)):
            raise ValueError("this memory is of a model of another size")
        tensor[tuple(map(slice, part.shape))] = part.to(tensor)
    return new


class Conversation:
    """What was said, and the model's memory of it.

    messages   [{"role", "content"}, ...]; a reply also has "ids", as they were drawn
    state      the model's memory of the ids in `seen`; None: of nothing
    format     the chat format; None: messages are a text and how it goes on
    """

    def __init__(self, model, tokenizer, sampling: dict, max_new_tokens: int, seed=None):
        self.model, self.tokenizer = model, tokenizer
        self.sampling, self.max_new_tokens, self.seed = sampling, max_new_tokens, seed
        self.format, self.context = tokenizer.chat_format, model.config.context
        self.times = []                      # when each token of the last answer was drawn
        self.speculation = None              # what proposes tokens, see practice/fast.py
        self.stop_texts = ["\n\n"] if self.format == "world" else []    # answers end before them
        self.stops = {*tokenizer.stop_ids, *eos_tokens(model.config)}
        if self.format:                      # the id that ends a reply
            silence = [{"role": role, "content": ""} for role in ("user", "assistant")]
            self.end = tokenizer.chat_parts(silence)[-1][0][-1:]
        self.reset(None)

    def reset(self, system: str | None) -> None:
        """Begin anew, under this system message."""
        self.messages = [{"role": "system", "content": system}] if system else []
        self.state, self.seen = None, []

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else {"role": None}
        return first["content"] if first["role"] == "system" else None

    def render(self, messages: list[dict]) -> list[int]:
        """The ids of messages, up to where the model is to speak."""
        encode = self.tokenizer.encode
        if self.format is None:
            ids = [id for m in messages for id in m.get("ids") or encode(m["content"])]
            ids = [*self.tokenizer.prefix_ids, *ids]
            if not ids and self.tokenizer.end_id is None:
                raise ValueError("an empty text: this vocabulary has no token to begin one with")
            return ids or [self.tokenizer.end_id]
        plain = [{key: m[key] for key in m if key != "ids"} for m in messages]
        replies = iter([m.get("ids") for m in messages if m["role"] == "assistant"])
        return [id for ids, is_reply in self.tokenizer.chat_parts(plain)
                for id in (self.as_drawn(next(replies), ids) if is_reply else ids)]

    def as_drawn(self, drawn: list[int] | None, rendered: list[int]) -> list[int]:
        """A reply's ids as they were drawn, so that the memory of them stays true.

        Not if the format changes more than white space: GLM-4-0414 leaves out earlier thoughts.
        """
        if drawn is None:
            return rendered
        spell = self.tokenizer.decode
        ids = drawn if spell(drawn).endswith(spell(self.end)) else drawn + self.end
        same = "".join(spell(ids).split()) == "".join(spell(rendered).split())
        return ids if same else rendered

    def is_silent(self, id: int) -> bool:
        """Whether it is a stop id without text. (World's ".\\n\\n" ends a turn, and is text.)"""
        return id in self.stops and "\n\n" not in self.tokenizer.decode([id])

    def is_ended(self, reply: str) -> bool:
        """Whether it contains a stop text."""
        return any(end in reply for end in self.stop_texts)

    def visible(self, reply: str, growing: bool = False) -> str:
        """What is shown of a reply: formats begin it with white space, stop texts end it. While it
        is growing, an end that may begin a stop text is held back."""
        for end in self.stop_texts:
            reply = reply.split(end)[0]
        waits = [n for end in self.stop_texts for n in range(1, len(end))
                 if growing and reply.endswith(end[:n])]
        reply = reply[:len(reply) - max(waits, default=0)]
        return reply.strip() if self.format else reply

    def spoken(self, drawn: list[int]) -> tuple[list[int], str]:
        """(ids that belong to the reply, what is shown of it) of what was drawn."""
        ids = drawn[:-1] if drawn and self.is_silent(drawn[-1]) else drawn
        return ids, self.visible(self.tokenizer.decode(ids))

    def fitted(self, messages: list[dict]) -> tuple[list[dict], list[int]]:
        """(messages, their ids) after dropping what is oldest, should the context be full.

        Dropping makes half of it free: what is left must be read again, and not at every turn.
        """
        ids = self.render(messages)
        room = 0 if self.context is None else max(1, min(self.max_new_tokens, self.context // 4))
        if self.context is None or len(ids) + room <= self.context:
            return messages, ids
        full = f"[the context of {self.context} tokens is full:"
        if self.format is None:
            begin = ids[:len(self.tokenizer.prefix_ids)]
            ids = begin + ids[len(begin) + len(ids) - self.context // 2:]
            say(f"{full} only the last {len(ids) - len(begin)} of the text are read]")
            return messages, ids
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = [n for n, m in enumerate(messages) if m["role"] == "user"]
        for dropped, start in enumerate(turns):
            kept = [*system, *messages[start:]]
            ids = self.render(kept)
            if dropped and len(ids) <= self.context // 2:
                break
        if len(ids) >= self.context:
            raise ValueError(f"this message takes {len(ids)} tokens with what stands before it, "
                             f"the context is {self.context}: shorten it")
        if dropped:
            say(f"{full} the oldest {dropped} of {len(turns)} turns are dropped]")
        return kept, ids

    def memory(self, ids: list[int], need: int):
        """The state to read ids with, room for `need`; a new one unless ids go on from `seen`."""
        size = 1 << (need - 1).bit_length()                             # grows by doubling
        size = size if self.context is None else min(size, self.context)
        if self.state is None or len(ids) == len(self.seen) or ids[:len(self.seen)] != self.seen:
            return self.model.new_state(1, size)
        return self.state if self.state.capacity >= need else moved(
            self.model, self.state, size)

    def answer(self, message: str | None, show) -> str | None:
        """Read what is new and answer it; returns why the answer was cut short, None if it was not.

        message None: go on with a text. show(text) gets the whole answer so far at every token.
        ValueError: the message does not fit, and nothing is changed.
        """
        before = self.messages if self.format or message is None else []
        new = [] if message is None else [{"role": "user", "content": message}]
        messages, ids = self.fitted([*before, *new])
        limit = min(self.max_new_tokens, (self.context or 2**62) - len(ids))
        state = self.memory(ids, len(ids) + limit)
        self.state, self.seen = None, []     # until it is whole again
        drawn, cut, whole = self.draw(ids, limit, state, show)
        if whole:
            self.state, self.seen = state, (ids + drawn)[:int(state.position)]
        if not drawn:
            return f"{cut} before the answer began: the message is taken back"
        kept, reply = self.spoken(drawn)
        show(reply)
        self.messages = [*messages, {"role": "assistant", "content": reply, "ids": kept}]
        return cut

    def draw(self, ids: list[int], limit: int, state, show):
        """(ids drawn, why they were cut short or None, whether the state is whole)."""
        drawn, reply, decoder, self.times = [], "", self.tokenizer.stream_decoder(), []
        seed = None if self.seed is None else self.seed + len(self.messages)

        def hear(row, id):
            nonlocal reply
            drawn.append(id)
            self.times.append(time.perf_counter())
            reply += "" if self.is_silent(id) else decoder.feed(id)
            show(self.visible(reply, growing=True))
            if asked or self.is_ended(reply):
                raise Stop
        with between_tokens() as asked:
            try:
                fed, generate, more = int(state.position), self.model.generate, {}
                if self.speculation:
                    generate = functools.partial(self.speculation.generate, self.model)
                    more = {"history": ids[:fed]}
                generate([ids[fed:]], limit, state=state, seed=seed, stop=self.stops,
                         on_token=hear, **more, **self.sampling)
            except Stop:
                return drawn, "stopped" if asked else None, True
            except KeyboardInterrupt:        # perhaps half way through a token
                return drawn, "stopped", False
        if drawn[-1] in self.stops:
            return drawn, None, True
        return drawn, (f"cut at --max-new-tokens {limit}" if limit == self.max_new_tokens else
                       f"the context of {self.context} tokens is full"), True

    def save(self, path: Path) -> None:
        """Write messages and memory to one new safetensors file."""
        from safetensors.torch import save
        if path.exists():
            raise ValueError(f"{path} exists: choose another name")
        state = self.model.new_state(1, 1) if self.state is None else self.state
        about = {"model": repr(self.model.config), "format": self.format,
                 "messages": self.messages, "seen": self.seen}
        with text.replacing(path) as file:
            file.write(save({name: tensor.contiguous() for name, tensor in state._asdict().items()},
                            {"format": "pt", "conversation": json.dumps(about)}))

    def load(self, path: Path) -> None:
        """Go on with what `save` wrote; ValueError or OSError if that fails, nothing changed."""
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["conversation"])
            messages, seen = about["messages"], about["seen"]
            known = range(self.model.config.vocab_size)
            whole = all(type(id) is int and id in known
                        for ids in (seen, *(m.get("ids", ()) for m in messages)) for id in ids)
            same = (about["model"], about["format"]) == (repr(self.model.config), self.format)
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{path} is no conversation that /save wrote") from None
        if not same:
            raise ValueError(f"{path} was saved with another model or chat format")
        kind = type(self.model.new_state(1, 1))
        with readable(path):
            tensors = load_file(path)
        whole = whole and {*tensors} == {*kind._fields}
        if not whole or tensors["position"].tolist() != [len(seen)]:
            raise ValueError(f"{path} is damaged: its ids do not belong to its memory")
        if messages:
            self.render(messages)            # ValueError if it cannot be
        self.state = moved(self.model, kind(**tensors), kind(**tensors).capacity)
        self.messages, self.seen = messages, seen

# ------------------------------------------------------------------------------------------ typing


def whole_message(line: str) -> str:
    """The message that begins with this line: it may go on after \\, or till \"\"\" closes it."""
    def closed(line):
        return line.rstrip().endswith('"""')
    block = line.startswith('"""')
    lines = [line[3:] if block else line]
    with contextlib.suppress(EOFError):      # the end of the input ends it too
        while not closed(lines[-1]) if block else lines[-1].endswith("\\"):
            lines.append(input())
    if not block:
        return "\n".join(line.removesuffix("\\") for line in lines)
    message = "\n".join(lines)
    return (message.rstrip()[:-3] if closed(message) else message).strip("\n")


def command(conversation: Conversation, line: str) -> None:
    """Do what a line that begins with / says."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if name in ("/save", "/load") and value:
        getattr(conversation, name[1:])(Path(value))
        turns = sum(m["role"] == "assistant" for m in conversation.messages)
        say(f"[{'saved' if name == '/save' else 'loaded'}: {turns} answers, "
            f"{len(conversation.seen)} tokens in memory, {os.path.getsize(value):,} bytes]")
    elif name == "/system" and conversation.format:
        rest = conversation.messages[conversation.system is not None:]
        first = [{"role": "system", "content": value}] if value else []
        conversation.messages = first + rest
        say(f"[the system message is {'set' if value else 'gone'}]")
    elif name == "/reset":
        conversation.reset(conversation.system)
        say("[forgotten]")
    elif name == "/help":
        say(HELP)
    else:
        needs = {"/save": " needs a file", "/load": " needs a file",
                 "/system": ": this model completes text, it takes no system message"}
        say(f"[{name}{needs.get(name, ' is no command')}; /help lists them]")


def turn(conversation: Conversation, message: str | None) -> None:
    """One message, and its answer on the screen as it is written."""
    shown = 0

    def show(reply):
        nonlocal shown
        print(reply[shown:], end="", flush=True)
        shown = max(shown, len(reply))
    cut = conversation.answer(message, show)
    print(flush=True)
    if cut:
        say(f"[{cut}]")


def answer_one(conversation: Conversation, prompt: str) -> None:
    """Answer or continue one text, and say how fast that was. A continued text is shown whole."""
    if conversation.format is None:
        prompt = prompt.rstrip(" ")          # in byte-level BPE the space belongs to the next word
        print(prompt, end="", flush=True)
    turn(conversation, prompt)
    times = conversation.times
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    say(f"[{len(times)} tokens, {speed:.1f} tokens/s]")
    if conversation.speculation:
        say(f"[{conversation.speculation.report()}]")


def talk(conversation: Conversation) -> None:
    """Read messages and commands until the input ends; no mistake ends it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401        input() gets arrows and history from it
    if hasattr(sys.stdin, "reconfigure"):    # bytes that are no text do not end the conversation
        sys.stdin.reconfigure(errors="replace")
    say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            if line.rstrip() == "/quit":
                return
            if line.startswith("/"):
                command(conversation, line)
            elif line.strip():
                if message := whole_message(line):
                    turn(conversation, message)
            elif conversation.format is None and conversation.messages:
                turn(conversation, None)
        except EOFError:
            return
        except KeyboardInterrupt:
            say("\n[Ctrl-D or /quit ends]")
        except (ValueError, OSError, ImportError) as error:
            say(f"[{error}]")
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            say("[out of memory: a shorter --max-new-tokens, or /reset]")

# -------------------------------------------------------------------------------- files of prompts


def read_prompts(path: Path, conversation: Conversation) -> list[tuple[dict, list[int]]]:
    """[(row, ids to answer), ...]; ValueError that names the line of the first bad one."""
    jobs = []
    for place, row in read_rows(path):
        try:
            if INVALID in json.dumps(row, ensure_ascii=False):
                raise ValueError("it is not UTF-8")
            jobs.append((row, prompt_ids(row, conversation)))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    return jobs


def prompt_ids(row, conversation: Conversation) -> list[int]:
    """The ids of one object of a file of prompts; ValueError if it is none."""
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError('it needs {"prompt": text} or {"messages": [...]}')
    if "messages" in row and conversation.format is None:
        raise ValueError("it has messages, but this model completes text (--chat FORMAT converses)")
    if type(row.get("prompt", "")) is not str:
        raise ValueError('"prompt" must be text')
    messages = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
            and messages[-1].get("role") != "assistant"):
        raise ValueError('"messages" must be a list that ends with what is to be answered')
    if conversation.system and messages[0].get("role") != "system":
        messages = [*conversation.messages, *messages]
    ids = (conversation.tokenizer.encode_chat(messages) if conversation.format else
           conversation.render(messages))
    if conversation.context is not None and len(ids) >= conversation.context:
        raise ValueError(f"it has {len(ids)} tokens, the context is {conversation.context}: "
                         "shorten it")
    return ids


def begun(row: dict) -> str:
    """A line of the output up to its answer."""
    line = json.dumps({**{k: row[k] for k in row if k != "response"}, "response": ""},
                      ensure_ascii=False)
    return text.clean(line[:-2])


def count_answered(target: Path, rows: list[dict], source: Path) -> int:
    """How many of the first rows have their line in the output; a line cut short is taken out.

    ValueError if the file holds anything else: it stays as it is.
    """
    lines = target.read_bytes().splitlines(keepends=True) if target.exists() else []
    for number, line in enumerate(lines, 1):
        whole, row = line.decode(errors="replace"), rows[number - 1] if number <= len(rows) else {}
        cut = number == len(lines) and not whole.endswith("\n")
        if not (whole.startswith(begun(row)) or cut and begun(row).startswith(whole)) or not row:
            raise ValueError(f"{target} exists: choose another name, for its line {number} is not "
                             f"the answer to row {number} of {source}")
        if cut:
            os.truncate(target, sum(map(len, lines[:-1])))
            return number - 1
    return len(lines)


def answer_file(source: Path, target: Path, batch_size: int, conversation: Conversation) -> None:
    """Answer each row of a file. Each line is written as soon as it and those before are answered;
    an earlier run is continued with the same batches, so that a seed repeats."""
    jobs = read_prompts(source, conversation)
    done = count_answered(target, [row for row, _ in jobs], source)
    if done == len(jobs):
        raise ValueError(f"{target} has every answer already" if done else
                         f"{source} has no prompts")
    if done:
        say(f"[{done:,} of {len(jobs):,} are answered in {target}; going on from there]")
    written, progress, start, tokens = done - done % batch_size, text.Progress(True), time.time(), 0
    with open(target, "a", encoding="utf-8") as file:    # an unwritable file fails at once
        def write(drawn):
            nonlocal written, tokens
            if written >= done:
                answer = json.dumps(conversation.spoken(drawn)[1], ensure_ascii=False)
                file.write(f'{begun(jobs[written][0])}{text.clean(answer)[1:]}}}\n')
                file.flush()
            written, tokens = written + 1, tokens + len(drawn)
            progress(f"{written:,} of {len(jobs):,} answered, "
                     f"{tokens / (time.time() - start):.0f} tokens/s", written == len(jobs))
        try:
            for first in range(written, len(jobs), batch_size):
                prompts = [ids for _, ids in jobs[first:first + batch_size]]
                answer_batch(prompts, conversation, first, write)
        except KeyboardInterrupt:
            there = max(written, done)
            raise KeyboardInterrupt(f"{there:,} of {len(jobs):,} are answered in {target}, and "
                                    "the same command goes on" if there else "") from None
        finally:
            if not file.tell():              # nothing is in it
                target.unlink()


def answer_batch(prompts: list[list[int]], conversation: Conversation, number: int, write) -> None:
    """Answer prompts together; write(ids) gets each answer once it and those before it ended."""
    drawn, ended, written = [[] for _ in prompts], set(), 0

    def end(rows):
        nonlocal written
        ended.update(rows)
        while written in ended:
            write(drawn[written])
            written += 1

    def hear(row, id):
        drawn[row].append(id)
        if (id in conversation.stops or len(drawn[row]) == conversation.max_new_tokens
                or conversation.stop_texts
                and conversation.is_ended(conversation.tokenizer.decode(drawn[row]))):
            end([row])
            if len(ended) == len(prompts):
                raise Stop
    seed = None if conversation.seed is None else conversation.seed + number
    with contextlib.suppress(Stop):
        conversation.model.generate(prompts, conversation.max_new_tokens, stop=conversation.stops,
                                    seed=seed, on_token=hear, **conversation.sampling)
    end(range(len(prompts)))


def main(argv: list[str] | None = None) -> None:
    """`python chat.py`: a user's mistake is one line and exit status 2."""
    args = parse(argv)
    show_any_text()
    try:
        if args.inspect:
            sys.exit(inspect(args))
        conversation = open_conversation(args)
        if args.prompt is not None:
            answer_one(conversation, args.prompt)
        elif args.input:
            answer_file(args.input, args.output, args.batch_size, conversation)
        else:
            talk(conversation)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(complain(f"chat.py: {error}"))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(complain("chat.py: out of memory: a smaller --batch-size or --max-new-tokens"))
    except KeyboardInterrupt as error:
        sys.exit(complain(f"\nchat.py: stopped; {str(error) or 'nothing was written'}", 130))


if __name__ == "__main__":
    main()
