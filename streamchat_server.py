#!/usr/bin/env python3
r"""Streamable HTTP chat: multi-turn chat with a language model over plain HTTP/1.1, in one file.

A client POSTs a message. The server answers with a stream of events. Each event is one line of JSON. The
server sends each line as a chunk of the chunked transfer coding, here called a transfer chunk: its size in
hex, CRLF, the line, CRLF.

    > POST /sessions/demo/stream HTTP/1.1
    > Host: localhost:8000
    > Content-Type: application/json
    > Content-Length: 33
    >
    > {"message":"Hi!","turn_id":"t-1"}

    < HTTP/1.1 200 OK
    < Content-Type: application/x-ndjson
    < Transfer-Encoding: chunked
    < …
    <
    < 8c
    < {"type":"session_info","session_id":"demo","turn_id":"t-1","model":"offline","created":true,…}
    <
    < 4a
    < {"type":"status","message":"Generating response...","context_messages":0}
    <
    < 82
    < {"type":"chunk","text":"You said: Hi!\n\nThis ","chunk_number":1,"is_final":false,"timestamp":"…"}
    <
      (… more chunks, a tenth of a second apart; the last one has "is_final":true …)
    < bc
    < {"type":"complete","finish_reason":"stop","total_chunks":4,"processing_time":0.300712,…}
    <
    < 0
    <

The last line is a terminal event, `complete` or `error`. If a stream ends without one, the connection was
cut. Its turn goes on. The client sends the same POST with the same `turn_id`, and gets the same lines. Or it
GETs /sessions/demo/stream?after=N, and gets the lines after chunk N. A turn that has no reader for 30 s is
stopped. `complete` adds the message and the answer to the history, if there is any text; `error` adds
nothing. README.md has the whole protocol.

A Handler reads a request from its connection, checks it and calls the endpoint for its path. A POST starts a
Turn. A thread of its own runs the model and adds the answer to the turn, piece by piece. Each handler that
follows the turn sends its lines to one client.
"""

from __future__ import annotations

import sys

if not {"ssl", "http.client", "http.server"} & sys.modules.keys():
    # http.server imports http.client, and that imports ssl: a sixth of this server's memory, for nothing. So
    # the import of ssl fails here. A model that imports either of them later gets it whole.
    sys.modules["ssl"] = None  # type: ignore[assignment]
    __import__("http.server")
    del sys.modules["ssl"], sys.modules["http.client"]

import _thread  # start_new_thread() returns at once; Thread.start() waits until the thread runs
import argparse
import json
import os
import re
import signal
import socket
import struct
import threading
import time
import traceback
import unicodedata
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from functools import cache, lru_cache
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from importlib import import_module
from ipaddress import IPv6Address, ip_address
from json.encoder import encode_basestring_ascii
from math import ceil
from pathlib import Path
from queue import Full, Queue, SimpleQueue
from socketserver import BaseRequestHandler
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qs, unquote
from weakref import WeakValueDictionary

PROGRAM = Path(__file__).resolve()
PAGE = PROGRAM.with_name("demo.html")
VERSION = "2.0"
FRAMEWORK = "Python http.server + HTTP Streaming"

# ---- limits, and the codes of problems and errors -------------------------------------------------------

LIMITS = {
    "message": 100_000,  # characters: about 50 pages
    "body": 2 << 20,  # bytes: 100,000 characters, each written as two \uXXXX, and room for the other fields
    "request_line": 8 << 10,  # bytes with its CRLF; RFC 9112, section 3, recommends at least 8,000
    "head": 32 << 10,  # bytes with its last empty line: nginx's four buffers of 8 KiB
    "fields": 100,  # in a head: as in Apache and http.client
    "head_time": 10,  # seconds from the first byte of a head to its last: a head fits into a few packets
    "body_time": 30,  # seconds from the end of the head to the end of the body: 2 MiB at 70 KB/s
    "idle": 60,  # seconds between two requests; nginx allows 75
    "sessions": 10_000,  # a thousand people with ten each
    "chunk": 4096,  # code points: at most 12 bytes each (two \uXXXX), so that a line stays under 64 KiB
    "error_message": 1000,  # characters: a sentence for a person, not a page of HTML
    "model_silence": 120,  # seconds without a piece: longer than a model thinks, shorter than a person waits
    "send": 30,  # seconds without progress after which a reader counts as gone
    "linger": 2,  # seconds for which the server still reads after its last answer on a connection
    "grace": 5,  # seconds that running turns get at shutdown
    "log_text": 500,  # characters of a text in a log line
    "console": 10_000,  # log lines that may wait for a slow terminal; more are dropped
}

ID = r"[A-Za-z0-9_-]{1,64}"
MODEL_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"

# RFC 9110's titles. Python 3.11 and 3.12 have older ones for two of them.
TITLES = {status.value: status.phrase for status in HTTPStatus}
TITLES |= {413: "Content Too Large", 414: "URI Too Long"}

PROBLEMS = {  # code of a problem: status
    "bad_request": 400, "invalid_json": 400, "invalid_field": 400, "unauthorized": 401, "forbidden_host": 403,
    "forbidden_origin": 403, "not_found": 404, "session_not_found": 404, "no_turn": 404,
    "method_not_allowed": 405, "request_timeout": 408, "session_busy": 409, "session_exists": 409,
    "turn_id_reused": 409, "length_required": 411, "payload_too_large": 413, "uri_too_long": 414,
    "unsupported_media_type": 415, "headers_too_large": 431, "internal_error": 500, "not_implemented": 501,
    "overloaded": 503, "version_not_supported": 505,
}

PROBLEM_FIELDS = {  # code of a problem: further fields of its head
    "unauthorized": {"WWW-Authenticate": "Bearer"},
    "overloaded": {"Retry-After": "5"},  # seconds: most restarts take no longer
}

STREAM_ERRORS = {  # code of an `error` event: (retryable, default message)
    "model_error": (False, "The model failed; the server's log has the details."),
    "model_not_found": (False, "The model does not exist. Name another with --model or GENAI_MODEL_ID."),
    "model_auth": (False, "The model's service refused the key. Check GOOGLE_API_KEY or GEMINI_API_KEY."),
    "model_overloaded": (True, "The model's service is overloaded, or a quota is used up. Try again later."),
    "model_blocked": (False, "The model's service blocked the message or the answer."),
    "model_cut": (True, "The model's answer was cut off. Send the same request again."),
    "session_cleared": (False, "The session was cleared while this turn was running."),
    "session_deleted": (False, "The session was deleted while this turn was running."),
    "server_shutdown": (True, "The server is shutting down. Send the same request again when it is back."),
    "internal_error": (True, "Something went wrong in the server; its log has the details."),
}


class Refused(Exception):
    """Raised to answer a request with a problem: a code of PROBLEMS, and a sentence that says what to do."""

    def __init__(self, code: str, detail: str, allow: str = "") -> None:
        self.code, self.detail, self.allow = code, detail, allow


class Failure(Exception):
    """Why a turn failed: a code of STREAM_ERRORS and a message of at most 1,000 characters."""

    def __init__(self, code: str, message: str = "") -> None:
        self.code, self.message = code, (message or STREAM_ERRORS[code][1])[: LIMITS["error_message"]]


class Finish(NamedTuple):
    """How a turn completed: a finish_reason, `usage` if the model tells, and the model's finish reason."""

    reason: str
    usage: dict[str, int] | None = None
    word: str = ""


STOPPED = Finish("cancelled")
Outcome = Finish | Failure

# ---- wire: an event becomes a line, and a line becomes a transfer chunk ----------------------------------

COMPACT = json.JSONEncoder(separators=(",", ":"))


def clock() -> int:
    """Monotonic time in microseconds. Sums of integers are exact: a pace of 0.1 s is never 0.099999 s."""
    return time.monotonic_ns() // 1000


def wall_clock() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


@lru_cache(64)  # without a pace, all chunks of a piece have the same moment
def stamp(microseconds: int) -> str:
    """A moment of the wall clock in ISO 8601, in UTC with microseconds and +00:00."""
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="microseconds")


def encode(**event: Any) -> bytes:
    """An event as a line: one compact JSON object in ASCII, and a newline."""
    return COMPACT.encode(event).encode() + b"\n"


def encode_chunk(text: str, number: int, is_final: bool, timestamp: str) -> bytes:
    """encode() for the most frequent event, several times as fast."""
    return (f'{{"type":"chunk","text":{encode_basestring_ascii(text)},"chunk_number":{number},'
            f'"is_final":{"true" if is_final else "false"},"timestamp":"{timestamp}"}}\n').encode()


