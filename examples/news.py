"""A classifier from texts and labels in memory: the embedded sample of news. Each part can be a cell of a notebook.

python examples/news.py
"""

# %% a notebook in the clone's folder does not need this: it finds `train` there
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import load_dataset
from train import fit, load

# %% texts and labels, as lists; columns of a pandas table will do as well
news = load_dataset("sample")
texts, labels = news.train.texts, [news.label_names[i] for i in news.train.labels]
test_texts, test_labels = news.test.texts, [news.label_names[i] for i in news.test.labels]

# %% train on some, test on the others; the options are those of train.py
classifier = fit(texts, labels, test=(test_texts, test_labels), model="minilm", epochs=3)
print(classifier)

# %% label new text
new_texts = ["Oil prices rose on Monday", "The cup final, at last"]
print(classifier.predict(new_texts))
print(classifier.classes_)
print(classifier.predict_proba(new_texts).round(2))

# %% keep it, and load it again: tomorrow, or on another machine
folder = classifier.folder.with_name("news-classifier")
classifier.save(folder)
print(load(folder).predict(new_texts))
