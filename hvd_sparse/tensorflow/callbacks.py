"""Callbacks of model.fit, for Keras 2 and Keras 3, over Horovod and over plain MPI.

    callbacks = [
        sparse.TrafficLogger(compression),
        sparse.ResidualCheckpoint(compression, "run/epoch-{epoch}"),
        tf.keras.callbacks.TensorBoard("run"),
    ]

The first argument is what keeps the residuals: the SparseCompressor, or what
DistributedOptimizer or DistributedGradientTape returned.
"""

import glob
import re
from os import PathLike, fspath
from typing import Any, NamedTuple

import tensorflow as tf

from hvd_sparse.core.state import checkpoint_path, read_state, write_state
from hvd_sparse.core.traffic import Traffic

Logs = dict[str, Any] | None
_Callback: Any = tf.keras.callbacks.Callback  # TensorFlow has no types


class TrafficLogger(_Callback):  # type: ignore[misc]  # TensorFlow has no types
    """Adds what this rank sends to the logs of every batch and every epoch.

    `compression_ratio` is dense bytes / sent bytes, and `sent_bytes_per_step` is in
    bytes, both since the epoch began. They are missing while nothing was sent.

    Keras hands the same logs to one callback after the other, and puts its progress
    bar and History last. So list this before TensorBoard, CSVLogger and whatever else
    is to see the numbers.
    """

    def __init__(self, holder: Any) -> None:
        """Args: holder: what keeps the residuals, see the module.

        Raises:
            TypeError: it keeps none.
        """
        super().__init__()
        self._holder = _checked(holder)
        self._began = _Bytes(0, 0, 0)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Count from here."""
        self._began = _bytes_of(self._holder.traffic)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """For the progress bar."""
        self._add(logs)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """For History, TensorBoard, CSVLogger ..."""
        self._add(logs)

    def _add(self, logs: Logs) -> None:
        now = _bytes_of(self._holder.traffic)
        sent, dense, steps = (n - b for n, b in zip(now, self._began, strict=True))
        if logs is not None and sent and steps:
            logs["compression_ratio"] = dense / sent
            logs["sent_bytes_per_step"] = sent / steps


class ResidualCheckpoint(_Callback):  # type: ignore[misc]  # TensorFlow has no types
    """Saves each rank's residuals after every epoch; restores them in a restart.

    A restart is a `fit` of a new process whose first epoch is not 0: with
    `initial_epoch=` or BackupAndRestore. It then continues bitwise, if the model and
    its optimizer do. Every rank needs this callback, also where rank 0 alone saves the
    model. Gradients that `backward_passes_per_step` has not sent yet are not saved.
    """

    def __init__(self, holder: Any, prefix: str | PathLike[str]) -> None:
        """Decide where; nothing is read or written yet.

        Args:
            holder: what keeps the residuals, see the module.
            prefix: of the files, such as "run/epoch-{epoch}": {epoch} is the number of
                epochs done, as in ModelCheckpoint; without it each epoch replaces the
                one before. checkpoint_path(prefix, rank, size) names the files.

        Raises:
            TypeError: holder keeps no residuals.
            ValueError: prefix has another field than {epoch}.
        """
        super().__init__()
        self._holder = _checked(holder)
        self._prefix = fspath(prefix)
        try:
            self._prefix.format(epoch=0)
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"prefix can have the field {{epoch}} and no other, got {prefix!r}"
            ) from error
        self._trained = False

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Restore, where the first epoch of this process is not 0."""
        if epoch > 0 and not self._trained:
            self.restore(epoch)
        self._trained = True

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Save."""
        self.save(epoch + 1)

    def save(self, epoch: int) -> None:
        """Write this rank's file, all of it or nothing.

        Args:
            epoch: how many are done.
        """
        state = _state_of(self._holder)
        path = checkpoint_path(self._prefix_of(epoch), state["rank"], state["size"])
        write_state(path, {**state, "epoch": epoch})

    def restore(self, epoch: int) -> None:
        """Read what save wrote.

        Args:
            epoch: how many were done.

        Raises:
            FileNotFoundError: this rank's file is not there.
            ValueError: it is of another number of ranks, another epoch, another
                configuration or another model.
        """
        here = _state_of(self._holder)
        prefix, size = self._prefix_of(epoch), here["size"]
        path = checkpoint_path(prefix, here["rank"], size)
        try:
            state = read_state(path)
        except FileNotFoundError:
            sizes = _sizes_at(prefix)
            if not sizes:
                raise
            raise ValueError(
                f"{prefix}: residuals were saved by {sizes} ranks, expected {size}: "
                "each rank continues with its own, so start as many ranks, or train "
                "on without restoring residuals"
            ) from None
        if state["epoch"] != epoch:
            raise ValueError(
                f"{path}: residuals are those of epoch {state['epoch']}, expected "
                f"{epoch}: the model's checkpoint must be of the same epoch"
            )
        _load(self._holder, state)

    def _prefix_of(self, epoch: int) -> str:
        return self._prefix.format(epoch=epoch)


class _Bytes(NamedTuple):
    sent: int
    dense: int
    steps: int


def _bytes_of(traffic: Traffic) -> _Bytes:
    return _Bytes(traffic.sent_bytes, traffic.dense_bytes, traffic.steps)


def _checked(holder: Any) -> Any:
    if not isinstance(getattr(holder, "traffic", None), Traffic):
        kind = type(holder).__name__
        raise TypeError(
            "holder must be a SparseCompressor, or what DistributedOptimizer or "
            f"DistributedGradientTape returned, got {kind}"
        )
    return holder


def _state_of(holder: Any) -> dict[str, Any]:
    """The optimizers have a state_dict of their own, or Keras has it for them."""
    if hasattr(holder, "residual_state_dict"):
        return dict(holder.residual_state_dict())
    return dict(holder.state_dict())


def _load(holder: Any, state: dict[str, Any]) -> None:
    if hasattr(holder, "load_residual_state_dict"):
        holder.load_residual_state_dict(state)
    else:
        holder.load_state_dict(state)


def _sizes_at(prefix: str) -> str:
    """How many ranks saved files of this prefix, as text."""
    found = glob.glob(f"{glob.escape(prefix)}.residuals-*-of-*")
    matches = (re.search(r"-of-(\d+)$", path) for path in found)
    return " and ".join(sorted({match[1] for match in matches if match}))
