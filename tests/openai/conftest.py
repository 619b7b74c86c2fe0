"""A frontend in a process of its own before the real server, with a chat template, reasoning and tool-call tags."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from tests.triton_repo.conftest import Served, repository, served
from triton_repo.openai.run import Frontend, Settings
from triton_repo.openai.tags import Tags

__all__ = ["repository", "served"]
TEMPLATE = """{%- for message in messages -%}
{{ '<|' + message.role + '|>' + (message.content or '') + '\\n' }}
{%- endfor -%}
{%- if tools %}{{ tools | tojson }}{% endif -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% if enable_thinking is true %}<think>{% elif enable_thinking is false %}<think></think>{% endif %}{% endif -%}
{%- if messages[0].content == 'refuse me' %}{{ raise_exception('no such first message') }}{% endif -%}"""
KEY = "sk-test-1"


@dataclass(frozen=True)
class Front:
    """The frontend, and the server behind it."""

    frontend: Frontend
    served: Served

    @property
    def url(self) -> str:
        return self.frontend.base_url

    @property
    def engine(self) -> object:
        return self.served.engine

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": self.url, "api_key": KEY, "max_retries": 0, **options})


@pytest.fixture(scope="session")
def template_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(TEMPLATE, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def front(served: Served, repository: Path, template_file: Path) -> Iterator[Front]:
    settings = Settings(
        repository,
        served.url,
        port=0,
        keys=["sk-other", KEY],
        model_name="tiny",
        chat_template=template_file,
        reasoning=Tags("<think>", "</think>"),
        tool_calls=Tags("<tool_call>", "</tool_call>"),
        max_body_mb=1,
    )
    with Frontend(settings) as frontend:
        yield Front(frontend, served)


@pytest.fixture(scope="session")
def client(front: Front) -> openai.OpenAI:
    return front.client()
