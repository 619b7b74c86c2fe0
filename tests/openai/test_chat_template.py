"""Templates are rendered as transformers renders them: compared to the character, over templates in the styles of public models."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ngpt.errors import ConfigError
from tests.runtime.making import byte_level
from triton_repo.openai.chat_template import ChatTemplate, TemplateError

STYLES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama-2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}{% if loop.first and system %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama-3": "{{- bos_token }}\n{%- set ns = namespace(system='') %}\n{%- for m in messages %}\n    {%- if m.role == 'system' %}\n"
    "        {%- set ns.system = m.content | trim %}\n    {%- endif %}\n{%- endfor %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' + ns.system + '<|eot_id|>' }}\n"
    "{%- if tools is not none %}\n    {{- 'Tools: ' }}\n    {%- for t in tools %}\n        {{- t | tojson(indent=4) }}\n        {{- '\n\n' }}\n    {%- endfor %}\n{%- endif %}\n"
    "{%- for m in messages if m.role != 'system' %}\n    {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ (m.content or '') | trim ~ '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "thinking": "{%- for m in messages %}\n{%- if m.role == 'assistant' %}\n{%- set content = m.content %}\n{%- if '</think>' in content %}\n"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n{%- endif %}\n{%- generation %}\n{{- content }}\n{%- endgeneration %}\n"
    "{%- elif m.role == 'tool' %}\n{{- '<tool>' + m.content + '</tool>' }}\n{%- else %}\n{{- m.role | upper + ': ' + m.content + '\n' }}\n{%- endif %}\n"
    "{%- if m.reasoning_content is defined and m.reasoning_content %}\n{{- '[' + m.reasoning_content + ']' }}\n{%- endif %}\n"
    "{%- if m.tool_calls %}\n{%- for c in m.tool_calls %}\n{%- if loop.index > 3 %}{% break %}{% endif %}\n{{- c.function | tojson }}\n{%- endfor %}\n{%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n{{- 'A: ' }}\n{%- if enable_thinking is defined and enable_thinking is false %}\n{{- '<think>\n\n</think>\n\n' }}\n"
    "{%- else %}\n{{- '<think>\n' }}\n{%- endif %}\n{%- endif %}",
    "mistral": "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content'] %}\n    {%- set rest = messages[1:] %}\n"
    "{%- else %}\n    {%- set rest = messages %}\n{%- endif %}\n{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}\n{{- bos_token }}\n"
    "{%- for m in rest %}\n    {%- if m.role == 'user' %}\n        {%- if tools is not none and m == users[-1] %}\n            {{- '[AVAILABLE_TOOLS] [' }}\n"
    "            {%- for t in tools %}\n                {{- '{\"type\": \"function\", \"function\": {' }}\n                {%- for key, val in t.function.items() if key != 'return' %}\n"
    "                    {%- if val is string %}\n                        {{- '\"' + key + '\": \"' + val + '\"' }}\n                    {%- else %}\n"
    "                        {{- '\"' + key + '\": ' + val | tojson }}\n                    {%- endif %}\n                    {%- if not loop.last %}{{- ', ' }}{%- endif %}\n"
    "                {%- endfor %}\n                {{- '}}' if not loop.last else '}}]' }}\n            {%- endfor %}\n            {{- '[/AVAILABLE_TOOLS]' }}\n        {%- endif %}\n"
    "        {{- '[INST] ' + (system_message + '\n\n' if loop.last and system_message is defined else '') + m.content + '[/INST]' }}\n"
    "    {%- elif m.role == 'assistant' and m.content is defined %}\n        {{- ' ' + m.content | trim + eos_token }}\n"
    "    {%- elif m.tool_calls is defined %}\n        {{- '[TOOL_CALLS] ' ~ (m.tool_calls | map(attribute='function') | list | tojson) ~ eos_token }}\n"
    "    {%- elif m.role in ['tool', 'tool_results'] %}\n        {{- '[TOOL_RESULTS] ' + {'content': m.content | string} | tojson + '[/TOOL_RESULTS]' }}\n    {%- endif %}\n{%- endfor %}",
    "qwen-tools": "{%- if tools %}\n    {{- '<|im_start|>system\n' }}\n    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}\n"
    "    {{- '# Tools\n\n<tools>' }}\n    {%- for tool in tools %}\n        {{- '\n' }}\n        {{- tool | tojson }}\n    {%- endfor %}\n    {{- '\n</tools><|im_end|>\n' }}\n"
    "{%- elif messages[0].role == 'system' %}\n    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}\n{%- endif %}\n"
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages | length - 1) %}\n{%- for m in messages[::-1] %}\n    {%- set index = (messages | length - 1) - loop.index0 %}\n"
    "    {%- if ns.multi_step_tool and m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}\n"
    "        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- for m in messages %}\n    {%- set content = m.content if m.content is string else '' %}\n    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}\n"
    "        {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}\n    {%- elif m.role == 'assistant' %}\n        {%- set reasoning = '' %}\n"
    "        {%- if m.reasoning_content is string %}\n            {%- set reasoning = m.reasoning_content %}\n        {%- elif '</think>' in content %}\n"
    "            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}\n            {%- set content = content.split('</think>')[-1].lstrip('\n') %}\n"
    "        {%- endif %}\n        {{- '<|im_start|>assistant\n' }}\n        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}\n"
    "            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}\n        {%- else %}\n            {{- content }}\n        {%- endif %}\n"
    "        {%- for call in m.tool_calls or [] %}\n            {%- if (loop.first and content) or not loop.first %}{{- '\n' }}{%- endif %}\n"
    "            {{- '<tool_call>\n{\"name\": \"' ~ call.function.name ~ '\", \"arguments\": ' }}\n            {%- if call.function.arguments is string %}{{- call.function.arguments }}"
    "{%- else %}{{- call.function.arguments | tojson }}{%- endif %}\n            {{- '}\n</tool_call>' }}\n        {%- endfor %}\n        {{- '<|im_end|>\n' }}\n"
    "    {%- elif m.role == 'tool' %}\n        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}\n"
    "        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}\n        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}\n{%- endif %}",
    "deepseek": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=true, is_tool=false, system_prompt='') %}"
    "{%- for m in messages %}{%- if m['role'] == 'system' %}{% set ns.system_prompt = m['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for m in messages %}{%- if m['role'] == 'user' %}{%- set ns.is_tool = false -%}{{ '<｜User｜>' + m['content'] }}{%- endif %}"
    "{%- if m['role'] == 'assistant' and m['content'] is none %}{{ 'never: what is null is not there' }}{%- endif %}"
    "{%- if m['role'] == 'assistant' and m['content'] is defined %}{%- if ns.is_tool %}{{ '<｜tool▁outputs▁end｜>' + m['content'] + '<｜end｜>' }}{%- set ns.is_tool = false -%}"
    "{%- else %}{% set content = m['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + content + '<｜end｜>' }}{%- endif %}{%- endif %}"
    "{%- if m['role'] == 'tool' %}{%- if not ns.is_tool %}{{ '<｜tool▁outputs▁begin｜>' }}{%- set ns.is_tool = true -%}{%- endif %}{{ m['content'] }}{%- endif %}{%- endfor -%}"
    "{% if ns.is_tool %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{ '<｜Assistant｜><think>\n' }}{% endif %}",
    "nemotron": "{%- set system = namespace(text='', thinking=true) -%}{%- for m in messages if m.role == 'system' -%}{%- set system.text = m.content -%}{%- endfor -%}\n"
    "{%- for m in messages -%}{%- if m.role in ('user', 'system') and '/no_think' in (m.content or '') -%}{%- set system.thinking = false -%}{%- endif -%}{%- endfor -%}\n"
    "{{- '<extra_id_0>System\n' ~ system.text.replace('/no_think', '').strip() -}}\n{%- if tools -%}{{ '\n' }}{%- for t in tools -%}<tool> {{ t.function | tojson }} </tool>{{ '\n' }}{%- endfor -%}{%- endif -%}\n"
    "{%- for m in messages -%}\n{%- if m.role == 'user' -%}{{ '\n<extra_id_1>User\n' ~ m.content | trim }}\n{%- elif m.role == 'assistant' -%}{{ '\n<extra_id_1>Assistant\n' ~ m.get('content', '') }}\n"
    "{%- elif m.role == 'tool' -%}{{ '\n<extra_id_1>Tool\n' ~ m.content }}{%- endif -%}\n{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ '\n<extra_id_1>Assistant\n' }}{%- if system.thinking -%}{{ '<think>\n' }}{%- else -%}{{ '<think></think>' }}{%- endif -%}{%- endif -%}",
    "dated": "{% set day = strftime_now('%Y') %}{{ 'in ' + day[:1] }}{% for m in messages | selectattr('role', 'ne', 'system') %}"
    "{{ dict(r=m.role, c=m.content) | tojson(sort_keys=true, ensure_ascii=true) }}{% if not loop.last %},{% endif %}{% endfor %}",
}  # fmt: skip
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "<a & 'b'>", "parameters": {"type": "object", "properties": {}}},
    }
]
theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **TOKENS)
ours = {name: ChatTemplate({"default": source}, TOKENS) for name, source in STYLES.items()}
texts = st.text(st.sampled_from(" ab\n<>&'\"{}%é日😀</think>\\"), max_size=20)
messages_of = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts | st.none()},
        optional={
            "reasoning_content": texts,
            "reasoning": texts | st.none(),
            "name": st.none(),
            "tool_calls": st.none() | st.just([{"type": "function", "function": {"name": "f", "arguments": {"x": "<1>"}}}] * 4),
        },
    ),
    min_size=1,
    max_size=5,
)


def both(name, messages, variables=None, **options):
    """What each makes of it: a text, or the fact that it refuses."""
    found = []
    for render in (
        lambda: ours[name].render(messages, variables=variables, **options),
        lambda: theirs.apply_chat_template(messages, chat_template=STYLES[name], tokenize=False, **(variables or {}), **options),
    ):
        try:
            found.append(render())
        except Exception as error:
            found.append(type(error).__name__ != "" and None)
    return found


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=60, deadline=None)
@given(messages=messages_of, prompt=st.booleans(), tools=st.booleans(), thinking=st.sampled_from([None, True, False]))
def test_every_style_is_rendered_as_transformers_does(name, messages, prompt, tools, thinking):
    options = {"add_generation_prompt": prompt, "tools": TOOLS if tools else None}
    variables = {} if thinking is None else {"enable_thinking": thinking}
    mine, its = both(name, messages, variables, **options)
    assert mine == its


@pytest.mark.parametrize("name", ["chatml", "llama-3", "gemma", "llama-2"])
@pytest.mark.parametrize("content", ["so far", "so far ", "  so\n"])
def test_a_last_message_that_goes_on(name, content):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]
    mine, its = both(name, messages, add_generation_prompt=False, continue_final_message=True)
    assert mine == its and mine is not None and mine.rstrip().endswith(content.strip())


def test_most_conversations_are_rendered_and_not_refused():
    for name, template in ours.items():
        text = template.render([{"role": "user", "content": "hi"}])
        assert "hi" in text, name
    with pytest.raises(TemplateError, match="no system role"):
        ours["gemma"].render([{"role": "system", "content": "x"}])


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{% set ns = namespace(__class__=1) %}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.append(1) }}",
    "{{ self._TemplateReference__context }}{{ ''|attr('__class__') }}",
    "{% for i in range(10000000) %}x{% endfor %}",
    "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ 1 // 0 }}",
    "{{ nobody.there }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_that_reaches_out_is_stopped(source):
    with pytest.raises(TemplateError) as caught:
        text = ChatTemplate({"default": source}).render([{"role": "user", "content": "x"}])
        assert "class" not in text and "uid=" not in text, text
        raise TemplateError("rendered to nothing of use")
    assert "\n" not in str(caught.value)[:100] and len(str(caught.value)) <= 500


def test_where_templates_are_found(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "A{{ bos_token }}", "bos_token": {"content": "<b>"}, "eos_token": "<e>"}))
    hi = [{"role": "user", "content": "hi"}]
    assert ChatTemplate.load(tmp_path).render(hi) == "A<b>"
    (tmp_path / "chat_template.jinja").write_text("F{{ eos_token }}")
    assert ChatTemplate.load(tmp_path).render(hi) == "F<e>"
    (tmp_path / "other.txt").write_text("O")
    assert ChatTemplate.load(tmp_path, tmp_path / "other.txt").render(hi) == "O"
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path).render(hi) == "D" and ChatTemplate.load(tmp_path).render(hi, tools=TOOLS) == "T"


@pytest.mark.parametrize("data", [b"{% if %}", b"{{", b"\xff", b"x" * (2 << 20), b"{% include 'x' %}{% nobody %}"])
def test_what_is_no_template_is_refused_at_the_start(tmp_path, data):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(ConfigError, match="template|bytes"):
        ChatTemplate.load(tmp_path, tmp_path / "t")
