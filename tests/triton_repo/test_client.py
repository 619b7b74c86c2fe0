"""The client before anything is sent, and where nobody answers. No server runs here."""

import socket
import threading

import numpy as np
import pytest

from engines.runtime import RequestError, SamplingParams
from ngpt.errors import MissingPackageError, ServerError
from triton_repo.client import RequestRefused, check_url, generate_text, generate_tokens, stream_text
from triton_repo.interface import TEXT, options
from triton_repo.serving_inputs import NUMPY, InputError, option_array

CLOSED = "127.0.0.1:1"

BAD = [
    ("max_tokens", [0, -1, 2**31, 1.0, True, "4", 10**5000]),
    ("min_tokens", [-1, 2**31]),
    ("end_id", [-2, 2**31]),
    ("top_k", [-1, 4294967297, 2.5]),
    ("top_p", [-0.1, 1.5, float("nan")]),
    ("temperature", [-0.5, float("nan"), float("inf"), 1e39, 1e-60, 10**400, "hot", True]),
    ("repetition_penalty", [0.0, -1.0, float("inf")]),
    ("presence_penalty", [float("nan"), 1e39]),
    ("frequency_penalty", [float("-inf")]),
    ("length_penalty", [float("nan")]),
    ("seed", [-1, 2**64, 1.5]),
    ("exclude_input", [1, "yes"]),
]
GOOD = {
    "max_tokens": [1, 2**31 - 1, np.int64(4)], "top_k": [0, 50], "top_p": [0, 0.5, 1.0, np.float32(0.5)], "temperature": [0, 0.7, 1e-30],
    "seed": [0, 2**64 - 1], "end_id": [-1, 7], "repetition_penalty": [1.1], "stream": [True, np.bool_(False)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option, values in BAD for value in values], ids=lambda v: str(type(v))
)
def test_a_value_that_makes_no_sense_or_does_not_fit_is_refused_before_it_is_sent(option, value):
    for ask in (
        lambda **options: generate_text(CLOSED, "x", **options),
        lambda **options: generate_tokens(CLOSED, [1], **options),
    ):
        with pytest.raises(RequestRefused, match=r": expected .*, found .*") as caught:
            ask(**{option: value})
        assert caught.value.status == "INVALID_ARGUMENT" and len(str(caught.value)) < 400


ROWS = options(TEXT)


@pytest.mark.parametrize("option", GOOD)
def test_every_value_that_fits_is_sent_as_it_is(option):
    for value in GOOD[option]:
        array = option_array(ROWS[option], option, value)
        assert array.dtype == NUMPY[ROWS[option].dtype()] and array.shape == (1, 1)
        assert array.item() == pytest.approx(value, rel=1e-6)


def test_client_and_sampler_agree_on_what_makes_sense():
    names = {
        "max_tokens": "max_new_tokens",
        **{name: name for name in ("top_k", "top_p", "min_p", "temperature", "repetition_penalty", "seed")},
    }
    probes = [-(2**40), -1, -0.5, 0, 0.5, 1, 1.5, 2, 2**31 - 1, 2**31, 2**64 - 1, 2**64, float("nan"), float("inf")]
    for option, sampled in names.items():
        for value in probes:
            if option == "top_p" and value == 0:  # clients of this interface say "off" with it
                continue
            answers = []
            for check in (
                lambda v=value, o=option: option_array(ROWS[o], o, v),
                lambda v=value, s=sampled: SamplingParams(**{s: v}),
            ):
                try:
                    check()
                    answers.append(True)
                except (InputError, RequestError):
                    answers.append(False)
            assert answers[0] == answers[1], (option, value)


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda: generate_text(CLOSED, "\udcff"), "text_input: .*surrogate"),
        (lambda: generate_text(CLOSED, 5), "text_input: expected a text"),
        (lambda: generate_text(CLOSED, "x", stop_words="end"), "stop_words: expected a list"),
        (lambda: generate_text(CLOSED, "x", bad_words=[3]), "bad_words: expected a text"),
        (lambda: generate_text(CLOSED, "x", timeout=0), "timeout"),
        (lambda: generate_text(CLOSED, "x", timeout=float("nan")), "timeout"),
        (lambda: generate_tokens(CLOSED, [2**31]), "input_ids"),
        (lambda: generate_tokens(CLOSED, [1.5]), "input_ids"),
        (lambda: generate_tokens(CLOSED, [1], stop_sequences=[[2**40]]), "stop_words_list"),
    ],
)
def test_what_cannot_be_sent_as_it_is_is_refused(ask, named):
    with pytest.raises(RequestRefused, match=named):
        ask()


ADDRESSES = [
    "",
    "localhost",
    "127.0.0.1",
    ":8001",
    "127.0.0.1:",
    "127.0.0.1:0",
    "127.0.0.1:65536",
    "a b:1",
    "x:1\n",
    "::1:80",
    None,
    "\x1b[31m:1",
]


@pytest.mark.parametrize("url", ADDRESSES)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ServerError, match="expected host:port, such as"):
        list(stream_text(url, "x"))


@pytest.mark.parametrize("scheme", ["http://", "grpc://", "https://"])
def test_an_address_with_a_scheme_is_refused_with_the_one_that_works(scheme):
    with pytest.raises(ServerError, match=r"write 127\.0\.0\.1:8001, without more"):
        check_url(f"{scheme}127.0.0.1:8001/v2")
    for url in ("127.0.0.1:8001", "[::1]:8001", "triton.models.svc.cluster.local:443", "my_host:1"):
        check_url(url)


@pytest.mark.parametrize("url", [CLOSED, "[::1]:1", "no-such-host.invalid:8001"])
def test_where_nobody_answers_the_error_says_so(url):
    with pytest.raises(ServerError, match="no Triton server answers gRPC at .*ngpt-deploy serve") as caught:
        list(stream_text(url, "x", timeout=30))
    assert not isinstance(caught.value, RequestRefused)


def test_a_server_that_speaks_http_is_told_from_one_of_ours():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(ServerError, match="not the HTTP one"):
            generate_text(f"127.0.0.1:{server.getsockname()[1]}", "x", timeout=30)
        thread.join(10)


def test_without_the_client_library_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tritonclient.grpc", None)
    with pytest.raises(MissingPackageError, match=r"pip install .*'tritonclient\[grpc\]>="):
        generate_text(CLOSED, "x")


def test_an_option_that_a_function_sets_itself_is_not_swallowed():
    for ask in (lambda: list(stream_text(CLOSED, "x", stream=False)), lambda: generate_text(CLOSED, "x", stream=True)):
        with pytest.raises(TypeError, match="stream"):
            ask()
