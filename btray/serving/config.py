"""The settings of the service: `ServiceConfig` while it runs (Serve's user_config), `ServeConfig` at its start."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from btray.core.config import ComponentConfig, JobConfig, Positive, Probability
from btray.core.errors import UserError
from btray.core.uris import Uri
from btray.model.config import EngineName, Precision, require_bundle
from btray.model.shipped import SHIPPED, Model
from btray.pacs.address import Address
from btray.pacs.config import PacsConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]


class CanaryConfig(ComponentConfig):
    """A second bundle that answers a share of the requests."""

    model: Model
    """Model bundle."""
    model_id: str | None = None
    """Refuse the bundle unless this is its model_id."""
    share: Probability = 0.1
    """Share of the requests that it answers."""


class LimitsConfig(ComponentConfig):
    """What callers may ask of one replica."""

    max_body_mb: Annotated[float, Field(gt=0, le=2048)] = 32.0
    """Largest request body, packed or unpacked, in MB (10^6 bytes); it is refused before it is read whole."""
    max_json_mb: Annotated[float, Field(gt=0, le=2048)] = 4.0
    """Largest JSON, in MB: reading it keeps all other requests waiting. Images and tensors as bytes do not."""
    max_images: Positive = 64
    """Most images, and most frames that an answer explains, of one request."""
    max_frames: Positive = 256
    """Most frames of one request: the pages of all its images, counted before anything is decoded."""
    max_megapixels: Annotated[float, Field(gt=0)] = 64.0
    """Most pixels of one image, all its pages or slices together, in millions; counted before anything is decoded."""
    max_requests: Positive = 32
    """Requests in work at a time; those that are read meanwhile wait up to a second, then get 503 with Retry-After."""
    max_reading: Positive = 64
    """Requests whose bodies are on their way, or that wait, at a time; they take no place of a request in work."""
    timeout: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds that reading a body may take, and as many again for the answer."""

    @property
    def max_body(self) -> int:
        """Return `max_body_mb` in bytes."""
        return int(self.max_body_mb * 1_000_000)

    @property
    def max_json(self) -> int:
        """Return `max_json_mb` in bytes."""
        return int(self.max_json_mb * 1_000_000)

    @property
    def places(self) -> int:
        """Return how many requests proxies give a replica at a time; the next ones wait or are refused in the proxy."""
        return self.max_requests + self.max_reading


class ServiceConfig(ComponentConfig):
    """What a running service applies without a restart: Serve's `user_config`."""

    model: Model = SHIPPED
    """Model bundle: a folder, local or s3://, or the name of the shipped one."""
    model_id: str | None = None
    """Refuse the bundle unless this is its model_id."""
    canary: CanaryConfig | None = None
    """A second bundle that answers a share of the requests."""
    name: Name = "btray"
    """Name of the model in the Open Inference Protocol."""
    abstain_below: Probability | None = None
    """Confidence below which the model abstains; default: each bundle's own."""
    keys: Uri | None = None
    """File of API keys (see `btray key`), local or s3://; without one only this machine is answered."""
    insecure: bool = False
    """Answer every machine without a key."""
    engine: EngineName = "auto"
    """How the network is run; auto: a frozen graph on a CPU, eager elsewhere. onnx needs the extra onnx."""
    precision: Precision = "float32"
    """In what the network computes; bf16, bfloat16, takes less time on CPUs with AVX512_BF16 or AMX and on GPUs."""
    max_batch: Positive = 16
    """Most frames of one forward pass; they are those that wait while the one before it runs."""
    decoders: Positive | None = None
    """Images that a replica decodes at a time; default: its CPUs, with a GPU its share of those of the node, and at
    least two."""
    limits: LimitsConfig = LimitsConfig()
    """What callers may ask of one replica."""
    report_to: str | None = None
    """Archive, dicomweb://HOST/ROOT, to which the report of each pushed study (STOW-RS) is sent; it is read from there,
    with the access of BTRAY_PACS_USER and so on."""
    report_after_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a push of a study after which it is reported; a study that grows later is reported again."""
    pending: Uri | None = None
    """Folder, local or s3://, that keeps which studies wait for their report; one for each service."""

    @model_validator(mode="after")
    def _pending_is_kept(self) -> Self:
        if self.report_to is not None and self.pending is None:
            raise ValueError("report_to needs pending, a folder that keeps which studies wait: give --pending too")
        return self

    def require_archive(self) -> None:
        """Raise UserError, which quotes no credentials, unless `report_to` is an archive or None."""
        if self.report_to is not None:
            Address.parse(self.report_to)


