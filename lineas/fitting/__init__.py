"""Fits through a model: end to end, in sequence, module by module, along sparse paths. Uses all rooms before it.

`settings` and `result` need no torch. `objective` (on `autograd`) has the loss and its gradient, `preservation` what is
to stay as it is, `parameters` the maps and their step, `initial` where they start, `step_sizes` the rates, `loop` the
steps with their history, `checkpoint` its file; `on_top` and `walk` have earlier maps on. `distributed` has what
several processes share, `sharded` models that are divided among them. `end_to_end`, `sequence`, `incremental` and
`sparse_path` are what users call.
"""
