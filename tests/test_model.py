"""The handwritten network against transformers: the same weights must give the same logits and gradients."""

import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from model import DistilBertConfig, DistilBertForSequenceClassification, load_pretrained, save_pretrained
from model.pretrained import _embedded_folder

TINY = DistilBertConfig(vocab_size=99, max_position_embeddings=40, dim=32, n_layers=3, n_heads=4, hidden_dim=64, num_labels=4)


def padded_batch(vocab_size: int, lengths: tuple[int, ...] = (17, 3, 9, 40)) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids of mixed lengths. The padding is random, too, since the mask must hide it."""
    input_ids = torch.randint(5, vocab_size, (len(lengths), max(lengths)))
    return input_ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def reference(config: DistilBertConfig) -> transformers.DistilBertForSequenceClassification:
    names = ("vocab_size", "max_position_embeddings", "dim", "n_layers", "n_heads", "hidden_dim", "num_labels")
    model = transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(**{name: getattr(config, name) for name in names})
    )
    return enliven(model)


def enliven(model: torch.nn.Module) -> torch.nn.Module:
    """Make the weights large, so that one token or layer more moves the logits far beyond the tests' tolerance."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize(
    "config", [TINY, DistilBertConfig(n_layers=2, vocab_size=1000, num_labels=4)], ids=["tiny", "768 wide"]
)
def test_logits_and_gradients_are_those_of_transformers(config):
    """In a batch of mixed lengths, with padding."""
    torch.manual_seed(0)
    theirs = reference(config).eval()
    ours = DistilBertForSequenceClassification(config).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the checkpoint's
    input_ids, mask = padded_batch(config.vocab_size)
    labels = torch.tensor([0, 1, 2, 3])

    logits = ours(input_ids, mask)
    expected = theirs(input_ids=input_ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)

    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_padding_is_read_only_without_a_mask():
    torch.manual_seed(0)
    model = enliven(DistilBertForSequenceClassification(TINY)).eval()
    input_ids, mask = padded_batch(99, (9, 9))
    torch.testing.assert_close(model(input_ids), model(input_ids, mask), atol=1e-6, rtol=0)
    longer, longer_mask = F.pad(input_ids, (0, 5), value=7), F.pad(mask, (0, 5))
    torch.testing.assert_close(model(longer, longer_mask), model(input_ids), atol=1e-6, rtol=0)
    assert not torch.allclose(model(longer), model(input_ids), atol=0.05)


def test_dropout_acts_in_training_and_not_in_evaluation():
    """Each of the three rates is tried alone; together they act in five places."""
    torch.manual_seed(0)
    input_ids, _ = padded_batch(99, (9, 9))
    for place in ("dropout", "attention_dropout", "seq_classif_dropout"):
        rates = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0} | {place: 0.5}
        config = DistilBertConfig(**{**TINY.__dict__, **rates})
        model = DistilBertForSequenceClassification(config).train()
        assert not torch.equal(model(input_ids), model(input_ids)), place
        model.eval()
        assert torch.equal(model(input_ids), model(input_ids)), place


def test_the_last_layer_computes_the_first_row_only():
    model = DistilBertForSequenceClassification(TINY).eval()
    rows = {}
    for i, block in enumerate(model.distilbert.transformer.layer):
        block.ffn.lin1.register_forward_hook(lambda module, args, output, i=i: rows.__setitem__(i, output.shape[1]))
    model(padded_batch(99)[0])
    assert rows == {0: 40, 1: 40, 2: 1}


def test_distilbert_base_has_66_956_548_parameters():
    """With a head for four classes."""
    with torch.device("meta"):
        model = DistilBertForSequenceClassification(DistilBertConfig(num_labels=4))
    assert sum(parameter.numel() for parameter in model.parameters()) == 66_956_548


def test_the_real_minilm_equals_bert_of_transformers():
    torch.manual_seed(0)
    ours, tokenizer = load_pretrained("minilm", 4)
    theirs = transformers.BertModel.from_pretrained(_embedded_folder()).eval()
    texts = [
        "A short one",
        "Stocks fell on Friday after the central bank raised rates by half a point, twice what had been expected.",
    ]
    encodings = [torch.tensor(tokenizer.encode(text).ids) for text in texts]
    input_ids = torch.nn.utils.rnn.pad_sequence(encodings, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in encodings], batch_first=True).bool()

    cls = theirs(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state[:, 0]
    torch.testing.assert_close(ours.distilbert(input_ids, mask), cls, atol=1e-5, rtol=0)

    head = torch.nn.Sequential(ours.pre_classifier, torch.nn.ReLU(), ours.classifier)
    labels = torch.tensor([3, 2])
    F.cross_entropy(ours(input_ids, mask), labels).backward()
    mine = {
        "embeddings": ours.distilbert.embeddings.word_embeddings.weight.grad.clone(),
        "query": ours.distilbert.transformer.layer[2].attention.q_lin.weight.grad.clone(),
    }
    F.cross_entropy(head(cls), labels).backward()
    torch.testing.assert_close(mine["embeddings"], theirs.embeddings.word_embeddings.weight.grad, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(mine["query"], theirs.encoder.layer[2].attention.self.query.weight.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("old_names", [False, True], ids=["weight and bias", "gamma and beta"])
def test_a_bert_checkpoint_with_its_language_model_head_loads(tmp_path, tokenizer_file, old_names):
    """As bert-base-uncased is stored: a `bert.` prefix, a pooler, `cls.` heads, and LayerNorms called gamma and beta."""
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    theirs = enliven(transformers.BertForPreTraining(config)).eval()
    weights = {key: tensor.clone() for key, tensor in theirs.state_dict().items() if "decoder" not in key}
    if old_names:
        for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            weights = {key.replace(new, old): tensor for key, tensor in weights.items()}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())

    ours, _ = load_pretrained(str(tmp_path), 2)
    input_ids, mask = padded_batch(config.vocab_size)
    cls = theirs.bert(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state[:, 0]
    torch.testing.assert_close(ours.distilbert(input_ids, mask), cls, atol=1e-5, rtol=0)


def test_a_saved_model_loads_here_and_in_transformers(tmp_path, tokenizer_file):
    """Logits, label names and token ids are equal."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    ours = DistilBertForSequenceClassification(
        DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=3)
    ).eval()
    folder = tmp_path / "saved"
    save_pretrained(ours, tokenizer, folder, ["cat", "dog", "bird"])

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    again, same_tokenizer = load_pretrained(str(folder), 3)
    input_ids, mask = padded_batch(30522)
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "bird"}
    torch.testing.assert_close(
        ours(input_ids, mask), theirs(input_ids=input_ids, attention_mask=mask.long()).logits, atol=1e-6, rtol=0
    )
    assert torch.equal(ours(input_ids, mask), again(input_ids, mask))
    text = "Théâtre -- naïve, isn't it?"
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert their_tokenizer(text)["input_ids"] == same_tokenizer.encode(text).ids
