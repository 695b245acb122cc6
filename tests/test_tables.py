"""Activations at a cut, the noise of each layer's quantization, and tables of bits, on a small model of real data."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gossipfl.errors import CodecError, ConfigError
from gossipfl.inference.execution import calibration
from gossipfl.inference.execution.activations import (
    decode_continued,
    decode_live,
    encode_live,
    encode_missing,
    num_bytes,
    samples_from_text,
    samples_to_text,
)
from gossipfl.inference.execution.calibration import Calibrator, calibrate
from gossipfl.inference.execution.chain import Chain
from gossipfl.inference.execution.sensitivity import BITS, measure, quantized
from gossipfl.inference.execution.tables import LEVELS, harm_bound, make_tables, planned_scores
from gossipfl.inference.planning.certificates import ALPHA, DELTA, allowed_disagreements, samples_needed
from gossipfl.inference.planning.cuts import choose_plan
from gossipfl.inference.planning.margins import margins
from gossipfl.inference.planning.profile import DeviceProfile, FallbackRates
from gossipfl.learning.datasets import load_dataset
from gossipfl.learning.models import build_model
from gossipfl.protocol.messages import FULL_BITS
from gossipfl.scenario.inference.payload import payload, payload_32, saved

# --- activations ------------------------------------------------------------------------------------------------------


def live_of(seed: int, samples: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.maximum(rng.standard_normal((samples, *shape), np.float32), 0) for shape in ((4, 5, 5), (7,))]


SHAPES = [(4, 5, 5), (7,)]


@given(st.integers(0, 1000), st.sampled_from([2, 5, 8, 16]))
def test_each_value_comes_back_within_half_a_level_of_its_samples_range(seed, bits):
    live = live_of(seed)
    back = decode_live(encode_live(live, bits), SHAPES, 3, bits)
    for values, found in zip(live, back, strict=True):
        rows = values.reshape(3, -1)
        half_level = (rows.max(1) - rows.min(1)) / 2 / 2**bits
        assert (np.abs(found.reshape(3, -1) - rows) <= half_level[:, None] + 1e-6).all()


@pytest.mark.parametrize("bits", [2, 7, 16, FULL_BITS])
def test_the_bytes_of_a_cut_are_known_beforehand(bits):
    assert len(encode_live(live_of(0), bits)) == num_bytes(SHAPES, 3, bits)


@pytest.mark.parametrize("count", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("shape", [(1,), (3, 3), (2, 5, 7), (1, 8, 8)])
def test_samples_come_back_from_an_offer_as_many_as_they_were(shape, count):
    samples = np.random.default_rng(count).standard_normal((count, *shape)).astype(np.float32)
    found = samples_from_text(samples_to_text(samples), shape)
    assert found is not None and found.shape == samples.shape
    np.testing.assert_allclose(found, samples, atol=float(np.ptp(samples)) / 255)
    assert samples_from_text("", shape) is None
    for garbage in ("?", "AAAA", samples_to_text(samples)[:-4]):
        with pytest.raises(CodecError):
            samples_from_text(garbage, shape)


def test_32_bits_are_the_values_themselves():
    live = live_of(1)
    assert all(map(np.array_equal, live, decode_live(encode_live(live, FULL_BITS), SHAPES, 3, FULL_BITS)))


def test_a_sample_comes_back_the_same_whatever_else_is_in_its_batch():
    live = live_of(2)
    together = decode_live(encode_live(live, 4), SHAPES, 3, 4)
    for sample in range(3):
        alone = decode_live(encode_live([values[sample : sample + 1] for values in live], 4), SHAPES, 1, 4)
        assert all(np.array_equal(one[0], all_[sample]) for one, all_ in zip(alone, together, strict=True))


@pytest.mark.parametrize("spoil", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: b""])
def test_another_number_of_bytes_is_refused(spoil):
    with pytest.raises(CodecError, match="samples at a cut that takes"):
        decode_live(spoil(encode_live(live_of(0), 4)), SHAPES, 3, 4)


@pytest.mark.parametrize("bits", [4, FULL_BITS])
def test_what_is_not_finite_is_refused(bits):
    raw = bytearray(encode_live(live_of(0), bits))
    raw[:4] = np.float32(np.nan).tobytes()
    with pytest.raises(CodecError, match="finite"):
        decode_live(bytes(raw), SHAPES, 3, bits)


@given(st.integers(0, 1000), st.sampled_from([2, 5, 8, 15]), st.integers(1, 11), st.data())
def test_what_is_continued_is_what_it_would_have_been_at_all_planes(seed, bits, samples, data):
    rows = sorted(data.draw(st.sets(st.integers(0, samples - 1), min_size=1)))
    live = live_of(seed, samples)
    first, missing = encode_live(live, bits), encode_missing(live, bits, rows)
    whole, part = (num_bytes(SHAPES, len(rows), depth) for depth in (16, bits))
    assert len(missing) == whole - part + -(-samples // 8)
    found = decode_continued(first, missing, SHAPES, samples, bits)
    chosen = [values[rows] for values in live]
    expected = decode_live(encode_live(chosen, 16), SHAPES, len(rows), 16)
    assert all(map(np.array_equal, found, expected))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: b"", "no marks"),
        (lambda raw: b"\0" + raw[1:], "no marks"),
        (lambda raw: bytes([raw[0] | 1]) + raw[1:], "no marks"),
        (lambda raw: b"\xe0" + raw[1:], "bytes continue 3 of 3"),
        (lambda raw: raw[:-1], "bytes continue 2 of 3"),
        (lambda raw: raw + b"\0", "bytes continue 2 of 3"),
        (lambda raw: raw[:-1] + b"\xff", "not zero"),
    ],
)
def test_what_continues_nothing_is_refused(spoil, message):
    live = live_of(0)
    first, missing = encode_live(live, 4), encode_missing(live, 4, [0, 2])
    with pytest.raises(CodecError, match=message):
        decode_continued(first, spoil(missing), SHAPES, 3, 4)


def test_five_thousand_mutated_continuations_are_continuations_or_refused():
    chance = random.Random(0)
    live = live_of(0)
    first, missing = encode_live(live, 4), encode_missing(live, 4, [0, 2])
    taken = 0
    for _ in range(5000):
        raw = bytearray(missing)
        for _ in range(chance.randint(1, 3)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        if chance.random() < 0.2:
            del raw[chance.randrange(len(raw)) :]
        try:
            found = decode_continued(first, bytes(raw), SHAPES, 3, 4)
        except CodecError:
            continue
        taken += all(np.isfinite(values).all() for values in found)
    assert 0 < taken < 5000


# --- a trained model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A chain of the 64-128-10 network, its vector, and the digits it was not trained on in two halves."""
    dataset = load_dataset("digits", None, 0.5, 0)
    model = build_model("mlp", dataset.input_shape, dataset.num_classes, seed=0)
    x, y = torch.from_numpy(dataset.x_train), torch.from_numpy(dataset.y_train)
    for step in range(150):
        batch = slice(32 * step % len(x), 32 * step % len(x) + 32)
        gradients = torch.autograd.grad(F.cross_entropy(model(x[batch]), y[batch]), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=0.2)
    chain = Chain.of(model, dataset.input_shape)
    halves = [(dataset.x_test[part::2], dataset.y_test[part::2]) for part in (0, 1)]
    return chain, chain.vector(), dataset.x_train[:256], halves


