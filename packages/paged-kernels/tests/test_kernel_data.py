"""The test data itself: every key that a row may see matters, and the check of a result tells what is wrong."""

import numpy as np
import pytest
from kernel_data import (
    SPECS,
    TOLERANCE,
    WORKLOADS,
    assert_lse_close,
    assert_rows_close,
    attend_one,
    make_case,
    token_places,
)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_each_visible_key_of_each_head_matters(workload, spec):
    case = make_case(WORKLOADS[workload], spec=SPECS[spec])
    for seq, row in token_places(case.workload):
        if not case.workload.q_lens[seq]:
            continue
        q = np.asarray(case.q[row : row + case.workload.q_lens[seq]], np.float64)
        effects = key_effects(q, case.keys[seq], case.values[seq], SPECS[spec])
        seen = np.isfinite(effects)
        assert seen.any()
        assert (effects[seen] > TOLERANCE["bfloat16"]).all()  # a thousand times the tolerance in float32


def key_effects(q, k, v, spec):
    """`[keys, kv_heads]`: how far dropping the key moves some row, relative to its scale; -inf where no row sees it."""
    out, _ = attend_one(q, k, v, spec)
    effects = np.empty(k.shape[:2])
    for p in range(len(k)):
        marked = v.copy()
        marked[p] += 1000
        weight = (attend_one(q, k, marked, spec)[0] - out)[..., 0] / 1000  # [rows, q_heads]
        # Without a key of weight w, `out` becomes `(out - w v) / (1 - w)`.
        away = np.abs(out - np.repeat(v[p], q.shape[1] // k.shape[1], axis=0)).max(axis=-1) / np.abs(out).max(axis=-1)
        moved = np.where(weight > 1 - 1e-9, 1, weight * away / np.maximum(1 - weight, 1e-9))
        moved = np.where(weight > 1e-12, moved, -np.inf)
        effects[p] = moved.reshape(len(q), k.shape[1], -1).max(axis=(0, 2), initial=-np.inf)
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
    good = make_case(WORKLOADS["decode_idle_slots"]).q.at[np.array([1, 3, 5])].set(0).at[1].set(1.0)
    assert_rows_close(good, good, "float32")
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        assert_rows_close(fault(good), good, "float32")


def test_check_of_lse():
    assert_lse_close(np.array([1.0, -np.inf]), np.array([1.0, -np.inf]))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_lse_close(np.array([1.001]), np.array([1.0]))
