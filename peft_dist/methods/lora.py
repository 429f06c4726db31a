"""LoRA through PEFT: where it goes, and its seeded initial values."""

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_dist.common.errors import RecipeError
from peft_dist.config.method import Lora
from peft_dist.distributed.collectives import first_of_all
from peft_dist.methods.expert_lora import expert_targets, prepare, stand_ins, wrappers_for
from peft_dist.methods.init import assign
from peft_dist.methods.lora_extra import check_plain, extra_fields, naming_extra
from peft_dist.methods.lora_initial import (
    InitialFactors,
    check_ranks,
    layers_of,
    row_norms,
    weight_of,
)
from peft_dist.methods.lora_layer import LoraOn4bit
from peft_dist.methods.lora_starts import Factors
from peft_dist.methods.lora_targets import check_choice, chosen_blocks, has_bias, linear_targets
from peft_dist.methods.method import TASKS, BaseAccess, Method, inject
from peft_dist.methods.trained_parts import (
    compute_as_base,
    fill_token_rows,
    on_meta,
    parts_config,
)
from peft_dist.model.nf4 import FrozenLinear4bit


class LoraMethod(Method[Lora]):
    """Low-rank updates beside the linears inside the transformer blocks."""

    def __init__(self, settings: Lora, *, seed: int = 0) -> None:
        """Take the recipe's method section and the run's seed."""
        super().__init__(settings, seed=seed)
        self.changes_base = settings.splits_weight
        self._taken_out: dict[str, torch.Tensor] = {}
        """What was moved from the base into A and B, by their names; on the CPU."""
        self._modules_to_save: list[str] | None = None
        """As PEFT is to read it; it changes what it was given where modules are tied."""
        self._start: BaseAccess | None = None
        """What it did so with; it does it again for an adapter that was started elsewhere."""

    def attach(
        self, model: PreTrainedModel, *, task: str, base_name: str, has_conv1d: bool
    ) -> PeftModel:
        """Inject LoRA layers; see `Method.attach`."""
        settings = self.settings
        targets, parameters = linear_targets(model, settings)
        parameters += expert_targets(
            model, settings.target_parameters, chosen_blocks(model, settings)
        )
        if settings.bias != "none" and not has_bias(model, settings.bias, targets):
            raise RecipeError(
                "has no meaning here: "
                + ("this model" if settings.bias == "all" else "what is adapted")
                + " has no bias",
                where="method.bias",
                remedy="remove it",
            )
        odd = [r for r in (settings.rank, *settings.rank_pattern.values()) if r % 2]
        if settings.init == "orthogonal" and odd:
            raise RecipeError(
                f"init: orthogonal halves the rank, and {odd[0]} is odd",
                where="method.rank",
                remedy="choose an even one",
            )
        check_choice(model, settings, targets)
        if settings.dora and any(isinstance(m, Conv1D) for m in model.modules()):
            raise RecipeError(
                "dora needs the norm of whole columns, "
                "which an unquantized Conv1D base does not shard",
                where="method.dora",
                remedy="set quantization: nf4, or dora: false",
            )
        tokens = tuple(one for one in settings.trainable_tokens if isinstance(one, int))
        assert len(tokens) == len(settings.trainable_tokens), "tokens have ids by now"
        parts = parts_config(model, settings, tokens, targets)
        self._modules_to_save = parts.get("modules_to_save")
        embedding: Any = model.get_input_embeddings()
        dtype = embedding.weight.dtype
        extra = extra_fields(settings)
        with naming_extra(settings):
            config = LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT only divides it
                lora_dropout=settings.dropout,
                target_modules=targets,
                target_parameters=parameters or None,
                exclude_modules=list(settings.exclude_modules) or None,
                layers_to_transform=list(settings.layers_to_transform) or None,
                rank_pattern=dict(settings.rank_pattern),
                alpha_pattern=dict(settings.alpha_pattern),
                use_rslora=settings.rslora,
                use_dora=settings.dora,
                bias=settings.bias,
                task_type=TASKS[task],
                fan_in_fan_out=has_conv1d,
                **copy.deepcopy(parts),  # PEFT changes it
                **extra,
            )
        config._register_custom_module(
            {FrozenLinear4bit: LoraOn4bit, nn.Linear: LoraLinear, **wrappers_for(model)}
            if parameters
            else {FrozenLinear4bit: LoraOn4bit}
        )
        prepare(model, parameters)
        with warnings.catch_warnings(), on_meta(parts), stand_ins(model, parameters):
            # PEFT warns that fan_in_fan_out does not suit our swapped linears; it suits the saved
            # adapter, which is loaded onto the released base.
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            with naming_extra(settings):
                peft = inject(model, config, base_name=base_name)
        compute_as_base(peft, dtype)
        for module in peft.modules():
            if isinstance(module, LoraLayer):
                # Autocast picks the dtype of each product; casting the input to the adapter's
                # float32 first would be a round trip through memory per layer.
                module.cast_input_dtype_enabled = False
        check_plain(peft, settings)
        check_ranks(peft, settings)
        return peft

    def initialise(self, peft: PeftModel, start: BaseAccess) -> None:
        """Fill every adapter parameter from the seed and its name, or as `init` computes it.

        The first output is the base's, or nearer to that of the full weights. DoRA magnitudes are
        the row norms of the base.
        """
        self._start = start if self.changes_base else None
        fill_token_rows(peft, start)
        first = InitialFactors(self.settings, self.seed, start)
        layers = layers_of(peft)
        for name, module in layers:
            _assign(module, first.seeded(name, module))
            bias: Any = getattr(module.lora_B["default"], "bias", None)  # with `lora_bias`
            if bias is not None:
                assign(bias, torch.zeros(bias.shape))
            if "default" in module.lora_magnitude_vector:
                magnitude = module.lora_magnitude_vector["default"].get_parameter("weight")
                assign(magnitude, row_norms(module.get_base_layer(), start))
        for name, module, factors in first.computed(peft):
            device = module.lora_A["default"].get_parameter("weight").device
            # Rounded otherwise on another processor, or with another number of threads.
            factors = Factors(*(first_of_all(factor.to(device)) for factor in factors))
            if self.changes_base:
                self._take_out(name, module, "default", start, *factors)
            _assign(module, factors)

    def _take_out(
        self,
        name: str,
        module: LoraLayer,
        adapter: str,
        start: BaseAccess,
        a: torch.Tensor,
        b: torch.Tensor,
    ) -> None:
        """Leave in the base what A and B do not make of it, to the same bits on any machine."""
        layer = module.get_base_layer()
        rest = weight_of(module, start).clone()
        # One product and one difference at a time: how a matrix product rounds depends on threads.
        for column, row in zip((b * module.scaling[adapter]).t(), a, strict=True):
            rest -= column[:, None] * row
        start.copy_into(
            layer.get_parameter("weight"), rest.t() if isinstance(layer, Conv1D) else rest
        )
        self._taken_out[f"{name}.lora_A.{adapter}.weight"] = a.cpu()
        self._taken_out[f"{name}.lora_B.{adapter}.weight"] = b.cpu()

    def saved(self, peft: PeftModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the file's tensors; what was split off the base as a LoRA of twice the rank.

        The released base still has what was taken out of ours: BA - B'A' is a LoRA of its own.
        """
        plain = dict(state)
        for name, start in self._taken_out.items():
            parts = [state[name], -start if ".lora_B." in name else start]
            plain[name] = torch.cat(parts, dim=1 if ".lora_B." in name else 0)
        return super().saved(peft, plain)

    def restored(
        self, peft: PeftModel, found: Mapping[str, torch.Tensor], names: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the trained tensors; of what was split off the base the half that was trained.

        The other half is what was taken out of the base when that training began.
        """
        state, started = super().restored(peft, found, names), {}
        for name in self._taken_out:
            trained, start = state[name].chunk(2, dim=1 if ".lora_B." in name else 0)
            state[name], started[name] = trained, -start if ".lora_B." in name else start
        if any(not torch.equal(started[name], own) for name, own in self._taken_out.items()):
            self._start_again(peft, started)
        return state

    def _start_again(self, peft: PeftModel, started: Mapping[str, torch.Tensor]) -> None:
        """Take out of the released base what another machine, or another number of threads, did."""
        start = self._start
        assert start is not None
        layers = layers_of(peft)
        start.release([module.get_base_layer().get_parameter("weight") for _, module in layers])
        for name, module in layers:
            for adapter in module.lora_A:
                a, b = (
                    started[f"{name}.lora_{factor}.{adapter}.weight"].to(
                        module.lora_A[adapter].get_parameter("weight").device
                    )
                    for factor in "AB"
                )
                self._take_out(name, module, adapter, start, a, b)

    def saved_config(self, peft: PeftModel) -> PeftConfig:
        """Return the configuration of what `saved` returns."""
        config = super().saved_config(peft)
        if isinstance(config, LoraConfig) and config.ensure_weight_tying:
            config = copy.copy(config)
            config.modules_to_save = self._modules_to_save
        if isinstance(config, LoraConfig) and self._taken_out:
            config = copy.copy(config)
            config.r *= 2
            # Keeps the scale: alpha / r, or alpha / sqrt(r).
            config.lora_alpha = self.settings.alpha * (math.sqrt(2) if config.use_rslora else 2)  # type: ignore[assignment]
        return config

    def rate_factor(self, name: str) -> float:
        """Return LoRA+'s higher rate for B."""
        return self.settings.learning_rate_ratio if ".lora_B." in name else 1.0


def _assign(module: LoraLayer, factors: Factors) -> None:
    assign(module.lora_A["default"].get_parameter("weight"), factors.a)
    assign(module.lora_B["default"].get_parameter("weight"), factors.b)
