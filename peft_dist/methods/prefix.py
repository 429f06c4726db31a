"""Prefix tuning through PEFT: learned keys and values in front of every layer's own."""

import copy
from collections.abc import Mapping

import torch
from peft import PeftConfig, PeftModel, PrefixEncoder, PrefixTuningConfig
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from peft_dist.common.errors import RunDirError
from peft_dist.config.method import Prefix
from peft_dist.methods.init import assign, generator_for
from peft_dist.methods.method import TASKS, BaseAccess
from peft_dist.methods.virtual import VirtualMethod
from peft_dist.model.attention import recording


class PrefixMethod(VirtualMethod[Prefix]):
    """Keys and values of every layer per virtual token, or a network that makes them.

    [virtual tokens, layers * 2 * key-value heads * head size], as PEFT lays them out.
    """

    own_attention = True

    @classmethod
    def of_saved(cls, settings: Prefix) -> Prefix:
        """Return the settings without a network, of which only the result is saved."""
        return settings.model_copy(update={"projection": False, "projection_size": None})

    def _config(self, model: PreTrainedModel, task: str) -> PeftConfig:
        settings = self.settings
        return PrefixTuningConfig(
            task_type=TASKS[task],
            num_virtual_tokens=settings.virtual_tokens,
            prefix_projection=settings.projection,
            encoder_hidden_size=settings.projection_size or model.config.hidden_size,
        )

    def initialise(self, peft: PeftModel, start: BaseAccess) -> None:
        """Fill keys and values; a network as torch starts one, seeded by name. Collective."""
        if not self.settings.projection:
            super().initialise(peft, start)
            return
        for name, module in peft.prompt_encoder.named_modules():
            if not isinstance(module, nn.Embedding | nn.Linear):
                continue
            generator = generator_for(self.seed, name)
            weight = torch.empty(module.weight.shape)
            if isinstance(module, nn.Embedding):
                assign(module.get_parameter("weight"), weight.normal_(generator=generator))
                continue
            bound = module.in_features**-0.5
            weight.uniform_(-bound, bound, generator=generator)
            assign(module.get_parameter("weight"), weight)
            bias = torch.empty(module.out_features)
            assign(module.bias, bias.uniform_(-bound, bound, generator=generator))

    def _read(self, peft: PeftModel, start: BaseAccess, tokens: list[int]) -> torch.Tensor:
        """Return the keys and values which the bare model makes of the tokens."""
        with recording() as layers, peft.disable_adapter():
            start.read(tokens)
        stacked = torch.stack([layers[index] for index in sorted(layers)])
        return stacked.permute(3, 0, 1, 2, 4).flatten(1).float()

    def _given(self, peft: PeftModel, encoder: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the keys and values that a network gives, or those trained themselves."""
        if not self.settings.projection:
            return super()._given(peft, encoder)
        # Not the model's own network: DeepSpeed has put hooks on it that know its parameters.
        with torch.device("meta"):
            network = PrefixEncoder(super().saved_config(peft))
        with torch.no_grad():
            positions = torch.arange(self.settings.virtual_tokens)
            given: torch.Tensor = functional_call(network, dict(encoder), (positions,))
        return given

    def restored(
        self, peft: PeftModel, found: Mapping[str, torch.Tensor], names: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the prefix and a trained head; see `Method.restored`."""
        if self.settings.projection:
            raise RunDirError(
                "the network that made the saved prefix is not saved",
                where="method.projection",
                remedy="load it with method.projection=false",
            )
        return super().restored(peft, found, names)

    def saved_config(self, peft: PeftModel) -> PeftConfig:
        """Return the configuration of a plain prefix, which is what the file holds."""
        config = copy.copy(super().saved_config(peft))
        assert isinstance(config, PrefixTuningConfig)
        config.prefix_projection = False
        return config
