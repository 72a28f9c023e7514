"""The protocol as tests: of the server and the clients beside this file, or of any other server.

    python -m pytest test_protocol.py               # tests streamchat_server.py and its clients
    STREAMCHAT_URL=http://host:port python -m pytest test_protocol.py       # the server at that address
    python3 test_protocol.py proxy --to http://host:port        # tries a client against cuts, without pytest

The tests trust no HTTP library and no other file of the project. They read raw sockets with the strict reader
below, and `check_turn` holds the rules of a stream; each test that streams uses both. The tools come first,
then the tests by the README's sections: the protocol, and from "What the README shows" on this project alone.
The last class turns the reader and the rules against small broken answers.

The marks `core`, `sessions` and `strict` are the levels of the README's section "Conformance"; `ours` marks
what is about this project alone. Another server is held to core and sessions, or to what `-m` says. Its model
must echo the message, nobody else may use it, and tests with short clocks need the command that starts it
(STREAMCHAT_START). README, "Testing a server or a client", has the details.
"""

import argparse
import base64
import contextlib
import hashlib
import http.client
import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import shlex
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
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

OUTSIDE = os.environ.get("STREAMCHAT_URL")
SERVER, CLIENT, README = (Path(__file__).with_name(name) for name in
                          ("streamchat_server.py", "streamchat_client.py", "README.md"))
PATIENCE = 20                   # seconds for a read, a poll or an end; a busy machine does not need so many
LIFETIME = 60                   # seconds for one connection, however a server drips
LONG = "word " * 2000           # a message whose answer takes 10 s at the pace of the `server` fixture


# ---- The reader: raw sockets and HTTP/1.1 (RFC 9112). It does not depend on sessions or turns.

class Cut(Exception):
    """The connection ended before the answer did."""


class Head(NamedTuple):
    status: int
    headers: dict


class Connection:
    """A client's connection, read strictly. It is cut after `cut_after` bytes."""

    VALUE = r"[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?"
    FIELD = re.compile(rf"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*({VALUE})?[ \t]*\r\n")

    def __init__(self, address, cut_after=sys.maxsize, receive_buffer=None):
        self.socket = socket.create_connection(address, PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.file = self.socket.makefile("rb")
        self.left, self.end = cut_after, time.monotonic() + LIFETIME
        self.pings = []

    def send(self, data):
        self.socket.sendall(data)

    def close(self):
        self.file.close()
        self.socket.close()

    def abort(self):
        """Close by a reset, as if the machine had vanished: what was not read yet is lost."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def _read(self, read, size):
        assert time.monotonic() < self.end, f"the answer takes more than {LIFETIME} s"
        try:
            data = read(min(size, self.left))
        except ConnectionError as error:
            raise Cut(str(error)) from error
        except TimeoutError as error:
            raise AssertionError(f"no byte came for {PATIENCE} s, and no end") from error
        self.left -= len(data)
        return data

    def take(self, size):
        data = b""
        while len(data) < size:
            piece = self._read(self.file.read1, size - len(data))
            if not piece:
                raise Cut(f"{len(data)} bytes of {size}")
            data += piece
        return data

    def take_line(self):
        line = self._read(self.file.readline, 65_537)
        if not line.endswith(b"\n"):
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
            assert re.fullmatch("[0-9]+", length), f"Content-Length: {length}"
            yield self.take(int(length))
        else:
            while piece := self._read(self.file.read1, 65_536):
                yield piece

    def _transfer_chunks(self):
        """RFC 9112, section 7.1, without extensions and trailers."""
        while True:
            size = self.take_line()
            assert re.fullmatch(r"[0-9A-Fa-f]{1,6}\r\n", size), f"not the size of a transfer chunk: {size!r}"
            if data := self.take(int(size, 16)):
                yield data
            end = self.take(2)
            assert end == b"\r\n", f"{end!r} ends a transfer chunk"
            if not data:
                return

    def lines(self, head):
        """The raw lines of a stream, each as soon as it is whole. Pings are kept apart: no log has them."""
        rest = b""
        for piece in self.pieces(head):
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                event = event_of(line + b"\n") if line else None
                if event and event["type"] == "ping":
                    check_fields(event, EVENTS["ping"])
                    self.pings.append(event)
                elif event:
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
        return json.loads(self.body.decode("utf-8"))


def http_request(method, path, *fields, body=None, version="HTTP/1.1"):
    """The bytes of a request. `body` is bytes, or a value for JSON; None sends no body and no length."""
    if body is not None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = (*fields, f"Content-Length: {len(body)}")
    return request_head(f"{method} {path} {version}", "Host: localhost", *fields) + (body or b"")


def request_head(*lines):
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")


def chat_request(body, *fields, **kind):
    return http_request("POST", "/chat/stream", *fields, body=body, **kind)


# ---- The rules of a stream (README, "Events"). They do not depend on HTTP.

STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')

def event_of(line):
    """A line is one JSON object in ASCII, under 64 KiB, without a repeated key or a value that JSON lacks."""
    assert line.isascii() and len(line) < 65_536, f"not ASCII, or too long: {line[:100]!r}"
    try:
        event = json.loads(line, object_pairs_hook=no_key_twice, parse_constant=no_constant)
    except ValueError as error:
        raise AssertionError(f"not a line of JSON: {line[:100]!r}") from error
    assert isinstance(event, dict) and isinstance(event.get("type"), str), f"no event: {line[:100]!r}"
    assert line.startswith(b'{"type":'), f"type is not the first field: {line[:100]!r}"
    assert not re.search(rb"\s", STRING.sub(b"", line.rstrip(b"\n"))), f"white space in {line[:100]!r}"
    return event


def no_key_twice(pairs):
    assert len(dict(pairs)) == len(pairs), "a field comes twice"
    return dict(pairs)


def no_constant(name):
    raise ValueError(f"JSON has no {name}")


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


@cache
def shapes_of(fields):
    return dict(field.split(":") for field in fields.split())


def check_fields(value, fields):
    """Exactly these fields, each of its shape; a `?` allows null. Another server may have more of them."""
    shapes = shapes_of(fields)
    assert isinstance(value, dict), f"not an object: {value!r}"
    given = set(value) & set(shapes) if OUTSIDE else set(value)
    assert given == set(shapes), f"the fields of {value} are not {fields}"
    for name, shape in shapes.items():
        is_null = value[name] is None and shape.endswith("?")
        assert is_null or SHAPES[shape.rstrip("?")](value[name]), f"{name} can't be {value[name]!r}"


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

    The answer has `message` in it, unless it ends early. `delay` and `words` are the server's pace. A resume
    has left out chunks 1 to `after`. `same` has values that session_info and the end share.
    """
    events = [event_of(line) for line in lines]
    if OUTSIDE:     # another server may send more types of events
        events = [event for event in events if event["type"] in EVENTS]
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["session_info", "status"], f"the stream begins with {kinds[:2]}"
    assert kinds[-1] in ("complete", "error"), "the stream ends without a terminal event"
    assert set(kinds[2:-1]) <= {"chunk"}, f"other events than chunks before the end: {set(kinds[2:-1])}"
    for event in events:
        fields = EVENTS[event["type"]]
        if event["type"] == "complete" and "usage" in event:
            fields += " usage:object"
            check_fields(event["usage"], USAGE)
        check_fields(event, fields)
    turn = Turn(events[0], events[1], events[2:-1], events[-1])
    same = {"session_id": turn.info["session_id"], "turn_id": turn.info["turn_id"], **same}
    for name, value in same.items():
        assert turn.info[name] == value and turn.end.get(name, value) == value, f"another {name} than {value}"
    check_chunks(turn, words, after)
    if turn.end["type"] == "complete":
        check_complete(turn, message, after)
    else:
        code, retryable = turn.end["code"], turn.end["retryable"]
        assert retryable is STREAM_ERRORS.get(code), f"retryable is wrong for {code}, or the code is unknown"
        assert 0 < len(turn.end["message"]) <= 1000, "an error whose message has not 1 to 1,000 characters"
    check_times(turn, delay)
    return turn


def check_chunks(turn, words, after):
    numbers = [chunk["chunk_number"] for chunk in turn.chunks]
    assert numbers == list(range(after + 1, after + 1 + len(numbers))), f"chunk numbers have gaps: {numbers}"
    for chunk in turn.chunks:
        is_last = chunk is turn.chunks[-1] and turn.end["type"] == "complete"
        assert chunk["is_final"] is is_last, f"is_final is wrong in chunk {chunk['chunk_number']}"
        assert chunk["text"] or chunk["is_final"], "an empty chunk that is not the last"
        assert OUTSIDE or len(chunk["text"]) <= 4096, "a chunk has more than 4,096 code points"
        assert words is None or len(chunk["text"].split()) <= words, f"more than {words} words in a chunk"
        assert not re.search("[\ud800-\udfff]", chunk["text"]), "a lone surrogate"


def check_complete(turn, message, after):
    end, before = turn.end, turn.status["context_messages"]
    assert end["finish_reason"] in FINISH_REASONS, f"finish_reason can't be {end['finish_reason']}"
    assert end["total_chunks"] >= 1, "a complete turn without a chunk"
    assert len(turn.chunks) == max(end["total_chunks"] - after, 0), "total_chunks is not the number of chunks"
    if end["finish_reason"] == "cancelled" and turn.chunks:
        assert turn.chunks[-1]["text"] == "", "the last chunk of a cancelled turn is empty"
    if after == 0:
        is_whole = end["finish_reason"] == "stop"
        assert message in turn.text or not is_whole, "the answer has lost some of the message"
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
    """RFC 9457: an error before a stream starts is problem details, with a fixed word as `code`."""
    assert (response.status, response.media_type) == (status, "application/problem+json"), response
    problem = response.json
    check_fields(problem, "type:text title:text status:count detail:text code:text")
    title = {413: "Content Too Large", 414: "URI Too Long"}.get(status, http.HTTPStatus(status).phrase)
    assert OUTSIDE or problem["title"] == title, problem
    assert (problem["type"], problem["status"], problem["code"]) == ("about:blank", status, code), problem
    assert problem["title"] and problem["detail"].strip(), problem
    return problem


# ---- The proxy that cuts streams. As a command it runs without pytest.

PROXY = """\
A proxy between a client and a server of this protocol, which cuts streams as a bad network would.

Whenever bytes of a stream come from the server, the proxy may cut the client's connection, at a random byte
among them. So a client that tries again gets further, unless --cut is 1. Each fault is printed. Other
requests pass untouched. A client that keeps the protocol shows the same text as without the proxy, and its
history has each turn once."""
STREAM = re.compile(r"(POST /chat|(GET|POST) /sessions/[^/ ]+)/stream[? ]")
NEVER = sys.maxsize


class Fault(NamedTuple):
    """What happens to one answer. A place in it is a number of bytes from its start, or the bytes there."""
    cut: int | bytes = NEVER    # where the client's connection is closed (0: when the first byte has come)
    reset: bool = False         # a cut is a reset: what the client has not read yet is lost
    stall: int | bytes = NEVER  # where nothing comes any more, and the connection stays open
    delay: float = 0.0          # seconds before each piece
    split: bool = False         # each byte is a piece
    repeat: bool = False        # the request is sent twice, as by a proxy that tries again
    instead: bytes | None = None    # these bytes are the answer, then a close; the server sees no request


class Proxy:
    """A relay that passes each answer on as its fault says.

    `faults` are those of the streams, in turn; what comes after them, and other requests, passes untouched
    (`fault_of` decides that). `target` is the server's address; a change counts for new connections.
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
        """The fault of an answer, asked again for each piece that has come, with its size."""
        return link.fault

    def note(self, line, what):
        """A fault happens to the answer to this request line."""


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
        self.passed += len(data)    # before it is sent: after that the next request may begin at 0
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
        return self.passed + data.index(place) if place in data else NEVER

    def cut(self, reset):
        if reset:
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # This wakes `pass_requests`, which closes.
        self.client.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)

    def end(self):
        """Wake the threads that wait for either side: a close alone would not."""
        for sock in filter(None, (self.client, self.server)):
            with contextlib.suppress(OSError):      # it has ended by itself
                sock.shutdown(socket.SHUT_RDWR)


def read_request(file):
    """The bytes of a request, whose body, if any, has a Content-Length. Fewer where the client has left."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and (line := file.readline()):
        head += line
    length = re.search(rb"\ncontent-length:[ \t]*(\d+)", head, re.IGNORECASE)
    return head + file.read(int(length[1]) if length else 0)


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
        # In one write, since threads take turns.
        print(f"{now}  {line[:100]!a}  {what}\n", end="", flush=True)


def fraction(text):
    """The type of options from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def address_of(url):
    """The address of a server, which must be there."""
    parts = urlsplit(url if "//" in url else "//" + url)
    with socket.create_connection((parts.hostname, parts.port or 80), PATIENCE) as connection:
        return connection.getpeername()[:2]


def main():
    parser = argparse.ArgumentParser(description="A tool to test a client of streamable HTTP chat.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "proxy", help="try a client against cuts", description=PROXY,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--to", metavar="URL", required=True, help="the server, as http://127.0.0.1:8000")
    command.add_argument("--port", type=int, default=8001,
                         help="where the proxy listens (8001; 0 takes a free one)")
    command.add_argument("--cut", type=fraction, default=0.2, metavar="P",
                         help="chance of a cut, 0 to 1 (0.2)")
    command.add_argument("--stall", type=fraction, default=0, metavar="P",
                         help="chance that nothing comes any more, on a connection that stays open")
    command.add_argument("--repeat", type=fraction, default=0, metavar="P",
                         help="chance that a request is sent twice, as by a proxy that tries again by itself")
    command.add_argument("--delay", type=fraction, default=0, metavar="S",
                         help="seconds before each piece, 0 to 1")
    command.add_argument("--split", action="store_true", help="pass on single bytes")
    command.add_argument("--seed", type=int, default=random.randrange(1_000_000), metavar="N",
                         help="make the choices of an earlier run again")
    options = parser.parse_args()
    try:
        with contextlib.suppress(KeyboardInterrupt), ProxyByChance(address_of(options.to), options) as proxy:
            print(f"To {options.to}, with --seed {options.seed}")
            print(f"Proxy at {proxy.url}", flush=True)
            threading.Event().wait()
    except (OSError, ValueError, OverflowError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

import pytest  # noqa: E402  # the command has ended here, and does not need it

# ---- The levels of conformance (README, "Conformance")

# No file of settings names the marks.
warnings.filterwarnings("ignore", ".*pytest.mark.(core|sessions|strict)")
core, sessions, strict = pytest.mark.core, pytest.mark.sessions, pytest.mark.strict
ours = pytest.mark.skipif(bool(OUTSIDE), reason="is about this project's own server and clients")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or limits another process")


@pytest.fixture(autouse=True)
def level(request):
    """Another server is held to core and sessions, or to what `-m` says; its head fields at strict alone."""
    levels = {mark.name for mark in request.node.iter_markers()} & {"core", "sessions", "strict"}
    Stream.is_strict = not OUTSIDE or "strict" in levels
    if OUTSIDE and levels == {"strict"} and not request.config.getoption("markexpr"):
        pytest.skip("is strict: choose it by -m strict")


@pytest.fixture(scope="session", autouse=True)
def signals():
    """A job in a shell's background, or under nohup, ignores some, and what it starts inherits that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT) if os.name == "posix" else ():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)      # a child has the default then


def cases(table):
    """Rows of data as the cases of a test, called by their first column."""
    return pytest.mark.parametrize("case", table, ids=[row[0] for row in table])


def needs(program, *places):
    """The path of a program. Where it is missing the test is skipped, but never in CI."""
    path = shutil.which(program, path=os.pathsep.join([os.environ["PATH"], *places]))
    if not path:
        assert os.environ.get("CI") != "true", f"CI must have {program}"
        pytest.skip(f"needs {program}")
    return path


def wait_until(condition, seconds=PATIENCE):
    """Poll until the condition holds, and return what it said last."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def in_parallel(work, items, workers=8):
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, items))


def new_id():
    return uuid.uuid4().hex


def url_of(server):
    return "http://{}:{}".format(*server.address)


# ---- Servers: our own, which the tests start, or another one at its address

class Stream:
    """The answer to a POST or GET of a stream. Its head is checked; its lines are read when a test asks."""

    is_strict = True

    def __init__(self, connection, pace, connection_field="keep-alive", coding="chunked"):
        self.connection, self.pace = connection, pace
        self.head = connection.read_head()
        assert self.head.status == 200, (self.head, connection.file.read1())
        expected = {"content-type": "application/x-ndjson", "content-length": None}
        if self.is_strict:
            expected |= {"cache-control": "no-cache", "x-accel-buffering": "no",
                         "x-content-type-options": "nosniff",
                         "connection": connection_field, "transfer-encoding": coding}
        given = {name: self.head.headers.get(name) for name in expected}
        assert given == expected, "a stream has another head"
        self.lines = []
        self.coming = connection.lines(self.head)

    def read(self, count=None):
        """Read the next `count` lines, or all that come."""
        self.lines += itertools.islice(self.coming, count)
        return self

    def read_until(self, kind, number=1):
        """Read up to the `number`th event of a type, and not a byte further."""
        for line in self.coming:
            self.lines.append(line)
            event = event_of(line)
            number -= event["type"] == kind
            if not number:
                return event
        raise AssertionError(f"the stream ends without {kind}: {self.lines[-1:]}")

    def abort(self):
        self.connection.abort()

    def check(self, **expected):
        """Read to the end and close; the turn must follow all rules."""
        self.read()
        self.connection.close()
        return check_turn(self.lines, **(self.pace | expected))


class Server:
    """A server as its clients see it. `flags` tell its token and its pace."""

    def __init__(self, host, port, flags=()):
        self.address = (host, port)
        options = dict(zip(flags[::2], flags[1::2], strict=False))
        self.fields = [f"Authorization: Bearer {options['--token']}"] if "--token" in options else []
        self.pace = {} if OUTSIDE else {
            "delay": float(options.get("--chunk-delay", 0.1)), "words": int(options.get("--chunk-words", 4))}

    def connect(self, **kind):
        return Connection(self.address, **kind)

    def request(self, method, path, body=None):
        connection = self.connect()
        connection.send(http_request(method, path, *self.fields, body=body))
        return self.response(connection, method)

    def response(self, connection, method="GET", close=True):
        head = connection.read_head()
        has_no_body = method == "HEAD" or head.status in (100, 204, 304)
        response = Response(*head, b"" if has_no_body else b"".join(connection.pieces(head)))
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

    def open(self, method, path, body=None):
        connection = self.connect()
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

    def is_running(self, session):
        return self.session(session)["streaming"]

    def session_ids(self):
        return {session["session_id"] for session in self.get("/sessions")["sessions"]}

    def history(self, session):
        return [(message["role"], message["text"]) for message in self.session(session)["messages"]]

    def stats(self):
        """The statistics, or what the level core has of them."""
        response = self.request("GET", "/stats")
        return self.get("/health") if OUTSIDE and response.status == 404 else response.json

    def readers(self, session):
        return [stream["readers"] for stream in self.stats()["streams"] if stream["session_id"] == session]

    def is_there(self):
        try:
            return bool(self.get("/health"))
        except (OSError, Cut):
            return False

    def check_log(self):
        """Nothing to see from outside."""


class OwnServer(Server):
    """A server that we started: its process, and what it wrote so far."""

    def __init__(self, host, port, flags, process, output):
        super().__init__(host, port, flags)
        self.process, self.output, self.checked = process, output, 0

    def log(self):
        """What it wrote since the log was checked last."""
        return self.output.read_bytes()[self.checked:].decode("utf-8", "replace")

    def check_log(self):
        """It raised nothing."""
        assert "Traceback" not in self.log(), self.log()
        self.excuse_log()

    def excuse_log(self):
        """It raised what it was meant to raise."""
        self.checked = self.output.stat().st_size

    def held(self):
        """How many threads and open files it has (Linux)."""
        folders = [Path(f"/proc/{self.process.pid}", name) for name in ("task", "fd")]
        return Counter({folder.name: len(list(folder.iterdir())) for folder in folders})

    def end(self, how="kill"):
        getattr(self.process, how)()
        return self.process.wait(PATIENCE)


START = """import sys
sys.path.insert(0, sys.argv.pop(1))
import streamchat_server as server
{changes}
sys.exit(server.main())"""


def environment(**more):
    """Ours, without what would choose a model, a token or the look of the log."""
    chosen = ("GOOGLE_", "GEMINI_", "GENAI_", "NO_COLOR", "STREAMCHAT_", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    return kept | more


@contextlib.contextmanager
def running(*flags, program=None, changes="", **more):
    """A server of our own with these flags, on a free port. At the end it is killed, and has raised nothing.

    `program` is another file than ours. `changes` are statements that change the module `server`, to shorten
    its clocks for example. `more` are variables of its environment.
    """
    # Imported, it is compiled once, and not at each start.
    own = ["-c", START.format(changes=changes), str(SERVER.parent)]
    command = [sys.executable, *([str(program)] if program else own), "--port", "0", *flags]
    more = {"PYTHONPATH": str(SERVER.parent), **more}
    with tempfile.TemporaryDirectory() as folder, open(path := Path(folder, "log"), "wb") as output:
        process = subprocess.Popen(command, env=environment(**more), stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT)
        try:
            serving = re.compile(r"^Serving on http://(.+):(\d+)\r?\n", re.MULTILINE)
            found = wait_until(lambda: serving.search(path.read_text("utf-8", "replace"))
                               or process.poll() is not None, 3 * PATIENCE)
            assert isinstance(found, re.Match), path.read_text("utf-8", "replace")
            server = OwnServer(found[1].strip("[]"), int(found[2]), flags, process, path)
            yield server
            server.check_log()
        finally:
            process.kill()
            process.wait(PATIENCE)


@contextlib.contextmanager
def visiting():
    """The server that is not ours. Our sessions are deleted at the end."""
    url = urlsplit(OUTSIDE)
    server = Server(url.hostname, url.port or 80)
    try:
        has_list = server.request("GET", "/sessions").status == 200     # not at the level core
    except (OSError, Cut, AssertionError) as error:     # each test would wait for it again
        pytest.exit(f"no server of this protocol at {OUTSIDE}: {error}", returncode=1)
    before = server.session_ids() if has_list else set()
    yield server
    for session in server.session_ids() - before if has_list else ():
        server.request("DELETE", f"/sessions/{session}")


def clock_flags(delay, heartbeat, window):
    return "--chunk-delay", str(delay), "--heartbeat", str(heartbeat), "--resume-window", str(window)


@contextlib.contextmanager
def clocked(delay=0.1, heartbeat=10, window=30, changes=""):
    """A fresh server with these clocks, in seconds: ours, or another one by its tester's command."""
    if not OUTSIDE:
        with running(*clock_flags(delay, heartbeat, window), changes=changes) as own:
            yield own
        return
    command = os.environ.get("STREAMCHAT_START") or pytest.skip("needs STREAMCHAT_START")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = command.format(port=port, delay=delay, heartbeat=heartbeat, window=window)
    process = subprocess.Popen(shlex.split(command), stdout=subprocess.DEVNULL)
    try:
        server = Server("127.0.0.1", port)
        server.process = process
        assert wait_until(server.is_there), f"{command} does not serve"
        yield server
    finally:
        process.kill()
        process.wait(PATIENCE)


@contextlib.contextmanager
def pool():
    """Starts what tests share (a server, the browser), each once, and ends it after the last test."""
    with contextlib.ExitStack() as stack:
        started = {}

        def lend(start, *how, **more):
            key = (start, how, *more.items())
            if key not in started:
                started[key] = stack.enter_context(start(*how, **more))
            return started[key]
        yield lend


@pytest.fixture(scope="session")
def shared():
    with pool() as lend:
        yield lend


@pytest.fixture
def lend(shared):
    """Lends shared servers to a test. After it none of their turns runs on, and none has raised anything."""
    lent = []

    def borrow(start, *how, **more):
        lent.append(shared(start, *how, **more))
        return lent[-1]
    yield borrow
    for server in lent:
        for stream in server.stats().get("streams", ()):
            server.request("DELETE", f"/sessions/{stream['session_id']}")
        server.check_log()


CLOCKS = {              # of servers that others have, too: delay, heartbeat and window in seconds
    "brisk": (0.02, 0.3, 0.7), "silent": (2, 0.3, 0.5),
}
SERVERS = {             # the servers that tests share, by the names of their fixtures
    "server": ("--chunk-delay", "0.02"),            # the default flags, except for five times the pace
    "fast": ("--chunk-delay", "0"),                 # no pace
    "instant": ("--chunk-delay", "0", "--log", "off"),
    **{name: clock_flags(*clocks) for name, clocks in CLOCKS.items()},
}


@pytest.fixture
def server(lend):
    return lend(visiting) if OUTSIDE else lend(running, *SERVERS["server"])


@pytest.fixture
def fast(lend):
    return lend(visiting) if OUTSIDE else lend(running, *SERVERS["fast"])


@pytest.fixture
def brisk(lend):
    return lend(clocked, *CLOCKS["brisk"])


@pytest.fixture
def silent(lend):
    return lend(clocked, *CLOCKS["silent"])


@pytest.fixture
def own(lend):
    """Lends servers of our own, by their flags."""
    return lambda *flags, **more: lend(running, *flags, **more)


@contextlib.contextmanager
def fresh_servers():
    with contextlib.ExitStack() as stack:
        yield lambda *flags, **more: stack.enter_context(running(*flags, **more))


@pytest.fixture
def serve():
    """Starts fresh servers of our own, for a test that stops them, counts from zero or reads their log."""
    with fresh_servers() as serve:
        yield serve


# ---- Lanes: two threads for the tests that mostly wait

BESIDE = {}         # these tests, by the functions that pytest calls instead
LENDS = {"self", "own", "serve", "browser", "tmp_path", *SERVERS}


def beside(test):
    """Let a test run in a lane, beside the others. It may ask for what LENDS has, and for parameters.

    pytest judges it when it comes to it, and runs it itself if no lane has begun its class.
    """
    if OUTSIDE:
        return test

    @pytest.mark.usefixtures("lanes", *parameters_of(test) - LENDS)
    def judged(self, request, lanes, shared):
        began, done = lanes[request.node]
        if began.cancel():
            run_beside(request.node, shared)
        else:
            done.result()
    BESIDE[judged] = test
    return judged


def parameters_of(test):
    return inspect.signature(test).parameters.keys()


def run_beside(item, lend):
    """Run a test as pytest would, with servers and a browser that others may share."""
    test, servers = BESIDE[item.function], []

    def own(*flags, **more):
        servers.append(lend(running, *flags, **more))
        return servers[-1]
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, fresh_servers() as serve,
          contextlib.ExitStack() as stack):
        given = {"self": item.instance, "serve": serve, "tmp_path": Path(folder), "own": own}
        if hasattr(item, "callspec"):
            given |= item.callspec.params
        for name in SERVERS.keys() & parameters_of(test):
            given[name] = own(*SERVERS[name])
        if "browser" in parameters_of(test):
            given["browser"] = lend(Browser)
            stack.enter_context(given["browser"].tab())
        test(**{name: given[name] for name in parameters_of(test)})
    for server in servers:
        server.check_log()


def run_group(items, lanes):
    """Run these tests, unless pytest has begun them."""
    began, _ = lanes[items[0]]
    if not began.set_running_or_notify_cancel():
        return
    with pool() as lend:
        for item in items:
            _, done = lanes[item]
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(run_beside(item, lend))
                except BaseException as error:      # what pytest shows, or takes for a skip
                    done.set_exception(error)


@pytest.fixture(scope="session", autouse=True)
def lanes(request):
    """For each of these tests two futures: whether a lane has begun its class, and its result.

    One thread runs a class, and has servers of its own: so a test may look at what its server counts. All
    tests of the page are one class, with one browser. The lanes begin with them and then with the last
    class, and so meet pytest, which begins with the first.
    """
    groups, lanes = {}, {}
    for item in request.session.items:
        if test := BESIDE.get(item.function):
            name = "browser" if "browser" in parameters_of(test) else item.cls
            groups.setdefault(name, []).append(item)
    for items in groups.values():
        began = Future()
        lanes |= {item: (began, Future()) for item in items}
    with ThreadPoolExecutor(2) as threads:
        for name in sorted(reversed(groups), key=lambda name: name != "browser"):
            threads.submit(run_group, groups[name], lanes)
        yield lanes
        for began, done in lanes.values():      # where the session ends early
            began.cancel()
            done.cancel()


# ---- README, "On the wire", "Request" and "Events"

SPACES = "".join(character for character in map(chr, range(0x110000)) if character.isspace())
TEXTS = [
    ("one letter", "x"),
    ("every kind of white space, also at both ends", SPACES + "a" + "b".join(SPACES) + "c \n\n"),
    ("a run of white space longer than a chunk", "a" + " \n" * 5000 + "b"),
    ("emoji", "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d"),
    ("right to left", "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628 \u202eabc\u202c \u2067x\u2069"),
    ("all controls", "".join(map(chr, range(32))) + "x" + "".join(map(chr, range(127, 160)))),
    ("edges of Unicode", "\ufeff \ud7ff\ue000 \ufffd \ufffe\uffff \U00010000 \U0010ffff"),
    ("a very long word", "x" * 10_000),
    ("a very long word of combining characters", "a" + "\u0301" * 9_999),
    ("100,000 code points, each of which is two of UTF-16", "\U0001f600" * 100_000),
    ("a character that JavaScript alone takes for white space", "\ufeff"),
    ("text that looks like JSON", '","is_final":true}\n{"type":"complete"}\n\\u0041 \\n \\" \\'),
    ("text that looks like transfer chunks", "5\r\nhello\r\n0\r\n\r\nHTTP/1.1 400 Bad Request\r\n\r\n"),
    ("text that looks like a format", "%s %d %(x)s %% {} {0} {x} $x \\1"),
]
UUID4 = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
HI = b'{"message":"Hi"}'
GOOD_REQUESTS = [       # what is allowed, where that is said, requests
    ("JSON of several types, or of none", "README, Request", [
        *(chat_request(HI, f"Content-Type: {media_type}") for media_type in (
            "application/json", "Application/JSON; charset=UTF-8", "application/x-www-form-urlencoded")),
        chat_request(HI), chat_request(HI, "Accept: text/html")]),
    ("raw UTF-8, escapes and white space", "RFC 8259, sections 2, 7 and 8.1", [
        chat_request('{"message":"na\u00efve \U0001f600 \u2028"}'.encode()),
        chat_request(rb'{"message":"na\u00efve \ud83d\ude00 \u2028 \u0000"}'),
        chat_request(b' \r\n\t{ "message" : "Hi" }\n')]),
    ("unknown fields, and ids that are null", "README, Request", [
        chat_request({"message": "Hi", "temperature": 1.5, "more": [{"session_id": 5}, None]}),
        chat_request({"message": "Hi", "session_id": None, "turn_id": None})]),
    ("a body of 2 MiB", "README, HTTP/1.1", [chat_request(HI[:-1] + b" " * (2**21 - 16) + b"}")]),
    ("no body, an empty one, and one that is not used", "README, HTTP/1.1", [
        http_request("GET", "/health"), http_request("POST", "/sessions/new"),
        http_request("POST", "/sessions/new", body=b""),
        *(http_request(method, "/health", body=chat_request(HI)) for method in ("GET", "OPTIONS"))]),
    ("up to two empty lines before a request", "RFC 9112, section 2.2", [
        b"\r\n" + chat_request(HI), b"\r\n\r\n" + http_request("GET", "/health")]),
    ("HTTP/1.x", "RFC 9110, section 2.5", [
        *(chat_request(HI, version=version) for version in ("HTTP/1.0", "HTTP/1.2", "HTTP/1.9")),
        request_head("GET /health HTTP/1.0"), chat_request(HI, "Expect: 100-continue", version="HTTP/1.0")]),
    ("every form of Host", "RFC 9110, section 7.2", [
        request_head("GET /health HTTP/1.1", f"Host:{host}") for host in (
            " localhost:8000", "LocalHost:", "127.0.0.1\t", " \t127.1.2.3:65535 ", "[::1]", "[::1]:80")]),
    ("every form of a target", "RFC 9112, section 3.2", [
        *(http_request("GET", target) for target in (
            "http://localhost/health", "HTTP://LocalHost:8000/health?x", "https://[::1]:443/health",
            "http://localhost", "/sessions?after=1", "/health?a/b?c:@!$&'()*+,;=%20~\"<>[]^`{|}\\")),
        http_request("POST", "http://localhost/chat/stream", body=HI),
        request_head("GET http://localhost/health HTTP/1.1", "Host: chat.example.com")]),
    ("a length in digits", "RFC 9110, section 8.6", [
        http_request("POST", "/chat/stream", f"Content-Length:{length}") + HI for length in (
            "16", " 00000016", f" {'16':0>5000}", "\t 16 \t")]),
    ("any other field", "RFC 9110, section 5", [
        http_request("GET", "/health", "Content_Length: 5", "Transfer_Encoding: chunked",
                     "X-Content-Length: 5", "TE: chunked", "Trailer: Content-Length", "X-Empty:"),
        b"GET /health HTTP/1.1\r\nhOsT:localhost\r\nX:\x80\xa0\xff\t\xe9 \t\r\n\r\n",
        chat_request(HI, "Connection: close-x, xclose", "X: close"),
        http_request("GET", "/health", "Connection: Upgrade", "Upgrade: h2c", "HTTP2-Settings: AA")]),
    ("a head at its limits", "README, HTTP/1.1", [
        request_head(f"GET /health?{'x' * (8192 - 23)} HTTP/1.1", "Host: localhost"),
        http_request("GET", "/health", f"X: {'x' * (32_768 - 46)}"),
        http_request("GET", "/health", *["X: x"] * 99)]),
]


