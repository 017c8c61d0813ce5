"""The idea: low-rank adapters, under the names that `peft` gave them. Works on any `nn.Module`."""

from lora.config import LoraConfig, PeftConfig, TaskType
from lora.layer import LoRALinear
from lora.peft_model import PeftModel, get_peft_model

__all__ = ["LoRALinear", "LoraConfig", "PeftConfig", "PeftModel", "TaskType", "get_peft_model"]