class ReplicasConfig(ComponentConfig):
    """How many processes answer, and what each takes."""

    min_replicas: Positive = 1
    """Replicas that are always there."""
    max_replicas: Positive | None = None
    """Replicas under load; default: as many as the CPUs of the machine that starts the service are enough for."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that each replica takes, of those that Ray has on a node."""
    upscale_delay: Annotated[float, Field(ge=0)] = 5.0
    """Seconds of load before a replica is added."""
    downscale_delay: Annotated[float, Field(ge=0)] = 120.0
    """Seconds without it before one is taken away."""
    use_gpu: bool = False
    """Give each replica a GPU, or a share of one."""
    replicas_per_gpu: Positive = 1
    """Replicas that share a GPU: one that decodes and answers over HTTP in a single process leaves most of it idle."""

    @property
    def most(self) -> int:
        """Return `max_replicas`, or its default."""
        return self.max_replicas or max(self.min_replicas, int((os.cpu_count() or 1) / self.cpus))

    @property
    def gpu_share(self) -> float:
        """Return the share of a GPU that each replica takes; 0 on CPUs."""
        return 1 / self.replicas_per_gpu if self.use_gpu else 0.0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


class ApplicationConfig(ReplicasConfig):
    """The arguments of the application in a deployment."""

    model: Model = SHIPPED
    """Model bundle, if nothing else is to be set; the deployment's user_config replaces it."""


class ServeConfig(ServiceConfig, JobConfig):  # type: ignore[misc]  # two kinds of model_config, which pydantic merges
    """Serve a bundle on this machine over HTTP: a page for people, /v1/classify, the Open Inference Protocol, metrics.

    On a cluster: serve deploy serve.yaml.
    """

    host: str = "127.0.0.1"
    """Address to listen on; another than loopback needs --keys, or --insecure."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    replicas: ReplicasConfig = ReplicasConfig()
    """How many processes answer."""
    proxy: Literal["haproxy", "ray"] = "haproxy"
    """The proxy before the replicas: HAProxy, restricted to this machine (fast), or Ray Serve's own."""

    @model_validator(mode="after")
    def _not_open_by_mistake(self) -> Self:
        if not is_loopback(self.host) and self.keys is None and not self.insecure:
            raise ValueError(
                f"--host {self.host} lets other machines in: give --keys FILE (btray key makes keys), or --insecure"
            )
        return self

    def check(self) -> None:
        """Refuse bundles and keys that are not there, and an address that cannot be listened on."""
        from btray import storage

        require_bundle(self.model)
        if self.canary is not None:
            require_bundle(self.canary.model)
        if self.keys is not None:
            storage.require_input(self.keys, "--keys")
        self.require_archive()
        if self.pending is not None:
            PacsConfig.from_environment().check()
            storage.require_writable(self.pending, "--pending")
        try:
            address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(address[0], socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address[4])
        except OSError as error:
            listening = f"cannot listen on {self.host}:{self.port}: {error.strerror}"
            raise UserError(f"{listening}; give another --host or --port") from error

    @property
    def service(self) -> ServiceConfig:
        """Return what the replicas are given, and `serve.yaml` has as `user_config`."""
        return ServiceConfig(**{name: getattr(self, name) for name in ServiceConfig.model_fields})


def is_loopback(host: str) -> bool:
    """Return whether an address, or the name localhost, is this machine alone."""
    name = host.lower().removesuffix(".")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


class KeyConfig(JobConfig):
    """Make an API key for the service, or revoke one. The key is printed once; the file keeps its digest only."""

    file: Uri
    """File of API keys, local or s3://; made if it does not exist."""
    name: Name
    """Whom the key is for."""
    revoke: bool = False
    """Take the keys of this name out of the file."""
