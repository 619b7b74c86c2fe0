"""A real tritonserver with a real engine: text, tokens, streams, refusals, cancellation."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.triton_repo.conftest import PROMPT, SLOTS
from triton_repo.client import (
    RequestRefused,
    generate_text,
    generate_tokens,
    responses,
    stream_text,
    token_tensors,
)

PROMPTS = ["def main():\n", "import os\n\n\nclass ", "    return self.", "# é 🙂 ", "for i in range(", 'print("']
NO_END = {"end_id": -1}


def text_request(prompt: str, max_tokens: int, **options) -> dict[str, np.ndarray]:
    return {
        "text_input": np.asarray([[prompt.encode()]], object),
        "max_tokens": np.asarray([[max_tokens]], np.int32),
        **{name: np.asarray([[value]]) for name, value in options.items()},
    }


def post(served, path: str, body: dict) -> bytes:
    request = urllib.request.Request(f"http://{served.server.http_url}/v2/models/{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read()


# --- the same text and the same tokens as the engine itself


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_joined_is_the_full_decode(served, prompt):
    engine = served.engine
    pieces = list(stream_text(served.url, prompt, max_tokens=24))
    tokens = engine.generate([engine.tokenizer.encode(prompt)], 24)[0]
    assert "".join(pieces) == engine.tokenizer.decode(tokens) == generate_text(served.url, prompt, max_tokens=24)
    assert len(pieces) > 1


def test_tokens_model_gives_the_engines_tokens(served):
    prompts = [served.engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = served.engine.generate(prompts, 20)
    assert [generate_tokens(served.url, prompt, max_tokens=20) for prompt in prompts] == expected
    assert [generate_tokens(served.url, prompt, max_tokens=20, stream=True) for prompt in prompts] == expected


def test_concurrent_requests_do_not_disturb_each_other(served):
    prompts = PROMPTS * 3  # more than there are slots
    expected = {prompt: served.engine.generate_text(prompt, 20) for prompt in PROMPTS}
    with ThreadPoolExecutor(len(prompts)) as pool:
        for _ in range(6):  # answers that get lost now and then show in the second or third wave
            found = list(pool.map(lambda prompt: "".join(stream_text(served.url, prompt, max_tokens=20)), prompts))
            assert found == [expected[prompt] for prompt in prompts]


def test_emoji_split_over_several_tokens_arrive_whole(served):
    """The prompt is echoed by the tokens of an emoji alone: every other token is forbidden by the test's word list."""
    tokenizer = served.engine.tokenizer
    emoji = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(emoji) > 1, "the example's vocabulary spells an emoji with several tokens"
    others = [(token,) for token in range(served.engine.manifest.model.vocab_size) if token not in emoji]
    tokens = generate_tokens(served.url, tokenizer.encode("🙂🙂"), max_tokens=12, bad_sequences=others, **NO_END)
    assert set(tokens) <= set(emoji)
    tensors = {"TOKENS_BATCH": np.asarray([[emoji * 3]], np.int32), "SEQUENCE_LENGTH": np.asarray([[3 * len(emoji)]], np.int32)}
    (result,) = responses(served.url, "postprocessing", tensors)
    assert result.as_numpy("OUTPUT").reshape(-1)[0].decode() == "🙂🙂🙂"


def test_preprocessing_gives_what_the_tokens_model_takes(served):
    tensors = {
        "QUERY": np.asarray([["# 🙂 x".encode()]], object),
        "REQUEST_OUTPUT_LEN": np.asarray([[5]], np.int32),
        "STOP_WORDS_DICT": np.asarray([[b"def", b"class"]], object),
    }
    (result,) = responses(served.url, "preprocessing", tensors)
    encode = served.engine.tokenizer.encode
    assert result.as_numpy("INPUT_ID").tolist() == [encode("# 🙂 x")]
    ids, ends = result.as_numpy("STOP_WORDS_IDS").tolist()[0]
    first, second = (encode(word, add_special_tokens=False) for word in ("def", "class"))
    assert ids[: len(first) + len(second)] == first + second
    assert ends[:2] == [len(first), len(first) + len(second)]
    assert result.as_numpy("OUT_END_ID").tolist() == [[served.engine.manifest.model.eos_token_ids[0]]]


# --- options


def test_the_prompt_is_in_the_answer_unless_excluded(served):
    completion = generate_text(served.url, PROMPT, max_tokens=8)
    assert generate_text(served.url, PROMPT, max_tokens=8, exclude_input=False) == PROMPT + completion