def transfer_chunk(line: bytes) -> bytes:
    """A line in the chunked transfer coding (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(line), line)


Stream = Generator[list[bytes]]  # the lines of a log, as many at a time as there are


# ---- turn: a log of lines that any number of readers follow ----------------------------------------------

OPENING = 2  # lines before the chunks: session_info and status


class Turn:
    """One user message and its answer, as a log of lines.

    Each chunk has a moment at which it is due. release() adds the chunks that are due to the log. The moments
    are --chunk-delay apart, so the model may be ahead of the log. If the turn is stopped, the chunks that are
    not due are dropped. If the model ends before its last chunk is due, that chunk is held back and becomes
    the final one. If the model ends later, the final chunk is empty. Moments are microseconds of clock().
    """

    def __init__(self, sessions: Sessions, session: Session, turn_id: str, message: str, created: bool,
                 client: str) -> None:
        """`created` is whether this turn made the session, `client` the address that sent the POST."""
        self.sessions, self.session = sessions, session
        self.turn_id, self.message, self.client = turn_id, message, client
        self.context_messages = 2 * len(session.history)
        self.delay = ceil(sessions.settings.chunk_delay * 1e6)
        self.changed = threading.Condition()  # guards writes to what follows, and wakes readers
        self.state = "running"  # then "complete" or "failed"
        self.sealed = False  # the log takes no more chunks, and is written to disk before the state changes
        self.began = self.ended = clock()
        self.epoch = wall_clock() - self.began  # a later change of the wall clock does not show in this turn
        self.started = self.timestamp(self.began)
        self.lines = [
            encode(type="session_info", session_id=session.session_id, turn_id=turn_id, model=session.model,
                   created=created, timestamp=self.started),
            encode(type="status", message="Generating response...", context_messages=self.context_messages)]
        self.texts: list[str] = []  # of the chunks in the log
        self.pending: deque[tuple[int, str]] = deque()  # moments and texts of the chunks that are not due
        self.first_due: int | None = None  # the moment of the first chunk
        self.last_due = self.began - self.delay  # and of the last; so the first one is due at once
        self.heard = self.began  # when the model's last piece came
        self.asked = False  # whether the model has been asked
        self.pieces: Any = None  # the model's iterator, while it runs
        self.outcome: Any = None  # how the model ended, once it is done
        self.final = ""  # text of the final chunk
        self.readers = 0
        self.deserted: int | None = None  # when the last reader left

    def timestamp(self, moment: int) -> str:
        """A moment of clock() as the wall clock shows it."""
        return stamp(self.epoch + moment)

    def add(self, texts: list[str]) -> None:
        """Add chunks at the pace. If the log is sealed, they are dropped."""
        with self.changed:
            if not self.sealed:
                self.heard = clock()
                for text in texts:
                    self.last_due = max(self.heard, self.last_due + self.delay)
                    self.first_due = self.first_due or self.last_due
                    self.pending.append((self.last_due, text))
                self.changed.notify_all()

    def ask(self) -> None:
        """Ask the model, once. Every reader calls this when session_info has left; the first call counts."""
        with self.changed:
            is_first, self.asked = not self.asked, True
        if is_first:
            self.sessions.start(self)

    def wait_for_pace(self, outcome: Outcome) -> None:
        """The model is done: wait until its last chunk is due, or until something else ends the turn."""
        with self.changed:
            self.release()  # first, so that a chunk that is due is never held back
            self.outcome = outcome
            if self.pending:
                rest = (self.last_due - clock()) / 1e6
                self.changed.wait_for(lambda: self.sealed, min(rest, threading.TIMEOUT_MAX))

    def release(self) -> int:
        """Add the chunks that are due to the log. Returns the moment. (`changed` is held.)"""
        now = clock()
        held_back = 1 if isinstance(self.outcome, Finish) else 0  # an error is not preceded by a final chunk
        while len(self.pending) > held_back and self.pending[0][0] <= now:
            due, text = self.pending.popleft()
            self.texts.append(text)
            self.lines.append(encode_chunk(text, len(self.texts), False, self.timestamp(due)))
            self.sessions.console.chunk_released(self, self.epoch + due)
        return now

    def seal(self, outcome: Outcome) -> list[bytes]:
        """Take no more chunks, and drop those that are not due. Returns the lines that publish() adds."""
        with self.changed:
            self.sealed = True
            if outcome is not self.outcome:
                self.outcome = None  # a stop, for example: no chunk is held back
            self.ended = self.release()
            if isinstance(self.outcome, Finish) and self.pending:
                due, self.final = self.pending.pop()
                self.ended = max(self.ended, due)  # a wait may be a microsecond too short
            self.pending.clear()
            self.changed.notify_all()  # wait_for_pace()
        timestamp = self.timestamp(self.ended)
        ids = {"session_id": self.session.session_id, "turn_id": self.turn_id, "timestamp": timestamp}
        if isinstance(outcome, Failure):
            return [encode(type="error", code=outcome.code, message=outcome.message,
                           retryable=STREAM_ERRORS[outcome.code][0], **ids)]
        total = len(self.texts) + 1
        gained = 2 if self.texts else 0  # messages in the history
        usage = {"usage": outcome.usage} if outcome.usage else {}
        return [encode_chunk(self.final, total, True, timestamp), encode(
            type="complete", finish_reason=outcome.reason, total_chunks=total,
            processing_time=(self.ended - self.began) / 1e6, message_count=self.context_messages + gained,
            **usage, **ids)]

    def publish(self, outcome: Outcome, ending: list[bytes]) -> None:
        """Add the lines that seal() returned. (`changed` is held.)"""
        self.state = "failed" if isinstance(outcome, Failure) else "complete"
        if self.state == "complete":
            self.texts.append(self.final)
            self.sessions.console.chunk_released(self, self.epoch + self.ended)
        self.lines += ending
        self.changed.notify_all()

    def follow(self, after: int) -> Stream:
        """Yield the log without chunks 1 to `after`, as many lines at a time as there are.

        The terminal event comes last. An empty list means that --heartbeat seconds passed without a line.
        """
        with self.changed:
            self.readers += 1
        try:
            yield self.lines[:OPENING]
            self.ask()
            at, spoken, running = OPENING + after, clock(), True
            while running:
                with self.changed:
                    now, running = self.release(), self.state == "running"
                    if not running:
                        at = min(at, len(self.lines) - 1)  # the terminal event comes whatever `after` was
                    lines = self.lines[at:]
                    rest = spoken + round(self.sessions.settings.heartbeat * 1e6) - now  # until a ping
                    pause = self.pending[0][0] - now if self.pending else 0  # until the next chunk is due
                    waits = running and not lines and rest > 0
                    if waits and pause <= 0:  # another thread decides what comes next
                        self.changed.wait(rest / 1e6)
                        continue
                if waits:  # half the cost of Condition.wait(); so a stop is seen up to 0.1 s later
                    time.sleep(min(pause, rest, 100_000) / 1e6)
                else:
                    yield lines
                    at, spoken = at + len(lines), clock()
        finally:
            self.ask()  # also if the send of the first lines has failed
            with self.changed:
                self.readers -= 1
                if not self.readers:
                    self.deserted = clock()


# ---- sessions: histories, and at most one running turn in each -------------------------------------------
#
# Locks are taken in this order: Sessions.alone() of a session, and of "new"; then either Database.lock, or
# Sessions.lock, which guards changes of the dict of sessions, their histories and the counters, and after it
# `changed` of a Turn, which guards its log. No thread waits for the disk under the last two.


class Message(NamedTuple):
    """One entry of a history, as models and clients get it."""

    role: str  # user or model
    text: str
    timestamp: str
    turn_id: str


class KeptTurn(NamedTuple):
    """A complete turn, as the history and the database keep it."""

    turn_id: str
    message: str
    answer: str
    started: str  # timestamps
    ended: str
    log: bytes  # its lines, compressed
    state: str = "complete"

    def follow(self, after: int) -> Stream:
        """The same as Turn.follow(); the log is whole."""
        lines = zlib.decompress(self.log).splitlines(keepends=True)
        yield lines[:OPENING] + lines[OPENING + after : -1] + lines[-1:]


class Session:
    """One conversation: an id, a model, a history, and at most one running turn."""

    def __init__(self, session_id: str, model: str, created_at: int, last_activity: int) -> None:
        """The times are microseconds since 1970."""
        self.session_id, self.model = session_id, model
        self.created_at, self.last_activity = created_at, last_activity
        self.history: list[KeptTurn] = []
        self.latest: Turn | KeptTurn | None = None  # the latest turn since the server started

    def running_turn(self) -> Turn | None:
        """The running turn, or None."""
        latest = self.latest  # read once: another thread may change it
        return latest if isinstance(latest, Turn) and latest.state == "running" else None

    def find(self, turn_id: str) -> Turn | KeptTurn | None:
        """The turn with this id that is running or kept. A failed one is not found, since it is run again."""
        for turn in [self.latest, *self.history]:
            if turn and turn.turn_id == turn_id and turn.state != "failed":
                return turn
        return None

    def messages(self) -> list[Message]:
        """The history: two messages for each turn."""
        return [message for turn in self.history for message in (
            Message("user", turn.message, turn.started, turn.turn_id),
            Message("model", turn.answer, turn.ended, turn.turn_id))]


class Sessions:
    """The lock-guarded dict of all sessions, and the counters. Methods raise Refused and DatabaseError."""

    def __init__(self, settings: argparse.Namespace, console: Console, database: Database | None) -> None:
        self.settings, self.console, self.database = settings, console, database
        self.lock = threading.Lock()
        self.locks: WeakValueDictionary[str, Any] = WeakValueDictionary()  # of sessions, while they are used
        self.sessions = database.sessions if database else {}
        self.shutting_down = False  # then no turn begins
        self.running: dict[Turn, None] = {}  # in the order of their start
        self.models = 0  # threads that run a model: one for each running turn, and some for ended ones
        self.successful = self.failed = self.created = self.chunks = self.bytes = 0
        self.response_time = 0.0  # seconds, of all turns that have ended
        self.first_chunks: deque[float] = deque(maxlen=1000)  # seconds from a turn's start to its first chunk

    def get(self, session_id: str) -> Session:
        """The session. Raises Refused: session_not_found."""
        session = self.sessions.get(session_id)
        if session is None:
            raise Refused("session_not_found", "There is no such session. GET /sessions lists them.")
        return session

    def alone(self, session_id: str) -> Any:
        """The lock under which a session is made, cleared or deleted, and its turns begin and end."""
        with self.lock:
            return self.locks.setdefault(session_id, threading.RLock())

    def create(self, session_id: str, model: str) -> Session:
        """A new session. Raises Refused: session_exists, overloaded."""
        now = wall_clock()
        session = Session(session_id, model, now, now)
        with self.alone(session_id), self.alone("new"):  # one thread at a time counts; "new" is no id
            if session_id in self.sessions:
                raise Refused("session_exists", f"The session {session_id} exists. Choose another id.")
            if len(self.sessions) >= LIMITS["sessions"]:
                raise Refused("overloaded", f"There are {LIMITS['sessions']:,} sessions. Delete one.")
            if self.database:
                self.database.add_session(session)
            with self.lock:
                self.sessions[session_id] = session
                self.created += 1
        return session

    def begin(self, message: str, session_id: str, turn_id: str | None, client: str) -> Turn | KeptTurn:
        """The turn that a POST follows: the one that it repeats, or a new one.

        Raises Refused: turn_id_reused, session_busy, overloaded.
        """
        with self.alone(session_id):
            session = self.sessions.get(session_id)
            repeated = session.find(turn_id) if session and turn_id else None
            if repeated:
                if repeated.message != message:
                    raise Refused("turn_id_reused", f"{turn_id} has another message. Choose a new turn_id.")
                return repeated
            if session and session.running_turn():
                raise Refused("session_busy", "A turn is running in this session. Wait for it, or stop it.")
            if self.shutting_down or self.models >= self.settings.max_connections:
                raise Refused("overloaded", "Too many turns are running, or the server is shutting down.")
            created = session is None
            session = session or self.create(session_id, self.settings.model)
            turn = Turn(self, session, turn_id or str(uuid.uuid4()), message, created, client)
            with self.lock:
                session.latest, session.last_activity = turn, turn.epoch + turn.began
                self.running[turn] = None
                self.models += 1
            self.console.turn_started(turn, len(self.running))
            return turn

    def start(self, turn: Turn) -> None:
        """Start the model of a turn in a thread of its own."""
        try:
            _thread.start_new_thread(self._run, (turn,))
        except RuntimeError:  # the system has no thread left
            with self.lock:
                self.models -= 1
            self.end(turn, Failure("internal_error"))

    def _run(self, turn: Turn) -> None:
        """The thread of a turn: run the model, wait for the pace, and end the turn."""
        try:
            outcome = run_model(turn)
            turn.wait_for_pace(outcome)
            self.end(turn, outcome)
        finally:
            with self.lock:
                self.models -= 1

    def end(self, turn: Turn, outcome: Outcome) -> bool:
        """End a turn: write it, publish its last lines, keep it, and count it. False if it had ended before.

        No reader sees `complete` before the turn is on disk. If the write fails, the turn fails.
        """
        session, kept = turn.session, None
        with self.alone(session.session_id):
            if turn.state != "running":
                return False
            ending = turn.seal(outcome)
            if isinstance(outcome, Finish) and turn.texts:
                kept = KeptTurn(turn.turn_id, turn.message, "".join(turn.texts) + turn.final, turn.started,
                                turn.timestamp(turn.ended), zlib.compress(b"".join(turn.lines + ending), 1))
                try:
                    if self.database:
                        self.database.add_turn(session.session_id, kept, turn.epoch + turn.ended)
                except DatabaseError as error:
                    self.console.trouble(error)
                    kept, outcome = None, Failure("internal_error")
                    ending = turn.seal(outcome)
            with self.lock, turn.changed:
                turn.publish(outcome, ending)
                if kept:
                    session.history.append(kept)
                session.latest = kept or turn  # a kept turn is compressed, so the long log can be freed
                session.last_activity = turn.epoch + turn.ended
                self._count(turn)
            self.console.turn_ended(turn, outcome, len(self.running))
        pieces, turn.pieces = turn.pieces, None
        if pieces is not None:
            try:
                _thread.start_new_thread(close_model, (pieces,))  # its close() may block
            except RuntimeError:  # the system has no thread left
                close_model(pieces)
        return True

    def _count(self, turn: Turn) -> None:
        del self.running[turn]
        self.successful += turn.state == "complete"
        self.failed += turn.state == "failed"
        self.chunks += len(turn.texts)
        self.bytes += sum(map(len, turn.lines))
        self.response_time += (turn.ended - turn.began) / 1e6
        if turn.first_due:
            self.first_chunks.append((turn.first_due - turn.began) / 1e6)

    def stop(self, session_id: str, turn_id: str | None) -> bool:
        """Stop the running turn, unless `turn_id` names another turn. False if nothing was stopped."""
        turn = self.get(session_id).running_turn()
        if not turn or turn_id not in (None, turn.turn_id) or not self.end(turn, STOPPED):
            return False
        if turn.state == "failed":
            raise DatabaseError("the stopped turn could not be written")
        return True

    def clear(self, session_id: str, deletes: bool) -> None:
        """Forget the history, or the whole session, and end a running turn."""
        with self.alone(session_id):
            session, now = self.get(session_id), wall_clock()
            if self.database:
                self.database.clear(session_id, deletes, now)
            turn = session.running_turn()
            if turn:
                self.end(turn, Failure("session_deleted" if deletes else "session_cleared"))
            with self.lock:
                session.history, session.latest, session.last_activity = [], None, now
                if deletes:
                    del self.sessions[session_id]

    def sweep(self) -> None:
        """Look after the running turns, ten times a second.

        In a thread of its own, because end() waits for the disk.
        """
        while True:
            time.sleep(0.1)
            for turn in list(self.running):
                try:
                    self._look_after(turn)
                except Exception as error:
                    self.console.trouble(error)

    def _look_after(self, turn: Turn) -> None:
        """End a turn that had no reader for --resume-window, or no piece for LIMITS["model_silence"]."""
        with turn.changed:
            now = turn.release()  # the console logs chunks, also without a reader
        silence = LIMITS["model_silence"]
        if turn.deserted and not turn.readers and now - turn.deserted >= self.settings.resume_window * 1e6:
            self.end(turn, STOPPED)
        elif not turn.outcome and now - turn.heard >= silence * 1e6:
            why = f"The model was silent for {silence} s. Send the same request again."
            self.end(turn, Failure("model_cut", why))

    def close(self) -> None:
        """Begin no more turns, give running ones their grace, end the rest, and let their models close."""
        self.shutting_down = True
        wait_until(lambda: not self.running, LIMITS["grace"])
        for turn in list(self.running):
            self.end(turn, Failure("server_shutdown"))
        wait_until(lambda: not self.models, 1)


# ---- models: a model takes a history and returns an iterator of pieces -----------------------------------
#
# The iterator may have a close(). Only the models in this file can end it with a Finish, or raise Failure.

Model = Callable[[list[Message]], Iterable[Any]]
FUNCTIONS: dict[str, Model] = {}  # the MODULE:FUNCTION that this server was started with


def run_model(turn: Turn) -> Outcome:
    """Run the session's model into a turn until it is done or the turn ends. Returns how the model ended.

    An answer without any text is a failure.
    """
    finish = Finish("stop", word="stop")
    new = Message("user", turn.message, turn.started, turn.turn_id)
    try:
        pieces = turn.pieces = call_model(turn.session.model, [*turn.session.messages(), new])
        if not turn.sealed:  # otherwise end() came before there was an iterator to close
            for piece in pieces:
                if isinstance(piece, Finish):
                    finish = piece
                else:
                    turn.add(split(piece, turn.sessions.settings.chunk_words))
                if turn.sealed:
                    break
        if turn.sealed:
            close_model(pieces)
        turn.pieces = None  # it is done, so end() need not close it
    except Failure as failure:
        return failure
    except BaseException as error:  # sys.exit() in a model ends only its turn
        if not turn.sealed:
            turn.sessions.console.trouble(error)
        return Failure("model_error")
    if turn.first_due:
        return finish
    if finish.reason == "content_filter":
        return Failure("model_blocked", f"{STREAM_ERRORS['model_blocked'][1]} ({finish.word})")
    return Failure("model_error", f"The model ended its answer without any text ({finish.word}).")


def split(piece: str, words: int) -> list[str]:
    """A piece as texts of at most `words` words and 4,096 code points, which join to the piece again.

    Lone surrogates become U+FFFD.
    """
    size = LIMITS["chunk"]
    piece = re.sub("[\ud800-\udfff]", "\ufffd", piece)
    texts = re.findall(rf"\s*(?:\S+\s*){{1,{words}}}|\s+", piece)
    return [text[at : at + size] for text in texts for at in range(0, len(text), size)]


def close_model(pieces: Any) -> None:
    """Close a model's iterator. A generator that is running goes on until its next yield."""
    with suppress(BaseException):  # there may be no close(), or it raises anything
        pieces.close()


