"""The public functions that run a model: signatures and descriptions; torch is imported when they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    import re
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from .maps import SteeringMaps
    from .models.path import EndToEndPath
    from .models.survey import Sites
    from .models.tokens import Tokens
    from .models.train import FitResult


def sites(
    model: Any,
    data: Any = None,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> Sites:
    """List the modules of a model that maps can sit on, and suggest some of them.

    Modules of one class whose names differ in numbers only, such as those of a layer, share a row. Suggested are the
    sites of the paper (LinEAS, arXiv 2503.10679): in language models the norms after attention, in image models every
    norm; in models that it does not treat, the norms in their place. Lists of modules, dropout and rotary embeddings
    are left out. Experts that are fused into one tensor have no module of their own to be listed.

    Parameters
    ----------
    model : torch.nn.Module
        A model. Without `data` nothing is run: its weights may be on any device, also on "meta".
    data : list[str], batch or list of batches, optional
        As in `collect`. The first batch (of texts, the first two) is run once. Then rows come in the order of their
        first calls and tell widths and shapes that only a run can, and modules that were not called or whose output
        can take no map are left out.
    tokenizer, max_length, forward
        As in `collect`.

    Returns
    -------
    lineas.models.survey.Sites
        A sequence of rows, printed as a table, in notebooks too. A row has ``glob`` (for ``layers=``; it matches its
        modules and no other), ``kind`` (the class), ``width`` (neurons: a number, several, or None where only a run
        tells), ``count``, ``suggested``, ``names`` and, with `data`, ``shape``. ``suggested`` of the whole are globs
        for all suggested modules.

    Raises
    ------
    TypeError
        If `model` is no torch module, or `data` no texts or batch.
    ValueError
        If texts come without a tokenizer.

    Examples
    --------
    >>> found = lineas.sites(model)  # doctest: +SKIP
    >>> acts = lineas.collect(model, texts, layers=found.suggested, tokenizer=tokenizer)  # doctest: +SKIP
    """
    from .models.survey import sites

    return sites(model, data, tokenizer=tokenizer, max_length=max_length, forward=forward)


def collect(
    model: Any,
    data: Any,
    *,
    layers: str | list[str] | re.Pattern[str],
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int | None = 32,
    forward: Callable[[Any, Any], Any] | None = None,
    pooling: str = "mean",
    tokens: str | slice | Callable[[Tokens], Any] = "all",
    progress: bool = False,
) -> dict[str, NDArray]:
    """Take pooled activations out of a model: one row a prompt, one array a module.

    The model is called as it is, in eval mode, without gradients, and left early once the last of the modules has
    been seen; mode, flags and random state are restored afterwards, also after an error.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    data : list[str], batch or list of batches
        Texts (these need `tokenizer`), one batch, or a list of batches. A batch that is a dict is passed as
        ``model(**batch)``, a tensor as ``model(batch)``, a tuple as ``model(*batch)``.
    layers : str, list[str] or re.Pattern
        Modules by glob on their full dotted name, a list of globs, or a compiled regular expression that must match
        the whole name.
    tokenizer : transformers tokenizer, optional
        For texts. One without a pad token is left as it is; the padding is done here.
    max_length : int, optional
        Longest text in tokens; longer ones are cut. Default: no limit.
    batch_size : int, default 32
        Texts a forward pass.
    forward : callable, optional
        ``forward(model, batch)`` calls the model where the two ways above do not fit.
    pooling : {"mean", "min", "max", "last", "all"}, default "mean"
        Over the tokens under the attention mask. "all" keeps each real token as a row of its own.
    tokens : "all", "last", "prompt", slice or callable, default "all"
        The tokens that are pooled: all of them ("all" and "prompt"), the last of each prompt, those at the positions of
        a slice, where padding is not counted, or those for which a callable returns True; see `SteeringMaps.attach`.
    progress : bool, default False
        Show a progress bar.

    Returns
    -------
    dict[str, ndarray]
        float32 [n, d] by module name, in execution order.

    Raises
    ------
    TypeError
        If an argument is of a wrong type, texts come without a tokenizer, or a module's output holds no tensor.
    ValueError
        If no module matches `layers` (near names are listed), a matched module is not run, there is no prompt, or a
        mask does not fit the activation it belongs to.
    """
    from .models.collect import collect

    return collect(
        model,
        data,
        layers=layers,
        tokenizer=tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        forward=forward,
        pooling=pooling,
        tokens=tokens,
        progress=progress,
    )


def fit_end_to_end(
    model: Any,
    source: Any,
    target: Any,
    *,
    layers: str | list[str] | re.Pattern[str],
    loss_layers: str | list[str] | re.Pattern[str] | None = None,
    init: SteeringMaps | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    held_out: tuple[Any, Any] | None = None,
    strengths: Sequence[float] = (1.0,),
    batch_size: int | None = None,
    mini_batch: int | None = None,
    pooling: str = "mean",
    tokens: str | slice | Callable[[Tokens], Any] = "all",
    l1: float = 0.0,
    group: float = 0.0,
    l1_bias: float | None = None,
    group_bias: float | None = None,
    scaling: str = "layer-mean",
    optimizer: str = "sgd",
    lr: float | str = "auto",
    betas: tuple[float, float] = (0.9, 0.999),
    steps: int = 20,
    patience: int | None = 5,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Fit the maps of all modules together by gradient descent through the model (LinEAS, arXiv 2503.10679).

    Minimises the squared 2-Wasserstein distances between the pooled activations of the steered source prompts and
    those of the unsteered target prompts, summed over the neurons of each loss module, plus a sparse group lasso on
    slopes - 1 and shifts. A step is a gradient step on all maps followed by the exact proximal step, so zeros are
    exact. The weights of the model are not changed.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    source, target : list[str], batch or list of batches
        The prompts to move and the prompts to move them to; unpaired, of any two numbers, at least 2 each. A list
        of batches forms one step. See `collect` for what a batch is.
    layers : str, list[str] or re.Pattern
        Modules that get a map: a glob, a list of globs or a compiled regular expression.
    loss_layers : str, list[str] or re.Pattern, optional
        Modules at which the distance is taken. Default: the modules of `layers`.
    init : SteeringMaps, optional
        Where to start. Default: the identity.
    tokenizer, max_length, forward
        As in `collect`.
    held_out : (source, target), optional
        Two more sets, on which the loss is recorded at every step and by which the best maps are chosen.
    strengths : list of float, default (1.0,)
        Strengths at which the maps are tried on the held-out sets at every step; the best of them is kept, and the maps
        are returned so that strength 1 is that one. The steps go on from strength 1. Fits to few prompts go too far, as
        means of few samples differ by chance as well: ``(0.7, 0.85, 1.0)`` finds how much to hold back
        (docs/end-to-end-fits.md), at a forward pass of the held-out source each.
    batch_size : int, optional
        Prompts in a forward pass, in every set; default: those of `mini_batch`, without it all texts, or each batch as
        it comes. The loss is always that of all prompts of a step together. Where these take several forward passes,
        all but the last are made twice and one is kept at a time: memory for one of them is enough, and a step takes
        up to half as long again (docs/decisions/0013).
    mini_batch : int, optional
        Prompts of the source in a step, at least 2; default: all of them. They are drawn without replacement until
        fewer are left, then anew, by `seed` and the number of the step alone. The target is always the whole set.
    pooling : {"mean", "min", "max", "last", "all"}, default "mean"
        Over the tokens under the attention mask.
    tokens : "all", "last", "prompt", slice or callable, default "all"
        The tokens that the maps act on, and over which activations are pooled: what is fitted is what the maps meet
        when they are attached. See `SteeringMaps.attach`, which acts on the same tokens by default, since the metadata
        name them. In a prompt "last" is its last token, and "generated" is none and refused. ``pooling="last"`` takes
        the last one of the selected tokens. Outputs without tokens, such as images, allow "all" only.
    l1, group : float, default 0.0
        Penalties: ``l1 * (||w - 1||_1 + ||b||_1) + group * sqrt(d) * (||w - 1||_2 + ||b||_2)`` for each module of d
        neurons.
    l1_bias, group_bias : float, optional
        The penalties of the shifts b, where they are to differ from those of the slopes w.
    scaling : {"layer-mean", "paper", "reference"}, default "layer-mean"
        With D_l the sum over the neurons of module l of squared W2: the mean of D_l over modules, their sum
        (eq. 4 of the paper), or the mean of D_l min(n, m) / d, which is what the published code minimises and what
        its rates and penalties fit.
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
        With `held_out`: stop after so many steps without a lower held-out loss; None takes all steps.
    checkpoint : path, optional
        File to keep the fit in: written before the first step and after every one, as a whole or not at all. It must
        not exist yet.
    resume : path, optional
        Go on with the fit of this checkpoint, whatever ended it, to the same bits as if nothing had (on the same
        machine, with as many threads). All other arguments must be those of then; only `patience` and, at automatic
        rates without mini-batches, `steps` may differ. It is also written to, unless `checkpoint` names another file.
    seed : int, default 0
        Of torch's random numbers during the fit, for models that draw any, and of the mini-batches. The state is
        restored afterwards.
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    FitResult
        ``maps`` (`SteeringMaps`: the best ones by held-out loss, without `held_out` those after the last step) and
        ``history`` (arrays "loss" [S] before each step, "layer_loss" [S, L], "held_out_loss", "lr", "penalty",
        "support", "kept"), ``passes`` and ``held_out_passes``, what it cost. Ctrl-C and a loss that is not finite end
        the fit early and keep the best maps so far.

    Raises
    ------
    TypeError
        If an argument is of a wrong type.
    OSError
        If a checkpoint cannot be read or written, FileExistsError if it is there already; what is on disk stays.
    ValueError
        If `resume` is no checkpoint, damaged or of another fit, a setting is out of range, no module matches, a set has
        fewer than 2 prompts, or a map could not influence any loss; the message names the argument or the module.
    """
    from .models.train import fit_end_to_end

    return fit_end_to_end(
        model,
        source,
        target,
        layers=layers,
        loss_layers=loss_layers,
        init=init,
        tokenizer=tokenizer,
        max_length=max_length,
        forward=forward,
        held_out=held_out,
        strengths=strengths,
        batch_size=batch_size,
        mini_batch=mini_batch,
        pooling=pooling,
        tokens=tokens,
        l1=l1,
        group=group,
        l1_bias=l1_bias,
        group_bias=group_bias,
        scaling=scaling,
        optimizer=optimizer,
        lr=lr,
        betas=betas,
        steps=steps,
        patience=patience,
        checkpoint=checkpoint,
        resume=resume,
        seed=seed,
        progress=progress,
    )


