#!/usr/bin/env python3
"""deploy/edge/nginx.conf: a real nginx before a real coordinator.

Goal:   calls come through; what gRPC 1.51 cannot take (ADR 5: headers without end, streams that are opened and reset) does
        not reach it; an address with too many calls is told so in gRPC's way.
Method: HTTP/2 frames made here, over TLS, as no client library sends what an attacker does.
"""

import json
import os
import re
import socket
import ssl
import struct
import subprocess
import sys

import fetched
from processes import ENVIRONMENT, run_test, wait_until

BIN = os.environ["WALSH_BIN_DIR"]
CONFIGURATION = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../deploy/edge/nginx.conf")

DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY, CONTINUATION = 0, 1, 3, 4, 7, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
CANCEL = 8
FRAME_MAX = 16384
HEALTH = "/grpc.health.v1.Health/Check"
APPLICATION_GRPC = bytes.fromhex("1d75d0620d263d4c4d6564")  # in the Huffman code of HPACK
SERVING = b"\x00\x00\x00\x00\x02\x08\x01"  # a message: not compressed, 2 bytes, status 1
N_RESET = 20_000
# 20,000 reset streams took 370 MB and more of a server that nothing protects.
GROWTH_MAX = 64 << 20


def integer(value, prefix_bits):
    """HPACK's, with zeros before it."""
    most = (1 << prefix_bits) - 1
    if value < most:
        return bytes([value])
    encoded = [most]
    value -= most
    while value >= 128:
        encoded.append(value % 128 + 128)
        value //= 128
    return bytes([*encoded, value])


def text(value):
    return integer(len(value), 7) + value.encode()


