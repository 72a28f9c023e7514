#!/usr/bin/env python3
r"""Streamable HTTP chat: multi-turn chat with a language model over plain HTTP/1.1, in one file.

A client POSTs a message. The answer is a stream of events, each one line of JSON, and each line is sent as one chunk
of the chunked transfer coding (a "transfer chunk": size in hex, CRLF, data, CRLF) the moment it may leave:

    > POST /chat/stream HTTP/1.1
    > Host: localhost:8000
    > Content-Type: application/json
    > Content-Length: 53
    >
    > {"message":"Hi!","session_id":"demo","turn_id":"t-1"}

    < HTTP/1.1 200 OK
    < Date: Tue, 24 Nov 2026 07:53:17 GMT
    < Content-Type: application/x-ndjson
    < Cache-Control: no-cache
    < X-Accel-Buffering: no
    < Transfer-Encoding: chunked
    < X-Content-Type-Options: nosniff
    < Connection: keep-alive
    <
    < 8c
    < {"type":"session_info","session_id":"demo","turn_id":"t-1","model":"offline","created":true,"timestamp":"…"}
    <
    < 4a
    < {"type":"status","message":"Generating response...","context_messages":0}
    <
    < 82
    < {"type":"chunk","text":"You said: Hi!\n\nThis ","chunk_number":1,"is_final":false,"timestamp":"…"}
    <
      (… two more, a tenth of a second apart …)
    < 74
    < {"type":"chunk","text":"this one.","chunk_number":4,"is_final":true,"timestamp":"…"}
    <
    < bc
    < {"type":"complete","finish_reason":"stop","total_chunks":4,"processing_time":0.300712,"message_count":2,…}
    <
    < 0
    <

(A timestamp has 32 characters, such as 2026-11-24T07:53:17.065890+00:00.) The events:

    session_info   which session and turn this is, before the model is called     1
    status         how many messages came before, which the model is given too    1
    chunk          a part of the answer; all of them joined are the answer        any number, at least 1 if complete
    complete       terminal: how it ended, and what the history holds now         1, or else
    error          terminal: a code, and whether the same POST may help           1
    ping           after a silence, to this reader only; no part of the log       any number

A stream without a terminal event was cut, whatever the transfer coding says. The turn runs on all the same:

    POST ──► running ──► complete    the history gains the message and the answer, in one step with the event
                │                    (also when stopped, or when all readers left: finish_reason "cancelled")
                └──────► failed      the history gains nothing; the same POST runs the turn anew

Who was cut off sends the same POST again (it follows the turn's log instead of starting another), or GETs
/sessions/{session_id}/stream?after=N for the log without the chunks 1 to N. README.md has the whole protocol.
"""

from __future__ import annotations

import _thread
import argparse
import hashlib
import json
import math
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import unicodedata
import uuid
import warnings
from base64 import b64encode
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from functools import cache, lru_cache, partial
from hmac import compare_digest
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from importlib.util import find_spec
from ipaddress import IPv6Address, ip_address
from itertools import chain, islice
from json.encoder import encode_basestring_ascii
from pathlib import Path
from queue import Full, Queue
from socketserver import BaseRequestHandler
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import parse_qs, unquote

if TYPE_CHECKING:
    from multiprocessing.context import SpawnContext
    from multiprocessing.process import BaseProcess

PROGRAM = Path(__file__).resolve()
PAGE = PROGRAM.with_name("demo.html")
VERSION = "1.0"
FRAMEWORK = "Python http.server + HTTP Streaming"

# ---- limits and tables: the numbers, names and codes of the protocol. They know no function. -------------------------

LIMITS = {
    "message": 100_000,  # characters: a short book's chapter; Gemini's smallest context holds many of them
    "body": 2 << 20,  # bytes: 100,000 characters, each written as two \uXXXX, and room for the other fields
    "request_line": 8 << 10,  # bytes with its CRLF: what RFC 9112, section 3, asks for at the least; nginx's too
    "head": 32 << 10,  # bytes with its last empty line: nginx's four buffers of 8 KiB
    "fields": 100,  # in a head: Apache's and http.client's
    "head_time": 10,  # seconds from its first byte to its last, however it drips: it is one packet or a few
    "body_time": 30,  # seconds from the end of the head: 2 MiB at 70 KB/s
    "idle": 60,  # seconds between two requests; nginx keeps 75, browsers open a new connection unseen
    "sessions": 10_000,  # kept in memory until they are deleted: a thousand people with ten each
    "unread_turns": 1000,  # running beside those that connections may read: each has a thread
    "chunk": 4096,  # code points: at most 12 bytes each (two \uXXXX), so a line stays under 64 KiB
    "error_message": 1000,  # characters: a sentence for a person, not a page of somebody's HTML
    "model_silence": 120,  # seconds without a piece: longer than a model thinks, shorter than a person waits
    "model_timeout": 600,  # seconds: google-genai's time-out, which ends the thread of a turn that was stopped
    "send": 30,  # seconds in which a reader takes nothing: then it has left
    "linger": 2,  # seconds given to a client to read an answer that was sent before its body was read
    "grace": 5,  # seconds that running turns get at shutdown
    "retry_after": 5,  # seconds that an overloaded server asks for: a restart takes no longer
    "log_chunks": 1000,  # log lines of a turn in a tenth of a second: the rest of a faster one's is not shown
    "log_text": 500,  # characters of a text in a log line: enough to find it by
    "console": 10_000,  # log lines waiting for a terminal that does not take them
}

ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
AFTER = re.compile(r"[0-9]{1,9}")

ERRORS = {  # code of a problem (RFC 9457): HTTP status
    "bad_request": 400, "invalid_json": 400, "invalid_field": 400, "unauthorized": 401, "forbidden_origin": 403,
    "forbidden_host": 403, "not_found": 404, "session_not_found": 404, "no_turn": 404, "method_not_allowed": 405,
    "request_timeout": 408, "session_busy": 409, "session_exists": 409, "turn_id_reused": 409, "length_required": 411,
    "payload_too_large": 413, "uri_too_long": 414, "unsupported_media_type": 415, "headers_too_large": 431,
    "internal_error": 500, "not_implemented": 501, "overloaded": 503, "version_not_supported": 505,
}

STREAM_ERRORS = {  # code of an `error` event: (may the same POST help?, what to say where nobody knows more)
    "model_error": (False, "The model gave no answer."),
    "model_not_found": (False, "The model does not exist."),
    "model_auth": (False, "The model's service refused the key."),
    "model_overloaded": (True, "The model's service is overloaded. Try again in a moment."),
    "model_blocked": (False, "The model's service blocked the message or the answer. Ask another way."),
    "model_cut": (True, "The model's answer was cut before its end. Send the same request again."),
    "session_cleared": (False, "The session was cleared while this turn was running."),
    "session_deleted": (False, "The session was deleted while this turn was running."),
    "server_shutdown": (True, "The server is shutting down. Send the same request again when it is back."),
    "internal_error": (True, "Something went wrong in the server; its log has the details."),
}

TURN_STATES: dict[str, dict[str, str]] = {  # state: {event: next state}; an event that is not listed is refused
    "new": {"session_info": "opened"},
    "opened": {"status": "running"},
    "running": {"chunk": "running", "complete": "complete", "error": "failed"},
    "complete": {},
    "failed": {},
}

EVENTS = {  # an event's type and its fields ("?": only where known)
    "session_info": "session_id turn_id model created timestamp",
    "status": "message context_messages",
    "chunk": "text chunk_number is_final timestamp",
    "complete": "finish_reason total_chunks processing_time message_count usage? session_id turn_id timestamp",
    "error": "code message retryable session_id turn_id timestamp",
    "ping": "timestamp",
}

STREAM = "stream"  # in place of a route's answer fields: the answer is a stream of EVENTS
HEALTH = "status model uptime_seconds total_requests successful_requests failed_requests active_sessions " \
         "streaming_connections"


class Route(NamedTuple):
    """One endpoint; the function that serves it has the route's name, in `Endpoints`."""

    name: str
    method: str
    path: str
    summary: str
    answer: str  # fields of the JSON answer, or STREAM, or a media type
    body: str | None = None  # fields of the JSON body ("?": optional); None: no body is read as JSON
    errors: str = ""  # codes, beside those that any request can get
    query: str = ""
    public: bool = False  # needs no token

    @property
    def tag(self) -> str:
        if self.answer == STREAM:
            return "Streams"
        return "Sessions" if self.path.startswith("/sessions") else "Server"

    @property
    def needs_body(self) -> bool:
        return self.body is not None and not all(name.endswith("?") for name in self.body.split())


ROUTES = (
    Route("chat_stream", "POST", "/chat/stream", "Send a message; the answer comes as a stream", STREAM,
          "message session_id? turn_id?", "session_busy turn_id_reused"),
    Route("new_session", "POST", "/sessions/new", "Create a session", "session_id model timestamp",
          "model_id? session_id?", "session_exists"),
    Route("list_sessions", "GET", "/sessions", "List the sessions, last active first", "active_sessions sessions"),
    Route("get_session", "GET", "/sessions/{session_id}", "One session and its history",
          "session_id model message_count user_messages model_messages session_duration_seconds created_at "
          "last_activity streaming messages latest_turn", errors="session_not_found"),
    Route("delete_session", "DELETE", "/sessions/{session_id}", "Delete a session", "message",
          errors="session_not_found"),
    Route("resume_stream", "GET", "/sessions/{session_id}/stream", "Follow the latest turn, to its end or live", STREAM,
          errors="invalid_field session_not_found no_turn", query="after"),
    Route("session_stream", "POST", "/sessions/{session_id}/stream", "The same as POST /chat/stream, in this session",
          STREAM, "message turn_id?", "session_busy turn_id_reused"),
    Route("stop_turn", "POST", "/sessions/{session_id}/stop", "Stop the running turn; what had left is kept",
          "message stopped", "turn_id?", "session_not_found"),
    Route("clear_session", "POST", "/sessions/{session_id}/clear", "Clear a session's history", "message",
          errors="session_not_found"),
    Route("health", "GET", "/health", "Is it alive, and what does it do", HEALTH, public=True),
    Route("stats", "GET", "/stats", "Counters, averages and running turns",
          f"{HEALTH} average_response_time start_time total_sessions_created total_chunks total_bytes "
          "average_chunks_per_stream time_to_first_chunk streams framework"),
    Route("index", "GET", "/", "What this server is and which endpoints it has",
          "name version framework model features endpoints", public=True),
    Route("openapi", "GET", "/openapi.json", "This description, as OpenAPI 3.2", "application/json", public=True),
    Route("demo", "GET", "/demo", "The page", "text/html", errors="not_found", public=True),
    Route("docs", "GET", "/docs", "The page, opened at its API view", "text/html", errors="not_found", public=True),
    Route("debug", "GET", "/debug", "Threads, running turns, limits, the last errors (only with --debug)",
          "threads running_turns limits last_errors", errors="not_found"),
)

PUBLIC = {route.path for route in ROUTES if route.public}
METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}  # RFC 9110, 9.3; RFC 5789

FEATURES = ["chunked transfer coding", "NDJSON events", "multi-turn sessions", "resume", "retry by turn_id", "stop"]

TEXT, FLAG, OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
SAID, MODEL = {**TEXT, "examples": ["Hello!"]}, {**TEXT, "examples": ["offline"]}
COUNT, SECONDS = {"type": "integer", "minimum": 0}, {"type": "number", "minimum": 0}
TIME = {"type": "string", "format": "date-time", "examples": ["2026-11-24T10:00:00.123456+00:00"]}
IDENTIFIER = {"type": "string", "pattern": f"^{ID.pattern}$", "examples": ["demo"]}
AVERAGE, OBJECTS = {"type": ["number", "null"]}, {"type": "array", "items": OBJECT}
FIELDS: dict[str, dict] = {  # field: JSON Schema. A name means the same wherever it stands, but in a problem.
    "session_id": IDENTIFIER, "turn_id": IDENTIFIER, "model": MODEL, "timestamp": TIME, "message": TEXT, "text": SAID,
    "model_id": {**MODEL, "pattern": f"^{MODEL_ID.pattern}$"},
    "created": FLAG, "is_final": FLAG, "retryable": FLAG, "stopped": FLAG, "streaming": FLAG,
    "context_messages": COUNT, "chunk_number": {"type": "integer", "minimum": 1}, "total_chunks": COUNT,
    "message_count": COUNT, "user_messages": COUNT, "model_messages": COUNT, "processing_time": SECONDS,
    "finish_reason": {"enum": ["stop", "length", "content_filter", "cancelled", "other"]},
    "usage": {"type": "object", "properties": {f"{kind}_tokens": COUNT for kind in ("input", "output", "total")}},
    "code": {"enum": [*STREAM_ERRORS]},
    "active_sessions": COUNT, "sessions": OBJECTS, "session_duration_seconds": SECONDS, "created_at": TIME,
    "last_activity": TIME, "messages": OBJECTS, "latest_turn": {"type": ["object", "null"]},
    "status": {"const": "healthy"}, "uptime_seconds": COUNT, "total_requests": COUNT, "successful_requests": COUNT,
    "failed_requests": COUNT, "streaming_connections": COUNT, "average_response_time": AVERAGE, "start_time": TIME,
    "total_sessions_created": COUNT, "total_bytes": COUNT, "average_chunks_per_stream": AVERAGE,
    "time_to_first_chunk": {"type": "object", "properties": {"p50": AVERAGE, "p95": AVERAGE}}, "streams": OBJECTS,
    "framework": TEXT, "name": TEXT, "version": TEXT, "features": {"type": "array", "items": TEXT}, "endpoints": OBJECT,
    "threads": {"type": "array", "items": TEXT}, "running_turns": OBJECTS, "limits": OBJECT, "last_errors": OBJECTS,
    "after": {"type": "integer", "minimum": 0, "default": 0},
    "role": {"enum": ["user", "model"]}, "state": {"enum": ["running", "complete", "failed"]}, "started": TIME,
    "chunks": COUNT, "readers": COUNT, "client": TEXT, "duration_minutes": SECONDS,
}
SHAPES = {  # field: fields of the object that it is, or of each object in its list
    "sessions": "session_id model message_count duration_minutes created_at last_activity streaming",
    "messages": "role text timestamp turn_id", "latest_turn": "turn_id state message started chunks",
    "streams": "session_id turn_id started chunks readers client",
}


class Refused(Exception):
    """A request that is answered by a problem: a code of ERRORS, and a sentence that says what to do."""

    def __init__(self, code: str, detail: str, allow: str = "") -> None:
        super().__init__(code, detail)
        self.code, self.detail, self.allow = code, detail, allow

    @property
    def status(self) -> int:
        return ERRORS[self.code]


