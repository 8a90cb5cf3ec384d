"""What arrays alone can do: distances, statistics, fits of maps, paths, baselines, and twins of the kernels.

It needs NumPy, the engine and `lineas.maps`; scikit-learn for `estimator` and one of the `baselines`. Torch tensors are
taken wherever arrays are, by those who have torch.
"""
