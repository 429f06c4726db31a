"""What an adapter family does for a session: where its tensors go, how they start, how they save.

An adapter is injected on `meta`, before the base is sharded: adapters added later would never be
reduced over processes.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from peft_dist.common.errors import TrainingError
from peft_dist.data.pack import Batch

Settings = TypeVar("Settings")
TASKS = {
    "causal-lm": TaskType.CAUSAL_LM,
    "sequence-classification": TaskType.SEQ_CLS,
    "reward": TaskType.SEQ_CLS,
}


class RowPasses(Protocol):
    """Runs the model over training rows, one at a time; hooks see what passes."""

    def __call__(self, count: int, begin: Callable[[Batch], None], *, gradients: bool) -> None:
        """Take the first `count` rows of training's own order, each on one process. Collective.

        Args:
            count: Rows, or pairs of them.
            begin: Is given each row before the model is.
            gradients: Go back from each row's mean loss too; no gradient is left behind.
        """


@dataclass(frozen=True)
class BaseAccess:
    """What a method may use to fill its tensors, once the base is loaded.

    Attributes:
        full_tensor: Returns a parameter of the base whole, whatever shards it. Collective.
        tokenize: Returns the token ids of a text, without special tokens.
        copy_into: Writes a whole tensor into a parameter of the base. Collective.
        release: Fills parameters of the base again, as the model's files have them. Collective.
        read: Runs the model, without gradients and without adapters of its own, over one row of
            token ids. Collective; hooks see what passes.
        stored_weight: Returns a quantized linear's weight [out, in], float32, as the model's files
            have it, given its name in the bare model. Collective.
        over_rows: Runs the model over training rows. None where there are none: what starts is then
            replaced by what was saved.
    """

    full_tensor: Callable[[nn.Parameter], torch.Tensor]
    copy_into: Callable[[nn.Parameter, torch.Tensor], None]
    release: Callable[[Collection[nn.Parameter]], None]
    tokenize: Callable[[str], list[int]]
    read: Callable[[list[int]], None]
    stored_weight: Callable[[str], torch.Tensor]
    over_rows: RowPasses | None


class Method(ABC, Generic[Settings]):
    """One adapter family with its settings."""

    virtual_tokens = 0
    """Learned embeddings in front of every row."""
    learned_positions = 0
    """Positions of every row that learned embeddings, keys or values take."""
    own_attention = False
    """Whether it works through `model.attention` alone."""
    changes_base = False
    """Whether it starts by moving a part of the base into the adapter."""

    def __init__(self, settings: Settings, *, seed: int = 0) -> None:
        """Take the recipe's method section and the run's seed."""
        self.settings, self.seed = settings, seed
        self._saved_names: dict[str, str] = {}

    @classmethod
    def of_saved(cls, settings: Settings) -> Settings:
        """Return the settings under which an adapter saved with these is loaded again."""
        return settings

    @abstractmethod
    def attach(
        self, model: PreTrainedModel, *, task: str, base_name: str, has_conv1d: bool
    ) -> PeftModel:
        """Inject the adapter into a model on `meta`.

        Args:
            model: The base, its linears already swapped for 4-bit ones where the recipe says so.
            task: The recipe's task.
            base_name: What the saved adapter names as its base.
            has_conv1d: Whether the base as released has Conv1D linears, whose weights are
                transposed.

        Raises:
            RecipeError: For a setting that this model cannot follow.
        """

    @abstractmethod
    def initialise(self, peft: PeftModel, start: BaseAccess) -> None:
        """Fill every tensor of the adapter, alike on every process. Collective."""

    def rate_factor(self, name: str) -> float:
        """Return the learning rate of a trained tensor over the recipe's."""
        return 1.0

    def saved(self, peft: PeftModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what the adapter file holds, by the names PEFT reads, given the trained tensors.

        Raises:
            TrainingError: Where PEFT's format would lose one.
        """
        if set(self._saved_names.values()) != state.keys():  # PEFT searches the whole model
            self._saved_names = saved_names(peft, state)
        return {saved: state[name] for saved, name in self._saved_names.items()}

    def restored(
        self, peft: PeftModel, found: Mapping[str, torch.Tensor], names: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the trained tensors, by their names in the model, given what `saved` returned.

        A base that the method has changed becomes what it was for these. Collective.

        Args:
            peft: The model.
            found: The adapter file's tensors.
            names: The model's trained tensors, of which only names and shapes count.
        """
        return {name: found[saved] for saved, name in saved_names(peft, names).items()}

    def saved_config(self, peft: PeftModel) -> PeftConfig:
        """Return the configuration that stands beside the saved tensors."""
        return peft.peft_config[peft.active_adapter]


def inject(model: PreTrainedModel, config: PeftConfig, *, base_name: str) -> PeftModel:
    """Add a PEFT adapter on `meta`; what it trains becomes float32, whatever the base computes in.

    PEFT freezes everything else.
    """
    peft = get_peft_model(model, config, low_cpu_mem_usage=True)
    # PEFT has put the folder the model was built from there, which for a hub id is a cache.
    config.base_model_name_or_path = base_name
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            assert parameter.is_meta, f"{name} was made before its base was sharded"
    return peft


def saved_names(peft: PeftModel, state: Mapping[str, Any]) -> dict[str, str]:
    """Return the name each trained tensor has in the model, by its name in PEFT's file.

    One that the model ties has several in the file, as PEFT writes it.

    Raises:
        TrainingError: Where PEFT's format would lose one.
    """
    # PEFT's own function decides; our tensors are recognised again by identity.
    own = {id(parameter): name for name, parameter in peft.named_parameters() if name in state}
    everything = peft.named_parameters(remove_duplicate=False)
    first_name = {name: own[id(one)] for name, one in everything if id(one) in own}
    stand_ins = {name: torch.empty(0) for name in {**state, **first_name}}
    name_of = {id(tensor): name for name, tensor in stand_ins.items()}
    kept = get_peft_model_state_dict(peft, state_dict=stand_ins, save_embedding_layers=False)
    saved_as = {name_of[id(one)]: saved for saved, one in kept.items() if id(one) in name_of}
    names = {saved: first_name.get(name, name) for name, saved in saved_as.items()}
    lost = [name for name in state if name not in names.values()]
    if lost:
        raise TrainingError(
            f"{lost[0]} is trained, but PEFT would not save it",
            where="method",
            remedy="please report this",
        )
    return names


def base_name_in(peft: PeftModel, name: str) -> str:
    """Return the name a parameter has in the bare model, given its name in the PEFT model.

    A trained copy of a part of the base has the name of the part. Adapters of several parameters of
    one module lie inside each other, and keep what tells them apart.
    """
    name = re.sub(r"base_layer\.(?!(base_layer\.)*lora_)", "", name)
    for inserted in (
        "token_adapter.",
        "original_module.",
        "modules_to_save.default.",
        "ln_tuning_layers.default.",
    ):
        name = name.replace(inserted, "")
    # Prompt learning wraps the model once, tuners twice.
    wrapper = "base_model." if peft.active_peft_config.is_prompt_learning else "base_model.model."
    return name.removeprefix(wrapper)