def parts_of(raw, count):
    """The same bytes one by one, or in so many parts where they are more."""
    size = len(raw) // count + 1
    return [raw[start:start + size] for start in range(0, len(raw), size)]


class TestOnTheWire:
    """Lines of NDJSON in transfer chunks (RFC 8259; RFC 9112, section 7.1). `check_turn` holds the rules."""

    @core
    @cases(TEXTS)
    def test_the_joined_texts_of_all_chunks_are_the_answer_character_for_character(self, fast, case):
        _, text = case
        session = new_id()
        turn = fast.turn(text, session_id=session)
        kept = fast.history(session)
        assert kept == [("user", text), ("model", turn.text)], "the history has other texts than the stream"

    @strict
    @cases(GOOD_REQUESTS)
    def test_a_good_request_is_served_once_however_the_network_splits_it(self, fast, case):
        _, _, requests = case
        for raw, count in itertools.product(requests, (1, 300)):
            connection = fast.connect()
            for part in parts_of(raw, count):
                connection.send(part)
            connection.socket.shutdown(socket.SHUT_WR)
            if b"/chat/stream" in raw.lstrip().partition(b"\r\n")[0]:
                form = ("close", None) if b"HTTP/1.0\r\n" in raw else ("keep-alive", "chunked")
                check_turn(Stream(connection, fast.pace, *form).read().lines, **fast.pace)
            else:
                assert fast.response(connection, close=False).status in (200, 204), raw
            assert connection.at_end(), f"more than one answer to {raw[:200]!r}"
            connection.close()

    @core
    def test_a_client_may_choose_the_ids_or_leave_that_to_the_server(self, fast):
        info = fast.turn("Hi").info
        for name in ("session_id", "turn_id"):
            assert re.fullmatch(UUID4, info[name]), f"{name} is no UUID of version 4"
        assert info["turn_id"] != fast.turn("Hi").info["turn_id"], "two turns have the same turn_id"
        for session in (uuid.uuid4().hex, "A-Za-z0-9_" + new_id(), "x" * 32 + new_id()):
            turn = fast.turn("Hi", session_id=session, turn_id="_-" + session[2:])
            assert (turn.info["created"], fast.session(session)["message_count"]) == (True, 2)

    @core
    def test_the_path_may_name_the_session_instead_of_the_body(self, fast):
        session = new_id()
        path, request = f"/sessions/{session}/stream", {"message": "Hi", "turn_id": "t"}
        turn = fast.open("POST", path, request).check(message="Hi", session_id=session, turn_id="t")
        check_history(fast, session, "Hi", turn)
        for body in (request | {"session_id": session}, request | {"session_id": None}):
            assert fast.open("POST", path, body).check() == turn, "a retry ran the turn again"
        assert fast.turn(**request, session_id=session) == turn, "the two paths have different turns"

    @core
    def test_every_turn_sees_the_messages_before_it_and_may_follow_at_once(self, fast):
        session, streams = new_id(), []
        for count in range(0, 40, 2):
            streams.append(stream := fast.chat("Hello", session_id=session, turn_id=f"t-{count}"))
            assert stream.read_until("complete")["message_count"] == count + 2
            now = fast.session(session)
            assert (now["message_count"], now["streaming"]) == (count + 2, False), "half of the end is shown"
            turn = stream.check(message="Hello")
            assert turn.info["created"] == (count == 0), "created is not whether this POST made the session"
            assert turn.status["context_messages"] == count and re.search(rf"\b{count}\b", turn.text)
        assert fast.turn("Hello").status["context_messages"] == 0, "sessions share messages"
        first = fast.chat("Hello", session_id=session, turn_id="t-0").read()
        assert first.lines == streams[0].lines, "only the last turns can be sent again"

    @strict
    def test_pipelined_requests_are_answered_in_order_and_the_connection_serves_on_after_errors(self, fast):
        """RFC 9112, section 9.3.2."""
        errors = [(chat_request(b"{"), 400, "invalid_json"), (http_request("GET", "/nope"), 404, "not_found"),
                  (http_request("BREW", "/health"), 405, "method_not_allowed")]
        connection = fast.connect()
        for _ in range(2):
            connection.send(chat_request({"message": "first"}) + b"\r\n" + http_request("GET", "/health")
                            + b"".join(raw for raw, *_ in errors) + chat_request({"message": "second"}))
            check_turn(Stream(connection, fast.pace).read().lines, message="first", **fast.pace)
            assert fast.response(connection, close=False).json["status"] == "healthy"
            for _, status, code in errors:
                check_problem(fast.response(connection, close=False), status, code)
            check_turn(Stream(connection, fast.pace).read().lines, message="second", **fast.pace)
        connection.close()

    @strict
    def test_the_connection_closes_for_a_client_that_asks_for_it_or_speaks_http_1_0(self, fast):
        """RFC 9112, sections 6.1 and 9.6. HTTP/1.0 has no transfer coding: the close ends the body."""
        for version, coding, fields in [
            ("HTTP/1.1", "chunked", ["Connection: Close"]),
            ("HTTP/1.1", "chunked", ["Connection: ,\t, keep-alive, close ,"]),
            ("HTTP/1.1", "chunked", ["Connection: x", "Connection: close"]),
            ("HTTP/1.0", None, []), ("HTTP/1.0", None, ["Connection: keep-alive"]),
        ]:
            connection = fast.connect()
            connection.send(chat_request(HI, *fields, version=version))
            stream = Stream(connection, fast.pace, "close", coding).read()
            assert connection.at_end(), f"the connection goes on after {version} {fields}"
            stream.check(message="Hi")


class TestEvents:
    """Pace and pings. `check_turn` compares words and times of the chunks with the server's flags."""

    @ours
    def test_the_flags_set_the_pace(self, own):
        message = "one  two\tthree\nfour five,six " * 4
        for words, delay in [(1, 0.005), (50, 0.1), (1, 0.0012345)]:
            flags = ("--chunk-words", str(words), "--chunk-delay", str(delay), "--log", "off")
            turn = own(*flags).turn(message)
            longest = max(len(chunk["text"].split()) for chunk in turn.chunks)
            assert longest == min(words, len(turn.text.split())), "the chunks are shorter than they may be"
            times = [moment(chunk["timestamp"]) for chunk in turn.chunks if chunk["text"]]
            gaps = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(times)]
            assert min(gaps, default=delay) >= delay, "two chunks are closer than the pace"

    @ours
    def test_no_delay_turns_the_pace_off(self, fast):
        turn = fast.turn("word " * 4000)
        assert len(turn.chunks) > 1000 and turn.end["processing_time"] < 10

    @core
    def test_no_chunk_leaves_before_its_timestamp_or_long_after(self, server):
        stream, late = server.chat("word " * 60).read(2), []
        while (event := event_of(stream.read(1).lines[-1]))["type"] == "chunk":
            late.append(time.time() - moment(event["timestamp"]).timestamp())
        # Half of them, since the clock may be set in the meantime.
        assert -0.001 < statistics.median(late) < 1, f"seconds after their timestamps: {late}"
        stream.check(message="word " * 60)

    @core
    @beside
    def test_the_first_chunk_and_a_stop_never_wait(self, silent):
        session, began = new_id(), time.monotonic()
        stream = silent.chat("word " * 100, session_id=session)
        stream.read_until("chunk")
        assert silent.stop(session)
        assert len(stream.check().chunks) == 2, "the turn goes on after a stop"
        assert time.monotonic() - began < 1.9, "something waited for the pace of 2 s"

    @core
    @beside
    def test_pings_come_in_a_silence_and_are_no_part_of_the_log(self, silent):
        def first_gap(session):
            """Seconds from a chunk to the next ping."""
            stream = silent.chat("six words are two chunks, no?", session_id=session)
            before = stream.read_until("chunk")
            stream.read_until("chunk")
            silent.stop(session)
            again = silent.follow(session).read()
            assert again.lines == stream.read().lines, "the two readers got different logs"
            assert not again.connection.pings, "a log that is kept is sent without pings"
            times = [moment(event["timestamp"]) for event in (before, *stream.connection.pings)]
            gaps = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(times)]
            assert len(gaps) > 2 and min(gaps) >= 0.299, f"seconds between pings: {gaps}"
            return gaps[0]
        assert any(first_gap(new_id()) < 0.45 for _ in range(3)), "three first pings came late"


# ---- README, "Turn states"

COUNTERS = ("total_requests", "successful_requests", "failed_requests")
KEPT_NOTHING = [        # what ends a turn and keeps nothing of it, the request, the code that its readers get
    ("a clear", "POST", "/clear", "session_cleared"), ("a delete", "DELETE", "", "session_deleted"),
]


def check_history(server, session, message, turn):
    """A first turn's history is the message and the joined chunks, or nothing where no text had left."""
    kept = [("user", message), ("model", turn.text)] if turn.text else []
    assert server.history(session) == kept, "the history is not what the stream said"
    assert turn.end["message_count"] == len(kept)


def check_balance(before, after, turns=None, failed=None):
    """Total = successful + failed + running."""
    running = after["total_requests"] - after["successful_requests"] - after["failed_requests"]
    assert running >= 0, "a turn is counted twice"
    if "streams" in after:
        assert running == len(after["streams"]), "not as many turns run as the totals say"
    if turns is not None:
        assert after["total_requests"] - before["total_requests"] == turns, f"not {turns} turns more"
        assert after["failed_requests"] - before["failed_requests"] == failed, f"not {failed} failures more"


class TestTurnStates:
    """A turn runs once, apart from its readers, and is complete or has failed. Its end is one step.

    A stop, a clear, a delete, a shutdown, or a window without readers ends it early.
    """

    @core
    def test_a_running_turn_is_seen_and_then_complete(self, server):
        session = new_id()
        stream = server.chat(LONG, session_id=session, turn_id="t")
        number = stream.read_until("chunk", 3)["chunk_number"]
        turn = server.session(session)["latest_turn"]
        check_fields(turn, "turn_id:id state:text message:text started:time chunks:count")
        assert (turn["turn_id"], turn["state"], turn["message"]) == ("t", "running", LONG)
        assert turn["chunks"] >= number and turn["started"] == event_of(stream.lines[0])["timestamp"]
        assert server.is_running(session) and server.history(session) == []
        server.stop(session)
        chunks = len(stream.check().chunks)
        assert server.session(session)["latest_turn"] == turn | {"state": "complete", "chunks": chunks}
        assert not server.is_running(session)

    @core
    def test_one_turn_at_a_time_and_a_turn_id_has_one_message(self, server):
        session = new_id()
        server.turn("first", session_id=session, turn_id="old")
        stream = server.chat(LONG, session_id=session, turn_id="latest").read(3)
        for turn_id, code in [(None, "session_busy"), ("u", "session_busy"),
                              ("old", "turn_id_reused"), ("latest", "turn_id_reused")]:
            refused = {"message": "Hi", "session_id": session, "turn_id": turn_id}
            check_problem(server.request("POST", "/chat/stream", refused), 409, code)
        server.stop(session)
        stream.check()
        check_problem(server.request("POST", "/chat/stream", refused), 409, "turn_id_reused")
        context = server.turn("Hi", session_id=session).status["context_messages"]
        assert context == 4, "a refused turn is in the history, or the stopped one is not"
        elsewhere = server.turn("Hi", session_id=new_id(), turn_id="old")
        assert elsewhere.info["created"], "a turn_id belongs to its session alone"

    @core
    def test_a_stop_ends_the_turn_with_the_text_that_was_released(self, server):
        session, before = new_id(), server.stats()
        readers = [server.chat(LONG, session_id=session), server.follow(session)]
        readers[0].read_until("chunk", 5)
        assert server.stop(session), "the stop found no turn"
        turns = [stream.check() for stream in readers]
        assert turns[0] == turns[1], "the two readers got different turns"
        assert turns[0].end["finish_reason"] == "cancelled" and 5 <= len(turns[0].chunks) < 200
        check_history(server, session, LONG, turns[0])
        assert not server.stop(session), "the second stop found a turn"
        assert server.turn("Hi", session_id=session).status["context_messages"] == 2
        check_balance(before, server.stats(), turns=2, failed=0)

    @core
    def test_a_stop_may_name_the_turn_and_ends_no_other(self, server):
        session = new_id()
        stream = server.chat(LONG, session_id=session, turn_id="t").read(4)
        assert not server.stop(session, turn_id="another"), "a stop with another turn_id ended the turn"
        stream.read(10)
        assert server.stop(session, turn_id="t")
        assert stream.check().end["finish_reason"] == "cancelled"
        stream = server.chat(LONG, session_id=session, turn_id="u").read(4)
        assert not server.stop(session, turn_id="t"), "a late stop ended the next turn"
        assert server.stop(session, turn_id=None)
        assert stream.check().end["finish_reason"] == "cancelled"

    @sessions
    def test_a_stop_may_come_before_the_first_line_is_read_and_before_a_turn(self, server):
        def stop_early(session):
            server.request("POST", "/sessions/new", {"session_id": session})
            assert not server.stop(session), "there was no turn to stop"
            connection = server.connect()
            connection.send(chat_request({"message": LONG, "session_id": session}))
            assert wait_until(lambda: server.stop(session))
            turn = Stream(connection, server.pace).check()
            assert turn.end["finish_reason"] == "cancelled"
            check_history(server, session, LONG, turn)
        in_parallel(stop_early, [new_id() for _ in range(12)])

    @sessions
    def test_a_stop_and_the_end_may_race_but_one_of_them_wins(self, server):
        message, chance = "six words are three chunks, no", random.Random(1)
        takes = server.turn(message).end["processing_time"]
        before = server.stats()

        def race(late):
            session = new_id()
            stream = server.chat(message, session_id=session)
            time.sleep(takes + late)
            now = server.session(session)
            assert now["streaming"] == (now["latest_turn"]["state"] == "running"), "half of the end is shown"
            check_balance(before, server.stats())
            stops = in_parallel(lambda _: server.stop(session), range(2), workers=2)
            turn = stream.check(message=message)
            was_stopped = turn.end["finish_reason"] == "cancelled"
            assert sum(stops) == was_stopped, "not one stop alone was told that it ended the turn"
            assert server.follow(session).check() == turn, "the log changed after the end"
            check_history(server, session, message, turn)
        in_parallel(race, [chance.uniform(-0.03, 0.003) for _ in range(50)])
        check_balance(before, server.stats(), turns=50, failed=0)

    @sessions
    @cases(KEPT_NOTHING)
    @pytest.mark.parametrize("is_running", [True, False], ids=["a turn is running", "no turn is running"])
    def test_a_clear_and_a_delete_end_the_turn_and_keep_nothing(self, server, case, is_running):
        _, method, path, code = case
        session, before, readers = new_id(), server.stats(), []
        server.turn("Hi", session_id=session, turn_id="first")
        if is_running:
            readers = [server.chat(LONG, session_id=session, turn_id="second"), server.follow(session)]
            readers[0].read(4)
        check_fields(server.request(method, f"/sessions/{session}{path}").json, "message:text")
        check_balance(before, server.stats(), turns=1 + is_running, failed=int(is_running))
        now = server.request("GET", f"/sessions/{session}")
        assert {stream.check().end["code"] for stream in readers} <= {code}
        if code == "session_deleted":
            check_problem(now, 404, "session_not_found")
        else:
            assert (now.json["messages"], now.json["latest_turn"], now.json["streaming"]) == ([], None, False)
            check_problem(server.request("GET", f"/sessions/{session}/stream"), 404, "no_turn")
        turns = [server.turn("Another message", session_id=session, turn_id=turn_id)
                 for turn_id in ("first", "second")]        # both ids are free again
        assert turns[0].info["created"] == (code == "session_deleted")
        assert turns[0].status["context_messages"] == 0, "the messages were kept"

    @core
    @beside
    def test_a_turn_without_readers_is_cancelled_after_the_window(self, brisk, silent):
        """A write shows that a reader has left: of a chunk each 0.02 s, or of a ping each 0.3 s."""
        def check(server, window):
            session, before = new_id(), server.stats()
            server.chat(LONG, session_id=session).read(3).abort()
            left = time.monotonic()
            assert wait_until(lambda: not server.is_running(session), 9), "the turn runs on without readers"
            assert time.monotonic() - left > window - 0.1, f"the turn was not given its window of {window} s"
            turn = server.follow(session).check()
            assert turn.end["finish_reason"] == "cancelled"
            check_history(server, session, LONG, turn)
            check_balance(before, server.stats(), turns=1, failed=0)
        check(brisk, 0.7)
        check(silent, 0.5)

    @core
    @beside
    def test_a_reader_that_comes_back_in_time_keeps_the_turn_running(self, brisk):
        session = new_id()
        brisk.chat(LONG, session_id=session).read(4).abort()
        for stay in (0.2, 0.2, 1):      # the last one is longer than the window
            time.sleep(0.3)
            back, other = brisk.follow(session, after=2), brisk.follow(session)
            assert back.read_until("chunk")["chunk_number"] == 3
            other.abort()
            time.sleep(stay)
            assert brisk.is_running(session), "the turn ended although it has a reader"
            back.abort()

    @ours
    @beside
    def test_a_client_that_closed_its_sending_half_is_still_served(self, brisk):
        stream = brisk.chat("word " * 200)
        stream.connection.socket.shutdown(socket.SHUT_WR)
        took = stream.check(message="word " * 200).end["processing_time"]
        assert took > 0.9, "the turn was shorter than the window"

    @core
    @beside
    def test_the_log_of_a_complete_turn_is_kept_beyond_the_window(self, brisk):
        request = {"message": "Hi", "session_id": new_id(), "turn_id": "kept"}
        first, before = brisk.chat(**request).read(), brisk.stats()
        time.sleep(1.2)     # longer than the resume window
        assert brisk.chat(**request).read().lines == first.lines, "a retry ran the turn again"
        check_balance(before, brisk.stats(), turns=0, failed=0)

    @core
    @beside
    def test_a_shutdown_gives_turns_5_seconds_refuses_new_ones_and_ends_with_0(self):
        """README, "Configuration"; of another server only that a turn gets its terminal event."""
        shorter = "assert server.LIMITS['grace'] == 5\nserver.LIMITS['grace'] = 1.5"
        with clocked(delay=0.02, changes=shorter) as server:
            session = new_id()
            readers = [server.chat(LONG, session_id=session), server.follow(session)]
            readers[0].read_until("chunk")
            server.process.terminate()
            signalled = time.monotonic()
            assert wait_until(lambda: not server.is_there()), "it still accepts connections"
            for stream in readers:
                end = stream.check().end
                assert end.get("code", end.get("finish_reason")) in ("server_shutdown", "stop")
            if not OUTSIDE:
                assert end["code"] == "server_shutdown" and 1 < time.monotonic() - signalled < PATIENCE
                assert server.process.wait(PATIENCE) == 0

    @ours
    def test_a_slow_reader_delays_nobody(self, own):
        server, session = own("--chunk-words", "1", "--chunk-delay", "0", "--log", "off"), new_id()
        slow = server.connect(receive_buffer=4096)
        # The answer is 5 MB: more than any socket buffers.
        slow.send(chat_request({"message": "\U0001f600 " * 40_000, "session_id": session}))
        assert wait_until(lambda: server.request("GET", f"/sessions/{session}").status == 200)
        assert server.turn("Hi").end["finish_reason"] == "stop"
        assert wait_until(lambda: not server.is_running(session)), "the turn waits for its slow reader"
        assert server.get("/health")["streaming_connections"] == 1, "the slow reader was not slow"
        quick = server.follow(session).read(100)
        assert Stream(slow, server.pace).read(100).lines == quick.lines, "the slow reader got another log"
        slow.abort()
        quick.abort()


# ---- README, "Operations": send a message again, and resume a stream

@core
class TestCutConnections:
    """A cut does not stop a turn: a client resumes, or sends the same POST again, and the turn runs once."""

    def test_a_cut_at_any_byte_loses_nothing(self, lend):
        server = lend(visiting) if OUTSIDE else lend(running, "--chunk-delay", "0.002", "--log", "off")
        ids = {"message": "Hi there", "session_id": new_id(), "turn_id": new_id()}
        probe = server.connect()
        probe.send(chat_request(ids, "Connection: close"))
        size = len(probe.file.read())
        probe.close()

        def cut(position):
            request = {"message": "Hi there", "session_id": new_id(), "turn_id": new_id()}
            connection = server.connect(cut_after=position)
            connection.send(chat_request(request))
            seen = []
            with contextlib.suppress(Cut):
                for line in connection.lines(connection.read_head()):
                    seen.append(line)
            connection.abort()
            if position % 2:        # resume after every other byte, retry after the others
                chunks = [line for line in seen if event_of(line)["type"] == "chunk"]
                lines = server.follow(request["session_id"], after=len(chunks)).read().lines
                lines[2:2] = chunks
            else:
                lines = server.chat(**request).read().lines
            assert lines[:len(seen)] == seen, "the turn was run again, or its log changed"
            turn = check_turn(lines, **request, **server.pace)
            check_history(server, request["session_id"], request["message"], turn)

        before, positions = server.stats(), [*[0] * 20, *range(1, size, 3)]     # 0: before the answer
        in_parallel(cut, positions, workers=16)
        check_balance(before, server.stats(), turns=len(positions), failed=0)

    def test_a_resumed_stream_has_the_bytes_of_the_latest_turn_without_chunks_1_to_n(self, fast):
        session = new_id()
        fast.turn("an earlier turn", session_id=session)
        lines = fast.chat("one two three four five six seven eight", session_id=session).read().lines
        for after in (None, *range(len(lines)), "007", 999_999_999):
            left = lines[:2] + lines[2:-1][int(after or 0):] + lines[-1:]
            assert fast.follow(session, after).read().lines == left, f"?after={after} has other lines"

    def test_a_resume_goes_on_live_and_leaves_out_chunks_still_to_come(self, server):
        session = new_id()
        stream = server.chat(LONG, session_id=session).read(5)
        resumed = {after: server.follow(session, after) for after in (0, 1, 3, 8, 999_999_999)}
        stream.read_until("chunk", 12)
        server.stop(session)
        lines = stream.read().lines
        for after, reader in resumed.items():
            left = lines[:2] + lines[2:-1][after:] + lines[-1:]
            assert reader.read().lines == left, f"?after={after} has other lines"
            reader.check(after=after)

    @beside
    def test_a_resume_beyond_the_log_gets_the_next_chunk_when_it_is_due(self, silent):
        session = new_id()
        stream = silent.chat("word " * 30, session_id=session)
        stream.read_until("chunk")
        assert silent.session(session)["latest_turn"]["chunks"] == 1, "the second chunk is due in 2 s"
        event = silent.follow(session, after=1).read_until("chunk")
        late = time.time() - moment(event["timestamp"]).timestamp()
        assert event["chunk_number"] == 2 and late < 1.5, f"the next chunk came {late} s late"
        silent.stop(session)

    def test_any_number_of_readers_may_follow_by_a_retry_or_a_resume(self, server):
        session, before = new_id(), server.stats()
        request = {"message": "word " * 60, "session_id": session, "turn_id": "t"}
        readers = [server.chat(**request)]
        for _ in range(2):
            readers[0].read(3)
            readers += [server.chat(**request), server.follow(session)]
        assert OUTSIDE or wait_until(lambda: server.readers(session) == [5])
        turn = readers[0].check(**request)
        for stream in readers:
            assert stream.read().lines == readers[0].lines, "a reader got another log, or a retry ran again"
        after = server.stats()
        check_balance(before, after, turns=1, failed=0)
        assert OUTSIDE or after["total_chunks"] - before["total_chunks"] == len(turn.chunks)
        check_history(server, session, request["message"], turn)

    def test_a_retry_of_an_older_turn_is_the_same_bytes_even_while_another_runs(self, server):
        session = new_id()
        old = {"message": "word " * 100, "session_id": session, "turn_id": "old"}
        stopped = {"message": LONG, "session_id": session, "turn_id": "stopped"}
        first, second = server.chat(**old).read(), server.chat(**stopped).read(5)
        server.stop(session)
        second.read()
        latest = server.chat(LONG, session_id=session, turn_id="latest").read(3)
        before = server.stats()
        for request, stream in ((old, first), (stopped, second)):
            assert server.chat(**request).read().lines == stream.lines, "a retry ran the turn again"
        assert server.is_running(session), "the retry waited for the running turn"
        check_balance(before, server.stats(), turns=0, failed=0)
        assert len(server.history(session)) == 4
        server.stop(session)
        assert latest.check(turn_id="latest").status["context_messages"] == 4

    @ours
    @beside
    def test_the_log_of_a_turn_without_text_is_kept_until_the_next(self, own):
        """The turn was stopped before its first chunk."""
        server = own("--model", "test_protocol:on_command", "--resume-window", "0.3")
        session = new_id()
        silent = {"message": "silent", "session_id": session, "turn_id": "silent"}
        stream = server.chat(**silent).read(2)
        assert server.stop(session)
        stream.read()
        time.sleep(0.6)     # longer than the resume window
        retried, resumed = server.chat(**silent).read(), server.follow(session).read()
        assert retried.lines == resumed.lines == stream.lines, "the log of the stopped turn was not kept"
        reused = server.request("POST", "/chat/stream", silent | {"message": "x"})
        check_problem(reused, 409, "turn_id_reused")
        assert server.turn("echo", session_id=session).status["context_messages"] == 0
        assert server.turn("free again", session_id=session, turn_id="silent").end["message_count"] == 4

    @ours
    @on_linux
    @beside
    def test_nothing_leaks(self, serve):
        server = serve("--chunk-delay", "0.002", "--resume-window", "0.3", "--log", "off")
        server.turn("Hi")
        time.sleep(0.1)
        at_first = server.held()

        def visit(seed):
            cut_after = random.Random(seed).randrange(1, 2000) if seed % 2 else NEVER
            connection = server.connect(cut_after=cut_after)
            connection.send(chat_request({"message": "word " * 30}))
            with contextlib.suppress(Cut):
                list(connection.lines(connection.read_head()))
            connection.abort()
        in_parallel(visit, range(200), workers=16)
        assert wait_until(lambda: server.stats()["streams"] == [])
        assert wait_until(lambda: server.held() <= at_first), "threads or files are left behind"
        stats = server.stats()
        assert (stats["streaming_connections"], stats["successful_requests"]) == (0, 201)


# ---- README, "Operations"

ROUTES = [              # path, what it knows beside OPTIONS
    ("/", "GET HEAD"), ("/health", "GET HEAD"), ("/stats", "GET HEAD"), ("/openapi.json", "GET HEAD"),
    ("/demo", "GET HEAD"), ("/docs", "GET HEAD"), ("/chat/stream", "POST"), ("/sessions", "GET HEAD"),
    ("/sessions/new", "POST"), ("/sessions/{session_id}", "GET HEAD DELETE"),
    ("/sessions/{session_id}/stream", "GET HEAD POST"), ("/sessions/{session_id}/stop", "POST"),
    ("/sessions/{session_id}/clear", "POST"),
]
HEALTH = ("status:text model:text uptime_seconds:count total_requests:count successful_requests:count "
          "failed_requests:count active_sessions:count streaming_connections:count")
STATS = HEALTH + (" average_response_time:number start_time:time total_sessions_created:count "
                  "total_chunks:count total_bytes:count average_chunks_per_stream:number "
                  "time_to_first_chunk:object streams:list framework:text")
RUNNING = "session_id:id turn_id:id started:time chunks:count readers:count client:text"
TOKEN = "s3cret~+/$HOME=="
LISTED = ("session_id:id model:text message_count:count duration_minutes:number created_at:time "
          "last_activity:time streaming:flag")
SESSION = ("session_id:id model:text message_count:count user_messages:count model_messages:count "
           "session_duration_seconds:number created_at:time last_activity:time streaming:flag messages:list "
           "latest_turn:object?")


def allowed(response):
    return set(re.split(r"\s*,\s*", response.headers["allow"])) - {"OPTIONS"}


