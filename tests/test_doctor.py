"""python -m hvd_sparse.doctor: alone, under real launchers, and what it predicts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import (
    START_S,
    Ended,
    horovodrun,
    mpi_command,
    needs_horovodrun,
    needs_mpirun,
    run,
)

import hvd_sparse
from hvd_sparse import BFloat16, EliasFano, Float16, Int4, Int8, RawIndices, TopK
from hvd_sparse.core.shapes import Shaped
from hvd_sparse.doctor import installed
from hvd_sparse.doctor.__main__ import main, parse
from hvd_sparse.doctor.local import Local, measure_local
from hvd_sparse.doctor.model import tensors_in, tensors_of, weights_in
from hvd_sparse.doctor.network import LARGEST, Collective, Network, measure_network
from hvd_sparse.doctor.prediction import PAYS, Prediction, predict, verdict
from hvd_sparse.doctor.report import _predictions
from hvd_sparse.doctor.traffic import INDICES, VALUES
from hvd_sparse.doctor.transport import Transport, found_door
from hvd_sparse.transport.mpi.communicator import LAUNCHER_VARIABLES

LIMIT_S = 60 + START_S
DOCTOR = [sys.executable, "-m", "hvd_sparse.doctor", "--parameters", "2000000"]


def examined(launcher: list[str], file: Path, *options: str) -> tuple[Ended, dict]:
    job = run([*launcher, *DOCTOR, "--json", str(file), *options], LIMIT_S)
    assert job.code == 0, job.errors
    assert "Warning" not in job.errors
    return job, json.loads(file.read_text())


def is_whole(found: dict, ranks: int, carrier: str) -> bool:
    assert found["job"]["ranks"] == ranks
    assert found["job"]["carried by"] == carrier
    assert found["model"]["parameters"] == 2_000_000
    methods = [(row["method"], row["density"]) for row in found["predictions"]]
    assert methods == [
        ("dense", None),
        ("fp16", None),
        ("sparse", 0.01),
        ("sparse", 0.001),
    ]
    assert all(row["seconds"] > 0 for row in found["predictions"])
    return found["verdict"].startswith("Sparsification will ")


# ------------------------------------------------------------------ real launchers


@pytest.mark.jobs
def test_alone_it_says_what_is_installed_and_how_to_learn_more(tmp_path: Path) -> None:
    job, found = examined([], tmp_path / "found.json")
    assert found["installed"]["numpy"] == np.__version__
    assert found["mpi"]["vendor"].startswith("Open MPI")
    assert "predictions" not in found
    assert "mpirun -np 2 python -m hvd_sparse.doctor" in job.output


@needs_mpirun
@pytest.mark.jobs
def test_under_mpirun_it_measures_the_job(tmp_path: Path) -> None:
    launcher = mpi_command(2)
    job, found = examined(launcher, tmp_path / "found.json")
    assert is_whole(found, 2, "MPI")
    assert job.output.count(found["verdict"]) == 1  # one rank reports
    assert "step_s" not in found["predictions"][0]


@needs_mpirun
@pytest.mark.jobs
def test_json_without_a_file_is_all_that_is_printed() -> None:
    launcher = mpi_command(2)
    job = run([*launcher, *DOCTOR, "--compute-s", "0.2", "--json"], LIMIT_S)
    assert job.code == 0, job.errors
    found = json.loads(job.output)
    assert is_whole(found, 2, "MPI")
    for row in found["predictions"]:
        assert row["step_s"] == pytest.approx(0.2 + row["seconds"])


@needs_mpirun
@pytest.mark.jobs
def test_a_job_predicts_the_formats_that_it_is_asked_for() -> None:
    asked = ["--values", "Int8", "--indices", "RawIndices", "--density", "0.01"]
    job = run([*mpi_command(2), *DOCTOR, *asked, "--json"], LIMIT_S)
    assert job.code == 0, job.errors
    formats = {"values": Int8(), "indices": RawIndices()}
    shapes = [(size,) for size in tensors_of(2_000_000)]
    plan = hvd_sparse.plan(shapes, TopK(density=0.01), ranks=2, **formats)
    sparse = json.loads(job.output)["predictions"][-1]
    assert sparse["bytes"] == sum(row.bytes_sent for row in plan.rows)


def test_a_step_is_told_in_the_table_where_it_is_known() -> None:
    rows = [row._asdict() for row in predict([25_000_000], network(1000), LOCAL)]
    for compute_s in (None, 0.2):
        known = {} if compute_s is None else {"step_s": compute_s}
        table = _predictions({"parameters": 25_000_000}, [{**r, **known} for r in rows])
        assert ("whole step, ms" in table[1]) == (compute_s is not None)
        assert len({len(line) for line in table[1:]}) == 1  # columns are aligned


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan", "soon"])
def test_a_compute_time_that_is_none_is_refused(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--compute-s", seconds])
    told = f"--compute-s: must be a positive number, got {seconds}"
    assert told in capsys.readouterr().err


@needs_horovodrun
@pytest.mark.jobs
def test_controllers_and_operations_are_those_of_check_build() -> None:
    built = run([str(horovodrun), "--check-build"], LIMIT_S).output
    controllers, operations = built.split("Available")[2:4]
    found = installed.horovod()
    assert found["controllers"] == re.findall(r"\[X\] (\w+)", controllers)
    assert found["operations"] == re.findall(r"\[X\] (\w+)", operations)


@needs_horovodrun
@pytest.mark.jobs
@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_under_horovodrun_it_measures_the_job(transport: str, tmp_path: Path) -> None:
    launcher = [str(horovodrun), "-np", "2", "-H", "localhost:2", f"--{transport}"]
    options = []
    if transport == "mpi":
        launcher += ["--binding-args=--bind-to none --map-by slot --oversubscribe"]
        options = ["--door", "horovod"]  # looks like mpirun
    _, found = examined(launcher, tmp_path / "found.json", *options)
    names = {"gloo": "Horovod over Gloo", "mpi": "Horovod over MPI"}
    assert is_whole(found, 2, names[transport])
    assert bool(found["mpi"]) == (transport == "mpi")  # Gloo workers start no MPI


@pytest.mark.jobs
@pytest.mark.parametrize("hidden", ["rich", "torch", "horovod", "mpi4py"])
def test_without_a_package_it_still_reports(hidden: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {hidden!r}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        f"util.find_spec = lambda n, p=None: None if n == {hidden!r} else found(n, p)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    done = subprocess.run(
        DOCTOR,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert "installed" in done.stdout


@pytest.mark.jobs
def test_the_package_itself_is_the_doctor() -> None:
    done = run([sys.executable, "-m", "hvd_sparse"], LIMIT_S)
    assert done.code == 0, done.errors
    assert f"hvd_sparse  {hvd_sparse.__version__}" in done.output
    assert "python -m hvd_sparse.doctor" in done.output


@needs_mpirun
@pytest.mark.jobs
@pytest.mark.parametrize("content", [None, b"no archive"])
def test_a_checkpoint_that_can_not_be_read_is_named(
    content: bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / "model.npz"
    if content is not None:
        file.write_bytes(content)
    launcher = mpi_command(2)
    job = run([*launcher, *DOCTOR[:3], "--checkpoint", str(file)], LIMIT_S)
    assert job.code != 0
    assert str(file) in job.errors
    assert "Traceback" not in job.errors


@needs_mpirun
@pytest.mark.jobs
def test_only_the_first_rank_needs_the_checkpoint(tmp_path: Path) -> None:
    for host in ("first", "second"):
        (tmp_path / host).mkdir()
    np.savez(tmp_path / "first" / "model.npz", a=np.zeros(50_000, np.float32))
    report = tmp_path / "found.json"
    program = [*DOCTOR[:3], "--checkpoint", "model.npz", "--json", str(report)]
    command = [*mpi_command(1), "-wdir", str(tmp_path / "first"), *program, ":"]
    command += ["-np", "1", "-wdir", str(tmp_path / "second"), *program]
    job = run(command, LIMIT_S)
    assert job.code == 0, job.errors
    assert json.loads(report.read_text())["model"]["parameters"] == 50_000


@pytest.mark.parametrize(
    ("variables", "door"),
    [
        ({}, "alone"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi"),
        ({"PMIX_RANK": "0"}, "mpi"),  # srun --mpi=pmix
        ({"HOROVOD_RANK": "0"}, "horovod"),
    ],
)
def test_who_started_it_is_found_out(
    variables: dict[str, str], door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*LAUNCHER_VARIABLES, "HOROVOD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert found_door() == door


# --------------------------------------------------------------- what was measured


def test_between_what_was_measured_lies_a_line_and_beyond_it_the_last_rate() -> None:
    found = Collective((100, 200, 400), (1.0, 2.0, 6.0))
    sizes = (0, 1, 100, 150, 200, 300, 400, 500)
    expected = [0.0, 1.0, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0]
    assert [found.seconds(size) for size in sizes] == expected
    assert (found.latency_s, found.per_byte_s) == (1.0, 0.02)


def test_a_rate_is_positive_though_noise_made_the_larger_one_faster() -> None:
    assert Collective((100, 200), (3.0, 2.0)).per_byte_s == 0.01


def test_one_exchange_that_stalls_does_not_end_the_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    calls: list[int] = []

    def gather(own: np.ndarray) -> list[np.ndarray]:
        calls.append(own.size)
        stalls = calls.count(own.size) == 1
        now[0] += 1.0 if stalls else 1e-5 + own.size * 1e-10
        return [own]

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clocked = Transport("mpi", 0, 1, gather, gather, "a clock")
    found = measure_network(clocked).allgather
    assert found.sizes[-1] == LARGEST
    assert found.seconds(10 * LARGEST) == pytest.approx(1e-5 + LARGEST * 1e-9)


# --------------------------------------------------------------------- predictions


def network(mbit: float, latency_s: float = 1e-4) -> Network:
    """An allreduce moves a byte of the gradient once, an allgather each byte once."""
    cost = line(8e-6 / mbit, latency_s)
    return Network(cost, cost, cost)


def line(per_byte_s: float, latency_s: float) -> Collective:
    sizes = (8, 64, 1 << 20)
    return Collective(sizes, tuple(latency_s + per_byte_s * size for size in sizes))


LOCAL = {0.001: Local(0.030, 200_000, 40_000, 80)}  # seconds, bytes of either kind


def test_predictions_are_sums_of_what_was_measured() -> None:
    dense, half, sparse = predict([25_000_000], network(1000), LOCAL)
    assert dense == Prediction("dense", None, pytest.approx(0.8001), 0.0, 100_000_000)
    assert half == Prediction("fp16", None, pytest.approx(0.4001), 0.0, 50_000_000)
    seconds = 0.030 + 1e-4 + 200_000 * 8e-9 + 1e-4 + 40_000 * 8e-9
    expected = Prediction("sparse", 0.001, pytest.approx(seconds), 0.030, 240_000)
    assert sparse == expected


def test_the_verdict_follows_the_network() -> None:
    slow = verdict(predict([25_000_000], network(1000), LOCAL))
    fast = verdict(predict([25_000_000], network(1_000_000), LOCAL))
    assert slow.startswith("Sparsification will pay here: a step's exchange takes 32.1")
    assert fast.startswith("Sparsification will not pay here")


def test_the_verdict_warns_before_sparse_is_slower_than_dense() -> None:
    dense = Prediction("dense", None, 1.0, 0.0, 100)
    for seconds in (PAYS + 0.001, 1.0, 1.05):
        sparse = Prediction("sparse", 0.001, seconds, 0.0, 1)
        assert "will not pay" in verdict([dense, sparse])


def test_what_this_machine_takes_is_measured_on_the_real_path() -> None:
    local = measure_local([100, 1_000_000, 10], 0.001, ranks=2)
    assert local.seconds > 0
    # 100 elements: one entry; a million: a thousand; ten: dense, as it is cheaper
    assert local.sparse_tensors == 3 - (local.dense_bytes > 0)
    assert local.payload_bytes >= 1 + 5000 + 1 + 8
    half = measure_local([1_000_000], 1.0, ranks=2)
    assert (half.sparse_tensors, half.dense_bytes) == (0, 4_000_000)


@pytest.mark.parametrize(
    ("values", "indices"),
    [
        (None, RawIndices()),
        (Float16(), None),
        (Int4(), RawIndices()),
        (BFloat16(), EliasFano()),
    ],
)
def test_sizes_are_those_of_the_formats_that_are_asked_for(
    values: object, indices: object
) -> None:
    formats = {"values": values, "indices": indices}
    sizes = [1000, 20_000]
    local = measure_local(sizes, 0.01, 2, **formats)
    plan = hvd_sparse.plan([(n,) for n in sizes], TopK(0.01), ranks=2, **formats)
    assert local.payload_bytes == sum(row.bytes_sent for row in plan.rows)


# ------------------------------------------------------------------------- --plan


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> str:
    """By the doctor, in this process."""
    monkeypatch.setattr(sys, "argv", ["doctor", *options])
    main()
    return capsys.readouterr().out


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    file = tmp_path / "model.npz"
    arrays = {"layer.weight": np.zeros((50, 30), np.float32), "steps": np.zeros(2, int)}
    np.savez(file, **arrays, **{"layer.bias": np.zeros(50, np.float16)})
    return file


def test_a_plan_is_that_of_the_package(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--density", "0.1", "--values", "Float16", "--indices", "RawIndices"]
    options += ["--plan", "--checkpoint", str(checkpoint), "--ranks", "4"]
    model = {"layer.weight": (50, 30), "layer.bias": np.zeros(50, np.float16)}
    formats = {"values": Float16(), "indices": RawIndices()}
    plan = hvd_sparse.plan(model, TopK(density=0.1), ranks=4, **formats)
    assert said(monkeypatch, capsys, *options) == f"{plan}\n"

    (found,) = json.loads(said(monkeypatch, capsys, *options, "--json"))["plans"]
    assert (found["sparsifier"], found["ranks"]) == ("TopK(density=0.1)", 4)
    assert found["sent_bytes"] == plan.sent_bytes
    assert found["dense_bytes"] == plan.dense_bytes
    assert found["compression_ratio"] == plan.compression_ratio
    for row, told in zip(plan.rows, found["rows"], strict=True):
        assert told == {**vars(row), "shape": list(row.shape)}


def test_a_plan_has_a_table_for_each_density_and_may_be_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "plan.json"
    options = ["--plan", "--parameters", "100000", "--json", str(file)]
    tables = said(monkeypatch, capsys, *options)
    shapes = [(size,) for size in tensors_of(100_000)]
    expected = [hvd_sparse.plan(shapes, TopK(density=d)) for d in (0.01, 0.001)]
    assert tables == "\n\n".join(map(str, expected)) + "\n"
    kept = json.loads(file.read_text())["plans"]
    assert [each["sent_bytes"] for each in kept] == [p.sent_bytes for p in expected]


@pytest.mark.jobs
def test_a_plan_needs_no_mpi() -> None:
    """Though a launcher's variables are there, and mpi4py is not."""
    script = (
        "import sys; sys.modules['mpi4py'] = None; sys.argv = ['doctor', '--plan']; "
        "from hvd_sparse.doctor.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMPI_COMM_WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert "TopK(density=0.001) on 8 ranks" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "--ranks", "0"], "ranks must be positive, got 0"),
        (["--plan", "--parameters", "0"], "parameters must be positive, got 0"),
        (["--plan", "--density", "2"], "density must be in"),
        (["--plan", "--checkpoint", "none.npz"], "none.npz"),
    ],
)
def test_what_can_not_be_planned_is_said_in_a_line(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", *options])
    with pytest.raises(SystemExit, match=message):
        main()


@pytest.mark.parametrize("content", [b"no archive", None])
def test_a_plan_names_the_checkpoint_or_the_tensor(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.npz"
    np.savez(file, weight=np.zeros(3, np.longdouble))
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["doctor", "--plan", "--checkpoint", str(file)])
    named = "model.npz: " if content else "weight: gradient must be one of float16"
    with pytest.raises(SystemExit, match=named):
        main()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--values", "Float8"], "--values: invalid choice: 'Float8'"),
        (["--indices", "Float16"], "--indices: invalid choice: 'Float16'"),
        (["--ranks", "4"], "--ranks must come with --plan"),
    ],
)
def test_an_option_that_says_nothing_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(options)
    assert message in capsys.readouterr().err


