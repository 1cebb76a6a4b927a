"""
Answer for the page and for /v1: one base in memory with its adapters, one answer at a time.

    engine = Engine()                                     # its worker thread waits for jobs
    entry, scale = find("bram@0.6")
    job = engine.submit(Job(entry, lambda voices, name: (messages, {}), decoding(asked), scale))
    await job.next()      # {"loading": base}, {"sent": {...}}, {"text": "Hel"} ..., {"done": {...}}

A base and its adapters are loaded when they are first asked, an adapter again when its file has
changed. Every block of the base looks whether its job is still wanted: a client that goes away
stops its answer in the middle of a token.
"""

import asyncio
import contextlib
import gc
import random
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from lora import adapter, config
from lora.base import fetch, formats, templates
from lora.generate import generate
from lora.run import runlog
from scripts.voices import DECODING, Voices

from .guard import Refused, number


class Entry(NamedTuple):
    """A base, or a run on it, that can be asked."""

    id: str
    base: str                     # the id of its base
    model: config.ModelConfig     # how the base is loaded
    created: int
    run: runlog.Run | None = None

    @property
    def system(self) -> str | None:
        """The system prompt that a run was trained with."""
        return self.run.info.get("system") if self.run else None


def entries() -> tuple[dict[str, Entry], list[str]]:
    """What can be asked, by id: the bases of the runs, those in model/, then the runs, the newest
    first; and sentences about runs that cannot be read."""
    runs, problems = {}, []
    for file in sorted(Path("runs").glob("*/run.json"), key=_age, reverse=True):
        name = file.parent.name
        if not (config.RUN.fullmatch(name) and (file.parent / "adapter" / adapter.CONFIG).exists()):
            continue
        try:
            run = runlog.read_run(file.parent)._replace(name=name)
        except ValueError as error:
            problems.append(str(error))
            continue
        model = run.settings.model
        base = model.name if model.name in fetch.KNOWN else str(run.info.get("base_model"))
        runs[name] = Entry(name, base, model, _age(file), run)
    models = {entry.base: entry.model for entry in reversed(runs.values())}      # the newest's
    for file in sorted(Path("model").glob("*/config.json")):
        name = file.parent.name
        models.setdefault(name, config.ModelConfig(
            name if name in fetch.KNOWN else str(file.parent)))
    ids = {name: f"base:{name}" if name in runs else name for name in models}
    bases = {ids[name]: Entry(ids[name], ids[name], model, _age(Path(model.name)))
             for name, model in models.items()}
    return bases | {name: run._replace(base=ids[run.base]) for name, run in runs.items()}, problems


def _age(file):
    with contextlib.suppress(OSError):
        return int(file.stat().st_mtime)
    return 0


def find(name: object) -> tuple[Entry, float]:
    """The entry and the strength of an id: a base, a run, or run@0.6. Refused if there is none."""
    if not isinstance(name, str):
        raise Refused(f"the model is {name!r:.80}; expected its name", param="model")
    known, _ = entries()
    run, _, strength = name.rpartition("@")
    if name in known:
        return known[name], 1.0
    if run not in known:
        raise Refused(f"the model {name!r:.80} does not exist; there are {', '.join(known)}", 404,
                      "model", "model_not_found")
    if known[run].run is None:
        raise Refused(f"{run} is a base; only an adapter has a strength", param="model")
    try:
        return known[run], number({"model": float(strength)}, "model", 1.0, 0, 4)
    except ValueError:
        raise Refused(f"the strength {strength!r:.20} of {run} is not a number from 0 to 4",
                      param="model") from None


def decoding(asked: dict, length: str = "max_new_tokens") -> dict:
    """How to choose tokens, from a request; where it does not say, as scripts.chat does. length is
    what the request calls max_new_tokens."""
    return {"temperature": number(asked, "temperature", DECODING["temperature"], 0, 2),
            "top_p": number(asked, "top_p", DECODING["top_p"], 1e-6, 1),
            "max_new_tokens": number(asked, length, DECODING["max_new_tokens"], 1, 10**6, int),
            "repetition_penalty": number(asked, "repetition_penalty",
                                         DECODING["repetition_penalty"], 1, 2),
            "seed": number(asked, "seed", random.getrandbits(32), -2**63, 2**63, int)}


