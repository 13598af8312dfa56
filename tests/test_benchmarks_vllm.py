"""What the benchmarks of vLLM make of their figures, and how servers take turns; without vLLM."""

from __future__ import annotations

import io
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import vllm_storing, vllm_ttft
from benchmarks.vllm_servers import Folder
from benchmarks.vllm_slices import seconds_until, ttft_in_slices
from demo.processes import Child
from tests.processes.worker import eventually


def test_a_peer_that_ends_before_everything_is_measured_is_left_out() -> None:
    figures, printed = vllm_ttft.Figures(), io.StringIO()
    for length in vllm_ttft.LENGTHS:
        figures.over_s[vllm_ttft.OURS, length], figures.memcpy_s[length] = [0.0], [0.001]
        for server in (vllm_storing.COLD, vllm_storing.TWIN, vllm_storing.STORING):
            figures.cold.ttft_s[server, length] = [1.0]
    figures.over_s["a peer", vllm_ttft.LENGTHS[0]] = [1.0]
    figures.ttft_s["cold, a peer", vllm_ttft.LENGTHS[0]] = [1.0]
    figures.leave_out("a peer", "it ended")
    assert vllm_ttft._report(Console(file=printed, width=200), "model", figures, 64)
    assert figures.left_out == {"a peer": "it ended"} and not figures.ttft_s
    assert "no peer was measured" in printed.getvalue()


def test_what_storing_costs_is_beside_two_servers_without() -> None:
    cold, printed = vllm_storing.Cold(), io.StringIO()
    cold.ttft_s[vllm_storing.COLD, 512] = [1.0, 2.0, 1.0]
    cold.ttft_s[vllm_storing.TWIN, 512] = [1.0, 2.0, 3.0]
    cold.ttft_s[vllm_storing.STORING, 512] = [1.0, 2.2, 2.1]

    assert cold.storing(512) == pytest.approx([1.0, 1.1, 1.05])
    assert cold.between_twins(512) == pytest.approx([1.0, 1.0, 3.0])
    assert not vllm_storing._report(Console(file=printed, width=200), "model", cold, [512])
    assert "1.050 (1.00-1.10)" in printed.getvalue()


STAND_IN = """
import http.server, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        sum(range(10_000_000))
        self.send_response(int(sys.argv[1]))
        self.end_headers()
        self.wfile.write(b'data: {"choices": [{"text": "a"}]}\\n\\ndata: [DONE]\\n\\n')

server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
print(server.server_port, flush=True)
server.serve_forever()
"""
"""To a client what vLLM's server is, after some milliseconds of work. Its argument: its answers' status."""


@pytest.mark.parametrize("status", [200, 500])
def test_servers_in_slices_are_stopped_but_one_and_all_in_the_end(tmp_path: Path, status: int) -> None:
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    with ExitStack() as stack:
        engines: dict[int, list[Child]] = {}
        where = Folder(tmp_path, stack, engines)
        for answer in (200, status):
            child = where.start("stand-in", ["stand_in", str(answer)], {"PYTHONPATH": str(tmp_path)})
            child.wait_until(lambda child=child: child.log.read_text().strip(), 60, "listen")
            engines[int(child.log.read_text())] = [child]
        beside = where.start("beside", ["stand_in", "200"], {"PYTHONPATH": str(tmp_path)})
        first, second = engines
        with where.tied(first, beside):
            if status == 200:
                assert all(seconds > 0 for seconds in ttft_in_slices(where, [first, second], [3]))
            else:
                with pytest.raises(RuntimeError, match="answered 500"):
                    ttft_in_slices(where, [first, second], [3])
            assert [_state(child) for child in (*engines[first], *engines[second])] == ["T"] * 3
            where.only(first)
            assert [_state(child) for child in (*engines[first], *engines[second])] == ["S", "S", "T"]
            where.stop_all()
        assert _state(beside) == "S"  # it is nobody's now
        where.only(second)


def _state(child: Child) -> str:
    """As the kernel says it, when it has come to rest: T is stopped, S sleeps."""
    stat = Path(f"/proc/{child.process.pid}/stat")
    eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] in "TS", "it rests")
    return stat.read_text().rpartition(")")[2].split()[0]


def test_a_servers_time_is_that_of_its_slices_until_the_token() -> None:
    assert seconds_until(3.5, [(0.0, 1.0), (3.0, 4.0), (6.0, 7.0)]) == 1.5
    assert seconds_until(9.0, [(0.0, 1.0), (3.0, 4.0)]) == 2.0
