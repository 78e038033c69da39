"""Every input that is kept, against what it was kept for; and whole conversations that Hypothesis makes up."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.conversation import MESSAGES, WORDS, conversation
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
_STEP = st.builds(
    lambda which, deed, what: bytes([deed * 3 + which, what]),
    st.integers(0, 2),
    st.sampled_from((0, 0, 0, 3, 4, 4, 8, 10, 11)),
    st.integers(0, max(len(WORDS), len(MESSAGES)) - 1),
)


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_found_is_found_no_more(target: str) -> None:
    files = sorted((CORPUS / target).iterdir())
    assert files, "a target without a beginning"
    for file in files:
        TARGETS[target](file.read_bytes())


def test_the_corpus_has_small_inputs_for_known_targets() -> None:
    assert {directory.name for directory in CORPUS.iterdir()} == TARGETS.keys()
    assert all(file.stat().st_size <= 4096 for file in CORPUS.glob("*/*"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_STEP, max_size=30))
def test_any_conversation_leaves_nothing_behind(steps: list[bytes]) -> None:
    conversation(b"".join(steps))