class Gone(Exception):
    """Nobody waits for the answer any more."""


class Stopped(Exception):
    """The answer has reached a stop text: (text before it, how many tokens)."""


@dataclass(eq=False)
class Job:
    """An answer to give. prepare(voices, name) is called in the worker and returns the messages to
    send and what to tell about them; an answer ends before the first of the texts in stops."""

    entry: Entry
    prepare: Callable
    decoding: dict
    scale: float = 1.0
    stops: tuple[str, ...] = ()
    gone: bool = False
    events: deque = field(default_factory=deque)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def emit(self, **event) -> None:
        """Tell the client, from any thread."""
        with contextlib.suppress(RuntimeError):                # the server has ended
            self.loop.call_soon_threadsafe(self._add, event)

    def _add(self, event):
        if "text" in event and self.events and "text" in self.events[-1]:
            self.events.pop()                 # a client that reads slowly gets the newest text
        self.events.append(event)
        self.ready.set()

    async def next(self) -> dict:
        """The next event; {"done": ...} and {"error": ...} are the last."""
        while not self.events:
            self.ready.clear()
            await self.ready.wait()
        return self.events.popleft()

    async def until(self, kind: str) -> dict:
        """The next event of a kind; an error is raised."""
        while kind not in (event := await self.next()):
            if "error" in event:
                raise Refused(event["error"], event["status"], code=event["code"])
        return event[kind]


