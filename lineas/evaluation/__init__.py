"""What fitted maps do, measured: on activations, before anything is generated."""
