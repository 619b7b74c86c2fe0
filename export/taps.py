"""The values inside the network that are compared, by the names that `export.network` gives them and every lowering keeps."""

LAYER_TAPS = (
    "attn.q_scaled",
    "attn.k_norm",
    "attn.v",
    "attn.out",
    "attn.o",
    "attn.update",
    "mlp.act",
    "mlp.down",
    "mlp.update",
)
"""Of each layer, in the order of the forward pass. The two updates are the hidden states."""
HIDDEN_STATES = ("attn.update", "mlp.update")


def tap_names(layers: int, *, fine: bool = True) -> tuple[str, ...]:
    """Every tap of a network of so many layers, in order; without `fine` the hidden states alone."""
    parts = LAYER_TAPS if fine else HIDDEN_STATES
    return ("embed", *(f"layers.{layer}.{part}" for layer in range(layers) for part in parts))


def position_of(name: str) -> tuple[int, int]:
    """Sorts taps into the order of the forward pass; names that are not ours come last in their layer."""
    parts = name.split(".", 2)
    if len(parts) < 3 or not parts[1].isdecimal():
        return (-1, 0)
    return (int(parts[1]), LAYER_TAPS.index(parts[2]) if parts[2] in LAYER_TAPS else len(LAYER_TAPS))