def test_stop_words_end_the_text_before_them(served):
    whole = generate_text(served.url, PROMPT, max_tokens=40, **NO_END)
    word = whole[12:15]
    before = whole[: whole.index(word)]
    assert "".join(stream_text(served.url, PROMPT, max_tokens=40, stop_words=[word, "never in it"], **NO_END)) == before
    assert generate_text(served.url, PROMPT, max_tokens=40, stop_words=[word], **NO_END) == before
    served.wait_for(lambda now: now["ngpt_requests_active"] == 0)


def test_stop_sequences_end_the_tokens(served):
    prompt = served.engine.tokenizer.encode(PROMPT)
    whole = generate_tokens(served.url, prompt, max_tokens=20, **NO_END)
    stopped = generate_tokens(served.url, prompt, max_tokens=20, stop_sequences=[whole[6:8]], **NO_END)
    assert stopped == whole[: len(stopped)] and len(stopped) < 20
    assert stopped[-2:] == whole[6:8]


def test_bad_words_do_not_appear(served):
    prompt = served.engine.tokenizer.encode(PROMPT)
    whole = generate_tokens(served.url, prompt, max_tokens=20, **NO_END)
    other = generate_tokens(served.url, prompt, max_tokens=20, bad_sequences=[[whole[4]]], **NO_END)
    assert whole[4] not in other and other[: whole.index(whole[4])] == whole[: whole.index(whole[4])]
    word = served.engine.tokenizer.decode([whole[4]]).strip() or "self"
    text = generate_text(served.url, PROMPT, max_tokens=20, bad_words=[word], **NO_END)
    banned = served.engine.tokenizer.encode(word, add_special_tokens=False)
    ids = served.engine.tokenizer.encode(text)
    assert all(ids[at : at + len(banned)] != banned for at in range(len(ids)))


def test_min_tokens_delays_the_end(served):
    prompt = served.engine.tokenizer.encode(PROMPT)
    end = generate_tokens(served.url, prompt, max_tokens=12, **NO_END)[3]
    assert len(generate_tokens(served.url, prompt, max_tokens=12, end_id=end)) <= 4
    assert len(generate_tokens(served.url, prompt, max_tokens=12, end_id=end, min_tokens=9)) >= 9


def test_a_seed_makes_sampling_repeatable(served):
    options = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, **NO_END}
    first, again, other = (generate_text(served.url, PROMPT, max_tokens=24, seed=seed, **options) for seed in (7, 7, 8))
    assert first == again != other
    engine = served.engine
    prompt = engine.tokenizer.encode(PROMPT)
    alone = engine.generate([prompt], 24, True, temperature=1.5, top_k=50, top_p=float(np.float32(0.95)), seed=7)[0]
    assert engine.tokenizer.decode(alone) == first


def test_penalties_reach_the_sampler(served):
    prompt = served.engine.tokenizer.encode(PROMPT)
    options = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    expected = served.engine.generate([prompt], 24, True, **options)[0]
    assert generate_tokens(served.url, prompt, max_tokens=24, **options, **NO_END) == expected
    assert expected != served.engine.generate([prompt], 24, True)[0]


def test_everything_that_can_be_returned(served):
    flags = ("log_probs", "context_logits", "generation_logits", "num_input_tokens", "num_output_tokens", "perf_metrics")
    tensors = text_request(PROMPT, 6, **{f"return_{flag}": True for flag in flags}, end_id=np.int32(-1))
    (result,) = responses(served.url, "ensemble", tensors)
    engine, vocabulary = served.engine, served.engine.manifest.model.vocab_size
    prompt = engine.tokenizer.encode(PROMPT)
    tokens = engine.generate([prompt], 6, True)[0]
    logits = engine.logits(np.asarray([prompt + tokens]))[0]
    assert result.as_numpy("num_input_tokens").item() == len(prompt)
    assert result.as_numpy("num_output_tokens").item() == 6
    context, generated = result.as_numpy("context_logits"), result.as_numpy("generation_logits")
    assert context.shape == (1, len(prompt), vocabulary) and generated.shape == (1, 1, 6, vocabulary)
    # The teacher-forced logits come from one batch of rows, the served ones from single steps of an int8 engine.
    np.testing.assert_allclose(context[0], logits[: len(prompt)], atol=0.1)
    assert [int(row.argmax()) for row in generated[0, 0]] == tokens
    rows = generated[0, 0].astype(np.float64)
    expected = [row[t] - np.log(np.exp(row - row.max()).sum()) - row.max() for row, t in zip(rows, tokens, strict=True)]
    np.testing.assert_allclose(result.as_numpy("output_log_probs")[0, 0], expected, atol=1e-4)
    np.testing.assert_allclose(result.as_numpy("cum_log_probs").item(), sum(expected), atol=1e-3)
    times = [result.as_numpy(f"{name}_time_ns").item() for name in ("arrival", "first_scheduled", "first_token", "last_token")]
    assert times == sorted(times) and times[0] > 0


