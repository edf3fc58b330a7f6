"""`values=`: how values travel, whatever selects them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from laws import (
    AFFINE,
    DTYPES,
    FORMATS,
    VALUES,
    Ranks,
    TakesTurns,
    loopback,
    same_bits,
    send,
    wide,
)

from hvd_sparse import (
    CAT,
    BFloat16,
    EliasFano,
    Float32,
    Int8,
    Never,
    PayloadError,
    RandomK,
    RawIndices,
    Sign,
    SignTopK,
    Stochastic,
    Sum,
    Threshold,
    TopK,
)
from hvd_sparse.core.formats import Entries
from hvd_sparse.core.indices import KnownIndices
from hvd_sparse.core.memory import ErrorFeedback
from hvd_sparse.core.path import GradientPath

RANKS = 3
STEPS = 5
N = 300


def gradients(dtype: str, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(N).astype(DTYPES[dtype]) for _ in range(RANKS)]


def values_of_one_size(sent: np.ndarray) -> bool:
    return np.unique(np.abs(sent)).size <= 1


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_sign_top_k_is_top_k_with_signs(dtype: str) -> None:
    one, other = Ranks(RANKS, SignTopK(0.1)), Ranks(RANKS, TopK(0.1), values=Sign())
    for step in range(STEPS):
        given = gradients(dtype, step)
        for a, b in zip(one.step(given), other.step(given), strict=True):
            same_bits(a, b)
        for a, b in zip(one.residuals(), other.residuals(), strict=True):
            same_bits(a, b)
    assert [p.traffic.sent_bytes for p in one.paths] == [
        p.traffic.sent_bytes for p in other.paths
    ]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(
    "sparsifier", [TopK(0.1), RandomK(0.1), Threshold(1.0), TakesTurns(7)], ids=repr
)
@pytest.mark.parametrize("indices", [EliasFano(), RawIndices()], ids=repr)
@pytest.mark.parametrize("values", VALUES, ids=repr)
def test_nothing_is_lost_however_it_travels(
    values: Any, indices: Any, sparsifier: Any, dtype: str
) -> None:
    ranks = Ranks(RANKS, sparsifier, values=values, indices=indices)
    kept = [np.zeros(N, wide(DTYPES[dtype]))] * RANKS
    for step in range(STEPS):
        given = gradients(dtype, step)
        ranks.step(given)
        ranks.assert_all_went_sparse()
        for rank, sent in enumerate(ranks.sent):
            total = kept[rank] + given[rank].astype(kept[rank].dtype)
            assert values != Sign() or values_of_one_size(sent.values)
            expected = total.copy()
            # of signs the sum of both is not exact, as no sum of floats is
            expected[sent.indices] = total[sent.indices] - sent.values
            same_bits(ranks.residuals()[rank], expected)
            if values != Sign():
                exact = expected.astype(np.longdouble)
                exact[sent.indices] += sent.values
                np.testing.assert_array_equal(exact, total.astype(np.longdouble))
        kept = ranks.residuals()


@pytest.mark.parametrize(
    ("sparsifier", "values"),
    [
        (SignTopK(0.1), Float32()),
        (SignTopK.alistarh(), Float32()),
        (Stochastic(0.1), Sign()),
        (CAT(TopK(), AFFINE), Sign()),
        (CAT(SignTopK(), AFFINE), Float32()),
    ],
    ids=repr,
)
def test_what_is_made_for_other_values_is_refused(
    sparsifier: Any, values: Float32 | Sign
) -> None:
    [exchange] = loopback(1)
    with pytest.raises(ValueError, match=r"^values must be .*, which .* is made for"):
        GradientPath(sparsifier, exchange, values=values)


@pytest.mark.parametrize("values", [Sign, "sign", 3])
def test_what_is_no_format_is_refused(values: Any) -> None:
    [exchange] = loopback(1)
    with pytest.raises(TypeError, match=r"^values must be Float32\(\) or another"):
        GradientPath(TopK(0.1), exchange, values=values)


@dataclass(frozen=True)
class Halves:
    """A user's own: float16 values, then indices; `wrong` is what it gets wrong."""

    wrong: str = ""
    layout = 201

    def bytes(self, k: Any, dtype: str, n: int) -> Any:
        return 6 * k

    def most(self, size: Any, dtype: str, n: int) -> Any:
        return size // 6 - (self.wrong == "most")

    def write(self, out: Any, indices: Any, values: Any, n: int) -> Any:
        if self.wrong == "in place":
            values *= 2
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float16)
        out[: rounded.nbytes] = rounded.view(np.uint8)
        out[rounded.nbytes :][: indices.nbytes] = indices.view(np.uint8)
        return values if self.wrong == "rounding" else rounded.astype(values.dtype)

    def read(self, data: Any, k: int, dtype: str, n: int) -> Any:
        kind = np.float64 if dtype == "float64" else np.float32
        if self.wrong == "dtype":
            kind = np.float16
        if self.wrong == "later" and k not in (0, 3):
            k -= 1
        if self.wrong == "wide later" and k not in (0, 3):
            kind = np.float16
        values = data[: 2 * k].view(np.float16).astype(kind)
        if self.wrong == "list":
            return [2, 3, 65_536], values
        indices = data[2 * k :][: 4 * k].copy().view(np.int32)
        if self.wrong == "none later" and k not in (0, 3):
            return indices[:0], values
        if self.wrong == "":  # as of records: neither lies side by side
            pairs = np.zeros(k, [("v", kind), ("i", np.int32)])
            pairs["v"], pairs["i"] = values, indices
            return pairs["i"], pairs["v"]
        return indices, values

    def without_indices(self) -> Any:
        raise ValueError("values=Halves() needs indices that travel")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("most", r"18 bytes of 3 entries must have room for 3, got 2"),
        ("rounding", r"read must give the values that were written, expected .*got"),
        ("dtype", r"values must be an array of float32, got .*float16"),
        ("list", r"indices must be an array of int32, got \[2, 3, 65536\]"),
        ("in place", r"read-only"),
    ],
)
def test_a_format_that_breaks_its_promises_is_refused(wrong: str, said: str) -> None:
    [exchange] = loopback(1)
    with pytest.raises(ValueError, match=said):
        GradientPath(TopK(0.1), exchange, values=Halves(wrong))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("later", r"must give 30 entries, .*got \(29,\) int32 and \(29,\) float32"),
        ("wide later", r"must give 30 entries, .*got \(30,\) int32 and .* float16"),
        ("none later", r"read must give 30 indices, got 0"),
    ],
)
def test_a_format_that_reads_something_else_later_is_found_out(
    wrong: str, said: str
) -> None:
    """In each step: what can not be put back does not stop the next one."""
    [end] = loopback(1)
    path = GradientPath(TopK(0.1), end, dense=Never(), values=Halves(wrong))
    for _ in range(2):
        flight = send(path, np.ones(N, np.float32))
        with pytest.raises(PayloadError, match=said):
            path.receive([flight], [np.empty(N, np.float32)])


