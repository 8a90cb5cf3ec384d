"""``lineas serve``: its options, the port, and the server's life. What needs FastAPI is imported when it is run."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._checks import as_int
from .._process import TERMINATED

HOST, PORT = "127.0.0.1", 8000


def add_serve_options(command: argparse.ArgumentParser, *, maps: Mapping[str, Any], strength: Any) -> None:
    """Put the options on the parser; `maps` describes one argument of maps, `strength` reads one."""
    help = f"{maps['help']}; NAME=FILE gives them another name than that of the file"
    command.add_argument("--maps", required=True, nargs="+", metavar="FILE", help=help)
    command.add_argument(
        "--strength",
        type=strength,
        default=1.0,
        metavar="X",
        help="of maps where a request says none: a number or calibrated (default: 1)",
    )
    command.add_argument("--host", default=HOST, metavar="ADDRESS", help="to listen at (default: %(default)s)")
    command.add_argument("--port", type=int, default=PORT, metavar="N", help="0 is any free one (default: %(default)s)")
    command.add_argument("--name", metavar="NAME", help="of the model for clients (default: of its folder, or hub id)")
    command.add_argument(
        "--concurrency",
        type=int,
        default=4,
        metavar="N",
        help="requests that generate at the same time, in turns (default: %(default)s)",
    )
    command.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name that this server is reached by"
    )
    command.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages that may use it, such as http://localhost:3000; the server's own page always may",
    )


def name_maps(given: Sequence[str]) -> dict[str, str]:
    """The file of each name; ValueError where two have the same name."""
    found: dict[str, str] = {}
    for one in given:
        name, sign, file = one.partition("=")
        if not sign or Path(one).exists():
            name, file = Path(one).name.removesuffix(".safetensors"), one
        if not file:
            raise ValueError(f"maps must be FILE or NAME=FILE, got {one!r}")
        if name in found:
            raise ValueError(f"maps: {found[name]} and {file} are both called {name!r}: give one as NAME=FILE")
        found[name] = file
    return found


def open_port(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; ValueError where it cannot be had."""
    if not 0 <= as_int(port, "port") < 2**16:
        raise ValueError(f"port must be from 0 to {2**16 - 1}, got {port}")
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host: there is no address {host!r} ({error})") from None
    made = socket.socket(family, kind, number)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise _refused(error, host, port) from None
    return made


def listen(bound: socket.socket, host: str, port: int) -> str:
    """Let a bound socket listen, and return the address of the page; ValueError where another one was faster."""
    try:
        bound.listen(128)
    except OSError as error:
        raise _refused(error, host, port) from None
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{bound.getsockname()[1]}"


def _refused(error: OSError, host: str, port: int) -> ValueError:
    if error.errno == errno.EADDRINUSE:
        return ValueError(f"port {port} of {host} is in use: choose another, or 0 for any free one")
    if error.errno == errno.EADDRNOTAVAIL:
        return ValueError(f"host: {host} is no address of this machine")
    return ValueError(f"port {port} of {host} cannot be opened: {error.strerror}")


def serve(
    args: argparse.Namespace,
    *,
    load_maps: Callable[[str], Any],
    load_tokenizer: Callable[[], Any],
    load_model: Callable[[], Any],
) -> None:
    """Serve until Ctrl-C or SIGTERM. Everything that can be wrong is looked at before it listens."""
    try:
        import uvicorn

        from .app import check_name, create_app
    except ImportError as error:
        raise ImportError(f'this command needs FastAPI and uvicorn: pip install "lineas[serve]" ({error})') from error
    files = name_maps(args.maps)
    for name in files:
        check_name(name)
    with open_port(args.host, args.port) as bound:
        maps = {name: load_maps(file) for name, file in files.items()}
        tokenizer = load_tokenizer()
        app = create_app(
            load_model(),
            tokenizer,
            maps,
            name=args.name,
            strength=args.strength,
            concurrency=args.concurrency,
            allow_hosts=args.allow_host,
            allow_origins=args.allow_origin,
        )

        class Server(uvicorn.Server):
            """One that ends what is generated when it is told to end; the default is to wait for it."""

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                app.state.engine.stop()
                await super().shutdown(sockets)

        server = Server(uvicorn.Config(app, log_level="warning" if args.quiet else "info"))
        address = listen(bound, args.host, args.port)
        print(f"{app.state.loaded.name} with maps {', '.join(maps)}: {address} (Ctrl-C ends it)", flush=True)
        if not _is_local(bound.getsockname()[0]):
            print("lineas: everybody who can reach this address can use the model", file=sys.stderr)
        try:
            server.run(sockets=[bound])
        except (KeyboardInterrupt, SystemExit) as end:  # uvicorn hands the signal on when everything has ended
            if isinstance(end, SystemExit) and end.code != TERMINATED:
                raise
            print("lineas: the server has ended", file=sys.stderr)


def _is_local(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