class TestOperations:
    """Each operation answers exactly the fields that are named. HEAD, OPTIONS and 405 are RFC 9110's."""

    @strict
    @cases(ROUTES)
    def test_options_tells_what_a_path_takes_and_all_else_is_405(self, fast, case):
        path, known = case[0].replace("{session_id}", "nobody"), set(case[1].split())
        response = fast.request("OPTIONS", path)
        assert (response.status, allowed(response)) == (204, known)
        for method in {"GET", "HEAD", "POST", "PUT", "DELETE", "TRACE", "BREW", "get"} - known:
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
    def test_the_root_and_openapi_describe_every_route(self, fast):
        root, api = fast.get("/"), fast.get("/openapi.json")
        check_fields(root, "name:text version:text framework:text model:text features:list endpoints:object")
        assert re.fullmatch(r"3\.2\.\d+", api["openapi"]) and api["info"]["title"] and api["info"]["version"]
        endpoints = [endpoint.partition("?")[0] for endpoint in root["endpoints"].values()]
        listed = {re.sub(r"\{\w+\}", "{session_id}", endpoint) for endpoint in endpoints}
        for path, known in ROUTES:
            if OUTSIDE and path in ("/demo", "/docs"):
                continue
            for method in set(known.split()) - {"HEAD"}:
                assert path == "/" or f"{method} {path}" in listed, f"/ does not list {method} {path}"
                assert method.lower() in api["paths"][path], f"OpenAPI does not describe {method} {path}"
                if path.endswith("/stream"):
                    content = api["paths"][path][method.lower()]["responses"]["200"]["content"]
                    assert content["application/x-ndjson"]["itemSchema"]
        if not OUTSIDE:
            schemas = api["components"]["schemas"]
            assert {kind["$ref"].rpartition("/")[2] for kind in schemas["event"]["oneOf"]} == set(EVENTS)
            limits = json.dumps(api)
            for limit in ('"maxLength": 100000', '"maximum": 999999999', '"not": {"const": "new"}',
                          '"pattern": "^[A-Za-z0-9_-]{1,64}$"'):
                assert limit in limits, f"OpenAPI allows more than the server: {limit}"

    @strict
    @cases(ROUTES)
    def test_no_cache_keeps_an_answer(self, fast, case):
        session = new_id()
        fast.turn("Hi", session_id=session)
        for method in case[1].split():
            answer = fast.request(method, case[0].replace("{session_id}", session))
            is_stream = answer.headers["content-type"] == "application/x-ndjson"
            assert answer.headers["cache-control"] == ("no-cache" if is_stream else "no-store"), method

    @sessions
    def test_a_new_session_has_the_id_and_the_model_that_were_asked_for(self, fast):
        session, model = new_id(), fast.get("/health")["model"]
        for body, expected in [
            (None, {"model": model}), ({"session_id": session}, {"session_id": session, "model": model}),
            ({"model_id": "offline"}, {"model": "offline"}),
        ]:
            made = fast.request("POST", "/sessions/new", body).json
            check_fields(made, "session_id:id model:text timestamp:time")
            assert made | expected == made
            told = fast.session(made["session_id"])
            assert (told["message_count"], told["model"]) == (0, made["model"])
            assert told["created_at"] == made["timestamp"], "made at another time"
            check_problem(fast.request("GET", f"/sessions/{made['session_id']}/stream"), 404, "no_turn")
        taken = fast.request("POST", "/sessions/new", {"session_id": session})
        check_problem(taken, 409, "session_exists")
        body = {"session_id": new_id()}
        answers = in_parallel(lambda _: fast.request("POST", "/sessions/new", body), range(8))
        assert sorted(answer.status for answer in answers) == [200] + 7 * [409], "not one of eight made it"

    @core
    def test_a_session_tells_its_messages(self, fast):
        session = new_id()
        turns = [fast.turn(f"Hello {n}", session_id=session, turn_id=f"turn-{n}") for n in range(2)]
        told = fast.session(session)
        check_fields(told, SESSION)
        for message in told["messages"]:
            check_fields(message, "role:text text:text timestamp:time turn_id:id")
        counts = [told[name] for name in ("message_count", "user_messages", "model_messages")]
        assert (counts, told["session_id"]) == ([4, 2, 2], session)
        messages = [(message["role"], message["text"], message["turn_id"]) for message in told["messages"]]
        assert messages == [
            ("user", "Hello 0", "turn-0"), ("model", turns[0].text, "turn-0"),
            ("user", "Hello 1", "turn-1"), ("model", turns[1].text, "turn-1")]
        assert moment(told["created_at"]) <= moment(told["last_activity"])

    @sessions
    def test_sessions_are_listed_last_active_first(self, fast):
        ours = [new_id() for _ in range(3)]
        for session in (*ours, ours[0]):
            fast.turn("Hi", session_id=session)
        told = fast.get("/sessions")
        check_fields(told, "active_sessions:count sessions:list")
        for session in told["sessions"]:
            check_fields(session, LISTED)
        assert told["active_sessions"] == len(told["sessions"]) == fast.get("/health")["active_sessions"]
        first = [(session["session_id"], session["message_count"]) for session in told["sessions"][:3]]
        assert first == [(ours[0], 4), (ours[2], 2), (ours[1], 2)]

    @sessions
    def test_health_and_stats_count_turns(self, fast):
        deleted = fast.turn("Hi").info["session_id"]
        fast.request("DELETE", f"/sessions/{deleted}")      # it still counts in total_sessions_created
        before = fast.stats()
        turn = fast.turn("Hello " * 20)
        after = fast.stats()
        check_fields(after, STATS)
        check_fields(after["time_to_first_chunk"], "p50:number p95:number")
        check_fields(fast.get("/health"), HEALTH)
        counts = (*COUNTERS, "total_sessions_created", "active_sessions", "total_chunks")
        grown = {name: after[name] - before[name] for name in counts}
        assert grown == dict.fromkeys(counts, 1) | {"failed_requests": 0, "total_chunks": len(turn.chunks)}
        assert after["total_bytes"] > before["total_bytes"] and after["start_time"] == before["start_time"]
        assert after["average_response_time"] > 0 and after["average_chunks_per_stream"] > 0

    @sessions
    def test_stats_have_an_entry_for_each_running_turn_and_head_is_no_reader(self, server):
        session = new_id()
        stream = server.chat(LONG, session_id=session, turn_id="t").read(4)
        connection = server.connect()
        connection.send(http_request("HEAD", f"/sessions/{session}/stream?after=1", *server.fields))
        assert server.response(connection, "HEAD", close=False).status == 200
        [entry] = [each for each in server.stats()["streams"] if each["session_id"] == session]
        check_fields(entry, RUNNING)
        assert (entry["turn_id"], entry["readers"]) == ("t", 1) and entry["chunks"] >= 2
        assert entry["started"] == event_of(stream.lines[0])["timestamp"], "it started at another time"
        assert OUTSIDE or entry["client"] == "127.0.0.1"
        assert server.get("/health")["streaming_connections"] == 1
        listed = {each["session_id"]: each["streaming"] for each in server.get("/sessions")["sessions"]}
        assert listed[session] is True
        server.stop(session)
        stream.check()
        connection.close()
        assert not server.readers(session), "a turn that has ended has an entry"

    @ours
    def test_averages_begin_at_0_and_no_duration_is_negative_if_the_clock_is_set_back(self, serve, tmp_path):
        back = tmp_path / "back"
        setting_back = f"import os, time; now = time.time_ns\n" \
                       f"time.time_ns = lambda: now() - os.path.exists({str(back)!r}) * 5 * 3600 * 10**9"
        server = serve("--chunk-delay", "0.01", changes=setting_back)
        stats = server.stats()
        check_fields(stats, STATS)
        assert [stats[name] for name in (*COUNTERS, "total_chunks")] == [0, 0, 0, 0]
        assert (stats["average_response_time"], stats["average_chunks_per_stream"]) == (0, 0)
        assert stats["time_to_first_chunk"] == {"p50": 0, "p95": 0}
        server.turn("Hi", session_id="s")
        stream = server.chat("word " * 100, session_id="s").read(4)
        back.touch()
        assert stream.check().end["processing_time"] > 0.15
        server.turn("Hi", session_id="s")
        told = server.session("s")
        check_fields(told, SESSION)         # none of its numbers is negative
        check_fields(server.stats(), STATS)
        check_fields(server.stats()["time_to_first_chunk"], "p50:number p95:number")
        check_fields(server.get("/sessions")["sessions"][0], LISTED)
        was_set_back = moment(told["messages"][-1]["timestamp"]) < moment(told["created_at"])
        assert was_set_back, "the clock was not set back"


# ---- README, "Errors"

BAD_IDS = ["", "new", "x" * 65, "a b", "a.b", "a\n", "\u00e4", "\u0663", 5, ["a"]]
BAD_MESSAGES = [None, 5, ["Hi"], "", "\n\t \x1c\x85\u3000\u2028", "\ud800", "a\udfffb", "x" * 100_001]
BAD_BODIES = [          # what is wrong, status, code, requests
    ("no JSON", 400, "invalid_json", [
        http_request("POST", "/chat/stream"), *(chat_request(body) for body in (
            b"", b"{", b"Hello", b"{'message':'Hi'}", b'{"message":"Hi"} x', b'{"message":"Hi",}',
            b'{"message":"a\nb"}', b'{"message":"\xff"}', b'{"message":"\xed\xa0\x80"}'))]),
    ("no object", 400, "invalid_field", [
        chat_request(body) for body in (b"[]", b'[{"message":"Hi"}]', b'"message"', b"null")]),
    ("a bad message", 400, "invalid_field", [
        chat_request({"text": "Hi"}), http_request("POST", "/sessions/bad/stream", body={}),
        *(chat_request({"message": message}) for message in BAD_MESSAGES)]),
    ("a bad session_id", 400, "invalid_field", [
        *(chat_request({"message": "Hi", "session_id": value}) for value in BAD_IDS),
        *(http_request("POST", f"/sessions/{value}/stream", body=HI) for value in (
            "new", "x" * 65, "a%20b", "a%2fb", "%C3%A4")),
        http_request("POST", "/sessions/bad/stream", body={"message": "Hi", "session_id": "other"})]),
    ("a bad turn_id", 400, "invalid_field", [
        *(chat_request({"message": "Hi", "session_id": "bad", "turn_id": value}) for value in BAD_IDS
          if value != "new"),
        chat_request({"message": "Hi", "turn_id": "t"}),
        chat_request({"message": "Hi", "turn_id": "t", "session_id": None})]),
    ("another type", 415, "unsupported_media_type", [
        chat_request(HI, f"Content-Type: {media_type}") for media_type in (
            "text/plain", "application/jsonx", "application/json-patch+json", "json",
            "multipart/form-data; boundary=x")]),
    ("an unknown session", 404, "session_not_found", [
        http_request(method, "/sessions/nobody" + path) for method, path in (
            ("GET", ""), ("GET", "/stream"), ("POST", "/stop"))]),
]
BAD_SESSIONS = [
    ("an unknown session", 404, "session_not_found", [
        http_request("DELETE", "/sessions/nobody"), http_request("POST", "/sessions/nobody/clear")]),
    ("a new session without JSON", 400, "invalid_json", [http_request("POST", "/sessions/new", body=b"{")]),
    ("a new session with a bad field", 400, "invalid_field", [
        http_request("POST", "/sessions/new", body=body) for body in (
            [], {"session_id": "new"}, {"session_id": "a b"}, {"session_id": 5}, {"model_id": 5},
            {"model_id": "-x"}, {"model_id": "a b"}, {"model_id": "x" * 101}, {"model_id": "x\n"})]),
]
BAD_REQUESTS = [
    ("JSON that no parser should take", 400, "invalid_json", [chat_request(body) for body in (
        b'{"message":"Hi","n":NaN}', b'{"message":"Hi","n":' + b"9" * 5000 + b"}", b'{"message":'
        + b"[" * 100_000 + b"]" * 100_000 + b"}", '{"message":"Hi"}'.encode("utf-16"))]),
    ("an unknown path", 404, "not_found", [
        http_request("GET", path) for path in (
            "/nope", "/health/more", "/openapiXjson", "//localhost/health", "/sessions/a/b/stream")]),
]


@contextlib.contextmanager
def told_with(request):
    """A failure tells which request it is about."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"This was the answer to {request[:200]!r}.")
        raise


class TestErrors:
    """Before a stream starts, every error is problem details (RFC 9457), and leaves nothing behind."""

    @pytest.mark.parametrize("case", [
        pytest.param(row, id=row[0], marks=mark) for mark, rows in (
            (core, BAD_BODIES), (sessions, BAD_SESSIONS), (strict, BAD_REQUESTS)) for row in rows])
    def test_a_bad_request_is_refused_and_leaves_nothing_behind(self, fast, case):
        _, status, code, requests = case
        before = fast.get("/health")
        for request in requests:
            connection = fast.connect()
            with contextlib.suppress(ConnectionError):      # it may be refused before it was sent
                connection.send(request)
            with told_with(request):
                check_problem(fast.response(connection), status, code)
        after = fast.get("/health")
        for name in (*COUNTERS, "active_sessions"):
            assert after[name] == before[name], f"a refused request counts in {name}"

    @core
    def test_after_is_one_to_nine_digits(self, fast):
        session = new_id()
        fast.turn("Hi", session_id=session)
        for after in ("", "-1", "+1", "1.5", "x", "0x1", "1234567890", "\u0663", " 1", "1\n"):
            response = fast.request("GET", f"/sessions/{session}/stream?after={quote(after)}")
            check_problem(response, 400, "invalid_field")

    @core
    def test_a_bad_stop_stops_nothing(self, server):
        session = new_id()
        stream = server.chat(LONG, session_id=session).read(3)
        for body, code in [(b"{", "invalid_json"), ([], "invalid_field"), ({"turn_id": 5}, "invalid_field"),
                           ({"turn_id": "a b"}, "invalid_field")]:
            check_problem(server.request("POST", f"/sessions/{session}/stop", body), 400, code)
        stream.read(5)
        assert server.stop(session), "a bad stop ended the turn"

    @ours
    @pytest.mark.parametrize("flags", [(), ("--token", TOKEN)], ids=["no token", "token"])
    def test_the_curl_lines_in_details_work_as_they_stand(self, own, flags):
        needs("curl")
        server, session = own("--chunk-delay", "0.02", *flags), new_id()
        host = "{}:{}".format(*server.address)
        stream, printed = server.chat(LONG, session_id=session).read(3), []
        for media_type, status, code in [
            ("text/plain", 415, "unsupported_media_type"), ("application/json", 409, "session_busy"),
        ]:
            refused = ask(server, "POST", "/chat/stream", f"Content-Type: {media_type}", *server.fields,
                          host=host, body={"message": "Hi", "session_id": session})
            detail = check_problem(refused, status, code)["detail"]
            assert TOKEN not in detail
            line = detail[detail.index("curl"):]
            printed.append(run(["env", f"STREAMCHAT_TOKEN={TOKEN}", "sh", "-c", line], ".").encode())
        check_turn(printed[0].splitlines(keepends=True), **server.pace)
        assert json.loads(printed[1])["stopped"] and stream.check().end["finish_reason"] == "cancelled"


# ---- README, "HTTP/1.1"

def get(*fields, line="GET /health HTTP/1.1"):
    return request_head(line, "Host: localhost", *fields)


def post(*fields, version="HTTP/1.1"):
    return request_head(f"POST /chat/stream {version}", "Host: localhost", *fields)


def lines(*request_lines):
    return [get(line=line) for line in request_lines]


def raw(template, *parts):
    """The template's bytes, with each of these parts at its place."""
    return [template.encode("latin-1").replace(b"?", part.encode("latin-1")) for part in parts]


CODINGS = ("", " ", " gzip", " identity", " chunked, gzip", " chunked, identity", " chunked, chunked",
           " gzip, chunked, chunked", " xchunked", " chunkedx", " chunked;x=1", ' "chunked"', " 'chunked'",
           " chunked gzip", " gzip chunked", " chunked\udca0", "\r\n chunked")    # \udca0 is the byte A0