def test_a_finite_value_that_a_format_makes_infinite_is_refused() -> None:
    [end] = loopback(1)
    path = GradientPath(TopK(0.1), end, dense=Never(), values=Halves())
    gradient = np.full(N, 1e6, np.float32)
    with pytest.raises(ValueError, match=r"^Halves\(.*write must give finite values"):
        send(path, gradient)
    same_bits(path.memory.residuals["w"], gradient)


def test_a_format_of_ones_own_has_a_number_of_its_own() -> None:
    class Taken(Halves):
        layout = 3

    [end] = loopback(1)
    with pytest.raises(ValueError, match=r"layout must be .* at least 128, got 3"):
        GradientPath(TopK(0.1), end, values=Taken())


def test_without_indices_must_be_a_format() -> None:
    class Nothing(Halves):
        def without_indices(self) -> Any:
            return None

    [end] = loopback(1)
    with pytest.raises(TypeError, match=r"must give a Format, got None"):
        GradientPath(RandomK(0.1), end, values=Nothing())


def test_a_format_may_become_another_of_the_same_name() -> None:
    """As where a cell of a notebook runs again."""
    for beside in (0, 4):

        class Mine(Halves):
            def bytes(self, k: Any, dtype: str, n: int, beside: int = beside) -> Any:
                return 6 * k + beside

        ranks = Ranks(RANKS, TopK(0.1), values=Mine())
        ranks.step(gradients("float32"))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("sparsifier", [TopK(0.1), Threshold(0.5)], ids=repr)
