"""Kimi K2.5's chat layout as a jinja template of our own, for files that carry none (`tokenizer.chat_template`).

A turn is a header, a body and `<|im_end|>`, with nothing between turns. Tools come first, as TypeScript. Assistant
messages up to the last one without tool calls are history, whose reasoning is dropped unless `preserve_thinking`; later
ones belong to an unfinished tool loop and keep theirs. Rendered by `text.template` with the same variables as a file's
own template.
"""

KIMI_TEMPLATE = """\
{%- macro header(message) -%}
  {%- if message.role == 'user' -%}<|im_user|>
  {%- elif message.role == 'assistant' -%}<|im_assistant|>
  {%- else -%}<|im_system|>
  {%- endif -%}
  {{ message.name or message.role }}<|im_middle|>
{%- endmacro -%}

{%- macro body(message) -%}
  {%- if message.content is string -%}{{ message.content }}
  {%- elif message.content -%}
    {%- for part in message.content -%}
      {%- if part.type in ('image', 'image_url') -%}
        <|media_begin|>image<|media_content|><|media_pad|><|media_end|>{{ '\\n' }}
      {%- elif part.type in ('video', 'video_url') -%}
        <|kimi_k25_video_placeholder|>{{ '\\n' }}
      {%- else -%}{{ part.text }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}

{%- macro calls(message) -%}
  <|tool_calls_section_begin|>
  {%- for call in message.tool_calls -%}
    <|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>
    {%- set arguments = call.function.arguments -%}
    {%- if arguments is string -%}{{ arguments }}{%- else -%}{{ arguments | tojson }}{%- endif -%}
    <|tool_call_end|>
  {%- endfor -%}
  <|tool_calls_section_end|>
{%- endmacro -%}

{%- set turn = namespace(last_answer=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' and not message.tool_calls -%}
    {%- set turn.last_answer = loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
{%- if preserve_thinking -%}{%- set turn.last_answer = -1 -%}{%- endif -%}

{%- if tools -%}
  <|im_system|>tool_declare<|im_middle|>
  {%- if tools_ts_str -%}{{ tools_ts_str }}{%- else -%}{{ tools | tojson(separators=(',', ':')) }}{%- endif -%}
  <|im_end|>
{%- endif -%}

{%- for message in messages -%}
  {{ header(message) }}
  {%- if message.role == 'assistant' -%}
    <think>
    {%- if loop.index0 > turn.last_answer and thinking -%}{{ message.reasoning_content }}{%- endif -%}
    </think>{{ body(message) }}
    {%- if message.tool_calls -%}{{ calls(message) }}{%- endif -%}
  {%- elif message.role == 'tool' -%}
    ## Return of {{ message.tool_call_id }}{{ '\\n' }}{{ body(message) }}
  {%- else -%}
    {{ body(message) }}
  {%- endif -%}
  <|im_end|>
{%- endfor -%}

{%- if add_generation_prompt -%}
  <|im_assistant|>assistant<|im_middle|><think>
  {%- if not thinking -%}</think>{%- endif -%}
{%- endif -%}
"""
