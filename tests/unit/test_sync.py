"""Servers get what the student is now, whole, when it is due; a failure on the first rank is one on every rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rooms
import torch
from safetensors.torch import load_file

from uniopd_mm.config import RolloutServerConfig, StudentConfig
from uniopd_mm.distributed import World
from uniopd_mm.engines import EngineError
from uniopd_mm.errors import UniOPDError
from uniopd_mm.models import load_student
from uniopd_mm.rollout import Group, Prompt, Rollout
from uniopd_mm.servers import ServerError
from uniopd_mm.training.sync import WeightSync, require_match

ALONE = World(0, 1, 0, rooms.CPU)


class Servers:
    """An engine that remembers what it was told to load, and how the folder was then."""

    def __init__(self) -> None:
        self.weight_version, self.synced = 0, False
        self.loaded: list[tuple[str, int]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.broken = False

    def load_weights(self, folder: str, version: int) -> None:
        if self.broken:
            raise ServerError("http://node1:8000 did not load the weights")
        self.loaded.append((folder, version))
        self.weights = load_file(Path(folder) / "model.safetensors")


class Rank(World):
    """One of several ranks in threads of this process."""

    def __init__(self, rank: int, meeting: threading.Barrier, table: list[Any]) -> None:
        super().__init__(rank, meeting.parties, rank, rooms.CPU)
        object.__setattr__(self, "meeting", meeting)
        object.__setattr__(self, "table", table)

    def gather(self, items: Iterable[Any]) -> list[Any]:
        self.table[self.rank] = list(items)
        self.barrier()
        everything = [item for part in self.table for item in part]
        self.barrier()
        return everything

    def barrier(self) -> None:
        self.meeting.wait(timeout=10)


def _trainer(model: Path, lora: dict[str, Any] | None = None) -> Any:
    student = StudentConfig.model_validate(
        {"model": str(model), "dtype": "float32", "freeze": [], "lora": lora}
    )
    return SimpleNamespace(
        config=SimpleNamespace(student=student, distributed=SimpleNamespace(zero_stage=0)),
        student=load_student(student),
        updates=0,
        release_zero3_config=lambda: None,
    )


def _sync(trainer: Any, out: Path, servers: Servers, world: World = ALONE, **settings: Any) -> WeightSync:
    server = RolloutServerConfig.model_validate({"urls": ["http://node1:8000"], **settings})
    return WeightSync(servers, trainer, world, server, out)


def _take_a_step(trainer: Any) -> None:
    """Other weights, as after an update."""
    generator = torch.Generator().manual_seed(trainer.updates)
    with torch.no_grad():
        for parameter in trainer.student.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    trainer.updates += 1


@pytest.fixture
def trainer(tiny_models: Mapping[str, Path]) -> Any:
    return _trainer(tiny_models["llava"])


def test_servers_get_the_weights_of_the_latest_update(trainer: Any, tmp_path: Path) -> None:
    servers = Servers()
    sync = _sync(trainer, tmp_path, servers)
    for _ in range(2):
        assert sync.update()
        found = rooms.load(Path(servers.loaded[-1][0])).transformer.state_dict()
        for name, tensor in trainer.student.model.state_dict().items():
            assert torch.equal(found[name], tensor), name
        assert servers.weight_version == trainer.updates
        _take_a_step(trainer)
    assert servers.loaded == [
        (str(tmp_path / "sync" / "weights_000000"), 0),
        (str(tmp_path / "sync" / "weights_000001"), 1),
    ]


@pytest.mark.parametrize("stages", [["language"], ["vision", "projector", "language"]])
def test_servers_get_adapters_merged_and_the_student_keeps_its_own(
    stages: list[str], tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    trainer = _trainer(tiny_models["llava"], lora={"rank": 2, "stages": stages})
    _take_a_step(trainer)
    before = {k: v.clone() for k, v in trainer.student.model.state_dict().items()}
    servers = Servers()
    _sync(trainer, tmp_path, servers).update()
    merged = rooms.load(Path(servers.loaded[0][0]))
    (group,) = rooms.make_groups(trainer.student, (1,))
    ids = torch.tensor([20, 21, 22, 23])
    wanted = rooms.plain_logprobs(trainer.student, group, ids)
    assert (wanted - rooms.plain_logprobs(rooms.load(tiny_models["llava"]), group, ids)).abs().max() > 1e-2
    torch.testing.assert_close(rooms.plain_logprobs(merged, group, ids), wanted, atol=1e-4, rtol=0)
    after = trainer.student.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize(("every", "synced_at"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_servers_are_as_many_steps_behind_as_allowed_and_no_more(
    trainer: Any, tmp_path: Path, every: int, synced_at: list[int]
) -> None:
    servers = Servers()
    sync = _sync(trainer, tmp_path, servers, sync_every=every)
    for updates in range(5):
        trainer.updates = updates
        assert sync.update() is (updates in synced_at)
        assert not sync.update()  # nothing happened since: evaluation after sampling costs no second copy
    assert [version for _, version in servers.loaded] == synced_at


def test_a_resumed_run_syncs_at_once(trainer: Any, tmp_path: Path) -> None:
    """The servers still have what the run had when it was killed."""
    trainer.updates = 7
    servers = Servers()
    servers.weight_version = 7
    assert _sync(trainer, tmp_path, servers, sync_every=5).update()
    assert servers.loaded[0][1] == 7


def test_never_means_never(trainer: Any, tmp_path: Path) -> None:
    servers = Servers()
    sync = _sync(trainer, tmp_path, servers, sync="never")
    trainer.updates = 3
    assert not sync.update()
    assert not servers.synced and servers.weight_version == 0
    assert not servers.loaded and not list(tmp_path.iterdir())


def test_the_two_newest_folders_stay_and_nothing_else_is_touched(trainer: Any, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "step_000001").mkdir(parents=True)  # somebody's checkpoint
    (shared / "weights_000009.tmp").mkdir()  # what a killed run left
    sync = _sync(trainer, tmp_path, Servers(), sync_folder=str(shared))
    for updates in range(4):
        trainer.updates = updates
        sync.update()
    assert sorted(p.name for p in shared.iterdir()) == ["step_000001", "weights_000002", "weights_000003"]


def test_a_run_that_resumed_earlier_keeps_the_weights_its_servers_have(trainer: Any, tmp_path: Path) -> None:
    for updates in (5, 6, 2, 3):
        trainer.updates = updates
        _sync(trainer, tmp_path, Servers()).update()
    assert sorted(p.name for p in (tmp_path / "sync").iterdir()) == ["weights_000002", "weights_000003"]


def test_servers_are_told_an_absolute_folder(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    servers = Servers()
    _sync(trainer, Path("runs/a"), servers).update()
    assert servers.loaded[0][0] == str(tmp_path / "runs" / "a" / "sync" / "weights_000000")


def test_servers_that_did_not_load_are_asked_again(trainer: Any, tmp_path: Path) -> None:
    servers = Servers()
    sync = _sync(trainer, tmp_path, servers)
    sync.update()
    _take_a_step(trainer)
    servers.broken = True
    with pytest.raises(ServerError, match="did not load"):
        sync.update()
    assert servers.weight_version == 0
    servers.broken = False
    assert sync.update() and servers.weight_version == 1


def test_one_rank_tells_the_servers_and_all_know(trainer: Any, tmp_path: Path) -> None:
    engines = [Servers(), Servers(), Servers()]
    trainer.updates = 4
    errors = _on_all_ranks(lambda world: _sync(trainer, tmp_path, engines[world.rank], world).update())
    assert errors == [None] * 3
    assert [len(engine.loaded) for engine in engines] == [1, 0, 0]
    assert all(engine.synced and engine.weight_version == 4 for engine in engines)


def test_servers_that_fail_the_first_rank_fail_every_rank(trainer: Any, tmp_path: Path) -> None:
    """Otherwise the others wait for it until the process group gives up."""
    engines = [Servers(), Servers(), Servers()]
    engines[0].broken = True
    errors = _on_all_ranks(lambda world: _sync(trainer, tmp_path, engines[world.rank], world).update())
    assert isinstance(errors[0], ServerError)
    assert all(isinstance(error, UniOPDError) and "did not load" in str(error) for error in errors)
    assert not any(engine.synced for engine in engines)


def test_weights_that_cannot_be_written_fail_every_rank(trainer: Any, tmp_path: Path) -> None:
    (tmp_path / "sync").write_text("a file where the folder should be")
    engines = [Servers(), Servers(), Servers()]
    errors = _on_all_ranks(lambda world: _sync(trainer, tmp_path, engines[world.rank], world).update())
    assert isinstance(errors[0], OSError)
    assert all(isinstance(error, UniOPDError) for error in errors[1:])


def _on_all_ranks(action: Callable[[World], object]) -> list[BaseException | None]:
    """What three ranks raise."""
    meeting, table = threading.Barrier(3), [[], [], []]
    errors: list[BaseException | None] = [None] * 3

    def run(rank: int) -> None:
        try:
            action(Rank(rank, meeting, table))
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_servers_that_sample_from_other_weights_stop_the_run() -> None:
    def groups(away: float) -> list[Group]:
        ids = torch.tensor([4, 5, 6])
        rollout = Rollout(ids, torch.full((3,), -2.0), "stop", student_logprobs=torch.full((3,), -2.0 - away))
        return [Group(Prompt(id="p", messages=()), None, (rollout,) * 2)]

    require_match(groups(0.4), ALONE, limit=0.5)
    require_match([], ALONE, limit=0.5)
    with pytest.raises(EngineError, match=r"0.6 nats a token .*max_mismatch=0.5.*tied embeddings"):
        require_match(groups(0.6), ALONE, limit=0.5)