def test_a_format_of_ones_own_loses_nothing(sparsifier: Any, dtype: str) -> None:
    """Small whole numbers and halves of them: sums are exact in every dtype."""
    ranks = Ranks(RANKS, sparsifier, op=Sum, values=Halves())
    given = [np.arange(N) % 7 * 0.5 - rank for rank in range(RANKS)]
    given = [array.astype(DTYPES[dtype]) for array in given]
    total = np.zeros(N)
    for _ in range(STEPS):
        total += np.asarray(ranks.step(given)[0], np.float64)
    for residual in ranks.residuals():
        total += residual
    expected = STEPS * sum(array.astype(np.float64) for array in given)
    np.testing.assert_array_equal(total, expected)


class Mixed(RandomK):
    """Another one for some tensors, whose indices travel, or whose values are signs."""

    def for_tensor(self, name: str) -> Any:
        kinds = {"top": TopK(0.1), "signs": SignTopK(0.1)}
        return kinds.get(name) or super().for_tensor(name)


def test_a_tensor_goes_as_its_own_sparsifier_says() -> None:
    ranks = Ranks(RANKS, Mixed(0.1))
    alike = {"top": TopK(0.1), "signs": SignTopK(0.1), "w": RandomK(0.1)}
    for name, sparsifier in alike.items():
        given, alone = gradients("float32"), Ranks(RANKS, sparsifier)
        for a, b in zip(ranks.step(given, name), alone.step(given, name), strict=True):
            same_bits(a, b)
        for a, b in zip(ranks.residuals(name), alone.residuals(name), strict=True):
            same_bits(a, b)
        mine, theirs = (r.paths[0].traffic.tensors[name] for r in (ranks, alone))
        assert mine.sent_bytes == theirs.sent_bytes


