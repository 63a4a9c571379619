"""Judge a batch of responses, each with the verifier its prompt, its domain or the settings name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from uniopd_mm.errors import ConfigError
from uniopd_mm.rollout import Outcome, Prompt
from uniopd_mm.verifiers.base import Verifier, get_verifier

if TYPE_CHECKING:
    from typing import Self

    from uniopd_mm.config import VerifierConfig

Item = TypeVar("Item")
Result = TypeVar("Result")


class VerifierPool:
    """The verifiers of a run; a context manager that ends their worker processes on exit.

    Names in the settings are checked at once (:class:`ConfigError`); verifiers are made, and workers started, when first
    needed.
    """

    def __init__(self, config: VerifierConfig | None = None) -> None:
        from uniopd_mm.config import VerifierConfig

        self.config = config or VerifierConfig()
        self._verifiers: dict[str, Verifier] = {}
        for name in (self.config.default, *self.config.by_domain.values()):
            self._verifier(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all worker processes."""
        for verifier in self._verifiers.values():
            verifier.close()

    def name_of(self, prompt: Prompt) -> str:
        """The verifier of a prompt: its own, else its domain's, else the default."""
        return prompt.verifier or self.config.by_domain.get(prompt.domain, self.config.default)

    def check(self, items: Sequence[tuple[Prompt, str]]) -> list[Outcome]:
        """Outcomes of (prompt, response text) pairs, in order."""
        return self._routed(
            items,
            prompt_of=lambda item: item[0],
            judge=lambda verifier, some: verifier.verify_many(some),
            refuse=lambda why: Outcome(None, reason=why),
        )

    def check_golds(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """For each prompt why its gold answer (or verifier) cannot be used; None = it can."""
        return self._routed(
            prompts,
            prompt_of=lambda prompt: prompt,
            judge=lambda verifier, some: verifier.check_golds(some),
            refuse=lambda why: why,
        )

    def check_gold(self, prompt: Prompt) -> str | None:
        """``check_golds`` of one prompt."""
        return self.check_golds([prompt])[0]

    def _routed(
        self,
        items: Sequence[Item],
        prompt_of: Callable[[Item], Prompt],
        judge: Callable[[Verifier, list[Item]], Sequence[Result]],
        refuse: Callable[[str], Result],
    ) -> list[Result]:
        """Results in the order of the items, each verifier called once with all of its own."""
        rows: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            rows.setdefault(self.name_of(prompt_of(item)), []).append(i)
        results: dict[int, Result] = {}
        for name, indices in rows.items():
            try:
                verifier = self._verifier(name)
            except ConfigError as error:  # of single rows; what the settings name was checked at the start
                results |= dict.fromkeys(indices, refuse(str(error)))
                continue
            results |= zip(indices, judge(verifier, [items[i] for i in indices]), strict=True)
        return [results[i] for i in range(len(items))]

    def _verifier(self, name: str) -> Verifier:
        if name not in self._verifiers:
            self._verifiers[name] = get_verifier(name, self.config)
        return self._verifiers[name]
