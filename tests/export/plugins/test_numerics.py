"""The kernels' own sources, run on an emulated device, against float64."""

import ml_dtypes
import numpy as np
import pytest

from export.plugins import reference
from export.plugins.compile import FOLDER
from export.plugins.kernels import HypersphereUpdate, QKNorm
from tests.doubles.emulator import Emulator
from tests.export.plugins.cases import NORMS, UPDATES, label

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Near the ends of each type's range, and far out where squares leave float32's: 2e-45 is a subnormal.
HUGE = {"float32": (1e30, 3e38), "float16": (6e4,), "bfloat16": (1e30, 3e38)}
TINY = {"float32": (1e-30, 2e-45), "float16": (6e-8,), "bfloat16": (1e-30, 1e-39)}
GUARD = 64


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator([*UPDATES, *NORMS], tmp_path_factory.mktemp("emulator"))


def rows(random, kernel, width):
    """Rows of every kind: plain, huge, tiny, zero, one value that dwarfs the rest, one value alone."""
    magnitudes = [1.0, *HUGE[kernel.dtype], *TINY[kernel.dtype], 0.0]
    plain = random.uniform(-1, 1, (len(magnitudes) + 2, width))
    plain[: len(magnitudes)] *= np.array(magnitudes)[:, None]
    plain[-2, width // 3] = HUGE[kernel.dtype][0]
    plain[-1] = 0
    plain[-1, -1] = TINY[kernel.dtype][-1]
    return plain.astype(DTYPES[kernel.dtype])


def guarded(shape, dtype):
    """An output array between guards, all NaN, and a check that the guards are as they were."""
    size = int(np.prod(shape))
    whole = np.full(size + 2 * GUARD, np.nan, DTYPES[dtype])
    return whole[GUARD : GUARD + size].reshape(shape), lambda: np.isnan(whole[:GUARD]).all() and np.isnan(whole[-GUARD:]).all()


def within(got, expected, allowed):
    error = np.abs(got.astype(np.float64) - expected)
    worst = np.unravel_index(np.argmax(np.nan_to_num(error - allowed, nan=np.inf)), error.shape)
    assert (error <= allowed).all(), (worst, got[worst], expected[worst], error[worst], allowed[worst])


def run_update(emulator, kernel, h, x, lr):
    out, untouched = guarded(h.shape, kernel.dtype)
    emulator.launch(kernel, len(h), h, x, lr, len(h), out)
    assert untouched()
    return out


@pytest.mark.parametrize("kernel", UPDATES, ids=label)
def test_hypersphere_update(emulator, kernel):
    random = np.random.default_rng(kernel.size)
    kinds_h, kinds_x = rows(random, kernel, kernel.size), rows(random, kernel, kernel.size)
    # Every kind of h meets every kind of x, in rows that are never a whole number of blocks.
    pairs = [(i, j) for i in range(len(kinds_h)) for j in range(len(kinds_x))]
    pairs = pairs if kernel.size < 4096 else pairs[::3]
    pairs = pairs[: len(pairs) - 1 + len(pairs) % 2]
    h, x = kinds_h[[i for i, _ in pairs]], kinds_x[[j for _, j in pairs]]
    lr = random.uniform(0.01, 0.9, kernel.size).astype(np.float32)
    out = run_update(emulator, kernel, h, x, lr)
    with np.errstate(over="ignore"):
        expected, allowed = reference.hypersphere_update(kernel, *(a.astype(np.float64) for a in (h, x, lr)))
    within(out, expected, allowed)


@pytest.mark.parametrize("kernel", NORMS, ids=label)
def test_qk_norm(emulator, kernel):
    random = np.random.default_rng(kernel.head_dim)
    batch, sequence, length, heads = 2, 5, 19, kernel.heads + kernel.kv_heads
    kinds = rows(random, kernel, kernel.head_dim)
    qk = kinds[random.permutation(batch * sequence * heads) % len(kinds)].reshape(batch, sequence, -1)
    angles = np.arange(length)[:, None] * random.uniform(0.01, 2, kernel.rotary_dim // 2)
    cos, sin = ((1.3 * f(angles)).astype(np.float32) for f in (np.cos, np.sin))  # 1.3: yarn's factor
    positions = random.integers(0, length, (batch, sequence)).astype(np.int32)
    q_scale = random.uniform(-3, 12, kernel.heads * kernel.head_dim).astype(np.float32)
    q, q_untouched = guarded((batch, kernel.heads, sequence, kernel.head_dim), kernel.dtype)
    k, k_untouched = guarded((batch, kernel.kv_heads, sequence, kernel.head_dim), kernel.dtype)
    tokens = batch * sequence
    emulator.launch(kernel, tokens, qk, cos, sin, positions, q_scale, tokens, sequence, length, q, k)
    assert q_untouched() and k_untouched()
    wide = (a.astype(np.float64) for a in (qk, cos, sin))
    expected, allowed = reference.qk_norm(kernel, *wide, positions.astype(np.int64), q_scale.astype(np.float64))
    for got, want, error in zip((q, k), expected, allowed, strict=True):
        within(got, want, error)


def test_a_row_does_not_depend_on_its_neighbours(emulator):
    """Rows of one warp take the way for zeros and the plain one side by side, and the result is the same to the bit."""
    kernel = next(k for k in UPDATES if k.size == 24 and k.dtype == "float32")
    random = np.random.default_rng(5)
    h, x = random.normal(size=(2, 9, 24)).astype(np.float32)
    h[4] *= 1e30
    x[2], x[6] = 0, 1e-35
    lr = random.uniform(0.1, 0.5, 24).astype(np.float32)
    together = run_update(emulator, kernel, h, x, lr)
    for i in range(len(h)):
        assert np.array_equal(run_update(emulator, kernel, h[i : i + 1], x[i : i + 1], lr)[0], together[i])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(emulator, bad):
    kernel = next(k for k in UPDATES if k.size == 192 and k.dtype == "bfloat16")
    h, x = np.ones((2, 3, 192)).astype(ml_dtypes.bfloat16)
    x[1, 7] = bad
    out = run_update(emulator, kernel, h, x, np.full(192, 0.1, np.float32)).astype(np.float32)
    assert np.isfinite(out[[0, 2]]).all() and np.isnan(out[1]).any()


def test_positions_outside_the_tables_do_not_read_outside_them(emulator):
    kernel = next(k for k in NORMS if k.head_dim == 64 and k.dtype == "float32")
    random = np.random.default_rng(1)
    qk = random.normal(size=(1, 4, 6 * 64)).astype(np.float32)
    table = random.normal(size=(3, 32)).astype(np.float32)
    scale = np.ones(4 * 64, np.float32)

    def run(positions):
        q, k = np.empty((1, 4, 4, 64), np.float32), np.empty((1, 2, 4, 64), np.float32)
        emulator.launch(kernel, 4, qk, table, table, np.array(positions, np.int32), scale, 4, 4, 3, q, k)
        return np.concatenate((q, k), 1)

    assert np.array_equal(run([-1, -(2**31), 3, 2**31 - 1]), run([0, 0, 2, 2]))


BREAKS = {
    "the barrier is gone": ("rows.cuh", "    __syncthreads();\n", ""),
    "no way out for zero rows": ("rows.cuh", "if (sum == 0.0f) return 0.0f;", ""),
    "no way out for overflow": ("rows.cuh", "sum <= 0x1.fffffep127f", "true"),
    "eps is not rescaled": ("rows.cuh", "eps * scale", "eps"),
    "a row past the end is written": (
        "hypersphere_update.cu",
        "if (live && vector < VECTORS) store",
        "if (vector < VECTORS) store",
    ),
    "one lane is left out": ("rows.cuh", "offset = GROUP / 2", "offset = GROUP / 4"),
    "the step has the wrong sign": ("hypersphere_update.cu", "-from[j]), from[j]", "from[j]), from[j]"),
    "the rotation turns backwards": ("qk_norm.cu", "-(b * s[j])", "b * s[j]"),
    "k is scaled too": ("qk_norm.cu", "if (is_query) part[j] *=", "if (true) part[j] *="),
    "tokens before heads": ("qk_norm.cu", "head) * sequence + place)", "place) * HEADS + head)"),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_these_tests_see_a_broken_kernel(fault, tmp_path):
    name, old, new = BREAKS[fault]
    for source in FOLDER.glob("*.cu*"):
        text = source.read_text()
        if source.name == name:
            assert old in text, "the source has changed: state the fault anew"
            text = text.replace(old, new)
        (tmp_path / source.name).write_text(text)
    if name == "qk_norm.cu":
        kernel, check = QKNorm(4, 2, 64, 64, "float32"), test_qk_norm
    else:
        kernel, check = (
            HypersphereUpdate(24 if "row" in fault or "lane" in fault else 1032, 1e-6, "float32"),
            test_hypersphere_update,
        )
    broken = Emulator([kernel], tmp_path, tmp_path)
    with pytest.raises(AssertionError):
        check(broken, kernel)