def header_block(path, extra=()):
    headers = [(":method", "POST"), (":scheme", "https"), (":path", path), (":authority", "localhost"),
               ("content-type", "application/grpc"), ("te", "trailers"), *extra]
    return b"".join(b"\x00" + text(name) + text(value) for name, value in headers)  # literal, not indexed


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class Connection:
    def __init__(self, port):
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        self.socket = context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=20))
        assert self.socket.selected_alpn_protocol() == "h2"
        self.received = b""
        self.next_stream = 1
        self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))

    def send(self, data):
        self.socket.sendall(data)

    def opening(self, path, extra=()):
        """A new stream's number and its headers, in as many frames as they need."""
        stream = self.next_stream
        self.next_stream += 2
        block = header_block(path, extra)
        parts = [block[at:at + FRAME_MAX] for at in range(0, len(block), FRAME_MAX)]
        frames = [frame(HEADERS if i == 0 else CONTINUATION, END_HEADERS if i == len(parts) - 1 else 0, stream, part)
                  for i, part in enumerate(parts)]
        return stream, b"".join(frames)

    def resets(self, n):
        """`n` streams that are opened and reset."""
        for _ in range(n):
            stream, headers = self.opening(HEALTH)
            yield headers + frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))

    def frames(self):
        """(type, flags, stream, payload) until the peer closes the connection."""
        while True:
            while len(self.received) < 9 or len(self.received) < 9 + self.length():
                try:
                    data = self.socket.recv(65536)
                except ConnectionError:
                    return
                if not data:
                    return
                self.received += data
            kind, flags, stream = struct.unpack(">BBI", self.received[3:9])
            payload = self.received[9:9 + self.length()]
            self.received = self.received[9 + len(payload):]
            if kind == SETTINGS and not flags & ACK:
                self.send(frame(SETTINGS, ACK, 0))
            yield kind, flags, stream, payload

    def length(self):
        return int.from_bytes(self.received[:3], "big")

    def call(self, path, extra=(), before=b""):
        """(message, everything in header frames) of an empty request; None where the stream or connection is ended."""
        stream, headers = self.opening(path, extra)
        self.send(before + headers + frame(DATA, END_STREAM, stream, b"\x00\x00\x00\x00\x00"))
        message, headers = b"", b""
        for kind, flags, of, payload in self.frames():
            if kind == GOAWAY or (kind == RST_STREAM and of == stream):
                return None
            if of != stream:
                continue
            message += payload if kind == DATA else b""
            headers += payload if kind == HEADERS else b""
            if flags & END_STREAM:
                return message, headers
        return None

    def close(self):
        self.socket.close()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Edge:
    def __init__(self, folder, children):
        self.folder = folder
        self.children = children
        self.children.start("coordinator", os.path.join(BIN, "walsh-coordinator"), "--data-dir",
                            os.path.join(folder, "data"), "--grpc-port", "0", "--internal-port", "0", "--http-port", "0",
                            "--metrics-port", "0")
        run_file = os.path.join(folder, "data/run/coordinator.json")
        wait_until("the coordinator", lambda: self.children.check("coordinator") or os.path.exists(run_file))
        with open(run_file, encoding="utf-8") as file:
            self.upstream = json.load(file)["grpc"]
        self.port, self.plain_port = free_port(), free_port()
        self.start_nginx()

    def start_nginx(self):
        certificate, key = (os.path.join(self.folder, name) for name in ("tls.crt", "tls.key"))
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                        "-subj", "/CN=localhost", "-days", "1", "-out", certificate, "-keyout", key],
                       check=True, capture_output=True)
        with open(CONFIGURATION, encoding="utf-8") as file:
            settings = file.read()
        here = {
            # For the client, which this test gives no certificate.
            "listen 443": f"listen 127.0.0.1:{self.plain_port} http2; listen 127.0.0.1:{self.port}",
            "/etc/walsh/edge/tls.crt": certificate,
            "/etc/walsh/edge/tls.key": key,
            "127.0.0.1:50051": self.upstream,
            "worker_rlimit_nofile 32768;": f"daemon off; pid {self.folder}/nginx.pid; error_log stderr;",
            "access_log off;": "access_log off; " + " ".join(
                f"{what}_temp_path {self.folder}/{what};"
                for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")),
        }
        for example, value in here.items():
            assert settings.count(example) == 1, example
            settings = settings.replace(example, value)
        path = os.path.join(self.folder, "nginx.conf")
        with open(path, "w", encoding="utf-8") as file:
            file.write(settings)
        self.children.start("nginx", fetched.find("nginx/nginx"), "-e", "stderr", "-p", self.folder, "-c", path)

        def is_listening():
            self.children.check("nginx")
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0
        wait_until("nginx", is_listening)

    def walsh(self, *arguments):
        return subprocess.run([os.path.join(BIN, "walsh"), "--server", f"127.0.0.1:{self.plain_port}", *arguments],
                              capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False)

    def resident_bytes(self):
        with open(f"/proc/{self.children.processes['coordinator'].pid}/status", encoding="utf-8") as file:
            return 1024 * int(re.search(r"VmRSS:\s+(\d+)", file.read())[1])

    def check_health(self):
        connection = Connection(self.port)
        answer = connection.call(HEALTH)
        connection.close()
        return answer is not None and answer[0] == SERVING


def check_headers(edge):
    connection = Connection(edge.port)
    if connection.call(HEALTH, [("x-request-id", "a" * 4000)]) is None:
        yield "a header of 4,000 bytes does not come through"
    connection.close()
    connection = Connection(edge.port)
    try:
        answer = connection.call(HEALTH, [("x-request-id", "a" * (1 << 20))])
    except OSError:
        answer = None  # closed while this was being sent
    connection.close()
    if answer is not None and SERVING in answer[0]:
        yield "a header of 1 MiB comes through"


def reset_streams(edge, n):
    """Opens and resets `n` streams, on as many connections as it takes; how many were sent."""
    n_sent = 0
    while n_sent < n:
        connection = Connection(edge.port)
        try:
            for frames in connection.resets(250):
                connection.send(frames)
                n_sent += 1
        except OSError:
            pass  # closed by nginx: another connection
        connection.close()
    return n_sent


def check_resets(edge):
    before = edge.resident_bytes()
    n = reset_streams(edge, N_RESET)
    grown = edge.resident_bytes() - before
    print(f"{n} streams opened and reset: the coordinator has grown by {grown / (1 << 20):.1f} MiB")
    if grown > GROWTH_MAX:
        yield f"reset streams took {grown} bytes of the coordinator"


def check_client(edge):
    done = edge.walsh("jobs", "list")
    if done.returncode != 0:
        yield f"the client: {done.stderr}"


def check_rate(edge):
    """So many streams at once that a few times they are more than the burst; nginx ends a connection with more."""
    connection = Connection(edge.port)
    answers = [connection.call(HEALTH, before=b"".join(connection.resets(100))) for _ in range(5)]
    connection.close()
    refused = [answer for answer in answers if answer is None or answer[0] != SERVING]
    if not refused:
        yield "nothing limits the calls of an address"
    elif any(answer is None or APPLICATION_GRPC not in answer[1] for answer in refused):
        yield f"a refusal is not of gRPC: {refused}"


def check_absence(edge):
    edge.children.kill("coordinator")
    done = edge.walsh("jobs", "list")
    if "the service is away" not in done.stderr:
        yield f"the client is not told that the service is away: {done.stderr}"


def run(folder, children):
    edge = Edge(folder, children)
    wait_until("a call through nginx", edge.check_health)
    yield from check_client(edge)
    yield from check_headers(edge)
    yield from check_resets(edge)
    wait_until("calls are answered after that", edge.check_health)
    yield from check_rate(edge)
    wait_until("calls are let in again", edge.check_health)
    yield from check_absence(edge)


def main():
    fetched.find("nginx/nginx")
    return run_test(run)


if __name__ == "__main__":
    sys.exit(main())
