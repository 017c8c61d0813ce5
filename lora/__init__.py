"""LoRA adapters for any `nn.Module`, under peft's names. Start reading in lora/layer.py, then lora/inject.py.

The package needs torch and safetensors only: install it, or copy this folder.
"""

from lora.config import NO_TARGETS, LoraConfig, PeftConfig, TaskType
from lora.inject import count_parameters
from lora.layer import LoRALinear
from lora.peft_model import (
    PeftModel,
    PeftModelForSequenceClassification,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    print_trainable_parameters,
    set_peft_model_state_dict,
)