class TurnError(Exception):
    """How a turn fails: a code of STREAM_ERRORS and a sentence (at most 1,000 characters, and never a key)."""

    def __init__(self, code: str, text: str = "") -> None:
        super().__init__(code, text)
        self.code, self.text = code, (text or STREAM_ERRORS[code][1])[: LIMITS["error_message"]]


class Finish(NamedTuple):
    """How a turn completes: a finish_reason, {input,output,total}_tokens where the model tells, and its own word."""

    reason: str
    usage: dict[str, int] | None = None
    word: str = ""


class Message(NamedTuple):
    """One entry of a history."""

    role: str  # user or model
    text: str
    timestamp: str
    turn_id: str


class PastTurn(NamedTuple):
    """A turn as the history keeps it: enough to stream it again when its log is gone."""

    turn_id: str
    message: str
    sent: str  # timestamp
    answer: str
    answered: str  # timestamp
    finish: Finish
    processing_time: float  # seconds


Outcome = Finish | TurnError
Model = Callable[[list[Message]], Iterator["str | Finish"]]


class Settings(NamedTuple):
    """What the command line sets. Times are in seconds."""

    model: str = "offline"
    chunk_words: int = 4
    chunk_delay: float = 0.1
    resume_window: float = 30
    heartbeat: float = 10
    debug: bool = False
    token: str | None = None  # None: any client on this machine may come in
    allow_host: Collection[str] = ()  # beside the loopback names and addresses
    allow_origin: Collection[str] = ()  # beside the server's own
    max_connections: int = 1000  # each has a thread, which takes some 30 KB while it waits
    log: str = "full"
    db: str | None = None  # None: sessions live in memory


# ---- wire: event -> line -> transfer chunk. It knows no turns. -------------------------------------------------------

COMPACT = json.JSONEncoder(separators=(",", ":"))  # json.dumps() would make one for each event
LAST_TRANSFER_CHUNK = b"0\r\n\r\n"


def clock() -> int:
    """Microseconds on the monotonic clock. Whole numbers, so that a pace of 0.1 s is never 0.099999 s."""
    return time.monotonic_ns() // 1000


def wall_clock() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


@lru_cache(maxsize=64)  # with the pace off, many chunks share a moment
def stamp(microseconds: int) -> str:
    """A moment of the wall clock in ISO 8601: UTC, six decimals, +00:00."""
    return f"{_second(microseconds // 1_000_000)}.{microseconds % 1_000_000:06d}+00:00"


@lru_cache(maxsize=64)  # most events of a second share its first 19 characters
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def encode(**event: Any) -> bytes:
    """An event as a line: one JSON object in pure ASCII, ended by a newline."""
    return COMPACT.encode(event).encode() + b"\n"


def encode_chunk(text: str, number: int, is_final: bool, timestamp: str) -> bytes:
    """The same for the one event there are many of, at three times the speed."""
    text, final = encode_basestring_ascii(text), "true" if is_final else "false"
    return (f'{{"type":"chunk","text":{text},"chunk_number":{number},"is_final":{final},'
            f'"timestamp":"{timestamp}"}}\n').encode()


def transfer_chunk(data: bytes) -> bytes:
    """RFC 9112, section 7.1: size in hex, CRLF, data, CRLF."""
    return b"%x\r\n%b\r\n" % (len(data), data)


# ---- turn: a log of lines that anyone may follow. It knows no sockets, no HTTP and nothing of a model's inside. ------

OPENING = 2  # lines before the chunks: session_info and status
BATCH = 256  # chunks, added in less than a millisecond


class Turn:
    """One user message and its answer, as a log of lines, each with the moment from which it may be read.

    The model may run ahead of the clock; readers never do. The end is one step: the last chunk, marked as final, and
    the terminal event. So when the model is done and its last chunk may not be read yet, that chunk is taken back and
    held until its moment; where it has left already, an empty final chunk takes its place.

    `changed` is the lock of the session and its turns. Moments are microseconds of clock().
    """

    def __init__(self, session: Session, turn_id: str, message: str, context_messages: int, created: bool = False,
                 delay: float = 0, client: str = "") -> None:
        self.changed = session.changed
        self.session_id, self.turn_id, self.message, self.client = session.session_id, turn_id, message, client
        self.context_messages = context_messages
        self.delay = math.ceil(delay * 1e6)
        self.epoch = wall_clock() - clock()  # one offset a turn: no step of the wall clock shows in its timestamps
        self.started = clock()
        self.state = "new"
        self.lines: list[bytes] = []  # session_info, status, then a line for each chunk
        self.moments: list[int] = []  # of each line, ascending
        self.texts: list[str] = []  # of each chunk
        self.held: tuple[str, int] | None = None  # text and moment of the last chunk, held for the end
        self.terminal = b""  # the terminal event's line
        self.past: PastTurn | None = None  # what the history gains
        self.ended, self.processing_time = 0, 0.0
        self.heard: int | None = self.started  # the model's last sign of life; None when it is done
        self.readers = 0
        self.deserted: int | None = None  # when the last reader left
        self.logged = 0  # chunks that unlogged() has told of
        self._open("session_info", session_id=self.session_id, turn_id=turn_id, model=session.model, created=created,
                   timestamp=self.stamp(self.started))
        self._open("status", message="Generating response...", context_messages=context_messages)

    @property
    def running(self) -> bool:
        return self.state == "running"

    @property
    def answer(self) -> str:
        return "".join(self.texts)

    def stamp(self, moment: int) -> str:
        return stamp(self.epoch + moment)

    def chunks(self) -> int:
        """How many chunks have left: those whose moment has come."""
        return bisect_right(self.moments, clock()) - OPENING

    def unlogged(self) -> list[tuple[int, str, int]]:
        """Number, text and moment of the chunks that have left since the last call. (The lock is held.)"""
        first, self.logged = self.logged, self.chunks()
        return [(at + 1, self.texts[at], self.moments[OPENING + at]) for at in range(first, self.logged)]

    def _step(self, event: str) -> bool:
        state = TURN_STATES[self.state].get(event)
        self.state = state or self.state
        return state is not None

    def _open(self, event: str, **fields: Any) -> None:
        self._step(event)
        self._append(self.started, encode(type=event, **fields))

    def _append(self, moment: int, line: bytes) -> None:
        self.lines.append(line)
        self.moments.append(moment)

    def _append_chunk(self, text: str, moment: int, is_final: bool = False) -> None:
        self.texts.append(text)
        self._append(moment, encode_chunk(text, len(self.texts), is_final, self.stamp(moment)))

    def add(self, texts: list[str]) -> bool:
        """Add chunks at the pace; False where the turn has ended, and the texts come too late."""
        with self.changed:
            if not self._step("chunk"):
                return False
            now, last = clock(), self.moments[-1]
            moment = max(now, last + self.delay) if self.texts else now
            for text in texts:
                self._append_chunk(text, moment)
                moment += self.delay
            if last <= now:  # else readers wait for an earlier line's moment, and wake up by themselves
                self.changed.notify_all()
            return True

    def wait_for_pace(self, hold: bool) -> None:
        """The model is done: return when the last chunk's moment has come, or the turn has ended meanwhile."""
        with self.changed:
            self.heard = None
            last = self.moments[-1]
            if hold and last > clock() and self.running:
                self.held = self.texts.pop(), self.moments.pop()
                self.lines.pop()
            while self.running and (rest := last - clock()) > 0:
                self.changed.wait(min(rest / 1e6, threading.TIMEOUT_MAX))

    def settle(self, outcome: Outcome) -> PastTurn | None:
        """Cut off what has not left; a stop comes before what is held, too. What the history gains by this end, which
        must follow before the lock is released. (The lock is held.)"""
        self.ended = clock()
        self.processing_time = (self.ended - self.started) / 1e6
        ready = bisect_right(self.moments, self.ended)
        del self.lines[ready:], self.moments[ready:], self.texts[ready - OPENING :]
        if not isinstance(outcome, Finish):
            return None
        if outcome.reason == "cancelled":
            self.held = None
        answer = self.answer + (self.held[0] if self.held else "")
        if outcome.reason != "cancelled" or answer:
            self.past = PastTurn(self.turn_id, self.message, self.stamp(self.started), answer, self.stamp(self.ended),
                                 outcome, self.processing_time)
        return self.past

    def end(self, outcome: Outcome) -> None:
        """Add the terminal event to a log that was settled. (The lock is held.)"""
        event: dict[str, Any] = self._complete(outcome) if isinstance(outcome, Finish) else {
            "type": "error", "code": outcome.code, "message": outcome.text,
            "retryable": STREAM_ERRORS[outcome.code][0]}
        self._step(event["type"])
        self.terminal = encode(**event, session_id=self.session_id, turn_id=self.turn_id,
                               timestamp=self.stamp(self.ended))
        self.changed.notify_all()

    def _complete(self, finish: Finish) -> dict[str, Any]:
        """Add the final chunk."""
        text, moment = self.held or ("", self.ended)
        self._step("chunk")
        self._append_chunk(text, moment, is_final=True)
        count = self.context_messages + 2 * (self.past is not None)
        return {"type": "complete", "finish_reason": finish.reason, "total_chunks": len(self.texts),
                "processing_time": self.processing_time, "message_count": count,
                **({"usage": finish.usage} if finish.usage else {})}

    def follow(self, after: int = 0, heartbeat: float = 10) -> Generator[list[bytes], None, None]:
        """Yield the lines that may be read, as many at a time as there are, without chunks 1 to `after`.

        Lives until the terminal event has been yielded; an empty list tells of `heartbeat` seconds of silence.
        """
        with self.changed:
            self.readers += 1
        try:
            yield self.lines[:OPENING]
            at, spoken, ended = OPENING + after, clock(), False  # there may be no line at `at`, now or ever
            while not ended:
                with self.changed:
                    now = clock()
                    ready = bisect_right(self.moments, now, at)
                    wake = min([spoken + int(heartbeat * 1e6), *self.moments[at : at + 1]])
                    if ready == at and not self.terminal and now < wake:
                        self.changed.wait((wake - now) / 1e6)
                        continue
                    lines, at, ended = self.lines[at:ready], ready, bool(self.terminal)
                yield [*lines, self.terminal] if ended else lines
                spoken = clock()
        finally:
            with self.changed:
                self.readers -= 1
                if not self.readers:
                    self.deserted = clock()


def cut(piece: str, words: int) -> Iterator[str]:
    """A piece cut into texts of at most `words` words; joined, they are the piece again, but for lone surrogates."""
    piece = re.sub("[\ud800-\udfff]", "\ufffd", piece)
    size = LIMITS["chunk"]
    for match in re.finditer(rf"\s*(?:\S+\s*){{1,{min(words, size)}}}|\s+", piece):
        yield from (match[0][at : at + size] for at in range(0, len(match[0]), size))


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Many texts at a time, since to take the lock and to wake the readers costs more than to add a chunk."""
    while batch := list(islice(texts, BATCH)):
        yield batch
        if len(batch) == BATCH:
            time.sleep(0.00002)  # lets a reader have the interpreter, which does not change hands by itself that soon


def run_turn(turn: Turn, model: Model, history: list[Message], words: int,
             end: Callable[[Turn, Outcome], Any]) -> None:
    """Run a model into a turn, in a thread of its own. A turn that was ended meanwhile takes nothing more."""
    outcome: Outcome = TurnError("model_cut")
    try:
        for piece in model(history):
            if not turn.running:
                return
            if isinstance(piece, Finish):
                outcome = piece
                break
            turn.heard = clock()
            if not all(map(turn.add, batches(cut(piece, words)))):
                return
        if isinstance(outcome, Finish) and not turn.texts:
            if outcome.reason == "content_filter":
                blocked = f"The model's service blocked the message or the answer ({outcome.word}). Ask another way."
                outcome = TurnError("model_blocked", blocked)
            elif outcome.reason == "stop":
                outcome = TurnError("model_error", "The model ended its answer without a word. Ask again.")
    except TurnError as error:
        outcome = error
    except Exception as error:
        outcome = TurnError("internal_error")
        outcome.__cause__ = error
    turn.wait_for_pace(hold=isinstance(outcome, Finish))
    end(turn, outcome)


# ---- database: what --db keeps, in a file of SQLite. It knows no HTTP, and nothing of turns that run. ---------------

APPLICATION_ID = int.from_bytes(b"SCht", "big")  # in the file's header: whose it is
SCHEMA_VERSION = 1  # in its user_version; a file of a later one is left alone
SCHEMA = (  # a turn is one row, so there never is half of one. created_at, last_activity: microseconds since 1970.
    "CREATE TABLE sessions (key INTEGER PRIMARY KEY AUTOINCREMENT, session_id TEXT UNIQUE, model TEXT, "
    "created_at INTEGER, last_activity INTEGER, turns INTEGER)",  # a key never comes again
    "CREATE TABLE turns (session INTEGER, number INTEGER, turn_id TEXT, message TEXT, sent TEXT, answer TEXT, "
    "answered TEXT, finish_reason TEXT, usage TEXT, processing_time REAL, PRIMARY KEY (session, number))",
)


class DatabaseError(Exception):
    """Why the file of --db can't be opened, read or written, as a sentence. Nothing has changed then."""


class MemoryHistory(list[PastTurn]):
    """A session's history without --db."""

    def keep(self, turn: PastTurn, now: int) -> None:
        self.append(turn)

    def forget(self, now: int) -> None:
        self.clear()

    def delete(self) -> None:
        """There is nothing to do."""


class StoredHistory:
    """A session's history in the database: read when it is needed, and not kept in memory. Raises DatabaseError."""

    __slots__ = ("database", "key", "length")

    def __init__(self, database: Database, key: int, length: int) -> None:
        self.database, self.key, self.length = database, key, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[PastTurn]:
        rows = self.database.read("SELECT turn_id, message, sent, answer, answered, finish_reason, usage, "
                                  "processing_time FROM turns WHERE session = ? ORDER BY number", self.key)
        if len(rows) != self.length:
            raise DatabaseError(f"{self.database.path} is damaged: {len(rows)} of {self.length} turns were found")
        for turn_id, message, sent, answer, answered, reason, usage, seconds in rows:
            finish = Finish(reason, usage and json.loads(usage))
            yield PastTurn(turn_id, message, sent, answer, answered, finish, seconds)

    def keep(self, turn: PastTurn, now: int) -> None:
        """Now is when the session was active last, in microseconds of wall_clock()."""
        *texts, finish, seconds = turn
        row = (self.key, self.length + 1, *texts, finish.reason, finish.usage and json.dumps(finish.usage), seconds)
        with self.database.writing() as write:
            write("INSERT INTO turns VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            write("UPDATE sessions SET turns = ?, last_activity = ? WHERE key = ?",
                  (self.length + 1, now, self.key))
        self.length += 1

    def forget(self, now: int) -> None:
        with self.database.writing() as write:
            write("DELETE FROM turns WHERE session = ?", (self.key,))
            write("UPDATE sessions SET turns = 0, last_activity = ? WHERE key = ?", (now, self.key))
        self.length = 0

    def delete(self) -> None:
        """And the session."""
        with self.database.writing() as write:
            write("DELETE FROM turns WHERE session = ?", (self.key,))
            write("DELETE FROM sessions WHERE key = ?", (self.key,))