EXPECT = "Expect: 100-continue"         # the refusal comes instead of `100 Continue`
BAD_HEADS = [           # rule, its source, status, code, requests that break it
    ("a request line is METHOD TARGET VERSION with single spaces", "RFC 9112, section 3", 400, "bad_request",
     lines("Hello", "GET /health", "GET /health HTTP/1.1 ", "GET  /health HTTP/1.1", "GET /health  HTTP/1.1",
           "GET\t/health HTTP/1.1", " GET /health HTTP/1.1", "GET /a b HTTP/1.1", "GET: /health HTTP/1.1")),
    ("a version is HTTP/d.d", "RFC 9112, section 2.3", 400, "bad_request", raw(
        "GET /health ?\r\nHost: localhost\r\n\r\n",
        "HTTP/1", "HTTP/.1", "HTTP/1.10", "HTTP/01.1", "http/1.1", "HTTP/1,1", "HTTP/1.\xb2", "HTTPS/1.1")),
    ("another version is not served", "RFC 9110, section 15.6.6", 505, "version_not_supported", [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        *raw("GET /health HTTP/?\r\nHost: localhost\r\n\r\n", "0.9", "2.0", "3.0")]),
    ("a target is a path or a URL in ASCII", "RFC 9112, section 3.2", 400, "bad_request", lines(
        "GET health HTTP/1.1", "GET /health#x HTTP/1.1", "GET /h\xe9 HTTP/1.1", "GET http:///health HTTP/1.1",
        "GET http://x@localhost/health HTTP/1.1", "GET http://localhost:x/health HTTP/1.1",
        "GET ftp://localhost/health HTTP/1.1", "OPTIONS * HTTP/1.1", "CONNECT localhost:80 HTTP/1.1")),
    ("there is one Host, also beside a URL", "RFC 9112, section 3.2", 400, "bad_request", [
        request_head("GET /health HTTP/1.1"), get("Host: localhost"), get("X: x", "HOST: example.com"),
        request_head("GET http://localhost/health HTTP/1.1"), request_head("BREW /nope HTTP/1.1"),
        request_head("GET /health HTTP/1.0", "Host: a", "Host: a")]),
    ("a Host is a name or an address, and a port", "RFC 9110, section 7.2", 400, "bad_request", [
        request_head("GET /health HTTP/1.0", "Host: a b"), *raw(
            "GET /health HTTP/1.1\r\nHost:?\r\n\r\n",
            "", "\t \t", "a b", "localhost, localhost", "user@localhost", "localhost/", ":80", "localhost:x",
            "localhost:80:80", "localhost:123456", "[::1", "::1", "[]", "[localhost]", "[:::1]", "\xe9")]),
    ("no white space comes before the first field", "RFC 9112, section 2.2", 400, "bad_request", raw(
        "POST /chat/stream HTTP/1.1\r\n?Host: localhost\r\n\r\n",
        " ", "\t", " X: x\r\n", "\tX: x\r\n", " \r\n", "\t\r\n")),
    ("no white space comes before a colon", "RFC 9112, section 5.1", 400, "bad_request", [
        post(field) for field in ("X : x", "X\t: x", "Content-Length : 0", "Transfer-Encoding : chunked")]),
    ("no field has two lines", "RFC 9112, section 5.2", 400, "bad_request", [
        post(field) for field in (
            "X: x\r\n x", "X: x\r\n\tx", "X: x\r\n ", "X:\r\n x", "Content-Length: 1\r\n 0")]),
    ("a field is a name, a colon and a value", "RFC 9110, section 5.1", 400, "bad_request", [
        post(field) for field in ("Hello", ": x", "X x: x", "X(x): x", '"X": x', "X\xe9: x", "\xa0X: x")]),
    ("a length is digits, once", "RFC 9112, section 6.3", 400, "bad_request", [
        post("Content-Length: 0", "Content-Length: 0"),
        post("Content-Length: 0", "X: x", "content-length: 5"),
        post("Content-Length: x", EXPECT), *(post(f"Content-Length:{length}") for length in (
            "", " ", " 1, 1", " 1,1", " 1,", " 1 1", " 1;", " +1", " -1", " -0", " 0x1", " 0o1", " 1_0",
            " 1.0", " 1e1", ' "1"', " \udcb2", " \udcd9\udca1"))]),       # \udcb2 is the byte B2
    ("a transfer coding is known, and the last one", "RFC 9112, section 6.1", 400, "bad_request", [
        post("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        post("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
        *(post(f"Transfer-Encoding:{coding}") for coding in CODINGS),
        post("Transfer-Encoding: chunked", version="HTTP/1.0"),
        post("Transfer-Encoding: gzip, chunked", version="HTTP/1.0")]),
    ("a request has a length or a transfer coding", "RFC 9112, section 11.2", 400, "bad_request", [
        post(*fields) + rest for rest in (b"0\r\n\r\n", b"5\r\nHello\r\n0\r\n\r\n") for fields in (
            ("Content-Length: 5", "Transfer-Encoding: chunked"),
            ("Transfer-Encoding: chunked", "Content-Length: 5"),
            ("Content-Length: 5", "transfer-encoding: Chunked"),
            ("Content-Length: +5", "Transfer-Encoding: chunked"),
            ("Content-Length: 5", "Transfer-Encoding: gzip, chunked"),
            ("Content-Length: 5", "Transfer-Encoding:\r\n chunked"),
            ("Content-Length: 5", "Transfer-Encoding: , chunked"),
            ("Content-Length: 5", "Transfer-Encoding: identity"),
            ("Content-Length: 5", "Content-Length: 0"), ("Content-Length: 5, 0",))]),
    ("a request body needs a length", "RFC 9110, section 15.5.12", 411, "length_required", [
        post(f"Transfer-Encoding:{coding}", EXPECT) for coding in (" chunked", "Chunked", "\t CHUNKED \t")]),
    ("no other coding is served", "RFC 9112, section 6.1", 501, "not_implemented", [
        post(f"Transfer-Encoding: {coding}", EXPECT) for coding in (
            "gzip, chunked", "gzip,Chunked", "x ,\ty , chunked", "gzip\r\nTransfer-Encoding: chunked")]),
    ("no control character stands anywhere", "RFC 9110, section 5.5", 400, "bad_request", [
        each for place in (
            "?GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "GET /?health HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "GET /health HTTP/1.1\r\n?Host: localhost\r\n\r\n",
            "GET /health HTTP/1.1\r\nHost: local?host\r\n\r\n",
            "GET /health HTTP/1.1?\r\nHost: localhost\r\n\r\n",
            "GET /health HTTP/1.1\r\nHost: localhost\r\n?\r\n",
            "GET /health HTTP/1.1\r\nHost: localhost\r\nX: x?Transfer-Encoding: chunked\r\n\r\n",
            "POST /chat/stream HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding:?chunked\r\n\r\n")
        for each in raw(place, "\0", "\x0b", "\x7f", "\r", "\n")]),
    ("CRLF ends a line; an answer comes at once", "RFC 9112, section 2.2", 400, "bad_request", [
        b"GET /health HTTP/1.1\n", b"GET /health HTTP/1.1\nHost: localhost\n\n",
        b"GET /health HTTP/1.1\rHost: localhost\r\r", b"GET /health HTTP/1.1\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\n\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\n",
        b"GET /health HTTP/1.1\n\rHost: localhost\n\r\n\r", b"\r\n\r\n\r\n" + get()]),
    ("another protocol is no request", "README, HTTP/1.1", 400, "bad_request", [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(range(32)),     # the hello of TLS
        b"\xef\xbb\xbf" + get(), b"SSH-2.0-OpenSSH_9.6\r\n\r\n", HI + b"\r\n\r\n"]),
    ("a request line has at most 8 KiB", "RFC 9110, section 15.5.15", 414, "uri_too_long", [
        get(line=f"GET /health?{'x' * (8193 - 23)} HTTP/1.1"), b"x" * 70_000,
        b"GET /" + b"x" * 9000 + b"\0 HTTP/1.1\r\n\r\n"]),
    ("a head has at most 32 KiB and 100 fields", "RFC 6585, section 5", 431, "headers_too_large", [
        get(f"X: {'x' * (32_769 - 46)}"), get(*["X: x"] * 100), b"GET /health HTTP/1.1\r\n" + b"x" * 70_000]),
    ("a body has at most 2 MiB", "RFC 9110, section 15.5.14", 413, "payload_too_large", [
        post(f"Content-Length: {length}", EXPECT) for length in (
            2**21 + 1, 2**32, 2**64, 2**64 + 16, "9" * 5000, "0" * 5000 + str(2**21 + 1))]),
    ("the type is checked before the body is read", "README, Errors", 415, "unsupported_media_type", [
        post("Content-Length: 16", "Content-Type: text/plain", EXPECT)]),
    ("the path is checked before the body is read", "README, Errors", 404, "not_found", [
        get("Content-Length: 16", EXPECT, line=line) for line in (
            "POST /nope HTTP/1.1", "BREW /nope HTTP/1.1")]),
    ("the method is checked before the body is read", "README, Errors", 405, "method_not_allowed", [
        get("Content-Length: 16", EXPECT, line="PUT /chat/stream HTTP/1.1")]),
]
TCHARS = {*b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"}
PLACES = [              # what a byte is a part of, bytes before and after it, which bytes may stand there
    ("method", b"G", b"T /health HTTP/1.1\r\nHost: localhost\r\n\r\n", TCHARS),
    ("target", b"GET /health?", b" HTTP/1.1\r\nHost: localhost\r\n\r\n", {*range(0x21, 0x7f)} - {*b"#"}),
    ("field name", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX", b"X: x\r\n\r\n", TCHARS | {*b":"}),
    ("field value", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: x", b"x\r\n\r\n",
     {9, *range(32, 256)} - {127}),
]
QUICK = """
limits = server.LIMITS
assert (limits["head_time"], limits["body_time"], limits["idle"], limits["send"]) == (10, 30, 60, 30)
limits.update(head_time=0.6, body_time=1.2, idle=1.5)
"""
SLOW_REQUESTS = [       # name, bytes at once, bytes that drip, status (None: a close), after how many s
    ("a head that lacks its last line", get()[:-2], b"", 408, 0.6),
    ("a first line that drips", b"G", b"ET /" + b"x" * 100, 408, 0.6),
    ("a body that does not come", post("Content-Length: 16"), b"", 408, 1.2),
    ("a body that drips", post("Content-Length: 1000") + b"{", b" " * 500, 408, 1.2),
    ("no request", b"", b"", None, 1.5),
    ("empty lines alone", b"\r\n\r\n", b"", None, 1.5),
]


def send_slowly(connection, at_once, slowly, pause):
    """Send bytes at once and others slowly, until the server answers or closes. Returns the seconds."""
    began, rest = time.monotonic(), iter(slowly)
    connection.send(at_once)
    connection.socket.settimeout(pause)
    while time.monotonic() < connection.end:
        try:
            connection.socket.recv(1, socket.MSG_PEEK)
            break
        except TimeoutError:
            connection.send(bytes(itertools.islice(rest, 1)))
    connection.socket.settimeout(PATIENCE)
    return time.monotonic() - began


def check_overloaded(response):
    """RFC 9110, section 15.6.4."""
    check_problem(response, 503, "overloaded")
    assert re.fullmatch("[0-9]+", response.headers["retry-after"])


@strict
class TestHttp:
    """RFC 9110 and RFC 9112 to the letter. A bad head is answered once, and ends the connection."""

    @cases(BAD_HEADS)
    def test_a_bad_head_is_answered_once_and_closes_however_the_network_splits_it(self, fast, case):
        _, _, status, code, requests = case
        before = fast.get("/health")
        for request in requests:
            more = request + chat_request({"message": "smuggled"})
            for parts in ([request], [more], parts_of(more, 300)):
                connection = fast.connect()
                for part in parts:
                    connection.send(part)
                response = fast.response(connection, close=False)
                with told_with(request):
                    check_problem(response, status, code)
                    assert response.headers["connection"] == "close" and connection.at_end()
                connection.close()
        assert fast.get("/health")["total_requests"] == before["total_requests"], "a turn was smuggled in"

    @cases(PLACES)
    def test_each_byte_may_stand_only_where_the_grammar_allows_it(self, fast, case):
        """RFC 9110, sections 5.5 and 5.6.2; RFC 9112, section 3.2."""
        _, start, end, allowed = case
        for byte in range(256):
            [response] = fast.answers(start + bytes([byte]) + end)
            assert (response.status != 400) == (byte in allowed), (byte, response)

    def test_100_continue_is_sent_only_after_the_head_passed_its_checks(self, fast):
        """RFC 9110, section 10.1.1. (No refused request of the tables gets one.)"""
        connection = fast.connect()
        connection.send(post("Expect: 100-Continue", f"Content-Length: {len(HI)}"))
        assert connection.read_head().status == 100
        connection.send(HI)
        Stream(connection, fast.pace).check(message="Hi")

    def test_an_error_for_head_has_no_body(self, fast):
        """RFC 9110, section 9.3.2."""
        connection = fast.connect()
        for request, status in [
            (http_request("HEAD", "/nope"), 404), (request_head("HEAD /health HTTP/1.1"), 400),
        ]:
            connection.send(request)
            assert fast.response(connection, "HEAD", close=False).status == status
        assert connection.at_end(), "the error has a body"

    def test_a_request_cut_short_starts_nothing(self, fast):
        request, before = chat_request(HI + b"   "), fast.get("/health")
        for size in range(len(request)):
            assert [response.status for response in fast.answers(request[:size])] in ([], [400])
        assert fast.get("/health")["total_requests"] == before["total_requests"], "a turn was started"

    def test_a_late_byte_does_not_cut_an_answer_that_ends_the_connection(self, fast):
        """RFC 9112, section 9.6."""
        for version, fields in [("HTTP/1.1", ["Connection: close"]), ("HTTP/1.0", [])]:
            message, connection = "word " * 500, fast.connect(receive_buffer=4096)
            connection.send(chat_request({"message": message}, *fields, version=version))
            connection.file.peek(1)
            connection.send(b"\r\n")
            time.sleep(0.1)
            check_turn(list(connection.lines(connection.read_head())), message=message, **fast.pace)
            assert connection.at_end()

    @pytest.mark.parametrize("pause", [0, 0.005])
    def test_an_answer_arrives_whole_while_the_client_still_sends(self, fast, pause):
        """RFC 9112, section 9.6: a close that leaves bytes unread would reset the connection."""
        for request, status, code in [
            (post(f"Content-Length: {3 << 20}"), 413, "payload_too_large"),
            (post("Transfer-Encoding: chunked"), 411, "length_required"),
        ]:
            connection = fast.connect()
            connection.send(request)
            for _ in range(48):
                connection.send(bytes(1 << 16))
                time.sleep(pause)
            check_problem(fast.response(connection, close=False), status, code)
            assert connection.at_end()

    @ours
    @beside
    def test_a_request_must_be_whole_in_time_however_it_drips(self, own):
        """The true limits are 10, 30 and 60 s (.ci/soak waits for them)."""
        server = own("--log", "off", changes=QUICK)

        def check(row):
            (name, at_once, slowly, status, seconds), is_first = row
            connection = server.connect()
            if not is_first:
                connection.send(http_request("GET", "/health"))
                server.response(connection, close=False)
            took = send_slowly(connection, at_once, slowly, 0.05)
            if status:
                check_problem(server.response(connection, close=False), status, "request_timeout")
            assert connection.at_end()
            assert seconds - 0.1 < took < seconds + 5, f"{name}: after {took:.1f} s, not {seconds} s"
        in_parallel(check, itertools.product(SLOW_REQUESTS, (True, False)), workers=12)
        long_body = "server.LIMITS.update(head_time=0.4, body_time=9)"
        connection = own(*SERVERS["fast"], changes=long_body).connect()
        took = send_slowly(connection, post("Content-Length: 24"), HI + b" " * 8, 0.03)
        assert server.response(connection).status == 200 and took > 0.6, "the body has a time of its own"

    @ours
    def test_past_max_connections_a_new_one_is_refused_and_the_others_are_served(self, own):
        server = own("--max-connections", "8", "--chunk-delay", "0")
        kept = [server.connect() for _ in range(8)]
        for request in (b"", chat_request(HI)):
            ninth = server.connect()
            ninth.send(request)
            check_overloaded(server.response(ninth, close=False))
            assert ninth.at_end()
        for connection in kept:
            connection.send(chat_request(HI))
            check_turn(Stream(connection, server.pace).read().lines, message="Hi", **server.pace)
        for connection in kept:
            connection.close()
        assert wait_until(lambda: server.request("GET", "/health").status == 200)

    @ours
    def test_past_the_limit_of_sessions_a_new_one_is_refused_and_none_is_thrown_out(self, serve):
        """The true limit is 10,000 (.ci/soak makes them)."""
        few = "assert server.LIMITS['sessions'] == 10_000\nserver.LIMITS['sessions'] = 20"
        server = serve("--chunk-delay", "0", changes=few)
        for number in range(20):
            assert server.request("POST", "/sessions/new", {"session_id": f"s-{number}"}).status == 200
        news = [("/sessions/new", {}), ("/chat/stream", {"message": "Hi"}),
                ("/chat/stream", {"message": "Hi", "session_id": "one-more"})]
        for path, body in news:
            check_overloaded(server.request("POST", path, body))
        assert server.turn("Hi", session_id="s-0").info["created"] is False, "a session was thrown out"
        for number, (path, body) in enumerate(news, 1):
            assert server.request("DELETE", f"/sessions/s-{number}").status == 200
            assert server.request("POST", path, body).status == 200, "no room after a delete"
            check_overloaded(server.request("POST", path, {"message": "Hi"}))
        assert server.get("/health")["active_sessions"] == 20


# ---- README, "Access control"

BEARER = f"Authorization: Bearer {TOKEN}"
STRANGER = "evil.example"
FRIEND = "https://app.example:8443"     # the origin of a page that --allow-origin names
OPEN_PATHS = ("/", "/health", "/demo", "/docs", "/openapi.json")
EVERYTHING = [          # path, method; the last four paths are unknown
    (path.replace("{session_id}", "nobody"), method) for path, known in [
        *ROUTES, ("/nope", "GET"), ("/debug", "GET"), ("/health/", "GET"), ("/stats/../health", "GET")]
    for method in (*known.split(), "OPTIONS", "PUT", "BREW")]
BAD_TOKENS = [          # field lines
    [], ["Authorization:"], [BEARER, BEARER], [BEARER, "Authorization: Bearer x"],
    *([f"Authorization: {value}"] for value in (
        "Bearer", TOKEN, f"Bearer{TOKEN}", f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x",
        f"Bearer {TOKEN.upper()}", f"Bearer {TOKEN}, Bearer {TOKEN}", f"Bearer {TOKEN}\u00e9")),
]
FIRST_FAULTS = [        # with a token?, Host, field lines; status and code of the first fault of several
    (False, STRANGER, ["no colon", "Origin: http://x.example"], 400, "bad_request"),
    (False, STRANGER, ["Origin: http://x.example"], 403, "forbidden_host"),
    (False, "localhost", ["Origin: http://x.example"], 403, "forbidden_origin"),
    (True, STRANGER, ["no colon", "Origin: http://x.example"], 400, "bad_request"),
    (True, STRANGER, ["Origin: http://x.example"], 403, "forbidden_origin"),
    (True, STRANGER, [], 401, "unauthorized"),
]
ALLOWED = ("--allow-host", "chat.example.com", "--allow-host", "Other.Example")
HOSTS = [               # the server's flags, status, Hosts
    ("a loopback name or address", (), 200, [
        "LocalHost", "localhost:65535", "127.0.0.1", "127.9.9.9:1", "127.255.255.255", "[::1]", "[::1]:80"]),
    ("another name or address", (), 403, [
        STRANGER, "localhost.evil.example", "127.0.0.1.evil.example", "evil-localhost", "localhost-evil:80",
        "localhost%2eevil.example", "0.0.0.0", "10.0.0.1:8000", "128.0.0.1", "2130706433", "[::2]:80",
        "[::ffff:10.0.0.1]"]),
    ("an allowed name", ALLOWED, 200, [
        "chat.example.com", "CHAT.Example.com:8443", "other.example", "localhost"]),
    ("a name like an allowed one", ALLOWED, 403, [
        "x.chat.example.com", "chat.example.com.evil.example", "example.com"]),
]
OWN_ORIGINS = [         # Host, Origin
    ("localhost", "https://localhost"), ("localhost:80", "http://localhost"),
    ("127.0.0.1:443", "https://127.0.0.1"), ("[::1]:8000", "https://[::1]:8000"),
]
OTHER_ORIGINS = [       # field lines; the Host is localhost:8000
    *([f"Origin: {origin}"] for origin in (
        "", "null", "http://evil.example", "http://localhost", "http://localhost:80000",
        "localhost:8000", "http://x.localhost:8000", "ftp://localhost:8000", "http://localhost:8000/",
        "http://x@localhost:8000", "http://localhost:8000 http://evil.example", FRIEND)),
    ["Origin: http://localhost:8000"] * 2, ["Origin: http://localhost:8000", "Origin: http://evil.example"],
]
READABLE = [            # status; method, path and field lines; body
    (200, ("GET", "/stats", BEARER), None), (200, ("POST", "/chat/stream", BEARER), HI),
    (200, ("HEAD", "/health"), None), (204, ("OPTIONS", "/chat/stream"), None),
    (401, ("POST", "/chat/stream"), HI), (404, ("GET", "/nope", BEARER), None),
    (413, ("POST", "/chat/stream", BEARER, "Content-Length: 9999999"), None),
]


def ask(server, method, path, *fields, host="localhost", body=None):
    """One request as anybody may send it: without the server's token, and with any Host."""
    connection = server.connect()
    connection.send(http_request(method, path, *fields, body=body).replace(b"localhost", host.encode(), 1))
    return server.response(connection, method)


def readers_of(headers):
    """The origin whose pages may read an answer, if any."""
    names = [name for name in headers if name.startswith("access-control-")]
    if not names:
        return None
    assert "origin" in headers["vary"].lower()
    assert headers["access-control-expose-headers"].lower() == "retry-after"
    return headers["access-control-allow-origin"]


@strict
@ours
class TestAccessControl:
    """A bearer token (RFC 6750), or loopback names alone (RFC 9110, 7.2); no foreign pages (RFC 6454)."""

    @pytest.fixture
    def guarded(self, own):
        origins = ("--allow-origin", FRIEND, "--allow-origin", "null")
        return own("--token", TOKEN, "--chunk-delay", "0.02", *origins)

    def test_without_the_token_a_request_is_401(self, guarded):
        for fields in BAD_TOKENS:
            response = ask(guarded, "GET", "/stats", *fields)
            check_problem(response, 401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"

    def test_with_the_token_and_on_the_open_paths_all_is_as_without_one(self, guarded, fast):
        for path, method in EVERYTHING:
            status = fast.request(method, path).status
            is_open = path in OPEN_PATHS or method == "OPTIONS"
            for fields in [BEARER], [f"authorization: bEARER {TOKEN}"], *([[]] if is_open else []):
                assert ask(guarded, method, path, *fields).status == status, (method, path, fields)
        guarded.turn("Hi")

    def test_the_first_check_that_fails_answers_on_every_path_and_method(self, guarded, fast):
        """Head, Host, Origin, token; all before path, method and body. The body is not read."""
        for (path, method), (has_token, host, fields, status, code) in itertools.product(
                EVERYTHING, FIRST_FAULTS):
            if code == "unauthorized" and (path in OPEN_PATHS or method == "OPTIONS"):
                continue
            server = guarded if has_token else fast
            connection = server.connect()
            request = request_head(f"{method} {path} HTTP/1.1", f"Host: {host}", *fields,
                                   "Transfer-Encoding: chunked", "Content-Type: text/plain")
            connection.send(request + http_request("GET", "/health", BEARER))
            response = server.response(connection, method, close=False)
            assert response.status == status, (method, path, fields)
            if method != "HEAD":
                check_problem(response, status, code)
            assert connection.at_end(), f"the body of {method} {path} was read as a request"
            connection.close()

    @cases(HOSTS)
    def test_a_host_is_a_loopback_one_or_allowed(self, own, case):
        _, flags, status, hosts = case
        server = own("--chunk-delay", "0", *flags)
        for host in hosts:
            for fields in ([], [f"Origin: http://{host.lower()}"]):
                response = ask(server, "GET", "/health", *fields, host=host)
                assert response.status == status, (host, fields)
                assert status == 200 or response.json["code"] == "forbidden_host"

    def test_the_host_of_the_target_counts_and_http_1_0_is_checked_too(self, fast, guarded):
        for request, code in [
            (get(line="GET http://evil.example/health HTTP/1.1"), "forbidden_host"),
            (get(line="GET http://evil.example HTTP/1.1"), "forbidden_host"),
            (request_head("GET /health HTTP/1.0", "Host: evil.example"), "forbidden_host"),
            (request_head("GET /health HTTP/1.0", "Origin: http://localhost"), "forbidden_origin"),
        ]:
            [response] = fast.answers(request)
            check_problem(response, 403, code)
        assert ask(guarded, "GET", "/health", host=STRANGER).status == 200, "with a token any Host is served"

    def test_the_servers_own_origin_is_served_and_any_other_refused(self, fast):
        for host, origin in OWN_ORIGINS:
            response = ask(fast, "POST", "/sessions/new", f"Origin: {origin}", host=host)
            assert response.status == 200, f"{origin} is refused at {host}"
            assert readers_of(response.headers) is None
        before = fast.stats()
        for fields in OTHER_ORIGINS:
            response = ask(fast, "POST", "/chat/stream", *fields, host="localhost:8000", body=HI)
            check_problem(response, 403, "forbidden_origin")
            assert readers_of(response.headers) is None
        assert fast.stats()["total_requests"] == before["total_requests"], "a foreign page started a turn"

    def test_an_allowed_origin_may_read_every_answer_and_one_like_it_none(self, guarded, own):
        for status, (method, path, *fields), body in READABLE:
            response = ask(guarded, method, path, *fields, f"Origin: {FRIEND}", body=body)
            assert (response.status, readers_of(response.headers)) == (status, FRIEND)
            assert readers_of(ask(guarded, method, path, *fields, body=body).headers) is None
        response = ask(guarded, "GET", "/stats", BEARER, "Origin: null")
        assert (response.status, readers_of(response.headers)) == (200, "null")
        without_token = own("--chunk-delay", "0", "--allow-origin", FRIEND)
        assert readers_of(ask(without_token, "GET", "/stats", f"Origin: {FRIEND}").headers) == FRIEND
        for origin in ("https://app.example", "http://app.example:8443", FRIEND + ".evil.example",
                       "https://x.app.example:8443"):
            refused = ask(guarded, "GET", "/stats", BEARER, f"Origin: {origin}")
            check_problem(refused, 403, "forbidden_origin")
            assert readers_of(refused.headers) is None

    def test_a_preflight_tells_what_a_page_may_send(self, guarded):
        """Fetch Standard, section 3.2: without the token, the browser asks what a page may send."""
        asked = ("Access-Control-Request-Method: DELETE", "Access-Control-Request-Headers: authorization")
        response = ask(guarded, "OPTIONS", "/sessions/nobody", f"Origin: {FRIEND}", *asked)
        assert (response.status, readers_of(response.headers)) == (204, FRIEND)
        methods, fields, age = (response.headers["access-control-" + name]
                                for name in ("allow-methods", "allow-headers", "max-age"))
        assert {"GET", "DELETE"} <= set(methods.split(", "))
        assert set(fields.lower().split(", ")) == {"authorization", "content-type"} and int(age) > 0

    @beside
    def test_the_token_is_never_shown(self, serve):
        shown = subprocess.run(
            [sys.executable, str(SERVER), "--help"], env=environment(STREAMCHAT_TOKEN=TOKEN),
            capture_output=True, check=True, encoding="utf-8").stdout
        server = serve("--token", TOKEN, "--chunk-delay", "0", "--debug")
        server.turn("Hi")
        check_problem(ask(server, "GET", f"/nope?{TOKEN}", BEARER), 404, "not_found")
        check_problem(ask(server, "GET", "/stats", f"Authorization: Basic {TOKEN}"), 401, "unauthorized")
        check_problem(ask(server, "GET", "/stats", BEARER, "no colon"), 400, "bad_request")
        paths = ("/", "/health", "/stats", "/debug", "/openapi.json")
        told = [server.request("GET", path).body.decode() for path in paths]
        server.end("terminate")
        for text in (shown, *told, server.log()):
            assert TOKEN not in text


# ---- What the README shows, and its "Example clients": run as they stand, except for the address

URL = "http://127.0.0.1:8000"       # the address in the README
TEXT = "Hello \u2028 caf\u00e9 \U0001f600, one two three"
INSTANT = SERVERS["instant"]
CALM = ("--chunk-delay", "0.05", "--log", "off")      # LONG takes 25 s: longer than PATIENCE
VARIED = ["uptime_seconds", "average_response_time", "total_bytes", "p50", "p95", "duration_minutes",
          "session_duration_seconds", "processing_time"]      # their numbers differ from run to run
BYTE_BY_BYTE = [Fault(split=True, delay=0.0002)]


def line_of(kind, **fields):
    return json.dumps({"type": kind, **fields}).encode() + b"\n"


def stream_of(*lines):
    """The bytes of an answer with these lines, without a transfer coding."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n" + b"".join(lines)


def coded(*lines):
    """The same in transfer chunks, one for each line."""
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(line), line) for line in (*lines, b""))
    return stream_of().replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n") + chunks


def refusal(status, *fields, body=b'{"detail":"This is refused.","code":"so"}'):
    head = [f"HTTP/1.1 {status} No", f"Content-Length: {len(body)}", "Connection: close", *fields, "", ""]
    return "\r\n".join(head).encode() + body


def page_of(value):
    return refusal(200, body=json.dumps(value).encode())


INFO, OTHER_INFO = (line_of("session_info", session_id="s-1", turn_id="t-1", model="offline", created=True,
                            timestamp=time) for time in ("1", "2"))
STATUS = line_of("status", message="Generating response...", context_messages=0)
WORDS = ["Caf\u00e9 \u2028", "\U0001f600 two \x1b\n", ""]
CHUNKS = [line_of("chunk", text=text, chunk_number=number) for number, text in enumerate(WORDS, 1)]
COMPLETE = line_of("complete", finish_reason="stop", total_chunks=3)
TURN = [INFO, STATUS, *CHUNKS, COMPLETE]
SHUTDOWN = line_of("error", code="server_shutdown", message="The server stops.", retryable=True)


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


def run(command, folder, variables=()):
    """Run a program in a folder, and return what it printed."""
    done = subprocess.run(command, cwd=folder, env=environment(**dict(variables)), stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=60, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cut_once(cuts):
    """The faults where a client gets the answer that was cut when it tries again."""
    return itertools.chain.from_iterable((Fault(cut=cut), Fault()) for cut in cuts)


def places_to_cut(server, step):
    """Every `step`th byte of an answer to TEXT, and each end of a transfer chunk, where a cut looks clean.

    The last place leaves out only the newline of the terminal event. The number in `processing_time` may be
    shorter next time, so no other place is as near to the end.
    """
    connection = server.connect()
    ids = {"session_id": new_id(), "turn_id": new_id()}
    connection.send(chat_request({"message": TEXT, **ids}, "Connection: keep-alive"))
    connection.socket.shutdown(socket.SHUT_WR)
    answer = connection.file.read()
    connection.close()
    end = answer.rindex(b"}\n") - 8
    clean = {match.end() for match in re.finditer(b"\r\n", answer[:end])}
    return [*sorted({*range(0, end, step)} | clean), b"\n\r\n0\r\n"]


def check_kept(server, turns):
    """Each of (session, text that the client showed) is in the history, once, as it was shown."""
    for session, shown in turns:
        history = server.history(session)
        assert [role for role, _ in history] == ["user", "model"], history
        assert history[1][1] == shown


def masked(text):
    """What a server prints, without what differs from run to run."""
    with contextlib.suppress(ValueError):       # one JSON object: the README breaks its lines
        text = json.dumps(json.loads(text), sort_keys=True)
    for pattern, name in [(TIME.pattern, "TIME"), (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID"),
                          (rf'"({"|".join(VARIED)})": ?[0-9.]+', r'"\1":NUMBER'),
                          (r"(?m)^Date: .*$", "DATE"), (r"(?m)^[0-9a-f]+\r\n(?=\{)", "SIZE")]:
        text = re.sub(pattern, name, text)
    return text.strip()


@ours
class TestReadme:
    """What the README shows is what the server does."""

    @beside
    def test_the_exchange_byte_by_byte(self, serve):
        text = README.read_text("utf-8")
        request, answer = re.findall(r"^```http\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        head, _, body = answer.partition("\n\n")
        shown = head.replace("\n", "\r\n") + "\r\n\r\n"
        for row in body.splitlines():       # its ends of lines are written out
            text = re.sub(r"(\\n)?(\\r\\n)+$", "", row)
            shown += text + row[len(text):].replace("\\r", "\r").replace("\\n", "\n")
        for size, line in re.findall(r"\r\n([0-9a-f]+)\r\n(\{.*\n)", shown):
            assert int(size, 16) == len(line) or "NUMBER" in masked(line), f"{size} is not the size of {line}"
        connection = serve().connect()
        connection.send(request.rstrip("\n").replace("\n", "\r\n").encode())
        sent = b""
        while not sent.endswith(b"\r\n0\r\n\r\n"):
            sent += connection.take(1)
        connection.close()
        assert masked(sent.decode()) == masked(shown)

    @beside
    def test_its_commands_print_what_it_shows(self, serve):
        needs("curl")
        story = serve()
        story.turn("Hi!", session_id="demo", turn_id="t-1")
        text = README.read_text("utf-8")
        commands = re.findall(r"^\$ (curl .*)\n((?:.*\n)*?)(?=```$|\$ )", text, re.MULTILINE)
        assert len(commands) == 10
        for command, shown in commands:
            # These two have a server of their own: they are no part of the story.
            server = serve() if "/chat/stream" in command or "/stop" in command else story
            stream = server.chat(LONG, session_id="demo").read(3) if "/stop" in command else None
            command = replaced(command, ("curl", "curl -sS"), ("localhost:8000", url_of(server)))
            assert masked(run(["sh", "-c", command], ".")) == masked(shown)
            assert not stream or stream.check().end["finish_reason"] == "cancelled"

    @beside
    def test_every_link_flag_and_code_is_there(self, instant):
        text = README.read_text("utf-8")
        headings = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
                    for heading in re.findall("^##+ (.*)$", text, re.MULTILINE)}
        links = re.findall(r"\]\(#([^)]+)\)", text)
        assert len(links) > 30 and set(links) <= headings
        said = run([sys.executable, SERVER, "--help"], ".", {"COLUMNS": "1000"})
        for flag, default in re.findall(r"(--[a-z-]+) N .*\(default: (.*)\)", said):
            assert f"| `{flag}` | {default} |" in text or f"`, `{flag}` | `127.0.0.1`, `{default}` |" in text
        flags = {*re.findall("--[a-z-]+", said)} - {"--help"}
        assert len(flags) == 15 and not [flag for flag in flags if f"`{flag}`" not in text]
        told = set(re.findall(r"`(\w+)`", text.partition("\n## Errors\n")[2]))
        schemas = instant.get("/openapi.json")["components"]["schemas"]
        for kind in ("problem", "error"):
            assert set(schemas[kind]["properties"]["code"]["enum"]) <= told

    @beside
    def test_the_client_in_scripts_and_as_a_library(self, instant, tmp_path):
        client = (f"python3 {CLIENT.name}", f"{sys.executable} {CLIENT} --url {url_of(instant)}")
        printed = run(["sh", "-ec", replaced(block("sh", "# scripts.sh"), client)], tmp_path)
        assert (tmp_path / "answer.txt").read_text("utf-8").startswith("You said: Why is the sky blue?\n")
        pattern = "You said: Sum this up:\nYou said: Why .*You said: And in one .*[45]\n"
        assert re.fullmatch(pattern, printed, re.DOTALL)
        # The program that the client's first lines show.
        first_lines = CLIENT.read_text("utf-8").partition("\nThe answer")[0]
        program = textwrap.dedent(first_lines[first_lines.index("    from streamchat_client "):])
        program = replaced(program, (URL, url_of(instant)))
        printed = run([sys.executable, "-c", program], tmp_path, {"PYTHONPATH": CLIENT.parent})
        assert printed.startswith("You said: Hello!\n")


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


class Shown(NamedTuple):
    """A turn of an example client."""
    session: str
    text: str           # what it showed
    said: str           # of an error
    pauses: list        # in seconds; the tests do not wait for them


def in_javascript(url):
    """The README's program in JavaScript for this server, without its pauses."""
    seconds = "Math.max(pause, Math.min(60, asked))"
    pause = (f"1000 * {seconds}", f"globalThis.pause({seconds})")
    text = replaced(block("js", "// chat.mjs"), (f'"{URL}"', f'"{url}"'), pause)
    return text.partition("\nconst session")[0] + "export {chat};\n"


def chat_in_javascript(url, count, folder):
    """Send TEXT in `count` sessions by the README's program in JavaScript."""
    node = needs("node")
    (folder / "chat.mjs").write_text(in_javascript(url), "utf-8")
    given = f'import {{chat}} from "./chat.mjs"; const count = {count}, text = {json.dumps(TEXT)};'
    (folder / "many.mjs").write_text(f"{given}{MANY_TURNS}process.stdout.write(JSON.stringify(turns));")
    return [Shown(*turn) for turn in json.loads(run([node, "many.mjs"], folder))]


def chat_in_python(url, count, folder):
    """The same by the README's program in Python."""
    program, turns = types.ModuleType("chat"), []
    exec(compile(block("python", "# chat.py"), "chat.py", "exec"), vars(program))
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


def instead(*answers):
    return [Fault(instead=answer) for answer in answers]


NO_LUCK = {"message": "No such luck.", "code": "x"}
UNKNOWN = line_of("unknown", chunk_number=9, total_chunks=9, retryable=False)
AGAIN = "\n[The turn was run again. The text above is dropped.]\n"
GIVES_UP = "a ninth cut without any text"
FATES = [               # what happens, the answers to all tries, what the client shows (None: a whole answer)
    ("transient failures", [
        *instead(*(refusal(status) for status in (408, 429, 502, 503, 504))),
        *instead(stream_of(line_of("error", **NO_LUCK, retryable=True))),
        *instead(stream_of(INFO, CHUNKS[1], line_of("complete", finish_reason="stop", total_chunks=0))),
        *instead(stream_of(INFO, COMPLETE)),        # the last chunks are missing
        Fault()], None),
    ("a reset", [Fault(cut=900, reset=True), Fault()], None),
    ("another run", [*instead(stream_of(INFO, STATUS, CHUNKS[0], CHUNKS[1][:-9])), Fault()], None),
    ("each new chunk gives eight more tries", [
        *8 * [Fault(cut=b'"chunk_number":2,')], *8 * [Fault(cut=b'"chunk_number":3,')], Fault()], None),
    (GIVES_UP, 9 * [Fault(cut=0)], "Refused: No whole answer after 8 retries."),
    ("a pause of 7 s", [*instead(refusal(503, "Retry-After: 7")), Fault()], None),
    ("a pause of an hour", [*instead(refusal(503, "Retry-After: 3600")), Fault()], None),
    *((f"status {status}", instead(refusal(status)), 'Refused: {"detail":"This') for status in (409, 500)),
    ("a final error", instead(stream_of(line_of("error", **NO_LUCK, retryable=False))), "Refused: No such"),
    *((f"{line} for an event", instead(stream_of(line + b"\n")), "Refused: ")
      for line in (b"<html>", b"null", b"[1]", b"1")),
    ("a stop", instead(stream_of(line_of("complete", finish_reason="cancelled", total_chunks=0))),
     " [cancelled]"),
    ("unknown events and blank lines", instead(stream_of(
        UNKNOWN, INFO, b"\n", UNKNOWN, STATUS, *CHUNKS, UNKNOWN, COMPLETE)), "".join(WORDS)),
]


@ours
@pytest.mark.parametrize("chat", [chat_in_python, chat_in_javascript])
class TestExampleClients:
    """Both programs of the README show each answer once and whole (README, "Client recipe")."""

    @beside
    def test_a_cut_at_any_byte_neither_loses_nor_doubles_text(self, instant, chat, tmp_path):
        cuts = places_to_cut(instant, 37)
        with Proxy(instant.address, [*cut_once(cuts), *BYTE_BY_BYTE]) as proxy:
            turns = chat(proxy.url, len(cuts) + 1, tmp_path)
            assert len(proxy.requests) == 2 * len(cuts) + 1
        check_kept(instant, [turn[:2] for turn in turns])

    @beside
    def test_what_may_pass_is_retried_up_to_eight_times_and_all_else_is_final_and_told(
            self, instant, chat, tmp_path):
        with Proxy(instant.address, [fault for _, faults, _ in FATES for fault in faults]) as proxy:
            turns = chat(proxy.url, len(FATES), tmp_path)
        pauses = {}
        for (name, faults, shown), turn in zip(FATES, turns, strict=True):
            earlier, again, answer = turn.text.rpartition(AGAIN)
            assert earlier + again == (WORDS[0] + AGAIN if name == "another run" else ""), name
            assert len(turn.pauses) == len(faults) - 1, (name, turn)
            if shown is None:
                check_kept(instant, [(turn.session, answer)])
            else:
                assert answer == shown or turn.said.startswith(shown), (name, turn)
            pauses[name] = turn.pauses
        for pause, longest in zip(pauses[GIVES_UP], [0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5], strict=True):
            assert longest / 2 <= pause <= longest
        assert [pauses["a pause of 7 s"], pauses["a pause of an hour"]] == [[7], [60]]

    @beside
    def test_it_runs_as_it_stands(self, instant, chat, tmp_path):
        name, language, start, interpreter = {
            chat_in_python: ("chat.py", "python", "# ", sys.executable),
            chat_in_javascript: ("chat.mjs", "js", "// ", "node"),
        }[chat]
        address = (URL.removeprefix("http://"), "{}:{}".format(*instant.address))
        (tmp_path / name).write_text(replaced(block(language, start + name), address), "utf-8")
        printed = run([needs(interpreter), name], tmp_path)
        assert printed.count("You said: ") == 2 and "2 messages came before this one." in printed


# ---- README, "Configuration"

BAD_STARTS = [             # flags, what the last line on standard error names
    *((flags, flags[0]) for flags in [
        ("--bogus",), ("--log", "loud"), ("--port", "65536"), ("--chunk-words", "0"),
        ("--chunk-delay", "nan"), ("--resume-window", "-1"), ("--heartbeat", "0"), ("--heartbeat", "15.1"),
        ("--max-connections", "0"), ("--token", ""), ("--token", "a\n"), ("--token", "caf\u00e9"),
        ("--allow-host", "a/b"), ("--allow-origin", "*"), ("--allow-origin", "https://"),
        ("--allow-origin", "https://example.com/")]),
    # Others can reach these addresses.
    *((("--host", host), "--token") for host in ("", "0", "::", "10.0.0.1", "localhost.evil.example")),
    *((("--model", name), "--model offline") for name in (
        "nothing:model", "json:nothing", "json:__doc__", ":")),
]


IN_ONE_PROCESS = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv.pop(1))
import streamchat_server
for sys.argv[1:] in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO())) as said:
        try:
            status = streamchat_server.main()
        except SystemExit as exit:
            status = exit.code
        said.seek(0)
        print(json.dumps([status, said.read().strip()]))
"""


def errors_of_starts(*command_lines):
    """What the server says to each of these arguments, which it must refuse; all in one process."""
    command = [sys.executable, "-c", IN_ONE_PROCESS, str(SERVER.parent)]
    done = subprocess.run(command, input=json.dumps(command_lines), env=environment(), timeout=PATIENCE,
                          capture_output=True, encoding="utf-8", check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [status for status, _ in told] == [2] * len(command_lines) and "Traceback" not in done.stdout, told
    return [said for _, said in told]


def error_of_start(*flags, **more):
    """The one line of a server that does not even start. (argparse shows the usage before it.)"""
    done = subprocess.run([sys.executable, str(SERVER), "--port", "0", *flags], env=environment(**more),
                          timeout=PATIENCE, capture_output=True, encoding="utf-8", check=False)
    *usage, line = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and (not usage or usage[0].startswith("usage: ")), done
    return line


# The characters of the first text may stand in a field of a head.
INERT = "FORGED".join("\u0085\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e"
                      "\u2066\u2067\u2068\u2069\x9b") + "2JFORGED"
FORGED = "x\nFORGED\rFORGED\r\nFORGED\x1b[31mFORGED\x0bFORGED\x00FORGED\x07\x7f" + INERT
HOSTILE = [             # none begins a turn
    chat_request(FORGED.encode()), chat_request({"message": "Hi", "session_id": FORGED}),
    http_request("POST", "/sessions/new", body={"model_id": FORGED}),
    *(request for text in (quote(FORGED), FORGED, INERT) for request in (
        http_request("GET", "/" + text), http_request(text, "/stats"),
        http_request("GET", "/stats", f"Origin: {text}"))),
]


def provoke(server):
    """Send each hostile request; tells how many were refused."""
    return sum(answer.status >= 400 for request in HOSTILE for answer in server.answers(request))


@ours
class TestConfiguration:
    """Flags, environment and console. A server that must not start says one line and exits with 2."""

    @beside
    def test_wrong_flags_open_hosts_and_functions_that_cannot_be_imported_are_refused(self):
        told = errors_of_starts(*(["--port", "0", *flags] for flags, _ in BAD_STARTS))
        for (flags, names), said in zip(BAD_STARTS, told, strict=True):
            assert names in said.splitlines()[-1], flags

    @beside
    def test_what_cannot_work_is_refused_in_one_line_without_the_secret(self, tmp_path):
        assert "--token" in error_of_start("--host", "0.0.0.0", STREAMCHAT_TOKEN="")
        said = error_of_start(STREAMCHAT_TOKEN="s3cret word")
        assert "token" in said and "s3cret" not in said
        assert "--model offline" in error_of_start(GENAI_MODEL_ID="gemini-x", GOOGLE_API_KEY="")
        (tmp_path / "google").mkdir()       # as if there were no such package
        missing = "raise ModuleNotFoundError(\"No module named 'google'\", name='google')"
        (tmp_path / "google" / "__init__.py").write_text(missing)
        assert "google-genai" in error_of_start(GOOGLE_API_KEY="no-real-key", PYTHONPATH=str(tmp_path))
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            assert port in error_of_start("--port", port)

    @beside
    def test_flags_come_before_the_environment_where_empty_variables_are_none(self, serve, instant):
        flags = ("--host", "localhost", "--model", "offline", "--chunk-delay", "0")
        server = serve(*flags, GENAI_MODEL_ID="gemini-x", GOOGLE_API_KEY="none", STREAMCHAT_TOKEN="")
        assert server.get("/")["model"] == server.turn("Hi").info["model"] == "offline"
        for flags, variable in ((("--token", TOKEN), "another"), ((), TOKEN)):
            server = serve("--host", "0.0.0.0", *flags, STREAMCHAT_TOKEN=variable, GENAI_MODEL_ID="offline",
                           GOOGLE_API_KEY="none")
            assert [ask(server, "GET", "/stats", *fields).status for fields in ([BEARER], [])] == [200, 401]
            assert ask(server, "GET", "/", BEARER).json["model"] == "offline"
        assert instant.get("/health")["model"] == "offline"
        response = instant.request("POST", "/sessions/new", {"model_id": "gemini-x"})
        assert "GOOGLE_API_KEY" in check_problem(response, 400, "invalid_field")["detail"]
        check_problem(instant.request("GET", "/debug"), 404, "not_found")

    @beside
    def test_after_a_signal_a_short_turn_completes_and_a_new_one_is_refused(self, serve):
        assert serve().end("terminate") == 0, "a signal may come at once"
        server = serve("--chunk-delay", "0.05", "--log", "brief", changes="server.LIMITS['grace'] = 10")
        stream = server.chat("word " * 320, session_id="s")     # for 4 s
        stream.read_until("chunk")
        connection = server.connect()
        connection.send(http_request("GET", "/health"))
        server.response(connection, close=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            server.process.send_signal(number)
        assert wait_until(lambda: not server.is_there(), 4)
        time.sleep(0.5)     # what was sent before is answered first
        connection.send(chat_request({"message": "Hi"}) + http_request("GET", "/sessions"))
        check_overloaded(server.response(connection, close=False))
        assert server.response(connection).json["active_sessions"] == 1, "the refused turn made a session"
        assert stream.check().end["finish_reason"] == "stop"
        assert server.process.wait(PATIENCE) == 0
        assert re.search(r"total_requests\D*1\b", server.log())

    @pytest.mark.parametrize("log", ["full", "brief", "off"])
    @beside
    def test_the_log_shows_as_much_as_it_was_told(self, serve, log):
        server = serve("--log", log, "--chunk-delay", "0", PYTHONIOENCODING="ascii")
        before = server.log()
        assert before.endswith("\n") and before.splitlines()[-1].startswith("Serving on http://127.0.0.1:")
        rest = b"{}SECRET /rest of a body\r\n\r\n"
        server.answers(http_request("POST", "/sessions/new", "Content-Length: 2") + rest)
        server.turn("SECRET na\u00efve \U0001f600", session_id="a-session")
        wait_until(lambda: "a-sess" in server.log(), seconds=3 if log != "off" else 0.3)
        shown = server.log().removeprefix(before)
        assert ("SECRET" in shown, "a-sess" in shown) == (log == "full", log != "off")
        assert shown.isascii()

    @beside
    def test_the_log_is_plain_where_it_is_no_terminal_and_cannot_be_forged(self, serve):
        server = serve("--log", "full", "--chunk-delay", "0", PYTHONIOENCODING="utf-8")
        server.turn("na\u00efve \U0001f600" + FORGED)
        refusals = provoke(server)
        server.turn("LAST")
        assert wait_until(lambda: "LAST" in server.log())
        log = server.log()
        assert not raw_characters(log) and "\ufffd" not in log
        lines = [line for line in log.splitlines() if not line.startswith("Serving on ")]
        assert all(re.match(TIME.pattern + " [a-z_]+ [a-z_]+=", line) for line in lines), lines
        assert "FORGED" in log and sum(line.split()[1] == "refused" for line in lines) == refusals

    @pytest.mark.parametrize("more", [{}, {"NO_COLOR": "1"}], ids=["colour", "NO_COLOR"])
    @beside
    def test_at_a_terminal_the_log_is_boxes_and_chunks(self, more):
        flags = ("--chunk-delay", "0.02")
        with Terminal([sys.executable, str(SERVER), "--port", "0", *flags], **more) as terminal:
            port = int(terminal.wait(r"^Serving on http://127\.0\.0\.1:(\d+)$")[1])
            server = Server("127.0.0.1", port, flags)
            server.turn("wide \u91cf\u5b50 \U0001f5a5\ufe0f \U0001f600 " + FORGED, session_id=new_id())
            server.turn("\u91cf" * 40)      # more columns than characters
            provoke(server)
            server.chat(LONG, session_id="s").read_until("chunk")
            assert server.stop("s")
            terminal.wait("Status: STOPPED")
            text = terminal.text
        assert ("\x1b[" in text) == (not more)
        plain = re.sub(r"\x1b\[\d*m", "", text).replace("\r\n", "\n")
        assert not raw_characters(plain)
        boxes = [line for line in plain.splitlines() if line[:1] in tuple("╔║╚┌│└")]
        assert {line[-1] for line in boxes} <= set("╗║╣╝┐│┘") and len(boxes) > 20
        assert {width(line) for line in boxes} == {64}, boxes
        assert 'Chunk #1: "You said: wide 量子"' in plain and plain.count("HTTP STREAM STARTED") == 3


# ---- README, "Models": Gemini. The real google-genai package asks a stand-in of its streaming HTTP API.

KEY = "TESTKEY-0123456789_abcdefghijklmno"                  # does not look like a key of Google's
STRANGERS_KEY = "AIzaSySTRANGER-0123456789_abcdefghijklm"   # does, but is none
GEMINI_USAGE = {"promptTokenCount": 7, "candidatesTokenCount": 5, "totalTokenCount": 12}
USAGE_WITH_THOUGHTS = GEMINI_USAGE | {"thoughtsTokenCount": 3, "totalTokenCount": 15}


def says(*parts, finish=None, usage=GEMINI_USAGE):
    """A GenerateContentResponse, with a field that nobody knows. A part is a text, or a whole part."""
    parts = [{"text": part} if isinstance(part, str) else part for part in parts]
    candidate = {"index": 0} | ({"content": {"role": "model", "parts": parts}} if parts else {})
    candidate |= {"finishReason": finish} if finish else {}
    return {"candidates": [candidate], "usageMetadata": usage, "mood": {"sun": 1}}


def last(text, finish="STOP"):
    return says(text, finish=finish)


def failure(status, word, message, *details):
    return {"error": {"code": status, "message": message, "status": word, "details": details}}


KEY_INVALID = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
BAD_KEY = failure(400, "INVALID_ARGUMENT", "Key <key> not valid (?key=<key>).", KEY_INVALID, {"key": "<key>"})
QUOTA = failure(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota.\n* Quota exceeded for metric: x")
BUSY = failure(503, "UNAVAILABLE", "The model is overloaded. Please try again later.")
BROKEN = failure(500, "INTERNAL", "An internal error has occurred.")
HOLD, CUT = object(), object()      # wait until the test lets go; close the connection
THOUGHT = {"text": "Hm.", "thought": True}
SIGNED = {"text": ".", "thoughtSignature": "c2lnbmVk"}
HALF_A_LINE = b'data: {"candidates": [{"content": {"parts": [{"te'
HALF_A_CHARACTER = (b'data: {"candidates": [{"content": {"parts": [{"text": "\\ud83d two."}]}, '
                    b'"finishReason": "STOP"}]}')
GEMINI_ENDS = [         # name; what each try gets; finish_reason or code, text, what a failure names
    # A refusal, or the list of what a stream has: texts, responses and bytes. The last one stays.
    ("bad key", [BAD_KEY], "model_auth", "", "GEMINI_API_KEY"),
    ("bad request", [failure(400, "INVALID_ARGUMENT", "A bad \u00e9.")], "model_error", "", "A bad \u00e9"),
    ("unauthenticated", [failure(401, "UNAUTHENTICATED", "Wrong.")], "model_auth", "", "401"),
    ("forbidden", [failure(403, "PERMISSION_DENIED", f"<key>, {STRANGERS_KEY}.")], "model_auth", "", "403"),
    ("no such model", [failure(404, "NOT_FOUND", "Not found.")], "model_not_found", "", "GENAI_MODEL_ID"),
    ("bad gateway", [b"<title>502 Bad Gateway</title>" + b"<p>Wait.</p>" * 500], "model_error", "", "502"),
    ("busy and broken once", [BUSY, BROKEN, [last("One.")]], "stop", "One.", ""),
    ("quota", 3 * [QUOTA], "model_overloaded", "", "quota"),
    ("busy", 3 * [BUSY], "model_overloaded", "", "overloaded"),
    ("broken", 3 * [BROKEN], "model_error", "", "500"),
    # Once it streams, nothing is tried again.
    ("error first", [[BUSY]], "model_overloaded", "", "overloaded"),
    ("error as bare lines", [["Half an ", json.dumps(BROKEN, indent=2).encode()]],
     "model_error", "Half an ", "500"),
    # It is cut.
    ("cut before text", [[CUT]], "model_cut", "", ""),
    ("cut after text", [["Half an ", CUT]], "model_cut", "Half an ", ""),
    ("end in a line", [["Half an ", HALF_A_LINE]], "model_cut", "Half an ", ""),
    ("no finish reason", [["Half an ", "answer"]], "model_cut", "Half an answer", ""),
    # It is blocked.
    ("blocked prompt", [[{"promptFeedback": {"blockReason": "SAFETY"}}]], "model_blocked", "", "SAFETY"),
    ("blocked answer", [[says(finish="SAFETY")]], "model_blocked", "", "SAFETY"),
    *((f"blocked by {word}", [["Once upon ", says(finish=word)]], "content_filter", "Once upon ", "")
      for word in ("RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII")),
    # It has no text.
    *((f"only {word}", [[says(THOUGHT), says(finish=word)]], "model_error", "", word)
      for word in ("STOP", "MAX_TOKENS", "MALFORMED_FUNCTION_CALL", "MOON_PHASE")),
    ("long reason", [[says(finish="X" * 2000)]], "model_error", "", "X"),
    # It has text.
    ("unheard of", [["Text", says(finish="MOON_PHASE")]], "other", "Text", ""),
    ("last reason counts", [[last("One "), last("two.", "MAX_TOKENS")]], "length", "One two.", ""),
    ("thoughts", [[says(THOUGHT), says(THOUGHT, "Answer", SIGNED, finish="STOP")]], "stop", "Answer.", ""),
    ("empty texts", [["", says({}), "One.", "", last("")]], "stop", "One.", ""),
    ("usage last", [[last("One."), {"usageMetadata": USAGE_WITH_THOUGHTS}]], "stop", "One.", ""),
    ("usage first", [["One.", says(finish="STOP", usage=None)]], "stop", "One.", ""),
    ("half a character, and no last newline", [["One ", HALF_A_CHARACTER]], "stop", "One \ufffd two.", ""),
    ("white space", [[" \n", "\ta\u2028b\u2029c\u0085  d\n\n", last("\x0be\x1c\U0001f600\u0301 ")]], "stop",
     " \n\ta\u2028b\u2029c\u0085  d\n\n\x0be\x1c\U0001f600\u0301 ", ""),
]
MODEL_ENDS = [(name, end, text, len(tries), names) for name, tries, end, text, names in GEMINI_ENDS]
TRIES = {f"case: {name}": tries for name, tries, *_ in GEMINI_ENDS} | {
    "hold before text": [[HOLD, last("Late.")]], "hold after text": [["First ", HOLD, last("second.")]]}


class StandIn(ThreadingHTTPServer):
    """A model's service. It serves until its context ends."""
    daemon_threads, block_on_close, request_queue_size = True, False, 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), StandInHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.let_go, self.left = [], threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        self.left.set()     # a client left within an answer

    def asked(self, text):
        """The requests to Gemini whose last message was this."""
        return [request for request in self.requests if request.texts[-1] == ("user", text)]


