"""TensorRTRunner over doubles of CUDA and TensorRT: golden tokens through the scheduler, and everything that may be refused."""

import gc
import importlib
import inspect
import re
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from engines import load_engine
from engines.runtime.compatibility import memory_needed
from engines.runtime.cuda import Cuda
from engines.runtime.errors import CapacityError, ClosedError, EngineFileError, MissingRuntimeError, RunnerError
from engines.runtime.tensorrt_runner import TensorRTRunner
from tests.conftest import Golden
from tests.doubles import cuda_double
from tests.doubles.cuda_double import CudaDouble, DataType, EngineDouble, Error, Kind, Misuse
from tests.engines.tensorrt_making import golden_engine
from tests.ngpt.making import tokenizer
from triton_repo.package import package_engine

# The network is computed in float64 and only the cache is float32: the golden bound for float32 leaves much room.
NOISE = 2e-5
CACHES = ("in-place", "past-present")


@pytest.fixture(params=CACHES)
def made(request, tmp_path, monkeypatch):
    return golden_engine(tmp_path / "engine", monkeypatch, cache=request.param)


def open_runner(made, num_slots=4):
    return TensorRTRunner(made.folder, made.manifest, num_slots)


@pytest.fixture
def runner(made):
    return open_runner(made)


def greedy(reference, prompt, count):
    """Argmax over the whole sequence, anew for each token: no cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference(np.array([tokens]))[0][0, -1].argmax()))
    return tokens[len(prompt) :]


# The right tokens.


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", ["gqa", "llama3-rope-bias", "research-checkpoint"])
def test_golden_greedy_continuations_through_the_scheduler(case, cache, tmp_path, monkeypatch):
    golden_engine(tmp_path / "engine", monkeypatch, case, cache)
    data = Golden(case)
    prompts, length = data.ids, data.ids.shape[1]
    with load_engine(tmp_path / "engine", num_slots=3) as engine:
        tokens = engine.generate(list(prompts), max_new_tokens=data.greedy.shape[1] - length, ignore_eos=True)
        logits = engine.logits(prompts)
    np.testing.assert_array_equal(tokens, data.greedy[:, length:])
    # The research case's golden logits are float64 of bfloat16 matrices, which the double computes as well.
    assert np.abs(logits - data.logits).max() <= NOISE


def test_ragged_batches_in_which_slots_leave_and_join(made):
    rng = np.random.default_rng(1)
    jobs = [(rng.integers(3, 256, size), count) for size, count in [(5, 9), (17, 3), (1, 14), (33, 6), (8, 1), (9, 12), (16, 5)]]
    with load_engine(made.folder, num_slots=4) as engine:
        handles = [engine.submit(prompt, count, ignore_eos=True) for prompt, count in jobs]
        dropped = engine.submit(jobs[0][0], 40, ignore_eos=True)
        dropped.cancel()
        results = [handle.result().tokens for handle in handles]
    assert results == [greedy(made.reference, prompt, count) for prompt, count in jobs]
    shapes = {feeds["input_ids"].shape for feeds in made.library.feeds}
    assert {(1, 8), (4, 1), (2, 1)} <= shapes, "whole chunks, full and partial decode batches were all seen"


def test_prefill_in_chunks_and_decode_give_golden_logits(runner):
    case = Golden("gqa")
    slot, ids = runner.open(), case.ids[0]
    parts = [runner.prefill(slot, part, all_logits=True) for part in (ids[:3], ids[3:4], ids[4:25])]
    steps = [runner.decode([slot], ids[t : t + 1]) for t in range(25, len(ids))]
    assert np.abs(np.concatenate(parts + steps) - case.logits[0]).max() <= NOISE
    last = runner.prefill(runner.open(), ids[:20])
    assert last.shape == (256,) and np.abs(last - case.logits[0][19]).max() <= NOISE


def test_rows_are_asked_for_in_any_order_and_move_into_holes(runner):
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 256, size) for size in (12, 5, 17, 9)]
    alone = []
    for text in texts:
        slot = runner.open()
        alone.append(runner.prefill(slot, text, all_logits=True))
        runner.close(slot)
    live = {i: runner.open() for i in range(4)}
    for i, slot in live.items():
        runner.prefill(slot, texts[i][:4])
    for t in range(4, 17):
        for i in [i for i in live if t >= len(texts[i])]:
            runner.close(live.pop(i))  # leaves a hole that another row moves into
        order = sorted(live, reverse=t % 2 == 0)
        got = runner.decode([live[i] for i in order], np.array([texts[i][t] for i in order]))
        for i, logits in zip(order, got, strict=True):
            assert np.abs(logits - alone[i][t]).max() <= NOISE, (t, i)


def test_a_neighbour_that_is_still_reading_its_prompt_is_left_alone(runner):
    case = Golden("gqa")
    ids = case.ids[0]
    first, second, third = runner.open(), runner.open(), runner.open()
    runner.prefill(first, ids[:6])
    runner.prefill(second, ids[:9])  # mid-prompt, between two rows that decode
    runner.prefill(third, ids[:6])
    runner.decode([third, first], ids[6:8])
    rest = runner.prefill(second, ids[9:], all_logits=True)
    assert np.abs(rest - case.logits[0][9:]).max() <= NOISE


# Largest error of a float16 and of a bfloat16 cache on this case, measured: 1.8e-3 and 1.3e-2; the bound is twice that.
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 3.6e-3), ("bfloat16", 2.6e-2)])
@pytest.mark.parametrize("cache", CACHES)
def test_half_precision_caches_have_their_own_strides(dtype, bound, cache, tmp_path, monkeypatch):
    made = golden_engine(tmp_path / "engine", monkeypatch, cache=cache, cache_dtype=dtype)
    runner, case = open_runner(made, 2), Golden("gqa")
    slots = [runner.open(), runner.open()]
    for slot, ids in zip(slots, case.ids, strict=True):
        runner.prefill(slot, ids[:20])
    for t in range(20, 33):
        error = np.abs(runner.decode(slots, case.ids[:, t]) - case.logits[:, t]).max()
        assert error <= bound


def test_the_schedulers_thread_works_on_the_device_the_engine_was_loaded_on(made):
    made.cuda.cudaSetDevice(3)
    with load_engine(made.folder, num_slots=2) as engine:
        assert engine.generate([[5, 6]], max_new_tokens=3, ignore_eos=True) == [greedy(made.reference, [5, 6], 3)]
    assert set(made.cuda.devices.values()) == {3} and len(made.cuda.devices) == 2 and not made.cuda.live


# The tests above can fail.


def spoil(name, change):
    return lambda evaluate: lambda feeds: evaluate(feeds | {name: change(feeds[name])})


@pytest.mark.parametrize(
    "wrap",
    [
        spoil("position_ids", lambda x: x + (x == x.max())),
        spoil("lengths", lambda x: x + 1),
        spoil("write_at", lambda x: np.maximum(x - 1, 0)),
        spoil("logit_rows", lambda x: x[::-1]),
        spoil("past_key_values.1.key", lambda x: np.roll(x, 1, axis=1)),
    ],
    ids=["positions", "lengths", "write_at", "logit_rows", "cache"],
)
def test_a_network_fed_with_anything_else_gives_other_logits(wrap, tmp_path, monkeypatch):
    runner, case = open_runner(golden_engine(tmp_path / "engine", monkeypatch, wrap=wrap)), Golden("gqa")
    slots = [runner.open(), runner.open()]
    for slot, ids in zip(slots, case.ids, strict=True):
        runner.prefill(slot, ids[:20])
    assert np.abs(runner.decode(slots, case.ids[:, 20]) - case.logits[:, 20]).max() > 100 * NOISE


@pytest.mark.parametrize("omitted", ["synchronize", "zero", "upload", "download"])
def test_leaving_out_a_call_shows(omitted, made, monkeypatch):
    runner = open_runner(made)
    if omitted == "zero":
        monkeypatch.setattr(Cuda, "zero", lambda *_: None)
        runner = open_runner(golden_engine(made.folder, monkeypatch, cache=made.manifest.target.cache))
    else:
        monkeypatch.setattr(Cuda, omitted, lambda *_: None)
    try:
        logits = runner.prefill(runner.open(), Golden("gqa").ids[0][:5])
    except AssertionError:
        return
    assert not np.isfinite(logits).all()


def test_leaving_out_the_copy_back_shows(tmp_path, monkeypatch):
    runner = open_runner(golden_engine(tmp_path / "engine", monkeypatch, cache="past-present"))
    monkeypatch.setattr(Cuda, "copy", lambda *_: None)
    slot, case = runner.open(), Golden("gqa")
    runner.prefill(slot, case.ids[0][:5])
    assert np.abs(runner.decode([slot], case.ids[0][5:6]) - case.logits[0][5]).max() > 100 * NOISE


# What a step costs.


def test_a_step_copies_once_each_way_and_waits_once(tmp_path, monkeypatch):
    made = golden_engine(tmp_path / "engine", monkeypatch)
    runner, ids = open_runner(made), Golden("gqa").ids[0]
    slots = [runner.open() for _ in range(3)]
    for slot in slots:
        runner.prefill(slot, ids[:4])
    sizes = []
    monkeypatch.setattr(
        Cuda,
        "download",
        lambda self, target, source, real=Cuda.download: sizes.append(target.nbytes) or real(self, target, source),
    )
    del made.cuda.calls[:]
    runner.decode([slots[2], slots[0]], ids[4:6])
    assert made.cuda.calls == ["cudaMemcpyAsync", "cudaMemcpyAsync", "cudaStreamSynchronize"]
    assert sizes == [2 * 256 * 4], "two of the three rows were wanted"
    del made.cuda.calls[:], sizes[:]
    runner.prefill(slots[0], ids[:17])  # chunks of 8, 8 and 1: logits of the last alone
    assert made.cuda.calls.count("cudaStreamSynchronize") == 3 and sizes == [256 * 4]


def test_only_what_changed_is_bound_again(tmp_path, monkeypatch):
    made = golden_engine(tmp_path / "engine", monkeypatch)
    runner = open_runner(made)
    slot = runner.open()
    runner.prefill(slot, np.arange(3, 7))
    runner.decode([slot], np.array([7]))
    for name in ("set_input_shape", "set_tensor_address"):
        monkeypatch.setattr(made.library.contexts[1], name, None)  # calling it would fail
    runner.decode([slot], np.array([8]))


# Ending.


def test_closing_an_engine_frees_everything_and_dropping_it_too(made):
    engine = load_engine(made.folder, num_slots=2)
    handle = engine.submit([5, 6, 7], 50, ignore_eos=True)
    assert made.cuda.live
    engine.close()
    engine.close()
    assert handle.done and not made.cuda.live and made.cuda.stream is None
    with pytest.raises(ClosedError):
        engine.generate([[5]])
    dropped = load_engine(made.folder, num_slots=2)
    dropped.generate([[5]], max_new_tokens=2)
    del dropped
    gc.collect()
    assert not made.cuda.live


def test_a_released_runner_says_so(runner):
    slot = runner.open()
    runner.release()
    runner.release()
    with pytest.raises(ClosedError, match="released"):
        runner.prefill(slot, np.array([3]))


def test_releasing_waits_for_the_device_before_the_plan_goes(made, monkeypatch):
    runner, gone = open_runner(made), []
    with monkeypatch.context() as patch:
        patch.setattr(made.cuda, "fail", {"cudaStreamSynchronize": Error.cudaErrorMemoryAllocation})
        with pytest.raises(RunnerError, match="cudaStreamSynchronize"):
            runner.prefill(runner.open(), np.array([3]))
    assert made.cuda.queue, "the step is still queued"
    weakref.finalize(runner._plan, lambda: gone.append(len(made.cuda.queue)))
    runner.release()
    assert gone == [0] and not made.cuda.live


# Refusals.


def refuse(made, kind, match, num_slots=4):
    with pytest.raises(kind, match=match) as caught:
        load_engine(made.folder, num_slots=num_slots)
    assert not made.cuda.live and made.cuda.stream is None, "nothing is left allocated"
    return caught.value


def test_more_slots_than_the_plan_decodes_are_refused_by_runner_and_packager(made, tmp_path):
    refuse(made, EngineFileError, "num_slots.*at most 4.*found 5.*decode_batch", num_slots=5)
    with pytest.raises(Exception, match="num_slots.*at most 4.*found 8"):
        package_engine(made.folder, tmp_path / "models", allow_unverified=True)


def test_another_version_or_card_or_too_little_memory_is_refused_before_loading(made, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(made.library, "__version__", "1.8.0.1")
        refuse(made, EngineFileError, r"locked.*expected 1\.7\.1\.116, found 1\.8\.0\.1")
    made.cuda.capability = (8, 9)
    refuse(made, EngineFileError, r"expected compute capability 12\.0, found 8\.9")
    made.cuda.capability, made.cuda.memory = (12, 0), 1000
    refuse(made, EngineFileError, "memory.*found 1000 bytes")
    assert made.library.deserialised == 0


def test_a_missing_library_comes_with_the_command_that_installs_it(made, monkeypatch):
    for name, package in (("cuda.bindings.runtime", "'cuda-bindings>=13'"), ("tensorrt_rtx", "tensorrt-rtx-cu13")):
        monkeypatch.setitem(sys.modules, name, None)
        refuse(made, MissingRuntimeError, f"Run: pip install {package}")


def test_cuda_errors_are_named(made):
    made.cuda.fail["cudaGetDevice"] = Error.cudaErrorNoDevice
    refuse(made, RunnerError, "cudaGetDevice.*no CUDA-capable device")
    del made.cuda.fail["cudaGetDevice"]
    made.cuda.memory = memory_needed(made.manifest, 1)  # passes the check for one sequence, but four are asked for
    refuse(made, RunnerError, "cudaMalloc.*out of memory.*fewer slots")


def test_a_damaged_plan_is_refused_with_the_librarys_reason(tmp_path, monkeypatch):
    made = golden_engine(tmp_path / "engine", monkeypatch, plan=b"something else")
    refuse(made, EngineFileError, "cannot load.*magic tag")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda d: d.tensors.pop("write_at"), "inputs and outputs"),
        (lambda d: d.tensors.update(lengths=("float32", (-1,), True)), "type of lengths"),
        (lambda d: d.tensors.update(logits=("float32", (-1, 255), False)), "width of logits"),
        (
            lambda d: d.tensors.update({"past_key_values.2.value": ("float32", (-1, 2, 32, 16), True)}),
            r"past_key_values\.2\.value",
        ),
        (lambda d: d.profiles.pop(), "profiles"),
        (lambda d: d.profiles[0].update(input_ids=((1, 1), (1, 4))), "profile 0"),
        (lambda d: d.profiles[1].update(input_ids=((1, 1), (2, 1))), "profile 1"),
        (lambda d: d.aliases.update({"present.0.key": "past_key_values.0.value"}), r"present\.0\.key"),
    ],
)
def test_a_plan_that_is_not_what_the_manifest_says_is_refused(made, spoil, match):
    spoil(made.library)
    refuse(made, EngineFileError, f"not what its manifest says: .*{match}")


def test_a_step_that_tensorrt_refuses_ends_the_request_and_not_the_engine(made, monkeypatch):
    with load_engine(made.folder, num_slots=2) as engine:
        context = made.library.contexts[1]
        with monkeypatch.context() as patch:
            patch.setattr(context, "execute_async_v3", lambda stream: context._refuse("out of order"))
            with pytest.raises(RunnerError, match="TensorRT refused the step: found out of order"):
                engine.generate([[5, 6]], max_new_tokens=3)
        assert engine.generate([[5, 6]], max_new_tokens=3, ignore_eos=True) == [greedy(made.reference, [5, 6], 3)]


def test_too_many_sequences_and_too_long_ones_are_refused(runner):
    slots = [runner.open() for _ in range(4)]
    with pytest.raises(CapacityError, match="free slot"):
        runner.open()
    with pytest.raises(CapacityError, match="64"):
        runner.prefill(slots[0], np.ones(65, np.int64))


# The Triton repository carries all of it.


def test_the_copy_in_a_triton_repository_serves_the_same_tokens(made, tmp_path, monkeypatch):
    (made.folder / "tokenizer.json").write_text(tokenizer().to_str())
    repository = package_engine(made.folder, tmp_path / "models", allow_unverified=True, num_slots=4)
    monkeypatch.syspath_prepend(repository / "ensemble" / "1")
    for name in loaded("engines"):
        monkeypatch.delitem(sys.modules, name)  # and put back at the end
    runtime = importlib.import_module("engines.runtime")
    try:
        assert Path(runtime.__file__).is_relative_to(repository)
        with runtime.load_engine(repository / "ensemble" / "1" / "engine", num_slots=4) as engine:
            assert engine.generate([[5, 6, 7]], max_new_tokens=4, ignore_eos=True) == [greedy(made.reference, [5, 6, 7], 4)]
    finally:
        for name in loaded("engines"):
            del sys.modules[name]


def loaded(package: str) -> list[str]:
    """The modules of a package that are imported now."""
    return [name for name in sys.modules if name.split(".")[0] == package]


# The doubles themselves, and the real libraries' names.


def test_the_double_complains_about_what_would_corrupt_memory():
    cuda = CudaDouble()
    _, stream = cuda.cudaStreamCreateWithFlags(1)
    _, device = cuda.cudaMalloc(64)
    _, host = cuda.cudaMallocHost(64)
    up, loose = Kind.cudaMemcpyHostToDevice, np.zeros(64, np.uint8)
    for bad in [(device, host, 65), (device + 1, host, 64), (device, loose.ctypes.data, 64), (host, device, 64)]:
        with pytest.raises(Misuse):
            cuda.cudaMemcpyAsync(*bad, up, stream)
    cuda.cudaMemcpyAsync(device, host, 64, up, stream)
    with pytest.raises(Misuse, match="queued"):
        cuda.cudaFree(device)
    cuda.cudaStreamSynchronize(stream)
    cuda.cudaFree(device)
    with pytest.raises(Misuse):
        cuda.cudaMemcpyAsync(device, host, 64, up, stream)
    with pytest.raises(Misuse):
        cuda.cudaFree(device)


def test_every_cudart_name_the_double_offers_exists_with_as_many_arguments():
    real = pytest.importorskip("cuda.bindings.runtime")
    functions = [
        name for name in vars(CudaDouble) if re.fullmatch(r"cuda[A-Z]\w+", name) and inspect.isfunction(getattr(CudaDouble, name))
    ]
    assert len(functions) >= 14
    for name in functions:
        arguments = re.match(rf"{name}\((.*)\)", getattr(real, name).__doc__)[1]
        ours = len(inspect.signature(getattr(CudaDouble, name)).parameters) - 1
        assert ours == len([part for part in arguments.split(",") if part.strip()]), name
    for kind, ours in (("cudaError_t", Error), ("cudaMemcpyKind", Kind), ("cudaDeviceAttr", cuda_double.Attribute)):
        assert {member.name: int(member) for member in ours}.items() <= {m.name: int(m) for m in getattr(real, kind)}.items()
    assert int(real.cudaStreamNonBlocking) == CudaDouble.cudaStreamNonBlocking
    used = set(re.findall(r'"(cuda[A-Z]\w+)"|_runtime\.(cuda\w+)', inspect.getsource(Cuda)))
    assert {name for pair in used for name in pair if name} <= set(dir(CudaDouble))


def test_every_tensorrt_name_the_double_offers_exists():
    real = pytest.importorskip("tensorrt_rtx")
    methods = {name for name in vars(EngineDouble) if not name.startswith("_")} | {"num_io_tensors", "num_optimization_profiles"}
    assert all(hasattr(real.ICudaEngine, name) for name in methods)
    calls = {name for name in vars(cuda_double.ContextDouble) if not name.startswith("_")}
    assert all(hasattr(real.IExecutionContext, name) for name in calls)
    source = inspect.getsource(sys.modules[TensorRTRunner.__module__])
    assert set(re.findall(r"\bengine\.(\w+)", source)) <= methods
    assert set(re.findall(r"self\._context\.(\w+)", source)) <= calls
    assert {kind.name for kind in DataType} <= set(real.DataType.__members__)
    assert hasattr(real.Runtime, "deserialize_cuda_engine") and isinstance(real.__version__, str)
    assert {"INTERNAL_ERROR", "ERROR"} <= set(real.ILogger.Severity.__members__)


def test_the_real_library_gives_its_reason_for_a_file_that_is_no_plan(tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    made = golden_engine(tmp_path / "engine", monkeypatch, plan=b"x" * 4096)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx")
    import tensorrt_rtx

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", tensorrt_rtx)
    monkeypatch.setattr(tensorrt_rtx, "__version__", "1.7.1.116")
    refuse(made, EngineFileError, "tensorrt_rtx cannot load.*magicTag")