class Database:
    """The file of --db. One server has it at a time; other programs may read it meanwhile."""

    def __init__(self, file: str) -> None:
        """Raises DatabaseError, and has not changed a file of others, or a damaged one, then."""
        self.path = Path(file).resolve()
        self.write_lock, self.read_lock = threading.Lock(), threading.Lock()  # who reads does not wait for the disk
        self.places: dict[str, tuple[int, int]] = {}
        self.locked_out = 0  # when it was last, in microseconds of clock()
        with as_database_error(self.path):
            check_database(self.path)
            self.owner = connect(f"{self.path}-lock")  # a file of its own, so that other programs can read this one
            self.owner.execute("PRAGMA journal_mode = MEMORY")  # which makes no other file
            self.owner.execute("BEGIN EXCLUSIVE")  # ends with the process, however that ends
            if not self.path.exists():
                self.path.touch(0o600)
            self.writer, self.reader = connect(self.path), connect(self.path)
            self._prepare()

    def _prepare(self) -> None:
        self.writer.execute("PRAGMA synchronous = FULL")
        [mode] = self.writer.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise OSError("its file system can't share memory between programs, which SQLite's WAL needs")
        with self.writing() as write:
            if not write("SELECT 1 FROM sqlite_master").fetchone():
                for statement in SCHEMA:
                    write(statement)
            write(f"PRAGMA application_id = {APPLICATION_ID}")
            write(f"PRAGMA user_version = {SCHEMA_VERSION}")  # which also tells whether it can be written
        self.places = {path: identity(path) for path in (f"{self.path}{end}" for end in ("", "-wal", "-lock"))}

    @contextmanager
    def writing(self) -> Iterator[Callable[..., Any]]:
        """A transaction, for the function given to execute statements in. When it is left, it is on disk. Raises
        DatabaseError."""
        asked = clock()
        with as_database_error(self.path), self.write_lock:
            self._begin(asked)
            try:
                yield self.writer.execute
                self._check_places()
                self.writer.execute("COMMIT")
            except BaseException:
                self._undo()
                raise

    def _begin(self, asked: int) -> None:
        """Wait a second for another program that writes. Of many that ask meanwhile, only the first waits so long."""
        if self.locked_out > asked:
            raise OSError("another program writes to it")
        try:
            self.writer.execute("BEGIN IMMEDIATE")
        except Exception:
            self.locked_out = clock()
            raise

    def _undo(self) -> None:
        """Roll back. A COMMIT that failed may have left its turn in FILE-wal, and a later start would find it there: so
        another one, which changes nothing, takes its place."""
        if self.writer.in_transaction:
            self.writer.execute("ROLLBACK")
        with suppress(Exception):  # the disk does not work at all: nothing will have been left
            self.writer.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    def _check_places(self) -> None:
        """SQLite would go on to write to a file that was taken away, and nobody would find it again."""
        for path, known in self.places.items():
            if identity(path) != known:
                raise OSError(f"{path} is another file by now")

    def read(self, query: str, *values: Any) -> list[tuple]:
        """All rows. Raises DatabaseError."""
        with as_database_error(self.path), self.read_lock:
            return self.reader.execute(query, values).fetchall()

    def add(self, session_id: str, model: str, created_at: int) -> StoredHistory:
        """A new session. Raises DatabaseError."""
        with self.writing() as write:
            row = (session_id, model, created_at, created_at)
            key = write("INSERT INTO sessions VALUES (NULL, ?, ?, ?, ?, 0)", row).lastrowid
        return StoredHistory(self, key, 0)

    def sessions(self) -> list[tuple[str, str, int, int, StoredHistory]]:
        """What a Session is made of, for each. Raises DatabaseError."""
        rows = self.read("SELECT session_id, model, created_at, last_activity, key, turns FROM sessions")
        return [(*facts, StoredHistory(self, key, turns)) for *facts, key, turns in rows]

    def close(self) -> None:
        with self.write_lock, self.read_lock:
            for connection in (self.reader, self.writer, self.owner):  # the last but one tidies up FILE-wal
                connection.close()


History = MemoryHistory | StoredHistory


def connect(path: Path | str) -> Any:
    """A connection of SQLite for many threads, where a statement by itself is a transaction. Raises sqlite3.Error."""
    import sqlite3  # not needed without --db, and some builds of Python lack it

    return sqlite3.connect(path, timeout=1, isolation_level=None, check_same_thread=False)


@contextmanager
def as_database_error(path: Path) -> Iterator[None]:
    """What goes wrong with the file, as DatabaseError."""
    import sqlite3

    try:
        yield
    except sqlite3.Error as error:
        locked = "locked" in str(error)
        raise DatabaseError(f"cannot use {path}: {'another program uses it' if locked else error}") from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise DatabaseError(f"cannot use {path}: {error.strerror or error}{where}") from None


