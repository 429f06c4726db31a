"""What has to be known of single model types by name, each with the upstream line that it answers.

Everything else about a model is found by its structure, or proven at the start.
"""

from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

PLAIN_LINEARS = ("FalconLinear",)
"""Classes that compute what `nn.Linear` does in a forward of their own.

FalconLinear (transformers/models/falcon/modeling_falcon.py) multiplies and adds in two steps."""
DENSE_EXPERTS = ("Llama4TextExperts",)
"""Experts whose forward cannot be chosen by name, and which all see every token.

Llama4TextExperts (transformers/models/llama4/modeling_llama4.py) has its weights as [E, in, out]
and a forward of its own."""
_STATE_SPACE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def refusal(config: PretrainedConfig) -> str | None:
    """Return why a model cannot be read as transformers reads it; None where it can."""
    if config.model_type == "youtu" and config.pad_token_id is not None:
        # transformers/models/youtu/modeling_youtu.py, YoutuPreTrainedModel._init_weights: writes
        # zeros into a view of the loaded embedding, which is also the output matrix.
        return "transformers clears the stored embedding of its padding token as it loads it"
    if config.model_type == "reformer" and config.axial_pos_embds:
        # transformers/models/reformer/modeling_reformer.py, AxialPositionEmbeddings.forward: while
        # it trains, it raises for any other length.
        return "it trains on sequences of one length alone, the product of its axial_pos_shape"
    return None


def leave_weights_alone(config: PretrainedConfig) -> None:
    """Turn off what would change frozen weights in place."""
    if config.model_type == "rwkv":
        # transformers/models/rwkv/modeling_rwkv.py, RwkvModel._rescale_layers: in eval mode some
        # weights are halved, and hidden states with them, against an overflow of float16.
        config.rescale_every = 0
    text = config.get_text_config()
    if getattr(text, "altup_coef_clip", None) is not None:
        # transformers/models/gemma3n/modeling_gemma3n.py, Gemma3nTextAltUp.predict and correct: in
        # train mode weights are clamped, which released ones are already, and a layer is passed by.
        text.__dict__["altup_coef_clip"] = None  # its setter takes numbers alone


def no_lora_on(model: PreTrainedModel) -> dict[str, str]:
    """Return the names of linears that PEFT's LoRA cannot be put on, each with the reason."""
    if model.config.model_type not in _STATE_SPACE:
        return {}
    # peft/tuners/tuners_utils.py, _check_lora_target_modules_mamba: the model's kernel reads
    # the weights of these and never calls the modules.
    reason = "its kernel reads the weight and never calls the layer"
    return dict.fromkeys(("conv1d", "out_proj"), reason)


def names_of_experts(model: PreTrainedModel) -> set[str]:
    """Return the names of linears that PEFT takes for those of experts, whatever stands before.

    A target module of such a name becomes a LoRA on the experts
    (peft/utils/transformers_weight_conversion.py, _convert_peft_config_moe). The linears of that
    name that there are, such as those of shared experts, are target parameters there.
    """
    family = _MODEL_TO_CONVERSION_PATTERN.get(str(model.config.model_type))
    return set(_MOE_TARGET_MODULE_MAPPING.get(str(family), ()))
