"""AffineTransport: maps from arrays with the habits of scikit-learn (``pip install "lineas[sklearn]"``).

Imported when ``lineas.AffineTransport`` is first asked for: the rest of lineas does without scikit-learn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import as_finite, as_mass
from ..maps.affine import AffineMap
from .closed_form import fit
from .wasserstein import wasserstein

try:
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
    from sklearn.utils import ClassifierTags, Tags
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:  # missing, or older than 1.6
    raise ImportError('AffineTransport needs scikit-learn 1.6 or later: pip install "lineas[sklearn]"') from error


class AffineTransport(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """`lineas.fit` as a scikit-learn transformer: source and target rows in one array, told apart by labels.

    `fit` learns one slope and one shift a neuron that move the rows with the source label to the distribution of the
    others; the rows are not paired, and the two classes may differ in size. Pipelines, `clone` and `set_output` work
    as for any transformer. Model selection works by `score`, but needs folds with both labels: a search given ``cv=5``
    cuts y as it is ordered, so pass ``cv=StratifiedKFold(5, shuffle=True, random_state=0)``.

    Parameters
    ----------
    method : {"linear", "gaussian", "mean"}, default "linear"
        As in `lineas.fit`.
    l1, group : float, default 0.0
        Penalties of the sparse fit, as in `lineas.fit`; 0 for none.
    shrinkage : None, "auto" or float, default None
        How much of the map is held back, as in `lineas.fit`.
    strength : float, default 1.0
        Strength at which `transform` applies the map: 0 is off, 1 the map.
    source : label, optional
        The label of the source rows. Default: the first of `classes_`.

    Attributes
    ----------
    classes_ : ndarray
        [2], the labels, sorted.
    map_ : AffineMap
        The map at strength 1, float32 or float64 as X was.
    weight_, bias_ : ndarray
        [d], its slopes and shifts, read-only.
    n_features_in_ : int
        The number of neurons d.
    feature_names_in_ : ndarray
        [d], names of the columns, where X was a data frame with names that are all strings.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> X = np.array([[0.0], [1.0], [2.0], [1.0], [4.0], [7.0]])
    >>> y = ["source", "source", "source", "target", "target", "target"]
    >>> lineas.AffineTransport().fit(X, y).transform([[10.0]])
    array([[31.]])
    """

    def __init__(
        self,
        *,
        method: str = "linear",
        l1: float = 0.0,
        group: float = 0.0,
        shrinkage: float | str | None = None,
        strength: float = 1.0,
        source: Any = None,
    ) -> None:
        self.method = method
        self.l1 = l1
        self.group = group
        self.shrinkage = shrinkage
        self.strength = strength
        self.source = source

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.classifier_tags = ClassifierTags(multi_class=False)  # y has two values, though nothing is classified
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> AffineTransport:
        """Fit the map from the rows with the source label to the rows with the other one.

        Parameters
        ----------
        X : array_like
            Activations [n, d], one row a prompt, at least 2 of each label. float32 and float64 are kept, other
            numbers are converted to float64.
        y : array_like
            [n], labels with two values.
        sample_weight : array_like, optional
            [n], weights of the rows: not negative, with a positive sum for each label. Only proportions within a
            label count. For "gaussian" they change the standard deviations to weighted ones, as in `lineas.fit`. Rows
            of weight 0 change nothing, but must be finite, as everywhere in scikit-learn.

        Returns
        -------
        AffineTransport
            Itself.

        Raises
        ------
        TypeError
            If a setting has a wrong type.
        ValueError
            If X is not 2-D or not finite, y has not two values, a label has fewer than 2 rows or no weight, the
            setting `source` is none of the labels, or another setting is out of range.
        """
        rows, labels = validate_data(self, X, y, dtype=(np.float64, np.float32), ensure_min_samples=2)
        as_finite(self.strength, "strength")
        classes, counts = np.unique(labels, return_counts=True)
        if len(classes) != 2:
            raise ValueError(f"y must have two labels, source and target, got {_labels(classes)}")
        if counts.min() < 2:
            few = classes.tolist()[np.argmin(counts)]
            raise ValueError(f"each label of y must have at least 2 rows, got {counts.min()} of {few!r}")
        (u, u_mass), (v, v_mass) = self._split(rows, labels, classes, sample_weight)
        self.map_: AffineMap = fit(
            u,
            v,
            method=self.method,
            l1=self.l1,
            group=self.group,
            shrinkage=self.shrinkage,
            source_weights=u_mass,
            target_weights=v_mass,
        )
        self.classes_: NDArray = classes
        self.weight_: NDArray = self.map_.weight
        self.bias_: NDArray = self.map_.bias
        return self

    def transform(self, X: ArrayLike) -> NDArray:
        """Apply the map at `strength` to every row.

        Labels are not asked for: to steer, pass source rows. Target rows would be moved as well, away from where they
        belong.

        Parameters
        ----------
        X : array_like
            Activations [n, d].

        Returns
        -------
        ndarray
            [n, d], new, float32 for float32 `X`, else float64.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`.
        ValueError
            If X is not 2-D, has another number of columns than in `fit`, or is not finite.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        return self.map_.transform(X, strength=self.strength)

    def inverse_transform(self, X: ArrayLike) -> NDArray:
        """Undo `transform`, at the same strength.

        Parameters
        ----------
        X : array_like
            Transformed activations [n, d].

        Returns
        -------
        ndarray
            As `transform`.

        Raises
        ------
        sklearn.exceptions.NotFittedError, ValueError
            As `transform`; ValueError also if the map has no inverse: its slope at this strength is 0 for some neuron,
            which the message names.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        return self.map_.scaled(self.strength).inverse().transform(X)

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return how close the transformed source rows are to the target rows: minus the mean squared W2.

        The squared 2-Wasserstein distance of each neuron (`lineas.wasserstein`), averaged over the neurons, times -1:
        in squared units of the activations, at most 0, and higher is better. Two samples of one distribution are not
        0 apart either: compare scores on the same rows only.

        Parameters
        ----------
        X : array_like
            Activations [n, d].
        y : array_like
            [n], the labels, each at least once.
        sample_weight : array_like, optional
            [n], weights of the rows, as in `fit`.

        Returns
        -------
        float

        Raises
        ------
        sklearn.exceptions.NotFittedError, ValueError
            As `transform`; ValueError also if y has other labels than in `fit`, or lacks one of them.
        """
        check_is_fitted(self)
        rows, labels = validate_data(self, X, y, dtype=(np.float64, np.float32), reset=False)
        classes = np.unique(labels)
        if not np.array_equal(classes, self.classes_):
            raise ValueError(f"y must have the labels of fit, {self.classes_.tolist()}, got {_labels(classes)}")
        (u, u_mass), (v, v_mass) = self._split(rows, labels, classes, sample_weight)
        moved = self.map_.transform(u, strength=self.strength)
        distances = wasserstein(moved, v, u_weights=u_mass, v_weights=v_mass)
        return -float(distances.mean(dtype=np.float64))

    def _split(
        self, rows: NDArray, labels: NDArray, classes: NDArray, sample_weight: ArrayLike | None
    ) -> list[tuple[NDArray, NDArray | None]]:
        """Rows and their weights of the source, then of the target."""
        known = classes.tolist()
        if self.source is not None and self.source not in known:
            raise ValueError(f"source must be one of the labels {known!r}, got {self.source!r}")
        source = 0 if self.source is None else known.index(self.source)
        mass = None if sample_weight is None else as_mass(sample_weight, len(rows), "sample_weight")
        parts: list[tuple[NDArray, NDArray | None]] = []
        for k in (source, 1 - source):
            at = labels == classes[k]
            if mass is not None and not mass[at].sum() > 0:
                raise ValueError(f"sample_weight must have a positive sum for each label, got 0 for {known[k]!r}")
            parts.append((rows[at], None if mass is None else mass[at]))
        return parts


def _labels(classes: NDArray) -> str:
    """What y held instead of two labels, for an error."""
    known = classes.tolist()  # as Python writes them, without NumPy's types around them
    if len(known) == 1:
        return f"only one label, {known} (in cross-validation, pass cv=StratifiedKFold(...) to have both)"
    more = ", ..." if len(known) > 4 else ""
    return f"{len(known)} labels, {str(known[:4])[:-1]}{more}]"
