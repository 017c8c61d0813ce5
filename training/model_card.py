"""The model card of a trained adapter or model: its README.md, with the header that the hub reads."""

import json
import os
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from data import AG_NEWS
from model import EMBEDDED, EMBEDDED_ON_HUB

METHODS = {"lora": "LoRA", "head": "A trained head", "full": "Full fine-tuning"}
HUB_IDS = {"ag_news": AG_NEWS, EMBEDDED: EMBEDDED_ON_HUB}

WITH_MODEL = """\
With transformers:

```python
from transformers import pipeline

print(pipeline("text-classification", "THIS_FOLDER")("a text"))
```
"""
EXPORT = """\
# Once, with plain-lora: save the BERT encoder under DistilBERT's names, which the adapter uses.
from model import load_pretrained, save_pretrained

save_pretrained(*load_pretrained({name}, num_labels={classes}), "base-as-distilbert")

"""
WITH_ADAPTER = """\
With peft:

```python
{export}from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

names = {names}
base = AutoModelForSequenceClassification.from_pretrained({base}, id2label=names)
model = PeftModel.from_pretrained(base, "THIS_FOLDER").merge_and_unload()
print(pipeline("text-classification", model, tokenizer=AutoTokenizer.from_pretrained({base}))("a text"))
```
"""


def model_card(results: dict[str, Any]) -> str:
    """The card of the run with these `results` (as in results.json). It contains no path of this machine."""
    options, before, after = results["options"], results["before"], results["after"]
    parameters, train = results["parameters"], results["train"]
    base, dataset = hub_id(results["model"]), hub_id(results["dataset"])
    model, data = (" ".join(os.path.basename(os.path.abspath(results[key])).split()) for key in ("model", "dataset"))
    method, is_adapter = options["method"], options["method"] != "full"
    title = f"{METHODS[method]} on {model} for {data}"
    measured = [("f1", "macro-F1", after["macro_f1"]), ("accuracy", "accuracy", after["accuracy"])]
    evaluated = [
        EvalResult("text-classification", dataset or data, data, kind, round(value, 4), dataset_split="test", metric_name=name)
        for kind, name, value in measured
    ]
    tags = ["lora"] * (method == "lora") + [f"base_model:adapter:{base}"] * (is_adapter and base is not None)
    header = ModelCardData(
        base_model=base,
        datasets=dataset and [dataset],
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification",
        tags=["plain-lora", *tags],
        metrics=["f1", "accuracy"],
        model_name=title,
        eval_results=evaluated,
    )
    start = results["sha256"].get("adapter")
    started = f"started from another adapter (sha256 {start[:16]}); " if start else ""
    adapters = f"{started}r = {options['r']}, alpha = {options['lora_alpha']:g} on {', '.join(options['target_modules'])}; "
    return f"""---
{header.to_yaml().strip()}
---

# {title}

| | before training | after |
|---|---|---|
| macro-F1 | {before["macro_f1"]:.4f} | **{after["macro_f1"]:.4f}** |
| accuracy | {before["accuracy"]:.4f} | {after["accuracy"]:.4f} |

Measured on {sum(map(sum, after["confusion_matrix"])):,} test texts.

Trained with plain-lora: {adapters if method == "lora" else ""}\
{parameters["trainable"]:,} of {parameters["all"]:,} parameters, {train["examples"]:,} examples in {train["steps"]:,} steps of \
AdamW, batch size {options["batch_size"]}, learning rate {options["learning_rate"]:g}, seed {options["seed"]}, \
{results["dtype"]}.

## Use it

With plain-lora:

    python predict.py THIS_FOLDER "a text"

{use_adapter(results, base) if is_adapter else WITH_MODEL}"""


def use_adapter(results: dict[str, Any], base: str | None) -> str:
    """Code that loads the adapter. Any other base than DistilBERT must be saved under DistilBERT's names first."""
    names = dict(enumerate(results["after"]["per_class_f1"]))
    if base is not None and "distilbert" in base.lower():
        return WITH_ADAPTER.format(export="", base=quoted(base), names=names)
    export = EXPORT.format(name=quoted(results["model"] if base else "BASE_MODEL"), classes=len(names))
    return WITH_ADAPTER.format(export=export, base=quoted("base-as-distilbert"), names=names)


def quoted(name: str) -> str:
    """A string of Python, in double quotes."""
    return json.dumps(name, ensure_ascii=False)


def hub_id(name: str) -> str | None:
    """The hub's id of a model or data set. None for a local one."""
    return HUB_IDS.get(name, None if os.path.exists(name) or name == "sample" else name)