def identity(path: str) -> tuple[int, int]:
    """Device and inode: the same for a file under another name, and only there. Raises OSError."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def check_database(path: Path) -> None:
    """Raise sqlite3.Error or OSError, unless the file is a database of this program, or none yet. It is only read:
    SQLite would mend, or change, what is not ours."""
    import sqlite3

    log = Path(f"{path}-wal")
    has_log = log.exists() and log.stat().st_size > 0
    if not path.exists() or path.is_file() and not path.stat().st_size:
        if has_log:
            raise OSError(f"it is empty, but {log.name} beside it is not: the file was taken away")
        return
    if not path.is_file():
        raise OSError("it is no file")
    if path.stat().st_nlink > 1:
        raise OSError("it has another name, a hard link, under which SQLite would take it for another file")
    with path.open("rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0") or header[20]:  # bytes not used in each page
        raise OSError("it is no database of SQLite, or its header is damaged")
    # Without a log nobody writes to it: then it is read as it is, and SQLite makes no files beside it.
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable={int(not has_log)}", uri=True)) as found:
        application, version, page = (found.execute(f"PRAGMA {name}").fetchone()[0]
                                      for name in ("application_id", "user_version", "page_size"))
        schema = [sql for [sql] in found.execute("SELECT sql FROM sqlite_master WHERE substr(name, 1, 7) <> 'sqlite_' "
                                                 "ORDER BY rowid")]
        if tuple(schema) == SCHEMA:
            found.execute("SELECT total(turns) FROM sessions")  # which reads all of them
    if not schema and not application:
        return  # nobody's yet
    if application != APPLICATION_ID:
        raise OSError("it belongs to another program")
    if version > SCHEMA_VERSION:
        raise OSError(f"a newer version of this program made it (its schema is {version}, not {SCHEMA_VERSION})")
    if tuple(schema) != SCHEMA or path.stat().st_size % page:
        raise OSError("its tables are not as this program makes them, or its end is missing")


# ---- sessions: what is remembered, and who may begin a turn. It knows no sockets and nothing of a model's inside. ----


def messages(history: Iterable[PastTurn]) -> list[Message]:
    """Two for each turn."""
    return [
        Message(*message, turn.turn_id)
        for turn in history
        for message in (("user", turn.message, turn.sent), ("model", turn.answer, turn.answered))
    ]


def new_id() -> str:
    """A session_id or turn_id for who names none."""
    return str(uuid.uuid4())


class Session:
    """One conversation: an id, a model, a history of whole turns, and at most one running turn.

    `changed` is its lock, and its turns' too: the end of a turn, the history and the end of busy are seen as one. Only
    Sessions changes it, and holds the lock.
    """

    __slots__ = ("_changed", "created_at", "deleted", "history", "last_activity", "latest", "model", "session_id",
                 "unclaimed")
    making = threading.Lock()

    def __init__(self, session_id: str, model: str, created_at: int, last_activity: int, history: History) -> None:
        self.session_id, self.model, self.history = session_id, model, history
        self.created_at, self.last_activity = created_at, last_activity  # microseconds of wall_clock()
        self.latest: Turn | None = None  # while it runs, and while its log is kept
        self.unclaimed = False  # made by a POST, and no turn has begun; of two POSTs at once either may begin it
        self.deleted = False
        self._changed: threading.Condition | None = None

    @property
    def changed(self) -> threading.Condition:
        """Made when it is first needed. It is most of a session, and most sessions of a file are not."""
        if not self._changed:
            with self.making:
                self._changed = self._changed or threading.Condition()
        return self._changed

    @property
    def running_turn(self) -> Turn | None:
        return self.latest if self.latest and self.latest.running else None

    def known_turn(self, turns: list[PastTurn], turn_id: str | None, message: str) -> Turn | PastTurn | None:
        """The turn that a POST with this turn_id repeats, of those in the history and the latest one. A failed one is
        free for another run and any message. Raises Refused: turn_id_reused."""
        if turn_id is None:
            return None
        known: Turn | PastTurn | None = next((turn for turn in reversed(turns) if turn.turn_id == turn_id), None)
        if self.latest and self.latest.turn_id == turn_id and self.latest.state != "failed":
            known = self.latest
        if known and known.message != message:
            raise Refused("turn_id_reused", f"The turn {turn_id} has another message. Take a new turn_id.")
        return known

    def _facts(self) -> dict[str, Any]:
        return {"session_id": self.session_id, "model": self.model, "message_count": 2 * len(self.history),
                "created_at": stamp(self.created_at), "last_activity": stamp(self.last_activity),
                "streaming": self.running_turn is not None}

    def summary(self) -> dict[str, Any]:
        """One entry of GET /sessions. (Without the lock: an end changes the history first and *streaming* last.)"""
        return {**self._facts(), "duration_minutes": round((wall_clock() - self.created_at) / 60e6, 2)}

    def details(self) -> dict[str, Any]:
        """The answer of GET /sessions/{session_id}. (The lock is held.)"""
        turn = self.latest
        return {
            **self._facts(),
            "user_messages": len(self.history),
            "model_messages": len(self.history),
            "session_duration_seconds": round((wall_clock() - self.created_at) / 1e6, 3),
            "messages": [message._asdict() for message in messages(self.history)],
            "latest_turn": turn and {"turn_id": turn.turn_id, "state": turn.state, "message": turn.message,
                                     "started": turn.stamp(turn.started), "chunks": turn.chunks()},
        }


class Counters:
    """What /health and /stats count. Turns are running, successful or failed, so the totals always balance."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # who wants several answers that agree takes it around them
        self.start_time, self.started = wall_clock(), clock()
        self.running: dict[Turn, None] = {}  # in the order of their start
        self.successful = self.failed = self.sessions_created = self.chunks = self.bytes = self.readers = 0
        self.response_time = 0.0  # seconds, of all turns that have ended
        self.first_chunks: deque[float] = deque(maxlen=1000)  # seconds from a turn's start to its first chunk

    def begin(self, turn: Turn) -> None:
        with self.lock:
            self.running[turn] = None

    def end(self, turn: Turn) -> None:
        with self.lock:
            del self.running[turn]
            if turn.state == "complete":
                self.successful += 1
            else:
                self.failed += 1
            self.chunks += len(turn.texts)
            self.bytes += sum(map(len, turn.lines)) + len(turn.terminal)
            self.response_time += turn.processing_time
            if turn.answer:
                self.first_chunks.append((turn.moments[OPENING] - turn.started) / 1e6)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Count one connection that is being streamed to."""
        with self.lock:
            self.readers += 1
        try:
            yield
        finally:
            with self.lock:
                self.readers -= 1

    def totals(self) -> dict[str, int]:
        with self.lock:
            return {"total_requests": self.successful + self.failed + len(self.running),
                    "successful_requests": self.successful, "failed_requests": self.failed,
                    "streaming_connections": self.readers}

    def averages(self) -> dict[str, Any]:
        with self.lock:
            ended, first = self.successful + self.failed, sorted(self.first_chunks)
            return {
                "average_response_time": round(self.response_time / ended, 6) if ended else None,
                "total_sessions_created": self.sessions_created, "total_chunks": self.chunks, "total_bytes": self.bytes,
                "average_chunks_per_stream": round(self.chunks / ended, 3) if ended else None,
                "time_to_first_chunk": {f"p{percent}": first[len(first) * percent // 100] if first else None
                                        for percent in (50, 95)},
            }

    def streams(self) -> list[dict[str, Any]]:
        """One entry for each running turn."""
        with self.lock:
            turns = list(self.running)
        return [{"session_id": turn.session_id, "turn_id": turn.turn_id, "started": turn.stamp(turn.started),
                 "chunks": turn.chunks(), "readers": turn.readers, "client": turn.client}
                for turn in turns]


class Sessions:
    """The lock-guarded dict of all sessions. Its lock is never held while a session's lock is waited for."""

    def __init__(self, settings: Settings, console: Console, load: Callable[[str], Model],
                 database: Database | None) -> None:
        """Raises DatabaseError."""
        self.settings, self.console, self.load, self.database = settings, console, load, database
        self.counters = Counters()
        self.lock = threading.Lock()
        self.sessions = {row[0]: Session(*row) for row in database.sessions()} if database else {}
        self.closing = False  # when true, no session is made and no turn begun

    def __len__(self) -> int:
        return len(self.sessions)

    def all(self) -> list[Session]:
        """Without the lock, which is held while a session is written to a disk."""
        return list(self.sessions.values())

    def get(self, session_id: str) -> Session:
        """One look into a dict needs no lock. Raises Refused."""
        if not (session := self.sessions.get(session_id)):
            raise Refused("session_not_found", "There is no such session. GET /sessions lists those that there are.")
        return session

    @contextmanager
    def locked(self, session_id: str) -> Iterator[Session]:
        """The session, with its lock held. Raises Refused: session_not_found."""
        while True:
            session = self.get(session_id)
            with session.changed:
                if not session.deleted:  # between the look-up and the lock; then there may be a new one
                    yield session
                    return

    def create(self, session_id: str, model: str) -> Session:
        """A new session. Raises Refused: session_exists, overloaded. Raises DatabaseError."""
        with self.lock:
            if session_id in self.sessions:
                raise Refused("session_exists", f"The session {session_id} is there already. Take another session_id.")
            return self._add(session_id, model)

    def _add(self, session_id: str, model: str) -> Session:
        self._check_open()
        if len(self.sessions) >= LIMITS["sessions"]:
            raise Refused("overloaded", f"There are {LIMITS['sessions']:,} sessions. Delete one that you do not need.")
        now = wall_clock()
        history: History = self.database.add(session_id, model, now) if self.database else MemoryHistory()
        session = self.sessions[session_id] = Session(session_id, model, now, now, history)
        self.counters.sessions_created += 1
        return session

    def _check_open(self) -> None:
        if self.closing:
            raise Refused("overloaded", "The server is shutting down. Try again when it is back.")

    def _check_turns(self) -> None:
        if len(self.counters.running) >= self.settings.max_connections + LIMITS["unread_turns"]:
            raise Refused("overloaded", "Too many turns are running. Try again in a moment.")

    def _get_or_add(self, session_id: str) -> Session:
        if session := self.sessions.get(session_id):  # which need not wait for those that are written
            return session
        with self.lock:
            if session := self.sessions.get(session_id):
                return session
            self._check_turns()
            session = self._add(session_id, self.settings.model)
            session.unclaimed = True
            return session

    def begin(self, message: str, session_id: str, turn_id: str | None, client: str) -> Turn:
        """The turn that a POST follows: a running or complete one that it repeats, or a new one.

        Raises Refused: turn_id_reused, session_busy, and overloaded (sessions, turns, or shutting down); DatabaseError.
        """
        while True:
            session = self._get_or_add(session_id)
            with session.changed:
                if session.deleted:  # between the look-up and the lock
                    continue
                turns = list(session.history)
                known = session.known_turn(turns, turn_id, message)
                if isinstance(known, PastTurn):
                    return self._replay(session, known, 2 * turns.index(known))
                if known:
                    return known
                if session.running_turn:
                    raise Refused("session_busy", "A turn is running in this session. Wait for its end, or stop it.")
                self._check_open()
                self._check_turns()
                turn = self._new_turn(session, message, turn_id, client)
                history = [*messages(turns), Message("user", message, turn.stamp(turn.started), turn.turn_id)]
            self._start(session, turn, history)
            return turn

    def _new_turn(self, session: Session, message: str, turn_id: str | None, client: str) -> Turn:
        turn = Turn(session, turn_id or new_id(), message, 2 * len(session.history), session.unclaimed,
                    self.settings.chunk_delay, client)
        session.latest, session.unclaimed, session.last_activity = turn, False, wall_clock()
        self.counters.begin(turn)
        self.console.log("stream_started", client=client, session=turn.session_id, turn=turn.turn_id,
                         active=len(self.counters.running), message=message)
        return turn

    def _start(self, session: Session, turn: Turn, history: list[Message]) -> None:
        work = (turn, self.load(session.model), history, self.settings.chunk_words, partial(self.end, session))
        try:
            _thread.start_new_thread(run_turn, work)  # Thread.start() would wait until it runs
        except RuntimeError as error:  # the system has no thread left
            failure = TurnError("internal_error")
            failure.__cause__ = error
            self.end(session, turn, failure)

    def _replay(self, session: Session, past: PastTurn, context_messages: int) -> Turn:
        """A turn whose log is gone, made again from the history, without pace. (The lock is held.)"""
        turn = Turn(session, past.turn_id, past.message, context_messages)
        texts = list(cut(past.answer, self.settings.chunk_words))
        last = texts.pop() if texts and past.finish.reason != "cancelled" else None
        turn.add(texts)
        turn.held = (last, clock()) if last else None
        turn.settle(past.finish)
        turn.processing_time = past.processing_time
        turn.end(past.finish)
        return turn

    def end(self, session: Session, turn: Turn, outcome: Outcome) -> bool:
        """The end of a turn, in one step: last chunk, terminal event, history, counters and the end of busy.

        It is in the history, and on the disk, before anybody can read that it is complete; where it can't be, it fails.
        False where it had ended: the first of completion, failure, stop, window, clear, delete and shutdown wins.
        """
        with session.changed:
            if not turn.running:
                return False
            past, session.last_activity = turn.settle(outcome), wall_clock()
            if past:
                try:
                    session.history.keep(past, session.last_activity)
                except DatabaseError as error:
                    outcome = TurnError("internal_error")
                    self.console.trouble(error, session=turn.session_id, turn=turn.turn_id)
            turn.end(outcome)
            self.counters.end(turn)
            self._log_end(turn, outcome)
            return True

    def _log_chunks(self, turn: Turn) -> None:
        """Log the chunks that have left since the last call. (The lock is held.)"""
        if self.console.mode != "full":
            return
        for number, text, moment in turn.unlogged()[: LIMITS["log_chunks"]]:
            self.console.log("chunk", turn.epoch + moment, session=turn.session_id, turn=turn.turn_id, number=number,
                             text=text)

    def _log_end(self, turn: Turn, outcome: Outcome) -> None:
        self._log_chunks(turn)
        ended: dict[str, Any] = {
            "session": turn.session_id, "turn": turn.turn_id, "chunks": len(turn.texts),
            "seconds": turn.processing_time, "active": len(self.counters.running)}
        if isinstance(outcome, Finish):
            self.console.log("stream_ended", **ended, status=outcome.reason)
        else:
            self.console.log("stream_ended", **ended, status="failed", error=outcome.code, detail=outcome.text)
            if outcome.__cause__:
                self.console.crash(outcome.__cause__)

    def stop(self, session_id: str, turn_id: str | None) -> bool:
        """Stop the running turn, if it is the one named or none is named. True where this ended a turn."""
        with self.locked(session_id) as session:
            turn = session.running_turn
            return turn is not None and turn_id in (None, turn.turn_id) and self.end(session, turn, Finish("cancelled"))

    def _abort(self, session: Session, code: str) -> None:
        if turn := session.running_turn:
            self.end(session, turn, TurnError(code))

    def clear(self, session_id: str) -> None:
        """Forget the history, and end a running turn. Raises Refused: session_not_found; DatabaseError."""
        with self.locked(session_id) as session:
            now = wall_clock()
            session.history.forget(now)
            self._abort(session, "session_cleared")
            session.latest, session.last_activity = None, now

    def delete(self, session_id: str) -> None:
        """Forget the session; a POST that holds it already makes a new one. Raises as clear() does."""
        with self.locked(session_id) as session:
            session.history.delete()
            session.deleted = True
            self._abort(session, "session_deleted")
            with self.lock:  # not sooner: a new session with this id could have a turn at the same time
                del self.sessions[session_id]

    def sweep_until(self, stopped: threading.Event) -> None:
        """Sweep ten times a second, in a thread of its own: waiting for a session must not hold back who accepts."""
        while not stopped.wait(0.1):
            try:
                self.sweep()
            except Exception as error:
                self.console.crash(error)

    def sweep(self) -> None:
        """What the clock ends: turns without readers, turns of a silent model, logs that are no longer kept."""
        for session in self.all():
            if not session.latest:
                continue
            with session.changed:
                if turn := session.latest:
                    self._sweep(session, turn)

    def _sweep(self, session: Session, turn: Turn) -> None:
        window, now = self.settings.resume_window * 1e6, clock()
        if not turn.running:
            if now - turn.ended >= window:
                session.latest = None
        elif not turn.readers and turn.deserted is not None and now - turn.deserted >= window:
            self.end(session, turn, Finish("cancelled"))
        elif turn.heard is not None and now - turn.heard >= LIMITS["model_silence"] * 1e6:
            silence = f"The model was silent for {LIMITS['model_silence']} s. Send the same request again."
            self.end(session, turn, TurnError("model_cut", silence))
        else:
            self._log_chunks(turn)

    def close(self) -> None:
        """Begin no turn, give running ones their grace, end the rest, and give readers a second to take the end."""
        self.closing = True
        self._wait(LIMITS["grace"], lambda: not self.counters.running)
        for session in self.all():
            with session.changed:
                self._abort(session, "server_shutdown")
        self._wait(1, lambda: not self.counters.readers)

    def _wait(self, seconds: float, done: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end:
            self.sweep()  # its thread has ended with the server
            time.sleep(0.02)


# ---- models: a history -> an iterator of pieces, then one Finish; they raise TurnError. They know nothing of this
# ---- server's HTTP, sessions and threads. ----------------------------------------------------------------------------


def offline(history: list[Message]) -> Iterator[str | Finish]:
    """Needs no key, no package and no network: repeats the message and says how many came before it."""
    before = len(history) - 1
    yield f"You said: {history[-1].text}\n\nThis is the offline model. {before} messages came before this one."
    yield Finish("stop")


# Gemini comes through google-genai, 1.17 or newer, which is imported (0.6 s) with the first answer. What its newest
# version reads from the environment counts in every version.

DEFAULT_GEMINI = "gemini-3.8-flash"
GEMINI_RETRY_DELAYS = (1.0, 2.0)  # seconds before the second and the last try; not more, for the user is waiting
GEMINI_RETRIED = (429, 500, 503)
GEMINI_REFUSALS = {  # status → stream error code, and what to do about it; any other is model_error
    401: ("model_auth", "Check GOOGLE_API_KEY or GEMINI_API_KEY, or the Google Cloud credentials."),
    403: ("model_auth", "Check what GOOGLE_API_KEY or GEMINI_API_KEY, or the Google Cloud project, may use."),
    404: ("model_not_found", "Name a model that is served, with --model or GENAI_MODEL_ID."),
    429: ("model_overloaded", "Too many requests, or the quota is used up: try again later."),
    503: ("model_overloaded", "The model is overloaded: try again later."),
}
GEMINI_FILTERS = ["SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR", "ESCALATION"]
GEMINI_FILTERS += ["IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"]
FINISH_REASONS = {"STOP": "stop", "MAX_TOKENS": "length", **dict.fromkeys(GEMINI_FILTERS, "content_filter")}  # or other
LOOKS_LIKE_A_KEY = re.compile(r"\b(AIza|AQ\.|ya29\.)[\w.-]{20,}")


def gemini_keys() -> list[str]:
    """The keys that are set; the first one counts. White space around a key came with pasting it."""
    return [key for name in ("GOOGLE_API_KEY", "GEMINI_API_KEY") if (key := os.environ.get(name, "").strip())]


def gemini_on_vertex() -> bool:
    """Whether the environment asks for Vertex AI; USE_ENTERPRISE, the newer name, goes first."""
    flag = os.environ.get("GOOGLE_GENAI_USE_ENTERPRISE", os.environ.get("GOOGLE_GENAI_USE_VERTEXAI", ""))
    return flag.lower() in ("true", "1")


def choose_model() -> str:
    """The model where the command line names none."""
    return os.environ.get("GENAI_MODEL_ID") or (DEFAULT_GEMINI if gemini_keys() or gemini_on_vertex() else "offline")


def model_problem(model_id: str) -> str | None:
    """What keeps a model from being used here, as a sentence, or None. Looks for google-genai without loading it."""
    keys = gemini_keys()
    if model_id == "offline":
        return None
    if not keys and not gemini_on_vertex():
        return f"{model_id} needs an API key: set GEMINI_API_KEY or GOOGLE_API_KEY, or use --model offline."
    if not all(key.isascii() and key.isprintable() for key in keys):
        return "GEMINI_API_KEY or GOOGLE_API_KEY holds characters that no key has: set it anew, or use --model offline."
    try:
        found = find_spec("google.genai")
    except ModuleNotFoundError:  # there is no google package to look into
        found = None
    return None if found else f"{model_id} needs google-genai: pip install google-genai, or use --model offline."


def without_keys(text: str) -> str:
    """A text of the service on one line: first without keys, then short, so that no half of a key is left."""
    for key in sorted(gemini_keys(), key=len, reverse=True):
        text = text.replace(key, "[key]")
    return " ".join(LOOKS_LIKE_A_KEY.sub("[key]", text).split())[:700]


@cache
def gemini_client() -> Any:
    """One client for all turns: it is thread-safe, and making one costs 25 to 55 ms and a new TLS connection."""
    import logging  # loaded by the package, and not used without it

    # What the package prints (both keys are set, a finish reason is newer than it) would spoil the server's output.
    logging.getLogger("google_genai").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"google\.genai")
    from google import genai

    version = os.environ.get("GOOGLE_GENAI_API_VERSION")
    options: Any = {
        "timeout": LIMITS["model_timeout"] * 1000,  # milliseconds
        "api_version": None if version in ("", "beta") else version,  # 3.x knows "beta"; 1.17 asks for it by default
        "client_args": {
            # By default turns over 100 at once wait for a connection. httpx and httpx2 take anything with these names.
            "limits": SimpleNamespace(max_connections=None, max_keepalive_connections=20, keepalive_expiry=5.0),
            "event_hooks": {"response": [read_lines_well]},
        },
    }
    keys, vertex = gemini_keys(), gemini_on_vertex()
    project, location = os.environ.get("GOOGLE_CLOUD_PROJECT"), os.environ.get("GOOGLE_CLOUD_LOCATION")
    access: dict[str, Any] = {"api_key": keys[0]} if keys else {}
    if vertex and (project or location or not keys):
        access = {"project": project, "location": location or "global"}
    try:
        return genai.Client(vertexai=vertex, **access, http_options=options)
    except Exception as error:  # google-auth has many
        raise TurnError("model_auth", f"No access to Google Cloud: {without_keys(str(error))}") from None


def read_lines_well(response: Any) -> None:
    """google-genai 1.17 takes a raw U+2028 in a text for the end of a line, and an error object in the middle of a
    stream for an empty response. It reads by iter_lines (3.x no longer does), which gets its right meaning here."""
    from google.genai.errors import APIError

    def lines() -> Iterator[str]:
        rest, error = b"", ""
        for data in chain(response.iter_bytes(), [b"\n"]):
            *whole, rest = (rest + data).split(b"\n")
            for line in (line.decode(errors="replace").rstrip("\r") for line in whole):
                if not line or (line.startswith("data: ") and not line.startswith('data: {"error"')):
                    yield line
                else:  # an error object is the last thing sent, in one line or in many without "data: "
                    error += line.removeprefix("data: ")
        if error:
            raise APIError(0, json.loads(error))

    response.iter_lines = lines


def load_model(model_id: str) -> Model:
    """The model of this name; one that model_problem() has nothing against."""
    return offline if model_id == "offline" else gemini(model_id)


def gemini(model_id: str) -> Model:
    """A model served by Gemini."""

    def answer(history: list[Message]) -> Iterator[str | Finish]:
        # Gemini refuses a message without text.
        contents = [{"role": message.role, "parts": [{"text": message.text}]} for message in history if message.text]
        end, usage = None, None
        for response in gemini_responses(model_id, contents):
            end, usage = gemini_end(response) or end, gemini_usage(response) or usage
            yield gemini_text(response)
        if end:
            reason, word = end
            yield Finish(reason, usage, word)

    return answer


