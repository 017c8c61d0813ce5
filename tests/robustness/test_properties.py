"""What must hold for any input: hypothesis searches for a counterexample, among the same inputs each time (derandomize)."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import tempfile
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from fuzz import mutate, tiny_tokenizer
from helpers import begun
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import nn

from common.errors import UserError
from data import TokenizedTexts, evaluation_batches, load_dataset, micro_batches, pad, read_texts, tokenize, training_batches
from lora import LoraConfig, PeftModel, get_peft_model
from training.checkpoint import newest_first, read_newest
from training.distributed import Distributed
from training.evaluation import confusion_matrix, f1_per_class, macro_f1
from training.fast_cpu import dropout
from training.optimizer import lr_multiplier
from training.options import Options, parse

settings.register_profile(
    "same", derandomize=True, deadline=None, database=None, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.load_profile("same")

STRANGE = ["", " ", "\t\n", "a\nb", "a\r\nb", "a\rb", '"', '""', "a,b", "\0", "\ufeff", "\u2028", "\x85", "\\", "\N{SAUROPOD}"]
STRANGE += ["\u05e9\u05dc\u05d5\u05dd \u202eabc", "\ud800", "a\udfff", "x" * 200_000, "null", "1e999", "--help", "e\u0301"]
text = st.one_of(st.sampled_from(STRANGE), st.text(st.characters(), max_size=20), st.text(' "\n\r,\0ab', max_size=10))
texts = st.lists(text, min_size=1, max_size=6)
lengths = st.lists(st.integers(2, 300), min_size=1, max_size=80).map(np.array)
seeds = st.integers(0, (1 << 63) - 1)


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def is_utf_8(*values: str) -> bool:
    return all(c < "\ud800" or c > "\udfff" for value in values for c in value)


def dataset(root: Path, suffix: str, content: bytes) -> list[str] | None:
    """The texts of a data set whose two parts are `content`, or None if it is refused."""
    for part in ("train", "test"):
        (root / f"{part}{suffix}").write_bytes(content)
    try:
        data = load_dataset(str(root))
    except UserError:
        return None
    assert data.train.texts == data.test.texts
    return data.train.texts


def texts_to_label(path: Path) -> list[str] | None:
    try:
        return list(read_texts(path))
    except UserError:
        return None


def csv_of(rows: list[tuple], end: str) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=end).writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


@given(texts, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_csv_is_read_as_it_was_written_or_refused(said, end, mark):
    rows = [("text", "label"), *((text, str(i % 2)) for i, text in enumerate([*said, "one more"]))]
    content = (b"\xef\xbb\xbf" if mark else b"") + csv_of(rows, end)
    good = is_utf_8(*said)
    with folder() as root:
        read = dataset(root, ".csv", content)
        assert read == [*said, "one more"] if good and all(text.strip() for text in said) else read is None
        (root / "texts.csv").write_bytes(content)
        assert texts_to_label(root / "texts.csv") == ([*said, "one more"] if good else None)


@given(texts, st.booleans(), st.booleans())
def test_json_lines_are_read_as_they_were_written_or_refused(said, escaped, mark):
    rows = [{"text": text, "label": i % 2} for i, text in enumerate([*said, "one more"])]
    lines = "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows)
    content = (b"\xef\xbb\xbf" if mark else b"") + lines.encode("utf-8", "surrogatepass")
    good = is_utf_8(*said)
    with folder() as root:
        read = dataset(root, ".jsonl", content)
        assert read == [*said, "one more"] if good and all(text.strip() for text in said) else read is None
        (root / "texts.jsonl").write_bytes(content)
        assert texts_to_label(root / "texts.jsonl") == ([*said, "one more"] if good else None)


@given(st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=20), max_size=6))
def test_lines_are_texts_as_they_stand(said):
    with folder() as root:
        (root / "texts.txt").write_bytes(b"\xef\xbb\xbf" + "".join(text + "\n" for text in said).encode())
        assert texts_to_label(root / "texts.txt") == said


@given(st.binary(max_size=200), st.sampled_from([".csv", ".jsonl", ".txt"]))
def test_any_bytes_are_read_or_refused(content, suffix):
    with folder() as root:
        dataset(root, suffix if suffix != ".txt" else ".csv", content)
        (root / f"texts{suffix}").write_bytes(content)
        texts_to_label(root / f"texts{suffix}")


# Adapters

names = st.text(st.characters(), max_size=8)
patterns = st.sampled_from(["q_lin", "layer.0.q_lin", "[qv]_lin", ".*", "(", "(?i)q", "a{99999999999}", "\\"]) | names
alphas = st.floats(1e-30, 1e29) | st.integers(1, 1000)
configs = st.fixed_dictionaries(
    {},
    optional={
        "r": st.integers(-1, 1 << 21),
        "lora_alpha": alphas | st.floats(),
        "lora_dropout": st.floats(0, 0.999),
        "target_modules": st.none() | names | st.lists(names, max_size=3),
        "modules_to_save": st.none() | st.lists(names, max_size=3),
        "bias": st.sampled_from(["none", "all", "lora_only", "some"]),
        "task_type": st.sampled_from([None, "SEQ_CLS", "CAUSAL_LM"]),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian", "pissa"]),
        "layers_to_transform": st.none() | st.integers() | st.lists(st.integers(), max_size=3),
        "rank_pattern": st.dictionaries(patterns, st.integers(0, 99), max_size=2),
        "alpha_pattern": st.dictionaries(patterns, alphas, max_size=2),
        "base_model_name_or_path": st.none() | text,
        "revision": st.none() | text,
    },
)


@given(configs)
def test_a_configuration_is_read_as_it_was_written(options):
    try:
        with warnings.catch_warnings(action="ignore"):  # of `re`, at a doubtful pattern
            config = LoraConfig(**options)
    except UserError:
        return
    saved = config.modules_to_save or []
    targets = config.target_modules
    if isinstance(targets, list):
        assume(not set(targets) & set(saved))  # it is in one of the two only, as peft reads it, too
        targets = sorted(targets)
    layers = config.layers_to_transform
    expected = dataclasses.replace(
        config,
        target_modules=targets,
        modules_to_save=sorted(saved) if config.modules_to_save is not None else None,
        layers_to_transform=sorted(layers) if isinstance(layers, list) else layers,
        init_lora_weights=True,
    )
    with folder() as root, warnings.catch_warnings(action="ignore"):
        config.save_pretrained(root)
        assert LoraConfig.from_pretrained(root) == expected


class Net(nn.Module):
    def __init__(self, sizes: list[int], classes: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(one, other) for one, other in itertools.pairwise(sizes))
        self.classifier = nn.Linear(sizes[-1], classes)


shapes = st.lists(st.integers(1, 9), min_size=2, max_size=4)


@settings(max_examples=30)
@given(shapes, st.integers(1, 5), st.integers(1, 12), st.booleans(), st.sampled_from(["none", "all", "lora_only"]), seeds)
def test_an_adapter_is_read_bit_for_bit_as_it_was_written(sizes, classes, r, use_dora, bias, seed):
    torch.manual_seed(seed)
    config = LoraConfig(r=r, target_modules="all-linear", use_dora=use_dora, bias=bias)
    model = get_peft_model(Net(sizes, classes), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # any bits that are a finite number, denormal ones and -0.0 included
                bits = (
                    torch.randint(-(1 << 31), 1 << 31, parameter.shape, dtype=torch.int64).to(torch.int32).view(torch.float32)
                )
                parameter.copy_(torch.where(bits.isfinite(), bits, -0.0))
    with folder() as root:
        model.save_pretrained(root)
        again = PeftModel.from_pretrained(Net(sizes, classes), root, is_trainable=True)
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    loaded = {name: tensor for name, tensor in again.named_parameters() if tensor.requires_grad}
    assert trained.keys() == loaded.keys()
    for name, tensor in trained.items():
        assert torch.equal(tensor.view(torch.int32), loaded[name].view(torch.int32))


@cache
def whole() -> tuple[bytes, bytes, bytes, dict]:
    """An adapter's two files and a checkpoint, with the tensors of that."""
    torch.manual_seed(0)
    model = get_peft_model(Net([4, 3], 2), LoraConfig(r=2, target_modules="all-linear"))
    with folder() as root:
        model.save_pretrained(root)
        metadata = {name: {} for name in ("options", "fingerprint")} | {"before": [[1]], "commit": None, "processes": 1}
        metadata |= dict.fromkeys(("model", "dataset", "notice"), "")
        begun(root / "run", model, metadata).save(7, 0.0, [])
        files = [root / "adapter_model.safetensors", root / "adapter_config.json", newest_first(root / "run")[0]]
        contents = [path.read_bytes() for path in files]
    return *contents, safetensors.torch.load(contents[2])


