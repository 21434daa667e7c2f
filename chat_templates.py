"""Our chat formats as templates (Jinja), for programs that converse through a run's tokenizer.

    tokenizer_config.json["chat_template"] = written_template(tokenizer)

transformers (apply_chat_template, pipeline), vLLM and others render such a template to text, and
encode that: control tokens as such, what is between them as text. For conversations without control
tokens in what is said this gives the tokens of `Tokenizer.encode_chat`, whose functions at the end
of tokenizer.py are the definition. Here a run is read by its `chat_format`, not by its template.
templates.py is about the templates of others.
"""
import json

LLAMA3 = r"""{%- for m in messages -%}
{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}
{{- m['content'].strip() + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}
"""

LLAMA31 = r"""{%- for m in messages -%}
{%- set role = 'ipython' if m['role'] == 'tool' else m['role'] -%}
{%- set answered = not loop.last and loop.nextitem['role'] in ('tool', 'ipython') -%}
{%- set calls = m['metadata'] or m['stop_reason'] == 'end_of_message' -%}
{%- set ends = '<|eom_id|>' if calls or role == 'assistant' and answered else '<|eot_id|>' -%}
{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
{{- ('<|python_tag|>' if m['metadata'] else '') + m['content'] + ends }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}
"""

# Tools are transformers' argument, unless messages have theirs, as `encode_chat` takes them.
GLM_TOOLS = r"""{%- set given = none if messages | selectattr('tools') | list else tools -%}
"""
GLM_END = r"""{%- if add_generation_prompt -%}
{{ '<|assistant|>' }}
{%- elif messages[-1]['role'] == 'assistant' -%}
{{ '<|user|>' }}
{%- endif -%}
"""

# SentencePiece puts a space before a text, here before the line of the role and before the content.
CHATGLM3 = GLM_TOOLS + r"""{%- if given and messages[0]['role'] != 'system' -%}
{{ '<|system|>\n \n' + given | tojson(indent=4) }}
{%- endif -%}
{%- for m in messages -%}
{%- set here = m['tools'] or (given if loop.first and m['role'] == 'system' else none) -%}
{%- set content = m['content'] + ('\n' + here | tojson(indent=4) if here else '') -%}
{{ '<|' + m['role'] + '|>' + (m['metadata'] or '') + '\n' + (' ' + content if content else '') }}
{%- endfor -%}
""" + GLM_END

GLM4 = GLM_TOOLS + r"""{%- for m in messages -%}
{%- set here = m['tools'] or (given if loop.first else none) -%}
{%- if here -%}
{{ '<|system|>\n' + words['persona'] }}
{%- for tool in here -%}
{%- if tool['type'] == 'function' -%}
{%- set json = tool['function'] | tojson(indent=4, sort_keys=true, ensure_ascii=true) -%}
{%- set json = json.replace('<', '\\u003c').replace('>', '\\u003e').replace('&', '\\u0026') -%}
{%- set json = json.replace("'", '\\u0027') -%}
{{ '\n## ' + tool['function']['name'] + '\n\n' + json + '\n' + words['call'] }}
{%- else -%}
{{ '\n## ' + tool['type'] + '\n\n' + words['tools'][tool['type']] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if m['content'] or m['role'] == 'assistant' -%}
{{ '<|' + m['role'] + '|>' + (m['metadata'] or '') + '\n' + m['content'] }}
{%- endif -%}
{%- endfor -%}
""" + GLM_END

GLM4_0414 = GLM_TOOLS + r"""{%- set found = namespace(tools=given or []) -%}
{%- for m in messages -%}
{%- set found.tools = found.tools + (m['tools'] or []) -%}
{%- endfor -%}
{%- if found.tools -%}
{{ '<|system|>\n# 可用工具' }}
{%- for tool in found.tools -%}
{%- set function = tool['function'] or tool -%}
{{ '\n\n## ' + function['name'] + '\n\n' + function | tojson(indent=4) + '\n' + words['call'] }}
{%- endfor -%}
{%- endif -%}
{%- for m in messages if m['role'] == 'system' and m['content'] -%}
{{ '<|system|>\n' + m['content'] }}
{%- endfor -%}
{%- for m in messages -%}
{%- set content = m['content'].strip() -%}
{%- if m['role'] == 'assistant' and not loop.last -%}
{%- set content = content.split('</think>')[-1].strip() -%}
{%- endif -%}
{%- if m['role'] != 'system' -%}
{{ '<|' + m['role'] + '|>' + (m['metadata'] + ' \n' if m['metadata'] else '\n') + content }}
{%- endif -%}
{%- endfor -%}
""" + GLM_END

# GPT-2's split pattern makes one piece of a blank line that ends a text, and two of one before a
# word: with its vocabulary, of all formats World's alone, this gives other tokens there.
WORLD = r"""{%- for m in messages -%}
{%- set content = m['content'].replace('\r\n', '\n').strip().split('\n') | select | join('\n') -%}
{{ m['role'].capitalize() + ':' + (' ' + content if content else '') + '\n\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'Assistant:' }}
{%- endif -%}
"""

ALPACA = r"""{%- for m in messages -%}
{%- if m['role'] == 'assistant' -%}
{{ (' ' + m['content'] if m['content'] else '') + end }}
{%- elif m['role'] == 'system' -%}
{{ m['content'] + '\n\n' }}
{%- else -%}
{{ 'Below is an instruction that describes a task' }}
{{- ', paired with an input that provides further context' if m['input'] else '' }}
{{- '. Write a response that appropriately completes the request.\n\n### Instruction:\n' }}
{{- m['content'] + '\n\n' + ('### Input:\n' + m['input'] + '\n\n' if m['input'] else '') }}
{{- '### Response:' }}
{%- endif -%}
{%- endfor -%}
"""

SOURCES = {"llama3": LLAMA3, "llama3.1": LLAMA31, "chatglm3": CHATGLM3, "glm4": GLM4,
           "glm4-0414": GLM4_0414, "world": WORLD, "alpaca": ALPACA}


def written_template(tokenizer, words: dict) -> str | None:
    """The chat template of a tokenizer's chat format; None for none, and for "template".

    words: what GLM-4 says of tools, {"persona", "call", "tools"}.
    """
    if tokenizer.chat_format not in SOURCES:
        return None
    source, name = SOURCES[tokenizer.chat_format], {}
    for text, id in tokenizer.special_ids.items():
        name.setdefault(id, text)
    values = {"prefix": "".join(name[id] for id in tokenizer.prefix_ids)}
    if "+ end }}" in source:
        values["end"] = name.get(tokenizer.end_id, "")
    if "words[" in source:
        values["words"] = words
    made = [f"{{%- set {key} = {json.dumps(value, ensure_ascii=False)} -%}}\n"
            for key, value in values.items()]
    return "".join(made) + "{{ prefix }}\n" + source