# --- refusals


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"beam_width": 2}, "beam_width"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_tokens": 99, "max_tokens": 9}, "min_tokens"),
        ({"end_id": 1_000_000}, "end_id"),
    ],
)
def test_unsupported_requests_are_refused_by_name(served, options, name):
    with pytest.raises(RequestRefused, match=f"{name}: expected"):
        generate_text(served.url, PROMPT, **options)


def test_neutral_options_change_nothing(served):
    neutral = {"beam_width": 1, "num_return_sequences": 1, "length_penalty": 1.0, "top_k": 0, "top_p": 0.0, "pad_id": 0}
    neutral |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "seed": 1}
    plain = generate_text(served.url, PROMPT, max_tokens=8)
    assert generate_text(served.url, PROMPT, max_tokens=8, stop_words=[""], bad_words=[""], **neutral) == plain


@pytest.mark.parametrize(
    ("prompt", "message"),
    [(b"\xff\xfe", "text_input: expected UTF-8"), ("", "text_input: "), ("a b " * 2000, "text_input: the prompt is too long")],
)
def test_bad_text_is_refused(served, prompt, message):
    with pytest.raises(RequestRefused, match=message):
        generate_text(served.url, prompt, max_tokens=4)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_token_ids_out_of_range_are_refused(served, token):
    with pytest.raises(RequestRefused, match=f"input_ids: .*found {token}"):
        generate_tokens(served.url, [1, token], max_tokens=4)


# --- cancellation


