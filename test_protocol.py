"""The tests of streamable HTTP chat, and a conformance suite for any server that speaks it.

    python -m pytest test_protocol.py
    STREAMCHAT_URL=http://host:port python -m pytest test_protocol.py
    python3 test_protocol.py bench http://host:port
    python3 test_protocol.py proxy --to http://host:port

The first line tests `streamchat_server.py` beside this file: it starts servers of its own, on free ports, each with the
flags that a test needs. The second tests the server at that address, whatever it is written in, at the levels core and
sessions; `-m core`, `-m sessions` or `-m strict` chooses one (README, "Conformance"). Its model should repeat the
user's message as the offline model does, and it should have no other visitors meanwhile, since the counters are tested
too; what needs a server of our own is skipped. The third line measures a server, and the fourth tries a client: it is
a proxy that cuts. They need no pytest.

Read it as the protocol's fine print. The suite trusts no HTTP library and none of the project's other files: it reads
raw sockets with the strict reader below, `check_turn` holds every rule of a stream, and every test that streams goes
through both. The rest is one class for each section of the README, whose tests are sentences of the protocol. The last
class runs small broken servers, on which the reader or `check_turn` must fail.
"""

import argparse
import base64
import bisect
import contextlib
import hashlib
import http.client
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import selectors
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unicodedata
import uuid
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import ascii_letters
from typing import NamedTuple
from urllib.parse import quote, urlsplit

OUTSIDE = os.environ.get("STREAMCHAT_URL")
SERVER = Path(__file__).with_name("streamchat_server.py")
PATIENCE = 20                       # seconds; longer than anything here takes, shorter than a person waits
LONG = "word " * 2000               # a turn that runs for 10 s at the pace of the `server` fixture


# ---- The reader: raw sockets and HTTP/1.1. It knows framing, and nothing of sessions or turns.

class Cut(Exception):
    """The connection ended before the answer did."""


class Head(NamedTuple):
    status: int
    headers: dict


class Connection:
    """A client's connection that takes what it reads literally. After `cut_after` bytes of it, it is cut."""

    FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)?[ \t]*\r\n")

    def __init__(self, address, cut_after=None, receive_buffer=None):
        self.socket = socket.create_connection(address, PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.file = self.socket.makefile("rb")
        self.left = sys.maxsize if cut_after is None else cut_after
        self.pings = []

    def send(self, data):
        self.socket.sendall(data)

    def close(self):
        self.file.close()
        self.socket.close()

    def abort(self):
        """Close by a reset, as a machine that vanished would look: what was not read yet is lost."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def _read(self, read, size):
        try:
            data = read(min(size, self.left))
        except ConnectionError as error:
            raise Cut(str(error)) from error
        self.left -= len(data)
        return data

    def take(self, size):
        if len(data := self._read(self.file.read, size)) < size:
            raise Cut(f"{len(data)} bytes of {size}")
        return data

    def take_line(self):
        if not (line := self._read(self.file.readline, 65_537)).endswith(b"\n"):
            assert len(line) < 65_537, "a line of the framing has no end"
            raise Cut(f"in the line {line[:100]!r}")
        assert line.endswith(b"\r\n"), f"a bare LF ends {line!r}"
        return line.decode("latin-1")

    def at_end(self):
        return not self._read(self.file.read, 1)

    def read_head(self):
        status_line = self.take_line()
        match = re.fullmatch(r"HTTP/1\.[01] ([1-5][0-9]{2}) [\x20-\x7e]*\r\n", status_line)
        assert match, f"not a status line: {status_line!r}"
        headers = {}
        while (line := self.take_line()) != "\r\n":
            field = self.FIELD.fullmatch(line)
            assert field, f"not a field line: {line!r}"
            name = field[1].lower()
            assert name not in headers, f"{name} comes twice"
            headers[name] = field[2] or ""
        return Head(int(match[1]), headers)

    def pieces(self, head):
        """The bytes of the body as they come."""
        length, coding = head.headers.get("content-length"), head.headers.get("transfer-encoding")
        assert length is None or coding is None, "both Content-Length and Transfer-Encoding"
        if coding is not None:
            assert coding == "chunked", f"Transfer-Encoding: {coding}"
            yield from self._transfer_chunks()
        elif length is not None:
            yield self.take(int(length))
        else:
            while piece := self._read(self.file.read1, 65_536):
                yield piece

    def _transfer_chunks(self):
        while True:
            size = self.take_line()
            assert re.fullmatch(r"[0-9A-Fa-f]{1,8}\r\n", size), f"not the size of a transfer chunk: {size!r}"
            if data := self.take(int(size, 16)):
                yield data
            end = self.take(2)
            assert end == b"\r\n", f"{end!r} ends a transfer chunk"
            if not data:
                return

    def lines(self, head):
        """The raw lines of a stream, each as soon as it is whole. Pings are put aside: they are no part of a turn."""
        rest = b""
        for piece in self.pieces(head):
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                if line and event_of(line)["type"] == "ping":
                    self.pings.append(event_of(line))
                elif line:
                    yield line + b"\n"
        assert not rest, f"the stream ends within a line: {rest[:100]!r}"


class Response(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def media_type(self):
        return self.headers.get("content-type", "").partition(";")[0]

    @property
    def json(self):
        assert self.media_type in ("application/json", "application/problem+json"), self
        assert int(self.headers["content-length"]) == len(self.body)
        return json.loads(self.body.decode("utf-8"))


def http_request(method, path, *fields, body=None, version="HTTP/1.1"):
    """The bytes of a request. `body` is bytes, or anything that JSON can say; None sends no body and no length."""
    if body is not None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = (*fields, f"Content-Length: {len(body)}")
    return "\r\n".join([f"{method} {path} {version}", "Host: localhost", *fields, "", ""]).encode() + (body or b"")


# ---- The rules of a stream. They know lines and events, and nothing of HTTP.

def event_of(line):
    """One line, one JSON object: pure ASCII, under 64 KiB, no key twice, nothing that JSON lacks."""
    assert line.isascii() and len(line) < 65_535, f"not ASCII, or too long: {line[:100]!r}"
    try:
        event = json.loads(line, object_pairs_hook=no_key_twice, parse_constant=float)
    except ValueError as error:
        raise AssertionError(f"not a line of JSON: {line[:100]!r}") from error
    assert isinstance(event, dict) and isinstance(event.get("type"), str), f"no event: {line[:100]!r}"
    return event


def no_key_twice(pairs):
    assert len(dict(pairs)) == len(pairs), "a field comes twice"
    return dict(pairs)


def moment(timestamp):
    return datetime.fromisoformat(timestamp)


TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}\+00:00")
SHAPES = {
    "text": lambda value: isinstance(value, str),
    "flag": lambda value: isinstance(value, bool),
    "count": lambda value: type(value) is int and value >= 0,
    "number": lambda value: type(value) in (int, float) and 0 <= value < float("inf"),
    "id": lambda value: isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value),
    "time": lambda value: isinstance(value, str) and TIME.fullmatch(value) and moment(value),
    "list": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


@cache
def shapes_of(fields):
    return dict(field.split(":") for field in fields.split())


def check_fields(value, fields):
    """Exactly these fields, each of its shape; a `?` allows null. Another server may have more of them."""
    shapes = shapes_of(fields)
    given = set(value) & set(shapes) if OUTSIDE and isinstance(value, dict) else set(value)
    assert isinstance(value, dict) and given == set(shapes), f"the fields of {value} are not {fields}"
    for name, shape in shapes.items():
        null = value[name] is None and shape.endswith("?")
        assert null or SHAPES[shape.rstrip("?")](value[name]), f"{name} can't be {value[name]!r}"


EVENTS = {
    "session_info": "type:text session_id:id turn_id:id model:text created:flag timestamp:time",
    "status": "type:text message:text context_messages:count",
    "chunk": "type:text text:text chunk_number:count is_final:flag timestamp:time",
    "complete": "type:text finish_reason:text total_chunks:count processing_time:number message_count:count "
                "session_id:id turn_id:id timestamp:time",
    "error": "type:text code:text message:text retryable:flag session_id:id turn_id:id timestamp:time",
    "ping": "type:text timestamp:time",
}
USAGE = "input_tokens:count output_tokens:count total_tokens:count"
FINISH_REASONS = {"stop", "length", "content_filter", "cancelled", "other"}
STREAM_ERRORS = {               # code: is it retryable?
    "model_error": False, "model_not_found": False, "model_auth": False, "model_overloaded": True,
    "model_blocked": False, "model_cut": True, "session_cleared": False, "session_deleted": False,
    "server_shutdown": True, "internal_error": True,
}
CLOCK = timedelta(milliseconds=1)   # two clocks are read for a timestamp: they may drift apart by so much


class Turn(NamedTuple):
    info: dict
    status: dict
    chunks: list
    end: dict

    @property
    def text(self):
        return "".join(chunk["text"] for chunk in self.chunks)


def check_turn(lines, *, message="", delay=0.0, words=None, after=0, **same):
    """Hold the lines of one turn against every rule of the stream, and return its events.

    `message` is the user's, `delay` and `words` the server's pace. `after`: a resume left out chunks 1 to `after`.
    `same` are fields that session_info and the end share.
    """
    events = [event_of(line) for line in lines]
    if OUTSIDE:     # another server may send more types of events
        events = [event for event in events if event["type"] in EVENTS]
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["session_info", "status"], f"the stream begins with {kinds[:2]}"
    assert kinds[-1] in ("complete", "error"), "the stream ends without a terminal event"
    assert set(kinds[2:-1]) <= {"chunk"}, f"other events than chunks before the end: {set(kinds[2:-1])}"
    for event in events:
        if event["type"] == "complete" and "usage" in event:
            check_fields(event["usage"], USAGE)
            event = {name: event[name] for name in event if name != "usage"}
        check_fields(event, EVENTS[event["type"]])
    turn = Turn(events[0], events[1], events[2:-1], events[-1])
    for name, value in {"session_id": turn.info["session_id"], "turn_id": turn.info["turn_id"], **same}.items():
        assert turn.info[name] == value and turn.end.get(name, value) == value, f"another {name} than {value}"
    check_chunks(turn, words, after)
    if turn.end["type"] == "complete":
        check_complete(turn, message, after)
        if turn.end["finish_reason"] == "cancelled" and turn.chunks:
            assert turn.chunks[-1]["text"] == "", "the last chunk of a cancelled turn is empty"
    else:
        assert turn.end["retryable"] is STREAM_ERRORS[turn.end["code"]], f"retryable is wrong for {turn.end['code']}"
        assert 0 < len(turn.end["message"]) <= 1000, "an error's message has 1 to 1,000 characters"
    check_times(turn, delay)
    return turn


def check_chunks(turn, words, after):
    numbers = [chunk["chunk_number"] for chunk in turn.chunks]
    assert numbers == list(range(after + 1, after + 1 + len(numbers))), f"chunk numbers have gaps: {numbers}"
    for chunk in turn.chunks:
        is_last_of_all = chunk is turn.chunks[-1] and turn.end["type"] == "complete"
        assert chunk["is_final"] is is_last_of_all, f"is_final is wrong in chunk {chunk['chunk_number']}"
        assert chunk["text"] or chunk["is_final"], "an empty chunk that is not the last"
        assert len(chunk["text"]) <= 4096, "a chunk has more than 4,096 code points"
        assert words is None or len(chunk["text"].split()) <= words, f"more than {words} words in a chunk"
        assert not re.search("[\ud800-\udfff]", chunk["text"]), "a lone surrogate"


def check_complete(turn, message, after):
    end, before = turn.end, turn.status["context_messages"]
    assert end["finish_reason"] in FINISH_REASONS, f"finish_reason can't be {end['finish_reason']}"
    assert end["total_chunks"] >= 1, "a turn that completes has at least one chunk"
    assert len(turn.chunks) == max(end["total_chunks"] - after, 0), "total_chunks is not the number of chunks"
    if after == 0 and end["finish_reason"] == "stop":
        assert message in turn.text, "the answer has lost some of the message"
    if after == 0:
        nothing_kept = end["finish_reason"] == "cancelled" and not turn.text
        assert end["message_count"] == before + (0 if nothing_kept else 2), "message_count is wrong"


def check_times(turn, delay):
    times = [moment(event["timestamp"]) for event in (turn.info, *turn.chunks, turn.end)]
    assert times == sorted(times), "timestamps run backwards"
    for (earlier, later), chunk in zip(itertools.pairwise(times[1:-1]), turn.chunks[1:], strict=True):
        if chunk["text"]:
            assert later - earlier >= timedelta(seconds=delay) - CLOCK, f"chunks less than {delay} s apart"
    if turn.end["type"] == "complete":
        took = (times[-1] - times[0]).total_seconds()
        assert abs(took - turn.end["processing_time"]) < 0.5, "processing_time is not the time from the start"


def check_problem(response, status, code):
    """RFC 9457: errors before a stream starts are problem details, with a fixed word as `code`."""
    assert (response.status, response.media_type) == (status, "application/problem+json"), response
    problem = response.json
    check_fields(problem, "type:text title:text status:count detail:text code:text")
    assert (problem["type"], problem["status"], problem["code"]) == ("about:blank", status, code), problem
    assert problem["title"] and problem["detail"].strip(), problem
    return problem


# ---- The commands. They use nothing of what follows, so that they run where there is no pytest.

BENCH = """\
Measure a server of this protocol, or compare two, round by round in turn.

Its model should repeat the message, as the offline model does, and it should have no other visitors. A first turn is
held against the rules of a stream, and shows whether the server's pace is on. Measured are:

  always     requests (GET /health) per second, on kept connections; the time from connecting to the first chunk, turn
             after turn; memory and threads when idle, after the first turn
  pace off   chunks per second of one stream, and of many at once
  pace on    of many streams at once, begun one by one within two seconds: how late chunks come (arrival by the wall
             clock of this machine, minus their timestamp), the gaps between them, the time to the first chunk, memory
             and threads a stream

Memory and threads are read from /proc where the server is a process of this machine. Each figure is the median of the
rounds, and in brackets the least and the greatest; where those of two servers overlap, neither is called better."""
WORD = "word "
CHUNK, COMPLETE = b'"chunk_number"', b'"total_chunks"'     # stand in every event of that type, and in no other


class Sizes(NamedTuple):
    rounds: int
    seconds: float              # for one figure
    turns: int                  # one after the other, to their first chunk
    connections: int            # at once: for requests, and with the pace off for streams
    streams: tuple              # at once, with the pace on
    spread: float               # seconds in which these begin, one by one


QUICK = Sizes(1, 0.2, 5, 5, (5, 10), 0.1)
PACE_OFF, PACE_ON = Sizes(5, 1, 100, 50, (), 0), Sizes(3, 4, 100, 50, (100, 1000), 2)


class Trace:
    """One of many streams: each read, with its moment. It is decoded when all is over, so as not to be late itself."""

    def __init__(self, request):
        self.request, self.began, self.reads = request, time.time(), []

    def go_on(self, sock):
        """Send or read what is possible now; False at the end of the connection."""
        try:
            if self.request:
                self.request = self.request[sock.send(self.request):]
            else:
                self.reads.append((sock.recv(1 << 18), time.time()))
            return bool(self.request or not self.reads or self.reads[-1][0])
        except OSError:
            return False

    def data(self):
        return b"".join(data for data, _ in self.reads)

    def arrivals(self):
        """Each event of a whole stream, with the moment at which its last byte came."""
        data, rest = self.data(), b""
        ends = list(itertools.accumulate(len(read) for read, _ in self.reads))
        at = data.index(b"\r\n\r\n") + 4
        while at < len(data):
            start = data.index(b"\r\n", at) + 2
            at, size = start + int(data[at:start], 16) + 2, int(data[at:start], 16)
            *lines, rest = (rest + data[start:start + size]).split(b"\n")
            for line in filter(None, lines):
                yield json.loads(line), self.reads[bisect.bisect_left(ends, start + size)][1]


class Target:
    """A server to measure, and its figures: for each name the values of all rounds."""

    def __init__(self, url):
        self.family, self.address = find(url)
        local = self.address[0] in ("127.0.0.1", "::1")
        self.processes = processes_listening_at(self.address[1]) if local else []
        self.figures, self.rate = {}, 0.0
        chunks = self.first_turn(50 * WORD, uuid.uuid4().hex)
        times = [moment(chunk["timestamp"]).timestamp() for chunk in chunks]
        self.delay = statistics.median(later - earlier for earlier, later in itertools.pairwise(times))
        self.words = statistics.median(len(chunk["text"].split()) for chunk in chunks)
        self.has_pace = self.delay > 0.005
        self.idle = self.resources()

    def first_turn(self, message, session):
        with contextlib.closing(Connection(self.address)) as connection:
            connection.send(turn_request(message, session))
            turn = check_turn(connection.lines(connection.read_head()), message=message, session_id=session)
        self.forget([session])
        return turn.chunks

    def resources(self):
        """Memory in KiB, and threads."""
        text = "".join(Path("/proc", process, "status").read_text() for process in self.processes)
        return [sum(map(int, re.findall(rf"{name}:\s*(\d+)", text))) for name in ("VmRSS", "Threads")]

    def forget(self, sessions):
        """Delete the sessions of one figure, so that they don't weigh on the next."""
        with contextlib.closing(Connection(self.address)) as connection:
            for session in sessions:
                connection.send(http_request("DELETE", f"/sessions/{session}"))
                b"".join(connection.pieces(connection.read_head()))

    def note(self, name, value):
        self.figures.setdefault(name, []).append(value)

    def note_times(self, name, seconds):
        for percent in (50, 99):
            self.note(f"{name}, p{percent}, ms", 1000 * sorted(seconds)[len(seconds) * percent // 100])

    def measure(self, sizes):
        for count in (1, sizes.connections):
            rate = self.requests_per_second(count, min(sizes.seconds, 1) / 2)
            self.note(f"requests per second, {count} at once", rate)
        self.note_times("first chunk, turn after turn", self.first_chunks(sizes.turns))
        for count in () if self.has_pace else (1, sizes.connections):
            self.rate = self.chunks_per_second(count, sizes.seconds)
            self.note(f"chunks per second, {count} at once", self.rate)
        for count in sizes.streams if self.has_pace else ():
            used = self.measure_paced(count, sizes.seconds, sizes.spread)
        if self.has_pace and self.processes:    # by the most streams: of fewer, the rest of earlier ones is too much
            for name, before, now in zip(("memory a stream, KiB", "threads a stream"), self.idle, used, strict=True):
                self.note(f"{name}, {count} at once", (now - before) / count)
        if self.processes:
            self.note("memory when idle, MiB", self.idle[0] / 1024)
            self.note("threads when idle", self.idle[1])

    def requests_per_second(self, count, seconds):
        request, answers = http_request("GET", "/health"), 0
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            for _ in range(count):
                connection = stack.enter_context(contextlib.closing(Connection(self.address)))
                selector.register(connection.socket, selectors.EVENT_READ, [])
                connection.send(request)
            began = time.perf_counter()
            while (took := time.perf_counter() - began) < seconds:
                for key, _ in selector.select(PATIENCE):
                    key.data.append(receive(key.fileobj))
                    if is_whole(b"".join(key.data)):
                        key.data.clear()
                        key.fileobj.sendall(request)
                        answers += 1
        return answers / took

    def first_chunks(self, count):
        """Seconds from connecting to the first chunk, of turns one after the other."""
        sessions, times = [uuid.uuid4().hex for _ in range(count)], []
        for session in sessions:
            data, began = b"", time.perf_counter()
            with contextlib.closing(Connection(self.address)) as connection:
                connection.send(turn_request(WORD, session))
                while CHUNK not in data:
                    data += receive(connection.socket)
                times.append(time.perf_counter() - began)
        self.forget(sessions)
        return times

    def chunks_per_second(self, count, seconds):
        """Of one stream, as long as messages may be; or of many that take about `seconds` at that rate."""
        words = min(20_000, int(self.rate * self.words * seconds / count) or 20_000)
        chunks, took = 0, 0.0
        while took < seconds / 2:
            traces = self.streams(count, words * WORD)
            chunks += sum(trace.data().count(CHUNK) for trace in traces)
            took += max(trace.reads[-1][1] for trace in traces) - traces[0].began
        return chunks / took

    def measure_paced(self, count, seconds, spread):
        message, used = WORD * int(self.words * seconds / self.delay), []
        midway = (spread + seconds) / 2     # when all have begun, and none is at its end
        traces = self.streams(count, message, spread, midway, lambda: used.extend(self.resources()))
        late, gaps, first = [], [], []
        for trace in traces:
            chunks = [(event, arrival) for event, arrival in trace.arrivals() if event["type"] == "chunk"]
            late += [arrival - moment(chunk["timestamp"]).timestamp() for chunk, arrival in chunks]
            gaps += [later - earlier for (_, earlier), (_, later) in itertools.pairwise(chunks)]
            first.append(chunks[0][1] - trace.began)
        self.note_times(f"chunks late, {count} at once", late)
        self.note_times(f"gap between chunks, {count} at once", gaps)
        self.note_times(f"first chunk, {count} at once", first)
        self.note(f"streams that failed, {count} at once", count - len(traces))
        return used

    def streams(self, count, message, spread=0.0, midway=math.inf, then=None):
        """Begin streams within `spread` seconds, read them to their ends, return the whole ones; call `then` once."""
        sessions = [uuid.uuid4().hex for _ in range(count)]
        waiting = [Trace(turn_request(message, session)) for session in sessions]
        traces, began, last = [], time.monotonic(), 0.0
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            while (waiting or selector.get_map()) and (passed := time.monotonic() - began) < last + PATIENCE:
                while waiting and passed >= spread * len(traces) / count:
                    traces.append(waiting.pop())
                    selector.register(self.begin(traces[-1], stack), selectors.EVENT_WRITE, traces[-1])
                if passed > midway:
                    then()
                    midway = math.inf
                for key, _ in selector.select(spread / count or 1):
                    last = passed
                    if not key.data.go_on(key.fileobj):
                        selector.unregister(key.fileobj)
                    elif key.events == selectors.EVENT_WRITE and not key.data.request:
                        selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
        self.forget(sessions)
        whole = [trace for trace in traces if COMPLETE in trace.data()[-1000:]]
        assert whole, f"none of {count} streams came to its end"
        return whole

    def begin(self, trace, stack):
        sock = stack.enter_context(socket.socket(self.family))
        sock.setblocking(False)
        trace.began = time.time()
        sock.connect_ex(self.address)
        return sock


def turn_request(message, session):
    body = {"message": message, "session_id": session}
    return http_request("POST", "/chat/stream", "Content-Type: application/json", "Connection: close", body=body)


def receive(sock):
    if not (data := sock.recv(1 << 18)):
        raise Cut("the connection was closed")
    return data


def find(url):
    """The family and the address of a server, which must be there."""
    parts = urlsplit(url if "//" in url else "//" + url)
    with contextlib.closing(Connection((parts.hostname, parts.port or 80))) as connection:
        return connection.socket.family, connection.socket.getpeername()[:2]


def content_length(head):
    length = re.search(rb"\ncontent-length:[ \t]*(\d+)", head, re.IGNORECASE)
    return length and int(length[1])


def is_whole(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    return len(body) == content_length(head)


def processes_listening_at(port):
    """The process ids (Linux; elsewhere none is found)."""
    sockets = set()
    for table in Path("/proc/net").glob("tcp*"):
        for row in map(str.split, table.read_text().splitlines()[1:]):
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:   # 0A: TCP_LISTEN
                sockets.add(f"socket:[{row[9]}]")
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):      # it is not ours, or closed already
            if os.readlink(descriptor) in sockets:
                found.add(descriptor.parts[2])
    return found


def bench(urls, quick):
    with contextlib.suppress(ImportError, ValueError):
        import resource  # Windows lacks it, and the limit too

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    targets = []
    for name, url in zip("AB", urls, strict=False):
        targets.append(target := Target(url))
        pace = f"pace on ({target.delay:.3f} s)" if target.has_pace else "pace off"
        process = ", ".join(target.processes) or "not found, so without memory and threads"
        print(f"{name}  {url}: a first turn keeps the rules; {pace}; process {process}")
    assert len({target.has_pace for target in targets}) == 1, "one has its pace on, the other off: nothing to compare"
    sizes = QUICK if quick else PACE_ON if targets[0].has_pace else PACE_OFF
    began, busy = time.perf_counter(), time.process_time()
    for number in range(sizes.rounds):
        for target in targets[::-1] if number % 2 else targets:
            target.measure(sizes)
    print_figures([target.figures for target in targets])
    took, busy = time.perf_counter() - began, time.process_time() - busy
    print(f"\n{sizes.rounds} rounds in {took:.0f} s; this client kept a core busy for {busy / took:.0%} of them.")


def print_figures(figures):
    two = len(figures) == 2
    print(f"\n{'':42}{'A':>28}" + (f"{'B':>28}{'A/B':>8}  better" if two else ""))
    for name, values in figures[0].items():
        columns = [values, *(other.get(name, []) for other in figures[1:])]
        line = f"{name:42}" + "".join(f"{cell(column):>28}" for column in columns)
        if two and columns[1]:
            line += compare(name, *columns)
        print(line)


def cell(values):
    return f"{number(statistics.median(values))} ({number(min(values))}..{number(max(values))})" if values else "-"


def number(value):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def compare(name, a, b):
    """The ratio, and which is better: the one with more per second, but less time, memory, threads and failures."""
    ratio = f"{statistics.median(a) / statistics.median(b):8.2f}" if statistics.median(b) else f"{'-':>8}"
    if (max(a) >= min(b) and max(b) >= min(a)) or ratio.strip() == "1.00":
        return ratio
    return ratio + "  " + ("A" if (min(a) > max(b)) is ("per second" in name) else "B")


PROXY = """\
A proxy between a client and a server of this protocol, which cuts streams as a bad network would.

Whenever bytes of a stream come from the server, the proxy may cut the client's connection, at a random byte among them.
So a client that tries again gets further, unless --cut is 1. Each fault is printed. Other requests pass untouched. A
client that keeps the protocol shows the same text as without the proxy, and its history has each turn once."""
STREAM = re.compile(r"(POST /chat|(GET|POST) /sessions/[^/ ]+)/stream[? ]")


class Fault(NamedTuple):
    """What happens to one answer. A place in it is a number of bytes, from its status line on, or the bytes there."""
    cut: int | bytes = sys.maxsize      # where the client's connection is closed (0: when the first byte has come)
    reset: bool = False         # a cut is a reset: what the client has not read yet is lost
    stall: int | bytes = sys.maxsize    # where nothing comes any more, and the connection stays open
    delay: float = 0.0          # seconds before each piece
    split: bool = False         # each byte is a piece
    repeat: bool = False        # the request is sent twice, as by a proxy that tries again; the first answer is lost
    instead: bytes | None = None    # these bytes are the answer, then a close; the server sees nothing of the request


class Proxy:
    """A relay that knows requests by their heads, and passes each answer on as its fault says.

    `faults` are those of the streams, in turn; what comes after them, and other requests, passes untouched
    (`fault_of` decides that). `target` is the server's address, and may change: it counts for new connections.
    """

    def __init__(self, target, faults=(), port=0):
        self.target, self.faults, self.address = target, iter(faults), ("127.0.0.1", port)
        self.connections, self.requests, self.links = 0, [], set()
        self.up()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.down()

    @property
    def url(self):
        return "http://{}:{}".format(*self.address)

    def up(self):
        """Listen, after a `down` at the same address again."""
        self.listener = socket.create_server(self.address, backlog=64)
        self.address = self.listener.getsockname()
        self.accepting = threading.Thread(target=self._accept, daemon=True)
        self.accepting.start()

    def down(self):
        """Close all connections, and refuse new ones."""
        with contextlib.suppress(OSError):      # it may be down already
            self.listener.shutdown(socket.SHUT_RDWR)
        self.accepting.join()
        self.listener.close()
        for link in list(self.links):
            link.end()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                link = Link(self, self.listener.accept()[0])
                self.connections += 1
                self.links.add(link)
                threading.Thread(target=link.pass_requests, daemon=True).start()

    def fault_of(self, line):
        """The fault of the answer to a request with this request line."""
        return next(self.faults, Fault()) if STREAM.match(line) else Fault()

    def fault_in(self, link, size):
        """The same, asked again for each piece of the answer when it has come."""
        return link.fault

    def note(self, line, what):
        """A fault happens."""


class Link:
    """A client's connection, and the one to the server that belongs to it."""

    def __init__(self, proxy, client):
        self.proxy, self.client, self.server = proxy, client, None
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.answers = threading.Thread(target=self.pass_answers, daemon=True)

    def pass_requests(self):
        with self.client, contextlib.suppress(OSError), self.client.makefile("rb") as file:
            while request := read_request(file):
                self.begin_answer(request.partition(b"\r\n")[0].decode("latin-1"))
                if self.fault.instead is None:
                    self.pass_request(request)
                else:
                    self.client.sendall(self.fault.instead)
                    self.client.shutdown(socket.SHUT_WR)
            if self.server:
                self.server.shutdown(socket.SHUT_WR)
                self.answers.join()
        self.end()
        if self.server:
            self.server.close()
        self.proxy.links.remove(self)

    def begin_answer(self, line):
        self.proxy.requests.append(line)
        self.line, self.fault, self.passed = line, self.proxy.fault_of(line), 0
        if faults := [name for name in ("delay", "split", "repeat", "instead") if getattr(self.fault, name)]:
            self.proxy.note(line, ", ".join(faults))

    def pass_request(self, request):
        if self.fault.repeat:
            with socket.create_connection(self.proxy.target, PATIENCE) as first:
                first.sendall(request)
                first.recv(1)       # so it was read
        if not self.server:
            self.server = socket.create_connection(self.proxy.target)
            self.answers.start()
        self.server.sendall(request)

    def pass_answers(self):
        with contextlib.suppress(OSError):
            while data := self.server.recv(65_536):
                if not self.pass_piece(data):
                    return
        with contextlib.suppress(OSError):
            self.client.shutdown(socket.SHUT_WR)

    def pass_piece(self, data):
        """Tell whether another piece may follow."""
        fault = self.proxy.fault_in(self, len(data))
        cut, stall = (self.position(place, data) for place in (fault.cut, fault.stall))
        end = min(cut, stall)
        data = data[:end - self.passed]
        self.passed += len(data)    # before it is sent: then the next request may come at any moment, and begin at 0
        if is_end := self.passed == end:
            self.proxy.note(self.line, f"{'cut' if end == cut else 'stall'} after {end} bytes")
        for piece in map(bytes, zip(data, strict=True)) if fault.split else [data]:
            time.sleep(fault.delay)
            self.client.sendall(piece)
        if is_end and end == cut:
            self.cut(fault.reset)
        return not is_end

    def position(self, place, data):
        """How many bytes of the answer come before this place, which may be in the piece that has come."""
        if isinstance(place, int):
            return place
        return self.passed + data.index(place) if place in data else sys.maxsize

    def cut(self, reset):
        if reset:
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)     # wakes `pass_requests`, which closes

    def end(self):
        """Wake who waits for either side: a close alone would not."""
        for sock in filter(None, (self.client, self.server)):
            with contextlib.suppress(OSError):      # it has ended by itself
                sock.shutdown(socket.SHUT_RDWR)


def read_request(file):
    """The bytes of a request, whose body, if any, has a Content-Length. Fewer where the client has left."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and (line := file.readline()):
        head += line
    return head + file.read(content_length(head) or 0)


class ProxyByChance(Proxy):
    """It does to streams what the options of the command say, and prints each fault."""

    def __init__(self, target, options):
        self.options, self.random = options, random.Random(options.seed)
        super().__init__(target, iter(self.next_fault, None), options.port)

    def next_fault(self):
        repeat = self.random.random() < self.options.repeat
        return Fault(delay=self.options.delay, split=self.options.split, repeat=repeat)

    def fault_in(self, link, size):
        for name in ("cut", "stall") if STREAM.match(link.line) else ():
            if self.random.random() < getattr(self.options, name):
                return link.fault._replace(**{name: link.passed + self.random.randrange(size)})
        return link.fault

    def note(self, line, what):
        now = datetime.now().time().isoformat("milliseconds")
        print(f"{now}  {line[:100]!a}  {what}\n", end="", flush=True)   # in one write, since threads take turns


def fraction(text):
    """The type of options from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def try_client(options):
    with contextlib.suppress(KeyboardInterrupt), ProxyByChance(find(options.to)[1], options) as proxy:
        print(f"To {options.to}, with --seed {options.seed}")
        print(f"Proxy at {proxy.url}", flush=True)
        threading.Event().wait()


def main():
    parser = argparse.ArgumentParser(description="Tools to test a server or a client of streamable HTTP chat.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("bench", help="measure a server, or compare two", description=BENCH,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("url", metavar="URL", help="such as http://127.0.0.1:8000")
    command.add_argument("other", nargs="?", metavar="URL", help="another server, to compare with")
    command.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    command = commands.add_parser("proxy", help="try a client against cuts", description=PROXY,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--to", metavar="URL", required=True, help="the server, such as http://127.0.0.1:8000")
    command.add_argument("--port", type=int, default=8001, help="where the proxy listens (8001; 0 takes a free one)")
    command.add_argument("--cut", type=fraction, default=0.2, metavar="P", help="chance of a cut, 0 to 1 (0.2)")
    command.add_argument("--stall", type=fraction, default=0, metavar="P",
                         help="chance that nothing comes any more, on a connection that stays open")
    command.add_argument("--repeat", type=fraction, default=0, metavar="P",
                         help="chance that a request is sent twice, as by a proxy that tries again by itself")
    command.add_argument("--delay", type=fraction, default=0, metavar="S", help="seconds before each piece, 0 to 1")
    command.add_argument("--split", action="store_true", help="pass on single bytes")
    command.add_argument("--seed", type=int, default=random.randrange(1_000_000), metavar="N",
                         help="make the choices of an earlier run again")
    arguments = parser.parse_args()
    try:
        if arguments.command == "proxy":
            try_client(arguments)
        else:
            bench([url for url in (arguments.url, arguments.other) if url], arguments.quick)
    except (OSError, ValueError, OverflowError, AssertionError, Cut) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

import pytest  # noqa: E402  # only the tests need it, and the commands have ended here

# The levels of conformance: README, "Conformance". What has none of these marks is a matter of this project alone.
warnings.filterwarnings("ignore", ".*pytest.mark.(core|sessions|strict)")       # a file of settings would name them
core, sessions, strict = pytest.mark.core, pytest.mark.sessions, pytest.mark.strict

# ---- Servers: one that we know only by its address, or one of our own.

class Stream:
    """The answer to a POST /chat/stream or a GET …/stream: its head is checked, its lines are read when asked for."""

    is_strict = True        # false at the other levels of another server

    def __init__(self, connection, pace, connection_field="keep-alive", coding="chunked"):
        self.connection, self.pace = connection, pace
        self.head = connection.read_head()
        assert self.head.status == 200, connection.file.read1()
        expected = {"content-type": "application/x-ndjson"}
        if self.is_strict:
            expected |= {"cache-control": "no-cache", "x-accel-buffering": "no", "x-content-type-options": "nosniff",
                         "connection": connection_field, "transfer-encoding": coding}
        assert {name: self.head.headers.get(name) for name in expected} == expected
        assert "content-length" not in self.head.headers
        self.lines = []
        self.coming = connection.lines(self.head)

    def read(self, count=None):
        """Read the next `count` lines, or all that come."""
        for line in itertools.islice(self.coming, count):
            self.lines.append(line)
        return self

    def read_until(self, kind, number=1):
        """Read to the `number`th event of a type, and not a byte further."""
        while number:
            self.read(1)
            number -= event_of(self.lines[-1])["type"] == kind
        return event_of(self.lines[-1])

    def abort(self):
        self.connection.abort()

    def check(self, **expected):
        """Read to the end and close; the turn must follow all rules."""
        self.read()
        self.connection.close()
        return check_turn(self.lines, **(self.pace | expected))


class Server:
    def __init__(self, host, port, flags=()):
        self.address = (host, port)
        options = dict(zip(flags[::2], flags[1::2], strict=False))
        self.fields = [f"Authorization: Bearer {options['--token']}"] if "--token" in options else []
        self.pace = {} if OUTSIDE else {"delay": float(options.get("--chunk-delay", 0.1)),
                                        "words": int(options.get("--chunk-words", 4))}

    def connect(self, **kind):
        return Connection(self.address, **kind)

    def request(self, method, path, body=None, headers=()):
        connection = self.connect()
        connection.send(http_request(method, path, *self.fields, *headers, body=body))
        return self.response(connection, method)

    def response(self, connection, method="GET", close=True):
        head = connection.read_head()
        bodiless = method == "HEAD" or head.status in (100, 204, 304)
        response = Response(*head, b"" if bodiless else b"".join(connection.pieces(head)))
        if close:
            connection.close()
        return response

    def answers(self, raw):
        """All answers to these bytes, after which the sending half is closed."""
        connection, answers = self.connect(), []
        connection.send(raw)
        connection.socket.shutdown(socket.SHUT_WR)
        while connection.file.peek(1):
            answers.append(self.response(connection, close=False))
        connection.close()
        return [answer for answer in answers if answer.status != 100]

    def get(self, path):
        response = self.request("GET", path)
        assert (response.status, response.media_type) == (200, "application/json"), response
        return response.json

    def open(self, method, path, body=None, **kind):
        connection = self.connect(**kind)
        connection.send(http_request(method, path, *self.fields, body=body))
        return Stream(connection, self.pace)

    def chat(self, message, **fields):
        return self.open("POST", "/chat/stream", {"message": message, **fields})

    def follow(self, session, after=None):
        return self.open("GET", f"/sessions/{session}/stream" + ("" if after is None else f"?after={after}"))

    def turn(self, message, **fields):
        return self.chat(message, **fields).check(message=message, **fields)

    def stop(self, session, **body):
        response = self.request("POST", f"/sessions/{session}/stop", body or None)
        assert response.status == 200, response
        check_fields(response.json, "message:text stopped:flag")
        return response.json["stopped"]

    def session(self, session):
        return self.get(f"/sessions/{session}")

    def session_ids(self):
        return {session["session_id"] for session in self.get("/sessions")["sessions"]}

    def history(self, session):
        return [(message["role"], message["text"]) for message in self.session(session)["messages"]]

    def stats(self):
        return self.get("/stats")

    def counters(self):
        """What the level core has of the statistics, or all of them."""
        return self.get("/health" if OUTSIDE else "/stats")

    def readers(self, session):
        return [stream["readers"] for stream in self.stats()["streams"] if stream["session_id"] == session]

    def end_all_turns(self):
        stats = self.request("GET", "/stats")
        for stream in stats.json["streams"] if stats.status == 200 else ():     # else it has the level core alone
            self.request("DELETE", f"/sessions/{stream['session_id']}")


class OwnServer(Server):
    """A server that we started: its process, and what it wrote so far."""

    def __init__(self, host, port, flags, process, output):
        super().__init__(host, port, flags)
        self.process, self.output = process, output

    def log(self):
        return self.output.read_text("utf-8", "replace")


def environment(**more):
    """Ours, without what would choose a model, a token or the look of the log."""
    chosen = ("GOOGLE_", "GEMINI_", "GENAI_", "NO_COLOR", "STREAMCHAT_", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    return kept | more


IMPORTED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import streamchat_server
"""
START = [sys.executable, "-c", IMPORTED + "sys.exit(streamchat_server.main())", str(SERVER.parent)]
REFUSE = IMPORTED + """
import contextlib, io, json
for sys.argv[1:] in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO())) as said:
        try:
            status = streamchat_server.main()
        except SystemExit as exit:
            status = exit.code
        said.seek(0)
        print(json.dumps([status, said.read()]))
"""


def start(flags, output, program=None, **more):
    """The server, imported by a program that does what its file does: so it is compiled once, not with each start."""
    command = [sys.executable, str(program)] if program else START
    return subprocess.Popen([*command, *flags], env=environment(**more), stdin=subprocess.DEVNULL, stdout=output,
                            stderr=subprocess.STDOUT)


def refused(*command_lines):
    """What the server says to each of these arguments, none of which it may serve with; all in one process."""
    done = subprocess.run([sys.executable, "-c", REFUSE, str(SERVER.parent)], input=json.dumps(command_lines),
                          env=environment(), timeout=PATIENCE, capture_output=True, encoding="utf-8", check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [status for status, _ in told] == [2] * len(command_lines) and "Traceback" not in done.stdout, told
    return [said.strip() for _, said in told]


@contextlib.contextmanager
def running(*flags, **more):
    """A server of our own with these flags, else on a free port, killed at the end. It must have raised nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log")
        with path.open("wb") as output:
            process = start(("--port", "0", *flags), output, **more)
        try:
            serving = re.compile(r"^Serving on http://(.+):(\d+)\r?\n", re.MULTILINE)
            found = wait_until(lambda: serving.search(path.read_text("utf-8", "replace")) or process.poll() is not None,
                               3 * PATIENCE)        # on a busy disk, Python itself may start slowly
            assert isinstance(found, re.Match), path.read_text("utf-8", "replace")
            server = OwnServer(found[1].strip("[]"), int(found[2]), flags, process, path)
            yield server
            assert "Traceback" not in server.log(), server.log()
        finally:
            process.kill()
            process.wait(PATIENCE)


@contextlib.contextmanager
def visiting():
    """The server that is not ours. It throws no session out, and is full at 10,000: ours are deleted at the end."""
    url = urlsplit(OUTSIDE)
    server = Server(url.hostname, url.port or 80)
    has_list = server.request("GET", "/sessions").status == 200      # not at the level core
    before = server.session_ids() if has_list else set()
    yield server
    for session in server.session_ids() - before if has_list else ():
        server.request("DELETE", f"/sessions/{session}")


def wait_until(condition, seconds=PATIENCE):
    """Poll until the condition holds, and return what it said last."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def in_parallel(work, items, workers=8):
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, items))


def needs(program, *places):
    """The path of a program. Where it is missing the test is skipped, but never in CI."""
    path = shutil.which(program, path=os.pathsep.join([os.environ["PATH"], *places]))
    if not path:
        missing(program)
    return path


def missing(name):
    assert os.environ.get("CI") != "true", f"CI must have {name}"
    pytest.skip(f"needs {name}")


def new_id():
    return uuid.uuid4().hex


@pytest.fixture(scope="session")
def farm():
    """Servers that tests share, by their flags."""
    with contextlib.ExitStack() as stack:
        servers = {}

        def borrow(*flags):
            if OUTSIDE:
                flags = ()
            if flags not in servers:
                servers[flags] = stack.enter_context(visiting() if OUTSIDE else running(*flags))
            return servers[flags]
        yield borrow


@pytest.fixture
def server(farm):
    """Any server. Ours has the default flags, but five times the pace."""
    server = farm("--chunk-delay", "0.02")
    yield server
    server.end_all_turns()


@pytest.fixture
def fast(farm):
    """Any server. Ours holds no pace."""
    return farm("--chunk-delay", "0")


@pytest.fixture
def own(farm):
    """A factory of shared servers of our own, by their flags."""
    if OUTSIDE:
        pytest.skip("needs a server of our own, with special flags")
    servers = []

    def borrow(*flags):
        servers.append(farm(*flags))
        return servers[-1]
    yield borrow
    for server in servers:
        server.end_all_turns()


@contextlib.contextmanager
def fresh_servers():
    with contextlib.ExitStack() as stack:
        yield lambda *flags, **more: stack.enter_context(running(*flags, **more))


@pytest.fixture
def serve():
    """A factory of fresh servers of our own, for who stops them, counts from zero or reads their log."""
    if OUTSIDE:
        pytest.skip("needs a server of our own, with special flags")
    with fresh_servers() as serve:
        yield serve


def cases(table):
    """Rows of data as the cases of a test, called by their first column."""
    return pytest.mark.parametrize("case", table, ids=[row[0] for row in table])


@pytest.fixture(autouse=True)
def level(request):
    """Another server is held to the levels core and sessions, or to what `-m` asks for."""
    if OUTSIDE:
        levels = {mark.name for mark in request.node.iter_markers()} & {"core", "sessions", "strict"}
        Stream.is_strict = "strict" in levels
        if not levels:
            pytest.skip("is about this project's own server and clients")
        if levels == {"strict"} and not request.config.getoption("markexpr"):
            pytest.skip("is strict: choose it by -m strict")


NOT_OURS = pytest.mark.skipif(bool(OUTSIDE), reason="needs a server of our own, with special flags")
WAITING = {}        # the tests that mostly wait, by what pytest calls in their turn


def waits(test):
    """A test of no fixtures but `serve` and `browser`: it runs beside others, and is judged in its turn."""
    @NOT_OURS
    @pytest.mark.usefixtures("begun", *(inspect.signature(test).parameters.keys() - {"self", "serve", "browser"}))
    def in_its_turn(self, request, begun):
        begun[request.node].result()
    WAITING[in_its_turn] = test
    return in_its_turn


@pytest.fixture(scope="session")
def begun(request):
    """Of the tests that were chosen, those that mostly wait: they begin six at a time, and two at a time in a browser.

    There are two browsers, and each test has a new tab of one.
    """
    def run(item, **more):
        case = item.callspec.params if hasattr(item, "callspec") else {}
        test = WAITING[item.function]
        with fresh_servers() as serve:
            given = {"self": item.instance, "serve": serve, **case, **more}
            test(**{name: given[name] for name in inspect.signature(test).parameters})

    @cache
    def browser_of(thread):
        return stack.enter_context(Browser())

    def run_in_browser(item):
        browser = browser_of(threading.get_ident())
        with browser.tab():
            browser.console(), browser.requests()       # of the tests before
            run(item, browser=browser)
    items = [item for item in request.session.items if item.function in WAITING]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(6) as pool, ThreadPoolExecutor(1) as browsers:
        runs = {}       # more at a time would wait for a core
        for item in items:
            in_browser = "browser" in inspect.signature(WAITING[item.function]).parameters
            runs[item] = browsers.submit(run_in_browser, item) if in_browser else pool.submit(run, item)
        yield runs
        for future in runs.values():        # where the session ends early
            future.cancel()


# ---- Run it

WRONG_FLAGS = [
    ("--bogus",), ("--port", "x"), ("--port", "65536"), ("--port", "-1"), ("--log", "loud"),
    ("--chunk-words", "0"), ("--chunk-words", "1.5"), ("--chunk-delay", "-0.1"), ("--chunk-delay", "nan"),
    ("--resume-window", "-1"), ("--resume-window", "x"), ("--heartbeat", "0"), ("--heartbeat", "15.1"),
    ("--token", ""), ("--token", "a\n"), ("--token", "a\x7f"), ("--token", "caf\u00e9"),
    ("--allow-origin", "*"), ("--allow-origin", "chat.example.com"), ("--allow-origin", "https://"),
    ("--allow-origin", "https://chat.example.com/"), ("--allow-origin", "https://chat.example.com:x"),
]


@pytest.fixture(scope="class")
def refusals():
    return dict(zip(WRONG_FLAGS, refused(*(["--port", "0", *flags] for flags in WRONG_FLAGS)), strict=True))


@NOT_OURS
@pytest.mark.usefixtures("begun")
class TestRunIt:
    """One command serves. What can't be served is one line on stderr and exit status 2; a signal is exit status 0."""

    def refuse(self, *flags, **more):
        """What a server says that does not even start."""
        process = subprocess.run([sys.executable, str(SERVER), *flags], env=environment(**more), timeout=PATIENCE,
                                 capture_output=True, encoding="utf-8")
        assert process.returncode == 2 and "Serving on" not in process.stdout, process
        assert "Traceback" not in process.stderr, process.stderr
        return process.stderr.strip()

    @pytest.mark.skipif(sys.platform != "linux", reason="looks at another process's limits")
    @waits
    def test_it_opens_as_many_files_as_the_system_allows(self):
        import resource  # Windows lacks it

        command = ["sh", "-c", 'ulimit -Sn 64; exec "$0" "$@"', sys.executable, str(SERVER), "--port", "0"]
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as process:
            try:
                assert any(line.startswith(b"Serving on") for line in process.stdout)
                soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            finally:
                process.kill()
        assert soft == hard

    @waits
    def test_help_names_the_flags(self):
        shown = subprocess.run([sys.executable, str(SERVER), "--help"], capture_output=True, check=True).stdout.decode()
        flags = {"--" + name for name in ("host", "port", "model", "chunk-words", "chunk-delay", "resume-window",
                                          "heartbeat", "db", "reload", "debug", "log")}
        assert flags <= set(re.findall(r"--[a-z-]+", shown))

    @pytest.mark.parametrize("flags", WRONG_FLAGS, ids=" ".join)
    def test_a_wrong_flag_is_refused(self, refusals, flags):
        assert flags[0] in refusals[flags]

    @waits
    def test_a_port_in_use_is_refused_in_one_line(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            said = self.refuse("--port", port)
        assert port in said and "\n" not in said

    @waits
    def test_a_host_that_others_can_reach_needs_a_token(self):
        hosts = ["", "0", "0.0.0.0", "::", "10.0.0.1", "chat.example.com", "localhost.evil.example"]
        told = refused(*(["--host", host, "--port", "0"] for host in hosts))
        for said in (*told, self.refuse("--host", "0.0.0.0", "--port", "0", STREAMCHAT_TOKEN="")):
            assert "--token" in said and "\n" not in said

    @waits
    def test_a_bad_token_is_refused_and_not_shown(self):
        for said in (self.refuse("--token", "s3cret word"), self.refuse(STREAMCHAT_TOKEN="s3cret word")):
            assert "s3cret" not in said

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
    @waits
    def test_a_loopback_host_needs_no_token(self, serve, host):
        try:
            socket.create_server((host, 0), family=socket.getaddrinfo(host, 0)[0][0]).close()
        except OSError:
            pytest.skip(f"this machine has no {host}")
        serve("--host", host, "--chunk-delay", "0").turn("Hi")

    @waits
    def test_with_a_token_others_may_reach_the_host(self, serve):
        serve("--token", TOKEN, "--host", "0.0.0.0", "--chunk-delay", "0").turn("Hi")
        assert ask(serve("--host", "0.0.0.0", STREAMCHAT_TOKEN=TOKEN), "GET", "/stats", BEARER).status == 200

    @waits
    def test_the_flag_goes_before_the_environment_and_an_empty_variable_is_no_token(self, serve):
        for flags, token in [(("--token", TOKEN), "another"), ((), "")]:
            serve(*flags, "--chunk-delay", "0", STREAMCHAT_TOKEN=token).turn("Hi")

    @pytest.mark.parametrize("flags, more", [
        (("--model", "gemini-x"), {}), ((), {"GENAI_MODEL_ID": "gemini-x"}),
        (("--model", "gemini-x"), {"GOOGLE_API_KEY": ""}),
    ], ids=["flag", "environment", "an empty key"])
    @waits
    def test_a_gemini_model_without_a_key_is_refused_in_one_line(self, flags, more):
        said = self.refuse("--port", "0", *flags, **more)
        assert "GOOGLE_API_KEY" in said and "--model offline" in said and "\n" not in said

    def test_a_key_without_the_package_is_refused_in_one_line(self, tmp_path):
        package = tmp_path / "google"
        package.mkdir()
        (package / "__init__.py").write_text('raise ModuleNotFoundError("No module named \'google\'", name="google")')
        said = self.refuse("--port", "0", GOOGLE_API_KEY="no-real-key", PYTHONPATH=str(tmp_path))
        assert "google-genai" in said and "--model offline" in said and "\n" not in said

    @waits
    def test_a_signal_lets_a_short_turn_complete(self, serve):
        for number in (signal.SIGINT, signal.SIGTERM):
            server = serve()
            stream = server.chat("a b c d e f g h i j k l m n o p q r s t u v w x y z")
            stream.read_until("chunk")
            before = len(server.log())
            server.process.send_signal(number)
            assert stream.check().end["finish_reason"] == "stop"
            assert server.process.wait(PATIENCE) == 0
            assert re.search(r"total.requests\D*1\b", server.log()[before:], re.IGNORECASE), "no statistics"

    @waits
    def test_signals_that_come_together_stop_the_server_once(self, serve):
        server = serve()
        stream = server.chat("Hello")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            server.process.send_signal(number)
        assert stream.check().end["finish_reason"] == "stop"
        assert server.process.wait(PATIENCE) == 0

    @waits
    def test_a_server_whose_output_is_closed_serves(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        command = f"exec {sys.executable} {SERVER} --port {port} >&- 2>&-"
        process = subprocess.Popen(["sh", "-c", command], env=environment())
        try:
            server = Server("127.0.0.1", port)
            assert wait_until(lambda: self.serves(server))
            server.turn("Hello")
        finally:
            process.kill()
            process.wait(PATIENCE)

    @waits
    def test_a_signal_may_come_at_once(self, serve):
        def interrupt(pause):
            server = serve()
            time.sleep(pause)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(2) == 0
        in_parallel(interrupt, (0, 0.001, 0.002, 0.005, 0.01, 0.02), workers=2)

    @waits
    def test_a_new_turn_while_the_server_shuts_down_is_refused(self, serve):
        server = serve("--chunk-delay", "0.02")
        stream = server.chat(LONG, session_id="s")
        stream.read_until("chunk")
        connection = server.connect()
        connection.send(http_request("GET", "/health"))
        server.response(connection, close=False)
        server.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: not self.serves(server), 3)
        time.sleep(0.5)     # what was sent before is answered first
        connection.send(chat_request({"message": "Hi"}) + http_request("GET", "/sessions"))
        refused = server.response(connection, close=False)
        check_problem(refused, 503, "overloaded")
        assert re.fullmatch("[0-9]+", refused.headers["retry-after"])
        assert server.response(connection).json["active_sessions"] == 1, "the refused turn made a session"
        stream.abort()

    @waits
    def test_a_signal_ends_a_long_turn_after_5_seconds(self, serve):
        server = serve("--chunk-delay", "0.02")
        session = new_id()
        readers = [server.chat(LONG, session_id=session), server.follow(session)]
        readers[0].read_until("chunk")
        server.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        assert wait_until(lambda: not self.serves(server), 3), "still accepts connections"
        for stream in readers:
            assert stream.check().end["code"] == "server_shutdown"
        assert 4 < time.monotonic() - signalled < 8
        assert server.process.wait(PATIENCE) == 0

    @waits
    def test_what_cannot_be_served_is_refused_with_reload_too(self):
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as taken:
            for flags in [("--db", folder, "--port", "0"), ("--port", str(taken.getsockname()[1]))]:
                said = self.refuse("--reload", *flags)
                assert flags[1] in said and "\n" not in said

    def serves(self, server):
        try:
            return bool(server.get("/health"))
        except (OSError, Cut):
            return False


# ---- The stream

SPACES = "".join(character for character in map(chr, range(0x110000)) if character.isspace())
TEXTS = [
    ("one letter", "x"),
    ("every kind of white space", "a" + "b".join(SPACES) + "c " + SPACES + "d"),
    ("white space at both ends", "\n\n \t first and last \r\n\n"),
    ("a run of white space longer than a chunk", "a" + " \n" * 5000 + "b"),
    ("markdown", "# Title\n\n* one\n    * two\n\n```python\ndef f():\n\treturn 1\n```\n\n"),
    ("emoji", "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd"),
    ("combining characters", "e\u0301 n\u0303 Z\u0351\u036b\u0343\u032aalgo \u0915\u094d\u0937\u093f"),
    ("right to left", "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u202eabc\u202c \u2067x\u2069"),
    ("line separators", "a\u2028b\u2029c\u0085d\ve\ff\rg\x1ch\x1di\x1ej"),
    ("NUL and all other controls", "".join(map(chr, range(32))) + "x" + "".join(map(chr, range(127, 160)))),
    ("edges of Unicode", "\ufeff \ud7ff\ue000 \ufffd \ufffe\uffff \U00010000 \U0010ffff"),
    ("a very long word", "x" * 10_000),
    ("a very long word of emoji", "\U0001f600" * 9_999),
    ("a very long word of combining characters", "a" + "\u0301" * 9_999),
    ("100,000 characters", "0123456789" * 10_000),
    ("text that looks like JSON", '","is_final":true}\n{"type":"complete"}\n\\u0041 \\n \\" \\'),
    ("text that looks like transfer chunks", "5\r\nhello\r\n0\r\n\r\nHTTP/1.1 400 Bad Request\r\n\r\n"),
    ("text that looks like a format", "%s %d %(x)s %% {} {0} {x} $x \\1"),
    ("text that looks like HTML", "<script>alert('x')</script> &amp; <!-- -->"),
]


def chat_request(body, *fields, **kind):
    return http_request("POST", "/chat/stream", *fields, body=body, **kind)


def request_head(*lines):
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def long_line(size):
    """A request line of so many bytes, its CRLF included."""
    return f"GET /health?{'x' * (size - 23)} HTTP/1.1"


def long_head(size):
    """A head of so many bytes, its last empty line included."""
    return http_request("GET", "/health", "X: " + "x" * (size - len(http_request("GET", "/health", "X: "))))


def parts_of(raw, count):
    """The same bytes one by one, or in so many parts where they are more."""
    size = len(raw) // count + 1
    return [raw[start:start + size] for start in range(0, len(raw), size)]


HI = b'{"message":"Hi"}'
GOOD_REQUESTS = [
    ("JSON", chat_request({"message": "Hi"}, "Content-Type: application/json")),
    ("JSON with a charset", chat_request({"message": "Hi"}, "Content-Type: Application/JSON; charset=UTF-8")),
    ("curl's type", chat_request({"message": "Hi"}, "Content-Type: application/x-www-form-urlencoded", "Accept: */*")),
    ("no type", chat_request({"message": "Hi"})),
    ("any Accept", chat_request({"message": "Hi"}, "Accept: text/html")),
    ("raw UTF-8", chat_request('{"message":"na\u00efve \U0001f600 \u2028"}'.encode())),
    ("escapes", chat_request(rb'{"message":"na\u00efve \ud83d\ude00 \u2028 \u0000"}')),
    ("white space around JSON", chat_request(b' \r\n\t{ "message" : "Hi" }\n')),
    ("unknown fields", chat_request({"message": "Hi", "temperature": 1.5, "more": [{"session_id": 5}, None]})),
    ("ids that are null", chat_request({"message": "Hi", "session_id": None, "turn_id": None})),
    ("names in any case", chat_request({"message": "Hi"}, "cOnTeNt-TyPe:application/json \t", "X-Empty:")),
    ("HTTP/1.0", chat_request({"message": "Hi"}, version="HTTP/1.0")),
    ("no body", http_request("GET", "/health")),
    ("no body where it is optional", http_request("POST", "/sessions/new")),
    ("an empty body where it is optional", http_request("POST", "/sessions/new", body=b"")),
    ("a query", http_request("GET", "/sessions?after=1")),
    ("an empty line first", b"\r\n" + chat_request({"message": "Hi"})),
    ("two empty lines first", b"\r\n\r\n" + http_request("GET", "/health")),
    ("HTTP/1.2", chat_request({"message": "Hi"}, version="HTTP/1.2")),
    ("HTTP/1.9", http_request("GET", "/health", version="HTTP/1.9")),
    ("HTTP/1.0 without Host", request_head("GET /health HTTP/1.0")),
    ("HTTP/1.0 does not know Expect", chat_request({"message": "Hi"}, "Expect: 100-continue", version="HTTP/1.0")),
    *((f"Host: {host}", request_head("GET /health HTTP/1.1", f"Host:{host}")) for host in (
        " localhost:8000", "LocalHost:", "127.0.0.1\t", " \t127.1.2.3:65535 ", "[::1]", "[::1]:80")),
    *((f"target {target}", http_request("GET", target)) for target in (
        "http://localhost/health", "HTTP://LocalHost:8000/health?x", "https://[::1]:443/health", "http://localhost",
        "/health?a/b?c:@!$&'()*+,;=%20~\"<>[]^`{|}\\")),
    ("absolute form of a stream", http_request("POST", "http://localhost/chat/stream", body={"message": "Hi"})),
    ("absolute form goes before Host", request_head("GET http://localhost/health HTTP/1.1", "Host: chat.example.com")),
    *((f"Content-Length:{length[:20]}", http_request("POST", "/chat/stream", f"Content-Length:{length}") + HI)
      for length in ("16", " 00000016", f" {'16':0>5000}", "\t 16 \t")),
    ("names that look like a length", http_request("GET", "/health", "Content_Length: 5", "Transfer_Encoding: chunked",
                                                   "X-Content-Length: 5", "TE: chunked", "Trailer: Content-Length")),
    ("a body on GET", http_request("GET", "/health", body=chat_request({"message": "Hi"}))),
    ("a body on OPTIONS", http_request("OPTIONS", "/health", body=chat_request({"message": "Hi"}))),
    ("high bytes and a tab", request_head("GET /health HTTP/1.1", "Host: localhost", "X:\x80\xa0\xff\t\xe9 \t")),
    ("options that are not close", chat_request({"message": "Hi"}, "Connection: close-x, xclose", "X: close")),
    ("an upgrade", http_request("GET", "/health", "Connection: Upgrade", "Upgrade: h2c", "HTTP2-Settings: AA")),
    ("a request line of 8 KiB", request_head(long_line(8192), "Host: localhost")),
    ("a head of 32 KiB", long_head(32_768)),
    ("100 fields", http_request("GET", "/health", *["X: x"] * 99)),
]


class TestTheStream:
    """Lines of NDJSON in transfer chunks (RFC 8259; RFC 9112, section 7.1). `check_turn` holds the rules."""

    @core
    @cases(TEXTS)
    def test_the_texts_of_all_chunks_joined_are_the_answer_character_for_character(self, fast, case):
        _, text = case
        session = new_id()
        turn = fast.turn(text, session_id=session)
        assert fast.history(session) == [("user", text), ("model", turn.text)]

    @strict
    @pytest.mark.parametrize("count", [1, 1000], ids=["whole", "byte by byte"])
    @cases(GOOD_REQUESTS)
    def test_a_good_request_is_served_once_however_it_arrives(self, fast, case, count):
        _, raw = case
        connection = fast.connect()
        for part in parts_of(raw, count):
            connection.send(part)
        connection.socket.shutdown(socket.SHUT_WR)
        if b"/chat/stream" not in raw.lstrip().partition(b"\r\n")[0]:
            assert fast.response(connection, close=False).status in (200, 204)
        elif b"HTTP/1.0\r\n" in raw:
            check_turn(Stream(connection, fast.pace, "close", None).read().lines, **fast.pace)
        else:
            check_turn(Stream(connection, fast.pace).read().lines, **fast.pace)
        assert connection.at_end()
        connection.close()

    @strict
    def test_a_body_of_2_mib_is_read(self, fast):
        body = b'{"message":"Hi"' + b" " * (2**21 - 16) + b"}"
        assert fast.request("POST", "/chat/stream", body).status == 200

    @core
    def test_a_turn_without_ids_gets_ids(self, fast):
        info = fast.turn("Hi").info
        assert str(uuid.UUID(info["session_id"], version=4)) == info["session_id"]
        assert info["turn_id"] != fast.turn("Hi").info["turn_id"]

    @core
    def test_a_session_id_may_be_the_clients_own(self, fast):
        for session in (uuid.uuid4().hex, "A-Za-z0-9_" + new_id(), "x" * 32 + new_id()):
            turn = fast.turn("Hi", session_id=session, turn_id="_-" + session[2:])
            assert (turn.info["created"], fast.session(session)["message_count"]) == (True, 2)

    @sessions
    def test_created_says_whether_this_post_made_the_session(self, fast):
        first, second = new_id(), new_id()
        assert fast.request("POST", "/sessions/new", {"session_id": second}).status == 200
        made = [fast.turn("Hi", session_id=session).info["created"] for session in (first, first, second)]
        assert made == [True, False, False]

    @core
    def test_the_path_may_name_the_session_instead_of_the_body(self, fast):
        session = new_id()
        path, request = f"/sessions/{session}/stream", {"message": "Hi", "turn_id": "t"}
        turn = fast.open("POST", path, request).check(message="Hi", session_id=session, turn_id="t")
        assert turn.info["created"] and fast.history(session) == [("user", "Hi"), ("model", turn.text)]
        for body in (request | {"session_id": session}, request | {"session_id": None}):
            again = fast.open("POST", path, body).check(message="Hi", session_id=session, turn_id="t")
            assert (again.info, again.end) == (turn.info, turn.end)
        assert fast.turn(**request, session_id=session).info == turn.info
        check_problem(fast.request("POST", path, request | {"message": "x"}), 409, "turn_id_reused")

    @core
    def test_every_turn_sees_the_messages_before_it(self, fast):
        session = new_id()
        for count in range(0, 8, 2):
            turn = fast.turn("Hello", session_id=session)
            assert (turn.status["context_messages"], turn.end["message_count"]) == (count, count + 2)
            assert not count or re.search(rf"\b{count}\b", turn.text), "the offline model counts the messages before"
        assert fast.turn("Hello").status["context_messages"] == 0

    @core
    def test_who_has_read_complete_may_send_the_next_turn_at_once(self, fast):
        session = new_id()
        for count in range(0, 60, 2):
            stream = fast.chat("Hello", session_id=session)
            assert stream.read_until("complete")["message_count"] == count + 2
            now = fast.session(session)
            assert (now["message_count"], now["streaming"]) == (count + 2, False)

    @strict
    def test_the_connection_serves_on_after_a_stream(self, fast):
        connection = fast.connect()
        for _ in range(3):
            connection.send(chat_request({"message": "Hi"}))
            check_turn(list(connection.lines(connection.read_head())), message="Hi", **fast.pace)
        connection.send(http_request("GET", "/health"))
        assert fast.response(connection).status == 200

    @strict
    def test_pipelined_requests_are_answered_in_order(self, fast):
        """RFC 9112, section 9.3.2."""
        connection = fast.connect()
        connection.send(chat_request({"message": "first"}) + b"\r\n" + http_request("GET", "/health")
                        + http_request("GET", "/nope") + chat_request({"message": "second"}))
        check_turn(list(connection.lines(connection.read_head())), message="first", **fast.pace)
        assert fast.response(connection, close=False).json["status"] == "healthy"
        check_problem(fast.response(connection, close=False), 404, "not_found")
        Stream(connection, fast.pace).check(message="second")

    @strict
    @pytest.mark.parametrize("version, fields, coding", [
        ("HTTP/1.1", ["Connection: close"], "chunked"), ("HTTP/1.1", ["Connection: Close"], "chunked"),
        ("HTTP/1.1", ["Connection: keep-alive, Close"], "chunked"), ("HTTP/1.1", ["Connection: close,x"], "chunked"),
        ("HTTP/1.1", ["Connection: ,\t, close ,"], "chunked"),
        ("HTTP/1.1", ["Connection: x", "Connection: close"], "chunked"),
        ("HTTP/1.0", [], None), ("HTTP/1.0", ["Connection: keep-alive"], None),
    ])
    def test_who_asks_for_close_or_speaks_http_1_0_sees_the_connection_close(self, fast, version, fields, coding):
        """RFC 9112, sections 6.1 and 9.6: to HTTP/1.0, which knows no transfer coding, the end is the connection's."""
        connection = fast.connect()
        connection.send(chat_request({"message": "Hi"}, *fields, version=version))
        stream = Stream(connection, fast.pace, "close", coding).read()
        assert connection.at_end()
        stream.check(message="Hi")


# ---- Pace

class TestPace:
    """`check_turn` holds the words of a chunk and the time between chunks against the server's flags."""

    @waits
    def test_the_flags_set_the_pace(self, serve):
        message = "one  two\tthree\nfour five,six " * 4
        for words, delay in [(1, 0.05), (3, 0.01), (50, 0.1), (1, 0.0012345)]:
            turn = serve("--chunk-words", str(words), "--chunk-delay", str(delay)).turn(message)
            assert max(len(chunk["text"].split()) for chunk in turn.chunks) == min(words, len(turn.text.split()))
            times = [moment(chunk["timestamp"]) for chunk in turn.chunks if chunk["text"]]
            gaps = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(times)]
            assert min(gaps, default=delay) >= delay, "the pace is exact to the microsecond"

    @waits
    def test_no_chunk_leaves_before_its_timestamp_or_long_after(self, serve):
        stream = serve("--chunk-delay", "0.02").chat("word " * 100).read(2)
        while (event := event_of(stream.read(1).lines[-1]))["type"] == "chunk":
            late = time.time() - moment(event["timestamp"]).timestamp()
            assert -0.001 < late < 1
        stream.check(message="word " * 100)

    def test_no_delay_turns_the_pace_off(self, own):
        turn = own("--chunk-delay", "0").turn("word " * 4000)
        assert len(turn.chunks) > 1000 and turn.end["processing_time"] < 5

    def test_the_first_chunk_does_not_wait_and_a_stop_does_not_either(self, own):
        server, session = own(*SILENT), new_id()
        began = time.monotonic()
        stream = server.chat("word " * 100, session_id=session)
        stream.read_until("chunk")
        assert server.stop(session)
        assert len(stream.check().chunks) == 2
        assert time.monotonic() - began < 1.5, "something waited for the pace of 3 s"


# ---- Turns and their states

SILENT = ("--chunk-delay", "3", "--heartbeat", "0.3", "--resume-window", "0.5")


class TestTurns:
    """A turn runs, and completes or fails, once. It runs apart from its readers, and a stop ends it."""

    @core
    def test_a_running_turn_is_seen_and_then_complete(self, server):
        session = new_id()
        stream = server.chat(LONG, session_id=session, turn_id="t")
        number = stream.read_until("chunk", 3)["chunk_number"]
        turn = server.session(session)["latest_turn"]
        check_fields(turn, "turn_id:id state:text message:text started:time chunks:count")
        assert (turn["turn_id"], turn["state"], turn["message"]) == ("t", "running", LONG)
        assert turn["chunks"] >= number
        assert server.session(session)["streaming"] and server.history(session) == []
        server.stop(session)
        chunks = len(stream.check().chunks)
        assert server.session(session)["latest_turn"] == turn | {"state": "complete", "chunks": chunks}
        assert not server.session(session)["streaming"]

    @core
    def test_one_turn_at_a_time(self, server):
        session = new_id()
        stream = server.chat(LONG, session_id=session, turn_id="t").read(2)
        for turn_id in (None, "u"):
            busy = server.request("POST", "/chat/stream", {"message": "Hi", "session_id": session, "turn_id": turn_id})
            detail = check_problem(busy, 409, "session_busy")["detail"]
            assert "curl" in detail and f"/sessions/{session}/stop" in detail
        server.stop(session)
        stream.check()
        assert server.turn("Hi", session_id=session).status["context_messages"] in (0, 2)

    @core
    def test_a_stop_ends_the_turn_with_what_had_left_as_chunks(self, server):
        session = new_id()
        readers = [server.chat(LONG, session_id=session), server.follow(session)]
        readers[0].read_until("chunk", 5)
        assert server.stop(session)
        turns = [stream.check() for stream in readers]
        assert turns[0] == turns[1] and turns[0].end["finish_reason"] == "cancelled"
        assert 5 <= len(turns[0].chunks) < 200
        assert server.history(session) == [("user", LONG), ("model", turns[0].text)]
        assert not server.stop(session), "the second stop finds nothing"
        assert server.turn("Hi", session_id=session).status["context_messages"] == 2

    @core
    def test_a_stop_may_name_the_turn_and_ends_no_other(self, server):
        session = new_id()
        stream = server.chat(LONG, session_id=session, turn_id="t").read(4)
        assert not server.stop(session, turn_id="another")
        assert stream.read(10) and server.stop(session, turn_id="t")
        assert stream.check().end["finish_reason"] == "cancelled"
        stream = server.chat(LONG, session_id=session, turn_id="u").read(4)
        assert not server.stop(session, turn_id="t"), "a late stop ends the next turn"
        assert server.stop(session, turn_id=None)
        assert stream.check().end["finish_reason"] == "cancelled"

    @sessions
    def test_a_stop_finds_nothing_before_a_turn_and_after_it(self, server):
        session = new_id()
        server.request("POST", "/sessions/new", {"session_id": session})
        assert not server.stop(session)
        turn = server.turn("Hi", session_id=session, turn_id="t")
        assert not server.stop(session, turn_id="t") and not server.stop(session)
        assert server.follow(session).check() == turn

    @sessions
    def test_a_stop_may_come_before_the_first_line_is_read(self, server):
        def stop_early(session):
            server.request("POST", "/sessions/new", {"session_id": session})
            connection = server.connect()
            connection.send(chat_request({"message": LONG, "session_id": session}))
            assert wait_until(lambda: server.stop(session))
            turn = Stream(connection, server.pace).check()
            assert turn.end["finish_reason"] == "cancelled"
            check_history(server, session, LONG, turn)
        in_parallel(stop_early, [new_id() for _ in range(24)])

    @sessions
    def test_a_stop_and_the_end_may_race_but_one_of_them_wins(self, server):
        message, chance = "six words are three chunks, no", random.Random(1)
        takes = server.turn(message).end["processing_time"]
        before = server.stats()

        def race(late):
            session = new_id()
            stream = server.chat(message, session_id=session)
            time.sleep(takes + late)
            stops = in_parallel(lambda _: server.stop(session), range(2), workers=2)
            turn = stream.check(message=message)
            assert sum(stops) == (turn.end["finish_reason"] == "cancelled"), "only who stopped it is told so"
            assert server.follow(session).check() == turn
            check_history(server, session, message, turn)
        in_parallel(race, [chance.uniform(-0.03, 0.003) for _ in range(100)])
        check_balance(before, server.stats(), turns=100, failed=0)

    @sessions
    def test_any_number_of_readers_may_follow(self, server):
        session = new_id()
        readers = [server.chat("word " * 100, session_id=session)]
        for _ in range(4):
            readers[0].read(5)
            readers.append(server.follow(session))
        assert wait_until(lambda: server.readers(session) == [5])
        assert len({b"".join(stream.read().lines) for stream in readers}) == 1
        readers[0].check(message="word " * 100)

    def test_a_slow_reader_holds_back_nobody(self, own):
        server = own("--chunk-words", "1", "--chunk-delay", "0")
        request = {"message": "\U0001f600 " * 50_000, "session_id": new_id(), "turn_id": "t"}
        slow = server.connect(receive_buffer=4096)
        slow.send(chat_request(request))            # the answer is 6 MB: more than any socket buffers
        quick = server.chat(**request).read()
        assert server.turn("Hi").end["finish_reason"] == "stop"
        assert not server.session(request["session_id"])["streaming"], "the turn waits for its slow reader"
        assert server.get("/health")["streaming_connections"] == 1, "the slow reader was not slow"
        assert Stream(slow, server.pace).read(100).lines == quick.lines[:100]
        slow.abort()
        quick.check(**request)

    @sessions
    @pytest.mark.parametrize("method, path, code", [
        ("POST", "/clear", "session_cleared"), ("DELETE", "", "session_deleted")])
    def test_clear_and_delete_end_the_turn_with_an_error_and_keep_nothing(self, server, method, path, code):
        session, before = new_id(), server.stats()
        server.turn("Hi", session_id=session)
        readers = [server.chat(LONG, session_id=session, turn_id="t"), server.follow(session)]
        readers[0].read(4)
        response = server.request(method, f"/sessions/{session}{path}")
        check_fields(response.json, "message:text")
        check_balance(before, server.stats(), turns=2, failed=1)
        if path:
            now = server.session(session)
            assert (now["messages"], now["latest_turn"], now["streaming"]) == ([], None, False)
            check_problem(server.request("GET", f"/sessions/{session}/stream"), 404, "no_turn")
        else:
            check_problem(server.request("GET", f"/sessions/{session}"), 404, "session_not_found")
        again = server.turn("Another message", session_id=session, turn_id="t")
        assert (again.info["created"], again.status["context_messages"]) == (not path, 0), "its turn_id is free again"
        for stream in readers:
            assert stream.check().end["code"] == code

    @sessions
    def test_the_totals_balance_under_any_mix(self, server):
        before, done = server.stats(), threading.Event()

        def visit(seed):
            chance, session = random.Random(seed), new_id()
            stream = server.chat("word " * chance.randrange(1, 80), session_id=session).read(chance.randrange(2, 6))
            if seed % 5 == 0:
                stream.abort()
                return "left"
            end = [None, ("POST", "/stop"), ("POST", "/clear"), ("DELETE", "")][seed % 5 - 1]
            if end:
                assert server.request(end[0], f"/sessions/{session}{end[1]}").status == 200
            return stream.check().end["type"]

        def watch():
            while not done.is_set():
                check_balance(before, server.stats())
        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            try:
                ends = in_parallel(visit, range(100), workers=10)
            finally:
                done.set()
            watching.result()
        assert wait_until(lambda: not server.stats()["streams"])
        check_balance(before, server.stats(), turns=100, failed=ends.count("error"))


def check_history(server, session, message, turn):
    """A first turn's history is the message and the joined chunks, or nothing where no text had left."""
    kept = [("user", message), ("model", turn.text)] if turn.text else []
    assert server.history(session) == kept and turn.end["message_count"] == len(kept)


def check_balance(before, after, turns=None, failed=None):
    running = after["total_requests"] - after["successful_requests"] - after["failed_requests"]
    assert running >= 0 and running == len(after.get("streams", range(running)))
    if turns is not None:
        assert after["total_requests"] - before["total_requests"] == turns
        assert after["failed_requests"] - before["failed_requests"] == failed


# ---- Cut connections

@core
class TestCutConnections:
    """A lost connection is not a stop: resume reads on, a retry is the same POST again, and the turn runs once."""

    def test_a_cut_at_any_byte_loses_nothing(self, farm):
        server = farm("--chunk-delay", "0.005", "--chunk-words", "6", "--log", "off")
        request = {"message": "Hi there", "session_id": new_id(), "turn_id": new_id()}
        probe = server.connect()
        probe.send(chat_request(request, "Connection: close"))
        size = len(probe.file.read())

        def cut(position):
            request = {"message": "Hi there", "session_id": new_id(), "turn_id": new_id()}
            connection = server.connect(cut_after=position)
            connection.send(chat_request(request))
            with contextlib.suppress(Cut):
                seen = []
                for line in connection.lines(connection.read_head()):
                    seen.append(line)
            connection.abort()
            if position % 2:        # resume after every other byte, retry after the others
                chunks = [line for line in seen if event_of(line)["type"] == "chunk"]
                lines = server.follow(request["session_id"], after=len(chunks)).read().lines
                lines[2:2] = chunks
                assert lines[:len(seen)] == seen
            else:
                lines = server.chat(**request).read().lines
                assert lines[:len(seen)] == seen
            turn = check_turn(lines, **request, **server.pace)
            check_history(server, request["session_id"], request["message"], turn)

        before, positions = server.counters(), range(1, size)
        in_parallel(cut, positions, workers=16)
        check_balance(before, server.counters(), turns=len(positions), failed=0)

    def test_a_request_cut_before_its_answer_may_be_sent_again(self, server):
        def cut(_):
            request = {"message": "Hi", "session_id": new_id(), "turn_id": "t"}
            connection = server.connect()
            connection.send(chat_request(request))
            connection.abort()
            check_history(server, request["session_id"], "Hi", server.turn(**request))
        in_parallel(cut, range(20))

    def test_a_resumed_stream_is_the_same_bytes_without_chunks_1_to_n(self, fast):
        session = new_id()
        first = fast.chat("one two three four five six seven eight", session_id=session).read().lines
        *head, end = first[:2], first[-1:]
        chunks = first[2:-1]
        for after in (None, *range(len(chunks) + 3), "007", 999_999_999):
            stream = fast.follow(session, after).read()
            assert stream.lines == head[0] + chunks[int(after or 0):] + end
            stream.check(after=int(after or 0))

    def test_a_resume_goes_on_live_and_leaves_out_chunks_still_to_come(self, server):
        session = new_id()
        stream = server.chat(LONG, session_id=session).read(5)
        late = {after: server.follow(session, after) for after in (0, 1, 3, 8, 999_999_999)}
        stream.read_until("chunk", 12)
        server.stop(session)
        lines = stream.read().lines
        for after, reader in late.items():
            assert reader.read().lines == lines[:2] + lines[2:-1][after:] + lines[-1:]
            reader.check(after=after)

    @waits
    def test_a_resume_beyond_what_exists_gets_the_next_chunk_when_it_is_due(self, serve):
        server = serve("--chunk-delay", "0.4")
        stream = server.chat("word " * 30, session_id="s")
        stream.read_until("chunk", 2)
        late = server.follow("s", after=4).read(2)
        event = late.read_until("chunk")
        assert event["chunk_number"] == 5 and time.time() - moment(event["timestamp"]).timestamp() < 0.3

    @pytest.mark.parametrize("running", [True, False], ids=["running", "complete"])
    def test_a_retry_follows_the_latest_turn_from_its_first_line(self, server, running):
        request = {"message": "word " * 60, "session_id": new_id(), "turn_id": "t"}
        before = server.counters()
        first = server.chat(**request).read(5 if running else None)
        retries = [server.chat(**request) for _ in range(2)]
        turn = first.check(**request)
        for retry in retries:
            assert retry.check(**request) == turn and retry.lines == first.lines
        after = server.counters()
        check_balance(before, after, turns=1, failed=0)
        assert OUTSIDE or after["total_chunks"] - before["total_chunks"] == len(turn.chunks)
        check_history(server, request["session_id"], request["message"], turn)

    def test_a_retry_of_an_older_turn_is_the_same_bytes_even_while_another_runs(self, server):
        session = new_id()
        old = {"message": "word " * 200, "session_id": session, "turn_id": "old"}
        stopped = {"message": LONG, "session_id": session, "turn_id": "stopped"}
        first, second = server.chat(**old).read(), server.chat(**stopped).read(5)
        server.stop(session)
        second.read()
        latest = server.chat(LONG, session_id=session, turn_id="latest").read(3)
        before = server.counters()
        for request, stream in ((old, first), (stopped, second)):
            began = time.monotonic()
            again = server.chat(**request).read()
            assert again.lines == stream.lines
            assert time.monotonic() - began < 0.8, "a log that is kept has no pace"
            again.check(**request)
        after = server.counters()
        assert [after.get(name) for name in COUNTERS] == [before.get(name) for name in COUNTERS]
        assert len(server.history(session)) == 4
        server.stop(session)
        assert latest.check(turn_id="latest").status["context_messages"] == 4

    def test_a_turn_id_with_another_message_is_refused_before_session_busy(self, server):
        session = new_id()
        server.turn("first", session_id=session, turn_id="old")
        latest = server.chat(LONG, session_id=session, turn_id="latest").read(2)
        for turn_id in ("old", "latest"):
            reused = server.request("POST", "/chat/stream", {"message": "x", "session_id": session, "turn_id": turn_id})
            check_problem(reused, 409, "turn_id_reused")
        server.stop(session)
        latest.check()
        reused = server.request("POST", "/chat/stream", {"message": "x", "session_id": session, "turn_id": "latest"})
        check_problem(reused, 409, "turn_id_reused")
        assert server.turn("x", session_id=new_id(), turn_id="old").info["created"], "a turn_id is its session's alone"

    def test_resume_follows_the_latest_turn(self, fast):
        session = new_id()
        for message in ("first", "second"):
            turn = fast.turn(message, session_id=session)
            assert fast.follow(session).check() == turn

    @waits
    def test_a_log_is_kept_with_the_history_and_without_text_until_the_next_turn(self, serve):
        server = serve(*BRISK, "--model", "test_protocol:silent_or_echo", PYTHONPATH=str(SERVER.parent))
        kept = {"message": "Hi", "session_id": "s", "turn_id": "kept"}
        silent = {"message": "silent", "session_id": "s", "turn_id": "silent"}
        first, second = server.chat(**kept).read(), server.chat(**silent).read(2)
        assert server.stop("s")
        second.read()
        time.sleep(1)       # longer than the resume window
        before = server.counters()
        for request, stream in ((kept, first), (silent, second)):
            assert server.chat(**request).read().lines == stream.lines
            reused = server.request("POST", "/chat/stream", request | {"message": "x"})
            check_problem(reused, 409, "turn_id_reused")
        assert server.follow("s").read().lines == second.lines
        check_balance(before, server.counters(), turns=0, failed=0)
        assert server.turn("Hello", session_id="s").status["context_messages"] == 2
        assert server.chat(**kept).read().lines == first.lines
        assert server.turn("free again", session_id="s", turn_id="silent").end["message_count"] == 6

    @waits
    def test_a_turn_that_nobody_reads_is_cancelled_after_the_window(self, serve):
        server, session = serve(*BRISK), new_id()
        stream = server.chat(LONG, session_id=session).read(4)
        stream.abort()
        left = time.monotonic()
        assert wait_until(lambda: not server.session(session)["streaming"])
        assert 0.6 < time.monotonic() - left < 3
        turn = server.follow(session).check()
        assert turn.end["finish_reason"] == "cancelled"
        check_history(server, session, LONG, turn)

    @waits
    def test_a_reader_that_comes_back_in_time_keeps_the_turn_running(self, serve):
        server, session = serve(*BRISK), new_id()
        server.chat(LONG, session_id=session).read(4).abort()
        time.sleep(0.3)
        back = server.follow(session, after=2).read_until("chunk", 1)
        assert back["chunk_number"] == 3
        for _ in range(3):
            stream = server.follow(session)
            time.sleep(0.5)
            stream.abort()
        assert server.session(session)["streaming"]

    @waits
    def test_a_silent_reader_that_left_is_noticed_by_pings(self, serve):
        server, session = serve(*SILENT), new_id()
        server.chat("word " * 40, session_id=session).read(3).abort()
        left = time.monotonic()
        assert wait_until(lambda: not server.session(session)["streaming"])
        assert 0.4 < time.monotonic() - left < 2.5, "two pings of 0.3 s and a window of 0.5 s"

    @waits
    def test_pings_come_in_a_silence_and_are_no_part_of_the_log(self, serve):
        server, session = serve(*SILENT), new_id()
        stream = server.chat("six words are two chunks, no?", session_id=session)
        stream.read_until("chunk", 2)
        assert 5 <= len(stream.connection.pings) <= 10
        for event in stream.connection.pings:
            check_fields(event, EVENTS["ping"])
        server.stop(session)
        again = server.follow(session).read()
        assert again.lines == stream.read().lines and not again.connection.pings

    @waits
    def test_a_client_that_closed_its_sending_half_is_still_served(self, serve):
        server = serve(*BRISK)
        stream = server.chat("word " * 400)
        stream.connection.socket.shutdown(socket.SHUT_WR)
        assert stream.check(message="word " * 400).end["processing_time"] > 1.5

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count threads and descriptors")
    @waits
    def test_nothing_leaks(self, serve):
        server = serve("--chunk-delay", "0.002", "--resume-window", "0.3", "--log", "off")
        folders = [Path(f"/proc/{server.process.pid}", name) for name in ("task", "fd")]
        server.turn("Hi")
        time.sleep(0.1)
        at_first = [len(list(folder.iterdir())) for folder in folders]

        def visit(seed):
            session = new_id()
            connection = server.connect(cut_after=random.Random(seed).randrange(1, 2000) if seed % 2 else None)
            connection.send(chat_request({"message": "word " * 30, "session_id": session}))
            with contextlib.suppress(Cut):
                list(connection.lines(connection.read_head()))
            connection.abort()
        in_parallel(visit, range(300), workers=16)
        assert wait_until(lambda: server.stats()["streams"] == [])
        assert wait_until(lambda: [len(list(folder.iterdir())) for folder in folders] <= at_first)
        stats = server.stats()
        assert (stats["streams"], stats["streaming_connections"], stats["successful_requests"]) == ([], 0, 301)


BRISK = ("--chunk-delay", "0.02", "--heartbeat", "0.3", "--resume-window", "0.7")
COUNTERS = ("total_requests", "successful_requests", "failed_requests", "total_chunks")


# ---- Sessions and the other endpoints

ROUTES = [              # path, what it knows beside OPTIONS
    ("/", "GET HEAD"), ("/health", "GET HEAD"), ("/stats", "GET HEAD"), ("/openapi.json", "GET HEAD"),
    ("/demo", "GET HEAD"), ("/docs", "GET HEAD"), ("/chat/stream", "POST"), ("/sessions", "GET HEAD"),
    ("/sessions/new", "POST"), ("/sessions/{session_id}", "GET HEAD DELETE"),
    ("/sessions/{session_id}/stream", "GET HEAD POST"), ("/sessions/{session_id}/stop", "POST"),
    ("/sessions/{session_id}/clear", "POST"),
]
DESCRIBED = [route for route in ROUTES if not (OUTSIDE and route[0] in ("/demo", "/docs"))]
STREAMS = [("post", "/chat/stream"), *((method, "/sessions/{session_id}/stream") for method in ("get", "post"))]
HEALTH = ("status:text model:text uptime_seconds:count total_requests:count successful_requests:count "
          "failed_requests:count active_sessions:count streaming_connections:count")
STATS = HEALTH + (" average_response_time:number start_time:time total_sessions_created:count total_chunks:count "
                  "total_bytes:count average_chunks_per_stream:number time_to_first_chunk:object streams:list "
                  "framework:text")
RUNNING = "session_id:id turn_id:id started:time chunks:count readers:count client:text"
LISTED = ("session_id:id model:text message_count:count duration_minutes:number created_at:time last_activity:time "
          "streaming:flag")
SESSION = ("session_id:id model:text message_count:count user_messages:count model_messages:count "
           "session_duration_seconds:number created_at:time last_activity:time streaming:flag messages:list "
           "latest_turn:object?")
MESSAGE = "role:text text:text timestamp:time turn_id:id"


def allowed(response):
    return set(re.split(r"\s*,\s*", response.headers["allow"])) - {"OPTIONS"}


class TestSessionsAndTheOtherEndpoints:
    """One table of routes, exactly the fields named; HEAD, OPTIONS and 405 after RFC 9110, sections 9.3 and 15.5.6."""

    @strict
    @cases(ROUTES)
    def test_options_tells_what_a_route_knows_and_all_else_is_405(self, fast, case):
        path, known = case[0].replace("{session_id}", "nobody"), set(case[1].split())
        response = fast.request("OPTIONS", path)
        assert (response.status, allowed(response)) == (204, known)
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE"} - known:
            response = fast.request(method, path)
            assert (response.status, allowed(response)) == (405, known)
            if method != "HEAD":
                check_problem(response, 405, "method_not_allowed")

    @sessions
    @cases([route for route in ROUTES if "HEAD" in route[1]])
    def test_head_is_get_without_the_body(self, fast, case):
        session = new_id()
        fast.turn("Hi", session_id=session)
        path = case[0].replace("{session_id}", session)
        get = fast.request("GET", path)
        connection = fast.connect()
        connection.send(http_request("HEAD", path) + http_request("GET", "/health"))
        head = fast.response(connection, "HEAD", close=False)
        assert (head.status, head.headers["content-type"]) == (get.status, get.headers["content-type"])
        if head.headers.get("connection") != "close":
            assert fast.response(connection).json["status"] == "healthy"

    @sessions
    def test_head_on_a_stream_is_no_reader(self, server):
        session = new_id()
        server.chat(LONG, session_id=session).read(3).abort()
        assert wait_until(lambda: server.readers(session) == [0])
        response = server.request("HEAD", f"/sessions/{session}/stream?after=1")
        assert (response.status, response.headers["content-type"]) == (200, "application/x-ndjson")
        assert server.readers(session) == [0]

    @sessions
    def test_the_root_lists_every_route(self, fast):
        root = fast.get("/")
        check_fields(root, "name:text version:text framework:text model:text features:list endpoints:object")
        listed = {endpoint.partition("?")[0] for endpoint in root["endpoints"].values()}
        methods = {f"{method} {path}" for path, known in DESCRIBED for method in known.split() if method != "HEAD"}
        assert methods - {"GET /"} <= {re.sub(r"\{\w+\}", "{session_id}", endpoint) for endpoint in listed}

    @sessions
    def test_openapi_describes_every_route_and_both_streams(self, fast):
        api = fast.get("/openapi.json")
        assert re.fullmatch(r"3\.2\.\d+", api["openapi"]) and api["info"]["title"] and api["info"]["version"]
        for path, known in DESCRIBED:
            assert {method.lower() for method in known.split()} - {"head"} <= set(api["paths"][path])
        for method, path in STREAMS:
            assert api["paths"][path][method]["responses"]["200"]["content"]["application/x-ndjson"]["itemSchema"]

    @strict
    @cases(ROUTES)
    def test_no_answer_is_kept_by_a_cache(self, fast, case):
        path, session = case[0], new_id()
        fast.turn("Hi", session_id=session)
        for method in case[1].split():
            answer = fast.request(method, path.replace("{session_id}", session))
            stream = answer.headers["content-type"] == "application/x-ndjson"
            assert answer.headers["cache-control"] == ("no-cache" if stream else "no-store"), (method, answer)

    @sessions
    def test_a_new_session(self, fast):
        session, model = new_id(), fast.get("/health")["model"]
        for body, expected in [(None, {}), ({}, {}), ({"session_id": session}, {"session_id": session, "model": model}),
                               ({"model_id": "offline"}, {"model": "offline"})]:
            made = fast.request("POST", "/sessions/new", body).json
            check_fields(made, "session_id:id model:text timestamp:time")
            assert made | expected == made and fast.session(made["session_id"])["message_count"] == 0
            check_problem(fast.request("GET", f"/sessions/{made['session_id']}/stream"), 404, "no_turn")
        check_problem(fast.request("POST", "/sessions/new", {"session_id": session}), 409, "session_exists")

    @sessions
    def test_a_session_tells_its_messages(self, fast):
        session = new_id()
        turns = [fast.turn(f"Hello {n}", session_id=session, turn_id=f"turn-{n}") for n in range(2)]
        told = fast.session(session)
        check_fields(told, SESSION)
        for message in told["messages"]:
            check_fields(message, MESSAGE)
        counts = (told["message_count"], told["user_messages"], told["model_messages"], told["session_id"])
        assert counts == (4, 2, 2, session)
        assert [(message["role"], message["text"], message["turn_id"]) for message in told["messages"]] == [
            ("user", "Hello 0", "turn-0"), ("model", turns[0].text, "turn-0"),
            ("user", "Hello 1", "turn-1"), ("model", turns[1].text, "turn-1")]
        assert moment(told["created_at"]) <= moment(told["last_activity"])

    @sessions
    def test_sessions_are_listed_last_active_first(self, fast):
        ours = [new_id() for _ in range(3)]
        for session in ours:
            fast.turn("Hi", session_id=session)
        fast.turn("Hi", session_id=ours[0])
        told = fast.get("/sessions")
        check_fields(told, "active_sessions:count sessions:list")
        for session in told["sessions"]:
            check_fields(session, LISTED)
        assert told["active_sessions"] == len(told["sessions"]) == fast.get("/health")["active_sessions"]
        listed = {session["session_id"]: session["message_count"] for session in told["sessions"][:3]}
        assert list(listed.items()) == [(ours[0], 4), (ours[2], 2), (ours[1], 2)]

    @sessions
    def test_clear_forgets_the_messages_and_delete_the_session(self, fast):
        session = new_id()
        fast.turn("Hi", session_id=session, turn_id="t")
        check_fields(fast.request("POST", f"/sessions/{session}/clear").json, "message:text")
        assert fast.history(session) == [] and fast.session(session)["latest_turn"] is None
        assert fast.turn("Bye", session_id=session, turn_id="t").status["context_messages"] == 0
        check_fields(fast.request("DELETE", f"/sessions/{session}").json, "message:text")
        check_problem(fast.request("DELETE", f"/sessions/{session}"), 404, "session_not_found")
        assert fast.turn("Hi", session_id=session).info["created"]

    @sessions
    def test_health_and_stats_count_turns(self, fast):
        before = fast.stats()
        turn = fast.turn("Hello " * 20)
        after = fast.stats()
        check_fields(after, STATS)
        check_fields(after["time_to_first_chunk"], "p50:number p95:number")
        check_fields(fast.get("/health"), HEALTH)
        grown = {name: after[name] - before[name] for name in (*COUNTERS, "total_sessions_created", "active_sessions")}
        assert grown == dict.fromkeys(grown, 1) | {"failed_requests": 0, "total_chunks": len(turn.chunks)}
        assert after["total_bytes"] > before["total_bytes"] and after["start_time"] == before["start_time"]
        assert after["average_response_time"] > 0 and after["average_chunks_per_stream"] > 0

    @sessions
    def test_stats_have_an_entry_for_each_running_turn(self, server):
        session = new_id()
        stream = server.chat(LONG, session_id=session, turn_id="t").read(4)
        entry, = server.stats()["streams"]
        check_fields(entry, RUNNING)
        assert (entry["session_id"], entry["turn_id"], entry["readers"]) == (session, "t", 1) and entry["chunks"] >= 2
        assert server.get("/health")["streaming_connections"] == 1
        assert [s["streaming"] for s in server.get("/sessions")["sessions"] if s["session_id"] == session] == [True]
        server.stop(session)
        stream.check()
        assert server.stats()["streams"] == []

    def test_before_the_first_turn_averages_are_0(self, serve):
        stats = serve().stats()
        check_fields(stats, STATS)
        assert [stats[name] for name in COUNTERS] == [0, 0, 0, 0]
        assert (stats["average_response_time"], stats["average_chunks_per_stream"]) == (0, 0)
        assert stats["time_to_first_chunk"] == {"p50": 0, "p95": 0}


    @waits
    def test_no_duration_is_negative_when_the_wall_clock_is_set_back(self, serve):
        setting_back = ("import os, time\nnow = time.time_ns\n"
                        "time.time_ns = lambda: now() - os.path.exists(os.environ['BACK']) * 5 * 3600 * 10**9\n")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "sitecustomize.py").write_text(setting_back)
            back = Path(folder, "back")
            server = serve("--chunk-delay", "0.01", PYTHONPATH=folder, BACK=str(back))
            server.turn("Hi", session_id="s")
            stream = server.chat("word " * 200, session_id="s").read(4)
            back.touch()
            assert stream.check().end["processing_time"] > 0.3
            server.turn("Hi", session_id="s")
            told, stats = server.session("s"), server.stats()
            check_fields(told, SESSION)         # none of which is negative
            check_fields(stats, STATS)
            assert moment(told["messages"][-1]["timestamp"]) < moment(told["created_at"]), "the clock was not set back"
            assert told["session_duration_seconds"] >= 0 and stats["time_to_first_chunk"]["p95"] >= 0
            assert server.get("/sessions")["sessions"][0]["duration_minutes"] >= 0

    @strict
    def test_titles_are_those_of_rfc_9110(self, fast):
        """Sections 15.5.14 and 15.5.15, whose titles Python 3.11 and 3.12 do not know yet."""
        for raw, title in [(request_head("POST /chat/stream HTTP/1.1", "Host: localhost", "Content-Length: 9999999"),
                            "Content Too Large"), (request_head(long_line(9000)), "URI Too Long")]:
            [answer] = fast.answers(raw)
            assert answer.json["title"] == title
        connection = fast.connect()
        connection.send(raw)
        assert connection.take_line() == "HTTP/1.1 414 URI Too Long\r\n"
        connection.close()


# ---- Sessions on disk. STREAMCHAT_KILLS=COUNT or COUNT:SEED kills the server so often, at random moments.

KILLS, _, KILLS_SEED = os.environ.get("STREAMCHAT_KILLS", "4").partition(":")
KEPT_TEXTS = [text for _, text in TEXTS]        # other tests take that name, further on
ON_DISK = ("--chunk-delay", "0", "--log", "off")
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="does to files and processes what Linux alone allows")


@contextlib.contextmanager
def new_file():
    """The path of a file for --db that is not there yet, in a folder that may be moved away."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:     # Windows minds that it is open
        file = Path(folder, "data", "chat.db")
        file.parent.mkdir()
        yield file


def beside(file, ending):
    return file.with_name(file.name + ending)


@contextlib.contextmanager
def read_only(file):
    """The rows of a server's file as any other program sees them."""
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as reader:
        yield reader


def rows(file, table="turns"):
    with read_only(file) as reader:
        return reader.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def changed(file, *statements):
    """Change a file that no server has, as another program would."""
    with contextlib.closing(sqlite3.connect(file)) as writer:
        for statement in statements:
            writer.execute(statement)
        writer.commit()


def told_by(server):
    """The sessions in the order of the list, with their messages; without what goes with the time."""
    told = []
    for listed in server.get("/sessions")["sessions"]:
        session = server.session(listed["session_id"])
        del listed["duration_minutes"]
        assert {name: session[name] for name in listed} == listed
        assert len(session["messages"]) == session["message_count"]
        told.append({**listed, "messages": session["messages"]})
    return told


def end_process(server, how="kill"):
    getattr(server.process, how)()
    server.process.wait(PATIENCE)


class Witness:
    """A client that holds a server to its promises: what was answered stays, what was not is there whole or not at all.

    The model is the offline one, so a history is known by its turn_ids and messages.
    """

    def __init__(self, number, seed):
        self.chance = random.Random(f"{seed} {number}")
        self.names = [f"w{number}-{session}" for session in range(3)]
        self.kept = {}          # session: [(turn_id, message)], as promised
        self.doubt = None       # the session and the request that was not answered
        self.begun = False      # whether that is a turn whose session_info was read
        self.count = 0          # of turns that were complete

    def act(self, server):
        """Talk, clear and delete until the server is gone."""
        with contextlib.suppress(OSError, Cut):
            while True:
                session, deed = self.chance.choice(self.names), self.chance.random()
                if deed < 0.9 or session not in self.kept:
                    self.talk(server, session)
                else:
                    self.forget(server, session, *(("POST", "/clear") if deed < 0.95 else ("DELETE", "")))

    def talk(self, server, session):
        words = self.chance.choice((3, 3, 30, 30, 300, 3000))
        self.doubt = session, {"message": f"{new_id()} " + "word " * words, "session_id": session, "turn_id": new_id()}
        self.finish(server)

    def finish(self, server, kept=False):
        """Send the turn in doubt, read it to its end, and note it. If the server has kept it, this is its old log."""
        session, request = self.doubt
        stream = server.chat(**request)
        self.begun = bool(stream.read(1).lines)
        turn = stream.check(message=request["message"], turn_id=request["turn_id"])
        assert turn.end["type"] == "complete", turn.end
        assert kept or turn.info["created"] == (session not in self.kept)
        said = self.kept.setdefault(session, [])
        if (request["turn_id"], request["message"]) not in said:
            said.append((request["turn_id"], request["message"]))
        assert turn.end["message_count"] == 2 * len(said)
        self.count += 1
        self.doubt, self.begun = None, False

    def forget(self, server, session, method, path):
        self.doubt = session, None
        assert server.request(method, f"/sessions/{session}{path}").status == 200
        self.kept[session] = []
        if not path:
            del self.kept[session]
        self.doubt = None

    def check(self, server):
        """What the server started again must tell; then the turn in doubt is sent again, and is there once."""
        if self.doubt:
            self.settle(server)
        for session in self.names:
            assert self.history(server, session) == self.expected(self.kept.get(session)), session
            if said := self.kept.get(session):
                turn_id, message = self.chance.choice(said)
                again = server.chat(message=message, session_id=session, turn_id=turn_id).check()
                assert again.text == offline_answer(message, again.status["context_messages"])[1]

    def settle(self, server):
        session, request = self.doubt
        found, promised = self.history(server, session), self.kept.get(session)
        if request is None:
            assert found in (self.expected(promised), [], None), "a clear or a delete left a part"
            self.kept.pop(session)
            if found is not None:
                self.kept[session] = promised if found else []
            self.doubt = None
            return
        if found is not None:
            promised = self.kept.setdefault(session, [])
        assert found is not None or not self.begun, "session_info was read, and there is no session"
        with_it = [*(promised or []), (request["turn_id"], request["message"])]
        assert found in (self.expected(promised), self.expected(with_it)), "not the turns that were complete"
        self.finish(server, kept=found == self.expected(with_it))

    def history(self, server, session):
        response = server.request("GET", f"/sessions/{session}")
        if response.status == 404:
            return None
        turns = whole_turns(response.json["messages"])
        assert response.json["message_count"] == 2 * len(turns)
        return [(turn_id, user["text"], model["text"]) for turn_id, (user, model) in turns.items()]

    def expected(self, said):
        return said if said is None else [(turn_id, message, offline_answer(message, 2 * number)[1])
                                          for number, (turn_id, message) in enumerate(said)]


@contextlib.contextmanager
def full_disk(server, file):
    """No file of the server may grow beyond what its -wal has, as if the disk were full."""
    import resource  # Windows lacks it

    soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (beside(file, "-wal").stat().st_size, hard))
    yield
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def moved(path, instead=None):
    elsewhere = path.rename(beside(path, "-elsewhere"))
    if instead is not None:
        path.write_bytes(instead)
    yield
    elsewhere.rename(path)


@contextlib.contextmanager
def locked(server, file):
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        yield


FAULTS = [              # what keeps the server from writing, while it lasts
    ("the disk is full", full_disk),
    ("another program writes to it", locked),
]


def write_at(offset, data):
    def change(file):
        with file.open("r+b") as opened:
            opened.seek(offset)
            opened.write(data)
    return change


def cut_off(size):
    """Cut a file to its size as this function tells it."""
    return lambda file: os.truncate(file, size(file.stat().st_size))


def replace(old, new):
    def change(file):
        data = file.read_bytes()
        assert old in data
        file.write_bytes(data.replace(old, new))
    return change


def replace_by_folder(file):
    file.unlink()
    file.mkdir()


def empty_beside_its_log(file):
    """As after a kill, when all that is left is in the -wal."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as writer:
        writer.execute("UPDATE turns SET turn_id = 't'")
        log = beside(file, "-wal").read_bytes()
    beside(file, "-wal").write_bytes(log)
    os.truncate(file, 0)


def remake(*statements):
    """Another program's file of SQLite."""
    def change(file):
        file.unlink()
        changed(file, *statements)
    return change


REFUSED_FILES = [       # name, what is done to a good file
    ("another program's file", remake("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)")),
    ("another program's file with tables of these names",
     remake("CREATE TABLE sessions (id)", "CREATE TABLE turns (id)", "PRAGMA user_version = 1")),
    ("a text", lambda file: file.write_text("Dear diary,\n" * 1000)),
    ("one letter", lambda file: file.write_text("x")),
    ("a folder", replace_by_folder),
    ("a link to itself", lambda file: (file.unlink(), file.symlink_to(file))),
    ("a turn without its session", lambda file: changed(file, "DELETE FROM sessions")),
    ("a missing folder", lambda file: shutil.rmtree(file.parent)),
    ("a newer schema", lambda file: changed(file, "PRAGMA user_version = 99")),
    ("version 1 of this program", lambda file: changed(file, "PRAGMA user_version = 1")),
    ("another magic", write_at(0, b"SQLite format 4")),
    ("another page size", write_at(16, b"\x02\x00")),
    ("pages that are not used whole", write_at(20, b"\x01")),
    ("a first page of noise", write_at(100, random.Random(1).randbytes(412))),
    ("a page within it that is damaged", write_at(20 * 4096, b"\xff" * 4096)),
    ("a schema that can't be parsed", replace(b"CREATE TABLE turns", b"CREATE TABLE tur\xff\xff")),
    ("a list of sessions that is damaged", write_at(4096, b"\xff" * 4096)),
    ("a table that is gone", lambda file: changed(file, "DROP TABLE turns")),
    ("a column of another name", lambda file: changed(file, "ALTER TABLE turns RENAME COLUMN turn_id TO turn")),
    ("half of it", cut_off(lambda size: size // 2)),
    ("all but its last page", cut_off(lambda size: size - 4096)),
    ("all but its last byte", cut_off(lambda size: size - 1)),
    ("all but its last 512 bytes", cut_off(lambda size: size - 512)),
    ("nothing but its -wal", empty_beside_its_log),
]


def bytes_in(folder):
    """All files but those that SQLite and the server make for their locks."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not path.name.endswith(("-shm", "-lock"))}


class TestSessionsOnDisk:
    """With --db FILE what was complete survives every end of the server, and what can't be kept is not complete."""

    @ON_LINUX
    @waits
    def test_without_the_flag_nothing_touches_a_disk(self, serve):
        with tempfile.TemporaryDirectory() as folder:
            server = serve(TMPDIR=folder, HOME=folder)
            server.turn("Hi", session_id="s")
            server.request("POST", "/sessions/s/clear")
            opened = Path(f"/proc/{server.process.pid}/fd").iterdir()
            assert {path.name for path in opened if path.is_file()} == {"1", "2"}, "another file than the log"
            assert os.listdir(folder) == [] and os.listdir(server.output.parent) == [server.output.name]

    @ON_LINUX
    @waits
    def test_files_are_for_their_owner_alone(self, serve):
        with new_file() as file:
            server = serve(*ON_DISK, "--db", str(file))
            server.turn("Hi")
            assert {path.name for path in file.parent.iterdir()} == {
                "chat.db", "chat.db-lock", "chat.db-shm", "chat.db-wal"}
            assert {path.stat().st_mode & 0o777 for path in file.parent.iterdir()} == {0o600}
            end_process(server, "terminate")
            assert {path.name for path in file.parent.iterdir()} == {"chat.db", "chat.db-lock"}

    @waits
    def test_a_retry_and_a_resume_are_the_same_bytes_after_a_restart(self, serve):
        with new_file() as file:
            flags = ("--log", "off", "--db", str(file))
            server = serve(*flags)
            requests = [{"message": text, "session_id": "s", "turn_id": str(number)}
                        for number, text in enumerate(("one two three four five six", "caf\u00e9 \U0001f600 \u2028"))]
            streams = [server.chat(**request).read() for request in requests]
            for how in ("kill", "terminate"):
                end_process(server, how)
                server = serve(*flags)
                assert server.session("s")["latest_turn"] is None
                assert [server.chat(**request).read().lines for request in requests] == [
                    stream.lines for stream in streams]
                latest = streams[-1].lines
                assert server.follow("s", after=1).read().lines == latest[:2] + latest[3:]
                assert server.stats()["total_requests"] == 0

    @waits
    def test_a_restart_forgets_nothing(self, serve):
        with new_file() as file:
            flags = ("--chunk-delay", "0.002", "--log", "off", "--db", str(file))
            server = serve(*flags)
            requests = [{"message": text, "session_id": new_id(), "turn_id": "t"} for text in KEPT_TEXTS]
            turns = [server.turn(**request) for request in requests]
            requests.append({"message": LONG, "session_id": "stopped", "turn_id": "t"})
            stream = server.chat(**requests[-1]).read(5)
            server.stop("stopped")
            turns.append(stream.check(**requests[-1]))
            for session in ("cleared", "deleted", "anew"):
                server.turn("Hi", session_id=session, turn_id="t")
            server.request("POST", "/sessions/cleared/clear")
            for session in ("deleted", "anew"):
                server.request("DELETE", f"/sessions/{session}")
            server.turn("Hello", session_id="anew", turn_id="t")
            server.request("POST", "/sessions/new", {"session_id": "empty"})
            for number, how in enumerate(("terminate", "kill"), 1):
                server.turn("More", session_id=requests[number]["session_id"])
                told = told_by(server)
                end_process(server, how)
                server = serve(*flags)
                assert told_by(server) == told and "deleted" not in server.session_ids()
                stats = server.stats()
                assert [stats[name] for name in (*COUNTERS, "total_sessions_created")] == [0, 0, 0, 0, 0]
                assert stats["active_sessions"] == len(told)
            for request, turn in zip(requests, turns, strict=True):
                assert server.chat(**request).check(**request) == turn
                reused = server.request("POST", "/chat/stream", request | {"message": "another"})
                check_problem(reused, 409, "turn_id_reused")
            assert told_by(server) == told and server.stats()["total_requests"] == 0
            check_problem(server.request("POST", "/sessions/new", {"session_id": "empty"}), 409, "session_exists")
            assert server.turn("Hi", session_id="cleared", turn_id="t").status["context_messages"] == 0
            assert server.turn("Hi", session_id="anew").status["context_messages"] == 2

    @waits
    def test_a_session_keeps_its_model_and_a_turn_what_it_used(self, serve):
        with gemini_stand_in() as stand_in, new_file() as file:
            flags, more = ("--log", "off", "--db", str(file)), {"serve": serve, "GEMINI_API_KEY": KEY}
            server = gemini_server(stand_in, "--model", "gemini-test", *flags, **more)
            request = {"message": "Hi", "session_id": "s", "turn_id": "t"}
            turn = server.turn(**request)
            end_process(server)
            server = gemini_server(stand_in, "--model", "offline", *flags, **more)
            again = server.chat(**request).check(**request)
            assert (again.info["model"], again.text) == ("gemini-test", turn.text)
            assert again.end["usage"] == turn.end["usage"] and server.session("s")["model"] == "gemini-test"

    @waits
    def test_a_turn_that_ran_at_a_kill_is_run_anew_once(self, serve):
        with new_file() as file:
            flags = ("--chunk-delay", "0.005", "--log", "off", "--db", str(file))
            server = serve(*flags)
            request = {"message": "word " * 400, "session_id": "s", "turn_id": "t"}
            stream = server.chat(**request)
            stream.read_until("chunk", 3)
            end_process(server)
            server = serve(*flags)
            told = server.session("s")
            assert (told["messages"], told["streaming"], told["latest_turn"]) == ([], False, None)
            check_problem(server.request("GET", "/sessions/s/stream"), 404, "no_turn")
            turn = server.turn(**request)
            assert turn.info["created"] is False and turn.status["context_messages"] == 0
            check_history(server, "s", request["message"], turn)
            assert server.chat(**request).check(**request) == turn and rows(file) == 1

    @waits
    def test_a_kill_at_any_moment_loses_no_turn_and_leaves_no_half(self, serve):
        seed = KILLS_SEED or str(random.randrange(10**6))
        print(f"STREAMCHAT_KILLS={KILLS}:{seed} makes the same choices")
        chance, witnesses = random.Random(seed), [Witness(number, seed) for number in range(4)]
        with new_file() as file, ThreadPoolExecutor(len(witnesses)) as pool:
            for _ in range(int(KILLS)):
                with running(*ON_DISK, "--db", str(file)) as server:
                    for witness in witnesses:
                        witness.check(server)
                    turns = sum(len(said) for witness in witnesses for said in witness.kept.values())
                    assert rows(file) == turns and server.stats()["active_sessions"] == rows(file, "sessions")
                    acting = [pool.submit(witness.act, server) for witness in witnesses]
                    time.sleep(chance.uniform(0, 0.25))
                    end_process(server)
                    for done in acting:
                        done.result()
            server = serve(*ON_DISK, "--db", str(file))
            for witness in witnesses:
                witness.check(server)
            with read_only(file) as reader:
                assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            print(f"{KILLS} kills, {sum(witness.count for witness in witnesses)} turns complete")

    @waits
    def test_what_was_answered_is_on_disk_already(self, serve):
        with new_file() as file:
            server = serve(*ON_DISK, "--db", str(file))
            for number in range(10):
                stream = server.chat("word " * 50 * number + "x", session_id=f"s{number % 2}")
                stream.read_until("session_info")
                assert rows(file, "sessions") == min(number + 1, 2)
                stream.read_until("complete")
                assert rows(file) == number + 1
                stream.check()
            server.request("POST", "/sessions/new", {"session_id": "another"})
            assert rows(file, "sessions") == 3
            server.request("POST", "/sessions/s0/clear")
            assert (rows(file), rows(file, "sessions")) == (5, 3)
            server.request("DELETE", "/sessions/s1")
            assert (rows(file), rows(file, "sessions")) == (0, 2)

    @ON_LINUX
    @waits
    def test_what_can_not_be_written_is_an_error_and_changes_nothing(self, serve):
        with new_file() as file:
            server = serve("--chunk-delay", "0", "--log", "brief", "--db", str(file))
            server.turn("x" * 50_000, session_id="s")       # so that the -wal is longer than the log
            for name, fault in FAULTS:
                self.check_fault(server, file, name, fault)
            told = told_by(server)
            end_process(server)
            assert told_by(serve(*ON_DISK, "--db", str(file))) == told

    def check_fault(self, server, file, name, fault):
        request = {"message": name, "session_id": "s", "turn_id": new_id()}
        for session in ("cleared", "deleted"):
            server.turn(name, session_id=session)
        before, log = {session: server.history(session) for session in server.session_ids()}, server.log()
        failed = server.stats()["failed_requests"]
        with fault(server, file):
            assert server.turn(**request).end.get("code") == "internal_error", name
            for method, path, body in (("POST", "/chat/stream", {"message": "Hi", "session_id": "another"}),
                                       ("POST", "/sessions/new", {"session_id": "another"}),
                                       ("POST", "/sessions/cleared/clear", None),
                                       ("DELETE", "/sessions/deleted", None)):
                check_problem(server.request(method, path, body), 500, "internal_error")
            check_problem(server.request("GET", "/sessions/another"), 404, "session_not_found")
            assert server.session_ids() == before.keys() and server.stats()["failed_requests"] == failed + 1
        assert wait_until(lambda: file.name in server.log().removeprefix(log)), f"{name}: the log does not tell why"
        assert {session: server.history(session) for session in server.session_ids()} == before, name
        turn = server.turn(**request)
        assert turn.end["type"] == "complete" and server.turn("Hi", session_id="another").info["created"], name
        assert server.history("s") == [*before["s"], ("user", name), ("model", turn.text)], name
        for method, path in (("POST", "cleared/clear"), ("DELETE", "deleted"), ("DELETE", "another")):
            assert server.request(method, f"/sessions/{path}").status == 200, name

    @waits
    def test_an_error_within_a_stream_is_one_of_the_logs_lines(self, serve):
        with new_file() as file:
            end_process(server := serve(*ON_DISK, "--db", str(file)), "terminate")
            changed(file, "INSERT INTO sessions VALUES ('s', 'offline', 0, 0)",
                    "INSERT INTO turns VALUES ('s', 't', 'Hi', 'Hello', '', '', x'00')")
            server = serve(*ON_DISK, "--db", str(file))
            connection = server.connect()
            connection.send(http_request("GET", "/sessions/s/stream"))
            assert connection.at_end()
            assert wait_until(lambda: "trouble error=" in server.log())
            assert "zlib.error" in server.log() and "Exception occurred" not in server.log()
            os.truncate(server.output, 0)       # the traceback is right there

    @waits
    def test_the_limit_of_sessions_holds_where_the_disk_is_slow(self, serve):
        with new_file() as file, ThreadPoolExecutor(12) as pool:
            program = beside(file, ".py")
            program.write_text(SERVER.read_text("utf-8").replace('"sessions": 10_000', '"sessions": 5'), "utf-8")
            server = serve(*ON_DISK, "--db", str(file), program=program)
            with locked(server, file):
                made = [pool.submit(server.request, "POST", "/sessions/new") for _ in range(12)]
                time.sleep(0.2)     # they wait for the file
            assert sorted(done.result().status for done in made) == [200] * 5 + [503] * 7

    @waits
    def test_a_stop_that_can_not_be_written_says_so(self, serve):
        with new_file() as file:
            server = serve("--chunk-delay", "0.05", "--log", "brief", "--db", str(file))
            stream = server.chat("word " * 200, session_id="s")
            stream.read_until("chunk", 2)
            with locked(server, file):
                check_problem(server.request("POST", "/sessions/s/stop"), 500, "internal_error")
                assert stream.check().end["code"] == "internal_error"
            assert server.history("s") == [] and server.turn("Hi", session_id="s").end["message_count"] == 2
            os.truncate(server.output, 0)       # both errors are right there

    @waits
    def test_a_file_serves_one_server_at_a_time(self, serve):
        with new_file() as file:
            server = serve(*ON_DISK, "--db", str(file))
            server.turn("Hi", session_id="s")
            names = [file]
            if sys.platform != "win32":     # where a link needs a privilege
                names.append(beside(file, "-link"))
                names[-1].symlink_to(file)
            for name in names:
                said = TestRunIt().refuse("--port", "0", "--db", str(name))
                assert "\n" not in said and file.name in said
            server.turn("Hi", session_id="s")
            end_process(server)
            assert serve(*ON_DISK, "--db", str(file)).session("s")["message_count"] == 4

    @waits
    def test_a_file_that_is_not_right_is_refused_in_one_line_and_not_touched(self, serve):
        with new_file() as file:
            server = serve(*ON_DISK, "--db", str(file))
            for number in range(8):     # the file ends in a log of noise, whose pages quick_check takes as they are
                server.turn("".join(random.Random(number).choices(ascii_letters, k=6000)), session_id=f"s{number}")
            end_process(server, "terminate")

            files = []
            for name, damage in REFUSED_FILES:
                folder = Path(file.parents[1], name)
                folder.mkdir()
                files.append(Path(shutil.copy(file, folder)))
                damage(files[-1])
            before = [bytes_in(damaged.parent) for damaged in files]
            told = refused(*(["--port", "0", "--db", str(damaged)] for damaged in files))
            for damaged, unchanged, said in zip(files, before, told, strict=True):
                name = damaged.parent.name
                assert "\n" not in said and file.name in said, f"{name}: {said}"
                assert bytes_in(damaged.parent) == unchanged, f"{name}: the file was touched"

    @waits
    def test_a_disk_that_is_waited_for_delays_nothing_but_what_is_written(self, serve):
        with new_file() as file, ThreadPoolExecutor(4) as pool:
            server = serve(*ON_DISK, "--db", str(file))
            for session in "sto":
                server.turn("Hi", session_id=session)
            with locked(server, file):
                deleting = pool.submit(server.request, "DELETE", "/sessions/s")
                time.sleep(0.1)     # it waits for the file
                clearing = pool.submit(server.request, "POST", "/sessions/s/clear")
                began = time.monotonic()
                other = server.chat("Hi", session_id="o")
                assert other.read_until("chunk") and server.session("s")["message_count"] == 2
                assert server.get("/sessions")["active_sessions"] == 3 and not server.stop("t")
                assert time.monotonic() - began < 0.5, "one that need not be written waits for the disk"
            assert deleting.result().status == 200
            check_problem(clearing.result(), 404, "session_not_found")
            assert other.check().end["message_count"] == 4

    @waits
    def test_turns_may_end_at_once_while_others_read(self, serve):
        with new_file() as file:
            server = serve(*ON_DISK, "--db", str(file))
            server.turn("Hi", session_id="s")

            def talk(session):
                for number in range(4):
                    turn = server.turn("word " * 30, session_id=session)
                    assert turn.end["message_count"] == len(server.history(session)) == 2 * number + 2
                    assert len(server.history("s")) == 2
            with read_only(file) as reader:
                reader.execute("BEGIN")
                assert reader.execute("SELECT count(*) FROM turns").fetchone() == (1,)
                in_parallel(talk, [new_id() for _ in range(12)], workers=12)
                assert reader.execute("SELECT count(*) FROM turns").fetchone() == (1,)
            assert rows(file) == 49


# ---- Errors

def chat_field(name, value, **more):
    return f"{name} {value!r}"[:60], chat_request({"message": "Hi", name: value} | more), 400, "invalid_field"


def with_type(value):
    return value, chat_request({"message": "Hi"}, f"Content-Type: {value}"), 415, "unsupported_media_type"


BAD_IDS = ["", "new", "x" * 65, "a b", "a/b", "a\n", "\u00e4", "\u0663", "a.b", 5, True, ["a"], {}]
BAD_BODIES = [          # name, bytes, status, code
    ("no body", http_request("POST", "/chat/stream"), 400, "invalid_json"),
    *((f"JSON: {body[:30]!r}", chat_request(body), 400, "invalid_json") for body in (
        b"", b" ", b"{", b"Hello", b"{'message':'Hi'}", b'{"message":"Hi"} x', b'{"message":"Hi",}',
        b'{"message":"a\nb"}', b'{"message":"\xff"}', b'{"message":"\xed\xa0\x80"}', b'{"message":"Hi"}\x00')),
    *((f"JSON type: {body.decode()}", chat_request(body), 400, "invalid_field") for body in (
        b"[]", b'[{"message":"Hi"}]', b'"message"', b"1", b"null", b"true")),
    ("no message", chat_request({"text": "Hi"}), 400, "invalid_field"),
    *(chat_field("message", value) for value in (None, 5, True, ["Hi"], {}, "", " ", "\n\t \u3000\u2028", "\ud800",
                                                 "a\udfffb", "x" * 100_001)),
    *(chat_field("session_id", value) for value in BAD_IDS),
    *(chat_field("turn_id", value, session_id="bad-request") for value in BAD_IDS if value != "new"),
    *((f"a path with session_id {value!r}", http_request("POST", f"/sessions/{value}/stream", body={"message": "Hi"}),
       400, "invalid_field") for value in ("new", "x" * 65, "a%20b", "a%2fb", "a.b", "%C3%A4")),
    ("a path and a body with two sessions", http_request(
        "POST", "/sessions/bad-request/stream", body={"message": "Hi", "session_id": "other"}), 400, "invalid_field"),
    ("a path with a session, no message", http_request("POST", "/sessions/bad-request/stream", body={}), 400,
     "invalid_field"),
    ("turn_id alone", chat_request({"message": "Hi", "turn_id": "t"}), 400, "invalid_field"),
    ("turn_id with null", chat_request({"message": "Hi", "turn_id": "t", "session_id": None}), 400, "invalid_field"),
    *map(with_type, ("text/plain", "application/xml", "application/jsonx", "application/json-patch+json", "json",
                     "multipart/form-data; boundary=x")),
    *((f"unknown session: {method} {path}", http_request(method, "/sessions/nobody" + path), 404, "session_not_found")
      for method, path in (("GET", ""), ("GET", "/stream"), ("POST", "/stop"))),
]
BAD_SESSIONS = [
    *((f"unknown session: {method} {path}", http_request(method, "/sessions/nobody" + path), 404, "session_not_found")
      for method, path in (("DELETE", ""), ("POST", "/clear"))),
    ("a new session: not JSON", http_request("POST", "/sessions/new", body=b"{"), 400, "invalid_json"),
    ("a new session: a list", http_request("POST", "/sessions/new", body=[]), 400, "invalid_field"),
    *((f"a new session: {body}", http_request("POST", "/sessions/new", body=body), 400, "invalid_field") for body in (
        {"session_id": "new"}, {"session_id": "a b"}, {"session_id": 5}, {"model_id": 5}, {"model_id": ""},
        {"model_id": "-x"}, {"model_id": "a b"}, {"model_id": "x" * 101}, {"model_id": "../x"}, {"model_id": "x\n"})),
]
BAD_REQUESTS = [
    *((f"JSON: {body[:30]!r}", chat_request(body), 400, "invalid_json") for body in (
        b'{"message":"Hi","n":NaN}', b'{"message":"Hi","n":-Infinity}', b'{"message":"Hi","n":' + b"9" * 5000 + b"}",
        b"[" * 100_000, b'{"message":' + b"[" * 100_000 + b"]" * 100_000 + b"}", '{"message":"Hi"}'.encode("utf-16"),
        '{"message":"Hi"}'.encode("utf-16-le"), '{"message":"Hi"}'.encode("utf-32"))),
    ("an unknown path", http_request("GET", "/nope"), 404, "not_found"),
    ("a path that goes on", http_request("GET", "/health/more"), 404, "not_found"),
    ("a path with another character for its dot", http_request("GET", "/openapiXjson"), 404, "not_found"),
    ("a path with an empty segment", http_request("GET", "//localhost/health"), 404, "not_found"),
    ("absolute form goes before Host", http_request("GET", "http://chat.example.com/health"), 403, "forbidden_host"),
    ("route before method", http_request("PUT", "/nope"), 404, "not_found"),
    ("route before unknown method", http_request("BREW", "/nope"), 404, "not_found"),
    ("route before body", http_request("POST", "/nope", body=b"{"), 404, "not_found"),
    ("method before body", http_request("POST", "/health", body=b"{"), 405, "method_not_allowed"),
    *((f"unknown method {method}", http_request(method, "/health"), 405, "method_not_allowed")
      for method in ("BREW", "PROPFIND", "get", "GETS", "TRACE", "CONNECT")),
]


def bad_line(line, status=400, code="bad_request"):
    return f"line: {line[:40]!a}", request_head(line, "Host: localhost"), status, code


def bad_bytes(raw):
    return f"bytes: {raw[:60]!a}", raw, 400, "bad_request"


def bad_host(*fields):
    return f"Host: {fields!a}", request_head("GET /health HTTP/1.1", *fields), 400, "bad_request"


def bad_fields(*fields, version="HTTP/1.1"):
    raw = request_head(f"POST /chat/stream {version}", "Host: localhost", *fields)
    return f"fields: {fields!a}"[:80], raw, 400, "bad_request"


def unread(status, code, *fields, line="POST /chat/stream HTTP/1.1"):
    """A request that is refused before its body was read, or asked for by 100 Continue."""
    return f"{status}: {line} {fields!a}"[:80], request_head(line, "Host: localhost", *fields), status, code


BAD_HEADS = [           # name, bytes, status, code. What follows on the connection is not read as a request
    *map(bad_line, (
        "Hello", "GET", "GET /health", "GET HTTP/1.1", "GET  HTTP/1.1", "/health HTTP/1.1", "GET /health HTTP/1.1 ",
        "GET /health HTTP/1.1 x", "GET  /health HTTP/1.1", "GET /health  HTTP/1.1", "GET\t/health HTTP/1.1",
        "GET /health\tHTTP/1.1", " GET /health HTTP/1.1", "\tGET /health HTTP/1.1", "GET /health HTTP/1.1\t",
        "GET /a b HTTP/1.1", "G(T /health HTTP/1.1", "G\xcbT /health HTTP/1.1", "GET: /health HTTP/1.1")),
    *(bad_line(f"GET /health {version}") for version in (
        "HTTP/1", "HTTP/1.", "HTTP/.1", "HTTP/", "HTTP", "HTTP/1.10", "HTTP/01.1", "HTTP/1.1.1", "http/1.1", "Http/1.1",
        "HTTP/ 1.1", "HTTP /1.1", "HTTP/1 .1", "HTTP/x.1", "HTTP/1.x", "HTTP/1,1", "HTTP/11", "HTTP/-1.1", "HTTP/+1.1",
        "HTTP/1.\xb2", "HTTP/1.\xd9\xa1", "HTTPS/1.1", "XHTTP/1.1", "HTTP\\1.1")),
    *(bad_line(f"GET /health HTTP/{version}", 505, "version_not_supported")
      for version in ("0.0", "0.9", "2.0", "2.1", "3.0", "9.9")),
    ("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "version_not_supported"),
    *(bad_line(f"GET {target} HTTP/1.1") for target in (
        "health", "*", "#", "/health#x", "/h\xe9", "/h\xc3\xa9", "?x", "localhost", "localhost:80", "http:/health",
        "http:health", "http://", "http:///health", "http://:80/health", "http://x@localhost/health",
        "http://localhost:x/health", "http://localhost:123456/health", "http://[::1/health", "http://localhost#x",
        "ftp://localhost/health", "file:///health", "ws://localhost/health", "javascript:alert(1)")),
    *map(bad_line, ("POST * HTTP/1.1", "OPTIONS * HTTP/1.1", "CONNECT localhost:80 HTTP/1.1",
                    "OPTIONS ** HTTP/1.1", "OPTIONS localhost:80 HTTP/1.1")),
    bad_host(),
    bad_host("Host: localhost", "Host: localhost"),
    bad_host("Host: localhost", "X: x", "HOST: example.com"),
    ("no Host beside an absolute form", request_head("GET http://localhost/health HTTP/1.1"), 400, "bad_request"),
    ("head before route and method", request_head("BREW /nope HTTP/1.1"), 400, "bad_request"),
    ("a bad Host in HTTP/1.0", request_head("GET /health HTTP/1.0", "Host: a b"), 400, "bad_request"),
    ("two Hosts in HTTP/1.0", request_head("GET /health HTTP/1.0", "Host: a", "Host: a"), 400, "bad_request"),
    *(bad_host(f"Host:{host}") for host in (
        "", " ", "\t \t", "a b", "localhost, localhost", "user@localhost", "user:word@localhost", "localhost/",
        "localhost/health", "localhost?x", "localhost#x", "localhost\\x", "http://localhost", "//localhost", ":80",
        "localhost:x", "localhost:-1", "localhost:+80", "localhost: 80", "localhost:80:80", "localhost:123456", "[::1",
        "::1", "[]", "[::1]x", "[localhost]", "[:::1]", "[127.0.0.1]", "[::1]:x", "<localhost>",
        '"localhost"', "\xe9", "\xc3\xa9")),
    *(bad_bytes(b"POST /chat/stream HTTP/1.1\r\n%bHost: localhost\r\n\r\n" % field) for field in (
        b" ", b"\t", b" X: x\r\n", b"\tX: x\r\n", b" \r\n", b"\t\r\n")),
    *(bad_fields(field) for field in (
        "X : x", "X\t: x", "Content-Length : 0", "Transfer-Encoding : chunked", "X: x\r\n x", "X: x\r\n\tx",
        "X: x\r\n ", "X:\r\n x", "Content-Length: 1\r\n 0", "Transfer-Encoding:\r\n chunked", "Hello", "X", ": x",
        ":", "X x: x", "X(x): x", '"X": x', "X/x: x", "X[0]: x", "X,x: x", "X@x: x", "X\xe9: x", "X\xc3\xa9: x",
        "\xa0X: x")),
    *(bad_fields(f"Content-Length:{length}") for length in (
        "", " ", " 1, 1", " 1,1", " 1,", " 1 1", " 1;", " +1", " -1", " -0", " 0x1", " 0o1", " 1_0", " 1.0", " 1e1",
        " x", ' "1"', " \xb2", " \xd9\xa1")),
    bad_fields("Content-Length: 0", "Content-Length: 0"),
    bad_fields("Content-Length: 0", "X: x", "content-length: 5"),
    *(bad_fields(f"Transfer-Encoding:{coding}") for coding in (
        "", " ", " gzip", " identity", " chunked, gzip", " chunked, identity", " chunked, chunked",
        " gzip, chunked, chunked", " xchunked", " chunkedx", " chunked;x=1", ' "chunked"', " 'chunked'",
        " chunked gzip", " gzip chunked", " chunked\xa0")),
    bad_fields("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    bad_fields("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
    bad_fields("Transfer-Encoding: chunked", "Content-Length: 5"),
    bad_fields("Content-Length: 5", "transfer-encoding: Chunked"),
    bad_fields("Content-Length: 5", "Transfer-Encoding: gzip, chunked"),
    bad_fields("Content-Length: 5", "Transfer-Encoding: identity"),
    bad_fields("Transfer-Encoding: chunked", version="HTTP/1.0"),
    bad_fields("Transfer-Encoding: gzip, chunked", version="HTTP/1.0"),
    *(bad_bytes(template % control) for control in (b"\0", b"\x0b", b"\x1b", b"\x7f", b"\r", b"\n") for template in (
        b"GE%bT /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /%bhealth HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1%b\r\nHost: localhost\r\n\r\n", b"GET /health HTTP/1.1\r\n%bHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHo%bst: localhost\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: local%bhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: x%bTransfer-Encoding: chunked\r\n\r\n",
        b"POST /chat/stream HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding:%bchunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost%b\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\n%b\r\n",
        b"%bGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")),
    *map(bad_bytes, (
        b"GET /health HTTP/1.1\n", b"GET /health HTTP/1.1\nHost: localhost\n\n",
        b"GET /health HTTP/1.1\rHost: localhost\r\r", b"GET /health HTTP/1.1\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\n\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\n",
        b"GET /health HTTP/1.1\n\rHost: localhost\n\r\n\r",
        b"\r\n\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(range(32)), b"\x80\x2e\x01\x00\x02", bytes(range(256)),
        b"\xef\xbb\xbfGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"EHLO localhost\r\n\r\n", b'{"message":"Hi"}\r\n\r\n')),
    bad_line(long_line(8193), 414, "uri_too_long"),
    ("a method without end", b"x" * 70_000, 414, "uri_too_long"),
    ("a target without end", b"GET /" + b"x" * 70_000, 414, "uri_too_long"),
    ("a long target and a control character", b"GET /" + b"x" * 9000 + b"\0 HTTP/1.1\r\n\r\n", 414, "uri_too_long"),
    ("a head of 32 KiB and a byte", long_head(32_769), 431, "headers_too_large"),
    ("a name without end", b"GET /health HTTP/1.1\r\n" + b"x" * 70_000, 431, "headers_too_large"),
    ("a value without end", b"GET /health HTTP/1.1\r\nX:" + b" " * 70_000, 431, "headers_too_large"),
    ("101 fields", http_request("GET", "/health", *["X: x"] * 100), 431, "headers_too_large"),
    ("fields without end", b"GET /health HTTP/1.1\r\n" + b"X: x\r\n" * 10_000, 431, "headers_too_large"),
    *(unread(411, "length_required", f"Transfer-Encoding:{coding}", "Expect: 100-continue") for coding in (
        " chunked", "Chunked", "\t CHUNKED \t")),
    *(unread(501, "not_implemented", f"Transfer-Encoding: {coding}", "Expect: 100-continue") for coding in (
        "gzip, chunked", "gzip,Chunked", "x ,\ty , chunked", "gzip\r\nTransfer-Encoding: chunked")),
    *(unread(413, "payload_too_large", f"Content-Length: {length}", "Expect: 100-continue") for length in (
        2**21 + 1, 2**31, 2**32, 2**63, 2**64, 2**64 + 16, "9" * 5000, "0" * 5000 + str(2**21 + 1))),
    unread(415, "unsupported_media_type", "Content-Length: 16", "Content-Type: text/plain", "Expect: 100-continue"),
    unread(404, "not_found", "Content-Length: 16", "Expect: 100-continue", line="POST /nope HTTP/1.1"),
    unread(405, "method_not_allowed", "Content-Length: 16", "Expect: 100-continue", line="PUT /chat/stream HTTP/1.1"),
    unread(405, "method_not_allowed", "Content-Length: 16", "Expect: 100-continue", line="BREW /health HTTP/1.1"),
    unread(400, "bad_request", "Content-Length: x", "Expect: 100-continue"),
    *((f"smuggled: {fields}", http_request("POST", "/chat/stream", *fields) + rest, 400, "bad_request")
      for rest in (b"0\r\n\r\n", b"5\r\nHello\r\n0\r\n\r\n") for fields in (
        ("Content-Length: 5", "Transfer-Encoding: chunked"), ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Content-Length: +5", "Transfer-Encoding: chunked"), ("Content-Length: 5", "Transfer-Encoding:\r\n chunked"),
        ("Content-Length: 5", "Transfer-Encoding: , chunked"), ("Content-Length: 5", "Transfer-Encoding: x, identity"),
        ("Content-Length: 5", "Content-Length: 0"), ("Content-Length: 5, 0",))),
]


SLOW = pytest.mark.skipif(os.environ.get("STREAMCHAT_SLOW") != "1", reason="takes a minute; STREAMCHAT_SLOW=1 runs it")
SLOW_HEADS = [          # name, idle seconds after a first request, bytes sent at once, bytes that drip, status, seconds
    ("silent after its first byte", None, b"G", b"", 408, 10),
    ("silent before its last line", 1, http_request("GET", "/health")[:-2], b"", 408, 10),
    ("drips in its first line", 1, b"G", b"ET /" + b"x" * 100, 408, 10),
    ("drips in its fields", None, b"GET /health HTTP/1.1\r\n", b"X: x\r\n" * 20, 408, 10),
    ("drips for 6 s", 1, http_request("GET", "/health")[:-30], http_request("GET", "/health")[-30:], 200, 6),
]
SLOW_BODIES = [         # the same; without a status the connection is closed in silence
    ("silent", None, http_request("POST", "/chat/stream", "Content-Length: 16"), b"", 408, 30),
    ("drips", 1, http_request("POST", "/chat/stream", "Content-Length: 1000") + b"{", b" " * 500, 408, 30),
    ("drips for 23 s", 1, http_request("POST", "/chat/stream", "Content-Length: 116"), HI + b" " * 100, 200, 23),
    ("idle", None, b"", b"", None, 60),
    ("idle after a request", 0, b"", b"", None, 60),
    ("idle after empty lines", 0, b"\r\n\r\n", b"", None, 60),
]


def send_slowly(connection, at_once, slowly):
    """Send bytes at once and others slowly, until the server answers or closes; return how many seconds that took."""
    began, rest = time.monotonic(), iter(slowly)
    connection.send(at_once)
    connection.socket.settimeout(0.2)
    while time.monotonic() - began < 70:
        try:
            connection.socket.recv(1, socket.MSG_PEEK)
            break
        except TimeoutError:
            connection.send(bytes(itertools.islice(rest, 1)))
    connection.socket.settimeout(PATIENCE)
    return time.monotonic() - began


def check_deadline(server, case):
    """However a request drips, its deadline comes in time, and not before it."""
    _, idle, at_once, slowly, status, seconds = case
    connection = server.connect()
    if idle is not None:
        connection.send(http_request("GET", "/health"))
        server.response(connection, close=False)
        time.sleep(idle)
    took = send_slowly(connection, at_once, slowly)
    if status == 408:
        check_problem(server.response(connection, close=False), 408, "request_timeout")
    elif status:
        assert server.response(connection, close=False).status == status
    assert status == 200 or connection.at_end()
    connection.close()
    assert seconds - 0.5 < took < seconds + 5, case


@pytest.fixture(scope="module")
def slow_heads(farm):
    """They wait for their deadline while other tests run."""
    with ThreadPoolExecutor(len(SLOW_HEADS)) as pool:
        yield [pool.submit(check_deadline, farm("--chunk-delay", "0"), case) for case in SLOW_HEADS]


@pytest.mark.usefixtures("slow_heads")
class TestErrors:
    """Before a stream starts, every error is problem details (RFC 9457), and leaves nothing behind."""

    @core
    @cases(BAD_BODIES)
    def test_a_bad_body_is_refused_and_leaves_nothing_behind(self, fast, case):
        self.check_refusal(fast, *case[1:])

    @sessions
    @cases(BAD_SESSIONS)
    def test_a_bad_session_is_refused_and_leaves_nothing_behind(self, fast, case):
        self.check_refusal(fast, *case[1:])

    @strict
    @cases(BAD_REQUESTS)
    def test_a_bad_request_is_refused_and_leaves_nothing_behind(self, fast, case):
        self.check_refusal(fast, *case[1:])

    def check_refusal(self, fast, raw, status, code):
        before = fast.get("/health")
        connection = fast.connect()
        with contextlib.suppress(ConnectionError):      # it may be refused before it was sent
            connection.send(raw)
        check_problem(fast.response(connection), status, code)
        for name in ("total_requests", "successful_requests", "failed_requests", "active_sessions"):
            assert fast.get("/health")[name] == before[name]

    @core
    def test_the_detail_of_415_shows_the_command_that_works(self, fast):
        response = fast.request("POST", "/chat/stream", {"message": "Hi"}, ["Content-Type: text/plain"])
        detail = check_problem(response, 415, "unsupported_media_type")["detail"]
        assert "curl" in detail and "/chat/stream" in detail

    @core
    @pytest.mark.parametrize("after", ["", "-1", "+1", "1.5", "x", "1e3", "0x1", "1234567890", "\u0663", " 1", "1\n"])
    def test_after_is_one_to_nine_digits(self, fast, after):
        session = new_id()
        fast.turn("Hi", session_id=session)
        response = fast.request("GET", f"/sessions/{session}/stream?after={quote(after)}")
        check_problem(response, 400, "invalid_field")

    @core
    @pytest.mark.parametrize("body, code", [
        (b"{", "invalid_json"), ([], "invalid_field"), ({"turn_id": 5}, "invalid_field"),
        ({"turn_id": "a b"}, "invalid_field")])
    def test_a_bad_stop_stops_nothing(self, server, body, code):
        session = new_id()
        stream = server.chat(LONG, session_id=session).read(3)
        check_problem(server.request("POST", f"/sessions/{session}/stop", body), 400, code)
        assert stream.read(5) and server.stop(session)

    @strict
    def test_an_error_whose_request_was_read_leaves_the_connection_open(self, fast):
        connection = fast.connect()
        for raw, status in [(chat_request(b"{"), 400), (http_request("GET", "/nope"), 404), (chat_request({}), 400),
                            (http_request("PUT", "/health"), 405), (http_request("TRACE", "/health"), 405),
                            (http_request("BREW", "/health"), 405), (http_request("GET", "/health"), 200)]:
            connection.send(raw)
            assert fast.response(connection, close=False).status == status


# ---- HTTP to the letter

TCHARS = {*b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"}
PLACES = [              # what a byte is a part of, bytes before and after it, which bytes may stand there
    ("method", b"G", b"T /health HTTP/1.1\r\nHost: localhost\r\n\r\n", TCHARS),
    ("target", b"GET /health?", b" HTTP/1.1\r\nHost: localhost\r\n\r\n", {*range(0x21, 0x7f)} - {*b"#"}),
    ("field name", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX", b"X: x\r\n\r\n", TCHARS | {*b":"}),
    ("field value", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: x", b"x\r\n\r\n", {9, *range(32, 256)} - {127}),
]
STATUSES = {200, 204, 400, 403, 404, 405, 408, 409, 411, 413, 414, 415, 431, 501, 505}      # of answers to mutants
SHORT_REQUESTS = [
    *(raw for _, raw in GOOD_REQUESTS if len(raw) < 500 and b"after" not in raw),
    *(http_request(method, f"/sessions/mutant{path}")
      for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/stream"), ("POST", "/stop"))),
    chat_request({"message": "Hi", "session_id": "mutant", "turn_id": "t"}, "Expect: 100-continue"),
]


def mutant(seed):
    """One to three good requests, damaged in one or two places."""
    chance = random.Random(seed)
    raw = b"".join(chance.choices(SHORT_REQUESTS, k=chance.randint(1, 3)))
    for _ in range(chance.randint(1, 2)):
        start, end = sorted(chance.choices(range(len(raw) + 1), k=2))
        byte, other = bytes([chance.choice([chance.randrange(256), *b"\r\n \t:,/0"])]), chance.choice(SHORT_REQUESTS)
        raw = chance.choice([       # insert, replace, delete, duplicate, swap, splice, truncate
            raw[:start] + byte + raw[start:],
            raw[:start] + byte + raw[start + 1:],
            raw[:start] + raw[end:],
            raw[:end] + raw[start:],
            raw[:start] + raw[end:end + 1] + raw[start + 1:end] + raw[start:start + 1] + raw[end + 1:],
            raw[:start] + other[chance.randrange(len(other)):],
            raw[:start],
        ])
    return raw


@strict
class TestHttp:
    """RFC 9110 and RFC 9112 to the letter. What is wrong in a head is answered once, and ends the connection."""

    @cases(BAD_HEADS)
    def test_a_bad_head_is_answered_once_however_it_arrives_and_ends_the_connection(self, fast, case):
        _, raw, status, code = case
        before, more = fast.get("/health"), raw + chat_request({"message": "smuggled"})
        for parts in ([raw], [more], parts_of(more, 1000)):
            connection = fast.connect()
            for part in parts:
                connection.send(part)
            response = fast.response(connection, close=False)
            check_problem(response, status, code)
            assert response.headers["connection"] == "close" and connection.at_end()
            connection.close()
        assert fast.get("/health")["total_requests"] == before["total_requests"]

    @cases(PLACES)
    def test_each_byte_may_stand_only_where_the_grammar_allows_it(self, fast, case):
        """RFC 9110, sections 5.5 and 5.6.2; RFC 9112, section 3.2."""
        _, start, end, allowed = case
        for byte in range(256):
            response, = fast.answers(start + bytes([byte]) + end)
            assert (response.status != 400) == (byte in allowed), (byte, response)

    def test_100_continue_is_sent_only_after_the_head_passed_its_checks(self, fast):
        """RFC 9110, section 10.1.1. (No refused request of the tables gets one.)"""
        connection = fast.connect()
        connection.send(http_request("POST", "/chat/stream", "Expect: 100-Continue", f"Content-Length: {len(HI)}"))
        assert connection.read_head().status == 100
        connection.send(HI)
        Stream(connection, fast.pace).check(message="Hi")

    def test_an_error_for_head_has_no_body(self, fast):
        """RFC 9110, section 9.3.2."""
        connection = fast.connect()
        for raw, status in [(http_request("HEAD", "/nope"), 404), (request_head("HEAD /health HTTP/1.1"), 400)]:
            connection.send(raw)
            assert fast.response(connection, "HEAD", close=False).status == status
        assert connection.at_end()

    def test_a_request_cut_short_starts_nothing(self, fast):
        raw, before = chat_request(HI + b"   "), fast.get("/health")
        for size in range(len(raw)):
            assert [response.status for response in fast.answers(raw[:size])] in ([], [400])
        assert fast.get("/health")["total_requests"] == before["total_requests"]

    def test_no_mutation_of_good_requests_does_harm(self, fast):
        first = random.randrange(10**9)
        deadline = time.monotonic() + 2
        for seed in itertools.takewhile(lambda _: time.monotonic() < deadline, itertools.count(first)):
            raw = mutant(seed)
            try:
                self.check_answers(raw, fast.answers(raw), fast.pace)
            except Exception as error:
                raise AssertionError(f"mutant({seed}): {raw!r}") from error
        fast.turn("Hi")

    def check_answers(self, raw, answers, pace):
        assert {answer.status for answer in answers} <= STATUSES
        assert sum(answer.status < 300 for answer in answers) <= raw.count(b"\r\n\r\n")
        assert all(answer.headers["connection"] == "keep-alive" for answer in answers[:-1])
        for answer in answers:
            if answer.status >= 400:
                check_problem(answer, answer.status, answer.json["code"])
            elif answer.headers.get("content-type") == "application/x-ndjson":
                check_turn(answer.body.splitlines(keepends=True), **pace)


# ---- Limits

def check_overloaded(response):
    """RFC 9110, section 15.6.4."""
    check_problem(response, 503, "overloaded")
    assert re.fullmatch("[0-9]+", response.headers["retry-after"])


def allow_files(count):
    """Let this process, and those that it starts, open so many files."""
    resource = pytest.importorskip("resource", reason="needs to set how many files may be open")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < count:
        pytest.skip(f"needs {count} open files; {hard} are allowed")
    if 0 <= soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@pytest.mark.usefixtures("slow_heads")
@strict
class TestLimits:
    """Past a limit there is a clear answer, and all others are served as before (RFC 9110, section 15; RFC 6585)."""

    @pytest.mark.parametrize("version, fields", [("HTTP/1.1", ["Connection: close"]), ("HTTP/1.0", [])])
    def test_a_late_byte_does_not_cut_an_answer_that_ends_the_connection(self, fast, version, fields):
        """RFC 9112, section 9.6, too."""
        message, connection = "word " * 500, fast.connect(receive_buffer=4096)
        connection.send(chat_request({"message": message}, *fields, version=version))
        connection.file.peek(1)
        connection.send(b"\r\n")
        time.sleep(0.1)
        check_turn(list(connection.lines(connection.read_head())), message=message, **fast.pace)
        assert connection.at_end()

    @pytest.mark.parametrize("line, field, status, code", [
        ("POST /chat/stream HTTP/1.1", f"Content-Length: {3 << 20}", 413, "payload_too_large"),
        ("POST /chat/stream HTTP/1.1", "Transfer-Encoding: chunked", 411, "length_required"),
        ("POST /nope HTTP/1.1", f"Content-Length: {3 << 20}", 404, "not_found"),
        ("POST /chat/stream HTTP/1.1", f"Content-Length: {3 << 20}, 0", 400, "bad_request"),
    ])
    @pytest.mark.parametrize("pause", [0, 0.005])
    def test_an_answer_arrives_whole_while_the_client_still_sends(self, fast, line, field, status, code, pause):
        """RFC 9112, section 9.6: a close that leaves bytes unread would reset the connection."""
        connection = fast.connect()
        connection.send(request_head(line, "Host: localhost", field))
        for _ in range(48):
            connection.send(bytes(1 << 16))
            time.sleep(pause)
        check_problem(fast.response(connection, close=False), status, code)
        assert connection.at_end()

    def test_past_max_connections_a_new_one_is_refused_and_the_others_are_served(self, own):
        server = own("--max-connections", "8", "--chunk-delay", "0")
        kept = [server.connect() for _ in range(8)]
        for raw in (b"", http_request("GET", "/health"), chat_request({"message": "Hi"})):
            ninth = server.connect()
            for part in parts_of(raw, 1000):
                ninth.send(part)
            check_overloaded(server.response(ninth, close=False))
            assert ninth.at_end()
        for connection in kept:
            connection.send(chat_request({"message": "Hi"}))
            check_turn(Stream(connection, server.pace).read().lines, message="Hi", **server.pace)
        for connection in kept:
            connection.close()
            assert wait_until(lambda: server.request("GET", "/health").status == 200)

    @waits
    def test_past_10_000_sessions_a_new_one_is_refused_and_none_is_thrown_out(self, serve):
        server = serve("--chunk-delay", "0", "--log", "off")
        connection = server.connect()
        for start in range(0, 10_000, 500):
            connection.send(b"".join(http_request("POST", "/sessions/new", body={"session_id": f"s-{number}"})
                                     for number in range(start, start + 500)))
            for _ in range(500):
                assert server.response(connection, close=False).status == 200
        news = [("/sessions/new", {}), ("/chat/stream", {"message": "Hi"}),
                ("/chat/stream", {"message": "Hi", "session_id": "one-more"})]
        for path, body in news:
            check_overloaded(server.request("POST", path, body))
        assert server.turn("Hi", session_id="s-0").info["created"] is False
        for number, (path, body) in enumerate(news, 1):
            assert server.request("DELETE", f"/sessions/s-{number}").status == 200
            assert server.request("POST", path, body).status == 200
            check_overloaded(server.request("POST", path, {"message": "Hi"}))
        assert server.get("/health")["active_sessions"] == 10_000

    def test_a_crowd_of_idle_and_dripping_connections_slows_nobody_down(self, own):
        allow_files(2500)
        server, done = own("--max-connections", "3000", "--chunk-delay", "0"), threading.Event()

        def seconds_to_the_first_chunk(_):
            time.sleep(0.02)
            began = time.monotonic()
            stream = server.chat("Hi")
            stream.read_until("chunk")
            seconds = time.monotonic() - began
            stream.check(message="Hi")
            return seconds

        def drip(connections):
            while not done.wait(0.1):
                for connection in connections:
                    with contextlib.suppress(ConnectionError):      # its deadline is over
                        connection.send(b"x")
        alone = statistics.median(map(seconds_to_the_first_chunk, range(20)))
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
            crowd = []
            while len(crowd) < 2200:
                crowd += [stack.enter_context(contextlib.closing(server.connect())) for _ in range(200)]
                server.get("/health")       # so that no more than these wait to be accepted
            dripping = pool.submit(drip, crowd[::11])
            try:
                crowded = statistics.median(map(seconds_to_the_first_chunk, range(20)))
            finally:
                done.set()
            dripping.result()
            crowd[1].send(http_request("GET", "/health"))
            assert server.response(crowd[1]).status == 200
        assert crowded < 5 * alone + 0.1

    def test_a_head_must_be_whole_10_seconds_after_its_first_byte(self, slow_heads):
        for future in slow_heads:
            future.result()

    @SLOW
    def test_a_body_must_be_whole_in_30_seconds_and_idleness_ends_in_silence_after_60(self, fast):
        in_parallel(lambda case: check_deadline(fast, case), SLOW_BODIES)


# ---- Who may come in

TOKEN = "s3cret~+/$HOME=="
BEARER = f"Authorization: Bearer {TOKEN}"
STRANGER = "evil.example"
FRIEND = "https://app.example:8443"     # the origin of a page that --allow-origin names
OPEN_PATHS = ("/", "/health", "/demo", "/docs", "/openapi.json")
EVERYTHING = [          # path, method; the last four paths are unknown
    (path.replace("{session_id}", "nobody"), method)
    for path, known in [*ROUTES, ("/nope", "GET"), ("/debug", "GET"), ("/health/", "GET"), ("/stats/../health", "GET")]
    for method in (*known.split(), "OPTIONS", "PUT", "TRACE", "BREW")]
NO_TOKENS = [           # name, field lines
    ("no field", ()), ("an empty field", ("Authorization:",)), ("the right one twice", (BEARER, BEARER)),
    ("the right one and another", (BEARER, "Authorization: Bearer x")),
    *((value, (f"Authorization: {value}",)) for value in (
        "Bearer", "Bearer x", TOKEN, f"Bearer{TOKEN}", f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x",
        f"Bearer {TOKEN.upper()}", f"Bearer {TOKEN}, Bearer {TOKEN}", f"Bearer {TOKEN}\u00e9")),
]
FIRST_FAULTS = [        # with a token?, Host, field lines; status and code of the first fault of several
    (False, STRANGER, ["no colon", "Origin: null"], 400, "bad_request"),
    (False, STRANGER, ["Origin: null"], 403, "forbidden_host"),
    (False, "localhost", ["Origin: null"], 403, "forbidden_origin"),
    (True, STRANGER, ["no colon", "Origin: null"], 400, "bad_request"),
    (True, STRANGER, ["Origin: null"], 403, "forbidden_origin"),
    (True, STRANGER, [], 401, "unauthorized"),
]
LOOPBACK_HOSTS = ["LocalHost", "localhost:65535", "127.0.0.1", "127.9.9.9:1", "127.255.255.255", "[::1]", "[::1]:80"]
OTHER_HOSTS = [
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil-localhost", "localhost-evil:80",
    "localhost%2eevil.example", "0.0.0.0", "10.0.0.1:8000", "126.255.255.255", "128.0.0.1", "2130706433", "[::]",
    "[::2]:80", "[::ffff:10.0.0.1]",
]
TARGETS = [             # target, Host, status: the target's host counts
    ("HTTP://LOCALHOST:1/health", STRANGER, 200), ("https://[::1]/health", STRANGER, 200),
    ("http://127.0.0.1/health?x=http://evil.example/", STRANGER, 200), ("http://evil.example/health", "localhost", 403),
    ("http://localhost.evil.example:80/health", "localhost", 403), ("http://evil.example", "localhost", 403),
]
OWN_ORIGINS = [         # Host, Origin
    ("localhost", "http://localhost"), ("localhost", "https://localhost"), ("localhost:80", "http://localhost"),
    ("127.0.0.1:443", "https://127.0.0.1"), ("127.0.0.1:8000", "http://127.0.0.1:8000"),
    ("[::1]:8000", "https://[::1]:8000"),
]
OTHER_ORIGINS = [       # name, field lines; the Host is localhost:8000
    *((origin or "an empty one", (f"Origin: {origin}",)) for origin in (
        "", "null", "http://evil.example", "http://localhost", "http://localhost:80", "http://localhost:8001",
        "http://localhost:800", "http://localhost:80000", "http://localhost:8000.evil.example", "localhost:8000",
        "http://evil-localhost:8000", "http://x.localhost:8000", "http://127.0.0.1:8000", "ftp://localhost:8000",
        "http://localhost:8000/", "http://x@localhost:8000", "http://localhost:8000 http://evil.example", FRIEND)),
    ("its own twice", ("Origin: http://localhost:8000",) * 2),
    ("its own and another", ("Origin: http://localhost:8000", "Origin: http://evil.example")),
]
READABLE = [            # status; method, path and field lines; body
    (200, ("GET", "/stats", BEARER), None), (200, ("POST", "/chat/stream", BEARER), {"message": "Hi"}),
    (200, ("HEAD", "/health"), None), (400, ("POST", "/chat/stream", BEARER), b"{"), (401, ("GET", "/stats"), None),
    (401, ("POST", "/chat/stream"), {"message": "Hi"}), (404, ("GET", "/nope", BEARER), None),
    (405, ("PUT", "/health"), None), (405, ("BREW", "/health"), None),
    (411, ("POST", "/chat/stream", BEARER, "Transfer-Encoding: chunked"), None),
    (413, ("POST", "/chat/stream", BEARER, "Content-Length: 9999999"), None), (204, ("OPTIONS", "/chat/stream"), None),
]
HOSTILE_PAGE = b"""<!DOCTYPE html><iframe name="frame"></iframe>
<form method="POST" enctype="text/plain" target="frame"><input name='{"message":"Hi","x":"' value='"}'></form>"""
ATTACKS = """
const [url] = args, body = '{"message":"Hi"}', chat = url + "/chat/stream";
const load = (object, start) => new Promise(resolve => {
  object.onload = () => resolve("loaded");
  object.onerror = () => resolve("refused");
  start(object);
});
const post = options => fetch(chat, {method: "POST", body, ...options}).then(answer => answer.type, () => "refused");
const form = document.forms[0];
form.action = chat;
return [
  await post({headers: {"Content-Type": "application/json"}}),
  await post({}),
  await load(new XMLHttpRequest(), xhr => { xhr.open("POST", chat); xhr.send(body); }),
  await load(new Image(), image => { image.src = url + "/sessions"; }),
  await load(document.createElement("script"), made => { made.src = url + "/stats"; document.head.append(made); }),
  await post({mode: "no-cors"}),
  await post({mode: "no-cors", headers: {"Content-Type": "application/x-www-form-urlencoded"}}),
  await post({mode: "no-cors", body: new Blob([body])}),
  navigator.sendBeacon(chat, body),
  await load(document.querySelector("iframe"), () => form.submit()),
];
"""
FETCH = """
const [url, headers] = args;
const answer = await fetch(url + "/chat/stream", {method: "POST", headers, body: '{"message":"Hi"}'});
return [answer.status, await answer.text()];
"""


def ask(server, method, path, *fields, host="localhost", body=None):
    """One request as anybody may send it: without the server's token, and with any Host."""
    connection = server.connect()
    connection.send(http_request(method, path, *fields, body=body).replace(b"localhost", host.encode(), 1))
    return server.response(connection, method)


def check_refusal(response, method, status, code):
    if method == "HEAD":
        assert response.status == status
    else:
        check_problem(response, status, code)


def readers_of(headers):
    """The origin whose pages may read an answer, if any."""
    names = [name for name in headers if name.startswith("access-control-")]
    if not names:
        return None
    assert "origin" in headers["vary"].lower() and headers["access-control-expose-headers"].lower() == "retry-after"
    return headers["access-control-allow-origin"]


@strict
class TestWhoMayComeIn:
    """A bearer token (RFC 6750), or loopback names only (RFC 9110, section 7.2); and no foreign pages (RFC 6454)."""

    @pytest.fixture
    def guarded(self, own):
        return own("--token", TOKEN, "--chunk-delay", "0.02", "--allow-origin", FRIEND)

    @pytest.fixture
    def friendly(self, own):
        return own("--allow-host", "chat.example.com", "--allow-host", "Other.Example", "--allow-origin", FRIEND,
                   "--allow-origin", "null")

    @cases(NO_TOKENS)
    def test_without_the_token_everything_but_the_open_paths_is_401(self, guarded, case):
        connection = guarded.connect()
        for path, method in EVERYTHING:
            if path not in OPEN_PATHS and method != "OPTIONS":
                connection.send(http_request(method, path, *case[1]))
                response = guarded.response(connection, method, close=False)
                check_refusal(response, method, 401, "unauthorized")
                assert response.headers["www-authenticate"] == "Bearer"
        connection.close()

    def test_with_the_token_and_on_the_open_paths_all_is_as_without_one(self, guarded, fast):
        for path, method in EVERYTHING:
            status = fast.request(method, path).status
            tokens = [(BEARER,), (f"authorization: bEARER {TOKEN}",)]
            for fields in [*tokens, ()] if path in OPEN_PATHS or method == "OPTIONS" else tokens:
                assert ask(guarded, method, path, *fields).status == status, (method, path, fields)
        assert ask(guarded, "GET", "/health?x", host=STRANGER).status == 200, "with a token any Host is served"
        guarded.turn("Hi")

    def test_the_first_check_that_fails_answers_on_every_path_and_method(self, guarded, fast):
        """Head, Host, Origin, token; all before route, method and body."""
        for (path, method), (token, host, fields, status, code) in itertools.product(EVERYTHING, FIRST_FAULTS):
            if code != "unauthorized" or (path not in OPEN_PATHS and method != "OPTIONS"):
                fields = (*fields, "Transfer-Encoding: chunked", "Content-Type: text/plain")
                response = ask(guarded if token else fast, method, path, *fields, host=host)
                check_refusal(response, method, status, code)

    def test_a_refusal_before_the_body_was_read_closes_the_connection(self, guarded):
        for fields, status in [((), 401), (("Origin: null",), 403), ((BEARER, "Origin: null"), 403)]:
            connection = guarded.connect()
            connection.send(chat_request({"message": "Hi"}, *fields) + http_request("GET", "/health"))
            response = guarded.response(connection, close=False)
            assert (response.status, response.headers["connection"], connection.at_end()) == (status, "close", True)
            connection.close()

    @pytest.mark.parametrize("flags", [(), ("--token", TOKEN)], ids=["no token", "token"])
    def test_the_curl_lines_in_details_work_as_they_stand(self, own, flags):
        needs("curl")
        server, session = own("--chunk-delay", "0.02", *flags), new_id()
        stream, printed = server.chat(LONG, session_id=session).read(3), []
        for more, status in [("Content-Type: text/plain", 415), ("Content-Type: application/json", 409)]:
            refused = ask(server, "POST", "/chat/stream", more, *server.fields, host="{}:{}".format(*server.address),
                          body={"message": "Hi", "session_id": session})
            detail = check_problem(refused, status, refused.json["code"])["detail"]
            assert TOKEN not in detail
            command = ["env", f"STREAMCHAT_TOKEN={TOKEN}", "sh", "-c", detail[detail.index("curl"):]]
            printed.append(run(command, ".").encode())
        check_turn(printed[0].splitlines(keepends=True), **server.pace)
        assert json.loads(printed[1])["stopped"] and stream.check().end["finish_reason"] == "cancelled"

    @waits
    def test_the_token_is_never_shown(self, serve):
        shown = subprocess.run([sys.executable, str(SERVER), "--help"], env=environment(STREAMCHAT_TOKEN=TOKEN),
                               capture_output=True, check=True, encoding="utf-8").stdout
        assert {"--token", "--allow-host", "--allow-origin"} <= set(re.findall(r"--[a-z-]+", shown))
        server = serve("--token", TOKEN, "--chunk-delay", "0", "--debug")
        server.turn("Hi")
        check_problem(ask(server, "GET", "/stats", f"Authorization: Basic {TOKEN}"), 401, "unauthorized")
        check_problem(ask(server, "GET", "/stats?" + TOKEN, BEARER, "no colon"), 400, "bad_request")
        paths = ("/", "/health", "/stats", "/debug", "/openapi.json")
        everything = [shown, *(server.request("GET", path).body.decode() for path in paths)]
        server.process.terminate()
        server.process.wait(PATIENCE)
        for text in (*everything, server.log()):
            assert TOKEN not in text

    @pytest.mark.parametrize("host", LOOPBACK_HOSTS)
    def test_a_loopback_host_is_served(self, fast, host):
        assert ask(fast, "GET", "/health", host=host).status == 200

    @pytest.mark.parametrize("host", OTHER_HOSTS)
    def test_any_other_host_is_refused(self, fast, host):
        for method, path in [("GET", "/health"), ("POST", "/chat/stream"), ("OPTIONS", "/stats")]:
            check_problem(ask(fast, method, path, host=host), 403, "forbidden_host")
        check_problem(ask(fast, "GET", "/health", f"Origin: http://{host}", host=host), 403, "forbidden_host")

    @cases(TARGETS)
    def test_the_host_of_the_target_goes_before_the_field(self, fast, case):
        target, host, status = case
        response = ask(fast, "GET", target, host=host)
        assert response.status == status and (status == 200 or response.json["code"] == "forbidden_host")

    def test_http_1_0_may_come_without_a_host_but_with_no_other(self, fast):
        for field, status, code in [("", 200, None), ("Host: evil.example\r\n", 403, "forbidden_host"),
                                    ("Origin: http://localhost\r\n", 403, "forbidden_origin")]:
            connection = fast.connect()
            connection.send(f"GET /health HTTP/1.0\r\n{field}\r\n".encode())
            response = fast.response(connection)
            assert (response.status, response.json.get("code")) == (status, code)

    @pytest.mark.parametrize("host, status", [
        ("chat.example.com", 200), ("CHAT.Example.com:8443", 200), ("other.example", 200), ("localhost", 200),
        ("x.chat.example.com", 403), ("chat.example.com.evil.example", 403), ("example.com", 403)])
    def test_a_flag_allows_more_hosts(self, friendly, host, status):
        assert ask(friendly, "GET", "/stats", host=host).status == status
        assert ask(friendly, "GET", "/stats", f"Origin: https://{host.lower()}", host=host.lower()).status == status

    @pytest.mark.parametrize("host, origin", OWN_ORIGINS)
    def test_the_servers_own_origin_is_served(self, fast, host, origin):
        for method, path in [("GET", "/health"), ("POST", "/sessions/new"), ("OPTIONS", "/chat/stream")]:
            response = ask(fast, method, path, f"Origin: {origin}", host=host)
            assert response.status in (200, 204) and readers_of(response.headers) is None

    @cases(OTHER_ORIGINS)
    def test_any_other_origin_is_refused(self, fast, case):
        before = fast.stats()
        for method, path in [("GET", "/health"), ("HEAD", "/"), ("POST", "/chat/stream"), ("OPTIONS", "/chat/stream")]:
            body = {"message": "Hi"} if method == "POST" else None
            response = ask(fast, method, path, *case[1], host="localhost:8000", body=body)
            check_refusal(response, method, 403, "forbidden_origin")
            assert readers_of(response.headers) is None
        assert fast.stats()["total_requests"] == before["total_requests"]

    @pytest.mark.parametrize("status, line, body", READABLE, ids=[f"{row[0]} {row[1][0]}" for row in READABLE])
    def test_an_allowed_origin_may_read_every_answer(self, guarded, status, line, body):
        method, path, *fields = line
        response = ask(guarded, method, path, *fields, f"Origin: {FRIEND}", body=body)
        assert (response.status, readers_of(response.headers)) == (status, FRIEND)
        assert readers_of(ask(guarded, method, path, *fields, body=body).headers) is None

    @pytest.mark.parametrize("origin, status", [
        (FRIEND, 200), ("null", 200), ("https://app.example", 403), ("http://app.example:8443", 403),
        (FRIEND + ".evil.example", 403), ("https://x.app.example:8443", 403)])
    def test_a_flag_allows_more_origins(self, friendly, origin, status):
        response = ask(friendly, "GET", "/stats", f"Origin: {origin}")
        assert (response.status, readers_of(response.headers)) == (status, origin if status == 200 else None)

    def test_a_preflight_tells_what_a_page_may_send(self, guarded):
        """Fetch Standard, section 3.2: without the token, the browser asks what a page may send beyond a form."""
        response = ask(guarded, "OPTIONS", "/sessions/nobody", f"Origin: {FRIEND}",
                       "Access-Control-Request-Method: DELETE", "Access-Control-Request-Headers: authorization")
        assert (response.status, readers_of(response.headers)) == (204, FRIEND)
        methods, fields, age = (response.headers["access-control-" + name]
                                for name in ("allow-methods", "allow-headers", "max-age"))
        assert {"GET", "DELETE"} <= set(methods.split(", "))
        assert set(fields.lower().split(", ")) == {"authorization", "content-type"} and int(age) > 0

    @waits
    def test_a_page_of_another_origin_reaches_nothing(self, serve, browser):
        server = serve()
        with Site(None, {"/": ("text/html", HOSTILE_PAGE), "/favicon.ico": ("image/png", b"")}) as page:
            browser.open(page.url)
            seen = browser.run(ATTACKS, url_of(server))
        assert seen == ["refused"] * 5 + ["opaque"] * 3 + [True, "loaded"], "an opaque answer tells the page nothing"
        assert wait_until(lambda: server.log().count("forbidden_origin") == 8), server.log()
        stats = server.stats()
        assert (stats["total_requests"], stats["total_sessions_created"]) == (0, 0)

    @waits
    def test_a_name_that_was_rebound_to_this_machine_reaches_nothing(self, serve, browser):
        url = f"http://rebind.example:{serve().address[1]}"
        browser.open(url + "/health")
        assert '"code": "forbidden_host"' in browser.run("return document.body.innerText;")
        status, text = browser.run(FETCH, url, {"Content-Type": "application/json"})
        assert (status, json.loads(text)["code"]) == (403, "forbidden_host")

    @pytest.mark.parametrize("flags", [(), ("--token", TOKEN)], ids=["no token", "token"])
    @waits
    def test_a_page_of_an_allowed_origin_streams(self, serve, browser, flags):
        with Site(None, {"/": ("text/html", b""), "/favicon.ico": ("image/png", b"")}) as page:
            server = serve("--chunk-delay", "0.02", "--allow-origin", page.url, *flags)
            browser.open(page.url)
            headers = {"Content-Type": "application/json"}
            with_token = headers | dict(field.split(": ") for field in server.fields)
            status, text = browser.run(FETCH, url_of(server), with_token)
            check_turn(text.encode().splitlines(keepends=True), message="Hi", **server.pace)
            assert browser.run(FETCH, url_of(server), headers)[0] == (401 if flags else 200)
            assert "TypeError" in browser.run(FETCH, url_of(server), with_token | {"X-Other": "x"}), "no preflight"


# ---- Configuration

INERT = "FORGED\u2028FORGED\u0085FORGED\u202eFORGED\u2066FORGED\u200fFORGED\u061cFORGED\x9b2J"    # may stand in a field
FORGED = "x\nFORGED\rFORGED\r\nFORGED\x1b[31mFORGED\x0bFORGED\x00FORGED\x07\x7f" + INERT
HOSTILE = [             # none begins a turn
    *(http_request(*line) for line in (
        ("GET", "/" + quote(FORGED)), ("GET", f"/sessions/{quote(FORGED)}"), ("GET", "/stats?" + quote(FORGED)),
        ("GET", f"/sessions/s/stream?after={quote(FORGED)}"), ("POST", f"/sessions/{quote(FORGED)}/stop"))),
    *(chat_request({"message": "Hi", "session_id": "s", "turn_id": "t", name: FORGED})
      for name in ("session_id", "turn_id")),
    http_request("POST", "/sessions/new", body={"model_id": FORGED}), chat_request(FORGED.encode()),
    *(http_request(method, target) for text in (FORGED, INERT)
      for method, target in (("GET", "/" + text), ("GET", "/stats?" + text), (text, "/stats"))),
    *(http_request("GET", "/stats", f"{name}: {text}") for text in (FORGED, INERT)
      for name in ("Origin", "Authorization", "User-Agent", "Content-Type", "Connection", "Expect", text)),
    *(http_request("GET", "/stats").replace(b"localhost", text.encode()) for text in (FORGED, INERT, "evil%0aFORGED")),
    http_request("GET", "/stats", "Origin: ?").replace(b"?", b"\x9b2J\x85FORGED\xff"),
]


def provoke(server):
    """Send each hostile request; tells how many were refused."""
    statuses = []
    for raw in HOSTILE:
        connection = server.connect()
        connection.send(raw)
        statuses.append(connection.read_head().status)
        connection.close()
    return sum(status >= 400 for status in statuses)


def raw_characters(text):
    """The characters of a log that would not stay in their line and place."""
    return {character for character in text if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")} - {"\n"}


def width(line):
    """Columns on a terminal: 2 for wide characters and for what U+FE0F makes an emoji, none for marks."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in line)
    marks = sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in line)
    return len(line) + wide - marks + line.count("\ufe0f")


class Terminal:
    """A program in a pseudo-terminal, as a person has it before them: what it has shown so far, and what they type."""

    SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[=>])")

    def __init__(self, command, columns=80, **more):
        pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
        termios = pytest.importorskip("termios", reason="needs pseudo-terminals")
        self.shown, self.read = b"", 0
        self.outer, inner = pty.openpty()
        termios.tcsetwinsize(inner, (50, columns))
        more = {"PYTHONIOENCODING": "utf-8", "TERM": "xterm", "COLUMNS": str(columns)} | more
        self.process = subprocess.Popen(command, env=environment(**more), stdin=inner, stdout=inner, stderr=inner)
        os.close(inner)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        os.close(self.outer)

    def _read(self):
        with contextlib.suppress(OSError):      # the terminal's other side is closed
            while data := os.read(self.outer, 65_536):
                self.shown += data

    @property
    def text(self):
        return self.shown.decode("utf-8", "replace")    # the last character may not be whole yet

    @property
    def plain(self):
        return self.SEQUENCE.sub("", self.text).replace("\r\n", "\n")

    def wait(self, pattern):
        """Wait for this to be shown, after what was waited for before. Returns the match."""
        compiled = re.compile(pattern, re.MULTILINE | re.DOTALL)
        found = wait_until(lambda: compiled.search(self.plain, self.read))
        assert found, f"no {pattern!r} in {self.plain[self.read:]!r}"
        self.read = found.end()
        return found

    def type(self, text):
        os.write(self.outer, text.encode("utf-8", "surrogateescape"))

    def seen(self):
        """What stands there for a person to see: what was overwritten or erased is gone."""
        lines, at = [[]], 0
        for part in re.findall(self.SEQUENCE.pattern + "|.", self.text, re.DOTALL):
            if part == "\n":
                lines.append([])
            elif part in "\r\b":
                at = 0 if part == "\r" else at - 1
            elif part == "\x1b[K":
                del lines[-1][at:]
            elif not part.startswith("\x1b"):
                lines[-1][at:at + width(part)] = [part, *"\0" * (width(part) - 1)]
                at += width(part)
        return "\n".join("".join(line).replace("\0", "").rstrip() for line in lines)


@contextlib.contextmanager
def terminal(*flags, **more):
    """A server of our own in a pseudo-terminal, and what it has shown so far."""
    with Terminal([sys.executable, str(SERVER), *flags], **more) as shown:
        port = shown.wait(r"^Serving on http://127\.0\.0\.1:(\d+)$")[1]
        yield Server("127.0.0.1", int(port), flags), lambda: shown.text


@NOT_OURS
class TestConfiguration:
    """The flags and the environment, and what the console shows. Text from outside never reaches it raw."""

    def test_the_model_is_offline_where_no_key_is_set(self, own):
        assert own().get("/health")["model"] == "offline"

    @pytest.mark.parametrize("flags, more", [
        (("--model", "offline"), {"GENAI_MODEL_ID": "gemini-x"}), ((), {"GENAI_MODEL_ID": "offline"}),
        (("--model", "offline"), {"GOOGLE_API_KEY": "no-real-key"}),
    ], ids=["the flag goes before the environment", "the environment names it", "a key is no obstacle"])
    @waits
    def test_the_offline_model_needs_no_key(self, serve, flags, more):
        server = serve(*flags, "--chunk-delay", "0", **more)
        assert server.get("/")["model"] == server.turn("Hi").info["model"] == "offline"

    def test_a_session_of_a_gemini_model_needs_a_key(self, own):
        response = own().request("POST", "/sessions/new", {"model_id": "gemini-x"})
        assert "GOOGLE_API_KEY" in check_problem(response, 400, "invalid_field")["detail"]

    def test_debug_is_there_only_with_its_flag(self, own):
        check_problem(own().request("GET", "/debug"), 404, "not_found")
        assert own("--debug").get("/debug")

    @pytest.mark.parametrize("level", ["full", "brief", "off"])
    @waits
    def test_the_log_shows_as_much_as_it_was_told(self, serve, level):
        server = serve("--log", level, "--chunk-delay", "0")
        before = server.log()
        assert before.endswith("\n") and before.splitlines()[-1].startswith("Serving on http://127.0.0.1:")
        server.answers(http_request("POST", "/sessions/new", "Content-Length: 2") + b"{}SECRET /rest of a body\r\n\r\n")
        server.turn("SECRET message", session_id="a-session")
        wait_until(lambda: "a-sess" in server.log(), seconds=0.3)
        log = server.log().removeprefix(before)
        assert ("SECRET" in log, "a-sess" in log) == (level == "full", level != "off")

    @waits
    def test_the_log_is_plain_where_it_is_no_terminal_and_cannot_be_forged(self, serve):
        server = serve("--log", "full", "--chunk-delay", "0")
        server.turn(FORGED)
        refusals = provoke(server)
        server.turn("LAST")
        assert wait_until(lambda: "LAST" in server.log())
        log = server.log()
        assert not raw_characters(log) and "\ufffd" not in log
        lines = [line for line in log.splitlines() if not line.startswith("Serving on ")]
        assert all(re.match(TIME.pattern + " [a-z_]+ [a-z_]+=", line) for line in lines), lines
        assert "FORGED" in log and sum(line.split()[1] == "refused" for line in lines) == refusals

    @pytest.mark.parametrize("colour", [True, False], ids=["colour", "NO_COLOR"])
    def test_on_a_terminal_the_log_is_boxes_and_chunks(self, colour):
        more = {} if colour else {"NO_COLOR": "1"}
        with terminal("--port", "0", "--chunk-delay", "0.02", **more) as (server, shown):
            server.turn("wide \u91cf\u5b50 \U0001f5a5\ufe0f \U0001f600 " + FORGED, session_id=new_id())
            provoke(server)
            stream = server.chat(LONG, session_id="s")
            stream.read_until("chunk")
            assert server.stop("s")
            assert wait_until(lambda: "Status: STOPPED" in shown())
            text = shown()
        assert ("\x1b[" in text) is colour
        plain = re.sub(r"\x1b\[\d*m", "", text).replace("\r\n", "\n")
        assert not raw_characters(plain)
        boxes = [line for line in plain.splitlines() if line[:1] in tuple("╔║╚┌│└")]
        assert {line[-1] for line in boxes} <= set("╗║╣╝┐│┘") and len(boxes) > 20
        assert {width(line) for line in boxes} == {64}, boxes
        assert 'Chunk #1: "You said: wide 量子"' in plain and plain.count("HTTP STREAM STARTED") == 2

    def test_a_console_that_knows_only_ascii_does_no_harm(self, serve):
        server = serve("--log", "full", "--chunk-delay", "0", PYTHONIOENCODING="ascii")
        server.turn("na\u00efve \U0001f600")
        assert server.log().isascii()


# ---- Reload. The files of the server that change are copies.

@contextlib.contextmanager
def reloading(serve, *flags):
    """A server with --reload, and its file, in a folder where all its files are ({folder} in flags). It is killed at
    the end, and nothing of it may run on."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (SERVER.name, "demo.html"):
            shutil.copy(SERVER.with_name(name), folder)
        program = Path(folder, SERVER.name)
        flags = [flag.format(folder=folder) for flag in flags]
        server = serve(*flags, "--reload", program=program, TMPDIR=folder)
        try:
            yield server, program
        finally:
            server.process.kill()
            assert wait_until(lambda: not processes_with(f"TMPDIR={folder}")), "a process is left behind"


def processes_with(variable):
    """The ids of the processes with this in their environment (Linux; elsewhere none is found)."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):      # it is not ours, or has ended
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.add(path.parts[2])
    return found


def save(path, text):
    """Another file takes its place, so that nobody ever sees half of it."""
    new = path.with_suffix(".new")
    new.write_text(text, "utf-8")
    new.replace(path)


def save_in_place(path, text):
    with path.open("r+", encoding="utf-8") as file:
        file.write(text)
        file.truncate()


def save_slowly(path, text):
    """It is missing for longer than it takes to notice that."""
    path.unlink()
    time.sleep(1.5)
    path.write_text(text, "utf-8")


def set_version(program, code, save=save):
    save(program, re.sub("^VERSION = .*", f"VERSION = {code}", program.read_text("utf-8"), flags=re.MULTILINE))


def wait_for_version(server, version):
    """Until then every connection is a new one, and must be answered."""
    assert wait_until(lambda: server.get("/")["version"] == version)


@NOT_OURS
class TestReload:
    """With --reload the server follows its files as they change. Sessions stay, and no connection is refused."""

    @pytest.mark.parametrize("flags", [(), ("--db", "{folder}/db")], ids=["without --db", "with --db"])
    @waits
    def test_a_change_is_served_and_no_connection_is_refused(self, serve, flags):
        with reloading(serve, *flags) as (server, program):
            started = {server.stats()["start_time"]}
            stream = server.chat("word " * 80, session_id="s")      # 2 s
            stream.read_until("chunk")
            for version in ("new", "newer"):
                set_version(program, f'"{version}"')
                in_parallel(lambda _, version=version: wait_for_version(server, version), range(4))
                started.add(server.stats()["start_time"])
            assert len(started) == 3
            turn = stream.check()
            assert turn.end["finish_reason"] == "stop"
            check_history(server, "s", "word " * 80, turn)
            assert server.turn("And?", session_id="s").end["message_count"] == 4

    @waits
    def test_a_long_turn_ends_after_5_seconds_and_the_client_runs_it_anew(self, serve):
        with reloading(serve) as (server, program), chatting(url_of(server), "--session", "s") as chat:
            chat.type("a " * 400 + "\r")    # 10 s
            chat.wait("You said: (a ){8}")
            stream = server.follow("s")
            set_version(program, '"new"')
            changed = time.monotonic()
            assert stream.check().end["code"] == "server_shutdown"
            assert time.monotonic() - changed > 4
            chat.wait("response again")
            chat.wait_for_prompt()
            check_shown(chat, server, "s")
            assert len(server.history("s")) == 2
            assert chat.leave()["Recovered Streams"] == "1"

    @waits
    def test_a_file_that_does_not_compile_is_shown_and_the_old_server_runs_on(self, serve):
        with reloading(serve) as (server, program):
            before = server.stats()["start_time"]
            set_version(program, "1.0.0")
            line = program.read_text("utf-8").partition("VERSION = ")[0].count("\n") + 1
            assert wait_until(lambda: re.search(rf"{re.escape(program.name)}\D+{line}\b", server.log()))
            assert server.turn("Hi").end["message_count"] == 2
            assert server.stats()["start_time"] == before
            set_version(program, '"new"')
            wait_for_version(server, "new")

    @waits
    def test_a_program_that_does_not_start_is_shown_and_the_old_one_goes_on(self, serve):
        with reloading(serve) as (server, program):
            before = server.stats()["start_time"]
            good = program.read_text("utf-8")
            for bad, told in ((good.replace("VERSION = ", "VERSION = unknown or ", 1), "NameError: name 'unknown'"),
                              (good.replace("= parse_arguments()", "= unknown", 1), "NameError: name 'unknown'"),
                              (good.replace("SCHEMA_VERSION = 2", "SCHEMA_VERSION = 3", 1), ""),
                              (good.partition("if __name__")[0], ""), ("", "")):      # these two are not saved whole
                save(program, bad)
                assert wait_until(lambda: "The old one goes on" in server.log())
                assert told in server.log()
                os.truncate(server.output, 0)       # there was a traceback, and there may not be another one
                assert server.turn("Hi").end["message_count"] == 2
                assert server.stats()["start_time"] == before
            save(program, good)
            set_version(program, '"new"')
            wait_for_version(server, "new")

    @waits
    def test_a_program_that_breaks_after_its_trial_is_not_run(self, serve):
        with reloading(serve) as (server, program):
            server.turn("Hi", session_id="s")
            server.chat("a " * 400).read_until("chunk")     # so that the end of the old server takes 5 s
            good = program.read_text("utf-8")
            set_version(program, '"new"')
            time.sleep(2)       # it has passed its trial
            save(program, good + "(")
            assert wait_until(lambda: "The old one goes on" in server.log())
            os.truncate(server.output, 0)       # there was a SyntaxError
            save(program, good)
            set_version(program, '"newer"')
            wait_for_version(server, "newer")
            assert server.turn("And?", session_id="s").end["message_count"] == 4

    @waits
    def test_no_change_is_missed_however_the_file_is_saved(self, serve):
        with reloading(serve) as (server, program):
            for saved in (save_in_place, save_slowly):
                set_version(program, f'"{saved.__name__}"', saved)
                wait_for_version(server, saved.__name__)
            for number in range(10):
                set_version(program, f'"{number}"')
                time.sleep(0.1)
            wait_for_version(server, "9")
            before = server.stats()["start_time"]
            page = program.with_name("demo.html")
            save(page, page.read_text("utf-8") + "<!-- new -->")
            assert wait_until(lambda: server.stats()["start_time"] != before)
            assert server.request("GET", "/demo").body.endswith(b"<!-- new -->")

    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
    @waits
    def test_without_a_database_a_private_one_is_kept_until_the_server_ends(self, serve, name):
        with reloading(serve) as (server, program):
            server.turn("Hi")
            files = {program, program.with_name("demo.html")}
            [private] = set(program.parent.iterdir()) - files
            assert private.stat().st_mode & 0o777 == 0o700
            server.process.send_signal(getattr(signal, name))
            assert server.process.wait(PATIENCE) == 0
            assert set(program.parent.iterdir()) == files


# ---- Models: the real google-genai package against a stand-in of Gemini's streaming HTTP API (server-sent events).
# ---- GOOGLE_GEMINI_BASE_URL leads there. The last user message chooses what happens: "case: NAME" is looked up in
# ---- GEMINI_REFUSALS and GEMINI_STREAMS, any other text is echoed in several responses.

KEY = "TESTKEY-0123456789_abcdefghijklmno"  # does not look like a key of Google's
GEMINI_PATH = re.compile(r"/\w+/(?P<model>.+):streamGenerateContent\?alt=sse")

HOLD = "wait until the test lets go"
CUT = "close the connection before the last transfer chunk"
RESET = "reset the connection"


class GeminiRequest(NamedTuple):
    path: str
    model: str
    headers: dict[str, str]  # names in lower case
    contents: list[dict]
    time: float

    @property
    def key(self) -> str | None:
        return self.headers.get("x-goog-api-key")

    @property
    def texts(self) -> list[tuple[str, str]]:
        return [(content["role"], "".join(part["text"] for part in content["parts"])) for content in self.contents]


def says(*parts, finish=None, usage=None, **more):
    """One GenerateContentResponse; a part is a text or a whole part."""
    candidate = {"index": 0}
    if parts:
        parts = [{"text": part} if isinstance(part, str) else part for part in parts]
        candidate["content"] = {"role": "model", "parts": parts}
    if finish:
        candidate["finishReason"] = finish
    return {"candidates": [candidate], "usageMetadata": usage or GEMINI_USAGE, "modelVersion": "gemini-test", **more}


def fails(status, message, word, **more):
    return {"error": {"code": status, "message": message, "status": word, **more}}


STRANGERS_KEY = "AIzaSySTRANGER-0123456789_abcdefghijklm"  # not a real one
GEMINI_USAGE = {"promptTokenCount": 7, "candidatesTokenCount": 5, "totalTokenCount": 12}
KEY_INVALID = {
    "@type": "type.googleapis.com/google.rpc.ErrorInfo",
    "reason": "API_KEY_INVALID",
    "domain": "googleapis.com",
    "metadata": {"service": "generativelanguage.googleapis.com"},
}
BAD_KEY = fails(400, "API key not valid. Please pass a valid API key.", "INVALID_ARGUMENT", details=[KEY_INVALID])
TELLTALE = fails(400, "Key <key> not valid (?key=<key>).", "INVALID_ARGUMENT", details=[KEY_INVALID, {"key": "<key>"}])
QUOTA = fails(429, "You exceeded your current quota.\n* Quota exceeded for metric: requests", "RESOURCE_EXHAUSTED")
BUSY = fails(503, "The model is overloaded. Please try again later.", "UNAVAILABLE")
BROKEN = fails(500, "An internal error has occurred.", "INTERNAL")
NOT_FOUND = fails(404, "models/<model> is not found for API version v1.", "NOT_FOUND")

# name → answers of the first try, the second …; the last one goes for all that follow, None is a good answer.
# A bytes body is sent as it is. <key> and <model> stand for those of the request.
GEMINI_REFUSALS = {
    "bad key": [(400, BAD_KEY)],
    "bad key repeated": [(400, TELLTALE)],
    "key repeated often": [(400, fails(400, "<key>" * 50, "INVALID_ARGUMENT"))],
    "bad request": [(400, fails(400, "GeminiRequest contains an invalid argument.", "INVALID_ARGUMENT"))],
    "unauthenticated": [(401, fails(401, "GeminiRequest had invalid authentication credentials.", "UNAUTHENTICATED"))],
    "forbidden": [(403, fails(403, f"Keys <key> and {STRANGERS_KEY} were leaked.", "PERMISSION_DENIED"))],
    "no such model": [(404, NOT_FOUND)],
    "quota once": [(429, QUOTA), None],
    "quota": [(429, QUOTA)],
    "busy": [(503, BUSY)],
    "busy and broken once": [(503, BUSY), (500, BROKEN), None],
    "broken": [(500, BROKEN)],
    "bad gateway": [(502, b"<html><title>502 Bad Gateway</title>" + b"<p>Wait.</p>" * 500)],
    "error without text": [(418, {"error": {"code": 418}})],
}

NO_TEXT = ["OTHER", "MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "LANGUAGE", "MOON_PHASE"]

# name → what to send, in order: a dict as a data line, bytes as they are, seconds to wait, or HOLD, CUT, RESET.
GEMINI_STREAMS = {
    "hold before text": [HOLD, says("Late.", finish="STOP")],
    "hold after text": [says("First "), HOLD, says("second.", finish="STOP")],
    "slow": [says("One "), 0.4, says("two.", finish="STOP")],
    "cut before text": [CUT],
    "cut in the middle": [says("Half an "), CUT],
    "cut in a line": [says("Half an "), b'data: {"candidates": [{"content": {"parts": [{"te', CUT],
    "reset in the middle": [says("Half an "), RESET],
    "end in a line": [says("Half an "), b'data: {"candidates": [{"content": {"parts": [{"te'],
    "no finish reason": [says("Half an "), says("answer")],
    "nothing at all": [],
    "error first": [fails(503, "The model is overloaded.", "UNAVAILABLE")],
    "quota in the middle": [says("Half an "), QUOTA],
    "bad key in the middle": [says("Half an "), TELLTALE],
    "error after a reason": [says("Half an ", finish="STOP"), BROKEN],
    "error in the middle": [says("Half an "), BROKEN],
    "error as bare lines": [says("Half an "), json.dumps(BROKEN, indent=2).encode()],
    "no JSON": [says("Half an "), b"data: <html>\n\n"],
    "blocked prompt": [{"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": GEMINI_USAGE}],
    **{f"prompt blocked by {word}": [{"promptFeedback": {"blockReason": word}}] for word in ("OTHER", "JAILBREAK")},
    "blocked answer": [says(finish="SAFETY")],
    "blocked after text": [says("Once upon "), says(finish="RECITATION")],
    "blocked by a new reason": [says("Once upon "), says(finish="MODEL_ARMOR")],
    "too long": [says("On and on"), says(" and", finish="MAX_TOKENS")],
    "too long thought": [says({"text": "Hm.", "thought": True}), says(finish="MAX_TOKENS")],
    "other": [says("Text"), says(finish="MALFORMED_RESPONSE")],
    **{f"only {word}": [says(finish=word)] for word in NO_TEXT},
    "unheard of": [says("Text"), says(finish="MOON_PHASE")],
    "reason on every piece": [says("One ", finish="STOP"), says("two.", finish="STOP")],
    "last reason counts": [says("One ", finish="STOP"), says("two.", finish="MAX_TOKENS")],
    "reason without parts": [says("One "), says("two."), says(finish="STOP")],
    "usage last": [
        says("One.", finish="STOP"),
        {"usageMetadata": {**GEMINI_USAGE, "thoughtsTokenCount": 3, "totalTokenCount": 15}},
    ],
    "unspecified": [says("One ", finish="FINISH_REASON_UNSPECIFIED"), says("two.", finish="STOP")],
    "thoughts": [
        says({"text": "The user wants", "thought": True}),
        says({"text": "Hm.", "thought": True}, "Answer", {"text": ".", "thoughtSignature": "c2lnbmVk"}, finish="STOP"),
    ],
    "empty texts": [says(""), says({}), says("One."), says(""), says("", finish="STOP")],
    "no text": [says("", finish="STOP")],
    "no parts": [says(finish="STOP")],
    "two candidates": [
        {"candidates": says("One.", finish="STOP")["candidates"] + [{"content": {"parts": [{"text": "B"}]}}]},
    ],
    "unknown fields": [says({"text": "One.", "mood": 1}, finish="STOP", weather={"sun": 1})],
    "line separators": [says("a\u2028b\u2029c\u0085d\x0be\x1cf"), says("g", finish="STOP")],
    "empty lines": [b"\r\n\r\n", says("One."), b"\r\n", says(finish="STOP")],
    "half a character": [
        b'data: {"candidates": [{"content": {"parts": [{"text": "a\\ud83d b"}]}, "finishReason": "STOP"}]}\n\n',
    ],
    "no last newline": [says("One "), b"data: " + json.dumps(says("two.", finish="STOP")).encode()],
    "white space": [says(" \n"), says("\t a  b\n\n"), says("\U0001f600\u0301 ", finish="STOP")],
}


class GeminiStandIn(ThreadingHTTPServer):
    """Serves from its making until close(), or as a context manager."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), GeminiHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[GeminiRequest] = []
        self.tries: Counter[str] = Counter()  # by case
        self.let_go = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.let_go.set()
        self.shutdown()
        self.server_close()

    def shutdown_request(self, request):
        request.close()  # no FIN before a RST

    def __exit__(self, *_):
        self.close()

    def asked(self, text):
        """The requests whose last message was this."""
        return [request for request in self.requests if request.texts and request.texts[-1] == ("user", text)]

    def handle_error(self, request, client_address):
        pass  # only a reader that left gets here


class GeminiHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        match = GEMINI_PATH.fullmatch(self.path)
        if not match:
            return self.refuse(404, b"no such path")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = GeminiRequest(self.path, match["model"], headers, body["contents"], time.monotonic())
        self.server.requests.append(request)
        for _, text in request.texts:
            if not text:
                return self.refuse(400, fails(400, "Unable to submit: empty text parameter", "INVALID_ARGUMENT"))
        text = request.texts[-1][1]
        case = text.removeprefix("case: ")
        refusals = GEMINI_REFUSALS.get(case, [None]) if text.startswith("case: ") else [None]
        refusal = refusals[min(self.server.tries[text], len(refusals) - 1)]
        # A case whose last answer is good starts anew after it, so that it can be asked twice.
        self.server.tries[text] = 0 if refusal is None else self.server.tries[text] + 1
        if refusal:
            return self.refuse(*refusal)
        if text.startswith("case: ") and case not in GEMINI_REFUSALS:
            self.stream(GEMINI_STREAMS[case])
        else:
            self.stream(echoes(request.texts))

    def encode(self, item, **options):
        """Gemini writes UTF-8 raw: of all that is not ASCII nothing is escaped."""
        if isinstance(item, bytes):
            return item
        text = json.dumps(item, ensure_ascii=False, **options)
        model = GEMINI_PATH.fullmatch(self.path)["model"].rpartition("/")[2]
        return text.replace("<key>", self.headers.get("x-goog-api-key", "")).replace("<model>", model).encode()

    def refuse(self, status, body):
        body = self.encode(body, indent=2)
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, steps):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for step in steps:
            if step is HOLD:
                self.server.let_go.wait(30)
            elif isinstance(step, float):
                time.sleep(step)
            elif step in (CUT, RESET):
                if step is RESET:  # linger 0: the kernel answers with RST
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return
            elif isinstance(step, bytes):
                self.transfer_chunk(step)
            else:
                self.transfer_chunk(b"data: " + self.encode(step) + b"\r\n\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def transfer_chunk(self, data: bytes):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


def echoes(texts):
    """"Message N: TEXT" in pieces of about eight characters, so that words are split as Gemini's tokens split them."""
    text = f"Message {len(texts)}: {texts[-1][1]}"
    given = sum(len(words.split()) for _, words in texts)
    pieces = [text[start : start + 8] for start in range(0, len(text), 8)]
    for number, piece in enumerate(pieces, 1):
        usage = {"promptTokenCount": given, "candidatesTokenCount": number, "totalTokenCount": given + number}
        yield says(piece, finish="STOP" if number == len(pieces) else None, usage=usage)


# What the service does, the finish_reason or error code it must come to, the text seen, the requests it takes, and
# what a failure's message must name.
MODEL_ENDS = [
    # refused
    ("bad key", "model_auth", "", 1, "GEMINI_API_KEY"),
    ("bad key repeated", "model_auth", "", 1, "GEMINI_API_KEY"),
    ("key repeated often", "model_error", "", 1, "[key]"),
    ("bad request", "model_error", "", 1, "invalid argument"),
    ("unauthenticated", "model_auth", "", 1, "401"),
    ("forbidden", "model_auth", "", 1, "403"),
    ("no such model", "model_not_found", "", 1, "GENAI_MODEL_ID"),
    ("bad gateway", "model_error", "", 1, "502"),
    ("error without text", "model_error", "", 1, "418"),
    # refused for now: three tries in all, before the first piece only
    ("quota once", "stop", "Message 3: case: quota once", 2, ""),
    ("busy and broken once", "stop", "Message 3: case: busy and broken once", 3, ""),
    ("quota", "model_overloaded", "", 3, "quota"),
    ("busy", "model_overloaded", "", 3, "overloaded"),
    ("broken", "model_error", "", 3, "500"),
    ("error first", "model_overloaded", "", 1, "overloaded"),
    ("quota in the middle", "model_overloaded", "Half an ", 1, "quota"),
    ("error in the middle", "model_error", "Half an ", 1, "500"),
    ("error as bare lines", "model_error", "Half an ", 1, "500"),
    ("error after a reason", "model_error", "Half an ", 1, "500"),
    ("bad key in the middle", "model_auth", "Half an ", 1, "GEMINI_API_KEY"),
    # cut
    ("cut before text", "model_cut", "", 1, ""),
    ("cut in the middle", "model_cut", "Half an ", 1, ""),
    ("cut in a line", "model_cut", "Half an ", 1, ""),
    ("end in a line", "model_cut", "Half an ", 1, ""),
    ("reset in the middle", "model_cut", "Half an ", 1, ""),
    ("no JSON", "model_cut", "Half an ", 1, ""),
    ("no finish reason", "model_cut", "Half an answer", 1, ""),
    ("nothing at all", "model_cut", "", 1, ""),
    # blocked
    ("blocked prompt", "model_blocked", "", 1, "PROHIBITED_CONTENT"),
    ("prompt blocked by OTHER", "model_blocked", "", 1, "OTHER"),
    ("prompt blocked by JAILBREAK", "model_blocked", "", 1, "JAILBREAK"),
    ("blocked answer", "model_blocked", "", 1, "SAFETY"),
    ("blocked after text", "content_filter", "Once upon ", 1, ""),
    ("blocked by a new reason", "content_filter", "Once upon ", 1, ""),
    # no text
    ("no text", "model_error", "", 1, "STOP"),
    ("no parts", "model_error", "", 1, "STOP"),
    ("too long thought", "model_error", "", 1, "MAX_TOKENS"),
    *((f"only {word}", "model_error", "", 1, word) for word in NO_TEXT),
    # finish reasons
    ("too long", "length", "On and on and", 1, ""),
    ("other", "other", "Text", 1, ""),
    ("unheard of", "other", "Text", 1, ""),
    ("reason on every piece", "stop", "One two.", 1, ""),
    ("last reason counts", "length", "One two.", 1, ""),
    ("reason without parts", "stop", "One two.", 1, ""),
    ("unspecified", "stop", "One two.", 1, ""),
    # texts
    ("slow", "stop", "One two.", 1, ""),
    ("thoughts", "stop", "Answer.", 1, ""),
    ("empty texts", "stop", "One.", 1, ""),
    ("empty lines", "stop", "One.", 1, ""),
    ("two candidates", "stop", "One.", 1, ""),
    ("unknown fields", "stop", "One.", 1, ""),
    ("usage last", "stop", "One.", 1, ""),
    ("line separators", "stop", "a\u2028b\u2029c\u0085d\x0be\x1cfg", 1, ""),
    ("half a character", "stop", "a\ufffd b", 1, ""),
    ("no last newline", "stop", "One two.", 1, ""),
    ("white space", "stop", " \n\t a  b\n\n\U0001f600\u0301 ", 1, ""),
]


@pytest.fixture(scope="class")
def stand_in():
    if OUTSIDE:
        pytest.skip("needs a server of our own, with special flags")
    with gemini_stand_in() as stand_in:
        yield stand_in


def gemini_stand_in():
    """Gemini's HTTP API, for the google-genai that is installed."""
    if not importlib.util.find_spec("google") or not importlib.util.find_spec("google.genai"):
        missing("google-genai")
    return GeminiStandIn()


def gemini_server(stand_in, *flags, serve=running, **more):
    """A server of our own whose Gemini is the stand-in."""
    urls = {"GOOGLE_GEMINI_BASE_URL": stand_in.url, "GOOGLE_VERTEX_BASE_URL": stand_in.url}
    return serve("--chunk-delay", "0", "--debug", *flags, **urls, **more)


@pytest.fixture(scope="class")
def gemini(stand_in):
    with gemini_server(stand_in, "--model", "gemini-test", GEMINI_API_KEY=KEY) as server:
        yield server


@pytest.fixture(scope="class")
def ends(gemini):
    """How the turn of each case ended, and the history then. Eight run at once, for the retries take seconds."""

    def run(case):
        session = case.replace(" ", "-")
        before = gemini.chat("hello", session_id=session).check()
        return gemini.chat(f"case: {case}", session_id=session).check(), gemini.history(session), before

    return dict(zip((row[0] for row in MODEL_ENDS), in_parallel(run, [row[0] for row in MODEL_ENDS]), strict=True))


VARIABLES = [           # name, environment; path and key of the request
    ("both keys and API version",
     {"GEMINI_API_KEY": "one", "GOOGLE_API_KEY": "two", "GOOGLE_GENAI_API_VERSION": "v1alpha"}, "/v1alpha/models/",
     "two"),
    ("Vertex", {"GEMINI_API_KEY": "one", "GOOGLE_GENAI_USE_VERTEXAI": "true"}, "/v1beta1/publishers/google/models/",
     "one"),
    ("Enterprise", {"GOOGLE_API_KEY": "two", "GOOGLE_GENAI_USE_ENTERPRISE": "1"}, "/v1beta1/publishers/google/models/",
     "two"),
]


UNREACHABLE = [         # name, environment; the code, and what the message names
    ("no such port", {"GOOGLE_GEMINI_BASE_URL": "http://127.0.0.1:9"}, "model_cut", "ConnectError"),
    ("a SOCKS proxy without its package", {"ALL_PROXY": "socks5://127.0.0.1:9"}, "model_error", "ALL_PROXY"),
    ("a proxy of an unknown kind", {"HTTPS_PROXY": "bogus://127.0.0.1"}, "model_error", "HTTPS_PROXY"),
    ("a proxy that is not there", {"HTTP_PROXY": "http://127.0.0.1:9"}, "model_error", "HTTP_PROXY"),
    ("a missing certificate", {"SSL_CERT_FILE": "/nonexistent"}, "model_error", "SSL_CERT_FILE"),
    ("a file that is no certificate", {"SSL_CERT_FILE": __file__}, "model_error", "SSL_CERT_FILE"),
    ("no URL", {"GOOGLE_GEMINI_BASE_URL": "localhost"}, "model_error", "GOOGLE_GEMINI_BASE_URL"),
    ("no login", {"GOOGLE_GENAI_USE_VERTEXAI": "true", "GOOGLE_APPLICATION_CREDENTIALS": "/nonexistent"}, "model_auth",
     "/nonexistent"),
]


@pytest.fixture(scope="class")
def unreachable(stand_in):
    """How a turn ends where these variables are set. They are asked while other tests wait."""
    def run(more):
        key = {} if "GOOGLE_GENAI_USE_VERTEXAI" in more else {"GEMINI_API_KEY": KEY}
        base = {"GOOGLE_GEMINI_BASE_URL": "http://gemini.invalid"} if "HTTP_PROXY" in more else {}
        without = dict.fromkeys(("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"), "")
        with running("--chunk-delay", "0", "--model", "gemini-test", **without | key | base | more) as server:
            return server.chat("hello").check().end
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, more) for name, more, *_ in UNREACHABLE}


@pytest.fixture(scope="class")
def asked(stand_in):
    """The requests of servers with these variables. They start while other tests wait: it takes them seconds."""
    def run(more):
        with gemini_server(stand_in, GENAI_MODEL_ID="gemini-test", **more) as server:
            text = new_id()
            server.turn(text)
            assert "Both" not in server.log()
        [request] = stand_in.asked(text)
        return request
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, more) for name, more, *_ in VARIABLES}


@NOT_OURS
@pytest.mark.usefixtures("asked", "unreachable")
class TestModels:
    """What Gemini does becomes the events of a turn, and a failed turn leaves the history as it was."""

    @cases(MODEL_ENDS)
    def test_each_end_of_the_model_has_its_code(self, stand_in, ends, case):
        name, end, text, requests, names = case
        turn, history, _ = ends[name]
        before = [("user", "hello"), ("model", "Message 1: hello")]
        assert turn.text == text
        if turn.end["type"] == "error":
            assert turn.end["code"] == end and names in turn.end["message"]
            assert history == before
        else:
            assert (turn.end["finish_reason"], turn.end["message_count"]) == (end, 4)
            assert history == [*before, ("user", f"case: {name}"), ("model", text)]
        assert len(stand_in.asked(f"case: {name}")) == requests

    def test_a_key_gets_out_nowhere(self, gemini, ends):
        paths = ("/", "/health", "/stats", "/debug", "/sessions", "/openapi.json")
        everything = [str(ends), gemini.log(), *(str(gemini.get(path)) for path in paths)]
        for text in everything:
            assert not any(part in text for part in (KEY[:10], KEY[-10:], STRANGERS_KEY))

    def test_the_package_prints_nothing_of_its_own(self, gemini, ends):
        for trace in ("Warning", "warnings.warn", "is not a valid", "google/genai", "Both"):
            assert trace not in gemini.log()

    def test_the_totals_balance_after_all_failures(self, gemini, ends):
        health = gemini.get("/health")
        assert health["failed_requests"] >= [turn.end["type"] for turn, _, _ in ends.values()].count("error")
        assert health["total_requests"] == health["successful_requests"] + health["failed_requests"]

    def test_retries_come_soon_but_not_at_once(self, stand_in, ends):
        first, second, third = (request.time for request in stand_in.asked("case: quota"))
        assert 0.3 < second - first < 3 and 0.3 < third - second < 4

    def test_the_first_piece_arrives_while_the_model_still_writes(self, gemini, stand_in):
        stand_in.let_go.clear()
        session = new_id()
        stream = gemini.chat("case: hold after text", session_id=session)
        assert stream.read_until("chunk")["text"] == "First "
        assert gemini.session(session)["streaming"]
        stand_in.let_go.set()
        turn = stream.check()
        assert (turn.text, turn.end["finish_reason"]) == ("First second.", "stop")

    def test_a_turn_stops_at_once_while_the_model_is_silent(self, gemini, stand_in):
        stand_in.let_go.clear()
        session = new_id()
        stream = gemini.chat("case: hold before text", session_id=session).read(2)
        asked = time.monotonic()
        assert gemini.stop(session)
        turn = stream.check()
        assert time.monotonic() - asked < 1
        assert (turn.end["finish_reason"], turn.end["message_count"], gemini.history(session)) == ("cancelled", 0, [])
        stand_in.let_go.set()
        assert gemini.turn("hello", session_id=session).end["finish_reason"] == "stop"  # the late piece did no harm

    def test_every_turn_sends_the_whole_history(self, gemini, stand_in):
        session = new_id()
        for message in ("one", "two \n", "three"):
            gemini.turn(message + session, session_id=session)
        sent = stand_in.asked("three" + session)[0]
        assert sent.texts == [
            ("user", "one" + session), ("model", f"Message 1: one{session}"),
            ("user", "two \n" + session), ("model", f"Message 3: two \n{session}"),
            ("user", "three" + session)]
        assert sent.key == KEY and sent.model == "models/gemini-test"

    def test_a_failed_turn_is_no_part_of_what_is_sent_next(self, gemini, stand_in):
        session = new_id()
        for message in ("case: cut in the middle", "case: bad request", "again" + session):
            gemini.chat(message, session_id=session).check()
        assert stand_in.asked("again" + session)[0].texts == [("user", "again" + session)]

    def test_a_failed_turn_is_run_anew_by_its_retry(self, gemini, stand_in):
        ids = {"session_id": (session := new_id()), "turn_id": "t"}
        failed = gemini.chat("case: bad request", **ids).check()
        assert gemini.chat("case: bad request", **ids).check().info != failed.info
        turn = gemini.turn("another message", **ids)
        assert turn.end["message_count"] == len(gemini.history(session)) == 2

    def test_complete_tells_the_usage(self, ends):
        *_, before = ends["usage last"]
        assert before.end["usage"] == {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
        with_thoughts = ends["usage last"][0].end["usage"]
        assert with_thoughts == {"input_tokens": 7, "output_tokens": 8, "total_tokens": 15}

    def test_many_turns_run_at_once(self, gemini, stand_in):
        stand_in.let_go.clear()
        streams = [gemini.chat("case: hold after text") for _ in range(120)]  # the package's own limit is 100
        starts = in_parallel(lambda stream: stream.read_until("chunk")["text"], streams, workers=120)
        stand_in.let_go.set()
        assert set(starts) == {"First "}
        assert {stream.check().end["finish_reason"] for stream in streams} == {"stop"}

    def test_a_session_may_have_a_model_of_its_own(self, gemini, stand_in):
        session = new_id()
        gemini.request("POST", "/sessions/new", {"session_id": session, "model_id": "gemini-other"})
        assert gemini.turn("own" + session, session_id=session).info["model"] == "gemini-other"
        assert stand_in.asked("own" + session)[0].model == "models/gemini-other"

    @cases(UNREACHABLE)
    def test_a_service_that_cannot_be_reached_says_why(self, unreachable, case):
        name, _, code, names = case
        end = unreachable[name].result()
        assert (end["code"], end["retryable"]) == (code, code == "model_cut"), end
        assert names in end["message"] and ("Google Cloud" in end["message"]) == (code == "model_auth"), end

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count threads and descriptors")
    @pytest.mark.parametrize("case", ["hold before text", "hold after text"])
    def test_a_stop_closes_the_request_to_the_model_at_once(self, stand_in, case):
        stand_in.let_go.clear()
        flags = ("--max-connections", "20", "--model", "gemini-test", "--log", "off")
        with gemini_server(stand_in, *flags, GEMINI_API_KEY=KEY) as server:
            folders = [Path(f"/proc/{server.process.pid}", name) for name in ("task", "fd")]

            def visit(session):
                stream = server.chat(f"case: {case}", session_id=session)
                stream.read_until("chunk") if "after" in case else stream.read(2)
                assert server.stop(session) and stream.check().end["finish_reason"] == "cancelled"
            visit(new_id())
            time.sleep(0.5)
            at_first = [len(list(folder.iterdir())) for folder in folders]
            for _ in range(60):         # three times as many as may run
                visit(new_id())
            assert wait_until(lambda: [len(list(folder.iterdir())) for folder in folders] <= at_first, 2)
        stand_in.let_go.set()

    @cases(VARIABLES)
    def test_the_variables_of_google_genai_count(self, asked, case):
        name, _, path, key = case
        request = asked[name].result()
        assert request.path.startswith(path) and request.key == key

    def test_a_key_chooses_gemini(self, stand_in):
        with gemini_server(stand_in, GEMINI_API_KEY=KEY) as server:
            assert server.get("/health")["model"] == "gemini-3.8-flash"


# ---- Models of our own: --model test_protocol:NAME. They are functions from a history to an iterator of strings.

class Waiting:
    """A model's answer that waits for a minute, or until another thread closes it. The second message is a file, in
    which it writes how it ended."""

    def __init__(self, history):
        self.closed, self.file = threading.Event(), history[-1].text
        Path(self.file).write_text("waits")

    def __iter__(self):
        yield "First. "
        self.closed.wait(60)

    def close(self):
        time.sleep(0.2)     # a server that ends waits for it
        if not self.closed.is_set():
            Path(self.file).write_text("closed")
        self.closed.set()


def silent_or_echo(history):
    if history[-1].text == "silent":
        time.sleep(60)
    yield history[-1].text


def roles_and_texts(history):
    for message in history:
        yield f"{message.role}: {message.text}. "


def endless(history):
    while True:
        yield "word "


def no_text(history):
    yield from ("", "")


def fails(history):
    yield "Half an "
    raise ValueError("SECRET")


def leaves(history):
    sys.exit("SECRET")
    yield ""


class Numbers(Waiting):
    """Yields what is not a string."""

    def __iter__(self):
        yield 5


class NoClose(Numbers):
    """And its close is an error."""

    @property
    def close(self):
        super().close()
        raise ValueError


class LeavesWhenClosed(Numbers):
    """And its close() wants to end the program."""

    def close(self):
        super().close()
        sys.exit()


class EvilError(Exception):
    def __str__(self):
        raise ValueError


def raises_evil(history):
    raise EvilError
    yield ""


def holds_a_file(history):
    held = socket.socket()
    yield "Half an answer. "
    raise ValueError(held.fileno())


def quotes(history):
    yield "Half an answer. "
    raise ValueError(history[-1].text)


class QuotesInTheEnd:
    """Its generator is closed by nobody but the garbage collector."""

    def __init__(self, history):
        self.history = history

    def __iter__(self):
        try:
            yield 5
        finally:
            raise ValueError(self.history[-1].text)


not_a_function = 5


class LocalModel(BaseHTTPRequestHandler):
    """OpenAI's API as Ollama and llama.cpp have it. The answer is the list of roles and the last message.

    It comes word by word, is cut before its end if that message is "cut", and goes on for ever if it is "endless".
    """
    protocol_version = "HTTP/1.1"
    closed = threading.Event()      # its client has left an endless answer

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        messages = asked["messages"]
        said = [*(message["role"] for message in messages), *messages[-1]["content"].split()]
        self.send_response(200 if asked["stream"] and self.path == "/v1/chat/completions" else 404)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.say({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]})
        for word in said if said[-1] != "endless" else itertools.repeat("word"):
            try:
                self.say({"choices": [{"index": 0, "delta": {"content": word + " "}}]})
            except OSError:
                self.closed.set()
                return
        if said[-1] != "cut":
            self.say({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self.say({"choices": [], "usage": {"total_tokens": 9}})
            self.send(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def say(self, data):
        self.send(f"data: {json.dumps(data)}\n\n".encode())

    def send(self, data):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, *_):
        pass


@NOT_OURS
class TestModelsOfYourOwn:
    """--model MODULE:FUNCTION."""

    PATH = str(SERVER.parent)

    def serve_model(self, serve, name, *flags):
        return serve("--model", f"test_protocol:{name}", "--chunk-delay", "0", *flags, PYTHONPATH=self.PATH)

    @waits
    def test_a_function_gets_the_history_and_its_return_is_stop(self, serve):
        server = self.serve_model(serve, "roles_and_texts")
        assert server.chat("one", session_id="s").check().text == "user: one. "
        turn = server.chat("two", session_id="s").check()
        assert (turn.text, turn.end["finish_reason"]) == ("user: one. model: user: one. . user: two. ", "stop")
        assert turn.info["model"] == server.get("/")["model"] == "test_protocol:roles_and_texts"

    @waits
    def test_it_is_found_in_the_current_folder(self, serve):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
            https = "import http.client, urllib.request\nhttp.client.HTTPSConnection, urllib.request.HTTPSHandler\n"
            itself = "import streamchat_server\n"
            Path(folder, "mine.py").write_text(itself + https + "def model(history):\n    yield 'mine'\n")
            command = [sys.executable, str(SERVER), "--port", "0", "--model", "mine:model"]
            process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=output)
            try:
                port = next(line for line in process.stdout if line.startswith(b"Serving on")).rpartition(b":")[2]
                assert Server("127.0.0.1", int(port)).chat("Hi").check().text == "mine"
            finally:
                process.kill()
                process.communicate()

    @waits
    def test_session_info_leaves_before_the_model_is_asked(self, serve):
        watching = """if True:
            import time
            import streamchat_server
            left, send = [], streamchat_server.Handler.send

            def slow_send(handler, data):
                time.sleep(0.2)
                send(handler, data)
                left.append(data)

            def model(history):
                streamchat_server.Handler.send = slow_send
                yield str(any(b'"session_info"' in data for data in left))
            """
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "watching.py").write_text(watching)
            server = serve("--model", "watching:model", "--chunk-delay", "0", PYTHONPATH=folder)
            server.chat("the next sends are slow").check()
            assert server.chat("Hi").check().text == "True"

    @waits
    def test_the_model_is_asked_even_if_session_info_could_not_be_sent(self, serve):
        breaking = """if True:
            import streamchat_server

            def broken_send(handler, data):
                raise ConnectionResetError

            def model(history):
                yield "Hi"

            write_stream = streamchat_server.Handler.write_stream

            def write_nothing(handler, stream):
                handler.send = broken_send.__get__(handler)
                write_stream(handler, stream)

            streamchat_server.Handler.write_stream = write_nothing
            """
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "breaking.py").write_text(breaking)
            server = serve("--model", "breaking:model", PYTHONPATH=folder)
            with pytest.raises(Cut):
                server.chat("Hi", session_id="s")
            assert wait_until(lambda: server.history("s") == [("user", "Hi"), ("model", "Hi")])

    @waits
    def test_the_readmes_model_streams_from_a_local_server(self, serve):
        with tempfile.TemporaryDirectory() as folder, ThreadingHTTPServer(("127.0.0.1", 0), LocalModel) as local:
            threading.Thread(target=local.serve_forever, args=(0.05,), daemon=True).start()
            address = ("127.0.0.1:11434", "{}:{}".format(*local.server_address))
            Path(folder, "local.py").write_text(replaced(block("python", "# local.py"), address), "utf-8")
            server = serve("--model", "local:answer", "--chunk-delay", "0", PYTHONPATH=folder)
            assert server.chat("one two", session_id="s").check().text == "user one two "
            assert server.chat("again", session_id="s").check().text == "user assistant user again "
            assert server.chat("cut", session_id="s").check().end["code"] == "model_error"
            os.truncate(server.output, 0)       # a traceback is right there
            endless = server.chat("endless", session_id="s").read(5)
            assert server.stop("s") and endless.check().end["finish_reason"] == "cancelled"
            assert LocalModel.closed.wait(PATIENCE), "the request to the local model goes on after a stop"
            local.shutdown()

    @pytest.mark.parametrize("name, text, told", [
        ("no_text", "", "stop"), ("fails", "Half an ", ""), ("leaves", "", ""), ("raises_evil", "", "")])
    @waits
    def test_what_goes_wrong_in_it_is_a_model_error_and_only_the_log_has_details(self, serve, name, text, told):
        server = self.serve_model(serve, name)
        turn = server.chat("Hi", session_id="s").check()
        assert (turn.text, turn.end["code"]) == (text, "model_error") and told in turn.end["message"]
        assert "SECRET" not in turn.end["message"] and server.history("s") == []
        if name in ("fails", "leaves"):
            assert wait_until(lambda: "SECRET" in server.log())
        os.truncate(server.output, 0)       # a traceback is right there, and nowhere else

    @pytest.mark.parametrize("name", ["quotes", "QuotesInTheEnd"])
    @waits
    def test_a_brief_log_has_no_text_of_an_error(self, serve, name):
        server = self.serve_model(serve, name, "--log", "brief")
        assert server.chat("SECRET").check().end["code"] == "model_error"
        assert wait_until(lambda: "trouble error=ValueError" in server.log())
        assert "SECRET" not in server.log() and "Traceback" not in server.log()
        os.truncate(server.output, 0)       # the error is right there

    @pytest.mark.parametrize("name", ["Numbers", "NoClose", "LeavesWhenClosed"])
    @waits
    def test_one_that_yields_no_strings_is_closed(self, serve, name):
        server = self.serve_model(serve, name)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "state")
            assert server.chat(str(file)).check().end["code"] == "model_error"
            assert wait_until(lambda: file.read_text() == "closed")
        os.truncate(server.output, 0)       # a traceback is right there

    @waits
    def test_a_final_chunk_that_is_held_back_comes_when_it_is_due(self, serve):
        server, waits = serve("--chunk-delay", "0.3"), []
        for _ in range(4):      # a busy machine may delay one of them
            chunks = [event_of(line) for line in server.chat("a b").read().lines[2:-1]]
            before, final = (chunk["timestamp"] for chunk in chunks[-2:])
            waits.append((datetime.fromisoformat(final) - datetime.fromisoformat(before)).total_seconds())
        assert 0.3 <= min(waits) < 0.39, waits

    @pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="processors can be chosen on Linux")
    @waits
    def test_only_one_of_your_own_has_all_processors(self, serve):
        processors = os.sched_getaffinity(0)
        assert os.sched_getaffinity(self.serve_model(serve, "roles_and_texts").process.pid) == processors
        server = serve()
        one = sorted(processors)[server.address[1] % len(processors)]
        assert os.sched_getaffinity(server.process.pid) == {one}

    @waits
    def test_what_a_failed_one_held_is_let_go(self, serve):
        server = self.serve_model(serve, "holds_a_file")
        files = f"/proc/{server.process.pid}/fd"
        if not Path(files).exists():
            pytest.skip("counts descriptors in /proc")
        server.chat("Hi").check()
        before = len(os.listdir(files))
        for _ in range(20):
            assert server.chat("Hi").check().end["code"] == "model_error"
        assert wait_until(lambda: len(os.listdir(files)) <= before)
        os.truncate(server.output, 0)       # tracebacks are right there

    @pytest.mark.parametrize("name", ["nothing:model", "test_protocol:nothing", "test_protocol:not_a_function", ":",
                                      "x:"])
    @waits
    def test_what_cannot_be_imported_is_refused_in_one_line(self, name):
        said = TestRunIt().refuse("--port", "0", "--model", name, PYTHONPATH=self.PATH)
        assert "--model offline" in said and "\n" not in said

    @waits
    def test_a_request_can_not_name_one(self, serve):
        server = self.serve_model(serve, "roles_and_texts")
        response = server.request("POST", "/sessions/new", {"model_id": "test_protocol:endless"})
        check_problem(response, 400, "invalid_field")

    @pytest.mark.parametrize("end", ["stop", "clear", "delete", "deserted", "shutdown"])
    @waits
    def test_whatever_ends_a_turn_closes_the_model(self, serve, end):
        server = self.serve_model(serve, "Waiting", "--resume-window", "0.2", "--heartbeat", "0.2")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "state")
            stream = server.chat(str(file), session_id="s")
            stream.read_until("chunk")
            assert file.read_text() == "waits"
            ways = {"stop": ("POST", "/stop"), "clear": ("POST", "/clear"), "delete": ("DELETE", "")}
            if end in ways:
                method, path = ways[end]
                assert server.request(method, f"/sessions/s{path}").status == 200
            elif end == "deserted":
                stream.abort()
            else:
                server.process.terminate()
            assert wait_until(lambda: file.read_text() == "closed")

    @waits
    def test_one_that_can_not_be_closed_counts_as_running(self, serve):
        server = self.serve_model(serve, "silent_or_echo", "--max-connections", "4")
        for number in range(4):
            server.chat("silent", session_id=f"s{number}").read(2)
            time.sleep(0.2)     # so that it is at work
            assert server.stop(f"s{number}")
        for _ in range(3):
            check_overloaded(server.request("POST", "/chat/stream", {"message": "Hi", "session_id": "another"}))

        def told(path):     # connections that are about to end are counted, too, so that one more may be refused
            answer = server.request("GET", path)
            return answer.json if answer.status == 200 else None

        assert wait_until(lambda: told("/stats"))["streams"] == []
        assert wait_until(lambda: told("/health"))["active_sessions"] == 4

    @waits
    def test_an_endless_one_is_stopped_and_the_server_goes_on(self, serve):
        server = serve("--model", "test_protocol:endless", "--log", "off", PYTHONPATH=self.PATH)
        stream = server.chat("Hi", session_id="s")
        stream.read_until("chunk", 3)
        assert server.stop("s")
        assert stream.check().end["finish_reason"] == "cancelled"
        assert server.get("/health")["status"] == "healthy"


# ---- Clients, and a proxy in front: the README's own, run as they stand there; only the address is replaced.

README = Path(__file__).with_name("README.md")
URL = "http://127.0.0.1:8000"       # the address in the README
CANCELLED = b'HTTP/1.1 200 OK\r\n\r\n{"type":"complete","finish_reason":"cancelled","total_chunks":0}\n'
TEXT = "Hello \u2028 caf\u00e9 \U0001f600, one two three"


def block(language, marker):
    """The README's fenced block of this language whose first line holds the marker."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    [found] = [text for text in blocks if marker in text.partition("\n")[0]]
    return found


def replaced(text, *changes):
    """The text with each of these changes, (old, new), made."""
    for old, new in changes:
        assert old in text, f"the README has no {old!r} any more"
        text = text.replace(old, new)
    return text


def cut_once(cuts):
    """The faults where a client gets the answer that was cut when it tries again."""
    return itertools.chain.from_iterable((Fault(cut=cut), Fault()) for cut in cuts)


BYTE_BY_BYTE = [Fault(split=True, delay=0.0002)]


class Site(Proxy):
    """A proxy that serves these pages itself, so that pages and streams have one origin."""

    def __init__(self, target, pages, faults=()):
        self.pages = pages
        super().__init__(target, faults)

    def fault_of(self, line):
        media_type, page = self.pages.get(line.split(" ")[1], ("", None))
        head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: {media_type}\r\n\r\n"
        return super().fault_of(line) if page is None else Fault(instead=head.encode() + page)


@contextlib.contextmanager
def restarting(before, after):
    """A proxy that cuts the first answer, after which the server is another one: the same, with its memory lost."""
    with Proxy(before.address, [Fault(cut=900)]) as proxy:
        proxy.note = lambda line, what: setattr(proxy, "target", after.address)
        yield proxy


def places_to_cut(server, step, connection_field="keep-alive"):
    """Every `step`th byte of an answer to TEXT, and every place between two transfer chunks, where a cut looks clean.

    The last one leaves out only the newline of the terminal event. The number in `processing_time` can be some bytes
    shorter next time, so no other place is as near to the end. `connection_field` is what the client sends.
    """
    connection = server.connect()
    ids = {"session_id": new_id(), "turn_id": new_id()}
    field = f"Connection: {connection_field}"
    connection.send(http_request("POST", "/chat/stream", field, body={"message": TEXT, **ids}))
    connection.socket.shutdown(socket.SHUT_WR)
    answer = connection.file.read()
    connection.close()
    end = answer.rindex(b"}\n") - 8
    clean = {match.end() for match in re.finditer(b"\r\n", answer[:end])}
    return [*sorted({*range(0, end, step)} | clean), b"\n\r\n0\r\n"]


def check_turns(server, turns):
    """Each of (session, text that the client showed) is in the history, once, as it was shown."""
    for session, shown in turns:
        history = server.history(session)
        assert [role for role, _ in history] == ["user", "model"], history
        assert history[1][1] == shown


INSTANT = ("--chunk-delay", "0", "--log", "off")


@pytest.fixture
def instant(own):
    """A server without pace."""
    return own(*INSTANT)


@pytest.fixture
def restarted(serve):
    """The same server when it is back, with its memory lost."""
    return serve("--chunk-delay", "0", "--log", "off")


def url_of(server):
    return "http://{}:{}".format(*server.address)


def run(command, folder, variables=()):
    """Run a program in a folder, and return what it printed."""
    done = subprocess.run(command, cwd=folder, env={**os.environ, **dict(variables)}, stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=60, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


MANY_TURNS = """
const turns = [];
for (let i = 0; i < count; i++) {
  const session = crypto.randomUUID(), pauses = [];
  globalThis.pause = seconds => { pauses.push(seconds); return 1; };
  let shown = "", said = "";
  try {
    for await (const part of chat(text, session)) shown += part;
  } catch (error) {
    said = "Refused: " + error.message;
  }
  turns.push([session, shown, said, pauses]);
}
"""


def in_javascript(url):
    """The README's program in JavaScript for this server, without its pauses."""
    seconds = "Math.max(pause, Math.min(60, asked))"
    pause = (f"1000 * {seconds}", f"globalThis.pause({seconds})")
    text, _, _ = replaced(block("js", "// chat.mjs"), (f'"{URL}"', f'"{url}"'), pause).partition("\nconst session")
    return text + "export {chat};\n"


class Shown(NamedTuple):
    """A turn of an example client."""
    session: str
    text: str           # what it showed
    said: str           # of an error
    pauses: list        # in seconds; the tests do not wait for them

    @property
    def answer(self):
        """The text without that of an earlier run."""
        return self.text.rpartition("dropped.]\n")[2]


def chat_in_javascript(url, count, folder):
    """Send TEXT in `count` sessions by the README's program in JavaScript."""
    node = needs("node")
    (folder / "chat.mjs").write_text(in_javascript(url), "utf-8")
    (folder / "many.mjs").write_text(f'import {{chat}} from "./chat.mjs"; const count = {count}, text = '
                                     f"{json.dumps(TEXT)};{MANY_TURNS}process.stdout.write(JSON.stringify(turns));")
    return [Shown(*turn) for turn in json.loads(run([node, "many.mjs"], folder))]


def chat_in_python(url, count, folder):
    """The same by the README's program in Python."""
    program, turns = types.ModuleType("chat"), []
    exec(compile(block("python", "# chat.py"), "chat.py", "exec"), vars(program))
    assert f"http://{program.SERVER}" == URL
    program.SERVER = url.removeprefix("http://")
    for _ in range(count):
        session, shown, pauses, said = new_id(), "", [], ""
        program.time = types.SimpleNamespace(sleep=pauses.append)
        try:
            for text in program.chat(TEXT, session):
                shown += text
        except Exception as error:
            said = f"Refused: {error}"
        turns.append(Shown(session, shown, said, pauses))
    return turns


class TestClients:
    """Readers that others wrote see the same lines."""

    def test_the_standard_librarys_client_reads_a_stream(self, fast):
        client = http.client.HTTPConnection(*fast.address, timeout=PATIENCE)
        for message in ("Hello", "again"):
            client.request("POST", "/chat/stream", json.dumps({"message": message}))
            check_turn(client.getresponse().read().splitlines(keepends=True), message=message, **fast.pace)
        client.close()


VARIED = ["uptime_seconds", "average_response_time", "total_bytes", "p50", "p95", "duration_minutes",
          "session_duration_seconds", "processing_time"]      # and their numbers


def normal(text):
    """What a server prints, without what differs from run to run."""
    with contextlib.suppress(ValueError):       # one JSON object: the README breaks its lines
        text = json.dumps(json.loads(text), sort_keys=True)
    for pattern, name in [(TIME.pattern, "TIME"), (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID"),
                          (rf'"({"|".join(VARIED)})": ?[0-9.]+', r'"\1":NUMBER'),
                          (r"(?m)^Date: .*$", "DATE"), (r"(?m)^[0-9a-f]+\r\n(?=\{)", "SIZE")]:
        text = re.sub(pattern, name, text)
    return text.strip()


@NOT_OURS
class TestReadme:
    """What the README shows is what the server does."""

    @waits
    def test_the_exchange_and_the_commands_after_it(self, serve):
        needs("curl")
        request, answer = re.findall(r"^```http\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        head, _, body = answer.partition("\n\n")
        shown = head.replace("\n", "\r\n") + "\r\n\r\n"
        for row in body.splitlines():       # its ends of lines are written out
            text = re.sub(r"(\\n)?(\\r\\n)+$", "", row)
            shown += text + row[len(text):].replace("\\r", "\r").replace("\\n", "\n")
        for size, line in re.findall(r"\r\n([0-9a-f]+)\r\n(\{.*\n)", shown):
            assert int(size, 16) == len(line) or "NUMBER" in normal(line), f"{size} is not the size of {line}"
        story = serve()
        connection = story.connect()
        connection.send(request.rstrip("\n").replace("\n", "\r\n").encode())
        sent = b""
        while not sent.endswith(b"\r\n0\r\n\r\n"):
            sent += connection.take(1)
        connection.close()
        assert normal(sent.decode()) == normal(shown)

        commands = re.findall(r"^\$ (curl .*)\n((?:.*\n)*?)(?=```$|\$ )", README.read_text("utf-8"), re.MULTILINE)
        assert len(commands) == 10
        for command, shown in commands:
            server = story
            if "/chat/stream" in command or "/stop" in command:     # of their own: they are no part of the story
                server = serve()
            stream = server.chat(LONG, session_id="demo").read(3) if "/stop" in command else None
            command = replaced(command, ("curl", "curl -sS"), ("localhost:8000", url_of(server)))
            assert normal(run(["sh", "-c", command], ".")) == normal(shown)
            assert not stream or stream.check().end["finish_reason"] == "cancelled"

    def test_every_link_has_its_heading(self):
        text = README.read_text("utf-8")
        headings = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
                    for heading in re.findall("^##+ (.*)$", text, re.MULTILINE)}
        links = re.findall(r"\]\(#([^)]+)\)", text)
        assert len(links) > 30 and set(links) <= headings

    def test_every_flag_is_told_with_its_default(self):
        text = README.read_text("utf-8")
        said = run([sys.executable, SERVER, "--help"], ".", {"COLUMNS": "1000"})
        for flag, default in re.findall(r"(--[a-z-]+) N .*\(default: (.*)\)", said):
            assert f"| `{flag}` | {default} |" in text or f"`, `{flag}` | `127.0.0.1`, `{default}` |" in text
        for flag in {*re.findall("--[a-z-]+", said)} - {"--help"}:
            assert f"`{flag}`" in text

    def test_every_code_is_told(self, instant):
        schemas = instant.get("/openapi.json")["components"]["schemas"]
        told = set(re.findall(r"`(\w+)`", README.read_text("utf-8").partition("\n## Errors\n")[2]))
        for kind in ("problem", "error"):
            assert set(schemas[kind]["properties"]["code"]["enum"]) <= told

    def test_the_client_as_a_library(self, instant, tmp_path):
        """The program that the client's first lines show."""
        program = re.search(r"\n    (from streamchat_client .*?)\nThe answer", CLIENT.read_text("utf-8"), re.DOTALL)[1]
        program = replaced(textwrap.dedent("    " + program), (URL, url_of(instant)))
        (tmp_path / "library.py").write_text(program, "utf-8")
        shutil.copy(CLIENT, tmp_path)
        assert run([sys.executable, "library.py"], tmp_path).startswith("You said: Hello!\n")

    def test_the_client_in_scripts(self, instant, tmp_path):
        client = (f"python3 {CLIENT.name}", f"{sys.executable} {CLIENT} --url {url_of(instant)}")
        printed = run(["sh", "-ec", replaced(block("sh", "# scripts.sh"), client)], tmp_path)
        assert (tmp_path / "answer.txt").read_text("utf-8").startswith("You said: Why is the sky blue?\n")
        assert re.fullmatch("You said: Sum this up:\nYou said: Why .*You said: And in one .*[45]\n", printed, re.DOTALL)


def problem_of(status, *fields):
    """A fault: this status instead of the answer."""
    lines = [f"HTTP/1.1 {status} Reason", "Content-Length: 14", *fields, "", '{"detail":"x"}']
    return Fault(instead="\r\n".join(lines).encode())


def error_event(code, retryable):
    """A fault: this terminal event instead of the answer."""
    event = {"type": "error", "code": code, "message": "No such luck.", "retryable": retryable}
    return Fault(instead=b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(event).encode() + b"\n")


@pytest.mark.parametrize("chat", [chat_in_python, chat_in_javascript])
class TestExampleClients:
    """Both programs of the README show each answer once and whole."""

    def whole(self, chat, server, proxy, folder, count=1):
        """Send `count` messages through the proxy; each is in the history, once, as it was shown."""
        turns = chat(proxy.url, count, folder)
        check_turns(server, [(turn.session, turn.answer) for turn in turns])
        return turns

    def test_a_cut_at_any_byte_neither_loses_nor_doubles_text(self, instant, chat, tmp_path):
        cuts = places_to_cut(instant, 29)
        with Proxy(instant.address, cut_once(cuts)) as proxy:
            turns = self.whole(chat, instant, proxy, tmp_path, len(cuts))
            assert len(proxy.requests) == 2 * len(cuts)
        assert not any("dropped" in turn.text for turn in turns)

    def test_lines_may_come_byte_by_byte(self, instant, chat, tmp_path):
        with Proxy(instant.address, BYTE_BY_BYTE) as proxy:
            self.whole(chat, instant, proxy, tmp_path)
            assert len(proxy.requests) == 1

    def test_another_run_drops_what_was_shown(self, instant, restarted, chat, tmp_path):
        with restarting(instant, restarted) as proxy:
            [turn] = self.whole(chat, restarted, proxy, tmp_path)
        again = r"You said.*\n\[The turn was run again\..*\]\n" + re.escape(turn.answer)
        assert re.fullmatch(again, turn.text, re.DOTALL)

    @pytest.mark.parametrize("fault", [problem_of(502), problem_of(408), error_event("server_shutdown", True)])
    def test_what_may_pass_is_tried_again(self, instant, chat, tmp_path, fault):
        with Proxy(instant.address, [fault]) as proxy:
            self.whole(chat, instant, proxy, tmp_path)

    @pytest.mark.parametrize("fault", [problem_of(409), problem_of(500), error_event("model_auth", False)])
    def test_what_stays_wrong_is_told(self, instant, chat, tmp_path, fault):
        with Proxy(instant.address, [fault]) as proxy:
            [turn] = chat(proxy.url, 1, tmp_path)
            assert turn.said in ('Refused: {"detail":"x"}', "Refused: No such luck.")
            assert len(proxy.requests) == 1

    @pytest.mark.parametrize("line", [b"<html>", b"null", b"[1]", b"1"])
    def test_a_line_of_another_protocol_is_final(self, chat, tmp_path, line):
        with Proxy(None, [Fault(instead=b"HTTP/1.1 200 OK\r\n\r\n" + line + b"\n")]) as proxy:
            assert chat(proxy.url, 1, tmp_path)[0].said and len(proxy.requests) == 1

    def test_a_turn_that_was_stopped_is_told_from_a_whole_answer(self, instant, chat, tmp_path):
        with Proxy(instant.address, [Fault(instead=CANCELLED)]) as proxy:
            assert chat(proxy.url, 1, tmp_path)[0].text == " [cancelled]"

    def test_unknown_events_and_blank_lines_are_ignored(self, chat, tmp_path):
        unknown = line_of("unknown", chunk_number=9, total_chunks=9, retryable=False)
        events = [unknown, INFO, b"\n", unknown, STATUS, *CHUNKS, unknown, COMPLETE]
        with Proxy(None, [Fault(instead=b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(events))]) as proxy:
            assert chat(proxy.url, 1, tmp_path)[0].text == "".join(WORDS)

    def test_missing_lines_are_a_cut(self, instant, chat, tmp_path):
        for events in ([INFO, CHUNKS[1], line_of("complete", finish_reason="stop", total_chunks=0)], [INFO, COMPLETE]):
            lines = Fault(instead=b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(events))
            with Proxy(instant.address, [lines]) as proxy:
                self.whole(chat, instant, proxy, tmp_path)

    def test_eight_retries_without_progress_are_the_end(self, instant, chat, tmp_path):
        with Proxy(instant.address, itertools.repeat(Fault(cut=0))) as proxy:
            [turn] = chat(proxy.url, 1, tmp_path)
            assert turn.said == "Refused: No whole answer after 8 retries." and len(proxy.requests) == 9
        for pause, longest in zip(turn.pauses, [0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5], strict=True):
            assert longest / 2 <= pause <= longest

    def test_each_new_chunk_gives_eight_more(self, instant, chat, tmp_path):
        cuts = [Fault(cut=f'"chunk_number":{number},'.encode()) for number in range(2, 5) for _ in range(8)]
        with Proxy(instant.address, cuts) as proxy:
            self.whole(chat, instant, proxy, tmp_path)
            assert len(proxy.requests) == 25

    @pytest.mark.parametrize("asked, pause", [("7", 7), ("3600", 60)])
    def test_retry_after_is_kept_up_to_a_minute(self, instant, chat, tmp_path, asked, pause):
        with Proxy(instant.address, [problem_of(503, "Connection: close", f"Retry-After: {asked}")]) as proxy:
            assert self.whole(chat, instant, proxy, tmp_path)[0].pauses == [pause]


@NOT_OURS
class TestExamplesAsTheyStand:
    """Each program of the README runs; only the address is replaced."""

    def check(self, printed):
        assert printed.count("You said: ") == 2 and "2 messages came before this one." in printed

    def test_in_python(self, instant, tmp_path):
        address = (f'"{URL.removeprefix("http://")}"', '"{}:{}"'.format(*instant.address))
        (tmp_path / "chat.py").write_text(replaced(block("python", "# chat.py"), address), "utf-8")
        self.check(run([sys.executable, "chat.py"], tmp_path))

    def test_in_javascript(self, instant, tmp_path):
        (tmp_path / "chat.mjs").write_text(replaced(block("js", "// chat.mjs"), (URL, url_of(instant))), "utf-8")
        self.check(run([needs("node"), "chat.mjs"], tmp_path))


WAIT = f"""
for (const end = Date.now() + {PATIENCE * 1000}; Date.now() < end; await new Promise(then => setTimeout(then, 20))) {{
  try {{ const value = CONDITION; if (value) return value; }} catch {{ }}
}}
"""
# W3C WebDriver, section "Keyboard actions"
TAB, ENTER, SHIFT, ESCAPE, ARROW_UP = "\ue004", "\ue007", "\ue008", "\ue00c", "\ue013"


class Browser:
    """Chromium, driven by WebDriver over plain HTTP."""

    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--window-size=1200,900",
             "--host-resolver-rules=MAP rebind.example 127.0.0.1")

    def __enter__(self):
        driver = needs("chromedriver")
        self.profile = tempfile.mkdtemp()
        self.driver = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       encoding="utf-8")
        try:
            ready = next(filter(None, (re.search(r"successfully on port (\d+)", line) for line in self.driver.stdout)))
            self.port, self.session = int(ready[1]), ""
            options = {"binary": needs("chromium"), "args": [*self.FLAGS, f"--user-data-dir={self.profile}"]}
            asked = {"alwaysMatch": {"goog:chromeOptions": options, "timeouts": {"script": 30_000},
                                     "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}}
            self.session = "/" + self.ask("POST", "", capabilities=asked)["sessionId"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.session:
            self.ask("DELETE", "")
        self.driver.terminate()
        self.driver.wait(PATIENCE)
        self.driver.stdout.close()
        shutil.rmtree(self.profile, ignore_errors=True)

    def ask(self, method, path, **body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, f"/session{self.session}{path}", json.dumps(body) if method == "POST" else None)
        value = json.loads(connection.getresponse().read())["value"]
        connection.close()
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def open(self, url):
        self.ask("POST", "/url", url=url)

    def run(self, script, *args):
        """The value that a function body in JavaScript resolves to."""
        script = f"const [...args] = arguments, done = args.pop(); (async () => {{{script}}})().then(done, " \
                 "error => done(String(error)));"
        return self.ask("POST", "/execute/async", script=script, args=list(args))

    def wait(self, condition, *args):
        """The value of an expression in JavaScript, once it is true; what it needs may not be there yet."""
        value = self.run(WAIT.replace("CONDITION", condition), *args)
        assert value, (condition, args, self.run("return document.body.innerText;"), self.console())
        return value

    def click(self, css):
        self.wait("document.querySelector(args[0])?.checkVisibility()", css)
        [element] = self.ask("POST", "/element", using="css selector", value=css).values()
        try:
            self.ask("POST", f"/element/{element}/click")
        except AssertionError as error:
            if "stale element" not in str(error):
                raise
            self.click(css)     # the page has drawn it anew meanwhile

    def keys(self, text, held=""):
        """Press one key after the other, for whatever has the focus."""
        pressed = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        down, up = ([{"type": kind, "value": key} for key in held] for kind in ("keyDown", "keyUp"))
        self.ask("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": [*down, *pressed, *up]}])

    @contextlib.contextmanager
    def tab(self, kind="tab"):
        """A new tab, which hides the one before; or a "window" beside, where both are seen. It is closed at the end."""
        before = self.ask("GET", "/window")
        handle = self.ask("POST", "/window/new", type=kind)["handle"]
        self.show(handle)
        if kind == "window":
            self.ask("POST", "/window/rect", x=1200, y=0)
        try:
            yield handle
        finally:
            self.show(handle)
            self.ask("DELETE", "/window")
            self.show(before)

    def show(self, handle):
        """Go to another tab or window."""
        self.ask("POST", "/window", handle=handle)

    def cdp(self, command, **parameters):
        """What WebDriver has no word for (Chrome DevTools Protocol)."""
        return self.ask("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def console(self):
        """What the console got since this was asked last."""
        return self.ask("POST", "/se/log", type="browser")

    def requests(self):
        """The URLs that pages asked for since this was asked last. (A new tab is a page of the browser's own.)"""
        entries = [json.loads(entry["message"])["message"] for entry in self.ask("POST", "/se/log", type="performance")]
        asked = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in asked if not each["documentURL"].startswith("chrome:")]


class TestExampleClientInABrowser:
    @waits
    def test_it_survives_a_cut_at_any_byte(self, serve, browser):
        server = serve(*INSTANT)
        cuts = places_to_cut(server, 37)
        pages = {"/": ("text/html", b""), "/chat.mjs": ("text/javascript", in_javascript("").encode())}
        with Site(server.address, pages, cut_once(cuts)) as proxy:
            browser.open(proxy.url + "/")
            turns = browser.run('const {chat} = await import("/chat.mjs"), [count, text] = args;' + MANY_TURNS
                                + "return turns;", len(cuts), TEXT)
        check_turns(server, [turn[:2] for turn in turns])


def nginx(server, *changes):
    """The README's configuration for one server in a real nginx."""
    one = "".join(line for line in block("nginx", "# nginx.conf").splitlines(keepends=True) if "# *" not in line)
    return in_nginx(one, ("127.0.0.1:8000", "{}:{}".format(*server.address)), *changes)


@contextlib.contextmanager
def in_nginx(conf, *changes):
    """The README's configuration in a real nginx, with its address and these changes replaced; yields its address."""
    program = needs("nginx", "/usr/sbin", "/usr/local/sbin")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
    text = replaced(conf, ("listen 80;", "listen {}:{};".format(*address)), *changes)
    with tempfile.TemporaryDirectory() as folder:
        user = "user root;" if hasattr(os, "geteuid") and os.geteuid() == 0 else ""
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        file = Path(folder, "conf")
        file.write_text(f"daemon off; pid {folder}/pid; {user} events {{}} http {{ access_log off; {paths}\n{text}}}")
        process = subprocess.Popen([program, "-p", folder, "-e", f"{folder}/log", "-c", file], stderr=subprocess.PIPE)
        try:
            assert wait_until(lambda: process.poll() is not None or answers(address)), "nginx does not start"
            assert process.poll() is None, process.stderr.read().decode()
            yield address
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE)


def answers(address):
    with contextlib.suppress(OSError):
        socket.create_connection(address).close()
        return True
    return False


class TestProxy:
    @pytest.fixture
    def server(self, own):
        return own("--chunk-delay", "0.05", "--log", "off")

    def lines(self, address, method, path, body=None):
        """The lines of a stream through the proxy, each as it comes. (nginx keeps X-Accel-Buffering to itself.)"""
        connection = Connection(address)
        connection.send(http_request(method, path, body=body))
        head = connection.read_head()
        assert (head.status, head.headers["content-type"]) == (200, "application/x-ndjson")
        with contextlib.closing(connection):
            yield from connection.lines(head)

    def lateness(self, address, words):
        """How many seconds after its timestamp each chunk reached us."""
        events = map(event_of, self.lines(address, "POST", "/chat/stream", {"message": "word " * words}))
        return [time.time() - moment(event["timestamp"]).timestamp() for event in events if event["type"] == "chunk"]

    def test_chunks_arrive_live(self, server):
        with nginx(server) as address:
            late = self.lateness(address, 40)
        assert len(late) > 10 and statistics.median(late) < 0.04, late

    def test_the_servers_header_is_enough(self, server):
        with nginx(server, ("proxy_buffering off;", ""), ("proxy_http_version 1.1;", "")) as address:
            assert statistics.median(self.lateness(address, 20)) < 0.04

    def test_a_buffering_proxy_is_late(self, server):
        """The control: what the block prevents is there without it."""
        ignoring = "proxy_ignore_headers X-Accel-Buffering;"
        with nginx(server, ("proxy_buffering off;", ignoring), ("proxy_http_version 1.1;", "")) as address:
            assert self.lateness(address, 20)[0] > 0.2

    def test_a_cut_client_lets_the_turn_go_on_and_resumes(self, server):
        session, body = new_id(), {"message": "word " * 40}
        with nginx(server) as address:
            stream = self.lines(address, "POST", "/chat/stream", {**body, "session_id": session})
            first = [next(stream) for _ in range(5)]
            stream.close()
            assert wait_until(lambda: server.readers(session) == [0]), "the server does not learn that the client left"
            rest = list(self.lines(address, "GET", f"/sessions/{session}/stream?after=3"))
        assert rest[:2] == first[:2]
        check_turns(server, [(session, check_turn(first + rest[2:], message=body["message"], **server.pace).text)])

    def test_a_body_at_the_servers_limit_passes(self, server):
        body = {"message": "hi", "padding": ""}
        body["padding"] = "x" * ((2 << 20) - len(json.dumps(body)))
        with nginx(server) as address:
            check_turn(self.lines(address, "POST", "/chat/stream", body))

    def test_problems_pass_as_they_are(self, server):
        with nginx(server) as address, contextlib.closing(Connection(address)) as connection:
            connection.send(http_request("GET", "/sessions/nobody"))
            check_problem(server.response(connection, close=False), 404, "session_not_found")

    def test_its_name_is_allowed_by_the_flag_and_https_in_front_is_the_same_origin(self, own):
        flag = ("--allow-host", "chat.example.com")
        assert " ".join(flag) in README.read_text("utf-8")
        server = own("--chunk-delay", "0.05", "--log", "off", *flag)
        with nginx(server) as address:
            proxy = Server(*address)
            for host, origin, status in [(flag[1], f"https://{flag[1]}", 200), (flag[1], "https://evil.example", 403),
                                         ("evil.example", "https://evil.example", 403)]:
                answer = ask(proxy, "POST", "/chat/stream", f"Origin: {origin}", host=host, body={"message": "Hi"})
                assert answer.status == status
                assert status == 403 or check_turn(answer.body.splitlines(keepends=True), message="Hi", **server.pace)

    def test_a_server_that_died_looks_cut(self, serve):
        server = serve("--log", "off")
        with nginx(server) as address:
            stream = self.lines(address, "POST", "/chat/stream", {"message": "word " * 40})
            next(stream)
            server.process.kill()
            with pytest.raises(Cut):
                list(stream)


class ManyServers:
    """The README's three servers, each with a file in this folder; in front of them is its nginx."""

    def __init__(self, serve, folder):
        self.serve, self.folder = serve, folder
        self.servers = [self.start(number) for number in range(3)]
        self.front = None

    def start(self, number, port=0):
        return self.serve("--db", str(Path(self.folder, f"chat-{number}.db")), "--port", str(port),
                          "--chunk-delay", "0.05", "--log", "off")

    def kill(self, server):
        server.process.kill()
        server.process.wait(PATIENCE)

    def restart(self, server):
        number = self.servers.index(server)
        self.servers[number] = self.start(number, server.address[1])
        return self.servers[number]

    def sessions(self):
        """The ids that each server has, by its own word."""
        return [server.session_ids() for server in self.servers]

    def post(self, session, turn_id, message):
        """Send a message until it is answered whole. The turn, and what went before: "cut" within lines, or "down"."""
        ids, troubles = {"session_id": session, "turn_id": turn_id}, []
        for _ in range(20 * PATIENCE):
            with contextlib.closing(self.front.connect()) as connection:
                connection.send(http_request("POST", f"/sessions/{session}/stream", body={"message": message, **ids}))
                head, lines = connection.read_head(), []
                assert head.status in (200, 502)
                with contextlib.suppress(Cut):
                    for line in connection.lines(head) if head.status == 200 else ():
                        lines.append(line)
                    if head.status == 200:
                        return check_turn(lines, message=message, **ids), troubles
            troubles.append("cut" if lines else "down")
            time.sleep(0.05)
        raise AssertionError(f"no whole answer: {troubles}")


@contextlib.contextmanager
def many_servers(serve):
    with tempfile.TemporaryDirectory() as folder:
        many = ManyServers(serve, folder)
        places = [(f"127.0.0.1:{port}", "{}:{}".format(*server.address))
                  for port, server in zip((8000, 8001, 8002), many.servers, strict=True)]
        with in_nginx(block("nginx", "# nginx.conf"), *places) as address:
            many.front = Server(*address)
            yield many


class TestManyServers:
    """Each session lives in one of several servers, and nginx sends it there, and nowhere else."""

    @waits
    def test_a_kill_in_the_middle_loses_and_doubles_nothing_and_the_other_servers_do_not_notice(self, serve):
        with many_servers(serve) as many, ThreadPoolExecutor(50) as pool:
            def talk(session):
                turns = [(turn_id, f"{session} {turn_id} " + "word " * 50) for turn_id in ("first", "second", "third")]
                return [(*turn, *many.post(session, *turn)) for turn in turns]

            def in_the_middle(server):
                stats = server.stats()
                return len(stats["streams"]) >= 5 and stats["successful_requests"] >= 5

            talks = {session: pool.submit(talk, session) for session in (new_id() for _ in range(50))}
            victim = wait_until(lambda: next(filter(in_the_middle, many.servers), None))
            many.kill(victim)
            victim = many.restart(victim)
            talks = {session: talk.result() for session, talk in talks.items()}

            for session, turns in talks.items():
                history = whole_turns(many.front.session(session)["messages"])
                kept = [(turn_id, user["text"], model["text"]) for turn_id, (user, model) in history.items()]
                assert kept == [(turn_id, message, turn.text) for turn_id, message, turn, _ in turns]
            sessions = dict(zip(many.servers, many.sessions(), strict=True))
            assert all(sessions.values()), "a server has no session"
            assert sorted(itertools.chain(*sessions.values())) == sorted(talks), "a session is on two servers"
            troubles = {session: sum((trouble for *_, trouble in turns), []) for session, turns in talks.items()}
            assert {session for session in talks if troubles[session]} <= sessions[victim]
            assert "cut" in itertools.chain(*troubles.values())
            for server in many.servers:
                stats = server.stats()
                assert (stats["streams"], stats["failed_requests"]) == ([], 0)
                assert server is victim or stats["successful_requests"] == 3 * len(sessions[server])

    @waits
    def test_while_a_server_is_down_its_sessions_are_502_and_no_other_gets_them(self, serve):
        with many_servers(serve) as many:
            sessions = [new_id() for _ in range(20)]
            turns = dict(zip(sessions, in_parallel(lambda session: many.post(session, "first", "Hi")[0], sessions, 20),
                             strict=True))
            before = many.sessions()
            lost = max(before, key=len)
            down = many.servers[before.index(lost)]
            many.kill(down)
            for session in sessions:
                path = f"/sessions/{session}"
                assert many.front.request("GET", path).status == (502 if session in lost else 200)
                if session in lost:
                    assert many.front.request("POST", f"{path}/stream", {"message": "Again"}).status == 502
            command = [sys.executable, CLIENT, "--url", url_of(many.front), "--session", session := min(lost), "Again"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as client:
                assert b"Retrying" in client.stderr.readline()
                many.restart(down)
                shown = client.communicate(timeout=PATIENCE)[0].decode().removesuffix("\n")
            assert many.front.history(session) == [("user", "Hi"), ("model", turns[session].text),
                                                   ("user", "Again"), ("model", shown)]
            assert many.sessions() == before

    @waits
    def test_what_names_a_session_goes_to_its_server_live_and_all_else_to_one_and_the_same(self, serve):
        with many_servers(serve) as many:
            def begin(_):
                answer = many.front.request("POST", "/chat/stream", {"message": "Hi"})
                turn = check_turn(answer.body.splitlines(keepends=True), message="Hi")
                session = turn.info["session_id"]
                encoded = "".join(f"%{ord(character):02x}" for character in session)
                assert [many.front.history(name) for name in (session, encoded)] == 2 * [
                    [("user", "Hi"), ("model", turn.text)]]
                return session
            session = in_parallel(begin, range(10), 10)[0]
            body = {"message": "word " * 90}        # a shorter answer than nginx would hold back
            lines = TestProxy().lines(many.front.address, "POST", f"/sessions/{session}/stream", body)
            first = next(lines)
            assert many.front.stop(session), "the first line came when the turn was over"
            assert check_turn([first, *lines]).end["finish_reason"] == "cancelled"
            named = many.front.request("POST", "/chat/stream", {"message": "Hi", "session_id": session})
            check_problem(named, 400, "invalid_field")
            assert many.front.request("POST", "/sessions/new", {}).status == 404
            assert len({many.front.stats()["start_time"] for _ in range(6)}) == 1


# ---- The terminal client: as a library and in scripts. Its servers are real, perhaps behind a proxy, or play a script.

CLIENT = Path(__file__).with_name("streamchat_client.py")


def line_of(kind, **fields):
    return json.dumps({"type": kind, **fields}).encode() + b"\n"


def opening(time):
    return line_of("session_info", session_id="s-1", turn_id="t-1", model="offline", created=True, timestamp=time)


def stream_of(*lines):
    """The bytes of an answer with these lines, with no transfer coding."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n" + b"".join(lines)


def coded(*lines):
    """The same in transfer chunks, one a line."""
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(line), line) for line in (*lines, b""))
    return stream_of().replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n") + chunks


def refusal(status, *fields, body=b'{"detail":"Because I say so.","code":"so"}'):
    head = [f"HTTP/1.1 {status} No", f"Content-Length: {len(body)}", "Connection: close", *fields, "", ""]
    return "\r\n".join(head).encode() + body


INFO, OTHER_INFO = opening("1"), opening("2")
STATUS = line_of("status", message="Generating response...", context_messages=0)
WORDS = ["Caf\u00e9 \u2028", "\U0001f600 two \x1b\n", ""]
CHUNKS = [line_of("chunk", text=text, chunk_number=number) for number, text in enumerate(WORDS, 1)]
COMPLETE = line_of("complete", finish_reason="stop", total_chunks=3)
TURN = [INFO, STATUS, *CHUNKS, COMPLETE]
SHUTDOWN = line_of("error", code="server_shutdown", message="The server stops.", retryable=True)
MAY_PASS = [            # what a server does once, and its bytes
    *((f"status {status}", refusal(status)) for status in (408, 429, 502, 503, 504)),
    ("HTML in a 502", refusal(502, "Content-Type: text/html", body=b"<html>Bad gateway</html>")),
    ("a long HTML in a 502", refusal(502, "Content-Type: text/html", body=b"<p>" * 50_000)),
    ("nothing", b""),
    ("a status line that is cut", b"HTTP/1.1 20"),
    ("a status that is cut", b"HTTP/1.1 409 Conf"),
    ("a status line and no more", b"HTTP/1.1 404 Not Found\r\n"),
    ("a head that is cut in a field", b"HTTP/1.1 404 Not Found\r\nContent-Le"),
    ("a head that is cut after a field", b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n"),
    ("the body of an error that is cut", refusal(409)[:-1]),
    ("no lines", stream_of()),
    ("a clean end after a chunk", coded(*TURN[:4])),
    ("no transfer chunk of size 0", coded(*TURN[:4])[:-5]),
    ("a size that is none", coded(*TURN[:3])[:-5] + b"x\r\n"),
    ("half a terminal event", stream_of(*TURN)[:-10]),
    ("a terminal event without its newline", stream_of(*TURN)[:-1]),
    ("a missing chunk", stream_of(INFO, STATUS, *CHUNKS[1:], COMPLETE)),
    ("the last chunks are missing", stream_of(INFO, STATUS, *CHUNKS[:1], COMPLETE)),
    ("a wrong total_chunks", stream_of(*TURN[:-1], line_of("complete", total_chunks=4))),
    ("an error that may pass", stream_of(*TURN[:3], SHUTDOWN)),
]


def flood(start, piece):
    """A script that sends without end: it is left, or fails."""
    def play(connection):
        connection.sendall(start)
        for _ in range(1000):
            connection.sendall(piece * (65_536 // len(piece)))
        raise AssertionError("the client reads on and on")
    return play


UNEXPECTED = "unexpected", "unexpected answer"
STAYS = [               # what a server does, its bytes, and the code and the words of what the client raises
    *((f"status {status}", refusal(status), "so", "Because I say so")
      for status in (400, 401, 403, 404, 409, 413, 500, 501)),
    ("a refusal in HTML", refusal(400, body=b"<html>"), "", "400 No"),
    ("a refusal in nested JSON", refusal(400, body=b"[" * 60_000), "", "400 No"),
    ("a refusal whose detail is a number", refusal(400, body=b'{"detail":1,"code":2}'), "", "400 No"),
    ("a redirect", refusal(302, "Location: http://there.example/"), "unexpected", "redirects to http://there.example/"),
    ("an error that stays", stream_of(*TURN[:3], line_of("error", message="No key.", retryable=False)), "", "No key"),
    ("an error that tells no more", stream_of(INFO, line_of("error", message="No key.")), "", "No key"),
    ("not JSON", stream_of(INFO, b"Hello\n"), *UNEXPECTED),
    ("HTML", refusal(200, "Content-Type: text/html", body=b"<html>\n<body>\n"), *UNEXPECTED),
    ("bytes that are no UTF-8", stream_of(b'{"type":"\xff"}\n'), *UNEXPECTED),
    ("a JSON array", stream_of(b"[1]\n"), *UNEXPECTED),
    ("deep nesting", stream_of(b"[" * 60_000 + b"\n"), *UNEXPECTED),
    ("a huge number", stream_of(b'{"type":"chunk","text":"","chunk_number":%b}\n' % (b"9" * 5000)), *UNEXPECTED),
    ("no type", stream_of(b'{"text":"Hello"}\n'), *UNEXPECTED),
    ("a type that is a list", stream_of(b'{"type":["chunk"]}\n'), *UNEXPECTED),
    ("a chunk without text", stream_of(INFO, line_of("chunk", chunk_number=1)), *UNEXPECTED),
    ("a text that is a number", stream_of(INFO, line_of("chunk", text=1, chunk_number=1)), *UNEXPECTED),
    ("a number that is a text", stream_of(INFO, line_of("chunk", text="", chunk_number="1")), *UNEXPECTED),
    ("an error without words", stream_of(INFO, line_of("error", code="model_error")), *UNEXPECTED),
    ("a line of more than 64 KiB", stream_of(line_of("status", message="x" * 70_000)), *UNEXPECTED),
    ("a line without end", flood(stream_of(INFO), b"x"), *UNEXPECTED),
    ("a status line without end", flood(b"HTTP/1.1 ", b"2"), *UNEXPECTED),
    ("a header line without end", flood(b"HTTP/1.1 200 OK\r\nX: ", b"x"), *UNEXPECTED),
    ("too many header fields", flood(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), *UNEXPECTED),
    ("an empty refusal in transfer chunks", coded().replace(b"200 OK", b"403 No"), "", "403 No"),
    ("a status that is no number", b"HTTP/1.1 abc def\r\n", *UNEXPECTED),
    ("something that is not HTTP", b"SSH-2.0-OpenSSH_10.2\r\n", *UNEXPECTED),
]
IN_VAIN = [             # what a server does again and again, its bytes, and the code of what the client raises
    ("it is too busy", refusal(503), "so"), ("it stops", stream_of(SHUTDOWN), "server_shutdown"),
    ("it hangs up", b"", "cut"), ("it cuts at the same place", stream_of(*TURN[:4]), "cut"),
]
WAITS = [               # Retry-After, and the seconds that the client waits at least and at most
    ("none", None, 0.1, 0.2), ("7", "7", 7, 7), ("an hour", "3600", 60, 60), ("0", "0", 0.1, 0.2),
    ("a date", "Thu, 31 Dec 2099 23:59:59 GMT", 60, 60), ("a date that is over", "Sun Nov  6 08:49:37 1994", 0.1, 0.2),
    *((value, value, 0.1, 0.2) for value in ("soon", "-7", "1e1", "Thu, 31 Dec 99999999999 23:59:59 GMT")),
]
BAD_URLS = ["", "localhost:8000", "ftp://localhost", "http://", "http:///chat", "http://:80", "http://me@localhost",
            "http://localhost:0", "http://localhost:65536", "http://localhost:x", "http://localhost/?a=b",
            "http://localhost/#a", "http://local host", "http://localhost/\r\nX: y", "http://localhost\0", "http://[::1",
            "http://a..b", "http://localhost/caf\u00e9"]
WRONG_ANSWERS = [       # what is wrong, and the body
    ("not JSON", b"<html>"), ("not an object", b"[]"), ("deep nesting", b"[" * 9999),
]


class ScriptedServer(ThreadingHTTPServer):
    """It answers each POST of a message with the next script, and other requests with their page, or 404.

    A script is bytes, after which the connection ends, or a function of the connection.
    """

    daemon_threads = True       # nobody waits for a script that waits

    def __init__(self, *scripts, pages=()):
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.scripts, self.pages, self.posts, self.left = iter(scripts), dict(pages), [], 0
        self.url = "http://{}:{}".format(*self.server_address)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class ScriptedHandler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        script = self.server.pages.get(self.path, refusal(404))
        if self.command == "POST" and re.fullmatch("/sessions/[^/]+/stream", self.path):
            self.server.posts.append(json.loads(body))
            script = next(self.server.scripts)
        try:
            script(self.connection) if callable(script) else self.connection.sendall(script)
        except OSError:
            self.server.left += 1

    do_POST = do_DELETE = do_GET


@pytest.fixture(scope="module")
def library():
    """The client, imported."""
    spec = importlib.util.spec_from_file_location("streamchat_client", CLIENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Chat:
    """What the library yields, raises and waits for, when it sends a message. A retry is an event here, too."""

    def __init__(self, library, url, message=TEXT, session=None, pause=lambda: None, **more):
        self.events, self.pauses, self.trouble = [], [], None
        self.session = session or new_id()

        def wait(error, number, seconds):
            assert error.retryable and str(error)
            self.events.append({"type": "retry", "number": number})
            self.pauses.append(seconds)
            pause()
        try:
            turn = library.Turn(library.Api(url, **more), message, self.session)
            for event in turn.run(wait):
                assert json.loads(turn.line) == event
                self.events.append(event)
        except library.ChatError as error:
            self.trouble = error

    @property
    def kinds(self):
        return [event["type"] for event in self.events]

    @property
    def text(self):
        """The answer of the last run: each of its chunks came once, in order."""
        assert not self.trouble, self.trouble
        start = max(at for at, kind in enumerate(self.kinds) if kind == "session_info")
        chunks = [event for event in self.events[start:] if event["type"] == "chunk"]
        assert [chunk["chunk_number"] for chunk in chunks] == list(range(1, len(chunks) + 1))
        return "".join(chunk["text"] for chunk in chunks)


class TestClientLibrary:
    """`Api`: what may pass is tried again, what stays is raised as one sentence, and no word is lost or doubled."""

    @cases([("as it is", stream_of(*TURN)), ("in transfer chunks", coded(*TURN))])
    def test_a_cut_at_any_byte_loses_nothing_and_lines_may_come_byte_by_byte(self, library, case):
        _, answer = case

        def drip(connection):
            for byte in answer:
                connection.send(bytes([byte]))
        end = answer.index(COMPLETE) + len(COMPLETE)
        for cut in range(len(answer)):
            with ScriptedServer(answer[:cut], drip if cut % 20 == 0 else answer) as server:
                chat = Chat(library, server.url)
                assert chat.text == "".join(WORDS)
                assert server.posts == (2 if cut < end else 1) * server.posts[:1], cut
                assert Counter(chat.kinds)["session_info"] == Counter(chat.kinds)["complete"] == 1

    def test_the_server_has_the_turn_once_as_it_was_shown(self, library, instant):
        cuts = places_to_cut(instant, 97)
        with Proxy(instant.address, cut_once(cuts)) as proxy:
            chats = [Chat(library, proxy.url) for _ in cuts]
        check_turns(instant, [(chat.session, chat.text) for chat in chats])
        assert {len(chat.pauses) for chat in chats} == {1}

    @cases(MAY_PASS)
    def test_what_may_pass_is_tried_again(self, library, case):
        _, script = case
        with ScriptedServer(script, stream_of(*TURN)) as server:
            chat = Chat(library, server.url)
        assert chat.text == "".join(WORDS)
        assert server.posts == 2 * server.posts[:1] and len(chat.pauses) == 1

    @cases(STAYS)
    def test_what_stays_is_raised_as_one_sentence(self, library, case):
        _, script, code, words = case
        with ScriptedServer(script, *9 * [stream_of(*TURN)]) as server:
            chat = Chat(library, server.url)
            assert (chat.trouble.code, chat.trouble.retryable) == (code, False), (chat.trouble, chat.events)
            assert words in str(chat.trouble) and "\n" not in str(chat.trouble)
            assert (len(server.posts), chat.pauses) == (1, [])
            assert not callable(script) or wait_until(lambda: server.left), "the client does not leave"

    @cases(IN_VAIN)
    def test_tries_without_progress_are_bounded_and_pauses_grow(self, library, case):
        _, script, code = case
        with ScriptedServer(*20 * [script]) as server:
            chat = Chat(library, server.url)
            assert (chat.trouble.code, chat.trouble.retryable) == (code, True)
            assert len(server.posts) == 9
        for seconds, longest in zip(chat.pauses, [0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5], strict=True):
            assert longest / 2 <= seconds <= longest

    def test_a_new_chunk_is_progress_and_another_run_that_comes_no_further_is_none(self, library):
        def cut_after(chunks, run=INFO):
            return stream_of(run, STATUS, *CHUNKS[:chunks])
        scripts = [*8 * [b""], cut_after(1), *7 * [b""], cut_after(2), *9 * [cut_after(2, OTHER_INFO), cut_after(2)]]
        with ScriptedServer(*scripts) as server:
            chat = Chat(library, server.url)
            assert chat.trouble.code == "cut"
            assert len(server.posts) == 8 + 1 + 7 + 1 + 8

    @cases(WAITS)
    def test_the_server_may_ask_for_more_time(self, library, case):
        _, value, least, most = case
        with ScriptedServer(refusal(503, *[f"Retry-After: {value}"] * bool(value)), stream_of(*TURN)) as server:
            [seconds] = Chat(library, server.url).pauses
        assert least <= seconds <= most

    def test_the_same_run_is_resumed_and_another_begins_from_its_start(self, library):
        other = [OTHER_INFO, STATUS, line_of("chunk", text="Anew", chunk_number=1), line_of("complete")]
        with ScriptedServer(stream_of(*TURN[:4]), stream_of(*TURN[:4]), coded(*other)) as server:
            chat = Chat(library, server.url)
        assert chat.text == "Anew"
        assert chat.kinds == ["session_info", "status", "chunk", "chunk", "retry", "retry",
                              "session_info", "status", "chunk", "complete"]

    def test_after_a_restart_the_turn_is_run_anew(self, library, instant, restarted):
        with restarting(instant, restarted) as proxy:
            chat = Chat(library, proxy.url)
        assert chat.kinds.count("session_info") == 2
        check_turns(restarted, [(chat.session, chat.text)])

    def test_who_is_refused_a_connection_tries_again(self, library, instant):
        with Proxy(instant.address) as proxy:
            proxy.down()
            chat = Chat(library, proxy.url, pause=proxy.up)
        check_turns(instant, [(chat.session, chat.text)])

    def test_blank_lines_and_unknown_events_and_fields_do_no_harm(self, library):
        lines = [b"\r\n \n", *TURN[:2], line_of("news", text=1), line_of("ping", status=200), *CHUNKS[:1], b"\n",
                 line_of("news"), line_of("retry"), CHUNKS[1].replace(b"}", b',"mood":[]}'), *TURN[4:]]
        lines = [line.replace(b"\n", b"\r\n") for line in lines]
        with ScriptedServer(stream_of(*lines[:6]), coded(*lines)) as server:
            chat = Chat(library, server.url)
        assert chat.text == "".join(WORDS)
        assert [kind for kind in chat.kinds if kind != "ping"] == [
            "session_info", "status", "news", "chunk", "retry", "news", "retry", "chunk", "chunk", "complete"]

    def test_a_silent_server_is_left_and_pings_are_life(self, library, monkeypatch):
        def ping(connection):
            connection.sendall(stream_of(*TURN[:3]))
            for _ in range(6):
                time.sleep(0.2)
                connection.sendall(line_of("ping"))
            connection.sendall(b"".join(TURN[3:]))

        def be_silent(connection):
            connection.sendall(stream_of(*TURN[:3]))
            connection.settimeout(PATIENCE)
            connection.recv(1)
        monkeypatch.setattr(library, "SILENCE", 1)
        with ScriptedServer(be_silent, stream_of(*TURN)) as silent, ScriptedServer(ping) as alive:
            left, kept = in_parallel(lambda server: Chat(library, server.url), [silent, alive])
        assert left.text == kept.text == "".join(WORDS)
        assert (len(left.pauses), silent.left) == (1, 0)
        assert (len(kept.pauses), kept.kinds.count("ping")) == (0, 6)

    def test_each_try_is_one_post_on_a_connection_of_its_own(self, library, instant):
        with Proxy(instant.address, [Fault(cut=b'"chunk_number":1'), *[Fault(instead=b"")] * 20]) as proxy:
            assert Chat(library, proxy.url).trouble.code == "cut"
            assert len(proxy.requests) == proxy.connections == 9
            assert all(re.match("POST /sessions/[^/]+/stream ", line) for line in proxy.requests)

    def test_a_stop_from_another_thread_ends_the_chat(self, library, server):
        turn = library.Turn(library.Api(url_of(server)), LONG)
        kinds = []
        for event in turn.run():
            kinds.append(event["type"])
            if event["type"] == "chunk" and kinds.count("chunk") == 2:
                assert turn.stop() and not turn.stop()
        assert kinds[-1] == "complete" and turn.is_in_history()

    def test_a_refusal_that_comes_while_the_request_is_sent_is_read(self, library):
        with scripted(refusal(413)) as server, pytest.raises(library.ChatError, match="Because I say so"):
            library.Api(url_of(server)).new_session("s", "x" * (16 << 20))

    def test_every_method_says_what_the_server_says(self, library, server):
        session, api = new_id(), library.Api(url_of(server))
        assert api.new_session(session)["session_id"] == session
        assert api.new_session()["session_id"] in server.session_ids()
        with pytest.raises(library.ChatError, match=".") as refused:
            api.new_session(session)
        assert (refused.value.code, refused.value.status) == ("session_exists", 409)
        events = api.chat(LONG, session, "t-1")
        assert next(event for event in events if event["type"] == "chunk")
        assert api.stop(session, "t-2") is False
        assert api.stop(session, "t-1") is True
        assert [*events][-1]["finish_reason"] == "cancelled"
        assert api.session(session)["messages"] == server.session(session)["messages"]
        assert {session["session_id"] for session in api.sessions()} == server.session_ids()
        assert api.health()["total_requests"] == api.stats()["total_requests"] == server.stats()["total_requests"]
        api.clear(session)
        assert server.history(session) == []
        api.delete(session)
        assert session not in server.session_ids()

    def test_a_token_opens_the_server(self, library, own):
        server = own("--token", TOKEN, "--chunk-delay", "0")
        assert Chat(library, url_of(server), token=TOKEN).text.startswith("You said: ")
        assert Chat(library, url_of(server)).trouble.code == "unauthorized"

    @cases(WRONG_ANSWERS)
    def test_an_answer_that_is_wrong_is_raised(self, library, case):
        _, body = case
        with ScriptedServer(pages={"/health": refusal(200, body=body)}) as server, \
                pytest.raises(library.ChatError, match="unexpected answer"):
            library.Api(server.url).health()

    @pytest.mark.parametrize("path", ["/stats", "/sessions/a-chat/stop"])
    def test_an_answer_that_is_cut_is_no_answer(self, library, path):
        api_of = {"/stats": lambda api: api.stats(), "/sessions/a-chat/stop": lambda api: api.stop("a-chat")}[path]
        whole = refusal(200, body=b'{"stopped":true}')
        for cut in range(len(whole)):
            with ScriptedServer(pages={path: whole[:cut]}) as server, \
                    pytest.raises(library.ChatError, match=".") as raised:
                api_of(library.Api(server.url))
            assert raised.value.code == "cut", cut

    @pytest.mark.parametrize("url", BAD_URLS)
    def test_a_bad_url_is_refused_at_once(self, library, url):
        with pytest.raises(ValueError, match="."):
            library.Api(url)

    def test_a_path_before_the_endpoints_and_ipv6_are_good(self, library, serve):
        with ScriptedServer(pages={"/chat/api/health": refusal(200, body=b'{"status":"healthy"}')}) as server:
            assert library.Api(server.url + "/chat/api/").health() == {"status": "healthy"}
        try:
            server = serve("--host", "::1", "--chunk-delay", "0")
        except AssertionError:
            pytest.skip("this machine has no ::1")
        assert Chat(library, f"http://[::1]:{server.address[1]}").text


IMPATIENT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import streamchat_client
streamchat_client.FIRST_PAUSE = 0
sys.exit(streamchat_client.main())
"""
MESSAGES = [            # the arguments, standard input, the message
    ((), b"\xc3\xa9 \r\n\n two\n", "\u00e9 \r\n\n two\n"), (("\u2028:",), b"a\r\nb", "\u2028:\na\r\nb"),
]
FAILURES = [            # what the server does, its bytes, what the program says
    ("it is not there", None, "unreachable"), ("it refuses", refusal(409), "Because I say so."),
    ("it fails", stream_of(*TURN[:3], line_of("error", message="No key")), "No key"),
    ("it cuts again and again", stream_of(*TURN[:3]), "Connection lost."),
    ("somebody stops it", stream_of(*TURN[:3], line_of("complete", finish_reason="cancelled")), "was stopped."),
    ("it talks nonsense", stream_of(INFO, b"\x1b[2J\n"), "unexpected answer"),
    ("its words are hostile", stream_of(*TURN[:3], line_of("error", message="\x1b[2J\u009b")), "\\x1b[2J"),
]
WRONG_USES = [          # what is wrong, the arguments, standard input, what the program says
    ("no message", (), b"", "message"), ("a blank message", (" \n",), b"\n ", "message"),
    ("a session named new", ("--session", "new", "Hi"), b"", "--session"),
    ("a URL that is none", ("--url", "localhost:8000", "Hi"), b"", "--url"),
    ("a bad token", ("--token", "a b", "Hi"), b"", "token"), ("standard input is not UTF-8", (), b"\xff", "UTF-8"),
]


class Done(NamedTuple):
    status: int
    out: bytes
    err: str


class TestScripts:
    """The program in a script: the bare answer is all of standard output, and the exit status says how it ended."""

    def command(self, url, *arguments):
        return [sys.executable, CLIENT, "--url", url, *arguments]

    def run(self, command, stdin=b"", **more):
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=3 * PATIENCE, env=environment(**more))
        err = done.stderr.decode()
        assert "Traceback" not in err, err
        assert b"\x1b" not in done.stderr
        return Done(done.returncode, done.stdout, err)

    def ask(self, server, *arguments, **more):
        """The answer, and nothing else."""
        done = self.run(self.command(url_of(server), *arguments), **more)
        assert (done.status, done.err) == (0, ""), done
        return done.out

    def test_the_message_is_the_argument_and_standard_input_as_they_are(self, instant):
        def check(case):
            arguments, stdin, message = case
            session = new_id()
            out = self.ask(instant, "--session", session, *arguments, stdin=stdin)
            (_, sent), (_, answer) = instant.history(session)
            assert (sent, out.decode()) == (message, answer + "\n")
        in_parallel(check, MESSAGES, 2)

    def test_the_answer_is_printed_as_it_is_and_ends_with_a_newline(self):
        def check(text):
            lines = [INFO, STATUS, line_of("chunk", text=text, chunk_number=1), line_of("complete")]
            with ScriptedServer(stream_of(*lines)) as server:
                done = self.run(self.command(server.url, "Hi"))
            assert done == (0, (text + "\n" * (not text.endswith("\n"))).encode(), "")
        in_parallel(check, ["", " two\n\n", "\x1b[2J\u009b\0\ufeff\u2028\r"], 2)

    def test_an_answer_that_the_model_ended_early_is_whole_and_it_is_told(self):
        with ScriptedServer(stream_of(*TURN[:-1], line_of("complete", finish_reason="length\x1b"))) as server:
            done = self.run(self.command(server.url, "Hi"))
        assert (done.status, done.out) == (0, "".join(WORDS).encode()) and "length" in done.err

    def test_a_session_goes_on(self, instant):
        session = new_id()
        instant.turn("Hi", session_id=session)
        assert b"2 messages came before this one." in self.ask(instant, "--session", session, "Hi")

    def test_a_token_comes_by_the_option_or_the_environment(self, own):
        server = own("--token", TOKEN, "--chunk-delay", "0")
        assert self.ask(server, "--token", TOKEN, "Hi", STREAMCHAT_TOKEN="other").startswith(b"You said: Hi")
        assert self.ask(server, "Hi", STREAMCHAT_TOKEN=TOKEN).startswith(b"You said: Hi")
        done = self.run(self.command(url_of(server), "Hi"))
        assert (done.status, done.out, done.err.count("\n")) == (1, b"", 1) and "token" in done.err

    def test_a_failure_is_one_sentence_and_status_1(self):
        def fail(case):
            _, script, said = case
            with ScriptedServer(*9 * [script]) as server:
                url = server.url if script else "http://127.0.0.1:1"
                done = self.run([sys.executable, "-c", IMPATIENT, CLIENT.parent, "--url", url, "Hi"])
            *tries, last = done.err.splitlines()
            assert done.status == 1 and said in last, done
            assert all("Retrying in" in line for line in tries)
            assert done.out in (b"", (WORDS[0] + "\n").encode())
        in_parallel(fail, FAILURES, 2)

    def test_a_wrong_use_is_told_and_status_2(self):
        def use(case):
            _, arguments, stdin, said = case
            done = self.run([sys.executable, CLIENT, *arguments], stdin)
            assert (done.status, done.out) == (2, b"") and said in done.err.splitlines()[-1], done
        in_parallel(use, WRONG_USES, 2)

    def interrupt(self, command, output):
        """Send Ctrl-C as soon as something is on this output; the exit status, and all that came there."""
        with subprocess.Popen(command, bufsize=0, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, env=environment()) as process:
            try:
                first = getattr(process, output).read(1)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=PATIENCE)
            finally:
                process.kill()
        assert b"Traceback" not in err
        return process.returncode, first + (out if output == "stdout" else err)

    @pytest.mark.parametrize("options", [(), ("--json",)], ids=["answer", "json"])
    def test_ctrl_c_stops_the_answer_and_keeps_what_was_printed(self, server, options):
        session = new_id()
        status, out = self.interrupt(self.command(url_of(server), "--session", session, *options, LONG), "stdout")
        lines = server.follow(session).read().lines
        assert status == 130 and event_of(lines[-1])["finish_reason"] == "cancelled"
        assert out == (b"".join(lines) if options else server.history(session)[1][1].encode() + b"\n")

    def test_a_second_ctrl_c_ends_a_program_whose_output_nobody_takes(self, instant):
        command = self.command(url_of(instant), "--session", session := new_id(), "x" * 99_000)
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment()) as process:
            assert wait_until(lambda: session in instant.session_ids() and len(instant.history(session)) == 2)
            for _ in range(2):
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
            try:
                assert process.wait(PATIENCE) == 130
            finally:
                process.kill()

    def test_ctrl_c_ends_the_program_while_it_tries_again(self):
        status, said = self.interrupt(self.command("http://127.0.0.1:1", "Hi"), "stderr")
        assert status == 130 and b"Retrying" in said and b"STOPPED" not in said

    def test_after_a_cut_the_answer_goes_on(self, instant):
        session = new_id()
        with Proxy(instant.address, [Fault(cut=900)]) as proxy:
            done = self.run(self.command(proxy.url, "--session", session, TEXT))
        assert (done.status, done.out.decode()) == (0, instant.history(session)[1][1] + "\n")
        assert len(done.err.splitlines()) == 1 and "Retrying" in done.err

    def test_another_run_follows_on_a_new_line(self, instant, restarted):
        session = new_id()
        with restarting(instant, restarted) as proxy:
            done = self.run(self.command(proxy.url, "--session", session, TEXT))
        texts = [event_of(line).get("text", "") for line in restarted.follow(session).read().lines]
        first = done.out.decode().removesuffix("\n" + "".join(texts) + "\n")
        assert first and first in itertools.accumulate(texts) and "run again" in done.err

    def test_json_prints_each_line_once(self, instant):
        session = new_id()
        with Proxy(instant.address, [Fault(cut=900)]) as proxy:
            done = self.run(self.command(proxy.url, "--json", "--session", session, TEXT))
        assert done.out == b"".join(instant.follow(session).read().lines)

    def test_json_prints_another_run_from_its_session_info_on(self, instant, restarted):
        session = new_id()
        with restarting(instant, restarted) as proxy:
            done = self.run(self.command(proxy.url, "--json", "--session", session, TEXT))
        lines = done.out.splitlines(keepends=True)
        starts = [at for at, line in enumerate(lines) if event_of(line)["type"] == "session_info"]
        assert len(starts) == 2 and lines[starts[1]:] == restarted.follow(session).read().lines

    def test_a_closed_output_ends_the_program_quietly(self, server):
        session = new_id()
        start = f"{sys.executable} {CLIENT} --url {url_of(server)} --session {session} "
        for rest in (f"'{LONG}' | head -c 10", f"--json '{LONG}' | head -c 10", "Hi >&-"):
            assert not self.run(["sh", "-c", start + rest]).err
            assert wait_until(lambda: not server.session(session)["streaming"], 5), rest

    def test_a_full_output_is_told_and_errors_that_nobody_can_read_do_no_harm(self, instant):
        done = self.run(["sh", "-c", f"{sys.executable} {CLIENT} --url {url_of(instant)} Hello > /dev/full"])
        assert (done.status, done.err.count("\n")) == (1, 1)
        for nowhere in ("2>&-", "2> /dev/full"):
            with Proxy(instant.address, [Fault(cut=900)]) as proxy:
                done = self.run(["sh", "-c", f"{sys.executable} {CLIENT} --url {proxy.url} Hello {nowhere}"])
            assert done.status == 0 and done.out.startswith(b"You said: Hello")


CLIENT_COMMANDS = ["/help", "/stats", "/server", "/health", "/docs", "/demo", "/clear", "/quit", "/new", "/info",
                   "/sessions", "/switch", "/reset", "/delete", "/history", "/retry"]
NOT_SENT = [            # what is typed before the first message, what is said
    ("/hlep", "Unknown command /hlep. Did you mean /help"), ("/xyzzy", "Unknown command /xyzzy. /help lists"),
    ("/HELP", "Unknown command /HELP. Did you mean /help"), ("/", "Unknown command /. /help lists"),
    ("/he", "Did you mean /help or /health"), ("/help me", "/help takes no argument"), ("/switch", "/switch needs"),
    ("/switch 9999999", "no such session"), ("/switch nobody", "no such session"),
    ("/retry", "nothing to send again"),
    ("/reset", "no session yet"), ("/delete", "no session yet"), ("/info", "no session yet"),
    ("/history", "no session yet"), ("   ", ""),
]
CTRL_A, CTRL_C, CTRL_D, CTRL_E, UP = "\x01", "\x03", "\x04", "\x05", "\x1b[A"
RULE = "\u2500" * 60
ONE_SECOND = "word " * 200          # a turn that runs for 1 s at the pace of the `server` fixture
CALM = ("--chunk-delay", "0.05", "--log", "off")      # LONG takes 25 s: longer than PATIENCE
HOSTILE_NAME = "\u91cf\u5b50 \U0001f600 " + FORGED
HOSTILE_ANSWERS = [
    b"HTTP/1.0 409 Conflict\r\n\r\n" + json.dumps({"detail": FORGED}).encode(),
    b"HTTP/1.0 302 Found\r\nLocation: x\x1b[31mFORGED\r\n\r\n",
    b"HTTP/1.0 500 x\x1b[31mFORGED\r\nContent-Length: 0\r\n\r\n",
]


class TerminalChat(Terminal):
    """The client in a pseudo-terminal. `changes` shrinks its limits; `home` keeps what one run leaves to the next."""

    def __init__(self, url, *arguments, changes="pass", home=None, **more):
        self.folder, self.session = tempfile.TemporaryDirectory(), None
        self.home = home or Path(self.folder.name)
        # Ctrl-C reaches only who has the terminal as its own
        program = f"import os, sys, streamchat_client as client; os.login_tty(0); {changes}; sys.exit(client.main())"
        more = {"HOME": str(self.home), "BROWSER": 'sh -c "echo $0 >> $HOME/opened" %s'} | more
        super().__init__([sys.executable, "-c", program, "--url", url, *arguments], PYTHONPATH=str(SERVER.parent),
                         **more)

    def __exit__(self, *_):
        super().__exit__()
        self.folder.cleanup()
        assert "Traceback" not in self.plain, self.plain

    def wait_for_prompt(self):
        self.session = self.wait(r"^You (?:\[([^\]\n]+)\] )?\u203a ")[1]

    def enter(self, line):
        """Type a line at the prompt; returns what is shown for it until the next prompt."""
        begin = self.read
        self.type(line + "\r")
        self.wait_for_prompt()
        return self.plain[begin:self.read].partition("\n")[2].rpartition("\n")[0]

    def paste(self, text):
        """As a terminal does it: in brackets, if the program has asked for that."""
        asked = self.text.rfind("\x1b[?2004h") > self.text.rfind("\x1b[?2004l")
        self.type(f"\x1b[200~{text}\x1b[201~" if asked else text)

    def wait_for_end(self):
        status = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return status

    def leave(self):
        """Leave by Ctrl-D; returns the rows of the statistics."""
        self.type(CTRL_D)
        assert self.wait_for_end() == 0
        return rows_of(self.plain[self.read:])


@contextlib.contextmanager
def chatting(url, *arguments, **more):
    """A chat that has come to its first prompt."""
    with TerminalChat(url, *arguments, **more) as chat:
        chat.wait_for_prompt()
        yield chat


@contextlib.contextmanager
def away(proxy, chat):
    """In the middle of an answer the server can't be reached for a while."""
    chat.type(ONE_SECOND + "\r")
    chat.wait("You said: (word ){8}")
    proxy.down()
    chat.wait("Retrying")
    yield
    proxy.up()


def rows_of(shown):
    """The rows of a box by their names."""
    return dict(re.findall(r"^\u2502 ([^:]+): (.*?) *\u2502$", shown, re.MULTILINE))


def check_boxes(shown):
    boxes = [line for line in shown.split("\n") if line[:1] in tuple("\u250c\u2502\u2514")]
    assert {width(line) for line in boxes} == {64}, boxes
    assert {line[-1] for line in boxes} == set("\u2510\u2502\u2518"), boxes


def check_shown(chat, server, session):
    """The last answer on the screen is that of the history, but for white space: what tells of a cut is a new line."""
    shown = re.sub("^\U0001f504 .*\n", "", chat.seen().split(RULE + "\n")[-2], flags=re.MULTILINE)
    assert shown.split() and "".join(shown.split()) == "".join(server.history(session)[-1][1].split())


def forged(value):
    """The same JSON, but each of its strings (and no event's type) is hostile."""
    return json.loads(json.dumps(value), object_hook=lambda fields: {
        name: HOSTILE_NAME if isinstance(text, str) and name != "type" else text for name, text in fields.items()})


@NOT_OURS
class TestTerminalClient:
    """The client as a person sees it: in a pseudo-terminal, typed to."""

    def test_it_greets_and_shows_each_answer_between_rules_and_then_a_box(self, server):
        session, message = new_id(), "Wide \u91cf\u5b50 \U0001f600 \U0001f5a5\ufe0f, na\u00efve"
        with chatting(url_of(server), "--session", session) as chat:
            assert re.match(rf"\S+ STREAMABLE HTTP CHAT CLIENT \S+\n\S+ Connected to {url_of(server)} ", chat.seen())
            assert chat.session is None
            first, second = chat.enter(message), chat.enter("And now?")
            assert chat.session == session[:8] + "..."
            seen = chat.seen()
        chunks = [event for event in map(event_of, server.follow(session).read().lines) if event["type"] == "chunk"]
        answers = [text for role, text in server.history(session) if role == "model"]
        head = f"\U0001f916 AI Response (HTTP Streaming) ({session[:8]}... - offline)"
        for typed, context, answer in [(message, 0, answers[0]), ("And now?", 2, answers[1])]:
            assert f"\u203a {typed}\n" in seen
            assert (f"\n\U0001f4ad Generating response... (Context: {context} messages)\n\n"
                    f"{head}\n{RULE}\n{answer}\n{RULE}\n\n") in seen
        rows = rows_of(second)
        assert rows["Total Chunks"] == str(len(chunks)) and re.fullmatch(r"\d+\.\d{3}s", rows["Total Time"])
        assert (rows["Context Messages"], rows["Transfer-Encoding"], rows["Status"]) == ("4", "chunked", "SUCCESS")
        assert rows_of(first)["Context Messages"] == "2" and re.search(r" COMPLETED \[[\d:]{8}\.\d{3}\] ", first)
        check_boxes(seen)

    def test_a_terminal_of_two_columns_does_no_harm(self, instant):
        with chatting(url_of(instant), "--session", session := new_id(), columns=2) as chat:
            chat.type("Hi\r")
            chat.wait("SUCCESS")
        assert instant.history(session)[0] == ("user", "Hi")

    def test_it_fits_the_terminal_whatever_columns_says(self, instant):
        size = 50
        message = "word \u91cf\u5b50 \U0001f600 " * 40 + "\u91cf" * 100
        with chatting(url_of(instant), "--session", session := new_id(), columns=size, COLUMNS="200") as chat:
            shown = "".join(map(chat.enter, (message, "/help", "/stats", "/server", "/health", "/info", "/sessions",
                                             "/history", "/xyzzy", "/switch")))
        lines = shown.splitlines()
        boxes = [line for line in lines if line[:1] in tuple("\u250c\u2502\u2514")]
        assert {width(line) for line in boxes} == {size} and len(boxes) > 60
        assert max(map(width, lines)) == size
        answer = shown.partition("\u2500\n")[2].partition("\n\u2500")[0]
        assert "".join(answer.split()) == "".join(instant.history(session)[1][1].split())
        assert set(re.findall("[a-z]+", answer.partition("This")[0])) == {"word", "said", "ou"}

    def test_a_tab_at_the_edge_separates_words(self, instant):
        instant.turn("x" * 48 + "\ta b", session_id=(session := new_id()))
        with chatting(url_of(instant), "--session", session, columns=50) as chat:
            assert "x" * 48 + "\na b\n" in chat.enter("/history")

    def test_help_lists_the_commands(self, server):
        with chatting(url_of(server)) as chat:
            shown = chat.enter("/help")
        rows = re.findall(r"^\u2502 (/\w+) +\S.*[^. ] +\u2502$", shown, re.MULTILINE)
        assert rows == CLIENT_COMMANDS
        assert len(shown.splitlines()) <= 24 and "~/.streamchat_history" in shown
        check_boxes(shown)
        assert max(map(width, shown.splitlines())) <= 80

    @waits
    def test_boxes_tell_what_the_server_tells(self, serve):
        server = serve("--chunk-delay", "0", "--log", "off")
        with chatting(url_of(server), "--session", "a-chat") as chat:
            for line in ("Hi", "/new", "one two three four five six", "again"):
                chat.enter(line)
            shown = {name: chat.enter("/" + name) for name in ("stats", "server", "health", "info", "sessions")}
            for page in ("/docs", "/demo"):
                assert f"URL: {url_of(server)}{page}" in chat.enter(page)
            left = chat.leave()
            assert (chat.home / "opened").read_text().split() == [url_of(server) + page for page in ("/docs", "/demo")]
        check_boxes("\n".join(shown.values()))
        stats, sessions = server.stats(), [one["session_id"] for one in server.get("/sessions")["sessions"]]
        name = sessions[0][:8] + "..."
        expected = {
            "stats": {"Messages Sent": 3, "Successful Streams": 3, "Recovered Streams": 0, "Failed Streams": 0,
                      "Total Chunks Received": stats["total_chunks"], "Sessions Created": 2, "Current Session": name,
                      "Avg Chunks per Stream": f"{stats['total_chunks'] / 3:.1f}", "Session Messages": 4},
            "server": {"Total Requests": 3, "Successful": 3, "Failed": 0, "Active Sessions": 2, "Active Streams": 0,
                       "Total Sessions Created": 2, "Avg Response Time": f"{stats['average_response_time']:.3f}s",
                       "Model": "offline", "Framework": stats["framework"]},
            "health": {"Status": "healthy", "Model": "offline", "Total Requests": 3, "Active Sessions": 2},
            "info": {"Session ID": name, "Model": "offline", "Total Messages": 4, "User Messages": 2, "AI Messages": 2},
        }
        for box, rows in expected.items():
            assert rows_of(shown[box]).items() >= {name: str(value) for name, value in rows.items()}.items()
        assert left.items() >= {name: str(value) for name, value in expected["stats"].items()}.items()
        rows = re.findall(r"^\u2502 (\d)\. (\S+) \((\d) msgs, .*\)( \u2190 CURRENT)? *\u2502$", shown["sessions"], re.M)
        assert rows == [("1", name, "4", " \u2190 CURRENT"), ("2", "a-chat", "2", "")]

    def test_sessions_are_changed_read_cleared_and_deleted(self, instant):
        ids = [new_id() for _ in range(3)]
        for session in ids:
            instant.turn(f"question of {session}", session_id=session)
        shorts = [session[:8] + "..." for session in ids]
        with chatting(url_of(instant), "--session", ids[0]) as chat:
            numbers = {name: number for number, name in re.findall(r"(\d+)\. (\S+) \(", chat.enter("/sessions"))}
            for argument, name in [(numbers[shorts[1]], shorts[1]), (ids[2], shorts[2]), (shorts[0], shorts[0])]:
                chat.enter(f"/switch {argument}")
                assert chat.session == name
            chat.enter("more")
            shown = chat.enter("/history")
            at = [shown.index(text) for _, text in instant.history(ids[0])]
            assert len(at) == 4 and at == sorted(at)
            chat.enter("/clear")
            assert chat.text.count("\x1b[2J") == 1
            chat.enter("/reset")
            assert instant.history(ids[0]) == [] and "question" not in chat.enter("/history")
            chat.enter("/delete")
            assert chat.session is None and instant.session_ids() & set(ids) == set(ids[1:])

    def test_a_whole_id_is_not_the_beginning_of_another(self, instant):
        session = new_id()[:11]
        for ending in ("", "-", "-2"):
            instant.turn("Hi", session_id=session + ending)
        with chatting(url_of(instant)) as chat:
            assert "Several sessions" in chat.enter(f"/switch {session[:10]}")
            chat.enter(f"/switch {session}")
            assert chat.session == session

    def test_one_slash_begins_a_command_and_two_a_message(self, instant):
        before = instant.stats()["total_requests"]
        with chatting(url_of(instant), "--session", session := new_id()) as chat:
            for typed, said in NOT_SENT:
                assert re.search(said, chat.enter(typed)), typed
            assert instant.stats()["total_requests"] == before
            chat.enter("//help me")
        assert instant.history(session)[0] == ("user", "/help me")

    @pytest.mark.parametrize("keys", ["/quit\r", CTRL_D], ids=["quit", "Ctrl-D"])
    def test_who_leaves_sees_the_statistics(self, instant, keys):
        with chatting(url_of(instant)) as chat:
            chat.enter("Hi")
            chat.type(keys)
            assert chat.wait_for_end() == 0
            chat.wait("CLIENT SESSION STATISTICS.* Messages Sent: 1 .*Goodbye")

    def test_ctrl_c_drops_the_line_and_leaves_when_it_comes_again_at_an_empty_one(self, instant):
        with chatting(url_of(instant), "--session", session := new_id()) as chat:
            for _ in range(2):
                chat.type("half a line")
                chat.wait("half a line")
                chat.type(CTRL_C)
                chat.wait_for_prompt()
            chat.enter("Hi")
            chat.type(CTRL_C)
            chat.wait("Ctrl-C again")
            chat.wait_for_prompt()
            chat.type(CTRL_C)
            assert chat.wait_for_end() == 0
            chat.wait("CLIENT SESSION STATISTICS")
        assert [text for role, text in instant.history(session) if role == "user"] == ["Hi"]

    def test_what_was_typed_is_there_in_the_next_run(self, instant, tmp_path):
        with chatting(url_of(instant), home=tmp_path) as chat:
            chat.enter("one message")
            chat.leave()
        [file] = tmp_path.glob(".*history")
        assert file.stat().st_mode & 0o777 == 0o600
        with chatting(url_of(instant), "--session", session := new_id(), home=tmp_path) as chat:
            chat.enter(UP)
        assert instant.history(session)[0] == ("user", "one message")

    def test_a_home_that_cannot_be_written_loses_no_line(self, instant, tmp_path):
        history = tmp_path / ".streamchat_history"
        history.write_text("one message\n")
        for _ in range(2):
            with chatting(url_of(instant), "--session", session := new_id(), home=tmp_path,
                          changes="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12, 12))") as chat:
                chat.enter("another")
                chat.enter(UP + UP)
            assert [text for role, text in instant.history(session) if role == "user"] == ["another", "one message"]
            assert history.read_text() == "one message\n"
        with chatting(url_of(instant), home=tmp_path / "nowhere") as chat:
            chat.enter("Hi")
            assert rows_of(chat.enter(UP))["Context Messages"] == "4"

    def test_a_session_of_20_mb_can_be_entered(self, library, fast):
        session = new_id()
        for _ in range(105):
            fast.turn("x" * 99_000, session_id=session)
        assert len(json.dumps(fast.session(session))) > 20_000_000
        with chatting(url_of(fast), "--session", session) as chat:
            assert "has 210 messages" in chat.seen()
            assert rows_of(chat.enter("Hi"))["Context Messages"] == "212"

    def test_the_beginning_of_a_command_is_enough(self, instant):
        with chatting(url_of(instant)) as chat:
            assert "ALL ACTIVE SESSIONS" in chat.enter("/sess")
            assert re.search("Did you mean (/\\w+ or )+/switch", chat.enter("/s"))

    def test_messages_help(self, own):
        server = own("--token", TOKEN, "--log", "off")
        with TerminalChat(url_of(server)) as chat:
            assert chat.wait_for_end() == 1
            assert "--token" in chat.plain and "STREAMCHAT_TOKEN" in chat.plain
            assert "Bearer" not in chat.plain and "Authorization" not in chat.plain
        with chatting(url_of(server), "--token", TOKEN) as chat:
            shown = chat.enter("/switch zzz")
            assert "/sessions" in shown and "GET" not in shown

    @waits
    def test_a_busy_session_tells_a_curl_line_that_can_be_pasted(self, serve):
        needs("curl")
        server = serve(*CALM)
        with chatting(url_of(server), "--session", session := new_id(), columns=60) as chat:
            chat.enter("Hi")
            with contextlib.closing(server.chat(LONG, session_id=session).connection):
                shown = chat.enter("Hello")
                assert "/retry" in shown and rows_of(shown)["Status"] == "FAILED"
                line = re.search("^curl .*$", shown, re.MULTILINE)[0]
                assert json.loads(run(["sh", "-c", line], "."))["stopped"] is True
            assert rows_of(chat.enter("/retry"))["Status"] == "SUCCESS"

    def test_an_error_that_stays_offers_no_retry(self):
        stats = refusal(200, body=b'{"model":"m"}')
        failing = stream_of(*TURN[:3], line_of("error", code="model_auth", message="No key."))
        with ScriptedServer(failing, pages={"/stats": stats}) as server, chatting(server.url) as chat:
            shown = chat.enter("Hi")
        assert "No key.\n" in shown and "/retry" not in shown

    def test_an_answer_of_another_shape_is_one_sentence(self):
        pages = {"/stats": b'{"model":"m"}', "/sessions": b'{"sessions":[{}]}', "/sessions/s": b"{}"}
        pages = {path: refusal(200, body=body) for path, body in pages.items()}
        with ScriptedServer(pages=pages) as server, chatting(server.url, "--session", "s") as chat:
            for shown in (chat.plain, chat.enter("/sessions")):
                assert "The server sent an unexpected answer." in shown

    def test_tab_completes_a_command(self, instant):
        with chatting(url_of(instant)) as chat:
            assert "Show all commands" in chat.enter("/hel\t")
            assert "You said: say /hel\n" in chat.enter("say /hel\t")

    def test_a_message_may_have_many_lines(self, instant):
        with chatting(url_of(instant), "--session", session := new_id()) as chat:
            chat.enter('"""\rline 1\r\r/quit\r"""')
            chat.enter('"""line 1\r\r/quit"""')
            chat.type('"""\rline 1\r\r/quit\r' + CTRL_D)
            chat.wait_for_prompt()
            chat.paste("line 1\r\r/quit")
            chat.enter("")
        assert [text for role, text in instant.history(session) if role == "user"] == ["line 1\n\n/quit"] * 4

    @pytest.mark.parametrize("more", [{}, {"LC_ALL": "C"}], ids=["UTF-8", "C"])
    def test_what_is_typed_in_another_encoding_does_no_harm(self, instant, more):
        with chatting(url_of(instant), "--session", session := new_id(), **more) as chat:
            for line in ("\u00fcber caf\u00e9", "\u4e16\u754c", "caf\udce9", "", "Hi"):
                chat.enter(line)
        first, second, *_, last = [text for role, text in instant.history(session) if role == "user"]
        assert (first, second) == ("\u00fcber caf\u00e9", "\u4e16\u754c") and last.endswith("Hi")

    @pytest.mark.parametrize("more", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
    def test_colour_can_be_turned_off(self, instant, more):
        with chatting(url_of(instant), **more) as chat:
            chat.enter("Hi")
            chat.leave()
            assert not re.search(r"\x1b\[[\d;]*m", chat.text)
            assert "TERM" not in more or "\x1b" not in chat.text

    def test_a_session_that_is_named_begins_with_the_first_message(self, instant):
        with chatting(url_of(instant), "--session", session := new_id()) as chat:
            assert session not in instant.session_ids()
            chat.enter("Hi")
        assert len(instant.history(session)) == 2

    def test_who_comes_back_sees_a_running_answer_and_its_question(self, server):
        with contextlib.closing(server.chat(ONE_SECOND, session_id=(session := new_id())).connection), \
                TerminalChat(url_of(server), "--session", session) as chat:
            chat.wait(rf"^You \[{session[:8]}\.\.\.\] \u203a word word[word\n ]*word \n")
            chat.wait_for_prompt()
            check_shown(chat, server, session)
            assert chat.leave()["Messages Sent"] == "0"

    def test_without_a_server_the_prompt_comes_all_the_same(self, instant):
        with Proxy(instant.address) as proxy:
            proxy.down()
            with chatting(proxy.url, changes="client.FIRST_PAUSE = 0.01; client.RETRIES = 1") as chat:
                assert chat.seen().count("refused") == 1
                assert rows_of(chat.enter("Hi"))["Status"] == "FAILED"
                assert rows_of(chat.enter("/stats"))["Messages Sent"] == "0"
                proxy.up()
                assert rows_of(chat.enter("/retry"))["Status"] == "SUCCESS"

    def test_a_wrong_token_is_told_in_one_line(self, own):
        with TerminalChat(url_of(own("--token", "right", "--log", "off")), "--token", "wrong") as chat:
            assert chat.wait_for_end() == 1
            assert re.search(r"\n\S+ .*token.*\n\Z", chat.plain) and chat.plain.count("\n") == 2


@NOT_OURS
class TestTerminalClientStops:
    """Ctrl-C stops the answer, whatever the client is doing, and the prompt comes back."""

    def press(self, chat, times=1):
        """Press Ctrl-C. The prompt comes back soon, and the answer counts as stopped."""
        begin, pressed = chat.read, time.monotonic()
        for _ in range(times):
            chat.type(CTRL_C)
            time.sleep(0.3)     # or two signals are one
        chat.wait_for_prompt()
        assert time.monotonic() - pressed < 5
        assert rows_of(chat.plain[begin:chat.read])["Status"] == "STOPPED"

    @waits
    def test_what_came_is_kept(self, serve):
        server = serve(*CALM)
        with chatting(url_of(server), "--session", session := new_id()) as chat:
            chat.type(LONG + "\r")
            chat.wait("You said: (word ){12}")
            self.press(chat)
            assert not server.stats()["streams"]
            check_shown(chat, server, session)
            assert rows_of(chat.enter("Hi"))["Context Messages"] == "4"
            assert rows_of(chat.enter("/stats"))["Failed Streams"] == "0"

    @waits
    def test_before_the_first_chunk(self, serve):
        server = serve(*CALM)
        with Proxy(server.address, [Fault(delay=0.3)]) as proxy, \
                chatting(proxy.url, "--session", session := new_id()) as chat:
            chat.type(LONG + "\r")
            assert wait_until(lambda: server.stats()["streams"])
            self.press(chat)
            assert not server.stats()["streams"] and rows_of(chat.enter("Hi"))["Status"] == "SUCCESS"
        assert server.history(session)[-2] == ("user", "Hi")

    @waits
    def test_while_the_server_is_stuck(self, serve):
        server = serve(*CALM)
        with Proxy(server.address, [Fault(stall=900)]) as proxy, \
                chatting(proxy.url, changes="client.STOP_TIME = 0.5") as chat:
            chat.type(LONG + "\r")
            chat.wait("You said: word")
            self.press(chat)
            assert not server.stats()["streams"] and rows_of(chat.enter("Hi"))["Status"] == "SUCCESS"

    @waits
    def test_a_turn_that_was_stopped_never_runs_again(self, serve):
        """The stream stalls, and the server loses its memory when it has confirmed the stop."""
        server, restarted = serve(*CALM), serve(*CALM)
        with Proxy(server.address, [Fault(stall=900)]) as proxy, chatting(proxy.url) as chat:
            chat.type(LONG + "\r")
            chat.wait("You said: word")
            chat.type(CTRL_C)
            assert wait_until(lambda: not server.stats()["streams"])
            proxy.target = restarted.address
            chat.wait_for_prompt()
            assert any(line.startswith("GET /sessions/") and "/stream?after=" in line for line in proxy.requests)
            assert restarted.get("/health")["total_requests"] == 0

    @waits
    def test_the_turn_of_another_client_is_not_taken_for_the_stopped_one(self, serve):
        server = serve(*CALM)
        with Proxy(server.address, [Fault(stall=900)]) as proxy, \
                chatting(proxy.url, "--session", session := new_id(), changes="client.STALL_TIME = 4") as chat:
            chat.type(LONG + "\r")
            chat.wait("You said: word")
            chat.type(CTRL_C)
            assert wait_until(lambda: not server.stats()["streams"])
            server.turn("another message", session_id=session)
            chat.wait("has lost the stopped turn")
            assert "another message" not in chat.plain

    @waits
    def test_while_the_server_answers_nothing_at_all(self, serve):
        server = serve(*CALM)
        with Proxy(server.address, [Fault(stall=900)]) as proxy, \
                chatting(proxy.url, "--session", session := new_id(), changes="client.STOP_TIME = 0.5") as chat:
            chat.type(ONE_SECOND + "\r")
            chat.wait("You said: word")
            proxy.fault_of = lambda line: Fault(stall=0)
            self.press(chat)
            requests, begin = len(proxy.requests), chat.read
            chat.type("not lost\r")
            assert wait_until(lambda: any("/stop" in line for line in proxy.requests[requests:]))
            chat.type(CTRL_C)
            chat.wait_for_prompt()
            assert "was not sent" in chat.plain[begin:] and "STOPPED" not in chat.plain[begin:]
            del proxy.fault_of
            assert wait_until(lambda: not server.stats()["streams"])
            assert rows_of(chat.enter("/retry"))["Status"] == "SUCCESS"
        assert server.history(session)[-2] == ("user", "not lost")

    def test_in_a_pause_after_the_turn_has_ended(self, instant):
        changes = "client.FIRST_PAUSE = client.LONGEST_PAUSE = 60"
        with Proxy(instant.address, [Fault(cut=900)]) as proxy, \
                chatting(proxy.url, "--session", session := new_id(), changes=changes) as chat:
            chat.type(TEXT + "\r")
            chat.wait("Retrying")
            assert wait_until(lambda: len(instant.history(session)) == 2)
            chat.type(CTRL_C)
            chat.wait("SUCCESS")
            check_shown(chat, instant, session)

    @waits
    def test_while_the_server_is_away(self, serve):
        server = serve(*CALM)
        with Proxy(server.address) as proxy, \
                chatting(proxy.url, "--session", session := new_id(), changes="client.STOP_TIME = 60") as chat:
            with away(proxy, chat):
                self.press(chat)
            assert rows_of(chat.enter("Hi"))["Status"] == "SUCCESS"
        assert server.history(session)[-2] == ("user", "Hi")

    def test_where_nothing_was_sent_nothing_is_stopped(self):
        stats = refusal(200, body=b'{"model":"m"}')
        failing = stream_of(*TURN[:3], line_of("error", code="model_overloaded", message="Busy."))
        with ScriptedServer(failing, pages={"/stats": stats}) as server, Proxy(server.server_address) as proxy, \
                chatting(proxy.url) as chat:
            chat.enter("Hi")
            proxy.down()
            for typed, sent in [("/retry", "1"), ("another", "1")]:
                begin = chat.read
                chat.type(typed + "\r")
                chat.wait("Retrying")
                chat.type(CTRL_C)
                chat.wait("was not sent")
                chat.wait_for_prompt()
                assert "STOPPED" not in chat.plain[begin:]
                rows = rows_of(chat.enter("/stats"))
                assert (rows["Messages Sent"], rows["Failed Streams"]) == (sent, "1")

    def test_a_stop_that_is_answered_slowly_is_given_up(self):
        def drip(connection):
            for _ in range(100):
                connection.sendall(b"H")
                time.sleep(0.1)
        pages = {"/stats": refusal(200, body=b'{"model":"m"}'), "/sessions/s/stop": drip}
        with ScriptedServer(*9 * [stream_of(*TURN[:3])], pages=pages) as server, \
                chatting(server.url, "--session", "s", changes="client.STOP_TIME = 0.5") as chat:
            chat.type("Hi\r")
            chat.wait("Retrying")
            self.press(chat)


TYPED = [               # what is typed during an answer, and what is there at the prompt
    ("a paste", "\x1b[200~def f():\r    return 1\r\rexplain\x1b[201~", "def f():\n    return 1\n\nexplain"),
    ("a paste with commands", "\x1b[200~one\r/delete\r/quit\r\x1b[201~", "one\n/delete\n/quit\n"),
    ("a paste without marks", "one\r/delete\r/quit\rtwo", "one\n/delete\n/quit\ntwo"),
    ("a command", "/delete\r", "/delete"), ("lines", "one\rtwo\r", "one\ntwo"),
    ("6,000 characters", "\x1b[200~" + "x" * 6000 + "\x1b[201~", "x" * 6000),
    ("6,000 characters without marks", "x" * 6000, "x" * 6000),
    ("20,000 characters", "\x1b[200~" + 200 * ("x" * 99 + "\r") + "\x1b[201~", 200 * ("x" * 99 + "\n")),
    ("control bytes", "a\x04\x00\x15\x17\x01b\x7fc" + UP + "\x1bOd\x1b[3~", "ac"),
    ("control bytes in a paste", "\x1b[200~a\x04\t\x15b\x03\x1a\x1c\x1b[201~", "a\x04\t\x15b\x03\x1a\x1c"),
    ("other characters", "caf\u00e9 \u91cf \U0001f600", "caf\u00e9 \u91cf \U0001f600"),
]


@NOT_OURS
class TestTypedDuringAnAnswer:
    """What is typed or pasted while there is no prompt waits for it, as one text that nobody sends but the user."""

    def type_in_parts(self, chat, text):
        """As a terminal does it, which goes on when there is room."""
        data = text.encode()
        while data:
            data = data[os.write(chat.outer, data[:1000]):]
            time.sleep(0.001)

    @cases(TYPED)
    @waits
    def test_it_waits_at_the_prompt_as_one_text(self, serve, case):
        self.check(serve(*CALM), *case[1:])

    @pytest.mark.parametrize("more", [{"LC_ALL": "C"}, {"TERM": "dumb"}], ids=["C", "dumb"])
    @pytest.mark.parametrize("case", [TYPED[2], TYPED[-1]], ids=["lines", "other characters"])
    @waits
    def test_the_same_in_another_locale_and_at_a_dumb_terminal(self, serve, case, more):
        self.check(serve(*CALM), *case[1:], **more)

    def check(self, server, typed, text, **more):
        with chatting(url_of(server), "--session", session := new_id(), **more) as chat:
            chat.type("word " * 60 + "\r")
            chat.wait("You said: word")
            self.type_in_parts(chat, typed)
            chat.wait("SUCCESS")
            chat.wait_for_prompt()
            shown = b""
            while shown != chat.shown:
                shown = chat.shown
                time.sleep(0.4)
            assert len(server.history(session)) == 2, "it was sent by itself"
            chat.type("+" + CTRL_A + '"""' + CTRL_E + '"""\r')
            assert wait_until(lambda: len(server.history(session)) == 4)
            assert server.history(session)[2] == ("user", text + "+")

    def test_ctrl_c_drops_nothing_that_was_typed_before_it(self, server):
        with chatting(url_of(server), "--session", session := new_id()) as chat:
            chat.type(LONG + "\r")
            chat.wait("You said: word")
            chat.type("typed" + CTRL_C)
            chat.wait("STOPPED")
            chat.wait("typed")
            chat.enter("")
            assert server.history(session)[2] == ("user", "typed")

    @pytest.mark.parametrize("marks", [("\x1b[200~", "\x1b[201~"), ("", "")], ids=["a paste", "keys"])
    def test_ctrl_c_comes_through_behind_20_000_characters_while_the_model_is_silent(self, marks):
        flags = "--model", "test_protocol:silent_or_echo", "--log", "off"
        with running(*flags, PYTHONPATH=str(SERVER.parent)) as server, chatting(url_of(server)) as chat:
            chat.type("silent\r")
            assert wait_until(lambda: server.stats()["streams"])
            pressed = time.monotonic()
            self.type_in_parts(chat, ("x" * 20_000).join(marks) + CTRL_C)
            chat.wait("STOPPED")
            assert time.monotonic() - pressed < 5       # a ping, which would wake the client, comes after 10 s

    def test_ctrl_c_comes_through_after_a_paste_whose_end_is_missing(self, server):
        with chatting(url_of(server), changes="client.PASTE_TIME = 0.2") as chat:
            chat.type(LONG + "\r")
            chat.wait("You said: word")
            chat.type("\x1b[200~one")
            time.sleep(1)
            chat.type(CTRL_C)
            chat.wait("STOPPED.*one")

    @waits
    def test_a_paste_that_comes_slowly_and_ends_after_the_answer_is_one_text(self, serve):
        server = serve(*CALM)
        with chatting(url_of(server), "--session", session := new_id()) as chat:
            chat.type("word " * 100 + "\r")
            chat.wait("You said: word")
            for part in ("\x1b[2", "00~one\x03\r"):      # its mark, too, comes in parts
                chat.type(part)
                time.sleep(0.05)
            chat.wait("SUCCESS")
            for part in ("/delete\r", "two\x1b[20", "1~"):
                chat.type(part)
                time.sleep(0.6)
            chat.wait_for_prompt()
            chat.enter("")
            assert server.history(session)[2] == ("user", "one\x03\n/delete\ntwo")

    def modes(self, chat):
        return pytest.importorskip("termios").tcgetattr(chat.outer)[3]

    @pytest.mark.parametrize("at_prompt", [True, False], ids=["at the prompt", "during an answer"])
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGALRM", "SIGABRT"])
    @waits
    def test_a_signal_that_ends_it_leaves_the_terminal_as_it_was(self, serve, name, at_prompt):
        server = serve(*CALM)
        with TerminalChat(url_of(server)) as chat:
            before = self.modes(chat)
            chat.wait_for_prompt()
            if not at_prompt:
                chat.type(LONG + "\r")
                chat.wait("You said: word")
                assert self.modes(chat) != before
            chat.process.send_signal(getattr(signal, name))
            assert chat.wait_for_end() == -getattr(signal, name)
            assert self.modes(chat) == before
            assert chat.text.rfind("\x1b[?2004l") > chat.text.rfind("\x1b[?2004h")

    @pytest.mark.parametrize("keys", [CTRL_D, "/quit\r", CTRL_C + CTRL_C], ids=["Ctrl-D", "quit", "Ctrl-C"])
    def test_who_leaves_finds_the_terminal_as_it_was(self, server, keys):
        with TerminalChat(url_of(server)) as chat:
            before = self.modes(chat)
            chat.wait_for_prompt()
            for key in keys if keys[0] != "/" else [keys]:
                time.sleep(0.3)
                chat.type(key)
            assert chat.wait_for_end() == 0
            assert self.modes(chat) == before

    @contextlib.contextmanager
    def shell(self, path, *options):
        """A shell with its own modes of the terminal."""
        login = f"import os; os.login_tty(0); os.execv({path!r}, {['sh', *options, '-im']})"
        with tempfile.TemporaryDirectory() as home, \
                Terminal([sys.executable, "-c", login], HOME=home, PS1="shell> ", ENV="") as chat:
            chat.wait("shell> ")
            yield chat

    @contextlib.contextmanager
    def suspended(self, server, session, message, at_prompt):
        """A shell in which the client was started and then suspended."""
        with self.shell(shutil.which("dash") or shutil.which("sh")) as chat:
            before = self.modes(chat)
            chat.type(f"{sys.executable} {CLIENT} --url {url_of(server)} --session {session}\r")
            chat.wait("You \u203a ")
            chat.type(message + ("\r" if not at_prompt else ""))
            chat.wait("You said: word" if not at_prompt else "word word")
            time.sleep(0.3)
            chat.type("\x1a")
            chat.wait("shell> ")
            assert self.modes(chat) == before
            yield chat
            chat.wait("shell> ")
            assert self.modes(chat) == before

    @pytest.mark.parametrize("way_back", ["fg", "bg; sleep 0.5; jobs; fg"])
    @pytest.mark.parametrize("at_prompt", [True, False], ids=["at the prompt", "during an answer"])
    @waits
    def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again(self, serve, at_prompt, way_back):
        server, session, message = serve(*CALM), new_id(), "word " * 80
        with self.suspended(server, session, message, at_prompt) as chat:
            chat.type(way_back + "\r")
            if "jobs" in way_back:
                chat.wait(r"^\[1\].*Stopped")
            assert wait_until(lambda: not self.modes(chat) & pytest.importorskip("termios").ECHO)
            chat.wait("STREAM COMPLETED" if not at_prompt else "You \u203a word word")
            chat.type("" if not at_prompt else "\r")
            assert wait_until(lambda: session in server.session_ids() and len(server.history(session)) == 2)
            assert server.history(session)[0] == ("user", message)
            chat.wait(r"^You \[")
            chat.type(CTRL_D)

    @pytest.mark.parametrize("at_prompt", [True, False], ids=["at the prompt", "during an answer"])
    @waits
    def test_after_ctrl_z_it_can_be_killed(self, serve, at_prompt):
        message = "word word" if at_prompt else LONG
        with self.suspended(serve(*CALM), new_id(), message, at_prompt) as chat:
            chat.type("kill %1; kill -CONT %1; sleep 1; jobs\r")
            chat.wait("Terminated")

    @waits
    def test_ctrl_c_while_it_is_suspended_leaves_ctrl_z_as_it_was(self, serve):
        with self.suspended(serve(*CALM), new_id(), "word word", at_prompt=True) as chat:
            before = self.modes(chat)
            chat.type("kill -INT %1; fg\r")
            chat.wait("Ctrl-C again.*You \u203a ")
            chat.type("\x1a")
            chat.wait("shell> ")
            assert self.modes(chat) == before
            chat.type("kill -KILL %1\r")

    @waits
    def test_what_is_typed_is_seen_after_it_was_in_the_background(self, serve):
        """It begins there, and then is sent there in the middle of an answer, by SIGSTOP, which it cannot handle."""
        with self.shell(needs("bash"), "--norc", "-b") as chat:
            chat.type(f"{sys.executable} {CLIENT} --url {url_of(serve(*CALM))} &\r")
            client = int(chat.wait(r"\[1\] (\d+)\n")[1])
            chat.wait("Stopped")
            chat.type("fg\r")
            chat.wait("You \u203a ")
            chat.type("seen " * 40)
            chat.wait("seen seen")
            chat.type("\r")
            chat.wait("You said: seen")
            os.kill(client, signal.SIGSTOP)
            chat.wait("shell> ")
            chat.type("bg\r")
            chat.wait("SUCCESS.*Stopped")
            chat.type("fg\r")
            wait_until(lambda: not self.modes(chat) & pytest.importorskip("termios").ECHO)
            chat.type("still seen")
            chat.wait("still seen")
            chat.type("\x15/quit\r")
            chat.wait("Goodbye.*shell> ")


@NOT_OURS
class TestTerminalClientRecovers:
    """After a cut the text on the screen is the server's, nothing twice and nothing missing."""

    @waits
    def test_a_cut_answer_goes_on(self, serve):
        server = serve(*CALM)
        cuts = [Fault(cut=9), Fault(cut=900), Fault(cut=900, reset=True)]
        faults = [fault for cut in cuts for fault in (cut, Fault())]
        with Proxy(server.address, [*faults, Fault(split=True)]) as proxy, \
                chatting(proxy.url, "--session", session := new_id()) as chat:
            for number in range(4):
                chat.enter(f"{number}: {TEXT}")
                check_shown(chat, server, session)
            assert len(re.findall("^\U0001f504 ", chat.seen(), re.MULTILINE)) == 3, "one line tells of a cut"
            left = chat.leave()
        assert [left[name + " Streams"] for name in ("Successful", "Recovered", "Failed")] == ["4", "3", "0"]
        assert len(server.history(session)) == 8

    @waits
    def test_it_waits_for_a_server_that_is_away(self, serve):
        server = serve(*CALM)
        with Proxy(server.address) as proxy, chatting(proxy.url, "--session", session := new_id()) as chat:
            with away(proxy, chat):
                time.sleep(1)
            chat.wait_for_prompt()
            check_shown(chat, server, session)
            assert len(re.findall("^\U0001f504 ", chat.seen(), re.MULTILINE)) <= 2

    @waits
    def test_a_stuck_server_is_tried_again(self, serve):
        server = serve(*CALM)
        with Proxy(server.address, [Fault(stall=900)]) as proxy, \
                chatting(proxy.url, "--session", session := new_id(), changes="client.SILENCE = 1") as chat:
            assert "silent" in chat.enter(TEXT)
            check_shown(chat, server, session)

    @waits
    def test_a_server_that_lost_its_memory_runs_the_turn_anew(self, serve):
        server = serve(*CALM)
        with Proxy(server.address) as proxy, chatting(proxy.url, "--session", session := new_id()) as chat:
            chat.enter("The first turn")
            with away(proxy, chat):
                restarted = serve("--chunk-delay", "0", "--log", "off")
                proxy.target = restarted.address
            chat.wait("earlier messages are gone.*Generating response again")
            chat.wait_for_prompt()
            check_shown(chat, restarted, session)
            assert chat.leave()["Sessions Created"] == "2"

    @waits
    def test_a_server_that_is_killed_and_started_again_costs_one_notice(self, serve):
        with tempfile.TemporaryDirectory() as folder:
            flags = ("--db", str(Path(folder, "chat.db")), "--log", "off")
            server = serve(*flags)
            with Proxy(server.address) as proxy, chatting(proxy.url, "--session", session := new_id()) as chat:
                chat.enter("The first turn")
                with away(proxy, chat):
                    server.process.kill()
                    server.process.wait(PATIENCE)
                    restarted = serve(*flags)
                    proxy.target = restarted.address
                chat.wait_for_prompt()
                check_shown(chat, restarted, session)
                assert len(re.findall("^(\U0001f504|\u26a0|\u274c)", chat.seen(), re.MULTILINE)) == 1
                assert chat.leave()["Session Messages"] == "4"
            assert len(restarted.history(session)) == 4

    @waits
    def test_who_gives_up_can_retry_the_same_turn(self, serve):
        server = serve(*CALM)
        with Proxy(server.address, [Fault(cut=800)] * 2) as proxy, \
                chatting(proxy.url, "--session", session := new_id(), changes="client.RETRIES = 1") as chat:
            shown = chat.enter(TEXT)
            assert rows_of(shown)["Status"] == "FAILED" and "/retry" in shown
            assert rows_of(chat.enter("/stats"))["Failed Streams"] == "1"
            assert rows_of(chat.enter("/retry"))["Status"] == "SUCCESS"
            check_shown(chat, server, session)
            assert "nothing to send again" in chat.enter("/retry")
            rows = rows_of(chat.enter("/stats"))
            assert (rows["Messages Sent"], rows["Sessions Created"]) == ("1", "1")
        assert len(server.history(session)) == 2

    @waits
    def test_a_session_that_is_deleted_during_an_answer_comes_back_only_on_request(self, serve):
        server = serve(*CALM)
        for typed, comes_back in [("another message", False), ("/retry", True)]:
            with chatting(url_of(server), "--session", session := new_id()) as chat:
                chat.type(ONE_SECOND + "\r")
                chat.wait("You said: (word ){8}")
                server.request("DELETE", f"/sessions/{session}")
                chat.wait("deleted.*/retry sends")
                chat.wait_for_prompt()
                assert chat.session is None and session not in server.session_ids()
                chat.enter(typed)
                assert (session in server.session_ids()) is comes_back
                if comes_back:
                    check_shown(chat, server, session)
                assert chat.leave()["Sessions Created"] == "2"

    @waits
    def test_a_session_that_was_deleted_elsewhere_is_made_again_and_it_is_told(self, serve):
        server = serve(*CALM)
        with Proxy(server.address) as proxy, chatting(proxy.url, "--session", session := new_id()) as chat:
            chat.enter("Hi")
            with away(proxy, chat):
                server.request("DELETE", f"/sessions/{session}")
            chat.wait("the server has 0 of 2.*Generating response again")
            chat.wait_for_prompt()
            check_shown(chat, server, session)
            server.request("DELETE", f"/sessions/{session}")
            assert "the server has 0 of 2" in chat.enter("Hi")
            assert chat.leave()["Sessions Created"] == "3"


@NOT_OURS
class TestTerminalClientIsSafe:
    """Control characters from outside are shown as escapes, and never act on the terminal."""

    def check_safe(self, chat):
        shown = re.sub(r"\x1b(\[(\d+(;\d+)*m|\?2004[hl])|\[?\d*\Z)", "", chat.text)     # the last may not be whole yet
        assert {character for character in shown if unicodedata.category(character) == "Cc"} <= set("\r\n")
        assert not [raw for raw in ("\rFORGED", "\x1b[31mFORGED", "\ufffd") if raw in chat.text]

    def test_in_questions_answers_and_the_history(self, server):
        with contextlib.closing(server.chat(FORGED + LONG, session_id=(session := new_id())).connection), \
                chatting(url_of(server), "--session", session) as chat:
            chat.wait("You said: .*word")
            assert server.stop(session)
            chat.wait_for_prompt()
            chat.enter("/history")
            assert chat.plain.count(r"\x1b[31mFORGED") == 4
            self.check_safe(chat)

    def test_in_the_lines_of_the_stream(self):
        line = json.dumps({"type": "news", "text": "\u009b31m\x7f"}, ensure_ascii=False).encode() + b"\n"
        with ScriptedServer(stream_of(INFO, line, *TURN[1:])) as server, \
                TerminalChat(server.url, "--json", "Hi") as chat:
            assert chat.wait_for_end() == 0
            assert r"\x9b31m\x7f" in chat.plain
            self.check_safe(chat)

    def test_in_all_that_a_server_says(self, instant):
        instant.turn("Hi", session_id="hostile")
        pages = {path: instant.get(path) for path in ("/stats", "/health", "/sessions", "/sessions/hostile")}
        pages["/sessions/new"] = instant.request("POST", "/sessions/new").json
        pages = {path: ("application/json", json.dumps(forged(page)).encode()) for path, page in pages.items()}
        turns = [answer(map(forged, events)) for events in (flawless(), end_with(retryable=False)(flawless()))]
        faults = [Fault(instead=script.replace(b"keep-alive", b"close")) for script in (*turns, *HOSTILE_ANSWERS)]
        with Site(instant.address, pages, faults) as site, chatting(site.url, "--session", "hostile") as chat:
            assert r"\x1b[31mFORGED" in chat.plain
            for line in (*(["Hi"] * len(faults)), "/server", "/health", "/sessions", "/info", "/history", "/new"):
                shown = chat.enter(line)
                assert r"\x" in shown or r"\n" in shown, line
                self.check_safe(chat)
            check_boxes(chat.seen())
            assert not next(site.faults, None)


# ---- The page, in a browser

@contextlib.contextmanager
def opened(browser, url, path="/demo", excused=()):
    """The page of the server at this URL. In the end it has asked nobody else, and no error was left in the console.

    `excused` are sources of errors in the console: where connections are cut, "network" has some. The session that the
    path names may not be there.
    """
    named = f"{url}/sessions/{path.partition('session=')[2].partition('#')[0]} - Failed to load resource"
    browser.open(url + path)
    yield
    errors = [entry for entry in browser.console() if entry["level"] == "SEVERE" and entry["source"] not in excused
              and not entry["message"].startswith(named)]
    assert not errors, errors
    assert {urlsplit(asked).netloc for asked in browser.requests()} <= {urlsplit(url).netloc, ""}   # none in data:


@contextlib.contextmanager
def visited(browser, server, view="chat", session=None, excused=()):
    """The page in this view, with a new session, whose id it yields."""
    session = session or server.request("POST", "/sessions/new").json["session_id"]
    with opened(browser, url_of(server), f"/demo?session={session}#{view}", excused):
        browser.wait('document.querySelector("#sessions .open small").textContent.includes("message")')
        yield session


ARTICLES = """[...document.querySelectorAll("#log article")].map(
    article => [article.classList.item(0), article.querySelector(".text").textContent])"""
ANSWER = "#log > article.model:last-of-type"
ANSWERED = f'document.querySelector("{ANSWER} > .text")?.textContent'
STATE = 'document.querySelector("#state").dataset.state'
NOTICE = 'document.querySelector("#told").textContent'
TEXTS = "return Array.from(document.querySelectorAll(args[0]), element => element.textContent);"
NAMES = '[...document.querySelectorAll("#sessions .name")].map(each => each.textContent.trim())'
HURRY = "document.dispatchEvent(new Event('visibilitychange'))"      # then the page looks at the list
PLACES = """
const {scrollTop, scrollHeight, clientHeight} = document.querySelector(args[0]);
return [Math.round(scrollTop), Math.round(scrollHeight - clientHeight - scrollTop)];
"""
COPY = """
return new Promise(resolve => {
  navigator.clipboard.writeText = async text => resolve(text);
  document.querySelector(args[0]).click();
});
"""
SPACED = "  two  spaces\n\n\ta tab and " + TEXT


def send(browser, message):
    browser.run('document.querySelector("#message").focus();')
    browser.cdp("Input.insertText", text=message)
    browser.keys(ENTER)


def until(browser, state):
    browser.wait(f"{STATE} === args[0]", state)


def until_longer(browser, count=100):
    """The answer has grown by so many characters."""
    browser.wait(f"{ANSWERED}.length > args[0]", len(browser.run(f"return {ANSWERED};") or "") + count)


def answer_shown(browser):
    """The last answer, once it has ended."""
    browser.wait(f'document.querySelector("{ANSWER} > .end")')
    return browser.run(TEXTS, ANSWER + " > .text")[0]


def say(browser, message):
    send(browser, message)
    return answer_shown(browser)


def seen(browser, selector):
    """The texts of the elements that are shown."""
    return browser.run("return [...document.querySelectorAll(args[0])].filter(each => each.checkVisibility() && "
                       "each.textContent).map(each => each.textContent);", selector)


def decide(browser, answer):
    """Accept or dismiss the browser's question."""
    browser.ask("POST", f"/alert/{answer}")


def check_articles(browser, server, session):
    """The page shows the session's history, character for character."""
    told = [list(message) for message in server.history(session)]
    wait_until(lambda: browser.run(f"return {ARTICLES};") == told)  # articles are there before their text
    assert browser.run(f"return {ARTICLES};") == told


def check_stop(browser, server, session):
    """Stop the turn: what is shown is what had left, and the history keeps the same."""
    browser.click("#stop")
    until(browser, "stopped")
    check_articles(browser, server, session)


def one_of_many(server):
    """A proxy to many servers: this one will have the sessions, and another one answers for the list."""
    pages = {"/sessions": ("application/json", json.dumps(server.get("/sessions")).encode())}
    return Site(server.address, pages)


def streams(proxy):
    """The requests for streams that the page has sent, each as its method and path."""
    return [line.removesuffix(" HTTP/1.1") for line in proxy.requests if STREAM.match(line)]


OTHER_SOFTWARE = {      # what it does to each text node of an answer
    "a translator wraps": """
        if (text.parentNode.matches("font")) continue;
        const [outer, inner] = [document.createElement("font"), document.createElement("font")];
        text.replaceWith(outer); outer.append(inner); inner.append(text);""",
    "a translator replaces": """
        if (text.parentNode.matches("font")) continue;
        const [outer, inner] = [document.createElement("font"), document.createElement("font")];
        text.replaceWith(outer); outer.append(inner); inner.append(text.data);""",
    "an extension copies the line": "copy(text.parentNode);",
    "an extension copies the block": 'copy(text.parentNode.closest(".text > *"));',
    "an extension copies the text": 'copy(text.parentNode.closest(".text"));',
    "an extension copies the answer": 'copy(text.parentNode.closest("article"));',
}
INTERFERE = """
const copy = element => {
  if (element.dataset.copied) return;
  element.dataset.copied = "yes";
  element.replaceWith(element.cloneNode(true));
};
setInterval(() => {
  const found = [];
  for (const box of document.querySelectorAll("article.model > .text")) {
    const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) found.push(walker.currentNode);
  }
  for (const text of found) {
    if (!text.isConnected) continue;
    DEED
  }
}, 20);
"""
FAILS_TO_DRAW = """
const {appendData} = Text.prototype;
Text.prototype.appendData = function(text) {
  if (text.includes(args[0])) { Text.prototype.appendData = appendData; throw new RangeError("broken on purpose"); }
  appendData.call(this, text);
};
"""
FENCES = [              # a text, and its code blocks (CommonMark, section 4.5)
    ("no code", []), ("a ``` b ```\n", []), ("``\nno\n``", []), ("    ```\nno\n", []), ("\t```\nno\n", []),
    ("``` a`b\nno\n", []), ("~~\n~ ~~~\n", []), ("```py\nprint(1)\n```\nafter", ["print(1)\n"]),
    ("before\n```\nopen\n\nto the end", ["open\n\nto the end"]), ("~~~ a`b\n```\n~~~\n", ["```\n"]),
    ("````\n```\n````` \n", ["```\n"]), ("```\na\n``` x\n~~~\n```", ["a\n``` x\n~~~\n"]),
    ("   ```\n  a\n  ```\n```\nb\n```", ["  a\n", "b\n"]), ("\n\n```\n\n\n```\n\n", ["\n\n"]),
    ("```\n    ```\n", ["    ```\n"]), ("```\nx\n```\n" * 2, ["x\n", "x\n"]), ("```\r\nx\r\n```\r\ny", ["x\r\n"]),
]
PLAYED = """        // each case is a turn: steps, each of which is a list of events that come at once
const [cases] = args, {fetch} = window, results = [], {port1, port2} = new MessageChannel();
const soon = () => new Promise(then => { port1.onmessage = then; port2.postMessage(0); });
const until = async condition => {
  for (const end = Date.now() + 2000; !condition() && Date.now() < end;) await soon();
};
window.requestAnimationFrame = draw => { queueMicrotask(draw); return 1; };     // frames are slow
for (const steps of cases) {
  let body, turn_id, text = "";
  const stream = new ReadableStream({start(controller) { body = controller; }}), wrong = [];
  window.fetch = async (url, options) => {
    if (options?.method !== "POST") return fetch(url, options);
    ({turn_id} = JSON.parse(options.body));
    return new Response(stream);
  };
  document.querySelector("#message").value = "Hi";
  document.querySelector("#form").requestSubmit();
  await until(() => turn_id);
  const answer = document.querySelector("#log > article.model:last-of-type");
  const shown = () => answer.querySelector(".text")?.textContent ?? "";
  for (const events of steps) {
    for (const event of events) {
      if (event.type === "session_info") event.turn_id = turn_id;
      if (event.type === "chunk") text += event.text;
      body.enqueue(new TextEncoder().encode(JSON.stringify(event) + "\\n"));
    }
    await until(() => shown() === text);
    if (shown() !== text) wrong.push([text, shown()]);
  }
  body.close();
  await until(() => answer.querySelector(".end"));
  results.push([wrong, Array.from(answer.querySelectorAll(".code pre"), code =>
    Array.from(code.querySelectorAll("span:not(.fence)"), line => line.textContent).join(""))]);
}
return results;
"""


def played(*texts):
    """The steps of a turn with these chunks, which come one by one."""
    chunks = [[{"type": "chunk", "text": text, "chunk_number": number}] for number, text in enumerate(texts, 1)]
    end = {"type": "complete", "finish_reason": "stop", "total_chunks": len(texts), "processing_time": 1,
           "message_count": 0}      # as many as the server has, or the page reads the history
    return [[{"type": "session_info"}, {"type": "status", "context_messages": 0}], *chunks, [end]]


def cut_by_chance(chance, text):
    cuts = sorted(chance.choices(range(len(text) + 1), k=5))
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


LONG_TASKS = """
window.tasks = [];
new PerformanceObserver(list => tasks.push(...list.getEntries().map(task => task.duration)))
  .observe({type: "longtask"});
"""


class TestThePageShowsText:
    """An answer is appended as it comes, and is whole or says that it is not. What the reader does stays."""

    @waits
    def test_text_comes_whatever_other_software_does_and_a_failure_to_draw_is_told(self, serve, browser):
        server = serve("--chunk-delay", "0.01", "--chunk-words", "1", "--log", "off")
        message = "one two\nthree four\n```py\nfive six\nseven\n```\neight\n" * 3
        for name, deed in OTHER_SOFTWARE.items():
            with visited(browser, server) as session:
                browser.run(INTERFERE.replace("DEED", deed))
                send(browser, message)
                until(browser, "complete")
                [answer] = [text for role, text in server.history(session) if role == "model"]
                assert "".join(browser.run(TEXTS, "article.model > .text")) == answer, name

        with visited(browser, serve(*CALM)):
            send(browser, LONG)
            for removed in ("#log span", "#log div", "#log .text", "#log article.model", "#log > *"):
                until_longer(browser)
                browser.run("for (const each of document.querySelectorAll(args[0])) each.remove();", removed)
                browser.wait(f"{ANSWERED}?.startsWith('word')")     # without the "You said" of its beginning
            until_longer(browser)
            browser.click("#stop")
            until(browser, "stopped")
            assert "stopped" in seen(browser, ".end")[-1]

        server = serve(*INSTANT)
        with visited(browser, server, excused=["console-api"]) as session:
            browser.run(FAILS_TO_DRAW, "offline")
            send(browser, "Hi")
            until(browser, "failed")
            assert "broken on purpose" in browser.run(f"return {NOTICE};")
            assert "could not show" in seen(browser, ".end")[0]
            browser.click(".retry")
            until(browser, "complete")
            check_articles(browser, server, session)
            assert not browser.run(f"return {NOTICE};") and len(server.history(session)) == 2

    @waits
    def test_each_character_is_shown_as_it_comes_however_many_there_are(self, serve, browser):
        chance = random.Random(1)
        parts = ["```", "~~~", "`", "~", "\n", "\n", " ", "a", "\u2028", "\U0001f600"]
        texts = ["".join(chance.choices(parts, k=20)) for _ in range(20)]
        with visited(browser, serve("--log", "off")):
            in_pieces = browser.run(PLAYED, [played(*cut_by_chance(chance, text)) for text in texts])
            assert in_pieces == browser.run(PLAYED, [played(text) for text in texts])
            assert not [wrong for wrong, _ in in_pieces if wrong]
            assert browser.run(PLAYED, [played(*text) for text, _ in FENCES]) == [[[], code] for _, code in FENCES]
            browser.run(PLAYED, [played("```py\niiii\nMMMM\n```\n")])
            assert browser.run(COPY, ANSWER + " .code .copy") == "iiii\nMMMM\n"

        server = serve("--chunk-words", "1", *INSTANT)
        with visited(browser, server) as session:
            browser.run(LONG_TASKS)
            text = say(browser, "word " * 4990)
            browser.run('location.hash = "wire";')
            browser.wait(WIRE_IS_WHOLE)
            lines = [raw for kind, *_, raw in browser.run(WIRE) if kind in EVENTS]
            tasks = browser.run("return tasks;")
        assert text == server.history(session)[-1][1] and len(lines) > 5000
        assert "".join(line + "\n" for line in lines).encode() == b"".join(server.follow(session).read().lines)
        assert max(tasks, default=0) < 1000 * PATIENCE, "a person who types has to wait"


def scroll_by_wheel(browser):
    browser.cdp("Input.dispatchMouseEvent", type="mouseWheel", x=700, y=450, deltaX=0, deltaY=-8)


def scroll_by_finger(browser):
    places = [(700, 400 + way) for way in range(0, 60, 4)]
    for kind, points in [("touchStart", places[:1]), *(("touchMove", [place]) for place in places), ("touchEnd", [])]:
        browser.cdp("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y} for x, y in points])


def scroll_by_key(browser):
    browser.keys(ARROW_UP)


def scroll_by_other_software(browser):
    browser.run('for (const box of document.querySelectorAll("#log, #lines")) box.scrollTop -= 9;')


class TestThePageLeavesTheReaderAlone:
    """The reader owns the scroll position and the selection, whatever comes in the meantime."""

    @waits
    def test_any_scroll_upwards_lets_go_and_only_the_very_end_follows_again(self, serve, browser):
        with visited(browser, serve(*CALM)):
            send(browser, "line\n" * 50 + LONG * 3)
            ways = [scroll_by_wheel, scroll_by_key, scroll_by_finger, scroll_by_other_software]
            for view, box, button, tried in (("chat", "#log", "#latest", ways),
                                             ("wire", "#lines", "#lines-latest", ways[:2])):
                browser.run("location.hash = args[0];", view)
                for scroll in tried:
                    browser.wait(f"(() => {{ {PLACES} }})()[0] > 100", box)
                    browser.click(box)
                    browser.wait("document.activeElement.matches(args[0])", box)
                    until_longer(browser)
                    assert browser.run(PLACES, box)[1] <= 2, "it does not follow"
                    scroll(browser)
                    browser.wait("document.querySelector(args[0]).checkVisibility()", button)
                    until_longer(browser)       # a scroll is smooth
                    place = browser.run(PLACES, box)[0]
                    until_longer(browser)
                    assert browser.run(PLACES, box)[0] == place, (view, scroll)
                    browser.click(button)
                    browser.wait("document.querySelector(args[0]).hidden", button)
            browser.click("#stop")
            until(browser, "stopped")

    @waits
    def test_a_selection_stays_while_the_text_grows_and_others_speak(self, serve, browser):
        server = serve(*CALM)
        selected = "return getSelection().toString();"
        select = "getSelection().selectAllChildren(document.querySelector(args[0]));"
        with visited(browser, server) as session:
            server.turn("line\n" * 60, session_id=session)
            browser.wait(f"{HURRY} && ({ARTICLES}).length === 2")
            send(browser, LONG)
            until_longer(browser, 50)
            browser.run(select, f"{ANSWER} > .text")
            text = browser.run(selected)
            until_longer(browser)
            assert text.startswith("You said: word") and browser.run(selected).startswith(text)
            browser.run('location.hash = "wire";')
            browser.run(select, "#lines > [data-type=chunk]")
            line = browser.run(selected)
            browser.run("window.count = document.querySelectorAll('#lines > .line').length;")
            browser.wait("document.querySelectorAll('#lines > .line').length > count + 5")
            assert '"type":"chunk"' in line and browser.run(selected) == line
            assert server.stop(session)
            until(browser, "stopped")
            server.turn("From another client", session_id=session)
            browser.wait(f"{HURRY} && document.querySelector('#lines').textContent.includes('From another')")
            assert browser.run(selected) == line, "the rows of the turn before stay"
            browser.run('location.hash = "chat";')
            check_articles(browser, server, session)
            browser.run(select, "article.user:first-of-type > .text")
            browser.run('document.querySelector("#log").scrollTop = 30;')
            text = browser.run(selected)
            focus = browser.run("return document.activeElement.id;")
            server.turn("From another client", session_id=session)
            browser.wait(f"{HURRY} && ({ARTICLES}).length === 8")
            until(browser, "complete")
            assert browser.run(PLACES, "#log")[0] == 30 and browser.run(selected) == text
            assert browser.run("return document.activeElement.id;") == focus
            check_articles(browser, server, session)


class TestThePageChats:
    """README, "Demo page": what a person does, and what the page says about it."""

    @waits
    def test_sessions_have_names_and_are_opened_begun_cleared_and_deleted(self, serve, browser):
        server, first = serve(*INSTANT), "0123456789abcdef"
        for message in ("What is\n a transfer chunk?", "And then?"):
            server.turn(message, session_id=first)
        server.turn("Hi", session_id="two")
        chosen = 'document.querySelector("#sessions [aria-current=true] .name").textContent.trim()'
        with opened(browser, url_of(server), f"/demo?session={first}"):
            browser.wait(f"{NAMES}.join() === 'two Hi,01234567 What is a transfer chunk?'")
            assert browser.run(f"return {chosen};").startswith("01234567 What is")
            check_articles(browser, server, first)
            browser.click("[data-id=two]")
            browser.wait(f"{chosen} === 'two Hi' && location.search === '?session=two' && ({ARTICLES}).length === 2")
            check_articles(browser, server, "two")
            browser.click("#new")
            browser.wait("!location.search")
            assert browser.run(f"return {ARTICLES};") == []
            say(browser, "Third")
            session = browser.run("return location.search;").partition("=")[2]
            browser.wait(f"{NAMES}[0] === args[0]", session[:8] + " Third")
            check_articles(browser, server, session)
            browser.click("[data-id=two]")
            browser.wait(f"{chosen} === 'two Hi' && ({ARTICLES}).length === 2")
            for button in ("#clear", "#delete"):
                browser.click(button)
                decide(browser, "dismiss")
            assert len(server.history("two")) == 2
            browser.click("#clear")
            decide(browser, "accept")
            browser.wait(f"({ARTICLES}).length === 0 && {chosen} === 'two'")
            assert server.history("two") == []
            say(browser, "Again")
            check_articles(browser, server, "two")
            browser.click("#delete")
            decide(browser, "accept")
            browser.wait("!document.querySelector('[data-id=two]')")
            assert server.session_ids() == {first, session} and browser.run(f"return {ARTICLES};") == []

    @waits
    def test_keys_send_and_stop_with_an_input_method_and_on_a_phone_too(self, serve, browser):
        """UI Events, section 5.7: the keys of an input method have the code 229, in Safari also its last one."""
        def press(key, code):
            browser.cdp("Input.dispatchKeyEvent", type="rawKeyDown", key=key, code=key, windowsVirtualKeyCode=code)

        with visited(browser, serve(*CALM)):
            browser.click("#message")
            browser.keys(" " + ENTER)
            browser.keys("One")
            browser.keys(ENTER, held=SHIFT)
            browser.cdp("Input.imeSetComposition", text="\u304b", selectionStart=1, selectionEnd=1)
            press("Enter", 13)
            browser.cdp("Input.insertText", text="\u65e5")
            press("Enter", 229)
            assert browser.run(f"return {STATE};") == "idle"
            browser.cdp("Input.insertText", text="\n" + LONG)
            browser.keys(ENTER)
            until_longer(browser)
            press("Escape", 229)
            until_longer(browser)
            assert browser.run(f"return {STATE};") == "streaming"
            browser.keys(ESCAPE)
            until(browser, "stopped")
            assert browser.run(f"return {ARTICLES};")[0] == ["user", " One\n\u65e5\n" + LONG]

        toggle = "return document.querySelector('#sessions-toggle').getBoundingClientRect().y;"
        small = """
return Array.from(document.querySelectorAll("button, a, summary, input"))
  .filter(each => each.checkVisibility() && Math.min(each.offsetWidth, each.offsetHeight) < 24)
  .map(each => each.outerHTML);
"""
        server = serve(*INSTANT)
        with visited(browser, server) as session:
            browser.cdp("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=1)
            resize(browser, 360)
            browser.click("#message")
            browser.keys("One" + ENTER + "```" + ENTER + "two")
            assert browser.run("return document.querySelector('#message').dir;") == "auto"
            browser.click("#send")
            until(browser, "complete")
            check_articles(browser, server, session)
            assert server.history(session)[0] == ("user", "One\n```\ntwo")
            place = browser.run(toggle)
            browser.click("#sessions-toggle")
            browser.wait("document.querySelector('#new').checkVisibility()")
            assert browser.run(toggle) == place
            for view in views(browser):
                assert not browser.run(small), view

    @waits
    def test_a_stop_a_failure_and_a_refusal_are_told_until_the_next_answer(self, serve, browser):
        server, session = serve(*CALM), new_id()
        stalls = {"sending": 0, "waiting": b'{"type":"chunk"', "streaming": b'"chunk_number":3'}
        with Proxy(server.address, [fault for stall in stalls.values() for fault in (Fault(stall=stall), Fault())]) \
                as proxy, opened(browser, proxy.url, f"/demo?session={session}", ["network"]):
            for state in stalls:
                send(browser, LONG)
                until(browser, state)
                if state == "streaming":
                    browser.wait(f"{ANSWERED} === args[0]", "You said: " + "word " * 6)
                check_stop(browser, server, session)
        assert streams(proxy) == [f"POST /sessions/{session}/stream"] * 6

        server, session = serve(*CALM), new_id()
        with Proxy(server.address, [Fault(instead=refusal(409))]) as proxy, \
                opened(browser, proxy.url, f"/demo?session={session}", ["network"]):
            send(browser, SPACED)
            browser.wait("document.querySelector('.failed')?.textContent.endsWith('Because I say so.')")
            assert browser.run(f"return {ARTICLES};")[0] == ["user", SPACED]
            browser.click(".retry")
            until(browser, "complete")
            check_articles(browser, server, session)
            send(browser, LONG)
            until_longer(browser, 50)
            proxy.down()
            proxy.up()
            browser.wait(f"{NOTICE}.includes('Nothing is missing')")
            server.request("POST", f"/sessions/{session}/clear")
            until(browser, "failed")
            assert not browser.run(f"return {NOTICE};")
            assert "session_cleared" in seen(browser, ".end.failed")[0]
            browser.wait(f"{HURRY} && document.querySelector('#log').textContent.includes('no longer has')")
            browser.click(".retry")
            until(browser, "streaming")
            seconds = browser.run("return parseFloat(document.querySelector('#progress').textContent.split('·')[1]);")
            browser.click("#stop")
            until(browser, "stopped")
            assert seconds < 5 and not seen(browser, ".retry, #told")
            assert browser.run(f"return {ARTICLES};")[2:] == [list(each) for each in server.history(session)]

    @waits
    def test_the_token_is_asked_for_and_kept_for_the_tab_alone(self, serve, browser):
        server = serve("--token", TOKEN, *INSTANT)
        is_asked = "document.querySelector('#token').checkVisibility()"
        with opened(browser, url_of(server), "/demo?session=one", ["network"]):
            for token in ("wrong", TOKEN):
                browser.wait(f"{is_asked} && document.activeElement.id === 'token'")
                browser.keys(token + ENTER)
            browser.wait(f"!{is_asked} && document.activeElement.id === 'message'")
            say(browser, "Hi")
            check_articles(browser, server, "one")
            browser.ask("POST", "/refresh")
            browser.wait(f"({ARTICLES}).length === 2")
            assert not browser.run(f"return {is_asked};")
            kept = "return JSON.stringify({...args[0] ? sessionStorage : localStorage}) + document.cookie + location;"
            assert TOKEN in browser.run(kept, True) and TOKEN not in browser.run(kept, False)
            with browser.tab():
                browser.open(url_of(server) + "/demo?session=one")
                browser.wait(is_asked)

    @waits
    def test_the_page_is_quiet(self, serve, browser):
        """While nothing happens it asks for the list every four seconds, and for nothing while it is hidden."""
        server = serve(*CALM)
        with Proxy(server.address) as proxy:
            server.turn("Hi", session_id="one")
            with opened(browser, proxy.url, "/demo?session=one"):
                until(browser, "complete")
                browser.wait(f"{NAMES}.join() === 'one Hi'")
                before = len(proxy.requests)
                time.sleep(6)
                assert {*proxy.requests[before:]} == {"GET /sessions HTTP/1.1"} and len(proxy.requests) - before <= 2
                send(browser, LONG)
                until(browser, "streaming")
                with browser.tab():
                    time.sleep(0.5)     # what was asked before is over
                    before = len(proxy.requests)
                    time.sleep(4.5)
                    assert len(proxy.requests) == before and server.readers("one") == [1]
                check_stop(browser, server, "one")


class TestThePageRecovers:
    """After a cut the page shows the server's text, nothing twice and nothing missing, and says so."""

    @waits
    def test_a_cut_at_any_place_neither_loses_nor_doubles_text(self, serve, browser):
        server, session = serve(*CALM), new_id()
        cuts = [*random.Random(2).sample(places_to_cut(server, 3), 10), b'"is_final":true', b"\n\r\n0\r\n"]
        trouble = [fault for _, raw in MAY_PASS[:8] for fault in (Fault(instead=raw), Fault())]
        with Proxy(server.address, [*cut_once(cuts), *BYTE_BY_BYTE, *trouble]) as proxy, \
                opened(browser, proxy.url, f"/demo?session={session}", ["network"]):
            for number in range(1, len(cuts) + 10):
                send(browser, TEXT)
                browser.wait(f"({ARTICLES}).length === args[0] && {STATE} === 'complete'", 2 * number)
            check_articles(browser, server, session)
        assert {*streams(proxy)} == {f"POST /sessions/{session}/stream"}, "its own turn is sent again"
        assert server.stats()["total_requests"] == len(cuts) + 9 + 1    # one by `places_to_cut`

    @waits
    def test_a_reload_in_mid_answer_goes_on_with_question_and_answer(self, serve, browser):
        server = serve(*CALM)
        elapsed = "return parseFloat(document.querySelector('#progress').textContent.split('·')[1]);"
        with Proxy(server.address) as proxy, opened(browser, proxy.url, "/demo?session=one", ["network"]):
            started = time.monotonic()
            send(browser, SPACED + LONG)
            until_longer(browser, 1000)     # which takes 2.5 s
            browser.ask("POST", "/refresh")
            browser.wait(f"{STATE} === 'streaming' && ({ARTICLES})[1][1].length > 1000")
            assert 1.5 <= browser.run(elapsed) < time.monotonic() - started + 1, "the Date field has whole seconds"
            until_longer(browser)
            assert browser.run(f"return {ARTICLES};")[0] == ["user", SPACED + LONG]
            browser.run('location.hash = "wire";')
            browser.wait("document.querySelector('#wire-facts').textContent.includes('not measured')")
            assert "first chunk" not in browser.run("return document.querySelector('#wire-facts').textContent;")
            assert "repeated" in browser.run("return document.querySelector('#lines > [data-type=chunk]').className;")
            browser.run('location.hash = "chat";')
            check_stop(browser, server, "one")
            browser.ask("POST", "/refresh")
            until(browser, "stopped")
            check_articles(browser, server, "one")
        assert streams(proxy) == ["POST /sessions/one/stream"] + ["GET /sessions/one/stream?after=0"] * 2
        assert server.stats()["total_requests"] == 1

    @waits
    def test_a_second_window_notices_a_turn_and_follows_it_by_get(self, serve, browser):
        server, session = serve(*CALM), new_id()
        with Proxy(server.address) as proxy, opened(browser, proxy.url, f"/demo?session={session}", ["network"]):
            first = browser.ask("GET", "/window")
            with browser.tab("window") as second:
                browser.open(f"{proxy.url}/demo?session={session}")
                until(browser, "idle")
                server.turn(SPACED, session_id=session)
                browser.wait(f"{HURRY} && ({ARTICLES}).length === 2")
                browser.show(first)
                send(browser, LONG)
                browser.show(second)
                browser.wait(f"{HURRY} && {STATE} === 'streaming' && ({ARTICLES})[2]?.[1] === args[0]", LONG)
                until_longer(browser)
                proxy.down()
                proxy.up()
                until_longer(browser)
                browser.wait(f"{NOTICE}.includes('Nothing is missing')")
                assert wait_until(lambda: server.readers(session) == [2])   # the first one may pause before a try
                check_stop(browser, server, session)
                browser.show(first)
                until(browser, "stopped")
                browser.wait(f"{HURRY} && ({ARTICLES}).length === 4")     # with what was said while it was hidden
                check_articles(browser, server, session)
        posts = [line.split()[0] for line in streams(proxy)].count("POST")
        assert 2 <= posts <= 3, "the second window only follows; the first one may need another try"

    @waits
    def test_other_clients_and_other_sessions_go_on(self, serve, browser):
        server, session = serve(*INSTANT), new_id()
        with Proxy(server.address) as proxy, opened(browser, proxy.url, f"/demo?session={session}", ["network"]):
            until(browser, "idle")
            say(browser, "One")
            away = Fault(instead=refusal(503))
            proxy.fault_of = lambda line: away if line.startswith("GET /sessions ") else Fault()
            server.turn("Two", session_id=session)
            say(browser, "Three")
            proxy.fault_of = lambda line: Fault()
            browser.wait(f"{HURRY} && ({ARTICLES}).length === 6")
            check_articles(browser, server, session)
            browser.run("window.requestAnimationFrame = () => 1;")      # the page misses the frames of its answer
            send(browser, "Four")
            assert wait_until(lambda: len(server.history(session)) == 8)
            server.turn("Five", session_id=session)
            browser.wait(f"{HURRY} && ({ARTICLES}).length === 10")
            assert browser.run(f"return {ARTICLES};")[7][1] == server.history(session)[7][1]

        server = serve(*CALM)
        server.turn(SPACED, session_id="two")
        with opened(browser, url_of(server), "/demo?session=one"):
            send(browser, LONG)
            until(browser, "streaming")
            browser.click("[data-id=two]")
            until(browser, "complete")
            check_articles(browser, server, "two")
            browser.click("[data-id=one]")
            browser.wait(f"({ARTICLES})[1]?.[1].length > 100 && {STATE} === 'streaming'")
            assert server.readers("one") == [1]
            check_stop(browser, server, "one")

    @waits
    def test_a_server_that_was_away_is_found_again(self, serve, browser):
        server, session = serve(*CALM), new_id()
        with Proxy(server.address) as proxy, opened(browser, proxy.url, f"/demo?session={session}", ["network"]):
            until(browser, "idle")
            proxy.down()
            browser.wait(f"{HURRY} && {STATE} === 'away'")
            send(browser, TEXT)
            browser.wait(f"({ARTICLES}).length === 2")
            until(browser, "away")
            proxy.up()
            until(browser, "complete")
            send(browser, LONG)
            for _ in range(3):
                until_longer(browser)
                proxy.down()
                browser.wait(f"['cut', 'away'].includes({STATE})")
                proxy.up()
                until(browser, "streaming")
                assert "resumed. Nothing is missing." in browser.run(f"return {NOTICE};")
            check_stop(browser, server, session)
            assert len(server.history(session)) == 4
            say(browser, TEXT)
            assert not browser.run(f"return {NOTICE};")

    @cases([("alone", lambda server: Proxy(server.address)), ("one of many", one_of_many)])
    @waits
    def test_a_killed_server_runs_the_turn_again_when_it_is_back(self, serve, browser, case):
        _, proxy_to = case
        with tempfile.TemporaryDirectory() as folder:
            flags = ("--log", "off", "--db", folder + "/chat.db", "--chunk-delay")
            before = serve(*flags, "0.2")
            with proxy_to(before) as proxy, opened(browser, proxy.url, "/demo?session=one", ["network"]):
                say(browser, "Hi")
                send(browser, LONG)
                until_longer(browser, 30)
                before.process.kill()
                before.process.wait(PATIENCE)
                after = serve(*flags, "0")
                proxy.target = after.address
                until(browser, "complete")
                check_articles(browser, after, "one")
                assert "another run" in browser.run(f"return {NOTICE};") and len(after.history("one")) == 4

    @waits
    def test_a_server_that_lost_its_memory_says_which_messages_are_gone(self, serve, browser):
        before, after = serve(*CALM), serve(*CALM)
        with Proxy(before.address) as proxy, opened(browser, proxy.url, "/demo?session=one", ["network"]):
            say(browser, "Hi")
            send(browser, LONG)
            until_longer(browser)
            proxy.down()
            proxy.target = after.address
            proxy.up()
            browser.wait(f"{NOTICE}.includes('another run')")
            until(browser, "streaming")
            browser.click("#stop")
            until(browser, "stopped")
            told = [list(message) for message in after.history("one")]
            assert browser.run(f"return {ARTICLES};")[2:] == told
            assert "no longer has the messages above" in seen(browser, "#log > .end")[0]
            after.request("DELETE", "/sessions/one")
            browser.wait(f"{HURRY} && document.querySelectorAll('#log > .end').length === 2")
            say(browser, "Again")
            assert browser.run(f"return {ARTICLES};")[4:] == [list(message) for message in after.history("one")]


# ---- The page's other views, its safety, and what it does for everyone

QUOTES = "it's \"quoted\" $HOME `id` !! \\n \\ %s *\n\ttab \x7f caf\u00e9 \U0001f600 \u2028 ' '' <&>"
WIRE = """
return Array.from(document.querySelectorAll("#lines .line:not(.head)"), ({dataset, textContent: text}) =>
  [dataset.type, ...[[0, 8], [9, 17], [18, 29]].map(cell => text.slice(...cell).trim()), text.slice(31)]);
"""
RAW = """       // what was received, without the times before it
return Array.from(document.querySelectorAll(args[0]),
  line => line.textContent.slice(line.firstChild.textContent.length));
"""
WIRE_IS_WHOLE = '[...document.querySelectorAll("#lines .line:not([data-type=ping])")].at(-1).dataset.type === "note"'
USABLE = """
["drop", "resume", "again", "curl"].filter(id => !document.getElementById(id).disabled).join(" ") === args[0]
"""
TICKS = """     // where each of these lines stands on the time axis
return Array.from(document.querySelectorAll(`#picture [data-type=${args[0]}]`), path => path.getAttribute("d"))
  .join("").split("M").slice(1).map(parseFloat);
"""
CURL_TOKEN = {"STREAMCHAT_TOKEN": TOKEN}


class TestThePageShowsTheWire:
    """README, "Demo page": each line of a stream as it came, and what recovery does, at the press of a button."""

    @waits
    def test_each_line_is_shown_as_it_came(self, serve, browser):
        server = serve("--heartbeat", "0.05", "--log", "off")
        with visited(browser, server, "wire") as session:
            say(browser, TEXT)
            browser.wait(WIRE_IS_WHOLE)
            rows, ticks = browser.run(WIRE), browser.run(TICKS, "chunk")
            facts = browser.run('return document.querySelector("#wire-facts").innerText')
        kinds, since, gaps, sizes, raws = zip(*rows, strict=True)
        lines = [raw for kind, raw in zip(kinds, raws, strict=True) if kind in EVENTS and kind != "ping"]
        assert "".join(line + "\n" for line in lines).encode() == b"".join(server.follow(session).read().lines)
        assert kinds[:2] == ("request", "response") and "ping" in kinds
        first, body = raws[0].split("\n")
        assert first == f"POST /sessions/{session}/stream HTTP/1.1" and json.loads(body)["message"] == TEXT
        assert raws[1].startswith("HTTP 200 OK\n") and "\ncontent-type: application/x-ndjson" in raws[1]
        lengths = [len(raw) + 1 if kind in EVENTS else 0 for kind, raw in zip(kinds, raws, strict=True)]
        assert list(sizes) == [f"{length} ({length:x})" if length else "" for length in lengths]
        assert f" {sum(lengths):,} bytes" in facts
        self.check_times(kinds, [float(time) for time in since], gaps, facts, ticks)

    def check_times(self, kinds, since, gaps, facts, ticks):
        for (earlier, later), gap in zip(itertools.pairwise(since), gaps[1:], strict=True):
            assert abs(float(gap) - (later - earlier)) < 0.002
        chunks = [time for kind, time in zip(kinds, since, strict=True) if kind == "chunk"]
        assert all(time >= 0.1 * number for number, time in enumerate(chunks)), "earlier than the pace allows"
        gaps = [later - earlier for earlier, later in itertools.pairwise(chunks)]
        first, longest = re.search(     # a busy browser reads all chunks at once: no gap
            r"first chunk after (\S+) s .*?(?:, (\S+) s \(longest\)|$)", facts).groups("0")
        assert float(first) == chunks[0] and abs(float(longest) - max(gaps)) < 0.002
        assert all(abs(tick / 1000 - time) < 0.002 for tick, time in zip(ticks, chunks, strict=True))

    @waits
    def test_a_connection_is_dropped_and_resumed_and_a_turn_sent_again(self, serve, browser):
        server = serve("--chunk-delay", "0.05", "--heartbeat", "0.1", "--log", "off")
        with visited(browser, server, "wire") as session:
            browser.wait(USABLE, "")
            send(browser, LONG)
            browser.wait('document.querySelectorAll("#lines [data-type=chunk]").length > 5')
            browser.wait(USABLE, "drop again curl")
            browser.click("#drop")
            until(browser, "dropped")
            browser.wait(USABLE, "resume again curl")
            assert wait_until(lambda: server.readers(session) == [0]), "the page is a reader still, or the turn ended"
            browser.click("#resume")
            until_longer(browser)
            assert "Nothing is missing" in browser.run(f"return {NOTICE};")
            assert server.readers(session) == [1]
            assert len(browser.run(TICKS, "cut")) == 1
            chunks = [raw for kind, *_, raw in browser.run(WIRE) if kind == "chunk"]
            assert len(set(chunks)) == len(chunks), "a chunk came twice"
            browser.click("#again")
            browser.wait('document.querySelectorAll("#lines [data-type=session_info]").length === 3')
            browser.click("#stop")
            until(browser, "stopped")
            browser.wait(USABLE, "resume again curl")
            history = server.history(session)
            assert history == [("user", LONG), ("model", answer_shown(browser))]
            browser.click("#again")
            browser.wait(f'document.querySelectorAll("#lines [data-type=complete]").length === 2 && {WIRE_IS_WHOLE}')
            assert server.history(session) == history and answer_shown(browser) == history[1][1]
            asked = [raw.split(" HTTP/1.1")[0] for kind, *_, raw in browser.run(WIRE) if kind == "request"]
        assert asked[:1] + asked[2:] == [f"POST /sessions/{session}/stream"] * 3
        assert int(asked[1].removeprefix(f"GET /sessions/{session}/stream?after=")) > 5
        assert server.stats()["total_requests"] == 1


TRY = """
const [id, change, wait] = args, box = document.getElementById(id);
const soon = () => new Promise(then => setTimeout(then, 5));
box.open = true;
while (!box.querySelector("form")) await soon();
const form = box.querySelector("form"), {request} = form.elements;
request.value = change(request.value);
form.dispatchEvent(new Event("input", {bubbles: true}));
form.querySelector(".try").click();
while (wait && form.querySelector(".try").disabled) await soon();
return ["status", "headers", "body"].map(name => form.querySelector(".answer > ." + name)?.innerText ?? "");
"""


def try_out(browser, operation, session="", body=None, wait=True):
    """Send the request as the page has it, with this session, and with this body where it has one."""
    change = """text => {
      const [head, old] = text.replace("{session_id}", SESSION).split("\\n\\n");
      return old === undefined ? head : head + "\\n\\n" + (BODY ?? old);
    }""".replace("SESSION", json.dumps(session)).replace("BODY", json.dumps(body))
    return browser.run(TRY.replace("change(", f"({change})("), operation, None, wait)


API_SHOWN = """
return Array.from(document.querySelector("#api").children, box => box.matches("h2") ? box.textContent : [
  box.id, box.querySelector("summary").innerText,
  Array.from(box.querySelectorAll(".docs td:first-child"), cell => cell.textContent)]);
"""


def resolved(api, schema):
    """The schema itself, or that to which it refers."""
    place = api if "$ref" in schema else schema
    for name in schema.get("$ref", "").split("/")[1:]:
        place = place[name]
    return place


def operations(api):
    """Each with its group and the id that it has in the page, in the page's order."""
    found = [(operation["tags"][0], re.sub("[^a-z0-9]+", "-", f"{method} {path}").strip("-"), operation)
             for path, item in api["paths"].items() for method, operation in item.items()]
    groups = list(dict.fromkeys(group for group, *_ in found))
    return sorted(found, key=lambda each: groups.index(each[0]))

def names_to_show(api, operation):
    """Of its parameters, the fields of its body and the events of its stream."""
    names = [each["name"] for each in operation["parameters"]]
    for media in operation.get("requestBody", {}).get("content", {}).values():
        names += resolved(api, media["schema"])["properties"]
    for media in operation["responses"]["200"].get("content", {}).values():
        events = resolved(api, media["itemSchema"])["oneOf"] if "itemSchema" in media else []
        names += [event["$ref"].rpartition("/")[2] for event in events]
    return names


class TestThePageShowsTheApi:
    """README, "Demo page": the operations of /openapi.json, each to be tried."""

    @waits
    def test_every_operation_has_its_fields_an_address_and_a_request_to_edit(self, serve, browser):
        server = serve("--log", "off")
        api = server.get("/openapi.json")
        opened_at = 'document.activeElement.closest(".operation[open]").id === location.hash.slice(1)' \
                    " && location.hash.slice(1) === args[0]"
        is_seen = "const {top, bottom} = document.activeElement.getBoundingClientRect(); " \
                  "return top >= 0 && bottom <= innerHeight;"
        with opened(browser, url_of(server), "/docs#get-openapi-json"):
            browser.wait(opened_at, "get-openapi-json")
            assert browser.run(is_seen)
            browser.click("#post-chat-stream summary")
            browser.wait("location.hash === '#post-chat-stream'")
            assert browser.run(TEXTS, "nav [aria-current=page]") == ["API"]
            assert not browser.run(TEXTS, "summary a")
            browser.run('for (const box of document.querySelectorAll(".operation")) box.open = true;')
            browser.wait('document.querySelectorAll(".operation .docs").length === args[0]', len(operations(api)))
            shown = iter(browser.run(API_SHOWN))
        for group, members in itertools.groupby(operations(api), lambda each: each[0]):
            assert next(shown) == group
            for (_, name, operation), (shown_name, summary, cells) in zip(members, shown, strict=False):
                assert shown_name == name and operation["summary"] in summary
                assert cells == names_to_show(api, operation)
        assert not list(shown)
        server, session = serve("--log", "off"), new_id()
        with opened(browser, url_of(server), "/docs", ["network"]):
            browser.wait('document.querySelector("#post-chat-stream")')
            for body, code in [('{"message": "Hi",}', "invalid_json"), ("", "invalid_json"), ("{}", "invalid_field")]:
                status, headers, shown = try_out(browser, "post-chat-stream", body=body)
                assert headers.startswith("HTTP 400 Bad Request\n") and "application/problem+json" in headers
                assert status and json.loads(shown)["code"] == code
            body = json.dumps({"message": LONG, "session_id": session})
            try_out(browser, "post-chat-stream", body=body, wait=False)
            browser.wait('document.querySelectorAll("#post-chat-stream [data-type=chunk]").length > 2')
            assert server.readers(session) == [1]
            browser.click("#post-chat-stream .abort")
            browser.wait('!document.querySelector("#post-chat-stream .try").disabled')
            assert browser.run(TEXTS, "#post-chat-stream .status")[0].startswith("Aborted after")
            assert wait_until(lambda: server.readers(session) == [0]), "the page is a reader still, or the turn ended"

    @waits
    def test_every_operation_can_be_tried_and_its_curl_line_does_the_same(self, serve, browser):
        needs("curl")
        server, session = serve("--token", TOKEN, *INSTANT), new_id()
        turn = json.dumps({"message": QUOTES, "session_id": session, "turn_id": "t-1"}, ensure_ascii=False)
        all_of_them = sorted(operations(server.get("/openapi.json")), key=lambda each: each[1].startswith("delete"))
        with opened(browser, url_of(server), "/docs"):
            browser.run('sessionStorage.setItem("token", args[0]);', TOKEN)
            browser.ask("POST", "/refresh")
            browser.wait('document.querySelector("#api > .operation")')
            for _, name, _ in all_of_them:
                body = turn if re.fullmatch("post-.*-stream", name) else "{\t}"
                status, headers, body = try_out(browser, name, session, body)
                assert re.fullmatch(r"Head after \d+\.\d{3} s, all after \d+\.\d{3} s", status), name
                assert re.search("(?si)^HTTP 200 OK\n.*content-type: .*(json|html)", headers), name
                box = f"#{name}"
                assert TOKEN not in browser.run(TEXTS, box)[0]
                if name.startswith("delete"):
                    server.request("POST", "/sessions/new", {"session_id": session})
                line = browser.run(COPY, box + " .copy")
                printed = run(["sh", "-c", line], None, CURL_TOKEN)
                assert TOKEN not in line
                if lines := browser.run(RAW, box + " .answer .line"):
                    assert printed.splitlines() == lines and json.loads(lines[-1])["type"] == "complete"
                elif "html" in headers:
                    assert [printed] == browser.run(TEXTS, box + " .answer > .body")
                else:
                    assert json.loads(printed).keys() == json.loads(body).keys()
        assert server.stats()["total_requests"] == 1, "the curl line is a retry"
        for flags in ((), ("--token", TOKEN)):
            server, session = serve(*INSTANT, *flags), new_id()
            with opened(browser, url_of(server), excused=["network"]):      # it asks for the token
                browser.run('sessionStorage.setItem("token", args[0]);', TOKEN if flags else "")
                browser.open(f"{url_of(server)}/demo?session={session}#wire")
                until(browser, "idle")
                say(browser, QUOTES)
                line = browser.run(COPY, "#curl")
            history = server.history(session)
            assert history[0] == ("user", QUOTES) and line.isascii() and TOKEN not in line
            assert ("$STREAMCHAT_TOKEN" in line) is bool(flags)
            printed = run(["sh", "-c", line], None, CURL_TOKEN)
            assert printed.encode() == b"".join(server.follow(session).read().lines)
            assert server.history(session) == history, "the line is a retry of the turn"

    @waits
    def test_the_page_works_below_a_path_of_a_proxy(self, serve, browser):
        server = serve(*INSTANT)
        below = [("location / {", "location /ai/ {"), ("proxy_pass http://chat;", "proxy_pass http://chat/;")]
        with nginx(server, *below) as address:
            url = "http://{}:{}/ai".format(*address)
            with opened(browser, url, "/docs"):
                browser.wait('document.querySelector("#api .operation")?.checkVisibility()')
                _, head, _ = try_out(browser, "get-health")
                assert head.startswith("HTTP 200 OK")
                assert "/ai/health'" in browser.run(TEXTS, "#get-health .curl")[0]
            with opened(browser, url, "/demo?session=one"):
                say(browser, TEXT)
                check_articles(browser, server, "one")
            with chatting(url, "--session", "one") as chat:
                assert url + "/docs" in chat.enter("/docs")


RAN = "window.ran = 1"
HOSTILE_TEXT = "\n".join([
    f'<img src=x onerror="{RAN}">', f"</script><script>{RAN}</script>", f"</div></article><svg onload='{RAN}'>",
    "<iframe srcdoc='<script>top.ran = 1</script>'>", f"javascript:{RAN}", f"[link](javascript:{RAN})",
    "<!-- </style> --> &lt;b&gt; &amp; &#60;", "a\u202eb \u2066c \u200fd\u061c \u2029e \x85f",
    "\\u0000 \x00 \x07 \x1b[31m \x7f \ufffe", "x" * 10_000, "\U0001f600" * 2000,
    f"```<img src=x onerror={RAN}>", f"</pre><script>{RAN}</script>" + "y" * 5000, "```",
])
MADE_OF = {             # a place in the page, and the elements in it
    "#log": "article h3 div p span pre button", "#lines": "div span", "#sessions": "li button span small",
    "#title": "span",
    "#server": "", "#wire-facts": "", "#state": "", "#progress": "", "#told": "",
}
ELEMENTS = 'return Array.from(document.querySelectorAll(args[0] + " *"), element => element.localName);'
MISFITS = """       // what is wider than its box, or not wholly in the window
const short = ".one-line, textarea, input", scrolling = ".code pre";
return Array.from(document.querySelectorAll("html, body, body *")).filter(element => {
  if (!element.checkVisibility() || element.matches(short) || element.closest("svg")) return false;
  const {clientWidth, scrollWidth} = element, {left, right} = element.getBoundingClientRect();
  return clientWidth && scrollWidth > clientWidth + 1 && !element.matches(scrolling)
         || (left < -1 || right > innerWidth + 1) && !element.closest(scrolling);
}).map(({localName, id, className}) => [localName, id, className]);
"""
FRAMING = b'<!DOCTYPE html><link rel="icon" href="data:,"><iframe src="/demo"></iframe>'
ATTEMPTS = """
const [there, count] = args, refused = [], add = (name, fields, text = "") => {
  const element = document.createElement(name);
  for (const [field, value] of Object.entries(fields)) element.setAttribute(field, value);
  element.append(text);
  document.body.append(element);
  return element;
};
document.addEventListener("securitypolicyviolation", event => refused.push(event.effectiveDirective));
for (const attempt of [
  () => eval("window.ran = 1"),
  () => { document.body.innerHTML = "<b>HTML</b>"; },
  () => add("button", {onclick: "window.ran = 1"}).click(),
  () => add("script", {}, "window.ran = 1"),
  () => add("script", {src: "/demo"}),
  () => add("a", {href: "javascript:window.ran = 1"}).click(),
  () => add("style", {}, "* { color: red }"),
  () => add("p", {style: "color: red"}),
  () => add("img", {src: there}),
  () => add("iframe", {src: there}),
  () => fetch(there),
  () => navigator.sendBeacon(there),
  () => add("form", {action: there}).submit(),
  () => add("base", {href: there}),
]) setTimeout(attempt);     // what the driver itself runs is free
for (let tries = 0; refused.length < count && tries < 100; tries++) await new Promise(then => setTimeout(then, 50));
return [window.ran, refused.sort()];
"""
REFUSED = sorted([*["require-trusted-types-for"] * 5, "script-src-elem", "style-src-elem", "style-src-attr", "img-src",
                  "frame-src", "connect-src", "connect-src", "form-action", "base-uri"])


def resize(browser, width):
    browser.cdp("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

def check_harmless(browser):
    """Nothing ran, no element was made of data, and nothing leaves its box, also where there is little room."""
    resize(browser, 320)
    for view in ("chat", "wire"):
        browser.run("location.hash = args[0];", view)
        browser.wait("document.getElementById(args[0]).checkVisibility()", view)
        if view == "wire":
            browser.wait('document.querySelector("#lines .line:not(.head)")')
        assert not browser.run(MISFITS), view
    for place, names in MADE_OF.items():
        assert set(browser.run(ELEMENTS, place)) <= set(names.split()), place
    assert browser.run("return window.ran;") is None


class TestThePageIsSafe:
    """README, "Demo page": what comes from outside is text. It never runs, and is never HTML."""

    @waits
    def test_hostile_texts_streams_and_sessions_are_shown_as_they_are(self, serve, browser):
        server = serve(*INSTANT)
        with visited(browser, server) as session:
            for _ in range(2):      # one of them is in the history alone
                server.turn(HOSTILE_TEXT, session_id=session)
            browser.ask("POST", "/refresh")
            until(browser, "complete")
            say(browser, HOSTILE_TEXT)
            texts = [text for _, text in server.history(session)]
            assert len(texts) == 6 and browser.run(TEXTS, "#log > article > .text") == texts
            check_harmless(browser)

        lines = [{"type": "session_info", "model": HOSTILE_TEXT}, {"type": "status", "message": HOSTILE_TEXT},
                 {"type": HOSTILE_TEXT}, {"type": "constructor", HOSTILE_TEXT: 1}, {"type": "__proto__"},
                 {"type": "chunk", "text": HOSTILE_TEXT, "chunk_number": 1}]
        end = {"type": "complete", "finish_reason": "constructor", "total_chunks": 1, "processing_time": 1,
               "message_count": 0, "usage": {"total_tokens": HOSTILE_TEXT}}
        error = {"type": "error", "code": HOSTILE_TEXT, "message": HOSTILE_TEXT}
        with visited(browser, serve("--log", "off")):
            browser.run(PLAYED, [[[*lines, end]], [[*lines, error]]])
            assert browser.run(TEXTS, "#log > article > .text") == ["Hi", HOSTILE_TEXT] * 2
            ends = browser.run(TEXTS, "#log > article > .end")
            assert "function" not in ends[0], "a name that objects inherit"
            assert HOSTILE_TEXT in ends[1]
            check_harmless(browser)
            assert error in map(json.loads, browser.run(RAW, "#lines [data-type=error]"))

        forged = HOSTILE_TEXT.replace("\n", " ")
        fields = ("session_id", "model", "created_at", "last_activity")
        session = {**dict.fromkeys(fields, forged), "message_count": 2}
        messages = [{"role": role, "text": HOSTILE_TEXT, "timestamp": forged, "turn_id": forged}
                    for role in (forged, "model")]
        answers = {"/": {"model": forged},
                   "/sessions": {"sessions": [session, {**session, "session_id": "s-1"}]},
                   "/sessions/s-1": {**session, "messages": messages, "latest_turn": None}}
        pages = {path: ("application/json", json.dumps(answer).encode()) for path, answer in answers.items()}
        refused = Fault(instead=refusal(418, body=json.dumps({"detail": HOSTILE_TEXT, "code": forged}).encode()))
        with Site(serve("--log", "off").address, pages, [refused]) as site, \
                opened(browser, site.url, "/demo?session=s-1", ["network"]):
            browser.wait('document.querySelectorAll("#log > article").length === 2')
            browser.wait('document.querySelector("#server").textContent === args[0]', f"Model: {forged}")
            browser.wait(f"{NAMES}.some(name => name.startsWith('s-1 <img'))")
            send(browser, "Hi")
            browser.wait("document.querySelector('.failed')?.textContent.endsWith(args[0])", HOSTILE_TEXT)
            assert browser.run(TEXTS, "#log > article > .text") == [HOSTILE_TEXT, HOSTILE_TEXT, "Hi", ""]
            check_harmless(browser)

    def test_the_policy_names_this_script_and_this_style_and_no_other_source(self, fast):
        """Content Security Policy Level 3."""
        page = fast.request("GET", "/demo")
        if page.status == 404:
            pytest.skip("demo.html is not beside the server")
        policy = dict(directive.split(" ", 1) for directive in page.headers["content-security-policy"].split("; "))
        for tag in ("script", "style"):
            [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", page.body.decode(), re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
        assert policy == {
            "default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'",
            "form-action": "'none'", "frame-ancestors": "'none'", "require-trusted-types-for": "'script'",
            "trusted-types": "'none'"}
        assert fast.request("GET", "/docs").body == page.body
        assert len(page.body) < 55 << 10

    @waits
    def test_the_browser_refuses_what_the_policy_forbids(self, serve, browser):
        server = serve("--log", "off")
        with Proxy(server.address) as there, Site(server.address, {"/": ("text/html", FRAMING)}) as site:
            browser.open(url_of(server) + "/demo")
            assert browser.run(ATTEMPTS, there.url, len(REFUSED)) == [None, REFUSED]
            assert not there.requests
            browser.open(site.url + "/")
            assert browser.run('return document.querySelector("iframe").contentDocument;') is None
            assert any("frame-ancestors 'none'" in entry["message"] for entry in browser.console())


CONTRASTS = """     // of the texts that are seen (WCAG 2.2, section 1.4.3); a button that can't be used needs none
const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
const light = colour => numbers(colour).slice(0, 3).map(n => n / 255)
  .reduce((sum, n, at) => sum + [.2126, .7152, .0722][at] * (n <= .04045 ? n / 12.92 : ((n + .055) / 1.055) ** 2.4), 0);
const clear = style => numbers(style.backgroundColor)[3] === 0;
const behind = element => clear(getComputedStyle(element)) ? behind(element.parentElement) : getComputedStyle(element);
const contrast = (element, pseudo) => {
  const colours = [getComputedStyle(element, pseudo).color, behind(element).backgroundColor];
  const [dark, bright] = colours.map(light).sort((a, b) => a - b);
  return [element.outerHTML.slice(0, 100), (bright + .05) / (dark + .05)];
};
const speaks = element => Array.from(element.childNodes).some(node => node.nodeType === 3 && node.data.trim());
const seen = Array.from(document.querySelectorAll("body *")).filter(element => element.checkVisibility());
return [...seen.filter(element => speaks(element) || element.matches(".copy"))
              .filter(element => !element.matches(":disabled, .fence")).map(element => contrast(element)),
        ...seen.filter(element => element.placeholder).map(element => contrast(element, "::placeholder"))];
"""
CONTROLS = "a, button, input, textarea, summary, [tabindex='0']"
FOCUSES = """       // which element gets the focus, and whether that is seen
window.focuses = new Map();
document.addEventListener("focusin", ({target}) => {
  const {outlineStyle, outlineWidth} = getComputedStyle(target);
  focuses.set(target, outlineStyle !== "none" && parseFloat(outlineWidth) >= 1);
});
document.activeElement.blur();
return document.querySelectorAll(args[0]).length;
"""
UNREACHED = """
return Array.from(document.querySelectorAll(args[0]))
  .filter(element => element.checkVisibility() && !element.disabled && !focuses.get(element))
  .map(element => element.outerHTML.slice(0, 100));
"""
NAMED = {"button", "link", "textbox", "DisclosureTriangle", "dialog", "log", "image", "region", "navigation"}
CODE = f"Look:\n```py\n{'x' * 300} = 1\n```\n{'word ' * 60}\n"


def views(browser):
    """Go to each view, which shows as much as it can."""
    if not browser.run(f"return {ARTICLES};"):
        say(browser, CODE)
    yield "chat"
    browser.run('location.hash = "wire";')
    browser.wait(WIRE_IS_WHOLE)
    yield "wire"
    browser.run('location.hash = "api";')
    browser.wait('document.querySelector("#api > .operation")')
    browser.run('for (const box of document.querySelectorAll(".operation")) box.open = true;')
    browser.wait('document.querySelector("#api > :last-child .docs")')
    try_out(browser, "post-chat-stream", body='{"message": "' + "x" * 500 + '"}')
    try_out(browser, "get-stats")
    yield "api"


def nameless(browser):
    """The roles of what a screen reader meets and has no name for."""
    met = [node for node in browser.cdp("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = [node["role"]["value"] for node in met if node.get("name", {}).get("value", "").strip()]
    assert "button" in named
    return Counter(node["role"]["value"] for node in met if node["role"]["value"] in NAMED) - Counter(named)


def emulate(browser, feature, value):
    browser.cdp("Emulation.setEmulatedMedia", features=[{"name": feature, "value": value}])

PRINTED = """       // what a printer would not get: a box that cuts off a part of its content, or is not shown
const all = document.querySelectorAll("#log, #log *, main, body, section:not([hidden])");
return Array.from(all).filter(element => {
  const {overflowX, overflowY} = getComputedStyle(element), {scrollHeight, clientHeight} = element;
  return !element.closest("button, section[hidden]") && (!element.checkVisibility()
         || [overflowX, overflowY].some(each => each !== "visible") && scrollHeight > clientHeight + 1);
}).map(({localName, id, className}) => [localName, id, className]);
"""


class TestThePageIsForEveryone:
    """README, "Demo page": any width, light and dark, on paper, with or without a mouse, eyes and patience."""

    @waits
    def test_it_fits_each_width_and_its_colours_follow_the_scheme(self, serve, browser):
        background = "return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number);"
        tick = "return getComputedStyle(document.querySelector('#picture [data-type=chunk]')).stroke;"
        left = "return ['#message', args[0]].map(css => document.querySelector(css).getBoundingClientRect().x);"
        edges = {"chat": ANSWER + " > .text", "wire": "#picture"}
        with visited(browser, serve(*INSTANT)):
            for view in views(browser):
                for width in (320, 768, 1440):
                    resize(browser, width)
                    assert not browser.run(MISFITS), (view, width)
                    if view in edges:
                        assert len({*browser.run(left, edges[view])}) == 1, (view, width)
                strokes = set()
                for scheme in ("light", "dark"):
                    emulate(browser, "prefers-color-scheme", scheme)
                    ratios = browser.run(CONTRASTS)
                    assert len(ratios) > 10 and not [each for each in ratios if each[1] < 4.5], (view, scheme)
                    assert (max(browser.run(background)) < 100) is (scheme == "dark")
                    strokes.add(browser.run(tick) if view == "wire" else scheme)
                assert len(strokes) == 2

    @waits
    def test_each_control_has_a_name_and_is_reached_by_tab_and_then_seen(self, serve, browser):
        with visited(browser, serve(*INSTANT)):
            for view in views(browser):
                browser.wait(f"{NAMES}.length === 1 && {NAMES}[0].includes('Look')")    # it is drawn no more
                assert not nameless(browser), view
                # A few more: a control may appear meanwhile, and the browser itself may be a stop on the way.
                browser.keys(TAB * (browser.run(FOCUSES, CONTROLS) + 4))
                assert not browser.run(UNREACHED, CONTROLS), view

    @waits
    def test_the_whole_conversation_is_printed(self, serve, browser):
        server = serve(*INSTANT)
        with visited(browser, server) as session:
            for _ in range(3):
                server.turn("line\n" * 60, session_id=session)
            browser.wait(f"{HURRY} && ({ARTICLES}).length === 6")
            assert browser.run(PRINTED)
            pages = base64.b64decode(browser.cdp("Page.printToPDF")["data"])
            assert len(re.findall(rb"/Type\s*/Page\b", pages)) > 5
            emulate(browser, "prefers-color-scheme", "dark")
            browser.cdp("Emulation.setEmulatedMedia", media="print")
            assert not browser.run(PRINTED)


# ---- Chaos: STREAMCHAT_CHAOS=SECONDS or SECONDS:SEED. More than 4 s are a long run, with more clients and cases.

CHAOS_SECONDS, _, CHAOS_SEED = os.environ.get("STREAMCHAT_CHAOS", "2").partition(":")
LONG_RUN = float(CHAOS_SECONDS) > 4
SOON_OVER = ("--chunk-delay", "0.005", "--resume-window", "0.3", "--heartbeat", "0.2", "--log", "off")
SHARED = ["shared-1", "shared-2", "shared-3"]
TURN_IDS = [f"turn-{number}" for number in range(40)]      # few, so that clients repeat and contradict each other
DEEDS = [               # how often, a method of ChaosClient, and how
    (6, "stream", {}), (2, "stream", {"half_close": True}), (6, "stream", {"copies": 3}),
    (3, "stream", {"cut_after": 0}), (10, "cut", {}), (6, "resume", {}), (6, "stop", {}),
    (2, "forget", {"method": "POST", "path": "/clear"}), (2, "forget", {"method": "DELETE", "path": ""}),
    (6, "look", {}), (3, "rubbish", {}),
]
SLACK = timedelta(seconds=0.05)     # between a server's reading of a clock and its use, another thread may run
MAY_REFUSE = {"session_not_found": 404, "no_turn": 404, "session_busy": 409, "turn_id_reused": 409}
STOPPED = ("cancelled", "session_cleared", "session_deleted")
CHAOS_CASES = {         # not where tries count
    f"case: {name}": (end, text) for name, end, text, requests, _ in MODEL_ENDS
    if (requests == 1 or (LONG_RUN and end != "stop"))}


def text_of(number):
    return f"{number} " + "word " * (300 if number % 10 == 0 else number * 7 % 60)


def text_or_case(number):
    case = random.Random(number).choice(list(CHAOS_CASES)) if number % 2 else "case: slow"
    return case if number % 2 or number % 8 == 2 else text_of(number)


def offline_answer(message, before):
    """How a turn ends that nobody stops, and its text."""
    return "stop", f"You said: {message}\n\nThis is the offline model. {before} messages came before this one."


def gemini_answer(message, before):
    return CHAOS_CASES.get(message, ("stop", f"Message {before + 1}: {message}"))


def whole_turns(messages):
    """A history as {turn_id: (the user's message, the model's)}: whole turns, and no turn twice."""
    turns = {}
    for user, model in zip(messages[::2], messages[1::2], strict=True):
        assert (user["role"], model["role"], user["turn_id"]) == ("user", "model", model["turn_id"]), "half a turn"
        assert user["turn_id"] not in turns, "a turn is there twice"
        turns[user["turn_id"]] = user, model
    return turns


def utc_time(later):
    return (datetime.now(UTC) + later).isoformat(timespec="microseconds")


class Reading(NamedTuple):
    """What one connection read of a stream; no lines where it was cut before the first."""

    session: str
    lines: list
    after: int
    whole: bool         # to the end of the stream
    message: str | None     # None where it was no POST


class ChaosClient:
    """A client that does what chance says. It judges each answer by itself, and keeps what it read for the end."""

    def __init__(self, chaos, number):
        self.chaos, self.server, self.chance = chaos, chaos.server, random.Random(f"{chaos.seed} {number}")
        self.sessions = [*SHARED, f"own-{number}"]

    def act(self):
        end = time.monotonic() + float(CHAOS_SECONDS)
        while time.monotonic() < end:
            [(_, deed, how)] = self.chance.choices(DEEDS, [row[0] for row in DEEDS])
            getattr(self, deed)(self.chance.choice(self.sessions), **how)

    def request(self, session):
        """A turn with a name, now and then with another's message, or a turn without a name."""
        number, named, other = (self.chance.randrange(size) for size in (len(TURN_IDS), 3, 10))
        if not named:
            return {"session_id": session, "message": self.chaos.text(1000 + 100 * other + number)}
        return {"session_id": session, "turn_id": TURN_IDS[number], "message": self.chaos.text(number + (not other))}

    def post(self, request, copies=1, half_close=False, codes="session_busy turn_id_reused", **kind):
        """Send the same POST on so many connections at once, read the answers, and return the last one's lines."""
        session, turn_id = request["session_id"], request.get("turn_id")
        self.chaos.sent.setdefault((session, turn_id), set()).add(request["message"])
        connections = [self.server.connect(**kind) for _ in range(copies)]
        for connection in connections:
            connection.send(chat_request(request))
            if half_close:
                connection.socket.shutdown(socket.SHUT_WR)
        for connection in connections:
            lines = self.read(connection, session, codes, message=request["message"])
        nobody_else = turn_id is None and session not in SHARED
        assert not (nobody_else and lines and b'"cancelled"' in lines[-1]), "cancelled while it was read"
        return lines

    def follow(self, session, after):
        connection = self.server.connect()
        connection.send(http_request("GET", f"/sessions/{session}/stream?after={after}"))
        self.read(connection, session, "session_not_found no_turn", after)

    def read(self, connection, session, codes, after=0, message=None):
        """Read a stream to its end, or to where the connection is cut, and leave by a close or a reset."""
        leave, lines, whole = self.chance.choice((connection.close, connection.abort)), [], False
        try:
            head = connection.read_head()
            if head.status != 200:
                self.check_refusal(Response(*head, b"".join(connection.pieces(head))), codes)
                return lines
            for line in connection.lines(head):
                lines.append(line)
            whole = True
        except Cut as cut:
            assert connection.left == 0, f"the server cut the connection: {cut}"
        finally:
            leave()
        self.chaos.readings.append(Reading(session, lines, after, whole, message))
        return lines

    def ask(self, method, path, body=None):
        """The JSON of an answer; empty where there is no such session."""
        response = self.server.request(method, path, body)
        return response.json if response.status == 200 else self.check_refusal(response, "session_not_found")

    def check_refusal(self, response, codes):
        code = response.json["code"]
        assert code in codes.split(), response
        check_problem(response, MAY_REFUSE[code], code)
        return {}

    def stream(self, session, **kind):
        self.post(self.request(session), **kind)

    def cut(self, session):
        """The connection is lost after any number of bytes; then it resumes after what it has, or retries."""
        request, size, resumes = self.request(session), self.chance.randrange(4000), self.chance.randrange(2)
        lines = self.post(request, cut_after=size)
        if resumes:
            self.follow(session, after=max(len(lines) - 2, 0))
        elif lines and "turn_id" in request and session not in SHARED:
            self.post(request, codes="")                # nobody else can be in its way
        else:
            self.post(request)

    def resume(self, session):
        self.follow(session, after=self.chance.choice((0, 1, self.chance.randrange(90), 999_999_999)))

    def stop(self, session):
        latest = self.ask("GET", f"/sessions/{session}").get("latest_turn") or {}
        name = self.chance.choice((None, "no-turn", latest.get("turn_id")))
        answer = self.ask("POST", f"/sessions/{session}/stop", {"turn_id": name})
        assert not (name == "no-turn" and answer.get("stopped")), "a stop ended another turn than the one named"

    def forget(self, session, method, path):
        sent = utc_time(-SLACK)
        if self.ask(method, f"/sessions/{session}{path}"):
            self.chaos.forgotten[session].append((sent, utc_time(SLACK)))

    def look(self, session):
        stats, told = self.server.stats(), self.ask("GET", f"/sessions/{session}")
        check_balance(stats, stats)
        running = [stream["session_id"] for stream in stats["streams"]]
        assert len(running) == len(set(running)), "two turns at once in a session"
        if told:
            whole_turns(told["messages"])
            assert told["streaming"] == bool(told["latest_turn"] and told["latest_turn"]["state"] == "running")
        assert {told["session_id"] for told in self.server.get("/sessions")["sessions"]} <= {*self.chaos.forgotten}

    def rubbish(self, session):
        noise = "noise", b"\x16" + self.chance.randbytes(300) + b"\r\n\r\n", 400, "bad_request"
        _, raw, status, code = self.chance.choice((noise, self.chance.choice([*BAD_REQUESTS, *BAD_HEADS])))
        connection = self.server.connect()
        with contextlib.suppress(ConnectionError):      # it may be refused before it was sent
            connection.send(raw)
        check_problem(self.server.response(connection), status, code)


class Chaos:
    """Many clients at once at a fresh server, and what must be true when all is over."""

    def __init__(self, server, text, answer, spare=0):
        self.server, self.text, self.answer, self.spare = server, text, answer, spare
        self.seed = CHAOS_SEED or str(random.randrange(10**6))
        self.clients = [ChaosClient(self, number) for number in range(100 if LONG_RUN else 30)]
        self.readings, self.sent = [], {}               # sent: (session, turn_id or None): messages
        # When the clears and deletes of each session were sent and answered, at the widest.
        self.forgotten = {session: [] for client in self.clients for session in client.sessions}

    def run(self):
        print(f"STREAMCHAT_CHAOS={CHAOS_SECONDS}:{self.seed} makes the same choices")
        self.clients[0].stream(SHARED[0])
        time.sleep(0.1)
        threads, descriptors = self.held()
        in_parallel(ChaosClient.act, self.clients, workers=len(self.clients))
        self.check()
        assert wait_until(lambda: self.held()[0] <= threads and self.held()[1] <= descriptors + self.spare), (
            f"{threads} threads and {descriptors} descriptors have become {self.held()}")

    def held(self):
        """How many threads and descriptors the server has; none where there is no /proc."""
        folders = [Path(f"/proc/{self.server.process.pid}", name) for name in ("task", "fd")]
        return [len(os.listdir(folder)) if folder.exists() else 0 for folder in folders]

    def check(self):
        assert wait_until(lambda: not self.server.stats()["streams"]), "a turn runs on that nobody reads"
        assert all(in_parallel(self.has_a_next_turn, self.forgotten)), "busy for ever"
        histories = {session: self.check_history(session) for session in self.forgotten}
        readings = {}
        for reading in self.readings:
            readings.setdefault(b"".join(reading.lines[:1]), []).append(reading)
        unseen = readings.pop(b"", [])
        assert not any(reading.whole for reading in unseen), "a stream without lines"
        turns = []
        for same in readings.values():
            if turn := self.check_run(same):
                turns.append(turn)
                self.check_answer(turn, {reading.message for reading in same} - {None}, histories[same[0].session])
        self.check_totals(turns, len(unseen) + len(readings) - len(turns))

    def has_a_next_turn(self, session):
        return wait_until(lambda: self.clients[0].post({"session_id": session, "message": self.text(1008)}))

    def check_history(self, session):
        """Its turns were sent and not forgotten, and a retry tells each of them again."""
        turns = whole_turns(self.server.session(session)["messages"])
        for number, (turn_id, (user, model)) in enumerate(turns.items()):
            assert user["text"] in self.messages(session, turn_id)
            assert all(sent <= user["timestamp"] for sent, _ in self.forgotten[session]), "forgotten, but there"
            request = {"session_id": session, "turn_id": turn_id, "message": user["text"]}
            again = check_turn(self.clients[0].post(request, codes=""), turn_id=turn_id)
            assert (again.status["context_messages"], again.text) == (2 * number, model["text"])
        return turns

    def messages(self, session, turn_id):
        """What was sent under this id; any id but TURN_IDS was made by the server."""
        return self.sent[session, turn_id if turn_id in TURN_IDS else None]

    def check_run(self, readings):
        """All read the same log, each without the chunks that it left out. The turn, if all of it was read."""
        log = {}
        assert len({reading.message for reading in readings} - {None}) <= 1, "messages that differ share a run"
        rules = {"session_id": readings[0].session, **self.server.pace}
        for line in itertools.chain.from_iterable(reading.lines for reading in readings):
            event = event_of(line)
            log.setdefault(event.get("chunk_number", event["type"]), line)
        last = max((number for number in log if isinstance(number, int)), default=0)
        opening, chunks = [log["session_info"], log.get("status")], [log.get(number + 1) for number in range(last)]
        ends = [log[kind] for kind in ("complete", "error") if kind in log]
        for reading in readings:
            lines = opening + chunks[reading.after:] + ends
            assert reading.lines == (lines if reading.whole else lines[:len(reading.lines)]), "not the same log"
            if reading.whole:
                check_turn(reading.lines, after=reading.after, **rules)
        if None not in chunks and any(reading.whole and reading.after <= last for reading in readings):
            return check_turn(opening + chunks + ends, **rules)
        return None

    def check_answer(self, turn, posted, history):
        """It answers what was posted; complete, it was kept unless forgotten; and to forget ended what ran."""
        session, turn_id, began = (turn.info[name] for name in ("session_id", "turn_id", "timestamp"))
        how, before = turn.end.get("finish_reason", turn.end.get("code")), turn.status["context_messages"]
        messages, forgotten = self.messages(session, turn_id), self.forgotten[session]
        answers = [self.answer(message, before) for message in messages & (posted or messages)]
        begins = any(text.startswith(turn.text) for _, text in answers)
        assert (how, turn.text) in answers or (how in STOPPED and begins), (how, turn.text, answers)
        assert not any(began < sent and answered < turn.end["timestamp"] for sent, answered in forgotten)
        if turn.end.get("message_count", 0) > before and all(answered < began for _, answered in forgotten):
            assert history[turn_id][1]["text"] == turn.text

    def check_totals(self, turns, unknown):
        """Each turn was counted once."""
        numbers = ("session_id", "turn_id", "message_count", "processing_time")
        complete = {tuple(map(turn.end.get, numbers)) for turn in turns if turn.end["type"] == "complete"}
        failed = [turn for turn in turns if turn.end["type"] == "error"]
        known = {"successful": len(complete), "failed": len(failed), "total": len(complete) + len(failed)}
        stats = self.server.stats()
        print(f"{len(self.readings)} readings, {known} turns and {unknown} unknown of {stats['total_requests']}")
        assert (stats["streams"], stats["streaming_connections"]) == ([], 0)
        for name, count in known.items():
            assert count <= stats[f"{name}_requests"] <= count + unknown


@NOT_OURS
class TestChaos:
    """Whatever many clients do at once, turns stay whole, readers see one log, totals balance and nothing leaks."""

    @waits
    def test_with_the_offline_model(self, serve):
        # The server's threads change places so often that what should be one step, and is not, shows.
        switch = "import sys; sys.setswitchinterval(1e-5); sys.setswitchinterval = lambda seconds: None"
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "sitecustomize.py").write_text(switch)
            Chaos(serve(*SOON_OVER, PYTHONPATH=folder), text_of, offline_answer).run()

    @waits
    def test_with_a_model_that_fails(self, serve):
        with gemini_stand_in() as stand_in:
            server = gemini_server(stand_in, "--model", "gemini-test", *SOON_OVER, serve=serve, GEMINI_API_KEY=KEY)
            # google-genai keeps 20 connections; on a slow machine its event loop begins after the first count.
            Chaos(server, text_or_case, gemini_answer, spare=24).run()


# ---- Measure a server

WITHOUT_PYTEST = """
import runpy, sys
sys.modules["pytest"] = None                # who imports it now fails
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
COMMANDS = [sys.executable, "-I", "-c", WITHOUT_PYTEST, __file__]


@NOT_OURS
class TestBench:
    """The command that measures a server, or two in turn."""

    def bench(self, *arguments):
        command = [*COMMANDS, "bench", "--quick", *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=6 * PATIENCE, check=False)

    def figures(self, *servers):
        """Name of a measure: its median for each server, as the table has them."""
        done = self.bench(*map(url_of, servers))
        assert (done.returncode, done.stderr) == (0, ""), done
        rows = [(line[:42].strip(), re.findall(r"([\d.,]+) \(", line)) for line in done.stdout.splitlines()]
        return {name: [float(value.replace(",", "")) for value in values] for name, values in rows if values}

    def test_it_measures_chunks_per_second_with_the_pace_off(self, fast):
        figures = self.figures(fast, fast)
        assert {len(values) for values in figures.values()} == {2}
        assert all(value > 0 for values in figures.values() for value in values), figures
        assert {"requests per second, 1 at once", "chunks per second, 5 at once"} <= set(figures)

    def test_it_measures_how_late_chunks_are_with_the_pace_on(self, server):
        figures = self.figures(server)
        failed = [figures.pop(name) for name in list(figures) if "failed" in name]
        assert failed == [[0.0], [0.0]]
        assert {"chunks late, 10 at once, p99, ms", "first chunk, 10 at once, p50, ms"} <= set(figures)

    def test_a_server_that_is_not_there_is_told_in_one_line(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        done = self.bench(f"http://127.0.0.1:{port}")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done


# ---- Check your own client

WRONG_PROXIES = [
    ("no server named", (), "--to"), ("no such server", ("--to", "http://127.0.0.1:1"), "refused"),
    ("a port out of range in the URL", ("--to", "http://127.0.0.1:99999"), "Port"),
    ("a chance of more than 1", ("--to", "http://127.0.0.1:1", "--cut", "2"), "--cut"),
]


@NOT_OURS
class TestCheckYourOwnClient:
    """README, "Testing a server or a client": the proxy is a command, too. Each fault is what it says."""

    @contextlib.contextmanager
    def command(self, server, *flags):
        """The command in front of a server: its address, and the lines that it prints to its end."""
        command = [*COMMANDS, "proxy", "--to", url_of(server), "--port", "0", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
        printed = []
        try:
            process.stdout.readline()
            yield re.fullmatch(r"Proxy at (http://.*)\n", process.stdout.readline())[1], printed
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=PATIENCE)
            assert (process.returncode, errors) == (0, "")
            printed += rest.splitlines()
        finally:
            process.kill()
            process.wait(PATIENCE)

    def test_the_readmes_client_gets_whole_answers_through_the_command(self, instant, tmp_path):
        with self.command(instant, "--cut", "0.3", "--repeat", "0.3", "--seed", "5") as (url, printed):
            check_turns(instant, [turn[:2] for turn in chat_in_python(url, 10, tmp_path)])
        shown = re.compile(r"[0-9:.]{12}  'POST /sessions/\S+/stream HTTP/1\.1'  (cut|repeat)( after \d+ bytes)?")
        assert {shown.fullmatch(line)[1] for line in printed} == {"cut", "repeat"}

    def test_what_a_client_sends_is_printed_escaped(self, instant):
        with self.command(instant, "--cut", "1", "--split", "--delay", "0.001") as (url, printed):
            connection = Connection((urlsplit(url).hostname, urlsplit(url).port))
            connection.send(b"POST /chat/stream?\x1b[2J\x9b\xff HTTP/1.1\r\n\r\n")
            connection.file.read()
            connection.close()
        assert [line.split("  ")[1] for line in printed] == 2 * [r"'POST /chat/stream?\x1b[2J\x9b\xff HTTP/1.1'"]
        assert printed[0].endswith("delay, split") and "  cut after " in printed[1]

    def refuse(self, *arguments):
        command = [*COMMANDS, "proxy", *arguments]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=PATIENCE, check=False)
        assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr, done
        return done.stderr

    @cases(WRONG_PROXIES)
    def test_what_can_not_work_is_told(self, case):
        _, arguments, told = case
        assert told in self.refuse(*arguments).splitlines()[-1]

    def test_where_it_can_not_listen_is_told_in_one_line(self, instant):
        for port, told in [(instant.address[1], str(instant.address[1])), (65_536, "0-65535")]:
            said = self.refuse("--to", url_of(instant), "--port", str(port))
            assert told in said and said.count("\n") == 1

    def ask(self, proxy):
        """Ask for the stream of a turn; what comes is up to the caller."""
        ids = {"session_id": new_id(), "turn_id": new_id()}
        connection = Connection(proxy.address)
        connection.send(http_request("POST", "/chat/stream", "Connection: close", body={"message": TEXT, **ids}))
        return connection

    @pytest.mark.parametrize("size", [0, 1, 900])
    def test_a_cut_leaves_so_many_bytes(self, instant, size):
        with Proxy(instant.address, [Fault(cut=size)]) as proxy, contextlib.closing(self.ask(proxy)) as connection:
            assert len(connection.file.read()) == size

    def test_a_cut_may_come_before_certain_bytes(self, server):
        fault = Fault(cut=b'"chunk_number":3')
        with Proxy(server.address, [fault]) as proxy, contextlib.closing(self.ask(proxy)) as connection:
            read = connection.file.read()
        assert b'"chunk_number":2' in read and read.endswith(b'",')

    def test_a_reset_is_no_clean_end(self, instant):
        with Proxy(instant.address, [Fault(cut=900, reset=True)]) as proxy:
            connection = self.ask(proxy)
            with pytest.raises(ConnectionResetError):
                connection.file.read()
            connection.close()

    def test_a_stall_leaves_the_connection_open(self, instant):
        with Proxy(instant.address, [Fault(stall=900)]) as proxy:
            with contextlib.closing(self.ask(proxy)) as connection:
                connection.take(900)
                connection.socket.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    connection.socket.recv(1)
            assert wait_until(lambda: not proxy.links), "who leaves is no longer served"

    @cases([("pieces", Fault(delay=0.2), 0.2), ("bytes", Fault(delay=0.0002, split=True), 0.2)])
    def test_a_delay_is_before_each_piece(self, instant, case):
        _, fault, least = case
        with Proxy(instant.address, [fault]) as proxy, contextlib.closing(self.ask(proxy)) as connection:
            began = time.monotonic()
            assert len(connection.file.read()) > 1000
        assert time.monotonic() - began >= least

    def test_a_request_that_is_sent_twice_is_answered_to_the_second(self, instant):
        with Proxy(instant.address) as proxy:
            proxy.fault_of = lambda line: Fault(repeat=True)
            answer = Server(*proxy.address).request("POST", "/sessions/new", {"session_id": new_id()})
        check_problem(answer, 409, "session_exists")

    def test_other_bytes_may_be_the_answer_and_the_server_sees_nothing(self):
        with Proxy(None, [Fault(instead=CANCELLED)]) as proxy, contextlib.closing(self.ask(proxy)) as connection:
            assert connection.file.read() == CANCELLED

    def test_a_connection_is_kept_and_each_answer_has_its_own_fault(self, instant):
        session = new_id()
        with Proxy(instant.address, [Fault(split=True), Fault(cut=900)]) as proxy:
            connection = Connection(proxy.address)
            connection.send(http_request("POST", "/chat/stream", body={"message": TEXT, "session_id": session}))
            check_turn(connection.lines(connection.read_head()), message=TEXT)
            connection.send(http_request("GET", "/health"))
            assert instant.response(connection, close=False).status == 200
            connection.send(http_request("GET", f"/sessions/{session}/stream"))
            assert len(connection.file.read()) == 900
            connection.close()
        assert proxy.connections == 1
        assert proxy.requests == ["POST /chat/stream HTTP/1.1", "GET /health HTTP/1.1",
                                  f"GET /sessions/{session}/stream HTTP/1.1"]

    def test_a_half_close_passes_on(self, instant):
        with Proxy(instant.address) as proxy:
            assert len(Server(*proxy.address).answers(2 * http_request("GET", "/health"))) == 2
            assert wait_until(lambda: not proxy.links)

    def test_the_server_learns_that_the_client_left(self, server):
        session = new_id()
        with Proxy(server.address) as proxy:
            Server(*proxy.address).chat(LONG, session_id=session).read(5).abort()
            assert wait_until(lambda: server.readers(session) == [0])

    @waits
    def test_the_client_learns_that_the_server_died(self, serve):
        server = serve()
        with Proxy(server.address) as proxy:
            stream = Server(*proxy.address).chat(LONG).read(5)
            server.process.kill()
            with pytest.raises(Cut):
                stream.read()
            stream.connection.close()

    def test_it_goes_down_and_comes_back_before_another_server(self, server, instant):
        session = new_id()
        with Proxy(server.address) as proxy:
            through = Server(*proxy.address)
            stream = through.chat(LONG).read(5)
            proxy.down()
            with pytest.raises(Cut):
                stream.read()
            stream.connection.close()
            with pytest.raises(ConnectionRefusedError):
                through.connect()
            proxy.target = instant.address
            proxy.up()
            through.request("POST", "/sessions/new", {"session_id": session})
        assert session in instant.session_ids() - server.session_ids()


# ---- Check your own server: the suite is tested too

HELLO = "Hello, n\u00efve world!"
T0 = datetime.fromisoformat("2026-11-24T10:00:00.000001+00:00")


def flawless():
    """The events of a flawless turn, 0.1 s apart."""
    ids = {"session_id": "s-1", "turn_id": "t-1"}
    times = [(T0 + timedelta(seconds=n / 10)).isoformat() for n in range(5)]
    return [
        {"type": "session_info", **ids, "model": "offline", "created": True, "timestamp": times[0]},
        {"type": "status", "message": "Generating response...", "context_messages": 0},
        {"type": "chunk", "text": "You said: ", "chunk_number": 1, "is_final": False, "timestamp": times[1]},
        {"type": "chunk", "text": HELLO, "chunk_number": 2, "is_final": False, "timestamp": times[2]},
        {"type": "chunk", "text": " Bye!", "chunk_number": 3, "is_final": True, "timestamp": times[3]},
        {"type": "complete", "finish_reason": "stop", "total_chunks": 3, "processing_time": 0.4, "message_count": 2,
         **ids, "timestamp": times[4]},
    ]


def answer(events):
    """The bytes of an answer: each event a line, each line a transfer chunk."""
    lines = [json.dumps(event, separators=(",", ":")).encode() + b"\n" for event in events]
    return (b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n"
            b"Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\nX-Content-Type-Options: nosniff\r\n"
            b"Connection: keep-alive\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(line), line) for line in lines)
            + b"0\r\n\r\n")


def change(number, **fields):
    return lambda events: [event | fields if n == number else event for n, event in enumerate(events)]


def without(number, field):
    return lambda events: [{name: value for name, value in event.items() if n != number or name != field}
                           for n, event in enumerate(events)]


def end_with(**fields):
    error = {"type": "error", "code": "model_cut", "message": "The model's answer was cut.", "retryable": True}
    ids = ("session_id", "turn_id", "timestamp")
    return lambda events: [*events[:4], error | {name: events[5][name] for name in ids} | fields]


def ping(**fields):
    return lambda events: [*events[:2], {"type": "ping", "timestamp": T0.isoformat(), **fields}, *events[2:]]


FLAWLESS = [
    ("a complete turn", lambda events: events),
    ("an error in the middle", end_with()),
    ("a ping", ping()),
    ("usage", change(5, usage={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3})),
    ("an empty last chunk need not wait", change(4, text="", timestamp=(T0 + timedelta(seconds=0.21)).isoformat())),
]
DEFECTS = [             # what is wrong, how it came to be, what the suite says
    ("no event at all", lambda events: [], "the stream begins with"),
    ("no session_info", lambda events: events[1:], "the stream begins with"),
    ("chunk before status", lambda events: [events[0], events[2], events[1], *events[3:]], "the stream begins with"),
    ("no terminal event", lambda events: events[:-1], "without a terminal event"),
    ("two terminal events", lambda events: [*events, events[-1]], "other events than chunks"),
    ("an event after the end", lambda events: [*events, events[4]], "without a terminal event"),
    ("an unknown event", change(3, type="delta"), "other events than chunks"),
    ("a field too many", change(2, role="model"), "the fields of"),
    ("a field is missing", without(5, "finish_reason"), "the fields of"),
    ("created is no boolean", change(0, created=1), "created can't be"),
    ("chunk_number is a string", change(2, chunk_number="1"), "chunk_number can't be"),
    ("an id with a space", change(0, session_id="s 1"), "session_id can't be"),
    ("the end names another turn", change(5, turn_id="t-2"), "another turn_id"),
    ("a time without microseconds", change(2, timestamp="2026-11-24T10:00:00+00:00"), "timestamp can't be"),
    ("a time with Z", change(2, timestamp="2026-11-24T10:00:00.000000Z"), "timestamp can't be"),
    ("time runs backwards", change(3, timestamp=T0.isoformat()), "run backwards"),
    ("chunks too close", change(3, timestamp=(T0 + timedelta(seconds=0.15)).isoformat()), "less than 0.1 s apart"),
    ("processing_time in milliseconds", change(5, processing_time=400), "not the time from the start"),
    ("too many words", change(3, text=HELLO + " Two more"), "more than 4 words"),
    ("a chunk too long", change(3, text=HELLO + "x" * 4096), "4,096 code points"),
    ("a gap in chunk_number", change(3, chunk_number=3), "have gaps"),
    ("chunk_number from 0", change(2, chunk_number=0), "have gaps"),
    ("is_final in the middle", change(3, is_final=True), "is_final is wrong"),
    ("no is_final", change(4, is_final=False), "is_final is wrong"),
    ("is_final before an error", lambda events: end_with()(change(3, is_final=True)(events)), "is_final is wrong"),
    ("an empty chunk in the middle", change(3, text=""), "an empty chunk"),
    ("total_chunks wrong", change(5, total_chunks=2), "total_chunks is not"),
    ("no chunk at all", lambda events: change(2, total_chunks=0)([*events[:2], events[5]]), "at least one chunk"),
    ("message_count wrong", change(5, message_count=1), "message_count is wrong"),
    ("unknown finish_reason", change(5, finish_reason="STOP"), "finish_reason can't be"),
    ("retryable wrong", end_with(retryable=False), "retryable is wrong"),
    ("an error without words", end_with(message=""), "1 to 1,000 characters"),
    ("text lost", change(3, text="Hello, "), "lost some of the message"),
    ("text trimmed", change(3, text=HELLO[:-1]), "lost some of the message"),
    ("a lone surrogate", change(4, text="\ud800"), "surrogate"),
    ("a line over 64 KiB", change(4, text="\x00" * 12_000), "not ASCII, or too long"),
]
WIRE_DEFECTS = [        # what is wrong, bytes of the answer, others in their place, what the suite says
    ("Content-Length", b"Transfer-Encoding: chunked", b"Content-Length: 800", None),
    ("both lengths", b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n", None),
    ("no NDJSON", b"application/x-ndjson", b"application/json", None),
    ("a proxy may buffer it", b"X-Accel-Buffering: no\r\n", b"", None),
    ("a field twice", b"Connection: keep-alive", b"Connection: keep-alive\r\nConnection: close", "comes twice"),
    ("a bare LF in the head", b"chunked\r\n", b"chunked\n", "a bare LF"),
    ("white space before a colon", b"Connection:", b"Connection :", "not a field line"),
    ("no status line", b"HTTP/1.1 200 OK", b"HTTP 200 OK", "not a status line"),
    ("no size", b"\r\n\r\n", b"\r\n\r\n\r\n", "not the size"),
    ("a size that is no hex number", b"\r\n\r\n", b"\r\n\r\n0x", "not the size"),
    ("a size too small", b"\r\n\r\n", b"\r\n\r\n1\r\n", "ends a transfer chunk"),
    ("no last transfer chunk", b"\n\r\n0\r\n\r\n", b"\n\r\n", None),
    ("no end after the last transfer chunk", b"0\r\n\r\n", b"0\r\n", None),
    ("not ASCII", b"n\\u00efv", "n\u00efvXX".encode("latin-1"), "not ASCII"),
    ("not JSON", b'"is_final":true', b'"is_final":True', "not a line of JSON"),
    ("NaN", b'"processing_time":0.4', b'"processing_time":NaN', "processing_time can't be"),
    ("a field twice in an event", b'"created":true', b'"type":"chunk"', "a field comes twice"),
    ("two events in a line", b'}\n\r\n', b'} \r\n', "not a line of JSON"),
]


@contextlib.contextmanager
def scripted(script):
    """A server that answers whatever it is asked with these bytes, once, and closes."""
    def serve():
        connection, _ = listener.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(script)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield Server(*listener.getsockname())
        thread.join(PATIENCE)


class TestCheckYourOwnServer:
    """Small broken servers, each with one defect, on which the reader or `check_turn` must fail."""

    def judge(self, script):
        with scripted(script) as server:
            stream = server.open("POST", "/chat/stream", {})
            return stream.check(message=HELLO, delay=0.1, words=4, session_id="s-1")

    @cases(FLAWLESS)
    def test_a_flawless_server_passes(self, case):
        _, edit = case
        assert self.judge(answer(edit(flawless()))).text.startswith("You said: " + HELLO)

    @cases(DEFECTS)
    def test_a_defect_of_the_events_is_found(self, case):
        _, edit, verdict = case
        with pytest.raises(AssertionError, match=verdict):
            self.judge(answer(edit(flawless())))

    @cases(WIRE_DEFECTS)
    def test_a_defect_of_the_bytes_is_found(self, case):
        _, old, new, verdict = case
        script = answer(flawless())
        assert old in script
        with pytest.raises((AssertionError, Cut), match=verdict):
            self.judge(script.replace(old, new, 1))

    def test_a_cut_at_any_byte_is_found(self):
        script = answer(flawless())
        for size in range(len(script)):
            with pytest.raises(Cut):
                self.judge(script[:size])
