"""Prompts are read side by side: a short one does not wait for a long one, nor that one for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.decode.batching import share_tokens
from engine.decode.pace import MIN_PIECE

WANTED = st.lists(st.integers(1, 500), min_size=1, max_size=20)


@given(wanted=WANTED, limit=st.integers(1, 1024))
def test_a_step_is_shared_fairly_and_wholly(wanted: list[int], limit: int) -> None:
    shares = share_tokens(wanted, limit)
    num_served = max(1, min(len(wanted), limit // MIN_PIECE))
    assert all(0 <= share <= want for share, want in zip(shares, wanted, strict=True))
    assert shares[num_served:] == [0] * (len(wanted) - num_served)
    served = list(zip(shares, wanted, strict=True))[:num_served]
    assert sum(shares) == min(limit, sum(want for _, want in served))
    # Whoever does not get all has at most one token less than any other.
    for share, want in served:
        if share < want:
            assert share + 1 >= max(other for other, _ in served)


@given(wanted=WANTED, limit=st.integers(8, 256))
def test_every_prompt_is_read_to_its_end(wanted: list[int], limit: int) -> None:
    left = list(wanted)
    for _ in range(sum(wanted)):
        if not left:
            break
        shares = share_tokens(left, limit)
        assert shares[0] >= min(left[0], MIN_PIECE)
        left = [n - share for n, share in zip(left, shares, strict=True) if n > share]
    assert not left


def test_a_short_prompt_ends_in_its_first_step_beside_a_long_one() -> None:
    assert share_tokens([5000, 30], 200) == [170, 30]
    assert share_tokens([5000, 30, 5000], 200) == [85, 30, 85]
