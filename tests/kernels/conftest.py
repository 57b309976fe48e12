import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run beside each other: a second thread only where a test asks for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
