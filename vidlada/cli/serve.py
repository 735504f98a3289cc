"""`vidlada serve`."""

import logging
import math
import os
import resource
import socket
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from vidlada.cli.options import GroupedCommand, GroupedOption, ModelSource, model_option, one_line_errors
from vidlada.errors import InputError
from vidlada.serve.limits import Limits

KEYS_VARIABLE = "VIDLADA_API_KEYS"
MOST_FILES = 2**16


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for every limit."""
    for entry in reversed(fields(Limits)):
        name = f"--{entry.name.replace('_', '-')}"
        kind = int if entry.default is None else type(entry.default)
        command = click.option(
            name, type=kind, default=entry.default, show_default=True, help=entry.metadata["help"],
            cls=GroupedOption, group="Limits",
        )(command)  # fmt: skip
    return command


@click.command(cls=GroupedCommand, own="Server", short_help="Serve a model with an OpenAI-compatible API and a page.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="Name the model is served under; its folder's name by default.")
@click.option("--api-key-file", type=click.Path(), help=f"One key a line; also ${KEYS_VARIABLE}, separated by commas.")
@click.option("--allow-dir", type=click.Path(), help="Folder whose files requests may name as file:///….")
@click.option("--allow-private-urls", is_flag=True, help="Also fetch videos from private and local addresses.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="Name the server may be called by, in Host; * for any. Without keys at a loopback address: localhost "
    "by default, else any. May be repeated.",
)
@click.option(
    "--cors",
    "origins",
    multiple=True,
    help="Origin whose web pages may use the server, e.g. https://example.org; * for all. May be repeated.",
)
@click.option("--log-content", is_flag=True, help="Log questions and answers; by default only counts and times.")
@model_option
@limit_options
@one_line_errors
def serve(
    host: str, port: int, name: str | None, api_key_file: str | None, allow_dir: str | None, allow_private_urls: bool,
    allowed_hosts: tuple[str, ...], origins: tuple[str, ...], log_content: bool, source: ModelSource, **limits: Any,
) -> None:  # fmt: skip
    """Serve a model: OpenAI's chat interface, and a page that shows answers denoise.

    SIGTERM and Ctrl-C let running requests end.
    """
    checked = Limits(**limits)
    allowed = Path(allow_dir) if allow_dir is not None else None
    if allowed is not None and not allowed.is_dir():
        raise InputError(f"--allow-dir {allow_dir}: no such folder")
    keys = api_keys(api_key_file)
    listener = listen(host, port)
    try:
        import uvicorn

        from vidlada.serve.app import create_app
        from vidlada.serve.connection import drop_idle_readers, timeout_protocol
        from vidlada.serve.draining import DrainingServer
        from vidlada.serve.http import site_rules
        from vidlada.serve.server import ServerSettings
    except ImportError as error:
        raise InputError(f"the server needs more packages: pip install 'vidlada[serve]' ({error.name})") from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it would log URLs
    vidlada = source.load()
    rules = site_rules(host, bool(keys), allowed_hosts, origins)
    settings = ServerSettings(name or Path(source.model).name, keys, allowed, allow_private_urls, log_content, rules)
    app = create_app(vidlada, settings, checked)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, ws="none", lifespan="on",
        http=timeout_protocol(checked.body_seconds),
        # longer than clients keep idle connections (5 s is httpx's time too): a request may meet a closing one
        timeout_keep_alive=math.ceil(checked.body_seconds),
    )  # fmt: skip
    drop_idle_readers(listener, checked.reader_seconds)
    allow_many_files()
    address = f"[{host}]" if ":" in host else host
    click.echo(f"{settings.name} at http://{address}:{listener.getsockname()[1]}", err=True)
    server = DrainingServer(config, checked.drain_seconds, lambda: app.state.server.service.engine.stop())
    server.run(sockets=[listener])


def allow_many_files() -> None:
    """Raise the process's own limit of open files: every idle connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def api_keys(file: str | None) -> list[str]:
    """Keys from the environment and a file; an empty file is a mistake, not an open door."""
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        try:
            lines = Path(file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--api-key-file {file}: cannot be read: {error}") from error
        if not any(line.strip() for line in lines):
            raise InputError(f"--api-key-file {file}: there is no key in it")
        keys += [line.strip() for line in lines]
    return [key for key in keys if key]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before anything slow begins."""
    try:
        family, kind, protocol = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][:3]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # asyncio sets this for connections whose protocol number is TCP's, and accepted ones may have 0. Without it the
        # second packet of every answer waits for the client's acknowledgement of the first: 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((host, port))
        listener.listen()  # whoever comes while the model is loaded waits
    except OSError as error:
        raise InputError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
    return listener
