"""Prompt tuning through PEFT: learned embeddings in front of every row."""

import torch
from peft import PeftConfig, PeftModel, PromptTuningConfig
from torch import nn
from transformers import PreTrainedModel

from peft_dist.config.method import Prompt
from peft_dist.methods.method import TASKS, BaseAccess
from peft_dist.methods.virtual import VirtualMethod
from peft_dist.model.architectures import bare_model


class PromptMethod(VirtualMethod[Prompt]):
    """One learned embedding per virtual token, [virtual tokens, embedding width]."""

    def __init__(self, settings: Prompt, *, seed: int = 0) -> None:
        """Take the recipe's method section and the run's seed."""
        super().__init__(settings, seed=seed)
        self.virtual_tokens = settings.virtual_tokens

    def _config(self, model: PreTrainedModel, task: str) -> PeftConfig:
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding), type(embedding)
        return PromptTuningConfig(
            task_type=TASKS[task],
            num_virtual_tokens=self.settings.virtual_tokens,
            # Some models embed narrower than they compute.
            token_dim=embedding.embedding_dim,
        )

    def _read(self, peft: PeftModel, start: BaseAccess, tokens: list[int]) -> torch.Tensor:
        """Return the embeddings as the blocks get them: some models scale what they look up."""
        seen: list[torch.Tensor] = []
        embedding = bare_model(peft).get_input_embeddings()
        hook = embedding.register_forward_hook(lambda _module, _args, output: seen.append(output))
        start.read(tokens)
        hook.remove()
        return seen[0][0].float()