class StandInHandler(BaseHTTPRequestHandler):
    """Gemini's API, and OpenAI's as Ollama and llama.cpp have it."""
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (self.answer_as_gemini if "contents" in body else self.answer_as_openai)(body)

    def begin(self, status, *fields):
        self.wfile.write(request_head(f"HTTP/1.1 {status} ", *fields))

    def say(self, item):
        """Send an event, in UTF-8 without escapes, as Gemini does."""
        item = says(item) if isinstance(item, str) else item
        data = item if isinstance(item, bytes) else b"data: " + self.encode(item) + b"\r\n\r\n"
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def encode(self, item):
        text = json.dumps(item, ensure_ascii=False)
        return text.replace("<key>", self.headers.get("x-goog-api-key", "")).encode()

    def answer_as_gemini(self, body):
        """The last message chooses the answer: a name of TRIES, or it is echoed in several responses."""
        texts = [(content["role"], "".join(part["text"] for part in content["parts"]))
                 for content in body["contents"]]
        key, text = self.headers["x-goog-api-key"], texts[-1][1]
        before = len(self.server.asked(text))
        self.server.requests.append(types.SimpleNamespace(
            path=self.path, key=key, texts=texts, time=time.monotonic()))
        tries = TRIES.get(text) or [echo(texts)]
        answer = tries[min(before, len(tries) - 1)]
        if isinstance(answer, list):
            self.begin(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
            self.stream(answer)
        else:
            body = answer if isinstance(answer, bytes) else self.encode(answer)
            self.begin(502 if body is answer else answer["error"]["code"], f"Content-Length: {len(body)}")
            self.wfile.write(body)

    def stream(self, items):
        for item in items:
            if item is HOLD:
                self.server.let_go.wait(30)
            elif item is CUT:
                self.close_connection = True
                return
            else:
                self.say(item)
        self.wfile.write(b"0\r\n\r\n")

    def answer_as_openai(self, body):
        """The roles and the last message, word by word. "cut" is cut before its end, "endless" has no end."""
        roles, text = [message["role"] for message in body["messages"]], body["messages"][-1]["content"]
        known = body["stream"] and self.path == "/v1/chat/completions"
        self.begin(200 if known else 404, "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
        self.say({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]})
        for word in itertools.repeat("word") if text == "endless" else [*roles, *text.split()]:
            self.say({"choices": [{"index": 0, "delta": {"content": word + " "}}]})
        rest = [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
                {"choices": [], "usage": {"total_tokens": 9}}, b"data: [DONE]\n\n"]
        self.stream([CUT] if text == "cut" else rest)


def echo(texts):
    """"Message N: TEXT" in pieces of eight characters, which split words as tokens do."""
    text = f"Message {len(texts)}: {texts[-1][1]}"
    pieces = [text[start:start + 8] for start in range(0, len(text), 8)]
    return [*map(says, pieces[:-1]), last(pieces[-1])]


def gemini_stand_in():
    if not importlib.util.find_spec("google") or not importlib.util.find_spec("google.genai"):
        assert os.environ.get("CI") != "true", "CI must have google-genai"
        pytest.skip("needs google-genai")
    return StandIn()


stand_in = cache(gemini_stand_in)       # the one that these tests share


def gemini_server(start, *flags, **variables):
    """A server whose Gemini is the stand-in. It is started by `own` or `serve`."""
    urls = {"GOOGLE_GEMINI_BASE_URL": stand_in().url, "GOOGLE_VERTEX_BASE_URL": stand_in().url}
    return start("--chunk-delay", "0", "--debug", *flags, **urls, **(variables or {"GEMINI_API_KEY": KEY}))


@ours
class TestModels:
    """What Gemini does becomes the events of a turn. A failed turn leaves the history as it was."""

    @beside
    def test_each_end_of_the_model_has_its_code_and_no_key_gets_out(self, own):
        server = gemini_server(own)

        def run(row):
            session = new_id()
            return server.chat(f"case: {row[0]}", session_id=session).check(), server.history(session)
        turns, usages = in_parallel(run, MODEL_ENDS), {}        # the pauses before retries overlap
        for (name, end, text, tries, names), (turn, history) in zip(MODEL_ENDS, turns, strict=True):
            times = [request.time for request in stand_in().asked(f"case: {name}")]
            assert (turn.text, len(times)) == (text, tries), name
            assert all(0.3 < later - earlier < 5 for earlier, later in itertools.pairwise(times)), name
            if turn.end["type"] == "error":
                assert (turn.end["code"], history) == (end, []) and names in turn.end["message"], name
                assert "Google Cloud" not in turn.end["message"], f"{name} has nothing to do with a login"
            else:
                kept = [("user", f"case: {name}"), ("model", text)]
                assert (turn.end["finish_reason"], history) == (end, kept), name
                usages[name] = tuple(turn.end["usage"].values())
        assert usages["usage last"] == (7, 8, 15), "thoughts are output"
        assert usages["usage first"] == (7, 5, 12)
        assert all(server.get("/debug")[name] for name in ("threads", "limits", "last_errors"))
        paths = "/", "/health", "/stats", "/debug", "/sessions", "/openapi.json"
        told = f"{turns} {server.log()}" + "".join(str(server.get(path)) for path in paths)
        assert not any(part in told for part in (KEY[:10], KEY[-10:], STRANGERS_KEY))
        printed_by_the_package = "Warning", "warnings.warn", "is not a valid", "google/genai"
        assert not any(text in server.log() for text in printed_by_the_package)

    @beside
    def test_the_first_piece_arrives_while_the_model_still_writes_in_many_turns_at_once(self, own):
        server = gemini_server(own)
        stand_in().let_go.clear()
        streams = [server.chat("hold after text") for _ in range(110)]      # the package's own limit is 100
        assert {stream.read_until("chunk")["text"] for stream in streams} == {"First "}
        assert len(server.stats()["streams"]) == len(streams)
        stand_in().let_go.set()
        turns = [stream.check() for stream in streams]
        assert {(turn.text, turn.end["finish_reason"]) for turn in turns} == {("First second.", "stop")}

    @beside
    def test_the_model_of_the_session_gets_its_history_without_failed_turns(self, own):
        server, session = gemini_server(own), new_id()
        server.request("POST", "/sessions/new", {"session_id": session, "model_id": "gemini-other"})
        one, two, three = f"one {session}", f"two {session} \n", f"three {session}"
        for message in (one, two, "case: bad request"):
            server.chat(message, session_id=session).check()
        ids = {"session_id": session, "turn_id": "t"}
        failed = server.chat("case: cut after text", **ids).read()
        assert server.follow(session).read().lines == failed.lines, "the log of a failed turn is kept"
        latest = server.session(session)["latest_turn"]
        assert (latest["state"], latest["chunks"]) == ("failed", 1)
        again = server.chat("case: cut after text", **ids).check()
        assert failed.check().info != again.info, "a failed turn runs again"
        assert server.turn(three, **ids).info["model"] == "gemini-other"
        assert server.session(session)["model"] == "gemini-other"
        [sent] = stand_in().asked(three)
        assert sent.path == "/v1/models/gemini-other:streamGenerateContent?alt=sse" and sent.key == KEY
        assert sent.texts == [("user", one), ("model", f"Message 1: {one}"), ("user", two),
                              ("model", f"Message 3: {two}"), ("user", three)]

    @on_linux
    @beside
    def test_a_stop_ends_the_turn_and_the_request_to_the_model_at_once(self, serve):
        server = gemini_server(serve, "--max-connections", "20", "--log", "off")
        stand_in().let_go.clear()

        def stop(message, event):
            stream = server.chat(message, session_id=(session := new_id()))
            stream.read_until(event)
            assert server.stop(session) and stream.check().end["finish_reason"] == "cancelled"
            return session
        silent, begun = stop("hold before text", "status"), stop("hold after text", "chunk")
        at_first = server.held()
        for _ in range(30):         # three times as many turns as may run
            stop("hold before text", "status")
            stop("hold after text", "chunk")
        assert wait_until(lambda: server.held() <= at_first, 5), (server.held(), at_first)
        stand_in().let_go.set()
        assert server.turn("hello", session_id=silent).end["message_count"] == 2    # nothing came late
        assert server.history(begun) == [("user", "hold after text"), ("model", "First ")]

    @beside
    def test_a_key_chooses_gemini_and_the_variables_of_google_genai_count(self, serve):
        server = gemini_server(serve, GEMINI_API_KEY="one", GOOGLE_API_KEY=" two\n",
                               GOOGLE_GENAI_API_VERSION="v1alpha")
        server.turn("by variables")
        [sent] = stand_in().asked("by variables")
        assert sent.path == "/v1alpha/models/gemini-3.8-flash:streamGenerateContent?alt=sse"
        assert sent.key == "two" and "Both" not in server.log()

    @beside
    def test_a_proxy_or_a_login_that_cannot_work_is_told(self, serve):
        stand_in()      # without the package the test is skipped
        proxied = serve("--chunk-delay", "0", GEMINI_API_KEY=KEY, ALL_PROXY="socks5://127.0.0.1:9")
        on_vertex = serve("--chunk-delay", "0", GOOGLE_GENAI_USE_VERTEXAI="true",
                          GOOGLE_APPLICATION_CREDENTIALS="/nonexistent")
        for server, code, said in [(proxied, "model_error", "set here: ALL_PROXY"),
                                   (on_vertex, "model_auth", "Google Cloud credentials do not work: File /")]:
            end = server.chat("Hi").check().end
            assert end["code"] == code and said in end["message"]


# ---- README, "Models": functions of your own. --model test_protocol:on_command does what the message says.

class Waiting:
    """Waits for a minute after its first piece, or until it is closed. A file tells which."""

    def __init__(self, file, piece):
        self.file, self.piece, self.closed = Path(file), piece, threading.Event()
        self.file.write_text("runs")

    def __iter__(self):
        yield self.piece
        self.closed.wait(60)

    def close(self):
        time.sleep(0.2)         # a server that ends waits for it
        self.file.write_text("closed")
        self.closed.set()
        raise ValueError("This is logged nowhere.")


def on_command(history):
    """A model that does what the message says: a command, and an argument after a colon."""
    command, _, argument = history[-1].text.partition(": ")
    if command.startswith("waits"):
        return Waiting(argument, 5 if command == "waits with a number" else "First. ")
    return obey(command, argument, history)


def obey(command, argument, history):
    match command:
        case "history":
            for message in history:
                yield f"{message.role}: {message.text}. "
        case "deaf":        # it cannot be closed before there is a file
            yield "What? "
            while not Path(argument).exists():
                time.sleep(0.05)
        case "silent":
            time.sleep(60)
        case "slow":
            for _ in range(8):
                time.sleep(0.4)
                yield "word "
        case "late end":
            yield "One."
            time.sleep(0.1)
        case "no text":
            yield from ("", "")
        case "fails" | "leaves":
            yield "Half an "
            raise {"fails": ValueError, "leaves": SystemExit}[command](argument)
        case _:
            yield history[-1].text


ON_COMMAND = ("--model", "test_protocol:on_command")
COMMANDED, BRIEF = (*ON_COMMAND, "--chunk-delay", "0", "--log", "off"), (*ON_COMMAND, "--log", "brief")
# What the server does without is there for a function.
NEEDS_MORE = "\nimport http.client\nhttp.client.HTTPSConnection, urllib.request.HTTPSHandler\n"


@ours
class TestModelsOfYourOwn:
    """--model MODULE:FUNCTION. Whatever the function does, other turns go on."""

    @beside
    def test_it_gets_the_history_and_its_return_is_stop_if_there_is_text(self, own):
        server, session = own(*COMMANDED), new_id()
        assert server.turn("history", session_id=session).text == "user: history. "
        turn = server.turn("history", session_id=session)
        assert turn.text == "user: history. model: user: history. . user: history. "
        assert turn.end["finish_reason"] == "stop"
        assert turn.info["model"] == server.get("/")["model"] == "test_protocol:on_command"
        for _ in range(12):
            server.turn("Hi", session_id=session)
        assert server.turn("history", session_id=session).text.count("user: Hi. ") == 12
        end = server.chat("no text").check().end
        assert end["code"] == "model_error" and "(stop)" in end["message"]
        response = server.request("POST", "/sessions/new", {"model_id": "test_protocol:on_command"})
        check_problem(response, 400, "invalid_field")

    @beside
    def test_the_readmes_function_is_found_here_and_asks_a_local_server(self, serve, tmp_path):
        with StandIn() as local:
            text = replaced(block("python", "# local.py"), ("http://127.0.0.1:11434", local.url))
            (tmp_path / "local.py").write_text(text + NEEDS_MORE, "utf-8")
            move = f"import os; os.chdir({str(tmp_path)!r})"      # from where Python's own path does not lead
            server = serve("--model", "local:answer", "--chunk-delay", "0", changes=move, PYTHONSAFEPATH="1")
            assert server.chat("one two", session_id="s").check().text == "user one two "
            assert server.chat("again", session_id="s").check().text == "user assistant user again "
            endless = server.chat("endless", session_id="s")
            endless.read_until("chunk", 3)
            assert server.stop("s") and endless.check().end["finish_reason"] == "cancelled"
            assert local.left.wait(PATIENCE), "the request to the local model goes on after a stop"
            assert server.chat("cut").check().end["code"] == "model_error"
            assert wait_until(lambda: "ConnectionError" in server.log())
            server.excuse_log()

    @pytest.mark.parametrize("command, flags, told", [
        ("fails", COMMANDED, "ValueError: SECRET"), ("leaves", BRIEF, "trouble error=SystemExit"),
    ], ids=["off", "brief"])
    @beside
    def test_what_goes_wrong_in_it_is_told_by_the_log_alone(self, own, command, flags, told):
        server, session = own(*flags), new_id()
        turn = server.chat(f"{command}: SECRET", session_id=session).check()
        assert (turn.text, turn.end["code"], server.history(session)) == ("Half an ", "model_error", [])
        assert "SECRET" not in turn.end["message"]
        assert wait_until(lambda: told in server.log())
        assert ("SECRET" in server.log()) == ("SECRET" in told)
        server.excuse_log()

    @beside
    def test_whatever_ends_a_turn_closes_it(self, serve, tmp_path):
        flags = (*ON_COMMAND, "--resume-window", "0.2", "--heartbeat", "0.2")
        server = serve(*flags, changes="server.LIMITS['grace'] = 0.2")
        no_text = tmp_path / "no text"
        assert server.chat(f"waits with a number: {no_text}").check().end["code"] == "model_error"
        assert wait_until(lambda: no_text.read_text() == "closed")
        server.excuse_log()
        ends = {"stop": lambda: server.stop("stop"),
                "clear": lambda: server.request("POST", "/sessions/clear/clear"),
                "delete": lambda: server.request("DELETE", "/sessions/delete"),
                "deserted": lambda: streams["deserted"].abort(), "shutdown": server.process.terminate}
        files = {name: tmp_path / name for name in ends}
        streams = {name: server.chat(f"waits: {file}", session_id=name) for name, file in files.items()}
        for stream in streams.values():
            assert stream.read_until("chunk")["text"] == "First. "
        for name, end in ends.items():
            assert files[name].read_text() == "runs"
            end()
            assert wait_until(lambda file=files[name]: file.read_text() == "closed")

    @beside
    def test_one_that_cannot_be_closed_counts_as_running_until_it_returns(self, serve, tmp_path):
        server = serve(*ON_COMMAND, "--max-connections", "8")
        for number in range(8):
            stream = server.chat(f"deaf: {tmp_path / 'file'}", session_id=f"s{number}")
            stream.read_until("chunk")
            assert server.stop(f"s{number}") and stream.check().end["finish_reason"] == "cancelled"
        assert wait_until(server.is_there)      # a connection that is about to end counts, too
        check_problem(server.request("POST", "/chat/stream", {"message": "Hi"}), 503, "overloaded")
        (tmp_path / "file").touch()
        assert wait_until(lambda: server.request("POST", "/chat/stream", {"message": "Hi"}).status == 200)

    @beside
    def test_one_that_is_silent_for_two_minutes_is_cut_and_closed(self, serve, tmp_path):
        short = "assert server.LIMITS['model_silence'] == 120\nserver.LIMITS['model_silence'] = 2.5"
        server = serve(*ON_COMMAND, changes=short)
        file = tmp_path / "state"
        streams = [server.chat(message) for message in ("silent", f"waits: {file}", "slow", "word " * 120)]
        silent, begun, slow, paced = (stream.check() for stream in streams)
        assert (silent.text, silent.end.get("code")) == ("", "model_cut")
        assert (begun.text, begun.end.get("code")) == ("First. ", "model_cut")
        assert moment(begun.end["timestamp"]) - moment(begun.chunks[0]["timestamp"]) >= timedelta(seconds=2.5)
        assert slow.end["type"] == paced.end["type"] == "complete"
        assert wait_until(lambda: file.read_text() == "closed")

    @beside
    def test_an_empty_final_chunk_never_waits(self, own):
        turn = own(*ON_COMMAND, "--chunk-delay", "3").chat("late end").check()
        assert turn.chunks[-1]["text"] == "" and turn.end["processing_time"] < 2

    @beside
    def test_a_final_chunk_that_is_held_back_comes_when_it_is_due(self, own):
        def waited():
            *_, before, final = own("--chunk-delay", "0.3").turn("a b").chunks
            assert final["text"]
            return moment(final["timestamp"]) - moment(before["timestamp"])
        assert any(waited() < timedelta(seconds=0.39) for _ in range(10))       # a busy machine may delay it


# ---- README, "Persistence"

@contextlib.contextmanager
def read_only(file):
    """The rows of a server's file as any other program sees them."""
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as reader:
        yield reader


def rows(file, table="turns"):
    with read_only(file) as reader:
        return reader.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def told_by(server):
    """The sessions in the order of the list, with their messages; without what changes with the time."""
    told = server.get("/sessions")["sessions"]
    for session in told:
        del session["duration_minutes"]
        session["messages"] = server.session(session["session_id"])["messages"]
    return told


@contextlib.contextmanager
def full_disk(server, file):
    """No file of the server may grow beyond what its -wal has, as if the disk were full."""
    import resource  # Windows lacks it

    soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    size = os.stat(f"{file}-wal").st_size
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def locked(file):
    """Another program writes to the file."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        yield


def changed(file, statement):
    """Change a file that no server has, as another program would."""
    with contextlib.closing(sqlite3.connect(file)) as writer:
        writer.execute(statement)
        writer.commit()


REFUSED_FILES = [       # name, what is done to a good file
    ("another program's file", lambda file: changed(file, "PRAGMA application_id = 7")),
    ("a newer schema", lambda file: changed(file, "PRAGMA user_version = 99")),
    ("a turn without its session", lambda file: changed(file, "DELETE FROM sessions")),
    ("a text", lambda file: file.write_text("Only text.\n" * 1000)),
    ("a folder", lambda file: (file.unlink(), file.mkdir())),
    ("a missing folder", lambda file: shutil.rmtree(file.parent)),
    ("damaged pages", lambda file: file.write_bytes(file.read_bytes()[:8192].ljust(40_000, b"\xff"))),
    ("no end", lambda file: os.truncate(file, file.stat().st_size - 100)),
]


@ours
class TestPersistence:
    """With --db FILE a complete turn survives every end of the server. One that is not kept is an error."""

    @beside
    def test_a_restart_forgets_nothing_and_sends_the_same_bytes(self, serve, tmp_path):
        flags = ("--chunk-delay", "0.002", "--log", "off", "--model", "streamchat_server:offline",
                 "--db", str(tmp_path / "chat.db"))
        server = serve(*flags)
        requests = [{"message": text, "session_id": new_id(), "turn_id": "t"} for _, text in TEXTS]
        logs = [server.chat(**request).read().lines for request in requests]
        stopped = {"message": LONG, "session_id": "stopped", "turn_id": "t"}
        stream = server.chat(**stopped).read(5)
        server.stop("stopped")
        requests.append(stopped)
        logs.append(stream.read().lines)
        for session in ("cleared", "deleted"):
            server.turn("Hi", session_id=session, turn_id="t")
        server.request("POST", "/sessions/cleared/clear")
        server.request("DELETE", "/sessions/deleted")
        server.request("POST", "/sessions/new", {"session_id": "empty", "model_id": "offline"})
        for number, how in enumerate(("terminate", "kill"), 1):
            server.turn("More", session_id=requests[number]["session_id"])      # the last is listed first
            told = told_by(server)
            server.end(how)
            server = serve(*flags)
            assert told_by(server) == told
            stats = server.stats()
            assert [stats[name] for name in (*COUNTERS, "total_sessions_created")] == [0, 0, 0, 0]
        for request, lines in zip(requests, logs, strict=True):
            assert server.chat(**request).read().lines == lines
        assert server.follow("stopped", after=1).read().lines == lines[:2] + lines[3:]
        assert server.session("stopped")["latest_turn"] is None, "this run of the server began no turn"
        server.follow(requests[1]["session_id"]).check(message="More")      # its latest turn
        reused = server.request("POST", "/chat/stream", stopped | {"message": "another"})
        check_problem(reused, 409, "turn_id_reused")
        assert told_by(server) == told and server.stats()["total_requests"] == 0
        assert server.turn("Hi", session_id="stopped").status["context_messages"] == 2
        assert server.turn("Hi", session_id="cleared", turn_id="t").status["context_messages"] == 0

    @beside
    def test_a_turn_that_ran_at_a_kill_runs_again_once(self, serve, tmp_path):
        file = tmp_path / "chat.db"
        flags = ("--chunk-delay", "0.01", "--log", "off", "--db", str(file))
        request = {"message": "word " * 100, "session_id": "s", "turn_id": "t"}
        server = serve(*flags)
        server.chat(**request).read_until("chunk", 3)
        server.end()
        server = serve(*flags)
        told = server.session("s")
        assert (told["messages"], told["streaming"], told["latest_turn"]) == ([], False, None)
        turn = server.turn(**request)
        assert turn.info["created"] is False and turn.status["context_messages"] == 0
        assert server.chat(**request).check(**request) == turn and rows(file) == 1

    @beside
    def test_an_answer_is_on_disk_before_it_is_sent_in_files_for_their_owner_alone(self, serve, tmp_path):
        file = tmp_path / "chat.db"
        server = serve(*INSTANT, "--db", str(file))
        for number in range(10):
            stream = server.chat("word " * 50 * number + "x", session_id=f"s{number % 2}")
            stream.read_until("session_info")
            assert rows(file, "sessions") == min(number + 1, 2)
            stream.read_until("complete")
            assert rows(file) == number + 1
            stream.check()
        if sys.platform == "linux":
            made = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
            assert made == dict.fromkeys(("chat.db", "chat.db-lock", "chat.db-shm", "chat.db-wal"), 0o600)
        for method, path, has_sessions, has_turns in (
                ("POST", "/sessions/new", 3, 10), ("POST", "/sessions/s0/clear", 3, 5),
                ("DELETE", "/sessions/s1", 2, 0)):
            server.request(method, path)
            assert (rows(file, "sessions"), rows(file)) == (has_sessions, has_turns)
        server.end("terminate")
        assert {path.name for path in tmp_path.iterdir()} == {"chat.db", "chat.db-lock"}

    @on_linux
    @beside
    def test_what_cannot_be_written_is_an_error_and_changes_nothing(self, serve, tmp_path):
        file = tmp_path / "chat.db"
        server = serve("--chunk-delay", "0.01", "--log", "brief", "--db", str(file))
        server.turn("x" * 50_000, session_id="s")       # so that the -wal is longer than the log
        for session in ("cleared", "deleted"):
            server.turn("Hi", session_id=session)
        running = server.chat(LONG, session_id="stopped")
        running.read_until("chunk")
        before = {session: server.history(session) for session in server.session_ids()}
        request = {"message": "Hi", "session_id": "s", "turn_id": "t"}
        with full_disk(server, file):
            assert server.turn(**request).end.get("code") == "internal_error"
            for method, path, body in (("POST", "/chat/stream", {"message": "Hi", "session_id": "another"}),
                                       ("POST", "/sessions/new", {"session_id": "another"}),
                                       ("POST", "/sessions/cleared/clear", None),
                                       ("DELETE", "/sessions/deleted", None),
                                       ("POST", "/sessions/stopped/stop", None)):
                problem = check_problem(server.request(method, path, body), 500, "internal_error")
                assert file.name not in problem["detail"], "the detail is for the log alone"
            assert running.check().end.get("code") == "internal_error"
        assert wait_until(lambda: file.name in server.log()), "the log does not tell why"
        assert {session: server.history(session) for session in server.session_ids()} == before
        turn = server.turn(**request)
        assert turn.end["type"] == "complete" and server.turn("Hi", session_id="another").info["created"]
        assert server.history("s") == [*before["s"], ("user", "Hi"), ("model", turn.text)]
        assert server.turn("Hi", session_id="stopped").end["message_count"] == 2
        for method, path in (("POST", "cleared/clear"), ("DELETE", "deleted")):
            assert server.request(method, f"/sessions/{path}").status == 200
        told = told_by(server)
        server.end()
        assert told_by(serve(*INSTANT, "--db", str(file))) == told

    @beside
    def test_a_file_serves_one_server_at_a_time_also_by_a_link(self, serve, tmp_path):
        file = name = tmp_path / "chat.db"
        server = serve(*INSTANT, "--db", str(file))
        if sys.platform != "win32":     # where a link needs a privilege
            name = tmp_path / "link"
            name.symlink_to(file)
        assert file.name in error_of_start("--db", str(name))
        server.turn("Hi")

    @beside
    def test_a_file_that_is_not_right_is_refused_in_one_line_and_not_touched(self, serve, tmp_path):
        def contents():
            return {path: hash(path.read_bytes()) for path in tmp_path.rglob("*")
                    if path.is_file() and not path.name.endswith(("-shm", "-lock"))}    # these are for locks
        file = tmp_path / "chat.db"
        server = serve(*INSTANT, "--db", str(file))
        server.turn(LONG)
        server.end("terminate")
        starts = []
        for name, damage in REFUSED_FILES:
            (tmp_path / name).mkdir()
            copy = Path(shutil.copy(file, tmp_path / name))
            damage(copy)
            starts.append(["--port", "0", "--db", str(copy)])
        before = contents()
        for (name, _), told in zip(REFUSED_FILES, errors_of_starts(*starts), strict=True):
            assert "\n" not in told and file.name in told, f"{name}: {told}"
        assert contents() == before, "a file was touched"

    @beside
    def test_a_slow_disk_delays_only_what_is_written_and_in_the_end_is_an_error(self, serve, tmp_path):
        file = tmp_path / "chat.db"
        server = serve(*INSTANT, "--db", str(file))
        for session in ("s", "t", "o"):
            server.turn("Hi", session_id=session)
        with ThreadPoolExecutor(2) as pool:
            with locked(file):
                deleting = pool.submit(server.request, "DELETE", "/sessions/s")
                time.sleep(0.1)     # it waits for the file
                clearing = pool.submit(server.request, "POST", "/sessions/s/clear")
                other = server.chat("Hi", session_id="o")
                assert other.read_until("chunk") and server.session("s")["message_count"] == 2
                assert server.get("/sessions")["active_sessions"] == 3 and not server.stop("t")
                assert not deleting.done(), "a request that writes nothing waited for the disk"
            assert deleting.result().status == 200
            check_problem(clearing.result(), 404, "session_not_found")
            assert other.check().end["message_count"] == 4
        with locked(file):
            check_problem(server.request("DELETE", "/sessions/o"), 500, "internal_error")
        assert server.session("o")["message_count"] == 4


# ---- README, "Reloading". The files of the server that change are copies.

def reloading(serve, folder, *flags):
    """A server with --reload, and its program. They are in this folder, with all that they make."""
    shutil.copy(SERVER.with_name("demo.html"), folder)
    program = folder / SERVER.name
    program.write_text(SERVER.read_text("utf-8").replace('"grace": 5,', '"grace": 1.5,'), "utf-8")
    flags = (*flags, "--log", "brief", "--reload")
    return serve(*flags, program=program, TMPDIR=str(folder), PYTHONPATH=""), program


def save(path, text):
    """Another file takes its place, so that nobody ever sees half of it."""
    new = path.with_suffix(".new")
    new.write_text(text, "utf-8")
    new.replace(path)


def with_version(program, version):
    return re.sub("^VERSION = .*", f'VERSION = "{version}"', program.read_text("utf-8"), flags=re.MULTILINE)


def wait_for_version(server, version):
    """Until then every connection is a new one, and must be answered."""
    assert wait_until(lambda: server.get("/")["version"] == version)


@ours
@pytest.mark.skipif(sys.platform == "win32", reason="--reload is not supported on Windows")
class TestReloading:
    """With --reload the server follows its files as they change. Sessions stay, no connection is refused."""

    @beside
    def test_a_change_is_served_no_connection_is_refused_and_sessions_stay_to_the_end(self, serve, tmp_path):
        server, program = reloading(serve, tmp_path)
        files = {program, program.with_name("demo.html")}
        [private] = set(tmp_path.iterdir()) - files     # it has the database
        assert private.stat().st_mode & 0o777 == 0o700
        short = server.chat("word " * 30, session_id="short")       # 1 s
        long = server.chat(LONG, session_id="long")
        long.read_until("chunk")
        save(program, with_version(program, "new"))
        in_parallel(lambda _: wait_for_version(server, "new"), range(4))
        assert short.check().end["finish_reason"] == "stop"
        assert long.check().end["code"] == "server_shutdown" and server.history("long") == []
        assert server.turn("And?", session_id="short").end["message_count"] == 4
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 0 and set(tmp_path.iterdir()) == files

    @beside
    def test_a_program_that_does_not_start_is_shown_and_the_old_one_goes_on(self, serve, tmp_path):
        server, program = reloading(serve, tmp_path)
        started, good = server.stats()["start_time"], program.read_text("utf-8")
        for bad, told in ((good.replace("= parse_arguments()", "= unknown", 1), "NameError: name 'unknown'"),
                          (good.replace("SCHEMA_VERSION = 2", "SCHEMA_VERSION = 3", 1), ""),
                          (good.partition("if __name__")[0], "")):      # it is not saved whole
            save(program, bad)
            assert wait_until(lambda: "The old one goes on" in server.log())
            assert told in server.log()
            server.excuse_log()     # it has a traceback
            assert server.stats()["start_time"] == started
        save(program, good)
        save(program, with_version(program, "newer"))
        wait_for_version(server, "newer")

    @beside
    def test_no_change_is_missed_however_the_file_is_saved(self, serve, tmp_path):
        server, program = reloading(serve, tmp_path, "--db", str(tmp_path / "chat.db"))
        server.turn("Hi", session_id="s")
        slow = with_version(program, "slow")
        program.unlink()    # it is missing for longer than it takes to notice that
        time.sleep(0.8)
        program.write_text(slow, "utf-8")
        wait_for_version(server, "slow")
        assert "does not start" not in server.log(), "it was tried while it was missing"
        for number in range(6):
            save(program, with_version(program, number))
            time.sleep(0.15)
        wait_for_version(server, "5")
        started = server.stats()["start_time"]
        save(program.with_name("demo.html"), "A new page")
        assert wait_until(lambda: server.stats()["start_time"] != started)
        assert server.session("s")["message_count"] == 2 and rows(tmp_path / "chat.db") == 1


# ---- README, "Reverse proxy" and "Many servers"

@contextlib.contextmanager
def in_nginx(conf, *changes):
    """A real nginx with the README's configuration, in which `listen` and these changes are replaced."""
    program = needs("nginx", "/usr/sbin", "/usr/local/sbin")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        text = replaced(conf, ("listen 80;", "listen {}:{};".format(*address)), *changes)
        user = "user root;" if hasattr(os, "geteuid") and os.geteuid() == 0 else ""
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f'{kind}_temp_path "{folder}/{kind}";' for kind in kinds)
        file = Path(folder, "conf")
        file.write_text(f'daemon off; pid "{folder}/pid"; {user} events {{}}\n'
                        f"http {{ access_log off; {paths}\n{text}}}")
        # It inherits our listener, as at an upgrade of nginx, so nobody else can take the port.
        number = listener.fileno()
        process = subprocess.Popen([program, "-p", folder, "-e", f"{folder}/log", "-c", file],
                                   pass_fds=[number], env=environment(NGINX=f"{number};"))
        try:
            yield address
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0, Path(folder, "log").read_text()


