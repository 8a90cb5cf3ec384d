"""What maps do to the texts of a model, and at what price: sweeps, judges, calibration, diagnostics, reports."""
