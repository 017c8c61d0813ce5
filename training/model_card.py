"""The model card of what a run has trained: README.md with the header that the hub reads."""

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
# a BERT encoder under DistilBERT's names, as the adapter has them: once, with plain-lora
from model import load_pretrained, save_pretrained

save_pretrained(*load_pretrained("{name}", num_labels={classes}), "base-as-distilbert")

"""
WITH_ADAPTER = """\
With peft:

```python
{export}from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

names = {names}
base = AutoModelForSequenceClassification.from_pretrained("{base}", id2label=names)
model = PeftModel.from_pretrained(base, "THIS_FOLDER").merge_and_unload()
print(pipeline("text-classification", model, tokenizer=AutoTokenizer.from_pretrained("{base}"))("a text"))
```

With transformers alone (it calls peft):

```python
base = AutoModelForSequenceClassification.from_pretrained("{base}", id2label=names)
base.load_adapter("THIS_FOLDER")
print(pipeline("text-classification", base, tokenizer=AutoTokenizer.from_pretrained("{base}"))("a text"))
```
"""


def model_card(results: dict[str, Any]) -> str:
    """Of the run that `results` (as in results.json) tells of. No path of this machine is in it."""
    options, after = results["options"], results["after"]
    base, dataset = (on_hub(results[what]) for what in ("model", "dataset"))
    method, names = options["method"], list(after["per_class_f1"])
    data = os.path.basename(os.path.abspath(results["dataset"]))
    title = f"{METHODS[method]} on {os.path.basename(os.path.abspath(results['model']))} for {data}"
    measured = [("f1", "macro-F1", after["macro_f1"]), ("accuracy", "accuracy", after["accuracy"])]
    evaluated = [
        EvalResult("text-classification", dataset or data, data, kind, round(value, 4), dataset_split="test", metric_name=name)
        for kind, name, value in measured
    ]
    adapter, is_distilbert = method != "full", base is not None and "distilbert" in base.lower()
    tags = ["lora"] * (method == "lora") + [f"base_model:adapter:{base}"] * (adapter and base is not None)
    header = ModelCardData(
        base_model=base,
        datasets=dataset and [dataset],
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification",
        tags=["plain-lora", *tags],
        metrics=["f1", "accuracy"],
        model_name=title,
        eval_results=evaluated,
    )
    lora = f"r = {options['r']}, alpha = {options['lora_alpha']:g} on {', '.join(options['target_modules'])}; "
    parameters, train = results["parameters"], results["train"]
    per_class = "\n".join(
        f"| {i} | {' '.join(name.split()).replace('|', '/')} | {'-' if f1 is None else f'{f1:.4f}'} |"
        for i, (name, f1) in enumerate(after["per_class_f1"].items())
    )
    use = WITH_MODEL
    if adapter:
        export = "" if is_distilbert else EXPORT.format(name=results["model"] if base else "BASE_MODEL", classes=len(names))
        use = WITH_ADAPTER.format(
            export=export, base=base if is_distilbert else "base-as-distilbert", names=dict(enumerate(names))
        )
    return f"""---
{header.to_yaml().strip()}
---

# {title}

| | before training | after |
|---|---|---|
| macro-F1 | {results["before"]["macro_f1"]:.4f} | **{after["macro_f1"]:.4f}** |
| accuracy | {results["before"]["accuracy"]:.4f} | {after["accuracy"]:.4f} |

On {sum(map(sum, after["confusion_matrix"])):,} texts of the test split; by class:

| label | name | F1 |
|---|---|---|
{per_class}

Trained with plain-lora: {lora if method == "lora" else ""}\
{parameters["trainable"]:,} of {parameters["all"]:,} parameters, {train["examples"]:,} examples in {train["steps"]:,} steps of \
AdamW, batch size {options["batch_size"]}, learning rate {options["learning_rate"]:g}, seed {options["seed"]}, \
{results["dtype"]}.

## Use it

With plain-lora:

    python predict.py THIS_FOLDER "a text"

{use}"""


def on_hub(name: str) -> str | None:
    """The hub's id of a model or a data set that a run named; None for what is in a folder."""
    return HUB_IDS.get(name, None if os.path.exists(name) or name == "sample" else name)
