"""Engines: each computes what the stage computes, what does not is left out, and the fastest is chosen."""

from __future__ import annotations

import importlib.util
import logging
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gossipfl.errors import ConfigError, RunError
from gossipfl.inference.execution import engines
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.engines import (
    ENGINES,
    Live,
    Run,
    available_engines,
    compile_stage,
    fastest,
    missing_engines,
    no_slower,
    stage_seconds,
)
from gossipfl.inference.execution.int8 import missing_kernels, quantize
from gossipfl.learning.models import build_model

needs_int8 = pytest.mark.skipif(bool(missing_kernels()), reason="this build of torch has no quantized kernels")
needs_onnxruntime = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))), reason="needs the extra gossipfl[ort]"
)
EVERY_ENGINE = [
    "fp32",
    "bf16",
    pytest.param("int8", marks=needs_int8),
    pytest.param("onnxruntime", marks=needs_onnxruntime),
]
LARGEST_ERROR = {"fp32": 1e-6, "bf16": 0.02, "int8": 0.05, "onnxruntime": 0.05}
"""Relative, of the models below: 2^-9 for each rounding in bf16, and 1/255 of the range in 8 bits, over at most 20 layers."""


@pytest.fixture(autouse=True)
def one_thread_and_short_turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(engines, "TURNS", 2)
    monkeypatch.setattr(engines, "REST_S", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Branches(nn.Module):
    """What has no kernel on codes beside what has: a mean, a product, average pooling, a view, a shortcut of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.hidden, self.head = nn.Linear(8 * 4 * 4 + 3, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.relu(self.left(x)) + self.right(x).clamp(min=-1)
        gate = torch.sigmoid(both.mean((2, 3), keepdim=True))
        deep = F.max_pool2d(self.deep(both * gate).relu() + both, 2)
        deep = F.avg_pool2d(deep + deep, 2)
        flat = torch.cat([deep.view(x.shape[0], -1), x.amax((2, 3))], 1)
        return self.head(F.relu(self.hidden(flat)))


def chain_of(name: str) -> Chain:
    if name == "branches":
        torch.manual_seed(0)
        return Chain.of(Branches(), (3, 16, 16))
    shape = {"mlp": (64,), "cnn": (1, 28, 28), "lenet5": (1, 28, 28), "resnet20": (3, 16, 16)}[name]
    return Chain.of(build_model(name, shape, 10), shape)


def samples(chain: Chain, number: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(number, *chain.profile.input_shape, generator=torch.Generator().manual_seed(seed))


def live_at(chain: Chain, cut: int, x: Tensor) -> Live:
    return chain.stage(0, cut)(x) if cut else (x,)


def error(found: Live, expected: Live) -> float:
    assert len(found) == len(expected)
    return max(((ours - theirs).norm() / theirs.norm()).detach().item() for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("engine", EVERY_ENGINE)
@pytest.mark.parametrize(("name", "cuts"), [("mlp", (1,)), ("cnn", (1, 2)), ("resnet20", (2, 10)), ("branches", (1, 2, 3))])
def test_an_engine_computes_what_the_stage_computes_for_batches_of_any_size(
    name: str, cuts: tuple[int, ...], engine: str
) -> None:
    chain = chain_of(name)
    whole = len(chain.profile.layers)
    for start, stop in [(0, whole), *((0, cut) for cut in cuts), *((cut, whole) for cut in cuts)]:
        stage = chain.stage(start, stop)
        compiled = compile_stage(stage, live_at(chain, start, samples(chain)), engine)
        assert compiled.engine == engine and 0 < compiled.seconds == compiled.table[engine]
        for batch in (1, 5, 16):
            live = live_at(chain, start, samples(chain, batch, seed=1))
            found, expected = compiled(*live), stage(*live)
            assert [(tensor.dtype, tensor.shape) for tensor in found] == [(torch.float32, tensor.shape) for tensor in expected]
            assert error(found, expected) < LARGEST_ERROR[engine], (start, stop, batch)


@pytest.mark.parametrize(
    "engine", [pytest.param("int8", marks=needs_int8), pytest.param("onnxruntime", marks=needs_onnxruntime)]
)
def test_an_answer_in_8_bits_does_not_depend_on_the_other_samples(engine: str) -> None:
    chain = chain_of("cnn")
    compiled = compile_stage(chain.stage(0, 4), (samples(chain),), engine)
    x = samples(chain, 6, seed=1)
    x[3] *= 40  # an outlier
    (together,) = compiled(x)
    alone = torch.cat([compiled(sample[None])[0] for sample in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@needs_int8
def test_a_residual_network_stays_in_codes_from_end_to_end() -> None:
    chain = chain_of("resnet20")
    nodes = list(quantize(chain.stage(0, 20), (samples(chain),)).graph.nodes)
    counts = Counter(str(node.target) for node in nodes)
    shortcuts = 2  # that pad channels
    assert (counts["quantized.conv2d_relu"], counts["quantized.conv2d"], counts["quantized.add_relu"]) == (10, 9 + shortcuts, 9)
    assert sum(node.target is torch.quantize_per_tensor for node in nodes) == counts["dequantize"] == 1


class Arranged(nn.Module):
    """Codes that are padded, with their channels first or not; then flattened for a layer, or for who looks at them."""

    def __init__(self, pads: tuple[int, ...], has_head: bool) -> None:
        super().__init__()
        self.pads, self.conv = pads, nn.Conv2d(3, 4, 3)
        self.head = nn.Linear((6 + sum(pads[:2])) * (6 + sum(pads[2:4])) * (4 + sum(pads[4:])), 5) if has_head else None

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.flatten(F.pad(torch.relu(self.conv(x)), self.pads), 1)
        return self.head(flat) if self.head is not None else flat


@needs_int8
@pytest.mark.parametrize("pads", [(0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 2, 3), (1, 0, 2, 1, 1, 0)])
def test_arranging_codes_changes_none(pads: tuple[int, ...]) -> None:
    """Padding and flattening are done in other ways than in f32 where that is faster; they come to the same."""
    torch.manual_seed(0)
    whole = Arranged(pads, has_head=True)
    plain, looked_at = Arranged((0, 0), has_head=False), Arranged(pads, has_head=False)
    for other in (plain, looked_at):
        other.conv.load_state_dict(whole.conv.state_dict())
    x = torch.rand(7, 3, 8, 8)
    codes, flat, scores = (
        quantize(Chain.of(m, (3, 8, 8)).stage(0, n), (x,))(x)[0] for m, n in ((plain, 1), (looked_at, 1), (whole, 2))
    )
    assert torch.equal(flat, F.pad(codes.view(7, 4, 6, 6), pads).flatten(1))
    head = whole.head
    assert head is not None
    steps = head.weight.abs().amax(1, keepdim=True) / 127
    rounded = (head.weight / steps).round() * steps
    torch.testing.assert_close(scores, F.linear(flat, rounded, head.bias), rtol=1e-4, atol=1e-5)


class Rows(nn.Module):
    """A stage that flattens images to their rows, each of which the layer takes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Live:
        return (self.head(torch.flatten(torch.relu(self.conv(x)), 0, 2)),)


@needs_int8
def test_images_flattened_to_rows_stay_as_they_are() -> None:
    torch.manual_seed(0)
    stage, x = fx.symbolic_trace(Rows()), torch.rand(7, 3, 8, 8)
    assert error(quantize(stage, (x,))(x), stage(x)) < 0.05


@needs_int8
def test_layers_without_a_kernel_on_codes_stay_in_f32() -> None:
    chain = Chain.of(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(256, 3)), (1, 8, 8)
    )
    stage = chain.stage(0, 2)
    x = samples(chain)
    assert error(compile_stage(stage, (x,), "int8")(x), stage(x)) < 0.05


