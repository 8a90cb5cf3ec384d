"""What SteeringMaps do once they are fitted: into weights, into an adapter, into a folder or onto the hub.

The methods are here for their descriptions; what they do is in `lineas.models.fold`, `lineas.models.lora` and
`lineas.hub`, which are imported when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

    from .maps import SteeringMaps


class Serving:
    """The methods of `SteeringMaps` that hand maps on to others."""

    __slots__ = ()

    def fold(
        self,
        model: Any,
        strength: float = 1.0,
        *,
        inplace: bool = False,
        consumers: Mapping[str, Sequence[str]] | None = None,
        convert: bool = False,
        check: Any = None,
        tokenizer: Any = None,
        forward: Callable[[Any, Any], Any] | None = None,
    ) -> Any:
        """Put the maps into the weights of a model, for good: it then runs, saves and loads without lineas.

        A map goes into the gain and the bias of the module whose output it changes: LayerNorm, GroupNorm, BatchNorm,
        RMSNorm (also Gemma's, whose gain is 1 + weight), Linear, convolutions, and the adaptive norms of diffusers.
        The shift after a norm without a bias goes into the biases of the Linears that read its output, as W @ bias.
        For Llama and other families whose configuration has ``attention_bias`` or ``mlp_bias`` these settings are
        switched on, so that the folded model survives ``save_pretrained`` and ``from_pretrained``. Everything is
        computed in float64 and rounded once.

        Parameters
        ----------
        model : torch.nn.Module
            A loaded model with modules of these names, and no maps attached.
        strength : float, default 1.0
            The strength for good; 1 is the maps.
        inplace : bool, default False
            Change `model` itself and return it; otherwise a deep copy is changed.
        consumers : dict[str, list[str]], optional
            For models of one's own: by name of a norm, the names of all Linears that read its output, where nothing
            else reads it. A wrong list gives a wrong model: use `check`.
        convert : bool, default False
            Make a LlamaForCausalLM of a Mistral or Qwen2 model, which have no place for biases in their MLP.
        check : list[str], batch or list of batches, optional
            Data to compare with: the model with the maps attached and the folded one must give the same up to the
            rounding of the model's dtype, otherwise nothing is changed. Most exact on a float32 model.
        tokenizer : transformers tokenizer, optional
            Where `check` is texts.
        forward : callable, optional
            ``forward(model, batch)`` calls the model for `check` where ``model(**batch)`` or ``model(batch)`` do not
            fit.

        Returns
        -------
        torch.nn.Module
            The folded copy, or `model`.

        Raises
        ------
        TypeError
            If an argument is of a wrong type.
        ValueError
            If maps cannot be folded exactly. All of them are named with the reason, before anything is changed: a
            shift that no bias on disk could hold, weights that are quantised, offloaded or tied to others, modules
            without a gain. Also if maps are attached to the model, these maps are for some tokens only, a module is
            missing or has another width, or `check` finds a difference.
        """
        from .models.fold import fold

        maps: Any = self  # mixed into SteeringMaps
        return fold(
            maps,
            model,
            strength,
            inplace=inplace,
            consumers=consumers,
            convert=convert,
            check=check,
            tokenizer=tokenizer,
            forward=forward,
        )

    def to_peft_lora(
        self,
        model: Any,
        folder: str | PathLike[str],
        strength: float = 1.0,
        *,
        rank: int | None = None,
        bias: bool | None = None,
        consumers: Mapping[str, Sequence[str]] | None = None,
    ) -> Path:
        """Write the maps as a LoRA adapter of PEFT, which does the same to the model without lineas.

        For maps of norms whose output only Linears read: each of these Linears gets an adapter of rank = the number
        of neurons with a weight other than 1, so that sparse maps make small adapters, and a bias for the shifts. The
        scale of the adapter (``lora_alpha / r``) is the strength.

        Readers other than PEFT differ: vLLM has no LoRA biases any more, and PEFT itself cannot merge an adapter
        with biases into Linears that have none.

        Parameters
        ----------
        model : torch.nn.Module
            The model that the adapter is for; it is not changed.
        folder : str or PathLike
            Where ``adapter_config.json`` and ``adapter_model.safetensors`` go. It is made where it is missing; the
            two files are replaced.
        strength : float, default 1.0
            The strength at which the adapter is loaded.
        rank : int, optional
            The rank of every Linear's adapter, if more than needed: some readers take certain ranks only. Default:
            the largest that a map needs.
        bias : bool, optional
            False: refuse maps that need biases. Default: biases where a shift is not 0.
        consumers : dict[str, list[str]], optional
            As in `fold`.

        Returns
        -------
        pathlib.Path
            The folder.

        Raises
        ------
        ImportError
            If PEFT is not installed (``pip install "lineas[peft]"``).
        TypeError
            If an argument is of a wrong type.
        ValueError
            If a map is not of such a norm or a Linear's weights cannot be read (all are named with the reason), the
            maps need biases or a higher rank than was given, change nothing, or as `fold`. Nothing is written then.
        OSError
            If the files cannot be written.
        """
        from .models.lora import to_peft_lora

        maps: Any = self
        return to_peft_lora(maps, model, folder, strength, rank=rank, bias=bias, consumers=consumers)

    def save_pretrained(self, folder: str | PathLike[str]) -> Path:
        """Write the maps and a card that describes them into a folder, as a repository of the hub has them.

        Parameters
        ----------
        folder : str or PathLike
            Made where it is missing. ``maps.safetensors`` and ``README.md`` in it are replaced.

        Returns
        -------
        pathlib.Path
            The folder.

        Raises
        ------
        ImportError
            If huggingface_hub, which writes the card's metadata, is not installed (``pip install "lineas[hub]"``).
        OSError
            If the files cannot be written.
        """
        from .hub import save_pretrained

        maps: Any = self
        return save_pretrained(maps, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Add steering maps",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the maps and a card to the Hugging Face Hub, into a new or an existing model repository.

        The metadata go along as they are, the base model's name or folder among them. A card that is there already
        stays.

        Parameters
        ----------
        repo_id : str
            ``"user/name"``.
        commit_message : str, default "Add steering maps"
        private : bool, optional
            Whether a new repository is private. Default: as the hub does it.
        token : str or bool, optional
            Default: that of ``hf auth login``.
        revision : str, optional
            The branch. Default: the main one.
        create_pr : bool, default False
            Open a pull request instead.

        Returns
        -------
        str
            The address of the commit or pull request.

        Raises
        ------
        ImportError
            If huggingface_hub is not installed (``pip install "lineas[hub]"``).
        TypeError, ValueError
            If `repo_id` is no id of a repository.
        ConnectionError
            If huggingface_hub is in offline mode.
        huggingface_hub.errors.HfHubHTTPError
            If the hub refuses.
        """
        from .hub import push_to_hub

        maps: Any = self  # mixed into SteeringMaps
        return push_to_hub(
            maps,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> SteeringMaps:
        """Read maps from a folder that `save_pretrained` wrote, or from the Hugging Face Hub.

        Parameters
        ----------
        name : str or PathLike
            A folder, or else ``"user/name"`` on the hub.
        revision : str, optional
            A branch, tag or commit of the repository. Default: its main branch.
        token : str or bool, optional
            Default: that of ``hf auth login``.
        cache_dir : str or PathLike, optional
            Where files of the hub are kept. Default: huggingface_hub's cache.
        local_files_only : bool, default False
            Use the cache only.

        Returns
        -------
        SteeringMaps
            As they were saved. The file is checked as by `lineas.load`; nothing in it is ever run.

        Raises
        ------
        ImportError
            If it is no folder and huggingface_hub is not installed (``pip install "lineas[hub]"``).
        FileNotFoundError
            If there is no such folder, repository or revision, or no maps in it.
        ConnectionError
            If the hub cannot be reached and the cache does not have the maps.
        ValueError
            If the file is not one of lineas maps; see `lineas.load`.
        """
        from .hub import from_pretrained

        return from_pretrained(
            name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
