"""What happens in the demo, in order, and what must be true at each step."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from rich.console import Console

from demo import report
from demo.messages import Look, Looked, Ready, Serve, Served, WorkerSettings
from demo.processes import START_SECONDS_MAX, Child, DemoFailed, WorkerProcess
from demo.prompts import ANSWER_TOKENS, DOCUMENT, OTHER_DOCUMENT, Chat, Expected

SEGMENT_SIZE: Final = "256MiB"
"""Of each holder: four times what the demo stores."""

BACK_SECONDS_MAX: Final = 30.0
"""For hits to come back after the server's restart: ten times a worker's interval between tries."""

KV_DIFFERENCE_MAX: Final = 1e-4
"""Of values of about 1. Both runs do the same arithmetic, so we see 0; a library may choose its order."""

POLL_SECONDS: Final = 0.02


class Story:
    """The processes, the prompts and the results so far."""

    def __init__(
        self, console: Console, directory: Path, stack: ExitStack, tier: dict[str, str | int] | None = None
    ) -> None:
        """tier: the configuration of what lies under the pool; None: nothing does."""
        self.console = console
        self.directory = directory
        self.stack = stack
        self.tier = tier or {}
        self.rows: list[report.Row] = []

    def start(self, *, introduce: bool = True) -> None:
        """Start the server, two holders and two workers; return when all are ready."""
        with self.console.status("starting the server, two holders and two workers (each loads torch) …"):
            self.server = self._start_server()
            self.server.wait_for_log("ready")
            self.holders = [self._start_holder(f"shm:{index}") for index in range(2)]
            self.workers = [self._start_worker(index) for index in range(2)]
            for holder in self.holders:
                holder.wait_for_log("ready")
            ready = [worker.receive(Ready, START_SECONDS_MAX) for worker in self.workers]
        if introduce:
            self.expected = Expected(ready[0].chunk_tokens)
            self.console.print(report.introduction(ready[0]))

    def _start_server(self) -> Child:
        return self._started(
            Child(
                "vcache-metadata",
                ["metadata_server.server", "--runtime-dir", str(self.directory)],
                self.directory,
            )
        )

    def _start_holder(self, device: str) -> Child:
        arguments = [
            "segment",
            "--device",
            device,
            "--size",
            SEGMENT_SIZE,
            "--runtime-dir",
            str(self.directory),
        ]
        return self._started(Child(f"holder of {device}", ["vcache.cli", *arguments], self.directory))

    def _start_worker(self, index: int) -> WorkerProcess:
        settings = WorkerSettings(runtime_dir=str(self.directory), device=f"shm:{index}", tier=self.tier)
        worker = WorkerProcess(f"worker {index}", settings, self.directory)
        self.stack.callback(worker.end)
        return worker

    def _started(self, child: Child) -> Child:
        self.stack.callback(child.end)
        return child

    def say(self, text: str) -> None:
        """Print a heading."""
        self.console.print(f"\n[bold]{text}[/bold]")

    def serve(self, index: int, title: str, prompt: list[int], *, with_server: bool = True) -> list[int]:
        """Have worker `index` answer `prompt` with the pool and without; check both; return the answer.

        The hit must be exactly what was stored before; without a server any hit is right, nothing is stored.
        """
        worker = self.workers[index]
        with self.console.status(f"{worker.name}: {title} …"):
            served = worker.ask(Serve(prompt=prompt, answer_tokens=ANSWER_TOKENS, cached=True), Served)
            plain = worker.ask(Serve(prompt=prompt, answer_tokens=ANSWER_TOKENS, cached=False), Served)
        self._compare(f"{worker.name}: {title}", served, plain)
        wanted = self.expected.hit_tokens(prompt)
        if with_server and served.hit_tokens != wanted:
            raise DemoFailed(f"{worker.name}: {title}: {served.hit_tokens} hit tokens, expected {wanted}")
        if with_server:
            self.expected.stored(prompt)
        row = report.Row(title, worker.name, len(prompt), served, plain, plain.kv_difference or 0.0)
        self.rows.append(row)
        self.console.print(report.line(row))
        return served.answer

    def _compare(self, what: str, served: Served, plain: Served) -> None:
        """Raise `DemoFailed` unless the tokens are equal and the KV is."""
        if served.answer != plain.answer:
            raise DemoFailed(
                f"{what}: the answers differ: {served.answer} with {served.hit_tokens} tokens from the pool,"
                f" {plain.answer} without cache"
            )
        difference = plain.kv_difference
        if difference is None or not difference <= KV_DIFFERENCE_MAX:  # NaN is a difference too
            raise DemoFailed(f"{what}: the KV in the pages differs from the computed one by {difference}")

    def share(self) -> None:
        """Two chats over one document go from worker to worker; then a prompt that must not hit."""
        self.say("1. Worker 0 computes and stores; worker 1 reads and goes on")
        self.chat_a, self.chat_b = Chat(DOCUMENT), Chat(DOCUMENT)
        prompt = self.chat_a.ask("When is the lamp lit, and how far can it be seen?")
        self.serve(0, "chat A, turn 1, nothing there yet", prompt)
        self.chat_a.answered(self.serve(1, "chat A, turn 1", prompt))
        prompt = self.chat_a.ask("And if the lamp fails in the night, what do I do first?")
        self.chat_a.answered(self.serve(1, "chat A, turn 2", prompt))
        prompt = self.chat_b.ask(
            "There are nine of us, two of them small children. May all of us come up at once, may they"
            " touch the lens, and at what time of the day should we be at the door?"
        )
        self.chat_b.answered(self.serve(1, "chat B, turn 1", prompt))
        prompt = self.chat_b.ask(
            "I would like to bring my dog. Is there a place where it can wait for us meanwhile?"
        )
        self.chat_b.answered(self.serve(0, "chat B, turn 2", prompt))
        prompt = Chat(OTHER_DOCUMENT).ask("How heavy was the hive?")
        self.serve(1, "another document", prompt)

    def kill_worker(self) -> None:
        """The worker that computed the document dies; the holder of its chunks does not."""
        self.say("2. Worker 0 is killed (SIGKILL); the holders keep what it stored")
        self.workers[0].kill()
        prompt = self.chat_a.ask("What do I tell the keeper who takes over from me at midnight?")
        self.chat_a.answered(self.serve(1, "chat A, turn 3", prompt))

    def kill_server(self) -> None:
        """The server dies, a worker does without it, the server comes back, and the pool is still warm."""
        self.say("3. The server is killed (SIGKILL), and comes back")
        self.server.kill()
        prompt = self.chat_b.ask("Who is told when the interval of the flashes was changed?")
        looked = self.workers[1].ask(Look(prompt=prompt), Looked)
        self.console.print(
            f"  no server: lookup says {looked.hit_tokens} tokens after {looked.seconds * 1000:.2f} ms"
        )
        self.serve(1, "chat B, turn 3, no server", prompt, with_server=False)
        started = time.monotonic()
        self.server = self._start_server()
        self._wait_for_hits(prompt, started)
        self.serve(1, "chat B, turn 3, server is back", prompt)

    def _wait_for_hits(self, prompt: list[int], started: float) -> None:
        wanted = self.expected.hit_tokens(prompt)
        while (hit := self.workers[1].ask(Look(prompt=prompt), Looked).hit_tokens) != wanted:
            self.server.check_alive()
            if time.monotonic() - started > BACK_SECONDS_MAX:
                raise self.server.failure(
                    f"is back for {BACK_SECONDS_MAX:.0f} s; worker 1 finds {hit} tokens, expected {wanted}"
                )
            time.sleep(POLL_SECONDS)
        self.console.print(
            f"  the server is back: hits again {time.monotonic() - started:.1f} s after its start"
        )

    def end_everything(self, directory: Path) -> None:
        """All processes of the pool end, as at a reboot; a new pool begins with what the lower tier has."""
        tier = self.tier["tiers.order"]
        self.say(f"4. All workers, holders and the server end; a new pool finds what {tier} kept")
        for process in (*self.workers[1:], *self.holders, self.server):
            process.end()  # a worker that ends in order writes what still waits for the tier
        self.directory = directory
        self.start(introduce=False)
        prompt = self.chat_a.ask("Who may turn the lens, and when?")
        self.chat_a.answered(self.serve(0, "chat A, turn 4, new pool", prompt))
        prompt = self.chat_b.ask("And what is written in the log about visitors?")
        self.chat_b.answered(self.serve(1, "chat B, turn 4, new pool", prompt))

    def summary(self) -> None:
        """Print the table and what was shown."""
        self.console.print()
        self.console.print(report.table(self.rows))
        self.console.print(report.verdict(self.rows))
