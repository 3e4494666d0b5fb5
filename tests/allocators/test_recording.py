"""Recordings and snapshots."""

import pickle

import pytest

from glake_infer.allocators import InputError, trace
from glake_infer.allocators.recording import Event, Recording
from glake_infer.allocators.snapshot import Snapshot

MiB = 1 << 20
BASE = 0x7F0000000000


class Recorder:
    """What `_native.Pool` does for a recording."""

    def __init__(self, events=()):
        self.events, self.calls = list(events), []

    def start_recording(self, most_events):
        self.calls.append(most_events)

    def stop_recording(self):
        self.calls.append("stop")
        return self.events


def event(op, address, size, number=0, stream=-1, tag="", label="", time=0):
    return (op, time, BASE + address, size, stream, tag, label, number)


EVENTS = [
    event("m", 0, 8 * MiB, time=1000),
    event("r", 0, 100, 41, tag="weights", label="bert", time=2000),
    event("a", 4 * MiB, 3 * MiB, 42, stream=0xABC, tag="activations", label="bert", time=3000),
    event("f", 0, 100, 41, time=4000),
    event("a", 0, 60, 43, stream=0xDEF, tag="activations", time=5000),
    event("f", 0, 60, 43, stream=0xDEF, time=6000),
]


def test_a_recording_is_a_trace(tmp_path):
    native = Recorder(EVENTS)
    with Recording(native, 100) as recording:
        assert recording.running
        with pytest.raises(InputError, match="goes on"):
            _ = recording.events
    assert native.calls == [100, "stop"]
    assert recording.stop() is recording
    assert native.calls == [100, "stop"]
    assert recording.events[2] == Event("a", 3000, BASE + 4 * MiB, 3 * MiB, 0xABC, "activations", "bert", 42)
    assert not recording.truncated
    path = recording.save(tmp_path / "x.trace")
    assert path.read_text() == (f"r 0 100 -1\na 1 {3 * MiB} 0\nf 0 100 -1\na 2 60 1\nf 2 60 1\n")
    assert trace.read(path).peak_requested == recording.trace().peak_requested == 3 * MiB + 100


def test_what_began_before_is_left_out():
    recording = Recording(Recorder([event("f", 0, 5, 3), *EVENTS[1:2]]), 2).stop()
    assert [step.op for step in recording.steps()] == ["r"]
    assert recording.truncated


@pytest.mark.parametrize("most", [0, -1, "many"])
def test_a_recording_of_nothing_is_refused(most):
    native = Recorder()
    with pytest.raises(InputError, match="most_events"):
        Recording(native, most)
    assert native.calls == []


def part(address, size, state="free", requested=0, tag="", label=""):
    return {"address": BASE + address, "bytes": size, "requested": requested, "state": state, "tag": tag,
            "label": label, "id": 0}  # fmt: skip


def segment(address, ranges, stream=-1, kind="large"):
    size = sum(r["bytes"] for r in ranges)
    return {"address": BASE + address, "bytes": size, "kind": kind, "stream": stream, "ranges": ranges}


NATIVE = {
    "segments": [
        segment(
            0,
            [
                part(0, 4 * MiB, "cached"),
                part(4 * MiB, 3 * MiB, "active", 3 * MiB - 5, "activations", "bert"),
                part(7 * MiB, MiB),
            ],
            stream=0xABC,
        )
    ]
}


def page(found):
    """Go backwards over the events as memory_viz does, stumbling where it would; returns what was left at the start."""
    segments = [[s["address"], s["address"] + s["total_size"]] for s in found["segments"]]
    blocks = {}
    for s in found["segments"]:
        end = s["address"]
        for b in s["blocks"]:
            assert b["address"] == end
            end += b["size"]
            if b["state"] == "active_allocated":
                blocks[b["address"]] = b["size"]
        assert end == s["address"] + s["total_size"]
    (events,) = found["device_traces"]
    for e in reversed(events):
        start, end = e["addr"], e["addr"] + e["size"]
        if e["action"] == "segment_map":
            (inside,) = [s for s in segments if s[0] <= start and end <= s[1]]
            segments.remove(inside)
            segments += [[a, b] for a, b in ((inside[0], start), (end, inside[1])) if a < b]
        elif e["action"] == "segment_unmap":
            assert not [s for s in segments if s[0] < end and start < s[1]]
            near = [s for s in segments if s[1] == start or s[0] == end]
            for s in near:
                segments.remove(s)
            segments.append([min([start, *(s[0] for s in near)]), max([end, *(s[1] for s in near)])])
        elif e["action"] == "alloc":
            del blocks[start]
        elif e["action"] == "free_completed":
            assert start not in blocks
            blocks[start] = e["size"]
        elif e["action"] == "free_requested":
            assert start in blocks
        for address in blocks:
            assert [s for s in segments if s[0] <= address < s[1]], "a block outside of every segment"
    return segments, blocks