class Logged:
    """Hands on what it has not to what is inside."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def select(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.inner.select(*arguments)


def test_what_is_handed_on_to_a_sparsifier_inside_is_seen() -> None:
    ranks = Ranks(1, Logged(TopK(0.1)))
    ranks.step(gradients("float32")[:1])
    assert len(ranks.sent[0].values) == N // 10
    assert ranks.paths[0].plan.sparsifier.calls == 1


def test_ranks_whose_values_differ_are_told() -> None:
    ends = loopback(2)
    paths = [
        GradientPath(TopK(0.1), end, values=values)
        for end, values in zip(ends, (None, Sign()), strict=True)
    ]
    flights = [send(path, np.ones(N, np.float32)) for path in paths]
    for path, flight in zip(paths, flights, strict=True):
        with pytest.raises(PayloadError, match=r"w: rank \d: digest \d+, expected \d+"):
            path.receive([flight], [np.empty(N, np.float32)])


def test_what_says_nothing_new_is_not_part_of_the_configuration() -> None:
    """So that states of releases without `values=` still load."""
    [exchange] = loopback(1)
    for sparsifier, values in ((TopK(0.1), Float32()), (SignTopK(0.1), Sign())):
        said = GradientPath(sparsifier, exchange, values=values)
        silent = GradientPath(sparsifier, exchange)
        assert said.plan.configuration == silent.plan.configuration
    signs = GradientPath(TopK(0.1), exchange, values=Sign())
    assert signs.plan.configuration.endswith(", values=Sign()")


@pytest.mark.parametrize("form", FORMATS.values(), ids=repr)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_formats_keep_their_promises(form: Entries, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for k in (0, 1, 7, 100):
        indices = np.sort(rng.choice(N, k, replace=False)).astype(np.int32)
        values = rng.standard_normal(k).astype(wide(DTYPES[dtype]))
        out = np.full(form.bytes(k, dtype, N), 0xEE, np.uint8)
        sent = form.write(out, indices, values, N)
        found_indices, found_values = form.read(out, k, dtype, N)
        same_bits(found_values, sent)
        known = form.indices == KnownIndices()  # of which none travels
        same_bits(found_indices, indices[:0] if known else indices)
        most = form.most(out.size, dtype, N)
        assert form.bytes(most, dtype, N) <= out.size
        assert form.bytes(most + 1, dtype, N) > out.size
        assert most >= k
    assert form.most(form.bytes(0, dtype, N) - 1, dtype, N) < 0


def test_a_scale_is_the_mean_magnitude() -> None:
    values = np.array([3.0, -1.0, 0.0, -6.0], np.float32)
    form = Entries(Sign())
    out = np.empty(form.bytes(4, "float32", N), np.uint8)
    sent = form.write(out, np.arange(4, dtype=np.int32), values, N)
    assert sent.tolist() == [2.5, -2.5, 2.5, -2.5]
    assert math.isclose(np.abs(sent - values).sum(), 0.5 + 1.5 + 2.5 + 3.5)


class Larger(Float32):
    """Made from one of ours, which its numbers are not."""

    layout = 200

    def bytes(self, k: Any, dtype: str) -> Any:
        return 9 * k


class Fewer(EliasFano):
    """Made from one of ours."""


@dataclass(frozen=True)
class Other(Entries):
    """The same of both, by its own hand."""

    def write(self, out: Any, indices: Any, values: Any, n: int) -> Any:
        return super().write(out, indices, 2 * values, n)


def test_what_inherits_from_a_format_of_ours_is_never_taken_for_it() -> None:
    [exchange] = loopback(1)
    with pytest.raises(
        TypeError, match=r"^values must be a format of hvd_sparse itself"
    ):
        GradientPath(TopK(0.1), exchange, values=Larger())
    with pytest.raises(ValueError, match="layout must be an int of at least 128"):
        GradientPath(TopK(0.1), exchange, values=Other(Float32()))
    for parts in ((Larger(),), (Sign(), Fewer())):
        with pytest.raises(
            TypeError, match="must be formats of hvd_sparse itself, got"
        ):
            Entries(*parts)
    with pytest.raises(TypeError, match=r"^indices must be EliasFano\(\) or RawInd"):
        GradientPath(TopK(0.1), exchange, indices=Fewer())


class Handing:
    """A memory that hands on what it has not to the one inside."""

    def __init__(self) -> None:
        self.inner = ErrorFeedback()
        self.kept: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Counting(Handing):
    """The same, but for what rounding takes."""

    def keep(self, name: str, indices: Any, rest: Any) -> None:
        self.kept.append(name)
        self.inner.keep(name, indices, rest)


@pytest.mark.parametrize("values", [None, Float32(), Sign(), Int8()], ids=repr)
@pytest.mark.parametrize("kind", [Handing, Counting])
def test_a_memory_of_ones_own_is_asked_to_keep(kind: Any, values: Any) -> None:
    [exchange] = loopback(1)
    memory = kind()
    path = GradientPath(
        TopK(0.1), exchange, dense=Never(), values=values, memory=memory
    )
    given = {name: gradients("float32", seed)[0] for seed, name in enumerate("ab")}
    path.receive(path.send(given), [np.empty(N, np.float32) for _ in given])
    rounds = values in (Sign(), Int8())
    assert memory.kept == (["a", "b"] if kind is Counting and rounds else [])


def test_what_is_far_beyond_the_range_of_a_format_stays() -> None:
    values = np.array([1e300, -1e60, 1e52, 3e38, 1.0])
    form = Entries(BFloat16())
    out = np.empty(form.bytes(5, "float64", N), np.uint8)
    sent = form.write(out, np.arange(5, dtype=np.int32), values, N)
    assert (values - sent + sent == values).all()
    assert sent[:2].tolist() == [0, 0]
    assert sent[3] == pytest.approx(3e38, rel=2**-8)
