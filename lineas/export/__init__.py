"""Maps for runtimes without lineas: in the weights of a model, or as a LoRA adapter. Uses `hooks`, `inputs` and `maps`.

`readers` knows what reads a norm, `parameter_changes` collects new values, `fold_module` and `bias_settings` find room
for slopes and shifts, `refusal` says why there is none; `fold` and `lora` are what users call. For image models
`image_readers` knows what reads a norm and `low_rank` what maps add to which module; `diffusers_lora` writes the files.
"""
