"""A checkpoint's own chat template (Jinja): conversations in no format that tokenizer.py knows.

Published chat models carry a template that writes a conversation as text, control tokens included.
A template is a program by a stranger: it runs in jinja2's sandbox, in a child process with limits
of time and memory, which the sandbox has not. Of the text that it writes, only what it wrote itself
is searched for control tokens: "<|im_end|>" in a message becomes the tokens of those characters.

    template = Template(find_template(folder, config), {"bos_token": "<s>"})
    template.render([([{"role": "user", "content": "Hi"}], True)])      # ["<s>[INST] Hi [/INST]"]
    template.chat_parts(tokenizer, messages)     # as Tokenizer.chat_parts, which calls this
"""
import contextlib
import copy
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

SECONDS, MEMORY = 10, 1 << 30                # for one call of `render`; of the child, in bytes
PROBE = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi there\n"},
         {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Go on."}]


def find_template(folder: Path, config: dict) -> str | None:
    """The chat template of a folder, of several named ones the default; None if it has none.

    config: tokenizer_config.json. A file of its own precedes it, as in transformers.
    """
    found = config.get("chat_template")
    if (file := folder / "chat_template.jinja").is_file():
        found = file.read_text(encoding="utf-8")
    if isinstance(found, list):
        found = {named["name"]: named["template"] for named in found}.get("default")
    return found


class Template:
    """source: Jinja text.   variables: what it may use beside messages, as bos_token.

    end: the control token that ends a reply; Tokenizer.chat_format = "template" looks for it.
    """

    children = {}            # process -> the child that renders for it: a fork must not share pipes

    def __init__(self, source: str, variables: dict):
        self.source, self.variables, self.end = source, variables, None

    def render(self, conversations: list[tuple[list[dict], bool]]) -> list[str]:
        """The text of each (messages, whether the assistant is to speak next).

        ValueError: jinja2 is missing, the template refuses this, or it needs too much.
        """
        if not has_jinja():
            raise ValueError("its chat template needs the package: pip install jinja2")
        if (me := os.getpid()) not in self.children:
            self.children[me] = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        child, answer = self.children[me], b""
        timer = threading.Timer(SECONDS, child.kill)
        timer.start()
        try:
            request = json.dumps([self.source, self.variables, conversations])
            child.stdin.write(request.encode() + b"\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            pass                             # it has ended: no answer either
        finally:
            timer.cancel()
            if not answer.endswith(b"\n"):   # also if interrupted: the answer would be the next's
                child.kill()
                self.children.pop(me).communicate()
        if not answer.endswith(b"\n"):
            raise ValueError(f"its chat template took more than {SECONDS} s, or too much memory")
        texts, error = json.loads(answer)
        if error:
            raise ValueError(f"its chat template cannot write this conversation: {error}")
        return texts

    def chat_parts(self, tokenizer, messages: list[dict]) -> list[tuple[list[int], bool]]:
        """[(tokens, is_reply), ...] of a conversation.

        Prompt and reply are encoded apart, as they are when a model replies. Control tokens in a
        message pass the template with private characters that nobody used as their first ones.
        """
        control = find_any(tokenizer.special_ids)
        used = self.source + json.dumps(messages, ensure_ascii=False)
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        hidden = dict(zip(sorted({name[0] for name in tokenizer.special_ids}), free))
        shown = str.maketrans({private: char for char, private in hidden.items()})
        whole, replies = self.find_replies(hide(messages, control, hidden), control)
        parts, at = [], 0
        for start, end in [*replies, (len(whole), len(whole))]:
            for text, is_reply in ((whole[at:start], False), (whole[start:end], True)):
                ids = []
                for piece in tokenizer.added.split(text, special=True):
                    ids += ([piece] if isinstance(piece, int)
                            else tokenizer.encode(piece.translate(shown)))
                parts += [(ids, is_reply)] if ids else []
            at = end
        return parts

    def find_replies(self, messages, control: re.Pattern) -> tuple[str, list[tuple[int, int]]]:
        """(the text of a conversation, [(start, end) of a reply in it, ...]).

        A reply is what the conversation up to it has more than the prompt for it, until the control
        token that ends it. Where the template writes an earlier turn otherwise as more is said (it
        leaves out thoughts) that is not what a model wrote, and no reply.
        """
        asked, replies, last = [], [], messages[-1]["role"] == "assistant"
        for n, message in enumerate(messages):
            if message["role"] == "assistant":
                asked += [(messages[:n], False), (messages[:n], True), (messages[:n + 1], False)]
        whole, *texts = self.render([(messages, not last), *asked])
        for before, prompt, replied in zip(texts[::3], texts[1::3], texts[2::3]):
            start = len(prompt)
            if not replied.startswith(prompt):          # it begins otherwise than it is asked for
                same = os.path.commonprefix([prompt, replied])
                start = max((found.end() for found in re.finditer(rf"{control.pattern}|\n", same)),
                            default=0)
            at = replies[-1][1] if replies else 0
            ends = [*control.finditer(replied, start)]
            ends = [found for found in ends if found[0] == self.end][:1] or ends[-1:]
            reply_end = ends[0].end() if ends else len(replied)
            if start < max(at, len(before)) or not whole.startswith(replied[:reply_end]):
                continue
            if last and replied == whole:       # what stands after its end comes with the next turn
                whole = whole[:reply_end] + (self.end or "") * (not ends)
                reply_end = len(whole)
            elif not ends and (found := control.search(whole, reply_end)):      # GLM: the next role
                reply_end = found.end()
            replies.append((start, reply_end))
        return whole, replies

    def find_end(self, names) -> tuple[str, set[str]]:
        """(the control token between a reply and what is said next, all that stand around turns).

        ValueError if no token ends a reply. names: of added tokens. R1-Distill's "<｜User｜>" is not
        special in its tokenizer.json; one that a user types must be text all the same.
        """
        [text], said, at = self.render([(PROBE[1:], False)]), [], 0
        for content in (message["content"].strip() for message in PROBE[1:]):
            said.append(at := text.find(content, at))
            if at < 0:
                raise ValueError("its chat template leaves out what is said")
        pattern = find_any(name for name in names if name.strip())     # GPT-NeoX's runs of spaces
        found = pattern.search(text, said[1] + len("Hello."), said[2])
        if not found:
            raise ValueError("in its chat template no control token ends a reply")
        return found[0], {*pattern.findall(text)}


def find_any(names) -> re.Pattern:
    """What finds these names, the longest first; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def hide(value, control: re.Pattern, hidden: dict):
    """A value of JSON with the first character of each control token in it replaced."""
    if isinstance(value, str):
        return control.sub(lambda found: hidden[found[0][0]] + found[0][1:], value)
    if isinstance(value, list):
        return [hide(inner, control, hidden) for inner in value]
    if isinstance(value, dict):
        return {key: hide(inner, control, hidden) for key, inner in value.items()}
    return value


def has_jinja() -> bool:
    return importlib.util.find_spec("jinja2") is not None


def choose_format(tokenizer, template: Template, formats) -> tuple[str | None, str]:
    """(chat format or None, why) of a tokenizer in whose folder this template is.

    One of `formats` if it writes the same tokens as the template, else "template"; None if the
    template cannot be used. Without jinja2 the control tokens that the template names decide.
    """
    if not has_jinja():
        if tokenizer.chat_format and names_same(tokenizer, template.source):
            return tokenizer.chat_format, "its chat template names the same control tokens"
        return None, "its chat template is in no format known here, and jinja2 is not installed"
    theirs = None
    with contextlib.suppress(ValueError):           # it may refuse a system message
        theirs = [id for ids, _ in template.chat_parts(tokenizer, PROBE) for id in ids]
    for name in sorted(formats, key=lambda name: name != tokenizer.chat_format):
        with contextlib.suppress(ValueError, KeyError):                 # the vocabulary refuses
            trial = copy.copy(tokenizer)
            trial.chat_format = name
            if trial.encode_chat(PROBE) == theirs:
                return name, "its chat template writes the same tokens"
    try:
        template.find_end(tokenizer.added.ids)
    except ValueError as error:
        return None, f"its chat template is in no format known here, and cannot be used: {error}"
    return "template", "its chat template is in no format known here, and writes the conversation"


def names_same(tokenizer, source: str) -> bool:
    """Whether a template names the control tokens of the tokenizer's chat format, and adds nothing
    of which is known that a reply depends on it: an opened thought, the task of a guard."""
    name = {id: name for name, id in tokenizer.special_ids.items()}
    written = {name[id] for id in tokenizer.encode_chat(PROBE) if id in name}
    written -= {name.get(tokenizer.bos_id), "<|system|>", "<|user|>"}   # also written as variables
    return all(mark in source for mark in written) and not re.search("<think>|unsafe", source)


# ---- the child process: this file as a program ---------------------------------------------------

@functools.lru_cache
def compile_template(source: str):
    """The template in the environment that transformers gives it."""
    import datetime

    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now":
                            lambda form: datetime.datetime.now().strftime(form)}
    # {% generation %} marks replies for training; here it is a block like any other.
    return environment.from_string(re.sub(
        r"(\{%[-+]?\s*)(end)?generation\b",
        lambda found: found[1] + ("endif" if found[2] else "if true"), source))


def serve():
    """Answer each line [source, variables, conversations] by one line [texts, error]."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is for the parent
    with contextlib.suppress(ImportError, ValueError, OSError):         # not on Windows
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        texts, error = [], None
        try:
            source, variables, conversations = json.loads(line)
            for messages, speaks in conversations:
                tools = [tool for m in messages for tool in m.get("tools") or ()]
                texts.append(compile_template(source).render(
                    **variables, messages=messages, tools=tools or None, documents=None,
                    add_generation_prompt=speaks))
        except Exception as problem:                        # whatever a template does wrong
            error = f"{type(problem).__name__}: {problem}"[:300]
        print(json.dumps([texts, error]), flush=True)


if __name__ == "__main__":
    serve()
