"""A linear model of words: seconds of training, and the score that a fine-tuned model has to beat."""

from typing import Any

import numpy as np

from common.errors import UserError
from data import Split


def train_linear_model(train: Split, test: Split, class_weights: str = "none", seed: int = 0) -> tuple[np.ndarray, int]:
    """Words and pairs of words weighted by TF-IDF, and a linear SVM. `class_weights`: none or balanced.

    Returns the predicted class of each test text, and the number of trained parameters. Raises UserError without scikit-learn,
    and if the texts have no words.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.svm import LinearSVC
    except ModuleNotFoundError as error:
        raise UserError("a linear model needs scikit-learn: pip install scikit-learn") from error
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    class_weight = "balanced" if class_weights == "balanced" else None
    svm: Any = LinearSVC(class_weight=class_weight, random_state=seed % 2**32)  # the largest seed of scikit-learn
    try:
        features = vectorizer.fit_transform(train.texts)
    except ValueError as error:
        raise UserError(f"a linear model cannot be trained on these texts: {error}") from error
    svm.fit(features, train.labels)
    return svm.predict(vectorizer.transform(test.texts)), svm.coef_.size + svm.intercept_.size