@given(st.randoms(use_true_random=False))
def test_a_damaged_checkpoint_is_read_correctly_or_refused(rng):
    content, tensors = mutate(whole()[2], rng), whole()[3]
    with folder() as root, contextlib.redirect_stdout(io.StringIO()):
        (root / "checkpoints").mkdir()
        (root / "checkpoints" / "step-00000007.safetensors").write_bytes(content)
        try:
            checkpoint = read_newest(root)
        except UserError:
            return
        assert checkpoint.step == 7
        assert checkpoint.tensors.keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in checkpoint.tensors.items())


@given(st.randoms(use_true_random=False), st.booleans())
def test_a_damaged_adapter_is_read_or_the_model_left_alone(rng, weights):
    contents = [mutate(content, rng) if i != weights else content for i, content in enumerate(whole()[:2])]
    base = Net([4, 3], 2)
    with folder() as root, warnings.catch_warnings(action="ignore"):
        for name, content in zip(("adapter_model.safetensors", "adapter_config.json"), contents, strict=True):
            (root / name).write_bytes(content)
        try:
            model = PeftModel.from_pretrained(base, root)
        except UserError:
            assert {type(module) for module in base.modules()} == {Net, nn.ModuleList, nn.Linear}
            return
        assert all(parameter.isfinite().all() for parameter in model.parameters())


# Command lines

