"""Stands for the internet: the scripted Messages API on three ports, one with TLS.

A GET is answered with the machine's name. Of a POST, the credentials are printed.
"""
from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "test_plans"))

from scripted_api import Handler, ScriptedApi
from scripted_claude import load_scenarios

CERTIFICATE, CERTIFICATE_KEY = "/tmp/certificate.pem", "/tmp/key.pem"
SHOWN = ("x-api-key", "authorization", "anthropic-beta", "cookie")


class Outside(Handler):
    api = ScriptedApi(load_scenarios())

    def do_GET(self) -> None:
        self.send_body(socket.gethostname().encode(), "text/plain")

    def do_POST(self) -> None:
        shown = {name: self.headers[name] for name in SHOWN if name in self.headers}
        print(json.dumps({"path": self.path, **shown}), flush=True)
        super().do_POST()


def main() -> None:
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=outside",
                    "-keyout", CERTIFICATE_KEY, "-out", CERTIFICATE], check=True,
                   capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE, CERTIFICATE_KEY)
    servers = {port: ThreadingHTTPServer(("", port), Outside)
               for port in (80, 443, 8443)}
    for port in (443, 8443):
        servers[port].socket = context.wrap_socket(servers[port].socket,
                                                   server_side=True)
    for server in servers.values():
        threading.Thread(target=server.serve_forever).start()
    print("ready", flush=True)


if __name__ == "__main__":
    main()
