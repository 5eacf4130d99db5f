"""Chat templates of several models and the control tokens they need.

Minimal equivalents of the layouts in llama.cpp's collection: what they demand of messages, not their words.
"""

from kimi_lite.text.stream import DEEPSEEK, KIMI

_TOOLS = "{%- for t in tools or [] -%}{{ t.function.name }} {{ t.function.parameters | tojson }}\n{%- endfor -%}"
_CALLS = "{%- for c in m.tool_calls -%}"
KIMI_K2 = (  # tools as JSON, a system message of its own, no <think>
    "{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', '"
    ":')) }}<|im_end|>{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if loop.first and m['role'] != 'system' -%}<|im_system|>system<|im_middle|>You are Kimi."
    "<|im_end|>{%- endif -%}{%- set name = m.get('name') or m['role'] -%}"
    "{%- if m.role == 'tool' -%}<|im_system|>{{ name }}<|im_middle|>## Return of "
    "{{ m.tool_call_id }}\n{{ m['content'] }}"
    "{%- else -%}<|im_user|>{{ name }}<|im_middle|>{{ m['content'] }}{%- endif -%}"
    "{%- if m.get('tool_calls') -%}<|tool_calls_section_begin|>" + _CALLS + "<|tool_call_begin|>{{ c['id'] }}"
    "<|tool_call_argument_begin|>"
    "{% if c['function']['arguments'] is string %}{{ c['function']['arguments'] }}{% else %}"
    "{{ c['function']['arguments'] | tojson }}{% endif %}<|tool_call_end|>{%- endfor -%}<|tool_calls_section_end|>"
    "{%- endif -%}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)
DEEPSEEK_R1 = (  # calls only where content is none; arguments are added to text; always <think>
    "{{ bos_token }}" + _TOOLS + "{%- set ns = namespace(is_tool=false) -%}{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}<｜User｜>{{ m['content'] }}{%- endif -%}"
    "{%- if m['role'] == 'assistant' and m['content'] is none -%}<｜Assistant｜><｜tool▁calls▁begin｜>"
    + _CALLS
    + "{{ '<｜tool▁call▁begin｜>' + c['type'] + '<｜tool▁sep｜>' + c['function']['name'] + '\\n```json\\n' + "
    "c['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}{%- endfor -%}<｜tool▁calls▁end｜>{%- endif -%}"
    "{%- if m['role'] == 'assistant' and m['content'] is not none -%}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<｜Assistant｜>{{ content }}{{ eos_token }}{%- endif -%}"
    "{%- if m['role'] == 'tool' -%}<｜tool▁output▁begin｜>{{ m['content'] }}<｜tool▁output▁end｜>{%- endif -%}"
    "{%- endfor -%}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
DEEPSEEK_V31 = (  # arguments as an object; a thinking mode that is switched
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}"
    + _TOOLS
    + "{%- for m in messages -%}{%- if m['role'] == 'user' -%}<｜User｜>{{ m['content'] }}"
    "{%- elif m['role'] == 'tool' -%}"
    "<｜tool▁output▁begin｜>{{ m['content'] }}<｜tool▁output▁end｜>"
    "{%- elif m['role'] == 'assistant' -%}<｜Assistant｜></think>"
    "{{ m['content'] or '' }}{%- if m['tool_calls'] is defined and m['tool_calls"
    "'] is not none -%}<｜tool▁calls▁begin｜>"
    + _CALLS
    + "<｜tool▁call▁begin｜>{{ c['function']['name'] }}<｜tool▁sep｜>{{ c['function']['arguments'] | tojson }}"
    "<｜tool▁call▁end｜>{%- endfor -%}<｜tool▁calls▁end｜>{%- endif -%}{{ eos_token }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<｜Assistant｜>{%- if thinking -%}<think>{%- else -%}</think>"
    "{%- endif -%}{%- endif -%}"
)
HERMES = (  # another family's markers
    "{%- for t in tools or [] -%}{{ t | tojson }}{%- endfor -%}{%- for m in messages -%}{{ m.role }}: {{ m.content }}"
    "{%- for c in m.tool_calls or [] -%}<tool_call>{{ c.function | tojson }}</tool_call>{%- endfor -%}{%- endfor -%}"
)
DEEPSEEK_WORDS = [
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<think>",
    "</think>",
]
DEEPSEEK_SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", *DEEPSEEK.markers, *DEEPSEEK_WORDS]
KIMI_SPECIAL = [*KIMI.markers, "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"]