flags = st.sampled_from([f"--{item.name.replace('_', '-')}" for item in dataclasses.fields(Options)])
words = (
    flags | text | st.integers().map(str) | st.floats().map(str) | st.sampled_from(["--", "-", "-h", "--r=2", "@x", "9" * 5000])
)


@settings(max_examples=300)
@given(st.lists(words, max_size=8))
def test_any_command_line_is_options_or_a_refusal(arguments):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            options = Options(**parse(arguments, "100 % of it"))
    except UserError:
        return
    except SystemExit:
        assert any(argument.startswith(("-h", "--help")) for argument in arguments)
        return
    usual = dataclasses.asdict(Options(method=options.method))
    for name, value in dataclasses.asdict(options).items():
        assert value == usual[name] or f"--{name.replace('_', '-')}" in " ".join(arguments)


# Batches


def as_texts(lengths: np.ndarray) -> TokenizedTexts:
    ids = np.concatenate([np.full(length, i + 1) for i, length in enumerate(lengths)]).astype(np.int32)
    return TokenizedTexts(ids, np.concatenate([[0], np.cumsum(lengths)]))


@given(texts, st.integers(3, 20))
def test_a_text_is_tokenised_alone_as_among_others(said, limit):
    """Between [CLS] and [SEP], and within the limit."""
    assume(is_utf_8(*said))
    tokenizer = tiny_tokenizer()
    together = tokenize(tokenizer, said, limit)
    assert len(together) == len(said)
    for i, one in enumerate(said):
        ids = together.ids[together.offsets[i] : together.offsets[i + 1]]
        assert ids.tolist() == tokenize(tokenizer, [one], limit).ids.tolist()
        assert 2 <= len(ids) <= limit
        assert (ids[0], ids[-1]) == (2, 3)


@given(lengths, st.integers(1, 40), seeds, st.integers(0, 1000))
def test_seed_and_epoch_decide_the_order_of_examples(lengths, size, seed, epoch):
    """Every example occurs once."""
    batches = training_batches(lengths, size, seed, epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)
    np.random.seed(epoch)  # no state of anybody's has a part in it
    again = training_batches(lengths, size, seed, epoch)
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]


@given(lengths, st.integers(1, 2000), st.integers(1, 5))
def test_shards_and_batches_have_every_example_once(lengths, tokens, world):
    """Batches stay within their bound on tokens."""
    everything = np.arange(len(lengths))
    shards = []
    for rank in range(world):
        processes = Distributed()
        processes.rank, processes.world_size = rank, world
        shards.append(processes.shard(everything))
    for batches, whole in [
        (shards, everything),
        (evaluation_batches(lengths, tokens), everything),
        *((micro_batches(lengths, shard, tokens), shard) for shard in shards),
    ]:
        assert sorted(np.concatenate([np.empty(0, int), *batches])) == sorted(whole)
        if batches is not shards:
            assert all(len(batch) * lengths[batch].max() <= tokens or len(batch) == 1 for batch in batches)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(lengths, st.data())
def test_the_mask_hides_all_padding(lengths, data):
    batch = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=20)))
    input_ids, mask = pad(as_texts(lengths), batch)
    assert input_ids.shape == mask.shape == (len(batch), lengths[batch].max())
    for i, row, seen in zip(batch, input_ids, mask, strict=True):
        assert row[seen].tolist() == [i + 1] * lengths[i]
        assert seen.tolist() == sorted(seen.tolist(), reverse=True)  # tokens first, then padding
        assert not row[~seen].any()


# Numbers


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_f1_is_that_of_scikit_learn(pairs):
    labels, predictions = np.array(pairs).T
    matrix = confusion_matrix(labels, predictions, 5)
    assert matrix.sum() == len(pairs)
    assert np.isclose(macro_f1(matrix), f1_score(labels, predictions, average="macro"), rtol=0, atol=1e-12)
    there = sorted({*labels, *predictions})
    theirs = f1_score(labels, predictions, average=None, labels=there)
    assert np.allclose(f1_per_class(matrix)[there], theirs, rtol=0, atol=1e-12)


@given(st.integers(1, 300), st.floats(0, 1))
def test_the_learning_rate_rises_then_falls(steps, warmup):
    rates = np.array([lr_multiplier(step, steps, warmup) for step in range(1, steps + 1)])
    assert ((rates > 0) & (rates <= 1)).all()
    top = int(rates.argmax())
    assert (np.diff(rates[: top + 1]) >= 0).all()
    assert (np.diff(rates[top:]) <= 0).all()


@settings(max_examples=20)
@given(st.floats(0, 0.95), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 1 << 32))
def test_dropout_keeps_the_expectation(p, dtype, seed):
    """All values that are kept have the same scale."""
    torch.manual_seed(seed)
    x = torch.ones(40_003, dtype=dtype)
    y = dropout(x, p).float()
    kept = y[y != 0]
    assert kept.unique().numel() == 1
    deviation = (p / (1 - p) / len(x)) ** 0.5
    rounding = 0.004 if dtype == torch.bfloat16 else 1e-4
    assert abs(y.mean().item() - 1) <= 5 * deviation + rounding
    assert torch.equal(dropout(x, p, training=False), x)
