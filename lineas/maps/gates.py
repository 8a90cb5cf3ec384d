"""Gates: how much of a map's change an activation gets, from 0 to 1, as a function of the activation itself.

With a gate g a map at strength s does z + s g (T(z) - z). That is no longer affine in z, so gates stand beside the maps
in `SteeringMaps` and not in them. NumPy alone; `lineas.hooks.gating` has the same on tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import as_choice, as_finite, as_int, as_share, as_vector

CONTEXTS = ("token", "mean")
"""What a scalar gate may read."""


class _Immutable:
    """Base of gates: what they hold cannot be changed, and copies are the object itself."""

    __slots__ = ()

    def _put(self, **values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                value = value.copy()
                value.flags.writeable = False
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable: cannot delete {name!r}")

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict) -> Any:
        return self


class Gate(_Immutable):
    """One number for each token, g = sigmoid(weight . c + bias), where c is the token's activation or a mean of them.

    Immutable: arrays are read-only copies. Two gates are equal if they do the same: weight, bias, context and site are.

    Parameters
    ----------
    weight : array_like or torch.Tensor
        Shape [d], finite; float32, float64 or integers, which become float64.
    bias : float
        Finite.
    context : {"token", "mean"}, default "token"
        What c is: the activation of the token, or the mean over the tokens of its text up to and including it.
    site : str, optional
        The module whose output is read, before its own map if it has one; it has to run before the modules whose maps
        the gate multiplies. Default: that module itself.
    auroc, accuracy, left_alone : float, optional
        What `lineas.fit_gate` found on tokens of texts that the gate was not fitted to: the area under the ROC curve;
        the mean of the shares of source tokens with g >= 0.5 and of target tokens with g < 0.5; the latter share alone.

    Attributes
    ----------
    weight : ndarray
        float32 or float64, shape [d], read-only.
    bias, context, site, auroc, accuracy, left_alone
        As given.

    Raises
    ------
    TypeError
        If a dtype or type is another one.
    ValueError
        If the shape is not [d], a number is not finite, the context is unknown, the site is empty, or what was found
        is not from 0 to 1.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> gate = lineas.Gate(np.array([1.0, 0.0]), -2.0)
    >>> gate.values(np.array([[2.0, 5.0], [2000.0, 5.0]]))
    array([[0.5],
           [1. ]])
    """

    __slots__ = ("accuracy", "auroc", "bias", "context", "left_alone", "site", "weight")

    KIND: ClassVar[str] = "scalar"
    weight: NDArray
    bias: float
    context: str
    site: str | None
    auroc: float | None
    accuracy: float | None
    left_alone: float | None

    def __init__(
        self,
        weight: ArrayLike,
        bias: float,
        *,
        context: str = "token",
        site: str | None = None,
        auroc: float | None = None,
        accuracy: float | None = None,
        left_alone: float | None = None,
    ) -> None:
        found = {"auroc": auroc, "accuracy": accuracy, "left_alone": left_alone}
        self._put(
            weight=as_vector(weight, "weight", "neuron"),
            bias=as_finite(bias, "bias"),
            context=as_choice(context, "context", CONTEXTS),
            site=_as_site(site),
            **{name: None if value is None else as_share(value, name) for name, value in found.items()},
        )

    @property
    def d(self) -> int:
        """The number of neurons that are read."""
        return self.weight.size

    @property
    def facts(self) -> dict[str, Any]:
        """What is not in arrays, by name."""
        names = ("bias", "context", "site", "auroc", "accuracy", "left_alone")
        return {name: getattr(self, name) for name in names}

    def at(self, site: str | None) -> Gate:
        """Return the same gate, reading the output of another module (None: of the mapped module itself)."""
        return Gate(self.weight, **{**self.facts, "site": site})

    def values(self, z: NDArray, axis: int = -1) -> NDArray:
        """The values g of activations `z`, which keep the channel axis with length 1.

        Parameters
        ----------
        z : ndarray
            Floating-point activations with d channels on `axis`. For context "mean" of shape [texts, tokens, d], where
            every token counts.
        axis : int, default -1
            The channel axis; -1 or 2 for context "mean".

        Returns
        -------
        ndarray
            In the dtype of `z`, from 0 to 1, broadcastable to `z`.

        Raises
        ------
        TypeError
            If `z` is not floating-point, or `axis` no integer.
        ValueError
            If `axis` of `z` does not have d channels, or `z` has no axis of tokens and the context is "mean".
        """
        z, axis = with_channels(z, axis, self.d)
        logits = np.moveaxis(z, axis, -1) @ self.weight.astype(z.dtype, copy=False)
        if self.context == "mean":
            if z.ndim != 3 or axis != 2:
                raise ValueError(
                    f"a gate of context 'mean' needs activations [texts, tokens, {self.d}], got shape {z.shape}"
                    + (f" with axis {axis}" if axis != z.ndim - 1 else "")
                )
            logits = np.cumsum(logits, axis=1, dtype=np.float64) / np.arange(1, z.shape[1] + 1)
        return np.expand_dims(_sigmoid(logits + self.bias), axis).astype(z.dtype, copy=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Gate):
            return NotImplemented
        ours, theirs = (one.facts for one in (self, other))
        return np.array_equal(self.weight, other.weight) and all(
            ours[name] == theirs[name] for name in ("bias", "context", "site")
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple:
        return _remade, (type(self), (self.weight,), self.facts)

    def __repr__(self) -> str:
        return f"Gate(d={self.d}, context={self.context!r}{_shown(site=self.site, auroc=self.auroc)})"


class NeuronGate(_Immutable):
    """One number for each token and neuron: the probability of "source" given that neuron's activation.

    g_j = sigmoid(quadratic_j z_j^2 + linear_j z_j + constant_j), which is the posterior under a Gaussian for source and
    one for target with equal priors (GAPS, arXiv 2609.01878). Closed neurons have g = 0: their maps do nothing.

    Immutable: arrays are read-only copies. Two gates are equal if they do the same.

    Parameters
    ----------
    quadratic, linear, constant : array_like or torch.Tensor
        Shape [d], finite; float32, float64 or integers. Where one is float64 all become float64.
    closed : array_like of bool, optional
        Shape [d]. Default: none is closed.
    auroc : array_like, optional
        Shape [d]: the area under the ROC curve of each neuron's posterior on texts that it was not fitted to.
    left_alone : float, optional
        The share of target tokens with g < 0.5, the mean over neurons that are not closed, found in the same way.

    Attributes
    ----------
    quadratic, linear, constant : ndarray
        float32 or float64, shape [d], read-only.
    closed : ndarray of bool
        Shape [d], read-only.
    auroc : ndarray or None
        float64, shape [d], read-only.
    left_alone
        As given.

    Raises
    ------
    TypeError
        If a dtype is another one.
    ValueError
        If the shapes are not the same [d], a number is not finite, or an area or share is not from 0 to 1.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> gate = lineas.NeuronGate([0.0, 0.0], [1.0, 1.0], [0.0, 0.0], closed=[False, True])
    >>> gate.values(np.array([[0.0, 7.0]]))
    array([[0.5, 0. ]])
    """

    __slots__ = ("auroc", "closed", "constant", "left_alone", "linear", "quadratic")

    KIND: ClassVar[str] = "neuron"
    site: ClassVar[None] = None
    context: ClassVar[str] = "token"
    quadratic: NDArray
    linear: NDArray
    constant: NDArray
    closed: NDArray[np.bool_]
    auroc: NDArray[np.float64] | None
    left_alone: float | None

    def __init__(
        self,
        quadratic: ArrayLike,
        linear: ArrayLike,
        constant: ArrayLike,
        *,
        closed: ArrayLike | None = None,
        auroc: ArrayLike | None = None,
        left_alone: float | None = None,
    ) -> None:
        given = {"quadratic": quadratic, "linear": linear, "constant": constant}
        parts = {name: as_vector(value, name, "neuron") for name, value in given.items()}
        shapes = [x.shape for x in parts.values()]
        if len(set(shapes)) > 1:
            raise ValueError(f"quadratic, linear and constant must have the same shape, got {shapes}")
        dtype = np.result_type(*parts.values())
        shut = np.zeros(shapes[0], bool) if closed is None else np.asarray(closed)
        if shut.dtype != bool:
            raise TypeError(f"closed must hold booleans, got dtype {shut.dtype}")
        areas = None if auroc is None else as_vector(auroc, "auroc", "neuron").astype(np.float64)
        for name, x in (("closed", shut), ("auroc", areas)):
            if x is not None and x.shape != shapes[0]:
                raise ValueError(f"{name} must have the shape {shapes[0]} of quadratic, got {x.shape}")
        if areas is not None and not ((areas >= 0) & (areas <= 1)).all():
            raise ValueError(f"auroc must be from 0 to 1, got {areas.min():g} to {areas.max():g}")
        share = None if left_alone is None else as_share(left_alone, "left_alone")
        self._put(**{name: x.astype(dtype) for name, x in parts.items()}, closed=shut, auroc=areas, left_alone=share)

    @property
    def d(self) -> int:
        """The number of neurons."""
        return self.quadratic.size

    def values(self, z: NDArray, axis: int = -1) -> NDArray:
        """The values g of floating-point activations `z`: an array of its shape and dtype, from 0 to 1.

        TypeError if `z` is not floating-point or `axis` no integer, ValueError if that axis does not have d channels.
        """
        z, axis = with_channels(z, axis, self.d)
        shape = [1] * z.ndim
        shape[axis] = -1
        quadratic, linear, constant = (
            part.astype(z.dtype, copy=False).reshape(shape) for part in (self.quadratic, self.linear, self.constant)
        )
        return np.where(self.closed.reshape(shape), 0, _sigmoid((quadratic * z + linear) * z + constant))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronGate):
            return NotImplemented
        names = ("quadratic", "linear", "constant", "closed")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple:
        facts = {"closed": self.closed, "auroc": self.auroc, "left_alone": self.left_alone}
        return _remade, (NeuronGate, (self.quadratic, self.linear, self.constant), facts)

    def __repr__(self) -> str:
        return f"NeuronGate(d={self.d}, open={self.d - int(self.closed.sum())})"


AnyGate: TypeAlias = Gate | NeuronGate
"""What may stand beside a map."""


def _remade(cls: type, arrays: tuple, facts: dict[str, Any]) -> Any:
    return cls(*arrays, **facts)


def _as_site(site: Any) -> str | None:
    if site is not None and not isinstance(site, str):
        raise TypeError(f"site must be the name of a module, got {type(site).__name__}")
    if site == "":
        raise ValueError("site must not be empty")
    return site


def with_channels(z: Any, axis: Any, d: int) -> tuple[NDArray, int]:
    """`z` and its channel axis, counted from 0."""
    z, axis = np.asarray(z), as_int(axis, "axis")
    if z.dtype.kind != "f":
        raise TypeError(f"z must be a floating-point array, got dtype {z.dtype}")
    if not -z.ndim <= axis < z.ndim or z.shape[axis] != d:
        raise ValueError(f"z must have {d} channels on axis {axis}, got shape {z.shape}")
    return z, axis % z.ndim


def _sigmoid(x: NDArray) -> NDArray:
    with np.errstate(over="ignore"):  # exp overflows to infinity, whose inverse is the right answer
        return 1 / (1 + np.exp(-x))


def _shown(**facts: Any) -> str:
    return "".join(
        f", {name}={value:.3f}" if isinstance(value, float) else f", {name}={value!r}"
        for name, value in facts.items()
        if value is not None
    )


def described(gate: AnyGate | None) -> str:
    """A gate in a cell of a table."""
    if gate is None:
        return "-"
    if isinstance(gate, NeuronGate):
        return f"{gate.d - int(gate.closed.sum())} neurons"
    area = "" if gate.auroc is None else f", AUROC {gate.auroc:.2f}"
    return f"{gate.context}{area}" + ("" if gate.site is None else f", at {gate.site}")


def gates_of(maps: Any) -> Mapping[str, AnyGate]:
    """The gates of maps that may be a plain mapping, by module; empty where there are none."""
    return getattr(maps, "gates", {})


def refuse_gates(maps: Any, what: str) -> None:
    """ValueError where maps have gates, for what only affine maps can be."""
    if gates_of(maps):
        raise ValueError(
            f"{what}: these maps have gates, so their change depends on the activation and is not affine; "
            "maps.gated(None) takes the gates off"
        )


# --- in files ---------------------------------------------------------------------------------------------------------

_ARRAYS = {"scalar": ("weight",), "neuron": ("quadratic", "linear", "constant", "closed", "auroc")}
_CLASSES: dict[str, type] = {"scalar": Gate, "neuron": NeuronGate}


def arrays_of(gate: AnyGate) -> dict[str, NDArray]:
    """The arrays of a gate by name."""
    found = {name: getattr(gate, name) for name in _ARRAYS[gate.KIND]}
    return {name: x for name, x in found.items() if x is not None}


def facts_of(gate: AnyGate) -> dict[str, Any]:
    """The rest of a gate, which JSON can hold."""
    facts = gate.facts if isinstance(gate, Gate) else {"left_alone": gate.left_alone}
    return {"kind": gate.KIND, **facts}


def made_of(facts: Any, arrays: Mapping[str, NDArray]) -> AnyGate:
    """The gate of `facts_of` and `arrays_of`, checked; TypeError or ValueError where they do not hold together."""
    if not isinstance(facts, dict) or not isinstance(facts.get("kind"), str) or facts["kind"] not in _ARRAYS:
        raise ValueError(f"a gate in the header must be an object with 'kind' 'scalar' or 'neuron', got {facts!r:.60}")
    facts = dict(facts)
    kind = facts.pop("kind")
    try:
        return _CLASSES[kind](**arrays, **facts)
    except TypeError as error:
        raise ValueError(f"a gate in the header does not hold together: {error}") from None
