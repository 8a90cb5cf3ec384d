"""What maps do and what they cost: sweeps over strengths, judges, calibration, diagnostics, reports."""
