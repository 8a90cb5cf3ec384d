"""All settings of the fits through a model, once: names, defaults, descriptions and checks. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from .._checks import as_choice, as_falling, as_finite, as_flag, as_int, as_not_negative, as_positive, as_share
from ..arrays.closed_form import METHODS
from ..arrays.shrinkage import as_shrinkage
from ..hooks.settings import RunSettings, optional
from ..maps.metadata import Layers
from ..maps.steering import SteeringMaps

SCALINGS = ("standardized", "layer-mean", "paper", "reference")
OPTIMIZERS = ("sgd", "adam")
KEEP_LOSSES = ("kl", "activations")
INITS = ("mean", "gaussian", "linear", "iti-c", "linear-incremental", "best")


@dataclass(frozen=True, kw_only=True)
class IncrementalSettings(RunSettings):
    """Settings of `lineas.fit_incremental`.

    Parameters
    ----------
    method : {"linear", "gaussian", "mean"}, default "linear"
        As in `lineas.fit`.
    shrinkage : None, "auto" or float, default None
        As in `lineas.fit`; "auto" of each module by itself, by what difference the shrunk maps of the earlier ones
        have left.
    memory : int, optional
        Bytes for the activations that are kept: those of the target of all modules, and of the source of one. Given,
        they go into streaming quantiles batch by batch (see `collect_quantiles`); while all rows fit, the maps are the
        same to rounding, else the metadata have the largest "rank_error". For ``pooling="all"``. Not with `shrinkage`.
        Default: every row is kept.
    """

    method: str = "linear"
    shrinkage: float | str | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        as_choice(self.method, "method", METHODS)
        self._set(
            shrinkage=as_shrinkage(self.shrinkage),
            memory=optional(as_int, self.memory, "memory", low=1),
        )
        if self.memory is not None and self.shrinkage is not None:
            raise ValueError(f"shrinkage needs every row, got shrinkage={self.shrinkage!r} and memory={self.memory}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(RunSettings):
    """What fits by gradients through the model minimise.

    Parameters
    ----------
    loss_layers : str, list[str] or re.Pattern, optional
        Modules at which the distance is taken. Default: those of `layers`. The last norm, such as "model.norm", lets
        only those differences count that reach the output (docs/less-damage.md).
    held_out : (source, target), optional
        Two more sets, by whose loss the best maps are chosen.
    scaling : {"standardized", "layer-mean", "paper", "reference"}, default "standardized"
        The loss is the mean over loss modules, of activations divided by the targets' standard deviation of each neuron
        or as they are; their sum (eq. 4 of the paper); or what the published code minimises, which its rates and
        penalties fit. "standardized" fits the slopes and shifts of standardized activations, so that neither loss nor
        steps nor penalties depend on the units of the neurons: in some models a few of them are a thousand times as
        large as the others, and would own all three (docs/decisions/0021).
    slopes, shifts : bool, str, list[str] or re.Pattern, default True
        Whether slopes, and shifts, are fitted: in all modules, in none, or in those that are named as in `layers`.
        ``slopes=False`` gives steering vectors, which every runtime can add.
    seed : int, default 0
        Of torch's random numbers during the fit, for models that draw any. The state is restored afterwards.
    process_group : None, "world" or ProcessGroup, default None
        Processes of torch.distributed that fit together, each of which makes the same call: prompts are dealt out, and
        all return the same maps. "world" are all that torchrun has started. None is this process alone, also where a
        group is there for something else (docs/distributed.md).
    """

    loss_layers: Layers | None = None
    held_out: Any = None
    scaling: str = "standardized"
    slopes: bool | Layers = True
    shifts: bool | Layers = True
    seed: int = 0
    process_group: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_process_group(self.process_group)
        if self.slopes is False and self.shifts is False:
            raise ValueError("slopes and shifts are both False: nothing is left to be fitted")
        self._set(slopes=_chosen(self.slopes), shifts=_chosen(self.shifts))
        self._set(scaling=as_choice(self.scaling, "scaling", SCALINGS), seed=as_int(self.seed, "seed", low=0))
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class FitSettings(ObjectiveSettings):
    """Settings of `lineas.fit_end_to_end`.

    Parameters
    ----------
    keep : list of texts, conversations or token ids, batch or list of batches, optional
        Prompts on which the model is to stay as it is: the loss gets ``keep_weight`` times a divergence between the
        steered and the unsteered model on them. Default, where a weight or a budget is given: the target. With
        `held_out`, maps are chosen by held-out loss and divergence together: that of the held-out target or, of
        prompts that are given here, of every fourth, which is then not fitted.
    keep_weight : float or "auto", optional
        The weight of the divergence; "auto", the default with `max_kl`, finds the one at which the divergence is
        within the budget. Default without `keep` and `max_kl`: 0.
    keep_loss : {"kl", "activations"}, default "kl"
        The Kullback-Leibler divergence of the next token in nats, the mean over tokens, for which the whole model
        runs; or the squared change of the activations at the loss modules, the mean over tokens, scaled and summed as
        the loss is: it needs no language model.
    max_kl : float, optional
        The budget of ``keep_weight="auto"``, in nats a token. With `held_out`, no maps are returned that go beyond it
        on the held-out prompts.
    gates : mapping of str to Gate or NeuronGate, or Gate, optional
        Gates that are on while the maps are fitted, and stay on the maps that are returned: as
        `SteeringMaps.gated` takes them. They are not changed.
    init : SteeringMaps or str, optional
        Where to start. Default: the identity. "mean", "gaussian" and "linear": the closed-form maps of `lineas.fit`,
        shrunk by ``shrinkage="auto"``, from the activations of source and target at the mapped modules;
        "linear-incremental": those of `lineas.fit_incremental`, shrunk alike; "iti-c": the shifts of
        `lineas.baselines.iti_c`, which needs scikit-learn. With `held_out`, "best" tries the identity and each of them
        ("iti-c" where scikit-learn is installed) on the held-out sets, at strengths of 0.25, 0.5, 0.75 and 1 until one
        is worse than the one before, and starts from the best. That counts as step 0, so with 1 among `strengths` the
        held-out loss of the result is at most that of each of them. Metadata say which it was ("init", method and
        strength) and all losses ("init_losses", pairs of strength and loss by method; strength 0 is the identity).
        For several tasks maps are fitted to each, and their mean is taken. Maps with gates take `gates`, such as their
        own: those of a fit are these alone.
    on_top_of : SteeringMaps, optional
        Maps that are on the model during the whole fit, at strength 1, for source, target and held-out prompts alike.
        The maps that are returned do both, ``new @ on_top_of``: a second concept is fitted to a model that has the
        first. See `lineas.fit_sequence`.
    disjoint : bool, default False
        With `on_top_of`: leave the neurons alone that those maps change, slopes and shifts. What is fitted is the
        identity there, so that no neuron serves both. Sparse maps leave neurons free: fit `on_top_of` with `l1` or
        `group`.
    strengths : list of float, default (1.0,)
        Strengths at which the maps are tried on the held-out sets at every step; the best of them is kept, and the maps
        are returned so that strength 1 is that one. The steps go on from strength 1. Fits to few prompts go too far, as
        means of few samples differ by chance as well: ``(0.7, 0.85, 1.0)`` finds how much to hold back
        (docs/end-to-end-fits.md), at a forward pass of the held-out source each.
    mini_batch : int, optional
        Prompts of the source in a step, at least 2; default: all of them. They are drawn without replacement until
        fewer are left, then anew, by `seed` and the number of the step alone. The target is always the whole set. The
        loss is that of all prompts of a step together, in however many forward passes `batch_size` divides them: all
        but the last are then made twice and one is kept at a time, so that memory for one is enough, and a step takes
        up to half as long again (docs/decisions/0013).
    l1, group : float, default 0.0
        Penalties ``l1 (|w - 1|_1 + |b|_1)`` and ``group sqrt(d) (||w - 1||_2 + ||b||_2)`` of each module.
    l1_bias, group_bias : float, optional
        Those of the shifts, where they differ from those of the slopes.
    optimizer : {"sgd", "adam"}, default "sgd"
        Gradient descent without momentum, or Adam with bias correction.
    lr : "auto" or float, default "auto"
        The rate, which is the step of the prox too. "auto" finds rates from the loss and its gradients, whatever the
        model and the scale of its activations: the first step goes a quarter of the way to where a linear loss would
        reach 0, later rates are half of the smallest inverse curvature (Barzilai and Borwein 1988) of the last ten
        steps, and a step after which loss and penalties together are higher is taken back. It costs one more gradient
        than there are steps, and is for "sgd". A number is the first rate; it falls along a cosine to a thousandth of
        itself.
    betas : (float, float), default (0.9, 0.999)
        Decay rates of Adam.
    steps : int, default 20
        The largest number of steps.
    patience : int or None, default 5
        With `held_out`: stop after so many steps without a lower held-out loss, those that are taken back not counted;
        None takes all steps.
    seed : int, default 0
        Of the mini-batches, and of torch's random numbers during the fit, for models that draw any. The state is
        restored afterwards.
    checkpoint : path, optional
        File to keep the fit in: written before the first step and after every one, as a whole or not at all. Where it
        is there, the fit goes on from it, whatever ended it, to the same bits as if nothing had (on the same machine,
        with as many threads): model, data and settings must be those of then, and whatever else acts on the model,
        such as attached maps or adapters, which the target's activations tell, up to rounding. Only `patience` and, at
        automatic rates without mini-batches, `steps`, upwards, may differ.
    """

    keep: Any = None
    keep_weight: float | str | None = None
    keep_loss: str = "kl"
    max_kl: float | None = None
    gates: Any = None
    init: Mapping[str, Any] | str | None = None
    on_top_of: SteeringMaps | None = None
    disjoint: bool = False
    strengths: Sequence[float] = (1.0,)
    mini_batch: int | None = None
    l1: float = 0.0
    group: float = 0.0
    l1_bias: float | None = None
    group_bias: float | None = None
    optimizer: str = "sgd"
    lr: float | str = "auto"
    betas: tuple[float, float] = (0.9, 0.999)
    steps: int = 20
    patience: int | None = 5
    checkpoint: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            keep_loss=as_choice(self.keep_loss, "keep_loss", KEEP_LOSSES),
            max_kl=optional(as_positive, self.max_kl, "max_kl"),
        )
        self._set(keep_weight=_keep_weight(self))
        if isinstance(self.init, str):
            as_choice(self.init, "init", INITS)
            if self.init == "best" and self.held_out is None:
                raise ValueError("init='best': there are no held_out sets to choose by")
        elif self.init is not None and not isinstance(self.init, Mapping):
            raise TypeError(f"init must be a SteeringMaps or a string, got {type(self.init).__name__}")
        check_start(self.init, self.gates, "init", "gates")
        self._check_on_top_of()
        l1, group = as_not_negative(self.l1, "l1"), as_not_negative(self.group, "group")
        self._set(
            strengths=_strengths(self.strengths, self.held_out),
            mini_batch=optional(as_int, self.mini_batch, "mini_batch", low=2),
            l1=l1,
            group=group,
            l1_bias=l1 if self.l1_bias is None else as_not_negative(self.l1_bias, "l1_bias"),
            group_bias=group if self.group_bias is None else as_not_negative(self.group_bias, "group_bias"),
            optimizer=as_choice(self.optimizer, "optimizer", OPTIMIZERS),
            lr=_rate(self.lr),
            betas=_betas(self.betas),
            steps=as_int(self.steps, "steps", low=1),
            patience=optional(as_int, self.patience, "patience", low=1),
        )
        if self.lr == "auto" and self.optimizer != "sgd":
            raise ValueError(f"lr must be a number for optimizer {self.optimizer!r}: 'auto' is for 'sgd'")
        if self.checkpoint is not None and not isinstance(self.checkpoint, str | os.PathLike):
            raise TypeError(f"checkpoint must be a path, got {type(self.checkpoint).__name__}")

    def _check_on_top_of(self) -> None:
        if self.on_top_of is not None and not isinstance(self.on_top_of, SteeringMaps):
            raise TypeError(f"on_top_of must be a SteeringMaps, got {type(self.on_top_of).__name__}")
        if as_flag(self.disjoint, "disjoint") and self.on_top_of is None:
            raise ValueError("disjoint must be False without on_top_of: there are no maps to leave the neurons of")

    @property
    def penalties(self) -> tuple[float, float, float, float]:
        """l1 and group of the slopes, l1 and group of the shifts."""
        return self.l1, self.group, cast(float, self.l1_bias), cast(float, self.group_bias)

    @property
    def free(self) -> tuple[str, ...]:
        """The settings in which a fit that goes on may differ: the number of steps where no rate depends on it."""
        return ("steps", "patience") if self.lr == "auto" and self.mini_batch is None else ("patience",)


def check_start(maps: Any, gates: Any, argument: str, beside: str) -> None:
    """ValueError, which calls both by these names, for maps with gates to start from where a fit is to have none."""
    if isinstance(maps, SteeringMaps) and maps.gates and gates is None:
        raise ValueError(
            f"{argument} has gates, which a fit takes from {beside}= alone: give {beside}= too, such as its own, or "
            f"{argument}=maps.gated(None) to start from the maps without them"
        )


@dataclass(frozen=True, kw_only=True)
class JointSettings(FitSettings):
    """Settings of `lineas.fit_jointly`.

    Parameters
    ----------
    held_out : dict of str to (source, target), optional
        Two more sets for each task, by whose mean loss the best maps are chosen.
    """


@dataclass(frozen=True, kw_only=True)
class SequenceSettings(FitSettings):
    """Settings of `lineas.fit_sequence`.

    Parameters
    ----------
    held_out : dict of str to (source, target), optional
        Two more sets for each concept, by whose loss its maps are chosen.
    gates : dict of str to gates, optional
        For any of the concepts, as of `fit_end_to_end`. Maps with gates cannot be composed, but attached in order.
    init : dict of str to SteeringMaps, optional
        Where to start, for any of the concepts. Default: the identity.
    on_top_of : SteeringMaps, optional
        Maps that are on the model during all fits. They are part of the maps that are returned, before all others.
    disjoint : bool, default False
        Leave the neurons alone that earlier concepts change, slopes and shifts, and those of `on_top_of`: no neuron
        serves two concepts. It takes `l1` or `group`, since maps that are not sparse leave no neuron.
    preserve : bool, default False
        Add the targets of earlier concepts to the prompts on which the model is to stay as it is (`keep`), with those
        concepts on: a later concept is not to undo them there. It takes `keep_weight` or `max_kl`.
    checkpoint : path, optional
        Folder to keep the fits in, a file for each concept, made if it is not there. Where there are files, the fits go
        on from them, as that of `fit_end_to_end` does from its own; but more steps for a concept that others stand on
        take another folder, or theirs removed.
    """

    preserve: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if as_flag(self.preserve, "preserve") and self.keep_weight == 0:
            raise ValueError("preserve must be False without a weight: give keep_weight= or max_kl=")

    def _check_on_top_of(self) -> None:
        if as_flag(self.disjoint, "disjoint") and not self.l1 and not self.group:
            raise ValueError("disjoint must be False unless l1 or group is above 0: other maps leave no neuron")
        if self.on_top_of is not None and not isinstance(self.on_top_of, SteeringMaps):
            raise TypeError(f"on_top_of must be a SteeringMaps, got {type(self.on_top_of).__name__}")


@dataclass(frozen=True, kw_only=True)
class PathSettings(ObjectiveSettings):
    """Settings of `lineas.sparse_path_end_to_end`.

    Parameters
    ----------
    held_out : (source, target), optional
        Two more sets, whose loss is taken at every point: by it refits are kept or not, and the best point is found.
    n_penalties : int, default 50
        How many penalties, at least 2, in equal ratios from the smallest one that leaves every map the identity, which
        the gradient there tells, down to ``min_ratio`` times it.
    min_ratio : float, default 1e-3
        The last of them divided by the first.
    l1_ratio : float, default 1.0
        1 changes single neurons wherever they are, 0 whole modules only.
    penalties : sequence of float, optional
        The penalties themselves, falling and above 0, in place of `n_penalties` and `min_ratio`. A penalty p stands for
        ``l1 = p * l1_ratio`` and ``group = p * (1 - l1_ratio)``, of slopes and shifts alike.
    steps : int, default 2
        Steps at each penalty. A step costs a forward and a backward pass.
    refit_steps : int, default 0
        Steps of each refit; 0 for none. A refit that makes the held-out loss larger is not kept (without held-out sets,
        one that makes the fitted loss larger).
    refit_support : float, default 0.5
        Points at which more than this share of the neurons is changed are not refitted: theirs is a small penalty.
    lr : "auto" or float, default "auto"
        The rate of the first step; "auto" goes to where a linear loss would reach 0. Later ones stay between a tenth
        and a hundred times it.
    """

    n_penalties: int = 50
    min_ratio: float = 1e-3
    l1_ratio: float = 1.0
    penalties: Sequence[float] | np.ndarray | None = None
    steps: int = 2
    refit_steps: int = 0
    refit_support: float = 0.5
    lr: float | str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            n_penalties=as_int(self.n_penalties, "n_penalties", low=2),
            min_ratio=as_positive(self.min_ratio, "min_ratio"),
            l1_ratio=as_share(self.l1_ratio, "l1_ratio"),
            penalties=optional(as_falling, self.penalties, "penalties"),
            steps=as_int(self.steps, "steps", low=1),
            refit_steps=as_int(self.refit_steps, "refit_steps", low=0),
            refit_support=as_share(self.refit_support, "refit_support"),
            lr=_rate(self.lr),
        )
        if self.min_ratio >= 1:
            raise ValueError(f"min_ratio must be below 1, got {self.min_ratio:g}")


def _keep_weight(settings: FitSettings) -> float | str:
    """The weight of what is to be kept, "auto" or 0 for nothing."""
    given, budget = settings.keep_weight, settings.max_kl
    if isinstance(given, str) and given != "auto":
        raise ValueError(f"keep_weight must be 'auto' or a number, got {given!r}")
    if budget is not None and settings.keep_loss != "kl":
        raise ValueError(f"max_kl is a budget for keep_loss='kl', got keep_loss={settings.keep_loss!r}")
    if given is None:
        if budget is None and settings.keep is not None:
            raise ValueError("keep: give keep_weight=, or max_kl= for one that is found")
        return 0.0 if budget is None else "auto"
    if given == "auto":
        if budget is None:
            raise ValueError("keep_weight='auto' needs a budget: give max_kl=")
        return given
    if budget is not None:
        raise ValueError(f"max_kl is for keep_weight='auto', got keep_weight={given!r}")
    return as_not_negative(given, "keep_weight")


def _check_process_group(group: Any) -> None:
    if isinstance(group, str) and group != "world":
        raise ValueError(f"process_group must be None, 'world' or a ProcessGroup of torch.distributed, got {group!r}")
    if group is not None and not (isinstance(group, str) or (hasattr(group, "rank") and hasattr(group, "size"))):
        raise TypeError(
            f"process_group must be None, 'world' or a ProcessGroup of torch.distributed, got {type(group).__name__}"
        )


def _chosen(value: Any) -> Any:
    """`value`, a bool also where it is NumPy's; `resolve` looks at what is none."""
    return bool(value) if isinstance(value, bool | np.bool_) else value


def _rate(lr: Any) -> float | str:
    if isinstance(lr, str):
        if lr != "auto":
            raise ValueError(f"lr must be 'auto' or a number, got {lr!r}")
        return lr
    return as_positive(lr, "lr")


def _strengths(strengths: Any, held_out: Any) -> tuple[float, ...]:
    if isinstance(strengths, str) or not isinstance(strengths, Sequence | np.ndarray):
        raise TypeError(f"strengths must be a list of numbers, got {type(strengths).__name__}")
    found = tuple(as_finite(strength, "strengths") for strength in strengths)
    if not found:
        raise ValueError("strengths is empty")
    if found != (1.0,) and held_out is None:
        raise ValueError("strengths: there are no held_out sets to choose among them by")
    return found


def _betas(betas: Any) -> tuple[float, float]:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    first, second = (as_not_negative(beta, "betas") for beta in betas)
    if max(first, second) >= 1:
        raise ValueError(f"betas must be < 1, got {betas!r}")
    return first, second
