"""The faults, each with what the report must say of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.mutations import files, network, runtime, weights

BOTH, DECODE = ("prefill", "decode"), ("decode",)


@dataclass(frozen=True)
class Mutation:
    """One fault.

    fault: what is wrong, in a few words. first: the first tap that must be named; None where no tap of a whole prompt can show it
    (the fault lies behind the last layer, or in the cache). checkpoint: one of `proof.CHECKPOINTS` on which it has an effect.
    phases: which of prefill and decode may fail. network: a mixin, or by kind of lowering. only: kinds of lowerings that have
    such a thing; `without`: why the others have not. later: (a kind, the first tap there), where the fault is within the noise of that
    kind at first.
    """

    name: str
    fault: str
    first: str | None
    checkpoint: str = "gqa"
    phases: tuple[str, ...] = BOTH
    weights: Callable[..., Any] | None = None
    spec: Callable[..., Any] | None = None
    network: Any = None
    file: Callable[..., Any] | None = None
    runner: Any = None
    only: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    without: str = ""
    later: tuple[str, str] | None = None

    def named(self, kinds):
        """The first tap that must be named in a lowering of these kinds."""
        return self.later[1] if self.later is not None and self.later[0] in kinds else self.first

    def of(self, what, kinds):
        """The part of a mutation that is meant for a lowering of these kinds: the last of them that is named."""
        if not isinstance(what, dict):
            return what
        return next((what[kind] for kind in reversed(kinds) if kind in what), None)

    def applies(self, kinds):
        """Whether a lowering of these kinds has what is wrong here."""
        return (not self.only or any(kind in kinds for kind in self.only)) and not any(kind in kinds for kind in self.never)


FAITHFUL = Mutation("none", "no fault: must pass", None)


def _at(tap, layer=0):
    return f"layers.{layer}.{tap}"


def _unscaled_frequencies(spec):
    import dataclasses

    size = spec.rotary_dim
    return dataclasses.replace(spec, inv_freq=tuple(spec.rope_theta ** (-i / size) for i in range(0, size, 2)))


def _another_theta(spec):
    import dataclasses

    size = spec.rotary_dim
    return dataclasses.replace(spec, rope_theta=5e5, inv_freq=tuple(5e5 ** (-i / size) for i in range(0, size, 2)))


ONE, NEXT = weights.LAYER, weights.LAYER + 1
_QUANTISED = ("int8", "int4")
# A shift of all codes by one of 256 times inputs whose mean is near zero is nothing; what leaves relu2 has another mean.
_KERNEL = "the kernel masks"
_HALF, _RANGE = ("half",), "float16 cannot hold a branch as short as its eps"
MUTATIONS = (
    # Attention
    Mutation("scale-divided", "softmax scale divided instead of multiplied", _at("attn.out"), network=network.DividedScale),
    Mutation("sqk-not-squared", "sqk not squared", _at("attn.q_scaled"), weights=weights.sqk_not_squared),
    Mutation("sqk-before-rotation", "sqk before the rotation", _at("attn.q_scaled"), network=network.SqkBeforeRotation),
    Mutation("rotation-last", "q turned after sqk", _at("attn.q_scaled"), network=network.RotationAfterNorm),
    Mutation(
        "rotation-interleaved",
        "interleaved rotation",
        _at("attn.q_scaled"),
        network={
            "onnx": network.InterleavedOnnx,
            "native": network.InterleavedTensorRT,
            "tensorrt-llm": network.InterleavedTrtllm,
        },
        never=("composed",),
        without="made of the same parts as the native one",
    ),
    Mutation("rope-theta", "another theta of the rotation", _at("attn.q_scaled"), spec=_another_theta),
    Mutation(
        "rope-scaling", "llama3's scaling of frequencies ignored", _at("attn.q_scaled"), "llama3-rope-bias", spec=_unscaled_frequencies
    ),
    Mutation("wrong-key-head", "wrong key head for a query head", _at("attn.q_scaled"), weights=weights.keys_tiled),
    Mutation("keys-not-normalised", "keys cached before the norm", _at("attn.k_norm"), network=network.KeysNotNormalised),
    Mutation(
        "keys-cached-raw",
        "keys cached before the norm, the step's own after it",
        None,
        network=network.KeysCachedBeforeNorm,
        only=("portable",),
        without="attention reads the cache",
    ),
    Mutation("values-normalised", "values normalised like keys", _at("attn.out"), network=network.ValuesNormalised),
    Mutation("head-norm-eps", "1e-6 under the root of the heads' norm", _at("attn.q_scaled"), network=network.HeadNormEps),
    Mutation("keys-values", f"keys and values of layer {ONE} exchanged", _at("attn.k_norm", ONE), weights=weights.keys_and_values_exchanged),
    Mutation("head-zeroed", f"one head of layer {ONE} zeroed", _at("attn.o", ONE), weights=weights.head_zeroed),
    Mutation("bias-dropped", f"a bias of layer {ONE} dropped", _at("attn.o", ONE), "llama3-rope-bias", weights=weights.bias_dropped),
    Mutation("transposed", f"a square matrix of layer {ONE} transposed", _at("attn.o", ONE), weights=weights.matrix_transposed),
    Mutation(
        "mask-ahead",
        "a query sees the key after its own",
        _at("attn.out"),
        network={"portable": network.MaskAheadPortable, "tensorrt": network.MaskAheadTensorRT},
        only=("portable", "tensorrt"),
        without=_KERNEL,
    ),
    # The update
    Mutation("alpha-signed", "abs missing on alpha", _at("attn.update"), weights=weights.alpha_signed),
    Mutation("alpha-unscaled", "alpha unscaled", _at("attn.update"), weights=weights.alpha_unscaled),
    Mutation("update-not-normalised", "no norm after the update", _at("attn.update"), network=network.UpdateNotNormalised),
    Mutation("branch-not-normalised", "no norm of the branch", _at("attn.update"), network=network.BranchNotNormalised),
    Mutation("residual-added", "branch added, h not taken off", _at("attn.update"), network=network.ResidualAdded),
    Mutation("layer-skipped", f"layer {ONE} skipped", _at("attn.update", ONE), weights=weights.layer_skipped),
    Mutation("layers-swapped", f"weights of layers {ONE} and {NEXT} swapped", _at("attn.q_scaled", ONE), weights=weights.layers_swapped),
    Mutation("state-bfloat16", "hidden state of one layer in bfloat16", _at("attn.update", ONE), network=network.StateInHalf),
    # The MLP
    Mutation("root-missing", "sqrt(E) missing", _at("mlp.down"), "llama3-rope-bias", weights=weights.no_root),
    Mutation("root-missing-gated", "sqrt(E) missing, SwiGLU", _at("mlp.act"), "research-checkpoint", weights=weights.no_root),
    Mutation("root-missing-relu2", "sqrt(E) missing, where the norm hides it but for its eps", _at("mlp.update"), weights=weights.no_root),
    Mutation("suv-after", "suv after the activation", _at("mlp.act"), weights=weights.suv_after_activation),
    Mutation("relu", "relu for relu2", _at("mlp.act"), network=network.ActivationRelu),
    Mutation("mlp-negated", f"down of layer {ONE} negated", _at("mlp.down", ONE), weights=weights.matrix_negated),
    Mutation(
        "mlp-negated-file", f"MLP of layer {ONE} negated in the file", _at("mlp.down", ONE), file=files.mlp_negated, only=("onnx",),
        without="no file that can be read",
    ),
    Mutation("sign", f"sign of one weight of layer {ONE}", _at("mlp.act", ONE), weights=weights.sign_of_one_weight),
    Mutation("eps-dropped", "eps dropped", _at("mlp.update", ONE), "faint-mlp", never=_HALF, without=_RANGE, network=network.EpsDropped),
    Mutation("eps-under-root", "eps moved under the root", _at("mlp.update", ONE), "faint-mlp", never=_HALF, without=_RANGE, network=network.EpsUnderRoot),
    Mutation("eps-squared", "eps moved under the root, squared", _at("mlp.update", ONE), "faint-mlp", never=_HALF, without=_RANGE, network=network.EpsSquaredUnderRoot),
    Mutation("eps-floor", "eps as a floor of the length", _at("mlp.update", ONE), "faint-mlp", never=_HALF, without=_RANGE, network=network.EpsAsFloor),
    Mutation("eps-larger", "eps ten times as large", _at("mlp.update", ONE), "faint-mlp", never=_HALF, without=_RANGE, network=network.EpsOfLargeModels),
    Mutation("eps-no-guard", "a branch of zeros divided by zero", _at("mlp.update", ONE), "dead-mlp", network=network.NoGuard),
    # The ends
    Mutation("embedding-scaled", "embedding times sqrt(E)", "embed", weights=weights.embedding_scaled),
    Mutation("embedding-shifted", "embedding of the token before", "embed", weights=weights.embedding_shifted),
    Mutation("final-norm", "a final norm added", None, network=network.FinalNorm),
    Mutation("sz-unscaled", "sz unscaled", None, weights=weights.sz_unscaled),
    Mutation("sz-missing", "sz missing", None, weights=weights.sz_missing),
    Mutation("head-tied", "head taken from the embedding", None, weights=weights.head_tied),
    Mutation("vocabulary-permuted", "two rows of the head exchanged", None, weights=weights.vocabulary_rows_exchanged),
    Mutation("logits-float16", "logits rounded to float16", None, network=network.LogitsInHalf),
    # Quantisation
    Mutation("zero-point", "zero point off by one", _at("attn.q_scaled"), file=files.zero_point_off, network={"tensorrt": network.ZeroPointOffTensorRT},
        later=("ort int8", _at("mlp.down")), only=_QUANTISED, without="not quantised"),
    Mutation("block-doubled", f"one scale of one matrix of layer {ONE} doubled", _at("mlp.down", ONE), file=files.block_doubled,
        network={"tensorrt": network.BlockDoubledTensorRT}, only=_QUANTISED, without="not quantised"),
    # The cache
    Mutation("late-positions", "positions off by one after prefill", None, phases=DECODE, runner=runtime.LatePositions),
    Mutation("row-not-reset", "a cache row reused without reset", None, runner=runtime.RowNotReset),
    Mutation("chunk-boundary", "chunk boundary off by one", None, runner=runtime.ChunkBoundary),
    Mutation("caches-crossed", f"layers {ONE} and {NEXT} read each other's keys", None, file=files.caches_crossed, only=("portable",),
        without="one buffer is past and present"),
    Mutation("rows-not-moved", "a row not copied when it takes another's place", None, phases=DECODE, runner=runtime.RowsNotMoved,
        never=("portable",), without="each sequence has arrays of its own"),
    Mutation("rows-by-number", "logits in the order of rows", None, phases=DECODE, runner=runtime.RowsByNumber),
    Mutation("idle-rows", "an idle row of a step counts a token", None, runner=runtime.IdleRowsCounted,
        never=("portable",), without="each sequence has arrays of its own"),
    Mutation("last-but-one", "logits after a prompt are the last token's but one", None, phases=("prefill",), runner=runtime.LastButOne),
)  # fmt: skip
