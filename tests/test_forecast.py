"""hvd_sparse.plan: what it says of a model is what a step of that model counts."""

import math
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hvd_sparse
import hvd_sparse.loopback
import hvd_sparse.mpi
from hvd_sparse import (
    CAT,
    Affine,
    BFloat16,
    EliasFano,
    Float16,
    Float32,
    Int4,
    Never,
    RandomK,
    RawIndices,
    Sign,
    SignTopK,
    Stochastic,
    Threshold,
    TopK,
    WhenCheaper,
)
from hvd_sparse.core.traffic import Traffic
from hvd_sparse.core.values import OURS, Values
from hvd_sparse.forecast import TrafficPlan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# a convolution, biases, what goes dense on many ranks, a scalar, and nothing
SHAPES = {
    "conv": (64, 3, 7, 7),
    "norm": (64,),
    "dense": (100, 300),
    "bias": (3,),
    "scale": (),
    "none": (0, 5),
}
VALUES = [kind() for kind in OURS]
INDICES = [None, EliasFano(), RawIndices()]
RULES = [WhenCheaper(), Never()]
SPARSIFIERS = [TopK(0.01), RandomK(0.01), SignTopK(0.01)]

CHOSEN = [
    *((sparsifier, None) for sparsifier in SPARSIFIERS),
    *((sparsifier, form) for sparsifier in SPARSIFIERS[:2] for form in VALUES),
    (SignTopK(0.01), Sign()),
]


def counted(
    gradients: Mapping[str, Any], sparsifier: Any, ranks: int, **options: Any
) -> Traffic:
    """What a rank counts for one step of these."""

    def step(comm: Any) -> Traffic:
        own = {name: gradient.copy() for name, gradient in gradients.items()}
        with hvd_sparse.mpi.SparseAllreduce(sparsifier, comm=comm, **options) as reduce:
            reduce.grouped_allreduce(own, out=own)
            return reduce.traffic

    return hvd_sparse.loopback.run(ranks, step)[0]


def noise(shapes: Mapping[str, tuple[int, ...]], *dtypes: str) -> dict[str, Any]:
    """Gradients of these shapes, the dtypes in turns."""
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal(shape).astype(dtypes[place % len(dtypes)])
        for place, (name, shape) in enumerate(shapes.items())
    }


def assert_told(plan: TrafficPlan, traffic: Traffic) -> None:
    """Byte for byte, tensor by tensor."""
    assert plan.sent_bytes == traffic.sent_bytes
    assert plan.dense_bytes == traffic.dense_bytes
    assert plan.compression_ratio == traffic.compression_ratio
    assert {row.name for row in plan.rows} == set(traffic.tensors)
    sparse = sorted(row.name for row in plan.rows if row.route == "sparse")
    for row in plan.rows:
        found = traffic.tensors[row.name]
        assert (row.route, row.k) == (found.route, found.sent_elements)
        assert row.bytes_dense == found.dense_bytes
        if row.name not in sparse[:1]:  # with which traffic counts what all share
            assert row.bytes_sent == found.sent_bytes


# ----------------------------------------------------------- it is what a step counts


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("dense", RULES, ids=repr)
@pytest.mark.parametrize("indices", INDICES, ids=repr)
@pytest.mark.parametrize(("sparsifier", "values"), CHOSEN, ids=repr)
def test_a_plan_is_what_a_step_counts(
    sparsifier: Any, values: Any, indices: Any, dense: Any, ranks: int
) -> None:
    gradients = noise(SHAPES, "float16", "float32", "float64")
    options = {"dense": dense, "values": values, "indices": indices}
    plan = hvd_sparse.plan(gradients, sparsifier, ranks=ranks, **options)
    assert_told(plan, counted(gradients, sparsifier, ranks, **options))
    routes = {row.route for row in plan.rows}
    assert routes == ({"sparse"} if dense == Never() else {"sparse", "dense"})


