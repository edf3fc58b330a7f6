"""What Keras makes of a description says that it is not distributed any more.

In a file, or in what `serialize` and `get_compile_config` return, an optimizer is the
plain one, so that whoever has Keras can make it again. That it was distributed is in
the only part of its configuration that every Keras takes and none uses: its name. Keras
has no hook for what it makes, so `from_config` of its base class looks for the mark, in
processes that have imported this package.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import tensorflow as tf

_MARK = "_distributed_by_hvd_sparse"
_MADE = (
    "the optimizer that was loaded or copied was distributed and is not any more: load "
    "its model by hvd_sparse.tensorflow.load_model(path, sparsifier), or give it to "
    "DistributedOptimizer again, or ranks will train by themselves"
)
_expected: ContextVar[bool] = ContextVar("expected", default=False)


def marked(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an optimizer, as it goes into a file or to a copy."""
    if "inner_optimizer" in config:  # a LossScaleOptimizer, which may have no name
        inner = config["inner_optimizer"]
        return {
            **config,
            "inner_optimizer": {**inner, "config": marked(inner["config"])},
        }
    name = str(config.get("name", "optimizer")).removesuffix(_MARK)
    return {**config, "name": name + _MARK}


@contextlib.contextmanager
def expecting() -> Iterator[None]:
    """What is loaded inside is about to be distributed again: nothing to be said."""
    token = _expected.set(True)
    try:
        yield
    finally:
        _expected.reset(token)


@functools.cache
def watch_loading() -> None:
    """From now on."""
    legacy = getattr(tf.keras.optimizers, "legacy", None)
    for base in (tf.keras.optimizers.Optimizer, getattr(legacy, "Optimizer", None)):
        if hasattr(base, "from_config"):  # Keras 3 has a legacy one that only warns
            _watch(base)


def _watch(base: Any) -> None:
    plain = base.from_config.__func__

    @functools.wraps(plain)
    def from_config(cls: Any, config: Any, *arguments: Any, **options: Any) -> Any:
        name = str(config.get("name", ""))
        if name.endswith(_MARK):
            config = {**config, "name": name.removesuffix(_MARK)}
            if not _expected.get():
                warnings.warn(_MADE, stacklevel=2)
        return plain(cls, config, *arguments, **options)

    base.from_config = classmethod(from_config)
