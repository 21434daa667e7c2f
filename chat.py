"""Use a model: talk with it, give it one prompt, or have it answer a file of prompts.

    python chat.py out/gpt                       a run of train.py or finetune.py, or any checkpoint
    python chat.py out/gpt --prompt "def "       one text, continued or answered
    python chat.py DIR --input prompts.jsonl --output answers.jsonl

It converses if the folder says that the model can, else it completes text, and it says which and
why; --chat decides otherwise. What was said stays in the model's memory: a turn computes only what
is new, and a recurrent model's conversation, a file of a megabyte or less, goes on another day.

From the top: command line; does this model converse; a conversation; typing; files of prompts.
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
from checkpoints import (check_vocabulary, eos_tokens, is_out_of_memory, load_checkpoint, locate,
                         readable)
from flags import Parser, complain, show_any_text
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
    """What is not the model's goes to stderr: stdout has its words alone."""
    print(*words, file=sys.stderr, flush=True)

# ------------------------------------------------------------------------------------ command line


def parse(argv: list[str] | None):
    """The settings of a command line; exits with one line if they are impossible."""
    parser = Parser(prog="chat.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("weights", metavar="DIR", help="a checkpoint: folder or file")
    add("--chat", choices=(*text.CHAT_FORMATS, "none"), help="converse so; none: complete text")
    add("--system", metavar="TEXT", help="system message of conversations")
    add("--prompt", metavar="TEXT", help="answer or continue this text, and end")
    add("--input", type=Path, metavar="FILE.jsonl",
        help='answer these: lines {"prompt": ...} or {"messages": [...]}')
    add("--output", type=Path, metavar="FILE.jsonl",
        help='the same lines with "response", in the same order; a new file')
    add("--batch-size", type=int, default=8, metavar="N", help="lines of --input at once (8)")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="the longest answer (512)")
    add("--temperature", type=float, metavar="T", help="0: the likeliest token (without this "
        "flag: what generation_config.json says, else 0.8)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this mass "
        "(without this flag: what generation_config.json says, else all)")
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
            (not 0 <= (args.temperature or 0) < float("inf"),
             f"--temperature {args.temperature}: 0 (the likeliest token) or more"),
            (args.top_k is not None and args.top_k < 1, f"--top-k {args.top_k}: at least 1"),
            (not 0 <= (args.top_p or 0) <= 1, f"--top-p {args.top_p}: 0 to 1"),
            (args.output and args.output.exists(), f"{args.output} exists: choose another name")):
        if wrong:
            parser.error(message)
    return args


def open_conversation(args) -> "Conversation":
    """Load what the command line names, and say what was decided and why."""
    path = locate(args.weights)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    folder = path if path.is_dir() else path.parent
    try:
        tokenizer = text.load_tokenizer(args.tokenizer or path)
    except (ValueError, OSError) as error:
        hint = "" if args.tokenizer else " (--tokenizer names another place)"
        raise ValueError(f"{error}{hint}") from None
    tokenizer.chat_format, why = choose_format(folder, tokenizer, args.chat)
    if args.system is not None and tokenizer.chat_format is None:
        raise ValueError(f"--system is for conversations, and this model completes text: {why}")
    device, dtype = choose_device(args.device), getattr(torch, args.dtype or "", None)
    model = load_checkpoint(path, device, dtype)
    config, like = model.config, next(model.parameters())
    check_vocabulary(config, tokenizer)
    stated = text.read_json(folder / "generation_config.json")
    sampling = {"temperature": 0.8, "top_k": args.top_k, "top_p": None}
    sampling |= {name: stated[name] for name in ("temperature", "top_p")
                 if isinstance(stated.get(name), (int, float))}
    sampling |= {name: vars(args)[name] for name in sampling if vars(args)[name] is not None}
    say(f"model      {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters, {str(like.dtype).removeprefix('torch.')} on {like.device.type}, context "
        f"{config.context or 'without limit'}")
    say(f"converses  in the format {tokenizer.chat_format}: {why}" if tokenizer.chat_format else
        f"completes  text: {why}")
    say("sampling   " + ", ".join(f"{k} {v}" for k, v in sampling.items() if v is not None)
        + f"; at most {args.max_new_tokens} new tokens")
    say("linear     " + fast.accelerate(model, args.bits, args.fast))
    conversation = Conversation(model, tokenizer, sampling, args.max_new_tokens, args.seed)
    if args.draft or args.lookup:
        draft = load_checkpoint(args.draft, device, dtype) if args.draft else None
        conversation.speculation = speculation(model, draft, args)
    conversation.stops |= stated_eos(folder)
    conversation.reset(args.system)
    return conversation


def speculation(model, draft, args) -> fast.Speculation:
    """Speculative decoding by a draft model or, if it is None, by looking into the text."""
    if draft is not None:
        fast.accelerate(draft, None, args.fast)
    fast.refuse_recurrent(model)
    probabilities = sys.modules[type(model).__module__].probabilities
    return fast.Speculation(probabilities, draft)

# ------------------------------------------------------------------------- does this model converse


def stated_eos(folder: Path) -> set[int]:
    """The ids that end a text by config.json and generation_config.json."""
    stated = [text.read_json(folder / name).get("eos_token_id")
              for name in ("config.json", "generation_config.json")]
    return {id for ids in stated for id in (ids if isinstance(ids, list) else [ids])
            if type(id) is int}