def gemini_responses(model_id: str, contents: list[dict]) -> Iterator[Any]:
    """google-genai's responses as they come; what may pass is tried again, but only before the first response."""
    if problem := model_problem(model_id):
        raise TurnError("model_auth", problem)
    client = gemini_client()
    for delay in (*GEMINI_RETRY_DELAYS, None):
        started = False
        try:
            for response in client.models.generate_content_stream(model=model_id, contents=contents):
                started = True
                yield response
            return
        except Exception as error:  # the package's, httpx's or httpx2's, google-auth's, json's
            if started or delay is None or getattr(error, "code", None) not in GEMINI_RETRIED:
                raise gemini_error(model_id, error) from None  # a key may stand in what it was raised from
        time.sleep(delay)


def gemini_text(response: Any) -> str:
    """The text of the first candidate. Thoughts are no part of the answer."""
    content = response.candidates[0].content if response.candidates else None
    parts = (content and content.parts) or []
    return "".join(part.text for part in parts if part.text and not part.thought)


def gemini_end(response: Any) -> tuple[str, str] | None:
    """The finish reason and Gemini's word for it, which may come with any response: the last one counts."""
    if response.prompt_feedback and response.prompt_feedback.block_reason:
        return "content_filter", response.prompt_feedback.block_reason.value
    word = response.candidates[0].finish_reason if response.candidates else None
    if word in (None, "FINISH_REASON_UNSPECIFIED"):
        return None
    return FINISH_REASONS.get(word.value, "other"), word.value


def gemini_usage(response: Any) -> dict | None:
    """Token counts so far, as `complete` tells them."""
    usage = response.usage_metadata
    if not usage:
        return None
    given = usage.prompt_token_count or 0
    written = (usage.candidates_token_count or 0) + (usage.thoughts_token_count or 0)  # thoughts are paid for as output
    return {"input_tokens": given, "output_tokens": written, "total_tokens": usage.total_token_count or given + written}


def gemini_error(model_id: str, error: Exception) -> TurnError:
    """What google-genai, its transport or its credentials raised, as a stream error with a sentence that helps."""
    from google.auth.exceptions import DefaultCredentialsError, RefreshError
    from google.genai.errors import APIError

    name, text = type(error).__name__, without_keys(str(error))
    if isinstance(error, APIError):
        status = 401 if error.code == 400 and "API_KEY_INVALID" in str(error) else error.code
        code, advice = GEMINI_REFUSALS.get(status, ("model_error", "The request failed."))
        said = without_keys(str(error.message or error.status or "no reason"))
        return TurnError(code, f"{model_id}: {advice} Gemini said: {error.code}, {said}")
    if isinstance(error, (DefaultCredentialsError, RefreshError)):
        return TurnError("model_auth", f"{model_id}: The Google Cloud credentials do not work: {text}")
    if type(error).__module__.startswith(("httpx", "google.auth")):  # httpx2 in newer versions
        return TurnError("model_cut", f"{model_id}: The connection broke or never came about ({name}: {text}).")
    # Something unreadable came, most likely the first half of a line. The text may hold a part of the answer.
    return TurnError("model_cut", f"{model_id}: What came could not be read ({name}).")


# ---- request checks: pure functions from bytes to a checked request with its route, which raise Refused. They know no
# ---- sockets and no sessions. ----------------------------------------------------------------------------------------


class Target(NamedTuple):
    """What a request asks for."""

    host: str | None  # None where the field Host tells it
    path: str  # "*" for the server as a whole
    query: str


class Head(NamedTuple):
    """The head of a request, which has passed the checks that need nothing else."""

    size: int  # bytes
    method: str
    path: str
    query: str
    version: str  # HTTP/1.0 or HTTP/1.1
    headers: dict[str, str]  # names in lower case; the values of a repeated name are joined by a comma
    host: str  # with its port; empty where an HTTP/1.0 client names none
    codings: list[str]  # of Transfer-Encoding, in lower case
    length: int  # of the body, in bytes

    @property
    def has_body(self) -> bool:
        return bool(self.codings or self.length)

    @property
    def closes(self) -> bool:
        """Whether the client wants, or expects, the connection to be closed after the answer (RFC 9112, 9.6)."""
        return self.version == "HTTP/1.0" or "close" in elements(self.headers.get("connection", ""))

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for 100 Continue (RFC 9110, 10.1.1)."""
        expects = "100-continue" in elements(self.headers.get("expect", ""))
        return expects and self.length > 0 and self.version != "HTTP/1.0"


class Request(NamedTuple):
    """A request whose head and body have been read and whose route is known."""

    params: dict[str, str]  # from the path
    query: str
    headers: dict[str, str]  # names in lower case
    client: str  # IP address
    curl: str  # how a curl line begins that reaches this server as the client did, up to the path
    fields: dict[str, Any]  # of the JSON body; empty where the route takes none


NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # of a method or a field: a `token` of RFC 9110, section 5.6.2
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # all but the tab; CR and LF are none of a line, which CRLF ends
CONTROL_BYTES = re.compile(CONTROL.pattern.encode())
HEAD_LIMITS = (LIMITS["request_line"] - 1, LIMITS["head"])  # with so many bytes and no end, a head is too long
REQUEST_LINE = re.compile(rf"({NAME}) ([^ ]+) HTTP/([0-9])\.([0-9])")
FIELD = re.compile(rf"({NAME}):(.*)")
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|((?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+))(?::[0-9]{0,5})?")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}  # https: behind a proxy
TARGET = re.compile(r"(?:https?://([^/?]*))?(/[^?]*)?(?:\?(.*))?", re.IGNORECASE)
TARGET_CHARACTERS = re.compile('[!"$-~]+')  # what is visible in ASCII, but #


def elements(value: str) -> list[str]:
    """The elements of a field that is a list (RFC 9110, section 5.6.1), in lower case."""
    return [element for each in value.lower().split(",") if (element := each.strip(" \t"))]


@lru_cache(maxsize=64)  # clients repeat themselves
def host_name(host: str) -> str:
    """A Host (RFC 3986, section 3.2.2) without its port, in lower case; an IPv6 address without its brackets. Empty
    where it can't be read."""
    match = HOST.fullmatch(host)
    if not match:
        return ""
    if not match[1]:
        return match[2].lower()
    try:
        return str(IPv6Address(match[1]))
    except ValueError:
        return ""


def parse_head(received: bytes | bytearray) -> Head | None:
    """The head at the beginning of what was received (RFC 9112), or None where more of it must come.

    Raises Refused. A line is judged when it is whole, the beginning of one only for its characters and its length, and
    in the order of the bytes; so the answer is the same however they are cut.
    """
    begin = 2 * (received.startswith(b"\r\n") + received.startswith(b"\r\n\r\n"))  # empty lines: section 2.2
    data, end, _ = received[begin : begin + LIMITS["head"]].partition(b"\r\n\r\n")
    lines = data.decode("latin-1").split("\r\n")
    rest = "" if end else lines.pop().removesuffix("\r")
    if not lines:
        _check_start(rest)
        return None
    start = parse_request_line(lines[0])
    fields = [parse_field(line) for line in lines[1 : 1 + LIMITS["fields"] + 1]]
    if len(fields) > LIMITS["fields"]:
        raise Refused("headers_too_large", f"The head must have at most {LIMITS['fields']} fields.")
    if end:
        return _make_head(begin + len(data) + len(end), *start, fields)
    _check_characters(rest)
    if len(data) == LIMITS["head"]:
        raise Refused("headers_too_large", f"The head must have at most {LIMITS['head'] >> 10} KiB.")
    return None


def is_undecided(received: bytes | bytearray, known: int) -> bool:
    """Whether parse_head() has nothing new to say of a head whose first `known` bytes it has seen. To ask it after each
    byte of one that drips would take seconds."""
    new_limit = any(known < limit + skipped <= len(received) for limit in HEAD_LIMITS for skipped in (0, 2, 4))
    return not new_limit and not CONTROL_BYTES.search(received, max(known - 1, 0))  # a CR may have been the last byte


def _check_characters(line: str) -> None:
    if CONTROL.search(line):
        raise Refused("bad_request", "A head has no control characters, and CR and LF only together, to end a line.")


def _check_start(line: str) -> None:
    """Refuse a request line, or the beginning of one, for its characters or its length."""
    longest = LIMITS["request_line"] - len("\r\n")
    _check_characters(line[:longest])
    if len(line) > longest:
        raise Refused("uri_too_long", f"The request line must have at most {LIMITS['request_line'] >> 10} KiB.")


def parse_request_line(line: str) -> tuple[str, str, Target]:
    """Method, version and target (RFC 9112, section 3)."""
    _check_start(line)
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Refused("bad_request", f"A request begins with METHOD TARGET HTTP/1.1, not with {line[:80]!r}.")
    method, target, major, minor = match.groups()
    if major != "1":
        raise Refused("version_not_supported", "This server speaks HTTP/1.1.")
    # Any later 1.x is served as 1.1: RFC 9110, section 2.5.
    return method, "HTTP/1.0" if minor == "0" else "HTTP/1.1", parse_target(method, target)


def parse_target(method: str, target: str) -> Target:
    """RFC 9112, section 3.2."""
    if (method, target) == ("OPTIONS", "*") or (method == "CONNECT" and host_name(target)):
        return Target(None, "*", "")
    match = TARGET.fullmatch(target)
    if not match or not (match[1] or match[2]) or not TARGET_CHARACTERS.fullmatch(target):
        raise Refused("bad_request", f"A target is /PATH or http://HOST/PATH, in ASCII and without #, which "
                                     f"{target[:80]!r} is not.")
    if match[1] is not None and not host_name(match[1]):
        raise Refused("bad_request", "The host in the target is no name or address.")
    return Target(match[1], match[2] or "/", match[3] or "")


def parse_field(line: str) -> tuple[str, str]:
    """Name, in lower case, and value (RFC 9112, section 5)."""
    _check_characters(line)
    if not (match := FIELD.fullmatch(line)):
        raise Refused("bad_request", f"A field is NAME: VALUE on one line, which {line[:80]!r} is not.")
    return match[1].lower(), match[2].strip(" \t")


def _make_head(size: int, method: str, version: str, target: Target, fields: list[tuple[str, str]]) -> Head:
    headers: dict[str, str] = {}
    for name, value in fields:
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    host = parse_host(version, headers.get("host"))
    codings, length = parse_framing(version, headers)
    return Head(size, method, target.path, target.query, version, headers, target.host or host, codings, length)


def parse_host(version: str, host: str | None) -> str:
    """RFC 9112, section 3.2: one Host, which can be read. Empty where an HTTP/1.0 client sends none."""
    if host is None and version == "HTTP/1.0":
        return ""
    if not host or not host_name(host):  # two of them are joined by a comma and a space
        raise Refused("bad_request", "Send one Host field, with a name or an address and perhaps a port.")
    return host


def parse_framing(version: str, headers: dict[str, str]) -> tuple[list[str], int]:
    """Transfer codings and length of the body (RFC 9112, section 6). What could be read in two ways is refused."""
    codings, length = elements(headers.get("transfer-encoding", "")), headers.get("content-length", "0")
    if "transfer-encoding" in headers and (version == "HTTP/1.0" or "content-length" in headers
                                           or codings.count("chunked") != 1 or codings[-1] != "chunked"):
        raise Refused("bad_request", "Send the body with one Content-Length and without Transfer-Encoding.")
    if not re.fullmatch("[0-9]+", length):
        raise Refused("bad_request", "Send one Content-Length, a number in digits.")
    return codings, int(length.lstrip("0")[:18] or "0")  # more digits would be far too many, too


def check_body_head(route: Route | None, head: Head, curl: str) -> None:
    """What the head tells of a body that this server does not read. Raises Refused."""
    if len(head.codings) > 1:
        raise Refused("not_implemented", f"This server knows no {head.codings[0][:80]}. Send the body as it is.")
    if head.codings:
        raise Refused("length_required", "Send the body with Content-Length, not in transfer chunks.")
    if head.length > LIMITS["body"]:
        raise Refused("payload_too_large", f"The body must have at most {LIMITS['body']:,} bytes.")
    if route and route.body is not None:
        check_media_type(head.headers.get("content-type", ""), curl)


@lru_cache(maxsize=64)
def is_loopback(name: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def check_host(head: Head, settings: Settings) -> None:
    """Without a token, only a loopback Host or an allowed one. (A page may bind its own name to this machine's address,
    and would then share an origin with this server. An HTTP/1.0 client without Host is no browser.) Raises Refused."""
    name = host_name(head.host)
    if settings.token or not head.host or is_loopback(name) or name in map(host_name, settings.allow_host):
        return
    raise Refused("forbidden_host", f"This server does not answer to {name[:200]}. If it is meant to, start it with "
                                    "--allow-host and this name.")


def foreign_origin(head: Head) -> str | None:
    """The origin of a page that asks and is not this server's own. Behind a proxy that is an https one."""
    origin = head.headers.get("origin")
    scheme, _, host = (origin or "").lower().partition("://")
    is_own = bool(host) and scheme in DEFAULT_PORTS and head.host.lower() in (host, host + DEFAULT_PORTS[scheme])
    return None if is_own else origin


def check_origin(head: Head, settings: Settings) -> None:
    """Only allowed pages of other origins. (A plain GET comes without Origin; its answer such a page can't read.)
    Raises Refused."""
    origin = foreign_origin(head)
    if origin is not None and origin.lower() not in map(str.lower, settings.allow_origin):
        raise Refused("forbidden_origin", "A page of another origin asks. If it may, start the server with "
                                          "--allow-origin and its origin.")


def cors_fields(head: Head) -> dict[str, str]:
    """What lets an allowed page of another origin read the answer (the Fetch standard, section 3.3)."""
    origin = foreign_origin(head)
    if origin is None:
        return {}
    return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": "Retry-After", "Vary": "Origin"}


def check_token(head: Head, settings: Settings) -> None:
    """With a token, only who has it, but for OPTIONS and what is PUBLIC (RFC 6750, section 2.1). Raises Refused."""
    if not settings.token or head.path in PUBLIC or head.method == "OPTIONS":
        return
    scheme, _, token = head.headers.get("authorization", "").partition(" ")
    known = compare_digest(token.strip(" ").encode(), settings.token.encode())  # in constant time
    if scheme.lower() != "bearer" or not known:
        raise Refused("unauthorized", "Send the header Authorization: Bearer TOKEN, with this server's token.")


Paths = dict[re.Pattern, dict[str, Route]]  # path: {method: route}


def make_paths(routes: Iterable[Route]) -> Paths:
    """In the order of the routes: /sessions/new stands before /sessions/{session_id}. "*" has every method."""
    paths: Paths = {}
    for route in routes:
        methods = paths.setdefault(re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(route.path))), {})
        methods[route.method] = route
        if route.method == "GET":
            methods["HEAD"] = route
    paths[re.compile(r"\*")] = {method: route for methods in paths.values() for method, route in methods.items()}
    return paths