def test_the_fastest_is_the_least_of_the_table_and_fp32_is_always_in_it() -> None:
    chain = chain_of("cnn")
    for given in (None, ["bf16"], []):
        compiled = fastest(chain.stage(0, 4), (samples(chain),), given)
        assert set(compiled.table) == {"fp32", *(available_engines() if given is None else given)}
        assert compiled.seconds == compiled.table[compiled.engine] == min(compiled.table.values())


def with_engine(monkeypatch: pytest.MonkeyPatch, name: str, make: object) -> None:
    monkeypatch.setitem(ENGINES._functions, name, make)


def saturating(largest_code: int) -> Callable[[fx.GraphModule, Live], Run]:
    """As on processors without VNNI: products of codes u8 and i8 are added in pairs into i16, which saturates."""

    def compile_linear(stage: fx.GraphModule, inputs: Live) -> Run:
        layer = next(module for module in stage.modules() if isinstance(module, nn.Linear))
        step, steps = float(inputs[0].max()) / largest_code, layer.weight.abs().amax(1, keepdim=True) / 127
        weight = (layer.weight / steps).round()

        def run(x: Tensor) -> Live:
            products = (x / step).round().clamp(0, largest_code)[:, None, :] * weight
            pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
            return (pairs.sum(-1) * step * steps.T + layer.bias,)

        return run

    return compile_linear


