"""Parity: does an engine compute what the PyTorch model computes, to the precision it claims?

`verify` runs both on the same tokens and returns a `ParityReport`; docs/parity.md explains the gate.
"""

from engines.parity.gate import Check
from engines.parity.prompts import TokenSequence
from engines.parity.quantized import Quantization
from engines.parity.replay import Replay, replay
from engines.parity.report import ParityReport
from engines.parity.verify import verify

__all__ = ["Check", "ParityReport", "Quantization", "Replay", "TokenSequence", "replay", "verify"]