def call_model(model_id: str, history: list[Message]) -> Iterable[Any]:
    """The pieces of an answer. Raises Failure."""
    if model_id in FUNCTIONS:
        return FUNCTIONS[model_id](history)
    if trouble := model_trouble(model_id):
        raise Failure("model_not_found" if ":" in model_id else "model_auth", trouble)
    return offline(history) if model_id == "offline" else GeminiAnswer(model_id, history)


def model_trouble(model_id: str) -> str | None:
    """Why a model cannot be used here, as a sentence, or None. Does not load google-genai."""
    if model_id == "offline" or model_id in FUNCTIONS:
        return None
    if ":" in model_id:
        return f"{model_id} is not the function that this server was started with. Use --model offline."
    keys = gemini_keys()
    if not keys and not gemini_on_vertex():
        return f"{model_id} needs an API key: set GEMINI_API_KEY or GOOGLE_API_KEY, or use --model offline."
    if not all(key.isascii() and key.isprintable() for key in keys):
        return "GEMINI_API_KEY or GOOGLE_API_KEY is not an API key: correct it, or use --model offline."
    from importlib.util import find_spec

    with suppress(ModuleNotFoundError):  # there is no google package to look into
        if find_spec("google.genai"):
            return None
    return f"{model_id} needs google-genai: pip install google-genai, or use --model offline."


def offline(history: list[Message]) -> Iterator[str]:
    """A model that needs no key: it repeats the message and says how many messages came before it."""
    before = len(history) - 1
    yield (f"You said: {history[-1].text}\n\n"
           f"This is the offline model. {before} messages came before this one.")


# Gemini, by google-genai's asynchronous client. One event loop, in a thread of its own, serves all turns. A
# task can be cancelled whatever it waits for: a connect, TLS, a head, an event or the pause before a retry.

DEFAULT_GEMINI = "gemini-3.8-flash"
GEMINI_CODES = {401: "model_auth", 403: "model_auth", 404: "model_not_found", 429: "model_overloaded",
                503: "model_overloaded"}  # status: code; any other status is a model_error
FILTERS = ["SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR", "ESCALATION"]
FINISH_REASONS = {"STOP": "stop", "MAX_TOKENS": "length", **dict.fromkeys(FILTERS, "content_filter")}
PROXIES = ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"]
NETWORK = [*PROXIES, "SSL_CERT_FILE", "SSL_CERT_DIR", "GOOGLE_GEMINI_BASE_URL", "GOOGLE_VERTEX_BASE_URL"]
# Names of exceptions. An ExceptionGroup tells of a port that is too high.
MISCONFIGURED = re.compile("Proxy|UnsupportedProtocol|InvalidURL|Cert|ExceptionGroup")
LOOKS_LIKE_A_KEY = re.compile(r"\b(AIza|AQ\.|ya29\.)[\w.-]{20,}")


def gemini_keys() -> list[str]:
    """The keys that are set; the first one counts. They may have been pasted with white space."""
    keys = [os.environ.get(name, "").strip() for name in ("GOOGLE_API_KEY", "GEMINI_API_KEY")]
    return [key for key in keys if key]


def gemini_on_vertex() -> bool:
    """Whether the environment asks for Vertex AI. The newer name goes first."""
    flag = os.environ.get("GOOGLE_GENAI_USE_ENTERPRISE", os.environ.get("GOOGLE_GENAI_USE_VERTEXAI", ""))
    return flag.lower() in ("true", "1")


class GeminiAnswer:
    """The texts of one answer as they come, then a Finish. close() cancels the request, from any thread."""

    starting = threading.Lock()
    loop: Any = None

    def __init__(self, model_id: str, history: list[Message]) -> None:
        import asyncio  # takes as long to load as all the rest; google-genai loads it, too

        with self.starting:
            if not self.loop:
                GeminiAnswer.loop = asyncio.new_event_loop()
                threading.Thread(target=self.loop.run_forever, name="gemini", daemon=True).start()
        self.items: SimpleQueue[str | Outcome | None] = SimpleQueue()  # None: it was closed
        self.task = asyncio.run_coroutine_threadsafe(self._run(model_id, history), self.loop)

    def __iter__(self) -> Iterator[str | Finish]:
        while (item := self.items.get()) is not None:
            if isinstance(item, Failure):
                raise item
            yield item
            if isinstance(item, Finish):
                return

    def close(self) -> None:
        self.task.cancel()
        self.items.put(None)

    async def _run(self, model_id: str, history: list[Message]) -> None:
        client, usage, word = None, None, ""
        contents = [{"role": message.role, "parts": [{"text": message.text}]} for message in history]
        try:
            client = gemini_client()
            stream = await client.aio.models.generate_content_stream(model=model_id, contents=contents)
            async for response in stream:
                self.items.put(response.text or "")
                usage = gemini_usage(response.usage_metadata) or usage
                if response.prompt_feedback and response.prompt_feedback.block_reason:
                    blocked = response.prompt_feedback.block_reason.value
                    self.items.put(Finish("content_filter", usage, blocked))
                    return
                if response.candidates and response.candidates[0].finish_reason:
                    word = response.candidates[0].finish_reason.value
        except Exception as error:
            self.items.put(gemini_failure(model_id, error, at_setup=client is None))
            return
        if word in ("", "FINISH_REASON_UNSPECIFIED"):
            self.items.put(Failure("model_cut", f"{model_id}: The answer ended without a finish reason."))
        else:
            self.items.put(Finish(FINISH_REASONS.get(word, "other"), usage, word))


@cache
def gemini_client() -> Any:
    """One client for all turns, since making one takes 50 ms. It reads its settings from the environment.

    Called in the event loop only.
    """
    import logging
    import warnings
    from types import SimpleNamespace

    logging.getLogger("google_genai").setLevel(logging.ERROR)  # its warnings would spoil the server's output
    warnings.filterwarnings("ignore", module=r"google\.genai")
    for name in {"GOOGLE_API_KEY", "GEMINI_API_KEY"} & os.environ.keys():
        os.environ[name] = os.environ[name].strip()
    from google import genai

    # By default httpx has 100 connections, and more turns wait. It takes any object with these attributes.
    limits = SimpleNamespace(max_connections=None, max_keepalive_connections=20, keepalive_expiry=5.0)
    retries = {"attempts": 3, "initial_delay": 0.5, "jitter": 0.5, "http_status_codes": [429, 500, 503]}
    options: Any = {"retry_options": retries, "async_client_args": {"limits": limits},
                    "timeout": 600_000}  # milliseconds; the sweep ends a silent turn before that
    return genai.Client(http_options=options)


def gemini_usage(found: Any) -> dict[str, int] | None:
    """The token counts up to this response, if it has any. Thoughts count as output."""
    if not found:
        return None
    given = found.prompt_token_count or 0
    written = (found.candidates_token_count or 0) + (found.thoughts_token_count or 0)
    total = found.total_token_count or given + written
    return {"input_tokens": given, "output_tokens": written, "total_tokens": total}


def gemini_failure(model_id: str, error: Any, at_setup: bool) -> Failure:
    """An exception of google-genai, its transport or Google's login, as the failure of a turn."""
    name, text, kinds = type(error).__name__, without_keys(str(error)), ""
    cause: BaseException | None = error
    while cause:
        kinds += f" {type(cause).__module__}.{type(cause).__name__}"
        cause = cause.__cause__ or cause.__context__
    status = getattr(error, "code", None)
    if isinstance(status, int):
        meant = 401 if status == 400 and "API_KEY_INVALID" in str(error) else status
        code = GEMINI_CODES.get(meant, "model_error")
        said = without_keys(str(getattr(error, "message", None) or "no reason"))
        return Failure(code, f"{STREAM_ERRORS[code][1]} ({model_id}: {status}, {said})")
    here = [each for each in NETWORK if os.environ.get(each) or os.environ.get(each.lower())]
    unreachable_proxy = "Connect" in kinds and set(here) & set(PROXIES)
    is_login = "google.auth" in kinds and name != "TransportError"
    if unreachable_proxy or MISCONFIGURED.search(kinds) or (at_setup and not is_login):
        advice = f"Check {', '.join(NETWORK)} (set here: {', '.join(here) or 'none'})."
        return Failure("model_error", f"{model_id}: The configuration cannot work ({name}: {text}). {advice}")
    if is_login:
        return Failure("model_auth", f"{model_id}: The Google Cloud credentials do not work: {text}")
    return Failure("model_cut", f"{model_id}: The connection broke or could not be made ({name}).")


def without_keys(text: str) -> str:
    """A text of the service on one line. Keys are removed before it is shortened, so that no part remains."""
    for key in sorted(gemini_keys(), key=len, reverse=True):  # one may contain the other
        text = text.replace(key, "[key]")
    return " ".join(LOOKS_LIKE_A_KEY.sub("[key]", text).split())[:600].rstrip(".")


# ---- database: what --db keeps, in a file of SQLite. It is read at start, and after that only written. -----

APPLICATION_ID = int.from_bytes(b"SCht", "big")  # marks a file as ours
SCHEMA_VERSION = 2
SCHEMA = f"""
CREATE TABLE sessions (session_id TEXT PRIMARY KEY, model TEXT, created_at INTEGER, last_activity INTEGER);
CREATE TABLE turns (session_id TEXT, turn_id TEXT, message TEXT, answer TEXT, started TEXT, ended TEXT,
                    log BLOB, PRIMARY KEY (session_id, turn_id));
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
PRAGMA journal_mode = WAL;
"""


class DatabaseError(Exception):
    """The file of --db cannot be opened or written. Nothing was changed."""