def exact(stage: fx.GraphModule, inputs: Live) -> Run:
    return lambda *live: stage(*live)


def laboured(stage: fx.GraphModule, inputs: Live) -> Run:
    return lambda *live: [stage(*live) for _ in range(100)][-1]


@pytest.mark.parametrize(("slow", "chosen"), [("planted", "fp32"), ("fp32", "planted")])
def test_an_engine_runs_where_it_is_no_slower_than_fp32(monkeypatch: pytest.MonkeyPatch, slow: str, chosen: str) -> None:
    chain = chain_of("cnn")
    with_engine(monkeypatch, "planted", exact)
    with_engine(monkeypatch, slow, laboured)
    compiled, refused = no_slower(chain.stage(0, 4), (samples(chain),), ["planted"])
    assert compiled.engine == chosen and set(compiled.table) == {"planted", "fp32"}
    assert compiled.table[compiled.engine] == min(compiled.table.values()) and compiled.seconds > 0
    own, full = (f"{1000 * compiled.table[engine]:.3g} ms" for engine in ("planted", "fp32"))
    said = {"planted": f"engine 'planted' is slower than fp32 on this machine: {own} a sample, fp32 {full}"}
    assert refused == (said if chosen == "fp32" else {})


def test_of_several_engines_the_first_that_is_of_use_runs_and_of_each_before_it_is_said_what_was_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = one_linear_layer()
    monkeypatch.setattr(engines, "missing_kernels", lambda: ["linear"])
    monkeypatch.setattr(engines, "_time_rested", lambda runs, inputs, within_s: {name: TIMES[name] for name in runs})
    with_engine(monkeypatch, "slow", exact)
    with_engine(monkeypatch, "wrong", saturating(255))
    with_engine(monkeypatch, "good", exact)
    with_engine(monkeypatch, "better", breaking)
    compiled, refused = no_slower(chain.stage(0, 1), (samples(chain),), ["int8", "wrong", "slow", "good", "better"])
    assert compiled.engine == "good" and list(refused) == ["int8", "wrong", "slow"], "what comes after it is not tried"
    assert refused["int8"] == "engine 'int8' is not there: this build of torch lacks linear" == missing_engines()["int8"]
    assert "its kernels saturate or are wrong" in refused["wrong"]
    assert refused["slow"] == "engine 'slow' is slower than fp32 on this machine: 3 ms a sample, fp32 2 ms"
    compiled, refused = no_slower(chain.stage(0, 1), (samples(chain),), ["wrong", "slow"])
    assert compiled.engine == "fp32" and list(refused) == ["wrong", "slow"]


TIMES = {"fp32": 2e-3, "slow": 3e-3, "good": 2e-3}


def test_of_slow_calls_there_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LOAD_S", 0.0)
    chain, batches = chain_of("mlp"), []
    with_engine(monkeypatch, "planted", lambda stage, inputs: lambda x: batches.append(len(x)) or stage(x))
    no_slower(chain.stage(0, 2), (samples(chain),), ["planted"])
    assert batches == [16, *[1] * 4], "the check, three to begin with, and one that is timed"


def one_linear_layer() -> Chain:
    torch.manual_seed(0)
    return Chain.of(nn.Sequential(nn.Linear(128, 32)), (128,))


def test_a_kernel_that_saturates_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chain = one_linear_layer()
    with_engine(monkeypatch, "planted", saturating(255))
    with caplog.at_level(logging.WARNING):
        compiled = fastest(chain.stage(0, 1), (samples(chain),), ["planted"])
    assert compiled.engine == "fp32" and compiled.table["planted"] == math.inf
    assert "'planted' computes something else than fp32" in caplog.text
    with pytest.raises(RunError, match="saturate or are wrong"):
        compile_stage(chain.stage(0, 1), (samples(chain),), "planted")


def test_the_same_kernel_is_accepted_with_codes_of_7_bits_which_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = one_linear_layer()
    with_engine(monkeypatch, "planted", saturating(127))  # 2 * 127 * 127 < 2^15
    assert compile_stage(chain.stage(0, 1), (samples(chain),), "planted").engine == "planted"


