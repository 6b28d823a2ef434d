"""What the fuzzer's searches found worth keeping, and seeds of our own: read or refused, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import targets

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's own, about a stranger's recipe
@pytest.mark.parametrize("name", targets.TARGETS)
def test_every_entry_is_read_or_refused(name: str) -> None:
    targets.models()
    found = [targets.attempt(name, path.read_bytes()) for path in sorted((CORPUS / name).iterdir())]
    assert len(found) > 10
    assert any(found), "none is accepted: the target no longer reaches what it is there for"
    assert not all(found)
