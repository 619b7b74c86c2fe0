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
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts},
        optional={
            "reasoning_content": texts,
            "reasoning": texts,
            "tool_calls": st.just([{"type": "function", "function": {"name": "f", "arguments": {"x": "<1>"}}}] * 4),
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
