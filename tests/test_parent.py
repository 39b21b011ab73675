import torch

from autocompress.parent import floor, run_through
from autocompress.tasks.digits import Digits
from autocompress.train import Training
from autocompress.types import QualityLimit
from tests.small_search import builder


def test_training_takes_every_step_once_whatever_threads_it_chooses() -> None:
    torch.manual_seed(0)
    training = Training(builder().build({}), Digits(), epochs=3, seed=0)
    before = torch.get_num_threads()
    assert run_through(training, 2) in (1, 2)
    assert training.step == training.total
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_one_thread_is_one_choice() -> None:
    training = Training(builder().build({}), Digits(), epochs=0.3, seed=0)
    assert run_through(training, 1) == 1
    assert training.step == training.total


def test_the_floor_is_a_drop_from_the_baseline_or_stated() -> None:
    assert floor(QualityLimit(max_drop=0.01), 0.99).floor == 0.98
    assert floor(QualityLimit(min=0.5), 0.99).floor == 0.5
