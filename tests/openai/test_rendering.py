"""Templates are rendered in a process that is given up when a template takes too long or too much."""

from __future__ import annotations

import asyncio
import time

import pytest

from triton_repo.openai.chat_template import ChatTemplate, TemplateError
from triton_repo.openai.rendering import Renderer

HI = [{"role": "user", "content": "hi"}]
GOOD = ChatTemplate({"default": "{{ bos_token }}{{ messages[0].content }}{{ x }}", "tool_use": "tools"}, {"bos_token": "<s>"})
LONG = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a product": "{{ ('x' * 1000000000000)[0] }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "doubling": "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x[0] }}",
    "padding": "{{ ''.ljust(100000000000)[0] }}{{ '%100000000000d' % 1 }}",
    "replacing": "{{ ('x' * 300000).replace('x', 'x' * 300000)[0] }}",
}


def rendered(templates, *asked, **options):
    """What each request gives, one after another: a text, or the error's words."""

    async def work():
        renderer, found = Renderer(templates, **options), []
        for model, request in asked:
            try:
                found.append(await renderer.render(model, messages=HI, **request))
            except TemplateError as error:
                found.append(str(error))
        await renderer.close()
        return found

    return asyncio.run(work())


def test_it_renders_what_the_template_itself_does():
    asked = [("a", {}), ("a", {"variables": {"x": "é\ud800", "self": 1}}), ("a", {"tools": [{}]}), ("a", {"messages_": 1})]
    assert rendered({"a": GOOD}, *asked[:3]) == ["<s>hi", "<s>hié\ud800", "tools"]


@pytest.mark.parametrize("name", LONG)
def test_a_template_that_does_not_end_is_given_up_and_the_next_request_is_served(name):
    start = time.monotonic()
    said = rendered({"bad": ChatTemplate({"default": LONG[name]}), "a": GOOD}, ("bad", {}), ("a", {}), max_seconds=1.5)
    assert said[0].startswith("the chat template") and len(said[0]) < 600 and said[1] == "<s>hi"
    assert time.monotonic() - start < 8


def test_memory_is_bounded():
    large = ChatTemplate({"default": "{{ ('x' * (messages | length * 3000000000)) | length }}"})
    (said,) = rendered({"large": large}, ("large", {}))
    assert said.startswith("the chat template"), said


def test_streams_go_on_meanwhile():
    async def work():
        renderer = Renderer({"bad": ChatTemplate({"default": LONG["loops"]})}, max_seconds=2)
        turns, task = 0, asyncio.create_task(renderer.render("bad", messages=HI))
        while not task.done():
            turns += 1
            await asyncio.sleep(0.01)
        with pytest.raises(TemplateError, match="more than 2 seconds"):
            task.result()
        return turns

    assert asyncio.run(work()) > 50


def test_who_leaves_takes_no_answer_from_the_next():
    async def work():
        renderer = Renderer({"slow": ChatTemplate({"default": LONG["loops"]}), "a": GOOD})
        await renderer.render("a", messages=HI)
        task = asyncio.create_task(renderer.render("slow", messages=HI))
        await asyncio.sleep(0.1)
        task.cancel()
        found = await asyncio.gather(*(renderer.render("a", messages=HI, variables={"x": str(n)}) for n in range(5)))
        await renderer.close()
        return found

    assert asyncio.run(work()) == [f"<s>hi{n}" for n in range(5)]