def nginx(server, *changes):
    """The README's configuration for one server."""
    lines = block("nginx", "# nginx.conf").splitlines(keepends=True)
    one = "".join(line for line in lines if "# *" not in line)
    return in_nginx(one, ("127.0.0.1:8000", "{}:{}".format(*server.address)), *changes)


def lines_through(address, method, path, body=None):
    """The lines of a stream, each as it comes. (nginx keeps the head field X-Accel-Buffering to itself.)"""
    with contextlib.closing(Connection(address)) as connection:
        connection.send(http_request(method, path, body=body))
        head = connection.read_head()
        assert (head.status, head.headers["content-type"]) == (200, "application/x-ndjson")
        yield from connection.lines(head)


BEHIND = (*CALM, "--allow-host", "chat.example.com")
LIVE = [                # why lines come live, a change of the README's configuration
    ("the server's X-Accel-Buffering", ("proxy_buffering off;", "")),
    ("its proxy_buffering", ("proxy_buffering", "proxy_ignore_headers X-Accel-Buffering; proxy_buffering")),
]


@ours
class TestReverseProxy:
    """README, "Reverse proxy": lines come live, cuts and problems pass as they are."""

    @cases(LIVE)
    @beside
    def test_lines_come_live(self, own, case):
        server, session = own(*BEHIND), new_id()
        body = {"message": "word " * 90, "session_id": session}
        # Over HTTP/1.0 nginx holds back an answer of this length, if it buffers.
        with nginx(server, case[1], ("proxy_http_version 1.1;", "")) as address:
            lines = lines_through(address, "POST", "/chat/stream", body)
            first = [next(lines) for _ in range(5)]
            assert Server(*address).stop(session), "the first lines came when the turn was over"
            assert check_turn([*first, *lines]).end["finish_reason"] == "cancelled"

    @beside
    def test_a_cut_client_lets_the_turn_go_on_and_resumes(self, own):
        server, session, message = own(*BEHIND), new_id(), "word " * 40
        with nginx(server) as address:
            body = {"message": message, "session_id": session}
            stream = lines_through(address, "POST", "/chat/stream", body)
            first = [next(stream) for _ in range(5)]
            stream.close()
            assert wait_until(lambda: server.readers(session) == [0]), "the server does not notice the cut"
            rest = list(lines_through(address, "GET", f"/sessions/{session}/stream?after=3"))
        assert rest[:2] == first[:2]
        turn = check_turn(first + rest[2:], message=message, **server.pace)
        check_kept(server, [(session, turn.text)])

    @beside
    def test_bodies_problems_and_its_own_name_pass(self, own):
        server, body = own(*BEHIND), {"message": "hi", "padding": ""}
        body["padding"] = "x" * ((2 << 20) - len(json.dumps(body)))
        with nginx(server) as address:
            proxy = Server(*address)
            check_turn(lines_through(address, "POST", "/chat/stream", body))
            check_problem(proxy.request("GET", "/sessions/nobody"), 404, "session_not_found")
            for name, status in (("chat.example.com", 200), ("evil.example", 403)):
                response = ask(proxy, "GET", "/health", f"Origin: https://{name}", host=name)
                assert response.status == status


@contextlib.contextmanager
def many_servers(serve, folder):
    """The README's three servers, each with a file in this folder; its nginx; and what starts one again."""
    def start(number, *flags):
        return serve("--db", str(folder / f"chat-{number}.db"), *CALM, *flags)

    def start_again(server):
        number = servers.index(server)
        servers[number] = start(number, "--port", str(server.address[1]))
        return servers[number]
    servers = [start(number) for number in range(3)]
    places = [(f"127.0.0.1:800{number}", "{}:{}".format(*server.address))
              for number, server in enumerate(servers)]
    with in_nginx(block("nginx", "# nginx.conf"), *places) as address:
        yield servers, Server(*address), start_again


@ours
class TestManyServers:
    """Each session lives in one of several servers, and nginx sends it there, and nowhere else."""

    @beside
    def test_a_kill_loses_and_doubles_nothing_and_the_other_servers_do_not_notice(self, serve, tmp_path):
        library, troubled = importlib.import_module("streamchat_client"), set()

        def talk(number):
            """A turn by the client library, short or long: its session, and what was shown."""
            def wait(*_):
                troubled.add(session)
                time.sleep(0.5)
            session, shown = new_id(), ""
            for event in library.Turn(api, "word " * (5, 80)[number % 2], session).run(wait):
                shown = "" if event["type"] == "session_info" else shown + event.get("text", "")
            return session, shown

        def is_in_the_middle(server):
            stats = server.stats()
            return len(stats["streams"]) >= 3 and stats["successful_requests"] >= 3

        with many_servers(serve, tmp_path) as (servers, front, start_again), ThreadPoolExecutor(40) as pool:
            api = library.Api(url_of(front))
            talks = [pool.submit(talk, number) for number in range(40)]
            victim = wait_until(lambda: next(filter(is_in_the_middle, servers), None))
            victim.end()
            victim = start_again(victim)
            talks = dict(talk.result() for talk in talks)
            check_kept(front, talks.items())
            homes = {server: server.session_ids() for server in servers}
            assert all(homes.values()), "a server has no session"
            assert sorted(itertools.chain(*homes.values())) == sorted(talks), "a session is on two servers"
            assert troubled and troubled <= homes[victim]
            for server in servers:
                stats = server.stats()
                assert (stats["streams"], stats["failed_requests"]) == ([], 0)
                assert server is victim or stats["successful_requests"] == len(homes[server])

    @beside
    def test_each_session_goes_to_its_server_and_to_no_other_while_that_is_down(self, serve, tmp_path):
        with many_servers(serve, tmp_path) as (servers, front, start_again):
            def begin(_):
                response = front.request("POST", "/chat/stream", {"message": "Hi"})
                turn = check_turn(response.body.splitlines(keepends=True), message="Hi")
                return turn.info["session_id"]
            begun = in_parallel(begin, range(15), 15)
            for session in begun:
                encoded = "".join(f"%{ord(character):02x}" for character in session)
                assert len(front.history(session)) == len(front.history(encoded)) == 2
            named = front.request("POST", "/chat/stream", {"message": "Hi", "session_id": begun[0]})
            check_problem(named, 400, "invalid_field")
            assert front.request("POST", "/sessions/new", {}).status == 404
            assert len({front.stats()["start_time"] for _ in range(6)}) == 1

            before = [server.session_ids() for server in servers]
            lost = max(before, key=len)
            down = servers[before.index(lost)]
            down.end()
            for session in begun:
                told = front.request("GET", f"/sessions/{session}")
                assert told.status == (502 if session in lost else 200)
            start_again(down)
            assert [server.session_ids() for server in servers] == before


# ---- README, "Terminal client": as a library, in scripts and at a terminal. Servers are real or scripted.

MAY_PASS = [            # what a server does once, and its bytes
    *((f"status {status}", refusal(status)) for status in (408, 429, 502, 503, 504)),
    ("nothing", b""),
    ("a head that is cut in a field", b"HTTP/1.1 404 Not Found\r\nContent-Le"),
    ("a problem that is cut", refusal(409)[:-1]),
    ("an end without a terminal event", coded(*TURN[:4])),
    ("a missing chunk", stream_of(INFO, STATUS, *CHUNKS[1:], COMPLETE)),
    ("the last chunks are missing", stream_of(INFO, STATUS, *CHUNKS[:1], COMPLETE)),
    ("an error that may pass", stream_of(*TURN[:3], line_of("error", code="x", message="x", retryable=True))),
    ("an earlier run of the turn, and a cut", stream_of(OTHER_INFO, STATUS, *CHUNKS[:2])),
]
UNEXPECTED = "unexpected", "unexpected answer"
STAYS = [               # what a server sends, the code and the words of what the client raises, the scripts
    ("a status that is final", "so", "This is refused.",
     [refusal(status) for status in (400, 401, 403, 404, 409, 413, 500, 501)]),
    ("a refusal without a problem", "", "400 No",
     [refusal(400, body=body) for body in (b"<html>", b"[" * 60_000, b'{"detail":1,"code":2}')]),
    ("a redirect", "unexpected", "redirects to http://there.example/",
     [refusal(302, "Location: http://there.example/")]),
    ("an error that is not retryable", "", "No key.", [stream_of(INFO, line_of("error", message="No key."))]),
    ("a line that is no event", *UNEXPECTED, [stream_of(INFO, line + b"\n") for line in (
        b"Hello", b'{"type":"\xff"}', b"[1]", b"[" * 60_000, b'{"text":"Hello"}', b'{"type":["chunk"]}',
        b'{"type":"chunk","text":1,"chunk_number":1}', b'{"type":"error","code":"model_error"}')]),
    ("a line of more than 64 KiB", *UNEXPECTED, [stream_of(INFO, line_of("status", message="x" * 70_000))]),
    ("something that is not HTTP", *UNEXPECTED, [b"SSH-2.0-OpenSSH_10.2\r\n"]),
]
PART = [stream_of(info, STATUS, *CHUNKS[:count]) for info, count in ((INFO, 1), (INFO, 2), (OTHER_INFO, 2))]
IN_VAIN = [             # what a server does, and its scripts; after the last one the client gives up
    ("a chunk comes at the last try, and another", [*8 * [b""], PART[0], *7 * [b""], PART[1], *8 * [b""]]),
    ("other runs come no further", [PART[1], *4 * [PART[2], PART[1]]]),
]
WAITS = [               # Retry-After (RFC 9110, section 10.2.3), the seconds that the client waits at least
    ("7", 7), ("3600", 60), ("Thu, 31 Dec 2099 23:59:59 GMT", 60), ("", 0.1), ("-7", 0.1), ("soon", 0.1),
    ("Sun Nov  6 08:49:37 1994", 0.1), ("Thu, 31 Dec 99999999999 23:59:59 GMT", 0.1),
]


class ScriptedServer(Proxy):
    """It answers each POST of a message with the next script, and other requests with the page of their path.

    Scripts and pages are bytes, after which the connection ends. Where there is no page, it answers 404.
    """

    def __init__(self, *scripts, pages=()):
        self.pages = {"/stats": page_of({"model": "m"}), **dict(pages)}
        super().__init__(None, scripts)

    def fault_of(self, line):
        method, path, _ = line.split(" ")
        if (method, path.rpartition("/")[2]) == ("POST", "stream"):
            return Fault(instead=next(self.faults, b""))
        return Fault(instead=self.pages.get(path, refusal(404)))


