"""Scripts written for peft, with only the import changed: each runs here with both libraries, and gives the same numbers."""

import accelerate
import huggingface_hub
import numpy
import peft
import pytest
import safetensors.torch
import torch
import transformers
from helpers import Q_V, adapted, base_model, batch, logits, perturb
from robustness.hub_server import Hub
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import lora
from lora.errors import UserError

ROWS = [{key: value[i] for key, value in batch().items()} for i in range(4)] * 4


def make(library, dropout: float = 0.1):
    """As in peft's introduction."""
    model = base_model(dropout=dropout)
    torch.manual_seed(5)
    config = library.LoraConfig(
        task_type=library.TaskType.SEQ_CLS, inference_mode=False, r=3, lora_alpha=16, lora_dropout=dropout, target_modules=Q_V
    )
    model = library.get_peft_model(model, config)
    model.print_trainable_parameters()
    return model


def both(run, *arguments):
    """What `run` gives for peft and for us."""
    return [run(library, *arguments) for library in (peft, lora)]


def test_the_introduction_to_sequence_classification(tmp_path, capsys):
    def run(library):
        model = make(library)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        model.train()
        torch.manual_seed(6)
        for _ in range(3):
            loss = model(**batch()).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / library.__name__)
        config = library.PeftConfig.from_pretrained(tmp_path / library.__name__)
        assert config.task_type == library.TaskType.SEQ_CLS
        loaded = library.PeftModel.from_pretrained(base_model(), tmp_path / library.__name__)
        return losses, logits(loaded).tolist()

    theirs, ours = both(run)
    assert ours == theirs
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_the_loop_of_accelerate(tmp_path):
    def run(library):
        accelerator = accelerate.Accelerator(cpu=True)
        model = make(library, dropout=0.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        parts = accelerator.prepare(model, DataLoader(ROWS, batch_size=4), optimizer, schedule)
        model, loader, optimizer, schedule = parts
        losses = []
        for inputs in loader:
            loss = model(**inputs).loss
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        state = accelerator.get_state_dict(model)
        accelerator.unwrap_model(model).save_pretrained(
            tmp_path / library.__name__, is_main_process=accelerator.is_main_process, save_function=accelerator.save,
            state_dict=state,
        )  # fmt: skip
        return losses

    theirs, ours = both(run)
    assert ours == theirs
    files = [safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "lora")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def trained(library, folder, resume=None, **options):
    model = make(library)
    arguments = transformers.TrainingArguments(
        folder / library.__name__, max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], compute_metrics=accuracy)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    scores = trainer.evaluate()
    return model, losses, {key: scores[key] for key in ("eval_loss", "eval_accuracy")}


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers(tmp_path):
    """Losses and scores are equal; a checkpoint holds the adapter, and goes on with the same numbers."""
    (_, losses, scores), (model, our_losses, our_scores) = both(trained, tmp_path)
    assert our_losses == losses
    assert our_scores == scores
    assert len(set(losses)) == 4

    checkpoint = tmp_path / "lora" / "checkpoint-2"
    saved = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert sum(".lora_A." in key for key in saved) == 4
    resumed, last, again = trained(lora, tmp_path, resume=checkpoint)
    assert last == losses[-len(last) :]
    assert again == scores
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), model.state_dict().values(), strict=True))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base_model(), tmp_path / "adapter")), logits(model.eval()))


def test_auto_peft_model_reads_our_folder(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    model = perturb(adapted(base))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=4)
    assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.slow  # sentence_transformers takes seconds to import
def test_sentence_transformers_loads_our_adapter(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "oil": 2, "prices": 3, "rose": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(tmp_path / "base")
    base_model().distilbert.save_pretrained(tmp_path / "base")

    encoder = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    ours = perturb(lora.get_peft_model(encoder, lora.LoraConfig(task_type="FEATURE_EXTRACTION", r=3, target_modules=Q_V)))
    ours.save_pretrained(tmp_path / "adapter")
    transformer = Transformer(str(tmp_path / "base"))
    model = sentence_transformers.SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")
    text = "oil prices rose"
    before = model.encode(text)
    model.load_adapter(str(tmp_path / "adapter"))
    inputs = fast(text, return_tensors="pt")
    expected = ours(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state.mean(1)[0].detach().numpy()
    numpy.testing.assert_allclose(model.encode(text), expected, atol=1e-6)
    assert abs(expected - before).max() > 1e-3


# ---- the hub, on this machine


def test_an_adapter_is_read_from_the_hub_by_its_name(tmp_path, monkeypatch):
    model = perturb(adapted())
    model.save_pretrained(tmp_path / "adapter")
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with Hub() as hub:
        hub.add("somebody/adapter", {**files, "adapter_model.bin": b"a pickle"})
        options = {"cache_dir": tmp_path / "cache", "token": False}
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        loaded = lora.PeftModel.from_pretrained(base_model(), "somebody/adapter", **options)
        assert lora.PeftConfig.from_pretrained("somebody/adapter", **options) == loaded.active_peft_config
        assert not any("bin" in request.file for request in hub.requests)
        with pytest.raises(UserError, match="nobody/adapter is not a folder, and the hub does not give it: "):
            lora.PeftModel.from_pretrained(base_model(), "nobody/adapter", **options)
    assert torch.equal(logits(loaded), logits(model))
