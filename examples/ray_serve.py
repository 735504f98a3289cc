"""The server as a Ray Serve application: Ray starts replicas, on GPUs all over a cluster, and spreads requests.

    $ pip install '.[serve]' 'ray[serve]'
    $ VIDLADA_MODEL=path/to/VidLaDA-8B serve run examples.ray_serve:app

Every replica is the whole server of `vidlada serve`: its engine, its routes, its limits. An upload lies on the replica
that took it, so with several replicas let videos come as URLs or data URIs.
"""

import os
from pathlib import Path

from fastapi import FastAPI
from ray import serve


def build() -> FastAPI:
    """Called in every replica, with the GPU that Ray has given to it."""
    import vidlada
    from vidlada.serve.app import create_app
    from vidlada.serve.limits import Limits
    from vidlada.serve.server import ServerSettings

    model = os.environ.get("VIDLADA_MODEL", "tiny")
    keys = [key for key in os.environ.get("VIDLADA_API_KEYS", "").split(",") if key]
    return create_app(vidlada.load(model), ServerSettings(Path(model).name, keys), Limits())


app = serve.deployment(
    serve.ingress(build)(),
    name="vidlada",
    num_replicas=int(os.environ.get("VIDLADA_REPLICAS", "1")),
    max_ongoing_requests=100,  # above the server's own limit, which answers 429
    ray_actor_options={"num_gpus": float(os.environ.get("VIDLADA_GPUS", "1"))},
).bind()
