"""What each value inside the network is, in words, and what to look at where it is the first that is wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A sub-step of a layer: what it computes, and what a wrong value there is usually made of."""

    what: str
    suspects: str


STEPS = {
    "embed": Step("the row of the embedding table", "the table itself, its storage type, and the ids that are looked up"),
    "attn.q_scaled": Step(
        "queries: projected, rotated to their position, of unit norm in each head, times sqk squared",
        "the projection, the rotation (pairs of channels, positions), the norm of each head, and sqk",
    ),
    "attn.k_norm": Step(
        "keys: projected, rotated to their position, of unit norm in each head",
        "the projection, the rotation (pairs of channels, positions) and the norm of each head",
    ),
    "attn.v": Step("values: projected", "the projection and its bias"),
    "attn.out": Step(
        "attention: softmax(sqrt(D) q k) v, the heads side by side",
        "the scale of the softmax, the causal mask, and which key head serves which query head",
    ),
    "attn.o": Step("the output projection of attention", "the projection, and the order of the heads that it expects"),
    "attn.update": Step(
        "the hidden state after attention: norm(h + alpha (norm(x) - h))",
        "alpha (its scale, its absolute value) and the two norms",
    ),
    "mlp.act": Step(
        "the MLP's inner values after the activation",
        "the up and gate projections, suv and sqrt(E) in their rows, and the activation",
    ),
    "mlp.down": Step("the down projection of the MLP", "the projection and its bias"),
    "mlp.update": Step(
        "the hidden state after the MLP: norm(h + alpha (norm(x) - h))",
        "alpha (its scale, its absolute value), the two norms, and the eps of the branch's norm",
    ),
}
HEAD = Step("the head: logits = sz * (W h)", "the head's rows, sz, and how they are stored")


def part_of_layer(tap: str) -> tuple[int | None, str]:
    """The number of the layer and the sub-step of a tap; no layer for the embedding, and for a name that is not ours."""
    pieces = tap.split(".", 2)
    if len(pieces) < 3 or not pieces[1].isdecimal():
        return None, tap
    return int(pieces[1]), pieces[2]


def step_of(tap: str) -> Step:
    """What a tap is. A name that is not ours is a step that nothing is known about."""
    return STEPS.get(part_of_layer(tap)[1], Step("a value of the engine's own", "what this value is made of"))


def before(tap: str, taps: list[str]) -> str | None:
    """The tap that comes before one among those that were compared, which are in the order of the forward pass."""
    place = taps.index(tap) if tap in taps else 0
    return taps[place - 1] if place else None
