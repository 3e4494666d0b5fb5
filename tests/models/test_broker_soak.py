"""kill -9 of random clients and of the broker: tests/broker_soak.py, in short and in full."""

import broker_soak
import brokers
import pytest


@pytest.mark.parametrize(
    "kills", [15, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
def test_nobody_notices_that_others_are_killed(tmp_path, kills):
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    (tmp_path / "w").mkdir()
    machine = brokers.Machine(folder, brokers.make_workshop(tmp_path / "w", broker_soak.SPECS))
    workers = 3 if kills < 100 else 6
    try:
        found = broker_soak.Soak(machine, workers, seed=kills).run(kills)
    finally:
        machine.close()
    assert sum(found["kills"].values()) == kills
    assert min(found["kills"].values()) > kills // 10