def test_a_closed_stream_frees_its_slot_at_once(served):
    before = served.wait_for(lambda now: now["ngpt_requests_active"] == 0)["ngpt_requests_cancelled"]
    streams = [stream_text(served.url, PROMPT, max_tokens=480, **NO_END) for _ in range(SLOTS)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()
    after = served.wait_for(lambda now: now["ngpt_requests_cancelled"] >= before + SLOTS, seconds=2.0)
    assert after["ngpt_requests_active"] == 0


def test_a_client_that_leaves_the_tokens_model_frees_its_slot(served):
    before = served.wait_for(lambda now: now["ngpt_requests_active"] == 0)["ngpt_requests_cancelled"]
    tensors = token_tensors([1, 5], 480, (), (), {"stream": True, **NO_END})
    stream = responses(served.url, "tensorrt_llm", tensors)
    next(stream)
    stream.close()
    served.wait_for(lambda now: now["ngpt_requests_cancelled"] == before + 1, seconds=2.0)


def test_a_stop_request_ends_the_request_with_its_id(served):
    tensors = token_tensors([1, 5], 480, (), (), {"stream": True, **NO_END})
    received = 0
    for _ in responses(served.url, "tensorrt_llm", tensors, request_id="to-be-stopped"):
        received += 1
        if received == 3:
            stop = {**token_tensors([0], 1, (), (), {}), "stop": np.asarray([[True]])}
            assert list(responses(served.url, "tensorrt_llm", stop, request_id="to-be-stopped")) == []
    assert 3 <= received < 480


def test_waiting_requests_are_served_when_slots_become_free(served):
    streams = [stream_text(served.url, PROMPT, max_tokens=480, **NO_END) for _ in range(SLOTS)]
    for stream in streams:
        next(stream)
    found: list[str] = []
    waiting = threading.Thread(target=lambda: found.append(generate_text(served.url, PROMPT, max_tokens=4)))
    waiting.start()
    for stream in streams:
        stream.close()
    waiting.join(10)
    assert found == [served.engine.generate_text(PROMPT, 4)]


# --- what benchmarking clients measure


def test_every_response_of_a_stream_has_text_and_there_is_one_a_token(served):
    """perf_analyzer counts responses: an empty last one would be a token too many."""
    tensors = text_request(PROMPT, 24, stream=True, exclude_input_in_output=True, end_id=np.int32(-1))
    texts = [result.as_numpy("text_output").reshape(-1)[0] for result in responses(served.url, "ensemble", tensors)]
    assert len(texts) == 24 and all(texts)


# --- HTTP


def test_http_generate(served):
    answer = json.loads(
        post(served, "ensemble/generate", {"text_input": PROMPT, "max_tokens": 8, "bad_words": "", "stop_words": ""})
    )
    assert answer["text_output"] == PROMPT + served.engine.generate_text(PROMPT, 8)
    body = {"text_input": PROMPT, "max_tokens": 8, "parameters": {"temperature": 0.0, "exclude_input_in_output": True}}
    assert json.loads(post(served, "ensemble/generate", body))["text_output"].endswith(served.engine.generate_text(PROMPT, 8))


def test_http_generate_stream(served):
    raw = post(served, "ensemble/generate_stream", {"text_input": PROMPT, "max_tokens": 12, "stream": True}).decode()
    events = [json.loads(line.removeprefix("data:")) for line in raw.splitlines() if line.startswith("data:")]
    assert len(events) > 2
    assert "".join(event["text_output"] for event in events) == served.engine.generate_text(PROMPT, 12)


def test_http_refusal_is_a_client_error(served):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(served, "ensemble/generate", {"text_input": PROMPT, "max_tokens": 0})
    assert refused.value.code == 400
    assert b"max_tokens: expected at least 1" in refused.value.read()


def test_metrics_count_tokens(served):
    before = served.wait_for(lambda now: now["ngpt_requests_active"] == 0)["ngpt_generated_tokens"]
    time.sleep(0.2)  # what earlier requests generated has been published by now
    before = served.metrics()["ngpt_generated_tokens"]
    generate_tokens(served.url, [1, 5], max_tokens=17, **NO_END)
    now = served.wait_for(lambda values: values["ngpt_generated_tokens"] >= before + 17)
    assert now["ngpt_generated_tokens"] == before + 17 and now["ngpt_slots"] == SLOTS


# --- what came with the one model


def asked(served, **tensors):
    """Text of a request whose inputs are named one by one."""
    made = {"text_input": np.asarray([[PROMPT.encode()]], object), "exclude_input_in_output": np.asarray([[True]])}
    (result,) = responses(served.url, "ensemble", made | {name: np.asarray([[value]]) for name, value in tensors.items()})
    return result


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [("n", np.int32(3), np.int32(1)), ("best_of", np.int32(2), np.int32(1)), ("lora_task_id", np.uint64(5), None),
     ("use_beam_search", np.bool_(True), np.bool_(False)), ("no_repeat_ngram_size", np.int32(2), np.int32(0))],
)  # fmt: skip
def test_what_other_servers_know_is_refused_by_name_over_http_too(served, name, value, neutral):
    with pytest.raises(RequestRefused, match=f"^{name}: expected"):
        asked(served, max_tokens=np.int32(4), **{name: value})
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(served, "ensemble/generate", {"text_input": PROMPT, "max_tokens": 4, name: value.item()})
    assert refused.value.code == 400 and f"{name}: expected".encode() in refused.value.read()
    if neutral is not None:
        expected = served.engine.generate_text(PROMPT, 4)
        assert asked(served, max_tokens=np.int32(4), **{name: neutral}).as_numpy("text_output").item().decode() == expected


def test_older_names_no_length_ids_and_the_end(served):
    result = asked(served, max_new_tokens=np.int32(9), random_seed=np.uint64(7), temperature=np.float32(1.5), ignore_eos=np.bool_(True),
                   return_output_ids=np.bool_(True), return_finish_reason=np.bool_(True))  # fmt: skip
    prompt = served.engine.tokenizer.encode(PROMPT)
    tokens = served.engine.generate([prompt], 9, True, temperature=1.5, seed=7)[0]
    assert result.as_numpy("output_ids").reshape(-1).tolist() == tokens and result.as_numpy("sequence_length").item() == 9
    assert result.as_numpy("finish_reason").item() == b"length"
    whole = asked(served, ignore_eos=np.bool_(True), return_num_output_tokens=np.bool_(True))
    assert whole.as_numpy("num_output_tokens").item() == served.engine.manifest.model.max_length - len(prompt)
    bare = asked(served, max_tokens=np.int32(4), add_special_tokens=np.bool_(False), return_num_input_tokens=np.bool_(True))
    assert bare.as_numpy("num_input_tokens").item() == len(served.engine.tokenizer.encode(PROMPT, add_special_tokens=False))