def test_formats_are_those_of_the_package_by_name() -> None:
    for name, form in {**VALUES, **INDICES}.items():
        assert form == getattr(hvd_sparse, name)()


# -------------------------------------------------------------------------- models


@pytest.mark.parametrize("parameters", [1, 79, 80, 81, 40_000, 25_000_000, 10**9])
def test_a_model_of_so_many_parameters_has_just_as_many(parameters: int) -> None:
    sizes = tensors_of(parameters)
    assert sum(sizes) == parameters
    assert min(sizes) > 0


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="parameters must be positive, got 0"):
        tensors_of(0)


def test_a_numpy_checkpoint_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.npz"
    np.savez(file, a=np.zeros((3, 5)), b=np.zeros(7, np.float32), c=np.zeros(9, int))
    assert tensors_in(file) == [15, 7]
    assert weights_in(file) == {"a": Shaped((3, 5), "float64"), "b": Shaped((7,))}


def test_a_torch_checkpoint_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs hvd-sparse[torch]")
    weights = {"w": torch.zeros(4, 6), "count": torch.zeros(3, dtype=torch.int64)}
    for saved in (weights, {"model": weights, "optimizer": {"m": torch.zeros(99)}}):
        torch.save(saved, tmp_path / "model.pt")
        assert tensors_in(tmp_path / "model.pt") == [24]
        assert weights_in(tmp_path / "model.pt") == {"w": Shaped((4, 6))}
    torch.save([torch.zeros(3, dtype=torch.bfloat16)], tmp_path / "model.pt")
    named = {"tensor 0": Shaped((3,), "bfloat16")}
    assert weights_in(tmp_path / "model.pt") == named


def test_a_keras_checkpoint_is_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs h5py: pip install h5py")
    file = tmp_path / "model.weights.h5"
    with h5py.File(file, "w") as weights:
        weights["layers/dense/vars/0"] = np.zeros((2, 3), np.float32)
        weights["optimizer/vars/0"] = np.zeros(50, np.float32)
    assert tensors_in(file) == [6]
    assert weights_in(file) == {"layers/dense/vars/0": Shaped((2, 3))}


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", c=np.zeros(9, int))
    with pytest.raises(ValueError, match=r"none\.npz must have floating tensors"):
        tensors_in(tmp_path / "none.npz")