def find_route(paths: Paths, method: str, path: str) -> tuple[Route | None, dict[str, str], str]:
    """The route (None for OPTIONS), the path's parameters, and what the path allows."""
    match = next((match for pattern in paths if (match := pattern.fullmatch(path))), None)
    if not match:
        raise Refused("not_found", f"There is nothing at {path[:200]}. GET / lists the endpoints.")
    routes = paths[match.re]
    allow = ", ".join([*routes, "OPTIONS"])
    if method not in METHODS:
        raise Refused("not_implemented", f"HTTP defines no such method. This path takes {allow}.")
    if method not in routes and method != "OPTIONS":
        raise Refused("method_not_allowed", f"This path takes {allow}.", allow)
    return routes.get(method), {name: unquote(value) for name, value in match.groupdict().items()}, allow


def check_media_type(value: str, curl: str) -> None:
    """curl -d says application/x-www-form-urlencoded unless told otherwise, and many clients say nothing."""
    media_type = value.partition(";")[0].strip(" \t").lower()
    if value and media_type not in ("application/json", "application/x-www-form-urlencoded"):
        raise Refused("unsupported_media_type", f"Send JSON: {curl}/chat/stream -N "
                      "-H 'Content-Type: application/json' -d '{\"message\":\"Hello\"}'")


def parse_body(route: Route, body: bytes) -> dict[str, Any]:
    """The fields of a request's body. Where all of them are optional, so is the body."""
    if route.body is None or not (body or route.needs_body):
        return {}
    return parse_json(body)


