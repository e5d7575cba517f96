"""Shards on disk: what is saved is loaded, and a pickle that could run code is refused before it does."""

import pickle

import pytest
import torch

from falcon_kit.tuning import shards

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")  # there is only this process


class Code:
    """Makes a file when it is read by pickle."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.fixture
def trained():
    """A model with a frozen layer, and its optimizer after a step."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.01)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_weights_and_state_are_loaded_as_they_were_saved(trained, tmp_path):
    model, optimizer = trained
    shards.save_shards(model, optimizer, tmp_path)
    weights, moment = model[1].weight.detach().clone(), optimizer.state[model[1].weight]["exp_avg"].clone()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    shards.load_shards(model, optimizer, tmp_path)
    assert torch.equal(model[1].weight, weights)
    assert torch.equal(optimizer.state[model[1].weight]["exp_avg"], moment)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_code_in_the_list_of_tensors_does_not_run(trained, tmp_path):
    shards.save_shards(*trained, tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(pickle.UnpicklingError, match=r"a pickle with _?io\.open, which could run any code"):
        shards.load_shards(*trained, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_code_in_the_list_of_one_rank_does_not_run(trained, tmp_path):
    """torch reads this list where the one of all ranks is not as it expects."""
    shards.save_shards(*trained, tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps("no list"))
    (tmp_path / "__0.metadata").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(pickle.UnpicklingError, match=r"a pickle with _?io\.open"):
        shards.load_shards(*trained, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_number_of_the_optimizer_does_not_run(trained, tmp_path):
    model, optimizer = trained
    optimizer.param_groups[0]["lr"] = Code(tmp_path / "ran")
    shards.save_shards(model, optimizer, tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        shards.load_shards(model, optimizer, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["os.system", "dataclass", "field"])
def test_what_the_module_of_the_list_imports_is_no_part_of_it(trained, tmp_path, name):
    shards.save_shards(*trained, tmp_path)
    module = b"torch.distributed.checkpoint.metadata"
    (tmp_path / ".metadata").write_bytes(b"c" + module + b"\n" + name.encode() + b"\n.")
    with pytest.raises(pickle.UnpicklingError, match=f"metadata.{name}, which could run"):
        shards.load_shards(*trained, tmp_path)


def test_a_shard_that_was_cut_off_raises_what_reading_it_raises(trained, tmp_path):
    """torch raises a BaseException, which no `except Exception` catches."""
    shards.save_shards(*trained, tmp_path)
    shard = next(tmp_path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(EOFError):
        shards.load_shards(*trained, tmp_path)