@pytest.fixture
def library():
    """The client, imported anew: a test may change it."""
    spec = importlib.util.spec_from_file_location("client", CLIENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Chat:
    """What the library yields, raises and waits for when it sends a message."""

    def __init__(self, library, url, before_retry=lambda turn: None):
        self.text, self.kinds, self.pauses, self.error, self.session = "", [], [], None, new_id()

        def wait(error, number, seconds):
            self.pauses.append(seconds)
            before_retry(turn)
        turn = library.Turn(library.Api(url), TEXT, self.session, "t-1")
        try:
            for event in turn.run(wait):
                self.kinds.append(event["type"])
                if event["type"] == "session_info":     # another run begins
                    self.text = ""
                elif event["type"] == "chunk":
                    self.text += event["text"]
        except library.ChatError as error:
            self.error = error
        assert (turn.session_id, turn.turn_id) == (self.session, "t-1"), "a retry has the same ids"


@ours
class TestClientLibrary:
    """README, "Client recipe": transient failures are retried, others raised; no text is lost or doubled."""

    def test_a_cut_at_any_byte_neither_loses_nor_doubles_text(self, library):
        # Blank lines, unknown events and unknown fields do no harm.
        odd = [b"\r\n \n", line_of("news", text=1), b"\n", CHUNKS[0].replace(b"}", b',"mood":[]}')]
        with ScriptedServer() as server:
            for answer in (stream_of(*TURN), coded(*TURN[:2], *odd, *TURN[3:])):
                ends = [match.end() for match in re.finditer(b"\n", answer)]
                near = {end + step for end in ends for step in (-2, -1, 0, 1)}
                whole = answer.index(COMPLETE) + len(COMPLETE)
                for cut in sorted({*range(0, len(answer), 20), *near}):
                    server.faults = iter([answer[:cut], answer])
                    chat = Chat(library, server.url)
                    assert chat.error is None and chat.text == "".join(WORDS), cut
                    assert len(chat.pauses) == (cut < whole), cut
                    assert chat.kinds.count("session_info") == chat.kinds.count("complete") == 1, cut

    @cases(MAY_PASS)
    def test_a_transient_failure_is_retried(self, library, case):
        with ScriptedServer(case[1], stream_of(*TURN)) as server:
            chat = Chat(library, server.url)
            assert (chat.text, chat.error, len(server.requests)) == ("".join(WORDS), None, 2)

    @cases(STAYS)
    def test_any_other_failure_is_raised_as_one_sentence(self, library, case):
        _, code, words, scripts = case
        for script in scripts:
            with ScriptedServer(script, stream_of(*TURN)) as server:
                chat = Chat(library, server.url)
                assert (chat.error.code, chat.error.retryable) == (code, False), (script, chat.error)
                assert words in str(chat.error) and "\n" not in str(chat.error), script
                assert (len(server.requests), chat.pauses) == (1, []), script

    @cases(IN_VAIN)
    def test_the_client_gives_up_after_eight_retries_without_a_new_chunk(self, library, case):
        with ScriptedServer(*case[1], stream_of(*TURN)) as server:
            chat = Chat(library, server.url)
            assert (chat.error.code, len(server.requests)) == ("cut", len(case[1]))
        for seconds, longest in zip(chat.pauses[-8:], [0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5], strict=True):
            assert longest / 2 <= seconds <= longest

    def test_the_server_may_ask_for_a_longer_pause(self, library):
        for value, least in WAITS:
            with ScriptedServer(refusal(503, f"Retry-After: {value}"), stream_of(*TURN)) as server:
                [seconds] = Chat(library, server.url).pauses
                assert least <= seconds <= max(least, 0.2), value

    def test_after_a_stop_the_turn_is_never_posted_again(self, library):
        with ScriptedServer(PART[0], stream_of(*TURN)) as server:
            def stop(turn):
                path = f"/sessions/{turn.session_id}/"
                server.pages[path + "stop"] = page_of({"stopped": True})
                server.pages[path + "stream?after=1"] = stream_of(INFO, STATUS, *CHUNKS[1:], COMPLETE)
                assert turn.stop()
            chat = Chat(library, server.url, before_retry=stop)
            assert [line[:4] for line in server.requests if "/stream" in line] == ["POST", "GET "]
        assert chat.error is None and chat.text == "".join(WORDS)

    def test_a_silent_server_is_left_and_a_ping_breaks_a_silence(self, library, own, monkeypatch):
        assert (library.SILENCE, library.REPLY_TIME, library.STOP_TIME) == (30, 10, 3)
        monkeypatch.setattr(library, "SILENCE", 1)
        server = own("--chunk-delay", "1.3", "--chunk-words", "12", "--heartbeat", "0.2")
        with Proxy(server.address, [Fault(stall=800)]) as proxy:
            chat = Chat(library, proxy.url)
        check_kept(server, [(chat.session, chat.text)])
        assert len(chat.pauses) == 1 and "ping" in chat.kinds

    def test_a_bad_url_is_refused_and_a_path_is_kept(self, library):
        for url in ("localhost:8000", "http://:80", "http://me@localhost", "http://localhost:0",
                    "http://localhost/?a=b", "http://localhost/\r\nX: y", "http://localhost/caf\u00e9"):
            with pytest.raises(ValueError):  # noqa: PT011
                library.Api(url)
        with ScriptedServer(pages={"/chat/api/health": page_of({"status": "healthy"})}) as server:
            assert library.Api(server.url + "/chat/api/").health() == {"status": "healthy"}


FIRST_LINE = WORDS[0] + "\n"
RAW = "\x1b[2J\u009b\0\ufeff\u2028\r\n\n"
SCRIPTS = [             # what happens, the server's script, the exit status, both outputs
    ("the answer is empty", stream_of(INFO, line_of("complete")), 0, "\n", ""),
    ("the answer has raw controls and ends with newlines",
     stream_of(INFO, line_of("chunk", text=RAW, chunk_number=1), line_of("complete")), 0, RAW, ""),
    ("it ends early", PART[0] + line_of("complete", finish_reason="length"), 0, FIRST_LINE, "length"),
    ("the server is not there", None, 1, "", "unreachable"),
    ("it fails in hostile words", PART[0] + line_of("error", message="\x1b[2J"), 1, FIRST_LINE, "\\x1b[2J"),
    ("somebody stops it", PART[0] + line_of("complete", finish_reason="cancelled"), 1, FIRST_LINE, "stopped"),
]
WRONG = [               # arguments and standard input, what is said
    ((" \n",), b"\n ", "no message"), ((), b"\xff", "not UTF-8"),
    (("--session", "new", "Hi"), b"", "--session"), (("--token", "a secret", "Hi"), b"", "token"),
]
PROGRAM = "import sys, streamchat_client as client; client.FIRST_PAUSE = 0; sys.exit(client.main())"
NOWHERE = "http://127.0.0.1:1"


def in_script(url, *arguments, rest="", stdin=b"", **more):
    """Run the client in a shell. Returns its exit status and both outputs. `rest` is more shell text."""
    command = shlex.join([sys.executable, "-c", PROGRAM, "--url", url, *arguments]) + " " + rest
    more |= {"PYTHONPATH": str(CLIENT.parent)}
    done = subprocess.run(["sh", "-c", command], input=stdin, capture_output=True, timeout=3 * PATIENCE,
                          env=environment(**more))
    err = done.stderr.decode()
    assert "Traceback" not in err and "\x1b" not in err and "secret" not in err, err
    return done.returncode, done.stdout, err


def printed(server, session, is_json):
    """What the client prints to standard output for the only turn of a session."""
    [_, (_, text)] = server.history(session)
    return b"".join(server.follow(session).read().lines) if is_json else text.encode() + b"\n"


@ours
class TestScripts:
    """README, "Terminal client": the bare answer is all of standard output; the status tells how it ended."""

    @cases(SCRIPTS)
    @beside
    def test_only_the_answer_goes_to_standard_output(self, case):
        _, script, *expected, said = case
        with ScriptedServer(*9 * [script]) as server:
            status, out, err = in_script(server.url if script else NOWHERE, "Hi")
        *tries, last = err.splitlines() or [""]
        assert [status, out.decode()] == expected and said in last and bool(said) == bool(last), (out, err)
        assert all("Retrying in" in line for line in tries), err

    @beside
    def test_wrong_arguments_are_told(self):
        for arguments, stdin, said in WRONG:
            status, out, err = in_script(NOWHERE, *arguments, stdin=stdin)
            assert (status, out) == (2, b"") and said in err.splitlines()[-1], arguments

    @beside
    def test_a_token_comes_by_the_option_or_else_from_the_environment_and_is_never_shown(self, own):
        url = url_of(own("--token", TOKEN, "--chunk-delay", "0"))
        for options, variable in ((("--token", TOKEN), "other"), ((), TOKEN)):
            status, out, err = in_script(url, *options, "Hi", STREAMCHAT_TOKEN=variable)
            assert (status, err) == (0, "") and out.startswith(b"You said: Hi")
        status, out, err = in_script(url, "Hi", STREAMCHAT_TOKEN="my-secret")
        assert (status, out, err.count("\n")) == (1, b"", 1) and "token" in err

    @pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
    @beside
    def test_after_a_cut_the_run_goes_on_or_another_one_is_printed_from_its_start(self, fast, own, options):
        with Proxy(fast.address, [Fault(cut=900)]) as proxy:
            status, out, err = in_script(proxy.url, *options, "--session", session := new_id(), TEXT)
        assert (status, out, err.count("\n")) == (0, printed(fast, session, options), 1) and "Retrying" in err
        another = own(*INSTANT)
        with Proxy(fast.address, [Fault(cut=900)]) as proxy:    # after which the server has lost its memory
            proxy.note = lambda line, what: setattr(proxy, "target", another.address)
            status, out, err = in_script(proxy.url, *options, "--session", session := new_id(), TEXT)
        shown = printed(another, session, options)
        earlier = out.removesuffix(shown)
        assert status == 0 and out.endswith(shown) and earlier.endswith(b"\n")
        assert ("run again" in err) == (not options), "the lines of --json tell it"

    @beside
    def test_an_output_that_nobody_reads_any_more_ends_the_answer(self, own):
        server, session = own(*CALM), new_id()
        assert not in_script(url_of(server), "--session", session, LONG, rest="| head -c 10")[2]
        assert wait_until(lambda: not server.is_running(session), 5)

    @pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
    @beside
    def test_ctrl_c_stops_the_answer_and_keeps_what_was_printed(self, own, options):
        server, session = own(*CALM), new_id()
        command = [sys.executable, CLIENT, "--url", url_of(server), "--session", session, *options, LONG]
        with subprocess.Popen(command, bufsize=0, env=environment(), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            first = process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, err) == (130, b"")
        assert event_of(server.follow(session).read().lines[-1])["finish_reason"] == "cancelled"
        assert first + out == printed(server, session, options)


# ---- The client at a terminal

CTRL_A, CTRL_C, CTRL_D, CTRL_U, CTRL_Z, UP = "\x01", "\x03", "\x04", "\x15", "\x1a", "\x1b[A"
PASTED = "\x1b[200~{}\x1b[201~".format      # as terminals mark it
RULE = "\u2500" * 60
NOTICE_OF_A_CUT = "^\U0001f504 .*\n"


def width(line):
    """Columns on a terminal: 2 for wide characters and for what U+FE0F makes an emoji, none for marks."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in line)
    marks = sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in line)
    return len(line) + wide - marks + line.count("\ufe0f")


def raw_characters(text):
    """The characters of a log that would not stay in their line and place."""
    moving = "Cc", "Cf", "Zl", "Zp"
    return {character for character in text if unicodedata.category(character) in moving} - {"\n"}


class Terminal:
    """A program in a pseudo-terminal: what it has shown so far, and a person who types."""

    SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[=>])")

    def __init__(self, command, columns=80, **more):
        pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
        self.termios = pytest.importorskip("termios", reason="needs pseudo-terminals")
        self.shown, self.read = b"", 0
        self.outer, inner = pty.openpty()
        self.termios.tcsetwinsize(inner, (50, columns))
        self.modes_before = self.modes      # before the program can change them
        more = environment(**{"PYTHONIOENCODING": "utf-8", "TERM": "xterm", "COLUMNS": str(columns)} | more)
        self.process = subprocess.Popen(command, env=more, stdin=inner, stdout=inner, stderr=inner)
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

    @property
    def modes(self):
        return self.termios.tcgetattr(self.outer)[3]

    def wait(self, pattern):
        """Wait until this is shown, after what was waited for before. Returns the match."""
        compiled = re.compile(pattern, re.MULTILINE | re.DOTALL)
        found = wait_until(lambda: compiled.search(self.plain, self.read))
        assert found, f"no {pattern!r} in {self.plain[self.read:]!r}"
        self.read = found.end()
        return found

    def type(self, text, until=None):
        """Type this, and perhaps wait until a pattern is shown."""
        if text in (CTRL_C, CTRL_Z):
            time.sleep(0.2)     # readline does not notice a signal that comes while it draws
        data = text.encode("utf-8", "surrogateescape")
        while data:     # as a terminal passes a paste on, when there is room
            data = data[os.write(self.outer, data[:1000]):]
        return until and self.wait(until)

    def wait_for_end(self):
        status = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return status


class TerminalChat(Terminal):
    """The client in a pseudo-terminal. `changes` shrinks its limits; `home` is the folder of its history."""

    def __init__(self, url, *arguments, changes="pass", home=None, **more):
        self.folder, self.session = tempfile.TemporaryDirectory(), None
        self.home = home or Path(self.folder.name)
        # Ctrl-C reaches only a program that has the terminal as its own.
        program = ("import os, sys, streamchat_client as client; os.login_tty(0); "
                   f"{changes}; sys.exit(client.main())")
        more |= {"HOME": str(self.home), "BROWSER": 'sh -c "echo $0 >> $HOME/opened" %s',
                 "PYTHONPATH": str(CLIENT.parent)}
        super().__init__([sys.executable, "-c", program, "--url", url, *arguments], **more)

    def __exit__(self, *_):
        super().__exit__()
        self.folder.cleanup()
        assert "Traceback" not in self.plain, self.plain

    def wait_for_prompt(self):
        """Returns what was shown before it."""
        begin = self.read
        self.session = self.wait(r"^You (?:\[([^\]\n]+)\] )?\u203a ")[1]
        return self.plain[begin:self.read].partition("\n")[2].rpartition("\n")[0]

    def enter(self, line):
        """Type a line at the prompt. Returns what is shown for it until the next prompt."""
        self.type(line + "\r")
        return self.wait_for_prompt()

    def begin(self, message):
        """Send a message, and wait until its answer has begun."""
        self.type(message + "\r", "You said: word")

    def stop(self):
        """Press Ctrl-C. The prompt comes back soon, and the answer counts as stopped."""
        begin, pressed = self.read, time.monotonic()
        self.type(CTRL_C)
        self.wait_for_prompt()
        assert time.monotonic() - pressed < 5 and rows_of(self.plain[begin:self.read])["Status"] == "STOPPED"

    def lose(self, proxy):
        """Let the server go away in the middle of an answer, and wait until the client has noticed it."""
        self.begin("word " * 100)
        self.wait("(word ){8}")
        proxy.down()
        self.wait("Retrying")


@contextlib.contextmanager
def chatting(url, *arguments, **more):
    """A chat that has come to its first prompt."""
    with TerminalChat(url, *arguments, **more) as chat:
        chat.wait_for_prompt()
        yield chat


def rows_of(shown):
    """The rows of a box by their names."""
    return dict(re.findall(r"^\u2502 ([^:]+): (.*?) *\u2502$", shown, re.MULTILINE))


def check_boxes(shown, size=64):
    boxes = [line for line in shown.split("\n") if line[:1] in tuple("\u250c\u2502\u2514")]
    assert {width(line) for line in boxes} == {size}, boxes
    assert {line[-1] for line in boxes} == set("\u2510\u2502\u2518"), boxes


def check_shown(chat, server, session):
    """The last answer on the screen is that of the history, but for white space and the notices of cuts."""
    shown = re.sub(NOTICE_OF_A_CUT, "", chat.plain.split(RULE + "\n")[-2], flags=re.MULTILINE)
    assert shown.split() and "".join(shown.split()) == "".join(server.history(session)[-1][1].split())


def questions(server, session):
    return [text for role, text in server.history(session) if role == "user"]


CLIENT_COMMANDS = ["/help", "/stats", "/server", "/health", "/docs", "/demo", "/clear", "/quit", "/new",
                   "/info", "/sessions", "/switch", "/reset", "/delete", "/history", "/retry"]
NOT_SENT = [            # what is typed before the first message, what is said
    ("/HELP", "Unknown command /HELP. Did you mean /help"), ("/he", "Did you mean /help or /health"),
    ("/help me", "/help takes no argument"), ("/switch", "/switch needs"), ("/reset", "no session yet"),
    ("/switch nobody", "no such session. /sessions"), ("/retry", "nothing to send again"), ("   ", ""),
    ("/sess", "ALL ACTIVE SESSIONS"),
]
CURL = "curl -sS -X POST http://127.0.0.1:8000/sessions/" + "x" * 64 + "/stop"
BUSY_SESSION = {"detail": f"Busy. Stop it: {CURL}", "code": "session_busy"}
TOLD = [                # what the server sends, what is said, whether /retry is offered
    ([refusal(409, body=json.dumps(BUSY_SESSION).encode())], f"Busy. Stop it: \n{CURL}\n", True),
    ([PART[0] + line_of("error", code="model_auth", message="No key.")], "No key.\n", False),
    ([PART[0] + SHUTDOWN, stream_of(OTHER_INFO, *TURN[1:])], "stops. Retrying.*response again", False),
]


@ours
class TestTerminal:
    """README, "Terminal client": what a person sees who types to it."""

    @beside
    def test_an_answer_stands_between_two_rules_above_a_box(self, fast):
        session, wide = new_id(), "word \u91cf\u5b50 \U0001f600 \U0001f5a5\ufe0f " * 40 + "\u91cf" * 100
        with chatting(url_of(fast), "--session", session, COLUMNS="200") as chat:
            assert f"Connected to {url_of(fast)} " in chat.plain
            assert chat.session is None and session not in fast.session_ids()
            first, second = chat.enter("Hi!"), chat.enter(wide)
            assert chat.session == session[:8] + "..."
        answer, wrapped = fast.history(session)[1][1], second.split(RULE)[1]
        assert ("\U0001f4ad Generating response... (Context: 0 messages)\n\n"
                f"\U0001f916 AI Response (HTTP Streaming) ({session[:8]}... - offline)\n"
                f"{RULE}\n{answer}\n{RULE}\n\n") in first
        assert "".join(wrapped.split()) == "".join(fast.history(session)[3][1].split())
        assert max(map(width, wrapped.splitlines())) in (78, 79)
        words = set(re.findall("[A-Za-z]+", wrapped.partition("This")[0]))
        assert words == {"You", "said", "word"}, "a word is broken"
        check_boxes(first + "\n" + second)
        rows, total = rows_of(second), event_of(fast.follow(session).read().lines[-1])["total_chunks"]
        names = "Total Chunks", "Context Messages", "Transfer-Encoding", "Status"
        assert [rows[name] for name in names] == [str(total), "4", "chunked", "SUCCESS"]

    @beside
    def test_boxes_fit_the_terminal_and_tell_what_the_server_tells(self, serve):
        server = serve(*INSTANT)
        with chatting(url_of(server), "--session", "a-chat", columns=60) as chat:
            for line in ("Hi", "/new", "one two three four five six", "again"):
                chat.enter(line)
            shown = {name: chat.enter(name) for name in (*CLIENT_COMMANDS[:6], "/info", "/sessions")}
            opened = (chat.home / "opened").read_text().split()
        check_boxes("\n".join(shown.values()), 60)
        stats, session = rows_of(shown["/stats"]), rows_of(shown["/info"])
        name = server.get("/sessions")["sessions"][0]["session_id"][:8] + "..."
        assert stats["Total Chunks Received"] == str(server.stats()["total_chunks"])
        assert (stats["Messages Sent"], stats["Sessions Created"], stats["Failed Streams"]) == ("3", "2", "0")
        assert (session["Session ID"], session["Total Messages"], session["AI Messages"]) == (name, "4", "2")
        assert re.search(rf"│ 1\. {name} \(4 msgs, .*\) ← CURRENT *│\n│ 2\. a-chat ", shown["/sessions"])
        assert all(f"│ {name} " in shown["/help"] for name in CLIENT_COMMANDS)
        assert opened == [url_of(server) + page for page in ("/docs", "/demo")]

    @beside
    def test_sessions_are_changed_read_cleared_and_deleted(self, fast):
        ids = [new_id() for _ in range(3)]
        for session in (*ids, ids[1] + "-"):
            fast.turn(f"question of {session}", session_id=session)
        shorts = [session[:8] + "..." for session in ids]
        with chatting(url_of(fast), "--session", ids[0]) as chat:
            listed = re.findall(r"(\d+)\. (\S+) \(", chat.enter("/sessions"))
            [number] = [number for number, name in listed if name == shorts[2]]
            fast.turn("Hi")     # a new session is listed first, but a number means the list that was shown
            for session, argument in zip(ids[::-1], (number, ids[1], shorts[0]), strict=True):
                chat.enter(f"/switch {argument}")
                assert f"--session {session}" in chat.enter("/info").splitlines()[-1].split("later: ")
            assert "Several sessions" in chat.enter(f"/switch {ids[1][:10]}")
            shown = chat.enter("/history")
            assert all(text in shown for _, text in fast.history(ids[0]))
            chat.enter("/reset")
            assert fast.history(ids[0]) == []
            assert "gone" not in chat.enter("Hi"), "the user has cleared the messages"
            chat.enter("/delete")
            assert chat.session is None and fast.session_ids() & set(ids) == set(ids[1:])

    @beside
    def test_one_slash_begins_a_command_and_two_a_message(self, fast):
        before = fast.stats()["total_requests"]
        with chatting(url_of(fast), "--session", session := new_id()) as chat:
            for typed, said in NOT_SENT:
                assert re.search(said, chat.enter(typed)), typed
            assert fast.stats()["total_requests"] == before
            chat.enter("//help me")
        assert questions(fast, session) == ["/help me"]

    @pytest.mark.parametrize("more", [{}, {"LC_ALL": "C", "NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
    @beside
    def test_a_message_may_have_many_lines_and_any_characters_and_colours_can_be_off(self, fast, more):
        with chatting(url_of(fast), "--session", session := new_id(), **more) as chat:
            for line in ("über 世界", '"""\rline 1\r\r/quit\r"""'):
                chat.enter(line)
            if not more:        # readline would colour a paste
                chat.type(PASTED("line 1\r\r/quit"))
                chat.enter("")
            assert questions(fast, session) == ["über 世界", *(1 if more else 2) * ["line 1\n\n/quit"]]
            chat.enter("caf\udce9")     # no UTF-8
            assert rows_of(chat.enter("Hi"))["Status"] == "SUCCESS"
            assert bool(re.search(r"\x1b\[[\d;]*m", chat.text)) is (not more)

    @beside
    def test_the_terminal_is_left_as_it_was_and_the_next_run_knows_earlier_lines(self, fast, tmp_path):
        history, session = tmp_path / ".streamchat_history", new_id()
        with chatting(url_of(fast), home=tmp_path) as chat:
            chat.enter("one message")
            chat.type("/qui\t\r", "CLIENT SESSION STATISTICS.* Messages Sent: 1 .*Goodbye")
            assert chat.wait_for_end() == 0 and chat.modes == chat.modes_before
        assert history.stat().st_mode & 0o777 == 0o600 and history.read_text() == "one message\n/quit\n"
        with chatting(url_of(fast), "--session", session, home=tmp_path) as chat:
            chat.enter(UP + UP)
            for text in ("", "half a line"):    # Ctrl-C drops the line; twice on an empty one, it leaves
                chat.type(text, text)
                chat.type(CTRL_C, "Ctrl-C again")
                chat.wait_for_prompt()
            chat.type(CTRL_C, "CLIENT SESSION STATISTICS.*Goodbye")
            assert chat.wait_for_end() == 0 and chat.modes == chat.modes_before
        assert questions(fast, session) == ["one message"]

    @beside
    def test_a_failure_is_one_sentence_and_retry_is_offered_where_it_helps(self):
        scripts = [script for row in TOLD for script in row[0]]
        with ScriptedServer(*scripts) as server, chatting(server.url) as chat:
            for _, said, is_retryable in TOLD:
                shown = chat.enter("Hi")
                assert re.search(said, shown, re.DOTALL) and ("/retry" in shown) is is_retryable, shown


@ours
class TestStopAtTheTerminal:
    """README, "Terminal client": Ctrl-C stops the answer whatever the client does, and the prompt is back."""

    @beside
    def test_during_an_answer_and_while_the_server_is_stuck_or_away(self, own):
        server, session = own(*CALM), new_id()
        changes = "client.STOP_TIME = 60; client.STALL_TIME = 0.3"
        with Proxy(server.address) as proxy, \
                chatting(proxy.url, "--session", session, changes=changes) as chat:
            chat.begin(LONG)
            chat.stop()
            check_shown(chat, server, session)
            proxy.faults = iter([Fault(stall=900)])
            chat.begin(LONG)
            chat.type(PASTED("x" * 20_000))     # Ctrl-C comes through behind it
            chat.stop()
            assert not server.is_running(session)
            chat.type(CTRL_U)
            chat.lose(proxy)
            chat.stop()
            proxy.up()
            assert rows_of(chat.enter("Hi"))["Status"] == "SUCCESS" and questions(server, session)[-1] == "Hi"

    @beside
    def test_while_the_server_answers_nothing_and_the_next_message_asks_for_the_stop_again(self, own):
        server, session = own(*CALM), new_id()
        changes = "client.STOP_TIME = 1; client.STALL_TIME = 0.2"
        with Proxy(server.address, [Fault(stall=900)]) as proxy, \
                chatting(proxy.url, "--session", session, changes=changes) as chat:
            chat.begin(LONG)
            proxy.fault_of = lambda line: Fault(stall=0)
            chat.stop()
            begin, requests = chat.read, len(proxy.requests)
            chat.type("not lost\r")
            assert wait_until(lambda: any("/stop" in line for line in proxy.requests[requests:]))
            chat.type(CTRL_C)
            chat.wait_for_prompt()
            assert "was not sent" in chat.plain[begin:] and "STOPPED" not in chat.plain[begin:]
            del proxy.fault_of
            assert rows_of(chat.enter("/retry"))["Status"] == "SUCCESS"
            assert questions(server, session) == [LONG, "not lost"]


TYPED = [               # what is typed during an answer, and when it was stopped; what waits at the prompt
    ("one\r/delete\r/quit\rcaf\u00e9\u91cf\U0001f600", "", "one\n/delete\n/quit\ncaf\u00e9\u91cf\U0001f600"),
    ("/delete\r", "", "/delete"),
    ("a\x04\x00\x15\x17\x01b\x7fc" + UP + "\x1bOd\x1b[3~", "", "ac"),
    ("x" * 6000, "", "x" * 6000),
    (PASTED("a\x04\t\x15b\x03\x1a\x1c\r/quit\r"), "", "a\x04\t\x15b\x03\x1a\x1c\n/quit\n"),
    ("\x1b[200~one\r/del", "ete\rtwo\x1b[201~", "one\n/delete\ntwo"),
]


@ours
class TestTypedDuringAnAnswer:
    """README, "Terminal client": what is typed during an answer waits at the next prompt, as one text."""

    @pytest.mark.parametrize("rows, more", [(TYPED, {}), (TYPED[:1], {"LC_ALL": "C"})], ids=["as usual", "C"])
    @beside
    def test_nobody_but_the_user_sends_it(self, own, rows, more):
        server, session = own(*CALM), new_id()
        with chatting(url_of(server), "--session", session, **more) as chat:
            for during, after, _ in rows:
                chat.begin("word " * 800)
                chat.type(during)
                server.stop(session)
                chat.wait("STOPPED")
                chat.type(after)
                chat.wait_for_prompt()
                chat.type("+")
                chat.enter(CTRL_A + "=")
        assert questions(server, session)[1::2] == ["=" + text + "+" for *_, text in rows]
        assert len(server.history(session)) == 4 * len(rows)


@ours
class TestSignals:
    """Whatever ends or suspends the client at a terminal leaves it as it was."""

    @pytest.mark.parametrize("name, at_prompt", [("SIGTERM", True), ("SIGHUP", False)])
    @beside
    def test_a_signal_that_ends_it(self, own, name, at_prompt):
        with chatting(url_of(own(*CALM))) as chat:
            if not at_prompt:
                chat.begin(LONG)
            assert chat.modes != chat.modes_before
            chat.process.send_signal(getattr(signal, name))
            assert chat.wait_for_end() == -getattr(signal, name)
            assert chat.modes == chat.modes_before
            assert chat.text.rfind("\x1b[?2004l") > chat.text.rfind("\x1b[?2004h")

    @on_linux
    @beside
    def test_ctrl_z_at_the_prompt_and_during_an_answer_and_a_client_in_the_background(self, own):
        server, session = own(*CALM), new_id()

        def suspend():
            shell.type(CTRL_Z, "shell> ")
            assert shell.modes == shell.modes_before
        login = f"import os; os.login_tty(0); os.execv({needs('dash')!r}, ['sh', '-im'])"
        with Terminal([sys.executable, "-c", login], PS1="shell> ", HOME="/nowhere") as shell:
            shell.wait("shell> ")
            client = shlex.join([sys.executable, str(CLIENT), "--url", url_of(server), "--session", session])
            stat = Path("/proc", shell.type(f"{client} & echo [$!]\r", r"\[(\d+)\]\n")[1], "stat")
            assert wait_until(lambda: stat.read_text().split()[2] == "T"), "in the background it waits"
            shell.type("fg\r", "You \u203a ")
            shell.type("word " * 50 + "!", "!")
            suspend()
            shell.type("fg\r", "You \u203a word word")
            shell.type("\r", "You said: word")
            suspend()
            shell.type("fg\r", r"word word.*SUCCESS.*You \[")
            assert questions(server, session) == ["word " * 50 + "!"]
            shell.type(CTRL_D, "Goodbye.*shell> ")
            assert shell.modes == shell.modes_before


@ours
class TestTerminalRecovers:
    """README, "Client recipe": after a cut the screen shows the server's text, once and whole."""

    @beside
    def test_it_waits_for_a_server_that_is_away_and_tells_what_it_lost(self, own):
        server, session, changes = own(*CALM), new_id(), "client.FIRST_PAUSE = 0.02"
        with Proxy(server.address) as proxy, \
                chatting(proxy.url, "--session", session, changes=changes) as chat:
            chat.lose(proxy)
            time.sleep(0.5)
            proxy.up()
            chat.wait_for_prompt()
            check_shown(chat, server, session)
            assert len(re.findall(NOTICE_OF_A_CUT, chat.plain, re.MULTILINE)) <= 2
            chat.lose(proxy)
            server.request("DELETE", f"/sessions/{session}")
            proxy.up()
            chat.wait("earlier messages are gone: the server has 0 of 2.*Generating response again")
            chat.wait_for_prompt()
            check_shown(chat, server, session)
            assert rows_of(chat.enter("/stats"))["Recovered Streams"] == "2"

    @beside
    def test_without_a_server_the_prompt_comes_and_retry_sends_the_same_turn_again(self, fast):
        session, changes = new_id(), "client.FIRST_PAUSE = 0.01; client.RETRIES = 1"
        with Proxy(fast.address, [Fault(cut=800)] * 2) as proxy:
            proxy.down()
            with chatting(proxy.url, "--session", session, changes=changes) as chat:
                assert chat.plain.count("refused") == 1
                assert rows_of(chat.enter(TEXT))["Status"] == "FAILED"
                assert rows_of(chat.enter("/stats"))["Messages Sent"] == "0"
                proxy.up()
                assert "/retry sends" in chat.enter("/retry")       # it is cut
                assert rows_of(chat.enter("/retry"))["Status"] == "SUCCESS"
                check_shown(chat, fast, session)
                assert rows_of(chat.enter("/stats"))["Messages Sent"] == "1"
        assert len(fast.history(session)) == 2


@ours
class TestTerminalIsSafe:
    """README, "Access control": control characters from outside are shown as escapes."""

    def check_safe(self, chat):
        ours = r"\x1b(\[(\d+(;\d+)*m|\?2004[hl])|\[?\d*\Z)"     # the last may not be whole yet
        shown = re.sub(ours, "", chat.text)
        assert {character for character in shown if unicodedata.category(character) == "Cc"} <= set("\r\n")
        assert not [raw for raw in ("\rFORGED", "\x1b[31mFORGED", "\ufffd") if raw in chat.text]

    @beside
    def test_in_a_session_that_is_entered_while_an_answer_runs(self, own):
        server, session = own(*CALM), new_id()
        with contextlib.closing(server.chat(FORGED + LONG, session_id=session).connection), \
                TerminalChat(url_of(server), "--session", session) as chat:
            chat.wait(rf"^You \[{session[:8]}\.\.\.\] \u203a x\nFORGED.*You said: .*word")
            assert server.stop(session)
            chat.wait_for_prompt()
            chat.enter("/history")
            assert chat.plain.count(r"\x1b[31mFORGED") == 4
            self.check_safe(chat)

    @pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
    @beside
    def test_in_the_output_of_one_answer(self, options):
        chunk = {"type": "chunk", "text": "\u009b31m\x7f", "chunk_number": 1}
        hostile = json.dumps(chunk, ensure_ascii=False)
        with ScriptedServer(stream_of(INFO, hostile.encode() + b"\n", line_of("complete"))) as server, \
                TerminalChat(server.url, *options, "Hi") as chat:
            assert chat.wait_for_end() == 0 and r"\x9b31m\x7f" in chat.plain
            self.check_safe(chat)

    @beside
    def test_in_all_that_a_server_says(self):
        info = line_of("session_info", session_id="s-1", turn_id="t-1", model=FORGED)
        details = FORGED, f"Stop it: curl http://x/{FORGED}"
        scripts = [stream_of(info, *TURN[1:3], line_of("error", message=FORGED)),
                   *(refusal(409, body=json.dumps({"detail": detail}).encode()) for detail in details),
                   refusal(302, "Location: x\x1b[31mFORGED")]
        stats = page_of({"model": FORGED, "framework": FORGED})
        with ScriptedServer(*scripts, pages={"/stats": stats}) as server, chatting(server.url) as chat:
            for line in (*["Hi"] * len(scripts), "/server"):
                assert r"\x1b[31m" in chat.enter(line), line
                self.check_safe(chat)
            check_boxes(chat.plain)


# ---- The demo page, in Chromium

# W3C WebDriver, section "Keyboard actions"
TAB, ENTER, SHIFT, ESCAPE = "\ue004", "\ue007", "\ue008", "\ue00c"
SEE = """       // what the tests see of the page, whose clocks of more than 100 ms run `pace` times as fast
{
  const {setTimeout} = window, all = css => Array.from(document.querySelectorAll(css));
  const texts = css => all(css).map(each => each.textContent);
  window.see = {
    all, texts, pace: 5, copied: "", questions: [], focused: new Set(),
    shown: css => all(css).filter(each => each.checkVisibility()),
    articles: () => all("#log article").map(
      each => [each.classList[0], each.querySelector(".text").textContent]),
    answer: () => texts("#log > article.model:last-of-type > .text")[0] ?? "",
    state: () => all("#state")[0].dataset.state,
    notice: () => texts("#told")[0],
    place: css => all(css)[0].scrollTop,
    isAtEnd: css => all(css).every(box => box.scrollHeight - box.clientHeight - box.scrollTop <= 2),
  };
  window.setTimeout = (then, ms, ...more) => setTimeout(then, ms > 100 ? ms / see.pace : ms, ...more);
  window.confirm = question => see.questions.push(question);    // the answer is yes
  Object.assign(navigator.clipboard ?? {}, {writeText: async text => { see.copied = text; }});
  addEventListener("focusin", ({target}) => see.focused.add(target));
}
"""


class Browser:
    """Chromium, driven by WebDriver over plain HTTP."""

    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-sync", "--disable-background-networking", "--disable-component-update",
             "--disable-smooth-scrolling", "--window-size=1200,900", "--app=data:,")

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            profile = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            driver = stack.enter_context(subprocess.Popen(
                [needs("chromedriver"), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                encoding="utf-8"))
            stack.callback(driver.terminate)
            ready = next(line for line in driver.stdout if "started successfully on port" in line)
            self.port, self.session = int(re.findall(r"\d+", ready)[-1]), ""
            options = {"binary": needs("chromium"), "args": [*self.FLAGS, f"--user-data-dir={profile}"]}
            asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            self.session = "/" + self.ask("POST", "", capabilities={"alwaysMatch": asked})["sessionId"]
            stack.callback(self.ask, "DELETE", "")
            self.cdp("Page.addScriptToEvaluateOnNewDocument", source=SEE)
            self.ending = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.ending.close()

    def ask(self, method, path, **body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = json.dumps(body) if method == "POST" else None
        connection.request(method, f"/session{self.session}{path}", body)
        value = json.loads(connection.getresponse().read())["value"]
        connection.close()
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def cdp(self, command, **parameters):
        """What WebDriver has no word for (Chrome DevTools Protocol)."""
        return self.ask("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    @contextlib.contextmanager
    def tab(self):
        """Lend the first tab to a test, as if it were new. The test must leave no error."""
        self.run("try { sessionStorage.clear(); } catch { }")      # an empty page has none
        self.cdp("Emulation.clearDeviceMetricsOverride")
        self.errors()
        yield
        errors = self.errors()
        assert not errors, errors

    @contextlib.contextmanager
    def another(self):
        """A new window beside the first."""
        before = self.ask("GET", "/window")
        handle = self.ask("POST", "/window/new", type="window")["handle"]
        self.ask("POST", "/window", handle=handle)
        try:
            self.cdp("Page.addScriptToEvaluateOnNewDocument", source=SEE)
            yield
        finally:
            self.ask("DELETE", "/window")
            self.ask("POST", "/window", handle=before)

    def errors(self):
        """The errors in the console since this was asked last, except for statuses and lost connections."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", type="browser")
                if entry["level"] == "SEVERE" and entry["source"] != "network"]

    def open(self, url):
        self.ask("POST", "/url", url=url)

    def reload(self):
        self.ask("POST", "/refresh")

    def run(self, script, *args):
        """The value that a function body in JavaScript resolves to."""
        script = f"const [...args] = arguments, done = args.pop(); (async () => {{{script}}})().then(done, " \
                 "error => done({error: String(error)}));"
        return self.ask("POST", "/execute/async", script=script, args=list(args))

    def see(self, what, *args):
        return self.run(f"return see.{what};", *args)

    def wait(self, condition, *args):
        """The value of an expression in JavaScript, once it is true; what it needs may not be there yet."""
        value = wait_until(lambda: self.run(f"try {{ return {condition}; }} catch {{ }}", *args))
        assert value, (condition, args, self.run("return document.body.innerText;"))
        return value

    def click(self, css):
        [element] = self.wait("see.shown(args[0])[0]", css).values()
        self.ask("POST", f"/element/{element}/click")

    def keys(self, text):
        """Press one key after the other, for whatever has the focus. SHIFT holds until it comes again."""
        [element] = self.ask("GET", "/element/active").values()
        self.ask("POST", f"/element/{element}/value", text=text)

    # What a person does in the demo page, and sees there

    def demo(self, url, session=None, view=""):
        """Open the page with this session, or with a new one, and return its id."""
        session = session or new_id()
        self.open(f"{url}/demo?session={session}{view}")
        self.wait("see.state()")
        return session

    def turn_to(self, view):
        self.run("location.hash = args[0];", view)
        self.wait("see.shown('#' + args[0]).length", view)

    def send(self, message):
        self.run("see.all('#message')[0].value = args[0]; see.all('#form')[0].requestSubmit();", message)

    def say(self, message):
        """Send a message, and wait for the end of the answer."""
        self.send(message)
        self.wait("see.all('#log > article.model:last-of-type > .end').length")

    def until(self, state):
        self.wait("see.state() === args[0]", state)

    def until_longer(self, count=40):
        """The answer has grown by so many characters."""
        self.wait("see.answer().length > args[0]", len(self.see("answer()")) + count)

    def check_articles(self, server, session, gone=0):
        """The page shows the session's history, to the character, below articles that are gone from it."""
        told = [list(message) for message in server.history(session)]
        wait_until(lambda: self.see("articles()")[gone:] == told)
        assert self.see("articles()")[gone:] == told

    def stop(self, server, session):
        """Stop the turn: what is shown is what had left, and the history keeps the same."""
        self.click("#stop")
        self.until("stopped")
        self.check_articles(server, session)


class Site(Proxy):
    """A proxy that gives these answers itself, by their paths, so that pages and streams have one origin."""

    def __init__(self, target, pages, faults=()):
        self.pages = pages
        super().__init__(target, faults)

    def fault_of(self, line):
        page = self.pages.get(line.split(" ")[1])
        return Fault(instead=page) if page else super().fault_of(line)


PAGE_PACE = ("--chunk-delay", "0.01", "--log", "off")
SPACED = "  two  spaces\n\n\ta tab and " + TEXT
FENCED = """Not code: a ``` b ```
```py
print(1)
~~~
    ```
```
between
~~~
\tif a < b:
```
~~~
````
open to the end"""
CODE_BLOCKS = ["print(1)\n~~~\n    ```\n```\n", "\tif a < b:\n```\n~~~\n", "open to the end"]


@ours
class TestThePageShowsText:
    """An answer is appended as it comes, and each character is shown. What the reader does stays."""

    @beside
    def test_each_character_is_shown_and_fenced_code_has_boxes_to_copy(self, own, browser):
        server = own(*INSTANT, "--chunk-words", "1")
        session = browser.demo(url_of(server))
        browser.say(FENCED)
        browser.check_articles(server, session)
        for kind in ("user", "model"):      # a whole text, and one that grew word by word
            *closed, last = browser.see("texts(args[0])", f"#log > .{kind} .code pre")
            assert closed == CODE_BLOCKS[:-1] and last.startswith(CODE_BLOCKS[-1]), kind
        browser.click("#log > .model .copy")
        assert browser.see("copied") == CODE_BLOCKS[0].removesuffix("```\n")

    @beside
    def test_the_reader_owns_the_scroll_position_and_the_selection(self, own, browser):
        def turn_wheel(pixels):
            browser.cdp("Input.dispatchMouseEvent", type="mouseWheel", x=700, y=450, deltaX=0, deltaY=pixels)

        def scroll_by_software(pixels):
            browser.run("see.all('#lines')[0].scrollTop += args[0];", pixels)

        server = own(*CALM)
        session = browser.demo(url_of(server))
        browser.send("line\n" * 2000)
        for view, scroll, box, button, line in [
                ("chat", turn_wheel, "#log", "#latest", "#log > .model .text span"),
                ("wire", scroll_by_software, "#lines", "#lines-latest", "#lines > [data-type=chunk]")]:
            browser.turn_to(view)
            browser.wait("see.place(args[0]) > 50", box)
            assert browser.see("isAtEnd(args[0])", box), "it does not follow"
            scroll(-9)
            browser.wait("see.shown(args[0]).length", button)
            browser.run("getSelection().selectAllChildren(see.all(args[0])[0]);", line)
            seen = "return [see.place(args[0]), getSelection().toString()];"
            before = browser.run(seen, box)
            browser.until_longer()
            assert browser.run(seen, box) == before and "line" in before[1]
            scroll(9)
            browser.wait("see.place(args[0]) > args[1]", box, before[0])
            browser.until_longer()
            assert not browser.see("isAtEnd(args[0])", box), "a reader who is not at the very end stays there"
            browser.click(button)
            browser.until_longer()
            assert browser.see("isAtEnd(args[0])", box), "it does not follow again"
        browser.turn_to("chat")
        browser.stop(server, session)


@ours
class TestThePageChats:
    """README, "Demo page": what a person does, and what the page says about it."""

    @beside
    def test_sessions_are_opened_begun_cleared_and_deleted(self, serve, browser):
        def choose(session):
            """In one step, since the list may be drawn again at any moment."""
            browser.wait("see.all(args[0]).map(each => each.click()).length", f"[data-id='{session}']")

        server = serve(*CALM)
        server.turn("What is\n a chunk?", session_id="one")
        server.turn("Hi", session_id="two")
        browser.demo(url_of(server), "one")
        names = "see.texts('#sessions .name').map(name => name.trim()).join(' | ') === args[0]"
        browser.wait(names, "two Hi | one What is a chunk?")
        browser.check_articles(server, "one")
        browser.click("#new")
        browser.wait("!location.search && !see.articles().length")
        browser.send(LONG)
        browser.until("streaming")
        third = browser.run("return location.search;").partition("=")[2]
        choose("two")
        browser.check_articles(server, "two")
        choose(third)
        browser.until_longer()
        assert server.readers(third) == [1], "the answer went on"
        browser.wait("see.texts('#sessions .name')[0].includes('word word')")
        browser.stop(server, third)

        for session, button in [("one", "#clear"), ("two", "#delete")]:
            choose(session)
            browser.check_articles(server, session)
            browser.click(button)
            browser.wait("!see.articles().length")
        assert len(browser.see("questions")) == 2
        assert server.history("one") == [] and server.session_ids() == {"one", third}

    @beside
    def test_keys_send_and_stop_but_those_of_an_input_method_do_not(self, own, browser):
        """UI Events, 5.7: the keys of an input method have the code 229, in Safari also its last one."""
        def press(key, code):
            browser.cdp("Input.dispatchKeyEvent", type="rawKeyDown", key=key, code=key,
                        windowsVirtualKeyCode=code)

        server = own(*CALM)
        session = browser.demo(url_of(server))
        browser.click("#message")
        browser.keys(" " + ENTER + "One" + SHIFT + ENTER + SHIFT)
        browser.cdp("Input.imeSetComposition", text="\u304b", selectionStart=1, selectionEnd=1)
        press("Enter", 13)
        browser.cdp("Input.insertText", text="\u65e5")
        press("Enter", 229)
        assert browser.see("state()") == "idle"
        browser.cdp("Input.insertText", text="\n" + LONG)
        browser.keys(ENTER)
        browser.until_longer()
        press("Escape", 229)
        browser.until_longer()
        assert browser.see("state()") == "streaming"
        browser.keys(ESCAPE)
        browser.until("stopped")
        browser.check_articles(server, session)
        assert server.history(session)[0] == ("user", " One\n\u65e5\n" + LONG)

    @beside
    def test_stop_ends_the_turn_on_the_server_and_a_refused_message_is_not_lost(self, own, browser):
        def has_begun():
            streams = server.stats()["streams"]
            return any(stream["chunks"] for stream in streams if stream["session_id"] == session)

        server, session = own(*CALM), new_id()
        stalls = [("sending", 0, ""), ("waiting", b'{"type":"chunk"', ""),
                  ("streaming", b'"chunk_number":3', "You said: " + "word " * 6)]
        faults = [fault for _, stall, _ in stalls for fault in (Fault(stall=stall), Fault())]
        with Proxy(server.address, [*faults, Fault(instead=refusal(409))]) as proxy:
            browser.demo(proxy.url, session)
            for state, _, text in stalls:
                browser.send(LONG)
                browser.wait("see.state() === args[0] && see.answer() === args[1]", state, text)
                assert wait_until(has_begun)        # a turn without text would not be kept
                browser.stop(server, session)
            browser.send(SPACED)
            browser.wait("see.texts('.failed')[0].endsWith('This is refused.')")
            assert browser.see("articles()")[-2] == ["user", SPACED]
            browser.click(".retry")
            browser.until("complete")
            browser.check_articles(server, session)
            browser.send("x" * 100_001)
            browser.wait("see.notice().includes('at most 100,000')")
            assert browser.see("all('#message')[0].value.length") == 100_001

    @beside
    def test_the_token_is_asked_for_and_kept_for_the_tab_alone(self, own, browser):
        server, asked = own("--token", TOKEN, *INSTANT), "see.shown('#login').length"
        session = browser.demo(url_of(server))
        for token in ("wrong", TOKEN):
            browser.wait(f"{asked} && document.activeElement.id === 'token'")
            browser.keys(token + ENTER)
        browser.wait(f"!{asked}")
        browser.say("Hi")
        browser.reload()
        browser.check_articles(server, session)
        kept = "return JSON.stringify({...window[args[0]]}) + document.cookie + location;"
        assert TOKEN in browser.run(kept, "sessionStorage")
        assert TOKEN not in browser.run(kept, "localStorage")


@ours
class TestThePageRecovers:
    """After a cut the page shows the server's text, nothing twice and nothing missing, and says so."""

    @beside
    def test_a_cut_at_any_place_neither_loses_nor_doubles_text(self, own, browser):
        cuts = [0, 9, 100, b'{"type":"status"', b'"chunk_number":2', b'"text":"', b'"is_final":true',
                b"\n\r\n0\r\n"]
        complete = line_of("complete", finish_reason="stop", total_chunks=1, processing_time=1)
        trouble = [refusal(503, "Retry-After: 1"), refusal(504), refusal(502, body=b"<html>"), b"",
                   b"HTTP/1.1 20", stream_of(complete), stream_of(SHUTDOWN),
                   stream_of(line_of("chunk", text="not the first", chunk_number=2))]
        faults = [Fault(stall=b'"chunk_number":3'), Fault(), *cut_once(cuts), *BYTE_BY_BYTE,
                  *(fault for raw in trouble for fault in (Fault(instead=raw), Fault()))]
        server = own(*PAGE_PACE)
        before = server.stats()["total_requests"]
        with Proxy(server.address, faults) as proxy:
            session = browser.demo(proxy.url)
            browser.run("see.pace = 60;")       # 30 s of silence are half a second here
            browser.say(TEXT)
            browser.run("see.pace = 5;")
            turns = len(cuts) + len(trouble) + 2
            for _ in range(1, turns):
                browser.say(TEXT)
            browser.check_articles(server, session)
            asked = {line for line in proxy.requests if STREAM.match(line)}
            assert asked == {f"POST /sessions/{session}/stream HTTP/1.1"}, "its own turn is sent again"
            assert server.stats()["total_requests"] == before + turns and not next(proxy.faults, None)

    @beside
    def test_a_reload_and_a_second_window_go_on_with_question_and_answer(self, own, browser):
        server = own(*CALM)
        with Proxy(server.address) as proxy:
            session = browser.demo(proxy.url)
            browser.send(SPACED + LONG)
            browser.until_longer()
            browser.reload()
            browser.until_longer()
            with browser.another():
                browser.demo(proxy.url, session)
                browser.until_longer()
                proxy.down()
                proxy.up()
                browser.wait("see.notice().includes('Nothing is missing')")
                assert wait_until(lambda: server.readers(session) == [2])
                browser.stop(server, session)
            browser.until("stopped")
            browser.check_articles(server, session)
        assert [role for role, _ in server.history(session)] == ["user", "model"]

    @beside
    def test_the_page_asks_seldom_and_shows_what_other_clients_say_in_its_place(self, serve, browser):
        """While nothing happens it asks for the list every 4 s, here 0.2 s, and for nothing while hidden."""
        def asked_in(seconds):
            before = len(proxy.requests)
            time.sleep(seconds)
            return proxy.requests[before:]

        server = serve(*PAGE_PACE)
        with Proxy(server.address) as proxy:
            session = browser.demo(proxy.url)
            browser.run("see.pace = 20;")
            browser.say("One")
            browser.wait("see.texts('#sessions button')[0].includes('One2 messages')")
            began, asked = time.monotonic(), asked_in(0.7)
            assert {*asked} == {"GET /sessions HTTP/1.1"}
            assert len(asked) <= (time.monotonic() - began) / 0.2 + 1
            browser.run("Object.defineProperty(document, 'hidden', {value: true, configurable: true});")
            asked_in(0.2)       # what was asked before is over
            assert asked_in(0.5) == []
            browser.run("delete document.hidden;")

            proxy.fault_of = lambda line: Fault(instead=refusal(503) if line[:3] == "GET" else None)
            server.turn("line\n" * 60, session_id=session)
            browser.say("The page does not know what the other client said")
            proxy.fault_of = lambda line: Fault()
            browser.check_articles(server, session)
            browser.run("see.all('#sessions button')[0].focus(); see.all('#log')[0].scrollTop = 30;")
            server.turn("From another client", session_id=session)
            browser.check_articles(server, session)
            browser.wait("see.texts('#sessions button')[0].includes('8 messages')")
            assert browser.see("place('#log')") == 30
            assert browser.run("return document.activeElement.dataset.id;") == session, "the focus is lost"
            server.request("POST", f"/sessions/{session}/clear")
            browser.wait("see.texts('#log > .end')[0].includes('no longer has the messages above')")

    @beside
    def test_a_server_that_was_away_and_lost_its_memory_is_found_again(self, serve, browser):
        server = serve(*CALM)
        with Proxy(server.address) as proxy:
            session = browser.demo(proxy.url)
            browser.say("Hi")
            browser.send(SPACED * 3)
            browser.until_longer(10)
            proxy.down()
            browser.until("away")
            server = serve(*PAGE_PACE, "--chunk-words", "1")    # joined texts differ then
            proxy.target = server.address
            proxy.up()
            browser.until("complete")
            browser.check_articles(server, session, gone=2)
            assert "another run" in browser.see("notice()")
            assert "no longer has the messages above" in browser.see("texts('#log > .end')")[0]


QUOTES = "it's \"quoted\" $HOME `id` !! \\n \\ %s *\n\ttab \x7f caf\u00e9 \U0001f600 \u2028 ' '' <&>"
WIRE_ROWS = """     // type, seconds since the request and since the row before, bytes, what came
all("#lines .line:not(.head)").map(({dataset, textContent: text}) =>
  [dataset.type, ...[[0, 8], [9, 17], [18, 29]].map(cell => text.slice(...cell).trim()), text.slice(31)])"""
BODY_HAS_ENDED = "see.all('#lines .line:not([data-type=ping])').at(-1).dataset.type === 'note'"


def in_a_shell(line):
    """What a curl line of the page prints. It is safe to show, and to paste."""
    assert TOKEN not in line and line.isascii()
    return run(["sh", "-c", line], None, {"STREAMCHAT_TOKEN": TOKEN})


@ours
class TestThePageShowsTheWire:
    """README, "Demo page": each line of a stream as it came, and what recovery does, at a button's press."""

    @beside
    def test_each_line_is_shown_as_it_came_and_the_curl_line_does_the_same(self, own, browser):
        needs("curl")
        server = own("--heartbeat", "0.05", "--log", "off")
        session = browser.demo(url_of(server), view="#wire")
        browser.say(QUOTES)
        browser.wait(BODY_HAS_ENDED)
        rows = browser.see(WIRE_ROWS)
        kinds = [kind for kind, *_ in rows]
        assert kinds[:2] == ["request", "response"] and "ping" in kinds
        line, body = rows[0][4].split("\n")
        assert line == f"POST /sessions/{session}/stream HTTP/1.1" and json.loads(body)["message"] == QUOTES
        assert re.match(r"HTTP 200 OK\n(.*\n)*content-type: application/x-ndjson", rows[1][4])
        stream = b"".join(server.follow(session).read().lines).decode()
        assert "".join(raw + "\n" for kind, *_, raw in rows if kind in EVENTS and kind != "ping") == stream
        sizes = [len(raw) + 1 if kind in EVENTS else 0 for kind, *_, raw in rows]
        assert [row[3] for row in rows] == [f"{size} ({size:x})" if size else "" for size in sizes]
        for (_, before, *_), (_, since, gap, *_) in itertools.pairwise(rows):
            assert abs(float(gap) - (float(since) - float(before))) < 0.002
        chunks = [float(since) for kind, since, *_ in rows if kind == "chunk"]
        assert all(since >= 0.1 * number for number, since in enumerate(chunks)), "the pace does not allow it"
        history = server.history(session)
        browser.click("#curl")
        assert in_a_shell(browser.see("copied")) == stream and server.history(session) == history

    @beside
    def test_a_connection_is_dropped_and_resumed_and_a_turn_sent_again(self, own, browser):
        server = own(*CALM)
        session = browser.demo(url_of(server), view="#wire")
        browser.send(LONG)
        browser.until_longer(80)
        browser.click("#drop")
        browser.until("dropped")
        assert wait_until(lambda: server.readers(session) == [0]), "it reads on, or the turn has ended"
        browser.click("#resume")
        browser.until_longer()
        assert "Nothing is missing" in browser.see("notice()") and server.readers(session) == [1]
        chunks = [raw for kind, *_, raw in browser.see(WIRE_ROWS) if kind == "chunk"]
        assert len(set(chunks)) == len(chunks), "a chunk came twice"
        browser.stop(server, session)
        browser.click("#again")
        browser.wait(f"see.all('#lines [data-type=complete]').length === 2 && {BODY_HAS_ENDED}")
        browser.check_articles(server, session)
        asked = [raw.split(" HTTP/1.1")[0] for kind, *_, raw in browser.see(WIRE_ROWS) if kind == "request"]
        assert asked[0] == asked[-1] == f"POST /sessions/{session}/stream"
        assert int(asked[1].removeprefix(f"GET /sessions/{session}/stream?after=")) > 3


TRY = """         // fill in the session, and the body if the request has one, and press "Try it"
const [id, session, body] = args, box = document.getElementById(id);
box.open = true;
while (!box.querySelector("form")) await new Promise(then => setTimeout(then, 20));
const [request] = box.querySelector("form").elements, [head, example] = request.value.split("\\n\\n");
request.value = head.replace("{session_id}", session) + (example ? "\\n\\n" + body : "");
request.dispatchEvent(new Event("input", {bubbles: true}));
box.querySelector(".try").click();
"""


def try_out(browser, operation, session, body):
    """What the page shows of the whole answer."""
    browser.run(TRY, operation, session, body)
    browser.wait("see.texts(args[0])[0].includes('all after')", f"#{operation} .status")
    return browser.see("texts(args[0])[0]", f"#{operation} .answer")


@ours
class TestThePageShowsTheApi:
    """README, "Demo page": the operations of /openapi.json, each with a request to be edited and sent."""

    @beside
    def test_every_operation_can_be_tried_below_a_path_of_a_proxy_too(self, own, browser):
        needs("curl")
        server, session = own("--token", TOKEN, *INSTANT), new_id()
        turn = json.dumps({"message": QUOTES, "session_id": session, "turn_id": "t-1"}, ensure_ascii=False)
        below = [("location / {", "location /ai/ {"), ("proxy_pass http://chat;", "proxy_pass http://chat/;")]
        with nginx(server, *below) as (host, port):
            browser.open(f"http://{host}:{port}/ai/docs")
            browser.run("sessionStorage.token = args[0];", TOKEN)
            browser.reload()
            browser.wait("see.all('.operation').length")
            names = browser.see("all('.operation').map(box => box.id)")
            assert len(names) == sum(map(len, server.get("/openapi.json")["paths"].values()))
            for name in sorted(names, key=lambda name: name.startswith("delete")):
                answer = try_out(browser, name, session, turn if name.endswith("stream") else "{\t}")
                assert "HTTP 200 OK\n" in answer, name
                if name.startswith("delete"):
                    server.request("POST", "/sessions/new", {"session_id": session})
                browser.click(f"#{name} .copy")
                printed = in_a_shell(browser.see("copied"))
                is_json = "content-type: application/json" in answer
                parts = [f'"{key}"' for key in json.loads(printed)] if is_json else printed.splitlines()
                assert parts and all(part in answer for part in parts), name
            assert "$STREAMCHAT_TOKEN" in browser.see("copied")
            assert TOKEN not in browser.see("texts('#api')")[0]
            answer = try_out(browser, "post-chat-stream", session, '{"message": "Hi",}')
            assert "HTTP 400 Bad Request\n" in answer and '"invalid_json"' in answer


HOSTILE_TEXT = "\n".join([
    "<img src=x onerror='ran = 1'>", "</script><script>ran = 1</script>", "javascript:ran = 1",
    "<iframe srcdoc='<script>top.ran = 1</script>'>", "[link](javascript:ran=1)", "<!-- --> &lt;b&gt; &#60;",
    "a\u202eb \u2029e \x85f", "\\u0000 \x00 \x1b[31m \x7f \ufffe", "x" * 10_000, "\U0001f600" * 2000,
    "```<img src=x onerror='ran = 1'>", "</pre><script>ran = 1</script>" + "y" * 5000, "```",
])


@ours
class TestThePageIsSafe:
    """README, "Demo page": what comes from outside is text. It never runs, and is never HTML."""

    @beside
    def test_whatever_comes_from_outside_is_shown_as_it_is_and_never_runs(self, own, browser):
        fields = ("session_id", "model", "created_at", "last_activity")
        session = {**dict.fromkeys(fields, HOSTILE_TEXT), "message_count": 2}
        message = {"text": HOSTILE_TEXT, "timestamp": HOSTILE_TEXT, "turn_id": HOSTILE_TEXT}
        messages = [{"role": HOSTILE_TEXT, **message}, {"role": "model", **message}]
        latest = {"turn_id": "t-1", "message": HOSTILE_TEXT, "started": HOSTILE_TEXT, "chunks": 0}
        pages = {"/sessions": page_of({"sessions": [session, {**session, "session_id": "s-1"}]}),
                 "/sessions/s-1": page_of({**session, "messages": messages, "latest_turn": latest})}
        chunk = line_of("chunk", text=HOSTILE_TEXT, chunk_number=1)
        complete = line_of("complete", finish_reason="constructor", total_chunks=1, processing_time=1,
                           message_count=2, usage={"total_tokens": HOSTILE_TEXT})
        error = line_of("error", code=HOSTILE_TEXT, message=HOSTILE_TEXT)
        info = line_of("session_info", turn_id="t-1", model=HOSTILE_TEXT)
        streams = [stream_of(info, line_of(HOSTILE_TEXT), line_of("__proto__"), chunk, complete),
                   stream_of(chunk, error)]
        with Site(own(*INSTANT).address, pages, [Fault(instead=stream) for stream in streams]) as site:
            browser.demo(site.url, "s-1")
            browser.until("complete")
            browser.wait("see.texts('#server')[0] === args[0]", f"Model: {HOSTILE_TEXT}")
            browser.wait("see.texts('#sessions .name').some(name => name.startsWith('s-1 <img'))")
            browser.send(HOSTILE_TEXT)
            browser.wait("see.texts('.failed')[0].endsWith(args[0])", HOSTILE_TEXT)
            assert [text for _, text in browser.see("articles()")] == [HOSTILE_TEXT] * 6
            made = browser.see("all('#log *, #lines *, #sessions *, #title *').map(each => each.localName)")
            assert " ".join(sorted({*made})) == "article button div h3 li p pre small span"
            browser.run("setTimeout(() => { document.body.innerHTML = '<b>HTML</b>'; }); "
                        "setTimeout(() => eval('window.ran = 1'));")
            assert wait_until(lambda: "TrustedHTML" in str(browser.errors())), "the browser keeps the policy"
            assert browser.see("all('#log > article').length") and browser.run("return window.ran ?? 0;") == 0

    @beside
    def test_the_policy_names_this_script_and_this_style_and_no_other_source(self, own):
        page = own(*INSTANT).request("GET", "/demo")
        policy = {
            "default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'",
            "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
            "trusted-types 'none'"}
        for tag in ("script", "style"):
            [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", page.body.decode(), re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            policy.add(f"{tag}-src 'sha256-{digest}'")
        assert {*page.headers["content-security-policy"].split("; ")} == policy


CONTROLS = "a, button, input, textarea, summary, .scroll"
NAMED = {"button", "link", "textbox", "DisclosureTriangle", "log", "image", "region", "navigation"}
WIDE = f"{'x' * 300}\n```py\n{'x' * 300} = 1\n```\n"
MISFITS = """       // what is wider than its box
return see.shown("body, body *")
  .filter(each => !each.matches(".code pre, .one-line, textarea, input"))     // they scroll, or shorten
  .filter(({clientWidth, scrollWidth}) => clientWidth && scrollWidth > clientWidth + 1)
  .map(({outerHTML}) => outerHTML.slice(0, 100));
"""


@ours
class TestThePageIsForEveryone:
    """README, "Demo page": any width, with or without a mouse and eyes."""

    @beside
    def test_each_view_fits_a_narrow_window_and_needs_no_mouse_and_no_eyes(self, own, browser):
        browser.demo(url_of(own(*INSTANT)))
        browser.say(WIDE)
        for view in ("chat", "wire", "api"):
            browser.turn_to(view)
            if view == "api":
                browser.wait("see.all('.operation').length")
                browser.run("for (const box of see.all('.operation')) box.open = true;")
                try_out(browser, "post-chat-stream", "", '{"message": "' + "x" * 500 + '"}')
            nodes = browser.cdp("Accessibility.getFullAXTree")["nodes"]
            met = [(node["role"]["value"], node.get("name", {}).get("value", "").strip())
                   for node in nodes if not node["ignored"]]
            assert not [role for role, name in met if role in NAMED and not name], view

            browser.run("document.activeElement.blur(); see.focused.clear();")
            # A few more: a control may appear in the meantime, and the browser itself may be a stop.
            browser.keys(TAB * (browser.see("all(args[0]).length", CONTROLS) + 4))
            unreached = "shown(args[0]).filter(each => !each.disabled && !see.focused.has(each))"
            assert not browser.see(unreached + ".map(each => each.outerHTML)", CONTROLS), view

            browser.cdp("Emulation.setDeviceMetricsOverride", width=320, height=900, deviceScaleFactor=1,
                        mobile=False)
            assert not browser.run(MISFITS), view
            if view == "chat":
                browser.click("#sessions-toggle")
                browser.wait("see.shown('#new').length")
                assert not browser.run(MISFITS), "with the list of sessions"
            browser.cdp("Emulation.clearDeviceMetricsOverride")


# ---- Access control and the README's program, in Chromium

HOSTILE_PAGE = b"""<!DOCTYPE html><link rel="icon" href="data:,"><iframe name="frame"></iframe>
<form method="POST" enctype="text/plain" target="frame">
<input name='{"message":"Hi","x":"' value='"}'></form>"""
ATTACKS = """
const [url] = args, chat = url + "/chat/stream", body = '{"message":"Hi"}';
const post = options => fetch(chat, {method: "POST", body, ...options})
  .then(answer => answer.type, () => "refused");
document.forms[0].action = chat;
document.forms[0].submit();
return [await post({headers: {"Content-Type": "application/json"}}), await post({}),
        await post({mode: "no-cors"}), navigator.sendBeacon(chat, body)];
"""
FETCH = """
const [url, headers] = args;
const answer = await fetch(url + "/chat/stream", {method: "POST", headers, body: '{"message":"Hi"}'});
return answer.text();
"""


@ours
class TestPagesOfOtherOrigins:
    """README, "Access control": what browsers let such pages do."""

    @beside
    def test_a_page_of_another_origin_reaches_nothing_unless_it_is_allowed(self, serve, browser):
        with Site(None, {"/": refusal(200, "Content-Type: text/html", body=HOSTILE_PAGE)}) as page:
            server = serve()
            allowing = serve("--chunk-delay", "0.02", "--allow-origin", page.url, "--token", TOKEN)
            browser.open(page.url)
            seen = browser.run(ATTACKS, url_of(server))
            assert seen == ["refused", "refused", "opaque", True], "an opaque answer tells the page nothing"
            assert wait_until(lambda: server.log().count("forbidden_origin") == 5), server.log()
            assert (server.stats()["total_requests"], server.stats()["total_sessions_created"]) == (0, 0)

            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
            lines = browser.run(FETCH, url_of(allowing), headers).encode().splitlines(keepends=True)
            check_turn(lines, message="Hi", **allowing.pace)
            assert '"unauthorized"' in browser.run(FETCH, url_of(allowing), {})
            browser.errors()

    @beside
    def test_the_readmes_program_survives_a_cut_at_any_place(self, own, browser):
        server = own(*INSTANT)
        cuts = places_to_cut(server, 97)
        program = refusal(200, "Content-Type: text/javascript", body=in_javascript("").encode())
        with Site(server.address, {"/chat.mjs": program}, cut_once(cuts)) as proxy:
            browser.open(f"{proxy.url}/health")     # any page of this origin
            turns = browser.run('const {chat} = await import("/chat.mjs"), [count, text] = args;' + MANY_TURNS
                                + "return turns;", len(cuts), TEXT)
        check_kept(server, [turn[:2] for turn in turns])


# ---- README, "Testing a server or a client"

# Without the site packages, so that an import of pytest fails.
COMMAND = [sys.executable, "-I", "-S", __file__, "proxy", "--port", "0", "--to"]


@ours
class TestTheProxy:
    """Each fault of the proxy is what it says. As a command it needs no pytest."""

    @beside
    def test_the_readmes_client_gets_whole_answers_through_the_command(self, instant, tmp_path):
        command = [*COMMAND, url_of(instant), "--cut", "0.3", "--repeat", "0.3", "--seed", "5"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
        try:
            process.stdout.readline()
            url = re.fullmatch(r"Proxy at (http://.*)\n", process.stdout.readline())[1]
            check_kept(instant, [turn[:2] for turn in chat_in_python(url, 10, tmp_path)])
            process.send_signal(signal.SIGINT)
            printed, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            process.wait(PATIENCE)
        assert (process.returncode, errors) == (0, "")
        shown = re.compile(r"[0-9:.]{12}  'POST /sessions/\S+/stream HTTP/1.1'  (repeat|cut after \d+ bytes)")
        assert {shown.fullmatch(line)[1][:3] for line in printed.splitlines()} == {"cut", "rep"}

    @beside
    def test_what_cannot_work_is_told(self):
        for told, *arguments in (("refused", "http://127.0.0.1:1"), ("Port", "http://127.0.0.1:99999"),
                                 ("--cut", "http://127.0.0.1:1", "--cut", "2")):
            done = subprocess.run([*COMMAND, *arguments], capture_output=True, encoding="utf-8",
                                  timeout=PATIENCE, check=False)
            assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr, done
            assert told in done.stderr.splitlines()[-1]

    def read(self, server, fault):
        """All bytes of an answer with this fault, and the seconds that they took."""
        with Proxy(server.address, [fault]) as proxy, contextlib.closing(Connection(proxy.address)) as client:
            client.send(chat_request({"message": TEXT}, "Connection: close"))
            began = time.monotonic()
            return client.file.read(), time.monotonic() - began

    @beside
    def test_each_fault_is_what_it_says(self, instant):
        for size in (0, 900):
            assert len(self.read(instant, Fault(cut=size))[0]) == size
        read, _ = self.read(instant, Fault(cut=b'"chunk_number":3'))
        assert b'"chunk_number":2' in read and read.endswith(b'",')
        with pytest.raises(ConnectionResetError):
            self.read(instant, Fault(cut=900, reset=True))
        for fault in (Fault(delay=0.2), Fault(delay=0.0002, split=True)):
            read, seconds = self.read(instant, fault)
            assert len(read) > 1000 and seconds >= 0.2
        with Proxy(instant.address, [Fault(stall=900)]) as proxy:
            with contextlib.closing(Connection(proxy.address)) as client:
                client.send(chat_request({"message": TEXT}))
                client.take(900)
                client.socket.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    client.socket.recv(1)
            assert wait_until(lambda: not proxy.links), "a client that left is still served"
            proxy.fault_of = lambda line: Fault(repeat=True)
            answer = Server(*proxy.address).request("POST", "/sessions/new", {"session_id": new_id()})
        check_problem(answer, 409, "session_exists")

    @beside
    def test_a_connection_is_kept_and_each_answer_has_its_own_fault(self, instant):
        session = new_id()
        with Proxy(instant.address, [Fault(split=True), Fault(cut=900)]) as proxy:
            connection = Connection(proxy.address)
            connection.send(chat_request({"message": TEXT, "session_id": session}))
            check_turn(connection.lines(connection.read_head()), message=TEXT)
            connection.send(http_request("GET", "/health"))
            assert instant.response(connection, close=False).status == 200
            connection.send(http_request("GET", f"/sessions/{session}/stream"))
            assert len(connection.file.read()) == 900
            connection.close()
        assert proxy.connections == 1

    @beside
    def test_each_side_learns_that_the_other_left(self, server):
        session = new_id()
        with Proxy(server.address) as proxy:
            through = Server(*proxy.address)
            through.chat(LONG, session_id=session).read(5).abort()
            assert wait_until(lambda: server.readers(session) == [0])
            stream = through.chat(LONG).read(5)
            proxy.down()
            with pytest.raises(Cut):
                stream.read()
            stream.connection.close()


# ---- The suite is tested, too

HELLO = "Hello, n\u00efve world!"


def at(seconds):
    return f"2026-11-24T10:00:{seconds:09.6f}+00:00"


def flawless():
    """The events of a flawless turn, 0.1 s apart."""
    ids = {"session_id": "s-1", "turn_id": "t-1"}
    return [
        {"type": "session_info", **ids, "model": "offline", "created": True, "timestamp": at(1)},
        {"type": "status", "message": "Generating response...", "context_messages": 0},
        {"type": "chunk", "text": "You said: ", "chunk_number": 1, "is_final": False, "timestamp": at(1.1)},
        {"type": "chunk", "text": HELLO, "chunk_number": 2, "is_final": False, "timestamp": at(1.2)},
        {"type": "chunk", "text": " Bye!", "chunk_number": 3, "is_final": True, "timestamp": at(1.3)},
        {"type": "complete", "finish_reason": "stop", "total_chunks": 3, "processing_time": 0.4,
         "message_count": 2, **ids, "timestamp": at(1.4)},
    ]


def lines_of(events):
    return [json.dumps(event, separators=(",", ":")).encode() + b"\n" for event in events]


def answer(events):
    """The bytes of an answer: each event a line, each line a transfer chunk."""
    return (b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n"
            b"Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\nX-Content-Type-Options: nosniff\r\n"
            b"Connection: keep-alive\r\n\r\n"
            + b"".join(b"%x\r\n%b\r\n" % (len(line), line) for line in lines_of(events)) + b"0\r\n\r\n")


def change(number, **fields):
    return lambda events: [event | fields if n == number else event for n, event in enumerate(events)]


FAILED = {"type": "error", "code": "model_cut", "message": "Cut.", "retryable": True, "session_id": "s-1",
          "turn_id": "t-1", "timestamp": at(1.4)}
DEFECTS = [             # what is wrong, how it came to be, what the suite says
    ("no event at all", lambda events: [], "the stream begins with"),
    ("no terminal event", lambda events: events[:-1], "without a terminal event"),
    ("an unknown event", change(3, type="delta"), "other events than chunks"),
    ("a field too many", change(2, role="model"), "the fields of"),
    ("a field is missing", lambda events: [{"type": "session_info"}, *events[1:]], "the fields of"),
    ("created is no boolean", change(0, created=1), "created can't be"),
    ("the end names another turn", change(5, turn_id="t-2"), "another turn_id"),
    ("a time without microseconds", change(2, timestamp="2026-11-24T10:00:01+00:00"), "timestamp can't be"),
    ("time runs backwards", change(3, timestamp=at(0)), "run backwards"),
    ("chunks too close", change(3, timestamp=at(1.15)), "less than 0.1 s apart"),
    ("too many words", change(3, text=HELLO + " Two more"), "more than 4 words"),
    ("a chunk too long", change(3, text=HELLO + "x" * 4096), "4,096 code points"),
    ("a gap in chunk_number", change(3, chunk_number=3), "have gaps"),
    ("is_final in the middle", change(3, is_final=True), "is_final is wrong"),
    ("an empty chunk in the middle", change(3, text=""), "an empty chunk"),
    ("total_chunks wrong", change(5, total_chunks=2), "total_chunks is not"),
    ("message_count wrong", change(5, message_count=1), "message_count is wrong"),
    ("retryable wrong", lambda events: [*events[:4], FAILED | {"retryable": False}], "retryable is wrong"),
    ("an error without a word", lambda events: [*events[:4], FAILED | {"message": ""}], "1 to 1,000"),
    ("another finish_reason", change(5, finish_reason="done"), "finish_reason can't be"),
    ("a stop with text in its last chunk", change(5, finish_reason="cancelled"), "of a cancelled turn"),
    ("processing_time wrong", change(5, processing_time=1.4), "processing_time is not"),
    ("no type", change(3, type=None), "no event"),
    ("type is not first", lambda events: [dict(reversed(events[0].items())), *events[1:]], "the first field"),
    ("text trimmed", change(3, text=HELLO[:-1]), "lost some of the message"),
    ("a lone surrogate", change(4, text="\ud800"), "surrogate"),
    ("a line over 64 KiB", change(4, text="\x00" * 12_000), "not ASCII, or too long"),
]
WIRE_DEFECTS = [        # what is wrong, bytes of the answer, others in their place, what the suite says
    ("no status", b"200 OK", b"OK", "not a status line"),
    ("no NDJSON", b"application/x-ndjson", b"application/json", "another head"),
    ("a field twice", b"no-cache\r\n", b"no-cache\r\nCache-Control: no-cache\r\n", "comes twice"),
    ("a bare LF in the head", b"chunked\r\n", b"chunked\n", "a bare LF"),
    ("white space before a colon", b"Connection:", b"Connection :", "not a field line"),
    ("no size", b"\r\n\r\n", b"\r\n\r\n\r\n", "not the size"),
    ("a size too small", b"\r\n\r\n", b"\r\n\r\n1\r\n", "ends a transfer chunk"),
    ("no end of the last line", b"}\n\r\n0", b"} \r\n0", "ends within a line"),
    ("no last transfer chunk", b"\n\r\n0\r\n\r\n", b"\n\r\n", "in the line"),
    ("NaN", b'"processing_time":0.4', b'"processing_time":NaN', "JSON"),
    ("not ASCII", b"n\\u00efv", "n\u00efvXX".encode("latin-1"), "not ASCII"),
    ("not JSON", b'"is_final":true', b'"is_final":True', "not a line of JSON"),
    ("a field twice in an event", b'"created":true', b'"model":"othr"', "a field comes twice"),
    ("white space between tokens", b'"You said: "', b' "You said:"', "white space"),
]


@ours
class TestTheSuite:
    """Small broken answers, each with one defect, on which the reader or `check_turn` must fail."""

    def check(self, script):
        """Judge these bytes, which a proxy sends in place of a server, as each test does that streams."""
        with Proxy(None, [Fault(instead=script)]) as proxy:
            return Server(*proxy.address).turn(HELLO)

    @cases(DEFECTS)
    def test_a_defect_of_the_events_is_found(self, case):
        _, edit, verdict = case
        with pytest.raises(AssertionError, match=verdict):
            check_turn(lines_of(edit(flawless())), message=HELLO, delay=0.1, words=4)

    @cases(WIRE_DEFECTS)
    def test_a_defect_of_the_bytes_is_found(self, case):
        _, old, new, verdict = case
        script = answer(flawless())
        assert old in script
        with pytest.raises((AssertionError, Cut), match=verdict):
            self.check(script.replace(old, new, 1))

    def test_a_cut_at_any_byte_is_found(self):
        ping = {"type": "ping", "timestamp": at(1)}     # it is no part of the turn
        script = answer([*flawless()[:2], ping, *flawless()[2:]])
        assert self.check(script).chunks == flawless()[2:5]
        for size in range(0, len(script), 3):
            with pytest.raises(Cut):
                self.check(script[:size])

    def test_a_read_ends_where_the_event_does_not_come(self):
        with Proxy(None, [Fault(instead=answer(flawless()))]) as proxy:
            stream = Server(*proxy.address).chat(HELLO)
            with pytest.raises(AssertionError, match="ends without error"):
                stream.read_until("error")
