"""Mutation proof: engines with one fault each, through every lowering that can run here, held by the parity gate.

`table` lists the faults, `lowerings` makes an engine with one in it and runs it, `proof` judges. A fault is put where somebody who
ports the network would make it: into a weight on its way into the engine (`weights`), an operation of the lowering
(`network`), the graph's file (`files`) or the runner (`runtime`). Nothing here touches the reference.
`scripts/mutations.py` is the command.
"""
