"""What prompt and prefix tuning share: PEFT's prompt encoder, and the tokens it starts from."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TypeVar

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from peft_dist.common.errors import RecipeError
from peft_dist.config.method import Prefix, Prompt
from peft_dist.distributed.collectives import first_of_all
from peft_dist.methods.init import assign, generator_for
from peft_dist.methods.method import BaseAccess, Method, inject, saved_names
from peft_dist.model.architectures import bare_model

Settings = TypeVar("Settings", bound=Prefix | Prompt)
SAVED = "prompt_embeddings"
"""The one name PEFT's file has for what an encoder gives."""
_ENCODER = "prompt_encoder.default."


class VirtualMethod(Method[Settings]):
    """Learned tokens. PEFT holds and saves them; our own forward puts them in their places."""

    def __init__(self, settings: Settings, *, seed: int = 0) -> None:
        """Take the recipe's method section and the run's seed."""
        super().__init__(settings, seed=seed)
        self.learned_positions = settings.virtual_tokens

    def attach(
        self, model: PreTrainedModel, *, task: str, base_name: str, has_conv1d: bool
    ) -> PeftModel:
        """CopyInto an encoder beside the model; see `Method.attach`."""
        # Imported here, as where the model is built: accelerate takes a second to import.
        from accelerate import init_empty_weights

        count, max_positions = self.settings.virtual_tokens, model.config.max_position_embeddings
        if count >= max_positions:
            raise RecipeError(
                f"{count} leave no place for a row in a model of {max_positions} positions",
                where="method.virtual_tokens",
                remedy=f"set it well below {max_positions}",
            )
        with init_empty_weights(include_buffers=False):
            peft = inject(model, self._config(model, task), base_name=base_name)
        # PEFT names the embedding a second time for its own forward.
        peft.word_embeddings = None
        return peft

    @abstractmethod
    def _config(self, model: PreTrainedModel, task: str) -> PeftConfig:
        """Return PEFT's configuration."""

    def initialise(self, peft: PeftModel, start: BaseAccess) -> None:
        """Fill the encoder with noise, or with what the model makes of words. Collective."""
        parameter = peft.prompt_encoder["default"].get_parameter("embedding.weight")
        if self.settings.init == "random":
            noise = torch.randn(parameter.shape, generator=generator_for(self.seed, _ENCODER))
            assign(parameter, 0.02 * noise)
        else:
            values = self._read(peft, start, self._start_tokens(peft, start))
            assign(parameter, first_of_all(values))

    @abstractmethod
    def _read(self, peft: PeftModel, start: BaseAccess, tokens: list[int]) -> torch.Tensor:
        """Return what stands for the tokens, [virtual tokens, width]. Collective."""

    def _start_tokens(self, peft: PeftModel, start: BaseAccess) -> list[int]:
        """Return the token ids to start from, one for each virtual token."""
        count = self.settings.virtual_tokens
        if self.settings.text is None:
            generator = generator_for(self.seed, "virtual tokens")
            size = bare_model(peft).config.vocab_size
            return torch.randint(size, (count,), generator=generator).tolist()
        tokens = start.tokenize(self.settings.text)
        if not tokens:
            raise RecipeError(
                f"{self.settings.text!r} has no token", where="method.text", remedy="add words"
            )
        return (tokens * count)[:count]

    def saved(self, peft: PeftModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what the encoder gives, and a trained head; see `Method.saved`."""
        encoder = {
            name.removeprefix(_ENCODER): tensor
            for name, tensor in state.items()
            if name.startswith(_ENCODER)
        }
        heads = _without_encoder(state)
        return {SAVED: self._given(peft, encoder)} | {
            saved: heads[name] for saved, name in saved_names(peft, heads).items()
        }

    def _given(self, peft: PeftModel, encoder: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what an encoder of these tensors gives, [virtual tokens, width]."""
        return encoder["embedding.weight"]

    def restored(
        self, peft: PeftModel, found: Mapping[str, torch.Tensor], names: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the encoder's tensors and a trained head; see `Method.restored`."""
        heads = saved_names(peft, _without_encoder(names))
        return {f"{_ENCODER}embedding.weight": found[SAVED]} | {
            name: found[saved] for saved, name in heads.items()
        }


def _without_encoder(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_ENCODER)}
