"""The test data itself: every visible key matters. And the check of a result says what is wrong."""

import functools

import numpy as np
import pytest
from kernel_data import ALL_CASES, FEATURES, SPECS, WORKLOADS, make_case, make_named_case, token_places
from kernel_oracle import TOLERANCE, assert_lse_close, assert_rows_close, attend_one


@pytest.mark.once
@pytest.mark.parametrize("names", [case for case in ALL_CASES if case[0] != "long"], ids="-".join)
def test_each_visible_key_of_each_head_matters(names):
    case, spec = make_named_case(*names), SPECS[names[2]]
    for seq, row in token_places(case.workload):
        rows = slice(row, row + case.workload.q_lens[seq])
        attend = functools.partial(
            attend_one,
            np.asarray(case.q[rows], np.float64),
            case.keys[seq],
            spec=spec,
            heads=case.heads,
            t0=case.workload.first_position(seq),
            tree=None if case.trees is None else case.trees[rows],
        )
        effects = key_effects(attend, case.values[seq])
        seen = np.isfinite(effects)
        may_see_nothing = case.workload.tree or case.workload.q_starts is not None or rows.start == rows.stop
        assert seen.any() or may_see_nothing
        assert (effects[seen] > TOLERANCE["bfloat16"]).all()  # a thousand times the tolerance in float32


def key_effects(attend, v):
    """`[keys, kv_heads]`: how far dropping the key moves some row, relative to the row; -inf if no row sees it."""
    out, _ = attend(v=v)
    effects = np.empty(v.shape[:2])
    for p in range(len(v)):
        marked = v.copy()
        marked[p] += 1000
        weight = (attend(v=marked)[0] - out)[..., 0] / 1000  # [rows, q_heads]
        # Without a key of weight w, `out` becomes `(out - w v) / (1 - w)`.
        scale = np.maximum(np.abs(out).max(axis=-1), 1e-30)
        away = np.abs(out - np.repeat(v[p], out.shape[1] // v.shape[1], axis=0)).max(axis=-1) / scale
        moved = np.where(weight > 1 - 1e-9, 1, weight * away / np.maximum(1 - weight, 1e-9))
        moved = np.where(weight > 1e-12, moved, -np.inf)
        effects[p] = moved.max(axis=0, initial=-np.inf).reshape(v.shape[1], -1).max(axis=1)
    return effects


def test_what_must_not_be_read_is_nan():
    case = make_case(WORKLOADS["mixed"], spec=SPECS["window"])
    k = np.asarray(case.pages.k)
    owned = case.batch.page_table[4, :5]  # 66 tokens; its one row sees keys 45 to 65
    assert np.isnan(k[:, 0]).all(), "the null page"
    assert np.isnan(k[:, owned[4], 66 % 16 :]).all(), "slots past the end"
    assert np.isnan(k[:, owned[:2]]).all(), "pages outside the window"
    assert not np.isnan(k[:, owned[2:4]]).any()
    assert np.isnan(np.asarray(case.q)[33:]).all(), "padding rows"


def test_what_must_not_be_read_of_quantised_pages_has_scales_of_nan():
    case = make_case(WORKLOADS["mixed"], spec=SPECS["window"], kv_dtype="int8")
    k, v = np.asarray(case.pages.k), np.asarray(case.pages.v)
    owned = case.batch.page_table[4, :5]
    for pages in (k, v):
        assert np.isnan(pages[:, 0]).all()
        assert np.isnan(pages[:, owned[4], 66 % 16 :]).all()
        assert np.isnan(pages[:, owned[:2]]).all()
        assert not np.isnan(pages[:, owned[2:4]]).any()
    assert len(np.unique(case.pages.data[0])) > 200, "the integers of the null page are anything"


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_quantised_keys_are_near_to_those_given_and_are_what_the_pages_read_as(kv_dtype):
    case = make_case(FEATURES["head_24_40"], kv_dtype=kv_dtype)
    for seq, n in enumerate(case.workload.kv_lens):
        page = case.batch.page_table[seq, 0]
        for held, given, read in (
            (case.keys, case.given_keys, case.pages.k),
            (case.values, case.given_values, case.pages.v),
        ):
            np.testing.assert_allclose(held[seq], given[seq], atol=0.08 * np.abs(given[seq]).max())
            np.testing.assert_allclose(
                held[seq][:16], np.asarray(read[:, page, : min(n, 16)]).swapaxes(0, 1), rtol=1e-6
            )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda out: out.at[1, 2].multiply(1.0001), r"1 of 24 rows .* \(token, head\) \(1, 2\), off by 0.0001"),
        (lambda out: out.at[0, 0, 0].set(np.nan), r"\(0, 0\), off by inf"),
        (lambda out: out.at[5, 3].set(1e-30), r"\(5, 3\), off by inf"),
        (lambda out: out[1:], "shape"),
    ],
)
def test_check_names_the_worst_row(fault, message):
    good = make_case(WORKLOADS["decode_idle_sequences"]).q.at[np.array([1, 3, 5])].set(0).at[1].set(1.0)
    assert_rows_close(good, good, "float32")
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        assert_rows_close(fault(good), good, "float32")


def test_check_of_lse():
    assert_lse_close(np.array([1.0, -np.inf]), np.array([1.0, -np.inf]))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_lse_close(np.array([1.001]), np.array([1.0]))