@pytest.fixture(scope="module")
def sensitivity(trained):
    chain, vector, fit, _ = trained
    return measure(chain, vector, fit)


def test_the_noise_of_a_layer_falls_fourfold_with_each_bit(sensitivity):
    for curve in (*sensitivity.weights, *sensitivity.cuts):
        for bits, squared in zip(BITS, curve.squared_change, strict=True):
            assert 0.4 < squared * 4.0**bits / curve.energy < 2.5


def test_the_noise_of_several_layers_adds_up_where_it_is_small(trained, sensitivity):
    chain, vector, fit, _ = trained
    exact, noisy = (planned_scores(chain, vector, 2, ((16, 16), 0), fit), planned_scores(chain, vector, 2, ((6, 6), 0), fit))
    predicted = sum(curve.energy for curve in sensitivity.weights) * 4.0**-6
    assert 0.6 < ((exact - noisy) ** 2).sum(1).mean() / predicted < 1.6


def test_only_the_weights_of_the_devices_layers_are_quantized(trained):
    chain, vector, _, _ = trained
    changed = np.flatnonzero(quantized(chain, vector, (3,)) != vector)
    start, stop = chain.profile.layers[0].weight
    assert changed.size and start <= changed.min() and changed.max() < stop


def test_nothing_is_quantized_where_all_is_at_the_server_and_the_input_goes_up_exactly(trained):
    chain, vector, fit, _ = trained
    (scores,) = chain.stage(0, 2, vector)(torch.from_numpy(fit))
    assert np.allclose(planned_scores(chain, vector, 0, ((), 0), fit), scores.detach().numpy(), atol=1e-5)


@pytest.fixture(scope="module")
def tables(trained, sensitivity):
    chain, vector, _, ((x, y), _) = trained
    return make_tables(chain, vector, sensitivity, x, y)


def test_every_row_keeps_within_its_level_and_a_greater_loss_takes_no_more_bits(trained, tables):
    chain = trained[0]
    for cut in range(3):
        rows = [(level, tables[level][cut]) for level in tables if cut in tables[level]]
        assert all(row.harm <= level for level, row in rows)
        bits = [payload(chain.profile, cut, row.weight_bits, row.activation_bits) for _, row in rows]
        assert bits == sorted(bits, reverse=True)


