"""The teachers of a run: weights loaded or servers probed, score caches opened.  All ranks stop when one finds a problem."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uniopd_mm.config import ModelConfig, TeacherConfig, TrainConfig
from uniopd_mm.errors import ConfigError, UniOPDError
from uniopd_mm.models import MultimodalLM, load_model
from uniopd_mm.models.loading import load_processor
from uniopd_mm.teachers.base import AlignedTeacher
from uniopd_mm.teachers.cache import ScoreCache, describe_teacher, read_manifest, write_manifest
from uniopd_mm.teachers.local import LocalTeacher
from uniopd_mm.teachers.pool import TeacherPool
from uniopd_mm.teachers.probe import TOLERANCE
from uniopd_mm.teachers.remote import RemoteTeacher, TeacherServer

if TYPE_CHECKING:
    from uniopd_mm.distributed import World


def open_teachers(config: TrainConfig, world: World, resources: ExitStack) -> TeacherPool:
    """All teachers, ready to score; ``resources`` closes what they hold.

    Call it before the student is loaded: under ZeRO-3 everything loaded after its configuration would be partitioned.
    """
    servers = _connect_servers(config, world, resources)
    caches = _open_caches(config, world, servers, resources)
    models: dict[str, MultimodalLM] = {}
    student = load_processor(config.student)
    teachers: dict[str, AlignedTeacher] = {}
    for name, settings in config.teachers.items():
        if name in servers:
            teachers[name] = RemoteTeacher(name, settings, servers[name], student, caches.get(name))
            continue
        key = settings.model_dump_json(include={*ModelConfig.model_fields, "device"})
        if key not in models:  # teachers with the same weights share them
            models[key] = _load(settings, world)
        teachers[name] = LocalTeacher(
            name,
            settings,
            models[key],
            student,
            config.rollout.concurrent_rollouts,
            config.distributed.micro_tokens,
            caches.get(name),
            device=world.device if settings.device == "swap" else None,
        )
    return TeacherPool(config.teachers, teachers, world)


def _load(settings: TeacherConfig, world: World) -> MultimodalLM:
    model = load_model(settings, world.device if settings.device == "auto" else torch.device("cpu"))
    if settings.device == "swap" and world.device.type == "cuda":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.pin_memory()
    return model


def _connect_servers(config: TrainConfig, world: World, resources: ExitStack) -> dict[str, TeacherServer]:
    """The servers of all teachers that have some, probed."""
    servers, problems = {}, []
    for name, settings in config.teachers.items():
        if settings.server is None:
            continue
        try:
            server = TeacherServer(name, settings, load_processor(settings))
            servers[name] = resources.enter_context(server)
            server.connect()
        except ConfigError as error:
            problems.append(str(error))
    problems = list(dict.fromkeys(world.gather(problems)))
    if problems:
        raise ConfigError("\n  ".join([f"{len(problems)} problems with the teachers' servers:", *problems]))
    return servers


def _open_caches(
    config: TrainConfig, world: World, servers: dict[str, TeacherServer], resources: ExitStack
) -> dict[str, ScoreCache]:
    """A score cache for each teacher; none where the settings name no folder."""
    if config.score_cache is None:
        return {}
    folder = Path(config.score_cache)
    described: list[dict[str, Any] | str] = []
    if world.is_main:  # reads the teachers' files once, for all ranks
        try:
            manifest = read_manifest(folder)
            teachers = {
                name: describe_teacher(
                    settings, servers[name].model if name in servers else None, manifest["files"]
                )
                for name, settings in config.teachers.items()
            }
            for name, server in servers.items():
                teachers[name]["fingerprint"] = server.fingerprint()
                before = manifest["teachers"].get(teachers[name]["identity"], {}).get("fingerprint")
                _require_same_weights(name, server, teachers[name]["fingerprint"], before)
            write_manifest(folder, teachers)
            described = [{name: entry["identity"] for name, entry in teachers.items()}]
        except (UniOPDError, OSError) as error:
            described = [f"score_cache={folder}: {error}"]
    (identities,) = world.gather(described)
    if isinstance(identities, str):
        raise ConfigError(identities)
    return {
        name: resources.enter_context(ScoreCache(folder, identity, world.rank))
        for name, identity in identities.items()
    }


def _require_same_weights(
    name: str, server: TeacherServer, now: list[float], before: list[float] | None
) -> None:
    """ConfigError when a server answers a known text otherwise than when its scores were filed."""
    if before is None:
        return
    difference = max(abs(a - b) for a, b in zip(now, before, strict=True))
    limit = TOLERANCE[server.settings.dtype]
    if difference > limit:
        raise ConfigError(
            f"the servers of teacher '{name}' score a known text by {difference:.3g} nats differently (limit {limit}) from "
            f"when the cache was filled: other weights under the name '{server.model}'. Type score_cache=ANOTHER_FOLDER, "
            "or start the servers with the weights of then"
        )
