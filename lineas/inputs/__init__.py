"""What a model is called with: texts, conversations, token ids and batches, and the call itself.

`tokenize` and `batches`, then `prompts` (a set of them), `frozen` (a model while it is used), `call`. Needs torch; uses
the checks alone of lineas.
"""
