#!/usr/bin/env python3
"""usage: templates.py > templates.json      needs transformers 4.57.6

Chat templates written for this project in the manners of the families (their roles, their Jinja: namespaces, macros, loop
controls, slices, tests, filters, methods of str, dates, exceptions, generation blocks), and what transformers renders with
them. Dates are only measured, so that the goldens do not age.
"""
import json

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday has " ~ (date_string | length) ~ " letters\\n\\n" }}
{{- system }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {{- raise_exception("one call at a time") }}
    {%- else %}
        {{- "<|start|>ipython<|end|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results") %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must take turns: user, assistant, user, assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("only user and assistant, not " + message["role"] + "!") }}
    {%- endif %}
{%- endfor %}
"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<response>') and message.content.endswith('</response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<response>\\n' ~ content ~ '\\n</response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("turns have to be user, model, user, model") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("content of another kind") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""

PHI = """\
{% for message in messages %}
{% if message['role'] == 'system' and message['content'] %}
{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}
{% elif message['role'] == 'user' %}
{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}
{% elif message['role'] == 'assistant' %}
{% generation %}
{% set said = message['content'] %}
{{'<|assistant|>\\n' + said + '<|end|>\\n'}}
{% endgeneration %}
{% endif %}
{% endfor %}
{% if said is defined %}leaked{% endif %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}
"""

SMOLLM = """\
{# ---- defaults ---- #}
{%- if enable_thinking is not defined -%}
{%- set enable_thinking = true -%}
{%- endif -%}
{%- set reasoning_mode = "/think" if enable_thinking else "/no_think" -%}
{%- macro render(role, content='', sep="\\n") -%}
{{ "<|im_start|>" ~ role ~ sep ~ content ~ "<|im_end|>" ~ sep }}
{%- endmacro -%}
{%- if messages[0].role == "system" -%}
  {%- set system_message = messages[0].content -%}
  {%- if "/no_think" in system_message -%}
    {%- set reasoning_mode = "/no_think" -%}
  {%- endif -%}
  {%- set custom = system_message.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- render("system", "Mode: " + reasoning_mode + ("\\n" ~ custom if custom else "")) -}}
{%- for message in messages -%}
    {%- if message.role == "system" -%}{%- continue -%}{%- endif -%}
    {%- if loop.index > 9 -%}{%- break -%}{%- endif -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "assistant" -%}
        {%- generation -%}
        {{- "<|im_start|>assistant\\n" ~ (content if reasoning_mode == "/think" else "<think>\\n\\n</think>\\n" ~ content.lstrip("\\n")) ~ "<|im_end|>\\n" -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- render(message.role, content) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|im_start|>assistant\\n" }}
{%- endif -%}
"""

GRANITE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "Letters in the date: " + (strftime_now('%B %d, %Y') | length > 10) | string + ".\\n" %}
    {%- if tools and documents %}
        {%- set system_message = system_message + "both" %}
    {%- elif documents %}
        {%- set system_message = system_message + "documents" %}
    {%- endif %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|role|>system<|end_role|>' + system_message + '<|text|>\\n' }}
{%- for message in loop_messages %}
    {{- '<|role|>' + message['role'] + '<|end_role|>' + message['content'] + '<|text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|role|>assistant' }}
            {%- if controls %}
                {{- ' ' + controls | tojson()}}
            {%- endif %}
        {{- '<|end_role|>' }}
    {%- endif %}
{%- endfor %}
"""

FILTERS = """\
{%- set roles = messages | map(attribute='role') | list -%}
{{ roles | join(',') }}|{{ roles | unique | list | length }}|{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='content') | join(' / ') | upper }}
{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }} {{ m.content[:3] }}…{{ m.content[-2:] }}{{ "; " if not loop.last }}{% endfor %}
{{ (messages | first).role | capitalize }} {{ (messages | last).content | replace('a', 'o') }}
{{ {'a': 1, 'b': [1.5, none, true, "é<&'\\""]} | tojson }}
{{ {'k': [1, {'x': 'y'}]} | tojson(indent=2) }}
{{ {'type': 'function', 'name': messages[0].role, 'arguments': {'z': 1, 'a': {'y': 2, 'b': 3}}} | tojson }}
{{ messages[0] | tojson }} {{ messages | tojson(indent=1) }}
{{ [3, 1, 2] | sort | join }} {{ (1, 2) | length }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 3 }} {{ "a" in "abc" }} {{ none is none }}
{{ "x,y".split(",") | last }} {{ "  pad ".strip() ~ "!" }} {{ "%s-%d" | format("a", 3) }} {{ messages is iterable }} {{ "5" | int + 1 }}
{{ messages[0].items() | list | length }} {{ messages[0].get('name', 'nobody') }} {{ messages[0]['role'].title() }}
{{ range(3) | list }} {{ 'yes' if messages | length > 1 else 'no' }} {{ undefined_thing | default('d') }}
"""

PLAIN = [{"role": "user", "content": " What is <em>2 + 2</em>? "}]
SYSTEM = [{"role": "system", "content": " Be brief. /no_think "}] + PLAIN
TURNS = SYSTEM + [{"role": "assistant", "content": "<think>\nsum\n</think>\n\n4."},
                  {"role": "user", "content": "Größer? 更多\n'quoted' \"double\""}]
TOOL = PLAIN + [{"role": "assistant", "content": "<think>\nask\n</think>\nwait"}, {"role": "tool", "content": "{\"a\": 1}"},
                {"role": "tool", "content": "two"}]
TWICE = PLAIN + PLAIN
ENDS_WITH_ANSWER = TURNS[:3]
CASES = [PLAIN, SYSTEM, TURNS, TOOL, TWICE, ENDS_WITH_ANSWER]
NAMES = {"llama": LLAMA, "mistral": MISTRAL, "qwen": QWEN, "gemma": GEMMA, "phi": PHI, "smollm": SMOLLM,
         "granite": GRANITE, "filters": FILTERS}


def main():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    out = []
    for name, template in NAMES.items():
        cases = []
        for messages in CASES:
            try:
                text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False,
                                                     add_generation_prompt=True)
                cases.append({"messages": messages, "rendered": text})
            except Exception as error:
                assert type(error).__name__ in ("TemplateError", "UndefinedError"), error
                cases.append({"messages": messages, "error": str(error)})
        out.append({"name": name, "template": template, "cases": cases})
    print(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "templates": out}, ensure_ascii=False, indent=1))


main()
