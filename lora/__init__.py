"""The idea: low-rank adapters, under the names that `peft` gave them. Works on any `nn.Module`."""

from lora.layer import LoraConfig, LoRALinear
from lora.peft_model import PeftModel, get_peft_model

__all__ = ["LoRALinear", "LoraConfig", "PeftModel", "get_peft_model"]