def choose_format(folder: Path, tokenizer, asked: str | None) -> tuple[str | None, str]:
    """(chat format or None, why): whether the model in this folder converses."""
    own, config = tokenizer.chat_format, tokenizer.config
    if asked:
        return None if asked == "none" else asked, f"--chat {asked}"
    if "chat_format" in config:
        return own, f"its tokenizer_config.json says chat_format {json.dumps(own)}"
    if "chat_template" in config or (folder / "chat_template.jinja").exists():
        return own, "it has a chat template" + (
            "" if own else ", but of no format known here; --chat takes one of them")
    if own and len(stated_eos(folder)) > 1:
        return own, "its configs name several ids that end a text"
    if own and (folder / "params.json").exists():
        return None, ("Meta's folders do not tell base models from Instruct; if this is one, add "
                      f"--chat {own}")
    if own in ("world", "chatglm3"):
        return own, "as nearly all models of this vocabulary do; if not this one, --chat none"
    return None, "neither chat_format, nor chat template, nor several eos ids in its folder"

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
            return [*self.tokenizer.prefix_ids, *ids] or [self.tokenizer.end_id]
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

    def visible(self, reply: str) -> str:
        """What is shown of a reply: formats begin it with white space, World ends it so."""
        if self.format == "world":
            reply = reply.split("\n\n")[0]
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
            show(self.visible(reply))
            if asked or self.format == "world" and "\n\n" in reply:     # of two tokens, perhaps
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
        from safetensors import SafetensorError
        from safetensors.torch import save_file
        if path.exists():
            raise ValueError(f"{path} exists: choose another name")
        state = self.model.new_state(1, 1) if self.state is None else self.state
        about = {"model": repr(self.model.config), "format": self.format,
                 "messages": self.messages, "seen": self.seen}
        part = f"{path}.part"
        try:
            save_file({name: tensor.contiguous() for name, tensor in state._asdict().items()}, part,
                      {"format": "pt", "conversation": json.dumps(about)})
        except SafetensorError as error:     # no OSError, even where the disk is full
            raise OSError(f"cannot save {path}: {error}") from None
        os.replace(part, path)

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
            old = "eos_ids=" in about["model"]
            same = (about["model"], about["format"]) == (repr(self.model.config), self.format)
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{path} is no conversation that /save wrote") from None
        if old:
            raise ValueError(f"{path} was saved by an earlier version, which named its model's "
                             "config otherwise: it cannot be compared with this model")
        if not same:
            raise ValueError(f"{path} was saved with another model or chat format")
        kind = type(self.model.new_state(1, 1))
        with readable(path):
            tensors = load_file(path)
        whole = whole and {*tensors} == {*kind._fields}
        if not whole or tensors["position"].tolist() != [len(seen)]:
            raise ValueError(f"{path} is damaged: its ids do not belong to its memory")
        self.render(messages or [{"role": "user", "content": ""}])      # ValueError if it cannot be
        self.state = moved(self.model, kind(**tensors), kind(**tensors).capacity)
        self.messages, self.seen = messages, seen

# ------------------------------------------------------------------------------------------ typing


def whole_message(line: str) -> str:
    """The message that begins with this line: it may go on after \\, or till \"\"\" closes it."""
    if line.startswith('"""'):
        lines = [line[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(input())
        return "\n".join(lines).rstrip()[:-3].strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input()
    return line


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
    say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            if line.rstrip() == "/quit":
                return
            if line.startswith("/"):
                command(conversation, line)
            elif line.strip():
                turn(conversation, whole_message(line))
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
    """[(object of a line, ids to answer), ...]; ValueError that names the first bad line."""
    jobs = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                    jobs.append((row, prompt_ids(row, conversation)))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
    if not jobs:
        raise ValueError(f"{path} has no prompts")
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


def answer_file(source: Path, target: Path, batch_size: int, conversation: Conversation) -> None:
    """Answer each line of a file; the other appears when all are answered, and replaces nothing."""
    jobs = read_prompts(source, conversation)
    part = Path(f"{target}.part")
    with open(part, "x", encoding="utf-8") as file:      # a place that cannot be written: at once
        try:
            for (row, _), response in zip(jobs, answers([ids for _, ids in jobs], batch_size,
                                                        conversation)):
                line = json.dumps({**row, "response": response}, ensure_ascii=False)
                file.write(text.clean(line) + "\n")
            file.close()
            if target.exists():
                raise ValueError(f"{target} exists by now: choose another name")
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def answers(prompts: list[list[int]], batch_size: int, conversation: Conversation) -> list[str]:
    """The answer to each prompt. Similar lengths go together, longest first: memory fails early."""
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    heard = [[] for _ in prompts]
    progress, start, tokens = text.Progress(True), time.time(), 0
    for first in range(0, len(order), batch_size):
        rows = order[first:first + batch_size]

        def hear(row, id, first=first, rows=rows):
            nonlocal tokens
            heard[rows[row]].append(id)
            tokens += 1
            progress(f"{first} of {len(prompts)} answered, "
                     f"{tokens / (time.time() - start):.0f} tokens/s")
        conversation.model.generate(
            [prompts[n] for n in rows], conversation.max_new_tokens, stop=conversation.stops,
            seed=None if conversation.seed is None else conversation.seed + first,
            on_token=hear, **conversation.sampling)
    progress(f"{len(prompts)} answered, {tokens:,} tokens in {time.time() - start:.1f} s", True)
    return [conversation.spoken(drawn)[1] for drawn in heard]


def main(argv: list[str] | None = None) -> None:
    """`python chat.py`: a user's mistake is one line and exit status 2."""
    args = parse(argv)
    show_any_text()
    try:
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
    except KeyboardInterrupt:
        sys.exit(complain("\nchat.py: stopped; nothing was written", 130))


if __name__ == "__main__":
    main()
