"""examples/dcgan.py in two processes: shares of each batch, equal weights, and one checkpoint that resumes both."""

import pytest

from tests.distributed.scenarios import RANKS


@pytest.mark.parametrize("engine", ["mpengine", "torch-amp", "fp32"])
def test_ranks_stay_equal_and_resume(pair, engine, tmp_path):
    first, second = pair.run("train", "tests.distributed.dcgan_ranks", engine=engine, folder=str(tmp_path))
    assert first["state"] == second["state"]
    assert first["weights"] == first["resumed"]
    assert second["weights"] == second["resumed"]
    assert first["weights"] != first["start"]
    shares = [result["share"] for result in (first, second)]
    assert sorted(shares[0] + shares[1]) == sorted(first["batch"])
    assert [len(share) for share in shares] == [len(first["batch"]) // RANKS] * RANKS
    assert first["metrics"] != second["metrics"]  # each of its own share
    if engine != "fp32":
        assert first["scales"] == second["scales"]
        assert min(first["scales"]) < first["scales"][0]
