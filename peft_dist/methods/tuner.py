"""The PEFT model of a method of our own, which finds the layers it wraps by structure."""

from abc import abstractmethod
from collections.abc import Collection
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn


class PlacedTuner(BaseTuner):
    """Wraps each layer of `find_places` once, and adds an adapter to the wrapper."""

    tuner_layer_cls: Any
    """The wrapper, made from the layer it wraps."""

    @abstractmethod
    def find_places(self, config: Any, model: Any) -> Collection[str]:
        """Return the names of the layers that get an adapter."""

    @abstractmethod
    def add(self, layer: Any, adapter_name: str, config: Any, key: str) -> None:
        """Add an adapter to the wrapper of the layer of this name."""

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        self._places = self.find_places(peft_config, model)

    def _check_target_module_exists(  # type: ignore[override]
        self, peft_config: PeftConfig, key: str
    ) -> bool:
        # Static in PEFT, which calls it through self: the configuration alone knows no names.
        return key in self._places

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        wrapped = isinstance(target, self.tuner_layer_cls)
        layer: Any = target if wrapped else self.tuner_layer_cls(target)
        self.add(layer, adapter_name, peft_config, current_key)
        if not wrapped:
            self._replace_module(parent, target_name, layer, target)