class Database:
    """The file of --db. One server has it; other programs may read it. Methods raise DatabaseError."""

    def __init__(self, file: str) -> None:
        self.sqlite3 = import_module("sqlite3")  # not loaded without --db
        self.path, self.lock = Path(os.path.realpath(file)), threading.Lock()
        try:
            if os.path.lexists(self.path) and not self.path.is_file():  # a device, or a link to itself
                raise OSError("it is not a file")
            # FILE-lock is locked, so that other programs can read FILE. The lock ends with the process.
            self.owner = self._connect(f"{self.path}-lock")
            self.owner.execute("PRAGMA journal_mode = MEMORY")  # otherwise SQLite makes one more file
            self.owner.execute("BEGIN EXCLUSIVE")
            has_wal = Path(f"{self.path}-wal").exists()  # left by a kill: it has the last turns
            if not has_wal and not (self.path.exists() and self.path.stat().st_size):
                self._make()
            # Without a -wal the file is opened as immutable, so that SQLite makes no file beside it.
            self.sessions = self._read(f"mode=ro&immutable={int(not has_wal)}")
            self.connection = self._connect(self.path)
            self.connection.execute("PRAGMA synchronous = FULL")
        except self.sqlite3.Error as error:
            why = "another program uses it" if "locked" in str(error) else error
            raise DatabaseError(f"cannot use {self.path}: {why}") from None
        except OSError as error:
            raise DatabaseError(f"cannot use {self.path}: {error.strerror or error}") from None

    def _connect(self, path: Path | str) -> Any:
        Path(path).touch(0o600)  # SQLite would make it readable for others
        return self.sqlite3.connect(path, timeout=1, check_same_thread=False)

    def _make(self) -> None:
        """Make the file under another name first, so that a kill never leaves a half-made one."""
        from tempfile import mkstemp

        handle, new = mkstemp(prefix=f"{self.path.name}-", dir=self.path.parent)
        os.close(handle)
        with closing(self._connect(new)) as connection:
            connection.executescript(SCHEMA)
        os.replace(new, self.path)

    def _read(self, mode: str) -> dict[str, Session]:
        """All sessions. The connection is read-only: the file may belong to another program."""
        if not self.path.stat().st_size:
            raise OSError("it is empty, but the -wal beside it is not")
        with closing(self.sqlite3.connect(f"{self.path.as_uri()}?{mode}", uri=True)) as found:
            application, version, page, damage = (found.execute(f"PRAGMA {name}").fetchone()[0] for name in (
                "application_id", "user_version", "page_size", "quick_check(1)"))
            if application != APPLICATION_ID:
                raise OSError("it belongs to another program")
            if version != SCHEMA_VERSION:
                raise OSError(f"another version of this program made it: its schema is {version}, "
                              f"not {SCHEMA_VERSION}")
            if damage != "ok":
                raise OSError(f"it is damaged ({' '.join(damage.split())})")
            if self.path.stat().st_size % page:
                raise OSError("it is damaged (its end is missing)")
            rows = found.execute("SELECT session_id, model, created_at, last_activity FROM sessions")
            sessions = {row[0]: Session(*row) for row in rows}
            rows = found.execute("SELECT session_id, turn_id, message, answer, started, ended, log "
                                 "FROM turns ORDER BY rowid")
            for session_id, *turn in rows:
                if session_id not in sessions:
                    raise OSError("it is damaged (a turn has no session)")
                sessions[session_id].history.append(KeptTurn(*turn))
        return sessions

    def _write(self, *statements: tuple[str, tuple]) -> None:
        """Execute the statements in one transaction, which is on disk when this returns."""
        with self.lock:
            try:
                with self.connection:
                    for statement, values in statements:
                        self.connection.execute(statement, values)
            except self.sqlite3.Error as error:
                # A COMMIT that failed may have left its turn in FILE-wal, and a restart would restore it.
                # This write, which changes nothing, replaces it there.
                with suppress(self.sqlite3.Error):
                    self.connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                raise DatabaseError(f"cannot write {self.path}: {error}") from None

    def add_session(self, session: Session) -> None:
        """Insert a session without turns."""
        self._write(("INSERT INTO sessions VALUES (?, ?, ?, ?)",
                     (session.session_id, session.model, session.created_at, session.last_activity)))

    def add_turn(self, session_id: str, turn: KeptTurn, now: int) -> None:
        """Insert a turn. `now` is the session's last activity, in microseconds since 1970."""
        self._write(("INSERT INTO turns VALUES (?, ?, ?, ?, ?, ?, ?)", (session_id, *turn[:6])),
                    ("UPDATE sessions SET last_activity = ? WHERE session_id = ?", (now, session_id)))

    def clear(self, session_id: str, deletes: bool, now: int) -> None:
        """Forget a session's history, or the whole session."""
        forget = ("DELETE FROM sessions WHERE session_id = ?", (session_id,))
        keep = ("UPDATE sessions SET last_activity = ? WHERE session_id = ?", (now, session_id))
        self._write(("DELETE FROM turns WHERE session_id = ?", (session_id,)), forget if deletes else keep)

    def close(self) -> None:
        """Release the file."""
        with self.lock:
            self.connection.close()
            self.owner.close()


# ---- console: banner, boxes and log lines ----------------------------------------------------------------

UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")
WIDTH = 62  # columns inside a box
BOXES = {  # event: colour and title of its box at a terminal; other events are one line
    "stream_started": ("36", "📡 HTTP STREAM STARTED"),
    "stream_completed": ("32", "📡 HTTP STREAM COMPLETED"),
    "stream_stopped": ("32", "📡 HTTP STREAM STOPPED"), "stream_failed": ("31", "📡 HTTP STREAM FAILED"),
    "server_stopped": ("0", "📊 HTTP STREAMING SERVER STATISTICS"),
}


def escape(text: str) -> str:
    """Text from outside on one line: control, bidi and line separator characters become escapes."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def columns(text: str) -> int:
    """How many columns a terminal gives to a text: two for wide characters and emoji, none for marks."""
    total = 0
    for char, following in zip(text, text[1:] + " ", strict=False):
        if unicodedata.category(char) not in ("Mn", "Me", "Cf"):
            total += 2 if unicodedata.east_asian_width(char) in "WF" or following == "\ufe0f" else 1
    return total


def fit(text: str, width: int) -> str:
    """The text in exactly `width` columns, shortened with an ellipsis or filled with spaces."""
    text = text[: 4 * width]  # it may be long, and have marks that take no column
    if columns(text) > width:
        while columns(text) > width - 3:
            text = text[:-1]
        text += "..."
    return text + " " * (width - columns(text))


def box(title: str, rows: dict[str, str]) -> str:
    """A box of lines with a title in its upper edge."""
    head = f"┌─ {title} "
    lines = [f"│ {fit(f'{name}: {value}', WIDTH - 1)}│" for name, value in rows.items()]
    return "\n".join([head + "─" * (WIDTH + 1 - columns(head)) + "┐", *lines, f"└{'─' * WIDTH}┘"])


class Console:
    """Writes what happens: boxes at a terminal, otherwise a line of key=value for each event.

    A thread of its own writes, so that a terminal that is stuck (a full pipe, Ctrl-S) delays no turn.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.pretty = mode == "full" and sys.stdout is not None and sys.stdout.isatty()
        self.colour = self.pretty and not os.environ.get("NO_COLOR")
        if self.colour and os.name == "nt":
            os.system("")  # makes a Windows console read escape sequences
        self.errors: deque[str] = deque(maxlen=20)
        self.queue: Queue[tuple[Any, str] | None] = Queue(LIMITS["console"])
        self.writer = threading.Thread(target=self._write, name="console", daemon=True)
        self.writer.start()

    def print(self, text: str, stream: Any = None) -> None:
        """Queue a text for standard output, or `stream`."""
        with suppress(Full):
            self.queue.put_nowait((stream or sys.stdout, text))

    def _write(self) -> None:
        while item := self.queue.get():
            stream, text = item
            with suppress(OSError):  # nobody reads it any more
                print(f"{text}\n", end="", file=stream, flush=True)  # one write: lines stay whole

    def close(self) -> None:
        """Return when all is written, or after two seconds."""
        with suppress(Full):
            self.queue.put(None, timeout=1)
            self.writer.join(1)

    def log(self, event: str, rows: dict[str, Any], at: int | None = None) -> None:
        """Log an event, at a moment of wall_clock() (default: now). The mode `brief` leaves out texts."""
        if self.mode == "off":
            return
        if self.mode == "brief":
            rows = {name: value for name, value in rows.items() if name not in ("Message", "Detail")}
        write = self._pretty if self.pretty else plain
        self.print(write(event, rows, at or wall_clock()))

    def trouble(self, error: BaseException | None) -> None:
        """Log an error that somebody must fix, on standard error in every mode. A bug has its traceback."""
        is_bug, said = not isinstance(error, DatabaseError), type(error).__name__
        shows_text = self.mode != "brief" or not is_bug  # a model's error may quote the message
        if shows_text:
            said = traceback.format_exception_only(error)[-1].strip()
        lines = [plain("trouble", {"Error": said}, wall_clock())]
        self.errors.append(lines[0])
        if is_bug and shows_text:
            lines += map(escape, "".join(traceback.format_exception(error)).splitlines())
        self.print("\n".join(lines), sys.stderr)

    def turn_started(self, turn: Turn, active: int) -> None:
        """Log the start of a turn. `active` turns are running."""
        self.log("stream_started", {
            "Client IP": turn.client, "Session": turn.session.session_id, "Turn": turn.turn_id,
            "Message": turn.message, "Active Streams": active, "Transfer-Encoding": "chunked"})

    def chunk_released(self, turn: Turn, at: int) -> None:
        """Log the latest chunk of a turn."""
        if self.mode == "full":
            self.log("chunk", {"Session": turn.session.session_id, "Number": len(turn.texts),
                               "Text": turn.texts[-1]}, at)

    def turn_ended(self, turn: Turn, outcome: Outcome, active: int) -> None:
        """Log the end of a turn."""
        rows = {"Session": turn.session.session_id, "Turn": turn.turn_id, "Total Chunks": len(turn.texts),
                "Total Time": f"{(turn.ended - turn.began) / 1e6:.3f}s", "Active Streams": active}
        if isinstance(outcome, Failure):
            self.errors.append(f"{turn.timestamp(turn.ended)} {outcome.code}: {outcome.message}")
            rows |= {"Status": f"FAILED ({outcome.code})", "Detail": outcome.message}
            self.log("stream_failed", rows)
        elif outcome is STOPPED:
            self.log("stream_stopped", {**rows, "Status": "STOPPED"})
        else:
            self.log("stream_completed", {**rows, "Status": "SUCCESS"})

    def _pretty(self, event: str, rows: dict[str, Any], at: int) -> str:
        rows = {name: escape(str(value)) for name, value in rows.items()}
        time_of_day = datetime.fromtimestamp(at / 1e6).strftime("%H:%M:%S.%f")[:-3]
        if event == "chunk":
            return f"📡 [{time_of_day}] Chunk #{rows['Number']}: \"{fit(rows['Text'], 60).rstrip()}\""
        if event in BOXES:
            colour, title = BOXES[event]
            detail = rows.pop("Detail", "")
            rows.pop("Turn", None)
            if "Session" in rows:
                rows["Session"] = fit(rows["Session"], 11).rstrip()
            if "Message" in rows:
                rows["Message"] = f'"{fit(rows["Message"], WIDTH - 14).rstrip()}"'
            text = f"\n{box(f'{title} [{time_of_day}]', rows)}\n{detail}".rstrip()
        else:
            words = ", ".join(f"{name}: {value}" for name, value in rows.items())
            colour, text = "2", f"[{time_of_day}] {event.replace('_', ' ')}  {words}"
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour else text


def plain(event: str, rows: dict[str, Any], at: int) -> str:
    """An event as a log line: a timestamp, the event and key=value for each row.

    A value that is not one plain word is in quotes, with escapes.
    """
    words = [stamp(at), event]
    for name, value in rows.items():
        text = str(value)
        if not re.fullmatch(r"[\w.:/+-]{1,100}", text, re.ASCII):
            if len(text) > LIMITS["log_text"]:
                text = text[: LIMITS["log_text"]] + "..."
            text = escape(json.dumps(text, ensure_ascii=False))
        words.append(f"{re.sub('[ -]', '_', name.lower())}={text}")
    return " ".join(words)


# ---- requests: from bytes to a head that has passed the checks, and to the fields of a body --------------

NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # of a method or a field: `token` in RFC 9110, section 5.6.2
REQUEST_LINE = re.compile(rf"({NAME}) ([!\"$-~]+) HTTP/([0-9])\.([0-9])")
FIELD = re.compile(rf"({NAME}):(.*)")
URL = re.compile(r"https?://([^/?]+)(.*)", re.IGNORECASE)
REG_NAME = r"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+"
HOST = re.compile(rf"(?:\[([0-9A-Fa-f:.]+)\]|({REG_NAME}))(?::[0-9]{{0,5}})?")
BROKEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|(?<!\r)\n")  # control, CR alone, LF alone
DEFAULT_PORTS = {"http": ":80", "https": ":443"}  # https: behind a proxy
JSON_TYPES = ("application/json", "application/x-www-form-urlencoded", "")  # curl -d sends the second


class Head:
    """The head of a request (RFC 9112, sections 2 to 6). It is never changed. Methods raise Refused."""

    def __init__(self, head: bytes) -> None:
        """`head` ends after its last field line."""
        first, *rows = head.decode("latin-1").removesuffix("\r\n").split("\r\n")
        match = REQUEST_LINE.fullmatch(first)
        if not match:
            raise Refused("bad_request", f"A request begins with METHOD TARGET HTTP/1.1, not {first[:80]!r}.")
        self.method, target, major, minor = match.groups()
        if major != "1":
            raise Refused("version_not_supported", "This server speaks HTTP/1.1.")
        self.is_1_0 = minor == "0"  # any later 1.x is served as 1.1: RFC 9110, section 2.5
        self.headers = self._parse_fields(rows)
        self.host = self.headers.get("host", "")
        # Two Host fields were joined by a comma and a space, which no host has. HTTP/1.0 may send none.
        if not host_name(self.host) and ("host" in self.headers or not self.is_1_0):
            raise Refused("bad_request", "Send one Host field, with a name or an address and perhaps a port.")
        self.path, self.query = self._parse_target(target)
        self.codings, self.length = self._parse_framing()
        self.has_body = bool(self.codings or self.length)
        self.closes = self.is_1_0 or "close" in self._list("connection")  # section 9.6
        self.expects_continue = "100-continue" in self._list("expect") and not self.is_1_0  # RFC 9110, 10.1.1

    def _parse_fields(self, rows: list[str]) -> dict[str, str]:
        """Names in lower case and values (section 5). Values of a repeated name are joined by a comma."""
        if len(rows) > LIMITS["fields"]:
            raise Refused("headers_too_large", f"The head must have at most {LIMITS['fields']} fields.")
        headers: dict[str, str] = {}
        for row in rows:
            match = FIELD.fullmatch(row)
            if not match:
                raise Refused("bad_request", f"A field is NAME: VALUE on one line, not {row[:80]!r}.")
            name, value = match[1].lower(), match[2].strip(" \t")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return headers

    def _parse_target(self, target: str) -> tuple[str, str]:
        """Path and query (section 3.2). If the target is a URL, its host replaces the Host field."""
        url = URL.fullmatch(target)
        if url and host_name(url[1]):
            self.host, target = url[1], url[2] if url[2].startswith("/") else f"/{url[2]}"
        if not target.startswith("/"):
            raise Refused("bad_request", f"A target is /PATH or http://HOST/PATH, not {target[:80]!r}.")
        path, _, query = target.partition("?")
        return path, query

    def _parse_framing(self) -> tuple[list[str], int]:
        """Codings and length of the body (section 6). Refuses what another program could read differently."""
        codings, length = self._list("transfer-encoding"), self.headers.get("content-length", "0")
        if "transfer-encoding" in self.headers:
            ends_in_chunked = codings.count("chunked") == 1 and codings[-1] == "chunked"
            if self.is_1_0 or "content-length" in self.headers or not ends_in_chunked:
                raise Refused("bad_request", "Send the body with Content-Length, without Transfer-Encoding.")
        if not re.fullmatch("[0-9]+", length):  # two fields are joined by a comma
            raise Refused("bad_request", "Send one Content-Length, a number in digits.")
        return codings, int(length.lstrip("0")[:18] or "0")  # over the limit, too; int() refuses 4,301 digits

    def _list(self, name: str) -> list[str]:
        """The elements of a field that is a list (RFC 9110, section 5.6.1), in lower case."""
        elements = [element.strip(" \t") for element in self.headers.get(name, "").lower().split(",")]
        return [element for element in elements if element]

    def check_host(self, settings: argparse.Namespace) -> None:
        """Without a token, only a loopback Host or an allowed one.

        Otherwise a page could give its own name this machine's address (DNS rebinding).
        """
        name = host_name(self.host)
        if not settings.token and self.host and not is_loopback(name) and name not in settings.allow_host:
            raise Refused("forbidden_host", f"This server does not answer to {name[:200]}. If it should, "
                                            "start it with --allow-host and this name.")

    def check_origin(self, settings: argparse.Namespace) -> dict[str, str]:
        """The fields that let an allowed page of another origin read the answer (Fetch Standard, 3.3)."""
        origin = self.headers.get("origin")
        if origin is None:
            return {}
        scheme, _, host = origin.lower().partition("://")
        if scheme in DEFAULT_PORTS and host and self.host.lower() in (host, host + DEFAULT_PORTS[scheme]):
            return {}  # this server's own
        if origin.lower() not in settings.allow_origin:
            raise Refused("forbidden_origin", "A page of another origin sent this. If it may, start the "
                                              "server with --allow-origin and its origin.")
        return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": "Retry-After",
                "Vary": "Origin"}

    def check_token(self, token: str | None) -> None:
        """RFC 6750, section 2.1. OPTIONS and public paths need no token."""
        if not token or self.path in PUBLIC or self.method == "OPTIONS":
            return
        from hmac import compare_digest  # in constant time; loads OpenSSL, so only with a token

        scheme, _, given = self.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not compare_digest(given.strip(" ").encode(), token.encode()):
            raise Refused("unauthorized", "Send Authorization: Bearer TOKEN, with this server's token.")

    def check_body(self, takes_json: bool, curl: Callable[[Head], str]) -> None:
        """Refuse a body that this server does not read: its coding, its size, its type."""
        if len(self.codings) > 1:
            coding = self.codings[0][:80]
            raise Refused("not_implemented", f"The coding {coding} is not known. Send the plain body.")
        if self.codings:
            raise Refused("length_required", "Send the body with Content-Length, not in transfer chunks.")
        if self.length > LIMITS["body"]:
            raise Refused("payload_too_large", f"The body must have at most {LIMITS['body']:,} bytes.")
        media_type = self.headers.get("content-type", "")
        if takes_json and media_type.partition(";")[0].strip(" \t").lower() not in JSON_TYPES:
            raise Refused("unsupported_media_type", f"Send JSON: {curl(self)}/chat/stream -N "
                          "-H 'Content-Type: application/json' -d '{\"message\":\"Hello\"}'")


cached_head = lru_cache(64)(Head)  # clients repeat their heads; to parse one is half of a small request


def find_head(received: bytearray, checked: int) -> tuple[Head, int] | None:
    """The head that `received` begins with, and its size; None if more of it must come. Raises Refused.

    A head is parsed when it is whole. Before that, only control characters, a bare CR or LF and too many
    bytes are refused. The first `checked` bytes were looked at in the last call.
    """
    begin, limit = 0, LIMITS["request_line"]
    while begin < 4 and received.startswith(b"\r\n", begin):  # empty lines: RFC 9112, section 2.2
        begin += 2
    end = received.find(b"\r\n\r\n", begin, begin + LIMITS["head"])
    head = bytes(received[begin : end + 2 if end >= 0 else begin + LIMITS["head"]])
    is_long = len(head) >= limit and b"\r\n" not in head[:limit]
    # The check begins one byte earlier, which may be a CR.
    if BROKEN.search(head, max(checked - begin - 1, 0), limit if is_long else len(head)):
        raise Refused("bad_request", "A head has no control characters, and CR and LF only together.")
    if is_long:
        raise Refused("uri_too_long", f"A request line must have at most {limit >> 10} KiB.")
    if end >= 0:
        return cached_head(head), end + 4
    if len(head) >= LIMITS["head"]:
        raise Refused("headers_too_large", f"The head must have at most {LIMITS['head'] >> 10} KiB.")
    return None


@lru_cache(64)
def host_name(host: str) -> str:
    """The name or address in a Host (RFC 3986, section 3.2.2), in lower case; empty if it is malformed."""
    match = HOST.fullmatch(host)
    with suppress(ValueError):  # not an IPv6 address
        return (match[2] or str(IPv6Address(match[1]))).lower() if match else ""
    return ""