def test_a_snapshot_is_one_that_memory_viz_reads(tmp_path):
    snapshot = Snapshot(NATIVE, Recording(Recorder(EVENTS)).stop().events, "cuda:1")
    assert snapshot.device == "cuda:1"
    assert snapshot.active_bytes == 3 * MiB
    path = snapshot.save(tmp_path / "pool.pickle")
    found = pickle.loads(path.read_bytes())
    (only,) = found["segments"]
    assert (only["address"], only["total_size"], only["stream"]) == (BASE, 8 * MiB, 0xABC)
    assert (only["allocated_size"], only["active_size"], only["requested_size"]) == (
        3 * MiB,
        3 * MiB,
        3 * MiB - 5,
    )
    assert (only["device"], only["segment_type"]) == (0, "large")
    assert [(b["size"], b["state"]) for b in only["blocks"]] == [
        (4 * MiB, "inactive"),
        (3 * MiB, "active_allocated"),
        (MiB, "inactive"),
    ]
    assert [f["name"] for f in only["blocks"][1]["frames"]] == ["bert", "activations"]
    (events,) = found["device_traces"]
    assert [e["action"] for e in events] == [
        "segment_map", "alloc", "alloc", "free_requested", "free_completed",
        "alloc", "free_requested", "free_completed",
    ]  # fmt: skip
    assert [e["time_us"] for e in events] == [1, 2, 3, 4, 4, 5, 6, 6]
    assert events[2]["stream"] == 0xABC
    assert page(found) == ([], {})


def test_events_that_the_segments_do_not_bear_out_are_left_out():
    strange = [
        event("m", 100 * MiB, 2 * MiB),  # of a segment that is gone
        event("a", 100 * MiB, 10, 1),
        event("f", 100 * MiB, 10, 1),
        event("a", 50 * MiB, 10, 2),  # alive, they say, and in no segment
        event("u", 2 * MiB, 2 * MiB),
        *EVENTS,
        event("u", 2 * MiB, MiB),  # still mapped
    ]
    found = Snapshot(NATIVE, Recording(Recorder(strange)).stop().events).memory_viz()
    # Before the mapping of all 8 MiB, 2 of them were unmapped; that and all that came after it is borne out.
    assert page(found) == ([[BASE + 2 * MiB, BASE + 4 * MiB]], {})
    assert BASE + 100 * MiB not in {e["addr"] for e in found["device_traces"][0]}


def test_memory_that_moved_between_segments():
    native = {"segments": [segment(0, [part(0, 2 * MiB)]), segment(10 * MiB, [part(10 * MiB, 2 * MiB)])]}
    moves = [event("m", 0, 2 * MiB), event("u", 0, 2 * MiB), event("m", 0, MiB), event("m", MiB, MiB),
             event("m", 10 * MiB, 2 * MiB)]  # fmt: skip
    found = Snapshot(native, Recording(Recorder(moves)).stop().events).memory_viz()
    assert [e["action"] for e in found["device_traces"][0]] == [
        "segment_map", "segment_unmap", "segment_map", "segment_map", "segment_map",
    ]  # fmt: skip
    assert page(found) == ([], {})


def test_gaps_between_ranges_are_free():
    native = {"segments": [{**segment(0, [part(MiB, MiB, "active", 7, "weights")]), "bytes": 4 * MiB}]}
    (only,) = Snapshot(native).memory_viz()["segments"]
    assert [(b["address"] - BASE, b["size"], b["state"]) for b in only["blocks"]] == [
        (0, MiB, "inactive"), (MiB, MiB, "active_allocated"), (2 * MiB, 2 * MiB, "inactive"),
    ]  # fmt: skip


def test_only_pickles_are_saved(tmp_path):
    with pytest.raises(InputError, match=r"ends with \.pickle"):
        Snapshot(NATIVE).save(tmp_path / "pool.json")
    assert list(tmp_path.iterdir()) == []