def nowhere_finite(stage: fx.GraphModule, inputs: Live) -> Run:
    return lambda *live: tuple(tensor * math.nan for tensor in stage(*live))


def breaking(stage: fx.GraphModule, inputs: Live) -> Run:
    raise NotImplementedError("no kernel for 'aten::odd'")


@pytest.mark.parametrize(("make", "said"), [(nowhere_finite, "difference nan"), (breaking, "no kernel for 'aten::odd'")])
def test_an_engine_that_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, make: object, said: str
) -> None:
    chain = chain_of("mlp")
    with_engine(monkeypatch, "planted", make)
    with caplog.at_level(logging.WARNING):
        compiled = fastest(chain.stage(0, 2), (samples(chain),), ["planted"])
    assert compiled.engine == "fp32" and compiled.table["planted"] == math.inf
    assert said in caplog.text


def test_an_engine_of_ones_own_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chain_of("mlp")
    with_engine(monkeypatch, "mine", exact)
    assert "mine" in available_engines()
    assert fastest(chain.stage(0, 2), (samples(chain),)).table["mine"] < math.inf


def test_a_mistyped_engine_is_an_error_that_suggests_one() -> None:
    chain = chain_of("mlp")
    for choose in (
        lambda: compile_stage(chain.stage(0, 2), (samples(chain),), "int9"),
        lambda: fastest(chain.stage(0, 2), (samples(chain),), ["int9"]),
    ):
        with pytest.raises(ConfigError, match="did you mean 'int8'"):
            choose()


def test_onnxruntime_by_name_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    assert "onnxruntime" not in available_engines()
    chain = chain_of("mlp")
    with pytest.raises(ConfigError, match=r"onnxruntime missing; pip install 'gossipfl\[ort\]'"):
        compile_stage(chain.stage(0, 2), (samples(chain),), "onnxruntime")


def test_a_torch_without_the_kernels_has_no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "missing_kernels", lambda: ["conv2d_relu"])
    assert "int8" not in available_engines()
    chain = chain_of("mlp")
    with pytest.raises(ConfigError, match="lacks conv2d_relu"):
        compile_stage(chain.stage(0, 2), (samples(chain),), "int8")


def test_without_calibration_samples_there_is_no_engine() -> None:
    chain = chain_of("mlp")
    with pytest.raises(ConfigError, match="calibration samples"):
        fastest(chain.stage(0, 2), (torch.empty(0, 64),))


def test_every_part_of_every_cut_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chain_of("lenet5")
    with_engine(monkeypatch, "planted", breaking)
    seconds = stage_seconds(chain, chain.vector(), samples(chain).numpy(), ["fp32", "bf16", "planted"])
    assert set(seconds) == {"fp32", "bf16", "planted"}
    for engine, (device_s, server_s) in seconds.items():
        assert len(device_s) == len(server_s) == 6
        assert device_s[0] == server_s[5] == 0 and device_s[5] == server_s[0]
        assert device_s == sorted(device_s) and server_s == sorted(server_s, reverse=True)
        assert all(
            (0 < value < math.inf) if engine != "planted" else value == math.inf for value in device_s[1:] + server_s[:5]
        )


def test_other_work_that_disturbs_most_calls_does_not_count() -> None:
    assert engines.undisturbed([1.0, 9.0, 5.0, 1.0, 7.0]) == 1.0


def test_a_stage_may_run_in_several_threads_at_once() -> None:
    chain = chain_of("cnn")
    compiled = fastest(chain.stage(0, 4), (samples(chain),))
    batches = [samples(chain, 2, seed) for seed in range(24)]
    expected = [compiled(x)[0] for x in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: compiled(x)[0], batches))
    assert all(map(torch.equal, found, expected))


WITH_EVERY_WARNING_AN_ERROR = """
import logging, torch
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.engines import available_engines, compile_stage, fastest
from gossipfl.learning.models import build_model
torch.set_num_threads(1)
chain, x = Chain.of(build_model("resnet20", (3, 8, 8), 10), (3, 8, 8)), torch.rand(4, 3, 8, 8)
for engine in available_engines():
    compile_stage(chain.stage(0, 20), (x,), engine)(x)
print(len(logging.getLogger().handlers))
"""


@pytest.mark.processes
def test_no_engine_warns_the_user_or_configures_the_users_log() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITH_EVERY_WARNING_AN_ERROR], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
