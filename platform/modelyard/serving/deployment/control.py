"""Deploy, look at, scale, canary, promote and take down served models: what `modelyard serve` does.

Thin: the decisions are in `check`, `routing` and `rollout`; here Ray Serve is told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modelyard.artifacts.registry import Registry
from modelyard.cluster import RayCluster
from modelyard.errors import ConfigError, NotFoundError, UnavailableError, WaitTimeoutError, nearest
from modelyard.serving.deployment.check import check_placement
from modelyard.serving.deployment.config import ModelApp, ServingConfig
from modelyard.serving.deployment.discovery import GATEWAY, Deployed, deployed
from modelyard.serving.deployment.routing import Share
from modelyard.serving.deployment.shares import ShareStore
from modelyard.serving.engines.choice import Machine
from modelyard.serving.loading import describe
from modelyard.serving.protocol import ServedModel

if TYPE_CHECKING:
    from ray.serve import Application

logger = logging.getLogger(__name__)
POLL_S = 0.5
GATEWAY_TIMEOUT_S = 120.0
_PROXIES = {"head": "HeadOnly", "every_node": "EveryNode"}
Say = Callable[[str], None]


def resolve(app: ModelApp, registry: Registry, machine: Machine | None = None) -> tuple[ModelApp, ServedModel, str]:
    """An application with its version and engine fixed, so that all its replicas serve the same; and why that engine.

    Raises:
        what `loading.describe` raises.
    """
    machine = machine or Machine.here()
    if not app.placement.gpus:
        machine = replace(machine, gpus=0)
    elif machine.gpus == 0:  # the head has none, the pool has
        machine = replace(machine, gpus=max(1, int(app.placement.gpus)))
    entry = describe(app.model.with_changes(name=app.name), registry, machine)
    model = app.model.with_changes(name=app.name, reference=entry.served.reference, engine=entry.choice.engine)
    return app.with_changes(model=model.model_dump(mode="json")), entry.served, entry.choice.reason


def model_application_of(app: ModelApp) -> Application:
    """A model as a Serve application, checked as `up` does; for `serve deploy`.

    Raises:
        CapacityError: no node could ever hold it.
        NotFoundError, ConfigError, IntegrityError, ...: it cannot be served.
    """
    from modelyard.serving.deployment.applications import model_application

    check_placement(RayCluster(), app.application, app.placement, max(app.min_replicas, 1))
    resolved, served, why = resolve(app, Registry.from_settings())
    logger.info("%s: %s on %s: %s", app.application, served.reference, served.engine, why)
    return model_application(resolved, served)


def up(config: ServingConfig, say: Say) -> dict[str, Deployed]:
    """Deploy a gateway and models; what runs already as it should is left alone. Waits until all of it answers.

    Raises:
        CapacityError: some replica could never be placed; nothing was deployed.
        NotFoundError, ConfigError, IntegrityError, ...: a model cannot be served, or Serve listens at another address;
            nothing was deployed.
        UnavailableError: a replica does not start; says why.
        WaitTimeoutError: it took longer than `start_timeout_s`.
    """
    from ray import serve

    from modelyard.serving.deployment.applications import gateway_application

    _check_address(config)
    registry, cluster = Registry.from_settings(), RayCluster()
    resolved = []
    for app in config.models:
        check_placement(cluster, app.application, app.placement, max(app.min_replicas, 1))
        resolved.append(resolve(app, registry))
    _check_cascades(config, [served for _, served, _ in resolved], registry)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location=_PROXIES[config.proxies], http_options=config.http_options)
    targets = []
    now = current()
    for app, served, why in resolved:
        say(f"{app.application}: {served.reference} on {served.engine}: {why}")
        before = now.get(app.application)
        if before is not None and before.app == app and before.running:
            say(f"{app.application}: runs already")
        else:
            targets.append(_model_target(app, served))
    if config.gateway is not None:
        targets.append(serve.RunTarget(gateway_application(config.gateway), name=GATEWAY, route_prefix="/"))
    _run(targets)
    for app, _, _ in resolved:
        _wait(app, say)
    if config.gateway is not None:
        wait_for_application(GATEWAY, "the gateway", GATEWAY_TIMEOUT_S, "control.GATEWAY_TIMEOUT_S")
    return current()


def _check_address(config: ServingConfig) -> None:
    """Refuse an address that is not that of the Serve which runs: it would go on with its own and say nothing."""
    options = (_details() or {}).get("http_options")
    if config.gateway is None or not options:
        return
    if (options["host"], options["port"]) != (config.host, config.port):
        raise ConfigError(
            f"Ray Serve listens on {options['host']}:{options['port']} already, not on {config.host}:{config.port}",
            "give that host and port, or end it first: serve shutdown",
        )


def _check_cascades(config: ServingConfig, served: Iterable[ServedModel], registry: Registry) -> None:
    """Refuse cascades that were calibrated with other models than are to be served."""
    known = {each.name: each for each in served}
    for cascade in config.gateway.cascades if config.gateway else ():
        small, large = known.get(cascade.small), known.get(cascade.large)
        if small is not None and large is not None:
            small_digest, large_digest = (registry.resolve(m.reference, kind="model").digest for m in (small, large))
            cascade.calibration.require(small_digest, large_digest, small.engine)


def current() -> dict[str, Deployed]:
    """What is deployed now, by application; empty when Serve does not run."""
    details = _details()
    return deployed(details) if details is not None else {}


def require(application: str) -> Deployed:
    """One of them.

    Raises:
        NotFoundError: it is not deployed.
    """
    now = current()
    if application not in now:
        raise NotFoundError(f"{application!r} is not deployed", nearest(application, now))
    return now[application]


def scale(application: str, min_replicas: int, max_replicas: int, say: Say) -> None:
    """Change the bounds of an application; its replicas go on, those to go are drained."""
    before = require(application)
    if not 0 <= min_replicas <= max_replicas or max_replicas == 0:
        raise ConfigError(
            f"min_replicas={min_replicas}, max_replicas={max_replicas}: 0 <= min <= max and max >= 1 must hold"
        )
    app = before.app.with_changes(min_replicas=min_replicas, max_replicas=max_replicas)
    check_placement(RayCluster(), application, app.placement, max(min_replicas, 1))
    _run([_model_target(app, before.served)])
    _wait(app, say)


def canary(model: str, reference: str, share: Share, database: str | None, say: Say) -> str:
    """Deploy another version of a model beside the stable one, and give it a share of the calls.

    Repeating it with the same reference changes only the share. Returns the canary's application.
    """
    stable = require(model)
    if stable.app.is_canary:
        raise ConfigError(f"{model!r} is a canary itself", "name the stable application")
    plain = stable.app.model.model_dump(mode="json") | {"reference": reference}
    wanted = stable.app.with_changes(is_canary=True, min_replicas=1, max_replicas=1, model=plain)
    app, served, why = resolve(wanted, Registry.from_settings())
    before = current().get(app.application)
    shares = ShareStore(database)
    if before is None or before.app != app or not before.running:
        check_placement(RayCluster(), app.application, app.placement, 1)
        say(f"{app.application}: {served.reference} on {served.engine}: {why}")
        shares.set_share(app.application, Share(0.0))
        _run([_model_target(app, served)])
        _wait(app, say)
    shares.set_share(app.application, share)
    shares.close()
    return app.application


def promote(model: str, database: str | None, say: Say) -> str:
    """Make the canary's version the stable one by a rolling update, then take the canary down. Returns it."""
    stable, beside = require(model), require(f"{model}--canary")
    app = stable.app.with_changes(model=beside.app.model.model_dump(mode="json"))
    _run([_model_target(app, beside.served)])
    _wait(app, say)
    rollback(model, database)
    return beside.served.reference


