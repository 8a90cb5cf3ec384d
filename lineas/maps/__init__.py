"""Maps and their files, whatever found them.

`affine` has the map of one module, `steering` those of several, `vectors` those of steering vectors, `path` those of
many penalties; `metadata` says where maps come from, `records` and `files` how they are kept, `hub` how shared. All of
it needs NumPy only (files: safetensors; `hub`: huggingface_hub), and what it has of models, fits and pictures is
imported when it is called.
"""