@settings(max_examples=20)
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1),
    st.sampled_from([0.001, 0.1, 1.0]),
    st.sampled_from(RULES),
)
def test_it_is_so_for_any_shapes(
    shapes: list[tuple[int, ...]], density: float, dense: Any
) -> None:
    named = {f"tensor {place}": shape for place, shape in enumerate(shapes)}
    traffic = counted(noise(named, "float32"), TopK(density), 2, dense=dense)
    for given_as in (shapes, named):
        assert_told(
            hvd_sparse.plan(given_as, TopK(density), ranks=2, dense=dense), traffic
        )


class Warming:
    """A density that falls with the steps."""

    density = 0.01

    def density_at(self, step: int) -> float:
        return 0.25 if step == 0 else self.density

    def select(self, residual: Any, gradient: Any, k: int, step: int) -> Any:
        return TopK().select(residual, gradient, k, step)


def test_of_a_schedule_it_tells_the_first_step() -> None:
    gradients = noise(SHAPES, "float32")
    plan = hvd_sparse.plan(gradients, Warming(), ranks=2)
    assert_told(plan, counted(gradients, Warming(), 2))


def test_bfloat16_of_torch_is_a_gradient_of_two_bytes() -> None:
    torch = pytest.importorskip("torch", reason="needs hvd-sparse[torch]")
    made = {n: torch.ones(s, dtype=torch.bfloat16) for n, s in SHAPES.items()}

    def step(comm: Any) -> Traffic:
        own = {name: gradient.clone() for name, gradient in made.items()}
        with hvd_sparse.mpi.SparseAllreduce(TopK(0.01), comm=comm) as reduce:
            reduce.grouped_allreduce(own, out=own)
            return reduce.traffic

    plan = hvd_sparse.plan(made, TopK(0.01), ranks=2)
    assert_told(plan, hvd_sparse.loopback.run(2, step)[0])
    assert {row.dtype for row in plan.rows} == {"bfloat16"}


def test_a_torch_optimizer_sends_as_much_from_its_second_step_on() -> None:
    """In the first, ranks tell each other which gradients are sparse already."""
    torch = pytest.importorskip("torch", reason="needs hvd-sparse[torch]")

    def model() -> Any:
        return torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 10))

    def train(comm: Any) -> list[int]:
        trained, sent = model(), []
        sgd = torch.optim.SGD(trained.parameters(), lr=0.1)
        optimizer = hvd_sparse.torch.DistributedOptimizer(sgd, TopK(0.01), comm=comm)
        for _ in range(3):
            trained(torch.ones(4, 300)).sum().backward()
            optimizer.step()
            sent.append(optimizer.traffic.sent_bytes)
        return sent

    first, second, third = hvd_sparse.loopback.run(2, train)[0]
    plan = hvd_sparse.plan(model(), TopK(0.01), ranks=2)
    assert third - second == second - first == plan.sent_bytes


# ------------------------------------------------------ where ranks choose

VARYING = [
    Threshold(0.5),
    Stochastic(expected_density=0.05),
    CAT(TopK(), Affine(per_byte=1.0, per_message=54.0)),
    SignTopK.alistarh(),
]


@pytest.mark.parametrize("dense", RULES, ids=repr)
@pytest.mark.parametrize("sparsifier", VARYING, ids=lambda s: type(s).__name__)
def test_no_more_than_it_says_is_sent(sparsifier: Any, dense: Any) -> None:
    gradients = noise(SHAPES, "float32")
    plan = hvd_sparse.plan(gradients, sparsifier, ranks=4, dense=dense)
    traffic = counted(gradients, sparsifier, 4, dense=dense)
    assert traffic.sent_bytes <= plan.sent_bytes
    assert plan.varies
    for row in plan.rows:
        assert row.varies == (row.route == "sparse")
        assert traffic.tensors[row.name].sent_elements <= row.k


