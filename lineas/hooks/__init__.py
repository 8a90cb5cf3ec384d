"""Maps in a model, and activations out of it, by forward hooks. Uses `inputs`, `maps` and of `arrays` the activations.

`modules` finds modules, `outputs` their hidden states and `layout` the axes of these; `affine` and `pooling` work on
tensors. `tokens`, `strength`, `caches` and `forward_state` say which tokens are mapped, and how strongly; `map_hook`
applies a map, `attach` puts them on. `capture` runs a model no further than needed, `sites` suggests modules, `collect`
takes activations with both. `settings` needs no torch.
"""