def test_the_allowed_loss_holds_on_samples_that_calibration_did_not_see(trained, tables):
    chain, vector, _, (_, (x, y)) = trained
    full = (planned_scores(chain, vector, 0, ((), 0), x).argmax(1) == y).mean()
    for level, cuts in tables.items():
        for cut, row in cuts.items():
            found = planned_scores(chain, vector, cut, (row.weight_bits, row.activation_bits), x).argmax(1)
            # The harm is at most the level; what these samples show of it has this standard error.
            assert full - (found == y).mean() <= level + 3 * (level / len(y)) ** 0.5


def test_levels_that_so_few_samples_cannot_vouch_for_are_left_out(trained, sensitivity):
    chain, vector, _, ((x, y), _) = trained
    found = make_tables(chain, vector, sensitivity, x[:200], y[:200])
    assert list(found) == [level for level in LEVELS if samples_needed(level) <= 200] == [0.02, 0.05]


def test_the_bound_of_harm_is_where_so_few_are_seen_with_five_percent():
    assert harm_bound(0, 299) == pytest.approx(1 - 0.05 ** (1 / 299))
    p = harm_bound(3, 500)
    assert sum(math.comb(500, k) * p**k * (1 - p) ** (500 - k) for k in range(4)) == pytest.approx(0.05)
    assert harm_bound(5, 5) == 1.0


def test_without_labels_a_change_of_class_is_harm(trained, sensitivity):
    chain, vector, _, ((x, y), _) = trained
    with_labels, without = (make_tables(chain, vector, sensitivity, x, labels) for labels in (y, None))
    for level in without:
        for cut, row in without[level].items():
            assert sum(row.weight_bits) >= sum(with_labels[level][cut].weight_bits)


# --- how many fall back -----------------------------------------------------------------------------------------------

SECONDS = {"fp32": ([0.0, 1e-3, 2e-3], [2e-3, 1e-3, 0.0])}


def calibrator_of(trained, kept=None):
    """449 samples for the tables and 449 for certificates, or other ones in the place of these."""
    chain, vector, fit, ((x, y), (other_x, other_y)) = trained
    unseen = np.concatenate([x, other_x[: len(x)] if kept is None else kept]), np.concatenate([y, other_y[: len(y)]])
    return Calibrator(chain, fit, unseen, data="digits", vector=vector, engines=["fp32"])


def test_what_falls_back_is_what_a_certificate_on_the_tables_samples_would_let_fall_back(trained):
    chain, vector, _, ((x, _), _) = trained
    catalogue, rows = calibrator_of(trained).catalogue(seconds=SECONDS)
    assert {level: set(cuts) for level, cuts in catalogue.fallback_rates.items()} == {
        level: set(cuts) for level, cuts in catalogue.levels.items()
    }
    assert catalogue.fallback_rates[0.0] == {0: FallbackRates(0.0)}
    full = planned_scores(chain, vector, 0, ((), 0), x).argmax(1)
    assert [allowed_disagreements(449, ALPHA, DELTA / tried) for tried in (1, 2)] == [3, 3]
    seen = set()
    for level in list(rows)[1:]:
        for cut, row in rows[level].items():
            scores = planned_scores(chain, vector, cut, (row.weight_bits, row.activation_bits), x)
            found, differs = margins(scores), scores.argmax(1) != full
            changing = np.sort(found[differs])[::-1]
            rate = float((found <= changing[3]).mean()) if len(changing) > 3 else 0.0
            rates = catalogue.fallback_rates[level][cut]
            assert rates.full == pytest.approx(rate)
            seen.add(rates.full > 0)
            if rates.continued is not None:
                again = planned_scores(chain, vector, cut, (row.weight_bits, 16), x).argmax(1)
                assert cut < 2 and (again != full).sum() <= 3 and rates.continued >= rates.full > 0
                seen.add("continued")
    assert seen == {True, False, "continued"}


def test_samples_that_certificates_are_tested_on_have_no_part_in_the_choice_of_plans(trained):
    noise = np.random.default_rng(0).standard_normal((449, 1, 8, 8)).astype(np.float32)
    one, other = calibrator_of(trained), calibrator_of(trained, kept=noise)
    assert len(one._kept) == len(other._kept) == 449 and not np.array_equal(one._kept, other._kept)
    catalogues = [calibrator.catalogue(seconds=SECONDS)[0] for calibrator in (one, other)]
    assert catalogues[0] == catalogues[1]
    plan, _ = choose_plan(catalogues[0], DeviceProfile(price_weight=1e9), 0.05)
    assert one.certify(plan) != other.certify(plan)


