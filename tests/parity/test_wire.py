"""Parity through the wire on a double of a served model: every way of deciding, right and wrong servers. No server runs here."""

import threading

import numpy as np
import pytest

from engines.parity.wire import CONTEXT, GENERATION, PROBABILITIES, Answer, verify_served
from engines.parity.wire_checks import CHOICE, SEEDS
from export.precision import ONNX_RUNTIME
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import EngineError
from ngpt.weights import Weights
from tests.conftest import GOLDEN
from tests.doubles.reference import Reference

ALL = frozenset({CONTEXT, GENERATION, PROBABILITIES})
PROMPTS = [[5, 6, 7, 200, 31, 9, 77, 78, 2], [11], list(range(40, 52))]


class ServerDouble:
    """TEST DOUBLE of a served model: tests/doubles/reference.py's network, with a server's own ways of going wrong.

    ``faults``: of the network, of `Reference`, or "seedless" (draws with a seed of its own), "mixed" (now and then answers with
    another request's tokens), "stale" (log-probabilities of the token before).
    """

    def __init__(self, *faults, offered=ALL, case="gqa"):
        with open_checkpoint(GOLDEN / case) as checkpoint:
            network = set(faults) - {"seedless", "mixed", "stale"}
            self.reference = Reference(Weights(checkpoint), network, dtype=np.float32)
        self.faults, self.offered, self.asked = set(faults), frozenset(offered), []
        self.identity = {"url": "double:1", "model": "gqa", "version": "1", "platform": "a double"}
        self._lock, self._random = threading.Lock(), np.random.default_rng(9)

    def ask(self, prompt, tokens, wanted, *, seed=None):
        with self._lock:
            assert wanted <= self.offered
            self.asked.append((tuple(prompt), tokens, seed))
            draw = None if seed is None else self._random if "seedless" in self.faults else np.random.default_rng(seed)
            ids, rows = list(prompt), []
            for _ in range(tokens):
                logits = self.reference(np.array([ids]))[0][0].astype(np.float32)
                rows.append(logits[-1])
                p = np.exp(logits[-1].astype(np.float64))
                ids.append(int(logits[-1].argmax()) if draw is None else int(draw.choice(len(p), p=p / p.sum())))
            answer = ids[len(prompt) :]
            said = [float(row[t] - np.log(np.exp(row.astype(np.float64)).sum())) for row, t in zip(rows, answer, strict=True)]
            if "stale" in self.faults and tokens > 1:
                said = [said[0], *said[:-1]]
            if "mixed" in self.faults and len(self.asked) % 3 == 0:
                answer[-1] = (answer[-1] + 1) % 256
            context = self.reference(np.array([list(prompt)]))[0][0].astype(np.float32) if CONTEXT in wanted else None
            return Answer(
                tuple(answer),
                context,
                np.array(rows) if GENERATION in wanted else None,
                np.array(said, np.float32) if PROBABILITIES in wanted else None,
            )


def check(server, steps=6, **options):
    with open_checkpoint(GOLDEN / "gqa") as checkpoint:
        options = {"precision": ONNX_RUNTIME["fp32"], "prompts": PROMPTS, "decode_steps": steps} | options
        return verify_served(server, checkpoint, **options)


def outcomes(report):
    return {check.name: check.outcome for check in report.checks}


WAYS = {
    "all": (ALL, "context logits", "generation logits"),
    "context alone": ({CONTEXT}, "context logits", "tokens"),
    "generation alone": ({GENERATION}, "prompts of growing length, generation logits", "generation logits"),
    "probabilities": ({PROBABILITIES}, "prompts of growing length, log-probabilities", "log-probabilities"),
    "tokens": (set(), "prompts of growing length, tokens", "tokens"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_right_server_passes_by_whatever_it_offers_and_the_report_says_by_what(way, tmp_path):
    offered, prefill, decode = WAYS[way]
    report = check(ServerDouble(offered=offered))
    assert report.verdict == "pass", report.failures
    assert report.summary["decided_by"] == {"prefill": prefill, "decode": decode}
    assert report.summary["server"]["url"] == "double:1" and report.subject is None
    found = outcomes(report)
    assert found["prefill: logit error, mean"] == ("pass" if offered & {CONTEXT, GENERATION} else "not applicable")
    assert found["decode: logit error, mean"] == ("pass" if GENERATION in offered else "not applicable")
    assert (found["log-probability of the chosen token, mean"] == "pass") == (PROBABILITIES in offered)
    assert found[CHOICE] == found[SEEDS] == "pass"
    page = report.write(tmp_path)[1].read_text()
    assert "double:1" in page and "not applicable" in page or way == "all"


def test_prompts_grow_a_token_at_a_time_where_a_server_shows_no_logits_of_prompts():
    server = ServerDouble(offered={GENERATION})
    report = check(server)
    assert {prompt for prompt, tokens, _ in server.asked if tokens == 1} == {
        tuple(prompt[:n]) for prompt in PROMPTS for n in range(1, len(prompt))
    }
    # Every position of every prompt and greedy answer but the last, and of the drawn ones what follows their prompts.
    assert report.summary["positions"] == sum(len(p) + 5 for p in PROMPTS) + 3 * 5
    assert report.summary["requests"]["sent"] == len(server.asked)


@pytest.mark.parametrize(
    ("fault", "way"),
    [
        ("inverse_scale", "all"),
        ("swapped_head", "context alone"),
        ("unsquared_sqk", "generation alone"),
        ("signed_alpha", "probabilities"),
        ("skipped_layer", "tokens"),
    ],
)
def test_a_wrong_network_fails_by_whatever_the_server_offers(fault, way):
    assert check(ServerDouble(fault, offered=WAYS[way][0])).verdict == "fail"


@pytest.mark.parametrize(
    ("fault", "offered", "name"),
    [
        ("seedless", ALL, SEEDS),
        ("mixed", set(), CHOICE),
        ("stale", {PROBABILITIES}, "log-probability of the chosen token, mean"),
    ],
)
def test_what_only_a_server_can_do_wrong_fails_by_name(fault, offered, name):
    assert name in {check.name for check in check(ServerDouble(fault, offered=offered)).failures}


def test_a_server_that_draws_nothing_has_not_shown_that_it_keeps_seeds():
    server = ServerDouble()
    draws = server.ask
    server.ask = lambda prompt, tokens, wanted, *, seed=None: draws(prompt, tokens, wanted)
    assert outcomes(check(server))[SEEDS] == "not applicable"


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (Answer((1,), np.zeros((9, 256)), np.zeros((6, 256)), np.zeros(6)), "an answer.*6 token ids"),
        (Answer((300,) * 6, np.zeros((9, 256)), np.zeros((6, 256)), np.zeros(6)), "an answer.*below 256"),
        (Answer((1,) * 6, np.zeros((2, 256)), np.zeros((6, 256)), np.zeros(6)), r"context logits.*\[9, 256\].*\[2, 256\]"),
        (Answer((1,) * 6, np.zeros((9, 256)), None, np.zeros(6)), "generation logits.*nothing"),
    ],
)
def test_an_answer_that_does_not_fit_is_an_error_that_names_it(answer, named):
    server = ServerDouble()
    server.ask = lambda *_args, **_options: answer
    with pytest.raises(EngineError, match=named):
        check(server, prompts=PROMPTS[:1])
