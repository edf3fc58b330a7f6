"""What the two Keras examples share: scikit-learn's digits, a network, a table."""

import argparse
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BATCH = 32  # images per rank

Split = tuple[np.ndarray, np.ndarray]  # (n, 8, 8, 1) float32 images, (n,) digits


class Outcome(NamedTuple):
    """A trained model, its last loss, and the bytes that a rank sends per step."""

    model: tf.keras.Model
    loss: float
    sent_bytes: float


def arguments(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.01, help="in (0, 1]")
    parser.add_argument("--epochs", type=int, default=20)
    return parser.parse_args()


def read_digits() -> tuple[Split, Split]:
    """Two thirds for training, one third for testing; the same split every time."""
    digits = load_digits()
    images = digits.images[..., None].astype(np.float32) / 16
    train, test = train_test_split(
        range(len(images)), test_size=1 / 3, random_state=0, stratify=digits.target
    )
    return (images[train], digits.target[train]), (images[test], digits.target[test])


def part_of(split: Split, rank: int, size: int) -> Split:
    """One rank's images: as many on every rank, so that all take as many steps."""
    even = len(split[0]) // size * size
    return split[0][rank:even:size], split[1][rank:even:size]


def network() -> tf.keras.Model:
    """55 thousand parameters, the same at first on every rank and in every run."""
    tf.keras.utils.set_random_seed(0)
    layers = tf.keras.layers
    return tf.keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def sgd(images: int, epochs: int) -> tf.keras.optimizers.Optimizer:
    """Its learning rate falls linearly to zero."""
    steps = epochs * -(-images // BATCH)
    rate = tf.keras.optimizers.schedules.PolynomialDecay(0.2, steps, 0.0)
    return tf.keras.optimizers.SGD(rate, momentum=0.5)


def dense_bytes(model: tf.keras.Model) -> int:
    """Of all gradients of a step."""
    return sum(4 * int(np.prod(w.shape)) for w in model.trainable_weights)


def report(dense: Outcome, thin: Outcome, test: Split, density: float) -> None:
    def accuracy(outcome: Outcome) -> float:
        guesses = outcome.model.predict(test[0], verbose=0).argmax(axis=1)
        return float((guesses == test[1]).mean())

    ratio = dense.sent_bytes / thin.sent_bytes
    print(f"{'':20} {'dense':>9}  density {density:g}")
    print(f"training loss        {dense.loss:9.4f}  {thin.loss:.4f}")
    print(f"test accuracy        {accuracy(dense):9.2%}  {accuracy(thin):.2%}")
    print(f"bytes sent per step  {dense.sent_bytes:9,.0f}  {thin.sent_bytes:,.0f}")
    print(f"compression ratio    {1:9.1f}  {ratio:.1f}")
