"""Pictures, and the instrument of `lineas.explore`. Uses maps, paths and results; matplotlib, anywidget."""