def rollback(model: str, database: str | None) -> str:
    """Take a model's canary down; the stable deployment gets all calls at once. Returns what it served."""
    beside = require(f"{model}--canary")
    shares = ShareStore(database)
    shares.set_share(beside.app.application, Share(0.0, withdrawn="rolled back by hand"))
    time.sleep(2.0)  # until every gateway has looked; calls it still has are drained
    down([beside.app.application])
    shares.forget(beside.app.application)
    shares.close()
    return beside.served.reference


def down(applications: Iterable[str]) -> None:
    """Take applications down; their calls are finished first."""
    from ray import serve

    for name in applications:
        serve.delete(name)


def _model_target(app: ModelApp, served: ServedModel) -> Any:
    from ray import serve

    from modelyard.serving.deployment.applications import model_application

    return serve.RunTarget(model_application(app, served), name=app.application, route_prefix=None)


def _run(targets: list[Any]) -> None:
    from ray import serve

    if targets:
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _wait(app: ModelApp, say: Say) -> None:
    """Until the application runs as wanted."""
    name, deadline = app.application, time.monotonic() + app.start_timeout_s
    shown = ""
    while True:
        now = current().get(name)
        if now is not None and now.app == app:
            if now.status == "HEALTHY" and (now.running or not app.min_replicas):
                say(f"{name}: runs with {now.running} replica(s)")
                return
            if now.status in ("UNHEALTHY", "DEPLOY_FAILED"):
                raise UnavailableError(
                    f"{name} does not start: {_last_line(now.message)}",
                    f"see `serve status`; remove it: modelyard serve down {name}",
                )
            text = f"{name}: {now.status.lower()}, {now.running} of {now.wanted} running, {now.starting} starting"
            text += f"; {_last_line(now.message)}" if now.message else ""
            if text != shown:
                shown = text
                say(text)
        if time.monotonic() > deadline:
            raise WaitTimeoutError(f"{name} to run", app.start_timeout_s, "start_timeout_s")
        time.sleep(POLL_S)


def wait_for_application(name: str, what: str, timeout_s: float, setting: str) -> None:
    """Until an application of Ray Serve runs; `what` and `setting`, which the timeout comes from, are for errors.

    Raises:
        UnavailableError: it does not start; says why.
        WaitTimeoutError: it took too long.
    """
    from ray import serve

    deadline = time.monotonic() + timeout_s
    while True:
        now = serve.status().applications.get(name)
        if now is not None and now.status == "RUNNING":
            return
        if now is not None and now.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            messages = [*(each.message for each in now.deployments.values()), now.message]
            said = next((message for message in messages if message.strip()), "")
            raise UnavailableError(f"{what} does not start: {_last_line(said)}", "see `serve status`")
        if time.monotonic() > deadline:
            raise WaitTimeoutError(f"{what} to run", timeout_s, setting)
        time.sleep(POLL_S)


def _details() -> Mapping[str, Any] | None:
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    try:
        client = _get_global_client(raise_if_no_controller_running=False)
        return None if client is None else client.get_serve_details()
    except RayServeException:
        return None


def _last_line(message: str) -> str:
    lines = [line for line in message.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"
