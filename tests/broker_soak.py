"""Workers with models, and a broker, killed (-9) again and again at random moments.

    python tests/broker_soak.py --kills 200 [--device cuda:0] [--workers 5] [--seed 0]

Nobody else fails, no output is wrong, and at the end nothing has leaked: what the broker says agrees with what the system
says, and on a GPU the driver has as much free as before.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import brokers
from brokers import until

from glake_infer.models import zoo

SPECS = {
    "a": zoo.spec("bert-tiny", head="a", labels=2),
    "b": zoo.spec("bert-tiny", head="b", labels=17),
    "c": zoo.spec("bert-tiny", seed=1),
    "d": zoo.spec("bert-tiny", seed=2),
}
SETUP = "patch(PATIENCE=1.0)"

FREE = """
from cuda.bindings import driver
def check(answer):
    assert answer[0] == driver.CUresult.CUDA_SUCCESS, answer
    return answer[1:]
check(driver.cuInit(0))
context, = check(driver.cuDevicePrimaryCtxRetain({index}))
check(driver.cuCtxSetCurrent(context))
print(check(driver.cuMemGetInfo())[0])
"""


def free_memory(device):
    """Bytes that the driver has free, asked in a process of its own."""
    code = FREE.format(index=int(device.partition(":")[2] or 0))
    return int(
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    )


class Soak:
    """One machine, and what is done to it."""

    def __init__(self, machine, workers, seed, broker_share=0.3, report=lambda line: None):
        self.machine, self.choose, self.report = machine, random.Random(seed), report
        self.broker_share = broker_share
        self.workers = []
        self.kills = {"broker": 0, "worker": 0}
        self.done = {}
        self._seed = seed
        self._count = workers
        self._begun = 0

    def _new(self):
        self._begun += 1
        name = f"w{self._begun}"
        worker = self.machine.worker(setup=SETUP, name=name, opens="open_patiently")
        worker.begin(f"soak({f'{self._seed} {name}'!r}, {list(SPECS)!r})")
        self.workers.append(worker)

    def begin(self):
        self.machine.start()
        for _ in range(self._count):
            self._new()
        for worker in self.workers:
            worker.result()
            worker.result()

    def kill_one(self):
        """Kill somebody at a random moment, and put another in its place."""
        choose = self.choose
        time.sleep(choose.random() * 0.3)
        if choose.random() < self.broker_share:
            self.machine.broker.kill()
            self.kills["broker"] += 1
            time.sleep(choose.choice([0.0, 0.05, 0.3, 0.3, 1.5]))
            self.machine.start()
        else:
            victim = self.workers.pop(choose.randrange(len(self.workers)))
            victim.kill()
            self.kills["worker"] += 1
            self._new()
        for worker in self.workers:
            assert worker.alive, f"{worker.name} ended by itself"
        for worker in self.machine.started[: -2 * self._count]:
            if not worker.alive:
                self.machine.started.remove(worker)

    def look(self):
        """Everybody goes on, and nobody failed."""
        for worker in self.workers:
            bad = worker("failed")
            assert not bad, f"{worker.name}: {bad[0]}"

    def end(self):
        """Let all come to rest, and compare what is said with what there is."""
        for worker in self.workers:
            for what, count in worker("end_soak()").items():
                self.done[what] = self.done.get(what, 0) + count
        assert not [worker.name for worker in self.workers if not worker.alive]
        for worker in self.workers:
            until(lambda w=worker: w("share().connected"), 30)
        self.machine.audit(self.workers, strays=True)
        # Copies that were made while there was no broker go with their models' sleep.
        for worker in self.workers:
            worker("for name in models: models[name].suspend()")
        self.machine.audit(self.workers)
        for worker in self.workers:
            worker("for name in models: models[name].resume(); run(name)")
        self.machine.audit(self.workers)
        sizes = [(w.descriptors(), w.threads()) for w in self.workers]
        for worker in self.workers:
            worker("for name in list(models): close_model(name)")
            worker("import gc; gc.collect(); runtime.pool.trim()")
        assert all(worker("held()") == [] for worker in self.workers)
        self.machine.audit(self.workers)
        for worker in self.workers:
            worker("close_runtime()")
        until(lambda: not self.machine.broker.clients())
        self.machine.audit()
        for device in self.machine.broker.status().devices:
            assert device.used == device.weights == device.unused, device
        return sizes

    def run(self, kills):
        self.begin()
        for number in range(1, kills + 1):
            self.kill_one()
            if number % 10 == 0:
                self.look()
                self.report(f"{number} kills: {self.kills}")
        for worker in self.workers:
            until(lambda w=worker: w("sum(done.values())") > 20, 60)
        self.look()
        sizes = self.end()
        assert all(self.done.get(kind) for kind in ("load", "run", "suspend", "close")), self.done
        # Descriptors: some for each model and chunk; nothing of the hundreds of brokers and processes that are gone.
        most = max(size for size, _ in sizes), max(threads for _, threads in sizes)
        assert most[0] < (120 if self.machine.device == "cpu" else 500), sizes
        assert most[1] < (60 if self.machine.device == "cpu" else 200), sizes
        return {
            "kills": self.kills, "done": self.done, "descriptors": most[0], "threads": most[1],
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        (folder / "models").mkdir()
        workshop = brokers.make_workshop(folder / "models", SPECS)
        before = free_memory(options.device) if options.device != "cpu" else 0
        machine = brokers.Machine(folder, workshop, options.device)
        start = time.monotonic()
        try:
            found = Soak(
                machine, options.workers, options.seed, report=lambda line: print(line, flush=True)
            ).run(options.kills)
        except BaseException:
            for journal in sorted(folder.glob("*.log")):
                print(f"== {journal.name}", *journal.read_text().splitlines()[-15:], sep="\n", flush=True)
            raise
        finally:
            machine.close()
        found["seconds"] = round(time.monotonic() - start, 1)
        if options.device != "cpu":
            until(
                lambda: abs(free_memory(options.device) - before) < 4 << 20,
                30,
                "the device has less free than before",
            )
            found["device_memory_missing"] = before - free_memory(options.device)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
