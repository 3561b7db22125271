import numpy as np
import pytest

from attnlab.tasks.position_tasks import EvenTokenPrediction, PositionIdentification


def test_targets():
    inputs = np.asarray([[11, 12, 13, 14, 15]], np.int32)
    assert EvenTokenPrediction(5, 30).oracle(inputs).tolist() == [[12, 14, 28, 28, 28]]
    assert PositionIdentification(5, 30).oracle(inputs).tolist() == [[1, 2, 3, 4, 5]]


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(ValueError, match="vocab_size above 20 and the length"):
        PositionIdentification(length=40, vocab_size=40)