def fit_jointly(
    model: Any,
    tasks: Mapping[str, tuple[Any, Any]],
    *,
    layers: str | list[str] | re.Pattern[str],
    loss_layers: str | list[str] | re.Pattern[str] | None = None,
    init: SteeringMaps | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    held_out: Mapping[str, tuple[Any, Any]] | None = None,
    strengths: Sequence[float] = (1.0,),
    batch_size: int | None = None,
    mini_batch: int | None = None,
    pooling: str = "mean",
    tokens: str | slice | Callable[[Tokens], Any] = "all",
    l1: float = 0.0,
    group: float = 0.0,
    l1_bias: float | None = None,
    group_bias: float | None = None,
    scaling: str = "layer-mean",
    optimizer: str = "sgd",
    lr: float | str = "auto",
    betas: tuple[float, float] = (0.9, 0.999),
    steps: int = 20,
    patience: int | None = 5,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Fit one set of maps for several concepts at once: as `fit_end_to_end`, of the mean of the tasks' losses.

    Maps that were fitted one by one can be composed (``second @ first``), but each was fitted to a model without the
    others. Here one set of maps is to serve all tasks: the source of each comes to be distributed like its target. See
    docs/two-concepts.md for what each is better at.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    tasks : dict of str to (source, target)
        At least two, each with the prompts to move and those to move them to, as in `fit_end_to_end`. All count alike,
        whatever the number of their prompts.
    held_out : dict of str to (source, target), optional
        Two more sets for each task. The mean of their losses is recorded and chooses the best maps.
    strengths : list of float, default (1.0,)
        As in `fit_end_to_end`, by the mean of the held-out losses.
    batch_size : int, optional
        As in `fit_end_to_end`; tasks take forward passes of their own in any case.
    mini_batch : int, optional
        Prompts of the source of each task in a step.
    steps : int, default 20
        The largest number of steps, each of which costs the gradient of every task.
    layers, loss_layers, init, tokenizer, max_length, forward, pooling, tokens, l1, group, l1_bias, group_bias, scaling
        As in `fit_end_to_end`.
    optimizer, lr, betas, patience, checkpoint, resume, seed, progress
        As in `fit_end_to_end`. A fit goes on with the same tasks in the same order.

    Returns
    -------
    FitResult
        As of `fit_end_to_end`. In ``history`` "loss" and "held_out_loss" are the means over the T tasks, "layer_loss"
        is [S, T, L], and "task_loss" and "held_out_task_loss" are [S, T]; ``held_out_task_loss`` are the losses of
        ``maps`` by task. The metadata of the maps name the tasks.

    Raises
    ------
    TypeError, OSError
        As `fit_end_to_end`; TypeError as well if `tasks` or `held_out` does not map names to pairs.
    ValueError
        As `fit_end_to_end`; and if there are fewer than two tasks, one is no pair, or `held_out` has others. The
        message names the task.
    """
    from .models.joint import fit_jointly

    return fit_jointly(
        model,
        tasks,
        layers=layers,
        loss_layers=loss_layers,
        init=init,
        tokenizer=tokenizer,
        max_length=max_length,
        forward=forward,
        held_out=held_out,
        strengths=strengths,
        batch_size=batch_size,
        mini_batch=mini_batch,
        pooling=pooling,
        tokens=tokens,
        l1=l1,
        group=group,
        l1_bias=l1_bias,
        group_bias=group_bias,
        scaling=scaling,
        optimizer=optimizer,
        lr=lr,
        betas=betas,
        steps=steps,
        patience=patience,
        checkpoint=checkpoint,
        resume=resume,
        seed=seed,
        progress=progress,
    )


def fit_incremental(
    model: Any,
    source: Any,
    target: Any,
    *,
    layers: str | list[str] | re.Pattern[str],
    method: str = "linear",
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    pooling: str = "mean",
    tokens: str | slice | Callable[[Tokens], Any] = "all",
    progress: bool = True,
) -> SteeringMaps:
    """Fit closed-form maps module by module in execution order, each with the earlier maps on (AcT, arXiv 2410.23054).

    One forward pass of the source prompts where they are one batch, otherwise one a module. The target activations
    are taken without maps.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    source, target : list[str], batch or list of batches
        As in `fit_end_to_end`.
    layers : str, list[str] or re.Pattern
        Modules that get a map.
    method : {"mean", "gaussian", "linear"}, default "linear"
        As in `fit`.
    tokenizer, max_length, forward
        As in `collect`.
    batch_size : int, optional
        Texts in a forward pass; default: all of a set, so that one pass of the source fits every module.
    pooling : {"mean", "min", "max", "last", "all"}, default "mean"
        Over the tokens under the attention mask.
    tokens : "all", "last", "prompt", slice or callable, default "all"
        The tokens that the maps act on, and over which activations are pooled: what is fitted is what the maps meet
        when they are attached. See `SteeringMaps.attach`, which acts on the same tokens by default, since the metadata
        name them. In a prompt "last" is its last token, and "generated" is none and refused. ``pooling="last"`` takes
        the last one of the selected tokens. Outputs without tokens, such as images, allow "all" only.
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    SteeringMaps
        In execution order.

    Raises
    ------
    TypeError, ValueError
        As `fit` and `collect`.
    """
    from .models.incremental import fit_incremental

    return fit_incremental(
        model,
        source,
        target,
        layers=layers,
        method=method,
        tokenizer=tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        forward=forward,
        pooling=pooling,
        tokens=tokens,
        progress=progress,
    )


def sparse_path_end_to_end(
    model: Any,
    source: Any,
    target: Any,
    *,
    layers: str | list[str] | re.Pattern[str],
    loss_layers: str | list[str] | re.Pattern[str] | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    held_out: tuple[Any, Any] | None = None,
    batch_size: int | None = None,
    pooling: str = "mean",
    tokens: str | slice | Callable[[Tokens], Any] = "all",
    penalties: Sequence[float] | NDArray | None = None,
    n_penalties: int | None = None,
    min_ratio: float = 1e-3,
    l1_ratio: float = 1.0,
    steps: int = 2,
    refit_steps: int = 0,
    refit_support: float = 0.5,
    scaling: str = "layer-mean",
    lr: float | str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> EndToEndPath:
    """Fit the maps of all modules for falling penalties, from the identity to dense maps, in one walk.

    Every penalty is a fit as by `fit_end_to_end`, of few steps, since it starts where the one before ended. Rates
    follow the curvature, and a step that makes loss and penalty together larger is taken back (SpaRSA, Wright, Nowak
    and Figueiredo 2009). With `refit_steps` each point is then fitted without a penalty on the neurons of its support:
    a penalty that picks few neurons holds them near the identity as well. The next point starts from the penalised
    maps.

    Parameters
    ----------
    model, source, target, layers, loss_layers, tokenizer, max_length, forward, batch_size, pooling, tokens, scaling,
    seed
        As in `fit_end_to_end`.
    held_out : (source, target), optional
        Two more sets, whose loss is recorded for every point, before and after its refit. ``path.at(best=True)`` goes
        by it, and a refit that makes it larger is not kept (without them, one that makes the fitted loss larger).
    penalties : sequence of float, optional
        Falling and above 0. A penalty p stands for ``l1 = p * l1_ratio`` and ``group = p * (1 - l1_ratio)``, of slopes
        and shifts alike.
    n_penalties : int, optional
        In place of `penalties`: how many, at least 2, in equal ratios from the smallest one that leaves every map the
        identity, which the gradient there tells, down to ``min_ratio`` times it.
    min_ratio : float, default 1e-3
        The last of the chosen penalties divided by the first.
    l1_ratio : float, default 1.0
        1 changes single neurons wherever they are, 0 whole modules only.
    steps : int, default 2
        Steps at each penalty. A step costs a forward and a backward pass.
    refit_steps : int, default 0
        Steps of each refit; 0 for none.
    refit_support : float, default 0.5
        Points at which more than this share of the neurons is changed are not refitted: theirs is a small penalty.
    lr : "auto" or float, default "auto"
        The rate of the first step; "auto" goes to where a linear loss would reach 0. Later ones stay between a tenth
        and a hundred times it.
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    EndToEndPath
        A `SparsePath` with ``penalized_loss``, ``penalized_held_out_loss`` (before the refits), ``refitted``,
        ``history`` (one entry a step), ``passes`` (what it cost) and ``stopped``. Ctrl-C and a value that is not finite
        end the path early and keep the points found.

    Raises
    ------
    TypeError
        If an argument is of a wrong type, or not exactly one of `penalties` and `n_penalties` is given.
    ValueError
        As `fit_end_to_end`; and if the penalties are not falling, or a value is not finite before a point is found.
    """
    from .models.path import sparse_path_end_to_end

    return sparse_path_end_to_end(
        model,
        source,
        target,
        layers=layers,
        loss_layers=loss_layers,
        tokenizer=tokenizer,
        max_length=max_length,
        forward=forward,
        held_out=held_out,
        batch_size=batch_size,
        pooling=pooling,
        tokens=tokens,
        penalties=penalties,
        n_penalties=n_penalties,
        min_ratio=min_ratio,
        l1_ratio=l1_ratio,
        steps=steps,
        refit_steps=refit_steps,
        refit_support=refit_support,
        scaling=scaling,
        lr=lr,
        seed=seed,
        progress=progress,
    )
