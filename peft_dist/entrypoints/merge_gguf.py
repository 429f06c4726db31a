"""Write a model folder as one GGUF file, the format of llama.cpp, tensor by tensor.

Types of tensors are those that llama.cpp's own converter chooses: vectors stay in float32, and a
matrix whose rows are no multiple of 32 is float16 where Q8_0 was asked for.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import safe_open

from peft_dist.common.arguments import GGUF_TYPES
from peft_dist.common.errors import LaunchError, ModelError
from peft_dist.entrypoints.gguf_architecture import Architecture, architecture_of
from peft_dist.entrypoints.gguf_vocabulary import add_vocabulary
from peft_dist.model import architectures
from peft_dist.model.weights import WeightFiles

CHUNK_BYTES = 64 << 20
"""Float32 values that are quantized at a time."""


class _Tensor(NamedTuple):
    """One tensor of the file, and where its values come from."""

    name: str
    key: str
    file: Path
    shape: tuple[int, ...]
    kind: Any
    """A `gguf.GGMLQuantizationType`."""


class GgufPlan:
    """What the GGUF file of a model holds, checked before any weight is read."""

    def __init__(self, files: WeightFiles, outtype: str, out: Path) -> None:
        """Look at the config, the names of the tensors and the tokenizer.

        Args:
            files: The model; its values may change until `write`, its shapes may not.
            outtype: One of `GGUF_TYPES`.
            out: The folder that is made; told in errors.

        Raises:
            LaunchError: The package gguf is missing.
            ModelError: Only llama.cpp's own converter can write this model.
        """
        assert outtype in GGUF_TYPES, outtype
        if importlib.util.find_spec("gguf") is None:
            raise LaunchError(
                "needs the package gguf, which is not installed",
                where=f"--gguf {outtype}",
                remedy="pip install 'gguf>=0.17,<1'",
            )
        import gguf

        def refuse(problem: str) -> NoReturn:
            raise ModelError(
                problem,
                where=f"--gguf {outtype}",
                remedy="merge without it, then run llama.cpp's "
                f"`convert_hf_to_gguf.py {out} --outtype {outtype}`",
            )

        self.outtype, self._refuse = outtype, refuse
        self._config = architectures.read_config(files.folder, task="causal-lm")
        self._architecture: Architecture = architecture_of(self._config, refuse)
        self._tensors = list(self._planned(files))
        # Refuses a tokenizer that cannot be written.
        add_vocabulary(self._writer(gguf), files.folder, self._config, refuse)

    def write(self, folder: Path, target: Path) -> None:
        """Write the model of a folder, which has the planned tensors, to one file.

        Raises:
            OSError: It cannot be written.
        """
        import gguf
        import numpy as np

        writer = self._writer(gguf)
        writer.add_name(target.stem)
        share = "ALL" if self.outtype == "f32" else "MOSTLY"
        writer.add_file_type(getattr(gguf.LlamaFileType, f"{share}_{self.outtype.upper()}"))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self._architecture.add_metadata(writer)
        add_vocabulary(writer, folder, self._config, self._refuse)
        extra = self._architecture.extra_tensors()
        for name, values in extra.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        plain = {
            gguf.GGMLQuantizationType.F32: np.float32,
            gguf.GGMLQuantizationType.F16: np.float16,
        }
        for one in self._tensors:
            dtype = np.dtype(plain.get(one.kind, np.uint8))
            shape = gguf.quant_shape_to_byte_shape(one.shape, one.kind)
            size = int(np.prod(shape, dtype=np.int64))
            shape = shape if dtype == np.uint8 else one.shape
            writer.add_tensor_info(one.name, shape, dtype, size, raw_dtype=one.kind)
        try:
            writer.write_header_to_file(target)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for values in extra.values():
                writer.write_tensor_data(values)
            for one in self._tensors:
                with safe_open(folder / one.file.name, framework="pt") as stored:
                    values = self._architecture.turned(one.key, stored.get_tensor(one.key))
                writer.write_tensor_data(_quantized(values, one.kind, gguf.quants.quantize))
        finally:
            writer.close()

    def _planned(self, files: WeightFiles) -> Iterator[_Tensor]:
        import gguf

        kinds = gguf.GGMLQuantizationType
        wanted = getattr(kinds, self.outtype.upper())
        for key, stored in files.tensors.items():
            if self._architecture.leaves_out(key):
                continue
            name = self._architecture.name_of(key)
            if name is None:
                self._refuse(f"no name in GGUF is known for the tensor {key}")
            kind = wanted
            if len(stored.shape) == 1:
                kind = kinds.F32
            elif wanted == kinds.Q8_0 and stored.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
                kind = kinds.F16
            yield _Tensor(name, key, stored.file, stored.shape, kind)

    def _writer(self, gguf: Any) -> Any:
        return gguf.GGUFWriter(path=None, arch=self._architecture.name)


def _quantized(values: torch.Tensor, kind: Any, quantize: Callable[..., Any]) -> Any:
    """Return an array of one tensor in a type of GGUF, made of a few rows at a time."""
    import numpy as np

    if values.dim() == 1:
        return quantize(values.float().numpy(), kind)
    rows = max(1, CHUNK_BYTES // (4 * values.shape[-1]))
    return np.concatenate([quantize(part.float().numpy(), kind) for part in values.split(rows)])
