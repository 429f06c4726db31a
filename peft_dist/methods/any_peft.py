"""Any other method of the peft library, by its own configuration class and its own start.

PEFT makes such an adapter's tensors when it injects them, beside weights of the base that our
`meta` model does not have. So they are injected beside stand-ins of the right shape without memory,
and what PEFT made is kept until the model is sharded.
"""

import copy
from collections.abc import Collection, Mapping
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import PreTrainedModel

from peft_dist.common.errors import RecipeError, nearest
from peft_dist.config.method import AnyPeft
from peft_dist.methods.init import assign, generator_for
from peft_dist.methods.method import TASKS, BaseAccess, Method, base_name_in, saved_names
from peft_dist.model.nf4 import FrozenLinear4bit

OWN = {
    "LORA": "lora",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "BOTTLENECK": "bottleneck",
    "BITFIT": "bitfit",
    "TRAINABLE_TOKENS": "lora, with trainable_tokens",
}
"""Types that have a recipe section of their own."""
LOOPS_OF_THEIR_OWN = ("ADALORA", "POLY", "XLORA")
"""Types that want to be told of every step, or which task or expert a row belongs to."""
_RESERVED = ("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision")


class AnyPeftMethod(Method[AnyPeft]):
    """A passed-through PEFT method."""

    def attach(
        self, model: PreTrainedModel, *, task: str, base_name: str, has_conv1d: bool
    ) -> PeftModel:
        """Inject the adapter; see `Method.attach`."""
        config = self._config(task)
        in_base = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        in_base |= {
            f"{name}.weight" for name, m in model.named_modules() if isinstance(m, FrozenLinear4bit)
        }
        # What differs beside other weights was computed from them, which nobody holds whole.
        other = _added(self._injected(copy.deepcopy(model), config, fill=1.0)[0], in_base)
        again = copy.deepcopy(model)
        drawn = _added(self._injected(again, config, fill=0.0, seed=self.seed + 1)[0], in_base)
        peft, restore = self._injected(model, config, fill=0.0)
        self._made = _values(peft)
        for name, value in _added(peft, in_base).items():
            if not torch.equal(value, other[name]):
                raise self._refusal(f"starts {name} from the weights of the base")
            if name not in self._made and not torch.equal(value, drawn[name]):
                raise self._refusal(f"draws {name} by chance, and its file does not hold that")
        restore()
        for name, value in self._made.items():
            parent, _, attribute = name.rpartition(".")
            empty = torch.empty_like(value, device="meta")
            peft.get_submodule(parent).register_parameter(attribute, nn.Parameter(empty))
        peft.peft_config["default"].base_model_name_or_path = base_name
        try:
            saved_names(peft, self._made)
        except Exception as error:  # every method has its own way to miss a tensor
            raise self._refusal(f"cannot be saved by what it trains ({error})") from None
        self._check_config_reloads(peft.peft_config["default"])
        return peft

    def _check_config_reloads(self, config: PeftConfig) -> None:
        """See that PEFT takes from a file what it has itself filled in meanwhile."""
        try:
            with TemporaryDirectory(prefix="peft-dist-") as folder:
                config.save_pretrained(folder)
                PeftConfig.from_pretrained(folder)
        except OSError:
            raise  # of the disk
        except Exception as error:  # each class has its own ways to refuse
            raise self._refusal(f"cannot be loaded again with these settings ({error})") from None

    def initialise(self, peft: PeftModel, start: BaseAccess) -> None:
        """Write what PEFT made; copies of the base's own tensors hold those already."""
        parameters = dict(peft.named_parameters())
        frozen = {base_name_in(peft, n) for n, p in parameters.items() if not p.requires_grad}
        for name, value in self._made.items():
            if base_name_in(peft, name) not in frozen:
                assign(parameters[name], value)

    def _config(self, task: str) -> PeftConfig:
        name = self.settings.type.upper()
        known = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if name in OWN:
            raise RecipeError(
                f"{name} has a section of its own",
                where="method.type",
                remedy=f"write kind: {OWN[name]}",
            )
        if name in LOOPS_OF_THEIR_OWN:
            raise self._refusal("needs a training loop of its own")
        if name not in known:
            raise RecipeError(
                f"peft has no {self.settings.type!r}",
                where="method.type",
                remedy=nearest(name, known),
            )
        options: Mapping[str, Any] = self.settings.model_extra or {}
        for key in options:
            if key in _RESERVED or key not in known[name].__dataclass_fields__:
                raise RecipeError(
                    f"{known[name].__name__} has no {key!r} to set",
                    where=f"method.{key}",
                    remedy=nearest(key, set(known[name].__dataclass_fields__) - set(_RESERVED)),
                )
        try:
            config: PeftConfig = known[name](task_type=TASKS[task], **copy.deepcopy(dict(options)))
        except Exception as error:  # each class has its own ways to refuse, such as an ImportError
            raise self._refusal(f"does not take these settings ({error})") from None
        if config.is_prompt_learning:
            raise self._refusal("puts learned tokens in front of rows in a way of its own")
        return config

    def _injected(
        self, model: PreTrainedModel, config: PeftConfig, *, fill: float, seed: int | None = None
    ) -> tuple[PeftModel, Any]:
        """Inject beside stand-ins; return the model and what puts the base back."""
        restore = _stand_in(model, fill=fill)
        source = generator_for(self.seed if seed is None else seed, self.settings.type.upper())
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(source.initial_seed())
                peft = get_peft_model(model, copy.deepcopy(config))
        except Exception as error:  # PEFT's methods refuse in their own ways
            raise self._refusal(f"cannot be put on this model ({error})") from None
        return peft, lambda: restore(peft)

    def _refusal(self, problem: str) -> RecipeError:
        line = " ".join(problem.split())
        return RecipeError(
            f"{self.settings.type} {line[:300]}",
            where="method.type",
            remedy="change its settings, or choose lora, bottleneck, prefix, prompt or bitfit",
        )


