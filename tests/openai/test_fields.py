"""Every field of a request is in the guide's table; what has no effect has none."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from triton_repo.openai import requests
from triton_repo.openai.errors import ApiError

TABLE = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8").split("## Fields")[1].split("Where a request says nothing")[0]
NAMED = set(re.findall(r"`([a-z_]+)`", TABLE))
FIELDS = set(requests.ChatRequest.model_fields) | set(requests.CompletionRequest.model_fields)
BODY = {"model": "tiny", "prompt": "x"}


def test_the_guide_names_every_field_and_no_other():
    known = FIELDS | requests.IGNORED | set(requests.REFUSED)
    other = {
        "include_usage",
        "continuous_usage_stats",
        "json_object",
        "json_schema",
        "text",
        "developer",
        "system",
        "required",
        "auto",
    }
    assert NAMED - other == known


@pytest.mark.parametrize("name", sorted(requests.REFUSED))
def test_what_is_refused_says_its_name_and_its_neutral_value_is_taken(name):
    neutral, instead = requests.REFUSED[name]
    if name in requests.CompletionRequest.model_fields:
        return  # of the other endpoint
    for value in (neutral, None):
        requests.read(requests.CompletionRequest, BODY | {name: value})
    with pytest.raises(ApiError, match=f"^{name}: not supported. ") as caught:
        requests.read(requests.CompletionRequest, BODY | {name: ["something"]})
    assert caught.value.param == name and instead in str(caught.value)


@pytest.mark.parametrize("name", sorted(requests.IGNORED))
def test_what_has_no_effect_is_taken_whatever_it_is(name):
    requests.read(requests.CompletionRequest, BODY | {name: {"any": [1]}})
