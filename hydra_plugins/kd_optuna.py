"""A thin adapter of Optuna to Hydra: `hydra/sweeper=optuna`. What a study is stands in kd/study.py."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from hydra_plugins.kd_sweeper import composed, place


@dataclass
class OptunaConf:
    _target_: str = "hydra_plugins.kd_optuna.OptunaSweeper"
    n_trials: int = 20  # of the whole study, however many processes and restarts it takes
    storage: str = "sqlite:///${paths.runs}/search.db"  # any that Optuna takes; a journal: a path ending in .journal
    study: str | None = None  # its name; null: from what is searched, so that the same command goes on with it
    objective: str = "val_accuracy"  # or val_nll, val_ece, val_agreement, val_teacher_kl; never of test images
    sampler: str = "tpe"  # tpe, random
    pruner: str = "median"  # median, hyperband, none; reads the objective after each epoch
    seed: int | None = 0  # of the sampler
    params: dict[str, str] | None = field(default_factory=dict)  # what is searched, beside the command line


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaConf, provider="kd")


class OptunaSweeper(Sweeper):
    """A trial for each slot that is free, until the study has n."""

    hydra_context: Any
    launcher: Any

    def __init__(self, **settings: Any) -> None:
        self.settings = OptunaConf(**settings)

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from kd.files import write_json
        from kd.settings import UserError
        from kd.study import Study
        from kd.sweep import concluding, plan, slots
        from kd.table import write_plan

        words = [*(f"{key}={value}" for key, value in (self.settings.params or {}).items()), *arguments]
        overrides = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(words)
        said = {override.get_key_element(): override for override in overrides}  # what is said last holds
        space = {key: override for key, override in said.items() if override.is_sweep_override()}
        fixed = [f"{key}={o.get_value_element_as_str()}" for key, o in said.items() if key not in space]
        asked = self.settings
        with concluding(place(self)) as folder:
            self._check(fixed, space)
            searched = [str(o.input_line) for o in space.values()]
            name = asked.study or name_of([*fixed, *searched, asked.objective])
            study = Study(asked.storage, name, asked.n_trials, asked.objective, asked.sampler, asked.pruner, asked.seed)
            write_json(folder / "study.json", {"storage": study.place, "study": name})
            jobs: list[dict[str, Any]] = []

            def source() -> Any:
                while (trial := study.ask()) is not None:
                    typed = [*fixed, *(f"{key}={suggest(trial, key, space[key])}" for key in space)]
                    try:
                        jobs.extend(plan(folder, [composed(self, typed)], jobs))
                    except UserError as error:
                        study.refuse(trial, str(error))
                        continue
                    study.begin(trial, jobs[-1])
                    return [(jobs[-1], typed)]
                return None

            try:
                assert self.config is not None
                workers = slots(self.launcher.slots, asked.n_trials, self.config.device, each_core=False)
                self.launcher.stream(source, asked.n_trials, workers, over=study.over, heard=study.heard)
            finally:
                write_plan(folder, study.jobs())  # the report is on the study, whoever ran its trials

    def _check(self, fixed: list[str], space: dict[str, Override]) -> None:
        """Each bound of each searched key must be allowed by itself. **Raises:** UserError, before any work."""
        from kd.config import check
        from kd.settings import UserError
        from kd.study import BEST, PRUNERS, SAMPLERS

        for name, allowed in (("sampler", SAMPLERS), ("pruner", PRUNERS), ("objective", BEST)):
            if (value := getattr(self.settings, name)) not in allowed:
                raise UserError(f"hydra.sweeper.{name}: {value!r} is not known; allowed: {', '.join(allowed)}")
        if self.settings.n_trials < 1:
            raise UserError(f"hydra.sweeper.n_trials: should be 1 or more, got {self.settings.n_trials}")
        if not hasattr(self.launcher, "stream"):
            several = "to search on several machines, give the same command on each with one hydra.sweeper.storage"
            raise UserError(f"hydra/launcher: hydra/sweeper=optuna needs local; {several}")
        if not space:
            raise UserError("hydra.sweeper.params: nothing is searched; give a key as method.T=interval(1,16)")
        for key, override in space.items():
            ends, log = bounds(override), "log" in getattr(override.value(), "tags", ())
            if isinstance(override.value(), IntervalSweep) and (ends[0] > ends[1] or (log and ends[0] <= 0)):
                raise UserError(f"{key}: interval(a,b) needs a <= b, and a > 0 for its logarithm, got {ends}")
            for end in ends:
                if not check(composed(self, [*fixed, f"{key}={end}"])[1]).described.val:
                    raise UserError("data.val_size: a search needs validation images, got 0")


def name_of(words: list[str]) -> str:
    """A study's name, from all that determines its results."""
    aside = ("paths.", "tracker.", "hydra", "device=", "threads=", "+experiment=")
    said = sorted(word for word in words if not word.startswith(aside))
    return hashlib.sha256(repr(said).encode()).hexdigest()[:12]


def bounds(override: Override) -> list[Any]:
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    return list(override.sweep_string_iterator())


def suggest(trial: Any, key: str, override: Override) -> Any:
    """A value for one key: of interval(a,b) (an integer where both are), tag(log,interval(a,b)), range or choice."""
    value = override.value()
    if not isinstance(value, IntervalSweep):
        return trial.suggest_categorical(key, list(override.sweep_string_iterator()))
    low, high = bounds(override)
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log="log" in value.tags)
    return trial.suggest_float(key, float(low), float(high), log="log" in value.tags)