def _values(peft: PeftModel) -> dict[str, torch.Tensor]:
    """Return a float32 copy of what the adapter trains."""
    return {
        name: parameter.detach().float().clone()
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }


def _added(peft: PeftModel, in_base: Collection[str]) -> dict[str, torch.Tensor]:
    """Return what the base has not: trained, frozen or a buffer."""
    everything = [*peft.named_parameters(), *peft.named_buffers()]
    return {
        name: tensor.detach().clone()
        for name, tensor in everything
        if base_name_in(peft, name) not in in_base
    }


def _stand_in(model: nn.Module, *, fill: float) -> Any:
    """Replace 4-bit layers by plain linears, and `meta` tensors by one repeated row.

    Returns:
        A function that puts the originals back, wherever they have been moved to.
    """
    layers: dict[int, nn.Module] = {}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, FrozenLinear4bit):
                plain = nn.Linear(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    dtype=child.dtype,
                    device="meta",
                )
                plain.requires_grad_(False)
                layers[id(plain)] = child
                module._modules[name] = plain
    stand_ins: dict[int, nn.Parameter] = {}
    originals: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in stand_ins:
                    # Not the same everywhere: a method may choose the largest of the weights.
                    row = torch.linspace(fill, 2 * fill, (1, *parameter.shape)[-1])
                    row = row if parameter.dim() else row[0]
                    value = row.to(parameter.dtype).expand(parameter.shape)
                    stand_ins[id(parameter)] = nn.Parameter(value, requires_grad=False)
                    originals[id(stand_ins[id(parameter)])] = parameter
                module._parameters[name] = stand_ins[id(parameter)]

    def restore(root: nn.Module) -> None:
        for module in list(root.modules()):
            for name, child in module._modules.items():
                module._modules[name] = layers.get(id(child), child)
            for name, parameter in module._parameters.items():
                module._parameters[name] = originals.get(id(parameter), parameter)

    return restore