@lru_cache(64)
def is_loopback(name: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    with suppress(ValueError):
        return ip_address(name).is_loopback
    return name.lower() == "localhost"


def parse_json(body: bytes) -> dict[str, Any]:
    """The body as a JSON object (RFC 8259). Raises Refused: invalid_json, invalid_field."""
    try:
        value = json.loads(body.decode())
        json.dumps(value, allow_nan=False)  # loads() takes NaN and infinite numbers
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_json", f"The body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise Refused("invalid_field", 'The body must be a JSON object, such as {"message":"Hello"}.')
    return value


def check_id(name: str, value: Any, pattern: str = ID) -> str | None:
    """An optional id; null is the same as missing. Raises Refused: invalid_field."""
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise Refused("invalid_field", f"{name} must be a string of the form {pattern}.")
    if name == "session_id" and value == "new":
        raise Refused("invalid_field", "session_id must not be new: /sessions/new is an endpoint.")
    return value


def check_message(message: Any) -> str:
    """The message, as it was sent. Raises Refused: invalid_field."""
    if not isinstance(message, str) or not message.strip():
        raise Refused("invalid_field", "message must be a string that is not blank.")
    if len(message) > LIMITS["message"]:
        raise Refused("invalid_field", f"message must have at most {LIMITS['message']:,} characters.")
    if re.search("[\ud800-\udfff]", message):
        raise Refused("invalid_field", "message must not have lone surrogates: UTF-8 cannot express them.")
    return message


# ---- endpoints: a request in, a reply or a stream out ----------------------------------------------------


class Reply(NamedTuple):
    """An answer whose length is known."""

    status: int
    headers: dict[str, str]
    body: bytes = b""


def reply_json(body: dict[str, Any], status: int = 200, kind: str = "json", **more: str) -> Reply:
    """A JSON object. `more` are further fields of the head."""
    headers = {"Content-Type": f"application/{kind}", "Cache-Control": "no-store", **more}
    return Reply(status, headers, json.dumps(body).encode() + b"\n")


def problem(refused: Refused) -> Reply:
    """RFC 9457, problem details."""
    status = PROBLEMS[refused.code]
    fields = {"Allow": refused.allow} if refused.allow else PROBLEM_FIELDS.get(refused.code, {})
    return reply_json({"type": "about:blank", "title": TITLES[status], "status": status,
                       "detail": refused.detail, "code": refused.code}, status, "problem+json", **fields)


class Endpoints(BaseRequestHandler):
    """The part of a Handler that serves the routes. Methods raise Refused and DatabaseError."""

    server: Server
    sessions: Sessions
    head: Any  # of the request: a Head, or None before there is one
    session_id: str  # in the path, or ""
    allow: str  # methods that the path takes
    cors: dict[str, str]  # fields that let an allowed page of another origin read the answer
    fields: dict[str, Any]  # of the JSON body; empty if the endpoint takes none

    def chat_stream(self) -> Stream:
        message = check_message(self.fields.get("message"))
        turn_id = check_id("turn_id", self.fields.get("turn_id"))
        in_path = check_id("session_id", self.session_id or None)
        in_body = check_id("session_id", self.fields.get("session_id"))
        session_id = in_path or in_body
        if in_body not in (None, session_id):
            raise Refused("invalid_field", f"The path names the session {in_path}, and the body {in_body}.")
        if turn_id and not session_id:
            raise Refused("invalid_field", "turn_id needs a session_id: it names a turn of one session.")
        session_id = session_id or str(uuid.uuid4())
        try:
            return self.sessions.begin(message, session_id, turn_id, self.client_address[0]).follow(0)
        except Refused as refused:
            if refused.code == "session_busy":
                curl = self.server.curl(self.head)
                refused.detail += f" This stops it: {curl}/sessions/{session_id}/stop -X POST"
            raise

    session_stream = chat_stream  # one method, two routes

    def resume_stream(self) -> Stream:
        values = parse_qs(self.head.query, keep_blank_values=True).get("after", ["0"])
        if len(values) > 1 or not re.fullmatch("[0-9]{1,9}", values[0]):
            raise Refused("invalid_field", "after must be a number of 1 to 9 digits: your last chunk.")
        session = self.sessions.get(self.session_id)
        turn = session.latest or next(reversed(session.history), None)  # the second one after a restart
        if not turn:
            raise Refused("no_turn", "This session has no turn yet. POST a message to it.")
        return turn.follow(int(values[0]))

    def stop_turn(self) -> Reply:
        stopped = self.sessions.stop(self.session_id, check_id("turn_id", self.fields.get("turn_id")))
        message = "The turn is stopped." if stopped else "No such turn was running."
        return reply_json({"message": message, "stopped": stopped})

    def new_session(self) -> Reply:
        session_id = check_id("session_id", self.fields.get("session_id"))
        model = check_id("model_id", self.fields.get("model_id"), MODEL_ID) or self.server.settings.model
        if trouble := model_trouble(model):
            raise Refused("invalid_field", trouble)
        session = self.sessions.create(session_id or str(uuid.uuid4()), model)
        return reply_json({"session_id": session.session_id, "model": session.model,
                           "timestamp": stamp(session.created_at)})

    def list_sessions(self) -> Reply:
        with self.sessions.lock:
            found = sorted(self.sessions.sessions.values(), key=lambda each: each.last_activity, reverse=True)
            rows = [{**summary(each), "duration_minutes": round(age(each) / 60, 2)} for each in found]
        return reply_json({"active_sessions": len(rows), "sessions": rows})

    def get_session(self) -> Reply:
        session = self.sessions.get(self.session_id)
        with self.sessions.lock:
            told, messages, turn = summary(session), session.messages(), session.latest
            state = turn and turn.state  # a turn ends in one step
        latest = turn and {
            "turn_id": turn.turn_id, "state": state,
            "message": turn.message, "started": turn.started, "chunks": count_chunks(turn)}
        return reply_json({**told, "user_messages": len(messages) // 2, "model_messages": len(messages) // 2,
                           "session_duration_seconds": round(age(session), 3),
                           "messages": [message._asdict() for message in messages], "latest_turn": latest})

    def clear_session(self) -> Reply:
        self.sessions.clear(self.session_id, deletes=False)
        return reply_json({"message": "The session's history is cleared."})

    def delete_session(self) -> Reply:
        self.sessions.clear(self.session_id, deletes=True)
        return reply_json({"message": "The session is deleted."})

    def _health(self) -> dict[str, Any]:
        counts = self.sessions
        return {"status": "healthy", "model": self.server.settings.model,
                "uptime_seconds": (clock() - self.server.began) // 1_000_000,
                "total_requests": counts.successful + counts.failed + len(counts.running),
                "successful_requests": counts.successful, "failed_requests": counts.failed,
                "active_sessions": len(counts.sessions), "streaming_connections": len(self.server.streaming)}

    def _streams(self) -> list[dict[str, Any]]:
        return [{"session_id": turn.session.session_id, "turn_id": turn.turn_id, "started": turn.started,
                 "chunks": len(turn.texts), "readers": turn.readers, "client": turn.client}
                for turn in list(self.sessions.running)]

    def health(self) -> Reply:
        with self.sessions.lock:
            return reply_json(self._health())

    def stats(self) -> Reply:
        counts = self.sessions
        with counts.lock:
            ended, first = max(counts.successful + counts.failed, 1), sorted(counts.first_chunks) or [0]
            return reply_json({
                **self._health(), "average_response_time": round(counts.response_time / ended, 6),
                "start_time": stamp(self.server.start_time), "total_sessions_created": counts.created,
                "total_chunks": counts.chunks, "total_bytes": counts.bytes,
                "average_chunks_per_stream": round(counts.chunks / ended, 3),
                "time_to_first_chunk": {f"p{rank}": first[len(first) * rank // 100] for rank in (50, 95)},
                "streams": self._streams(), "framework": FRAMEWORK})

    def index(self) -> Reply:
        settings = self.server.settings
        features = ["multi-turn sessions", "resume", "retry by turn_id", "stop"]
        if settings.db:
            features.append("sessions on disk")
        return reply_json({"name": "streamable HTTP chat", "version": VERSION, "framework": FRAMEWORK,
                           "model": settings.model, "features": features, "endpoints": {
                               route.name: f"{route.method} {route.path}" for route in self.server.routes}})

    def openapi(self) -> Reply:
        return reply_json(describe(self.server.routes))

    def demo(self) -> Reply:
        """The page. Only its own script and style run, by their hashes (CSP Level 3)."""
        from base64 import b64encode
        from hashlib import sha256  # loads OpenSSL, so only with the page

        try:
            html = PAGE.read_text("utf-8")  # with \n, as browsers hash it, also if a checkout made CRLF of it
        except OSError:
            missing = "The page is the file demo.html, which cannot be read beside the server."
            raise Refused("not_found", missing) from None
        own = [f"{tag}-src 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
               for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", html, re.DOTALL)]
        policy = "; ".join([
            "default-src 'none'", *own, "connect-src 'self'", "img-src data:", "base-uri 'none'",
            "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
            "trusted-types 'none'"])  # with trusted types, no string becomes HTML or script
        return Reply(200, {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store",
                           "Content-Security-Policy": policy}, html.encode())

    docs = demo

    def options(self) -> Reply:
        """The methods of the path, and the fields that an allowed page may send (Fetch Standard, 3.3)."""
        preflight = {"Access-Control-Allow-Methods": self.allow, "Access-Control-Max-Age": "600",
                     "Access-Control-Allow-Headers": "Authorization, Content-Type"}
        return Reply(204, {"Allow": self.allow, **(preflight if self.cors else {})})

    def debug(self) -> Reply:
        threads = [f"{frame.f_code.co_qualname}, line {frame.f_lineno}"
                   for frame in sys._current_frames().values()]
        return reply_json({"threads": threads, "running_turns": self._streams(), "limits": LIMITS,
                           "last_errors": list(self.server.console.errors)})


def summary(session: Session) -> dict[str, Any]:
    """The fields that GET /sessions and GET /sessions/{session_id} share."""
    return {"session_id": session.session_id, "model": session.model,
            "message_count": 2 * len(session.history), "created_at": stamp(session.created_at),
            "last_activity": stamp(session.last_activity), "streaming": session.running_turn() is not None}


def count_chunks(turn: Turn | KeptTurn) -> int:
    """How many chunks have been released."""
    if isinstance(turn, Turn):
        return len(turn.texts)
    return zlib.decompress(turn.log).count(b"\n") - OPENING - 1  # the terminal event


def age(session: Session) -> float:
    """Seconds since it was made; 0 if the wall clock was set back to before that."""
    return max(0, wall_clock() - session.created_at) / 1e6


# JSON Schema, as strict as the checks above.
TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
TIME = {"type": "string", "format": "date-time"}
IDENTIFIER = {"type": "string", "pattern": f"^{ID}$"}
TURN_ID = {**IDENTIFIER, "type": ["string", "null"]}
SESSION_ID = {**TURN_ID, "not": {"const": "new"}}
MODEL = {**TURN_ID, "pattern": f"^{MODEL_ID}$"}
MESSAGE = {"type": "string", "maxLength": LIMITS["message"], "pattern": r"\S", "examples": ["Hello!"]}
AFTER = {"name": "after", "in": "query", "required": False,
         "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999, "default": 0}}


def schema(**properties: Any) -> dict[str, Any]:
    """The schema of a JSON object. Only a property that may be null may be missing."""
    required = [name for name, each in properties.items() if each.get("type") != ["string", "null"]]
    return {"type": "object", "properties": properties, "required": required}


SESSION_CHAT = schema(message=MESSAGE, session_id=SESSION_ID, turn_id=TURN_ID)
CHAT = {**SESSION_CHAT, "dependentRequired": {"turn_id": ["session_id"]}}

NDJSON = "application/x-ndjson"
NOW = "2026-11-24T10:00:00.123456+00:00"
HEALTH_EXAMPLE = {"status": "healthy", "model": "offline", "uptime_seconds": 60, "total_requests": 3,
                  "successful_requests": 2, "failed_requests": 0, "active_sessions": 1,
                  "streaming_connections": 1}
STATS_EXAMPLE = {
    **HEALTH_EXAMPLE, "average_response_time": 0.3, "start_time": NOW, "total_sessions_created": 1,
    "total_chunks": 8, "total_bytes": 1600, "average_chunks_per_stream": 4.0,
    "time_to_first_chunk": {"p50": 0.001, "p95": 0.002}, "streams": [
        {"session_id": "demo", "turn_id": "t-3", "started": NOW, "chunks": 2, "readers": 1,
         "client": "127.0.0.1"}], "framework": FRAMEWORK}
SUMMARY_EXAMPLE = {"session_id": "demo", "model": "offline", "message_count": 2, "created_at": NOW,
                   "last_activity": NOW, "streaming": False}
SESSION_EXAMPLE = {
    **SUMMARY_EXAMPLE, "user_messages": 1, "model_messages": 1, "session_duration_seconds": 75.125,
    "messages": [{"role": "user", "text": "Hello!", "timestamp": NOW, "turn_id": "t-1"}],
    "latest_turn": {"turn_id": "t-1", "state": "complete", "message": "Hello!", "started": NOW, "chunks": 4}}


class Route(NamedTuple):
    """An endpoint: the method of Endpoints that serves it, where it is, and what OpenAPI says of it."""

    name: str
    method: str
    path: str
    summary: str
    answer: dict[str, Any] | str  # an example of the JSON answer, or a media type
    body: dict[str, Any] | None = None  # schema of the request's JSON; None: a body is allowed and ignored
    query: dict[str, Any] | None = None  # an OpenAPI parameter


ROUTES = [
    Route("chat_stream", "POST", "/chat/stream", "Send a message; the answer is a stream", NDJSON, CHAT),
    Route("new_session", "POST", "/sessions/new", "Create a session",
          {"session_id": "demo", "model": "offline", "timestamp": NOW},
          schema(session_id=SESSION_ID, model_id=MODEL)),
    Route("list_sessions", "GET", "/sessions", "List the sessions, last active first",
          {"active_sessions": 1, "sessions": [{**SUMMARY_EXAMPLE, "duration_minutes": 1.25}]}),
    Route("get_session", "GET", "/sessions/{session_id}", "One session and its history", SESSION_EXAMPLE),
    Route("delete_session", "DELETE", "/sessions/{session_id}", "Delete a session",
          {"message": "The session is deleted."}),
    Route("resume_stream", "GET", "/sessions/{session_id}/stream", "Follow the latest turn", NDJSON,
          query=AFTER),
    Route("session_stream", "POST", "/sessions/{session_id}/stream",
          "Send a message to this session; the answer is a stream", NDJSON, SESSION_CHAT),
    Route("stop_turn", "POST", "/sessions/{session_id}/stop", "Stop the running turn and keep its text",
          {"message": "The turn is stopped.", "stopped": True}, schema(turn_id=TURN_ID)),
    Route("clear_session", "POST", "/sessions/{session_id}/clear", "Clear a session's history",
          {"message": "The session's history is cleared."}),
    Route("health", "GET", "/health", "Whether the server is alive, and its counters", HEALTH_EXAMPLE),
    Route("stats", "GET", "/stats", "Counters, averages and running turns", STATS_EXAMPLE),
    Route("index", "GET", "/", "What this server is and which endpoints it has", {
        "name": "streamable HTTP chat", "version": VERSION, "framework": FRAMEWORK, "model": "offline",
        "features": ["resume"], "endpoints": {"health": "GET /health"}}),
    Route("openapi", "GET", "/openapi.json", "This description, as OpenAPI 3.2", "application/json"),
    Route("demo", "GET", "/demo", "The page", "text/html"),
    Route("docs", "GET", "/docs", "The page, opened at its API view", "text/html"),
    Route("debug", "GET", "/debug", "Threads, turns, limits, the last errors (only with --debug)",
          {"threads": ["serve, line 1"], "running_turns": [], "limits": {}, "last_errors": []}),
]
PUBLIC = {"/", "/health", "/openapi.json", "/demo", "/docs"}  # they need no token
SESSION_PATH = re.compile(r"/sessions/(?!new$)([^/]+)(/[^/]+)?")

OPTIONS = Route("options", "OPTIONS", "", "What a path takes", {})
Paths = dict[str, dict[str, Route]]  # path: {method: route}


def find_route(paths: Paths, method: str, path: str) -> tuple[Route, str, str]:
    """The route, the session_id in the path, and the methods that the path takes.

    Raises Refused: not_found, method_not_allowed.
    """
    match = SESSION_PATH.fullmatch(path)
    session_id, template = "", path
    if match:
        session_id, template = unquote(match[1]), f"/sessions/{{session_id}}{match[2] or ''}"
    if template not in paths:
        raise Refused("not_found", f"There is nothing at {path[:200]}. GET / lists the endpoints.")
    allow = ", ".join(paths[template])
    if method not in paths[template]:
        raise Refused("method_not_allowed", f"This path takes {allow}.", allow)
    return paths[template][method], session_id, allow


# ---- OpenAPI: the routes and events as a description for programs ----------------------------------------

TURN = {"session_id": IDENTIFIER, "turn_id": IDENTIFIER, "timestamp": TIME}
EVENTS = {  # type of an event: schema
    "session_info": schema(**TURN, model=TEXT, created=FLAG),
    "status": schema(message=TEXT, context_messages=COUNT),
    "chunk": schema(text={"type": "string", "maxLength": LIMITS["chunk"], "examples": ["Hello "]},
                    chunk_number={"type": "integer", "minimum": 1}, is_final=FLAG, timestamp=TIME),
    "complete": schema(
        finish_reason={"enum": ["stop", "length", "content_filter", "cancelled", "other"]}, **TURN,
        total_chunks=COUNT, message_count=COUNT, processing_time={"type": "number", "minimum": 0}),
    "error": schema(code={"enum": [*STREAM_ERRORS]}, retryable=FLAG, **TURN,
                    message={"type": "string", "maxLength": LIMITS["error_message"]}),
    "ping": schema(timestamp=TIME),
}
EVENTS["complete"]["properties"]["usage"] = schema(  # where the model tells
    input_tokens=COUNT, output_tokens=COUNT, total_tokens=COUNT)
PROBLEM = schema(type=TEXT, title=TEXT, status=COUNT, detail=TEXT, code={"enum": [*PROBLEMS]})


def describe(routes: list[Route]) -> dict[str, Any]:
    """OpenAPI 3.2, where `itemSchema` describes one line of a stream."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = describe_route(route)
    schemas: dict[str, Any] = {"problem": PROBLEM, "event": {
        "oneOf": [{"$ref": f"#/components/schemas/{kind}"} for kind in EVENTS],
        "discriminator": {"propertyName": "type"}}}
    for kind, event in EVENTS.items():
        schemas[kind] = {**event, "properties": {"type": {"const": kind}, **event["properties"]},
                         "required": ["type", *event["required"]]}
    return {"openapi": "3.2.0", "info": {"title": "Streamable HTTP chat", "version": VERSION}, "paths": paths,
            "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
                           "schemas": schemas}}


def describe_route(route: Route) -> dict[str, Any]:
    """One operation of OpenAPI."""
    media_type, content = "application/json", {"example": route.answer}
    tag = "Sessions" if route.path.startswith("/sessions") else "Server"
    if isinstance(route.answer, str):
        media_type, content = route.answer, {}
    if media_type == NDJSON:
        tag, content = "Streams", {"itemSchema": {"$ref": "#/components/schemas/event"}}
    parameters = []
    if "{session_id}" in route.path:
        parameters.append({"name": "session_id", "in": "path", "required": True,
                           "schema": {**IDENTIFIER, "not": {"const": "new"}}})
    if route.query:
        parameters.append(route.query)
    problems = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/problem"}}}
    operation: dict[str, Any] = {
        "operationId": route.name, "summary": route.summary, "tags": [tag], "parameters": parameters,
        "responses": {"200": {"description": route.summary, "content": {media_type: content}},
                      "default": {"description": "A problem, told by its code", "content": problems}},
    }
    if route.path not in PUBLIC:
        operation["security"] = [{"token": []}, {}]  # {}: a server without a token asks for none
    if route.body:
        operation["requestBody"] = {"required": bool(route.body["required"]),
                                    "content": {"application/json": {"schema": route.body}}}
    return operation


# ---- handler and server: read, check, route, write. Only this room uses connections. ---------------------

TERMINAL = (b'{"type":"complete"', b'{"type":"error"')
date = lru_cache(2)(formatdate)  # RFC 9110, section 6.6.1


def socket_timeout(seconds: int) -> bytes:
    """A value for SO_RCVTIMEO or SO_SNDTIMEO. settimeout() would add a poll() to each call."""
    return struct.pack("L", 1000 * seconds) if os.name == "nt" else struct.pack("ll", seconds, 0)


def response_head(status: int, fields: dict[str, str], closes: bool) -> bytes:
    """Status line and fields (RFC 9112, section 4)."""
    lines = [f"HTTP/1.1 {status} {TITLES[status]}", f"Date: {date(int(time.time()), usegmt=True)}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    connection = "close" if closes else "keep-alive"
    lines += ["X-Content-Type-Options: nosniff", f"Connection: {connection}", "", ""]
    return "\r\n".join(lines).encode("latin-1")


class Handler(Endpoints):
    """One connection: requests in order, each answered by a reply or a stream."""

    request: socket.socket

    def setup(self) -> None:
        self.sessions = self.server.sessions
        self.received = bytearray()  # bytes that are not yet read as a request
        self.patience = 0  # seconds: the time-out of the socket
        self.head, self.cors = None, {}
        self.closes = False  # the connection ends after this answer

    def handle(self) -> None:
        server = self.server
        try:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, socket_timeout(1))
            if self.request not in server.connections:  # process_request() found too many of them
                self.closes = True
                self.write_reply(problem(Refused("overloaded", "Too many connections. Try again later.")))
                self.linger()
            while not self.closes:
                self.serve_request()
                server.idle.add(self.request)
        except OSError as error:  # the client left, or made no progress for too long
            reason = type(error).__name__
            server.console.log("client_left", {"Client IP": self.client_address[0], "Reason": reason})

    def serve_request(self) -> None:
        """Read one request and answer it."""
        self.head, self.cors = None, {}
        answer = self.respond()
        # After a head that cannot be parsed, or an unread body, the next bytes are not a request.
        self.closes = self.head is None or self.unread or self.head.closes
        if isinstance(answer, Reply):
            self.write_reply(answer)
        elif answer:
            self.write_stream(answer)
        if answer and self.closes:
            self.linger()

    def respond(self) -> Reply | Stream | None:
        """The answer to the next request. None if no request came."""
        try:
            self.head = self.read_head()
            return self.answer(self.head) if self.head else None
        except Refused as refused:
            asked = f"{self.head.method} {self.head.path}" if self.head else "-"  # a query may hold a secret
            self.server.console.log("refused", {
                "Client IP": self.client_address[0], "Status": PROBLEMS[refused.code], "Code": refused.code,
                "Request": asked[:100]})
            return problem(refused)
        except OSError:  # the client left
            raise
        except Exception as error:
            if self.sessions.shutting_down:  # the database may be closed
                return problem(Refused("overloaded", "The server is shutting down."))
            self.server.console.trouble(error)
            return problem(Refused("internal_error", STREAM_ERRORS["internal_error"][1]))

    def answer(self, head: Head) -> Reply | Stream:
        """Check a head, read the body, and call the endpoint. Raises Refused."""
        server = self.server
        self.unread = head.has_body
        head.check_host(server.settings)
        self.cors = head.check_origin(server.settings)
        head.check_token(server.settings.token)
        route, self.session_id, self.allow = find_route(server.paths, head.method, head.path)
        head.check_body(route.body is not None, server.curl)
        body = self.read_body(head) if head.has_body else b""
        is_read = route.body and (body or route.body["required"])
        self.fields = parse_json(body) if is_read else {}
        return getattr(self, route.name)()

    def read_head(self) -> Head | None:
        """The next head; None if the connection ends or stays idle. Empty lines do not start a request."""
        begun, checked, end = False, 0, time.monotonic() + LIMITS["idle"]
        while not self.received or not (found := find_head(self.received, checked)):
            if not begun and self.received.strip(b"\r\n"):
                begun, end = True, time.monotonic() + LIMITS["head_time"]
                self.server.idle.discard(self.request)
            checked = len(self.received)
            if not self.receive(end, "head" if begun else ""):
                return None
        self.server.idle.discard(self.request)
        head, size = found
        del self.received[:size]
        return head

    def read_body(self, head: Head) -> bytes:
        """The whole body (RFC 9112, section 6). Raises Refused."""
        if head.expects_continue:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        end = time.monotonic() + LIMITS["body_time"]
        while len(self.received) < head.length:
            self.receive(end, "body")
        body = bytes(self.received[: head.length])
        del self.received[: head.length]
        self.unread = False
        return body

    def receive(self, end: float, part: str = "") -> bool:
        """Wait for bytes until `end`, a moment of time.monotonic(), or up to a second longer.

        False if none came. Within a `part` of a request, head or body, this raises Refused instead.
        """
        data, patience = None, int(end - time.monotonic() + 1)  # whole seconds, so that it seldom changes
        if patience > 0:
            if patience != self.patience:
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, socket_timeout(patience))
                self.patience = patience
            with suppress(BlockingIOError, TimeoutError):  # the time-out; the second is that of Windows
                data = self.request.recv(65536)
        if part and data is None:
            late = f"The whole {part} must come within {LIMITS[f'{part}_time']} s."
            raise Refused("request_timeout", late)
        if part and not data:
            raise Refused("bad_request", f"The connection ended within the {part}.")
        self.received += data or b""
        return bool(data)

    def write_reply(self, reply: Reply) -> None:
        """HEAD gets the head that GET would get (RFC 9110, section 9.3.2)."""
        fields = reply.headers | self.cors
        if reply.status != 204:
            fields["Content-Length"] = str(len(reply.body))
        head = response_head(reply.status, fields, self.closes)
        head_only = self.head.method == "HEAD" if self.head else self.received.lstrip().startswith(b"HEAD ")
        self.send(head if head_only else head + reply.body)

    def write_stream(self, stream: Stream) -> None:
        """Send the lines of a turn, each as a transfer chunk, and all that are due in one send."""
        chunked = not self.head.is_1_0
        fields = {"Content-Type": NDJSON, "Cache-Control": "no-cache", "X-Accel-Buffering": "no", **self.cors}
        if chunked:
            fields["Transfer-Encoding"] = "chunked"
        start = response_head(200, fields, self.closes)
        if self.head.method == "HEAD":
            self.send(start)
            return
        self.server.streaming.add(self)
        try:
            for lines in stream:
                lines = lines or [encode(type="ping", timestamp=stamp(wall_clock()))]
                data = start + b"".join(map(transfer_chunk, lines) if chunked else lines)
                is_end = chunked and lines[-1].startswith(TERMINAL)
                self.send(data + b"0\r\n\r\n" if is_end else data)
                start = b""
        finally:
            stream.close()
            self.server.streaming.discard(self)

    def send(self, data: bytes) -> None:
        """Send it all. Raises TimeoutError if the client makes no progress for LIMITS["send"] seconds."""
        progress = time.monotonic()
        while data:
            try:
                data = data[self.request.send(data) :]
                progress = time.monotonic()
            except (BlockingIOError, TimeoutError):  # a second is over
                if time.monotonic() - progress >= LIMITS["send"]:
                    raise TimeoutError from None

    def linger(self) -> None:
        """Read on: if a socket is closed with unread bytes, the client may lose the answer (section 9.6)."""
        self.request.shutdown(socket.SHUT_WR)
        end = time.monotonic() + LIMITS["linger"]
        while self.receive(end):
            self.received.clear()


class Server(ThreadingHTTPServer):
    """A server that listens. serve_forever() serves."""

    def __init__(self, listening: socket.socket, settings: argparse.Namespace,
                 database: Database | None) -> None:
        self.settings = settings
        self.start_time, self.began = wall_clock(), clock()
        self.routes = [route for route in ROUTES if settings.debug or route.name != "debug"]
        self.paths: Paths = {}
        for route in self.routes:
            methods = [route.method, "HEAD"] if route.method == "GET" else [route.method]
            self.paths.setdefault(route.path, {}).update(dict.fromkeys(methods, route))
        for path in self.paths.values():
            path["OPTIONS"] = OPTIONS
        self.connections: set[socket.socket] = set()
        self.idle: set[socket.socket] = set()  # connections that wait for another request
        self.streaming: set[Handler] = set()  # connections that are being sent a stream
        super().__init__(listening.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()  # the one that it made
        self.socket = listening
        host, port = listening.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.console = Console(settings.log)
        self.sessions = Sessions(settings, self.console, database)
        threading.Thread(target=self.sessions.sweep, name="sweep", daemon=True).start()

    def curl(self, head: Head) -> str:
        """How a curl line for this client begins. A Host that is not a plain name is not repeated."""
        plain_host = re.fullmatch(r"[A-Za-z0-9.:\[\]-]+", head.host)
        token = '-H "Authorization: Bearer $STREAMCHAT_TOKEN" ' if self.settings.token else ""
        return f"curl {token}{f'http://{head.host}' if plain_host else self.url}"

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # no file descriptor is left: to try again at once would take the whole processor
            time.sleep(0.05)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread."""
        if len(self.connections) < self.settings.max_connections:
            self.connections.add(request)  # otherwise the handler answers 503
        _thread.start_new_thread(self.process_request_thread, (request, client_address))

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        self.idle.discard(request)
        self.close_request(request)  # without a shutdown() before it, which is one more system call

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.console.trouble(sys.exception())

    def close(self, keeps_listening: bool) -> None:
        """Accept no more connections, answer the requests that were sent, and end all turns.

        If the server's socket `keeps_listening`, new connections wait for the next program.
        """
        self.shutdown()
        if not keeps_listening:
            self.server_close()
        wait_until(lambda: len(self.connections - self.idle) <= len(self.streaming), 1)
        self.sessions.close()
        wait_until(lambda: not self.connections - self.idle, 1)
        if self.sessions.database:
            self.sessions.database.close()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Return when the condition holds, or after so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


# ---- reload: the same process runs the new program, with the listening socket and the sessions -----------


def look() -> list:
    """Name, time and size of the program and the page. They differ when one of them was changed."""
    found: list = []
    for path in (PROGRAM, PAGE):
        with suppress(OSError):  # it is missing while an editor saves it
            found.append([path.name, path.stat().st_mtime_ns, path.stat().st_size])
    return found


def new_program_starts() -> bool:
    """Whether the program as it is now starts with the same flags. Its standard error is shown."""
    import subprocess

    command, trial = [sys.executable, *sys.orig_argv[1:]], {"STREAMCHAT_RELOADED": '{"trial": true}'}
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | trial, timeout=10, text=True)
        if done.stdout == f"{SCHEMA_VERSION}\n":  # otherwise it failed, is not whole, or has another schema
            return True
    print("The new program does not start. The old one goes on.", file=sys.stderr, flush=True)
    return False


def latest_version(seen: list) -> Iterator[list]:
    """At each step, look at the files again, and yield the last version that started."""
    good = tried = last = seen
    while True:
        yield good
        before, last = last, look()
        if tried != last == before and PROGRAM.exists():  # it has changed, and is no longer being written
            tried = last
            if new_program_starts():
                good = last


# ---- main ------------------------------------------------------------------------------------------------

SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
NUMBERS = [  # flag, type, default, lowest, highest, help
    ("--port", int, 8000, 0, 65535, "0 takes a free one"),
    ("--chunk-words", int, 4, 1, 1_000_000_000, "words in a chunk at most"),
    ("--chunk-delay", float, 0.1, 0, 1_000_000_000, "seconds between chunks at least; 0 turns the pace off"),
    ("--resume-window", float, 30, 0, 1_000_000_000, "seconds that a turn goes on without readers"),
    ("--heartbeat", float, 10, 0.000001, 15, "seconds of silence after which a reader gets a ping"),
    ("--max-connections", int, 1000, 1, 1_000_000_000, "connections at most, and running turns at most"),
]

SHAPES = [  # flag, pattern, what it must be
    ("--token", r"[!-~]+", "printable ASCII without spaces"),
    ("--allow-host", HOST.pattern, "a host name or address"),
    ("--allow-origin", f"null|[a-z][a-z0-9+.-]*://{HOST.pattern}", "SCHEME://HOST[:PORT]"),
]


def parse_arguments() -> argparse.Namespace:
    """The settings. A bad flag ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description="Chat with a language model over plain HTTP/1.1, streamed as newline-delimited JSON.")
    option = parser.add_argument
    default_model = DEFAULT_GEMINI if gemini_keys() or gemini_on_vertex() else "offline"
    option("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    option("--model", default=os.environ.get("GENAI_MODEL_ID") or default_model,
           help="offline, a Gemini model, or MODULE:FUNCTION of your own (default: %(default)s)")
    for flag, kind, default, _, _, text in NUMBERS:
        option(flag, type=kind, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    option("--db", metavar="FILE", help="keep sessions in this file, which is made if it is missing")
    option("--reload", action="store_true",
           help="restart, with the sessions, when the program or the page changes")
    option("--debug", action="store_true", help="serve /debug")
    option("--token", default=os.environ.get("STREAMCHAT_TOKEN") or None,
           help="serve only clients that send it as a bearer token (default: STREAMCHAT_TOKEN)")
    option("--allow-host", metavar="HOST", action="append", default=[],
           help="answer to this host name, too; may be repeated")
    option("--allow-origin", metavar="ORIGIN", action="append", default=[],
           help="let pages of this origin in, too; may be repeated")
    option("--log", choices=["full", "brief", "off"], default="full", help="brief logs no texts")
    settings = parser.parse_args()
    for flag, _, _, low, high, _ in NUMBERS:
        if not low <= getattr(settings, flag[2:].replace("-", "_")) <= high:
            parser.error(f"argument {flag}: must be from {low:,} to {high:,}")
    for flag, pattern, shape in SHAPES:
        given = getattr(settings, flag[2:].replace("-", "_"))
        for text in given if isinstance(given, list) else [given]:
            if text is not None and not re.fullmatch(pattern, text, re.IGNORECASE | re.ASCII):
                parser.error(f"argument {flag}: must be {shape}")  # the text may be a secret
    settings.allow_host = [host_name(host) for host in settings.allow_host]
    settings.allow_origin = [origin.lower() for origin in settings.allow_origin]
    return settings


def start_trouble(settings: argparse.Namespace) -> str | None:
    """Why the server must not start with these settings, as a sentence, or None."""
    module, colon, function = settings.model.partition(":")
    if colon:
        sys.path.append(os.getcwd())
        try:
            FUNCTIONS[settings.model] = getattr(import_module(module), function)
            if not callable(FUNCTIONS[settings.model]):
                raise TypeError("it is not a function")
        except BaseException as error:  # sys.exit(), too
            why = traceback.format_exception_only(error)[-1].strip()
            return f"cannot import {settings.model} ({why}). Correct --model, or use --model offline."
    if trouble := model_trouble(settings.model):
        return trouble
    if settings.reload and os.name == "nt":
        return "--reload is not supported on Windows."
    if not settings.token and not is_loopback(settings.host):
        return (f"{settings.host or 'every address'} can be reached from other machines: set --token or "
                "STREAMCHAT_TOKEN, or use --host 127.0.0.1.")
    return None


def fail(trouble: str) -> int:
    """Print one line on standard error, and return the exit status."""
    print(f"{Path(sys.argv[0]).name}: error: {escape(trouble)}", file=sys.stderr)
    return 2


def main() -> int:
    """The exit status: 2 if the server cannot start. After a signal the program ends with 0."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: it is closed
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # in a locale without emoji
    reloaded = json.loads(os.environ.pop("STREAMCHAT_RELOADED", "{}"))
    settings = parse_arguments()
    if trouble := start_trouble(settings):
        return fail(trouble)
    host, port = settings.host, settings.port
    if "trial" in reloaded:  # new_program_starts() asks
        Server(socket.create_server(("127.0.0.1", 0)), settings, None)
        print(SCHEMA_VERSION)
        return 0
    try:
        if reloaded:
            listening = socket.socket(fileno=reloaded["socket"])
        else:  # with socketserver's backlog of 5, most of 1,000 simultaneous connections would fail
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        return fail(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}")
    private = reloaded.get("private", "")
    if settings.reload and not settings.db:
        from tempfile import mkdtemp

        private = private or mkdtemp(prefix="streamchat-")
        settings.db = f"{private}/sessions.db"
    claim_resources(listening.getsockname()[1])
    try:
        server = Server(listening, settings, Database(settings.db) if settings.db else None)
    except DatabaseError as error:
        return fail(str(error))
    serve(server, reloaded.get("seen") or look(), private)


def serve(server: Server, seen: list, private: str) -> NoReturn:
    """Serve until a signal comes, then end the program. With --reload, run the program again when it changes.

    `seen` is the version that is served, and `private` the folder of a temporary database.
    """
    signals: list[int] = []
    for each in SIGNALS:
        if each in SIGNALS[:2] or signal.getsignal(each) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(each, lambda number, frame: signals.append(number))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    sys.setswitchinterval(0.05)  # seconds; with many streams, 0.005 would spend most time on switching
    sys.unraisablehook = lambda unraisable: server.console.trouble(unraisable.exc_value)
    greet(server)
    threading.Thread(target=server.serve_forever, args=(0.1,), name="accept", daemon=True).start()
    latest = latest_version(seen)
    while not signals and not (server.settings.reload and next(latest) != seen):
        time.sleep(0.1)
    restarts = not signals
    server.close(restarts)
    say_goodbye(server)
    server.console.close()
    while restarts and not signals and look() != (seen := next(latest)):  # saved again in the meantime
        time.sleep(0.1)
    if restarts:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they wait until the new program can note them
    if restarts and not signals:
        listening = server.socket.fileno()
        os.set_inheritable(listening, True)
        told = {"socket": listening, "seen": seen, "private": private}
        os.environ["STREAMCHAT_RELOADED"] = json.dumps(told)
        os.execv(sys.executable, sys.orig_argv)
    if private:
        from shutil import rmtree

        rmtree(private, ignore_errors=True)
    os._exit(0)  # the interpreter's own exit aborts if the console is stuck, and complains of a closed pipe


def claim_resources(port: int) -> None:
    """Open as many files as the system allows (a connection is one), and use one processor (Linux).

    Only one Python thread runs at a time. A thread wakes faster on the processor where the last one ran, and
    SCHED_BATCH keeps it from interrupting that one, for which it would only wait. Together this doubles the
    requests per second. Servers beside each other use different processors, by their ports. A model of your
    own may need all of them.
    """
    with suppress(ImportError, ValueError, OSError):  # Windows has no limit; macOS allows less than it says
        from resource import RLIMIT_NOFILE, getrlimit, setrlimit

        most = getrlimit(RLIMIT_NOFILE)[1]
        setrlimit(RLIMIT_NOFILE, (most, most))
    if hasattr(os, "SCHED_BATCH") and not FUNCTIONS:
        processors = sorted(os.sched_getaffinity(0))
        with suppress(OSError):  # a sandbox may forbid it
            os.sched_setaffinity(0, {processors[port % len(processors)]})
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def greet(server: Server) -> None:
    """The banner. Its last line is the address, in every mode, for programs that wait for it."""
    console, settings = server.console, server.settings
    sessions = f"{len(server.sessions.sessions)} in {settings.db or 'memory'}"
    rows = {"Model": settings.model, "Framework": FRAMEWORK, "Multi-turn": "ENABLED",
            "Streaming": "CHUNKED HTTP", "Sessions": sessions, "Status": "READY"}
    if console.pretty:
        edge = "═" * WIDTH
        title = f"{'📡 STREAMABLE HTTP CHAT SERVER 📡':^{WIDTH - 2}}"  # the emoji are two columns wider
        lines = [f"║  {fit(f'{name}: {value}', WIDTH - 2)}║" for name, value in rows.items()]
        console.print("\n".join([f"╔{edge}╗", f"║{title}║", f"╠{edge}╣", *lines, f"╚{edge}╝"]))
        token = ' -H "Authorization: Bearer $STREAMCHAT_TOKEN"' if settings.token else ""
        console.print(f"Try: curl -N{token} -d '{{\"message\":\"Hello\"}}' {server.url}/chat/stream")
    else:
        console.log("server_started", rows)
    console.print(f"Serving on {server.url}")


def say_goodbye(server: Server) -> None:
    """Log the statistics."""
    counts, seconds = server.sessions, (clock() - server.began) // 1_000_000
    ended = counts.successful + counts.failed
    server.console.log("server_stopped", {
        "Server Uptime": timedelta(seconds=seconds), "Total Requests": ended, "Successful": counts.successful,
        "Failed": counts.failed, "Active Sessions": len(counts.sessions),
        "Total Sessions Created": counts.created, "Total Chunks": counts.chunks,
        "Avg Response Time": f"{counts.response_time / max(ended, 1):.3f}s"})


if __name__ == "__main__":
    sys.exit(main())
