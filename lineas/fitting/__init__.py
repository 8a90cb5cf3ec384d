"""Fits through a model: end to end, module by module, along sparse paths. Uses all rooms before it.

`settings` and `result` need no torch. `objective` (on `autograd`) has the loss and its gradient, `parameters` the maps
and their step, `step_sizes` the rates, `loop` the steps with their history, `checkpoint` its file; `end_to_end`,
`incremental` and `sparse_path` are what users call.
"""