def test_where_all_that_may_be_is_sent_it_is_exact() -> None:
    gradients = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    plan = hvd_sparse.plan(gradients, Threshold(0.5), ranks=4)
    assert_told(plan, counted(gradients, Threshold(0.5), 4))


# ------------------------------------------------------------------ what a model may be


def test_of_a_torch_model_what_is_trained_counts() -> None:
    torch = pytest.importorskip("torch", reason="needs hvd-sparse[torch]")
    model = torch.nn.Sequential(
        torch.nn.Linear(30, 20), torch.nn.BatchNorm1d(20), torch.nn.Linear(20, 10)
    )
    model[0].weight.requires_grad_(False)
    model[2].to(torch.float16)
    plan = hvd_sparse.plan(model, TopK(0.1))
    assert [(row.name, row.shape, row.dtype) for row in plan.rows] == [
        ("0.bias", (20,), "float32"),
        ("1.weight", (20,), "float32"),
        ("1.bias", (20,), "float32"),
        ("2.weight", (10, 20), "float16"),
        ("2.bias", (10,), "float16"),
    ]
    assert plan.dense_bytes == 3 * 80 + 2 * 210


class Variable:
    """Of Keras 2."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype


class PlacedVariable(Variable):
    """Of Keras 3."""

    @property
    def path(self) -> str:
        return f"layer/{self.name}"


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        (Variable("layer/kernel:0", (8, 4), "<dtype: 'bfloat16'>"), "layer/kernel"),
        (PlacedVariable("kernel", (8, 4), "bfloat16"), "layer/kernel"),
    ],
)
def test_of_a_keras_model_what_is_trained_counts(variable: Variable, name: str) -> None:
    class Model:
        trainable_variables = [variable]  # noqa: RUF012  # as Keras has it

    (row,) = hvd_sparse.plan(Model(), TopK(0.1)).rows
    assert (row.name, row.shape, row.dtype) == (name, (8, 4), "bfloat16")


def test_a_real_keras_model_is_understood() -> None:
    tf = pytest.importorskip("tensorflow", reason="needs hvd-sparse[tensorflow]")
    layers = [tf.keras.layers.Dense(5, input_shape=(7,)), tf.keras.layers.Dense(2)]
    layers[1].trainable = False
    model = tf.keras.Sequential(layers)
    plan = hvd_sparse.plan(model, TopK(0.1))
    assert [(row.shape, row.dtype) for row in plan.rows] == [
        ((7, 5), "float32"),
        ((5,), "float32"),
    ]


def test_a_plan_of_shapes_imports_no_framework_and_no_mpi() -> None:
    script = (
        "import sys, hvd_sparse; hvd_sparse.plan([(3, 4)], hvd_sparse.TopK()); "
        "print(*{'torch', 'tensorflow', 'keras', 'mpi4py', 'horovod'} & {*sys.modules})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "")


@pytest.mark.parametrize(
    "model", [None, 7, "model.pt", b"", np.zeros(3), Variable, iter([(3,)]), {(3, 4)}]
)
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"^model_or_shapes must be shapes or arrays"):
        hvd_sparse.plan(model, TopK())


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({}, ValueError, "model_or_shapes must have trainable tensors, got dict"),
        ([], ValueError, "model_or_shapes must have trainable tensors, got list"),
        ({3: (4,)}, TypeError, "names must be str, got 3"),
        ({"w": 4}, TypeError, "w: must be a shape or an array, got 4"),
        ((3, 4), TypeError, "tensor 0: must be a shape or an array, got 3"),
        ({"w": (4, 0.5)}, TypeError, r"w: shape must be integers, got \(4, 0.5\)"),
        ({"w": (4, -1)}, ValueError, r"w: shape must not be negative, got \(4, -1\)"),
        ({"w": (2**16, 2**16)}, ValueError, "w: gradient must have at most"),
        ({"w": np.zeros(3, int)}, TypeError, "w: gradient must be one of .* got int64"),
    ],
)
def test_what_can_not_be_sent_is_refused(
    model: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        hvd_sparse.plan(model, TopK())


@pytest.mark.parametrize("ranks", [0, -1])
def test_there_is_no_job_without_ranks(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"ranks must be positive, got {ranks}"):
        hvd_sparse.plan(SHAPES, TopK(), ranks=ranks)


def test_what_an_integration_refuses_is_refused() -> None:
    with pytest.raises(TypeError, match="sparsifier must have a select method"):
        hvd_sparse.plan(SHAPES, TopK)
    with pytest.raises(ValueError, match="values must be Sign"):
        hvd_sparse.plan(SHAPES, SignTopK(), values=Float16())
    with pytest.raises(TypeError, match="indices must be EliasFano"):
        hvd_sparse.plan(SHAPES, TopK(), indices=Float16())


# ------------------------------------------------------------------------------ as text


def test_a_long_table_is_told_whole_and_in_columns() -> None:
    plan = hvd_sparse.plan([(100 * place,) for place in range(1, 200)], TopK(0.01))
    *table, empty, told, ratio = str(plan).splitlines()
    assert len(table) == 1 + 199 + 2
    assert [line.split()[1] for line in table[1:200]] == [str(i) for i in range(199)]
    assert len({len(line) for line in table[:200]}) == 1
    assert empty == ""
    assert f"{plan.sent_bytes:,} bytes sent" in told
    assert ratio == f"compression ratio {plan.compression_ratio:,.1f}"


def test_what_adds_up_adds_up_to_the_total() -> None:
    plan = hvd_sparse.plan(SHAPES, TopK(0.01))
    sent = sum(row.bytes_sent for row in plan.rows) + plan.overhead_bytes
    assert plan.sent_bytes == sent
    assert plan.dense_bytes == 4 * sum(math.prod(shape) for shape in SHAPES.values())
    total = next(t for t in str(plan).splitlines() if t.startswith("total"))
    assert total.split()[-2:] == [f"{plan.dense_bytes:,}", f"{sent:,}"]


def test_what_may_be_less_is_told_as_such() -> None:
    lines = str(hvd_sparse.plan({"w": (1000,)}, Threshold(1.0), dense=Never()))
    assert "<= 1,000" in lines
    assert "at most" in lines
    assert "compression ratio at least" in lines


@pytest.mark.parametrize(
    ("sparsifier", "options", "text"),
    [
        (TopK(0.01), {}, "Float32, EliasFano"),
        (TopK(0.01), {"values": Float16()}, "Float16, EliasFano"),
        (TopK(0.01), {"indices": RawIndices()}, "Float32, RawIndices"),
        (RandomK(0.01), {"values": Int4()}, "Int4, no indices"),
        (SignTopK(0.01), {}, "Sign, EliasFano"),
    ],
)
def test_a_format_is_told_by_its_parts(
    sparsifier: Any, options: dict[str, Any], text: str
) -> None:
    (row,) = hvd_sparse.plan({"w": (10_000,)}, sparsifier, **options).rows
    assert row.format == text


@pytest.mark.parametrize(
    ("values", "times"),
    [(Float32(), 700), (Float16(), 1120), (BFloat16(), 1120), (Sign(), 2300)],
    ids=repr,
)
def test_resnet_50_takes_three_orders_of_magnitude_less(
    values: Values, times: int
) -> None:
    planned = hvd_sparse.plan(resnet_50(), TopK(0.001), values=values)
    assert planned.compression_ratio >= times
    assert planned.overhead_bytes <= 64 + len(planned.rows)


def resnet_50() -> list[tuple[int, ...]]:
    """Shapes of its 161 parameters, as benchmarks/resnet50.py has them."""
    spec = spec_from_file_location("resnet50", BENCHMARKS / "resnet50.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes: list[tuple[int, ...]] = module.shapes()
    return shapes


def test_elements_are_counted_without_end() -> None:
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1 elements"):
        hvd_sparse.plan({"a": (2**40, 2**40)}, TopK(0.01))