class Engine:
    """places is how many jobs may wait; one more is Refused with 429."""

    def __init__(self, device: str = "auto", places: int = 16):
        self.device, self.places = device, places
        self.voices = self.loaded = self.settings = self.running = None
        self.stamps, self.waiting, self.closed, self.seconds = {}, [], False, 1.0
        self.wake = threading.Condition()
        self.worker = threading.Thread(target=self._work, name="answers", daemon=True)
        self.worker.start()

    def submit(self, job: Job) -> Job:
        with self.wake:
            if self.closed:
                raise Refused("the server is stopping", 503)
            if len(self.waiting) >= self.places:
                later = {"retry-after": str(1 + int(self.seconds))}
                raise Refused(f"{self.places} others are waiting already; try again later", 429,
                              code="queue_full", headers=later)
            self.waiting.append(job)
            self._tell_places()
            self.wake.notify()
        return job

    def drop(self, job: Job) -> None:
        """Stop an answer, or take it out of the queue: nobody waits for it."""
        with self.wake:
            job.gone = True
            if job in self.waiting:
                self.waiting.remove(job)
                self._tell_places()

    def close(self) -> None:
        """Stop all answers; the server ends."""
        with self.wake:
            self.closed = True
            for job in filter(None, [self.running, *self.waiting]):
                job.gone = True
                job.emit(error="the server is stopping", status=503, code=None)
            self.waiting.clear()
            self.wake.notify()

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def _tell_places(self):
        for place, job in enumerate(self.waiting, 1 if self.running else 0):
            if place:
                job.emit(waiting=place)

    # ----- in the worker thread ------------------------------------------------------------------

    def _work(self):
        while True:
            with self.wake:
                self.running = job = None
                self.wake.wait_for(lambda: self.waiting or self.closed)
                if self.closed:
                    return
                job = self.running = self.waiting.pop(0)
                self._tell_places()
            try:
                self._answer(job)
            except Gone:
                continue
            except ValueError as error:
                job.emit(error=str(error), status=400, code=getattr(error, "code", None))
            except Exception as error:                         # the thread must live on
                traceback.print_exc()
                job.emit(error=repr(error), status=500, code=None)

    def _answer(self, job):
        self._load(job)
        voices, name = self.voices, job.entry.run and job.entry.id
        messages, about = job.prepare(voices, name)
        voice = voices.voice(name)
        ids, start = voice.ids(messages), time.monotonic()
        options = {**job.decoding, "max_new_tokens": min(job.decoding["max_new_tokens"],
                                                         self.room(ids))}
        stop = formats.stop_of(voice.tokenizer, voice.format)
        job.emit(sent={**about, "n_tokens": len(ids)})

        def on_token(_, answer):
            if voice.format != "template" or not templates.is_thinking(answer, voice.tokenizer):
                text, at_end = until_stop(voice.text(answer), job.stops)
                if at_end:
                    raise Stopped(text, len(answer))
                job.emit(text=settled(text, (*job.stops, stop.text)))
        try:
            with voices.bank.using(name, job.scale):
                (answer,) = generate(voices.model, [ids], stop, on_token=on_token, **options)
            text, at_end = until_stop(voice.text(answer), job.stops)
            n, at_end = len(answer), at_end or len(answer) < options["max_new_tokens"]
        except Stopped as stopped:
            (text, n), at_end = stopped.args, True
        self.seconds = time.monotonic() - start
        job.emit(done={"text": text, "n_tokens": n, "ended": at_end, "n_prompt": len(ids),
                       "seconds": round(self.seconds, 3)})

    def room(self, ids: list[int]) -> int:
        """How many tokens of the model's context a prompt leaves. Refused if there are none."""
        limit = getattr(self.voices.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and len(ids) >= limit:
            raise Refused(f"the prompt has {len(ids)} tokens; this model's context is {limit} "
                          "tokens, with the answer", param="messages",
                          code="context_length_exceeded")
        return limit - len(ids) if limit else 10**6

    def _load(self, job):
        """Bring the job's base and adapter into memory, and forget adapters that are gone."""
        entry, model = job.entry, job.entry.model
        wanted = (model.name, model.dtype, model.quant)
        n = 3 if entry.run else 1              # a base is asked in the dtype in which it is there
        if self.voices is None or self.settings[:n] != wanted[:n]:
            job.emit(loading=entry.base)
            self.voices, self.loaded, self.stamps = None, None, {}     # one base at a time
            for cache in (formats.special_ids, templates._frame):      # they hold its tokenizers
                cache.cache_clear()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            voices = Voices([], self.device, base=model)
            for blocks in voices.model.modules():
                for block in blocks if isinstance(blocks, torch.nn.ModuleList) else ():
                    block.register_forward_pre_hook(self.go_on)
            self.voices, self.settings, self.loaded = voices, wanted, entry.base
        for name in [n for n, run in self.voices.runs.items() if not run.adapter.exists()]:
            self.voices.remove(name)
            self.stamps.pop(name, None)
        if entry.run and self.stamps.get(entry.id) != (stamp := stamp_of(entry.run)):
            self.stamps.pop(entry.id, None)
            self.voices.add(entry.run)
            self.stamps[entry.id] = stamp
            for problem in self.voices.problems:
                if problem.startswith(f"{entry.id}: "):
                    print(f"warning: {problem}", flush=True)

    def go_on(self, *_) -> None:
        """Raise Gone where nobody waits any more for the answer that is being given."""
        if self.running.gone:
            raise Gone


def stamp_of(run: runlog.Run) -> list[tuple]:
    """What changes when a run's adapter or its settings do."""
    files = (run.adapter / adapter.WEIGHTS, run.adapter / adapter.CONFIG,
             run.adapter.parent / "run.json", run.adapter.parent / "config.json")
    stats = [file.stat() for file in files if file.exists()]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


def until_stop(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """(what of an answer stands before the first stop text, whether there is one)."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[:min(places)], True) if places else (text, False)


def settled(text: str, stops: tuple[str, ...]) -> str:
    """A growing answer without an end that may become a stop text, or a whole character."""
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
               default=0)
    return text[:len(text) - held].rstrip("\ufffd")