def test_to_know_how_many_fall_back_takes_no_more_passes_than_there_are_rows(trained, monkeypatch):
    passes = []

    def counted(*words):
        passes.append(len(words[-1]))
        return planned_scores(*words)

    calibrator = calibrator_of(trained)
    rows = make_tables(calibrator.chain, calibrator.vector, calibrator.sensitivity(), *calibrator._tried)
    monkeypatch.setattr(calibration, "planned_scores", counted)
    rates = calibrator._fallback_rates(rows)
    once = {(cut, row) for level, cuts in rows.items() for cut, row in cuts.items() if cut < 2 and rates[level][cut].full}
    assert 0 < len(once) < sum(map(len, rows.values()))
    assert passes == [449] * (len(once) + 1), "that of the full model, and each whose fallbacks could be continued"


@pytest.mark.parametrize("num_unseen", [0, 100, 148])
def test_with_too_few_samples_for_a_certificate_all_fall_back(trained, num_unseen):
    chain, vector, fit, ((x, y), _) = trained
    few = Calibrator(chain, fit, (x[:num_unseen], y[:num_unseen]), data="digits", vector=vector, engines=["fp32"])
    rates = few.catalogue(seconds=SECONDS)[0].fallback_rates
    assert {rate for level in list(rates)[1:] for rate in rates[level].values()} == {FallbackRates(1.0)}
    assert f"{num_unseen} unseen samples are too few" in few.warning and "of which fewer fall back" in few.warning


# --- a user's own samples ---------------------------------------------------------------------------------------------


def digits(num):
    dataset = load_dataset("digits", None, 0.5, 0)
    return dataset.x_train[:num], dataset.y_train[:num]


@pytest.mark.parametrize(("num", "num_kept"), [(2, 1), (180, 90), (298, 149), (700, 444)])
def test_certificates_get_half_of_few_samples_and_it_is_said_where_that_certifies_nothing(num, num_kept, caplog):
    calibrator = calibrate(build_model("mlp", (1, 8, 8), 10), digits(num), engines=["fp32"])
    assert len(calibrator._kept) == num_kept
    said = f"{num_kept} samples for certificates, and it takes 149: every request falls back"
    assert caplog.messages == ([said] if num_kept < 149 else [])


def test_who_gives_too_few_samples_for_tables_is_told_how_many_to_give():
    model, dataset = build_model("mlp", (1, 8, 8), 10), load_dataset("digits", None, 0.5, 0)
    few, enough, of_data = (calibrate(model, data, engines=["fp32"]).warning for data in (digits(853), digits(854), dataset))
    assert few.startswith("597 unseen samples are too few for tables and certificates, which take 598: ")
    assert few.endswith("; give 854 samples") and enough is None
    assert of_data.startswith("449 unseen samples are too few") and of_data.endswith("; give 1196 test samples")


def test_without_samples_for_certificates_nothing_is_accepted(trained):
    chain, vector, fit, _ = trained
    none = Calibrator(chain, fit, (fit[:0], None), data="digits", vector=vector, engines=["fp32"])
    catalogue = replace(none.catalogue(seconds=SECONDS)[0], fallback_rates={})  # else nothing but the full model is chosen
    plan, _ = choose_plan(catalogue, DeviceProfile(price_weight=1e9), 0.05)
    certificate = none.certify(plan)
    assert plan.cut == 2 and certificate.threshold == math.inf and (certificate.n, certificate.fallback_rate) == (0, 1.0)


X, Y = digits(20)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ((X[:0], Y[:0]), r"samples of shape \[0, 1, 8, 8\] calibrate nothing"),
        ((X[:1], Y[:1]), r"samples of shape \[1, 1, 8, 8\] calibrate nothing"),
        ((X * math.nan, Y), "values that are not finite"),
        ((X.astype(float) + 1e300, Y), "values that are not finite"),
        ((["a", "b"], Y), "the samples are no array of numbers"),
        ((X, Y[:5]), r"labels of shape \[5\] for 20 samples"),
        ((X, Y + 100), "label 10[0-9], but the model has 10 classes"),
        ((X, Y - 100), "labels of int64 from -100 on"),
        ((X, Y + 0.5), "labels of float64 from 0.5 on; classes are whole numbers"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_samples_that_calibrate_nothing_are_refused_with_what_is_wrong(samples, message):
    with pytest.raises(ConfigError, match=message):
        calibrate(build_model("mlp", (1, 8, 8), 10), samples, engines=["fp32"])


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_request_are_those_of_its_codecs(trained):
    profile = trained[0].profile
    assert payload_32(profile, 1) == 4 * (64 * 128 + 128 + 128)
    assert payload(profile, 1, (4,), 5) == (4 * 64 * 128 // 8 + 4 * 128) + 4 * 128 + num_bytes([(128,)], 1, 5)
    assert saved(profile, 1, (4,), 5) == 1 - payload(profile, 1, (4,), 5) / payload_32(profile, 1)