def parse_json(body: bytes) -> dict[str, Any]:
    """The body as a JSON object (RFC 8259). Python's reader takes NaN and endless numbers too; its writer tells."""
    try:
        value = json.loads(body.decode())
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_json", f"The body is no JSON that this server reads: {str(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise Refused("invalid_field", 'The body must be a JSON object, such as {"message":"Hello"}.')
    return value


def check_id(fields: dict[str, Any], name: str, pattern: re.Pattern = ID) -> str | None:
    """An optional name among the fields; null is as good as none. Raises Refused: invalid_field."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise Refused("invalid_field", f"{name} must be a string of the form {pattern.pattern}.")
    if (name, value) == ("session_id", "new"):
        raise Refused("invalid_field", "session_id must not be new: /sessions/new is an endpoint.")
    return value


def check_session_id(request: Request) -> str | None:
    """The session that a POST means: where its path names one, its body may only repeat that. Raises Refused."""
    named, session_id = check_id(request.params, "session_id"), check_id(request.fields, "session_id")
    if named and session_id not in (None, named):
        raise Refused("invalid_field", f"The path names the session {named}, the body {session_id}. POST it to "
                                       f"/sessions/{session_id}/stream, or leave session_id out of the body.")
    return named or session_id


def check_message(fields: dict[str, Any]) -> str:
    """The message, as it was sent. Raises Refused: invalid_field."""
    message = fields.get("message")
    if not isinstance(message, str) or not message.strip():
        raise Refused("invalid_field", "message must be a string that is not blank.")
    if len(message) > LIMITS["message"]:
        raise Refused("invalid_field", f"message must have at most {LIMITS['message']:,} characters.")
    if re.search("[\ud800-\udfff]", message):
        raise Refused("invalid_field", "message must not have lone surrogates: it could not be written as UTF-8.")
    return message


def parse_after(query: str) -> int:
    """The `after` of a query string, 0 where there is none. Raises Refused: invalid_field."""
    values = parse_qs(query, keep_blank_values=True).get("after", ["0"])
    if len(values) > 1 or not AFTER.fullmatch(values[0]):
        raise Refused("invalid_field", "after must be a number of 1 to 9 digits: the last chunk that you have.")
    return int(values[0])


# ---- console: banner, boxes and log lines. It knows nothing but what it is told. -------------------------------------

UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")
WIDTH = 62  # columns inside a box


def escape(text: str) -> str:
    """Text from outside, fit for a terminal and one line: control, bidi and line separator characters as escapes."""
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
    if columns(text) > width:
        while columns(text) > width - 3:
            text = text[:-1]
        text += "..."
    return text + " " * (width - columns(text))


def shorten(text: str, width: int) -> str:
    """The text in at most `width` columns."""
    return fit(text[: width + 1], width).rstrip()


def box(title: str, rows: dict[str, Any]) -> str:
    """A box of lines with a title in its upper edge."""
    head = f"┌─ {title} "
    lines = [f"│ {fit(f'{name}: {value}', WIDTH - 1)}│" for name, value in rows.items()]
    return "\n".join([head + "─" * (WIDTH + 1 - columns(head)) + "┐", *lines, "└" + "─" * WIDTH + "┘"])


def banner(rows: dict[str, Any]) -> str:
    """What stands above all when a server starts at a terminal."""
    title = "📡 STREAMABLE HTTP CHAT SERVER 📡"
    left = (WIDTH - columns(title)) // 2
    lines = [f"║{fit(' ' * left + title, WIDTH)}║", "╠" + "═" * WIDTH + "╣"]
    lines += [f"║  {fit(f'{name}: {value}', WIDTH - 2)}║" for name, value in rows.items()]
    return "\n".join(["╔" + "═" * WIDTH + "╗", *lines, "╚" + "═" * WIDTH + "╝"])


class Console:
    """Writes what happens: boxes for a person at a terminal, else a line of key=value for each event.

    A thread of its own does the writing, so that a terminal which takes nothing (a full pipe, Ctrl-S) holds back no
    turn: past LIMITS["console"] waiting lines the rest is dropped.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.pretty = mode == "full" and sys.stdout is not None and sys.stdout.isatty()
        self.colour = self.pretty and not os.environ.get("NO_COLOR")
        if self.colour and os.name == "nt":
            os.system("")  # makes a Windows console read escape sequences
        self.errors: deque[dict[str, Any]] = deque(maxlen=20)
        self.queue: Queue[tuple[Any, str] | None] = Queue(LIMITS["console"])
        self.writer = threading.Thread(target=self._write, name="console", daemon=True)
        self.writer.start()

    def print(self, text: str, stream: Any = None) -> None:
        """Queue a text for standard output (or `stream`)."""
        with suppress(Full):
            self.queue.put_nowait((stream or sys.stdout, text))

    def _write(self) -> None:
        while item := self.queue.get():
            stream, text = item
            with suppress(OSError):  # nobody reads it any more
                print(f"{text}\n", end="", file=stream, flush=True)  # in one write, if others write there too

    def close(self) -> None:
        """Return when all is written, or after a second."""
        with suppress(Full):
            self.queue.put(None, timeout=1)
            self.writer.join(1)

    def log(self, event: str, at: int | None = None, **fields: Any) -> None:
        """Log an event, at a moment of wall_clock() (default: now); in the mode `brief` without texts."""
        at = at or wall_clock()
        if "error" in fields:
            self.errors.append({"timestamp": stamp(at), "event": event, **fields})
        if self.mode == "off":
            return
        if self.mode == "brief":
            fields = {name: value for name, value in fields.items() if name not in ("message", "detail")}
        self.print(self._pretty(event, at, fields) if self.pretty else self._plain(event, at, fields))

    def crash(self, error: BaseException) -> None:
        """Log what should not have happened, with its traceback, on standard error, whatever the mode."""
        lines = "".join(traceback.format_exception(error)).splitlines()
        self.errors.append({"timestamp": stamp(wall_clock()), "event": "crash", "error": lines[-1]})
        self.print("\n".join(map(escape, lines)), sys.stderr)

    def trouble(self, error: DatabaseError, **fields: Any) -> None:
        """Log what somebody must mend, on standard error, whatever the mode."""
        fields, now = {**fields, "error": str(error)}, wall_clock()
        self.errors.append({"timestamp": stamp(now), "event": "database_failed", **fields})
        self.print(self._plain("database_failed", now, fields), sys.stderr)

    def _plain(self, event: str, at: int, fields: dict[str, Any]) -> str:
        return f"{stamp(at)} {event} {_words(fields)}"

    def _pretty(self, event: str, at: int, fields: dict[str, Any]) -> str:
        words = _words(fields)
        fields = {name: escape(str(value)) for name, value in fields.items()}
        if event == "chunk":
            return f"📡 [{_local(at)}] Chunk #{fields['number']}: \"{shorten(fields['text'], 60)}\""
        if event == "stream_started":
            return self._paint("36", "\n" + box(f"📡 HTTP STREAM STARTED [{_local(at)}]", {
                "Client IP": fields["client"],
                "Session": shorten(fields["session"], 11),
                "Message": f'"{shorten(fields["message"], WIDTH - 14)}"',
                "Active Streams": fields["active"],
                "Transfer-Encoding": "chunked",
            }))
        if event == "stream_ended":
            failed, status = "error" in fields, fields["status"]
            title = "FAILED" if failed else "STOPPED" if status == "cancelled" else "COMPLETED"
            more = f"\n{fields['detail']}" if failed else ""
            return self._paint("31" if failed else "32", box(f"📡 HTTP STREAM {title} [{_local(at)}]", {
                "Session": shorten(fields["session"], 11),
                "Total Chunks": fields["chunks"],
                "Total Time": f"{float(fields['seconds']):.3f}s",
                "Active Streams": fields["active"],
                "Status": f"FAILED ({fields['error']})" if failed else {"cancelled": "STOPPED"}.get(status, "SUCCESS"),
            }) + more) + "\n"
        return self._paint("2", f"[{_local(at)}] {event.replace('_', ' ')} {words}")

    def _paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour else text


def _local(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6).strftime("%H:%M:%S.%f")[:-3]


def _words(fields: dict[str, Any]) -> str:
    return " ".join(f"{name}={_word(value)}" for name, value in fields.items())


def _word(value: Any) -> str:
    """A value for a log line: bare where it is one plain word, else in quotes and with escapes, and not too long."""
    text = str(value)
    if len(text) > LIMITS["log_text"]:
        text = text[: LIMITS["log_text"]] + "..."
    return text if re.fullmatch(r"[\w.:/+-]+", text, re.ASCII) else escape(json.dumps(text, ensure_ascii=False))


# ---- endpoints: one small function a route; request in, reply or stream out. They know no sockets. -------------------


class Reply(NamedTuple):
    """An answer whose length is known."""

    status: int
    headers: dict[str, str] = {}
    body: bytes = b""


class Stream(NamedTuple):
    """An answer that follows a turn, without chunks 1 to `after`."""

    turn: Turn
    after: int = 0


def reply_json(body: dict[str, Any]) -> Reply:
    """200 with a JSON object."""
    return Reply(200, {"Content-Type": "application/json"}, json.dumps(body).encode() + b"\n")


def problem(refused: Refused) -> Reply:
    """RFC 9457, problem details."""
    status = refused.status
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": refused.detail,
            "code": refused.code}
    headers = {"Content-Type": "application/problem+json"}
    if refused.allow:
        headers["Allow"] = refused.allow
    if refused.code == "overloaded":
        headers["Retry-After"] = str(LIMITS["retry_after"])
    if refused.code == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    return Reply(status, headers, json.dumps(body).encode() + b"\n")


def content_security_policy(html: str) -> str:
    """CSP Level 3: the page's own script and style run, by their hash, and reach this server alone.

    With trusted types, no string becomes HTML or script in it.
    """
    own = {tag: b64encode(hashlib.sha256(text.encode()).digest()).decode()
           for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", html, re.DOTALL)}
    sources = [f"{tag}-src 'sha256-{digest}'" for tag, digest in own.items()]
    return "; ".join([
        "default-src 'none'", *sources, "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'",
        "frame-ancestors 'none'", "require-trusted-types-for 'script'", "trusted-types 'none'"])


def reply_cached(request: Request, reply: Reply) -> Reply:
    """RFC 9110, section 13.1.2: 304 for who has these bytes already."""
    etag = f'"{hashlib.sha256(reply.body).hexdigest()[:16]}"'
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    caching = {"ETag": etag, "Cache-Control": "no-cache"}
    if etag in known or "*" in known:
        return Reply(304, caching)
    return reply._replace(headers={**reply.headers, **caching})


class Endpoints:
    """The functions that ROUTES names."""

    def __init__(self, settings: Settings, sessions: Sessions, console: Console) -> None:
        self.settings, self.sessions, self.console = settings, sessions, console
        self.routes = [route for route in ROUTES if settings.debug or route.name != "debug"]
        self.paths = make_paths(self.routes)

    def chat_stream(self, request: Request) -> Stream:
        message, session_id = check_message(request.fields), check_session_id(request)
        turn_id = check_id(request.fields, "turn_id")
        if turn_id and not session_id:
            raise Refused("invalid_field", "turn_id needs a session_id: it names a turn of one session.")
        try:
            return Stream(self.sessions.begin(message, session_id or new_id(), turn_id, request.client))
        except Refused as refused:
            if refused.code == "session_busy":
                refused.detail += f" This stops it: {request.curl}/sessions/{session_id}/stop -X POST"
            raise

    session_stream = chat_stream

    def new_session(self, request: Request) -> Reply:
        session_id, model = check_id(request.fields, "session_id"), check_id(request.fields, "model_id", MODEL_ID)
        if model and (trouble := model_problem(model)):
            raise Refused("invalid_field", trouble)
        session = self.sessions.create(session_id or new_id(), model or self.settings.model)
        return reply_json({"session_id": session.session_id, "model": session.model,
                           "timestamp": stamp(session.created_at)})

    def list_sessions(self, request: Request) -> Reply:
        sessions = sorted(self.sessions.all(), key=lambda session: session.last_activity, reverse=True)
        return reply_json({"active_sessions": len(sessions), "sessions": [each.summary() for each in sessions]})

    def get_session(self, request: Request) -> Reply:
        with self.sessions.locked(request.params["session_id"]) as session:
            details = session.details()
        return reply_json(details)

    def delete_session(self, request: Request) -> Reply:
        self.sessions.delete(request.params["session_id"])
        return reply_json({"message": "The session is deleted."})

    def resume_stream(self, request: Request) -> Stream:
        after, session = parse_after(request.query), self.sessions.get(request.params["session_id"])
        if not (turn := session.latest):
            raise Refused("no_turn", "No log is kept of a turn in this session. GET the session for its history.")
        return Stream(turn, after)

    def stop_turn(self, request: Request) -> Reply:
        stopped = self.sessions.stop(request.params["session_id"], check_id(request.fields, "turn_id"))
        return reply_json({"message": "The turn is stopped." if stopped else "No such turn was running.",
                           "stopped": stopped})

    def clear_session(self, request: Request) -> Reply:
        self.sessions.clear(request.params["session_id"])
        return reply_json({"message": "The session's history is cleared."})

    def _health(self) -> dict[str, Any]:
        counters = self.sessions.counters
        return {"status": "healthy", "model": self.settings.model,
                "uptime_seconds": (clock() - counters.started) // 1_000_000, **counters.totals(),
                "active_sessions": len(self.sessions)}

    def health(self, request: Request) -> Reply:
        return reply_json(self._health())

    def stats(self, request: Request) -> Reply:
        counters = self.sessions.counters
        with counters.lock:
            return reply_json({**self._health(), "start_time": stamp(counters.start_time), **counters.averages(),
                               "streams": counters.streams(), "framework": FRAMEWORK})

    def index(self, request: Request) -> Reply:
        return reply_json({
            "name": "streamable HTTP chat", "version": VERSION, "framework": FRAMEWORK, "model": self.settings.model,
            "features": FEATURES if self.settings.db is None else [*FEATURES, "sessions on disk"],
            "endpoints": {route.name: f"{route.method} {route.path}" for route in self.routes},
        })

    def openapi(self, request: Request) -> Reply:
        return reply_cached(request, reply_json(describe(self.routes)))

    def demo(self, request: Request) -> Reply:
        if not PAGE.is_file():
            raise Refused("not_found", "The page is the file demo.html, and it is not beside streamchat_server.py.")
        html = PAGE.read_text("utf-8")  # newlines as browsers hash them, also where a checkout made them CRLF
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": content_security_policy(html)}
        return reply_cached(request, Reply(200, headers, html.encode()))

    docs = demo

    def debug(self, request: Request) -> Reply:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        threads = [f"{names.get(ident, 'connection')}: {frame.f_code.co_qualname}, line {frame.f_lineno}"
                   for ident, frame in sys._current_frames().items()]
        return reply_json({"threads": threads, "running_turns": self.sessions.counters.streams(), "limits": LIMITS,
                           "last_errors": list(self.console.errors)})


def describe(routes: list[Route]) -> dict[str, Any]:
    """ROUTES and EVENTS as OpenAPI 3.2, where `itemSchema` describes one line of a stream."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    schemas = {kind: _object(f"type {fields}", type={"const": kind}) for kind, fields in EVENTS.items()}
    event = {"oneOf": [{"$ref": f"#/components/schemas/{kind}"} for kind in EVENTS],
             "discriminator": {"propertyName": "type"}}
    return {
        "openapi": "3.2.0",
        "info": {"title": "Streamable HTTP chat", "version": VERSION},
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {**schemas, "event": event, "problem": _object(
                "type title status detail code", type=TEXT, title=TEXT, status=COUNT, detail=TEXT,
                code={"enum": [*ERRORS]})},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    inputs = [(name, "path") for name in re.findall(r"\{(\w+)\}", route.path)]
    inputs += [(name, "query") for name in route.query.split()]
    operation: dict[str, Any] = {"operationId": route.name, "summary": route.summary, "tags": [route.tag]}
    if not route.public:
        operation["security"] = [{"token": []}, {}]  # {}: a server without a token asks for none
    operation["parameters"] = [
        {"name": name, "in": place, "required": place == "path", "schema": FIELDS[name]} for name, place in inputs
    ]
    if route.body is not None:
        optional = [name.rstrip("?") for name in route.body.split() if name.endswith("?")]
        nullable = {name: {**FIELDS[name], "type": ["string", "null"]} for name in optional}
        content = {"application/json": {"schema": _object(route.body, message=SAID, **nullable)}}
        operation["requestBody"] = {"required": route.needs_body, "content": content}
    operation["responses"] = {"200": {"description": route.summary, "content": _content(route)}, **_refusals(route)}
    return operation


def _content(route: Route) -> dict[str, Any]:
    if route.answer == STREAM:
        return {"application/x-ndjson": {"itemSchema": {"$ref": "#/components/schemas/event"}}}
    if "/" in route.answer:
        return {route.answer: {}}
    return {"application/json": {"schema": _object(route.answer)}}


def _refusals(route: Route) -> dict[str, Any]:
    codes = [*route.errors.split(), "bad_request", "forbidden_host", "forbidden_origin", "request_timeout",
             "length_required", "payload_too_large", "uri_too_long", "headers_too_large", "internal_error",
             "not_implemented", "overloaded", "version_not_supported"]
    if not route.public:
        codes.append("unauthorized")
    if route.body is not None:
        codes += ["invalid_json", "invalid_field", "unsupported_media_type"]
    answers: dict[str, Any] = {}
    for code in dict.fromkeys(codes):
        answer = answers.setdefault(str(ERRORS[code]), {"description": "", "content": {
            "application/problem+json": {"schema": {"$ref": "#/components/schemas/problem"}}}})
        answer["description"] += f", {code}" if answer["description"] else code
    return answers


def _object(fields: str, **schemas: Any) -> dict[str, Any]:
    names = fields.split()
    return {
        "type": "object",
        "properties": {name: schemas.get(name) or _field(name) for name in (each.rstrip("?") for each in names)},
        "required": [name for name in names if not name.endswith("?")],
    }


def _field(name: str) -> dict[str, Any]:
    schema = FIELDS[name]
    if name not in SHAPES:
        return schema
    shape = _object(SHAPES[name])
    return {**schema, "items": shape} if schema["type"] == "array" else {**shape, **schema}


# ---- handler and server: read, check, route, write. The only room that touches a socket; it knows no histories. -----

STREAM_HEADERS = {"Content-Type": "application/x-ndjson", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def socket_timeout(seconds: float) -> bytes:
    """A value for SO_RCVTIMEO and SO_SNDTIMEO. They are the kernel's: settimeout() would add a poll() to each call."""
    microseconds = max(int(seconds * 1e6), 1000)  # 0 would be for ever
    if os.name == "nt":
        return struct.pack("L", microseconds // 1000)
    return struct.pack("ll", *divmod(microseconds, 1_000_000))


def response_head(status: int, headers: dict[str, str], closing: bool) -> bytes:
    """Status line and fields (RFC 9112, section 4)."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Date: {_date(int(time.time()))}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += ["X-Content-Type-Options: nosniff", f"Connection: {'close' if closing else 'keep-alive'}", "", ""]
    return "\r\n".join(lines).encode("latin-1")


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


def encode_reply(reply: Reply, closing: bool, head_only: bool = False) -> bytes:
    """A reply as it is sent; to HEAD only its head, with the length that GET would have (RFC 9110, section 9.3.2)."""
    length = {} if reply.status in (204, 304) else {"Content-Length": str(len(reply.body))}
    head = response_head(reply.status, {**reply.headers, **length}, closing)
    return head if head_only else head + reply.body


class Handler(BaseRequestHandler):
    """One connection: requests in order, each answered by a reply, a stream or a problem."""

    server: Server
    request: socket.socket

    def setup(self) -> None:
        self.received = bytearray()  # and not read as a request yet
        self.patience = 0.0  # seconds, as the socket has been told
        self.head: Head | None = None  # of the request that is being served
        self.cors: dict[str, str] = {}  # fields of its answer
        self.unread = self.closing = False

    def handle(self) -> None:
        try:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, socket_timeout(1))
            while not self.closing:
                self.serve_request()
                self.server.idle.add(self.request)
        except OSError as error:  # the peer left, or took nothing for too long
            self.server.console.log("client_left", client=self.client_address[0], reason=type(error).__name__)

    def serve_request(self) -> None:
        """Read one request and answer it."""
        self.head, self.cors, self.unread = None, {}, False
        answer = self.respond()
        # What follows an unread body, or a head that can't be read, is no request.
        self.closing = self.unread or self.head is None or self.head.closes
        if isinstance(answer, Stream):
            self.write_stream(answer)
        elif answer:
            self.write_reply(answer)
        if answer and self.closing:
            self.linger()

    def respond(self) -> Reply | Stream | None:
        """The answer to the next request; None where there is none."""
        try:
            self.head = head = self.read_head()
            return head and self.answer(head)
        except Refused as refused:
            self.unread = self.unread or self.head is None
            self.server.console.log("refused", client=self.client_address[0], status=refused.status, code=refused.code,
                                    request=self.request_line()[:100])
            return problem(refused)
        except DatabaseError as error:
            self.server.console.trouble(error, request=self.request_line()[:100])
            return problem(Refused("internal_error", STREAM_ERRORS["internal_error"][1]))
        except OSError:
            raise
        except Exception as error:
            self.server.console.crash(error)
            return problem(Refused("internal_error", STREAM_ERRORS["internal_error"][1]))

    def answer(self, head: Head) -> Reply | Stream:
        settings = self.server.settings
        self.unread = head.has_body
        check_host(head, settings)
        check_origin(head, settings)
        self.cors = cors_fields(head)
        check_token(head, settings)
        route, params, allow = find_route(self.server.endpoints.paths, head.method, head.path)
        curl = self.curl(head)
        check_body_head(route, head, curl)
        body = self.read_body(head)
        if route is None:
            return self.options(allow)
        request = Request(params, head.query, head.headers, self.client_address[0], curl, parse_body(route, body))
        return self.call(route, request)

    def request_line(self) -> str:
        """What was asked, for the log: no query or fields, which may hold a secret, and nothing that may be a body."""
        if self.head:
            return f"{self.head.method} {self.head.path}"
        match = re.match(rf"[\r\n]*({NAME} /[^\r\n ?]*)(?:\?[^\r\n ]*)? HTTP/", self.received.decode("latin-1"))
        return match[1] if match else "no request"

    def call(self, route: Route, request: Request) -> Reply | Stream:
        """What the endpoint answers."""
        try:
            return getattr(self.server.endpoints, route.name)(request)
        except OSError as error:  # of a file: any other tells that the peer has left
            raise RuntimeError(f"{route.name} failed") from error

    def options(self, allow: str) -> Reply:
        """Also the answer to a preflight, where a page of another origin is allowed."""
        preflight = {"Access-Control-Allow-Methods": allow, "Access-Control-Max-Age": "600",
                     "Access-Control-Allow-Headers": "Authorization, Content-Type"}
        return Reply(204, {"Allow": allow, **(preflight if self.cors else {})})

    def read_head(self) -> Head | None:
        """The next head; None where the connection ends, or stays idle for too long. Raises Refused."""
        if not self.wait_for_head():
            return None
        self.server.idle.discard(self.request)
        end = time.monotonic() + LIMITS["head_time"]
        while not (head := parse_head(self.received)):
            known = len(self.received)
            self.receive_more("head", end)
            while is_undecided(self.received, known):
                self.receive_more("head", end)
        del self.received[: head.size]
        return head

    def wait_for_head(self) -> bool:
        """Whether its first byte came. Empty lines before it are none, so their time is idle, too."""
        wait: float = LIMITS["idle"]
        end = time.monotonic() + wait
        with suppress(TimeoutError):
            while not self.received.strip(b"\r\n"):
                parse_head(self.received)  # raises Refused where they are too many
                if not self.receive(wait):
                    return False
                wait = end - time.monotonic()
            return True
        return False

    def read_body(self, head: Head) -> bytes:
        """The whole body (RFC 9112, section 6). Raises Refused."""
        if head.expects_continue:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        end = time.monotonic() + LIMITS["body_time"]
        while len(self.received) < head.length:
            self.receive_more("body", end)
        body = bytes(self.received[: head.length])
        del self.received[: head.length]
        self.unread = False
        return body

    def receive_more(self, part: str, end: float) -> None:
        """Wait for more of the head or the body, until a moment of time.monotonic(). Raises Refused."""
        try:
            if not self.receive(end - time.monotonic()):
                raise Refused("bad_request", f"The connection ended within the {part}.")
        except TimeoutError:
            raise Refused("request_timeout", f"The whole {part} must come within {LIMITS[f'{part}_time']} s.") from None

    def receive(self, seconds: float) -> bool:
        """Wait for bytes; False at the end of the connection. Raises TimeoutError."""
        if seconds <= 0:
            raise TimeoutError
        if seconds != self.patience:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, socket_timeout(seconds))
            self.patience = seconds
        try:
            data = self.request.recv(65536)
        except BlockingIOError:  # what the time-out looks like; Windows says TimeoutError
            raise TimeoutError from None
        self.received += data
        return bool(data)

    def curl(self, head: Head) -> str:
        """How a curl line for this client begins. A Host that is no plain name is not repeated."""
        plain = re.fullmatch(r"[A-Za-z0-9.:\[\]-]+", head.host)
        token = '-H "Authorization: Bearer $STREAMCHAT_TOKEN" ' if self.server.settings.token else ""
        return f"curl {token}{f'http://{head.host}' if plain else self.server.url}"

    def write_reply(self, reply: Reply) -> None:
        head_only = self.head.method == "HEAD" if self.head else self.received.lstrip(b"\r\n").startswith(b"HEAD")
        self.send(encode_reply(reply._replace(headers=reply.headers | self.cors), self.closing, head_only))

    def write_stream(self, stream: Stream) -> None:
        """Send a turn's lines as they may be read, each line a transfer chunk, all that are ready at once."""
        assert self.head
        chunked = self.head.version != "HTTP/1.0"
        coding = {"Transfer-Encoding": "chunked"} if chunked else {}
        head = response_head(200, STREAM_HEADERS | coding | self.cors, self.closing)
        if self.head.method == "HEAD":
            self.send(head)
            return
        follow = stream.turn.follow(stream.after, self.server.settings.heartbeat)
        with self.server.sessions.counters.reading(), closing(follow):
            for lines in follow:
                lines = lines or [encode(type="ping", timestamp=stamp(wall_clock()))]
                data = b"".join(map(transfer_chunk, lines) if chunked else lines)
                end = LAST_TRANSFER_CHUNK if chunked and lines[-1] is stream.turn.terminal else b""
                self.send(head + data + end)
                head = b""

    def send(self, data: bytes) -> None:
        """Send it all. Raises TimeoutError when the peer takes nothing for LIMITS["send"] seconds, however it began."""
        rest, progress = memoryview(data), time.monotonic()
        while rest:
            try:
                rest = rest[self.request.send(rest) :]
                progress = time.monotonic()
            except (BlockingIOError, TimeoutError):  # a second is over
                if time.monotonic() - progress >= LIMITS["send"]:
                    raise TimeoutError("the peer takes nothing") from None

    def linger(self) -> None:
        """Read on for a moment: a close with unread bytes resets the connection, and the answer is lost on its way
        (RFC 9112, section 9.6)."""
        self.request.shutdown(socket.SHUT_WR)
        end = time.monotonic() + LIMITS["linger"]
        with suppress(TimeoutError):
            while self.receive(end - time.monotonic()):
                self.received.clear()


class Server(ThreadingHTTPServer):
    """A server that is bound and listens; `serve_forever()` serves."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, settings: Settings) -> None:
        """Raises DatabaseError."""
        self.settings, self.closed = settings, threading.Event()
        self.database = None if settings.db is None else Database(settings.db)
        self.connections: set[socket.socket] = set()
        self.idle: set[socket.socket] = set()  # those that wait for another request
        self.turned_away: deque[tuple[float, socket.socket]] = deque()  # when, and what is to be closed
        super().__init__(listening.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()  # the one that it made
        self.socket = listening
        self.console = Console(settings.log)
        self.sessions = Sessions(settings, self.console, load_model, self.database)
        self.endpoints = Endpoints(settings, self.sessions, self.console)

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # no file descriptor is left: to try again at once would take all of the processor
            time.sleep(0.05)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, without waiting until it runs, as Thread.start() does."""
        if len(self.connections) >= self.settings.max_connections:
            self.turn_away(request)
            return
        self.connections.add(request)
        try:
            _thread.start_new_thread(self.process_request_thread, (request, client_address))
        except RuntimeError:  # the system has no thread left
            self.connections.discard(request)
            self.turn_away(request)

    def turn_away(self, request: socket.socket) -> None:
        """Answer 503, and close a moment later: with unread bytes a close would take the answer back."""
        refused = Refused("overloaded", "The server has as many connections as it can serve. Try again in a moment.")
        request.setblocking(False)
        with suppress(OSError):
            request.send(encode_reply(problem(refused), closing=True))
            request.shutdown(socket.SHUT_WR)
        self.turned_away.append((time.monotonic(), request))

    def service_actions(self) -> None:
        """Close whom turn_away() has answered, soon, and sooner where they are many."""
        while self.turned_away and (len(self.turned_away) > 100
                                    or time.monotonic() - self.turned_away[0][0] >= LIMITS["linger"]):
            request = self.turned_away.popleft()[1]
            with suppress(OSError):
                request.recv(65536)
            request.close()

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        self.idle.discard(request)
        self.close_request(request)  # a shutdown before it would be one more system call

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        threading.Thread(target=self.sessions.sweep_until, args=(self.closed,), name="sweep", daemon=True).start()
        super().serve_forever(poll_interval)

    def close(self) -> None:
        """Accept no connection any more, answer those that were accepted, and then end all turns."""
        self.shutdown()
        self.server_close()
        self.closed.set()
        self._drain()
        self.sessions.close()
        self._drain()
        if self.database:
            self.database.close()

    def _drain(self) -> None:
        """Give requests that were sent a second to be answered, but for streams."""
        end = time.monotonic() + 1
        while len(self.connections - self.idle) > self.sessions.counters.readers and time.monotonic() < end:
            time.sleep(0.01)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if error := sys.exc_info()[1]:
            self.console.crash(error)


# ---- reload: a supervisor has the socket, and a worker at a time serves. Of what that does, only work() knows. -------


class Watch:
    """Notices that a file of the program has changed."""

    def __init__(self) -> None:
        self.seen = self.last = self.look()

    def look(self) -> list[tuple[int, int] | None]:
        return [stat_of(path) for path in (PROGRAM, PAGE)]

    def take_news(self) -> bool:
        """Whether there is a new program, or page, to start. A program that can't be compiled is shown, and is none."""
        now, before = self.look(), self.last
        self.last = now
        if now == self.seen or now != before or not now[0]:  # while a file is written, it changes on
            return False
        self.seen = now
        try:
            compile(PROGRAM.read_bytes(), PROGRAM, "exec")
        except Exception as error:  # SyntaxError; MemoryError where it is nested too deeply
            say("".join(traceback.format_exception_only(error)) + "The server does not start anew with this.")
            return False
        say("A file has changed. The server starts anew.")
        return True


def stat_of(path: Path) -> tuple[int, int] | None:
    """What tells of a change; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def say(text: str) -> None:
    """What the supervisor has to tell."""
    with suppress(OSError):  # nobody reads it any more
        print(text, file=sys.stderr, flush=True)


def supervise(listening: socket.socket, db: str | None) -> int:
    """Serve in a process of its own, and in another one when a file has changed. The socket stays open here, so that
    meanwhile connections wait, and none is refused. The exit status: 2 where the first one cannot start."""
    from multiprocessing import get_context  # not needed without --reload
    from tempfile import TemporaryDirectory

    context, signals, watch, starts = get_context("spawn"), note_signals(), Watch(), 0
    with TemporaryDirectory(prefix="streamchat-") as folder:
        while not signals:
            news = False
            Path(folder).mkdir(0o700, exist_ok=True)  # after days, something may have tidied it away
            try:
                with working(context, listening, f"{folder}/sessions.db" if db is None else db) as worker:
                    while not (signals or news) and worker.is_alive():
                        time.sleep(0.25)
                        news = watch.take_news()
            except OSError as error:  # no memory, no file descriptors, or the working folder is gone
                say(f"The server could not be started: {error}")
                time.sleep(1)
                continue
            starts += 1
            if worker.exitcode == 2 and starts == 1:
                return 2
            if signals or news:
                continue
            broken = bool(worker.exitcode and worker.exitcode > 0)  # else it was killed, or told to end
            say(f"The server ended with status {worker.exitcode}. It starts again{' when a file changes' * broken}.")
            time.sleep(1)
            while broken and not (signals or watch.take_news()):
                time.sleep(0.25)
    return 0


@contextmanager
def ctrl_c_held() -> Iterator[None]:
    """All processes of a terminal get Ctrl-C, but not one that is started in here: it would be cut in the middle of its
    imports. The supervisor gets it a moment later, and tells the worker."""
    if os.name == "nt":
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def working(context: SpawnContext, listening: socket.socket, db: str) -> Iterator[BaseProcess]:
    """A process that serves; at the end of the block it is told to end."""
    asked, ask = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(listening, db, asked))
    with ctrl_c_held():
        worker.start()
    asked.close()
    try:
        yield worker
    finally:
        ask.close()
        worker.join(LIMITS["grace"] + 10)
        worker.kill()  # one that does not look at the pipe, since its program hangs
        worker.join()


def work(listening: socket.socket, db: str, asked: Any) -> None:
    """Serve, in a new process with the program of now, until the supervisor closes its end of a pipe, or is no more."""
    def is_over() -> bool:
        try:
            return asked.poll()
        except OSError:  # how Windows says that the other end is closed
            return True

    *_, settings = read_command_line()
    try:
        server = Server(listening, settings._replace(db=db))
    except DatabaseError as error:
        sys.exit(fail(str(error)))
    serve(server, note_signals(), is_over)


# ---- main ------------------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError, UnicodeError."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if os.name != "nt":  # there it would let two servers share a port
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    listening.listen(1024)  # a burst of connections waits; with socketserver's 5 most of 1,000 would fail
    return listening


def make_server(host: str = "127.0.0.1", port: int = 8000, settings: Settings | None = None) -> Server:
    """A server that listens but does not serve yet, so that with port 0 its `url` is known first. Raises OSError,
    DatabaseError."""
    return Server(listen(host, port), settings or Settings())


def between(kind: type, low: float, high: float, open_low: bool = False) -> Callable[[str], Any]:
    """A type for argparse: a number from `low` (without it, if `open_low`) to `high`."""
    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or (open_low and value == low):
            most = "" if math.isinf(high) else f" and at most {high}"
            least = f"{'more than' if open_low else 'at least'} {low}"
            raise argparse.ArgumentTypeError(f"it must be {least}{most}, and is {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its error
    return parse


def shaped(pattern: str, shape: str) -> Callable[[str], str]:
    """A type for argparse: a text that matches the pattern."""
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text, re.IGNORECASE | re.ASCII):
            raise argparse.ArgumentTypeError(f"it must be {shape}")  # and is not repeated: it may be a secret
        return text

    return parse


def parse_arguments() -> argparse.Namespace:
    """Host, port, and what Settings has. A bad flag ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description="Chat with a language model over plain HTTP/1.1, streamed as newline-delimited JSON.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option, defaults = parser.add_argument, Settings()
    option("--host", default="127.0.0.1", help="address to listen at")
    option("--port", type=between(int, 0, 65535), default=8000, help="0 takes a free one")
    option("--model", metavar="ID", default=choose_model(), help="offline, or the name of a Gemini model")
    option("--chunk-words", metavar="N", type=between(int, 1, math.inf), default=defaults.chunk_words,
           help="words in a chunk at the most")
    option("--chunk-delay", metavar="S", type=between(float, 0, 1_000_000), default=defaults.chunk_delay,
           help="seconds between chunks at the least; 0 turns the pace off")
    option("--resume-window", metavar="S", type=between(float, 0, 1_000_000_000), default=defaults.resume_window,
           help="seconds that a turn goes on without readers, and that a log is kept after its end")
    option("--heartbeat", metavar="S", type=between(float, 0, 15, open_low=True), default=defaults.heartbeat,
           help="seconds of silence after which a reader gets a ping")
    option("--db", metavar="FILE", default=argparse.SUPPRESS,
           help="keep sessions in this file, which is made where there is none")
    option("--reload", action="store_true", default=argparse.SUPPRESS,
           help="start anew, with the same sessions, when the server's file or the page's changes")
    option("--debug", action="store_true", help="serve /debug")
    option("--token", metavar="T", type=shaped(r"[!-~]+", "printable ASCII without spaces"),
           default=os.environ.get("STREAMCHAT_TOKEN") or None,  # in no characters (.0), since --help is no place for it
           help="let in only who sends it as a bearer token (default: STREAMCHAT_TOKEN)%(default).0s")
    option("--allow-host", metavar="H", type=shaped(HOST.pattern, "a host name or address"), action="append",
           default=argparse.SUPPRESS, help="answer to this host name, too; may be repeated")
    option("--allow-origin", metavar="O", type=shaped(f"null|[a-z][a-z0-9+.-]*://{HOST.pattern}", "SCHEME://HOST[:PORT]"),
           action="append", default=argparse.SUPPRESS, help="let pages of this origin in, too; may be repeated")
    option("--max-connections", metavar="N", type=between(int, 1, math.inf), default=defaults.max_connections,
           help="connections at the most; each has a thread")
    option("--log", choices=["full", "brief", "off"], default=defaults.log, help="brief logs no texts")
    return parser.parse_args()


def main() -> int:
    """The exit status: 2 where the server cannot start; after a signal the program ends with 0."""
    host, port, reload, settings = read_command_line()
    if trouble := model_problem(settings.model) or access_problem(host, settings.token):
        return fail(trouble)
    try:
        made = listen(host, port) if reload else make_server(host, port, settings)
    except DatabaseError as error:
        return fail(str(error))
    except (OSError, UnicodeError) as error:
        return fail(f"cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}")
    return serve(made, note_signals()) if isinstance(made, Server) else supervise(made, settings.db)


def read_command_line() -> tuple[str, int, bool, Settings]:
    """Host, port, whether to reload, and the rest, as far as this system allows. A bad flag ends the program with 2."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it is closed
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # where no emoji can be written
    arguments = vars(parse_arguments())
    host, port, reload = arguments.pop("host"), arguments.pop("port"), arguments.pop("reload", False)
    most = allowed_files(2 * arguments["max_connections"] + 100) - 100
    arguments["max_connections"] = min(arguments["max_connections"], max(most, 1))
    return host, port, reload, Settings(**arguments)


def access_problem(host: str, token: str | None) -> str | None:
    """Why this server must not listen at that address, as a sentence, or None."""
    if token or is_loopback(host):
        return None
    return (f"{host or 'every address'} can be reached from other machines: set --token or STREAMCHAT_TOKEN, or use "
            "--host 127.0.0.1.")


def allowed_files(wanted: int) -> int:
    """How many file descriptors there may be, after asking for so many. A connection has one, and one to the model."""
    try:
        from resource import RLIMIT_NOFILE, getrlimit, setrlimit
    except ImportError:  # on Windows, which has no such limit
        return wanted
    soft, hard = getrlimit(RLIMIT_NOFILE)  # negative: no limit
    if 0 <= soft < wanted:
        with suppress(ValueError, OverflowError, OSError):  # macOS allows less than it says
            setrlimit(RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
    soft = getrlimit(RLIMIT_NOFILE)[0]
    return wanted if soft < 0 else min(wanted, soft)


def fail(trouble: str) -> int:
    """One line on standard error, and the exit status."""
    print(f"{Path(sys.argv[0]).name}: error: {escape(trouble)}", file=sys.stderr)
    return 2


def note_signals() -> list[int]:
    """The signals to end, as they come. A handler that only takes a note can do no harm anywhere."""
    signals: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not with nohup
        numbers.append(signal.SIGHUP)  # the terminal was closed
    for number in numbers:
        signal.signal(number, lambda number, frame: signals.append(number))
    return signals


def serve(server: Server, signals: list[int], is_over: Callable[[], bool] = lambda: False) -> NoReturn:
    """Serve, in a thread, until a signal comes, or it is over. Then the program ends here, with 0."""
    sys.setswitchinterval(0.05)  # seconds; with many streams, shorter turns of the interpreter are mostly changes
    greet(server)
    threading.Thread(target=server.serve_forever, name="accept", daemon=True).start()
    while not signals and not is_over():
        time.sleep(0.1)  # short: where another thread takes the signal, a sleep is not cut short by it
    server.close()
    say_goodbye(server)
    server.console.close()
    os._exit(0)  # the interpreter's own exit aborts where the console is stuck, and complains of a closed pipe


def greet(server: Server) -> None:
    """The banner; its last line is the address, in every mode, for programs that wait for it."""
    console, settings = server.console, server.settings
    if console.pretty:
        console.print(banner({
            "Model": settings.model,
            "Framework": FRAMEWORK,
            "Multi-turn": "ENABLED",
            "Streaming": "CHUNKED HTTP",
            **({"Sessions": f"{len(server.sessions)} in {settings.db}"} if settings.db else {}),
            "Status": "READY",
        }))
        console.print(f"Try: curl -N -d '{{\"message\":\"Hello\"}}' {server.url}/chat/stream")
    else:
        console.log("server_started", model=settings.model, framework=FRAMEWORK)
    console.print(f"Serving on {server.url}")


def say_goodbye(server: Server) -> None:
    """The statistics."""
    counters = server.sessions.counters
    totals, averages = counters.totals(), counters.averages()
    if server.console.pretty:
        server.console.print("\n" + box("📊 HTTP STREAMING SERVER STATISTICS", {
            "Server Uptime": timedelta(seconds=(clock() - counters.started) // 1_000_000),
            "Total Requests": totals["total_requests"],
            "Successful": totals["successful_requests"],
            "Failed": totals["failed_requests"],
            "Active Sessions": len(server.sessions),
            "Total Sessions Created": averages["total_sessions_created"],
            "Total Chunks": averages["total_chunks"],
            "Avg Response Time": f"{averages['average_response_time'] or 0:.3f}s",
        }))
    else:
        server.console.log("server_stopped", **totals, **{
            name: averages[name] for name in ("total_sessions_created", "total_chunks", "average_response_time")
        })


if __name__ == "__main__":
    sys.exit(main())
